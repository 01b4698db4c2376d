"""Decode attention: one new token per row against a static key-value cache, for generation.

Rotation of the new query and key, their append to the cache and the attention are one launch, whose grid
depends on no length: a CUDA graph of it stays valid while the rows grow.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from scamo_kernels._direct import is_direct
from scamo_kernels._dispatch import FLOATS, LIBRARY, NAME, define, resolve, sees_values

MAX_HEAD_DIM = 128
# Entries of the keys: SDPA is quicker below _SMALL, two products above; _WIDENED are made float32 at a time.
_SMALL, _WIDENED = 2**19, 2**19


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
    out of range is noticed there with SCAMO_KERNELS_DEBUG=1 only, and touches no memory outside its own row.
    impl: "auto" (Triton on CUDA, else torch) | "triton" | "torch". Raises TypeError or ValueError that names
    the argument.
    """
    qkv, rope = _check(qkv, cache_k, cache_v, lengths, rope)
    scale = cache_k.shape[3] ** -0.5 if scale is None else float(scale)
    chosen = resolve(impl, qkv)
    if is_direct(chosen, qkv):
        return _decode(qkv, cache_k, cache_v, lengths, rope, scale, chosen)
    return torch.ops.scamo_kernels.decode_attention(qkv, cache_k, cache_v, lengths, rope, scale, chosen)


