"""Motion-X's SMPL-X poses as a dataset of 263 features.

motion_data/smplx_322/SUBSET/**/NAME.npy     (T, 322): root orientation 3, body pose 63, hands 90, jaw 3,
                                             expression 50, face shape 100, translation 3, betas 10
texts/semantic_labels/SUBSET/**/NAME.txt     a caption a line
train.txt val.txt test.txt                   SUBSET/**/NAME, one a line, here or in split/; without any, every
                                             file is a clip

The 22 joints are those of the user's SMPL-X model by forward kinematics without skinning; hands and face move
none of them. A clip's name is its path below smplx_322/. Folders of Motion-X that hold 263 features already
(vector_263/) are `prepare_humanml3d`'s.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from scamo.data.dataset import Clips, DatasetWriter, MotionDataset
from scamo.data.prepare.arrays import PROBED_CLIPS, joints_body
from scamo.data.prepare.layout import (
    Refusal,
    add_body,
    checked_limits,
    checked_split,
    clips_of,
    common_up,
    load_array,
    mirrored_name,
    read_captions,
    read_offsets,
    unmirrored,
)
from scamo.data.prepare.work import write_dataset
from scamo.errors import ScaMoError
from scamo.motion.hierarchy import LARGEST
from scamo.motion.joint_maps import check_up
from scamo.motion.representation import HUMANML3D
from scamo.motion.smpl import SmplBody

MOTIONS = "motion_data/smplx_322"
TEXTS = "texts/semantic_labels"
FPS = 30.0
# Everybody makes these from the mocap sets by Motion-X's scripts; some versions of them write 20 frames a
# second (seen for humanml and GRAB), while the set as a whole is said to have 30.
MADE_BY_THE_USER = ("humanml", "GRAB", "EgoBody")
DIM = 322
POSES, TRANS, BETAS = slice(0, 66), slice(309, 312), slice(312, 322)


@dataclass(frozen=True)
class _Clip:
    name: str
    split: str
    fps: float
    up: str


def prepare_motionx(
    source: str | Path,
    out: str | Path,
    *,
    model: str | Path,
    fps: float | None = None,
    mocap_fps: float | None = None,
    up: str | None = None,
    mirror: bool = False,
    split: Sequence[float] = (0.8, 0.05, 0.15),
    target_offsets: str | Path | None = None,
    min_frames: int | None = None,
    max_frames: int | None = None,
    long: Literal["cut", "refuse"] = "cut",
    strict: bool = False,
    license: str = "",
    overwrite: bool = False,
    workers: int = 1,
    progress: bool = True,
) -> MotionDataset:
    """Read Motion-X's folder and write it as 263 features.

    The model gives every clip the bones of the mean of its betas, over which the published ones do not vary.

    Args:
        source: the folder, with motion_data/ and texts/.
        out: the dataset folder.
        model: SMPLX_NEUTRAL.npz, or another SMPL-X model's .npz, for everybody.
        fps: frames a second of the dataset. None: 20.
        mocap_fps: of the subsets humanml, GRAB and EgoBody, which Motion-X's scripts make: what yours wrote.
            The other subsets have 30.
        up: x, y, z, -x, -y or -z. None: in every subset the axis along which most of some clips' bodies
            stand.
        mirror: add a mirrored copy, "M" before its name's last part, of every clip that the folder has none
            of.
        split: parts of train, val and test where the folder has no split lists. What comes from one recording
            by its name stays together, and where it goes is a function of that name alone.
        target_offsets: (22, 3) .npy of the uniform skeleton, whose bone lengths all clips take.
        min_frames, max_frames, long, strict, license, overwrite, workers, progress: as for `prepare_arrays`.

    Raises:
        ScaMoError: the folder lacks its poses or captions, the model or target_offsets cannot be read, an
            argument is wrong or mocap_fps missing, or nothing was kept; with `strict` also for what is
            refused otherwise.
    """
    source = Path(source)
    for folder in (MOTIONS, TEXTS):
        if not (source / folder).is_dir():
            raise ScaMoError(f"{source / folder}: no such folder; expected Motion-X's {MOTIONS} and {TEXTS}")
    parts = checked_split(split)
    clips = clips_of(source, MOTIONS, parts)
    names = [name for _, name in clips if (source / MOTIONS / f"{name}.npy").is_file()]
    body = SmplBody.load(model)
    if long not in ("cut", "refuse"):
        raise ScaMoError(f"long = {long!r}, expected cut or refuse")
    for option, value in (("fps", fps), ("mocap_fps", mocap_fps)):
        if value is not None and not 0 < value < math.inf:
            raise ScaMoError(f"{option} = {value}: expected a positive number")
    if body.shapes.shape[-1] < BETAS.stop - BETAS.start:
        raise ScaMoError(f"{model}: has {body.shapes.shape[-1]} shape directions, expected 10 or more")
    rate = HUMANML3D.fps if fps is None else fps
    min_frames, max_frames = checked_limits(HUMANML3D, rate, min_frames, max_frames)
    up = None if up is None else check_up(up)
    offsets = None if target_offsets is None else read_offsets(Path(target_offsets))
    ups = {} if up is not None else _ups(source, body, names)
    known = set(names)
    # Of what is listed and not there neither matters.
    pieces = [
        _Clip(
            name, where, _fps_of(name, mocap_fps) if name in known else FPS, up or ups.get(_subset(name), "y")
        )
        for where, name in clips
    ]
    maker = _Maker(source, body, rate, offsets, mirror, known, long == "cut", max_frames)
    provenance = {
        "source": "motionx",
        **({"license": license} if license else {}),
        "folder": source.resolve().name,
        "skeleton": "kept" if offsets is None else "given",
        "mocap_fps": mocap_fps,
        "up": up or ups,
        "mirror": mirror,
        "split": list(parts),
        "min_frames": min_frames,
        "max_frames": max_frames,
        "long": long,
    }
    writer = DatasetWriter(
        out,
        feature_dim=HUMANML3D.feature_dim,
        fps=rate,
        provenance=provenance,
        overwrite=overwrite,
        min_frames=min_frames,
        max_frames=max_frames,
        strict=strict,
        resume={
            "source": str(source.resolve()),
            "model": hashlib.sha256(pickle.dumps(body)).hexdigest(),
            "target_offsets": None if offsets is None else offsets.tolist(),
        },
    )
    return write_dataset(
        writer,
        pieces,
        maker.make,
        maker.files,
        workers=workers,
        progress=progress,
    )


@dataclass
class _Maker:
    """What a clip's features depend on beside the clip."""

    source: Path
    body: SmplBody
    fps: float
    offsets: NDArray[np.float64] | None
    mirror: bool
    names: set[str]
    cut: bool
    max_frames: int

    def files(self, clip: _Clip) -> Iterator[Path]:
        yield self.source / MOTIONS / f"{clip.name}.npy"
        for name in filter(None, (clip.name, unmirrored(clip.name))):
            yield self.source / TEXTS / f"{name}.txt"

    def make(self, clip: _Clip, out: Clips) -> None:
        name, file = clip.name, f"{MOTIONS}/{clip.name}.npy"
        try:
            captions = read_captions(self.source, name, clip.split, out, TEXTS)
            joints = _joints(self.body, load_array(self.source / file))
            body = joints_body(joints, clip.fps, {"fps": self.fps, "units": 1.0, "up": clip.up})
            meta = {"file": file, "source_fps": clip.fps}
            add_body(
                out,
                name,
                clip.split,
                body,
                captions,
                meta,
                self.max_frames,
                self.cut,
                self.offsets,
                self.mirror and not unmirrored(name) and mirrored_name(name) not in self.names,
            )
        except Refusal as refusal:
            out.refuse(name, refusal.reason, split=clip.split, detail=f"{file}: {refusal.detail}")


