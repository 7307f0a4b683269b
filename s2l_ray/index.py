"""The index of a corpus: which rows of its units are its examples, and in what order, found with memory for a few of them.

Every unit's file lies in order of id. So the ids can be gone over in ascending *ranges*: of each, ids and hashes alone are
read from the units, put in order and freed of copies, and the addresses (unit, position) of the rows that are kept are
written to the scratch directory. Whoever does this holds one range, however many rows there are; all rows at once would
take 0.3 KB each. Where rows bring their own ids, equal contents may lie in different ranges: then the hashes of the contents
kept so far are remembered, 10 bytes each.
"""

from __future__ import annotations

import io
import json
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from s2l_ray.artifacts import Storage, table_bytes
from s2l_ray.errors import DataError
from s2l_ray.fields import DIGEST_BYTES, HELD_OUT, POOL
from s2l_ray.progress import track
from s2l_ray.rows import Columns

# Rows of a unit that are read together. A range or a run of parts needs a few from every unit: smaller groups waste less.
UNIT_ROW_GROUP = 1024
# Rows of a range: the driver's memory (about 30 MB), against opening every unit once more.
RANGE_ROWS = 131_072
# Units that are read at once: in object storage each is a few requests that wait.
READERS = 16
INDEX_COLUMNS = ["example_id", "source", "split", "content", "row"]
_NAMED_IDS = 5


# --- units -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class UnitIndex:
    """What the driver learns about a unit: where its ids stand, which rows were dropped, which columns they had."""

    firsts: tuple[str, ...]
    """The first id of every row group."""
    sizes: tuple[int, ...]
    """The rows of every row group."""
    dropped: Counter[str]
    columns: Columns

    @classmethod
    def of(cls, groups: pa.Table) -> UnitIndex:
        """The index in what `row_groups` says of a unit."""
        notes = json.loads(groups.schema.metadata[b"notes"])
        original = pa.ipc.read_schema(pa.py_buffer(groups.schema.metadata[b"original"]))
        columns = Columns(pa.struct(list(original)), notes["ranks"])
        firsts, sizes = (tuple(groups[name].to_pylist()) for name in ("example_id", "size"))
        return cls(firsts, sizes, Counter(notes["dropped"]), columns)

    def groups_between(self, low: str, high: str | None) -> range:
        """The row groups that may hold ids from `low` on and below `high`."""
        # An id may begin in the group before the first that starts with it.
        start = max(0, bisect_left(self.firsts, low) - 1)
        return range(start, len(self.firsts) if high is None else bisect_left(self.firsts, high))


def unit_path(unit: int) -> str:
    return f"unit-{unit:05d}.parquet"


def described(table: pa.Table, dropped: Counter[str], columns: Columns) -> pa.Table:
    """A unit's table with what else `UnitIndex` tells in the schema's metadata."""
    notes = {"dropped": dropped, "ranks": columns.ranks}
    original = pa.schema(list(columns.type)).serialize().to_pybytes()
    return table.replace_schema_metadata({"notes": json.dumps(notes), "original": original})


def row_groups(table: pa.Table) -> pa.Table:
    """The first id and the size of every row group that a unit's table is written in, with the table's metadata."""
    starts = np.arange(0, table.num_rows, UNIT_ROW_GROUP)
    sizes = np.minimum(UNIT_ROW_GROUP, table.num_rows - starts)
    return table.select(["example_id"]).take(pa.array(starts)).append_column("size", pa.array(sizes))


# --- pure core ---------------------------------------------------------------------------------------------------


def cut_ids(units: Sequence[UnitIndex]) -> list[tuple[str, str | None]]:
    """Ranges of ids of about RANGE_ROWS rows that hold all rows: each from its first id to below that of the next.

    They are cut between ids, so that all rows of one id lie in one range, however many these are.
    """
    cuts: list[str] = []
    num_rows = 0
    for first, size in sorted(group for unit in units for group in zip(unit.firsts, unit.sizes, strict=True)):
        if not cuts or (num_rows >= RANGE_ROWS and first != cuts[-1]):
            cuts.append(first)
            num_rows = 0
        num_rows += size
    return list(zip(cuts, [*cuts[1:], None], strict=True)) if cuts else []


