"""The measure of text-following: what it must see, what it must not mind, and how scores are counted."""

from __future__ import annotations

import ast
import csv
import json
import shutil
from collections import Counter, defaultdict
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from scamo.errors import ScaMoError
from scamo.evaluation import text_following
from scamo.evaluation.ceilings import corpus_ceiling, corpus_motions, through_features
from scamo.evaluation.text_following import (
    LABELS,
    Labels,
    default_prompts,
    evaluate,
    follows,
    load_prompts,
    measure,
    permutation_chance,
    physics,
    wilson,
)
from scamo.motion.skeleton import mirror_joints
from scamo.motion.synthetic import COMBINATIONS, Spec, caption, generate_clip, generate_corpus
from scamo.motion.synthetic.corpus import draw_spec

OPPOSITE = {"left": "right", "right": "left"}
REPEATED = ("jump", "squat", "bow", "punch", "kick")


def clip(*, seed: int = 0, **slots: str) -> np.ndarray:
    return generate_clip(Spec(**slots), np.random.default_rng(seed))


@pytest.fixture(scope="module")
def corpus():
    return list(generate_corpus(400, seed=21, sequences=0.0))


@pytest.fixture(scope="module")
def prompts():
    return load_prompts()


def resample(joints: np.ndarray, rate: float) -> np.ndarray:
    """The same motion played `rate` times as fast."""
    at = np.arange(0, len(joints) - 1, rate)
    low = at.astype(int)
    share = (at - low)[:, None, None]
    return (1 - share) * joints[low] + share * joints[low + 1]


def test_measure_does_not_know_the_generator():
    tree = ast.parse(Path(text_following.__file__).read_text(encoding="utf-8"))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    assert {name for name in imported if name and name.startswith("scamo")} == {
        "scamo.errors",
        "scamo.motion.measures",
        "scamo.motion.skeleton",
    }


def test_every_combination_is_measured_as_it_is_made():
    wrong = []
    for specs in COMBINATIONS.values():
        for spec in specs:
            for seed in range(5):
                joints = generate_clip(spec, np.random.default_rng((seed, 77)))
                if not follows(joints, spec.to_list()):
                    wrong.append((spec.to_list(), asdict(measure(joints))))
    assert len(wrong) <= 2, wrong  # of 405: 99.5%


@pytest.mark.parametrize(
    ("transform", "stride"), [(None, 4), (through_features, 2)], ids=["joints", "features"]
)
def test_ceiling(prompts, transform, stride):
    chosen = replace(prompts, prompts=prompts.prompts[::stride])
    report = corpus_ceiling(chosen, transform=transform, seed=1, permutations=20)
    assert report["exact"] >= 0.99
    for group in report["groups"].values():
        assert group["exact"] >= 0.985
    assert report["failures"] == {"empty": 0, "not_finite": 0, "short": 0}
    assert report["physics"]["bone_drift"] < 1e-5
    assert report["physics"]["foot_skate"] < 0.03


def test_labels_do_not_mind_place_heading_or_size(corpus):
    rng = np.random.default_rng(0)
    for one in corpus[:150]:
        turn = rng.uniform(0, 2 * np.pi)
        c, s = np.cos(turn), np.sin(turn)
        joints = one.joints.astype(np.float64) @ np.array([[c, 0, -s], [0, 1, 0], [s, 0, c]])
        joints = rng.uniform(0.5, 2) * (joints + rng.uniform(-5, 5, 3))
        assert measure(joints) == measure(one.joints)


def test_mirror_flips_side_and_turn(corpus):
    for one in corpus:
        labels = measure(one.joints)
        mirrored = {
            name: OPPOSITE.get(value, value) if name in ("side", "turn", "direction") else value
            for name, value in asdict(labels).items()
        }
        assert asdict(measure(mirror_joints(one.joints))) == mirrored, one.spec


