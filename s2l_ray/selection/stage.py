"""Groups + budget -> subset: equal shares of every group, small groups first (METHOD, "Algorithm", step 4).

The selection is the first B of *one order*: (rank inside the group, larger group first, larger cluster id first), a
round-robin over the groups. It gives the quotas of water-filling, so a smaller budget is contained in a larger one, and
a budget in tokens is the longest prefix that fits. With strata the round-robin runs over the strata, each in its own
such order (the reference code). Inside a group the order is that of the hash priorities, which no row's position
decides.

Memory is for the subset only: how many rows each group gives is known from the sizes, and below which priority they lie
is known to a few rows, since priorities are uniform. So one pass over the rows keeps little more than what is chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from s2l_ray.clustering import diagnostics as quality
from s2l_ray.clustering.grouping import Groups
from s2l_ray.clustering.stage import cluster_store, read_groups
from s2l_ray.config import ClusteringConfig, SelectionConfig, checked
from s2l_ray.config.recipes import counts_target_tokens
from s2l_ray.errors import ConfigError, DataError
from s2l_ray.examples.ids import priorities, priority_cut
from s2l_ray.examples.reading import fetch_rows
from s2l_ray.progress import get_log
from s2l_ray.runtime.session import connect_ray
from s2l_ray.storage.artifacts import Artifact
from s2l_ray.storage.drafts import Draft
from s2l_ray.storage.layout import RANDOM, RESTARTS, SELECTED
from s2l_ray.storage.stages import Context
from s2l_ray.trajectories.files import streamed
from s2l_ray.trajectories.sorting import SortedTable, sort_by_id
from s2l_ray.trajectories.store import BLOCK_ROWS, TOKENS, Trajectories, TrajectoryStore

_BLOCK_BYTES = 64 * 2**20
_NO_TOKENS = f"selection.budget: a budget in tokens needs the column {TOKENS}. Add it, or give a number of examples."
_log = get_log("selection")

Integers = NDArray[np.int64]
Budget = int | float | dict[str, int]


@dataclass(frozen=True, eq=False)
class Selection:
    """A balanced subset of M examples, in ascending order of ids."""

    example_ids: pa.Array
    """string or int64, shape (M,)."""

    cluster_ids_M: NDArray[np.int32]
    weights_M: NDArray[np.float64]
    """Size of the example's group over its quota: with these weights the subset's gradient estimates the pool's. With a
    minimum per source: the same for the rows of its source in its group (see `_weights_by_source`)."""

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


def select(
    losses: Any,
    *,
    budget: Budget,
    num_clusters: int = 100,
    seed: int = 0,
    num_iterations: int = 20,
    num_restarts: int = 3,
    features: str = "raw",
    stratify_by: Any = None,
    sources: Any = None,
    example_ids: Any = None,
    num_response_tokens: Any = None,
    defer_groups_up_to: int = 0,
    min_per_source: int = 0,
) -> Selection:
    """A balanced subset of examples by the losses of a small model: grouped by k-means, then an equal share of each group.

    `losses` is anything of shape (N, T); ids are row numbers unless given. `budget` is a number of examples, a fraction
    of N below 1, or `{"tokens": n}`, which needs `num_response_tokens` (one per row). `stratify_by` (one value per row)
    makes `num_clusters` groups in each stratum and shares the budget over the strata first. `sources` (one per row) are
    for `min_per_source`; without them the strata are the sources. `seed` feeds both steps.

    Raises DataError naming the ids of ragged, missing or non-finite losses, ConfigError for an argument out of range.
    """
    config = checked(
        SelectionConfig, budget=budget, defer_groups_up_to=defer_groups_up_to, min_per_source=min_per_source, seed=seed
    )
    grouping = checked(
        ClusteringConfig,
        num_clusters=num_clusters,
        num_iterations=num_iterations,
        num_restarts=num_restarts,
        features=features,
        stratify_by=None if stratify_by is None else "stratum",
        seed=seed,
    )
    named = {} if stratify_by is None else {"stratum": stratify_by}
    found = Trajectories.of(losses, example_ids, stratify_by if sources is None else sources, num_response_tokens, named)
    store = TrajectoryStore.of(found, seed)
    groups = cluster_store(store, grouping)
    return _choose(store, lambda: _slices(groups.cluster_ids_N), groups, config)[0].selection


def water_fill(sizes: Sequence[int] | Integers, budget: int, *, defer_up_to: int = 0) -> Integers:
    """How many examples each group gets, in the order given (METHOD, step 4).

    Groups are visited by (size, position) ascending, and each gets floor(remaining / groups left) or all it has; groups
    of at most `defer_up_to` come last. The sum is `budget`, or all there is if that is less.

    Raises ConfigError for a negative budget.
    """
    if budget < 0:
        raise ConfigError(f"selection.budget: must be above 0, found {budget}.")
    sizes_K = np.asarray(sizes, np.int64)
    quotas_K = np.zeros_like(sizes_K)
    for group in (sizes_K > defer_up_to, sizes_K <= defer_up_to):
        members = np.flatnonzero(group)
        remaining = budget - int(quotas_K.sum())
        for visited, cluster_id in enumerate(members[np.argsort(sizes_K[members], kind="stable")]):
            quotas_K[cluster_id] = min(sizes_K[cluster_id], remaining // (len(members) - visited))
            remaining -= int(quotas_K[cluster_id])
    return quotas_K


def quotas(sizes_K: Integers, budget: int, *, strata_K: Integers | None = None, defer_up_to: int = 0) -> Integers:
    """How many examples each group gets where the budget is shared over the strata first."""
    if strata_K is None:
        return water_fill(sizes_K, budget, defer_up_to=defer_up_to)
    quotas_K = np.zeros_like(sizes_K)
    # Strata without rows are none: their names were seen elsewhere.
    of_strata = water_fill(np.bincount(strata_K, sizes_K).astype(np.int64), budget)
    for stratum, share in enumerate(of_strata):
        members = np.flatnonzero(strata_K == stratum)
        quotas_K[members] = water_fill(sizes_K[members], int(share), defer_up_to=defer_up_to)
    return quotas_K


def selection_order(
    cluster_ids_N: NDArray[np.integer[Any]],
    priorities_N: NDArray[np.uint64],
    *,
    sizes_K: Integers | None = None,
    strata_K: Integers | None = None,
    defer_up_to: int = 0,
) -> Integers:
    """All rows in the order in which they are taken, shape (N,); among equal priorities the first row comes first.

    Groups of at most `defer_up_to` rows come after all others (of their stratum). `strata_K` is the stratum of each group.
    Where only some rows of each group are given, those of lowest priority, `sizes_K` are the sizes of the whole groups.
    """
    if sizes_K is None:
        sizes_K = np.bincount(cluster_ids_N)
    ranks_N = _ranks(cluster_ids_N, priorities_N)
    turns_N = _turns(sizes_K)[cluster_ids_N]
    is_deferred_N = (sizes_K <= defer_up_to)[cluster_ids_N]
    order_N = np.lexsort((turns_N, ranks_N, is_deferred_N))
    if strata_K is None:
        return order_N
    strata_K = np.asarray(strata_K)
    strata_N = strata_K[cluster_ids_N]
    places_N = np.empty_like(order_N)
    places_N[order_N] = np.arange(len(order_N))
    return np.lexsort((_turns(np.bincount(strata_K, sizes_K))[strata_N], _ranks(strata_N, places_N)))


def _ranks(groups_N: NDArray[Any], keys_N: NDArray[Any]) -> Integers:
    """Each row's rank by key inside its group, from 0; of equal keys the first row comes first."""
    order_N = np.lexsort((keys_N, groups_N))
    sizes_K = np.bincount(groups_N)
    ranks_N = np.empty(len(order_N), np.int64)
    ranks_N[order_N] = np.arange(len(order_N)) - np.repeat(np.cumsum(sizes_K) - sizes_K, sizes_K)
    return ranks_N


