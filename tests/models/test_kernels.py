"""The transformer with Triton kernels against the same training without them.

Run as a script under TRITON_INTERPRET=1 (or on a GPU) it trains for some steps and prints what came out.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from scamo.config import ModelConfig
from scamo.data.batches import Sample, collate
from scamo.models.prefix_lm import PrefixLM

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ModelConfig(size="", layers=2, heads=2, width=32, codes=20, text_width=6, max_text=12, max_motion=10)
STEPS = 4


def train(impl: str, device: str, dtype: torch.dtype) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """The losses of every scored row in every step, and the weights in the end, float32 on the CPU."""
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    model = PrefixLM(CONFIG, impl=impl).to(device, dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    samples = [
        Sample(rng.standard_normal((p, 6)).astype(np.float32), rng.integers(0, 20, m))
        for p, m in ((5, 10), (1, 3), (12, 7), (3, 1))
    ]
    batch = collate(samples, 20).to(device)
    losses = []
    for _ in range(STEPS):
        output = model(batch)
        (output.loss_sum / output.n_scored).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.losses.float().cpu())
    return losses, {name: p.detach().float().cpu() for name, p in model.named_parameters()}


def test_training_on_interpreted_kernels_is_training_without_them():
    pytest.importorskip("triton")
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, __file__],
        env=os.environ | {"PYTHONPATH": path, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    results = json.loads(done.stdout)
    losses, weights = train("torch", "cpu", torch.float32)
    assert losses[0].mean() > 1.1 * losses[-1].mean(), "something was learnt"
    for mine, theirs in zip(losses, results["losses"], strict=True):
        torch.testing.assert_close(torch.tensor(theirs), mine, atol=2e-5, rtol=0)
    for name, weight in weights.items():
        # AdamW's first steps turn a rounding of a gradient near zero into a whole step of 1e-2.
        far = (torch.tensor(results["weights"][name]) - weight).abs() > 1e-4
        assert far.float().mean() < 0.01, name


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_on_kernels_is_training_without_them(dtype):
    runs = [train(impl, "cuda", dtype) for impl in ("triton", "torch")]
    exact, _ = train("torch", "cpu", torch.float32)
    limit = 1e-4 if dtype == torch.float32 else 0.1
    for mine, theirs, right in zip(runs[0][0], runs[1][0], exact, strict=True):
        # No farther from the truth than twice what the same precision without kernels is.
        error, allowed = (mine - right).abs().max(), (theirs - right).abs().max()
        assert error <= 2 * allowed + limit


if __name__ == "__main__":
    losses, weights = train("triton", "cpu", torch.float32)
    results = {
        "losses": [row.tolist() for row in losses],
        "weights": {name: weight.tolist() for name, weight in weights.items()},
    }
    json.dump(results, sys.stdout)
