"""How the next token is chosen: greedily, or by sampling with temperature, top-k, top-p and min-p."""

from __future__ import annotations

import hashlib
import itertools
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scamo.errors import ScaMoError

# Entries of a block of rows.
_BLOCK = 1 << 16


@dataclass(frozen=True)
class Sampling:
    """Applied in this order: temperature, top_k, top_p (renormalised after each), min_p.

    temperature: divides the logits, above 0. top_k: the k likeliest tokens only, 0 for all. top_p: the
    likeliest tokens until they have this much probability together, in (0, 1]; the token that crosses it
    belongs to them. greedy: the likeliest token, the lowest index of equals; the rest is ignored. min_p: only
    tokens with at least this share of the likeliest one's probability, in [0, 1]; 0 for all.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    greedy: bool = False
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ScaMoError(
                f"temperature = {self.temperature}: expected a value above 0 (greedy is a choice of its own)"
            )
        if self.top_k < 0 or self.top_k != int(self.top_k):
            raise ScaMoError(f"top_k = {self.top_k}: expected a whole number, 0 for all tokens")
        if not 0 < self.top_p <= 1:
            raise ScaMoError(f"top_p = {self.top_p}: expected a value in (0, 1]")
        if not 0 <= self.min_p <= 1:
            raise ScaMoError(f"min_p = {self.min_p}: expected a value in [0, 1]")


def prompt_keys(seeds: Sequence[int], texts: Sequence[str], samples: Sequence[int] | None = None) -> Tensor:
    """The noise of each prompt, int64 (B,): a function of its seed, its text and its sample number alone.

    So a motion does not depend on its neighbours in a batch, and two sentences of one call share no noise.
    samples: numbers from 0 of several motions of one seed and text; 0 for all without them.
    """
    keys = [
        hashlib.blake2b(
            f"{int(seed)}{f'/{number}' if number else ''}\n{text}".encode(), digest_size=8
        ).digest()
        for seed, text, number in zip(seeds, texts, samples or [0] * len(texts), strict=True)
    ]
    return torch.tensor([int.from_bytes(key, "little", signed=True) for key in keys], dtype=torch.int64)


def gumbel_noise(keys: Tensor, step: int | Tensor, classes: int | Tensor) -> Tensor:
    """Standard Gumbel noise float64 (B, classes): SplitMix64 of (key, step, class).

    keys: int64 (B,). step: from 0, of all rows or int64 (B,). classes: their number, or int64 (B, n), which
    ones. Integers until the last two logarithms, hence the same on every device, in any batch, without a
    state.
    """
    columns = classes if isinstance(classes, int) else classes.shape[1]
    z, spare = torch.empty((2, len(keys), columns), dtype=torch.int64, device=keys.device)
    return _noise(keys, step, None if isinstance(classes, int) else classes, z, spare)


def _noise(keys: Tensor, step: int | Tensor, classes: Tensor | None, z: Tensor, spare: Tensor) -> Tensor:
    """`gumbel_noise` of classes, or all, in the memory of z; z and spare int64 (B, n) are overwritten."""
    if isinstance(step, int):
        step = torch.tensor(step, device=keys.device)
    if classes is None:
        counter = torch.arange(1, z.shape[1] + 1, out=spare[0])
    else:
        counter = torch.add(classes, 1, out=spare)
    torch.add(counter.mul_(_GOLDEN), (keys + (step << 32) * _GOLDEN)[:, None], out=z)
    for bits, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, None)):
        z ^= _shift(z, bits, spare)
        if factor is not None:
            z *= _signed(factor)
    uniform = z.view(torch.float64).copy_(_shift(z, 11, spare)).add_(0.5).mul_(2.0**-53)
    return uniform.log_().neg_().log_().neg_()


def _signed(constant: int) -> int:
    """An unsigned 64-bit constant as the int64 of the same bits: torch's int64 products wrap."""
    return constant - 2**64


_GOLDEN = _signed(0x9E3779B97F4A7C15)


