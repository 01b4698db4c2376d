"""Degraded training data: what changes, what must not, and how much."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from scamo.data.dataset import Caption, DatasetWriter, MotionDataset
from scamo.data.inspect import step_errors
from scamo.data.prepare.degrade import degrade
from scamo.errors import ScaMoError
from scamo.motion.features import features_to_joints, joints_to_features
from scamo.motion.representation import HUMANML3D
from scamo.motion.synthetic import corpus_clip


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """24 train clips, two of them with parts, and one of val and test each."""
    folder = tmp_path_factory.mktemp("degrade") / "set"
    provenance = {"source": "made", "license": "CC BY 4.0"}
    with DatasetWriter(folder, provenance=provenance, min_frames=10) as writer:
        for index in range(26):
            split = {24: "val", 25: "test"}.get(index, "train")
            captions = [Caption(f"motion {index}", meta={"spec": index}), Caption("they move")]
            if index in (3, 24):
                captions += [Caption(f"a part of {index}", 0.35, 1.6), Caption(f"end of {index}", 1.1, 99)]
            features = joints_to_features(corpus_clip(index).joints)
            assert writer.add_clip(f"{index:03d}", features, split, captions, {"index": index})
    return MotionDataset.open(folder)


def made(source, tmp_path, name="out", **options):
    return degrade(source.folder, tmp_path / name, progress=False, **options)


def contents(data, split):
    """{clip: (features, meta, [(start, end, [(caption, meta)])])} of a split."""
    found = {}
    for item in data.items(split).tolist():
        clip = data.item_clip(item)
        captions = [(data.caption(c), data.caption_meta(c)) for c in data.captions_of(item)]
        entry = (data.clip_features(clip).tobytes(), data.clip_meta(clip), [])
        _, start, end = data.item_table[item].tolist()
        found.setdefault(data.clip_names[clip], entry)[2].append((start, end, captions))
    return found


def settings(data):
    return data.manifest["provenance"]["degraded"]


def test_nothing_asked_for_changes_nothing(source, tmp_path):
    out = made(source, tmp_path)
    for split in ("train", "val", "test"):
        assert contents(out, split) == contents(source, split)
    assert out.manifest["provenance"]["license"] == "CC BY 4.0"
    assert out.manifest["provenance"]["of"]["manifest_sha256"] == source.manifest_sha256


def test_only_train_is_worse_and_the_same_call_gives_the_same_bytes(source, tmp_path):
    options = {"keep": 0.5, "jitter": 0.01, "foot_skate": 0.4, "caption_noise": 0.5, "seed": 3}
    out = made(source, tmp_path, **options)
    for split in ("val", "test"):
        assert contents(out, split) == contents(source, split)
    assert out.manifest["files"] == made(source, tmp_path, "again", **options).manifest["files"]
    assert out.manifest["files"] != made(source, tmp_path, "other", **options | {"seed": 4}).manifest["files"]
    clips = [out.clip_features(c) for c in range(out.n_clips) if out.clip_splits[c] == "train"]
    train = np.concatenate(clips)
    assert np.allclose(out.mean, train.mean(0), atol=1e-4)
    assert not np.allclose(out.mean, source.mean, atol=1e-3)


def test_smaller_shares_are_nested(source, tmp_path):
    kept = [set(contents(made(source, tmp_path, f"{n}", keep=n / 16), "train")) for n in (16, 8, 4, 1)]
    assert [len(names) for names in kept] == [24, 12, 6, 2]
    assert all(small < large for large, small in pairwise(kept))


def test_motions_lose_what_was_asked_for(source, tmp_path):
    """A clip's noise does not depend on which others stay, nor one kind of noise on the other."""
    jitter = made(source, tmp_path, "jitter", jitter=0.02)
    skate = made(source, tmp_path, "skate", foot_skate=0.6)
    few = made(source, tmp_path, "few", keep=0.25, foot_skate=0.6)
    everything, before = contents(skate, "train"), contents(source, "train")
    assert all(everything[name] == clip for name, clip in contents(few, "train").items())
    assert all(everything[name][1:] == clip[1:] for name, clip in before.items())
    apart = []
    for clip in range(24):
        true = features_to_joints(source.clip_features(clip))
        shaken, moved = (features_to_joints(data.clip_features(clip)) for data in (jitter, skate))
        assert len(shaken) == len(moved) == len(true)
        # The drift moves all joints alike: bones and heights stay.
        assert np.allclose(moved[..., 1], true[..., 1], atol=1e-5)
        inner = np.linalg.norm(moved[:, 1:] - moved[:, :1], axis=-1)
        assert np.allclose(inner, np.linalg.norm(true[:, 1:] - true[:, :1], axis=-1), atol=1e-4)
        # Only heights are comparable without knowing the heading; second differences drop the floor.
        apart.append((shaken - true)[..., 1] - (shaken - true)[..., 1].mean())
    assert np.concatenate(apart).std() == pytest.approx(0.02, rel=0.1)
    physics = settings(skate)["physics"]
    assert physics["before"]["foot_skate"] < 0.05
    assert 0.3 < physics["after"]["foot_skate"] < 0.7
    assert settings(jitter)["physics"]["after"]["jerk"] > 5 * physics["before"]["jerk"]


