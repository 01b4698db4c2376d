"""Preparing the synthetic corpus and HumanML3D-shaped folders."""

import shutil

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from scamo.data.dataset import MotionDataset
from scamo.data.prepare.humanml3d import prepare_humanml3d
from scamo.data.prepare.layout import parse_caption
from scamo.data.prepare.synthetic import prepare_synthetic
from scamo.errors import ScaMoError
from scamo.motion import features272
from scamo.motion.features import features_to_joints, joints_to_features, offsets_from_joints
from scamo.motion.representation import HUMANML3D, KIT_ML, SMPL_272
from scamo.motion.skeleton import mirror_joints, swap_sides
from scamo.motion.synthetic import Spec, corpus_clip


def files_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synthetic") / "one"
    prepare_synthetic(folder, clips=60, seed=3, workers=1, progress=False)
    return folder


def test_synthetic_is_the_same_for_any_number_of_workers(synthetic, tmp_path):
    prepare_synthetic(tmp_path / "two", clips=60, seed=3, workers=2, progress=False)
    assert files_of(synthetic) == files_of(tmp_path / "two")


def test_synthetic_holds_the_corpus(synthetic):
    data = MotionDataset.open(synthetic, verify="full")
    assert [data.manifest["splits"][s]["clips"] for s in ("train", "val", "test")] == [54, 3, 3]
    assert data.manifest["provenance"] == {"source": "synthetic", "clips": 60, "captions": 3, "seed": 3}
    for index in (0, 9, 19, 41):
        clip = corpus_clip(index, 3)
        assert data.clip_names[index] == clip.name
        assert data.clip_splits[index] == clip.split
        np.testing.assert_array_equal(data.clip_features(index), joints_to_features(clip.joints))
        ids = data.captions_of(index)
        assert [data.caption(c) for c in ids] == clip.texts
        assert [Spec.from_list(data.caption_meta(c)["spec"]) for c in ids] == [c.spec for c in clip.captions]
        assert Spec.from_list(data.clip_meta(index)["spec"]) == clip.spec


def test_synthetic_refuses_bad_counts_and_existing_folders(synthetic, tmp_path):
    for arguments, message in [
        ({"clips": 0}, "clips = 0: expected 1 or more"),
        ({"clips": 5, "workers": 0}, "workers = 0: expected 1 or more"),
        ({"clips": 5, "seed": -1}, "seed = -1: expected 0 or more"),
    ]:
        with pytest.raises(ScaMoError, match=message):
            prepare_synthetic(tmp_path / "x", progress=False, **arguments)
    with pytest.raises(ScaMoError, match="exists: choose another name"):
        prepare_synthetic(synthetic, clips=20, workers=1, progress=False)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("line", "text", "start", "end", "tokens", "nan"),
    [
        (
            "a man walks#a/DET man/NOUN walk/VERB#0.0#0.0",
            "a man walks",
            0,
            0,
            "a/DET man/NOUN walk/VERB",
            False,
        ),
        ("he turns#he/PRON#1.5#4\n", "he turns", 1.5, 4, "he/PRON", False),
        ("he turns#he/PRON#nan#nan", "he turns", 0, 0, "he/PRON", True),
        ("he turns#he/PRON#nan#2.0", "he turns", 0, 2, "he/PRON", True),
        ("only a sentence ", "only a sentence", 0, 0, None, False),
    ],
)
def test_parse_caption(line, text, start, end, tokens, nan):
    caption, was_nan = parse_caption(line)
    assert (caption.text, caption.start_s, caption.end_s) == (text, start, end)
    assert caption.meta.get("tokens") == tokens
    assert was_nan == nan


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a#b#0.0", "3 parts between #, expected 4"),
        ("a#b#c#0#0", "5 parts between #, expected 4"),
        ("a#b#x#0", "time tags 'x' and '0' are not numbers"),
    ],
)
def test_parse_caption_says_what_is_wrong(line, message):
    with pytest.raises(ScaMoError, match=message):
        parse_caption(line)


