"""Bad input of the commands that make and write motions: one line, a status that is not 0, no files."""

import shutil

import numpy as np
import pytest
import torch

from scamo import cli
from scamo.config import ModelConfig, TokenizerConfig
from scamo.generation.api import ScaMo
from scamo.generation.export import export_model
from scamo.motion.motion import Motion
from scamo.tokenizers.autoencoder import FSQAutoencoder

CONFIG = ModelConfig(
    size="", layers=1, heads=2, width=16, codes=25, text_width=12, max_text=16, max_motion=10
)
WALK = "a person walks"
ODD = {
    "10,000 characters": "a person walks in a circle" + " slowly" * 1425,
    "one word of 10,000": "a" * 10_000,
    "emoji": "🚶‍♀️🏽🎉",
    "chinese": "一个人在走路",
    "arabic": "شخص يمشي في دائرة",
    "marks": "z̷̢̛a̶͝l̸g̴o \u202e\u200b\u0301",
}


@pytest.fixture(scope="module")
def folder(make_model, encoder, tmp_path_factory):
    """A model, and a motion that it made."""
    folder = tmp_path_factory.mktemp("bad")
    torch.manual_seed(0)
    shutil.copytree(encoder, folder / "encoder")
    config = TokenizerConfig(levels=(5, 5), width=16, latent_width=8, depth=1)
    FSQAutoencoder(config, torch.zeros(263), torch.full((263,), 0.1)).save(folder / "tokenizer")
    state = make_model(CONFIG).state_dict()
    export_model(folder / "model", state, CONFIG, folder / "tokenizer", str(folder / "encoder"))
    ScaMo.load(folder / "model", "cpu").generate(WALK, seconds=2.0).save(folder / "walk.npz")
    return folder


def commands(folder, text=WALK, out="out.npz", start=None, model=None, device="cpu"):
    """What makes a motion of a sentence, by name; out is in the working directory."""
    walk, more = str(start or folder / "walk.npz"), ["--run", str(model or folder / "model"), "-o", out]
    more += ["--device", device]
    return {
        "generate": ["generate", text, *more],
        "job": ["generate", text, "--format", "npz", *more[:2], "-o", "job", "--device", device],
        "timeline": ["timeline", text, text, "--seconds", "0.6", *more],
        "start": ["timeline", text, "--seconds", "0.6", "--start", walk, *more],
        "inbetween": ["inbetween", walk, text, "--frames", "12", "28", "--candidates", "2", *more],
    }


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """refused(arguments, message): ... with one line that holds the message, and without a file."""
    monkeypatch.chdir(tmp_path)

    def check(arguments, message):
        before = sorted(tmp_path.rglob("*"))
        assert cli.main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("scamo: error: "), error
        assert message in error, error
        assert error.count("\n") == 1, error
        assert sorted(tmp_path.rglob("*")) == before

    return check


@pytest.mark.parametrize("command", ["generate", "job", "timeline", "start", "inbetween"])
@pytest.mark.parametrize("text", ODD.values(), ids=ODD)
def test_odd_sentences_make_a_motion(folder, tmp_path, monkeypatch, capsys, command, text):
    monkeypatch.chdir(tmp_path)
    assert cli.main(commands(folder, text)[command]) == 0, capsys.readouterr().err
    motion = Motion.load("job/000000.npz" if command == "job" else "out.npz")
    expected = {"timeline": f"{text}, then {text}", "start": f"{WALK}, then {text}", "inbetween": WALK}
    assert motion.text == expected.get(command, text)
    assert np.isfinite(motion.joints).all()


@pytest.mark.parametrize("command", ["generate", "job", "timeline", "start", "inbetween"])
def test_what_a_motion_cannot_be_made_of(folder, tmp_path, refused, command):
    for empty in ("", " \t\n"):
        refused(
            commands(folder, empty)[command], "prompt 0 is empty" if command == "inbetween" else "sentence"
        )
    refused(commands(folder, device="cuda:99")[command], "cuda:99")
    if command != "job":
        refused(commands(folder, out="out.docx")[command], "out.docx")
    damaged = tmp_path / "model"
    shutil.copytree(folder / "model", damaged)
    content = bytearray((damaged / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (damaged / "model.safetensors").write_bytes(content)
    refused(commands(folder, model=damaged)[command], "model.safetensors")


@pytest.mark.parametrize("kind", ["features", "joints"])
def test_a_motion_that_is_not_finite(folder, tmp_path, refused, kind):
    with np.load(folder / "walk.npz") as stored:
        arrays = dict(stored)
    arrays[kind][3, 10] = np.nan
    bad = tmp_path / "bad.npz"
    np.savez(bad, **arrays)
    for command in ("start", "inbetween"):
        refused(commands(folder, start=bad)[command], "is not finite")
    np.savez(bad, **{kind: arrays[kind]})
    for suffix in (".npz", ".bvh", ".glb", ".csv"):
        refused(["convert", str(bad), "-o", f"out{suffix}"], "finite")


def test_what_cannot_be_exported_or_converted(folder, tmp_path, refused):
    for name in ("model.safetensors", "tokenizer/model.safetensors", "config.json"):
        damaged = tmp_path / name.replace("/", "-")
        shutil.copytree(folder / "model", damaged)
        content = bytearray((damaged / name).read_bytes())
        content[-1] ^= 1
        (damaged / name).write_bytes(content)
        refused(["export", str(damaged), "out"], name.rpartition("/")[2])
    walk = str(folder / "walk.npz")
    refused(["convert", walk, "-o", "out.docx"], ".docx")
    refused(["convert", str(folder / "model" / "config.json"), "-o", "out.bvh"], "config.json")
    refused(["convert", walk, "-o", "deep/out.bvh"], "deep")
