"""Batches give each motion the tokens that it has alone; datasets get theirs, or an error and nothing."""

import numpy as np
import pytest
import torch

from scamo.config import TokenizerConfig
from scamo.data.dataset import Caption, DatasetWriter, MotionDataset
from scamo.errors import ScaMoError
from scamo.tokenizers import load_tokenizer
from scamo.tokenizers.autoencoder import FSQAutoencoder
from scamo.tokenizers.encode import decode_tokens, encode_dataset, encode_motions, length_groups

LENGTHS = [40, 41, 43, 44, 4, 3, 196, 40, 7, 195, 0, 42]


def motions(lengths, width=263, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(length, width)).astype(np.float32) for length in lengths]


def test_groups_hold_every_motion_once():
    groups = list(length_groups(LENGTHS, 4, 90))
    assert sorted(i for group in groups for i in group) == [
        i for i, length in enumerate(LENGTHS) if length >= 4
    ]
    for group in groups:
        assert len({LENGTHS[i] // 4 for i in group}) == 1
        assert len(group) == 1 or len(group) * (LENGTHS[group[0]] // 4 * 4) <= 90


def test_a_batch_is_as_alone(trained, corpus):
    tokenizer = load_tokenizer(trained)
    dataset = MotionDataset.open(corpus)
    cut = [dataset.item_features(i)[: 40 + 7 * (i % 5)] for i in range(30)]
    together = encode_motions(tokenizer, cut)
    assert len({len(tokens) for tokens in together}) > 1
    decoded = decode_tokens(tokenizer, together)
    different = 0
    for motion, tokens, features in zip(cut, together, decoded, strict=True):
        with torch.no_grad():
            alone = tokenizer.encode(torch.tensor(motion)[None])[0].numpy()
            again = tokenizer.decode(torch.tensor(tokens)[None])[0].numpy()
        assert tokens.shape == (len(motion) // 4,)
        assert tokens.dtype == np.int32
        different += int((tokens != alone).sum())
        np.testing.assert_allclose(features, again, rtol=1e-4, atol=1e-5)
    # A matrix product of another size may round a latent across an edge; nothing else may differ.
    assert different <= 1


def test_padding_would_change_the_tokens(trained, corpus):
    """Why batches are grouped by length: what follows a motion's end reaches its last tokens."""
    tokenizer = load_tokenizer(trained)
    motion = MotionDataset.open(corpus).item_features(0)[:40]
    padded = np.concatenate([motion, np.zeros((40, 263), dtype=np.float32)])
    with torch.no_grad():
        wrong = tokenizer.encode(torch.tensor(padded)[None])[0, :10].numpy()
    assert (wrong != encode_motions(tokenizer, [motion])[0]).any()


def test_short_motions_get_no_tokens():
    tokenizer = FSQAutoencoder(TokenizerConfig(codebook_size=256, width=8, latent_width=8)).eval()
    tokens = encode_motions(tokenizer, motions(LENGTHS))
    assert [len(t) for t in tokens] == [length // 4 for length in LENGTHS]
    assert [len(f) for f in decode_tokens(tokenizer, [t for t in tokens if len(t)])] == [
        length // 4 * 4 for length in LENGTHS if length >= 4
    ]


def test_bad_motions_are_named():
    tokenizer = FSQAutoencoder(TokenizerConfig(codebook_size=256, width=8, latent_width=8)).eval()
    batch = motions([8, 8, 8])
    batch[2][5, 100] = np.nan
    with pytest.raises(ScaMoError, match="motion 2: a feature is not finite"):
        encode_motions(tokenizer, batch)
    with pytest.raises(ScaMoError, match=r"motion 1: shape \(8, 262\), expected \(frames, 263\)"):
        encode_motions(tokenizer, [batch[0], batch[1][:, :262]])
    with pytest.raises(ScaMoError, match="motion 1: no tokens"):
        decode_tokens(tokenizer, [np.array([1]), np.array([], dtype=np.int32)])


def test_encode_dataset(trained, corpus, capsys):
    folder = encode_dataset(trained, corpus, device="cpu")
    assert folder == corpus / "tokens" / "small"
    dataset, tokenizer = MotionDataset.open(corpus, verify="full"), load_tokenizer(trained)
    store = dataset.tokens()
    assert (store.name, store.codes, store.downsampling) == ("small", 512, 4)
    assert store.tokenizer["folder"] == "small"
    np.testing.assert_array_equal(store.lengths, dataset.item_lengths // 4)
    items = [dataset.item_features(i) for i in range(dataset.n_items)]
    for item, tokens in enumerate(encode_motions(tokenizer, items)):
        np.testing.assert_array_equal(store[item], tokens)
    assert store.unigram("train")[:-1].sum() == sum(len(store[i]) for i in dataset.items("train"))
    assert "refused" not in capsys.readouterr().out

    with pytest.raises(ScaMoError, match="small exists"):
        encode_dataset(trained, corpus, device="cpu", progress=False)
    encode_dataset(trained, corpus, device="cpu", overwrite=True, progress=False)
    encode_dataset(trained, corpus, name="other", device="cpu", progress=False)
    assert dataset.token_names() == ["other", "small"]


def test_items_shorter_than_a_token_are_counted(trained, tmp_path, capsys):
    with DatasetWriter(tmp_path / "set") as writer:
        for i, motion in enumerate(motions([12, 3, 2, 9])):
            writer.add_clip(f"c{i}", motion, "train", [Caption("moves")])
    encode_dataset(trained, tmp_path / "set", device="cpu")
    assert "refused 2 of 4 items: shorter than one token (4 frames)" in capsys.readouterr().out
    assert list(MotionDataset.open(tmp_path / "set").tokens().lengths) == [3, 0, 0, 2]


def test_a_dataset_of_another_width(trained, tmp_path):
    with DatasetWriter(tmp_path / "set", feature_dim=5) as writer:
        writer.add_clip("c", motions([12], width=5)[0], "train", [Caption("moves")])
    with pytest.raises(ScaMoError, match="set: 5 features a frame, the tokenizer has 263"):
        encode_dataset(trained, tmp_path / "set", device="cpu", progress=False)
    assert not (tmp_path / "set/tokens").exists()
