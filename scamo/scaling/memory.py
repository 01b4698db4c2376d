"""Memory of a training rank by part, from the shapes alone, and the bytes of a checkpoint.

States follow what DeepSpeed 0.19.8 holds (seen in its engines: tests/scaling/test_memory.py), activations
what autograd saves of our layers. Letters: N parameters of the model, b bytes of a weight that computes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch
from scamo_kernels.linear_cross_entropy import _SUMMAND as SUMMAND
from scamo_kernels.linear_cross_entropy import chunk_rows

from scamo.config import ModelConfig
from scamo.errors import ScaMoError
from scamo.models.layers import storage_dim
from scamo.scaling.flops import parameters

# Assumed, not computed: the CUDA context, NCCL and cuBLAS workspaces; and what the allocator cannot use.
CONTEXT_BYTES = 3 * 2**29
FRAGMENTATION = 0.03
# Beside the tensors: DeepSpeed's scripts once, the headers and pickles of each rank.
CHECKPOINT_FILES, CHECKPOINT_FILES_PER_RANK = 50_000, 20_000
# What the BF16 optimizer of stage 1 reduces at once.
ALLREDUCE_ELEMENTS = 500_000_000
_DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Zero:
    """What of a DeepSpeed configuration decides memory; sizes in elements.

    stage: 1, 2 or 3. b, accumulate, communicate: bytes of a weight that computes, of an accumulated gradient,
    of a gradient on its way. offload_optimizer, offload_param: to the host. reduce_bucket: of gradients, of
    which there are `buffers`; prefetch, live, reuse: see `gathered_bytes`; sub_group: what ZeRO-3 updates at
    once. accumulates: whether a step has several micro-batches per rank.
    """

    stage: int
    b: int
    accumulate: int
    communicate: int
    offload_optimizer: bool = False
    offload_param: bool = False
    reduce_bucket: int = 500_000_000
    buffers: int = 1
    prefetch: int = 50_000_000
    live: int = 1_000_000_000
    reuse: int = 1_000_000_000
    sub_group: int = 1_000_000_000
    accumulates: bool = True

    @classmethod
    def of(cls, ds_config: dict[str, Any]) -> Zero:
        """From what `resolve_ds_config` returns.

        Raises:
            ScaMoError: naming the key, a value that is no number, dtype or device.
        """
        zero = ds_config["zero_optimization"]
        b = 2 if ds_config["bf16"]["enabled"] else 4

        def size(key: str, default: int) -> int:
            value = zero.get(key, zero.get("stage3_" + key, "auto"))
            if value == "auto":
                return default
            if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
                raise ScaMoError(f"zero_optimization.{key} = {json.dumps(value)}: expected 0 or more")
            return int(value)

        def dtype(value: Any, key: str) -> int:
            if value is None:
                return b
            if value not in _DTYPE_BYTES:
                raise ScaMoError(f"{key} = {json.dumps(value)}: expected {', '.join(_DTYPE_BYTES)}")
            return _DTYPE_BYTES[value]

        def offloads(key: str) -> bool:
            section = zero.get(key) or {}
            device = section.get("device", "none") if isinstance(section, dict) else section
            if device not in ("none", "cpu"):
                raise ScaMoError(
                    f"zero_optimization.{key}.device = {json.dumps(device)}: expected none or cpu"
                )
            return device == "cpu"

        stage = zero["stage"]
        offload_param = offloads("offload_param")
        if offload_param and stage != 3:
            raise ScaMoError(f"zero_optimization.offload_param: needs stage 3, the file has {stage}")
        double = stage < 3 and bool(zero.get("overlap_comm", False))
        return cls(
            stage=stage,
            b=b,
            accumulate=dtype(ds_config.get("data_types", {}).get("grad_accum_dtype"), "grad_accum_dtype"),
            communicate=dtype(ds_config.get("communication_data_type"), "communication_data_type"),
            offload_optimizer=offloads("offload_optimizer"),
            offload_param=offload_param,
            reduce_bucket=size("reduce_bucket_size", cls.reduce_bucket),
            buffers=0 if not zero.get("contiguous_gradients", True) else 2 if double else 1,
            prefetch=size("prefetch_bucket_size", cls.prefetch),
            live=size("max_live_parameters", cls.live),
            reuse=size("max_reuse_distance", cls.reuse),
            sub_group=size("sub_group_size", cls.sub_group),
            accumulates=ds_config["gradient_accumulation_steps"] > 1,
        )

    @property
    def whole_float32_gradients(self) -> bool:
        """Stage 1 in bfloat16 with float32 accumulation runs another optimizer (BF16_Optimizer)."""
        return self.stage == 1 and self.b == 2 and self.accumulate == 4 and not self.offload_optimizer


@dataclass(frozen=True)
class Batch:
    """A packed micro-batch: positions, text positions and scored rows; longest: its longest sample."""

    positions: int
    text: int
    scored: int
    longest: int

    @classmethod
    def of(cls, positions: int, text_length: float, motion_length: float, longest: int) -> Batch:
        """`positions` filled with samples of these mean lengths; each scores one row more than its motion."""
        length = text_length + motion_length
        scored = positions * (motion_length + 1) / length
        return cls(positions, round(positions * text_length / length), round(scored), longest)


@dataclass(frozen=True)
class States:
    """Bytes per rank on the device, and on the host what is offloaded.

    weights, optimizer (masters and moments) and ema stay. gradients: at the end of a step's last backward;
    buckets: DeepSpeed's for communication, in the backward. update: gradients, their copies and buckets while
    the optimizer steps, when no activations are there.
    """

    weights: int
    optimizer: int
    ema: int
    gradients: int
    buckets: int
    update: int
    host: int = 0


def states(model: ModelConfig, zero: Zero, ranks: int, *, ema: bool = False) -> States:
    """States of one of `ranks` ranks; model.codes and model.text_width must be filled in."""
    whole, largest = parameters(model), _largest_parameter(model)
    part = -(-whole // ranks)
    b, accumulate = zero.b, zero.accumulate
    weights, optimizer, average = (part if zero.stage == 3 else whole) * b, 12 * part, 4 * part * ema
    buckets = bucket = zero.communicate * zero.buffers * zero.reduce_bucket
    # Masters take a flat copy of their gradients, and one in float32 when these were not.
    copies = 4 + (accumulate if accumulate != 4 else 0)
    if zero.stage == 3:
        gradients = part * accumulate
        update = gradients + bucket + copies * min(part, max(zero.sub_group, largest // ranks))
        # The gradients of a full bucket are laid out by rank in a copy.
        buckets += zero.communicate * min(zero.reduce_bucket, whole)
    elif zero.whole_float32_gradients:
        gradients, buckets = whole * (b + 4), 0
        # Both parameter groups are reduced from one copy, unless the first alone fills its bucket.
        matrices = whole - model.width * (model.codes + 2)
        update = gradients + (4 * whole if matrices <= ALLREDUCE_ELEMENTS else 0)
    elif zero.stage == 1:
        gradients = whole * max(b, accumulate)
        update = max(gradients + part * accumulate + bucket, part * (accumulate + copies))
    elif accumulate != b:
        gradients = update = part * accumulate
    else:
        # Those of the micro-batches before and of this one.
        gradients, update = part * b * (2 if zero.accumulates else 1), part * (accumulate + copies)
    if not zero.offload_optimizer:
        return States(weights, optimizer, average, gradients, buckets, update)

    # The accumulated gradients and their float32 copy are there too.
    host = optimizer + average + part * (4 + accumulate)
    if zero.stage == 3:
        gradients, update = 0, bucket
        if zero.offload_param:
            host, weights = host + weights, 0
    else:
        # Weights come back through a buffer of the host; one of the largest gradient is on both sides.
        host += (part + largest) * b
        gradients, update = (gradients if accumulate != b else part * b), gradients
        buckets += largest * b
    return States(weights, 0, 0, gradients, buckets, update, host)


def gathered_bytes(model: ModelConfig, zero: Zero, ranks: int) -> int:
    """Weights that ZeRO-3 holds whole at once; with one rank on its own device they are whole anyway.

    After every module DeepSpeed fetches ahead until `live` parameters are whole; when the forward ends it
    keeps what the backward uses again within the reuse distance, half of which lies on either side. The
    module at work comes on top, and the second copy in which what is fetched ahead arrives.
    """
    if zero.stage != 3 or (ranks == 1 and not zero.offload_param):
        return 0
    whole = parameters(model)
    live = max(zero.live if zero.prefetch else 0, zero.reuse // 2) + _largest_parameter(model)
    return zero.b * (min(whole, live) + min(whole, zero.prefetch))


@dataclass(frozen=True)
class Activations:
    """Bytes on the device for one micro-batch.

    kept: saved by the forward, with the batch. loss: what the head's forward adds to that at its peak.
    backward: what the backward adds to `kept` at its peak.
    """

    kept: int
    loss: int
    backward: int

    @property
    def peak(self) -> int:
        return self.kept + max(self.loss, self.backward)


def activations(
    model: ModelConfig,
    batch: Batch,
    b: int,
    *,
    checkpoint: bool = False,
    kernels: str = "triton",
    device: str = "cuda",
) -> Activations:
    """What autograd saves of the model's layers, and what works beside it.

    Args:
        model: codes and text_width filled in.
        batch: a micro-batch.
        b: bytes of an activation, 2 or 4.
        checkpoint: only the blocks' inputs are kept.
        kernels: the implementation, "triton" or "torch".
        device: decides the columns of a head (104 for 100 on CUDA) and the chunks of the logits. A CPU's
            rounding of rows to 64 in bfloat16 is left out.
    """
    width, hidden, rows, scored = model.width, model.hidden, batch.positions, batch.scored
    storage = storage_dim(model.head_dim, torch.device(device))
    heads = model.heads * storage
    turned = 2 * heads * _keeps_turned(model, batch.longest, b, kernels)
    # The norm keeps the stream and its float32 scale, the products their inputs, attention q, k, v, its
    # output, the turned q and k, and its log-sum-exp.
    norm = b * width + 4
    attention = norm + b * (width + 4 * heads + turned) + 4 * model.heads * (kernels == "triton")
    feed_forward = norm + b * (width + 3 * hidden)
    block = rows * (attention + feed_forward)
    # The last block goes on with the scored rows, and keeps its attention's output once more for them.
    last = rows * attention + scored * (feed_forward + b * heads)

    # Text states in float32 and as computed with, and indices.
    inputs = batch.text * model.text_width * (4 if b == 4 else 4 + b) + rows * 16 + 16 * scored
    gradients = b * width * (scored + model.codes + 1)  # of hidden and of the head's weight
    kept = inputs + scored * norm + gradients
    # In the backward a block needs most at SwiGLU: its gradients, beside those of two weights.
    work, weights = b * (2 * hidden + width), 2 * b * width * hidden
    stream = rows * b * width
    if checkpoint:
        kept += (2 * model.layers - 1) * stream
        phases = [last + scored * work, block + rows * work - 2 * stream]  # the block after it is done with
    else:
        kept += (model.layers - 1) * block + last
        phases = [scored * work, rows * work - last]
    if model.layers == 1:
        phases.pop()
    # The head comes first: there are the saved gradients and what is made of them.
    backward = max(gradients, max(phases) + weights - gradients)
    return Activations(kept, _loss_peak(model, scored, b, kernels, device), backward)


def _loss_peak(model: ModelConfig, scored: int, b: int, kernels: str, device: str) -> int:
    """The chunk of logits, and the weight's gradient in float32 where several chunks add up to it."""
    classes, width = model.codes + 1, model.width
    stride = classes if device == "cpu" and kernels == "torch" else -(-classes // 64) * 64
    chunk = min(chunk_rows(torch.device(device), stride * b), max(1, scored))
    logits = chunk * stride * b
    if scored <= chunk:
        return logits
    # In bfloat16 the float32 sum stands beside the gradient that `kept` counts, else a summand does.
    return logits + (4 * classes * width if b < 4 else 4 * min(classes * width, SUMMAND))


def _keeps_turned(model: ModelConfig, longest: int, b: int, kernels: str) -> bool:
    """Whether attention keeps q and k turned; on Hopper its backward turns those of short samples itself."""
    if kernels == "torch":
        return True
    try:
        from scamo_kernels import _attention_triton as attention
    except ImportError:
        return True
    bucket = next(i for i, length in enumerate(attention.LENGTHS) if longest <= length)
    storage = storage_dim(model.head_dim, torch.device("cuda"))
    _, config = attention.table(90, "half" if b == 2 else "single", storage)[bucket]
    return not (isinstance(config, attention.SampleConfig) and config.turns)


def _largest_parameter(model: ModelConfig) -> int:
    return model.width * max(model.codes + 2, model.text_width, 2 * model.hidden)


def checkpoint_bytes(model: ModelConfig, zero: Zero, ranks: int, *, ema: bool = False) -> int:
    """One checkpoint on disk, all ranks: masters and moments in float32, below stage 3 the weights, the EMA.

    ZeRO-3 saves no weights: they are the masters rounded.
    """
    per_parameter = 12 + (zero.b if zero.stage < 3 else 0) + 4 * ema
    files = CHECKPOINT_FILES + CHECKPOINT_FILES_PER_RANK * ranks
    return parameters(model) * per_parameter + files


def export_bytes(model: ModelConfig) -> int:
    """The exported transformer in float32, without the tokenizer beside it."""
    return 4 * parameters(model)
