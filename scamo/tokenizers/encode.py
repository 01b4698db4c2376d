"""Motions of any lengths <-> tokens, each exactly as if it were alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from scamo.config import TokenizerConfig
from scamo.data.dataset import MotionDataset, write_tokens
from scamo.data.storage import sha256_of
from scamo.device import resolve_device
from scamo.errors import ScaMoError
from scamo.tokenizers import load_tokenizer
from scamo.tokenizers.autoencoder import MotionAutoencoder

# Frames of one batch: enough to fill two cores or a GPU, about 100 MB of activations at full width.
BATCH_FRAMES = 16_384


def length_groups(
    lengths: Sequence[int] | NDArray, downsampling: int, batch_frames: int
) -> Iterator[list[int]]:
    """Batches of indices into `lengths`, each of one number of tokens; those below one token are in none.

    A padded batch would not do: the convolutions see zeros past a motion's end, whatever stands there.
    """
    groups: dict[int, list[int]] = defaultdict(list)
    for index, length in enumerate(lengths):
        groups[int(length) // downsampling].append(index)
    for tokens in sorted(groups):
        if tokens == 0:
            continue
        size = max(1, batch_frames // (tokens * downsampling))
        for start in range(0, len(groups[tokens]), size):
            yield groups[tokens][start : start + size]


def encode_motions(
    tokenizer: MotionAutoencoder, motions: Sequence[NDArray[np.float32]], *, batch_frames: int = BATCH_FRAMES
) -> list[NDArray[np.int32]]:
    """Encode motions of any lengths, each as if alone.

    motions: arrays (T, C) of raw features. Returns int32 arrays (N,), N = T // downsampling, or (N, Q)
    where a token has several indices; empty for a motion shorter than a token. Raises ScaMoError naming a
    motion that is not finite or of another width.
    """
    lengths = []
    for index, motion in enumerate(motions):
        if motion.ndim != 2 or motion.shape[1] != tokenizer.config.feature_dim:
            expected = f"(frames, {tokenizer.config.feature_dim})"
            raise ScaMoError(f"motion {index}: shape {motion.shape}, expected {expected}")
        lengths.append(motion.shape[0])
    several = (tokenizer.config.indices_per_token,) if tokenizer.config.indices_per_token > 1 else ()
    tokens = [np.empty((0, *several), dtype=np.int32)] * len(lengths)
    for batch in length_groups(lengths, tokenizer.downsampling, batch_frames):
        for index, indices in zip(batch, encode_batch(tokenizer, motions, batch)[1], strict=True):
            tokens[index] = indices.cpu().numpy()
    return tokens


@torch.inference_mode()
def encode_batch(
    tokenizer: MotionAutoencoder, motions: Sequence[NDArray[np.float32]], batch: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Motions `batch`, of one number of tokens -> raw features (B, T, C) and indices as `encode` gives them.

    Both on the tokenizer's device. Raises ScaMoError naming a motion that is not finite.
    """
    frames = motions[batch[0]].shape[0] // tokenizer.downsampling * tokenizer.downsampling
    raw = np.stack([motions[index][:frames] for index in batch])
    if not np.isfinite(raw).all():
        bad = batch[int(np.argmin(np.isfinite(raw).all(axis=(1, 2))))]
        raise ScaMoError(f"motion {bad}: a feature is not finite")
    features = torch.from_numpy(raw).to(tokenizer.mean.device)
    return features, tokenizer.encode(features)


def decode_tokens(
    tokenizer: MotionAutoencoder, tokens: Sequence[NDArray[np.integer]], *, batch_frames: int = BATCH_FRAMES
) -> list[NDArray[np.float32]]:
    """Decode token arrays (n,) or (n, Q) of any lengths, each as if alone.

    Returns raw features, float32 (n * downsampling, C). Raises ScaMoError for an empty array, or a
    token outside 0 .. K-1.
    """
    lengths = [len(array) * tokenizer.downsampling for array in tokens]
    if not all(lengths):
        raise ScaMoError(f"motion {lengths.index(0)}: no tokens to decode")
    features: list[NDArray[np.float32]] = [np.empty(0, dtype=np.float32)] * len(lengths)
    with torch.inference_mode():
        for batch in length_groups(lengths, tokenizer.downsampling, batch_frames):
            stacked = np.stack([np.asarray(tokens[index], dtype=np.int64) for index in batch])
            decoded = tokenizer.decode(torch.from_numpy(stacked).to(tokenizer.mean.device))
            for index, motion in zip(batch, decoded.cpu().numpy(), strict=True):
                features[index] = motion
    return features


