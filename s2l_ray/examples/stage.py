"""Stage `examples`: any corpus -> canonical parts with stable ids, sorted by id.

Every row becomes an *example*: prompt, response, source, and an id that does not depend on where the row stood. Ray
Data does the work in three executions, so that nothing has to be sorted at once, and the driver's memory does not grow with
the corpus:

1. each *unit* of the corpus is read, checked, given ids and written to the scratch directory in order of id;
2. each *range* of ids is put in order by the ids and hashes in the units alone: duplicates are dropped, and it is written down
   which row of which unit stands where (`index`);
3. each task gathers a run of parts from the units and writes them.

A finished unit or part is not made again. The parts have the same bytes however the corpus is cut, ordered or resumed.
"""

from __future__ import annotations

import dataclasses
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from s2l_ray import errors
from s2l_ray.config import ExamplesConfig, WorkerConfig
from s2l_ray.errors import ArtifactError, DataError
from s2l_ray.examples.corpus import Unit, cut_corpus
from s2l_ray.examples.fields import DUPLICATE, HELD_OUT, POOL, normalise
from s2l_ray.examples.index import (
    UNIT_ROW_GROUP,
    Addresses,
    DropSeen,
    Order,
    OrderRange,
    RangeFacts,
    UnitIndex,
    cut_ids,
    described,
    refuse_shared_ids,
    row_groups,
    unit_path,
)
from s2l_ray.examples.rows import Records, join_columns
from s2l_ray.progress import get_log, track
from s2l_ray.runtime.data import quiet_ray_data
from s2l_ray.runtime.room import await_room
from s2l_ray.storage.artifacts import Artifact
from s2l_ray.storage.drafts import Draft, table_bytes
from s2l_ray.storage.layout import part_name
from s2l_ray.storage.places import Storage
from s2l_ray.storage.records import FileRecord, digest
from s2l_ray.storage.stages import Context

SMALLEST_PART, MOST_PARTS = 512, 1024
# Rows that one task gathers: its memory, against opening every unit once more.
ROWS_PER_TASK = 32_768
TASKS_WANTED = 16
# So few rows are put in order sooner than a worker is started for it.
ROWS_DONE_HERE = 8192

_log = get_log("examples")


# --- pure core ---------------------------------------------------------------------------------------------------


def rows_per_part(num_rows: int, wanted: int | str) -> int:
    """Rows in one part: as wanted, or 512, doubled until there are at most 1,024 parts."""
    if isinstance(wanted, int):
        return wanted
    size = SMALLEST_PART
    while num_rows > size * MOST_PARTS:
        size *= 2
    return size


# --- build -------------------------------------------------------------------------------------------------------


def build(context: Context) -> Artifact:
    """Build the stage `examples`, or go on where an interrupted run stopped.

    Raises DataError where the corpus is missing or empty, or a row contradicts the config; nothing then looks finished.
    """
    config, workers, draft = context.section, context.machines, context.draft
    units = cut_corpus(config)
    # Units are numbered by the cut: one that an earlier run made from another cut (a file renamed, say) is no such unit.
    work = draft.work.child(digest(repr(units)))
    indexes = _read_units(units, config, workers, work)
    dropped = sum((index.dropped for index in indexes), Counter[str]())
    order = _order_rows(indexes, config, workers, work)
    dropped[DUPLICATE] += order.num_duplicates
    summary = _summary(order, +dropped, config)
    columns = join_columns((_name(unit), index.columns) for unit, index in zip(units, indexes, strict=True))
    _write_parts(order.addresses, summary["rows_per_part"], columns.type, workers, draft)
    return draft.publish(summary)


def _name(unit: Unit) -> str:
    """The files of a unit, for a message."""
    names = list(dict.fromkeys(piece.name for piece in unit))
    return names[0] + (f" (or one of {len(names) - 1} files after it)" if len(names) > 1 else "")


