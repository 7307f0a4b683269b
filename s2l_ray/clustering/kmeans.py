"""k-means over rows that need not fit into memory: one Lloyd loop over one data interface, and where it starts.

The pattern is that of `faiss.contrib.clustering`: the loop knows centroids and sums, `KMeansRows` knows where the rows are
(in memory, in a file, in Ray actors, on GPUs). Rows come in blocks of fixed size, and each block is searched by one thread,
so that the number of threads or workers decides no bit. Features lie on a grid of 2**-20, so that sums in float64 are exact
and may be added in any order. Most searches are saved by bounds (see `bounds`), exactly.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from s2l_ray.clustering.bounds import Search, drift_of, squares_to_nearest
from s2l_ray.clustering.columns import Column, Floats, Ints
from s2l_ray.clustering.threads import SearchThreads, faiss
from s2l_ray.examples.hashes import mixed
from s2l_ray.trajectories.sorting import in_order
from s2l_ray.trajectories.store import BLOCK_ROWS

# Rounds of seeding empty groups again, in all of a fit's iterations.
MAX_REPAIRS = 20
# A search for two neighbours takes 2.6 times as long as for one: above this share of rows the bounds save nothing.
MAX_SEARCHED = 0.3


@dataclass(frozen=True, eq=False)
class Step:
    """What one pass over rows changed."""

    sums_KF: NDArray[np.float64]
    """Change of the sum of each group's rows; exact."""

    sizes_K: NDArray[np.int64]
    """Change of the number of rows in each group."""

    num_changed: int
    """Rows whose group is another than before."""

    radii_K: NDArray[np.float64]
    """How far from each centroid those of its rows lie that were searched."""

    @classmethod
    def none(cls, shape: tuple[int, int]) -> Step:
        """That of no rows, for centroids of this shape."""
        return cls(np.zeros(shape), np.zeros(shape[0], np.int64), 0, np.zeros(shape[0]))

    @classmethod
    def sum(cls, steps: Iterable[Step]) -> Step:
        """The change over all blocks or workers, added as they come."""
        return functools.reduce(
            lambda left, right: cls(
                left.sums_KF + right.sums_KF,
                left.sizes_K + right.sizes_K,
                left.num_changed + right.num_changed,
                np.maximum(left.radii_K, right.radii_K),
            ),
            steps,
        )


class KMeansRows(Protocol):
    """The rows of one k-means, wherever they are, with the group that each is in."""

    @property
    def shape(self) -> tuple[int, int]:
        """(N, F)."""

    def centroids_moved(self, drift_K: NDArray[np.float64]) -> int:
        """How many rows may have another nearest centroid, now that bounds drifted so far (see `bounds`). To be called once a
        move."""

    def assign(self, centroids_KF: Floats, search: Search) -> Step:
        """Give each row its nearest centroid; a bounded search goes by what `centroids_moved` found after the last move."""

    def farthest(self, centroids_KF: Floats, seed_F: Floats | None) -> tuple[float, Floats]:
        """The row (shape (F,)) farthest from its centroid and from the seeds of all calls since the one without a seed, and
        its squared distance to the nearest of them; of equal ones the first."""

    def finish(self, centroids_KF: Floats) -> float:
        """Compute every row's distance to its centroid; the inertia, rounded once from an exact sum over blocks."""

    def results(self) -> Iterator[tuple[Ints, Floats]]:
        """After `finish`, block by block: each row's group and its distance to the centroid."""


@dataclass(frozen=True, eq=False)
class Fit:
    """Centroids of k-means on some rows; the rows' groups are in the `KMeansRows`."""

    centroids_KF: Floats
    sizes_K: NDArray[np.int64]
    inertia: float
    """Sum of the squared distances to the centroids, in squared units of the features."""

    num_iterations: int
    """Updates of the centroids."""

    ended_by: str
    """`converged` (no row changed its group), `tolerance` or `num_iterations`."""


