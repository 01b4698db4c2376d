"""Whole training runs by the real launcher on CPU ranks: the curve, stops, resumes, damage and bad input.

Kills at every moment of a save, full disks and other faults: test_faults.py.
"""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from training_runs import (
    ROOT,
    TIMEOUT,
    assert_same_weights,
    checkpoints,
    curve,
    environment,
    last_step,
    start_and_wait,
    train,
    wait_for_end,
    weights,
)

from scamo.config import RunConfig, load_config
from scamo.training.logging import read_log

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("DeepSpeed is not installed", allow_module_level=True)

# Of the configuration and the dataset in conftest.py.
STEPS, CODES, TEXT_WIDTH = 40, 50, 16


@pytest.fixture(scope="module")
def one_rank(folder):
    return train(folder, "one", 1), folder / "one"


@pytest.fixture(scope="module")
def two_ranks(folder):
    return train(folder, "two", 2), folder / "two"


def test_a_run_leaves_config_log_checkpoints_and_export(folder, one_rank):
    output, run = one_rank
    assert "resum" not in output
    assert "steps 0 to 40" in output
    assert sorted(p.name for p in run.iterdir()) == ["checkpoints", "config.json", "export", "log.jsonl"]
    assert checkpoints(run) == ["step-0000030", "step-0000040"]
    config = json.loads((run / "config.json").read_text())
    assert config["model"]["codes"] == CODES
    assert config["model"]["text_width"] == TEXT_WIDTH
    assert config["text_encoder"] == "minilm"

    records = read_log(run / "log.jsonl")
    assert [r["step"] for r in records if r["kind"] == "val"] == [20, 40]
    assert [r["step"] for r in records if r["kind"] == "checkpoint"] == [10, 20, 30, 40]
    assert records[0]["kind"] == "start"
    assert records[-1] == {"kind": "end", "step": STEPS, "status": 0}
    steps = [r for r in records if r["kind"] == "train"]
    assert [r["step"] for r in steps] == list(range(1, STEPS + 1))
    assert all(r["mfu"] is None for r in steps), "nobody stated what a CPU can do"
    for key in (
        "grad_norm",
        "positions_per_s",
        "motion_tokens_per_s",
        "seconds",
        "memory_gib",
        "flops",
        "tflops_per_device",
    ):
        assert all(np.isfinite(r[key]) and r[key] > 0 for r in steps), key
    assert all(0 <= r["data_wait_s"] < r["seconds"] for r in steps)
    assert steps[-1]["epoch"] > 1
    # The first loss of a fresh model is about that of a uniform guess.
    assert abs(steps[0]["loss"] - np.log(CODES + 1)) < 0.3


def test_the_logged_numbers_are_those_of_the_plan_and_of_the_model(folder, one_rank):
    """Recompute the first loss and the last validation in plain PyTorch, without DeepSpeed."""
    import torch

    from scamo.data.batches import BatchPlan, PackedLoader, validation_batches
    from scamo.data.dataset import MotionDataset
    from scamo.generation.export import load_transformer, read_export
    from scamo.models.losses import normalised_loss
    from scamo.models.prefix_lm import PrefixLM
    from scamo.training.schedule import learning_rate

    _, run = one_rank
    _, model_config = read_export(run / "export")
    config = load_config(RunConfig, folder / "config.toml")
    dataset = MotionDataset.open(folder / "dataset")
    tokens = dataset.tokens()
    plan = BatchPlan.of(dataset, "train", tokens, dataset.text_states(), model_config, config.training)
    records = read_log(run / "log.jsonl", "train")
    for record in records[:5]:
        step = record["step"] - 1
        assert record["motion_tokens"] == plan.scored(step)
        assert record["positions"] == plan.positions(step)
        assert record["lr"] == learning_rate(step, config.training)

    torch.manual_seed(config.training.seed)
    model = PrefixLM(model_config)
    with torch.no_grad():
        losses = [model(batch).loss_sum for batch in PackedLoader(dataset, "train", plan).step(0)]
    # bfloat16 has 8 bits: 2e-2 is five units in the last place of a loss near 4.
    assert records[0]["loss"] == pytest.approx(float(sum(losses)) / plan.scored(0), abs=2e-2)

    model = load_transformer(
        run / "export/model.safetensors", model_config, torch.device("cpu"), torch.float32
    )
    rows, targets = [], []
    for batch in validation_batches(dataset, "val", plan):
        rows.append(model(batch).losses)
        targets.append(batch.targets)
    rows, targets = torch.cat(rows), torch.cat(targets)
    last = read_log(run / "log.jsonl", "val")[-1]
    assert last["motion_tokens"] == len(targets)
    assert last["loss"] == pytest.approx(float(rows.mean()), abs=2e-2)
    expected = normalised_loss(rows, torch.from_numpy(tokens.unigram("train")), targets)
    assert last["l_u"] == pytest.approx(expected, abs=2e-2)


