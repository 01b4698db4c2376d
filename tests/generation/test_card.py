"""A published model: the folder's layout and hashes, what its card says, and that it generates the same."""

import json
import pickle
import shutil

import numpy as np
import pytest
import torch
import yaml

from scamo.config import ModelConfig, TokenizerConfig
from scamo.data.dataset import Caption, DatasetWriter
from scamo.data.storage import sha256_of
from scamo.errors import ScaMoError
from scamo.evaluation.report import FORMAT as REPORT_FORMAT
from scamo.generation.api import ScaMo
from scamo.generation.export import export_model, identify, publish, write_export
from scamo.tokenizers import load_tokenizer
from scamo.tokenizers.autoencoder import FSQAutoencoder

CONFIG = ModelConfig(
    size="", layers=1, heads=2, width=16, codes=25, text_width=12, max_text=16, max_motion=10
)
METRICS = {"fid": 0.25, "r_precision_1": 0.5, "foot_skate": 0.125}
LICENSES = {"license": "cc-by-nc-4.0", "data_license": "CC BY-NC 4.0 of the recordings"}


def write_report(path, **changes):
    metrics = {key: {"value": value, "low": None, "high": None} for key, value in METRICS.items()}
    rows = [{"name": name, "metrics": metrics} for name in ("real", "generated")]
    settings = {"pool": 32, "seed": 7, "temperature": 0.5, "top_k": 0, "top_p": 1.0, "greedy": False}
    report = {
        "format": REPORT_FORMAT,
        "protocol": "strict",
        "split": "test",
        "dataset": {
            "name": "data", "manifest_sha256": "d" * 64, "items": 40, "items_used": 40, "items_filtered": 0,
            "source_clips": 20,
        },
        "evaluator": {"name": "judge", "kind": "ContrastiveEvaluator", "sha256": "e" * 64},
        "settings": settings,
        "interval": "none",
        "chance": {"r_precision_1": 0.03},
        "left_out": {},
        "caveats": {},
        "generated": {"motions": 40, "at_the_length_limit": 1},
        "rows": rows,
    }  # fmt: skip
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(report | changes))


@pytest.fixture(scope="module")
def source(make_model, encoder, tmp_path_factory):
    """A run with an average of the weights, its dataset and a report, as training and evaluation leave it."""
    folder = tmp_path_factory.mktemp("source")
    torch.manual_seed(0)
    shutil.copytree(encoder, folder / "encoder")
    with DatasetWriter(folder / "data", provenance={"source": "humanml3d"}) as writer:
        writer.add_clip("one", np.zeros((40, 263), np.float32), "train", [Caption("a person walks")])
    digest = sha256_of(folder / "data" / "manifest.json")
    FSQAutoencoder(
        TokenizerConfig(levels=(5, 5), width=16, latent_width=8, depth=1),
        torch.zeros(263),
        torch.full((263,), 0.5),
    ).save(
        folder / "tokenizer",
        provenance={"dataset": {"name": "data", "manifest_sha256": digest}, "step": 1700},
    )
    run, state = folder / "run", make_model(CONFIG).state_dict()
    ema = {name: tensor * 0.9 for name, tensor in state.items()}
    export_model(run / "export", state, CONFIG, folder / "tokenizer", str(folder / "encoder"), ema=ema)
    stored = {
        "format": "scamo-run-1",
        "data": {"dataset": str(folder / "data")},
        "training": {"run": str(run), "steps": 60, "learning_rate": 0.0015, "ema_decay": 0.999},
        "fingerprint": {"dataset": digest},
        "precision": "bf16",
        "ranks": 2,
        "ds_config": {"zero_optimization": {"stage": 3}},
    }
    (run / "config.json").write_text(json.dumps(stored))
    (run / "log.jsonl").write_text('{"kind": "val", "step": 60, "loss": 6.5, "l_u": -0.5}\n{"kind": "e')
    write_report(run / "evaluation" / "strict-test-data.json")
    (run / "evaluation" / "test_split.jsonl").write_text("{}\n")
    return folder


@pytest.fixture
def run(source, tmp_path):
    shutil.copytree(source / "run", tmp_path / "run")
    return tmp_path / "run"


def card_of(folder):
    """(front matter, body)"""
    _, front, body = (folder / "README.md").read_text("utf-8").split("---\n", 2)
    return yaml.safe_load(front), body


