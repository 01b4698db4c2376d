"""The metrics of text-to-motion generation, on the points an evaluator gives to sentences and motions.

Definitions: Guo et al. 2022 ("Generating Diverse and Natural 3D Human Motions from Text"), as the field
reports them; Heusel et al. 2017 for the Frechet distance. Row i of `text` belongs to row i of `motion`.
Whatever the original estimates by a random draw has an exact counterpart here: `expected_r_precision`,
`expected_diversity` and `expected_multimodality` are the means of the draws and need no seed, no repeats.

Everything is computed in float64. Every function raises ScaMoError, and gives no number, when an array has
another shape than stated, holds a value that is not finite (the row is named) or has too few rows.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scamo.errors import ScaMoError

Floats = NDArray[np.float64]

# Squared distances that differ by less than this share of their terms are a tie: 20 times the worst rounding
# of a product 512 wide. Only motions nearer to each other than some millionths of their distance from the
# median can be taken for equal.
TIE = 1e-12
_BLOCK = 2**22  # elements of a block of a distance matrix: 32 MiB


def frechet_distance(real: ArrayLike, generated: ArrayLike) -> float:
    """FID: |dmu|^2 + Tr(S1 + S2 - 2 sqrt(S1 S2)) of points (N, d) and (M, d), covariances over N - 1.

    The trace of the root is the sum of the singular values of R1 R2^T, where S = R^T R: no matrix root, no
    epsilon, and exact for covariances without full rank (N <= d). Needs two rows of each.
    """
    a, b = _points(real, "real", least=2), _points(generated, "generated", least=2)
    _same_width(a, b, "real", "generated")
    mean_a, factor_a = _mean_and_factor(a)
    mean_b, factor_b = _mean_and_factor(b)
    root = np.linalg.svd(factor_a @ factor_b.T, compute_uv=False).sum()
    shift = mean_a - mean_b
    total = shift @ shift + np.square(factor_a).sum() + np.square(factor_b).sum() - 2 * root
    # Never negative but for the rounding of terms that cancel, as they do for equal distributions.
    return max(float(total), 0.0)


def _mean_and_factor(points: Floats) -> tuple[Floats, Floats]:
    """Mean (d) and R (min(N, d), d), where R^T R is the covariance of points (N, d)."""
    mean = points.mean(axis=0)
    factor = np.linalg.qr(points - mean, mode="r")
    return mean, factor / np.sqrt(len(points) - 1)


def r_precision(text: ArrayLike, motion: ArrayLike, *, top_k: int = 3, pool: int = 32) -> Floats:
    """Share of sentences whose own motion is among the k nearest of its pool: (top_k,) for k = 1 to top_k.

    Pools are consecutive blocks of `pool` rows (shuffle the rows first); a last incomplete one is dropped.
    Nearest by Euclidean distance. A tie counts as its expectation over a random order, so motions that are
    all equal score k / pool exactly.
    """
    a, b = _paired(text, motion)
    pools = _whole_pools(len(a), pool, top_k)
    a, b = _about_median(a[: pools * pool], b[: pools * pool])
    a, b = a.reshape(pools, pool, -1), b.reshape(pools, pool, -1)
    scores = np.square(b).sum(-1)[:, None, :] - 2 * a @ b.transpose(0, 2, 1)
    closer, tied = _compare(scores, np.diagonal(scores, axis1=1, axis2=2), _tolerance(a, b))
    before, others = closer.sum(-1), tied.sum(-1) - 1
    # The own motion's place is equally likely any of before + 1, ..., before + 1 + others.
    places = np.arange(1, top_k + 1) - before[..., None]
    return np.clip(places / (others + 1)[..., None], 0, 1).mean(axis=(0, 1))


def expected_r_precision(
    text: ArrayLike,
    motion: ArrayLike,
    *,
    groups: ArrayLike | None = None,
    top_k: int = 3,
    pool: int = 32,
) -> Floats:
    """Per row the probability of a hit among the k nearest of a random pool: (N, top_k); no randomness.

    The pool is the row's own motion and pool - 1 others, every subset of the rows of other groups equally
    likely. groups: int (N,); rows of one group (captions of one clip) are never in each other's pools; None:
    every row is its own group. With c closer and no tied rows among n, the probability is that a
    hypergeometric draw of pool - 1 out of n meets at most k - 1 of the c; ties count as in `r_precision`.
    Its mean over rows is what `r_precision` has as its mean over shuffles of rows without groups.
    """
    a, b = _paired(text, motion)
    _whole_pools(len(a), pool, top_k)
    labels, sizes = _groups(groups, len(a))
    rivals = len(a) - sizes[labels]
    short = np.flatnonzero(rivals < pool - 1)
    if len(short):
        row = int(short[0])
        raise ScaMoError(
            f"a pool of {pool} needs {pool - 1} rows of other groups, row {row} has {int(rivals[row])}"
        )
    a, b = _about_median(a, b)
    squares, tolerance = np.square(b).sum(-1), _tolerance(a, b)
    before, others = np.empty(len(a), dtype=np.int64), np.empty(len(a), dtype=np.int64)
    step = max(1, _BLOCK // len(a))
    for start in range(0, len(a), step):
        rows = np.arange(start, min(start + step, len(a)))
        scores = squares - 2 * a[rows] @ b.T
        own = scores[np.arange(len(rows)), rows]
        closer, tied = _compare(scores, own, tolerance[rows])
        rival = labels[rows, None] != labels
        before[rows], others[rows] = (closer & rival).sum(-1), (tied & rival).sum(-1)
    hits = np.empty((len(a), top_k))
    for n in np.unique(rivals):
        rows = np.flatnonzero(rivals == n)
        table = _hit_table(int(n), top_k, pool)
        # In a random order of the ties, equally many are likely before the own motion: a mean over a range.
        sums = np.concatenate((np.zeros((1, top_k)), np.cumsum(table, axis=0)))
        first, last = before[rows], before[rows] + others[rows]
        spread = (sums[last + 1] - sums[first]) / (others[rows] + 1)[:, None]
        hits[rows] = np.where((others[rows] == 0)[:, None], table[first], spread)
    return np.clip(hits, 0, 1)


def _hit_table(n: int, top_k: int, pool: int) -> Floats:
    """[c, k - 1]: probability that pool - 1 of n rows, c of them closer, hold at most k - 1 closer ones.

    The hypergeometric distribution function by its products, which no factorial can overflow.
    """
    drawn, closer = pool - 1, np.arange(n + 1.0)
    table = np.empty((n + 1, top_k))
    for met in range(top_k):
        chance = np.full(n + 1, float(math.comb(drawn, met)))
        for i in range(met):
            chance *= (closer - i) / (n - i)
        for i in range(drawn - met):
            chance *= (n - closer - i) / (n - met - i)
        table[:, met] = chance
    return np.cumsum(table, axis=1)


def _about_median(text: Floats, motion: Floats) -> tuple[Floats, Floats]:
    """Both moved so that products lose nothing to a common offset; a median, as one far row moves a mean."""
    centre = np.median(motion, axis=0)
    return text - centre, motion - centre


def _tolerance(text: Floats, motion: Floats) -> Floats:
    return TIE * np.square(np.linalg.norm(text, axis=-1) + np.linalg.norm(motion, axis=-1))


def _compare(scores: Floats, own: Floats, tolerance: Floats) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which of scores (..., a, b) are below, and which equal, own (..., a).

    A score is a squared distance less the row's |text|^2: no root is taken, so equal points give no NaN.
    """
    closer = scores < (own - tolerance)[..., None]
    return closer, (scores <= (own + tolerance)[..., None]) & ~closer


