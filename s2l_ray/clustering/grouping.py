"""How groups are made of the rows of a store: samples, restarts, Lloyd over all rows, canonical numbers, and how good they are.

How the bytes stay the same for any order of the input and any number of threads or workers: rows are in ascending order of
`example_id`; blocks of fixed size are searched by one thread each; features lie on a grid, so that sums in float64 are
exact and their order does not matter; everything else is elementwise or in row order.

How the groups stay good (METHOD, "k-means facts"): k-means++ and restarts on the 1,024 K rows of lowest priority and 64 K
rows more that lie far from the groups of these, drawn from all rows by their squared distances (k-means||, Bahmani et al.,
2012): ten rows among millions are in no sample, and may be a group. The winner then gets full Lloyd iterations over all
rows, and a group that loses its last row is seeded again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from s2l_ray.clustering import diagnostics as quality
from s2l_ray.clustering.engines import Engine
from s2l_ray.clustering.features import Features, Spectrum, on_grid
from s2l_ray.clustering.kmeans import (
    BLOCK_ROWS,
    Column,
    Fit,
    LocalRows,
    MemoryColumn,
    Rows,
    group_sums,
    lloyd,
    plus_plus,
    squares_to_nearest,
    uniform,
)
from s2l_ray.config import ClusteringConfig
from s2l_ray.errors import ConfigError
from s2l_ray.examples.ids import priorities, priority_cut
from s2l_ray.progress import get_log
from s2l_ray.trajectories.sorting import in_order
from s2l_ray.trajectories.store import TrajectoryStore, losses_matrix

SAMPLE_ROWS_PER_CLUSTER = 1_024
FAR_ROWS_PER_CLUSTER = 64
# k-means++ takes time with rows times groups: for many groups it draws from a part of the sample.
SEEDING_ROWS = 131_072
# Principal components, whitening and the stability of the subset are measured on so many rows of lowest priority.
READOUT_ROWS = 65_536
# Groups times sources up to which their agreement is counted: 8 MB.
MAX_CELLS = 1_000_000
ALL_ROWS = "all rows"
_log = get_log("clustering")

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]


@dataclass(frozen=True)
class Stratum:
    """The rows within which groups were made, and which groups these are."""

    name: str
    """Value of the column stratified by; "all rows" where there are no strata."""

    num_rows: int
    first_cluster: int
    num_clusters: int
    capped_by: str | None = None
    """Why there are fewer groups than asked for; None where there are as many."""

    num_iterations: int = 0
    """Lloyd iterations over all its rows (over the training rows, where there are fewer)."""

    ended_by: str = "converged"
    """What ended them: `converged`, `tolerance` or `num_iterations`."""


@dataclass(frozen=True, eq=False)
class Groups:
    """K groups of N rows, without the rows.

    Cluster ids are canonical: strata in the order of their names, within a stratum ascending by the centroid's mean loss.
    """

    centroids_KT: Floats
    """Centroids in nats. Where k-means saw other features than the losses: the mean losses of each group."""

    sizes_K: NDArray[np.int64]
    """Rows in each group, none of them empty."""

    inertia: float
    """Sum of the squared distances to the centroids, in the units of the features."""

    explained_variance: float
    """Share of the features' total squared distance to their mean that the groups explain; 1 where rows do not differ."""

    num_iterations: int
    """Lloyd iterations over all rows (the most that a stratum took)."""

    strata: tuple[Stratum, ...]
    is_stratified: bool
    readout: dict[str, Any] = field(default_factory=dict)
    """How good the groups are; see `_readout`."""

    def __post_init__(self) -> None:
        assert self.sizes_K.min() > 0
        assert len(self.sizes_K) == self.num_clusters == sum(stratum.num_clusters for stratum in self.strata)

    @property
    def num_clusters(self) -> int:
        """K, over all strata."""
        return len(self.centroids_KT)

    @property
    def num_rows(self) -> int:
        """N."""
        return int(self.sizes_K.sum())

    @property
    def strata_K(self) -> NDArray[np.int64] | None:
        """The stratum of each group, counted in the order of their names; None without strata."""
        if not self.is_stratified:
            return None
        return np.repeat(np.arange(len(self.strata)), [stratum.num_clusters for stratum in self.strata])

    def summary(self) -> dict[str, Any]:
        """What the manifest and the report say."""
        capped = {s.name: {"num_clusters": s.num_clusters, "because": s.capped_by} for s in self.strata if s.capped_by}
        return {
            "rows": self.num_rows,
            "num_clusters": self.num_clusters,
            "sizes": self.sizes_K.tolist(),
            "inertia": self.inertia,
            "explained_variance": self.explained_variance,
            "num_iterations": self.num_iterations,
            "ended_by": sorted({stratum.ended_by for stratum in self.strata}),
            "capped": capped,
            "strata": {stratum.name: asdict(stratum) for stratum in self.strata} if self.is_stratified else {},
            "readout": self.readout,
        }


