import json
import os

import numpy as np
import pytest

from scamo.errors import ScaMoError
from scamo.motion.features import features_to_joints, joints_to_features
from scamo.motion.files import replacing
from scamo.motion.motion import SUFFIXES, Motion, check_suffix, save_motions
from scamo.motion.skeleton import forward_kinematics


def walk(frames=24):
    rng = np.random.default_rng(0)
    turns = np.concatenate([np.ones((frames, 22, 1)), 0.1 * rng.normal(size=(frames, 22, 3))], axis=-1)
    return forward_kinematics(turns, root=np.linspace([0, 0.96, 0], [0, 0.96, 1.2], frames))


def test_lengths_and_types():
    motion = Motion(walk(30).astype(np.float64), fps=20)
    assert len(motion) == 30
    assert motion.duration == pytest.approx(1.5)
    assert motion.joints.dtype == np.float32
    assert motion.text is None
    assert motion.meta == {}


def test_npz_keeps_everything(tmp_path):
    features = joints_to_features(walk())
    motion = Motion.from_features(
        features,
        fps=25,
        text="a person walks — «slowly»",
        tokens=np.arange(5),
        meta={"seed": 3, "nested": {"a": [1.5, None]}},
    )
    np.testing.assert_array_equal(motion.joints, features_to_joints(features))
    motion.save(tmp_path / "m.npz")
    back = Motion.load(tmp_path / "m.npz")
    np.testing.assert_array_equal(back.joints, motion.joints)
    np.testing.assert_array_equal(back.features, features)
    np.testing.assert_array_equal(back.tokens, motion.tokens)
    assert (back.fps, back.text, back.meta) == (25.0, motion.text, motion.meta)
    assert os.listdir(tmp_path) == ["m.npz"]


def test_npy_of_joints_or_features(tmp_path):
    motion = Motion(walk())
    motion.save(tmp_path / "joints.NPY")
    np.testing.assert_array_equal(Motion.load(tmp_path / "joints.NPY").joints, motion.joints)
    features = joints_to_features(motion.joints)
    np.save(tmp_path / "features.npy", features)
    loaded = Motion.load(tmp_path / "features.npy")
    np.testing.assert_array_equal(loaded.features, features)
    np.testing.assert_array_equal(loaded.joints, features_to_joints(features))


def bad_joints():
    joints = walk()
    joints[4, 18, 1] = np.nan
    return joints


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Motion(np.zeros((3, 20, 3))), r"joints: expected 21, 22 or 24 of them, got 20"),
        (lambda: Motion(np.zeros((22, 3))), r"joints: expected shape \(frames, 21, 22 or 24, 3\)"),
        (lambda: Motion(np.zeros((0, 22, 3))), r"joints: expected .* got \(0, 22, 3\)"),
        (lambda: Motion(bad_joints()), r"frame 4, joint 18 \(left_elbow\) is not finite"),
        (
            lambda: Motion(np.zeros((2, 22, 3)), features=np.full((2, 263), np.nan)),
            "features: frame 0, feature 0 is not finite",
        ),
        (lambda: Motion(walk(), fps=0), r"fps: expected a positive number, got 0"),
        (lambda: Motion(walk(9), features=np.zeros((8, 263))), r"features: expected shape \(9, features\)"),
        (lambda: Motion(walk(9), features=np.zeros((9, 251))), r"features: 251 are of 21 joints, .* has 22"),
        (lambda: Motion(walk(9), features=np.zeros((9, 100))), r"feature_dim = 100: expected one of 263"),
        (lambda: Motion(walk(), tokens=np.zeros((2, 2))), r"tokens: expected one row"),
    ],
)
def test_bad_fields_are_named(make, message):
    with pytest.raises(ScaMoError, match=message):
        make()


def test_unknown_suffix_lists_the_known_ones(tmp_path):
    with pytest.raises(ScaMoError, match=r"x\.fbx: unknown suffix '\.fbx', expected one of .*") as caught:
        Motion(walk()).save(tmp_path / "x.fbx")
    assert all(suffix in str(caught.value) for suffix in SUFFIXES)
    assert check_suffix("A.GIF") == ".gif"
    with pytest.raises(ScaMoError, match=r"cannot read suffix '\.gif', expected one of \.npz, \.npy, \.bvh"):
        Motion.load(tmp_path / "x.gif")


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "m.npz"
    Motion(walk(), text="first").save(path)
    with pytest.raises(ScaMoError, match="meta: .*JSON"):
        Motion(walk(), text="second", meta={"a": {1, 2}}).save(path)
    with pytest.raises(FileExistsError), replacing(path) as partial:
        partial.mkdir()
    assert Motion.load(path).text == "first"
    assert os.listdir(tmp_path) == ["m.npz"]


