"""What a predictor of next scales is trained on: a motion's latents, stored once, and packed batches of bits.

    DATASET/scales/NAME/  latents.npy (rows, parts, bits), offsets.npy (items + 1,) and a manifest.json

The latents are stored and not the bits: under bit self-correction the targets of a scale are the bits of what
the corrupted coarser scales left over, which the bits alone do not tell. In float32, so that the bits drawn
from them are the tokenizer's; they take 16% of what the features take, and an encoder's pass is saved.

Shapes: B motions, N packed tokens, L tokens of the longest motion, S scales, d bits, P text states.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from scamo.data import storage
from scamo.data.batches import BatchPlan, Draw, PackedLoader, null_text
from scamo.data.dataset import (
    SCHEMA_VERSION,
    MotionDataset,
    TextStore,
    _check_store_name,
    _choose,
    _Store,
    _store_names,
    _stream,
)
from scamo.device import resolve_device
from scamo.errors import ScaMoError
from scamo.tokenizers.multiscale import MultiscaleQuantizer, MultiscaleTokenizer, latents_of
from scamo.tokenizers.skeletal import PARTS

FORMAT = "scamo-motion-scales"
BATCH_MOTIONS = 32


class ScaleStore(_Store):
    """The latents of every item before quantisation: store[item] is float32 (n, parts, d), n >= 1.

    scales, bits: of the tokenizer; lengths int64 (items,): latents of each; tokenizer: which one made them.
    """

    def __init__(self, dataset: MotionDataset, name: str = "", *, hashes: bool = False) -> None:
        folder, command = dataset.folder / "scales", "encode_scales"
        name = _choose(name, _store_names(folder), dataset.folder, "latents of scales", command)
        super().__init__(dataset, name, "scales", FORMAT, hashes)
        self.scales = tuple((int(bins), int(regions)) for bins, regions in self.manifest["scales"])
        self.bits = int(self.manifest["bits"])
        self.tokenizer: dict[str, Any] = self.manifest["tokenizer"]
        self._latents = self._map("latents.npy")
        self._offsets = np.array(self._map("offsets.npy"))
        self._check_offsets(self._offsets, dataset.n_items, len(self._latents))
        self.lengths: NDArray[np.int64] = np.diff(self._offsets)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, item: int) -> NDArray[np.float32]:
        return self._latents[self._offsets[item] : self._offsets[item + 1]]


@torch.inference_mode()
def encode_scales(
    tokenizer_folder: str | Path,
    dataset_folder: str | Path,
    *,
    name: str = "",
    device: str = "auto",
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Write the latents of every item to DATASET/scales/NAME. What exceeds the tokenizer's longest is cut.

    Args:
        tokenizer_folder: a trained multi-scale tokenizer.
        dataset_folder: the dataset.
        name: what to call them; the tokenizer folder's name without it.
        device: auto, cpu or cuda.
        overwrite: replace those of the same name.
        progress: show a bar, and print how many items were cut.

    Returns:
        The folder that was written.

    Raises:
        ScaMoError: a folder that does not open or fit, latents of that name without `overwrite`, or features
            that are not finite; nothing is left behind.
    """
    source = Path(tokenizer_folder).resolve()
    tokenizer = MultiscaleTokenizer.load(source, resolve_device(device))
    config, dataset = tokenizer.config, MotionDataset.open(dataset_folder)
    found, expected = (dataset.feature_dim, dataset.variant), (config.feature_dim, config.variant)
    if found != expected:
        raise ScaMoError(
            f"{dataset.folder}: {found[0]} {found[1]} features a frame, "
            f"the tokenizer has {expected[0]} {expected[1]} ones"
        )
    folder = dataset.folder / "scales" / _check_store_name(name or source.name)
    with storage.whole_folder(folder, overwrite=overwrite) as temporary:
        with _stream(temporary / "latents.npy", np.float32, (PARTS, config.bits)) as stream:
            offsets = array("q", [0])
            with tqdm(total=dataset.n_items, desc="latents", unit="item", disable=not progress) as bar:
                for first in range(0, dataset.n_items, BATCH_MOTIONS):
                    items = range(first, min(first + BATCH_MOTIONS, dataset.n_items))
                    for latents in _encode(tokenizer, dataset, items):
                        stream.append(latents)
                        offsets.append(stream.rows)
                    bar.update(len(items))
            files = {"latents.npy": stream.close()}
        table = np.array(offsets, dtype=np.int64)
        files["offsets.npy"] = storage.write_array(temporary / "offsets.npy", table)
        manifest = {
            "format": FORMAT,
            "schema_version": SCHEMA_VERSION,
            "dataset_sha256": dataset.manifest_sha256,
            "scales": [list(scale) for scale in config.scales],
            "bits": config.bits,
            "tokenizer": {
                "folder": source.name,
                "weights_sha256": storage.sha256_of(source / "model.safetensors"),
            },
            "files": files,
        }
        storage.write_manifest(temporary, manifest)
    cut = int((dataset.item_lengths > config.max_frames).sum())
    if progress and cut:
        print(f"cut {cut} of {dataset.n_items} items to {config.max_frames} frames")
    return folder


