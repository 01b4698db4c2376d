"""Tables, plots and comparisons from the suite's JSON files.

    python benchmarks/report.py table FILE.json ... [--output TABLE.md]
    python benchmarks/report.py plot FILE.json ... --output PLOT.png
    python benchmarks/report.py compare OLD.json NEW.json [--threshold 5]
    python benchmarks/report.py gate RECORDS.jsonl [--output TABLE.md]

`gate` makes the table of the ahead-of-time gate from what SCAMO_GATE_RECORDS=RECORDS.jsonl python -m pytest
tests/kernels/test_compile.py -k compiles wrote; `make gate` does all of it.

A speed-up stands in a table only where our implementation and the other one both matched the reference in the
same run. `compare` exits with status 1 when something takes more than `threshold` per cent longer, every
command with 2 on a file that it cannot read; the message names the file and the field.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Ours, best first; the first of them in a group is what the others are compared with.
OURS = ("triton", "torch")


class ReportError(Exception):
    """A file that is not the suite's JSON; the message names file and field."""


@dataclass(frozen=True)
class Row:
    """One implementation of one case. Numbers that its run did not record are None."""

    file: str
    run: str
    group: str
    name: str
    seconds: float
    matched: bool
    device: str
    floor: float | None = None  # seconds
    bound: str = ""
    moved: float | None = None  # bytes
    copy: float | None = None  # bytes per second
    peak: float | None = None  # bytes
    launches: float | None = None
    graph: bool = False  # replayed as a CUDA graph

    @property
    def implementation(self) -> str:
        """The name without its dispatch: "triton" of "triton, graph"."""
        return self.name.split(",")[0]

    @property
    def share_of_floor(self) -> float | None:
        return self.floor / self.seconds if self.floor else None

    @property
    def share_of_copy(self) -> float | None:
        return self.moved / self.seconds / self.copy if self.moved and self.copy else None


@dataclass(frozen=True)
class Results:
    rows: list[Row]
    not_timed: list[tuple[str, str]]  # test, reason


