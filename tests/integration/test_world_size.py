"""A run on two ranks goes on with one and with four: ZeRO-3, through DeepSpeed's universal checkpoints."""

import importlib.util
import json
import shutil

import pytest
from training_runs import ROOT, checkpoints, curve, train, weights

from scamo.training.logging import read_log

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("DeepSpeed is not installed", allow_module_level=True)

SAVED, STEPS = 10, 20


@pytest.fixture(scope="module")
def settings(folder):
    """In float32: gradients that are bfloat16 numbers have the same float32 sum in any order."""
    ds_config = json.loads((ROOT / "configs/ds_zero3.json").read_text()) | {"bf16": {"enabled": False}}
    path = folder / "ds_float32.json"
    path.write_text(json.dumps(ds_config))
    sets = ["training.micro_batches=4", f"training.steps={STEPS}"]
    return ["--ds_config", path, *(word for value in sets for word in ("--set", value))]


@pytest.fixture(scope="module")
def two_ranks(folder, settings):
    train(folder, "world2", 2, *settings)
    return folder / "world2"


@pytest.mark.parametrize("ranks", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_another_number_of_ranks_continues_the_curve(folder, settings, two_ranks, ranks):
    run = folder / f"world{ranks}"
    shutil.copytree(two_ranks, run, ignore=shutil.ignore_patterns("export", "step-0000020"))
    # What a crash in the middle of a conversion leaves.
    rubbish = run / f"checkpoints/step-{SAVED:07d}.universal.partial/global_step{SAVED}/zero"
    rubbish.mkdir(parents=True)
    (rubbish / "optimizer_state.pt").write_bytes(b"half")

    output = train(folder, run.name, ranks, "--resume", *settings)
    source = run / "checkpoints" / f"step-{SAVED:07d}"
    assert output.count(f"{source}: saved with 2 ranks, ZeRO stage 3, ") == 1
    assert f"resuming from {source} after {SAVED} steps" in output
    assert checkpoints(run) == ["step-0000010", "step-0000020"]
    assert read_log(run / "log.jsonl", "start")[-1]["ranks"] == ranks

    expected, found = curve(two_ranks), curve(run)
    assert expected.keys() == found.keys()
    for step in range(1, STEPS + 1):
        assert found[step][1:] == expected[step][1:]
        # Seen: the same loss at first, then up to 2.6e-7 apart.
        assert found[step][0] == pytest.approx(expected[step][0], abs=2e-6)
    expected, found = weights(two_ranks), weights(run)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().max() < 1e-6, name  # seen: 6e-8
