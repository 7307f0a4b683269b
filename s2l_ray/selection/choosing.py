"""Choosing in a stream: the rows that the order of `quotas` takes first, with memory for little more than these.

How many rows each group gives is known from the sizes, and below which priority they lie is known but for a few rows, since
priorities are uniform. So one pass over the pool keeps little more than what is chosen; of keys that are not uniform at most
twice as many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from s2l_ray.errors import ConfigError
from s2l_ray.examples.ids import priority_cut
from s2l_ray.progress import get_log
from s2l_ray.selection.quotas import Integers, Sharing, ranks, selection_order
from s2l_ray.trajectories.store import NUM_RESPONSE_TOKENS

NO_TOKENS = (
    f"selection.budget: a budget in tokens needs the column {NUM_RESPONSE_TOKENS}. Add it, or give a number of examples."
)
# Rows by a key are thinned out whenever there are so many more than twice those wanted.
_PRUNED_ROWS = 262_144
# Rows that are kept are joined to tables of so many: small ones, each made between the large blocks on their way, left holes
# in memory of three times their size.
_JOINED_ROWS = 65_536
_log = get_log("selection")

EachBlock = Callable[[Callable[[pa.Table], Any]], Iterable[Any]]
"""A pass over the pool: what a function returns for every block of its rows, in their order. It may run in other processes."""

Budget = int | float | dict[str, int]
"""A number of examples, a fraction of the pool below 1, or `{"tokens": n}`."""


def select_rows(
    cluster_ids_N: NDArray[np.integer[Any]],
    priorities_N: NDArray[np.uint64],
    budget: Budget,
    *,
    strata_K: Integers | None = None,
    defer_up_to: int = 0,
    allocation: float = 0.0,
    allocation_of_strata: float = 0.0,
    num_response_tokens_N: NDArray[np.integer[Any]] | None = None,
) -> Integers:
    """Row numbers of a selection, ascending: the first `budget` of `selection_order`, or all if there are fewer.

    Raises ConfigError for a budget that takes nothing, or in tokens where token counts are unknown.
    """
    columns = {"cluster_id": cluster_ids_N, "priority": priorities_N, "row": np.arange(len(cluster_ids_N))}
    if num_response_tokens_N is not None:
        columns[NUM_RESPONSE_TOKENS] = num_response_tokens_N
    sizes_K = np.bincount(cluster_ids_N, minlength=0 if strata_K is None else len(strata_K))
    sharing = Sharing(
        sizes_K, strata_K, defer_up_to=defer_up_to, allocation=allocation, allocation_of_strata=allocation_of_strata
    )
    table = pa.table(columns)
    return np.asarray(choose(lambda function: [function(table)], sharing, [budget])[0]["row"].to_numpy())


def choose(
    each_block: EachBlock,
    sharing: Sharing,
    budgets: Sequence[Budget],
    *,
    sizes_S: Integers | None = None,
    min_per_source: int = 0,
) -> list[pa.Table]:
    """The chosen rows for each budget, in the order in which the pool has them; one contains the smaller.

    `each_block` passes over the pool in tables of `cluster_id`, `priority` (uint64), for budgets in tokens
    `num_response_tokens`, for `min_per_source` a `source` (a number), and whatever else shall come along; again where a first
    guess of how many rows a budget in tokens takes was too low. `sizes_S` are the rows of each source. Inside a group rows
    come by priority, or by the column `key` (uint64) where there is one. With `min_per_source` the rows of lowest priority of
    each source come first, then all others in their order.

    Raises ConfigError for a budget that takes nothing or less than the minimum of every source, or in tokens where
    token counts are unknown.
    """
    num_rows = int(sharing.sizes_K.sum())
    if sizes_S is None or not min_per_source:
        sizes_S = np.zeros(0, np.int64)
    num_wanted = _first_guess(each_block, budgets, num_rows)
    while True:
        quotas_K = sharing.quotas(num_wanted)
        found = _candidates(each_block, quotas_K, sharing.sizes_K, np.minimum(sizes_S, min_per_source), sizes_S)
        if len(budgets) == 1 and not isinstance(budgets[0], dict) and not len(sizes_S):
            num_examples(budgets[0], num_rows)  # for its warning
            wanted: list[Integers] | None = [np.flatnonzero(_is_in_quota(found, quotas_K))]
        else:
            wanted = _by_order(found, sharing, budgets, num_wanted, min_per_source if len(sizes_S) else 0)
        if wanted is not None:
            batches: list[pa.RecordBatch | None] = [*found.to_batches()]
            del found
            return [_taken(batches, rows_M, is_last=number == len(wanted) - 1) for number, rows_M in enumerate(wanted)]
        num_wanted = min(num_rows, 2 * num_wanted)


def _is_in_quota(rows: pa.Table, quotas_K: Integers) -> NDArray[np.bool_]:
    """Whether a row is among those of lowest key of its group, as many as its quota: all that one budget in examples needs."""
    groups_M = rows["cluster_id"].to_numpy()
    return np.asarray(ranks(groups_M, keys_of(rows)) < quotas_K[groups_M])


def _by_order(
    found: pa.Table, sharing: Sharing, budgets: Sequence[Budget], num_wanted: int, min_per_source: int
) -> list[Integers] | None:
    """The numbers of the rows that each budget takes, ascending; None where `num_wanted` are too few for one in tokens."""
    order_M, num_first = selection_order(found["cluster_id"].to_numpy(), keys_of(found), sharing, num_wanted), 0
    if min_per_source:
        order_M, num_first = minimum_first(order_M, found, min_per_source)
    num_rows = int(sharing.sizes_K.sum())
    counts = [num_taken(budget, found, order_M[:num_wanted], num_rows, num_first) for budget in budgets]
    return None if None in counts else [np.sort(order_M[:count]) for count in counts]


def _taken(batches: list[pa.RecordBatch | None], rows_M: Integers, *, is_last: bool) -> pa.Table:
    """Rows of a table by their numbers, ascending; if nothing else is taken batches are given up one by one, so that millions
    of rows are not there twice."""
    taken, start = [], 0
    for number, batch in enumerate(batches):
        assert batch is not None
        first, last = np.searchsorted(rows_M, [start, start + len(batch)])
        taken.append(batch.take(pa.array(rows_M[first:last] - start)))
        start += len(batch)
        if is_last:
            batches[number] = None
    return pa.Table.from_batches(taken)


def minimum_first(order_M: Integers, rows: pa.Table, min_per_source: int) -> tuple[Integers, int]:
    """An order with the rows of lowest priority of each source before all others, and how many these are."""
    is_first_M = ranks(rows["source"].to_numpy(), rows["priority"].to_numpy()) < min_per_source
    return order_M[np.argsort(~is_first_M[order_M], kind="stable")], int(is_first_M.sum())


def keys_of(rows: pa.Table) -> NDArray[np.uint64]:
    """By what rows come inside their group, the lowest first, shape (M,)."""
    return np.asarray(rows["key" if "key" in rows.column_names else "priority"].to_numpy())


def _first_guess(each_block: EachBlock, budgets: Sequence[Budget], num_rows: int) -> int:
    """Examples that the largest budget takes: exactly, but for budgets in tokens."""
    largest = max((num_examples(b, num_rows, quietly=True) for b in budgets if not isinstance(b, dict)), default=0)
    tokens = max((budget["tokens"] for budget in budgets if isinstance(budget, dict)), default=0)
    if not tokens:
        return largest
    total = sum(each_block(num_tokens))
    return max(largest, min(num_rows, int(1.1 * num_rows * tokens / max(total, 1)) + 1_000))


def num_tokens(rows: pa.Table) -> int:
    """Response tokens of some rows. Raises ConfigError where they are unknown."""
    if NUM_RESPONSE_TOKENS not in rows.column_names:
        raise ConfigError(NO_TOKENS)
    return int(rows[NUM_RESPONSE_TOKENS].to_numpy().sum(dtype=np.int64))


def _candidates(
    each_block: EachBlock, quotas_K: Integers, sizes_K: Integers, minimums_S: Integers, sizes_S: Integers
) -> pa.Table:
    """Of each group the rows of lowest key and of each source those of lowest priority: as many as wanted, and few more."""
    margin = 6.0
    while True:
        cuts_K, cuts_S = _cuts(quotas_K, sizes_K, margin), _cuts(minimums_S, sizes_S, margin)
        found = _pruned(each_block, quotas_K, cuts_K, cuts_S)
        is_complete = "key" in found.column_names or (_num_below(found, "cluster_id", cuts_K) >= quotas_K).all()
        if is_complete and (not len(cuts_S) or (_num_below(found, "source", cuts_S) >= minimums_S).all()):
            return found
        margin *= 4  # once in a billion


def _pruned(each_block: EachBlock, quotas_K: Integers, cuts_K: NDArray[np.uint64], cuts_S: NDArray[np.uint64]) -> pa.Table:
    """The rows of a stream below their cuts. Of keys nobody knows which are low: the lowest so far are kept, group by group."""
    kept: list[pa.Table] = []
    latest: list[pa.Table] = []
    num_kept = num_joined = 0
    limit = 2 * int(quotas_K.sum()) + _PRUNED_ROWS

    def one_block(block: pa.Table) -> pa.Table:
        return _lowest(block, quotas_K, cuts_S) if "key" in block.column_names else _below(block, cuts_K, cuts_S)

    for low in each_block(one_block):
        latest.append(low)
        num_kept += len(low)
        if num_kept - num_joined >= _JOINED_ROWS:
            kept, latest, num_joined = [*kept, pa.concat_tables(latest).combine_chunks()], [], num_kept
        if "key" in low.column_names and num_kept > limit:
            kept, latest = [_lowest(pa.concat_tables([*kept, *latest]), quotas_K, cuts_S)], []
            num_kept = num_joined = len(kept[0])
    found = pa.concat_tables([*kept, pa.concat_tables(latest).combine_chunks()] if latest else kept)
    return _lowest(found, quotas_K, cuts_S) if "key" in found.column_names else found


def _lowest(rows: pa.Table, quotas_K: Integers, cuts_S: NDArray[np.uint64]) -> pa.Table:
    """Of each group the rows of lowest key, as many as its quota, and those below the cut of their source."""
    is_low_M = _is_in_quota(rows, quotas_K)
    if len(cuts_S):
        is_low_M |= rows["priority"].to_numpy() <= cuts_S[rows["source"].to_numpy()]
    return rows.take(pa.array(np.flatnonzero(is_low_M))).combine_chunks()


def _cuts(wanted_K: Integers, sizes_K: Integers, margin: float) -> NDArray[np.uint64]:
    """For each group a priority below which so many of its rows lie (almost surely), and few more."""
    return np.array([priority_cut(int(w), int(n), margin) for w, n in zip(wanted_K, sizes_K, strict=True)], np.uint64)


def _below(block: pa.Table, cuts_K: NDArray[np.uint64], cuts_S: NDArray[np.uint64]) -> pa.Table:
    """The rows of a block whose priority is below that of their group, or of their source."""
    priorities_M = block["priority"].to_numpy()
    is_low_M = priorities_M <= cuts_K[block["cluster_id"].to_numpy()]
    if len(cuts_S):
        is_low_M |= priorities_M <= cuts_S[block["source"].to_numpy()]
    return block.take(pa.array(np.flatnonzero(is_low_M)))


def _num_below(found: pa.Table, column: str, cuts_K: NDArray[np.uint64]) -> Integers:
    """How many rows of each group, or source, are below its cut."""
    groups_M = found[column].to_numpy()
    return np.bincount(groups_M[found["priority"].to_numpy() <= cuts_K[groups_M]], minlength=len(cuts_K))


def num_taken(budget: Budget, found: pa.Table, order_M: Integers, num_rows: int, num_first: int) -> int | None:
    """How many rows of an order of the table `found` a budget takes; None where the order, known so far only, ends before
    it."""
    if not isinstance(budget, dict):
        count = num_examples(budget, num_rows)
    else:
        totals_M = np.cumsum(found[NUM_RESPONSE_TOKENS].to_numpy()[order_M], dtype=np.int64)
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


def num_examples(budget: int | float, num_rows: int, *, quietly: bool = False) -> int:
    """A budget in examples: a fraction is rounded down in decimal (0.29 of 100 is 29), to one example at least."""
    if budget <= 0:
        raise ConfigError(f"selection.budget: must be above 0, found {budget}.")
    if budget < 1:
        return max(1, int(Decimal(str(budget)) * num_rows))
    if budget > num_rows and not quietly:
        _log.warning("the budget of %s examples is above the %s there are: all are taken", f"{budget:,}", f"{num_rows:,}")
    return min(int(budget), num_rows)
