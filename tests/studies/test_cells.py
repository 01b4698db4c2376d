"""Cells are run once, in order, and one that fails costs no other."""

import json

import pytest

from scamo.errors import ScaMoError
from scamo.studies.cells import Cell, Study


def cell(name, run=lambda work: {"score": 1}, **settings):
    return Cell(name, settings, run)


def counting(calls, name, value=1):
    def run(work):
        calls.append(name)
        return {"score": value}

    return run


def test_results_stand_in_the_order_of_the_plan_and_are_not_made_again(tmp_path):
    calls = []
    cells = [cell(name, counting(calls, name, k), size=k) for k, name in enumerate(("b", "a"))]
    assert Study(tmp_path, {"data": "x"}, cells).run(progress=False) == []
    # A cell that comes later stands where the plan has it, and is the only one to be run.
    study = Study(tmp_path, {"data": "x"}, [cell("c", counting(calls, "c", 7)), *cells])
    assert study.run(progress=False) == []
    assert calls == ["b", "a", "c"]
    expected = [
        {"cell": "c", "score": 7},
        {"cell": "b", "size": 0, "score": 0},
        {"cell": "a", "size": 1, "score": 1},
    ]
    assert study.results() == expected
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == expected
    assert json.loads((tmp_path / "study.json").read_text()) == {"data": "x"}


def test_a_failed_cell_is_named_and_goes_on_from_what_it_left(tmp_path, capsys):
    def stops(work):
        (work / "half.txt").write_text("half")
        raise ScaMoError("\n".join(f"line {n}" for n in range(30)))

    def breaks(work):
        return {"score": 1 / 0}

    def unwritable(work):
        return {"score": object()}

    cells = [cell("stops", stops), cell("breaks", breaks), cell("odd", unwritable), cell("fine")]
    study = Study(tmp_path, {}, cells)
    assert study.run() == ["stops", "breaks", "odd"]
    said = capsys.readouterr()
    assert "4/4 fine: " in said.out
    assert "stops failed:\n    line 18\n" in said.err, "the tail only"
    assert "breaks failed:" in said.err
    assert "ZeroDivisionError" in said.err
    assert [result["cell"] for result in study.results()] == ["fine"]
    assert not list((tmp_path / "cells").glob(".*")), "nothing half written"

    again = Study(tmp_path, {}, [cell("stops", lambda work: {"found": (work / "half.txt").read_text()})])
    assert again.run(progress=False) == []
    assert again.results() == [{"cell": "stops", "found": "half"}]


def test_a_result_may_not_hide_a_setting(tmp_path, capsys):
    study = Study(tmp_path, {}, [cell("a", lambda work: {"size": 3}, size=1)])
    assert study.run(progress=False) == ["a"]
    assert "the result has keys of the settings: size" in capsys.readouterr().err


def test_another_study_in_the_same_folder_is_refused(tmp_path):
    Study(tmp_path, {"data": "x", "ways": (1, 2)}, [cell("a", size=1)]).run(progress=False)
    Study(tmp_path, {"data": "x", "ways": (1, 2)}, [cell("a", size=1)])
    with pytest.raises(ScaMoError, match="holds a study with other data: name another out"):
        Study(tmp_path, {"data": "y", "ways": (1, 2)}, [])
    with pytest.raises(ScaMoError, match="other ways, more"):
        Study(tmp_path, {"data": "x", "more": 1}, [])
    with pytest.raises(ScaMoError, match="holds a a with other size"):
        Study(tmp_path, {"data": "x", "ways": (1, 2)}, [cell("a", size=2)])
    (tmp_path / "cells" / "a.json").write_text("{")
    with pytest.raises(ScaMoError, match=r"a\.json: cannot be read"):
        Study(tmp_path, {"data": "x", "ways": (1, 2)}, [cell("a", size=1)])


@pytest.mark.parametrize("name", ["", ".a", "a/b", ".."])
def test_a_name_is_that_of_a_file(tmp_path, name):
    with pytest.raises(ScaMoError, match="expected a file name"):
        Study(tmp_path, {}, [cell(name)])


def test_two_cells_of_one_name_are_refused(tmp_path):
    with pytest.raises(ScaMoError, match="there are 2 of this name"):
        Study(tmp_path, {}, [cell("a"), cell("a")])
