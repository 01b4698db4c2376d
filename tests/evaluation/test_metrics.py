"""The metrics against closed forms, enumeration of every draw, and slow independent computations."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.linalg import sqrtm
from scipy.spatial.distance import cdist
from scipy.stats import binom, hypergeom

from scamo.errors import ScaMoError
from scamo.evaluation.metrics import (
    bootstrap_interval,
    clip_score,
    diversity,
    expected_diversity,
    expected_multimodality,
    expected_r_precision,
    frechet_distance,
    matching_score,
    mean_interval,
    multimodality,
    normalised,
    r_precision,
)


def rotation(d: int, rng: np.random.Generator) -> np.ndarray:
    q, r = np.linalg.qr(rng.normal(size=(d, d)))
    return q * np.sign(np.diag(r))


def with_moments(mean: np.ndarray, factor: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """(n, d) points whose sample mean is `mean` and whose sample covariance is factor factor^T, exactly."""
    x = rng.normal(size=(n, factor.shape[1]))
    white, _ = np.linalg.qr(x - x.mean(0))
    return math.sqrt(n - 1) * white @ factor.T + mean


def related(n: int, d: int, seed: int, noise: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    text = rng.normal(size=(n, d))
    return text, text + noise * rng.normal(size=(n, d))


def lattice(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Small integers: distances are exact, and many are equal."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 3, (n, 2)).astype(float), rng.integers(0, 3, (n, 2)).astype(float)


def hit(own: float, others: np.ndarray, k: int) -> float:
    """Probability that `own` is among the k smallest, equal values in random order: by enumeration."""
    closer, tied = int((others < own).sum()), int((others == own).sum())
    return sum(closer + place < k for place in range(tied + 1)) / (tied + 1)


# Frechet distance


@pytest.mark.parametrize("d", [1, 2, 7, 64])
def test_frechet_of_commuting_covariances(d):
    rng = np.random.default_rng(d)
    basis = rotation(d, rng)
    a, b = rng.uniform(0.1, 5, (2, d))
    mean_a, mean_b = rng.normal(size=(2, d))
    x = with_moments(mean_a, basis * np.sqrt(a), d + 50, rng)
    y = with_moments(mean_b, basis * np.sqrt(b), 2 * d + 31, rng)
    expected = ((mean_a - mean_b) ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize("d", [2, 5, 40])
def test_frechet_of_other_covariances(d):
    rng = np.random.default_rng(d)
    factor_a, factor_b = rng.normal(size=(2, d, d))
    mean_a, mean_b = rng.normal(size=(2, d))
    x = with_moments(mean_a, factor_a, 4 * d, rng)
    y = with_moments(mean_b, factor_b, 3 * d, rng)
    a, b = factor_a @ factor_a.T, factor_b @ factor_b.T
    assert np.cov(x.T) == pytest.approx(a, rel=1e-9, abs=1e-10)
    assert np.abs(a @ b - b @ a).max() > 0.1
    root = np.trace(sqrtm(a @ b)).real
    expected = ((mean_a - mean_b) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * root
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(y, x) == pytest.approx(expected, rel=1e-8)


def test_frechet_of_two_dimensions_by_hand():
    """Tr sqrt(M) of a 2 x 2 matrix is sqrt(Tr M + 2 sqrt(det M))."""
    rng = np.random.default_rng(0)
    a, b = np.array([[2.0, 0.5], [0.5, 1.0]]), np.array([[1.0, -0.3], [-0.3, 4.0]])
    x = with_moments(np.array([1.0, 2.0]), np.linalg.cholesky(a), 9, rng)
    y = with_moments(np.array([-1.0, 2.5]), np.linalg.cholesky(b), 12, rng)
    root = math.sqrt(np.trace(a @ b) + 2 * math.sqrt(np.linalg.det(a @ b)))
    assert frechet_distance(x, y) == pytest.approx(4.25 + 3 + 5 - 2 * root, rel=1e-12)


def test_frechet_without_full_rank():
    rng = np.random.default_rng(3)
    # Fewer rows than dimensions; the trace of the root by eigenvalues instead.
    x, y = rng.normal(size=(6, 20)), 1.5 * rng.normal(size=(9, 20)) + 0.2
    a, b = np.cov(x.T), np.cov(y.T)
    values, vectors = np.linalg.eigh(a)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    nuclear = np.sqrt(np.linalg.eigvalsh(root @ b @ root).clip(0)).sum()
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * nuclear
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-6)  # eigenvalues of 0 limit this
    # Lines: a^2 + b^2 - 2 a b |cos|.
    u, v = np.eye(20)[0], math.cos(1.0) * np.eye(20)[0] + math.sin(1.0) * np.eye(20)[1]
    x = with_moments(np.zeros(20), 2.0 * u[:, None], 11, rng)
    y = with_moments(np.full(20, 0.1), 3.0 * v[:, None], 5, rng)
    assert frechet_distance(x, y) == pytest.approx(0.2 + 4 + 9 - 12 * math.cos(1.0), rel=1e-12)
    # Points; and a point against a cloud.
    x, y = np.tile(rng.normal(size=20), (8, 1)), np.tile(rng.normal(size=20), (3, 1))
    assert frechet_distance(x, y) == pytest.approx(((x[0] - y[0]) ** 2).sum(), rel=1e-12)
    cloud = rng.normal(size=(50, 20))
    expected = ((x[0] - cloud.mean(0)) ** 2).sum() + np.trace(np.cov(cloud.T))
    assert frechet_distance(x, cloud) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("n", "d"), [(400, 32), (20, 64), (5, 1)])
def test_frechet_of_equals_is_zero(n, d):
    rng = np.random.default_rng(n)
    x = rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + 3
    total = np.square(x - x.mean(0)).sum() / (n - 1)
    assert 0 <= frechet_distance(x, x) <= 1e-8 * total
    assert 0 <= frechet_distance(x, rng.permutation(x)) <= 1e-8 * total
    assert frechet_distance(x, x + 1) == pytest.approx(d, abs=1e-8 * total)


# R-precision


@pytest.mark.parametrize(("n", "pool", "top_k"), [(64, 32, 3), (75, 32, 3), (30, 7, 7), (5, 1, 1)])
@pytest.mark.parametrize("make", [lattice, lambda n, seed: related(n, 5, seed, 2.0)], ids=["ties", "none"])
def test_r_precision_by_loops(n, pool, top_k, make):
    text, motion = make(n, n)
    hits = []
    for start in range(0, n - pool + 1, pool):
        for i in range(start, start + pool):
            distance = np.array([((text[i] - motion[j]) ** 2).sum() for j in range(start, start + pool)])
            own = distance[i - start]
            hits.append([hit(own, np.delete(distance, i - start), k) for k in range(1, top_k + 1)])
    assert len(hits) == n // pool * pool
    assert r_precision(text, motion, top_k=top_k, pool=pool) == pytest.approx(np.mean(hits, 0), rel=1e-12)


def test_the_usual_distance_matrix_is_not_a_number_on_equal_rows():
    """The root of a rounding error below zero; where it happens, ours gives chance."""
    rng = np.random.default_rng(1)
    broken = 0
    for _ in range(10):
        points = np.tile(rng.normal(size=512), (32, 1)).astype(np.float32)
        squares = (points**2).sum(1)
        with np.errstate(invalid="ignore"):
            usual = np.sqrt(squares[:, None] + squares - 2 * points @ points.T)
        broken += bool(np.isnan(usual).any())
        assert r_precision(points, points).tolist() == [1 / 32, 2 / 32, 3 / 32]
    assert broken > 0


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
def test_equal_motions_are_chance(scale):
    rng = np.random.default_rng(1)
    text, motion = rng.normal(size=(96, 512)), scale * np.tile(rng.normal(size=512), (96, 1))
    assert r_precision(text, motion).tolist() == [1 / 32, 2 / 32, 3 / 32]
    assert r_precision(motion, motion).tolist() == [1 / 32, 2 / 32, 3 / 32]
    assert r_precision(text, motion, pool=96, top_k=2).tolist() == pytest.approx([1 / 96, 2 / 96], rel=1e-15)
    exact = expected_r_precision(text, motion, groups=np.arange(96) // 3)
    assert exact == pytest.approx(np.tile([1 / 32, 2 / 32, 3 / 32], (96, 1)), rel=1e-12)


def test_perfect_and_worst_r_precision():
    rng = np.random.default_rng(2)
    text = 100 * rng.normal(size=(64, 8))
    assert r_precision(text, text).tolist() == [1, 1, 1]
    assert (expected_r_precision(text, text) == 1).all()
    # On a line with every own motion the farthest.
    line = np.concatenate((np.zeros(1), np.full(1, 10.0)))[:, None]
    assert r_precision(line, line[::-1], pool=2, top_k=2).tolist() == [0, 1]
    assert expected_r_precision(line, line[::-1], pool=2, top_k=2).tolist() == [[0, 1], [0, 1]]


@pytest.mark.parametrize("groups", [None, [4, 4, 1, 7, 1, 1, -3, 9]], ids=["alone", "groups"])
@pytest.mark.parametrize("make", [lattice, lambda n, seed: related(n, 2, seed)], ids=["ties", "none"])
@pytest.mark.parametrize("pool", [2, 4, 6])
def test_expected_r_precision_by_all_pools(pool, make, groups):
    text, motion = make(8, 5)
    labels = list(range(8)) if groups is None else groups
    found = expected_r_precision(text, motion, groups=groups, top_k=2, pool=pool)
    distance = ((text[:, None] - motion) ** 2).sum(-1)
    for i in range(8):
        rivals = [j for j in range(8) if labels[j] != labels[i]]
        pools = [distance[i, list(chosen)] for chosen in itertools.combinations(rivals, pool - 1)]
        for k in (1, 2):
            expected = np.mean([hit(distance[i, i], others, k) for others in pools])
            assert found[i, k - 1] == pytest.approx(expected, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("make", [lattice, lambda n, seed: related(n, 3, seed)], ids=["ties", "none"])
def test_expected_r_precision_is_the_mean_over_shuffles(make):
    text, motion = make(27, 4)
    exact = expected_r_precision(text, motion, pool=8).mean(0)
    rng = np.random.default_rng(0)
    draws = np.array(
        [r_precision(text[p], motion[p], pool=8) for p in (rng.permutation(27) for _ in range(3000))]
    )
    error = draws.std(0) / math.sqrt(len(draws))
    assert (error < 0.002).all()
    assert (np.abs(draws.mean(0) - exact) < 4 * error).all()


def test_expected_r_precision_of_one_pool_is_r_precision():
    for text, motion in (related(32, 6, 0), lattice(32, 0)):
        exact = expected_r_precision(text, motion)
        assert exact.shape == (32, 3)
        assert exact.mean(0) == pytest.approx(r_precision(text, motion), rel=1e-12)
        assert (np.diff(exact, axis=1) >= 0).all()


def test_expected_r_precision_over_many_blocks():
    """Against scipy's distances and distribution; the matrix has more elements than a block."""
    text, motion = related(3000, 8, 6, 0.8)
    groups = np.arange(3000) // 4
    distance = cdist(text, motion)
    own = np.diagonal(distance)
    closer = ((distance < own[:, None]) & (groups[:, None] != groups)).sum(1)
    found = expected_r_precision(text, motion, groups=groups, pool=100)
    for k in (1, 2, 3):
        assert found[:, k - 1] == pytest.approx(hypergeom.cdf(k - 1, 2996, closer, 99), rel=1e-9, abs=1e-14)