def lloyd(rows: KMeansRows, centroids_KF: Floats, num_iterations: int, tolerance: float = 0.0) -> Fit:
    """k-means from given centroids, shape (K, F), ended by the first of three: no row changed its group; the squared moves
    of all centroids add up to at most `tolerance` (in squared units of the features); `num_iterations` updates.

    Every row of the result is with its nearest centroid (of two equally near, to the rounding of |x|^2 in float32, with
    either). Centroids that lose their last row are seeded again.
    """
    state = _LloydState(rows, centroids_KF)
    is_settled, is_small, iteration = state.assign(), False, 0
    while not is_settled and not is_small and iteration < num_iterations:
        is_small = state.update() <= tolerance
        is_settled = state.assign()
        iteration += 1
    ended_by = "converged" if is_settled else "tolerance" if is_small else "num_iterations"
    return Fit(state.centroids_KF, state.sizes_K, rows.finish(state.centroids_KF), iteration, ended_by)


class _LloydState:
    """Centroids, sums and sizes of the groups between the passes over the rows, and how the next pass will search."""

    def __init__(self, rows: KMeansRows, centroids_KF: Floats) -> None:
        self._rows, self.centroids_KF = rows, centroids_KF
        self._sums_KF, self.sizes_K = np.zeros(centroids_KF.shape), np.zeros(len(centroids_KF), np.int64)
        self._radii_K = np.zeros(len(centroids_KF))
        self._search: Search = "two"
        self._moved_at_two = np.inf
        self._repairs_left = MAX_REPAIRS

    def assign(self) -> bool:
        """Each row to its nearest centroid, again after each seeding of empty groups. Whether the rows are settled: none
        changed its group and no group was filled again."""
        num_changed, is_repaired, num_empty_before = self._pass(), False, len(self.sizes_K) + 1
        # A round fills all empty groups unless rows differ by less than float32 can tell.
        while 0 < self._num_empty < num_empty_before and self._repairs_left:
            num_empty_before, is_repaired = self._num_empty, True
            self._reseed()
            num_changed += self._pass()
        return not num_changed and (not is_repaired or self._num_empty > 0)

    def update(self) -> float:
        """Centroids to the means of their rows; the sum of their squared moves."""
        means_KF = self._sums_KF / np.maximum(self.sizes_K, 1)[:, None]
        moved_K, num_unsettled = self._move(np.where(self.sizes_K[:, None] > 0, means_KF, self.centroids_KF).astype(np.float32))
        if self._search == "two":
            self._moved_at_two = moved_K.max()
        if num_unsettled <= MAX_SEARCHED * self._rows.shape[0]:
            self._search = "bounded"
        else:  # bounds are worth setting again when the centroids have slowed down
            self._search = "two" if moved_K.max() < self._moved_at_two / 4 else "nearest"
        return float((moved_K**2).sum())

    @property
    def _num_empty(self) -> int:
        return int((self.sizes_K == 0).sum())

    def _pass(self) -> int:
        """One pass over the rows; how many changed their group."""
        step = self._rows.assign(self.centroids_KF, self._search)
        self._sums_KF += step.sums_KF
        self.sizes_K += step.sizes_K
        self._radii_K = np.maximum(self._radii_K, step.radii_K) if self._search == "bounded" else step.radii_K
        return step.num_changed

    def _reseed(self) -> None:
        """Move the empty centroids to the rows farthest from theirs, one after the other: each counts for the next, else they
        would all land in the same far corner. A pass for each, which is rare after k-means++."""
        seeded_KF, seed_F = self.centroids_KF.copy(), None
        for cluster_id in np.flatnonzero(self.sizes_K == 0):
            square, seed_F = self._rows.farthest(self.centroids_KF, seed_F)
            if square == 0:
                break
            seeded_KF[cluster_id] = seed_F
        self._repairs_left -= 1
        self._search = "nearest"
        self._move(seeded_KF)

    def _move(self, centroids_KF: Floats) -> tuple[NDArray[np.float64], int]:
        """Take new centroids; how far each moved, and how many rows the bounds no longer settle."""
        moved_K = np.sqrt(((centroids_KF.astype(np.float64) - self.centroids_KF) ** 2).sum(axis=1))
        self.centroids_KF = centroids_KF
        self._radii_K = self._radii_K + moved_K
        return moved_K, self._rows.centroids_moved(drift_of(moved_K, centroids_KF, self._radii_K))


def group_sums(labels_N: NDArray[np.integer[Any]], rows_NF: NDArray[np.floating[Any]], num_groups: int) -> NDArray[np.float64]:
    """The sum of the rows of each group, shape (K, F); exact where rows lie on the grid."""
    columns = rows_NF.T.astype(np.float64, order="C")
    return np.stack([np.bincount(labels_N, column, num_groups) for column in columns], axis=1)


