"""k-means over rows that need not fit into memory: one Lloyd loop over one data interface.

The pattern is that of `faiss.contrib.clustering`: the loop knows centroids and sums, `Rows` knows where the rows are (in
memory, in a file, in Ray actors, on GPUs). Rows come in blocks of fixed size, and each block is searched by one thread, so
that the number of threads or workers decides no bit. Features lie on a grid of 2**-20, so that sums in float64 are exact
and may be added in any order.

Most searches are saved, exactly: a row stays with its centroid while an upper bound of the distance to it is below a lower
bound of the distance to any other (Hamerly, 2010, "Making k-means even faster"). Where the bounds save too little they are
not used. What is skipped is what a search would not have changed.
"""

from __future__ import annotations

import errno
import functools
import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from s2l_ray.errors import S2LError

try:
    import faiss
except ModuleNotFoundError as error:
    raise S2LError("faiss is not installed: pip install 's2l_ray[cpu]', or 's2l_ray[gpu]' for CUDA; not both.") from error

# Below so many numbers faiss takes a kernel that is five times slower for so few dimensions: 10,000 rows of 12, say.
faiss.cvar.distance_compute_blas_threshold = 1

BLOCK_ROWS = 65_536
# Rounds of seeding empty groups again, in all of a fit's iterations.
MAX_REPAIRS = 20
# A search for two neighbours takes 2.6 times as long as for one: above this share of rows the bounds save nothing.
MAX_SEARCHED = 0.3

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]
Search = Literal["nearest", "two", "bounded"]
"""How a pass finds the nearest centroids: all rows for one neighbour; all for two, which sets the bounds; or for two only
the rows whose bounds do not settle it."""


class Column(Protocol):
    """One value (or a few) for each row, in memory or in a file."""

    def __len__(self) -> int: ...
    def read(self, start: int, stop: int) -> NDArray[Any]:
        """The values of some rows."""

    def write(self, start: int, values: NDArray[Any]) -> None:
        """Set the values of some rows."""


class MemoryColumn:
    """A column in memory; what is read is a view."""

    def __init__(self, values: NDArray[Any]) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def read(self, start: int, stop: int) -> NDArray[Any]:
        return self.values[start:stop]

    def write(self, start: int, values: NDArray[Any]) -> None:
        self.values[start : start + len(values)] = values.reshape(-1, *self.values.shape[1:])


class FileColumn:
    """A column in a file that is read and written in pieces, not mapped: mapped pages count as this process's memory.

    The file is open only while it is used: there may be three for each of hundreds of strata.
    """

    def __init__(self, path: Path, num_rows: int, width: int, dtype: Any) -> None:
        self._path, self._dtype = path, np.dtype(dtype)
        self._shape = (num_rows, width) if width > 1 else (num_rows,)
        self._row_bytes = width * self._dtype.itemsize
        path.touch()
        os.truncate(path, num_rows * self._row_bytes)

    def __len__(self) -> int:
        return self._shape[0]

    def read(self, start: int, stop: int) -> NDArray[Any]:
        values = np.empty((min(stop, len(self)) - start, *self._shape[1:]), self._dtype)
        view, done = values.reshape(-1).view(np.uint8).data, 0
        with self._path.open("rb", buffering=0) as file:
            while done < len(view):
                count = os.preadv(file.fileno(), [view[done:]], start * self._row_bytes + done)
                if not count:
                    raise OSError(errno.EIO, "ends early", str(self._path))
                done += count
        return values

    def write(self, start: int, values: NDArray[Any]) -> None:
        view, done = np.ascontiguousarray(values, self._dtype).reshape(-1).view(np.uint8).data, 0
        with self._path.open("r+b", buffering=0) as file:
            while done < len(view):
                done += os.pwrite(file.fileno(), view[done:], start * self._row_bytes + done)


NewColumn = Callable[[int, int, Any], Column]
"""Makes a column for (rows, values per row, dtype)."""


def in_memory(num_rows: int, width: int, dtype: Any) -> Column:
    """A column of zeros in memory."""
    return MemoryColumn(np.zeros((num_rows, width) if width > 1 else num_rows, dtype))