def _shift(z: Tensor, bits: int, out: Tensor) -> Tensor:
    """Logical right shift into `out`; torch's is arithmetic."""
    return torch.bitwise_right_shift(z, bits, out=out).bitwise_and_(2 ** (64 - bits) - 1)


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """logits (B, V), -inf where forbidden -> float64 (B, V), what `sample` draws from; rows sum to 1."""
    p = torch.softmax(logits.double() / sampling.temperature, -1)
    if 0 < sampling.top_k < p.shape[-1]:
        value, index = p.topk(sampling.top_k, dim=-1)
        p = torch.zeros_like(p).scatter_(1, index, value / value.sum(-1, keepdim=True))
    if sampling.top_p < 1:
        value, index = p.sort(dim=-1, descending=True, stable=True)
        value = value.masked_fill(value.cumsum(-1) - value >= sampling.top_p, 0)
        p = torch.zeros_like(p).scatter_(1, index, value / value.sum(-1, keepdim=True))
    if sampling.min_p:
        p = p.masked_fill(p < sampling.min_p * p.amax(-1, keepdim=True), 0)
        p = p / p.sum(-1, keepdim=True)
    return p


def sample(logits: Tensor, keys: Tensor, step: int | Tensor, sampling: Sampling) -> Tensor:
    """One token per row: logits float (B, V), keys int64 (B,) of prompt_keys -> int64 (B,).

    step: from 0, of all rows or int64 (B,). The Gumbel-max trick, not the inverse of the cumulative
    distribution: rounding of the logits (1e-6, from another batch size) then decides a draw about once in a
    million, whatever V and top_p are. With cumulative sums it is sqrt(V) times as often, and every change at
    the edge of top_p shifts all draws.
    """
    if sampling.greedy:
        return logits.argmax(-1)
    keys = keys.to(logits.device)
    if logits.is_cuda:
        return sample_masked(logits, keys, step, sampling)
    # A row's numbers should stay in a cache from one pass to the next.
    rows = max(1, _BLOCK // logits.shape[-1])
    steps = step.split(rows) if isinstance(step, Tensor) else itertools.repeat(step)
    parts = zip(logits.split(rows), keys.split(rows), steps, strict=False)
    return torch.cat([_sample_block(*part, sampling) for part in parts])


def sample_masked(logits: Tensor, keys: Tensor, step: int | Tensor, sampling: Sampling) -> Tensor:
    """`sample` by its definition, of fixed shapes, so that a CUDA graph can hold it."""
    score = logits.double() / sampling.temperature
    if sampling.top_k or sampling.top_p < 1 or sampling.min_p:
        score = score.masked_fill(probabilities(logits, sampling) == 0, -torch.inf)
    return (score + gumbel_noise(keys, step, logits.shape[-1])).argmax(-1)


def _sample_block(logits: Tensor, keys: Tensor, step: int | Tensor, sampling: Sampling) -> Tensor:
    """`sample_masked` without its sort: whether the winner is within top_p needs a sum only."""
    index = None
    if 0 < sampling.top_k < logits.shape[-1]:
        logits, index = logits.topk(sampling.top_k, dim=-1)
    score, weight, spare, noisy = _workspace(logits.shape)
    score.copy_(logits).div_(sampling.temperature)
    noisy = _noise(keys, step, index, noisy.view(torch.int64), spare.view(torch.int64)).add_(score)
    if sampling.min_p or sampling.top_p < 1:
        torch.sub(score, score.amax(-1, keepdim=True), out=weight).exp_()
        if sampling.min_p:
            noisy.masked_fill_(weight < sampling.min_p, -torch.inf)
    winner = noisy.argmax(-1, keepdim=True)
    if sampling.top_p < 1:
        place = torch.arange(score.shape[-1])
        limit = sampling.top_p * weight.sum(-1, keepdim=True)
        while True:
            its = score.gather(-1, winner)
            likelier = (score > its) | ((score == its) & (place < winner))
            outside = torch.mul(weight, likelier, out=spare).sum(-1, keepdim=True) >= limit
            if not outside.any():
                break
            # Where the winner is outside, so is all that is not likelier.
            noisy.masked_fill_(outside & ~likelier, -torch.inf)
            winner = noisy.argmax(-1, keepdim=True)
    return (winner if index is None else index.gather(-1, winner)).squeeze(-1)


class _Memory(threading.local):
    """Allocated for every token, this would cost as much as the sampling: the system clears each page."""

    buffers = torch.empty(4, 0, dtype=torch.float64)


_memory = _Memory()


def _workspace(shape: torch.Size) -> Tensor:
    """Four float64 tensors of the shape, whatever is in them, (4, rows, columns); until the next call."""
    if _memory.buffers.shape[1] < shape.numel():
        with torch.inference_mode(False):  # the next caller may be in another mode
            _memory.buffers = torch.empty(4, shape.numel(), dtype=torch.float64)
    return _memory.buffers[:, : shape.numel()].view(4, *shape)
