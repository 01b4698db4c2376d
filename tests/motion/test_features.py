from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter1d
from scipy.spatial.transform import Rotation

from scamo.errors import ScaMoError
from scamo.motion.features import (
    CONTACTS,
    FEATURE_DIM,
    FEATURE_GROUPS,
    FIXED,
    HUMANML3D_LAYOUT,
    KEPT,
    KIT_LAYOUT,
    POSITIONS,
    ROOT,
    ROTATIONS,
    VELOCITIES,
    features_to_joints,
    joints_to_features,
    offsets_from_joints,
)
from scamo.motion.skeleton import (
    DEFAULT_OFFSETS,
    KIT_SKELETON,
    MIRROR_PAIRS,
    PARENTS,
    forward_kinematics,
    mirror_joints,
)


def smooth_motion(frames=120, seed=0, turn=0.02, speed=0.03):
    """A body that walks a curve while all its joints wave about; float64 (frames, 22, 3)."""
    rng = np.random.default_rng(seed)
    time = np.arange(frames)[:, None, None]
    vectors = 0.35 * np.sin(
        0.2 * rng.uniform(0.3, 1, size=(1, 22, 3)) * time + rng.uniform(0, 6, size=(1, 22, 3))
    )
    turns = Rotation.from_rotvec(vectors.reshape(-1, 3))
    yaw = turn * np.arange(frames) + 0.3 * np.sin(0.05 * np.arange(frames))
    local = turns.as_matrix().reshape(frames, 22, 3, 3)
    local[:, 0] = Rotation.from_rotvec(np.outer(yaw, [0, 1, 0])).as_matrix() @ local[:, 0]
    path = np.cumsum(speed * np.stack([np.sin(yaw), 0 * yaw, np.cos(yaw)], axis=-1), axis=0)
    path[:, 1] = 0.95 + 0.02 * np.sin(0.3 * np.arange(frames))
    return forward_kinematics(local, root=path)


def pose():
    joints = forward_kinematics(np.tile([1.0, 0, 0, 0], (22, 1))).astype(np.float64)
    return joints - [0, joints[:, 1].min(), 0]


def turn_about_y(joints, angle):
    return joints @ Rotation.from_rotvec([0, angle, 0]).as_matrix().T


def kit_motion(frames=120, seed=0, turn=0.02):
    """A body of KIT-ML's 21 joints, a metre tall, that walks a curve; float64 (frames, 21, 3) metres.

    Its joints are those of `smooth_motion` that stand where KIT-ML has some, scaled.
    """
    joints = smooth_motion(frames, seed, turn)
    same = [0, 3, 6, 9, 15, 17, 19, 21, 16, 18, 20, 2, 5, 8, None, 11, 1, 4, 7, None, 10]
    kit = np.stack([joints[:, j if j is not None else 0] for j in same], axis=1)
    kit[:, 14], kit[:, 19] = (kit[:, 13] + kit[:, 15]) / 2, (kit[:, 18] + kit[:, 20]) / 2
    return 0.55 * kit


def between(rest, directions):
    """Shortest rotations from one unit vector to (T, 3) others, by quaternions."""
    q = np.concatenate([np.cross(rest, directions), 1 + directions @ rest[:, None]], axis=-1)
    return Rotation.from_quat(q)


