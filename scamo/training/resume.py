"""Where a resumed run begins: the newest whole checkpoint, converted if it was saved by other ranks.

DeepSpeed reads its shards only with the number of ranks, the ZeRO stage and the precision that wrote them.
Its converter turns them into a universal checkpoint, one file per parameter and state, which any number of
ranks can read. The converted copy is a temporary folder beside the checkpoint, about as large, and up to
three times that while it is made (`conversion_bytes`); rank 0 needs the memory of one old rank's optimizer
shard. The folder's name is one that `checkpoint.remove_partial` clears.

Traps of DeepSpeed 0.19.8 that are handled here: under ZeRO-3 every rank would read the first old rank's whole
optimizer shard, which stays in the file with the global state; all flat partitions of a rank would share one
step counter, which then counts once for each of them; and every parameter group would get the weight decay of
the first.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import threading
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from scamo.errors import ScaMoError
from scamo.training import checkpoint as ckpt

# Over what was seen: DeepSpeed's files have headers.
MARGIN = 1.05


@dataclass(frozen=True)
class Source:
    """A verified checkpoint. converted: its universal copy, where this run cannot read the shards."""

    folder: Path
    manifest: dict[str, Any]
    converted: Path | None

    @property
    def step(self) -> int:
        return int(self.manifest["step"])


def describe(facts: dict[str, Any]) -> str:
    """What decides which shards DeepSpeed can read: ranks, zero_stage and precision."""
    ranks = f"{facts['ranks']} rank{'s' * (facts['ranks'] > 1)}"
    return f"{ranks}, ZeRO stage {facts['zero_stage']}, {facts['precision']}"


def find_source(
    checkpoints: Path, facts: dict[str, Any], group: ckpt.Group, say: Callable[[str], None]
) -> Source | None:
    """The newest checkpoint that verifies, made readable; all ranks call it.

    Args:
        checkpoints: the run's folder of them.
        facts: ranks, zero_stage and precision of this run.
        group: the ranks.
        say: prints a line once.

    Returns:
        None if there is no checkpoint at all. Otherwise, once it was loaded, it goes to `remove_converted`.

    Raises:
        ScaMoError: on all ranks alike: no checkpoint is whole, or the newest one cannot be converted.
    """
    if not group.gather(ckpt.list_checkpoints(checkpoints))[0]:
        return None
    folder, manifest = ckpt.newest_checkpoint(
        checkpoints, group=group, warn=lambda text: say(f"warning: {text}")
    )
    if all(manifest[key] == facts[key] for key in ("ranks", "zero_stage", "precision")):
        return Source(folder, manifest, None)
    if (manifest["zero_stage"] == 3) != (facts["zero_stage"] == 3):
        raise ScaMoError(
            f"{folder}: saved with ZeRO stage {manifest['zero_stage']}, this run has {facts['zero_stage']}: "
            "DeepSpeed converts between stages 1 and 2 only"
        )
    say(f"{folder}: saved with {describe(manifest)}; converting it for {describe(facts)}")
    return Source(folder, manifest, _convert(folder, manifest, group))


def load_source(engine: Any, source: Source) -> None:
    """Weights, moments and counters into the engine; all ranks call it.

    The engine of a converted source was built with {"checkpoint": {"load_universal": true}}.
    Raises ScaMoError when DeepSpeed loads nothing, or another step.
    """
    tag = source.manifest["tag"]
    if source.converted:
        optimizer = engine.optimizer
        kept = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        loaded, client = engine.load_checkpoint(str(source.converted), tag=tag)
        for group, values in zip(optimizer.param_groups, kept, strict=True):
            group.update(values)
        for flat, state in optimizer.state.items():
            state["step"] = state["step"].detach().to(flat.device, copy=True)
    else:
        loaded, client = engine.load_checkpoint(str(source.folder), tag=tag)
    if loaded is None or client.get("step") != source.step:
        raise ScaMoError(f"{source.folder}: DeepSpeed did not load it")


def remove_converted(source: Source, group: ckpt.Group) -> None:
    """Remove the universal copy, if there is one, once all ranks have read it; all ranks call it."""
    group.barrier()
    if source.converted and group.rank == 0:
        shutil.rmtree(source.converted, ignore_errors=True)


def conversion_bytes(manifest: dict[str, Any]) -> int:
    """Disk space at a conversion's peak: fragments, merged parameters, and under ZeRO-3 one shard."""
    shards = sum(
        file["bytes"] for name, file in manifest["files"].items() if name.startswith(manifest["tag"])
    )
    copies = 2 + (1 / manifest["ranks"] if manifest["zero_stage"] == 3 else 0)
    return int(MARGIN * copies * shards)


def _convert(checkpoint: Path, manifest: dict[str, Any], group: ckpt.Group) -> Path:
    """Rank 0 converts, the others wait. Returns the folder of the copy.

    Raises ScaMoError on all ranks when the disk lacks the space or DeepSpeed fails; nothing is left then.
    """
    folder = checkpoint.with_name(f"{checkpoint.name}.universal{ckpt.PARTIAL}")
    problems: list[str] = []
    worker: threading.Thread | None = None
    if group.rank == 0:
        ckpt.remove_partial(checkpoint.parent)
        needed = conversion_bytes(manifest)
        lacking = ckpt.missing_space(checkpoint.parent, needed)
        if lacking:
            problems.append(
                f"{checkpoint}: converting it takes {needed / 1e9:.3g} GB for a while, "
                f"{lacking / 1e9:.3g} GB more than the disk has free"
            )
        else:
            arguments = checkpoint / manifest["tag"], folder / manifest["tag"], problems
            worker = threading.Thread(target=_run_converter, args=arguments, name="converter", daemon=True)
            worker.start()
    # It takes minutes; a barrier would have a time limit.
    while group.gather(worker is not None and worker.is_alive())[0]:
        time.sleep(0.2)
    problems = group.gather(problems)[0]
    if problems:
        if group.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
        raise ScaMoError(problems[0])
    return folder


def _run_converter(source: Path, target: Path, problems: list[str]) -> None:
    """DeepSpeed's converter, in this process; what goes wrong is appended to `problems`."""
    from deepspeed.checkpoint.ds_to_universal import main

    # One worker runs in this thread; several would be processes that each hold a rank's optimizer shard, and
    # that outlive this one when it is killed.
    arguments = Namespace(
        input_folder=str(source),
        output_folder=str(target),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    silence = io.StringIO()
    try:
        target.mkdir(parents=True)
        with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
            main(arguments)
        _drop_shard(target / "zero" / "optimizer_state.pt")
    except Exception as error:
        cause = (str(error).splitlines() or [""])[0]
        problems.append(f"{source}: DeepSpeed could not convert it: {type(error).__name__}: {cause}")


def _drop_shard(path: Path) -> None:
    """Leave of the global state of ZeRO-3 what is global: the first rank's shard is in the file too."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    # Mapped, so that the shard stays on the disk.
    with torch.serialization.safe_globals([LossScaler, ZeroStageEnum]):
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if "fp32_flat_groups" in state:
        del state["fp32_flat_groups"]
        inner = state["optimizer_state_dict"]
        inner["state"] = {0: {"step": inner["state"][0]["step"]}}
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, path)
