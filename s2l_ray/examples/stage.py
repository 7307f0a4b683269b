"""Stage `examples`: any corpus -> canonical parts with stable ids, sorted by id.

Every row becomes an *example*: prompt, response, source, and an id that does not depend on where the row was. Tasks (see
`runtime.data`) do the work in three passes, so that nothing is sorted at once, and the driver's memory does not grow:

1. `shards`: each shard of the corpus is read, checked, given ids and written to the scratch directory in order of id;
2. `order`: each range of ids is put in order from the ids and hashes in the shards, duplicates are dropped, and the place of
   every row that is kept is written down; `splits` holds out more of sources that have few held-out rows;
3. `parts`: each task gathers the rows of some parts from the shards and writes them.

A finished shard or part is not made again. The parts have the same bytes however the corpus is cut, ordered or resumed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from s2l_ray.config import ExamplesConfig
from s2l_ray.errors import DataError
from s2l_ray.examples.columns import Columns, join_columns
from s2l_ray.examples.cutting import cut_corpus
from s2l_ray.examples.dropped import DUPLICATE, Dropped
from s2l_ray.examples.fields import known_fields
from s2l_ray.examples.hashes import HELD_OUT, POOL, VALIDATION
from s2l_ray.examples.llama_factory import resolved
from s2l_ray.examples.order import Order, order_rows
from s2l_ray.examples.parts import PartColumns, rows_per_part, write_parts
from s2l_ray.examples.shards import ShardIndex, read_shards
from s2l_ray.examples.splits import hold_out_per_source
from s2l_ray.progress import get_log
from s2l_ray.storage.artifacts import Artifact
from s2l_ray.storage.records import digest
from s2l_ray.storage.stages import Context

_log = get_log("examples")


def build(context: Context) -> Artifact:
    """Build the stage `examples`, or continue where an interrupted run stopped.

    Raises DataError where the corpus is missing or empty, or a row contradicts the config; nothing then looks finished.
    """
    workers, draft = context.machines, context.draft
    config, layout = resolved(context.section)
    shards = cut_corpus(config)
    # Shards are numbered by the cut: those of another cut (a file was renamed, say) must not stand in for these.
    work = draft.work.child(digest(repr(shards)))
    indexes = read_shards(shards, config, layout, workers, work)
    dropped = Dropped.joined(index.dropped for index in indexes)
    _check_bad_rows(dropped, sum(sum(index.sizes) for index in indexes), config)
    order = order_rows(indexes, config, workers, work)
    if config.held_out_per_source:
        order = hold_out_per_source(order, config.held_out_per_source, workers)
    columns = join_columns(index.columns for index in indexes)
    _check_fields(columns, config)
    has_json, has_conversations = (any(getattr(index, name) for index in indexes) for name in ("has_json", "num_conversations"))
    made = PartColumns(columns.type, has_json, has_conversations, known_fields(config, layout)[1])
    summary = _summary(order, dropped, config) | _corpus_facts(indexes, columns, made)
    write_parts(order.addresses, summary["rows_per_part"], made, workers, draft)
    return draft.publish(summary)


def _check_bad_rows(dropped: Dropped, num_good: int, config: ExamplesConfig) -> None:
    """Log the first bad row of each kind. Raises DataError where more rows are bad than may be dropped."""
    counts = dropped.by_reason
    for reason, message in dropped.first.items():
        _log.warning("rows dropped as %s: %s, the first: %s", reason, f"{counts[reason]:,}", message)
    share = dropped.num_bad / max(1, dropped.num_bad + num_good)
    if share > config.max_dropped:
        reasons = ", ".join(f"{counts[reason]:,} {reason}" for reason in dropped.first)
        most = max(dropped.first, key=lambda reason: counts[reason])
        raise DataError(
            f"{dropped.num_bad:,} rows ({share:.1%}: {reasons}) cannot be read or understood, more than examples.max_dropped="
            f"{config.max_dropped:g} allows. Fix the corpus or the fields, or allow more. First {most}: {dropped.first[most]}"
        )


def _check_fields(columns: Columns, config: ExamplesConfig) -> None:
    """Raises DataError for a field that rows may lack and that none has: tools or history would be lost without a word."""
    for key in ("tools_field", "system_field", "history_field"):
        name = getattr(config, key)
        if name and columns.fields and name not in columns.fields:
            known = ", ".join(field.name for field in columns.type)
            raise DataError(
                f"examples.{key}={name}: no row has this field (fields: {known}). Set it to one of them, or leave it out."
            )


def _corpus_facts(indexes: Sequence[ShardIndex], columns: Columns, made: PartColumns) -> dict[str, Any]:
    """What later stages and people want to know of the parts' columns."""
    if columns.json_names:
        _log.info("columns whose rows differ in type are kept as JSON text: %s", ", ".join(columns.json_names))
    num_conversations = sum(index.num_conversations for index in indexes)
    return {"conversations": num_conversations, "has_row_json": made.has_json, "json_columns": columns.json_names}


def _summary(order: Order, dropped: Dropped, config: ExamplesConfig) -> dict[str, Any]:
    """The stage's counts, which are logged. Raises DataError if there is nothing to learn from."""
    num_rows = order.addresses.num_rows
    in_split = sum((Counter(counts) for counts in order.sources.values()), Counter[str]())
    num_pool, num_held_out, num_validation = in_split[POOL], in_split[HELD_OUT], in_split[VALIDATION]
    found = dropped.by_reason + Counter({DUPLICATE: order.num_duplicates})
    counts = dict(sorted(found.items()))
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in counts.items())
    if not num_rows:
        left = f"no row is left ({reasons}). Check examples.where and the fields" if counts else "no row in it"
        raise DataError(f"examples.dataset: the corpus is empty: {left}.")
    if not num_pool:
        raise DataError(
            f"examples.held_out_fraction={config.held_out_fraction}: all {num_held_out + num_validation:,} rows are held out. "
            "Lower it."
        )
    if config.held_out_fraction and not num_held_out:
        _log.warning(
            f"no row is held out at examples.held_out_fraction={config.held_out_fraction}: prompts that differ only in numbers "
            "stay together, and there are few others. Raise it, or there will be no loss on held-out rows."
        )
    others = {HELD_OUT: num_held_out} if config.held_out_fraction or config.held_out_per_source else {}
    others |= {VALIDATION: num_validation} if config.validation_fraction else {}
    words = {HELD_OUT: "held out", VALIDATION: "for validation"}
    splits = " + ".join([f"{num_pool:,} in the pool", *(f"{count:,} {words[split]}" for split, count in others.items())])
    splits = splits if others else "all in the pool"
    _log.info(f"{num_rows:,} rows, {splits}; dropped: {reasons or 'none'}")
    return {
        "rows": num_rows,
        POOL: num_pool,
        HELD_OUT: num_held_out,
        **({VALIDATION: num_validation} if config.validation_fraction else {}),
        "dropped": counts,
        "dropped_by_source": {source: dict(sorted(found.items())) for source, found in sorted(dropped.by_source.items())},
        "first_dropped": dropped.first,
        "sources": order.sources,
        "rows_per_part": rows_per_part(num_rows, config.rows_per_part),
    }