@dataclass(frozen=True, eq=False)
class Step:
    """What one pass over rows changed."""

    sums_KF: NDArray[np.float64]
    """Change of the sum of each group's rows; exact."""

    sizes_K: NDArray[np.int64]
    """Change of the rows in each group."""

    num_changed: int

    @classmethod
    def sum(cls, steps: Iterable[Step]) -> Step:
        """The change over all blocks or workers, added as they come."""
        return functools.reduce(
            lambda left, right: cls(
                left.sums_KF + right.sums_KF, left.sizes_K + right.sizes_K, left.num_changed + right.num_changed
            ),
            steps,
        )


class Rows(Protocol):
    """The rows of one k-means, wherever they are, with the group that each is in."""

    @property
    def shape(self) -> tuple[int, int]:
        """(N, F)."""

    def unsettled(self, moved_K: NDArray[np.float64]) -> int:
        """How many rows may have another nearest centroid, now that centroids have moved so far. After each move, once."""

    def assign(self, centroids_KF: Floats, search: Search) -> Step:
        """Give each row its nearest centroid."""

    def farthest(self, centroids_KF: Floats, seed_F: Floats | None) -> tuple[float, Floats]:
        """The row (shape (F,)) farthest from its centroid and from the seeds of all calls since the one without a seed, and
        its squared distance to the nearest of them; of equal ones the first."""

    def finish(self, centroids_KF: Floats) -> float:
        """Settle every row's distance to its centroid; the inertia, rounded once from an exact sum over blocks."""

    def results(self) -> Iterator[tuple[Ints, Floats]]:
        """After `finish`, block by block: each row's group and its distance to the centroid."""


