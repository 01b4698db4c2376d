"""Evaluators: networks that put sentences and motions into one space, where metrics compare them.

`load_evaluator(folder)` opens either kind: the networks of Guo et al. 2022 (imported, `guo.py`) or one that
`scamo evaluator train` fitted to a dataset (`contrastive.py`).
"""

from __future__ import annotations

import abc
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from scamo.data.storage import sha256_of
from scamo.errors import ScaMoError
from scamo.weights import WEIGHTS, read_description, read_state

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from scamo.data.dataset import MotionDataset

SCHEMA_VERSION = 1

# How many times more or less, in the geometric mean over the features, another corpus may spread. HumanML3D,
# its CMU part, Bandai-Namco's motions and the synthetic corpus lie within 1.7 of each other; the same motions
# normalised are 7 to 12 off, in centimetres more than 100.
FAR = 4.0


def check_statistics(
    where: str, own: tuple[NDArray, NDArray], found: tuple[NDArray, NDArray], what: str = "the dataset"
) -> None:
    """Raises ScaMoError, beginning with `where`, when features of statistics `found` are of another kind.

    Both are (mean, std), (C,) each. The means do not matter: a corpus may be all of one action.
    """
    factor = float(np.exp(np.abs(np.log(found[1] / own[1])).mean()))
    if not factor < FAR:
        raise ScaMoError(
            f"{where} has other statistics than {what}: the features spread {factor:.3g} times more or less "
            "on average; expected raw features in metres on both sides"
        )


class Evaluator(abc.ABC):
    """Sentences and motions to points of one space; nearer means that they agree better.

    name: for reports; sha256: of its weights; feature_dim, fps: of the motions it takes; width: of a point;
    min_frames, max_frames: of a motion; longer ones are cut, shorter ones refused. mean, std: float32
    (feature_dim,), its own statistics, by which it normalises raw features. variant: of the features.
    """

    name: str
    sha256: str
    feature_dim: int
    fps: float
    width: int
    min_frames: int
    max_frames: int
    mean: NDArray[np.float32]
    std: NDArray[np.float32]
    variant: str = "original"

    def embed_motions(self, motions: Sequence[NDArray]) -> NDArray[np.float32]:
        """Raw features (T, feature_dim) each -> float32 (N, width), each as if alone.

        Raises ScaMoError naming the motion that is too short, of another width or not finite.
        """
        for index, motion in enumerate(motions):
            if motion.ndim != 2 or motion.shape[1] != self.feature_dim:
                expected = f"(frames, {self.feature_dim}), what evaluator {self.name} was trained on"
                raise ScaMoError(f"motion {index}: features of shape {motion.shape}, expected {expected}")
            if len(motion) < self.min_frames:
                raise ScaMoError(
                    f"motion {index}: {len(motion)} frames, evaluator {self.name} needs {self.min_frames}"
                )
            if not np.isfinite(motion).all():
                frame, column = np.argwhere(~np.isfinite(motion))[0]
                raise ScaMoError(f"motion {index}: frame {frame}, feature {column} is not finite")
        if not motions:
            return np.empty((0, self.width), dtype=np.float32)
        return self._finite(self._embed_motions([motion[: self.max_frames] for motion in motions]), "motion")

    def embed_texts(
        self, texts: Sequence[str], tags: Sequence[str | None] | None = None
    ) -> NDArray[np.float32]:
        """Sentences -> float32 (N, width), each as if alone.

        tags: "word/POS word/POS ..." of each sentence where it is known (Guo et al.'s evaluator needs it).
        Raises ScaMoError naming the sentence that is empty or has no tags where they are needed.
        """
        for index, text in enumerate(texts):
            if not isinstance(text, str) or not text.strip():
                raise ScaMoError(f"text {index} is empty: {text!r}")
        if tags is not None and len(tags) != len(texts):
            raise ScaMoError(f"{len(tags)} tag strings for {len(texts)} texts: expected one for each")
        if not len(texts):
            return np.empty((0, self.width), dtype=np.float32)
        return self._finite(
            self._embed_texts(list(texts), list(tags) if tags else [None] * len(texts)), "text"
        )

    def embed_captions(self, dataset: MotionDataset, captions: Sequence[int]) -> NDArray[np.float32]:
        """Captions of a dataset, by id -> float32 (N, width). Raises as `embed_texts`."""
        ids = [int(caption) for caption in captions]
        tags = [dataset.caption_meta(caption).get("tokens") or None for caption in ids]
        return self.embed_texts([dataset.caption(caption) for caption in ids], tags)

    def check_dataset(self, dataset: MotionDataset) -> None:
        """Raises ScaMoError when the dataset's features are not of the kind the evaluator was trained on."""
        where = f"{dataset.folder}: evaluator {self.name}"
        if dataset.feature_dim != self.feature_dim:
            raise ScaMoError(
                f"{where} was trained on {self.feature_dim} features a frame, the dataset has "
                f"{dataset.feature_dim}"
            )
        if dataset.variant != self.variant:
            raise ScaMoError(
                f"{where} was trained on {self.variant} features, the dataset has {dataset.variant} ones"
            )
        if abs(dataset.fps - self.fps) > 1e-6:
            raise ScaMoError(f"{where} was trained at {self.fps:g} fps, the dataset has {dataset.fps:g}")
        check_statistics(where, (self.mean, self.std), (dataset.mean, dataset.std))

    def _finite(self, points: NDArray[np.float32], what: str) -> NDArray[np.float32]:
        bad = ~np.isfinite(points).all(axis=1)
        if bad.any():
            raise ScaMoError(
                f"evaluator {self.name}: the embedding of {what} {int(np.argmax(bad))} is not finite"
            )
        return points

    @abc.abstractmethod
    def _embed_motions(self, motions: list[NDArray]) -> NDArray[np.float32]:
        """Checked raw motions, at least one, of min_frames to max_frames."""

    @abc.abstractmethod
    def _embed_texts(self, texts: list[str], tags: list[str | None]) -> NDArray[np.float32]:
        """Checked texts, at least one."""

    @abc.abstractmethod
    def save(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write the evaluator's folder, whole or not at all."""


def held(features: NDArray, frames: int) -> NDArray:
    """features (T, C) with the last frame repeated until there are at least `frames`.

    So that a generated motion shorter than an evaluator takes is measured, and not left out.
    """
    missing = frames - len(features)
    return np.concatenate((features, np.repeat(features[-1:], missing, axis=0))) if missing > 0 else features


def load_evaluator(folder: str | Path, device: str | torch.device = "cpu") -> Evaluator:
    """Read an evaluator folder into the class that its config.json names.

    Raises ScaMoError naming the file when it is missing, damaged, of an unknown format, or does not fit.
    """
    from scamo.evaluation import contrastive, guo

    kinds: dict[str, Any] = {
        contrastive.FORMAT: contrastive.ContrastiveEvaluator,
        guo.FORMAT: guo.GuoEvaluator,
    }
    folder = Path(folder)
    description = read_description(folder, kinds, SCHEMA_VERSION, "evaluator")
    return kinds[description["format"]].load(folder, device)


def read_evaluator(
    folder: Path, format: str, *, required: Collection[str] = ()
) -> tuple[dict[str, Any], dict[str, Tensor], str]:
    """config.json of an evaluator folder, its tensors, and the SHA-256 of their file. Raises ScaMoError."""
    description = read_description(folder, (format,), SCHEMA_VERSION, "evaluator", required=required)
    state = read_state(folder / WEIGHTS)
    return description, state, sha256_of(folder / WEIGHTS)
