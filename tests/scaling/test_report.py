"""The page of a fit holds its pictures and numbers, and is there when parts are missing."""

import re

import pytest

from scamo.scaling.fit import fit_runs
from scamo.scaling.laws import Surface
from scamo.scaling.report import write_report

LAW = Surface(5.0, ((0.1, 0.35), (-0.5, 0.3), (0.3, 0.3)), (2e5, 4e4, 1e6), 0, 0)


def make(write_run, budgets, vocabularies=(240, 1000)):
    for budget in budgets:
        for layers, width in ((1, 32), (2, 64), (4, 96)):
            for codes in vocabularies:
                shape = {"layers": layers, "width": width, "codes": codes, "flops": budget}
                write_run(f"{budget:.0e}_{width}_{codes}", LAW, **shape)


def test_every_picture_is_drawn_and_stands_in_the_page(write_run, tmp_path):
    make(write_run, (1e12, 3e12, 1e13, 3e13))
    fit = fit_runs([tmp_path / "runs"], draws=10)
    written = write_report(fit, tmp_path / "out")
    names = [path.name for path in written]
    assert names == ["isoflop.png", "laws.png", "curves.png", "sizes.png", "held_out.png", "report.html"]
    for path in written[:-1]:
        assert path.read_bytes()[:4] == b"\x89PNG"
    page = written[-1].read_text()
    assert len(re.findall("data:image/png;base64,", page)) == 5
    assert page.count("<table>") == 2
    assert f"<td>{fit.laws['lowest'].n_nv.exponent:.3f}</td>" in page
    assert "http" not in page, "it needs nothing from elsewhere"


def test_what_is_missing_is_left_out_and_said(write_run, tmp_path):
    make(write_run, (1e12, 3e12, 1e13), vocabularies=(240,))
    written = write_report(fit_runs([tmp_path / "runs"], draws=0), tmp_path / "out")
    assert [path.name for path in written][-1] == "report.html"
    assert "held_out.png" not in [path.name for path in written]
    assert "nothing was held out" in written[-1].read_text()


@pytest.mark.parametrize("convention", ["counted", "paper"])
def test_both_conventions(write_run, tmp_path, convention):
    make(write_run, (1e12, 3e12, 1e13))
    write_report(fit_runs([tmp_path / "runs"], draws=3, convention=convention), tmp_path / "out")
    assert convention in (tmp_path / "out" / "report.html").read_text()