class LocalRows:
    """Rows of this process, in memory or in a file, searched by the threads of a pool (see `single_threads`)."""

    def __init__(self, features: Column, width: int, pool: ThreadPoolExecutor, new_column: NewColumn = in_memory) -> None:
        num_rows = len(features)
        self.shape = (num_rows, width)
        self._features, self._pool = features, pool
        self._labels = new_column(num_rows, 1, np.int32)
        # How much farther than its own centroid any other was when a row was last searched, plus the erosion of then:
        # a row is settled while this is above the erosion of now. In `finish` it becomes the distance.
        self._margins = new_column(num_rows, 1, np.float32)
        self._erosion_K = np.zeros(0)
        self._far: list[NDArray[np.float64]] = []

    def unsettled(self, moved_K: NDArray[np.float64]) -> int:
        self._erosion_K = self._erosion_K + _erosion(moved_K)

        def one_block(block: slice) -> int:
            labels, margins = self._labels.read(block.start, block.stop), self._margins.read(block.start, block.stop)
            return int(np.count_nonzero(margins <= _most(self._erosion_K)[labels]))

        return sum(self._pool.map(one_block, self._blocks))

    def assign(self, centroids_KF: Floats, search: Search) -> Step:
        num_clusters = len(centroids_KF)
        is_new = not len(self._erosion_K)
        if is_new:
            self._erosion_K = np.zeros(num_clusters)

        def one_block(block: slice) -> Step:
            features = self._read(block)
            old, margins = self._labels.read(block.start, block.stop), self._margins.read(block.start, block.stop)
            if is_new:
                old = np.full(len(features), -1, np.int32)
            new = _search(features, old, margins, centroids_KF, self._erosion_K, search)
            self._margins.write(block.start, margins)
            changed = np.flatnonzero(new != old)
            if not len(changed):
                return Step(np.zeros(centroids_KF.shape), np.zeros(num_clusters, np.int64), 0)
            rows, after, before = features[changed], new[changed], old[changed]
            self._labels.write(block.start, new)  # `old` may be a view of what this overwrites
            sums, sizes = group_sums(after, rows, num_clusters), np.bincount(after, minlength=num_clusters)
            if not is_new:
                sums -= group_sums(before, rows, num_clusters)
                sizes -= np.bincount(before, minlength=num_clusters)
            return Step(sums, sizes, len(changed))

        return Step.sum(self._pool.map(one_block, self._blocks))

    def farthest(self, centroids_KF: Floats, seed_F: Floats | None) -> tuple[float, Floats]:
        if seed_F is None:
            self._far = [np.empty(0)] * len(self._blocks)

        def one_block(numbered: tuple[int, slice]) -> tuple[float, Floats]:
            number, block = numbered
            features = self._read(block)
            if seed_F is None:
                labels = self._labels.read(block.start, block.stop)
                self._far[number] = squared_distances(features, labels, centroids_KF)
            else:
                to_seed = squared_distances(features, np.zeros(len(features), np.int32), seed_F[None])
                self._far[number] = np.minimum(self._far[number], to_seed)
            row = int(np.argmax(self._far[number]))
            return float(self._far[number][row]), features[row].copy()

        return max(self._pool.map(one_block, enumerate(self._blocks)), key=lambda found: found[0])

    def finish(self, centroids_KF: Floats) -> float:
        return math.fsum(self.finish_blocks(centroids_KF))

    def finish_blocks(self, centroids_KF: Floats) -> list[float]:
        """The inertia of each block; see `finish`."""

        def one_block(block: slice) -> float:
            squares = squared_distances(self._read(block), self._labels.read(block.start, block.stop), centroids_KF)
            self._margins.write(block.start, np.sqrt(squares).astype(np.float32))
            return float(squares.sum())

        self._far = []

        return list(self._pool.map(one_block, self._blocks))

    def results(self) -> Iterator[tuple[Ints, Floats]]:
        for block in self._blocks:
            yield self._labels.read(block.start, block.stop), self._margins.read(block.start, block.stop)

    def block(self, number: int) -> tuple[Ints, Floats] | None:
        """The results of one block, None after the last."""
        start = number * BLOCK_ROWS
        if start >= self.shape[0]:
            return None
        return self._labels.read(start, start + BLOCK_ROWS), self._margins.read(start, start + BLOCK_ROWS)

    def blocks(self) -> Iterator[tuple[int, Floats]]:
        """The number of each block's first row, and its features."""
        for block in self._blocks:
            yield block.start, self._read(block)

    def place(self, start: int, labels: Ints) -> None:
        """Say which groups some rows are in, without a search."""
        self._labels.write(start, labels)

    def sizes(self, num_clusters: int) -> NDArray[np.int64]:
        """Rows in each group."""
        counts = [np.bincount(self._labels.read(b.start, b.stop), minlength=num_clusters) for b in self._blocks]
        return np.asarray(np.sum(counts, axis=0))

    @property
    def _blocks(self) -> list[slice]:
        return [slice(start, start + BLOCK_ROWS) for start in range(0, self.shape[0], BLOCK_ROWS)]

    def _read(self, block: slice) -> Floats:
        return self._features.read(block.start, block.stop).reshape(-1, self.shape[1])


def _erosion(moved_K: NDArray[np.float64]) -> NDArray[np.float64]:
    """How much nearer any other centroid may be, compared with a row's own, after all centroids moved."""
    largest = int(np.argmax(moved_K))
    others_K = np.full(len(moved_K), moved_K[largest])
    others_K[largest] = np.delete(moved_K, largest).max(initial=0.0)
    return np.asarray(moved_K + others_K)


def _most(erosion_K: NDArray[np.float64]) -> Floats:
    """The erosion rounded up, by more than a margin in float32 may have lost; `_least` of it rounds down."""
    return (erosion_K * (1 + 1e-6) + 1e-30).astype(np.float32)


def _least(erosion_K: NDArray[np.float64]) -> Floats:
    return (erosion_K * (1 - 1e-6)).astype(np.float32)


def _search(
    features: Floats, old: Ints, margins: Floats, centroids_KF: Floats, erosion_K: NDArray[np.float64], search: Search
) -> Ints:
    """The nearest centroid of each row of a block. Updates `margins`."""
    if search == "two" or len(centroids_KF) == 1:
        new, margins[:] = _nearest_of_two(features, centroids_KF, erosion_K)
    elif search == "nearest":
        new = faiss.knn(features, centroids_KF, 1)[1][:, 0].astype(np.int32)
        # Where another centroid is nearest now, all that is known of the others is that they are no nearer.
        changed = np.flatnonzero(new != old)
        margins[changed] = _least(erosion_K)[new[changed]]
    else:
        new, unsettled = old.copy(), np.flatnonzero(margins <= _most(erosion_K)[old])
        if len(unsettled):
            new[unsettled], margins[unsettled] = _nearest_of_two(features[unsettled], centroids_KF, erosion_K)
    return new


