"""A folder of SnapMoGen's shape, made of motion of our own."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from scamo.data.dataset import MotionDataset
from scamo.data.prepare.snapmogen import prepare_snapmogen
from scamo.errors import ScaMoError
from scamo.motion.features296 import CONTACTS, N_JOINTS, PARENTS, POSITIONS, ROTATIONS, VELOCITIES

CAPTIONS = {"manual": ["The person walks.", "Someone\nstrolls."], "gpt": ["The person steps ahead."] * 4}
CLIPS = {
    "train": ["gp_00001#0#140", "gp_00001#140#302", "m_gp_00001#0#140", "m_gp_00001#140#302"],
    "val": ["st2_00002#10#170"],
    "test": ["gp_00001#100#240"],
}


def recording(frames, seed=0):
    """Features of a body that stands and sways: rotations, and positions that are theirs."""
    rng = np.random.default_rng(seed)
    offsets = rng.uniform(-15, 15, (N_JOINTS, 3))
    waves = rng.normal(size=(N_JOINTS, 3)) * np.sin(np.arange(frames + 1)[:, None, None] / 9)
    turns = Rotation.from_rotvec(0.3 * waves.reshape(-1, 3)).as_matrix().reshape(-1, N_JOINTS, 3, 3)
    places = np.zeros((frames + 1, N_JOINTS, 3))
    places[:, 0, 1] = 56
    for joint, parent in enumerate(PARENTS[1:], 1):
        places[:, joint] = places[:, parent] + turns[:, parent] @ offsets[joint]
    features = np.zeros((frames, 296))
    features[:, 3] = places[:-1, 0, 1]
    features[:, ROTATIONS] = turns[:-1, :, :, :2].swapaxes(-1, -2).reshape(frames, -1)
    features[:, POSITIONS] = places[:-1].reshape(frames, -1)
    features[:, VELOCITIES] = np.diff(places, axis=0).reshape(frames, -1)
    features[:, CONTACTS] = 1
    return features


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "SnapMoGen"
    for name in ("renamed_feats", "data_split_info"):
        (folder / name).mkdir(parents=True)
    for seed, name in enumerate(("gp_00001", "m_gp_00001", "st2_00002")):
        np.save(folder / "renamed_feats" / f"{name}.npy", recording(300, seed))
    for split, names in CLIPS.items():
        (folder / "data_split_info" / f"{split}_ids.txt").write_text("\n".join(names) + "\n")
    captions = {name: CAPTIONS for names in CLIPS.values() for name in names}
    (folder / "all_caption_clean.json").write_text(json.dumps(captions))
    return folder


def add(folder, clip, captions=CAPTIONS):
    with (folder / "data_split_info" / "train_ids.txt").open("a") as stream:
        stream.write(f"{clip}\n")
    path = folder / "all_caption_clean.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | ({clip: captions} if captions else {})))


def prepared(folder, **options):
    return prepare_snapmogen(folder, folder.parent / "out", progress=False, **options)


def test_snapmogen(folder):
    data = prepared(folder)
    assert (data.feature_dim, data.fps) == (296, 30)
    names = [name for split in CLIPS.values() for name in split]
    assert data.clip_names == names
    assert list(data.clip_splits) == ["train"] * 4 + ["val", "test"]
    np.testing.assert_array_equal(data.clip_features(0), np.float32(recording(140)))
    np.testing.assert_array_equal(data.clip_features(4), np.float32(recording(300, 2)[10:170]))
    captions = [(data.caption(c), data.caption_meta(c)["by"]) for c in data.captions_of(0)]
    assert captions[:3] == [
        ("The person walks.", "manual"),
        ("Someone strolls.", "manual"),
        ("The person steps ahead.", "gpt"),
    ]
    assert len(captions) == 6
    # Two frames less than the recording are no fault.
    assert data.clip_meta(3) == {
        "from": "renamed_feats/m_gp_00001.npy",
        "frames": [140, 300],
        "source_clip": "gp_00001#140#302",
    }
    assert not data.manifest["refused"]
    assert not data.manifest["notes"]


def test_what_is_wrong_is_refused_by_name(folder):
    feats = folder / "renamed_feats"
    bad = recording(300)
    bad[200, 7] = np.inf
    np.save(feats / "partly.npy", bad)
    np.save(feats / "wide.npy", bad[:, :272])
    np.save(feats / "cut.npy", bad)
    (feats / "cut.npy").write_bytes((feats / "cut.npy").read_bytes()[:-8])
    wanted = {
        "partly#150#300": ("NaN or infinite features", "frame 50, feature 7, 1 values in all"),
        "wide#0#150": (
            "wrong shape",
            "renamed_feats/wide.npy: float64 [300, 272], expected float [frames, 296]",
        ),
        "cut#0#150": ("motion file unreadable", None),
        "gone#0#150": ("motion file missing", "gone.npy"),
        "gp_00001#300#450": ("begins after its motion", "frame 300 of 300"),
        "gp_00001#0#127": ("too short", "127 frames, expected at least 128"),
        "gp_00001#9#3": ("malformed name", "train_ids.txt line 12: expected RECORDING#start#end"),
        "gp_00001#0": ("malformed name", "train_ids.txt line 13: expected RECORDING#start#end"),
        "../x#0#150": ("not a plain name", "train_ids.txt line 14"),
    }
    add(folder, "partly#0#150")
    for name in wanted:
        add(folder, name)
    for name, captions, case in [
        ("gp_00001#1#150", None, ("no caption", "all_caption_clean.json does not name it")),
        ("gp_00001#2#150", ["a"], ("malformed captions", "expected lists of manual and gpt")),
        ("gp_00001#3#150", {"manual": "a"}, ("malformed captions", "expected lists of manual and gpt")),
        (
            "gp_00001#4#150",
            {"manual": [" "], "gpt": [7, "\ud800"]},
            ("no usable caption", "1 captions in all"),
        ),
        ("gp_00001#0#140", CAPTIONS, ("name is empty or used twice", "'gp_00001#0#140'")),
    ]:
        add(folder, name, captions)
        wanted[name] = case
    data = prepared(folder)
    found = {e["name"]: (e["reason"], e["detail"]) for e in data.manifest["refused"] if e["kind"] == "clip"}
    wanted["cut#0#150"] = ("motion file unreadable", found["cut#0#150"][1])
    assert found == wanted
    assert "partly#0#150" in data.clip_names
    captions = [e["detail"] for e in data.manifest["refused"] if e["kind"] == "caption"]
    assert captions == ["gpt caption 0: not valid text", "gpt caption 1: not valid text", "caption 0: ''"]


def test_oddities_are_noted(folder):
    features = recording(300)
    features[:, ROTATIONS] = recording(300, 5)[:, ROTATIONS]
    np.save(folder / "renamed_feats" / "odd.npy", features)
    add(folder, "odd#0#150")
    add(folder, "gp_00001#150#303")
    notes = [(note["name"], note["reason"]) for note in prepared(folder).manifest["notes"]]
    assert notes == [
        ("odd#0#150", "rotations contradict positions"),
        ("gp_00001#150#303", "ends after its motion"),
    ]


def test_faults_of_the_whole(folder):
    captions = folder / "all_caption_clean.json"
    for text, message in [
        (b"[]", "all_caption_clean.json: expected an object, got list"),
        (b'{"a": ', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"1" * 5000, "not valid JSON"),
        (b'{"\xff": 1}', "is not UTF-8"),
        (b"{}", "no clip was kept"),
    ]:
        captions.write_bytes(text)
        with pytest.raises(ScaMoError, match=message):
            prepared(folder)
    captions.unlink()
    with pytest.raises(ScaMoError, match="all_caption_clean.json: cannot be read: No such file"):
        prepared(folder)
    captions.write_text("{}")
    with pytest.raises(ScaMoError, match="gp_00001#0#140: no caption"):
        prepared(folder, strict=True)
    (folder / "data_split_info" / "train_ids.txt").unlink()
    with pytest.raises(ScaMoError, match="train_ids.txt: no such file; expected RECORDING"):
        prepared(folder)
    with pytest.raises(ScaMoError, match="renamed_feats: no such folder"):
        prepare_snapmogen(folder.parent, folder.parent / "out", progress=False)


def test_two_workers_give_the_same(folder):
    out = folder.parent
    add(folder, "gone#0#150")
    prepare_snapmogen(folder, out / "one", progress=False)
    prepare_snapmogen(folder, out / "two", progress=False, workers=2)
    files = {path.name: path.read_bytes() for path in (out / "one").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (out / "two").iterdir()}


def test_damaged_files_stop_nothing(folder):
    rng = np.random.default_rng(0)
    for index in range(40):
        path = folder / "renamed_feats" / f"bad_{index}.npy"
        np.save(path, recording(130, 1))
        data = bytearray(path.read_bytes())
        for at in rng.integers(0, 140 if index % 2 else len(data), 1 + index % 5):
            data[at] = rng.integers(0, 256)
        path.write_bytes(data[: rng.integers(0, len(data))] if index % 4 == 0 else data)
        add(folder, f"bad_{index}#0#130", json.loads("[" * (index % 3) + '{"gpt": [{}]}' + "]" * (index % 3)))
        add(folder, f"bad_{index}#0#129")
    lists = folder / "data_split_info" / "val_ids.txt"
    lists.write_bytes(bytes(rng.integers(0, 128, 4000, dtype=np.uint8)))
    data = MotionDataset.open(prepared(folder).folder, verify="full")
    assert "gp_00001#0#140" in data.clip_names
    assert len(data.manifest["refused"]) > 60
