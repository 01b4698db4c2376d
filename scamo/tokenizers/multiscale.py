"""ScaleMoGen's tokenizer: a skeletal-temporal auto-encoder around a multi-scale residual bitwise quantiser.

A motion is 11 maps of tokens, coarse to fine, one bin in time and one region of the body at first and 49 bins
of 7 parts at last. A token is `bits` signs, packed into an int32 with channel 0 least significant. The time
grid is that of the longest motion, whatever the length; bins past a motion's end are not there.

Shapes: B motions, T frames, C features, N latents (a latent is 4 frames), P = 7 parts of the body, W width,
d bits, S scales of (T_s, R_s) bins and regions, L = sum of T_s R_s tokens: scale after scale, time-major.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Self, cast

import numpy as np
import torch
import torch.nn.functional as F
from scamo_kernels import bsq_dequantize, bsq_quantize
from torch import Tensor, nn

from scamo.config import from_dict, to_dict
from scamo.data.storage import whole_folder
from scamo.errors import ScaMoError
from scamo.motion.features import FEATURE_DIM
from scamo.motion.per_joint import PerJoint
from scamo.motion.representation import Representation
from scamo.tokenizers.skeletal import (
    DOWNSAMPLING,
    PARTS,
    REGIONS,
    Groups,
    SkeletalDecoder,
    SkeletalEncoder,
    Topology,
    frame_masks,
    membership,
)
from scamo.weights import CONFIG, WEIGHTS, check_state, read_description, read_state, write_files

FORMAT, SCHEMA_VERSION = "scamo-multiscale-tokenizer", 1
# Bins and regions of the released code's scales, for motions of up to 196 frames.
SCALES = (
    *((1, 1), (2, 1), (2, 2), (3, 2), (7, 2), (7, 3)),
    *((12, 3), (24, 3), (24, 5), (49, 5), (49, 7)),
)
SHARPNESS = 100.0  # of the probabilities in the entropy loss
FLIP_RATES = tuple(i / 100 for i in range(31))  # of bit self-correction


@dataclass(frozen=True)
class MultiscaleConfig:
    """The skeletal-temporal auto-encoder and its quantiser (ScaleMoGen; released code).

    scales: bins in time and regions of the body of each map; the last has every latent and the 7 parts.
    bits: of a token, 31 at most. max_frames: of a motion, a multiple of 4. blocks: residual blocks of each
    skeleton graph, in the encoder and in the decoder. pooling: see `skeletal.Topology`. feature_dim: 0 takes
    it from the statistics. variant: of the features; training takes it from the dataset.
    """

    feature_dim: int = 0
    width: int = 384
    blocks: int = 2
    dropout: float = 0.1
    pooling: str = "topology"
    bits: int = 24
    max_frames: int = 196
    scales: tuple[tuple[int, ...], ...] = SCALES
    variant: str = "original"

    def __post_init__(self) -> None:
        for name in ("width", "blocks", "max_frames"):
            if getattr(self, name) < 1:
                raise ScaMoError(f"{name} = {getattr(self, name)}: expected a value above 0")
        if not 0 <= self.dropout < 1:
            raise ScaMoError(f"dropout = {self.dropout}: expected a probability in [0, 1)")
        if self.pooling not in ("topology", "plain"):
            raise ScaMoError(f"pooling = {self.pooling!r}: expected topology or plain")
        if not 1 <= self.bits <= 31:
            raise ScaMoError(f"bits = {self.bits}: expected 1 to 31")
        if self.max_frames % DOWNSAMPLING:
            raise ScaMoError(f"max_frames = {self.max_frames}: expected a multiple of {DOWNSAMPLING}")
        for scale in self.scales:
            if len(scale) != 2 or not 1 <= scale[0] <= self.latents or scale[1] not in REGIONS:
                raise ScaMoError(
                    f"scales: {list(scale)}: expected 1 to {self.latents} bins, for {self.max_frames} "
                    f"frames, and {', '.join(map(str, REGIONS))} regions"
                )
        if not self.scales or tuple(self.scales[-1]) != (self.latents, PARTS):
            last = list(self.scales[-1]) if self.scales else "none"
            raise ScaMoError(
                f"scales: the last is {last}, expected {[self.latents, PARTS]} for {self.max_frames} frames"
            )

    @property
    def latents(self) -> int:
        """Latents in time of the longest motion."""
        return self.max_frames // DOWNSAMPLING

    @property
    def tokens(self) -> int:
        """Tokens L of the longest motion: 864."""
        return sum(bins * regions for bins, regions in self.scales)


@functools.cache
def time_tables(bins: int, frames: int) -> tuple[Tensor, Tensor]:
    """How a scale's bins lie over a motion's latents, for every number of latents n that a motion can have.

    The grid is that of the longest motion: bin b of `bins` covers the latents from floor(b frames / bins) to
    ceil((b + 1) frames / bins), and is there when the first of them is. Returns down, float32
    (frames + 1, bins, frames): row n averages the latents below n of each bin; and up (frames + 1, frames,
    bins): row n interpolates linearly between the bins that are there, whose first and last go on outwards.
    Rows of bins and latents that are not there are zero.
    """
    first = np.arange(bins) * frames // bins
    last = -(-np.arange(1, bins + 1) * frames // bins)
    latent = np.arange(frames)
    place = (latent + 0.5) * bins / frames - 0.5
    down, up = np.zeros((frames + 1, bins, frames)), np.zeros((frames + 1, frames, bins))
    for n in range(1, frames + 1):
        covered = (first[:, None] <= latent) & (latent < np.minimum(last, n)[:, None])
        down[n] = covered / np.maximum(covered.sum(1, keepdims=True), 1)
        there = int((first < n).sum())
        inside = place[:n].clip(0, there - 1)
        left = np.floor(inside).astype(int)
        np.add.at(up[n], (latent[:n], left), 1 - (inside - left))
        np.add.at(up[n], (latent[:n], np.minimum(left + 1, there - 1)), inside - left)
    with torch.inference_mode(False):  # the cached tables also serve training
        return torch.from_numpy(down).float(), torch.from_numpy(up).float()


class Quantised(NamedTuple):
    """What the quantiser makes of latents: the sum (B, N, P, d) of all scales, bits int32 (B, L) and a loss.

    loss: the mean of `bitwise_loss` over the scales. The tokens of a scale that was left out have no bits.
    """

    sum: Tensor
    bits: Tensor
    loss: Tensor


class Corrupted(NamedTuple):
    """A predictor's training data, of bits of which some were flipped.

    targets: int32 (B, L), at every scale the bits of what the flipped coarser scales left over. bits: the
    flipped ones. inputs: float32 (B, L, d), see `MultiscaleQuantizer.inputs`.
    """

    targets: Tensor
    bits: Tensor
    inputs: Tensor


class MultiscaleQuantizer(nn.Module):
    """Residual quantisation of latents (B, N, P, d) on every scale in turn.

    Each scale averages what is left over its bins and regions, rounds it to a corner of the cube in the unit
    sphere, and takes that away, interpolated in time and repeated over the region's parts. n: int64 (B,),
    the latents that each motion has; those past them are taken as zeros, count in no average and get no
    token: the bits are those of the motion alone, which the released code's training targets are not.
    """

    def __init__(self, scales: Sequence[Sequence[int]], bits: int, regions: Mapping[int, Groups]) -> None:
        super().__init__()
        self.bits, self.latents = bits, scales[-1][0]
        self.scales = [(bins, count) for bins, count in scales]
        for number, (bins, count) in enumerate(self.scales):
            down, up = time_tables(bins, self.latents)
            parts = membership(regions[count], PARTS)
            for name, tensor in (("down", down), ("up", up), ("parts", parts)):
                self.register_buffer(f"{name}{number}", tensor, persistent=False)

    @property
    def slices(self) -> list[slice]:
        """Of each scale in the L tokens."""
        ends = np.cumsum([0, *(bins * count for bins, count in self.scales)]).tolist()
        return [slice(*ends[i : i + 2]) for i in range(len(self.scales))]

    def valid(self, n: Tensor) -> Tensor:
        """Which tokens motions of n latents have: bool (B, L)."""
        there = [
            (self._table("down", number)[n].sum(2) > 0).repeat_interleave(count, 1)
            for number, (_, count) in enumerate(self.scales)
        ]
        return torch.cat(there, 1)

    def forward(self, z: Tensor, n: Tensor, skip: Sequence[bool] | None = None) -> Quantised:
        """Quantise in training, in float32 even under autocast. skip: the scales (S,) to leave out."""
        z, skip = z.float(), skip or [False] * len(self.scales)
        valid, total = self.valid(n), torch.zeros_like(z)
        tokens: list[Tensor] = []
        losses: list[Tensor] = []
        for number, (span, skipped) in enumerate(zip(self.slices, skip, strict=True)):
            there = valid[:, span]
            if skipped:
                tokens.append(there.new_zeros(there.shape, dtype=torch.int32))
                continue
            pooled = self._down(number, z - total, n)
            codes, bits = bsq_quantize(pooled)
            losses.append(bitwise_loss(pooled, codes, there))
            tokens.append(bits * there)
            total = total + self._up(number, codes, n)
        return Quantised(total, torch.cat(tokens, 1), torch.stack(losses).mean())

    def encode(self, z: Tensor, n: Tensor) -> Tensor:
        """Bits int32 (B, L) of latents, 0 for tokens that are not there."""
        return self.corrupt(z, n, None).targets

    @torch.no_grad()
    def corrupt(
        self, z: Tensor, n: Tensor, rates: Sequence[float] | None, generator: torch.Generator | None = None
    ) -> Corrupted:
        """Bit self-correction: quantise with mistakes, each scale the residual that those before it leave.

        rates: (S,), the probability that a bit of each scale is flipped (`draw_rates`); None or zeros flip
        none, and the targets are then `encode`'s. generator: on the CPU, of the flips.
        """
        valid, total = self.valid(n), torch.zeros_like(z)
        targets, flipped, inputs = [], [], []
        for number, span in enumerate(self.slices):
            there = valid[:, span]
            inputs.append(self._down(number, total, n))
            bits = bsq_quantize(self._down(number, z - total, n))[1] * there
            targets.append(bits)
            if rates is not None and rates[number] > 0:
                flips = torch.rand((*bits.shape, self.bits), generator=generator) < rates[number]
                powers = 1 << torch.arange(self.bits, dtype=torch.int32)
                bits = bits ^ ((flips * powers).sum(-1, dtype=torch.int32).to(bits.device) * there)
            flipped.append(bits)
            total = total + self._up(number, bsq_dequantize(bits, self.bits), n)
        return Corrupted(*(torch.cat(parts, 1) for parts in (targets, flipped, inputs)))

    def draw_rates(self, generator: torch.Generator) -> list[float]:
        """A flip rate for each scale, of 0, .01, ... .30 each as likely."""
        chosen = torch.randint(len(FLIP_RATES), (len(self.scales),), generator=generator)
        return [FLIP_RATES[i] for i in chosen.tolist()]

    def embed(self, bits: Tensor, n: Tensor, *, scales: int | None = None) -> Tensor:
        """The sum (B, N, P, d) of the first `scales` scales (None: of all) of bits (B, L or those tokens)."""
        *_, total = self._sums(bits, n, len(self.scales) if scales is None else scales)
        return total

    def inputs(self, bits: Tensor, n: Tensor) -> Tensor:
        """What a predictor of next scales sees of bits (B, L): float32 (B, L, d).

        For the tokens of a scale the sum of all coarser ones, averaged over its bins and regions; zeros for
        the first scale, and for tokens that are not there.
        """
        sums = self._sums(bits, n, len(self.scales) - 1)
        return torch.cat([self._down(number, total, n) for number, total in enumerate(sums)], 1)

    def _sums(self, bits: Tensor, n: Tensor, scales: int) -> Iterator[Tensor]:
        """The running sum before the first scale, and after each of `scales`."""
        total = torch.zeros(len(bits), self.latents, PARTS, self.bits, device=bits.device)
        yield total
        for number, span in enumerate(self.slices[:scales]):
            total = total + self._up(number, bsq_dequantize(bits[:, span], self.bits), n)
            yield total

    def _down(self, number: int, x: Tensor, n: Tensor) -> Tensor:
        """Averages over a scale's bins and regions: (B, N, P, d) -> (B, T_s R_s, d), zero if not there."""
        table, parts = self._table("down", number)[n], self._table("parts", number)
        with torch.autocast(x.device.type, enabled=False):
            binned = (table @ x.flatten(2)).unflatten(2, x.shape[2:])
            return (parts / parts.sum(1, keepdim=True) @ binned).flatten(1, 2)

    def _up(self, number: int, codes: Tensor, n: Tensor) -> Tensor:
        """A scale's codes (B, T_s R_s, d) on the full grid (B, N, P, d), zero past the motions' ends."""
        table, parts = self._table("up", number)[n], self._table("parts", number)
        with torch.autocast(codes.device.type, enabled=False):
            spread = parts.T @ codes.unflatten(1, self.scales[number])
            return (table @ spread.flatten(2)).unflatten(2, spread.shape[2:])

    def _table(self, name: str, number: int) -> Tensor:
        return cast(Tensor, getattr(self, f"{name}{number}"))


