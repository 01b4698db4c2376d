"""What the launcher does not do: stop flags, orphan detection, one error message, a world without a launcher.

DeepSpeed's launcher passes no signal on when it is killed itself, and sends SIGTERM to the ranks one after
another otherwise, so a signal only raises a flag here; the loop shares the flags and all ranks stop after the
same step. A rank that fails says so in the store that the ranks met at: the others end with its status, and
only the first one speaks.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from scamo.errors import ScaMoError

# SIGUSR1 is what Slurm is usually told to send before it takes a job away (--signal=USR1@120).
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# How often a rank looks whether its launcher and the other ranks are well.
WATCH_SECONDS = 1.0
# How long a rank whose launcher is gone may stand in a collective that nobody will join.
ORPHAN_SECONDS = 120.0
# How long a rank waits for the others at the start: one of them may have failed before they could meet.
MEET_SECONDS = 300.0
# How long the other ranks leave it to rank 0 to report an error that all of them found.
REPORT_SECONDS = 10.0
# There where a driver of NVIDIA or AMD is.
GPU_DEVICES = ("/dev/nvidiactl", "/dev/kfd")
_FAILURE = "scamo/failure"


@dataclass(frozen=True)
class World:
    """This process among the ranks, as the launcher's or Slurm's environment says; else a world of one."""

    rank: int
    size: int
    local_rank: int

    @classmethod
    def from_environment(cls, local_rank: int | None = None) -> World:
        """Read RANK, WORLD_SIZE and LOCAL_RANK, or without RANK what `srun` sets.

        local_rank: the launcher's argument, if it gave one.
        """
        env = os.environ
        # A batch script has SLURM_PROCID too, but is no task of a step.
        if "RANK" not in env and "SLURM_STEP_NUM_TASKS" in env:
            # srun --gpus-per-task=1 shows every task its own GPU, as number 0.
            bound = len(env.get("CUDA_VISIBLE_DEVICES", ",").split(",")) == 1
            local = "0" if bound else env.get("SLURM_LOCALID", "0")
            return cls(int(env["SLURM_PROCID"]), int(env["SLURM_STEP_NUM_TASKS"]), int(local))
        local = env.get("LOCAL_RANK", "0" if local_rank is None else str(max(local_rank, 0)))
        return cls(int(env.get("RANK", "0")), int(env.get("WORLD_SIZE", "1")), int(local))

    def export(self) -> None:
        """Set the variables that torch.distributed reads, for a process that no launcher started.

        Raises ScaMoError when nothing says where rank 0 is.
        """
        env = os.environ
        env.update(RANK=str(self.rank), WORLD_SIZE=str(self.size), LOCAL_RANK=str(self.local_rank))
        if self.size == 1:
            env.setdefault("MASTER_ADDR", "127.0.0.1")
            if "MASTER_PORT" not in env:
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", 0))
                    env["MASTER_PORT"] = str(probe.getsockname()[1])
        elif "SLURM_STEP_NODELIST" in env:
            env.setdefault("MASTER_ADDR", _first_host(env["SLURM_STEP_NODELIST"]))
            # All ranks must find the same one, and two steps on a node different ones.
            number = 100 * int(env.get("SLURM_JOB_ID", "0")) + int(env.get("SLURM_STEP_ID", "0"))
            env.setdefault("MASTER_PORT", str(15_000 + number % 15_000))
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if name not in env:
                raise ScaMoError(f"{name} is not set: start {self.size} ranks with deepspeed or srun")


def _first_host(nodes: str) -> str:
    """Slurm's shorthand to a name: gpu[07-09,12],cpu1 is gpu07 first."""
    return re.sub(r"\[(\d+)[^]]*\]", r"\1", nodes).split(",")[0]


def limit_threads() -> None:
    """Share the cores among the ranks of this machine. Call before torch is imported; OMP_NUM_THREADS wins.

    More threads than cores is far slower than one thread each: ranks wait for one another in every layer.
    Where the threads have the cores to themselves and no GPU computes, they wait awake: ZeRO-3 spends enough
    time in Python between two ops for them to fall asleep, and waking them took a sixth of a bf16 step.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return
    ranks = int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = max(1, cores // ranks)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if threads > 1 and not any(Path(device).exists() for device in GPU_DEVICES):
        os.environ.setdefault("OMP_WAIT_POLICY", "active")


def report_error(message: str, rank: int, status: int) -> int:
    """Print `message` once over all ranks, as this process ends. Returns the exit status of all of them.

    Before the ranks have met every one finds bad input, so rank 0 speaks; the others wait until the launcher
    ends them, and speak only when rank 0 did not fail. After that the first one to fail speaks.
    """
    store = _store()
    if store is None:
        if rank:
            time.sleep(REPORT_SECONDS)
    else:
        mine = f"{rank} {status}"
        try:
            first = store.compare_set(_FAILURE, "", mine).decode()
        except RuntimeError:  # rank 0 kept the store
            first, message = mine, "rank 0 is gone"
        if first != mine:
            return int(first.split()[1])
    prefix = f"rank {rank}: " if rank else ""
    print(f"train.py: error: {prefix}{message}", file=sys.stderr, flush=True)
    if store is not None and not rank:
        # The others read the store until then.
        time.sleep(2 * WATCH_SECONDS)
    return status


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective broke because another rank ended."""
    return "onnection closed by peer" in str(error) or "onnection reset by peer" in str(error)