def matching_score(text: ArrayLike, motion: ArrayLike, *, pool: int = 32) -> float:
    """Mean Euclidean distance of sentences and their own motions, over the rows of whole pools."""
    a, b = _paired(text, motion)
    rows = _whole_pools(len(a), pool, 1) * pool
    return float(np.linalg.norm(a[:rows] - b[:rows], axis=1).mean())


def clip_score(text: ArrayLike, motion: ArrayLike) -> float:
    """Mean cosine of sentences and their own motions, over all rows.

    The R-precision that goes with it is `r_precision(normalised(text), normalised(motion), pool=100)`: of
    points on a sphere the nearest is the one with the largest cosine.
    """
    a, b = _paired(text, motion)
    return float((_unit(a, "text") * _unit(b, "motion")).sum(axis=1).mean())


def normalised(points: ArrayLike) -> Floats:
    """Rows (N, d) divided by their length. A row of zeros has no direction and is an error."""
    return _unit(_points(points, "points"), "points")


def _unit(points: Floats, name: str) -> Floats:
    length = np.linalg.norm(points, axis=1)
    if not length.all():
        raise ScaMoError(f"{name}[{int(np.argmin(length))}]: a row of zeros has no direction")
    return points / length[:, None]


def diversity(motion: ArrayLike, *, pairs: int = 300, seed: int = 0) -> float:
    """Mean distance of `pairs` random pairs of motions (N, d).

    Drawn as in the original: two lists of rows, each without repetition but independent of the other, so a
    row may meet itself. Needs more rows than pairs.
    """
    points = _points(motion, "motion")
    first, second = _index_lists(len(points), pairs, seed, "rows")
    return float(np.linalg.norm(points[first] - points[second], axis=1).mean())


