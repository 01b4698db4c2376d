"""The plan's bytes against what autograd, DeepSpeed and the allocator really hold, within 10% at most."""

import gc
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from scamo_kernels import linear_cross_entropy

from scamo.config import ModelConfig
from scamo.data.batches import Sample, collate
from scamo.errors import ScaMoError
from scamo.models.layers import rotary_table, storage_dim
from scamo.models.prefix_lm import PrefixLM
from scamo.scaling import memory
from scamo.scaling.memory import Batch, Zero

ROOT = Path(__file__).resolve().parents[2]


def batch_of(config, samples, text, motion):
    """Samples of one length each; their rows are multiples of 64, to which a CPU pads in bfloat16."""
    rng = np.random.default_rng(0)
    states = rng.standard_normal((text, config.text_width)).astype(np.float32)
    tokens = rng.integers(0, config.codes, motion)
    return collate([Sample(states, tokens) for _ in range(samples)], config.codes)


def shape_of(batch):
    return Batch(batch.n_positions, len(batch.text_rows), batch.n_scored, batch.max_seqlen)


def saved_bytes(model, batch):
    """Bytes of the batch and of all that autograd keeps of a forward, without the parameters."""
    held = [t for t in vars(batch).values() if isinstance(t, torch.Tensor)]
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):
        model(batch)
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in held}
    return sum(size for key, size in storages.items() if key not in own)


def peak_of(function):
    """Bytes above what is allocated before, at the worst moment of function()."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        function()
    events = profiler.profiler.kineto_results.events()
    sizes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return int(max(np.cumsum([size for _, size in sizes])))


def small(heads, width, **changes):
    values = {"layers": 4, "codes": 500, "text_width": 128} | changes
    return ModelConfig(size="", heads=heads, width=width, **values)


@pytest.mark.parametrize("checkpoint", [False, True], ids=["all", "checkpointed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "width"), [(4, 256), (2, 200)], ids=["D64", "D100"])
def test_kept_activations(heads, width, dtype, checkpoint):
    config = small(heads, width)
    batch = batch_of(config, 64, 11, 13)
    model = PrefixLM(config, checkpoint_activations=checkpoint).to(dtype)
    planned = memory.activations(
        config, shape_of(batch), dtype.itemsize, checkpoint=checkpoint, kernels="torch", device="cpu"
    )
    assert planned.kept == pytest.approx(saved_bytes(model, batch), rel=0.02)


@pytest.mark.parametrize("checkpoint", [False, True], ids=["all", "checkpointed"])
def test_peak_of_forward_and_backward(checkpoint):
    config = small(4, 256)
    batch = batch_of(config, 64, 11, 13)
    model = PrefixLM(config, checkpoint_activations=checkpoint)
    for parameter in model.parameters():  # as ZeRO's hooks: no gradient waits for the others
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    peak = peak_of(lambda: model(batch).loss_sum.backward())
    planned = memory.activations(
        config, shape_of(batch), 4, checkpoint=checkpoint, kernels="torch", device="cpu"
    )
    batch_bytes = sum(t.nbytes for t in vars(batch).values() if isinstance(t, torch.Tensor))
    assert planned.peak - batch_bytes == pytest.approx(peak, rel=0.1)


# In float32: products in bfloat16 have float32 copies of their own on most CPUs.
@pytest.mark.parametrize("rows", [128, 1280], ids=["one-chunk", "several"])
def test_peak_of_the_loss(rows):
    config = small(1, 64, codes=30_000, layers=1)
    hidden = torch.randn(rows, 64, requires_grad=True)
    weight = torch.randn(config.codes + 1, 64, requires_grad=True)
    targets = torch.zeros(rows, dtype=torch.int64)
    peak = peak_of(lambda: linear_cross_entropy(hidden, weight, targets))
    planned = memory.activations(config, Batch(rows, 0, rows, 1), 4, kernels="torch", device="cpu")
    assert planned.loss + weight.nbytes + hidden.nbytes == pytest.approx(peak, rel=0.1)


def on_cuda(config, checkpoint):
    """A model with Triton's ops on the CPU, and heads of 100 in 104 columns as on CUDA."""

    class OnCuda(PrefixLM):
        def _rope(self, device):
            storage = storage_dim(config.head_dim, torch.device("cuda"))
            return rotary_table(config.max_positions, config.head_dim, storage, config.rope_base, device)

    return OnCuda(config, impl="triton", checkpoint_activations=checkpoint)


