"""The released ScaMo checkpoints: tokenizers under `ckpt["net"]`, transformers under `ckpt["trans"]`.

What their shapes do not say is asked for: heads outside the paper's sizes, FSQ levels of a tokenizer alone,
the normalisation statistics, the text encoder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from scamo.config import MODEL_SIZES, ModelConfig
from scamo.errors import ScaMoError
from scamo.generation.export import check_codes, write_export
from scamo.importers.autoencoder import build, count, infer_config, read_statistics, shape_of
from scamo.importers.checkpoint import check_free, keys_of, provenance, read_checkpoint, tensors_under
from scamo.tokenizers import load_tokenizer
from scamo.tokenizers.autoencoder import MotionAutoencoder, read_tokenizer
from scamo.weights import check_finite, check_shapes

# This project's names -> the released ones; two are joined along the first axis.
OUTER: dict[str, tuple[str, ...]] = {
    "embedding.weight": ("transformer.wte.weight",),
    "text_projection.weight": ("llama_proj.weight",),
    "text_projection.bias": ("llama_proj.bias",),
    "norm.weight": ("transformer.ln_f.scale",),
    "head.weight": ("lm_head.weight",),
}
BLOCK: dict[str, tuple[str, ...]] = {
    "norm_1.weight": ("rms_1.scale",),
    "qkv.weight": ("attn.c_attn.weight",),
    "out.weight": ("attn.c_proj.weight",),
    "norm_2.weight": ("rms_2.scale",),
    "gate_up.weight": ("mlp.c_fc1.weight", "mlp.c_fc2.weight"),
    "down.weight": ("mlp.c_proj.weight",),
}

# Widths of the states of text encoders that are known by name.
TEXT_WIDTHS = {
    "minilm": 384,
    "flan-t5-xl": 2048,
    "google/flan-t5-small": 512,
    "google/flan-t5-base": 768,
    "google/flan-t5-large": 1024,
    "google/flan-t5-xl": 2048,
    "google/flan-t5-xxl": 4096,
}


class _Part(NamedTuple):
    """A state dict and the file it came from."""

    tensors: dict[str, Tensor]
    path: Path


def import_scamo_official(
    checkpoints: Sequence[str | Path],
    out: str | Path,
    *,
    mean: str | Path | None = None,
    std: str | Path | None = None,
    tokenizer: str | Path | None = None,
    codebook_size: int = 0,
    text_encoder: str = "flan-t5-xl",
    heads: int = 0,
    fps: float = 20.0,
    overwrite: bool = False,
) -> Path:
    """Write a tokenizer's folder, or with a transformer a model that `ScaMo.load` opens; whole or not at all.

    Each file is recognised by what it holds. The transformer keeps its dtype, the tokenizer becomes float32.
    Where the head is tied to the embedding it has a row for PAD, which is dropped: PAD can then not be
    generated, as in all untied checkpoints.

    Args:
        checkpoints: one file with both, or one for each, or one alone.
        out: the folder to write.
        mean, std: .npy files (263,), needed with a tokenizer's checkpoint, which does not hold them.
        tokenizer: a tokenizer folder for a transformer whose tokenizer is not among the checkpoints.
        codebook_size: the paper's name of the codebook, 256 to 65536; needed only for a tokenizer alone.
        text_encoder: name or folder of the encoder that the transformer reads (`TextEncoder.load`).
        heads: of the transformer; 0 takes those of the paper's size with these layers and width.
        fps: frames a second of the motions.
        overwrite: replace what was written to `out` before.

    Returns:
        `out`.

    Raises:
        ScaMoError: a file is missing or not what it should be; a tensor is missing, unknown, misshapen or
            not finite; the parts do not fit, one is missing or there are two of it; an argument is needed or
            of no use; or `out` exists.
    """
    out = Path(out)
    check_free(out, overwrite)
    if not 0 < fps < float("inf"):
        raise ScaMoError(f"fps = {fps}: expected a value above 0")
    parts = _parts([Path(path) for path in checkpoints])
    net = parts.get("net")
    if net and tokenizer is not None:
        raise ScaMoError(f"two tokenizers: {net.path} and {tokenizer}; give one")
    if not net and (mean is not None or std is not None or codebook_size):
        raise ScaMoError(
            "mean, std and codebook_size belong to a tokenizer's checkpoint, and none was given: a tokenizer "
            "folder has its own"
        )
    if "trans" not in parts:
        made, source = _tokenizer(parts["net"], 0, codebook_size, mean, std)
        made.save(out, provenance=source, overwrite=overwrite)
        return out

    trans = parts["trans"]
    config = infer_transformer(trans.tensors, trans.path, heads)
    check_finite(trans.tensors, str(trans.path))
    _check_text_encoder(text_encoder, config.text_width, trans.path)
    if net:
        made, source = _tokenizer(net, config.codes, codebook_size, mean, std)
    elif tokenizer is not None:
        made = load_tokenizer(tokenizer)
        source = read_tokenizer(Path(tokenizer)).get("provenance", {})
    else:
        raise ScaMoError(
            f"{trans.path}: a transformer without its tokenizer, which decodes its codes: add the "
            "tokenizer's checkpoint, or name a tokenizer folder"
        )
    check_codes(config, made, str(net.path if net else tokenizer))
    if Path(text_encoder).is_dir():  # so that the model finds it from anywhere
        text_encoder = str(Path(text_encoder).resolve())
    return write_export(
        out,
        convert_transformer(trans.tensors, config),
        config,
        made,
        text_encoder,
        fps=fps,
        provenance=provenance("scamo_official", trans.path),
        tokenizer_provenance=source,
        overwrite=overwrite,
    )


def _parts(paths: Sequence[Path]) -> dict[str, _Part]:
    """The tokenizer ("net") and the transformer ("trans") that the files hold, at least one of the two."""
    if not paths:
        raise ScaMoError("no checkpoint was given")
    found: dict[str, _Part] = {}
    for path in paths:
        content = read_checkpoint(path)
        held = []
        for key, prefix in (("net", "vqvae."), ("trans", "transformer.")):
            if not isinstance(content.get(key), Mapping):
                continue
            tensors = tensors_under(content, key, path)
            if not any(name.startswith(prefix) for name in tensors):
                raise ScaMoError(f"{path}: {key!r} holds no {prefix}*: found {keys_of(tensors)}")
            for name, tensor in tensors.items():
                if not tensor.is_floating_point():
                    raise ScaMoError(f"{path}: {name} holds {tensor.dtype}, expected floating-point numbers")
            if key in found:
                what = "tokenizers" if key == "net" else "transformers"
                raise ScaMoError(f"two {what}: {found[key].path} and {path}; give one")
            found[key] = _Part(tensors, path)
            held.append(key)
        if not held:
            raise ScaMoError(
                f"{path}: neither a tokenizer (vqvae.* under 'net') nor a transformer (transformer.* under "
                f"'trans'): found {keys_of(content)}"
            )
    return found


def _tokenizer(
    net: _Part, codes: int, codebook_size: int, mean: str | Path | None, std: str | Path | None
) -> tuple[MotionAutoencoder, dict]:
    """The tokenizer of a checkpoint and its provenance."""
    config = infer_config(net.tensors, net.path, "fsq", codes=codes, codebook_size=codebook_size)
    statistics = read_statistics(mean, std, config.feature_dim)
    source = provenance("scamo_official", net.path, *statistics.files)
    return build(net.tensors, config, statistics, net.path), source


def released_names(layers: int) -> dict[str, tuple[str, ...]]:
    """PrefixLM's names -> the released names, of which two are joined along the first axis."""
    names = dict(OUTER)
    for i in range(layers):
        for ours, theirs in BLOCK.items():
            names[f"blocks.{i}.{ours}"] = tuple(f"transformer.h.{i}.{name}" for name in theirs)
    return names


