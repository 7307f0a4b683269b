"""How alike examples of a group are: means over pairs of examples, explained variance, agreement of two rankings.

All from square arrays of inner products or distances of N examples. Intervals are 95% by bootstrap over examples, not over
pairs, which share examples; what groups explain is compared with random groups of the same sizes: N rows in K groups explain
(K - 1) / (N - 1) of anything by chance.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Labels = NDArray[np.integer[Any]]


def resamplings(num_rows: int, count: int, seed: int) -> Array:
    """How often each row is drawn in each of R bootstrap samples, shape (R, N)."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(num_rows, np.full(num_rows, 1 / num_rows), size=count).astype(np.float64)


def interval(value: float, resampled_R: Array) -> dict[str, float] | None:
    """A value with its 95% percentile interval, as in the JSON; None where there is no value.

    Bootstrap samples that have none are left out.
    """
    if not np.isfinite(value):
        return None
    found = resampled_R[np.isfinite(resampled_R)]
    low, high = np.quantile(found if len(found) else [value], [0.025, 0.975])
    return {"value": float(value), "low": float(low), "high": float(high)}


def cosines(gram_NN: Array) -> Array:
    """Cosines from inner products; 0 with a row that is zero."""
    norms_N = np.sqrt(np.maximum(np.diag(gram_NN), 0))
    scale_N = np.divide(1, norms_N, out=np.zeros_like(norms_N), where=norms_N > 0)
    return np.asarray(gram_NN * scale_N[:, None] * scale_N)


def mean_cosines(cosines_NN: Array, labels_N: Labels, counts_RN: Array) -> dict[str, Any] | None:
    """Mean cosine over pairs of examples of the same group, of different groups, and the difference of the two, with intervals.

    None where there are no pairs of one of the kinds.
    """
    is_same_NN = labels_N[:, None] == labels_N
    is_pair_NN = ~np.eye(len(labels_N), dtype=bool)
    if not (is_same_NN & is_pair_NN).any() or is_same_NN.all():
        return None
    everyone = np.ones((1, len(labels_N)))
    found = {}
    for name, chosen_NN in (("same", is_same_NN & is_pair_NN), ("other", ~is_same_NN)):
        found[name] = [_mean_over_pairs(cosines_NN, chosen_NN, counts) for counts in (everyone, counts_RN)]
    found["difference"] = [same - other for same, other in zip(found["same"], found["other"], strict=True)]
    return {name: interval(value[0], resampled_R) for name, (value, resampled_R) in found.items()}


def _mean_over_pairs(values_NN: Array, chosen_NN: NDArray[np.bool_], counts_RN: Array) -> Array:
    """Mean of a value over chosen pairs, in each resampling; NaN where one has no such pair."""
    sums_R, pairs_R = (_total(array_NN, counts_RN) for array_NN in (values_NN * chosen_NN, chosen_NN.astype(np.float64)))
    return np.divide(sums_R, pairs_R, out=np.full_like(sums_R, np.nan), where=pairs_R > 0)


def _total(values_NN: Array, counts_RN: Array) -> Array:
    """Sum over all pairs, each as often as both of its rows were drawn, shape (R,)."""
    return np.asarray(((counts_RN @ values_NN) * counts_RN).sum(axis=1))


# --- explained variance --------------------------------------------------------------------------------------------


def explained_by(
    gram_NN: Array, labels_N: Labels, num_permutations: int, seed: int, strata_N: Labels | None = None
) -> dict[str, float] | None:
    """Share of the variance that lies between groups, and what random groups of the same sizes explain.

    The variance of rows x is the mean of |x - mean|²; the share is its part between the groups' means (eta squared). With
    `strata_N`, random groups have as many rows of every stratum as the groups have: what is left is not the strata's doing.
    `p_value`: how often random groups explain at least as much. `excess`: the share above chance, of what chance leaves.
    None for fewer than two groups, for groups of one row each and for rows that do not differ.
    """
    centered_NN = gram_NN - gram_NN.mean(axis=0)
    centered_NN -= centered_NN.mean(axis=1, keepdims=True)
    total = float(np.trace(centered_NN))
    _, numbers_N, sizes_K = np.unique(labels_N, return_inverse=True, return_counts=True)
    if not 1 < len(sizes_K) < len(labels_N) or total <= 1e-12 * float(np.trace(gram_NN)):
        return None
    # |sum over a group|² / its size, added up over the groups, for any order of the rows.
    weights_NN = (numbers_N[:, None] == numbers_N) / sizes_K[numbers_N]
    share = float((centered_NN * weights_NN).sum()) / total
    generator = np.random.default_rng(seed)
    strata_N = np.zeros(len(labels_N), np.int64) if strata_N is None else strata_N
    random_P = np.empty(num_permutations)
    for i in range(num_permutations):
        order_N = _shuffled(generator, strata_N)
        random_P[i] = (centered_NN * weights_NN[order_N[:, None], order_N]).sum() / total
    chance = float(random_P.mean())
    return {
        "share": share,
        "random": chance,
        "random_low": float(np.quantile(random_P, 0.025)),
        "random_high": float(np.quantile(random_P, 0.975)),
        "excess": (share - chance) / (1 - chance) if chance < 1 else 0.0,
        "p_value": float((1 + (random_P >= share - 1e-12).sum()) / (1 + num_permutations)),
    }


