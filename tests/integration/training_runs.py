"""Training runs as child processes: starting them, waiting for them, and reading what they leave."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from scamo.training.logging import read_log

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 400


def environment(**changes):
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"} | changes


def command(folder, run, ranks, *arguments, script="train.py"):
    """The command line of a run in folder/run; `script`: what starts in place of train.py."""
    if ranks == 1:
        start = [sys.executable, script]
    else:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--master_port", str(port)]
        start = [*launcher, "--num_gpus", str(ranks), script]
    sets = ["--config", folder / "config.toml", "--set", f"training.run={folder / run}"]
    return [str(word) for word in [*start, "--ds_config", "configs/ds_zero3.json", *sets, *arguments]]


def train(folder, run, ranks, *arguments, status=0):
    """Run to the end; returns everything that was printed."""
    result = subprocess.run(
        command(folder, run, ranks, *arguments),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert result.returncode == status, result.stdout[-4000:]
    return result.stdout


def start(command, output, **changes):
    """Start in a process group of its own; what it prints goes to the file `output`."""
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(**changes),
        stdout=output.open("a"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def start_and_wait(folder, run, ranks, *arguments, step):
    """Start and return once `step` is in the log."""
    output = folder / f"{run}.out"
    process = start(command(folder, run, ranks, *arguments), output)
    wait_until(lambda: last_step(folder / run) >= step, process, output)
    return process


def wait_until(true, process, output):
    """Wait for `true()` while the process lives."""
    until = time.monotonic() + TIMEOUT
    while not true():
        assert process.poll() is None, output.read_text()[-4000:]
        assert time.monotonic() < until, output.read_text()[-4000:]
        time.sleep(0.02)


def wait_for_end(folder, run, before):
    """Wait until a stopped run has logged its end; returns the record (the ranks outlive their launcher)."""
    until = time.monotonic() + TIMEOUT
    while len(ends := read_log(folder / run / "log.jsonl", "end")) <= before:
        assert time.monotonic() < until, (folder / f"{run}.out").read_text()[-4000:]
        time.sleep(0.1)
    return ends[-1]


def last_step(run):
    path = run / "log.jsonl"
    return max((r["step"] for r in read_log(path, "train")), default=0) if path.exists() else 0


def curve(run):
    return {r["step"]: (r["loss"], r["lr"], r["motion_tokens"]) for r in read_log(run / "log.jsonl", "train")}


def checkpoints(run):
    return sorted(p.name for p in (run / "checkpoints").iterdir())


def weights(run):
    """The exported tensors, those of the moving average as "ema NAME"."""
    from safetensors.torch import load_file

    ema = load_file(run / "export/ema.safetensors")
    return load_file(run / "export/model.safetensors") | {f"ema {n}": t for n, t in ema.items()}


def assert_same_weights(first, second):
    import torch

    first, second = weights(first), weights(second)
    assert first.keys() == second.keys()
    assert all(t.dtype == torch.float32 for t in first.values())
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