def test_reversed_time_flips_forward_and_back(corpus):
    flips = {"forward": "back", "back": "forward", "left": "right", "right": "left"}
    seen = Counter()
    for one in corpus:
        if one.spec.action in ("walk", "run"):
            labels = measure(one.joints[::-1])
            assert labels.action == one.spec.action
            assert labels.direction == flips[one.spec.direction]
            if one.spec.turn:
                assert labels.turn == OPPOSITE[one.spec.turn]
            seen[one.spec.direction] += 1
    assert len(seen) == 4


def test_rate_changes_speed():
    for seed in range(10):
        walk = clip(action="walk", direction="forward", speed="normal", seed=seed)
        assert measure(resample(walk, 2)).speed == "fast"
        assert measure(resample(walk, 0.5)).speed == "slow"
        run = clip(action="run", direction="forward", speed="fast", seed=seed)
        assert measure(resample(run, 0.5)).speed in ("slow", "normal")


@pytest.mark.parametrize("action", REPEATED)
def test_cutting_a_repetition_lowers_the_count_by_one(action):
    for spec in [spec for spec in COMBINATIONS[action] if spec.count == "3"]:
        joints = generate_clip(spec, np.random.default_rng(8))
        counts = []
        for end in range(len(joints), 10, -1):
            labels = measure(joints[:end])
            if labels.action == action and (not counts or counts[-1] != labels.count):
                counts.append(labels.count)
        assert counts == ["3", "2", "1"]


def test_frozen_pose_stands(corpus):
    for action in ("stand", "walk", "squat", "wave", "turn"):
        joints = next(one.joints for one in corpus if one.spec.action == action and len(one.joints))
        if action == "walk":
            joints = clip(action="stand")
        assert measure(np.repeat(joints[:1], 60, axis=0)) == Labels("stand")
    # Half a second of a walk, held: no longer a walk.
    walk = clip(action="walk", direction="forward", speed="normal")
    assert measure(np.repeat(walk[30:31], 60, axis=0)).action == "stand"


def test_wrong_motion_is_wrong():
    wave = clip(action="wave", side="left")
    assert follows(wave, [{"action": "wave", "side": "left"}])
    assert follows(wave, [{"action": "wave"}])
    assert not follows(wave, [{"action": "wave", "side": "right"}])
    assert not follows(wave, [{"action": "raise", "side": "left"}])


def test_sequence_needs_both_in_order():
    bow, jump = {"action": "bow"}, {"action": "jump", "count": "2"}
    both = generate_clip(Spec("bow", count="1", then=Spec("jump", count="2")), np.random.default_rng(1))
    assert follows(both, [bow, jump])
    assert not follows(both, [jump, bow])
    assert not follows(both, [bow, {"action": "jump", "count": "3"}])
    assert not follows(clip(action="bow", count="1"), [bow, jump])
    assert not follows(clip(action="jump", count="2"), [bow, jump])


def test_measure_is_total():
    rng = np.random.default_rng(0)
    inputs = [np.zeros((n, 22, 3)) for n in (0, 1, 2, 3, 4, 50)]
    inputs += [
        rng.standard_normal((n, 22, 3)) * scale for n in (4, 5, 9, 40, 196) for scale in (1e-9, 1, 1e9)
    ]
    inputs += [np.cumsum(rng.standard_normal((80, 22, 3)), axis=0), np.full((30, 22, 3), 1e30)]
    inputs += [np.float16(rng.standard_normal((40, 22, 3))), rng.integers(-3, 3, (40, 22, 3))]
    for joints in inputs:
        labels = asdict(measure(joints))
        assert set(labels) == set(LABELS)
        assert all(value in LABELS[slot] for slot, value in labels.items())
    broken = clip(action="walk", direction="forward", speed="normal")
    broken[7, 3, 1] = np.nan
    assert measure(broken) == Labels()
    with pytest.raises(ScaMoError, match=r"expected shape \(T, 22, 3\), got \(10, 21, 3\)"):
        measure(np.zeros((10, 21, 3)))


