"""What a Ray actor holds of k-means: contiguous rows of every stratum, read from files, and what was done with them.

A slot is a fold over its operations: the same ones in the same order give the same bytes, so that a lost slot is made again by
its log.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from s2l_ray.clustering.columns import Floats, MemoryColumn
from s2l_ray.clustering.feature_files import FeatureFiles, Interval
from s2l_ray.clustering.kmeans import FarRows, far_candidates
from s2l_ray.clustering.local_rows import LocalRows
from s2l_ray.clustering.threads import SearchThreads
from s2l_ray.errors import cause_of
from s2l_ray.runtime.passes import report
from s2l_ray.storage.places import Storage

Operation = tuple[str, tuple[Any, ...]]
"""The name of a method of `Slot` and its arguments."""


class Slot:
    """Rows of some strata, contiguous in each."""

    def __init__(self, pool: SearchThreads, source: FeatureFiles) -> None:
        self._pool, self._source = pool, source
        self._first: dict[int, int] = {}
        self._features: dict[int, Floats] = {}
        self._rows: dict[str, LocalRows] = {}

    def load(self, intervals: Mapping[int, Interval]) -> None:
        """Make the features of these rows."""
        self._features = self._source.read(intervals)
        self._first = {stratum: start for stratum, (start, _) in intervals.items()}

    def num_rows(self) -> int:
        """Rows of all strata together."""
        return sum(map(len, self._features.values()))

    def subtract(self, stratum: int, center_F: Floats) -> None:
        """Move the origin of a stratum's rows."""
        self._features[stratum] -= center_F

    def take(self, stratum: int, numbers: NDArray[np.int64]) -> Floats:
        """Some of the rows, by their numbers in the stratum."""
        return self._features[stratum][numbers - self._first[stratum]]

    def far(self, stratum: int, centroids_KF: Floats, num_wanted: int, seed: np.uint64) -> FarRows:
        """See `far_candidates`."""
        column = MemoryColumn(self._features[stratum])
        return far_candidates(column, centroids_KF, num_wanted, seed, self._pool, self._first[stratum])

    def open(self, stratum: int, name: str) -> None:
        """Begin a k-means of all rows of a stratum."""
        self._rows[name] = self._local(self._features[stratum])

    def open_some(self, stratum: int, name: str, numbers: NDArray[np.int64], center_F: Floats) -> None:
        """Begin a k-means of some rows of a stratum, whoever holds them."""
        self._rows[name] = self._local(self._source.take(stratum, numbers) - center_F)

    def _local(self, features_NF: Floats) -> LocalRows:
        return LocalRows(MemoryColumn(features_NF), features_NF.shape[1], self._pool)

    def call(self, name: str, method: str, *arguments: Any) -> Any:
        """What a method of `LocalRows` returns for these rows."""
        return getattr(self._rows[name], method)(*arguments)

    def finish(self, name: str, centroids_KF: Floats, place: Storage, file: str) -> list[float]:
        """The inertia of each block; a file gets the group of each row (int32), and after these its distance (float32)."""
        inertia = self._rows[name].finish_blocks(centroids_KF)
        labels, distances = zip(*self._rows[name].results(), strict=True)
        with place.atomic_path(file, is_scratch=True) as path, path.open("wb") as opened:
            for array in (*labels, *distances):
                opened.write(np.ascontiguousarray(array).data)
        return inertia

    def close(self, stratum: int, names: list[str]) -> None:
        """Forget a stratum."""
        self._features.pop(stratum, None)
        for name in names:
            self._rows.pop(name, None)


@dataclass(frozen=True)
class Done:
    """What an actor returns: a value, or a user's mistake."""

    mistake: dict[str, str]
    value: Any = None


class SlotsActor:
    """A process with one slot or, where others were lost, several."""

    def __init__(self) -> None:
        self._pool = SearchThreads(1)
        self._slots: dict[int, Slot] = {}

    def ready(self) -> None:
        """Returns when the process is up."""

    def do(self, number: int, operations: list[Operation], source: FeatureFiles | None = None) -> Done:
        """Do some operations with a slot, made anew from a source where one is given; what the last returns."""
        try:
            if source is not None:
                self._slots[number] = Slot(self._pool, source)
            value = None
            for method, arguments in operations:
                value = getattr(self._slots[number], method)(*arguments)
            return Done(report(None), value)
        except Exception as met:
            error = cause_of(met)
            if error is None:
                raise
            return Done(report(error))

    def run(self, function: Any, arguments: Sequence[tuple[Any, ...]], number: int) -> Any:
        """What a function returns for one of some arguments, and the threads of this process."""
        return function(*arguments[number], self._pool)
