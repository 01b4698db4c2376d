"""What follows from the names of a body's joints, for every body that features are made for."""

from __future__ import annotations

import numpy as np
import pytest

from scamo.errors import ScaMoError
from scamo.motion.body import Body, known_bodies, known_counts
from scamo.motion.skeleton import LEFT_FOOT, RIGHT_FOOT


@pytest.mark.parametrize("body", known_bodies(), ids=len)
def test_sides_feet_hands_and_head(body):
    names = body.names
    assert body.parents[0] == -1
    assert all(0 <= parent < joint for joint, parent in enumerate(body.parents[1:], 1))
    assert [[names[joint] for joint in foot] for foot in body.feet] == [
        ["left_ankle", "left_foot"],
        ["right_ankle", "right_foot"],
    ]
    assert [names[joint] for joint in body.wrists] == ["left_wrist", "right_wrist"]
    assert names[body.head] in ("head", "upper_neck")
    assert set(body.ends) == {body.head, *body.wrists, *(foot[1] for foot in body.feet)}
    # A T-pose: everything of the left on +X, the right its mirror image, head above and feet below the root.
    places = body.rest.astype(np.float64).copy()
    for joint, parent in enumerate(body.parents[1:], 1):
        places[joint] += places[parent]
    for joint, side in enumerate(body.sides):
        if side == "left":
            other = names.index(names[joint].replace("left", "right"))
            np.testing.assert_allclose(places[joint], places[other] * [-1, 1, 1])
            assert places[joint, 0] > 0
    assert places[body.head, 1] > 0.3
    assert places[body.feet[0][1], 1] < -0.8
    assert len(body.widths) == len(body)
    # Those between hips and shoulders.
    assert [body.parents[joint] for joint in body.spine] == [0, *body.spine[:-1]]
    assert len(body.children[body.spine[-1]]) == 3


def test_the_22_joints_and_others():
    body = Body.of(22)
    assert body.feet == (LEFT_FOOT, RIGHT_FOOT)
    assert body.spine == (3, 6, 9)
    assert len(body.bones) == 21
    assert Body.of(21).bones == list(range(1, 21))
    assert 15 not in Body.of(24).bones  # its pelvis lies on the root
    assert known_counts() == "21, 22 or 24"
    with pytest.raises(ScaMoError, match="joints: expected 21, 22 or 24 of them, got 20"):
        Body.of(20)