def _summary(order: Order, dropped: Counter[str], config: ExamplesConfig) -> dict[str, Any]:
    """The stage's numbers, said in the log. Raises DataError if there is nothing to learn from."""
    num_rows = order.addresses.num_rows
    num_pool, num_held_out = (sum(counts[split] for counts in order.sources.values()) for split in (POOL, HELD_OUT))
    why = ", ".join(f"{count:,} {reason}" for reason, count in sorted(dropped.items()))
    if not num_rows:
        found = f"no row is left ({why}). Check examples.where and the fields" if dropped else "no row in it"
        raise DataError(f"examples.dataset: the corpus is empty: {found}.")
    if not num_pool:
        raise DataError(
            f"examples.held_out_fraction={config.held_out_fraction}: all {num_held_out:,} rows are held out. Lower it."
        )
    if config.held_out_fraction and not num_held_out:
        _log.warning(
            f"no row is held out at examples.held_out_fraction={config.held_out_fraction}: prompts that differ in numbers "
            "only stay together, and there are few others. Raise it, or there is no loss on held-out rows."
        )
    _log.info(f"{num_rows:,} rows = {num_pool:,} in the pool + {num_held_out:,} held out; dropped: {why or 'none'}")
    return {
        "rows": num_rows,
        POOL: num_pool,
        HELD_OUT: num_held_out,
        "dropped": dict(sorted(dropped.items())),
        "sources": order.sources,
        "rows_per_part": rows_per_part(num_rows, config.rows_per_part),
    }


def _results(dataset: Any, task: Callable[[pa.Table], dict[str, Any]], workers: WorkerConfig) -> Iterator[dict[str, Any]]:
    """What a task returns for every block of a dataset, as it comes. Raises the S2LError that a task met."""
    import ray.data

    size = workers.num_workers[-1] if isinstance(workers.num_workers, list) else workers.num_workers
    done = dataset.map_batches(
        _ReportsProblems(task),
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.TaskPoolStrategy(size if isinstance(size, int) else None),
        num_cpus=_cpus(workers),
    )
    for batch in done.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        for row in batch.to_pylist():
            if row["problem"] is not None:
                raise getattr(errors, row["kind"])(row["problem"])
            yield row


def _cpus(workers: WorkerConfig) -> int:
    return workers.cpus_per_worker if isinstance(workers.cpus_per_worker, int) else 1


@dataclass(frozen=True)
class _ReportsProblems:
    """A task that returns what a user can mend as a row: raised in a worker, it would come back in Ray's tracebacks."""

    task: Callable[[pa.Table], dict[str, Any]]

    def __call__(self, batch: pa.Table) -> pa.Table:
        try:
            result: dict[str, Any] = {"kind": None, "problem": None} | self.task(batch)
        except Exception as met:
            error = errors.cause_of(met)
            if error is None:
                raise
            result = {"kind": type(error).__name__, "problem": str(error)}
        return pa.Table.from_pylist([result])


# --- pass 1: the corpus to units ---------------------------------------------------------------------------------


def _read_units(units: list[Unit], config: ExamplesConfig, workers: WorkerConfig, work: Storage) -> list[UnitIndex]:
    """Have every unit read and written to the scratch directory; their indexes, in order."""
    import ray.data

    indexes: dict[int, UnitIndex] = {}
    num_reused = 0
    await_room("examples", {"CPU": _cpus(workers)}, 1, workers.wait_minutes)
    with quiet_ray_data(), track("examples", len(units), "units read") as progress:
        dataset = ray.data.range(len(units), override_num_blocks=len(units))
        for result in _results(dataset, _ReadUnit(tuple(units), config, work), workers):
            indexes[result["unit"]] = UnitIndex.of(pq.read_table(io.BytesIO(result["index"])))
            num_reused += result["is_reused"]
            progress.advance()
    if num_reused:
        _log.info(f"{num_reused} of {len(units)} units were read by an earlier run")
    return [indexes[unit] for unit in range(len(units))]


@dataclass(frozen=True)
class _ReadUnit:
    """Task: one unit of the corpus to a file in order of id, and back what `UnitIndex` tells."""

    units: tuple[Unit, ...]
    config: ExamplesConfig
    work: Storage

    def __call__(self, batch: pa.Table) -> dict[str, Any]:
        [unit] = batch["id"].to_pylist()
        path = unit_path(unit)
        is_reused = self.work.exists(path)
        if is_reused:
            table = pq.read_table(io.BytesIO(self.work.read(path)), columns=["example_id"])
        else:
            table = read_unit(self.units[unit], self.config)
            sink = io.BytesIO()
            pq.write_table(table, sink, compression="zstd", row_group_size=UNIT_ROW_GROUP)
            self.work.write(path, sink.getvalue())
        return {"unit": unit, "is_reused": is_reused, "index": table_bytes(row_groups(table))}


