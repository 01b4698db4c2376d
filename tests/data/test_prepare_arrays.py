"""Preparing arrays of joints."""

from __future__ import annotations

import numpy as np
import pytest

from scamo.data.dataset import MotionDataset
from scamo.data.prepare.arrays import prepare_arrays
from scamo.errors import ScaMoError
from scamo.motion.features import joints_to_features
from scamo.motion.representation import Representation
from scamo.motion.skeleton import mirror_joints
from scamo.motion.synthetic import corpus_clip

# Two float32 ways to the same features.
CLOSE = {"rtol": 0, "atol": 2e-4}


def clip(seed=0, frames=60):
    return corpus_clip(seed).joints[:frames].astype(np.float32)


def run(source, out, **options):
    options = {
        "progress": False,
        "split": (1, 0, 0),
        "template": "a person {label}",
        "source_fps": 20,
    } | options
    return prepare_arrays(source, out, **options)


def reasons(data):
    return {entry["name"]: (entry["reason"], entry["detail"]) for entry in data.refused}


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_layout_gives_the_same_clips(tmp_path):
    clips = {f"walk_{i}": clip(i, 60 + i) for i in range(3)}
    (tmp_path / "folder/deep").mkdir(parents=True)
    np.save(tmp_path / "folder/walk_0.npy", clips["walk_0"])
    np.savez(tmp_path / "folder/walk_1.npz", joints=clips["walk_1"], fps=20)
    np.savez(tmp_path / "folder/deep/walk_2.npz", pos=clips["walk_2"])
    np.savez(tmp_path / "each.npz", **clips)
    offsets = np.cumsum([0, *(len(joints) for joints in clips.values())])
    np.savez(
        tmp_path / "one.npz",
        motion=np.concatenate(list(clips.values())),
        offsets=offsets,
        names=np.array(list(clips)),
    )
    for name, options in (("folder", {}), ("each.npz", {}), ("one.npz", {"key": "motion"})):
        data = run(tmp_path / name, tmp_path / f"set_{name}", **options)
        assert data.refused == []
        found = {data.clip_names[i]: data.clip_features(i) for i in range(len(data.clip_names))}
        assert set(found) == set(clips)
        for clip_name, joints in clips.items():
            np.testing.assert_allclose(found[clip_name], joints_to_features(joints), **CLOSE)
        assert data.caption(0) == "a person walk"


@pytest.mark.parametrize(
    ("unit", "turn"),
    [(1.0, lambda j: j[..., [2, 0, 1]]), (100.0, lambda j: j * [-1, -1, 1]), (1000.0, lambda j: j)],
)
def test_units_and_axes_are_found(tmp_path, unit, turn):
    (tmp_path / "source").mkdir()
    for i in range(3):
        np.save(tmp_path / f"source/{'abc'[i]}.npy", turn(clip(i)) * unit)
    data = run(tmp_path / "source", tmp_path / "set")
    assert data.refused == []
    for i in range(3):
        np.testing.assert_allclose(data.clip_features(i), joints_to_features(clip(i)), **CLOSE)


def test_a_clip_of_one_who_lies_keeps_the_up_axis_of_the_others(tmp_path):
    lying = clip(3)[..., [0, 2, 1]] * [1, -1, 1]
    clips = {f"c{i}": clip(i) for i in range(3)} | {"lying": lying}
    np.savez(tmp_path / "all.npz", **clips)
    data = run(tmp_path / "all.npz", tmp_path / "set")
    assert data.refused == []
    index = data.clip_names.index("lying")
    assert data.clip_features(index)[:, 3].max() < 0.6  # the height of the pelvis
    np.savez(tmp_path / "both.npz", a=clip(0), b=clip(1) * [-1, -1, 1])
    with pytest.raises(ScaMoError, match="stand along no common axis"):
        run(tmp_path / "both.npz", tmp_path / "other")


def test_other_rates_are_converted(tmp_path):
    joints = clip(0, 61)
    between = (joints[1:] + joints[:-1]) / 2
    double = np.stack([joints[:-1], between], axis=1).reshape(-1, 22, 3)
    np.savez(tmp_path / "a.npz", joints=double, fps=40.0)
    np.save(tmp_path / "b.npy", double)
    (tmp_path / "table.csv").write_text("name,caption,fps\na,he walks,\nb,he strolls,40\n")
    data = run(tmp_path, tmp_path / "set", source_fps=None, captions=tmp_path / "table.csv")
    for i in range(2):
        np.testing.assert_allclose(data.clip_features(i), joints_to_features(joints[:60]), **CLOSE)
    assert [data.caption(0), data.caption(1)] == ["he walks", "he strolls"]


def test_the_root_may_stand_at_the_origin(tmp_path):
    joints = clip() - clip()[0, 0]
    np.save(tmp_path / "a.npy", joints)
    data = run(tmp_path / "a.npy", tmp_path / "set")
    np.testing.assert_allclose(data.clip_features(0), joints_to_features(clip()), **CLOSE)
    assert data.manifest["notes"] == []