def _nearest_of_two(features: Floats, centroids_KF: Floats, erosion_K: NDArray[np.float64]) -> tuple[Ints, Floats]:
    """The nearest centroids, and how much farther the second nearest are (at least), plus the erosion."""
    if len(centroids_KF) == 1:
        return np.zeros(len(features), np.int32), np.full(len(features), np.inf, np.float32)
    squares, labels = faiss.knn(features, centroids_KF, 2)
    new = labels[:, 0].astype(np.int32)
    # How far faiss's squared distances may be off: it computes |x|^2 - 2xc + |c|^2 in float32.
    largest = np.einsum("nf,nf->n", features, features).max() + np.einsum("kf,kf->k", centroids_KF, centroids_KF).max()
    error = np.float32(largest * (features.shape[1] + 8) * 2.0**-23)
    margins = np.sqrt(np.maximum(squares[:, 1] - error, 0)) - np.sqrt(np.maximum(squares[:, 0], 0) + error)
    return new, margins * np.float32(1 - 1e-6) + _least(erosion_K)[new]


@dataclass(frozen=True, eq=False)
class Fit:
    """Centroids of k-means on some rows; the rows' groups are in the `Rows`."""

    centroids_KF: Floats
    sizes_K: NDArray[np.int64]
    inertia: float
    num_iterations: int
    """Updates of the centroids."""

    ended_by: str
    """`converged` (no row changed its group), `tolerance` or `num_iterations`."""


def lloyd(rows: Rows, centroids_KF: Floats, num_iterations: int, tolerance: float = 0.0) -> Fit:
    """k-means from given centroids, ended by the first of three: no row changed its group; the squared moves of all
    centroids add up to at most `tolerance` (in squared units of the features); `num_iterations` updates.

    Every row of the result is with its nearest centroid (of two equally near, to the rounding of |x|^2 in float32, with
    either). Centroids that lose their last row are seeded again.
    """
    sums_KF, sizes_K = np.zeros(centroids_KF.shape), np.zeros(len(centroids_KF), np.int64)
    search, moved_at_two, iteration, ended_by, repairs = "two", np.inf, 0, "", MAX_REPAIRS
    while True:
        num_empty, num_changed, is_repaired = len(centroids_KF) + 1, 0, False
        while True:
            step = rows.assign(centroids_KF, search)  # type: ignore[arg-type]
            sums_KF += step.sums_KF
            sizes_K += step.sizes_K
            num_changed += step.num_changed
            empty = np.flatnonzero(sizes_K == 0)
            # Seeding again mends all of them unless rows differ by less than float32 can tell.
            if not len(empty) or len(empty) >= num_empty or not repairs:
                break
            num_empty, is_repaired, repairs = len(empty), True, repairs - 1
            old_KF, centroids_KF, search = centroids_KF, _seeded(rows, centroids_KF, empty), "nearest"
            rows.unsettled(_moves(centroids_KF, old_KF))
        # A repair that filled nothing and moved no row is the end, too.
        if not num_changed and (not is_repaired or len(empty)):
            ended_by = "converged"
        elif iteration == num_iterations:
            ended_by = ended_by or "num_iterations"
        if ended_by:
            return Fit(centroids_KF, sizes_K, rows.finish(centroids_KF), iteration, ended_by)
        old_KF = centroids_KF
        centroids_KF = np.where(sizes_K[:, None] > 0, sums_KF / np.maximum(sizes_K, 1)[:, None], old_KF).astype(np.float32)
        moved_K = _moves(centroids_KF, old_KF)
        if float((moved_K**2).sum()) <= tolerance:
            ended_by = "tolerance"  # once more, so that the rows go to these centroids
        iteration += 1
        if search == "two":
            moved_at_two = moved_K.max()
        if rows.unsettled(moved_K) <= MAX_SEARCHED * rows.shape[0]:
            search = "bounded"
        else:
            search = "two" if moved_K.max() < moved_at_two / 4 else "nearest"