@pytest.mark.parametrize(("right", "n"), [(0, 10), (5, 10), (10, 10), (1, 400), (243, 260), (260, 260)])
def test_wilson_solves_its_equation(right, n):
    low, high = wilson(right, n)
    share, z = right / n, 1.959963984540054
    for bound in (low, high):
        assert (share - bound) ** 2 == pytest.approx(z * z * bound * (1 - bound) / n, abs=1e-12)
    assert 0 <= low <= share <= high <= 1
    assert wilson(0, 0) == (0.0, 1.0)


def test_permutation_chance_closed_forms():
    assert permutation_chance(np.ones((40, 40), bool)) == 1.0
    assert permutation_chance(np.zeros((40, 40), bool)) == 0.0
    # Fixed points of a permutation are Poisson(1): 97.5% have at most 3.
    assert permutation_chance(np.eye(200, dtype=bool)) == pytest.approx(3 / 200)
    # Half the specs fit all motions: any permutation has half right.
    table = np.zeros((40, 40), bool)
    table[:, :20] = True
    assert permutation_chance(table) == pytest.approx(0.5)
    assert permutation_chance(np.zeros((0, 0), bool)) == 0.0


def test_prompts_are_balanced(prompts):
    assert len(prompts) == 400
    assert len({prompt.text for prompt in prompts.prompts}) == 400
    groups = Counter(prompt.group for prompt in prompts.prompts)
    assert groups == {"wording": 260, "combination": 140}
    singles = [p.spec[0]["action"] for p in prompts.prompts if p.group == "wording" and len(p.spec) == 1]
    assert set(Counter(singles).values()) == {18}
    assert len(set(singles)) == 13


def test_prompts_are_never_training_captions(prompts):
    rng = np.random.default_rng(0)
    texts = {caption(draw_spec(rng, 0.15), rng)[0].text for _ in range(5000)}
    assert not texts & {prompt.text for prompt in prompts.prompts}


def test_changed_prompts_are_refused(tmp_path):
    for suffix in (".jsonl", ".json"):
        shutil.copy(default_prompts().with_suffix(suffix), tmp_path / f"set{suffix}")
    path = tmp_path / "set.jsonl"
    assert len(load_prompts(path)) == 400
    path.write_bytes(path.read_bytes().replace(b"walk", b"run ", 1))
    with pytest.raises(ScaMoError, match=r"set\.jsonl: SHA-256 is [0-9a-f]{64}, set\.json says"):
        load_prompts(path)
    path.with_suffix(".json").unlink()
    with pytest.raises(ScaMoError, match=r"set\.json: no such file"):
        load_prompts(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a", "spec": [{"action": "fly"}], "group": "wording"}', ":1: .* unknown slot or label"),
        ('{"text": "a", "spec": [{"side": "left"}], "group": "wording"}', ":1: .* has no action"),
        ('{"text": "a", "spec": [{"action": "sit"}], "group": "easy"}', ":1: expected a group"),
        ('{"text": "a", "spec": []}', ":1: not a prompt: KeyError"),
        ("{", ":1: not a prompt"),
    ],
)
def test_bad_prompt_lines_are_named(tmp_path, line, message):
    import hashlib

    path = tmp_path / "set.jsonl"
    path.write_text(line + "\n")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    path.with_suffix(".json").write_text(json.dumps({"sha256": digest, "constant": {}}))
    with pytest.raises(ScaMoError, match=message):
        load_prompts(path)


