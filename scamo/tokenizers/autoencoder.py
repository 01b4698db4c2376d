"""The convolutional Motion FSQ-VAE (paper section 3.1; the layers are those of the released code).

Shapes: B motions, T frames, C features a frame (263), W width, E latent width, N tokens = T // downsampling.
Activations are (B, T, W), so that channels are contiguous: 1x1 convolutions are plain matrix products, and
wider ones get the channels-last layout without a copy (in bf16 on a CPU 1.2 times as fast as Conv1d).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scamo.config import TokenizerConfig, from_dict, to_dict
from scamo.data.storage import check_files, file_record, read_manifest, whole_folder, write_manifest
from scamo.errors import ScaMoError
from scamo.tokenizers.fsq import FSQ

FORMAT = "scamo-fsq-tokenizer"
SCHEMA_VERSION = 1


class Conv(nn.Conv1d):
    """`nn.Conv1d` on (B, T, W) instead of (B, W, T); weights and names are Conv1d's."""

    def forward(self, x: Tensor) -> Tensor:
        if self.kernel_size == (1,):
            return F.linear(x, self.weight[:, :, 0], self.bias)
        image = x.transpose(1, 2).unsqueeze(2)
        weight = self.weight.unsqueeze(2).contiguous(memory_format=torch.channels_last)
        y = F.conv2d(
            image, weight, self.bias, (1, self.stride[0]), (0, int(self.padding[0])), (1, self.dilation[0])
        )
        return y.squeeze(2).transpose(1, 2)


