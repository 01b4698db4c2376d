"""`scamo plan`: its inputs, its sums, and the paper's law at the points that the paper states."""

import json
from pathlib import Path

import numpy as np
import pytest

from scamo import cli
from scamo.config import ModelConfig, RunConfig, TokenizerConfig, load_config
from scamo.data.batches import BatchPlan
from scamo.errors import ScaMoError
from scamo.scaling.flops import parameters
from scamo.scaling.plan import STEP, Law, as_dict, make_plan

ROOT = Path(__file__).resolve().parents[2]
CONFIG, DS_CONFIG = ROOT / "configs/scamo_44m.toml", ROOT / "configs/ds_zero3.json"
CODES, TEXT_WIDTH = 50, 16


def plan_of(config=CONFIG, ds_config=DS_CONFIG, **arguments):
    return make_plan(config, ds_config, **{"gpu_memory": 24.0} | arguments)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """48 clips, each with a short and a long caption; tokens and text states of random numbers."""
    from scamo.data.dataset import Caption, DatasetWriter, MotionDataset, write_text_states, write_tokens

    folder = tmp_path_factory.mktemp("plan") / "dataset"
    rng = np.random.default_rng(0)
    with DatasetWriter(folder, provenance={"source": "random numbers"}) as writer:
        for clip in range(48):
            features = rng.standard_normal((int(rng.integers(40, 240)), 263)).astype(np.float32)
            writer.add_clip(f"clip{clip}", features, "train", [Caption("one"), Caption(f"two {clip}")])
    opened = MotionDataset.open(folder)
    tokens = [rng.integers(0, CODES, length // 4) for length in opened.item_lengths]
    write_tokens(folder, "random", tokens, codes=CODES, downsampling=4)
    states = [rng.standard_normal((4 if i % 2 else 20, TEXT_WIDTH)) for i in range(opened.n_captions)]
    write_text_states(folder, "random", [s.astype(np.float16) for s in states], encoder="minilm")
    return folder


@pytest.mark.parametrize("drop_text", [0.0, 0.4])
def test_samples_are_those_that_training_draws(dataset, drop_text):
    """Over many epochs of the real batch plan; clips of more than 50 tokens are left out by both."""
    from scamo.data.dataset import MotionDataset

    opened = MotionDataset.open(dataset)
    overrides = ["training.micro_batch_tokens=512", f"training.drop_text={drop_text}"]
    run = load_config(RunConfig, CONFIG, ["training.drop_token=0.0", *overrides])
    plan = plan_of(dataset=dataset, overrides=tuple(overrides))
    assert (plan.model.codes, plan.model.text_width) == (CODES, TEXT_WIDTH)
    assert not any("--dataset" in note for note in plan.notes)
    drawn = BatchPlan.of(opened, "train", opened.tokens(), opened.text_states(), run.model, run.training)
    assert drawn.excluded["more than 50 tokens"] > 0
    positions, scored = (sum(map(count, range(400))) for count in (drawn.positions, drawn.scored))
    assert (plan.data.motion + 1) / plan.data.length == pytest.approx(scored / positions, rel=0.02)
    assert plan.passes(scored) == pytest.approx(drawn.epochs(400), rel=0.02)


def test_samples_that_lose_their_text_attend_to_less(dataset):
    from scamo.data.dataset import MotionDataset

    def with_drop(drop_text, **arguments):
        return plan_of(overrides=("model.max_motion=30", f"training.drop_text={drop_text}"), **arguments).data

    none, half, all_of_them = (with_drop(p, dataset=dataset) for p in (0.0, 0.5, 1.0))
    assert with_drop(1.0).text == all_of_them.text == 1
    assert half.pairs == pytest.approx((none.pairs + all_of_them.pairs) / 2)
    lengths = MotionDataset.open(dataset).tokens().lengths
    kept = lengths[lengths <= 30].astype(float)
    # A row sees itself, the rows before it and the one state.
    assert all_of_them.pairs == pytest.approx(1 + ((kept**2).mean() + 3 * kept.mean()) / 2)


def test_the_codes_of_a_tokenizer_are_taken_where_there_is_no_dataset(tmp_path):
    from scamo.tokenizers.autoencoder import FSQAutoencoder

    config = TokenizerConfig(codebook_size=CODES, levels=(5, 10), width=8, latent_width=8, depth=1)
    FSQAutoencoder(config).save(tmp_path / "tokenizer")
    plan = plan_of(overrides=(f"data.tokenizer={tmp_path / 'tokenizer'}",))
    assert (plan.model.codes, plan.model.text_width) == (CODES, 2048)
    assert any("text_width = 2,048 assumed" in note for note in plan.notes)
    assumed = plan_of()
    assert assumed.model.codes == 64_000
    assert any("codes = 64,000 assumed" in note for note in assumed.notes)


def test_the_largest_micro_batch_fits_and_a_larger_one_does_not():
    for checkpointed, size in enumerate(plan_of().largest):
        fits, over = (plan_of(micro_batch_tokens=n).memory[checkpointed] for n in (size, size + STEP))
        assert fits.total <= 24 * 2**30 < over.total


def test_checkpointing_and_more_ranks_make_room_and_offload_makes_more():
    config = ROOT / "configs/scamo_3b.toml"
    assert plan_of(config).largest == (0, 0)
    one, eight = (plan_of(config, gpu_memory=80.0, ranks=ranks) for ranks in (1, 8))
    assert 0 < one.largest[0] < one.largest[1] < eight.largest[1]
    offload = plan_of(config, ROOT / "configs/ds_zero3_offload.json")
    assert offload.largest[0] > 0
    assert offload.memory[0].states.host > 16 * parameters(offload.model)


def test_a_moving_average_takes_memory_and_disk():
    without, with_average = plan_of(), plan_of(overrides=("training.ema_decay=0.999",))
    count = parameters(without.model)
    assert with_average.memory[0].total - without.memory[0].total == 4 * count
    assert with_average.checkpoint_bytes - without.checkpoint_bytes == 4 * count
    assert with_average.export_bytes == 2 * without.export_bytes == 8 * count


def test_time_follows_ranks_mfu_and_peak():
    slow = plan_of(mfu=0.25, peak_tflops=100.0)
    fast = plan_of(mfu=0.5, peak_tflops=300.0, ranks=2)
    assert slow.seconds / fast.seconds == pytest.approx(12)
    assert slow.flops == slow.seconds * 0.25 * 100e12


def test_the_law_at_the_compute_that_the_paper_states():
    law = Law.at(1e18, 3200)
    assert law.tokens == pytest.approx(4.90e7, rel=1e-3)
    assert 2 * law.codes * 3200 == pytest.approx(1.62e8, rel=5e-3)
    assert law.normalised_loss == pytest.approx(-5.277, abs=1e-3)


def test_the_law_of_a_model_is_where_eq_12_asks_for_it():
    model = ModelConfig(size="3B", codes=64_000, text_width=2048)
    forward = 24 * 24 * 3200**2 + 2 * 24 * 201 * 3200
    assert 10**-0.52 * Law.of(model).compute ** 0.57 == pytest.approx(forward, rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpu-memory", "-1"], "gpu_memory = -1"),
        ([], "gpu_memory is missing"),
        (["--gpu-memory", "24", "--ranks", "0"], "ranks = 0"),
        (["--gpu-memory", "24", "--ranks", "3"], "training.micro_batches = 2"),
        (["--gpu-memory", "24", "--mfu", "45"], "mfu = 45"),
        (["--gpu-memory", "24", "--peak-tflops", "0"], "peak_tflops = 0"),
        (["--gpu-memory", "24", "--motion-tokens", "-1"], "motion_tokens = -1"),
        (["--gpu-memory", "24", "--micro-batch-tokens", "100"], "micro_batch_tokens = 100"),
        (["--gpu-memory", "24", "--set", "model.heads=7"], "heads = 7"),
        (["--gpu-memory", "24", "--dataset", "nowhere"], "nowhere"),
        (["--gpu-memory", "24", "--ds_config", "none.json"], "none.json"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_one_line_that_names_it(arguments, words, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.chdir(ROOT)
    assert cli.main(["plan", "--config", "configs/scamo_44m.toml", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("scamo: error: ")
    assert words in error
    assert error.count("\n") == 1


def test_a_dataset_of_other_codes_is_refused(dataset):
    with pytest.raises(ScaMoError, match=r"model\.codes = 999"):
        plan_of(dataset=dataset, overrides=("model.codes=999",))


def test_text_and_json_say_the_same(dataset, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    command = ["plan", "--config", "configs/scamo_44m.toml", "--gpu-memory", "24", "--dataset", str(dataset)]
    assert cli.main(command) == 0
    text = capsys.readouterr().out
    assert cli.main([*command, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values == json.loads(json.dumps(as_dict(plan_of(dataset=dataset))))
    for part in ("all", "checkpointed"):
        assert f"{values['memory'][part]['total'] / 2**30:.2f}" in text
        assert f"{values['memory'][part]['largest_micro_batch_tokens']:,}" in text
    assert f"{values['step_seconds']:.4g} s" in text
    assert f"{values['disk_bytes'] / 1e9:.2f} GB" in text
    assert f"({values['law']['passes']:.3g} passes)" in text
