"""A folder of Motion-X's shape, made of poses of our own, and a body of SMPL-X's shape."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from scamo.data.prepare.motionx import prepare_motionx
from scamo.errors import ScaMoError
from scamo.motion.features import joints_to_features
from scamo.motion.skeleton import DEFAULT_OFFSETS, PARENTS, mirror_joints

SHAPES = np.random.default_rng(0).normal(scale=0.01, size=(55, 3, 12))
BETAS = np.linspace(-1, 1, 10)


def rest():
    places = np.array(DEFAULT_OFFSETS, dtype=np.float64)
    for joint, parent in enumerate(PARENTS[1:], 1):
        places[joint] += places[parent]
    return places


def poses(frames=80, seed=0, z_up=False):
    """One who stands, sways and drifts."""
    rng = np.random.default_rng(seed)
    motion = rng.normal(size=(frames, 322))  # hands and face must not matter
    waves = np.sin(np.arange(frames)[:, None] / 7 + rng.uniform(0, 6, 66))
    motion[:, :66] = 0.15 * waves
    motion[:, 309:312] = np.arange(frames)[:, None] * [0.01, 0, 0.02]
    motion[:, 312:] = BETAS
    if z_up:
        turn = Rotation.from_euler("X", 90, degrees=True)
        motion[:, :3] = (turn * Rotation.from_rotvec(motion[:, :3])).as_rotvec()
        motion[:, 309:312] = turn.apply(motion[:, 309:312])
    return motion.astype(np.float32)


def joints_of(motion):
    """Link by link, by other means than the package's."""
    bones = rest() + SHAPES[:22, :, :10] @ BETAS
    out = []
    for frame in motion.astype(np.float64):
        turns, places = [], []
        for joint, parent in enumerate(PARENTS):
            own = Rotation.from_rotvec(frame[3 * joint : 3 * joint + 3])
            turns.append(own if joint == 0 else turns[parent] * own)
            start = bones[0] + frame[309:312] if joint == 0 else places[parent]
            step = 0 if joint == 0 else turns[parent].apply(bones[joint] - bones[parent])
            places.append(start + step)
        out.append(places)
    return np.array(out)


def at_20_fps(joints):
    times = np.arange(int((len(joints) - 1) / 1.5) + 1) * 1.5
    first = np.minimum(times.astype(int), len(joints) - 2)
    part = (times - first)[:, None, None]
    return (1 - part) * joints[first] + part * joints[first + 1]


def add(folder, name, motion, text="a person raises the left hand\n"):
    for part, suffix in (("motion_data/smplx_322", ".npy"), ("texts/semantic_labels", ".txt")):
        (folder / part / name).parent.mkdir(parents=True, exist_ok=True)
        path = folder / part / f"{name}{suffix}"
        np.save(path, motion) if suffix == ".npy" else path.write_text(text)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "MotionX"
    add(folder, "idea400/subset_0/Wave_clip_1", poses())
    add(folder, "kungfu/subset_1/x_clip1", poses(seed=1, z_up=True), "someone kicks\nsomeone turns\n")
    template = np.concatenate([rest(), np.zeros((33, 3))])
    parents = np.array([2**32 - 1, *PARENTS[1:], *([15] * 33)], dtype=np.uint32)
    np.savez(
        tmp_path / "SMPLX_NEUTRAL.npz",
        v_template=template,
        J_regressor=np.eye(55),
        shapedirs=SHAPES,
        kintree_table=np.stack([parents, np.arange(55, dtype=np.uint32)]),
        dynamic_lmk_faces_idx=np.array([{}]),  # the real file has pickles that need not be read
    )
    return folder


def run(folder, name="set", **options):
    options = {"model": folder.parent / "SMPLX_NEUTRAL.npz", "split": (1, 0, 0), "progress": False} | options
    return prepare_motionx(folder, folder.parent / name, **options)


def test_poses_become_features_at_20_fps(folder):
    data = run(folder, mirror=True)
    assert data.refused == []
    names = ["idea400/subset_0/Wave_clip_1", "idea400/subset_0/MWave_clip_1"]
    assert data.clip_names[:2] == names
    expected = at_20_fps(joints_of(poses()))
    for index, joints in enumerate((expected, mirror_joints(expected))):
        np.testing.assert_allclose(data.clip_features(index), joints_to_features(joints), rtol=0, atol=2e-4)
    # The second subset has Z up.
    expected = joints_to_features(at_20_fps(joints_of(poses(seed=1))))
    np.testing.assert_allclose(data.clip_features(2), expected, rtol=0, atol=2e-4)
    assert data.manifest["provenance"]["up"] == {"idea400": "y", "kungfu": "z"}
    assert data.caption(0) == "a person raises the left hand"
    assert data.caption(1) == "a person raises the right hand"


