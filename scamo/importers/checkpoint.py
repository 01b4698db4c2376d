"""Reading other projects' torch checkpoints: tensors only, and no code of theirs is run."""

from __future__ import annotations

import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scamo.data.storage import sha256_of
from scamo.errors import ScaMoError


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """What `torch.save` put into a file, a dict, on the CPU; memory-mapped where the file's format allows it.

    Raises ScaMoError naming the file: missing, not a checkpoint, damaged, or one that holds more than tensors
    and plain values, which could run code when it is opened (nothing of it is run here).
    """
    path = Path(path)
    if not path.is_file():
        raise ScaMoError(f"{path}: {'a folder, expected a file' if path.is_dir() else 'no such file'}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle protocol of files that are refused anyway
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError as error:
        raise ScaMoError(f"{path}: cannot be read: {error.strerror or error}") from None
    except Exception as error:  # torch raises a dozen kinds for a file that is no checkpoint
        found = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if found:
            raise ScaMoError(
                f"{path}: holds a pickled object, {found[1]}, and not only tensors: it could run code, so "
                "it is not opened"
            ) from None
        raise ScaMoError(
            f"{path}: not a torch checkpoint, or a damaged one ({type(error).__name__})"
        ) from None
    if not isinstance(content, dict):
        raise ScaMoError(f"{path}: holds a {type(content).__name__}, expected a dict")
    return content


def tensors_under(content: Mapping[str, Any], key: str, where: str | Path) -> dict[str, Tensor]:
    """The state dict content[key], without the leading "module." that data-parallel wrappers add.

    Raises ScaMoError naming `where` and what is not there or no tensor.
    """
    if key not in content:
        raise ScaMoError(f"{where}: no key {key!r}: found {keys_of(content)}")
    state = content[key]
    if not isinstance(state, Mapping):
        raise ScaMoError(f"{where}: {key!r} is a {type(state).__name__}, expected a dict of tensors")
    tensors: dict[str, Tensor] = {}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ScaMoError(f"{where}: {key!r}: {name} is a {type(value).__name__}, expected a tensor")
        plain = str(name).removeprefix("module.")
        if plain in tensors:
            raise ScaMoError(f"{where}: {key!r}: {plain} is there with and without the leading module.")
        tensors[plain] = value
    return tensors


def keys_of(content: Mapping[str, Any]) -> str:
    """The first keys of a checkpoint, for a message."""
    keys = [repr(key) for key in content]
    return (
        ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "") if keys else "nothing"
    )


def provenance(importer: str, *files: str | Path) -> dict[str, Any]:
    """Where imported weights come from: the importer, and name and SHA-256 of each file."""
    return {
        "importer": importer,
        "files": [{"name": Path(file).name, "sha256": sha256_of(Path(file))} for file in files],
    }


def check_free(out: Path, overwrite: bool) -> None:
    """Raises ScaMoError when `out` exists and is not to be overwritten: before minutes of reading."""
    if os.path.lexists(out) and not overwrite:
        raise ScaMoError(f"{out} exists: choose another name, or ask for it to be overwritten")
