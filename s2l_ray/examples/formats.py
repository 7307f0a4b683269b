"""JSON and Parquet files of a corpus: how a piece of one is read.

Limits: a compressed file and a file of JSON values that are no lines are one piece each; of the latter, and of UTF-16, the
whole file is in memory.
"""

from __future__ import annotations

import abc
import functools
import itertools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from s2l_ray.errors import DataError
from s2l_ray.examples.files import BYTE_ORDER_MARK, CorpusFile, not_unicode
from s2l_ray.examples.json_values import SIMPLE, loads_json
from s2l_ray.examples.row_problems import kind_in_words
from s2l_ray.examples.rows import ROWS_AT_A_TIME, BadRow, CorpusRows, Records, TableRows

BLOCK_BYTES = 16 * 2**20
"""Unpacked bytes of a compressed JSON Lines file that are parsed together."""
NOT_UTF8, NOT_JSON, NOT_AN_OBJECT = "not_utf8", "not_json", "not_an_object"


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


# --- JSON Lines --------------------------------------------------------------------------------------------------


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
        yield parse_lines(data, self.file, lambda: self._lines_before(begin))

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
class StreamedLines(FilePiece):
    """A JSON Lines file that can be read only from its start: it is compressed, or not UTF-8 but marked as other Unicode."""

    is_utf8: bool

    def read(self) -> Iterator[CorpusRows]:
        if not self.is_utf8:
            yield parse_lines(self.file.text().encode("utf-8", "surrogatepass"), self.file, lambda: 0)
            return
        num_lines, rest = 0, b""
        with self.file.readable(), self.file.stream(unpacked=True) as source:
            while block := source.read(BLOCK_BYTES):
                whole, newline, rest = (rest + block).rpartition(b"\n")
                yield parse_lines(whole + newline, self.file, functools.partial(int, num_lines))
                num_lines += whole.count(b"\n") + len(newline)
        yield parse_lines(rest, self.file, lambda: num_lines)


def parse_lines(data: bytes, file: CorpusFile, lines_before: Callable[[], int]) -> Records:
    """The rows in lines of JSON; blank lines are skipped.

    `lines_before` counts the file's lines before `data`; it is called only where a message names a line.
    """

    def place_of(line: int) -> str:
        return f"{file.name} line {lines_before() + line + 1:,}"

    data = data.removesuffix(b"\n")
    plain = _plain_records(data)
    if plain is not None:
        return Records(plain[0], place_of, file.source, plain[1])
    records: list[dict[str, Any]] = []
    texts: list[str] = []
    lines: list[int] = []
    bad: list[BadRow] = []
    problem = ""
    for number, found in enumerate(_decoded_lines(data)):
        if isinstance(found, UnicodeDecodeError):
            problem = problem or not_unicode(data, data.find(found.object))  # guessed once: it takes its time
            bad.append(BadRow(NOT_UTF8, f"{place_of(number)}: {problem}"))
            continue
        line = found.strip().removeprefix(BYTE_ORDER_MARK).lstrip()  # files put together have it before any line
        if not line:
            continue
        value = parse_json(line)
        if isinstance(value, dict):
            records.append(value)
            texts.append(line)
            lines.append(number)
        else:
            bad.append(_no_row(value, place_of(number)))
    return Records(records, lambda row: place_of(lines[row]), file.source, pa.array(texts, pa.string()), bad)


def _plain_records(data: bytes) -> tuple[list[dict[str, Any]], pa.Array] | None:
    """Rows and their texts where every line is an object without white space around it, and `json` agrees with orjson on all
    of them; else None."""
    lines = data.split(b"\n")
    if not (data.startswith(b"{") and data.endswith(b"}") and data.count(b"}\n{") == len(lines) - 1):
        return None
    try:
        if not _is_simple([orjson.loads(lines[0])]):  # rows are alike: conversations, say, would all be read twice
            return None
        records = [orjson.loads(line) for line in lines]
    except ValueError:
        return None
    return (records, pa.array(lines, pa.string())) if _is_simple(records) else None


def _is_simple(records: list[dict[str, Any]]) -> bool:
    return set(map(type, itertools.chain.from_iterable(map(dict.values, records)))) <= SIMPLE


def _decoded_lines(data: bytes) -> list[Any]:
    """Lines as text; one that is not UTF-8 as the error."""
    try:
        return list(data.decode("utf-8").split("\n"))
    except UnicodeDecodeError:
        return [_decoded(line) for line in data.split(b"\n")]


def _decoded(line: bytes) -> str | UnicodeDecodeError:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        return error


def parse_json(text: str) -> Any:
    """A JSON value, or the error that says why it is none."""
    try:
        return loads_json(text)
    except (ValueError, RecursionError) as error:
        return error


