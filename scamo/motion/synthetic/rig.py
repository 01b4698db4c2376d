"""From the channels that drive a body to its 22 joints: forward kinematics above, planted feet below.

A clip is two arrays. `body` (T, N_CHANNELS): where the root is, how the trunk bends, where the arms point.
`feet` (T, 2, 5): x, y, z of the ball of the left and right foot (metres, world), its yaw and its pitch
(radians, heel up positive). The legs are solved from hips and ankles (two bones, closed form), so a foot that
the channels keep in place stays in place whatever the trunk does. All steps work on whole arrays of frames.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from scamo.motion.skeleton import DEFAULT_OFFSETS, N_JOINTS

# Columns of `body`. Metres and radians.
X, Z, YAW = 0, 1, 2  # the root on the ground
RISE, SWAY, SHIFT = 3, 4, 5  # pelvis against its standing place: up, to its left, to its front
PITCH, ROLL, HIP_YAW = 6, 7, 8  # pelvis
BEND, TWIST, LEAN = 9, 10, 11  # spine, spread over its three joints: forward, to the left, sideways
NOD, LOOK = 12, 13  # head
ARMS = 14  # left then right: upper arm (forward, outward), forearm (forward, outward) from hanging
N_CHANNELS = 22
FOOT_X, FOOT_Y, FOOT_Z, FOOT_YAW, FOOT_PITCH = range(5)

FLOOR = 0.02  # height of the ball of a flat foot
REACH = 0.995  # of a straight leg: a knee never locks fully


@dataclass(frozen=True)
class Body:
    """Sizes of one body. offsets (22, 3) float64 metres; the rest are lengths in metres drawn from it."""

    offsets: np.ndarray
    thigh: float
    shin: float
    leg: float
    upper_arm: float
    forearm: float
    ankle_height: float
    stand_height: float  # pelvis joint, standing with easy knees
    stance: float  # half the distance between the ankles
    toe_out: float


def make_body(rng: np.random.Generator) -> Body:
    """A body of its own size: overall 0.92 to 1.08, trunk, arms and legs vary by 3% more each."""
    size = rng.uniform(0.92, 1.08)
    legs, trunk, arms, width = rng.uniform(0.97, 1.03, 4)
    offsets = DEFAULT_OFFSETS.astype(np.float64) * size
    offsets[[4, 5, 7, 8]] *= legs
    offsets[[3, 6, 9, 12]] *= trunk
    offsets[[18, 19, 20, 21]] *= arms
    offsets[[1, 2, 13, 14, 16, 17], 0] *= width
    length = np.linalg.norm(offsets, axis=1)
    leg = length[4] + length[7]
    ankle = FLOOR - offsets[10, 1]
    ease = rng.uniform(0.975, 0.99)
    return Body(
        offsets=offsets,
        thigh=length[4],
        shin=length[7],
        leg=leg,
        upper_arm=length[18],
        forearm=length[20],
        ankle_height=ankle,
        stand_height=ankle + ease * leg - offsets[1, 1],
        stance=offsets[1, 0] * rng.uniform(0.9, 1.35),
        toe_out=rng.uniform(0.03, 0.22),
    )


def rotation_x(angle: np.ndarray) -> np.ndarray:
    """(T) radians -> (T, 3, 3): positive leans +Y towards +Z."""
    c, s = np.cos(angle), np.sin(angle)
    out = np.zeros((*angle.shape, 3, 3))
    out[..., 0, 0] = 1
    out[..., 1, 1] = out[..., 2, 2] = c
    out[..., 1, 2], out[..., 2, 1] = -s, s
    return out


def rotation_y(angle: np.ndarray) -> np.ndarray:
    """(T) radians -> (T, 3, 3): positive turns +Z towards +X, so to the left."""
    c, s = np.cos(angle), np.sin(angle)
    out = np.zeros((*angle.shape, 3, 3))
    out[..., 1, 1] = 1
    out[..., 0, 0] = out[..., 2, 2] = c
    out[..., 0, 2], out[..., 2, 0] = s, -s
    return out


def rotation_yxz(yaw: np.ndarray, pitch: np.ndarray, roll: np.ndarray) -> np.ndarray:
    """(T) radians each -> (T, 3, 3), Ry(yaw) Rx(pitch) Rz(roll)."""
    cy, sy, cx, sx, cz, sz = (
        np.cos(yaw),
        np.sin(yaw),
        np.cos(pitch),
        np.sin(pitch),
        np.cos(roll),
        np.sin(roll),
    )
    out = np.empty((*yaw.shape, 3, 3))
    sysx, cysx = sy * sx, cy * sx
    out[..., 0, 0] = cy * cz + sysx * sz
    out[..., 0, 1] = sysx * cz - cy * sz
    out[..., 0, 2] = sy * cx
    out[..., 1, 0] = cx * sz
    out[..., 1, 1] = cx * cz
    out[..., 1, 2] = -sx
    out[..., 2, 0] = cysx * sz - sy * cz
    out[..., 2, 1] = sy * sz + cysx * cz
    out[..., 2, 2] = cy * cx
    return out


def arm_direction(forward: np.ndarray, outward: np.ndarray, side: int) -> np.ndarray:
    """Unit vectors (T, 3) in the chest's frame; both angles 0: hanging. side: +1 left, -1 right."""
    c = np.cos(outward)
    return np.stack((side * np.sin(outward), -np.cos(forward) * c, np.sin(forward) * c), axis=-1)


def foot_bone(body: Body, side: int, yaw: np.ndarray, pitch: np.ndarray) -> np.ndarray:
    """Ankle -> ball of the foot (T, 3) for foot `side` (0 left, 1 right)."""
    x, y, z = body.offsets[10 + side]
    c, s = np.cos(pitch), np.sin(pitch)
    along = s * y + c * z
    cy, sy = np.cos(yaw), np.sin(yaw)
    return np.stack((cy * x + sy * along, c * y - s * z, cy * along - sy * x), axis=-1)


