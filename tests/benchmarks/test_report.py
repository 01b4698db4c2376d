"""Tables, plots and comparisons of a file that a real benchmark run wrote."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import report

SCRIPT = Path(report.__file__)


def entry(data, name):
    return next(entry for entry in data["benchmarks"] if entry["name"] == name)


def cells(table, name):
    (line,) = (line for line in table.splitlines() if f"| {name} |" in line)
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_of_a_real_file(tiny):
    table = report.table([report.load(tiny)])
    data = json.loads(tiny.read_text())
    mine, other = (entry(data, name)["stats"]["median"] for name in ("torch", "twice"))
    assert table.startswith("| op, shape | implementation | time | floor |")
    row = cells(table, "twice")
    assert row[0] == "sum-N4096"
    assert row[2] == report.time_text(other)
    assert row[3].endswith("(memory)")
    assert row[-1] == f"{other / mine:.2f}×"
    assert cells(table, "torch")[-1] == "–"
    # Alone in its group, and never checked: times, but nothing is said to be faster.
    assert cells(table, "peer")[-1] == "–"
    assert cells(table, "test_unchecked")[3:] == ["–"] * 6
    assert "- absent: not installed (1: " in table
    assert "wrong is not timed" in table
    assert "Measured on: cpu, 1 threads." in table


@pytest.mark.parametrize("name", ["torch", "twice"])
def test_no_speed_up_without_a_match(changed, name):
    path = changed(lambda data: entry(data, name)["extra_info"].update(matched=False))
    assert cells(report.table([report.load(path)]), "twice")[-1] == "–"


def test_no_speed_up_across_runs(changed):
    path = changed(lambda data: entry(data, "twice")["extra_info"].update(run="another"))
    assert cells(report.table([report.load(path)]), "twice")[-1] == "–"


def test_no_speed_up_without_a_record_of_the_run(changed):
    def forget(data):
        for one in data["benchmarks"]:
            one["extra_info"].pop("run", None)

    assert cells(report.table([report.load(changed(forget))]), "twice")[-1] == "–"


def test_triton_is_ours_before_torch(changed):
    def rename(data):
        entry(data, "twice")["name"] = "triton"

    table = report.table([report.load(changed(rename))])
    assert cells(table, "triton")[-1] == "–"
    assert cells(table, "torch")[-1].endswith("×")


def test_graphs_compare_with_graphs(changed):
    def edit(data):
        copies = [json.loads(json.dumps(entry(data, name))) for name in ("torch", "twice")]
        for copy, seconds in zip(copies, (1.0, 3.0), strict=True):
            copy["name"] += ", graph"
            copy["stats"]["median"] = seconds
            copy["extra_info"]["graph"] = True
        data["benchmarks"] += copies

    table = report.table([report.load(changed(edit))])
    assert cells(table, "torch, graph")[-1] == "–"
    assert cells(table, "twice, graph")[-1] == "3.00×"
    assert cells(table, "twice")[-1] not in ("–", "3.00×")


def test_calls_of_a_round_are_divided_out(changed, tiny):
    path = changed(lambda data: entry(data, "torch")["extra_info"].update(calls_per_round=4))
    before, after = (
        next(row.seconds for row in report.load(file).rows if row.name == "torch") for file in (tiny, path)
    )
    assert after == pytest.approx(before / 4)


def test_gpu_columns(changed):
    fields = {
        "floor_us": 30.0,
        "floor_bound": "matmul",
        "calls_per_round": 20,
        "launches": 3,
        "peak_extra_bytes": 5_000_000,
        "minimum_bytes": 4_000_000_000,
        "copy_GB/s": 4000.0,
    }

    def edit(data):
        one = entry(data, "torch")
        one["stats"]["median"] = 20 * 2e-3
        one["extra_info"].update(fields)

    row = cells(report.table([report.load(changed(edit))]), "torch")
    assert row[2:8] == ["2 ms", "30 µs (matmul)", "1.5%", "50%", "5 MB", "3"]


def test_the_plot_is_a_picture(tiny, tmp_path):
    output = tmp_path / "plot.png"
    assert report.main(["plot", str(tiny), "--output", str(output)]) == 0
    assert output.read_bytes().startswith(b"\x89PNG")


def test_nothing_to_plot_is_said(changed, tmp_path, capsys):
    path = changed(lambda data: data["benchmarks"].clear())
    assert report.main(["plot", str(path), "--output", str(tmp_path / "p.png")]) == 2
    assert "nothing to draw" in capsys.readouterr().err


def slower(factor):
    def edit(data):
        for one in data["benchmarks"]:
            if one["name"] == "torch":
                one["stats"]["median"] *= factor

    return edit


@pytest.mark.parametrize(
    ("factor", "threshold", "status"), [(1.0, 5, 0), (1.04, 5, 0), (1.06, 5, 1), (1.06, 10, 0), (0.5, 5, 0)]
)
def test_compare(changed, tiny, capsys, factor, threshold, status):
    path = changed(slower(factor))
    assert report.main(["compare", str(tiny), str(path), "--threshold", str(threshold)]) == status
    out = capsys.readouterr().out
    assert f"{status} of 4 regressed by more than {threshold}%" in out
    assert ("REGRESSION  sum-N4096 / torch" in out) == bool(status)
    assert ("faster      sum-N4096 / torch" in out) == (factor < 0.9)


def test_compare_names_what_is_new_and_gone(changed, tiny, capsys):
    path = changed(lambda data: entry(data, "peer").update(name="other"))
    assert report.main(["compare", str(tiny), str(path)]) == 0
    out = capsys.readouterr().out
    assert "new         alone / other" in out
    assert "gone        alone / peer" in out


def test_two_devices_do_not_compare(changed, tiny, capsys):
    path = changed(lambda data: entry(data, "torch")["extra_info"].update(device="NVIDIA H200"))
    assert report.main(["compare", str(tiny), str(path)]) == 2
    assert "extra_info.device of sum-N4096 / torch: 'NVIDIA H200'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d.pop("benchmarks"), "benchmarks: missing"),
        (lambda d: d.update(benchmarks={}), "benchmarks: expected type list"),
        (lambda d: d["benchmarks"][0].pop("stats"), "benchmarks[0].stats: missing"),
        (lambda d: d["benchmarks"][1]["stats"].pop("median"), "benchmarks[1].stats.median: missing"),
        (lambda d: d["benchmarks"][0]["stats"].update(median="1"), "[0].stats.median: expected a number"),
        (lambda d: d["benchmarks"][0]["stats"].update(median=0), "[0].stats.median: expected a positive"),
        (
            lambda d: d["benchmarks"][0]["stats"].update(median=float("nan")),
            "[0].stats.median: expected a number",
        ),
        (
            lambda d: d["benchmarks"][0]["extra_info"].update(calls_per_round=0),
            "[0].extra_info.calls_per_round: expected a positive",
        ),
        (
            lambda d: d["benchmarks"][0]["extra_info"].update(floor_us="low"),
            "[0].extra_info.floor_us: expected a number",
        ),
        (lambda d: d.update(not_timed=[{"test": "t"}]), "not_timed[0].reason: missing"),
    ],
)
def test_a_wrong_field_is_named(changed, capsys, edit, message):
    path = changed(edit)
    assert report.main(["table", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"{path}: ")
    assert message in error


@pytest.mark.parametrize(
    ("content", "message"), [(None, "No such file"), ("{", "no JSON"), ("[1]", "benchmarks")]
)
def test_a_wrong_file_is_named(tmp_path, capsys, content, message):
    path = tmp_path / "broken.json"
    if content is not None:
        path.write_text(content)
    assert report.main(["table", str(path)]) == 2
    error = capsys.readouterr().err
    assert str(path) in error
    assert message in error


def test_the_script(tiny, tmp_path):
    output = tmp_path / "table.md"
    command = [sys.executable, str(SCRIPT), "table", str(tiny), "--output", str(output)]
    subprocess.run(command, check=True, cwd=tmp_path, timeout=60)
    assert output.read_text() == report.table([report.load(tiny)])


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """The gate's records of one real kernel, compiled for sm_90."""
    pytest.importorskip("triton")
    path = tmp_path_factory.mktemp("gate") / "records.jsonl"
    child = """
import importlib.util, json, os, sys
spec = importlib.util.spec_from_file_location("test_compile", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
cases = module.fsq_cases([8, 5, 5], ["bf16"], [90])[:1]
module.gate(cases, lambda **changes: os.environ | changes)
"""
    root = SCRIPT.parents[1]
    paths = os.pathsep.join([str(root / "kernels"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"SCAMO_GATE_RECORDS": str(path), "PYTHONPATH": paths}
    for variable in ("TRITON_INTERPRET", "SCAMO_GATE_TRITON"):
        environment.pop(variable, None)
    command = [sys.executable, "-c", child, str(root / "tests" / "kernels" / "test_compile.py")]
    subprocess.run(command, check=True, env=environment, timeout=120)
    return path


def test_the_gate_s_table(records, tmp_path):
    output = tmp_path / "gate.md"
    assert report.main(["gate", str(records), "--output", str(output)]) == 0
    record = json.loads(records.read_text())
    (line,) = (line for line in output.read_text().splitlines() if line.startswith("| fsq."))
    row = [cell.strip() for cell in line.strip("|").split("|")]
    result = record["result"]
    assert row[1] == "bf16"
    assert "D=3" in row[2]
    assert row[3:5] == ["90", str(record["case"]["warps"])]
    assert row[6:9] == [importlib.metadata.version("triton"), str(result["registers"]), "0"]
    assert row[12] == f"{result['wide_loads']} of {result['loads']}"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda r: r.pop("case"), "line 1.case: missing"),
        (lambda r: r["result"].pop("registers"), "line 1.result.registers: missing"),
        (lambda r: r["case"].update(warps="4"), "line 1.case.warps: expected type int"),
        (lambda r: r["case"].update(arch=70), "line 1.case.arch: 70 is unknown"),
    ],
)
def test_a_wrong_record_is_named(records, tmp_path, capsys, edit, message):
    record = json.loads(records.read_text())
    edit(record)
    path = tmp_path / "wrong.jsonl"
    path.write_text(json.dumps(record) + "\n")
    assert report.main(["gate", str(path)]) == 2
    assert f"{path}: {message}" in capsys.readouterr().err
    path.write_text("")
    assert report.main(["gate", str(path)]) == 2
    assert "no records" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("registers", "warps", "shared", "arch", "blocks"),
    [
        (222, 8, 0, 90, 1),
        (154, 4, 0, 90, 3),
        (128, 4, 0, 90, 4),
        (32, 4, 0, 90, 16),
        (32, 4, 100 * 1024, 90, 2),
        (32, 4, 100 * 1024, 80, 1),
        (255, 8, 0, 80, 1),
        (16, 1, 0, 90, 32),
    ],
)
def test_blocks_per_multiprocessor(registers, warps, shared, arch, blocks):
    assert report.blocks_per_multiprocessor(registers, warps, shared, arch) == blocks


@pytest.mark.parametrize(("columns", "blocks"), [(0, 4), (128, 4), (256, 2), (512, 1)])
def test_tensor_memory_bounds_the_blocks_too(columns, blocks):
    assert report.blocks_per_multiprocessor(128, 4, 0, 100, columns) == blocks