def test_ties_are_ties_after_rounding():
    """Equal distances stay equal where rotating and shifting have made them differ in their last bits."""
    rng = np.random.default_rng(0)
    turn = rotation(64, rng)[:2]
    for seed in range(5):
        text, motion = lattice(64, seed)
        moved = [x @ turn + 0.1 for x in (text, motion)]
        assert r_precision(*moved) == pytest.approx(r_precision(text, motion), rel=1e-12)
        exact = expected_r_precision(text, motion)
        assert expected_r_precision(*moved) == pytest.approx(exact, rel=1e-12)
    # Float32 points that differ in nothing but one last bit are not equal.
    point = rng.normal(size=8).astype(np.float32)
    text, motion = np.stack((point, point)), np.stack((point, point))
    motion[1, 3] = np.nextafter(motion[1, 3], np.float32(9))
    assert r_precision(text, motion, pool=2, top_k=1).tolist() == [0.5]
    assert expected_r_precision(text, motion, pool=2, top_k=1).tolist() == [[1], [0]]


def test_groups_keep_captions_of_a_clip_apart():
    """Three captions of each clip, embedded perfectly: without groups a clip is its own rival."""
    rng = np.random.default_rng(0)
    points = np.repeat(rng.normal(size=(40, 4)), 3, axis=0)
    groups = np.repeat(np.arange(40), 3)
    assert (expected_r_precision(points, points, groups=groups) == 1).all()
    assert expected_r_precision(points, points)[:, 0].max() < 1


