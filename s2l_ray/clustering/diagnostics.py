"""How good groups are: what of the variance they explain, and how far two groupings of the same rows agree."""

from __future__ import annotations

import itertools
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
    """How many rows are in each pair of groups."""
    return np.bincount(left_N.astype(np.int64) * shape[1] + right_N, minlength=shape[0] * shape[1]).reshape(shape)


def adjusted_rand_index(table: NDArray[np.int64]) -> float:
    """Agreement of two groupings from their contingency table: 1 for the same groups, about 0 for unrelated ones
    (Hubert and Arabie, 1985)."""

    def pairs(counts: NDArray[np.int64]) -> float:
        return float((counts.astype(np.float64) * (counts - 1)).sum()) / 2

    together, total = pairs(table), pairs(np.array([table.sum()]))
    left, right = pairs(table.sum(axis=1)), pairs(table.sum(axis=0))
    expected, most = left * right / total if total else 0.0, (left + right) / 2
    return 1.0 if most == expected else (together - expected) / (most - expected)


def mean_agreement(labels_RN: NDArray[np.integer[Any]]) -> float | None:
    """Mean adjusted Rand index over all pairs of groupings of the same rows; None for fewer than two."""
    if len(labels_RN) < 2 or not labels_RN.shape[1]:
        return None
    size = int(labels_RN.max()) + 1
    pairs = itertools.combinations(labels_RN, 2)
    return float(np.mean([adjusted_rand_index(contingency(left, right, (size, size))) for left, right in pairs]))


def mean_overlap(subsets: list[NDArray[np.int64]]) -> float:
    """Mean share of common rows over all pairs of subsets of one size."""
    pairs = itertools.combinations(subsets, 2)
    return float(np.mean([len(np.intersect1d(left, right, assume_unique=True)) / len(left) for left, right in pairs]))


def explained(inertia: float, total: float) -> float:
    """Share of the variance that groups explain; 1 where rows do not differ."""
    return 1.0 - inertia / total if total > 0 else 1.0


def between(sums_SF: NDArray[np.float64], sizes_S: NDArray[np.int64]) -> float:
    """Sum of squares between groups, from the sums and sizes of the groups."""
    filled = sizes_S > 0
    of_groups = float(((sums_SF[filled] ** 2).sum(axis=1) / sizes_S[filled]).sum())
    return of_groups - float((sums_SF.sum(axis=0) ** 2).sum()) / int(sizes_S.sum())


def warning(spectrum: Spectrum, features: str) -> str | None:
    """What a user should know before trusting groups of trajectories that vary in one direction only."""
    share = float(spectrum.shares_T[0])
    if share < DOMINANT_SHARE or len(spectrum.shares_T) < 2:
        return None
    text = f"one direction holds {share:.1%} of the trajectories' variance"
    if features == "raw":
        return (
            f"{text}: raw groups do little more than cut the loss level into bands. Compare clustering.features reduction, "
            "shape or whitened, or record the untrained model too (proxy.include_untrained)"
        )
    return f"{text}, which '{features}' takes away or weakens: what is left may be noise"
