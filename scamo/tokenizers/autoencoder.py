"""The convolutional Motion FSQ-VAE and its VQ baseline (paper section 3.1; layers of the released code).

Shapes: B motions, T frames, C features a frame, W width, E latent width, N tokens = T // downsampling, Q
indices a token: where it is 1, (B, N); with groups or residual stages, (B, N, Q).
Activations are (B, T, W), so that channels are contiguous: 1x1 convolutions are plain matrix products, and
wider ones get the channels-last layout without a copy (in bf16 on a CPU 1.2 times as fast as Conv1d).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scamo.config import TokenizerConfig, from_dict, to_dict
from scamo.data.storage import whole_folder
from scamo.errors import ScaMoError
from scamo.motion.features import FEATURE_DIM
from scamo.tokenizers.fsq import FSQ
from scamo.tokenizers.vq import VQ
from scamo.weights import CONFIG, WEIGHTS, check_state, read_description, read_state, write_files

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

    features: normalised, float32 (B, N * downsampling, C); indices: int32 (B, N) or (B, N, Q); z: what they
    were chosen for, float32: with FSQ what was bounded and rounded, (B, N, channels), with VQ the latents,
    (B, N, E).
    """

    features: Tensor
    indices: Tensor
    z: Tensor


class MotionAutoencoder(nn.Module):
    """Motion features <-> tokens: `encode` and `decode` take and return raw (unnormalised) features.

    The subclasses differ in their quantiser. Parameter names are those of the released code without its
    leading "vqvae.", so that its weights load by name; `mean` and `std`, float32 (C,), are this project's.

    Args:
        config: sizes; the full width with FSQ at any codebook has 19.44M parameters.
        mean, std: statistics of the training split, (C,); 0 and 1 without them.

    Raises:
        ScaMoError: mean or std of another shape, not finite, or a std that is not positive; or the config is
            of the other quantiser.
    """

    FORMAT: ClassVar[str]  # of its folder
    QUANTIZER: ClassVar[str]  # TokenizerConfig.quantizer

    mean: Tensor
    std: Tensor
    quantizer: FSQ | VQ

    def __init__(self, config: TokenizerConfig, mean: Any = None, std: Any = None) -> None:
        super().__init__()
        if config.quantizer != self.QUANTIZER:
            raise ScaMoError(
                f"{type(self).__name__}: quantizer {config.quantizer!r}, expected {self.QUANTIZER!r}"
            )
        if not config.feature_dim:
            config = replace(config, feature_dim=FEATURE_DIM if mean is None else len(mean))
        self.config = config
        self.encoder = Encoder(config)
        if config.quantizer == "vq":
            self.quantizer = VQ(config.codes, config.latent_width, config.residual)
        else:
            self.quantizer = FSQ(
                config.fsq_levels, config.latent_width, groups=config.groups, residual=config.residual
            )
        self.decoder = Decoder(config)
        for name, value, default in (("mean", mean, 0.0), ("std", std, 1.0)):
            tensor = torch.full((config.feature_dim,), default)
            if given := value is not None:
                tensor = torch.as_tensor(value).detach().to(torch.float32).clone()
            if tensor.shape != (config.feature_dim,):
                raise ScaMoError(f"{name}: shape {tuple(tensor.shape)}, expected ({config.feature_dim},)")
            if given and (not tensor.isfinite().all() or (name == "std" and tensor.min() <= 0)):
                raise ScaMoError(f"{name}: expected finite{' positive' if name == 'std' else ''} values")
            self.register_buffer(name, tensor)

    @property
    def codes(self) -> int:
        """Number of codes K of an index."""
        return self.config.codes

    @property
    def downsampling(self) -> int:
        """Frames per token."""
        return self.config.downsampling

    def normalize(self, features: Tensor) -> Tensor:
        """Raw features (..., C) -> float32 (..., C) of mean 0 and deviation about 1."""
        return (features.float() - self.mean) / self.std

    def forward(
        self, normalized: Tensor, noise: Tensor | None = None, stages: int | None = None
    ) -> Reconstruction:
        """Normalised features (B, T, C) -> their reconstruction, T floored to whole tokens.

        Under autocast the convolutions run in its dtype; the quantiser stays in float32. noise: see FSQ; VQ
        takes none. stages: only the first so many residual stages, which Q then counts.
        """
        quantised, indices, z = self.quantizer(self.encoder(self._whole_tokens(normalized)), noise, stages)
        return Reconstruction(self.decoder(quantised).float(), indices, z)

    def encode(self, features: Tensor) -> Tensor:
        """Raw features (B, T, C) -> indices int32 (B, N) or (B, N, Q); frames past a whole token are cut.

        The convolutions see zeros past either end, so a motion that is padded to a longer one gets other
        tokens near its end: batch motions of one length only (as `scamo.tokenizers.encode.encode_motions`).

        Raises ScaMoError on another shape, or fewer frames than a token has.
        """
        return self.quantizer(self.encoder(self.normalize(self._whole_tokens(features))))[1]

    def decode(self, indices: Tensor) -> Tensor:
        """Indices (B, N) or (B, N, Q), int32 or int64 -> raw features float32 (B, N * downsampling, C).

        Raises ScaMoError on another shape or an index outside 0 .. K-1.
        """
        last = self.config.indices_per_token
        expected = (last,) if last > 1 else ()
        if indices.dim() < 2 or indices.shape[1] == 0 or indices.shape[2:] != expected:
            many = f", {last}" if last > 1 else ""
            raise ScaMoError(f"tokens: shape {tuple(indices.shape)}, expected (batch, at least 1{many})")
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
        description = {
            "format": self.FORMAT,
            "schema_version": SCHEMA_VERSION,
            "tokenizer": to_dict(self.config),
            "provenance": dict(provenance or {}),
        }
        write_files(folder, self.state_dict(), description)

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu") -> Self:
        """Read a tokenizer folder; the module is in evaluation mode. `load_tokenizer` opens either kind.

        Raises ScaMoError naming the file, and the tensor that is missing, unknown or of another shape.
        """
        folder = Path(folder)
        return cls.from_description(folder, read_tokenizer(folder, {cls.FORMAT: cls}), device)

    @classmethod
    def from_description(
        cls, folder: Path, description: Mapping[str, Any], device: str | torch.device = "cpu"
    ) -> Self:
        """`load`, with what `read_tokenizer` gave: the files were compared with the manifest already."""
        where = f"{folder / CONFIG}: tokenizer"
        config = from_dict(TokenizerConfig, description["tokenizer"], where=where)
        if config.quantizer != cls.QUANTIZER:
            raise ScaMoError(f"{where}: quantizer {config.quantizer!r}, expected {cls.QUANTIZER!r}")
        model = cls(config)
        state = read_state(folder / WEIGHTS)
        check_state(state, model.state_dict(), str(folder / WEIGHTS))
        model.load_state_dict(state)
        return model.eval().to(device)