def test_small_noise_gives_nearly_the_same_features(source, tmp_path):
    """Of clips that turn across ±180° too, where the format's yaw step has the wrong sign."""
    crossings = [step_errors(source.clip_features(clip), HUMANML3D)[1].any() for clip in range(24)]
    assert 0 < sum(crossings) < 24
    out = made(source, tmp_path, jitter=1e-7)
    for clip in range(24):
        new, old = out.clip_features(clip), source.clip_features(clip)
        # But turns of bones that point against their rest, and contacts at the threshold.
        assert np.abs(new - old)[:, :67].max() < 2e-4
        assert np.abs(new - old)[:, 193:259].max() < 2e-4
        assert np.median(np.abs(new - old)[:, 67:193].max(1)) < 2e-3
        assert (new[:, 259:] != old[:, 259:]).mean() < 0.01


def test_swapped_captions_are_others_and_keep_what_is_beside_them(source, tmp_path):
    out = made(source, tmp_path, caption_noise=0.5, keep=0.75)
    before, after = contents(source, "train"), contents(out, "train")
    own = {text: meta for clip in before.values() for _, _, captions in clip[2] for text, meta in captions}
    kept = {text for name in after for *_, captions in before[name][2] for text, _ in captions}
    swapped = Counter()
    for name, (features, _, items) in after.items():
        assert features == before[name][0]
        texts = {text for *_, captions in before[name][2] for text, _ in captions}
        for (start, end, captions), (was_start, was_end, was) in zip(items, before[name][2], strict=True):
            assert (start, end) == (was_start, was_end)
            for (text, meta), (was_text, _) in zip(captions, was, strict=True):
                assert meta == own[text]
                assert text in kept
                assert text == was_text or text not in texts
                swapped[text != was_text] += 1
    assert settings(out)["counts"] == {
        "train_clips": 24,
        "kept_clips": 18,
        "train_captions": swapped.total(),
        "swapped_captions": swapped[True],
    }
    assert 0.3 < swapped[True] / swapped.total() < 0.7
    whole = made(source, tmp_path, "all", caption_noise=1.0)
    assert settings(whole)["counts"]["swapped_captions"] == settings(whole)["counts"]["train_captions"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0}, "keep = 0: expected above 0 and up to 1"),
        ({"keep": float("nan")}, "keep = nan"),
        ({"jitter": -0.1}, "jitter = -0.1: expected 0 or more"),
        ({"foot_skate": float("inf")}, "foot_skate = inf"),
        ({"caption_noise": 1.5}, "caption_noise = 1.5: expected 0 or more and up to 1"),
    ],
)
def test_bad_settings_are_named(source, tmp_path, options, message):
    with pytest.raises(ScaMoError, match=message):
        made(source, tmp_path, **options)


def test_other_features_and_lone_captions_are_refused(tmp_path):
    with DatasetWriter(tmp_path / "wide", feature_dim=272) as writer:
        writer.add_clip("a", np.zeros((20, 272), np.float32), "train", [Caption("a")])
    with pytest.raises(ScaMoError, match="272 features"):
        degrade(tmp_path / "wide", tmp_path / "out", progress=False)
    with DatasetWriter(tmp_path / "same") as writer:
        for name in "ab":
            writer.add_clip(name, np.zeros((20, 263), np.float32), "train", [Caption("they move")])
    with pytest.raises(
        ScaMoError, match=r"caption_noise = 1\.0: all kept clips have the caption 'they move'"
    ):
        degrade(tmp_path / "same", tmp_path / "out", caption_noise=1.0, progress=False)
    assert not (tmp_path / "out").exists()
