"""Decode attention: one new token per row against a static key-value cache, for generation.

Rotation of the new query and key, their append to the cache and the attention are one launch, whose grid
depends on no length: a CUDA graph of it stays valid while the rows grow.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from scamo_kernels._dispatch import FLOATS, LIBRARY, NAME, define, resolve

MAX_HEAD_DIM = 128
# Keys, in entries, that the CPU attends to in one call: fewer calls against less padding to the longest row,
# which costs more where the keys are widened to float32 first.
_WIDENED, _IN_PLACE = 2**20, 2**22


def decode_attention(
    qkv: Tensor,
    cache_k: Tensor,
    cache_v: Tensor,
    lengths: Tensor,
    rope: Tensor,
    *,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Append one token per row to the cache, in place, and attend from it to all positions of its row.

    qkv: (B, 3 H D) or (B, 3, H, D), q | k | v straight from the packed projection, not rotated; float32,
    float16 or bfloat16. cache_k, cache_v: (B, H, capacity, D), of one dtype of the same three, any strides
    with the head dim's 1 (a transposed (B, capacity, H, D) serves too); they hold rotated keys, and values.
    D is a multiple of 4 up to 128. lengths: int32 or int64 (B,), on the device: how many positions row b
    holds before this call, from 0 to capacity - 1; the caller advances it. rope: float32 (positions, D), the
    cosine and sine of each adjacent pair side by side, or (positions, D / 2, 2), the real view of a complex
    table; positions >= capacity. scale: D ** -0.5.

    q and k are turned in float32 at position lengths[b]; k and v go to that position; q sees the positions
    0 .. lengths[b]. Returns (B, H, D) in qkv's dtype. Same inputs give the same bits; no gradient.

    On CUDA nothing waits for the device and nothing depends on the values of lengths but the result; a length
    out of range is not noticed there, and touches no memory outside its own row. impl: "auto" (Triton on
    CUDA, else torch) | "triton" | "torch". Raises TypeError or ValueError that names the argument.
    """
    qkv, rope = _check(qkv, cache_k, cache_v, lengths, rope)
    scale = cache_k.shape[3] ** -0.5 if scale is None else float(scale)
    return torch.ops.scamo_kernels.decode_attention(
        qkv, cache_k, cache_v, lengths, rope, scale, resolve(impl, qkv)
    )