def test_the_folder_to_give_away_generates_the_same_motion(one_rank, tmp_path):
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    from scamo.generation.api import ScaMo
    from scamo.generation.export import publish

    encoder, words = tmp_path / "encoder", {"<unk>": 0, "</s>": 1, "walks": 2}
    torch.manual_seed(0)
    bert = transformers.BertConfig(
        vocab_size=len(words), hidden_size=TEXT_WIDTH, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16,
    )  # fmt: skip
    transformers.BertModel(bert).save_pretrained(encoder)
    plain = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<unk>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(encoder)

    run, out = one_rank[1], tmp_path / "model"
    assert any("licence" in warning for warning in publish(run, out, text_encoder=str(encoder)))
    loaded = ScaMo.load(out, "cpu")
    own = ScaMo.load(run, "cpu", text_encoder=str(encoder))
    motion, expected = (model.generate("a person walks", seed=1, min_tokens=5) for model in (loaded, own))
    assert motion.tokens.tolist() == expected.tokens.tolist()
    np.testing.assert_array_equal(motion.joints, expected.joints)
    last = ScaMo.load(run, "cpu", text_encoder=str(encoder), ema=False)
    assert not torch.equal(last.model.embedding.weight, own.model.embedding.weight), "not the average"


@pytest.mark.slow
def test_one_rank_with_accumulation_equals_two_ranks_bit_for_bit(one_rank, two_ranks):
    """Micro-batch j is the same on any number of ranks, and two float32 gradients add up in either order."""
    assert curve(one_rank[1]) == curve(two_ranks[1])
    assert_same_weights(one_rank[1], two_ranks[1])
    files = [run / "checkpoints/step-0000040/ema/00000.safetensors" for _, run in (one_rank, two_ranks)]
    assert files[0].read_bytes() == files[1].read_bytes()
    values = [
        [(r["loss"], r["l_u"]) for r in read_log(run / "log.jsonl", "val")]
        for _, run in (one_rank, two_ranks)
    ]
    assert values[0] == values[1]
    assert {r["ranks"] for r in read_log(two_ranks[1] / "log.jsonl", "start")} == {2}


@pytest.mark.slow
def test_signals_and_a_killed_launcher_save_and_the_resumed_curve_is_the_same(folder, two_ranks):
    run = folder / "stopped"
    process = start_and_wait(folder, "stopped", 2, step=3)
    os.killpg(process.pid, signal.SIGTERM)
    process.wait(TIMEOUT)
    end = wait_for_end(folder, "stopped", 0)
    assert end["status"] == 128 + signal.SIGTERM
    assert 3 <= end["step"] < STEPS
    assert checkpoints(run)[-1] == f"step-{end['step']:07d}"
    assert not (run / "export").exists()

    # The runner dies without a word: the ranks notice, save and stop.
    process = start_and_wait(folder, "stopped", 2, "--resume", step=end["step"] + 1)
    process.kill()
    process.wait(TIMEOUT)
    second = wait_for_end(folder, "stopped", 1)
    assert second["status"] == 128 + signal.SIGTERM
    assert end["step"] < second["step"] < STEPS
    assert f"resuming from {run / 'checkpoints'}" in (folder / "stopped.out").read_text()

    train(folder, "stopped", 2, "--resume")
    assert curve(run) == curve(two_ranks[1])
    assert_same_weights(run, two_ranks[1])
    assert not list((run / "checkpoints").glob("*.partial"))


