"""The exported model: one folder with all that generation needs except the frozen text encoder.

config.json         format, schema_version, model (ModelConfig), text_encoder (what TextEncoder.load takes),
                    fps, provenance (of an imported model)
model.safetensors   the transformer
ema.safetensors     the moving average of its weights, where the training kept one: what generates by default
tokenizer/          a tokenizer folder
manifest.json       size and SHA-256 of the files above
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scamo.config import ModelConfig, from_dict, to_dict
from scamo.data.storage import whole_folder
from scamo.errors import ScaMoError
from scamo.models.prefix_lm import PrefixLM
from scamo.tokenizers import load_tokenizer
from scamo.tokenizers.autoencoder import MotionAutoencoder, read_tokenizer
from scamo.weights import CONFIG, WEIGHTS, check_state, read_description, read_state, write_files

FORMAT = "scamo-prefix-lm"
EMA_WEIGHTS = "ema.safetensors"
SCHEMA_VERSION = 1


def export_model(
    out_folder: str | Path,
    state: Mapping[str, Tensor],
    config: ModelConfig,
    tokenizer_folder: str | Path,
    text_encoder: str,
    *,
    fps: float = 20.0,
    ema: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write an exported model, replacing an older one in one step; whole or not at all.

    Args:
        out_folder: where; an existing folder is replaced only if it is an export.
        state: PrefixLM's state dict, any floating dtype (kept).
        config: of that model.
        tokenizer_folder: the tokenizer whose codes it was trained on, of either kind; copied.
        text_encoder: name or folder of the text encoder.
        fps: frames a second of the motions.
        ema: the moving average of the same tensors, if there is one.

    Raises:
        ScaMoError: the weights do not fit the config, the tokenizer has another number of codes, or the
            folder cannot be written.
    """
    with torch.device("meta"):
        expected = PrefixLM(config).state_dict()
    check_state(state, expected, f"export to {out_folder}")
    if ema is not None:
        check_state(ema, expected, f"export to {out_folder}: {EMA_WEIGHTS}")
    tokenizer_folder = Path(tokenizer_folder)
    tokenizer = load_tokenizer(tokenizer_folder)
    check_codes(config, tokenizer, str(tokenizer_folder))
    return write_export(
        out_folder,
        state,
        config,
        tokenizer,
        text_encoder,
        fps=fps,
        tokenizer_provenance=read_tokenizer(tokenizer_folder).get("provenance"),
        overwrite=True,
        ema=ema,
    )


def write_export(
    out_folder: str | Path,
    state: Mapping[str, Tensor],
    config: ModelConfig,
    tokenizer: MotionAutoencoder,
    text_encoder: str,
    *,
    fps: float,
    provenance: Mapping[str, Any] | None = None,
    tokenizer_provenance: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    ema: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write an exported model of parts that were checked against each other; whole or not at all.

    provenance: where the transformer comes from, for config.json; tokenizer_provenance: for the tokenizer's.
    Raises ScaMoError when the folder exists and may not be replaced, or cannot be written.
    """
    from safetensors.torch import save_file

    description = {
        "format": FORMAT,
        "schema_version": SCHEMA_VERSION,
        "model": to_dict(config),
        "text_encoder": text_encoder,
        "fps": fps,
    }
    if provenance is not None:
        description["provenance"] = dict(provenance)
    out_folder = Path(out_folder)
    with whole_folder(out_folder, overwrite=overwrite) as temporary:
        tokenizer.save(temporary / "tokenizer", provenance=tokenizer_provenance)
        if ema is not None:
            save_file(dict(ema), temporary / EMA_WEIGHTS)
            (temporary / EMA_WEIGHTS).chmod(0o644)
        write_files(temporary, state, description)
    return out_folder


def read_export(folder: Path) -> tuple[dict[str, Any], ModelConfig]:
    """config.json of an exported model and its ModelConfig; the files are compared with the manifest.

    Raises:
        ScaMoError: naming the file that is missing, unreadable, changed or of another format.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise ScaMoError(f"{path}: no such file; {folder} is neither a run nor an exported model")
    required = ("model", "text_encoder", "fps")
    description = read_description(folder, (FORMAT,), SCHEMA_VERSION, "model", required=required)
    return description, from_dict(ModelConfig, description["model"], where=f"{path}: model")


def weights_file(folder: Path, ema: bool | None = None) -> Path:
    """The file of an exported model that generates: the moving average (True), the last weights (False).

    None takes the average where there is one. Raises ScaMoError when it is asked for and not there.
    """
    average = folder / EMA_WEIGHTS
    if ema and not average.is_file():
        raise ScaMoError(f"{average}: no such file; the training kept no average (training.ema_decay)")
    return average if ema or (ema is None and average.is_file()) else folder / WEIGHTS


def load_transformer(
    weights: Path, config: ModelConfig, device: torch.device, dtype: torch.dtype
) -> PrefixLM:
    """PrefixLM of `config` with the tensors of a safetensors file, in evaluation mode and without gradients.

    Raises:
        ScaMoError: the file is missing or unreadable, or a tensor is missing, unknown, of another shape (both
            shapes are named) or not finite.
    """
    state = read_state(weights, str(device))
    with torch.device("meta"):
        model = PrefixLM(config)
    check_state(state, model.state_dict(), str(weights))
    model.load_state_dict({name: t.to(dtype) for name, t in state.items()}, assign=True)
    return model.eval().requires_grad_(False)


def check_codes(config: ModelConfig, tokenizer: MotionAutoencoder, where: str) -> None:
    """Raises ScaMoError when the tokenizer and the transformer do not have the same number of codes."""
    if tokenizer.codes != config.codes:
        raise ScaMoError(
            f"{where}: the tokenizer has {tokenizer.codes} codes, "
            f"but the transformer was made for {config.codes}"
        )
