"""Our own evaluator: each motion and text as if alone, folders, and what it refuses."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers

from scamo.config import EvaluatorConfig
from scamo.data.dataset import Caption, DatasetWriter, MotionDataset
from scamo.errors import ScaMoError
from scamo.evaluation.contrastive import ContrastiveEvaluator, ContrastiveNetwork, pad
from scamo.evaluation.evaluator import load_evaluator


@pytest.fixture(scope="module")
def loaded(evaluator):
    return load_evaluator(evaluator)


@pytest.fixture(scope="module")
def motions(corpus):
    dataset = MotionDataset.open(corpus)
    lengths = (4, 7, 8, 40, 41, 43, 63)
    return [dataset.clip_features(i)[:length] for i, length in enumerate(lengths)]


def test_a_batch_embeds_like_every_motion_alone(loaded, motions):
    together = loaded.embed_motions(motions)
    assert together.shape == (len(motions), 16)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    for motion, point in zip(motions, together, strict=True):
        np.testing.assert_allclose(loaded.embed_motions([motion])[0], point, atol=2e-6)
    backwards = loaded.embed_motions(motions[::-1])[::-1]
    np.testing.assert_allclose(backwards, together, atol=2e-6)


@pytest.mark.parametrize("frames", [4, 5, 6, 7, 8, 13, 30])
def test_the_motion_encoder_equals_plain_convolutions(loaded, motions, frames):
    """Independent: torch's Conv1d on the unpadded motion, every step written out."""
    network = loaded.network.motion
    state = {name: value.detach().double() for name, value in network.state_dict().items()}
    x = torch.from_numpy((motions[-1][:frames] - loaded.mean) / loaded.std).double()
    for i in range(2):
        x = F.conv1d(x.T[None], state[f"down.{i}.weight"], state[f"down.{i}.bias"], stride=2, padding=1)
        x = F.gelu(x[0].T)
    for i, dilation in zip(range(2), (1, 3), strict=True):
        normal = F.layer_norm(x, (32,), state[f"blocks.{i}.norm.weight"], state[f"blocks.{i}.norm.bias"])
        conv = F.conv1d(
            normal.T[None], state[f"blocks.{i}.conv.weight"], state[f"blocks.{i}.conv.bias"],
            padding=dilation, dilation=dilation,
        )  # fmt: skip
        x = x + F.gelu(conv[0].T) @ state[f"blocks.{i}.out.weight"].T + state[f"blocks.{i}.out.bias"]
    x = F.layer_norm(x, (32,), state["norm.weight"], state["norm.bias"])
    weight = torch.softmax(x @ state["pool.score.weight"][0] + state["pool.score.bias"], 0)
    pooled = torch.cat([x.mean(0), weight @ x])
    point = F.normalize(pooled @ state["head.1.weight"].T + state["head.1.bias"], dim=0)
    np.testing.assert_allclose(loaded.embed_motions([motions[-1][:frames]])[0], point, atol=5e-6)


def test_long_motions_are_cut(loaded, corpus):
    long = np.tile(MotionDataset.open(corpus).clip_features(0)[:40], (6, 1))
    np.testing.assert_array_equal(loaded.embed_motions([long]), loaded.embed_motions([long[:196]]))


def test_cached_states_and_fresh_ones_agree(loaded, corpus):
    dataset = MotionDataset.open(corpus)
    cached = loaded.embed_captions(dataset, range(20))
    fresh = loaded.embed_texts([dataset.caption(i) for i in range(20)])
    np.testing.assert_allclose(cached, fresh, atol=2e-3)  # float16 states of two batch sizes
    alone = np.concatenate([loaded.embed_captions(dataset, [i]) for i in range(20)])
    np.testing.assert_allclose(cached, alone, atol=2e-6)


def test_a_dataset_without_states_is_encoded(loaded, corpus, clips, tmp_path):
    with DatasetWriter(tmp_path / "bare") as writer:
        source = MotionDataset.open(corpus)
        for i in range(3):
            writer.add_clip(str(i), source.clip_features(i), "train", [Caption(clips[i].texts[0])])
    bare = MotionDataset.open(tmp_path / "bare")
    expected = loaded.embed_texts([clips[i].texts[0] for i in range(3)])
    np.testing.assert_allclose(loaded.embed_captions(bare, [0, 1, 2]), expected, atol=1e-6)


def test_a_folder_gives_the_same_points(loaded, evaluator, motions, tmp_path):
    loaded.save(tmp_path / "copy")
    copy = load_evaluator(tmp_path / "copy")
    np.testing.assert_array_equal(copy.embed_motions(motions), loaded.embed_motions(motions))
    assert (copy.sha256, copy.fps, copy.feature_dim) == (loaded.sha256, 20.0, 263)
    assert copy.name == "copy"
    with pytest.raises(ScaMoError, match="exists"):
        loaded.save(tmp_path / "copy")


