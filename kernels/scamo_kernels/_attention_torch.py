"""Packed attention from PyTorch's matrix products: what trains on a CPU.

Samples of similar length are gathered into small padded batches whose scores stay in the cache. On 4096 rows
in samples of 20-80 (one core, forward and backward) this takes about 0.8 of the CPU time of one SDPA call per
sample in float32 and 0.3 in bfloat16. What depends on the lengths only is planned once per batch and kept,
keyed by the lengths' values, so that a model's layers share it.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from scamo_kernels.reference import compute_dtype

# Elements of one batch's scores: larger ones leave the second-level cache, smaller ones pay more calls.
_SCORES = 1 << 17


class _Task(NamedTuple):
    """One padded batch: `samples` x `heads` square problems of `rows` rows."""

    samples: int
    heads: int
    rows: int
    span: slice  # where its rows stand in the gathered tensors
    bias: Tensor  # float32 (samples, 1, rows, rows): 0 or -inf
    alive: Tensor | None  # float32 (samples, 1, rows, 1): 0 on padding and on rows without a key; None: all 1


class _Plan(NamedTuple):
    """The tasks, the packed (token, head) rows that they stand on, and the way back; int64."""

    gather: Tensor  # (gathered rows,)
    back: Tensor  # (tokens * heads,): index_select with it is much faster than index_copy_
    tasks: list[_Task]


def check_values(cu_seqlens: Tensor, bounds: Tensor, prefix: bool, tokens: int, max_seqlen: int) -> int:
    """Check cu_seqlens, and prefix lengths or bounds, by value; returns the longest sample's length."""
    longest = _checked(_bytes(cu_seqlens), _bytes(bounds), prefix, tokens)
    if 0 <= max_seqlen < longest:
        raise ValueError(f"max_seqlen = {max_seqlen}: the longest sample has {longest} rows")
    return longest


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, bounds: Tensor, prefix: bool, scale: float
) -> Tensor:
    """The output, like q."""
    plan = _plan(_bytes(cu_seqlens), _bytes(bounds), prefix, q.shape[1], q.device)
    rows = [_rows(x) for x in (q, k, v)]
    out = _empty(q, plan)
    for task in plan.tasks:
        a, b, c = (_gather(x, plan, task) for x in rows)
        result = _part(out, task)
        torch.bmm(_weights(a, b, task, scale), c, out=result)
        if task.alive is not None:
            _per_sample(result, task).mul_(task.alive)
    return _scatter(out, plan, q)


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    bounds: Tensor,
    prefix: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v."""
    plan, *gathered = _gradients(grad, q, k, v, cu_seqlens, bounds, prefix, scale)
    grad_q, grad_k, grad_v = (_scatter(x, plan, q) for x in gathered)
    return grad_q, grad_k, grad_v


def _gradients(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    bounds: Tensor,
    prefix: bool,
    scale: float,
) -> tuple[_Plan, Tensor, Tensor, Tensor]:
    """The plan and, in its order and the dtype of the computation, the gradients of q, k and v."""
    plan = _plan(_bytes(cu_seqlens), _bytes(bounds), prefix, q.shape[1], q.device)
    rows = [_rows(x) for x in (q, k, v, grad)]
    grad_queries, grad_keys, grad_values = (_empty(x, plan) for x in (q, k, v))
    for task in plan.tasks:
        a, b, c, g = (_gather(x, plan, task) for x in rows)
        if task.alive is not None:
            _per_sample(g, task).mul_(task.alive)
        weights = _weights(a, b, task, scale)
        torch.bmm(weights.transpose(1, 2), g, out=_part(grad_values, task))
        slope = torch.bmm(g, c.transpose(1, 2))
        slope.sub_((slope * weights).sum(-1, keepdim=True)).mul_(weights).mul_(scale)
        torch.bmm(slope, b, out=_part(grad_queries, task))
        torch.bmm(slope.transpose(1, 2), a, out=_part(grad_keys, task))
    return plan, grad_queries, grad_keys, grad_values


def rotary_forward(
    qkv: Tensor, rope: Tensor, cu_seqlens: Tensor, prefix_lengths: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The output (tokens, heads, head_dim), and the turned q and k (2, tokens, heads, head_dim)."""
    turn = _angles(rope, cu_seqlens, qkv.dtype)
    turned = qkv.new_empty((2, qkv.shape[0], *qkv.shape[2:]))
    if qkv.stride(3) != 1 or any(x % 2 for x in (*qkv.stride()[:3], qkv.storage_offset())):
        qkv = qkv.contiguous()  # as view_as_complex needs it
    for i in range(2):
        _turn(qkv[:, i], turn, turned[i])
    out = forward(turned[0], turned[1], qkv[:, 2], cu_seqlens, prefix_lengths, True, scale)
    return out, turned


