"""Runs are read as train.py writes them; the points are those that the runs really passed."""

import json

import pytest

from scamo.config import ModelConfig
from scamo.errors import ScaMoError
from scamo.scaling import flops, points
from scamo.scaling.points import Point

SMALL = {"layers": 2, "width": 64, "codes": 240}


def falling(n_nv, n_v, tokens):
    return -tokens / 1e6


def point(compute, l_u, *, last=True, run="r"):
    return Point(run, "2x64", 240, 0, compute, 1e5, 1e4, 1e6, l_u, last)


def test_a_run_has_cumulative_counts_at_its_validations(write_run):
    folder = write_run("a", falling, flops=1e12, **SMALL)
    run = points.read_run(folder)
    model = ModelConfig(size="", layers=2, heads=4, width=64, codes=240, text_width=8)
    assert run.steps.tolist() == [10, 20, 30, 40]
    assert run.finished
    assert not run.overfitted
    assert run.flops == pytest.approx([0.25e12, 0.5e12, 0.75e12, 1e12])
    assert run.positions == pytest.approx(1.5 * run.tokens)
    assert run.l_u == pytest.approx(-run.tokens / 1e6)
    assert (run.n_nv("counted"), run.n_v("counted")) == (flops.block_parameters(model), 240 * 64)
    paper = 3 * (run.n_nv("paper") + run.n_v("paper")) * run.tokens
    assert run.compute("paper") == pytest.approx(paper)
    assert run.n_nv("paper") == 24 * 2 * 64**2 + 2 * 2 * 201 * 64
    assert run.n_v("paper") == 2 * 240 * 64
    assert run.size == "2x64"


def test_a_validation_between_two_log_lines_counts_its_part(write_run):
    folder = write_run("a", falling, flops=1e12, **SMALL)
    path = folder / "log.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    # Logged every 8 steps, validated every 10.
    merged, waiting = [], {"motion_tokens": 0.0, "positions": 0.0, "flops": 0.0}
    for line in lines:
        if line["kind"] != "train":
            merged.append(line)
            continue
        waiting = {key: waiting[key] + line[key] for key in waiting}
        if line["step"] % 8 == 0:
            merged.append(line | waiting)
            waiting = dict.fromkeys(waiting, 0.0)
    path.write_text("".join(json.dumps(line) + "\n" for line in merged))
    assert points.read_run(folder).flops == pytest.approx([0.25e12, 0.5e12, 0.75e12, 1e12])


def test_a_run_that_overfits_says_so(write_run):
    turned = write_run("a", lambda n, v, d: -1 + (d / 5e6 - 0.5) ** 2, flops=1e13, **SMALL)
    assert points.read_run(turned).overfitted


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda lines: [{**x, "flops": None} for x in lines], "'flops' is missing at step 1"),
        (
            lambda lines: [x for x in lines if x["kind"] != "val"],
            "no validation was logged",
        ),
        (lambda lines: [*lines, {"kind": "nan", "step": 40}], "diverged: a loss or gradient"),
        (
            lambda lines: [{**x, "loss": 9.0} if x["kind"] == "train" else x for x in lines],
            "diverged: its last training loss 9.00 is above that of guessing, 5.48",
        ),
        (
            lambda lines: [{**x, "l_u": float("nan")} if x["kind"] == "val" else x for x in lines],
            "l_u = nan at step 10",
        ),
        (lambda lines: [{"no": "kind"}, *lines], "not a log of train.py"),
    ],
)
def test_what_is_no_point_is_named_and_left_out_with_a_warning(write_run, tmp_path, spoil, message):
    write_run("a", falling, flops=1e12, **SMALL)
    path = write_run("b", falling, flops=1e12, **SMALL) / "log.jsonl"
    lines = spoil([json.loads(line) for line in path.read_text().splitlines()])
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ScaMoError, match=message):
        points.read_run(path.parent)
    runs, warnings = points.read_runs([tmp_path / "runs"])
    assert [run.name for run in runs] == ["a"]
    (warning,) = warnings
    assert warning.startswith("left out: ")
    assert str(path.parent) in warning


def test_a_config_without_a_field_is_named(write_run):
    folder = write_run("a", falling, flops=1e12, **SMALL)
    config = json.loads((folder / "config.json").read_text())
    del config["training"]["steps"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ScaMoError, match=r"config.json: the field 'steps' is missing"):
        points.read_run(folder)


def test_runs_of_different_tokenizers_or_datasets_are_not_mixed(write_run, tmp_path):
    write_run("a", falling, flops=1e12, **SMALL)
    write_run("b", falling, flops=1e12, layers=2, width=64, codes=512)
    points.read_runs([tmp_path / "runs"])
    other = write_run("c", falling, flops=1e12, fingerprint__tokens="x" * 64, **SMALL)
    with pytest.raises(ScaMoError, match="a and c have 240 codes of different tokenizers"):
        points.read_runs([tmp_path / "runs"])
    write_run("d", falling, flops=1e12, fingerprint__dataset="x" * 64, **SMALL)
    with pytest.raises(ScaMoError, match="c and d are of different datasets"):
        points.read_runs([other, tmp_path / "runs" / "d"])


def test_a_run_that_was_stopped_is_no_end_of_a_budget(write_run, tmp_path):
    folder = write_run("a", falling, flops=1e12, training__steps=80, **SMALL)
    runs, warnings = points.read_runs([folder])
    assert "stopped at step 40" in warnings[0]
    assert points.last_points(runs, "counted") == []
    assert len(points.curve(runs[0], "counted")) == 4


def test_folders_without_runs_are_named(tmp_path):
    with pytest.raises(ScaMoError, match="no run of train.py"):
        points.find_runs([tmp_path])
    with pytest.raises(ScaMoError, match="no such folder"):
        points.find_runs([tmp_path / "absent"])


def test_ends_close_together_are_one_budget():
    ends = [point(c, -1.0) for c in (1e12, 1.02e12, 3e12, 3.01e12, 9e12)]
    assert points.budgets_of(ends) == pytest.approx([1.01e12, 3.005e12, 9e12], rel=1e-3)


def test_the_lowest_of_a_budget_is_chosen_among_finished_runs():
    ends = [
        point(1e12, -1.0, run="a"),
        point(1.01e12, -1.2, run="b"),
        point(1e12, -9.0, run="cut", last=False),
        point(3e12, -1.5, run="c"),
    ]
    chosen = points.lowest_by_budget(ends, [1e12, 3e12, 9e12])
    assert [p.run for p in chosen] == ["b", "c"]


def test_the_envelope_holds_what_nothing_cheaper_reaches():
    cloud = [
        point(1e12, -1.0, run="a"),
        point(2e12, -0.9, run="worse"),
        point(4e12, -2.0, run="b"),
        point(4.1e12, -2.1, run="same bin"),
        point(9e12, -2.05, run="worse"),
    ]
    assert [p.run for p in points.envelope(cloud)] == ["a", "same bin"]
