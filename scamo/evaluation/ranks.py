"""Generation over several processes: `torchrun --nproc-per-node N -m scamo.cli evaluate ...`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scamo.errors import ScaMoError


@dataclass(frozen=True)
class Ranks:
    """rank of size processes. Every process takes each size-th piece of work; rank 0 measures and writes.

    made: whether `join` made the process group, so that `leave` takes it down.
    """

    rank: int = 0
    size: int = 1
    made: bool = False

    @classmethod
    def join(cls) -> Ranks:
        """The group that torchrun (or deepspeed) started this process in; a group of one without it.

        Raises ScaMoError when the launcher's variables are not whole numbers.
        """
        try:
            size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        except ValueError:
            raise ScaMoError("WORLD_SIZE and RANK in the environment: expected whole numbers") from None
        if size == 1:
            return cls()
        import torch.distributed

        if torch.distributed.is_initialized():
            return cls(rank, size)
        # Only pickled results travel, once a repeat: gloo does on any machine.
        torch.distributed.init_process_group("gloo")
        return cls(rank, size, made=True)

    @property
    def main(self) -> bool:
        return self.rank == 0

    def device(self, name: str) -> str:
        """`name`, or this process's own GPU for "auto" where there are several."""
        import torch

        if name == "auto" and self.size > 1 and torch.cuda.is_available():
            return f"cuda:{int(os.environ.get('LOCAL_RANK', self.rank)) % torch.cuda.device_count()}"
        return name

    def share(self, work: Sequence[Any]) -> list[Any]:
        """This process's part of `work`: every size-th piece."""
        return list(work[self.rank :: self.size])

    def gather(self, part: list[Any]) -> list[Any]:
        """The results of everybody's `share`, in the order of the work; on rank 0 only, elsewhere empty."""
        if self.size == 1:
            return part
        import torch.distributed

        parts: list[list[Any]] | None = [[] for _ in range(self.size)] if self.main else None
        torch.distributed.gather_object(part, parts, dst=0)
        if parts is None:
            return []
        whole: list[Any] = [None] * sum(map(len, parts))
        for rank, results in enumerate(parts):
            whole[rank :: self.size] = results
        return whole

    def leave(self) -> None:
        """Take down the group that `join` made."""
        if self.made:
            import torch.distributed

            torch.distributed.destroy_process_group()