def _check(
    qkv: Tensor, cache_k: Tensor, cache_v: Tensor, lengths: Tensor, rope: Tensor
) -> tuple[Tensor, Tensor]:
    """Check all arguments without looking at values; qkv as (B, 3, H, D), rope as (positions, D)."""
    shape = cache_k.shape
    if len(shape) != 4:
        raise ValueError(f"cache_k: expected shape (rows, heads, capacity, D), got {tuple(shape)}")
    rows, heads, capacity, head_dim = shape
    if head_dim % 4 or not 4 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"cache_k: D must be a multiple of 4 from 4 to {MAX_HEAD_DIM}, got {head_dim}")
    if not 1 <= capacity < 2**31:
        raise ValueError(f"cache_k: expected a capacity of 1 to 2^31 - 1 positions, got {capacity}")
    if cache_v.shape != shape:
        raise ValueError(f"cache_v: expected cache_k's shape {tuple(shape)}, got {tuple(cache_v.shape)}")
    if cache_k.dtype not in FLOATS:
        raise TypeError(f"cache_k: expected float32, float16 or bfloat16, got {cache_k.dtype}")
    if cache_v.dtype != cache_k.dtype:
        raise TypeError(f"cache_v: expected cache_k's dtype {cache_k.dtype}, got {cache_v.dtype}")
    for name, cache in (("cache_k", cache_k), ("cache_v", cache_v)):
        strides = cache.stride()
        if strides[3] != 1:
            raise ValueError(f"{name}: expected a stride of 1 in the last dimension, got {strides[3]}")
        if 0 in strides and any(n > 1 and step == 0 for n, step in zip(shape, strides, strict=True)):
            raise ValueError(f"{name}: an expanded tensor cannot be written in place")
    if qkv.shape != (rows, 3, heads, head_dim):
        if qkv.shape != (rows, 3 * heads * head_dim):
            raise ValueError(
                f"qkv: expected shape {(rows, 3 * heads * head_dim)} or {(rows, 3, heads, head_dim)} "
                f"for these caches, got {tuple(qkv.shape)}"
            )
        qkv = qkv.reshape(rows, 3, heads, head_dim)
    if qkv.dtype not in FLOATS:
        raise TypeError(f"qkv: expected float32, float16 or bfloat16, got {qkv.dtype}")
    if lengths.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"lengths: expected int32 or int64, got {lengths.dtype}")
    if lengths.shape != (rows,):
        raise ValueError(f"lengths: expected shape (rows,) = {(rows,)}, got {tuple(lengths.shape)}")
    if rope.dtype != torch.float32:
        raise TypeError(f"rope: expected float32, got {rope.dtype}")
    if rope.shape[1:] == (head_dim // 2, 2):
        rope = rope.flatten(1)
    elif rope.shape[1:] != (head_dim,):
        raise ValueError(
            f"rope: expected shape (positions, {head_dim}) or (positions, {head_dim // 2}, 2), "
            f"got {tuple(rope.shape)}"
        )
    if rope.shape[0] < capacity:
        raise ValueError(f"rope: expected at least {capacity} positions, the capacity, got {rope.shape[0]}")
    others = (("cache_k", cache_k), ("cache_v", cache_v), ("lengths", lengths), ("rope", rope))
    device = qkv.device
    for name, tensor in others:
        if tensor.device != device:
            raise ValueError(f"{name}: expected qkv's device {device}, got {tensor.device}")
    if torch.is_grad_enabled():
        for name, tensor in (("qkv", qkv), *others):
            if tensor.requires_grad:
                raise ValueError(f"{name}: requires a gradient, and there is none: use torch.no_grad()")
    return qkv, rope


def _decode(
    qkv: Tensor, cache_k: Tensor, cache_v: Tensor, lengths: Tensor, rope: Tensor, scale: float, impl: str
) -> Tensor:
    qkv, rope = _even(qkv), _even(rope)
    held = _held(lengths, cache_k.shape[2]) if sees_values(lengths) else None
    if impl == "triton":
        from scamo_kernels import _decode_triton

        out = _decode_triton.decode(qkv, cache_k, cache_v, lengths, rope, scale)
        for cache in (cache_k, cache_v):
            if not cache.is_inference():
                torch.autograd.graph.increment_version(cache)
        return out
    if qkv.is_cuda:
        held = None
    rows, _, heads, head_dim = qkv.shape
    place = lengths.long() if held else lengths.long().clamp(0, cache_k.shape[2] - 1)
    # Where all rows stand at one position, slices are quicker than indices.
    together = held[0] if held and held.count(held[0]) == rows else None
    if together is None:
        turn = rope.index_select(0, place).view(torch.complex64).view(rows, 1, 1, head_dim // 2)
    else:
        turn = rope[together].view(torch.complex64)
    pairs = qkv.narrow(1, 0, 2).float().view(torch.complex64)
    q, k = (pairs * turn).view(torch.float32).unbind(1)
    v = qkv.select(1, 2)
    if together is None:
        row = torch.arange(rows, device=qkv.device)
        cache_k.transpose(1, 2).index_put_((row, place), k.to(cache_k.dtype))
        cache_v.transpose(1, 2).index_put_((row, place), v.to(cache_v.dtype))
    else:
        cache_k.select(2, together).copy_(k)
        cache_v.select(2, together).copy_(v)
    if held is None:
        seen = torch.arange(cache_k.shape[2], device=qkv.device) <= place.view(-1, 1, 1, 1)
        # What lies beyond a row's length may be anything, NaN too: a mask alone does not keep that out.
        beyond = ~seen.transpose(2, 3)
        k, v = (cache.float().masked_fill(beyond, 0) for cache in (cache_k, cache_v))
        return _attend(q, k, v, seen, scale).to(qkv.dtype)
    if not rows:
        return qkv.new_empty((rows, heads, head_dim))
    # Copies of the keys should stay in a cache; float32 keys, head by head, are not copied.
    step = rows
    if cache_k.dtype != torch.float32 or cache_k.stride(0) != heads * cache_k.stride(1):
        step = max(1, _WIDENED // (heads * head_dim * (max(held) + 1)))
    if step >= rows:
        return _attend_rows(q, cache_k, cache_v, place, held, scale).to(qkv.dtype)
    return _attend_parts(q, cache_k, cache_v, place, held, scale, step).to(qkv.dtype)


def _even(x: Tensor) -> Tensor:
    """x, or a copy, to be viewed as complex: the last stride 1, the others and the offset even."""
    *strides, last = x.stride()
    if last != 1 or any(step % 2 for step in (*strides, x.storage_offset())):
        return x.clone(memory_format=torch.contiguous_format)
    return x


def _attend_rows(
    q: Tensor, cache_k: Tensor, cache_v: Tensor, place: Tensor, held: list[int], scale: float
) -> Tensor:
    """Float32 (B, H, D), one call for all rows, only as far as the longest of them."""
    longest = max(held) + 1
    k, v = cache_k.narrow(2, 0, longest), cache_v.narrow(2, 0, longest)
    if min(held) + 1 == longest:
        return _attend(q, k, v, None, scale)
    out = _attend(q, k, v, torch.arange(longest) <= place.view(-1, 1, 1, 1), scale)
    if math.isnan(out.sum().item()):
        # What lies beyond a row's length may be anything, and NaN passes a mask.
        return _attend_parts(q, cache_k, cache_v, place, held, scale, 1)
    return out


def _attend_parts(
    q: Tensor, cache_k: Tensor, cache_v: Tensor, place: Tensor, held: list[int], scale: float, step: int
) -> Tensor:
    """`_attend_rows`, `step` rows at a time."""
    out = []
    for i in range(0, len(held), step):
        part = slice(i, i + step)
        out.append(_attend_rows(q[part], cache_k[part], cache_v[part], place[part], held[part], scale))
    return torch.cat(out)


def _attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, scale: float) -> Tensor:
    """q (B, H, D) float32, k and v (B, H, T, D), seen bool (B, 1, 1, T) or None for all -> like q."""
    rows, heads, longest, head_dim = k.shape
    if k.numel() < _SMALL:
        out = F.scaled_dot_product_attention(
            q.unsqueeze(2), k.float(), v.float(), attn_mask=seen, scale=scale
        )
        return out.reshape(q.shape)
    scores = torch.bmm(q.mul(scale).view(-1, 1, head_dim), k.float().flatten(0, 1).transpose(1, 2))
    scores = scores.view(rows, heads, 1, longest)
    if seen is not None:
        scores.masked_fill_(~seen, -math.inf)
    return torch.bmm(scores.softmax(3).view(-1, 1, longest), v.float().flatten(0, 1)).view(q.shape)


def _held(lengths: Tensor, capacity: int) -> list[int]:
    """The lengths, on the host; ValueError for a row that the cache has no room for."""
    held = lengths.tolist()
    if held and not 0 <= min(held) <= max(held) < capacity:
        row = next(row for row, length in enumerate(held) if not 0 <= length < capacity)
        raise ValueError(
            f"lengths: row {row} holds {held[row]} positions, expected 0 to {capacity - 1} "
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