def _no_row(value: Any, place: str) -> BadRow:
    if isinstance(value, Exception):
        return BadRow(NOT_JSON, f"{place}: not JSON ({value}). Fix or remove the line.")
    return BadRow(NOT_AN_OBJECT, f"{place}: a row is a JSON object, found {kind_in_words(value)}. Fix or remove it.")


# --- other JSON --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class JsonValues(FilePiece):
    """A JSON file that is one array of objects, or objects one after the other that each take several lines."""

    def read(self) -> Iterator[CorpusRows]:
        values, texts, rows, bad = [], [], [], list[BadRow]()
        for row, (value, text) in enumerate(self._values(self.file.text())):
            if isinstance(value, dict):
                values.append(value)
                texts.append(_on_one_line(text))
                rows.append(row)
            else:
                bad.append(_no_row(value, self._place(row)))
        # The whole file is in memory as Python objects anyway. Its texts come in stretches: an array has 2 GiB at most.
        for start in range(0, max(1, len(values)), ROWS_AT_A_TIME):
            stop = start + ROWS_AT_A_TIME
            places = functools.partial(lambda first, row: self._place(rows[first + row]), start)
            some = pa.array(texts[start:stop], pa.string())
            yield Records(values[start:stop], places, self.file.source, some, bad if not start else [])

    def _place(self, row: int) -> str:
        return f"{self.name} row {row + 1:,}"

    def _values(self, text: str) -> Iterator[tuple[Any, str]]:
        """The values, each with its text. Raises DataError naming the line where there is none."""
        decoder = json.JSONDecoder()
        text = text.removeprefix(BYTE_ORDER_MARK).rstrip()
        position = _after_space(text, 0)
        is_array = text.startswith("[", position)
        position = _after_space(text, position + is_array)
        is_empty = is_array and text.startswith("]", position)
        while position < len(text) and not is_empty:
            try:
                value, end = decoder.raw_decode(text, position)
            except (ValueError, RecursionError) as error:
                raise self._broken(text, getattr(error, "pos", position), str(error)) from error
            yield value, text[position:end]
            position = _after_space(text, end)
            if not is_array:
                continue
            if text.startswith("]", position):
                position = _after_space(text, position + 1)
                break
            if not text.startswith(",", position):
                raise self._broken(text, position, "a comma or the end of the array is missing")
            position = _after_space(text, position + 1)
        else:
            if is_array and not is_empty:
                raise self._broken(text, position, "the array has no end")
            return
        if position < len(text):
            raise self._broken(text, position, "something follows the array")

    def _broken(self, text: str, position: int, problem: str) -> DataError:
        line = text.count("\n", 0, position) + 1
        return DataError(f"{self.name} line {line:,}: not JSON ({problem}). Fix the file: an array, or one object a line.")


def _after_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _on_one_line(text: str) -> str:
    """A JSON text without line breaks, which stand only between its tokens."""
    return re.sub(r"[ \t]*[\r\n]+[ \t]*", " ", text)


# --- Parquet -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RowGroups(FilePiece):
    """The row groups from `start` to below `stop` of a Parquet file."""

    start: int
    stop: int
    first_row: int
    """The file's rows before them."""
    raw_bytes: int
    """Their size without compression."""
    beside_json: bool = False
    """Whether other files of the corpus are of JSON or CSV: its rows then have a text of their own, too."""

    @property
    def size(self) -> int:
        return self.raw_bytes

    def read(self) -> Iterator[CorpusRows]:
        first = self.first_row
        with self.file.readable(), self.file.open() as source:
            groups = list(range(self.start, self.stop))
            for batch in pq.ParquetFile(source).iter_batches(ROWS_AT_A_TIME, row_groups=groups):
                rows = TableRows(pa.Table.from_batches([batch]), self.name, first, self.file.source)
                yield rows.as_records() if self.beside_json else rows
                first += batch.num_rows


def cut_row_groups(file: CorpusFile, shard_bytes: int, beside_json: bool = False) -> Iterator[FilePiece]:
    """Runs of row groups, each of at least `shard_bytes` without compression, but for the last."""
    with file.readable(), file.open() as source:
        footer = pq.read_metadata(source)
        names = footer.schema.to_arrow_schema().names
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise DataError(f"{file.name}: several columns are called {', '.join(twice)}. Rename them.")
    start = first_row = num_rows = size = 0
    for group in range(footer.num_row_groups):
        size += footer.row_group(group).total_byte_size
        num_rows += footer.row_group(group).num_rows
        if size >= shard_bytes or group == footer.num_row_groups - 1:
            yield RowGroups(file, start, group + 1, first_row, size, beside_json)
            start, first_row, num_rows, size = group + 1, first_row + num_rows, 0, 0
