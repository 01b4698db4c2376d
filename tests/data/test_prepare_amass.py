"""AMASS and index.csv: the cuts of HumanML3D, its mirrored copies, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.transform import Rotation, Slerp

from scamo.data.dataset import MotionDataset
from scamo.data.prepare.amass import prepare_amass
from scamo.errors import ScaMoError
from scamo.motion import features272
from scamo.motion.features import joints_to_features, offsets_from_joints
from scamo.motion.skeleton import DEFAULT_OFFSETS, PARENTS, mirror_joints
from scamo.motion.synthetic import corpus_clip

HEADER = "source_path,start_frame,end_frame,new_name\n"
HANDS = [20] * 15 + [21] * 15


def body_fields(scale):
    """A model whose vertices are the joints of the default body, scaled; betas move them."""
    rest = np.zeros((22, 3))
    for joint in range(1, 22):
        rest[joint] = rest[PARENTS[joint]] + DEFAULT_OFFSETS[joint]
    rest = scale * np.concatenate([rest, rest[HANDS]]) + [0, 0.1, 0.02]
    rng = np.random.default_rng(0)
    return {
        "v_template": rest,
        "J_regressor": np.eye(52),
        "shapedirs": rng.normal(0, 0.005, (52, 3, 16)),
        "kintree_table": np.array([[2**32 - 1, *PARENTS[1:], *HANDS], range(52)], dtype=np.uint32),
    }


def recording(fps, seconds, seed, gender="female"):
    """AMASS's fields of a smooth motion with Z up."""
    rng = np.random.default_rng(seed)
    t = np.arange(int(fps * seconds)) / fps
    waves = rng.normal(0, 0.3, (156,)) * np.sin(rng.uniform(1, 4, 156) * t[:, None])
    poses = waves.reshape(-1, 52, 3)
    upright = Rotation.from_euler("x", 90, degrees=True)
    yaw = Rotation.from_rotvec(np.outer(0.4 * t, [0, 0, 1]))
    poses[:, 0] = (yaw * upright * Rotation.from_rotvec(poses[:, 0])).as_rotvec()
    trans = np.stack([0.5 * t, 0.2 * np.sin(t), 0.05 * np.sin(3 * t)], -1) + [1, 2, 0.9]
    return {
        "poses": poses.reshape(len(t), 156),
        "trans": trans,
        "betas": rng.normal(size=16),
        "gender": np.array(gender),
        "mocap_framerate": np.array(float(fps)),
        "dmpls": np.zeros((len(t), 8)),
    }


def literal_joints(fields, body, frames):
    """Joints as HumanML3D's scripts make them of these frames: posed, Y and Z swapped, X negated."""
    rest = body["v_template"] + body["shapedirs"][..., :10] @ fields["betas"][:10]
    out = []
    for frame in frames:
        turns, places = [], []
        for joint in range(22):
            own = Rotation.from_rotvec(fields["poses"][frame, 3 * joint : 3 * joint + 3])
            parent = PARENTS[joint]
            turns.append(own if joint == 0 else turns[parent] * own)
            if joint == 0:
                places.append(rest[0] + fields["trans"][frame])
            else:
                places.append(places[parent] + turns[parent].apply(rest[joint] - rest[parent]))
        out.append(np.array(places)[:, [0, 2, 1]] * [-1, 1, 1])
    return np.array(out)


BODIES = {"male": body_fields(1.1), "female": body_fields(1.0)}
# In the index, on disk, and what is recorded.
SOURCES = {
    "CMU/x/x_01_poses": ("CMU/x/x_01_poses", recording(120, 6, 1, "male")),
    "Eyes_Japan_Dataset/a/turn-03-look at_poses": (
        "Eyes_Japan_Dataset/a/turn-03-look_at_poses",
        recording(60, 8, 2),
    ),
    "Transitions_mocap/b/c_poses": ("Transitions/b/c_poses", recording(100, 5, 3, "neutral")),
    "KIT/3/kick_poses": ("KIT/3/kick_poses", recording(250, 4, 4)),
}
ROWS = [
    ("CMU/x/x_01_poses", 10, 70, "000001"),
    ("CMU/x/x_01_poses", 0, 50, "000002"),
    ("Eyes_Japan_Dataset/a/turn-03-look at_poses", 5, 65, "000003"),
    ("Transitions_mocap/b/c_poses", 0, 60, "000004"),
    ("KIT/3/kick_poses", 2, 200, "000005"),
]
TRIM = {"000003": 60, "000004": 10}


