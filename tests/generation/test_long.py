"""Timelines, continuation and in-betweening on a small random model."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from scamo.config import ModelConfig, TokenizerConfig
from scamo.data.batches import Sample, collate
from scamo.data.text import TextEncoder
from scamo.errors import ScaMoError
from scamo.generation.api import ScaMo
from scamo.motion.features import CONTACTS, VELOCITIES, features_to_joints
from scamo.motion.motion import Motion
from scamo.tokenizers.autoencoder import FSQAutoencoder

CODES = 25
CONFIG = ModelConfig(
    size="", layers=2, heads=2, width=16, codes=CODES, text_width=12, max_text=16, max_motion=12
)
WALK, RUN = "a person walks", "a person runs"


@pytest.fixture(scope="module")
def model(make_model, encoder):
    torch.manual_seed(2)
    config = TokenizerConfig(levels=(5, 5), width=16, latent_width=8, depth=1)
    tokenizer = FSQAutoencoder(config, torch.zeros(263), torch.full((263,), 0.1)).eval()
    return ScaMo(make_model(CONFIG), tokenizer, TextEncoder.load(str(encoder), device="cpu"))


@pytest.fixture(scope="module")
def walk(model):
    """10 tokens, 40 frames."""
    return model.generate(WALK, seed=3, seconds=2.0)


def own(motion, frames=slice(None)):
    """A motion with the features of some frames only, as if it were recorded."""
    return Motion.from_features(motion.features[frames].copy(), text=motion.text)


def turned(motion):
    """The motion elsewhere in the world."""
    cos, sin = np.cos(2.0), np.sin(2.0)
    turn = np.array([[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]])
    return replace(motion, joints=motion.joints @ turn.T + (4, 1, -3))


def decode(model, tokens):
    return model.tokenizer.decode(torch.tensor(tokens)[None])[0].detach().numpy()


def test_one_part_within_a_window_is_what_generate_gives(model):
    for seconds in (1.4, None):
        made = model.timeline([(WALK, seconds)], seed=5)
        expected = model.generate(WALK, seed=5, seconds=seconds)
        assert made.tokens.tolist() == expected.tokens.tolist()
        np.testing.assert_allclose(made.joints, expected.joints, atol=1e-5)
    assert model.timeline([WALK], seed=5).tokens.tolist() == made.tokens.tolist()


def test_every_token_is_chosen_behind_its_sentence_and_the_past_of_its_window(model):
    """Greedy, against the packed forward pass of the tokens that each one is to see."""
    made = model.timeline([(WALK, 2.8), (RUN, 0.6)], greedy=True, context=2, window=6)
    pasts = [range(at) for at in range(6)]
    pasts += [range(first, at) for first in (3, 6, 9) for at in range(first + 3, first + 6)][:8]
    pasts += [range(12, at) for at in range(14, 17)]
    assert len(made.tokens) == len(pasts) == 17
    for index, past in enumerate(pasts):
        states = model.text_encoder.encode([WALK if index < 14 else RUN], 1)[0].astype(np.float32)
        seen = made.tokens[[*past, index]]  # a sample has one token at least
        logits = model.model.logits(collate([Sample(states, seen)], CODES))[len(past), :CODES]
        assert int(logits.argmax()) == made.tokens[index]


def test_parts_have_their_lengths_and_are_decoded_in_one_row(model):
    made = model.timeline([(WALK, 1.0), (RUN, 7.1), (WALK, None), (WALK, 1.0)], seed=1)
    frames = [part["frames"] for part in made.meta["parts"]]
    assert frames[:2] == [20, 144]  # 35.5 tokens: up
    assert frames[3] == 20
    assert 4 <= frames[2] <= 48
    assert [part["first_frame"] for part in made.meta["parts"]] == np.cumsum([0, *frames])[:-1].tolist()
    assert len(made) == sum(frames)
    assert made.text == f"{WALK}, then {RUN}, then {WALK}, then {WALK}"
    np.testing.assert_allclose(made.features, decode(model, made.tokens), atol=1e-5)


def test_the_noise_is_fresh_in_every_window_and_the_same_again(model):
    parts = [(WALK, 1.0)] * 3 + [(RUN, 6.0)]
    several = model.timeline(parts, seed=4, samples=3, temperature=3.0, batch_size=2)
    tokens = [motion.tokens.tolist() for motion in several]
    assert [motion.meta["sample"] for motion in several] == [0, 1, 2]
    assert model.timeline(parts, seed=4, temperature=3.0).tokens.tolist() == tokens[0]
    assert len({tuple(row) for row in tokens}) == 3
    assert len({tuple(tokens[0][at : at + 5]) for at in (0, 5, 10)}) == 3


@pytest.mark.parametrize("tail", [0, 3])
def test_a_given_motion_stays_and_what_follows_grows_out_of_it(model, walk, tail):
    features = walk.features[: 40 - tail] + 0.2  # what the tokens do not say
    given = turned(Motion.from_features(features, text=WALK))
    made = model.continue_motion(given, RUN, seconds=1.0, seed=2)
    known = len(given)
    assert made.meta["parts"] == [{"text": RUN, "first_frame": known, "frames": 20}]
    assert made.text == f"{WALK}, then {RUN}"
    assert np.array_equal(made.joints[:known], given.joints)
    assert np.array_equal(made.features[:known], given.features)
    # The features' own path, from where the given motion stands.
    expected = turned(Motion.from_features(made.features)).joints
    np.testing.assert_allclose(made.joints, expected, atol=1e-4)

    past = model.tokenizer.encode(torch.from_numpy(given.features[None, known % 4 :]))[0]
    assert made.tokens[: len(past)].tolist() == past.tolist()
    decoded = decode(model, made.tokens)[-20 - 2 :]
    kept = np.ones(263, bool)
    kept[VELOCITIES] = kept[CONTACTS] = False
    added = made.features[known - 2 :, kept] - decoded[:, kept]
    assert np.abs(added[1]).max() > 0.1
    assert np.abs(added[9:]).max() < 1e-5, "gone after 8 frames"
    steps = np.abs(np.diff(added[1:], axis=0))
    assert steps.max() < 0.5 * (np.abs(added[1]).max() + 8 * np.abs(added[1] - added[0]).max())
    assert np.abs(made.features[known:, CONTACTS] - decoded[2:, CONTACTS]).max() < 1e-5


def test_velocities_of_new_frames_are_those_of_their_path(model, walk):
    made = model.continue_motion(own(walk), RUN, seconds=1.0)
    pairs = np.stack((made.features[40:-1], made.features[41:]), 1).astype(np.float64)
    steps = np.diff(features_to_joints(pairs), axis=1).reshape(len(pairs), -1)
    np.testing.assert_allclose(made.features[40:-1, VELOCITIES], steps, atol=1e-6)


def test_a_generated_motion_goes_on_from_its_own_tokens(model, walk, tmp_path):
    walk.save(tmp_path / "walk.npz")
    for start in (walk, tmp_path / "walk.npz"):
        made = model.timeline([(RUN, 1.0), (WALK, 1.0)], start=start, seed=2)
        assert made.tokens[:10].tolist() == walk.tokens.tolist()
    # Tokens of another tokenizer are not taken for this one's.
    other = replace(walk, tokens=(walk.tokens + 1) % CODES)
    expected = model.continue_motion(own(walk), RUN, seconds=1.0)
    assert model.continue_motion(other, RUN, seconds=1.0).tokens.tolist() == expected.tokens.tolist()


@pytest.mark.parametrize("gap", [(12, 28), (9, 23), (4, 5)])
def test_a_gap_is_filled_and_all_else_stays(model, walk, gap):
    given = turned(own(walk))
    made = model.inbetween(given, gap, RUN, candidates=4, seed=1)
    outside = np.r_[0 : gap[0], gap[1] : 40]
    for name in ("joints", "features"):
        before, after = getattr(given, name), getattr(made, name)
        assert np.array_equal(after[outside], before[outside])
        assert not np.allclose(after[gap[0] : gap[1]], before[gap[0] : gap[1]], atol=1e-5)
    # The path of the features leads to where the motion goes on.
    expected = turned(Motion.from_features(made.features)).joints
    np.testing.assert_allclose(made.joints, expected, atol=1e-4)


def test_the_candidate_is_taken_behind_which_the_rest_is_likeliest_and_nearest(model, walk, monkeypatch):
    from scamo.generation import api, long

    # Every candidate as if it were the only one: by how much each ends off the place.
    lacks, whole = [], long.filled

    def watched(*arguments):
        result, turned, moved = whole(*arguments)
        lacks.append(moved + np.radians(abs(turned)) / 2)
        return result, turned, moved

    monkeypatch.setattr(api, "filled", watched)
    made = [model.inbetween(walk, (16, 28), RUN, candidates=n, seed=1, context=3) for n in (1, 6)]
    before, after = walk.tokens[1:4], walk.tokens[7:10]
    states = model.text_encoder.encode([RUN], 1)[0].astype(np.float32)
    start = own_tokens(model, walk.tokens[:4])
    rolls = model.timeline([(RUN, 0.6)], start=start, samples=6, seed=1, context=3)
    scores = []
    for roll in rolls:
        row = np.array([*before, *roll.tokens[-3:], *after])
        logits = model.model.logits(collate([Sample(states, row)], CODES)).detach()
        told = logits.log_softmax(-1)[6:9].gather(1, torch.from_numpy(after.astype(np.int64))[:, None])
        scores.append(float(told.mean()))
    gaps = [motion.meta["gap"] for motion in made]
    assert gaps[0]["log_likelihood"] == pytest.approx(scores[0], abs=1e-4)
    assert len(lacks) == 7
    assert lacks[0] == lacks[1]
    best = int(np.argmax(np.array(scores) - long.LACK * np.array(lacks[1:])))
    assert gaps[1]["sample"] == best
    assert gaps[1]["log_likelihood"] == pytest.approx(scores[best], abs=1e-4)


def own_tokens(model, tokens):
    """A start that the model made of these tokens."""
    return Motion.from_features(decode(model, tokens), tokens=tokens)


@pytest.mark.parametrize(
    ("parts", "options", "message"),
    [
        ([], {}, r"parts = \[\]: expected a list"),
        (WALK, {}, "parts = 'a person walks': expected a list"),
        ([(WALK, 1.0), (RUN, 0.0)], {}, r"part 1: seconds = 0\.0: expected 0\.2 \(one token\) or more"),
        ([(WALK, -1.0)], {}, r"part 0: seconds = -1\.0"),
        ([(WALK, float("nan"))], {}, "part 0: seconds = nan"),
        ([(WALK, "long")], {}, "part 0: seconds = long"),
        ([WALK, (" ", 1.0)], {}, "part 1: text = ' ', expected a sentence"),
        ([WALK, 3], {}, "part 1 is 3: expected a text"),
        ([WALK], {"context": -1}, "context = -1: expected 0 to 11"),
        ([WALK], {"window": 13}, "window = 13: expected 2 to 12"),
        ([WALK], {"window": 4, "context": 4}, "context = 4: expected less than the window"),
        ([WALK], {"samples": 0}, "samples = 0"),
        ([WALK], {"temperature": 0.0}, r"temperature = 0\.0"),
    ],
)
def test_bad_parts_and_options_are_named(model, parts, options, message):
    with pytest.raises(ScaMoError, match=message):
        model.timeline(parts, **options)


def test_bad_motions_and_gaps_are_named(model, walk):
    broken = own(walk)
    broken.features[3, 100] = np.nan
    for motion, message in (
        (replace(walk, fps=30), "motion: 30 fps, the model makes 20"),
        (Motion(walk.joints), "motion: has joints but no features"),
        (broken, "motion: frame 3, feature 100 is not finite"),
        (own(walk, slice(0, 3)), r"motion: 3 frames, expected one token \(4 frames\)"),
    ):
        with pytest.raises(ScaMoError, match=message):
            model.continue_motion(motion, RUN)
    for gap in ((10, 10), (20, 10), (-4, 8), (30, 41), (1.5, 8), 7, (3, 8), (30, 37), (33, 35)):
        with pytest.raises(ScaMoError, match="gap = "):
            model.inbetween(walk, gap, RUN)
    with pytest.raises(ScaMoError, match="candidates = 0"):
        model.inbetween(walk, (8, 12), RUN, candidates=0)