def bitwise_loss(z: Tensor, codes: Tensor, there: Tensor) -> Tensor:
    """.25 commitment + .001 (entropy of a token's bits - entropy of all tokens' bits), of tokens (..., d).

    Commitment: the mean over the tokens that are there (...) of |z / |z| - code|^2. A bit's probability is
    that of a sigmoid, sharp about 0; entropies are in nats and summed over the bits.
    """
    u = F.normalize(z, dim=-1).flatten(0, -2)
    share = (there / there.sum()).view(-1, 1)  # of each token in a mean
    commitment = (share * (u - codes.detach().flatten(0, -2)).square()).sum()
    logits = -4 * SHARPNESS / z.shape[-1] ** 0.5 * u
    p = logits.sigmoid()
    # p log p and (1 - p) log(1 - p) by softplus: finite where p is 0 or 1.
    own = (share * (F.softplus(logits) - logits * p)).sum()
    # The slope of the entropy is infinite at 0 and 1, which a sharp sigmoid reaches.
    mean = (share * p).sum(0).clamp(1e-6, 1 - 1e-6)
    batch = -(mean * mean.log() + (1 - mean) * (1 - mean).log()).sum()
    return 0.25 * commitment + 0.001 * (own - batch)


class MultiscaleReconstruction(NamedTuple):
    """What a forward pass gives: normalised features float32 (B, T, C), bits (B, L) and the bitwise loss."""

    features: Tensor
    bits: Tensor
    loss: Tensor


