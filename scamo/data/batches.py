"""Packed batches: samples laid end to end, no padding, in an order that is a pure function of (seed, step).

Sample layout (paper section 3.2): [text states][motion tokens]; the last text row predicts the first motion
token and the last motion row predicts EOS, so a sample of P text rows and m tokens has P + m positions and
m + 1 scored rows. EOS is a target only and never an input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from numpy.typing import NDArray

from scamo.errors import ScaMoError


@dataclass(frozen=True)
class Sample:
    """One text and one motion: text (P, width) float, motion (m,) integer tokens, P >= 1 and m >= 1."""

    text: NDArray
    motion: NDArray
    item: int = -1
    caption: int = -1


@dataclass(frozen=True)
class PackedBatch:
    """B samples on one axis of N positions, `cu_seqlens[b]:cu_seqlens[b + 1]` each.

    text_states (text tokens, text width) float32 and motion_tokens (motion inputs,) int64 fill the rows
    text_rows and motion_rows (int64) of the packed sequence; together these are all N rows.
    cu_seqlens int32 (B + 1), prefix_lengths int32 (B,): text rows per sample.
    positions int32 (N,): 0, 1, ... per sample, running on from text into motion.
    scored_rows, targets int64 (S,), S = motion inputs + B: targets[i] in [0, K] is what row scored_rows[i]
    predicts, K being EOS. max_seqlen: longest sample. item_ids, caption_ids int64 (B,).
    """

    text_states: torch.Tensor
    motion_tokens: torch.Tensor
    text_rows: torch.Tensor
    motion_rows: torch.Tensor
    cu_seqlens: torch.Tensor
    prefix_lengths: torch.Tensor
    positions: torch.Tensor
    scored_rows: torch.Tensor
    targets: torch.Tensor
    max_seqlen: int
    item_ids: torch.Tensor
    caption_ids: torch.Tensor

    @property
    def n_samples(self) -> int:
        return self.prefix_lengths.shape[0]

    @property
    def n_positions(self) -> int:
        """Text + motion positions that the transformer computes: N."""
        return self.positions.shape[0]

    @property
    def n_scored(self) -> int:
        """Scored tokens with EOS: S, the D of the scaling laws."""
        return self.targets.shape[0]

    def _map(self, function) -> PackedBatch:
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(
            self, **{name: function(t) for name, t in tensors.items() if isinstance(t, torch.Tensor)}
        )

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> PackedBatch:
        """The same batch on another device."""
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedBatch:
        """The same batch in page-locked memory, for `.to("cuda", non_blocking=True)`."""
        return self._map(lambda t: t.pin_memory())


def collate(samples: Sequence[Sample], eos: int) -> PackedBatch:
    """Pack samples in the given order; `eos` is K, the index after the last motion code.

    Raises:
        ScaMoError: no sample, a sample without text or motion, states of different widths, or a token outside
            [0, eos); the message names the sample's position and item.
    """
    if not samples:
        raise ScaMoError("cannot pack a batch of no samples")
    width = samples[0].text.shape[-1]
    for index, sample in enumerate(samples):
        where = f"sample {index} (item {sample.item}, caption {sample.caption})"
        if sample.text.ndim != 2 or sample.text.shape[0] < 1 or sample.text.shape[1] != width:
            raise ScaMoError(f"{where}: text states of shape {sample.text.shape}, expected (P >= 1, {width})")
        if sample.motion.ndim != 1 or sample.motion.shape[0] < 1:
            raise ScaMoError(f"{where}: motion tokens of shape {sample.motion.shape}, expected (m >= 1,)")
        low, high = int(sample.motion.min()), int(sample.motion.max())
        if low < 0 or high >= eos:
            raise ScaMoError(f"{where}: motion token {low if low < 0 else high} is outside [0, {eos})")

    prefix = np.array([s.text.shape[0] for s in samples], dtype=np.int64)
    motion = np.array([s.motion.shape[0] for s in samples], dtype=np.int64)
    length = prefix + motion
    cu_seqlens = np.concatenate([[0], np.cumsum(length)])
    starts = cu_seqlens[:-1]

    text_rows = np.repeat(starts, prefix) + _ranges(prefix)
    motion_rows = np.repeat(starts + prefix, motion) + _ranges(motion)
    scored_rows = np.repeat(starts + prefix - 1, motion + 1) + _ranges(motion + 1)
    tokens = np.concatenate([s.motion for s in samples]).astype(np.int64)
    targets = np.insert(tokens, np.cumsum(motion), eos)

    return PackedBatch(
        text_states=torch.from_numpy(np.concatenate([s.text for s in samples]).astype(np.float32)),
        motion_tokens=torch.from_numpy(tokens),
        text_rows=torch.from_numpy(text_rows),
        motion_rows=torch.from_numpy(motion_rows),
        cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
        prefix_lengths=torch.from_numpy(prefix.astype(np.int32)),
        positions=torch.from_numpy(_ranges(length).astype(np.int32)),
        scored_rows=torch.from_numpy(scored_rows),
        targets=torch.from_numpy(targets),
        max_seqlen=int(length.max()),
        item_ids=torch.tensor([s.item for s in samples], dtype=torch.int64),
        caption_ids=torch.tensor([s.caption for s in samples], dtype=torch.int64),
    )


def _ranges(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """0..counts[0]-1, 0..counts[1]-1, ... in one array."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