@pytest.fixture
def folder(tmp_path):
    """AMASS, HumanAct12, the bodies, index and texts, as a user has them."""
    for gender, fields in BODIES.items():
        (tmp_path / "smplh" / gender).mkdir(parents=True)
        np.savez(tmp_path / "smplh" / gender / "model.npz", **fields)
    for on_disk, fields in SOURCES.values():
        path = tmp_path / "amass" / f"{on_disk}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, **fields)
    act = tmp_path / "amass/humanact12/humanact12"
    act.mkdir(parents=True)
    joints = corpus_clip(0).joints[:60]
    np.save(act / "P1.npy", np.concatenate([joints, joints[:, 20:]], axis=1))  # HumanAct12 has 24
    lines = [f"./pose_data/{source}.npy,{a},{b},{name}.npy\n" for source, a, b, name in ROWS]
    lines.append("./pose_data/humanact12/humanact12/P1.npy,0,-1,000006.npy\n")
    (tmp_path / "index.csv").write_text(HEADER + "".join(lines))
    texts = tmp_path / "HumanML3D" / "texts"
    texts.mkdir(parents=True)
    names = [f"00000{i}" for i in range(1, 7)]
    for name in names:
        (texts / f"{name}.txt").write_text("he lifts his left arm#he/PRON#0.0#0.0\n")
    (texts / "000005.txt").write_text("he kicks#he/PRON#0.0#0.0\nhe turns left#he/PRON#0.5#2.0\n")
    (tmp_path / "HumanML3D/train.txt").write_text("".join(f"{n}\nM{n}\n" for n in names[:4]))
    (tmp_path / "HumanML3D/test.txt").write_text("".join(f"{n}\nM{n}\n" for n in names[4:]))
    return tmp_path


def prepared(folder, name="set", **options):
    options = {"model": folder / "smplh", "min_frames": 10, "progress": False} | options
    return prepare_amass(
        folder / "amass", folder / "index.csv", folder / "HumanML3D", folder / name, **options
    )


def expected_joints(row):
    source, start, end, name = row
    fields = SOURCES[source][1]
    stride = int(fields["mocap_framerate"] / 20)
    frames = np.arange(0, len(fields["poses"]), stride)[TRIM.get(name, 0) :][start:end]
    return literal_joints(fields, BODIES["male" if fields["gender"] == "male" else "female"], frames)


def test_263_features_are_those_of_humanml3d(folder):
    data = prepared(folder)
    assert (data.feature_dim, data.fps, data.refused) == (263, 20, [])
    assert data.manifest["provenance"]["skeleton"] == "kept"
    for row in ROWS:
        joints = expected_joints(row)
        for name, want in ((row[3], joints), (f"M{row[3]}", mirror_joints(joints))):
            clip = data.clip_names.index(name)
            np.testing.assert_allclose(data.clip_features(clip), joints_to_features(want), atol=1e-5)
    act = data.clip_names.index("000006")
    joints = corpus_clip(0).joints[:60]
    np.testing.assert_array_equal(data.clip_features(act), joints_to_features(joints))
    assert data.clip_splits[act] == "test"
    captions = {data.clip_names[c]: data.caption(int(data.captions_of(c)[0])) for c in range(data.n_clips)}
    assert captions["000001"] == "he lifts his left arm"
    assert captions["M000001"] == "he lifts his right arm"


def test_oddities_are_noted(folder):
    notes = {(n["name"], n["reason"]): n["detail"] for n in prepared(folder).manifest["notes"]}
    assert notes == {
        (name, reason): detail
        for name in ("000005", "M000005")
        for reason, detail in (
            ("counted as 20 fps in the index, which it is not", "every 12th frame of 250 fps"),
            ("the index goes on after the motion", "to frame 200 of 84"),
        )
    }