def test_r_precision_does_not_mind_a_common_motion_or_order():
    rng = np.random.default_rng(8)
    text, motion = related(70, 12, 8)
    turn, shift = rotation(12, rng), rng.normal(size=12) * 50
    moved = [x @ turn * 3 + shift for x in (text, motion)]
    assert r_precision(*moved) == pytest.approx(r_precision(text, motion), rel=1e-12)
    exact = expected_r_precision(text, motion)
    assert expected_r_precision(*moved) == pytest.approx(exact, rel=1e-12)
    order = rng.permutation(70)
    assert expected_r_precision(text[order], motion[order]) == pytest.approx(exact[order], rel=1e-12)
    # One row that is far off does not blur the others.
    text[0], motion[0] = 1e6, 1e6
    closer = (np.delete(cdist(text, motion)[5], 5) < np.linalg.norm(text[5] - motion[5])).sum()
    assert expected_r_precision(text, motion)[5, 0] == pytest.approx(
        hypergeom.pmf(0, 69, closer, 31), rel=1e-9
    )


# Distances


def test_matching_and_clip_score():
    text, motion = related(70, 6, 1)
    distances = [math.dist(a, b) for a, b in zip(text[:64], motion[:64], strict=True)]
    assert matching_score(text, motion) == pytest.approx(np.mean(distances), rel=1e-12)
    cosines = [a @ b / math.sqrt(a @ a) / math.sqrt(b @ b) for a, b in zip(text, motion, strict=True)]
    assert clip_score(text, motion) == pytest.approx(np.mean(cosines), rel=1e-12)
    angles = np.linspace(0, np.pi, 5)
    circle = np.stack((np.cos(angles), np.sin(angles)), axis=1)
    assert clip_score(circle, 7 * circle) == pytest.approx(1)
    assert clip_score(circle, np.tile([2.0, 0.0], (5, 1))) == pytest.approx(np.cos(angles).mean(), abs=1e-15)
    assert np.linalg.norm(normalised(text), axis=1) == pytest.approx(np.ones(70), rel=1e-14)


