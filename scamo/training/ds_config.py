"""The DeepSpeed configuration: one JSON file whose "auto" values are filled from the run's own configuration.

A value that both files state must agree: a disagreement is an error that names the key.
"""

from __future__ import annotations

import difflib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scamo.config import TrainingConfig
from scamo.errors import ScaMoError

# DeepSpeed ignores an unknown key at the top level; we don't.
KNOWN_KEYS = {
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"),
    *("gradient_clipping", "gradient_allreduce_op", "gradient_predivide_factor", "prescale_gradients"),
    *("optimizer", "scheduler", "bf16", "fp16", "data_types", "communication_data_type"),
    *("zero_optimization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"),
    *("activation_checkpointing", "checkpoint", "compile", "compression_training", "elasticity"),
    *("steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state", "flops_profiler"),
    *("comms_logger", "csv_monitor", "tensorboard", "wandb"),
}
REFUSED_KEYS = {
    "scheduler": "the rate is a function of the step: use training.learning_rate and training.warmup_ratio",
    "fp16": "training runs in bf16 or float32: use bf16",
}


@dataclass(frozen=True)
class Precision:
    """bf16: whether the weights that compute are bfloat16 (the masters are float32 either way).

    note: one sentence for the user, or "".
    """

    bf16: bool
    note: str = ""


