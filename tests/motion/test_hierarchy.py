"""Skeletons with any joints, against SciPy joint by joint."""

import numpy as np
import pytest
from scipy.spatial.transform import Rotation, Slerp

from scamo.errors import ScaMoError
from scamo.motion.hierarchy import Animation, Hierarchy, finite, rate_of, slerp

PARENTS = (-1, 0, 1, 0, 3, 3, 2)


def animation(frames=9, seed=0, fps=30.0):
    rng = np.random.default_rng(seed)
    names = tuple(f"j{i}" for i in range(len(PARENTS)))
    rotations = rng.normal(size=(frames, len(PARENTS), 4))
    rotations /= np.linalg.norm(rotations, axis=-1, keepdims=True)
    places = rng.normal(size=(frames, len(PARENTS), 3))
    return Animation(Hierarchy(names, PARENTS, places[0].copy()), rotations, places, fps)


def test_forward_kinematics_is_that_of_scipy():
    moving = animation()
    places, turned = moving.forward_kinematics()
    found = []
    for joint, parent in enumerate(PARENTS):
        own = Rotation.from_quat(moving.rotations[:, joint], scalar_first=True)
        place = moving.translations[:, joint]
        if parent >= 0:
            place = found[parent][0] + found[parent][1].apply(place)
            own = found[parent][1] * own
        found.append((place, own))
        np.testing.assert_allclose(places[:, joint], place, atol=1e-12)
        np.testing.assert_allclose(turned[:, joint], own.as_matrix(), atol=1e-12)
    some, _ = moving.forward_kinematics([6])
    np.testing.assert_array_equal(some[:, [0, 1, 2, 6]], places[:, [0, 1, 2, 6]])
    assert np.isnan(some[:, [3, 4, 5]]).all()


def test_rates_that_divide_leave_frames_out():
    moving = animation(frames=13, fps=120.0)
    slow = moving.resampled(30.0)
    assert slow.fps == 30
    np.testing.assert_array_equal(slow.rotations, moving.rotations[::4])
    np.testing.assert_array_equal(slow.translations, moving.translations[::4])


@pytest.mark.parametrize("fps", [20.0, 25.0, 48.0])
def test_other_rates_are_interpolated(fps):
    moving = animation(frames=10, fps=30.0)
    other = moving.resampled(fps)
    times = np.arange(len(other)) / fps
    assert times[-1] <= 9 / 30 + 1e-9 < times[-1] + 1 / fps
    before = np.arange(10) / 30
    for joint in range(len(PARENTS)):
        quaternions = Rotation.from_quat(moving.rotations[:, joint], scalar_first=True)
        expected = Slerp(before, quaternions)(np.minimum(times, before[-1]))
        own = Rotation.from_quat(other.rotations[:, joint], scalar_first=True)
        assert (expected.inv() * own).magnitude().max() < 1e-6
        for axis in range(3):
            line = np.interp(times, before, moving.translations[:, joint, axis])
            np.testing.assert_allclose(other.translations[:, joint, axis], line, atol=1e-9)


def test_one_frame_can_be_resampled():
    assert len(animation(frames=1).resampled(20.0)) == 1


def test_slerp_takes_the_shorter_arc_and_no_arc():
    a = np.array([1.0, 0, 0, 0])
    b = np.array([np.cos(0.2), np.sin(0.2), 0, 0])
    half = np.full(1, 0.5)
    np.testing.assert_allclose(slerp(a, -b, half), [np.cos(0.1), np.sin(0.1), 0, 0], atol=1e-12)
    np.testing.assert_allclose(slerp(a, a, half), a)


@pytest.mark.parametrize(
    ("seconds", "fps"),
    [
        (".0083333", 120),
        ("0.016667", 60),
        ("0.0333", 30),
        ("0.04", 25),
        ("8.3333e-3", 120),
        ("0.0417083750", 23.976),
        ("0.08", 12.5),
        ("1", 1),
        ("2.5", 0.4),
    ],
)
def test_frame_times_are_rounded_rates_are_not(seconds, fps):
    assert rate_of(seconds) == fps


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "x", "", "1e300", "1e-400", "1e-300"])
def test_no_frame_time(seconds):
    with pytest.raises(ValueError):
        rate_of(seconds)


@pytest.mark.parametrize("word", ["nan", "inf", "1_0", "1,5", "0x10", "1e30", "", "١"])
def test_no_number(word):
    with pytest.raises(ValueError):
        finite(word)


@pytest.mark.parametrize(
    ("names", "parents", "message"),
    [
        ((), (), "0 names"),
        (("a", "a"), (-1, 0), "'a' is used twice"),
        (("a", "b"), (-1, -1), "expected one root"),
        (("a", "b"), (-1, 1), "every parent before its children"),
        (("a", "b"), (-1,), "1 parents"),
    ],
)
def test_no_tree(names, parents, message):
    with pytest.raises(ScaMoError, match=message):
        Hierarchy(names, parents, np.zeros((len(names), 3)))
