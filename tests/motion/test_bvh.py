"""BVH files, read by a small parser of the test's own and turned into joints with SciPy."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from scamo.errors import ScaMoError
from scamo.motion.bvh import load_bvh, save_bvh
from scamo.motion.ik import fit_rotations
from scamo.motion.motion import Motion
from scamo.motion.skeleton import DEFAULT_OFFSETS, JOINT_NAMES, PARENTS, forward_kinematics
from scamo.motion.synthetic import corpus_clip


class File:
    """names, parents, offsets, channels and the numbers of a BVH file, joint by joint, line by line."""

    def __init__(self, path: Path) -> None:
        self.names: list[str] = []
        self.parents: list[int] = []
        self.offsets: list[list[float]] = []
        self.channels: list[list[str]] = []
        self.ends: dict[str, list[float]] = {}
        above: list[int | None] = []
        lines = path.read_text().splitlines()
        assert lines[0] == "HIERARCHY"
        for line in lines:
            first, *rest = line.split()
            if first in ("ROOT", "JOINT"):
                assert (first == "ROOT") == (not above)
                self.parents.append(-1 if not above else above[-1])
                self.names.append(rest[0])
                above.append(len(self.names) - 1)
            elif first == "End":
                above.append(None)
            elif first == "OFFSET":
                where = [float(x) for x in rest]
                if above[-1] is None:
                    self.ends[self.names[above[-2]]] = where
                else:
                    self.offsets.append(where)
            elif first == "CHANNELS":
                assert int(rest[0]) == len(rest) - 1
                self.channels.append(rest[1:])
            elif first == "}":
                above.pop()
            elif first == "MOTION":
                break
        assert not above
        number = lines.index("MOTION")
        self.frames = int(re.fullmatch(r"Frames: (\d+)", lines[number + 1])[1])
        self.frame_time = float(re.fullmatch(r"Frame Time: (\S+)", lines[number + 2])[1])
        self.values = np.array([[float(x) for x in line.split()] for line in lines[number + 3 :]])
        assert self.values.shape == (self.frames, sum(map(len, self.channels)))

    def joint(self, name: str) -> tuple[list[str], np.ndarray]:
        index = self.names.index(name)
        start = sum(map(len, self.channels[:index]))
        return self.channels[index], self.values[:, start : start + len(self.channels[index])]

    def places(self) -> np.ndarray:
        """(T, 22, 3) in the order of JOINT_NAMES: position channels replace the offset."""
        turned: list[Rotation] = []
        found: dict[str, np.ndarray] = {}
        for name, parent, offset in zip(self.names, self.parents, self.offsets, strict=True):
            channels, values = self.joint(name)
            moves = [c[0] for c in channels if c.endswith("position")]
            turns = "".join(c[0] for c in channels if c.endswith("rotation"))
            assert moves in ([], ["X", "Y", "Z"])
            local = values[:, : len(moves)] if moves else np.tile(offset, (self.frames, 1))
            own = Rotation.from_euler(turns, values[:, len(moves) :], degrees=True)
            if parent >= 0:
                local = found[self.names[parent]] + turned[parent].apply(local)
                own = turned[parent] * own
            found[name] = local
            turned.append(own)
        return np.stack([found[name] for name in JOINT_NAMES], axis=1)


def furthest(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b, axis=-1).max())


@pytest.mark.parametrize("clip", [0, 4, 9])
def test_the_file_holds_the_joints(tmp_path, clip):
    motion = Motion(corpus_clip(clip).joints)
    motion.save(tmp_path / "m.bvh")
    written = File(tmp_path / "m.bvh")
    assert (written.frames, written.frame_time) == (len(motion), 0.05)
    assert furthest(written.places(), motion.joints) < 1e-5
    assert [len(c) for c in written.channels] == [6] + [3] * 21


def test_real_motions_are_within_a_millimetre(tmp_path, shared):
    official = sorted((shared / "reference" / "official").glob("*.new_joints.npy"))
    cmu = sorted((shared / "data" / "humanml3d_cmu" / "joints").glob("*.npy"))[::60]
    assert len(official) == 2
    for path in [*official, *cmu]:
        motion = Motion(np.load(path))
        motion.save(tmp_path / "m.bvh")
        written = File(tmp_path / "m.bvh")
        assert furthest(written.places(), motion.joints) < 1e-3
        assert path not in official or len(written.channels[1]) == 3, "constant bones suffice"


def test_the_hierarchy_is_a_t_pose_of_the_22_joints(tmp_path):
    rotations = np.random.default_rng(0).normal([1, 0, 0, 0], 0.15, (20, 22, 4))
    joints = forward_kinematics(rotations, root=np.tile([0.4, 0.9, -2.0], (20, 1)))
    save_bvh(Motion(joints), tmp_path / "m.bvh")
    written = File(tmp_path / "m.bvh")
    assert written.names[0] == "pelvis"
    assert sorted(written.names) == sorted(JOINT_NAMES)
    above = {
        name: written.names[p] if p >= 0 else None
        for name, p in zip(written.names, written.parents, strict=True)
    }
    assert above == {n: JOINT_NAMES[p] if p >= 0 else None for n, p in zip(JOINT_NAMES, PARENTS, strict=True)}
    for name, offset in zip(written.names, written.offsets, strict=True):
        np.testing.assert_allclose(offset, DEFAULT_OFFSETS[JOINT_NAMES.index(name)], atol=2e-6)
    assert set(written.ends) == {"left_foot", "right_foot", "head", "left_wrist", "right_wrist"}
    assert written.ends["head"][1] > 0.05
    assert written.ends["left_wrist"][0] > 0.05 > -0.05 > written.ends["right_wrist"][0]
    assert written.channels[0] == [
        "Xposition",
        "Yposition",
        "Zposition",
        "Zrotation",
        "Xrotation",
        "Yrotation",
    ]
    np.testing.assert_allclose(
        written.joint("pelvis")[1][:, :3], np.tile([0.4, 0.9, -2.0], (20, 1)), atol=1e-6
    )


def test_scale_is_units_a_metre(tmp_path, noisy):
    motion = Motion(noisy())
    for stretch in (False, True):
        motion.save(tmp_path / "m.bvh", stretch=stretch)
        motion.save(tmp_path / "cm.bvh", scale=100, stretch=stretch)
        metres, centimetres = File(tmp_path / "m.bvh"), File(tmp_path / "cm.bvh")
        np.testing.assert_allclose(centimetres.places(), 100 * metres.places(), atol=2e-3)
        np.testing.assert_allclose(centimetres.ends["head"], 100 * np.array(metres.ends["head"]))
        assert furthest(load_bvh(tmp_path / "cm.bvh", scale=100).joints, metres.places()) < 1e-5
    for scale in (0, -1, np.nan):
        with pytest.raises(ScaMoError, match="scale: expected a positive number"):
            motion.save(tmp_path / "x.bvh", scale=scale)
        with pytest.raises(ScaMoError, match="scale: expected a positive number"):
            load_bvh(tmp_path / "cm.bvh", scale=scale)


def test_stretching_bones_need_position_channels(tmp_path, noisy):
    motion = Motion(noisy())
    fit = fit_rotations(motion.joints)
    assert fit.error.max() > 0.01
    motion.save(tmp_path / "auto.bvh")
    auto = File(tmp_path / "auto.bvh")
    assert [len(c) for c in auto.channels] == [6] * 22
    assert furthest(auto.places(), motion.joints) < 1e-5
    motion.save(tmp_path / "rigid.bvh", stretch=False)
    rigid = File(tmp_path / "rigid.bvh")
    assert [len(c) for c in rigid.channels] == [6] + [3] * 21
    assert furthest(rigid.places(), fit.joints) < 1e-5
    assert furthest(rigid.places(), motion.joints) == pytest.approx(fit.error.max(), abs=1e-5)
    # The rest pose and the rotations are the same, so retargeting sees the same.
    assert rigid.offsets == auto.offsets
    np.testing.assert_array_equal(rigid.joint("left_knee")[1], auto.joint("left_knee")[1][:, 3:])
    steady = Motion(fit.joints)
    steady.save(tmp_path / "steady.bvh")
    assert len(File(tmp_path / "steady.bvh").channels[1]) == 3
    steady.save(tmp_path / "stretch.bvh", stretch=True)
    assert furthest(File(tmp_path / "stretch.bvh").places(), steady.joints) < 1e-5


def turned(angles: np.ndarray, order: str) -> np.ndarray:
    local = np.tile(np.eye(3), (len(angles), 22, 1, 1))
    local[:, 0] = Rotation.from_euler(order, angles.reshape(len(angles), -1), degrees=True).as_matrix()
    return forward_kinematics(local, DEFAULT_OFFSETS.astype(np.float64))


def test_angles_pass_half_turns_without_a_jump(tmp_path):
    angles = np.linspace(0, -900, 100)
    for axis, column in (("Z", 3), ("X", 4), ("Y", 5)):
        save_bvh(Motion(turned(angles, axis)), tmp_path / "m.bvh")
        values = File(tmp_path / "m.bvh").joint("pelvis")[1]
        np.testing.assert_allclose(values[:, column], angles, atol=1e-2)
        np.testing.assert_allclose(np.delete(values[:, 3:], column - 3, axis=1), 0, atol=1e-2)


@pytest.mark.parametrize("pitch", [90.0, -90.0])
def test_gimbal_lock_loses_no_rotation(tmp_path, pitch):
    """Lying flat, where the outer axes fall together, while turning about both of them."""
    frames = 40
    angles = np.stack([np.linspace(0, 200, frames), np.full(frames, pitch), np.linspace(30, -60, frames)], -1)
    angles[frames // 2 :, 1] = np.linspace(pitch, 0, frames - frames // 2)
    joints = turned(angles, "ZXY")
    save_bvh(Motion(joints), tmp_path / "m.bvh")
    written = File(tmp_path / "m.bvh")
    assert furthest(written.places(), joints) < 1e-5
    assert np.abs(np.diff(written.joint("pelvis")[1][: frames // 2, 3:], axis=0)).max() < 20


@pytest.mark.parametrize("fps", [20.0, 12.5, 30.0, 60.0, 23.976])
def test_it_comes_back(tmp_path, fps, noisy):
    motion = Motion(noisy(8), fps=fps)
    motion.save(tmp_path / "m.BVH")
    back = Motion.load(tmp_path / "m.BVH")
    assert back.fps == fps
    assert furthest(back.joints, motion.joints) < 1e-5
    assert os.listdir(tmp_path) == ["m.BVH"]


def test_one_frame(tmp_path, noisy):
    motion = Motion(noisy(1))
    motion.save(tmp_path / "m.bvh")
    written = File(tmp_path / "m.bvh")
    assert len(written.channels[1]) == 3, "one frame has constant bones"
    assert furthest(written.places(), motion.joints) < 1e-5
    assert len(Motion.load(tmp_path / "m.bvh")) == 1


def swapped(old: str, new: str):
    return lambda text: text.replace(old, new, 1)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda text: "", "does not begin with HIERARCHY"),
        (lambda text: text[: len(text) // 3], "not a readable BVH file"),
        (lambda text: text[: 2 * len(text) // 3], "numbers for 8 frames of 69 channels"),
        (swapped("Frames: 8", "Frames: 9"), "numbers for 9 frames of 69 channels"),
        (swapped("Frames: 8", "Frames: 0"), "0 frames"),
        (swapped("Frames: 8", "Frames: many"), "many"),
        (swapped("Frame Time: 0.05", "Frame Time: 0"), "frames of 0.0 s"),
        (swapped("Frame Time:", "Time:"), "not followed by"),
        (swapped("MOTION", ""), "word [0-9]+, 'Frames:', is not expected there"),
        (swapped("JOINT left_elbow", "JOINT elbow.L"), "1 of the 22 joints are missing, first 'left_elbow'"),
        (swapped("Zrotation", "Wrotation"), "unknown channel 'Wrotation' of 'pelvis'"),
        (swapped("OFFSET 0", "OFFSET zero"), "could not convert"),
        (swapped("Frame Time: 0.05\n", "Frame Time: 0.05\nx"), "could not convert"),
        (swapped("Frame Time: 0.05\n", "Frame Time: 0.05\nnan "), "numbers for"),
        (lambda text: re.sub(r"(0\.05\n)\S+", r"\1nan", text), "frame 0, joint 0"),
    ],
)
def test_spoiled_files_are_named(tmp_path, spoil, message):
    save_bvh(Motion(corpus_clip(0).joints[:8]), tmp_path / "m.bvh")
    (tmp_path / "bad.bvh").write_text(spoil((tmp_path / "m.bvh").read_text()))
    with pytest.raises(ScaMoError, match=rf"bad\.bvh: .*{message}"):
        Motion.load(tmp_path / "bad.bvh")


def test_other_files_are_named(tmp_path, shared):
    with pytest.raises(ScaMoError, match=r"none\.bvh: no such file"):
        load_bvh(tmp_path / "none.bvh")
    (tmp_path / "binary.bvh").write_bytes(b"\xff\xfe\x00" * 9)
    with pytest.raises(ScaMoError, match=r"binary\.bvh: not a readable BVH file"):
        load_bvh(tmp_path / "binary.bvh")
    for path in sorted((shared / "data" / "bvh").glob("*.bvh"))[::5]:
        with pytest.raises(ScaMoError, match=rf"{path.name}: [0-9]+ of the 22 joints are missing"):
            load_bvh(path)
