"""`scamo compare`: what several models make of the same prompts, and which of their differences are real.

Every model generates from the same prompts with the same seeds, so the comparison is paired: a difference is
taken per prompt and then averaged, which removes what is hard or easy about a prompt. The prompt is the unit
of every interval (percentile bootstrap, Efron 1979) and every test (random signs, Fisher 1935); further
generations of a prompt are averaged before. The p-values of a table are adjusted for their number (Holm
1979).
"""

from __future__ import annotations

import html
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from tqdm import tqdm

from scamo.data.storage import file_record, whole_folder, write_manifest
from scamo.errors import ScaMoError
from scamo.evaluation.evaluator import held
from scamo.evaluation.metrics import bootstrap_interval, expected_r_precision, normalised
from scamo.evaluation.prompt_files import Prompt, load_prompt_file
from scamo.motion.measures import physics

if TYPE_CHECKING:
    from scamo.evaluation.evaluator import Evaluator
    from scamo.motion.motion import Motion

FORMAT = "scamo-comparison"
SCHEMA_VERSION = 1
POOL = 32  # of R-precision
LEVEL = 0.05  # a difference whose adjusted p is below counts as clear
FLIPS = 10_000
EXACT = 14  # up to this many differences every choice of signs is tried


@dataclass(frozen=True)
class Measure:
    """What is measured: its name, unit, the factor to that unit, and which way is better ("": neither)."""

    label: str
    unit: str = ""
    scale: float = 1.0
    digits: int = 3
    better: str = ""


TEXT_MEASURES = {
    "matching": Measure("Text–motion distance", better="lower"),
    "cosine": Measure("Text–motion cosine", better="higher"),
    "r_precision_1": Measure("R-precision, top 1", "%", 100, 1, "higher"),
    "r_precision_2": Measure("R-precision, top 2", "%", 100, 1, "higher"),
    "r_precision_3": Measure("R-precision, top 3", "%", 100, 1, "higher"),
}
MOTION_MEASURES = {
    "foot_skate": Measure("Foot skate", "%", 100, 1, "lower"),
    "foot_penetration_mm": Measure("Foot penetration", "mm", 1, 1, "lower"),
    "bone_drift": Measure("Bone drift", "%", 100, 2, "lower"),
    "jerk": Measure("Jerk", "m/s³", 1, 0, "lower"),
    "duration": Measure("Duration", "s", 1, 2),
    "at_limit": Measure("Ran into the length limit", "%", 100, 1),
}
MEASURES = TEXT_MEASURES | MOTION_MEASURES


@dataclass
class _Run:
    """A model in the comparison: where it is, what it is called, and what was measured of it."""

    path: Path
    name: str
    folder: str
    fps: float
    feature_dim: int
    max_motion: int
    weights: str
    values: dict[str, NDArray[np.float64]]  # measure -> (prompts,)
    motions: list[Motion]  # the first of each prompt
    stretched: int = 0


