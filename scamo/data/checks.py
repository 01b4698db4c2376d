"""Everything about a prepared dataset that can be validated, found in one run that stops at nothing.

`MotionDataset.open` refuses a broken folder at its first fault; `check` names them all.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from scamo.data import inspect, storage
from scamo.data.dataset import (
    FORMAT,
    SCHEMA_VERSION,
    SPLITS,
    STD_FLOOR,
    TEXT_FORMAT,
    TOKENS_FORMAT,
    Moments,
    grouped_std,
)
from scamo.errors import ScaMoError
from scamo.motion.representation import Representation

STATISTICS = 1e-4  # of a deviation: how far stored statistics may be from those of the data
LONGEST = 300  # characters of what was found
_STATES_CHUNK = 1 << 16  # rows of text states at a time


@dataclass(frozen=True)
class Finding:
    """What was found and what was expected, in which file, and where in it (a clip, an item, a line)."""

    severity: Literal["error", "warning"]
    kind: str
    file: str
    where: str
    found: str
    expected: str

    def __str__(self) -> str:
        place = f"{self.file}: {self.where}" if self.where else self.file
        return f"{self.severity}: {place}: {self.found}; expected {self.expected}"


@dataclass
class CheckReport:
    """findings: all of them; notes: what could not be checked, and oddities that are the format's own."""

    folder: Path
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    checked: dict[str, int] = field(default_factory=dict)

    @property
    def errors(self) -> int:
        return sum(finding.severity == "error" for finding in self.findings)

    @property
    def warnings(self) -> int:
        return len(self.findings) - self.errors

    @property
    def exit_status(self) -> int:
        """1 if there is an error, else 0."""
        return int(self.errors > 0)

    def as_dict(self) -> dict[str, Any]:
        """What JSON holds of it."""
        return {
            "folder": str(self.folder),
            "errors": self.errors,
            "warnings": self.warnings,
            "checked": self.checked,
            "findings": [asdict(finding) for finding in self.findings],
            "notes": self.notes,
        }

    def text(self, limit: int = 10) -> str:
        """A line a finding, errors first, at most `limit` of a kind (0: all), and the counts."""
        lines, shown = [], Counter[tuple[str, str]]()
        ordered = sorted(self.findings, key=lambda one: (one.severity != "error", one.kind))
        total = Counter((one.severity, one.kind) for one in ordered)
        for one in ordered:
            key = one.severity, one.kind
            shown[key] += 1
            if not limit or shown[key] <= limit:
                lines.append(str(one))
            elif shown[key] == total[key]:
                lines.append(f"{one.severity}: and {total[key] - limit:,d} more of the kind {one.kind!r}")
        lines += [f"note: {note}" for note in self.notes]
        checked = ", ".join(f"{count:,d} {name}" for name, count in self.checked.items())
        lines.append(f"{self.folder}: {checked}: {self.errors:,d} errors, {self.warnings:,d} warnings")
        return "\n".join(lines)


