"""Latents on disk, and the packed batches that a predictor of next scales is trained on."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from scamo.data.dataset import Caption, DatasetWriter, MotionDataset, write_text_states
from scamo.data.scales import (
    ScaleLoader,
    ScaleSample,
    ScaleStore,
    check_tokenizer,
    collate_scales,
    encode_scales,
    pack_layout,
    scale_plan,
    tokens_of,
)
from scamo.errors import ScaMoError
from scamo.tokenizers.multiscale import MultiscaleConfig, MultiscaleTokenizer, latents_of

SCALES = ((1, 1), (2, 2), (4, 3), (8, 7))
CONFIG = MultiscaleConfig(
    width=8, blocks=1, dropout=0.0, bits=5, max_frames=32, scales=SCALES, feature_dim=263
)
LENGTHS, TEXT = (32, 9, 4, 40, 17, 1), 6


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A dataset of six clips with text states, a tokenizer with random weights, and the latents."""
    folder = tmp_path_factory.mktemp("scales")
    rng = np.random.default_rng(0)
    with DatasetWriter(folder / "set") as writer:
        for clip, length in enumerate(LENGTHS):
            features = rng.normal(size=(length, 263)).astype(np.float32)
            captions = [Caption(f"clip {clip}, {k}") for k in range(1 + clip % 2)]
            writer.add_clip(f"c{clip}", features, "val" if clip == 4 else "train", captions)
    dataset = MotionDataset.open(folder / "set")
    states = [rng.normal(size=(2 + i, TEXT)).astype(np.float16) for i in range(dataset.n_captions)]
    write_text_states(folder / "set", "words", states, encoder="none")
    torch.manual_seed(0)
    MultiscaleTokenizer(CONFIG, dataset.mean, dataset.std).save(folder / "tok")
    out = encode_scales(folder / "tok", folder / "set", device="cpu", progress=False)
    return dataset, MultiscaleTokenizer.load(folder / "tok"), ScaleStore(dataset, hashes=True), out


def make_plan(made, **changes):
    dataset, tokenizer, store, _ = made
    settings = {"seed": 3, "micro_batch_tokens": 200, "micro_batches": 2, "drop_text": 0.0, "max_text": 10}
    text = dataset.text_states("words")
    return scale_plan(dataset, "train", store, text, tokenizer.quantizer, **settings | changes)


def test_latents_are_stored_for_every_item_and_cut_to_the_longest(made):
    dataset, tokenizer, store, _ = made
    assert store.lengths.tolist() == [8, 3, 1, 8, 5, 1]
    assert (store.scales, store.bits, len(store)) == (SCALES, 5, 6)
    for item in range(len(store)):
        motion = torch.from_numpy(np.array(dataset.item_features(item)[:32]))[None]
        z = tokenizer.latents(motion, torch.tensor([motion.shape[1]]))[0, : store.lengths[item]]
        np.testing.assert_allclose(store[item], z.detach(), rtol=1e-4, atol=1e-5)


def test_targets_without_flips_are_the_tokenizers_bits(made):
    dataset, tokenizer, store, _ = made
    text = np.zeros((1, TEXT), np.float32)
    batch = collate_scales([ScaleSample(text, store[i], i) for i in range(6)], tokenizer.quantizer)
    lengths = torch.tensor(np.minimum(LENGTHS, 32))
    for item, (first, end) in enumerate(zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True)):
        motion = torch.from_numpy(np.array(dataset.item_features(item)[:32]))[None]
        with torch.no_grad():
            alone = tokenizer.encode(motion)
        valid = tokenizer.valid(lengths[item : item + 1])
        assert torch.equal(batch.targets[first:end], alone[valid])
        expected = tokenizer.quantizer.inputs(alone, latents_of(lengths[item : item + 1]))[valid]
        torch.testing.assert_close(batch.inputs[first:end], expected)


def test_flips_change_inputs_and_what_the_finer_scales_have_to_mend(made):
    _, tokenizer, store, _ = made
    quantizer = tokenizer.quantizer
    samples = [ScaleSample(np.zeros((1, TEXT), np.float32), store[i], i) for i in range(4)]
    plain, flipped, again = (
        collate_scales(samples, quantizer, seed=5, correct=correct) for correct in (False, True, True)
    )
    assert torch.equal(flipped.targets, again.targets)
    assert torch.equal(flipped.inputs, again.inputs)
    first = flipped.tokens < quantizer.slices[0].stop
    assert torch.equal(flipped.targets[first], plain.targets[first])
    assert (flipped.targets != plain.targets).any()
    assert not torch.equal(collate_scales(samples, quantizer, seed=6, correct=True).inputs, flipped.inputs)


