"""Preparing folders of motion capture."""

import json
import shutil

import numpy as np
import pytest

from scamo.data.dataset import MotionDataset
from scamo.data.prepare.layout import label_of
from scamo.data.prepare.mocap import prepare_mocap
from scamo.errors import ScaMoError
from scamo.motion import features272
from scamo.motion.bvh import read_bvh
from scamo.motion.features import features_to_joints, joints_to_features, offsets_from_joints
from scamo.motion.motion import Motion
from scamo.motion.representation import Representation
from scamo.motion.retarget import retarget
from scamo.motion.skeleton import DEFAULT_OFFSETS, forward_kinematics, mirror_joints
from scamo.motion.synthetic import corpus_clip


def walk(frames, start=0):
    """The joints of a clip that goes on and on."""
    joints = corpus_clip(0).joints
    parts = [joints]
    while sum(map(len, parts)) < frames + start:
        step = parts[-1][-1, 0] - joints[0, 0]
        parts.append(joints + step * [1, 0, 1])
    return np.concatenate(parts)[start : start + frames].astype(np.float32)


@pytest.fixture
def source(tmp_path):
    """Three clips with captions beside them, one of them long."""
    folder = tmp_path / "source"
    (folder / "deep").mkdir(parents=True)
    for name, frames in (("a_1", 61), ("a_2", 81), ("deep/b_1", 441)):
        Motion(walk(frames)).save(folder / f"{name}.bvh")
        (folder / f"{name}.txt").write_text("A person walks to the left.\n\n")
    return folder


def run(source, out, **options):
    return prepare_mocap(source, out, progress=False, split=(1, 0, 0), **options)


def reasons(data):
    return sorted((entry["name"], entry["reason"]) for entry in data.refused)


def test_clips_become_features(source, tmp_path):
    data = run(source, tmp_path / "set")
    assert data.clip_names == ["a_1", "a_2", "b_1@0-147", "b_1@147-293", "b_1@293-440"]
    assert data.refused == []
    assert {data.caption(c) for c in range(data.n_captions)} == {"A person walks to the left."}
    joints = retarget(read_bvh(source / "a_1.bvh")).joints
    np.testing.assert_array_equal(data.clip_features(0), joints_to_features(joints))
    whole = retarget(read_bvh(source / "deep" / "b_1.bvh")).joints
    np.testing.assert_array_equal(data.clip_features(3), joints_to_features(whole[147:294]))
    assert data.clip_meta(3) == {
        "file": "deep/b_1.bvh",
        "joint_map": "The 22 joints under the names of this project",
        "source_fps": 20.0,
        "metres_a_unit": 1.0,
        "up": "y",
        "frames": [147, 293],
    }
    assert data.manifest["provenance"]["captions"] == "beside the files"
    again = run(source, tmp_path / "again")
    for file in sorted((tmp_path / "set").iterdir()):
        assert file.read_bytes() == (again.folder / file.name).read_bytes()


def test_time_tags_cut_long_clips_and_make_parts_of_short_ones(source, tmp_path):
    (source / "a_2.txt").write_text("walks#walk/VERB#0.0#0.0\nturns#turn/VERB#1.0#3.5\n")
    (source / "deep" / "b_1.txt").write_text("starts#x/X#0.0#5.0\nends#x/X#15.0#99.0\nshort#x/X#1.0#2.0\n")
    data = run(source, tmp_path / "set")
    names = [data.item_name(i) for i in range(data.n_items)]
    assert names == ["a_1", "a_2", "a_2@20-70", "b_1@0-100", "b_1@300-440"]
    assert [data.caption(c) for c in range(data.n_captions)][1:] == ["walks", "turns", "starts", "ends"]
    assert reasons(data) == [("b_1@20-40", "too short")]
    (source / "deep" / "b_1.txt").write_text("too late#x/X#50.0#60.0\n")
    late = run(source, tmp_path / "late")
    assert reasons(late) == [("b_1", "bad time tags"), ("b_1", "no usable caption")]
    odd = "early#x/X#-1.0#9.0\nnever#x/X#1.0#inf\nno#x/X#inf#inf\nx#x/X#9#3\n"
    (source / "deep" / "b_1.txt").write_text(odd)
    data = run(source, tmp_path / "odd")
    assert [data.caption(c) for c in range(data.n_captions)][3:] == ["never"] * 3
    assert reasons(data) == [("b_1", "bad time tags")] * 3
    assert reasons(run(source, tmp_path / "kept", long="refuse")) == [("b_1", "too long")]