def make_folder(root, *, captions=None, splits=None, joints="joints", indices=(0, 1, 2, 3)):
    """A HumanML3D-shaped folder of corpus motions as joints, names 000000, 000001, ..."""
    (root / "texts").mkdir(parents=True)
    (root / joints).mkdir()
    names = [f"{i:06d}" for i in range(len(indices))]
    for name, index in zip(names, indices, strict=True):
        np.save(root / joints / f"{name}.npy", corpus_clip(index).joints)
        text = (captions or {}).get(name, "a man lifts his left arm#a/DET left/ADJ arm/NOUN#0.0#0.0\n")
        (root / "texts" / f"{name}.txt").write_text(text)
    default = {"train": [*names, *("M" + n for n in names)], "val": [], "test": []}
    for split, listed in (splits or default).items():
        (root / f"{split}.txt").write_text("".join(f"{n}\n" for n in listed))
    return root


def test_joints_and_their_mirrored_copies(tmp_path):
    source = make_folder(tmp_path / "source")
    data = prepare_humanml3d(source, tmp_path / "set", min_frames=20, license="of a test", progress=False)
    assert data.manifest["provenance"]["license"] == "of a test"
    assert data.clip_names == ["000000", "000001", "000002", "000003"] + [f"M00000{i}" for i in range(4)]
    for i in range(4):
        joints = np.load(source / f"joints/00000{i}.npy")
        np.testing.assert_array_equal(data.clip_features(i), joints_to_features(joints))
        np.testing.assert_array_equal(data.clip_features(4 + i), joints_to_features(mirror_joints(joints)))
        assert data.caption(i) == "a man lifts his left arm"
        assert data.caption(4 + i) == "a man lifts his right arm"
        assert data.caption_meta(4 + i) == {"tokens": "a/DET right/ADJ arm/NOUN"}
        assert data.clip_meta(4 + i) == {"from": "joints, mirrored"}
    assert data.manifest["provenance"]["skeleton"] == "kept"


def test_any_number_of_workers_gives_the_same(tmp_path):
    source = make_folder(tmp_path / "source")
    np.save(source / "joints" / "000002.npy", np.zeros((50, 7, 3), np.float32))
    one = prepare_humanml3d(source, tmp_path / "one", min_frames=20, progress=False)
    two = prepare_humanml3d(source, tmp_path / "two", min_frames=20, workers=2, progress=False)
    assert {entry["reason"] for entry in one.refused} == {"wrong shape"}
    assert files_of(one.folder) == files_of(two.folder)


def test_the_fixed_variant_is_made_from_joints_and_not_mixed(tmp_path):
    source = make_folder(tmp_path / "source")
    fixed = prepare_humanml3d(source, tmp_path / "fixed", min_frames=20, variant="fixed", progress=False)
    assert fixed.variant == fixed.manifest["provenance"]["variant"] == "fixed"
    joints = np.load(source / "joints/000001.npy")
    np.testing.assert_array_equal(fixed.clip_features(1), joints_to_features(joints, variant="fixed"))
    plain = prepare_humanml3d(source, tmp_path / "plain", min_frames=20, progress=False)
    assert plain.variant == "original"
    # Stored vectors are of the original: the others are made from the joints that they give.
    (source / "new_joint_vecs").mkdir()
    for path in (source / "joints").iterdir():
        np.save(source / "new_joint_vecs" / path.name, joints_to_features(np.load(path)))
    shutil.rmtree(source / "joints")
    again = prepare_humanml3d(source, tmp_path / "again", min_frames=20, variant="fixed", progress=False)
    recovered = features_to_joints(joints_to_features(joints).astype(np.float64))
    np.testing.assert_allclose(
        again.clip_features(1), joints_to_features(recovered, variant="fixed"), atol=1e-5
    )

    from scamo.config import TokenizerConfig
    from scamo.tokenizers.autoencoder import FSQAutoencoder
    from scamo.tokenizers.encode import open_matching

    tokenizer = FSQAutoencoder(TokenizerConfig(width=8, latent_width=8), plain.mean, plain.std)
    open_matching(tokenizer, plain.folder)
    with pytest.raises(ScaMoError, match="fixed features, the tokenizer was trained on original ones"):
        open_matching(tokenizer, fixed.folder)
    with pytest.raises(ScaMoError, match="variant = 'new': expected one of original, fixed"):
        prepare_humanml3d(source, tmp_path / "other", variant="new", progress=False)


