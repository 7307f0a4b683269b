"""Tables of any size in ascending order of `example_id`: sorted runs on disk, merged, with memory for a few runs.

Losses, ids and texts of a corpus come in whatever order their files have them; everything after this module sees one
order. Input that ascends already is written once and not merged.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from s2l_ray.errors import DataError
from s2l_ray.examples.ids import NAMED_IDS, not_unique, one_array, repeated
from s2l_ray.storage.places import Storage
from s2l_ray.trajectories.id_order import is_ascending, sorted_by_id

# A run is sorted in memory, several at a time: 3 MB of trajectories of 12 points, and 16 MB of long texts. With runs of
# 131,072 rows a million rows took 70 MB more. Later runs grow to a share of all before, up to as many: fewer are merged.
RUN_ROWS, MAX_RUN_ROWS, SHARE_OF_BEFORE = 32_768, 131_072, 32
RUN_BYTES = 16 * 2**20
# What is read of a run at once while merging, by rows or by bytes.
PIECE_ROWS = 2_048
PIECE_BYTES = RUN_BYTES // 64
# A merged range is as large as a run, or of many pieces (every so many one more) as large as several, up to so many pieces.
PIECES_OF_LARGER_RANGES, MAX_PIECES_PER_RANGE = 640, 256
# Each range reads of all runs. Of more runs than these some are merged first, and then what has come of them: so reads grow
# as N log N. A pass more over all rows takes as long as the reads of some 600 runs from a local disk.
MAX_RUNS_AT_ONCE = 512
# How often runs are cut off behind what is still to be merged.
TIMES_CUT_OFF = 32
Item = TypeVar("Item")
Result = TypeVar("Result")
Codes = Mapping[str, NDArray[np.int32]]
"""For columns of names what each code of a file is in the whole table."""


@dataclass(frozen=True)
class StoredFile:
    """A file that several machines see, on a shared disk or in object storage."""

    storage: Storage
    name: str

    @property
    def local(self) -> Path | None:
        """Where the file lies on this machine, if it does."""
        return Path(self.storage.path(self.name)) if self.storage.is_local else None


def opened(path: Path | StoredFile) -> pa.NativeFile:
    """A file to read from: not mapped, since mapped pages count as this process's memory."""
    return pa.OSFile(str(path)) if isinstance(path, Path) else path.storage.open(path.name)


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

    runs = list(in_order(pool, write, enumerate(of_run_size(batches, RUN_ROWS, MAX_RUN_ROWS))))
    if not runs:
        raise DataError("no rows.")
    check_unique(runs)
    if not is_one_order(runs):

        def merge(numbered: tuple[str, IdRange]) -> Run:
            name, some = numbered
            return Run.write(folder / name, some.rows())

        def remove(done: Iterable[Run]) -> None:
            for run in done:
                Path(str(run.path)).unlink()

        runs = merged_runs(runs, lambda ranges: in_order(pool, merge, ranges), remove)
    return SortedTable(tuple(run.path for run in runs), runs[0].schema, sum(run.num_rows for run in runs))


def is_one_order(runs: Sequence[Run]) -> bool:
    """Whether each run begins behind the end of the one before."""
    return all(left.last < right.first for left, right in itertools.pairwise(runs))


