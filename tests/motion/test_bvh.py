"""BVH files, read by a small parser of the test's own and turned into joints with SciPy."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from scamo.errors import ScaMoError
from scamo.motion import features272
from scamo.motion.body import Body
from scamo.motion.bvh import load_bvh, read_bvh, rig, save_bvh
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


@pytest.fixture(scope="module")
def twisted():
    """Local rotations (30, 22, 4) with twist everywhere, hands and feet too, and a motion of them."""
    rng = np.random.default_rng(3)
    rotations = rng.normal([1, 0, 0, 0], 0.2, (1, 22, 4)) + 0.02 * rng.normal(size=(30, 22, 4)).cumsum(0)
    rotations /= np.linalg.norm(rotations, axis=-1, keepdims=True)
    root = np.linspace([0, 0.9, 0], [0.5, 0.9, 2], 30)
    encoded = features272.encode(forward_kinematics(rotations, root=root), rotations)
    return rotations, Motion.from_features(encoded.features)


def test_features_with_true_rotations_give_theirs(tmp_path, twisted):
    rotations, motion = twisted
    cos, sin = np.cos(2.0), np.sin(2.0)
    turn = np.array([[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]])
    elsewhere = Motion(motion.joints @ turn.T + (4, 0, -3), fps=30, features=motion.features)
    for one in (motion, elsewhere):
        one.save(tmp_path / "m.bvh")
        written = File(tmp_path / "m.bvh")
        assert written.frame_time == pytest.approx(1 / 30, rel=1e-6)
        assert furthest(written.places(), one.joints) < 1e-4
        assert [len(c) for c in written.channels] == [6] + [3] * 21, "constant bones suffice"
        for joint, name in enumerate(JOINT_NAMES[1:], 1):
            channels, values = written.joint(name)
            found = Rotation.from_euler("".join(c[0] for c in channels), values, degrees=True)
            given = Rotation.from_quat(rotations[:, joint][:, [1, 2, 3, 0]])
            assert (found.inv() * given).magnitude().max() < 1e-4, name
        assert rig(one).true


def test_joints_that_are_not_those_of_the_features_are_fitted(twisted):
    _, motion = twisted
    joints = motion.joints.copy()
    joints[4, 18] += 0.1
    fit = rig(Motion(joints, fps=30, features=motion.features))
    assert not fit.true
    assert fit.error[4, 18] > 0.005
    assert not rig(Motion(motion.joints)).true


def test_the_21_joints_have_a_hierarchy_of_their_own(tmp_path):
    """Limbs of constant length, bent at random."""
    body, rng = Body.of(21), np.random.default_rng(0)
    turned = np.empty((20, 21, 3, 3))
    joints = np.zeros((20, 21, 3))
    for joint, parent in enumerate(body.parents):
        own = Rotation.from_rotvec(0.3 * rng.normal(size=(20, 3))).as_matrix()
        turned[:, joint] = own if parent < 0 else turned[:, parent] @ own
        if parent >= 0:
            joints[:, joint] = joints[:, parent] + turned[:, parent] @ body.rest[joint]
    motion = Motion(joints, fps=12.5)
    motion.save(tmp_path / "m.bvh")
    animation = read_bvh(tmp_path / "m.bvh")
    names = [name for name in animation.hierarchy.names if not name.endswith(".end")]
    assert sorted(names) == sorted(body.names)
    assert fit_rotations(joints).error.max() < 1e-4
    back = load_bvh(tmp_path / "m.bvh")
    assert (back.body, back.fps) == (body, 12.5)
    assert furthest(back.joints, motion.joints) < 1e-4


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
        (lambda text: "", "ends inside the HIERARCHY, expected MOTION"),
        (lambda text: "x" + text, "line 1: 'xHIERARCHY', the file does not begin with HIERARCHY"),
        (lambda text: text[: len(text) // 3], "line [0-9]+: |ends inside the HIERARCHY"),
        (lambda text: text[: 2 * len(text) // 3], "line [0-9]+: [0-9]+ numbers, expected the 69 of a frame"),
        (lambda text: "\n".join(text.splitlines()[:-2]), "6 lines of numbers, 'Frames: 8' says 8"),
        (swapped("Frames: 8", "Frames: 9"), "8 lines of numbers, 'Frames: 9' says 9"),
        (swapped("Frames: 8", "Frames: 0"), "Frames: 0, expected a positive whole number"),
        (swapped("Frames: 8", "Frames: many"), "Frames: many"),
        (swapped("Frames: 8", "Frames: " + "9" * 5000), "Frames: 9+, expected a positive whole number"),
        (swapped("CHANNELS 6", "CHANNELS " + "9" * 5000), "line 5: expected CHANNELS and how many"),
        (swapped("Frame Time: 0.05", "Frame Time: 0"), "Frame Time: 0, expected a positive number"),
        (swapped("Frame Time:", "Time:"), "line [0-9]+: 'Time: 0.05', expected 'Frame Time: SECONDS'"),
        (swapped("MOTION", ""), "line [0-9]+: 'Frames:' is not expected outside every joint"),
        (swapped("JOINT left_elbow", "JOINT elbow.L"), "1 of the 22 joints are missing, first 'left_elbow'"),
        (swapped("JOINT left_elbow", "JOINT left_hip"), "line [0-9]+: joint name 'left_hip' is used twice"),
        (swapped("JOINT left_elbow", "ROOT left_elbow"), "a second ROOT, 'left_elbow'"),
        (swapped("JOINT left_elbow", "JOINT"), "JOINT without a name"),
        (swapped("Zrotation", "Wrotation"), "line 5: unknown channel 'Wrotation' of 'pelvis'"),
        (swapped("CHANNELS 6", "CHANNELS 7"), "line 5: 'pelvis' has 6 channels, CHANNELS says 7"),
        (swapped("CHANNELS 6", "CHANNELS 5"), "line 5: 'pelvis' has more channels than the 5"),
        (swapped("CHANNELS 3 Zrotation Xrotation Yrotation", ""), "'left_hip' ends without CHANNELS|without"),
        (swapped("6 Xposition", "5"), "line [0-9]+: no joint has three position channels"),
        (swapped("Xposition Yposition", "Xposition Xposition"), "'Xposition' of 'pelvis' comes twice"),
        (swapped("OFFSET 0.000000 ", "OFFSET zero "), "line 4: 'zero', expected a finite number"),
        (swapped("OFFSET 0.000000 ", "OFFSET nan "), "line 4: 'nan', expected a finite number"),
        (swapped("OFFSET 0.000000 0.000000 0.000000", ""), "'pelvis' ends without an OFFSET"),
        (swapped("OFFSET 0.000000 0.000000 0.000000", "OFFSET 0 0"), "OFFSET with 2 numbers, expected 3"),
        (swapped("}", "} }"), "line [0-9]+: "),
        (swapped("{", ""), "line 4: 'OFFSET', expected '{' after 'pelvis'"),
        (swapped("Frame Time: 0.05\n", "Frame Time: 0.05\nx"), "line [0-9]+: 'x[-0-9.]+', expected a finite"),
        (swapped("Frame Time: 0.05\n", "Frame Time: 0.05\nnan "), "70 numbers, expected the 69"),
        (lambda text: re.sub(r"(0\.05\n)\S+", r"\1nan", text), "'nan', expected a finite number"),
        (lambda text: re.sub(r"(0\.05\n)\S+", r"\g<1>1e99", text), "'1e99', expected a finite number"),
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


class Tree:
    """A random skeleton with every order of channels, as text and as joints by SciPy."""

    def __init__(self, seed: int, joints: int = 12, frames: int = 7) -> None:
        rng = np.random.default_rng(seed)
        self.parents = [-1, *(int(rng.integers(0, j)) for j in range(1, joints))]
        self.names = [f"joint {j}" if j % 5 == 4 else f"set:J_{j}" for j in range(joints)]
        self.offsets = rng.normal(0, 10, (joints, 3)).round(4)
        self.channels: list[list[str]] = []
        for joint in range(joints):
            turns = ["Xrotation", "Yrotation", "Zrotation"]
            kept = 3 if joint == 0 else int(rng.integers(0, 4))
            own = list(rng.permutation(turns)[:kept])
            moves = list(rng.permutation(["Xposition", "Yposition", "Zposition"]))
            own += moves if joint == 0 else moves[: int(rng.integers(0, 4))] * (joint % 3 == 0)
            self.channels.append([str(c) for c in rng.permutation(own)])
        # The order among rotations is what the permutation made it.
        self.values = [rng.uniform(-200, 200, (frames, len(own))).round(5) for own in self.channels]
        self.order: list[int] = []

    def text(self, newline: str = "\n", gap: str = " ", number: str = "{:.5f}") -> str:
        self.order = []
        lines = ["HIERARCHY", *self._joint(0, gap), "MOTION"]
        lines += [f"Frames:{gap}{len(self.values[0])}", f"Frame Time:{gap}.0083333"]
        rows = np.concatenate([self.values[j] for j in self.order], axis=1)
        lines += [gap.join(number.format(x) for x in row) + gap for row in rows]
        return newline.join(lines) + newline

    def _joint(self, joint: int, gap: str) -> list[str]:
        self.order.append(joint)
        own = self.channels[joint]
        lines = [f"{'JOINT' if joint else 'ROOT'} {self.names[joint]}", "{"]
        lines.append(f"OFFSET{gap}" + gap.join(str(x) for x in self.offsets[joint]))
        lines.append(gap.join(["CHANNELS", str(len(own)), *own]))
        children = [j for j, parent in enumerate(self.parents) if parent == joint]
        for child in children:
            lines += self._joint(child, gap)
        if not children:
            lines += ["End Site", "{", f"OFFSET{gap}1{gap}2{gap}3", "}"]
        return [*lines, "}"]

    def places(self) -> dict[str, np.ndarray]:
        found: list[tuple[np.ndarray, Rotation]] = []
        for joint, parent in enumerate(self.parents):
            place = np.tile(self.offsets[joint], (len(self.values[0]), 1))
            turn = Rotation.identity(len(place))
            for channel, column in zip(self.channels[joint], self.values[joint].T, strict=True):
                if channel.endswith("position"):
                    place[:, "XYZ".index(channel[0])] = column
                else:
                    turn = turn * Rotation.from_euler(channel[0], column[:, None], degrees=True)
            if parent >= 0:
                place = found[parent][0] + found[parent][1].apply(place)
                turn = found[parent][1] * turn
            found.append((place, turn))
        ends = [j for j in range(len(self.parents)) if j not in self.parents]
        out = {name: place for name, (place, _) in zip(self.names, found, strict=True)}
        return out | {f"{self.names[j]}.end": found[j][0] + found[j][1].apply([1, 2, 3]) for j in ends}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("style", ["plain", "odd"])
def test_any_hierarchy_and_any_order_of_channels(tmp_path, seed, style):
    tree = Tree(seed)
    text = tree.text() if style == "plain" else tree.text("\r\n", " \t ", "{:.12e}")
    (tmp_path / "t.bvh").write_bytes(text.encode())
    read = read_bvh(tmp_path / "t.bvh")
    assert read.fps == 120
    expected = tree.places()
    places, _ = read.forward_kinematics()
    assert set(read.hierarchy.names) == set(expected)
    for joint, name in enumerate(read.hierarchy.names):
        np.testing.assert_allclose(places[:, joint], expected[name], atol=1e-8, err_msg=name)


def test_braces_may_stand_anywhere(tmp_path):
    text = Tree(1).text()
    (tmp_path / "a.bvh").write_text(text)
    (tmp_path / "b.bvh").write_text(text.replace("\n{\n", " {\n").replace("End Site {", "End Site{"))
    a, b = (read_bvh(tmp_path / f"{n}.bvh") for n in "ab")
    assert a.hierarchy.names == b.hierarchy.names
    np.testing.assert_array_equal(a.rotations, b.rotations)


def test_real_dialects_are_read(shared):
    joints = {"mb": 38, "max": 38, "daz": 57, "template": 27}
    for path in sorted((shared / "data" / "bvh").glob("*.bvh")):
        read = read_bvh(path)
        assert len(read.hierarchy) == joints[path.name.split(".")[-2]]
        assert read.fps == (60 if path.stem == "template" else 120)
        assert f"Frames: {len(read)}" in " ".join(path.read_text()[:20000].split())


@pytest.mark.parametrize("seed", range(3))
def test_no_mutilated_file_crashes(tmp_path, seed):
    """Bytes changed, lines lost, doubled or exchanged, words swapped: it is read or refused, in words."""
    rng = np.random.default_rng(seed)
    good = Tree(seed, joints=6, frames=3).text()
    words = ["nan", "{", "}", "-1", "1e400", "JOINT", "End", "CHANNELS", "MOTION", "\x00", "99999999999", ""]
    messages: list[str] = []
    for _ in range(300):
        lines = good.splitlines()
        for _ in range(int(rng.integers(1, 4))):
            at, to = (int(i) for i in rng.integers(0, len(lines), 2))
            how = int(rng.integers(0, 5))
            if how == 0 and len(lines) > 1:
                del lines[at]
            elif how == 1:
                lines.insert(at, lines[to])
            elif how == 2:
                lines[at], lines[to] = lines[to], lines[at]
            elif how == 3:
                split = lines[at].split(" ")
                split[int(rng.integers(0, len(split)))] = words[int(rng.integers(0, len(words)))]
                lines[at] = " ".join(split)
            else:
                lines = lines[: max(1, at)]
        data = bytearray("\n".join(lines).encode())
        if rng.random() < 0.2 and data:
            data[int(rng.integers(0, len(data)))] = int(rng.integers(0, 256))
        (tmp_path / "f.bvh").write_bytes(bytes(data))
        try:
            read = read_bvh(tmp_path / "f.bvh")
        except ScaMoError as error:
            messages.append(str(error))
        else:
            assert np.isfinite(read.forward_kinematics()[0]).all()
    assert len(messages) > 100
    assert all("f.bvh: " in message and "\n" not in message for message in messages)