def load(path: Path) -> Results:
    """Read one file of pytest-benchmark. Raises ReportError."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ReportError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ReportError(f"{path}: no JSON: {error}") from error
    benchmarks = _get(path, data, "benchmarks", list)
    rows = [_row(path, f"benchmarks[{i}]", entry) for i, entry in enumerate(benchmarks)]
    not_timed = []
    for i, entry in enumerate(_get(path, data, "not_timed", list, [])):
        where = f"not_timed[{i}]"
        not_timed.append(
            (_get(path, entry, "test", str, at=where), _get(path, entry, "reason", str, at=where))
        )
    return Results(rows, not_timed)


_MISSING = object()


def _get(path: Path, data: Any, field: str, kind: Any, default: Any = _MISSING, at: str = "") -> Any:
    full = f"{at}.{field}" if at else field
    value = data.get(field, _MISSING) if isinstance(data, dict) else _MISSING
    if value is None or value is _MISSING:
        if default is _MISSING:
            raise ReportError(f"{path}: {full}: missing")
        return default
    if not isinstance(value, kind) or (kind == (int, float) and not math.isfinite(value)):
        expected = "a number" if kind == (int, float) else f"type {kind.__name__}"
        raise ReportError(f"{path}: {full}: expected {expected}, got {value!r:.60}")
    return value


def _row(path: Path, at: str, entry: Any) -> Row:
    number = (int, float)
    name = _get(path, entry, "name", str, at=at)
    stats = _get(path, entry, "stats", dict, at=at)
    info = _get(path, entry, "extra_info", dict, {}, at=at)
    median = _get(path, stats, "median", number, at=f"{at}.stats")
    inside = f"{at}.extra_info"
    calls = _get(path, info, "calls_per_round", number, 1, at=inside)
    if not median > 0 or not calls > 0:
        field = "stats.median" if not median > 0 else "extra_info.calls_per_round"
        raise ReportError(f"{path}: {at}.{field}: expected a positive number")
    floor, copy = (_get(path, info, key, number, None, at=inside) for key in ("floor_us", "copy_GB/s"))
    return Row(
        file=str(path),
        run=_get(path, info, "run", str, "", at=inside),
        group=_get(path, entry, "group", str, name, at=at),
        name=name,
        seconds=median / calls,
        matched=_get(path, info, "matched", bool, False, at=inside),
        device=_get(path, info, "device", str, "", at=inside),
        floor=floor * 1e-6 if floor is not None else None,
        bound=_get(path, info, "floor_bound", str, "", at=inside),
        moved=_get(path, info, "minimum_bytes", number, None, at=inside),
        copy=copy * 1e9 if copy is not None else None,
        peak=_get(path, info, "peak_extra_bytes", number, None, at=inside),
        launches=_get(path, info, "launches", number, None, at=inside),
        graph=_get(path, info, "graph", bool, False, at=inside),
    )


def grouped(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows of one case, run, device and dispatch, ours first, then by time."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault((row.group, row.run, row.device, row.graph), []).append(row)
    for members in groups.values():
        members.sort(key=lambda row: (not is_ours(row), row.seconds))
    return list(groups.values())


def is_ours(row: Row) -> bool:
    return row.implementation in OURS


def ours(members: Sequence[Row]) -> Row | None:
    return next((row for name in OURS for row in members if row.implementation == name), None)


def speed_up(mine: Row | None, other: Row) -> float | None:
    """How many times as fast ours is; None unless both matched the reference in the same run."""
    if mine is None or mine is other or not (mine.matched and other.matched):
        return None
    same = mine.run and (mine.run, mine.device, mine.file) == (other.run, other.device, other.file)
    return other.seconds / mine.seconds if same else None


def time_text(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    scale, unit = (1e6, "µs") if seconds < 1e-3 else (1e3, "ms") if seconds < 1 else (1, "s")
    value = seconds * scale
    return f"{value:.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.0%}" if share >= 0.1 else f"{share:.1%}"


def _bytes_text(number: float | None) -> str:
    if number is None:
        return "–"
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} GB"


def table(results: Sequence[Results]) -> str:
    """A Markdown table; README.md says what the columns mean."""
    lines = [
        "| op, shape | implementation | time | floor | share of floor | share of copy rate | peak memory "
        "| launches | ours is faster by |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    rows = [row for result in results for row in result.rows]
    for members in grouped(rows):
        mine = ours(members)
        for row in members:
            ratio = speed_up(mine, row)
            floor = f"{time_text(row.floor)} ({row.bound})" if row.floor else "–"
            launches = "–" if row.launches is None else f"{row.launches:.0f}"
            cells = [
                row.group,
                row.name,
                time_text(row.seconds),
                floor,
                _percent(row.share_of_floor),
                _percent(row.share_of_copy),
                _bytes_text(row.peak),
                launches,
                "–" if ratio is None else f"{ratio:.2f}×",
            ]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    reasons: dict[str, list[str]] = {}
    for result in results:
        for test, reason in result.not_timed:
            reasons.setdefault(reason, []).append(test)
    if reasons:
        lines += ["", "Not timed:", ""]
        lines += [
            f"- {reason} ({len(tests)}: {tests[0]}{' …' if len(tests) > 1 else ''})"
            for reason, tests in reasons.items()
        ]
    devices = sorted({row.device for row in rows if row.device})
    if devices:
        lines += ["", f"Measured on: {'; '.join(devices)}."]
    return "\n".join(lines) + "\n"


def plot(results: Sequence[Results], output: Path) -> None:
    """Horizontal bars, a panel per group: time of each implementation, the floor as a line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = grouped([row for result in results for row in result.rows])
    if not groups:
        raise ReportError(f"{output}: nothing to draw: the files hold no benchmarks")
    columns = 1 if len(groups) == 1 else 2
    panels = math.ceil(len(groups) / columns)
    heights = [
        max(len(members) for members in groups[i * columns : (i + 1) * columns]) for i in range(panels)
    ]
    figure, axes = plt.subplots(
        panels,
        columns,
        figsize=(7 * columns, sum(heights) * 0.28 + panels * 0.9),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for axis, members in zip(axes.flat, groups, strict=False):
        slowest = max(row.seconds for row in members)
        scale, unit = (1e6, "µs") if slowest < 1e-3 else (1e3, "ms")
        colours = ["#b5482a" if is_ours(row) else "#8a9ba8" for row in members]
        bars = axis.barh(
            [row.name for row in members], [row.seconds * scale for row in members], color=colours
        )
        labels = []
        for row in members:
            ratio = speed_up(ours(members), row)
            labels.append(time_text(row.seconds) + (f"  ({ratio:.2f}×)" if ratio is not None else ""))
        axis.bar_label(bars, labels, padding=3, fontsize=7)
        floors = [row.floor for row in members if row.floor]
        if floors:
            axis.axvline(min(floors) * scale, color="black", linewidth=1, linestyle="--")
        axis.set_xlim(0, slowest * scale * 1.3)
        axis.invert_yaxis()
        axis.set_title(members[0].group, fontsize=8, loc="left")
        axis.set_xlabel(unit, fontsize=7)
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[len(groups) :]:
        axis.set_axis_off()
    figure.savefig(output, dpi=110)
    plt.close(figure)


def compare(old: Results, new: Results, threshold: float) -> tuple[list[str], int]:
    """Lines to print, and how many regressed. Cases are matched by group and implementation."""
    before = {(row.group, row.name): row for row in old.rows}
    after = {(row.group, row.name): row for row in new.rows}
    lines, regressions = [], 0
    for key, row in after.items():
        if key not in before:
            lines.append(f"new         {' / '.join(key)}: {time_text(row.seconds)}")
            continue
        was = before[key]
        if was.device != row.device:
            raise ReportError(
                f"{row.file}: extra_info.device of {' / '.join(key)}: {row.device!r}, "
                f"but {was.device!r} in {was.file}: times of two devices do not compare"
            )
        change = (row.seconds / was.seconds - 1) * 100
        verdict = "REGRESSION" if change > threshold else "faster" if change < -threshold else "same"
        regressions += verdict == "REGRESSION"
        times = f"{time_text(was.seconds)} -> {time_text(row.seconds)} ({change:+.1f}%)"
        lines.append(f"{verdict:11} {' / '.join(key)}: {times}")
    lines += [f"gone        {' / '.join(key)}" for key in before if key not in after]
    lines.append(f"{regressions} of {len(after)} regressed by more than {threshold:g}%")
    return lines, regressions


# What the gate reports of a kernel.
RESULT = ("registers", "stack", "spills", "shared", "tensor_memory", "tensor_cores", "wide_loads", "loads")
# Shared memory of a multiprocessor, kB, by compute capability; a block costs one more than it asks for.
SHARED = {80: 164, 86: 100, 89: 100, 90: 228, 100: 228, 103: 228, 120: 100}


def blocks_per_multiprocessor(
    registers: int, warps: int, shared: int, arch: int, tensor_memory: int = 0
) -> int:
    """How many blocks fit: registers are given to warps by 8 a thread, out of 16384 per quarter.

    tensor_memory: columns, of 512 (sm_100).
    """
    per_warp = max(-(-registers // 8) * 8, 8) * 32
    by_registers = 4 * (16384 // per_warp) // warps
    by_memory = SHARED[arch] * 1024 // (shared + 1024)
    by_tensor_memory = 512 // max(tensor_memory, 1)
    most_warps = 64 if arch in (80, 90, 100, 103) else 48
    return min(by_registers, by_memory, by_tensor_memory, most_warps // warps, 32)


def gate_table(path: Path) -> str:
    """A row for each kernel configuration that the gate compiled. Raises ReportError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ReportError(f"{path}: {error.strerror or error}") from error
    rows = set()
    for i, line in enumerate(lines):
        at = f"line {i + 1}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ReportError(f"{path}: {at}: no JSON: {error}") from error
        case = _get(path, record, "case", dict, at=at)
        result = _get(path, record, "result", dict, at=at)
        inside = f"{at}.case"
        kernel = _get(path, case, "kernel", str, at=inside)
        arch, warps, stages = (_get(path, case, key, int, at=inside) for key in ("arch", "warps", "stages"))
        numbers = {key: _get(path, result, key, int, at=f"{at}.result") for key in RESULT}
        version = _get(path, result, "triton", str, at=f"{at}.result")
        if arch not in SHARED:
            raise ReportError(f"{path}: {inside}.arch: {arch} is unknown; expected one of {list(SHARED)}")
        constants = _get(path, case, "constants", dict, at=inside)
        signature = _get(path, case, "signature", dict, at=inside)
        blocks = blocks_per_multiprocessor(
            numbers["registers"], warps, numbers["shared"], arch, numbers["tensor_memory"]
        )
        rows.add(
            (
                kernel.removeprefix("_").replace("_triton.", "."),
                next((kind[1:] for kind in signature.values() if kind in ("*bf16", "*fp16", "*fp32")), "–"),
                _configuration(constants),
                arch,
                warps,
                stages,
                version,
                numbers["registers"],
                numbers["spills"] + numbers["stack"],
                numbers["shared"] / 1024,
                blocks,
                numbers["tensor_cores"],
                f"{numbers['wide_loads']} of {numbers['loads']}",
            )
        )
    if not rows:
        raise ReportError(f"{path}: no records")
    table = [
        "| kernel | dtype | configuration | sm | warps | stages | triton | registers | spills | shared, kB "
        "| blocks per SM | tensor-core instructions | 128-bit loads |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows):
        cells = [f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row]
        table.append("| " + " | ".join(cells) + " |")
    table += ["", "Compiled ahead of time; nothing here ran."]
    return "\n".join(table) + "\n"


def _configuration(constants: dict[str, Any]) -> str:
    """Head dims, tiles and cases; strides and tables of numbers say nothing about a configuration."""
    shown = []
    for key, value in sorted(constants.items()):
        if value is True:
            shown.append(key)
        elif type(value) is int and not key.startswith("STRIDE"):
            shown.append(f"{key}={value}")
    return " ".join(shown)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("table", "plot"):
        command = commands.add_parser(name)
        command.add_argument("files", type=Path, nargs="+")
        command.add_argument("--output", type=Path, required=name == "plot")
    command = commands.add_parser("gate")
    command.add_argument("records", type=Path)
    command.add_argument("--output", type=Path)
    command = commands.add_parser("compare")
    command.add_argument("old", type=Path)
    command.add_argument("new", type=Path)
    command.add_argument("--threshold", type=float, default=5.0, help="per cent, default 5")
    options = parser.parse_args(arguments)
    try:
        if options.command == "compare":
            lines, regressions = compare(load(options.old), load(options.new), options.threshold)
            print("\n".join(lines))
            return int(regressions > 0)
        if options.command == "gate":
            text = gate_table(options.records)
        else:
            results = [load(path) for path in options.files]
            if options.command == "plot":
                plot(results, options.output)
                return 0
            text = table(results)
        if options.output:
            options.output.write_text(text, encoding="utf-8")
        else:
            print(text, end="")
    except ReportError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
