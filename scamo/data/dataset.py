"""The dataset on disk: one folder of memory-mappable arrays and a manifest that says what they must be.

    manifest.json        schema, counts, SHA-256 per file, statistics, provenance, what was refused and why
    features.npy         (frames, feature_dim) float32, all clips end to end
    clip_offsets.npy     (clips + 1,) int64: clip i is rows offsets[i]:offsets[i + 1]
    clips.jsonl          name, split, meta
    items.npy            (items, 3) int64: clip, start, end (frames within the clip)
    captions.jsonl       text, item, and what the source adds (tokens with word classes, the caption's spec)
    tokens/NAME/         motion tokens of every item, by one tokenizer
    text/NAME/           word-piece states of every caption, by one text encoder

An *item* is what the transformer sees: a range of a clip with one or more captions. Captions without time
tags describe the whole clip and share one item; a caption with time tags is an item of its own, as in the
evaluation protocol of Guo et al.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import zlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self, TextIO

import numpy as np
from numpy.typing import ArrayLike, NDArray

import scamo
from scamo.data import storage
from scamo.errors import ScaMoError
from scamo.motion.features import FEATURE_DIM
from scamo.motion.representation import Representation

FORMAT = "scamo-motion-dataset"
TOKENS_FORMAT = "scamo-motion-tokens"
TEXT_FORMAT = "scamo-text-states"
SCHEMA_VERSION = 1
SPLITS = ("train", "val", "test")
JOURNAL = "journal.jsonl"  # only in a folder that is not whole yet

# Below any real spread of a feature (HumanML3D's smallest group has 0.0128); a constant feature stays finite.
STD_FLOOR = 1e-4


@dataclass(frozen=True)
class Caption:
    """A sentence about a clip. start_s, end_s in seconds; both 0: it describes the whole clip.

    meta: JSON values kept beside the text, e.g. {"tokens": "a/DET man/NOUN"} or {"spec": {...}}.
    """

    text: str
    start_s: float = 0.0
    end_s: float = 0.0
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass
class Moments:
    """Running mean and sum of squared deviations per feature, in float64 (Chan et al.'s pairwise update)."""

    count: int
    mean: NDArray[np.float64]
    squares: NDArray[np.float64]

    @classmethod
    def empty(cls, width: int) -> Moments:
        return cls(0, np.zeros(width), np.zeros(width))

    def add(self, rows: NDArray) -> None:
        """Take in rows (n, width)."""
        rows = np.asarray(rows, dtype=np.float64)
        mean = rows.mean(axis=0)
        squares = ((rows - mean) ** 2).sum(axis=0)
        total = self.count + len(rows)
        delta = mean - self.mean
        self.mean = self.mean + delta * (len(rows) / total)
        self.squares = self.squares + squares + delta**2 * (self.count * len(rows) / total)
        self.count = total

    def std(self) -> NDArray[np.float64]:
        """Population standard deviation."""
        return np.sqrt(self.squares / self.count)


def grouped_std(std: NDArray[np.float64]) -> NDArray[np.float64]:
    """The standard deviations averaged inside their representation's groups; other widths stay as given."""
    representation = Representation.find(len(std))
    return std if representation is None else representation.grouped_std(std)


class Clips(Protocol):
    """What takes clips: a DatasetWriter, or what a worker's findings travel in to one."""

    def add_clip(
        self,
        name: str,
        features: NDArray,
        split: str,
        captions: Sequence[Caption],
        meta: dict[str, Any] | None = None,
        notes: Sequence[tuple[str, str]] = (),
    ) -> object: ...

    def refuse(
        self,
        name: str,
        reason: str,
        *,
        split: str = "",
        detail: str = "",
        kind: Literal["clip", "caption"] = "clip",
    ) -> None: ...

    def note(self, name: str, reason: str, *, split: str = "", detail: str = "") -> None: ...


class DatasetWriter:
    """Writes a dataset clip by clip in bounded memory; the folder appears, whole, when the context ends.

    Bad clips and captions are refused with a reason: counted, listed in the manifest, never silently dropped.
    Of features one clip is in memory at a time; what grows is a few hundred bytes for each clip.

    With `resume` a writer that was killed or failed can be gone on with: after every piece of work comes
    `commit(key)`, and the next writer begins with `restore(keys)`. What is refused or noted outside of that
    has to be said again.

    Args:
        folder: where the dataset will be.
        feature_dim: features per frame.
        fps: frames a second.
        provenance: JSON values that say where the data come from.
        overwrite: replace an existing dataset (in one step, when this one is whole).
        min_frames: clips and items shorter than this are refused.
        max_frames: clips and items of this many frames or more are refused; None means no limit.
        statistics: (mean, std), each (feature_dim,), instead of those of the train split.
        strict: raise at the first refusal.
        resume: JSON values that the clips depend on beside the arguments here: a writer with the same ones
            may go on where another was stopped. Others are an error, or with `overwrite` a new beginning.
            None: nothing stays after an exception.

    Raises:
        ScaMoError: the folder exists, a split's name is unknown, nothing was kept, or no clip is in train;
            an unfinished folder has other settings, or belongs to another process.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        feature_dim: int = FEATURE_DIM,
        fps: float = 20.0,
        provenance: dict[str, Any] | None = None,
        overwrite: bool = False,
        min_frames: int = 1,
        max_frames: int | None = None,
        statistics: tuple[ArrayLike, ArrayLike] | None = None,
        strict: bool = False,
        resume: dict[str, Any] | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.feature_dim, self.fps = int(feature_dim), float(fps)
        self.min_frames, self.max_frames = max(1, int(min_frames)), max_frames
        self.provenance = dict(provenance or {})
        self.refused: list[dict[str, str]] = []
        self.notes: list[dict[str, str]] = []
        self._statistics = None if statistics is None else _given_statistics(statistics, self.feature_dim)
        self._strict, self._overwrite = strict, overwrite
        self._resume = resume
        self._journal: storage.Journal | None = None
        self._hopeless = False
        self._context = storage.whole_folder(
            self.folder,
            overwrite=overwrite,
            verify=self._verify,
            keep=None if resume is None else self._may_go_on,
        )
        self._open = False

    def __enter__(self) -> Self:
        self._temporary = self._context.__enter__()
        try:
            self._begin()
        except BaseException as error:
            self._context.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def _begin(self) -> None:
        if self._resume is not None:
            self._journal = storage.Journal(
                self._temporary / JOURNAL, self._settings(), overwrite=self._overwrite
            )
            if self._journal.fresh:
                for path in self._temporary.iterdir():
                    if path.is_dir():
                        shutil.rmtree(path)
                    elif path.name != JOURNAL:
                        path.unlink()
        self._features = storage.ArrayStream(
            self._temporary / "features.npy",
            np.float32,
            (self.feature_dim,),
            keep=self._journal is not None,
        )
        self._clips = self._text("clips.jsonl")
        self._captions = self._text("captions.jsonl")
        self._clip_offsets = array("q", [0])
        self._items = array("q")
        self._names: set[str] = set()
        self._moments = Moments.empty(self.feature_dim)
        self._counts = {split: Counter[str]() for split in SPLITS}
        self._committed = 0, 0
        self._uncommitted: list[dict[str, Any]] = []
        self._open = True

    def _text(self, name: str) -> TextIO:
        return open(self._temporary / name, "w", encoding="utf-8")

    def _settings(self) -> dict[str, Any]:
        statistics = self._statistics and [array.tolist() for array in self._statistics]
        return {
            "format": "scamo-unfinished-dataset",
            "version": scamo.__version__,
            "numpy": np.__version__,
            "feature_dim": self.feature_dim,
            "fps": self.fps,
            "min_frames": self.min_frames,
            "max_frames": self.max_frames,
            "statistics": statistics,
            "provenance": self.provenance,
            **(self._resume or {}),
        }

    def _may_go_on(self) -> bool:
        """Whether the unfinished folder is worth keeping; one of another process is none of ours."""
        journal = self._journal
        return journal is None or not (self._hopeless or (journal.fresh and not journal.count))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open = False
        try:
            if kind is None:
                try:
                    self._finish()
                except BaseException as failure:
                    self._hopeless = isinstance(failure, ScaMoError)
                    self._close()
                    self._context.__exit__(type(failure), failure, failure.__traceback__)
                    raise
            else:
                self._close()
            self._context.__exit__(kind, error, trace)
        finally:
            if self._journal is not None:
                self._journal.close()  # not before: it is the lock

    @property
    def frames(self) -> int:
        """Frames of the clips that were kept so far."""
        return self._features.rows

    def restore(self, keys: Iterable[str]) -> int:
        """Take in what an earlier writer had done of the work with these keys, in order; how many there are.

        It ends before the first piece that has another key, or whose features are not as they were written.
        """
        if self._journal is None:
            raise RuntimeError("this DatasetWriter was not made to be resumed")
        for record, key in zip(self._journal.records(), keys, strict=False):
            stored = self._stored(record["clips"]) if record.get("key") == key else None
            if stored is None:
                break
            for clip, features in stored:
                self._take(clip, features, stored=True)
            self.refused += record["refused"]
            self.notes += record["notes"]
        self._journal.cut()
        self._features.cut()
        self._committed = len(self.refused), len(self.notes)
        if self._strict and self.refused:
            self._stop(self.refused[0])
        return self._journal.count

    def commit(self, key: str) -> None:
        """All that was added, refused and noted since the last time is a piece of work that may stay."""
        if self._journal is None:
            raise RuntimeError("this DatasetWriter was not made to be resumed")
        refused, notes = self._committed
        # The rows first: a record must not promise what is not there.
        self._features.flush()
        self._journal.append(
            {
                "key": key,
                "clips": self._uncommitted,
                "refused": self.refused[refused:],
                "notes": self.notes[notes:],
            }
        )
        self._committed = len(self.refused), len(self.notes)
        self._uncommitted = []

    def _stored(self, clips: list[dict[str, Any]]) -> list[tuple[dict[str, Any], NDArray]] | None:
        found, first = [], 0
        for clip in clips:
            features = self._features.peek(first, clip["frames"])
            if zlib.crc32(features.view(np.uint8)) != clip["crc"]:
                return None
            found.append((clip, features))
            first += clip["frames"]
        return found

    def add_clip(
        self,
        name: str,
        features: NDArray,
        split: str,
        captions: Sequence[Caption],
        meta: dict[str, Any] | None = None,
        notes: Sequence[tuple[str, str]] = (),
    ) -> bool:
        """Add a clip with its captions, or refuse it. Returns whether it was kept.

        features (T, feature_dim), any float; split "train", "val" or "test". A caption with time tags covers
        the frames [int(fps start_s), int(fps end_s)), cut at the clip's end. notes: (reason, detail) of what
        is odd about the clip, if it is kept.
        """
        if not self._open:
            raise RuntimeError("DatasetWriter is used outside its `with` block")
        if split not in SPLITS:
            raise ScaMoError(f"clip {name}: split {split!r}, expected one of {', '.join(SPLITS)}")
        features = np.asarray(features)
        fault = self._clip_fault(name, features)
        if fault is not None:
            self.refuse(name, fault[0], split=split, detail=fault[1])
            return False

        items = self._items_of(name, features.shape[0], split, captions)
        if not items:
            self.refuse(name, "no usable caption", split=split, detail=f"{len(captions)} captions in all")
            return False

        described = [
            [start, end, [c.meta | {"text": " ".join(c.text.split())} for c in captions]]
            for start, end, captions in items
        ]
        clip = {"name": name, "split": split, "meta": meta or {}, "items": described}
        self._take(clip, features.astype(np.float32, copy=False))
        for reason, detail in notes:
            self.note(name, reason, split=split, detail=detail)
        return True

    def _take(self, clip: dict[str, Any], features: NDArray, *, stored: bool = False) -> None:
        split, index = clip["split"], len(self._clip_offsets) - 1
        self._features.append(features, stored=stored)
        self._clip_offsets.append(self._features.rows)
        self._names.add(clip["name"])
        _write_line(self._clips, {key: clip[key] for key in ("name", "split", "meta")})
        counts = self._counts[split]
        for start, end, captions in clip["items"]:
            item = len(self._items) // 3
            self._items.extend((index, start, end))
            for caption in captions:
                _write_line(self._captions, caption | {"item": item})
            counts.update(items=1, captions=len(captions), item_frames=end - start)
        counts.update(clips=1, frames=len(features))
        if split == "train":
            self._moments.add(features)
        if self._journal is not None and not stored:
            crc = zlib.crc32(np.ascontiguousarray(features).view(np.uint8))
            self._uncommitted.append(clip | {"frames": len(features), "crc": crc})

    def refuse(
        self,
        name: str,
        reason: str,
        *,
        split: str = "",
        detail: str = "",
        kind: Literal["clip", "caption"] = "clip",
    ) -> None:
        """Record that a clip or caption is left out: `reason` is counted, `detail` says what was found."""
        entry = {"name": name, "kind": kind, "split": split, "reason": reason, "detail": detail}
        self.refused.append(entry)
        if self._strict:
            self._stop(entry)

    @staticmethod
    def _stop(entry: dict[str, str]) -> None:
        raise ScaMoError(f"{entry['name']}: {entry['reason']}: {entry['detail']}")

    def note(self, name: str, reason: str, *, split: str = "", detail: str = "") -> None:
        """Record something odd about an entry that is kept."""
        self.notes.append({"name": name, "split": split, "reason": reason, "detail": detail})

    def _clip_fault(self, name: str, features: NDArray) -> tuple[str, str] | None:
        if not name or name in self._names:
            return "name is empty or used twice", repr(name)
        if features.ndim != 2 or features.shape[1] != self.feature_dim or features.dtype.kind != "f":
            found = f"{features.dtype} {list(features.shape)}"
            return "wrong shape", f"{found}, expected float [frames, {self.feature_dim}]"
        if features.shape[0] < self.min_frames:
            return "too short", f"{features.shape[0]} frames, expected at least {self.min_frames}"
        if self.max_frames is not None and features.shape[0] >= self.max_frames:
            return "too long", f"{features.shape[0]} frames, expected fewer than {self.max_frames}"
        # float64 values beyond float32's range would turn infinite on disk.
        finite = np.isfinite(features).all() and (
            features.dtype.itemsize <= 4 or float(np.abs(features).max()) <= float(np.finfo(np.float32).max)
        )
        if not finite:
            bad = np.argwhere(~(np.abs(features) <= np.finfo(np.float32).max))
            frame, column = bad[0]
            return "NaN or infinite features", f"frame {frame}, feature {column}, {len(bad)} values in all"
        return None

    def _items_of(
        self, name: str, frames: int, split: str, captions: Sequence[Caption]
    ) -> list[tuple[int, int, list[Caption]]]:
        whole: list[Caption] = []
        parts: list[tuple[int, int, list[Caption]]] = []
        for index, caption in enumerate(captions):

            def drop(reason: str, detail: str, index: int = index) -> None:
                self.refuse(name, reason, split=split, kind="caption", detail=f"caption {index}: {detail}")

            if not caption.text.strip():
                drop("empty caption", repr(caption.text))
            elif not (math.isfinite(caption.start_s) and math.isfinite(caption.end_s)):
                drop("bad time tags", f"{caption.start_s} to {caption.end_s} s")
            elif caption.start_s == 0 and caption.end_s == 0:
                whole.append(caption)
            else:
                start, end = int(caption.start_s * self.fps), min(int(caption.end_s * self.fps), frames)
                tags = f"{caption.start_s:g} to {caption.end_s:g} s of {frames / self.fps:g} s"
                length = max(0, end - start)
                if start < 0 or length == 0:
                    drop("bad time tags", tags)
                elif length < self.min_frames:
                    drop("part too short", f"{tags}: {length} frames, expected at least {self.min_frames}")
                else:
                    parts.append((start, end, [caption]))
        return ([(0, frames, whole)] if whole else []) + parts

    def _finish(self) -> None:
        if not self._items:
            reasons = ", ".join(f"{reason} ({n})" for reason, n in self._reasons().most_common(4))
            raise ScaMoError(f"{self.folder}: no clip was kept; refused: {reasons or 'none was given'}")
        if self._statistics is None and not self._moments.count:
            raise ScaMoError(f"{self.folder}: no clip in train, so the statistics cannot be computed")
        temporary = self._temporary
        files = {"features.npy": self._features.close()}
        for stream in (self._clips, self._captions):
            stream.flush()
            os.fsync(stream.fileno())
            stream.close()
        files["clip_offsets.npy"] = storage.write_array(
            temporary / "clip_offsets.npy", np.array(self._clip_offsets, dtype=np.int64)
        )
        files["items.npy"] = storage.write_array(
            temporary / "items.npy", np.array(self._items, dtype=np.int64).reshape(-1, 3)
        )
        for name in ("clips.jsonl", "captions.jsonl"):
            files[name] = storage.file_record(temporary / name)
        total = sum(self._counts.values(), Counter[str]())
        storage.write_manifest(
            temporary,
            {
                "format": FORMAT,
                "schema_version": SCHEMA_VERSION,
                "fps": self.fps,
                "feature_dim": self.feature_dim,
                "counts": dict(total),
                "splits": {split: dict(counts) for split, counts in self._counts.items()},
                "statistics": self._final_statistics(),
                "provenance": self.provenance,
                "refused": self.refused,
                "notes": self.notes,
                "files": files,
            },
        )

    def _final_statistics(self) -> dict[str, Any]:
        if self._statistics is not None:
            (mean, std), source, frames = self._statistics, "given", 0
        else:
            mean, std = self._moments.mean, grouped_std(self._moments.std())
            source, frames = "train", self._moments.count
        floored = np.flatnonzero(std < STD_FLOOR)
        return {
            "source": source,
            "frames": frames,
            "std_floor": STD_FLOOR,
            "floored_features": floored.tolist(),
            "mean": np.float32(mean).tolist(),
            "std": np.float32(np.maximum(std, STD_FLOOR)).tolist(),
        }

    def _reasons(self) -> Counter[str]:
        return Counter(entry["reason"] for entry in self.refused)

    def _verify(self, folder: Path) -> None:
        MotionDataset.open(folder, verify="full")
        if self._journal is not None:
            self._journal.remove()

    def _close(self) -> None:
        for close in (self._features.abandon, self._clips.close, self._captions.close):
            with contextlib.suppress(OSError):  # what cannot be flushed is thrown away anyhow
                close()


def _write_line(file: Any, value: dict[str, Any]) -> None:
    file.write(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n")


def _given_statistics(
    statistics: tuple[ArrayLike, ArrayLike], width: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    mean, std = (np.asarray(array, dtype=np.float64) for array in statistics)
    for name, values in (("mean", mean), ("std", std)):
        if values.shape != (width,) or not np.isfinite(values).all():
            raise ScaMoError(
                f"statistics: {name} of shape {list(values.shape)}, expected {width} finite values"
            )
    if (std <= 0).any():
        raise ScaMoError(f"statistics: std[{int(np.argmax(std <= 0))}] is not above 0")
    return mean, std


class MotionDataset:
    """A dataset folder, memory-mapped and read-only. Open it with `MotionDataset.open(folder)`.

    fps; feature_dim; mean, std float32 (feature_dim,); clip_names, clip_splits: lists; item_table int64
    (items, 3) of clip, start, end; manifest.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest
        try:
            self.fps = float(manifest["fps"])
            self.feature_dim = int(manifest["feature_dim"])
            self.mean = np.array(manifest["statistics"]["mean"], dtype=np.float32)
            self.std = np.array(manifest["statistics"]["std"], dtype=np.float32)
            counts = manifest["counts"]
            expected = {key: int(counts[key]) for key in ("clips", "items", "captions", "frames")}
            for key in ("splits", "provenance", "refused", "notes", "files"):
                manifest[key]
            # Of the features, see `scamo.motion.features.FIXED`.
            self.variant = str(manifest["provenance"].get("variant", "original"))
        except (KeyError, TypeError, ValueError) as error:
            raise ScaMoError(f"{folder / 'manifest.json'}: field {error} is missing or malformed") from None
        self._features = storage.map_array(folder, "features.npy", manifest)
        self.clip_offsets: NDArray[np.int64] = np.array(
            storage.map_array(folder, "clip_offsets.npy", manifest)
        )
        self.item_table: NDArray[np.int64] = np.array(storage.map_array(folder, "items.npy", manifest))
        clips = _read_lines(folder / "clips.jsonl", {"name": str, "split": str, "meta": dict})
        self.clip_names: list[str] = [clip["name"] for clip in clips]
        self.clip_splits: list[str] = [clip["split"] for clip in clips]
        self._clip_meta: list[dict[str, Any]] = [clip["meta"] for clip in clips]
        self._captions = _read_lines(folder / "captions.jsonl", {"text": str, "item": int})
        self._caption_items = np.array([caption["item"] for caption in self._captions], dtype=np.int64)
        self._check(expected)
        self._caption_offsets = np.searchsorted(self._caption_items, np.arange(self.n_items + 1))

    @classmethod
    def open(cls, folder: str | Path, *, verify: bool | Literal["full"] = True) -> MotionDataset:
        """Open a dataset.

        verify: True checks schema, sizes, shapes and counts; "full" also every SHA-256, the finiteness of the
        features, and the tokens and text states inside; False trusts the sizes.

        Raises:
            ScaMoError: one line that names the file and what was expected of it.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise ScaMoError(f"{folder}: no such dataset folder")
        manifest = storage.read_manifest(folder, format=FORMAT, schema_version=SCHEMA_VERSION)
        if verify:
            storage.check_files(folder, manifest, hashes=verify == "full")
        dataset = cls(folder, manifest)
        if verify == "full":
            row = storage.not_finite(folder / "features.npy", manifest["files"]["features.npy"])
            if row is not None:
                clip = int(np.searchsorted(dataset.clip_offsets, row, side="right")) - 1
                raise ScaMoError(f"{folder / 'features.npy'}: clip {clip} is not finite")
            for name in dataset.token_names():
                TokenStore(dataset, name, hashes=True)
            for name in dataset.text_names():
                TextStore(dataset, name, hashes=True)
        return dataset

    def _check(self, expected: dict[str, int]) -> None:
        folder = self.folder
        found = {
            "clips": len(self.clip_names),
            "items": len(self.item_table),
            "captions": len(self._captions),
            "frames": len(self._features),
        }
        for key, count in expected.items():
            if found[key] != count:
                raise ScaMoError(f"{folder}: {found[key]} {key}, the manifest says {count}")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values.shape != (self.feature_dim,):
                raise ScaMoError(
                    f"{folder / 'manifest.json'}: statistics.{name} has {values.size} values, "
                    f"expected {self.feature_dim}"
                )
        if self._features.ndim != 2 or self._features.shape[1] != self.feature_dim:
            raise ScaMoError(
                f"{folder / 'features.npy'}: {self._features.shape}, expected width {self.feature_dim}"
            )
        offsets, table = self.clip_offsets, self.item_table
        if offsets.shape != (found["clips"] + 1,) or offsets[0] != 0 or offsets[-1] != found["frames"]:
            raise ScaMoError(f"{folder / 'clip_offsets.npy'}: does not cover the {found['frames']} frames")
        lengths = np.diff(offsets)
        if (lengths < 1).any():
            raise ScaMoError(
                f"{folder / 'clip_offsets.npy'}: clip {int(np.argmax(lengths < 1))} has no frames"
            )
        clip, start, end = table.T
        bad = (clip < 0) | (clip >= found["clips"])
        bad |= (start < 0) | (end <= start) | (end > lengths[np.where(bad, 0, clip)])
        if bad.any():
            raise ScaMoError(f"{folder / 'items.npy'}: item {int(np.argmax(bad))} lies outside its clip")
        # From -1 to the number of items in steps of 0 or 1: every item has captions, and they stand in order.
        steps = np.diff(self._caption_items, prepend=-1, append=found["items"])
        if ((steps < 0) | (steps > 1)).any() or steps[0] != 1 or steps[-1] != 1:
            raise ScaMoError(f"{folder / 'captions.jsonl'}: expected captions of every item, in order")
        unknown = set(self.clip_splits) - set(SPLITS)
        if unknown:
            raise ScaMoError(f"{folder / 'clips.jsonl'}: unknown split {min(unknown)!r}")

    @property
    def n_clips(self) -> int:
        return len(self.clip_names)

    @property
    def n_items(self) -> int:
        return len(self.item_table)

    @property
    def n_captions(self) -> int:
        return len(self._captions)

    @cached_property
    def item_lengths(self) -> NDArray[np.int64]:
        """Frames of every item, int64 (items,)."""
        return self.item_table[:, 2] - self.item_table[:, 1]

    @cached_property
    def _item_splits(self) -> NDArray[np.str_]:
        return np.array(self.clip_splits)[self.item_table[:, 0]]

    def items(self, split: str) -> NDArray[np.int64]:
        """Item ids of a split, ascending. Raises ScaMoError for an unknown split."""
        if split not in SPLITS:
            raise ScaMoError(f"split {split!r}: expected one of {', '.join(SPLITS)}")
        return np.flatnonzero(self._item_splits == split)

    def clip_features(self, clip: int) -> NDArray[np.float32]:
        """(T, feature_dim) float32, a read-only view of the mapped file."""
        return self._features[self.clip_offsets[clip] : self.clip_offsets[clip + 1]]

    def clip_meta(self, clip: int) -> dict[str, Any]:
        return self._clip_meta[clip]

    def item_features(self, item: int) -> NDArray[np.float32]:
        """(T, feature_dim) float32, a read-only view of the mapped file."""
        clip, start, end = self.item_table[item]
        first = self.clip_offsets[clip]
        return self._features[first + start : first + end]

    def item_clip(self, item: int) -> int:
        return int(self.item_table[item, 0])

    def item_split(self, item: int) -> str:
        return self.clip_splits[self.item_clip(item)]

    def item_name(self, item: int) -> str:
        """The clip's name; a part of it has its frames behind an @, e.g. "000021@40-120"."""
        clip, start, end = (int(value) for value in self.item_table[item])
        name = self.clip_names[clip]
        whole = start == 0 and end == self.clip_offsets[clip + 1] - self.clip_offsets[clip]
        return name if whole else f"{name}@{start}-{end}"

    def captions_of(self, item: int) -> NDArray[np.int64]:
        """Caption ids of an item, at least one, in the order of the source."""
        return np.arange(self._caption_offsets[item], self._caption_offsets[item + 1])

    def caption(self, caption: int) -> str:
        return self._captions[caption]["text"]

    def caption_item(self, caption: int) -> int:
        return int(self._caption_items[caption])

    def caption_meta(self, caption: int) -> dict[str, Any]:
        """What the source keeps beside the text: "tokens" (HumanML3D), "spec" (synthetic corpus), ..."""
        return {key: value for key, value in self._captions[caption].items() if key not in ("text", "item")}

    @property
    def refused(self) -> list[dict[str, str]]:
        """What was left out when the dataset was written: name, kind, split, reason, detail."""
        return self.manifest["refused"]

    @cached_property
    def manifest_sha256(self) -> str:
        """What tokens and text states are tied to."""
        return storage.sha256_of(self.folder / "manifest.json")

    def token_names(self) -> list[str]:
        return _store_names(self.folder / "tokens")

    def text_names(self) -> list[str]:
        return _store_names(self.folder / "text")

    def tokens(self, name: str = "") -> TokenStore:
        """The tokens called `name`; "" means the only ones, else ScaMoError lists what there is."""
        return TokenStore(
            self, _choose(name, self.token_names(), self.folder, "tokens", "scamo tokenizer encode")
        )

    def text_states(self, name: str = "") -> TextStore:
        """The text states called `name`; "" means the only ones. Errors as for `tokens`."""
        return TextStore(
            self, _choose(name, self.text_names(), self.folder, "text states", "scamo encode-text")
        )

    def summary(self) -> str:
        """A table of the splits, what was refused by reason and split, and the stores."""
        lines = [f"{self.folder}: {self.feature_dim} features at {self.fps:g} fps"]
        columns = ("clips", "items", "captions", "frames")
        lines.append(f"{'':<34}" + "".join(f"{name:>11}" for name in (*SPLITS, "all")))
        counts = self.manifest["splits"]

        def row(label: str, values: Sequence[float], form: str = ",d") -> str:
            return f"{label:<34}" + "".join(f"{value:>11{form}}" for value in (*values, sum(values)))

        for column in columns:
            lines.append(row(column, [int(counts[split].get(column, 0)) for split in SPLITS]))
        lines.append(row("hours", [counts[s].get("frames", 0) / self.fps / 3600 for s in SPLITS], ",.2f"))
        for title, entries in (("refused", self.refused), ("noted", self.manifest["notes"])):
            groups = Counter(
                (entry.get("kind", "clip"), entry["reason"], entry["split"]) for entry in entries
            )
            for kind, reason in sorted({key[:2] for key in groups}):
                label = f"{title}: {reason}" + (" (caption)" if kind == "caption" else "")
                lines.append(row(label, [groups[kind, reason, split] for split in SPLITS]))
                outside = groups[kind, reason, ""]
                if outside:
                    lines[-1] += f"  and {outside:,d} without a split"
        floored = self.manifest["statistics"]["floored_features"]
        if floored:
            lines.append(f"constant in train (std set to {STD_FLOOR:g}): features {_shorten(floored)}")
        for name in self.token_names():
            tokens = self.tokens(name)
            lines.append(
                f"tokens {name}: {tokens.n_tokens:,d} tokens of {tokens.codes:,d} codes, "
                f"{tokens.downsampling} frames each"
            )
        for name in self.text_names():
            text = self.text_states(name)
            lines.append(
                f"text {name}: {text.n_texts:,d} different captions, {text.n_states:,d} states "
                f"of width {text.width}, by {text.encoder}"
            )
        return "\n".join(lines)


def _shorten(values: Sequence[int]) -> str:
    shown = ", ".join(map(str, values[:8]))
    return shown if len(values) <= 8 else f"{shown} and {len(values) - 8} more"


def _read_lines(path: Path, required: dict[str, type]) -> list[dict[str, Any]]:
    try:
        with open(path, encoding="utf-8") as file:
            lines = []
            for number, line in enumerate(file, 1):
                try:
                    value = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ScaMoError(f"{path}: line {number} is not valid JSON: {error}") from None
                for key, kind in required.items():
                    if not isinstance(value, dict) or not isinstance(value.get(key), kind):
                        raise ScaMoError(f"{path}: line {number}: expected {key!r} to be {kind.__name__}")
                lines.append(value)
            return lines
    except OSError as error:
        raise ScaMoError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ScaMoError(f"{path}: is not UTF-8: {error.reason} at byte {error.start}") from None


def _store_names(folder: Path) -> list[str]:
    return sorted(path.parent.name for path in folder.glob("[!.]*/manifest.json"))


def _choose(name: str, names: list[str], folder: Path, what: str, command: str) -> str:
    if not names:
        raise ScaMoError(f"{folder}: has no {what} yet: run `{command}`")
    if not name:
        if len(names) > 1:
            raise ScaMoError(f"{folder}: has several {what}, name one of {', '.join(names)}")
        return names[0]
    if name not in names:
        raise ScaMoError(f"{folder}: has no {what} {name!r}: there are {', '.join(names)}")
    return name


def _check_store_name(name: str) -> str:
    if not name or name.startswith(".") or "/" in name or "\\" in name:
        raise ScaMoError(f"name {name!r}: expected a plain folder name")
    return name


class _Store:
    """A folder tied to a dataset by the SHA-256 of its manifest."""

    def __init__(self, dataset: MotionDataset, name: str, kind: str, format: str, hashes: bool) -> None:
        self.name = name
        self.folder = dataset.folder / kind / name
        self.manifest = storage.read_manifest(self.folder, format=format, schema_version=SCHEMA_VERSION)
        storage.check_files(self.folder, self.manifest, hashes=hashes)
        if self.manifest.get("dataset_sha256") != dataset.manifest_sha256:
            raise ScaMoError(f"{self.folder}: was made for another dataset: make it again")

    def _map(self, name: str) -> NDArray:
        return storage.map_array(self.folder, name, self.manifest)

    def _check_offsets(self, offsets: NDArray, count: int, total: int) -> None:
        whole = offsets.shape == (count + 1,) and offsets[0] == 0 and offsets[-1] == total
        if not whole or (np.diff(offsets) < 0).any():
            raise ScaMoError(f"{self.folder / 'offsets.npy'}: does not divide {total} rows into {count}")


class TokenStore(_Store):
    """Motion tokens of every item by one tokenizer: store[item] is int32 (n,) in [0, codes).

    codes: K; downsampling: frames per token; lengths int64 (items,), 0 for an item shorter than a token.
    """

    def __init__(self, dataset: MotionDataset, name: str, *, hashes: bool = False) -> None:
        super().__init__(dataset, name, "tokens", TOKENS_FORMAT, hashes)
        self._dataset = dataset
        self.codes = int(self.manifest["codes"])
        self.downsampling = int(self.manifest["downsampling"])
        self.tokenizer: dict[str, Any] = self.manifest["tokenizer"]
        self._tokens = self._map("tokens.npy")
        self._offsets = np.array(self._map("offsets.npy"))
        self._check_offsets(self._offsets, dataset.n_items, len(self._tokens))
        self.lengths: NDArray[np.int64] = np.diff(self._offsets)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, item: int) -> NDArray[np.int32]:
        return self._tokens[self._offsets[item] : self._offsets[item + 1]]

    @property
    def n_tokens(self) -> int:
        return len(self._tokens)

    def unigram(self, split: str = "train") -> NDArray[np.int64]:
        """Counts (codes + 1,) of every token over a split; the last is EOS, once per item that has tokens.

        The denominator of the normalised loss L_u (paper eq. 8).
        """
        counts = np.zeros(self.codes + 1, dtype=np.int64)
        for item in self._dataset.items(split):
            tokens = self[item]
            if len(tokens):
                np.add.at(counts, tokens, 1)
                counts[self.codes] += 1
        return counts