def test_the_uniform_skeleton_is_that_of_clip_000021(folder):
    index = folder / "index.csv"
    index.write_text(index.read_text() + "./pose_data/CMU/x/x_01_poses.npy,30,90,000021.npy\n")
    (folder / "HumanML3D/texts/000021.txt").write_text("x\n")
    (folder / "HumanML3D/val.txt").write_text("000021\n")
    data = prepared(folder)
    assert data.manifest["provenance"]["skeleton"] == "that of clip 000021"
    target = offsets_from_joints(expected_joints(("CMU/x/x_01_poses", 30, 90, ""))[0])
    for row in ROWS:
        want = joints_to_features(expected_joints(row), target_offsets=target)
        np.testing.assert_allclose(data.clip_features(data.clip_names.index(row[3])), want, atol=1e-5)
    np.save(folder / "target.npy", 1.2 * target)
    given = prepared(folder, "given", target_offsets=folder / "target.npy")
    assert given.manifest["provenance"]["skeleton"] == "given"
    want = joints_to_features(expected_joints(ROWS[0]), target_offsets=1.2 * target)
    np.testing.assert_allclose(given.clip_features(0), want, atol=1e-5)


def true_motion(row):
    """Joints and rotations at the true times of a row, 30 times a second, with scipy's own interpolation."""
    source, start, end, name = row
    fields = SOURCES[source][1]
    fps = float(fields["mocap_framerate"])
    frames = np.arange(0, len(fields["poses"]), int(fps / 20))[TRIM.get(name, 0) :][start:end]
    seconds = np.arange(len(fields["poses"])) / fps
    times = seconds[frames[0]] + np.arange(1000) / 30
    times = times[times <= seconds[frames[-1]] + 1e-9]
    between = {
        "poses": np.concatenate(
            [
                Slerp(seconds, Rotation.from_rotvec(fields["poses"][:, j : j + 3]))(
                    np.minimum(times, seconds[-1])
                ).as_rotvec()
                for j in range(0, 66, 3)
            ],
            axis=1,
        ),
        "trans": np.stack([np.interp(times, seconds, column) for column in fields["trans"].T], -1),
        "betas": fields["betas"],
    }
    joints = literal_joints(
        between, BODIES["male" if fields["gender"] == "male" else "female"], range(len(times))
    )
    rotations = Rotation.from_rotvec(between["poses"].reshape(-1, 3)).as_matrix()
    rotations = rotations.reshape(len(times), 22, 3, 3)
    rotations[:, 0] = np.array([[-1, 0, 0], [0, 0, 1], [0, 1, 0]]) @ rotations[:, 0]
    return joints, rotations


def test_272_features_have_true_times_and_rotations(folder):
    data = prepared(folder, feature_dim=272)
    assert (data.feature_dim, data.fps) == (272, 30)
    assert {(r["name"], r["reason"]) for r in data.refused} == {
        (name, "joints without rotations") for name in ("000006", "M000006")
    }
    for row in ROWS:
        joints, rotations = true_motion(row)
        clip = data.clip_names.index(row[3])
        want = features272.encode(joints, rotations).features
        np.testing.assert_allclose(data.clip_features(clip), want, atol=1e-5)
        made = features272.to_joints(data.clip_features(clip))
        by_rotations = features272.to_joints_by_rotations(data.clip_features(clip))
        np.testing.assert_allclose(by_rotations, made, atol=1e-5)
        mirrored = data.clip_features(data.clip_names.index(f"M{row[3]}"))
        np.testing.assert_array_equal(features272.to_joints(mirrored), mirror_joints(made))
        assert data.clip_meta(clip)["rotations"] == "true"


def test_time_tags_follow_the_true_times(folder):
    """The index counts every 12th frame of 250 fps as 1/20 s: 0.96 s to its second."""
    data = prepared(folder, feature_dim=272)
    parts = [tuple(data.item_table[i]) for i in range(data.n_items) if data.item_table[i][1] > 0]
    clips = [data.clip_names.index(name) for name in ("000005", "M000005")]
    assert parts == [(clip, int(0.5 * 0.96 * 30), int(2 * 0.96 * 30)) for clip in clips]


def test_joints_alone_are_fitted_when_asked(folder):
    data = prepared(folder, feature_dim=272, fit_joints=True)
    clip = data.clip_names.index("000006")
    assert data.clip_meta(clip) == {
        "from": "humanact12/humanact12/P1.npy",
        "rotations": "fitted",
        "mirrored": False,
    }
    joints = corpus_clip(0).joints[:60]
    made = features272.to_joints(data.clip_features(clip))
    assert len(made) == int(59 / 20 * 30) + 1
    # Every third frame at 30 fps is every second one at 20.
    lengths = np.linalg.norm(joints[::2, 4] - joints[::2, 15], axis=-1)
    np.testing.assert_allclose(np.linalg.norm(made[::3, 4] - made[::3, 15], axis=-1), lengths, atol=1e-5)


