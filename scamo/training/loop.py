"""The training loop of the text-prefix transformer (paper section 3.2, Tab. 4) on a DeepSpeed engine.

Everything that decides the curve is a function of the step: the data order (`BatchPlan`), the rate
(`learning_rate`), and the scale of the loss (the plan knows how many tokens a step scores). There is no
random state to save, and micro-batch j of a step is the same on any number of ranks: rank r of w computes
j = r, r + w, ...
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scamo.config import DataConfig, ModelConfig, RunConfig, TrainingConfig, to_dict
from scamo.data.batches import BatchPlan, PackedBatch, PackedLoader, Sample, collate, validation_batches
from scamo.data.dataset import MotionDataset, TokenStore
from scamo.data.storage import sha256_of
from scamo.errors import ScaMoError
from scamo.generation.export import check_codes, export_model
from scamo.models.losses import unigram_cross_entropy
from scamo.models.prefix_lm import PrefixLM
from scamo.scaling.flops import attended_pairs, stated_peak, training_flops
from scamo.scaling.memory import Zero, checkpoint_bytes
from scamo.tokenizers import load_tokenizer
from scamo.training import checkpoint as ckpt
from scamo.training.ds_config import Precision, read_ds_config, resolve_ds_config, resolve_precision
from scamo.training.ema import Ema, read_ema
from scamo.training.engine import (
    Ranks,
    build_engine,
    choose_device,
    device_facts,
    gradients_finite,
    model_state,
    set_learning_rate,
)
from scamo.training.guards import StopFlag, World, is_lost_peer
from scamo.training.logging import Progress, RunLog
from scamo.training.resume import Source, find_source, load_source, remove_converted
from scamo.training.schedule import learning_rate

FORMAT = "scamo-run-1"
STATUS_NAN = 13
# Keys of [training] that a resumed run may change: none of them moves the curve.
FREE_KEYS = {
    *("run", "validate_every", "validate_batches", "save_every", "keep_checkpoints", "keep_every"),
    *("log_every", "peak_tflops", "checkpoint_activations"),
}


@dataclass
class Job:
    """What one run is made of, checked and not yet started."""

    config: RunConfig
    ds_config: dict[str, Any]
    world: World
    device: torch.device
    precision: str
    dataset: MotionDataset
    fingerprint: dict[str, str]
    counts: Tensor
    plan: BatchPlan
    text_encoder: str
    folder: Path
    notes: list[str]
    format: str = FORMAT

    @property
    def training(self) -> TrainingConfig:
        return self.config.training

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def facts(self) -> dict[str, Any]:
        """What decides whether DeepSpeed can read a checkpoint's shards."""
        stage = self.ds_config["zero_optimization"]["stage"]
        return {"ranks": self.world.size, "zero_stage": stage, "precision": self.precision}


def train(
    config: RunConfig,
    ds_config: Path,
    *,
    world: World | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> int:
    """Train to `config.training.steps` and export; every rank calls it.

    Args:
        config: the run.
        ds_config: DeepSpeed's JSON file ("auto" values are filled in).
        world: this process among the ranks; from the environment without it.
        resume: continue from the newest checkpoint that verifies; begin where there is no checkpoint yet.
        overwrite: replace an existing run.

    Returns:
        Exit status: 0 finished and exported; 13 stopped before a step with a NaN (nothing was updated);
        128 + signal after SIGINT, SIGTERM or SIGUSR1 (a checkpoint was saved).

    Raises:
        ScaMoError: bad input, on all ranks alike and before anything is written; or a checkpoint that cannot
            be written, perhaps on one rank only.
    """
    return run(_prepare, _Loop, config, ds_config, world=world, resume=resume, overwrite=overwrite)


def run(
    prepare: Callable[..., Job],
    loop: type[_Loop],
    config: Any,
    ds_config: Path,
    *,
    world: World | None,
    resume: bool,
    overwrite: bool,
) -> int:
    """`train` for a kind of model: what checks its configuration, and the loop that knows its batches."""
    world = world or World.from_environment()
    with StopFlag(world.size) as stop:
        job = prepare(config, ds_config, world, resume=resume, overwrite=overwrite)
        ranks = Ranks(world, job.device)
        torch.manual_seed(config.training.seed)
        model = loop.make_model(job)
        # Before the engine: whether it reads a universal checkpoint is part of its configuration.
        source = None
        if resume:
            source = find_source(job.checkpoints, job.facts, ranks, lambda text: _print_once(ranks, text))
        ds = {**job.ds_config, "checkpoint": {**job.ds_config.get("checkpoint", {})}}
        ds["checkpoint"]["load_universal"] = source is not None and source.converted is not None
        engine = build_engine(model, ds, job.training, job.device)
        running = loop(job, ranks, engine, stop, parameters=_count(model))
        status = running.run(source, resume=resume, overwrite=overwrite)
    ranks.close()
    return status


def _print_once(ranks: Ranks, message: str) -> None:
    if ranks.rank == 0:
        print(message, flush=True)


def _count(model: torch.nn.Module) -> int:
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())


