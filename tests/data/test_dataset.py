"""The dataset on disk: what goes in comes out, and what is broken is named."""

import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from scamo.data import storage
from scamo.data.dataset import (
    STD_FLOOR,
    Caption,
    DatasetWriter,
    MotionDataset,
    write_text_states,
    write_tokens,
)
from scamo.errors import ScaMoError

WIDTH = 5


def write_small(folder, *, clips=6, width=WIDTH, overwrite=False, seed=0):
    """Clips of 20, 21, ... frames: two captions on the whole clip, and one on a part of every second clip."""
    rng = np.random.default_rng(seed)
    features = []
    with DatasetWriter(
        folder, feature_dim=width, overwrite=overwrite, provenance={"source": "test"}
    ) as writer:
        for i in range(clips):
            features.append(rng.normal(i, 1 + i, (20 + i, width)).astype(np.float32))
            captions = [Caption(f"clip {i} é", meta={"spec": {"n": i}}), Caption("the same words")]
            if i % 2:
                captions.insert(1, Caption(f"part of {i}", 0.25, 0.75))
            split = ("train", "train", "train", "val", "test", "test")[i % 6]
            assert writer.add_clip(f"c{i}", features[-1], split, captions, {"index": i})
    return features


def leftovers(folder):
    return sorted(path.name for path in folder.iterdir())


def edit_manifest(folder, function):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    function(manifest)
    path.write_text(json.dumps(manifest))


def test_round_trip(tmp_path):
    features = write_small(tmp_path / "set")
    data = MotionDataset.open(tmp_path / "set", verify="full")
    assert leftovers(tmp_path) == ["set"]
    assert (data.n_clips, data.n_items, data.n_captions, data.feature_dim, data.fps) == (6, 9, 15, WIDTH, 20)
    for i, expected in enumerate(features):
        np.testing.assert_array_equal(data.clip_features(i), expected)
        assert data.clip_meta(i) == {"index": i}
    assert data.clip_names == [f"c{i}" for i in range(6)]
    assert data.item_table.tolist()[:4] == [[0, 0, 20], [1, 0, 21], [1, 5, 15], [2, 0, 22]]
    assert [data.item_name(i) for i in range(4)] == ["c0", "c1", "c1@5-15", "c2"]
    np.testing.assert_array_equal(data.item_features(2), features[1][5:15])
    assert data.item_lengths.tolist()[:4] == [20, 21, 10, 22]
    assert [[data.caption(c) for c in data.captions_of(i)] for i in (1, 2)] == [
        ["clip 1 é", "the same words"],
        ["part of 1"],
    ]
    assert data.caption_meta(int(data.captions_of(1)[0])) == {"spec": {"n": 1}}
    assert all(data.caption_item(c) == i for i in range(9) for c in data.captions_of(i))
    assert [data.items(s).tolist() for s in ("train", "val", "test")] == [[0, 1, 2, 3], [4, 5], [6, 7, 8]]
    assert all(data.item_split(i) == s for s in ("train", "val", "test") for i in data.items(s))
    assert data.refused == []
    with pytest.raises(ScaMoError, match="split 'training': expected one of train, val, test"):
        data.items("training")


def test_features_are_a_view_of_the_file(tmp_path):
    write_small(tmp_path / "set")
    view = MotionDataset.open(tmp_path / "set").item_features(0)
    assert not view.flags.owndata
    assert not view.flags.writeable


def test_statistics_are_of_the_train_split_per_feature(tmp_path):
    features = write_small(tmp_path / "set")
    data = MotionDataset.open(tmp_path / "set")
    train = np.concatenate(features[:3]).astype(np.float64)
    np.testing.assert_allclose(data.mean, train.mean(0), rtol=1e-6)
    np.testing.assert_allclose(data.std, train.std(0), rtol=1e-6)


