"""Triton kernels of packed attention under a bound per row. Imported only when they run.

Forward: one program per (query tile, head, sample). Backward: one launch in which some programs own a key
tile (gradients of k and v) and the others a query tile (gradient of q), so that nothing is added atomically
and the same inputs give the same bits. Key tiles are full (no mask), partial or empty (skipped).
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
    """A key tile's program steps over `kv_queries` rows, a query tile's program over `q_keys` keys."""

    kv_keys: int
    kv_queries: int
    q_queries: int
    q_keys: int
    warps: int
    stages: int


# Lengths up to which an entry of a table's row serves; the last one serves all others. Lengths choose a
# config and are no constants of a kernel, so other lengths recompile nothing.
LENGTHS = (64, 128, 1 << 30)

# (architecture, "half" or "single", padded head dim) -> a config per entry of LENGTHS. Chosen by what ptxas
# reports: no spills, few registers, room for several blocks. tests/kernels/test_compile.py holds them to it.
FORWARD: dict[tuple[int, str, int], tuple[ForwardConfig, ...]] = {}
BACKWARD: dict[tuple[int, str, int], tuple[BackwardConfig, ...]] = {}
for _dim in (16, 32, 64):
    for _arch in (80, 90):
        FORWARD[_arch, "half", _dim] = (*2 * (ForwardConfig(64, 64, 4, 2),), ForwardConfig(128, 64, 8, 2))
        FORWARD[_arch, "single", _dim] = 3 * (ForwardConfig(16 if _arch == 80 else 32, 32, 4, 1),)
        BACKWARD[_arch, "single", _dim] = 3 * (BackwardConfig(16, 32, 32, 16, 8, 1),)
    BACKWARD[80, "half", _dim] = 3 * (BackwardConfig(32, 64, 64, 32, 4, 1),)
    BACKWARD[90, "half", _dim] = (
        BackwardConfig(64, 32, 64, 32, 4, 1),
        *2 * (BackwardConfig(128, 32, 128, 32, 8, 1),),
    )
for _arch in (80, 90):
    FORWARD[_arch, "half", 128] = 3 * (ForwardConfig(64, 64, 8, 2),)
    BACKWARD[_arch, "half", 128] = 3 * (BackwardConfig(32, 64, 64, 32, 8, 1),)
    FORWARD[_arch, "single", 128] = 3 * (ForwardConfig(16, 32, 4, 1),)
    BACKWARD[_arch, "single", 128] = 3 * (BackwardConfig(16, 16, 16, 16, 4, 1),)

# Small enough that short tests have full, partial and empty tiles.
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
def _bound(bounds, row, rows, prefix, PREFIX: tl.constexpr):
    """How many keys each row sees; for the general mask `bounds` points at the sample's first row."""
    if PREFIX:
        return tl.where(row < prefix, prefix, row + 1)
    seen = tl.load(bounds + row, mask=row < rows, other=0)
    return tl.minimum(seen, rows)