@pytest.mark.slow
def test_a_nan_stops_all_ranks_before_the_step_and_names_the_items(folder, two_ranks):
    from scamo.data.batches import BatchPlan
    from scamo.data.dataset import MotionDataset

    config = load_config(RunConfig, folder / "config.toml")
    dataset = MotionDataset.open(folder / "dataset")
    text = dataset.text_states()
    plan = BatchPlan.of(dataset, "train", dataset.tokens(), text, config.model, config.training)
    draws = [[draw for batch in plan.step(step) for draw in batch] for step in range(12)]
    seen: set[int] = set()
    for step, now in enumerate(draws):
        fresh = [draw for draw in now if draw.caption not in seen]
        if step >= 3 and fresh:
            break
        seen |= {draw.caption for draw in now}
    victim = fresh[0]

    # A byte of a caption's states goes bad on the disk after the dataset was checked.
    path = text.folder / "states.npy"
    states = np.lib.format.open_memmap(path, mode="r+")
    row = next(
        i
        for i in range(len(states))
        if np.array_equal(states[i : i + text.lengths[victim.caption]], text[victim.caption])
    )
    good = states[row, 0].copy()
    states[row, 0] = np.nan
    states.flush()
    try:
        output = train(folder, "nan", 2, "--set", "training.save_every=1", status=13)
    finally:
        states[row, 0] = good
        states.flush()
    run = folder / "nan"
    (record,) = read_log(run / "log.jsonl", "nan")
    assert record["step"] == step + 1
    assert record["what"] == "loss"
    assert victim.item in record["items"]
    assert record["micro_batches"] == [k for k, b in enumerate(plan.step(step)) if victim in b]
    assert output.count("is not finite") == 1
    assert dataset.item_name(victim.item) in output or "more (log.jsonl has all)" in output
    assert last_step(run) == step
    assert checkpoints(run)[-1] == f"step-{step:07d}"
    assert not (run / "export").exists()

    # The weights were not touched: with the byte repaired, the curve goes on as if nothing had happened.
    train(folder, "nan", 2, "--resume")
    assert curve(run) == curve(two_ranks[1])
    assert_same_weights(run, two_ranks[1])


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_continues(folder, one_rank):
    run = folder / "damaged"
    shutil.copytree(one_rank[1], run)
    shutil.rmtree(run / "export")
    shard = next((run / "checkpoints/step-0000040").rglob("*optim_states.pt"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    output = train(folder, "damaged", 1, "--resume")
    assert f"{shard}: corrupt" in output
    assert "after 30 steps" in output
    assert curve(run) == curve(one_rank[1])
    assert_same_weights(run, one_rank[1])


def test_a_zero_stage_that_deepspeed_cannot_convert_is_refused(folder, one_rank):
    before = (one_rank[1] / "log.jsonl").read_bytes()
    output = train(folder, "one", 1, "--resume", "--ds_config", "configs/ds_zero2.json", status=2)
    assert "saved with ZeRO stage 3, this run has 2" in output
    assert "Traceback" not in output
    assert (one_rank[1] / "log.jsonl").read_bytes() == before


def test_zero_1_in_bfloat16_exports_the_weights_that_it_trained(folder):
    """DeepSpeed's optimizer for it saves no stage, and its converter then refuses the checkpoint."""
    import torch

    zero_1 = "--ds_config", "configs/ds_zero1.json"
    train(folder, "zero1", 2, *zero_1, "--set", "training.steps=10")
    states = next((folder / "zero1/checkpoints").rglob("mp_rank_00_model_states.pt"))
    trained = torch.load(states, weights_only=True)["module"]
    exported = {name: t for name, t in weights(folder / "zero1").items() if not name.startswith("ema ")}
    assert exported.keys() == trained.keys()
    for name, tensor in exported.items():
        assert (tensor.dtype, trained[name].dtype) == (torch.float32, torch.bfloat16)
        torch.testing.assert_close(tensor.bfloat16(), trained[name], rtol=0, atol=0)


def test_a_sentence_embedding_trains_and_is_exported(folder):
    """The ablation in the style of T2M-GPT: one text position a sample."""
    from scamo.generation.export import read_export

    train(folder, "sentence", 1, "--set", "model.text=sentence", "--set", "training.steps=4")
    _, model_config = read_export(folder / "sentence" / "export")
    assert model_config.text == "sentence"
    records = read_log(folder / "sentence" / "log.jsonl", "train")
    # Every scored row but a sample's first is a motion token's, and every sample has one text row.
    assert all(r["positions"] == r["motion_tokens"] for r in records)


def test_two_ranks_report_bad_input_once(folder):
    output = train(folder, "never", 2, "--set", "training.stepz=3", status=2)
    assert output.count("unknown key training.stepz; did you mean training.steps?") == 1
    assert "Traceback" not in output
    assert not (folder / "never").exists()


GRADIENTS = """
import json, sys, torch
from pathlib import Path
from scamo.config import TrainingConfig
from scamo.training.ds_config import resolve_ds_config
from scamo.training.engine import Ranks, build_engine, choose_device, gradients_finite
from scamo.training.guards import World

world = World.from_environment()
device = choose_device(world)
ranks = Ranks(world, device)
training = TrainingConfig(micro_batches=2)

class Net(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x.to(self.weight.dtype)).float().sum()

for name, zero in json.loads(sys.argv[1]).items():
    for bf16 in (True, False):
        for poison in (1.0, float("nan"), float("inf")):
            raw = {"zero_optimization": zero, "data_types": {"grad_accum_dtype": "fp32"}}
            config = resolve_ds_config(raw, training, world=1, bf16=bf16, path=Path("ds.json"))
            torch.manual_seed(0)
            engine = build_engine(Net(8, 8), config, training, device)
            for micro in range(2):
                loss = engine(torch.ones(4, 8))
                engine.backward(loss * (poison if micro == 0 else 1.0))
                if micro == 0:
                    engine.step()
            print("RESULT", json.dumps([name, bf16, str(poison), bool(gradients_finite(engine))]))
"""


def test_gradients_that_are_not_finite_are_seen_at_every_zero_stage():
    stages = {
        "1": {"stage": 1},
        "2": {"stage": 2},
        "3": {"stage": 3},
        "offload": {"stage": 3, "offload_optimizer": {"device": "cpu"}},
    }
    result = subprocess.run(
        [sys.executable, "-c", GRADIENTS, json.dumps(stages)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    found = [json.loads(line[7:]) for line in result.stdout.splitlines() if line.startswith("RESULT")]
    expected = [
        [name, bf16, poison, poison == "1.0"]
        for name in stages
        for bf16 in (True, False)
        for poison in ("1.0", "nan", "inf")
    ]
    assert found == expected


def call(folder, *arguments, ds_config="configs/ds_zero3.json"):
    """train.py in this process: what it refuses before it starts."""
    from scamo.training.launch import main

    argv = ["--config", folder / "config.toml", "--ds_config", ds_config, *arguments]
    return main([str(word) for word in argv])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "data.tokens=fine"], ["dataset", "no tokens 'fine'", "random"]),
        (["--set", "data.text=t5"], ["no text states 't5'", "random"]),
        (["--set", "data.dataset=nowhere"], ["nowhere", "no such dataset"]),
        (["--set", "data.tokenizer="], ["data.tokenizer is missing"]),
        (["--set", "data.tokenizer=nowhere"], ["nowhere"]),
        (["--set", "model.codes=1000"], ["model.codes = 1000", "the dataset has 50"]),
        (["--set", "model.heads=3"], ["width = 32 does not divide by heads = 3"]),
        (["--set", "training.micro_batch_tokens=20"], ["micro_batch_tokens = 20", "clip"]),
        (["--resume", "now"], ["--resume", "'now'", "auto"]),
        (["--resume", "--overwrite"], ["exclude each other"]),
        (["--config", "nowhere.toml"], ["nowhere.toml: no such configuration file"]),
        (["--ds_config", "nowhere.json"], ["nowhere.json: no such DeepSpeed configuration"]),
        (["--epochs", "3"], ["unrecognized arguments: --epochs 3"]),
    ],
    ids=lambda value: value[-1] if value[0].startswith("--") else "",
)
def test_bad_input_is_one_line_and_nothing_is_written(folder, capsys, monkeypatch, arguments, words):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert call(folder, *arguments) == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith("train.py: error: ")
    assert "\n" not in message
    assert all(word in message for word in words), message
    assert not (folder / "unnamed").exists()