def literal_features(joints, target_offsets=None, layout=HUMANML3D_LAYOUT, fixed=False):
    """The published recipe step by step, joint by joint, with scipy's rotations in float64.

    fixed: as scamo.motion.features.FIXED says instead.
    """
    skeleton = layout.skeleton
    joints = np.array(joints, dtype=np.float64) * layout.unit
    rest = skeleton.raw_offsets.astype(np.float64)
    right_hip, left_hip, right_shoulder, left_shoulder = skeleton.facing
    if target_offsets is not None:
        target = np.asarray(target_offsets, dtype=np.float64) * layout.unit
        bones = joints[:, 1:] - joints[:, list(skeleton.parents[1:])]
        leg = [4, 5, 7, 8] if fixed else list(skeleton.leg)
        source_leg = np.linalg.norm(bones[:, [j - 1 for j in leg]], axis=-1).sum(-1)
        source_leg = np.median(source_leg) if fixed else source_leg[0]
        places = {0: joints[:, 0] * np.linalg.norm(target[leg], axis=-1).sum() / source_leg}
        for chain in skeleton.chains:
            for parent, joint in pairwise(chain):
                bone = bones[:, joint - 1]
                turn = between(rest[joint], bone / np.linalg.norm(bone, axis=-1, keepdims=True))
                places[joint] = places[parent] + turn.apply(target[joint])
        joints = np.stack([places[j] for j in range(len(skeleton))], axis=1)
    lowest = joints[..., 1].min(axis=1)
    if fixed:
        around = np.pad(lowest, 2, mode="reflect")
        lowest = [sorted(around[t : t + 5])[2] for t in range(len(joints))]
    joints -= [0, min(lowest), 0]
    joints -= joints[0, 0] * [1, 0, 1]

    def smoothed(across):
        across = across / np.linalg.norm(across, axis=-1, keepdims=True)
        forward = gaussian_filter1d(np.cross([[0, 1, 0]], across), 20, axis=0, mode="nearest")
        return forward / np.linalg.norm(forward, axis=-1, keepdims=True)

    def summed():
        hips = joints[:, right_hip] - joints[:, left_hip]
        return hips + joints[:, right_shoulder] - joints[:, left_shoulder]

    forward = smoothed(summed())[0] if fixed else np.cross([0, 1, 0], summed()[0])
    facing = between(forward / np.linalg.norm(forward), np.array([[0.0, 0, 1]]))[0]
    joints = facing.apply(joints.reshape(-1, 3)).reshape(joints.shape)

    feet = np.diff(joints[:, list(skeleton.feet)], axis=0)
    contacts = (feet**2).sum(-1) < layout.contact
    if fixed:
        contacts &= joints[:-1, list(skeleton.feet), 1] < [0.15, 0.10, 0.15, 0.10]

    across = summed()
    if not fixed:
        across -= 2 * (joints[:, right_hip] - joints[:, left_hip])
    forward = smoothed(across)
    quaternions = np.concatenate(
        [np.cross(forward, [0, 0, 1]), 1 + forward @ np.array([[0.0], [0], [1]])], axis=-1
    )
    quaternions[0] = [0, 0, 0, 1]
    root = Rotation.from_quat(quaternions)
    quaternions = root.as_quat()
    rotations = np.empty((len(joints), len(skeleton), 3, 3))
    absolutes = {0: Rotation.identity(len(joints)) if fixed else root}
    for chain in skeleton.chains:
        before = absolutes[chain[0] if fixed else 0]
        for parent, joint in pairwise(chain):
            bone = joints[:, joint] - joints[:, parent]
            bone = root.apply(bone) if fixed else bone
            absolutes[joint] = between(rest[joint], bone / np.linalg.norm(bone, axis=-1, keepdims=True))
            rotations[:, joint] = (before.inv() * absolutes[joint]).as_matrix()
            before = absolutes[joint]

    y, w = quaternions[:, 1], quaternions[:, 3]
    sine = y[1:] * w[:-1] - w[1:] * y[:-1]
    yaw = np.arctan(sine / (w[1:] * w[:-1] + y[1:] * y[:-1])) if fixed else np.arcsin(sine)
    root_step = root[1:].apply(np.diff(joints[:, 0], axis=0))
    local = joints - joints[:, :1] * [1, 0, 1]
    local = np.stack([r.apply(x) for r, x in zip(root, local, strict=True)])
    steps = np.stack([r.apply(x) for r, x in zip(root[:-1], np.diff(joints, axis=0), strict=True)])
    six = np.swapaxes(rotations[:-1, 1:, :, :2], -1, -2)
    count = len(yaw)
    parts = [yaw[:, None], root_step[:, [0, 2]], joints[:-1, 0, 1:2], local[:-1, 1:], six, steps, contacts]
    return np.concatenate([p.reshape(count, -1) for p in parts], axis=-1)


def test_layout():
    assert [s.stop - s.start for s in FEATURE_GROUPS.values()] == [1, 2, 1, 63, 126, 66, 4]
    assert next(iter(FEATURE_GROUPS.values())).start == ROOT.start == 0
    groups = list(FEATURE_GROUPS.values())
    assert all(a.stop == b.start for a, b in pairwise(groups))
    assert groups[-1].stop == FEATURE_DIM == CONTACTS.stop


def test_official_pair(shared):
    folder = shared / "reference" / "official"
    vectors, joints = np.load(folder / "012314.new_joint_vecs.npy"), np.load(folder / "012314.new_joints.npy")
    np.testing.assert_allclose(features_to_joints(vectors), joints, rtol=0, atol=1e-5)
    features = joints_to_features(joints)
    np.testing.assert_array_equal(features[:, CONTACTS], vectors[:-1, CONTACTS])
    # The published joints lack the last frame: the heading filter feels that 80 frames (4 sigma) back.
    np.testing.assert_allclose(features[:-80], vectors[:-81], rtol=0, atol=2e-5)


def test_raw_clip_to_features_to_published_joints(shared):
    folder = shared / "reference"
    target = np.load(folder / "derived" / "target_offsets_000021.npy")
    raw = np.load(folder / "official" / "000021.joints_raw52.npy")[:, :22]
    np.testing.assert_allclose(offsets_from_joints(raw[0]), target, rtol=0, atol=1e-6)
    features = joints_to_features(raw, target_offsets=target)
    assert features.dtype == np.float32
    reference = np.load(folder / "derived" / "000021_vec_from_raw_numpy.npy")
    np.testing.assert_allclose(features, reference, rtol=0, atol=1e-4)
    joints = np.load(folder / "official" / "000021.new_joints.npy")
    np.testing.assert_allclose(features_to_joints(features), joints, rtol=0, atol=1e-4)


