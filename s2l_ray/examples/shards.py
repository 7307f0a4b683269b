"""Pass 1: every shard of the corpus becomes a file of examples in order of id, in the scratch directory.

The driver keeps an index of each: the ids at which its row groups begin, and counts. It reads no row.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from s2l_ray.config import ExamplesConfig, WorkerConfig
from s2l_ray.examples.columns import Columns, join_columns, struct_from_arrow
from s2l_ray.examples.dropped import Dropped
from s2l_ray.examples.fields import normalise
from s2l_ray.examples.layouts import Layout
from s2l_ray.examples.pieces import Shard
from s2l_ray.examples.rows import Records
from s2l_ray.progress import get_log, track
from s2l_ray.runtime.data import cpus_per_task, run_tasks
from s2l_ray.runtime.room import await_room
from s2l_ray.storage.drafts import table_bytes
from s2l_ray.storage.places import Storage

SHARD_ROW_GROUP = 512
"""Rows of a shard's file that are read together. Later passes need a few rows of every shard: smaller groups waste less."""
REPEATING = ["source", "split"]
"""The columns of a corpus that are written with a dictionary; texts of rows seldom repeat, and take twice as long to read."""


@dataclass(frozen=True)
class ShardIndex:
    """What the driver keeps of a shard."""

    firsts: tuple[str, ...]
    """The first id of every row group."""
    sizes: tuple[int, ...]
    """The rows of every row group."""
    dropped: Dropped
    columns: Columns
    has_json: bool
    """Whether its rows have their own text."""
    num_conversations: int

    @classmethod
    def of(cls, groups: pa.Table) -> ShardIndex:
        """The index from the table of `row_groups`."""
        notes = json.loads(groups.schema.metadata[b"notes"])
        original = pa.ipc.read_schema(pa.py_buffer(groups.schema.metadata[b"original"]))
        columns = Columns({one.name: one for one in original}, notes["ranks"])
        firsts, sizes = (tuple(groups[name].to_pylist()) for name in ("example_id", "size"))
        dropped = Dropped.from_json(notes["dropped"])
        return cls(firsts, sizes, dropped, columns, notes["has_json"], notes["num_conversations"])


# --- on the driver -----------------------------------------------------------------------------------------------


def read_shards(
    shards: Sequence[Shard], config: ExamplesConfig, layout: Layout, workers: WorkerConfig, work: Storage
) -> list[ShardIndex]:
    """Have every shard read and written to `work`; their indexes, in order. Files that an earlier run left there stay.

    Raises DataError for a row that contradicts the config, ConfigError where there is no machine for a task.
    """
    indexes: dict[int, ShardIndex] = {}
    num_reused = 0
    await_room("examples", {"CPU": cpus_per_task(workers)}, 1, workers.wait_minutes)
    with track("examples", len(shards), "shards read") as progress:
        for result in run_tasks(_ReadShard(tuple(shards), config, layout, work), len(shards), workers):
            indexes[result["shard"]] = ShardIndex.of(pq.read_table(io.BytesIO(result["index"])))
            num_reused += result["is_reused"]
            progress.advance()
    if num_reused:
        get_log("examples").info(f"{num_reused:,} of {len(shards):,} shards were read by an earlier run")
    return [indexes[number] for number in range(len(shards))]


# --- in a task ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _ReadShard:
    """Task: write the file of a shard, unless it is there; returns its index."""

    shards: tuple[Shard, ...]
    config: ExamplesConfig
    layout: Layout
    work: Storage

    def __call__(self, number: int) -> dict[str, Any]:
        path = shard_path(number)
        is_reused = self.work.exists(path)
        if is_reused:
            table = pq.read_table(io.BytesIO(self.work.read(path)), columns=["example_id"])
        else:
            with _without_collection():
                table = read_shard(self.shards[number], self.config, self.layout)
            sink = io.BytesIO()
            pq.write_table(table, sink, compression="lz4", use_dictionary=REPEATING, row_group_size=SHARD_ROW_GROUP)
            self.work.write(path, sink.getvalue())
        return {"shard": number, "is_reused": is_reused, "index": table_bytes(row_groups(table))}


