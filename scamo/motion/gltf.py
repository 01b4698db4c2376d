"""Binary glTF 2.0 (.glb): a skeleton, its animation, and a body of simple shapes.

Metres, Y up, facing +Z, as glTF has it; the rest pose is a T-pose with the pelvis at the origin. The body is
one skin of bones that look like spindles, so that Blender, Unity and three.js make an armature of the joints
and every viewer has something to show: left blue, right orange.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

from scamo.motion.body import Body
from scamo.motion.bvh import TOLERANCE, rig
from scamo.motion.files import replacing
from scamo.motion.ik import Fit
from scamo.motion.motion import Motion

_FLOAT, _UBYTE = 5126, 5121
_VERTICES = 34962  # buffer view target
_COLOURS = {"middle": (0.25, 0.31, 0.37), "left": (0.16, 0.47, 0.71), "right": (0.88, 0.48, 0.16)}
_SIDES = 6  # of a spindle
_HEAD = 0.08  # metres, half its width


class _Buffer:
    """The binary chunk and what describes it."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.views: list[dict[str, Any]] = []
        self.accessors: list[dict[str, Any]] = []

    def add(self, values: np.ndarray, kind: str, *, target: int | None = None, bounds: bool = False) -> int:
        """Append an array, one row an element, and return its accessor. Rows are multiples of 4 bytes."""
        view = {"buffer": 0, "byteOffset": len(self.data), "byteLength": values.nbytes}
        if target is not None:
            view["target"] = target
        accessor: dict[str, Any] = {
            "bufferView": len(self.views),
            "componentType": _UBYTE if values.dtype == np.uint8 else _FLOAT,
            "count": len(values),
            "type": kind,
        }
        if bounds:
            rows = values.reshape(len(values), -1)
            accessor |= {"min": rows.min(0).tolist(), "max": rows.max(0).tolist()}
        self.views.append(view)
        self.accessors.append(accessor)
        self.data += values.tobytes()
        return len(self.accessors) - 1


def save_glb(motion: Motion, path: str | Path, *, stretch: bool | None = None) -> None:
    """Write a motion as binary glTF.

    stretch: False animates rotations and the root only, so that bones keep their length. True animates every
    joint's translation too, so that it is where the motion has it. None stretches only where constant bones
    would miss a joint by more than half a millimetre. The file's `asset.extras` say what was done, whether
    the rotations are fitted or the features' own, and how far constant bones are from the motion.
    Raises ScaMoError for what `fit_rotations` refuses.
    """
    fit, body = rig(motion), motion.body
    if stretch is None:
        stretch = bool(fit.error.max() > TOLERANCE)
    buffer = _Buffer()
    armature, skinned = len(body), len(body) + 1
    nodes: list[dict[str, Any]] = [_node(body, joint, fit.offsets) for joint in range(len(body))]
    nodes += [{"name": "armature", "children": [0]}, {"name": "body", "mesh": 0, "skin": 0}]
    primitives = _mesh(buffer, body, fit.offsets)
    inverse = np.tile(np.eye(4, dtype=np.float32), (len(body), 1, 1))
    inverse[:, 3, :3] = -_rest_places(body, fit.offsets)  # stored column by column
    document = {
        "asset": {"version": "2.0", "generator": "ScaMo", "extras": _remarks(motion, fit, stretch)},
        "scene": 0,
        "scenes": [{"nodes": [armature, skinned]}],
        "nodes": nodes,
        "meshes": [{"name": "body", "primitives": primitives}],
        "materials": [
            {
                "name": name,
                "pbrMetallicRoughness": {
                    "baseColorFactor": [*colour, 1.0],
                    "metallicFactor": 0.0,
                    "roughnessFactor": 0.8,
                },
            }
            for name, colour in _COLOURS.items()
        ],
        "skins": [
            {
                "name": "skeleton",
                "joints": list(range(len(body))),
                "inverseBindMatrices": buffer.add(inverse, "MAT4"),
            }
        ],
        "animations": [_animation(buffer, motion, fit, stretch)],
        "accessors": buffer.accessors,
        "bufferViews": buffer.views,
        "buffers": [{"byteLength": len(buffer.data)}],
    }
    head = json.dumps(document, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 4)
    size = 12 + 8 + len(head) + 8 + len(buffer.data)
    with replacing(path) as partial:
        partial.write_bytes(
            struct.pack("<4sII", b"glTF", 2, size)
            + struct.pack("<I4s", len(head), b"JSON")
            + head
            + struct.pack("<I4s", len(buffer.data), b"BIN\0")
            + buffer.data
        )


def _node(body: Body, joint: int, offsets: np.ndarray) -> dict[str, Any]:
    node: dict[str, Any] = {"name": body.names[joint], "translation": offsets[joint].tolist()}
    if body.children[joint]:
        node["children"] = list(body.children[joint])
    return node