def _turns(sizes_K: NDArray[Any]) -> Integers:
    """When each group's turn comes in a round: larger groups first, of equal ones the larger id."""
    turns_K = np.empty(len(sizes_K), np.int64)
    turns_K[np.argsort(sizes_K, kind="stable")[::-1]] = np.arange(len(sizes_K))
    return turns_K


def select_rows(
    cluster_ids_N: NDArray[np.integer[Any]],
    priorities_N: NDArray[np.uint64],
    budget: Budget,
    *,
    strata_K: Integers | None = None,
    defer_up_to: int = 0,
    num_response_tokens_N: NDArray[np.integer[Any]] | None = None,
) -> Integers:
    """Rows of a balanced selection: the first `budget` of `selection_order`, or all if there are fewer. Ascending.

    Raises ConfigError for a budget that takes nothing, or in tokens where token counts are unknown.
    """
    columns = {"cluster_id": cluster_ids_N, "priority": priorities_N, "row": np.arange(len(cluster_ids_N))}
    if num_response_tokens_N is not None:
        columns["num_response_tokens"] = num_response_tokens_N
    sizes_K = np.bincount(cluster_ids_N, minlength=0 if strata_K is None else len(strata_K))
    chosen = choose(lambda: [pa.table(columns)], sizes_K, [budget], strata_K=strata_K, defer_up_to=defer_up_to)[0]
    return np.asarray(chosen["row"].to_numpy())