def compare(
    runs: Sequence[str | Path],
    prompts: str | Path | Sequence[Prompt],
    out: str | Path,
    *,
    evaluator: str | Path | None = None,
    seed: int = 0,
    samples: int = 1,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    greedy: bool = False,
    names: Sequence[str] | None = None,
    pictures: int = 24,
    batch_size: int = 32,
    device: str = "auto",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Generate from every prompt with every model, measure, and write OUT as a page with tables and players.

    Args:
        runs: training runs or exported models; the others are compared with the first.
        prompts: prompts, or what `load_prompt_file` reads.
        out: folder for index.html (opens from disk), report.json, table.md, motions/RUN/NNN.npz and
            manifest.json; written whole or not at all.
        evaluator: folder of the evaluator for the measures of text; without it there are none.
        seed: of the first generation of every prompt; the next ones have seed + 1, ...
        samples: generations per prompt.
        temperature, top_k, top_p, greedy: of the sampling, see scamo.generation.sampling.Sampling.
        names: of the runs; their folders' names without.
        pictures: number of prompts with players on the page, spread evenly over the groups.
        batch_size: sentences at a time.
        device: auto, cpu or cuda.
        overwrite: replace an older comparison.

    Returns:
        What report.json holds: "runs", "prompts", "sampling", "evaluator", "measures", "left_out" (measure ->
        why there is no number), "results" and "differences" ({"all": ..., "groups": {group: ...}}, by run and
        measure), "per_prompt".

    Raises:
        ScaMoError: no runs or prompts, names that are not one for each run, a run or evaluator that cannot be
            read, frame rates or features that differ, a bad option, or `out` exists.
    """
    out = Path(out)
    if isinstance(prompts, str | Path):
        prompts = load_prompt_file(prompts)
    prompts = list(prompts)
    _check_prompts(prompts)
    for option, value, least in (("samples", samples, 1), ("pictures", pictures, 0), ("seed", seed, 0)):
        if value < least:
            raise ScaMoError(f"{option} = {value}: expected at least {least}")
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "greedy": greedy}
    with whole_folder(out, overwrite=overwrite) as folder:
        entries = _entries(runs, names)
        judge = _judge(evaluator, entries, device)
        texts = [prompt.text for prompt in prompts]
        text_points = None
        if judge is not None:
            tags = [prompt.meta.get("tokens") for prompt in prompts]
            text_points = judge.embed_texts(texts, tags if any(tags) else None)
        for entry in entries:
            _generate_and_measure(
                entry,
                texts,
                folder / "motions" / entry.folder,
                judge,
                text_points,
                seeds=range(seed, seed + samples),
                device=device,
                batch_size=batch_size,
                sampling=sampling,
            )
        report = _report(entries, prompts, judge) | {
            "sampling": sampling | {"seed": seed, "samples": samples}
        }
        shown = spread([prompt.group for prompt in prompts], pictures)
        text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        (folder / "report.json").write_text(text, encoding="utf-8")
        (folder / "table.md").write_text(markdown(report), encoding="utf-8")
        (folder / "index.html").write_text(_page(report, entries, shown), encoding="utf-8")
        files = {
            str(path.relative_to(folder)): file_record(path)
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        write_manifest(folder, {"format": FORMAT, "schema_version": SCHEMA_VERSION, "files": files})
    return report


def _check_prompts(prompts: Sequence[Prompt]) -> None:
    if not prompts:
        raise ScaMoError("prompts: expected at least one")
    for index, prompt in enumerate(prompts):
        if not prompt.text.strip():
            raise ScaMoError(f"prompt {index} is empty")
    text, count = Counter(prompt.text for prompt in prompts).most_common(1)[0]
    if count > 1:
        raise ScaMoError(f"prompts: {text!r} stands there {count} times; a prompt counts once")


def _entries(runs: Sequence[str | Path], names: Sequence[str] | None) -> list[_Run]:
    """The runs, read as far as it takes to know that they can be compared: before any of them generates."""
    from scamo.generation.export import exported_folder, read_export, weights_file
    from scamo.tokenizers import load_tokenizer

    paths = [Path(run) for run in runs]
    if not paths:
        raise ScaMoError("runs: expected at least one")
    if names is None:
        # A run's export/ is called like the run.
        whole = [path.resolve() for path in paths]
        names = _distinct([(path.parent if path.name == "export" else path).name for path in whole])
    names = [" ".join(name.split()) for name in names]
    if len(names) != len(paths):
        raise ScaMoError(f"names: expected {len(paths)}, one for each run, got {len(names)}")
    if not all(names) or len(set(names)) < len(names):
        raise ScaMoError(f"names: expected different ones for each run, got {names}")
    entries: list[_Run] = []
    slugs = _distinct([re.sub(r"[^\w.-]+", "-", name).strip("-.") or "run" for name in names])
    for path, name, slug in zip(paths, names, slugs, strict=True):
        folder = exported_folder(path)
        description, config = read_export(folder)
        tokenizer = load_tokenizer(folder / "tokenizer")
        entry = _Run(
            path=path,
            name=name,
            folder=slug,
            fps=float(description["fps"]),
            feature_dim=tokenizer.config.feature_dim,
            max_motion=config.max_motion,
            weights=file_record(weights_file(folder))["sha256"],
            values={},
            motions=[],
        )
        first = entries[0] if entries else entry
        if (entry.fps, entry.feature_dim) != (first.fps, first.feature_dim):
            raise ScaMoError(
                f"{path}: {entry.feature_dim} features at {entry.fps:g} fps, but {first.path} has "
                f"{first.feature_dim} at {first.fps:g}: their motions cannot be compared"
            )
        entries.append(entry)
    return entries


def _distinct(names: Sequence[str]) -> list[str]:
    """The names, with -2, -3, ... after those that are taken already."""
    taken: list[str] = []
    for name in names:
        numbered = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
        taken.append(next(one for one in numbered if one not in taken))
    return taken


def _judge(evaluator: str | Path | None, entries: Sequence[_Run], device: str) -> Evaluator | None:
    if evaluator is None:
        return None
    from scamo.device import resolve_device
    from scamo.evaluation.evaluator import load_evaluator

    judge = load_evaluator(evaluator, resolve_device(device))
    first = entries[0]
    if judge.feature_dim != first.feature_dim or abs(judge.fps - first.fps) > 1e-6:
        raise ScaMoError(
            f"{evaluator}: evaluator of {judge.feature_dim} features at {judge.fps:g} fps, but {first.path} "
            f"makes {first.feature_dim} at {first.fps:g}"
        )
    return judge


def _generate_and_measure(
    entry: _Run,
    texts: list[str],
    folder: Path,
    judge: Evaluator | None,
    text_points: NDArray[np.float32] | None,
    *,
    seeds: range,
    device: str,
    batch_size: int,
    sampling: Mapping[str, Any],
) -> None:
    """Fill entry.values (means over the seeds) and entry.motions, and save every motion."""
    from scamo.generation.api import ScaMo

    model = ScaMo.load(entry.path, device=device)
    folder.mkdir(parents=True)
    values: dict[str, list[list[float]]] = {}
    for number, seed in enumerate(tqdm(seeds, desc=entry.name, unit="seed", dynamic_ncols=True)):
        motions = model.generate(texts, seed=seed, batch_size=batch_size, **sampling)
        rows = [measure_motion(motion, entry.max_motion) for motion in motions]
        made = {key: [row[key] for row in rows] for key in rows[0]}
        if judge is not None and text_points is not None:
            features = [np.asarray(motion.features) for motion in motions]
            short = [len(one) < judge.min_frames for one in features]
            entry.stretched += sum(short)
            motion_points = judge.embed_motions([held(one, judge.min_frames) for one in features])
            made = measure_text(text_points, motion_points) | made
        for key, column in made.items():
            values.setdefault(key, []).append(column)
        for index, motion in enumerate(motions):
            suffix = f"-{number}" if len(seeds) > 1 else ""
            motion.save(folder / f"{index:03}{suffix}.npz")
        if number == 0:
            entry.motions = motions
    entry.values = {key: np.mean(columns, axis=0) for key, columns in values.items()}


def measure_motion(motion: Motion, max_tokens: int) -> dict[str, float]:
    """The measures of MOTION_MEASURES of one motion; max_tokens: the length limit of its model."""
    assert motion.tokens is not None
    return physics(motion.joints, motion.fps) | {
        "duration": motion.duration,
        "at_limit": float(len(motion.tokens) >= max_tokens),
    }


def measure_text(text: ArrayLike, motion: ArrayLike) -> dict[str, list[float]]:
    """The measures of TEXT_MEASURES, a number per row, of paired points (N, d).

    R-precision is each row's probability of a hit over all pools of POOL; left out with fewer rows.
    """
    text, motion = np.asarray(text, dtype=np.float64), np.asarray(motion, dtype=np.float64)
    found = {
        "matching": np.linalg.norm(text - motion, axis=1),
        "cosine": (normalised(text) * normalised(motion)).sum(axis=1),
    }
    if len(text) >= POOL:
        hits = expected_r_precision(text, motion, top_k=3, pool=POOL)
        found |= {f"r_precision_{k + 1}": hits[:, k] for k in range(3)}
    return {key: column.tolist() for key, column in found.items()}


def sign_flip_p(differences: ArrayLike, *, flips: int = FLIPS, seed: int = 0) -> float:
    """Two-sided p-value of the mean of paired differences (N,), when their signs are as good as random.

    The share of choices of signs with a mean at least as far from 0: over all of them for up to EXACT
    differences other than 0, else over `flips` random ones and the one that was found (Phipson & Smyth 2010,
    so never 0). Differences that are all 0 give 1.
    """
    values = np.asarray(differences, dtype=np.float64)
    values = values[values != 0]
    if not len(values):
        return 1.0
    # Sums of the same numbers in another order are equal but for rounding.
    least = abs(values.sum()) - 1e-12 * np.abs(values).sum()
    if len(values) <= EXACT:
        signs = np.array(list(itertools.product((-1.0, 1.0), repeat=len(values))))
        return float((np.abs(signs @ values) >= least).mean())
    rng = np.random.default_rng(seed)
    far, step = 0, max(1, 2**20 // len(values))
    for start in range(0, flips, step):
        signs = 2.0 * rng.integers(0, 2, (min(step, flips - start), len(values))) - 1
        far += int((np.abs(signs @ values) >= least).sum())
    return (far + 1) / (flips + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number so that the chance of any false one stays below the level."""
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def spread(groups: Sequence[str], count: int) -> list[int]:
    """Up to `count` indices: as many of each group as possible, evenly spread within it, in order."""
    members: dict[str, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    quotas = dict.fromkeys(members, 0)
    left = min(count, len(groups))
    while left:
        for group in members:
            if left and quotas[group] < len(members[group]):
                quotas[group] += 1
                left -= 1
    chosen: list[int] = []
    for group, indices in members.items():
        places = np.linspace(0, len(indices) - 1, quotas[group]).round().astype(int)
        chosen += [indices[place] for place in places]
    return sorted(chosen)


def _mean_and_interval(values: NDArray[np.float64]) -> dict[str, Any]:
    """mean, low, high (None for a single prompt), n."""
    low, high = bootstrap_interval(values) if len(values) > 1 else (None, None)
    return {"mean": float(values.mean()), "low": low, "high": high, "n": len(values)}


def _scope(entries: Sequence[_Run], chosen: NDArray[np.bool_]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Results and differences over the chosen prompts, by run and measure."""
    first = entries[0]
    results: dict[str, Any] = {}
    differences: dict[str, Any] = {}
    for entry in entries:
        results[entry.name] = {k: _mean_and_interval(v[chosen]) for k, v in entry.values.items()}
        if entry is not first:
            paired = {key: (entry.values[key] - first.values[key])[chosen] for key in entry.values}
            differences[entry.name] = {
                key: _mean_and_interval(column) | {"p": sign_flip_p(column)} for key, column in paired.items()
            }
    tests = [test for by_measure in differences.values() for test in by_measure.values()]
    for test, adjusted in zip(tests, holm([test["p"] for test in tests]), strict=True):
        test["p_holm"] = adjusted
    return results, differences


def _report(entries: Sequence[_Run], prompts: Sequence[Prompt], judge: Evaluator | None) -> dict[str, Any]:
    groups = Counter(prompt.group for prompt in prompts)
    where = np.array([prompt.group for prompt in prompts])
    results, differences = _scope(entries, np.ones(len(prompts), dtype=bool))
    by_group = {group: _scope(entries, where == group) for group in groups if len(groups) > 1}
    left_out = {}
    for key in TEXT_MEASURES:
        if judge is None:
            left_out[key] = "no evaluator was given"
        elif key not in entries[0].values:
            left_out[key] = f"a pool holds {POOL} prompts, there are {len(prompts)}"
    return {
        "format": FORMAT,
        "schema_version": SCHEMA_VERSION,
        "runs": [
            {
                "name": entry.name,
                "path": str(entry.path),
                "motions": f"motions/{entry.folder}",
                "weights_sha256": entry.weights,
                "max_tokens": entry.max_motion,
                "stretched": entry.stretched,
            }
            for entry in entries
        ],
        "fps": entries[0].fps,
        "prompts": {"count": len(prompts), "groups": dict(groups)},
        "evaluator": judge and {"name": judge.name, "sha256": judge.sha256},
        "measures": {
            key: {"label": one.label, "better": one.better or None}
            for key, one in MEASURES.items()
            if key in entries[0].values
        },
        "left_out": left_out,
        "results": {"all": results, "groups": {group: parts[0] for group, parts in by_group.items()}},
        "differences": {
            "first": entries[0].name,
            "all": differences,
            "groups": {group: parts[1] for group, parts in by_group.items()},
        },
        "per_prompt": [
            {
                "text": prompt.text,
                "group": prompt.group,
                "runs": {
                    entry.name: {key: float(column[index]) for key, column in entry.values.items()}
                    for entry in entries
                },
            }
            for index, prompt in enumerate(prompts)
        ],
    }


def _number(key: str, value: float, *, signed: bool = False) -> str:
    measure = MEASURES[key]
    text = f"{measure.scale * value:{'+' if signed else ''}.{measure.digits}f}"
    if not float(text):  # neither -0.0 nor +0.0
        text = text.lstrip("+-")
    return text.replace("-", "−")


def _range(key: str, one: Mapping[str, Any], *, signed: bool = False) -> str:
    if one["low"] is None:
        return ""
    return f"[{_number(key, one['low'], signed=signed)}, {_number(key, one['high'], signed=signed)}]"


def _p(value: float) -> str:
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def _label(key: str) -> str:
    arrow = {"lower": " ↓", "higher": " ↑", "": ""}[MEASURES[key].better]
    return MEASURES[key].label + arrow


def _scopes(report: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """(heading, results, differences): of all prompts, then of each group."""
    results, differences = report["results"], report["differences"]
    yield "All prompts", results["all"], differences["all"]
    for group in results["groups"]:
        heading = f"{group or 'without a group'} ({report['prompts']['groups'][group]} prompts)"
        yield heading, results["groups"][group], differences["groups"][group]


def _facts(report: Mapping[str, Any]) -> list[str]:
    """What a reader has to know before the numbers, in sentences."""
    sampling, count = report["sampling"], report["prompts"]["count"]
    how = "the likeliest token every time"
    if not sampling["greedy"]:
        how = f"temperature {sampling['temperature']:g}"
        how += f", top-k {sampling['top_k']}" if sampling["top_k"] else ""
        how += f", top-p {sampling['top_p']:g}" if sampling["top_p"] < 1 else ""
    draws = sampling["samples"]
    seeds = f"{sampling['seed']}" if draws == 1 else f"{sampling['seed']} to {sampling['seed'] + draws - 1}"
    facts = [
        f"{count} prompt{'s' * (count > 1)}, {draws} motion{'s' * (draws > 1)} per prompt and model "
        f"(seed{'s' * (draws > 1)} {seeds}; {how}); {report['fps']:g} frames a second."
    ]
    if report["evaluator"]:
        judge = report["evaluator"]
        facts.append(f"Measures of text by the evaluator {judge['name']} ({judge['sha256'][:12]}).")
    reasons: dict[str, list[str]] = {}
    for key, reason in report["left_out"].items():
        reasons.setdefault(reason, []).append(MEASURES[key].label)
    facts += [f"Left out: {', '.join(labels)}: {reason}." for reason, labels in reasons.items()]
    stretched = [f"{run['stretched']} of {run['name']}" for run in report["runs"] if run["stretched"]]
    if stretched:
        what = "Motions shorter than the evaluator takes, whose last frame was held for it"
        facts.append(f"{what}: {', '.join(stretched)}.")
    return facts


def _reading(report: Mapping[str, Any]) -> list[str]:
    """How to read the tables."""
    lines = ["In brackets: 95% intervals over the prompts. ↑ higher is better, ↓ lower is better."]
    if report["differences"]["all"]:
        lines.append(
            "Differences are means over the same prompts with the same seeds. p: how often random signs give "
            f"as large a mean, adjusted for the number of differences in the table; bold below {LEVEL:g}."
        )
    lines.append("A body that stands still has no skate and no jerk: read these beside the other measures.")
    if "r_precision_1" in report["measures"]:
        lines.append(f"R-precision is over pools of {POOL} of all prompts, in the groups too.")
    return lines


def markdown(report: Mapping[str, Any]) -> str:
    """The tables of a report in Markdown."""
    first, *others = (run["name"] for run in report["runs"])
    lines = ["# Comparison of " + ", ".join([_cell(first), *map(_cell, others)]), ""]
    lines += [f"{fact}  " for fact in (*_facts(report), *_reading(report))]
    for heading, results, differences in _scopes(report):
        columns = ["measure", first, *others, *(f"{other} − {first}" for other in others)]
        lines += ["", f"## {_cell(heading)}", "", f"| {' | '.join(map(_cell, columns))} |"]
        lines.append("|" + "---|" * len(columns))
        for key in report["measures"]:
            unit = f" ({MEASURES[key].unit})" if MEASURES[key].unit else ""
            cells = [_label(key) + unit]
            for name in (first, *others):
                one = results[name][key]
                cells.append(f"{_number(key, one['mean'])} {_range(key, one)}".strip())
            for name in others:
                one = differences[name][key]
                mean = _number(key, one["mean"], signed=True)
                mean = f"**{mean}**" if one["p_holm"] < LEVEL else mean
                cells.append(f"{mean} {_range(key, one, signed=True)} {_p(one['p_holm'])}".replace("  ", " "))
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return re.sub(r"([\\`*_|<>\[\]])", r"\\\1", text)


def _page(report: Mapping[str, Any], entries: Sequence[_Run], shown: Sequence[int]) -> str:
    from scamo.motion.render import body_constants, embedded, figure_script, script_json

    motions = [embedded(entry.motions[index], "") for index in shown for entry in entries]
    names = [run["name"] for run in report["runs"]]
    title = f"Comparison of {', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else f"{names[0]}"
    parts = {
        "TITLE": html.escape(title),
        "FACTS": "\n".join(f'<p class="note">{html.escape(fact)}</p>' for fact in _facts(report)),
        "TABLES": _tables(report),
        "MOTIONS": _motions(report, shown),
        "FIGURE": figure_script(),
        "DATA": script_json(body_constants(entries[0].motions) | {"motions": motions}),
    }
    template = (Path(__file__).parent / "compare.html").read_text(encoding="utf-8")
    return re.sub(r"__([A-Z]+)__", lambda match: parts[match[1]], template)


def _tables(report: Mapping[str, Any]) -> str:
    reading = "\n".join(f'<p class="note">{html.escape(line)}</p>' for line in _reading(report))
    keys = list(report["measures"])
    blocks: list[str] = []
    for heading, results, differences in _scopes(report):
        table = _table(keys, results, differences)
        if blocks:
            table = f"<details><summary>{html.escape(heading)}</summary>{table}</details>"
        blocks.append(table)
    return "\n".join([blocks[0], reading, *blocks[1:]])


def _table(keys: Sequence[str], results: Mapping[str, Any], differences: Mapping[str, Any]) -> str:
    """Values and differences in one table; with three runs or more that gets too wide, and they are two."""
    heads = {}
    for key in keys:
        unit = f' <span class="unit">{MEASURES[key].unit}</span>' if MEASURES[key].unit else ""
        heads[key] = f'<th scope="row">{_label(key)}{unit}</th>'
    values, against = [], []
    for key in keys:
        cells = [
            f"<td>{_number(key, one[key]['mean'])} <small>{_range(key, one[key])}</small></td>"
            for one in results.values()
        ]
        values.append("".join(cells))
        ends = [one[key][end] for one in differences.values() for end in ("mean", "low", "high")]
        reach = max((abs(end) for end in ends if end is not None), default=0.0)
        against.append("".join(_difference_cell(key, one[key], reach) for one in differences.values()))
    first = next(iter(results))
    names = [f"{name} − {first}" for name in differences]
    starts = [f"<tr>{heads[key]}" for key in keys]
    if len(results) < 3:
        rows = ["".join(parts) + "</tr>" for parts in zip(starts, values, against, strict=True)]
        return _markup(["", *results, *names], rows)
    return "\n".join(
        _markup(["", *columns], ["".join(parts) + "</tr>" for parts in zip(starts, cells, strict=True)])
        for columns, cells in ((list(results), values), (names, against))
    )


def _markup(columns: Sequence[str], rows: Sequence[str]) -> str:
    head = "".join(f'<th scope="col">{html.escape(column)}</th>' for column in columns)
    body = "\n".join(rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'


def _difference_cell(key: str, one: Mapping[str, Any], reach: float) -> str:
    """The interval as a bar about zero, as wide for all runs of the measure, and the numbers."""
    clear = one["p_holm"] < LEVEL
    verdict = "unclear"
    if clear:
        gain = {"higher": 1, "lower": -1, "": 0}[MEASURES[key].better] * one["mean"]
        verdict = "better" if gain > 0 else "worse" if gain < 0 else "other"
    mean = _number(key, one["mean"], signed=True)
    if clear:
        mean = f"<b>{mean}</b>"

    def place(value: float) -> str:
        return f"{52 + 48 * value / reach if reach else 52:.1f}"

    bar = ""
    if one["low"] is not None:
        bar = f'<line class="bar" x1="{place(one["low"])}" x2="{place(one["high"])}" y1="7" y2="7"></line>'
    drawn = (
        '<svg viewBox="0 0 104 14" aria-hidden="true">'
        '<line class="zero" x1="52" x2="52" y1="0" y2="14"></line>'
        f'{bar}<circle cx="{place(one["mean"])}" cy="7" r="3.5"></circle></svg>'
    )
    word = f" {verdict}" if verdict in ("better", "worse") else ""
    rest = f"{html.escape(_range(key, one, signed=True))} {html.escape(_p(one['p_holm']))}"
    return f'<td class="{verdict}">{drawn}{mean} <small>{rest}</small>{word}</td>'


def _motions(report: Mapping[str, Any], shown: Sequence[int]) -> str:
    """A row for every prompt: first those with players, then the numbers of the others."""
    blocks: list[str] = []
    names = [run["name"] for run in report["runs"]]
    groups = [group for group in report["prompts"]["groups"] if group]
    prompts = report["per_prompt"]
    if shown:
        blocks += ["<h2>Motions</h2>", _bar(groups if len(report["prompts"]["groups"]) > 1 else [])]
        if report["sampling"]["samples"] > 1:
            what = (
                f"Shown: the first of {report['sampling']['samples']} motions; the numbers are means of all."
            )
            blocks.append(f'<p class="note">{what}</p>')
    for place, index in enumerate(shown):
        prompt = prompts[index]
        figures = []
        for number, name in enumerate(names):
            caption = f"{html.escape(name)} <small>{_brief(prompt['runs'][name])}</small>"
            canvas = f'<canvas data-motion="{place * len(names) + number}" role="img"'
            canvas += f' aria-label="The motion of {html.escape(name)}"></canvas>'
            figures.append(f"<figure>{canvas}<figcaption>{caption}</figcaption></figure>")
        group = html.escape(prompt["group"])
        tag = f'<span class="group">{group}</span>' if group else ""
        blocks.append(
            f'<article data-of="{group}" id="prompt-{index}"><h3>{html.escape(prompt["text"])}</h3>{tag}\n'
            f'<div class="figures">{"".join(figures)}</div>\n'
            '<div class="scrub"><input type="range" min="0" max="1" value="0" aria-label="Time">'
            "<output></output></div></article>"
        )
    rest = [index for index in range(len(prompts)) if index not in set(shown)]
    if rest:
        rows = []
        for index in rest:
            prompt = prompts[index]
            group = html.escape(prompt["group"])
            cells = "".join(
                f'<td class="brief"><small>{_brief(prompt["runs"][name])}</small></td>' for name in names
            )
            rows.append(
                f'<tr data-of="{group}" id="prompt-{index}">'
                f'<td class="prompt">{html.escape(prompt["text"])}</td>'
                f'<td class="group">{group}</td>{cells}</tr>'
            )
        table = _markup(["", "", *names], rows)
        many = f"The other {len(rest)} prompts" if shown else f"{len(rest)} prompts"
        blocks.append(f"<h2>{many}</h2>\n{table}")
    return "\n".join(blocks)


def _brief(values: Mapping[str, float]) -> str:
    """A motion's numbers in a few words."""
    parts = [f"{_number('duration', values['duration'])} s"]
    if values["at_limit"]:
        parts.append("at the limit")
    if "matching" in values:
        parts.append(f"distance {_number('matching', values['matching'])}")
    if "cosine" in values:
        parts.append(f"cosine {_number('cosine', values['cosine'])}")
    else:
        parts.append(f"skate {_number('foot_skate', values['foot_skate'])}%")
    return " · ".join(parts)


def _bar(groups: Sequence[str]) -> str:
    """The buttons that stay at the top of the page."""
    choices = ""
    if groups:
        buttons = '<button type="button" data-group="" aria-pressed="true">all</button>'
        for group in groups:
            name = html.escape(group)
            buttons += f'<button type="button" data-group="{name}" aria-pressed="false">{name}</button>'
        choices = f'<span class="gap"></span><span id="groups">{buttons}</span>'
    speeds = "".join(
        f'<option value="{speed}"{" selected" if speed == 1 else ""}>{speed}×</option>'
        for speed in (0.25, 0.5, 1, 2)
    )
    return (
        '<div id="bar"><button id="play" type="button">Play</button>'
        '<button id="again" type="button">From the start</button>'
        f'<select id="speed" aria-label="Speed">{speeds}</select>'
        '<button id="follow" type="button" aria-pressed="true">Follow</button>'
        '<button id="reset" type="button">Reset view</button>'
        '<span class="sides"><span style="--c: var(--left)">left</span>'
        f'<span style="--c: var(--right)">right</span></span>{choices}</div>'
    )
