"""Tables of any size in ascending order of `example_id`: sorted runs on disk, merged, with memory for a few runs of 64 MB.

Losses, ids and texts of a corpus come in whatever order their files have them; everything after this module sees one
order. Input that ascends already is written once and not merged.
"""

from __future__ import annotations

import functools
import itertools
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from s2l_ray.errors import DataError
from s2l_ray.examples.ids import NAMED_IDS, not_unique, one_array, repeated
from s2l_ray.storage.places import Storage

# A run is sorted in memory, several at a time: 12 MB of trajectories of 12 points, and no more of long texts.
RUN_ROWS = 131_072
RUN_BYTES = 16 * 2**20
# What is read of a run at once while merging: a share of a run, by rows or by bytes.
PIECE_ROWS = 2_048
# A merged range is as large as a run, or of many runs (every so many one more) as large as up to four.
RUNS_OF_LARGER_RANGES, MAX_RUNS_PER_RANGE = 20, 4
_MAX_WIDTH = 64
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class StoredFile:
    """A file that several machines see, on a shared disk or in object storage."""

    storage: Storage
    name: str


@dataclass(frozen=True)
class SortedTable:
    """A table in ascending order of unique `example_id` (string bytewise, or integer), as Arrow files one after the other or
    in memory."""

    files: Sequence[Path | StoredFile]
    schema: pa.Schema
    num_rows: int
    table: pa.Table | None = None

    @classmethod
    def of(cls, table: pa.Table) -> SortedTable:
        """One in memory; the rows must be in order."""
        return cls((), table.schema, len(table), table)

    def blocks(self, num_rows: int, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """The rows in blocks of `num_rows` (the last may be shorter), each column in one chunk."""
        return self.joined(self._batches(columns), num_rows)

    def rows_of(self, num_bytes: int, limit: int) -> int:
        """How many rows take about `num_bytes`, 1 to `limit`: the size of a block of long texts."""
        total = (
            self.table.nbytes
            if self.table is not None
            else sum(path.stat().st_size for path in self.files if isinstance(path, Path))
        )
        return int(min(limit, max(1, num_bytes * self.num_rows // max(total, 1))))

    @staticmethod
    def joined(batches: Iterable[pa.RecordBatch], num_rows: int) -> Iterator[pa.Table]:
        """Batches of any size as tables of `num_rows` (the last may be shorter), each column in one chunk."""
        waiting: list[pa.RecordBatch] = []
        count = 0
        for batch in batches:
            start = 0
            while count + len(batch) - start >= num_rows:
                stop = start + num_rows - count
                yield _table([*waiting, batch[start:stop]])
                waiting, count, start = [], 0, stop
            if start < len(batch):
                waiting.append(batch[start:])
                count += len(batch) - start
        if waiting:
            yield _table(waiting)

    def _batches(self, columns: Sequence[str] | None) -> Iterator[pa.RecordBatch]:
        if self.table is not None:
            table = self.table if columns is None else self.table.select(list(columns))
            yield from table.to_batches()
        for path in self.files:
            with Run.open(path, self.schema, columns) as reader:
                for piece in range(reader.num_record_batches):
                    yield reader.get_batch(piece)


def sort_by_id(
    batches: Iterable[pa.Table], folder: Path, pool: Executor, finish: Callable[[pa.Table], pa.Table] = lambda table: table
) -> SortedTable:
    """Sort tables of one schema by `example_id`; `finish` may add columns to each sorted run, in threads of the pool.

    Raises DataError naming ids that occur twice, OSError where the disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True)

    def write(numbered: tuple[int, pa.Table]) -> Run:
        number, table = numbered
        return Run.write(folder / f"run-{number:05d}.arrow", finish(sorted_by_id(table)))

    runs = list(in_order(pool, write, enumerate(of_run_size(batches))))
    if not runs:
        raise DataError("no rows.")
    check_unique(runs)
    if all(left.last < right.first for left, right in itertools.pairwise(runs)):
        return SortedTable(tuple(run.path for run in runs), runs[0].schema, sum(run.num_rows for run in runs))
    return _merged(runs, folder, pool)


def _merged(runs: list[Run], folder: Path, pool: Executor) -> SortedTable:
    """Runs as one table: cut at the same ids, the pieces of each range sorted together."""
    splits = splits_of(runs)

    def merge(number: int) -> Run:
        tables = [run.between(splits[number], splits[number + 1]) for run in runs]
        return Run.write(folder / f"merged-{number:05d}.arrow", sorted_by_id(pa.concat_tables(tables)))

    merged = [run for run in in_order(pool, merge, range(len(splits) - 1)) if run.num_rows]
    for run in runs:
        Path(str(run.path)).unlink()
    check_unique(merged)
    return SortedTable(tuple(run.path for run in merged), runs[0].schema, sum(run.num_rows for run in merged))


def splits_of(runs: Sequence[Run]) -> list[Any]:
    """Ids at which all runs are cut into ranges, None at both ends."""
    firsts = sorted(first for run in runs for first in run.firsts)
    # A run's rows lie between the samples: with so many samples per range its size varies little. Each range opens all runs,
    # which takes 0.2 ms a run: of many runs ranges are larger.
    per_range = RUN_ROWS // PIECE_ROWS * min(MAX_RUNS_PER_RANGE, 1 + len(runs) // RUNS_OF_LARGER_RANGES)
    return [None, *firsts[per_range::per_range], None]


def check_unique(runs: Sequence[Run]) -> None:
    """Raise DataError naming ids that occur more than once in a run."""
    count = sum(run.num_duplicates for run in runs)
    if count:
        raise not_unique(pa.concat_arrays([run.duplicates for run in runs]), count=count)


@dataclass(frozen=True)
class Run:
    """A sorted Arrow file, and the first id of every piece of it."""

    path: Path | StoredFile
    schema: pa.Schema
    num_rows: int
    firsts: list[Any]
    last: Any
    num_duplicates: int
    duplicates: pa.Array
    """The first few ids that occur more than once."""

    @property
    def first(self) -> Any:
        return self.firsts[0]

    @classmethod
    def write(cls, path: Path, table: pa.Table) -> Run:
        pieces = RUN_ROWS // PIECE_ROWS
        size = min(PIECE_ROWS, max(1, RUN_BYTES // pieces * len(table) // max(table.nbytes, 1)))
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=size)
        ids = table["example_id"]
        firsts = [ids[start].as_py() for start in range(0, len(ids), size)]
        last = ids[-1].as_py() if len(ids) else None
        ids = one_array(ids)
        twice = ids[:0] if is_ascending(ids) else repeated(ids)
        named = pa.array(twice[:NAMED_IDS].to_pylist(), ids.type)  # a slice would keep all ids
        return cls(path, table.schema, len(table), firsts, last, len(twice), named)

    @staticmethod
    def open(path: Path | StoredFile, schema: pa.Schema, columns: Sequence[str] | None = None) -> Any:
        """A reader of the file: not mapped, since mapped pages count as this process's memory."""
        fields = [schema.get_field_index(name) for name in columns] if columns is not None else None
        file = pa.OSFile(str(path)) if isinstance(path, Path) else path.storage.open(path.name)
        return pa.ipc.open_file(file, options=pa.ipc.IpcReadOptions(included_fields=fields))

    def between(self, first: Any, stop: Any) -> pa.Table:
        """The rows whose ids lie in [first, stop); None is no limit."""
        begin = 0 if first is None else max(bisect_left(self.firsts, first) - 1, 0)
        end = len(self.firsts) if stop is None else bisect_left(self.firsts, stop)
        if begin >= end:
            return self.schema.empty_table()
        with self.open(self.path, self.schema) as reader:
            table = _table([reader.get_batch(piece) for piece in range(begin, end)])
        ids = table["example_id"]
        key = functools.partial(_value, ids)
        start = 0 if first is None else bisect_left(range(len(ids)), first, key=key)
        return table[start : len(ids) if stop is None else bisect_left(range(len(ids)), stop, key=key)]


def in_order(pool: Executor, function: Callable[[Item], Result], items: Iterable[Item], ahead: int = 3) -> Iterator[Result]:
    """`map` over threads that reads only a few items ahead of its results."""
    waiting: deque[Future[Result]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def is_ascending(ids: pa.Array) -> bool:
    """Whether ids (N,) ascend and none occurs twice; strings compare bytewise."""
    return bool(pc.all(pc.greater(ids[1:], ids[:-1])).as_py() is not False)


def sorted_by_id(table: pa.Table) -> pa.Table:
    """A table's rows in ascending order of `example_id`."""
    ids = one_array(table["example_id"])
    if is_ascending(ids):
        return table.combine_chunks()
    order = pa.array(_ascending_order(ids))
    # Column by column: a second copy of one column at a time, not of all.
    return pa.table([one_array(column).take(order) for column in table.columns], schema=table.schema)


def _ascending_order(ids: pa.Array) -> NDArray[np.integer[Any]]:
    """Row numbers, shape (N,), in ascending order of ids; equal ids keep their order. Integers and strings of one length are
    sorted as numbers: a fifth of the time."""
    if pa.types.is_integer(ids.type):
        return _order_of_words(ids.to_numpy()[:, None])
    lengths = pc.min_max(pc.binary_length(ids)).as_py()
    width = lengths["min"]
    if width != lengths["max"] or not 0 < width <= _MAX_WIDTH:
        return np.asarray(pc.array_sort_indices(ids).to_numpy())
    start = np.frombuffer(ids.buffers()[1], np.int32)[ids.offset]
    data = np.frombuffer(ids.buffers()[2], np.uint8)[start : start + len(ids) * width].reshape(-1, width)
    # Where all ids have the same byte it decides nothing.
    varying = np.flatnonzero((data != data[0]).any(axis=0))
    if not len(varying):
        return np.arange(len(ids))
    words = np.zeros((len(ids), -(-len(varying) // 8) * 8), np.uint8)
    words[:, : len(varying)] = data[:, varying]
    return _order_of_words(words.view(">u8").astype(np.uint64))


def _order_of_words(words_NW: NDArray[Any]) -> NDArray[np.integer[Any]]:
    """Row numbers in ascending order of rows of numbers, the first number first; equal rows keep their order.

    numpy sorts numbers six times faster where equal ones may change places; these are looked at again.
    """
    order_N = np.argsort(words_NW[:, 0])
    sorted_N = words_NW[order_N, 0]
    is_equal = sorted_N[1:] == sorted_N[:-1]
    if is_equal.any():
        tied = np.flatnonzero(np.append(is_equal, False) | np.append(False, is_equal))
        among = np.sort(order_N[tied])
        order_N[tied] = among[np.lexsort(words_NW[among].T[::-1])]
    return order_N


def of_run_size(batches: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Tables joined and cut to runs."""
    waiting: list[pa.Table] = []
    count = num_bytes = 0
    for batch in batches:
        waiting.append(batch)
        count += len(batch)
        num_bytes += batch.nbytes
        while count >= RUN_ROWS or (num_bytes >= RUN_BYTES and count > 1):
            table = pa.concat_tables(waiting)
            size = min(RUN_ROWS, max(1, RUN_BYTES * count // num_bytes))
            yield table[:size]
            waiting, count = [table[size:]], count - size
            num_bytes = waiting[0].nbytes
    if count:
        yield pa.concat_tables(waiting)


def _table(batches: list[pa.RecordBatch]) -> pa.Table:
    return pa.Table.from_batches(batches).combine_chunks()


def _value(ids: pa.ChunkedArray, row: int) -> Any:
    return ids[row].as_py()
