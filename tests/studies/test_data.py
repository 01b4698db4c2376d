"""The study of data through the real trainer, its common yardstick, and its statistics."""

import json
import math

import numpy as np
import pytest
import torch

from scamo.config import load_config
from scamo.data.dataset import MotionDataset
from scamo.data.prepare.degrade import degrade
from scamo.errors import ScaMoError
from scamo.studies.data import (
    DataStudyConfig,
    Estimate,
    Quality,
    Table,
    copy_text,
    copy_tokens,
    run_data_study,
)
from scamo.tokenizers import load_tokenizer
from scamo.tokenizers.encode import encode_dataset, encode_motions
from scamo.training.logging import read_log

CELLS = ("1-clean-s0", "1-shaken-s0", "0.25-clean-s0", "0.25-shaken-s0")


@pytest.fixture(scope="module")
def study(studied):
    path = studied / "data_study.toml"
    path.write_text(
        f"""
        dataset = "{studied / "corpus"}"
        tokenizer = "{studied / "fsq"}"
        evaluator = "{studied / "evaluator"}"
        out = "{studied / "data_out"}"
        quantities = [1.0, 0.25]
        seeds = [0]
        pool = 4
        text_following = false
        [[qualities]]
        name = "clean"
        [[qualities]]
        name = "shaken"
        jitter = 0.05
        foot_skate = 0.5
        caption_noise = 0.5
        [model]
        size = ""
        layers = 1
        heads = 2
        width = 16
        max_text = 60
        [training]
        steps = 12
        micro_batch_tokens = 512
        learning_rate = 2e-2
        validate_every = 3
        save_every = 12
        """
    )
    return path


def test_a_degraded_dataset_has_the_tokens_and_states_that_encoding_it_gives(studied, tmp_path):
    base = MotionDataset.open(studied / "corpus")
    if "fsq" not in base.token_names():
        encode_dataset(studied / "fsq", base.folder, device="cpu", progress=False)
    tokens, text = base.tokens("fsq"), base.text_states()
    made = degrade(base.folder, tmp_path / "d", keep=0.5, jitter=0.05, caption_noise=0.5, progress=False)
    for _ in range(2):  # what is there is left as it is
        copy_text(base, text, made)
        copy_tokens(base, tokens, made, studied / "fsq", "cpu")
    new = made.tokens("fsq")
    whole = [made.item_features(item) for item in range(made.n_items)]
    expected = encode_motions(load_tokenizer(studied / "fsq", torch.device("cpu")), whole)
    assert all(np.array_equal(new[item], expected[item]) for item in range(made.n_items))
    for split in ("val", "test"):
        pairs = zip(base.items(split), made.items(split), strict=True)
        assert all(np.array_equal(tokens[old], new[item]) for old, item in pairs)
    states, by_text = made.text_states(), {base.caption(c): text[c] for c in range(base.n_captions)}
    for caption in range(made.n_captions):
        assert np.array_equal(states[caption], by_text[made.caption(caption)])
    assert states.encoder == text.encoder


def test_a_study_is_degraded_trained_measured_and_not_made_twice(study, studied, capsys):
    out = studied / "data_out"
    assert run_data_study(study, dry_run=True) == []
    assert "| 0.25 | 9 |" in capsys.readouterr().out
    assert not out.exists()
    assert run_data_study(study, progress=False) == []
    results = {line["cell"]: line for line in map(json.loads, (out / "results.jsonl").open())}
    assert tuple(results) == CELLS
    unigrams = {name: set() for name in CELLS}
    for name, result in results.items():
        work = out / "work" / name
        logged = read_log(work / "run" / "log.jsonl", "val")
        losses = [record["loss"] for record in logged]
        unigrams[name] = {record["unigram"] for record in logged}
        assert result["l_u"] == pytest.approx(min(losses) - result["unigram"])
        assert result["l_u_last"] == pytest.approx(losses[-1] - result["unigram"])
        assert result["best_step"] == 3 + 3 * losses.index(min(losses))
        assert len({record["motion_tokens"] for record in logged}) == 1
        assert 0 <= result["r_precision_3"] <= 1
        assert not (work / "data").exists()
    # One yardstick: that of the run on all of the clean data, and not each run's own.
    (own,) = unigrams["1-clean-s0"]
    assert [result["unigram"] for result in results.values()] == [pytest.approx(own)] * 4
    assert len({*map(frozenset, unigrams.values())}) > 2
    assert [results[name]["counts"]["kept_clips"] for name in CELLS] == [36, 36, 9, 9]
    assert (
        results["1-shaken-s0"]["physics"]["after"]["jerk"]
        > results["1-shaken-s0"]["physics"]["before"]["jerk"]
    )
    table = (out / "table.md").read_text()
    assert "| 0.25 | shaken | 9 | 1 |" in table
    assert "shaken, 0.25: 4x the data, or clean" in table
    assert (out / "quantity.png").stat().st_size > 1000
    page = (out / "report.html").read_text()
    assert "data:image/png;base64" in page
    assert "http" not in page
    before = {path: path.stat().st_mtime_ns for path in (out / "cells").iterdir()}
    assert run_data_study(study, progress=False) == []
    assert {path: path.stat().st_mtime_ns for path in (out / "cells").iterdir()} == before
    with pytest.raises(ScaMoError, match="other training"):
        run_data_study(study, overrides=("training.steps=13",), progress=False)
    more = 'qualities=[{name="clean"},{name="shaken",jitter=0.1}]'
    with pytest.raises(ScaMoError, match="other jitter"):
        run_data_study(study, overrides=(more,), progress=False)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("quantities=[1.0, 0.0]", "quantities: 0.0"),
        ("quantities=[1.0, 1.0]", "each once"),
        ("seeds=[]", "at least one"),
        ('qualities=[{name="a", jitter=0.1}]', "one, and only one, without any noise"),
        ('qualities=[{name="a/b"}]', "expected letters"),
        ("ranks=0", "ranks = 0"),
    ],
)
def test_bad_settings_are_named(study, override, message):
    with pytest.raises(ScaMoError, match=message):
        load_config(DataStudyConfig, study, (override,))


