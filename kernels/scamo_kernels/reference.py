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
FSQ_BOUNDS = ("tanh", "sigmoid", "mentzer")


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def fsq_constants(level: int, bound: str = "tanh") -> tuple[float, float, float]:
    """(half_l, offset, shift) of one channel: bound(z) = tanh(fsq_scale z + shift) half_l - offset.

    "tanh": half_l = (L - 1)(1 + 1e-3) / 2 and bound(0) = 0 (the released code). "mentzer": 1 - 1e-3 in place
    of 1 + 1e-3 and tan in place of atanh, so that bound(0) is not 0 for even L (the notebook of Mentzer et
    al.). "sigmoid": (L - 1) sigmoid(z) - L // 2, no widening and no shift (the paper's f). With each of them
    rounding gives exactly the L integers -(L // 2) .. (L - 1) // 2, for L up to 1000.
    """
    offset = 0.5 if level % 2 == 0 else 0.0
    if bound == "sigmoid":
        return (level - 1) / 2, offset, 0.0
    if bound == "mentzer":
        half_l = (level - 1) * (1 - FSQ_EPSILON) / 2
        return half_l, offset, math.tan(offset / half_l)
    if bound != "tanh":
        raise ValueError(f"bound = {bound!r}: expected one of {', '.join(map(repr, FSQ_BOUNDS))}")
    half_l = (level - 1) * (1 + FSQ_EPSILON) / 2
    return half_l, offset, math.atanh(offset / half_l)


def fsq_scale(bound: str) -> float:
    """What z is multiplied with inside the tanh: sigmoid(z) = (1 + tanh(z / 2)) / 2."""
    return 0.5 if bound == "sigmoid" else 1.0


def fsq_bound(z: Tensor, levels: Sequence[int], bound: str = "tanh") -> Tensor:
    """bound(z) of finite scalar quantisation, channel by channel: z (..., d) -> (..., d) in z's dtype."""
    half_l, offset, shift = z.new_tensor([fsq_constants(level, bound) for level in levels]).unbind(1)
    return torch.tanh(z * fsq_scale(bound) + shift) * half_l - offset


