"""The stages of `make gpu`, run on small real test and benchmark files: results, resuming, failures."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import gpu
import pytest
import report
import torch
from gpu import Stage

SCRIPT = Path(gpu.__file__)
SUITE = SCRIPT.parent

TESTS = """
import pytest


@pytest.mark.parametrize("i", [0, 1, 2])
def test_passes(i):
    pass
"""

BENCH = """
import pytest
import torch

x = torch.arange(256.0)


@pytest.mark.parametrize("name", ["torch", "twice", "absent"])
def test_sum(measure, name):
    if name == "absent":
        pytest.skip("absent: not installed")
    measure("sum", name, lambda: [x + x], [2 * x], x.dtype, 2 * x.nbytes)
"""


# Without torch and the suite's conftest, for the tests that need several processes.
PLAIN = """
import pytest


@pytest.mark.parametrize("i", [0, 1, 2])
def test_sum(benchmark, i):
    benchmark.pedantic(sum, ([i, 2],), rounds=3)
"""


@pytest.fixture
def stage(tmp_path):
    """stage(kind, source) -> a stage on a file with that source, and the folder of results."""

    def make(kind, source, name="tiny"):
        folder = tmp_path / name
        folder.mkdir()
        path = folder / {"tests": "test_tiny.py", "bench": "bench_tiny.py"}[kind]
        path.write_text(source)
        if "measure" in source:
            shutil.copy(SUITE / "conftest.py", folder)
        return Stage(f"{kind}-{name}", kind, path, marked=False), tmp_path / "out"

    return make


@pytest.fixture
def one_at_a_time(monkeypatch):
    """Each process stops after its first test; the list of the processes' exit statuses."""
    codes = []
    child = gpu._child

    def hurried(arguments, log, seconds):
        arguments = list(arguments)
        arguments[arguments.index("--pytest") + 3] = "0"
        codes.append(child(arguments, log, seconds))
        return codes[-1]

    monkeypatch.setattr(gpu, "_child", hurried)
    return codes


def result(out, stage):
    return json.loads((out / f"{stage.name}.json").read_text())


def test_a_stage_of_tests(stage):
    one, out = stage("tests", TESTS + "\n\ndef test_fails():\n    assert 1 == 2\n")
    record = gpu.run_stage(one, out)
    assert record["state"] == gpu.FAILED
    assert "assert 1 == 2" in record["output"]
    fields = result(out, one)
    assert fields["complete"]
    assert fields["tests"] == {"passed": 3, "failed": 1, "skipped": 0, "ended": 0}
    assert [test.split("::")[1] for test in fields["failed_tests"]] == ["test_fails"]


def test_a_stage_of_benchmarks(stage):
    one, out = stage("bench", BENCH)
    record = gpu.run_stage(one, out)
    assert record["state"] == gpu.DONE, record["output"]
    fields = result(out, one)
    assert [entry["name"] for entry in fields["benchmarks"]] == ["torch", "twice"]
    assert [entry["reason"] for entry in fields["not_timed"]] == ["absent: not installed"]
    assert gpu.is_complete(out, one.name)
    assert len(report.load(out / f"{one.name}.json").rows) == 2


@pytest.mark.parametrize("kind", ["tests", "bench"])
def test_a_stage_goes_on_where_its_time_ended(stage, one_at_a_time, kind):
    one, out = stage(kind, TESTS if kind == "tests" else PLAIN)
    record = gpu.run_stage(one, out)
    assert one_at_a_time == [2, 2, 0]
    assert record["state"] == gpu.DONE, record["output"]
    fields = result(out, one)
    assert fields["tests"]["passed"] == 3
    if kind == "bench":
        names = [entry["name"] for entry in fields["benchmarks"]]
        assert names == ["test_sum[0]", "test_sum[1]", "test_sum[2]"]


def test_no_time_leaves_the_stage_for_the_next_call(stage):
    one, out = stage("tests", TESTS)
    assert gpu.run_stage(one, out, seconds=gpu.LAST)["state"] == gpu.UNFINISHED
    assert not gpu.is_complete(out, one.name)
    assert gpu.run_stage(one, out)["state"] == gpu.DONE


def test_a_test_that_takes_the_process_with_it(stage):
    one, out = stage("tests", "import os\n\n\ndef test_a_dies():\n    os._exit(9)\n" + TESTS)
    record = gpu.run_stage(one, out)
    assert record["state"] == gpu.FAILED
    fields = result(out, one)
    assert fields["complete"]
    assert fields["tests"] == {"passed": 3, "failed": 0, "skipped": 0, "ended": 1}


def test_benchmarks_lost_with_the_process_run_again(stage):
    one, out = stage("bench", PLAIN + "\n\ndef test_z_dies(benchmark):\n    import os\n\n    os._exit(9)\n")
    assert gpu.run_stage(one, out)["state"] == gpu.FAILED
    fields = result(out, one)
    assert len(fields["benchmarks"]) == 3
    assert fields["tests"] == {"passed": 3, "failed": 0, "skipped": 0, "ended": 1}
    assert fields["complete"]


