"""One table says what features of 263, 251, 272 and 296 numbers are."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from scamo.errors import ScaMoError
from scamo.motion import features272
from scamo.motion.features import FEATURE_GROUPS, features_to_joints, joints_to_features
from scamo.motion.representation import Representation
from scamo.motion.skeleton import KIT_SKELETON, mirror_joints
from scamo.motion.synthetic import corpus_clip

WIDTHS = (263, 251, 272, 296)


def kit_features():
    """KIT's layout filled from a walk whose last joint is dropped, in millimetres."""
    wide = joints_to_features(corpus_clip(0).joints)
    kit = np.random.default_rng(0).normal(size=(len(wide), 251)).astype(np.float32)
    kit[:, 0] = wide[:, 0]
    kit[:, 1:64] = 1000 * wide[:, 1:64]
    return kit, wide


@pytest.mark.parametrize("width", WIDTHS)
def test_groups_and_parts_cover_every_column_once(width):
    kind = Representation.of(width)
    assert kind.feature_dim == width
    assert Representation.find(width) is kind
    parts = [kind.root, kind.positions, kind.rotations, kind.velocities]
    parts += [kind.contacts] if kind.contacts else []
    for slices in (kind.groups.values(), parts):
        columns = np.concatenate([np.arange(s.start, s.stop) for s in slices])
        assert sorted(columns) == list(range(width))
    for part, size, joints in (
        (kind.positions, 3, kind.n_joints - kind.first_position),
        (kind.rotations, 6, kind.n_joints - kind.first_position),
        (kind.velocities, 3, kind.n_joints),
    ):
        assert part.stop - part.start == size * joints
    assert sorted(kind._mirror[0]) == list(range(width))


def test_the_table():
    found = [(r.n_joints, r.fps, r.extra_joint_frames) for r in map(Representation.of, WIDTHS)]
    assert found == [(22, 20, 1), (21, 12.5, 1), (22, 30, 0), (24, 30, 0)]
    assert dict(Representation.of(263).groups) == FEATURE_GROUPS


