"""Training of the multi-scale tokenizer: what is drawn, minimised, written and measured."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from scamo.config import load_config
from scamo.data.dataset import Caption, DatasetWriter, MotionDataset
from scamo.errors import ScaMoError
from scamo.motion.measures import mpjpe
from scamo.motion.representation import HUMANML3D
from scamo.tokenizers.multiscale import MultiscaleConfig, MultiscaleTokenizer
from scamo.tokenizers.train_multiscale import (
    Motions,
    MultiscaleRunConfig,
    MultiscaleTrainingConfig,
    evaluate_multiscale,
    loss_weights,
    masked_loss,
    multiscale_metrics,
    scale_latents,
    train_multiscale,
)

ROOT = Path(__file__).resolve().parents[2]
TINY = MultiscaleRunConfig(
    MultiscaleConfig(
        width=32, blocks=1, dropout=0.1, max_frames=64, scales=((1, 1), (4, 3), (16, 5), (16, 7))
    ),
    MultiscaleTrainingConfig(
        steps=40,
        batch_size=8,
        frames=32,
        learning_rate=5e-3,
        schedule="cosine",
        warmup_ratio=0.1,
        decay=0.1,
        latent_norm=1.5,
        scale_dropout=0.1,
        feature_weight=0.2,
        position_weight=3.0,
        velocity_weight=0.0,
        bitwise_weight=0.5,
        validate_every=20,
        log_every=10,
    ),
)


def short(config=TINY, **changes):
    return replace(config, training=replace(config.training, **changes))


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("multiscale") / "tiny"
    report = train_multiscale(TINY, corpus, out, device="cpu", threads=1, progress=False)
    return out, report


def test_batches_are_a_function_of_seed_and_step(tmp_path):
    rng = np.random.default_rng(0)
    with DatasetWriter(tmp_path / "set", feature_dim=3) as writer:
        for clip, (length, split) in enumerate([(20, "train"), (9, "train"), (31, "val"), (12, "train")]):
            x = rng.normal(size=(length, 3)).astype(np.float32)
            x[:, 0], x[:, 1] = clip, np.arange(length)
            writer.add_clip(f"c{clip}", x, split, [Caption("moves")])
    dataset = MotionDataset.open(tmp_path / "set")
    motions = Motions(dataset, "train", frames=12, batch_size=300, seed=5)
    drawn = motions.draw(3)
    np.testing.assert_array_equal(Motions(dataset, "train", frames=12, batch_size=300, seed=5).draw(3), drawn)
    assert (motions.draw(4) != drawn).any()
    assert set(drawn[:, 0]) == {0, 1, 3}
    assert set(drawn[drawn[:, 0] == 0, 1]) == set(range(9))
    assert {tuple(row) for row in drawn[drawn[:, 0] != 0]} == {(1, 0, 9), (3, 0, 12)}
    features, lengths = motions.batch(3)
    assert features.shape == (300, 12, 3)
    for row, length, (clip, first, frames) in zip(features.numpy(), lengths.tolist(), drawn, strict=True):
        assert length == frames
        assert (row[:length, 0] == clip).all()
        np.testing.assert_array_equal(row[:length, 1], np.arange(first, first + length))
        assert (row[length:] == 0).all()
    with pytest.raises(ScaMoError, match="no clips in the split test"):
        Motions(dataset, "test", frames=12, batch_size=1, seed=0)


def test_loss_is_the_released_one():
    true, made = torch.randn(2, 8, 263), torch.randn(2, 8, 263) * 2
    true[1, 5:] = made[1, 5:] = torch.nan
    weights = loss_weights(MultiscaleTrainingConfig(), 263)
    a, b = (torch.cat([x[0], x[1, :5]]) for x in (made, true))
    expected = F.smooth_l1_loss(a, b) + 0.5 * F.smooth_l1_loss(a[:, :4], b[:, :4])
    expected = expected + 0.5 * F.smooth_l1_loss(a[:, 193:259], b[:, 193:259])
    torch.testing.assert_close(masked_loss(made, true, torch.tensor([8, 5]), weights), expected)


def test_schedule_is_the_released_one():
    config = MultiscaleTrainingConfig(steps=300_000, warmup_ratio=2000 / 300_000)
    assert config.rate(999) == pytest.approx(1e-4, rel=0.001)
    assert config.rate(2000) == config.rate(149_999) == 2e-4
    assert config.rate(150_000) == config.rate(249_999) == pytest.approx(6e-5)
    assert config.rate(250_000) == pytest.approx(1.8e-5)
    cosine = MultiscaleTrainingConfig(steps=100, schedule="cosine", decay=0.1, warmup_ratio=0.0)
    assert cosine.rate(0) == 2e-4
    assert cosine.rate(100) == pytest.approx(2e-5)


def test_latents_are_scaled():
    torch.manual_seed(0)
    model = MultiscaleTokenizer(MultiscaleConfig(width=8, blocks=1)).eval()
    x, lengths = torch.randn(4, 60, 263), torch.tensor([60, 60, 31, 10])
    scale_latents(model, x, lengths, 2.0)
    z = model.latents(x, lengths)
    real = torch.cat([row[: -(-length // 4)] for row, length in zip(z, lengths.tolist(), strict=True)])
    torch.testing.assert_close(real.mean((0, 1)), torch.zeros(24), rtol=0, atol=1e-5)
    torch.testing.assert_close(real.square().sum(-1).mean().sqrt(), torch.tensor(2.0))


def test_a_tiny_training_learns_and_writes_a_tokenizer(trained, corpus):
    out, report = trained
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < 0.8 * losses[0]
    assert [line["step"] for line in lines if "validation" in line] == [20, 40]
    description = json.loads((out / "config.json").read_text())
    assert description["provenance"]["step"] == 40
    assert description["provenance"]["finished"] is True
    assert not out.with_name("tiny.unfinished").exists()
    tokenizer, dataset = MultiscaleTokenizer.load(out), MotionDataset.open(corpus)
    assert tokenizer.config == replace(TINY.tokenizer, feature_dim=263)
    np.testing.assert_array_equal(tokenizer.mean, dataset.mean)
    assert report["motions"] == 4
    assert 0 < report["bit_entropy"] <= 1


def test_same_seed_same_bits(corpus, trained, tmp_path):
    again = train_multiscale(TINY, corpus, tmp_path / "a", device="cpu", threads=1, progress=False)
    assert again == trained[1]
    first, second = (MultiscaleTokenizer.load(folder).state_dict() for folder in (trained[0], tmp_path / "a"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_metrics(trained, corpus):
    """Against a loop over the motions one by one, frames past whole latents and max_frames cut."""
    tokenizer, dataset = MultiscaleTokenizer.load(trained[0]), MotionDataset.open(corpus)
    motions = [dataset.item_features(int(item)) for item in dataset.items("val")]
    motions = [motions[0], motions[1][:41], motions[2][:3], motions[3]]
    lengths = [len(motion) for motion in motions]
    found = multiscale_metrics(tokenizer, motions, lengths, fps=20)
    kept = [min(length, 64) // 4 * 4 for length in lengths]
    assert (found["motions"], found["frames"], found["too_short"]) == (3, sum(kept), 1)
    assert found["too_long"] == sum(length > 64 for length in lengths)
    l1 = error = 0.0
    for scales in (4, 2):
        l1 = error = 0.0
        for motion, frames in zip(motions, kept, strict=True):
            if frames:
                x, length = torch.from_numpy(motion[:frames].copy())[None], torch.tensor([frames])
                with torch.no_grad():
                    made = tokenizer.decode(tokenizer.encode(x), length, scales=scales)
                l1 += frames * float(((made - x) / tokenizer.std).abs().mean())
                true = HUMANML3D.to_joints(x.double())
                error += frames * mpjpe(HUMANML3D.to_joints(made.double()), true)
        got = multiscale_metrics(tokenizer, motions, lengths, fps=20, scales=scales)
        assert got["l1"] == pytest.approx(l1 / sum(kept), rel=1e-5)
        assert got["mpjpe_mm"] == pytest.approx(error / sum(kept), rel=1e-5)
    assert found["tokens"] == sum(int(tokenizer.valid(torch.tensor([n])).sum()) for n in kept if n)
    with pytest.raises(ScaMoError, match="none of the 1 motions has the 4 frames of a latent"):
        multiscale_metrics(tokenizer, motions[2:3], lengths[2:3], fps=20)


def test_evaluation_of_a_folder(trained, corpus):
    found = evaluate_multiscale(trained[0], corpus, device="cpu")
    assert {key: found[key] for key in trained[1] if key != "loss"} == {
        key: value for key, value in trained[1].items() if key != "loss"
    }
    assert (found["split"], found["scales"]) == ("val", 4)
    # All 4 motions have 64 frames and more: 1 + 12 + 80 + 112 tokens each.
    assert found["bits_per_second"] == pytest.approx(24 * 205 / (64 / 20))
    coarse = evaluate_multiscale(trained[0], corpus, device="cpu", scales=1)
    assert coarse["scales"] == 1
    assert coarse["l1"] != found["l1"]
    with pytest.raises(ScaMoError, match="scales = 5: expected 1 to 4"):
        evaluate_multiscale(trained[0], corpus, device="cpu", scales=5)


@pytest.mark.parametrize(("name", "width"), [("multiscale_full", 384), ("multiscale_narrow", 64)])
def test_checked_in_configs(name, width):
    config = load_config(MultiscaleRunConfig, ROOT / f"configs/{name}.toml")
    assert (config.tokenizer.width, config.tokenizer.tokens) == (width, 864)
    if name == "multiscale_full":
        defaults = MultiscaleTrainingConfig()
        close = {"warmup_ratio": 1 / 150, "milestones": (0.5, 5 / 6)}
        assert config.tokenizer == MultiscaleConfig()
        for key, value in close.items():
            assert getattr(config.training, key) == pytest.approx(value, rel=1e-3)
        assert replace(config.training, **close) == defaults


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "steps = 0: expected a value above 0"),
        ({"schedule": "linear"}, "schedule = 'linear': expected step or cosine"),
        ({"scale_dropout": 1.5}, r"scale_dropout = 1.5: expected a probability in \[0, 1\]"),
        ({"frames": -1}, "frames = -1: expected 0 or more"),
    ],
)
def test_recipe_errors(values, message):
    with pytest.raises(ScaMoError, match=message):
        MultiscaleTrainingConfig(**values)


def test_training_errors(corpus, tmp_path):
    wide = replace(TINY, tokenizer=replace(TINY.tokenizer, feature_dim=296))
    with pytest.raises(ScaMoError, match="263 features a frame, the config has tokenizer.feature_dim = 296"):
        train_multiscale(wide, corpus, tmp_path / "a", device="cpu", progress=False)
    with pytest.raises(ScaMoError, match="loss is not finite between steps .* lower training.learning_rate"):
        train_multiscale(
            short(learning_rate=1e30, clip_norm=0.0), corpus, tmp_path / "a", device="cpu", progress=False
        )
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a").mkdir()
    with pytest.raises(ScaMoError, match="a exists: choose another name"):
        train_multiscale(TINY, corpus, tmp_path / "a", device="cpu", progress=False)


@pytest.mark.gpu
def test_trains_on_a_gpu(corpus, tmp_path):
    report = train_multiscale(
        short(steps=8, precision="bfloat16"), corpus, tmp_path / "a", device="cuda", progress=False
    )
    assert np.isfinite(report["loss"])
    assert MultiscaleTokenizer.load(tmp_path / "a", "cuda").mean.is_cuda
