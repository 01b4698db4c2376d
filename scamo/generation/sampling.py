"""How the next token is chosen: greedily, or by sampling with temperature, top-k and top-p."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scamo.errors import ScaMoError


@dataclass(frozen=True)
class Sampling:
    """Applied in this order: temperature, then top_k, then top_p (renormalised after each).

    temperature: divides the logits, above 0. top_k: the k likeliest tokens only, 0 for all. top_p: the
    likeliest tokens until they have this much probability together, in (0, 1]; the token that crosses it
    belongs to them. greedy: the likeliest token, the lowest index of equals; the rest is ignored.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    greedy: bool = False

    def __post_init__(self) -> None:
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ScaMoError(
                f"temperature = {self.temperature}: expected a value above 0 (greedy is a choice of its own)"
            )
        if self.top_k < 0 or self.top_k != int(self.top_k):
            raise ScaMoError(f"top_k = {self.top_k}: expected a whole number, 0 for all tokens")
        if not 0 < self.top_p <= 1:
            raise ScaMoError(f"top_p = {self.top_p}: expected a value in (0, 1]")


def prompt_keys(seeds: Sequence[int], texts: Sequence[str]) -> Tensor:
    """The noise of each prompt, int64 (B,): a function of its seed and its text alone.

    So a motion does not depend on its neighbours in a batch, and two sentences of one call share no noise.
    """
    keys = [
        hashlib.blake2b(f"{int(seed)}\n{text}".encode(), digest_size=8).digest()
        for seed, text in zip(seeds, texts, strict=True)
    ]
    return torch.tensor([int.from_bytes(key, "little", signed=True) for key in keys], dtype=torch.int64)


def gumbel_noise(keys: Tensor, step: int, classes: int) -> Tensor:
    """Standard Gumbel noise float64 (B, classes) of one step: SplitMix64 of (key, step, class).

    Integers until the last two logarithms, hence the same on every device, in any batch, without a state.
    """
    counter = torch.arange(1, classes + 1, device=keys.device) + (step << 32)
    z = counter * _signed(0x9E3779B97F4A7C15) + keys[:, None]
    z = (z ^ _shift(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift(z, 27)) * _signed(0x94D049BB133111EB)
    uniform = (_shift(z ^ _shift(z, 31), 11).double() + 0.5) * 2.0**-53
    return uniform.log_().neg_().log_().neg_()


def _signed(constant: int) -> int:
    """An unsigned 64-bit constant as the int64 of the same bits: torch's int64 products wrap."""
    return constant - 2**64


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical right shift; torch's is arithmetic."""
    return (z >> bits) & (2 ** (64 - bits) - 1)


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
    return p


def sample(logits: Tensor, keys: Tensor, step: int, sampling: Sampling) -> Tensor:
    """One token per row: logits float (B, V), keys int64 (B,) of prompt_keys, step from 0 -> int64 (B,).

    The Gumbel-max trick, not the inverse of the cumulative distribution: rounding of the logits (1e-6, from
    another batch size) then decides a draw about once in a million, whatever V and top_p are. With cumulative
    sums it is sqrt(V) times as often, and every change at the edge of top_p shifts all draws.
    """
    if sampling.greedy:
        return logits.argmax(-1)
    score = logits.double() / sampling.temperature
    if sampling.top_k or sampling.top_p < 1:
        score = score.masked_fill(probabilities(logits, sampling) == 0, -torch.inf)
    return (score + gumbel_noise(keys.to(logits.device), step, logits.shape[-1])).argmax(-1)
