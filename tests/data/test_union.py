"""A union of sources with planted copies, leaks and static clips."""

import csv
import json
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from scamo.config import load_config
from scamo.data.dataset import Caption, DatasetWriter, MotionDataset
from scamo.data.prepare.humanml3d import prepare_humanml3d
from scamo.data.prepare.union import SourceConfig, UnionConfig, prepare_union, union_table
from scamo.errors import ScaMoError
from scamo.motion.features import features_to_joints, joints_to_features, offsets_from_joints
from scamo.motion.skeleton import mirror_joints
from scamo.motion.synthetic import corpus_clip

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@cache
def motion(index):
    return corpus_clip(index).joints


def write(folder, clips, **options):
    """A dataset of {name: (joints, split, captions or meta, ...)}."""
    with DatasetWriter(folder, **options) as writer:
        for name, (joints, split, *more) in clips.items():
            captions = next((m for m in more if isinstance(m, list)), [Caption(f"this is {name}")])
            meta = next((m for m in more if isinstance(m, dict)), {})
            assert writer.add_clip(name, joints_to_features(joints), split, captions, meta)
    return str(folder)


def union(tmp_path, sources, name="union", **options):
    """Of {name: (folder, options)}."""
    made = tuple(
        SourceConfig(name=n, dataset=f, **{"license": f"licence {n}"} | o) for n, (f, o) in sources.items()
    )
    config = UnionConfig(sources=made, **{"min_frames": 20} | options)
    return prepare_union(config, tmp_path / name, progress=False)


def by_original(data):
    return {
        (meta["source"], meta["original_name"]): (data.clip_splits[clip], meta, clip)
        for clip in range(data.n_clips)
        for meta in [data.clip_meta(clip)]
    }


def files_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """An official source with all splits, and one whose clips are partly copies of its."""
    root = tmp_path_factory.mktemp("sources")
    still = np.repeat(motion(0)[:1], 50, axis=0)
    first = {f"{i:06d}": (motion(i), "train") for i in range(7)}
    first |= {"000008": (motion(19), "test"), "000009": (motion(7), "val")}
    first |= {"M000001": (mirror_joints(motion(1)), "train")}
    first["000002"] = (
        motion(2),
        "train",
        [Caption("all of it", meta={"tokens": "all/DET"}), Caption("a part", 1.15, 3.3)],
    )
    first |= {"000020": (motion(38)[:60], "train", {"file": "long.bvh"})}
    first |= {"000021": (motion(38)[70:], "test", {"file": "long.bvh"})}
    second = {f"clip{i}": (motion(i), "train") for i in range(20, 29)}
    second |= {
        "000003": (motion(29), "train"),  # another motion of a known name
        "same": (motion(2), "train", [Caption("all of it"), Caption("other words")]),
        "leak": (motion(19)[20:100], "train"),
        "mirrored_leak": (mirror_joints(motion(7)), "train"),
        "still": (still, "train"),
        "whole": (motion(38), "train"),
    }
    return {"a": write(root / "a", first), "b": write(root / "b", second)}


