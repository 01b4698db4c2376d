"""`scamo evaluate text-following`: one motion for each checked-in prompt, measured."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from tqdm import tqdm

from scamo.errors import ScaMoError
from scamo.evaluation.ceilings import ceilings
from scamo.evaluation.text_following import evaluate, load_prompts
from scamo.generation.api import ScaMo
from scamo.generation.export import identify
from scamo.motion.representation import HUMANML3D


def run_text_following(
    run: str | Path,
    *,
    seed: int = 0,
    temperature: float = 1.0,
    greedy: bool = False,
    out: str | Path | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Generate one motion per prompt (no best-of-n, no retry; the length is the model's EOS) and measure it.

    Args:
        run: a training run or an exported model.
        seed: of the sampling, the same for every prompt.
        temperature: of the sampling.
        greedy: take the likeliest token every time.
        out: also write the report as JSON.
        device: auto, cpu or cuda.

    Returns:
        The report of `scamo.evaluation.text_following.evaluate`, with the sampling settings, the hashes of
        the model and `ceilings`: what the corpus' own motions score, as they are, through features and
        through this tokenizer.

    Raises:
        ScaMoError: the run cannot be loaded, makes other features than HumanML3D's 263 at 20 fps, which the
            measure is made for, or the prompt file is not the checked-in one.
    """
    prompts = load_prompts()
    model = ScaMo.load(run, device=device)
    _check_format(model, run)
    motions = model.generate(
        [prompt.text for prompt in prompts.prompts], seed=seed, temperature=temperature, greedy=greedy
    )
    with tqdm(total=len(motions), desc="measuring", unit="motion", dynamic_ncols=True) as bar:
        report = evaluate(
            [motion.joints for motion in motions], prompts, progress=lambda done, _: bar.update(done - bar.n)
        )
    report["ceilings"] = ceilings(prompts, model.tokenizer)
    report["sampling"] = {"seed": seed, "temperature": temperature, "greedy": greedy}
    report["model_sha256"] = identify(run)["sha256"]
    print(summary(report))
    if out is not None:
        out = Path(out)
        temporary = out.with_name(f".{out.name}.{os.getpid()}")
        temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        temporary.replace(out)
    return report


def _check_format(model: ScaMo, run: str | Path) -> None:
    features = model.tokenizer.config.feature_dim
    if features != HUMANML3D.feature_dim or model.fps != HUMANML3D.fps:
        raise ScaMoError(
            f"{run}: makes {features} features at {model.fps:g} fps; text-following is measured on "
            f"{HUMANML3D.name}'s {HUMANML3D.feature_dim} at {HUMANML3D.fps:g} only"
        )


def summary(report: dict[str, Any]) -> str:
    """The report as a table: exact text-following with interval and chance, by group and slot; physics."""
    rows = [("all prompts", report)]
    rows += [(f"held-out {name}s", part) for name, part in report["groups"].items()]
    rows += [("sequences of two", report["sequences"])]
    rows += [(f"slot {name}", part) for name, part in report["slots"].items()]
    lines = [f"{'':<24}{'exact':>7}  {'95% interval':<15}{'chance':>7}{'n':>6}"]
    for name, part in rows:
        interval = f"{part['low']:.1%} - {part['high']:.1%}"
        lines.append(f"{name:<24}{part['exact']:>7.1%}  {interval:<15}{part['chance']:>7.1%}{part['n']:>6}")
    for name, part in report["ceilings"].items():
        where = {"corpus": "the corpus' own motions", "features": "... through features"}.get(
            name, "... through the tokenizer"
        )
        shares = ", ".join(f"{group} {share:.1%}" for group, share in part.items())
        lines.append(f"{where:<26}{shares}")
    wrong = ", ".join(f"{count} {name}" for name, count in report["failures"].items() if count)
    lines.append(f"motions that count as wrong unseen: {wrong or 'none'}")
    physics = report["physics"]
    if physics:
        lines.append(
            f"foot-skate {physics['foot_skate']:.1%}, penetration {physics['foot_penetration_mm']:.1f} mm, "
            f"bone drift {physics['bone_drift']:.1%}, jerk {physics['jerk']:.0f} m/s^3"
        )
    return "\n".join(lines)
