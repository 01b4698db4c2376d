"""Planted copies are found, and nothing else is."""

from functools import cache

import numpy as np
import pytest

from scamo.data.duplicates import DuplicateIndex, joint_distances, still_share
from scamo.motion.representation import HUMANML3D, KIT_ML, SMPL_272
from scamo.motion.skeleton import mirror_joints
from scamo.motion.synthetic import corpus_clip

OTHERS = 50
OF = 19  # waves the left arm, then runs: 127 frames, and no mirror image of itself
LEGS = ((7, 8, 10, 11), 1.0), ((4, 5), 0.5)


@cache
def motion(index):
    return corpus_clip(index).joints


def corrected(joints):
    """Feet moved slowly by up to 3 cm, knees by half of it."""
    out, time = joints.astype(np.float64).copy(), np.arange(len(joints))[:, None]
    for joint_ids, part in LEGS:
        for joint in joint_ids:
            out[:, joint] += part * 0.03 * np.sin(time / 15 + joint + np.array([0, 2, 4]))
    return out


def noisy(joints):
    return joints + np.random.default_rng(0).normal(0, 0.01, joints.shape)


def turned(joints):
    """Elsewhere, facing elsewhere."""
    turn = np.array([[0.6, 0, 0.8], [0, 1, 0], [-0.8, 0, 0.6]])
    return joints.astype(np.float64) @ turn.T + [3.0, 0.2, -1.0]


PLANTED = {
    "identical": (lambda j: j, "identical", 0),
    "turned": (turned, "identical", 0),
    "mirrored": (mirror_joints, "mirrored", 0),
    "part": (lambda j: j[23:75], "part", 23),
    "mirrored part": (lambda j: mirror_joints(j)[14:70], "mirrored", 14),
    "noisy": (noisy, "near", 0),
    "noisy part": (lambda j: noisy(j)[23:85], "part", 23),
    "corrected": (corrected, "near", 0),
    "longer": (lambda j: np.concatenate([motion(3)[-30:] - motion(3)[-1] + j[0], j]), "part", -30),
}


def matches(clips, representation=HUMANML3D, order=None):
    index = DuplicateIndex(representation, representation.fps, clips.__getitem__)
    for clip in clips:
        index.add(clip)
    return list(index.matches(range(len(clips)) if order is None else order))


@cache
def background(width):
    representation = HUMANML3D if width == 263 else SMPL_272
    return representation, [representation.from_joints(motion(i)) for i in range(OTHERS)]


@pytest.mark.parametrize("planted", PLANTED)
@pytest.mark.parametrize("width", [263, 272])
def test_a_planted_copy_is_found_and_nothing_else(planted, width):
    representation, clips = background(width)
    change, kind, shift = PLANTED[planted]
    copy = representation.from_joints(np.asarray(change(motion(OF))))
    before = {(m.clip, m.of) for m in matches(clips, representation)}
    found = [m for m in matches([*clips, copy], representation) if (m.clip, m.of) not in before]
    (match,) = [m for m in found if m.of == OF]
    assert (match.clip, match.kind, match.shift) == (OTHERS, kind, shift)
    assert match.covers == pytest.approx(match.frames / len(copy))
    assert match.distance_mm < (1 if "noisy" not in planted and planted != "corrected" else 20)
    assert len(found) == 1


def test_matches_do_not_depend_on_the_order_of_asking():
    clips = [*background(263)[1], HUMANML3D.from_joints(motion(OF)[10:80])]
    forwards = matches(clips)
    backwards = matches(clips, order=range(len(clips) - 1, -1, -1))
    assert len(forwards) >= 1
    assert sorted(forwards, key=lambda m: (m.clip, m.of)) == sorted(backwards, key=lambda m: (m.clip, m.of))


def test_identical_clips_that_do_not_move_are_found_and_similar_ones_are_not():
    still = np.repeat(motion(0)[:1], 60, axis=0)
    other = still + np.array([0, 0, 0.004])[None, None] * np.arange(22)[None, :, None]
    clips = [HUMANML3D.from_joints(joints) for joints in (still, other, still)]
    assert [(m.clip, m.of, m.kind) for m in matches(clips)] == [(2, 0, "identical")]


def test_clips_shorter_than_a_window_do_no_harm():
    clips = [HUMANML3D.from_joints(motion(0)[:n]) for n in (2, 3, 12, 2)]
    assert (3, 0, "identical") in [(m.clip, m.of, m.kind) for m in matches(clips)]
    assert matches([]) == []


@pytest.mark.parametrize("representation", [HUMANML3D, SMPL_272, KIT_ML], ids=lambda r: r.name)
def test_windows_of_the_mirrored_motion_are_the_mirrored_windows(representation):
    rng = np.random.default_rng(1)
    features = rng.normal(0, 1, (80, representation.feature_dim)).cumsum(0).astype(np.float32)
    index = DuplicateIndex(representation, representation.fps, lambda clip: features)
    for clip in (features, representation.mirrored(features)):
        index.add(clip)
    clips = [features, representation.mirrored(features)]
    found = matches(clips, representation)
    assert [(m.kind, m.shift, m.distance_mm) for m in found] == [("mirrored", 0, 0.0)]


def test_joint_distances_ignore_place_and_heading():
    joints = motion(OF).astype(np.float64)
    local = joints - joints[:, :1] * [1, 0, 1]
    other = turned(joints)
    other = other - other[:, :1] * [1, 0, 1]
    np.testing.assert_allclose(joint_distances(local, other), 0, atol=1e-6)
    moved = local.copy()
    moved[:, 20, 1] += 0.02 * (-1.0) ** np.arange(len(moved))
    apart = joint_distances(local, moved)
    assert apart[20] == pytest.approx(0.02, rel=0.02)
    assert joint_distances(local, moved, smooth=9)[20] < 0.005, "noise of single frames is averaged out"


@pytest.mark.parametrize("representation", [HUMANML3D, SMPL_272], ids=lambda r: r.name)
def test_still_share_is_a_speed_in_mm_a_second(representation):
    joints = np.repeat(motion(0)[:1].astype(np.float64), 61, axis=0)
    joints[30:, 15, 0] += np.arange(31) * 0.15 / representation.fps  # the head at 150 mm/s
    features = representation.from_joints(joints)
    assert still_share(features, representation, representation.fps, 160) == 1.0
    assert still_share(features, representation, representation.fps, 140) == pytest.approx(0.5, abs=0.02)
