"""A rank of small DeepSpeed runs, started by conftest.py: trains and saves, or continues what was saved.

    shards.py train OUT             4 steps; after 2 a checkpoint OUT/VARIANT/step-0000002
    shards.py continue OUT SOURCE   the last two steps from SOURCE's checkpoints, converted

OUT/VARIANT/state-N.pt: after N updates masters, moments and averages, whole, as DeepSpeed's public functions
give them, the optimizer's counters, and the weight decays. Two of the four micro-batches are zero: the sum of
the gradients is the same in any order.
"""

import os
import sys
from pathlib import Path

import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import nn

from scamo.config import TrainingConfig
from scamo.training import checkpoint as ckpt
from scamo.training.ds_config import resolve_ds_config
from scamo.training.ema import Ema, read_ema
from scamo.training.engine import Ranks, build_engine, choose_device, gradients_finite, set_learning_rate
from scamo.training.guards import World
from scamo.training.resume import find_source, load_source, remove_converted

STEPS, SAVED, MICRO_BATCHES, DECAY = 4, 2, 4, 0.3
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
# name: (saved with, continued with), each the ZeRO section and the precision.
VARIANTS = {
    "1-bf16": (({"stage": 1}, "bf16"),) * 2,
    "2-fp32": (({"stage": 2}, "fp32"),) * 2,
    "3-bf16": (({"stage": 3}, "bf16"),) * 2,
    "3-offload-fp32": (({"stage": 3, **OFFLOAD}, "fp32"),) * 2,
    "1-bf16-to-2-offload-fp32": (({"stage": 1}, "bf16"), ({"stage": 2, **OFFLOAD}, "fp32")),
}


class Net(nn.Module):
    """Odd sizes, so that partitions need padding, and both parameter groups."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(7, 13), nn.LayerNorm(13), nn.GELU(), nn.Linear(13, 5))

    def forward(self, x):
        return self.layers(x.to(self.layers[0].weight.dtype)).float().square().sum()


def dump(path, engine, ema, ranks):
    state = {}
    if engine.global_steps and engine.zero_optimization_stage() < 3:
        # DeepSpeed links the moments after the first group's step, when the second has none yet.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    for name, parameter in engine.module.named_parameters():
        state[f"master {name}"] = safe_get_full_fp32_param(parameter).clone()
        # The moments do not exist before the first step.
        if engine.global_steps:
            for key in ("exp_avg", "exp_avg_sq"):
                state[f"{key} {name}"] = safe_get_full_optimizer_state(parameter, key).clone()
    ema.save(path.parent)
    ranks.barrier()
    state |= {f"ema {name}": tensor.clone() for name, tensor in read_ema(path.parent).items()}
    mine = [(float(s["step"]), s["step"].data_ptr()) for s in engine.optimizer.state.values() if "step" in s]
    assert len({pointer for _, pointer in mine}) == len(mine), "the partitions share a counter"
    counts = sorted({count for part in ranks.gather(mine) for count, _ in part})
    decays = [group["weight_decay"] for group in engine.optimizer.param_groups]
    if ranks.rank == 0:
        torch.save({"tensors": state, "counts": counts, "decays": decays}, path)
    ranks.barrier()


def main(out, source=None):
    world = World.from_environment()
    device = choose_device(world)
    ranks = Ranks(world, device)
    # The norm that clipping needs is summed in another order on every number of ranks.
    training = TrainingConfig(
        micro_batches=MICRO_BATCHES, weight_decay=0.1, learning_rate=0.02, clip_norm=0.0
    )
    for name, settings in VARIANTS.items():
        zero, precision = settings[bool(source)]
        facts = {"ranks": world.size, "zero_stage": zero["stage"], "precision": precision}
        raw = {"zero_optimization": zero, "data_types": {"grad_accum_dtype": "fp32"}}
        raw["communication_data_type"] = "fp32"
        config = resolve_ds_config(
            raw, training, world=world.size, bf16=precision == "bf16", path=Path("ds.json")
        )
        folder = out / name
        folder.mkdir(parents=True, exist_ok=True)
        found = find_source(source / name, facts, ranks, print) if source else None
        config["checkpoint"] = {"load_universal": bool(found)}
        torch.manual_seed(1)
        engine = build_engine(Net(), config, training, device)
        start = 0
        if found:
            load_source(engine, found)
            remove_converted(found, ranks)
            start = found.step
        ema = Ema(engine, DECAY)
        if found:
            ema.load(found.folder)
        dump(folder / f"state-{start}.pt", engine, ema, ranks)

        for step in range(start, STEPS):
            set_learning_rate(engine, training.learning_rate)
            accumulation = MICRO_BATCHES // world.size
            for index in range(accumulation):
                micro = world.rank + world.size * index
                torch.manual_seed(100 * step + micro)
                engine.backward(engine(torch.randn(6, 7)) * (micro < 2))
                if index + 1 < accumulation:
                    engine.step()
            assert bool(gradients_finite(engine))
            engine.step()
            ema.update(step)
            dump(folder / f"state-{step + 1}.pt", engine, ema, ranks)
            if step + 1 == SAVED and not source:
                tag = ckpt.tag_name(SAVED)

                def write(target, engine=engine, ema=ema, tag=tag):
                    engine.save_checkpoint(str(target), tag=tag, client_state={"step": SAVED})
                    ema.save(target)

                ckpt.save_checkpoint(folder, SAVED, write, facts={**facts, "tag": tag}, group=ranks)
    ranks.close()


if __name__ == "__main__":
    main(*map(Path, sys.argv[2:]))
    # The interpreter's shutdown was seen to abort in a thread of the closed process group.
    sys.stdout.flush()
    os._exit(0)
