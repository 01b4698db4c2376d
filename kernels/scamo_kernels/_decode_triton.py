"""Triton kernels of decode attention. Imported only when they run.

One program per (split of the cache, head, row): it rotates the new query and key, appends the new key and
value if its split owns the position, and attends. Every tile row keeps a maximum, a sum and an accumulator of
its own, so that the loop has no reduction over keys; one at the end joins them. Caches of more than SPLIT
positions have several splits; a second launch adds them up in their order.

The grid and the scratch memory depend on the batch, the heads and the capacity alone, never on the lengths.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from scamo_kernels._dispatch import interpreted, on_device


class Config(NamedTuple):
    """Keys per tile, keys per split, splits per tile of the second launch, and the warps of both."""

    keys: int
    split: int
    splits: int
    warps: int


# (bytes of a cache entry, padded head dim) -> config, for every architecture: there is no matrix product to
# suit. A tile is 8 KiB of keys and as much of values: enough loads in flight to hide the memory's latency
# with the four to nine blocks per multiprocessor that the registers leave.
CONFIGS = {(2, dim): Config(64, 256, 16, 4) for dim in (4, 8, 16, 32, 64)}
CONFIGS |= {(4, dim): Config(32, 256, 16, 4) for dim in (4, 8, 16, 32, 64)}
CONFIGS |= {(2, 128): Config(32, 256, 16, 8), (4, 128): Config(16, 256, 16, 4)}

# Small enough that short tests have several tiles and several splits.
INTERPRETER = Config(8, 32, 2, 4)


@triton.jit
def _held(lengths, row, capacity):
    """How many positions the row holds; a length that does not fit the cache is brought into it."""
    held = tl.load(lengths + row)
    return tl.minimum(tl.maximum(held, 0), capacity).to(tl.int32)


@triton.jit
def _rotate(x, cos, sin, BD: tl.constexpr):
    """Turn the adjacent pairs of x (BD,)."""
    a, b = tl.split(tl.reshape(x, (BD // 2, 2)))
    return tl.reshape(tl.join(a * cos - b * sin, a * sin + b * cos), (BD,))


@triton.jit(
    do_not_specialize=["capacity", "splits", "row_k", "head_k", "row_v", "head_v", "qk_scale"],
    do_not_specialize_on_alignment=["lengths"],
)
def decode_kernel(
    qkv,
    cache_k,
    cache_v,
    lengths,
    rope,
    out,
    partial,
    state,
    capacity,
    splits,
    row_k,
    head_k,
    row_v,
    head_v,
    qk_scale,
    STRIDE_ROW: tl.constexpr,
    STRIDE_PART: tl.constexpr,
    STRIDE_HEAD: tl.constexpr,
    STRIDE_K: tl.constexpr,
    STRIDE_V: tl.constexpr,
    STRIDE_ROPE: tl.constexpr,
    UNIT: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BN: tl.constexpr,
    SPLIT: tl.constexpr,
    WHOLE: tl.constexpr,
):
    program = tl.program_id(0)
    split = program % splits
    head = (program // splits) % HEADS
    row = (program // splits // HEADS).to(tl.int64)
    held = _held(lengths, row, capacity)
    # A full cache has no place for the new position: it is attended to by the last split and not stored.
    place = tl.minimum(held, capacity - 1)
    first = split * SPLIT
    if first <= place:
        column = tl.arange(0, BD)
        inside = column < D
        source = qkv + row * STRIDE_ROW + head * STRIDE_HEAD + column
        turn = tl.load(rope + place.to(tl.int64) * STRIDE_ROPE + column, mask=inside, other=0.0)
        cos, sin = tl.split(tl.reshape(turn, (BD // 2, 2)))
        q = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        q = _rotate(q, cos, sin, BD) * qk_scale
        new_k = tl.load(source + STRIDE_PART, mask=inside, other=0.0).to(tl.float32)
        new_k = _rotate(new_k, cos, sin, BD).to(cache_k.dtype.element_ty)
        new_v = tl.load(source + 2 * STRIDE_PART, mask=inside, other=0.0).to(cache_v.dtype.element_ty)

        # Strides come in units of UNIT elements, so that the compiler knows what they are multiples of.
        cache_k += (row * row_k + head.to(tl.int64) * head_k) * UNIT
        cache_v += (row * row_v + head.to(tl.int64) * head_v) * UNIT
        mine = place < first + SPLIT
        stored = inside & mine & (tl.load(lengths + row) == place)
        tl.store(cache_k + place.to(tl.int64) * STRIDE_K + column, new_k, mask=stored)
        tl.store(cache_v + place.to(tl.int64) * STRIDE_V + column, new_v, mask=stored)

        keys = cache_k + first.to(tl.int64) * STRIDE_K + column[None, :]
        values = cache_v + first.to(tl.int64) * STRIDE_V + column[None, :]
        acc = tl.zeros((BN, BD), tl.float32)
        peak = tl.full((BN,), -float("inf"), tl.float32)
        total = tl.zeros((BN,), tl.float32)
        for n0 in range(0, tl.minimum(held - first, SPLIT), BN):
            at = n0 + tl.arange(0, BN)
            seen = first + at < held
            mask = seen[:, None]
            if D != BD:
                mask = mask & inside[None, :]
            k = tl.load(keys + at[:, None] * STRIDE_K, mask=mask, other=0.0)
            v = tl.load(values + at[:, None] * STRIDE_V, mask=mask, other=0.0)
            s = tl.where(seen, tl.sum(k.to(tl.float32) * q[None, :], 1), -float("inf"))
            new_peak = tl.maximum(peak, s)
            # A tile row that has seen no key yet: keep inf - inf out.
            shift = tl.where(new_peak == -float("inf"), 0.0, new_peak)
            p = tl.exp2(s - shift)
            decay = tl.exp2(peak - shift)
            total = total * decay + p
            acc = acc * decay[:, None] + p[:, None] * v.to(tl.float32)
            peak = new_peak

        s = tl.where(mine, tl.sum(new_k.to(tl.float32) * q, 0), -float("inf"))
        top = tl.maximum(tl.max(peak, 0), s)
        weight = tl.exp2(peak - top)
        new_weight = tl.exp2(s - top)
        total_sum = tl.sum(total * weight, 0) + new_weight
        result = tl.sum(acc * weight[:, None], 0) + new_weight * new_v.to(tl.float32)

        slot = row * HEADS + head
        if WHOLE:
            result = result / total_sum
            tl.store(out + slot * D + column, result.to(out.dtype.element_ty), mask=inside)
        else:
            slot = slot * splits + split
            tl.store(partial + slot * D + column, result, mask=inside)
            tl.store(state + slot * 2, top)
            tl.store(state + slot * 2 + 1, total_sum)


@triton.jit(do_not_specialize=["capacity", "splits"], do_not_specialize_on_alignment=["lengths"])
def combine_kernel(
    partial,
    state,
    lengths,
    out,
    capacity,
    splits,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Add up the splits of one (head, row) that hold a position; the others were not written."""
    slot = tl.program_id(0).to(tl.int64)
    used = tl.minimum(_held(lengths, slot // HEADS, capacity), capacity - 1) // SPLIT + 1
    column = tl.arange(0, BD)
    step = tl.arange(0, BS)
    acc = tl.zeros((BD,), tl.float32)
    total = 0.0
    top = -float("inf")
    for s0 in range(0, used, BS):
        seen = s0 + step < used
        at = slot * splits + s0 + step
        peak = tl.load(state + at * 2, mask=seen, other=-float("inf"))
        sums = tl.load(state + at * 2 + 1, mask=seen, other=0.0)
        mask = seen[:, None] & (column < D)[None, :]
        tile = tl.load(partial + at[:, None] * D + column[None, :], mask=mask, other=0.0)
        new_top = tl.maximum(top, tl.max(peak, 0))
        weight = tl.exp2(peak - new_top)
        decay = tl.exp2(top - new_top)
        total = total * decay + tl.sum(sums * weight, 0)
        acc = acc * decay + tl.sum(tile * weight[:, None], 0)
        top = new_top
    tl.store(out + slot * D + column, (acc / total).to(out.dtype.element_ty), mask=column < D)


def padded_head_dim(head_dim: int) -> int:
    return triton.next_power_of_2(head_dim)


def config(cache: Tensor) -> Config:
    """The table's config for a cache."""
    if interpreted():
        return INTERPRETER
    return CONFIGS[cache.element_size(), padded_head_dim(cache.shape[3])]


def _unit(cache_k: Tensor, cache_v: Tensor) -> int:
    """The largest power of two, up to 16 bytes of elements, that divides every stride of both caches.

    It is bounded by the head dim's own, so that neither another capacity nor another batch changes it.
    """
    strides = [stride for cache in (cache_k, cache_v) for stride in cache.stride()[:3]]
    return math.gcd(16 // cache_k.element_size(), cache_k.shape[3], *strides)


def decode(
    qkv: Tensor, cache_k: Tensor, cache_v: Tensor, lengths: Tensor, rope: Tensor, scale: float
) -> Tensor:
    """qkv (B, 3, H, D), rope (positions, D), both with a last stride of 1 -> out (B, H, D)."""
    rows, heads, capacity, head_dim = cache_k.shape
    out = qkv.new_empty((rows, heads, head_dim))
    if not rows or not heads:
        return out
    lengths = lengths.contiguous()
    chosen = config(cache_k)
    splits = triton.cdiv(capacity, chosen.split)
    whole = splits == 1
    partial = out.new_empty((0 if whole else rows * heads * splits, head_dim), dtype=torch.float32)
    state = out.new_empty((partial.shape[0], 2), dtype=torch.float32)
    unit = _unit(cache_k, cache_v)
    shape = {"HEADS": heads, "D": head_dim, "BD": padded_head_dim(head_dim), "SPLIT": chosen.split}
    with on_device(qkv):
        decode_kernel[(rows * heads * splits,)](
            qkv,
            cache_k,
            cache_v,
            lengths,
            rope,
            out,
            partial,
            state,
            capacity,
            splits,
            cache_k.stride(0) // unit,
            cache_k.stride(1) // unit,
            cache_v.stride(0) // unit,
            cache_v.stride(1) // unit,
            scale * math.log2(math.e),
            **shape,
            STRIDE_ROW=qkv.stride(0),
            STRIDE_PART=qkv.stride(1),
            STRIDE_HEAD=qkv.stride(2),
            STRIDE_K=cache_k.stride(2),
            STRIDE_V=cache_v.stride(2),
            STRIDE_ROPE=rope.stride(0),
            UNIT=unit,
            BN=chosen.keys,
            WHOLE=whole,
            num_warps=chosen.warps,
            num_stages=1,
        )
        if not whole:
            combine_kernel[(rows * heads,)](
                partial,
                state,
                lengths,
                out,
                capacity,
                splits,
                **shape,
                BS=chosen.splits,
                num_warps=chosen.warps,
                num_stages=1,
            )
    return out
