"""Tokens of a list of texts, by the engine."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from scamo.generation.engine import Engine, Request, collect
from scamo.generation.sampling import Sampling
from scamo.models.prefix_lm import PrefixLM


def generate_tokens(
    model: PrefixLM,
    texts: Sequence[Tensor],
    keys: Tensor,
    sampling: Sampling,
    *,
    max_tokens: int | Sequence[int],
    min_tokens: int | Sequence[int] = 1,
    slots: int | None = None,
    guidance: float = 1.0,
    fixed: bool | None = None,
) -> list[NDArray[np.int32]]:
    """Sample motion tokens for texts until EOS or the limit.

    texts: text states, float (P_i, text width) each. keys: int64 (B,), the noise of each (prompt_keys).
    max_tokens, min_tokens: of all, or of each. slots: texts at a time, None for all; bounds the memory.
    guidance, fixed: see Engine. Returns the codes of each text without EOS, min_tokens to max_tokens of them.

    Raises:
        ScaMoError: as Engine and its submit.
    """
    count = len(texts)
    least = [min_tokens] * count if isinstance(min_tokens, int) else list(min_tokens)
    most = [max_tokens] * count if isinstance(max_tokens, int) else list(max_tokens)
    requests = [
        Request(text, key, high, low)
        for text, key, high, low in zip(texts, keys.tolist(), most, least, strict=True)
    ]
    if not requests:
        return []
    capacity = max(len(r.text) + r.max_tokens - 1 for r in requests)
    engine = Engine(
        model,
        sampling,
        slots=min(count, slots or count),
        capacity=max(1, min(capacity, model.config.max_positions)),
        guidance=guidance,
        fixed=fixed,
    )
    done = dict(collect(engine.run(requests)))
    return [done[ticket] for ticket in range(count)]
