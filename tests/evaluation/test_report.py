"""The table of an evaluation: what a cell says, and what is left out of it."""

import json

import pytest

from scamo.evaluation.report import MAIN, summary, table, write_report


@pytest.fixture
def report():
    def metric(value, low=None, high=None):
        return {"value": value, "low": low, "high": high}

    return {
        "protocol": "humanml3d",
        "split": "test",
        "dataset": {
            "name": "data", "items": 4700, "items_used": 4672, "items_filtered": 3, "source_clips": 2192
        },
        "evaluator": {"name": "t2m", "kind": "GuoEvaluator", "sha256": "0123456789abcdef"},
        "settings": {"pool": 32, "greedy": False, "temperature": 1.0, "top_k": 0, "top_p": 0.9, "seed": 7},
        "interval": "mean over 20 repeats",
        "chance": {"r_precision_1": 1 / 32},
        "generated": {"motions": 1234, "at_the_length_limit": 5},
        "left_out": {"diversity": "300 pairs need more motions than 96"},
        "caveats": {},
        "test_split_met": 2,
        "rows": [
            {"name": "real", "metrics": {"fid": metric(0.002, 0.001, 0.003)}},
            {
                "name": "generated",
                "metrics": {"fid": metric(0.1, 0.09, 0.11), "foot_skate": metric(0.25, 0.2, 0.35)},
            },
        ],
    }  # fmt: skip


def test_cells(report):
    text = summary(report)
    assert "| real | 0.002 ±0.001 |" in text
    assert "| generated | 0.100 ±0.010 |" in text
    assert "| real | – |" in text
    assert "| generated | 25.0 (20.0–35.0) |" in text


def test_what_a_reader_must_know(report):
    text = summary(report)
    for part in (
        "4,672 of 4,700 items of 2,192 clips",
        "t2m (GuoEvaluator, 0123456789ab)",
        "diversity, left out: 300 pairs need more motions than 96.",
        "1,234 motions generated (temperature 1, top-p 0.9, seed 7), 5 up to the length limit",
        "3 items are too short or too long",
        "met this test split 2 times",
    ):
        assert part in text, part


def test_columns_without_any_number_are_not_there(report):
    heading = table(report, MAIN)[0]
    assert heading == "| | FID ↓ |"
    assert table(report, {"jerk": MAIN["fid"]}) == []


def test_files(report, tmp_path):
    paths = write_report(report, tmp_path / "deep/report")
    assert [path.name for path in paths] == ["report.json", "report.md"]
    assert json.loads(paths[0].read_text()) == report
    assert paths[1].read_text() == summary(report) + "\n"
    assert len(list((tmp_path / "deep").iterdir())) == 2
    report["rows"][0]["metrics"]["fid"]["value"] = float("nan")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_report(report, tmp_path / "nan")
    assert not (tmp_path / "nan.json").exists()
