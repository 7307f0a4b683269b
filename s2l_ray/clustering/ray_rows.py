"""The rows of k-means in Ray actors, which make them from files: only centroids, sums, and rows of samples travel."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from s2l_ray.clustering.actors import Actors
from s2l_ray.clustering.assigned_files import SavedResults
from s2l_ray.clustering.bounds import Search
from s2l_ray.clustering.columns import Floats, Ints
from s2l_ray.clustering.engines import Engine
from s2l_ray.clustering.feature_files import FeatureFiles, Interval
from s2l_ray.clustering.kmeans import Fit, KMeansRows, Step, lowest_rows, plus_plus
from s2l_ray.clustering.slot import Operation
from s2l_ray.clustering.strata import Restarts, SampledStratum, restart
from s2l_ray.config import ClusteringConfig
from s2l_ray.storage.places import Storage
from s2l_ray.trajectories.store import BLOCK_ROWS


class RayRows:
    """`KMeansRows` in the slots of actors."""

    _numbers = itertools.count()

    def __init__(self, actors: Actors, stratum: int, parts: Sequence[tuple[int, Interval]], width: int, place: Storage) -> None:
        """`parts`: slots, and the rows that are theirs, in the order of the rows."""
        self.shape = (parts[-1][1][1], width)
        self.name = f"rows-{next(self._numbers)}"
        self._actors, self._stratum, self._place = actors, stratum, place
        self._slots = [slot for slot, _ in parts]
        self.saved = SavedResults(place, tuple((rows, f"{self.name}-{slot:05d}") for slot, rows in parts))

    def open(self, operations: Sequence[Operation]) -> None:
        """Begin with what is to be done in each slot."""
        self._actors.call(self._slots, operations, self._stratum)

    def centroids_moved(self, drift_K: NDArray[np.float64]) -> int:
        return sum(self._change("centroids_moved", drift_K))

    def assign(self, centroids_KF: Floats, search: Search) -> Step:
        return Step.sum(self._change("assign", centroids_KF, search))

    def farthest(self, centroids_KF: Floats, seed_F: Floats | None) -> tuple[float, Floats]:
        found: list[tuple[float, Floats]] = self._change("farthest", centroids_KF, seed_F)
        return max(found, key=lambda one: one[0])

    def finish(self, centroids_KF: Floats) -> float:
        names = [name for _, name in self.saved.files]
        operations: list[Operation] = [("finish", (self.name, centroids_KF, self._place, name)) for name in names]
        return math.fsum(itertools.chain(*self._actors.call(self._slots, operations)))

    def results(self) -> Iterator[tuple[Ints, Floats]]:
        for start in range(0, self.shape[0], BLOCK_ROWS):
            yield self.saved.read(start, min(start + BLOCK_ROWS, self.shape[0]))

    def distinct(self, most: int) -> list[bytes] | None:
        """See `LocalRows`."""
        found: dict[bytes, None] = {}
        for keys in self._ask("distinct", most):
            if keys is None or len(found | dict.fromkeys(keys)) > most:
                return None
            found |= dict.fromkeys(keys)
        return list(found)

    def match(self, keys: Sequence[bytes]) -> None:
        """See `LocalRows`."""
        self._change("match", keys)

    def sizes(self, num_clusters: int) -> NDArray[np.int64]:
        """See `LocalRows`."""
        return np.asarray(sum(self._ask("sizes", num_clusters)))

    def _change(self, method: str, *arguments: Any) -> list[Any]:
        operation: Operation = ("call", (self.name, method, *arguments))
        return self._actors.call(self._slots, [operation] * len(self._slots), self._stratum)

    def _ask(self, method: str, *arguments: Any) -> list[Any]:
        operation: Operation = ("call", (self.name, method, *arguments))
        return self._actors.call(self._slots, [operation] * len(self._slots))


class RemoteStratum(SampledStratum):
    """The rows of a stratum in actors."""

    def __init__(self, number: int, name: str, num_rows: int, width: int, config: ClusteringConfig, engine: Engine) -> None:
        super().__init__(name, num_rows, width, config)
        assert engine.shared is not None
        self._number, self._actors, self._place = number, engine.actors, engine.shared
        self._center_F = np.zeros(width, np.float32)
        self.parts = _shared_out(num_rows, len(self._actors), number)
        """Slots, and the rows that are theirs, in the order of the rows."""

        self._names: list[str] = []

    def take(self, numbers: NDArray[np.int64]) -> Floats:
        parts = [(slot, numbers[slice(*np.searchsorted(numbers, interval))]) for slot, interval in self.parts]
        wanted = [(slot, some) for slot, some in parts if len(some)]
        operations: list[Operation] = [("take", (self._number, some)) for _, some in wanted]
        found = self._actors.call([slot for slot, _ in wanted], operations)
        return np.concatenate([np.empty((0, self.width), np.float32), *found])

    def subtract(self, center_F: Floats) -> None:
        self._center_F = center_F
        slots = [slot for slot, _ in self.parts]
        self._actors.call(slots, [("subtract", (self._number, center_F))] * len(slots), self._number)

    def start(self, seeding_SF: Floats, num_clusters: int, seed: int) -> Floats:
        [found] = self._actors.run(_plus_plus, [(seeding_SF, num_clusters, seed)])
        return np.asarray(found)

    def far(self, centroids_KF: Floats, num_wanted: int, seed: np.uint64) -> Floats:
        slots = [slot for slot, _ in self.parts]
        operation: Operation = ("far", (self._number, centroids_KF, num_wanted, seed))
        return lowest_rows(self._actors.call(slots, [operation] * len(slots)), num_wanted)[1]

    def restarts(
        self, sample_SF: Floats, seeding_SF: Floats, seeds: Sequence[int], restarts: Restarts
    ) -> list[tuple[Fit, Ints]]:
        found = self._actors.run(_restart, [(sample_SF, seeding_SF, seed, restarts) for seed in seeds])
        return list(found)

    def all_rows(self) -> RayRows:
        rows = RayRows(self._actors, self._number, self.parts, self.width, self._place)
        rows.open([("open", (self._number, rows.name))] * len(self.parts))
        self._names.append(rows.name)
        return rows

    def matched_rows(self) -> RayRows:
        return self.all_rows()

    def some_rows(self, numbers: NDArray[np.int64]) -> RayRows:
        parts = _shared_out(len(numbers), len(self._actors), self._number)
        rows = RayRows(self._actors, self._number, parts, self.width, self._place)
        rows.open([("open_some", (self._number, rows.name, numbers[start:stop], self._center_F)) for _, (start, stop) in parts])
        self._names.append(rows.name)
        return rows

    def done(self, rows: KMeansRows) -> KMeansRows:
        self._actors.forget(self._number, self._names)
        return rows


def load(actors: Actors, files: FeatureFiles, strata: Sequence[RemoteStratum]) -> None:
    """Have the actors make the features of all strata's rows."""
    intervals: list[dict[int, Interval]] = [{} for _ in range(len(actors))]
    for number, stratum in enumerate(strata):
        for slot, rows in stratum.parts:
            intervals[slot][number] = rows
    actors.load(files, intervals)


def _shared_out(num_rows: int, num_slots: int, stratum: int) -> list[tuple[int, Interval]]:
    """Whole blocks for as many slots as there are blocks; the first slot is another for every stratum."""
    num_blocks = math.ceil(num_rows / BLOCK_ROWS)
    each = BLOCK_ROWS * math.ceil(num_blocks / num_slots)
    starts = range(0, num_rows, each)
    return [((place + stratum) % num_slots, (start, min(start + each, num_rows))) for place, start in enumerate(starts)]


def _plus_plus(seeding_SF: Floats, num_clusters: int, seed: int, pool: Any) -> Floats:
    return np.asarray(pool.submit(partial(plus_plus, seeding_SF, num_clusters, seed)).result())


def _restart(sample_SF: Floats, seeding_SF: Floats, seed: int, restarts: Restarts, pool: Any) -> tuple[Fit, Ints]:
    return restart(sample_SF, _plus_plus(seeding_SF, restarts.num_clusters, seed, pool), restarts, pool)
