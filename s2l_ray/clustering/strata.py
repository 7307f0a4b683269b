"""The groups of one stratum: a sample of its rows, restarts on the sample, then Lloyd's iterations over all rows.

How the groups stay good (METHOD, "k-means facts"): k-means++ and restarts on the 1,024 K rows of lowest priority and 64 K
rows more that lie far from the groups of these, sampled from all rows by their squared distances (k-means||, Bahmani et al.,
2012): ten rows among millions are in no sample, and may be a group. The winner then gets full Lloyd iterations over all
rows, and a group that loses its last row is seeded again.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from s2l_ray.clustering.columns import Floats, Ints, MemoryColumn
from s2l_ray.clustering.engines import Engine
from s2l_ray.clustering.features import on_grid
from s2l_ray.clustering.kmeans import Fit, KMeansRows, far_candidates, lloyd, plus_plus
from s2l_ray.clustering.local_rows import LocalRows, distinct_rows
from s2l_ray.clustering.threads import SearchThreads
from s2l_ray.config import ClusteringConfig
from s2l_ray.examples.ids import priorities, priority_cut
from s2l_ray.progress import get_log
from s2l_ray.runtime.process import give_back_freed_memory
from s2l_ray.trajectories.store import BLOCK_ROWS

SAMPLE_ROWS_PER_CLUSTER = 1_024
FAR_ROWS_PER_CLUSTER = 64
# k-means++ takes time with rows times groups: for many groups it is given a part of the sample.
SEEDING_ROWS = 131_072
_log = get_log("clustering")


def lowest(priorities_M: NDArray[np.uint64], num_wanted: int) -> NDArray[np.int64]:
    """The rows of lowest priority, ascending; of equal priorities the first. At most `num_wanted`."""
    return np.sort(np.argsort(priorities_M, kind="stable")[:num_wanted])


@dataclass(frozen=True)
class Picked:
    """Of some rows of a stratum that follow each other, which may be in a sample."""

    num_rows: int
    low: NDArray[np.int64]
    """Those below the stratum's cut, by their places among these rows."""

    priorities_L: NDArray[np.uint64]
    """Theirs."""

    diagnostic: NDArray[np.int64]
    """The places of those on which the stability of the subset is measured."""

    ids: pa.Array
    """Theirs."""

    @classmethod
    def of(cls, priorities_M: NDArray[np.uint64], ids: pa.Array, cut: np.uint64 | None, diagnostic_cut: np.uint64) -> Picked:
        """Those of a priority up to the cuts; with None for a cut none is looked for."""
        low = np.flatnonzero(priorities_M <= cut) if cut is not None else np.zeros(0, np.int64)
        rows = np.flatnonzero(priorities_M <= diagnostic_cut)
        return cls(len(priorities_M), low, priorities_M[low], rows, ids.take(pa.array(rows)))


@dataclass(frozen=True)
class Restarts:
    """How the restarts of a stratum run."""

    num_clusters: int
    num_iterations: int
    tolerance: float
    """Sum of the squared moves of all centroids, in squared units of the features, that ends one."""


class MatchableRows(KMeansRows, Protocol):
    """Rows that may be put into groups without a search."""

    def distinct(self, most: int) -> list[bytes] | None:
        """The distinct rows (as bytes) in the order in which they come first; None where they are more than `most`."""

    def match(self, keys: Sequence[bytes]) -> None:
        """Put every row into the group of the row that is equal."""

    def sizes(self, num_clusters: int) -> NDArray[np.int64]:
        """Rows in each group, shape (K,)."""


