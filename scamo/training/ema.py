"""A float32 moving average of the master weights, sharded as they are, saved as if there were one rank.

DeepSpeed's checkpoints and its universal format know nothing of such a state, so it has files of its own in a
checkpoint: parameters by name, whole and in the model's order, in as many files as the model's size asks for.

    step-0000300/ema/00000.safetensors ...
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from scamo.errors import ScaMoError

FOLDER = "ema"
# Of one file, at most, unless a single parameter is larger: what a rank holds in memory to write one.
FILE_BYTES = 2**30


@dataclass(frozen=True)
class Fragment:
    """The part of a parameter whose float32 master this rank holds.

    start: its first element in the flattened parameter; master: (n,) float32, a view of the optimizer's flat.
    """

    name: str
    start: int
    master: Tensor


def master_fragments(engine: Any) -> list[Fragment]:
    """This rank's fragments under ZeRO-1, 2 or 3, without padding. Raises ScaMoError if they are on NVMe."""
    optimizer = engine.optimizer
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    fragments = []
    if getattr(optimizer, "fp32_partitioned_groups_flat", None) is not None:  # ZeRO-3
        if optimizer.swap_optimizer:
            raise ScaMoError("training.ema_decay: the optimizer is on NVMe; use 0, or offload to the CPU")
        rank = dist.get_rank()
        for parameters, flat in zip(
            optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True
        ):
            offset = 0
            for parameter in parameters:
                size = parameter.partition_numel()
                length = min(size, parameter.ds_numel - rank * size)
                if length > 0:
                    view = flat.detach().narrow(0, offset, length)
                    fragments.append(Fragment(names[id(parameter)], rank * size, view))
                offset += size
        return fragments
    for parameter in engine.module.parameters():
        mapping = parameter._hp_mapping  # None where this rank holds nothing of the parameter
        if mapping is not None:
            view = mapping.hp_fragment.detach()
            fragments.append(Fragment(names[id(parameter)], mapping.lp_fragment_address.start, view))
    return fragments


def parameter_shapes(engine: Any) -> dict[str, tuple[int, ...]]:
    """Whole shapes of the parameters by name, in the model's order."""
    return {n: tuple(getattr(p, "ds_shape", p.shape)) for n, p in engine.module.named_parameters()}


def ema_decay(step: int, decay: float) -> float:
    """Decay after update `step` (0 is the first): min(decay, (1 + step) / (10 + step)).

    With a constant decay the random first weights would stay in the average for about 1 / (1 - decay) steps.
    """
    return min(decay, (1 + step) / (10 + step))


class Ema:
    """ema = d ema + (1 - d) master, d = `ema_decay(step, decay)`, beside this rank's masters."""

    def __init__(self, engine: Any, decay: float) -> None:
        """Start at the masters as they are now: build it after a checkpoint was loaded."""
        self.decay, self.device = decay, engine.device
        self.shapes = parameter_shapes(engine)
        self.fragments = master_fragments(engine)
        self.masters = [fragment.master for fragment in self.fragments]
        self.averages = [master.clone() for master in self.masters]

    def update(self, step: int) -> None:
        """To be called after update `step` was applied."""
        torch._foreach_lerp_(self.averages, self.masters, 1 - ema_decay(step, self.decay))

    def save(self, checkpoint: Path) -> None:
        """Write the average into `checkpoint`/ema; all ranks call it, each writes every size-th file.

        Raises OSError when the disk does not take it.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        rank, size = dist.get_rank(), dist.get_world_size()
        mine = {f.name: (f.start, a) for f, a in zip(self.fragments, self.averages, strict=True)}
        (checkpoint / FOLDER).mkdir(exist_ok=True)
        for index, names in enumerate(_files(self.shapes)):
            writer = index % size
            tensors = {}
            for name in names:
                whole = self._gather(name, mine.get(name), writer)
                if rank == writer:
                    tensors[name] = whole.cpu().view(torch.float32).view(self.shapes[name])
            if rank == writer:
                path = checkpoint / FOLDER / f"{index:05d}.safetensors"
                try:
                    save_file(tensors, path)
                except SafetensorError as error:
                    raise OSError(f"{path}: {error}") from error

    def _gather(self, name: str, mine: tuple[int, Tensor] | None, writer: int) -> Tensor:
        """The bits of a whole parameter, int32 (n,) on the device; only the writer's are complete."""
        # As integers: a sum with zeros would lose the sign of -0.0.
        whole = torch.zeros(math.prod(self.shapes[name]), dtype=torch.int32, device=self.device)
        if mine:
            start, average = mine
            whole[start : start + len(average)] = average.view(torch.int32).to(self.device)
        if dist.get_world_size() > 1:
            dist.reduce(whole, writer)
        return whole

    def load(self, checkpoint: Path) -> None:
        """Read this rank's fragments of what any number of ranks saved.

        Raises ScaMoError when the files do not hold the model's parameters.
        """
        from safetensors import safe_open

        mine = {f.name: (f.start, a) for f, a in zip(self.fragments, self.averages, strict=True)}
        found: dict[str, tuple[int, ...]] = {}
        for path in _paths(checkpoint):
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118
                    rows = file.get_slice(name)
                    found[name] = tuple(rows.get_shape())
                    if name in mine and found[name] == self.shapes[name]:
                        start, average = mine[name]
                        width = math.prod(found[name][1:])
                        first, last = start // width, -(-(start + len(average)) // width)
                        skip = start - first * width
                        average.copy_(rows[first:last].flatten()[skip : skip + len(average)])
        if found != self.shapes:
            raise ScaMoError(f"{checkpoint / FOLDER}: holds other parameters than the model has")


def read_ema(checkpoint: Path) -> dict[str, Tensor]:
    """The averages that a checkpoint holds, float32 by name, mapped from its files."""
    from safetensors.torch import load_file

    return {name: tensor for path in _paths(checkpoint) for name, tensor in load_file(path).items()}


def _paths(checkpoint: Path) -> list[Path]:
    paths = sorted((checkpoint / FOLDER).glob("*.safetensors"))
    if not paths:
        raise ScaMoError(f"{checkpoint / FOLDER}: no moving average of the weights was saved")
    return paths


def _files(shapes: dict[str, tuple[int, ...]]) -> list[list[str]]:
    """Names by file: consecutive parameters, FILE_BYTES at most."""
    files: list[list[str]] = [[]]
    held = 0
    for name, shape in shapes.items():
        needed = 4 * math.prod(shape)
        if files[-1] and held + needed > FILE_BYTES:
            files.append([])
            held = 0
        files[-1].append(name)
        held += needed
    return files