def infer_transformer(tensors: Mapping[str, Tensor], where: str | Path, heads: int = 0) -> ModelConfig:
    """ModelConfig of a state dict with released names; only shapes are looked at ("meta" tensors do).

    heads: 0 takes those of the paper's size with these layers and width.
    Raises ScaMoError naming what is missing, unknown, misshapen, or cannot be known.
    """
    rows, width = shape_of(tensors, "transformer.wte.weight", 2, where)
    text_width = shape_of(tensors, "llama_proj.weight", 2, where)[1]
    head_rows = shape_of(tensors, "lm_head.weight", 2, where)[0]
    if rows < 3:
        raise ScaMoError(f"{where}: transformer.wte.weight has {rows} rows, expected codes, EOS and PAD")
    layers = count(tensors, r"transformer\.h\.(\d+)\.", where)
    size = next((name for name, (n, _, w) in MODEL_SIZES.items() if (n, w) == (layers, width)), "")
    if not size and not heads:
        raise ScaMoError(
            f"{where}: {layers} layers of width {width} are none of the paper's sizes, and the weights do "
            "not tell the number of heads: give heads"
        )
    layers, width = (0, 0) if size else (layers, width)
    try:
        config = ModelConfig(
            size=size, layers=layers, heads=heads, width=width, codes=rows - 2, text_width=text_width
        )
    except ScaMoError as error:
        raise ScaMoError(f"{where}: {error}") from None
    check_shapes(tensors, _expected(config, tied=head_rows == rows), str(where))
    return config


