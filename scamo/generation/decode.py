"""The decode loop: one step for all unfinished rows with a static key-value cache; finished rows leave."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scamo.errors import ScaMoError
from scamo.generation.sampling import Sampling, sample
from scamo.models.prefix_lm import PrefixLM


@torch.no_grad()
def generate_tokens(
    model: PrefixLM,
    texts: Sequence[Tensor],
    keys: Tensor,
    sampling: Sampling,
    *,
    max_tokens: int,
    min_tokens: int = 1,
) -> list[NDArray[np.int32]]:
    """Sample motion tokens for a batch of texts until EOS or the limit.

    texts: text states, float (P_i, text width) each. keys: int64 (B,), the noise of each (prompt_keys).
    EOS is forbidden before `min_tokens` tokens, so that no motion is empty (the released sampler returns code
    1 in that case). Returns the codes of each row without EOS, 1 to max_tokens of them.

    Raises:
        ScaMoError: an empty text, or limits outside 1 <= min_tokens <= max_tokens <= config.max_motion.
    """
    if not 1 <= min_tokens <= max_tokens <= model.config.max_motion:
        raise ScaMoError(
            f"min_tokens = {min_tokens}, max_tokens = {max_tokens}: "
            f"expected 1 <= min_tokens <= max_tokens <= {model.config.max_motion}"
        )
    eos = model.config.codes
    # The last token is never fed back, hence one position less.
    cache, logits = model.prefill(list(texts), max_tokens - 1)
    keys = keys.to(logits.device)
    rows = list(range(len(texts)))
    motions: list[list[int]] = [[] for _ in rows]
    for step in range(max_tokens):
        if step < min_tokens:
            logits[:, eos] = -torch.inf
        tokens = sample(logits, keys, step, sampling)
        chosen = tokens.tolist()
        alive = [i for i, token in enumerate(chosen) if token != eos]
        for i in alive:
            motions[rows[i]].append(chosen[i])
        if step + 1 == max_tokens or not alive:
            break
        if len(alive) < len(rows):
            cache, order = cache.compact(alive)
            rows = [rows[i] for i in order]
            index = torch.tensor(order, device=tokens.device)
            tokens, keys = tokens[index], keys[index]
        logits = model.decode(cache, tokens)
    return [np.array(motion, dtype=np.int32) for motion in motions]
