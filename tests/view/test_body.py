import numpy as np
import pytest

pytest.importorskip("viser")

from scamo.motion.skeleton import PARENTS, quaternions_to_matrices
from scamo.view.body import bone_poses, places


@pytest.mark.parametrize("count", [1, 4, 5, 6, 13])
def test_motions_stand_on_the_ground_and_apart(make_motion, count):
    motions = [make_motion(metres=metres) for metres in np.linspace(0, 4, count)]
    placed = [motion.joints + place for motion, place in zip(motions, places(motions), strict=True)]
    for joints in placed:
        assert joints[..., 1].min() == pytest.approx(0, abs=1e-5)
    low = np.array([joints.min((0, 1))[[0, 2]] for joints in placed])
    high = np.array([joints.max((0, 1))[[0, 2]] for joints in placed])
    for i in range(count):
        for j in range(i):
            gap = np.maximum(low[i] - high[j], low[j] - high[i])
            assert gap.max() > 0.69, (i, j)
    np.testing.assert_allclose(low.min(0), -high.max(0), atol=1.0)
    assert low[0, 0] < low[min(count, 5) - 1, 0] or count == 1


def test_sticks_reach_from_parent_to_child():
    joints = np.random.default_rng(0).normal(size=(3, 22, 3)).astype(np.float32)
    joints[0, 4] = joints[0, 1] - [0, 0, 0.4]  # straight against +Z
    joints[1, 5] = joints[1, 2]  # of no length
    middles, quaternions, lengths = bone_poses(joints)
    half = 0.5 * lengths[..., None] * quaternions_to_matrices(quaternions)[..., 2]
    np.testing.assert_allclose(middles + half, joints[:, 1:], atol=1e-5)
    np.testing.assert_allclose(middles - half, joints[:, PARENTS[1:]], atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(quaternions, axis=-1), 1, atol=1e-5)