def test_leaks_copies_and_static_clips(tmp_path, sources):
    data = union(tmp_path, {"a": (sources["a"], {"split": "official"}), "b": (sources["b"], {})})
    assert MotionDataset.open(data.folder, verify="full").n_clips == data.n_clips
    found = by_original(data)
    a, b = (MotionDataset.open(sources[name]) for name in "ab")
    # The official source is as it was.
    for clip, name in enumerate(a.clip_names):
        split, meta, at = found["a", name]
        assert (split, meta["license"]) == (a.clip_splits[clip], "licence a")
        assert data.clip_names[at] == name
        np.testing.assert_array_equal(data.clip_features(at), a.clip_features(clip))
    # What is cut out of a test clip, or mirrors a val clip, stays out of train.
    assert found["b", "leak"][0] == "test"
    assert found["b", "leak"][1]["copy"] | {"mm": 0} == {
        "kind": "part", "of": "a/000008", "shift": 20, "frames": 79, "mm": 0
    }  # fmt: skip
    assert found["b", "leak"][1]["source_clip"] == found["a", "000008"][1]["source_clip"]
    assert found["b", "mirrored_leak"][0] == "val"
    assert found["a", "M000001"][1]["source_clip"] == "a/000001"
    # Dropped: the same motion again, whose new caption is kept; what stands; what a straddling split holds.
    refused = {entry["name"]: (entry["reason"], entry["detail"]) for entry in data.refused}
    assert refused == {
        "b/same": ("copy: identical", "of a/000002, 0 mm apart"),
        "b/still": ("static", "100% of the frames below 100 mm/s"),
        "b/whole": ("its recording is in several official splits", "with a/000020"),
    }
    at = found["a", "000002"][2]
    items = [item for item in range(data.n_items) if data.item_clip(item) == at]
    texts = [[data.caption(c) for c in data.captions_of(item)] for item in items]
    assert texts == [["all of it", "other words"], ["a part"]]
    assert data.item_table[items[1]].tolist() == [at, 23, 66]
    assert data.caption_meta(data.captions_of(items[0])[0]) == {"tokens": "all/DET"}
    assert data.clip_meta(at)["captions_of"] == ["b/same"]
    # Names of their own, and a note where one is new.
    assert data.clip_names[found["b", "000003"][2]] == "b_000003"
    notes = {(note["name"], note["reason"]): note["detail"] for note in data.manifest["notes"]}
    assert notes == {
        ("b_000003", "renamed: an earlier source has the name"): "b/000003",
        ("a/000020", "its source's own split parts it"): "1 in train (000020), 1 in test (000021)",
    }
    # Statistics are of the union's train.
    train = np.concatenate([data.clip_features(c) for c, s in enumerate(data.clip_splits) if s == "train"])
    np.testing.assert_allclose(data.mean, train.mean(0, dtype=np.float64), atol=1e-6)
    # The table.
    provenance = data.manifest["provenance"]
    rows = {row["name"]: row for row in provenance["sources"]}
    assert [rows[n]["clips"] for n in "ab"] == [12, 12]
    assert rows["b"]["refused"] == {reason: 1 for reason, _ in refused.values()}
    assert rows["b"]["copies"] == {"part": 1, "mirrored": 1}
    assert rows["a"]["captions"] == a.n_captions + 1
    assert provenance["license"] == "a: licence a; b: licence b"
    assert sum(row["hours"] for row in rows.values()) == pytest.approx(
        data.manifest["counts"]["frames"] / 72000
    )
    assert provenance["straddling"] == [
        {"source": "a", "recording": "a/000020", "splits": {"train": ["000020"], "test": ["000021"]}}
    ]
    table = union_table(data)
    assert Path(f"{data.folder}.md").read_text() == table + "\n"
    assert "| b | licence b | assign | 12 | 12 |" in table
    assert "a's own split parts a/000020: 1 in train, 1 in test." in table
    with pytest.raises(ScaMoError, match="is not a union"):
        union_table(b)


@pytest.mark.parametrize("seed", range(5))
def test_no_leak_and_the_right_shares_for_any_seed(tmp_path, seed):
    cut = {}
    for i in range(20):
        joints = motion(i)
        cut |= {f"clip{i}@0-40": (joints[:41], "train"), f"clip{i}@20-60": (joints[20:], "train")}
        if i % 2:
            cut[f"other{i}"] = (mirror_joints(joints), "val")
    folder = write(tmp_path / "cut", cut)
    data = union(tmp_path, {"cut": (folder, {})}, seed=seed, drop=(), min_frames=15)
    assert data.n_clips == len(cut)
    splits = {}
    for clip, name in enumerate(data.clip_names):
        splits.setdefault(name.split("@")[0].replace("other", "clip"), set()).add(data.clip_splits[clip])
    assert all(len(found) == 1 for found in splits.values()), splits
    counts = Counter(next(iter(found)) for found in splits.values())
    groups = data.manifest["provenance"]["source_clips"]
    assert groups >= 18, "at most a few motions of the corpus are alike"
    assert abs(counts["train"] - 16) <= 2
    assert abs(counts["test"] - 3) <= 2


def test_the_same_bytes_twice(tmp_path, sources):
    both = {"a": (sources["a"], {"split": "official"}), "b": (sources["b"], {"weight": 0.7})}
    one, two = (union(tmp_path / name, both) for name in ("one", "two"))
    assert files_of(one.folder) == files_of(two.folder)
    assert Path(f"{one.folder}.md").read_bytes() == Path(f"{two.folder}.md").read_bytes()