def test_what_is_wrong_is_listed(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    np.savez(source / "good.npz", joints=clip(), fps=20)
    nan = clip()
    nan[7, 3, 1] = np.nan
    np.save(source / "nan.npy", nan)
    np.save(source / "joints24.npy", np.zeros((50, 24, 3)))
    np.save(source / "one.npy", clip()[:1])
    np.save(source / "object.npy", np.array([{}]), allow_pickle=True)
    np.savez(source / "rate.npz", joints=clip(), fps=-3)
    np.savez(source / "bandai.npz", root=clip()[:, 0], offsets=[0, 60])
    np.savez(source / "order.npz", joints=clip(), offsets=[0, 60, 30], fps=20)
    np.savez(source / "short.npz", joints=clip(), offsets=[0, 60, 90], fps=20)
    np.savez(source / "twice.npz", joints=np.concatenate([clip(), clip()]), offsets=[0, 60, 120],
             names=["x", "x"], fps=20)  # fmt: skip
    np.savez(source / "many.npz", **{"../up": clip(), "n" * 300: clip()}, fps=20)
    whole = (source / "good.npz").read_bytes()
    (source / "half.npz").write_bytes(whole[: len(whole) // 2])
    (source / "flipped.npz").write_bytes(
        whole[:2000] + bytes(b ^ 255 for b in whole[2000:2100]) + whole[2100:]
    )
    (source / "cut.npy").write_bytes((source / "nan.npy").read_bytes()[:500])
    data = run(source, tmp_path / "set", source_fps=None)
    assert sorted(data.clip_names) == [".._up", "good", "short_0", "twice_x"]
    found = reasons(data)
    assert found["nan"] == ("NaN or infinite joints", "nan.npy: frame 7, joint 3")
    assert found["joints24"] == (
        "wrong shape",
        "joints24.npy: float64 [50, 24, 3], expected numbers [frames, 22, 3]",
    )
    assert found["one"][0] == "too short"
    for name in ("object", "half", "cut", "flipped"):
        assert found[name][0] == "motion file unreadable"
    assert found["rate"][0] == "wrong fps"
    assert found["bandai"] == (
        "no joints",
        "bandai.npz: holds root, offsets, expected joints or positions or pos",
    )
    assert found["order"][0] == "wrong offsets"
    assert found["short_1"] == ("wrong offsets", "short.npz[joints] clip 1: rows 60 to 90 of 60")
    assert found["twice_x"][0] == "name is empty or used twice"
    assert found["n" * 20][0] == "name too long"
    with pytest.raises(ScaMoError, match="bandai: no joints"):
        run(source, tmp_path / "strict", source_fps=None, strict=True)


def test_clips_without_a_rate_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", clip())
    np.savez(tmp_path / "b.npz", joints=clip(), fps=20)
    data = run(tmp_path, tmp_path / "set", source_fps=None)
    assert reasons(data) == {"a": ("no frame rate", "a.npy: the file does not say it: give source_fps")}


def test_captions_beside_and_mirrored_copies(tmp_path):
    np.savez(tmp_path / "set.npz", a=clip(0), b=clip(1))
    (tmp_path / "set").mkdir()
    (tmp_path / "set/a.txt").write_text("he lifts his left arm\nhe waves\n")
    data = run(tmp_path / "set.npz", tmp_path / "out", template=None, mirror=True)
    assert data.clip_names == ["a", "Ma"]
    assert [data.caption(c) for c in range(4)][::2] == ["he lifts his left arm", "he lifts his right arm"]
    np.testing.assert_allclose(data.clip_features(1), joints_to_features(mirror_joints(clip())), **CLOSE)
    assert reasons(data)["b"][0] == "caption file missing"


def test_272_features_are_fitted_and_say_so(tmp_path):
    np.savez(tmp_path / "walk.npz", joints=clip(), fps=20)
    data = run(tmp_path / "walk.npz", tmp_path / "set", feature_dim=272, source_fps=None, mirror=True)
    assert (data.feature_dim, data.fps, data.clip_names) == (272, 30, ["walk", "Mwalk"])
    assert [data.clip_meta(i)["rotations"] for i in range(2)] == ["fitted", "fitted"]
    smpl = Representation.of(272)
    np.testing.assert_array_equal(data.clip_features(1), smpl.mirrored(data.clip_features(0)))
    # A rigid body: the fit puts its bones where they are.
    assert smpl.rotations_off(data.clip_features(0)) < 5e-3
    with pytest.raises(ScaMoError, match="target_offsets: 272 features keep everybody's own bones"):
        run(tmp_path / "walk.npz", tmp_path / "other", feature_dim=272, target_offsets=tmp_path / "any.npy")


def test_workers_give_the_same_bytes(tmp_path):
    clips = {f"c_{i}": clip(i, 60 + i) for i in range(5)} | {"bad": clip()[:, :21]}
    np.savez(tmp_path / "all.npz", **clips)
    for workers in (1, 2):
        run(
            tmp_path / "all.npz", tmp_path / str(workers), workers=workers, mirror=True, split=(0.6, 0.2, 0.2)
        )
    assert files_of(tmp_path / "1") == files_of(tmp_path / "2")
    data = MotionDataset.open(tmp_path / "1")
    splits = {data.clip_names[i]: data.clip_splits[i] for i in range(len(data.clip_names))}
    assert all(splits[f"c_{i}"] == splits[f"Mc_{i}"] for i in range(5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"units": "yard"}, "units"),
        ({"up": "w"}, "up"),
        ({"fps": 0}, "fps = 0"),
        ({"source_fps": float("nan")}, "source_fps"),
        ({"long": "keep"}, "long"),
        ({"min_frames": 50, "max_frames": 50}, "min_frames"),
        ({"workers": -1}, "workers"),
    ],
)
def test_arguments(tmp_path, options, message):
    np.save(tmp_path / "a.npy", clip())
    with pytest.raises(ScaMoError, match=message):
        run(tmp_path / "a.npy", tmp_path / "set", **options)
    with pytest.raises(ScaMoError, match="no such file or folder"):
        run(tmp_path / "none", tmp_path / "set")