def choose(
    rows: Callable[[], Iterable[pa.Table]],
    sizes_K: Integers,
    budgets: Sequence[Budget],
    *,
    strata_K: Integers | None = None,
    defer_up_to: int = 0,
    sizes_S: Integers | None = None,
    min_per_source: int = 0,
) -> list[pa.Table]:
    """The chosen rows for each budget, in the order in which `rows` gives them; one contains the smaller.

    `rows()` streams the pool in tables of `cluster_id`, `priority`, for budgets in tokens `num_response_tokens`, for
    `min_per_source` a `source` (a number), and whatever else shall come along. It is called again where a first guess
    of how many rows a budget in tokens takes was too low. With `min_per_source` the rows of lowest priority of each
    source come first, then all others in their order.

    Raises ConfigError for a budget that takes nothing or less than the minimum of every source, or in tokens where
    token counts are unknown.
    """
    num_rows = int(sizes_K.sum())
    largest = _first_guess(rows, budgets, num_rows)
    margin = 6.0
    while True:
        quotas_K = quotas(sizes_K, largest, strata_K=strata_K, defer_up_to=defer_up_to)
        cuts_K = _cuts(quotas_K, sizes_K, margin)
        cuts_S = _cuts(np.minimum(sizes_S, min_per_source), sizes_S, margin) if min_per_source and sizes_S is not None else None
        found = pa.concat_tables([_below(block, cuts_K, cuts_S) for block in rows()]).combine_chunks()
        cluster_ids_M, priorities_M = found["cluster_id"].to_numpy(), found["priority"].to_numpy()
        complete_K = np.bincount(cluster_ids_M[priorities_M <= cuts_K[cluster_ids_M]], minlength=len(sizes_K))
        short = (complete_K < quotas_K).any()
        if cuts_S is not None and sizes_S is not None:
            sources_M = found["source"].to_numpy()
            complete_S = np.bincount(sources_M[priorities_M <= cuts_S[sources_M]], minlength=len(sizes_S))
            short |= (complete_S < np.minimum(sizes_S, min_per_source)).any()
        if short:  # once in a billion
            margin *= 4
            continue
        order_M = selection_order(cluster_ids_M, priorities_M, sizes_K=sizes_K, strata_K=strata_K, defer_up_to=defer_up_to)
        if cuts_S is not None:
            is_first_M = _ranks(found["source"].to_numpy(), priorities_M) < min_per_source
            num_first = int(is_first_M.sum())
            order_M = order_M[np.argsort(~is_first_M[order_M], kind="stable")]
        else:
            num_first = 0
        taken = [_prefix(budget, found, order_M[:largest], num_rows, num_first) for budget in budgets]
        if all(count is not None for count in taken):
            return [found.take(pa.array(np.sort(order_M[:count]))) for count in taken]
        largest = min(num_rows, 2 * largest)