def _encode(
    tokenizer: MultiscaleTokenizer, dataset: MotionDataset, items: Sequence[int]
) -> Iterator[NDArray[np.float32]]:
    motions = [dataset.item_features(item)[: tokenizer.config.max_frames] for item in items]
    lengths = torch.tensor([len(motion) for motion in motions])
    features = torch.zeros(len(motions), int(lengths.max()), dataset.feature_dim)
    for row, item, motion in zip(features, items, motions, strict=True):
        if not np.isfinite(motion).all():
            raise ScaMoError(f"{dataset.folder}: {dataset.item_name(item)}: a feature is not finite")
        row[: len(motion)] = torch.from_numpy(np.array(motion))
    device = tokenizer.mean.device
    latents = tokenizer.latents(features.to(device), lengths.to(device)).cpu().numpy()
    for row, count in zip(latents, latents_of(lengths).tolist(), strict=True):
        yield row[:count]


class Layout(NamedTuple):
    """Where the tokens of B motions stand when only those that are there are packed, N of them.

    sample, tokens int64 (N,): the motion of each, and its number among the L. cu_seqlens int32 (B + 1).
    bounds int32 (N,): tokens of the motion up to the end of the token's own scale, which it may look at.
    longest: tokens of the longest motion here.
    """

    sample: Tensor
    tokens: Tensor
    cu_seqlens: Tensor
    bounds: Tensor
    longest: int


def pack_layout(valid: Tensor, slices: Sequence[slice]) -> Layout:
    """The layout of the tokens that motions have. valid: bool (B, L); slices: of the scales in L."""
    sample, tokens = valid.nonzero(as_tuple=True)
    ends = torch.stack([valid[:, span].sum(1) for span in slices], 1).cumsum(1)
    level = torch.cat([torch.full((s.stop - s.start,), i) for i, s in enumerate(slices)]).to(valid.device)
    lengths = ends[:, -1]
    cu_seqlens = torch.cat((lengths.new_zeros(1), lengths.cumsum(0))).int()
    bounds = ends[sample, level[tokens]].int()
    return Layout(sample, tokens, cu_seqlens, bounds, int(lengths.max()))


@dataclass(frozen=True)
class ScaleBatch:
    """B motions, their texts and their tokens on all scales, packed.

    text_states float32 (P, text width) and cu_text int32 (B + 1): the texts' states. inputs float32 (N, d):
    what the coarser scales add up to, see `MultiscaleQuantizer.inputs`. targets int32 (N,): the bits. sample,
    tokens, cu_seqlens, bounds, longest: see `Layout`. latents int64 (B,): of each motion. longest_text: of
    the texts. seed: of what a model draws for the batch. item_ids, caption_ids int64 (B,).
    """

    text_states: Tensor
    cu_text: Tensor
    inputs: Tensor
    targets: Tensor
    sample: Tensor
    tokens: Tensor
    cu_seqlens: Tensor
    bounds: Tensor
    latents: Tensor
    item_ids: Tensor
    caption_ids: Tensor
    longest: int
    longest_text: int
    seed: int

    @property
    def n_samples(self) -> int:
        return self.latents.shape[0]

    @property
    def n_positions(self) -> int:
        """Tokens that the transformer computes: N."""
        return self.tokens.shape[0]

    def _map(self, function) -> ScaleBatch:
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: function(t) for name, t in tensors.items() if isinstance(t, Tensor)})

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> ScaleBatch:
        """The same batch on another device."""
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> ScaleBatch:
        """The same batch in page-locked memory, for `.to("cuda", non_blocking=True)`."""
        return self._map(lambda t: t.pin_memory())