class FSQAutoencoder(MotionAutoencoder):
    """The Motion FSQ-VAE (paper eqs. 3-4)."""

    FORMAT = "scamo-fsq-tokenizer"
    QUANTIZER = "fsq"
    quantizer: FSQ


class VQAutoencoder(MotionAutoencoder):
    """The same network around a codebook (paper eqs. 1-2): the baseline, and T2M-GPT's tokenizer."""

    FORMAT = "scamo-vq-tokenizer"
    QUANTIZER = "vq"
    quantizer: VQ


KINDS: dict[str, type[MotionAutoencoder]] = {kind.FORMAT: kind for kind in (FSQAutoencoder, VQAutoencoder)}


def kind_of(config: TokenizerConfig) -> type[MotionAutoencoder]:
    """The class that is built of a config."""
    return next(kind for kind in KINDS.values() if config.quantizer == kind.QUANTIZER)


def read_tokenizer(folder: Path, kinds: Mapping[str, type[MotionAutoencoder]] = KINDS) -> dict[str, Any]:
    """The config.json of a tokenizer folder of one of `kinds`, its files compared with the manifest's hashes.

    Raises ScaMoError naming what is wrong.
    """
    return read_description(folder, kinds, SCHEMA_VERSION, "tokenizer", required=("tokenizer",))
