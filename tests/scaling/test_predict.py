"""Predictions are those of the laws; extrapolation is said to be one."""

import json
import math

import pytest

from scamo import cli
from scamo.config import DataConfig, ModelConfig, RunConfig, TrainingConfig
from scamo.errors import ScaMoError
from scamo.scaling.fit import fit_runs, write_fit
from scamo.scaling.flops import block_parameters
from scamo.scaling.grid import Planned
from scamo.scaling.laws import Surface
from scamo.scaling.predict import predict, predict_printed, predict_runs, read_fit, runs_table, table

LAW = Surface(5.0, ((0.1, 0.35), (-0.5, 0.3), (0.3, 0.3)), (2e5, 4e4, 1e6), 0, 0)


@pytest.fixture
def fit(write_run, tmp_path):
    for budget in (1e12, 1e13, 1e14):
        for layers, width in ((1, 32), (2, 64), (4, 96), (8, 192)):
            for codes in (240, 1000):
                shape = {"layers": layers, "width": width, "codes": codes, "flops": budget}
                write_run(f"{budget:.0e}_{width}_{codes}", LAW, **shape)
    write_fit(fit_runs([tmp_path / "runs"], draws=20), tmp_path)
    return read_fit(tmp_path / "fit.json")


def test_the_paper_s_laws_at_1e18():
    """Its own statement: L_u -5.277, D 4.90e7, N_v 1.62e8 and N_nv 5.50e9 in its units."""
    found = predict_printed(1e18)
    assert found.l_u.value == pytest.approx(-5.277, abs=1e-3)
    assert found.tokens.value == pytest.approx(4.90e7, rel=2e-3)
    assert found.paper_n_v.value == pytest.approx(1.62e8, rel=2e-3)
    assert found.paper_n_nv.value == pytest.approx(5.50e9, rel=2e-3)
    assert found.n_nv.value == pytest.approx(2.75e9, rel=0.1)
    assert (found.size, found.codebook) == ("3B", 16384)


def test_a_prediction_is_what_the_laws_say(fit):
    compute = 5e14
    found, warnings = predict(fit, compute)
    assert warnings == []
    by_law = {p.law: p for p in found}
    assert set(by_law) == {"lowest", "envelope", "additive surface", "coupled surface"}
    law = fit["selections"]["lowest"]["laws"]["n_nv"]
    expected = 10 ** (law["intercept"] + law["exponent"] * math.log10(compute))
    assert by_law["lowest"].n_nv.value == pytest.approx(expected)
    assert by_law["lowest"].n_nv.low <= expected <= by_law["lowest"].n_nv.high
    surface = by_law["additive surface"]
    a, b = fit["cost"]
    spent = (a * surface.n_nv.value + b * surface.n_v.value) * surface.tokens.value
    assert spent == pytest.approx(compute, rel=1e-3)
    true = LAW.best(compute, lambda n, v: a * n + b * v)
    assert surface.l_u.value == pytest.approx(true[3], abs=0.02)
    assert "| additive surface |" in table(found)


def test_the_runs_of_a_grid_are_foretold(fit):
    model = ModelConfig(size="", layers=3, heads=2, width=64)
    config = RunConfig(DataConfig("corpus"), model, TrainingConfig())
    planned = [
        Planned(name, config, 512, 3e14, 3e14, 2e7, 1.0, why) for name, why in (("a", ""), ("b", "no"))
    ]
    [(name, values)] = predict_runs(fit, planned)
    assert name == "a"
    assert set(values) == {"additive", "coupled"}
    true = float(LAW(block_parameters(model), 512 * 64, 2e7))
    for value in values.values():
        assert value.value == pytest.approx(true, abs=0.02)
        assert value.low <= value.value <= value.high
    assert "| a | " in runs_table([(name, values)])
    with pytest.raises(ScaMoError, match="fit with --convention counted"):
        predict_runs(fit | {"convention": "paper"}, planned)


def test_beyond_a_decade_it_warns(fit):
    assert "more than a decade from the runs" in predict(fit, 1e16)[1][0]
    assert "more than a decade from the runs" in predict(fit, 1e10)[1][0]


@pytest.mark.parametrize("flops", [0, -1, math.nan, math.inf])
def test_a_compute_that_is_none_is_refused(flops):
    with pytest.raises(ScaMoError, match="expected a positive number"):
        predict_printed(flops)


def test_another_file_is_named(tmp_path):
    with pytest.raises(ScaMoError, match="no such file"):
        read_fit(tmp_path / "fit.json")
    (tmp_path / "fit.json").write_text(json.dumps({"format": "other"}))
    with pytest.raises(ScaMoError, match="expected format scamo-scaling-fit-1"):
        read_fit(tmp_path / "fit.json")


def test_the_commands_fit_and_predict(fit, tmp_path, capsys):
    assert (
        cli.main(["scaling", "fit", str(tmp_path / "runs"), "-o", str(tmp_path / "out"), "--draws", "5"]) == 0
    )
    assert "| lowest | N_nv ~ C^b |" in capsys.readouterr().out
    assert (tmp_path / "out" / "table.md").is_file()
    assert cli.main(["scaling", "predict", "--flops", "1e17", "--fit", str(tmp_path / "out/fit.json")]) == 0
    printed = capsys.readouterr()
    assert "| envelope |" in printed.out
    assert "more than a decade" in printed.err


def test_the_paper_s_laws_by_command(capsys):
    assert cli.main(["scaling", "fit", "--paper"]) == 0
    assert "| N_v ~ N_nv^g | 1.467, -5.604 |" in capsys.readouterr().out
    assert cli.main(["scaling", "predict", "--flops", "1e18"]) == 0
    assert "| printed |" in capsys.readouterr().out
    assert cli.main(["scaling", "fit"]) == 2
    assert "name the runs to fit" in capsys.readouterr().err