def test_statistics_of_263_features_are_averaged_in_seven_groups(tmp_path):
    rng = np.random.default_rng(3)
    scale = rng.uniform(0.5, 3, 263)
    scale[259:] = 0  # a constant group is kept finite
    clips = [(rng.normal(size=(n, 263)) * scale + 1000).astype(np.float32) for n in (50, 64)]
    with DatasetWriter(tmp_path / "set") as writer:
        for i, clip in enumerate(clips):
            writer.add_clip(str(i), clip, "train", [Caption("walks")])
        writer.add_clip("far", np.full((30, 263), 1e6, np.float32), "test", [Caption("not counted")])
    data = MotionDataset.open(tmp_path / "set")
    train = np.concatenate(clips).astype(np.float64)
    np.testing.assert_allclose(data.mean, train.mean(0), rtol=1e-6)
    edges = np.cumsum([0, 1, 2, 1, 63, 126, 66, 4])
    assert edges[-1] == 263
    for start, end in itertools.pairwise(edges[:-1]):
        np.testing.assert_allclose(data.std[start:end], train.std(0)[start:end].mean(), rtol=1e-5)
    np.testing.assert_array_equal(data.std[259:], np.float32(STD_FLOOR))
    assert data.manifest["statistics"]["floored_features"] == [259, 260, 261, 262]


def test_statistics_can_be_given(tmp_path):
    mean, std = np.arange(WIDTH, dtype=np.float32), np.linspace(0.1, 1, WIDTH).astype(np.float32)
    with DatasetWriter(tmp_path / "set", feature_dim=WIDTH, statistics=(mean, std)) as writer:
        writer.add_clip("a", np.zeros((4, WIDTH), np.float32), "test", [Caption("stands")])
    data = MotionDataset.open(tmp_path / "set")
    np.testing.assert_array_equal(data.mean, mean)
    np.testing.assert_array_equal(data.std, std)
    with pytest.raises(ScaMoError, match=r"std\[2\] is not above 0"):
        DatasetWriter(tmp_path / "other", feature_dim=3, statistics=([0, 0, 0], [1, 1, 0]))
    with pytest.raises(ScaMoError, match=r"mean of shape \[2\], expected 3 finite"):
        DatasetWriter(tmp_path / "other", feature_dim=3, statistics=([0, 0], [1, 1, 1]))


def test_bad_clips_and_captions_are_refused_with_a_reason(tmp_path):
    good = np.zeros((50, WIDTH), np.float32)
    spoiled = good.copy()
    spoiled[7, 3] = np.nan
    spoiled[9, 1] = np.inf
    huge = good.astype(np.float64)
    huge[1, 2] = 1e300
    fine = [Caption("fine")]
    with DatasetWriter(tmp_path / "set", feature_dim=WIDTH, min_frames=10, max_frames=60) as writer:
        assert writer.add_clip("good", good, "train", fine)
        assert not writer.add_clip("nan", spoiled, "train", fine)
        assert not writer.add_clip("huge", huge, "val", fine)
        assert not writer.add_clip("wide", np.zeros((50, 7), np.float32), "train", fine)
        assert not writer.add_clip("whole numbers", np.zeros((50, WIDTH), np.int64), "train", fine)
        assert not writer.add_clip("short", good[:9], "train", fine)
        assert not writer.add_clip("long", np.zeros((60, WIDTH), np.float32), "train", fine)
        assert not writer.add_clip("good", good, "train", fine)
        assert not writer.add_clip("silent", good, "train", [])
        assert not writer.add_clip("blank", good, "test", [Caption("  ")])
        tagged = [
            Caption("ok", 0.5, 1.5),
            Caption("after the end", 3, 4),
            Caption("backwards", 2, 1),
            Caption("nan", float("nan"), 1),
            Caption("short", 0, 0.4),
            Caption("cut at the end", 1, 99),
        ]
        assert writer.add_clip("tagged", good, "train", tagged)
        writer.refuse("absent", "motion file missing", split="test", detail="absent.npy")
        writer.note("tagged", "nan time tags read as 0", split="train")
    data = MotionDataset.open(tmp_path / "set", verify="full")
    found = {(r["name"], r["kind"]): (r["reason"], r["detail"]) for r in data.refused if r["kind"] == "clip"}
    assert found["nan", "clip"] == ("NaN or infinite features", "frame 7, feature 3, 2 values in all")
    assert found["huge", "clip"] == ("NaN or infinite features", "frame 1, feature 2, 1 values in all")
    assert found["wide", "clip"] == ("wrong shape", "float32 [50, 7], expected float [frames, 5]")
    assert found["whole numbers", "clip"][0] == "wrong shape"
    assert found["short", "clip"] == ("too short", "9 frames, expected at least 10")
    assert found["long", "clip"] == ("too long", "60 frames, expected fewer than 60")
    assert found["good", "clip"] == ("name is empty or used twice", "'good'")
    assert found["silent", "clip"] == ("no usable caption", "0 captions in all")
    assert found["blank", "clip"] == ("no usable caption", "1 captions in all")
    assert found["absent", "clip"] == ("motion file missing", "absent.npy")
    captions = [(r["name"], r["reason"], r["detail"]) for r in data.refused if r["kind"] == "caption"]
    assert captions == [
        ("blank", "empty caption", "caption 0: '  '"),
        ("tagged", "bad time tags", "caption 1: 3 to 4 s of 2.5 s"),
        ("tagged", "bad time tags", "caption 2: 2 to 1 s of 2.5 s"),
        ("tagged", "bad time tags", "caption 3: nan to 1 s"),
        ("tagged", "part too short", "caption 4: 0 to 0.4 s of 2.5 s: 8 frames, expected at least 10"),
    ]
    assert data.clip_names == ["good", "tagged"]
    assert data.item_table.tolist() == [[0, 0, 50], [1, 10, 30], [1, 20, 50]]
    summary = data.summary()
    assert "refused: NaN or infinite features" in summary
    assert "refused: bad time tags (caption)" in summary
    assert "noted: nan time tags read as 0" in summary
    row = next(line for line in summary.splitlines() if line.startswith("refused: NaN"))
    assert row.split()[-4:] == ["1", "1", "0", "2"]


