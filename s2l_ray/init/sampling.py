"""The rows that are looked at: all of a small corpus, pieces from all over a large one."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq

from s2l_ray.config import ExamplesConfig
from s2l_ray.errors import DataError
from s2l_ray.examples.cutting import cut_corpus
from s2l_ray.examples.files import CorpusFile
from s2l_ray.examples.formats import Lines, RowGroups
from s2l_ray.examples.pieces import Piece
from s2l_ray.examples.rows import CorpusRows
from s2l_ray.storage.hub import hub_commit, hub_id

MOST_BYTES = 32 * 2**20
"""Of a larger corpus only pieces of about this size together are read."""
MOST_ROWS = 200_000
MOST_COUNTED_BYTES = 2 * 2**30
"""The lines of a larger corpus are not counted."""


@dataclass(frozen=True)
class CorpusLook:
    """Rows of a corpus, and how many there are in all."""

    blocks: list[CorpusRows]
    num_read: int
    num_rows: int
    """Rows of the whole corpus."""
    is_exact: bool
    """Whether `num_rows` is counted and not estimated."""
    is_least: bool = False
    """Whether there are more than `num_rows`, nobody knows how many."""

    @property
    def is_all(self) -> bool:
        """Whether every row was read."""
        return self.is_exact and self.num_read == self.num_rows

    def values(self, field: str) -> Iterator[Any]:
        """The field in every row that was read."""
        return itertools.chain.from_iterable(rows.values(field) for rows in self.blocks)

    def records(self, most: int) -> list[dict[str, Any]]:
        """At most so many of the rows that were read, from all over them."""
        step = max(1, -(-self.num_read // most))
        return [rows.record(row) for rows in self.blocks for row in range(0, len(rows), step)][:most]

    def counted(self) -> str:
        """How many rows there are and how that is known, in words."""
        if self.is_all:
            return f"{self.num_rows:,} rows, all of them read"
        if self.is_least:
            return f"more than {self.num_rows:,} rows, of which so many were read"
        total = f"{self.num_rows:,} rows" if self.is_exact else f"about {self.num_rows:,} rows (estimated by size)"
        return f"{total}, {self.num_read:,} of them read"


def look_at(config: ExamplesConfig) -> CorpusLook:
    """Rows of the corpus from all over it.

    Raises DataError for one that is missing, empty or no corpus, ConfigError for a name that the Hub does not have.
    """
    hub = hub_id(config.dataset)
    if hub is not None:
        hub_commit("dataset", hub, config.revision)  # tells at once where there is no Hub
    pieces = [piece for shard in cut_corpus(config) for piece in shard]
    total = sum(piece.size for piece in pieces)
    are_rows = hub is not None
    wanted = max(1, round(len(pieces) * min(1.0, (MOST_ROWS if are_rows else MOST_BYTES) / max(total, 1))))
    chosen = pieces[:: -(-len(pieces) // wanted)]
    blocks: list[CorpusRows] = []
    is_whole = True
    for piece in chosen:
        read, ended = _rows_of(piece, MOST_ROWS)
        blocks += read
        is_whole &= ended
    num_read = sum(map(len, blocks))
    if not num_read:
        problem = next(
            (bad.message for rows in blocks for bad in rows.bad), f"{config.dataset}: the corpus is empty: no row in it."
        )
        raise DataError(problem)
    if is_whole and len(chosen) == len(pieces):
        return CorpusLook(blocks, num_read, num_read, True)
    counted = total if are_rows else _counted_rows(pieces)
    estimate = round(num_read * total / max(1, sum(piece.size for piece in chosen)))
    if counted is None and not is_whole:  # of a compressed file it is not known how much of it was read
        return CorpusLook(blocks, num_read, num_read, False, is_least=True)
    return CorpusLook(blocks, num_read, counted or max(num_read, estimate), counted is not None)


def _rows_of(piece: Piece, most: int) -> tuple[list[CorpusRows], bool]:
    """The first rows of a piece, `most` and a block at most, and whether these are all."""
    blocks: list[CorpusRows] = []
    reading = piece.read()
    for rows in reading:
        blocks.append(rows)
        if sum(map(len, blocks)) >= most:
            return blocks, next(reading, None) is None
    return blocks, True


def _counted_rows(pieces: list[Piece]) -> int | None:
    """The rows of a corpus of Parquet files, which say it, or of plain JSON Lines, whose lines are counted; None where counting
    takes as long as reading."""
    files = {piece.file.uri: piece.file for piece in pieces if isinstance(piece, Lines | RowGroups)}
    are_lines = all(isinstance(piece, Lines) for piece in pieces)
    if are_lines and sum(file.num_bytes for file in files.values()) <= MOST_COUNTED_BYTES:
        return sum(map(_num_lines, files.values()))
    if not all(isinstance(piece, RowGroups) for piece in pieces):
        return None
    count = 0
    for file in files.values():
        with file.readable(), file.open() as source:
            count += pq.read_metadata(source).num_rows
    return count


def _num_lines(file: CorpusFile) -> int:
    """The lines of a file, without a blank one at its end."""
    count, last = 0, b"\n"
    with file.readable(), file.stream() as source:
        while block := source.read(2**24):
            count += block.count(b"\n")
            last = block[-1:]
    return count + (last != b"\n")