def _first_guess(rows: Callable[[], Iterable[pa.Table]], budgets: Sequence[Budget], num_rows: int) -> int:
    """Examples that the largest budget takes: exactly, but for budgets in tokens."""
    largest = max((_num_examples(b, num_rows, quietly=True) for b in budgets if not isinstance(b, dict)), default=0)
    tokens = max((budget["tokens"] for budget in budgets if isinstance(budget, dict)), default=0)
    if not tokens:
        return largest
    total = 0
    for block in rows():
        if "num_response_tokens" not in block.column_names:
            raise ConfigError(_NO_TOKENS)
        total += int(block["num_response_tokens"].to_numpy().sum(dtype=np.int64))
    return max(largest, min(num_rows, int(1.1 * num_rows * tokens / max(total, 1)) + 1_000))


def _cuts(wanted_K: Integers, sizes_K: Integers, margin: float) -> NDArray[np.uint64]:
    """For each group a priority below which so many of its rows lie (almost surely), and few more."""
    return np.array([priority_cut(int(w), int(n), margin) for w, n in zip(wanted_K, sizes_K, strict=True)], np.uint64)


def _below(block: pa.Table, cuts_K: NDArray[np.uint64], cuts_S: NDArray[np.uint64] | None) -> pa.Table:
    """The rows of a block whose priority is below that of their group, or of their source."""
    priorities_M = block["priority"].to_numpy()
    is_low = priorities_M <= cuts_K[block["cluster_id"].to_numpy()]
    if cuts_S is not None:
        is_low |= priorities_M <= cuts_S[block["source"].to_numpy()]
    return block.take(pa.array(np.flatnonzero(is_low)))


def _prefix(budget: Budget, found: pa.Table, order_M: Integers, num_rows: int, num_first: int) -> int | None:
    """How many rows of the order a budget takes; None where the order, known so far only, ends before it."""
    if not isinstance(budget, dict):
        count = _num_examples(budget, num_rows)
    else:
        totals_M = np.cumsum(found["num_response_tokens"].to_numpy()[order_M], dtype=np.int64)
        count = int(np.searchsorted(totals_M, budget["tokens"], side="right"))
        if count == 0:
            raise ConfigError(
                f"selection.budget: {budget['tokens']:,} tokens are fewer than the first example's {totals_M[0]:,}."
            )
        if count == len(order_M) < num_rows:
            return None
        if count == num_rows and totals_M[-1] < budget["tokens"]:
            _log.warning(
                "the budget of %s tokens is above the %s there are: all are taken", f"{budget['tokens']:,}", f"{totals_M[-1]:,}"
            )
    if count < num_first:
        raise ConfigError(
            f"selection.min_per_source: the minimum of every source is {num_first:,} examples together, the budget {budget} "
            f"takes {count:,}. Lower min_per_source or raise the budget."
        )
    return count


def _num_examples(budget: int | float, num_rows: int, *, quietly: bool = False) -> int:
    """A budget in examples: a fraction is rounded down in decimal (0.29 of 100 is 29), to one example at least."""
    if budget <= 0:
        raise ConfigError(f"selection.budget: must be above 0, found {budget}.")
    if budget < 1:
        return max(1, int(Decimal(str(budget)) * num_rows))
    if budget > num_rows and not quietly:
        _log.warning("the budget of %s examples is above the %s there are: all are taken", f"{budget:,}", f"{num_rows:,}")
    return min(int(budget), num_rows)


@dataclass(frozen=True)
class _Chosen:
    """A selection with what is known of its rows."""

    selection: Selection
    rows: pa.Table
    """`example_id`, `position`, `cluster_id`, and where they are known `source` and `num_response_tokens`."""


