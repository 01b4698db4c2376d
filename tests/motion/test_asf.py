"""ASF/AMC files, against bone-by-bone evaluation with SciPy."""

import shutil

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from scamo.errors import ScaMoError
from scamo.motion.asf import find_asf, read_amc, read_asf

ASF = """# a comment
:version 1.10
:name TEST
:units
  mass 1.0
  length 0.45
  angle deg
:documentation
   nothing
:root
   order TX TY TZ RX RY RZ
   axis XYZ
   position 0 0 0
   orientation 0 0 0
:bonedata
  begin
     id 1
     name hip
     direction 0.6 -0.8 0
     length 2.5
     axis 0 0 0  XYZ
  end
  begin
     id 2
     name femur
     direction 0.34202 -0.939693 0
     length 7.1578
     axis 10 -30 20  XYZ
    dof rx ry rz
    limits (-160.0 20.0)
           (-70.0 70.0)
           (-60.0 70.0)
  end
  begin
     id 3
     name back
     direction 0 1 0
     length 2
     axis 5 6 7  ZYX
    dof rz rx
    limits (-20.0 45.0)
           (-30.0 30.0)
  end
:hierarchy
  begin
    root hip back
    hip femur
  end
"""
# name: direction, length, axis, its order, dof
BONES = {
    "hip": ((0.6, -0.8, 0), 2.5, (0, 0, 0), "xyz", ""),
    "femur": ((0.34202, -0.939693, 0), 7.1578, (10, -30, 20), "xyz", "xyz"),
    "back": ((0, 1, 0), 2, (5, 6, 7), "zyx", "zx"),
}
ABOVE = {"hip": "root", "femur": "hip", "back": "root"}


def numbers(frames=5, seed=0):
    rng = np.random.default_rng(seed)
    return {
        name: rng.uniform(-90, 90, (frames, count)).round(4)
        for name, count in (("root", 6), ("femur", 3), ("back", 2))
    }


def amc(values, header=":FULLY-SPECIFIED\n:DEGREES\n"):
    lines = [header.strip("\n")]
    for frame in range(len(values["root"])):
        lines.append(str(frame + 1))
        lines += [f"{name} {' '.join(map(str, rows[frame]))}" for name, rows in values.items()]
    return "\n".join(lines) + "\n"


def write(folder, values, asf=ASF, **options):
    (folder / "07.asf").write_text(asf)
    (folder / "07_01.amc").write_text(amc(values, **options))
    return folder / "07_01.amc"


def tips(values):
    """Where bones end; SciPy's lower-case orders turn about fixed axes, the first letter first."""
    frames = len(values["root"])
    found = {"root": (values["root"][:, :3], Rotation.from_euler("xyz", values["root"][:, 3:], degrees=True))}
    for name, (direction, length, axis, order, dof) in BONES.items():
        place, turn = found[ABOVE[name]]
        by_letter = dict(zip("xyz", axis, strict=True))
        frame = Rotation.from_euler(order, [by_letter[letter] for letter in order], degrees=True)
        if dof:
            turn = turn * frame * Rotation.from_euler(dof, values[name], degrees=True) * frame.inv()
        bone = np.array(direction) / np.linalg.norm(direction) * length
        found[name] = (place + turn.apply(np.tile(bone, (frames, 1))), turn)
    return {name: place for name, (place, _) in found.items()}


def test_bones_are_where_they_should_be(tmp_path):
    values = numbers()
    read = read_amc(write(tmp_path, values), fps=60)
    assert (len(read), read.fps) == (5, 60)
    assert read.metres_a_unit == pytest.approx(0.0254 / 0.45)
    places, _ = read.forward_kinematics()
    expected = tips(values)
    names = read.hierarchy.names
    assert names == ("root", "hip", "femur", "femur.end", "back", "back.end")
    for joint, tip in (("root", "root"), ("femur", "hip"), ("femur.end", "femur"), ("back.end", "back")):
        np.testing.assert_allclose(places[:, names.index(joint)], expected[tip], atol=1e-9)


def test_radians_are_read_where_the_files_say_so(tmp_path):
    values = numbers()
    degrees = read_amc(write(tmp_path, values))
    values = {name: np.radians(rows) for name, rows in values.items()}
    values["root"][:, :3] = numbers()["root"][:, :3]
    radians = read_amc(write(tmp_path, values, header=":RADIANS"))
    np.testing.assert_allclose(radians.rotations, degrees.rotations, atol=1e-12)