def test_weight_limit_take_exclude_and_drop(tmp_path, sources):
    a = (sources["a"], {"split": "official", "take": ("train",)})
    b = (sources["b"], {"weight": 0.5, "exclude": "^clip2[01]$"})
    data = union(tmp_path, {"a": a, "b": b})
    found = by_original(data)
    reasons = Counter(entry["reason"] for entry in data.refused)
    assert reasons["its split is not taken"] == 3
    assert reasons["excluded"] == 2
    # Clips that are not taken still keep what is cut out of them away from train.
    assert found["b", "leak"][0] == "test"
    train = [key for key, (split, *_) in found.items() if key[0] == "b" and split == "train"]
    assert len(train) - reasons["left out by weight"] in (0, 1)
    assert len(train) >= 2
    # Copies go where they are asked to, but an official source loses none to itself.
    whole = {"a": (sources["a"], {"split": "official"}), "b": (sources["b"], {})}
    dropped = union(tmp_path, whole, name="dropped", drop=("identical", "part", "mirrored"))
    copies = {entry["name"]: entry["reason"] for entry in dropped.refused if "copy" in entry["reason"]}
    assert copies == {
        "b/same": "copy: identical",
        "b/leak": "copy: part",
        "b/mirrored_leak": "copy: mirrored",
    }
    assert "M000001" in dropped.clip_names
    limited = union(tmp_path, {"b": (sources["b"], {"limit": 3})}, name="limited")
    assert limited.manifest["splits"]["train"]["clips"] == 3


def test_variants_by_name_and_recordings_by_table(tmp_path):
    plain = write(tmp_path / "plain", {"x": (motion(1), "test"), "y": (motion(2), "train")})
    phys = write(tmp_path / "phys", {"x": (motion(3), "train"), "y_phys": (motion(4), "test")})
    clips = {"p": (motion(5), "train"), "q": (motion(8), "val")}
    cut = write(tmp_path / "cut", clips, provenance={"license": "CC0"})
    table = tmp_path / "index.csv"
    table.write_text("source_path,start_frame,end_frame,new_name\nr.npy,0,9,p.npy\nr.npy,9,20,q.npy\n")
    sources = {
        "plain": (plain, {"split": "official"}),
        "phys": (phys, {"split": "official", "variant_of": "plain"}),
        "cut": (cut, {"split": "official", "recordings": str(table), "license": ""}),
    }
    data = union(tmp_path, sources)
    found = by_original(data)
    assert found["phys", "x"][0] == "test"
    assert found["cut", "p"][1]["license"] == "CC0", "what the dataset says of itself"
    assert found["phys", "y_phys"][0] == "train"
    reasons = {(note["name"], note["reason"]) for note in data.manifest["notes"]}
    assert ("phys/x", "moved to the split of its recording") in reasons
    assert [s["recording"] for s in data.manifest["provenance"]["straddling"]] == ["cut/p"]


def toml(path, sources, head=""):
    lines = [f'out = "{path.parent / "out"}"', "min_frames = 20", head]
    for options in sources:
        lines += [
            "[[sources]]",
            *(
                f"{key} = {json.dumps(value).lower() if value != value else json.dumps(value)}"
                for key, value in options.items()
            ),
        ]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_config_file_gives_the_same(tmp_path, sources):
    listed = [
        {"name": "a", "dataset": sources["a"], "license": "licence a", "split": "official"},
        {"name": "b", "dataset": sources["b"], "license": "licence b"},
    ]
    data = prepare_union(toml(tmp_path / "u.toml", listed), progress=False, overrides=["seed=3"])
    assert data.folder == tmp_path / "out"
    again = union(
        tmp_path / "again",
        {"a": (sources["a"], {"split": "official"}), "b": (sources["b"], {})},
        name="out",
        seed=3,
    )
    assert files_of(data.folder) == files_of(again.folder)
    assert load_config(UnionConfig, CONFIGS / "motionunion.toml").sources[1].variant_of == "humanml3d"


