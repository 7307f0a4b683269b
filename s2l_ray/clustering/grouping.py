"""How groups are made of the rows of a store: features, strata, canonical numbers, and how good the groups are.

How the bytes stay the same for any order of the input and any number of threads or workers: rows are in ascending order of
`example_id`; blocks of fixed size are searched by one thread each; features lie on a grid, so that sums in float64 are
exact and their order does not matter; everything else is elementwise or in row order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from s2l_ray.clustering import diagnostics
from s2l_ray.clustering.assigned_files import AssignedFiles
from s2l_ray.clustering.columns import Floats, Ints, rows_by_code
from s2l_ray.clustering.engines import Engine
from s2l_ray.clustering.feature_files import FeatureFiles
from s2l_ray.clustering.features import Features, Measured, Spectrum, on_grid
from s2l_ray.clustering.groups import ALL_ROWS, Groups, Stratum
from s2l_ray.clustering.kmeans import group_sums
from s2l_ray.clustering.levels import levels_above
from s2l_ray.clustering.numbering import Numbering
from s2l_ray.clustering.ray_rows import RemoteStratum, load
from s2l_ray.clustering.strata import FittedStratum, Picked, SampledStratum, StratumKMeans, StratumRows, lowest
from s2l_ray.clustering.stratifying import AUTO, config_of_stratum, strata_of
from s2l_ray.clustering.threads import SearchThreads
from s2l_ray.config import ClusteringConfig
from s2l_ray.errors import ConfigError
from s2l_ray.examples.ids import priority_cut
from s2l_ray.progress import get_log
from s2l_ray.runtime.process import give_back_freed_memory
from s2l_ray.storage.records import FileRecord
from s2l_ray.trajectories.arriving import LOWEST_ROWS
from s2l_ray.trajectories.loss_columns import missing_statistics
from s2l_ray.trajectories.ranged_store import RangedStore
from s2l_ray.trajectories.store import BLOCK_ROWS, TrajectoryStore

# Principal components, whitening and the stability of the subset are measured on so many rows of lowest priority.
DIAGNOSTIC_ROWS = LOWEST_ROWS
# Groups times sources up to which their agreement is counted: 8 MB.
MAX_CELLS = 1_000_000
_log = get_log("clustering")


def group(store: TrajectoryStore, config: ClusteringConfig, engine: Engine, *, sources_are_files: bool = False) -> Grouping:
    """The groups of the rows of a store, within each value of `config.stratify_by` where that is given (see `stratifying`).

    Raises ConfigError for more groups than rows, an unknown column to stratify by, points or statistics that are not there.
    """
    check_num_clusters(config, len(store))
    found = strata_of(config, store.names_of("source") if "source" in store.names else [], len(store), sources_are_files)
    by = found.column
    if config.stratify_by == AUTO:
        _log.info("stratify_by auto: %s (%s)", "by source" if by else "no strata", found.reason)
    names = [ALL_ROWS] if by is None else store.names_of(by)
    counts = [len(store)] if by is None else store.counts_of(by).tolist()
    configs = [config_of_stratum(config, count, len(store)).model_copy(update={"stratify_by": by}) for count in counts]
    config = config.model_copy(update={"stratify_by": by})
    features, spectrum = features_of(store, config, engine.pool)
    measured, width = measured_of(store, config), features.num_features
    planned = [(name, count, width, own) for name, count, own in zip(names, counts, configs, strict=True)]
    remote = [RemoteStratum(number, *one, engine) for number, one in enumerate(planned)] if engine.kind == "ray" else []
    sources: Sequence[SampledStratum] = remote or [StratumRows(*one, engine) for one in planned]
    totals, starts_BS = _fill(store, sources, lambda block: features(measured(block)), config, engine.pool)
    give_back_freed_memory()  # that of the blocks on their way
    if remote:
        assert isinstance(store, RangedStore)
        load(
            engine.actors, FeatureFiles(replace(store, measurements={}, lowest=None), measured, features, by, starts_BS), remote
        )
    strata = [StratumKMeans(source, own).fit() for source, own in zip(sources, configs, strict=True)]
    engine.end_actors()  # what comes now are tasks, which need the room
    grouping = Grouping(store, config, strata, features, spectrum, totals, measured.points, starts_BS)
    if config.levels is not None:
        grouping.parents = levels_above(grouping.centroids_of_strata, names, configs, engine.pool)
        counts = [grouping.num_clusters, *(int(parents.max()) + 1 for parents in grouping.parents)]
        _log.info("levels of %s groups", " -> ".join(f"{count:,}" for count in counts))
    return grouping


def check_num_clusters(config: ClusteringConfig, num_rows: int) -> None:
    """Raise ConfigError for more groups than rows."""
    if config.num_clusters > num_rows:
        raise ConfigError(
            f"clustering.num_clusters: {config.num_clusters:,} groups of {num_rows:,} examples. "
            f"Set clustering.num_clusters to {num_rows:,} or less, or bring more examples."
        )


def _diagnostic_cut(store: TrajectoryStore) -> np.uint64:
    return np.uint64(priority_cut(DIAGNOSTIC_ROWS, len(store)))


def measured_of(store: TrajectoryStore, config: ClusteringConfig) -> Measured:
    """Of which columns and points of a store the features are made. Raises ConfigError for some that are not there."""
    measured = Measured.of(config.features, store.num_points, config.points)
    if len(measured.columns) > 1 and (error := missing_statistics(store.rows.schema.names)) is not None:
        raise error
    return measured


def features_of(store: TrajectoryStore, config: ClusteringConfig, pool: SearchThreads) -> tuple[Features, Spectrum]:
    """What k-means will see of what is measured, and the principal components of the losses at its points: one pass over the
    rows where the store does not know those of lowest priority."""
    measured = measured_of(store, config)
    cut, is_sampled = _diagnostic_cut(store), len(store) > DIAGNOSTIC_ROWS

    def one_block(block: pa.Table) -> tuple[Floats, NDArray[np.uint64]]:
        order_M = store.priorities(block, config.seed) if is_sampled else np.zeros(len(block), np.uint64)
        sampled = np.flatnonzero(order_M <= cut)
        return on_grid(measured(block)[sampled]), order_M[sampled]

    known = store.lowest if config.seed == store.priority_seed else None
    found = store.each_block(pool, one_block, *measured.columns, "priority") if known is None else [one_block(known)]
    values, order = zip(*found, strict=True)
    sample_ST = np.concatenate(values)[lowest(np.concatenate(order), DIAGNOSTIC_ROWS)]
    spectrum = Spectrum.of(sample_ST[:, : sample_ST.shape[1] // len(measured.columns)])
    return Features.of(config.features, sample_ST, spectrum), spectrum


@dataclass
class _Totals:
    """Sums over rows of the features."""

    num_rows: int
    squares: float
    sums_F: NDArray[np.float64]
    sums_SF: NDArray[np.float64]
    """By source; no rows where sources are unknown."""

    sizes_S: NDArray[np.int64]

    @classmethod
    def of(cls, features_MF: Floats, sources_M: Ints | None, num_sources: int) -> _Totals:
        """The sums of some rows, whose sources are numbers."""
        sums_SF, sizes_S = np.zeros((num_sources, features_MF.shape[1])), np.zeros(num_sources, np.int64)
        if sources_M is not None:
            sums_SF, sizes_S = group_sums(sources_M, features_MF, num_sources), np.bincount(sources_M, minlength=num_sources)
        squares = float(np.multiply(features_MF, features_MF, dtype=np.float64).sum())
        return cls(len(features_MF), squares, features_MF.sum(axis=0, dtype=np.float64), sums_SF, sizes_S)

    def add(self, more: _Totals) -> None:
        self.num_rows += more.num_rows
        self.squares += more.squares
        self.sums_F += more.sums_F
        self.sums_SF += more.sums_SF
        self.sizes_S += more.sizes_S

    @property
    def to_mean(self) -> float:
        """Sum of the squared distances of all rows to their mean."""
        return self.squares - float((self.sums_F**2).sum()) / self.num_rows


@dataclass(frozen=True)
class _OfStratum:
    """What a block has of a stratum."""

    stratum: int
    picked: Picked
    features_MF: Floats | None
    """None where the rows stay in files."""


def _fill(
    store: TrajectoryStore,
    strata: Sequence[SampledStratum],
    features: Callable[[pa.Table], Floats],
    config: ClusteringConfig,
    pool: SearchThreads,
) -> tuple[_Totals, NDArray[np.int64]]:
    """Give every stratum the features of its rows, or where these stay in files what is known of them: a second pass.

    Also returned: for each block of the store, and last for its end, how many rows of each stratum come before.
    """
    by, cut, cuts = config.stratify_by, _diagnostic_cut(store), [stratum.cut for stratum in strata]
    needs_priorities = any(cut is not None for cut in cuts) or len(store) > DIAGNOSTIC_ROWS
    has_sources = "source" in store.names
    num_sources = len(store.names_of("source")) if has_sources else 0
    keeps_features = isinstance(strata[0], StratumRows)

    def one_block(block: pa.Table) -> tuple[list[_OfStratum], _Totals]:
        features_MF = features(block)
        order_M = store.priorities(block, config.seed) if needs_priorities else np.zeros(len(block), np.uint64)
        totals = _Totals.of(features_MF, store.codes(block, "source") if has_sources else None, num_sources)
        ids, pieces = block["example_id"].combine_chunks(), []
        for number, rows in rows_by_code(np.zeros(len(block), np.int32) if by is None else store.codes(block, by)):
            some = slice(None) if by is None else rows
            picked = Picked.of(order_M[some], ids if by is None else ids.take(pa.array(rows)), cuts[number], cut)
            pieces.append(_OfStratum(number, picked, features_MF[some] if keeps_features else None))
        return pieces, totals

    totals = _Totals.of(np.zeros((0, strata[0].width), np.float32), None, num_sources)
    counts: list[NDArray[np.int64]] = [np.zeros(len(strata), np.int64)]
    measured = Measured.of(config.features, store.num_points).columns
    columns = dict.fromkeys(("example_id", *measured, "priority", "source", *([] if by is None else [by])))
    for pieces, of_block in store.each_block(pool, one_block, *columns):
        totals.add(of_block)
        counts.append(counts[-1].copy())
        for piece in pieces:
            counts[-1][piece.stratum] += piece.picked.num_rows
            stratum = strata[piece.stratum]
            if piece.features_MF is not None:
                assert isinstance(stratum, StratumRows)
                stratum.add(piece.features_MF, piece.picked)
            else:
                stratum.note(piece.picked)
    return totals, np.stack(counts)


Assigned = Iterator[tuple[pa.Table, Ints, Floats]]
"""Blocks of a store with the group of each row and its distance to the centroid."""


class _BySource:
    """Counts rows by group and source, where these are not too many."""

    def __init__(self, store: TrajectoryStore, shape: tuple[int, int]) -> None:
        self._store, self._shape = store, shape
        self.rows_KS = np.zeros(shape, np.int64) if 0 < shape[0] * shape[1] <= MAX_CELLS else None

    def add(self, block: pa.Table, labels_M: Ints) -> None:
        if self.rows_KS is not None:
            self.rows_KS += diagnostics.contingency(labels_M, self._store.codes(block, "source"), self._shape)


@dataclass(frozen=True)
class _WritePart:
    """Task: write the part of some blocks, and count their rows by group and source."""

    files: AssignedFiles
    shape: tuple[int, int]
    write: Callable[[int, Assigned], FileRecord]
    num_blocks: int

    def __call__(self, first: int, blocks: list[pa.Table]) -> tuple[FileRecord, NDArray[np.int64] | None]:
        counted, assigned = _BySource(self.files.store, self.shape), list(self.files.of(first, blocks))
        for block, labels_M, _ in assigned:
            counted.add(block, labels_M)
        return self.write(first // self.num_blocks, iter(assigned)), counted.rows_KS


class Grouping:
    """What k-means found, before it is written: the group of every row, and the groups."""

    def __init__(
        self,
        store: TrajectoryStore,
        config: ClusteringConfig,
        strata: list[FittedStratum],
        features: Features,
        spectrum: Spectrum,
        totals: _Totals,
        points: Sequence[int] | None,
        starts_BS: NDArray[np.int64],
    ) -> None:
        self._store, self._config, self._strata = store, config, strata
        self._features, self._spectrum, self._totals, self._points = features, spectrum, totals, points
        center_T = features.center_T if features.kind == "raw" and points is None else None
        self._are_losses = center_T is not None
        self._numbering, self._centroids_KT = Numbering.canonical(store, config.stratify_by, strata, center_T, starts_BS)
        self.parents: tuple[NDArray[np.int64], ...] = ()
        """The levels above the groups (see `levels`)."""

        self._rows_KS: NDArray[np.int64] | None = None
        """Rows of each group and source, once `assignments` has run through."""

    @property
    def lloyd_seconds(self) -> float:
        """Time of the iterations over all rows."""
        return sum(stratum.lloyd_seconds for stratum in self._strata)

    def assignments(self) -> Assigned:
        """Blocks of the store with the group of each row and its distance to the centroid. `groups` comes after it."""
        counted = _BySource(self._store, self._shape)
        for block, labels_M, distances_M in self._numbering.blocks("source"):
            counted.add(block, labels_M)
            yield block, labels_M, distances_M
        self._rows_KS = counted.rows_KS

    def write_parts(self, write: Callable[[int, Assigned], FileRecord], rows_per_part: int) -> Iterator[FileRecord]:
        """The same in tasks, where all is in files: `write(part, blocks)` writes a part. `groups` comes after it."""
        files, total = self._numbering.files(), _BySource(self._store, self._shape)
        assert files is not None
        columns = ("source", *([] if files.by is None else [files.by]))
        part = _WritePart(files, self._shape, write, rows_per_part // BLOCK_ROWS)
        for record, rows_KS in files.store.each_stretch(part, columns, part.num_blocks):
            if total.rows_KS is not None and rows_KS is not None:
                total.rows_KS += rows_KS
            yield record
        self._rows_KS = total.rows_KS

    @property
    def _shape(self) -> tuple[int, int]:
        """How many groups and sources there are."""
        return self._numbering.num_clusters, len(self._totals.sizes_S)

    @property
    def num_clusters(self) -> int:
        """K, over all strata."""
        return self._numbering.num_clusters

    @property
    def centroids_of_strata(self) -> list[Floats]:
        """Centroids of each stratum in the space of the features, in canonical order."""
        pairs = zip(self._strata, self._numbering.orders, strict=True)
        return [stratum.fit.centroids_KF[order] + stratum.center_F for stratum, order in pairs]

    @property
    def feature_centroids_KF(self) -> Floats | None:
        """The same in one; None where features are the losses."""
        return None if self._are_losses else np.concatenate(self.centroids_of_strata)

    def groups(self, has_untrained: bool | None = None) -> Groups:
        """The groups and how good they are; after `assignments` has run through.

        `has_untrained`: whether the trajectories begin with the untrained model; None where that is unknown.
        """
        strata: list[Stratum] = []
        sizes: list[NDArray[np.int64]] = []
        for fitted, order, first in zip(self._strata, self._numbering.orders, self._numbering.firsts.tolist(), strict=True):
            source, fit = fitted.source, fitted.fit
            sizes.append(fit.sizes_K[order])
            strata.append(
                Stratum(source.name, source.num_rows, first, len(order), fitted.capped_by, fit.num_iterations, fit.ended_by)
            )
        inertia = float(sum(stratum.fit.inertia for stratum in self._strata))
        return Groups(
            centroids_KT=self._centroids_KT,
            sizes_K=np.concatenate(sizes),
            inertia=inertia,
            explained_variance=diagnostics.explained(inertia, self._totals.to_mean),
            num_iterations=max(stratum.num_iterations for stratum in strata),
            strata=tuple(strata),
            stratified_by=self._config.stratify_by,
            parents=self.parents,
            diagnostics=self._diagnostics(np.concatenate(sizes), has_untrained),
        )

    def _diagnostics(self, sizes_K: NDArray[np.int64], has_untrained: bool | None) -> dict[str, Any]:
        """How good the groups are, for the manifest and the report."""
        totals, by_source = self._totals, None
        if len(totals.sizes_S):
            total = totals.to_mean
            by_source = diagnostics.between(totals.sums_SF, totals.sizes_S) / total if total > 0 else 1.0
        seen = self._features.spectrum if self._features.kind == "profile" else self._spectrum
        # Restarts of strata count by their rows.
        agreements = [(s.source.num_rows, diagnostics.mean_agreement(s.restarts_RS)) for s in self._strata]
        known = [(weight, value) for weight, value in agreements if value is not None]
        return {
            "features": self._features.kind,
            "points": None if self._points is None else list(self._points),
            "tiny_groups": int((sizes_K <= diagnostics.TINY_ROWS).sum()),
            "tiny_rows": diagnostics.TINY_ROWS,
            "variance_explained_by_source": by_source,
            "principal_components": [round(float(share), 6) for share in self._spectrum.shares_T],
            "effective_dimension": round(self._spectrum.effective_dimension, 3),
            "effective_dimension_of_features": round(self._features.spectrum.effective_dimension, 3),
            "agreement_of_restarts": float(np.average([v for _, v in known], weights=[w for w, _ in known])) if known else None,
            "agreement_with_source": None if self._rows_KS is None else diagnostics.adjusted_rand_index(self._rows_KS),
            **self._information_on_source(),
            "sampled_rows": sum(stratum.source.num_sampled for stratum in self._strata),
            "training_rows": sum(stratum.source.num_training for stratum in self._strata),
            "warning": diagnostics.warning(seen, self._features.kind, has_untrained),
        }

    def _information_on_source(self) -> dict[str, float | None]:
        """How much groups that never saw the sources tell of them; None where sources are unknown or were strata."""
        rows_KS = None if self._config.stratify_by == "source" else self._rows_KS
        return {
            "information_on_source": None if rows_KS is None else diagnostics.normalized_mutual_information(rows_KS),
            "purity_by_source": None if rows_KS is None else diagnostics.purity(rows_KS),
        }

    def restarts(self) -> pa.Table | None:
        """The groups that some rows had in each restart (of stratum s those from s * K on); None for one restart.

        Columns `example_id`, in ascending order, and `restart_0`, `restart_1` and so on (int32).
        """
        tables = []
        for number, stratum in enumerate(self._strata):
            if len(stratum.restarts_RS) < 2:
                continue
            rows, ids = (list(found) for found in zip(*stratum.source.diagnostic_rows, strict=True))
            numbers = np.concatenate(rows)
            places = np.searchsorted(stratum.sampled, numbers)
            known = np.flatnonzero(np.append(stratum.sampled, -1)[places] == numbers)
            labels_RM = stratum.restarts_RS[:, places[known]] + number * self._config.num_clusters
            columns = {f"restart_{restart}": labels_M for restart, labels_M in enumerate(labels_RM)}
            tables.append(pa.table({"example_id": pa.concat_arrays(ids).take(pa.array(known)), **columns}))
        return pa.concat_tables(tables).sort_by("example_id").combine_chunks() if tables else None