def read_ds_config(path: Path) -> dict[str, Any]:
    """Read the JSON file. Raises ScaMoError that names the file, and the line of a syntax error."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ScaMoError(f"{path}: no such DeepSpeed configuration") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ScaMoError(f"{path}: not readable: {error}") from None
    except json.JSONDecodeError as error:
        raise ScaMoError(f"{path}: not valid JSON: line {error.lineno}: {error.msg}") from None
    if not isinstance(data, dict):
        raise ScaMoError(f"{path}: expected a JSON object, got {type(data).__name__}")
    for key in data:
        if key in REFUSED_KEYS and not _is_disabled(data[key]):
            raise ScaMoError(f"{path}: {key}: {REFUSED_KEYS[key]}")
        if key not in KNOWN_KEYS:
            close = difflib.get_close_matches(key, KNOWN_KEYS, 1)
            raise ScaMoError(f"{path}: unknown key {key}" + (f"; did you mean {close[0]}?" if close else ""))
    for key in ("bf16", "data_types", "zero_optimization"):
        if not isinstance(data.get(key, {}), dict):
            raise ScaMoError(f"{path}: {key} = {json.dumps(data[key])}: expected an object")
    return data


def resolve_precision(
    requested: Any, device_name: str, device_bf16: bool, *, cuda: bool, path: Path
) -> Precision:
    """Choose bfloat16 or float32.

    Args:
        requested: the file's bf16.enabled: true, false or "auto".
        device_name: what the user knows the device as.
        device_bf16: whether the device computes in bfloat16 natively.
        cuda: a GPU without bfloat16 cannot run it, a CPU without it emulates it slowly.
        path: the file, for the message.

    Raises:
        ScaMoError: bf16.enabled is true and the GPU has none, or the value is none of the three.
    """
    if requested is False:
        return Precision(bf16=False)
    if requested is True:
        if device_bf16:
            return Precision(bf16=True)
        if cuda:
            raise ScaMoError(
                f"{device_name} has no bf16: to train in float32 "
                f'set bf16.enabled in {path} to "auto" or false'
            )
        return Precision(
            bf16=True,
            note=f'{device_name} has no bf16 instructions: bf16.enabled = "auto" (float32) is faster',
        )
    if requested == "auto":
        if device_bf16:
            return Precision(bf16=True)
        return Precision(bf16=False, note=f"{device_name} has no bf16: training in float32")
    raise ScaMoError(f'{path}: bf16.enabled = {json.dumps(requested)}: expected true, false or "auto"')


def resolve_ds_config(
    data: dict[str, Any], training: TrainingConfig, *, world: int, bf16: bool, path: Path
) -> dict[str, Any]:
    """Fill the "auto" (or absent) values and check the explicit ones.

    One packed micro-batch is one unit for DeepSpeed: train_micro_batch_size_per_gpu is 1,
    train_batch_size is training.micro_batches and the accumulation is micro_batches / world.

    Returns:
        What `deepspeed.initialize` gets: no "auto" is left, and "optimizer" is gone (AdamW is built here).

    Raises:
        ScaMoError: micro_batches does not divide by the ranks, or a value contradicts `training` (named).
    """
    if training.micro_batches % world:
        raise ScaMoError(
            f"training.micro_batches = {training.micro_batches} does not divide by the {world} ranks: "
            f"use a multiple of {world}, or another number of ranks"
        )
    ours = {
        "train_batch_size": (training.micro_batches, "training.micro_batches"),
        "train_micro_batch_size_per_gpu": (1, "a packed micro-batch, which is one unit"),
        "gradient_accumulation_steps": (
            training.micro_batches // world,
            f"training.micro_batches / {world} ranks",
        ),
        "gradient_clipping": (training.clip_norm, "training.clip_norm"),
    }
    resolved = {key: value for key, value in data.items() if key not in ("optimizer", "scheduler", "fp16")}
    for key, (value, source) in ours.items():
        _agree(data, key, value, source, key, path)
        resolved[key] = value

    if "optimizer" in data:
        _check_optimizer(data["optimizer"], training, path)

    resolved["bf16"] = {**data.get("bf16", {}), "enabled": bf16}
    if not bf16:
        resolved["bf16"] = {"enabled": False}
    zero = dict(data.get("zero_optimization", {}))
    stage = zero.get("stage", 0)
    if isinstance(stage, bool) or stage not in (1, 2, 3):
        raise ScaMoError(f"{path}: zero_optimization.stage = {json.dumps(stage)}: expected 1, 2 or 3")
    # DeepSpeed drops the rest of the "auto" values inside this section and takes its defaults.
    resolved["zero_optimization"] = zero
    if any(zero.get(key, {}).get("device", "none") != "none" for key in ("offload_optimizer",)):
        # torch's AdamW steps on the CPU too; DeepSpeed's own would be compiled at start.
        resolved["zero_force_ds_cpu_optimizer"] = False
    # Progress and log are ours.
    if resolved.get("steps_per_print", "auto") == "auto":
        resolved["steps_per_print"] = 2**31
    for key, value in resolved.items():
        if value == "auto":
            raise ScaMoError(f'{path}: {key} = "auto" cannot be filled in from the run\'s configuration')
    return resolved


def _check_optimizer(section: Any, training: TrainingConfig, path: Path) -> None:
    if section == "auto":
        return
    if not isinstance(section, dict):
        raise ScaMoError(f"{path}: optimizer = {json.dumps(section)}: expected an object")
    kind = section.get("type", "auto")
    if kind not in ("auto", "AdamW"):
        raise ScaMoError(f'{path}: optimizer.type = {json.dumps(kind)}: expected "AdamW" or "auto"')
    params = section.get("params", {})
    expected: dict[str, Any] = {
        "lr": training.learning_rate,
        "betas": list(training.betas),
        "eps": training.eps,
        "weight_decay": training.weight_decay,
    }
    names = {"lr": "training.learning_rate"} | {
        key: f"training.{key}" for key in ("betas", "eps", "weight_decay")
    }
    for key in params:
        if key not in expected:
            raise ScaMoError(f"{path}: optimizer.params.{key}: expected one of {', '.join(expected)}")
        _agree(params, key, expected[key], names[key], f"optimizer.params.{key}", path)


def _agree(data: dict[str, Any], key: str, value: Any, source: str, shown: str, path: Path) -> None:
    stated = data.get(key, "auto")
    if stated == "auto":
        return
    same = stated == value and not isinstance(stated, bool)
    if isinstance(value, float) and isinstance(stated, int | float) and not isinstance(stated, bool):
        same = math.isclose(stated, value, rel_tol=1e-12)
    if not same:
        raise ScaMoError(
            f"{path}: {shown} = {json.dumps(stated)} contradicts {source}, "
            f'which gives {json.dumps(value)}: use "auto"'
        )


def _is_disabled(section: Any) -> bool:
    return isinstance(section, dict) and section.get("enabled") is False
