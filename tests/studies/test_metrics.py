"""Runs of a grid are measured on the same captions, and metrics are ranked against L_u."""

import json

import numpy as np
import pytest
import torch

from scamo.config import DataConfig, ModelConfig, RunConfig, to_dict
from scamo.errors import ScaMoError
from scamo.generation.export import export_model
from scamo.models.prefix_lm import PrefixLM
from scamo.scaling.points import OVERFITTED
from scamo.studies.metrics import correlation, rank_correlation, run_metrics_study, selections

TEXT_WIDTH = 16


@pytest.fixture
def grid(studied, tmp_path):
    """Adds runs as `scamo scaling run` leaves them, of models that were not trained."""

    def add(name, l_u, *, seed=0, finished=True, dataset="d"):
        run = tmp_path / "grid" / "runs" / name
        run.mkdir(parents=True)
        model = ModelConfig(
            size="", layers=1, heads=2, width=16, codes=25, text_width=TEXT_WIDTH, max_text=60, max_motion=8
        )
        torch.manual_seed(seed)
        encoder = str(studied / "encoder")
        export_model(run / "export", PrefixLM(model).state_dict(), model, studied / "fsq", encoder)
        config = to_dict(RunConfig(DataConfig(dataset=str(studied / "corpus")), model=model))
        config["training"] |= {"steps": len(l_u), "seed": seed}
        config["fingerprint"] = {"dataset": dataset, "tokens": "t", "text": "t"}
        (run / "config.json").write_text(json.dumps(config))
        spent = {"loss": 1.0, "motion_tokens": 10, "positions": 20, "flops": 1e6}
        lines = [{"kind": "start", "step": 0}]
        for step, value in enumerate(l_u[: None if finished else -1], 1):
            lines.append({"kind": "train", "step": step, **spent})
            lines.append({"kind": "val", "step": step, "l_u": value, "loss": 3 + value})
        (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return run

    add.folder = tmp_path / "grid"
    return add


def test_finished_runs_are_measured_once_and_ranked(grid, studied, capsys):
    first = grid("small", [-0.1, -0.2], seed=1)
    grid("large", [-0.3, -0.3 + 2 * OVERFITTED], seed=2)
    grid("stopped", [-0.1, -0.2, -0.3], finished=False)
    options = {"pool": 4, "text_following": False, "draws": 20}
    evaluator = studied / "evaluator"
    assert run_metrics_study(grid.folder, evaluator, **options, dry_run=True) == []
    assert not (grid.folder / "metrics").exists()
    assert run_metrics_study(grid.folder, evaluator, **options) == []
    said = capsys.readouterr().out
    assert "stopped at step 2" in said
    out = grid.folder / "metrics"
    large, small = map(json.loads, (out / "results.jsonl").open())
    assert (small["cell"], small["l_u"], small["l_u_last"], small["overfitted"]) == (
        "small",
        -0.2,
        -0.2,
        False,
    )
    assert (large["l_u"], large["overfitted"]) == (-0.3, True)
    assert small["real"] == large["real"], "the same captions"
    assert small["fid"] != large["fid"], "of different models"
    assert (small["n_v"], small["flops"]) == (25 * 16, 2e6)
    page = (out / "report.html").read_text()
    assert page.count("<table>") == 2
    assert "data:image/png" in page
    # A run that came later is measured, the others are not met again.
    ledger = first / "evaluation" / "test_split.jsonl"
    before = ledger.read_bytes()
    grid("later", [-0.2, -0.3], seed=3)
    assert run_metrics_study(grid.folder, evaluator, **options, progress=False) == []
    names = [json.loads(line)["cell"] for line in (out / "results.jsonl").open()]
    assert names == ["large", "later", "small"]
    assert ledger.read_bytes() == before
    with pytest.raises(ScaMoError, match="holds a study with other evaluation"):
        run_metrics_study(grid.folder, evaluator, **options | {"temperature": 0.5})


def test_text_following_is_measured_and_a_run_without_a_model_fails_alone(grid, studied, capsys):
    grid("fine", [-0.1, -0.2])
    broken = grid("broken", [-0.1, -0.2])
    (broken / "export" / "model.safetensors").write_bytes(b"")
    out = grid.folder / "elsewhere"
    assert run_metrics_study(grid.folder, studied / "evaluator", out=out, pool=4, progress=False) == [
        "broken"
    ]
    assert "model.safetensors" in capsys.readouterr().err
    (found,) = map(json.loads, (out / "results.jsonl").open())
    report = json.loads((out / "work" / "fine" / "text_following.json").read_text())
    assert found["text_following"] == report["exact"]
    assert found["text_following_wording"] == report["groups"]["wording"]["exact"]
    assert "broken: could not be measured" in (out / "table.md").read_text()


def test_runs_that_cannot_be_compared_are_refused(grid, studied):
    grid("a", [-0.1, -0.2])
    with pytest.raises(ScaMoError, match="24 items in the test split, a pool needs 32"):
        run_metrics_study(grid.folder, studied / "evaluator")
    grid("b", [-0.1, -0.2], dataset="e")
    with pytest.raises(ScaMoError, match="of different datasets"):
        run_metrics_study(grid.folder, studied / "evaluator", pool=4)


def made_up(n=12, *, wrong=(), seeds=1):
    """Runs whose R@1 rises and FID falls as L_u falls, but for those in `wrong`, which overfitted."""
    results = []
    for k in range(n):
        for seed in range(seeds):
            quality = -k if k in wrong else k
            results.append(
                {
                    "codes": (240, 1000)[k % 2], "size": f"{k}", "steps": 10, "seed": seed,
                    "l_u": -5.0 - k, "l_u_last": -5.0 - k, "overfitted": k in wrong,
                    "fid": float(np.exp(-quality)), "r_precision_1": float(np.tanh(quality / 9)),
                    "diversity": 9 + (1 if seed else -1) * np.exp(-quality), "real": {"diversity": 9.0},
                }
            )  # fmt: skip
    return results


def test_one_is_agreement_whichever_way_a_metric_is_better():
    for metric in ("fid", "r_precision_1", "diversity"):
        found = correlation(made_up(seeds=2), metric, draws=50)
        assert (found["n"], found["configurations"]) == (24, 12)
        assert found["value"] == pytest.approx(1, abs=1e-6)
        assert found["low"] == pytest.approx(1, abs=1e-6)


def test_overfitted_runs_can_turn_it_and_are_left_out_apart():
    results = made_up(wrong=(8, 9, 10, 11))
    parts = selections(results)
    assert {name: len(part) for name, part in parts.items()} == {
        "all": 12,
        "240 codes": 6,
        "1,000 codes": 6,
        "all, none overfitted": 8,
        "240 codes, none overfitted": 4,
        "1,000 codes, none overfitted": 4,
    }
    everything, without = (correlation(parts[name], "fid") for name in ("all", "all, none overfitted"))
    assert everything["value"] < 0 < without["value"]
    assert everything["low"] < everything["value"] < everything["high"]
    assert set(selections([r for r in results if r["codes"] == 240 and not r["overfitted"]])) == {"all"}


def test_seeds_are_no_configurations_of_their_own():
    few = correlation(made_up(3, seeds=5), "fid")
    assert (few["n"], few["configurations"]) == (15, 3)
    assert few["value"] == pytest.approx(1, abs=1e-6)
    assert few["low"] is None


def test_ranks_share_ties_and_constants_say_nothing():
    # Ranks 1, 2.5, 2.5, 4 against 1 ... 4.
    assert rank_correlation(np.array([1.0, 5, 5, 9]), np.array([1.0, 2, 3, 4])) == pytest.approx(0.9486833)
    for x in ([1.0, 1, 1], [1.0, np.nan, 2], [1.0, 2]):
        assert np.isnan(rank_correlation(np.array(x), np.arange(len(x), dtype=float)))
