"""A small corpus with text states, an evaluator of it and a tokenizer, shared by the tests of studies."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from scamo.config import EvaluatorConfig, EvaluatorRunConfig, EvaluatorTrainingConfig, TokenizerConfig
from scamo.data.dataset import Caption, DatasetWriter, MotionDataset
from scamo.data.text import encode_text
from scamo.evaluation.text_following import load_prompts
from scamo.evaluation.train_evaluator import train_evaluator
from scamo.motion.features import joints_to_features
from scamo.motion.synthetic import generate_corpus
from scamo.tokenizers.autoencoder import FSQAutoencoder

SPLITS = ("train", "train", "train", "val", "test", "test")  # of each six clips in a row
TEXT_WIDTH = 16


@pytest.fixture(scope="session")
def studied(tmp_path_factory) -> Path:
    """Folders corpus (72 clips: 36 train, 12 val, 24 test), encoder, evaluator and fsq (not trained)."""
    folder = tmp_path_factory.mktemp("studies")
    clips = list(generate_corpus(72, seed=5))
    texts = [clip.texts[0] for clip in clips]
    known = texts + [prompt.text for prompt in load_prompts().prompts]
    words = sorted({word for text in known for word in text.split()})
    torch.manual_seed(0)
    bert = transformers.BertConfig(
        vocab_size=len(words) + 3, hidden_size=TEXT_WIDTH, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=64,
    )  # fmt: skip
    transformers.BertModel(bert).save_pretrained(folder / "encoder")
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder / "encoder")
    with DatasetWriter(folder / "corpus") as writer:
        for index, (clip, text) in enumerate(zip(clips, texts, strict=True)):
            features = joints_to_features(clip.joints)
            writer.add_clip(f"{index:06d}", features, SPLITS[index % 6], [Caption(text)])
    encode_text(folder / "corpus", folder / "encoder", device="cpu", progress=False)
    config = EvaluatorRunConfig(
        EvaluatorConfig(width=16, embedding=8, layers=1),
        EvaluatorTrainingConfig(steps=20, batch_size=24, validate_every=20),
    )
    train_evaluator(config, [folder / "corpus"], folder / "evaluator", device="cpu", progress=False)
    data = MotionDataset.open(folder / "corpus")
    small = TokenizerConfig(levels=(5, 5), width=8, latent_width=8, depth=1)
    FSQAutoencoder(small, data.mean, data.std).save(folder / "fsq")
    return folder
