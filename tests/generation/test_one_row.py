from dataclasses import replace

import numpy as np
import pytest
import torch

from scamo.config import ModelConfig
from scamo.errors import ScaMoError
from scamo.generation.inference import inference_twin
from scamo.generation.one_row import OneRow
from scamo.models.prefix_lm import PrefixLM


def model_of(heads: int, width: int, text: str = "words") -> PrefixLM:
    torch.manual_seed(0)
    config = ModelConfig(
        size="",
        layers=3,
        heads=heads,
        width=width,
        codes=50,
        text_width=8,
        max_text=9,
        max_motion=12,
        text=text,
    )
    model = PrefixLM(replace(config, text=text)).eval().requires_grad_(False)
    for norm in (model.norm, *(n for block in model.blocks for n in (block.norm_1, block.norm_2))):
        norm.weight.uniform_(0.5, 1.5)
    return model


@pytest.mark.parametrize(
    ("heads", "width", "text"), [(2, 32, "words"), (4, 48, "words"), (1, 20, "sentence")]
)
def test_a_step_is_the_models(heads: int, width: int, text: str) -> None:
    model = model_of(heads, width, text)
    states = torch.randn(7, 8)
    ours, logits = model.prefill([states], 10)
    theirs, _ = model.prefill([states], 10)
    one = OneRow(model)
    token = int(logits.argmax())
    for _ in range(10):
        expected = model.decode(theirs, torch.tensor([token]))[0]
        got = one.step(ours, token, model._rope(torch.device("cpu")))
        np.testing.assert_allclose(got, expected.numpy(), rtol=0, atol=1e-5)
        torch.testing.assert_close(ours.states, theirs.states, rtol=0, atol=1e-5)
        assert ours.lengths.equal(theirs.lengths)
        token = int(expected.argmax())


def test_the_twin_steps_so_and_follows_the_weights() -> None:
    model = model_of(2, 32)
    twin = inference_twin(model)
    cache, _ = twin.prefill([torch.randn(4, 8)], 2)
    before = twin.decode(cache, torch.tensor([3]))
    model.head.weight.mul_(2)
    cache.lengths -= 1
    torch.testing.assert_close(twin.decode(cache, torch.tensor([3])), 2 * before)
    with pytest.raises(ScaMoError, match="the cache is full"):
        twin.decode(cache, torch.tensor([3]))


def test_large_gates_are_finite() -> None:
    model = model_of(2, 32)
    for block in model.blocks:
        block.gate_up.weight.mul_(1e4)
    cache, _ = model.prefill([torch.randn(4, 8)], 1)
    with np.errstate(all="raise"):
        assert np.isfinite(OneRow(model).step(cache, 0, model._rope(torch.device("cpu")))).all()
