"""Pass 3: the rows are gathered from the shards, in their order, and written as the parts of the artifact."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from s2l_ray.config import WorkerConfig
from s2l_ray.examples.columns import holds_json, struct_from_arrow, struct_from_values
from s2l_ray.examples.ids import one_array
from s2l_ray.examples.json_values import loads_json, read_fields
from s2l_ray.examples.layouts import Layout
from s2l_ray.examples.order import Addresses
from s2l_ray.examples.plain_pairs import pairs_again
from s2l_ray.examples.shards import REPEATING, take_rows
from s2l_ray.examples.splits import with_held_out
from s2l_ray.progress import get_log, track
from s2l_ray.runtime.data import run_tasks
from s2l_ray.storage.drafts import Draft, table_bytes
from s2l_ray.storage.layout import part_name
from s2l_ray.storage.places import Storage
from s2l_ray.storage.records import FileRecord

SMALLEST_PART, MOST_PARTS = 512, 1024
# Rows that one task gathers. It holds them in memory; smaller tasks open every shard more often.
ROWS_PER_TASK = 32_768
TASKS_WANTED = 16
JOINED_BYTES = 2**26  # of rows whose columns are made together
WRITERS = 2  # threads of a task that wait for the disk


def rows_per_part(num_rows: int, wanted: int | str) -> int:
    """Rows in one part: as wanted, or for `auto` 512, doubled until there are at most 1,024 parts."""
    if isinstance(wanted, int):
        return wanted
    size = SMALLEST_PART
    while num_rows > size * MOST_PARTS:
        size *= 2
    return size


@dataclass(frozen=True)
class PartColumns:
    """The columns of a corpus's parts that not every corpus has."""

    original: pa.StructType
    """The corpus's own columns."""
    has_json: bool
    """Whether rows have a text of their own: `row_json`."""
    has_conversations: bool
    """Whether there are `messages` and `tools`."""

    layout: Layout
    """Which fields are what: shards of plain rows have no prompt and response beside the rows' own texts."""

    def of(self, table: pa.Table) -> pa.Table:
        """Rows of a shard with these columns."""
        if not self.has_json:
            made = struct_from_arrow(one_array(table["original"]), self.original)
            return table.drop_columns(["original"]).append_column("original", made).select(self._names)
        texts = one_array(table["row_json"])
        fields = None if any(map(holds_json, self.original)) else read_fields(texts, self.original)
        if "prompt" not in table.column_names:
            prompts, responses = pairs_again(texts, fields, self.layout)
            table = table.append_column("prompt", prompts).append_column("response", responses)
        if fields is None:
            fields = struct_from_values([loads_json(text) for text in texts.to_pylist()], self.original)
        return table.append_column("original", fields).select(self._names)

    @property
    def _names(self) -> list[str]:
        conversation = ["messages", "tools"] if self.has_conversations else []
        own = ["original", "row_json"] if self.has_json else ["original"]
        return ["example_id", "source", "prompt", "response", "split", *conversation, *own]


def write_parts(addresses: Addresses, size: int, columns: PartColumns, workers: WorkerConfig, draft: Draft) -> None:
    """Have every part of `size` rows gathered and written; parts that an earlier run wrote stay.

    Raises StorageError where writing fails.
    """
    num_parts = -(-addresses.num_rows // size)
    missing = [part for part in range(num_parts) if not draft.has(part_name(part))]
    num_done = num_parts - len(missing)
    get_log("examples").info(
        f"{num_parts:,} parts of {size:,} rows" + (f", {num_done:,} written by an earlier run" if num_done else "")
    )
    if not missing:
        return
    step = max(1, min(ROWS_PER_TASK // size, -(-len(missing) // TASKS_WANTED)))
    parts = tuple(tuple(missing[first : first + step]) for first in range(0, len(missing), step))
    task = _WriteParts(parts, addresses, size, columns, draft.storage)
    with track("examples", num_parts, "parts written") as progress:
        progress.at(num_done)
        for result in run_tasks(task, len(parts), workers):
            draft.add(*(FileRecord(**record) for record in result["records"]))
            progress.advance(len(result["records"]))


@dataclass(frozen=True)
class _WriteParts:
    """Task: gather the rows of some parts from the shards and write them; returns the records of the files."""

    parts: tuple[tuple[int, ...], ...]
    """The parts of every task."""
    addresses: Addresses
    size: int
    columns: PartColumns
    storage: Storage

    def __call__(self, number: int) -> dict[str, Any]:
        starts = [self.size * part for part in self.parts[number]]
        rows_M = np.concatenate([np.arange(start, min(start + self.size, self.addresses.num_rows)) for start in starts])
        table = self._gather(rows_M)
        # A file waits for the disk: the next one is made meanwhile.
        with ThreadPoolExecutor(WRITERS) as pool:
            writes = []
            for part in self.parts[number]:
                first, end = np.searchsorted(rows_M, [self.size * part, self.size * (part + 1)])
                data = table_bytes(table.slice(first, end - first).combine_chunks(), REPEATING)
                writes.append(pool.submit(self._write, part_name(part), data))
            return {"records": [dataclasses.asdict(write.result()) for write in writes]}

    def _write(self, name: str, data: bytes) -> FileRecord:
        self.storage.write(name, data)
        return FileRecord.of(name, data)

    def _gather(self, rows_M: NDArray[np.int64]) -> pa.Table:
        """Some rows of the order, given by their numbers."""
        addresses = self.addresses.of(rows_M)
        shards_M, positions_M = (addresses[name].to_numpy() for name in ("shard", "position"))
        taken = (
            take_rows(self.addresses.work, int(shard), np.sort(positions_M[shards_M == shard])) for shard in np.unique(shards_M)
        )
        tables = [self.columns.of(with_held_out(table, self.addresses.held_out)) for table in _joined(taken)]
        # The tables are in order of shard and position; the row at place i of that order belongs at by_address_M[i].
        by_address_M = np.lexsort((positions_M, shards_M))
        return pa.concat_tables(tables).take(pa.array(np.argsort(by_address_M)))


def _joined(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Neighbouring tables of the same columns as one each, up to JOINED_BYTES: columns are made of many rows at once."""
    joined: list[pa.Table] = []
    num_bytes = 0
    for table in tables:
        if joined and (num_bytes > JOINED_BYTES or not table.schema.equals(joined[0].schema)):
            yield pa.concat_tables(joined).combine_chunks()
            joined, num_bytes = [], 0
        joined.append(table)
        num_bytes += table.nbytes
    if joined:
        yield pa.concat_tables(joined).combine_chunks()