def keep_first(index: pa.Table) -> tuple[pa.Table, pa.Array]:
    """The index in order of id, without exact copies; and the ids that stand for different contents.

    Of equal contents the first by (id, source, row hash, unit, position) is kept.
    """
    keys = [(name, "ascending") for name in ("example_id", "source", "row", "unit", "position")]
    index = index.take(pc.sort_indices(index, sort_keys=keys))
    # Codes count up in order of first appearance: a code above all before it is a content's first row.
    codes = index["content"].combine_chunks().dictionary_encode().indices.to_numpy()
    highest_before = np.concatenate([[-1], np.maximum.accumulate(codes)[:-1]]) if len(codes) else codes
    return index.filter(pa.array(codes > highest_before)), _shared_ids(index, codes)


def _shared_ids(index: pa.Table, codes: np.ndarray) -> pa.Array:
    """Ids that stand for different contents. The index is in order of id."""
    ids = index["example_id"].combine_chunks()
    is_same_id = pc.equal(ids[1:], ids[:-1]).to_numpy(zero_copy_only=False)
    return ids.take(pa.array(np.flatnonzero(is_same_id & (codes[1:] != codes[:-1])))).unique()


class SeenContents:
    """The hashes of the contents of all ranges so far, in order, in one array."""

    def __init__(self, most: int) -> None:
        self._hashes = np.empty(most, f"S{DIGEST_BYTES}")  # what is not written yet takes no memory
        self._num = 0

    def add(self, contents: pa.ChunkedArray) -> np.ndarray:
        """Whether each of these, no two of them equal, was not there before; they are from now on."""
        array = contents.combine_chunks()
        hashes = np.frombuffer(array.buffers()[1], self._hashes.dtype)[array.offset : array.offset + len(array)]
        known = self._hashes[: self._num]
        places = np.searchsorted(known, hashes)
        is_new = np.ones(len(hashes), bool)
        inside = places < self._num
        is_new[inside] = known[places[inside]] != hashes[inside]
        num_new = int(is_new.sum())
        self._hashes[self._num : self._num + num_new] = np.sort(hashes[is_new])
        self._num += num_new
        # Two runs in order: a stable sort merges them in place.
        self._hashes[: self._num].sort(kind="stable")
        return is_new


# --- the order ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Addresses:
    """Which row of which unit stands where, range by range in files of the scratch directory. Cheap to send to a worker."""

    work: Storage
    ends: tuple[int, ...]
    """The number of rows up to the end of every range."""

    @property
    def num_rows(self) -> int:
        return self.ends[-1] if self.ends else 0

    def of(self, rows: np.ndarray) -> pa.Table:
        """`unit` and `position` of these rows of the whole order, ascending."""
        number_of_row = np.searchsorted(self.ends, rows, side="right")
        tables = []
        for number in np.unique(number_of_row):
            table = pq.read_table(io.BytesIO(self.work.read(_order_path(number))))
            begin = self.ends[number] - table.num_rows
            tables.append(table.take(pa.array(rows[number_of_row == number] - begin)))
        return pa.concat_tables(tables)


@dataclass(frozen=True)
class Order:
    """The examples of a corpus in order of id."""

    addresses: Addresses
    sources: dict[str, dict[str, int]]
    """Rows in the pool and held out, by source in order of name."""
    num_duplicates: int