def test_subsets_made_by_the_user_need_their_rate(folder):
    add(folder, "humanml/000001", poses())
    with pytest.raises(ScaMoError, match="mocap_fps: the subset humanml"):
        run(folder)
    data = run(folder, mocap_fps=20)
    index = data.clip_names.index("humanml/000001")
    expected = joints_to_features(joints_of(poses()))
    np.testing.assert_allclose(data.clip_features(index), expected, rtol=0, atol=2e-4)


def test_the_split_lists_decide(folder):
    add(folder, "idea400/not_listed", poses())
    (folder / "train.txt").write_text("idea400/subset_0/Wave_clip_1\nhumanml/M000001\n")
    (folder / "test.txt").write_text("kungfu/subset_1/x_clip1\n")
    data = run(folder)  # nothing of humanml is there, so that its rate does not matter
    assert list(zip(data.clip_names, data.clip_splits, strict=True)) == [
        ("idea400/subset_0/Wave_clip_1", "train"),
        ("kungfu/subset_1/x_clip1", "test"),
    ]
    assert [(r["name"], r["reason"]) for r in data.refused] == [("humanml/M000001", "caption file missing")]
    (folder / "train.txt").write_text("../../secret\n")
    with pytest.raises(ScaMoError, match=r"train\.txt: '\.\./\.\./secret' is not a plain name"):
        run(folder, "other")


def test_what_is_wrong_is_listed(folder):
    nan = poses()
    nan[5, 310] = np.nan
    add(folder, "idea400/nan", nan)
    add(folder, "idea400/narrow", poses()[:, :263])
    add(folder, "idea400/one", poses()[:1])
    add(folder, "idea400/empty", poses(), "\n")
    add(folder, "idea400/silent", poses())
    (folder / "texts/semantic_labels/idea400/silent.txt").unlink()
    add(folder, "idea400/cut", poses())
    path = folder / "motion_data/smplx_322/idea400/cut.npy"
    path.write_bytes(path.read_bytes()[:1000])
    ignored = poses()
    ignored[:, 66:309] = np.nan  # hands and face are not read
    add(folder, "idea400/ignored", ignored)
    data = run(folder)
    found = {entry["name"].split("/")[-1]: (entry["reason"], entry["detail"]) for entry in data.refused}
    file = "motion_data/smplx_322/idea400"
    assert found["nan"] == ("NaN or infinite poses", f"{file}/nan.npy: frame 5")
    assert found["narrow"][1] == f"{file}/narrow.npy: float32 [80, 263], expected float [frames, 322]"
    assert {name: reason for name, (reason, _) in found.items()} == {
        "nan": "NaN or infinite poses",
        "narrow": "wrong shape",
        "one": "too short",
        "empty": "caption file without captions",
        "silent": "caption file missing",
        "cut": "motion file unreadable",
    }
    assert "idea400/ignored" in data.clip_names


def test_workers_give_the_same_bytes(folder):
    for seed in range(3):
        add(folder, f"idea400/c{seed}", poses(60 + 9 * seed, seed))
    for workers in (1, 2):
        run(folder, str(workers), workers=workers)
    one, two = ({path.name: path.read_bytes() for path in (folder.parent / str(n)).iterdir()} for n in (1, 2))
    assert one == two


def test_arguments(folder):
    for options, message in (
        ({"model": folder / "none.npz"}, "no such file"),
        ({"model": folder / "SMPLX_NEUTRAL.pkl"}, "expected a .npz"),
        ({"up": "w"}, "up"),
        ({"long": "keep"}, "long"),
        ({"mocap_fps": -1}, "mocap_fps"),
    ):
        with pytest.raises(ScaMoError, match=message):
            run(folder, **options)
    with pytest.raises(ScaMoError, match="expected Motion-X's"):
        run(folder / "texts", model=folder.parent / "SMPLX_NEUTRAL.npz")
