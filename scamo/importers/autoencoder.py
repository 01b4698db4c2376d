"""The convolutional auto-encoder that T2M-GPT's and ScaMo's checkpoints share, under `ckpt["net"]`.

Its names are this project's with a leading "vqvae."; its shapes give all sizes but the dilations (9, 3, 1).
The checkpoints do not hold the statistics that features are normalised with: those are files of their own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scamo.config import FSQ_LEVELS, TokenizerConfig
from scamo.errors import ScaMoError
from scamo.tokenizers.autoencoder import FSQAutoencoder, MotionAutoencoder, VQAutoencoder
from scamo.weights import check_shapes, check_state

PREFIX = "vqvae."


def shape_of(tensors: Mapping[str, Tensor], name: str, dims: int, where: str | Path) -> tuple[int, ...]:
    """Shape of the tensor `name`, of `dims` axes. Raises ScaMoError when missing or of another rank."""
    if name not in tensors:
        raise ScaMoError(f"{where}: missing {name}")
    shape = tuple(tensors[name].shape)
    if len(shape) != dims or 0 in shape:
        raise ScaMoError(f"{where}: {name} is {shape}, expected {dims} axes, none of them empty")
    return shape


def infer_config(
    tensors: Mapping[str, Tensor],
    where: str | Path,
    quantizer: str,
    *,
    codes: int = 0,
    codebook_size: int = 0,
) -> TokenizerConfig:
    """TokenizerConfig of a state dict with released names; only shapes are looked at ("meta" tensors do).

    quantizer: what it must have, "fsq" or "vq". For "fsq" the number of channels leaves a choice of levels:
    codes (K, what a transformer was made for) or codebook_size (its name in the paper) decide; 0: unknown.
    Raises ScaMoError naming what is missing, unknown, misshapen or ambiguous.
    """
    width, feature_dim, _ = shape_of(tensors, PREFIX + "encoder.model.0.weight", 3, where)
    stages = count(tensors, re.escape(PREFIX) + r"encoder\.model\.(\d+)\.0\.", where) - 2
    sizes: dict[str, Any] = {
        "feature_dim": feature_dim,
        "width": width,
        "downsample_stages": stages,
        "depth": count(tensors, re.escape(PREFIX) + r"encoder\.model\.2\.1\.model\.(\d+)\.", where),
        "latent_width": shape_of(tensors, f"{PREFIX}encoder.model.{2 + stages}.weight", 3, where)[0],
    }
    if quantizer == "vq":
        size = shape_of(tensors, PREFIX + "quantizer.codebook", 2, where)[0]
        config = TokenizerConfig(codebook_size=size, quantizer="vq", **sizes)
    else:
        channels = shape_of(tensors, PREFIX + "quantizer.project_in.weight", 2, where)[0]
        size = _codebook_size(channels, codes, codebook_size, where)
        config = TokenizerConfig(codebook_size=size, **sizes)
    check_shapes(tensors, {PREFIX + name: t for name, t in _expected(config).items()}, str(where))
    return config


def count(tensors: Mapping[str, Tensor], pattern: str, where: str | Path) -> int:
    """One more than the highest number that `pattern`, a regular expression, finds at the start of a name.

    Raises ScaMoError when no name fits.
    """
    numbers = [int(found[1]) for name in tensors if (found := re.match(pattern, name))]
    if not numbers:
        plain = pattern.replace("\\", "").replace("(d+)", "*")
        raise ScaMoError(f"{where}: missing {plain}*")
    return max(numbers) + 1


def _codebook_size(channels: int, codes: int, codebook_size: int, where: str | Path) -> int:
    if codebook_size and codebook_size not in FSQ_LEVELS:
        raise ScaMoError(
            f"codebook_size = {codebook_size}: expected one of {', '.join(map(str, FSQ_LEVELS))}"
        )
    products = {size: TokenizerConfig(codebook_size=size).codes for size in FSQ_LEVELS}
    fitting = [size for size, levels in FSQ_LEVELS.items() if len(levels) == channels]
    if not fitting:
        raise ScaMoError(f"{where}: {channels} FSQ channels, the released codebooks have 3 to 6")
    chosen = [size for size in fitting if codebook_size in (0, size) and codes in (0, products[size])]
    if len(chosen) == 1:
        return chosen[0]
    choices = " or ".join(f"{size} ({products[size]} codes)" for size in fitting)
    if chosen:
        raise ScaMoError(f"{where}: {channels} FSQ channels are codebook_size {choices}: say which")
    asked = [f"codebook_size = {codebook_size}"] if codebook_size else []
    asked += [f"a transformer of {codes} codes"] if codes else []
    raise ScaMoError(
        f"{where}: {channels} FSQ channels are codebook_size {choices}, not {' and '.join(asked)}"
    )


def _kind(config: TokenizerConfig) -> type[MotionAutoencoder]:
    return VQAutoencoder if config.quantizer == "vq" else FSQAutoencoder


def _expected(config: TokenizerConfig) -> dict[str, Tensor]:
    """The state dict of a released network of these sizes, on "meta", with this project's names."""
    with torch.device("meta"):
        state = _kind(config)(config).state_dict()
    return {name: tensor for name, tensor in state.items() if name not in ("mean", "std")}


