"""Every measurement that needs a GPU, in stages that can be resumed: `make gpu`.

    python benchmarks/gpu.py --out DIR [--stage NAME ...] [--minutes M] [--archive FILE.tar.gz] [--publish]
    python benchmarks/gpu.py --list

A stage takes less than nine minutes; what does not fit is left for the next call with the same --out, down to
the single test. DIR/<stage>.json is a stage's result, and a complete one is skipped; DIR/<stage>.log is what
it printed; DIR/stages.json says how each went. A stage that fails does not stop the others.

Exit status: 0 all done, 1 something failed, 2 no CUDA device or a wrong argument, 3 time is over: call again.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
# Seconds: a stage's process is ended after the first, and no test starts in the last ones before it, so that
# what is ended ran at least that long.
HARD, LAST = 520.0, 120.0
DONE, FAILED, UNFINISHED = "done", "failed", "unfinished"
OUTCOMES = ("passed", "failed", "skipped", "ended")


@dataclass(frozen=True)
class Stage:
    """kind "record": `function` of this file writes the JSON; "tests", "bench": pytest on `path`."""

    name: str
    kind: str
    path: Path | None = None
    function: str = ""
    marked: bool = True  # only what has the gpu marker

    @property
    def what(self) -> str:
        if self.path is None:
            return (_RECORDS[self.function].__doc__ or "").splitlines()[0]
        path = self.path.relative_to(ROOT) if self.path.is_relative_to(ROOT) else self.path
        return f"pytest {path}{' -m gpu' if self.marked else ''}"


def stages(root: Path = ROOT) -> list[Stage]:
    """The record of the environment, the rates, a stage per test file with GPU tests and per benchmark."""
    found = [
        Stage("environment", "record", function="environment"),
        Stage("rates", "record", function="rates"),
    ]
    for path in sorted((root / "tests").rglob("test_*.py")):
        if _has_gpu(path):
            relative = path.relative_to(root / "tests").with_suffix("")
            name = "-".join([*relative.parts[:-1], relative.name.removeprefix("test_")])
            found.append(Stage(f"tests-{name}", "tests", path))
    for path in sorted((root / "benchmarks").glob("bench_*.py")):
        name = path.stem.removeprefix("bench_")
        found.append(Stage(f"bench-{name}", "bench", path, marked=_has_gpu(path)))
    return found


def _has_gpu(path: Path) -> bool:
    return "mark.gpu" in path.read_text(encoding="utf-8")


def environment() -> dict[str, Any]:
    """GPU, driver, packages, commit and date."""
    import platform

    import torch

    with contextlib.suppress(ImportError):
        import triton
    cuda = torch.cuda.is_available()
    properties = torch.cuda.get_device_properties(0) if cuda else None
    return {
        "gpu": properties.name if properties else None,
        "multiprocessors": properties.multi_processor_count if properties else None,
        "memory_bytes": properties.total_memory if properties else None,
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        "capability": list(torch.cuda.get_device_capability()) if cuda else None,
        "driver": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__ if "triton" in locals() else None,
        "python": platform.python_version(),
        "commit": _said("git", "-C", str(ROOT), "rev-parse", "HEAD"),
        "changed_files": _said("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"),
        "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%dT%H:%M:%SZ}",
    }


def _said(*command: str) -> str | None:
    """A command's output; None where it does not exist or fails."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def rates() -> dict[str, Any]:
    """The measured copy rate and matmul rate, which the floors use."""
    import floors
    import torch

    return {
        "gpu": torch.cuda.get_device_name(),
        "copy_bytes_per_second": floors.copy_rate("cuda"),
        "matmul_flops_per_second": floors.matmul_rate("cuda"),
    }


_RECORDS = {"environment": environment, "rates": rates}