def test_a_mirrored_caption_file_goes_before_the_swapped_one(tmp_path):
    source = make_folder(tmp_path / "source", joints="new_joints")
    (source / "texts/M000001.txt").write_text("she lifts the right one#x/X#0.0#0.0\n")
    data = prepare_humanml3d(source, tmp_path / "set", min_frames=20, progress=False)
    clip = data.clip_names.index("M000001")
    assert data.caption(int(data.captions_of(clip)[0])) == "she lifts the right one"


def test_mirroring_can_be_turned_off_but_stored_copies_stay(tmp_path):
    source = make_folder(tmp_path / "source")
    np.save(source / "joints/M000002.npy", mirror_joints(np.load(source / "joints/000002.npy")))
    data = prepare_humanml3d(source, tmp_path / "set", min_frames=20, mirror=False, progress=False)
    assert data.clip_names == ["000000", "000001", "000002", "000003", "M000002"]
    assert [(r["name"], r["reason"]) for r in data.refused] == [
        (f"M00000{i}", "mirrored copies are turned off") for i in (0, 1, 3)
    ]


def bone_lengths(features):
    return np.linalg.norm(offsets_from_joints(features_to_joints(features[:1])[0]), axis=-1)


def test_target_offsets_are_applied(tmp_path):
    source = make_folder(tmp_path / "source", indices=(0, 1))
    target = offsets_from_joints(corpus_clip(7).joints[0])
    np.save(tmp_path / "target.npy", target)
    data = prepare_humanml3d(
        source, tmp_path / "set", target_offsets=tmp_path / "target.npy", min_frames=20, progress=False
    )
    for clip in range(4):
        expected = np.linalg.norm(target, axis=-1)
        np.testing.assert_allclose(bone_lengths(data.clip_features(clip)), expected, atol=1e-5)
    assert data.manifest["provenance"]["skeleton"] == "given"
    np.save(tmp_path / "bad.npy", target[:20])
    for name, message in [
        ("bad.npy", r"bad\.npy: float32 \[20, 3\], expected \(22, 3\) finite"),
        ("none.npy", r"none\.npy: cannot be read"),
    ]:
        with pytest.raises(ScaMoError, match=message):
            prepare_humanml3d(source, tmp_path / "b", target_offsets=tmp_path / name, progress=False)


def test_copies_made_from_joints_take_the_skeleton_of_the_stored_vectors(tmp_path):
    """Otherwise a mirrored copy would be a person of another build than its original."""
    source = make_folder(tmp_path / "source", indices=(0, 1))
    target = offsets_from_joints(corpus_clip(7).joints[0])
    (source / "new_joint_vecs").mkdir()
    for name in ("000000", "000001"):
        joints = np.load(source / f"joints/{name}.npy")
        np.save(source / f"new_joint_vecs/{name}.npy", joints_to_features(joints, target_offsets=target))
    data = prepare_humanml3d(source, tmp_path / "set", min_frames=20, progress=False)
    assert data.manifest["provenance"]["skeleton"] == "that of the stored vectors"
    assert [data.clip_meta(i)["from"] for i in range(4)] == ["new_joint_vecs"] * 2 + ["joints, mirrored"] * 2
    for clip in range(4):
        expected = np.linalg.norm(target, axis=-1)
        np.testing.assert_allclose(bone_lengths(data.clip_features(clip)), expected, atol=1e-5)


def test_vectors_that_keep_their_bones_impose_none(tmp_path):
    source = make_folder(tmp_path / "source", indices=(0, 1))
    (source / "new_joint_vecs").mkdir()
    for name in ("000000", "000001"):
        joints = np.load(source / f"joints/{name}.npy")
        np.save(source / f"new_joint_vecs/{name}.npy", joints_to_features(joints))
    data = prepare_humanml3d(source, tmp_path / "set", min_frames=20, progress=False)
    assert data.manifest["provenance"]["skeleton"] == "kept"
    mirrored = joints_to_features(mirror_joints(np.load(source / "joints/000000.npy")))
    np.testing.assert_array_equal(data.clip_features(2), mirrored)


