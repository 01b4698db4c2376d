"""Training: what is drawn, what is minimised, what is written, and what stops it."""

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scamo_kernels import fsq_quantize
from scamo_kernels.reference import fsq_bound

from scamo import cli
from scamo.config import (
    FSQ_LEVELS,
    TokenizerConfig,
    TokenizerRunConfig,
    TokenizerTrainingConfig,
    load_config,
)
from scamo.data.dataset import Caption, DatasetWriter, MotionDataset
from scamo.errors import ScaMoError
from scamo.tokenizers import load_tokenizer
from scamo.tokenizers.autoencoder import FSQAutoencoder
from scamo.tokenizers.fsq import FSQ
from scamo.tokenizers.train import (
    SATURATED,
    Windows,
    feature_weights,
    learning_rate,
    reconstruction_loss,
    saturation,
    spread_latents,
    train_tokenizer,
    use_bfloat16,
)

ROOT = Path(__file__).resolve().parents[2]


def write_clips(folder, lengths, *, width=3, splits=None, value=None):
    """Clips whose feature 0 is the clip and feature 1 the frame."""
    rng = np.random.default_rng(0)
    with DatasetWriter(folder, feature_dim=width) as writer:
        for clip, length in enumerate(lengths):
            x = rng.normal(size=(length, width)).astype(np.float32)
            if value is not None:
                x[:] = value
            else:
                x[:, 0], x[:, 1] = clip, np.arange(length)
            split = "train" if splits is None else splits[clip]
            writer.add_clip(f"c{clip}", x, split, [Caption("moves")])
    return MotionDataset.open(folder)


def short(config, **changes):
    return dataclasses.replace(config, training=dataclasses.replace(config.training, **changes))


def test_windows_are_a_function_of_seed_and_step(tmp_path):
    dataset = write_clips(tmp_path / "set", [20, 8, 7, 31], splits=["train", "train", "train", "val"])
    windows = Windows(dataset, "train", window=8, batch_size=16, seed=5)
    assert (windows.clips, windows.skipped, windows.windows) == (2, 1, 14)
    later = windows.draw(3)
    other = Windows(dataset, "train", window=8, batch_size=16, seed=5)
    np.testing.assert_array_equal(other.draw(3), later)  # without steps 0-2 before it
    assert (other.draw(4) != later).any()
    assert (Windows(dataset, "train", window=8, batch_size=16, seed=6).draw(3) != later).any()

    batch = windows.batch(3)
    assert batch.shape == (16, 8, 3)
    for (clip, first), window in zip(later, batch.numpy(), strict=True):
        assert (window[:, 0] == clip).all()
        np.testing.assert_array_equal(window[:, 1], np.arange(first, first + 8))


def test_every_window_is_as_likely(tmp_path):
    dataset = write_clips(tmp_path / "set", [20, 8, 7, 10])
    windows = Windows(dataset, "train", window=8, batch_size=4000, seed=0)
    drawn, counts = np.unique(windows.draw(0), axis=0, return_counts=True)
    expected = [(0, first) for first in range(13)] + [(1, 0)] + [(3, first) for first in range(3)]
    assert [tuple(row) for row in drawn] == expected
    share = 4000 / 17
    assert np.abs(counts - share).max() < 5 * np.sqrt(share)


def test_no_clip_is_as_long_as_a_window(tmp_path):
    dataset = write_clips(tmp_path / "set", [20, 31])
    with pytest.raises(ScaMoError, match=r"no clip of the split train has the 32 frames .* of 2 has 31"):
        Windows(dataset, "train", window=32, batch_size=1, seed=0)


def test_loss_is_the_released_one():
    true, made = torch.randn(2, 8, 263), torch.randn(2, 8, 263) * 2
    weights = feature_weights(TokenizerTrainingConfig(), 263)
    expected = F.smooth_l1_loss(made, true) + 0.5 * F.smooth_l1_loss(made[..., 4:67], true[..., 4:67])
    torch.testing.assert_close(reconstruction_loss(made, true, weights), expected)
    weights = feature_weights(TokenizerTrainingConfig(position_weight=0, root_weight=2), 263)
    expected = F.smooth_l1_loss(made, true) + 2 * F.smooth_l1_loss(made[..., :4], true[..., :4])
    torch.testing.assert_close(reconstruction_loss(made, true, weights), expected)
    weights = feature_weights(
        TokenizerTrainingConfig(feature_weight=0, position_weight=0, extremity_weight=3), 263
    )
    positions = [x.reshape(2, 8, 263)[..., 4:67].unflatten(-1, (21, 3)) for x in (made, true)]
    ends = [x[..., [6, 7, 9, 10, 19, 20], :] for x in positions]  # joints 7, 8, 10, 11, 20, 21
    torch.testing.assert_close(reconstruction_loss(made, true, weights), 3 * F.smooth_l1_loss(*ends))
    # Ankles, feet and wrists, where another representation has them.
    only = TokenizerTrainingConfig(feature_weight=0, position_weight=0, extremity_weight=1)
    for width, first, joints in ((272, 8, (7, 8, 10, 11, 20, 21)), (251, 1, (7, 10, 13, 15, 18, 20))):
        found = feature_weights(only, width).nonzero().flatten().tolist()
        assert found == [first + 3 * joint + axis for joint in joints for axis in range(3)]
    assert feature_weights(TokenizerTrainingConfig(), 10).tolist() == pytest.approx([0.1] * 10)