def test_bad_input_names_file_and_key(tmp_path, sources):
    other_fps = write(tmp_path / "fps", {"x": (motion(0), "train")}, fps=30)
    with DatasetWriter(tmp_path / "wide", feature_dim=272) as writer:
        writer.add_clip("x", np.random.default_rng(0).normal(size=(50, 272)), "train", [Caption("x")])
    with DatasetWriter(tmp_path / "odd", feature_dim=5) as writer:
        writer.add_clip("x", np.zeros((50, 5), np.float32), "train", [Caption("x")])
    good = {"name": "a", "dataset": sources["a"], "license": "x"}
    table = tmp_path / "bad.csv"
    table.write_text("a,b\n1,2\n")

    def second(**options):
        return [good, {"name": "c", "dataset": sources["b"], "license": "x"} | options]

    cases = [
        (second(dataset=str(tmp_path / "none")), "", r"sources\[1\].dataset: .*none: no such dataset folder"),
        (second(dataset=other_fps), "", r"sources\[1\].dataset: .*fps has 30 fps, .*a has 20"),
        (second(dataset=str(tmp_path / "wide")), "", r"wide has 272 features, .*a has 263"),
        (second(dataset=str(tmp_path / "odd")), "", r"odd has 5 features, which"),
        (second(dataset=sources["a"]), "", r"sources\[1\].dataset = .*: is sources\[0\].dataset too"),
        (second(name="a"), "", r"sources\[1\].name = 'a' is used twice"),
        (second(name="a/b"), "", r"\[sources\[1\]\] name = 'a/b'"),
        (second(split="random"), "", r"\[sources\[1\]\] split = 'random': expected official or assign"),
        (second(take=["trian"]), "", r"\[sources\[1\]\] take = \['trian'\]: expected some of train"),
        (second(weight="half"), "", r"sources\[1\].weight = 'half': expected float"),
        (second(weight=True), "", r"sources\[1\].weight = True: expected float"),
        (second(weight=0), "", r"\[sources\[1\]\] weight = 0.0: expected a share above 0"),
        (second(weight=float("nan")), "", r"weight = nan"),
        (second(limit=-1), "", r"limit = -1: expected 0 or more"),
        (second(exclude="("), "", r"exclude = '\(': not a regular expression"),
        (second(license=" "), "", r"sources\[1\].license: .*b states none"),
        (second(variant_of="z"), "", r"sources\[1\].variant_of = 'z': expected an earlier source's name"),
        (
            second(recordings=str(tmp_path / "no.csv")),
            "",
            r"sources\[1\].recordings: .*no.csv cannot be read",
        ),
        (second(recordings=str(table)), "", r"sources\[1\].recordings: .*has the columns \['a', 'b'\]"),
        (second(wieght=1.0), "", r"unknown key sources\[1\].wieght; did you mean sources\[1\].weight"),
        ([{"name": "a", "license": "x"}], "", r"missing key sources\[0\].dataset"),
        ([], "sources = []", "sources is empty"),
        (second(), "split = [0.5, 0.5]", r"split = \[0.5, 0.5\]: expected parts"),
        (second(), "near_mm = -1", "near_mm = -1.0: expected a positive number"),
        (second(), "max_frames = 5", "min_frames = 20, max_frames = 5"),
        (second(), 'drop = ["overlap"]', "drop: 'overlap' is none of identical"),
        (second(), "static_share = 2", r"static_share = 2.0: expected a share in \[0, 1\]"),
        ([good | {"exclude": "."}], "", "no clip was kept; refused: excluded"),
    ]
    for listed, head, message in cases:
        path = toml(tmp_path / "bad.toml", listed, head)
        with pytest.raises(ScaMoError, match=message) as error:
            prepare_union(path, progress=False)
        assert "bad.toml" in str(error.value) or "no clip was kept" in message
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_segments_of_real_recordings_are_found(tmp_path, shared):
    """HumanML3D's segments and the whole CMU clips that they were cut from, by content alone."""
    real = shared / "data"
    with open(real / "humanml3d_cmu/clips_meta.csv", newline="") as file:
        cut = {row["clip"]: row["hml_names"].split() for row in csv.DictReader(file)}
    chosen = sorted(cut)[::6]
    segments = prepare_humanml3d(real / "humanml3d_cmu", tmp_path / "segments", mirror=False, progress=False)
    vectors = np.load(real / "humanml3d_cmu/new_joint_vecs/000065.npy")
    offsets = offsets_from_joints(features_to_joints(vectors[:1])[0])
    whole = np.load(real / "cmu_clips/clips20.npz")
    with DatasetWriter(tmp_path / "whole") as writer:
        for name in chosen:
            writer.add_clip(
                name, joints_to_features(whole[name], target_offsets=offsets), "train", [Caption("moves")]
            )
    sources = {"segments": (str(segments.folder), {"split": "official"}), "whole": (str(writer.folder), {})}
    data = union(tmp_path, sources, drop=(), static_share=0)
    found = by_original(data)
    refused = {entry["name"].removeprefix("whole/") for entry in data.refused}
    truth = {segment: name for name, its in cut.items() for segment in its}
    linked = 0
    for name in chosen:
        its = [found["segments", segment] for segment in cut[name] if ("segments", segment) in found]
        splits = {split for split, *_ in its}
        if len(splits) > 1:
            assert name in refused
        elif its:
            split, meta, _ = found["whole", name]
            assert {split} == splits, f"{name} leaks"
            copy = meta["copy"]
            assert truth[copy["of"].removeprefix("segments/")] == name
            assert copy["mm"] < 10
            linked += 1
        else:
            assert "copy" not in found["whole", name][1]
    assert linked > 30
    # A segment is never taken for a part of another recording.
    for (source, name), (_, meta, _) in found.items():
        if source == "segments" and "copy" in meta:
            assert truth[meta["copy"]["of"].removeprefix("segments/")] == truth[name]
