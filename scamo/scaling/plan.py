"""`scamo plan`: memory, speed, disk and data of a training run, before it is started.

All of it is arithmetic on the configuration. What is assumed and not known is said in `Plan.notes`.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from scamo.config import ModelConfig, RunConfig, TrainingConfig, load_config
from scamo.errors import ScaMoError
from scamo.scaling import memory
from scamo.scaling.flops import (
    attended_pairs,
    block_parameters,
    forward_flops,
    paper_flops,
    parameters,
    stated_peak,
    training_flops,
)
from scamo.scaling.memory import Activations, Batch, States, Zero
from scamo.scaling.paper import PRINTED
from scamo.training.ds_config import read_ds_config, resolve_ds_config

GIB = 2**30
# Means of real clips with HumanML3D captions; without a dataset the samples of a plan are like that.
TEXT_LENGTH, MOTION_LENGTH = 15, 34
CODES, TEXT_WIDTH = 64_000, 2048
PEAK_TFLOPS = 989.0
CAVEAT = "the paper's D is proportional to the model's size by construction, not a measured optimum"
# Positions, in steps of which the largest micro-batch is looked for.
STEP = 64


@dataclass(frozen=True)
class Data:
    """Samples, on average: text and motion positions and attended pairs; longest: positions of the longest.

    motion_tokens: of one pass over the train split, with EOS; 0 if it is not known.
    """

    text: float
    motion: float
    pairs: float
    longest: int
    motion_tokens: int = 0

    @property
    def length(self) -> float:
        return self.text + self.motion


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank for one micro-batch. allowance: what is assumed for context and fragmentation."""

    states: States
    gathered: int
    activations: Activations
    allowance: int

    @property
    def total(self) -> int:
        """The larger of backward and update; the allowance included."""
        states = self.states
        backward = states.gradients + states.buckets + self.gathered + self.activations.peak
        return states.weights + states.optimizer + states.ema + max(backward, states.update) + self.allowance


@dataclass(frozen=True)
class Law:
    """The paper's Eqs. 11-14 at a compute C, in the convention of its plots; see CAVEAT.

    compute: C; tokens: D; codes: V of N_v = 2 V width; normalised_loss: L_u.
    """

    compute: float
    tokens: float
    codes: float
    normalised_loss: float

    @classmethod
    def at(cls, compute: float, width: int) -> Law:
        slope, intercept = PRINTED["L_u ~ log C"]
        return cls(
            compute,
            tokens=_printed("D ~ C^c", compute),
            codes=_printed("N_v ~ C^a", compute) / (2 * width),
            normalised_loss=slope * math.log10(compute) + intercept,
        )

    @classmethod
    def of(cls, model: ModelConfig) -> Law:
        """At the compute for which Eq. 12 asks for this model's N_nv."""
        exponent, intercept = PRINTED["N_nv ~ C^b"]
        forward = forward_flops(model.layers, model.width)
        return cls.at((forward / 10**intercept) ** (1 / exponent), model.width)


def _printed(law: str, compute: float) -> float:
    exponent, intercept = PRINTED[law]
    return 10**intercept * compute**exponent