class TextStore(_Store):
    """Word-piece states of every caption by one text encoder: store[caption] is float16 (P, width).

    encoder: its name as `TextEncoder.load` takes it; width; lengths int64 (captions,). Captions with the same
    text share their rows.
    """

    def __init__(self, dataset: MotionDataset, name: str, *, hashes: bool = False) -> None:
        super().__init__(dataset, name, "text", TEXT_FORMAT, hashes)
        self.encoder: str = self.manifest["encoder"]
        self._states = self._map("states.npy")
        self.width = int(self._states.shape[1])
        self._offsets = np.array(self._map("offsets.npy"))
        self._index = np.array(self._map("index.npy"))
        self._check_offsets(self._offsets, self.n_texts, len(self._states))
        lengths = np.diff(self._offsets)
        if (lengths < 1).any():
            raise ScaMoError(f"{self.folder / 'offsets.npy'}: text {int(np.argmin(lengths))} has no states")
        bad = (self._index < 0) | (self._index >= self.n_texts)
        if self._index.shape != (dataset.n_captions,) or bad.any():
            raise ScaMoError(f"{self.folder / 'index.npy'}: expected one text for each caption")
        self.lengths: NDArray[np.int64] = lengths[self._index]

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, caption: int) -> NDArray[np.float16]:
        text = self._index[caption]
        return self._states[self._offsets[text] : self._offsets[text + 1]]

    @property
    def n_texts(self) -> int:
        """Captions that differ."""
        return len(self._offsets) - 1

    @property
    def n_states(self) -> int:
        return len(self._states)


