"""The exported model: one folder with all that generation needs except the frozen text encoder.

config.json         format, schema_version, model (ModelConfig), text_encoder (what TextEncoder.load takes),
                    fps, provenance (of an imported or a published model)
model.safetensors   the transformer
ema.safetensors     the moving average of its weights, where the training kept one: what generates by default
tokenizer/          a tokenizer folder
manifest.json       size and SHA-256 of the files above

A training writes one to RUN/export. `publish` makes a copy to give away: one file of weights, and beside the
files of the manifest, since they may change later, README.md (the model card) and evaluation/ (the reports).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scamo.config import ModelConfig, from_dict, to_dict
from scamo.data.storage import file_record, read_manifest, sha256_of, whole_folder, write_manifest
from scamo.errors import ScaMoError
from scamo.models.prefix_lm import PrefixLM
from scamo.motion.representation import Representation
from scamo.tokenizers import load_tokenizer
from scamo.tokenizers.autoencoder import MotionAutoencoder, read_tokenizer
from scamo.tokenizers.encode import check_one_index
from scamo.weights import (
    CONFIG,
    WEIGHTS,
    check_shapes,
    check_state,
    read_description,
    read_state,
    write_files,
)

FORMAT = "scamo-prefix-lm"
EMA_WEIGHTS = "ema.safetensors"
SCHEMA_VERSION = 1

_TOKENIZER = tuple(f"tokenizer/{name}" for name in (CONFIG, WEIGHTS, "manifest.json"))
_CARD, _REPORTS, _LEDGER = "README.md", "evaluation", "test_split.jsonl"
_PUBLISHED = {CONFIG, WEIGHTS, EMA_WEIGHTS, "tokenizer", "manifest.json", _CARD, _REPORTS, ".gitattributes"}


def export_model(
    out_folder: str | Path,
    state: Mapping[str, Tensor],
    config: ModelConfig,
    tokenizer_folder: str | Path,
    text_encoder: str,
    *,
    fps: float | None = None,
    ema: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write an exported model, replacing an older one in one step; whole or not at all.

    Args:
        out_folder: where; an existing folder is replaced only if it is an export.
        state: PrefixLM's state dict, any floating dtype (kept).
        config: of that model.
        tokenizer_folder: the tokenizer whose codes it was trained on, of either kind; copied.
        text_encoder: name or folder of the text encoder.
        fps: frames a second of the motions: the dataset's; None for that of the tokenizer's representation.
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
        fps=Representation.of(tokenizer.config.feature_dim).fps if fps is None else fps,
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


def publish(
    run: str | Path,
    out_folder: str | Path,
    *,
    name: str = "",
    description: str = "",
    license: str = "",
    data_license: str = "",
    datasets: Sequence[str] = (),
    reports: Sequence[str | Path] = (),
    text_encoder: str = "",
    ema: bool | None = None,
    overwrite: bool = False,
) -> list[str]:
    """Write a run or an exported model as one folder with a card, as a hub takes it; whole or not at all.

    The weights are copied byte by byte. What is given here is kept in config.json's provenance, so that a
    copy of the copy says the same.

    Args:
        run: a training run or an exported model. Reports in RUN/evaluation go into the card.
        out_folder: the folder to write.
        name: of the model; the folder's without it.
        description: a sentence or more for the card.
        license: of the weights: the hub's identifier (cc-by-nc-4.0, ...), or other words.
        data_license: of the training data, in words: it may bind the model.
        datasets: the hub's names of the training data.
        reports: further .json reports of `scamo evaluate`.
        text_encoder: what others load it by, where it is a folder of this machine.
        ema: the moving average of the weights or the last ones; None as `ScaMo.load`.
        overwrite: replace an earlier one.

    Returns:
        What the card warns of, such as a licence that is not stated.

    Raises:
        ScaMoError: the model is incomplete, changed or does not fit its config; a report is none; the folder
            exists, is the model itself or holds more than a model.
    """
    from scamo.generation.card import Sizes, model_card, provenance_of, read_reports

    run, out_folder = Path(run), Path(out_folder)
    source = exported_folder(run)
    if source.resolve().is_relative_to(out_folder.resolve()):
        raise ScaMoError(f"{out_folder}: is where the model itself lies: choose another folder")
    if out_folder.is_dir() and overwrite:
        read_manifest(out_folder, format=FORMAT, schema_version=SCHEMA_VERSION)
        others = sorted(path.name for path in out_folder.iterdir() if path.name not in _PUBLISHED)
        if others:
            raise ScaMoError(f"{out_folder}: would lose {', '.join(others[:4])}: choose another folder")
    found, config = read_export(source)
    weights = weights_file(source, ema)
    shapes = _shapes(weights)
    with torch.device("meta"):
        check_shapes(shapes, PrefixLM(config).state_dict(), str(weights))
    tokenizer = load_tokenizer(source / "tokenizer")
    check_codes(config, tokenizer, str(source / "tokenizer"))
    kept = read_reports(run / _REPORTS, reports)
    given = {
        "name": name,
        "description": description,
        "license": license,
        "data_license": data_license,
        "datasets": list(datasets),
    }
    found["text_encoder"] = text_encoder or found["text_encoder"]
    found["provenance"] = {
        **(found.get("provenance") or provenance_of(run, average=weights.name == EMA_WEIGHTS)),
        **{key: value for key, value in given.items() if value},
    }
    sizes = Sizes(
        sum(tensor.numel() for tensor in shapes.values()),
        sum(tensor.numel() for tensor in tokenizer.state_dict().values()),
        weights.stat().st_size,
        config.max_motion * tokenizer.downsampling,
    )
    card = model_card(
        out_folder.resolve().name, found, config, read_tokenizer(source / "tokenizer"), sizes, kept
    )
    with whole_folder(out_folder, overwrite=overwrite, verify=read_export) as temporary:
        (temporary / "tokenizer").mkdir()
        shutil.copyfile(weights, temporary / WEIGHTS)
        for file in _TOKENIZER:
            if (source / file).is_file():
                shutil.copyfile(source / file, temporary / file)
        text = json.dumps(found, indent=1, allow_nan=False) + "\n"
        (temporary / CONFIG).write_text(text, encoding="utf-8")
        files = {file: file_record(temporary / file) for file in (CONFIG, WEIGHTS, *_TOKENIZER[:2])}
        write_manifest(temporary, {"format": FORMAT, "schema_version": SCHEMA_VERSION, "files": files})
        for report in kept:
            report.copy(temporary / _REPORTS)
        ledger = run / _REPORTS / _LEDGER  # how often the test split was met goes with the model
        if ledger.is_file():
            (temporary / _REPORTS).mkdir(exist_ok=True)
            shutil.copyfile(ledger, temporary / _REPORTS / _LEDGER)
        (temporary / _CARD).write_text(card.text, encoding="utf-8")
    return card.warnings


def _shapes(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file on "meta": nothing but its header is read. Raises ScaMoError."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ScaMoError(f"{path}: not a readable safetensors file: {error}") from None
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def exported_folder(path: str | Path) -> Path:
    """A run's export/, or the exported model itself. Raises ScaMoError when a run has not finished."""
    path = Path(path)
    if (path / "export").is_dir():
        return path / "export"
    if (path / "checkpoints").is_dir():
        raise ScaMoError(f"{path / 'export'}: no such folder; the run has not finished: train.py --resume")
    return path


def identify(run: str | Path, ema: bool | None = None) -> dict[str, Any]:
    """What a model's motions depend on: config, text_encoder, fps, and sha256 of the weights that generate
    and of the tokenizer's files.

    A run and its published copy give the same. Raises ScaMoError as `read_export`.
    """
    folder = exported_folder(run)
    description, config = read_export(folder)
    files = {
        "transformer": weights_file(folder, ema),
        "tokenizer": folder / "tokenizer" / WEIGHTS,
        "tokenizer_config": folder / "tokenizer" / CONFIG,
    }
    for path in files.values():
        if not path.is_file():
            raise ScaMoError(f"{path}: no such file")
    return {
        "sha256": {what: sha256_of(path) for what, path in files.items()},
        "text_encoder": description["text_encoder"],
        "fps": float(description["fps"]),
        "config": to_dict(config),
    }


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
    """Raises ScaMoError when the tokenizer and the transformer do not have the same codes, one a token."""
    check_one_index(tokenizer.config, where)
    if tokenizer.codes != config.codes:
        raise ScaMoError(
            f"{where}: the tokenizer has {tokenizer.codes} codes, "
            f"but the transformer was made for {config.codes}"
        )
