"""Every quantiser through the same network, trainer, metrics and folder."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from scamo.config import TokenizerConfig, TokenizerRunConfig, TokenizerTrainingConfig
from scamo.data.dataset import MotionDataset
from scamo.errors import ScaMoError
from scamo.tokenizers import load_tokenizer
from scamo.tokenizers.autoencoder import FSQAutoencoder, kind_of
from scamo.tokenizers.encode import decode_tokens, encode_dataset, encode_motions
from scamo.tokenizers.evaluate import evaluate_tokenizer
from scamo.tokenizers.train import spread_latents, train_tokenizer

SIZES = {"width": 32, "latent_width": 12, "depth": 1}
CONFIGS = {
    "fsq": TokenizerConfig(levels=(7, 5), **SIZES),
    "grouped-fsq": TokenizerConfig(levels=(7, 5), groups=3, **SIZES),
    "residual-fsq": TokenizerConfig(levels=(7, 5), residual=2, **SIZES),
    "vq": TokenizerConfig(quantizer="vq", codebook_size=48, **SIZES),
    "residual-vq": TokenizerConfig(quantizer="vq", codebook_size=48, residual=3, **SIZES),
}
SEVERAL = [name for name, config in CONFIGS.items() if config.indices_per_token > 1]
TRAINING = TokenizerTrainingConfig(
    steps=60, batch_size=16, window=16, learning_rate=2e-3, latent_std=0.7, validate_every=60, log_every=10
)


def make(name):
    torch.manual_seed(0)
    config = CONFIGS[name]
    model = kind_of(config)(config, torch.randn(263), torch.full((263,), 2.0)).eval()
    x = 2 * torch.randn(3, 42, 263) + model.mean
    spread_latents(model, model.normalize(x[:, :40]), 0.7, torch.Generator().manual_seed(0))
    return model, x


@pytest.mark.parametrize("name", CONFIGS)
def test_encode_and_decode(name, tmp_path):
    model, x = make(name)
    many = model.config.indices_per_token
    indices = model.encode(x)
    assert indices.shape == ((3, 10) if many == 1 else (3, 10, many))
    assert indices.dtype == torch.int32
    assert len(indices.unique()) > 10
    made = model.decode(indices)
    torch.testing.assert_close(made, model(model.normalize(x)).features * model.std + model.mean)
    alone = encode_motions(model, [x[0].numpy(), x[1, :3].numpy()])
    np.testing.assert_array_equal(alone[0], indices[0].numpy())
    assert alone[1].shape == (0, *indices.shape[2:])
    np.testing.assert_allclose(decode_tokens(model, alone[:1])[0], made[0].detach(), rtol=1e-4, atol=1e-4)

    model.save(tmp_path / "tok")
    again = load_tokenizer(tmp_path / "tok")
    assert (type(again), again.config) == (type(model), model.config)
    assert torch.equal(again.decode(again.encode(x)), made)
    for bad, message in (
        (indices[0], r"tokens: shape \(10"),
        (indices[:, :0], r"tokens: shape \(3, 0"),
        (indices.unsqueeze(-1), r"tokens: shape \(3, 10"),
        (indices + model.codes, f"codes 0 to {model.codes - 1}"),
    ):
        with pytest.raises(ScaMoError, match=message):
            model.decode(bad)


@pytest.mark.parametrize("name", SEVERAL)
def test_a_part_of_the_indices_is_refused(name):
    model, x = make(name)
    many = model.config.indices_per_token
    with pytest.raises(ScaMoError, match=rf"shape \(3, 10, 1\), expected \(batch, at least 1, {many}\)"):
        model.decode(model.encode(x)[..., :1])


def test_rates():
    for name, many, codes in (("fsq", 1, 35), ("grouped-fsq", 3, 35), ("residual-fsq", 2, 35),
                              ("vq", 1, 48), ("residual-vq", 3, 48)):  # fmt: skip
        config = CONFIGS[name]
        assert (config.indices_per_token, config.codes) == (many, codes)
        assert config.bits_per_token == pytest.approx(many * math.log2(codes))


@pytest.mark.parametrize("name", CONFIGS)
def test_starts_spread(name):
    model, x = make(name)
    with torch.no_grad():
        z = model(model.normalize(x[:, :40])).z.flatten(0, 1)
    torch.testing.assert_close(z.mean(0), torch.zeros(z.shape[1]), atol=1e-4, rtol=0)
    torch.testing.assert_close(z.std(0), torch.full((z.shape[1],), 0.7), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", CONFIGS)
def test_training(name, corpus, tmp_path):
    """The loss falls, codes are used, and the same seed gives the same bits."""
    dropout = 0.5 if CONFIGS[name].residual > 1 else 0.0
    saturation = 0.1 if CONFIGS[name].quantizer == "fsq" else 0.0
    training = dataclasses.replace(TRAINING, quantizer_dropout=dropout, saturation_weight=saturation)
    config = TokenizerRunConfig(CONFIGS[name], training)
    report = train_tokenizer(config, corpus, tmp_path / "a", device="cpu", threads=1, progress=False)
    log = [json.loads(line) for line in (tmp_path / "a/log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in log if "loss" in line]
    assert losses[-1] < 0.9 * losses[0]
    assert report["exp_entropy"] > 5
    train_tokenizer(config, corpus, tmp_path / "b", device="cpu", threads=1, progress=False)
    weights = [(tmp_path / out / "model.safetensors").read_bytes() for out in "ab"]
    assert weights[0] == weights[1]

    names = set(load_tokenizer(tmp_path / "a").state_dict())
    assert names == set(make(name)[0].state_dict())
    found = evaluate_tokenizer(tmp_path / "a", corpus, device="cpu", progress=False)
    many = CONFIGS[name].indices_per_token
    assert found["l1"] == report["l1"]
    assert found["tokens_per_second"] == 5 * many
    assert found["bits_per_second"] == pytest.approx(5 * CONFIGS[name].bits_per_token)
    assert found["tokens"] == found["frames"] // 4 * many
    assert ("per_index" in found) == (many > 1)
    if many > 1:
        dataset, tokenizer = MotionDataset.open(corpus), load_tokenizer(tmp_path / "a")
        tokens = encode_motions(tokenizer, [dataset.item_features(i) for i in dataset.items("val")])
        for number, part in enumerate(found["per_index"]):
            used = np.unique(np.concatenate(tokens)[:, number])
            assert part["utilisation"] == len(used) / tokenizer.codes
        mean = np.mean([part["exp_entropy"] for part in found["per_index"]])
        assert found["exp_entropy"] == pytest.approx(mean)
        with pytest.raises(ScaMoError, match=f"has {many} indices a token .*; the transformer takes one"):
            encode_dataset(tmp_path / "a", tmp_path / "none", device="cpu", progress=False)


def test_vq_without_a_spread_start(corpus, tmp_path):
    config = TokenizerRunConfig(CONFIGS["vq"], dataclasses.replace(TRAINING, latent_std=0.0, steps=3))
    train_tokenizer(config, corpus, tmp_path / "a", device="cpu", progress=False)
    assert load_tokenizer(tmp_path / "a").codes == 48


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("vq", {"noise_ratio": 0.3}, "training.noise_ratio = 0.3 with tokenizer.quantizer = 'vq'"),
        ("residual-fsq", {"noise_ratio": 0.3}, "training.noise_ratio = 0.3 with tokenizer.residual = 2"),
        (
            "vq",
            {"saturation_weight": 0.1},
            "training.saturation_weight = 0.1 with tokenizer.quantizer = 'vq'",
        ),
        ("vq", {"quantizer_dropout": 0.1}, "training.quantizer_dropout = 0.1 with tokenizer.residual = 1"),
    ],
)
def test_settings_of_another_quantiser(name, changes, message, corpus, tmp_path):
    config = TokenizerRunConfig(CONFIGS[name], dataclasses.replace(TRAINING, **changes))
    with pytest.raises(ScaMoError, match=message):
        train_tokenizer(config, corpus, tmp_path / "a", device="cpu", progress=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ema_decay": 1.0}, r"ema_decay = 1.0: expected a decay in \[0, 1\)"),
        ({"commitment_weight": -1.0}, "commitment_weight = -1.0: expected 0 or more"),
        ({"reset_below": -1.0}, "reset_below = -1.0: expected 0 or more"),
        ({"quantizer_dropout": 1.5}, r"quantizer_dropout = 1.5: expected a probability in \[0, 1\]"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ScaMoError, match=message):
        TokenizerTrainingConfig(**changes)


@pytest.mark.parametrize("name", ["fsq", "vq"])
def test_a_folder_from_before_groups_and_stages_opens(name, tmp_path):
    model, x = make(name)
    model.save(tmp_path / "tok")
    (tmp_path / "tok/manifest.json").unlink()
    path = tmp_path / "tok/config.json"
    description = json.loads(path.read_text())
    for key in ("groups", "residual"):
        del description["tokenizer"][key]
    path.write_text(json.dumps(description))
    again = load_tokenizer(tmp_path / "tok")
    assert again.config == model.config
    assert torch.equal(again.encode(x), model.encode(x))


def test_stages_other_than_the_weights(tmp_path):
    model, _ = make("residual-vq")
    model.save(tmp_path / "tok")
    (tmp_path / "tok/manifest.json").unlink()
    path = tmp_path / "tok/config.json"
    path.write_text(path.read_text().replace('"residual": 3', '"residual": 2'))
    with pytest.raises(ScaMoError, match=r"quantizer.codebook is \(3, 48, 12\), expected \(2, 48, 12\)"):
        load_tokenizer(tmp_path / "tok")
    with pytest.raises(ScaMoError, match="FSQAutoencoder: quantizer 'vq', expected 'fsq'"):
        FSQAutoencoder(CONFIGS["residual-vq"])
