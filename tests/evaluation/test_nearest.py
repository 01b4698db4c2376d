"""The nearest training window, against brute force."""

import numpy as np
import pytest

from scamo.errors import ScaMoError
from scamo.evaluation.nearest import nearest_window, nearest_windows
from scamo.motion.representation import Representation


def brute_force(query, clips):
    best = (np.inf, "", 0)
    for name, clip in clips:
        short, long = sorted((query, clip), key=len)
        for start in range(len(long) - len(short) + 1):
            delta = long[start : start + len(short), 3:67].astype(np.float64) - short[:, 3:67]
            distance = 1000 * np.sqrt((delta**2).sum() / (len(short) * 22))
            if distance < best[0]:
                best = (distance, name, start if len(query) <= len(clip) else 0)
    return best


@pytest.mark.parametrize("length", [1, 9, 30])
def test_equals_brute_force(length):
    rng = np.random.default_rng(length)
    clips = [(f"c{i}", rng.normal(size=(12 + 7 * i, 263)).astype(np.float32)) for i in range(4)]
    query = rng.normal(size=(length, 263)).astype(np.float32)
    found = nearest_window(query, clips)
    distance, name, start = brute_force(query, clips)
    assert (found.name, found.start) == (name, start)
    assert found.distance_mm == pytest.approx(distance, rel=1e-9)


def test_a_copy_is_found():
    rng = np.random.default_rng(0)
    clips = [(f"c{i}", 1.0 + rng.normal(size=(60, 263)).astype(np.float32)) for i in range(5)]
    query = clips[3][1][20:50].copy()
    query[:, :3] += 5.0  # turning and travelling do not count
    found = nearest_window(query, clips)
    assert (found.name, found.start) == ("c3", 20)
    assert found.distance_mm < 1e-3


@pytest.mark.parametrize("width", [251, 272, 296])
def test_a_copy_is_found_among_other_features(width):
    representation, rng = Representation.of(width), np.random.default_rng(0)
    clips = [(f"c{i}", rng.normal(size=(30, width)).astype(np.float32)) for i in range(3)]
    query = clips[1][1][10:25].copy()
    query[:, representation.velocities] += 1.0  # nor does how fast the joints move
    found = nearest_window(query, clips)
    assert (found.name, found.start) == ("c1", 10)
    assert found.distance_mm < 1e-3 < nearest_window(query + 0.01, clips).distance_mm


def test_several_queries_at_once():
    rng = np.random.default_rng(1)
    clips = [(f"c{i}", rng.normal(size=(12 + 7 * i, 263)).astype(np.float32)) for i in range(4)]
    queries = [rng.normal(size=(n, 263)).astype(np.float32) for n in (5, 40, 19)]
    for found, query in zip(nearest_windows(queries, iter(clips)), queries, strict=True):
        distance, name, start = brute_force(query, clips)
        assert (found.name, found.start) == (name, start)
        assert found.distance_mm == pytest.approx(distance, rel=1e-9)


def test_errors():
    with pytest.raises(ScaMoError, match="no clips"):
        nearest_window(np.zeros((4, 263), np.float32), [])
    with pytest.raises(ScaMoError, match="feature_dim = 3: expected one of"):
        nearest_window(np.zeros((4, 3), np.float32), [])
    clips = [("c", np.zeros((9, 263), np.float32))]
    with pytest.raises(ScaMoError, match=r"clip c of shape \(9, 263\): expected \(T, 272\)"):
        nearest_window(np.zeros((4, 272), np.float32), clips)
