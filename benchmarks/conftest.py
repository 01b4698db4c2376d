"""Timing with pytest-benchmark: a function is timed only after its results matched the specification's.

    python -m pytest benchmarks --benchmark-only [--benchmark-json=FILE.json]

Implementations of one case stand in one group and run in one session. On CUDA a round is several calls and
one synchronisation, so that launches overlap as they do in training. What was not timed, and why, is printed
and stands in the JSON under "not_timed". README.md says what the fields mean.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from scamo.training.guards import limit_threads

# As in training, and before torch is loaded.
limit_threads()
import torch
from torch import Tensor

# The suite's modules import one another by name, here as in `python benchmarks/report.py`.
sys.path.append(str(Path(__file__).parent))
import floors
import peers

# Largest difference over largest expected entry: float32 rounding, else a few units of the last place.
LIMITS = {torch.float32: 1e-5, torch.float16: 4 * 2**-10, torch.bfloat16: 4 * 2**-7}
# On CUDA a round has at most this many calls, and fewer of those that take long.
CALLS, ROUND_SECONDS = 20, 0.02
NO_CUDA = "needs a CUDA device"
# Speed-ups are taken inside one run only; a file merged of several keeps them apart by this.
RUN = f"{datetime.datetime.now(datetime.UTC):%Y%m%dT%H%M%SZ}-{os.getpid()}"
NOT_TIMED: list[dict[str, str]] = []


def mismatch(actual: Sequence[Tensor], expected: Sequence[Tensor], limit: float) -> str | None:
    """What differs, or None. Integers must be equal; a NaN never matches."""
    if len(actual) != len(expected):
        return f"{len(actual)} results instead of {len(expected)}"
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        if a.shape != e.shape:
            return f"result {i} has shape {tuple(a.shape)}, not {tuple(e.shape)}"
        if not e.is_floating_point():
            if not torch.equal(a.cpu().long(), e.cpu().long()):
                return f"result {i} differs"
            continue
        if not e.numel():
            continue
        difference = (a.double() - e.double()).abs().max().item()
        if not difference <= limit * max(e.abs().max().item(), 1e-30):
            return f"result {i} is off by {difference:.2e}, more than {limit:.0e} of the largest entry"
    return None


def device_activities(function: Callable[[], object]) -> int | None:
    """Kernels, copies and fills that one call runs on the GPU; None where the profiler cannot say."""
    from torch.profiler import ProfilerActivity, profile

    try:
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            function()
            torch.cuda.synchronize()
        with tempfile.TemporaryDirectory() as folder:
            # The categories of the trace tell kernels from annotations, which the event list does not.
            path = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(path))
            events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    except (RuntimeError, OSError, ValueError, KeyError):
        return None
    count = sum(event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset") for event in events)
    return count or None


def captured(function: Callable[[], Sequence[Tensor]]) -> tuple[Callable[[], object], list[Tensor]]:
    """function as a CUDA graph: replay(), and the tensors that a replay writes. Raises what capturing raises.

    Warm-up, forward and backward stand on the capturing stream: autograd runs a backward on its forward's.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = list(function())
    torch.cuda.synchronize()
    # What a replay leaves unwritten must not pass for a result.
    for result in results:
        if result.is_floating_point():
            result.detach().fill_(math.nan)
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay, results


@pytest.fixture(scope="session")
def copy_rates() -> Callable[[bool], float]:
    """copy_rates(cuda) -> bytes per second, read and written, of a large copy, measured in this run."""
    rates: dict[str, float] = {}

    def rate(cuda: bool) -> float:
        where = "cuda" if cuda else "cpu"
        if where not in rates:
            rates[where] = floors.copy_rate(where)
        return rates[where]

    return rate


@pytest.fixture(scope="session")
def card(copy_rates) -> floors.Device | None:
    """What `floors` knows of the GPU, with the copy rate of this run; None without one that it knows."""
    if not torch.cuda.is_available():
        return None
    try:
        described = floors.device(torch.cuda.get_device_name())
    except ValueError:
        return None
    return dataclasses.replace(described, copy=copy_rates(True))