def order_rows(units: Sequence[UnitIndex], work: Storage, has_own_ids: bool) -> Order:
    """The order of the rows of units, whose files are in the scratch directory, without exact copies.

    Raises DataError where an id stands for different contents. Ids made from the content are the same for the same content.
    """
    ranges = cut_ids(units)
    seen = SeenContents(sum(sum(unit.sizes) for unit in units)) if has_own_ids and len(ranges) > 1 else None
    ordering = _Ordering(work, seen)
    with ThreadPoolExecutor(READERS) as pool, track("examples", len(ranges), "ranges of ids ordered") as progress:
        for low, high in ranges:
            ordering.add(_read_range(units, low, high, work, pool))
            # Else what Arrow's threads freed stays theirs, and every range adds some.
            pa.default_memory_pool().release_unused()
            progress.advance()
    return ordering.finished()


@dataclass
class _Ordering:
    """The order while it is being made, range by range."""

    work: Storage
    seen: SeenContents | None
    ends: list[int] = field(default_factory=list)
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    num_read: int = 0
    num_shared: int = 0
    shared: list[str] = field(default_factory=list)

    def add(self, index: pa.Table) -> None:
        """Order the next range and write down what is kept."""
        kept, shared = keep_first(index)
        if self.seen is not None:
            kept = kept.filter(pa.array(self.seen.add(kept["content"])))
        self.work.write(_order_path(len(self.ends)), table_bytes(kept.select(["unit", "position"])))
        self.ends.append(sum(self.ends[-1:]) + kept.num_rows)
        self.num_read += index.num_rows
        for row in kept.group_by(["source", "split"]).aggregate([([], "count_all")]).to_pylist():
            self.counts[row["source"], row["split"]] += row["count_all"]
        self.num_shared += len(shared)
        self.shared += shared[: _NAMED_IDS - len(self.shared)].to_pylist()

    def finished(self) -> Order:
        """The whole order. Raises DataError naming ids that stand for different contents."""
        if self.num_shared:
            shown = ", ".join(self.shared) + (", ..." if self.num_shared > len(self.shared) else "")
            raise DataError(
                f"examples.id_field: {self.num_shared:,} ids stand for rows with different prompt or response: {shown}. Give "
                "every row its own id, or leave examples.id_field out: ids are then made from the content."
            )
        sources: dict[str, dict[str, int]] = {}
        for (source, split), count in sorted(self.counts.items()):
            sources.setdefault(source, {POOL: 0, HELD_OUT: 0})[split] = count
        addresses = Addresses(self.work, tuple(self.ends))
        return Order(addresses, sources, self.num_read - addresses.num_rows)


def _order_path(number: int) -> str:
    return f"order-{number:05d}.parquet"


def _read_range(units: Sequence[UnitIndex], low: str, high: str | None, work: Storage, pool: Executor) -> pa.Table:
    """The index of all rows with ids from `low` on and below `high`, with their addresses."""
    groups = {number: unit.groups_between(low, high) for number, unit in enumerate(units)}
    wanted = [number for number, some in groups.items() if some]
    return pa.concat_tables(pool.map(lambda number: _read_unit_range(number, groups[number], low, high, work), wanted))


def _read_unit_range(unit: int, groups: range, low: str, high: str | None, work: Storage) -> pa.Table:
    """A range's part in a unit, which lies in some row groups."""
    path = unit_path(unit)
    with work.open(path) as source, work.explained(path):
        # One request for what lies side by side; a thread for every unit is enough.
        file: Any = pq.ParquetFile(source, pre_buffer=True)
        table = file.read_row_groups(list(groups), columns=INDEX_COLUMNS, use_threads=False).replace_schema_metadata()
    begin = pc.sum(pc.less(table["example_id"], low)).as_py()
    end = table.num_rows if high is None else pc.sum(pc.less(table["example_id"], high)).as_py()
    positions = np.arange(begin, end, dtype=np.int32) + np.int32(groups.start * UNIT_ROW_GROUP)
    addresses = {"unit": pa.array(np.full(end - begin, unit, np.int32)), "position": pa.array(positions)}
    table = table.slice(begin, end - begin)
    return pa.table({name: table[name] for name in INDEX_COLUMNS} | addresses)