def known(quantity, quality, interaction, noise, seeds=3):
    """Results whose L_u is -3, + quantity at a fourth, + quality when noisy, + interaction when both."""
    config = DataStudyConfig(
        "d",
        "t",
        (Quality("noisy", jitter=0.1), Quality("clean")),
        quantities=(0.25, 1.0),
        seeds=tuple(range(seeds)),
    )
    rng = np.random.default_rng(0)
    results = [
        {
            "quantity": q,
            "quality": name,
            "seed": seed,
            "l_u": -3
            + quantity * (q < 1)
            + quality * (name == "noisy")
            + interaction * (q < 1 and name == "noisy")
            + 0.5 * seed  # of the seed alone: within-seed differences do not see it
            + noise * rng.standard_normal(),
        }
        for q in (1.0, 0.25)
        for name in ("clean", "noisy")
        for seed in config.seeds
    ]
    return config, results


def test_known_effects_come_back():
    config, results = known(0.4, 0.1, 0.2, 1e-6)
    table = Table(config, results, "l_u")
    effects = dict(table.effects())
    assert effects["quantity 0.25 against 1"].mean == pytest.approx(0.5, abs=1e-4)
    assert effects["noisy against clean"].mean == pytest.approx(0.2, abs=1e-4)
    assert effects["interaction: noisy at 0.25, beyond at 1"].mean == pytest.approx(0.2, abs=1e-4)
    ((name, more, clean, difference),) = table.trades()
    assert name == "noisy, 0.25: 4x the data, or clean"
    assert more.mean == pytest.approx(-0.6, abs=1e-4)
    assert clean.mean == pytest.approx(-0.3, abs=1e-4)
    assert difference.mean == pytest.approx(-0.3, abs=1e-4)
    assert difference.sure
    shares = {name: share for name, share, _ in table.variance()}
    assert sum(shares.values()) == pytest.approx(1)
    # Balanced two-way sums of squares: 3 (0.5^2), 3 (0.2^2), 3 (0.1^2), and the seeds' 4 * 0.5.
    total = 0.75 + 0.12 + 0.03 + 2
    assert shares["quantity"] == pytest.approx(0.75 / total, rel=1e-3)
    assert shares["interaction"] == pytest.approx(0.03 / total, rel=1e-3)


def test_what_seeds_hide_is_not_told_apart():
    config, results = known(0.1, 0.1, 0.0, 1.0)
    table = Table(config, results, "l_u")
    ((*_, difference),) = table.trades()
    assert not difference.sure
    # A seed that one cell lacks is left out of all.
    assert Table(config, results[1:], "l_u").seeds == [1, 2]
    one = Table(config, [r for r in results if r["seed"] == 0], "l_u")
    assert all(math.isnan(p) for *_, p in one.variance())
    assert not any(effect.sure for _, effect in one.effects())


def test_an_interval_is_that_of_student():
    found = Estimate.of(np.array([1.0, 2.0, 3.0]))
    assert (found.mean, found.n) == (2.0, 3)
    assert found.high - found.mean == pytest.approx(4.302653 / math.sqrt(3), rel=1e-5)
    assert found.text(1) == "+2.0 (-0.5 to +4.5)"
