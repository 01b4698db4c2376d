"""ScaleMoGen's predictor trained under ZeRO-3 on CPU ranks: the curve, a resume, the export and bad input."""

import importlib.util
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
from training_runs import ROOT, TIMEOUT, environment

from scamo.data.scales import encode_scales
from scamo.errors import ScaMoError
from scamo.tokenizers.multiscale import MultiscaleConfig, MultiscaleTokenizer
from scamo.training.logging import read_log

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("DeepSpeed is not installed", allow_module_level=True)

SCALES = ((1, 1), (4, 2), (12, 3), (49, 7))
CONFIG = """
[data]
dataset = "{folder}/dataset"
tokens = "tok"
tokenizer = "{folder}/scales/tok"
[model]
depth = 2
width = 32
heads = 2
hidden = 64
max_text = 24
drop_path = 0.2
[training]
steps = 6
micro_batch_tokens = 1500
micro_batches = 2
learning_rate = 2e-3
ema_decay = 0.5
validate_every = 6
save_every = 3
log_every = 1
"""
SCRIPT = """
import sys
from pathlib import Path
from scamo.config import load_config
from scamo.training.guards import limit_threads
from scamo.training.next_scale import NextScaleRunConfig, train_next_scale
limit_threads()
config = load_config(NextScaleRunConfig, sys.argv[1], sys.argv[3:])
sys.exit(train_next_scale(config, Path("configs/ds_zero3.json"), resume=sys.argv[2] == "resume"))
"""


@pytest.fixture(scope="module")
def scales(folder):
    """The folder of the shared dataset, now with latents of scales."""
    out = folder / "scales"
    tokenizer = MultiscaleConfig(width=8, blocks=1, bits=6, scales=SCALES, feature_dim=263)
    MultiscaleTokenizer(tokenizer).save(out / "tok")
    encode_scales(out / "tok", folder / "dataset", device="cpu", progress=False)
    (out / "config.toml").write_text(CONFIG.format(folder=folder))
    return out


def train(scales, name, ranks, *sets, how="new"):
    """Train in scales/name on so many ranks; the losses of the steps."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = [scales / "config.toml", how, f'training.run="{scales / name}"', *sets]
    children = []
    for rank in range(ranks):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
        variables = {key: str(value) for key, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
        children.append(
            subprocess.Popen(
                [sys.executable, "-c", SCRIPT, *map(str, arguments)],
                cwd=ROOT,
                env=os.environ | environment(**variables),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    outputs = [child.communicate(timeout=TIMEOUT)[0] for child in children]
    assert [child.returncode for child in children] == [0] * ranks, outputs[0][-4000:]
    return [record["loss"] for record in read_log(scales / name / "log.jsonl", "train")]


@pytest.fixture(scope="module")
def one_rank(scales):
    return train(scales, "one", 1)


def test_a_run_validates_and_leaves_what_generates(scales, one_rank):
    from scamo.config import from_dict
    from scamo.generation.sampling import prompt_keys
    from scamo.generation.scales import ScaleSampling, generate_bits
    from scamo.models.next_scale import NextScale, NextScaleConfig
    from scamo.weights import read_description, read_state

    assert len(one_rank) == 6
    assert one_rank[-1] < one_rank[0]
    (record,) = read_log(scales / "one" / "log.jsonl", "val")
    assert 0 < record["bit_error"] < 0.6
    assert len(record["bit_errors"]) == len(SCALES)
    np.testing.assert_allclose(record["bit_loss"], 0.69, atol=0.2)
    export = scales / "one" / "export"
    found = read_description(export, {"scamo-next-scale"}, 1, "predictor")
    config = from_dict(NextScaleConfig, found["model"])
    assert (config.text_width, config.scales, config.bits) == (16, SCALES, 6)
    model = NextScale(config)
    model.load_state_dict(read_state(export / "model.safetensors"))
    tokenizer = MultiscaleTokenizer.load(export / "tokenizer")
    *_, step = generate_bits(
        model.eval(),
        tokenizer.quantizer,
        [model.words.weight.new_ones(3, 16)],
        prompt_keys([0], ["a"]),
        ScaleSampling(),
    )
    assert tokenizer.decode(step.bits, 4 * step.latents).isfinite().all()


def test_two_ranks_have_the_curve_of_one(scales, one_rank):
    np.testing.assert_allclose(train(scales, "two", 2), one_rank, rtol=1e-5)


def test_a_resumed_run_goes_on_where_it_was(scales, one_rank):
    steps = "training.steps=3"
    rate = "training.min_learning_rate=2e-3"  # constant: a shorter run has the same rates
    whole = train(scales, "whole", 1, rate)
    first = train(scales, "parts", 1, rate, steps)
    assert first == whole[:3]
    assert train(scales, "parts", 1, rate, how="resume") == whole


def test_bad_input_is_named(scales):
    from scamo.config import load_config
    from scamo.training.guards import World
    from scamo.training.next_scale import NextScaleRunConfig, train_next_scale

    def refused(message, *sets):
        run = f'training.run="{scales / "no"}"'
        with pytest.raises(ScaMoError, match=message):
            train_next_scale(
                load_config(NextScaleRunConfig, scales / "config.toml", [*sets, run]),
                ROOT / "configs/ds_zero3.json",
                world=World.from_environment(),
            )
        assert not (scales / "no").exists()

    refused("model.bits = 5, but the dataset has 6", "model.bits=5")
    refused("data.tokenizer is missing", 'data.tokenizer=""')
    refused("has no latents of scales 'other'", 'data.tokens="other"')
    refused("drop_token = 0.5: not used here", "training.drop_token=0.5")
    refused("drop_text = 0.1: not used here, use model.drop_text", "training.drop_text=0.1")
    refused("alone takes", "training.micro_batch_tokens=100")