@triton.jit
def _attend(
    q,
    acc,
    peak,
    total,
    k,
    v,
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
):
    """Online softmax over the key tiles from `first` to `last`, in base 2."""
    for n0 in range(first, last, BN):
        key = n0 + tl.arange(0, BN)
        kt = _load(k, key, rows, STRIDE_K, D, BD, FULL)
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
    out,
    lse,
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
):
    program = tl.program_id(0)
    m0 = (program % tiles) * BM
    head = (program // tiles) % HEADS
    sample = program // tiles // HEADS
    start = tl.load(cu_seqlens + sample)
    rows = tl.load(cu_seqlens + sample + 1) - start
    start = start.to(tl.int64)
    if m0 < rows:
        row = m0 + tl.arange(0, BM)
        prefix = 0
        last_row = tl.minimum(m0 + BM, rows) - 1
        if PREFIX:
            prefix = tl.minimum(tl.load(bounds + sample), rows)
            least = tl.where(m0 < prefix, prefix, m0 + 1)
            most = tl.where(last_row < prefix, prefix, last_row + 1)
            bound = _bound(bounds, row, rows, prefix, PREFIX)
        else:
            least = tl.minimum(tl.load(bounds + start + m0), rows)
            most = tl.minimum(tl.load(bounds + start + last_row), rows)
            bound = _bound(bounds + start, row, rows, prefix, PREFIX)
        full = least // BN * BN
        k_base = k + start * STRIDE_K + head * D
        v_base = v + start * STRIDE_V + head * D
        qt = _load(q + start * STRIDE_Q + head * D, row, rows, STRIDE_Q, D, BD, False)
        acc = tl.zeros((BM, BD), tl.float32)
        peak = tl.full((BM,), -float("inf"), tl.float32)
        total = tl.zeros((BM,), tl.float32)
        acc, peak, total = _attend(
            qt,
            acc,
            peak,
            total,
            k_base,
            v_base,
            0,
            full,
            rows,
            bound,
            qk_scale,
            STRIDE_K,
            STRIDE_V,
            D,
            BD,
            BN,
            True,
        )
        acc, peak, total = _attend(
            qt,
            acc,
            peak,
            total,
            k_base,
            v_base,
            full,
            most,
            rows,
            bound,
            qk_scale,
            STRIDE_K,
            STRIDE_V,
            D,
            BD,
            BN,
            False,
        )
        blind = total == 0.0
        acc = acc / tl.where(blind, 1.0, total)[:, None]
        _store(out + (start * HEADS + head) * D, row, rows, acc, HEADS * D, D, BD)
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
        slope = p * (tl.dot(vt, tl.trans(gt), input_precision=_PRECISION) - delta[None, :])
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


@triton.jit(do_not_specialize=["tokens", "key_tiles", "query_tiles", "qk_scale", "scale"])
def backward_kernel(
    q,
    k,
    v,
    cu_seqlens,
    bounds,
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
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    KV_BN: tl.constexpr,
    KV_BM: tl.constexpr,
    Q_BM: tl.constexpr,
    Q_BN: tl.constexpr,
    PREFIX: tl.constexpr,
):
    STRIDE_O: tl.constexpr = HEADS * D
    program = tl.program_id(0)
    parts = key_tiles + query_tiles
    part = program % parts
    head = (program // parts) % HEADS
    sample = program // parts // HEADS
    start = tl.load(cu_seqlens + sample)
    rows = tl.load(cu_seqlens + sample + 1) - start
    start = start.to(tl.int64)
    prefix = 0
    if PREFIX:
        prefix = tl.minimum(tl.load(bounds + sample), rows)
    else:
        bounds += start
    q += start * STRIDE_Q + head * D
    k += start * STRIDE_K + head * D
    v += start * STRIDE_V + head * D
    own = (start * HEADS + head) * D
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
            _store(grad_k + own, key, rows, gk * scale, STRIDE_O, D, BD)
            _store(grad_v + own, key, rows, gv, STRIDE_O, D, BD)
    else:
        m0 = (part - key_tiles) * Q_BM
        if m0 < rows:
            row = m0 + tl.arange(0, Q_BM)
            last_row = tl.minimum(m0 + Q_BM, rows) - 1
            if PREFIX:
                least = tl.where(m0 < prefix, prefix, m0 + 1)
                most = tl.where(last_row < prefix, prefix, last_row + 1)
            else:
                least = tl.minimum(tl.load(bounds + m0), rows)
                most = tl.minimum(tl.load(bounds + last_row), rows)
            bound = _bound(bounds, row, rows, prefix, PREFIX)
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
            _store(grad_q + own, row, rows, gq * scale, STRIDE_O, D, BD)


@functools.lru_cache(maxsize=32)
def _architecture(device: torch.device) -> int:
    major, _ = torch.cuda.get_device_capability(device)
    return 90 if major >= 9 else 80


def padded_head_dim(head_dim: int) -> int:
    """Triton's dot needs a power of two, and at least 16."""
    return max(16, triton.next_power_of_2(head_dim))


def configs(q: Tensor, max_seqlen: int) -> tuple[ForwardConfig, BackwardConfig]:
    """The table's configs for these tensors."""
    if interpreted():
        return INTERPRETER
    kind = "single" if q.dtype == torch.float32 else "half"
    key = _architecture(q.device), kind, padded_head_dim(q.shape[2])
    bucket = next(i for i, length in enumerate(LENGTHS) if max_seqlen <= length)
    return FORWARD[key][bucket], BACKWARD[key][bucket]


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
) -> tuple[Tensor, Tensor]:
    """The output like q, and the base-2 log-sum-exp of the scaled scores, float32 (heads, tokens)."""
    tokens, heads, _ = q.shape
    q, k, v = _packed(q), _packed(k), _packed(v)
    out = q.new_empty(q.shape)
    lse = q.new_empty((heads, tokens), dtype=torch.float32)
    config, _ = configs(q, max_seqlen)
    tiles = triton.cdiv(max_seqlen, config.queries)
    programs = tiles * heads * (cu_seqlens.shape[0] - 1)
    if programs and tokens:
        with on_device(q):
            forward_kernel[(programs,)](
                q,
                k,
                v,
                cu_seqlens.contiguous(),
                bounds.contiguous(),
                out,
                lse,
                tokens,
                tiles,
                scale * math.log2(math.e),
                **_geometry(q, k, v, prefix),
                BM=config.queries,
                BN=config.keys,
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
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v."""
    tokens, heads, _ = q.shape
    grads = tuple(x.new_empty(x.shape) for x in (q, k, v))
    q, k, v = _packed(q), _packed(k), _packed(v)
    _, config = configs(q, max_seqlen)
    key_tiles = triton.cdiv(max_seqlen, config.kv_keys)
    query_tiles = triton.cdiv(max_seqlen, config.q_queries)
    programs = (key_tiles + query_tiles) * heads * (cu_seqlens.shape[0] - 1)
    if programs and tokens:
        with on_device(q):
            backward_kernel[(programs,)](
                q,
                k,
                v,
                cu_seqlens.contiguous(),
                bounds.contiguous(),
                out.contiguous(),
                lse,
                grad.contiguous(),
                *grads,
                tokens,
                key_tiles,
                query_tiles,
                scale * math.log2(math.e),
                scale,
                **_geometry(q, k, v, prefix),
                KV_BN=config.kv_keys,
                KV_BM=config.kv_queries,
                Q_BM=config.q_queries,
                Q_BN=config.q_keys,
                num_warps=config.warps,
                num_stages=config.stages,
            )
    return grads[0], grads[1], grads[2]