def _moves(new_KF: Floats, old_KF: Floats) -> NDArray[np.float64]:
    """How far each centroid moved."""
    return np.asarray(np.sqrt(((new_KF.astype(np.float64) - old_KF) ** 2).sum(axis=1)))


def _seeded(rows: Rows, centroids_KF: Floats, empty: NDArray[np.int64]) -> Floats:
    """Centroids with the empty ones moved to the rows farthest from theirs, one after the other: each counts for the next,
    else they would all land in the same far corner. A pass for each, which is rare after k-means++."""
    seeded_KF = centroids_KF.copy()
    seed_F = None
    for cluster_id in empty:
        square, seed_F = rows.farthest(centroids_KF, seed_F)
        if square == 0:
            break
        seeded_KF[cluster_id] = seed_F
    return seeded_KF


def plus_plus(features_NF: Floats, num_clusters: int, seed: int) -> Floats:
    """Initial centroids, shape (K, F), by greedy k-means++ (Arthur and Vassilvitskii, 2007, section 4): each is the best of
    2 + log K rows drawn by their squared distances to those before. A fit from them came out 1 to 2% lower in inertia than
    one from a single draw each, and no restart made up for that.

    Call it in a thread of `single_threads`, so that the number of processors decides no bit.
    """
    rng = np.random.default_rng(seed)
    chosen = [int(rng.integers(len(features_NF)))]
    squares_N = np.maximum(faiss.pairwise_distances(features_NF, features_NF[chosen])[:, 0], 0)
    for _ in range(num_clusters - 1):
        totals_N = np.cumsum(squares_N, dtype=np.float64)
        draws = rng.random(2 + int(math.log(num_clusters))) * totals_N[-1]
        rows = np.minimum(np.searchsorted(totals_N, draws, side="right"), len(features_NF) - 1)
        left_NC = np.minimum(np.maximum(faiss.pairwise_distances(features_NF, features_NF[rows]), 0), squares_N[:, None])
        best = int(np.argmin(left_NC.sum(axis=0, dtype=np.float64)))
        chosen.append(int(rows[best]))
        squares_N = np.ascontiguousarray(left_NC[:, best])
    return features_NF[chosen]


def group_sums(labels_N: NDArray[np.integer[Any]], rows_NF: NDArray[np.floating[Any]], num_groups: int) -> NDArray[np.float64]:
    """The sum of the rows of each group, shape (K, F); exact where rows lie on the grid."""
    columns = rows_NF.T.astype(np.float64, order="C")
    return np.stack([np.bincount(labels_N, column, num_groups) for column in columns], axis=1)


def squared_distances(features_NF: Floats, labels_N: Ints, centroids_KF: Floats) -> NDArray[np.float64]:
    """Squared distance of each row to its centroid in float64, column by column so that no row's sum has another order."""
    squares = np.zeros(len(labels_N))
    for feature in range(features_NF.shape[1]):
        difference = features_NF[:, feature] - centroids_KF[:, feature].astype(np.float64)[labels_N]
        squares += difference * difference
    return squares


def squares_to_nearest(features_NF: Floats, centroids_KF: Floats) -> NDArray[np.float64]:
    """Squared distances to the nearest centroids, never zero."""
    return np.maximum(faiss.knn(features_NF, centroids_KF, 1)[0][:, 0].astype(np.float64), 1e-30)


def uniform(numbers_N: NDArray[np.int64], seed: np.uint64) -> NDArray[np.float64]:
    """A random number in (0, 1) for each number: the finalizer of SplitMix64 (Steele et al., 2014)."""
    mixed = (numbers_N.astype(np.uint64) + seed) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((mixed ^ (mixed >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) * 2.0**-53 + 2.0**-54


def single_threads(num_threads: int | None = None) -> ThreadPoolExecutor:
    """Threads (as many as this process has processors) in each of which faiss uses one: OpenMP's setting is a thread's own."""
    if num_threads is None:
        num_threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return ThreadPoolExecutor(num_threads, initializer=faiss.omp_set_num_threads, initargs=(1,))
