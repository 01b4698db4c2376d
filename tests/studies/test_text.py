"""The text study through the real trainer and evaluation, its fairness, and its statistics."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from scamo.config import load_config
from scamo.data.batches import BatchPlan
from scamo.data.dataset import MotionDataset
from scamo.errors import ScaMoError
from scamo.evaluation.protocol import Settings
from scamo.studies.text import KINDS, TextConfig, paired, plan_cells, report, run_text_study
from scamo.training.logging import read_log

STEPS = 3


@pytest.fixture(scope="module")
def study(studied):
    path = studied / "study.toml"
    path.write_text(
        f"""
        dataset = "{studied / "corpus"}"
        tokenizer = "{studied / "fsq"}"
        evaluator = "{studied / "evaluator"}"
        out = "{studied / "out"}"
        seeds = [3]
        pool = 4
        text_following = false
        [model]
        size = ""
        layers = 2
        heads = 2
        width = 16
        max_text = 60
        [training]
        steps = {STEPS}
        micro_batch_tokens = 512
        validate_every = 2
        save_every = 2
        drop_text = 0.2
        """
    )
    return path


def test_cells_differ_in_text_and_prefix_and_see_the_same_motion(study):
    seeds = ("seeds=[3, 4]", "training.steps=40")
    planned = plan_cells(load_config(TextConfig, study, seeds), progress=False)
    assert len(planned) == 6
    assert len({run.name for run in planned}) == 6
    for run in planned:
        model = run.config.model
        assert (model.text, model.prefix) == KINDS[run.kind]
        assert run.config.training.steps == 40
        words = next(other for other in planned if other.config.training.seed == run.config.training.seed)
        assert run.motion_tokens == pytest.approx(words.motion_tokens, rel=0.03)
        assert run.epochs == pytest.approx(words.epochs, rel=0.03)
    # Nothing but what a cell is about, and the positions that a sentence spares.
    assert planned[0].positions == planned[1].positions > 1.2 * planned[2].positions
    batches = [run.config.training.micro_batch_tokens for run in planned]
    assert batches[0] == batches[1] == 512 > batches[2]


def test_a_study_is_trained_measured_reported_and_not_made_twice(study, studied, capsys):
    out = studied / "out"
    assert run_text_study(study, dry_run=True) == []
    assert not out.exists()
    assert run_text_study(study, progress=False) == []
    results = {line["cell"]: line for line in map(json.loads, (out / "results.jsonl").open())}
    assert list(results) == [f"{kind}-s3" for kind in KINDS]
    for name, result in results.items():
        run = out / "work" / name / "run"
        losses = [record["l_u"] for record in read_log(run / "log.jsonl", "val")]
        assert (result["l_u"], result["l_u_last"]) == (min(losses), losses[-1])
        assert 0 <= result["r_precision_1"] <= result["r_precision_3"] <= 1
        assert result["real"] == results["sentence-s3"]["real"]
        assert result["fid"] > 0
    both, causal = results["words-bidirectional-s3"], results["words-causal-s3"]
    assert both["motion_tokens"] == causal["motion_tokens"]
    assert both["l_u"] != causal["l_u"]
    # The trainer counts p^2 pairs of a prefix of p in one cell, p (p + 1) / 2 in the other.
    data = MotionDataset.open(studied / "corpus")
    (run, *_) = plan_cells(load_config(TextConfig, study), progress=False)
    text = data.text_states()
    plan = BatchPlan.of(data, "train", data.tokens(), text, run.config.model, run.config.training)
    draws = [draw for step in range(STEPS) for batch in plan.step(step) for draw in batch]
    prefixes = np.array([text.lengths[draw.caption] if draw.caption >= 0 else 1 for draw in draws])
    spared = 12 * 2 * 16 * int((prefixes**2 - prefixes * (prefixes + 1) // 2).sum())
    assert spared > 0
    assert both["flops"] - causal["flops"] == spared
    page = (out / "report.html").read_text()
    assert "the same function, bit for bit" in page
    assert page.count("<table>") == 2
    assert "data:image/png" in page
    assert "http" not in page

    # Stopped after the training and the evaluation of a cell: neither is made again.
    (out / "cells" / "sentence-s3.json").unlink()
    work = out / "work" / "sentence-s3"
    kept = [work / "run" / "log.jsonl", work / "run" / "evaluation" / "test_split.jsonl"]
    before = [path.read_bytes() for path in kept]
    capsys.readouterr()
    assert run_text_study(study) == []
    assert [path.read_bytes() for path in kept] == before
    assert json.loads((out / "cells" / "sentence-s3.json").read_text()) == results["sentence-s3"]
    assert "| sentence | 1 |" in capsys.readouterr().out
    with pytest.raises(ScaMoError, match="holds a study with other temperature"):
        run_text_study(study, overrides=("temperature=0.5",), progress=False)


def test_differences_are_paired_by_seed():
    results = [
        {"kind": kind, "seed": seed, "fid": value}
        for kind, values in (("words-causal", (10, 20, 30, 7)), ("sentence", (9, 18, 27)))
        for seed, value in enumerate(values)
    ]
    found = paired(results, "fid", "words-causal", "sentence")
    # Differences 1, 2, 3: t(0.975, 2) = 4.3027, standard error 1 / sqrt(3).
    assert found["n"] == 3
    assert found["difference"] == 2
    assert found["high"] - 2 == pytest.approx(4.30265 / math.sqrt(3), rel=1e-5)
    assert found["low"] - 2 == pytest.approx(-4.30265 / math.sqrt(3), rel=1e-5)
    one = [result for result in results if result["seed"] == 1]
    assert paired(one, "fid", "words-causal", "sentence") == {
        "n": 1, "difference": 2, "low": None, "high": None,
    }  # fmt: skip
    assert paired(results, "fid", "words-causal", "words-bidirectional")["difference"] is None


def test_the_report_says_what_is_missing(study):
    planned = plan_cells(load_config(TextConfig, study), progress=False)
    results = [
        {"kind": kind, "seed": seed, "fid": value + seed, "real": {"fid": 0.0}}
        for kind, value in (("words-bidirectional", 1.0), ("words-causal", 3.5))
        for seed in (0, 1)
    ]
    text = report(results, Settings(), planned, ["sentence-s3"])
    assert "| words-bidirectional | 2 | 1.500 ± 0.707 |" in text
    assert "| sentence | 0 | – |" in text
    assert "| bidirectional prefix, of word states | 2 | -2.500 (-2.500 to -2.500) |" in text
    assert "| word states, causal prefix | 0 | – |" in text
    assert "sentence-s3: failed" in text


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seeds=[]", "expected at least one, each once"),
        ("seeds=[1, 1]", "expected at least one, each once"),
        ("ranks=0", "ranks = 0"),
        ("model.layers=1", "layers = 1: a prefix acts through the layers after the first"),
        ("protocol=loose", "protocol 'loose'"),
        ("pool=30", "24 items in the test split, a pool needs 30"),
        ("evaluator=nowhere", "nowhere"),
        ("model.prefix=both", "prefix = 'both'"),
        ("training.micro_batch_tokens=10", "micro_batch_tokens = 10"),
    ],
)
def test_a_bad_study_is_named(study, override, message):
    with pytest.raises(ScaMoError, match=message):
        run_text_study(study, overrides=(override,), dry_run=True, progress=False)


def test_the_shipped_study_is_read():
    root = Path(__file__).resolve().parents[2]
    assert load_config(TextConfig, root / "configs/study_text.toml").seeds == (0, 1, 2)
