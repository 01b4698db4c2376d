"""The synthetic corpus: plausible bodies, honest hold-outs, the same bits from any split of the work."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from scamo.errors import ScaMoError
from scamo.motion import synthetic
from scamo.motion.skeleton import DEFAULT_OFFSETS, PARENTS
from scamo.motion.synthetic import (
    COMBINATIONS,
    HELD_OUT,
    HELD_OUT_PAIRS,
    Spec,
    caption,
    captions,
    completions,
    corpus_clip,
    generate_clip,
    generate_corpus,
    held_out_wordings,
    is_held_out,
    rig,
)
from scamo.motion.synthetic.corpus import draw_spec
from scamo.motion.synthetic.prompts import make_prompts
from scamo.motion.synthetic.spec import NOT_PAIRED

BALLS = (10, 11)


@pytest.fixture(scope="module")
def clips() -> list[synthetic.SyntheticClip]:
    return list(generate_corpus(600, seed=3))


def test_shapes_and_lengths(clips):
    for clip in clips:
        assert clip.joints.dtype == np.float32
        assert clip.joints.shape[1:] == (22, 3)
        assert 40 <= len(clip.joints) <= 196
        assert np.isfinite(clip.joints).all()
        if clip.spec.then is None:
            assert len(clip.joints) <= 8 * 20
        assert len(clip.captions) == 3


def test_bones_keep_their_lengths(clips):
    for clip in clips:
        joints = clip.joints.astype(np.float64)
        bones = np.linalg.norm(joints[:, 1:] - joints[:, list(PARENTS[1:])], axis=-1)
        np.testing.assert_allclose(bones, np.broadcast_to(bones[0], bones.shape), rtol=0, atol=3e-6)
        # A body between 0.92 x 0.97 and 1.08 x 1.03 of the neutral one (hips and collars vary in X only).
        neutral = np.linalg.norm(DEFAULT_OFFSETS[1:].astype(np.float64), axis=-1)
        assert (bones[0] / neutral > 0.88).all()
        assert (bones[0] / neutral < 1.12).all()
        # Left and right alike.
        np.testing.assert_allclose(bones[0, [3, 6, 17, 19]], bones[0, [4, 7, 18, 20]], atol=3e-6)


def test_nothing_sinks_into_the_ground(clips):
    lowest = min(float(clip.joints[..., 1].min()) for clip in clips)
    assert lowest >= rig.FLOOR - 1e-6
    for clip in clips:
        assert clip.joints[:, [7, 8], 1].min() > rig.FLOOR  # the heel's place is above the ball's


def test_feet_do_not_slide_in_contact(clips):
    worst = 0.0
    for clip in clips:
        for ball in BALLS:
            place = clip.joints[:, ball].astype(np.float64)
            planted = (place[1:, 1] < rig.FLOOR + 0.003) & (place[:-1, 1] < rig.FLOOR + 0.003)
            slide = np.linalg.norm(np.diff(place[:, [0, 2]], axis=0), axis=-1)
            if planted.any():
                worst = max(worst, float(slide[planted].max()))
    assert worst < 0.004  # metres a frame: 8 cm a second in the worst frame of 600 clips


def test_a_foot_is_planted_most_of_the_time_unless_it_flies(clips):
    for clip in clips:
        if clip.spec.then is None and clip.spec.action not in ("run", "jump"):
            low = clip.joints[:, BALLS, 1].min(axis=1) < rig.FLOOR + 0.01
            assert low.mean() > 0.97, clip.spec


def test_motion_is_continuous(clips):
    for clip in clips:
        joints = clip.joints.astype(np.float64)
        step = np.linalg.norm(np.diff(joints, axis=0), axis=-1)
        # The swinging foot of a fast runner is the fastest thing there is: about twice the body's 4.5 m/s.
        assert step.max() < 0.6, clip.spec
        pelvis = np.diff(joints[:, 0], n=2, axis=0) * 400
        assert np.linalg.norm(pelvis, axis=-1).max() < 45, clip.spec  # m/s^2


def test_knees_bend_forward_and_elbows_do_not_break(clips):
    for clip in clips[:200]:
        joints = clip.joints.astype(np.float64)
        across = joints[:, 1] - joints[:, 2]
        forward = np.stack((-across[:, 2], np.zeros(len(across)), across[:, 0]), axis=-1)
        forward /= np.linalg.norm(forward, axis=-1, keepdims=True)
        for hip, knee, ankle in ((1, 4, 7), (2, 5, 8)):
            thigh, shin = joints[:, knee] - joints[:, hip], joints[:, ankle] - joints[:, knee]
            straight = joints[:, ankle] - joints[:, hip]
            # The knee lies on the front side of the line from hip to ankle.
            along = np.einsum("ij,ij->i", thigh, straight) / np.einsum("ij,ij->i", straight, straight)
            bulge = thigh - along[:, None] * straight
            down = straight[:, 1] < -0.6 * np.linalg.norm(straight, axis=-1)
            assert (np.einsum("ij,ij->i", bulge, forward)[down] > -0.02).all(), clip.spec
            fold = np.einsum("ij,ij->i", thigh, shin)
            fold /= np.linalg.norm(thigh, axis=-1) * np.linalg.norm(shin, axis=-1)
            assert fold.min() > np.cos(np.radians(150)), clip.spec


def test_clip_is_a_function_of_seed_and_index():
    whole = list(generate_corpus(30, seed=5))
    tail = list(generate_corpus(30, seed=5, start=17))
    alone = corpus_clip(23, 5)
    for a, b in [*zip(whole[17:], tail, strict=True), (whole[23], alone)]:
        assert a.name == b.name
        assert a.captions == b.captions
        np.testing.assert_array_equal(a.joints, b.joints)
    other = corpus_clip(23, 6)
    assert other.name != alone.name
    assert other.joints.shape != alone.joints.shape or not np.array_equal(other.joints, alone.joints)


def test_splits_partition_the_corpus():
    names = {split: [c.name for c in generate_corpus(40, split=split)] for split in synthetic.SPLITS}
    assert [len(names[split]) for split in synthetic.SPLITS] == [36, 2, 2]
    assert sorted(name for part in names.values() for name in part) == sorted(
        c.name for c in generate_corpus(40)
    )


def test_hold_outs_are_a_tenth_and_never_drawn():
    combinations = [spec for specs in COMBINATIONS.values() for spec in specs]
    assert set(combinations) >= HELD_OUT
    assert 0.08 <= len(HELD_OUT) / len(combinations) <= 0.12
    assert 0.08 <= len(HELD_OUT_PAIRS) / (10 * 10) <= 0.13
    rng = np.random.default_rng(0)
    drawn = [draw_spec(rng, 0.5) for _ in range(8000)]
    assert not any(is_held_out(spec) for spec in drawn)
    assert not any(
        (a.action, b.action) in NOT_PAIRED for a, *rest in (s.parts() for s in drawn) for b in rest
    )
    # Everything else is drawn, and each value of a held-out combination is trained elsewhere.
    singles = {spec for spec in drawn if spec.then is None}
    assert singles == set(combinations) - HELD_OUT
    for held in HELD_OUT:
        for slot, value in held.slots().items():
            assert any(s.action == held.action and getattr(s, slot) == value for s in singles)


def test_actions_are_balanced():
    rng = np.random.default_rng(1)
    counts = Counter(draw_spec(rng, 0.0).action for _ in range(13_000))
    assert set(counts) == set(synthetic.ACTIONS)
    assert min(counts.values()) > 350  # of 1,000 if all were alike
    assert max(counts.values()) < 2000


def test_training_captions_hold_out_their_words():
    rng = np.random.default_rng(2)
    text = "\n".join(caption(draw_spec(rng, 0.3), rng)[0].text for _ in range(6000))
    for wording in held_out_wordings():
        assert not re.search(rf"\b{re.escape(wording)}\b", text), wording


def test_a_fifth_of_the_words_is_held_out():
    lists = [*captions.VERBS.values(), *captions.LIMBS.values(), captions.TEMPLATES, captions.PAIR_TEMPLATES]
    lists += [words for table in captions.PHRASES.values() for words in table.values()]
    for words in lists:
        train = set(words.train)
        assert not train & set(words.held)
        assert 0.15 <= len(words.held) / (len(train) + len(words.held)) <= 0.29, words
    train, held = (sum(len(set(getattr(words, part))) for words in lists) for part in ("train", "held"))
    assert 0.18 <= held / (train + held) <= 0.25


def test_captions_say_nothing_untrue():
    rng = np.random.default_rng(4)
    for _ in range(2000):
        spec = draw_spec(rng, 0.3)
        said, held = caption(spec, rng)
        assert held == 0
        assert len(said.spec.parts()) == len(spec.parts())
        for part, full in zip(said.spec.parts(), spec.parts(), strict=True):
            assert part.action == full.action
            assert part.slots().items() <= full.slots().items()
            assert full in completions(part)
            for side, other in (("left", "right"), ("right", "left")):
                if side in part.slots().values():
                    mentioned = {side, "clockwise" if side == "right" else "counterclockwise"}
                    assert any(word in said.text for word in (*mentioned, "anticlockwise")), said
                if len(spec.parts()) == 1 and other not in full.slots().values():
                    assert other not in said.text, said
        assert "{" not in said.text
        assert "  " not in said.text
        assert said.text.endswith(".")


@pytest.mark.parametrize(
    ("verb", "third", "gerund"),
    [
        ("walk", "walks", "walking"),
        ("stride", "strides", "striding"),
        ("run", "runs", "running"),
        ("box", "boxes", "boxing"),
        ("punch", "punches", "punching"),
        ("scurry", "scurries", "scurrying"),
        ("say", "says", "saying"),
        ("go", "goes", "going"),
        ("squat", "squats", "squatting"),
        ("bow", "bows", "bowing"),
        ("have", "has", "having"),
        ("drop", "drops", "dropping"),
    ],
)
def test_verbs_are_inflected(verb, third, gerund):
    assert captions.third_person(verb) == third
    assert captions.gerund(verb) == gerund


def test_spec_round_trip_and_refusals():
    spec = Spec("walk", direction="left", speed="slow", then=Spec("bow", count="2"))
    assert Spec.from_list(spec.to_list()) == spec
    assert Spec.from_list(json.loads(json.dumps(spec.to_list()))) == spec
    with pytest.raises(ScaMoError, match="unknown action or slot"):
        Spec.from_list([{"action": "fly"}])
    with pytest.raises(ScaMoError, match="one or two parts"):
        Spec.from_list([])
    with pytest.raises(ScaMoError, match="no such combination"):
        generate_clip(Spec("sit", count="2"), np.random.default_rng(0))
    with pytest.raises(ScaMoError, match="split = 'dev'"):
        generate_corpus(3, split="dev")
    with pytest.raises(ScaMoError, match="sequences = 2"):
        generate_corpus(3, sequences=2)
    with pytest.raises(ScaMoError, match="n_clips = -1"):
        generate_corpus(-1)


def test_rotations_are_rotations():
    rng = np.random.default_rng(0)
    yaw, pitch, roll = rng.uniform(-3, 3, (3, 50))
    turn = rig.rotation_yxz(yaw, pitch, roll)
    np.testing.assert_allclose(turn @ turn.transpose(0, 2, 1), np.tile(np.eye(3), (50, 1, 1)), atol=1e-12)
    c, s = np.cos(roll), np.sin(roll)
    around_z = np.tile(np.eye(3), (50, 1, 1))
    around_z[:, 0, 0] = around_z[:, 1, 1] = c
    around_z[:, 0, 1], around_z[:, 1, 0] = -s, s
    product = rig.rotation_y(yaw) @ rig.rotation_x(pitch) @ around_z
    np.testing.assert_allclose(turn, product, atol=1e-12)


def test_a_foot_out_of_reach_keeps_its_leg():
    body = rig.make_body(np.random.default_rng(0))
    feet = np.zeros((8, 2, 5))
    feet[:, 0, 0], feet[:, 1, 0] = 3.0, -3.0  # metres apart
    joints = rig.pose(body, np.zeros((8, rig.N_CHANNELS)), feet)
    np.testing.assert_allclose(np.linalg.norm(joints[:, 4] - joints[:, 1], axis=-1), body.thigh, rtol=1e-9)
    np.testing.assert_allclose(np.linalg.norm(joints[:, 7] - joints[:, 4], axis=-1), body.shin, rtol=1e-9)


def test_checked_in_prompts_are_what_the_generator_makes():
    path = Path(synthetic.__file__).parents[2] / "evaluation" / "prompts" / "synthetic.jsonl"
    stored = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert stored == make_prompts()