def rotary_backward(
    grad: Tensor,
    qkv: Tensor,
    rope: Tensor,
    turned: Tensor,
    cu_seqlens: Tensor,
    prefix_lengths: Tensor,
    scale: float,
) -> Tensor:
    """The gradient of qkv, contiguous."""
    plan, *gathered = _gradients(
        grad, turned[0], turned[1], qkv[:, 2], cu_seqlens, prefix_lengths, True, scale
    )
    back = _angles(rope, cu_seqlens, qkv.dtype).conj().resolve_conj()
    grad_qkv = qkv.new_empty(qkv.shape)
    for i in range(2):
        # Turned back before they are rounded to qkv's dtype.
        rows = gathered[i].index_select(0, plan.back).view(qkv.shape[0], *qkv.shape[2:])
        _turn(rows, back, grad_qkv[:, i])
    grad_qkv[:, 2] = _scatter(gathered[2], plan, qkv[:, 2])
    return grad_qkv


def _angles(rope: Tensor, cu_seqlens: Tensor, dtype: torch.dtype) -> Tensor:
    """exp(i angle) of every packed row and pair: complex (tokens, 1, head_dim / 2)."""
    rows = rope.index_select(0, _positions(_bytes(cu_seqlens), rope.device)).to(compute_dtype(dtype))
    return torch.view_as_complex(rows)[:, None]


def _turn(x: Tensor, turn: Tensor, out: Tensor) -> None:
    """Turn the adjacent pairs of x (tokens, heads, head_dim) into `out`; x is lost if it is the wider."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    same = out.dtype == wide.dtype
    pairs, into = (torch.view_as_complex(y.unflatten(-1, (-1, 2))) for y in (wide, out if same else wide))
    torch.mul(pairs, turn, out=into)
    if not same:
        out.copy_(wide)


def _weights(a: Tensor, b: Tensor, task: _Task, scale: float) -> Tensor:
    scores = torch.bmm(a, b.transpose(1, 2)).mul_(scale)
    _per_sample(scores, task).add_(task.bias)
    return torch.softmax(scores, -1)


def _rows(x: Tensor) -> Tensor:
    """(tokens, heads, head_dim) -> (tokens * heads, head_dim), contiguous."""
    return x.contiguous().view(-1, x.shape[2])


def _empty(like: Tensor, plan: _Plan) -> Tensor:
    shape = (plan.gather.shape[0], like.shape[2])
    return torch.empty(shape, dtype=compute_dtype(like.dtype), device=like.device)


def _gather(rows: Tensor, plan: _Plan, task: _Task) -> Tensor:
    """The task's rows in the dtype of the computation; one task at a time, so that they stay in the cache."""
    part = rows.index_select(0, plan.gather[task.span]).to(compute_dtype(rows.dtype))
    return part.view(task.samples * task.heads, task.rows, -1)


def _scatter(result: Tensor, plan: _Plan, like: Tensor) -> Tensor:
    return result.to(like.dtype).index_select(0, plan.back).view(like.shape)


def _part(x: Tensor, task: _Task) -> Tensor:
    return x[task.span].view(task.samples * task.heads, task.rows, -1)


def _per_sample(x: Tensor, task: _Task) -> Tensor:
    return x.view(task.samples, task.heads, task.rows, -1)


def _bytes(x: Tensor) -> bytes:
    # Values, not identities: a copy of the same lengths hits, a tensor changed in place does not.
    return x.detach().cpu().numpy().tobytes()