@dataclass(frozen=True)
class ScaleSample:
    """One text and one motion: text (P, width) float, latents (n, parts, d) float32, P >= 1 and n >= 1."""

    text: NDArray
    latents: NDArray
    item: int = -1
    caption: int = -1


def collate_scales(
    samples: Sequence[ScaleSample], quantizer: MultiscaleQuantizer, *, seed: int = 0, correct: bool = False
) -> ScaleBatch:
    """Quantise and pack samples in the given order; `quantizer` is on the CPU.

    correct: bits are flipped in the inputs, at rates drawn from `seed` (bit self-correction); without, the
    targets are the tokenizer's bits. Raises ScaMoError for no sample, one without text or latents, texts of
    different widths, or latents that the quantiser does not take; the message names the sample and its item.
    """
    if not samples:
        raise ScaMoError("cannot pack a batch of no samples")
    width = samples[0].text.shape[-1]
    for index, sample in enumerate(samples):
        where = f"sample {index} (item {sample.item}, caption {sample.caption})"
        if sample.text.ndim != 2 or sample.text.shape[0] < 1 or sample.text.shape[1] != width:
            raise ScaMoError(f"{where}: text states of shape {sample.text.shape}, expected (P >= 1, {width})")
        shape = sample.latents.shape
        if len(shape) != 3 or not 1 <= shape[0] <= quantizer.latents or shape[1:] != (PARTS, quantizer.bits):
            expected = f"(1 to {quantizer.latents}, {PARTS}, {quantizer.bits})"
            raise ScaMoError(f"{where}: latents of shape {shape}, expected {expected}")
    n = torch.tensor([len(sample.latents) for sample in samples])
    z = torch.zeros(len(samples), quantizer.latents, PARTS, quantizer.bits)
    for row, sample in zip(z, samples, strict=True):
        row[: len(sample.latents)] = torch.from_numpy(np.array(sample.latents))
    generator = torch.Generator().manual_seed(seed)
    rates = quantizer.draw_rates(generator) if correct else None
    made = quantizer.corrupt(z, n, rates, generator)
    layout = pack_layout(quantizer.valid(n), quantizer.slices)
    rows = layout.sample, layout.tokens
    text = np.array([len(sample.text) for sample in samples])
    return ScaleBatch(
        text_states=torch.from_numpy(np.concatenate([s.text for s in samples]).astype(np.float32)),
        cu_text=torch.from_numpy(np.concatenate([[0], np.cumsum(text)]).astype(np.int32)),
        inputs=made.inputs[rows],
        targets=made.targets[rows],
        sample=layout.sample,
        tokens=layout.tokens,
        cu_seqlens=layout.cu_seqlens,
        bounds=layout.bounds,
        latents=n,
        item_ids=torch.tensor([s.item for s in samples], dtype=torch.int64),
        caption_ids=torch.tensor([s.caption for s in samples], dtype=torch.int64),
        longest=layout.longest,
        longest_text=int(text.max()),
        seed=seed,
    )


def tokens_of(quantizer: MultiscaleQuantizer) -> NDArray[np.int64]:
    """How many tokens a motion of n latents has, for n from 0 to the most: int64 (latents + 1,)."""
    return quantizer.valid(torch.arange(quantizer.latents + 1)).sum(1).numpy()


