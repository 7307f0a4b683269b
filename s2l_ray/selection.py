"""Groups + budget -> subset: equal shares of every group, small groups first (METHOD, "Algorithm", step 4).

The selection is the first B of *one order*: (rank inside the group, larger group first, larger cluster id first), a
round-robin over the groups. It gives the quotas of water-filling, so a smaller budget is contained in a larger one, and
a budget in tokens is the longest prefix that fits. With strata the round-robin runs over the strata, each in its own
such order (the reference code). Inside a group the order is that of the hash priorities, which no row's position
decides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from s2l_ray.artifacts import Artifact, Draft
from s2l_ray.clustering import Clustering, cluster_trajectories
from s2l_ray.config import ClusteringConfig, SelectionConfig, checked
from s2l_ray.errors import ConfigError, DataError
from s2l_ray.progress import get_log
from s2l_ray.trajectory_store import Trajectories, priorities

SELECTED = "selected.parquet"
RANDOM = "random.parquet"
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
    """Size of the example's group over its quota: with these weights the subset's gradient estimates the pool's."""

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
    stratify_by: Any = None,
    example_ids: Any = None,
    num_response_tokens: Any = None,
    defer_groups_up_to: int = 0,
) -> Selection:
    """A balanced subset of examples by the losses of a small model: grouped by k-means, then an equal share of each group.

    `losses` is anything of shape (N, T); ids are row numbers unless given. `budget` is a number of examples, a fraction
    of N below 1, or `{"tokens": n}`, which needs `num_response_tokens` (one per row). `stratify_by` (one value per row)
    makes `num_clusters` groups in each stratum and shares the budget over the strata first. `seed` feeds both steps.

    Raises DataError naming the ids of ragged, missing or non-finite losses, ConfigError for an argument out of range.
    """
    grouping = checked(
        ClusteringConfig,
        num_clusters=num_clusters,
        num_iterations=num_iterations,
        num_restarts=num_restarts,
        seed=seed,
    )
    config = checked(SelectionConfig, budget=budget, defer_groups_up_to=defer_groups_up_to, seed=seed)
    trajectories = Trajectories.of(losses, example_ids, sources=stratify_by, num_response_tokens=num_response_tokens)
    clustering = cluster_trajectories(trajectories, grouping, trajectories.sources)
    return _selection(trajectories, clustering, config)[0]


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


def selection_order(
    cluster_ids_N: NDArray[np.integer[Any]],
    priorities_N: NDArray[np.uint64],
    *,
    strata_K: Integers | None = None,
    defer_up_to: int = 0,
) -> Integers:
    """All rows in the order in which they are taken, shape (N,); among equal priorities the first row comes first.

    Groups of at most `defer_up_to` rows come after all others (of their stratum). `strata_K` is the stratum of each group.
    """
    sizes_K = np.bincount(cluster_ids_N)
    ranks_N = _ranks(cluster_ids_N, priorities_N)
    turns_N = _turns(sizes_K)[cluster_ids_N]
    is_deferred_N = (sizes_K <= defer_up_to)[cluster_ids_N]
    order_N = np.lexsort((turns_N, ranks_N, is_deferred_N))
    if strata_K is None:
        return order_N
    strata_N = np.asarray(strata_K)[cluster_ids_N]
    places_N = np.empty_like(order_N)
    places_N[order_N] = np.arange(len(order_N))
    return np.lexsort((_turns(np.bincount(strata_N))[strata_N], _ranks(strata_N, places_N)))


def _ranks(groups_N: NDArray[Any], keys_N: NDArray[Any]) -> Integers:
    """Each row's rank by key inside its group, from 0; of equal keys the first row comes first."""
    order_N = np.lexsort((keys_N, groups_N))
    sizes_K = np.bincount(groups_N)
    ranks_N = np.empty(len(order_N), np.int64)
    ranks_N[order_N] = np.arange(len(order_N)) - np.repeat(np.cumsum(sizes_K) - sizes_K, sizes_K)
    return ranks_N


def _turns(sizes_K: Integers) -> Integers:
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
    order_N = selection_order(cluster_ids_N, priorities_N, strata_K=strata_K, defer_up_to=defer_up_to)
    if not isinstance(budget, dict):
        return np.sort(order_N[: _num_examples(budget, len(order_N))])
    if num_response_tokens_N is None:
        raise ConfigError(
            "selection.budget: a budget in tokens needs the column num_response_tokens. Add it, or give a number of examples."
        )
    totals_N = np.cumsum(num_response_tokens_N[order_N], dtype=np.int64)
    num_selected = int(np.searchsorted(totals_N, budget["tokens"], side="right"))
    if num_selected == 0:
        raise ConfigError(f"selection.budget: {budget['tokens']:,} tokens are fewer than the first example's {totals_N[0]:,}.")
    if num_selected == len(order_N) and totals_N[-1] < budget["tokens"]:
        _log.warning(
            "the budget of %s tokens is above the %s there are: all are taken", f"{budget['tokens']:,}", f"{totals_N[-1]:,}"
        )
    return np.sort(order_N[:num_selected])


def _num_examples(budget: int | float, num_rows: int) -> int:
    """A budget in examples: a fraction is rounded down in decimal (0.29 of 100 is 29), to one example at least."""
    if budget <= 0:
        raise ConfigError(f"selection.budget: must be above 0, found {budget}.")
    if budget < 1:
        return max(1, int(Decimal(str(budget)) * num_rows))
    if budget > num_rows:
        _log.warning("the budget of %s examples is above the %s there are: all are taken", f"{budget:,}", f"{num_rows:,}")
    return min(int(budget), num_rows)


