"""The procedural corpus as a dataset."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scamo.data.dataset import Caption, DatasetWriter, MotionDataset
from scamo.errors import ScaMoError
from scamo.motion.features import joints_to_features
from scamo.motion.synthetic import corpus_clip

# Clips per message between processes: passing them costs little, and they share out evenly.
CHUNK = 16

Prepared = tuple[str, str, NDArray[np.float32] | str, list[Caption], dict[str, Any]]


def prepare_synthetic(
    out: str | Path,
    *,
    clips: int = 10_000,
    captions: int = 3,
    seed: int = 0,
    workers: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> MotionDataset:
    """Generate the corpus of `seed` and write it as a dataset; the result is the same for any `workers`.

    The motion's spec is kept in the clip's meta, what a caption says of it in the caption's: {"spec": [...]}.

    Args:
        out: the dataset folder.
        clips: number of motions; of 20, one is val and one is test.
        captions: sentences for each.
        seed: clip i is a function of (seed, i) alone.
        workers: processes; None means one per core. With more than one, a script that calls this needs the
            usual `if __name__ == "__main__"` guard.
        overwrite: replace an existing dataset.
        progress: show a progress bar and print the report.

    Raises:
        ScaMoError: the folder exists, or a count is not positive.
    """
    from tqdm import tqdm

    if workers is None:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for name, value, least in (
        ("clips", clips, 1),
        ("captions", captions, 1),
        ("seed", seed, 0),
        ("workers", workers, 1),
    ):
        if value < least:
            raise ScaMoError(f"{name} = {value}: expected {least} or more")
    provenance = {"source": "synthetic", "clips": clips, "captions": captions, "seed": seed}
    with DatasetWriter(out, provenance=provenance, overwrite=overwrite) as writer:
        results = tqdm(
            _generate(clips, captions, seed, workers),
            total=clips,
            desc="prepare synthetic",
            unit="clip",
            disable=not progress,
        )
        for name, split, features, texts, meta in results:
            if isinstance(features, str):
                writer.refuse(name, "features cannot be computed", split=split, detail=features)
            else:
                writer.add_clip(name, features, split, texts, meta)
    dataset = MotionDataset.open(out)
    if progress:
        print(dataset.summary())
    return dataset


def _generate(clips: int, captions: int, seed: int, workers: int) -> Iterator[Prepared]:
    make = partial(_make, captions=captions, seed=seed)
    if workers == 1:
        yield from map(make, range(clips))
        return
    # Spawned, not forked: the caller may hold threads of torch.
    with multiprocessing.get_context("spawn").Pool(min(workers, clips)) as pool:
        yield from pool.imap(make, range(clips), chunksize=CHUNK)


def _make(index: int, captions: int, seed: int) -> Prepared:
    clip = corpus_clip(index, seed, captions=captions)
    texts = [Caption(c.text, meta={"spec": c.spec.to_list()}) for c in clip.captions]
    try:
        features: NDArray[np.float32] | str = joints_to_features(clip.joints)
    except ScaMoError as error:
        features = str(error)
    return clip.name, clip.split, features, texts, {"spec": clip.spec.to_list()}
