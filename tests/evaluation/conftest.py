"""A small corpus with text states, an evaluator trained on it and an exported model, shared by the tests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from scamo.config import (
    EvaluatorConfig,
    EvaluatorRunConfig,
    EvaluatorTrainingConfig,
    ModelConfig,
    TokenizerConfig,
)
from scamo.data.dataset import Caption, DatasetWriter, MotionDataset
from scamo.data.text import encode_text
from scamo.evaluation.train_evaluator import train_evaluator
from scamo.generation.export import export_model
from scamo.models.prefix_lm import PrefixLM
from scamo.motion.features import joints_to_features
from scamo.motion.synthetic import generate_corpus
from scamo.tokenizers.autoencoder import FSQAutoencoder

SPLITS = ("train", "train", "train", "val", "test", "test")  # of each six clips in a row


@pytest.fixture(scope="session")
def clips():
    return list(generate_corpus(240, seed=11))


@pytest.fixture(scope="session")
def text_encoder(clips, tmp_path_factory) -> Path:
    """A BERT of one layer that knows the words of the corpus, wherever they stand in a sentence."""
    words = sorted({word for clip in clips for text in clip.texts for word in text.split()})
    vocabulary = ["<pad>", "</s>", "<unk>", *words]
    folder = tmp_path_factory.mktemp("evaluation") / "encoder"
    torch.manual_seed(0)
    bert = transformers.BertConfig(
        vocab_size=len(vocabulary), hidden_size=48, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=48, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.BertModel(bert)
    model.embeddings.position_embeddings.weight.data.zero_()
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def corpus(clips, text_encoder, tmp_path_factory) -> Path:
    """240 clips with their captions: 120 train, 40 val, 80 test; with text states."""
    folder = tmp_path_factory.mktemp("evaluation") / "corpus"
    with DatasetWriter(folder) as writer:
        for index, clip in enumerate(clips):
            captions = [Caption(text) for text in clip.texts]
            writer.add_clip(f"{index:06d}", joints_to_features(clip.joints), SPLITS[index % 6], captions)
    encode_text(folder, text_encoder, device="cpu", progress=False)
    return folder


@pytest.fixture(scope="session")
def evaluator_config() -> EvaluatorRunConfig:
    return EvaluatorRunConfig(
        EvaluatorConfig(width=32, embedding=16, layers=2),
        EvaluatorTrainingConfig(steps=100, batch_size=48, learning_rate=3e-3, validate_every=50),
    )


@pytest.fixture(scope="session")
def evaluator(corpus, evaluator_config, tmp_path_factory) -> Path:
    """An evaluator of a few seconds' training."""
    out = tmp_path_factory.mktemp("evaluation") / "evaluator"
    train_evaluator(evaluator_config, [corpus], out, device="cpu", progress=False)
    return out


@pytest.fixture(scope="session")
def tokenizer(corpus, tmp_path_factory) -> Path:
    torch.manual_seed(2)
    dataset = MotionDataset.open(corpus)
    folder = tmp_path_factory.mktemp("evaluation") / "tokenizer"
    config = TokenizerConfig(levels=(5, 5), width=16, latent_width=8, depth=1)
    FSQAutoencoder(config, dataset.mean, dataset.std).save(folder)
    return folder


@pytest.fixture(scope="session")
def make_run(corpus, text_encoder, tokenizer, tmp_path_factory):
    """A run's folder as training leaves it, with a small random model."""

    def make(seed: int = 1) -> Path:
        run = tmp_path_factory.mktemp("evaluation") / "run"
        run.mkdir()
        config = ModelConfig(
            size="", layers=1, heads=2, width=16, codes=25, text_width=48, max_text=60, max_motion=8
        )
        torch.manual_seed(seed)
        export_model(run / "export", PrefixLM(config).state_dict(), config, tokenizer, str(text_encoder))
        text = json.dumps({"data": {"dataset": str(corpus)}})
        (run / "config.json").write_text(text, encoding="utf-8")
        return run

    return make
