"""Canonical numbers of the groups, and with them the group of every row.

Strata are in the order of their names; within a stratum groups ascend by mean loss, equal ones by their points. Groups without
rows have no number.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from s2l_ray.clustering.assigned_files import AssignedFiles, each_assigned
from s2l_ray.clustering.columns import Floats, Ints, rows_by_code
from s2l_ray.clustering.features import on_grid
from s2l_ray.clustering.kmeans import group_sums
from s2l_ray.clustering.ray_rows import RayRows
from s2l_ray.clustering.strata import FittedStratum
from s2l_ray.trajectories.loss_columns import losses_matrix
from s2l_ray.trajectories.ranged_store import RangedStore
from s2l_ray.trajectories.store import TrajectoryStore

Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class Numbering:
    """The strata's groups in one order, and the store whose rows they have."""

    store: TrajectoryStore
    by: str | None
    """The column stratified by."""

    strata: Sequence[FittedStratum]
    orders: Sequence[NDArray[np.int64]]
    """For each stratum, the groups of its fit that have rows, in their order."""

    starts_BS: NDArray[np.int64]
    """For each block of the store, and last for its end, how many rows of each stratum come before."""

    @classmethod
    def canonical(
        cls,
        store: TrajectoryStore,
        by: str | None,
        strata: Sequence[FittedStratum],
        center_T: Floats | None,
        starts_BS: NDArray[np.int64],
    ) -> tuple[Numbering, Floats]:
        """The numbering, and the groups' centroids in nats in its order, shape (K, T).

        `center_T`: what was subtracted from the losses; None where k-means saw other features than these, or not all points:
        then centroids are mean losses, which takes a pass over the rows.
        """
        as_fitted = cls(store, by, strata, [stratum.filled for stratum in strata], starts_BS)
        if center_T is not None:
            levels = [
                (s.fit.centroids_KF[s.filled] + (center_T.astype(np.float64) + s.center_F)).astype(np.float32) for s in strata
            ]
        else:
            levels = np.split(as_fitted.mean_losses(), as_fitted.firsts[1:])
        # The mean first, then the points from the first to the last.
        sorted_K = [np.lexsort((*level_KT.T[::-1], level_KT.mean(axis=1, dtype=np.float64))) for level_KT in levels]
        orders = [filled[order] for filled, order in zip(as_fitted.orders, sorted_K, strict=True)]
        centroids = [level_KT[order] for level_KT, order in zip(levels, sorted_K, strict=True)]
        return cls(store, by, strata, orders, starts_BS), np.concatenate(centroids)

    @property
    def num_clusters(self) -> int:
        """K, over all strata."""
        return sum(map(len, self.orders))

    @property
    def firsts(self) -> NDArray[np.int64]:
        """The number of the first group of each stratum."""
        return np.cumsum([0, *map(len, self.orders[:-1])])

    def blocks(self, *columns: str) -> Iterator[tuple[pa.Table, Ints, Floats]]:
        """Blocks of the store (its ids and these columns) with the group of each row and its distance to the centroid."""
        numbers = [self._numbers_of(stratum) for stratum in range(len(self.strata))]
        results = [_Results(stratum.rows.results()) for stratum in self.strata]
        wanted = ("example_id", *columns, *([self.by] if self.by is not None else []))
        for block in self.store.blocks(*dict.fromkeys(wanted)):
            codes_M = np.zeros(len(block), np.int32) if self.by is None else self.store.codes(block, self.by)
            labels_M, distances_M = np.empty(len(block), np.int32), np.empty(len(block), np.float32)
            for stratum, rows in rows_by_code(codes_M):
                fitted_labels, distances_M[rows] = results[stratum].take(len(rows))
                labels_M[rows] = numbers[stratum][fitted_labels]
            yield block, labels_M, distances_M

    def each(self, function: Callable[[pa.Table, Ints, Floats], Result], *columns: str) -> Iterator[Result]:
        """What a function returns for each of these blocks, wherever they are."""
        files = self.files()
        if files is None:
            yield from itertools.starmap(function, self.blocks(*columns))
        else:
            wanted = (*columns, *([] if self.by is None else [self.by]))
            for found in files.store.each_stretch(partial(each_assigned, files, function), wanted):
                yield from found

    def files(self) -> AssignedFiles | None:
        """The groups of all rows in files that all workers see; None where they are in this process."""
        if not isinstance(self.store, RangedStore):
            return None
        saved = tuple(stratum.rows.saved for stratum in self.strata if isinstance(stratum.rows, RayRows))
        numbers = tuple(self._numbers_of(stratum) for stratum in range(len(self.strata)))
        return AssignedFiles(replace(self.store, measurements={}, lowest=None), self.by, saved, numbers, self.starts_BS)

    def mean_losses(self) -> Floats:
        """Mean losses of each group in nats, shape (K, T): a pass over the losses."""
        num_clusters = self.num_clusters

        def one_block(block: pa.Table, labels_M: Ints, _distances_M: Floats) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
            sums_KT = group_sums(labels_M, on_grid(losses_matrix(block)), num_clusters)
            return sums_KT, np.bincount(labels_M, minlength=num_clusters)

        sums_KT, sizes_K = np.zeros((num_clusters, self.store.num_points)), np.zeros(num_clusters, np.int64)
        for of_block_KT, of_block_K in self.each(one_block, "losses"):
            sums_KT += of_block_KT
            sizes_K += of_block_K
        return (sums_KT / sizes_K[:, None]).astype(np.float32)

    def _numbers_of(self, stratum: int) -> Ints:
        """The number of each group of a stratum's fit, -1 where it has no rows."""
        numbers_K = np.full(len(self.strata[stratum].fit.sizes_K), -1, np.int32)
        numbers_K[self.orders[stratum]] = np.arange(len(self.orders[stratum])) + self.firsts[stratum]
        return numbers_K


class _Results:
    """Takes any number of rows from blocks of labels and distances."""

    def __init__(self, blocks: Iterator[tuple[Ints, Floats]]) -> None:
        self._blocks = blocks
        self._labels, self._distances = np.empty(0, np.int32), np.empty(0, np.float32)

    def take(self, count: int) -> tuple[Ints, Floats]:
        labels, distances = [self._labels], [self._distances]
        have = len(self._labels)
        while have < count:
            more_labels, more_distances = next(self._blocks)
            labels.append(more_labels)
            distances.append(more_distances)
            have += len(more_labels)
        all_labels = labels[-1] if have == len(labels[-1]) else np.concatenate(labels)
        all_distances = distances[-1] if have == len(distances[-1]) else np.concatenate(distances)
        self._labels, self._distances = all_labels[count:], all_distances[count:]
        return all_labels[:count], all_distances[:count]
