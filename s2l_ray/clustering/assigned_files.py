"""The group of every row in files that all workers see: what the actors of k-means leave, and what passes over rows read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from s2l_ray.clustering.columns import Floats, Ints, rows_by_code
from s2l_ray.clustering.feature_files import Interval
from s2l_ray.storage.places import Storage
from s2l_ray.trajectories.ranged_store import RangedStore

Result = TypeVar("Result")


@dataclass(frozen=True)
class SavedResults:
    """The group and the distance of every row of a stratum, in files that all workers see."""

    place: Storage
    files: tuple[tuple[Interval, str], ...]
    """In the order of the rows."""

    def read(self, start: int, stop: int) -> tuple[Ints, Floats]:
        """Those of the rows from `start` up to `stop`."""
        labels, distances = [np.empty(0, np.int32)], [np.empty(0, np.float32)]
        for (first, end), name in self.files:
            low, high = max(start, first) - first, min(stop, end) - first
            if low < high:
                with self.place.explained(name), self.place.open(name) as file:
                    for found, offset in ((labels, low), (distances, end - first + low)):
                        file.seek(4 * offset)
                        found.append(np.frombuffer(file.read(4 * (high - low)), found[0].dtype))
        return np.concatenate(labels), np.concatenate(distances)


@dataclass(frozen=True, eq=False)
class AssignedFiles:
    """The group and the distance of every row of a store, with the groups' canonical numbers."""

    store: RangedStore
    by: str | None
    """The column stratified by."""

    saved: tuple[SavedResults, ...]
    """Of each stratum."""

    numbers: tuple[Ints, ...]
    """The number of each group of a stratum's fit."""

    starts_BS: NDArray[np.int64]
    """For each block of the store, and last for its end, how many rows of each stratum come before."""

    def of(self, first: int, blocks: Sequence[pa.Table]) -> Iterator[tuple[pa.Table, Ints, Floats]]:
        """Blocks that follow each other, `first` being the first's number, with the groups of the rows and their distances."""
        begin_S, end_S = self.starts_BS[first], self.starts_BS[first + len(blocks)]
        found = {
            stratum: self.saved[stratum].read(int(begin_S[stratum]), int(end_S[stratum]))
            for stratum in np.flatnonzero(end_S > begin_S).tolist()
        }
        for number, block in enumerate(blocks, first):
            codes_M = np.zeros(len(block), np.int32) if self.by is None else self.store.codes(block, self.by)
            labels_M, distances_M = np.empty(len(block), np.int32), np.empty(len(block), np.float32)
            for stratum, rows in rows_by_code(codes_M):
                start = self.starts_BS[number, stratum] - begin_S[stratum]
                fitted_M, distances_M[rows] = (values[start : start + len(rows)] for values in found[stratum])
                labels_M[rows] = self.numbers[stratum][fitted_M]
            yield block, labels_M, distances_M


def each_assigned(
    files: AssignedFiles, function: Callable[[pa.Table, Ints, Floats], Result], first: int, blocks: list[pa.Table]
) -> list[Result]:
    """What a function returns for each of some blocks, their groups and distances."""
    return [function(*one) for one in files.of(first, blocks)]