def _choose(
    store: TrajectoryStore, labels: Callable[[], Iterator[NDArray[np.int32]]], groups: Groups, config: SelectionConfig
) -> list[_Chosen]:
    """The selections for the budget and for the further ones."""
    budgets: list[Budget] = [config.budget, *config.more_budgets]  # type: ignore[list-item]
    has_sources = "source" in store.names
    check_columns(config, store)

    def rows() -> Iterator[pa.Table]:
        return _pool(store, labels(), lambda block: store.priorities(block, config.seed))

    tables = choose(
        rows,
        groups.sizes_K,
        budgets,
        strata_K=groups.strata_K,
        defer_up_to=config.defer_groups_up_to,
        sizes_S=store.counts_of("source") if has_sources and config.min_per_source else None,
        min_per_source=config.min_per_source,
    )
    cells_KS = None
    if config.min_per_source:
        shape = (groups.num_clusters, len(store.names_of("source")))
        cells_KS = np.zeros(shape, np.int64)
        for block in rows():
            cells_KS += quality.contingency(block["cluster_id"].to_numpy(), block["source"].to_numpy(), shape)
    chosen = []
    for budget, table in zip(budgets, tables, strict=True):
        cluster_ids_M = table["cluster_id"].to_numpy()
        quotas_K = np.bincount(cluster_ids_M, minlength=groups.num_clusters)
        weights_M = groups.sizes_K[cluster_ids_M] / quotas_K[cluster_ids_M]
        if cells_KS is not None:
            weights_M = _weights_by_source(cluster_ids_M, table["source"].to_numpy(), cells_KS)
        ids = table["example_id"].combine_chunks()
        chosen.append(_Chosen(Selection(ids, cluster_ids_M, weights_M, quotas_K, groups.sizes_K, budget), table))
    return chosen


def _pool(
    store: TrajectoryStore, labels: Iterator[NDArray[np.int32]], order: Callable[[pa.Table], NDArray[np.uint64]]
) -> Iterator[pa.Table]:
    """The rows to choose from, block by block, with their groups and what `order` says are their priorities."""
    wanted = ("example_id", "priority", "source", TOKENS, "position")
    for block, labels_M in zip(store.blocks(*wanted), labels, strict=True):
        columns = {"example_id": block["example_id"], "cluster_id": labels_M, "priority": order(block)}
        columns |= {name: block[name] for name in ("position", TOKENS) if store.has(name)}
        if "source" in store.names:
            columns["source"] = store.codes(block, "source")
        yield pa.table(columns)


def _weights_by_source(cluster_ids_M: NDArray[Any], sources_M: NDArray[Any], cells_KS: Integers) -> NDArray[np.float64]:
    """Weights where some sources were preferred: an example stands for its source's rows in its group, and all chosen of a
    group together for the whole group, those of sources without a chosen example included."""
    chosen_KS = quality.contingency(cluster_ids_M, sources_M, (cells_KS.shape[0], cells_KS.shape[1]))
    reached_K = np.where(chosen_KS > 0, cells_KS, 0).sum(axis=1)
    scale_K = cells_KS.sum(axis=1) / np.maximum(reached_K, 1)
    return np.asarray(cells_KS[cluster_ids_M, sources_M] / chosen_KS[cluster_ids_M, sources_M] * scale_K[cluster_ids_M])


def check_columns(config: SelectionConfig, store: TrajectoryStore) -> None:
    """Raise ConfigError where a budget or a minimum needs a column that is not there: before anything is grouped."""
    if config.min_per_source and "source" not in store.names:
        raise ConfigError("selection.min_per_source: these trajectories have no column source. Add it, or leave this out.")
    if any(isinstance(budget, dict) for budget in (config.budget, *config.more_budgets)) and not store.has(TOKENS):
        raise ConfigError(_NO_TOKENS)


