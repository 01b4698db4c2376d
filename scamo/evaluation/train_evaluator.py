"""Training of our own evaluator: a symmetric contrastive loss; validation chooses the step."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from scamo.config import EvaluatorRunConfig, EvaluatorTrainingConfig, to_dict
from scamo.data.dataset import MotionDataset, TextStore
from scamo.device import resolve_device
from scamo.errors import ScaMoError
from scamo.evaluation.contrastive import DOWNSAMPLING, ContrastiveEvaluator, ContrastiveNetwork, pad
from scamo.evaluation.items import draw_strict, item_frames, source_clips, strict_turns
from scamo.evaluation.metrics import expected_r_precision

POOL = 32
LEAST_POOL = 4  # below, R@3 says nothing


class Pairs:
    """Items of one or more datasets with their captions; batch `step` is a function of (seed, step) alone.

    Raises ScaMoError when the datasets do not go together, lack text states or have no item to train on.
    """

    def __init__(self, datasets: Sequence[MotionDataset], text: str, config: EvaluatorTrainingConfig) -> None:
        self.datasets, self.config = list(datasets), config
        self.texts: list[TextStore] = [dataset.text_states(text) for dataset in datasets]
        first, text_first = self.datasets[0], self.texts[0]
        for dataset, store in zip(self.datasets[1:], self.texts[1:], strict=True):
            for what, found, expected in (
                ("features a frame", dataset.feature_dim, first.feature_dim),
                ("variant of the features", dataset.variant, first.variant),
                ("fps", dataset.fps, first.fps),
                ("text encoder", store.encoder, text_first.encoder),
                ("text width", store.width, text_first.width),
            ):
                if found != expected:
                    raise ScaMoError(f"{dataset.folder}: {what} {found}, {first.folder} has {expected}")
        rows = [
            (index, int(item))
            for index, dataset in enumerate(self.datasets)
            for item in dataset.items("train")
            if dataset.item_lengths[item] >= DOWNSAMPLING
        ]
        if len(rows) < 2:
            names = ", ".join(str(dataset.folder) for dataset in self.datasets)
            raise ScaMoError(f"{names}: {len(rows)} items in the train split, expected at least 2")
        self.rows = np.array(rows, dtype=np.int64)
        self.batch_size = min(config.batch_size, len(rows))

    def batch(self, step: int) -> tuple[list[NDArray], list[NDArray]]:
        """Raw features (T, C), cropped, and states (P, E), with pieces left out, of a step's pairs."""
        config = self.config
        rng = np.random.default_rng((config.seed, step))
        motions, states = [], []
        for row in rng.choice(len(self.rows), self.batch_size, replace=False):
            index, item = self.rows[row]
            dataset, store = self.datasets[index], self.texts[index]
            features = dataset.item_features(int(item))
            length = int(rng.integers(max(DOWNSAMPLING, int(config.crop * len(features))), len(features) + 1))
            first = int(rng.integers(len(features) - length + 1))
            motions.append(features[first : first + length])
            captions = dataset.captions_of(int(item))
            pieces = store[int(captions[rng.integers(len(captions))])]
            kept = rng.random(len(pieces)) >= config.drop_pieces
            states.append(pieces[kept] if kept.any() else pieces)
        return motions, states


def contrastive_loss(motion: Tensor, text: Tensor, scale: Tensor, same: Tensor) -> Tensor:
    """Symmetric cross-entropy of each pair among a batch; motion, text (B, D) of length 1.

    same: bool (B, B), pairs of captions that say the same and so are no negatives; its diagonal is ignored.
    """
    logits = scale * motion @ text.T
    other = same & ~torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    logits = logits.masked_fill(other, -torch.inf)
    target = torch.arange(len(logits), device=logits.device)
    return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))


def same_texts(states: Tensor, pieces: Tensor, threshold: float) -> Tensor:
    """bool (B, B): pairs of texts whose mean states (B, P, E), less their common mean, have a larger cosine.

    Without the common part: an encoder that was not made for comparing sentences gives all of them states of
    nearly one direction, and a batch would have no negatives left.
    """
    mean = states.sum(1) / pieces[:, None]
    unit = F.normalize(mean - mean.mean(0), dim=-1)
    return unit @ unit.T > threshold


