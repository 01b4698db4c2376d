"""Training of ScaleMoGen's predictor: the loop of the text-prefix transformer, with other batches and loss.

What is shared: data order, rate, engine, guards, checkpoints, resume and log (scamo.training.loop).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from scamo.config import DataConfig, TrainingConfig
from scamo.data.batches import null_text
from scamo.data.dataset import MotionDataset
from scamo.data.scales import (
    ScaleBatch,
    ScaleLoader,
    ScaleSample,
    ScaleStore,
    check_tokenizer,
    collate_scales,
    scale_plan,
)
from scamo.data.storage import sha256_of
from scamo.errors import ScaMoError
from scamo.generation.scales import check_parts, export_predictor
from scamo.models.next_scale import NextScale, NextScaleConfig, token_levels
from scamo.tokenizers.multiscale import MultiscaleQuantizer, MultiscaleTokenizer
from scamo.tokenizers.skeletal import PARTS
from scamo.training.guards import World
from scamo.training.loop import Job, _Loop, _Window, check_folder, check_same_run, resolve_machine, run

FORMAT = "scamo-next-scale-run-1"
# Masters, moments, weights that compute and a moving average of one parameter, in a checkpoint at most.
BYTES_PER_PARAMETER = 20


@dataclass(frozen=True)
class NextScaleTrainingConfig(TrainingConfig):
    """`TrainingConfig` with the released code's optimiser and constant rate; positions are text and tokens.

    drop_token has no meaning here, and how often the text is lost is the model's (model.drop_text).
    """

    learning_rate: float = 3e-4
    min_learning_rate: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.97)
    weight_decay: float = 0.005
    warmup_ratio: float = 0.0
    drop_token: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, instead in (("drop_token", "leave it out"), ("drop_text", "use model.drop_text")):
            if getattr(self, name):
                raise ScaMoError(f"{name} = {getattr(self, name)}: not used here, {instead}")


@dataclass(frozen=True)
class NextScaleRunConfig:
    """What `train_next_scale` reads: [data], whose tokens name the latents of scales; [model]; [training]."""

    data: DataConfig
    model: NextScaleConfig = field(default_factory=NextScaleConfig)
    training: NextScaleTrainingConfig = field(default_factory=NextScaleTrainingConfig)


@dataclass(kw_only=True)
class ScaleJob(Job):
    """A `Job` with what the batches are made of."""

    store: ScaleStore
    quantizer: MultiscaleQuantizer


def train_next_scale(
    config: NextScaleRunConfig,
    ds_config: Path,
    *,
    world: World | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> int:
    """Train a predictor to `config.training.steps` and export it; every rank calls it.

    The dataset must have latents of scales (`encode_scales`) and text states. The export is RUN/export, what
    `ScaleMoGen.load` reads; its weights are the moving average's where there is one. Arguments, exit status
    and errors as of `scamo.training.loop.train`.
    """
    return run(_prepare, _ScaleLoop, config, ds_config, world=world, resume=resume, overwrite=overwrite)


def _prepare(
    config: NextScaleRunConfig, ds_path: Path, world: World, *, resume: bool, overwrite: bool
) -> ScaleJob:
    """All checks that need no other rank and write nothing."""
    training, folder = config.training, Path(config.training.run)
    check_folder(folder, resume=resume, overwrite=overwrite)
    resolved, device, precision = resolve_machine(training, ds_path, world)

    dataset = MotionDataset.open(config.data.dataset)
    store = ScaleStore(dataset, config.data.tokens)
    text = dataset.text_states(config.data.text)
    if not config.data.tokenizer:
        raise ScaMoError("data.tokenizer is missing: the folder of the tokenizer that made the latents")
    quantizer = MultiscaleTokenizer.load(config.data.tokenizer).quantizer
    check_tokenizer(store, config.data.tokenizer)
    model = _complete_model(config.model, text_width=text.width, scales=store.scales, bits=store.bits)
    check_parts(model, quantizer)
    config = dataclasses.replace(config, model=model)
    plan = scale_plan(
        dataset,
        "train",
        store,
        text,
        quantizer,
        seed=training.seed,
        micro_batch_tokens=training.micro_batch_tokens,
        micro_batches=training.micro_batches,
        drop_text=model.drop_text,
        max_text=model.max_text,
    )
    job = ScaleJob(
        config=cast(Any, config),
        ds_config=resolved,
        world=world,
        device=device,
        precision="bf16" if precision.bf16 else "fp32",
        dataset=dataset,
        fingerprint={
            "dataset": dataset.manifest_sha256,
            "tokens": sha256_of(store.folder / "manifest.json"),
            "text": sha256_of(text.folder / "manifest.json"),
        },
        counts=torch.zeros(0),
        plan=plan,
        text_encoder=text.encoder,
        folder=folder,
        notes=[precision.note] if precision.note else [],
        format=FORMAT,
        store=store,
        quantizer=quantizer,
    )
    if resume and (folder / "config.json").is_file():
        job.notes += check_same_run(job)
    return job


def _complete_model(config: NextScaleConfig, **found: Any) -> NextScaleConfig:
    """Fill in what the dataset says; a stated value that is not the default must agree with it."""
    defaults = NextScaleConfig()
    for name, value in found.items():
        stated = getattr(config, name)
        if stated not in (getattr(defaults, name), value):
            raise ScaMoError(f"model.{name} = {stated}, but the dataset has {value}: leave it out")
    return dataclasses.replace(config, **found)


class _ScaleLoop(_Loop):
    job: ScaleJob

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.model: NextScaleConfig = cast(Any, self.job.config.model)
        # The weight of all tokens of a motion of n latents, (latents + 1,).
        weights = torch.tensor(self.model.token_weights())[self._levels("cpu")]
        valid = self.job.quantizer.valid(torch.arange(self.model.latents + 1))
        self.motion_weights = (valid * weights).sum(1, dtype=torch.float64).numpy()

    @staticmethod
    def make_model(job: Job) -> torch.nn.Module:
        return NextScale(
            cast(Any, job.config.model),
            impl=job.training.kernels,
            checkpoint_activations=job.training.checkpoint_activations,
        )

    def _levels(self, device: torch.device | str) -> Tensor:
        return token_levels(self.model.grid(), torch.device(device))

    def _loader(self) -> ScaleLoader:
        job, ranks = self.job, self.ranks
        return ScaleLoader(
            job.dataset, "train", job.plan, job.store, job.quantizer, rank=ranks.rank, world=ranks.size
        )

    def _pairs(self, batch: ScaleBatch) -> int:  # type: ignore[override]
        across = batch.cu_seqlens.diff().long() * batch.cu_text.diff()
        return int(batch.bounds.sum() + across.sum())

    def _weight(self, step: int) -> float:
        items = [draw.item for draws in self.job.plan.step(step) for draw in draws]
        return float(self.motion_weights[self.job.store.lengths[items]].sum())

    def _scored(self, step: int) -> int:
        # The plan counts an end for each motion, which these have not.
        return self.job.plan.scored(step) - sum(map(len, self.job.plan.step(step)))

    def _flops(self, window: _Window) -> float:
        config, texts = self.model, window.positions - window.scored
        width, depth = config.width, config.depth
        per_token = depth * (6 * width**2 + 2 * width * config.hidden) + 2 * width * config.bits
        per_state = (2 * depth + 1) * width**2 + 3 * width * config.text_width
        attention = 12 * depth * width * window.pairs
        return 6.0 * (per_token * window.scored + per_state * texts) + attention

    def _validation_batches(self) -> Iterable[ScaleBatch]:  # type: ignore[override]
        return self._loader().validation("val")

    def _validation_row(self, batch: ScaleBatch) -> Tensor:  # type: ignore[override]
        """Weighted loss, weight, length loss, motions; then cross-entropy, errors and tokens by scale."""
        out, scales = self.engine(batch), len(self.model.scales)
        level = self._levels(batch.tokens.device)[batch.tokens]
        totals = [out.loss_sum, out.weight, out.length_losses.sum(), torch.tensor(float(batch.n_samples))]
        columns = out.losses, out.errors, torch.ones_like(out.losses)
        by_scale = [torch.zeros(scales, device=level.device).index_add_(0, level, c) for c in columns]
        return torch.cat([*(t.view(1).to(level.device).float() for t in totals), *by_scale])

    def _validation_values(self, totals: list[float]) -> tuple[dict[str, Any], str]:
        loss, weight, length_loss, motions = totals[:4]
        losses, errors, tokens = np.array(totals[4:]).reshape(3, -1)
        there = np.maximum(tokens, 1)
        values = {
            "loss": loss / weight,
            "bit_loss": losses.sum() / tokens.sum(),
            "bit_error": errors.sum() / tokens.sum(),
            "bit_errors": (errors / there).tolist(),
            "length_loss": length_loss / motions,
            "motion_tokens": int(tokens.sum()),
        }
        return values, f"validation loss {values['loss']:.4f}, {values['bit_error']:.1%} of bits wrong"

    def _dummy(self) -> ScaleBatch:  # type: ignore[override]
        latents = np.zeros((1, PARTS, self.model.bits), np.float32)
        return collate_scales([ScaleSample(null_text(self.model.text_width), latents)], self.job.quantizer)

    def _checkpoint_bytes(self) -> int:
        return BYTES_PER_PARAMETER * self.parameters + 2**20

    def _write_export(self, state: dict[str, Tensor], average: dict[str, Tensor] | None) -> None:
        job = self.job
        export_predictor(
            job.folder / "export",
            state if average is None else average,
            self.model,
            job.config.data.tokenizer,
            job.text_encoder,
            fps=job.dataset.fps,
            overwrite=True,
        )