def _expected(config: ModelConfig, tied: bool) -> dict[str, Tensor]:
    """A state dict with released names and shapes, on "meta"."""
    c, hidden = config.width, config.hidden
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (config.codes + 2, c),
        "lm_head.weight": (config.codes + (2 if tied else 1), c),
        "llama_proj.weight": (c, config.text_width),
        "llama_proj.bias": (c,),
        "transformer.ln_f.scale": (c,),
    }
    for i in range(config.layers):
        shapes |= {
            f"transformer.h.{i}.rms_1.scale": (c,),
            f"transformer.h.{i}.attn.c_attn.weight": (3 * c, c),
            f"transformer.h.{i}.attn.c_proj.weight": (c, c),
            f"transformer.h.{i}.rms_2.scale": (c,),
            f"transformer.h.{i}.mlp.c_fc1.weight": (hidden, c),
            f"transformer.h.{i}.mlp.c_fc2.weight": (hidden, c),
            f"transformer.h.{i}.mlp.c_proj.weight": (c, hidden),
        }
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def convert_transformer(tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """PrefixLM's state dict from one that `infer_transformer` accepted; dtypes are kept.

    A head that is tied to the embedding has a last row for PAD: without it PAD cannot be generated.
    """
    state = {}
    for ours, theirs in released_names(config.layers).items():
        parts = [tensors[name] for name in theirs]
        state[ours] = parts[0] if len(parts) == 1 else torch.cat(parts)
    # A copy: a tied head shares its memory with the embedding, and safetensors has no shared tensors.
    state["head.weight"] = state["head.weight"][: config.codes + 1].clone()
    return state


def _check_text_encoder(name: str, width: int, where: Path) -> None:
    """Raises ScaMoError when the encoder is known to have states of another width."""
    found = TEXT_WIDTHS.get(name)
    if Path(name).is_dir():
        try:
            description = json.loads((Path(name) / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ScaMoError(f"text encoder {name}: config.json is missing or not JSON: {error}") from None
        found = description.get("d_model", description.get("hidden_size"))
    if found is not None and found != width:
        raise ScaMoError(
            f"{where}: llama_proj.weight takes text states of width {width}, text encoder {name} gives "
            f"{found}: name the encoder that the transformer was trained with"
        )