class Repeat(nn.Module):
    """Nearest-neighbour upsampling by 2 in time: (B, T, W) -> (B, 2 T, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.unsqueeze(2).expand(-1, -1, 2, -1).flatten(1, 2)


class ResidualBlock(nn.Module):
    """x + Conv1x1(ReLU(Conv3(ReLU(x)))), the Conv3 dilated."""

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.conv1 = Conv(width, width, 3, padding=dilation, dilation=dilation)
        self.conv2 = Conv(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(torch.relu(self.conv1(torch.relu(x))))


class ResidualStack(nn.Module):
    """`depth` residual blocks with dilations base^(depth-1), ..., base, 1: wide first, on both sides.

    A checkpoint loads into the opposite order without an error and gives other tokens.
    """

    def __init__(self, width: int, depth: int, dilation_base: int) -> None:
        super().__init__()
        self.model = nn.Sequential(*(ResidualBlock(width, dilation_base**i) for i in reversed(range(depth))))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class Encoder(nn.Module):
    """(B, T, C) normalised features -> (B, T // downsampling, E) latents."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        width = config.width
        stages = (
            nn.Sequential(
                Conv(width, width, 4, stride=2, padding=1),
                ResidualStack(width, config.depth, config.dilation_base),
            )
            for _ in range(config.downsample_stages)
        )
        self.model = nn.Sequential(
            Conv(config.feature_dim, width, 3, padding=1),
            nn.ReLU(),
            *stages,
            Conv(width, config.latent_width, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class Decoder(nn.Module):
    """(B, N, E) quantised latents -> (B, N * downsampling, C) normalised features."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        width = config.width
        stages = (
            nn.Sequential(
                ResidualStack(width, config.depth, config.dilation_base),
                Repeat(),
                Conv(width, width, 3, padding=1),
            )
            for _ in range(config.downsample_stages)
        )
        self.model = nn.Sequential(
            Conv(config.latent_width, width, 3, padding=1),
            nn.ReLU(),
            *stages,
            Conv(width, width, 3, padding=1),
            nn.ReLU(),
            Conv(width, config.feature_dim, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class Reconstruction(NamedTuple):
    """What a forward pass gives, with gradients but for the indices.

    features: normalised, float32 (B, N * downsampling, C); indices: int32 (B, N); z: what was bounded and
    rounded to them, float32 (B, N, channels).
    """

    features: Tensor
    indices: Tensor
    z: Tensor


class FSQAutoencoder(nn.Module):
    """Motion features <-> tokens: `encode` and `decode` take and return raw (unnormalised) features.

    Parameter names are those of the released code without its leading "vqvae.", so that its weights load by
    name; `mean` and `std`, float32 (C,), are this project's.

    Args:
        config: sizes; the full width at any codebook has 19.44M parameters.
        mean, std: statistics of the training split, (C,); 0 and 1 without them.

    Raises:
        ScaMoError: mean or std of another shape, not finite, or a std that is not positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: TokenizerConfig, mean: Any = None, std: Any = None) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quantizer = FSQ(config.fsq_levels, config.latent_width)
        self.decoder = Decoder(config)
        for name, value, default in (("mean", mean, 0.0), ("std", std, 1.0)):
            tensor = torch.full((config.feature_dim,), default)
            if value is not None:
                tensor = torch.as_tensor(value).detach().to(torch.float32).clone()
            if tensor.shape != (config.feature_dim,):
                raise ScaMoError(f"{name}: shape {tuple(tensor.shape)}, expected ({config.feature_dim},)")
            if not tensor.isfinite().all() or (name == "std" and tensor.min() <= 0):
                raise ScaMoError(f"{name}: expected finite{' positive' if name == 'std' else ''} values")
            self.register_buffer(name, tensor)

    @property
    def codes(self) -> int:
        """Number of codes K."""
        return self.config.codes

    @property
    def downsampling(self) -> int:
        """Frames per token."""
        return self.config.downsampling

    def normalize(self, features: Tensor) -> Tensor:
        """Raw features (..., C) -> float32 (..., C) of mean 0 and deviation about 1."""
        return (features.float() - self.mean) / self.std

    def forward(self, normalized: Tensor, noise: Tensor | None = None) -> Reconstruction:
        """Normalised features (B, T, C) -> their reconstruction, T floored to whole tokens.

        Under autocast the convolutions run in its dtype; the quantiser stays in float32. noise: see FSQ.
        """
        quantised, indices, z = self.quantizer(self.encoder(self._whole_tokens(normalized)), noise)
        return Reconstruction(self.decoder(quantised).float(), indices, z)

    def encode(self, features: Tensor) -> Tensor:
        """Raw features (B, T, C) -> indices int32 (B, T // downsampling); frames past a whole token are cut.

        The convolutions see zeros past either end, so a motion that is padded to a longer one gets other
        tokens near its end: batch motions of one length only (as `scamo.tokenizers.encode.encode_motions`).

        Raises ScaMoError on another shape, or fewer frames than a token has.
        """
        return self.quantizer(self.encoder(self.normalize(self._whole_tokens(features))))[1]

    def decode(self, indices: Tensor) -> Tensor:
        """Indices (B, N) int32 or int64 -> raw features float32 (B, N * downsampling, C).

        Raises ScaMoError on another shape or an index outside 0 .. K-1.
        """
        if indices.dim() != 2 or indices.shape[1] == 0:
            raise ScaMoError(f"tokens: shape {tuple(indices.shape)}, expected (batch, at least 1)")
        low, high = (int(value) for value in torch.aminmax(indices))
        if low < 0 or high >= self.codes:
            raise ScaMoError(f"tokens from {low} to {high}: this tokenizer has codes 0 to {self.codes - 1}")
        return self.decoder(self.quantizer.embed(indices)).float() * self.std + self.mean

    def _whole_tokens(self, features: Tensor) -> Tensor:
        if features.dim() != 3 or features.shape[2] != self.config.feature_dim:
            expected = f"(batch, frames, {self.config.feature_dim})"
            raise ScaMoError(f"features: shape {tuple(features.shape)}, expected {expected}")
        frames = features.shape[1] // self.downsampling * self.downsampling
        if frames == 0:
            raise ScaMoError(
                f"features: {features.shape[1]} frames are less than one token ({self.downsampling} frames)"
            )
        return features[:, :frames]

    def save(
        self, folder: str | Path, *, provenance: Mapping[str, Any] | None = None, overwrite: bool = False
    ) -> None:
        """Write config.json, model.safetensors and a manifest of their hashes; whole or not at all.

        Raises ScaMoError when the folder exists and `overwrite` is false.
        """
        with whole_folder(Path(folder), overwrite=overwrite) as temporary:
            self.write_files(temporary, provenance=provenance)

    def write_files(self, folder: Path, *, provenance: Mapping[str, Any] | None = None) -> None:
        """Write the files of `save` into an existing folder; the manifest lists everything found there."""
        from safetensors.torch import save_file

        save_file({name: t.detach().cpu().contiguous() for name, t in self.state_dict().items()},
                  folder / "model.safetensors")  # fmt: skip
        description = {
            "format": FORMAT,
            "schema_version": SCHEMA_VERSION,
            "tokenizer": to_dict(self.config),
            "provenance": dict(provenance or {}),
        }
        _write_json(folder / "config.json", description)
        files = {
            path.name: file_record(path) for path in sorted(folder.iterdir()) if path.name != "manifest.json"
        }
        write_manifest(folder, {"format": FORMAT, "schema_version": SCHEMA_VERSION, "files": files})

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu") -> FSQAutoencoder:
        """Read a tokenizer folder; the module is in evaluation mode.

        Raises ScaMoError naming the file, and the tensor that is missing, unknown or of another shape.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = Path(folder)
        description = read_description(folder)
        if (folder / "manifest.json").is_file():
            manifest = read_manifest(folder, format=FORMAT, schema_version=SCHEMA_VERSION)
            check_files(folder, manifest, hashes=True)
        model = cls(
            from_dict(TokenizerConfig, description["tokenizer"], where=f"{folder / 'config.json'}: tokenizer")
        )
        weights = folder / "model.safetensors"
        try:
            state = load_file(weights)
        except FileNotFoundError:
            raise ScaMoError(f"{weights}: no such file") from None
        except (OSError, SafetensorError) as error:
            raise ScaMoError(f"{weights}: not a readable safetensors file: {error}") from None
        check_state(state, model.state_dict(), str(weights))
        model.load_state_dict(state)
        return model.eval().to(device)


def read_description(folder: Path, formats: Collection[str] = (FORMAT,)) -> dict[str, Any]:
    """The config.json of a tokenizer folder of one of `formats`. Raises ScaMoError naming what is wrong."""
    path = folder / "config.json"
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ScaMoError(f"{path}: no such file; {folder} is not a tokenizer folder") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ScaMoError(f"{path}: not valid JSON: {error}") from None
    found = description.get("format") if isinstance(description, dict) else type(description).__name__
    if found not in formats:
        raise ScaMoError(f"{path}: format {found!r}, expected {' or '.join(map(repr, formats))}")
    version = description.get("schema_version")
    if version != SCHEMA_VERSION:
        raise ScaMoError(f"{path}: schema_version {version!r}, this version reads {SCHEMA_VERSION}")
    if "tokenizer" not in description:
        raise ScaMoError(f"{path}: missing key tokenizer")
    return description


def check_state(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str) -> None:
    """Compare names and shapes of two state dicts. Raises ScaMoError naming what does not fit."""
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
    for name, tensor in found.items():
        if not tensor.isfinite().all():
            raise ScaMoError(f"{where}: {name} holds values that are not finite")


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")