def test_nearest_normalised_points_have_the_largest_cosine():
    text, motion = related(200, 6, 2, 2.0)
    motion *= np.random.default_rng(0).uniform(0.1, 10, (200, 1))
    hits = []
    for start in (0, 100):
        a, b = text[start : start + 100], motion[start : start + 100]
        cosine = a @ b.T / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1)
        hits.append((cosine > np.diagonal(cosine)[:, None]).sum(1) < 1)
    found = r_precision(normalised(text), normalised(motion), pool=100, top_k=1)
    assert found[0] == pytest.approx(np.mean(hits), rel=1e-12)


def test_expected_diversity_by_all_draws():
    points = np.random.default_rng(0).normal(size=(4, 3))
    lists = [list(one) for one in itertools.permutations(range(4), 2)]
    distance = cdist(points, points)
    draws = [distance[a, b].mean() for a in lists for b in lists]
    assert expected_diversity(points) == pytest.approx(np.mean(draws), rel=1e-12)
    assert expected_diversity([[0.0], [3.0]]) == pytest.approx(1.5)  # half of the pairs are a row with itself


def test_diversity_is_expected_diversity_on_average():
    points = np.random.default_rng(1).normal(size=(40, 5))
    draws = [diversity(points, pairs=30, seed=seed) for seed in range(3000)]
    error = np.std(draws) / math.sqrt(len(draws))
    assert error < 0.003 * np.mean(draws)
    assert abs(np.mean(draws) - expected_diversity(points)) < 4 * error
    assert diversity(points, pairs=30, seed=7) == draws[7]