def _check(
    qkv: Tensor, cache_k: Tensor, cache_v: Tensor, lengths: Tensor, rope: Tensor
) -> tuple[Tensor, Tensor]:
    """Check all arguments without looking at values; qkv as (B, 3, H, D), rope as (positions, D)."""
    if cache_k.dim() != 4:
        raise ValueError(f"cache_k: expected shape (rows, heads, capacity, D), got {tuple(cache_k.shape)}")
    rows, heads, capacity, head_dim = cache_k.shape
    if head_dim % 4 or not 4 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"cache_k: D must be a multiple of 4 from 4 to {MAX_HEAD_DIM}, got {head_dim}")
    if not 1 <= capacity < 2**31:
        raise ValueError(f"cache_k: expected a capacity of 1 to 2^31 - 1 positions, got {capacity}")
    if cache_v.shape != cache_k.shape:
        raise ValueError(
            f"cache_v: expected cache_k's shape {tuple(cache_k.shape)}, got {tuple(cache_v.shape)}"
        )
    for name, cache in (("cache_k", cache_k), ("cache_v", cache_v)):
        if cache.dtype not in FLOATS:
            raise TypeError(f"{name}: expected float32, float16 or bfloat16, got {cache.dtype}")
        if cache.dtype != cache_k.dtype:
            raise TypeError(f"cache_v: expected cache_k's dtype {cache_k.dtype}, got {cache.dtype}")
        if cache.stride(3) != 1:
            raise ValueError(f"{name}: expected a stride of 1 in the last dimension, got {cache.stride(3)}")
        if any(size > 1 and stride == 0 for size, stride in zip(cache.shape, cache.stride(), strict=True)):
            raise ValueError(f"{name}: an expanded tensor cannot be written in place")
    if tuple(qkv.shape) not in ((rows, 3 * heads * head_dim), (rows, 3, heads, head_dim)):
        raise ValueError(
            f"qkv: expected shape {(rows, 3 * heads * head_dim)} or {(rows, 3, heads, head_dim)} "
            f"for these caches, got {tuple(qkv.shape)}"
        )
    if qkv.dtype not in FLOATS:
        raise TypeError(f"qkv: expected float32, float16 or bfloat16, got {qkv.dtype}")
    if lengths.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"lengths: expected int32 or int64, got {lengths.dtype}")
    if tuple(lengths.shape) != (rows,):
        raise ValueError(f"lengths: expected shape (rows,) = {(rows,)}, got {tuple(lengths.shape)}")
    if rope.dtype != torch.float32:
        raise TypeError(f"rope: expected float32, got {rope.dtype}")
    if tuple(rope.shape[1:]) not in ((head_dim,), (head_dim // 2, 2)):
        raise ValueError(
            f"rope: expected shape (positions, {head_dim}) or (positions, {head_dim // 2}, 2), "
            f"got {tuple(rope.shape)}"
        )
    if rope.shape[0] < capacity:
        raise ValueError(f"rope: expected at least {capacity} positions, the capacity, got {rope.shape[0]}")
    others = {"cache_k": cache_k, "cache_v": cache_v, "lengths": lengths, "rope": rope}
    for name, tensor in others.items():
        if tensor.device != qkv.device:
            raise ValueError(f"{name}: expected qkv's device {qkv.device}, got {tensor.device}")
    if torch.is_grad_enabled():
        for name, tensor in (("qkv", qkv), *others.items()):
            if tensor.requires_grad:
                raise ValueError(f"{name}: requires a gradient, and there is none: use torch.no_grad()")
    return qkv.reshape(rows, 3, heads, head_dim), rope.flatten(1)


def _decode(
    qkv: Tensor, cache_k: Tensor, cache_v: Tensor, lengths: Tensor, rope: Tensor, scale: float, impl: str
) -> Tensor:
    qkv = qkv if qkv.stride(3) == 1 else qkv.contiguous()
    rope = rope if rope.stride(1) == 1 else rope.contiguous()
    held = None if qkv.is_cuda else _held(lengths, cache_k.shape[2])
    if impl == "triton":
        from scamo_kernels import _decode_triton

        out = _decode_triton.decode(qkv, cache_k, cache_v, lengths, rope, scale)
        for cache in (cache_k, cache_v):
            if not cache.is_inference():
                torch.autograd.graph.increment_version(cache)
        return out
    rows, _, heads, head_dim = qkv.shape
    place = lengths.long()
    if held is None:
        place = place.clamp(0, cache_k.shape[2] - 1)
    # Where all rows stand at one position, slices are quicker than indices.
    together = held[0] if held and min(held) == max(held) else None
    # Fresh copies: a complex view needs even strides and an even offset.
    turn = rope[place] if together is None else rope[together].clone()
    turn = torch.view_as_complex(turn.view(-1, 1, 1, head_dim // 2, 2))
    pairs = qkv[:, :2].to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    pairs = torch.view_as_complex(pairs.view(rows, 2, heads, head_dim // 2, 2))
    q, k = torch.view_as_real(pairs.mul_(turn)).flatten(3).unbind(1)
    if together is None:
        row = torch.arange(rows, device=qkv.device)
        cache_k[row, :, place] = k.to(cache_k.dtype)
        cache_v[row, :, place] = qkv[:, 2].to(cache_v.dtype)
    else:
        cache_k.select(2, together).copy_(k)
        cache_v.select(2, together).copy_(qkv[:, 2])
    if held is None:
        seen = torch.arange(cache_k.shape[2], device=qkv.device) <= place[:, None]
        # What lies beyond a row's length may be anything, NaN too: a mask alone does not keep that out.
        k, v = (cache.float().masked_fill(~seen[:, None, :, None], 0) for cache in (cache_k, cache_v))
        return _attend(q, k, v, seen, scale).to(qkv.dtype)
    if not rows:
        return qkv.new_empty((rows, heads, head_dim))
    entries = _IN_PLACE if cache_k.dtype == torch.float32 else _WIDENED
    step = max(1, entries // max(1, heads * head_dim * (max(held) + 1)))
    parts = [
        _attend_rows(q, cache_k, cache_v, place, held, start, min(start + step, rows), scale)
        for start in range(0, rows, step)
    ]
    out = parts[0] if len(parts) == 1 else torch.cat(parts)
    return out.to(qkv.dtype).contiguous()


def _attend_rows(
    q: Tensor,
    cache_k: Tensor,
    cache_v: Tensor,
    place: Tensor,
    held: list[int],
    start: int,
    end: int,
    scale: float,
) -> Tensor:
    """The rows from `start` to `end`, float32: one call, only as far as the longest of them."""
    count, longest = end - start, max(held[start:end]) + 1
    # Without a mask where all are equal.
    seen = None
    if min(held[start:end]) + 1 < longest:
        seen = torch.arange(longest) <= place.narrow(0, start, count)[:, None]
    k, v = (cache.narrow(0, start, count).narrow(2, 0, longest) for cache in (cache_k, cache_v))
    out = _attend(q.narrow(0, start, count), k, v, seen, scale)
    if seen is not None and math.isnan(out.sum()):
        # What lies beyond a row's length may be anything, and NaN passes a mask.
        rows = range(start, end)
        out = torch.cat([_attend_rows(q, cache_k, cache_v, place, held, b, b + 1, scale) for b in rows])
    return out


def _attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, scale: float) -> Tensor:
    """q (B, H, D) float32, k and v (B, H, T, D), seen bool (B, T) or None for all -> float32 (B, H, D)."""
    mask = None if seen is None else seen[:, None, None]
    out = F.scaled_dot_product_attention(q.unsqueeze(2), k.float(), v.float(), attn_mask=mask, scale=scale)
    return out.squeeze(2)


def _held(lengths: Tensor, capacity: int) -> list[int]:
    """The lengths, on the host; ValueError for a row that the cache has no room for."""
    held = lengths.tolist()
    for row, length in enumerate(held):
        if not 0 <= length < capacity:
            raise ValueError(
                f"lengths: row {row} holds {length} positions, expected 0 to {capacity - 1} "
                f"(the cache's capacity is {capacity})"
            )
    return held


def _fake(
    qkv: Tensor, cache_k: Tensor, cache_v: Tensor, lengths: Tensor, rope: Tensor, scale: float, impl: str
) -> Tensor:
    return qkv.new_empty((qkv.shape[0], qkv.shape[2], qkv.shape[3]))


define(
    "decode_attention(Tensor qkv, Tensor(a!) cache_k, Tensor(b!) cache_v, Tensor lengths, Tensor rope, "
    "float scale, str impl) -> Tensor"
)
LIBRARY.impl("decode_attention", _decode, "CompositeExplicitAutograd")
torch.library.register_fake(NAME + "decode_attention", _fake, lib=LIBRARY)
