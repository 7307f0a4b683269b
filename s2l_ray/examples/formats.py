"""The formats of a corpus's files: how each is cut into pieces, and how a piece is read.

Limits: a gzipped file, a CSV file and a JSON array are one piece each; of a CSV file and an array the whole file is in memory.
"""

from __future__ import annotations

import abc
import csv
import functools
import io
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from s2l_ray.errors import DataError
from s2l_ray.examples.files import CorpusFile, decode
from s2l_ray.examples.rows import ROWS_AT_A_TIME, CorpusRows, Records, TableRows

GZIP_BLOCK_BYTES = 16 * 2**20
"""Unzipped bytes of a gzipped JSON Lines file that are parsed together."""


@dataclass(frozen=True)
class FilePiece(abc.ABC):
    """A stretch of a file; see `pieces.Piece`."""

    file: CorpusFile

    @property
    def name(self) -> str:
        return self.file.name

    @property
    def size(self) -> int:
        return self.file.num_bytes

    @abc.abstractmethod
    def read(self) -> Iterator[CorpusRows]: ...


@dataclass(frozen=True)
class Lines(FilePiece):
    """The lines of a JSON Lines file that start in the bytes from `start` to below `stop`."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    def read(self) -> Iterator[CorpusRows]:
        with self.file.readable(), self.file.open() as source:
            begin, data = owned_lines(source, self.start, self.stop)
        yield parse_lines(data, begin == 0, self.file, lambda: self._lines_before(begin))

    def _lines_before(self, offset: int) -> int:
        """The number of lines that end before `offset`. The file is read for it, so it is counted only for a message."""
        count = 0
        with self.file.readable(), self.file.stream() as source:
            while offset > 0 and (block := source.read(min(offset, 2**20))):
                count += block.count(b"\n")
                offset -= len(block)
        return count


def owned_lines(source: Any, start: int, stop: int) -> tuple[int, bytes]:
    """The byte offset of the first line that starts in [start, stop), and the bytes of all lines that start there.

    `source` is a binary file with `seek` and `read`. If ranges cover a file, every line is in exactly one of them.
    """
    begin = _next_line(source, start - 1) if start else 0
    end = _next_line(source, stop - 1) if begin < stop else begin
    source.seek(begin)
    return begin, source.read(end - begin)


def _next_line(source: Any, offset: int) -> int:
    """The byte offset at which the line after that of byte `offset` starts; the end of the file if there is none."""
    source.seek(offset)
    while block := source.read(2**16):
        found = block.find(b"\n")
        if found >= 0:
            return int(offset + found + 1)
        offset += len(block)
    return offset


@dataclass(frozen=True)
class GzippedLines(FilePiece):
    """A gzipped JSON Lines file, which can be read only from its start."""

    def read(self) -> Iterator[CorpusRows]:
        num_lines, rest = 0, b""
        with self.file.readable(), self.file.stream(unzipped=True) as source:
            while block := source.read(GZIP_BLOCK_BYTES):
                whole, newline, rest = (rest + block).rpartition(b"\n")
                lines_before = functools.partial(int, num_lines)  # a lambda would see the later value
                yield parse_lines(whole + newline, num_lines == 0, self.file, lines_before)
                num_lines += whole.count(b"\n") + len(newline)
        yield parse_lines(rest, num_lines == 0, self.file, lambda: num_lines)


def parse_lines(data: bytes, is_first: bool, file: CorpusFile, lines_before: Callable[[], int]) -> Records:
    """The rows in lines of JSON; blank lines are skipped. `is_first`: whether `data` begins the file.

    `lines_before` counts the file's lines before `data`; it is called only where a message names a line. Raises DataError
    naming a line that is no JSON object.
    """

    def place_of(line: int) -> str:
        return f"{file.name} line {lines_before() + line + 1:,}"

    records: list[dict[str, Any]] = []
    lines: list[int] = []
    for number, line in enumerate(decode(data, is_first, place_of).split("\n")):
        if not line or line.isspace():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            hint = " A .json file is an array of objects, or one object a line." if file.format == "json" else ""
            found = f"not JSON ({error}; it starts with {line[:40]!r})"
            raise DataError(f"{place_of(number)}: {found}. Fix or remove the line.{hint}") from error
        if not isinstance(value, dict):
            raise DataError(f"{place_of(number)}: a row is a JSON object, found {type(value).__name__}. Fix or remove it.")
        records.append(value)
        lines.append(number)
    return Records(records, lambda row: place_of(lines[row]), file.source)


@dataclass(frozen=True)
class JsonArray(FilePiece):
    """A JSON file that is one array of objects."""

    def read(self) -> Iterator[CorpusRows]:
        try:
            values = json.loads(self.file.text())
        except json.JSONDecodeError as error:
            raise DataError(f"{self.name} line {error.lineno:,}: not JSON ({error}). Fix the file.") from error
        for row, value in enumerate(values):
            if not isinstance(value, dict):
                raise DataError(f"{self.name} row {row + 1:,}: not a JSON object but {type(value).__name__}. Fix the file.")
        # All rows together: the whole file is in memory as Python objects anyway.
        yield Records(values, lambda row: f"{self.name} row {row + 1:,}", self.file.source)


@dataclass(frozen=True)
class CsvFile(FilePiece):
    """A CSV or TSV file with a header. Every value is text: `001` stays `001`."""

    def read(self) -> Iterator[CorpusRows]:
        csv.field_size_limit(sys.maxsize)  # 128 kB otherwise, which a long document exceeds
        delimiter = "\t" if self.file.format == "tsv" else ","
        reader = csv.reader(io.StringIO(self.file.text(), newline=""), delimiter=delimiter)
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise DataError(f"{self.name} line 1: a column name occurs twice ({', '.join(header)}). Rename one.")
        records: list[dict[str, Any]] = []
        lines: list[int] = []
        for line, values in self._numbered(reader):
            if len(values) != len(header):
                raise DataError(f"{self.name} line {line:,}: {len(values)} values for {len(header)} columns. Fix the row.")
            records.append(dict(zip(header, values, strict=True)))
            lines.append(line)
            if len(records) == ROWS_AT_A_TIME:
                yield self._rows(records, lines)
                records, lines = [], []
        yield self._rows(records, lines)

    def _numbered(self, reader: Any) -> Iterator[tuple[int, list[str]]]:
        """The rows that are not blank, each after the number of the line on which it starts."""
        line = reader.line_num + 1
        try:
            for values in reader:
                if values:
                    yield line, values
                line = reader.line_num + 1
        except csv.Error as error:
            raise DataError(f"{self.name} line {line:,}: not CSV ({error}). Fix the row.") from error

    def _rows(self, records: list[dict[str, Any]], lines: list[int]) -> Records:
        return Records(records, lambda row: f"{self.name} line {lines[row]:,}", self.file.source)


@dataclass(frozen=True)
class RowGroups(FilePiece):
    """The row groups from `start` to below `stop` of a Parquet file."""

    start: int
    stop: int
    first_row: int
    """The file's rows before them."""
    raw_bytes: int
    """Their size without compression."""

    @property
    def size(self) -> int:
        return self.raw_bytes

    def read(self) -> Iterator[CorpusRows]:
        first = self.first_row
        with self.file.readable(), self.file.open() as source:
            groups = list(range(self.start, self.stop))
            for batch in pq.ParquetFile(source).iter_batches(ROWS_AT_A_TIME, row_groups=groups):
                yield TableRows(pa.Table.from_batches([batch]), self.name, first, self.file.source)
                first += batch.num_rows


