"""A dataset with less or worse training data, for studies of quantity against quality.

Val and test stay as they are: what models are compared on is the same. What becomes of a clip or caption is a
function of the seed and its name; which caption another one is swapped for also of which clips are kept.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scamo.data.dataset import Caption, DatasetWriter, MotionDataset
from scamo.data.inspect import captions_of_items, clip_items, step_errors
from scamo.data.split import place
from scamo.errors import ScaMoError
from scamo.motion.features import VARIANTS, features_to_joints, joints_to_features
from scamo.motion.measures import physics
from scamo.motion.representation import HUMANML3D

# Seconds after which the drift of a body goes another way.
DRIFT_S = 0.5


def degrade(
    dataset: str | Path,
    out: str | Path,
    *,
    keep: float = 1.0,
    jitter: float = 0.0,
    foot_skate: float = 0.0,
    caption_noise: float = 0.0,
    seed: int = 0,
    overwrite: bool = False,
    progress: bool = True,
) -> MotionDataset:
    """Write a dataset of 263 features again with a worse train split; tokens and text states are not copied.

    A degraded motion's features are computed anew from its joints, so its floor, heading and contacts suffer
    as well. provenance["degraded"] has the settings, the counts, and `physics` of the motions before and
    after, averaged over clips.

    Args:
        dataset: the folder of the source.
        out: the folder to write.
        keep: share of the train clips that stay, at least one. The clips of a smaller share are among those
            of a larger one; a mirrored copy is a clip of its own.
        jitter: standard deviation in metres of noise on every coordinate of every joint, frame by frame.
        foot_skate: speed in m/s, root mean square, at which the whole body drifts over the floor; the drift
            turns another way about every half a second, and standing feet slide along.
        caption_noise: chance of every train caption to be swapped for one of another kept clip that none of
            its own clip equals.
        seed: of all that is random.
        overwrite: replace an existing dataset.
        progress: show a progress bar and print the report.

    Raises:
        ScaMoError: an argument out of range, other features, a folder that does not open or exists, nothing
            kept, or no other caption to swap one for.
    """
    from tqdm import tqdm

    for name, value, most in (
        ("keep", keep, 1.0),
        ("jitter", jitter, math.inf),
        ("foot_skate", foot_skate, math.inf),
        ("caption_noise", caption_noise, 1.0),
    ):
        if not (0 <= value <= most and value < math.inf) or (name == "keep" and not value):
            least = "above 0" if name == "keep" else "0 or more"
            raise ScaMoError(f"{name} = {value}: expected {least}" + ("" if most > 1 else " and up to 1"))
    source = MotionDataset.open(dataset)
    if source.feature_dim != HUMANML3D.feature_dim:
        raise ScaMoError(
            f"{source.folder}: {source.feature_dim} features a frame; only the "
            f"{HUMANML3D.feature_dim} of {HUMANML3D.name} can be degraded"
        )
    variant = next(variant for variant in VARIANTS if variant == source.variant)
    kept = _kept(source, keep, seed)
    captions = _Captions(source, kept, caption_noise, seed)
    counts = Counter[str](train_clips=source.clip_splits.count("train"), kept_clips=len(kept))
    physics_of: dict[str, list[dict[str, float]]] = {"before": [], "after": []}
    writer = DatasetWriter(
        out,
        feature_dim=source.feature_dim,
        fps=source.fps,
        provenance=_provenance(source),
        overwrite=overwrite,
    )
    with writer:
        names = tqdm(source.clip_names, desc="degrade", unit="clip", disable=not progress)
        for clip, name in enumerate(names):
            split, features = source.clip_splits[clip], source.clip_features(clip)
            if split != "train":
                writer.add_clip(name, features, split, captions.own(clip), source.clip_meta(clip))
                continue
            if clip not in kept:
                continue
            if jitter or foot_skate:
                clean = features
                try:
                    noisy = _noisy(_joints(clean), jitter, foot_skate, source.fps, seed, name)
                    features = joints_to_features(noisy, fps=source.fps, variant=variant)
                except ScaMoError as error:
                    writer.refuse(name, "features cannot be computed", split=split, detail=str(error))
                    continue
                for when, values in (("before", clean), ("after", features)):
                    physics_of[when].append(physics(features_to_joints(values), source.fps))
                counts["degraded_motions"] += 1
            described, swapped = captions.noisy(clip)
            counts.update(train_captions=len(described), swapped_captions=swapped)
            writer.add_clip(name, features, split, described, source.clip_meta(clip))
        writer.provenance["degraded"] = {
            "keep": keep,
            "jitter": jitter,
            "foot_skate": foot_skate,
            "caption_noise": caption_noise,
            "seed": seed,
            "counts": dict(counts),
            "physics": {when: _mean(values) for when, values in physics_of.items() if values},
        }
    made = MotionDataset.open(out)
    if progress:
        print(made.summary())
        for when, mean in made.manifest["provenance"]["degraded"]["physics"].items():
            print(f"{when}: " + ", ".join(f"{key} {value:.4g}" for key, value in mean.items()))
    return made


def _provenance(source: MotionDataset) -> dict[str, Any]:
    before = source.manifest["provenance"]
    return {
        "source": "degraded",
        **{key: before[key] for key in ("license", "variant") if key in before},
        "of": {
            "folder": source.folder.resolve().name,
            "manifest_sha256": source.manifest_sha256,
            "provenance": before,
        },
    }


def _kept(source: MotionDataset, keep: float, seed: int) -> set[int]:
    """The train clips that stay: the first in an order that the seed and their names determine."""
    train = [clip for clip, split in enumerate(source.clip_splits) if split == "train"]
    train.sort(key=lambda clip: (place(seed, f"keep/{source.clip_names[clip]}"), clip))
    return set(train[: max(1, round(keep * len(train)))])


class _Captions:
    """The captions of clips, their own or in part those of others."""

    def __init__(self, source: MotionDataset, kept: set[int], noise: float, seed: int) -> None:
        self.source, self.noise, self.seed = source, noise, seed
        self.items = list(clip_items(source))
        self.pool = [
            caption
            for clip in sorted(kept)
            for item in self.items[clip]
            for caption in source.captions_of(item).tolist()
        ]

    def own(self, clip: int) -> list[Caption]:
        frames = len(self.source.clip_features(clip))
        return [c for own in captions_of_items(self.source, self.items[clip], frames) for c in own]

    def noisy(self, clip: int) -> tuple[list[Caption], int]:
        """A clip's captions, and how many of them are swapped. What is kept beside a text goes with it."""
        captions = self.own(clip)
        texts = {caption.text for caption in captions}
        swapped = 0
        for at, caption in enumerate(captions) if self.noise else ():
            key = f"{self.source.clip_names[clip]}/{at}"
            if place(self.seed, f"swap/{key}") >= self.noise * 2**64:
                continue
            other = self._other(texts, place(self.seed, f"other/{key}"))
            meta = self.source.caption_meta(other)
            captions[at] = Caption(self.source.caption(other), caption.start_s, caption.end_s, meta)
            swapped += 1
        return captions, swapped

    def _other(self, texts: set[str], begin: int) -> int:
        """The first caption from a place in the pool on that is none of these texts."""
        for step in range(len(self.pool)):
            caption = self.pool[(begin + step) % len(self.pool)]
            if self.source.caption(caption) not in texts:
                return caption
        raise ScaMoError(f"caption_noise = {self.noise}: all kept clips have the caption {min(texts)!r}")


