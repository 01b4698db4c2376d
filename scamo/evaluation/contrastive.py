"""Our own evaluator: sentences and motions in one space, fitted to any dataset by `scamo evaluator train`.

The way of TMR (Petrovich et al. 2023) without its decoder: two encoders and a symmetric contrastive loss in
which captions that say nearly the same are no negatives. Text enters as the word-piece states of a frozen
encoder, so that what is cached for training serves here too.

Shapes: B motions, T frames, S = T // 4 steps, C features a frame, P word pieces, W width, D embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from scamo.config import EvaluatorConfig, from_dict, to_dict
from scamo.data.text import TextEncoder
from scamo.errors import ScaMoError
from scamo.evaluation.evaluator import SCHEMA_VERSION, Evaluator, read_evaluator
from scamo.tokenizers.autoencoder import Conv
from scamo.weights import WEIGHTS, check_state, save_folder

if TYPE_CHECKING:
    from scamo.data.dataset import MotionDataset

FORMAT = "scamo-evaluator"
DOWNSAMPLING = 4
CHUNK = 32  # motions or texts of one forward pass, of like lengths
# How far the states of one and the same caption may be off, in units of their deviation, before the text
# encoder counts as another: float16, another batch and another device stay far below.
SAME_STATES = 0.05


def masked(x: Tensor, mask: Tensor) -> Tensor:
    """x (B, S, W) with zeros where mask (B, S) is False."""
    return x.masked_fill(~mask[..., None], 0)


class AttentionPool(nn.Module):
    """(B, S, W) and mask (B, S) -> (B, 2 W): the mean, and a mean weighted by learned scores."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.score = nn.Linear(width, 1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        mean = masked(x, mask).sum(1) / mask.sum(1, keepdim=True)
        weight = self.score(x).squeeze(-1).masked_fill(~mask, -torch.inf).softmax(-1)
        return torch.cat([mean, (weight[..., None] * masked(x, mask)).sum(1)], dim=-1)


class ConvBlock(nn.Module):
    """x + dropout(Conv1x1(GELU(dilated Conv3(LayerNorm(x))))) on (B, S, W)."""

    def __init__(self, width: int, dilation: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.conv = Conv(width, width, 3, padding=dilation, dilation=dilation)
        self.out = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return x + self.dropout(self.out(F.gelu(self.conv(masked(self.norm(x), mask)))))


class MotionEncoder(nn.Module):
    """Normalised features (B, T, C) and frames (B,) -> (B, D) of length 1, each motion as if alone.

    What lies past a motion's end is set to zero before every convolution, as if the padding began there.
    """

    def __init__(self, config: EvaluatorConfig) -> None:
        super().__init__()
        width = config.width
        self.down = nn.ModuleList(
            [
                Conv(config.feature_dim, width, 4, stride=2, padding=1),
                Conv(width, width, 4, stride=2, padding=1),
            ]
        )
        self.drop_in = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            ConvBlock(width, config.dilation_base ** (i % 3), config.dropout) for i in range(config.layers)
        )
        self.norm = nn.LayerNorm(width)
        self.pool = AttentionPool(width)
        self.head = nn.Sequential(nn.Dropout(config.dropout), nn.Linear(2 * width, config.embedding))

    def forward(self, x: Tensor, frames: Tensor) -> Tensor:
        x = self.drop_in(x)
        for conv in self.down:
            inside = torch.arange(x.shape[1], device=x.device) < frames[:, None]
            x = F.gelu(conv(masked(x, inside)))
            frames = frames // 2
        mask = torch.arange(x.shape[1], device=x.device) < frames[:, None]
        for block in self.blocks:
            x = block(x, mask)
        return F.normalize(self.head(self.pool(self.norm(x), mask)), dim=-1)


class StatesEncoder(nn.Module):
    """Word-piece states (B, P, E) and pieces (B,) -> (B, D) of length 1."""

    def __init__(self, config: EvaluatorConfig) -> None:
        super().__init__()
        width = config.width
        self.norm_in = nn.LayerNorm(config.text_width)
        self.project = nn.Linear(config.text_width, width)
        self.drop_in = nn.Dropout(config.dropout)
        self.pool = AttentionPool(width)
        self.head = nn.Sequential(
            nn.GELU(), nn.Dropout(config.dropout), nn.Linear(2 * width, config.embedding)
        )

    def forward(self, states: Tensor, pieces: Tensor) -> Tensor:
        mask = torch.arange(states.shape[1], device=states.device) < pieces[:, None]
        x = self.project(self.drop_in(self.norm_in(states)))
        return F.normalize(self.head(self.pool(x, mask)), dim=-1)