def files_of(folder):
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def test_a_published_run_is_one_model_that_generates_the_same(run, tmp_path):
    out = tmp_path / "model"
    publish(run, out)
    assert files_of(out) == {
        "README.md", "config.json", "manifest.json", "model.safetensors", "tokenizer/config.json",
        "tokenizer/manifest.json", "tokenizer/model.safetensors", "evaluation/strict-test-data.json",
        "evaluation/test_split.jsonl",
    }  # fmt: skip
    # The average is what the run generates with, so it is what is published.
    assert (out / "model.safetensors").read_bytes() == (run / "export" / "ema.safetensors").read_bytes()
    listed = json.loads((out / "manifest.json").read_text())["files"]
    assert listed.keys() == {
        "config.json", "model.safetensors", "tokenizer/config.json", "tokenizer/model.safetensors",
    }  # fmt: skip
    for name, record in listed.items():
        assert sha256_of(out / name) == record["sha256"]
    assert identify(out) == identify(run)
    texts = ["a person walks", "runs"]
    for motion, same in zip(
        ScaMo.load(run).generate(texts, seed=3), ScaMo.load(out).generate(texts, seed=3), strict=True
    ):
        assert motion.tokens.tolist() == same.tokens.tolist()
        assert np.array_equal(motion.joints, same.joints)
    publish(run, out, ema=False, overwrite=True)
    assert (out / "model.safetensors").read_bytes() == (run / "export" / "model.safetensors").read_bytes()
    assert "those of the last step" in card_of(out)[1]


def test_the_card_says_what_the_folders_know(run, source, tmp_path):
    out = tmp_path / "model"
    warnings = publish(run, out, name="Walker", description="It walks.", datasets=["a/b"], **LICENSES)
    assert len(warnings) == 1
    assert str(source / "encoder") in warnings[0]
    front, body = card_of(out)
    assert (front["license"], front["library_name"], front["pipeline_tag"]) == (
        "cc-by-nc-4.0", "scamo", "text-to-3d",
    )  # fmt: skip
    assert front["datasets"] == ["a/b"]
    assert "text-to-motion" in front["tags"]
    assert front["metrics"] == ["fid", "r_precision_1"]
    (index,) = front["model-index"]
    (result,) = index["results"]
    assert index["name"] == "Walker"
    assert (result["dataset"]["config"], result["dataset"]["split"]) == ("strict", "test")
    assert [(m["type"], m["name"], m["value"]) for m in result["metrics"]] == [
        ("fid", "FID", 0.25), ("r_precision_1", "R@1", 0.5),
    ]  # fmt: skip
    assert result["metrics"][0]["args"]["evaluator_sha256"] == "e" * 64
    digest = sha256_of(source / "data" / "manifest.json")[:12]
    for said in (
        "# Walker\n\nIt walks.",
        'ScaMo.load("model")',
        "The weights: cc-by-nc-4.0.",
        "The training data: CC BY-NC 4.0 of the recordings.",
        "train split of 1 clips, 1 captions, 40 frames",
        digest,
        "ZeRO-3, 2 ranks, bf16",
        "steps 60, learning_rate 0.0015, ema_decay 0.999. The weights are those of the moving average",
        "step 60: loss 6.5000, L_u -0.5000",
        "Tokenizer: 1700 steps",
        "Evaluator judge (ContrastiveEvaluator, eeeeeeeeeeee)",
        "| generated | 0.250 | 0.500 |",
        "at most 40 frames, 2 s at 20 fps",
    ):
        assert said in body
    assert str(run) not in (out / "README.md").read_text() + (out / "config.json").read_text()