def group_is_up() -> bool:
    """Whether the ranks have met (torch.distributed is initialised)."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_initialized()


def _store() -> Any:
    """The key-value store that the ranks met at; None before they have, and for a world of one."""
    if not group_is_up():
        return None
    import torch.distributed as dist

    return dist.distributed_c10d._get_default_store() if dist.get_world_size() > 1 else None


def _failure_elsewhere() -> int:
    """The exit status of the rank that failed first, 0 if none did or it is this one.

    Raises RuntimeError when rank 0, which keeps the store, is gone.
    """
    store = _store()
    if store is None or not store.check([_FAILURE]):
        return 0
    rank, status = store.get(_FAILURE).decode().split()
    return 0 if rank == os.environ["RANK"] else int(status)


class StopFlag:
    """Set by SIGINT, SIGTERM, SIGUSR1 or the launcher's death; read once a step.

    Inside `with flag:` a thread looks after the launcher and the other ranks. `beat()` tells it that the loop
    still moves; inside `with flag.busy():` (a save) it waits.
    """

    def __init__(self, ranks: int = 1) -> None:
        self.signum = 0
        self._ranks = ranks
        self._beat = time.monotonic()
        self._busy = False
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="orphan-guard", daemon=True)

    def __enter__(self) -> StopFlag:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._closed.set()
        # A daemon thread that is inside the store's C++ code when the interpreter ends aborts the process.
        self._thread.join(REPORT_SECONDS)

    def install(self) -> None:
        """Take over the signals: until then there is nothing to save."""
        for signum in STOP_SIGNALS:
            signal.signal(signum, self._receive)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        self.signum = self.signum or signum

    def beat(self) -> None:
        self._beat = time.monotonic()

    def busy(self) -> _Busy:
        return _Busy(self)

    def _watch(self) -> None:
        met = self._ranks == 1
        while not self._closed.wait(WATCH_SECONDS):
            met = met or group_is_up()
            if not met and time.monotonic() - self._beat > MEET_SECONDS:
                message = f"not all of the {self._ranks} ranks came within {MEET_SECONDS:.0f} s"
                print(f"train.py: error: {message}", file=sys.stderr, flush=True)
                os._exit(1)
            try:
                if status := _failure_elsewhere():
                    os._exit(status)  # the main thread may stand in a collective that nobody will join
                if all(_parent_of(child) == parent for child, parent in _LAUNCHERS):
                    continue
            except RuntimeError:
                pass
            self.signum = self.signum or signal.SIGTERM
            if not self._busy and time.monotonic() - self._beat > ORPHAN_SECONDS:
                os._exit(128 + signal.SIGTERM)


class _Busy:
    def __init__(self, flag: StopFlag) -> None:
        self._flag = flag

    def __enter__(self) -> None:
        self._flag._busy = True

    def __exit__(self, *exception: object) -> None:
        self._flag._busy = False
        self._flag.beat()


def _launchers() -> list[tuple[int, int]]:
    """(child, parent) pairs that must stay: this process under launch.py and that under its runner, or under
    Slurm's daemon.

    Empty when something else started us: a shell may die without ending what it started under nohup.
    """
    pairs = []
    child = os.getpid()
    for names in ((b"deepspeed.launcher.launch", b"slurmstepd"), (b"deepspeed",)):
        parent = _parent_of(child)
        if parent <= 1 or not any(name in _command_of(parent) for name in names):
            break
        pairs.append((child, parent))
        child = parent
    return pairs


def _parent_of(pid: int) -> int:
    """Parent of a process, 0 when it is gone (or where there is no /proc)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    return int(stat.rpartition(")")[2].split()[1])


def _command_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


# Now, not when it is needed: the launcher may die while torch is being imported.
_LAUNCHERS = _launchers()