def _slices(values_N: NDArray[Any]) -> Iterator[NDArray[Any]]:
    for start in range(0, len(values_N), BLOCK_ROWS):
        yield values_N[start : start + BLOCK_ROWS]


def _labels(clustering: Artifact, store: TrajectoryStore) -> Iterator[NDArray[np.int32]]:
    """The groups of the store's rows, block by block. Raises DataError where the clustering is of other examples."""

    def assignments() -> Iterator[pa.RecordBatch]:
        for part in clustering.parts("assignments-"):
            yield from clustering.read_table(part, columns=["example_id", "cluster_id"]).to_batches()

    found = SortedTable.joined(assignments(), BLOCK_ROWS)
    for block in store.blocks("example_id"):
        table = next(found, None)
        if table is None or not table["example_id"].equals(block["example_id"]):
            raise DataError("the clustering is of other examples than the trajectories. Build clustering again.")
        yield table["cluster_id"].to_numpy()
    if next(found, None) is not None:
        raise DataError("the clustering is of more examples than the trajectories. Build clustering again.")


def _random_rows(store: TrajectoryStore, labels: Iterator[NDArray[np.int32]], count: int, seed: int) -> pa.Table:
    """The random control: the examples of lowest priority under another seed, with memory for them only."""
    rows = _pool(store, labels, lambda block: priorities(block["example_id"], f"random-{seed}"))
    cut = np.uint64(priority_cut(count, len(store)))
    found = [block.take(pa.array(np.flatnonzero(block["priority"].to_numpy() <= cut))) for block in rows]
    table = pa.concat_tables(found).combine_chunks()
    return table.take(pa.array(np.sort(np.argsort(table["priority"].to_numpy(), kind="stable")[:count])))


FetchRows = Callable[[pa.Array, NDArray[np.int64]], Iterator[pa.Table]]
"""Gives the corpus's own columns of some examples, by their (ascending) ids and their numbers in the files: tables of
`example_id` and `row` (a struct), in any order."""


def build(context: Context) -> Artifact:
    """Choose a run's subset and publish it (see `publish_selection`)."""
    config, inputs, draft = context.config, context.inputs, context.draft
    with streamed(inputs["trajectories"], draft.storage, seed=config.selection.seed) as (found, scratch):
        store = found
        if counts_target_tokens(config):
            from s2l_ray.training.token_parts import count_response_tokens

            connect_ray()
            store = store.with_tokens(lambda ids: count_response_tokens(config, inputs, ids))
        return publish_selection(
            config.selection,
            store,
            inputs["clustering"],
            lambda ids, _numbers: fetch_rows(inputs["examples"], ids),
            scratch,
            draft,
            random_control=config.evaluation.random_control,
        )


def publish_selection(
    config: SelectionConfig,
    store: TrajectoryStore,
    clustering: Artifact,
    fetch_rows: FetchRows,
    scratch: Path,
    draft: Draft,
    *,
    random_control: bool = False,
) -> Artifact:
    """Choose the subset and publish `selected.parquet` (and `random.parquet`): the rows as they were + our columns.

    Each of `config.more_budgets` gets a file of its own, named in the summary. Texts are streamed: memory is for ids.
    """
    groups = read_groups(clustering)
    chosen = _choose(store, lambda: _labels(clustering, store), groups, config)
    largest = max(chosen, key=lambda one: len(one.selection))
    files = [SELECTED, *(f"selected-{_file_name(one.selection.budget)}.parquet" for one in chosen[1:])]
    with ThreadPoolExecutor(2) as pool:
        rows = _Rows.fetch(largest.rows, fetch_rows, scratch / "selected", pool)
        for path, one in zip(files, chosen, strict=True):
            weights = pa.array(one.selection.weights_M)
            draft.write_tables(path, rows.with_ours(one.rows["example_id"], one.rows["cluster_id"], weights))
        control = None
        if random_control:
            control = _random_rows(store, _labels(clustering, store), len(chosen[0].selection), config.seed)
            control_rows = _Rows.fetch(control, fetch_rows, scratch / "random", pool)
            weights = pa.array(np.full(len(control), len(store) / len(control)))
            draft.write_tables(RANDOM, control_rows.with_ours(control["example_id"], control["cluster_id"], weights))
    summary = _summary(store, chosen[0], control) | {"columns": rows.names}
    summary["stability"] = _stability(clustering, groups, config, chosen[0].selection)
    summary["budgets"] = [
        {"budget": one.selection.budget, "rows": len(one.selection), "file": path}
        for path, one in zip(files, chosen, strict=True)
    ]
    for one in chosen:
        _log.info(
            "%s of %s examples from %d groups (quotas %s to %s)",
            *(f"{len(one.selection):,}", f"{len(store):,}", groups.num_clusters),
            *(f"{one.selection.quotas_K.min():,}", f"{one.selection.quotas_K.max():,}"),
        )
    return draft.publish(summary)