def train_evaluator(
    config: EvaluatorRunConfig,
    datasets: Sequence[str | Path],
    out: str | Path,
    *,
    text: str = "",
    device: str = "auto",
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Fit an evaluator to the train splits of one or more datasets and write it to OUT.

    Kept are the weights with the best R-precision (mean of top 1, 2 and 3 over random pools) on the val split
    of the first dataset; those of the last step where there is none. The test split is not read.

    Args:
        config: the networks and the recipe.
        datasets: dataset folders with text states; features are normalised by the first one's statistics.
        out: the evaluator folder to write.
        text: name of the text states inside the datasets; "" means the only ones.
        device: auto, cpu or cuda.
        overwrite: replace an existing evaluator.
        progress: show a bar and print each validation.

    Returns:
        loss, step (the one kept) and, with a val split, r_precision (3 shares), chance and items.

    Raises:
        ScaMoError: a dataset does not open, fit or have text states; OUT exists; the loss is not finite.
    """
    out = Path(out)
    if out.exists() and not overwrite:
        raise ScaMoError(f"{out} exists: choose another name, or ask for it to be overwritten")
    if not datasets:
        raise ScaMoError("no dataset to train on")
    training, where = config.training, resolve_device(device)
    opened = [MotionDataset.open(folder) for folder in datasets]
    pairs = Pairs(opened, text, training)
    first, store = opened[0], pairs.texts[0]
    network_config = config.evaluator
    for key, found in (("feature_dim", first.feature_dim), ("text_width", store.width)):
        if getattr(network_config, key) not in (0, found):
            raise ScaMoError(
                f"evaluator.{key} = {getattr(network_config, key)}: {first.folder} has {found}; leave it out"
            )
    network_config = replace(
        network_config,
        feature_dim=first.feature_dim,
        text_width=store.width,
        variant=first.variant,
        max_frames=network_config.max_frames or (item_frames(first)[1] - 1) // DOWNSAMPLING * DOWNSAMPLING,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        network = ContrastiveNetwork(network_config, first.mean, first.std).to(where)
        report = _fit(network, pairs, training, first, progress)
    caption = int(first.captions_of(int(first.items("train")[0]))[0])
    provenance = {
        "training": to_dict(training),
        "datasets": [
            {"name": dataset.folder.name, "manifest_sha256": dataset.manifest_sha256} for dataset in opened
        ],
        "items": len(pairs.rows),
        "validation": report,
        "torch": torch.__version__,
    }
    ContrastiveEvaluator(
        network,
        name=out.name,
        fps=first.fps,
        text_encoder=store.encoder,
        probe=(first.caption(caption), store[caption].astype(np.float32).mean(axis=0).tolist()),
        provenance=provenance,
    ).save(out, overwrite=overwrite)
    return report


def _fit(
    network: ContrastiveNetwork,
    pairs: Pairs,
    training: EvaluatorTrainingConfig,
    dataset: MotionDataset,
    progress: bool,
) -> dict[str, Any]:
    """Train `network` in place and leave it with the best weights; see `train_evaluator` for the report."""
    device = network.mean.device
    generator = torch.Generator(device=device).manual_seed(training.seed)
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay
    )
    best: dict[str, Any] = {}
    kept = None
    with tqdm(total=training.steps, desc="evaluator", unit="step", disable=not progress) as bar:
        for step in range(training.steps):
            network.train()
            motions, states = pairs.batch(step)
            features, frames = pad(motions, DOWNSAMPLING)
            pieces_states, pieces = pad(states)
            features = (features.to(device) - network.mean) / network.std
            features += training.noise * torch.randn(features.shape, generator=generator, device=device)
            pieces_states, pieces = pieces_states.to(device), pieces.to(device)
            loss = contrastive_loss(
                network.motion(features, frames.to(device)),
                network.text(pieces_states, pieces),
                network.log_scale.exp().clamp(max=100),
                same_texts(pieces_states, pieces, training.same_text),
            )
            if not torch.isfinite(loss):
                raise ScaMoError(
                    f"the evaluator's loss is not finite at step {step}: lower the learning rate"
                )
            optimizer.zero_grad()
            loss.backward()
            if training.clip_norm > 0:
                torch.nn.utils.clip_grad_norm_(network.parameters(), training.clip_norm)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(training, step)
            optimizer.step()
            bar.update()
            if (step + 1) % training.validate_every and step + 1 < training.steps:
                continue
            report = {"step": step + 1, "loss": float(loss.detach())} | _validate(
                network, dataset, pairs.texts[0]
            )
            bar.set_postfix(loss=f"{report['loss']:.3f}", R3=f"{report.get('r_precision', [0] * 3)[2]:.1%}")
            if not best or _score(report) >= _score(best):
                best, kept = report, copy.deepcopy(network.state_dict())
    if kept is not None:
        network.load_state_dict(kept)
    return best


def _score(report: dict[str, Any]) -> float:
    return float(np.mean(report["r_precision"])) if "r_precision" in report else float(report["step"])


def _validate(network: ContrastiveNetwork, dataset: MotionDataset, store: TextStore) -> dict[str, Any]:
    """R-precision on the val split, averaged over all pools; smaller pools where there are fewer clips."""
    items = dataset.items("val")
    items = items[dataset.item_lengths[items] >= DOWNSAMPLING]
    clips = source_clips(dataset, items)
    pool = min(POOL, len(set(clips.tolist())))
    if pool < LEAST_POOL:
        return {}
    evaluator = ContrastiveEvaluator(
        network, name="in training", fps=dataset.fps, text_encoder="", probe=("", ())
    )
    motions = evaluator.embed_motions(draw_strict(dataset, items, 0).features(dataset))
    hits = []
    for turn in range(strict_turns(dataset, items)):
        captions = draw_strict(dataset, items, turn).captions
        texts = evaluator.embed_states([store[int(caption)] for caption in captions])
        hits.append(expected_r_precision(texts, motions, groups=clips, top_k=3, pool=pool).mean(axis=0))
    return {
        "r_precision": [float(value) for value in np.mean(hits, axis=0)],
        "chance": [k / pool for k in (1, 2, 3)],
        "items": len(items),
    }


def learning_rate(config: EvaluatorTrainingConfig, step: int) -> float:
    """Linear warm-up, then a cosine down to 0."""
    warmup = round(config.warmup_ratio * config.steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    return (
        config.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, config.steps - warmup)))
    )