def test_272_features_have_the_files_rotations(source, tmp_path):
    data = run(source, tmp_path / "set", feature_dim=272, mirror=True)
    assert (data.feature_dim, data.fps) == (272, 30)
    body = retarget(read_bvh(source / "a_1.bvh"), fps=30)
    joints = forward_kinematics(body.rotations, body.offsets, body.joints[:, 0].astype(float))
    expected = features272.encode(joints, body.rotations, fps=30).features
    found = data.clip_names.index("a_1")
    np.testing.assert_array_equal(data.clip_features(found), expected)
    assert data.clip_meta(found)["rotations"] == "true"
    mirrored = data.clip_features(data.clip_names.index("Ma_1"))
    np.testing.assert_array_equal(mirrored, Representation.of(272).mirrored(expected))
    # A body of this project's own: its rotations put every joint where it is.
    np.testing.assert_allclose(joints, body.joints, atol=1e-4)
    with pytest.raises(ScaMoError, match="target_offsets: 272 features keep everybody's own bones"):
        run(source, tmp_path / "other", feature_dim=272, target_offsets=tmp_path / "any.npy")
    with pytest.raises(ScaMoError, match="feature_dim = 251: expected 263 or 272"):
        run(source, tmp_path / "other", feature_dim=251)


def test_any_number_of_workers_gives_the_same(source, tmp_path):
    (source / "broken.bvh").write_text("HIERARCHY\nROOT Hips\n")
    one, two = (run(source, tmp_path / f"{n}", workers=n) for n in (1, 2))
    assert [entry["name"] for entry in one.refused] == ["broken"]
    for file in sorted(one.folder.iterdir()):
        assert file.read_bytes() == (two.folder / file.name).read_bytes()


