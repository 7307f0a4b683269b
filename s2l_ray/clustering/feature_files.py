"""The features of rows, made from the files of a ranged store: by whoever holds the rows, again as often as it must."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from s2l_ray.clustering.columns import Floats, rows_by_code
from s2l_ray.clustering.features import Features, Measured
from s2l_ray.trajectories.ranged_store import RangedStore

Interval = tuple[int, int]
"""Numbers of rows of a stratum, from the first up to (not with) the second."""


@dataclass(frozen=True, eq=False)
class FeatureFiles:
    """Makes features of the rows of a store; cheap to send to a worker."""

    store: RangedStore
    measured: Measured
    features: Features
    by: str | None
    """The column stratified by."""

    starts_BS: NDArray[np.int64]
    """For each block of the store, and last for its end, how many rows of each stratum come before."""

    def read(self, intervals: Mapping[int, Interval]) -> dict[int, Floats]:
        """The features of some rows of some strata: one pass over the blocks that have any."""
        width = self.features.num_features
        found = {stratum: np.empty((stop - start, width), np.float32) for stratum, (start, stop) in intervals.items()}
        for stratum, number, rows_MF in self._rows(intervals):
            start, stop = intervals[stratum]
            low, high = max(start - number, 0), min(stop - number, len(rows_MF))
            if low < high:
                found[stratum][number + low - start : number + high - start] = rows_MF[low:high]
        return found

    def take(self, stratum: int, numbers: NDArray[np.int64]) -> Floats:
        """The features of some rows of a stratum, by their ascending numbers."""
        pieces = [np.empty((0, self.features.num_features), np.float32)]
        if len(numbers):
            for _, number, rows_MF in self._rows({stratum: (int(numbers[0]), int(numbers[-1]) + 1)}):
                first, last = np.searchsorted(numbers, [number, number + len(rows_MF)])
                pieces.append(rows_MF[numbers[first:last] - number])
        return np.concatenate(pieces)

    def _rows(self, intervals: Mapping[int, Interval]) -> Iterator[tuple[int, int, Floats]]:
        """Of all blocks that have some of these rows: the stratum, the number of its first row there, and all its rows."""
        needed = np.zeros(len(self.starts_BS) - 1, bool)
        for stratum, (start, stop) in intervals.items():
            needed |= (self.starts_BS[:-1, stratum] < stop) & (self.starts_BS[1:, stratum] > start)
        columns = (*self.measured.columns, *([] if self.by is None else [self.by]))
        for number in np.flatnonzero(needed).tolist():
            block = self.store.block(number, *columns)
            for stratum, rows in self.strata_of(block):
                if stratum in intervals:
                    rows_MF = self.features(self.measured(block if rows is None else block.take(pa.array(rows))))
                    yield stratum, int(self.starts_BS[number, stratum]), rows_MF

    def strata_of(self, block: pa.Table) -> Iterator[tuple[int, NDArray[np.int64] | None]]:
        """The strata of a block and the rows of each; None for all."""
        if self.by is None:
            yield 0, None
        else:
            yield from rows_by_code(self.store.codes(block, self.by))
