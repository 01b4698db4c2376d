"""A small corpus and a tokenizer trained on it, shared by the tokenizer tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from scamo.config import TokenizerConfig, TokenizerRunConfig, TokenizerTrainingConfig
from scamo.data.dataset import Caption, DatasetWriter
from scamo.motion.features import joints_to_features
from scamo.motion.synthetic import generate_corpus
from scamo.tokenizers.train import train_tokenizer

SMALL = TokenizerRunConfig(
    TokenizerConfig(codebook_size=512, width=64, latent_width=64, depth=1),
    TokenizerTrainingConfig(
        steps=150,
        batch_size=16,
        window=32,
        learning_rate=2e-3,
        warmup_ratio=0.05,
        saturation_weight=0.1,
        validate_every=75,
        log_every=10,
    ),
)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """80 clips of the synthetic corpus as a dataset: 72 train, 4 val, 4 test."""
    folder = tmp_path_factory.mktemp("tokenizers") / "corpus"
    with DatasetWriter(folder) as writer:
        for clip in generate_corpus(80, seed=3):
            captions = [Caption(text) for text in clip.texts]
            writer.add_clip(clip.name, joints_to_features(clip.joints), clip.split, captions)
    return folder


@pytest.fixture(scope="session")
def small_config() -> TokenizerRunConfig:
    return SMALL


@pytest.fixture(scope="session")
def trained(corpus, tmp_path_factory) -> Path:
    """A tokenizer of a few seconds' training on `corpus`."""
    out = tmp_path_factory.mktemp("tokenizers") / "small"
    train_tokenizer(SMALL, corpus, out, device="cpu", threads=1, progress=False)
    return out
