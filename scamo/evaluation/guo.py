"""The evaluator of Guo et al. (CVPR 2022), whose numbers most papers on HumanML3D and KIT-ML report.

The layers and parameter names are those of the published checkpoint, so that its weights load by name;
`scamo.importers.t2m_evaluator` makes a folder of it.

Shapes: B motions or sentences, T = 196 frames, C features a frame, S = frames // 4 steps, P = 22 words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from scamo.data.storage import whole_folder
from scamo.errors import ScaMoError
from scamo.evaluation.evaluator import SCHEMA_VERSION, Evaluator, read_evaluator
from scamo.evaluation.word_vectors import CLASSES, MAX_WORDS, WordVectors, load_words, tag_text
from scamo.motion.representation import HUMANML3D, KIT_ML
from scamo.weights import CONFIG, WEIGHTS, check_state, write_files

FORMAT = "scamo-evaluator-guo"
WORDS = "words.json"
UNIT = 4  # frames of a step
MAX_FRAMES = 196
CONTACTS = 4  # the last features, which the networks don't see
FPS = {one.feature_dim: one.fps for one in (HUMANML3D, KIT_ML)}
CHUNK = 32  # motions or sentences of one forward pass, of like lengths


@dataclass(frozen=True)
class Sizes:
    """Widths of the networks; the published ones are 512, and 1024 in the motion encoder's GRU."""

    feature_dim: int
    movement_hidden: int
    movement: int
    motion_hidden: int
    text_hidden: int
    word: int
    width: int

    @classmethod
    def of(cls, state: Mapping[str, Tensor], where: str) -> Sizes:
        """Read them off the weights. Raises ScaMoError naming a weight that is missing or of another rank."""

        def shape(name: str, rank: int) -> tuple[int, ...]:
            if name not in state:
                raise ScaMoError(f"{where}: the weights do not fit the config: missing {name}")
            found = tuple(state[name].shape)
            if len(found) != rank:
                raise ScaMoError(f"{where}: {name} is {found}, expected {rank} dimensions")
            return found

        movement_hidden, inputs, _ = shape("movement_encoder.main.0.weight", 3)
        motion_hidden, movement = shape("motion_encoder.input_emb.weight", 2)
        text_hidden, word = shape("text_encoder.input_emb.weight", 2)
        width, _ = shape("motion_encoder.output_net.3.weight", 2)
        return cls(
            feature_dim=inputs + CONTACTS,
            movement_hidden=movement_hidden,
            movement=movement,
            motion_hidden=motion_hidden,
            text_hidden=text_hidden,
            word=word,
            width=width,
        )


class MovementEncoder(nn.Module):
    """Normalised features without contacts (B, T, C - 4) -> (B, T // 4, movement)."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv1d(sizes.feature_dim - CONTACTS, sizes.movement_hidden, 4, stride=2, padding=1),
            nn.Dropout(0.2),
            nn.LeakyReLU(0.2),
            nn.Conv1d(sizes.movement_hidden, sizes.movement, 4, stride=2, padding=1),
            nn.Dropout(0.2),
            nn.LeakyReLU(0.2),
        )
        self.out_net = nn.Linear(sizes.movement, sizes.movement)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_net(self.main(x.transpose(1, 2)).transpose(1, 2))


class RecurrentEncoder(nn.Module):
    """A two-way GRU from a learned state; what both ways end with gives the point."""

    def __init__(self, inputs: int, hidden: int, width: int) -> None:
        super().__init__()
        self.input_emb = nn.Linear(inputs, hidden)
        self.gru = nn.GRU(hidden, hidden, batch_first=True, bidirectional=True)
        self.output_net = nn.Sequential(
            nn.Linear(2 * hidden, hidden), nn.LayerNorm(hidden), nn.LeakyReLU(0.2), nn.Linear(hidden, width)
        )
        self.hidden = nn.Parameter(torch.zeros(2, 1, hidden))

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """x (B, N, inputs), of which lengths (B,), on the CPU and at least 1, count -> (B, width)."""
        packed = pack_padded_sequence(self.input_emb(x), lengths, batch_first=True, enforce_sorted=False)
        _, last = self.gru(packed, self.hidden.expand(-1, len(x), -1).contiguous())
        return self.output_net(torch.cat([last[0], last[1]], dim=-1))


class TextEncoder(RecurrentEncoder):
    """Word vectors (B, P, word), one-hot classes (B, P, 15) and lengths (B,) -> (B, width)."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes.word, sizes.text_hidden, sizes.width)
        self.pos_emb = nn.Linear(len(CLASSES), sizes.word)

    def embed(self, vectors: Tensor, classes: Tensor, lengths: Tensor) -> Tensor:
        return self(vectors + self.pos_emb(classes), lengths)