def test_unwritable_places_are_named(tmp_path):
    with pytest.raises(ScaMoError, match=r"missing/m\.npz: cannot write there: No such file or directory"):
        Motion(walk()).save(tmp_path / "missing" / "m.npz")
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises(ScaMoError, match=r"folder\.npz: is a folder"):
        Motion(walk()).save(tmp_path / "folder.npz")


def test_saved_files_have_the_usual_permissions(tmp_path):
    (tmp_path / "plain").touch()
    Motion(walk()).save(tmp_path / "m.npy")
    assert (tmp_path / "m.npy").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(ScaMoError, match=r"none\.npz: no such file"):
        Motion.load(tmp_path / "none.npz")
    Motion(walk()).save(tmp_path / "m.npz")
    whole = (tmp_path / "m.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.npy").touch()
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    for name in ("cut.npz", "empty.npy", "objects.npy"):
        with pytest.raises(ScaMoError, match=rf"{name}: not a readable NumPy file"):
            Motion.load(tmp_path / name)
    np.savez(tmp_path / "other.npz", poses=np.zeros(3))
    with pytest.raises(ScaMoError, match=r"other\.npz: holds \['poses'\], expected 'joints' or 'features'"):
        Motion.load(tmp_path / "other.npz")
    np.save(tmp_path / "bad.npy", bad_joints())
    with pytest.raises(ScaMoError, match=r"bad\.npy: joints: frame 4, joint 18"):
        Motion.load(tmp_path / "bad.npy")
    np.savez(tmp_path / "meta.npz", joints=walk(), meta=np.array("{"))
    with pytest.raises(ScaMoError, match=r"meta\.npz: "):
        Motion.load(tmp_path / "meta.npz")


def test_several_motions_go_into_one_page_or_numbered_files(tmp_path):
    motions = [Motion(walk(4 + i), text=f"number {i}") for i in range(11)]
    paths = save_motions(motions, tmp_path / "out.npz")
    assert [p.name for p in paths] == [f"out-{i:02}.npz" for i in range(11)]
    assert [Motion.load(p).text for p in paths] == [m.text for m in motions]
    assert save_motions(motions[:2], tmp_path / "all.html") == [tmp_path / "all.html"]
    assert "number 1" in (tmp_path / "all.html").read_text()
    assert save_motions(motions[0], tmp_path / "one.npz") == [tmp_path / "one.npz"]
    assert json.loads(str(np.load(tmp_path / "one.npz")["meta"])) == {}
    with pytest.raises(ScaMoError, match="no motion to write"):
        save_motions([], tmp_path / "none.npz")
    with pytest.raises(ScaMoError, match="unknown suffix"):
        save_motions([], tmp_path / "none.txt")


def test_csv_is_a_table_with_units(tmp_path):
    motion = Motion(walk(5), fps=30)
    motion.save(tmp_path / "m.csv")
    header, *rows = (tmp_path / "m.csv").read_text().splitlines()
    names = header.split(",")
    assert names[:4] == ["time_s", "pelvis_x_m", "pelvis_y_m", "pelvis_z_m"]
    assert names[-1] == "right_wrist_z_m"
    table = np.array([[float(value) for value in row.split(",")] for row in rows])
    np.testing.assert_allclose(table[:, 0], np.arange(5) / 30, atol=1e-6)
    np.testing.assert_allclose(table[:, 1:].reshape(5, 22, 3), motion.joints, atol=1e-6)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_suffix_writes_one_frame(tmp_path, suffix):
    Motion(walk(1), text="stands").save(tmp_path / f"m{suffix}")
    assert [p.name for p in tmp_path.iterdir() if p.stat().st_size > 0] == [f"m{suffix}"]


@pytest.mark.parametrize("suffix", [".bvh", ".glb"])
def test_what_has_no_rotations_leaves_no_file(tmp_path, noisy, suffix):
    joints = noisy()
    joints[3, 18] = joints[3, 16]
    with pytest.raises(ScaMoError, match=r"frame 3, joint 18 \(left_elbow\): a bone of length 0 m"):
        Motion(joints).save(tmp_path / f"m{suffix}")
    with pytest.raises(ScaMoError, match=rf"missing/m\{suffix}: cannot write there"):
        Motion(noisy()).save(tmp_path / "missing" / f"m{suffix}")
    with pytest.raises(TypeError, match="colour"):
        Motion(noisy()).save(tmp_path / f"m{suffix}", colour="red")
    assert os.listdir(tmp_path) == []