class SampledStratum(ABC):
    """The rows of a stratum, wherever they are, and which of them are its sample."""

    def __init__(self, name: str, num_rows: int, width: int, config: ClusteringConfig) -> None:
        self.name, self.num_rows, self.width = name, num_rows, width
        self.num_training = min(num_rows, config.training_rows or num_rows)
        self.num_sampled = min(self.num_training, SAMPLE_ROWS_PER_CLUSTER * config.num_clusters)
        # Rows to be found by their priorities: those trained on where that is not all of them, else the sample.
        num_low = self.num_training if self.num_training < num_rows else self.num_sampled
        self.cut = np.uint64(priority_cut(num_low, num_rows)) if num_low < num_rows else None
        """The priority below which the sample lies; None where it is all rows."""

        self._num_noted = 0
        self._low: list[tuple[NDArray[np.int64], NDArray[np.uint64]]] = []
        """Numbers and priorities of the rows below the cut."""
        self.diagnostic_rows: list[tuple[NDArray[np.int64], pa.Array]] = []
        """Numbers and ids of the rows on which the stability of the subset is measured."""

    def note(self, picked: Picked) -> None:
        """Take the samples of the next rows in order of ids."""
        if self.cut is not None:
            self._low.append((picked.low + self._num_noted, picked.priorities_L))
        self.diagnostic_rows.append((picked.diagnostic + self._num_noted, picked.ids))
        self._num_noted += picked.num_rows

    def sample(self) -> tuple[NDArray[np.int64], NDArray[np.int64] | None]:
        """Numbers of the rows for the restarts and, where these are not all there are, of those to train on; ascending."""
        if self.cut is None:
            return np.arange(self.num_rows), None
        numbers, order = (np.concatenate(found) for found in zip(*self._low, strict=True))
        self._low.clear()
        training = numbers[lowest(order, self.num_training)] if self.num_training < self.num_rows else None
        return numbers[lowest(order, self.num_sampled)], training

    @abstractmethod
    def take(self, numbers: NDArray[np.int64]) -> Floats:
        """Some rows by number, ascending, shape (len(numbers), F)."""

    @abstractmethod
    def subtract(self, center_F: Floats) -> None:
        """Move the origin of all rows."""

    @abstractmethod
    def start(self, seeding_SF: Floats, num_clusters: int, seed: int) -> Floats:
        """See `plus_plus`."""

    @abstractmethod
    def far(self, centroids_KF: Floats, num_wanted: int, seed: np.uint64) -> Floats:
        """See `far_candidates`."""

    @abstractmethod
    def restarts(
        self, sample_SF: Floats, seeding_SF: Floats, seeds: Sequence[int], restarts: Restarts
    ) -> list[tuple[Fit, Ints]]:
        """For each seed the fit of a sample, and the groups of its rows."""

    @abstractmethod
    def all_rows(self) -> KMeansRows:
        """All rows, ready for `lloyd`."""

    @abstractmethod
    def matched_rows(self) -> MatchableRows:
        """All rows, to be put into groups without a search."""

    @abstractmethod
    def some_rows(self, numbers: NDArray[np.int64]) -> KMeansRows:
        """Some rows by number, ascending, ready for `lloyd`."""

    @abstractmethod
    def done(self, rows: KMeansRows) -> KMeansRows:
        """Nothing but the results of these rows is needed any more."""


class StratumRows(SampledStratum):
    """The features of a stratum's rows in the columns of an engine."""

    def __init__(self, name: str, num_rows: int, width: int, config: ClusteringConfig, engine: Engine) -> None:
        super().__init__(name, num_rows, width, config)
        self._engine = engine
        self._features = engine.new_column(num_rows, width, np.float32)

    def add(self, features_MF: Floats, picked: Picked) -> None:
        """Take the next rows in order of ids."""
        self._features.write(self._num_noted, features_MF)
        self.note(picked)

    def take(self, numbers: NDArray[np.int64]) -> Floats:
        pieces = [np.empty((0, self.width), np.float32)]
        for start in range(0, self.num_rows, BLOCK_ROWS):
            first, last = np.searchsorted(numbers, [start, start + BLOCK_ROWS])
            if first < last:
                pieces.append(self._read(start)[numbers[first:last] - start])
        return np.concatenate(pieces)

    def subtract(self, center_F: Floats) -> None:
        for start in range(0, self.num_rows, BLOCK_ROWS):
            self._features.write(start, self._read(start) - center_F)

    def start(self, seeding_SF: Floats, num_clusters: int, seed: int) -> Floats:
        return self._engine.pool.submit(plus_plus, seeding_SF, num_clusters, seed).result()

    def far(self, centroids_KF: Floats, num_wanted: int, seed: np.uint64) -> Floats:
        return far_candidates(self._features, centroids_KF, num_wanted, seed, self._engine.pool)[1]

    def restarts(
        self, sample_SF: Floats, seeding_SF: Floats, seeds: Sequence[int], restarts: Restarts
    ) -> list[tuple[Fit, Ints]]:
        pool = self._engine.pool
        starts = pool.map(lambda seed: plus_plus(seeding_SF, restarts.num_clusters, seed), seeds)
        return [restart(sample_SF, start_KF, restarts, pool) for start_KF in starts]

    def all_rows(self) -> KMeansRows:
        return self._engine.rows(self._features, self.width)

    def matched_rows(self) -> MatchableRows:
        return LocalRows(self._features, self.width, self._engine.pool, self._engine.new_column)

    def some_rows(self, numbers: NDArray[np.int64]) -> KMeansRows:
        column = self._engine.new_column(len(numbers), self.width, np.float32)
        for start in range(0, len(numbers), BLOCK_ROWS):
            column.write(start, self.take(numbers[start : start + BLOCK_ROWS]))
        return self._engine.rows(column, self.width)

    def done(self, rows: KMeansRows) -> KMeansRows:
        return rows

    def _read(self, start: int) -> Floats:
        return self._features.read(start, start + BLOCK_ROWS).reshape(-1, self.width)


