"""Generation: the engine against the released way, everything again for every token, one prompt at a time,
and against the time it takes to read the weights.

    OMP_WAIT_POLICY=passive python -m pytest benchmarks/bench_generate.py --benchmark-only

50 tokens each, random weights, without the text encoder and the tokenizer: the narrow model of the quickstart
and the 44M one with 64,000 codes, with 1 and 16 prompts (on CUDA also 32, in bfloat16 too). In extra_info:

- speedup: motions per second against recomputing, medians; wall and CPU time. Only there when both gave the
  same tokens.
- bound_ms, over_bound: blocks and head read once per token at the rate at which a tensor of 256 MiB is copied
  or summed, whichever is higher (copy_gb_s, read_gb_s), and how many times as long a token takes. Generation,
  copy and sum take turns: a virtual machine's memory may be half as quick a minute later.

The load of the machine is noted: on CPUs that others use, the wall time measures them too.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch

from scamo.config import ModelConfig
from scamo.data.batches import Sample, collate
from scamo.generation.engine import Engine, Request, collect
from scamo.generation.sampling import Sampling, prompt_keys, sample
from scamo.models.prefix_lm import PrefixLM

TOKENS, RECOMPUTED = 50, 4  # tokens of a motion; prompts that are recomputed, as each takes as long
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MODELS = {
    "narrow": ModelConfig(size="", layers=4, heads=4, width=256, codes=1000, text_width=384),
    "44M": ModelConfig(size="44M", codes=64000, text_width=2048),
}
CASES = [
    (name, dtype, prompts)
    for name in MODELS
    for dtype in ("float32", "bfloat16")
    for prompts in ((1, 16) if DEVICE.type == "cpu" else (1, 16, 32))
]
SAMPLING = Sampling(0.9, top_p=0.95)


@torch.no_grad()
def recompute(model: PrefixLM, text: torch.Tensor, key: int) -> list[int]:
    """One prompt; for each token the whole sequence once more."""
    motion: list[int] = []
    for step in range(TOKENS):
        # The packed batch needs a token to follow the text; row `step` does not see it.
        inputs = np.array([*motion, 0])
        batch = collate([Sample(text.numpy(), inputs)], model.config.codes).to(DEVICE)
        logits = model.logits(batch)[step : step + 1]
        logits[:, model.config.codes] = -torch.inf
        motion.append(int(sample(logits, torch.tensor([key]), step, SAMPLING)))
    return motion


def cached(engine: Engine, requests: list[Request]) -> list[list[int]]:
    motions = dict(collect(engine.run(requests)))
    return [motions[ticket].tolist() for ticket in range(len(requests))]


def timed(rounds: int, *functions: Callable[[], object]) -> list[tuple[float, float]]:
    """Median seconds of each, wall and CPU; they take turns."""
    taken: list[list[tuple[float, float]]] = [[] for _ in functions]
    for _ in range(rounds):
        for function, times in zip(functions, taken, strict=True):
            wall, cpu = time.perf_counter(), time.process_time()
            function()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            times.append((time.perf_counter() - wall, time.process_time() - cpu))
    return [tuple(map(statistics.median, zip(*times, strict=True))) for times in taken]


def step_bytes(model: PrefixLM) -> int:
    """Blocks, norm and head: what every step reads."""
    parts = (model.blocks, model.norm, model.head)
    return sum(p.nbytes for part in parts for p in part.parameters())


@pytest.mark.skipif(
    DEVICE.type == "cpu" and os.environ.get("OMP_WAIT_POLICY") == "active",
    reason="threads that wait awake, as in training, are in the way of NumPy's: OMP_WAIT_POLICY=passive",
)
@pytest.mark.benchmark(group="generate")
@pytest.mark.parametrize(("name", "dtype", "prompts"), CASES)
def test_generate(benchmark, name: str, dtype: str, prompts: int) -> None:
    torch.manual_seed(0)
    config = MODELS[name]
    model = PrefixLM(config).eval().requires_grad_(False).to(DEVICE, getattr(torch, dtype))
    lengths = np.random.default_rng(0).integers(6, 20, prompts)
    texts = [torch.randn(int(n), config.text_width) for n in lengths]
    keys = prompt_keys([0] * prompts, [f"prompt {i}" for i in range(prompts)]).tolist()
    requests = [Request(text, key, TOKENS, TOKENS) for text, key in zip(texts, keys, strict=True)]
    engine = Engine(model, SAMPLING, slots=prompts, capacity=20 + TOKENS)

    got = benchmark.pedantic(cached, (engine, requests), rounds=1, warmup_rounds=1)
    data = torch.ones(2**26, device=DEVICE)
    target = torch.empty_like(data)
    (wall, cpu), (copy, _), (read, _) = timed(
        9, lambda: cached(engine, requests), lambda: target.copy_(data), data.sum
    )
    rates = {"copy": 2 * data.nbytes / copy, "read": data.nbytes / read}  # a copy reads and writes
    bound = step_bytes(model) / max(rates.values())
    benchmark.extra_info.update(
        device=str(DEVICE),
        threads=torch.get_num_threads(),
        load=round(os.getloadavg()[0], 1),
        ms_per_token=round(1e3 * wall / TOKENS, 3),
        cpu_ms_per_token=round(1e3 * cpu / TOKENS, 3),
        motions_per_s=round(prompts / wall, 2),
        tokens_per_s=round(prompts * TOKENS / wall),
        **{f"{kind}_gb_s": round(rate / 1e9, 1) for kind, rate in rates.items()},
        bound_ms=round(1e3 * bound, 3),
        over_bound=round(wall / TOKENS / bound, 2),
    )
    if dtype == "float32":  # in bfloat16 other products round otherwise, and other motions follow
        few = min(prompts, RECOMPUTED)
        again = [recompute(model, texts[i], keys[i]) for i in range(few)]  # warms up, too
        assert got[:few] == again, "no speed-up without the same motions"
        [(slow, slow_cpu)] = timed(3, lambda: recompute(model, texts[0], keys[0]))
        benchmark.extra_info.update(
            recompute_ms_per_token=round(1e3 * slow / TOKENS, 3),
            speedup=round(slow * prompts / wall, 1),
            cpu_speedup=round(slow_cpu * prompts / cpu, 1),
        )
    print(f"\n{name} {dtype} {prompts}:", benchmark.extra_info)
