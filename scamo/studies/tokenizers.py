"""`scamo study tokenizers`: a grid of tokenizers through one trainer, measured on clips that none has seen.

The paper's RQ1. `tokenizer_report` judges its claims from the results and draws its Fig. 6.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scamo_kernels import code_histogram

from scamo.config import (
    TokenizerConfig,
    TokenizerRunConfig,
    TokenizerTrainingConfig,
    from_dict,
    load_config,
    to_dict,
)
from scamo.data.dataset import MotionDataset
from scamo.device import resolve_device
from scamo.errors import ScaMoError
from scamo.evaluation.evaluator import load_evaluator
from scamo.evaluation.reconstruction import reconstruction_fid
from scamo.studies.cells import Cell, Study, read_json, write_json
from scamo.studies.tokenizer_report import FAMILIES, report_tokenizer_study
from scamo.tokenizers import load_tokenizer
from scamo.tokenizers.encode import ItemFeatures, encode_motions
from scamo.tokenizers.evaluate import codebook_statistics, evaluate_tokenizer, reconstruction_metrics
from scamo.tokenizers.train import check_recipe, train_tokenizer

# What a cell says of the quantiser; [tokenizer], which all cells share, may not.
QUANTISER = ("quantizer", "codebook_size", "levels", "groups", "residual")


@dataclass(frozen=True)
class TokenizerCell:
    """A quantiser of the grid, and its changes to [training]. `codebook_size`, or for "fsq" `levels`."""

    quantizer: str = "fsq"
    codebook_size: int = 0
    levels: tuple[int, ...] | None = None
    groups: int = 1
    residual: int = 1
    training: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.codebook_size == 0) == (self.levels is None):
            raise ScaMoError(f"{self.quantizer}: expected one of codebook_size and levels")


@dataclass(frozen=True)
class TokenizerStudyConfig:
    """What `scamo study tokenizers` reads.

    dataset: trained on its train split, reported on `split`. evaluator: a folder, for FID; "" for none.
    tokenizer, training: of all cells; seeds are set here. families: changes to [training] of a family (fsq,
    vq, grouped_fsq, residual_fsq, residual_vq); those of a cell come last.
    """

    dataset: str
    cells: tuple[TokenizerCell, ...]
    evaluator: str = ""
    split: str = "test"
    out: str = "runs/study/tokenizers"
    seeds: tuple[int, ...] = (0,)
    device: str = "auto"
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    training: TokenizerTrainingConfig = field(default_factory=TokenizerTrainingConfig)
    families: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("cells", "seeds"):
            if not getattr(self, name):
                raise ScaMoError(f"{name} is empty")
        if len(set(self.seeds)) < len(self.seeds):
            raise ScaMoError(f"seeds = {list(self.seeds)}: a seed is there twice")
        if self.split not in ("val", "test"):
            raise ScaMoError(f"split = {self.split!r}: expected val or test, which no cell is trained on")
        for family in self.families:
            if family not in FAMILIES:
                raise ScaMoError(f"families.{family} is not known: use {', '.join(FAMILIES)}")
        default = TokenizerConfig()
        for key in QUANTISER:
            if getattr(self.tokenizer, key) != getattr(default, key):
                raise ScaMoError(f"tokenizer.{key}: a cell says this, in cells")


@dataclass(frozen=True)
class Planned:
    """A cell with a seed. size: as the paper names it, codes K may be fewer."""

    name: str
    family: str
    size: int
    config: TokenizerRunConfig


def family_of(config: TokenizerConfig) -> str:
    kind = "residual_" if config.residual > 1 else "grouped_" if config.groups > 1 else ""
    return kind + config.quantizer


def plan_tokenizers(config: TokenizerStudyConfig) -> list[Planned]:
    """All cells for all seeds. Raises ScaMoError that names a cell that cannot be, or is there twice."""
    planned: list[Planned] = []
    seen: set[tuple] = set()
    for number, cell in enumerate(config.cells):
        where = f"cells[{number}]"
        described = {key: value for key, value in to_dict(cell).items() if key in QUANTISER}
        if cell.levels is not None:
            described["codebook_size"] = math.prod(cell.levels)
        network = from_dict(TokenizerConfig, to_dict(config.tokenizer) | described, where=where)
        family = family_of(network)
        levels = network.fsq_levels if network.quantizer == "fsq" else None
        key = (family, network.codes, levels, network.groups, network.residual)
        label = "-".join(map(str, cell.levels)) if cell.levels else str(cell.codebook_size)
        if network.indices_per_token > 1:
            label = f"{network.indices_per_token}x{label}"
        if key in seen:
            raise ScaMoError(f"{where}: {family} {label} is there twice")
        seen.add(key)
        changes = config.families.get(family, {}) | cell.training
        for seed in config.seeds:
            training = from_dict(
                TokenizerTrainingConfig,
                to_dict(config.training) | changes | {"seed": seed},
                where=f"{where}: training of {family}",
            )
            run = TokenizerRunConfig(network, training)
            check_recipe(run)
            planned.append(Planned(f"{family}-{label}-s{seed}", family, network.codebook_size, run))
    return planned


def run_tokenizer_study(
    path: str | Path,
    *,
    overrides: tuple[str, ...] = (),
    dry_run: bool = False,
    progress: bool = True,
) -> list[str]:
    """Train and measure all cells, one after another, then write the report into OUT.

    The same call goes on where it was stopped: finished cells are skipped, and a tokenizer that was trained
    but not measured is not trained again. Tokenizers stay in OUT/work/NAME/tokenizer.

    Args:
        path: TOML of a `TokenizerStudyConfig`.
        overrides: "key=value" of it.
        dry_run: only print what would be run.
        progress: print the plan, each training and the report.

    Returns:
        The names of the cells that failed.

    Raises:
        ScaMoError: the config, or what it names, cannot be used; OUT holds a study of other data.
    """
    config = load_config(TokenizerStudyConfig, Path(path), overrides)
    planned = plan_tokenizers(config)
    dataset = MotionDataset.open(config.dataset)
    for split in ("train", config.split):
        if not len(dataset.items(split)):
            raise ScaMoError(f"{dataset.folder}: the split {split} is empty")
    shared: dict[str, Any] = {
        "study": "tokenizers",
        "split": config.split,
        "dataset": {"name": dataset.folder.name, "manifest_sha256": dataset.manifest_sha256},
        "evaluator": None,
    }
    if config.evaluator:
        evaluator = load_evaluator(config.evaluator)
        evaluator.check_dataset(dataset)
        shared["evaluator"] = {"name": evaluator.name, "sha256": evaluator.sha256}
    resolve_device(config.device)
    if progress:
        print(plan_table(planned, dataset.fps))
    if dry_run:
        return []
    cells = [
        Cell(
            plan.name,
            {
                "family": plan.family,
                "size": plan.size,
                "seed": plan.config.training.seed,
                "tokenizer": to_dict(plan.config.tokenizer),
                "training": to_dict(plan.config.training),
            },
            partial(_run, plan.config, config, dataset, shared, progress),
        )
        for plan in planned
    ]
    study = Study(config.out, shared, cells)
    failed = study.run(progress)
    if study.results():
        written = report_tokenizer_study(config.out)
        if progress:
            print(f"report: {', '.join(str(file) for file in written)}")
    return failed


def plan_table(planned: Sequence[Planned], fps: float) -> str:
    """What will be run: Markdown."""
    lines = ["| cell | codes | indices | bits/s | steps | frames seen |", "|---|---|---|---|---|---|"]
    for plan in planned:
        network, training = plan.config.tokenizer, plan.config.training
        rate = fps / network.downsampling * network.bits_per_token
        lines.append(
            f"| {plan.name} | {network.codes:,d} | {network.indices_per_token} | {rate:.1f} "
            f"| {training.steps:,d} | {_frames_seen(training):,d} |"
        )
    return "\n".join(lines)


def _frames_seen(training: TokenizerTrainingConfig) -> int:
    return training.steps * training.batch_size * training.window


def _run(
    config: TokenizerRunConfig,
    study: TokenizerStudyConfig,
    dataset: MotionDataset,
    shared: dict[str, Any],
    progress: bool,
    folder: Path,
) -> dict[str, Any]:
    """One cell: train, unless that was done before the measuring was stopped, and measure."""
    tokenizer, note = folder / "tokenizer", folder / "trained.json"
    wanted = {"config": to_dict(config), "dataset": shared["dataset"]}
    before = read_json(note) if note.exists() else {}
    if not tokenizer.exists() or any(before.get(key) != value for key, value in wanted.items()):
        note.unlink(missing_ok=True)
        began = time.perf_counter()
        train_tokenizer(
            config, dataset.folder, tokenizer, device=study.device, overwrite=True, progress=progress
        )
        before = wanted | {"seconds": time.perf_counter() - began, "threads": torch.get_num_threads()}
        write_json(note, before)
    metrics = evaluate_tokenizer(
        tokenizer, dataset.folder, split=study.split, device=study.device, progress=False
    )
    fid = None
    if study.evaluator:
        fid = reconstruction_fid(tokenizer, dataset.folder, study.evaluator, study.split, device=study.device)
    made = read_json(tokenizer / "config.json")["provenance"]
    return {
        **metrics,
        "fid": fid,
        **_on_train(tokenizer, dataset, metrics["motions"], study.device),
        "train_seconds": round(before["seconds"], 1),
        "threads": before["threads"],
        "steps": made["step"],
        "frames_seen": _frames_seen(config.training),
        "clips": made["clips"],
        "precision": made["precision"],
        "torch": made["torch"],
        "dataset": shared["dataset"],
        "evaluator": shared["evaluator"],
    }


def _on_train(folder: Path, dataset: MotionDataset, motions: int, device: str) -> dict[str, Any]:
    """train_*: the errors on as many items of the train split, the same for all cells; code use on all items.

    Few test tokens hide what a large codebook does: the train split has more.
    """
    tokenizer = load_tokenizer(folder, resolve_device(device))
    items = dataset.items("train")
    sample = ItemFeatures(dataset, np.sort(np.random.default_rng(0).permutation(items)[:motions]))
    errors = reconstruction_metrics(tokenizer, sample, sample.lengths, fps=dataset.fps)
    tokens = torch.from_numpy(np.concatenate(encode_motions(tokenizer, ItemFeatures(dataset, items))))
    streams = tokens.view(len(tokens), -1).unbind(1)
    counts = torch.stack([code_histogram(stream, tokenizer.codes) for stream in streams])
    usage = codebook_statistics(counts if len(streams) > 1 else counts[0])
    wanted = ("l1", "mpjpe_mm", "tokens", "utilisation", "exp_entropy")
    found = {**errors, **usage}
    return {f"train_{key}": found[key] for key in wanted if key in found}
