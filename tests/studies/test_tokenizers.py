"""The grid of tokenizers: measured as its parts measure, resumed, redrawn; the paper's claims recovered."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from scamo.config import EvaluatorConfig
from scamo.data.dataset import Caption, DatasetWriter, MotionDataset
from scamo.errors import ScaMoError
from scamo.evaluation.contrastive import ContrastiveEvaluator, ContrastiveNetwork
from scamo.evaluation.reconstruction import reconstruction_fid
from scamo.motion.features import joints_to_features
from scamo.motion.synthetic import generate_corpus
from scamo.studies.tokenizer_report import PAPER, Point, claims, front, points_of, read_results
from scamo.studies.tokenizers import report_tokenizer_study, run_tokenizer_study
from scamo.tokenizers.evaluate import evaluate_tokenizer

CELLS = """[
    { quantizer = "fsq", codebook_size = 256 },
    { quantizer = "vq", codebook_size = 64 },
    { quantizer = "vq", codebook_size = 16, residual = 2, training = { steps = 4 } },
]"""
NAMES = ["fsq-256-s0", "vq-64-s0", "residual_vq-2x16-s0"]


def write_dataset(folder: Path, splits: tuple[str, ...]) -> Path:
    with DatasetWriter(folder) as writer:
        for number, clip in enumerate(generate_corpus(12, seed=5)):
            captions = [Caption(text) for text in clip.texts]
            writer.add_clip(
                clip.name, joints_to_features(clip.joints), splits[number % len(splits)], captions
            )
    return folder


def write_evaluator(folder: Path, dataset: Path, variant: str) -> Path:
    data = MotionDataset.open(dataset)
    config = EvaluatorConfig(
        feature_dim=263, text_width=8, width=16, embedding=8, layers=1, max_frames=196, variant=variant
    )
    network = ContrastiveNetwork(config, data.mean, data.std)
    ContrastiveEvaluator(network, name="any", fps=20, text_encoder="none", probe=("a", [0.0, 1.0])).save(
        folder
    )
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("study")
    write_dataset(root / "data", ("train", "train", "test"))
    write_dataset(root / "untested", ("train", "val"))
    write_evaluator(root / "evaluator", root / "data", "original")
    write_evaluator(root / "other", root / "data", "fixed")
    return root


@pytest.fixture
def config(root, tmp_path):
    """Writes the TOML of a study; `more` is added at its end."""

    def write(
        cells: str = CELLS, *, dataset="data", evaluator="evaluator", out=tmp_path / "out", more=""
    ) -> Path:
        path = tmp_path / "study.toml"
        path.write_text(
            f"""dataset = "{root / dataset}"