def cut_file(file: CorpusFile, shard_bytes: int) -> list[FilePiece]:
    """The pieces of a file, of about `shard_bytes` each where its format can be cut. Raises DataError if it cannot be read."""
    if file.format in {"csv", "tsv"}:
        return [CsvFile(file)]
    if file.format == "json" and _is_json_array(file):
        return [JsonArray(file)]
    if file.format == "parquet":
        return list(_cut_row_groups(file, shard_bytes))
    if file.is_gzipped:
        return [GzippedLines(file)]
    return [Lines(file, start, min(start + shard_bytes, file.num_bytes)) for start in range(0, file.num_bytes, shard_bytes)]


def _is_json_array(file: CorpusFile) -> bool:
    """Whether a .json file is one array; many hold one object per line."""
    with file.readable(), file.stream(unzipped=True) as stream:
        return bool(stream.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["))


def _cut_row_groups(file: CorpusFile, shard_bytes: int) -> Iterator[FilePiece]:
    """Runs of row groups, each of at least `shard_bytes` without compression, but for the last."""
    with file.readable(), file.open() as source:
        footer = pq.read_metadata(source)
    start = first_row = num_rows = size = 0
    for group in range(footer.num_row_groups):
        size += footer.row_group(group).total_byte_size
        num_rows += footer.row_group(group).num_rows
        if size >= shard_bytes or group == footer.num_row_groups - 1:
            yield RowGroups(file, start, group + 1, first_row, size)
            start, first_row, num_rows, size = group + 1, first_row + num_rows, 0, 0