def test_saturated_latents_are_pulled_back():
    z = torch.tensor([[-2.5, 0.3], [1.5, 1.7]], requires_grad=True)
    loss = saturation(z)
    assert loss.item() == pytest.approx((1.0 + 0.04) / 4)
    loss.backward()
    assert z.grad.tolist() == pytest.approx(np.array([[-0.5, 0], [0, 0.1]]), abs=1e-6)
    # No level of the released codebooks lies beyond.
    for levels in FSQ_LEVELS.values():
        for end in (-SATURATED, SATURATED):
            edge = torch.full((1, len(levels)), end)
            codes = fsq_quantize(edge, levels)[0]
            assert torch.equal(codes, fsq_quantize(edge * 100, levels)[0])


def test_learning_rate_schedule():
    config = TokenizerTrainingConfig(
        steps=1000, learning_rate=1.0, warmup_ratio=0.01, milestone=0.6, decay=0.05
    )
    rates = [learning_rate(config, step) for step in range(1000)]
    assert rates[:10] == pytest.approx([(step + 1) / 11 for step in range(10)])
    assert rates[10:600] == [1.0] * 590
    assert rates[600:] == pytest.approx([0.05] * 400)
    assert learning_rate(dataclasses.replace(config, warmup_ratio=0.0), 0) == 1.0

    config = dataclasses.replace(config, schedule="cosine")
    rates = [learning_rate(config, step) for step in range(1000)]
    assert rates[:10] == pytest.approx([(step + 1) / 11 for step in range(10)])
    assert rates[10] == pytest.approx(1.0)
    assert rates[505] == pytest.approx((1 + 0.05) / 2)
    assert rates[-1] == pytest.approx(0.05, abs=1e-4)
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[10:]))
    with pytest.raises(ScaMoError, match="schedule = 'linear': expected step or cosine"):
        TokenizerTrainingConfig(schedule="linear")


def test_latents_start_spread():
    torch.manual_seed(0)
    model = FSQAutoencoder(TokenizerConfig(codebook_size=256, width=32, latent_width=32, depth=2))
    x = torch.randn(8, 32, 263)
    with torch.no_grad():
        before = model(x).z.flatten(0, 1).std(0)
        spread_latents(model, x, 0.7, torch.Generator().manual_seed(1))
        z = model(x).z.flatten(0, 1)
    assert before.max() < 0.2
    torch.testing.assert_close(z.std(0), torch.full((3,), 0.7), atol=1e-4, rtol=0)
    torch.testing.assert_close(z.mean(0), torch.zeros(3), atol=1e-4, rtol=0)


def test_noise_takes_the_place_of_rounding():
    torch.manual_seed(0)
    quantizer = FSQ((8, 5), 6)
    latents = torch.randn(4000, 6, requires_grad=True)
    noise = torch.rand(4000, 2) - 0.5
    rounded, indices, z = quantizer(latents)
    noisy, same, _ = quantizer(latents, noise)
    assert torch.equal(indices, same)  # what is reported is what encoding would give
    bounded = fsq_bound(z, (8, 5))
    torch.testing.assert_close(noisy, quantizer.project_out((bounded + noise) / torch.tensor([4.0, 2.0])))
    # The gradient of tanh alone, as straight through the rounding.
    grads = [torch.autograd.grad(y.sum(), latents, retain_graph=True)[0] for y in (rounded, noisy)]
    torch.testing.assert_close(*grads)


def test_training_beats_the_mean(trained, corpus):
    """The mean of every feature is what a decoder that ignores its tokens can learn at best."""
    log = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in log if "loss" in line]
    assert len(losses) == 16
    assert losses[-1] < 0.75 * losses[0]
    validations = [line["validation"] for line in log if "validation" in line]
    assert [line["step"] for line in log if "validation" in line] == [75, 150]
    dataset = MotionDataset.open(corpus)
    features = np.concatenate([dataset.item_features(i) for i in dataset.items("val")])
    mean_error = np.abs((features - dataset.mean) / dataset.std).mean()
    assert validations[-1]["l1"] < 0.8 * mean_error
    assert validations[-1]["l1"] < validations[0]["l1"]
    assert validations[-1]["exp_entropy"] > 10