def test_the_hub_reads_the_front_matter(run, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    publish(run, tmp_path / "model", name="Walker", license="My own terms, v2")
    card = hub.ModelCard.load(tmp_path / "model" / "README.md")
    assert (card.data.license, card.data.license_name) == ("other", "my-own-terms-v2")
    assert [(r.metric_type, r.metric_value, r.dataset_split) for r in card.data.eval_results] == [
        ("fid", 0.25, "test"), ("r_precision_1", 0.5, "test"),
    ]  # fmt: skip


def test_what_is_not_known_is_said_in_bold(run, source, tmp_path):
    warnings = publish(run, tmp_path / "unstated", text_encoder="minilm")
    front, body = card_of(tmp_path / "unstated")
    assert front["license"] == "unknown"
    assert [w.split(" is ")[0] for w in warnings] == [
        "no licence of the weights", "the licence of the training data",
    ]  # fmt: skip
    assert all(f"**WARNING: {warning}**" in body for warning in warnings)
    assert "`scamo[minilm]`" in body

    # The dataset is gone, and the tokenizer was trained on another one.
    stored = json.loads((run / "config.json").read_text())
    stored["fingerprint"]["dataset"] = "f" * 64
    (run / "config.json").write_text(json.dumps(stored))
    shutil.rmtree(run / "evaluation")
    warnings = publish(run, tmp_path / "less", text_encoder="minilm", license="mit")
    _, body = card_of(tmp_path / "less")
    assert "its description was not at hand" in body
    assert "Nothing was measured" in body
    assert any("tokenizer was trained on another dataset, data" in warning for warning in warnings)

    publish(run / "export", tmp_path / "least", text_encoder="minilm")
    assert "Nothing is known of the training" in card_of(tmp_path / "least")[1]


def test_procedural_data_bind_nobody_and_a_stated_licence_is_taken(source, run, tmp_path):
    for number, (made_by, warned, said) in enumerate(
        (
            ({"source": "synthetic"}, 0, "no licence of others binds the model"),
            ({"source": "humanml3d", "license": "CC0"}, 0, "The training data: CC0."),
            ({"source": "mine"}, 1, "WARNING: the licence of the training data is not stated"),
        )
    ):
        data = tmp_path / f"data{number}"
        with DatasetWriter(data, provenance=made_by) as writer:
            writer.add_clip("one", np.zeros((40, 263), np.float32), "train", [Caption("a person walks")])
        digest = sha256_of(data / "manifest.json")
        stored = json.loads((run / "config.json").read_text())
        stored |= {"data": {"dataset": str(data)}, "fingerprint": {"dataset": digest}}
        (run / "config.json").write_text(json.dumps(stored))
        warnings = publish(run, tmp_path / f"model{number}", text_encoder="minilm", license="mit")
        assert sum("training data" in warning for warning in warnings) == warned
        assert said in card_of(tmp_path / f"model{number}")[1]


def test_a_copy_of_a_copy_is_the_same(run, tmp_path):
    publish(run, tmp_path / "a" / "model", name="Walker", description="It walks.", **LICENSES)
    shutil.rmtree(run)
    publish(tmp_path / "a" / "model", tmp_path / "b" / "model")
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    for name in files_of(tmp_path / "a"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_an_imported_model_names_its_files(source, make_model, tmp_path):
    origin = {"importer": "scamo_official", "files": [{"name": "trans.pth", "sha256": "a" * 64}]}
    write_export(
        tmp_path / "imported", make_model(CONFIG).state_dict(), CONFIG, load_tokenizer(source / "tokenizer"),
        "flan-t5-xl", fps=20.0, provenance=origin, tokenizer_provenance=origin,
    )  # fmt: skip
    warnings = publish(tmp_path / "imported", tmp_path / "model")
    assert "Converted by `scamo_official` from trans.pth (aaaaaaaaaaaa)" in card_of(tmp_path / "model")[1]
    assert len(warnings) == 2
    assert identify(tmp_path / "model") == identify(tmp_path / "imported")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer/model.safetensors"])
def test_a_changed_file_is_not_loaded_and_a_changed_card_is(run, tmp_path, name):
    out = tmp_path / "model"
    publish(run, out)
    (out / "README.md").write_text("edited")
    ScaMo.load(out)
    data = bytearray((out / name).read_bytes())
    data[-3] ^= 1
    (out / name).write_bytes(data)
    for use in (ScaMo.load, lambda folder: publish(folder, tmp_path / "again")):
        with pytest.raises(ScaMoError, match=f"{name}: (corrupt|not valid JSON)"):
            use(out)
    assert not (tmp_path / "again").exists()


class Bomb:
    def __reduce__(self):
        return exec, ("open('exploded', 'w')",)


def test_nothing_is_unpickled(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    publish(run, tmp_path / "model")
    for manifest in (tmp_path / "model").rglob("manifest.json"):  # it would notice first
        manifest.unlink()
    for name in ("model.safetensors", "tokenizer/model.safetensors"):
        path = tmp_path / "model" / name
        before = path.read_bytes()
        path.write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(ScaMoError, match="not a readable safetensors file"):
            ScaMo.load(tmp_path / "model")
        path.write_bytes(before)
    assert not (tmp_path / "exploded").exists()


def test_nothing_half_written_and_nothing_lost(run, tmp_path):
    out = tmp_path / "model"
    (tmp_path / "none.json").write_text('{"format": "else"}')
    write_report(tmp_path / "old" / "old.json", rows=[{"name": "generated"}])
    write_report(tmp_path / "other" / "strict-test-data.json")
    for reports, message in (
        (["none.json"], "none.json: is no report"),
        (["missing.json"], "missing.json: cannot be read"),
        (["old/old.json"], "old.json: is no report of this version: KeyError: 'metrics'"),
        (["other/strict-test-data.json"], "has the same name"),
    ):
        with pytest.raises(ScaMoError, match=message):
            publish(run, out, reports=[tmp_path / name for name in reports])
        assert not out.exists()
    for place in (run / "export", run):
        with pytest.raises(ScaMoError, match="is where the model itself lies"):
            publish(run, place, overwrite=True)

    publish(run, out)
    before = {name: (out / name).read_bytes() for name in files_of(out)}
    with pytest.raises(ScaMoError, match="exists"):
        publish(run, out, name="Other")
    (out / ".git").mkdir()
    with pytest.raises(ScaMoError, match="would lose .git"):
        publish(run, out, name="Other", overwrite=True)
    (out / ".git").rmdir()
    assert {name: (out / name).read_bytes() for name in files_of(out)} == before
    publish(run, out, name="Other", overwrite=True)
    assert card_of(out)[1].lstrip().startswith("# Other")
    assert not list(tmp_path.glob(".model*"))

    (run / "checkpoints").mkdir()
    shutil.rmtree(run / "export")
    with pytest.raises(ScaMoError, match="the run has not finished"):
        publish(run, tmp_path / "unfinished")