def bands(values_N: Any, labels_N: Labels, strata_N: Labels) -> NDArray[np.int64]:
    """Other groups of the same sizes: inside each stratum its rows in ascending order of a value, cut where the groups end.

    The groups stand in ascending order of their mean value there.
    """
    values_N, found_N = np.asarray(values_N), np.empty(len(labels_N), np.int64)
    for stratum in np.unique(strata_N):
        rows = np.flatnonzero(strata_N == stratum)
        groups_K, sizes_K = np.unique(labels_N[rows], return_counts=True)
        means_K = [values_N[rows[labels_N[rows] == group]].mean() for group in groups_K]
        order_K = np.argsort(means_K, kind="stable")
        found_N[rows[np.argsort(values_N[rows], kind="stable")]] = np.repeat(groups_K[order_K], sizes_K[order_K])
    return found_N


def _shuffled(generator: np.random.Generator, strata_N: Labels) -> NDArray[np.int64]:
    """Row numbers in a random order in which each row's place is taken by one of its stratum."""
    order_N = np.arange(len(strata_N))
    for stratum in np.unique(strata_N):
        rows = np.flatnonzero(strata_N == stratum)
        order_N[rows] = generator.permutation(rows)
    return order_N


# --- rankings ------------------------------------------------------------------------------------------------------


def ranks(values_N: Any) -> Array:
    """Ranks from 0; equal values share the mean of theirs."""
    _, places_N, counts = np.unique(values_N, return_inverse=True, return_counts=True)
    last = np.cumsum(counts) - 1
    return np.asarray((last - (counts - 1) / 2)[places_N])


def rank_correlation(left_N: Any, right_N: Any, counts_RN: Array) -> dict[str, float] | None:
    """Spearman's correlation of two values of N rows; None where one of them does not vary."""

    def correlation(rows_N: NDArray[np.int64]) -> float:
        return _correlation(ranks(left_N[rows_N]), ranks(right_N[rows_N]))

    rows_N = np.arange(counts_RN.shape[1])
    resampled = [correlation(np.repeat(rows_N, counts_N.astype(np.int64))) for counts_N in counts_RN]
    return interval(correlation(rows_N), np.array(resampled))


def _correlation(left_N: Array, right_N: Array) -> float:
    left_N, right_N = left_N - left_N.mean(), right_N - right_N.mean()
    scale = float(np.sqrt((left_N**2).sum() * (right_N**2).sum()))
    return float((left_N * right_N).sum()) / scale if scale else np.nan


def gram(features_NF: Any) -> Array:
    """Inner products of N rows, shape (N, N)."""
    features_NF = np.asarray(features_NF, np.float64)
    return np.asarray(features_NF @ features_NF.T)


def distances(values_NT: Any) -> Array:
    """Euclidean distances of N rows, shape (N, N)."""
    values_NT = np.asarray(values_NT, np.float64)
    products_NN = gram(values_NT - values_NT.mean(axis=0))
    squares_N = np.diag(products_NN)
    return np.asarray(np.sqrt(np.maximum(squares_N[:, None] + squares_N - 2 * products_NN, 0)))


def pair_rank_correlation(left_NN: Array, right_NN: Array, counts_RN: Array) -> dict[str, float] | None:
    """Spearman's correlation of two values of all pairs of rows (Mantel's statistic on ranks).

    In a bootstrap sample pairs keep the ranks that they have among all pairs. None where one of the values does not vary.
    """
    above = np.triu_indices(len(left_NN), 1)
    ranked = []
    for values_NN in (left_NN, right_NN):
        ranks_NN = np.zeros_like(values_NN)
        ranks_NN[above] = ranks(values_NN[above])
        ranks_NN[above] -= ranks_NN[above].mean()
        ranked.append(ranks_NN + ranks_NN.T)
    x_NN, y_NN = ranked
    ones_NN = 1.0 - np.eye(len(x_NN))

    def correlation(counts_RN: Array) -> Array:
        n, x, y, xx, yy, xy = (_total(array, counts_RN) for array in (ones_NN, x_NN, y_NN, x_NN**2, y_NN**2, x_NN * y_NN))
        scale = np.sqrt(np.maximum(n * xx - x**2, 0) * np.maximum(n * yy - y**2, 0))
        return np.asarray(np.divide(n * xy - x * y, scale, out=np.full_like(scale, np.nan), where=scale > 0))

    return interval(correlation(np.ones((1, len(x_NN))))[0], correlation(counts_RN))
