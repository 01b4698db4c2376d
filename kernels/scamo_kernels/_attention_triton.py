"""Triton kernels of packed attention under a bound per row. Imported only when they run.

Forward: one program per (query tile, head, sample). Key tiles are full (no mask), partial or empty (skipped).
Backward of short samples: one program per (head, sample) holds all keys, or one half after the other, and
steps over the rows. Of longer ones: one launch in which some programs own a key tile (gradients of k and v)
and the others a query tile (gradient of q). Nothing is added atomically: the same inputs give the same bits.

With ROPE the kernels turn q and k themselves. Only the two-role backward does not: it would turn every tile
once per visit, and spill at a head dim of 100; the forward keeps the turned q and k for it.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from scamo_kernels._dispatch import interpreted, on_device


class ForwardConfig(NamedTuple):
    """Tile of queries x keys, and the launch."""

    queries: int
    keys: int
    warps: int
    stages: int


class BackwardConfig(NamedTuple):
    """A key tile's program steps over `kv_queries` rows, a query tile's program over `q_keys` keys.

    `registers`: the most that a thread may take, where ptxas would take more than it needs.
    """

    kv_keys: int
    kv_queries: int
    q_queries: int
    q_keys: int
    warps: int
    stages: int
    registers: int | None = None


class SampleConfig(NamedTuple):
    """One program per (head, sample): one or two tiles of `keys`, each stepping over `queries` rows.

    `turns`: it turns q and k itself; else the forward keeps them turned.
    """

    keys: int
    queries: int
    warps: int
    turns: bool
    stages: int = 1


# Lengths up to which an entry of a table's row serves; the last one serves all others. Lengths choose a
# config and are no constants of a kernel, so other lengths recompile nothing.
LENGTHS = (64, 128, 256, 1 << 30)

# (architecture, "half" or "single", padded head dim) -> a config per entry of LENGTHS. Chosen by what ptxas
# reports: no spills, few registers, room for several blocks. tests/kernels/test_compile.py holds them to it.
FORWARD: dict[tuple[int, str, int], tuple[ForwardConfig, ...]] = {}
BACKWARD: dict[tuple[int, str, int], tuple[BackwardConfig | SampleConfig, ...]] = {}
for _dim in (16, 32, 64):
    for _arch in (80, 90, 100):
        FORWARD[_arch, "half", _dim] = (
            *2 * (ForwardConfig(64, 64, 4, 2),),
            *2 * (ForwardConfig(128, 64, 8, 2),),
        )
        FORWARD[_arch, "single", _dim] = 4 * (ForwardConfig(16 if _arch == 80 else 32, 32, 4, 1),)
        BACKWARD[_arch, "single", _dim] = 4 * (BackwardConfig(16, 32, 32, 16, 8, 1),)
    # More than 64 rows in one program spill or take 251 registers on sm_80.
    BACKWARD[80, "half", _dim] = (
        SampleConfig(64, 32, 8, True),
        *3 * (BackwardConfig(32, 64, 64, 32, 4, 1),),
    )
    BACKWARD[90, "half", _dim] = (
        SampleConfig(64, 64, 4, True),
        SampleConfig(128, 128, 8, True),
        SampleConfig(128, 32, 8, True, 2),
        BackwardConfig(128, 32, 128, 32, 8, 1),
    )
    BACKWARD[100, "half", _dim] = (
        SampleConfig(64, 64, 8, True),
        *2 * (SampleConfig(128, 32, 8, True, 2),),
        BackwardConfig(128, 32, 128, 32, 8, 1),
    )
for _arch in (80, 90, 100):
    FORWARD[_arch, "half", 128] = 4 * (ForwardConfig(64, 32 if _arch == 100 else 64, 8, 2),)
    FORWARD[_arch, "single", 128] = 4 * (ForwardConfig(16, 32, 4, 1),)
    BACKWARD[_arch, "single", 128] = 4 * (BackwardConfig(16, 16, 16, 16, 4, 1, 240),)
# Four warps would spill.
BACKWARD[100, "single", 128] = 4 * (BackwardConfig(16, 32, 16, 32, 8, 1, 240),)
BACKWARD[80, "half", 128] = (
    SampleConfig(64, 64, 8, False),
    *3 * (BackwardConfig(32, 64, 64, 32, 8, 1),),
)
BACKWARD[90, "half", 128] = BACKWARD[100, "half", 128] = (
    SampleConfig(64, 64, 8, True),
    SampleConfig(128, 16, 8, False, 2),
    SampleConfig(128, 16, 8, False),
    BackwardConfig(32, 64, 64, 32, 8, 1),
)

# The forward that turns q and k: smaller tiles where the table's would spill.
ROTARY_FORWARD = dict(FORWARD)
for _dim in (16, 32, 64):
    ROTARY_FORWARD[80, "half", _dim] = (
        *2 * (ForwardConfig(64, 32, 4, 2),),
        *2 * (ForwardConfig(128, 32, 8, 2),),
    )
    ROTARY_FORWARD[90, "single", _dim] = ROTARY_FORWARD[100, "single", _dim] = 4 * (
        ForwardConfig(32, 32, 8, 1),
    )

# A head dim that is no multiple of 8 has 8-byte loads, twice the addresses: fewer registers are left.
NARROW_FORWARD, NARROW_BACKWARD = dict(FORWARD), dict(BACKWARD)
for _dim in (16, 32, 64):
    NARROW_FORWARD[80, "half", _dim] = (
        *2 * (ForwardConfig(64, 32, 4, 2),),
        *2 * (ForwardConfig(128, 64, 8, 2),),
    )
    NARROW_BACKWARD[90, "half", _dim] = (
        SampleConfig(64, 64, 4, True),
        *2 * (SampleConfig(128, 32, 8, True),),
        BackwardConfig(128, 32, 128, 32, 8, 1),
    )
NARROW_BACKWARD[90, "half", 128] = NARROW_BACKWARD[100, "half", 128] = (
    SampleConfig(64, 64, 8, False),
    SampleConfig(128, 16, 8, False),
    *2 * (BackwardConfig(32, 64, 64, 32, 8, 1),),
)
NARROW_ROTARY_FORWARD = dict(ROTARY_FORWARD)
NARROW_ROTARY_FORWARD[80, "half", 128] = 4 * (ForwardConfig(64, 32, 8, 2),)
NARROW_ROTARY_FORWARD[100, "half", 128] = 4 * (ForwardConfig(64, 16, 8, 2),)


def table(
    architecture: int, kind: str, head_dim: int, rotary: bool = False
) -> list[tuple[ForwardConfig, BackwardConfig | SampleConfig]]:
    """Forward and backward configs per entry of LENGTHS; kind: "half" or "single"."""
    key = architecture, kind, padded_head_dim(head_dim)
    if head_dim % 8:
        forwards, backwards = NARROW_ROTARY_FORWARD if rotary else NARROW_FORWARD, NARROW_BACKWARD
    else:
        forwards, backwards = ROTARY_FORWARD if rotary else FORWARD, BACKWARD
    return list(zip(forwards[key], backwards[key], strict=True))


# Small enough that short tests have full, partial and empty tiles. Short samples run as on sm_90.
INTERPRETER = ForwardConfig(64, 64, 4, 1), BackwardConfig(64, 64, 64, 64, 4, 1)


# float32 on tensor cores as three tf32 products each; half precision ignores it.
_PRECISION = tl.constexpr("tf32x3")


@triton.jit
def _load(base, row, rows, STRIDE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, WHOLE: tl.constexpr):
    """A tile (len(row), BD), 0 outside; WHOLE says that every row exists."""
    column = tl.arange(0, BD)
    at = base + row[:, None] * STRIDE + column[None, :]
    if WHOLE:
        if D == BD:
            return tl.load(at)
        return tl.load(at, mask=column[None, :] < D, other=0.0)
    if D == BD:
        return tl.load(at, mask=row[:, None] < rows, other=0.0)
    return tl.load(at, mask=(row[:, None] < rows) & (column[None, :] < D), other=0.0)


@triton.jit
def _store(base, row, rows, tile, STRIDE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    column = tl.arange(0, BD)
    mask = (row[:, None] < rows) & (column[None, :] < D)
    tl.store(base + row[:, None] * STRIDE + column[None, :], tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _angles(rope, row, rows, D: tl.constexpr, BD: tl.constexpr, WHOLE: tl.constexpr):
    """Cosines and sines of the rows' positions, float32, each (len(row), BD / 2)."""
    table = _load(rope, row, rows, D, D, BD, WHOLE)
    return tl.split(tl.reshape(table, (table.shape[0], BD // 2, 2)))


@triton.jit
def _turn(tile, cos, sin, BD: tl.constexpr):
    """Turn the adjacent pairs of a tile (rows, BD), in float32."""
    a, b = tl.split(tl.reshape(tile.to(tl.float32), (tile.shape[0], BD // 2, 2)))
    return tl.reshape(tl.join(a * cos - b * sin, b * cos + a * sin), (tile.shape[0], BD))


@triton.jit
def _store_turned(
    base,
    row,
    rows,
    tile,
    scale,
    rope,
    STRIDE: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    ROPE: tl.constexpr,
):
    """Store tile * scale, the gradient of turned rows as that of the rows themselves."""
    tile *= scale
    if ROPE:
        cos, sin = _angles(rope, row, rows, D, BD, False)
        tile = _turn(tile, cos, -sin, BD)
    _store(base, row, rows, tile, STRIDE, D, BD)


@triton.jit
def _bound(bounds, row, rows, prefix, PREFIX: tl.constexpr):
    """How many keys each row sees; for the general mask `bounds` points at the sample's first row."""
    if PREFIX:
        return tl.where(row < prefix, prefix, row + 1)
    seen = tl.load(bounds + row, mask=row < rows, other=0)
    return tl.minimum(seen, rows)


@triton.jit
def _sample(cu_seqlens, bounds, sample, PREFIX: tl.constexpr):
    """A sample's first row (int64), its rows, its prefix (0 with bounds), and where its bounds begin."""
    start = tl.load(cu_seqlens + sample)
    rows = tl.load(cu_seqlens + sample + 1) - start
    start = start.to(tl.int64)
    prefix = 0
    if PREFIX:
        prefix = tl.minimum(tl.load(bounds + sample), rows)
    else:
        bounds += start
    return start, rows, prefix, bounds


@triton.jit
def _tile_bounds(bounds, m0, row, rows, prefix, BM: tl.constexpr, PREFIX: tl.constexpr):
    """How many keys the first and the last row of a query tile see, and each of its rows."""
    last_row = tl.minimum(m0 + BM, rows) - 1
    if PREFIX:
        least = tl.where(m0 < prefix, prefix, m0 + 1)
        most = tl.where(last_row < prefix, prefix, last_row + 1)
    else:
        least = tl.minimum(tl.load(bounds + m0), rows)
        most = tl.minimum(tl.load(bounds + last_row), rows)
    return least, most, _bound(bounds, row, rows, prefix, PREFIX)


@triton.jit
def _attend(
    q,
    acc,
    peak,
    total,
    k,
    v,
    rope,
    first,
    last,
    rows,
    bound,
    qk_scale,
    STRIDE_K: tl.constexpr,
    STRIDE_V: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BN: tl.constexpr,
    FULL: tl.constexpr,
    ROPE: tl.constexpr,
):
    """Online softmax over the key tiles from `first` to `last`, in base 2."""
    for n0 in range(first, last, BN):
        key = n0 + tl.arange(0, BN)
        kt = _load(k, key, rows, STRIDE_K, D, BD, FULL)
        if ROPE:
            cos, sin = _angles(rope, key, rows, D, BD, FULL)
            kt = _turn(kt, cos, sin, BD).to(q.dtype)
        s = tl.dot(q, tl.trans(kt), input_precision=_PRECISION) * qk_scale
        if not FULL:
            s = tl.where(key[None, :] < bound[:, None], s, -float("inf"))
        new_peak = tl.maximum(peak, tl.max(s, 1))
        shift = new_peak
        if not FULL:
            # A row that has seen no key yet: keep inf - inf out.
            shift = tl.where(new_peak == -float("inf"), 0.0, new_peak)
        p = tl.exp2(s - shift[:, None])
        decay = tl.exp2(peak - shift)
        total = total * decay + tl.sum(p, 1)
        acc = acc * decay[:, None]
        vt = _load(v, key, rows, STRIDE_V, D, BD, FULL)
        acc = tl.dot(p.to(vt.dtype), vt, acc, input_precision=_PRECISION)
        peak = new_peak
    return acc, peak, total


@triton.jit(do_not_specialize=["tokens", "tiles", "qk_scale"])
def forward_kernel(
    q,
    k,
    v,
    cu_seqlens,
    bounds,
    rope,
    out,
    lse,
    turned_q,
    turned_k,
    tokens,
    tiles,
    qk_scale,
    STRIDE_Q: tl.constexpr,
    STRIDE_K: tl.constexpr,
    STRIDE_V: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PREFIX: tl.constexpr,
    ROPE: tl.constexpr,
    KEEP: tl.constexpr,
):
    program = tl.program_id(0)
    m0 = (program % tiles) * BM
    head = (program // tiles) % HEADS
    sample = program // tiles // HEADS
    start, rows, prefix, bounds = _sample(cu_seqlens, bounds, sample, PREFIX)
    if m0 < rows:
        row = m0 + tl.arange(0, BM)
        least, most, bound = _tile_bounds(bounds, m0, row, rows, prefix, BM, PREFIX)
        full = least // BN * BN
        k_base = k + start * STRIDE_K + head * D
        v_base = v + start * STRIDE_V + head * D
        own = (start * HEADS + head) * D
        qt = _load(q + start * STRIDE_Q + head * D, row, rows, STRIDE_Q, D, BD, False)
        if ROPE:
            cos, sin = _angles(rope, row, rows, D, BD, False)
            if KEEP:
                own_keys = _turn(_load(k_base, row, rows, STRIDE_K, D, BD, False), cos, sin, BD)
                _store(turned_k + own, row, rows, own_keys, HEADS * D, D, BD)
            qt = _turn(qt, cos, sin, BD).to(qt.dtype)
            if KEEP:
                _store(turned_q + own, row, rows, qt, HEADS * D, D, BD)
        acc = tl.zeros((BM, BD), tl.float32)
        peak = tl.full((BM,), -float("inf"), tl.float32)
        total = tl.zeros((BM,), tl.float32)
        acc, peak, total = _attend(
            qt, acc, peak, total, k_base, v_base, rope, 0, full, rows, bound, qk_scale,
            STRIDE_K, STRIDE_V, D, BD, BN, True, ROPE,
        )  # fmt: skip
        acc, peak, total = _attend(
            qt, acc, peak, total, k_base, v_base, rope, full, most, rows, bound, qk_scale,
            STRIDE_K, STRIDE_V, D, BD, BN, False, ROPE,
        )  # fmt: skip
        blind = total == 0.0
        acc = acc / tl.where(blind, 1.0, total)[:, None]
        _store(out + own, row, rows, acc, HEADS * D, D, BD)
        # +inf makes exp2(s - lse) zero in the backward, without a case of its own.
        log_sum = tl.where(blind, float("inf"), peak + tl.log2(tl.where(blind, 1.0, total)))
        tl.store(lse + head.to(tl.int64) * tokens + start + row, log_sum, mask=row < rows)


@triton.jit
def _keys_step(
    grad_k,
    grad_v,
    kt,
    vt,
    key,
    q,
    out,
    grad,
    lse,
    bounds,
    first,
    last,
    rows,
    prefix,
    qk_scale,
    STRIDE_Q: tl.constexpr,
    STRIDE_O: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    PREFIX: tl.constexpr,
    FULL: tl.constexpr,
):
    """Add what the query tiles from `first` to `last` give to one key tile's gradients."""
    for m0 in range(first, last, BM):
        row = m0 + tl.arange(0, BM)
        qt = _load(q, row, rows, STRIDE_Q, D, BD, False)
        gt = _load(grad, row, rows, STRIDE_O, D, BD, False)
        ot = _load(out, row, rows, STRIDE_O, D, BD, False)
        delta = tl.sum(gt.to(tl.float32) * ot.to(tl.float32), 1)
        log_sum = tl.load(lse + row, mask=row < rows, other=float("inf"))
        s = tl.dot(kt, tl.trans(qt), input_precision=_PRECISION) * qk_scale
        p = tl.exp2(s - log_sum[None, :])
        if not FULL:
            bound = _bound(bounds, row, rows, prefix, PREFIX)
            p = tl.where(key[:, None] < bound[None, :], p, 0.0)
        grad_v = tl.dot(p.to(gt.dtype), gt, grad_v, input_precision=_PRECISION)
        # In a loop, a product that starts from -delta takes fewer registers than a difference.
        less = tl.broadcast_to(-delta[None, :], p.shape)
        slope = p * tl.dot(vt, tl.trans(gt), less, input_precision=_PRECISION)
        grad_k = tl.dot(slope.to(qt.dtype), qt, grad_k, input_precision=_PRECISION)
    return grad_k, grad_v


@triton.jit
def _queries_step(
    grad_q,
    qt,
    gt,
    delta,
    log_sum,
    bound,
    k,
    v,
    first,
    last,
    rows,
    qk_scale,
    STRIDE_K: tl.constexpr,
    STRIDE_V: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BN: tl.constexpr,
    FULL: tl.constexpr,
):
    """Add what the key tiles from `first` to `last` give to one query tile's gradient."""
    for n0 in range(first, last, BN):
        key = n0 + tl.arange(0, BN)
        kt = _load(k, key, rows, STRIDE_K, D, BD, FULL)
        vt = _load(v, key, rows, STRIDE_V, D, BD, FULL)
        s = tl.dot(qt, tl.trans(kt), input_precision=_PRECISION) * qk_scale
        p = tl.exp2(s - log_sum[:, None])
        if not FULL:
            p = tl.where(key[None, :] < bound[:, None], p, 0.0)
        slope = p * (tl.dot(gt, tl.trans(vt), input_precision=_PRECISION) - delta[:, None])
        grad_q = tl.dot(slope.to(kt.dtype), kt, grad_q, input_precision=_PRECISION)
    return grad_q


@triton.jit
def _count_at_most(bounds, rows, limit, CHUNK: tl.constexpr):
    """How many of a sample's bounds are <= limit: they come first, as bounds never fall."""
    count = 0
    for i in range(0, rows, CHUNK):
        at = i + tl.arange(0, CHUNK)
        bound = tl.load(bounds + at, mask=at < rows, other=2147483647)
        count += tl.sum((bound <= limit).to(tl.int32), 0)
    return count


@triton.jit
def _first_row(bounds, n0, rows, prefix, PREFIX: tl.constexpr):
    """The first row that sees key n0."""
    if PREFIX:
        return tl.where(n0 < prefix, 0, n0)
    return _count_at_most(bounds, rows, n0, 128)


@triton.jit(do_not_specialize=["tokens", "key_tiles", "query_tiles", "qk_scale", "scale"])
def backward_kernel(
    q,
    k,
    v,
    cu_seqlens,
    bounds,
    rope,
    out,
    lse,
    grad,
    grad_q,
    grad_k,
    grad_v,
    tokens,
    key_tiles,
    query_tiles,
    qk_scale,
    scale,
    STRIDE_Q: tl.constexpr,
    STRIDE_K: tl.constexpr,
    STRIDE_V: tl.constexpr,
    STRIDE_G: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    KV_BN: tl.constexpr,
    KV_BM: tl.constexpr,
    Q_BM: tl.constexpr,
    Q_BN: tl.constexpr,
    PREFIX: tl.constexpr,
    ROPE: tl.constexpr,
):
    STRIDE_O: tl.constexpr = HEADS * D
    program = tl.program_id(0)
    parts = key_tiles + query_tiles
    part = program % parts
    head = (program // parts) % HEADS
    sample = program // parts // HEADS
    start, rows, prefix, bounds = _sample(cu_seqlens, bounds, sample, PREFIX)
    q += start * STRIDE_Q + head * D
    k += start * STRIDE_K + head * D
    v += start * STRIDE_V + head * D
    own = (start * HEADS + head) * D
    own_grad = start * STRIDE_G + head * D
    lse += head.to(tl.int64) * tokens + start

    if part < key_tiles:
        n0 = part * KV_BN
        if n0 < rows:
            key = n0 + tl.arange(0, KV_BN)
            end = tl.minimum(n0 + KV_BN, rows)
            # Rows before `first` see nothing of the tile, rows from `full` on see all of it.
            if PREFIX:
                first = tl.where(n0 < prefix, 0, n0)
                full = tl.where(end <= prefix, 0, tl.maximum(prefix, end - 1))
            else:
                first = _count_at_most(bounds, rows, n0, 128)
                full = _count_at_most(bounds, rows, end - 1, 128)
            first = first // KV_BM * KV_BM
            full = tl.cdiv(full, KV_BM) * KV_BM
            kt = _load(k, key, rows, STRIDE_K, D, BD, False)
            vt = _load(v, key, rows, STRIDE_V, D, BD, False)
            gk = tl.zeros((KV_BN, BD), tl.float32)
            gv = tl.zeros((KV_BN, BD), tl.float32)
            gk, gv = _keys_step(
                gk, gv, kt, vt, key, q, out + own, grad + own, lse, bounds, first, tl.minimum(full, rows),
                rows, prefix, qk_scale, STRIDE_Q, STRIDE_O, D, BD, KV_BM, PREFIX, False,
            )  # fmt: skip
            gk, gv = _keys_step(
                gk, gv, kt, vt, key, q, out + own, grad + own, lse, bounds, full, rows, rows,
                prefix, qk_scale, STRIDE_Q, STRIDE_O, D, BD, KV_BM, PREFIX, True,
            )  # fmt: skip
            # `end` for `rows`: a mask of its own, or the loads' would be kept in registers through the loops.
            _store(grad_v + own_grad, key, end, gv, STRIDE_G, D, BD)
            _store_turned(grad_k + own_grad, key, end, gk, scale, rope, STRIDE_G, D, BD, ROPE)
    else:
        m0 = (part - key_tiles) * Q_BM
        if m0 < rows:
            row = m0 + tl.arange(0, Q_BM)
            least, most, bound = _tile_bounds(bounds, m0, row, rows, prefix, Q_BM, PREFIX)
            full = least // Q_BN * Q_BN
            qt = _load(q, row, rows, STRIDE_Q, D, BD, False)
            gt = _load(grad + own, row, rows, STRIDE_O, D, BD, False)
            ot = _load(out + own, row, rows, STRIDE_O, D, BD, False)
            delta = tl.sum(gt.to(tl.float32) * ot.to(tl.float32), 1)
            log_sum = tl.load(lse + row, mask=row < rows, other=float("inf"))
            gq = tl.zeros((Q_BM, BD), tl.float32)
            gq = _queries_step(
                gq, qt, gt, delta, log_sum, bound, k, v, 0, full, rows, qk_scale,
                STRIDE_K, STRIDE_V, D, BD, Q_BN, True,
            )  # fmt: skip
            gq = _queries_step(
                gq, qt, gt, delta, log_sum, bound, k, v, full, most, rows, qk_scale,
                STRIDE_K, STRIDE_V, D, BD, Q_BN, False,
            )  # fmt: skip
            _store_turned(grad_q + own_grad, row, rows, gq, scale, rope, STRIDE_G, D, BD, ROPE)


@triton.jit
def _weights(
    kt,
    qt,
    key,
    row,
    out,
    grad,
    lse,
    bounds,
    rows,
    prefix,
    qk_scale,
    STRIDE_O: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    PREFIX: tl.constexpr,
):
    """The rows' output gradient, its product with the output, and the softmax (keys, rows)."""
    gt = _load(grad, row, rows, STRIDE_O, D, BD, False)
    ot = _load(out, row, rows, STRIDE_O, D, BD, False)
    delta = tl.sum(gt.to(tl.float32) * ot.to(tl.float32), 1)
    log_sum = tl.load(lse + row, mask=row < rows, other=float("inf"))
    bound = _bound(bounds, row, rows, prefix, PREFIX)
    s = tl.dot(kt, tl.trans(qt), input_precision=_PRECISION) * qk_scale
    return gt, delta, tl.where(key[:, None] < bound[None, :], tl.exp2(s - log_sum[None, :]), 0.0)


@triton.jit
def _sample_tile(
    q,
    k,
    v,
    bounds,
    rope,
    out,
    lse,
    grad,
    grad_q,
    grad_k,
    grad_v,
    sums,
    begun,
    rows,
    prefix,
    qk_scale,
    scale,
    STRIDE_Q: tl.constexpr,
    STRIDE_K: tl.constexpr,
    STRIDE_V: tl.constexpr,
    STRIDE_O: tl.constexpr,
    STRIDE_G: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    PREFIX: tl.constexpr,
    ROPE: tl.constexpr,
    TURN: tl.constexpr,
    N0: tl.constexpr,
    LAST: tl.constexpr,
):
    """The gradients of the keys N0 to N0 + BN, and what they give to the rows' own, which N0 = 0 finishes.

    Rows from `begun` on have a sum already, of the keys after these; LAST: none has. Returns `begun` for the
    keys before.
    """
    key = N0 + tl.arange(0, BN)
    kt = _load(k, key, rows, STRIDE_K, D, BD, False)
    if TURN:
        cos, sin = _angles(rope, key, rows, D, BD, False)
        kt = _turn(kt, cos, sin, BD).to(kt.dtype)
    vt = _load(v, key, rows, STRIDE_V, D, BD, False)
    first = 0
    if BM == BN and N0 == 0 and LAST:
        # Without a loop each gradient is stored before the next is begun: far fewer registers.
        qt = _load(q, key, rows, STRIDE_Q, D, BD, False)
        if TURN:
            qt = _turn(qt, cos, sin, BD).to(qt.dtype)
        gt, delta, p = _weights(
            kt, qt, key, key, out, grad, lse, bounds, rows, prefix, qk_scale, STRIDE_O, D, BD, PREFIX
        )
        gv = tl.dot(p.to(gt.dtype), gt, input_precision=_PRECISION)
        _store(grad_v, key, rows, gv, STRIDE_G, D, BD)
        slope = p * (tl.dot(vt, tl.trans(gt), input_precision=_PRECISION) - delta[None, :])
        slope = slope.to(qt.dtype)
        gq = tl.dot(tl.trans(slope), kt, input_precision=_PRECISION)
        _store_turned(grad_q, key, rows, gq, scale, rope, STRIDE_G, D, BD, ROPE)
        gk = tl.dot(slope, qt, input_precision=_PRECISION)
        _store_turned(grad_k, key, rows, gk, scale, rope, STRIDE_G, D, BD, ROPE)
    else:
        if N0 > 0:
            first = _first_row(bounds, N0, rows, prefix, PREFIX) // BM * BM
        gk = tl.zeros((BN, BD), tl.float32)
        gv = tl.zeros((BN, BD), tl.float32)
        for m0 in range(first, rows, BM):
            row = m0 + tl.arange(0, BM)
            qt = _load(q, row, rows, STRIDE_Q, D, BD, False)
            if TURN:
                row_cos, row_sin = _angles(rope, row, rows, D, BD, False)
                qt = _turn(qt, row_cos, row_sin, BD).to(qt.dtype)
            gt, delta, p = _weights(
                kt, qt, key, row, out, grad, lse, bounds, rows, prefix, qk_scale, STRIDE_O, D, BD, PREFIX
            )
            gv = tl.dot(p.to(gt.dtype), gt, gv, input_precision=_PRECISION)
            # As in _keys_step.
            less = tl.broadcast_to(-delta[None, :], (BN, BM))
            slope = p * tl.dot(vt, tl.trans(gt), less, input_precision=_PRECISION)
            slope = slope.to(qt.dtype)
            gk = tl.dot(slope, qt, gk, input_precision=_PRECISION)
            gq = tl.zeros((BM, BD), tl.float32)
            if not LAST and m0 >= begun:
                gq = _load(sums, row, rows, STRIDE_O, D, BD, False)
            gq = tl.dot(tl.trans(slope), kt, gq, input_precision=_PRECISION)
            if N0 > 0:
                _store(sums, row, rows, gq, STRIDE_O, D, BD)
            else:
                _store_turned(grad_q, row, rows, gq, scale, rope, STRIDE_G, D, BD, ROPE)
        end = rows
        if N0 == 0 and LAST:
            # As in backward_kernel; two tiles need it not, and would spill on sm_100.
            end = tl.minimum(BN, rows)
        _store(grad_v, key, end, gv, STRIDE_G, D, BD)
        _store_turned(grad_k, key, end, gk, scale, rope, STRIDE_G, D, BD, ROPE)
    return first


@triton.jit(do_not_specialize=["tokens", "qk_scale", "scale"])
def sample_backward_kernel(
    q,
    k,
    v,
    cu_seqlens,
    bounds,
    rope,
    out,
    lse,
    grad,
    grad_q,
    grad_k,
    grad_v,
    sums,
    tokens,
    qk_scale,
    scale,
    STRIDE_Q: tl.constexpr,
    STRIDE_K: tl.constexpr,
    STRIDE_V: tl.constexpr,
    STRIDE_G: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    PREFIX: tl.constexpr,
    ROPE: tl.constexpr,
    TURN: tl.constexpr,
    TILES: tl.constexpr,
):
    """All of one (sample, head) with at most TILES * BN rows; with one tile every tensor is read once.

    The last key tile comes first, so that the first one, which all rows that see any key see, finishes the
    gradient of q. Until then `sums`, float32 (tokens, heads, D), holds it for rows that see several tiles.
    """
    STRIDE_O: tl.constexpr = HEADS * D
    program = tl.program_id(0)
    head = program % HEADS
    sample = program // HEADS
    start, rows, prefix, bounds = _sample(cu_seqlens, bounds, sample, PREFIX)
    q += start * STRIDE_Q + head * D
    k += start * STRIDE_K + head * D
    v += start * STRIDE_V + head * D
    own = (start * HEADS + head) * D
    own_grad = start * STRIDE_G + head * D
    lse += head.to(tl.int64) * tokens + start
    begun = rows
    if TILES == 2:
        sums += own
        if rows > BN:
            begun = _sample_tile(
                q, k, v, bounds, rope, out + own, lse, grad + own,
                grad_q + own_grad, grad_k + own_grad, grad_v + own_grad, sums, begun, rows, prefix,
                qk_scale, scale, STRIDE_Q, STRIDE_K, STRIDE_V, STRIDE_O, STRIDE_G, D, BD, BN, BM,
                PREFIX, ROPE, TURN, BN, True,
            )  # fmt: skip
            # Other threads read the sums.
            tl.debug_barrier()
    _sample_tile(
        q, k, v, bounds, rope, out + own, lse, grad + own,
        grad_q + own_grad, grad_k + own_grad, grad_v + own_grad, sums, begun, rows, prefix,
        qk_scale, scale, STRIDE_Q, STRIDE_K, STRIDE_V, STRIDE_O, STRIDE_G, D, BD, BN, BM,
        PREFIX, ROPE, TURN, 0, TILES == 1,
    )  # fmt: skip


@functools.lru_cache(maxsize=32)
def _architecture(device: torch.device) -> int:
    """The tables' architecture: consumer cards have sm_80's products and shared memory, sm_120 too."""
    major, _ = torch.cuda.get_device_capability(device)
    return {9: 90, 10: 100, 11: 100}.get(major, 80)


def padded_head_dim(head_dim: int) -> int:
    """Triton's dot needs a power of two, and at least 16."""
    return max(16, triton.next_power_of_2(head_dim))


def configs(
    q: Tensor, max_seqlen: int, rotary: bool = False
) -> tuple[ForwardConfig, BackwardConfig | SampleConfig]:
    """The table's configs for tensors of q's device, dtype and head_dim (the last axis)."""
    bucket = next(i for i, length in enumerate(LENGTHS) if max_seqlen <= length)
    head_dim = q.shape[-1]
    if interpreted():
        forward, backward = INTERPRETER
        _, short = table(90, "half", head_dim)[bucket]
        return forward, short if isinstance(short, SampleConfig) else backward
    kind = "single" if q.dtype == torch.float32 else "half"
    return table(_architecture(q.device), kind, head_dim, rotary)[bucket]


def keeps_turned(q: Tensor, max_seqlen: int) -> bool:
    """Whether the forward keeps the turned q and k, because the backward does not turn them itself."""
    _, config = configs(q, max_seqlen)
    return not (isinstance(config, SampleConfig) and config.turns)


def turned_shape(qkv: Tensor) -> tuple[int, ...]:
    """Of the kept turned q and k: an even number of rows, so that k begins at 16 bytes for any tokens."""
    tokens, _, heads, head_dim = qkv.shape
    return 2, tokens + tokens % 2, heads, head_dim


def _packed(x: Tensor) -> Tensor:
    """x, or a copy, with the heads of a token side by side; tokens may be apart (a slice of a fused qkv)."""
    _, heads, head_dim = x.shape
    if x.stride(2) == 1 and (heads == 1 or x.stride(1) == head_dim):
        return x
    return x.contiguous()


def _geometry(q: Tensor, k: Tensor, v: Tensor, prefix: bool) -> dict[str, int | bool]:
    return {
        "STRIDE_Q": q.stride(0),
        "STRIDE_K": k.stride(0),
        "STRIDE_V": v.stride(0),
        "HEADS": q.shape[1],
        "D": q.shape[2],
        "BD": padded_head_dim(q.shape[2]),
        "PREFIX": prefix,
    }


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    bounds: Tensor,
    prefix: bool,
    max_seqlen: int,
    scale: float,
    rope: Tensor | None = None,
    turned: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The output like q, and the base-2 log-sum-exp of the scaled scores, float32 (heads, tokens).

    rope: float32 (length, head_dim / 2, 2), turns q and k first. turned: (2, tokens, heads, head_dim), filled
    with them.
    """
    tokens, heads, _ = q.shape
    q, k, v = _packed(q), _packed(k), _packed(v)
    # Rows inside a sample are addressed by 32 bits.
    if max_seqlen * max(x.stride(0) for x in (q, k, v)) >= 2**31:
        raise ValueError(f"max_seqlen = {max_seqlen}: a sample of {2**31} or more elements")
    out = q.new_empty((tokens, *q.shape[1:]))
    lse = q.new_empty((heads, tokens), dtype=torch.float32)
    config, _ = configs(q, max_seqlen, rope is not None)
    tiles = triton.cdiv(max_seqlen, config.queries)
    programs = tiles * heads * (cu_seqlens.shape[0] - 1)
    turned_q, turned_k = (None, None) if turned is None else turned.unbind()
    if programs and tokens:
        with on_device(q):
            forward_kernel[(programs,)](
                q,
                k,
                v,
                cu_seqlens.contiguous(),
                bounds.contiguous(),
                rope,
                out,
                lse,
                turned_q,
                turned_k,
                tokens,
                tiles,
                scale * math.log2(math.e),
                **_geometry(q, k, v, prefix),
                BM=config.queries,
                BN=config.keys,
                ROPE=rope is not None,
                KEEP=turned is not None,
                num_warps=config.warps,
                num_stages=config.stages,
            )
    return out, lse


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    bounds: Tensor,
    prefix: bool,
    max_seqlen: int,
    scale: float,
    grads: tuple[Tensor, Tensor, Tensor],
    rope: Tensor | None = None,
) -> None:
    """Fill `grads`, of q, k and v: three tensors with the same strides.

    With rope they are the gradients before turning; q and k are turned unless the config turns them.
    """
    tokens, heads, _ = q.shape
    q, k, v = _packed(q), _packed(k), _packed(v)
    _, config = configs(q, max_seqlen)
    pairs = heads * (cu_seqlens.shape[0] - 1)
    if not (pairs and tokens and max_seqlen):
        return
    lengths = cu_seqlens.contiguous(), bounds.contiguous()
    tensors = (q, k, v, *lengths, rope, out.contiguous(), lse, grad.contiguous(), *grads)
    common = {
        **_geometry(q, k, v, prefix),
        "STRIDE_G": grads[0].stride(0),
        "ROPE": rope is not None,
        "num_warps": config.warps,
    }
    scales = scale * math.log2(math.e), scale
    with on_device(q):
        if isinstance(config, SampleConfig):
            tiles = triton.cdiv(max_seqlen, config.keys)
            sums = q.new_empty((tokens, *q.shape[1:]), dtype=torch.float32) if tiles > 1 else None
            sample_backward_kernel[(pairs,)](
                *tensors,
                sums,
                tokens,
                *scales,
                **common,
                BN=config.keys,
                BM=config.queries,
                TURN=rope is not None and config.turns,
                TILES=tiles,
                num_stages=config.stages,
            )
            return
        key_tiles = triton.cdiv(max_seqlen, config.kv_keys)
        query_tiles = triton.cdiv(max_seqlen, config.q_queries)
        backward_kernel[((key_tiles + query_tiles) * pairs,)](
            *tensors,
            tokens,
            key_tiles,
            query_tiles,
            *scales,
            **common,
            KV_BN=config.kv_keys,
            KV_BM=config.kv_queries,
            Q_BM=config.q_queries,
            Q_BN=config.q_keys,
            num_stages=config.stages,
            maxnreg=config.registers,
        )


def rotary_forward(
    qkv: Tensor,
    rope: Tensor,
    cu_seqlens: Tensor,
    prefix_lengths: Tensor,
    max_seqlen: int,
    scale: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`forward` of a packed projection, and the turned q and k (empty without `keep`)."""
    turned = qkv.new_empty(turned_shape(qkv) if keep else (0,))
    q, k, v = qkv.unbind(1)
    kept = turned[:, : qkv.shape[0]] if keep else None
    rope = rope.contiguous()
    out, lse = forward(q, k, v, cu_seqlens, prefix_lengths, True, max_seqlen, scale, rope, kept)
    return out, lse, turned


def rotary_backward(
    grad: Tensor,
    qkv: Tensor,
    rope: Tensor,
    out: Tensor,
    lse: Tensor,
    turned: Tensor,
    cu_seqlens: Tensor,
    prefix_lengths: Tensor,
    max_seqlen: int,
    scale: float,
) -> Tensor:
    """The gradient of qkv, contiguous."""
    grad_qkv = qkv.new_empty(qkv.shape)
    q, k, v = qkv.unbind(1)
    if turned.numel():
        q, k = turned[:, : qkv.shape[0]].unbind()
    grad_q, grad_k, grad_v = grad_qkv.unbind(1)
    grads = grad_q, grad_k, grad_v
    rope = rope.contiguous()
    backward(grad, q, k, v, out, lse, cu_seqlens, prefix_lengths, True, max_seqlen, scale, grads, rope)
    return grad_qkv
