"""Checkpoints that are whole or absent.

DeepSpeed writes one shard per rank, without a checksum, an fsync or a rename. Here it writes into a
temporary folder; every file is synced and hashed, `manifest.json` lists them, `COMPLETE` seals the manifest,
and only then the folder gets its name:

    checkpoints/step-0000300/  latest  global_step300/*.pt  manifest.json  COMPLETE

The number is that of the updates done. A resume reads every file again and compares; a checkpoint that fails
is named and the one before it is taken.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from scamo.errors import ScaMoError

FORMAT = "scamo-checkpoint-1"
MANIFEST, COMPLETE = "manifest.json", "COMPLETE"
PARTIAL = ".partial"
_NAME = re.compile(r"step-(\d{7,})")


class Group(Protocol):
    """What is needed of the ranks; `loop.Ranks` is the real one."""

    rank: int
    size: int

    def barrier(self) -> None: ...
    def gather(self, value: Any) -> list[Any]: ...


class Alone:
    """A group of one process."""

    rank, size = 0, 1

    def barrier(self) -> None:
        pass

    def gather(self, value: Any) -> list[Any]:
        return [value]


def checkpoint_name(step: int) -> str:
    return f"step-{step:07d}"


def tag_name(step: int) -> str:
    """The folder inside a checkpoint that DeepSpeed's own tools know as the tag."""
    return f"global_step{step}"


def step_of(folder: Path) -> int:
    """The updates done, from the folder's name."""
    match = _NAME.fullmatch(folder.name)
    if not match:
        raise ScaMoError(f"{folder}: not a checkpoint folder (step-0000000)")
    return int(match[1])


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first, whole or not; temporary ones are not among them."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if p.is_dir() and _NAME.fullmatch(p.name)), key=step_of)


