"""What the launcher does not do: stop flags, orphan detection, one error message, a world of one.

DeepSpeed's launcher passes no signal on when it is killed itself, and sends SIGTERM to the ranks one after
another otherwise, so a signal only raises a flag here; the loop shares the flags and all ranks stop after the
same step.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

# How long a rank whose launcher is gone may stand in a collective that nobody will join.
ORPHAN_SECONDS = 120.0
# How long the other ranks leave it to rank 0 to report an error that all of them found.
REPORT_SECONDS = 10.0


@dataclass(frozen=True)
class World:
    """This process among the ranks, as the launcher's environment says; a world of one without a launcher."""

    rank: int
    size: int
    local_rank: int

    @classmethod
    def from_environment(cls, local_rank: int | None = None) -> World:
        """Read RANK, WORLD_SIZE and LOCAL_RANK; `local_rank` is the launcher's argument, if it gave one."""
        rank = int(os.environ.get("RANK", "0"))
        size = int(os.environ.get("WORLD_SIZE", "1"))
        local = os.environ.get("LOCAL_RANK", "0" if local_rank is None else str(max(local_rank, 0)))
        return cls(rank, size, int(local))

    def export(self) -> None:
        """Set the variables that torch.distributed reads, for a process that no launcher started."""
        os.environ.update(RANK=str(self.rank), WORLD_SIZE=str(self.size), LOCAL_RANK=str(self.local_rank))
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        if "MASTER_PORT" not in os.environ:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                os.environ["MASTER_PORT"] = str(probe.getsockname()[1])


def limit_threads() -> None:
    """Share the cores among the ranks of this machine. Call before torch is imported.

    More threads than cores is far slower than one thread each: ranks wait for one another in every layer.
    """
    ranks = int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // ranks)))


def report_error(message: str, rank: int) -> None:
    """Print `message` once: every rank meets bad input, and rank 0 speaks.

    The others wait until the launcher ends them, and speak only when rank 0 did not fail.
    """
    if rank:
        time.sleep(REPORT_SECONDS)
        message = f"rank {rank}: {message}"
    print(f"train.py: error: {message}", file=sys.stderr, flush=True)


class StopFlag:
    """Set by SIGINT, SIGTERM or the launcher's death; read once a step.

    `beat()` tells the orphan guard that the loop still moves; inside `with flag.busy():` (a save) it waits.
    """

    def __init__(self) -> None:
        self.signum = 0
        self._beat = time.monotonic()
        self._busy = False
        self._launchers = _launchers()

    def install(self) -> None:
        """Take over the signals and start watching the launcher."""
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self._receive)
        if self._launchers:
            threading.Thread(target=self._watch, name="orphan-guard", daemon=True).start()

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        self.signum = self.signum or signum

    def beat(self) -> None:
        self._beat = time.monotonic()

    def busy(self) -> _Busy:
        return _Busy(self)

    def _watch(self) -> None:
        while True:
            time.sleep(1.0)
            if all(_parent_of(child) == parent for child, parent in self._launchers):
                continue
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
    """(child, parent) pairs that must stay: this process under launch.py, and launch.py under its runner.

    Empty when something else started us: a shell may die without ending what it started under nohup.
    """
    pairs = []
    child = os.getpid()
    for name in (b"deepspeed.launcher.launch", b"deepspeed"):
        parent = _parent_of(child)
        if parent <= 1 or name not in _command_of(parent):
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