def check(
    folder: str | Path,
    *,
    hashes: bool = True,
    tokenizers: Sequence[str | Path] = (),
    encoders: bool = False,
    progress: bool = True,
) -> CheckReport:
    """Validate a dataset folder with its tokens and text states.

    Files against the manifest, indices, captions, statistics, splits (no clip or its mirror in two of them),
    the motions themselves (whether they are of a body that stands on the floor, faces +Z at first and moves
    as its velocity channels say), tokens, text states.

    Args:
        folder: the dataset.
        hashes: read every file once more for its SHA-256.
        tokenizers: folders of the tokenizers that made the tokens, so that their statistics are compared;
            one beside the dataset is found by its name.
        encoders: load the text encoders (from the hub, if they lie nowhere else) and count every caption's
            word pieces again.
        progress: show progress bars.

    Raises:
        ScaMoError: there is no such folder. All else is a finding.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ScaMoError(f"{folder}: no such dataset folder")
    checker = _Checker(folder, hashes, [Path(path) for path in tokenizers], encoders, progress)
    checker.run()
    return checker.report


@dataclass
class _Clips:
    names: list[str]
    splits: list[str]
    meta: list[dict[str, Any]]

    def label(self, clip: int) -> str:
        known = 0 <= clip < len(self.names) and self.names[clip]
        return f"clip {clip} ({self.names[clip]})" if known else f"clip {clip}"


class _Checker:
    def __init__(
        self, folder: Path, hashes: bool, tokenizers: list[Path], encoders: bool, progress: bool
    ) -> None:
        self.folder, self.hashes, self.encoders, self.progress = folder, hashes, encoders, progress
        self.tokenizers = tokenizers
        self.report = CheckReport(folder)
        self.features: NDArray | None = None
        self.statistics: dict[str, NDArray] = {}  # stored, and sound
        self.spans: list[tuple[int, int] | None] = []  # rows of every clip; None where they make no sense

    def error(self, kind: str, file: str, where: str, found: str, expected: str) -> None:
        self._note("error", kind, file, where, found, expected)

    def warn(self, kind: str, file: str, where: str, found: str, expected: str) -> None:
        self._note("warning", kind, file, where, found, expected)

    def _note(self, severity: Literal["error", "warning"], kind: str, *words: str) -> None:
        # What was found may be anything, a megabyte of JSON for instance.
        short = (word if len(word) <= LONGEST else f"{word[:LONGEST]}…" for word in words)
        self.report.findings.append(Finding(severity, kind, *short))

    def run(self) -> None:
        self.manifest = self._manifest(self.folder, FORMAT)
        self._files(self.folder, self.manifest)
        self._unlisted()
        self.clips = self._clips()
        self.features = self._array(self.folder, "features.npy", self.manifest, "f", 2)
        self._offsets()
        self._items()
        self._captions()
        self._counts()
        self._leaks_by_name()
        self._motions()
        for name in self._stores("tokens"):
            self._tokens(self.folder / "tokens" / name)
        for name in self._stores("text"):
            self._text(self.folder / "text" / name)

    # Files

    def _relative(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def _manifest(self, folder: Path, format: str) -> dict[str, Any]:
        """The manifest, or as much of it as there is."""
        file = self._relative(folder / "manifest.json")
        try:
            return storage.read_manifest(folder, format=format, schema_version=SCHEMA_VERSION)
        except ScaMoError as error:
            message = str(error).removeprefix(f"{folder / 'manifest.json'}: ")
            self.error("manifest", file, "", message, f"a manifest of {format}, version {SCHEMA_VERSION}")
        except (OSError, ValueError, RecursionError) as error:
            self.error("manifest", file, "", f"cannot be read: {error}", "a readable file")
        return {}

    def _files(self, folder: Path, manifest: dict[str, Any]) -> None:
        from tqdm import tqdm

        records = manifest.get("files", {})
        if not isinstance(records, dict):
            self.error(
                "manifest", self._relative(folder / "manifest.json"), "files", "no object", "an object"
            )
            records = manifest["files"] = {}
        present = []
        for name, record in sorted(records.items()):
            if Path(name).name != name:
                file = self._relative(folder / "manifest.json")
                self.error("manifest", file, "files", f"{name!r}", "names of files in the folder")
                continue
            path = folder / name
            file = self._relative(path)
            if not isinstance(record, dict) or not isinstance(record.get("bytes"), int):
                self.error("manifest", file, "", f"its record is {record!r}", "bytes and sha256")
            elif not path.is_file():
                self.error("missing file", file, "", "missing", f"{record['bytes']} bytes")
            else:
                size = path.stat().st_size
                if size != record["bytes"]:
                    what = "truncated" if size < record["bytes"] else "too long"
                    self.error("size", file, "", f"{what}: {size} bytes", f"{record['bytes']} bytes")
                present.append((path, file, record))
        self.report.checked["files"] = self.report.checked.get("files", 0) + len(records)
        if not self.hashes:
            return
        total = sum(path.stat().st_size for path, *_ in present)
        label = f"hash {self._relative(folder)}" if folder != self.folder else "hash"
        with tqdm(total=total, desc=label, unit="B", unit_scale=True, disable=not self.progress) as bar:
            for path, file, record in present:
                try:
                    digest = storage.sha256_of(path, bar.update)
                except OSError as error:
                    self.error("unreadable", file, "", f"cannot be read: {error.strerror}", "a readable file")
                    continue
                if digest != record.get("sha256"):
                    found = f"corrupt: SHA-256 {digest[:16]}…"
                    expected = f"{str(record.get('sha256'))[:16]}… of the manifest"
                    self.error("hash", file, "", found, expected)

    def _unlisted(self) -> None:
        listed = set(self.manifest.get("files", {})) | {"manifest.json", "tokens", "text"}
        for path in sorted(self.folder.iterdir()):
            if path.name not in listed:
                self.warn("unlisted", path.name, "", "is not in the manifest", "only the dataset's files")

    def _array(
        self, folder: Path, name: str, manifest: dict[str, Any], kind: str, dimensions: int
    ) -> NDArray | None:
        """The array as far as its file goes, or None where nothing can be read of it."""
        path = folder / name
        file, record = self._relative(path), manifest.get("files", {}).get(name)
        if manifest and record is None:
            self.error("manifest", file, "", "is not in the manifest", "a record of it")
        if not path.is_file():
            if record is None:
                self.error("missing file", file, "", "missing", "an array")
            return None
        try:
            with open(path, "rb") as stream:
                version = np.lib.format.read_magic(stream)
                if version != (1, 0):
                    raise ValueError(f"version {version} of the format, not (1, 0)")
                shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
                start = stream.tell()
        except Exception as error:  # NumPy reads the header as Python: it fails in a dozen ways
            self.error("header", file, "", f"no .npy header: {str(error)[:80]!r}", "a .npy file")
            return None
        found = f"{dtype.str} {list(shape)}"
        if dtype.kind != kind or len(shape) != dimensions or fortran or (shape[1:] and not all(shape[1:])):
            self.error("shape", file, "", found, f"{dimensions} dimensions of kind {kind!r}, in C order")
            return None
        if isinstance(record, dict) and [dtype.str, list(shape)] != [
            record.get("dtype"),
            record.get("shape"),
        ]:
            self.error("shape", file, "", found, f"{record.get('dtype')} {record.get('shape')}")
        row = dtype.itemsize * int(np.prod(shape[1:], dtype=np.int64))
        rows = min(int(shape[0]), max(0, path.stat().st_size - start) // row)
        if rows < shape[0]:
            self.error("size", file, "", f"holds {rows} whole rows", f"{shape[0]} rows, as its header says")
        if not rows:
            return np.empty((0, *shape[1:]), dtype)
        return np.memmap(path, dtype, "r", start, (rows, *shape[1:]))

    def _lines(self, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
        """Line number and value of every line of a .jsonl; {} for one that cannot be read."""
        path = self.folder / name
        if not path.is_file():
            if name not in self.manifest.get("files", {}):
                self.error("missing file", name, "", "missing", "a line of JSON for each entry")
            return
        with open(path, "rb") as stream:
            for number, raw in enumerate(stream, 1):
                value: Any = {}
                try:
                    value = json.loads(raw.decode("utf-8"))
                    if not isinstance(value, dict):
                        self.error("line", name, f"line {number}", type(value).__name__, "an object")
                        value = {}
                except UnicodeDecodeError as error:
                    found = f"byte {error.object[error.start]:#04x} at {error.start}: {error.reason}"
                    self.error("encoding", name, f"line {number}", found, "UTF-8")
                except (ValueError, RecursionError) as error:
                    self.error("line", name, f"line {number}", f"not valid JSON: {error}", "an object")
                yield number, value

    # Indices

    def _clips(self) -> _Clips:
        clips = _Clips([], [], [])
        first: dict[str, int] = {}
        for number, value in self._lines("clips.jsonl"):
            clip, where = len(clips.names), f"line {number}"
            name, split, meta = value.get("name"), value.get("split"), value.get("meta")
            if value:
                if not isinstance(name, str) or not name:
                    self.error("clip name", "clips.jsonl", where, f"name {name!r}", "a name")
                elif name in first:
                    found = f"name {name!r} is that of clip {first[name]} too"
                    self.error("clip name", "clips.jsonl", where, found, "a name of its own")
                if split not in SPLITS:
                    found = f"clip {name!r}: split {split!r}"
                    self.error("split", "clips.jsonl", where, found, f"one of {', '.join(SPLITS)}")
                if not isinstance(meta, dict):
                    found = f"clip {name!r}: meta is {type(meta).__name__}"
                    self.error("line", "clips.jsonl", where, found, "an object")
            clips.names.append(name if isinstance(name, str) else "")
            clips.splits.append(split if split in SPLITS else "")
            clips.meta.append(meta if isinstance(meta, dict) else {})
            first.setdefault(clips.names[-1], clip)
        self.report.checked["clips"] = len(clips.names)
        return clips

    def _offsets(self) -> None:
        file = "clip_offsets.npy"
        offsets = self._array(self.folder, file, self.manifest, "i", 1)
        clips = len(self.clips.names)
        rows = 0 if self.features is None else len(self.features)
        if offsets is None:
            self.spans = [None] * clips
            return
        values = np.array(offsets, dtype=np.int64).tolist()
        if len(values) != clips + 1:
            self.error("offsets", file, "", f"{len(values)} values", f"{clips + 1} for {clips} clips")
        if values and values[0] != 0:
            self.error("offsets", file, "value 0", str(values[0]), "0")
        counts = self.manifest.get("counts")
        whole = counts.get("frames", rows) if isinstance(counts, dict) else rows
        if values and values[-1] != whole:
            self.error("offsets", file, f"value {len(values) - 1}", str(values[-1]), f"{whole} frames")
        for clip in range(clips):
            start, end = (values[clip], values[clip + 1]) if clip + 1 < len(values) else (0, 0)
            if clip + 1 < len(values) and not 0 <= start < end:
                found = f"goes from row {start} to {end}"
                self.error("offsets", file, self.clips.label(clip), found, "at least one row, rising")
            self.spans.append((start, end) if 0 <= start < end <= rows else None)

    def _items(self) -> None:
        file = "items.npy"
        table = self._array(self.folder, file, self.manifest, "i", 2)
        if table is not None and table.shape[1] != 3:
            self.error("shape", file, "", str(list(table.shape)), "3 columns: clip, start, end")
            table = None
        self.item_table = np.empty((0, 3), np.int64) if table is None else np.array(table, dtype=np.int64)
        self.report.checked["items"] = len(self.item_table)
        for item, (clip, start, end) in enumerate(self.item_table.tolist()):
            if not 0 <= clip < len(self.clips.names):
                self.error("item", file, f"item {item}", f"clip {clip}", f"0 to {len(self.clips.names) - 1}")
                continue
            span = self.spans[clip] if clip < len(self.spans) else None
            length = span[1] - span[0] if span else None
            if not 0 <= start < end or (length is not None and end > length):
                where = f"item {item} of {self.clips.label(clip)}"
                expected = "frames of the clip" if length is None else f"frames inside 0 to {length}"
                self.error("item", file, where, f"frames {start} to {end}", expected)
        used = set(self.item_table[:, 0].tolist())
        for clip in range(len(self.clips.names)):
            if table is not None and clip not in used:
                self.warn("unused clip", file, self.clips.label(clip), "no item", "an item of every clip")

    def _item_label(self, item: int) -> str:
        if 0 <= item < len(self.item_table):
            return f"item {item} of {self.clips.label(int(self.item_table[item, 0]))}"
        return f"item {item}"

    def _captions(self) -> None:
        file = "captions.jsonl"
        before, described = -1, set()
        self.texts: list[str] = []
        seen: set[str] = set()
        for number, value in self._lines(file):
            where = f"line {number}"
            text, item = value.get("text"), value.get("item")
            self.texts.append(text if isinstance(text, str) else "")
            if not value:
                continue
            if not isinstance(item, int) or isinstance(item, bool) or not 0 <= item < len(self.item_table):
                found = f"item {item!r}"
                self.error("caption", file, where, found, f"an index below {len(self.item_table)}")
            else:
                if not before <= item <= before + 1:
                    found = f"item {item} after {before}"
                    self.error("caption order", file, where, found, "the captions of every item, in order")
                if item != before:
                    seen = set()
                before = item
                described.add(item)
                where += f", {self._item_label(item)}"
            if not isinstance(text, str) or not text.strip():
                self.error("empty caption", file, where, repr(text), "a sentence")
                continue
            odd = [c for c in text if c == "\ufffd" or (ord(c) < 32 and c not in "\t\n") or ord(c) == 127]
            if odd:
                self.warn("encoding", file, where, f"{odd[0]!r} in {text[:60]!r}", "readable characters")
            elif _is_mojibake(text):
                self.warn("encoding", file, where, repr(text[:60]), "text that was decoded as UTF-8")
            if not inspect.words(text):
                self.warn("caption", file, where, f"no word in {text[:60]!r}", "a sentence")
            if text in seen:
                self.warn("duplicate caption", file, where, f"again {text[:60]!r}", "each sentence once")
            seen.add(text)
        for item in range(len(self.item_table)):
            if item not in described:
                self.error("caption", file, self._item_label(item), "no caption", "at least one")
        self.report.checked["captions"] = len(self.texts)

    def _counts(self) -> None:
        file = "manifest.json"
        frames = 0 if self.features is None else len(self.features)
        found = {
            "clips": len(self.clips.names),
            "items": len(self.item_table),
            "captions": len(self.texts),
            "frames": frames,
        }
        self.report.checked["frames"] = frames
        counts = self.manifest.get("counts")
        if self.manifest and not isinstance(counts, dict):
            self.error("manifest", file, "counts", repr(counts), "clips, items, captions and frames")
        elif isinstance(counts, dict):
            for name, value in found.items():
                if counts.get(name) != value:
                    self.error("count", file, f"counts.{name}", str(counts.get(name)), f"{value}, as found")
        in_split = Counter(self.clips.splits)
        splits = self.manifest.get("splits")
        for split in SPLITS:
            if not isinstance(splits, dict) or not isinstance(splits.get(split, {}), dict):
                continue
            said = splits.get(split, {}).get("clips", 0)
            if said != in_split[split]:
                self.error("count", file, f"splits.{split}.clips", str(said), f"{in_split[split]}, as found")
        width = None if self.features is None else self.features.shape[1]
        if self.manifest and width is not None and self.manifest.get("feature_dim") != width:
            found_width = str(self.manifest.get("feature_dim"))
            self.error("manifest", file, "feature_dim", found_width, f"{width}, as in features.npy")
        fps = self.manifest.get("fps")
        if self.manifest and not _is_positive(fps):
            self.error("manifest", file, "fps", repr(fps), "frames a second")
        self.fps = float(fps) if fps is not None and _is_positive(fps) else 20.0

    # Splits

    def _leaks_by_name(self) -> None:
        names = {name: clip for clip, name in enumerate(self.clips.names)}
        families: dict[str, list[int]] = defaultdict(list)
        takes: dict[str, list[int]] = defaultdict(list)
        for clip, (name, meta) in enumerate(zip(self.clips.names, self.clips.meta, strict=True)):
            if name:
                families[inspect.source_clip(name, meta, names)].append(clip)
                file = inspect.recording(meta)
                if file:
                    takes[file].append(clip)
        self._leaked = set()
        for source, clips in families.items():
            if self._spread(clips):
                self._leaked |= set(clips)
                expected = "a clip, its mirror and its variants in one split"
                self.error("leak", "clips.jsonl", source, self._spread(clips), expected)
        for file, clips in takes.items():
            if self._spread(clips):
                expected = "parts of one recording in one split (the official split straddles too)"
                self.warn("recording", "clips.jsonl", file, self._spread(clips), expected)

    def _spread(self, clips: Sequence[int]) -> str:
        """Which splits the clips lie in, by name; "" if it is one."""
        if len({self.clips.splits[clip] for clip in clips} - {""}) < 2:
            return ""
        parts = []
        for split in SPLITS:
            names = [self.clips.names[clip] for clip in clips if self.clips.splits[clip] == split]
            if names:
                more = f" and {len(names) - 4} more" if len(names) > 4 else ""
                parts.append(f"{', '.join(names[:4])}{more} in {split}")
        return "; ".join(parts)

    # Motions

    def _motions(self) -> None:
        from tqdm import tqdm

        if self.features is None:
            return
        width = self.features.shape[1]
        representation = Representation.find(width)
        if representation is None:
            self.report.notes.append(f"features of width {width} are of no known format: not recovered")
        provenance = self.manifest.get("provenance")
        variant = str(provenance.get("variant", "original")) if isinstance(provenance, dict) else "original"
        moments = Moments.empty(width)
        prints = np.full((len(self.spans), inspect.FINGERPRINT), np.nan, dtype=np.float32)
        self.crossings: list[int] = []
        upright: list[float] = []
        rows = sum(span[1] - span[0] for span in self.spans if span)
        with tqdm(
            total=rows, desc="motions", unit="frame", unit_scale=True, disable=not self.progress
        ) as bar:
            for clip, span in enumerate(self.spans):
                if span is None:
                    continue
                features = np.asarray(self.features[span[0] : span[1]])
                bar.update(len(features))
                with np.errstate(over="ignore", invalid="ignore"):
                    finite = bool(np.isfinite(features.sum(dtype=np.float64)))
                if not finite:
                    self._not_finite(clip, features)
                    continue
                if self.clips.splits[clip] == "train":
                    moments.add(features)
                if representation is None:
                    continue
                # Values beyond any body overflow on the way; what they make is named below.
                with np.errstate(over="ignore", invalid="ignore"):
                    joints = inspect.recovered(features, representation)
                if not np.isfinite(joints).all() or abs(joints).max() > 1e6:
                    found = f"joints as far as {abs(joints).max():.3g} m"
                    self.warn("joints", "features.npy", self.clips.label(clip), found, "the joints of a body")
                    continue
                prints[clip] = inspect.fingerprint(features, joints, representation)
                upright.append(inspect.head_above(joints, representation))
                off, crossing = inspect.step_errors(features, representation)
                if crossing.any():
                    self.crossings.append(clip)
                for severity, kind, found, expected in inspect.implausible(
                    features, joints, off, representation, self.fps, variant
                ):
                    self._note(severity, kind, "features.npy", self.clips.label(clip), found, expected)
        self._statistics(moments)
        self._up_axis(upright)
        self._leaks_by_content(prints)
        if self.crossings:
            self.report.notes.append(
                f"{len(self.crossings)} clips turn across ±180° of the format's heading, where its yaw step "
                f"changes sign and the recovered motion turns the wrong way (as the original's does): "
                f"{', '.join(self.clips.names[clip] for clip in self.crossings[:8])}"
                + (", …" if len(self.crossings) > 8 else "")
            )

    def _not_finite(self, clip: int, features: NDArray) -> None:
        bad = ~np.isfinite(features)
        frame, column = np.argwhere(bad)[0] if bad.any() else (0, 0)
        found = (
            f"{features[frame, column]} in frame {frame}, feature {column}, {int(bad.sum())} values in all"
        )
        self.error("not finite", "features.npy", self.clips.label(clip), found, "finite features")

    def _statistics(self, moments: Moments) -> None:
        file, stored = "manifest.json", self.manifest.get("statistics")
        if not self.manifest:
            return
        if not isinstance(stored, dict):
            self.error("statistics", file, "statistics", repr(stored), "mean and std")
            return
        own = {"mean": moments.mean}
        if moments.count:
            own["std"] = np.maximum(grouped_std(moments.std()), STD_FLOOR)
        given = stored.get("source") != "train"
        if not given and stored.get("frames") != moments.count:
            found, expected = str(stored.get("frames")), f"{moments.count} frames of train"
            self.error("statistics", file, "statistics.frames", found, expected)
        for name in ("mean", "std"):
            where, width = f"statistics.{name}", len(moments.mean)
            try:
                with np.errstate(over="ignore"):  # float32, as it is used
                    values = np.asarray(stored.get(name), dtype=np.float32).astype(np.float64)
            except (TypeError, ValueError, OverflowError):
                values = np.empty(0)
            if values.shape != (width,):
                self.error("statistics", file, where, f"shape {list(values.shape)}", f"{width} numbers")
                continue
            bad = ~np.isfinite(values) | ((values <= 0) if name == "std" else False)
            if bad.any():
                column = int(bad.argmax())
                expected = "a finite number" + (" above 0" if name == "std" else "")
                self.error("statistics", file, f"{where}[{column}]", str(values[column]), expected)
                continue
            self.statistics[name] = values
            if moments.count:
                off = abs(values - own[name]) / own["std"]
                column = int(off.argmax())
                found, expected = f"{values[column]:.6g}", f"{own[name][column]:.6g}, of the train split"
                if not given and off[column] > STATISTICS:
                    self.error("statistics", file, f"{where}[{column}]", found, expected)
                elif given and off[column] > 1:
                    self.warn(
                        "statistics", file, f"{where}[{column}]", f"{found} (given)", f"near {expected}"
                    )

    def _up_axis(self, upright: list[float]) -> None:
        if upright and np.median(upright) < inspect.HEAD_ABOVE_M:
            found = f"the head is {np.median(upright):.2f} m above the pelvis in the median clip"
            self.error("up axis", "features.npy", "", found, "bodies that mostly stand: Y up")

    def _leaks_by_content(self, prints: NDArray) -> None:
        frames = np.array([span[1] - span[0] if span else 0 for span in self.spans])
        known = set(self._leaked)
        moving = prints.copy()
        moving[inspect.movement(prints) < 2 * inspect.NEAR_M] = np.nan
        for note, chosen, within, expected in (
            (self.error, prints, inspect.SAME_M, "the same motion (or its mirror) in one split"),
            (self.warn, moving, inspect.NEAR_M, "motions that are alike (or mirrored) in one split"),
        ):
            for group in inspect.copies(chosen, frames, within=within, mirrored=True):
                spread = self._spread(group)
                if spread and not set(group) <= known:
                    known |= set(group)
                    note("leak", "features.npy", self.clips.label(group[0]), spread, expected)

    # Tokens and text states

    def _stores(self, kind: str) -> list[str]:
        folder = self.folder / kind
        if not folder.is_dir():
            return []
        return sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")

    def _store(self, folder: Path, format: str) -> dict[str, Any]:
        manifest = self._manifest(folder, format)
        self._files(folder, manifest)
        expected = self.folder / "manifest.json"
        if manifest and expected.is_file() and manifest.get("dataset_sha256") != storage.sha256_of(expected):
            file = self._relative(folder / "manifest.json")
            self.error(
                "other dataset", file, "", "was made for another dataset or an older state", "this one"
            )
        return manifest

    def _divided(
        self, folder: Path, manifest: dict[str, Any], count: int | None, rows: int
    ) -> NDArray | None:
        """Offsets (n + 1,) that divide the rows of an array, None where they do not."""
        offsets = self._array(folder, "offsets.npy", manifest, "i", 1)
        if offsets is None:
            return None
        file = self._relative(folder / "offsets.npy")
        values = np.array(offsets, dtype=np.int64)
        sound = True
        if count is not None and len(values) != count + 1:
            self.error("offsets", file, "", f"{len(values)} values", f"{count + 1}")
            sound = False
        if not len(values) or values[0] != 0 or values[-1] != rows:
            ends = f"{values[0]} to {values[-1]}" if len(values) else "nothing"
            self.error("offsets", file, "", f"goes from {ends}", f"0 to {rows} rows")
            sound = False
        for index in np.flatnonzero(np.diff(values) < 0).tolist():
            found = f"falls from {values[index]} to {values[index + 1]}"
            self.error("offsets", file, f"value {index + 1}", found, "rising values")
            sound = False
        return values if sound else None

    def _tokens(self, folder: Path) -> None:
        manifest = self._store(folder, TOKENS_FORMAT)
        file = self._relative(folder / "tokens.npy")
        tokens = self._array(folder, "tokens.npy", manifest, "i", 1)
        if tokens is None:
            return
        offsets = self._divided(folder, manifest, len(self.item_table), len(tokens))
        codes, downsampling = manifest.get("codes"), manifest.get("downsampling")
        if not (isinstance(codes, int) and isinstance(downsampling, int)) or not (
            _is_positive(codes) and _is_positive(downsampling)
        ):
            if manifest:
                where = self._relative(folder / "manifest.json")
                self.error("manifest", where, "", f"codes {codes!r}, {downsampling!r} frames", "two counts")
            return
        values = np.asarray(tokens)
        bad = np.flatnonzero((values < 0) | (values >= codes))
        if offsets is None:
            if len(bad):
                found = f"{values[bad[0]]} at {bad[0]}, {len(bad)} in all"
                self.error("token", file, "", found, f"0 to {codes - 1}")
        else:
            for item, first, count in _owners(offsets, bad):
                found = f"token {values[first]}, {count} in all"
                self.error("token", file, self._item_label(item), found, f"0 to {codes - 1}")
            lengths = np.diff(offsets)
            wanted = (self.item_table[:, 2] - self.item_table[:, 1]) // downsampling
            for item in np.flatnonzero(lengths != wanted).tolist():
                note = self.error if lengths[item] > wanted[item] else self.warn
                found = f"{lengths[item]} tokens"
                expected = f"{wanted[item]} of {downsampling} frames"
                note("token length", file, self._item_label(item), found, expected)
        self._tokenizer(folder, manifest)

    def _tokenizer(self, folder: Path, manifest: dict[str, Any]) -> None:
        """The statistics of the tokenizer must be those of the dataset: its tokens mean nothing otherwise."""
        made_by = manifest.get("tokenizer")
        wanted = made_by.get("weights_sha256") if isinstance(made_by, dict) else None
        if not isinstance(made_by, dict) or not wanted:
            self.report.notes.append(f"{self._relative(folder)}: does not say which tokenizer made it")
            return
        beside = self.folder.absolute().parent / str(made_by.get("folder", ""))
        for candidate in (*self.tokenizers, beside):
            weights = candidate / "model.safetensors"
            if weights.is_file() and storage.sha256_of(weights) == wanted:
                break
        else:
            self.report.notes.append(
                f"{self._relative(folder)}: its tokenizer {made_by.get('folder')!r} was not found: "
                "statistics not compared"
            )
            return
        if len(self.statistics) < 2:  # an error already
            return
        from safetensors import safe_open

        file = self._relative(folder / "manifest.json")
        with safe_open(str(weights), framework="numpy") as tensors:
            for name in sorted({"mean", "std"} & set(tensors.keys())):
                own = np.asarray(tensors.get_tensor(name), dtype=np.float64)
                stored, scale = self.statistics[name], self.statistics["std"]
                if own.shape != stored.shape:
                    found = f"the tokenizer's {name} has {own.size} values"
                    self.error("tokenizer", file, str(candidate), found, f"{stored.size} of the dataset")
                elif (abs(own - stored) / scale).max() > STATISTICS:
                    column = int((abs(own - stored) / scale).argmax())
                    found = f"its {name}[{column}] is {own[column]:.6g}"
                    expected = f"{stored[column]:.6g}, the dataset's"
                    self.error("tokenizer", file, str(candidate), found, expected)

    def _text(self, folder: Path) -> None:
        manifest = self._store(folder, TEXT_FORMAT)
        states = self._array(folder, "states.npy", manifest, "f", 2)
        index = self._array(folder, "index.npy", manifest, "i", 1)
        offsets = None if states is None else self._divided(folder, manifest, None, len(states))
        if states is not None:
            for start in range(0, len(states), _STATES_CHUNK):
                chunk = np.asarray(states[start : start + _STATES_CHUNK])
                bad = start + np.flatnonzero(~np.isfinite(chunk).all(1))
                file = self._relative(folder / "states.npy")
                if offsets is None and len(bad):
                    self.error(
                        "not finite", file, f"row {bad[0]}", f"{len(bad)} rows not finite", "finite states"
                    )
                for text, row, count in _owners(offsets, bad) if offsets is not None else ():
                    found = f"{count} states not finite"
                    self.error("not finite", file, f"text {text}, row {row}", found, "finite states")
        if index is None:
            return
        file = self._relative(folder / "index.npy")
        which = np.array(index, dtype=np.int64)
        if len(which) != len(self.texts):
            self.error("text index", file, "", f"{len(which)} values", f"{len(self.texts)}, one a caption")
        if offsets is None:
            return
        details = manifest.get("details")
        longest = details.get("max_tokens") if isinstance(details, dict) else None
        longest = longest if isinstance(longest, int) and _is_positive(longest) else None
        lengths = np.diff(offsets)
        for text in np.flatnonzero((lengths < 1) | (lengths > (longest or np.inf))).tolist():
            where = self._relative(folder / "offsets.npy")
            expected = f"1 to {longest}" if longest else "at least 1"
            self.error("text length", where, f"text {text}", f"{lengths[text]} states", expected)
        for caption in np.flatnonzero((which < 0) | (which >= len(lengths))).tolist():
            found = f"text {which[caption]}"
            self.error("text index", file, f"caption {caption}", found, f"0 to {len(lengths) - 1}")
        # Rows belong to one text: else captions and states were shuffled against one another.
        owners: dict[int, int] = {}
        for caption, (sentence, row) in enumerate(zip(self.texts, which.tolist(), strict=False)):
            first = owners.setdefault(row, caption)
            if self.texts[first] != sentence and 0 <= row < len(lengths):
                where = f"caption {caption} ({sentence[:40]!r})"
                found = f"has the states of caption {first}, {self.texts[first][:40]!r}"
                self.error("text index", file, where, found, "its own states")
        if self.encoders:
            self._pieces(folder, manifest, owners, lengths, longest)

    def _pieces(
        self,
        folder: Path,
        manifest: dict[str, Any],
        owners: dict[int, int],
        lengths: NDArray,
        longest: int | None,
    ) -> None:
        """Count the word pieces again with the encoder itself."""
        from scamo.data.text import MAX_TOKENS, TextEncoder

        rows = [row for row in owners if 0 <= row < len(lengths) and self.texts[owners[row]].strip()]
        try:
            encoder = TextEncoder.load(str(manifest.get("encoder", "")), max_tokens=longest or MAX_TOKENS)
            counts = encoder.piece_counts([self.texts[owners[row]] for row in rows])
        except ScaMoError as error:
            self.report.notes.append(f"{self._relative(folder)}: word pieces not counted again: {error}")
            return
        file = self._relative(folder / "offsets.npy")
        for row, count in zip(rows, counts.tolist(), strict=True):
            if lengths[row] != count:
                where = f"text {row} ({self.texts[owners[row]][:40]!r})"
                self.error("text length", file, where, f"{lengths[row]} states", f"{count}, its word pieces")


def _owners(offsets: NDArray, rows: NDArray) -> Iterator[tuple[int, int, int]]:
    """Which entries rows (ascending) belong to, the first row of each, and how many."""
    owner = np.searchsorted(offsets, rows, side="right") - 1
    entries, first, counts = np.unique(owner, return_index=True, return_counts=True)
    yield from zip(entries.tolist(), rows[first].tolist(), counts.tolist(), strict=True)


def _is_positive(value: Any) -> bool:
    """A number of JSON that can count something."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 2**31


def _is_mojibake(text: str) -> bool:
    """Whether the text is UTF-8 that was read as Windows-1252: "cafÃ©"."""
    if text.isascii():
        return False
    try:
        return text.encode("cp1252").decode("utf-8") != text
    except UnicodeError:
        return False
