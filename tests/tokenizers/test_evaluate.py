"""The numbers against closed forms and an independent numpy computation."""

import math

import numpy as np
import pytest
import torch

from scamo.data.dataset import Caption, DatasetWriter, MotionDataset
from scamo.errors import ScaMoError
from scamo.motion.features import features_to_joints
from scamo.tokenizers import load_tokenizer
from scamo.tokenizers.evaluate import COLLAPSE_SHARE, codebook_statistics, evaluate_tokenizer


@pytest.mark.parametrize(
    ("counts", "utilisation", "entropy"),
    [
        ([5] * 64, 1.0, 64.0),
        ([7] + [0] * 63, 1 / 64, 1.0),
        ([2, 1, 1, 0], 0.75, 2**1.5),
        ([10, 10, 0, 0], 0.5, 2.0),
        ([6, 2], 1.0, 4 / 3**0.75),
    ],
)
def test_entropy_closed_forms(counts, utilisation, entropy):
    found = codebook_statistics(torch.tensor(counts))
    assert found["utilisation"] == utilisation
    assert found["exp_entropy"] == pytest.approx(entropy, rel=1e-12)
    assert found["tokens"] == sum(counts)


def test_collapse_is_a_share_of_the_possible():
    """5% of K with many tokens; with fewer tokens than codes, 5% of the tokens."""
    many = torch.zeros(1000, dtype=torch.int64)
    many[:49] = 1000
    assert codebook_statistics(many)["collapsed"]
    many[:51] = 1000
    assert not codebook_statistics(many)["collapsed"]
    few = torch.zeros(64_000, dtype=torch.int64)
    few[:300] = 1  # 300 tokens, all different: 0.5% of the codebook, and as many as can be
    assert not codebook_statistics(few)["collapsed"]
    few[:300] = 0
    few[:10] = 30
    assert codebook_statistics(few)["collapsed"]
    assert COLLAPSE_SHARE == 0.05
    with pytest.raises(ScaMoError, match="no tokens"):
        codebook_statistics(torch.zeros(4, dtype=torch.int64))


def test_numbers_equal_numpy(trained, corpus):
    report = evaluate_tokenizer(trained, corpus, split="test", device="cpu", progress=False)
    dataset, tokenizer = MotionDataset.open(corpus), load_tokenizer(trained)
    absolute, distance, root, velocity, acceleration, used = [], [], [], [], [], []
    for item in dataset.items("test"):
        true = np.array(dataset.item_features(item))
        true = true[: len(true) // 4 * 4]
        with torch.no_grad():
            tokens = tokenizer.encode(torch.tensor(true)[None])
            made = tokenizer.decode(tokens)[0].numpy()
        used.extend(tokens[0].tolist())
        absolute.append(np.abs((made - true) / dataset.std).mean(1))
        a, b = (features_to_joints(x.astype(np.float64)) for x in (true, made))
        distance.append(np.linalg.norm((a - a[:, :1]) - (b - b[:, :1]), axis=-1).mean(1))
        root.append(np.linalg.norm(a[:, 0] - b[:, 0], axis=-1))
        for store, n in ((velocity, 1), (acceleration, 2)):
            store.append(np.linalg.norm(np.diff(a, n, axis=0) - np.diff(b, n, axis=0), axis=-1).mean(1))
    mean = {name: np.concatenate(x).mean() for name, x in locals().items() if name in (
        "absolute", "distance", "root", "velocity", "acceleration")}  # fmt: skip
    assert report["l1"] == pytest.approx(mean["absolute"], rel=1e-4)
    assert report["mpjpe_mm"] == pytest.approx(1000 * mean["distance"], rel=1e-4)
    assert report["root_mm"] == pytest.approx(1000 * mean["root"], rel=1e-4)
    assert report["velocity_mm_s"] == pytest.approx(1000 * 20 * mean["velocity"], rel=1e-4)
    assert report["acceleration_mm_s2"] == pytest.approx(1000 * 400 * mean["acceleration"], rel=1e-4)

    _, counts = np.unique(used, return_counts=True)
    p = counts / counts.sum()
    assert report["utilisation"] == len(counts) / 512
    assert report["exp_entropy"] == pytest.approx(np.exp(-(p * np.log(p)).sum()))
    assert report["tokens"] == len(used) == report["frames"] // 4
    assert (report["motions"], report["too_short"], report["split"]) == (4, 0, "test")
    assert report["tokens_per_second"] == 5
    assert report["bits_per_second"] == pytest.approx(5 * math.log2(512))


def test_an_empty_split(trained, tmp_path):
    with DatasetWriter(tmp_path / "set") as writer:
        writer.add_clip("c", np.ones((12, 263), np.float32), "train", [Caption("moves")])
    with pytest.raises(ScaMoError, match="set: the split val is empty"):
        evaluate_tokenizer(trained, tmp_path / "set", device="cpu", progress=False)
    with pytest.raises(ScaMoError, match="split 'half': expected one of train, val, test"):
        evaluate_tokenizer(trained, tmp_path / "set", split="half", device="cpu", progress=False)


def test_a_split_of_short_motions(trained, tmp_path):
    with DatasetWriter(tmp_path / "set") as writer:
        writer.add_clip("c", np.ones((3, 263), np.float32), "train", [Caption("moves")])
    with pytest.raises(ScaMoError, match="none of the 1 motions has 4 frames"):
        evaluate_tokenizer(trained, tmp_path / "set", split="train", device="cpu", progress=False)
