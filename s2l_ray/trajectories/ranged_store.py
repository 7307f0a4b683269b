"""A store whose rows lie in files that all of Ray's workers see: passes over it are tasks, and no row passes the driver.

What reads it block by block all the same (`blocks`) reads the files here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar, cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from s2l_ray.runtime.passes import in_tasks
from s2l_ray.storage.places import Storage
from s2l_ray.trajectories.sorting import Codes, Run, SortedTable, StoredFile, with_codes
from s2l_ray.trajectories.store import BLOCK_ROWS, NUM_RESPONSE_TOKENS, TrajectoryStore

# A task of a pass takes a quarter of a second or more.
BLOCKS_PER_TASK = 4
Result = TypeVar("Result")


@dataclass(frozen=True)
class RangedTable(SortedTable):
    """A sorted table in ranges of ids, a file each, in which names may have codes of their own."""

    starts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """The number of the first row of each file, ascending."""

    codes: Sequence[Codes] = ()
    """For each file and column of names, what each code of the file is in the whole table."""

    @classmethod
    def of_runs(cls, runs: Sequence[Run]) -> RangedTable:
        """Runs that ascend from one to the next."""
        files: list[StoredFile] = [run.path for run in runs if isinstance(run.path, StoredFile)]
        counts = [run.num_rows for run in runs]
        starts = np.cumsum([0, *counts[:-1]])
        return cls(tuple(files), runs[0].schema, sum(counts), starts=starts, codes=[run.codes for run in runs])

    def between(self, start: int, stop: int, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """The rows numbered from `start` up to `stop`, in batches."""
        first = int(np.searchsorted(self.starts, start, side="right")) - 1
        for number in range(first, int(np.searchsorted(self.starts, stop))):
            begun = int(self.starts[number])
            with Run.open(self.files[number], self.schema, columns) as reader:
                if not reader.num_record_batches:
                    continue
                at, size, piece = begun, len(reader.get_batch(0)), 0
                if start > begun:
                    piece = (start - begun) // size
                    at += piece * size
                while piece < reader.num_record_batches and at < stop:
                    batch = reader.get_batch(piece)
                    low, high = max(start - at, 0), min(stop - at, len(batch))
                    yield with_codes(batch[low:high], self.codes[number])
                    at, piece = at + len(batch), piece + 1

    def _batches(self, columns: Sequence[str] | None) -> Iterator[pa.RecordBatch]:
        yield from self.between(0, self.num_rows, columns)


@dataclass(frozen=True, eq=False)
class RangedStore(TrajectoryStore):
    """N trajectories in the files of a `RangedTable`; cheap to send to a worker."""

    place: Storage = field(kw_only=True)
    """Where the files are, and others may be that all workers see."""

    @property
    def num_blocks(self) -> int:
        return -(-len(self) // BLOCK_ROWS)

    def block(self, number: int, *columns: str) -> pa.Table:
        """One of the blocks that `blocks` gives."""
        assert isinstance(self.rows, RangedTable)
        start, stop = number * BLOCK_ROWS, min((number + 1) * BLOCK_ROWS, len(self))
        known = [name for name in dict.fromkeys((*columns, "example_id")) if name in self.rows.schema.names]
        counted = self.tokens_N is not None and NUM_RESPONSE_TOKENS in columns
        known = [name for name in known if not (counted and name == NUM_RESPONSE_TOKENS)]
        batches = [batch for batch in self.rows.between(start, stop, known) if len(batch)]
        table = pa.Table.from_batches(batches).combine_chunks()
        if counted and self.tokens_N is not None:
            table = table.append_column(NUM_RESPONSE_TOKENS, pa.array(self.tokens_N[start:stop]))
        return table

    def each_block(self, _pool: Executor | None, function: Callable[[pa.Table], Result], *columns: str) -> Iterator[Result]:
        for found in self.each_stretch(partial(_each, function), columns):
            yield from found

    def each_stretch(
        self,
        function: Callable[[int, list[pa.Table]], Result],
        columns: Sequence[str],
        blocks_per_task: int = BLOCKS_PER_TASK,
    ) -> Iterator[Result]:
        """What `function(number of the first block, blocks)` returns for all stretches of so many blocks, in their order:
        tasks wherever Ray has room."""
        read = _ReadBlocks(replace(self, measurements={}, lowest=None), function, tuple(columns), blocks_per_task)
        yield from in_tasks(cast(Callable[[int], Result], read), range(0, self.num_blocks, blocks_per_task))


@dataclass(frozen=True)
class _ReadBlocks:
    """Task: read some blocks and do with them what is to be done."""

    store: RangedStore
    function: Callable[[int, list[pa.Table]], object]
    columns: tuple[str, ...]
    num_blocks: int

    def __call__(self, first: int) -> object:
        stop = min(first + self.num_blocks, self.store.num_blocks)
        return self.function(first, [self.store.block(number, *self.columns) for number in range(first, stop)])


def _each(function: Callable[[pa.Table], Result], _first: int, blocks: list[pa.Table]) -> list[Result]:
    return [function(block) for block in blocks]