def save_checkpoint(
    folder: Path,
    step: int,
    write: Callable[[Path], None],
    *,
    facts: dict[str, Any],
    group: Group,
) -> Path:
    """Write one checkpoint; all ranks call it.

    Args:
        folder: the run's checkpoints/ on a file system that all ranks see.
        step: updates done.
        write: puts the state into the folder it is given; all ranks call it (DeepSpeed's save_checkpoint).
        facts: kept in the manifest (number of ranks, ZeRO stage, ...).
        group: the ranks.

    Returns:
        The finished folder. On an exception the temporary folder stays until `remove_partial`.
    """
    final = folder / checkpoint_name(step)
    partial = folder / (checkpoint_name(step) + PARTIAL)
    if group.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    group.barrier()
    write(partial)
    group.barrier()

    # The ranks share the reading: 48 GB take a minute on one core.
    mine = _files(partial)[group.rank :: group.size]
    hashed = {name: _describe(partial / name, sync=True) for name in mine}
    parts = group.gather(hashed)
    if group.rank == 0:
        files = {name: part[name] for part in parts for name in sorted(part)}
        manifest = {"format": FORMAT, "step": step, **facts, "files": dict(sorted(files.items()))}
        text = json.dumps(manifest, indent=1) + "\n"
        write_synced(partial / MANIFEST, text)
        for directory in [*(p for p in partial.rglob("*") if p.is_dir()), partial]:
            _sync_directory(directory)
        write_synced(partial / COMPLETE, hashlib.sha256(text.encode()).hexdigest() + "\n")
        _sync_directory(partial)
        if final.exists():
            remove_checkpoint(final)
        os.replace(partial, final)
        # The first one brings checkpoints/ with it.
        for directory in (folder, folder.parent):
            _sync_directory(directory)
    group.barrier()
    return final


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The sealed manifest. Raises ScaMoError when it or its COMPLETE marker is missing or altered."""
    try:
        seal = (checkpoint / COMPLETE).read_text(encoding="utf-8").strip()
        text = (checkpoint / MANIFEST).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ScaMoError(f"{checkpoint}: incomplete: {Path(error.filename).name} is missing") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ScaMoError(f"{checkpoint}: not readable: {error}") from None
    if hashlib.sha256(text.encode()).hexdigest() != seal:
        raise ScaMoError(f"{checkpoint / MANIFEST}: corrupt: SHA-256 differs from {COMPLETE}")
    manifest = json.loads(text)
    if manifest.get("format") != FORMAT:
        raise ScaMoError(f"{checkpoint / MANIFEST}: format {manifest.get('format')!r}, expected {FORMAT!r}")
    return manifest


def verify_checkpoint(checkpoint: Path, group: Group | None = None) -> dict[str, Any]:
    """Read every file again and compare sizes and SHA-256; the ranks share the work.

    Returns:
        The manifest.

    Raises:
        ScaMoError: on all ranks alike; names the first file that is missing, short or altered.
    """
    group = group or Alone()
    problem = ""
    manifest: dict[str, Any] = {}
    try:
        manifest = read_manifest(checkpoint)
    except ScaMoError as error:
        problem = str(error)
    for name, expected in list(manifest.get("files", {}).items())[group.rank :: group.size]:
        path = checkpoint / name
        if not path.is_file():
            problem = f"{path}: missing"
        elif path.stat().st_size != expected["bytes"]:
            problem = f"{path}: {path.stat().st_size} bytes, expected {expected['bytes']}"
        elif _describe(path) != expected:
            problem = f"{path}: corrupt: SHA-256 differs from {MANIFEST}"
        if problem:
            break
    problems = [p for p in group.gather(problem) if p]
    if problems:
        raise ScaMoError(problems[0])
    return manifest


def newest_checkpoint(
    folder: Path, *, group: Group | None = None, warn: Callable[[str], None] = print
) -> tuple[Path, dict[str, Any]]:
    """The newest checkpoint that verifies, with its manifest; a damaged one is named through `warn`.

    Raises:
        ScaMoError: there is none, or none of them verifies.
    """
    group = group or Alone()
    checkpoints = group.gather(list_checkpoints(folder))[0]
    if not checkpoints:
        raise ScaMoError(f"{folder}: no checkpoint to resume from")
    for checkpoint in reversed(checkpoints):
        try:
            return checkpoint, verify_checkpoint(checkpoint, group)
        except ScaMoError as error:
            warn(f"not resuming from {checkpoint.name}: {error}")
    raise ScaMoError(f"{folder}: none of its {len(checkpoints)} checkpoints is whole")


def prune_checkpoints(folder: Path, keep: int, every: int = 0) -> None:
    """Keep the newest `keep` and the steps that `every` divides; others go, and what is not sealed."""
    whole = [p for p in list_checkpoints(folder) if (p / COMPLETE).is_file()]
    kept = {*whole[-keep:], *(p for p in whole if every and step_of(p) % every == 0)}
    for checkpoint in set(list_checkpoints(folder)) - kept:
        remove_checkpoint(checkpoint)


def remove_checkpoint(checkpoint: Path) -> None:
    """Unseal first: a deletion that is cut off must not leave something that looks whole."""
    (checkpoint / COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)


def unseal_after(folder: Path, step: int) -> None:
    """A run goes on from `step`: what is newer was found damaged, and must not count among the kept ones."""
    for checkpoint in list_checkpoints(folder):
        if step_of(checkpoint) > step:
            (checkpoint / COMPLETE).unlink(missing_ok=True)


def remove_partial(folder: Path) -> None:
    """Remove what an earlier process left half-written."""
    if folder.is_dir():
        for path in folder.glob(f"*{PARTIAL}"):
            shutil.rmtree(path, ignore_errors=True)


def missing_space(folder: Path, needed: int) -> int:
    """Bytes that the file system of `folder` lacks for `needed` more; 0 when it has them."""
    while not folder.exists():
        folder = folder.parent
    return max(0, needed - shutil.disk_usage(folder).free)


def _files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def _describe(path: Path, *, sync: bool = False) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if sync:
            os.fsync(file.fileno())
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": digest}


def write_synced(path: Path, text: str) -> None:
    """Write a text file that is on the disk when this returns."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