def test_a_table_of_captions(source, tmp_path):
    table = tmp_path / "t.csv"
    table.write_text(
        "name,caption,start,end,split,fps\n"
        'a_1,"one, two",,,val,\n'
        "a_1,three,,,,\n"
        "a_2.bvh,four,0.5,3,train,40\n"
        "deep/b_1,five,0,9,,\n"
        "nobody,six,,,,\n"
        "a_1,seven,x,1,,\n"
        "a_1,eight,1,,,\n"
        "a_1,nine,,,test,\n"
        ",ten,,,,\n"
    )
    data = run(source, tmp_path / "set", captions=table, min_frames=20)
    assert data.clip_names == ["a_1", "a_2", "b_1@0-180"]
    assert data.clip_splits == ["val", "train", "train"]
    assert [data.caption(c) for c in range(data.n_captions)] == ["one, two", "three", "four", "five"]
    # 81 frames at 40 a second are 41 at 20.
    assert len(data.clip_features(1)) == 40
    assert data.clip_meta(1)["source_fps"] == 40
    assert reasons(data) == [
        ("line 10", "row without a name"),
        ("line 7", "start is not a number"),
        ("line 8", "start without end, or end without start"),
        ("line 9", "another split than the rows before say"),
        ("nobody", "captions without a motion"),
    ]
    rows = [
        {"name": "a_1", "caption": "one"},
        ["a"],
        {"name": "a_1", "caption": "\ud800"},
        {"name": "a_2", "caption": " "},
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = run(source, tmp_path / "lines", captions=tmp_path / "t.jsonl")
    assert data.clip_names == ["a_1"]
    assert ("b_1", "no caption") in reasons(data)
    assert ("a_2", "empty caption") in reasons(data)
    assert ("line 2", "not a JSON object") in reasons(data)
    assert ("line 3", "not valid text") in reasons(data)
    for name, text, message in [
        ("x.csv", "file,text\na,b\n", "expected a header with name and caption or label"),
        ("x.csv", "name,caption\n", "names no motion"),
        ("x.tsv", "name\tcaption\n", "unknown suffix"),
        ("x.csv", "name,caption\na,\x00\udcff\n", "not a readable table|names no motion"),
    ]:
        (tmp_path / name).write_text(text, errors="surrogateescape")
        with pytest.raises(ScaMoError, match=message):
            run(source, tmp_path / "bad", captions=tmp_path / name)


def test_labels_and_templates(source, tmp_path):
    for path in source.rglob("*.txt"):
        path.unlink()
    (source / "a_1.bvh").rename(source / "Old_FW-01.bvh")
    data = run(source, tmp_path / "set", template="a person does: {label} ({1})")
    first = data.caption(0), data.caption_meta(0)
    assert first == ("a person does: Old FW (FW-01)", {"label": "Old FW"})
    (tmp_path / "t.csv").write_text("name,label\na_2,jump\n")
    data = run(source, tmp_path / "labels", captions=tmp_path / "t.csv", template="They {label}.")
    assert [data.caption(c) for c in range(data.n_captions)] == ["They jump."]
    assert reasons(data) == [("Old_FW-01", "no label"), ("b_1", "no label")]
    with pytest.raises(ScaMoError, match="no clip was kept; refused: the template does not fit"):
        run(source, tmp_path / "bad", template="{nothing}")
    assert [label_of(s) for s in ("jump_high-02", "walk1", "12")] == ["jump high", "walk", "12"]


def test_mirrored_copies(source, tmp_path):
    data = run(source, tmp_path / "set", mirror=True)
    assert data.clip_names[:2] == ["a_1", "Ma_1"]
    assert data.caption(1) == "A person walks to the right."
    joints = mirror_joints(retarget(read_bvh(source / "a_1.bvh")).joints)
    np.testing.assert_array_equal(data.clip_features(1), joints_to_features(joints))


def test_skeletons(source, tmp_path):
    np.save(tmp_path / "t.npy", DEFAULT_OFFSETS * 1.1)
    lengths = np.linalg.norm(DEFAULT_OFFSETS * 1.1, axis=-1)
    for key in ("target_offsets", "rest_pose"):
        data = run(source, tmp_path / key, **{key: tmp_path / "t.npy"})
        found = offsets_from_joints(features_to_joints(data.clip_features(0)[:1])[0])
        np.testing.assert_allclose(np.linalg.norm(found, axis=-1), lengths, atol=1e-4)
    np.save(tmp_path / "bad.npy", DEFAULT_OFFSETS[:5])
    with pytest.raises(ScaMoError, match=r"bad\.npy: .*expected \(22, 3\) finite metres"):
        run(source, tmp_path / "bad", target_offsets=tmp_path / "bad.npy")


def test_splits_depend_on_the_name_alone(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    Motion(walk(51)).save(folder / "s0_0.bvh")
    names = [f"s{i}_{j}" for i in range(12) for j in range(3)]
    for name in names[1:]:
        shutil.copy(folder / "s0_0.bvh", folder / f"{name}.bvh")
    options = {"template": "x", "progress": False, "split": (0.5, 0.25, 0.25), "mirror": True}
    whole = prepare_mocap(folder, tmp_path / "whole", **options)
    where = dict(zip(whole.clip_names, whole.clip_splits, strict=True))
    assert set(where.values()) == {"train", "val", "test"}
    assert all(where[name] == where[f"M{name}"] for name in names)
    by_subject = prepare_mocap(folder, tmp_path / "subjects", split_by="subject", **options)
    found = dict(zip(by_subject.clip_names, by_subject.clip_splits, strict=True))
    assert all(len({found[f"s{i}_{j}"] for j in range(3)}) == 1 for i in range(12))
    for name in names[::2]:
        (folder / f"{name}.bvh").unlink()
    fewer = prepare_mocap(folder, tmp_path / "fewer", **options)
    assert all(where[n] == s for n, s in zip(fewer.clip_names, fewer.clip_splits, strict=True))


def test_bad_files_are_counted_and_strict_stops(source, tmp_path):
    good = (source / "a_1.bvh").read_text()
    last = good.rindex("\n", 0, -1) + 1
    bad = {
        "broken": good[: len(good) // 2],
        "names": good.replace("left_knee", "lk"),
        "jump": f"{good[:last]}99 {good[last:].split(' ', 1)[1]}",
        "tiny": good.replace("OFFSET 0.0", "OFFSET nan", 1),
    }
    for name, text in bad.items():
        (source / f"{name}.bvh").write_text(text)
        (source / f"{name}.txt").write_text("x")
    Motion(walk(30)).save(source / "short.bvh")
    (source / "short.txt").write_text("x")
    Motion(walk(50)).save(source / "silent.bvh")
    Motion(walk(50)).save(source / "odd.bvh")
    (source / "odd.txt").write_bytes(b"\xff\xfe\xfa")
    (source / "lost_1.amc").write_text("1\nroot 0 0 0 0 0 0\n")
    (source / "lost_1.txt").write_text("x")
    data = run(source, tmp_path / "set")
    assert data.clip_names == ["a_1", "a_2", "b_1@0-147", "b_1@147-293", "b_1@293-440"]
    found = dict(reasons(data))
    assert found == {
        "broken": "motion file unreadable",
        "names": "cannot be retargeted",
        "jump": "the root jumps",
        "tiny": "motion file unreadable",
        "short": "too short",
        "silent": "caption file missing",
        "odd": "caption file unreadable",
        "lost_1": "motion file unreadable",
    }
    details = {entry["name"]: entry["detail"] for entry in data.refused}
    assert "broken.bvh: line" in details["broken"]
    assert "wants left_knee" in details["names"]
    with pytest.raises(ScaMoError, match="^broken: motion file unreadable: .*line"):
        run(source, tmp_path / "strict", strict=True)
    assert not (tmp_path / "strict").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": (0.5, 0.5)}, "split = "),
        ({"split": (0, 0.5, 0.5)}, "split = "),
        ({"split_by": "day"}, "split_by = 'day'"),
        ({"long": "keep"}, "long = 'keep'"),
        ({"fps": 0}, "fps = 0"),
        ({"source_fps": -1}, "source_fps = -1"),
        ({"min_frames": 50, "max_frames": 50}, "min_frames = 50, max_frames = 50"),
        ({"units": "yard"}, "units: 'yard'"),
        ({"up": "w"}, "up: 'w'"),
        ({"joint_map": "none"}, "no joint map of that name"),
        ({"captions": "none.csv"}, r"none\.csv: no such file"),
    ],
)
def test_bad_arguments_are_named(source, tmp_path, options, message):
    with pytest.raises(ScaMoError, match=message):
        prepare_mocap(source, tmp_path / "set", progress=False, **options)


def test_no_motion(tmp_path):
    with pytest.raises(ScaMoError, match="no such folder"):
        prepare_mocap(tmp_path / "none", tmp_path / "set")
    with pytest.raises(ScaMoError, match=r"holds no file with one of the suffixes \.bvh, \.amc"):
        prepare_mocap(tmp_path, tmp_path / "set")


def test_real_files(shared, tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    for path in [*(shared / "data" / "asf_amc").iterdir(), *(shared / "data" / "bvh").iterdir()]:
        if path.name.split(".")[0] not in ("01_02", "01_05", "49_02"):
            shutil.copy(path, folder)
    data = run(folder, tmp_path / "set", template="a person does {label}")
    assert set(reasons(data)) == {("127_10", "too short"), ("35_22.mb", "too short")}
    assert [note["name"] for note in data.manifest["notes"]] == ["07_12.mb"]
    for clip in range(data.n_clips):
        heights = data.clip_features(clip)[:, 4:67].reshape(-1, 21, 3)[..., 1]
        assert 1.2 < np.median(heights[:, 14]) < 1.75, "head"
        assert np.quantile(heights[:, [6, 7, 9, 10]].min(1), 0.05) < 0.05, "feet on the floor"
    walks = [i for i, name in enumerate(data.clip_names) if name[:5] in ("35_02", "08_04", "07_12")]
    assert len(walks) == 3
    for clip in walks:
        forward = data.clip_features(clip)[:, 2]
        assert (forward > 0.02).mean() > 0.95, "walks ahead at more than 0.4 m/s"
    assert MotionDataset.open(tmp_path / "set", verify="full").n_clips == data.n_clips


def test_272_features_of_real_files_agree_with_their_rotations(shared, tmp_path):
    """A spine of other joints than ours moves the upper body as a whole by centimetres; legs stay."""
    folder = tmp_path / "source"
    folder.mkdir()
    for name in ("bvh/06_06.mb.bvh", "bvh/131_01.max.bvh", "asf_amc/05.asf", "asf_amc/05_02.amc"):
        shutil.copy(shared / "data" / name, folder)
    data = run(folder, tmp_path / "set", feature_dim=272, template="a person does {label}")
    assert data.n_clips == 3
    for clip in range(data.n_clips):
        assert Representation.of(272).rotations_off(data.clip_features(clip)) < 1e-4
    body = retarget(read_bvh(folder / "06_06.mb.bvh"), fps=30)
    turned = forward_kinematics(body.rotations, body.offsets, body.joints[:, 0].astype(float))
    off = np.linalg.norm(turned - body.joints, axis=-1)
    assert off[:, [1, 2, 4, 5, 7, 8, 10, 11]].max() < 1e-5, "legs"
    assert 0.01 < off.max() < 0.1, "the upper body"


@pytest.mark.parametrize("seed", range(2))
def test_no_mutilated_folder_crashes(source, tmp_path, seed):
    rng = np.random.default_rng(seed)
    files = sorted(p for p in source.rglob("*") if p.is_file() and not p.name.startswith("a_1"))
    whole = {path: path.read_bytes() for path in files}
    (tmp_path / "t.csv").write_text("name,caption,start,end\na_1,one,,\na_2,two,0,3\nb_1,three,,\n")
    table = (tmp_path / "t.csv").read_bytes()
    kept, stopped = 0, []
    for round_ in range(12):
        for path, content in whole.items():
            data = bytearray(content)
            for _ in range(int(rng.integers(1, 6))):
                at = int(rng.integers(0, min(len(data), 4000)))
                data[at] = int(rng.integers(0, 256))
            path.write_bytes(bytes(data[: int(rng.integers(len(data) // 2, len(data) + 1))]))
        spoiled = bytearray(table)
        spoiled[int(rng.integers(20, len(spoiled)))] = int(rng.integers(0, 256))
        (tmp_path / "t.csv").write_bytes(bytes(spoiled))
        captions = None if round_ % 2 else tmp_path / "t.csv"
        try:
            data = run(source, tmp_path / "set", captions=captions, overwrite=True)
            kept += data.n_clips
        except ScaMoError:
            stopped.append(captions is not None)
    assert all(stopped), "one clip with its captions is whole: only a spoiled table stops all"
    assert kept >= 6