def measure_triton(cases):
    """In a child: the shapes that the Triton ops save need no GPU, only their fake implementations."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.mem_tracker import MemTracker

    torch.set_default_dtype(torch.bfloat16)
    for heads, width, text, motion in cases:
        config = small(heads, width, codes=511, max_motion=100)
        real = batch_of(config, 64, text, motion)
        for checkpoint in (False, True):
            with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                model = on_cuda(config, checkpoint)
                batch = real._map(mode.from_tensor)
                kept = saved_bytes(model, batch)
                tracker = MemTracker()
                tracker.track_external(model)
                with tracker:
                    model(batch).loss_sum.backward()
            peak = sum(s["Total"] for s in tracker.get_tracker_snapshot("peak").values())
            peak -= sum(p.nbytes for p in model.parameters())
            planned = memory.activations(config, shape_of(real), 2, checkpoint=checkpoint)
            case = f"{heads} heads, {width}, {text + motion} positions, checkpoint {checkpoint}"
            yield case, {"kept": (kept, planned.kept), "peak": (peak, planned.kept + planned.backward)}


def measure_engines(engines):
    """In a child: real engines of one rank, in their second step of two micro-batches."""
    from scamo.config import TrainingConfig
    from scamo.training.ds_config import resolve_ds_config
    from scamo.training.engine import Ranks, build_engine, choose_device
    from scamo.training.guards import World

    world = World.from_environment()
    device = choose_device(world)
    Ranks(world, device)
    training = TrainingConfig(micro_batches=2)
    config = small(4, 256, layers=6, text_width=64)
    batch = batch_of(config, 4, 9, 7)

    def step(engine):
        for _ in range(training.micro_batches):
            engine.backward(engine(batch).loss_sum)
            engine.step()

    for raw, bf16 in engines:
        ds_config = resolve_ds_config(raw, training, world=1, bf16=bf16, path=Path("ds.json"))
        before = storages(everything())
        engine = build_engine(PrefixLM(config), ds_config, training, device)
        step(engine)
        resting = sum(size for key, size in storages(everything()).items() if key not in before)
        peak = resting + peak_of(lambda engine=engine: step(engine))

        zero = Zero.of(ds_config)
        states = memory.states(config, zero, 1)
        activations = memory.activations(config, shape_of(batch), zero.b, kernels="torch", device="cpu")
        # One rank on a CPU gathers nothing, offloaded or not.
        backward = states.gradients + states.buckets + activations.peak
        planned = states.weights + states.optimizer + states.host + max(backward, states.update)
        with tempfile.TemporaryDirectory() as folder:
            engine.save_checkpoint(folder, tag="tag", client_state={"step": 2})
            disk = sum(p.stat().st_size for p in Path(folder).rglob("*") if p.is_file())
        pairs = {"peak": (peak, planned), "disk": (disk, memory.checkpoint_bytes(config, zero, 1))}
        if not zero.offload_optimizer:
            weights = storages(getattr(p, "ds_tensor", p) for p in engine.module.parameters())
            inner = engine.optimizer.optimizer
            masters = [p for group in inner.param_groups for p in group["params"]]
            masters = getattr(engine.optimizer, "fp32_partitioned_groups_flat", masters)
            moments = [t for state in inner.state.values() for key, t in state.items() if key != "step"]
            pairs["weights"] = sum(weights.values()), states.weights
            pairs["optimizer"] = sum(storages([*masters, *moments]).values()), states.optimizer
        yield f"{json.dumps(raw)} bf16 {bf16}", pairs
        engine.destroy()


def everything():
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [o for o in gc.get_objects() if isinstance(o, torch.Tensor) and o.device.type == "cpu"]


def storages(tensors):
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def child(what, cases, **environment):
    """What `measure_...` yields in a process of its own, which runs this file."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, __file__, what, json.dumps(cases)],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads(line[7:]) for line in result.stdout.splitlines() if line.startswith("RESULT")]


