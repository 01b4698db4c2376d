"""Small DeepSpeed runs by shards.py: two ranks train and save, one and four continue."""

import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def run_ranks(size, *arguments):
    """Run shards.py as `size` ranks to the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    root = HERE.parents[1]
    path = os.pathsep.join([str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")])
    shared = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "WORLD_SIZE": str(size)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            [sys.executable, str(HERE / "shards.py"), *map(str, arguments)],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        outputs = [process.communicate(timeout=400)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-4000:]


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """The folder of two ranks' runs."""
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    folder = tmp_path_factory.mktemp("shards") / "saved"
    run_ranks(2, "train", folder)
    return folder


@pytest.fixture(scope="session")
def continued_by_one(saved):
    folder = saved.with_name("one")
    run_ranks(1, "continue", folder, saved)
    return folder


@pytest.fixture(scope="session")
def continued_by_four(saved):
    folder = saved.with_name("four")
    run_ranks(4, "continue", folder, saved)
    return folder
