"""Held-out rows enough of every source: which prompts are held out beyond the share that all sources give.

The choice needs the lowest hashes of every source's prompts, which tasks find range by range: it takes memory for a few times
the wanted number of hashes a source, not for the corpus, and is the same however the corpus is cut.
"""

from __future__ import annotations

import dataclasses
import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from s2l_ray.config import WorkerConfig
from s2l_ray.examples.hashes import HELD_OUT, POOL
from s2l_ray.examples.order import ROWS_DONE_HERE, Addresses, Order, by_source, count_splits, read_range
from s2l_ray.progress import get_log
from s2l_ray.runtime.data import run_tasks
from s2l_ray.storage.drafts import table_bytes

# Of a source with 4 N rows or more at most three prompts have more than a quarter of the rows, so that N + 3 candidates are
# enough for N rows; a smaller source has fewer than 4 N prompts.
_CANDIDATES_PER_ROW = 4


def hold_out_per_source(order: Order, wanted: int, workers: WorkerConfig) -> Order:
    """The order with at least `wanted` held-out rows of every source where half of its rows are so many.

    Sources that stay below it are logged.
    """
    lowest: pa.Table | None = None
    for result in _run(_LowestPrompts(order.addresses, _CANDIDATES_PER_ROW * wanted), order.addresses, workers):
        found = pq.read_table(io.BytesIO(result["prompts"]))
        both = found if lowest is None else pa.concat_tables([lowest, found])
        lowest = lowest_prompts(both, _CANDIDATES_PER_ROW * wanted)
    if lowest is None:
        return order
    addresses = dataclasses.replace(order.addresses, held_out=choose_prompts(lowest, order.sources, wanted))
    counts: Counter[tuple[str, str]] = Counter()
    for result in _run(_CountSplits(addresses), addresses, workers):
        counts.update({(source, split): rows for source, split, rows in json.loads(result["counts"])})
    sources = by_source(counts)
    few = [f"{name} {rows[HELD_OUT]:,}" for name, rows in sources.items() if rows[HELD_OUT] < wanted]
    if few:
        get_log("examples").warning(
            f"fewer than examples.held_out_per_source={wanted:,} rows are held out of {len(few):,} sources, which have no more "
            f"prompts that leave half of their rows in the pool: {', '.join(few[:5])}{', ...' if len(few) > 5 else ''}"
        )
    return dataclasses.replace(order, addresses=addresses, sources=sources)


def _run(task: Callable[[int], dict[str, Any]], addresses: Addresses, workers: WorkerConfig) -> Iterable[dict[str, Any]]:
    """What a task returns for every range."""
    count = len(addresses.paths)
    return map(task, range(count)) if addresses.num_rows <= ROWS_DONE_HERE else run_tasks(task, count, workers)


# --- pure core ---------------------------------------------------------------------------------------------------


def lowest_prompts(prompts: pa.Table, count: int) -> pa.Table:
    """The `count` lowest hashes of every source: `source`, `prompt_hash`, `rows`, in order of source and hash.

    `prompts` has these columns, a source and hash perhaps several times. The lowest of several tables' lowest, put together,
    are the lowest of all, with all their rows: a hash among them is among the lowest wherever it occurs.
    """
    grouped = prompts.group_by(["source", "prompt_hash"]).aggregate([("rows", "sum")]).rename_columns({"rows_sum": "rows"})
    grouped = grouped.sort_by([("source", "ascending"), ("prompt_hash", "ascending")]).select(["source", "prompt_hash", "rows"])
    codes = grouped["source"].combine_chunks().dictionary_encode().indices.to_numpy()
    rank_in_source = np.arange(len(codes)) - np.searchsorted(codes, codes)
    return grouped.filter(pa.array(rank_in_source < count))


def choose_prompts(lowest: pa.Table, sources: Mapping[str, Mapping[str, int]], wanted: int) -> NDArray[np.uint64]:
    """The hashes of the prompts to be held out beyond those that are, ascending, uint64.

    `lowest`: prompts in the pool, as `lowest_prompts` gives them; `sources`: the rows of every source by split. Each source
    takes its lowest until `wanted` of its rows are held out, but none that would take more than half of the rows of a source.
    """
    chosen: set[int] = set()
    held_out = {name: rows[HELD_OUT] for name, rows in sources.items()}
    in_sources: dict[int, dict[str, int]] = {}
    rows_of = lowest.to_pylist()
    for row in rows_of:
        in_sources.setdefault(row["prompt_hash"], {})[row["source"]] = row["rows"]
    for row in rows_of:
        hashed = row["prompt_hash"]
        if hashed in chosen or held_out[row["source"]] >= wanted:
            continue
        after = {name: held_out[name] + rows for name, rows in in_sources[hashed].items()}
        if all(2 * rows <= sum(sources[name].values()) for name, rows in after.items()):
            held_out |= after
            chosen.add(hashed)
    return np.array(sorted(chosen), np.uint64)


def with_held_out(table: pa.Table, held_out: NDArray[np.uint64]) -> pa.Table:
    """Rows with `prompt_hash` and `split`, the split being `held_out` for these hashes."""
    if not len(held_out):
        return table
    is_chosen = pc.is_in(table["prompt_hash"], pa.array(held_out, pa.uint64()))
    return table.set_column(table.column_names.index("split"), "split", pc.if_else(is_chosen, HELD_OUT, table["split"]))


# --- in a task ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _LowestPrompts:
    """Task: the lowest hashes of the prompts of every source in a range's pool."""

    addresses: Addresses
    count: int

    def __call__(self, number: int) -> dict[str, Any]:
        table = read_range(self.addresses.work, self.addresses.paths[number])
        table = table.filter(pc.and_(pc.equal(table["split"], POOL), pc.is_valid(table["prompt_hash"])))
        table = table.select(["source", "prompt_hash"])
        table = table.append_column("rows", pa.array(np.ones(len(table), np.int64)))
        return {"prompts": table_bytes(lowest_prompts(table, self.count))}


@dataclass(frozen=True)
class _CountSplits:
    """Task: the rows of a range by source and split, with the prompts that are held out beyond the share."""

    addresses: Addresses

    def __call__(self, number: int) -> dict[str, Any]:
        table = read_range(self.addresses.work, self.addresses.paths[number])
        return {"counts": json.dumps(count_splits(with_held_out(table, self.addresses.held_out)))}
