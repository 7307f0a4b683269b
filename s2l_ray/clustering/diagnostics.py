"""How good groups are: what of the variance they explain, and how far two groupings of the same rows agree."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from s2l_ray.clustering.features import Spectrum

# Groups of at most so many rows are called tiny: a share of the budget goes to each of them all the same.
TINY_ROWS = 10
# Above this share in one component there is little else to group by.
DOMINANT_SHARE = 0.9


def contingency(
    left_N: NDArray[np.integer[Any]], right_N: NDArray[np.integer[Any]], shape: tuple[int, int]
) -> NDArray[np.int64]:
    """How many rows are in each pair of groups, an array of this shape."""
    return np.bincount(left_N.astype(np.int64) * shape[1] + right_N, minlength=shape[0] * shape[1]).reshape(shape)


def adjusted_rand_index(rows_KL: NDArray[np.int64]) -> float:
    """Agreement of two groupings from their contingency table: 1 for the same groups, about 0 for unrelated ones
    (Hubert and Arabie, 1985)."""

    def pairs(counts: NDArray[np.int64]) -> float:
        return float((counts.astype(np.float64) * (counts - 1)).sum()) / 2

    together, total = pairs(rows_KL), pairs(np.array([rows_KL.sum()]))
    left, right = pairs(rows_KL.sum(axis=1)), pairs(rows_KL.sum(axis=0))
    expected, largest = left * right / total if total else 0.0, (left + right) / 2
    return 1.0 if largest == expected else (together - expected) / (largest - expected)


def normalized_mutual_information(rows_KL: NDArray[np.int64]) -> float:
    """What two groupings tell of each other, from their contingency table: their mutual information over the mean of their
    entropies (Strehl and Ghosh, 2002; scikit-learn's default mean). 0 for independent ones, 1 for the same groups."""

    def entropy(counts: NDArray[np.int64]) -> float:
        shares = counts[counts > 0] / counts.sum()
        return -float((shares * np.log(shares)).sum())

    left, right, both = (entropy(counts) for counts in (rows_KL.sum(axis=1), rows_KL.sum(axis=0), rows_KL.ravel()))
    return round(max(0.0, 2 * (left + right - both) / (left + right)), 6) if left + right > 0 else 1.0


def purity(rows_KL: NDArray[np.int64]) -> float:
    """Share of the rows that are of the commonest right group of their left group: 1 where every left group is of one."""
    return float(rows_KL.max(axis=1).sum() / rows_KL.sum())


def mean_agreement(labels_RN: NDArray[np.integer[Any]]) -> float | None:
    """Mean adjusted Rand index over all pairs of groupings of the same rows; None for fewer than two."""
    if len(labels_RN) < 2 or not labels_RN.shape[1]:
        return None
    size = int(labels_RN.max()) + 1
    pairs = itertools.combinations(labels_RN, 2)
    return float(np.mean([adjusted_rand_index(contingency(left, right, (size, size))) for left, right in pairs]))


def mean_overlap(subsets: Sequence[NDArray[np.int64]]) -> float:
    """Mean share of common rows over all pairs of subsets (row numbers, none twice) of one size."""
    pairs = itertools.combinations(subsets, 2)
    return float(np.mean([len(np.intersect1d(left, right, assume_unique=True)) / len(left) for left, right in pairs]))


def explained(inertia: float, total: float) -> float:
    """Share of the variance that groups explain, of two sums of squares in the same units; 1 where rows do not differ."""
    return 1.0 - inertia / total if total > 0 else 1.0


def between(sums_SF: NDArray[np.float64], sizes_S: NDArray[np.int64]) -> float:
    """Sum of squares between groups, in squared units of the features, from the groups' sums and sizes."""
    filled = sizes_S > 0
    of_groups = float(((sums_SF[filled] ** 2).sum(axis=1) / sizes_S[filled]).sum())
    return of_groups - float((sums_SF.sum(axis=0) ** 2).sum()) / int(sizes_S.sum())


def warning(spectrum: Spectrum, features: str, has_untrained: bool | None = None) -> str | None:
    """What a user should know before trusting groups of trajectories that vary in one direction only, None for others.

    `spectrum`: of the losses; for `profile`, which has more than these, of the features. It advises what is not done yet.
    `has_untrained`: whether the trajectories begin with the losses of the untrained model; None where nobody knows.
    """
    share = float(spectrum.shares_T[0])
    if share < DOMINANT_SHARE or len(spectrum.shares_T) < 2:
        return None
    if features == "profile":
        return f"one direction holds {share:.1%} of the profiles' variance: their groups do little more than cut it into bands"
    text = f"one direction holds {share:.1%} of the trajectories' variance"
    if features != "raw":
        return f"{text}, which '{features}' takes away or weakens: what is left may be noise"
    text = (
        f"{text}: raw groups do little more than cut the loss level into bands. Compare clustering.features reduction, shape "
        "or whitened, or profile with trajectories.statistics"
    )
    if has_untrained is None:
        return f"{text}, or record the untrained model too (step 0) if these trajectories lack it"
    return text if has_untrained else f"{text}, or record the untrained model too (step 0; proxy.include_untrained in a run)"