def test_nothing_kept_is_an_error_and_leaves_nothing(tmp_path):
    with (
        pytest.raises(ScaMoError, match=r"no clip was kept; refused: too short \(1\)"),
        DatasetWriter(tmp_path / "set", feature_dim=WIDTH, min_frames=5) as writer,
    ):
        writer.add_clip("a", np.zeros((4, WIDTH), np.float32), "train", [Caption("x")])
    assert leftovers(tmp_path) == []
    with (
        pytest.raises(ScaMoError, match="no clip in train"),
        DatasetWriter(tmp_path / "set", feature_dim=WIDTH) as writer,
    ):
        writer.add_clip("a", np.zeros((4, WIDTH), np.float32), "val", [Caption("x")])
    assert leftovers(tmp_path) == []


def test_unknown_split_is_an_error(tmp_path):
    with (
        pytest.raises(ScaMoError, match="clip a: split 'valid', expected one of train, val, test"),
        DatasetWriter(tmp_path / "set", feature_dim=WIDTH) as writer,
    ):
        writer.add_clip("a", np.zeros((4, WIDTH), np.float32), "valid", [Caption("x")])


def test_existing_folder_is_kept_unless_asked(tmp_path):
    write_small(tmp_path / "set")
    before = (tmp_path / "set/manifest.json").read_bytes()
    with pytest.raises(ScaMoError, match="exists: choose another name"):
        write_small(tmp_path / "set")
    assert (tmp_path / "set/manifest.json").read_bytes() == before
    write_small(tmp_path / "set", clips=3, overwrite=True)
    assert MotionDataset.open(tmp_path / "set", verify="full").n_clips == 3
    assert leftovers(tmp_path) == ["set"]

    (tmp_path / "letters").mkdir()
    (tmp_path / "letters/mine.txt").write_text("dear")
    with pytest.raises(ScaMoError, match=r"has no manifest.json: it was not written here, so it is kept"):
        write_small(tmp_path / "letters", overwrite=True)
    assert (tmp_path / "letters/mine.txt").read_text() == "dear"


def test_replacing_without_an_atomic_swap(tmp_path, monkeypatch):
    """Systems without renameat2 go over two renames."""
    write_small(tmp_path / "set")
    monkeypatch.setattr(storage.ctypes, "CDLL", lambda *a, **k: object())
    write_small(tmp_path / "set", clips=3, overwrite=True)
    assert MotionDataset.open(tmp_path / "set", verify="full").n_clips == 3
    assert leftovers(tmp_path) == ["set"]


