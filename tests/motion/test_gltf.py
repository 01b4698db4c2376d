"""Binary glTF: the rules of the specification, checked by a reader of the test's own, and its joints."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from scamo.motion.gltf import save_glb
from scamo.motion.ik import fit_rotations
from scamo.motion.motion import Motion
from scamo.motion.representation import SMPL_272
from scamo.motion.skeleton import JOINT_NAMES, PARENTS
from scamo.motion.synthetic import corpus_clip

COMPONENTS = {5121: np.dtype("<u1"), 5126: np.dtype("<f4")}
WIDTHS = {"SCALAR": 1, "VEC3": 3, "VEC4": 4, "MAT4": 16}


class File:
    """A .glb taken apart, with what the specification (2.0, sections 3 and 4) demands asserted on the way."""

    def __init__(self, path: Path) -> None:
        data = path.read_bytes()
        magic, version, length = struct.unpack_from("<4sII", data)
        assert (magic, version, length) == (b"glTF", 2, len(data))
        size, kind = struct.unpack_from("<I4s", data, 12)
        assert kind == b"JSON"
        assert size % 4 == 0
        self.json: dict[str, Any] = json.loads(data[20 : 20 + size])
        binary_size, kind = struct.unpack_from("<I4s", data, 20 + size)
        assert kind == b"BIN\0"
        assert binary_size % 4 == 0
        self.binary = data[28 + size :]
        assert len(self.binary) == binary_size
        assert self.json["asset"]["version"] == "2.0"
        (buffer,) = self.json["buffers"]
        assert "uri" not in buffer
        assert 0 <= binary_size - buffer["byteLength"] < 4
        for view in self.json["bufferViews"]:
            assert view["buffer"] == 0
            assert view["byteOffset"] + view["byteLength"] <= buffer["byteLength"]
            assert view["byteLength"] > 0
        self.arrays = [self._array(accessor) for accessor in self.json["accessors"]]

    def _array(self, accessor: dict[str, Any]) -> np.ndarray:
        view = self.json["bufferViews"][accessor["bufferView"]]
        kind, width = COMPONENTS[accessor["componentType"]], WIDTHS[accessor["type"]]
        assert view["byteOffset"] % kind.itemsize == 0
        assert width * kind.itemsize % 4 == 0, "vertex attributes are aligned to four bytes"
        assert view["byteLength"] == accessor["count"] * width * kind.itemsize
        assert accessor["count"] > 0
        flat = np.frombuffer(self.binary, kind, accessor["count"] * width, view["byteOffset"])
        rows = flat.reshape(accessor["count"], width)
        assert np.isfinite(rows).all()
        if "min" in accessor:
            np.testing.assert_array_equal(np.float32(accessor["min"]), rows.min(0))
            np.testing.assert_array_equal(np.float32(accessor["max"]), rows.max(0))
        return rows

    def matrices(self, frame: int | None = None) -> np.ndarray:
        """Global matrices (nodes, 4, 4) of a frame of the animation, or at rest."""
        nodes = self.json["nodes"]
        local = {
            i: {"rotation": n.get("rotation", [0, 0, 0, 1]), "translation": n.get("translation", [0, 0, 0])}
            for i, n in enumerate(nodes)
        }
        if frame is not None:
            animation = self.json["animations"][0]
            for channel in animation["channels"]:
                sampler = animation["samplers"][channel["sampler"]]
                target = channel["target"]
                local[target["node"]][target["path"]] = self.arrays[sampler["output"]][frame]
        out = np.tile(np.eye(4), (len(nodes), 1, 1))

        def walk(node: int, above: np.ndarray) -> None:
            own = np.eye(4)
            own[:3, :3] = Rotation.from_quat(local[node]["rotation"]).as_matrix()
            own[:3, 3] = local[node]["translation"]
            out[node] = above @ own
            for child in nodes[node].get("children", []):
                walk(child, out[node])

        for root in self.json["scenes"][self.json["scene"]]["nodes"]:
            walk(root, np.eye(4))
        return out

    def joints(self) -> np.ndarray:
        """(T, 22, 3) in the order of JOINT_NAMES."""
        names = [node["name"] for node in self.json["nodes"]]
        order = [names.index(name) for name in JOINT_NAMES]
        times = self.arrays[self.json["animations"][0]["samplers"][0]["input"]]
        return np.stack([self.matrices(frame)[order, :3, 3] for frame in range(len(times))])


def furthest(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b, axis=-1).max())


@pytest.fixture(scope="module", params=["rigid", "stretching", "one frame"])
def saved(request, tmp_path_factory, noisy) -> tuple[Motion, File]:
    joints = {
        "rigid": lambda: corpus_clip(4).joints,
        "stretching": noisy,
        "one frame": lambda: corpus_clip(3).joints[:1],
    }[request.param]()
    motion = Motion(joints, fps=30, text="a person «walks»")
    path = tmp_path_factory.mktemp("glb") / "m.glb"
    motion.save(path)
    return motion, File(path)


def test_the_animation_holds_the_joints(saved):
    motion, file = saved
    assert furthest(file.joints(), motion.joints) < 1e-5


def test_animation_follows_the_rules(saved):
    motion, file = saved
    (animation,) = file.json["animations"]
    seen = set()
    for channel in animation["channels"]:
        target = channel["target"]
        seen.add((target["node"], target["path"]))
        sampler = animation["samplers"][channel["sampler"]]
        accessor = file.json["accessors"][sampler["input"]]
        assert {"min", "max"} <= set(accessor)
        assert (accessor["type"], accessor["componentType"]) == ("SCALAR", 5126)
        times, values = file.arrays[sampler["input"]][:, 0], file.arrays[sampler["output"]]
        assert len(times) == len(values) == len(motion)
        assert times[0] == 0
        assert (np.diff(times) > 0).all()
        np.testing.assert_allclose(times, np.arange(len(motion)) / 30, atol=1e-5)
        kind = file.json["accessors"][sampler["output"]]["type"]
        assert kind == {"rotation": "VEC4", "translation": "VEC3"}[target["path"]]
        if target["path"] == "rotation":
            np.testing.assert_allclose(np.linalg.norm(values, axis=-1), 1, atol=1e-6)
            assert ((values[1:] * values[:-1]).sum(-1) > 0).all(), "players interpolate the shorter way"
    assert len(seen) == len(animation["channels"]), "a node's path has one channel"
    vertices = {i for p in file.json["meshes"][0]["primitives"] for i in p["attributes"].values()}
    for index, accessor in enumerate(file.json["accessors"]):
        target = file.json["bufferViews"][accessor["bufferView"]].get("target")
        assert target == (34962 if index in vertices else None), "only vertices go to the GPU as such"


def test_nodes_are_a_forest_and_the_skin_is_theirs(saved):
    _, file = saved
    nodes = file.json["nodes"]
    children = [child for node in nodes for child in node.get("children", [])]
    assert len(children) == len(set(children)), "one parent each"
    roots = file.json["scenes"][0]["nodes"]
    assert sorted([*children, *roots]) == list(range(len(nodes)))
    (skin,) = file.json["skins"]
    assert [nodes[j]["name"] for j in skin["joints"]] == list(JOINT_NAMES)
    for joint, parent in enumerate(PARENTS):
        assert parent < 0 or joint in nodes[parent]["children"]
    (skinned,) = (i for i, node in enumerate(nodes) if "mesh" in node)
    assert nodes[skinned]["skin"] == 0
    assert skinned in roots, "a skinned mesh's own transform is ignored, so it stands at the top"
    # At rest the skin leaves the mesh where it is. Matrices are stored by columns.
    inverse = file.arrays[skin["inverseBindMatrices"]].reshape(-1, 4, 4).transpose(0, 2, 1)
    rest = file.matrices()[skin["joints"]]
    np.testing.assert_allclose(rest @ inverse, np.tile(np.eye(4), (22, 1, 1)), atol=1e-6)
    assert (rest[[20, 18, 16], 0, 3] > 0.1).all(), "a T-pose, its left on +X"


def test_the_body_is_made_of_closed_shapes_around_the_bones(saved):
    motion, file = saved
    skin = file.json["skins"][0]
    inverse = file.arrays[skin["inverseBindMatrices"]].reshape(-1, 4, 4).transpose(0, 2, 1)
    frame = len(motion) // 2
    pose = (file.matrices(frame)[skin["joints"]] @ inverse)[:, :3]
    colours = set()
    for primitive in file.json["meshes"][0]["primitives"]:
        assert primitive.get("mode", 4) == 4, "triangles"
        colours.add(primitive["material"])
        values = {name: file.arrays[index] for name, index in primitive["attributes"].items()}
        assert "min" in file.json["accessors"][primitive["attributes"]["POSITION"]]
        assert len({len(v) for v in values.values()}) == 1
        points, normals = values["POSITION"], values["NORMAL"]
        assert len(points) % 3 == 0
        np.testing.assert_allclose(np.linalg.norm(normals, axis=-1), 1, atol=1e-5)
        np.testing.assert_array_equal(values["WEIGHTS_0"], np.tile([1.0, 0, 0, 0], (len(points), 1)))
        assert (values["JOINTS_0"][:, 1:] == 0).all(), "a joint without weight is 0"
        corners = points.reshape(-1, 3, 3).astype(np.float64)
        faces = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
        np.testing.assert_allclose(
            faces / np.linalg.norm(faces, axis=-1, keepdims=True), normals[::3], atol=1e-4
        )
        # Closed and facing outwards: the faces cancel, and the volume is positive.
        np.testing.assert_allclose(faces.sum(0), 0, atol=1e-6)
        assert (corners[:, 0] * faces).sum() / 6 > 1e-4
        # In motion, every point is near the joint that carries it.
        owners = values["JOINTS_0"][:, 0]
        moved = np.einsum("nij,nj->ni", pose[owners], np.column_stack([points, np.ones(len(points))]))
        assert np.linalg.norm(moved - motion.joints[frame, owners], axis=-1).max() < 0.25
    assert colours == {0, 1, 2}


def test_constant_bones_animate_rotations_and_the_root_alone(tmp_path, noisy):
    motion = Motion(noisy(), text="a person walks")
    fit = fit_rotations(motion.joints)
    save_glb(motion, tmp_path / "rigid.glb", stretch=False)
    file = File(tmp_path / "rigid.glb")
    paths = [(c["target"]["node"], c["target"]["path"]) for c in file.json["animations"][0]["channels"]]
    assert [node for node, path in paths if path == "translation"] == [0]
    assert furthest(file.joints(), fit.joints) < 1e-5
    extras = file.json["asset"]["extras"]
    assert extras["rotations"] == "fitted to joint positions"
    assert (extras["text"], extras["fps"], extras["stretch"]) == ("a person walks", 20, False)
    assert extras["constant_bones_error_mm"]["max"] == pytest.approx(1000 * fit.error.max(), abs=1e-3)
    Motion(fit.joints).save(tmp_path / "auto.glb")
    again = File(tmp_path / "auto.glb")
    assert again.json["asset"]["extras"]["stretch"] is False
    assert len(again.json["animations"][0]["channels"]) == len(paths)


def test_real_motions_are_within_a_millimetre(tmp_path, shared):
    for path in [
        shared / "reference" / "official" / "012314.new_joints.npy",
        *sorted((shared / "data" / "humanml3d_cmu" / "joints").glob("*.npy"))[::120],
    ]:
        motion = Motion(np.load(path)[:60])
        motion.save(tmp_path / "m.glb")
        assert furthest(File(tmp_path / "m.glb").joints(), motion.joints) < 1e-3


def test_the_file_says_whose_the_rotations_are(tmp_path):
    clip = corpus_clip(4).joints
    own = Motion.from_features(SMPL_272.from_joints(clip))
    for motion, said in ((own, "true, those of the features"), (Motion(clip), "fitted to joint positions")):
        motion.save(tmp_path / "m.glb")
        file = File(tmp_path / "m.glb")
        assert file.json["asset"]["extras"]["rotations"] == said
        assert furthest(file.joints(), motion.joints) < 1e-4
        turned = {c["target"]["node"] for c in file.json["animations"][0]["channels"]
                  if c["target"]["path"] == "rotation"}  # fmt: skip
        assert (JOINT_NAMES.index("left_wrist") in turned) == (motion is own)
