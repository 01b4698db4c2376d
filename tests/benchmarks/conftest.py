"""The benchmark suite's modules, and real benchmark files made by a small run of it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SUITE = ROOT / "benchmarks"
# As in `python benchmarks/report.py`: the suite's modules import one another by name.
sys.path.append(str(SUITE))

TINY = """
import pytest
import torch

x = torch.arange(4096.0)


@pytest.mark.parametrize("name", ["torch", "twice", "wrong", "absent"])
def test_sum(measure, name):
    if name == "absent":
        pytest.skip("absent: not installed")
    calls = {"torch": lambda: [x + x], "twice": lambda: [(x + x + x + x) / 2], "wrong": lambda: [x + x + 1]}
    measure("sum-N4096", name, calls[name], [2 * x], x.dtype, 2 * x.nbytes)


def test_unpacked_and_alone(measure):
    measure("alone", "peer", lambda: [x[None]], [x], x.dtype, x.nbytes, unpack=lambda r: [r[0][0]])


def test_graph(measure):
    measure("graph", "torch", lambda: [x + 1], [x + 1], x.dtype, x.nbytes, graph=True)


def test_overwrites_its_input(measure):
    y = torch.ones(8)
    measure("overwrites", "torch", lambda: [y.mul_(2).clone()], [2 * torch.ones(8)], y.dtype, y.nbytes)


def test_unchecked(benchmark):
    benchmark.pedantic(sum, ([1, 2],), rounds=3)
"""


def run_suite(folder: Path, source: str, *arguments: str) -> tuple[subprocess.CompletedProcess[str], Path]:
    """Run `source` as a benchmark file with the suite's conftest; the process and its JSON."""
    shutil.copy(SUITE / "conftest.py", folder)
    (folder / "bench_tiny.py").write_text(source)
    output = folder / "tiny.json"
    command = [sys.executable, "-m", "pytest", "bench_tiny.py", "--benchmark-only", "-ra", "--color=no"]
    options = ["-p", "no:cacheprovider", "-c", os.devnull, "--rootdir=.", "--import-mode=importlib"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SUITE)}
    process = subprocess.run(
        [*command, *options, f"--benchmark-json={output}", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return process, output


@pytest.fixture(scope="session", autouse=True)
def not_a_worker() -> Iterator[None]:
    """Else pytest-benchmark times nothing in the suites that the tests start: it sees a worker of xdist."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("PYTEST_XDIST")]:
            patch.delenv(name)
        yield


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """One run of TINY: the process, and pytest-benchmark's file."""
    pytest.importorskip("pytest_benchmark")
    return run_suite(tmp_path_factory.mktemp("tiny"), TINY)


@pytest.fixture
def tiny(tiny_run) -> Path:
    return tiny_run[1]


@pytest.fixture
def changed(tiny, tmp_path) -> Callable[..., Path]:
    """changed(edit, name="changed.json") -> a copy of the real file after edit(its content)."""

    def make(edit: Callable[[dict], object], name: str = "changed.json") -> Path:
        data = json.loads(tiny.read_text())
        edit(data)
        path = tmp_path / name
        path.write_text(json.dumps(data))
        return path

    return make
