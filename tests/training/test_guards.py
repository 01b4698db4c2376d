import os
import signal
import subprocess
import sys

import pytest

from scamo.errors import ScaMoError
from scamo.training import guards
from scamo.training.guards import STOP_SIGNALS, StopFlag, World, limit_threads, report_error
from scamo.training.logging import RunLog, read_log


def test_world_from_the_launcher_and_without_one(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert World.from_environment() == World(0, 1, 0)
    assert World.from_environment(local_rank=3) == World(0, 1, 3)
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert World.from_environment() == World(5, 8, 1)


@pytest.fixture
def srun(monkeypatch):
    """The environment of task 5 of `srun --ntasks=8` in a job of two nodes."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES")
    for name in names:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    step = {"PROCID": "5", "STEP_NUM_TASKS": "8", "LOCALID": "1", "STEP_NODELIST": "gpu[07-08],cpu1"}
    for name, value in (step | {"JOB_ID": "123456", "STEP_ID": "2", "NTASKS": "8"}).items():
        monkeypatch.setenv(f"SLURM_{name}", value)


def test_srun_needs_no_launcher(srun):
    world = World.from_environment()
    assert world == World(5, 8, 1)
    world.export()
    found = [os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")]
    assert found == ["5", "8", "1", "gpu07", "15602"]


def test_a_task_that_srun_bound_to_one_gpu_sees_it_as_the_first(srun, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert World.from_environment() == World(5, 8, 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert World.from_environment() == World(5, 8, 1)


def test_a_batch_script_is_no_task_and_the_launcher_goes_before_slurm(srun, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert World.from_environment() == World(0, 2, 0)
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS")
    assert World.from_environment() == World(0, 1, 0)


def test_ranks_that_cannot_find_each_other_are_told(srun, monkeypatch):
    monkeypatch.delenv("SLURM_STEP_NODELIST")
    with pytest.raises(ScaMoError, match="MASTER_ADDR is not set: start 8 ranks with deepspeed or srun"):
        World.from_environment().export()


def test_an_error_before_the_ranks_have_met_is_told_by_rank_0(capsys):
    assert report_error("no such file", 0, 2) == 2
    assert capsys.readouterr().err == "train.py: error: no such file\n"


def test_threads_are_the_cores_shared_by_the_ranks(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)), raising=False)
    monkeypatch.setattr(guards, "GPU_DEVICES", ["/no/such/device"])
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMP_NUM_THREADS", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # so that what limit_threads sets is undone
    for ranks, threads, policy in (("4", "3", "active"), ("64", "1", None), ("", "12", "active")):
        monkeypatch.delenv("OMP_NUM_THREADS")
        monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
        monkeypatch.setenv("LOCAL_SIZE", ranks)
        limit_threads()
        assert (os.environ["OMP_NUM_THREADS"], os.environ.get("OMP_WAIT_POLICY")) == (threads, policy)


def test_threads_sleep_where_a_gpu_computes_and_where_the_user_chose(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)), raising=False)
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_WAIT_POLICY", "")
    monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    limit_threads()
    assert os.environ["OMP_NUM_THREADS"] == "7"
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(guards, "GPU_DEVICES", [str(tmp_path)])
    limit_threads()
    assert os.environ["OMP_NUM_THREADS"] == "12"
    assert "OMP_WAIT_POLICY" not in os.environ


def test_a_signal_only_raises_the_flag_and_the_first_one_counts():
    before = {s: signal.getsignal(s) for s in STOP_SIGNALS}
    try:
        for first in STOP_SIGNALS:
            flag = StopFlag()
            flag.install()
            assert flag.signum == 0
            for signum in (first, *STOP_SIGNALS):
                os.kill(os.getpid(), signum)
            assert flag.signum == first
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


LAUNCHER = """
import os, subprocess, sys

rank = subprocess.Popen([sys.executable, "-c", sys.argv[2]], stderr=subprocess.PIPE)
rank.stderr.readline()
os._exit(0)
"""
RANK = """
import sys, time
from scamo.training.guards import StopFlag

print("imported", file=sys.stderr, flush=True)
time.sleep(1)
with StopFlag() as flag:
    while not flag.signum:
        time.sleep(0.05)
print(int(flag.signum))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="parents are looked up in /proc")
def test_a_launcher_that_dies_while_the_ranks_start_is_noticed():
    command = [sys.executable, "-c", LAUNCHER, "deepspeed.launcher.launch", RANK]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=60, check=True)
    assert int(result.stdout) == signal.SIGTERM


def test_a_rank_does_not_wait_for_ever_for_ranks_that_never_come():
    code = (
        "import time, scamo.training.guards as g; g.MEET_SECONDS = 0.0\n"
        "with g.StopFlag(ranks=2): time.sleep(60)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr == "train.py: error: not all of the 2 ranks came within 0 s\n"


def test_help_does_not_import_torch():
    code = (
        "import sys, scamo.training.launch as l; l.parser().format_help(); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], env=os.environ, check=False).returncode == 0


def test_a_resumed_log_forgets_what_came_after_the_checkpoint(tmp_path):
    path = tmp_path / "log.jsonl"
    log = RunLog(path)
    for step in (1, 2, 3):
        log.write("train", step=step, loss=1.0 / step)
    log.close()
    with path.open("a") as file:
        file.write('{"kind": "train", "st')  # a crash in the middle of a line
    log = RunLog(path, resume_step=2)
    log.write("train", step=3, loss=9.0)
    log.close()
    assert [(r["step"], r["loss"]) for r in read_log(path, "train")] == [(1, 1.0), (2, 0.5), (3, 9.0)]