@contextlib.contextmanager
def _without_collection() -> Iterator[None]:
    """Within it nothing looks for reference cycles: parsed rows have none, and looking takes a tenth of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def read_shard(shard: Shard, config: ExamplesConfig, layout: Layout | None = None) -> pa.Table:
    """The examples of a shard in order of id: the columns of `fields.Examples.table`, and the notes for its index.

    Where all rows are plain and have a text of their own, prompt and response are left out: `parts` reads them from it again,
    in less time than two more texts take to be written and read.

    Raises DataError for a row that contradicts the config.
    """
    found = [normalise(rows, config, layout) for piece in shard for rows in piece.read()]
    found = found or [normalise(Records([], str, ""), config, layout)]
    columns = join_columns(examples.columns for examples in found)
    original = join_columns(examples.columns for examples in found if "original" in examples.table.column_names).type
    table = pa.concat_tables([_with_original(examples.table, original) for examples in found], promote_options="default")
    if "row_json" in table.column_names and all(examples.are_plain for examples in found):
        table = table.drop_columns(["prompt", "response"])
    table = table.take(pc.sort_indices(table, sort_keys=[("example_id", "ascending")]))
    return with_notes(table, Dropped.joined(examples.dropped for examples in found), columns)


def _with_original(table: pa.Table, original: pa.StructType) -> pa.Table:
    """The table with its column `original`, if it has one, of this type; a struct of no fields is none for Parquet. Of no rows
    it is left out: they have no part in the type, and may have another that does not become it."""
    if "original" not in table.column_names:
        return table
    if not len(table):
        return table.drop_columns(["original"])
    rows = table["original"].combine_chunks()
    table = table.drop_columns(["original"])
    return table.append_column("original", struct_from_arrow(rows, original)) if original.num_fields else table


def with_notes(table: pa.Table, dropped: Dropped, columns: Columns) -> pa.Table:
    """A shard's table, with what else is in its `ShardIndex` in the schema's metadata."""
    notes = {
        "dropped": dropped.as_json(),
        "ranks": columns.ranks,
        "has_json": "row_json" in table.column_names and len(table) > table["row_json"].null_count,
        "num_conversations": len(table) - table["messages"].null_count,
    }
    # With their marks, which other shards' columns are joined by: the settled type has none.
    original = pa.schema(list(columns.fields.values())).serialize().to_pybytes()
    return table.replace_schema_metadata({"notes": json.dumps(notes), "original": original})


def row_groups(table: pa.Table) -> pa.Table:
    """The first id and the `size` in rows of each row group that a shard's table is written in, with the table's metadata."""
    starts = np.arange(0, table.num_rows, SHARD_ROW_GROUP)
    sizes = np.minimum(SHARD_ROW_GROUP, table.num_rows - starts)
    return table.select(["example_id"]).take(pa.array(starts)).append_column("size", pa.array(sizes))


# --- a shard's file ----------------------------------------------------------------------------------------------


def shard_path(number: int) -> str:
    """The file of a shard in the scratch directory."""
    return f"shard-{number:05d}.parquet"


def take_rows(work: Storage, number: int, positions: NDArray[np.integer[Any]]) -> pa.Table:
    """The rows of a shard's file at some positions, ascending, shape (M,). Reads only the row groups that hold them."""
    groups, group_of_row = np.unique(positions // SHARD_ROW_GROUP, return_inverse=True)
    path = shard_path(number)
    with work.open(path) as source, work.explained(path):
        table = pq.ParquetFile(source).read_row_groups(groups.tolist())
    # All groups but a file's last are full, so those that were read are SHARD_ROW_GROUP rows apart.
    return table.replace_schema_metadata().take(pa.array(group_of_row * SHARD_ROW_GROUP + positions % SHARD_ROW_GROUP))