def group(store: TrajectoryStore, config: ClusteringConfig, engine: Engine) -> Grouping:
    """The groups of the rows of a store, within each value of `config.stratify_by` where that is given."""
    if config.num_clusters > len(store):
        raise ConfigError(
            f"clustering.num_clusters: {config.num_clusters:,} groups of {len(store):,} examples. "
            f"Set clustering.num_clusters to {len(store):,} or less, or bring more examples."
        )
    by = config.stratify_by
    names = [ALL_ROWS] if by is None else store.names_of(by)
    counts = [len(store)] if by is None else store.counts_of(by).tolist()
    features, spectrum = _features(store, config, engine.pool)
    strata = [_Stratum(name, rows, config, features.num_features, engine) for name, rows in zip(names, counts, strict=True)]
    totals = _fill(store, strata, features, config, engine.pool)
    for stratum in strata:
        stratum.fit(config, engine)
    return Grouping(config, strata, features, spectrum, totals)


def _lowest(priorities_M: NDArray[np.uint64], wanted: int) -> NDArray[np.int64]:
    """The rows of lowest priority, ascending; of equal priorities the first."""
    return np.sort(np.argsort(priorities_M, kind="stable")[:wanted])


def _features(store: TrajectoryStore, config: ClusteringConfig, pool: ThreadPoolExecutor) -> tuple[Features, Spectrum]:
    """What k-means will see of the losses, and the trajectories' principal components: one pass over the rows."""
    cut = np.uint64(priority_cut(READOUT_ROWS, len(store)))
    is_sampled = len(store) > READOUT_ROWS

    def one_block(block: pa.Table) -> tuple[Floats, NDArray[np.uint64]]:
        order_M = store.priorities(block, config.seed) if is_sampled else np.zeros(len(block), np.uint64)
        chosen = np.flatnonzero(order_M <= cut)
        return on_grid(losses_matrix(block)[chosen]), order_M[chosen]

    losses, order = zip(*in_order(pool, one_block, store.blocks("example_id", "losses", "priority")), strict=True)
    sample_ST = np.concatenate(losses)[_lowest(np.concatenate(order), READOUT_ROWS)]
    spectrum = Spectrum.of(sample_ST)
    return Features.of(config.features, sample_ST, spectrum), spectrum


