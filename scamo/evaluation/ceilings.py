"""Ceilings of text-following: what motions of the corpus itself score on the prompts, as they are or after
a way through features or tokens and back. Below 99% the measure or the corpus is at fault, not a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from scamo.evaluation.text_following import PromptSet, evaluate
from scamo.motion.synthetic import Spec, completions, generate_clip


def corpus_motions(prompts: PromptSet, *, seed: int = 0) -> list[np.ndarray]:
    """One motion of the corpus per prompt, joints (T, 22, 3) float32 metres: what the sentence leaves open is
    drawn. No training clip has these seeds."""
    motions = []
    for index, prompt in enumerate(prompts.prompts):
        rng = np.random.default_rng((seed, index, 22))
        parts = []
        for part in prompt.spec:
            options = completions(Spec.from_list([part]))
            if len(prompt.spec) == 2:
                options = tuple(one for one in options if one.count != "3" and one.angle != "360") or options
            parts.append(options[int(rng.integers(len(options)))])
        motions.append(generate_clip(Spec.from_list([one.to_list()[0] for one in parts]), rng))
    return motions


def corpus_ceiling(
    prompts: PromptSet,
    *,
    transform: Callable[[np.ndarray], np.ndarray] | None = None,
    seed: int = 0,
    permutations: int = 1000,
) -> dict[str, Any]:
    """The report of `evaluate` on motions of the corpus, each sent through `transform` (joints -> joints)."""
    motions = corpus_motions(prompts, seed=seed)
    if transform is not None:
        motions = [transform(joints) for joints in motions]
    return evaluate(motions, prompts, permutations=permutations)


def through_features(joints: np.ndarray) -> np.ndarray:
    """Joints (T, 22, 3) to the 263 features and back: (T - 1, 22, 3)."""
    from scamo.motion.features import features_to_joints, joints_to_features

    return features_to_joints(joints_to_features(joints))