evaluator = "{root / evaluator if evaluator else ""}"
out = "{out}"
device = "cpu"
cells = {cells}
tokenizer = {{ width = 16, latent_width = 16, depth = 1 }}
training = {{ steps = 6, batch_size = 4, window = 32, learning_rate = 1e-3, reset_below = 0.1 }}
{more}
"""
        )
        return path

    return write


def test_a_study_measures_resumes_and_is_drawn_again(config, root, tmp_path, capsys):
    out = tmp_path / "out"
    path = config(more="[families.fsq]\nnoise_ratio = 0.5")
    assert run_tokenizer_study(path, progress=False) == []
    lines, data = read_results(out / "results.jsonl"), MotionDataset.open(root / "data")
    assert [line["cell"] for line in lines] == NAMES
    for line in lines:
        folder = out / "work" / line["cell"] / "tokenizer"
        expected = evaluate_tokenizer(folder, root / "data", split="test", device="cpu", progress=False)
        assert {key: line[key] for key in expected} == expected
        assert line["fid"] == reconstruction_fid(
            folder, root / "data", root / "evaluator", "test", device="cpu"
        )
        # The train split has other errors, and all of it is counted.
        assert 0 < line["train_l1"] != line["l1"]
        lengths = data.item_lengths[data.items("train")]
        assert line["train_tokens"] == (lengths // 4).sum() * line["indices_per_token"]
    # What a family and a cell change is what was trained with.
    assert [line["training"]["noise_ratio"] for line in lines] == [0.5, 0, 0]
    assert [line["steps"] for line in lines] == [6, 6, 4]
    assert [line["frames_seen"] for line in lines] == [768, 768, 512]
    rate = 20 / 4
    assert [line["bits_per_second"] for line in lines] == pytest.approx(
        [rate * np.log2(240), rate * 6, rate * 2 * 4]
    )

    # One cell's result is lost: it alone is measured again, from the tokenizer that there is.
    before = {file: file.stat().st_mtime_ns for file in (out / "cells").iterdir()}
    weights = out / "work" / NAMES[1] / "tokenizer" / "model.safetensors"
    trained_at = weights.stat().st_mtime_ns
    (out / "cells" / f"{NAMES[1]}.json").unlink()
    assert run_tokenizer_study(path, progress=False) == []
    again = {file: file.stat().st_mtime_ns for file in (out / "cells").iterdir()}
    assert {file.stem for file in again if again[file] != before[file]} == {NAMES[1]}
    assert weights.stat().st_mtime_ns == trained_at
    assert read_results(out / "results.jsonl") == lines

    # Stopped while it was trained, it is trained again, to the same tokenizer.
    (out / "cells" / f"{NAMES[1]}.json").unlink()
    (out / "work" / NAMES[1] / "trained.json").unlink()
    assert run_tokenizer_study(path, progress=False) == []
    assert weights.stat().st_mtime_ns != trained_at
    assert [line["l1"] for line in read_results(out / "results.jsonl")] == [line["l1"] for line in lines]

    written = report_tokenizer_study(out, tmp_path / "again")
    names = ["fig6.png", "usage.png", "rate.png", "paper.png", "report.md", "report.html"]
    assert [file.name for file in written] == names
    assert (tmp_path / "again" / "report.md").read_bytes() == (out / "report.md").read_bytes()
    page = (tmp_path / "again" / "report.html").read_text()
    assert len(re.findall("data:image/png;base64,", page)) == 4
    assert f"<td>{lines[0]['l1']:.4f}</td>" in page
    assert "<li>" in page
    assert "http" not in page, "it needs nothing from elsewhere"
    assert "Not the same for all, noise_ratio: fsq 0.5" in (out / "report.md").read_text()

    # Without an evaluator it is another study.
    with pytest.raises(ScaMoError, match="evaluator"):
        run_tokenizer_study(config(evaluator="", more="[families.fsq]\nnoise_ratio = 0.5"), progress=False)
    capsys.readouterr()


def test_a_dry_run_prints_and_writes_nothing(config, tmp_path, capsys):
    assert run_tokenizer_study(config(), dry_run=True) == []
    printed = capsys.readouterr().out
    assert [name for name in NAMES if f"| {name} |" in printed] == NAMES
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cells": "[{ codebook_size = 256 }, { levels = [8, 6, 5] }]"}, r"\[1\]: fsq 8-6-5 is there twice"),
        ({"cells": '[{ quantizer = "lfq", codebook_size = 4 }]'}, "quantizer = 'lfq'"),
        ({"cells": "[{ codebook_size = 300 }]"}, "300 has no FSQ levels"),
        ({"cells": "[{ codebook_size = 256, levels = [5, 5] }]"}, "one of codebook_size and levels"),
        ({"cells": "[]"}, "cells is empty"),
        ({"cells": "[{ codebook_size = 256, training = { stepz = 1 } }]"}, "unknown key stepz"),
        ({"more": "[families.lfq]\nsteps = 1"}, "families.lfq is not known"),
        ({"more": "[families.vq]\nnoise_ratio = 0.3"}, "noise_ratio = 0.3 with"),
        ({"dataset": "untested"}, "split test is empty"),
        ({"evaluator": "other"}, "was trained on fixed features, the dataset has original"),
    ],
)  # fmt: skip
def test_what_cannot_be_studied_is_named(config, changes, message, tmp_path):
    with pytest.raises(ScaMoError, match=message):
        run_tokenizer_study(config(**changes), progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("split=train", "split = 'train'"),
        ("tokenizer.groups=2", "tokenizer.groups: a cell says this"),
        ("seeds=[1, 1]", "a seed is there twice"),
    ],
)
def test_common_settings(config, override, message):
    with pytest.raises(ScaMoError, match=message):
        run_tokenizer_study(config(), overrides=(override,), progress=False)


def paper_points(data: str, tokens: int) -> list[Point]:
    """The paper's rows as if they had been measured here."""
    points = []
    for family, rows in PAPER[data].items():
        for size, row in rows.items():
            values = dict(zip(("l1", "fid", "mpjpe_mm", "exp_entropy", "utilisation"), row, strict=True))
            # MotionUnion has no entropies: the most that can be.
            known = {"exp_entropy": float(size), "utilisation": 1.0}
            known |= {key: float(value) for key, value in values.items() if value is not None}
            runs = {key: [value] for key, value in known.items()}
            points.append(
                Point(family, size, size, 1, str(size), 5 * np.log2(size), tokens, 1, False, known, runs)
            )
    return points


def verdicts(points: list[Point]) -> dict[str, str]:
    return {claim.text.split(" (")[0]: claim.verdict for claim in claims(points)}