def test_a_test_that_never_ends(stage, monkeypatch):
    monkeypatch.setattr(gpu, "LAST", 3.0)
    source = "import time\n\n\ndef test_z_sleeps():\n    time.sleep(600)\n"
    one, out = stage("tests", TESTS + source)
    record = gpu.run_stage(one, out, seconds=10.0)
    assert record["seconds"] < 60
    assert record["state"] == gpu.FAILED
    assert "ended after" in record["output"]
    fields = result(out, one)
    assert not fields["complete"]
    assert fields["tests"] == {"passed": 3, "failed": 0, "skipped": 0, "ended": 1}


def test_a_broken_cuda_context_gets_a_new_process(stage):
    broken = """
STATE = []


def test_breaks():
    STATE.append(1)
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_needs_a_new_process():
    assert not STATE
"""
    one, out = stage("tests", broken)
    gpu.run_stage(one, out)
    assert result(out, one)["tests"] == {"passed": 1, "failed": 1, "skipped": 0, "ended": 0}


def test_a_file_that_cannot_be_collected_fails(stage):
    one, out = stage("tests", "import a_module_that_is_not_there\n")
    record = gpu.run_stage(one, out)
    assert record["state"] == gpu.FAILED
    assert "a_module_that_is_not_there" in record["output"]
    assert not gpu.is_complete(out, one.name)


def test_stages_run_once_and_failures_do_not_stop_the_others(stage, capsys):
    bad, out = stage("tests", "import a_module_that_is_not_there\n", "bad")
    good, _ = stage("tests", TESTS, "good")
    records = gpu.run_all([bad, good], out, minutes=None, again=False)
    assert {name: record["state"] for name, record in records.items()} == {
        "tests-bad": gpu.FAILED,
        "tests-good": gpu.DONE,
    }
    assert (
        "a_module_that_is_not_there" in json.loads((out / "stages.json").read_text())["tests-bad"]["output"]
    )
    capsys.readouterr()
    bad.path.write_text(TESTS)
    records = gpu.run_all([bad, good], out, minutes=None, again=False)
    # What failed comes last, so that it keeps nothing waiting.
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "tests-good: done before"
    assert lines[1].startswith("tests-bad: done in")
    assert records["tests-bad"]["passed"] == 3
    gpu.run_all([good], out, minutes=None, again=True)
    assert capsys.readouterr().out.startswith("tests-good: done in")
    gpu.run_all([good, bad], out, minutes=0.1, again=False)


def test_a_half_written_result_is_not_complete(stage):
    one, out = stage("tests", TESTS)
    out.mkdir()
    (out / f"{one.name}.json").write_text('{"complete": tr')
    assert not gpu.is_complete(out, one.name)
    assert gpu.run_stage(one, out)["state"] == gpu.DONE


def test_the_environment_is_recorded(tmp_path):
    record = gpu.run_stage(Stage("environment", "record", function="environment"), tmp_path)
    assert record["state"] == gpu.DONE, record["output"]
    fields = json.loads((tmp_path / "environment.json").read_text())
    assert fields["complete"]
    assert fields["torch"] == torch.__version__
    assert {"gpu", "driver", "triton", "commit", "date"} <= set(fields)


def test_publish(stage, tmp_path):
    one, out = stage("bench", PLAIN)
    gpu.run_stage(one, out)
    with pytest.raises(ValueError, match=r"environment.json: gpu"):
        gpu.publish(out, tmp_path / "results")
    (out / "environment.json").write_text(json.dumps({"gpu": "NVIDIA H200", "complete": True}))
    (out / "tests-part.json").write_text(
        json.dumps({"complete": True, "tests": {"passed": 3}, "failed_tests": []})
    )
    (out / "bench-cut.json").write_text(json.dumps({"complete": False}))
    folder = gpu.publish(out, tmp_path / "results")
    assert folder == tmp_path / "results" / "h200"
    assert sorted(file.name for file in folder.iterdir()) == ["environment.json", "tests.json", "tiny.json"]
    assert "node" not in json.loads((folder / "tiny.json").read_text())["machine_info"]
    assert json.loads((folder / "tests.json").read_text()) == {"part": {"passed": 3, "failed_tests": []}}


def test_the_list_names_every_stage():
    command = [sys.executable, str(SCRIPT), "--list"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    names = [line.split()[0] for line in listed.splitlines()]
    assert names[:2] == ["environment", "rates"]
    assert "tests-kernels-attention" in names
    assert {f"bench-{path.stem[6:]}" for path in SUITE.glob("bench_*.py")} <= set(names)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_cuda_it_says_so_and_stops(tmp_path):
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path / "out")]
    process = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert process.returncode == 2
    assert process.stderr == "no CUDA device: nothing to measure here (--list names the stages)\n"
    assert not process.stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"), [([], "--out is missing"), (["--stage", "abacus"], "--stage abacus: unknown")]
)
def test_wrong_arguments_are_named(arguments, message, capsys):
    assert gpu.main(arguments) == 2
    assert message in capsys.readouterr().err
