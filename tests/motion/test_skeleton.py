from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from scamo.errors import ScaMoError
from scamo.motion import skeleton
from scamo.motion.skeleton import (
    CHAINS,
    DEFAULT_OFFSETS,
    JOINT_NAMES,
    MIRROR_PAIRS,
    N_JOINTS,
    PARENTS,
    RAW_OFFSETS,
    forward_kinematics,
    mirror_joints,
    swap_sides,
)


def test_tree_and_chains_tell_the_same_story():
    assert len(JOINT_NAMES) == len(set(JOINT_NAMES)) == len(PARENTS) == N_JOINTS == 22
    assert PARENTS[0] == -1
    assert all(parent < joint for joint, parent in enumerate(PARENTS))
    from_chains = {b: a for chain in CHAINS for a, b in pairwise(chain)}
    assert from_chains == {joint: parent for joint, parent in enumerate(PARENTS) if joint}
    for left, right in MIRROR_PAIRS:
        assert JOINT_NAMES[left].replace("left", "right") == JOINT_NAMES[right]
    assert {j for pair in MIRROR_PAIRS for j in pair} == {
        j for j, name in enumerate(JOINT_NAMES) if name.startswith(("left", "right"))
    }


def test_default_skeleton_is_a_plausible_symmetric_adult():
    rest = forward_kinematics(np.tile([1.0, 0, 0, 0], (22, 1)))
    np.testing.assert_allclose(mirror_joints(rest), rest, atol=1e-7)
    leg = np.linalg.norm(DEFAULT_OFFSETS[[4, 7]], axis=-1).sum()
    assert leg == pytest.approx(0.85, abs=1e-6)
    height = rest[15, 1] - rest[:, 1].min()
    assert 1.5 < height < 1.6
    assert rest[10, 2] > 0.05, "toes point forward, +Z"
    assert rest[20, 0] > 0.5 > -0.5 > rest[21, 0], "left is +X, arms are spread"
    np.testing.assert_allclose(np.linalg.norm(RAW_OFFSETS[1:], axis=-1), 1)
    with pytest.raises(ValueError, match="read-only"):
        DEFAULT_OFFSETS[0] = 1


def test_forward_kinematics_equals_walking_the_tree_with_scipy():
    rng = np.random.default_rng(0)
    turns = Rotation.from_rotvec(rng.normal(size=(3 * 22, 3)))
    xyzw = turns.as_quat().reshape(3, 22, 4)
    root = rng.normal(size=(3, 3))
    offsets = rng.normal(size=(22, 3))
    expected = np.zeros((3, 22, 3))
    for frame in range(3):
        absolute = {}
        for joint, parent in enumerate(PARENTS):
            own = Rotation.from_quat(xyzw[frame, joint])
            absolute[joint] = own if parent < 0 else absolute[parent] * own
            expected[frame, joint] = (
                root[frame]
                if parent < 0
                else expected[frame, parent] + absolute[parent].apply(offsets[joint])
            )
    quaternions = xyzw[..., [3, 0, 1, 2]]
    np.testing.assert_allclose(forward_kinematics(quaternions * 3, offsets, root), expected, atol=1e-12)
    matrices = turns.as_matrix().reshape(3, 22, 3, 3)
    np.testing.assert_allclose(forward_kinematics(matrices, offsets, root), expected, atol=1e-12)
    single = forward_kinematics(matrices.astype(np.float32), offsets, root)
    assert single.dtype == np.float32
    np.testing.assert_allclose(single, expected, atol=1e-5)
    batched = forward_kinematics(matrices[:, None], np.stack([offsets, 2 * offsets]))
    assert batched.shape == (3, 2, 22, 3)
    np.testing.assert_allclose(batched[:, 1], 2 * batched[:, 0], atol=1e-12)


def test_forward_kinematics_keeps_bone_lengths():
    rng = np.random.default_rng(1)
    joints = forward_kinematics(rng.normal(size=(5, 22, 4)))
    bones = joints[:, 1:] - joints[:, list(PARENTS[1:])]
    wanted = np.linalg.norm(DEFAULT_OFFSETS[1:], axis=-1)
    np.testing.assert_allclose(np.linalg.norm(bones, axis=-1), np.tile(wanted, (5, 1)), atol=1e-7)


def test_mirror_swaps_sides_negates_x_and_undoes_itself():
    joints = np.random.default_rng(2).normal(size=(2, 4, 22, 3)).astype(np.float32)
    mirrored = mirror_joints(joints)
    assert mirrored.dtype == np.float32
    left, right = JOINT_NAMES.index("left_wrist"), JOINT_NAMES.index("right_wrist")
    np.testing.assert_array_equal(mirrored[..., left, :], joints[..., right, :] * [-1, 1, 1])
    np.testing.assert_array_equal(mirrored[..., 0, 1:], joints[..., 0, 1:])
    np.testing.assert_array_equal(mirror_joints(mirrored), joints)
    as_torch = mirror_joints(torch.from_numpy(joints))
    np.testing.assert_array_equal(as_torch.numpy(), mirrored)


@pytest.mark.parametrize(
    ("text", "swapped"),
    [
        ("a person turns left, then right.", "a person turns right, then left."),
        ("Left foot, RIGHT hand", "Right foot, LEFT hand"),
        ("he stands upright in the bright light", "he stands upright in the bright light"),
        ("walks clockwise", "walks counterclockwise"),
        ("walks counterclockwise", "walks clockwise"),
        ("walks anti-clockwise", "walks clockwise"),
        ("walks Counter-clockwise", "walks Clockwise"),
        ("walks counter clockwise", "walks clockwise"),
        ("walks clock-wise", "walks counterclockwise"),
        ("leans leftwards; is right-handed", "leans rightwards; is left-handed"),
        ("left-right-left", "right-left-right"),
        ("left/right and right's", "right/left and left's"),
        ("", ""),
    ],
)
def test_swap_sides(text, swapped):
    assert swap_sides(text) == swapped


def test_swap_sides_agrees_with_the_mirrored_captions_of_humanml3d(shared):
    folder = shared / "data" / "humanml3d_cmu" / "texts"
    pairs = [
        (a.split("#")[0], b.split("#")[0])
        for path in sorted(folder.glob("M*.txt"))
        for a, b in zip(
            (folder / path.name[1:]).read_text().splitlines(), path.read_text().splitlines(), strict=True
        )
    ]
    # The published script makes "counter counterclockwise" and leaves "clock-wise"; nothing else may differ.
    different = [(a, b) for a, b in pairs if swap_sides(a) != b]
    assert len(pairs) > 1000
    assert all("counter clockwise" in a or "clock-wise" in a for a, _ in different)
    assert len(different) < 10


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: mirror_joints(np.zeros((5, 21, 3))),
            r"joints: expected shape \(\.\.\., 22, 3\), got \(5, 21, 3\)",
        ),
        (lambda: forward_kinematics(np.zeros((22, 3))), r"rotations: expected shape .* got \(22, 3\)"),
        (
            lambda: forward_kinematics(np.ones((22, 4)), np.zeros((24, 3))),
            r"offsets: expected .* got \(24, 3\)",
        ),
    ],
)
def test_wrong_shapes_are_named(call, message):
    with pytest.raises(ScaMoError, match=message):
        call()


def test_quaternions_to_matrices_agrees_with_scipy():
    q = np.random.default_rng(3).normal(size=(7, 4))
    expected = Rotation.from_quat(q[:, [1, 2, 3, 0]]).as_matrix()
    np.testing.assert_allclose(skeleton.quaternions_to_matrices(q), expected, atol=1e-12)
