"""Folders of MotionMillion's and MotionStreamer's shape, made of motion of our own."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from scamo.data.dataset import MotionDataset
from scamo.data.prepare.motionmillion import prepare_motionmillion
from scamo.errors import ScaMoError
from scamo.motion.features272 import ROTATIONS
from scamo.motion.representation import SMPL_272
from scamo.motion.synthetic import corpus_clip

MILLION = ("motion_data/vector_272", "split/version1/t2m_60_300")
STREAMER = ("motion_data", "split")
NAMES = [
    "MotionGV/folder0/000001",
    "Mirror_MotionGV/folder0/000001",
    "BABEL/prefix/M023918",
    "MotionGV/folder1/7",
]


@pytest.fixture(scope="module")
def motions():
    return [SMPL_272.from_joints(corpus_clip(index).joints) for index in range(3)]


def put(folder, layout, name, features, text="a person walks.\n", split="train"):
    """Write the files of a clip, and its name at the end of a list."""
    motion, words = folder / layout[0] / f"{name}.npy", folder / "texts" / f"{name}.txt"
    for path in (motion, words):
        path.parent.mkdir(parents=True, exist_ok=True)
    np.save(motion, features)
    words.write_bytes(text if isinstance(text, bytes) else text.encode())
    name_in_list(folder, layout, name, split)
    return motion, words


def name_in_list(folder, layout, name, split="train"):
    path = folder / layout[1] / f"{split}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as stream:
        stream.write(f"{name}\n")


@pytest.fixture
def million(tmp_path, motions):
    folder = tmp_path / "MotionMillion"
    for name, features, split in zip(
        NAMES, [*motions, motions[0]], ["train", "train", "val", "test"], strict=True
    ):
        put(folder, MILLION, name, features, f"{name} is walking.\n\nsays #1: go\n", split)
    return folder


def prepared(folder, **options):
    return prepare_motionmillion(folder, folder.parent / "out", progress=False, **options)


def refusals(data):
    return {
        (entry["name"], entry["kind"]): (entry["reason"], entry["detail"])
        for entry in data.manifest["refused"]
    }


def texts_of(data, clip):
    return [data.caption(caption) for caption in data.captions_of(clip)]


def test_motionmillion(million, motions):
    data = prepared(million, license="CC BY-NC-SA 4.0")
    assert (data.feature_dim, data.fps, data.clip_names) == (272, 30, NAMES)
    assert list(data.clip_splits) == ["train", "train", "val", "test"]
    np.testing.assert_array_equal(data.clip_features(2), motions[2])
    assert texts_of(data, 0) == [f"{NAMES[0]} is walking.", "says #1: go"]
    meta = data.clip_meta(1)
    assert meta == {"from": f"motion_data/vector_272/{NAMES[1]}.npy", "subset": "Mirror_MotionGV"}
    provenance = data.manifest["provenance"]
    assert (provenance["source"], provenance["max_frames"]) == ("motionmillion", 301)
    assert provenance["license"] == "CC BY-NC-SA 4.0"
    assert not data.manifest["refused"]
    assert not data.manifest["notes"]


def test_motionstreamer(tmp_path, motions):
    folder = tmp_path / "humanml3d_272"
    tagged = "a man walks#a/DET man/NOUN walk/VERB#0.0#0.0\nand turns#turn/VERB#nan#nan\nx#y\n"
    put(folder, STREAMER, "000001", motions[0], tagged)
    put(folder, STREAMER, "M000001", motions[1], "he sits#he/PRON#0.5#2.6\n")
    data = prepared(folder)
    assert data.manifest["provenance"]["source"] == "humanml3d_272"
    assert texts_of(data, 0) == ["a man walks", "and turns"]
    assert data.caption_meta(data.captions_of(0)[0])["tokens"] == "a/DET man/NOUN walk/VERB"
    assert data.item_table[data.items("train")].tolist() == [[0, 0, len(motions[0])], [1, 15, 78]]
    assert refusals(data)["000001", "caption"][0] == "malformed caption line"
    assert [note["reason"] for note in data.manifest["notes"]] == ["nan time tags read as 0"]


def test_tags_at_the_end_of_a_plain_caption_are_read(million, motions):
    put(million, MILLION, "H/000001", motions[0], "a man walks#a/DET man/NOUN#0.0#0.0\none#two#three#four\n")
    assert texts_of(prepared(million), 2) == ["a man walks", "one#two#three#four"]


def test_what_is_wrong_is_refused_by_name(million, motions):
    good = motions[0]
    nan = good.copy()
    nan[3, 100] = np.nan
    cases = {
        "nan": (nan, "NaN or infinite features", "frame 3, feature 100, 1 values in all"),
        "wide": (
            good[:, :263],
            "wrong shape",
            "vector_272/wide.npy: float32 [85, 263], expected float [frames, 272]",
        ),
        "empty": (
            good[:0],
            "wrong shape",
            "vector_272/empty.npy: float32 [0, 272], expected float [frames, 272]",
        ),
        "flat": (
            good.ravel(),
            "wrong shape",
            "vector_272/flat.npy: float32 [23120], expected float [frames, 272]",
        ),
        "whole": (
            good.astype(int),
            "wrong shape",
            "vector_272/whole.npy: int64 [85, 272], expected float [frames, 272]",
        ),
        "short": (good[:59], "too short", "59 frames, expected at least 60"),
        "long": (np.resize(good, (301, 272)), "too long", "301 frames, expected fewer than 301"),
    }
    for name, (features, _, _) in cases.items():
        put(million, MILLION, name, features)
    wanted = {name: case[1:] for name, case in cases.items()}

    motion, _ = put(million, MILLION, "cut", good)
    motion.write_bytes(motion.read_bytes()[:-100])
    motion, _ = put(million, MILLION, "several", good)
    np.savez(motion.with_suffix(""), good)
    motion.with_suffix(".npz").rename(motion)
    put(million, MILLION, "gone", good)[0].unlink()
    put(million, MILLION, "mute", good)[1].unlink()
    put(million, MILLION, "blank", good, " \n\n")
    put(million, MILLION, "latin", good, "ein Gruß".encode("latin-1"))
    name_in_list(million, MILLION, NAMES[0], "test")
    wanted |= {
        "several": ("wrong shape", "vector_272/several.npy: several arrays, expected one"),
        "gone": ("motion file missing", "gone.npy"),
        "mute": ("caption file missing", "texts/mute.txt"),
        "blank": ("caption file without captions", "texts/blank.txt"),
        NAMES[0]: ("name is empty or used twice", repr(NAMES[0])),
    }
    for name in ("../MotionMillion/nan", "/etc/passwd", "a//b", "a\\b", "a/./b", "a\0b"):
        name_in_list(million, MILLION, name)
        wanted[name] = ("not a plain name", f"train.txt line {len(wanted) + 1}")

    data = prepared(million)
    assert data.clip_names == NAMES
    found = {name: value for (name, kind), value in refusals(data).items() if kind == "clip"}
    assert found.pop("cut")[0] == "motion file unreadable"
    reason, detail = found.pop("latin")
    assert reason == "caption file unreadable"
    assert "latin.txt: is not UTF-8" in detail
    assert {name: reason for name, (reason, _) in found.items()} == {
        name: case[0] for name, case in wanted.items()
    }
    for name, (reason, detail) in wanted.items():
        if reason != "not a plain name":
            assert found[name] == (reason, detail)
    assert found["/etc/passwd"][1].startswith("train.txt line ")


def test_rotations_that_contradict_the_positions_are_noted(million, motions):
    swapped = motions[0].copy()
    swapped[:, ROTATIONS] = motions[1][: len(swapped), ROTATIONS][np.arange(len(swapped)) % len(motions[1])]
    put(million, MILLION, "swapped", swapped)
    data = prepared(million)
    assert "swapped" in data.clip_names
    (note,) = data.manifest["notes"]
    assert (note["name"], note["reason"]) == ("swapped", "rotations contradict positions")
    assert note["detail"].startswith("a bone ends ")


def test_other_lists(million):
    name_in_list(million, ("", "split/version1/tokenizer_96"), NAMES[2])
    assert prepared(million, splits="split/version1/tokenizer_96").clip_names == [NAMES[2]]


def test_folders_that_are_neither(million, tmp_path):
    for spoil, message in [
        (lambda: None, "no such folder"),
        (
            lambda: (tmp_path / "x" / "texts").mkdir(parents=True),
            "expected the motions in motion_data/vector_272/",
        ),
        (lambda: (tmp_path / "x" / "motion_data").mkdir(), "split/train.txt: no such file"),
        (lambda: (tmp_path / "x" / "texts").rmdir(), "texts: no such folder"),
    ]:
        spoil()
        with pytest.raises(ScaMoError, match=message):
            prepare_motionmillion(tmp_path / "x", tmp_path / "out", progress=False)
    shutil.rmtree(million / "texts" / "MotionGV")
    with pytest.raises(ScaMoError, match=f"{NAMES[0]}: caption file missing"):
        prepared(million, strict=True)


def test_any_number_of_workers_and_interruptions_gives_the_same(million, motions):
    put(million, MILLION, "wide", motions[0][:, :100])
    out = million.parent
    prepare_motionmillion(million, out / "one", progress=False)
    prepare_motionmillion(million, out / "two", progress=False, workers=2)
    # It stops at the bad clip, and goes on when that is mended.
    whole = motions[0]
    np.save(million / MILLION[0] / "wide.npy", whole)
    prepare_motionmillion(million, out / "mended", progress=False)
    np.save(million / MILLION[0] / "wide.npy", whole[:, :100])
    with pytest.raises(ScaMoError, match="wide: wrong shape"):
        prepare_motionmillion(million, out / "again", progress=False, strict=True)
    np.save(million / MILLION[0] / "wide.npy", whole)
    prepare_motionmillion(million, out / "again", progress=False, strict=True)
    for first, second in (("one", "two"), ("mended", "again")):
        files = {path.name: path.read_bytes() for path in (out / first).iterdir()}
        assert files == {path.name: path.read_bytes() for path in (out / second).iterdir()}


def test_damaged_files_stop_nothing(tmp_path, motions):
    rng = np.random.default_rng(0)
    folder = tmp_path / "MotionMillion"
    put(folder, MILLION, "good", motions[0])
    for index in range(60):
        motion, words = put(folder, MILLION, f"bad/{index}", motions[1][:70], "a walk\nturns # left\n" * 3)
        path = motion if index % 3 else words
        data = bytearray(path.read_bytes())
        # Of an array mostly the header.
        end = len(data) if index % 2 else min(len(data), 140)
        for at in rng.integers(0, end, 1 + index % 5):
            data[at] = rng.integers(0, 256)
        path.write_bytes(data[: rng.integers(0, len(data))] if index % 4 == 0 else data)
    lists = folder / MILLION[1] / "test.txt"
    lists.write_bytes(bytes(rng.integers(0, 128, 4000, dtype=np.uint8)))
    data = MotionDataset.open(prepared(folder).folder, verify="full")
    assert "good" in data.clip_names
    assert len(data.manifest["refused"]) > 20
    lists.write_bytes(b"\xff\xfe" + bytes(100))
    with pytest.raises(ScaMoError, match="test.txt: is not UTF-8"):
        prepared(folder, overwrite=True)
