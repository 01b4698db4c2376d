"""An imported T2M-GPT tokenizer of random weights against the released behaviour in plain torch."""

import hashlib
import json

import numpy as np
import pytest
import torch

from scamo.errors import ScaMoError
from scamo.importers.autoencoder import infer_config
from scamo.importers.t2m_gpt import import_t2m_gpt_tokenizer
from scamo.tokenizers import load_tokenizer
from scamo.tokenizers.autoencoder import VQAutoencoder
from scamo.tokenizers.encode import decode_tokens, encode_motions


@pytest.fixture
def state(released):
    """A narrow network whose codebook lies among its latents, so that many codes are used."""
    state = released.draw(released.tokenizer_shapes(width=16, latent=12, codebook=96), seed=4)
    x = torch.randn(4, 96, 263, generator=torch.Generator().manual_seed(1))
    state["vqvae.quantizer.codebook"] = released.latents(state, x).flatten(0, 1).clone()
    return state


@pytest.fixture
def checkpoint(state, tmp_path):
    path = tmp_path / "net_last.pth"
    torch.save({"net": state}, path)
    return path


def test_the_released_shapes(released):
    shapes = released.tokenizer_shapes(codebook=512)
    assert shapes["vqvae.quantizer.codebook"] == (512, 512)
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    config = infer_config(tensors, "file", "vq")
    assert (config.quantizer, config.codes, config.latent_width, config.width) == ("vq", 512, 512, 512)
    assert (config.downsampling, config.depth, config.dilation_base) == (4, 3, 3)


def test_tokens_and_motion_are_the_released_ones(released, state, checkpoint, statistics, tmp_path):
    out = import_t2m_gpt_tokenizer(checkpoint, tmp_path / "out", **statistics)
    tokenizer = load_tokenizer(out)
    assert type(tokenizer) is VQAutoencoder
    exact = {name: tensor.double() for name, tensor in state.items()}
    codebook = exact["vqvae.quantizer.codebook"]
    mean, std = np.load(statistics["mean"]), np.load(statistics["std"]).astype(float)
    rng = np.random.default_rng(2)
    motions = [(rng.standard_normal((n, 263)) * std + mean).astype(np.float32) for n in (64, 67, 7)]

    tokens = encode_motions(tokenizer, motions)
    made = decode_tokens(tokenizer, tokens)
    used = set()
    for motion, indices, features in zip(motions, tokens, made, strict=True):
        z = released.latents(exact, torch.from_numpy((motion - mean) / std)[None])[0]
        distance = (z[:, None] - codebook).pow(2).sum(-1)
        two = distance.topk(2, largest=False)
        clear = two.values[:, 1] - two.values[:, 0] > 1e-5 * two.values[:, 0]
        assert clear.float().mean() > 0.9
        codes = torch.from_numpy(indices).long()
        assert torch.equal(codes[clear], two.indices[clear, 0])
        quantised = codebook[codes][None]
        expected = released.reconstruct(exact, quantised)[0].numpy() * std + mean
        assert features.shape == (len(motion) // 4 * 4, 263)
        np.testing.assert_allclose(features, expected, rtol=1e-5, atol=1e-4)
        used |= set(codes.tolist())
    assert len(used) > 10


def test_the_folder_says_where_it_comes_from(checkpoint, statistics, tmp_path):
    out = import_t2m_gpt_tokenizer(checkpoint, tmp_path / "out", **statistics)
    description = json.loads((out / "config.json").read_text())
    files = [
        {"name": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in (checkpoint, statistics["mean"], statistics["std"])
    ]
    assert description["format"] == "scamo-vq-tokenizer"
    assert description["provenance"] == {"importer": "t2m_gpt", "files": files}
    with pytest.raises(ScaMoError, match="out exists"):
        import_t2m_gpt_tokenizer(checkpoint, out, **statistics)
    import_t2m_gpt_tokenizer(checkpoint, out, **statistics, overwrite=True)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("vqvae.quantizer.codebook", None, "missing vqvae.quantizer.codebook"),
        ("vqvae.quantizer.codebook", torch.ones(96, 13), r"codebook is \(96, 13\), expected \(96, 12\)"),
        ("vqvae.encoder.model.2.1.model.0.conv1.bias", None, "missing vqvae.encoder.model.2.1.model.0.conv1"),
        ("vqvae.quantizer.project_in.weight", torch.ones(3, 12), "unknown vqvae.quantizer.project_in.weight"),
    ],
)
def test_tensors_that_do_not_fit_are_named(state, checkpoint, statistics, tmp_path, name, value, message):
    state.pop(name, None)
    if value is not None:
        state[name] = value
    torch.save({"net": state}, checkpoint)
    with pytest.raises(ScaMoError, match=f"net_last.pth: .*{message}"):
        import_t2m_gpt_tokenizer(checkpoint, tmp_path / "out", **statistics)
    assert not (tmp_path / "out").exists()


def test_the_transformer_s_checkpoint_is_not_the_tokenizer_s(checkpoint, statistics, tmp_path):
    torch.save({"trans": {"a": torch.ones(1)}}, checkpoint)
    with pytest.raises(ScaMoError, match="net_last.pth: no key 'net': found 'trans'"):
        import_t2m_gpt_tokenizer(checkpoint, tmp_path / "out", **statistics)


def test_statistics_are_required(checkpoint, statistics, tmp_path):
    with pytest.raises(ScaMoError, match="std is missing: the released checkpoints do not hold"):
        import_t2m_gpt_tokenizer(checkpoint, tmp_path / "out", mean=statistics["mean"], std=None)
