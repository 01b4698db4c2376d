"""Every op in plain PyTorch: the specification, and the yardstick of the tests.

Nothing here is fast. float64 inputs are computed in float64, all others in float32. The public fronts, which
check their arguments and choose an implementation, are in the files of the same names.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

FSQ_EPSILON = 1e-3


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def fsq_constants(level: int) -> tuple[float, float, float]:
    """(half_l, offset, shift) of one channel, so that bound(z) = tanh(z + shift) half_l - offset."""
    half_l = (level - 1) * (1 + FSQ_EPSILON) / 2
    offset = 0.5 if level % 2 == 0 else 0.0
    return half_l, offset, math.atanh(offset / half_l)


def fsq_bound(z: Tensor, levels: Sequence[int]) -> Tensor:
    """bound(z) of finite scalar quantisation, channel by channel: z (..., d) -> (..., d) in z's dtype."""
    half_l, offset, shift = z.new_tensor([fsq_constants(level) for level in levels]).unbind(1)
    return torch.tanh(z + shift) * half_l - offset


def fsq_quantize(z: Tensor, levels: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Finite scalar quantisation with a straight-through gradient (paper eqs. 3-4, constants as released).

    z (..., d) -> codes (..., d) in z's dtype, a multiple of 1 / (L // 2) in [-1, 1] per channel, and indices
    int32 (...), the first channel least significant. d codes / dz is the gradient of bound(z) / (L // 2).
    """
    bounded = fsq_bound(z.to(compute_dtype(z.dtype)), levels)
    quantised = bounded + (torch.round(bounded) - bounded).detach()
    half_width = torch.tensor([level // 2 for level in levels], device=z.device)
    digits = torch.round(bounded.detach()).long() + half_width
    basis = torch.tensor([math.prod(levels[:i]) for i in range(len(levels))], device=z.device)
    # The straight-through sum may miss the integer by one rounding; the value itself must not.
    exact = quantised + (torch.round(quantised) - quantised).detach()
    return (exact / half_width).to(z.dtype), (digits * basis).sum(-1).to(torch.int32)


def fsq_dequantize(indices: Tensor, levels: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """indices (...) -> the codes (..., d) that `fsq_quantize` gives with them, in `dtype`."""
    rest, channels = indices.long(), []
    for level in levels:
        channels.append((rest % level - level // 2).to(compute_dtype(dtype)) / (level // 2))
        rest = rest // level
    return torch.stack(channels, -1).to(dtype)


def code_histogram(indices: Tensor, codebook_size: int) -> Tensor:
    """How often each of 0 .. codebook_size - 1 occurs: indices (...) -> counts int64 (codebook_size,)."""
    return torch.bincount(indices.reshape(-1).long(), minlength=codebook_size)


def prefix_bounds(cu_seqlens: Tensor, prefix_lengths: Tensor) -> Tensor:
    """The bounds of the prefix-causal mask: P for the first P rows of a sample, i + 1 for row i after them.

    cu_seqlens (samples + 1) and prefix_lengths (samples), int32 -> bounds int32 (tokens,).
    """
    bounds = []
    for start, end, prefix in zip(
        cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), prefix_lengths.tolist(), strict=True
    ):
        rows = torch.arange(end - start, dtype=torch.int32)
        bounds.append(torch.where(rows < prefix, prefix, rows + 1))
    packed = torch.cat(bounds) if bounds else torch.zeros(0, dtype=torch.int32)
    return packed.to(device=cu_seqlens.device, dtype=torch.int32)


def bounded_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, bounds: Tensor, scale: float | None = None
) -> Tensor:
    """Attention inside each packed sample where row i sees the sample's keys j < bounds[i].

    q, k, v and the result (tokens, heads, head_dim); cu_seqlens int32 (samples + 1); bounds int32 (tokens,).
    A row that sees no key gives 0. scale defaults to head_dim ** -0.5.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dtype = compute_dtype(q.dtype)
    outputs = []
    for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        query, key, value = (x[start:end].to(dtype).transpose(0, 1) for x in (q, k, v))
        allowed = torch.arange(end - start, device=q.device) < bounds[start:end, None]
        scores = (query @ key.transpose(1, 2) * scale).masked_fill(~allowed, -math.inf)
        blind = ~allowed.any(1, keepdim=True)
        weights = torch.softmax(scores.masked_fill(blind, 0.0), -1).masked_fill(blind, 0.0)
        outputs.append((weights @ value).transpose(0, 1).to(q.dtype))
    return torch.cat(outputs) if outputs else q * 1


def prefix_causal_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, prefix_lengths: Tensor, scale: float | None = None
) -> Tensor:
    """Causal attention inside each packed sample, bidirectional over its first prefix_lengths[b] rows.

    Row i sees key j when j < (P if i < P else i + 1) (released code of the paper). Shapes as
    `bounded_attention`.
    """
    return bounded_attention(q, k, v, cu_seqlens, prefix_bounds(cu_seqlens, prefix_lengths), scale)