def _joints(body: SmplBody, motion: NDArray) -> NDArray[np.float64]:
    """The joints (T, 22, 3) of a motion (T, 322), in its axes; Refusal for any other array."""
    if not isinstance(motion, np.ndarray):
        raise Refusal("wrong shape", "several arrays, expected one")
    if motion.ndim != 2 or motion.shape[1] != DIM or motion.dtype.kind != "f":
        raise Refusal("wrong shape", f"{motion.dtype} {list(motion.shape)}, expected float [frames, {DIM}]")
    if len(motion) < 2:
        raise Refusal("too short", f"{len(motion)} frames, expected at least 2")
    used = np.concatenate([motion[:, part] for part in (POSES, TRANS, BETAS)], axis=1).astype(np.float64)
    bad = ~(np.abs(used) < LARGEST)  # a comparison with NaN is false
    if bad.any():
        raise Refusal("NaN or infinite poses", f"frame {int(bad.any(1).argmax())}")
    betas = motion[:, BETAS].astype(np.float64).mean(0)
    return body.pose(motion[:, POSES], betas, motion[:, TRANS]).joints


def _subset(name: str) -> str:
    return name.split("/")[0]


def _ups(source: Path, body: SmplBody, names: list[str]) -> dict[str, str]:
    """The up axis of every subset; Y of one without a readable clip."""
    subsets: dict[str, list[str]] = {}
    for name in names:
        subsets.setdefault(_subset(name), []).append(name)
    found = {}
    for subset, members in subsets.items():
        clips = []
        for name in members[:: max(1, len(members) // PROBED_CLIPS)]:
            with contextlib.suppress(Refusal):
                clips.append(_joints(body, load_array(source / MOTIONS / f"{name}.npy")))
        try:
            found[subset] = common_up(clips) if clips else "y"
        except ScaMoError as error:
            raise ScaMoError(f"{source / MOTIONS / subset}: {error}") from None
    return found


def _fps_of(name: str, mocap_fps: float | None) -> float:
    if _subset(name) not in MADE_BY_THE_USER:
        return FPS
    if mocap_fps is None:
        raise ScaMoError(
            f"mocap_fps: the subset {_subset(name)} was made by Motion-X's scripts, of which some write 20 "
            "frames a second and some 30; say which it has"
        )
    return mocap_fps