class Statistics(NamedTuple):
    """What features are normalised with, float32 (feature_dim,) each, and the files they came from."""

    mean: NDArray[np.float32]
    std: NDArray[np.float32]
    files: tuple[Path, Path]


def read_statistics(mean: str | Path | None, std: str | Path | None, feature_dim: int) -> Statistics:
    """Read the .npy files of mean and deviation, (feature_dim,) floats each.

    Raises ScaMoError when one is not given, missing, unreadable, of another shape, not finite, or a deviation
    is not positive.
    """
    if mean is None or std is None:
        raise ScaMoError(
            f"{'mean' if mean is None else 'std'} is missing: the released checkpoints do not hold what "
            f"features are normalised with; give the .npy files of mean and std, {feature_dim} values each, "
            "that the tokenizer was trained with"
        )
    files = Path(mean), Path(std)
    arrays = [_read_array(path, feature_dim, positive=path is files[1]) for path in files]
    return Statistics(arrays[0], arrays[1], files)


def build(
    tensors: Mapping[str, Tensor], config: TokenizerConfig, statistics: Statistics, where: str | Path
) -> MotionAutoencoder:
    """The tokenizer of a state dict that `infer_config` accepted, in float32 and evaluation mode.

    Raises ScaMoError naming a tensor that is not finite.
    """
    check_state(tensors, {PREFIX + name: t for name, t in _expected(config).items()}, str(where))
    model = _kind(config)(config, statistics.mean, statistics.std)
    state = {name.removeprefix(PREFIX): tensor.float() for name, tensor in tensors.items()}
    model.load_state_dict(state | {"mean": model.mean, "std": model.std})
    return model.eval()


def _read_array(path: Path, feature_dim: int, *, positive: bool) -> NDArray[np.float32]:
    try:
        array = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise ScaMoError(f"{path}: no such file") from None
    except (OSError, ValueError, EOFError) as error:
        raise ScaMoError(
            f"{path}: not a readable .npy file of numbers: {str(error).splitlines()[0]}"
        ) from None
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f" or array.shape != (feature_dim,):
        found = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
        raise ScaMoError(
            f"{path}: {found}, expected floats ({feature_dim},): one for each feature of the tokenizer"
        )
    array = array.astype(np.float32)
    bad = ~np.isfinite(array) | (positive & (array <= 0))
    if bad.any():
        index = int(np.argmax(bad))
        kind = "positive" if positive else "finite"
        raise ScaMoError(f"{path}: value {index} is {array[index]}, expected a {kind} number")
    return array
