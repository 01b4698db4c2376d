"""Every known representation from tokens to files: generation, streams, timelines, in-betweening, export."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from scamo.config import ModelConfig, TokenizerConfig
from scamo.errors import ScaMoError
from scamo.generation.api import ScaMo
from scamo.generation.export import export_model, publish
from scamo.generation.stream import JointStream
from scamo.models.prefix_lm import PrefixLM
from scamo.motion.bvh import load_bvh, rig
from scamo.motion.motion import Motion
from scamo.motion.representation import HUMANML3D, KIT_ML, SMPL_272, SNAPMOGEN
from scamo.tokenizers.autoencoder import FSQAutoencoder

CODES = 25
CONFIG = ModelConfig(
    size="", layers=1, heads=2, width=16, codes=CODES, text_width=12, max_text=16, max_motion=12
)
ALL = [HUMANML3D, KIT_ML, SMPL_272, SNAPMOGEN]


def statistics(representation):
    """Of motions in metres whatever the unit of the features, with a body that is not a point."""
    mean, std = np.zeros(representation.feature_dim), np.full(representation.feature_dim, 0.1)
    rng = np.random.default_rng(0)
    lengths = [*range(*representation.positions.indices(9999))]
    mean[lengths] = rng.normal(0, 0.3, len(lengths)) / representation.unit
    steps = slice(0, 2) if representation is SMPL_272 else slice(1, 4)
    std[steps] /= representation.unit
    std[lengths] /= representation.unit
    if representation is SMPL_272:
        mean[[2, 6]] = 1
    return mean, std


@pytest.fixture(scope="module", params=ALL, ids=lambda one: one.name)
def made(request, encoder, tmp_path_factory):
    """A representation and an exported model of it."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(2)
    config = TokenizerConfig(levels=(5, 5), width=16, latent_width=8, depth=1)
    mean, std = statistics(request.param)
    FSQAutoencoder(config, mean, std).save(folder / "tokenizer")
    state = PrefixLM(CONFIG).state_dict()
    state["head.weight"] *= 3
    run = folder / "run"
    export_model(run / "export", state, CONFIG, folder / "tokenizer", str(encoder))
    return request.param, run


@pytest.fixture(scope="module")
def model(made):
    return ScaMo.load(made[1], device="cpu")


def test_a_model_takes_width_and_rate_from_its_tokenizer(made, model, tmp_path):
    representation, run = made
    assert model.tokenizer.config.feature_dim == representation.feature_dim
    assert model.fps == json.loads((run / "export/config.json").read_text())["fps"] == representation.fps
    motion = model.generate("a person walks", seed=3, seconds=8 / representation.fps)
    assert motion.features.shape == (8, representation.feature_dim)
    assert motion.joints.shape == (8, representation.n_joints, 3)
    assert motion.fps == representation.fps
    np.testing.assert_allclose(motion.joints, representation.to_joints(motion.features), atol=1e-5)
    # A copy to give away gives the same, and says of what body.
    publish(run, tmp_path / "given")
    again = ScaMo.load(tmp_path / "given", device="cpu").generate(
        "a person walks", seed=3, seconds=8 / representation.fps
    )
    np.testing.assert_array_equal(again.features, motion.features)
    card = (tmp_path / "given/README.md").read_text()
    assert f"{representation.n_joints} joints ({representation.feature_dim} features a frame)" in card
    assert ("those of the features" in card) == representation.true_rotations


def test_a_stream_is_the_motion_in_pieces(model):
    expected = model.generate("a person runs", seed=5, min_tokens=8)
    pieces = list(model.stream("a person runs", seed=5, min_tokens=8, chunk=3))
    assert len(pieces) > 1
    for name, size in (("features", 1e-4), ("joints", 1e-4)):
        found, wanted = np.concatenate([getattr(one, name) for one in pieces]), getattr(expected, name)
        np.testing.assert_allclose(found, wanted, atol=size * max(1, np.abs(wanted).max()))


def test_every_format_is_written_and_read(model, made, tmp_path):
    representation, _ = made
    motion = model.generate("a person jumps", seed=1, min_tokens=3, max_tokens=3)
    for suffix in ("npz", "npy", "csv", "bvh", "glb", "gif", "png", "html"):
        motion.save(tmp_path / f"m.{suffix}")
    back = Motion.load(tmp_path / "m.npz")
    np.testing.assert_array_equal(back.features, motion.features)
    assert back.fps == representation.fps
    np.save(tmp_path / "features.npy", motion.features)
    assert Motion.load(tmp_path / "features.npy").fps == representation.fps
    header = (tmp_path / "m.csv").read_text().splitlines()[0].split(",")
    assert header[1::3] == [f"{name}_x_m" for name in representation.joint_names]
    assert rig(motion).true == representation.true_rotations
    read = load_bvh(tmp_path / "m.bvh")
    assert read.body.names == representation.joint_names
    assert read.fps == pytest.approx(representation.fps, rel=1e-6)
    np.testing.assert_allclose(read.joints, motion.joints, atol=1e-4)
    page = (tmp_path / "m.html").read_text()
    assert json.dumps(list(representation.parents)).replace(" ", "") in page


def test_timelines_and_gaps(made, model):
    representation, _ = made
    token = 4 / representation.fps
    line = model.timeline([("a person walks", 15 * token), ("a person runs", 5 * token)], seed=2)
    assert line.joints.shape == (80, representation.n_joints, 3)
    given = Motion.from_features(line.features[:40])
    longer = model.continue_motion(given, "a person jumps", seconds=3 * token, seed=2)
    np.testing.assert_array_equal(longer.features[:40], given.features)
    # The way goes on where the features say, also in a world that is elsewhere.
    np.testing.assert_allclose(
        JointStream.after(longer.joints[39], longer.features[39]).push(longer.features[40:]),
        longer.joints[40:],
        atol=1e-3,
    )
    filled = model.inbetween(given, (12, 27), "a person runs", candidates=2, seed=2)
    kept = np.r_[0:12, 27:40]
    np.testing.assert_array_equal(filled.features[kept], given.features[kept])
    np.testing.assert_array_equal(filled.joints[kept], given.joints[kept])
    assert np.abs(filled.features[12:27] - given.features[12:27]).max() > 0.01
    # What is in the gap leads to what follows: heading and place are spread over it.
    np.testing.assert_allclose(filled.joints, representation.to_joints(filled.features), atol=2e-3)


def test_another_representation_cannot_be_gone_on_from(made, model):
    representation, _ = made
    other = next(one for one in ALL if one is not representation)
    motion = Motion.from_features(np.ones((20, other.feature_dim), np.float32), fps=representation.fps)
    expected = f"{other.feature_dim} features a frame, the model makes {representation.feature_dim}"
    with pytest.raises(ScaMoError, match=expected):
        model.continue_motion(motion, "a person walks")


def test_only_the_22_joints_are_cleaned(made, model):
    motion = model.generate("a person walks", seed=1, min_tokens=3, max_tokens=3)
    if made[0].n_joints == 22:
        assert motion.cleaned(foot_lock=False, constant_bones=True).features is None
    else:
        with pytest.raises(ScaMoError, match=f"22 joints, the motion has {made[0].n_joints}"):
            motion.cleaned()