def fsq_quantize(z: Tensor, levels: Sequence[int], bound: str = "tanh") -> tuple[Tensor, Tensor]:
    """Finite scalar quantisation with a straight-through gradient (paper eqs. 3-4, constants as released).

    z (..., d) -> codes (..., d) in z's dtype, a multiple of 1 / (L // 2) in [-1, 1] per channel, and indices
    int32 (...), the first channel least significant. d codes / dz is the gradient of bound(z) / (L // 2).
    """
    bounded = fsq_bound(z.to(compute_dtype(z.dtype)), levels, bound)
    quantised = bounded + (torch.round(bounded) - bounded).detach()
    half_width = torch.tensor([level // 2 for level in levels], device=z.device)
    digits = torch.round(bounded.detach()).long() + half_width
    basis = torch.tensor([math.prod(levels[:i]) for i in range(len(levels))], device=z.device)
    # The straight-through sum may miss the integer by one rounding; the value itself must not.
    exact = quantised + (torch.round(quantised) - quantised).detach()
    return (exact / half_width).to(z.dtype), (digits * basis).sum(-1).to(torch.int32)


def fsq_quantize_grouped(
    z: Tensor, levels: Sequence[int], groups: int, bound: str = "tanh"
) -> tuple[Tensor, Tensor]:
    """z (..., groups d), each group quantised by itself -> codes like z, indices int32 (..., groups)."""
    parts = [fsq_quantize(part, levels, bound) for part in z.chunk(groups, -1)]
    return torch.cat([codes for codes, _ in parts], -1), torch.stack([index for _, index in parts], -1)


def fsq_quantize_residual(
    z: Tensor, levels: Sequence[int], quantizers: int, bound: str = "tanh"
) -> tuple[Tensor, Tensor]:
    """Each stage quantises what the stages before it left of z, stage i in units of (L - 1)^-i.

    z (..., d) -> the sum of the stages' codes like z, indices int32 (..., quantizers). The gradient is the
    sum of the stages' straight-through gradients; what a stage takes away is a constant to the next one.
    """
    rest = z.to(compute_dtype(z.dtype))
    total, indices = torch.zeros_like(rest), []
    steps = rest.new_tensor([level - 1 for level in levels])
    for stage in range(quantizers):
        codes, index = fsq_quantize(rest * steps**stage, levels, bound)
        total = total + codes / steps**stage
        rest = rest - (codes / steps**stage).detach()
        indices.append(index)
    return total.to(z.dtype), torch.stack(indices, -1)


def fsq_dequantize_residual(
    indices: Tensor, levels: Sequence[int], dtype: torch.dtype = torch.float32
) -> Tensor:
    """indices (..., quantizers) -> the codes (..., d) that `fsq_quantize_residual` gives with them."""
    steps = torch.tensor([level - 1 for level in levels], dtype=compute_dtype(dtype), device=indices.device)
    total = torch.zeros((*indices.shape[:-1], len(levels)), dtype=steps.dtype, device=indices.device)
    for stage in range(indices.shape[-1]):
        total = total + fsq_dequantize(indices[..., stage], levels, steps.dtype) / steps**stage
    return total.to(dtype)


def fsq_project(
    hidden: Tensor,
    w_in: Tensor,
    b_in: Tensor,
    w_out: Tensor,
    b_out: Tensor,
    levels: Sequence[int],
    bound: str = "tanh",
) -> tuple[Tensor, Tensor]:
    """FSQ between two linear maps: hidden (..., W) -> out (..., W) in hidden's dtype, indices int32 (...).

    w_in (d, W), b_in (d,), w_out (W, d), b_out (W,), as nn.Linear keeps them.
    """
    dtype = compute_dtype(hidden.dtype)
    z = hidden.to(dtype) @ w_in.to(dtype).T + b_in.to(dtype)
    codes, indices = fsq_quantize(z, levels, bound)
    return (codes @ w_out.to(dtype).T + b_out.to(dtype)).to(hidden.dtype), indices


def fsq_dequantize(indices: Tensor, levels: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """indices (...) -> the codes (..., d) that `fsq_quantize` gives with them, in `dtype`."""
    rest, channels = indices.long(), []
    for level in levels:
        channels.append((rest % level - level // 2).to(compute_dtype(dtype)) / (level // 2))
        rest = rest // level
    return torch.stack(channels, -1).to(dtype)


def fsq_dequantize_grouped(
    indices: Tensor, levels: Sequence[int], dtype: torch.dtype = torch.float32
) -> Tensor:
    """indices (..., groups) -> the codes (..., groups * d) that `fsq_quantize_grouped` gives with them."""
    return fsq_dequantize(indices, levels, dtype).flatten(-2)


def bsq_unit(z: Tensor) -> Tensor:
    """z / |z| over the last axis; a row of zeros gives zeros and has the gradient 0."""
    norm = torch.linalg.vector_norm(z, dim=-1, keepdim=True)
    return torch.where(norm == 0, 0.0, z / norm.masked_fill(norm == 0, 1.0))


def bsq_quantize(z: Tensor) -> tuple[Tensor, Tensor]:
    """Bitwise spherical quantisation of finite z with a straight-through gradient on u = z / |z|.

    z (..., d) -> codes (..., d) in z's dtype, 1 / sqrt(d) where z > 0 and else -1 / sqrt(d), and bits int32
    (...), channel 0 the least significant. d codes / dz is the gradient of u.
    """
    u = bsq_unit(z.to(compute_dtype(z.dtype)))
    size, positive = u.new_tensor(z.shape[-1] ** -0.5), z > 0
    codes = torch.where(positive, size, -size) + (u - u.detach())
    powers = 2 ** torch.arange(z.shape[-1], device=z.device)
    # 2^32 - 1 as int32 is -1: the bits themselves are kept.
    return codes.to(z.dtype), (positive * powers).sum(-1).to(torch.int32)


def bsq_dequantize(bits: Tensor, d: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """bits int32 (...) -> the codes (..., d) that `bsq_quantize` gives with them, in `dtype`."""
    positive = bits.unsqueeze(-1) >> torch.arange(d, device=bits.device) & 1 == 1
    size = torch.tensor(d**-0.5, dtype=compute_dtype(dtype), device=bits.device)
    return torch.where(positive, size, -size).to(dtype)


def code_histogram(indices: Tensor, codebook_size: int) -> Tensor:
    """How often each of 0 .. codebook_size - 1 occurs: indices (...) -> counts int64 (codebook_size,)."""
    return torch.bincount(indices.reshape(-1).long(), minlength=codebook_size)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis: x (..., width), weight (width,) -> like x."""
    rows = x.to(compute_dtype(x.dtype))
    scale = torch.rsqrt(rows.square().mean(-1, keepdim=True) + eps)
    return (rows * scale * weight.to(rows.dtype)).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual): x and residual (..., width), the sum in their dtype."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up: gate_up (..., 2 hidden), gate | up -> (..., hidden) in its dtype."""
    gate, up = gate_up.to(compute_dtype(gate_up.dtype)).chunk(2, -1)
    return (gate * torch.sigmoid(gate) * up).to(gate_up.dtype)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """-log softmax(hidden weight^T)[target]: the sum over the rows, and each row's, at least float32.

    hidden (S, C), weight (V, C), targets int32 or int64 (S,) -> (), (S,). `chunk` bounds the memory of the
    public op and changes no value; here all logits exist at once.
    """
    dtype = compute_dtype(hidden.dtype)
    log_p = torch.log_softmax(hidden.to(dtype) @ weight.to(dtype).t(), -1)
    losses = -log_p.gather(1, targets.long()[:, None]).squeeze(1)
    return losses.sum(), losses.detach()


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


def decode_attention(
    qkv: Tensor, cache_k: Tensor, cache_v: Tensor, lengths: Tensor, rope: Tensor, scale: float | None = None
) -> Tensor:
    """Append each row's new key and value to its cache, in place; attend from its new query to all of them.

    qkv (B, 3 H D) or (B, 3, H, D); caches (B, H, capacity, D); lengths (B,): positions held before; rope
    (positions, D) or (positions, D / 2, 2): cosine and sine, which turn the adjacent pairs of q and k at
    position lengths[b]. Returns (B, H, D).
    """
    rows, heads, _, head_dim = cache_k.shape
    dtype = compute_dtype(qkv.dtype)
    q, k, v = qkv.reshape(rows, 3, heads, head_dim).to(dtype).unbind(1)
    cos, sin = rope.reshape(-1, 1, head_dim // 2, 2)[lengths.long()].to(dtype).unbind(-1)

    def rotate(x: Tensor) -> Tensor:
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)

    q, k = rotate(q), rotate(k)
    scale = head_dim**-0.5 if scale is None else scale
    out = torch.empty_like(q)
    for row, length in enumerate(lengths.tolist()):
        cache_k[row, :, length] = k[row].to(cache_k.dtype)
        cache_v[row, :, length] = v[row].to(cache_v.dtype)
        keys, values = (cache[row, :, : length + 1].to(dtype) for cache in (cache_k, cache_v))
        weights = torch.softmax((keys @ q[row, :, :, None]).squeeze(2) * scale, -1)
        out[row] = (weights[:, None] @ values).squeeze(1)
    return out.to(qkv.dtype)


def prefix_causal_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, prefix_lengths: Tensor, scale: float | None = None
) -> Tensor:
    """Causal attention inside each packed sample, bidirectional over its first prefix_lengths[b] rows.

    Row i sees key j when j < (P if i < P else i + 1) (released code of the paper). Shapes as
    `bounded_attention`.
    """
    return bounded_attention(q, k, v, cu_seqlens, prefix_bounds(cu_seqlens, prefix_lengths), scale)


def rotate_pairs(x: Tensor, rope: Tensor) -> Tensor:
    """Turn the pairs (x[2j], x[2j + 1]) of x (rows, heads, D) by rope (rows, D / 2, 2), (cos, sin)."""
    even, odd = x.to(compute_dtype(x.dtype)).unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rope[:, None].to(even.dtype).unbind(-1)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2).to(x.dtype)


def rotary_prefix_attention(
    qkv: Tensor, rope: Tensor, cu_seqlens: Tensor, prefix_lengths: Tensor, scale: float | None = None
) -> Tensor:
    """`prefix_causal_attention` of qkv (tokens, 3, heads, D), q and k turned by rotary positions first.

    rope: float32 (length, D / 2, 2), cosine and sine per position; a row's position is its index in its
    sample.
    """
    position = torch.arange(qkv.shape[0], device=qkv.device)
    if len(position):
        position = position - cu_seqlens[torch.searchsorted(cu_seqlens, position, right=True) - 1]
    q, k, v = qkv.unbind(1)
    q, k = (rotate_pairs(x, rope[position]) for x in (q, k))
    return prefix_causal_attention(q, k, v, cu_seqlens, prefix_lengths, scale)
