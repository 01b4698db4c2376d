"""Guo et al.'s published evaluator (CVPR 2022) -> an evaluator folder that `scamo evaluate` reads.

Below the folder that the authors publish, for HumanML3D "t2m" and for KIT-ML "kit":

    text_mot_match/model/finest.tar     the weights
    Comp_v6_*/meta/mean.npy, std.npy    the evaluator's own statistics
    glove/our_vab_*                     the word vectors; published apart

The statistics are not a dataset's Mean.npy and Std.npy: the deviations of features 0:4 and of the four
contacts are divided by 25 (a "feature bias" of 5, applied twice).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from scamo.data.storage import sha256_of
from scamo.errors import ScaMoError
from scamo.evaluation.guo import CONTACTS, GuoEvaluator, Sizes, check_statistics
from scamo.evaluation.word_vectors import GLOVE_FILES, WordVectors
from scamo.importers.checkpoint import provenance, read_checkpoint, tensors_under

CHECKPOINT = "finest.tar"
NETWORKS = ("movement_encoder", "text_encoder", "motion_encoder")
FEATURE_BIAS = 25.0


def import_t2m_evaluator(
    source: str | Path,
    out: str | Path,
    *,
    mean: str | Path | None = None,
    std: str | Path | None = None,
    glove: str | Path | None = None,
    overwrite: bool = False,
) -> Path:
    """Read the published files and write the evaluator folder `out`; returns it.

    source: a folder with the files anywhere below it, or finest.tar itself with the others given. mean and
    std (both or neither) and glove, the folder with the word vectors, override what lies there.

    Raises:
        ScaMoError: a file is missing, or there are several of it (they are named); the checkpoint lacks a
            network or a weight, or one has another shape; the statistics are of another length, not finite,
            not positive, or a dataset's own instead of the evaluator's; `out` exists.
    """
    source, out = Path(source), Path(out)
    if (mean is None) != (std is None):
        raise ScaMoError("mean and std go together: give both or neither")
    if not source.exists():
        raise ScaMoError(f"{source}: no such file or folder")
    if source.is_file():
        checkpoint, folder = source, None
    else:
        checkpoint, folder = _find_checkpoint(source), source
    if mean is None or std is None:
        mean, std = _find_statistics(folder, checkpoint)
    glove = _find_glove(folder, checkpoint) if glove is None else Path(glove)
    mean, std = Path(mean), Path(std)

    content = read_checkpoint(checkpoint)
    state = {
        f"{network}.{name}": weight
        for network in NETWORKS
        for name, weight in tensors_under(content, network, checkpoint).items()
    }
    size = Sizes.of(state, str(checkpoint)).feature_dim
    mean_values = check_statistics(_read_array(mean), size, str(mean), positive=False)
    std_values = check_statistics(_read_array(std), size, str(std), positive=True)
    _check_bias(mean_values, std_values, std)
    source_files = [checkpoint, mean, std, *(glove / name for name in GLOVE_FILES)]
    evaluator = GuoEvaluator.from_parts(
        state,
        mean_values,
        std_values,
        WordVectors.from_glove(glove),
        where=str(checkpoint),
        provenance=provenance("scamo.importers.t2m_evaluator", *source_files)
        | ({"epoch": content["epoch"]} if isinstance(content.get("epoch"), int) else {}),
    )
    evaluator.save(out, overwrite=overwrite)
    return out


def _read_array(path: Path) -> NDArray:
    try:
        array = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise ScaMoError(f"{path}: no such file") from None
    except (OSError, ValueError, EOFError) as error:
        raise ScaMoError(f"{path}: not a readable .npy array: {str(error).splitlines()[0]}") from None
    if not np.issubdtype(array.dtype, np.floating):
        raise ScaMoError(f"{path}: {array.dtype}, expected floats")
    return array


def _check_bias(mean: NDArray[np.float64], std: NDArray[np.float64], path: Path) -> None:
    """Contacts are 0 or 1, so their mean p says their deviation, sqrt(p (1 - p)): the bias can be read off.

    It is 25.0 in the published files and 0.99 to 1.0 in Mean.npy and Std.npy of HumanML3D and KIT-ML.
    """
    share = mean[-CONTACTS:]
    if not ((share > 0) & (share < 1)).all():
        return  # not contacts: nothing can be said
    bias = float(np.sqrt(share * (1 - share)).mean() / std[-CONTACTS:].mean())
    if bias < FEATURE_BIAS**0.5:
        raise ScaMoError(
            f"{path}: a dataset's own deviations: those of the contacts are divided by {bias:.2g}, the "
            f"evaluator's by {FEATURE_BIAS:g}; take mean.npy and std.npy of Comp_v6_*/meta"
        )


def _find_checkpoint(folder: Path) -> Path:
    found = sorted(folder.rglob(CHECKPOINT))
    # Other models of the authors are called finest.tar, too.
    preferred = [path for path in found if "text_mot_match" in path.parts]
    return _only(preferred or found, f"{CHECKPOINT} (the weights)", folder, "give the file itself")


def _find_statistics(folder: Path | None, checkpoint: Path) -> tuple[Path, Path]:
    advice = "give mean and std"
    if folder is None:
        raise ScaMoError(f"{checkpoint} is a file: {advice}, or the folder that they lie in")
    pairs = sorted(path.parent for path in folder.rglob("mean.npy") if path.with_name("std.npy").is_file())
    preferred = [path for path in pairs if path.parent.name.startswith("Comp_v6")] or pairs
    # The authors keep the same statistics beside each of their models.
    distinct = {(sha256_of(path / "mean.npy"), sha256_of(path / "std.npy")): path for path in preferred[::-1]}
    meta = _only(sorted(distinct.values()), "mean.npy with a std.npy beside it", folder, advice)
    return meta / "mean.npy", meta / "std.npy"


def _find_glove(folder: Path | None, checkpoint: Path) -> Path:
    advice = "give the folder with the word vectors"
    if folder is None:
        raise ScaMoError(f"{checkpoint} is a file: {advice}")
    found = sorted(path.parent for path in folder.rglob(GLOVE_FILES[0]))
    return _only(found, f"{GLOVE_FILES[0]} (the word vectors)", folder, advice)


def _only(found: list[Path], what: str, folder: Path, advice: str) -> Path:
    if not found:
        raise ScaMoError(f"{folder}: no {what} below it: {advice}")
    if len(found) > 1:
        listed = ", ".join(map(str, found[:5])) + (", ..." if len(found) > 5 else "")
        raise ScaMoError(f"{folder}: {len(found)} times {what}: {listed}; {advice}")
    return found[0]
