"""A grid through the real trainer: planned to the budget, resumed, and read by the fit."""

import json
from pathlib import Path

import numpy as np
import pytest

from scamo import cli
from scamo.config import ModelConfig, TokenizerConfig, load_config, to_dict
from scamo.errors import ScaMoError
from scamo.scaling.grid import GridConfig, plan_grid, run_grid
from scamo.scaling.points import read_run
from scamo.training.logging import read_log

TEXT_WIDTH = 16
BUDGETS = (2e9, 6e9)


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """A corpus of 40 clips with text states, a tokenizer that was never trained, and a grid over them."""
    from scamo.data.dataset import MotionDataset, write_text_states
    from scamo.data.prepare.synthetic import prepare_synthetic
    from scamo.tokenizers.autoencoder import FSQAutoencoder

    folder = tmp_path_factory.mktemp("grid")
    prepare_synthetic(folder / "set", clips=60, captions=1, workers=1, progress=False)
    data = MotionDataset.open(folder / "set")
    rng = np.random.default_rng(0)
    states = [rng.standard_normal((5, TEXT_WIDTH)).astype(np.float16) for _ in range(data.n_captions)]
    write_text_states(folder / "set", "random", states, encoder="minilm")
    config = TokenizerConfig(codebook_size=256, width=8, latent_width=8, depth=1)
    FSQAutoencoder(config, data.mean, data.std).save(folder / "fsq_256")
    path = folder / "grid.toml"
    path.write_text(
        f"""
        dataset = "{folder / "set"}"
        tokenizers = ["{folder / "fsq_256"}"]
        out = "{folder / "out"}"
        budgets = [6e9, 2e9]
        min_steps = 4
        validations = 3
        [rule]
        learning_rate = 1e-3
        width = 32
        exponent = 1.0
        [[models]]
        layers = 1
        heads = 2
        width = 16
        [[models]]
        layers = 2
        heads = 2
        width = 64
        [training]
        micro_batch_tokens = 512
        """
    )
    return path


def plan_of(grid):
    return plan_grid(load_config(GridConfig, grid), progress=False)


def test_steps_bring_every_run_to_its_budget(grid):
    planned = plan_of(grid)
    assert [run.budget for run in planned] == [*BUDGETS, *BUDGETS]
    assert [run.config.training.learning_rate for run in planned] == [2e-3, 2e-3, 5e-4, 5e-4]
    for run in planned:
        if run.why:
            assert "fewer than 4" in run.why
            continue
        # Within half a step.
        assert abs(run.flops - run.budget) <= 0.51 * run.flops / run.config.training.steps
    assert sum(not run.why for run in planned) >= 3


def test_a_grid_trains_resumes_and_is_fitted(grid, capsys):
    folder = grid.parent
    # Stopped after the first run; of the second there are a config and the beginning of a log.
    assert run_grid(grid, overrides=("budgets=[2e9]", "models=[{layers=1, heads=2, width=16}]")) == []
    (run,) = [path for path in (folder / "out" / "runs").iterdir() if path.is_dir()]
    log = (run / "log.jsonl").read_bytes()
    half = folder / "out" / "runs" / run.name.replace("2.00e+09", "6.00e+09")
    half.mkdir()
    config = json.loads((run / "config.json").read_text())
    config["training"] |= {"steps": plan_of(grid)[1].config.training.steps}
    (half / "config.json").write_text(json.dumps(config))
    (half / "log.jsonl").write_bytes(log.splitlines(keepends=True)[0])
    assert cli.main(["scaling", "run", str(grid)]) == 0
    assert (run / "log.jsonl").read_bytes() == log, "a finished run is not made again"
    folders = sorted(path for path in (folder / "out" / "runs").iterdir() if path.is_dir())
    assert len(folders) >= 3
    for path in folders:
        found = read_run(path)
        assert found.finished
        budget = float(path.name.split("_")[0])
        # The trainer counts what the plan foretold.
        assert found.flops[-1] == pytest.approx(budget, rel=0.6 / found.steps[-1] + 0.01)
        assert len(read_log(path / "log.jsonl", "val")) >= 3
    assert "runs of 4" in capsys.readouterr().out


def test_a_failed_run_is_named_and_the_rest_goes_on(grid, tmp_path, capsys):
    out = tmp_path / "out"
    blocked = out / "runs"
    blocked.mkdir(parents=True)
    options = (f"out={out}", "models=[{layers=1, heads=2, width=16}]", "budgets=[2e9, 3e9]")
    # A folder that is no run stands where the first one goes.
    (blocked / "2.00e+09_1x16_240_s0").mkdir()
    (blocked / "2.00e+09_1x16_240_s0" / "mine.txt").write_text("keep")
    assert run_grid(grid, overrides=options, progress=False) == ["2.00e+09_1x16_240_s0"]
    assert "is not a training run" in capsys.readouterr().err
    assert (blocked / "3.00e+09_1x16_240_s0" / "export").is_dir()


def test_another_grid_in_the_same_folder_is_refused(grid, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    described = to_dict(load_config(GridConfig, grid, (f"out={out}",)))
    (out / "grid.json").write_text(json.dumps(described | {"validations": 9}))
    with pytest.raises(ScaMoError, match="holds a grid with other validations"):
        run_grid(grid, overrides=(f"out={out}",), progress=False)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("budgets=[]", "budgets is empty"),
        ("budgets=[-1.0]", "is no number of FLOPs above 0"),
        ("rule.width=0", "expected above 0"),
        ("min_steps=0", "expected 0 < min <= max"),
        ("dataset=nowhere", "nowhere"),
        ("model=3", "unknown key model"),
    ],
)
def test_a_bad_grid_is_named(grid, override, message):
    with pytest.raises(ScaMoError, match=message):
        run_grid(grid, overrides=(override,), dry_run=True, progress=False)


@pytest.mark.parametrize("name", ["cpu", "gpu", "real", "bandai"])
def test_the_shipped_grids_are_read(name):
    root = Path(__file__).resolve().parents[2]
    config = load_config(GridConfig, root / f"configs/scaling_{name}.toml")
    widths = [ModelConfig(**to_dict(model), codes=1, text_width=1).width for model in config.models]
    assert widths == sorted(widths)
    assert (root / config.ds_config).exists()