def merged_runs(
    runs: Sequence[Run],
    merge: Callable[[Sequence[tuple[str, IdRange]]], Iterable[Run]],
    remove: Callable[[Iterable[Run]], None],
) -> list[Run]:
    """The rows of all runs as runs that follow each other.

    `merge` writes each of some ranges under its name and gives the runs in the same order; `remove` removes the files of
    runs that are not needed any more. The last ids are merged first, and files of runs on this machine are cut off behind what
    is left: together they take the space of the rows once, and pages that were read serve what is written. Raises DataError
    naming ids that occur twice.
    """
    ordered = [[run] for run in runs]
    num_passes = 0
    while len(ordered) > 1:
        size = _runs_at_once(len(ordered))
        groups = [list(itertools.chain(*ordered[first : first + size])) for first in range(0, len(ordered), size)]
        ranges = [(number, some) for number, group in enumerate(groups) for some in reversed(list(ranges_of(group)))]
        num_passes += 1
        named = [(f"merged-{num_passes}-{len(ranges) - n:06d}.arrow", some) for n, (_, some) in enumerate(ranges)]
        ordered = [[] for _ in groups]
        for place, ((number, some), run) in enumerate(zip(ranges, merge(named), strict=True)):
            ordered[number].append(run)
            if place % (1 + len(ranges) // TIMES_CUT_OFF) == 0:
                for one in groups[number]:
                    one.cut_off(some.first)
        remove(itertools.chain(*groups))
        ordered = [one[::-1] for one in ordered]
        check_unique(list(itertools.chain(*ordered)))
        ordered = [[run for run in one if run.num_rows] for one in ordered]
    return ordered[0]


def _runs_at_once(count: int) -> int:
    """How many of `count` runs are merged into one in a pass: about the same in every pass."""
    num_passes = 1
    while MAX_RUNS_AT_ONCE**num_passes < count:
        num_passes += 1
    return math.ceil(math.pow(count, 1 / num_passes))


def splits_of(runs: Sequence[Run]) -> list[Any]:
    """Ids at which all runs are cut into ranges, None at both ends."""
    firsts = sorted(first for run in runs for first in run.firsts)
    # A run's rows lie between the samples: with so many samples per range its size varies little.
    of_run = max(len(run.firsts) for run in runs)
    per_range = min(of_run * (1 + len(firsts) // PIECES_OF_LARGER_RANGES), MAX_PIECES_PER_RANGE)
    return [None, *firsts[per_range::per_range], None]


def ranges_of(runs: Sequence[Run]) -> Iterator[IdRange]:
    """All rows of some runs in ranges of ids that follow each other."""
    for first, stop in itertools.pairwise(splits_of(runs)):
        found = [run.stretch(first, stop) for run in runs]
        yield IdRange(first, stop, runs[0].schema, tuple(stretch for stretch in found if stretch is not None))


def check_unique(runs: Sequence[Run]) -> None:
    """Raise DataError naming ids that occur more than once in a run."""
    count = sum(run.num_duplicates for run in runs)
    if count:
        raise not_unique(pa.concat_arrays([run.duplicates for run in runs]), count=count)


@dataclass(frozen=True)
class Stretch:
    """Pieces of a run that follow each other, by their bytes in the file."""

    path: Path | StoredFile
    start: int
    stop: int
    codes: Codes

    def read(self, schema: pa.Schema) -> pa.Table:
        """The rows: one read, where to open the file as Arrow does takes several, and five times as long."""
        with opened(self.path) as file:
            file.seek(self.start)
            source = pa.BufferReader(file.read_buffer(self.stop - self.start))
        if source.size() < self.stop - self.start:  # a task that was given up reads on, and must not write what is left
            raise OSError(f"{self.path}: cut off while it was read")
        batches = []
        while source.tell() < source.size():
            batches.append(with_codes(pa.ipc.read_record_batch(pa.ipc.read_message(source), schema), self.codes))
        return _table(batches)


@dataclass(frozen=True)
class IdRange:
    """Where the rows lie whose ids are in [first, stop), None being no limit."""

    first: Any
    stop: Any
    schema: pa.Schema
    stretches: tuple[Stretch, ...]

    def rows(self) -> pa.Table:
        """All of them, sorted."""
        tables = [self._inside(stretch.read(self.schema)) for stretch in self.stretches]
        return sorted_by_id(pa.concat_tables([self.schema.empty_table(), *tables]))

    def _inside(self, table: pa.Table) -> pa.Table:
        ids = table["example_id"]
        key = functools.partial(_value, ids)
        start = 0 if self.first is None else bisect_left(range(len(ids)), self.first, key=key)
        return table[start : len(ids) if self.stop is None else bisect_left(range(len(ids)), self.stop, key=key)]


@dataclass(frozen=True, eq=False)
class Run:
    """A sorted Arrow file, and the first id of every piece of it."""

    path: Path | StoredFile
    schema: pa.Schema
    num_rows: int
    firsts: list[Any]
    offsets: NDArray[np.int64]
    """Where each piece begins in the file, in bytes, and last where they end."""

    last: Any
    num_duplicates: int
    duplicates: pa.Array
    """The first few ids that occur more than once."""

    codes: Codes = field(default_factory=dict)

    @property
    def first(self) -> Any:
        return self.firsts[0]

    @classmethod
    def write(cls, path: Path, table: pa.Table) -> Run:
        size = min(PIECE_ROWS, max(1, PIECE_BYTES * len(table) // max(table.nbytes, 1)))
        # The schema stands before the first piece, behind eight bytes that say what file it is.
        offsets = [8 + table.schema.serialize().size]
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            for batch in table.to_batches(max_chunksize=size):
                writer.write_batch(batch)
                offsets.append(file.tell())
        ids = table["example_id"]
        firsts = [ids[start].as_py() for start in range(0, len(ids), size)]
        last = ids[-1].as_py() if len(ids) else None
        ids = one_array(ids)
        twice = ids[:0] if is_ascending(ids) else repeated(ids)
        named = pa.array(twice[:NAMED_IDS].to_pylist(), ids.type)  # a slice would keep all ids
        return cls(path, table.schema, len(table), firsts, np.array(offsets), last, len(twice), named)

    @staticmethod
    def open(path: Path | StoredFile, schema: pa.Schema, columns: Sequence[str] | None = None) -> Any:
        """A reader of the file."""
        fields = [schema.get_field_index(name) for name in columns] if columns is not None else None
        return pa.ipc.open_file(opened(path), options=pa.ipc.IpcReadOptions(included_fields=fields))

    def stretch(self, first: Any, stop: Any) -> Stretch | None:
        """The pieces that may have rows whose ids lie in [first, stop); None is no limit."""
        begin = 0 if first is None else max(bisect_left(self.firsts, first) - 1, 0)
        end = len(self.firsts) if stop is None else bisect_left(self.firsts, stop)
        if begin >= end or (first is not None and self.last < first):
            return None
        return Stretch(self.path, int(self.offsets[begin]), int(self.offsets[end]), self.codes)

    def cut_off(self, stop: Any) -> None:
        """Give the system back what of a file on this machine lies behind ids below `stop`."""
        path = self.path if isinstance(self.path, Path) else self.path.local
        if path is not None:
            stretch = None if stop is None else self.stretch(None, stop)
            os.truncate(path, stretch.stop if stretch is not None else 0)


def in_order(pool: Executor, function: Callable[[Item], Result], items: Iterable[Item], ahead: int = 3) -> Iterator[Result]:
    """`map` over threads that reads only a few items ahead of its results."""
    waiting: deque[Future[Result]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def read_ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The same items, the next of which is read in a thread while one is worked on."""
    with ThreadPoolExecutor(1) as pool:
        end = object()
        waiting = pool.submit(next, items, end)
        while (item := waiting.result()) is not end:
            waiting = pool.submit(next, items, end)
            yield item  # type: ignore[misc]


def of_run_size(batches: Iterable[pa.Table], least: int, most: int) -> Iterator[pa.Table]:
    """Tables joined and cut to runs of `least` to `most` rows, fewer where texts are long."""
    waiting: list[pa.Table] = []
    count = num_bytes = done = 0
    for batch in batches:
        waiting.append(batch)
        count += len(batch)
        num_bytes += batch.nbytes
        num_rows = min(most, max(least, done // SHARE_OF_BEFORE))
        while count >= num_rows or (num_bytes >= RUN_BYTES and count > 1):
            table = pa.concat_tables(waiting)
            size = min(num_rows, max(1, RUN_BYTES * count // num_bytes))
            yield table[:size]
            waiting, count, done = [table[size:]], count - size, done + size
            num_bytes = waiting[0].nbytes
    if count:
        yield pa.concat_tables(waiting)


def with_codes(batch: pa.RecordBatch, codes: Codes) -> pa.RecordBatch:
    """Rows of a file with the codes of names that the whole table has."""
    for name, values in codes.items():
        if name in batch.schema.names:
            place = batch.schema.get_field_index(name)
            batch = batch.set_column(place, name, pa.array(values[batch[name].to_numpy()]))
    return batch


def _table(batches: list[pa.RecordBatch]) -> pa.Table:
    return pa.Table.from_batches(batches).combine_chunks()


def _value(ids: pa.ChunkedArray, row: int) -> Any:
    return ids[row].as_py()
