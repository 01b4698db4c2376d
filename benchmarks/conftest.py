"""Timing with pytest-benchmark: a function is timed only after its results matched the specification's.

    python -m pytest benchmarks --benchmark-only [--benchmark-json=benchmarks/results/<gpu>/<op>.json]

Implementations of one case stand in one group and run in one session. On CUDA a round is several calls and
one synchronisation, so that launches overlap as they do in training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

# Largest difference over largest expected entry: float32 rounding, else a few units of the last place.
LIMITS = {torch.float32: 1e-5, torch.float16: 4 * 2**-10, torch.bfloat16: 4 * 2**-7}
CALLS = 20


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
        difference = (a.double() - e.double()).abs().max().item()
        if not difference <= limit * max(e.abs().max().item(), 1e-30):
            return f"result {i} is off by {difference:.2e}, more than {limit:.0e} of the largest entry"
    return None


@pytest.fixture
def measure(benchmark):
    """measure(group, name, function, expected, dtype, bytes): check, then time, or refuse."""

    def run(
        group: str,
        name: str,
        function: Callable[[], Sequence[Tensor]],
        expected: Sequence[Tensor],
        dtype: torch.dtype,
        moved: int,
    ) -> None:
        fault = mismatch(function(), expected, LIMITS[dtype])
        if fault:
            pytest.fail(f"{group}: {name} is not timed, it does not match the reference: {fault}")
        cuda = expected[0].is_cuda
        calls = CALLS if cuda else 1

        def timed() -> None:
            for _ in range(calls):
                function()
            if cuda:
                torch.cuda.synchronize()

        benchmark.group, benchmark.name = group, name
        benchmark.pedantic(timed, rounds=20 if cuda else 7, warmup_rounds=3 if cuda else 1)
        seconds = benchmark.stats.stats.median / calls
        device = torch.cuda.get_device_name() if cuda else f"cpu, {torch.get_num_threads()} threads"
        benchmark.extra_info |= {
            "device": device,
            "torch": torch.__version__,
            "calls_per_round": calls,
            "microseconds_per_call": round(seconds * 1e6, 2),
            "minimum_bytes": moved,
            "GB/s": round(moved / seconds / 1e9, 2) if seconds and math.isfinite(seconds) else None,
        }

    return run


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
