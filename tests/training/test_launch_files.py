"""configs/launch: what DeepSpeed's launcher, bash and train.py make of the examples."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from scamo.config import RunConfig, load_config
from scamo.training.ds_config import read_ds_config, resolve_ds_config
from scamo.training.launch import parser

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "configs/launch"
SCRIPTS = sorted(LAUNCH.glob("*.sbatch"))


def test_the_hostfile_is_what_deepspeed_reads():
    runner = pytest.importorskip("deepspeed.launcher.runner")
    assert dict(runner.fetch_hostfile(str(LAUNCH / "hostfile"))) == {"node1": 8, "node2": 8}


def test_the_environment_file_holds_assignments_only():
    lines = [line for line in (LAUNCH / "nccl.env").read_text().splitlines() if re.match("[A-Z]", line)]
    assert lines
    assert all(re.fullmatch(r"[A-Z_]+=\S+", line) for line in lines)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_the_scripts_are_bash(script):
    if shutil.which("bash") is None:
        pytest.skip("bash is not installed")
    subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_their_commands_are_runs_that_fit_their_nodes(script):
    text = script.read_text().replace("\\\n", " ")
    (command,) = [line for line in text.splitlines() if "train.py" in line and not line.startswith("#")]
    words = shlex.split(command)
    arguments = parser().parse_args(words[words.index("train.py") + 1 :])
    assert arguments.resume == "auto"
    training = load_config(RunConfig, ROOT / arguments.config, arguments.set).training
    nodes = int(re.search(r"--nodes=(\d+)", text)[1])
    gpus = int(re.search(r"--gpus-per-node=(\d+)", text)[1])
    path = ROOT / arguments.ds_config
    resolve_ds_config(read_ds_config(path), training, world=nodes * gpus, bf16=True, path=path)