def test_everything_left_out_is_listed(folder):
    amass = folder / "amass"
    index = folder / "index.csv"
    lines = index.read_text().splitlines()
    good = SOURCES["CMU/x/x_01_poses"][1]
    made = {
        "slow": good | {"mocap_framerate": np.array(15.0)},
        "fast": good | {"mocap_framerate": np.array(1e300)},
        "nan_rate": good | {"mocap_framerate": np.array(np.nan)},
        "text_rate": good | {"mocap_framerate": np.array("fast")},
        "nan": good | {"poses": np.where(np.arange(156) == 4, np.nan, good["poses"])},
        "late_nan": good
        | {"trans": np.where(np.arange(len(good["trans"]))[:, None] > 300, np.inf, good["trans"])},
        "betas": good | {"betas": np.full(16, np.nan)},
        "shape": good | {"poses": good["poses"][:, :63]},
        "objects": good | {"gender": np.array({"a": 1}, dtype=object)},
        "lacking": {"betas": good["betas"], "gender": good["gender"]},
    }
    for name, fields in made.items():
        np.savez(amass / f"CMU/{name}.npz", **fields)
    whole = (amass / "CMU/x/x_01_poses.npz").read_bytes()
    (amass / "CMU/cut.npz").write_bytes(whole[: len(whole) // 2])
    (amass / "CMU/text.npz").write_text("hello")
    names = [*made, "cut", "text", "missing"]
    lines += [f"./pose_data/CMU/{name}.npy,0,60,{name}.npy" for name in names]
    act = amass / "humanact12"
    np.save(act / "few.npy", np.zeros((30, 21, 3)))
    np.save(act / "broken.npy", np.full((30, 24, 3), np.nan))
    lines += [f"./pose_data/humanact12/humanact12/{name}.npy,0,-1,{name}.npy" for name in ("few", "broken")]
    lines += [
        "./pose_data/CMU/x/x_01_poses.npy,500,560,after.npy",
        "./pose_data/CMU/x/x_01_poses.npy,0,9,short.npy",
        "./pose_data/CMU/x/x_01_poses.npy,20,10,backwards.npy",
        "./pose_data/CMU/x/x_01_poses.npy,0,x,letters.npy",
        "./pose_data/CMU/x/x_01_poses.npy,0,60",
        "./pose_data/../secret.npy,0,60,outside.npy",
        "./pose_data/CMU/x/x_01_poses.npy,0,60,../evil.npy",
        "./pose_data/CMU/x/x_01_poses.npy,0,60,000001.npy",
        "./pose_data/CMU/x/x_01_poses.npy,0,60,unlisted.npy",
        "",
    ]
    index.write_text("\n".join(lines))
    listed = [*names, "few", "broken", "after", "short", "unindexed", "000001"]
    with (folder / "HumanML3D/train.txt").open("a") as file:
        file.write("".join(f"{name}\n" for name in listed))
    for name in listed:
        (folder / f"HumanML3D/texts/{name}.txt").write_text("x\n")
    (folder / "HumanML3D/texts/000002.txt").unlink()
    data = prepared(folder)

    found = {r["name"]: (r["reason"], r["detail"]) for r in data.refused if r["reason"] != "bad index row"}
    assert {name: reason for name, (reason, _) in found.items()} == {
        "slow": "wrong fps",
        "fast": "wrong fps",
        "nan_rate": "wrong fps",
        "text_rate": "wrong shape",
        "nan": "NaN or infinite poses",
        "betas": "NaN or infinite betas",
        "shape": "wrong shape",
        "objects": "AMASS file unreadable",
        "lacking": "fields missing",
        "cut": "AMASS file unreadable",
        "text": "AMASS file unreadable",
        "missing": "motion file missing",
        "late_nan": "NaN or infinite poses",
        "few": "wrong shape",
        "broken": "features cannot be computed",
        "after": "too short",
        "short": "too short",
        "unindexed": "not in the index",
        "unlisted": "in no split list",
        "000001": "in the split lists twice",
        "000002": "caption file missing",
        "M000002": "caption file missing",
    }
    assert found["late_nan"][1] == "index line 13: CMU/late_nan.npz: frame 301"
    assert found["lacking"][1].endswith("CMU/lacking.npz: lacks poses, trans, mocap_framerate")
    bad = {r["detail"].split(":")[0]: r["detail"] for r in data.refused if r["reason"] == "bad index row"}
    first = lines.index("./pose_data/CMU/x/x_01_poses.npy,20,10,backwards.npy") + 1
    assert list(bad) == [f"index.csv line {first + i}" for i in range(6)]
    assert bad[f"index.csv line {first}"].endswith("frames 20 to 10: expected 0 <= start < end")
    assert "000001 is in line 2 too" in bad[f"index.csv line {first + 5}"]
    assert len(data.refused) == len(found) + len(bad)
    assert sorted(data.clip_names) == sorted([f"{m}00000{i}" for i in (1, 3, 4, 5, 6) for m in ("", "M")])
    with pytest.raises(ScaMoError, match="bad index row: index.csv line"):
        prepared(folder, "strict", strict=True)
    assert not (folder / "strict").exists()


def test_strict_stops_only_for_a_reason(folder):
    assert prepared(folder, strict=True).n_clips == 12
    with pytest.raises(ScaMoError, match="000006: joints without rotations: index line 7"):
        prepared(folder, "other", strict=True, feature_dim=272)


def test_mirroring_can_be_turned_off(folder):
    data = prepared(folder, mirror=False)
    assert sorted(data.clip_names) == [f"00000{i}" for i in range(1, 7)]
    assert {r["reason"] for r in data.refused} == {"mirrored copies are turned off"}


def test_one_body_for_everybody(folder):
    data = prepared(folder, model=folder / "smplh/male/model.npz")
    source, start, end, _ = ROWS[2]
    frames = np.arange(0, 480, 3)[60:][start:end]
    want = joints_to_features(literal_joints(SOURCES[source][1], BODIES["male"], frames))
    np.testing.assert_allclose(data.clip_features(data.clip_names.index("000003")), want, atol=1e-5)


@pytest.mark.parametrize("feature_dim", [263, 272])
def test_any_number_of_workers_gives_the_same_bytes(folder, feature_dim):
    options = {"feature_dim": feature_dim, "fit_joints": True}
    one, two = prepared(folder, "one", **options), prepared(folder, "two", workers=2, **options)
    files = sorted(path.name for path in one.folder.iterdir())
    assert files == sorted(path.name for path in two.folder.iterdir())
    for name in files:
        assert (one.folder / name).read_bytes() == (two.folder / name).read_bytes()
    assert MotionDataset.open(one.folder, verify="full").n_clips == 12


def test_what_the_user_gives_is_checked(folder):
    for options, message in [
        ({"feature_dim": 251}, "feature_dim = 251: expected 263 or 272"),
        ({"feature_dim": 100}, "feature_dim = 100: expected one of"),
        ({"feature_dim": 272, "target_offsets": "x.npy"}, "target_offsets: 272 features keep"),
        ({"model": folder / "nowhere.npz"}, r"nowhere\.npz: no such file\. SMPL\+H is at"),
        ({"model": folder / "amass"}, r"amass/male/model\.npz: no such file"),
    ]:
        with pytest.raises(ScaMoError, match=message):
            prepared(folder, **options)
    (folder / "index.csv").write_text("a,b\n")
    with pytest.raises(ScaMoError, match=r"index\.csv: line 1 is 'a,b', expected source_path,"):
        prepared(folder)
    (folder / "index.csv").write_text(HEADER + '"' + "x\n" * 80000)
    with pytest.raises(ScaMoError, match=r"index\.csv: line \d+: field larger than field limit"):
        prepared(folder)
    (folder / "index.csv").unlink()
    with pytest.raises(ScaMoError, match=r"index\.csv: no such file"):
        prepared(folder)
    assert not (folder / "set").exists()


def test_the_published_index_is_read(folder, shared):
    """CMU's part of the real index: without the files every row is refused with its line, and none is bad."""
    index = shared / "data" / "humanml3d_cmu" / "index_cmu_covered.csv"
    (folder / "index.csv").write_text(index.read_text() + (folder / "index.csv").read_text()[len(HEADER) :])
    texts = folder / "HumanML3D/texts"
    names = [line.rsplit(",", 1)[1][:-4] for line in index.read_text().split()[1:]]
    with (folder / "HumanML3D/train.txt").open("a") as file:
        file.write("".join(f"{name}\n" for name in names))
    for name in names:
        (texts / f"{name}.txt").write_text("x\n")
    data = prepared(folder)
    missing = [r["name"] for r in data.refused if r["reason"] == "motion file missing"]
    assert sorted(missing) == sorted(names)
    assert len(data.refused) == len(names)
