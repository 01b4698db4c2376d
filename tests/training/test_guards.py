import os
import signal
import subprocess
import sys

from scamo.training.guards import StopFlag, World, limit_threads
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


def test_threads_are_the_cores_shared_by_the_ranks(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)), raising=False)
    for ranks, expected in (("4", "3"), ("64", "1"), ("", "12")):
        monkeypatch.setenv("OMP_NUM_THREADS", "")
        monkeypatch.delenv("OMP_NUM_THREADS")
        monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
        monkeypatch.setenv("LOCAL_SIZE", ranks)
        limit_threads()
        assert os.environ["OMP_NUM_THREADS"] == expected
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    limit_threads()
    assert os.environ["OMP_NUM_THREADS"] == "7"


def test_a_signal_only_raises_the_flag_and_the_first_one_counts():
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        flag = StopFlag()
        flag.install()
        assert flag.signum == 0
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert flag.signum == signal.SIGTERM
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


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