class ContrastiveNetwork(nn.Module):
    """Both encoders, the statistics of the features and the temperature of the loss."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: EvaluatorConfig, mean: Any = None, std: Any = None) -> None:
        super().__init__()
        self.config = config
        self.motion = MotionEncoder(config)
        self.text = StatesEncoder(config)
        self.log_scale = nn.Parameter(torch.tensor(2.3))
        for name, value, default in (("mean", mean, 0.0), ("std", std, 1.0)):
            tensor = torch.full((config.feature_dim,), default)
            if value is not None:
                tensor = torch.as_tensor(np.asarray(value), dtype=torch.float32).clone()
            self.register_buffer(name, tensor)

    def embed_motions(self, features: Tensor, frames: Tensor) -> Tensor:
        """Raw features (B, T, C), frames int64 (B,) -> (B, D) of length 1."""
        return self.motion((features - self.mean) / self.std, frames)


def pad(arrays: Sequence[NDArray], multiple: int = 1) -> tuple[Tensor, Tensor]:
    """(n_i, width) arrays -> float32 (B, longest, width) with zeros behind, and their lengths int64 (B,)."""
    lengths = [len(array) for array in arrays]
    out = np.zeros((len(arrays), -(-max(lengths) // multiple) * multiple, arrays[0].shape[1]), np.float32)
    for row, array in zip(out, arrays, strict=True):
        row[: len(array)] = array
    return torch.from_numpy(out), torch.tensor(lengths)


class ContrastiveEvaluator(Evaluator):
    """An evaluator of `scamo evaluator train`; points have length 1, so Euclidean and cosine ranks agree.

    text_encoder: name of the frozen encoder whose states it reads. probe: a caption and the mean of its
    states, by which an encoder of that name but with other weights is found out.
    """

    def __init__(
        self,
        network: ContrastiveNetwork,
        *,
        name: str,
        fps: float,
        text_encoder: str,
        probe: tuple[str, Sequence[float]],
        sha256: str = "",
        provenance: dict[str, Any] | None = None,
    ) -> None:
        config = network.config
        self.network = network.eval()
        self.name, self.sha256, self.fps = name, sha256, fps
        self.text_encoder, self.probe = text_encoder, probe
        self.provenance = provenance or {}
        self.feature_dim, self.width = config.feature_dim, config.embedding
        self.variant = config.variant
        self.min_frames, self.max_frames = DOWNSAMPLING, config.max_frames
        self.mean, self.std = network.mean.cpu().numpy(), network.std.cpu().numpy()
        self._encoder: TextEncoder | None = None

    @property
    def device(self) -> torch.device:
        return self.network.mean.device

    @torch.inference_mode()
    def _embed_motions(self, motions: list[NDArray]) -> NDArray[np.float32]:
        order = sorted(range(len(motions)), key=lambda i: len(motions[i]))
        points = np.empty((len(motions), self.width), dtype=np.float32)
        for start in range(0, len(order), CHUNK):
            part = order[start : start + CHUNK]
            features, frames = pad([motions[i] for i in part], DOWNSAMPLING)
            points[part] = (
                self.network.embed_motions(features.to(self.device), frames.to(self.device)).cpu().numpy()
            )
        return points

    def _embed_texts(self, texts: list[str], tags: list[str | None]) -> NDArray[np.float32]:
        return self.embed_states(self._load_encoder().encode(texts))

    def embed_captions(self, dataset: MotionDataset, captions: Sequence[int]) -> NDArray[np.float32]:
        """From the dataset's cached states when it has those of this text encoder, else encoded anew."""
        for name in dataset.text_names():
            store = dataset.text_states(name)
            if store.encoder == self.text_encoder:
                self._check_width(store.width, f"{dataset.folder / 'text' / name}")
                return self._finite(self.embed_states([store[int(caption)] for caption in captions]), "text")
        return super().embed_captions(dataset, captions)

    @torch.inference_mode()
    def embed_states(self, states: Sequence[NDArray]) -> NDArray[np.float32]:
        """Word-piece states (P, text width) of its text encoder -> float32 (N, D)."""
        points = np.empty((len(states), self.width), dtype=np.float32)
        order = sorted(range(len(states)), key=lambda i: len(states[i]))
        for start in range(0, len(order), CHUNK):
            part = order[start : start + CHUNK]
            padded, pieces = pad([states[i] for i in part])
            points[part] = self.network.text(padded.to(self.device), pieces.to(self.device)).cpu().numpy()
        return points

    def _check_width(self, width: int, where: str) -> None:
        if width != self.network.config.text_width:
            raise ScaMoError(
                f"{where}: states of width {width}, evaluator {self.name} was trained on "
                f"{self.network.config.text_width} ({self.text_encoder})"
            )

    def _load_encoder(self) -> TextEncoder:
        if self._encoder is None:
            encoder = TextEncoder.load(self.text_encoder, device=str(self.device))
            self._check_width(encoder.width, f"text encoder {self.text_encoder}")
            text, expected = self.probe
            found = encoder.encode([text])[0].astype(np.float32).mean(axis=0)
            wanted = np.asarray(expected, dtype=np.float32)
            off = float(np.abs(found - wanted).mean() / wanted.std())
            if off > SAME_STATES:
                raise ScaMoError(
                    f"text encoder {self.text_encoder}: gives other states than the one evaluator "
                    f"{self.name} was trained with (off by {off:.2f} of their deviation for {text!r})"
                )
            self._encoder = encoder
        return self._encoder

    def save(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write the evaluator's folder, whole or not at all. Raises ScaMoError when it exists."""
        description = {
            "format": FORMAT,
            "schema_version": SCHEMA_VERSION,
            "evaluator": to_dict(self.network.config),
            "fps": self.fps,
            "text_encoder": self.text_encoder,
            "probe": {"text": self.probe[0], "mean_state": [round(float(v), 6) for v in self.probe[1]]},
            "provenance": self.provenance,
        }
        save_folder(folder, self.network.state_dict(), description, overwrite=overwrite)

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu") -> ContrastiveEvaluator:
        """Read the folder that `save` wrote. Raises ScaMoError naming the file and what does not fit."""
        folder = Path(folder)
        description, state, sha256 = read_evaluator(
            folder, FORMAT, required=("evaluator", "fps", "text_encoder", "probe")
        )
        config = from_dict(
            EvaluatorConfig, description["evaluator"], where=f"{folder / 'config.json'}: evaluator"
        )
        network = ContrastiveNetwork(config)
        check_state(state, network.state_dict(), str(folder / WEIGHTS))
        network.load_state_dict(state)
        probe = description["probe"]
        return cls(
            network.to(device),
            name=folder.resolve().name,
            fps=float(description["fps"]),
            text_encoder=description["text_encoder"],
            probe=(probe["text"], probe["mean_state"]),
            sha256=sha256,
            provenance=description.get("provenance"),
        )
