"""How the next token is chosen: greedily, or by sampling with temperature, top-k, top-p and min-p."""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
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
    if isinstance(step, int):
        step = torch.tensor(step, device=keys.device)
    if isinstance(classes, int):
        classes = torch.arange(classes, device=keys.device)[None]
    z = (classes + 1) * _GOLDEN + (keys + (step << 32) * _GOLDEN)[:, None]
    for bits, factor in ((30, _FACTORS[0]), (27, _FACTORS[1])):
        z = (z ^ _shift(z, bits)) * factor
    uniform = (_shift(z ^ _shift(z, 31), 11).double() + 0.5) * 2.0**-53
    return -(-uniform.log()).log()


def _signed(constant: int) -> int:
    """An unsigned 64-bit constant as the int64 of the same bits: torch's int64 products wrap."""
    return constant - 2**64


_GOLDEN, *_FACTORS = map(_signed, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical right shift; torch's is arithmetic."""
    return (z >> bits) & (2 ** (64 - bits) - 1)


def _noise_into(z: NDArray, spare: NDArray, keys: NDArray, step: NDArray, classes: NDArray | None) -> NDArray:
    """`gumbel_noise` of classes, or all, in the memory of z; z and spare float64 (B, n) are overwritten."""
    noise, z, spare = z, z.view(np.int64), spare.view(np.int64)
    with np.errstate(over="ignore"):  # integers wrap on purpose
        base = keys + (step << 32) * _GOLDEN
        counter = np.arange(1, z.shape[1] + 1)[None] if classes is None else classes + 1
        np.add(counter * _GOLDEN, base[:, None], out=z)
    unsigned, shifted = z.view(np.uint64), spare.view(np.uint64)
    for bits, factor in ((30, _FACTORS[0]), (27, _FACTORS[1]), (31, None)):
        np.right_shift(unsigned, np.uint64(bits), out=shifted)
        z ^= spare
        if factor is not None:
            z *= factor
    np.right_shift(unsigned, np.uint64(11), out=shifted)
    noise[:] = spare
    noise += 0.5
    noise *= 2.0**-53
    for _ in range(2):
        np.negative(np.log(noise, out=noise), out=noise)
    return noise


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
    steps = torch.as_tensor(step).expand(len(keys)).numpy()
    # A row's numbers should stay in a cache from one pass to the next.
    rows = max(1, _BLOCK // logits.shape[-1])
    parts = (
        (logits[i : i + rows], keys[i : i + rows], steps[i : i + rows]) for i in range(0, len(keys), rows)
    )
    return torch.cat([_sample_block(part, key.numpy(), at, sampling) for part, key, at in parts])


def sample_masked(logits: Tensor, keys: Tensor, step: int | Tensor, sampling: Sampling) -> Tensor:
    """`sample` by its definition, of fixed shapes, so that a CUDA graph can hold it."""
    score = logits.double() / sampling.temperature
    if sampling.top_k or sampling.top_p < 1 or sampling.min_p:
        score = score.masked_fill(probabilities(logits, sampling) == 0, -torch.inf)
    return (score + gumbel_noise(keys, step, logits.shape[-1])).argmax(-1)


def _sample_block(logits: Tensor, keys: NDArray, step: NDArray, sampling: Sampling) -> Tensor:
    """`sample_masked` without its sort: whether the winner is within top_p needs a sum only.

    NumPy's, on one thread: for one row torch is slower on two, and its threads, which spin for a while when
    they are done, would keep those of `one_row` waiting.
    """
    index = None
    if 0 < sampling.top_k < logits.shape[-1]:
        logits, index = logits.topk(sampling.top_k, dim=-1)
    score, weight, spare, noisy = _workspace(*logits.shape)
    np.divide(logits.float().numpy(), sampling.temperature, out=score, dtype=np.float64)
    noisy = _noise_into(noisy, spare, keys, step, None if index is None else index.numpy())
    noisy += score
    if sampling.min_p or sampling.top_p < 1:
        np.exp(np.subtract(score, score.max(-1, keepdims=True), out=weight), out=weight)
        if sampling.min_p:
            noisy[weight < sampling.min_p] = -np.inf
    winner = noisy.argmax(-1)[:, None]
    if sampling.top_p < 1:
        place = np.arange(score.shape[-1])
        limit = sampling.top_p * weight.sum(-1, keepdims=True)
        while True:
            its = np.take_along_axis(score, winner, -1)
            likelier = (score > its) | ((score == its) & (place < winner))
            outside = np.multiply(weight, likelier, out=spare).sum(-1, keepdims=True) >= limit
            if not outside.any():
                break
            # Where the winner is outside, so is all that is not likelier.
            noisy[outside & ~likelier] = -np.inf
            winner = noisy.argmax(-1)[:, None]
    chosen = torch.from_numpy(winner)
    return (chosen if index is None else index.gather(-1, chosen)).squeeze(-1)


class _Memory(threading.local):
    """Allocated for every token, this would cost as much as the sampling: the system clears each page."""

    buffers: NDArray[np.float64] = np.empty(0)


_memory = _Memory()


def _workspace(rows: int, columns: int) -> NDArray[np.float64]:
    """Four arrays, whatever is in them, (4, rows, columns); until the next call."""
    size = 4 * rows * columns
    if _memory.buffers.size < size:
        _memory.buffers = np.empty(size)
    return _memory.buffers[:size].reshape(4, rows, columns)
