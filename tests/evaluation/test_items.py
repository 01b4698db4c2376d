"""The rows that an evaluation compares."""

from collections import Counter

import numpy as np
import pytest

from scamo.data.dataset import Caption, DatasetWriter, MotionDataset
from scamo.evaluation.items import draw_humanml3d, draw_strict, source_clips, strict_turns


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Clips 000000, M000000, 000001, ... of 40 to 79 frames; each third has a part with its own caption."""
    folder = tmp_path_factory.mktemp("items") / "data"
    rng = np.random.default_rng(0)
    with DatasetWriter(folder) as writer:
        for index in range(40):
            frames = 40 + index
            captions = [Caption("one"), Caption("two")][: 1 + index % 2]
            if index % 3 == 0:
                captions.append(Caption("a part", 0.5, 1.5))
            for mirror in ("", "M"):
                features = rng.standard_normal((frames, 263)).astype(np.float32)
                writer.add_clip(f"{mirror}{index:06d}", features, "train", captions)
    return MotionDataset.open(folder)


@pytest.fixture(scope="module")
def items(dataset):
    return dataset.items("train")


def test_parts_and_mirrored_copies_are_one_source_clip(dataset, items):
    clips = source_clips(dataset, items)
    names = [dataset.clip_names[dataset.item_clip(int(i))].lstrip("M") for i in items]
    assert len(set(clips.tolist())) == 40
    for number, name in zip(clips, names, strict=True):
        assert {names[i] for i in np.flatnonzero(clips == number)} == {name}


def test_other_names_with_an_m_are_not_mirrored(tmp_path):
    with DatasetWriter(tmp_path / "data") as writer:
        for name in ("March", "arch", "Movement7", "ovement7"):
            writer.add_clip(name, np.zeros((8, 263), np.float32), "train", [Caption("walks")])
    dataset = MotionDataset.open(tmp_path / "data")
    assert len(set(source_clips(dataset, dataset.items("train")).tolist())) == 4


def test_a_repeat_has_whole_pools_of_different_items(dataset, items):
    draw = draw_humanml3d(dataset, items, (0, 0, 0))
    assert len(draw.items) == len(items) // 32 * 32
    assert len(set(draw.items.tolist())) == len(draw.items)
    for caption, item in zip(draw.captions, draw.items, strict=True):
        assert dataset.caption_item(int(caption)) == item
    for features, start, end in zip(draw.features(dataset), draw.starts, draw.ends, strict=True):
        assert len(features) == end - start


def test_a_repeat_is_a_function_of_its_key(dataset, items):
    first, again, other = (draw_humanml3d(dataset, items, key) for key in ((3, 1, 0), (3, 1, 0), (3, 2, 0)))
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert first.items.tolist() != other.items.tolist()


def test_lengths_and_places_are_those_of_the_protocol(dataset, items):
    """Floored to 4, a third of them four less; every place and every caption equally likely."""
    shorter, places, captions, total = 0, Counter(), Counter(), 0
    for repeat in range(300):
        draw = draw_humanml3d(dataset, items, (1, repeat, 0))
        frames = dataset.item_lengths[draw.items]
        lengths = draw.ends - draw.starts
        assert (lengths % 4 == 0).all()
        assert ((lengths == frames // 4 * 4) | (lengths == frames // 4 * 4 - 4)).all()
        assert ((draw.starts >= 0) & (draw.ends <= frames)).all()
        shorter += int((lengths < frames // 4 * 4).sum())
        total += len(lengths)
        probe = items[np.flatnonzero(dataset.item_lengths[items] == 43)[0]]  # three places, or seven
        for row in np.flatnonzero(draw.items == probe):
            if lengths[row] == 40:
                places[int(draw.starts[row])] += 1
            captions[int(draw.captions[row])] += 1
    assert abs(shorter / total - 1 / 3) < 4 * (2 / 9 / total) ** 0.5
    assert sorted(places) == [0, 1, 2, 3]
    assert sorted(captions) == dataset.captions_of(int(probe)).tolist()
    for counts in (places, captions):
        n, p = sum(counts.values()), 1 / len(counts)
        assert all(abs(count / n - p) < 4 * (p * (1 - p) / n) ** 0.5 for count in counts.values())


def test_strict_takes_everything_in_turn(dataset, items):
    assert strict_turns(dataset, items) == 2
    for turn in range(3):
        draw = draw_strict(dataset, items, turn)
        np.testing.assert_array_equal(draw.items, items)
        np.testing.assert_array_equal(draw.ends, dataset.item_lengths[items] // 4 * 4)
        assert not draw.starts.any()
        for caption, item in zip(draw.captions, items, strict=True):
            ids = dataset.captions_of(int(item))
            assert caption == ids[turn % len(ids)]