def test_multimodality_is_expected_multimodality_on_average():
    rng = np.random.default_rng(1)
    motions = rng.normal(size=(6, 12, 5)) * rng.uniform(0.2, 3, (6, 1, 1)) + rng.normal(size=(6, 1, 5))
    exact = np.mean([cdist(one, one).mean() for one in motions])
    assert expected_multimodality(motions) == pytest.approx(exact, rel=1e-12)
    draws = [multimodality(motions, seed=seed) for seed in range(2000)]
    error = np.std(draws) / math.sqrt(len(draws))
    assert error < 0.005 * exact
    assert abs(np.mean(draws) - exact) < 4 * error
    # By all draws: 2 pairs of 3 generations.
    motions = motions[:, :3]
    lists = [list(one) for one in itertools.permutations(range(3), 2)]
    draws = [np.linalg.norm(motions[:, a] - motions[:, b], axis=2).mean() for a in lists for b in lists]
    assert expected_multimodality(motions) == pytest.approx(np.mean(draws), rel=1e-12)


def test_no_row_is_drawn_twice():
    """One row is far from the others, which are equal: the mean counts how often it was drawn."""
    points = np.where(np.arange(11) == 4, 1e6, 0.0)[:, None]
    found = {diversity(points, pairs=10, seed=seed) for seed in range(200)}
    # Row 4 is in a list once or not at all: 0, 1 or 2 of the 10 pairs are far.
    assert {round(value / 1e5, 6) for value in found} == {0.0, 1.0, 2.0}


def test_equal_rows_have_no_diversity():
    points = np.tile(np.random.default_rng(0).normal(size=64), (50, 1))
    assert expected_diversity(points) == 0
    assert diversity(points, pairs=10) == 0
    assert expected_multimodality(points.reshape(5, 10, 64)) == 0
    # Two clusters: half of all pairs are apart.
    points[25:] += 1
    assert expected_diversity(points) == pytest.approx(4, rel=1e-7)


def test_distances_over_many_blocks():
    points = np.random.default_rng(0).normal(size=(4500, 4)) + 100
    assert expected_diversity(points) == pytest.approx(cdist(points, points).mean(), rel=1e-9)


def test_distances_do_not_mind_a_common_motion_or_precision():
    rng = np.random.default_rng(3)
    text, motion = related(64, 10, 3)
    turn, shift = rotation(10, rng), rng.normal(size=10)
    measures = {
        "fid": frechet_distance,
        "matching": matching_score,
        "diversity": lambda _, x: diversity(x, pairs=20),
        "expected": lambda _, x: expected_diversity(x),
        "modality": lambda _, x: expected_multimodality(x.reshape(8, 8, 10)),
        "precision": lambda a, b: expected_r_precision(a, b).mean(),
    }
    for name, measure in measures.items():
        value = measure(text, motion)
        assert measure(text @ turn + shift, motion @ turn + shift) == pytest.approx(value, rel=1e-10), name
        assert measure(np.float32(text), np.float32(motion)) == pytest.approx(value, rel=1e-5), name
    order = rng.permutation(64)
    assert frechet_distance(text[order], motion) == pytest.approx(frechet_distance(text, motion), rel=1e-10)
    assert expected_diversity(text[order]) == pytest.approx(expected_diversity(text), rel=1e-12)