def _smooth_below(limit: np.ndarray, window: int = 5) -> np.ndarray:
    """The largest smooth curve below (T) `limit`, nearly: a running minimum, then a running mean."""
    reach = window // 2
    padded = np.pad(limit, reach * 2, mode="edge")
    lowest = np.lib.stride_tricks.sliding_window_view(padded, window).min(axis=-1)
    sums = np.concatenate(([0.0], np.cumsum(lowest)))
    return (sums[window:] - sums[:-window]) / window


def pose(body: Body, channels: np.ndarray, feet: np.ndarray) -> np.ndarray:
    """Joints (T, 22, 3) float64 metres of body channels (T, N_CHANNELS) and feet (T, 2, 5).

    The pelvis goes where the channels say, lower where a leg would not reach its foot. A leg that still does
    not reach drags its foot, so the bones keep their lengths in every case.
    """
    offsets = body.offsets
    n = len(channels)
    joints = np.empty((n, N_JOINTS, 3))
    yaw = channels[:, YAW] + channels[:, HIP_YAW]
    pelvis_turn = rotation_yxz(yaw, channels[:, PITCH], channels[:, ROLL])
    c, s = np.cos(channels[:, YAW]), np.sin(channels[:, YAW])
    pelvis = np.empty((n, 3))
    pelvis[:, 0] = channels[:, X] + c * channels[:, SWAY] + s * channels[:, SHIFT]
    pelvis[:, 2] = channels[:, Z] + c * channels[:, SHIFT] - s * channels[:, SWAY]

    hips = pelvis_turn @ offsets[1:3].T  # (T, 3, 2)
    limit = body.stand_height + channels[:, RISE]
    ankles = np.empty((n, 2, 3))
    bones = np.empty((n, 2, 3))
    for side in (0, 1):
        foot = feet[:, side]
        bones[:, side] = foot_bone(body, side, foot[:, FOOT_YAW], foot[:, FOOT_PITCH])
        ankles[:, side] = foot[:, :3] - bones[:, side]
        dx = ankles[:, side, 0] - pelvis[:, 0] - hips[:, 0, side]
        dz = ankles[:, side, 2] - pelvis[:, 2] - hips[:, 2, side]
        room = (REACH * body.leg) ** 2 - dx * dx - dz * dz
        height = ankles[:, side, 1] + np.sqrt(np.maximum(room, (0.3 * body.leg) ** 2)) - hips[:, 1, side]
        limit = np.minimum(limit, height)
    wanted = body.stand_height + channels[:, RISE]
    pelvis[:, 1] = wanted + _smooth_below(limit - wanted)
    joints[:, 0] = pelvis

    for side in (0, 1):
        hip = pelvis + hips[:, :, side]
        reach = ankles[:, side] - hip
        distance = np.sqrt(np.einsum("ij,ij->i", reach, reach))
        direction = reach / distance[:, None]
        longest, shortest = body.leg * 0.9995, abs(body.thigh - body.shin) + 0.15 * body.leg
        distance = np.clip(distance, shortest, longest)
        along = (body.thigh**2 - body.shin**2 + distance**2) / (2 * distance)
        aside = np.sqrt(np.maximum(body.thigh**2 - along**2, 0.0))
        # The knee bends to where "forward" goes when a hanging leg is swung into `direction`.
        facing = 0.5 * (yaw + feet[:, side, FOOT_YAW])
        ahead = np.zeros((n, 3))
        ahead[:, 0], ahead[:, 2] = np.sin(facing), np.cos(facing)
        share = np.einsum("ij,ij->i", ahead, direction) / np.maximum(1 - direction[:, 1], 0.05)
        bend = ahead - share[:, None] * (direction + np.array([0.0, -1.0, 0.0]))
        bend -= np.einsum("ij,ij->i", bend, direction)[:, None] * direction
        bend /= np.sqrt(np.einsum("ij,ij->i", bend, bend))[:, None]
        joints[:, 1 + side] = hip
        joints[:, 4 + side] = hip + along[:, None] * direction + aside[:, None] * bend
        joints[:, 7 + side] = hip + distance[:, None] * direction
        joints[:, 10 + side] = joints[:, 7 + side] + bones[:, side]

    third = channels[:, [TWIST, BEND, LEAN]] / 3
    bend_turn = rotation_yxz(third[:, 0], third[:, 1], third[:, 2])
    turn = pelvis_turn
    place = pelvis
    for joint in (3, 6, 9):
        place = place + turn @ offsets[joint]
        joints[:, joint] = place
        turn = turn @ bend_turn
    chest = turn
    joints[:, 12] = place + chest @ offsets[12]
    head = chest @ rotation_yxz(channels[:, LOOK], channels[:, NOD], np.zeros(n))
    joints[:, 15] = joints[:, 12] + head @ offsets[15]

    for side, sign in ((0, 1), (1, -1)):
        arm = channels[:, ARMS + 4 * side : ARMS + 4 * side + 4]
        joints[:, 13 + side] = place + chest @ offsets[13 + side]
        shoulder = joints[:, 13 + side] + chest @ offsets[16 + side]
        upper = arm_direction(arm[:, 0], arm[:, 1], sign) * body.upper_arm
        fore = arm_direction(arm[:, 2], arm[:, 3], sign) * body.forearm
        both = chest @ np.stack((upper, fore), axis=-1)
        joints[:, 16 + side] = shoulder
        joints[:, 18 + side] = shoulder + both[:, :, 0]
        joints[:, 20 + side] = joints[:, 18 + side] + both[:, :, 1]
    return joints
