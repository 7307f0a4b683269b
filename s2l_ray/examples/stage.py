"""Stage `examples`: any corpus -> canonical parts with stable ids, sorted by id.

Every row becomes an *example*: prompt, response, source, and an id that does not depend on where the row was. Ray Data does
the work in three passes, so that nothing has to be sorted at once, and the driver's memory does not grow with the corpus:

1. `shards`: each shard of the corpus is read, checked, given ids and written to the scratch directory in order of id;
2. `order`: each range of ids is put in order from the ids and hashes in the shards, duplicates are dropped, and the place of
   every row that is kept is written down;
3. `parts`: each task gathers the rows of some parts from the shards and writes them.

A finished shard or part is not made again. The parts have the same bytes however the corpus is cut, ordered or resumed.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from s2l_ray.config import ExamplesConfig
from s2l_ray.errors import DataError
from s2l_ray.examples.cutting import cut_corpus
from s2l_ray.examples.fields import DUPLICATE
from s2l_ray.examples.hashes import HELD_OUT, POOL
from s2l_ray.examples.order import Order, order_rows
from s2l_ray.examples.parts import rows_per_part, write_parts
from s2l_ray.examples.pieces import Shard
from s2l_ray.examples.rows import join_columns
from s2l_ray.examples.shards import read_shards
from s2l_ray.progress import get_log
from s2l_ray.storage.artifacts import Artifact
from s2l_ray.storage.records import digest
from s2l_ray.storage.stages import Context

_log = get_log("examples")


def build(context: Context) -> Artifact:
    """Build the stage `examples`, or continue where an interrupted run stopped.

    Raises DataError where the corpus is missing or empty, or a row contradicts the config; nothing then looks finished.
    """
    config, workers, draft = context.section, context.machines, context.draft
    shards = cut_corpus(config)
    # Shards are numbered by the cut: those of another cut (a file was renamed, say) must not stand in for these.
    work = draft.work.child(digest(repr(shards)))
    indexes = read_shards(shards, config, workers, work)
    order = order_rows(indexes, config, workers, work)
    dropped = sum((index.dropped for index in indexes), Counter({DUPLICATE: order.num_duplicates}))
    summary = _summary(order, +dropped, config)
    columns = join_columns((_name(shard), index.columns) for shard, index in zip(shards, indexes, strict=True))
    write_parts(order.addresses, summary["rows_per_part"], columns.type, workers, draft)
    return draft.publish(summary)


def _name(shard: Shard) -> str:
    """The files of a shard, for a message."""
    names = list(dict.fromkeys(piece.name for piece in shard))
    return names[0] + (f" (or one of {len(names) - 1} files after it)" if len(names) > 1 else "")


def _summary(order: Order, dropped: Counter[str], config: ExamplesConfig) -> dict[str, Any]:
    """The stage's counts, which are logged. Raises DataError if there is nothing to learn from."""
    num_rows = order.addresses.num_rows
    num_pool, num_held_out = (sum(counts[split] for counts in order.sources.values()) for split in (POOL, HELD_OUT))
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(dropped.items()))
    if not num_rows:
        found = f"no row is left ({reasons}). Check examples.where and the fields" if dropped else "no row in it"
        raise DataError(f"examples.dataset: the corpus is empty: {found}.")
    if not num_pool:
        raise DataError(
            f"examples.held_out_fraction={config.held_out_fraction}: all {num_held_out:,} rows are held out. Lower it."
        )
    if config.held_out_fraction and not num_held_out:
        _log.warning(
            f"no row is held out at examples.held_out_fraction={config.held_out_fraction}: prompts that differ only in numbers "
            "stay together, and there are few others. Raise it, or there will be no loss on held-out rows."
        )
    splits = f"{num_pool:,} in the pool + {num_held_out:,} held out" if config.held_out_fraction else "all in the pool"
    _log.info(f"{num_rows:,} rows, {splits}; dropped: {reasons or 'none'}")
    return {
        "rows": num_rows,
        POOL: num_pool,
        HELD_OUT: num_held_out,
        "dropped": dict(sorted(dropped.items())),
        "sources": order.sources,
        "rows_per_part": rows_per_part(num_rows, config.rows_per_part),
    }
