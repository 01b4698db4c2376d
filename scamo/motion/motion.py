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
from scamo.motion.features import FEATURE_DIM, features_to_joints
from scamo.motion.files import replacing
from scamo.motion.skeleton import JOINT_NAMES, N_JOINTS

SUFFIXES = (".npz", ".npy", ".gif", ".mp4", ".png", ".html")
_TOGETHER = (".html", ".png")  # formats that hold several motions


@dataclass
class Motion:
    """A motion of the 22-joint body.

    joints: (T, 22, 3) float32 metres, Y up, T >= 1. fps: frames a second. text: what it was generated from or
    is described by. features: (T, 263) float32 or None. tokens: (n,) int32 or None. meta: what JSON holds.
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
        if len(shape) != 3 or shape[1:] != (N_JOINTS, 3) or shape[0] < 1:
            raise ScaMoError(f"joints: expected shape (frames, {N_JOINTS}, 3), got {shape}")
        bad = np.argwhere(~np.isfinite(self.joints))
        if len(bad):
            frame, joint, _ = (int(i) for i in bad[0])
            raise ScaMoError(f"joints: frame {frame}, joint {joint} ({JOINT_NAMES[joint]}) is not finite")
        self.fps = float(self.fps)
        if not np.isfinite(self.fps) or self.fps <= 0:
            raise ScaMoError(f"fps: expected a positive number, got {self.fps}")
        if self.features is not None:
            self.features = np.asarray(self.features, dtype=np.float32)
            if self.features.shape != (len(self), FEATURE_DIM):
                raise ScaMoError(
                    f"features: expected shape ({len(self)}, {FEATURE_DIM}), as many frames as the joints, "
                    f"got {self.features.shape}"
                )
        if self.tokens is not None:
            self.tokens = np.asarray(self.tokens, dtype=np.int32)
            if self.tokens.ndim != 1:
                raise ScaMoError(f"tokens: expected one row of integers, got shape {self.tokens.shape}")

    @classmethod
    def from_features(cls, features: np.ndarray, **fields: Any) -> Motion:
        """The motion of (T, 263) features; `fields` are the other fields of Motion."""
        features = np.asarray(features, dtype=np.float32)
        return cls(features_to_joints(features), features=features, **fields)

    def __len__(self) -> int:
        return len(self.joints)

    @property
    def duration(self) -> float:
        """Seconds."""
        return len(self) / self.fps

    def save(self, path: str | Path) -> None:
        """Write what the suffix says: .npz everything, .npy the joints, .gif .mp4 .png .html pictures.

        The file is written under another name and then renamed. Raises ScaMoError for an unknown suffix.
        """
        path = Path(path)
        suffix = check_suffix(path)
        if suffix in (".npz", ".npy"):
            # A file object: given a name, NumPy appends its own suffix to "m.NPY".
            with replacing(path) as partial, partial.open("wb") as stream:
                if suffix == ".npy":
                    np.save(stream, self.joints)
                else:
                    np.savez_compressed(stream, **self._arrays())
            return
        from scamo.motion.render import save_gif, save_html, save_mp4, save_png

        writers: dict[str, Callable[..., None]] = {
            ".gif": save_gif,
            ".mp4": save_mp4,
            ".png": save_png,
            ".html": save_html,
        }
        writers[suffix](self, path)

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
        """Read a .npz as `save` writes it (joints or features suffice), or a .npy of joints or features.

        A .npy tells no frame rate: 20 fps is taken. Raises ScaMoError naming the file and what is wrong.
        """
        path = Path(path)
        if path.suffix.lower() not in (".npz", ".npy"):
            raise ScaMoError(f"{path}: expected a .npz or .npy file, got suffix {path.suffix!r}")
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
                "fps": float(arrays.get("fps", 20.0)),
                "text": str(arrays["text"]) if "text" in arrays else None,
                "tokens": arrays.get("tokens"),
                "meta": json.loads(str(arrays["meta"])) if "meta" in arrays else {},
            }
            if "joints" in arrays:
                return cls(arrays["joints"], features=arrays.get("features"), **fields)
            return cls.from_features(arrays["features"], **fields)
        except (ValueError, TypeError) as error:
            raise ScaMoError(f"{path}: {error}") from error


def check_suffix(path: str | Path) -> str:
    """The lower-case suffix of a motion file; ScaMoError listing the known ones if it is none of them."""
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise ScaMoError(f"{path}: unknown suffix {suffix!r}, expected one of {', '.join(SUFFIXES)}")
    return suffix


def save_motions(motions: Motion | Sequence[Motion], out: str | Path) -> list[Path]:
    """Write motions and return the files: .html and .png hold them all, other formats get OUT-0, OUT-1, ...

    One motion is written to `out` itself. Raises ScaMoError for an unknown suffix or no motion.
    """
    motions = [motions] if isinstance(motions, Motion) else list(motions)
    out = Path(out)
    suffix = check_suffix(out)
    if not motions:
        raise ScaMoError(f"{out}: there is no motion to write")
    if len(motions) == 1:
        motions[0].save(out)
        return [out]
    if suffix in _TOGETHER:
        from scamo.motion.render import grid_png, save_html

        if suffix == ".html":
            save_html(motions, out)
        else:
            grid_png([(motion.text or "", motion) for motion in motions], out)
        return [out]
    width = len(str(len(motions) - 1))
    paths = [out.with_name(f"{out.stem}-{i:0{width}}{out.suffix}") for i in range(len(motions))]
    for motion, path in zip(motions, paths, strict=True):
        motion.save(path)
    return paths