@pytest.fixture
def measure(benchmark, copy_rates):
    """measure(group, name, function, expected, dtype, bytes): check, then time, or refuse.

    bytes: the least that the op must read and write. Optional keywords:
    floor: a `floors.Floor`; else the floor is `bytes` at the copy rate.
    unpack: applied to the results before they are compared (not timed).
    graph: time replays of a CUDA graph of `function`; skipped with the reason where it cannot be captured.
    context: entered around checks and timing, for settings that would cost time inside `function`.
    limit: instead of the dtype's entry of LIMITS.
    """

    def run(
        group: str,
        name: str,
        function: Callable[[], Sequence[Tensor]],
        expected: Sequence[Tensor],
        dtype: torch.dtype,
        moved: int,
        *,
        floor: floors.Floor | None = None,
        unpack: Callable[[Sequence[Tensor]], Sequence[Tensor]] | None = None,
        graph: bool = False,
        context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
        limit: float | None = None,
    ) -> None:
        cuda = expected[0].is_cuda
        if graph and not cuda:
            pytest.skip("a CPU has no CUDA graphs")
        with context():
            call: Callable[[], object] = function
            if graph:
                try:
                    call, results = captured(function)
                except RuntimeError as error:
                    pytest.skip(f"{name} cannot be captured in a CUDA graph: {_first_line(error)}")
            else:
                # The second call's results: one that overwrites its inputs is wrong from then on.
                function()
                results = list(function())
            fault = mismatch(
                unpack(results) if unpack else results, expected, LIMITS[dtype] if limit is None else limit
            )
            del results
            if fault:
                pytest.fail(f"{group}: {name} is not timed, it does not match the reference: {fault}")
            info = _time(benchmark, group, name, call, cuda, graph)
        seconds = info.pop("seconds")
        rate = copy_rates(cuda)
        least = floor or floors.Floor(moved, moved / rate)
        benchmark.extra_info |= info | {
            "run": RUN,
            "matched": True,
            "torch": torch.__version__,
            "microseconds_per_call": round(seconds * 1e6, 2),
            "minimum_bytes": moved,
            "GB/s": round(moved / seconds / 1e9, 2) if seconds and math.isfinite(seconds) else None,
            "copy_GB/s": round(rate / 1e9, 1),
            "floor_us": round(least.seconds * 1e6, 3),
            "floor_bound": least.bound,
        }

    return run


def _time(benchmark, group: str, name: str, call: Callable[[], object], cuda: bool, graph: bool) -> dict:
    """Time `call`; what was found, "seconds" (the median of one call) among it."""
    info: dict[str, Any] = {"graph": graph}
    calls = 1
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        started = time.perf_counter()
        call()
        torch.cuda.synchronize()
        once = time.perf_counter() - started
        # A graph's memory is its own pool, taken when it was captured.
        info["peak_extra_bytes"] = None if graph else torch.cuda.max_memory_allocated() - before
        info["launches"] = device_activities(call)
        calls = max(1, min(CALLS, math.ceil(ROUND_SECONDS / max(once, 1e-9))))

    def timed() -> None:
        for _ in range(calls):
            call()
        if cuda:
            torch.cuda.synchronize()

    benchmark.group, benchmark.name = group, name
    benchmark.pedantic(timed, rounds=20 if cuda else 7, warmup_rounds=3 if cuda else 1)
    # pedantic returns without statistics under --benchmark-disable.
    seconds = benchmark.stats.stats.median / calls if benchmark.stats else math.nan
    device = torch.cuda.get_device_name() if cuda else f"cpu, {torch.get_num_threads()} threads"
    return info | {"device": device, "calls_per_round": calls, "seconds": seconds}


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=NO_CUDA))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """A peer that cannot run is skipped with its reason."""
    try:
        yield
    except peers.Unavailable as error:
        pytest.skip(str(error))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    outcome: Any = yield
    report = outcome.get_result()
    if report.passed:
        return
    if isinstance(report.longrepr, tuple):
        reason = report.longrepr[2].removeprefix("Skipped: ")
    else:
        crash = getattr(report.longrepr, "reprcrash", None)
        reason = crash.message.splitlines()[0] if crash and crash.message else str(report.longrepr)
    if reason != NO_CUDA:
        NOT_TIMED.append({"test": item.nodeid, "outcome": report.outcome, "reason": reason})


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(output_json: dict) -> None:
    output_json["not_timed"] = list(NOT_TIMED)
