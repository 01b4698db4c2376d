"""Packed attention from PyTorch's matrix products: what trains on a CPU.

Samples of similar length are gathered into small padded batches whose scores stay in the cache. On 4096 rows
in samples of 20-80 (one core, forward and backward) this takes 0.8-0.9 of the time of one SDPA call per
sample in float32 and 0.3-0.4 in bfloat16. What depends on the lengths only is planned once per batch and
kept, keyed by the lengths' values, so that a model's layers share it.
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
    gather: Tensor  # int64 (samples * heads * rows): its rows among the packed tokens * heads
    kept: Tensor | None  # int64: which of those are real; None when all are
    target: Tensor  # int64: where the real ones go among the packed tokens * heads
    bias: Tensor  # float32 (samples, 1, rows, rows): 0 or -inf
    alive: (
        Tensor | None
    )  # float32 (samples, 1, rows, 1): 0 on padding and rows that see no key; None when all are 1


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
    dtype = compute_dtype(q.dtype)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    query, key, value, flat_out = (_rows(x) for x in (q, k, v, out))
    for task in _tasks(q, cu_seqlens, bounds, prefix):
        a, b, c = (_gather(x, task, dtype) for x in (query, key, value))
        result = torch.bmm(_weights(a, b, task, scale), c)
        if task.alive is not None:
            _per_sample(result, task).mul_(task.alive)
        _scatter(flat_out, result, task)
    return out


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
    dtype = compute_dtype(q.dtype)
    grads = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    flat_grads = [_rows(x) for x in grads]
    rows = [_rows(x) for x in (q, k, v, grad)]
    for task in _tasks(q, cu_seqlens, bounds, prefix):
        a, b, c, g = (_gather(x, task, dtype) for x in rows)
        if task.alive is not None:
            _per_sample(g, task).mul_(task.alive)
        weights = _weights(a, b, task, scale)
        grad_v = torch.bmm(weights.transpose(1, 2), g)
        slope = torch.bmm(g, c.transpose(1, 2))
        slope.sub_((slope * weights).sum(-1, keepdim=True)).mul_(weights).mul_(scale)
        grad_q = torch.bmm(slope, b)
        grad_k = torch.bmm(slope.transpose(1, 2), a)
        for target, result in zip(flat_grads, (grad_q, grad_k, grad_v), strict=True):
            _scatter(target, result, task)
    return grads[0], grads[1], grads[2]


def _weights(a: Tensor, b: Tensor, task: _Task, scale: float) -> Tensor:
    scores = torch.bmm(a, b.transpose(1, 2)).mul_(scale)
    _per_sample(scores, task).add_(task.bias)
    return torch.softmax(scores, -1)


def _rows(x: Tensor) -> Tensor:
    """(tokens, heads, head_dim) -> (tokens * heads, head_dim), contiguous."""
    return x.contiguous().view(-1, x.shape[2])


def _per_sample(x: Tensor, task: _Task) -> Tensor:
    return x.view(task.samples, task.heads, task.rows, -1)


def _gather(x: Tensor, task: _Task, dtype: torch.dtype) -> Tensor:
    return x.index_select(0, task.gather).to(dtype).view(task.samples * task.heads, task.rows, x.shape[1])


def _scatter(target: Tensor, result: Tensor, task: _Task) -> None:
    flat = result.view(-1, target.shape[1]).to(target.dtype)
    target.index_copy_(0, task.target, flat if task.kept is None else flat.index_select(0, task.kept))


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


def _tasks(q: Tensor, cu_seqlens: Tensor, bounds: Tensor, prefix: bool) -> list[_Task]:
    return _plan(_bytes(cu_seqlens), _bytes(bounds), prefix, q.shape[1], q.device)


@functools.lru_cache(maxsize=4)
def _plan(cu_seqlens: bytes, bounds: bytes, prefix: bool, heads: int, device: torch.device) -> list[_Task]:
    cu = np.frombuffer(cu_seqlens, np.int32).astype(np.int64)
    values = np.frombuffer(bounds, np.int32)
    lengths = np.diff(cu)
    order = np.argsort(lengths, kind="stable")
    order = order[lengths[order] > 0]
    tasks: list[_Task] = []
    while order.size:
        sizes = lengths[order]
        # The longest run of similar lengths whose scores fit the budget, and at least one sample.
        count = np.arange(1, order.size + 1)
        fits = (count * heads * sizes * sizes <= _SCORES) & (sizes <= 1.25 * sizes[0] + 4)
        taken = max(1, order.size if fits.all() else int(np.argmin(fits)))
        tasks += _batch(order[:taken], cu, values, prefix, heads, device)
        order = order[taken:]
    return tasks


def _batch(
    samples: np.ndarray, cu: np.ndarray, values: np.ndarray, prefix: bool, heads: int, device: torch.device
) -> list[_Task]:
    """One padded batch of these samples; a single long sample is cut into groups of heads."""
    starts, lengths = cu[samples][:, None], np.diff(cu)[samples][:, None]
    rows = int(lengths.max())
    row = np.arange(rows)[None]
    real = row < lengths
    # Padding repeats the sample's last row: finite numbers that the mask and `alive` take out again.
    packed = starts + np.minimum(row, lengths - 1)
    if prefix:
        prefixes = values[samples][:, None]
        limit = np.where(row < prefixes, prefixes, np.minimum(row + 1, lengths))
    else:
        limit = values[packed]
    alive = real & (limit > 0)
    hidden = row[:, None, :] >= np.maximum(limit, 1)[:, :, None]
    bias = torch.zeros(hidden.shape).masked_fill_(torch.from_numpy(hidden), -math.inf)[:, None].to(device)
    weight = None if alive.all() else torch.from_numpy(alive.astype(np.float32))[:, None, :, None].to(device)
    step = heads
    if len(samples) == 1:
        step = max(1, min(heads, _SCORES // (rows * rows)))
    tasks = []
    for first in range(0, heads, step):
        head = np.arange(first, min(heads, first + step))
        gather = (packed[:, None, :] * heads + head[None, :, None]).reshape(-1)
        keep = np.broadcast_to(real[:, None, :], (len(samples), head.size, rows)).reshape(-1)
        kept = None if keep.all() else torch.from_numpy(np.flatnonzero(keep)).to(device)
        target = torch.from_numpy(gather[keep]).to(device)
        gathered = torch.from_numpy(gather).to(device)
        tasks.append(_Task(len(samples), head.size, rows, gathered, kept, target, bias, weight))
    return tasks
