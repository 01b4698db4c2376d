"""One motion, its files and its pictures."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from scamo.errors import ScaMoError
from scamo.motion.body import Body, known_counts
from scamo.motion.files import replacing
from scamo.motion.representation import Representation

SUFFIXES = (".npz", ".npy", ".csv", ".bvh", ".glb", ".gif", ".mp4", ".png", ".html")
_READABLE = (".npz", ".npy", ".bvh")
_TOGETHER = (".html", ".png")  # formats that hold several motions


@dataclass
class Motion:
    """A motion of a known body: the 22 joints of SMPL, or those of another representation.

    joints: (T, J, 3) float32 metres, Y up, T >= 1. fps: frames a second. text: what it was generated from or
    is described by. features: (T, C) float32 of a representation of this body, or None. tokens: (n,) int32 or
    None. meta: what JSON holds.
    Raises ScaMoError for another shape, a value that is not finite (with frame and joint) or a bad fps.
    """

    joints: np.ndarray
    fps: float = 20.0
    text: str | None = None
    features: np.ndarray | None = None
    tokens: np.ndarray | None = None
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.joints = np.asarray(self.joints, dtype=np.float32)
        shape = self.joints.shape
        if len(shape) != 3 or shape[2] != 3 or shape[0] < 1:
            raise ScaMoError(f"joints: expected shape (frames, {known_counts()}, 3), got {shape}")
        body = self.body
        bad = np.argwhere(~np.isfinite(self.joints))
        if len(bad):
            frame, joint, _ = (int(i) for i in bad[0])
            raise ScaMoError(f"joints: frame {frame}, joint {joint} ({body.names[joint]}) is not finite")
        self.fps = float(self.fps)
        if not np.isfinite(self.fps) or self.fps <= 0:
            raise ScaMoError(f"fps: expected a positive number, got {self.fps}")
        if self.features is not None:
            self.features = np.asarray(self.features, dtype=np.float32)
            found = self.features.shape
            if len(found) != 2 or found[0] != len(self):
                expected = f"({len(self)}, features), as many frames as the joints"
                raise ScaMoError(f"features: expected shape {expected}, got {found}")
            bad = np.argwhere(~np.isfinite(self.features))
            if len(bad):
                raise ScaMoError(f"features: frame {bad[0][0]}, feature {bad[0][1]} is not finite")
            representation = Representation.of(found[1])
            if representation.n_joints != len(body):
                of = f"{found[1]} are of {representation.n_joints} joints"
                raise ScaMoError(f"features: {of}, the motion has {len(body)}")
        if self.tokens is not None:
            self.tokens = np.asarray(self.tokens, dtype=np.int32)
            if self.tokens.ndim != 1:
                raise ScaMoError(f"tokens: expected one row of integers, got shape {self.tokens.shape}")

    @classmethod
    def from_features(cls, features: np.ndarray, **fields: Any) -> Motion:
        """The motion of features (T, C) of a known representation, at its frame rate where no fps is given.

        fields: the other fields of Motion. Raises ScaMoError for another shape or number of features.
        """
        features = np.asarray(features, dtype=np.float32)
        if features.ndim != 2:
            raise ScaMoError(f"features: expected shape (frames, features), got {features.shape}")
        representation = Representation.of(features.shape[-1])
        fields = {"fps": representation.fps, **fields}
        return cls(representation.to_joints(features), features=features, **fields)

    @property
    def body(self) -> Body:
        """Names, tree and the rest of these joints. Raises ScaMoError for a body that is not known."""
        return Body.of(self.joints.shape[1])

    def __len__(self) -> int:
        return len(self.joints)

    @property
    def duration(self) -> float:
        """Seconds."""
        return len(self) / self.fps

    def save(self, path: str | Path, **options: Any) -> None:
        """Write what the suffix says.

        .npz everything, .npy the joints, .csv the joints as a table (a row a frame), .bvh and .glb a skeleton
        with rotations, fitted where the features hold none (`save_bvh`, `save_glb`), .gif .mp4 .png .html
        pictures.
        options: those of the format's function, such as scale=100 for a .bvh in centimetres.
        The file is written under another name and then renamed. Raises ScaMoError for an unknown suffix.
        """
        path = Path(path)
        _writer(check_suffix(path))(self, path, **options)

    def cleaned(
        self, *, foot_lock: bool = True, smooth: float | None = None, constant_bones: bool = False
    ) -> Motion:
        """A new motion: feet that do not slide, smoothed below `smooth` Hz, constant bones; see `clean`."""
        from scamo.motion.clean import clean

        return clean(self, foot_lock=foot_lock, smooth=smooth, constant_bones=constant_bones)

    def _arrays(self) -> dict[str, Any]:
        try:
            meta = json.dumps(self.meta)
        except TypeError as error:
            raise ScaMoError(f"meta: {error}; expected only what JSON can hold") from error
        arrays = {"joints": self.joints, "fps": np.float64(self.fps), "meta": np.array(meta)}
        if self.text is not None:
            arrays["text"] = np.array(self.text)
        if self.features is not None:
            arrays["features"] = self.features
        if self.tokens is not None:
            arrays["tokens"] = self.tokens
        return arrays

    @classmethod
    def load(cls, path: str | Path) -> Motion:
        """Read a .npz or .bvh as `save` writes it, or a .npy of joints or features.

        In a .npz joints or features suffice. A .npy tells no frame rate: that of the features' format is
        taken, and of joints 20 fps. A .bvh is taken to be in metres (`load_bvh` has a scale). Raises
        ScaMoError naming the file and what is wrong.
        """
        path = Path(path)
        suffix = path.suffix.lower()
        if suffix not in _READABLE:
            raise ScaMoError(
                f"{path}: cannot read suffix {path.suffix!r}, expected one of {', '.join(_READABLE)}"
            )
        if suffix == ".bvh":
            from scamo.motion.bvh import load_bvh

            return load_bvh(path)
        try:
            loaded = np.load(path, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                arrays = {"features" if loaded.ndim == 2 else "joints": loaded}
            else:
                with loaded:
                    arrays = {name: loaded[name] for name in loaded.files}
        except FileNotFoundError as error:
            raise ScaMoError(f"{path}: no such file") from error
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ScaMoError(f"{path}: not a readable NumPy file: {error}") from error
        if "joints" not in arrays and "features" not in arrays:
            raise ScaMoError(f"{path}: holds {sorted(arrays)}, expected 'joints' or 'features'")
        try:
            fields: dict[str, Any] = {
                "text": str(arrays["text"]) if "text" in arrays else None,
                "tokens": arrays.get("tokens"),
                "meta": json.loads(str(arrays["meta"])) if "meta" in arrays else {},
            }
            if "fps" in arrays:
                fields["fps"] = float(arrays["fps"])
            if "joints" in arrays:
                return cls(arrays["joints"], features=arrays.get("features"), **fields)
            return cls.from_features(arrays["features"], **fields)
        except (ValueError, TypeError) as error:
            raise ScaMoError(f"{path}: {error}") from error


def _save_npz(motion: Motion, path: Path) -> None:
    # A file object: given a name, NumPy appends its own suffix to "m.NPY".
    with replacing(path) as partial, partial.open("wb") as stream:
        np.savez_compressed(stream, **motion._arrays())


def _save_npy(motion: Motion, path: Path) -> None:
    with replacing(path) as partial, partial.open("wb") as stream:
        np.save(stream, motion.joints)


def _save_csv(motion: Motion, path: Path) -> None:
    names = ["time_s", *(f"{joint}_{axis}_m" for joint in motion.body.names for axis in "xyz")]
    times = np.arange(len(motion)) / motion.fps
    table = np.column_stack([times, motion.joints.reshape(len(motion), -1)])
    with replacing(path) as partial:
        np.savetxt(partial, table, fmt="%.6f", delimiter=",", header=",".join(names), comments="")


def _writer(suffix: str) -> Callable[..., None]:
    if suffix in (".gif", ".mp4", ".png", ".html"):
        from scamo.motion import render

        return getattr(render, f"save_{suffix[1:]}")
    if suffix == ".bvh":
        from scamo.motion.bvh import save_bvh

        return save_bvh
    if suffix == ".glb":
        from scamo.motion.gltf import save_glb

        return save_glb
    return {".npz": _save_npz, ".npy": _save_npy, ".csv": _save_csv}[suffix]


def check_suffix(path: str | Path) -> str:
    """The lower-case suffix of a motion file; ScaMoError listing the known ones if it is none of them."""
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise ScaMoError(f"{path}: unknown suffix {suffix!r}, expected one of {', '.join(SUFFIXES)}")
    return suffix


def save_motions(motions: Motion | Sequence[Motion], out: str | Path, **options: Any) -> list[Path]:
    """Write motions and return the files: .html and .png hold them all, other formats get OUT-0, OUT-1, ...

    One motion is written to `out` itself. options: those of the format's function, as for `Motion.save`.
    Raises ScaMoError for an unknown suffix or no motion.
    """
    motions = [motions] if isinstance(motions, Motion) else list(motions)
    out = Path(out)
    suffix = check_suffix(out)
    if not motions:
        raise ScaMoError(f"{out}: there is no motion to write")
    if len(motions) == 1:
        motions[0].save(out, **options)
        return [out]
    if suffix in _TOGETHER:
        from scamo.motion.render import grid_png, save_html

        if suffix == ".html":
            save_html(motions, out, **options)
        else:
            grid_png([(motion.text or "", motion) for motion in motions], out, **options)
        return [out]
    width = len(str(len(motions) - 1))
    paths = [out.with_name(f"{out.stem}-{i:0{width}}{out.suffix}") for i in range(len(motions))]
    for motion, path in zip(motions, paths, strict=True):
        motion.save(path, **options)
    return paths