def squared_distances(features_NF: Floats, labels_N: Ints, centroids_KF: Floats) -> NDArray[np.float64]:
    """Squared distance of each row to its centroid, shape (N,), column by column so that no row's sum has another order."""
    squares_N = np.zeros(len(labels_N))
    for feature in range(features_NF.shape[1]):
        difference_N = features_NF[:, feature] - centroids_KF[:, feature].astype(np.float64)[labels_N]
        squares_N += difference_N * difference_N
    return squares_N


# --- where it starts -----------------------------------------------------------------------------------------------


def plus_plus(features_NF: Floats, num_clusters: int, seed: int) -> Floats:
    """Initial centroids, shape (K, F), by greedy k-means++ (Arthur and Vassilvitskii, 2007, section 4): each is the best of
    2 + log K rows sampled by their squared distances to those before. A fit from them came out 1 to 2% lower in inertia
    than one from a single sampled row each, and no restart made up for that.

    Call it in a thread of `SearchThreads`, so that the number of processors decides no bit.
    """
    rng = np.random.default_rng(seed)
    chosen = [int(rng.integers(len(features_NF)))]
    squares_N = np.maximum(faiss.pairwise_distances(features_NF[chosen], features_NF)[0], 0)
    for _ in range(num_clusters - 1):
        totals_N = np.cumsum(squares_N, dtype=np.float64)
        points_C = rng.random(2 + int(math.log(num_clusters))) * totals_N[-1]
        rows_C = np.minimum(np.searchsorted(totals_N, points_C, side="right"), len(features_NF) - 1)
        left_CN = faiss.pairwise_distances(features_NF[rows_C], features_NF)
        np.minimum(np.maximum(left_CN, 0, out=left_CN), squares_N, out=left_CN)
        best = int(np.argmin(left_CN.sum(axis=1, dtype=np.float64)))
        chosen.append(int(rows_C[best]))
        squares_N = left_CN[best]
    return features_NF[chosen]


FarRows = tuple[NDArray[np.float64], Floats]
"""Rows, shape (M, F), and by what the first of them are chosen, the lowest first."""


def far_candidates(
    features: Column, centroids_KF: Floats, num_wanted: int, seed: np.uint64, pool: SearchThreads, first: int = 0
) -> FarRows:
    """Rows sampled by their squared distances to the nearest centroid, at most `num_wanted`: one pass over all.

    Without replacement and in one stream: the smallest of -log(u) / squared distance (Efraimidis and Spirakis, 2006), u
    being a hash of the row's number in the order of ids; that of the first row here is `first`.
    """
    width = centroids_KF.shape[1]

    def one_block(start: int) -> FarRows:
        rows_NF = features.read(start, start + BLOCK_ROWS).reshape(-1, width)
        random_N = uniform(np.arange(first + start, first + start + len(rows_NF)), seed)
        keys_N = -np.log(random_N) / squares_to_nearest(rows_NF, centroids_KF)
        if num_wanted >= len(keys_N):
            return keys_N, rows_NF
        kept = np.sort(np.argpartition(keys_N, num_wanted)[:num_wanted])
        return keys_N[kept], rows_NF[kept]

    return lowest_rows(in_order(pool, one_block, range(0, len(features), BLOCK_ROWS)), num_wanted)


def lowest_rows(found: Iterable[FarRows], num_wanted: int) -> FarRows:
    """The rows of lowest keys, `num_wanted` at most, in their order."""

    def lowest(left: FarRows, right: FarRows) -> FarRows:
        keys_N, rows_NF = np.concatenate([left[0], right[0]]), np.concatenate([left[1], right[1]])
        kept = np.sort(np.argsort(keys_N, kind="stable")[:num_wanted])
        return keys_N[kept], rows_NF[kept]

    return functools.reduce(lowest, found)


def uniform(numbers_N: NDArray[np.int64], seed: np.uint64) -> NDArray[np.float64]:
    """A random number in (0, 1) for each number, shape (N,), by SplitMix64."""
    bits_N = mixed((numbers_N.astype(np.uint64) + seed) * np.uint64(0x9E3779B97F4A7C15))
    return (bits_N >> np.uint64(11)).astype(np.float64) * 2.0**-53 + 2.0**-54