def _remarks(motion: Motion, fit: Fit, stretch: bool) -> dict[str, Any]:
    remarks: dict[str, Any] = {
        "rotations": "true, those of the features" if fit.true else "fitted to joint positions",
        "fps": motion.fps,
        "stretch": stretch,
        "constant_bones_error_mm": {
            "mean": round(1000 * float(fit.error.mean()), 3),
            "max": round(1000 * float(fit.error.max()), 3),
        },
    }
    if motion.text is not None:
        remarks["text"] = motion.text
    return remarks


def _animation(buffer: _Buffer, motion: Motion, fit: Fit, stretch: bool) -> dict[str, Any]:
    times = buffer.add((np.arange(len(motion)) / motion.fps).astype(np.float32), "SCALAR", bounds=True)
    samplers: list[dict[str, Any]] = []
    channels: list[dict[str, Any]] = []

    def animate(joint: int, path: str, values: np.ndarray, kind: str) -> None:
        channels.append({"sampler": len(samplers), "target": {"node": joint, "path": path}})
        output = buffer.add(np.ascontiguousarray(values, dtype=np.float32), kind)
        samplers.append({"input": times, "output": output, "interpolation": "LINEAR"})

    for joint, children in enumerate(motion.body.children):
        # Fitted, the last joints keep the rotation of their parents.
        if children or fit.true:
            animate(joint, "rotation", fit.rotations[:, joint, [1, 2, 3, 0]], "VEC4")
        if stretch or joint == 0:
            animate(joint, "translation", fit.local[:, joint], "VEC3")
    name = " ".join((motion.text or "motion").split())[:60]
    return {"name": name, "samplers": samplers, "channels": channels}


def _rest_places(body: Body, offsets: np.ndarray) -> np.ndarray:
    places = offsets.copy()
    for joint in range(1, len(body)):
        places[joint] += places[body.parents[joint]]
    return places


def _mesh(buffer: _Buffer, body: Body, offsets: np.ndarray) -> list[dict[str, Any]]:
    """The primitives of the mesh, a material each."""
    places = _rest_places(body, offsets)
    parts: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {side: [] for side in _COLOURS}
    for joint in body.bones:
        parent = body.parents[joint]
        width = 0.1 * float(np.linalg.norm(offsets[joint])) + 0.015
        shape = _spindle(places[parent], places[joint], width, 0.2)
        # The tip goes with the next joint, which closes the gap where a bone is stretched.
        parts[body.sides[joint]].append((shape, np.where((shape == places[joint]).all(-1), joint, parent)))
    for joint, end in body.ends.items():
        tip = places[joint] + end
        if joint == body.head:
            shape = _spindle(places[joint] - [0, 0.04, 0], tip, _HEAD, 0.5)
        else:
            shape = _spindle(places[joint], tip, 0.03, 0.4)
        parts[body.sides[joint]].append((shape, np.full(shape.shape[:2], joint)))

    primitives = []
    for material, shapes in enumerate(parts.values()):
        triangles = np.concatenate([shape for shape, _ in shapes])
        owners = np.concatenate([owner for _, owner in shapes])
        edges = triangles[:, 1:] - triangles[:, :1]
        normals = np.cross(edges[:, 0], edges[:, 1])
        normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
        count = 3 * len(triangles)
        joints = np.zeros((count, 4), dtype=np.uint8)
        joints[:, 0] = owners.reshape(-1)
        weights = np.zeros((count, 4), dtype=np.float32)
        weights[:, 0] = 1
        attributes: dict[str, tuple[np.ndarray, str]] = {
            "POSITION": (triangles.reshape(count, 3).astype(np.float32), "VEC3"),
            "NORMAL": (np.repeat(normals, 3, axis=0).astype(np.float32), "VEC3"),
            "JOINTS_0": (joints, "VEC4"),
            "WEIGHTS_0": (weights, "VEC4"),
        }
        primitives.append(
            {
                "attributes": {
                    name: buffer.add(values, kind, target=_VERTICES, bounds=name == "POSITION")
                    for name, (values, kind) in attributes.items()
                },
                "material": material,
            }
        )
    return primitives


def _spindle(start: np.ndarray, end: np.ndarray, width: float, waist: float) -> np.ndarray:
    """Triangles (n, 3, 3), counter-clockwise from outside: two points and a ring at `waist` of the way."""
    along = end - start
    axis = along / np.linalg.norm(along)
    u = np.cross(axis, np.eye(3)[np.abs(axis).argmin()])
    u /= np.linalg.norm(u)
    v = np.cross(axis, u)
    angles = np.arange(_SIDES) * (2 * np.pi / _SIDES)
    ring = start + waist * along + width * (np.cos(angles)[:, None] * u + np.sin(angles)[:, None] * v)
    following = np.roll(ring, -1, axis=0)
    ends = np.broadcast_to(start, ring.shape), np.broadcast_to(end, ring.shape)
    return np.concatenate(
        [np.stack([ends[0], following, ring], axis=1), np.stack([ring, following, ends[1]], axis=1)]
    )
