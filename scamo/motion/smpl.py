"""Joints of the SMPL family's bodies (SMPL, SMPL+H, SMPL-X) by forward kinematics, without skinning.

A joint is a fixed mean of the vertices of the body at rest, so the mesh is reduced to joints once, for the
template and for each shape direction; a pose then needs no vertex. The first 22 joints of all three models
are the 22 of `scamo.motion.skeleton`.

The models' licence forbids passing them on: the file is the user's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.spatial.transform import Rotation

from scamo.errors import ScaMoError
from scamo.motion.skeleton import N_JOINTS, PARENTS, forward_kinematics

_FIELDS = ("v_template", "J_regressor", "shapedirs", "kintree_table")
_WHERE = (
    "SMPL+H is at https://mano.is.tue.mpg.de after registration: 'Extended SMPL+H model', male/model.npz and "
    "female/model.npz"
)
_CONVERT = (
    "a pickle can run code when it is read. Take the .npz edition, or convert a file that you trust: read it "
    "with pickle.load(file, encoding='latin1') and np.savez('model.npz', v_template=..., "
    "J_regressor=d['J_regressor'].toarray(), shapedirs=np.array(d['shapedirs']), kintree_table=...)"
)


def read_arrays(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Those of the named arrays that a .npz has. Nothing is unpickled.

    Raises FileNotFoundError, and ScaMoError saying why a file cannot be read.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in names if name in file.files}
    except FileNotFoundError:
        raise
    except Exception as error:  # damaged bytes make NumPy, zipfile and tokenize raise nearly anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ScaMoError(f"{path}: cannot be read: {reason}") from None


class Posed(NamedTuple):
    """joints (T, 22, 3) metres; rotations (T, 22, 3, 3) relative to the parent joint. Both float64."""

    joints: np.ndarray
    rotations: np.ndarray


@dataclass(frozen=True)
class SmplBody:
    """template (22, 3): the mean shape's joints at rest, metres. shapes (22, 3, B): what each beta adds."""

    template: np.ndarray
    shapes: np.ndarray

    @classmethod
    def load(cls, path: str | Path) -> SmplBody:
        """Read v_template, J_regressor, shapedirs and kintree_table of a model's .npz; nothing is unpickled.

        Raises ScaMoError naming the file for a missing or pickled one, and for the wrong fields or shapes.
        """
        path = Path(path)
        if path.suffix.lower() in (".pkl", ".pickle"):
            raise ScaMoError(f"{path}: expected a .npz: {_CONVERT}")
        try:
            fields = read_arrays(path, _FIELDS)
        except FileNotFoundError:
            raise ScaMoError(f"{path}: no such file. {_WHERE}") from None
        except ScaMoError as error:
            raise ScaMoError(
                f"{error}: {_CONVERT}" if "pickle" in str(error).lower() else str(error)
            ) from None
        missing = [name for name in _FIELDS if name not in fields]
        if missing:
            raise ScaMoError(f"{path}: lacks {', '.join(missing)}: not a model of the SMPL family")
        return cls._reduced(str(path), **fields)

    @classmethod
    def from_smplx(cls, body: Any) -> SmplBody:
        """Of a body model that the optional package `smplx` has loaded, such as smplx.create(...).

        That package reads pickles: only give it files that you trust. Raises ScaMoError for something else.
        """
        try:
            fields = {
                name: np.asarray(getattr(body, name).detach().cpu().numpy(), dtype=np.float64)
                for name in ("v_template", "J_regressor", "shapedirs")
            }
            parents = np.asarray(body.parents.tolist())
        except AttributeError as error:
            raise ScaMoError(f"body: expected a body model of smplx: {error}") from None
        return cls._reduced("body", **fields, kintree_table=np.stack([parents, np.arange(len(parents))]))

    @classmethod
    def _reduced(
        cls,
        name: str,
        *,
        v_template: np.ndarray,
        J_regressor: np.ndarray,
        shapedirs: np.ndarray,
        kintree_table: np.ndarray,
    ) -> SmplBody:
        vertices = len(v_template)
        wanted = {
            "v_template": v_template.shape == (vertices, 3) and vertices > 0,
            "J_regressor": J_regressor.shape[1:] == (vertices,) and len(J_regressor) >= N_JOINTS,
            "shapedirs": shapedirs.ndim == 3 and shapedirs.shape[:2] == (vertices, 3),
            "kintree_table": kintree_table.ndim == 2 and kintree_table.shape[1] >= N_JOINTS,
        }
        shapes = {"v_template": v_template, "J_regressor": J_regressor, "shapedirs": shapedirs}
        shapes["kintree_table"] = kintree_table
        for field, good in wanted.items():
            if not good:
                raise ScaMoError(f"{name}: {field} has shape {list(shapes[field].shape)}, not a body model's")
        parents = kintree_table[0, 1:N_JOINTS].astype(np.int64).tolist()
        if parents != list(PARENTS[1:]):
            raise ScaMoError(
                f"{name}: kintree_table begins with the parents {parents}, not those of the SMPL body"
            )
        regressor = np.asarray(J_regressor[:N_JOINTS], dtype=np.float64)
        template = regressor @ v_template
        joint_shapes = np.einsum("jv,vib->jib", regressor, np.asarray(shapedirs, dtype=np.float64))
        if not (np.isfinite(template).all() and np.isfinite(joint_shapes).all()):
            raise ScaMoError(f"{name}: holds values that are not finite")
        return cls(template, joint_shapes)

    def rest(self, betas: np.ndarray | None = None) -> np.ndarray:
        """Joints (22, 3) float64 metres at rest, of a shape (B,); None: the mean one.

        More betas than the model has directions, or values that are not finite, raise ScaMoError.
        """
        betas = np.zeros(0) if betas is None else np.asarray(betas, dtype=np.float64)
        known = self.shapes.shape[-1]
        if betas.ndim != 1 or len(betas) > known or not np.isfinite(betas).all():
            raise ScaMoError(f"betas: shape {betas.shape}, expected at most {known} finite values")
        return self.template + self.shapes[..., : len(betas)] @ betas

    def pose(
        self, poses: np.ndarray, betas: np.ndarray | None = None, trans: np.ndarray | None = None
    ) -> Posed:
        """The 22 joints of poses, in the axes of the file (AMASS: Z up).

        poses: (T, 3 K) or (T, K, 3) axis-angle, radians, relative to the parent joint, K >= 22 (52 in SMPL+H:
        hands and face move none of the 22 joints). betas: (B,). trans: (T, 3) metres, None: none.
        Raises ScaMoError naming the frame for NaN or infinity, and for another shape.
        """
        poses = np.asarray(poses, dtype=np.float64)
        frames = len(poses)
        numbers = int(np.prod(poses.shape[1:]))
        if poses.ndim not in (2, 3) or not frames or numbers < 3 * N_JOINTS or numbers % 3:
            raise ScaMoError(f"poses: expected shape (frames, 3 x at least {N_JOINTS}), got {poses.shape}")
        flat = poses.reshape(frames, -1)[:, : 3 * N_JOINTS]
        root = np.zeros((frames, 3)) if trans is None else np.asarray(trans, dtype=np.float64)
        if root.shape != (frames, 3):
            raise ScaMoError(f"trans: expected shape ({frames}, 3), got {root.shape}")
        for name, values in (("poses", flat), ("trans", root)):
            bad = ~np.isfinite(values).all(-1)
            if bad.any():
                raise ScaMoError(f"{name}: frame {int(bad.argmax())} is not finite")
        rest = self.rest(betas)
        offsets = rest.copy()
        offsets[1:] -= rest[list(PARENTS[1:])]
        rotations = Rotation.from_rotvec(flat.reshape(-1, 3)).as_matrix().reshape(frames, N_JOINTS, 3, 3)
        return Posed(forward_kinematics(rotations, offsets, root + rest[0]), rotations)