def test_everything_left_out_is_reported(tmp_path):
    indices = tuple(range(13))
    captions = {
        "000001": "",
        "000002": "walks#w/V#0.0#0.0\nbroken#0.0\n\n  #x/X#0.0#0.0\n",
        "000003": "walks#w/V#nan#nan\nturns#t/V#0.0#1.2\nstops#s/V#0.2#0.5\n",
    }
    splits = {"train": [f"{i:06d}" for i in indices], "val": ["000000", "M000012"], "test": ["none", "Mnone"]}
    source = make_folder(tmp_path / "source", captions=captions, splits=splits, indices=indices)
    joints = source / "joints"
    bad = np.load(joints / "000004.npy")
    bad[5, 3, 1] = np.nan
    np.save(joints / "000004.npy", bad)
    np.save(joints / "000005.npy", bad[:1])
    np.save(joints / "000006.npy", bad[:, :21])
    (joints / "000007.npy").write_bytes((joints / "000007.npy").read_bytes()[:-100])
    (joints / "000008.npy").unlink()
    (source / "texts/000009.txt").unlink()
    (source / "texts/000010.txt").write_bytes(b"\xff\xfe walks")
    np.save(joints / "000011.npy", np.zeros((60, 22, 3), np.float32))
    np.save(joints / "000012.npy", np.tile(corpus_clip(12).joints, (5, 1, 1))[:201])
    (source / "texts/none.txt").write_text("x")
    data = prepare_humanml3d(source, tmp_path / "set", min_frames=20, progress=False)

    found = {(r["split"], r["name"], r["kind"]): (r["reason"], r["detail"]) for r in data.refused}
    assert found["train", "000001", "clip"] == ("caption file without captions", "texts/000001.txt")
    assert found["train", "000002", "caption"][0] in ("malformed caption line", "empty caption")
    assert sum(r["name"] == "000002" for r in data.refused) == 2
    assert found["train", "000003", "caption"][0] == "part too short"
    assert found["train", "000004", "clip"] == ("NaN or infinite joints", "frame 5, joint 3")
    assert found["train", "000005", "clip"][0] == "too short"
    assert found["train", "000006", "clip"][0] == "wrong shape"
    assert "[frames, 22, 3]" in found["train", "000006", "clip"][1]
    assert found["train", "000007", "clip"][0] == "motion file unreadable"
    assert found["train", "000008", "clip"] == ("motion file missing", "000008.npy in joints")
    assert found["train", "000009", "clip"] == ("caption file missing", "texts/000009.txt")
    assert found["train", "000010", "clip"][0] == "caption file unreadable"
    assert found["train", "000011", "clip"][0] == "features cannot be computed"
    assert found["train", "000012", "clip"] == ("too long", "200 frames, expected fewer than 200")
    assert found["val", "000000", "clip"][0] == "name is empty or used twice"
    assert found["val", "M000012", "clip"][0] == "too long"
    assert found["test", "none", "clip"][0] == "motion file missing"
    assert found["test", "Mnone", "clip"][0] == "motion file missing"
    assert len(data.refused) == 17
    assert [(n["name"], n["reason"]) for n in data.manifest["notes"]] == [
        ("000003", "nan time tags read as 0")
    ]
    assert data.clip_names == ["000000", "000002", "000003"]
    assert [data.item_name(i) for i in range(data.n_items)] == ["000000", "000002", "000003", "000003@0-24"]
    counted = sum(
        int(line.split()[-1]) for line in data.summary().splitlines() if line.startswith("refused:")
    )
    assert counted == 17


def test_bones_of_52_joints_are_cut_to_22(tmp_path):
    source = make_folder(tmp_path / "source", indices=(0,), splits={"train": ["000000"]})
    joints = corpus_clip(0).joints
    np.save(source / "joints/000000.npy", np.concatenate([joints, np.ones((len(joints), 30, 3))], axis=1))
    data = prepare_humanml3d(source, tmp_path / "set", min_frames=20, progress=False)
    np.testing.assert_allclose(data.clip_features(0), joints_to_features(joints), atol=1e-6)


