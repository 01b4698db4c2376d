"""Generation: cache and batch against the released way, everything again for every token, one prompt at a
time.

    PYTHONPATH=kernels:. python -m pytest benchmarks/bench_generate.py

16 prompts, 50 tokens each, random weights, without the text encoder and the tokenizer. On a CPU the narrow
model of the quickstart, on CUDA the 44M one with 64,000 codes. `speedup` in extra_info is the ratio of the
medians; it is only there when both gave the same tokens.
"""

from __future__ import annotations

import statistics
import time

import numpy as np
import pytest
import torch

from scamo.config import ModelConfig
from scamo.data.batches import Sample, collate
from scamo.generation.decode import generate_tokens
from scamo.generation.sampling import Sampling, prompt_keys, sample
from scamo.models.prefix_lm import PrefixLM

PROMPTS, TOKENS = 16, 50
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CONFIG = (
    ModelConfig(size="44M", codes=64000, text_width=2048)
    if DEVICE.type == "cuda"
    else ModelConfig(size="", layers=4, heads=4, width=256, codes=1000, text_width=384)
)
SAMPLING = Sampling(0.9, top_p=0.95)


@torch.no_grad()
def recompute(model: PrefixLM, text: torch.Tensor, key: torch.Tensor) -> list[int]:
    """One prompt; for each token the whole sequence once more."""
    motion: list[int] = []
    for step in range(TOKENS):
        # The packed batch needs a token to follow the text; row `step` does not see it.
        inputs = np.array([*motion, 0])
        batch = collate([Sample(text.numpy(), inputs)], model.config.codes).to(DEVICE)
        logits = model.logits(batch)[step : step + 1]
        logits[:, model.config.codes] = -torch.inf
        motion.append(int(sample(logits, key, step, SAMPLING)))
    return motion


def cached(model: PrefixLM, texts: list[torch.Tensor], keys: torch.Tensor) -> list[list[int]]:
    motions = generate_tokens(model, texts, keys, SAMPLING, max_tokens=TOKENS, min_tokens=TOKENS)
    return [motion.tolist() for motion in motions]


@pytest.mark.benchmark(group="generate")
def test_generate(benchmark) -> None:
    torch.manual_seed(0)
    model = PrefixLM(CONFIG).eval().requires_grad_(False).to(DEVICE)
    lengths = np.random.default_rng(0).integers(6, 20, PROMPTS)
    texts = [torch.randn(int(n), CONFIG.text_width) for n in lengths]
    keys = prompt_keys([0] * PROMPTS, [f"prompt {i}" for i in range(PROMPTS)])

    slow: list[float] = []
    for _ in range(2):  # the first round warms up
        started = time.perf_counter()
        expected = [recompute(model, texts[i], keys[i : i + 1]) for i in range(PROMPTS)]
        slow.append(time.perf_counter() - started)
    got = benchmark.pedantic(cached, (model, texts, keys), rounds=5, warmup_rounds=1)
    assert got == expected, "no speed-up without the same motions"
    fast = statistics.median(benchmark.stats.stats.data)
    benchmark.extra_info.update(
        device=str(DEVICE),
        recompute_s=round(slow[-1], 3),
        cached_s=round(fast, 3),
        tokens_per_s=round(PROMPTS * TOKENS / fast),
        speedup=round(slow[-1] / fast, 1),
    )
