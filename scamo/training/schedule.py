"""The learning rate as a pure function of the step: nothing to save, nothing that a skip could shift."""

from __future__ import annotations

import math

from scamo.config import TrainingConfig


def learning_rate(step: int, config: TrainingConfig) -> float:
    """Rate of update `step` (0 is the first): linear warm-up, then a cosine (paper Tab. 4).

    With W = ceil(warmup_ratio * steps): base (step + 1) / W for step < W, then
    min + (base - min) (1 + cos(pi (step - W) / (steps - W))) / 2; from `steps` on it stays at min.
    """
    base, lowest = config.learning_rate, config.min_learning_rate
    warmup = math.ceil(config.warmup_ratio * config.steps)
    if step < warmup:
        return base * (step + 1) / warmup
    if step >= config.steps:
        return lowest
    progress = (step - warmup) / (config.steps - warmup)
    return lowest + (base - lowest) * (1 + math.cos(math.pi * progress)) / 2