def test_a_folder_of_another_shape_is_named(tmp_path):
    source = make_folder(tmp_path / "source", indices=(0,))
    out = tmp_path / "set"
    with pytest.raises(ScaMoError, match="nowhere: no such folder"):
        prepare_humanml3d(tmp_path / "nowhere", out, progress=False)
    with pytest.raises(ScaMoError, match=r"refused: too short \(2\)"):
        prepare_humanml3d(source, out, min_frames=1000, max_frames=2000, progress=False)
    (source / "train.txt").write_text("../000000\n")
    with pytest.raises(ScaMoError, match=r"train\.txt: '\.\./000000' is not a plain name"):
        prepare_humanml3d(source, out, progress=False)
    (source / "train.txt").write_text("\n")
    with pytest.raises(ScaMoError, match="the split lists name no clip"):
        prepare_humanml3d(source, out, progress=False)
    (source / "train.txt").unlink()
    with pytest.raises(ScaMoError, match=r"train\.txt: no such file; expected the names"):
        prepare_humanml3d(source, out, progress=False)
    (source / "joints").rename(source / "bones")
    with pytest.raises(ScaMoError, match="has none of new_joint_vecs/, .*, joints/, new_joints/"):
        prepare_humanml3d(source, out, progress=False)
    shutil.rmtree(source / "texts")
    with pytest.raises(ScaMoError, match=r"texts: no such folder; expected captions"):
        prepare_humanml3d(source, out, progress=False)
    assert not out.exists()


