import json
from pathlib import Path

import pytest

from scamo.config import TrainingConfig
from scamo.errors import ScaMoError
from scamo.training.ds_config import read_ds_config, resolve_ds_config, resolve_precision

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
PATH = Path("ds.json")
ZERO3 = {"zero_optimization": {"stage": 3}}


def resolve(data, world=1, bf16=True, **training):
    return resolve_ds_config({**ZERO3, **data}, TrainingConfig(**training), world=world, bf16=bf16, path=PATH)


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("ds_*.json")), ids=lambda p: p.name)
@pytest.mark.parametrize("world", [1, 2])
def test_shipped_files_resolve_without_a_leftover(file, world):
    data = read_ds_config(file)
    resolved = resolve_ds_config(
        data, TrainingConfig(micro_batches=6, clip_norm=0.5), world=world, bf16=True, path=file
    )
    assert '"auto"' not in json.dumps(resolved)
    assert resolved["train_batch_size"] == 6
    assert resolved["train_micro_batch_size_per_gpu"] == 1
    assert resolved["gradient_accumulation_steps"] == 6 // world
    assert resolved["gradient_clipping"] == 0.5
    assert resolved["bf16"]["enabled"] is True


def test_explicit_values_that_agree_are_kept():
    data = {
        "train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 2e-4, "betas": [0.9, 0.999], "eps": "auto"}},
        "wall_clock_breakdown": True,
    }
    resolved = resolve(data, world=2, micro_batches=4)
    assert resolved["gradient_accumulation_steps"] == 2
    assert resolved["wall_clock_breakdown"] is True
    assert "optimizer" not in resolved


def test_float32_drops_the_rest_of_the_bf16_section():
    resolved = resolve({"bf16": {"enabled": "auto", "immediate_grad_update": True}}, bf16=False)
    assert resolved["bf16"] == {"enabled": False}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"train_batch_size": 8}, ["train_batch_size = 8", "training.micro_batches", "gives 4"]),
        ({"train_micro_batch_size_per_gpu": 2}, ["train_micro_batch_size_per_gpu = 2", "gives 1"]),
        ({"gradient_accumulation_steps": 1}, ["gradient_accumulation_steps = 1", "gives 2"]),
        ({"gradient_clipping": 0.3}, ["gradient_clipping = 0.3", "training.clip_norm", "gives 1.0"]),
        ({"gradient_clipping": True}, ["gradient_clipping = true"]),
        ({"optimizer": {"type": "Lion"}}, ["optimizer.type", "AdamW"]),
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}},
            ["optimizer.params.lr = 0.001", "training.learning_rate", "gives 0.0002"],
        ),
        ({"optimizer": {"params": {"momentum": 0.9}}}, ["optimizer.params.momentum"]),
        ({"zero_optimization": {"stage": 4}}, ["zero_optimization.stage = 4", "1, 2 or 3"]),
        ({"zero_optimization": {}}, ["zero_optimization.stage = 0"]),
        ({"communication_data_type": "auto"}, ["communication_data_type", "cannot be filled in"]),
    ],
)
def test_contradictions_name_the_key(data, words):
    with pytest.raises(ScaMoError) as error:
        resolve(data, world=2, micro_batches=4)
    assert all(word in str(error.value) for word in ["ds.json", *words]), str(error.value)


def test_micro_batches_that_do_not_divide():
    with pytest.raises(ScaMoError, match=r"micro_batches = 3 does not divide by the 2 ranks"):
        resolve({}, world=2, micro_batches=3)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"zero_optimization": {"stage": 3},\n}', ["not valid JSON", "line 2"]),
        ("[]", ["expected a JSON object, got list"]),
        ('{"gradient_cliping": 1}', ["unknown key gradient_cliping", "gradient_clipping"]),
        ('{"scheduler": {"type": "WarmupLR"}}', ["scheduler", "training.warmup_ratio"]),
        ('{"fp16": {"enabled": true}}', ["fp16", "bf16"]),
        ('{"bf16": true}', ["bf16 = true", "expected an object"]),
    ],
)
def test_bad_files_name_the_culprit(tmp_path, text, words):
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(ScaMoError) as error:
        read_ds_config(path)
    assert all(word in str(error.value) for word in [str(path), *words]), str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ScaMoError, match=r"none\.json: no such DeepSpeed configuration"):
        read_ds_config(tmp_path / "none.json")


def test_precision():
    def choose(requested, native, cuda):
        return resolve_precision(requested, "Tesla T4 (cuda:0)", native, cuda=cuda, path=PATH)

    for cuda in (True, False):
        assert choose("auto", True, cuda).bf16
        assert choose(True, True, cuda).bf16
        assert not choose(False, True, cuda).bf16
        fallback = choose("auto", False, cuda)
        assert not fallback.bf16
        assert "float32" in fallback.note
    assert choose(True, False, False).note  # a CPU emulates it: allowed, but told
    with pytest.raises(ScaMoError, match=r"Tesla T4 \(cuda:0\) has no bf16: .*ds\.json"):
        choose(True, False, True)
    with pytest.raises(ScaMoError, match=r'bf16\.enabled = "yes"'):
        choose("yes", True, True)
