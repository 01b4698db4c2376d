"""The command line: help is quick and complete, bad input is one line and a status that is not 0."""

import subprocess
import sys

import pytest

from scamo import cli


def test_help_imports_nothing_heavy():
    code = (
        "import sys\n"
        "from scamo.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'matplotlib', 'deepspeed'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for command in (
        "doctor",
        "prepare",
        "encode-text",
        "tokenizer",
        "generate",
        "timeline",
        "inbetween",
        "export",
        "evaluate",
        "compare",
        "import",
    ):
        assert command in run.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data", "info", "nowhere"], "nowhere"),
        (["tokenizer", "train", "nowhere", "-o", "out", "--config", "none.toml"], "none.toml"),
        (["tokenizer", "evaluate", "nowhere", "nothing"], "nowhere"),
        (["encode-text", "nowhere", "--encoder", "minilm"], "nowhere"),
        (["generate", "a person walks", "-o", "motion.docx", "--run", "nowhere"], "motion.docx"),
        (["generate", "a person walks", "-o", "motion.npz", "--run", "nowhere"], "nowhere"),
        (["generate", "a person walks", "-o", "nowhere/motion.npz"], "nowhere: no such folder"),
        (["generate"], "no sentence to generate from"),
        (["generate", "a person walks", " ", "-o", "motion.npz"], "prompt 1: an empty sentence"),
        (["generate", "a", "b", "--seeds", "1", "-o", "motion.npz"], "1 seeds for 2 prompts"),
        (["generate", "--prompts", "none.txt", "-o", "out"], "none.txt: cannot be read"),
        (["generate", "a person walks", "--prompts", "none.txt", "-o", "out"], "give none beside it"),
        (["generate", "a person walks", "--format", "npz"], "--out is missing"),
        (["generate", "a person walks", "--format", "npz", "-o", "a.npz"], "--out is a.npz"),
        (["generate", "a person walks", "--format", "npz,fbx", "-o", "out"], "format 'fbx'"),
        (["generate", "a person walks", "--format", "npz", "-o", "out", "--device", "tpu"], "'tpu'"),
        (["generate", "a person walks", "--format", "npz", "-o", "out", "--run", "nowhere"], "nowhere"),
        (["export", "nowhere", "out"], "nowhere"),
        (["view", "nowhere.npz"], "nowhere.npz"),
        (["demo"], "--model RUN for the page"),
        (["demo", "run", "-o", "out", "--model", "run"], "give one of them"),
        (["convert", "nowhere.npz", "-o", "x.bvh"], "nowhere.npz"),
        (["convert", "nowhere.npz", "-o", "x.fbx"], "unknown suffix '.fbx'"),
        (["prepare", "humanml3d", "nowhere", "out"], "nowhere"),
        (["evaluate", "nowhere", "--protocol", "text-following"], "nowhere"),
        (["evaluate", "nowhere"], "--evaluator"),
        (["evaluate", "nowhere", "--evaluator", "nothing"], "nowhere"),
        (["evaluator", "train", "nowhere", "-o", "out", "--config", "none.toml"], "none.toml"),
        (["evaluator", "evaluate", "nothing", "nowhere"], "nowhere"),
        (["compare", "nowhere", "elsewhere", "-o", "out"], "nowhere"),
        (["compare", "nowhere", "elsewhere", "-o", "out", "--prompts", "none.txt"], "none.txt"),
        (["import", "scamo-official", "none.pth", "-o", "out"], "none.pth"),
        (["import", "t2m-gpt-tokenizer", "none.pth", "-o", "out", "--mean", "m", "--std", "s"], "none.pth"),
        (["import", "t2m-evaluator", "nowhere", "-o", "out"], "nowhere"),
    ],
    ids=lambda value: "-".join(value[:2]) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("scamo: error: ")
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_doctor(capsys):
    assert cli.main(["doctor"]) == 0
    report = capsys.readouterr().out
    assert "torch" in report
    assert "train (ZeRO-3)" in report
