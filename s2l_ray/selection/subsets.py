"""The subsets of a store's rows: one for each budget, with weights; the random control; how stable a subset is."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from s2l_ray.clustering.columns import Floats, Ints
from s2l_ray.clustering.diagnostics import contingency, mean_overlap
from s2l_ray.clustering.grouping import features_of, measured_of
from s2l_ray.clustering.groups import Groups
from s2l_ray.clustering.threads import SearchThreads
from s2l_ray.config import ClusteringConfig, SelectionConfig
from s2l_ray.errors import ConfigError
from s2l_ray.examples.ids import one_array, priorities, priority_cut
from s2l_ray.progress import get_log
from s2l_ray.selection.assignments import BLOCKS_PER_PART, Assignments, PartAssignments
from s2l_ray.selection.choosing import (
    NO_TOKENS,
    Budget,
    choose,
    keys_of,
    minimum_first,
    num_examples,
    num_taken,
    select_rows,
)
from s2l_ray.selection.quotas import Integers, Sharing, selection_order
from s2l_ray.selection.spreading import spread
from s2l_ray.selectors import S2L, SELECTORS, SOURCES, Pool, Selector
from s2l_ray.storage.artifacts import Artifact
from s2l_ray.storage.layout import RESTARTS
from s2l_ray.trajectories.loss_columns import losses_matrix
from s2l_ray.trajectories.ranged_store import RangedStore
from s2l_ray.trajectories.sorting import read_ahead
from s2l_ray.trajectories.store import NUM_RESPONSE_TOKENS, TrajectoryStore

_POOL_COLUMNS = ("example_id", "priority", "source", NUM_RESPONSE_TOKENS, "position")


@dataclass(frozen=True, eq=False)
class Selection:
    """A balanced subset of M examples, in ascending order of ids."""

    example_ids: pa.Array
    """string or int64, shape (M,)."""

    cluster_ids_M: NDArray[np.int32]
    weights_M: NDArray[np.float64]
    """Size of the example's group over its quota: with these weights the subset's gradient estimates the pool's. With a
    minimum per source: the same for the rows of its source in its group (see `_weights_by_source`). With levels of groups
    also for the groups beside it that give none (see `_stood_for`)."""

    quotas_K: Integers
    """Examples taken from each group."""

    sizes_K: Integers
    """Examples in each group."""

    budget: Budget
    """As it was asked for: examples, a fraction of the pool, or `{"tokens": n}`."""

    def __post_init__(self) -> None:
        assert len(self.example_ids) == len(self.cluster_ids_M) == len(self.weights_M) == self.quotas_K.sum()
        assert (self.quotas_K <= self.sizes_K).all()
        assert (np.bincount(self.cluster_ids_M, minlength=len(self.quotas_K)) == self.quotas_K).all()

    def __len__(self) -> int:
        return len(self.example_ids)


@dataclass(frozen=True)
class Subset:
    """A selection with what is known of its rows."""

    selection: Selection
    rows: pa.Table
    """`example_id`, `position`, `cluster_id`, and where they are known `source` and `num_response_tokens`."""


def check_columns(config: SelectionConfig, store: TrajectoryStore) -> None:
    """Raise ConfigError where the method, a budget or a minimum needs what is not there: before anything is grouped."""
    several = [SOURCES] if _has_sources(store) else []
    SELECTORS[config.method].check([*several, *filter(store.has, [NUM_RESPONSE_TOKENS]), *store.measurements], store.num_points)
    if config.min_per_source and "source" not in store.names:
        raise ConfigError("selection.min_per_source: these trajectories have no column source. Add it, or leave this out.")
    if any(isinstance(budget, dict) for budget in (config.budget, *config.more_budgets)) and not store.has(NUM_RESPONSE_TOKENS):
        raise ConfigError(NO_TOKENS)


def grouping_for(config: SelectionConfig, grouping: ClusteringConfig) -> ClusteringConfig:
    """How to group for a method alone: all rows as one group where it reads no groups, and k-means would be in vain."""
    if SELECTORS[config.method].reads_groups:
        return grouping
    get_log("clustering").info("all rows as one group, whatever clustering asks for: %s reads no groups", config.method)
    return ClusteringConfig(num_clusters=1, num_restarts=1, stratify_by=None, seed=grouping.seed)


def choose_subsets(
    store: TrajectoryStore, assigned: Assignments, groups: Groups, config: SelectionConfig, grouping: ClusteringConfig
) -> list[Subset]:
    """The subsets for the budget and for the further ones, in passes over the store. Raises what `choose` raises.

    `grouping`: how the groups were made, for `draw: spread`.
    """
    check_columns(config, store)
    budgets: list[Budget] = [config.budget, *config.more_budgets]  # type: ignore[list-item]
    if config.method != S2L:
        return chosen_by(SELECTORS[config.method], store, assigned, groups, config, budgets)

    rows = _PoolRows(store, assigned, config.seed, config.draw == "central")

    sharing = sharing_of(groups, config)
    if config.draw == "spread":
        with SearchThreads() as pool:
            features, _ = features_of(store, grouping, pool)
        measured = measured_of(store, grouping)
        quotas_K = sharing.quotas(num_examples(config.budget, len(store)))  # type: ignore[arg-type]
        tables = [spread(rows.blocks, map(measured, store.blocks(*measured.columns)), features, quotas_K)]
    else:
        tables = choose(
            rows.each,
            sharing,
            budgets,
            sizes_S=store.counts_of("source") if config.min_per_source else None,
            min_per_source=config.min_per_source,
        )
    rows_KS = None
    if config.min_per_source:
        shape = groups.num_clusters, len(store.names_of("source"))
        rows_KS = np.asarray(sum(rows.each(lambda block: _by_group_and_source(block, shape))))
    return [_subset(budget, table, groups, rows_KS) for budget, table in zip(budgets, tables, strict=True)]


def chosen_by(
    method: Selector,
    store: TrajectoryStore,
    assigned: Assignments,
    groups: Groups,
    config: SelectionConfig,
    budgets: list[Budget],
) -> list[Subset]:
    """The subsets of another selector, with all rows' numbers in memory. Raises ConfigError where it needs what is not
    there."""
    pool, rows = pool_of(store, assigned, groups, config, method)
    order_N = method.order(pool)
    strata_N = None if method.strata is None else method.strata(pool)
    found = []
    for budget in budgets:
        count = num_taken(budget, rows, order_N, len(rows), 0)
        assert count is not None, "the order has all rows"
        taken_M = np.sort(order_N[:count])
        table, weights_M = rows.take(pa.array(taken_M)).combine_chunks(), np.ones(count)
        if strata_N is not None:
            strata_M = strata_N[taken_M]
            weights_M = np.bincount(strata_N)[strata_M] / np.bincount(strata_M)[strata_M]
        cluster_ids_M = table["cluster_id"].to_numpy()
        quotas_K = np.bincount(cluster_ids_M, minlength=groups.num_clusters)
        ids = table["example_id"].combine_chunks()
        found.append(Subset(Selection(ids, cluster_ids_M, weights_M, quotas_K, groups.sizes_K, budget), table))
    return found


def pool_of(
    store: TrajectoryStore, assigned: Assignments, groups: Groups, config: SelectionConfig, method: Selector
) -> tuple[Pool, pa.Table]:
    """What a selector sees of a store, and the same rows as `Subset.rows` has them."""
    rows = pa.concat_tables(_PoolRows(store, assigned, f"random-{config.seed}").blocks()).combine_chunks()
    priorities_N = rows["priority"].to_numpy()
    losses_NT = np.concatenate([losses_matrix(block) for block in store.blocks("losses")])

    def shared(groups_N: Integers, allocation: float) -> Integers:
        return selection_order(groups_N, priorities_N, Sharing(np.bincount(groups_N), allocation=allocation))

    def by_s2l() -> Integers:
        table = pa.concat_tables(_PoolRows(store, assigned, config.seed, config.draw == "central").blocks())
        order_N = selection_order(table["cluster_id"].to_numpy(), keys_of(table), sharing_of(groups, config))
        return minimum_first(order_N, table, config.min_per_source)[0] if config.min_per_source else order_N

    columns = {name: rows[name].to_numpy() for name in (NUM_RESPONSE_TOKENS,) if name in rows.column_names}
    columns |= {name: read() for name, read in store.measurements.items() if name in method.needs}
    sources_N = rows["source"].to_numpy().astype(np.int64) if _has_sources(store) else None
    return Pool(losses_NT, priorities_N, shared, by_s2l, groups.num_clusters, sources_N, columns), rows


def _has_sources(store: TrajectoryStore) -> bool:
    return "source" in store.names and len(store.names_of("source")) > 1


def sharing_of(groups: Groups, config: SelectionConfig) -> Sharing:
    """How a budget is shared over these groups."""
    return Sharing(
        groups.sizes_K,
        groups.topmost_strata,
        groups.parents,
        config.defer_groups_up_to,
        config.allocation,
        config.allocation_of_strata,
    )


def random_rows(store: TrajectoryStore, assigned: Assignments, count: int, seed: int) -> pa.Table:
    """The random control, as `Subset.rows`: the examples of lowest priority under another seed, with memory for them only."""
    cut = np.uint64(priority_cut(count, len(store)))

    def low(block: pa.Table) -> pa.Table:
        return block.take(pa.array(np.flatnonzero(block["priority"].to_numpy() <= cut)))

    table = pa.concat_tables(_PoolRows(store, assigned, f"random-{seed}").each(low)).combine_chunks()
    return table.take(pa.array(np.sort(np.argsort(table["priority"].to_numpy(), kind="stable")[:count])))


def stability(clustering: Artifact, groups: Groups, config: SelectionConfig, num_chosen: int) -> dict[str, Any] | None:
    """How much of a subset of `num_chosen` examples stays the same when the grouping starts from another seed: the mean share
    that the subsets of two restarts have in common, on a sample. None for one restart, for levels of groups (of which the
    restarts have the lowest alone), for draws that go by distances and for methods that do not share over groups.

    The priorities inside the groups stay the same, so that much would be common for any groups: `without_groups` is the
    share that the rows of lowest priority, without any groups, have in common with these subsets.
    """
    if RESTARTS not in clustering.manifest["files"] or groups.parents or config.draw != "random" or config.method != S2L:
        return None
    table = clustering.read_table(RESTARTS)
    order_N = priorities(table["example_id"], config.seed)
    count = int(num_chosen / groups.num_rows * len(table))
    if not 0 < count < len(table):
        return None
    num_clusters = int(clustering.manifest["recipe"]["num_clusters"])
    strata_K = np.repeat(np.arange(len(groups.strata)), num_clusters) if groups.is_stratified else None
    subsets = [
        select_rows(
            table[name].to_numpy(),
            order_N,
            count,
            strata_K=strata_K,
            defer_up_to=config.defer_groups_up_to,
            allocation=config.allocation,
            allocation_of_strata=config.allocation_of_strata,
        )
        for name in table.column_names[1:]
    ]
    lowest = np.argsort(order_N, kind="stable")[:count]
    return {
        "rows": len(table),
        "chosen": count,
        "common": round(mean_overlap(subsets), 4),
        "without_groups": round(float(np.mean([mean_overlap([lowest, subset]) for subset in subsets])), 4),
    }


@dataclass(frozen=True)
class _PoolRows:
    """The rows to choose from, block by block, with their groups and priorities; as keys the distances, if they count."""

    store: TrajectoryStore
    assigned: Assignments
    seed: int | str
    """Of the priorities."""

    by_distance: bool = False

    def blocks(self) -> Iterator[pa.Table]:
        """All of them in this process."""
        for block, found in zip(read_ahead(self.store.blocks(*_POOL_COLUMNS)), self.assigned(), strict=True):
            yield self._of(block, *found)

    def each(self, function: Callable[[pa.Table], Any]) -> Iterable[Any]:
        """What a function returns for each block; where rows and groups are in files, in tasks."""
        if not (isinstance(self.store, RangedStore) and isinstance(self.assigned, PartAssignments)):
            return map(function, self.blocks())
        self.assigned.check()
        store = replace(self.store, measurements={}, lowest=None)
        there = replace(self, store=store, assigned=replace(self.assigned, store=store))
        found = store.each_stretch(_EachOfPool(there, function), _POOL_COLUMNS, BLOCKS_PER_PART)
        return itertools.chain.from_iterable(found)

    def of_part(self, first: int, blocks: list[pa.Table]) -> Iterator[pa.Table]:
        """The blocks of a part of the groups, from number `first` on."""
        assert isinstance(self.assigned, PartAssignments)
        for block, found in zip(blocks, self.assigned.of_part(first // BLOCKS_PER_PART, blocks), strict=True):
            yield self._of(block, *found)

    def _of(self, block: pa.Table, labels_M: Ints, distances_M: Floats) -> pa.Table:
        store, order_M = self.store, self.store.priorities(block, self.seed)
        columns = {"example_id": block["example_id"], "cluster_id": labels_M, "priority": order_M}
        if self.by_distance:  # bits of floats above zero ascend as they do; of equally far rows the lower priority is first
            far_M = np.ascontiguousarray(distances_M, np.float32).view(np.uint32).astype(np.uint64)
            columns["key"] = far_M << np.uint64(32) | order_M >> np.uint64(32)
        columns |= {name: block[name] for name in ("position", NUM_RESPONSE_TOKENS) if store.has(name)}
        if "source" in store.names:
            columns["source"] = store.codes(block, "source")
        return pa.table(columns)


@dataclass(frozen=True)
class _EachOfPool:
    """Task: what a function returns for each block of a part."""

    pool: _PoolRows
    function: Callable[[pa.Table], Any]

    def __call__(self, first: int, blocks: list[pa.Table]) -> list[Any]:
        return [self.function(block) for block in self.pool.of_part(first, blocks)]


def _subset(budget: Budget, rows: pa.Table, groups: Groups, rows_KS: Integers | None) -> Subset:
    cluster_ids_M = rows["cluster_id"].to_numpy()
    quotas_K = np.bincount(cluster_ids_M, minlength=groups.num_clusters)
    if rows_KS is None:
        weights_M = groups.sizes_K[cluster_ids_M] / quotas_K[cluster_ids_M]
        if groups.parents:
            weights_M *= _stood_for(groups, quotas_K)[cluster_ids_M]
    else:
        weights_M = _weights_by_source(rows, rows_KS)
    ids = one_array(rows["example_id"])
    rows = rows.drop_columns(["priority"]).set_column(0, "example_id", ids)
    return Subset(Selection(ids, cluster_ids_M, weights_M, quotas_K, groups.sizes_K, budget), rows)


def _stood_for(groups: Groups, quotas_K: Integers) -> NDArray[np.float64]:
    """How many rows a row of each group stands for, shape (K,): more than one where groups beside it, in the same group of
    groups, give none. A group of groups has few rows to share however many groups it has."""
    factors_K, nodes_K = np.ones(len(quotas_K)), np.arange(len(quotas_K))
    sizes, taken = groups.sizes_K, quotas_K
    for parents in groups.parents:
        all_rows = np.bincount(parents, sizes)
        reached = np.bincount(parents, np.where(taken > 0, sizes, 0))
        factors_K *= (all_rows / np.maximum(reached, 1))[parents][nodes_K]
        sizes, taken, nodes_K = all_rows, np.bincount(parents, taken), parents[nodes_K]
    return factors_K


def _weights_by_source(chosen: pa.Table, rows_KS: Integers) -> NDArray[np.float64]:
    """Weights where some sources were preferred: an example stands for its source's rows in its group, and all chosen of a
    group together for the whole group, those of sources without a chosen example included."""
    cluster_ids_M, sources_M = chosen["cluster_id"].to_numpy(), chosen["source"].to_numpy()
    chosen_KS = _by_group_and_source(chosen, (rows_KS.shape[0], rows_KS.shape[1]))
    reached_K = np.where(chosen_KS > 0, rows_KS, 0).sum(axis=1)
    scale_K = rows_KS.sum(axis=1) / np.maximum(reached_K, 1)
    return np.asarray(rows_KS[cluster_ids_M, sources_M] / chosen_KS[cluster_ids_M, sources_M] * scale_K[cluster_ids_M])


def _by_group_and_source(rows: pa.Table, shape: tuple[int, int]) -> Integers:
    """How many rows are in each group and source."""
    return contingency(rows["cluster_id"].to_numpy(), rows["source"].to_numpy(), shape)