# Intervals


def test_mean_interval():
    assert mean_interval([1.0, 3.0]) == pytest.approx((2.0, 1.96 / math.sqrt(2)))
    assert mean_interval([0.25]) == (0.25, 0.0)
    mean, half = mean_interval([[1.0, 5.0], [3.0, 5.0]])
    assert mean.tolist() == [2, 5]
    assert half == pytest.approx([1.96 / math.sqrt(2), 0])


def quantile(values: list[float], q: float) -> float:
    """Smallest value with at least the share q of equally likely values at or below it."""
    return sorted(values)[math.ceil(q * len(values)) - 1]


def test_bootstrap_by_all_resamples():
    """Three groups of 1, 2 and 4 rows: 27 resamples; levels whose bounds lie inside an atom."""
    values = np.array([5.0, 1.0, 2.0, 7.0, 7.5, 8.0, 9.5])
    groups = np.array([30, -2, -2, 7, 7, 7, 7])
    members = [values[groups == g] for g in (30, -2, 7)]
    means = [
        np.concatenate([members[i] for i in chosen]).mean()
        for chosen in itertools.product(range(3), repeat=3)
    ]
    for level in (0.3, 0.66, 0.95):
        low, high = bootstrap_interval(values, groups, level=level)
        assert low == pytest.approx(quantile(means, (1 - level) / 2), rel=1e-12)
        assert high == pytest.approx(quantile(means, (1 + level) / 2), rel=1e-12)


def test_bootstrap_of_shares_is_binomial():
    """300 hits of 1,000: resampled counts are Binomial(1000, 0.3), whose quantiles are known."""
    hits = np.repeat([1.0, 0.0], [300, 700])
    low, high = bootstrap_interval(hits)
    wanted = binom.ppf([0.025, 0.975], 1000, 0.3)
    # The draws' own quantiles: 10,000 samples put them within 4 sqrt(.025 .975 / 10,000) of their ranks.
    slack = 4 * math.sqrt(0.025 * 0.975 / 10_000)
    assert binom.ppf(0.025 - slack, 1000, 0.3) <= 1000 * low <= binom.ppf(0.025 + slack, 1000, 0.3)
    assert binom.ppf(0.975 - slack, 1000, 0.3) <= 1000 * high <= binom.ppf(0.975 + slack, 1000, 0.3)
    assert wanted[0] / 1000 == pytest.approx(low, abs=0.002)


def test_bootstrap_covers():
    """Percentile intervals of 60 normal values cover their mean about 94% of the time (200 x 2 data sets)."""
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(200):
        low, high = bootstrap_interval(rng.normal(3, 2, (60, 2)), samples=400)
        covered.extend((low <= 3) & (high >= 3))
    error = math.sqrt(0.94 * 0.06 / 400)
    assert abs(np.mean(covered) - 0.94) < 4 * error


def test_bootstrap_draws_whole_groups():
    rng = np.random.default_rng(5)
    clips = rng.normal(size=30)
    alone = bootstrap_interval(clips, samples=2000)
    # Every clip three times says nothing new, unless the copies are taken for clips.
    rows, groups = np.repeat(clips, 3), np.repeat(rng.permutation(30), 3)
    assert bootstrap_interval(rows, groups, samples=2000) == pytest.approx(alone, rel=1e-12)
    low, high = bootstrap_interval(rows, samples=2000)
    assert (high - low) / (alone[1] - alone[0]) == pytest.approx(1 / math.sqrt(3), rel=0.08)
    # Nor does the order of rows, and columns are intervals of their own.
    order = rng.permutation(90)
    assert bootstrap_interval(rows[order], groups[order], samples=2000) == pytest.approx(alone, rel=1e-12)
    low, high = bootstrap_interval(np.stack((rows, np.full(90, 0.1)), axis=1), groups, samples=2000)
    assert (low[0], high[0]) == pytest.approx(alone, rel=1e-12)
    assert (low[1], high[1]) == (0.1, 0.1)
    assert bootstrap_interval(clips, samples=2000, seed=1) != alone


