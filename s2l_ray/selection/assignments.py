"""The group of every row of a store and its distance to the centroid: streamed, or a part at a time wherever it is needed."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from s2l_ray.clustering.columns import Floats, Ints
from s2l_ray.clustering.stage import ROWS_PER_PART
from s2l_ray.errors import DataError
from s2l_ray.storage.artifacts import Artifact
from s2l_ray.storage.layout import ASSIGNMENTS
from s2l_ray.trajectories.sorting import SortedTable, read_ahead
from s2l_ray.trajectories.store import BLOCK_ROWS, TrajectoryStore

_COLUMNS = ["example_id", "cluster_id", "distance"]
BLOCKS_PER_PART = ROWS_PER_PART // BLOCK_ROWS

Assignments = Callable[[], Iterator[tuple[Ints, Floats]]]
"""Streams the groups of a store's rows and their distances, in the store's blocks."""


@dataclass(frozen=True)
class PartAssignments:
    """Those of a `clustering/` directory. Raises DataError where it is of other rows than the store's."""

    clustering: Artifact
    store: TrajectoryStore

    def check(self) -> None:
        """Raise DataError where the clustering is of another number of rows."""
        if self.clustering.summary["rows"] != len(self.store):
            raise _of_others()

    def __call__(self) -> Iterator[tuple[Ints, Floats]]:
        self.check()
        parts = self.clustering.parts(ASSIGNMENTS)
        batches = (batch for part in parts for batch in self._batches(part))
        found = read_ahead(SortedTable.joined(batches, BLOCK_ROWS))
        for block in self.store.blocks("example_id"):
            table = next(found, None)
            if table is None or not table["example_id"].equals(block["example_id"]):
                raise _of_others()
            yield table["cluster_id"].to_numpy(), table["distance"].to_numpy()

    def of_part(self, number: int, blocks: Sequence[pa.Table]) -> Iterator[tuple[Ints, Floats]]:
        """Those of the blocks whose rows are in a part."""
        parts = self.clustering.parts(ASSIGNMENTS)
        table = self._table(parts[number]) if number < len(parts) else None
        start = 0
        for block in blocks:
            some = None if table is None else table[start : start + len(block)].combine_chunks()
            if some is None or not some["example_id"].equals(block["example_id"]):
                raise _of_others()
            yield some["cluster_id"].to_numpy(), some["distance"].to_numpy()
            start += len(block)

    def _batches(self, part: str) -> Iterator[pa.RecordBatch]:
        """A part, a block at a time: a table of its million rows takes 40 MB."""
        file = pq.ParquetFile(io.BytesIO(self.clustering.read_bytes(part)))
        yield from file.iter_batches(BLOCK_ROWS, columns=_COLUMNS)

    def _table(self, part: str) -> pa.Table:
        return self.clustering.read_table(part, columns=_COLUMNS)


def _of_others() -> DataError:
    return DataError("the clustering is of other examples than the trajectories. Build clustering again.")