def test_the_skeleton_is_found_by_the_subject(tmp_path):
    values = numbers()
    path = write(tmp_path, values)
    (tmp_path / "08.asf").write_text("")
    assert find_asf(path).name == "07.asf"
    (tmp_path / "07_01.asf").write_text(ASF)
    assert find_asf(path).name == "07_01.asf"
    other = tmp_path / "jump.amc"
    shutil.copy(path, other)
    with pytest.raises(ScaMoError, match=r"jump\.amc: no skeleton; looked for jump\.asf among 3 \.asf files"):
        read_amc(other)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (":bonedata", ":bones", "section :bonedata is missing"),
        ("direction 0 1 0", "direction 0 0 0", "line 37: a direction of no length"),
        ("direction 0 1 0", "direction 0 1", "line 37: 2 numbers, expected 3"),
        ("length 2\n", "length two\n", "line 38: 'two', expected a finite number"),
        ("length 2\n", "", "line [0-9]+: a bone without name, direction or length .back"),
        ("name back", "name hip", "line [0-9]+: bone name 'hip' is used twice"),
        ("ZYX", "ZZX", "line 39: axis order 'ZZX'"),
        ("dof rz rx", "dof rz rz", "line 40: 'rz rz', expected some of"),
        ("dof rz rx", "dof l", "line 40: 'l', expected some of"),
        ("root hip back", "root hip", "bone 'back' hangs on nothing"),
        ("hip femur", "hip femur femur", "line [0-9]+: 'femur' hangs on two bones"),
        ("hip femur", "hip tibia", "line [0-9]+: there is no bone 'tibia'"),
        ("root hip back", "hip back", "nothing hangs on the root"),
        ("TX TY TZ RX", "TX TY RX", "section :root has no TZ"),
        ("orientation 0 0 0", "orientation 0 90 0", "line 14: the root's orientation"),
        ("length 0.45", "length -1", "line 6: length -1"),
        ("angle deg", "angle turns", "line 7: angle 'turns', expected deg or rad"),
        (":version 1.10", "version", "line 2: 'version' before any section"),
    ],
)
def test_spoiled_skeletons_are_named(tmp_path, old, new, message):
    assert old in ASF
    (tmp_path / "bad.asf").write_text(ASF.replace(old, new, 1))
    with pytest.raises(ScaMoError, match=rf"bad\.asf: {message}"):
        read_asf(tmp_path / "bad.asf")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: [], "holds no frame"),
        (lambda lines: lines[:2] + lines[3:], "line 3: 'root' before the first frame number"),
        (lambda lines: lines[:4] + lines[5:], "frame 1 .line 3. lacks femur"),
        (lambda lines: lines[:-1], "frame 5 .line 19. lacks back"),
        (lambda lines: [*lines[:-1], lines[-1].rsplit(" ", 1)[0]], "1 numbers of 'back', expected rz rx"),
        (lambda lines: [*lines[:-1], "back nan 1"], "frame 5 .line 19.: 'nan' of 'back'"),
        (lambda lines: [*lines, "9" * 5000], "line 23: '9+' is no moving bone"),
        (lambda lines: [*lines, "tail 1 2"], "line 23: 'tail' is no moving bone"),
        (lambda lines: [*lines, "back 1 2"], "line 23: 'back' comes twice in frame 5"),
        (lambda lines: [*lines[:6], "3", *lines[7:]], "line 7: frame 3, expected frame 2"),
    ],
)
def test_spoiled_motions_are_named(tmp_path, change, message):
    path = write(tmp_path, numbers())
    path.write_text("\n".join(change(path.read_text().splitlines())))
    with pytest.raises(ScaMoError, match=rf"07_01\.amc: .*{message}"):
        read_amc(path)


@pytest.mark.parametrize("seed", range(2))
def test_no_mutilated_file_crashes(tmp_path, seed):
    rng = np.random.default_rng(seed)
    path = write(tmp_path, numbers(3))
    texts = {tmp_path / "07.asf": ASF, path: path.read_text()}
    words = ["nan", "begin", "end", "-1", "1e400", "root", ":hierarchy", ":", "#", "\x00", "99999999999", ""]
    messages: list[str] = []
    for _ in range(300):
        for file, text in texts.items():
            lines = text.splitlines()
            for _ in range(int(rng.integers(0, 3))):
                at, to = (int(i) for i in rng.integers(0, len(lines), 2))
                how = int(rng.integers(0, 4))
                if how == 0:
                    lines[at] = lines[to]
                elif how == 1:
                    lines.insert(at, lines[to])
                elif how == 2:
                    split = lines[at].split(" ")
                    split[int(rng.integers(0, len(split)))] = words[int(rng.integers(0, len(words)))]
                    lines[at] = " ".join(split)
                else:
                    lines = lines[: max(1, at)]
            file.write_text("\n".join(lines))
        try:
            read = read_amc(path)
        except ScaMoError as error:
            messages.append(str(error))
        else:
            assert np.isfinite(read.forward_kinematics()[0]).all()
    assert len(messages) > 100
    assert all("07" in message and "\n" not in message for message in messages)