def restart(sample_SF: Floats, start_KF: Floats, restarts: Restarts, pool: SearchThreads) -> tuple[Fit, Ints]:
    """The fit of a sample from given centroids, and the groups of its rows."""
    rows = LocalRows(MemoryColumn(sample_SF), sample_SF.shape[1], pool)
    fit = lloyd(rows, start_KF, restarts.num_iterations, restarts.tolerance)
    return fit, np.concatenate([labels_M for labels_M, _ in rows.results()])


@dataclass(frozen=True, eq=False)
class FittedStratum:
    """The groups of a stratum, numbered as k-means did; some may have stayed empty."""

    source: SampledStratum
    center_F: Floats
    """What was subtracted from its rows before k-means saw them."""

    rows: KMeansRows
    """They know which row is in which group."""

    fit: Fit
    sampled: NDArray[np.int64]
    """Numbers of the rows of lowest priority, on which the restarts ran; ascending."""

    capped_by: str | None = None
    """Why there are fewer groups than asked for; None where there are as many."""

    restarts_RS: Ints = field(default_factory=lambda: np.zeros((0, 0), np.int32))
    """The groups of the sampled rows in each restart."""

    lloyd_seconds: float = 0.0
    """Time of the iterations over all rows, the transfer of rows to actors or GPUs included."""

    @property
    def filled(self) -> NDArray[np.int64]:
        """The groups that have rows."""
        return np.flatnonzero(self.fit.sizes_K > 0)