@pytest.mark.parametrize(
    ("store", "words"), [("tokens", "has no tokens yet"), ("text", "has no text states yet")]
)
def test_a_dataset_that_is_not_encoded_says_which_command_is_next(
    folder, tmp_path, capsys, monkeypatch, store, words
):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    shutil.copytree(folder / "dataset", tmp_path / "dataset")
    shutil.rmtree(tmp_path / "dataset" / store)
    assert call(folder, "--set", f"data.dataset={tmp_path / 'dataset'}") == 2
    message = capsys.readouterr().err
    assert words in message
    assert "scamo" in message


def test_micro_batches_must_divide_by_the_ranks(folder, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert call(folder, "--local_rank=0") == 2
    assert "micro_batches = 2 does not divide by the 3 ranks" in capsys.readouterr().err


def test_an_existing_folder_is_not_overwritten_by_accident(folder, one_rank, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert call(folder, "--set", f"training.run={one_rank[1]}") == 2
    assert "use --resume to continue it, --overwrite to replace it" in capsys.readouterr().err
    assert call(folder, "--set", f"training.run={folder / 'dataset'}", "--overwrite") == 2
    assert "is not a training run: it is not overwritten" in capsys.readouterr().err
    assert (folder / "dataset/manifest.json").is_file()


def test_a_run_from_before_a_key_existed_is_taken_to_have_its_default(folder, one_rank, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    run = folder / "older"
    shutil.copytree(one_rank[1], run)
    config = json.loads((run / "config.json").read_text())
    del config["training"]["drop_text"], config["model"]["null_text"], config["model"]["text"]
    (run / "config.json").write_text(json.dumps(config))
    common = ("--set", f"training.run={run}", "--resume", "--set")
    assert call(folder, *common, "model.text=sentence") == 2
    assert 'model.text = "sentence"' in capsys.readouterr().err
    assert "after 40 steps" in train(folder, "older", 1, "--resume")


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("training.learning_rate=1e-4", ["training.learning_rate = 0.0001", "0.002"]),
        ("training.seed=4", ["training.seed = 4"]),
        ("model.layers=3", ["model.layers = 3", "has 2"]),
    ],
)
def test_a_resumed_run_keeps_what_moves_the_curve(folder, one_rank, capsys, monkeypatch, key, words):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert call(folder, "--set", f"training.run={one_rank[1]}", "--set", key, "--resume") == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words), message
