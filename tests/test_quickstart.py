"""The quickstart's own behaviour; its stages run in integration/test_whole_way.py."""

import shlex
import sys

import pytest

from scamo import quickstart as module
from scamo.errors import ScaMoError
from scamo.quickstart import quickstart


def test_a_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ScaMoError, match="is not a quickstart folder: choose another with --out"):
        quickstart(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_stage_that_fails_is_named(tmp_path):
    command = [sys.executable, "-c", "raise SystemExit(3)"]
    with pytest.raises(ScaMoError, match="exited with status 3") as error:
        module._run(command, {})
    assert shlex.join(command) in str(error.value)


def test_outside_a_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ROOT", tmp_path)
    with pytest.raises(ScaMoError, match=r"quickstart.toml is missing: run the quickstart from a checkout"):
        quickstart(tmp_path / "out")
    assert not (tmp_path / "out").exists()