def write_tokens(
    dataset_folder: str | Path,
    name: str,
    tokens: Iterable[NDArray],
    *,
    codes: int,
    downsampling: int,
    tokenizer: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write tokens/NAME: one integer array (n,) per item, in the order of the items; empty means refused.

    Args:
        dataset_folder: the dataset.
        name: what to call the tokens.
        tokens: as many arrays as the dataset has items, read one at a time.
        codes: K; every token lies in [0, K).
        downsampling: frames per token.
        tokenizer: JSON values that say which tokenizer made them.
        overwrite: replace tokens of the same name.

    Raises:
        ScaMoError: too few or too many arrays, a token outside [0, K), more tokens than the item has
            frames for, or no token at all; nothing is left behind.
    """
    dataset = MotionDataset.open(dataset_folder)
    folder = dataset.folder / "tokens" / _check_store_name(name)
    with storage.whole_folder(folder, overwrite=overwrite) as temporary:
        with _stream(temporary / "tokens.npy", np.int32) as stream:
            offsets = array("q", [0])
            for item, values in enumerate(tokens):
                if item >= dataset.n_items:
                    raise ScaMoError(f"{folder}: more token arrays than the {dataset.n_items} items")
                values = np.asarray(values)
                where = f"{folder}: item {item} ({dataset.item_name(item)})"
                if values.ndim != 1 or (values.size and values.dtype.kind not in "iu"):
                    raise ScaMoError(f"{where}: {values.dtype} {list(values.shape)}, expected integers (n,)")
                if values.size and not (int(values.min()) >= 0 and int(values.max()) < codes):
                    raise ScaMoError(f"{where}: a token is outside [0, {codes})")
                if values.size * downsampling > dataset.item_lengths[item]:
                    raise ScaMoError(
                        f"{where}: {values.size} tokens of {downsampling} frames, it has "
                        f"{dataset.item_lengths[item]} frames"
                    )
                stream.append(values)
                offsets.append(stream.rows)
            if len(offsets) - 1 != dataset.n_items:
                raise ScaMoError(f"{folder}: {len(offsets) - 1} token arrays for {dataset.n_items} items")
            if not stream.rows:
                raise ScaMoError(f"{folder}: every item is shorter than one token of {downsampling} frames")
            files = {"tokens.npy": stream.close()}
        files["offsets.npy"] = storage.write_array(
            temporary / "offsets.npy", np.array(offsets, dtype=np.int64)
        )
        storage.write_manifest(
            temporary,
            {
                "format": TOKENS_FORMAT,
                "schema_version": SCHEMA_VERSION,
                "dataset_sha256": dataset.manifest_sha256,
                "codes": int(codes),
                "downsampling": int(downsampling),
                "items_without_tokens": int((np.diff(np.array(offsets)) == 0).sum()),
                "tokenizer": tokenizer or {},
                "files": files,
            },
        )
    return folder


def write_text_states(
    dataset_folder: str | Path,
    name: str,
    states: Iterable[NDArray],
    *,
    encoder: str,
    index: NDArray[np.integer] | None = None,
    details: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write text/NAME: float arrays (P, width), stored as float16.

    Args:
        dataset_folder: the dataset.
        name: what to call the states.
        states: one array per different text, in any order, read one at a time.
        encoder: the encoder's name, which exported models load it by.
        index: (captions,) which of `states` each caption has; None: one array per caption, in order.
        details: JSON values about the encoder.
        overwrite: replace states of the same name.

    Raises:
        ScaMoError: a wrong number of arrays, an empty or infinite one, or different widths; nothing is left.
    """
    dataset = MotionDataset.open(dataset_folder)
    folder = dataset.folder / "text" / _check_store_name(name)
    if index is None:
        index = np.arange(dataset.n_captions)
    index = np.asarray(index, dtype=np.int64)
    if index.shape != (dataset.n_captions,) or index.min() < 0:
        raise ScaMoError(f"{folder}: index of shape {list(index.shape)}, expected ({dataset.n_captions},)")
    expected = int(index.max()) + 1
    with storage.whole_folder(folder, overwrite=overwrite) as temporary, contextlib.ExitStack() as stack:
        stream: storage.ArrayStream | None = None
        offsets = array("q", [0])
        for text, values in enumerate(states):
            values = np.asarray(values)
            where = f"{folder}: text {text}"
            if values.ndim != 2 or not values.size or values.dtype.kind != "f":
                raise ScaMoError(f"{where}: {values.dtype} {list(values.shape)}, expected float (P, width)")
            if stream is None:
                stream = stack.enter_context(
                    _stream(temporary / "states.npy", np.float16, (values.shape[1],))
                )
            if values.shape[1:] != stream.row_shape:
                raise ScaMoError(f"{where}: width {values.shape[1]}, expected {stream.row_shape[0]}")
            with np.errstate(over="ignore"):
                halves = values.astype(np.float16)
            if not np.isfinite(halves).all():
                raise ScaMoError(f"{where}: a state is not finite in float16")
            stream.append(halves)
            offsets.append(stream.rows)
        if stream is None or len(offsets) - 1 != expected:
            raise ScaMoError(f"{folder}: {len(offsets) - 1} texts, the captions need {expected}")
        files = {"states.npy": stream.close()}
        files["offsets.npy"] = storage.write_array(
            temporary / "offsets.npy", np.array(offsets, dtype=np.int64)
        )
        files["index.npy"] = storage.write_array(temporary / "index.npy", index)
        storage.write_manifest(
            temporary,
            {
                "format": TEXT_FORMAT,
                "schema_version": SCHEMA_VERSION,
                "dataset_sha256": dataset.manifest_sha256,
                "encoder": encoder,
                "details": details or {},
                "files": files,
            },
        )
    return folder


@contextlib.contextmanager
def _stream(path: Path, dtype: Any, row_shape: tuple[int, ...] = ()) -> Iterator[storage.ArrayStream]:
    stream = storage.ArrayStream(path, dtype, row_shape)
    try:
        yield stream
    finally:
        stream.abandon()  # closing a closed file does nothing
