"""The configurations of the six sizes hold the paper's recipe."""

from pathlib import Path

import pytest

from scamo.config import MODEL_SIZES, RunConfig, load_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.mark.parametrize("size", MODEL_SIZES)
def test_config_of_each_size_loads_and_is_tab_4(size):
    config = load_config(RunConfig, CONFIGS / f"scamo_{size.lower()}.toml")
    training, model = config.training, config.model
    assert (model.layers, model.heads, model.width) == MODEL_SIZES[size]
    assert (model.max_positions, model.codes, model.text_width) == (201, 0, 0)
    assert (training.steps, training.learning_rate, training.warmup_ratio) == (100_000, 2e-4, 0.1)
    assert (training.betas, training.weight_decay) == ((0.9, 0.999), 1e-6)
    assert training.drop_token == pytest.approx(1 / 3)
    assert training.micro_batches * training.micro_batch_tokens == 8192, "the same step at every size"
    assert training.micro_batch_tokens >= model.max_positions, "the longest sample fits"
    assert training.run == f"runs/scamo_{size.lower()}"
