"""How the next token is chosen: greedily, or by sampling with temperature, top-k and top-p."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
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


def uniforms(seed: int, text: str, count: int) -> NDArray[np.float64]:
    """`count` uniform numbers in [0, 1) for one prompt: a function of (seed, text) alone.

    So a motion does not depend on its neighbours in a batch, and two sentences of one call share no noise.
    The stream only grows with `count`: number i is the same for every count above i.
    """
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    key = np.array([seed & (2**64 - 1), int.from_bytes(digest, "little")], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).random(count)


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


def sample(logits: Tensor, noise: Tensor, sampling: Sampling) -> Tensor:
    """One token per row: logits float (B, V), noise float64 (B,) in [0, 1) -> int64 (B,).

    The inverse of the cumulative distribution in float64, in the order of the vocabulary: a change of the
    logits by rounding moves the outcome only where the noise lies within that rounding of a step.
    """
    if sampling.greedy:
        return logits.argmax(-1)
    cumulative = probabilities(logits, sampling).cumsum(-1)
    drawn = noise.to(cumulative.device, torch.float64)[:, None] * cumulative[:, -1:]
    # The first class whose cumulative probability exceeds the draw: never one of probability 0.
    token = torch.searchsorted(cumulative, drawn, right=True)
    last = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous())
    return torch.minimum(token, last).squeeze(1)
