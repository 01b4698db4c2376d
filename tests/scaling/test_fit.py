"""From run folders to laws: what made the losses is found again, and foretold beyond the runs."""

import json

import numpy as np
import pytest

from scamo.errors import ScaMoError
from scamo.scaling.fit import fit_runs, table, write_fit
from scamo.scaling.laws import Surface

LAW = Surface(5.0, ((0.1, 0.35), (-0.5, 0.3), (0.3, 0.3)), (2e5, 4e4, 1e6), 0, 0)
SIZES = ((1, 32), (2, 48), (3, 64), (4, 96), (6, 128), (8, 192))
BUDGETS = (1e12, 3e12, 1e13, 3e13, 1e14)


@pytest.fixture
def runs(write_run, tmp_path, rng):
    """Every size and three vocabularies at every budget."""
    for budget in BUDGETS:
        for layers, width in SIZES:
            for codes in (240, 1000, 4375):
                name = f"{budget:.0e}_{layers}x{width}_{codes}"
                shape = {"layers": layers, "width": width, "codes": codes, "flops": budget}
                write_run(name, LAW, noise=rng, **shape)
    return tmp_path / "runs"


def test_the_surface_that_made_the_losses_is_found(runs):
    fit = fit_runs([runs], draws=20)
    assert fit.warnings == []
    assert fit.budgets == pytest.approx(BUDGETS)
    found = fit.surfaces["additive"]
    assert found.points == len(BUDGETS) * len(SIZES) * 3
    n, v, d = (np.array([p[k] for p in fit.as_dict()["runs"]]) for k in ("n_nv", "n_v", "motion_tokens"))
    assert np.abs(found(n, v, d) - LAW(n, v, d)).max() < 0.02


def test_the_largest_budget_is_foretold(runs):
    held = fit_runs([runs], draws=0).held_out
    assert held["budget"] == pytest.approx(1e14)
    assert held["runs"] == 4 * len(SIZES) * 3
    errors = {name: abs(row["relative_error"]) for name, row in held["predicted"].items()}
    assert set(errors) == {"lowest", "envelope", "additive", "coupled"}
    # The true law is a surface; a straight line in log C bends away from it.
    assert errors["additive"] < 0.01
    assert errors["coupled"] < 0.02
    assert held["predicted"]["additive"]["mean_absolute_error"] < 0.03
    row = held["predicted"]["lowest"]
    assert row["l_u"] - held["measured"]["l_u"] == pytest.approx(row["error"])


@pytest.mark.parametrize("convention", ["counted", "paper"])
def test_cost_is_that_of_the_runs(runs, convention):
    """C = (a N_nv + b N_v) D, within what attention adds to small widths."""
    fit = fit_runs([runs], convention=convention, draws=0)
    a, b = fit.cost
    for run in fit.as_dict()["runs"]:
        estimate = (a * run["n_nv"] + b * run["n_v"]) * run["motion_tokens"]
        assert estimate == pytest.approx(run["compute"], rel=1e-9 if convention == "paper" else 0.25)


def test_intervals_hold_the_estimate(runs):
    fit = fit_runs([runs], draws=60)
    laws = fit.laws["lowest"]
    low, high = np.percentile([draw.l_u.slope for draw in fit.draws["lowest"]], [2.5, 97.5])
    assert low <= laws.l_u.slope <= high
    assert laws.n_nv.exponent + laws.tokens.exponent == pytest.approx(1, abs=0.2)
    assert laws.constrained[0].exponent + laws.constrained[1].exponent == pytest.approx(1)
    assert "| lowest | L_u ~ log C |" in table(fit)


def test_fit_json_is_whole_and_plain(runs, tmp_path):
    fit = fit_runs([runs], draws=3)
    write_fit(fit, tmp_path)
    text = (tmp_path / "fit.json").read_text()
    assert "NaN" not in text
    stored = json.loads(text)
    assert stored["format"] == "scamo-scaling-fit-1"
    assert len(stored["selections"]["lowest"]["draws"]) == 3
    assert stored["selections"]["lowest"]["laws"]["n_nv"]["exponent"] == fit.laws["lowest"].n_nv.exponent


def test_too_few_runs_are_refused_by_what_is_missing(write_run, tmp_path):
    for budget in BUDGETS[:2]:
        write_run(f"{budget}", LAW, layers=2, width=64, codes=240, flops=budget, validations=1)
    with pytest.raises(ScaMoError, match="too few runs to fit: 2 selected points, expected 3 or more"):
        fit_runs([tmp_path / "runs"])


def test_one_vocabulary_is_enough_where_widths_vary(write_run, tmp_path):
    for budget in BUDGETS:
        for layers, width in SIZES:
            shape = {"layers": layers, "width": width, "codes": 240, "flops": budget}
            write_run(f"{budget:.0e}_{width}", LAW, **shape)
    fit = fit_runs([tmp_path / "runs"], draws=0)
    assert set(fit.laws) == {"lowest", "envelope"}
    # N_v = V d varies with the width.
    assert "additive" in fit.surfaces


def test_overfitted_runs_are_no_part_of_a_surface(runs, write_run):
    def turning(n_nv, n_v, tokens):
        return -1 + np.abs(np.log(tokens / 1e6))

    write_run("turned", turning, layers=2, width=48, codes=240, flops=1e13)
    fit = fit_runs([runs], draws=0)
    assert fit.warnings == ["overfitted, no part of the surfaces: turned"]
    assert fit.surfaces["additive"].points == len(BUDGETS) * len(SIZES) * 3