def _file_name(budget: Budget) -> str:
    return f"tokens-{budget['tokens']}" if isinstance(budget, dict) else str(budget)


@dataclass(frozen=True)
class _Rows:
    """Rows of the corpus in ascending order of ids, on disk, and what our columns are called beside theirs."""

    ids: pa.Array
    table: SortedTable
    names: dict[str, str]

    @classmethod
    def fetch(cls, chosen: pa.Table, fetch_rows: FetchRows, scratch: Path, pool: ThreadPoolExecutor) -> _Rows:
        ids = chosen["example_id"].combine_chunks()
        numbers = chosen["position"].to_numpy() if "position" in chosen.column_names else np.arange(len(ids))
        table = sort_by_id(fetch_rows(ids, numbers), scratch, pool)
        assert table.num_rows == len(ids), "fetch_rows left out rows"
        corpus = [field.name for field in table.schema.field("row").type]
        names = {}
        for name in ("example_id", "cluster_id", "weight"):
            names[name] = name
            if name == "example_id" and cls._has_our_ids(table):
                continue
            while names[name] in corpus:
                names[name] = f"_{names[name]}"
        return cls(ids, table, names)

    @staticmethod
    def _has_our_ids(table: SortedTable) -> bool:
        """Whether the corpus's own `example_id` is ours, in whichever width of integer or kind of string."""
        row = table.schema.field("row").type
        if row.get_field_index("example_id") < 0:
            return False
        blocks = table.blocks(table.rows_of(_BLOCK_BYTES, BLOCK_ROWS))
        return all(_are_the_ids(_flat(block["row"]), block["example_id"].combine_chunks()) for block in blocks)

    def with_ours(self, ids: pa.ChunkedArray, cluster_ids: pa.ChunkedArray, weights: pa.Array) -> Iterator[pa.Table]:
        """Those rows that have these ids, with our columns behind the corpus's."""
        ours = {"example_id": ids, "cluster_id": cluster_ids, "weight": weights}
        is_own = len(ids) == len(self.ids)
        is_chosen_N = None if is_own else pc.is_in(self.ids, value_set=ids.combine_chunks()).to_numpy(zero_copy_only=False)
        start = done = 0
        for block in self.table.blocks(self.table.rows_of(_BLOCK_BYTES, BLOCK_ROWS)):
            rows = _flat(block["row"])
            if is_chosen_N is not None:
                rows = rows.filter(pa.array(is_chosen_N[start : start + len(block)]))
            start += len(block)
            for name, values in ours.items():
                if self.names[name] not in rows.column_names:
                    rows = rows.append_column(self.names[name], values[done : done + len(rows)])
            done += len(rows)
            yield rows


def _flat(rows: pa.ChunkedArray) -> pa.Table:
    return pa.Table.from_struct_array(rows.combine_chunks())


