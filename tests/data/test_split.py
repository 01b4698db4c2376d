"""Nothing of one source clip is in two splits, whatever the seed."""

import re
from collections import Counter

import numpy as np
import pytest

from scamo.data.dataset import SPLITS
from scamo.data.split import VARIANT, Groups, decide_splits, family, recording_of

RATIOS = (0.8, 0.05, 0.15)


@pytest.mark.parametrize(
    ("name", "meta", "expected"),
    [
        ("walk", {}, "walk"),
        ("Mwalk", {}, "walk"),
        ("March", {}, "March"),  # no clip is called arch
        ("M000021", {}, "000021"),
        ("walk@40-120", {}, "walk"),
        ("Mwalk@40-120", {}, "walk"),
        ("walk_mirrored", {}, "walk"),
        ("walk_phys", {}, "walk"),
        ("Mwalk_phys_x0.9", {}, "walk"),
        ("walk_speed1.25", {}, "walk"),
        ("walk_slow", {}, "walk_slow"),  # may be another take
        ("_mirror", {}, "_mirror"),
        ("x", {"source_clip": "walk"}, "walk"),
        ("Mrun", {"mirrored": True}, "run"),
    ],
)
def test_family(name, meta, expected):
    assert family(name, meta, {"walk", name}, re.compile(VARIANT, re.IGNORECASE)) == expected


def test_recording():
    assert recording_of({"file": "a/b.bvh", "from": "x.npz"}) == "a/b.bvh"
    assert recording_of({"recording": "r", "file": "a/b.bvh"}) == "r"
    assert recording_of({"from": "CMU/01/01_01_poses.npz"}) == "CMU/01/01_01_poses.npz"
    assert recording_of({"from": "new_joint_vecs"}) is None


def test_groups_are_known_by_their_first_clip():
    groups = Groups(6)
    for a, b in ((4, 2), (5, 4), (3, 1)):
        groups.join(a, b)
    assert groups.roots() == [0, 1, 2, 1, 2, 2]


def drawn(seed, straddling=True):
    """Clips of three sources in random groups; those of the first two have splits of their own."""
    rng = np.random.default_rng(seed)
    n = 300
    groups = Groups(n)
    for _ in range(150):
        groups.join(*rng.integers(0, n, 2).tolist())
    sources = np.sort(rng.integers(0, 3, n)).tolist()
    official = [str(rng.choice(SPLITS)) if source < 2 and straddling else None for source in sources]
    return groups.roots(), sources, official


@pytest.mark.parametrize("seed", range(10))
def test_no_group_is_in_two_splits_but_as_its_source_has_it(seed):
    groups, sources, official = drawn(seed)
    n = len(groups)
    splits, straddles = decide_splits(
        groups, sources, official, [True] * n, list(map(str, range(n))), RATIOS, seed
    )
    straddling = {straddle.group: straddle for straddle in straddles}
    for group in set(groups):
        clips = [clip for clip in range(n) if groups[clip] == group]
        if group in straddling:
            straddle = straddling[group]
            assert len(straddle.splits) > 1
            for clip in clips:
                kept = sources[clip] == straddle.source
                assert splits[clip] == (official[clip] if kept else None)
        else:
            assert len({splits[clip] for clip in clips}) == 1
            first = next((official[clip] for clip in clips if official[clip]), None)
            assert splits[clips[0]] == first or first is None
    assert 0 < len(straddling) < len(set(groups))


@pytest.mark.parametrize("seed", range(10))
def test_shares_are_those_asked_for_in_every_source(seed):
    groups, sources, official = drawn(seed, straddling=False)
    n = len(groups)
    splits, straddles = decide_splits(
        groups, sources, official, [True] * n, list(map(str, range(n))), RATIOS, seed
    )
    assert straddles == []
    for source in range(3):
        roots = [group for group in set(groups) if sources[group] == source]
        counts = Counter(splits[group] for group in roots)
        for split, ratio in zip(SPLITS, RATIOS, strict=True):
            assert abs(counts[split] - ratio * len(roots)) <= 1
    assert [splits[groups[clip]] for clip in range(n)] == splits


def test_seed_and_names_alone_decide():
    n = 200

    def splits(keys, seed):
        result, _ = decide_splits(range(n), [0] * n, [None] * n, [True] * n, keys, RATIOS, seed)
        return dict(zip(keys, result, strict=True))

    keys = [f"clip{i}" for i in range(n)]
    assert splits(keys, 1) == splits(keys[::-1], 1)
    assert splits(keys, 1) != splits(keys, 2)


def test_what_is_not_used_has_no_share_but_guards():
    # 0 is a test clip that is not used; 1 is cut from the same recording; 2 to 11 are not used.
    groups = [0, 0, *range(2, 22)]
    sources, official = [0] + [1] * 21, ["test"] + [None] * 21
    usable = [False, True] + [False] * 10 + [True] * 10
    splits, _ = decide_splits(
        groups, sources, official, usable, list(map(str, range(22))), (0.8, 0.1, 0.1), 0
    )
    assert splits[1] == "test"
    assert splits[2:12] == [None] * 10
    assert Counter(splits[12:]) == {"train": 8, "val": 1, "test": 1}


def test_a_single_source_clip_is_in_train():
    splits, _ = decide_splits([0], [0], [None], [True], ["a"], (0.1, 0.1, 0.8), 0)
    assert splits == ["train"]
