"""How well a tokenizer reconstructs motion, and how much of its codebook it uses (paper section 4.1)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scamo_kernels import code_histogram
from torch import Tensor
from tqdm import tqdm

from scamo.device import resolve_device
from scamo.errors import ScaMoError
from scamo.motion.measures import acceleration_error, mpjpe, root_error, velocity_error
from scamo.motion.representation import Representation
from scamo.tokenizers import load_tokenizer
from scamo.tokenizers.autoencoder import MotionAutoencoder
from scamo.tokenizers.encode import (
    BATCH_FRAMES,
    ItemFeatures,
    encode_batch,
    length_groups,
    open_matching,
)

# A codebook has collapsed when its exponential entropy is below this share of what it could be. The paper's
# healthy FSQ codebooks stand at 0.53 to 0.87 of their size, its collapsed VQ ones at 0.04 and below.
COLLAPSE_SHARE = 0.05


def codebook_statistics(counts: Tensor) -> dict[str, Any]:
    """What the counts (K,) of a codebook's codes say: tokens, utilisation, exp_entropy, collapsed.

    Counts (Q, K) of the indices of a token give `per_index`, a list of these four for each; tokens is then
    their sum, utilisation and exp_entropy their means, and collapsed is true when one of them is.

    utilisation: share of the codes that occur. exp_entropy: exp(-sum p log p), as many codes as an even use
    would need. collapsed: exp_entropy below COLLAPSE_SHARE of min(K, tokens), which is the most it can be.
    Raises ScaMoError when nothing was counted.
    """
    if counts.dim() > 1:
        parts = [codebook_statistics(part) for part in counts]
        means = {key: sum(part[key] for part in parts) / len(parts) for key in ("utilisation", "exp_entropy")}
        collapsed = any(part["collapsed"] for part in parts)
        return {"tokens": int(counts.sum())} | means | {"collapsed": collapsed, "per_index": parts}
    total = int(counts.sum())
    if total == 0:
        raise ScaMoError("no tokens to count")
    p = counts[counts > 0].double() / total
    entropy = math.exp(float(-(p * p.log()).sum()))
    return {
        "tokens": total,
        "utilisation": int((counts > 0).sum()) / counts.numel(),
        "exp_entropy": entropy,
        "collapsed": entropy < COLLAPSE_SHARE * min(counts.numel(), total),
    }


def reconstruction_metrics(
    tokenizer: MotionAutoencoder,
    motions: Sequence[NDArray[np.float32]],
    lengths: Sequence[int] | NDArray,
    *,
    fps: float,
    batch_frames: int = BATCH_FRAMES,
    progress: bool = False,
) -> dict[str, Any]:
    """Encode and decode motions, each as if alone, and compare. Averages are over frames (and joints).

    motions: raw features (T, C), of which the frames past a whole token are cut; lengths: their T.
    Returns `codebook_statistics` and
        motions, frames, too_short: how many were compared, and how many were shorter than a token.
        l1: mean absolute error of the normalised features.
        mpjpe_mm: distance of the joints after moving both pelves to the origin in each frame.
        root_mm: distance of the pelves; it grows along a motion, as the root is integrated from velocities.
        velocity_mm_s, acceleration_mm_s2: distance of the joints' velocities and accelerations.
    The joint measures are there for features of a known representation. Raises ScaMoError when nothing is
    long enough.
    """
    device = tokenizer.mean.device
    representation = Representation.find(tokenizer.config.feature_dim)
    several = tokenizer.config.indices_per_token
    counts = torch.zeros(several, tokenizer.codes, dtype=torch.int64, device=device)
    sums: dict[str, float] = defaultdict(float)
    frames = steps = bends = compared = 0
    total = int((np.asarray(lengths) // tokenizer.downsampling).sum())
    with (
        torch.inference_mode(),
        tqdm(total=total, desc="tokens", unit="tok", unit_scale=True, disable=not progress) as bar,
    ):
        for batch in length_groups(lengths, tokenizer.downsampling, batch_frames):
            features, indices = encode_batch(tokenizer, motions, batch)
            decoded = tokenizer.decode(indices)
            for count, stream in zip(counts, indices.view(-1, several).unbind(-1), strict=True):
                count += code_histogram(stream, tokenizer.codes)
            size, length, width = features.shape
            compared, frames = compared + size, frames + size * length
            sums["l1"] += float(((decoded - features) / tokenizer.std).abs().double().sum()) / width
            if representation is not None:
                true, made = (representation.to_joints(one.double()) for one in (features, decoded))
                now, step, bend = (size * max(length - n, 0) for n in range(3))
                steps, bends = steps + step, bends + bend
                sums["mpjpe_mm"] += now * mpjpe(made, true)
                sums["root_mm"] += now * root_error(made, true)
                sums["velocity_mm_s"] += step * velocity_error(made, true, fps)
                sums["acceleration_mm_s2"] += bend * acceleration_error(made, true, fps)
            bar.update(indices.shape[0] * indices.shape[1])
    if compared == 0:
        raise ScaMoError(
            f"none of the {len(lengths)} motions has {tokenizer.downsampling} frames, which one token needs"
        )
    report: dict[str, Any] = {
        "motions": compared,
        "frames": frames,
        "too_short": len(lengths) - compared,
        "l1": sums["l1"] / frames,
    }
    if representation is not None:
        report |= {
            "mpjpe_mm": sums["mpjpe_mm"] / frames,
            "root_mm": sums["root_mm"] / frames,
            "velocity_mm_s": sums["velocity_mm_s"] / max(steps, 1),
            "acceleration_mm_s2": sums["acceleration_mm_s2"] / max(bends, 1),
        }
    return report | codebook_statistics(counts if several > 1 else counts[0])


def evaluate_tokenizer(
    folder: str | Path,
    dataset_folder: str | Path,
    *,
    split: str = "val",
    device: str = "auto",
    progress: bool = True,
) -> dict[str, Any]:
    """Reconstruction and codebook use of a trained tokenizer on a split of a dataset.

    Args:
        folder: the tokenizer.
        dataset_folder: the dataset.
        split: train, val or test; every item of it is compared.
        device: auto, cpu or cuda.
        progress: show a bar.

    Returns:
        `reconstruction_metrics` and split, codes (K), indices_per_token (Q), tokens_per_second (indices per
        second of motion), bits_per_second (tokens_per_second log2 K).

    Raises:
        ScaMoError: a folder that does not open or fit, an unknown or empty split.
    """
    tokenizer = load_tokenizer(folder, resolve_device(device))
    dataset = open_matching(tokenizer, dataset_folder)
    motions = ItemFeatures(dataset, dataset.items(split))
    if not len(motions):
        raise ScaMoError(f"{dataset.folder}: the split {split} is empty")
    metrics = reconstruction_metrics(tokenizer, motions, motions.lengths, fps=dataset.fps, progress=progress)
    rate, config = dataset.fps / tokenizer.downsampling, tokenizer.config
    head = {
        "split": split,
        "codes": tokenizer.codes,
        "indices_per_token": config.indices_per_token,
        "tokens_per_second": rate * config.indices_per_token,
        "bits_per_second": rate * config.bits_per_token,
    }
    return head | metrics