def test_bad_motions_are_named(loaded, motions):
    with pytest.raises(
        ScaMoError, match=r"motion 1: features of shape \(20, 251\), expected \(frames, 263\)"
    ):
        loaded.embed_motions([motions[0], np.zeros((20, 251), np.float32)])
    with pytest.raises(ScaMoError, match="motion 0: 3 frames, evaluator evaluator needs 4"):
        loaded.embed_motions([motions[3][:3]])
    broken = motions[3].copy()
    broken[7, 70] = np.nan
    with pytest.raises(ScaMoError, match="motion 1: frame 7, feature 70 is not finite"):
        loaded.embed_motions([motions[3], broken])


def test_bad_texts_are_named(loaded):
    with pytest.raises(ScaMoError, match="text 1 is empty"):
        loaded.embed_texts(["walks", " "])
    with pytest.raises(ScaMoError, match="1 tag strings for 2 texts"):
        loaded.embed_texts(["walks", "runs"], ["walk/VERB"])


def test_embeddings_that_are_not_finite_are_named(loaded, motions):
    network = ContrastiveNetwork(loaded.network.config, loaded.mean, loaded.std)
    network.load_state_dict(loaded.network.state_dict())
    network.motion.head[1].bias.data[3] = torch.inf
    broken = ContrastiveEvaluator(network, name="broken", fps=20, text_encoder="", probe=("", ()))
    with pytest.raises(ScaMoError, match="evaluator broken: the embedding of motion 0 is not finite"):
        broken.embed_motions(motions)


def test_datasets_of_another_kind_are_refused(loaded, corpus, tmp_path):
    source = MotionDataset.open(corpus)
    loaded.check_dataset(source)

    def write(name, change, **options):
        with DatasetWriter(tmp_path / name, **options) as writer:
            for clip in range(40):
                writer.add_clip(str(clip), change(source.clip_features(clip)), "train", [Caption("walks")])
        return MotionDataset.open(tmp_path / name)

    loaded.check_dataset(write("part", lambda raw: raw))
    with pytest.raises(ScaMoError, match="other statistics"):
        loaded.check_dataset(write("normalised", lambda raw: (raw - source.mean) / source.std))
    with pytest.raises(ScaMoError, match="other statistics"):
        loaded.check_dataset(write("centimetres", lambda raw: raw * 100))
    with pytest.raises(ScaMoError, match="trained on 263 features a frame, the dataset has 251"):
        loaded.check_dataset(write("kit", lambda raw: raw[:, :251], feature_dim=251))
    with pytest.raises(ScaMoError, match=r"trained at 20 fps, the dataset has 12\.5"):
        loaded.check_dataset(write("slow", lambda raw: raw, fps=12.5))


def test_another_text_encoder_is_found_out(evaluator, text_encoder, tmp_path):
    """Of the same name and width but with other weights, and of another width."""
    for name, change in (("other", {}), ("wide", {"hidden_size": 24})):
        folder = tmp_path / name
        shutil.copytree(text_encoder, folder)
        config = transformers.BertConfig.from_pretrained(text_encoder, **change)
        torch.manual_seed(5)
        transformers.BertModel(config).save_pretrained(folder)
    copy = tmp_path / "evaluator"
    for name, message in (("other", "gives other states"), ("wide", "states of width 24.*trained on 48")):
        shutil.copytree(evaluator, copy)
        (copy / "manifest.json").unlink()
        description = json.loads((copy / "config.json").read_text())
        description["text_encoder"] = str(tmp_path / name)
        (copy / "config.json").write_text(json.dumps(description))
        with pytest.raises(ScaMoError, match=message):
            load_evaluator(copy).embed_texts(["walks"])
        shutil.rmtree(copy)


def test_damaged_folders_are_named(evaluator, tmp_path):
    copy = tmp_path / "evaluator"
    shutil.copytree(evaluator, copy)
    with pytest.raises(ScaMoError, match=r"nowhere/config\.json: no such file"):
        load_evaluator(tmp_path / "nowhere")
    text = (copy / "config.json").read_text()
    (copy / "config.json").write_text(text.replace("scamo-evaluator", "scamo-motion"))
    with pytest.raises(ScaMoError, match="format 'scamo-motion', expected"):
        load_evaluator(copy)
    (copy / "config.json").write_text(text)
    weights = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(weights[:-8])
    with pytest.raises(ScaMoError, match="truncated"):
        load_evaluator(copy)
    (copy / "model.safetensors").write_bytes(weights)
    (copy / "manifest.json").unlink()
    (copy / "config.json").write_text(text.replace('"layers": 2', '"layers": 3'))
    with pytest.raises(ScaMoError, match=r"missing motion\.blocks\.2"):
        load_evaluator(copy)


def test_pad():
    arrays = [np.ones((3, 2), np.float16), np.ones((5, 2), np.float32)]
    padded, lengths = pad(arrays, 4)
    assert padded.shape == (2, 8, 2)
    assert lengths.tolist() == [3, 5]
    assert padded.sum(dim=(1, 2)).tolist() == [6, 10]


def test_config_refuses_nonsense():
    with pytest.raises(ScaMoError, match="dropout"):
        EvaluatorConfig(dropout=1.0)
    with pytest.raises(ScaMoError, match="layers"):
        EvaluatorConfig(layers=0)
