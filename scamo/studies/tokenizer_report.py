"""What the tokenizers of a study say of the paper's claims (RQ1): judged, tabled and drawn.

Its Fig. 6, FSQ against VQ over the size of the codebook; distortion over bits per second for all families.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from scamo.errors import ScaMoError
from scamo.motion.files import replacing
from scamo.studies.plots import as_html, colours, figure, write_page, write_pictures
from scamo.tokenizers.evaluate import COLLAPSE_SHARE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FAMILIES = ("fsq", "vq", "grouped_fsq", "residual_fsq", "residual_vq")
# What every line of results.jsonl has.
NEEDED = (
    "cell", "family", "size", "seed", "tokenizer", "training", "codes", "indices_per_token",
    "bits_per_second", "l1", "exp_entropy", "utilisation", "tokens", "collapsed", "motions", "frames",
    "frames_seen", "clips", "precision", "torch", "dataset", "evaluator", "split",
)  # fmt: skip
# Metric: name, unit, digits, and which way is better.
METRICS = {
    "l1": ("L1", "", 4, -1),
    "fid": ("FID", "", 3, -1),
    "mpjpe_mm": ("MPJPE", "mm", 1, -1),
    "exp_entropy": ("exp. entropy", "codes", 0, 1),
    "utilisation": ("utilisation", "", 3, 1),
}
# On clips that were trained on: errors of a sample, the use of codes of the whole split.
TRAIN = ("train_l1", "train_mpjpe_mm", "train_tokens", "train_utilisation", "train_exp_entropy")
# From here on the paper's VQ collapses on HumanML3D, and its FSQ is the better one.
LARGE = 4096
# The paper's FSQ uses at least this share of every codebook up to 2^14.
FULL = 0.97
# Sizes below which an order says nothing: four in order by chance are 1 of 24.
ORDERED = 4
HOLDS, FAILS, UNTOLD = "holds", "does not hold", "cannot be told"

# HumanML3D (its Tab.) and MotionUnion: size: (L1, FID, MPJPE mm, exp. entropy, utilisation); None: not given.
PAPER: dict[str, dict[str, dict[int, tuple[float | None, ...]]]] = {
    "HumanML3D": {
        "fsq": {
            256: (0.081, 0.159, 57, 213, 1.00),
            512: (0.075, 0.129, 53, 446, 1.00),
            1024: (0.0713, 0.106, 52, 724, 1.00),
            4096: (0.064, 0.088, 49, 2760, 0.998),
            16384: (0.053, 0.052, 44, 10119, 0.976),
            65536: (0.051, 0.049, 42, 33818, 0.764),
        },
        "vq": {
            256: (0.071, 0.12, 50, 171, 1.00),
            512: (0.065, 0.10, 50, 364, 1.00),
            1024: (0.062, 0.09, 50, 705, 0.99),
            2048: (0.060, 0.08, 50, 1146, 0.97),
            4096: (0.078, 0.78, 90, 148, 0.69),
            8192: (0.083, 21.8, 170, 82, 0.81),
            32768: (0.076, 5.05, 110, 1029, 0.63),
        },
    },
    "MotionUnion": {
        "fsq": {
            256: (0.049, None, 47.3, None, None),
            512: (0.046, None, 44.7, None, None),
            1024: (0.045, None, 43.4, None, None),
            2048: (0.042, None, 41.6, None, None),
            4096: (0.041, None, 40.7, None, None),
            16384: (0.037, None, 37.9, None, None),
            65536: (0.034, None, 36.6, None, None),
        },
        "vq": {
            256: (0.050, None, 49.7, None, None),
            512: (0.047, None, 47.9, None, None),
            1024: (0.045, None, 45.9, None, None),
            2048: (0.044, None, 60.1, None, None),
            4096: (0.044, None, 42.4, None, None),
            8192: (0.045, None, 43.5, None, None),
            16384: (0.077, None, 62.2, None, None),
            32768: (0.054, None, 48.5, None, None),
        },
    },
}


@dataclass(frozen=True)
class Point:
    """A quantiser with its seeds averaged. values: means by metric; runs: the values of each seed."""

    family: str
    size: int
    codes: int
    indices: int
    label: str
    bits: float
    n: int  # tokens of the split, of one index
    seeds: int
    collapsed: bool
    values: dict[str, float]
    runs: dict[str, list[float]]

    @property
    def most(self) -> int:
        """The largest exponential entropy that n tokens can have."""
        return min(self.codes, self.n)

    @property
    def n_train(self) -> int:
        """As n, of the whole train split; 0 where it is not known."""
        return round(self.values.get("train_tokens", 0)) // self.indices

    @property
    def share(self) -> float:
        return self.values["exp_entropy"] / self.most

    @property
    def ceiling(self) -> float:
        """The largest utilisation that n tokens can have."""
        return min(1.0, self.n / self.codes)

    @property
    def uniform(self) -> float:
        return even_use(self.codes, self.n)


def even_use(codes: int, n: int) -> float:
    """The expected utilisation of n tokens if all codes were equally likely: 1 - (1 - 1/codes)^n."""
    return -math.expm1(n * math.log1p(-1 / codes)) if codes > 1 else 1.0


@dataclass(frozen=True)
class Claim:
    """A claim of the paper. verdict: "holds", "does not hold" or "cannot be told ..."; numbers: why."""

    text: str
    verdict: str
    numbers: tuple[str, ...]


def read_results(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a results.jsonl of this study.

    Raises ScaMoError that names the file and line: unreadable, without a field, or lines that do not compare
    (of two datasets, splits or evaluators).
    """
    path = Path(path)
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise ScaMoError(f"{path}: cannot be read: {error}") from None
    if not lines:
        raise ScaMoError(f"{path}: no finished cell")
    for number, line in enumerate(lines, 1):
        missing = [key for key in NEEDED if not isinstance(line, dict) or key not in line]
        if missing:
            raise ScaMoError(f"{path}: line {number}: {', '.join(missing)} missing")
        for key in ("dataset", "split", "evaluator"):
            if line[key] != lines[0][key]:
                raise ScaMoError(
                    f"{path}: {line['cell']} has {key} {line[key]}, {lines[0]['cell']} {lines[0][key]}: "
                    "results of the two do not compare"
                )
    return lines