def write(
    root, vectors, arrays, *, texts="texts", captions="a man lifts his left arm\n", lists=None, where="."
):
    """A folder of arrays by name, one caption file each, and split lists."""
    for name, array in arrays.items():
        for path in (root / vectors / f"{name}.npy", root / texts / f"{name}.txt"):
            path.parent.mkdir(parents=True, exist_ok=True)
        np.save(root / vectors / f"{name}.npy", array)
        (root / texts / f"{name}.txt").write_text(captions)
    for split, names in (lists or {}).items():
        (root / where).mkdir(exist_ok=True)
        (root / where / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
    return root


# Joints of the 22 that stand where KIT-ML has its 21; a midfoot is between ankle and foot.
KIT_OF_22 = [0, 3, 9, 12, 15, 17, 19, 21, 16, 18, 20, 2, 5, 8, 8, 11, 1, 4, 7, 7, 10]


def kit_joints(index):
    joints = corpus_clip(index).joints
    found = joints[:, KIT_OF_22].copy()
    for midfoot, foot in ((14, 15), (19, 20)):
        found[:, midfoot] = (found[:, midfoot] + found[:, foot]) / 2
    return found


def test_kit_ml_as_published(tmp_path):
    features = {f"0000{i}": KIT_ML.from_joints(kit_joints(i)) for i in (1, 2)}
    stored = KIT_ML.mirrored(features["00002"]) + np.float32(0.001)
    wrong = {"00003": joints_to_features(corpus_clip(0).joints)}
    lists = {"train": ["00001", "M00001", "00003"], "val": ["00002", "M00002"], "test": [], "all": ["00001"]}
    source = write(tmp_path / "KIT-ML", "new_joint_vecs", features | wrong, lists=lists)
    np.save(source / "new_joint_vecs/M00002.npy", stored)
    data = prepare_humanml3d(source, tmp_path / "set", progress=False)
    assert (data.feature_dim, data.fps) == (251, 12.5)
    assert [data.manifest["provenance"][key] for key in ("features", "min_frames", "max_frames")] == [
        "KIT-ML",
        24,
        200,
    ]
    assert data.clip_names == ["00001", "M00001", "00002", "M00002"]
    expected = [features["00001"], KIT_ML.mirrored(features["00001"]), features["00002"], stored]
    for clip, array in enumerate(expected):
        np.testing.assert_array_equal(data.clip_features(clip), array)
    assert data.clip_meta(1) == {"from": "new_joint_vecs, mirrored"}
    assert data.caption(1) == "a man lifts his right arm"
    (refused,) = data.refused
    assert (refused["name"], refused["reason"]) == ("00003", "wrong shape")
    assert "00003.npy" in refused["detail"]
    assert "expected float [frames, 251]" in refused["detail"]


def test_kit_joints_are_millimetres(tmp_path):
    arrays = {name: 1000 * kit_joints(index) for name, index in (("a", 1), ("b", 2))}
    source = write(tmp_path / "kit", "new_joints", arrays, lists={"train": ["a", "Mb"]})
    data = prepare_humanml3d(source, tmp_path / "set", progress=False)
    assert data.manifest["provenance"]["metres_a_unit"] == 0.001
    expected = KIT_ML.from_joints(kit_joints(1))
    np.testing.assert_allclose(data.clip_features(0), expected, rtol=1e-4, atol=0.02)  # mm
    expected = KIT_ML.mirrored(KIT_ML.from_joints(kit_joints(2)))
    np.testing.assert_allclose(data.clip_features(1), expected, rtol=1e-4, atol=0.02)
    told = prepare_humanml3d(source, tmp_path / "told", units="mm", progress=False)
    np.testing.assert_array_equal(told.clip_features(0), data.clip_features(0))


def test_the_272_features_of_motionstreamer(tmp_path):
    features = {f"00000{i}": features272.encode(corpus_clip(i).joints, fps=30).features for i in (1, 2)}
    lists = {"train": ["000001"], "val": ["M000002"]}
    source = write(tmp_path / "humanml3d_272", "motion_data", features, lists=lists, where="split")
    data = prepare_humanml3d(source, tmp_path / "set", min_frames=20, progress=False)
    assert (data.feature_dim, data.fps, data.clip_splits) == (272, 30, ["train", "val"])
    np.testing.assert_array_equal(data.clip_features(0), features["000001"])
    np.testing.assert_array_equal(data.clip_features(1), SMPL_272.mirrored(features["000002"]))
    with pytest.raises(ScaMoError, match="source_fps = 60: 272 features cannot be resampled"):
        prepare_humanml3d(source, tmp_path / "other", source_fps=60, progress=False)


def smooth(frames, fps):
    """One pose that glides along an arc and sways, as a function of time."""
    t = np.arange(frames) / fps
    turns = Rotation.from_euler("YZ", np.stack([0.3 * t, 0.1 * np.sin(2 * t)], axis=-1))
    places = np.einsum("tij,kj->tki", turns.as_matrix(), corpus_clip(0).joints[0])
    return places + (np.stack([0.4 * t, 0.05 * np.sin(3 * t), 0 * t], axis=-1))[:, None]


def test_motion_x_in_263_features(tmp_path):
    """Folders below folders, plain sentences, 30 fps, no split lists."""
    names = [f"fitness/subset_0/Jump_clip_{i}" for i in range(1, 9)]
    names += [
        "humanml/000001",
        "humanml/M000001",
        "EgoBody/r_01/body_idx_0/000",
        "EgoBody/r_01/body_idx_1/003",
    ]
    arrays = {name: joints_to_features(smooth(91, 30), fps=30) for name in names}
    source = write(tmp_path / "MotionX", "vector_263", arrays, texts="texts/semantic_labels")
    with pytest.raises(ScaMoError, match="source_fps: Motion-X's files in vector_263/ have 30"):
        prepare_humanml3d(source, tmp_path / "set", progress=False)

    kept = prepare_humanml3d(source, tmp_path / "kept", fps=30, progress=False)
    assert (kept.fps, kept.clip_names, kept.manifest["provenance"]["min_frames"]) == (30, sorted(names), 60)
    np.testing.assert_array_equal(kept.clip_features(0), arrays[sorted(names)[0]])
    splits = dict(zip(kept.clip_names, kept.clip_splits, strict=True))
    assert len({splits[name] for name in names[:8]}) == 1
    assert splits["humanml/000001"] == splits["humanml/M000001"]
    assert len({splits[name] for name in names[10:]}) == 1

    data = prepare_humanml3d(source, tmp_path / "set", source_fps=30, progress=False)
    assert (data.fps, data.n_clips, data.refused) == (20, 12, [])
    expected = joints_to_features(smooth(61, 20))
    found = data.clip_features(0)
    assert len(found) in (len(expected), len(expected) - 1)  # the last frame of joints is not in the features
    error = features_to_joints(found) - features_to_joints(expected[: len(found)])
    assert np.abs(error).max() < 0.003


def test_split_lists_with_folders(tmp_path):
    arrays = {name: joints_to_features(corpus_clip(0).joints) for name in ("a/b/x_1", "humanml/000001")}
    lists = {"train": ["humanml/000001", "humanml/M000001"], "test": ["a/b/x_1"]}
    source = write(tmp_path / "source", "motion_data/vector_263", arrays, lists=lists)
    data = prepare_humanml3d(source, tmp_path / "set", source_fps=20, progress=False)
    assert list(zip(data.clip_names, data.clip_splits, strict=True)) == [
        ("humanml/000001", "train"),
        ("humanml/M000001", "train"),
        ("a/b/x_1", "test"),
    ]
    np.testing.assert_array_equal(data.clip_features(1), HUMANML3D.mirrored(data.clip_features(0)))
    assert data.caption(1) == "a man lifts his right arm"


def test_of_a_whole_body_the_first_22_joints_are_read(tmp_path):
    features = joints_to_features(corpus_clip(0).joints)
    hands = np.full((len(features), 30 * 6), 7, np.float32)
    cuts = np.split(features, [67, 193, 259], axis=1)
    parts = [cuts[0], hands[:, :90], cuts[1], hands, cuts[2], hands[:, :90], cuts[3]]
    whole = np.concatenate(parts, axis=1)
    assert whole.shape[1] == 623
    source = write(tmp_path / "tomato", "new_joint_vecs", {"a": whole}, lists={"train": ["a"]})
    data = prepare_humanml3d(source, tmp_path / "set", progress=False)
    np.testing.assert_array_equal(data.clip_features(0), features)


def test_a_set_of_humanml3ds_shape_with_other_names(tmp_path):
    """As CombatMotion has it, which its authors processed to HumanML3D's form."""
    arrays = {f"CMP00000{i}": joints_to_features(corpus_clip(i).joints) for i in (1, 2)}
    text = "a man attacks,swiftly#a/DET man/NOUN attack/VERB#0.0#0.0\nhe strikes left#he/PRON#0.0#0.0\n"
    lists = {"train": ["CMP000001", "MCMP000001"], "val": ["CMP000002"], "test": []}
    source = write(tmp_path / "CMP", "new_joint_vecs", arrays, captions=text, lists=lists)
    data = prepare_humanml3d(source, tmp_path / "set", progress=False)
    assert (data.clip_names, data.refused) == (["CMP000001", "MCMP000001", "CMP000002"], [])
    assert [data.caption(int(c)) for c in data.captions_of(1)] == [
        "a man attacks,swiftly",
        "he strikes right",
    ]


@pytest.mark.parametrize(
    ("array", "options", "message"),
    [
        (np.zeros((60, 100), np.float32), {}, r"new_joint_vecs: feature_dim = 100: expected one of 263"),
        (np.zeros((60, 17, 3), np.float32), {}, r"joints: arrays of 17 joints, expected 22 or KIT-ML's 21"),
        (200 * corpus_clip(0).joints, {}, "in none of m, cm, mm; give the unit"),
        (corpus_clip(0).joints, {"fps": 0}, "fps = 0: expected a positive number"),
        (corpus_clip(0).joints, {"split": (1, 1, 1)}, "parts of train, val and test"),
        (corpus_clip(0).joints, {"strict": True}, "a: too short"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, array, options, message):
    folder = "joints" if array.ndim == 3 else "new_joint_vecs"
    source = write(tmp_path / "source", folder, {"a": array, "b": array}, lists={"train": ["a", "b"]})
    if options.get("strict"):
        np.save(source / folder / "a.npy", array[:5])
    with pytest.raises(ScaMoError, match=message):
        prepare_humanml3d(source, tmp_path / "set", progress=False, **options)
    assert not (tmp_path / "set").exists()


@pytest.fixture(scope="module")
def cmu(shared, tmp_path_factory):
    source = shared / "data/humanml3d_cmu"
    return source, prepare_humanml3d(source, tmp_path_factory.mktemp("cmu") / "set", progress=False)


def test_real_folder_is_read_whole(cmu):
    """Every name of the split lists is kept or refused; counts taken independently from the files."""
    source, data = cmu
    data = MotionDataset.open(data.folder, verify="full")
    names = {s: (source / f"{s}.txt").read_text().split() for s in ("train", "val", "test")}
    kept = dict(zip(data.clip_names, data.clip_splits, strict=True))
    refused = {r["name"] for r in data.refused if r["kind"] == "clip"}
    frames = {p.stem: np.load(p).shape[0] for p in (source / "new_joint_vecs").iterdir()}
    for split, listed in names.items():
        for name in listed:
            long_enough = 40 <= frames[name.removeprefix("M")] < 200
            assert (kept.get(name) == split) == long_enough, name
            assert (name in refused) != long_enough, name
    assert len(kept) + len(refused) == sum(map(len, names.values())) == 714
    lines = [
        line
        for name in kept
        for line in (source / f"texts/{name}.txt").read_text().splitlines()
        if line.strip()
    ]
    dropped = sum(r["kind"] == "caption" for r in data.refused)
    assert data.n_captions == len(lines) - dropped
    assert len(data.manifest["notes"]) == 6  # the files with nan tags


def test_real_vectors_are_kept_and_mirrored_copies_share_their_skeleton(cmu, shared):
    source, data = cmu
    assert data.manifest["provenance"]["skeleton"] == "that of the stored vectors"
    target = np.linalg.norm(np.load(shared / "reference/derived/target_offsets_000021.npy"), axis=-1)
    checked = 0
    for clip, name in enumerate(data.clip_names):
        if name.startswith("M"):
            if checked % 20 == 0:
                np.testing.assert_allclose(bone_lengths(data.clip_features(clip)), target, atol=1e-4)
            checked += 1
        else:
            np.testing.assert_array_equal(
                data.clip_features(clip), np.load(source / f"new_joint_vecs/{name}.npy")
            )
    assert checked > 250


def test_real_captions_and_their_parts(cmu):
    source, data = cmu
    parts = 0
    for item in range(data.n_items):
        name, _, tags = data.item_name(item).partition("@")
        lines = [parse_caption(x)[0] for x in (source / f"texts/{name}.txt").read_text().splitlines()]
        for c in data.captions_of(item):
            (same, *_) = [x for x in lines if " ".join(x.text.split()) == data.caption(c)]
            assert data.caption_meta(c)["tokens"] == same.meta["tokens"]
            if tags:
                parts += 1
                start, end = map(int, tags.split("-"))
                spans = [(int(20 * x.start_s), int(20 * x.end_s)) for x in lines]
                assert any(a == start and (b == end or b > end) for a, b in spans)
                assert 40 <= end - start < 200
    assert parts > 50


def test_real_joints_give_the_stored_vectors(shared, tmp_path):
    source = shared / "data/humanml3d_cmu"
    names = [n for n in (source / "val.txt").read_text().split() if not n.startswith("M")]
    folder = tmp_path / "source"
    (folder / "joints").mkdir(parents=True)
    (folder / "texts").mkdir()
    for name in names:
        shutil.copy(source / f"joints/{name}.npy", folder / "joints")
        shutil.copy(source / f"texts/{name}.txt", folder / "texts")
    (folder / "train.txt").write_text("\n".join([*names, *("M" + n for n in names)]))
    target = shared / "reference/derived/target_offsets_000021.npy"
    data = prepare_humanml3d(folder, tmp_path / "set", target_offsets=target, progress=False)
    assert data.n_clips >= 30
    for clip, name in enumerate(data.clip_names):
        if not name.startswith("M"):
            stored = np.load(source / f"new_joint_vecs/{name}.npy")
            np.testing.assert_allclose(data.clip_features(clip), stored, atol=1e-4)
            continue
        texts = [
            data.caption(c)
            for i in data.items("train")
            if data.item_clip(i) == clip
            for c in data.captions_of(i)
        ]
        plain = [
            parse_caption(x)[0].text for x in (source / f"texts/{name[1:]}.txt").read_text().splitlines()
        ]
        assert set(texts) <= {" ".join(swap_sides(t).split()) for t in plain}