def test_report_counts_failures_and_chance(prompts):
    prompts = replace(prompts, prompts=prompts.prompts[::4])
    motions: list[np.ndarray | None] = list(corpus_motions(prompts, seed=2))
    nan = motions[3].copy()
    nan[5] = np.nan
    motions[0], motions[1], motions[2], motions[3] = None, motions[1][:0], motions[2][:19], nan
    report = evaluate(motions, prompts, permutations=50)
    assert report["failures"] == {"empty": 2, "not_finite": 1, "short": 1}
    assert not any(entry["exact"] for entry in report["prompts"][:4])
    assert report["correct"] == sum(entry["exact"] for entry in report["prompts"])
    assert report["correct"] >= 94
    assert report["n"] == sum(group["n"] for group in report["groups"].values()) == 100
    assert 0.01 < report["chance"] < 0.2
    assert report["chance"] >= max(report["chance_permuted"], report["chance_constant"])
    for slot in report["slots"].values():
        assert slot["low"] <= slot["exact"] <= slot["high"]
        assert slot["chance"] < 0.8
    json.dumps(report)
    with pytest.raises(ScaMoError, match="expected one per prompt, 100, got 3"):
        evaluate(motions[:3], prompts)
    with pytest.raises(ScaMoError, match=r"motions\[0\]: expected shape"):
        evaluate([np.zeros((30, 21, 3))] * 100, prompts)


def test_one_motion_for_every_prompt_is_chance(prompts):
    stand = clip(action="stand")
    report = evaluate([stand[:40]] * 400, prompts, permutations=20)
    assert report["groups"]["wording"]["correct"] == 18
    assert report["exact"] <= report["chance"]


def test_physics_sees_what_is_unphysical():
    walk = clip(action="walk", direction="forward", speed="normal").astype(np.float64)
    good = physics(walk)
    assert good["bone_drift"] < 1e-6
    assert good["foot_skate"] < 0.1
    stretched = walk.copy()
    stretched[len(walk) // 2 :] = walk[len(walk) // 2 :] * 1.1
    assert physics(stretched)["bone_drift"] == pytest.approx(0.05, abs=0.01)
    stand = clip(action="stand").astype(np.float64)
    sliding = stand + np.linspace(0, 1, len(stand))[:, None, None] * np.array([4.0, 0, 0])
    assert physics(stand)["foot_skate"] == 0.0
    assert physics(sliding)["foot_skate"] == 1.0
    # x = t^3 has the jerk 6.
    t = np.arange(50) / 20
    cubic = stand[:1] + t[:, None, None] ** 3 * np.array([1.0, 0, 0])
    assert physics(cubic)["jerk"] == pytest.approx(6.0, rel=1e-6)


def test_recordings_that_others_labelled(shared):
    """Bandai-Namco's motions (CC BY-NC, not part of the project): 90% or more per class and for sides."""
    folder = shared / "data" / "bandai"
    if not (folder / "motions.npz").is_file():
        pytest.skip("the recordings are absent")
    with np.load(folder / "motions.npz") as data:
        names, offsets, root, rest = data["names"], data["offsets"], data["root"], data["rel_1e4"]
    right: dict[str, list[bool]] = defaultdict(list)
    with open(folder / "labels.csv", encoding="utf-8", newline="") as file:
        for index, row in enumerate(csv.DictReader(file)):
            assert row["name"] == names[index]
            content = row["content"].split("-")
            wanted = {"dash": "run"}.get(content[0], content[0])
            if wanted not in ("walk", "run", "wave", "raise", "bow"):
                continue
            rows = slice(offsets[index], offsets[index + 1])
            base = root[rows][:, None].astype(np.float64)
            labels = measure(np.concatenate((base, base + rest[rows] / 1e4), axis=1))
            right[wanted].append(labels.action == wanted)
            side = (["", "", *content])[-1 if wanted == "walk" else -2]
            if len(content) > 2 and side in ("left", "right", "both") and labels.action == wanted:
                kind = "turn" if wanted == "walk" else "side"
                right[kind].append(getattr(labels, kind) == side)
    shares = {name: round(float(np.mean(values)), 4) for name, values in right.items()}
    counts = {name: len(values) for name, values in right.items()}
    print(shares, counts)
    assert set(shares) == {"walk", "run", "wave", "raise", "bow", "turn", "side"}
    assert all(share >= 0.9 for share in shares.values()), shares