def points_of(results: Sequence[dict[str, Any]]) -> list[Point]:
    """One point a quantiser, ordered by family and bits."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for line in results:
        label = line["cell"].removesuffix(f"-s{line['seed']}").removeprefix(line["family"] + "-")
        groups.setdefault((line["family"], line["size"], label), []).append(line)
    keys = (*METRICS, *TRAIN, "velocity_mm_s", "acceleration_mm_s2", "train_seconds")
    points = []
    for (family, size, label), lines in groups.items():
        runs = {key: [line[key] for line in lines if line.get(key) is not None] for key in keys}
        runs = {key: values for key, values in runs.items() if len(values) == len(lines)}
        first = lines[0]
        points.append(
            Point(
                family=family,
                size=size,
                codes=first["codes"],
                indices=first["indices_per_token"],
                label=label,
                bits=first["bits_per_second"],
                n=first["tokens"] // first["indices_per_token"],
                seeds=len(lines),
                collapsed=any(line["collapsed"] for line in lines),
                values={key: float(np.mean(values)) for key, values in runs.items()},
                runs=runs,
            )
        )
    return sorted(points, key=lambda p: (FAMILIES.index(p.family), p.bits, p.size))


def claims(points: Sequence[Point]) -> list[Claim]:
    """What the paper says of tokenizers, judged from the points."""
    fsq, vq = ([p for p in points if p.family == family] for family in ("fsq", "vq"))
    return [
        _vq_collapses(vq),
        _fsq_does_not(fsq),
        _fsq_is_used(fsq),
        *_fsq_improves(fsq),
        *_fsq_beats_vq(fsq, vq),
    ]


def _shares(points: Sequence[Point]) -> tuple[str, ...]:
    return tuple(_share(p) for p in points)


def _share(p: Point) -> str:
    text = f"{p.size:,d}: exp. entropy {p.values['exp_entropy']:,.0f} of at most {p.most:,d}, {p.share:.1%}"
    if p.share < COLLAPSE_SHARE:
        text += ", collapsed"
    if p.n_train:
        most, seen = min(p.codes, p.n_train), p.values["train_exp_entropy"]
        text += f"; on the train split {seen:,.0f} of at most {most:,d}, {seen / most:.1%}"
    return text


def _can_collapse(point: Point) -> bool:
    # exp. entropy is never below 1.
    return point.most * COLLAPSE_SHARE > 1


def _vq_collapses(vq: Sequence[Point]) -> Claim:
    text = (
        f"VQ collapses at large codebooks (more than half of those from {LARGE:,d} codes on have an exp. "
        f"entropy below {COLLAPSE_SHARE:.0%} of min(codes, tokens))"
    )
    large = [p for p in vq if p.size >= LARGE and _can_collapse(p)]
    if len(large) < 2:
        return Claim(text, f"{UNTOLD} (n too small: {len(large)} such sizes)", _shares(vq))
    collapsed = sum(p.share < COLLAPSE_SHARE for p in large)
    numbers = (*_shares(vq), f"{collapsed} of {len(large)} large codebooks have collapsed")
    return Claim(text, HOLDS if 2 * collapsed > len(large) else FAILS, numbers)


def _fsq_does_not(fsq: Sequence[Point]) -> Claim:
    text = f"FSQ collapses at no size (exp. entropy from {COLLAPSE_SHARE:.0%} of min(codes, tokens) on)"
    told = [p for p in fsq if _can_collapse(p)]
    if not any(p.size >= LARGE for p in told):
        return Claim(text, f"{UNTOLD} (n too small: no codebook from {LARGE:,d} on)", _shares(fsq))
    held = all(p.share >= COLLAPSE_SHARE for p in told)
    return Claim(text, HOLDS if held else FAILS, _shares(fsq))


def _fsq_is_used(fsq: Sequence[Point]) -> Claim:
    text = (
        f"FSQ uses at least {FULL:.0%} of its codes up to 2^14 (judged where even use would show as many in "
        "this split)"
    )
    numbers = tuple(_use(p) for p in fsq)
    told = [p for p in fsq if p.size <= 2**14 and p.uniform >= FULL]
    if not told:
        return Claim(text, f"{UNTOLD} (n too small)", numbers)
    held = all(p.values["utilisation"] >= FULL for p in told)
    untold = [f"{p.size:,d}" for p in fsq if p.size <= 2**14 and p not in told]
    rest = f"; at {', '.join(untold)} it {UNTOLD} (n too small)" if untold else ""
    return Claim(
        text, f"{HOLDS if held else FAILS} at {', '.join(f'{p.size:,d}' for p in told)}{rest}", numbers
    )


def _use(p: Point) -> str:
    text = (
        f"{p.size:,d}: {p.values['utilisation']:.3f} of {p.codes:,d} codes in {p.n:,d} tokens; even use "
        f"{p.uniform:.3f}, ceiling {p.ceiling:.3f}{'' if p.uniform >= FULL else ', n too small'}"
    )
    if p.n_train:
        even = even_use(p.codes, p.n_train)
        text += (
            f"; on the train split {p.values['train_utilisation']:.3f} in {p.n_train:,d}, even use {even:.3f}"
        )
    return text


def _fsq_improves(fsq: Sequence[Point]) -> list[Claim]:
    from scipy.stats import spearmanr

    made = []
    for key in ("l1", "mpjpe_mm"):
        name, _, digits, _ = METRICS[key]
        text = f"FSQ has a lower {name} with every larger codebook (Spearman's rho of size and {name} is -1)"
        chosen = [p for p in fsq if key in p.values]
        numbers = [f"{p.size:,d}: {p.values[key]:.{digits}f}" for p in chosen]
        if len(chosen) < ORDERED:
            made.append(Claim(text, f"{UNTOLD} (n too small: {len(chosen)} sizes)", tuple(numbers)))
            continue
        sizes, values = [p.codes for p in chosen], [p.values[key] for p in chosen]
        rho = float(spearmanr(sizes, values).statistic)
        numbers.append(f"rho {rho:.3f} over {len(chosen)} sizes")
        if all(f"train_{key}" in p.values for p in chosen):
            seen = float(spearmanr(sizes, [p.values[f"train_{key}"] for p in chosen]).statistic)
            numbers.append(f"on the clips it was trained on: rho {seen:.3f}")
        falls = all(later < before for before, later in pairwise(values))
        made.append(Claim(text, HOLDS if falls else FAILS, tuple(numbers)))
    return made


def _fsq_beats_vq(fsq: Sequence[Point], vq: Sequence[Point]) -> list[Claim]:
    pairs = [(a, b) for a in fsq for b in vq if a.size == b.size]
    made = []
    for key, (name, _, digits, sign) in METRICS.items():
        text = f"FSQ beats VQ in {name} at all common sizes from {LARGE:,d} codes on"
        known = [(a, b) for a, b in pairs if key in a.values and key in b.values]
        better = {a.size: sign * (a.values[key] - b.values[key]) > 0 for a, b in known}
        numbers = [
            f"{a.size:,d}: FSQ {a.values[key]:.{digits}f}, VQ {b.values[key]:.{digits}f}"
            f"{_overlap(a.runs[key], b.runs[key])}"
            for a, b in known
        ]
        wins = [f"{size:,d}" for size, won in better.items() if won]
        numbers.append(f"FSQ is better at {', '.join(wins) or 'none'} ({len(wins)} of {len(known)} sizes)")
        large = [won for size, won in better.items() if size >= LARGE]
        if len(large) < 2:
            verdict = f"{UNTOLD} (n too small: {len(large)} such sizes)"
        else:
            verdict = HOLDS if all(large) else FAILS
        made.append(Claim(text, verdict, tuple(numbers)))
    return made


def _overlap(one: Sequence[float], other: Sequence[float]) -> str:
    """Two seeds or more show whether the difference may be one of seeds."""
    if min(len(one), len(other)) < 2:
        return ""
    return ", the seeds overlap" if max(min(one), min(other)) <= min(max(one), max(other)) else ""


def front(points: Sequence[Point], key: str) -> list[Point]:
    """The points that no other of no more bits equals or betters, by bits."""
    known = sorted((p for p in points if key in p.values), key=lambda p: (p.bits, p.values[key]))
    best, kept = math.inf, []
    for point in known:
        if point.values[key] < best:
            best = point.values[key]
            kept.append(point)
    return kept


# -- report --------------------------------------------------------------------------------------------------


def report_tokenizer_study(out: str | Path, to: str | Path | None = None) -> list[Path]:
    """Draw a study from OUT/results.jsonl: fig6, usage, rate and paper .png, report.md and report.html.

    to: the folder to write into, OUT without it. Returns the files written. Raises ScaMoError as
    `read_results`.
    """
    results = read_results(Path(out) / "results.jsonl")
    folder = Path(to) if to is not None else Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    points = points_of(results)
    drawn: dict[str, tuple[str, Callable[[Sequence[Point]], Figure | None]]] = {
        "fig6": ("FSQ against VQ over the size of the codebook", _fig6),
        "usage": ("How the codebooks are used", _usage),
        "rate": ("Distortion over bits per second of motion", _rate),
        "paper": (
            "The paper's numbers: other data and another network, not to be compared line by line",
            _paper,
        ),
    }
    figures = {name: (title, draw(points)) for name, (title, draw) in drawn.items()}
    kept = {name: (title, made) for name, (title, made) in figures.items() if made is not None}
    written, pictures = write_pictures(folder, kept)
    text = markdown(results)
    with replacing(folder / "report.md") as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    page = write_page(folder / "report.html", "Tokenizers", as_html(text) + "\n" + pictures)
    return [*written, folder / "report.md", page]


def markdown(results: Sequence[dict[str, Any]]) -> str:
    """The report's text: what was measured, the claims, all numbers, and the paper's beside them."""
    points, first = points_of(results), results[0]
    evaluator = first["evaluator"]
    lines = [
        "# Tokenizers",
        "",
        f"{len(results)} trainings, {len(points)} quantisers. Dataset {first['dataset']['name']} "
        f"({first['dataset']['manifest_sha256'][:12]}), reported on its {first['split']} split: "
        f"{first['motions']:,d} motions, {first['frames']:,d} frames, {points[0].n:,d} tokens. "
        + (
            f"FID by evaluator {evaluator['name']} ({evaluator['sha256'][:12]}): comparable with no other "
            "evaluator's."
            if evaluator
            else "No FID: no evaluator."
        ),
        "",
        *_recipe(results),
        "",
        "## Claims of the paper, judged here",
        "",
    ]
    judged = claims(points)
    lines += ["| claim | verdict |", "|---|---|", *(f"| {c.text} | {c.verdict} |" for c in judged), ""]
    for claim in judged:
        lines += [f"{claim.text}: {claim.verdict}.", "", *(f"- {number}" for number in claim.numbers), ""]
    if all(point.seeds == 1 for point in points):
        lines += ["One seed each: a small difference between two cells may be chance.", ""]
    lines += ["## Results", "", *_results_table(points), ""]
    for key in ("mpjpe_mm", "l1"):
        best = ", ".join(f"{p.family} {p.label} ({p.bits:.0f} bits/s)" for p in front(points, key))
        if best:
            lines += [f"No other has a lower {METRICS[key][0]} at no more bits: {best}.", ""]
    lines += [
        "Utilisation: the share of the codes that occur in the split; with fewer tokens than codes it cannot "
        "reach 1. Even use: the expected utilisation of as many tokens if all codes were equally likely. "
        "Several indices a token: means over them. Train: errors on as many clips of the train split, and "
        "the use of codes on all of it. With more codes than tokens the exp. entropy is at most the tokens: "
        "its share then hides a part of a collapse.",
        "",
        "## The paper's numbers",
        "",
        "Other datasets and another network: only the shapes of the curves are to be compared.",
        "",
        *_paper_table(),
    ]
    return "\n".join(lines)


def _recipe(results: Sequence[dict[str, Any]]) -> list[str]:
    """What all trainings share, and in what they differ."""
    networks, trainings = ([line[key] for line in results] for key in ("tokenizer", "training"))
    network, training = networks[0], trainings[0]
    frames = sorted({line["frames_seen"] for line in results})
    seen = f"{frames[0]:,d}" if len(frames) == 1 else f"{frames[0]:,d} to {frames[-1]:,d}"
    lines = [
        f"Network: width {network['width']}, latent width {network['latent_width']}, depth "
        f"{network['depth']}, {2 ** network['downsample_stages']} frames a token. Training: "
        f"{training['steps']:,d} steps of {training['batch_size']} windows of {training['window']} frames, "
        f"{seen} frames seen of {results[0]['clips']:,d} clips; {results[0]['precision']}, torch "
        f"{results[0]['torch']}.",
    ]
    resets: dict[str, list[str]] = {}
    for line in results:
        below, latents = line["training"]["reset_below"], _latents_a_step(line)
        if below and line["tokenizer"]["quantizer"] == "vq":
            text = (
                f"a code chosen less often than {below:g} times a step is reset; a step has {latents:,d} "
                f"latents, so no more than {latents / below:,.0f} codes of a codebook can stay"
            )
            resets.setdefault(text, []).append(line["family"])
    lines += [
        text for what, who in resets.items() for text in ("", f"{', '.join(sorted(set(who)))}: {what}.")
    ]
    keys = {key for one in trainings for key in one} - {"seed"}
    for key in sorted(keys):
        if len({json.dumps(one.get(key)) for one in trainings}) == 1:
            continue
        values: dict[str, set[str]] = {}
        for line, one in zip(results, trainings, strict=True):
            values.setdefault(line["family"], set()).add(json.dumps(one.get(key)))
        shown = ", ".join(f"{family} {' / '.join(sorted(found))}" for family, found in values.items())
        lines += ["", f"Not the same for all, {key}: {shown}."]
    return lines


def _latents_a_step(line: dict[str, Any]) -> int:
    training = line["training"]
    return training["batch_size"] * training["window"] // 2 ** line["tokenizer"]["downsample_stages"]


def _results_table(points: Sequence[Point]) -> list[str]:
    columns: list[tuple[str, Callable[[Point], str]]] = [
        ("family", lambda p: p.family),
        ("size", lambda p: p.label),
        ("codes", lambda p: f"{p.codes:,d}"),
        ("indices", lambda p: str(p.indices)),
        ("bits/s", lambda p: f"{p.bits:.1f}"),
        ("seeds", lambda p: str(p.seeds)),
        ("L1", lambda p: _value(p, "l1", 4)),
        ("L1 train", lambda p: _value(p, "train_l1", 4)),
        ("FID", lambda p: _value(p, "fid", 3)),
        ("MPJPE mm", lambda p: _value(p, "mpjpe_mm", 1)),
        ("MPJPE train", lambda p: _value(p, "train_mpjpe_mm", 1)),
        ("velocity mm/s", lambda p: _value(p, "velocity_mm_s", 0)),
        ("acceleration mm/s²", lambda p: _value(p, "acceleration_mm_s2", 0)),
        ("utilisation", lambda p: _value(p, "utilisation", 3)),
        ("even use", lambda p: f"{p.uniform:.3f}"),
        ("ceiling", lambda p: f"{p.ceiling:.3f}"),
        ("utilisation train", lambda p: _value(p, "train_utilisation", 3)),
        ("exp. entropy", lambda p: _value(p, "exp_entropy", 0)),
        ("share", lambda p: f"{p.share:.1%}"),
        ("collapsed", lambda p: "yes" if p.collapsed else ""),
        ("s to train", lambda p: _value(p, "train_seconds", 0)),
    ]
    lines = ["| " + " | ".join(name for name, _ in columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(show(point) for _, show in columns) + " |" for point in points]
    return lines


def _value(point: Point, key: str, digits: int) -> str:
    return f"{point.values[key]:,.{digits}f}" if key in point.values else "–"


def _paper_table() -> list[str]:
    lines = [
        "| paper's data | family | size | L1 | FID | MPJPE mm | exp. entropy | utilisation |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for data, families in PAPER.items():
        for family, rows in families.items():
            for size, values in rows.items():
                cells = " | ".join("–" if value is None else f"{value:,g}" for value in values)
                lines.append(f"| {data} | {family} | {size:,d} | {cells} |")
    return lines


_SHADES = {"fsq": "#2878b5", "vq": "#b9305a"}


def _of(points: Sequence[Point], family: str, key: str) -> tuple[list[int], list[float]]:
    known = [p for p in points if p.family == family and key in p.values]
    return [p.codes for p in known], [p.values[key] for p in known]


def _axis_label(key: str) -> str:
    name, unit, *_ = METRICS[key]
    return f"{name}, {unit}" if unit else name


def _size_axis(axes: Axes, key: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set(xlabel="codes", ylabel=_axis_label(key))
    axes.grid(alpha=0.3)


def _fig6(points: Sequence[Point]) -> Figure | None:
    """L1, FID, MPJPE and exponential entropy of FSQ and VQ; dashed: on clips that were trained on."""
    both = [p for p in points if p.family in _SHADES]
    if not both:
        return None
    keys = [key for key in METRICS if key != "utilisation" and any(key in p.values for p in both)]
    drawn = figure(10, 3.6 * math.ceil(len(keys) / 2))
    for k, key in enumerate(keys):
        axes = drawn.add_subplot(math.ceil(len(keys) / 2), 2, k + 1)
        for family, shade in _SHADES.items():
            x, y = _of(points, family, key)
            axes.plot(x, y, "o-", color=shade, markersize=4, label=family.upper())
            seen = _of(points, family, f"train_{key}")
            if seen[0]:
                axes.plot(
                    *seen, "--", color=shade, linewidth=1, alpha=0.6, label=f"{family.upper()}, train clips"
                )
        if key == "exp_entropy":
            sizes = sorted(p.codes for p in both)
            axes.plot(sizes, sizes, ":", color="black", linewidth=1, label="codes")
            axes.axhline(both[0].n, color="grey", linewidth=1, label=f"{both[0].n:,d} tokens")
        if key in ("fid", "exp_entropy"):
            axes.set_yscale("log")
        _size_axis(axes, key)
        axes.legend(fontsize=7)
    return drawn


def _usage(points: Sequence[Point]) -> Figure | None:
    """Exponential entropy as a share of its most, and utilisation beside that of even use."""
    both = [p for p in points if p.family in _SHADES]
    if not both:
        return None
    drawn = figure(10, 3.6)
    left, right = drawn.add_subplot(1, 2, 1), drawn.add_subplot(1, 2, 2)
    for family, shade in _SHADES.items():
        chosen = [p for p in both if p.family == family]
        x = [p.codes for p in chosen]
        left.plot(x, [p.share for p in chosen], "o-", color=shade, markersize=4, label=family.upper())
        right.plot(
            x,
            [p.values["utilisation"] for p in chosen],
            "o-",
            color=shade,
            markersize=4,
            label=family.upper(),
        )
    even = sorted(both, key=lambda p: p.codes)
    right.plot([p.codes for p in even], [p.uniform for p in even], ":", color="black", label="even use")
    left.axhline(COLLAPSE_SHARE, color="grey", linestyle=":", label="collapsed below")
    for axes in (left, right):
        _size_axis(axes, "utilisation")
        axes.set_ylim(0, 1.02)
        axes.legend(fontsize=7)
    left.set_ylabel("exp. entropy / min(codes, tokens)")
    return drawn


def _rate(points: Sequence[Point]) -> Figure | None:
    """MPJPE and L1 of all families over bits per second."""
    keys = [key for key in ("mpjpe_mm", "l1") if any(key in p.values for p in points)]
    families = [family for family in FAMILIES if any(p.family == family for p in points)]
    shades = dict(zip(families, colours(range(len(families))).values(), strict=True)) | _SHADES
    drawn = figure(5.5 * len(keys), 4.2)
    for k, key in enumerate(keys):
        axes = drawn.add_subplot(1, len(keys), k + 1)
        for family in families:
            chosen = [p for p in points if p.family == family and key in p.values]
            line = "o-" if family in _SHADES else "s--"
            axes.plot(
                [p.bits for p in chosen],
                [p.values[key] for p in chosen],
                line,
                color=shades[family],
                markersize=4,
                label=family.replace("_", " "),
            )
            for p in chosen if family not in _SHADES else ():
                axes.annotate(
                    p.label, (p.bits, p.values[key]), fontsize=6, xytext=(3, 3), textcoords="offset points"
                )
        axes.set(xlabel="bits per second of motion", ylabel=_axis_label(key))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    return drawn


def _paper(_: Sequence[Point]) -> Figure:
    """The paper's curves alone."""
    drawn = figure(10, 7.2)
    drawn.suptitle("The paper's own numbers: other data, another network", fontsize=10)
    for k, key in enumerate(("l1", "fid", "mpjpe_mm", "exp_entropy")):
        column = list(METRICS).index(key)
        axes = drawn.add_subplot(2, 2, k + 1)
        for data, families in PAPER.items():
            for family, rows in families.items():
                known = [(size, row[column]) for size, row in rows.items() if row[column] is not None]
                if known:
                    style = "-" if data == "HumanML3D" else "--"
                    label = f"{family.upper()}, {data}"
                    axes.plot(
                        *zip(*known, strict=True), style, color=_SHADES[family], alpha=0.35, label=label
                    )
        if key in ("fid", "exp_entropy"):
            axes.set_yscale("log")
        _size_axis(axes, key)
        axes.legend(fontsize=7)
    return drawn