@pytest.mark.parametrize("existing", [False, True])
def test_an_exception_inside_leaves_nothing_behind(tmp_path, existing):
    if existing:
        write_small(tmp_path / "set")

    def interrupted():
        with DatasetWriter(tmp_path / "set", feature_dim=WIDTH, overwrite=True) as writer:
            writer.add_clip("a", np.zeros((4, WIDTH), np.float32), "train", [Caption("x")])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert leftovers(tmp_path) == (["set"] if existing else [])
    if existing:
        assert MotionDataset.open(tmp_path / "set", verify="full").n_clips == 6


def test_a_killed_writer_leaves_no_dataset_and_the_next_one_cleans_up(tmp_path):
    program = textwrap.dedent(
        """
        import sys, time
        import numpy as np
        from scamo.data.dataset import Caption, DatasetWriter

        with DatasetWriter(sys.argv[1], feature_dim=5) as writer:
            for i in range(50):
                writer.add_clip(str(i), np.zeros((400, 5), np.float32), "train", [Caption("x")])
            print("writing", flush=True)
            time.sleep(60)
        """
    )
    root = Path(__file__).resolve().parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "set")],
        stdout=subprocess.PIPE,
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"writing\n"
    beside = leftovers(tmp_path)
    assert len(beside) == 1
    assert beside[0].startswith(".set.writing-")
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not (tmp_path / "set").exists()
    with pytest.raises(ScaMoError, match="no such dataset folder"):
        MotionDataset.open(tmp_path / "set")
    write_small(tmp_path / "set")
    assert leftovers(tmp_path) == ["set"]


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    """A limit on the size of files stands for the disk: the system refuses the write just so."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def write():
        with DatasetWriter(tmp_path / "set", feature_dim=WIDTH) as writer:
            for i in range(40):
                features = np.zeros((1000, WIDTH), np.float32)
                writer.add_clip(str(i), features, "train", [Caption("x" * 400)])

    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(ScaMoError, match="set: cannot be written: File too large"):
            write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert leftovers(tmp_path) == []


def test_a_value_that_is_not_finite_is_found_in_its_clip(tmp_path, monkeypatch):
    write_small(tmp_path / "set")
    monkeypatch.setattr(storage, "CHUNK_BYTES", 7 * 4 * WIDTH)
    path = tmp_path / "set/features.npy"
    record = MotionDataset.open(tmp_path / "set").manifest["files"]["features.npy"]
    for row in (0, 6, 7, 134):
        data = bytearray(path.read_bytes())
        at = storage.HEADER_BYTES + 4 * (row * WIDTH + WIDTH - 1)
        data[at : at + 4] = np.float32(np.nan).tobytes()
        (tmp_path / "bad.npy").write_bytes(data)
        assert storage.not_finite(tmp_path / "bad.npy", record) == row
        assert storage.not_finite(path, record) is None
    path.write_bytes(data)
    edit_manifest(
        tmp_path / "set", lambda m: m["files"].update({"features.npy": record | storage.file_record(path)})
    )
    with pytest.raises(ScaMoError, match=r"features\.npy: clip 5 is not finite"):
        MotionDataset.open(tmp_path / "set", verify="full")


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ScaMoError, match="file/set: cannot be written: (Not a directory|File exists)"):
        write_small(tmp_path / "file/set")


def test_bytes_that_change_on_the_way_to_the_disk_are_noticed(tmp_path):
    stream = storage.ArrayStream(tmp_path / "a.npy", np.float32, (3,))
    stream.append(np.ones((4, 3)))
    stream._file.flush()
    with open(tmp_path / "a.npy", "r+b") as file:
        file.seek(storage.HEADER_BYTES + 5)
        file.write(b"\x55")
    with pytest.raises(OSError, match="bytes read back differ"):
        stream.close()


@pytest.mark.parametrize("shape", [(0,), (3,), (7, 2), (10**12, 263)])
def test_npy_header_is_read_by_numpy(tmp_path, shape):
    header = storage.npy_header(np.float16, shape)
    assert len(header) == storage.HEADER_BYTES
    (tmp_path / "h").write_bytes(header)
    with open(tmp_path / "h", "rb") as file:
        version = np.lib.format.read_magic(file)
        assert version == (1, 0)
        assert np.lib.format.read_array_header_1_0(file) == (shape, False, np.dtype(np.float16))


FILES = ["features.npy", "clip_offsets.npy", "items.npy", "clips.jsonl", "captions.jsonl"]


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_named_with_both_sizes(tmp_path, name):
    write_small(tmp_path / "set")
    path = tmp_path / "set" / name
    data = path.read_bytes()
    path.write_bytes(data[:-3])
    with pytest.raises(ScaMoError) as error:
        MotionDataset.open(tmp_path / "set")
    assert f"{name}: truncated: {len(data) - 3} bytes, expected {len(data)}" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_truncated_array_is_named_even_without_the_check(tmp_path):
    write_small(tmp_path / "set")
    path = tmp_path / "set/features.npy"
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(ScaMoError, match=r"features\.npy: unreadable \(\d+ bytes, expected \d+\)"):
        MotionDataset.open(tmp_path / "set", verify=False)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_found_by_the_full_check(tmp_path, name):
    write_small(tmp_path / "set")
    path = tmp_path / "set" / name
    data = bytearray(path.read_bytes())
    data[len(data) * 3 // 4] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(ScaMoError, match=rf"{name}: corrupt: its SHA-256"):
        MotionDataset.open(tmp_path / "set", verify="full")


def test_missing_files_and_foreign_manifests_are_named(tmp_path):
    write_small(tmp_path / "set")
    folder = tmp_path / "set"
    (folder / "items.npy").rename(tmp_path / "kept")
    with pytest.raises(ScaMoError, match=r"items\.npy: missing; the manifest lists it"):
        MotionDataset.open(folder)
    (tmp_path / "kept").rename(folder / "items.npy")

    edit_manifest(folder, lambda m: m.update(schema_version=2))
    with pytest.raises(ScaMoError, match=r"manifest\.json: schema_version 2, this version reads 1"):
        MotionDataset.open(folder)
    edit_manifest(folder, lambda m: m.update(schema_version=1, format="other"))
    with pytest.raises(ScaMoError, match="format 'other', expected 'scamo-motion-dataset'"):
        MotionDataset.open(folder)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(ScaMoError, match=r"manifest\.json: not valid JSON"):
        MotionDataset.open(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(ScaMoError, match=r"manifest\.json: no such file"):
        MotionDataset.open(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["counts"].update(items=8), "9 items, the manifest says 8"),
        (lambda m: m["counts"].update(captions=99), "15 captions, the manifest says 99"),
        (lambda m: m["statistics"].update(std=[1.0]), "statistics.std has 1 values, expected 5"),
        (lambda m: m.pop("fps"), "field 'fps' is missing"),
        (lambda m: m["files"].pop("items.npy"), "does not list items.npy"),
        (lambda m: m["files"]["features.npy"].update(shape=[1, 5]), r"expected <f4 \[1, 5\]"),
    ],
)
def test_a_manifest_that_does_not_fit_is_named(tmp_path, change, message):
    write_small(tmp_path / "set")
    edit_manifest(tmp_path / "set", change)
    with pytest.raises(ScaMoError, match=message):
        MotionDataset.open(tmp_path / "set")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("items.npy", lambda a: a.__setitem__((2, 2), 22), "item 2 lies outside its clip"),
        ("items.npy", lambda a: a.__setitem__((3, 0), 6), "item 3 lies outside its clip"),
        ("items.npy", lambda a: a.__setitem__((0, 1), 20), "item 0 lies outside its clip"),
        ("clip_offsets.npy", lambda a: a.__setitem__(0, 1), "does not cover the 135 frames"),
        ("clip_offsets.npy", lambda a: a.__setitem__(2, a[1]), "clip 1 has no frames"),
    ],
)
def test_indices_that_do_not_fit_are_named(tmp_path, name, change, message):
    write_small(tmp_path / "set")
    array = np.load(tmp_path / "set" / name)
    change(array)
    with open(tmp_path / "set" / name, "r+b") as file:
        file.seek(storage.HEADER_BYTES)
        file.write(array.tobytes())
    with pytest.raises(ScaMoError, match=message):
        MotionDataset.open(tmp_path / "set")


@pytest.mark.parametrize(
    ("line", "text", "message"),
    [
        (3, '{"text": "x", "item": 3}', "expected captions of every item, in order"),
        (0, '{"text": "x", "item": -1}', "expected captions of every item, in order"),
        (14, '{"text": "x", "item": 9}', "expected captions of every item, in order"),
        (4, '{"text": "x"}', "line 5: expected 'item' to be int"),
        (4, "nothing", "line 5 is not valid JSON"),
    ],
)
def test_captions_that_do_not_fit_are_named(tmp_path, line, text, message):
    write_small(tmp_path / "set")
    path = tmp_path / "set/captions.jsonl"
    lines = path.read_text().splitlines()
    lines[line] = text
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(ScaMoError, match=message):
        MotionDataset.open(tmp_path / "set", verify=False)


def item_tokens(data, codes=7, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, codes, n // 4) for n in data.item_lengths]


def test_tokens_round_trip_and_unigram(tmp_path):
    write_small(tmp_path / "set")
    data = MotionDataset.open(tmp_path / "set")
    tokens = item_tokens(data)
    tokens[1] = tokens[1][:0]  # an item shorter than one token
    write_tokens(tmp_path / "set", "fsq", iter(tokens), codes=7, downsampling=4, tokenizer={"levels": [7]})
    store = data.tokens()
    assert (store.name, store.codes, store.downsampling, store.tokenizer) == ("fsq", 7, 4, {"levels": [7]})
    assert len(store) == data.n_items
    assert store.manifest["items_without_tokens"] == 1
    for item, expected in enumerate(tokens):
        np.testing.assert_array_equal(store[item], expected)
        assert store[item].dtype == np.int32
    assert store.lengths.tolist() == [len(t) for t in tokens]
    for split in ("train", "val", "test"):
        items = data.items(split)
        counted = np.bincount(np.concatenate([tokens[i] for i in items]), minlength=7)
        assert store.unigram(split).tolist() == [*counted, sum(len(tokens[i]) > 0 for i in items)]
    assert "tokens fsq:" in data.summary()
    MotionDataset.open(tmp_path / "set", verify="full")


def test_stores_are_chosen_by_name(tmp_path):
    write_small(tmp_path / "set")
    data = MotionDataset.open(tmp_path / "set")
    with pytest.raises(ScaMoError, match="has no tokens yet: run `scamo tokenizer encode`"):
        data.tokens()
    with pytest.raises(ScaMoError, match="has no text states yet: run `scamo encode-text`"):
        data.text_states()
    for name in ("a", "b"):
        write_tokens(tmp_path / "set", name, item_tokens(data), codes=7, downsampling=4)
    assert data.tokens("b").name == "b"
    with pytest.raises(ScaMoError, match="has several tokens, name one of a, b"):
        data.tokens()
    with pytest.raises(ScaMoError, match="has no tokens 'c': there are a, b"):
        data.tokens("c")
    with pytest.raises(ScaMoError, match="exists: choose another name"):
        write_tokens(tmp_path / "set", "a", item_tokens(data), codes=7, downsampling=4)
    write_tokens(tmp_path / "set", "a", item_tokens(data, seed=1), codes=7, downsampling=4, overwrite=True)
    np.testing.assert_array_equal(data.tokens("a")[0], item_tokens(data, seed=1)[0])
    with pytest.raises(ScaMoError, match=r"name '\.\./a': expected a plain folder name"):
        write_tokens(tmp_path / "set", "../a", item_tokens(data), codes=7, downsampling=4)


def test_tokens_that_do_not_fit_are_refused_and_leave_nothing(tmp_path):
    write_small(tmp_path / "set")
    data = MotionDataset.open(tmp_path / "set")
    good = item_tokens(data)

    def spoiled(item, values):
        return [*good[:item], values, *good[item + 1 :]]

    for tokens, message in [
        (good[:-1], "8 token arrays for 9 items"),
        ([*good, good[0]], "more token arrays than the 9 items"),
        (spoiled(2, np.array([0, 7])), r"item 2 \(c1@5-15\): a token is outside \[0, 7\)"),
        (spoiled(2, np.array([-1])), r"item 2 .* outside"),
        (spoiled(2, np.array([0.5])), r"item 2 .*float64 \[1\], expected integers"),
        (spoiled(2, np.zeros(3, int)), "3 tokens of 4 frames, it has 10 frames"),
        ([np.zeros(0, int)] * 9, "every item is shorter than one token of 4 frames"),
    ]:
        with pytest.raises(ScaMoError, match=message):
            write_tokens(tmp_path / "set", "fsq", tokens, codes=7, downsampling=4)
        assert leftovers(tmp_path / "set/tokens") == []


def test_tokens_of_another_dataset_are_refused(tmp_path):
    write_small(tmp_path / "one")
    write_small(tmp_path / "two", seed=5)
    one, two = MotionDataset.open(tmp_path / "one"), MotionDataset.open(tmp_path / "two")
    write_tokens(tmp_path / "one", "fsq", item_tokens(one), codes=7, downsampling=4)
    (tmp_path / "one/tokens").rename(tmp_path / "two/tokens")
    with pytest.raises(ScaMoError, match="was made for another dataset"):
        two.tokens()


def test_corrupt_tokens_are_found(tmp_path):
    write_small(tmp_path / "set")
    data = MotionDataset.open(tmp_path / "set")
    write_tokens(tmp_path / "set", "fsq", item_tokens(data), codes=7, downsampling=4)
    path = tmp_path / "set/tokens/fsq/tokens.npy"
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(ScaMoError, match=r"tokens\.npy: corrupt"):
        MotionDataset.open(tmp_path / "set", verify="full")
    path.write_bytes(good[:-4])
    with pytest.raises(
        ScaMoError, match=rf"tokens\.npy: truncated: {len(good) - 4} bytes, expected {len(good)}"
    ):
        data.tokens()


def test_text_states_round_trip_with_shared_rows(tmp_path):
    write_small(tmp_path / "set")
    data = MotionDataset.open(tmp_path / "set")
    rng = np.random.default_rng(0)
    texts = sorted({data.caption(c) for c in range(data.n_captions)})
    assert len(texts) == 10
    states = {text: rng.normal(size=(len(text), 3)).astype(np.float32) for text in texts}
    index = np.array([texts.index(data.caption(c)) for c in range(data.n_captions)])
    write_text_states(tmp_path / "set", "toy", (states[t] for t in texts), encoder="toy-encoder", index=index)
    store = data.text_states("")
    assert (store.name, store.encoder, store.width, len(store), store.n_texts) == (
        "toy",
        "toy-encoder",
        3,
        15,
        10,
    )
    assert store.n_states == sum(map(len, texts))
    for c in range(data.n_captions):
        np.testing.assert_array_equal(store[c], states[data.caption(c)].astype(np.float16))
        assert store.lengths[c] == len(data.caption(c))
    assert "text toy: 10 different captions" in data.summary()
    MotionDataset.open(tmp_path / "set", verify="full")


def test_text_states_one_per_caption(tmp_path):
    write_small(tmp_path / "set")
    data = MotionDataset.open(tmp_path / "set")
    states = [np.full((2 + c % 3, 4), c, np.float16) for c in range(data.n_captions)]
    write_text_states(tmp_path / "set", "toy", states, encoder="toy")
    store = data.text_states()
    assert all((store[c] == c).all() and len(store[c]) == 2 + c % 3 for c in range(data.n_captions))


def test_text_states_that_do_not_fit_are_refused_and_leave_nothing(tmp_path):
    write_small(tmp_path / "set")
    count = MotionDataset.open(tmp_path / "set").n_captions
    good = [np.zeros((2, 3), np.float32)] * count
    for states, message in [
        (good[:-1], "14 texts, the captions need 15"),
        ([*good, good[0]], "16 texts, the captions need 15"),
        ([], "0 texts, the captions need 15"),
        ([*good[:4], np.zeros((0, 3), np.float32), *good[5:]], r"text 4: float32 \[0, 3\]"),
        ([*good[:4], np.zeros((2, 4), np.float32), *good[5:]], "text 4: width 4, expected 3"),
        (
            [*good[:4], np.full((2, 3), 1e6, np.float32), *good[5:]],
            "text 4: a state is not finite in float16",
        ),
    ]:
        with pytest.raises(ScaMoError, match=message):
            write_text_states(tmp_path / "set", "toy", states, encoder="toy")
        assert leftovers(tmp_path / "set/text") == []
    with pytest.raises(ScaMoError, match=r"index of shape \[3\], expected \(15,\)"):
        write_text_states(tmp_path / "set", "toy", good, encoder="toy", index=np.arange(3))