@pytest.mark.parametrize("width", WIDTHS)
def test_every_body_is_a_tree_with_two_sides(width):
    kind = Representation.of(width)
    assert len(set(kind.joint_names)) == len(kind.joint_names) == len(kind.parents) == kind.n_joints
    assert kind.parents[0] == -1
    assert all(0 <= parent < joint for joint, parent in enumerate(kind.parents[1:], 1))
    # The mirror exchanges what the names call left and right, and the bones with their joints.
    position = kind._mirror[0][kind.velocities].reshape(-1, 3)[:, 0] - kind.velocities.start
    for joint, other in enumerate(position // 3):
        name = kind.joint_names[joint]
        swapped = {"left": "right", "right": "left"}.get(name.split("_")[0])
        assert kind.joint_names[other] == (name if swapped is None else f"{swapped}_{name.split('_', 1)[1]}")
        if joint:
            assert kind.parents[other] == position[kind.parents[joint]] // 3


def test_unknown_widths():
    assert Representation.find(260) is None
    with pytest.raises(ScaMoError, match=r"feature_dim = 260: expected one of 263 \(HumanML3D\), 251"):
        Representation.of(260)


def test_conversions_are_those_of_the_formats():
    joints = corpus_clip(0).joints
    features = Representation.of(263).from_joints(joints)
    np.testing.assert_array_equal(features, joints_to_features(joints))
    assert len(features) == len(joints) - 1
    np.testing.assert_array_equal(Representation.of(263).to_joints(features), features_to_joints(features))
    np.testing.assert_array_equal(
        Representation.of(263).from_joints(joints, 30), joints_to_features(joints, fps=30)
    )
    features = Representation.of(272).from_joints(joints, 20)
    np.testing.assert_array_equal(features, features272.encode(joints, fps=20).features)
    np.testing.assert_array_equal(Representation.of(272).to_joints(features), features272.to_joints(features))


def test_kit_is_read_in_metres():
    kit, wide = kit_features()
    kind = Representation.of(251)
    joints = kind.to_joints(kit)
    np.testing.assert_allclose(joints, features_to_joints(wide)[:, :21], atol=1e-5)
    both = kind.to_joints(torch.from_numpy(np.stack([kit, kit])))
    np.testing.assert_allclose(both[1].numpy(), joints, atol=1e-5)


def test_true_rotations_turn_the_bones():
    joints = corpus_clip(0).joints
    features = Representation.of(272).from_joints(joints)
    kind = Representation.of(272)
    assert kind.true_rotations
    for found, wanted in zip(kind.to_rotations(features), features272.to_rotations(features), strict=True):
        np.testing.assert_array_equal(found, wanted)
    fitted = kind.rotations_off(features)
    features[7, features272.ROTATIONS] = features[0, features272.ROTATIONS]
    assert fitted < 0.001 < 0.01 < kind.rotations_off(features)
    for width in (263, 251):
        assert not Representation.of(width).true_rotations
        with pytest.raises(ScaMoError, match="features have no true rotations"):
            Representation.of(width).to_rotations(features)


def test_snapmogen_is_only_read():
    with pytest.raises(ScaMoError, match="SnapMoGen: features cannot be made from joints"):
        Representation.of(296).from_joints(np.zeros((4, 24, 3)))


def test_mirrored_features_are_those_of_the_mirrored_joints():
    joints = corpus_clip(3).joints
    kind = Representation.of(263)
    np.testing.assert_allclose(
        kind.mirrored(kind.from_joints(joints)), kind.from_joints(mirror_joints(joints)), atol=1e-6
    )
    kind = Representation.of(272)
    features = kind.from_joints(joints)
    made = kind.to_joints(kind.mirrored(features))
    np.testing.assert_array_equal(made, mirror_joints(kind.to_joints(features)))
    # Rotations and positions of the mirrored body agree as they did.
    np.testing.assert_allclose(features272.to_joints_by_rotations(kind.mirrored(features)), made, atol=1e-5)


def test_a_mirrored_kit_body():
    kit, _ = kit_features()
    kind = Representation.of(251)
    order = np.arange(21)
    for right, left in KIT_SKELETON.mirror_pairs:
        order[[right, left]] = left, right
    want = kind.to_joints(kit)[:, order] * np.float32([-1, 1, 1])
    np.testing.assert_array_equal(kind.to_joints(kind.mirrored(kit)), want)


@pytest.mark.parametrize("width", WIDTHS)
def test_mirrored_twice_is_the_same(width):
    features = np.random.default_rng(0).normal(size=(2, 3, width)).astype(np.float32)
    kind = Representation.of(width)
    once = kind.mirrored(features)
    assert once.dtype == features.dtype
    assert not (once == features).all()
    np.testing.assert_array_equal(kind.mirrored(once), features)
    np.testing.assert_array_equal(kind.mirrored(torch.from_numpy(features)).numpy(), once)


@pytest.mark.parametrize("width", WIDTHS)
def test_other_shapes_are_refused(width):
    kind = Representation.of(width)
    for function in (kind.to_joints, kind.mirrored):
        with pytest.raises(ScaMoError, match=f"features: expected .*{width}"):
            function(np.zeros((4, 7)))


@pytest.mark.parametrize("width", WIDTHS)
def test_the_std_is_averaged_inside_groups(width):
    kind = Representation.of(width)
    std = np.random.default_rng(0).uniform(0.1, 1, width)
    grouped = kind.grouped_std(std)
    for group in kind.groups.values():
        np.testing.assert_allclose(grouped[group], std[group].mean())


@pytest.mark.parametrize(("file", "width"), [("Std.npy", 263), ("kit_ml_Std.npy", 251)])
def test_the_published_std_is_constant_in_our_groups(shared, file, width):
    std = np.load(shared / "reference" / "stats" / file)
    np.testing.assert_allclose(Representation.of(width).grouped_std(std), std, rtol=1e-5)


def test_the_published_kit_mean_stands_upright(shared):
    """Right and left where the mirror pairs have them, and metres."""
    mean = np.load(shared / "reference" / "stats" / "kit_ml_Mean.npy")
    joints = Representation.of(251).to_joints(mean[None])[0]
    for right, left in KIT_SKELETON.mirror_pairs:
        assert joints[right, 0] < 0 < joints[left, 0]
        assert abs(joints[right] - joints[left] * [-1, 1, 1]).max() < 0.03
    assert 0.7 < joints[:, 1].max() < 1
    assert joints[:, 1].min() > 0


def test_kit_ml_comes_back_from_its_own_joints():
    """Joints of KIT-ML's body, metres -> 251 features in millimetres -> the same joints."""
    rng = np.random.default_rng(0)
    kit = Representation.of(251)
    rest = np.zeros((21, 3))
    for joint, parent in enumerate(kit.parents):
        if parent >= 0:
            rest[joint] = rest[parent] + 0.2 * KIT_SKELETON.raw_offsets[joint]
    path = np.cumsum(rng.normal(0, 0.01, (40, 1, 3)), 0)
    joints = rest + path + 0.01 * np.cumsum(rng.normal(0, 0.1, (40, 21, 3)), 0)
    features = kit.from_joints(joints)
    assert features.shape == (39, 251)
    back = kit.to_joints(features)
    # Standing on the floor at the origin, facing +Z: distances between joints are what stays.
    for frame in (0, 20, 38):
        true, made = (x[frame] - x[frame][:1] for x in (joints, back))
        np.testing.assert_allclose(np.linalg.norm(made, axis=-1), np.linalg.norm(true, axis=-1), atol=1e-5)
    moved, came = joints[38, 0, 1] - joints[0, 0, 1], back[38, 0, 1] - back[0, 0, 1]
    assert came == pytest.approx(moved, abs=1e-5)