class GuoNetworks(nn.Module):
    """The three networks, under the names that the published checkpoint gives them."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.movement_encoder = MovementEncoder(sizes)
        self.motion_encoder = RecurrentEncoder(sizes.movement, sizes.motion_hidden, sizes.width)
        self.text_encoder = TextEncoder(sizes)

    def embed_motions(self, features: Tensor, frames: Tensor) -> Tensor:
        """Normalised, without contacts, zeros behind each motion's end (B, 196, C - 4); frames (B,)."""
        return self.motion_encoder(self.movement_encoder(features), frames // UNIT)


class GuoEvaluator(Evaluator):
    """The published networks with their statistics and word vectors; made by `from_parts` or `load`.

    A motion is normalised, padded with zeros to 196 frames and then seen in its first frames // 4 steps; so
    the last step looks at up to 3 frames past their end. The published protocol gives frames in multiples of
    4; of another number the rest is seen by the last step, too. Statistics and normalisation are float64, as
    published, the networks float32.
    """

    def __init__(
        self,
        networks: GuoNetworks,
        mean: NDArray[np.float64],
        std: NDArray[np.float64],
        words: WordVectors,
        *,
        name: str,
        fps: float,
        sha256: str = "",
        provenance: dict[str, Any] | None = None,
    ) -> None:
        self.networks = networks.eval()
        self.words = words
        self.name, self.sha256, self.fps = name, sha256, fps
        self.provenance = provenance or {}
        self.feature_dim, self.width = networks.sizes.feature_dim, networks.sizes.width
        self.min_frames, self.max_frames = UNIT, MAX_FRAMES
        self.mean, self.std = mean.astype(np.float32), std.astype(np.float32)
        self._mean, self._std = mean, std

    @classmethod
    def from_parts(
        cls,
        state: Mapping[str, Tensor],
        mean: NDArray,
        std: NDArray,
        words: WordVectors,
        *,
        name: str = "guo",
        fps: float | None = None,
        device: str | torch.device = "cpu",
        provenance: dict[str, Any] | None = None,
        where: str = "weights",
        sha256: str = "",
    ) -> GuoEvaluator:
        """Put an evaluator together, on `device`.

        state: the weights of all three networks, "movement_encoder.main.0.weight", ...; mean, std: (C,), the
        evaluator's own; fps: 20 for 263 features and 12.5 for 251 where it is not given.

        Raises ScaMoError naming, behind `where`, a weight that is missing, unknown, of another shape or not
        finite, statistics of another length, not finite or not positive, word vectors of another width, or
        a number of features whose frame rate is not known.
        """
        sizes = Sizes.of(state, where)
        # Nothing is initialised only to be overwritten, and the global random state stays as it is.
        with torch.device("meta"):
            networks = GuoNetworks(sizes)
        check_state(state, networks.state_dict(), where)
        networks.load_state_dict({k: v.to(torch.float32).clone() for k, v in state.items()}, assign=True)
        if words.vectors.shape[1] != sizes.word:
            found = f"found {words.vectors.shape[1]}"
            raise ScaMoError(f"{where}: the text encoder takes word vectors of {sizes.word}, {found}")
        if fps is None:
            if sizes.feature_dim not in FPS:
                known = " and ".join(f"{rate:g} for {dim}" for dim, rate in FPS.items())
                raise ScaMoError(f"{where}: {sizes.feature_dim} features: give fps (known: {known})")
            fps = FPS[sizes.feature_dim]
        return cls(
            networks.to(device),
            check_statistics(mean, sizes.feature_dim, f"{where}: mean", positive=False),
            check_statistics(std, sizes.feature_dim, f"{where}: std", positive=True),
            words,
            name=name,
            fps=fps,
            sha256=sha256,
            provenance=provenance,
        )

    @property
    def device(self) -> torch.device:
        return self.networks.motion_encoder.hidden.device

    @torch.inference_mode()
    def _embed_motions(self, motions: list[NDArray]) -> NDArray[np.float32]:
        inputs, points = self.feature_dim - CONTACTS, np.empty((len(motions), self.width), dtype=np.float32)
        mean, std = self._mean[:inputs], self._std[:inputs]
        for part in _chunks([len(motion) for motion in motions]):
            padded = np.zeros((len(part), MAX_FRAMES, inputs), dtype=np.float32)
            for row, index in zip(padded, part, strict=True):
                row[: len(motions[index])] = (motions[index][:, :inputs] - mean) / std
            frames = torch.tensor([len(motions[index]) for index in part])
            with _float32():
                out = self.networks.embed_motions(torch.from_numpy(padded).to(self.device), frames)
            points[part] = out.cpu().numpy()
        return points

    @torch.inference_mode()
    def _embed_texts(self, texts: list[str], tags: list[str | None]) -> NDArray[np.float32]:
        encoded = []
        for index, (text, tagged) in enumerate(zip(texts, tags, strict=True)):
            try:
                encoded.append(self.words.encode(tagged or tag_text(text)))
            except ScaMoError as error:
                raise ScaMoError(f"text {index} ({text!r}): {error}") from None
        points = np.empty((len(texts), self.width), dtype=np.float32)
        for part in _chunks([sentence.length for sentence in encoded]):
            vectors, classes = (
                torch.from_numpy(np.stack([encoded[index][k] for index in part])).to(self.device)
                for k in (0, 1)
            )
            lengths = torch.tensor([encoded[index].length for index in part])
            with _float32():
                points[part] = self.networks.text_encoder.embed(vectors, classes, lengths).cpu().numpy()
        return points

    def save(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write the evaluator's folder, whole or not at all. Raises ScaMoError when it exists."""
        description = {
            "format": FORMAT,
            "schema_version": SCHEMA_VERSION,
            "feature_dim": self.feature_dim,
            "fps": self.fps,
            "width": self.width,
            "max_frames": MAX_FRAMES,
            "max_words": MAX_WORDS,
            "provenance": self.provenance,
        }
        state = dict(self.networks.state_dict())
        state["mean"], state["std"] = torch.from_numpy(self._mean), torch.from_numpy(self._std)
        state["word_vectors"] = torch.from_numpy(self.words.vectors)
        with whole_folder(Path(folder), overwrite=overwrite) as temporary:
            self.words.save_words(temporary / WORDS)
            write_files(temporary, state, description)

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu") -> GuoEvaluator:
        """Read the folder that `save` wrote. Raises ScaMoError naming the file and what does not fit."""
        folder = Path(folder)
        description, state, sha256 = read_evaluator(folder, FORMAT, required=("feature_dim", "fps", "width"))
        where = str(folder / WEIGHTS)
        parts = {}
        for name in ("mean", "std", "word_vectors"):
            if name not in state:
                raise ScaMoError(f"{where}: the weights do not fit the config: missing {name}")
            parts[name] = state.pop(name).numpy()
        evaluator = cls.from_parts(
            state,
            parts["mean"],
            parts["std"],
            WordVectors(parts["word_vectors"], load_words(folder / WORDS), where=str(folder / WORDS)),
            name=folder.resolve().name,
            fps=float(description["fps"]),
            device=device,
            provenance=description.get("provenance"),
            where=where,
            sha256=sha256,
        )
        for key in ("feature_dim", "width"):
            found = getattr(evaluator, key)
            if description[key] != found:
                raise ScaMoError(f"{folder / CONFIG}: {key} {description[key]!r}, the weights have {found}")
        return evaluator


def check_statistics(values: NDArray, size: int, where: str, *, positive: bool) -> NDArray[np.float64]:
    """A mean, or a deviation (positive), of `size` features as float64; ScaMoError behind `where`."""
    array = np.asarray(values, dtype=np.float64)
    if array.shape != (size,):
        expected = f"({size},): the movement encoder's inputs and {CONTACTS} contacts"
        raise ScaMoError(f"{where}: shape {array.shape}, expected {expected}")
    bad = ~np.isfinite(array)
    if positive:
        bad |= array <= 0
    if bad.any():
        index, expected = int(np.argmax(bad)), "a finite value above 0" if positive else "a finite value"
        raise ScaMoError(f"{where}: value {index} is {array[index]}, expected {expected}")
    return array


def _chunks(lengths: list[int]) -> list[list[int]]:
    """Indices in parts of at most CHUNK, of like lengths: little of a part is idle in the GRU."""
    order = sorted(range(len(lengths)), key=lambda index: lengths[index])
    return [order[start : start + CHUNK] for start in range(0, len(order), CHUNK)]


def _float32() -> Any:
    """cuDNN rounds the inputs of convolutions and GRUs to TF32 (1e-3) unless it is told not to."""
    return torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
