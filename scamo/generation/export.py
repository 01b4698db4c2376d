"""The exported model: one folder with all that generation needs except the frozen text encoder.

config.json         format, schema_version, model (ModelConfig), text_encoder (what TextEncoder.load takes),
fps model.safetensors   the transformer tokenizer/          a tokenizer folder manifest.json       size and
SHA-256 of the files above
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scamo.config import ModelConfig, from_dict, to_dict
from scamo.data.storage import check_files, file_record, read_manifest, whole_folder, write_manifest
from scamo.errors import ScaMoError
from scamo.models.prefix_lm import PrefixLM
from scamo.tokenizers.autoencoder import FSQAutoencoder, check_state, read_description

FORMAT = "scamo-prefix-lm"
SCHEMA_VERSION = 1


def export_model(
    out_folder: str | Path,
    state: Mapping[str, Tensor],
    config: ModelConfig,
    tokenizer_folder: str | Path,
    text_encoder: str,
    *,
    fps: float = 20.0,
) -> Path:
    """Write an exported model, replacing an older one in one step; whole or not at all.

    Args:
        out_folder: where; an existing folder is replaced only if it is an export.
        state: PrefixLM's state dict, any floating dtype (kept).
        config: of that model.
        tokenizer_folder: the tokenizer whose codes it was trained on; copied.
        text_encoder: name or folder of the text encoder.
        fps: frames a second of the motions.

    Raises:
        ScaMoError: the weights do not fit the config, the tokenizer has another number of codes, or the
        folder
            cannot be written.
    """
    from safetensors.torch import save_file

    out_folder, tokenizer_folder = Path(out_folder), Path(tokenizer_folder)
    with torch.device("meta"):
        expected = PrefixLM(config).state_dict()
    check_state(state, expected, f"export to {out_folder}")
    tokenizer = FSQAutoencoder.load(tokenizer_folder)
    check_codes(config, tokenizer, str(tokenizer_folder))
    description = {
        "format": FORMAT,
        "schema_version": SCHEMA_VERSION,
        "model": to_dict(config),
        "text_encoder": text_encoder,
        "fps": fps,
    }
    with whole_folder(out_folder, overwrite=True) as temporary:
        save_file(
            {name: t.detach().cpu().contiguous() for name, t in state.items()},
            temporary / "model.safetensors",
        )
        (temporary / "model.safetensors").chmod(0o644)
        text = json.dumps(description, indent=1, allow_nan=False) + "\n"
        (temporary / "config.json").write_text(text, encoding="utf-8")
        provenance = read_description(tokenizer_folder).get("provenance")
        tokenizer.save(temporary / "tokenizer", provenance=provenance)
        files = {
            str(path.relative_to(temporary)): file_record(path)
            for path in sorted(temporary.rglob("*"))
            if path.is_file()
        }
        write_manifest(temporary, {"format": FORMAT, "schema_version": SCHEMA_VERSION, "files": files})
    return out_folder


def read_export(folder: Path) -> tuple[dict[str, Any], ModelConfig]:
    """config.json of an exported model and its ModelConfig; the files are compared with the manifest.

    Raises:
        ScaMoError: naming the file that is missing, unreadable, changed or of another format.
    """
    path = folder / "config.json"
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ScaMoError(f"{path}: no such file; {folder} is neither a run nor an exported model") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ScaMoError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(description, dict):
        raise ScaMoError(f"{path}: expected an object, got {type(description).__name__}")
    if description.get("format") != FORMAT:
        raise ScaMoError(f"{path}: format {description.get('format')!r}, expected {FORMAT!r}")
    if description.get("schema_version") != SCHEMA_VERSION:
        found = description.get("schema_version")
        raise ScaMoError(f"{path}: schema_version {found!r}, this version reads {SCHEMA_VERSION}")
    for key in ("model", "text_encoder", "fps"):
        if key not in description:
            raise ScaMoError(f"{path}: missing key {key}")
    if (folder / "manifest.json").is_file():
        manifest = read_manifest(folder, format=FORMAT, schema_version=SCHEMA_VERSION)
        check_files(folder, manifest, hashes=True)
    return description, from_dict(ModelConfig, description["model"], where=f"{path}: model")


def load_transformer(
    weights: Path, config: ModelConfig, device: torch.device, dtype: torch.dtype
) -> PrefixLM:
    """PrefixLM of `config` with the tensors of a safetensors file, in evaluation mode and without gradients.

    Raises:
        ScaMoError: the file is missing or unreadable, or a tensor is missing, unknown, of another shape (both
            shapes are named) or not finite.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(weights, device=str(device))
    except FileNotFoundError:
        raise ScaMoError(f"{weights}: no such file") from None
    except (OSError, SafetensorError) as error:
        raise ScaMoError(f"{weights}: not a readable safetensors file: {error}") from None
    with torch.device("meta"):
        model = PrefixLM(config)
    check_state(state, model.state_dict(), str(weights))
    model.load_state_dict({name: t.to(dtype) for name, t in state.items()}, assign=True)
    return model.eval().requires_grad_(False)


def check_codes(config: ModelConfig, tokenizer: FSQAutoencoder, where: str) -> None:
    """Raises ScaMoError when the tokenizer and the transformer do not have the same number of codes."""
    if tokenizer.codes != config.codes:
        raise ScaMoError(
            f"{where}: the tokenizer has {tokenizer.codes} codes, "
            f"but the transformer was made for {config.codes}"
        )
