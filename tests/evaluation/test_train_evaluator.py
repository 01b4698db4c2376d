"""Training of an evaluator: it learns what goes together, and the same run gives the same bits."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import hypergeom

from scamo.config import EvaluatorConfig, EvaluatorTrainingConfig, load_config
from scamo.config import EvaluatorRunConfig as RunConfig
from scamo.data.dataset import Caption, DatasetWriter, MotionDataset
from scamo.data.text import encode_text
from scamo.errors import ScaMoError
from scamo.evaluation.evaluator import load_evaluator
from scamo.evaluation.items import draw_strict, source_clips
from scamo.evaluation.metrics import expected_r_precision
from scamo.evaluation.train_evaluator import (
    Pairs,
    contrastive_loss,
    learning_rate,
    same_texts,
    train_evaluator,
)


def r_precision(folder, corpus, split):
    evaluator, dataset = load_evaluator(folder), MotionDataset.open(corpus)
    draw = draw_strict(dataset, dataset.items(split), 0)
    return expected_r_precision(
        evaluator.embed_captions(dataset, draw.captions.tolist()),
        evaluator.embed_motions(draw.features(dataset)),
        groups=source_clips(dataset, draw.items),
    ).mean(axis=0)


def test_it_finds_held_out_motions_by_their_sentences(evaluator, corpus):
    shares = r_precision(evaluator, corpus, "test")
    assert shares[2] > 3 * 3 / 32, shares


def test_the_validation_in_the_folder_is_what_the_weights_give(evaluator, corpus):
    report = json.loads((evaluator / "config.json").read_text())["provenance"]["validation"]
    assert report["items"] == 40
    assert report["chance"] == [k / 32 for k in (1, 2, 3)]
    evaluator, dataset = load_evaluator(evaluator), MotionDataset.open(corpus)
    items = dataset.items("val")
    shares = []
    for turn in range(3):
        draw = draw_strict(dataset, items, turn)
        texts = evaluator.embed_captions(dataset, draw.captions.tolist())
        points = evaluator.embed_motions(draw.features(dataset))
        distance = np.linalg.norm(texts[:, None] - points[None], axis=-1)
        closer = (distance < np.diagonal(distance)[:, None]).sum(1)
        shares.append([hypergeom.cdf(k - 1, 39, closer, 31).mean() for k in (1, 2, 3)])
    np.testing.assert_allclose(report["r_precision"], np.mean(shares, axis=0), atol=1e-6)


def test_the_same_run_gives_the_same_bits(corpus, evaluator_config, tmp_path):
    config = replace(evaluator_config, training=replace(evaluator_config.training, steps=4))
    reports = [
        train_evaluator(config, [corpus], tmp_path / name, device="cpu", progress=False) for name in "ab"
    ]
    assert reports[0] == reports[1]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]
    other = replace(config, training=replace(config.training, seed=1))
    assert train_evaluator(other, [corpus], tmp_path / "c", device="cpu", progress=False) != reports[0]


def test_batches_are_pairs_of_the_train_split(corpus, evaluator_config):
    dataset = MotionDataset.open(corpus)
    pairs = Pairs([dataset], "", replace(evaluator_config.training, drop_pieces=0.0))
    store = dataset.text_states()
    train = dataset.items("train").tolist()
    motions, states = pairs.batch(5)
    again, _ = pairs.batch(5)
    assert all(np.array_equal(a, b) for a, b in zip(motions, again, strict=True))
    seen = set()
    for motion, state in zip(motions, states, strict=True):
        owners = [
            item
            for item in train
            if any(np.array_equal(store[int(c)], state) for c in dataset.captions_of(item))
        ]
        found = [
            item
            for item in owners
            for first in range(len(dataset.item_features(item)) - len(motion) + 1)
            if np.array_equal(dataset.item_features(item)[first : first + len(motion)], motion)
        ]
        assert found
        assert len(motion) >= int(0.6 * dataset.item_lengths[found[0]])
        seen.add(found[0])
    assert len(seen) == len(motions) == 48


def test_the_loss_against_a_loop():
    generator = torch.Generator().manual_seed(0)
    motion, text = (torch.randn(6, 5, generator=generator).double() for _ in range(2))
    same = torch.eye(6, dtype=torch.bool)
    same[1, 4] = same[4, 1] = True
    total = 0.0
    for i in range(6):
        rivals = [j for j in range(6) if j == i or not same[i, j]]
        for own, other in ((motion, text), (text, motion)):
            scores = [3.0 * float(own[i] @ other[j]) for j in rivals]
            total += math.log(sum(math.exp(s) for s in scores)) - 3.0 * float(own[i] @ other[i])
    loss = contrastive_loss(motion, text, torch.tensor(3.0).double(), same)
    assert float(loss) == pytest.approx(total / 12, rel=1e-12)


@pytest.mark.parametrize("common", [0.0, 50.0])
def test_equal_texts_are_no_negatives(common):
    """Also when all states share one large direction, as those of many encoders do."""
    states = torch.zeros(3, 4, 8)
    states[0, :2] = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    states[1, :2] = states[0, :2].flip(0)  # another order of the same pieces
    states[2, :4] = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    pieces = torch.tensor([2, 2, 4])
    states += common * (torch.arange(4) < pieces[:, None])[..., None]
    same = same_texts(states, pieces, 0.99)
    assert same.tolist() == [[True, True, False], [True, True, False], [False, False, True]]


def test_learning_rate():
    config = EvaluatorTrainingConfig(steps=100, warmup_ratio=0.1, learning_rate=1.0)
    rates = [learning_rate(config, step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[10] == 1
    assert np.all(np.diff(rates[10:]) < 0)
    assert 0 < rates[-1] < 0.001


def test_several_datasets_train_together(corpus, clips, text_encoder, evaluator_config, tmp_path):
    source = MotionDataset.open(corpus)
    with DatasetWriter(tmp_path / "more") as writer:
        for i in range(10):
            writer.add_clip(str(i), source.clip_features(i), "train", [Caption(clips[i].texts[0])])
    encode_text(tmp_path / "more", text_encoder, device="cpu", progress=False)
    config = replace(evaluator_config, training=replace(evaluator_config.training, steps=2))
    train_evaluator(config, [corpus, tmp_path / "more"], tmp_path / "e", device="cpu", progress=False)
    provenance = json.loads((tmp_path / "e/config.json").read_text())["provenance"]
    assert [one["name"] for one in provenance["datasets"]] == ["corpus", "more"]
    assert provenance["items"] == 130


def test_without_a_val_split_the_last_step_is_kept(clips, corpus, text_encoder, evaluator_config, tmp_path):
    source = MotionDataset.open(corpus)
    with DatasetWriter(tmp_path / "data") as writer:
        for i in range(8):
            writer.add_clip(str(i), source.clip_features(i), "train", [Caption(clips[i].texts[0])])
    encode_text(tmp_path / "data", text_encoder, device="cpu", progress=False)
    config = replace(evaluator_config, training=replace(evaluator_config.training, steps=5, validate_every=2))
    report = train_evaluator(config, [tmp_path / "data"], tmp_path / "e", device="cpu", progress=False)
    assert report.keys() == {"step", "loss"}
    assert report["step"] == 5


def test_bad_input_is_named_and_leaves_nothing(corpus, text_encoder, evaluator_config, tmp_path):
    def train(config=evaluator_config, datasets=(corpus,), **options):
        train_evaluator(config, datasets, tmp_path / "out", device="cpu", progress=False, **options)

    source = MotionDataset.open(corpus)

    def write(name, split="train", fps=20.0):
        with DatasetWriter(tmp_path / name, fps=fps, statistics=(source.mean, source.std)) as writer:
            for i in range(3):
                writer.add_clip(str(i), source.clip_features(i), split, [Caption("walks")])
        return tmp_path / name

    with pytest.raises(ScaMoError, match="no dataset to train on"):
        train(datasets=())
    with pytest.raises(ScaMoError, match="bare: has no text states yet: run `scamo encode-text`"):
        train(datasets=[write("bare")])
    with pytest.raises(ScaMoError, match="has no text states 'flan'"):
        train(text="flan")
    slow = write("slow", fps=12.5)
    encode_text(slow, text_encoder, device="cpu", progress=False)
    with pytest.raises(ScaMoError, match=r"slow: fps 12\.5, .*corpus has 20"):
        train(datasets=[corpus, slow])
    test_only = write("test_only", split="test")
    encode_text(test_only, text_encoder, device="cpu", progress=False)
    with pytest.raises(ScaMoError, match="test_only: 0 items in the train split"):
        train(datasets=[test_only])
    with pytest.raises(ScaMoError, match=r"evaluator\.feature_dim = 251: .* has 263"):
        train(RunConfig(EvaluatorConfig(feature_dim=251)))
    nan = replace(evaluator_config, training=replace(evaluator_config.training, learning_rate=1e30))
    with pytest.raises(ScaMoError, match="loss is not finite at step"):
        train(nan)
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    with pytest.raises(ScaMoError, match="out exists"):
        train()


@pytest.mark.parametrize("name", ["full", "narrow"])
def test_the_configurations_load(name):
    from pathlib import Path

    root = Path(__file__).resolve().parents[2]
    config = load_config(RunConfig, root / f"configs/evaluator_{name}.toml")
    assert config.training.steps % config.training.validate_every == 0