def _stability(clustering: Artifact, groups: Groups, config: SelectionConfig, selection: Selection) -> dict[str, Any] | None:
    """How much of the subset stays the same when the grouping starts from another seed, on a sample: the mean share of
    examples that the subsets of two restarts have in common. None for one restart.

    The draws inside the groups stay the same, so that much would be common whatever the groups: beside it stands the share
    that the same draws without any groups have in common with these subsets.
    """
    if RESTARTS not in clustering.manifest["files"]:
        return None
    table = clustering.read_table(RESTARTS)
    order_N = priorities(table["example_id"], config.seed)
    fraction = len(selection) / groups.num_rows
    count = int(fraction * len(table))
    if not 0 < count < len(table):
        return None
    num_clusters = int(clustering.manifest["recipe"]["num_clusters"])
    strata_K = np.repeat(np.arange(len(groups.strata)), num_clusters) if groups.is_stratified else None
    drawn = np.argsort(order_N, kind="stable")[:count]
    subsets = []
    for name in table.column_names[1:]:
        labels_N = table[name].to_numpy()
        rows = select_rows(labels_N, order_N, count, strata_K=strata_K, defer_up_to=config.defer_groups_up_to)
        subsets.append(rows)
    return {
        "rows": len(table),
        "chosen": count,
        "common": round(quality.mean_overlap(subsets), 4),
        "without_groups": round(float(np.mean([quality.mean_overlap([drawn, subset]) for subset in subsets])), 4),
    }


def _are_the_ids(rows: pa.Table, ids: pa.Array) -> bool:
    """Whether the corpus's own `example_id` is ours, in whichever width of integer or kind of string."""
    if "example_id" not in rows.column_names:
        return False
    own = rows["example_id"]
    if pa.types.is_integer(own.type) != pa.types.is_integer(ids.type) or pa.types.is_nested(own.type):
        return False
    try:
        return bool(own.cast(ids.type).combine_chunks().equals(ids))
    except pa.ArrowException:
        return False


def _summary(store: TrajectoryStore, chosen: _Chosen, control: pa.Table | None) -> dict[str, Any]:
    """What the manifest and the report say; `random` is null where there is no random control."""
    selection = chosen.selection
    names = store.names_of("source") if "source" in store.names else []

    def counts(rows: pa.Table | None) -> list[int] | None:
        return None if rows is None else np.bincount(rows["source"].to_numpy(), minlength=len(names)).tolist()

    def tokens(tables: Iterable[pa.Table] | None) -> int | None:
        if tables is None or not store.has("num_response_tokens"):
            return None
        return sum(int(table["num_response_tokens"].to_numpy().sum(dtype=np.int64)) for table in tables)

    pool = store.counts_of("source").tolist() if names else []
    selected, random = (counts(chosen.rows), counts(control)) if names else ([], None)
    return {
        "rows": len(selection),
        "pool": len(store),
        "budget": selection.budget,
        "num_clusters": len(selection.sizes_K),
        "sizes": selection.sizes_K.tolist(),
        "quotas": selection.quotas_K.tolist(),
        "sources": {
            name: {"pool": pool[code], "selected": selected[code], "random": None if random is None else random[code]}
            for code, name in enumerate(names)
            if selected is not None
        },
        "num_response_tokens": {
            "pool": tokens(store.blocks("num_response_tokens")),
            "selected": tokens([chosen.rows]),
            "random": tokens(None if control is None else [control]),
        },
    }


def read_selection(artifact: Artifact) -> Selection:
    """The subset in a `selection/` directory. Raises ArtifactError naming a damaged file."""
    summary = artifact.summary
    names = summary["columns"]
    table = artifact.read_table(SELECTED, columns=list(names.values())).combine_chunks()
    ids = table[names["example_id"]].combine_chunks()
    return Selection(
        example_ids=ids.cast(pa.int64() if pa.types.is_integer(ids.type) else pa.string()),
        cluster_ids_M=table[names["cluster_id"]].to_numpy(),
        weights_M=table[names["weight"]].to_numpy(),
        quotas_K=np.asarray(summary["quotas"]),
        sizes_K=np.asarray(summary["sizes"]),
        budget=summary["budget"],
    )
