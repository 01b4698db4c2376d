"""Motions as bodies of spheres and sticks in one client's scene, side by side on the ground."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from functools import cache

import numpy as np
import viser
from numpy.typing import NDArray

from scamo.motion.body import Body as Skeleton
from scamo.motion.motion import Motion
from scamo.motion.render import COLOURS, HEAD_WIDTH, PATH_COLOUR
from scamo.view.player import frame_at

_IN_A_ROW = 5
_GAP = 0.7  # metres between two motions


def places(motions: Sequence[Motion]) -> NDArray[np.float32]:
    """Where the motions go, (n, 3) metres to add to their joints: feet on the ground, none in another's way.

    Rows of five from left to right as seen from +Z, each centred, the first in front.
    """
    low = np.array([motion.joints.min((0, 1)) for motion in motions])
    high = np.array([motion.joints.max((0, 1)) for motion in motions])
    place = -0.5 * (low + high)
    place[:, 1] = -low[:, 1]
    size = high - low
    back = 0.0
    for start in range(0, len(motions), _IN_A_ROW):
        row = slice(start, start + _IN_A_ROW)
        widths = size[row, 0] + _GAP
        rights = np.cumsum(widths)
        depth = size[row, 2].max()
        place[row, 0] += rights - 0.5 * widths - 0.5 * rights[-1]
        place[row, 2] -= back + 0.5 * depth
        back += depth + _GAP
    place[:, 2] += 0.5 * (back - _GAP)
    return place.astype(np.float32)


def bone_poses(
    joints: NDArray[np.float32],
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Sticks for joints (T, J, 3): middles (T, J - 1, 3), quaternions (T, J - 1, 4) w x y z, lengths.

    J is the number of a known body. The quaternion turns +Z along the bone, away from the pelvis.
    """
    starts, ends = joints[:, Skeleton.of(joints.shape[1]).parents[1:]], joints[:, 1:]
    bones = ends - starts
    lengths = np.linalg.norm(bones, axis=-1)
    x, y, z = np.moveaxis(bones / np.maximum(lengths, 1e-6)[..., None], -1, 0)
    quaternions = np.stack([1 + z, -y, x, np.zeros_like(x)], axis=-1)
    norms = np.linalg.norm(quaternions, axis=-1, keepdims=True)
    # Against -Z any half turn about an axis in the plane does.
    half_turn = np.array([0, 1, 0, 0], np.float32)
    quaternions = np.where(norms > 1e-3, quaternions / np.maximum(norms, 1e-6), half_turn)
    return 0.5 * (starts + ends), quaternions.astype(np.float32), lengths


def _rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


@cache
def _meshes() -> tuple[tuple[NDArray, NDArray], tuple[NDArray, NDArray]]:
    """Vertices and faces of a sphere of radius 1 and of a stick of radius 1 and length 1 along Z."""
    from trimesh.creation import cylinder, icosphere

    ball, stick = icosphere(subdivisions=2), cylinder(radius=1.0, height=1.0, sections=16)
    return (
        (ball.vertices, ball.faces),
        (stick.vertices, stick.faces),
    )


class Body:
    """One motion in a client's scene. A frame costs five messages, whatever the number of joints."""

    def __init__(
        self, scene: viser.SceneApi, name: str, title: str, motion: Motion, place: NDArray[np.float32]
    ) -> None:
        """name: of the scene node; title: the label above the head; place (3,): see `places`."""
        self.motion = motion
        joints = motion.joints
        # The head is a ball a little above the head joint, along the neck (as in the pictures).
        skeleton = Skeleton.of(joints.shape[1])
        head = joints[:, skeleton.head]
        neck = head - joints[:, skeleton.parents[skeleton.head]]
        crown = head + 0.06 * neck / np.maximum(np.linalg.norm(neck, axis=-1, keepdims=True), 1e-6)
        self._balls = np.concatenate([joints, crown[:, None]], axis=1)
        self._middles, self._turns, lengths = bone_poses(joints)
        radii = (0.5 * skeleton.widths).astype(np.float32)
        self._sizes = np.stack([*np.broadcast_arrays(radii[1:], radii[1:], lengths)], axis=-1)
        sides = (*skeleton.sides, skeleton.sides[skeleton.head])
        colours = np.array([_rgb(COLOURS[side]) for side in sides], np.uint8)
        ball, stick = _meshes()
        self._frame = 0
        self._node = scene.add_frame(name, show_axes=False, position=place)
        # Copies: a handle writes later values into the array it was made with.
        self._joints = scene.add_batched_meshes_simple(
            f"{name}/joints",
            *ball,
            np.tile(np.array([1, 0, 0, 0], np.float32), (len(colours), 1)),
            self._balls[0].copy(),
            batched_scales=np.append(radii, 0.5 * HEAD_WIDTH),
            batched_colors=colours,
            lod="off",
        )
        self._bones = scene.add_batched_meshes_simple(
            f"{name}/bones",
            *stick,
            self._turns[0].copy(),
            self._middles[0].copy(),
            batched_scales=self._sizes[0].copy(),
            batched_colors=colours[1 : len(skeleton)],
            lod="off",
        )
        way = joints[:, 0].copy()
        way[:, 1] = joints[..., 1].min() + 0.005
        if len(way) > 1:
            scene.add_line_segments(
                f"{name}/way", np.stack([way[:-1], way[1:]], axis=1), _rgb(PATH_COLOUR), thickness=0.025
            )
        self._label = scene.add_label(
            f"{name}/title",
            textwrap.shorten(title, 40, placeholder=" …"),
            position=self._above(0),
            anchor="bottom-center",
            font_screen_scale=0.9,
        )

    def _above(self, frame: int) -> NDArray[np.float32]:
        return self._balls[frame, -1] + np.array([0, 0.2, 0], np.float32)

    def show(self, time: float) -> None:
        """Take the pose of a time in seconds; nothing is sent if it is the one shown."""
        frame = frame_at(time, self.motion.fps, len(self.motion))
        if frame == self._frame:
            return
        self._frame = frame
        self._joints.batched_positions = self._balls[frame]
        self._bones.batched_positions = self._middles[frame]
        self._bones.batched_wxyzs = self._turns[frame]
        self._bones.batched_scales = self._sizes[frame]
        self._label.position = self._above(frame)

    @property
    def visible(self) -> bool:
        return self._node.visible

    @visible.setter
    def visible(self, value: bool) -> None:
        self._node.visible = value

    def remove(self) -> None:
        self._node.remove()