def test_a_run_says_where_it_comes_from(trained, corpus, small_config):
    provenance = json.loads((trained / "config.json").read_text())["provenance"]
    assert provenance["dataset"]["manifest_sha256"] == MotionDataset.open(corpus).manifest_sha256
    assert (provenance["clips"], provenance["clips_shorter_than_the_window"]) == (72, 0)
    assert (provenance["step"], provenance["finished"]) == (150, True)
    assert provenance["training"]["learning_rate"] == small_config.training.learning_rate
    tokenizer = load_tokenizer(trained)
    np.testing.assert_array_equal(tokenizer.mean, MotionDataset.open(corpus).mean)
    assert [p.name for p in trained.parent.iterdir()] == [trained.name]  # no OUT.unfinished


def test_the_same_bits_twice(corpus, small_config, tmp_path):
    config = short(small_config, steps=6, validate_every=3)
    state = torch.random.get_rng_state()
    for name in ("a", "b"):
        train_tokenizer(config, corpus, tmp_path / name, device="cpu", threads=1, progress=False)
    assert torch.equal(torch.random.get_rng_state(), state)
    train_tokenizer(short(config, seed=1), corpus, tmp_path / "c", device="cpu", threads=1, progress=False)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1] != weights[2]


def test_a_folder_that_exists_is_kept(corpus, small_config, tmp_path):
    config = short(small_config, steps=2)
    train_tokenizer(config, corpus, tmp_path / "a", device="cpu", progress=False)
    before = (tmp_path / "a/model.safetensors").read_bytes()
    with pytest.raises(ScaMoError, match="a exists"):
        train_tokenizer(config, corpus, tmp_path / "a", device="cpu", progress=False)
    with pytest.raises(ScaMoError, match="not finite"):
        train_tokenizer(
            short(config, steps=30, learning_rate=1e30), corpus, tmp_path / "a",
            device="cpu", overwrite=True, progress=False,
        )  # fmt: skip
    assert (tmp_path / "a/model.safetensors").read_bytes() == before
    train_tokenizer(
        short(config, seed=1), corpus, tmp_path / "a", device="cpu", overwrite=True, progress=False
    )
    assert (tmp_path / "a/model.safetensors").read_bytes() != before
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_loss_that_diverges_leaves_nothing(corpus, small_config, tmp_path):
    config = short(small_config, steps=30, learning_rate=1e30)
    with pytest.raises(
        ScaMoError, match=r"loss is not finite between steps \d+ and \d+: lower .* \(now 1e\+30\)"
    ):
        train_tokenizer(config, corpus, tmp_path / "a", device="cpu", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_features_that_are_not_finite_are_found(small_config, tmp_path):
    """A dataset damaged behind its manifest's back (same size, so that opening it does not notice)."""
    write_clips(tmp_path / "set", [40, 40], width=263)
    array = np.load(tmp_path / "set/features.npy", mmap_mode="r+")
    array[40:] = np.nan
    array.flush()
    with pytest.raises(ScaMoError, match="not finite between .*: clip c1 has features that are not finite"):
        train_tokenizer(
            short(small_config, steps=3), tmp_path / "set", tmp_path / "a", device="cpu", progress=False
        )
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


def test_a_collapsed_codebook_warns(small_config, tmp_path, capsys):
    """Motions that never move have one token, whatever the codebook."""
    write_clips(tmp_path / "set", [400, 400], width=263, splits=["train", "val"], value=0.25)
    config = short(small_config, steps=4, validate_every=2)
    report = train_tokenizer(config, tmp_path / "set", tmp_path / "a", device="cpu", progress=False)
    assert report["collapsed"]
    out = capsys.readouterr().out
    assert out.count("warning: the codebook has collapsed at step 2: exp. entropy") == 1
    assert "is below 5% of the 100 it could be" in out


def test_without_validation_split(small_config, tmp_path):
    write_clips(tmp_path / "set", [40], width=263)
    report = train_tokenizer(
        short(small_config, steps=2), tmp_path / "set", tmp_path / "a", device="cpu", progress=False
    )
    assert report.keys() == {"loss"}
    assert load_tokenizer(tmp_path / "a").codes == 512


def test_progress_says_what_is_skipped(small_config, tmp_path, capsys):
    write_clips(tmp_path / "set", [40, 20, 31, 33], width=263)
    train_tokenizer(short(small_config, steps=2), tmp_path / "set", tmp_path / "a", device="cpu")
    assert "2 clips, 11 windows of 32 frames; 2 clips are shorter and skipped" in capsys.readouterr().out


def test_bfloat16_trains(corpus, small_config, tmp_path):
    """The matrix products are bfloat16, the weights and what is written float32."""
    config = short(small_config, steps=8, precision="bfloat16", validate_every=8)
    report = train_tokenizer(config, corpus, tmp_path / "a", device="cpu", progress=False)
    exact = train_tokenizer(
        short(config, precision="float32"), corpus, tmp_path / "b", device="cpu", progress=False
    )
    assert report["loss"] == pytest.approx(exact["loss"], rel=0.02)
    assert report["loss"] != exact["loss"]
    assert {t.dtype for t in load_tokenizer(tmp_path / "a").state_dict().values()} == {torch.float32}
    assert json.loads((tmp_path / "a/config.json").read_text())["provenance"]["precision"] == "bfloat16"


def test_precision_follows_the_machine():
    cpu = torch.device("cpu")
    amx = bool(torch.cpu.get_capabilities().get("amx_bf16"))
    assert [use_bfloat16(p, cpu) for p in ("float32", "bfloat16", "auto")] == [False, True, amx]
    with pytest.raises(ScaMoError, match="precision = 'half': expected auto, float32 or bfloat16"):
        TokenizerTrainingConfig(precision="half")


@pytest.mark.parametrize(
    ("name", "codes", "width"), [("tokenizer_full", 64_000, 512), ("tokenizer_narrow", None, None)]
)
def test_checked_in_configs(name, codes, width):
    config = load_config(TokenizerRunConfig, ROOT / f"configs/{name}.toml")
    assert config.training.window % config.tokenizer.downsampling == 0
    if codes:
        assert (config.tokenizer.codes, config.tokenizer.width) == (codes, width)
    small = load_config(TokenizerRunConfig, ROOT / f"configs/{name}.toml", ["tokenizer.codebook_size=256"])
    assert small.tokenizer == dataclasses.replace(config.tokenizer, codebook_size=256)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tokenizer.codebook_size=1000"], "codebook_size = 1000 has no FSQ levels: use one of 256, 512"),
        (["tokenizer.feature_dim=10"], "263 features a frame, the config has tokenizer.feature_dim = 10"),
        (["training.window=30"], "training.window = 30: expected a multiple of the 4 frames of a token"),
        (["training.window=400"], "no clip of the split train has the 400 frames of a window"),
        (["training.windw=32"], "unknown key training.windw; did you mean training.window?"),
        (["training.precision=half"], "precision = 'half'"),
        (["training.steps=0"], "steps = 0: expected a value above 0"),
    ],
)
def test_command_errors_are_one_line(corpus, tmp_path, capsys, overrides, message):
    arguments = ["tokenizer", "train", str(corpus), "-o", str(tmp_path / "a")]
    arguments += ["--config", str(ROOT / "configs/tokenizer_narrow.toml"), "--device", "cpu"]
    assert cli.main([*arguments, *(part for o in overrides for part in ("--set", o))]) == 2
    error = capsys.readouterr().err
    assert error.startswith("scamo: error: ")
    assert error.count("\n") == 1
    assert message in error
    assert list(tmp_path.iterdir()) == []