def check(results, **tolerances):
    for case, pairs in results:
        for part, (measured, planned) in pairs.items():
            assert planned == pytest.approx(measured, rel=tolerances.get(part, 0.1)), (case, part)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_kept_activations_and_peak_of_the_triton_path():
    # Samples of 64 positions and of more: the backward for short ones turns q and k itself.
    cases = [(4, 256, 29, 35), (4, 256, 90, 70), (2, 200, 29, 35), (2, 200, 90, 70)]
    results = child("triton", cases, TRITON_INTERPRET="1")
    assert len(results) == 2 * len(cases)
    check(results, kept=0.01)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_states_peak_and_checkpoints_of_real_engines():
    def raw(stage, **zero):
        return {"zero_optimization": {"stage": stage, "reduce_bucket_size": 1_000_000} | zero}

    summed = {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
    engines = [(raw(stage) | summed, bf16) for stage in (1, 2, 3) for bf16 in (True, False)]
    engines.append((raw(2), True))
    host = {"device": "cpu"}
    engines.append((raw(3, offload_optimizer=host, offload_param=host) | summed, True))
    results = child("engines", engines, DS_ACCELERATOR="cpu")
    assert len(results) == len(engines)
    check(results, weights=0.01, optimizer=0.01)


def zero_of(zero, **rest):
    return Zero.of(
        {"zero_optimization": zero, "bf16": {"enabled": True}, "gradient_accumulation_steps": 1} | rest
    )


def test_ranks_share_what_their_stage_partitions():
    config = small(4, 256)
    for stage in (1, 2, 3):
        one, eight = (memory.states(config, zero_of({"stage": stage}), ranks) for ranks in (1, 8))
        assert eight.optimizer == pytest.approx(one.optimizer / 8, rel=1e-3)
        assert eight.weights == pytest.approx(one.weights / (8 if stage == 3 else 1), rel=1e-3)
        assert eight.gradients == pytest.approx(one.gradients / (1 if stage == 1 else 8), rel=1e-3)


def test_only_zero_3_on_several_ranks_gathers():
    config = small(4, 256)
    assert memory.gathered_bytes(config, zero_of({"stage": 3}), 1) == 0
    assert memory.gathered_bytes(config, zero_of({"stage": 2}), 8) == 0
    near = {"stage": 3, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
    assert memory.gathered_bytes(config, zero_of(near), 8) == 2 * 256 * 2 * config.hidden


@pytest.mark.parametrize(
    ("zero", "rest", "words"),
    [
        ({"stage": 3, "reduce_bucket_size": "big"}, {}, "zero_optimization.reduce_bucket_size"),
        ({"stage": 3, "offload_optimizer": {"device": "nvme"}}, {}, "zero_optimization.offload_optimizer"),
        ({"stage": 2, "offload_param": {"device": "cpu"}}, {}, "zero_optimization.offload_param"),
        ({"stage": 2}, {"data_types": {"grad_accum_dtype": "fp8"}}, "grad_accum_dtype"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_configurations_are_named(zero, rest, words):
    with pytest.raises(ScaMoError, match=words):
        zero_of(zero, **rest)


if __name__ == "__main__":
    measure = {"triton": measure_triton, "engines": measure_engines}[sys.argv[1]]
    for result in measure(json.loads(sys.argv[2])):
        print("RESULT", json.dumps(result), flush=True)
