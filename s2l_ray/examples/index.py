"""The index of a corpus: which rows of its units are its examples, and in what order, whatever their number.

Every unit's file lies in order of id. So the ids can be cut into *ranges*, and a task needs only the ids and hashes of one
range's rows to put them in order, drop exact copies and write down the addresses (unit, position) of the rows that it keeps.
The driver learns numbers: all rows' ids and hashes would take 0.3 KB of its memory each. Where rows bring their own ids, equal
contents may lie in different ranges: then one more task goes over the rows kept, and remembers 10 bytes of each.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from s2l_ray.errors import DataError
from s2l_ray.examples.fields import DIGEST_BYTES, HELD_OUT, POOL
from s2l_ray.examples.rows import Columns
from s2l_ray.storage.drafts import table_bytes
from s2l_ray.storage.places import Storage

# Rows of a unit that are read together. A range or a run of parts needs a few from every unit: smaller groups waste less.
UNIT_ROW_GROUP = 1024
# Rows of a range: the memory of a task (about 30 MB), against opening every unit once more.
RANGE_ROWS = 131_072
# Units that are read at once: in object storage each is a few requests that wait.
READERS = 8
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


def groups_between(firsts: Sequence[str], low: str, high: str | None) -> range:
    """The row groups of a unit that may hold ids from `low` on and below `high`, by the first id of each."""
    # An id may begin in the group before the first that starts with it.
    start = max(0, bisect_left(firsts, low) - 1)
    return range(start, len(firsts) if high is None else bisect_left(firsts, high))


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


def count_splits(kept: pa.Table) -> list[tuple[str, str, int]]:
    """Rows by source and split."""
    counted = kept.group_by(["source", "split"]).aggregate([([], "count_all")]).to_pylist()
    return [(row["source"], row["split"], row["count_all"]) for row in counted]


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


# --- ranges ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RangeFacts:
    """What the driver learns about a range that was put in order. Made of what JSON has."""

    path: str
    """The file in the scratch directory that says where the rows kept are."""
    num_read: int
    num_kept: int
    counts: list[tuple[str, str, int]]
    """Source, split, rows kept."""
    num_shared: int
    """Ids that stand for different contents."""
    shared: list[str]
    """The first few of them."""


@dataclass(frozen=True)
class OrderRange:
    """Task: put the rows of a range in order, without exact copies, and write down where they are."""

    firsts: tuple[tuple[str, ...], ...]
    """Of every unit the first id of every row group."""
    ranges: tuple[tuple[str, str | None], ...]
    work: Storage

    def __call__(self, batch: pa.Table) -> dict[str, Any]:
        [number] = batch["id"].to_pylist()
        index = self._read(*self.ranges[number])
        kept, shared = keep_first(index)
        path = f"order-{number:05d}.parquet"
        self.work.write(path, table_bytes(kept.drop_columns(["example_id", "row"])))
        named = shared[:_NAMED_IDS].to_pylist()
        facts = RangeFacts(path, index.num_rows, kept.num_rows, count_splits(kept), len(shared), named)
        return {"range": number, "facts": json.dumps(dataclasses.asdict(facts))}

    def _read(self, low: str, high: str | None) -> pa.Table:
        """The index of all rows with ids from `low` on and below `high`, with their addresses."""
        groups = {unit: groups_between(firsts, low, high) for unit, firsts in enumerate(self.firsts)}
        wanted = [unit for unit, some in groups.items() if some]
        with ThreadPoolExecutor(READERS) as pool:
            return pa.concat_tables(pool.map(lambda unit: self._read_unit(unit, groups[unit], low, high), wanted))

    def _read_unit(self, unit: int, groups: range, low: str, high: str | None) -> pa.Table:
        """A range's part in a unit, which lies in some row groups."""
        path = unit_path(unit)
        with self.work.open(path) as source, self.work.explained(path):
            file = pq.ParquetFile(source, pre_buffer=True)  # few requests for columns that lie side by side
            table = file.read_row_groups(list(groups), columns=INDEX_COLUMNS, use_threads=False).replace_schema_metadata()
        is_inside = pc.greater_equal(table["example_id"], low)
        if high is not None:
            is_inside = pc.and_(is_inside, pc.less(table["example_id"], high))
        positions = np.flatnonzero(is_inside.to_numpy()).astype(np.int32) + np.int32(groups.start * UNIT_ROW_GROUP)
        addresses = {"unit": pa.array(np.full(len(positions), unit, np.int32)), "position": pa.array(positions)}
        table = table.filter(is_inside)
        return pa.table({name: table[name] for name in INDEX_COLUMNS} | addresses)