def read_unit(unit: Unit, config: ExamplesConfig) -> pa.Table:
    """The examples of a unit in order of id; what `UnitIndex` tells beside the ids is in the schema's metadata."""
    found = [(piece.name, normalise(rows, config)) for piece in unit for rows in piece.read()]
    found = found or [("", normalise(Records([], str, ""), config))]
    columns = join_columns((name, batch.columns) for name, batch in found)
    table = pa.concat_tables(_with_original(batch.table, columns.type) for _, batch in found)
    order = pc.sort_indices(table, sort_keys=[("example_id", "ascending")])
    return described(table.take(order), sum((batch.dropped for _, batch in found), Counter[str]()), columns)


def _with_original(table: pa.Table, original: pa.DataType) -> pa.Table:
    """A table whose original columns have this type; a struct without a field is left out, Parquet has none."""
    at = table.schema.get_field_index("original")
    if not original.num_fields:
        return table.remove_column(at)
    return table.set_column(at, pa.field("original", original), table["original"].cast(original))


# --- pass 2: units to an order -----------------------------------------------------------------------------------


def _order_rows(indexes: list[UnitIndex], config: ExamplesConfig, workers: WorkerConfig, work: Storage) -> Order:
    """Have the rows of the units put in order of id, range by range. Raises DataError for an id of different contents."""
    task = OrderRange(tuple(index.firsts for index in indexes), tuple(cut_ids(indexes)), work)
    facts = _order_ranges(task, workers, sum(sum(index.sizes) for index in indexes)) if task.ranges else []
    refuse_shared_ids(facts)
    # Ids made from the contents are equal for equal contents: these lie in one range.
    if config.id_field is not None and len(facts) > 1:
        facts = _drop_seen(DropSeen(tuple(facts), work), workers)
    return Order.of(facts, work)


def _order_ranges(task: OrderRange, workers: WorkerConfig, num_rows: int) -> list[RangeFacts]:
    import ray.data

    if len(task.ranges) == 1 and num_rows <= ROWS_DONE_HERE:
        return [RangeFacts(**json.loads(task(pa.table({"id": [0]}))["facts"]))]
    num_ranges = len(task.ranges)
    found: dict[int, RangeFacts] = {}
    with quiet_ray_data(), track("examples", num_ranges, "ranges of ids put in order") as progress:
        for result in _results(ray.data.range(num_ranges, override_num_blocks=num_ranges), task, workers):
            found[result["range"]] = RangeFacts(**json.loads(result["facts"]))
            progress.advance()
    return [found[number] for number in range(num_ranges)]


def _drop_seen(task: DropSeen, workers: WorkerConfig) -> list[RangeFacts]:
    import ray.data

    with quiet_ray_data():
        [result] = _results(ray.data.range(1), task, workers)
    return [RangeFacts(**facts) for facts in json.loads(result["ranges"])]


# --- pass 3: units to parts --------------------------------------------------------------------------------------