class MultiscaleTokenizer(nn.Module):
    """Motion features <-> bits on all scales: `encode` and `decode` take and return raw features.

    lengths: int64 (B,), the frames that each motion has, 1 to max_frames; what stands past them is not read,
    and a motion gets the bits that it gets alone. `mean` and `std`: float32 (C,) buffers.

    Args:
        config: sizes; the full width has 18.55M parameters with HumanML3D's features.
        mean, std: statistics of the training split, (C,); 0 and 1 without them.

    Raises:
        ScaMoError: mean or std of another shape, not finite, or a std that is not positive; or features of a
            body that has no pooling groups.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: MultiscaleConfig, mean: Any = None, std: Any = None) -> None:
        super().__init__()
        if not config.feature_dim:
            config = replace(config, feature_dim=FEATURE_DIM if mean is None else len(mean))
        self.config = config
        per_joint = PerJoint.of(config.feature_dim)
        topology = Topology.of(Representation.of(config.feature_dim).n_joints, config.pooling)
        sizes: dict[str, Any] = {
            "width": config.width,
            "blocks": config.blocks,
            "dropout": config.dropout,
        }
        self.encoder = SkeletalEncoder(per_joint, topology, **sizes)
        self.project_in = nn.Linear(config.width, config.bits)
        self.quantizer = MultiscaleQuantizer(config.scales, config.bits, topology.regions)
        self.project_out = nn.Linear(config.bits, config.width)
        self.decoder = SkeletalDecoder(per_joint, topology, **sizes)
        for name, value, default in (("mean", mean, 0.0), ("std", std, 1.0)):
            tensor = torch.full((config.feature_dim,), default)
            if given := value is not None:
                tensor = torch.as_tensor(value).detach().to(torch.float32).clone()
            if tensor.shape != (config.feature_dim,):
                raise ScaMoError(f"{name}: shape {tuple(tensor.shape)}, expected ({config.feature_dim},)")
            if given and (not tensor.isfinite().all() or (name == "std" and tensor.min() <= 0)):
                raise ScaMoError(f"{name}: expected finite{' positive' if name == 'std' else ''} values")
            self.register_buffer(name, tensor)

    def normalize(self, features: Tensor) -> Tensor:
        """Raw features (..., C) -> float32 (..., C) of mean 0 and deviation about 1."""
        return (features.float() - self.mean) / self.std

    def forward(
        self, normalized: Tensor, lengths: Tensor, skip: Sequence[bool] | None = None
    ) -> MultiscaleReconstruction:
        """Normalised features (B, T, C) and lengths -> their reconstruction. skip: scales to leave out.

        T is at most max_frames. Under autocast the convolutions run in its dtype, the quantiser in float32.
        """
        z, masks = self._latents(normalized, lengths)
        quantised = self.quantizer(z, latents_of(lengths), skip)
        made = self._features(quantised.sum, masks)[:, : normalized.shape[1]]
        return MultiscaleReconstruction(made, quantised.bits, quantised.loss)

    def latents(self, features: Tensor, lengths: Tensor) -> Tensor:
        """What is quantised, float32 (B, N, P, d), of raw features (B, T, C). Raises as `encode`."""
        self._check_features(features, lengths)
        return self._latents(self.normalize(features), lengths)[0].float()

    def encode(self, features: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Raw features (B, T, C) -> bits int32 (B, L), 0 for tokens that are not there (`valid`).

        lengths: None where every motion has T frames. Raises ScaMoError for another shape, and for lengths
        outside of 1 to T or max_frames.
        """
        if lengths is None:
            lengths = torch.full((len(features),), features.shape[1], device=features.device)
        return self.quantizer.encode(self.latents(features, lengths), latents_of(lengths))

    def decode(self, bits: Tensor, lengths: Tensor, *, scales: int | None = None) -> Tensor:
        """Bits (B, L) -> raw features float32 (B, longest length, C), 0 past a motion's end.

        scales: the number of scales that are summed, a coarse preview if not all; bits then need no more
        than their tokens. Raises ScaMoError for another shape, for lengths outside of 1 to max_frames, for
        scales outside of 1 to S, and for bits outside of 0 to 2^d - 1.
        """
        count = len(self.config.scales) if scales is None else scales
        if not 1 <= count <= len(self.config.scales):
            raise ScaMoError(f"scales = {scales}: expected 1 to {len(self.config.scales)}")
        tokens = self.quantizer.slices[count - 1].stop
        if bits.dim() != 2 or bits.shape[1] not in (tokens, self.config.tokens):
            raise ScaMoError(f"bits: shape {tuple(bits.shape)}, expected (batch, {tokens})")
        low, high = (int(value) for value in torch.aminmax(bits))
        if low < 0 or high >= 2**self.config.bits:
            raise ScaMoError(f"bits from {low} to {high}: this tokenizer has 0 to {2**self.config.bits - 1}")
        self._check_lengths(lengths, len(bits), self.config.max_frames)
        frames = int(lengths.max())
        total = self.quantizer.embed(bits.int(), latents_of(lengths), scales=count)
        masks = frame_masks(lengths, whole_latents(frames))
        made = self._features(total[:, : masks[-1].shape[1]], masks) * self.std + self.mean
        return made[:, :frames].masked_fill(masks[0][:, :frames] == 0, 0)

    def valid(self, lengths: Tensor) -> Tensor:
        """Which tokens motions of so many frames have: bool (B, L)."""
        return self.quantizer.valid(latents_of(lengths))

    def _latents(self, normalized: Tensor, lengths: Tensor) -> tuple[Tensor, list[Tensor]]:
        masks = frame_masks(lengths, whole_latents(normalized.shape[1]))
        x = F.pad(normalized, (0, 0, 0, masks[0].shape[1] - normalized.shape[1]))
        x = self.encoder(x.masked_fill(masks[0] == 0, 0), masks)
        z = (self.project_in(x) * masks[-1]).permute(1, 2, 0, 3)
        return F.pad(z, (0, 0, 0, 0, 0, self.config.latents - z.shape[1])), masks

    def _features(self, total: Tensor, masks: Sequence[Tensor]) -> Tensor:
        x = self.project_out(total[:, : masks[-1].shape[1]]).permute(2, 0, 1, 3).contiguous()
        return self.decoder(x * masks[-1], masks).float()

    def _check_features(self, features: Tensor, lengths: Tensor) -> None:
        if features.dim() != 3 or features.shape[2] != self.config.feature_dim:
            expected = f"(batch, frames, {self.config.feature_dim})"
            raise ScaMoError(f"features: shape {tuple(features.shape)}, expected {expected}")
        if features.shape[1] > self.config.max_frames:
            raise ScaMoError(
                f"features: {features.shape[1]} frames, this tokenizer takes up to {self.config.max_frames}"
            )
        self._check_lengths(lengths, len(features), features.shape[1])

    def _check_lengths(self, lengths: Tensor, motions: int, most: int) -> None:
        if lengths.shape != (motions,) or lengths.dtype not in (torch.int32, torch.int64):
            raise ScaMoError(
                f"lengths: {lengths.dtype} of shape {tuple(lengths.shape)}, expected {motions} integers"
            )
        low, high = (int(value) for value in torch.aminmax(lengths))
        if low < 1 or high > most:
            raise ScaMoError(f"lengths from {low} to {high} frames: expected 1 to {most}")

    def save(
        self, folder: str | Path, *, provenance: Mapping[str, Any] | None = None, overwrite: bool = False
    ) -> None:
        """Write config.json, model.safetensors and a manifest of their hashes; whole or not at all.

        Raises ScaMoError when the folder exists and `overwrite` is false.
        """
        with whole_folder(Path(folder), overwrite=overwrite) as temporary:
            self.write_files(temporary, provenance=provenance)

    def write_files(self, folder: Path, *, provenance: Mapping[str, Any] | None = None) -> None:
        """Write the files of `save` into an existing folder; the manifest lists everything found there."""
        description = {
            "format": FORMAT,
            "schema_version": SCHEMA_VERSION,
            "tokenizer": to_dict(self.config),
            "provenance": dict(provenance or {}),
        }
        write_files(folder, self.state_dict(), description)

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu") -> Self:
        """Read a tokenizer folder; the module is in evaluation mode.

        Raises ScaMoError naming the file, and the tensor that is missing, unknown or of another shape.
        """
        folder = Path(folder)
        found = read_description(folder, {FORMAT}, SCHEMA_VERSION, "tokenizer", required=("tokenizer",))
        model = cls(from_dict(MultiscaleConfig, found["tokenizer"], where=f"{folder / CONFIG}: tokenizer"))
        state = read_state(folder / WEIGHTS)
        check_state(state, model.state_dict(), str(folder / WEIGHTS))
        model.load_state_dict(state)
        return model.eval().to(device)


def latents_of(lengths: Tensor) -> Tensor:
    """Latents of motions of so many frames; the last may be of fewer than 4."""
    return (lengths.long() + DOWNSAMPLING - 1) // DOWNSAMPLING


def whole_latents(frames: int) -> int:
    """Frames, rounded up to whole latents."""
    return -(-frames // DOWNSAMPLING) * DOWNSAMPLING
