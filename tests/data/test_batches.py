"""Packing against a slow reference, and the order of the data."""

import numpy as np
import pytest
import torch

from scamo.data.batches import Sample, collate
from scamo.errors import ScaMoError

EOS = 97


def make_sample(rng, text, motion, width=6, item=0, caption=0):
    return Sample(
        rng.standard_normal((text, width)).astype(np.float16),
        rng.integers(0, EOS, motion).astype(np.int32),
        item,
        caption,
    )


def slow_reference(samples):
    """Position by position: what each row holds, and what it predicts."""
    rows, scored = [], []
    for sample in samples:
        text, motion = len(sample.text), len(sample.motion)
        for position in range(text + motion):
            content = sample.text[position] if position < text else int(sample.motion[position - text])
            rows.append((position, content))
            following = position - (text - 1)
            if following >= 0:
                target = int(sample.motion[following]) if following < motion else EOS
                scored.append((len(rows) - 1, target))
    return rows, scored


@pytest.mark.parametrize(
    "shapes",
    [[(1, 1)], [(5, 3)], [(1, 7), (4, 1), (9, 2)], [(2, 2)] * 5],
    ids=lambda s: "-".join(map(str, s)),
)
def test_collate_equals_the_slow_reference(shapes):
    rng = np.random.default_rng(len(shapes))
    samples = [make_sample(rng, p, m, item=i, caption=10 + i) for i, (p, m) in enumerate(shapes)]
    batch = collate(samples, EOS)
    rows, scored = slow_reference(samples)

    assert batch.n_positions == len(rows)
    assert batch.positions.tolist() == [position for position, _ in rows]
    assert list(zip(batch.scored_rows.tolist(), batch.targets.tolist(), strict=True)) == scored
    assert batch.n_scored == len(scored) == sum(m for _, m in shapes) + len(shapes)
    assert sorted(batch.text_rows.tolist() + batch.motion_rows.tolist()) == list(range(len(rows)))
    for row, state in zip(batch.text_rows.tolist(), batch.text_states, strict=True):
        np.testing.assert_array_equal(state.numpy(), rows[row][1].astype(np.float32))
    for row, token in zip(batch.motion_rows.tolist(), batch.motion_tokens.tolist(), strict=True):
        assert token == rows[row][1]
    assert batch.cu_seqlens.tolist() == [0, *np.cumsum([p + m for p, m in shapes])]
    assert batch.prefix_lengths.tolist() == [p for p, _ in shapes]
    assert batch.max_seqlen == max(p + m for p, m in shapes)
    assert batch.item_ids.tolist() == list(range(len(shapes)))
    assert batch.caption_ids.tolist() == [10 + i for i in range(len(shapes))]


def test_collate_dtypes_and_device():
    batch = collate([make_sample(np.random.default_rng(0), 3, 4)], EOS)
    for name in ("cu_seqlens", "prefix_lengths", "positions"):
        assert getattr(batch, name).dtype == torch.int32, name
    for name in ("motion_tokens", "text_rows", "motion_rows", "scored_rows", "targets", "item_ids"):
        assert getattr(batch, name).dtype == torch.int64, name
    assert batch.text_states.dtype == torch.float32
    moved = batch.to("meta")
    assert moved.targets.device.type == "meta"
    assert moved.max_seqlen == batch.max_seqlen
    assert batch.targets.device.type == "cpu"


def test_collate_refuses_what_cannot_be_packed():
    rng = np.random.default_rng(0)
    good = make_sample(rng, 2, 2)
    with pytest.raises(ScaMoError, match="no samples"):
        collate([], EOS)
    with pytest.raises(ScaMoError, match=r"sample 1 \(item 4, caption 9\): text states of shape \(0, 6\)"):
        collate([good, make_sample(rng, 0, 2, item=4, caption=9)], EOS)
    with pytest.raises(ScaMoError, match=r"sample 1 .*expected \(P >= 1, 6\)"):
        collate([good, make_sample(rng, 2, 2, width=5)], EOS)
    with pytest.raises(ScaMoError, match=r"sample 0 .*motion tokens of shape \(0,\)"):
        collate([make_sample(rng, 2, 0)], EOS)
    with pytest.raises(ScaMoError, match=rf"motion token {EOS} is outside \[0, {EOS}\)"):
        collate([Sample(good.text, np.array([0, EOS]))], EOS)
    with pytest.raises(ScaMoError, match=r"motion token -1 is outside"):
        collate([Sample(good.text, np.array([-1, 3]))], EOS)
