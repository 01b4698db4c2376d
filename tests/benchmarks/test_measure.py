"""The `measure` fixture, in a real run: what is checked, timed, refused and recorded."""

from __future__ import annotations

import json

import pytest


@pytest.fixture
def content(tiny):
    return json.loads(tiny.read_text())


def test_only_what_matched_is_timed(tiny_run, content):
    process, _ = tiny_run
    assert process.returncode == 1, process.stdout + process.stderr
    assert {entry["name"] for entry in content["benchmarks"]} == {"torch", "twice", "peer", "test_unchecked"}
    assert "wrong is not timed, it does not match the reference" in process.stdout


def test_what_is_not_timed_is_printed_and_recorded(tiny_run, content):
    process, _ = tiny_run
    reasons = {entry["reason"]: entry["outcome"] for entry in content["not_timed"]}
    assert reasons["absent: not installed"] == "skipped"
    assert reasons["a CPU has no CUDA graphs"] == "skipped"
    assert any(reason.startswith("Failed: overwrites: torch is not timed") for reason in reasons), reasons
    (wrong,) = (reason for reason in reasons if "wrong is not timed" in reason)
    assert reasons[wrong] == "failed"
    assert "off by 1.00e+00" in wrong
    for reason in reasons:
        assert reason.split(": ")[0] in process.stdout


def test_what_is_recorded(content):
    entry = next(entry for entry in content["benchmarks"] if entry["name"] == "torch")
    info = entry["extra_info"]
    assert entry["group"] == "sum-N4096"
    assert info["matched"] is True
    assert info["run"]
    assert info["device"] == "cpu, 1 threads"
    assert info["minimum_bytes"] == 2 * 4096 * 4
    assert info["microseconds_per_call"] == pytest.approx(entry["stats"]["median"] * 1e6, abs=0.01)
    assert info["floor_bound"] == "memory"
    expected = info["minimum_bytes"] / info["copy_GB/s"] * 1e-3
    assert info["floor_us"] == pytest.approx(expected, rel=0.01)
    runs = {e["extra_info"].get("run") for e in content["benchmarks"] if "matched" in e["extra_info"]}
    assert len(runs) == 1