# Input


GOOD = np.arange(80.0).reshape(40, 2)
NAN, INF = GOOD.copy(), GOOD.copy()
NAN[17, 1], NAN[30, 0], INF[3, 0] = np.nan, np.nan, np.inf


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: frechet_distance(GOOD, GOOD[:1]), "generated: needs at least 2 rows, got 1"),
        (lambda: frechet_distance(GOOD, GOOD[:, :1]), "real is 2 wide, generated 1: expected points of one"),
        (lambda: frechet_distance(GOOD[0], GOOD), r"real: expected points \(N, d\), got .* shape \(2,\)"),
        (lambda: frechet_distance(GOOD, NAN), r"generated\[17\]: holds a value that is not finite"),
        (lambda: frechet_distance("no", GOOD), "real: not an array of numbers"),
        (lambda: r_precision(GOOD, GOOD[:39]), "text has 40 rows, motion 39: expected one"),
        (lambda: r_precision(GOOD, GOOD[:, :1]), "text is 2 wide, motion 1"),
        (lambda: r_precision(GOOD, INF), r"motion\[3\]: holds a value that is not finite"),
        (lambda: r_precision(GOOD[:20], GOOD[:20]), "a pool of 32 needs .* as many rows as it has, got 20"),
        (lambda: r_precision(GOOD, GOOD, pool=2), "top_k: expected 1 to 2, the size of a pool, got 3"),
        (lambda: r_precision(GOOD, GOOD, pool=0), "a pool of 0 needs at least one row"),
        (lambda: expected_r_precision(GOOD[:20], GOOD[:20]), "a pool of 32 needs .* got 20"),
        (
            lambda: expected_r_precision(GOOD, GOOD, groups=[1] * 15 + list(range(2, 27))),
            "a pool of 32 needs 31 rows of other groups, row 0 has 25",
        ),
        (lambda: expected_r_precision(GOOD, GOOD, groups=[0]), "groups: expected 40 integers, got int64 of"),
        (lambda: expected_r_precision(GOOD, GOOD, groups=GOOD[:, 0]), "groups: expected 40 integers"),
        (lambda: matching_score(GOOD[:31], GOOD[:31]), "a pool of 32 needs .* got 31"),
        (lambda: clip_score(GOOD, 0 * GOOD), r"motion\[0\]: a row of zeros has no direction"),
        (lambda: normalised([[1.0, 2.0], [0.0, 0.0]]), r"points\[1\]: a row of zeros has no direction"),
        (lambda: diversity(GOOD), "300 pairs need at least one pair and more rows than pairs, got 40 rows"),
        (lambda: diversity(GOOD, pairs=40), "40 pairs need .* more rows than pairs, got 40 rows"),
        (lambda: diversity(GOOD, pairs=0), "0 pairs need at least one pair"),
        (lambda: expected_diversity(GOOD[:1]), "motion: needs at least 2 rows, got 1"),
        (lambda: multimodality(GOOD), r"motions: expected .* d\), got shape \(40, 2\)"),
        (lambda: multimodality(GOOD[None], pairs=40), "more generations than pairs, got 40 generations"),
        (lambda: expected_multimodality(NAN.reshape(10, 4, 2)), r"motions\[4\]: holds a value that is not"),
        (lambda: mean_interval([]), r"values: expected \(N,\) or \(N, k\), not empty, got shape \(0,\)"),
        (lambda: mean_interval([1.0, np.nan]), r"values\[1\]: holds a value that is not finite"),
        (lambda: bootstrap_interval(GOOD, np.zeros(40, int)), "needs two groups or more, got 1"),
        (lambda: bootstrap_interval(GOOD, level=1.0), "expected samples >= 1 and 0 < level < 1"),
    ],
)  # fmt: skip
def test_bad_input_gives_no_number(call, message):
    with pytest.raises(ScaMoError, match=message):
        call()