def test_the_papers_numbers_give_the_papers_claims():
    found = verdicts(paper_points("HumanML3D", 10**6))
    assert found["VQ collapses at large codebooks"] == "holds"
    assert found["FSQ collapses at no size"] == "holds"
    assert found["FSQ uses at least 97% of its codes up to 2^14"] == "holds at 256, 512, 1,024, 4,096, 16,384"
    assert found["FSQ has a lower L1 with every larger codebook"] == "holds"
    assert found["FSQ has a lower MPJPE with every larger codebook"] == "holds"
    # 4096 alone is common to both.
    assert found["FSQ beats VQ in FID at all common sizes from 4,096 codes on"].startswith("cannot be told")
    union = verdicts(paper_points("MotionUnion", 10**6))
    assert union["FSQ beats VQ in L1 at all common sizes from 4,096 codes on"] == "holds"
    assert union["VQ collapses at large codebooks"] == "does not hold"


def test_few_tokens_cannot_tell_how_much_of_a_codebook_is_used():
    points = paper_points("HumanML3D", 3000)
    found = verdicts(points)
    assert found["FSQ uses at least 97% of its codes up to 2^14"] == (
        "holds at 256, 512; at 1,024, 4,096, 16,384 it cannot be told (n too small)"
    )
    largest = next(point for point in points if point.size == 65536)
    assert largest.ceiling == 3000 / 65536
    draws = np.random.default_rng(0).integers(65536, size=(200, 3000))
    assert largest.uniform == pytest.approx(np.mean([len(set(row)) for row in draws]) / 65536, rel=1e-3)


def test_numbers_that_say_the_opposite_are_seen():
    points = paper_points("MotionUnion", 10**6)
    worse = max(point.size for point in points if point.family == "fsq")
    for point in points:
        if point.family == "fsq" and point.size == worse:
            point.values.update(l1=0.0371, exp_entropy=9.0, utilisation=0.5)
        if point.family == "vq" and point.size == 16384:
            point.values["mpjpe_mm"] = 30.0
    found = verdicts(points)
    assert found["FSQ collapses at no size"] == "does not hold"
    assert found["FSQ has a lower L1 with every larger codebook"] == "does not hold"
    assert found["FSQ has a lower MPJPE with every larger codebook"] == "holds"
    assert found["FSQ beats VQ in MPJPE at all common sizes from 4,096 codes on"] == "does not hold"
    beats = next(claim for claim in claims(points) if claim.text.startswith("FSQ beats VQ in MPJPE"))
    assert beats.numbers[-1] == "FSQ is better at 256, 512, 1,024, 2,048, 4,096 (5 of 6 sizes)"
    assert all(verdict.startswith("cannot be told") for verdict in verdicts([]).values())


def line(cell: str, seed: int = 0, **changes) -> dict:
    return {
        "cell": f"{cell}-s{seed}", "family": cell.split("-")[0], "size": 256, "seed": seed, "tokenizer": {},
        "training": {}, "codes": 240, "indices_per_token": 1, "bits_per_second": 40.0, "l1": 0.5, "fid": None,
        "exp_entropy": 100.0, "utilisation": 0.5, "tokens": 1000, "collapsed": False, "motions": 10,
        "frames": 4000, "frames_seen": 100, "clips": 5, "precision": "float32", "torch": "2",
        "dataset": {"name": "a", "manifest_sha256": "1"}, "evaluator": None, "split": "test",
    } | changes  # fmt: skip


def test_seeds_are_averaged_and_the_front_is_found():
    made = points_of(
        [
            line("fsq-256", 0, l1=0.4), line("fsq-256", 1, l1=0.6),
            line("vq-256", l1=0.45, bits_per_second=50.0), line("vq-512", l1=0.48, bits_per_second=60.0),
            line("vq-1024", l1=0.2, bits_per_second=70.0),
        ]
    )  # fmt: skip
    assert [(point.label, point.seeds) for point in made[:2]] == [("256", 2), ("256", 1)]
    assert made[0].values["l1"] == pytest.approx(0.5)
    assert "fid" not in made[0].values
    assert [(p.family, p.label) for p in front(made, "l1")] == [("fsq", "256"), ("vq", "256"), ("vq", "1024")]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "no finished cell"),
        ([line("fsq-8"), line("vq-8", dataset={"name": "b", "manifest_sha256": "2"})], "vq-8-s0 has dataset"),
        ([line("fsq-8"), line("vq-8", evaluator={"name": "e", "sha256": "3"})], "vq-8-s0 has evaluator"),
        ([{key: value for key, value in line("fsq-256").items() if key != "l1"}], "line 1: l1 missing"),
    ],
)  # fmt: skip
def test_results_that_do_not_compare_are_named(tmp_path, lines, message):
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    with pytest.raises(ScaMoError, match=message):
        report_tokenizer_study(tmp_path)
