"""What folders of motions and captions have in common: split lists, caption files, arrays, skeletons.

What is wrong with one clip is a Refusal, which the caller counts; what is wrong with the whole a ScaMoError.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from scamo.data.dataset import SPLITS, Caption, DatasetWriter
from scamo.errors import ScaMoError
from scamo.motion.features import joints_to_features
from scamo.motion.skeleton import N_JOINTS, swap_sides


class Refusal(Exception):
    """Why a clip is left out."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


def read_text(path: Path) -> str:
    """A UTF-8 file; ScaMoError that names the byte which is none."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ScaMoError(f"{path}: is not UTF-8: {error.reason} at byte {error.start}") from None


def load_array(path: Path) -> NDArray:
    """A .npy; Refusal where it is missing or unreadable."""
    try:
        return np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise Refusal("motion file missing", path.name) from None
    except Exception as error:  # damaged bytes make NumPy raise nearly anything, tokenize.TokenError too
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        detail = f"{path.parent.name}/{path.name}: {reason}"
        raise Refusal("motion file unreadable", detail) from None


def read_offsets(path: Path) -> NDArray[np.float64]:
    """A skeleton (22, 3) in metres; ScaMoError for any other file."""
    try:
        offsets = np.load(path, allow_pickle=False)
    except Exception as error:  # as above
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ScaMoError(f"{path}: cannot be read: {reason}") from None
    array = isinstance(offsets, np.ndarray)  # a .npz is none
    if (
        not array
        or offsets.shape != (N_JOINTS, 3)
        or offsets.dtype.kind != "f"
        or not np.isfinite(offsets).all()
    ):
        found = f"{offsets.dtype} {list(offsets.shape)}" if array else "several arrays"
        raise ScaMoError(f"{path}: {found}, expected ({N_JOINTS}, 3) finite metres")
    return offsets.astype(np.float64)


def uniform_features(joints: NDArray, offsets: NDArray[np.float64] | None) -> NDArray[np.float32]:
    """The 263 features of joints, with the bones of `offsets` where given; Refusal if there are none."""
    try:
        return joints_to_features(joints, target_offsets=offsets)
    except ScaMoError as error:
        raise Refusal("features cannot be computed", str(error)) from None


def read_captions(source: Path, name: str, split: str, writer: DatasetWriter) -> list[Caption]:
    """Those of texts/NAME.txt, bad lines refused one by one; Refusal where none is left."""
    path = source / "texts" / f"{name}.txt"
    swap = False
    if not path.is_file() and name.startswith("M"):
        swap, path = True, source / "texts" / f"{name[1:]}.txt"
    if not path.is_file():
        raise Refusal("caption file missing", f"texts/{name}.txt")
    captions = caption_file(path, f"texts/{path.name}", name, split, writer)
    if not swap:
        return captions
    return [
        replace(
            caption,
            text=swap_sides(caption.text),
            meta={key: swap_sides(value) for key, value in caption.meta.items()},
        )
        for caption in captions
    ]


def caption_file(path: Path, label: str, name: str, split: str, writer: DatasetWriter) -> list[Caption]:
    """A caption a line, as `parse_caption` has it; bad lines of clip `name` are refused one by one.

    label: what reports call the file. Refusal where it cannot be read or no line is left.
    """
    try:
        text = read_text(path)
    except (OSError, ScaMoError) as error:
        raise Refusal("caption file unreadable", str(error)) from None
    captions = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        where = f"{label} line {number}"
        try:
            caption, nan = parse_caption(line)
        except ScaMoError as error:
            detail = f"{where}: {error}"
            writer.refuse(name, "malformed caption line", split=split, kind="caption", detail=detail)
            continue
        if nan:
            writer.note(name, "nan time tags read as 0", split=split, detail=where)
        captions.append(caption)
    if not captions:
        raise Refusal("caption file without captions", label)
    return captions


def check_texts(folder: Path) -> None:
    """ScaMoError where a folder has no texts/."""
    if not (folder / "texts").is_dir():
        raise ScaMoError(f"{folder / 'texts'}: no such folder; expected captions as texts/NAME.txt")


def split_lists(folder: Path) -> Iterator[tuple[str, str, str]]:
    """(split, name, file and line) of train.txt, val.txt, test.txt; ScaMoError where train.txt is missing."""
    for split in SPLITS:
        path = folder / f"{split}.txt"
        if not path.is_file():
            if split == "train":
                raise ScaMoError(
                    f"{path}: no such file; expected the names of the training clips, one a line"
                )
            continue
        for number, line in enumerate(read_text(path).splitlines(), 1):
            if line.strip():
                yield split, line.strip(), f"{path.name} line {number}"


def parse_caption(line: str) -> tuple[Caption, bool]:
    """A line of a caption file, `caption#word/POS ...#from#to` in seconds, or a caption alone.

    Returns the caption, its tagged words in meta["tokens"], and whether a tag was nan (which counts as 0).
    Raises ScaMoError saying what is wrong with the line.
    """
    if "#" not in line:
        return Caption(line.strip()), False
    parts = line.strip().split("#")
    if len(parts) != 4:
        raise ScaMoError(f"{len(parts)} parts between #, expected 4")
    text, tokens, *tags = parts
    try:
        start, end = (float(tag) for tag in tags)
    except ValueError:
        raise ScaMoError(f"time tags {tags[0]!r} and {tags[1]!r} are not numbers") from None
    nan = math.isnan(start) or math.isnan(end)
    start, end = (0.0 if math.isnan(tag) else tag for tag in (start, end))
    return Caption(text.strip(), start, end, {"tokens": tokens.strip()}), nan
