"""The rows of k-means in Ray actors: each holds contiguous blocks, and only centroids and sums travel."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from s2l_ray.clustering.bounds import Search
from s2l_ray.clustering.columns import Column, Floats, Ints, MemoryColumn
from s2l_ray.clustering.kmeans import Step
from s2l_ray.clustering.local_rows import LocalRows
from s2l_ray.clustering.threads import SearchThreads
from s2l_ray.trajectories.store import BLOCK_ROWS


class RowsActor:
    """Holds contiguous blocks of rows of one or several k-means, in its own memory."""

    def __init__(self) -> None:
        self._pool = SearchThreads(1)
        self._waiting: dict[str, list[Floats]] = {}
        self._rows: dict[str, LocalRows] = {}

    def add(self, name: str, features_MF: Floats) -> None:
        """Take the next block of a k-means."""
        self._waiting.setdefault(name, []).append(features_MF)

    def ready(self, name: str) -> None:
        """All blocks of a k-means are there."""
        features_MF = np.concatenate(self._waiting.pop(name))
        self._rows[name] = LocalRows(MemoryColumn(features_MF), features_MF.shape[1], self._pool)

    def call(self, name: str, method: str, *arguments: Any) -> Any:
        """What a method of `LocalRows` returns for this actor's rows."""
        return getattr(self._rows[name], method)(*arguments)


class RayRows:
    """`KMeansRows` in Ray actors."""

    _names = itertools.count()

    def __init__(self, features: Column, width: int, actors: list[Any]) -> None:
        import ray

        self.shape = (len(features), width)
        self._name = f"rows-{next(self._names)}"
        starts = range(0, len(features), BLOCK_ROWS)
        each = math.ceil(len(starts) / len(actors))
        self._actors = actors[: math.ceil(len(starts) / each)]
        waiting: list[Any] = []
        for number, start in enumerate(starts):
            block_MF = features.read(start, start + BLOCK_ROWS).reshape(-1, width)
            waiting.append(self._actors[number // each].add.remote(self._name, block_MF))
            if len(waiting) > 2 * len(actors):
                ray.get(waiting.pop(0))
        ray.get(waiting)
        ray.get([actor.ready.remote(self._name) for actor in self._actors])

    def centroids_moved(self, moved_K: NDArray[np.float64]) -> int:
        return sum(self._call("centroids_moved", moved_K))

    def assign(self, centroids_KF: Floats, search: Search) -> Step:
        return Step.sum(self._call("assign", centroids_KF, search))

    def farthest(self, centroids_KF: Floats, seed_F: Floats | None) -> tuple[float, Floats]:
        found: list[tuple[float, Floats]] = self._call("farthest", centroids_KF, seed_F)
        return max(found, key=lambda one: one[0])

    def finish(self, centroids_KF: Floats) -> float:
        return math.fsum(itertools.chain(*self._call("finish_blocks", centroids_KF)))

    def results(self) -> Iterator[tuple[Ints, Floats]]:
        import ray

        for actor in self._actors:
            for number in itertools.count():
                block = ray.get(actor.call.remote(self._name, "block", number))
                if block is None:
                    break
                yield block

    def _call(self, method: str, *arguments: Any) -> list[Any]:
        import ray

        return list(ray.get([actor.call.remote(self._name, method, *arguments) for actor in self._actors]))
