"""Everything that touches DeepSpeed: devices, process group, engine, and the state of its gradients.

Traps of DeepSpeed 0.19.8 that are handled here: `zero.Init` would turn float32 buffers to bfloat16 and undo
custom initialisation, so the model is built plainly; its CPU side compiles a shared-memory library at start
that training never calls, so it is told that there is none; a step with a NaN gradient is skipped in silence,
so the gradients are looked at before the step (`gradients_finite`).
"""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from scamo.config import TrainingConfig
from scamo.errors import ScaMoError
from scamo.training.guards import World

# What a CPU calls the instructions that make bfloat16 faster than float32.
CPU_BF16_FLAGS = {"amx_bf16", "avx512_bf16", "bf16"}


def choose_device(world: World) -> torch.device:
    """This rank's GPU, or the CPU where there is none or DS_ACCELERATOR=cpu asks for it.

    Raises ScaMoError when there are more ranks than GPUs.
    """
    if os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available():
        # Without this DeepSpeed looks for accelerators on its own and warns.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        return torch.device("cpu")
    if world.local_rank >= torch.cuda.device_count():
        raise ScaMoError(
            f"rank {world.local_rank} of this machine has no GPU, there are {torch.cuda.device_count()}: "
            f"use --num_gpus {torch.cuda.device_count()}"
        )
    torch.cuda.set_device(world.local_rank)
    return torch.device("cuda", world.local_rank)


def device_facts(device: torch.device) -> tuple[str, bool]:
    """What to call the device, and whether it computes in bfloat16 natively."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return f"{torch.cuda.get_device_name(device)} ({device})", native
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return f"this CPU ({fields.get('model name', 'unknown')})", bool(flags & CPU_BF16_FLAGS)


class Ranks:
    """The process group: gloo on CPU, NCCL on CUDA."""

    def __init__(self, world: World, device: torch.device) -> None:
        import deepspeed

        self.rank, self.size, self.device = world.rank, world.size, device
        world.export()
        # DeepSpeed calls names that torch has renamed.
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\..*")
        if device.type == "cpu":
            # DeepSpeed would probe and build its operators with a C++ compiler here (40 s the first time);
            # they serve tensor-parallel inference only.
            deepspeed.ops.__compatible_ops__ = {}  # type: ignore[attr-defined]
        backend = "nccl" if device.type == "cuda" else "gloo"
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)

    def barrier(self) -> None:
        dist.barrier()

    def gather(self, value: Any) -> list[Any]:
        """Every rank's picklable value, in rank order, on every rank."""
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, value)
        return parts

    def gather_vector(self, vector: Tensor) -> Tensor:
        """Every rank's float64 vector (n,) as (ranks, n) on the host: the one synchronisation of a step."""
        parts = [torch.empty_like(vector) for _ in range(self.size)]
        dist.all_gather(parts, vector)
        return torch.stack(parts).cpu()

    def close(self) -> None:
        dist.barrier()
        dist.destroy_process_group()


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: what decays, and the norms, biases and embeddings, which do not."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for parameter in model.parameters():
        (free if parameter.ndim < 2 or id(parameter) in embeddings else decayed).append(parameter)
    groups = (decayed, weight_decay), (free, 0.0)
    return [{"params": group, "weight_decay": decay} for group, decay in groups if group]


def build_engine(
    model: nn.Module, ds_config: dict[str, Any], training: TrainingConfig, device: torch.device
) -> Any:
    """`deepspeed.initialize` with torch's AdamW (fused where DeepSpeed leaves the states on the device).

    Args:
        model: built plainly, in float32, on the CPU; every rank gets rank 0's weights.
        ds_config: from `resolve_ds_config`.
        training: rate, betas, eps and weight decay.
        device: this rank's.

    Raises:
        ScaMoError: DeepSpeed refuses a value of the configuration; carries the first line of its message.
    """
    import deepspeed
    from deepspeed.runtime.config import DeepSpeedConfigError
    from pydantic import ValidationError

    optimizer = torch.optim.AdamW(
        parameter_groups(model, training.weight_decay),
        lr=training.learning_rate,
        betas=training.betas,
        eps=training.eps,
        fused=True,
    )
    try:
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=ds_config, dist_init_required=False
        )
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ScaMoError(f"DeepSpeed refuses {where} = {first['input']!r}: {first['msg']}") from None
    except DeepSpeedConfigError as error:
        raise ScaMoError(f"DeepSpeed refuses its configuration: {str(error).splitlines()[0]}") from None
    if type(engine.optimizer).__name__ == "BF16_Optimizer":
        # That of bfloat16 ZeRO-1 does not save its stage, and DeepSpeed's converter refuses what it saved.
        state_dict = engine.optimizer.state_dict
        engine.optimizer.state_dict = lambda: {**state_dict(), "zero_stage": 1}
    return engine


def gradients_finite(engine: Any) -> Tensor:
    """bool () on the device: whether this rank's share of the reduced gradients is finite (no host sync).

    To be called after the last backward of a step. `p.grad` is None under ZeRO; these are the flat partitions
    that the optimizer is about to read.
    """
    optimizer = engine.optimizer
    flats: list[Tensor] = []
    if getattr(optimizer, "fp32_partitioned_groups_flat", None) is not None:  # ZeRO-3
        if optimizer.offload_optimizer:
            flats = [flat.grad for flat in optimizer.fp32_partitioned_groups_flat if flat.grad is not None]
        else:
            flats = [optimizer.grad_partitions_flat_buffer]
    elif hasattr(optimizer, "averaged_gradients"):  # ZeRO-1 and -2
        for group in optimizer.averaged_gradients.values():
            flats += [group] if isinstance(group, Tensor) else list(group or [])
        if getattr(optimizer, "cpu_offload", False):
            flats = [g.grad for g in optimizer.single_partition_of_fp32_groups if g.grad is not None]
    elif hasattr(
        optimizer, "fp32_groups_gradient_flat_partition"
    ):  # bfloat16 ZeRO-1 with float32 accumulation
        flats = list(optimizer.fp32_groups_gradient_flat_partition)
    flats = [flat for flat in flats if flat is not None and flat.numel()]
    if not flats:
        raise RuntimeError(f"{type(optimizer).__name__} holds no gradients where this DeepSpeed keeps them")
    # Both ends are finite only when everything between them is; a tenth of isfinite's time on a CPU.
    ends = [end.to(engine.device).float() for flat in flats for end in torch.aminmax(flat)]
    return torch.stack(ends).isfinite().all()


def set_learning_rate(engine: Any, rate: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = rate


def model_state(checkpoint: Path, tag: str) -> dict[str, Tensor]:
    """Float32 weights, merged from the master shards of a verified checkpoint, on the CPU."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    # The converter prints its bookkeeping, and two bars.
    silence = io.StringIO()
    with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
        return get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), tag=tag)
