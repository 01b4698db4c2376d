"""Features by joint: where each column goes, and that all come back."""

import numpy as np
import pytest
import torch

from scamo.errors import ScaMoError
from scamo.motion.per_joint import PerJoint
from scamo.motion.representation import REPRESENTATIONS, Representation


def test_humanml3d_widths_and_columns():
    per_joint = PerJoint.of(263)
    assert per_joint.columns.shape == (22, 13)
    feet = {7: 259, 10: 260, 8: 261, 11: 262}
    assert per_joint.widths == (7, *(13 if joint in feet else 12 for joint in range(1, 22)))
    for joint, row in enumerate(per_joint.columns.tolist()):
        velocity = list(range(193 + 3 * joint, 196 + 3 * joint))
        if joint == 0:
            expected = [0, 1, 2, 3, *velocity]
        else:
            position, rotation = 4 + 3 * (joint - 1), 67 + 6 * (joint - 1)
            expected = [*range(position, position + 3), *range(rotation, rotation + 6), *velocity]
        expected += [feet[joint]] if joint in feet else []
        assert row == expected + [-1] * (13 - len(expected))


def test_snapmogen_widths():
    """Joint 0 has the root's 4 and its own 12; ankles and feet have a contact."""
    names = Representation.of(296).joint_names
    expected = [16 if j == 0 else 13 if "ankle" in n or "foot" in n else 12 for j, n in enumerate(names)]
    assert list(PerJoint.of(296).widths) == expected
    assert sum(expected) == 296


@pytest.mark.parametrize("feature_dim", [r.feature_dim for r in REPRESENTATIONS])
def test_merge_is_the_inverse_of_split(feature_dim):
    per_joint = PerJoint.of(feature_dim)
    used = per_joint.columns[per_joint.columns >= 0]
    assert sorted(used.tolist()) == list(range(feature_dim))
    x = np.random.default_rng(0).normal(size=(2, 5, feature_dim)).astype(np.float32)
    x[0, 0, 0] = np.nan
    padded = per_joint.split(x)
    assert padded.dtype == np.float32
    assert (padded[..., per_joint.columns < 0] == 0).all()
    np.testing.assert_array_equal(per_joint.merge(padded), x)
    tensor = torch.from_numpy(x)
    again = per_joint.split(tensor)
    np.testing.assert_array_equal(again.numpy(), padded)
    np.testing.assert_array_equal(per_joint.merge(again).numpy(), x)


def test_gradient_is_that_of_a_permutation():
    per_joint = PerJoint.of(263)
    x = torch.randn(3, 263, requires_grad=True)
    weight = torch.randn(3, 263)
    (per_joint.merge(per_joint.split(x)) * weight).sum().backward()
    assert torch.equal(x.grad, weight)


def test_bad_input():
    with pytest.raises(ScaMoError, match="feature_dim = 10: expected one of 263"):
        PerJoint.of(10)
    with pytest.raises(ScaMoError, match="features: expected width 263, got 262"):
        PerJoint.of(263).split(np.zeros((4, 262)))
    with pytest.raises(
        ScaMoError, match=r"features by joint: expected shape \(..., 22, 13\), got \(4, 13, 22\)"
    ):
        PerJoint.of(263).merge(torch.zeros(4, 13, 22))