def refuse_shared_ids(ranges: Sequence[RangeFacts]) -> None:
    """Raise DataError naming ids that stand for different contents."""
    count = sum(facts.num_shared for facts in ranges)
    if count:
        names = [name for facts in ranges for name in facts.shared][:_NAMED_IDS]
        shown = ", ".join(names) + (", ..." if count > len(names) else "")
        raise DataError(
            f"examples.id_field: {count:,} ids stand for rows with different prompt or response: {shown}. Give "
            "every row its own id, or leave examples.id_field out: ids are then made from the content."
        )


@dataclass(frozen=True)
class DropSeen:
    """Task: take from every range the contents of those before it."""

    ranges: tuple[RangeFacts, ...]
    work: Storage

    def __call__(self, _batch: pa.Table) -> dict[str, Any]:
        seen = SeenContents(sum(facts.num_kept for facts in self.ranges))
        found = [self._without_seen(number, facts, seen) for number, facts in enumerate(self.ranges)]
        return {"ranges": json.dumps([dataclasses.asdict(facts) for facts in found])}

    def _without_seen(self, number: int, facts: RangeFacts, seen: SeenContents) -> RangeFacts:
        """A range without what was seen; where there is any, in another file, so that this can be done again."""
        kept = _read(self.work, facts.path)
        is_new = seen.add(kept["content"])
        if is_new.all():
            return facts
        kept, path = kept.filter(pa.array(is_new)), f"distinct-{number:05d}.parquet"
        self.work.write(path, table_bytes(kept))
        return dataclasses.replace(facts, path=path, num_kept=kept.num_rows, counts=count_splits(kept))


def _read(work: Storage, path: str) -> pa.Table:
    return pq.read_table(io.BytesIO(work.read(path)))


# --- the order ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Addresses:
    """Which row of which unit stands where, range by range in files of the scratch directory. Cheap to send to a worker."""

    work: Storage
    paths: tuple[str, ...]
    ends: tuple[int, ...]
    """The number of rows up to the end of every range."""

    @property
    def num_rows(self) -> int:
        return self.ends[-1] if self.ends else 0

    def of(self, rows: np.ndarray) -> pa.Table:
        """`unit` and `position` of these rows of the whole order, ascending."""
        range_of_row = np.searchsorted(self.ends, rows, side="right")
        tables = []
        for number in np.unique(range_of_row):
            table = _read(self.work, self.paths[number]).select(["unit", "position"])
            begin = self.ends[number] - table.num_rows
            tables.append(table.take(pa.array(rows[range_of_row == number] - begin)))
        return pa.concat_tables(tables)


@dataclass(frozen=True)
class Order:
    """The examples of a corpus in order of id."""

    addresses: Addresses
    sources: dict[str, dict[str, int]]
    """Rows in the pool and held out, by source in order of name."""
    num_duplicates: int

    @classmethod
    def of(cls, ranges: Sequence[RangeFacts], work: Storage) -> Order:
        """The whole order from its ranges, of which no two have a content in common."""
        counts: Counter[tuple[str, str]] = Counter()
        for facts in ranges:
            counts.update({(source, split): rows for source, split, rows in facts.counts})
        sources: dict[str, dict[str, int]] = {}
        for (source, split), rows in sorted(counts.items()):
            sources.setdefault(source, {POOL: 0, HELD_OUT: 0})[split] = rows
        ends = itertools.accumulate(facts.num_kept for facts in ranges)
        addresses = Addresses(work, tuple(facts.path for facts in ranges), tuple(ends))
        return cls(addresses, sources, sum(facts.num_read for facts in ranges) - addresses.num_rows)