class Progress:
    """The pytest plugin of a stage: skips what ran before, notes what ran, stops when time is over.

    A line of the file is "outcome <tab> test"; "started" without an outcome is a test that took the process
    with it or was ended with it.
    """

    def __init__(self, file: Path, ran: set[str], seconds: float) -> None:
        self.file, self.ran, self.end = file, ran, time.monotonic() + seconds
        self.outcome: dict[str, str] = {}
        self.broken = False

    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        left = [item for item in items if item.nodeid not in self.ran]
        if len(left) < len(items):
            config.hook.pytest_deselected(items=[item for item in items if item.nodeid in self.ran])
            items[:] = left

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._note("started", nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed or report.nodeid not in self.outcome or report.skipped:
            self.outcome[report.nodeid] = report.outcome
        # After such an error every CUDA call of the process fails.
        self.broken = self.broken or (report.failed and "CUDA error" in report.longreprtext)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self._note(self.outcome.get(nodeid, "passed"), nodeid)

    def pytest_runtest_teardown(self, item: Any, nextitem: Any) -> None:
        if nextitem is not None and self.broken:
            item.session.shouldstop = "the CUDA context is broken"
        elif nextitem is not None and time.monotonic() > self.end:
            item.session.shouldstop = "the stage's time is over"

    def _note(self, outcome: str, nodeid: str) -> None:
        with self.file.open("a", encoding="utf-8") as file:
            file.write(f"{outcome}\t{nodeid}\n")


def read_progress(file: Path) -> dict[str, str]:
    """test -> outcome, the last one noted."""
    if not file.exists():
        return {}
    lines = file.read_text(encoding="utf-8").splitlines()
    return {nodeid: outcome for outcome, _, nodeid in (line.partition("\t") for line in lines)}


def run_stage(stage: Stage, out: Path, seconds: float = HARD) -> dict[str, Any]:
    """Run a stage for at most `seconds` and return its record: state, seconds, output, counts of tests."""
    started = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    log = out / f"{stage.name}.log"
    if stage.kind == "record":
        command = [str(Path(__file__)), "--write", stage.function, str(out / f"{stage.name}.json")]
        code = _child(command, log, seconds)
        state = DONE if code == 0 and is_complete(out, stage.name) else FAILED
        counts: dict[str, Any] = {}
    else:
        state, counts = _run_pytest(stage, out, log, started + seconds)
    output = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    return {
        "state": state,
        "seconds": round(time.monotonic() - started, 1),
        **counts,
        "output": output[-4000:] if state != DONE else "",
    }


def _run_pytest(stage: Stage, out: Path, log: Path, end: float) -> tuple[str, dict[str, Any]]:
    """One process after another until every test ran, nothing more runs, or time is over."""
    progress = out / f"{stage.name}.progress"
    problem = False
    complete = False
    while not complete and not problem:
        left = end - time.monotonic()
        if left < 1.2 * LAST:
            break
        with tempfile.TemporaryDirectory(dir=out) as folder:
            noted, part = Path(folder) / "progress", Path(folder) / "part.json"
            command = [str(Path(__file__)), "--pytest", str(noted), str(progress), str(left - LAST), "--"]
            command += [str(stage.path), "-p", "no:cacheprovider", "--color=no"]
            command += ["-m", "gpu"] if stage.marked else []
            if stage.kind == "bench":
                command += ["--benchmark-only", f"--benchmark-json={part}"]
            code = _child(command, log, left)
            ran = read_progress(noted)
            died = {test: "ended" for test, outcome in ran.items() if outcome == "started"}
            kept = {test: outcome for test, outcome in ran.items() if test not in died}
            if stage.kind == "bench" and not _merge(part, out / f"{stage.name}.json"):
                # The process died before it wrote: what passed must run again.
                kept = {test: outcome for test, outcome in kept.items() if outcome != "passed"}
            with progress.open("a", encoding="utf-8") as file:
                file.writelines(f"{outcome}\t{test}\n" for test, outcome in (kept | died).items())
            # 0 all passed, 1 some failed, 5 nothing (left) to run; 2 stopped: more is left.
            complete = code in (0, 1, 5) and not died
            problem = not complete and not ran
    outcomes = read_progress(progress)
    counts = {name: sum(outcome == name for outcome in outcomes.values()) for name in OUTCOMES}
    bad = [test for test, outcome in outcomes.items() if outcome in ("failed", "ended")]
    result = out / f"{stage.name}.json"
    fields = _read(result) if stage.kind == "bench" else {}
    fields = {"benchmarks": []} | fields if stage.kind == "bench" else fields
    _write(result, fields | {"complete": complete, "tests": counts, "failed_tests": bad})
    state = FAILED if problem or bad else DONE if complete else UNFINISHED
    return state, counts | {"failed_tests": bad}


def _child(arguments: Sequence[str], log: Path, seconds: float) -> int:
    """Run this Python with `arguments`, output appended to `log`; ended with its children after `seconds`."""
    paths = [str(ROOT / "kernels"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    with log.open("a", encoding="utf-8") as file:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            cwd=ROOT,
            env=environment,
            start_new_session=True,
        )
        try:
            return process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            file.write(f"\nended after {seconds:.0f} s\n")
            return -signal.SIGKILL
        finally:
            # Its children too, an interpreter of a test say; the process leads their group.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _merge(part: Path, into: Path) -> bool:
    """Add a part's benchmarks to the stage's file; False when there is no part (nothing was timed)."""
    new = _read(part)
    if "benchmarks" not in new:
        return False
    old = _read(into)
    for key in ("benchmarks", "not_timed"):
        new[key] = old.get(key, []) + new.get(key, [])
    _write(into, new)
    return True


def _read(file: Path) -> dict[str, Any]:
    """A JSON object; {} when the file is absent, empty or cut off."""
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return fields if isinstance(fields, dict) else {}


def _write(file: Path, fields: dict[str, Any]) -> None:
    temporary = file.with_suffix(".json.new")
    temporary.write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")
    temporary.replace(file)


def is_complete(out: Path, name: str) -> bool:
    return _read(out / f"{name}.json").get("complete") is True


def publish(out: Path, results: Path) -> Path:
    """Copy what is complete to results/<gpu>/: environment, rates, a file per benchmark, counts of the tests.

    Raises ValueError without a record of the GPU.
    """
    gpu = _read(out / "environment.json").get("gpu")
    if not gpu:
        raise ValueError(
            f"{out / 'environment.json'}: gpu: expected the GPU's name; run stage environment first"
        )
    short = next((name for name in ("h200", "h100") if name in gpu.lower()), gpu.lower().replace(" ", "-"))
    folder = results / short
    folder.mkdir(parents=True, exist_ok=True)
    tests: dict[str, Any] = {}
    for file in sorted(out.glob("*.json")):
        fields = _read(file)
        if fields.get("complete") is not True:
            continue
        if file.stem.startswith("tests-"):
            tests[file.stem.removeprefix("tests-")] = fields["tests"] | {
                "failed_tests": fields["failed_tests"]
            }
            continue
        # The name of a machine is nobody's business.
        fields.get("machine_info", {}).pop("node", None)
        _write(folder / f"{file.stem.removeprefix('bench-')}.json", fields)
    if tests:
        _write(folder / "tests.json", tests)
    return folder


def _pytest_child(arguments: Sequence[str]) -> int:
    import pytest

    noted, progress, seconds = Path(arguments[0]), Path(arguments[1]), float(arguments[2])
    rest = list(arguments[arguments.index("--") + 1 :])
    return int(pytest.main(rest, plugins=[Progress(noted, set(read_progress(progress)), seconds)]))


def run_all(chosen: Sequence[Stage], out: Path, minutes: float | None, again: bool) -> dict[str, Any]:
    """Run the stages that are not complete, those that never failed first; returns every stage's record."""
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + (minutes * 60 if minutes else float("inf"))
    records = _read(out / "stages.json")
    if again:
        for stage in chosen:
            records.pop(stage.name, None)
            for suffix in ("json", "progress", "log"):
                (out / f"{stage.name}.{suffix}").unlink(missing_ok=True)
    order = sorted(chosen, key=lambda stage: records.get(stage.name, {}).get("state") == FAILED)
    for stage in order:
        if is_complete(out, stage.name):
            print(f"{stage.name}: done before")
            continue
        left = end - time.monotonic()
        if left < 30:
            records.setdefault(stage.name, {"state": UNFINISHED})
            print(f"{stage.name}: left for the next call")
            continue
        record = records[stage.name] = run_stage(stage, out, min(HARD, left - 10))
        _write(out / "stages.json", records)
        counts = [f"{record[key]} {key}" for key in OUTCOMES if record.get(key)]
        print(f"{stage.name}: {record['state']} in {record['seconds']} s {', '.join(counts)}", flush=True)
        if record["state"] == FAILED:
            print("    " + "\n    ".join(record["output"].splitlines()[-15:]))
    _write(out / "stages.json", records)
    return records


def main(arguments: Sequence[str]) -> int:
    if arguments[:1] == ["--pytest"]:
        return _pytest_child(arguments[1:])
    if arguments[:1] == ["--write"]:
        _write(Path(arguments[2]), _RECORDS[arguments[1]]() | {"complete": True})
        return 0
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder of results; the same again resumes")
    parser.add_argument("--stage", action="append", help="only this one (may be given again)")
    parser.add_argument("--minutes", type=float, help="stop starting work after this time")
    parser.add_argument("--again", action="store_true", help="run complete stages anew")
    parser.add_argument("--archive", type=Path, help="pack the folder into one .tar.gz after the run")
    parser.add_argument(
        "--publish", action="store_true", help="copy complete results to benchmarks/results/<gpu>/"
    )
    parser.add_argument("--list", action="store_true", help="name the stages and stop")
    options = parser.parse_args(arguments)
    every = stages()
    if options.list:
        for stage in every:
            mark = " (done)" if options.out and is_complete(options.out, stage.name) else ""
            print(f"{stage.name:36} {stage.what}{mark}")
        return 0
    names = [stage.name for stage in every]
    for name in options.stage or []:
        if name not in names:
            print(f"--stage {name}: unknown; --list names the stages", file=sys.stderr)
            return 2
    if options.out is None:
        print("--out is missing: the folder for the results", file=sys.stderr)
        return 2
    import torch

    if not torch.cuda.is_available():
        print("no CUDA device: nothing to measure here (--list names the stages)", file=sys.stderr)
        return 2
    chosen = [stage for stage in every if not options.stage or stage.name in options.stage]
    records = run_all(chosen, options.out.resolve(), options.minutes, options.again)
    if options.publish:
        print(f"published to {publish(options.out, HERE / 'results')}")
    if options.archive:
        with tarfile.open(options.archive, "w:gz") as archive:
            archive.add(options.out.resolve(), arcname=options.out.resolve().name)
    states = {records[stage.name]["state"] for stage in chosen if stage.name in records}
    return 1 if FAILED in states else 3 if UNFINISHED in states else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