def _write_parts(addresses: Addresses, size: int, original: pa.DataType, workers: WorkerConfig, draft: Draft) -> None:
    """Have every part gathered from the units and written; parts that an earlier run wrote stay."""
    import ray.data

    num_parts = -(-addresses.num_rows // size)
    missing = [part for part in range(num_parts) if not draft.has(part_name(part))]
    step = max(1, min(ROWS_PER_TASK // size, -(-len(missing) // TASKS_WANTED)))
    num_done = num_parts - len(missing)
    _log.info(f"{num_parts:,} parts of {size:,} rows" + (f", {num_done:,} written by an earlier run" if num_done else ""))
    if not missing:
        return
    task = _WriteParts(addresses, size, original, draft.storage)
    with quiet_ray_data(), track("examples", num_parts, "parts written") as progress:
        progress.at(num_done)
        blocks = [pa.table({"part": missing[first : first + step]}) for first in range(0, len(missing), step)]
        for result in _results(ray.data.from_arrow(blocks), task, workers):
            draft.add(*(FileRecord(**record) for record in result["records"]))
            progress.advance(len(result["records"]))


@dataclass(frozen=True)
class _WriteParts:
    """Task: gather the rows of some parts from the units and write the parts."""

    addresses: Addresses
    size: int
    original: pa.DataType
    storage: Storage

    def __call__(self, batch: pa.Table) -> dict[str, Any]:
        starts = [self.size * part for part in batch["part"].to_pylist()]
        numbers = np.concatenate([np.arange(start, min(start + self.size, self.addresses.num_rows)) for start in starts])
        addresses, parts = self.addresses.of(numbers), numbers // self.size
        units, positions = (addresses[name].to_numpy() for name in ("unit", "position"))
        rows = self._gather(units, positions)
        records = []
        for part in np.unique(parts):
            mask = np.flatnonzero(parts == part)
            data = table_bytes(rows.slice(mask[0], len(mask)).combine_chunks())
            self.storage.write(part_name(part), data)
            records.append(dataclasses.asdict(FileRecord.of(part_name(part), data)))
        return {"records": records}

    def _gather(self, units: np.ndarray, positions: np.ndarray) -> pa.Table:
        """The rows at these addresses, in this order."""
        order = np.lexsort((positions, units))
        tables, work = [], self.addresses.work
        for unit in np.unique(units):
            wanted = np.sort(positions[units == unit])
            with work.explained(unit_path(unit)):
                table = take_rows(work.filesystem, work.path(unit_path(unit)), wanted)
            tables.append(_with_original(table.drop_columns(["content", "row"]), self.original))
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        return pa.concat_tables(tables).take(pa.array(place))


def take_rows(filesystem: Any, path: str, positions: np.ndarray) -> pa.Table:
    """The rows of a unit's file at some positions in ascending order. Reads only the row groups that hold them."""
    groups, group_of_row = np.unique(positions // UNIT_ROW_GROUP, return_inverse=True)
    with filesystem.open_input_file(path) as source:
        table = pq.ParquetFile(source).read_row_groups(groups.tolist())
    # Every group but a file's last is full, so the groups read stand UNIT_ROW_GROUP apart.
    return table.replace_schema_metadata().take(pa.array(group_of_row * UNIT_ROW_GROUP + positions % UNIT_ROW_GROUP))


# --- reading the artifact ----------------------------------------------------------------------------------------


def read_pool(artifact: Artifact, part: str, columns: list[str] | None = None) -> pa.Table:
    """The rows of a part that may be selected and trained on; all columns unless some are named."""
    return _read_split(artifact, part, POOL, columns)


def read_held_out(artifact: Artifact, part: str, columns: list[str] | None = None) -> pa.Table:
    """The held-out rows of a part; all columns unless some are named."""
    return _read_split(artifact, part, HELD_OUT, columns)


def _read_split(artifact: Artifact, part: str, split: str, columns: list[str] | None) -> pa.Table:
    table = artifact.read_table(part, None if columns is None else list({*columns, "split"}))
    table = table.filter(pc.equal(table["split"], split))
    return table if columns is None else table.select(columns)


def fetch_rows(artifact: Artifact, ids: pa.Array | Sequence[str]) -> Iterator[pa.Table]:
    """The examples with these ids, part by part, in order of id: tables of `example_id` and `row`, a struct of the corpus's
    own columns. Parts without any are not read.

    Raises ArtifactError naming ids that are not in the corpus.
    """
    wanted = pa.array(ids.to_pylist() if isinstance(ids, pa.Array) else ids, pa.string())
    is_found = np.zeros(len(wanted), bool)
    for part in artifact.parts():
        if not _may_hold(artifact, part, wanted):
            continue
        table = artifact.read_table(part, ["example_id", "original"])
        table = table.filter(pc.is_in(table["example_id"], wanted)).rename_columns(["example_id", "row"])
        is_found |= pc.is_in(wanted, table["example_id"].combine_chunks()).to_numpy(zero_copy_only=False)
        if len(table):
            yield table
    if not is_found.all():
        missing = wanted.filter(pa.array(~is_found))
        raise ArtifactError(f"{artifact.root.uri}: no example has the id {', '.join(missing[:5].to_pylist())}.")


def _may_hold(artifact: Artifact, part: str, ids: pa.Array) -> bool:
    """Whether one of the ids lies between a part's first and last, by the statistics in its footer."""
    try:
        with artifact.root.filesystem.open_input_file(artifact.root.path(part)) as source:
            footer = pq.read_metadata(source)
    except (OSError, pa.ArrowInvalid):
        return True  # missing or damaged: reading it says so, and what to do
    ranges = [footer.row_group(group).column(0).statistics for group in range(footer.num_row_groups)]
    if not all(found is not None and found.has_min_max for found in ranges):
        return True
    first, last = min(found.min for found in ranges), max(found.max for found in ranges)
    return bool(pc.any(pc.and_(pc.greater_equal(ids, first), pc.less_equal(ids, last))).as_py())