def random_rows(example_ids: pa.Array, num_rows: int, seed: int) -> Integers:
    """The random control: the `num_rows` examples of lowest priority under the seed `random-{seed}`. Ascending rows."""
    return np.sort(np.argsort(priorities(example_ids, f"random-{seed}"), kind="stable")[:num_rows])


def _selection(trajectories: Trajectories, clustering: Clustering, config: SelectionConfig) -> tuple[Selection, Integers]:
    """The selection and its rows."""
    rows_M = select_rows(
        clustering.cluster_ids_N,
        priorities(trajectories.example_ids, config.seed),
        config.budget,  # type: ignore[arg-type]  # pydantic's keys are Literal["tokens"]
        strata_K=clustering.strata_K,
        defer_up_to=config.defer_groups_up_to,
        num_response_tokens_N=trajectories.num_response_tokens_N,
    )
    cluster_ids_M = clustering.cluster_ids_N[rows_M]
    sizes_K = clustering.sizes_K
    quotas_K = np.bincount(cluster_ids_M, minlength=len(sizes_K))
    weights_M = sizes_K[cluster_ids_M] / quotas_K[cluster_ids_M]
    ids = trajectories.example_ids.take(pa.array(rows_M))
    return Selection(ids, cluster_ids_M, weights_M, quotas_K, sizes_K, config.budget), rows_M  # type: ignore[arg-type]


def build_selection(
    config: SelectionConfig,
    trajectories: Trajectories,
    clustering: Clustering,
    fetch_rows: Callable[[pa.Array], pa.Table],
    draft: Draft,
    *,
    random_control: bool = False,
) -> Artifact:
    """Choose the subset and publish `selected.parquet` (and `random.parquet`): the rows as they were + our columns.

    `fetch_rows(ids)` gives the corpus's own columns of these examples, in the order of the (ascending) ids.
    """
    if not trajectories.example_ids.equals(clustering.example_ids):
        raise DataError("the clustering is of other examples than the trajectories. Build clustering again.")
    selection, rows_M = _selection(trajectories, clustering, config)
    table, names = _with_our_columns(
        fetch_rows(selection.example_ids), selection.example_ids, selection.cluster_ids_M, selection.weights_M
    )
    draft.write_table(SELECTED, table)
    control_M = None
    if random_control:
        control_M = random_rows(trajectories.example_ids, len(selection), config.seed)
        ids = trajectories.example_ids.take(pa.array(control_M))
        weights_M = np.full(len(control_M), len(trajectories) / len(control_M))
        control, _ = _with_our_columns(fetch_rows(ids), ids, clustering.cluster_ids_N[control_M], weights_M)
        draft.write_table(RANDOM, control)
    _log.info(
        "%s of %s examples from %d groups (quotas %s to %s)",
        *(f"{len(selection):,}", f"{len(trajectories):,}", clustering.num_clusters),
        *(f"{selection.quotas_K.min():,}", f"{selection.quotas_K.max():,}"),
    )
    return draft.publish(_summary(selection, trajectories, rows_M, control_M) | {"columns": names})


def _with_our_columns(
    rows: pa.Table, ids: pa.Array, cluster_ids_M: NDArray[np.int32], weights_M: NDArray[np.float64]
) -> tuple[pa.Table, dict[str, str]]:
    """The corpus's columns with ours behind them, and the names that ours got: underscored where the corpus has that name."""
    assert len(rows) == len(ids), "fetch_rows left out rows"
    names = {}
    for name, values in {"example_id": ids, "cluster_id": cluster_ids_M, "weight": weights_M}.items():
        names[name] = name
        if name == "example_id" and _are_the_ids(rows, ids):
            continue
        while names[name] in rows.column_names:
            names[name] = f"_{names[name]}"
        rows = rows.append_column(names[name], pa.array(values))
    return rows, names


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


def _summary(selection: Selection, trajectories: Trajectories, rows_M: Integers, control_M: Integers | None) -> dict[str, Any]:
    """What the manifest and the report say; `random` is null where there is no random control."""

    def counts(rows: Integers | None) -> dict[str, int] | None:
        if rows is None or trajectories.sources is None:
            return None
        found = pc.value_counts(trajectories.sources.take(pa.array(rows)))
        return dict(zip(found.field("values").to_pylist(), found.field("counts").to_pylist(), strict=True))

    def tokens(rows: Integers | None) -> int | None:
        tokens_N = trajectories.num_response_tokens_N
        return None if rows is None or tokens_N is None else int(tokens_N[rows].sum(dtype=np.int64))

    pool_N = np.arange(len(trajectories))
    pool, selected, control = counts(pool_N) or {}, counts(rows_M) or {}, counts(control_M)
    return {
        "rows": len(selection),
        "pool": len(trajectories),
        "budget": selection.budget,
        "num_clusters": len(selection.sizes_K),
        "sizes": selection.sizes_K.tolist(),
        "quotas": selection.quotas_K.tolist(),
        "sources": {
            name: {
                "pool": pool[name],
                "selected": selected.get(name, 0),
                "random": None if control is None else control.get(name, 0),
            }
            for name in sorted(pool)
        },
        "num_response_tokens": {"pool": tokens(pool_N), "selected": tokens(rows_M), "random": tokens(control_M)},
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