def _prepare(config: RunConfig, ds_path: Path, world: World, *, resume: bool, overwrite: bool) -> Job:
    """All checks that need no other rank and write nothing."""
    training = config.training
    folder = Path(training.run)
    check_folder(folder, resume=resume, overwrite=overwrite)
    resolved, device, precision = resolve_machine(training, ds_path, world)

    dataset = MotionDataset.open(config.data.dataset)
    tokens = dataset.tokens(config.data.tokens)
    text = dataset.text_states(config.data.text)
    model = _complete_model(config.model, codes=tokens.codes, text_width=text.width)
    model = dataclasses.replace(model, null_text=training.drop_text > 0)
    config = dataclasses.replace(config, model=model)
    _check_tokenizer(config.data.tokenizer, tokens, model)
    plan = BatchPlan.of(dataset, "train", tokens, text, model, training)
    fingerprint = {
        "dataset": dataset.manifest_sha256,
        "tokens": sha256_of(tokens.folder / "manifest.json"),
        "text": sha256_of(text.folder / "manifest.json"),
    }
    job = Job(
        config=config,
        ds_config=resolved,
        world=world,
        device=device,
        precision="bf16" if precision.bf16 else "fp32",
        dataset=dataset,
        fingerprint=fingerprint,
        counts=torch.from_numpy(tokens.unigram("train")),
        plan=plan,
        text_encoder=text.encoder,
        folder=folder,
        notes=[precision.note] if precision.note else [],
    )
    job.notes.extend(f"left out of training: {n} items {why}" for why, n in plan.excluded.items() if n)
    if resume and (folder / "config.json").is_file():
        job.notes += check_same_run(job)
    return job


def resolve_machine(
    training: TrainingConfig, ds_path: Path, world: World
) -> tuple[dict[str, Any], torch.device, Precision]:
    """DeepSpeed's configuration without an "auto", this rank's device, and the precision."""
    raw = read_ds_config(ds_path)
    device = choose_device(world)
    name, native = device_facts(device)
    precision = resolve_precision(
        raw.get("bf16", {}).get("enabled", "auto"), name, native, cuda=device.type == "cuda", path=ds_path
    )
    resolved = resolve_ds_config(raw, training, world=world.size, bf16=precision.bf16, path=ds_path)
    return resolved, device, precision


def _complete_model(model: ModelConfig, *, codes: int, text_width: int) -> ModelConfig:
    """Fill codes and text_width from the dataset; a stated value must agree with it."""
    for name, value in (("codes", codes), ("text_width", text_width)):
        stated = getattr(model, name)
        if stated not in (0, value):
            raise ScaMoError(f"model.{name} = {stated}, but the dataset has {value}: leave it out, or 0")
    return dataclasses.replace(model, codes=codes, text_width=text_width)