def test_a_layout_packs_what_is_there(made):
    quantizer = made[1].quantizer
    n = torch.tensor([8, 3, 1])
    layout = pack_layout(quantizer.valid(n), quantizer.slices)
    # Of 3 of 8 latents: 1 bin, 1 of 2, 2 of 4, 3 of 8; of 1: one of each.
    sizes = [[1, 4, 12, 56], [1, 2, 6, 21], [1, 2, 3, 7]]
    assert layout.cu_seqlens.tolist() == np.cumsum([0, *(sum(s) for s in sizes)]).tolist()
    expected = [end for s in sizes for end, count in zip(np.cumsum(s), s, strict=True) for _ in range(count)]
    assert layout.bounds.tolist() == expected
    assert layout.longest == 73
    of_last = layout.tokens[layout.sample == 2].tolist()
    assert of_last == [0, 1, 2, 5, 6, 7, *range(17, 24)]
    assert tokens_of(quantizer).tolist()[:2] + [tokens_of(quantizer).tolist()[8]] == [0, 13, 73]


def test_batches_are_a_function_of_seed_and_step_on_any_number_of_ranks(made):
    dataset, tokenizer, store, _ = made
    plan = make_plan(made, drop_text=0.3)
    one = ScaleLoader(dataset, "train", plan, store, tokenizer.quantizer)
    two = [ScaleLoader(dataset, "train", plan, store, tokenizer.quantizer, rank=r, world=2) for r in (0, 1)]
    texts, items = dataset.text_states("words"), set()
    for step, packed in enumerate(one.steps(0, 8)):
        for index, batch in enumerate(packed):
            (same,) = two[index].step(step)
            assert torch.equal(batch.inputs, same.inputs)
            assert torch.equal(batch.targets, same.targets)
            assert batch.n_positions + len(batch.text_states) <= 200
            assert torch.equal(batch.latents, torch.from_numpy(store.lengths[batch.item_ids]))
            for row, caption in enumerate(batch.caption_ids.tolist()):
                found = batch.text_states[batch.cu_text[row] : batch.cu_text[row + 1]]
                expected = np.zeros((1, TEXT)) if caption < 0 else texts[caption][:10]
                np.testing.assert_array_equal(found, expected)
            items |= set(batch.item_ids.tolist())
    assert items == {0, 1, 2, 3, 5}
    seeds = [batch.seed for step in range(8) for batch in one.step(step)]
    assert len(set(seeds)) == 16


def test_validation_takes_every_item_once_without_flips(made):
    dataset, tokenizer, store, _ = made
    plan = make_plan(made)
    found = [
        batch
        for rank in (0, 1)
        for batch in ScaleLoader(
            dataset, "train", plan, store, tokenizer.quantizer, rank=rank, world=2
        ).validation("train")
    ]
    assert sorted(i for batch in found for i in batch.item_ids.tolist()) == [0, 1, 2, 3, 5]
    assert {c for batch in found for c in batch.caption_ids.tolist()} == {
        int(dataset.captions_of(item)[0]) for item in (0, 1, 2, 3, 5)
    }
    batch = found[0]
    samples = [ScaleSample(np.zeros((1, TEXT)), store[i]) for i in batch.item_ids.tolist()]
    assert torch.equal(batch.targets, collate_scales(samples, tokenizer.quantizer).targets)


def test_bad_input_is_named(made, tmp_path):
    dataset, tokenizer, store, out = made
    quantizer = tokenizer.quantizer
    with pytest.raises(ScaMoError, match="exists"):
        encode_scales(out.parents[2] / "tok", dataset.folder, device="cpu", progress=False)
    with pytest.raises(ScaMoError, match="no samples"):
        collate_scales([], quantizer)
    text = np.zeros((1, TEXT), np.float32)
    bad = ScaleSample(text, np.zeros((9, 7, 5), np.float32), 7, 2)
    with pytest.raises(ScaMoError, match=r"sample 1 \(item 7, caption 2\): latents of shape \(9, 7, 5\)"):
        collate_scales([ScaleSample(text, store[0]), bad], quantizer)
    with pytest.raises(ScaMoError, match="sample 0 .*: text states of shape"):
        collate_scales([ScaleSample(text[:0], store[0])], quantizer)
    with pytest.raises(ScaMoError, match="alone takes"):
        make_plan(made, micro_batch_tokens=60)
    other = MultiscaleTokenizer(CONFIG)
    other.save(tmp_path / "other")
    check_tokenizer(store, out.parents[2] / "tok")
    with pytest.raises(ScaMoError, match="another tokenizer"):
        check_tokenizer(store, tmp_path / "other")
    few, plan = MultiscaleTokenizer(replace(CONFIG, bits=4)), make_plan(made)
    with pytest.raises(ScaMoError, match="other scales or bits"):
        ScaleLoader(dataset, "train", plan, store, few.quantizer)
    with pytest.raises(ScaMoError, match="has no latents of scales 'nothing'"):
        ScaleStore(dataset, "nothing")


def test_a_changed_file_is_found(made, tmp_path):
    dataset, *_, out = made
    record = json.loads((out / "manifest.json").read_text())
    assert record["files"]["latents.npy"]["shape"] == [26, 7, 5]
    data = bytearray((out / "latents.npy").read_bytes())
    kept = bytes(data)
    data[-1] ^= 1
    (out / "latents.npy").write_bytes(data)
    try:
        with pytest.raises(ScaMoError, match="corrupt"):
            ScaleStore(dataset, hashes=True)
    finally:
        (out / "latents.npy").write_bytes(kept)
