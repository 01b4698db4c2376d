"""Reconstruction FID against the protocol's row and the metric on plain embeddings."""

import numpy as np
import pytest
import torch

from scamo.config import TokenizerConfig
from scamo.data.dataset import Caption, DatasetWriter, MotionDataset
from scamo.errors import ScaMoError
from scamo.evaluation.evaluator import load_evaluator
from scamo.evaluation.metrics import frechet_distance
from scamo.evaluation.protocol import Settings, evaluate_run
from scamo.evaluation.reconstruction import reconstruction_fid
from scamo.tokenizers.autoencoder import VQAutoencoder


def test_is_the_row_of_the_strict_protocol(make_run, corpus, tokenizer, evaluator, tmp_path):
    settings = Settings(protocol="strict", mm_texts=0, pairs=40, cosine_pool=50, greedy=True)
    report = evaluate_run(
        make_run(), evaluator, settings=settings, out=tmp_path / "r", device="cpu", progress=False
    )
    row = next(row for row in report["rows"] if row["name"] == "reconstruction")
    found = reconstruction_fid(tokenizer, corpus, evaluator, "test", device="cpu")
    assert found == pytest.approx(row["metrics"]["fid"]["value"], rel=1e-6)
    assert found > 0.01


def test_of_tokens_with_several_indices(corpus, evaluator, tmp_path):
    data, judge = MotionDataset.open(corpus), load_evaluator(evaluator)
    torch.manual_seed(0)
    config = TokenizerConfig(quantizer="vq", codebook_size=9, residual=2, width=8, latent_width=4, depth=1)
    model = VQAutoencoder(config, data.mean, data.std).eval()
    model.save(tmp_path / "tok")
    real, rebuilt = [], []
    for item in data.items("val"):
        motion = np.array(data.item_features(int(item)))
        motion = motion[: len(motion) // 4 * 4]
        real.append(motion)
        with torch.no_grad():
            rebuilt.append(model.decode(model.encode(torch.from_numpy(motion[None])))[0].numpy())
    expected = frechet_distance(judge.embed_motions(real), judge.embed_motions(rebuilt))
    assert reconstruction_fid(tmp_path / "tok", corpus, evaluator, device="cpu") == pytest.approx(
        expected, rel=1e-4
    )


def test_bad_input(corpus, tokenizer, evaluator, tmp_path):
    data = MotionDataset.open(corpus)
    statistics = data.mean, data.std
    with DatasetWriter(tmp_path / "short", statistics=statistics) as writer:
        writer.add_clip("whole", data.clip_features(0), "val", [Caption("moves")])
        writer.add_clip("tiny", data.clip_features(1)[:3], "val", [Caption("moves")])
        writer.add_clip("one", data.clip_features(2), "test", [Caption("moves")])
    with pytest.raises(ScaMoError, match=r"short: item tiny.* has 3 frames, evaluator .* need \d+"):
        reconstruction_fid(tokenizer, tmp_path / "short", evaluator, device="cpu")
    with pytest.raises(ScaMoError, match="short: 1 items in the split test, a distance needs two"):
        reconstruction_fid(tokenizer, tmp_path / "short", evaluator, "test", device="cpu")
    with pytest.raises(ScaMoError, match="is not a tokenizer folder"):
        reconstruction_fid(evaluator / "none", corpus, evaluator, device="cpu")
