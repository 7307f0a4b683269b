"""The rows of k-means in this process, in memory or in a file."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from s2l_ray.clustering.bounds import Search, is_unsettled, nearest_centroids
from s2l_ray.clustering.columns import Column, Floats, Ints, NewColumn, in_memory
from s2l_ray.clustering.kmeans import Step, group_sums, squared_distances
from s2l_ray.clustering.threads import SearchThreads
from s2l_ray.trajectories.store import BLOCK_ROWS


class LocalRows:
    """`KMeansRows` of this process, searched by the threads of a pool, a block each."""

    def __init__(self, features: Column, width: int, pool: SearchThreads, new_column: NewColumn = in_memory) -> None:
        num_rows = len(features)
        self.shape = (num_rows, width)
        self._blocks = [slice(start, start + BLOCK_ROWS) for start in range(0, num_rows, BLOCK_ROWS)]
        self._features, self._pool = features, pool
        self._labels = new_column(num_rows, 1, np.int32)
        # The rows' gaps (see `bounds`); `finish` puts the distances in their place.
        self._gaps = new_column(num_rows, 1, np.float32)
        self._unsettled: list[NDArray[np.uint8]] = [np.empty(0, np.uint8)] * len(self._blocks)
        """For each block a bit a row: whether the bounds, as of the last move, leave it unsettled."""

        self._drift_K: NDArray[np.float64] | None = None
        """None until the rows are assigned for the first time."""
        self._to_nearest: list[NDArray[np.float64]] = []
        """For `farthest`, block by block: squared distances to the nearest centroid or seed."""

    def centroids_moved(self, drift_K: NDArray[np.float64]) -> int:
        assert self._drift_K is not None, "rows that were never assigned have no bounds"
        total_K = self._drift_K = self._drift_K + drift_K

        def one_block(numbered: tuple[int, slice]) -> int:
            number, block = numbered
            labels_M, gaps_M = self._results_of(block)
            found_M = is_unsettled(gaps_M, labels_M, total_K)
            self._unsettled[number] = np.packbits(found_M)
            return int(np.count_nonzero(found_M))

        return sum(self._pool.map(one_block, enumerate(self._blocks)))

    def assign(self, centroids_KF: Floats, search: Search) -> Step:
        num_clusters, is_first = len(centroids_KF), self._drift_K is None
        assert search != "bounded" or not is_first, "rows that were never assigned have no bounds"
        drift_K = self._drift_K = np.zeros(num_clusters) if self._drift_K is None else self._drift_K

        def one_block(numbered: tuple[int, slice]) -> Step:
            number, block = numbered
            labels_M, gaps_M = self._results_of(block)
            searched = slice(None) if search != "bounded" else np.flatnonzero(np.unpackbits(self._unsettled[number]))
            features_SF = self._read(block)[searched]
            if not len(features_SF):
                return Step.none(centroids_KF.shape)
            old_S = np.full(len(features_SF), -1, np.int32) if is_first else labels_M[searched]
            new_S, gaps_M[searched], radii_K = nearest_centroids(
                features_SF, old_S, gaps_M[searched], centroids_KF, drift_K, search
            )
            self._gaps.write(block.start, gaps_M)
            changed = np.flatnonzero(new_S != old_S)
            if not len(changed):
                return replace(Step.none(centroids_KF.shape), radii_K=radii_K)
            rows, after, before = features_SF[changed], new_S[changed], old_S[changed]
            labels_M[searched] = new_S  # `old_S` may be a view of what this overwrites
            self._labels.write(block.start, labels_M)
            sums_KF, sizes_K = group_sums(after, rows, num_clusters), np.bincount(after, minlength=num_clusters)
            if not is_first:
                sums_KF -= group_sums(before, rows, num_clusters)
                sizes_K -= np.bincount(before, minlength=num_clusters)
            return Step(sums_KF, sizes_K, len(changed), radii_K)

        return Step.sum(self._pool.map(one_block, enumerate(self._blocks)))

    def farthest(self, centroids_KF: Floats, seed_F: Floats | None) -> tuple[float, Floats]:
        if seed_F is None:
            self._to_nearest = [np.empty(0)] * len(self._blocks)

        def one_block(numbered: tuple[int, slice]) -> tuple[float, Floats]:
            number, block = numbered
            features_MF = self._read(block)
            if seed_F is None:
                squares_M = squared_distances(features_MF, self._labels_of(block), centroids_KF)
            else:
                to_seed_M = squared_distances(features_MF, np.zeros(len(features_MF), np.int32), seed_F[None])
                squares_M = np.minimum(self._to_nearest[number], to_seed_M)
            self._to_nearest[number] = squares_M
            row = int(np.argmax(squares_M))
            return float(squares_M[row]), features_MF[row].copy()

        return max(self._pool.map(one_block, enumerate(self._blocks)), key=lambda found: found[0])

    def finish(self, centroids_KF: Floats) -> float:
        return math.fsum(self.finish_blocks(centroids_KF))

    def finish_blocks(self, centroids_KF: Floats) -> list[float]:
        """The inertia of each block; see `finish`."""

        def one_block(block: slice) -> float:
            squares_M = squared_distances(self._read(block), self._labels_of(block), centroids_KF)
            self._gaps.write(block.start, np.sqrt(squares_M).astype(np.float32))
            return float(squares_M.sum())

        self._to_nearest = []
        return list(self._pool.map(one_block, self._blocks))

    def results(self) -> Iterator[tuple[Ints, Floats]]:
        return map(self._results_of, self._blocks)

    def distinct(self, most: int) -> list[bytes] | None:
        """The distinct rows (as bytes) in the order in which they come first; None where they are more than `most`."""
        found: dict[bytes, None] = {}
        for block in self._blocks:
            found |= dict.fromkeys(distinct_rows(self._read(block)).dictionary.to_pylist())
            if len(found) > most:
                return None
        return list(found)

    def match(self, keys: Sequence[bytes]) -> None:
        """Put every row into the group of the row that is equal, without a search."""
        places = {key: place for place, key in enumerate(keys)}
        for block in self._blocks:
            encoded = distinct_rows(self._read(block))
            codes = np.array([places[key] for key in encoded.dictionary.to_pylist()], np.int32)
            self._labels.write(block.start, codes[encoded.indices.to_numpy()])

    def sizes(self, num_clusters: int) -> NDArray[np.int64]:
        """Rows in each group, shape (K,)."""
        return np.asarray(sum(np.bincount(self._labels_of(block), minlength=num_clusters) for block in self._blocks))

    def _read(self, block: slice) -> Floats:
        return self._features.read(block.start, block.stop).reshape(-1, self.shape[1])

    def _labels_of(self, block: slice) -> Ints:
        return self._labels.read(block.start, block.stop)

    def _results_of(self, block: slice) -> tuple[Ints, Floats]:
        """Labels and gaps (after `finish`: distances) of a block."""
        return self._labels_of(block), self._gaps.read(block.start, block.stop)


def distinct_rows(features_NF: Floats) -> Any:
    """Rows as a dictionary-encoded column of their bytes: hashing takes a tenth of the time of np.unique."""
    num_rows, width = features_NF.shape
    buffers = [None, pa.py_buffer(np.ascontiguousarray(features_NF))]
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(4 * width), num_rows, buffers).dictionary_encode()