def test_mirrored_pair(shared):
    folder = shared / "reference" / "mirrored"
    vectors, joints = (
        np.load(folder / "M010655.new_joint_vecs.npy"),
        np.load(folder / "M010655.new_joints.npy"),
    )
    np.testing.assert_allclose(features_to_joints(vectors), joints, rtol=0, atol=1e-5)
    features = joints_to_features(joints)
    np.testing.assert_array_equal(features[:, CONTACTS], vectors[:-1, CONTACTS])
    np.testing.assert_allclose(features[:-80], vectors[:-81], rtol=0, atol=2e-5)
    # Mirroring back and forth through the features gives the same clip.
    back = joints_to_features(mirror_joints(features_to_joints(joints_to_features(mirror_joints(joints)))))
    assert len(back) == len(joints) - 2
    np.testing.assert_allclose(back[:-80, :67], vectors[: len(back) - 80, :67], rtol=0, atol=1e-4)


def test_all_real_clips(shared):
    target = np.load(shared / "reference" / "derived" / "target_offsets_000021.npy")
    folder = shared / "data" / "humanml3d_cmu"
    paths = sorted((folder / "joints").glob("*.npy"))
    assert len(paths) == 357
    outside = {}
    for path in paths:
        features = joints_to_features(np.load(path), target_offsets=target)
        error = np.abs(features - np.load(folder / "new_joint_vecs" / path.name))
        assert error.max() < 5e-4, path.stem
        if error.max() > 1e-4:
            outside[path.stem] = error
    # The stored vectors are float32 all the way: where a bone (or the heading) points nearly against its rest
    # direction, 1 + cos cancels there. float64 settles who is right.
    assert set(outside) == {"002848", "003007", "008022", "013583"}
    for name, error in outside.items():
        assert np.delete(error, np.r_[ROTATIONS], axis=1).max() < 1e-4, name
        literal = literal_features(np.load(folder / "joints" / f"{name}.npy"), target)
        features = joints_to_features(np.load(folder / "joints" / f"{name}.npy"), target_offsets=target)
        np.testing.assert_allclose(features, literal, rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("fixed", [False, True])
def test_equals_the_recipe_step_by_step(seed, uniform, fixed):
    joints = smooth_motion(frames=70, seed=seed, turn=0.05)
    target = offsets_from_joints(pose() * 1.2) if uniform else None
    features = joints_to_features(joints, target_offsets=target, variant="fixed" if fixed else "original")
    np.testing.assert_allclose(features, literal_features(joints, target, fixed=fixed), rtol=0, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("uniform", [False, True])
def test_kit_equals_the_recipe_step_by_step(seed, uniform):
    joints = kit_motion(frames=70, seed=seed, turn=0.05)
    target = offsets_from_joints(kit_motion(seed=9)[0] * 1.2, KIT_LAYOUT) if uniform else None
    features = joints_to_features(joints, target_offsets=target, layout=KIT_LAYOUT)
    assert features.shape == (69, 251)
    expected = literal_features(joints, target, KIT_LAYOUT)
    # Millimetres up to thousands in float32, and rotations of one.
    np.testing.assert_allclose(features, expected, rtol=2e-7, atol=1e-6)


def test_where_the_body_stands_and_faces_does_not_matter():
    joints = smooth_motion()
    features = joints_to_features(joints)
    moved = turn_about_y(joints, 2.3) + [3, -0.4, -7]
    np.testing.assert_allclose(joints_to_features(moved), features, rtol=0, atol=2e-6)
    target = offsets_from_joints(pose() * 0.9)
    np.testing.assert_allclose(
        joints_to_features(moved, target_offsets=target),
        joints_to_features(joints, target_offsets=target),
        rtol=0,
        atol=2e-6,
    )


@pytest.mark.parametrize("frames", [2, 3, 120])
@pytest.mark.parametrize("seed", range(3))
def test_round_trip_returns_the_joints_in_the_canonical_place(frames, seed):
    joints = smooth_motion(frames=frames, seed=seed)
    back = features_to_joints(joints_to_features(joints))
    assert back.shape == (frames - 1, 22, 3)
    assert back.dtype == np.float32
    np.testing.assert_allclose(back[0, 0, [0, 2]], 0, atol=1e-7)
    # Frame by frame the poses agree up to the one rigid move that the format takes out.
    joints = joints - [0, joints[..., 1].min(), 0] - joints[0, 0] * [1, 0, 1]
    a, b = joints[0, 16], back[0, 16].astype(np.float64)
    angle = np.arctan2(b[0], b[2]) - np.arctan2(a[0], a[2])
    np.testing.assert_allclose(turn_about_y(joints, angle)[:-1], back, rtol=0, atol=2e-5)


def test_retargeting_gives_the_uniform_bones_and_scales_the_path():
    joints = smooth_motion()
    target = offsets_from_joints(pose() * 1.1)
    back = features_to_joints(joints_to_features(joints, target_offsets=target))
    np.testing.assert_allclose(
        np.linalg.norm(back[:, 1:] - back[:, list(PARENTS[1:])], axis=-1),
        np.tile(np.linalg.norm(target[1:], axis=-1), (len(back), 1)),
        atol=1e-5,
    )
    plain = features_to_joints(joints_to_features(joints))
    np.testing.assert_allclose(back[-1, 0, [0, 2]], 1.1 * plain[-1, 0, [0, 2]], atol=1e-4)
    # Only the lengths count: a T-pose says the same as the format's own rest directions.
    np.testing.assert_allclose(
        joints_to_features(joints, target_offsets=DEFAULT_OFFSETS),
        joints_to_features(joints, target_offsets=offsets_from_joints(pose())),
        rtol=0,
        atol=1e-6,
    )


def test_standing_still():
    features = joints_to_features(np.tile(pose(), (30, 1, 1)))
    np.testing.assert_allclose(features[:, :3], 0, atol=1e-7)
    np.testing.assert_allclose(features[:, 3], pose()[0, 1], atol=1e-6)
    np.testing.assert_allclose(features[:, POSITIONS].reshape(-1, 21, 3)[7], pose()[1:], atol=1e-6)
    np.testing.assert_allclose(features[:, VELOCITIES], 0, atol=1e-7)
    np.testing.assert_array_equal(features[:, CONTACTS], 1)
    six = features[0, ROTATIONS].reshape(21, 2, 3)
    np.testing.assert_allclose(np.linalg.norm(six, axis=-1), 1, atol=1e-6)
    np.testing.assert_allclose((six[:, 0] * six[:, 1]).sum(-1), 0, atol=1e-6)
    # The thigh of the T-pose hangs straight down, as in the format's rest pose.
    hip_turn = np.linalg.norm([0.09, 0.06])
    np.testing.assert_allclose(six[0, 0], [0.09 / hip_turn, -0.06 / hip_turn, 0], atol=1e-6)


def test_walking_straight_gives_the_speed_forward_whatever_the_first_direction():
    joints = np.tile(pose(), (50, 1, 1)) + 0.05 * np.arange(50)[:, None, None] * np.array([0, 0, 1])
    features = joints_to_features(turn_about_y(joints, -1.1))
    np.testing.assert_allclose(features[:, 1:3], np.tile([0, 0.05], (49, 1)), atol=1e-6)
    velocities = features[:, VELOCITIES].reshape(-1, 22, 3)
    np.testing.assert_allclose(velocities, np.broadcast_to([0, 0, 0.05], velocities.shape), atol=1e-6)
    # 0.05² is over the threshold of 0.002, 0.04² is not.
    np.testing.assert_array_equal(features[:, CONTACTS], 0)
    slower = np.tile(pose(), (50, 1, 1)) + 0.04 * np.arange(50)[:, None, None] * np.array([0, 0, 1])
    np.testing.assert_array_equal(joints_to_features(slower)[:, CONTACTS], 1)


def test_constant_turn_gives_the_half_angle_and_a_sign_flip_at_180_degrees():
    rate = 0.03
    joints = np.stack([turn_about_y(pose(), rate * t) for t in range(400)])
    yaw = joints_to_features(joints)[:, 0]
    # Away from the ends the filter keeps a constant rate; the sign is that of the turn back to +Z.
    inner = yaw[85:-85]
    flips = np.flatnonzero(np.abs(inner + rate / 2) > 1e-5)
    assert len(flips) == 1, "the heading passes 180 degrees once in these frames"
    assert inner[flips[0]] == pytest.approx(rate / 2, abs=1e-5)
    crossing = 85 + int(flips[0])
    assert (
        rate * crossing <= np.pi * (2 * round(rate * crossing / np.pi / 2 - 0.5) + 1) <= rate * (crossing + 1)
    )


def mirrored_features(features):
    """What mirroring does to each channel, written down from the definition."""
    swap = np.arange(22)
    for a, b in MIRROR_PAIRS:
        swap[[a, b]] = b, a
    out = features.copy()
    out[:, [0, 1]] *= -1
    others = swap[1:] - 1
    out[:, POSITIONS] = (features[:, POSITIONS].reshape(-1, 21, 3)[:, others] * [-1, 1, 1]).reshape(-1, 63)
    # M R M with M = diag(-1, 1, 1) negates the entries that mix x with y or z.
    six = features[:, ROTATIONS].reshape(-1, 21, 2, 3)[:, others] * [[1, -1, -1], [-1, 1, 1]]
    out[:, ROTATIONS] = six.reshape(-1, 126)
    out[:, VELOCITIES] = (features[:, VELOCITIES].reshape(-1, 22, 3)[:, swap] * [-1, 1, 1]).reshape(-1, 66)
    out[:, CONTACTS] = features[:, CONTACTS][:, [2, 3, 0, 1]]
    return out


@pytest.mark.parametrize("seed", range(3))
def test_mirroring_commutes_with_features(seed):
    joints = smooth_motion(seed=seed)
    np.testing.assert_allclose(
        joints_to_features(mirror_joints(joints)),
        mirrored_features(joints_to_features(joints)),
        rtol=0,
        atol=2e-6,
    )


def test_another_frame_rate_keeps_the_contact_speed_and_the_filter_time():
    speed = 0.8  # m/s, below the threshold of sqrt(0.002) m * 20 = 0.894 m/s
    for fps in (20, 30, 60):
        step = speed / fps * np.arange(20)[:, None, None] * np.array([0, 0, 1])
        assert (joints_to_features(pose() + step, fps=fps)[:, CONTACTS] == 1).all()
        assert (joints_to_features(pose() + 1.2 * step, fps=fps)[:, CONTACTS] == 0).all()
    joints = smooth_motion(frames=241, turn=0.01)
    coarse, fine = joints_to_features(joints[::2]), joints_to_features(joints, fps=40)
    heading = np.cumsum(coarse[:, 0])[20:100]
    np.testing.assert_allclose(np.cumsum(fine[:, 0])[1::2][20:100], heading, atol=2e-3)


def test_torch_is_batched_equal_and_differentiable():
    features = np.stack([joints_to_features(smooth_motion(seed=s)) for s in range(2)])
    expected = features_to_joints(features)
    assert expected.shape == (2, 119, 22, 3)
    np.testing.assert_array_equal(expected[1], features_to_joints(features[1]))
    tensor = torch.from_numpy(features)
    joints = features_to_joints(tensor)
    assert joints.dtype == torch.float32
    np.testing.assert_allclose(joints.numpy(), expected, atol=2e-5)
    assert features_to_joints(tensor.bfloat16()).dtype == torch.float32
    assert features_to_joints(features.astype(np.float64)).dtype == np.float64
    small = tensor[:, :6].double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: features_to_joints(x), small)
    features_to_joints(small).square().sum().backward()
    assert (small.grad[..., 67:] == 0).all()


def with_value(frame, joint, value):
    joints = np.tile(pose(), (8, 1, 1))
    joints[frame, joint, 2] = value
    return joints


def narrow_shoulders():
    joints = np.tile(pose(), (4, 1, 1))
    joints[:, [16, 17], 0] = joints[:, [1, 2], 0]
    joints[:, [16, 17], 2] = joints[:, [1, 2], 2]
    joints[:, [16, 17], 1] = 1.4
    return joints


def no_left_wrist():
    joints = np.tile(pose(), (4, 1, 1))
    joints[2, 20] = joints[2, 18]
    return joints


def on_a_line():
    joints = np.tile(pose(), (4, 1, 1))
    joints[0, [1, 2, 16, 17], 0] = 0
    return joints


@pytest.mark.parametrize(
    ("joints", "options", "message"),
    [
        (np.zeros((5, 21, 3)), {}, r"joints: expected shape \(frames, 22, 3\), got \(5, 21, 3\)"),
        (pose(), {}, r"joints: expected shape .* got \(22, 3\)"),
        (pose()[None], {}, r"at least 2 frames make features, got 1"),
        (with_value(3, 7, np.nan), {}, r"frame 3, joint 7 \(left_ankle\): z is nan"),
        (with_value(6, 21, -np.inf), {}, r"frame 6, joint 21 \(right_wrist\): z is -inf"),
        (no_left_wrist(), {}, r"frame 2, joint 20 \(left_wrist\) lies on its parent left_elbow"),
        (on_a_line(), {}, r"frame 0 faces nowhere"),
        (narrow_shoulders(), {}, r"frame 0 faces nowhere: around it shoulders and hips are equally wide"),
        (with_value(0, 0, 0), {"fps": 0}, r"fps: expected a positive number, got 0"),
        (with_value(0, 0, 0), {"fps": float("nan")}, r"fps: expected a positive number, got nan"),
        (
            with_value(0, 0, 0),
            {"target_offsets": np.ones((21, 3))},
            r"target_offsets: expected shape \(22, 3\)",
        ),
        (with_value(0, 0, 0), {"target_offsets": np.zeros((22, 3))}, r"target_offsets: joint 1 \(left_hip\)"),
    ],
)
def test_bad_input_is_named(joints, options, message):
    with pytest.raises(ScaMoError, match=message):
        joints_to_features(joints, **options)


@pytest.mark.parametrize("shape", [(10, 262), (263,)])
def test_features_of_another_shape_are_named(shape):
    with pytest.raises(ScaMoError, match=r"features: expected shape \(\.\.\., frames, 263\), got"):
        features_to_joints(np.zeros(shape))
    with pytest.raises(ScaMoError, match=r"features: expected shape"):
        features_to_joints(torch.zeros(shape))


def test_bones_against_their_rest_direction_stay_finite_rotations():
    joints = np.tile(pose(), (4, 1, 1))
    # Shins up, toes back, head back: each opposite to the format's rest direction.
    joints[:, 7] = joints[:, 4] + [0, 0.4, 0]
    joints[:, 10] = joints[:, 7] - [0, 0, 0.1]
    joints[:, 15] = joints[:, 12] - [0, 0, 0.1]
    six = joints_to_features(joints)[:, ROTATIONS].reshape(-1, 21, 2, 3)
    assert np.isfinite(six).all()
    np.testing.assert_allclose(np.linalg.norm(six, axis=-1), 1, atol=1e-6)
    np.testing.assert_allclose((six[..., 0, :] * six[..., 1, :]).sum(-1), 0, atol=1e-6)


def test_input_is_left_alone():
    joints = smooth_motion(frames=10).astype(np.float32)
    before = joints.copy()
    joints_to_features(joints, target_offsets=DEFAULT_OFFSETS)
    np.testing.assert_array_equal(joints, before)


@pytest.mark.parametrize("frames", [2, 120])
def test_kit_round_trip(frames):
    joints = kit_motion(frames)
    features = joints_to_features(joints, layout=KIT_LAYOUT)
    back = features_to_joints(features, KIT_LAYOUT)
    assert (back.shape, back.dtype) == ((frames - 1, 21, 3), np.float32)
    np.testing.assert_allclose(back, placed(joints, back), rtol=0, atol=2e-6)
    both = features_to_joints(torch.from_numpy(np.stack([features, features])), KIT_LAYOUT)
    np.testing.assert_allclose(both[1].numpy(), back, atol=1e-6)


def test_kit_counts_in_millimetres_at_its_own_rate():
    standing = np.tile(kit_motion(2)[:1], (9, 1, 1))
    # 0.05 mm² a frame at 12.5 frames a second: 2.8 mm/s.
    for speed, contact in ((0.0027, 1), (0.0029, 0)):
        for fps in (12.5, 50):
            walk = standing + speed / fps * np.arange(9)[:, None, None] * np.array([0, 0, 1.0])
            features = joints_to_features(walk, layout=KIT_LAYOUT, fps=fps)
            assert (features[:, KIT_LAYOUT.contacts] == contact).all()
            np.testing.assert_allclose(np.hypot(*features[:, 1:3].T), 1000 * speed / fps, rtol=1e-4)
    with pytest.raises(ScaMoError, match="variant: KIT-ML has no 'fixed' one"):
        joints_to_features(standing, layout=KIT_LAYOUT, variant="fixed")
    with pytest.raises(ScaMoError, match=r"joints: expected shape \(frames, 21, 3\)"):
        joints_to_features(np.zeros((5, 22, 3)), layout=KIT_LAYOUT)
    standing[3, 20, 0] = np.nan
    with pytest.raises(ScaMoError, match=r"frame 3, joint 20 \(left_foot\): x is nan"):
        joints_to_features(standing, layout=KIT_LAYOUT)


def test_kit_bones_point_where_the_published_mean_says(shared):
    """Which way each bone rests, and which chain it is in, shows in the mean of its rotation."""
    mean = np.load(shared / "reference" / "stats" / "kit_ml_Mean.npy")
    place = np.concatenate([[[0, mean[3], 0]], mean[KIT_LAYOUT.positions].reshape(-1, 3)])
    six = mean[KIT_LAYOUT.rotations].reshape(20, 2, 3)
    six /= np.linalg.norm(six, axis=-1, keepdims=True)
    matrices = np.stack([six[:, 0], six[:, 1], np.cross(six[:, 0], six[:, 1])], axis=-1)
    for chain in KIT_SKELETON.chains:
        turn = np.eye(3)
        for parent, joint in pairwise(chain):
            turn = turn @ matrices[joint - 1]
            bone = turn @ KIT_SKELETON.raw_offsets[joint]
            found = place[joint] - place[parent]
            assert bone @ found / np.linalg.norm(found) > 0.6, joint
    # Which of its four joints are feet: those are closest to the floor, and hardly ever under 2.8 mm/s.
    assert set(np.argsort(place[:, 1])[:4]) == set(KIT_SKELETON.feet)
    assert (mean[KIT_LAYOUT.contacts] < 0.02).all()


def placed(joints, like):
    """The joints, all frames but the last, moved as a whole onto the first frame of `like`."""
    joints = joints - joints[0, 0] * [1, 0, 1]
    joints = joints + [0, like[0, 0, 1] - joints[0, 0, 1], 0]
    side = KIT_SKELETON.facing[0] if joints.shape[1] == 21 else 16
    a, b = joints[0, side], like[0, side].astype(np.float64)
    angle = np.arctan2(b[0], b[2]) - np.arctan2(a[0], a[2])
    return turn_about_y(joints, angle)[:-1]


def fixed_features(joints, **options):
    return joints_to_features(joints, variant="fixed", **options)


def spread(pose_frame):
    """The pose with shoulders over the hips' line and feet apart: one with a heading under any reading."""
    return np.tile(pose_frame, (60, 1, 1)).astype(np.float64)


def straight_motion(frames=120):
    """A body whose limbs wave while trunk and heading stay; its feet are on the floor or fast."""
    joints = np.tile(pose(), (frames, 1, 1))
    time = np.arange(frames)
    swing = 0.15 * np.sin(0.5 * time)
    for hand, elbow, sign in ((20, 18, 1), (21, 19, -1)):
        joints[:, [hand, elbow], 2] += np.stack([sign * 2 * swing, sign * swing], axis=1)
    joints[:, [6, 9, 12, 15], 2] = joints[:, [3], 2]
    return joints + 0.03 * time[:, None, None] * np.array([0, 0, 1.0])


def test_the_fixed_variant_equals_the_original_where_no_oddity_occurs():
    joints = straight_motion()
    target = offsets_from_joints(pose() * 1.1)
    for options in ({}, {"target_offsets": target}, {"fps": 30}):
        features = joints_to_features(joints, **options)
        assert features.std(axis=0).max() > 0.1
        np.testing.assert_allclose(fixed_features(joints, **options), features, rtol=0, atol=1e-6)


@pytest.mark.parametrize("frames", [2, 3, 120])
def test_the_fixed_variant_recovers_joints_and_does_not_depend_on_the_place(frames):
    joints = smooth_motion(frames=frames, turn=0.08)
    features = fixed_features(joints)
    back = features_to_joints(features)
    np.testing.assert_allclose(placed(joints, back), back, rtol=0, atol=2e-5)
    moved = turn_about_y(joints, 2.3) + [3, -0.4, -7]
    np.testing.assert_allclose(fixed_features(moved), features, rtol=0, atol=3e-6)
    np.testing.assert_allclose(
        fixed_features(mirror_joints(joints)), mirrored_features(features), rtol=0, atol=3e-6
    )


def test_fixed_recovers_every_real_clip_and_the_original_loses_those_that_turn(shared):
    folder = shared / "data" / "humanml3d_cmu" / "joints"
    lost = 0
    for path in sorted(folder.glob("*.npy")):
        joints = np.load(path).astype(np.float64)
        back = features_to_joints(fixed_features(joints))
        np.testing.assert_allclose(placed(joints, back), back, rtol=0, atol=2e-4, err_msg=path.stem)
        back = features_to_joints(joints_to_features(joints))
        lost += bool(np.abs(placed(joints, back) - back).max() > 0.01)
    assert lost > 10


def twisted():
    """A body that stands still with its hips turned by 20 degrees."""
    joints = spread(pose())
    turn = Rotation.from_rotvec([0, np.deg2rad(20), 0]).as_matrix()
    joints[:, [1, 2]] = (joints[:, [1, 2]] - joints[:, :1]) @ turn.T + joints[:, :1]
    return joints


def test_fixed_heading_adds_hips_and_shoulders():
    joints = twisted()
    wrong, right = joints_to_features(joints), fixed_features(joints)
    # Hips of 0.18 m and shoulders of 0.36 m: the sum faces 6.7 degrees to the left, the difference as far to
    # the right and more. What stands still must not turn.
    assert np.degrees(2 * np.abs(wrong[0, 0])) > 20
    np.testing.assert_allclose(right[:, 0], 0, atol=1e-7)
    # Shoulders as wide as the hips leave the original without any heading.
    with pytest.raises(ScaMoError, match="faces nowhere"):
        joints_to_features(narrow_shoulders())
    np.testing.assert_allclose(fixed_features(narrow_shoulders())[:, 0], 0, atol=1e-7)


def turning(rate, frames):
    return np.stack([turn_about_y(pose(), rate * t) for t in range(frames)])


def test_fixed_first_heading_is_the_filtered_one():
    joints = turning(0.03, 100)  # less than half a turn
    wrong, right = joints_to_features(joints)[:, 0], fixed_features(joints)[:, 0]
    # The filter looks ahead, so the first filtered heading is not the pose's: a step as large as ten others.
    assert abs(wrong[0]) > 10 * abs(wrong[1])
    np.testing.assert_allclose(right[0], right[1], rtol=0.05)
    np.testing.assert_allclose(right[1:], wrong[1:], atol=1e-6)


def test_fixed_half_turn_keeps_its_sign():
    joints = turning(0.03, 400) + 0.05 * np.arange(400)[:, None, None] * np.array([0, 0, 1])
    wrong, right = joints_to_features(joints), fixed_features(joints)
    assert (right[:, 0] < 0).all()
    flipped = np.flatnonzero(wrong[:, 0] > 0)
    assert len(flipped) == 2
    for features, error in ((right, 0), (wrong, 1)):
        back = features_to_joints(features)
        found = np.abs(back - placed(joints, back)).max()
        assert (found > 0.1) if error else (found < 1e-4)


def test_fixed_rotations_do_not_hold_the_heading():
    joints = smooth_motion(frames=2, seed=3)[0]
    joints = np.stack([turn_about_y(joints, 0.02 * t) for t in range(300)])
    inner = slice(100, 200)  # clear of the filter's ends
    wrong, right = (
        np.ptp(f[inner, ROTATIONS].reshape(-1, 21, 6), axis=0).max(-1)
        for f in (joints_to_features(joints), fixed_features(joints))
    )
    assert right.max() < 1e-5
    assert (wrong > 0.1).all()


def test_fixed_arms_leave_the_spine():
    """Rotations along the tree, applied to the rest pose, give the bones' directions in the heading frame."""
    joints = smooth_motion(frames=40, turn=0)
    bones = joints[:, 1:] - joints[:, list(PARENTS[1:])]
    bones /= np.linalg.norm(bones, axis=-1, keepdims=True)
    rest = HUMANML3D_LAYOUT.rest

    def off(features):
        six = features[:, ROTATIONS].reshape(-1, 21, 2, 3).astype(np.float64)
        local = np.concatenate([six, np.cross(six[..., 0, :], six[..., 1, :])[..., None, :]], axis=-2)
        local = local.swapaxes(-1, -2)
        position = features[:, POSITIONS].reshape(-1, 21, 3)
        place = np.concatenate([np.zeros((len(six), 1, 3)), position], axis=1)
        place[:, 0, 1] = features[:, 3]
        absolute = {0: np.broadcast_to(np.eye(3), (len(six), 3, 3))}
        errors = []
        for joint in range(1, 22):
            absolute[joint] = absolute[PARENTS[joint]] @ local[:, joint - 1]
            bone = place[:, joint] - place[:, PARENTS[joint]]
            bone /= np.linalg.norm(bone, axis=-1, keepdims=True)
            errors.append(np.abs(absolute[joint] @ rest[joint - 1] - bone).max())
        return np.array(errors)

    assert off(fixed_features(joints)).max() < 1e-5
    wrong = np.flatnonzero(off(joints_to_features(joints)) > 0.3) + 1
    assert {13, 14, 16, 17} <= set(wrong)


def test_fixed_contacts_want_a_low_foot():
    joints = spread(pose())
    joints[:, [4, 7, 10]] += [0, 0.4, 0.1]  # the left foot is held up
    wrong, right = joints_to_features(joints), fixed_features(joints)
    np.testing.assert_array_equal(wrong[:, CONTACTS], 1)
    np.testing.assert_array_equal(right[:, CONTACTS], np.tile([0, 0, 1, 1], (59, 1)))


@pytest.mark.parametrize("frame", [0, 30, 59])
def test_fixed_floor_ignores_one_bad_frame(frame):
    joints = spread(pose())
    good = fixed_features(joints)
    joints[frame, 10, 1] -= 0.3
    assert joints_to_features(joints)[0, 3] - good[0, 3] == pytest.approx(0.3, abs=1e-6)
    np.testing.assert_allclose(fixed_features(joints)[:, 3], good[:, 3], atol=1e-6)
    # What lasts is real.
    joints[20:40, 10, 1] = good[0, 3] - 2
    assert fixed_features(joints)[0, 3] == pytest.approx(joints_to_features(joints)[0, 3], abs=1e-6)


def test_fixed_leg_is_not_that_of_the_first_frame():
    joints = straight_motion()
    target = offsets_from_joints(pose())
    joints[0, [8, 11], 1] -= 0.4  # a bad right shin
    speed = joints_to_features(joints, target_offsets=target)[:, 2]
    assert abs(speed / 0.03 - 1).min() > 0.2
    np.testing.assert_allclose(fixed_features(joints, target_offsets=target)[:, 2], 0.03, rtol=1e-4)


def test_the_lists_of_differences():
    assert set(FIXED).isdisjoint(KEPT)
    assert all(isinstance(text, str) and text for text in (FIXED | KEPT).values())
    with pytest.raises(ScaMoError, match="variant: expected one of original, fixed, got 'new'"):
        joints_to_features(spread(pose()), variant="new")
