"""Ceilings of text-following: what motions of the corpus itself score on the prompts, as they are or after
a way through features or tokens and back. Below 99% the measure or the corpus is at fault, not a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from scamo.evaluation.text_following import GROUPS, PromptSet, evaluate, follows
from scamo.motion.synthetic import Spec, completions, generate_clip

if TYPE_CHECKING:
    from scamo.tokenizers.autoencoder import MotionAutoencoder


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


def through_tokenizer(tokenizer: MotionAutoencoder) -> Callable[[np.ndarray], np.ndarray]:
    """A transform: joints to features to tokens and back; frames past a whole token are cut."""
    from scamo.motion.features import features_to_joints, joints_to_features
    from scamo.tokenizers.encode import decode_tokens, encode_motions

    def transform(joints: np.ndarray) -> np.ndarray:
        tokens = encode_motions(tokenizer, [joints_to_features(joints)])
        return features_to_joints(decode_tokens(tokenizer, tokens)[0])

    return transform


def ceilings(
    prompts: PromptSet, tokenizer: MotionAutoencoder, *, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Exact text-following of corpus motions: as they are, through features, and through the tokenizer.

    Returns {"corpus" | "features" | "tokenizer": {"all" | group: share}}; a model is not asked for more.
    """
    motions = corpus_motions(prompts, seed=seed)
    transforms: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "corpus": lambda joints: joints,
        "features": through_features,
        "tokenizer": through_tokenizer(tokenizer),
    }
    groups = np.array([prompt.group for prompt in prompts.prompts])
    report = {}
    for name, transform in transforms.items():
        right = np.array(
            [follows(transform(m), p.spec) for m, p in zip(motions, prompts.prompts, strict=True)], dtype=bool
        )
        report[name] = {"all": float(right.mean())} | {
            group: float(right[groups == group].mean()) for group in GROUPS if (groups == group).any()
        }
    return report
