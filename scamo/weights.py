"""A model's folder: config.json (what it is), model.safetensors (tensors), manifest.json (hashes of both)."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from scamo.data.storage import check_files, file_record, read_manifest, whole_folder, write_manifest
from scamo.errors import ScaMoError

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def save_folder(
    folder: str | Path,
    state: Mapping[str, Tensor],
    description: Mapping[str, Any],
    *,
    overwrite: bool = False,
) -> None:
    """Write a model's folder, whole or not at all. description: JSON values with format and schema_version.

    Raises ScaMoError when the folder exists and `overwrite` is false.
    """
    with whole_folder(Path(folder), overwrite=overwrite) as temporary:
        write_files(temporary, state, description)


def write_files(folder: Path, state: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """Write the files of `save_folder` into an existing folder; the manifest lists everything found there."""
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    save_file(tensors, folder / WEIGHTS)
    (folder / WEIGHTS).chmod(0o644)
    text = json.dumps(description, indent=1, allow_nan=False) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")
    files = {
        str(path.relative_to(folder)): file_record(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "manifest.json"
    }
    head = {key: description[key] for key in ("format", "schema_version")}
    write_manifest(folder, head | {"files": files})


def read_description(
    folder: Path, formats: Collection[str], schema_version: int, what: str, *, required: Collection[str] = ()
) -> dict[str, Any]:
    """The config.json of a model's folder, after its files were compared with the manifest's hashes.

    formats: what it may be; what: "tokenizer", "evaluator", ... for the messages; required: keys.
    Raises ScaMoError naming the file: missing, damaged, of another format or version, or without a key.
    """
    path = folder / CONFIG
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ScaMoError(f"{path}: no such file; {folder} is not a {what} folder") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ScaMoError(f"{path}: not valid JSON: {error}") from None
    found = description.get("format") if isinstance(description, dict) else type(description).__name__
    if found not in formats:
        raise ScaMoError(f"{path}: format {found!r}, expected {' or '.join(map(repr, formats))}")
    version = description.get("schema_version")
    if version != schema_version:
        raise ScaMoError(f"{path}: schema_version {version!r}, this version reads {schema_version}")
    for key in required:
        if key not in description:
            raise ScaMoError(f"{path}: missing key {key}")
    if (folder / "manifest.json").is_file():
        manifest = read_manifest(folder, format=description["format"], schema_version=schema_version)
        check_files(folder, manifest, hashes=True)
    return description


def read_state(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises ScaMoError naming it when missing or unreadable."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path, device=device)
    except FileNotFoundError:
        raise ScaMoError(f"{path}: no such file") from None
    except (OSError, SafetensorError) as error:
        raise ScaMoError(f"{path}: not a readable safetensors file: {error}") from None


def check_state(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str) -> None:
    """Compare names and shapes of two state dicts, and look for values that are not finite.

    Raises ScaMoError naming what does not fit.
    """
    check_shapes(found, expected, where)
    check_finite(found, where)


def check_finite(found: Mapping[str, Tensor], where: str) -> None:
    """Raises ScaMoError naming the tensor that holds a value that is not finite."""
    for name, tensor in found.items():
        if not tensor.isfinite().all():
            raise ScaMoError(f"{where}: {name} holds values that are not finite")


def check_shapes(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str) -> None:
    """Compare names and shapes of two state dicts, of any device ("meta" too). Raises as `check_state`."""
    missing, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    other = [
        f"{name} is {tuple(found[name].shape)}, expected {tuple(expected[name].shape)}"
        for name in expected
        if name in found and found[name].shape != expected[name].shape
    ]
    faults = [
        f"{word} {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for word, names in (("missing", missing), ("unknown", unknown), ("shape:", other))
        if names
    ]
    if faults:
        raise ScaMoError(f"{where}: the weights do not fit the config: {'; '.join(faults)}")