class _Stratum:
    """The rows of a stratum while groups are made of them."""

    def __init__(self, name: str, num_rows: int, config: ClusteringConfig, width: int, engine: Engine) -> None:
        self.name, self.num_rows, self.width = name, num_rows, width
        self.num_training = min(num_rows, config.training_rows or num_rows)
        self.num_sampled = min(self.num_training, SAMPLE_ROWS_PER_CLUSTER * config.num_clusters)
        # Rows that are drawn apart: those trained on where that is not all of them, else the sample.
        self.num_drawn = self.num_training if self.num_training < num_rows else self.num_sampled
        self.is_drawn = self.num_drawn < num_rows
        self.cut = np.uint64(priority_cut(self.num_drawn, num_rows))
        self.features = engine.new_column(num_rows, width, np.float32)
        self.filled = 0
        self.drawn: list[tuple[NDArray[np.int64], NDArray[np.uint64]]] = []
        """Numbers and priorities of the rows below `cut`."""
        self.read_out: list[tuple[NDArray[np.int64], pa.Array]] = []
        """Numbers and ids of the rows on which the stability of the subset is measured."""
        self.rows: Rows
        self.result: Fit
        self.shift_F = np.zeros(width, np.float32)
        self.capped_by: str | None = None
        self.lloyd_seconds = 0.0
        """Time of the iterations over all rows, the way of the rows to actors or GPUs included."""
        self.sampled: NDArray[np.int64] = np.arange(0)
        """Numbers of the rows in the sample, ascending."""
        self.restarts_RS: Ints = np.zeros((0, 0), np.int32)
        """Their groups in each restart."""

    def add(self, features_MF: Floats, order_M: NDArray[np.uint64], ids: pa.Array, read_out: np.uint64) -> None:
        """Take the next rows in order of ids; those of a priority up to `read_out` are kept in mind."""
        self.features.write(self.filled, features_MF)
        if self.is_drawn:
            chosen = np.flatnonzero(order_M <= self.cut)
            self.drawn.append((chosen + self.filled, order_M[chosen]))
        seen = np.flatnonzero(order_M <= read_out)
        self.read_out.append((seen + self.filled, ids.take(pa.array(seen))))
        self.filled += len(features_MF)

    def fit(self, config: ClusteringConfig, engine: Engine) -> None:
        """Make the groups: `result`, and `rows` that know which row is in which."""
        sample_SF, training = self._sample()
        if config.stratify_by is not None:
            # Around its own median: the corpus's may be far from this stratum, and distances would lose digits.
            self.shift_F = on_grid(np.median(sample_SF, axis=0))
            sample_SF = sample_SF - self.shift_F
            for start in range(0, self.num_rows, BLOCK_ROWS):
                block = self.features.read(start, start + BLOCK_ROWS).reshape(-1, self.width)
                self.features.write(start, block - self.shift_F)
        if len(_distinct(sample_SF).dictionary) <= config.num_clusters:
            local = LocalRows(self.features, self.width, engine.pool, engine.new_column)
            few = self._few(local, config.num_clusters)
            if few is not None:
                self.rows, self.result = local, few
                return self._report(config)
        if self.num_sampled < self.num_rows and training is None:
            sample_SF = np.concatenate([sample_SF, self._far_rows(sample_SF, config, engine.pool)])
        tolerance = config.tolerance * float(sample_SF.var(axis=0, dtype=np.float64).mean())
        started = self._best_restart(sample_SF, config, tolerance, engine.pool)
        begun = time.monotonic()
        # A sample that is all there is has had its iterations already, but `rows` must learn the outcome.
        num_iterations = config.num_iterations if self.num_training > self.num_sampled else 0
        if training is None:
            self.rows = engine.rows(self.features, self.width)
            fit = lloyd(self.rows, started.centroids_KF, num_iterations, tolerance)
        else:
            trained = engine.rows(self._column_of(training, engine), self.width)
            fit = lloyd(trained, started.centroids_KF, num_iterations, tolerance) if num_iterations else started
            self.rows = engine.rows(self.features, self.width)
            everywhere = lloyd(self.rows, fit.centroids_KF, 0)
            fit = Fit(everywhere.centroids_KF, everywhere.sizes_K, everywhere.inertia, fit.num_iterations, fit.ended_by)
        if not num_iterations:
            fit = Fit(fit.centroids_KF, fit.sizes_K, fit.inertia, started.num_iterations, started.ended_by)
        self.lloyd_seconds = time.monotonic() - begun
        num_empty = int((fit.sizes_K == 0).sum())
        if num_empty:
            self.capped_by = f"{num_empty} groups stayed empty, the trajectories differ too little"
        self.result = fit
        return self._report(config)

    def _sample(self) -> tuple[Floats, NDArray[np.int64] | None]:
        """The rows for the restarts and, where they are not all there are, the numbers of those to train on."""
        if not self.drawn:
            self.sampled = np.arange(self.num_rows)
            return self._take(self.sampled), None
        numbers, order = (np.concatenate(found) for found in zip(*self.drawn, strict=True))
        self.drawn.clear()
        self.sampled = numbers[_lowest(order, self.num_sampled)]
        training = numbers[_lowest(order, self.num_training)] if self.num_training < self.num_rows else None
        return self._take(self.sampled), training

    def _take(self, numbers: NDArray[np.int64]) -> Floats:
        """Some rows by number, ascending, read block by block."""
        pieces = [np.empty((0, self.width), np.float32)]
        for start in range(0, self.num_rows, BLOCK_ROWS):
            first, last = np.searchsorted(numbers, [start, start + BLOCK_ROWS])
            if first < last:
                block = self.features.read(start, start + BLOCK_ROWS).reshape(-1, self.width)
                pieces.append(block[numbers[first:last] - start])
        return np.concatenate(pieces)

    def _column_of(self, numbers: NDArray[np.int64], engine: Engine) -> Column:
        """A column of some rows."""
        column = engine.new_column(len(numbers), self.width, np.float32)
        for start in range(0, len(numbers), BLOCK_ROWS):
            column.write(start, self._take(numbers[start : start + BLOCK_ROWS]))
        return column

    def _few(self, rows: LocalRows, num_clusters: int) -> Fit | None:
        """Each distinct trajectory as its own group, where there are no more of them than groups; else None."""
        found: dict[bytes, int] = {}
        blocks: list[tuple[int, pa.Array]] = []
        for start, features in rows.blocks():
            encoded = _distinct(features)
            for key in encoded.dictionary.to_pylist():
                found.setdefault(key, len(found))
            if len(found) > num_clusters:
                return None
            blocks.append((start, encoded))
        for start, encoded in blocks:
            codes = np.array([found[key] for key in encoded.dictionary.to_pylist()], np.int32)
            rows.place(start, codes[encoded.indices.to_numpy()])
        centroids_KF = np.frombuffer(b"".join(found), np.float32).reshape(len(found), -1)
        sizes_K = rows.sizes(len(found))
        if len(found) < num_clusters:
            if len(found) == self.num_rows:
                self.capped_by = f"there are only {self.num_rows:,} rows"
            elif len(found) == 1:
                self.capped_by = f"all {self.num_rows:,} trajectories are equal"
            else:
                self.capped_by = f"only {len(found):,} distinct trajectories among {self.num_rows:,} rows"
        return Fit(centroids_KF, sizes_K, rows.finish(centroids_KF), 0, "converged")

    def _far_rows(self, sample_SF: Floats, config: ClusteringConfig, pool: ThreadPoolExecutor) -> Floats:
        """Rows drawn by their squared distances to the groups that k-means++ finds in the sample: a pass over all rows.

        Drawn without replacement in one stream: the smallest of -log(u) / squared distance (Efraimidis and Spirakis, 2006),
        u being a hash of the row's number in the order of ids.
        """
        wanted = FAR_ROWS_PER_CLUSTER * config.num_clusters
        [seed] = priorities([f"{self.name}/far"], config.seed)
        seeding_SF = self._seeding_rows(sample_SF)
        centroids_KF = pool.submit(plus_plus, seeding_SF, config.num_clusters, int(seed)).result()

        def one_block(start: int) -> tuple[NDArray[np.float64], Floats]:
            features = self.features.read(start, start + BLOCK_ROWS).reshape(-1, self.width)
            keys = -np.log(uniform(np.arange(start, start + len(features)), seed)) / squares_to_nearest(features, centroids_KF)
            lowest = np.sort(np.argpartition(keys, wanted)[:wanted]) if wanted < len(keys) else np.arange(len(keys))
            return keys[lowest], features[lowest]

        keys, rows = np.empty(0), np.empty((0, self.width), np.float32)
        for more_keys, more_rows in in_order(pool, one_block, range(0, self.num_rows, BLOCK_ROWS)):
            keys, rows = np.concatenate([keys, more_keys]), np.concatenate([rows, more_rows])
            lowest = np.sort(np.argsort(keys, kind="stable")[:wanted])
            keys, rows = keys[lowest], rows[lowest]
        return rows

    def _seeding_rows(self, sample_SF: Floats) -> Floats:
        """What k-means++ draws from: of many rows of the sample evenly some, and all that were added for being far."""
        stride = -(-len(self.sampled) // SEEDING_ROWS)
        return np.concatenate([sample_SF[: len(self.sampled) : stride], sample_SF[len(self.sampled) :]])

    def _best_restart(self, sample_SF: Floats, config: ClusteringConfig, tolerance: float, pool: ThreadPoolExecutor) -> Fit:
        """The fit of lowest inertia on the sample; of equal ones the first."""
        fits: list[Fit] = []
        labels = []
        names = [f"{self.name}/restart-{restart}" for restart in range(config.num_restarts)]
        seeding_SF = self._seeding_rows(sample_SF)
        seeds = priorities(names, config.seed).tolist()
        for start_KF in pool.map(lambda seed: plus_plus(seeding_SF, config.num_clusters, seed), seeds):
            rows = LocalRows(MemoryColumn(sample_SF), self.width, pool)
            fits.append(lloyd(rows, start_KF, config.num_iterations, tolerance))
            labels.append(np.concatenate([block for block, _ in rows.results()]))
        self.restarts_RS = np.stack(labels)[:, : len(self.sampled)]
        return min(fits, key=lambda fit: fit.inertia)

    def _report(self, config: ClusteringConfig) -> None:
        num_clusters = int((self.result.sizes_K > 0).sum())
        _log.info(
            "%s: %s rows, %d groups, %d iterations (%s), %d restarts on %s",
            *(self.name, f"{self.num_rows:,}", num_clusters, self.result.num_iterations, self.result.ended_by),
            *(config.num_restarts, f"{self.num_sampled:,} rows" if self.num_sampled < self.num_rows else "all rows"),
        )
        if self.capped_by is not None:
            _log.warning("%s: %d groups instead of %d: %s", self.name, num_clusters, config.num_clusters, self.capped_by)


@dataclass
class _Totals:
    """Sums over all rows of the features."""

    squares: float
    sums_F: NDArray[np.float64]
    sums_SF: NDArray[np.float64]
    """By source; no rows where sources are unknown."""

    sizes_S: NDArray[np.int64]


def _fill(
    store: TrajectoryStore,
    strata: list[_Stratum],
    features: Features,
    config: ClusteringConfig,
    pool: ThreadPoolExecutor,
) -> _Totals:
    """Give every stratum the features of its rows: a second pass."""
    needs_order = any(stratum.is_drawn for stratum in strata) or len(store) > READOUT_ROWS
    num_sources = len(store.names_of("source")) if "source" in store.names else 0
    read_out = np.uint64(priority_cut(READOUT_ROWS, len(store)))

    def one_block(block: pa.Table) -> tuple[Any, ...]:
        features_MF = features(losses_matrix(block))
        order_M = store.priorities(block, config.seed) if needs_order else np.zeros(len(block), np.uint64)
        codes_M = store.codes(block, config.stratify_by) if config.stratify_by is not None else None
        squares = float((features_MF.astype(np.float64) ** 2).sum())
        sums_SF, sizes_S = np.zeros((num_sources, features_MF.shape[1])), np.zeros(num_sources, np.int64)
        if num_sources:
            sources_M = store.codes(block, "source")
            sums_SF, sizes_S = group_sums(sources_M, features_MF, num_sources), np.bincount(sources_M, minlength=num_sources)
        sums_F = features_MF.sum(axis=0, dtype=np.float64)
        return block["example_id"].combine_chunks(), features_MF, order_M, codes_M, squares, sums_F, sums_SF, sizes_S

    width = features.num_features
    totals = _Totals(0.0, np.zeros(width), np.zeros((num_sources, width)), np.zeros(num_sources, np.int64))
    columns = ("example_id", "losses", "priority", "source", *([config.stratify_by] if config.stratify_by else []))
    for ids, features_MF, order_M, codes_M, squares, sums_F, sums_SF, sizes_S in in_order(
        pool, one_block, store.blocks(*dict.fromkeys(columns))
    ):
        totals.squares += squares
        totals.sums_F = totals.sums_F + sums_F
        totals.sums_SF += sums_SF
        totals.sizes_S += sizes_S
        if codes_M is None:
            strata[0].add(features_MF, order_M, ids, read_out)
            continue
        for code, rows in _rows_by_code(codes_M):
            strata[code].add(features_MF[rows], order_M[rows], ids.take(pa.array(rows)), read_out)
    return totals


def _rows_by_code(codes_M: Ints) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Each code of a block and its rows, ascending."""
    order_M = np.argsort(codes_M, kind="stable")
    starts = np.flatnonzero(np.diff(codes_M[order_M], prepend=-1))
    for rows in np.split(order_M, starts[1:]):
        yield int(codes_M[rows[0]]), rows


def _distinct(features_NF: Floats) -> Any:
    """Rows as a dictionary-encoded column of their bytes: hashing takes a tenth of the time of np.unique."""
    num_rows, width = features_NF.shape
    buffers = [None, pa.py_buffer(np.ascontiguousarray(features_NF))]
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(4 * width), num_rows, buffers).dictionary_encode()


class Grouping:
    """What k-means found, before it is written: canonical labels, row by row, and the groups."""

    def __init__(
        self, config: ClusteringConfig, strata: list[_Stratum], features: Features, spectrum: Spectrum, totals: _Totals
    ) -> None:
        self._config, self.strata, self._features = config, strata, features
        self._spectrum, self._totals = spectrum, totals
        self._num_sources = len(totals.sizes_S)
        self._agreement: NDArray[np.int64] | None = None
        self._centroids_KT: Floats | None = None
        self._ranks: list[Ints] = []

    def assignments(self, store: TrajectoryStore) -> Iterator[tuple[pa.Table, Ints, Floats]]:
        """Blocks of the store with the group of each row and its distance to the centroid. `groups` comes after it."""
        if self._centroids_KT is None:
            self._number(store)
        size = sum(int((stratum.result.sizes_K > 0).sum()) for stratum in self.strata)
        is_told = 0 < size * self._num_sources <= MAX_CELLS
        agreement = np.zeros((size, self._num_sources), np.int64) if is_told else None
        for block, labels_M, distances_M in self._results(store, "source"):
            if agreement is not None:
                agreement += quality.contingency(labels_M, store.codes(block, "source"), agreement.shape)
            yield block, labels_M, distances_M
        self._agreement = agreement

    def _results(self, store: TrajectoryStore, *columns: str) -> Iterator[tuple[pa.Table, Ints, Floats]]:
        """Blocks with labels and distances: every stratum's next rows, put where they belong."""
        by = self._config.stratify_by
        readers = [_Reader(stratum.rows.results()) for stratum in self.strata]
        firsts = np.cumsum([0, *(int((ranks >= 0).sum()) for ranks in self._ranks)])
        for block in store.blocks(*dict.fromkeys(("example_id", *columns, *([by] if by else [])))):
            codes_M = store.codes(block, by) if by is not None else np.zeros(len(block), np.int32)
            labels_M, distances_M = np.empty(len(block), np.int32), np.empty(len(block), np.float32)
            for code, rows in _rows_by_code(codes_M):
                found, far = readers[code].take(len(rows))
                labels_M[rows] = self._ranks[code][found] + firsts[code] if len(self._ranks[code]) else found
                distances_M[rows] = far
            yield block, labels_M, distances_M

    def _number(self, store: TrajectoryStore) -> None:
        """Canonical numbers: groups without rows left out, within a stratum ascending by mean loss."""
        kept = [np.flatnonzero(stratum.result.sizes_K > 0) for stratum in self.strata]
        # First in the order of the fit, to find the groups' mean losses where the features are not the losses.
        self._ranks = [_places(found, len(s.result.sizes_K)) for found, s in zip(kept, self.strata, strict=True)]
        means_KT = self._means(store) if self._features.kind != "raw" else None
        centroids: list[Floats] = []
        first = 0
        for number, (stratum, found) in enumerate(zip(self.strata, kept, strict=True)):
            if means_KT is None:
                center_T = self._features.center_T.astype(np.float64) + stratum.shift_F
                levels_KT = (stratum.result.centroids_KF[found] + center_T).astype(np.float32)
            else:
                levels_KT = means_KT[first : first + len(found)]
            first += len(found)
            # Equal means are in the order of their points.
            order_K = np.lexsort((*reversed(list(levels_KT.T)), levels_KT.mean(axis=1, dtype=np.float64)))
            self._ranks[number] = _places(found[order_K], len(stratum.result.sizes_K))
            centroids.append(levels_KT[order_K])
        self._centroids_KT = np.concatenate(centroids)

    def _means(self, store: TrajectoryStore) -> Floats:
        """Mean losses of each group: a pass over the losses."""
        num_clusters = sum(len(np.flatnonzero(stratum.result.sizes_K > 0)) for stratum in self.strata)
        sums_KT, sizes_K = np.zeros((num_clusters, store.num_points)), np.zeros(num_clusters, np.int64)
        for block, labels_M, _ in self._results(store, "losses"):
            sums_KT += group_sums(labels_M, on_grid(losses_matrix(block)), num_clusters)
            sizes_K += np.bincount(labels_M, minlength=num_clusters)
        return (sums_KT / sizes_K[:, None]).astype(np.float32)

    @property
    def feature_centroids_KF(self) -> Floats | None:
        """Centroids in the space of the features, in canonical order; None where features are the losses."""
        if self._features.kind == "raw":
            return None
        ordered = []
        for stratum, ranks in zip(self.strata, self._ranks, strict=True):
            found = np.flatnonzero(ranks >= 0)
            ordered.append(stratum.result.centroids_KF[found[np.argsort(ranks[found])]] + stratum.shift_F)
        return np.concatenate(ordered)

    def groups(self) -> Groups:
        """The groups and how good they are; after `assignments` has run through."""
        assert self._centroids_KT is not None
        strata: list[Stratum] = []
        sizes: list[NDArray[np.int64]] = []
        for stratum, ranks in zip(self.strata, self._ranks, strict=True):
            found = np.flatnonzero(ranks >= 0)
            first = sum(map(len, sizes))
            sizes.append(stratum.result.sizes_K[found[np.argsort(ranks[found])]])
            fit = stratum.result
            strata.append(
                Stratum(stratum.name, stratum.num_rows, first, len(found), stratum.capped_by, fit.num_iterations, fit.ended_by)
            )
        inertia = float(sum(stratum.result.inertia for stratum in self.strata))
        total = self._totals.squares - float((self._totals.sums_F**2).sum()) / sum(s.num_rows for s in self.strata)
        return Groups(
            centroids_KT=self._centroids_KT,
            sizes_K=np.concatenate(sizes),
            inertia=inertia,
            explained_variance=quality.explained(inertia, total),
            num_iterations=max(stratum.num_iterations for stratum in strata),
            strata=tuple(strata),
            is_stratified=self._config.stratify_by is not None,
            readout=self._readout(np.concatenate(sizes), total),
        )

    def _readout(self, sizes_K: NDArray[np.int64], total: float) -> dict[str, Any]:
        """How good the groups are, for the manifest and the report."""
        totals = self._totals
        by_source = None
        if self._num_sources:
            by_source = quality.between(totals.sums_SF, totals.sizes_S) / total if total > 0 else 1.0
        # Restarts of strata count by their rows.
        agreements = [(s.num_rows, quality.mean_agreement(s.restarts_RS)) for s in self.strata]
        known = [(weight, value) for weight, value in agreements if value is not None]
        sampled = sum(stratum.num_sampled for stratum in self.strata)
        return {
            "features": self._features.kind,
            "tiny_groups": int((sizes_K <= quality.TINY_ROWS).sum()),
            "tiny_rows": quality.TINY_ROWS,
            "variance_explained_by_source": by_source,
            "principal_components": [round(float(share), 6) for share in self._spectrum.shares_T],
            "effective_dimension": round(self._spectrum.effective_dimension, 3),
            "agreement_of_restarts": float(np.average([v for _, v in known], weights=[w for w, _ in known])) if known else None,
            "agreement_with_source": None if self._agreement is None else quality.adjusted_rand_index(self._agreement),
            "sampled_rows": sampled,
            "training_rows": sum(stratum.num_training for stratum in self.strata),
            "warning": quality.warning(self._spectrum, self._features.kind),
        }

    def restarts(self) -> pa.Table | None:
        """The groups that some rows had in each restart (of stratum s those from s * K on); None for one restart."""
        tables = []
        for number, stratum in enumerate(self.strata):
            if len(stratum.restarts_RS) < 2:
                continue
            numbers, ids = zip(*stratum.read_out, strict=True)
            places = np.searchsorted(stratum.sampled, np.concatenate(numbers))
            known = np.flatnonzero(np.append(stratum.sampled, -1)[places] == np.concatenate(numbers))
            labels_RM = stratum.restarts_RS[:, places[known]] + number * self._config.num_clusters
            columns = {f"restart_{restart}": labels_M for restart, labels_M in enumerate(labels_RM)}
            tables.append(pa.table({"example_id": pa.concat_arrays(ids).take(pa.array(known)), **columns}))
        return pa.concat_tables(tables).sort_by("example_id").combine_chunks() if tables else None


class _Reader:
    """Takes any number of rows from blocks of labels and distances."""

    def __init__(self, blocks: Iterator[tuple[Ints, Floats]]) -> None:
        self._blocks = blocks
        self._labels, self._distances = np.empty(0, np.int32), np.empty(0, np.float32)

    def take(self, count: int) -> tuple[Ints, Floats]:
        labels, distances = [self._labels], [self._distances]
        have = len(self._labels)
        while have < count:
            more, far = next(self._blocks)
            labels.append(more)
            distances.append(far)
            have += len(more)
        all_labels = labels[-1] if have == len(labels[-1]) else np.concatenate(labels)
        all_distances = distances[-1] if have == len(distances[-1]) else np.concatenate(distances)
        self._labels, self._distances = all_labels[count:], all_distances[count:]
        return all_labels[:count], all_distances[:count]


def _places(found: NDArray[np.int64], count: int) -> Ints:
    """For each of `count` things its place in `found`, -1 for those that are not there."""
    places = np.full(count, -1, np.int32)
    places[found] = np.arange(len(found))
    return places