def _check_tokenizer(folder: str, tokens: TokenStore, model: ModelConfig) -> None:
    """The tokenizer becomes part of the export: better to know now than after the training."""
    if not folder:
        raise ScaMoError("data.tokenizer is missing: the folder of the tokenizer that made the tokens")
    check_codes(model, load_tokenizer(folder), folder)
    made_by = tokens.tokenizer.get("weights_sha256")
    if made_by and made_by != sha256_of(Path(folder) / "model.safetensors"):
        raise ScaMoError(f"data.tokenizer = {folder}: another tokenizer made the tokens in {tokens.folder}")


def check_folder(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Raises ScaMoError when the run's folder is occupied and may be neither continued nor replaced."""
    if not folder.exists():
        return
    # A start that was cut off may have left config.json.partial.
    occupied = not folder.is_dir() or any(p.suffix != ckpt.PARTIAL for p in folder.iterdir())
    if occupied and not (resume or overwrite):
        raise ScaMoError(f"{folder} exists: use --resume to continue it, --overwrite to replace it")
    if occupied and not (folder / "config.json").is_file():
        raise ScaMoError(f"{folder} exists and is not a training run: it is not overwritten")


def check_same_run(job: Job) -> list[str]:
    """Compare with the run's config.json: what moves the curve must be as it was. Returns notes."""
    path = job.folder / "config.json"
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ScaMoError(f"{path}: not readable: {error}") from None
    if stored.get("format") != job.format:
        raise ScaMoError(f"{path}: format {stored.get('format')!r}, expected {job.format!r}")
    for name, digest in job.fingerprint.items():
        if stored["fingerprint"].get(name) != digest:
            raise ScaMoError(
                f"{job.folder}: was trained on another {name} than {job.config.data.dataset} has now"
            )
    notes = []
    now = to_dict(job.config)
    # A key that the run did not know yet had, in effect, its default.
    defaults = to_dict(type(job.config)(DataConfig(dataset="any")))
    for section in ("model", "training"):
        for key, value in now[section].items():
            before = stored[section].get(key, defaults[section][key])
            if before == value or (section == "training" and key in FREE_KEYS):
                continue
            if (section, key) == ("training", "steps"):
                notes.append(
                    f"training.steps was {before} and is {value} now: the rate follows the new schedule"
                )
                continue
            raise ScaMoError(
                f"{section}.{key} = {json.dumps(value)}, but {path} has {json.dumps(before)}: "
                "a resumed run keeps it (start another run to change it)"
            )
    if stored["precision"] != job.precision:
        notes.append(f"the run was begun in {stored['precision']} and goes on in {job.precision}")
    return notes


class _Stopped(Exception):
    """A signal ends the validation; the loop saves and stops."""


class _Loop:
    def __init__(self, job: Job, ranks: Ranks, engine: Any, stop: StopFlag, *, parameters: int) -> None:
        self.job, self.ranks, self.engine, self.parameters = job, ranks, engine, parameters
        self.training = job.training
        self.stop = stop
        self.accumulation = self.training.micro_batches // ranks.size
        self.log: RunLog | None = None
        self.bar = Progress(0, 0, show=False)
        self.saved_step = -1
        self.ema: Ema | None = None
        # FLOP/s of one device, 0 if unknown.
        self.peak = 1e12 * self.training.peak_tflops or stated_peak(device_facts(job.device)[0])

    # -- what depends on the kind of model -------------------------------------------------------------------

    @staticmethod
    def make_model(job: Job) -> torch.nn.Module:
        return PrefixLM(
            job.config.model,
            impl=job.training.kernels,
            checkpoint_activations=job.training.checkpoint_activations,
        )

    def _loader(self) -> PackedLoader:
        job, ranks = self.job, self.ranks
        return PackedLoader(job.dataset, "train", job.plan, rank=ranks.rank, world=ranks.size)

    def _pairs(self, batch: PackedBatch) -> int:
        """(query, key) pairs of a batch."""
        return attended_pairs(batch.cu_seqlens.diff(), self.job.config.model.both_ways(batch.prefix_lengths))

    def _weight(self, step: int) -> float:
        """What the sums of a step's losses are divided by."""
        return self.job.plan.scored(step)

    def _scored(self, step: int) -> int:
        """Tokens of a step that have a loss, over all ranks."""
        return self.job.plan.scored(step)

    def _flops(self, window: _Window) -> float:
        return training_flops(
            self.job.config.model, positions=window.positions, scored=window.scored, pairs=window.pairs
        )

    # -- the run ---------------------------------------------------------------------------------------------

    def run(self, source: Source | None, *, resume: bool, overwrite: bool) -> int:
        training = self.training
        self.stop.install()
        self._check_space()
        start = self._resume(source) if resume else 0
        if training.ema_decay:
            self.ema = Ema(self.engine, training.ema_decay)
            if source:
                self.ema.load(source.folder)
        self._open_folder(resume=resume, overwrite=overwrite, start=start)
        done = start
        try:
            status = 0
            if start < training.steps:
                status, done = self._train(start)
            if status != STATUS_NAN and done > 0 and self.saved_step != done:
                self._save(done, last=True)
            if status == 0:
                self._export(done)
        finally:
            self.bar.close()
        if self.ranks.rank == 0 and self.log:
            self.log.write("end", step=done, status=status)
            self.log.close()
        if status > 128:
            name = signal.Signals(status - 128).name
            self.say(f"stopped by {name} after {done} of {training.steps} steps; --resume continues")
        return status

    def say(self, message: str) -> None:
        if self.bar.show:
            self.bar.say(message)
        else:
            _print_once(self.ranks, message)

    def _open_folder(self, *, resume: bool, overwrite: bool, start: int) -> None:
        """From here on the run exists. All ranks have passed every check."""
        self.ranks.barrier()
        job, folder = self.job, self.job.folder
        if self.ranks.rank == 0:
            if overwrite and folder.exists():
                shutil.rmtree(folder)
            folder.mkdir(parents=True, exist_ok=True)
            ckpt.remove_partial(job.checkpoints)
            ckpt.unseal_after(job.checkpoints, start)
            record = {
                "format": job.format,
                **to_dict(job.config),
                "fingerprint": job.fingerprint,
                "text_encoder": job.text_encoder,
                "precision": job.precision,
                "ranks": self.ranks.size,
                "parameters": self.parameters,
                "ds_config": job.ds_config,
            }
            partial = folder / "config.json.partial"
            ckpt.write_synced(partial, json.dumps(record, indent=2) + "\n")
            os.replace(partial, folder / "config.json")
            self.log = RunLog(folder / "log.jsonl", resume_step=start if resume else None)
            self.log.write(
                "start",
                step=start,
                ranks=self.ranks.size,
                precision=job.precision,
                device=device_facts(job.device)[0],
                parameters=self.parameters,
                resumed=resume,
            )
            for note in job.notes:
                print(note, flush=True)
            print(
                f"{folder}: {self.parameters:,} parameters in {job.precision}, {self.ranks.size} ranks x "
                f"{self.accumulation} micro-batches of up to {self.training.micro_batch_tokens:,} positions, "
                f"ZeRO stage {job.ds_config['zero_optimization']['stage']}, "
                f"steps {start} to {self.training.steps}",
                flush=True,
            )
        self.bar = Progress(self.training.steps, start, show=self.ranks.rank == 0)
        self.ranks.barrier()

    # -- steps -----------------------------------------------------------------------------------------------

    def _train(self, start: int) -> tuple[int, int]:
        """Updates from `start` on. Returns (status, updates done)."""
        training, ranks, engine = self.training, self.ranks, self.engine
        self.engine.train()
        window = _Window()
        plan = self.job.plan
        steps = self._loader().steps(start, training.steps, pin=self.job.device.type == "cuda")
        for step in range(start, training.steps):
            self.stop.beat()
            began = time.perf_counter()
            packed = next(steps)
            waited = time.perf_counter() - began
            pairs = sum(self._pairs(batch) for batch in packed)
            batches = [batch.to(self.job.device, non_blocking=True) for batch in packed]
            weight = self._weight(step)
            rate = learning_rate(step, training)
            set_learning_rate(engine, rate)

            # DeepSpeed averages over ranks and accumulation; the loss is a mean over the tokens of the step.
            scale = ranks.size * self.accumulation / weight
            sums = []
            for index, batch in enumerate(batches):
                loss_sum = engine(batch).loss_sum
                engine.backward(loss_sum * scale)
                sums.append(loss_sum.detach())
                if index + 1 < len(batches):
                    engine.step()
            facts = torch.tensor([self.stop.signum, waited, pairs], dtype=torch.float64).to(self.job.device)
            bad = (~gradients_finite(engine)).double().reshape(1)
            table = ranks.gather_vector(torch.cat([facts, bad, torch.stack(sums).double()]))
            losses = _in_order(table[:, 4:])
            if bool(table[:, 3].any()) or not all(map(math.isfinite, losses)):
                self._report_nan(step, losses, batches)
                return STATUS_NAN, step
            engine.step()
            if not engine.was_step_applied():
                raise RuntimeError(f"DeepSpeed left out step {step + 1} although its gradients were finite")
            if self.ema:
                self.ema.update(step)

            done = step + 1
            loss = sum(losses) / weight
            seconds = time.perf_counter() - began
            window.add(
                seconds=seconds,
                positions=plan.positions(step),
                scored=self._scored(step),
                pairs=int(table[:, 2].sum()),
                waited=float(table[:, 1].max()),
            )
            if ranks.rank == 0:
                self.bar.update(loss, window.positions / window.seconds)
                if done % training.log_every == 0 or done in (1, training.steps):
                    self._log_step(done, loss, rate, window)
                    window = _Window()
            signum = int(table[:, 0].max())
            if not signum and (done % training.validate_every == 0 or done == training.steps):
                try:
                    self._validate(done)
                except _Stopped as stopped:
                    signum = stopped.args[0]
            if signum:
                if ranks.rank == 0 and window.steps:
                    self._log_step(done, loss, rate, window)
                return 128 + signum, done
            if done % training.save_every == 0 and done < training.steps:
                self._save(done)
        return 0, training.steps

    def _log_step(self, done: int, loss: float, rate: float, window: _Window) -> None:
        assert self.log is not None
        norm = self.engine.get_global_grad_norm()
        flops = self._flops(window)
        self.log.write(
            "train",
            step=done,
            loss=loss,
            lr=rate,
            grad_norm=None if norm is None else float(norm),
            positions=window.positions,
            motion_tokens=window.scored,
            flops=flops,
            positions_per_s=round(window.positions / window.seconds, 1),
            motion_tokens_per_s=round(window.scored / window.seconds, 1),
            tflops_per_device=round(flops / window.seconds / self.ranks.size / 1e12, 4),
            mfu=round(flops / window.seconds / self.ranks.size / self.peak, 4) if self.peak else None,
            epoch=round(self.job.plan.epochs(done), 4),
            steps=window.steps,
            seconds=round(window.seconds, 4),
            data_wait_s=round(window.waited, 4),
            memory_gib=round(_peak_memory(self.job.device) / 2**30, 3),
        )

    def _report_nan(self, step: int, losses: list[float], batches: list[PackedBatch]) -> None:
        """Name the culprits on all ranks' behalf; the weights are those before this step."""
        size = self.ranks.size
        mine = {self.ranks.rank + size * k: batch.item_ids.tolist() for k, batch in enumerate(batches)}
        items: dict[int, list[int]] = {}
        for part in self.ranks.gather(mine):
            items |= part
        bad = [j for j, loss in enumerate(losses) if not math.isfinite(loss)]
        what = "loss" if bad else "gradient"
        named = sorted({item for j in (bad or items) for item in items[j]})
        if self.ranks.rank == 0 and self.log:
            self.log.write("nan", step=step + 1, what=what, micro_batches=bad or sorted(items), items=named)
        shown = ", ".join(f"{item} ({self.job.dataset.item_name(item)})" for item in named[:8])
        more = f" and {len(named) - 8} more (log.jsonl has all)" if len(named) > 8 else ""
        self.say(
            f"train.py: error: step {step + 1}: the {what} is not finite; nothing was updated. "
            f"Items of the micro-batch: {shown}{more}"
        )

    # -- validation ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _validate(self, done: int) -> None:
        """Cross-entropy and L_u (paper Eq. 8) over the val split, each item once with its first caption."""
        job, ranks, engine = self.job, self.ranks, self.engine
        began = time.perf_counter()
        mine = iter(self._validation_batches())
        engine.eval()
        rows: list[Tensor] = []
        limit = self.training.validate_batches
        while True:
            self.stop.beat()
            # Under ZeRO-3 a forward gathers weights from all ranks: everyone takes part or nobody does.
            index = ranks.rank + ranks.size * len(rows)
            batch = next(mine, None) if not limit or index < limit else None
            state = torch.tensor(
                [batch is not None, self.stop.signum], dtype=torch.float64, device=job.device
            )
            table = ranks.gather_vector(state)
            if int(table[:, 1].max()):
                engine.train()
                raise _Stopped(int(table[:, 1].max()))
            if not bool(table[:, 0].any()):
                break
            real = batch is not None
            row = self._validation_row((batch or self._dummy()).to(job.device)).double()
            rows.append(row if real else torch.zeros_like(row))
        engine.train()
        if not rows:
            return
        table = ranks.gather_vector(torch.cat(rows)).view(ranks.size, len(rows), -1)
        values, message = self._validation_values([sum(_in_order(column)) for column in table.unbind(2)])
        if ranks.rank == 0 and self.log:
            self.log.write("val", step=done, **values, seconds=round(time.perf_counter() - began, 3))
        self.say(f"step {done}: {message}")

    def _validation_batches(self) -> Iterable[PackedBatch]:
        job, ranks = self.job, self.ranks
        return validation_batches(job.dataset, "val", job.plan, rank=ranks.rank, world=ranks.size)

    def _validation_row(self, batch: PackedBatch) -> Tensor:
        """Of a batch on the device: sums to be added up over all batches (n,)."""
        loss_sum = self.engine(batch).loss_sum.double()
        unigram = unigram_cross_entropy(self.job.counts, batch.targets).sum()
        return torch.stack([loss_sum, unigram, torch.tensor(float(batch.n_scored), device=self.job.device)])

    def _validation_values(self, totals: list[float]) -> tuple[dict[str, Any], str]:
        """Of the sums: what is logged, and said."""
        ce, unigram_ce = totals[0] / totals[2], totals[1] / totals[2]
        values = {
            "loss": ce,
            "l_u": ce - unigram_ce,
            "unigram": unigram_ce,
            "motion_tokens": int(totals[2]),
        }
        return values, f"validation loss {ce:.4f}, L_u {ce - unigram_ce:+.4f}"

    def _dummy(self) -> PackedBatch:
        """One sample of one token: keeps a rank without data in step."""
        import numpy as np

        sample = Sample(np.zeros((1, self.job.config.model.text_width), np.float32), np.zeros(1, np.int64))
        return collate([sample], self.job.config.model.codes)

    # -- checkpoints -----------------------------------------------------------------------------------------

    def _check_space(self) -> None:
        lacking = self.ranks.gather(ckpt.missing_space(self.job.folder, self._checkpoint_bytes()))[0]
        if lacking:
            raise ScaMoError(
                f"{self.job.folder}: one checkpoint takes about {self._checkpoint_bytes() / 1e9:.3g} GB, "
                f"{lacking / 1e9:.3g} GB more than the disk has free"
            )

    def _checkpoint_bytes(self) -> int:
        zero = Zero.of(self.job.ds_config)
        model, ema = self.job.config.model, self.training.ema_decay > 0
        return checkpoint_bytes(model, zero, self.ranks.size, ema=ema) + 2**20

    def _save(self, done: int, *, last: bool = False) -> None:
        """Save; a full disk costs the oldest checkpoints first, then this one (with a warning)."""
        job, ranks = self.job, self.ranks
        began = time.perf_counter()
        lacking = 0
        if ranks.rank == 0:
            lacking = ckpt.missing_space(job.folder, self._checkpoint_bytes())
            if lacking:
                ckpt.prune_checkpoints(job.checkpoints, 1, self.training.keep_every)
                lacking = ckpt.missing_space(job.folder, self._checkpoint_bytes())
        lacking = ranks.gather(lacking)[0]
        if lacking:
            message = f"step {done}: not saved, the disk lacks {lacking / 1e9:.3g} GB"
            if last:
                raise ScaMoError(f"{job.folder}: {message}")
            self.say(f"warning: {message}")
            return

        def write(folder: Path) -> None:
            tag = ckpt.tag_name(done)
            self.engine.save_checkpoint(str(folder), tag=tag, client_state={"step": done})
            if self.ema:
                self.ema.save(folder)

        facts = {**job.facts, "tag": ckpt.tag_name(done)}
        try:
            with self.stop.busy():
                folder = ckpt.save_checkpoint(job.checkpoints, done, write, facts=facts, group=ranks)
        except Exception as error:
            free = shutil.disk_usage(job.folder).free
            ckpt.remove_partial(job.checkpoints)
            # What torch.save raises on a full disk is a RuntimeError that doesn't say so.
            if not isinstance(error, OSError | RuntimeError) or is_lost_peer(error):
                raise
            cause = (str(error).splitlines() or [type(error).__name__])[0]
            raise ScaMoError(
                f"{job.checkpoints / ckpt.checkpoint_name(done)}: not saved ({free / 1e6:,.1f} MB free): "
                f"{cause}; the checkpoint before it stays, --resume continues from there"
            ) from error
        self.saved_step = done
        if ranks.rank == 0:
            ckpt.prune_checkpoints(job.checkpoints, self.training.keep_checkpoints, self.training.keep_every)
            if self.log:
                size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
                seconds = round(time.perf_counter() - began, 3)
                self.log.write("checkpoint", step=done, bytes=size, seconds=seconds)
        ranks.barrier()

    def _resume(self, source: Source | None) -> int:
        """Load the checkpoint. Returns the updates done; 0 if there is none yet."""
        if source is None:
            self.say(f"{self.job.checkpoints}: nothing to resume from, starting at step 0")
            return 0
        with self.stop.busy():
            load_source(self.engine, source)
            remove_converted(source, self.ranks)
        self.saved_step = source.step
        self.say(f"resuming from {source.folder} after {self.saved_step} steps")
        return self.saved_step

    def _export(self, done: int) -> None:
        """Float32 safetensors in RUN/export, from the checkpoint, which is read again and verified first."""
        job = self.job
        folder = job.checkpoints / ckpt.checkpoint_name(done)
        with self.stop.busy():
            manifest = ckpt.verify_checkpoint(folder, self.ranks)
            if self.ranks.rank == 0:
                average = read_ema(folder) if self.ema else None
                self._write_export(model_state(folder, manifest["tag"]), average)
            self.ranks.barrier()
        self.say(f"exported to {job.folder / 'export'}")

    def _write_export(self, state: dict[str, Tensor], average: dict[str, Tensor] | None) -> None:
        job = self.job
        export_model(
            job.folder / "export",
            state,
            job.config.model,
            job.config.data.tokenizer,
            job.text_encoder,
            fps=job.dataset.fps,
            ema=average,
        )


@dataclass
class _Window:
    """Counts since the last line of the log."""

    steps: int = 0
    seconds: float = 0.0
    positions: int = 0
    scored: int = 0
    pairs: int = 0
    waited: float = 0.0

    def add(self, *, seconds: float, positions: int, scored: int, pairs: int, waited: float) -> None:
        self.steps += 1
        self.seconds += seconds
        self.positions += positions
        self.scored += scored
        self.pairs += pairs
        self.waited += waited


def _in_order(table: Tensor) -> list[float]:
    """(ranks, rounds) -> values by micro-batch, rank + ranks * round: the same for any number of ranks."""
    return table.T.flatten().tolist()


def _peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU's allocator, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
