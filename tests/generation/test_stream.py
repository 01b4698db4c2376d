"""Streams against what is decoded at once."""

import numpy as np
import pytest
import torch

from scamo.config import TokenizerConfig
from scamo.generation.stream import FeatureStream, JointStream, context_tokens, set_velocities
from scamo.motion.features import features_to_joints
from scamo.motion.representation import HUMANML3D, KIT_ML, SMPL_272, SNAPMOGEN
from scamo.motion.synthetic import corpus_clip
from scamo.tokenizers.autoencoder import FSQAutoencoder

ALL = [HUMANML3D, KIT_ML, SMPL_272, SNAPMOGEN]
SMALL = {"levels": (5, 5), "width": 8, "latent_width": 8}
CONFIGS = [
    TokenizerConfig(**SMALL),
    TokenizerConfig(**SMALL, depth=1),
    TokenizerConfig(**SMALL, depth=2, dilation_base=2, downsample_stages=1),
    TokenizerConfig(**SMALL, depth=2, dilation_base=2, downsample_stages=3),
]


def make_tokenizer(config):
    torch.manual_seed(0)
    return FSQAutoencoder(config, torch.randn(263), torch.full((263,), 0.5)).eval()


def test_the_context_of_the_default_decoder():
    assert context_tokens(TokenizerConfig()) == (22, 22)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_frames_depend_on_the_context_and_on_no_more(config):
    # In float64 with weights above 0 the farthest token's influence is small and still not lost in rounding.
    tokenizer = make_tokenizer(config)
    for parameter in tokenizer.decoder.parameters():
        parameter.data.abs_()
    tokenizer.double()
    before, after = context_tokens(config)
    latents = torch.rand(1, before + after + 5, config.latent_width, dtype=torch.float64)
    latents.requires_grad_()
    token = before + 2
    frames = slice(token * config.downsampling, (token + 1) * config.downsampling)
    tokenizer.decoder(latents)[:, frames].sum().backward()
    reached = latents.grad[0].abs().sum(1).nonzero().flatten()
    assert (reached.min(), reached.max()) == (token - before, token + after)


@pytest.mark.parametrize("chunk", [1, 3, 8])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_streamed_features_are_the_offline_ones(config, chunk):
    tokenizer = make_tokenizer(config)
    _, after = context_tokens(config)
    for length in (1, 5, after + 1, 60):
        tokens = np.random.default_rng(length).integers(0, 25, length)
        stream, pieces, pushed = FeatureStream(tokenizer, chunk), [], 0
        while pushed < length:
            part = tokens[pushed : pushed + 2]
            pushed += len(part)
            pieces.append(stream.push(part, end=pushed == length))
            # No piece comes later than it must.
            assert stream.given == length if pushed == length else pushed - stream.given < after + chunk
        whole = tokenizer.decode(torch.from_numpy(tokens)[None])[0].detach().numpy()
        got = np.concatenate([piece for piece in pieces if piece is not None])
        np.testing.assert_allclose(got, whole, atol=1e-5)


@pytest.mark.parametrize("size", [1, 4, 7])
@pytest.mark.parametrize("representation", ALL, ids=lambda one: one.name)
def test_joints_in_pieces_are_the_joints_at_once(representation, size):
    """Over 400 frames of fast turns and steps."""
    features = np.random.default_rng(0).normal(0, 0.2, (400, representation.feature_dim)).astype(np.float32)
    features[:, 1:] /= representation.unit
    stream = JointStream()
    joints = [stream.push(features[start : start + size]) for start in range(0, 400, size)]
    expected = representation.to_joints(features)
    assert np.abs(expected[:, 0]).max() > 1
    np.testing.assert_allclose(np.concatenate(joints), expected, atol=1e-5)


@pytest.mark.parametrize("representation", [HUMANML3D, SMPL_272], ids=lambda one: one.name)
def test_velocities_are_those_of_a_clip(representation):
    features = representation.from_joints(corpus_clip(4).joints)
    lost = features.copy()
    lost[:, representation.velocities] = 7
    set_velocities(lost, 5, len(lost))
    frames = slice(5, -1) if representation is HUMANML3D else slice(5, None)
    np.testing.assert_allclose(lost[frames], features[frames], atol=2e-5)
    assert (lost[:5, representation.velocities] == 7).all()


def test_joints_go_on_where_a_body_stands():
    """A path that was turned and moved is recovered from one frame of it."""
    features = np.random.default_rng(1).normal(0, 0.2, (40, 263)).astype(np.float32)
    cos, sin = np.cos(2.5), np.sin(2.5)
    turn = np.array([[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]])
    world = features_to_joints(features.astype(np.float64)) @ turn.T + (3, 0.5, -2)
    stream = JointStream.after(world[10], features[10])
    np.testing.assert_allclose(stream.here, world[10], atol=1e-6)
    pieces = [stream.push(features[11:20]), stream.push(features[20:])]
    np.testing.assert_allclose(np.concatenate(pieces), world[11:], atol=1e-5)