class StratumKMeans:
    """k-means on a stratum whose rows are all there. `fit` is the algorithm, the other methods are its steps."""

    def __init__(self, source: SampledStratum, config: ClusteringConfig) -> None:
        self._source, self._config = source, config
        self._sampled, self._training = source.sample()
        self._center_F = np.zeros(source.width, np.float32)

    def fit(self) -> FittedStratum:
        """Each distinct trajectory a group if they are few; else the best of some restarts on a sample goes on over all
        rows."""
        low_SF = self._centered(self._source.take(self._sampled))
        fitted = self._fit_distinct(low_SF) or self._fit_restarts(low_SF)
        self._log(fitted)
        return fitted

    def _fit_restarts(self, low_SF: Floats) -> FittedStratum:
        far_SF = self._far_rows(low_SF)
        sample_SF = np.concatenate([low_SF, far_SF])
        tolerance = self._config.tolerance * float(sample_SF.var(axis=0, dtype=np.float64).mean())
        best, labels_RS = self._best_restart(sample_SF, self._seeding_rows(low_SF, far_SF), tolerance)
        begun = time.monotonic()
        rows, fit = self._fit_all_rows(best, tolerance)
        seconds = time.monotonic() - begun
        num_empty = int((fit.sizes_K == 0).sum())
        capped_by = f"{num_empty} groups stayed empty, the trajectories differ too little" if num_empty else None
        return self._fitted(rows, fit, capped_by, restarts_RS=labels_RS[:, : len(low_SF)], lloyd_seconds=seconds)

    def _centered(self, low_SF: Floats) -> Floats:
        """A stratum of several around its own median: the corpus's may be far from it, and distances would lose digits."""
        if self._config.stratify_by is None:
            return low_SF
        self._center_F = on_grid(np.median(low_SF, axis=0))
        self._source.subtract(self._center_F)
        return low_SF - self._center_F

    def _fit_distinct(self, low_SF: Floats) -> FittedStratum | None:
        """Each distinct trajectory as its own group, where there are no more of them than groups; else None."""
        if len(distinct_rows(low_SF).dictionary) > self._config.num_clusters:
            return None
        rows = self._source.matched_rows()
        found = rows.distinct(self._config.num_clusters)
        if found is None:
            return None
        rows.match(found)
        centroids_KF = np.frombuffer(b"".join(found), np.float32).reshape(len(found), -1)
        fit = Fit(centroids_KF, rows.sizes(len(found)), rows.finish(centroids_KF), 0, "converged")
        return self._fitted(rows, fit, self._too_few(len(found)))

    def _too_few(self, num_distinct: int) -> str | None:
        num_rows = self._source.num_rows
        if num_distinct == self._config.num_clusters:
            return None
        if num_distinct == num_rows:
            return f"there are only {num_rows:,} rows"
        if num_distinct == 1:
            return f"all {num_rows:,} trajectories are equal"
        return f"only {num_distinct:,} distinct trajectories among {num_rows:,} rows"

    def _far_rows(self, low_SF: Floats) -> Floats:
        """Rows far from the groups that k-means++ finds in the sample; none where the sample or the training rows are all."""
        source, num_clusters = self._source, self._config.num_clusters
        if source.num_sampled == source.num_rows or self._training is not None:
            return low_SF[:0]
        [seed] = priorities([f"{source.name}/far"], self._config.seed)
        start_KF = source.start(self._seeding_rows(low_SF, low_SF[:0]), num_clusters, int(seed))
        far_SF = source.far(start_KF, FAR_ROWS_PER_CLUSTER * num_clusters, seed)
        give_back_freed_memory()
        return far_SF

    @staticmethod
    def _seeding_rows(low_SF: Floats, far_SF: Floats) -> Floats:
        """What k-means++ is given: of many rows of low priority evenly some, and all that lie far."""
        return np.concatenate([low_SF[:: -(-len(low_SF) // SEEDING_ROWS)], far_SF])

    def _best_restart(self, sample_SF: Floats, seeding_SF: Floats, tolerance: float) -> tuple[Fit, Ints]:
        """The fit of lowest inertia on the sample (of equal ones the first), and the groups of its rows in each restart."""
        config = self._config
        names = [f"{self._source.name}/restart-{restart}" for restart in range(config.num_restarts)]
        seeds = priorities(names, config.seed).tolist()
        restarts = Restarts(config.num_clusters, config.num_iterations, tolerance)
        fits, labels = zip(*self._source.restarts(sample_SF, seeding_SF, seeds, restarts), strict=True)
        return min(fits, key=lambda fit: fit.inertia), np.stack(labels)

    def _fit_all_rows(self, best: Fit, tolerance: float) -> tuple[KMeansRows, Fit]:
        """Lloyd's iterations from the best restart, over all rows or those to train on; then each row to its centroid."""
        source, num_iterations = self._source, self._config.num_iterations
        fit = best
        if source.num_training > source.num_sampled:  # else the restarts have seen all that there is to train on
            give_back_freed_memory()
            if self._training is None:
                rows: KMeansRows = source.all_rows()
                return rows, lloyd(rows, best.centroids_KF, num_iterations, tolerance)
            fit = lloyd(source.some_rows(self._training), best.centroids_KF, num_iterations, tolerance)
        rows = source.all_rows()
        assigned = lloyd(rows, fit.centroids_KF, 0)
        return rows, replace(assigned, num_iterations=fit.num_iterations, ended_by=fit.ended_by)

    def _fitted(self, rows: KMeansRows, fit: Fit, capped_by: str | None, **others: Any) -> FittedStratum:
        return FittedStratum(self._source, self._center_F, self._source.done(rows), fit, self._sampled, capped_by, **others)

    def _log(self, fitted: FittedStratum) -> None:
        source, num_clusters = self._source, len(fitted.filled)
        _log.info(
            "%s: %s rows, %d groups, %d iterations (%s), %d restarts on %s",
            *(source.name, f"{source.num_rows:,}", num_clusters, fitted.fit.num_iterations, fitted.fit.ended_by),
            self._config.num_restarts,
            f"{source.num_sampled:,} rows" if source.num_sampled < source.num_rows else "all rows",
        )
        if fitted.capped_by is not None:
            wanted = self._config.num_clusters
            _log.warning("%s: %d groups instead of %d: %s", source.name, num_clusters, wanted, fitted.capped_by)
