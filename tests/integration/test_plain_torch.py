"""The trainer against the loop that one would write without it: plain PyTorch, one process, float32.

Under ZeRO-3 every weight that a kernel reads is gathered for it, and its gradient reduced: a kernel that
missed one would show here as another curve.
"""

import importlib.util
import json

import pytest
import torch
from safetensors.torch import load_file
from training_runs import ROOT, train

from scamo.config import RunConfig, load_config
from scamo.data.batches import BatchPlan, PackedLoader
from scamo.data.dataset import MotionDataset
from scamo.generation.export import read_export
from scamo.models.prefix_lm import PrefixLM
from scamo.training.engine import parameter_groups
from scamo.training.logging import read_log
from scamo.training.schedule import learning_rate

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("DeepSpeed is not installed", allow_module_level=True)

STEPS = 12
SETS = [f"training.steps={STEPS}", "training.warmup_ratio=0.2", "training.weight_decay=0.1"]


def plain(folder, model_config):
    """Losses, gradient norms and final weights."""
    config = load_config(RunConfig, folder / "config.toml", SETS)
    training = config.training
    dataset = MotionDataset.open(folder / "dataset")
    plan = BatchPlan.of(dataset, "train", dataset.tokens(), dataset.text_states(), model_config, training)
    loader = PackedLoader(dataset, "train", plan)
    torch.manual_seed(training.seed)
    model = PrefixLM(model_config, impl="torch")
    optimizer = torch.optim.AdamW(parameter_groups(model, training.weight_decay), betas=training.betas)
    losses, norms = [], []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, training)
        loss = sum(model(batch).loss_sum for batch in loader.step(step)) / plan.scored(step)
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), training.clip_norm)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses, norms, model.state_dict()


@pytest.mark.parametrize("options", [[], ["training.checkpoint_activations=true"]], ids=["", "recomputed"])
def test_zero_3_on_two_ranks_is_the_plain_loop(folder, tmp_path, options):
    ds_config = json.loads((ROOT / "configs/ds_zero3.json").read_text())
    ds_config["bf16"] = {"enabled": False}
    (tmp_path / "ds.json").write_text(json.dumps(ds_config))
    name = f"plain-{len(options)}"
    sets = [word for key in [*SETS, *options] for word in ("--set", key)]
    train(folder, name, 2, *sets, "--ds_config", tmp_path / "ds.json")
    _, model_config = read_export(folder / name / "export")
    losses, norms, weights = plain(folder, model_config)

    records = read_log(folder / name / "log.jsonl", "train")
    assert [r["loss"] for r in records] == pytest.approx(losses, rel=2e-5)
    assert [r["grad_norm"] for r in records] == pytest.approx(norms, rel=1e-4)
    assert losses[-1] < losses[0] - 0.05, "nothing was learnt: the comparison is empty"
    trained = load_file(folder / name / "export/model.safetensors")
    assert trained.keys() == weights.keys()
    for key, weight in weights.items():
        torch.testing.assert_close(trained[key], weight, atol=1e-4, rtol=0, msg=lambda m, k=key: f"{k}: {m}")
