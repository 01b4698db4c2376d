"""The report of `scamo evaluate`: one JSON file, and a Markdown table in the order of the paper's Tab. 6.

protocol, split, dataset, evaluator, settings, interval    what was measured, by what, and how
rows        name and metrics: {metric: {"value", "low", "high"}}; low and high None without an interval
chance      R-precision of motions that have nothing to do with their sentences
left_out    metric: why it could not be measured; it has no number anywhere
caveats     metric: what to mind when comparing it
generated   motions, and how many ran into the length limit
model_sha256    of the transformer, and of the tokenizer's weights and config.json; None without a model
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scamo.motion.files import replacing

FORMAT = "scamo-evaluation-1"

# Metric: heading, digits, factor. The arrow says which way is better; diversity should be that of real data.
MAIN = {
    "fid": ("FID ↓", 3, 1),
    "r_precision_1": ("R@1 ↑", 3, 1),
    "r_precision_2": ("R@2 ↑", 3, 1),
    "r_precision_3": ("R@3 ↑", 3, 1),
    "matching": ("Matching ↓", 3, 1),
    "diversity": ("Diversity →", 3, 1),
    "multimodality": ("MModality", 3, 1),
    "cosine": ("Cosine ↑", 3, 1),
    "cosine_r_precision_1": ("R@1 of 100 ↑", 3, 1),
    "cosine_r_precision_3": ("R@3 of 100 ↑", 3, 1),
}
MOTION = {
    "foot_skate": ("Foot skate, %", 1, 100),
    "foot_penetration_mm": ("Penetration, mm", 1, 1),
    "jerk": ("Jerk, m/s³", 0, 1),
    "bone_drift": ("Bone drift, %", 2, 100),
    "mpjpe_mm": ("MPJPE, mm", 1, 1),
    "velocity_error_mm_s": ("Velocity error, mm/s", 0, 1),
    "acceleration_error_mm_s2": ("Acceleration error, mm/s²", 0, 1),
}


def write_report(report: dict[str, Any], target: Path) -> list[Path]:
    """Write TARGET.json and TARGET.md, each whole or not at all; returns them."""
    paths = [target.with_name(target.name + suffix) for suffix in (".json", ".md")]
    target.parent.mkdir(parents=True, exist_ok=True)
    for path, text in zip(
        paths, (json.dumps(report, indent=1, allow_nan=False) + "\n", summary(report) + "\n"), strict=True
    ):
        with replacing(path) as partial:
            partial.write_text(text, encoding="utf-8")
    return paths


def summary(report: dict[str, Any]) -> str:
    """The report as Markdown: what was measured, the main table, the table of motions, and what to mind."""
    data, evaluator, settings = report["dataset"], report["evaluator"], report["settings"]
    lines = [
        f"Protocol {report['protocol']}, {report['split']} split of {data['name']}: {data['items_used']:,d} "
        f"of {data['items']:,d} items of {data['source_clips']:,d} clips. Evaluator {evaluator['name']} "
        f"({evaluator['kind']}, {evaluator['sha256'][:12]}). Intervals: {report['interval']}.",
        "",
        *table(report, MAIN),
        "",
        *table(report, MOTION),
        "",
    ]
    if report["protocol"] == "humanml3d":
        lines.append("- Measures of motion: the first repeat, 95% bootstrap over source clips.")
    chance = ", ".join(f"{value:.3f}" for value in report["chance"].values())
    lines.append(f"- Chance of R@1, 2, 3 in pools of {settings['pool']}: {chance}.")
    made = report["generated"]
    if made["motions"]:
        how = "greedy" if settings["greedy"] else f"temperature {settings['temperature']:g}"
        how += f", top-k {settings['top_k']}" if settings["top_k"] else ""
        how += f", top-p {settings['top_p']:g}" if settings["top_p"] < 1 else ""
        lines.append(
            f"- {made['motions']:,d} motions generated ({how}, seed {settings['seed']}), "
            f"{made['at_the_length_limit']:,d} up to the length limit."
        )
    if report.get("model_sha256"):
        hashes = ", ".join(
            f"{name.replace('_', ' ')} {digest[:12]}" for name, digest in report["model_sha256"].items()
        )
        lines.append(f"- SHA-256 of the model: {hashes}.")
    for what, entries in (("left out", report["left_out"]), ("mind", report["caveats"])):
        lines += [f"- {name}, {what}: {why}." for name, why in entries.items()]
    if data["items_filtered"]:
        lines.append(f"- {data['items_filtered']:,d} items are too short or too long for the protocol.")
    met = report.get("test_split_met", 0)
    if met > 1:
        lines.append(f"- This run has met this test split {met} times.")
    return "\n".join(lines)


def table(report: dict[str, Any], columns: dict[str, tuple[str, int, int]]) -> list[str]:
    """Markdown lines of the columns that any row has."""
    shown = {
        key: column for key, column in columns.items() if any(key in r["metrics"] for r in report["rows"])
    }
    if not shown:
        return []
    lines = ["| | " + " | ".join(heading for heading, _, _ in shown.values()) + " |"]
    lines.append("|---|" + "---|" * len(shown))
    for row in report["rows"]:
        cells = [_cell(row["metrics"].get(key), digits, factor) for key, (_, digits, factor) in shown.items()]
        lines.append(f"| {row['name']} | " + " | ".join(cells) + " |")
    return lines


def _cell(metric: dict[str, float | None] | None, digits: int, factor: int) -> str:
    if metric is None or metric["value"] is None:
        return "–"
    values: Sequence[float | None] = (metric["value"], metric["low"], metric["high"])
    value, low, high = (float("nan") if one is None else one * factor for one in values)
    text = f"{value:.{digits}f}"
    if metric["low"] is None:
        return text
    if abs((high + low) / 2 - value) < 1e-9 * max(1.0, abs(value)):  # symmetric: from repeats
        return f"{text} ±{(high - low) / 2:.{digits}f}"
    return f"{text} ({low:.{digits}f}–{high:.{digits}f})"