def scale_plan(
    dataset: MotionDataset,
    split: str,
    store: ScaleStore,
    text: TextStore,
    quantizer: MultiscaleQuantizer,
    *,
    seed: int,
    micro_batch_tokens: int,
    micro_batches: int,
    drop_text: float,
    max_text: int,
) -> BatchPlan:
    """A `BatchPlan` of a split's items, each whole; its positions are text states and tokens.

    Raises ScaMoError: an empty split, an item too long for a micro-batch, a seed or probability that is none.
    """
    items = dataset.items(split)
    if not len(items):
        raise ScaMoError(f"{dataset.folder}: split {split} has no items")
    spans = [dataset.captions_of(item) for item in items]
    tokens = tokens_of(quantizer)
    plan = BatchPlan(
        items,
        tokens[store.lengths[items]],
        np.array([span[0] for span in spans]),
        np.array([len(span) for span in spans]),
        text.lengths,
        seed=seed,
        micro_batch_tokens=micro_batch_tokens,
        micro_batches=micro_batches,
        drop_token=0.0,
        drop_text=drop_text,
        max_text=max_text,
        max_motion=int(tokens[-1]),
        name_of=dataset.item_name,
    )
    plan.text = text
    return plan


class ScaleLoader(PackedLoader):
    """Reads, quantises and packs what a `scale_plan` says; rank r of w gets r, r + w, ... of every step.

    The flips of bit self-correction are a function of the seed, the step and the micro-batch. `steps` packs
    ahead in a thread. Raises ScaMoError as `PackedLoader`, and for a store of other scales or bits.
    """

    def __init__(
        self,
        dataset: MotionDataset,
        split: str,
        plan: BatchPlan,
        store: ScaleStore,
        quantizer: MultiscaleQuantizer,
        *,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if store.scales != tuple(quantizer.scales) or store.bits != quantizer.bits:
            raise ScaMoError(f"{store.folder}: made by a tokenizer of other scales or bits")
        super().__init__(dataset, split, plan, rank=rank, world=world, tokens=store)  # type: ignore[arg-type]
        self._dataset, self._store, self._quantizer = dataset, store, quantizer

    def step(self, step: int) -> list[ScaleBatch]:  # type: ignore[override]
        """This rank's micro-batches of a step."""
        draws = self.plan.step(step)
        return [
            collate_scales(
                [self._sample(draw) for draw in draws[index]],
                self._quantizer,
                seed=int(np.random.SeedSequence((self.plan.seed, step, index)).generate_state(1)[0]),
                correct=True,
            )
            for index in range(self.rank, len(draws), self.world)
        ]

    def validation(self, split: str) -> Iterator[ScaleBatch]:
        """Every item of a split once, in order, with its first caption and no flips: this rank's share.

        The micro-batches are the same for any number of ranks; some ranks may get one less. Raises ScaMoError
        for an item that alone exceeds a micro-batch.
        """
        lengths, room = tokens_of(self._quantizer)[self._store.lengths], self.plan.micro_batch_tokens
        samples: list[ScaleSample] = []
        used = index = 0
        for item in self._dataset.items(split).tolist():
            sample = self._sample(Draw(item, int(self._dataset.captions_of(item)[0]), 0))
            length = len(sample.text) + int(lengths[item])
            if length > room:
                name = self._dataset.item_name(item)
                raise ScaMoError(f"micro_batch_tokens = {room}: item {item} ({name}) alone takes {length}")
            if used + length > room:
                if index % self.world == self.rank:
                    yield collate_scales(samples, self._quantizer)
                index, samples, used = index + 1, [], 0
            samples.append(sample)
            used += length
        if samples and index % self.world == self.rank:
            yield collate_scales(samples, self._quantizer)

    def _sample(self, draw: Draw) -> ScaleSample:
        lost = draw.caption < 0
        text = null_text(self._text.width) if lost else self.plan.text_rows(self._text[draw.caption])
        return ScaleSample(text, self._store[draw.item], draw.item, draw.caption)


def check_tokenizer(store: ScaleStore, folder: str | Path) -> None:
    """Raises ScaMoError where another tokenizer than that in `folder` made the latents."""
    made_by = store.tokenizer.get("weights_sha256")
    if made_by != storage.sha256_of(Path(folder) / "model.safetensors"):
        raise ScaMoError(f"{folder}: another tokenizer made the latents in {store.folder}")