@functools.lru_cache(maxsize=16)
def _checked(cu_seqlens: bytes, bounds: bytes, prefix: bool, tokens: int) -> int:
    cu = np.frombuffer(cu_seqlens, np.int32)
    values = np.frombuffer(bounds, np.int32)
    lengths = np.diff(cu)
    if cu[0] != 0 or cu[-1] != tokens or (lengths < 0).any():
        raise ValueError(
            f"cu_seqlens: expected non-decreasing from 0 to {tokens} tokens, got {_shorten(cu.tolist())}"
        )
    limits = lengths if prefix else np.repeat(lengths, lengths)
    name = "prefix_lengths" if prefix else "bounds"
    wrong = np.flatnonzero((values < 0) | (values > limits))
    if wrong.size:
        i = int(wrong[0])
        raise ValueError(
            f"{name}[{i}] = {values[i]}: expected 0 to {limits[i]}, the number of rows of its sample"
        )
    if not prefix and tokens:
        starts = np.zeros(tokens, bool)
        starts[cu[:-1][lengths > 0]] = True
        falls = np.flatnonzero((np.diff(values) < 0) & ~starts[1:])
        if falls.size:
            i = int(falls[0])
            raise ValueError(
                f"bounds[{i + 1}] = {values[i + 1]} after {values[i]}: "
                "expected non-decreasing inside a sample"
            )
    return int(lengths.max(initial=0))


def _shorten(values: list[int]) -> str:
    return str(values) if len(values) <= 8 else f"[{values[0]}, {values[1]}, ..., {values[-1]}]"


@functools.lru_cache(maxsize=4)
def _positions(cu_seqlens: bytes, device: torch.device) -> Tensor:
    """The index of every packed row in its sample, int64."""
    cu = np.frombuffer(cu_seqlens, np.int32).astype(np.int64)
    return torch.from_numpy(np.arange(cu[-1]) - np.repeat(cu[:-1], np.diff(cu))).to(device)


@functools.lru_cache(maxsize=4)
def _plan(cu_seqlens: bytes, bounds: bytes, prefix: bool, heads: int, device: torch.device) -> _Plan:
    cu = np.frombuffer(cu_seqlens, np.int32).astype(np.int64)
    values = np.frombuffer(bounds, np.int32)
    lengths = np.diff(cu)
    order = np.argsort(lengths, kind="stable")
    order = order[lengths[order] > 0]
    gather: list[np.ndarray] = []
    back = np.zeros(int(cu[-1]) * heads, np.int64)
    tasks: list[_Task] = []
    first = 0
    while order.size:
        sizes = lengths[order]
        # The longest run of similar lengths whose scores fit the budget, and at least one sample.
        count = np.arange(1, order.size + 1)
        fits = (count * heads * sizes * sizes <= _SCORES) & (sizes <= 1.25 * sizes[0] + 4)
        taken = max(1, order.size if fits.all() else int(np.argmin(fits)))
        samples, order = order[:taken], order[taken:]
        real, packed, bias, alive = _masks(samples, cu, values, prefix)
        bias, alive = bias.to(device), None if alive is None else alive.to(device)
        rows = packed.shape[1]
        # A single long sample is cut into groups of heads.
        step = heads if taken > 1 else max(1, min(heads, _SCORES // (rows * rows)))
        for low in range(0, heads, step):
            head = np.arange(low, min(heads, low + step))
            flat = (packed[:, None, :] * heads + head[:, None]).reshape(-1)
            keep = np.flatnonzero(np.broadcast_to(real[:, None, :], (taken, head.size, rows)))
            gather.append(flat)
            back[flat[keep]] = first + keep
            span = slice(first, first + flat.size)
            tasks.append(_Task(taken, head.size, rows, span, bias, alive))
            first += flat.size
    rows_of = np.concatenate(gather) if gather else np.zeros(0, np.int64)
    return _Plan(torch.from_numpy(rows_of).to(device), torch.from_numpy(back).to(device), tasks)


def _masks(
    samples: np.ndarray, cu: np.ndarray, values: np.ndarray, prefix: bool
) -> tuple[np.ndarray, np.ndarray, Tensor, Tensor | None]:
    """Which (samples, rows) are real, the packed row that each stands on; `bias` and `alive` of a _Task."""
    starts, lengths = cu[samples][:, None], np.diff(cu)[samples][:, None]
    row = np.arange(int(lengths.max()))[None]
    real = row < lengths
    # Padding repeats the sample's last row: numbers of its own sample that the mask and `alive` take out
    # again.
    packed = starts + np.minimum(row, lengths - 1)
    if prefix:
        prefixes = values[samples][:, None]
        limit = np.where(row < prefixes, prefixes, np.minimum(row + 1, lengths))
    else:
        limit = values[packed]
    alive = real & (limit > 0)
    hidden = row[:, None, :] >= np.maximum(limit, 1)[:, :, None]
    bias = torch.zeros(hidden.shape).masked_fill_(torch.from_numpy(hidden), -math.inf)[:, None]
    if alive.all():
        return real, packed, bias, None
    return real, packed, bias, torch.from_numpy(alive.astype(np.float32))[:, None, :, None]
