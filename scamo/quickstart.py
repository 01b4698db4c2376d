"""`scamo quickstart`: the whole way once, on the synthetic corpus, by the same commands that a user types.

Fixed step counts, so that the result does not depend on the machine's speed. The gate at the end is exact
text-following on held-out wordings: at least 60%, and at least four times chance.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from scamo.errors import ScaMoError

GATE_EXACT = 0.60
GATE_OVER_CHANCE = 4.0
TEMPERATURE = "0.5"

ROOT = Path(__file__).resolve().parents[1]


def _run(command: Sequence[str], environment: dict[str, str]) -> float:
    """Run one stage; returns its seconds. Raises ScaMoError when it fails."""
    print(f"\n$ {shlex.join(command)}", flush=True)
    start = time.perf_counter()
    status = subprocess.run(command, env=environment, cwd=ROOT).returncode
    if status:
        raise ScaMoError(f"quickstart stopped: `{shlex.join(command)}` exited with status {status}")
    return time.perf_counter() - start


def quickstart(out: Path = Path("runs/quickstart"), *, ranks: int = 2) -> dict:
    """Corpus, tokenizer, text, ZeRO-3 training, generation, measures and pictures.

    Args:
        out: folder for everything; an earlier quickstart there is replaced.
        ranks: processes of the training (2 in the fixed recipe; 1 gives the same curve, slower).

    Returns:
        The report that is also written to OUT/report.json.

    Raises:
        ScaMoError: a stage failed, or a needed file of the checkout is missing.
    """
    if not (ROOT / "configs/quickstart.toml").is_file():
        raise ScaMoError(f"{ROOT / 'configs/quickstart.toml'} is missing: run the quickstart from a checkout")
    out = out.resolve()
    if out.exists():
        if any(out.iterdir()) and not (out / ".quickstart").is_file():
            raise ScaMoError(f"{out} exists and is not a quickstart folder: choose another with --out")
        shutil.rmtree(out)
    out.mkdir(parents=True)
    (out / ".quickstart").touch()

    binaries = Path(sys.executable).parent
    scamo = [sys.executable, "-m", "scamo.cli"]
    environment = os.environ | {
        "PATH": f"{binaries}{os.pathsep}{os.environ.get('PATH', '')}",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    dataset, tokenizer, run, evaluator = (out / name for name in ("dataset", "tokenizer", "run", "evaluator"))
    train = [
        *("deepspeed", "-q", "--num_gpus", str(ranks), "train.py"),
        *("--ds_config", "configs/ds_zero3.json", "--config", "configs/quickstart.toml"),
        *("--set", f"data.dataset={dataset}", "--set", f"data.tokenizer={tokenizer}"),
        *("--set", f"training.run={run}"),
    ]
    stages: list[tuple[str, list[str]]] = [
        ("corpus", [*scamo, "prepare", "synthetic", str(dataset), "--clips", "14000", "--captions", "1"]),
        (
            "tokenizer",
            [*scamo, "tokenizer", "train", str(dataset), "-o", str(tokenizer)]
            + ["--config", "configs/tokenizer_narrow.toml"],
        ),
        ("tokens", [*scamo, "tokenizer", "encode", str(tokenizer), str(dataset)]),
        ("text", [*scamo, "encode-text", str(dataset), "--encoder", "minilm"]),
        ("training", train),
        (
            "generation",
            [*scamo, "evaluate", str(run), "--protocol", "text-following"]
            + ["--temperature", TEMPERATURE, "--out", str(out / "text_following.json")],
        ),
        (
            "evaluator",
            [*scamo, "evaluator", "train", str(dataset), "-o", str(evaluator)]
            + ["--config", "configs/evaluator_narrow.toml", "--set", "training.steps=100"],
        ),
        (
            "evaluation",
            [*scamo, "evaluate", str(run), "--protocol", "strict", "--evaluator", str(evaluator)]
            + ["--temperature", TEMPERATURE, "--mm-texts", "0", "--out", str(out / "evaluation")],
        ),
        (
            "pictures",
            [*scamo, "demo", str(run), "--out", str(out), "--count", "10", "--temperature", TEMPERATURE],
        ),
    ]
    seconds: dict[str, float] = {}
    for name, command in stages:
        seconds[name] = _run(command, environment)

    following = json.loads((out / "text_following.json").read_text(encoding="utf-8"))
    evaluation = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))
    exact = following["groups"]["wording"]["exact"]
    chance = following["groups"]["wording"]["chance"]
    passed = exact >= GATE_EXACT and exact >= GATE_OVER_CHANCE * chance
    report = {
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "total_seconds": round(sum(seconds.values()), 1),
        "text_following": following,
        "evaluation": evaluation,
        "gate": {
            "exact": exact,
            "chance": chance,
            "needed": max(GATE_EXACT, GATE_OVER_CHANCE * chance),
            "passed": passed,
        },
    }
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")

    print("\nstage         seconds")
    for name, value in seconds.items():
        print(f"{name:<12}{value:>9.1f}")
    print(f"{'total':<12}{sum(seconds.values()):>9.1f}")
    combination = following["groups"]["combination"]["exact"]
    print(f"\nexact text-following, held-out wordings     {exact:.1%}  (chance {chance:.1%})")
    print(f"exact text-following, held-out combinations {combination:.1%}")
    print(f"gate ({GATE_EXACT:.0%} and {GATE_OVER_CHANCE:.0f} x chance): {'passed' if passed else 'MISSED'}")
    print(f"rows beside real data and reconstruction: {out / 'evaluation.md'}")
    print(f"pictures: {out / 'motions.html'}, {out / 'motions.png'}")
    if not passed:
        raise ScaMoError(f"the gate was missed: exact {exact:.1%}, needed {report['gate']['needed']:.1%}")
    return report