class ItemFeatures(Sequence):
    """The features of chosen items of a dataset, read when they are asked for."""

    def __init__(self, dataset: MotionDataset, items: NDArray[np.int64]) -> None:
        self.dataset, self.items = dataset, items
        self.lengths = dataset.item_lengths[items]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index):  # type: ignore[override]
        return self.dataset.item_features(int(self.items[index]))


def open_matching(tokenizer: MotionAutoencoder, dataset_folder: str | Path) -> MotionDataset:
    """Open a dataset of the features that a tokenizer is for. Raises ScaMoError where they differ."""
    dataset = MotionDataset.open(dataset_folder)
    if dataset.feature_dim != tokenizer.config.feature_dim:
        raise ScaMoError(
            f"{dataset.folder}: {dataset.feature_dim} features a frame, "
            f"the tokenizer has {tokenizer.config.feature_dim}"
        )
    if dataset.variant != tokenizer.config.variant:
        raise ScaMoError(
            f"{dataset.folder}: {dataset.variant} features, the tokenizer was trained on "
            f"{tokenizer.config.variant} ones"
        )
    return dataset


def check_one_index(config: TokenizerConfig, where: str | Path) -> None:
    """Raises ScaMoError for a tokenizer whose tokens the transformer cannot take: several indices each."""
    if config.indices_per_token > 1:
        raise ScaMoError(
            f"{where}: this tokenizer has {config.indices_per_token} indices a token (groups = "
            f"{config.groups}, residual = {config.residual}); the transformer takes one"
        )


def encode_dataset(
    tokenizer_folder: str | Path,
    dataset_folder: str | Path,
    *,
    name: str = "",
    device: str = "auto",
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Write the tokens of every item beside the dataset's features, as DATASET/tokens/NAME.

    An item is floored to whole tokens; one that is shorter than a token gets none, and is counted.

    Args:
        tokenizer_folder: a trained tokenizer.
        dataset_folder: the dataset.
        name: what to call the tokens; the tokenizer folder's name without it.
        device: auto, cpu or cuda.
        overwrite: replace tokens of the same name.
        progress: show a bar and print what was refused.

    Returns:
        The folder that was written.

    Raises:
        ScaMoError: a folder that does not open or fit, a tokenizer of several indices a token, tokens of that
            name without `overwrite`, or features that are not finite; nothing is left behind.
    """
    tokenizer_folder = Path(tokenizer_folder).resolve()
    tokenizer = load_tokenizer(tokenizer_folder, resolve_device(device))
    check_one_index(tokenizer.config, tokenizer_folder)
    dataset = open_matching(tokenizer, dataset_folder)
    name = name or tokenizer_folder.name
    if (dataset.folder / "tokens" / name).exists() and not overwrite:
        raise ScaMoError(f"{dataset.folder / 'tokens' / name} exists: ask for it to be overwritten")

    items = ItemFeatures(dataset, np.arange(dataset.n_items))
    tokens = [np.empty(0, dtype=np.int32)] * len(items)
    total = int((items.lengths // tokenizer.downsampling).sum())
    with tqdm(total=total, desc="tokens", unit="tok", unit_scale=True, disable=not progress) as bar:
        for batch in length_groups(items.lengths, tokenizer.downsampling, BATCH_FRAMES):
            try:
                indices = encode_batch(tokenizer, items, batch)[1].cpu().numpy()
            except ScaMoError as error:
                raise ScaMoError(f"{dataset.folder}: {error}") from None
            for index, row in zip(batch, indices, strict=True):
                tokens[index] = row
            bar.update(indices.size)
    short = sum(array.size == 0 for array in tokens)
    folder = write_tokens(
        dataset_folder,
        name,
        tokens,
        codes=tokenizer.codes,
        downsampling=tokenizer.downsampling,
        tokenizer={
            "folder": tokenizer_folder.name,
            "weights_sha256": sha256_of(tokenizer_folder / "model.safetensors"),
        },
        overwrite=overwrite,
    )
    if progress and short:
        print(
            f"refused {short} of {len(items)} items: shorter than one token ({tokenizer.downsampling} frames)"
        )
    return folder
