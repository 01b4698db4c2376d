"""The whole of evaluation on other features than HumanML3D's: tokenizer, evaluator, protocols, pictures."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from scamo.config import ModelConfig, TokenizerConfig, TokenizerRunConfig, TokenizerTrainingConfig
from scamo.data.dataset import Caption, DatasetWriter, MotionDataset
from scamo.data.text import encode_text
from scamo.errors import ScaMoError
from scamo.evaluation.demo import demo
from scamo.evaluation.evaluator import load_evaluator
from scamo.evaluation.items import item_frames
from scamo.evaluation.protocol import Settings, evaluate_run
from scamo.evaluation.run_text_following import run_text_following
from scamo.evaluation.train_evaluator import train_evaluator
from scamo.generation.export import export_model, identify
from scamo.models.prefix_lm import PrefixLM
from scamo.motion import measures
from scamo.motion.representation import KIT_ML, SMPL_272
from scamo.tokenizers.encode import encode_dataset
from scamo.tokenizers.evaluate import evaluate_tokenizer
from scamo.tokenizers.train import train_tokenizer

CLIPS = 60


def features_of(representation, clip):
    if representation is SMPL_272:
        return representation.from_joints(clip.joints[:90])
    rng = np.random.default_rng(len(clip.joints))
    features = rng.normal(size=(60, representation.feature_dim))
    features[:, representation.positions] *= 300  # millimetres
    return features.astype(np.float32)


@pytest.fixture(scope="module", params=[SMPL_272, KIT_ML], ids=lambda one: one.name)
def corpus(request, clips, text_encoder, tmp_path_factory):
    representation = request.param
    folder = tmp_path_factory.mktemp("other") / "corpus"
    with DatasetWriter(folder, feature_dim=representation.feature_dim, fps=representation.fps) as writer:
        for index, clip in enumerate(clips[:CLIPS]):
            split = "test" if index % 3 == 2 else "train"
            captions = [Caption(text) for text in clip.texts]
            writer.add_clip(f"{index:03d}", features_of(representation, clip), split, captions)
    encode_text(folder, text_encoder, device="cpu", progress=False)
    return folder


@pytest.fixture(scope="module")
def tokenizer(corpus):
    """Of a config that does not name the number of features."""
    config = TokenizerRunConfig(
        TokenizerConfig(levels=(5, 5), width=16, latent_width=8, depth=1),
        TokenizerTrainingConfig(steps=2, batch_size=4, window=16, extremity_weight=1, validate_every=2),
    )
    train_tokenizer(config, corpus, corpus.parent / "tokenizer", device="cpu", progress=False)
    return corpus.parent / "tokenizer"


@pytest.fixture(scope="module")
def run(corpus, tokenizer, text_encoder):
    config = ModelConfig(
        size="", layers=1, heads=2, width=16, codes=25, text_width=48, max_text=60, max_motion=8
    )
    torch.manual_seed(1)
    folder = corpus.parent / "run"
    folder.mkdir()
    export_model(folder / "export", PrefixLM(config).state_dict(), config, tokenizer, str(text_encoder))
    text = json.dumps({"data": {"dataset": str(corpus)}})
    (folder / "config.json").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def evaluator(corpus, evaluator_config):
    training = replace(evaluator_config.training, steps=2, batch_size=16, validate_every=2)
    config = replace(evaluator_config, training=training)
    train_evaluator(config, [corpus], corpus.parent / "evaluator", device="cpu", progress=False)
    return corpus.parent / "evaluator"


def test_tokenizer_and_its_numbers_are_of_the_dataset(corpus, tokenizer):
    dataset = MotionDataset.open(corpus)
    stored = json.loads((tokenizer / "config.json").read_text())["tokenizer"]
    assert stored["feature_dim"] == dataset.feature_dim
    report = evaluate_tokenizer(tokenizer, corpus, split="test", device="cpu", progress=False)
    assert report["tokens_per_second"] == dataset.fps / 4
    assert 0 < report["mpjpe_mm"] < 5000
    encode_dataset(tokenizer, corpus, device="cpu", progress=False)
    tokens = MotionDataset.open(corpus).tokens()
    assert tokens.lengths.tolist() == [int(n) // 4 for n in dataset.item_lengths]


def test_an_evaluator_takes_width_rate_and_longest_motion_from_the_dataset(corpus, evaluator):
    dataset, judge = MotionDataset.open(corpus), load_evaluator(evaluator)
    assert (judge.feature_dim, judge.fps) == (dataset.feature_dim, dataset.fps)
    assert judge.max_frames == {272: 296, 251: 196}[dataset.feature_dim]


def test_items_are_as_long_in_seconds_at_another_rate(tmp_path):
    for representation in (SMPL_272, KIT_ML):
        for factor in (1, 2):
            folder = tmp_path / f"{representation.feature_dim}-{factor}"
            options = {"feature_dim": representation.feature_dim, "fps": factor * representation.fps}
            with DatasetWriter(folder, **options) as writer:
                clip = np.ones((9, representation.feature_dim), np.float32)
                writer.add_clip("clip", clip, "train", [Caption("stands")])
            frames = tuple(factor * frames for frames in representation.item_frames)
            assert item_frames(MotionDataset.open(folder)) == frames


@pytest.mark.parametrize("protocol", ["humanml3d", "strict"])
def test_all_rows_have_measures_of_motion(corpus, run, evaluator, protocol):
    settings = Settings(protocol, repeats=1, pool=4, cosine_pool=8, pairs=4, mm_texts=0)
    report = evaluate_run(run, evaluator, settings=settings, device="cpu", progress=False)
    assert report["model_sha256"] == identify(run)["sha256"]
    rows = {row["name"]: row["metrics"] for row in report["rows"]}
    assert list(rows) == ["real", "reconstruction", "generated"]
    for metrics in rows.values():
        assert {"fid", "foot_skate", "jerk", "bone_drift"} <= set(metrics)
    assert rows["reconstruction"]["mpjpe_mm"]["value"] > 0
    if protocol == "strict":
        dataset = MotionDataset.open(corpus)
        representation = KIT_ML if dataset.feature_dim == 251 else SMPL_272
        motions = [dataset.item_features(int(item)) for item in dataset.items("test")]
        joints = [representation.to_joints(motion[: len(motion) // 4 * 4]) for motion in motions]
        expected = np.mean([measures.jerk(one, dataset.fps) for one in joints])
        assert rows["real"]["jerk"]["value"] == pytest.approx(expected, rel=1e-6)


def test_the_nearest_training_window_is_found(corpus, run, tmp_path):
    rows = demo(run, tmp_path, dataset=corpus, split="train", count=2, device="cpu")
    assert all(row["real_nearest_mm"] < 1e-2 < row["nearest_mm"] for row in rows)
    assert (tmp_path / "motions.png").stat().st_size > 1000


def test_text_following_refuses_other_features_by_name(run):
    with pytest.raises(ScaMoError, match=r"features at .*; text-following is measured on HumanML3D's 263"):
        run_text_following(run, device="cpu")