def expected_diversity(motion: ArrayLike) -> float:
    """What `diversity` is on average over all draws, whatever the number of pairs.

    Either list holds every row equally often and the lists are independent: the expectation is the mean of
    |x_i - x_j| over all N^2 ordered pairs, those of a row with itself (share 1 / N, distance 0) included.
    Without them it would be larger by N / (N - 1). Needs two rows.
    """
    return _mean_distance(_points(motion, "motion", least=2))


def multimodality(motions: ArrayLike, *, pairs: int = 10, seed: int = 0) -> float:
    """Mean distance of `pairs` random pairs among the motions (texts, generations, d) of one text.

    Drawn as in the original: two lists of generations, each without repetition, the same for all texts. Needs
    more generations than pairs.
    """
    points = _generations(motions)
    first, second = _index_lists(points.shape[1], pairs, seed, "generations")
    return float(np.linalg.norm(points[:, first] - points[:, second], axis=2).mean())


def expected_multimodality(motions: ArrayLike) -> float:
    """What `multimodality` is on average over all draws: `expected_diversity` per text, then the mean."""
    return float(np.mean([_mean_distance(points) for points in _generations(motions)]))


def _index_lists(n: int, pairs: int, seed: int, what: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    if not 0 < pairs < n:
        raise ScaMoError(f"{pairs} pairs need at least one pair and more {what} than pairs, got {n} {what}")
    rng = np.random.default_rng(seed)
    return rng.choice(n, pairs, replace=False), rng.choice(n, pairs, replace=False)


def _mean_distance(points: Floats) -> float:
    """Mean of |x_i - x_j| over all ordered pairs of rows, i = j included.

    By products: a pair nearer than 1e-7 of its distance from the median may come out wrong by that much.
    """
    points = points - np.median(points, axis=0)
    squares = np.square(points).sum(axis=1)
    total, n = 0.0, len(points)
    step = max(1, int(_BLOCK**0.5))
    for i in range(0, n, step):
        rows = slice(i, i + step)
        for j in range(i, n, step):
            columns = slice(j, j + step)
            block = squares[rows, None] + squares[columns] - 2 * points[rows] @ points[columns].T
            np.maximum(block, 0, out=block)
            if i == j:
                np.fill_diagonal(block, 0)
            total += float(np.sqrt(block, out=block).sum()) * (1 if i == j else 2)
    return total / n**2


def mean_interval(values: ArrayLike) -> tuple[Any, Any]:
    """Mean and half width 1.96 sigma / sqrt(n) over repeats (n,) or (n, k), as the field reports them.

    sigma is the population's (over n), as in the original. It covers the repeats' draws only, not which clips
    the test set happens to hold: for that see `bootstrap_interval`. One repeat gives the half width 0, as the
    formula does. Returns two numbers, or two arrays (k,).
    """
    repeats = _values(values)
    return repeats.mean(axis=0), 1.96 * repeats.std(axis=0) / np.sqrt(len(repeats))


def bootstrap_interval(
    values: ArrayLike,
    groups: ArrayLike | None = None,
    *,
    samples: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[Any, Any]:
    """Percentile bootstrap (Efron 1979) of the mean of values (N,) or (N, k): (low, high).

    Whole groups (clips, with all their captions) are drawn with replacement, as many as there are; groups:
    int (N,), None: every row is its own. The order of rows and the names of groups do not matter. Returns two
    numbers, or two arrays (k,). Needs two groups.
    """
    rows = _values(values)
    labels, sizes = _groups(groups, len(rows))
    if len(sizes) < 2:
        raise ScaMoError(f"a bootstrap needs two groups or more, got {len(sizes)}")
    if samples < 1 or not 0 < level < 1:
        raise ScaMoError(f"expected samples >= 1 and 0 < level < 1, got {samples} and {level}")
    mean = rows.mean(axis=0)
    columns = (rows - mean).reshape(len(rows), -1).T
    sums = [np.bincount(labels, weights=column) for column in columns]
    table = np.stack((*sums, sizes.astype(np.float64)), axis=1)
    table = table[np.lexsort(table.T)]
    n = len(table)
    rng = np.random.default_rng(seed)
    means = np.empty((samples, len(sums)))
    step = max(1, _BLOCK // n)
    for start in range(0, samples, step):
        size = min(step, samples - start)
        drawn = rng.integers(n, size=(size, n)) + n * np.arange(size)[:, None]
        times = np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n)
        totals = times @ table
        means[start : start + size] = totals[:, :-1] / totals[:, -1:]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return mean + low.reshape(mean.shape), mean + high.reshape(mean.shape)


def _array(values: ArrayLike, name: str) -> Floats:
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ScaMoError(f"{name}: not an array of numbers: {error}") from None


def _finite(array: Floats, name: str) -> Floats:
    bad = ~np.isfinite(array).reshape(len(array), -1).all(axis=1)
    if bad.any():
        raise ScaMoError(f"{name}[{int(np.argmax(bad))}]: holds a value that is not finite")
    return array


def _points(points: ArrayLike, name: str, *, least: int = 1) -> Floats:
    array = _array(points, name)
    if array.ndim != 2 or array.shape[1] == 0:
        raise ScaMoError(f"{name}: expected points (N, d), got an array of shape {array.shape}")
    if len(array) < least:
        raise ScaMoError(f"{name}: needs at least {least} rows, got {len(array)}")
    return _finite(array, name)


def _generations(motions: ArrayLike) -> Floats:
    array = _array(motions, "motions")
    if array.ndim != 3 or 0 in array.shape:
        raise ScaMoError(f"motions: expected points (texts, generations, d), got shape {array.shape}")
    return _finite(array, "motions")


def _values(values: ArrayLike) -> Floats:
    array = _array(values, "values")
    if array.ndim not in (1, 2) or 0 in array.shape:
        raise ScaMoError(f"values: expected (N,) or (N, k), not empty, got shape {array.shape}")
    return _finite(array, "values")


def _same_width(a: Floats, b: Floats, name_a: str, name_b: str) -> None:
    if a.shape[1] != b.shape[1]:
        raise ScaMoError(
            f"{name_a} is {a.shape[1]} wide, {name_b} {b.shape[1]}: expected points of one space"
        )


def _paired(text: ArrayLike, motion: ArrayLike) -> tuple[Floats, Floats]:
    a, b = _points(text, "text"), _points(motion, "motion")
    if len(a) != len(b):
        raise ScaMoError(f"text has {len(a)} rows, motion {len(b)}: expected one motion per sentence")
    _same_width(a, b, "text", "motion")
    return a, b


def _whole_pools(rows: int, pool: int, top_k: int) -> int:
    if pool < 1 or rows < pool:
        raise ScaMoError(f"a pool of {pool} needs at least one row and as many rows as it has, got {rows}")
    if not 1 <= top_k <= pool:
        raise ScaMoError(f"top_k: expected 1 to {pool}, the size of a pool, got {top_k}")
    return rows // pool


def _groups(groups: ArrayLike | None, rows: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Labels (N) from 0 on and how many rows each has."""
    if groups is None:
        return np.arange(rows), np.ones(rows, dtype=np.int64)
    array = np.asarray(groups)
    if array.shape != (rows,) or array.dtype.kind not in "iu":
        raise ScaMoError(f"groups: expected {rows} integers, got {array.dtype} of shape {array.shape}")
    _, labels, sizes = np.unique(array, return_inverse=True, return_counts=True)
    return labels, sizes