def test_commands(corpus, tmp_path, capsys):
    """The three commands after one another, as a user types them."""
    out = str(tmp_path / "tok")
    sizes = ["tokenizer.width=16", "tokenizer.latent_width=16", "training.steps=3", "training.batch_size=4"]
    arguments = ["tokenizer", "train", str(corpus), "-o", out, "--device", "cpu"]
    arguments += ["--config", str(ROOT / "configs/tokenizer_narrow.toml")]
    assert cli.main([*arguments, *(part for size in sizes for part in ("--set", size))]) == 0
    assert json.loads((tmp_path / "tok/config.json").read_text())["provenance"]["step"] == 3
    capsys.readouterr()
    assert cli.main(["tokenizer", "evaluate", out, str(corpus), "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["motions"] == 4
    assert cli.main(["tokenizer", "encode", out, str(corpus), "--name", "cli", "--device", "cpu"]) == 0
    assert MotionDataset.open(corpus).tokens("cli").codes == load_tokenizer(out).codes
    assert cli.main(["tokenizer", "evaluate", str(corpus), str(corpus)]) == 2
    assert "is not a tokenizer folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("device", "message"),
    [("gpu", "device 'gpu': expected auto, cpu or cuda"), ("cuda:99", "sees no such GPU")],
)
def test_bad_device(corpus, small_config, tmp_path, device, message):
    with pytest.raises(ScaMoError, match=message):
        train_tokenizer(small_config, corpus, tmp_path / "a", device=device, progress=False)


def test_training_config_without_train_clips_of_this_width(corpus, tmp_path):
    config = TokenizerRunConfig(TokenizerConfig(codebook_size=256, feature_dim=7))
    with pytest.raises(ScaMoError, match="corpus: 263 features a frame, the config has .* = 7"):
        train_tokenizer(config, corpus, tmp_path / "a", device="cpu", progress=False)