@dataclass(frozen=True)
class Plan:
    """See `make_plan`. Indices 0 and 1 of `memory` and `largest`: all activations kept, and checkpointed."""

    model: ModelConfig
    training: TrainingConfig
    zero: Zero
    ranks: int
    capacity: int
    data: Data
    memory: tuple[Memory, Memory]
    largest: tuple[int, int]
    mfu: float
    peak: float
    checkpoint_bytes: int
    export_bytes: int
    notes: tuple[str, ...]

    @property
    def positions(self) -> float:
        """Of a step, over all ranks."""
        return float(self.training.micro_batches * self.training.micro_batch_tokens)

    @property
    def tokens(self) -> float:
        """Motion tokens with EOS of a step, over all ranks."""
        return self.positions * (self.data.motion + 1) / self.data.length

    @property
    def flops(self) -> float:
        """Of a step, over all ranks, in our convention."""
        pairs = self.positions / self.data.length * self.data.pairs
        return training_flops(self.model, positions=self.positions, scored=self.tokens, pairs=pairs)

    @property
    def seconds(self) -> float:
        """Of a step."""
        return self.flops / (self.mfu * self.peak * self.ranks)

    @property
    def checkpoints(self) -> int:
        """On disk at most: the newest, the one that is being written, and those of keep_every."""
        training = self.training
        return (
            training.keep_checkpoints
            + 1
            + (training.steps // training.keep_every if training.keep_every else 0)
        )

    @property
    def disk_bytes(self) -> int:
        return self.checkpoints * self.checkpoint_bytes + self.export_bytes

    def passes(self, tokens: float) -> float | None:
        """Over the train split, None if its size is not known."""
        return tokens / self.data.motion_tokens if self.data.motion_tokens else None


def make_plan(
    config: Path,
    ds_config: Path,
    *,
    overrides: tuple[str, ...] = (),
    ranks: int = 1,
    gpu_memory: float | None = None,
    mfu: float = 0.45,
    peak_tflops: float | None = None,
    dataset: Path | None = None,
    motion_tokens: int = 0,
    micro_batch_tokens: int | None = None,
) -> Plan:
    """Plan the run that `train.py --config --ds_config` would make.

    Args:
        config: the run's TOML.
        ds_config: DeepSpeed's JSON; stage 1, 2 or 3, offload to the CPU.
        overrides: "section.key=value" of the config.
        ranks: GPUs; training.micro_batches divides by them.
        gpu_memory: GiB of one (as they are sold: 24, 80, 141); that of the present GPU without it.
        mfu: share of the peak that training reaches.
        peak_tflops: dense bfloat16 TFLOP/s of one GPU; without it the config's, what the maker of the
            present GPU states, or 989.
        dataset: a dataset folder, for codes, text width, lengths and the size of a pass.
        motion_tokens: of a pass over the train split, where there is no dataset.
        micro_batch_tokens: instead of the config's.

    Raises:
        ScaMoError: a file or a value is not usable; it is named.
    """
    given = {"ranks": ranks, "mfu": mfu, "gpu_memory": gpu_memory, "peak_tflops": peak_tflops}
    for name, value in (given | {"micro_batch_tokens": micro_batch_tokens}).items():
        if value is not None and not 0 < value < float("inf"):
            raise ScaMoError(f"{name} = {value}: expected a value above 0")
    if mfu > 1:
        raise ScaMoError(f"mfu = {mfu}: expected a share of the peak in (0, 1]")
    if motion_tokens < 0:
        raise ScaMoError(f"motion_tokens = {motion_tokens}: expected 0 or more")
    run = load_config(RunConfig, config, overrides)
    training = run.training
    if micro_batch_tokens is not None:
        training = dataclasses.replace(training, micro_batch_tokens=micro_batch_tokens)
    notes: list[str] = []
    model, data = _model_and_data(run, dataset, motion_tokens, notes)
    if training.micro_batch_tokens < data.longest:
        raise ScaMoError(
            f"training.micro_batch_tokens = {training.micro_batch_tokens}: "
            f"the longest sample takes {data.longest} positions"
        )

    raw = read_ds_config(ds_config)
    requested = raw.get("bf16", {}).get("enabled", "auto")
    if requested not in (True, False, "auto"):
        raise ScaMoError(f'{ds_config}: bf16.enabled = {requested!r}: expected true, false or "auto"')
    if requested == "auto":
        notes.append('bf16.enabled = "auto": taken as true, a GPU that has bfloat16')
    resolved = resolve_ds_config(raw, training, world=ranks, bf16=requested is not False, path=ds_config)
    zero = Zero.of(resolved)

    capacity = _capacity(gpu_memory)
    peak = 1e12 * (peak_tflops or training.peak_tflops) or _present_peak()
    if not peak:
        peak = 1e12 * PEAK_TFLOPS
        notes.append(f"peak of {PEAK_TFLOPS:g} TFLOP/s assumed (H100, H200): give --peak-tflops")
    if training.kernels == "torch":
        notes.append("training.kernels = torch: the float32 copies that it works on are not counted")
    ema = training.ema_decay > 0
    exports = 1 + ema

    def of(positions: int, checkpoint: bool) -> Memory:
        batch = Batch.of(positions, data.text, data.motion, data.longest)
        kernels = "torch" if training.kernels == "torch" else "triton"
        return Memory(
            memory.states(model, zero, ranks, ema=ema),
            memory.gathered_bytes(model, zero, ranks),
            memory.activations(model, batch, zero.b, checkpoint=checkpoint, kernels=kernels),
            memory.CONTEXT_BYTES + round(memory.FRAGMENTATION * capacity),
        )

    def largest(checkpoint: bool) -> int:
        """By bisection: the need grows with the positions."""
        low, high = 0, 1
        while of(high * STEP, checkpoint).total <= capacity:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if of(middle * STEP, checkpoint).total <= capacity else (low, middle)
        return low * STEP if low * STEP >= data.longest else 0

    return Plan(
        model=model,
        training=training,
        zero=zero,
        ranks=ranks,
        capacity=capacity,
        data=data,
        memory=(of(training.micro_batch_tokens, False), of(training.micro_batch_tokens, True)),
        largest=(largest(False), largest(True)),
        mfu=mfu,
        peak=peak,
        checkpoint_bytes=memory.checkpoint_bytes(model, zero, ranks, ema=ema),
        export_bytes=exports * memory.export_bytes(model),
        notes=tuple(notes),
    )


def _capacity(gpu_memory: float | None) -> int:
    if gpu_memory is not None:
        return int(gpu_memory * GIB)
    if not torch.cuda.is_available():
        raise ScaMoError("gpu_memory is missing, and there is no GPU here to take it from: give it in GiB")
    return int(torch.cuda.get_device_properties(0).total_memory)


def _present_peak() -> float:
    return stated_peak(torch.cuda.get_device_name(0)) if torch.cuda.is_available() else 0.0


def _model_and_data(
    run: RunConfig, dataset: Path | None, motion_tokens: int, notes: list[str]
) -> tuple[ModelConfig, Data]:
    """The model with codes and text_width filled in, and the samples."""
    model = run.model
    if dataset is not None:
        return _from_dataset(run, dataset)
    codes, text_width = model.codes, model.text_width
    if not codes:
        codes = _tokenizer_codes(Path(run.data.tokenizer)) if run.data.tokenizer else 0
    if not codes:
        codes = CODES
        notes.append(f"model.codes = {codes:,} assumed: give --dataset or model.codes")
    if not text_width:
        text_width = TEXT_WIDTH
        notes.append(f"model.text_width = {text_width:,} assumed (flan-t5-xl): give --dataset")
    model = dataclasses.replace(model, codes=codes, text_width=text_width)
    text = 1 if model.text == "sentence" else min(TEXT_LENGTH, model.max_text)
    motion = min(MOTION_LENGTH, model.max_motion)
    notes.append(f"samples of {text} text and {motion} motion positions assumed: give --dataset")
    pairs = attended_pairs([text + motion], model.both_ways(np.array([text])))
    data = Data(text, motion, pairs, model.max_positions - 1, motion_tokens)
    return model, _drop_text(data, run.training.drop_text, [motion])


def _drop_text(data: Data, probability: float, motion: ArrayLike) -> Data:
    """The same samples, `probability` of which have one state in place of their text; motion: lengths."""
    length = 1 + np.asarray(motion)
    alone = attended_pairs(length, np.ones_like(length)) / len(length)
    return dataclasses.replace(
        data,
        text=data.text + probability * (1 - data.text),
        pairs=data.pairs + probability * (alone - data.pairs),
    )


def _tokenizer_codes(folder: Path) -> int:
    """0 where there is no tokenizer."""
    from scamo.tokenizers import load_tokenizer

    return load_tokenizer(folder).codes if folder.is_dir() else 0


def _from_dataset(run: RunConfig, folder: Path) -> tuple[ModelConfig, Data]:
    from scamo.data.dataset import MotionDataset

    dataset = MotionDataset.open(folder)
    tokens, text = dataset.tokens(run.data.tokens), dataset.text_states(run.data.text)
    model = run.model
    for name, value in (("codes", tokens.codes), ("text_width", text.width)):
        stated = getattr(model, name)
        if stated not in (0, value):
            raise ScaMoError(f"model.{name} = {stated}, but the dataset has {value}: leave it out, or 0")
    model = dataclasses.replace(model, codes=tokens.codes, text_width=text.width)
    limit = 1 if model.text == "sentence" else model.max_text
    items = [item for item in dataset.items("train") if 1 <= tokens.lengths[item] <= model.max_motion]
    if not items:
        raise ScaMoError(f"{folder}: no item of split train has 1 to {model.max_motion} tokens")
    counts = np.array([len(dataset.captions_of(item)) for item in items])
    captions = np.concatenate([dataset.captions_of(item) for item in items])
    prefix = np.minimum(text.lengths[captions], limit)
    motion = tokens.lengths[items]
    length = prefix + np.repeat(motion, counts)
    # A draw takes an item, then one of its captions.
    weight = np.repeat(1 / (counts * len(items)), counts)
    seen = model.both_ways(prefix)
    one = np.array([attended_pairs([n], [p]) for n, p in zip(length, seen, strict=True)])
    data = Data(
        text=float(prefix @ weight),
        motion=float(motion.mean()),
        pairs=float(one @ weight),
        longest=int(length.max()),
        motion_tokens=int((motion + 1).sum()),
    )
    return model, _drop_text(data, run.training.drop_text, motion)


def as_dict(plan: Plan) -> dict[str, Any]:
    """JSON values: bytes, seconds, FLOPs and counts without units of their own."""
    law = Law.of(plan.model)
    memories = {}
    for name, of, largest in zip(("all", "checkpointed"), plan.memory, plan.largest, strict=True):
        memories[name] = {
            **dataclasses.asdict(of.states),
            "gathered": of.gathered,
            **{f"activations_{key}": value for key, value in dataclasses.asdict(of.activations).items()},
            "allowance": of.allowance,
            "total": of.total,
            "largest_micro_batch_tokens": largest,
        }
    tokens = plan.tokens * plan.training.steps
    return {
        "model": dataclasses.asdict(plan.model),
        "parameters": parameters(plan.model),
        "block_parameters": block_parameters(plan.model),
        "zero": dataclasses.asdict(plan.zero),
        "ranks": plan.ranks,
        "gpu_memory": plan.capacity,
        "data": dataclasses.asdict(plan.data),
        "micro_batch_tokens": plan.training.micro_batch_tokens,
        "micro_batches": plan.training.micro_batches,
        "memory": memories,
        "flops_per_position": plan.flops / plan.positions,
        "flops_per_motion_token": plan.flops / plan.tokens,
        "paper_flops_per_motion_token": paper_flops(plan.model, 1),
        "mfu": plan.mfu,
        "peak_flops": plan.peak,
        "positions_per_second": plan.positions / plan.seconds,
        "motion_tokens_per_second": plan.tokens / plan.seconds,
        "step_seconds": plan.seconds,
        "training_seconds": plan.seconds * plan.training.steps,
        "checkpoint_bytes": plan.checkpoint_bytes,
        "checkpoints": plan.checkpoints,
        "export_bytes": plan.export_bytes,
        "disk_bytes": plan.disk_bytes,
        "run": {
            "compute": paper_flops(plan.model, tokens),
            "tokens": tokens,
            "passes": plan.passes(tokens),
        },
        "law": {**dataclasses.asdict(law), "passes": plan.passes(law.tokens), "caveat": CAVEAT},
        "notes": list(plan.notes),
    }


def as_text(plan: Plan) -> str:
    """Tables for people; memory in GiB (2^30), disk in GB (10^9)."""
    return "\n".join([*_head(plan), "", *_memory_table(plan), "", *_speed(plan), "", *_law(plan)])


def _head(plan: Plan) -> list[str]:
    model, zero = plan.model, plan.zero
    offload = [name for name in ("optimizer", "param") if getattr(zero, f"offload_{name}")]
    precision = "bf16" if zero.b == 2 else "fp32"
    return [
        f"{parameters(model):,} parameters, {block_parameters(model):,} of them in blocks; "
        f"{model.codes:,} codes, text width {model.text_width:,}",
        f"ZeRO-{zero.stage} in {precision}, gradients summed in {8 * zero.accumulate} bits"
        + (f", {' and '.join(offload)} on the host" if offload else "")
        + f"; {plan.ranks} x {plan.capacity / GIB:.4g} GiB",
        *(f"  {note}" for note in plan.notes),
    ]


def _memory_table(plan: Plan) -> list[str]:
    size = plan.training.micro_batch_tokens
    lines = [
        f"{f'GiB of a rank at micro_batch_tokens = {size:,}':<54}{'all kept':>10}{'checkpointed':>14}",
    ]

    def row(label: str, values: list[float], text: str = "{:,.2f}") -> None:
        first, second = (text.format(value) for value in values)
        lines.append(f"  {label:<52}{first:>10}{second:>14}")

    def gib(label: str, values: list[int]) -> None:
        row(label, [value / GIB for value in values])

    states = plan.memory[0].states
    copies = [
        ("weights that compute", states.weights),
        ("optimizer: float32 masters and two moments", states.optimizer),
        ("moving average of the weights", states.ema),
        ("gradients, accumulated", states.gradients),
        ("DeepSpeed's communication buckets", states.buckets),
        ("weights gathered by ZeRO-3", plan.memory[0].gathered),
    ]
    for label, value in copies:
        if value:
            gib(label, [value, value])
    gib("activations of a micro-batch, loss's gradients", [m.activations.kept for m in plan.memory])
    gib(
        "logits, or what the backward works with",
        [max(m.activations.loss, m.activations.backward) for m in plan.memory],
    )
    over = [
        max(0, m.states.update - m.states.gradients - m.states.buckets - m.gathered - m.activations.peak)
        for m in plan.memory
    ]
    if any(over):
        gib("what the update needs beyond all that", over)
    gib("assumed: CUDA, NCCL, fragmentation", [m.allowance for m in plan.memory])
    gib("total", [m.total for m in plan.memory])
    row("fits", [m.total <= plan.capacity for m in plan.memory], "{!s}")
    row("largest micro_batch_tokens that fits (0: none)", list(plan.largest), "{:,}")
    host = states.host
    if host:
        lines.append(f"  host memory of a rank: {host / GIB:,.2f}")
    lines.append(f"  host memory of a rank at start, once: {4 * parameters(plan.model) / GIB:,.2f}")
    return lines


def _speed(plan: Plan) -> list[str]:
    training, seconds, gb = plan.training, plan.seconds, 1e9
    paper = paper_flops(plan.model, 1)
    return [
        f"FLOPs a position: {plan.flops / plan.positions:.3e}",
        f"FLOPs a motion token: {plan.flops / plan.tokens:.3e}, in the paper's convention {paper:.3e}",
        f"Step: {training.micro_batches} x {training.micro_batch_tokens:,} positions, "
        f"{seconds:.4g} s at {plan.mfu:.0%} of {plan.peak / 1e12:g} TFLOP/s",
        f"Speed: {plan.positions / seconds:,.0f} positions/s, {plan.tokens / seconds:,.0f} motion tokens/s",
        f"Training: {_duration(seconds * training.steps)} for {training.steps:,} steps",
        f"Disk: {plan.disk_bytes / gb:,.2f} GB: {plan.checkpoints} checkpoints of "
        f"{plan.checkpoint_bytes / gb:,.2f} GB, one being written; exports {plan.export_bytes / gb:,.2f} GB",
    ]


def _law(plan: Plan) -> list[str]:
    law, tokens = Law.of(plan.model), plan.tokens * plan.training.steps
    compute = paper_flops(plan.model, tokens)
    return [
        f"This run: D = {tokens:.3g} motion tokens{_passes(plan, tokens)}, C = {compute:.3g}",
        f"The paper's law for this size: D = {law.tokens:.3g} (Eq. 13){_passes(plan, law.tokens)}, "
        f"C = {law.compute:.3g} (Eq. 12),",
        f"  {law.codes:,.0f} codes (Eq. 11), L_u = {law.normalised_loss:.2f} (Eq. 14); "
        "both C in the paper's convention",
        f"  Caution: {CAVEAT}",
    ]


def _passes(plan: Plan, tokens: float) -> str:
    passes = plan.passes(tokens)
    return " (passes unknown: give --dataset)" if passes is None else f" ({passes:.3g} passes)"


def _duration(seconds: float) -> str:
    hours = seconds / 3600
    return f"{hours:.3g} h" if hours < 48 else f"{hours / 24:.3g} days"