def _joints(features: NDArray) -> NDArray[np.float64]:
    """(T, 263) -> (T + 1, 22, 3): features of T frames are made of one joint frame more, which their last
    velocities lead to."""
    features = features.astype(np.float64)
    # Where the format's yaw step has the wrong sign, the joints would turn off their path.
    features[:-1, 0] *= np.where(step_errors(features, HUMANML3D)[1], -1, 1)
    joints = features_to_joints(features)
    yaw = -2 * features[:-1, 0].sum()
    step = features[-1, HUMANML3D.velocities].reshape(-1, 3)
    x, y, z = step.T
    cos, sin = math.cos(yaw), math.sin(yaw)
    step = np.stack([x * cos + z * sin, y, z * cos - x * sin], axis=-1)
    return np.concatenate([joints, joints[-1:] + step])


def _noisy(
    joints: NDArray[np.float64], jitter: float, foot_skate: float, fps: float, seed: int, name: str
) -> NDArray[np.float64]:
    noise = np.random.default_rng(place(seed, f"jitter/{name}")).standard_normal(joints.shape)
    drift = _drift(len(joints), fps, np.random.default_rng(place(seed, f"drift/{name}")))
    return joints + jitter * noise + foot_skate * drift[:, None]


def _drift(frames: int, fps: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """A path (frames, 3) over the floor, m, at 1 m/s (root mean square): its velocity is an AR(1) process."""
    stays = math.exp(-1 / (fps * DRIFT_S))
    velocity = rng.standard_normal((frames, 2)) / math.sqrt(2)
    for frame in range(1, frames):
        velocity[frame] = stays * velocity[frame - 1] + math.sqrt(1 - stays**2) * velocity[frame]
    path = np.zeros((frames, 3))
    path[:, [0, 2]] = np.cumsum(velocity, axis=0) / fps
    return path


def _mean(values: Sequence[dict[str, float]]) -> dict[str, float]:
    return {key: float(np.mean([value[key] for value in values])) for key in values[0]}
