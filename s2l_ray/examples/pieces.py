"""Pieces of a corpus: stretches that one task reads alone, on any machine.

A piece is a range of bytes of a file, of row groups, of rows of a dataset, of examples that are generated.

Limits: a gzipped file, a CSV file and a JSON array are read by one task each, which holds the whole file in memory.
"""

from __future__ import annotations

import abc
import contextlib
import csv
import functools
import io
import json
import os
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from s2l_ray.config.sections import FORMATS
from s2l_ray.errors import ConfigError, DataError
from s2l_ray.examples.rows import Records, Rows, TableRows
from s2l_ray.storage.hub import hub_problem
from s2l_ray.storage.places import Storage

# Rows handled at a time: as Python objects they take several times the memory of their text.
ROWS_AT_A_TIME = 16_384
GZIP_BLOCK_BYTES = 16 * 2**20
# Tasks whose examples differ from process to process, with the same seed: they iterate over sets of strings. Found by
# generating 30 examples of every task of reasoning-gym 0.1.25 under three values of PYTHONHASHSEED.
UNREPEATABLE_TASKS = frozenset(
    ["codeio", "isomorphic_strings", "knight_swap", "list_functions", "polynomial_multiplication", "ransom_note", "word_ladder"]
)

# --- files -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CorpusFile:
    """One file of a corpus."""

    name: str
    """As its owner would call it: the path or URI in the config, with what was found below it."""
    uri: str
    """The same, absolute: where a worker finds it."""
    num_bytes: int
    modified_ns: int

    @property
    def is_gzipped(self) -> bool:
        return self.name.endswith(".gz")

    @property
    def format(self) -> str | None:
        """How it is read, None for a suffix that is not known."""
        found = FORMATS.get(os.path.splitext(self.name.removesuffix(".gz"))[1].lower())
        return None if found == "parquet" and self.is_gzipped else found

    @property
    def source(self) -> str:
        """The source of rows that name none: the file's name without its suffixes."""
        return os.path.splitext(os.path.basename(self.name).removesuffix(".gz"))[0]

    def open(self) -> Any:
        """The file, to be read at any place."""
        return Storage(self.uri).open()

    def stream(self, compression: str | None = None) -> Any:
        """The file, to be read from its start."""
        storage = Storage(self.uri)
        return storage.filesystem.open_input_stream(storage.path(), compression=compression)

    @contextlib.contextmanager
    def readable(self) -> Iterator[None]:
        """Turns what goes wrong while the file is read into a DataError that says what to do."""
        try:
            with Storage(self.uri).explained():
                yield
        except FileNotFoundError as error:
            raise DataError(
                f"{self.name}: not found on {socket.gethostname()}. Put the corpus where every node can read it, "
                "on a shared filesystem or in object storage."
            ) from error
        except (OSError, pa.ArrowInvalid) as error:
            kind = f"a {self.format} file" if self.format == "parquet" else "readable"
            raise DataError(f"{self.name}: not {kind} ({error}). Replace the file, or leave it out.") from error

    def text(self) -> str:
        """The whole file as text, unpacked."""
        with self.readable(), self.stream("gzip" if self.is_gzipped else None) as stream:
            return _decoded(stream.read(), True, lambda line: f"{self.name} line {line + 1:,}")


# --- pieces ------------------------------------------------------------------------------------------------------


class Piece(Protocol):
    """A stretch of the corpus that can be read anywhere."""

    @property
    def name(self) -> str:
        """The file, the dataset or the task that it belongs to."""
        ...

    @property
    def size(self) -> int:
        """How much it is beside other pieces of its corpus: bytes of a file, else rows."""
        ...

    def read(self) -> Iterator[Rows]:
        """Its rows, some thousands at a time. Raises DataError naming file and row where they are not rows."""
        ...


@dataclass(frozen=True)
class FilePiece(abc.ABC):
    """What the pieces of a file share."""

    file: CorpusFile

    @property
    def name(self) -> str:
        return self.file.name

    @property
    def size(self) -> int:
        return self.file.num_bytes

    @abc.abstractmethod
    def read(self) -> Iterator[Rows]: ...


@dataclass(frozen=True)
class Lines(FilePiece):
    """The lines of a JSON Lines file that start in a range of bytes."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    def read(self) -> Iterator[Rows]:
        with self.file.readable(), self.file.open() as source:
            begin, data = owned_lines(source, self.start, self.stop)
        yield parse_lines(data, begin == 0, self.file, lambda: self._lines_before(begin))

    def _lines_before(self, offset: int) -> int:
        """How many lines end before `offset`: read only to name a line in a message."""
        count = 0
        with self.file.readable(), self.file.stream() as source:
            while offset > 0 and (block := source.read(min(offset, 2**20))):
                count += block.count(b"\n")
                offset -= len(block)
        return count


def owned_lines(source: Any, start: int, stop: int) -> tuple[int, bytes]:
    """The lines that start in [start, stop), and where the first of them starts.

    Ranges that cover a file own every one of its lines exactly once, wherever they are cut.
    """
    begin = _next_line(source, start - 1) if start else 0
    end = _next_line(source, stop - 1) if begin < stop else begin
    source.seek(begin)
    return begin, source.read(end - begin)


def _next_line(source: Any, offset: int) -> int:
    """Where the next line starts after the one that holds the byte at `offset`; the end of the file after the last."""
    source.seek(offset)
    while block := source.read(2**16):
        found = block.find(b"\n")
        if found >= 0:
            return int(offset + found + 1)
        offset += len(block)
    return offset


@dataclass(frozen=True)
class GzippedLines(FilePiece):
    """A gzipped JSON Lines file: it can be read from its start only."""

    def read(self) -> Iterator[Rows]:
        num_lines, rest = 0, b""
        with self.file.readable(), self.file.stream("gzip") as source:
            while block := source.read(GZIP_BLOCK_BYTES):
                whole, newline, rest = (rest + block).rpartition(b"\n")
                yield parse_lines(
                    whole + newline, num_lines == 0, self.file, functools.partial(int, num_lines)
                )  # as many as there are now
                num_lines += whole.count(b"\n") + len(newline)
        yield parse_lines(rest, num_lines == 0, self.file, lambda: num_lines)


def parse_lines(data: bytes, is_first: bool, file: CorpusFile, lines_before: Callable[[], int]) -> Records:
    """Lines of JSON as rows; blank lines are none.

    `lines_before` counts the file's lines before `data`, and is asked only where a message names a line.
    """

    def place_of(line: int) -> str:
        return f"{file.name} line {lines_before() + line + 1:,}"

    records: list[dict[str, Any]] = []
    lines: list[int] = []
    for number, line in enumerate(_decoded(data, is_first, place_of).split("\n")):
        if not line or line.isspace():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            hint = " A .json file is an array of objects, or one object a line." if file.format == "json" else ""
            found = f"not JSON ({error}; it starts with {line[:40]!r})"
            raise DataError(f"{place_of(number)}: {found}. Mend or remove the line.{hint}") from error
        if not isinstance(value, dict):
            raise DataError(f"{place_of(number)}: a row is a JSON object, found {type(value).__name__}. Mend or remove it.")
        records.append(value)
        lines.append(number)
    return Records(records, lambda row: place_of(lines[row]), file.source)


def _decoded(data: bytes, is_first: bool, place_of: Callable[[int], str]) -> str:
    """UTF-8 bytes as text, without the byte-order mark that some editors write first."""
    data = data.removeprefix(b"\xef\xbb\xbf") if is_first else data
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        where = place_of(data.count(b"\n", 0, error.start))
        raise DataError(f"{where}: not UTF-8 text ({error.reason}). Convert the file: iconv -f latin1 -t utf-8.") from error


@dataclass(frozen=True)
class JsonArray(FilePiece):
    """A JSON file that is one array of objects."""

    def read(self) -> Iterator[Rows]:
        try:
            values = json.loads(self.file.text())
        except json.JSONDecodeError as error:
            raise DataError(f"{self.name} line {error.lineno:,}: not JSON ({error}). Mend the file.") from error
        for row, value in enumerate(values):
            if not isinstance(value, dict):
                raise DataError(f"{self.name} row {row + 1:,}: not a JSON object but {type(value).__name__}. Mend the file.")
        # One piece of rows: the file is in memory as Python objects already.
        yield Records(values, lambda row: f"{self.name} row {row + 1:,}", self.file.source)


@dataclass(frozen=True)
class CsvFile(FilePiece):
    """A CSV or TSV file with a header. Every value is text: `001` stays `001`."""

    def read(self) -> Iterator[Rows]:
        csv.field_size_limit(sys.maxsize)  # 128 kB otherwise, which a long document exceeds
        delimiter = "\t" if self.file.format == "tsv" else ","
        reader = csv.reader(io.StringIO(self.file.text(), newline=""), delimiter=delimiter)
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise DataError(f"{self.name} line 1: a column name occurs twice ({', '.join(header)}). Give each its own.")
        records: list[dict[str, Any]] = []
        lines: list[int] = []
        for line, values in self._numbered(reader):
            if len(values) != len(header):
                raise DataError(f"{self.name} line {line:,}: {len(values)} values for {len(header)} columns. Mend the row.")
            records.append(dict(zip(header, values, strict=True)))
            lines.append(line)
            if len(records) == ROWS_AT_A_TIME:
                yield self._rows(records, lines)
                records, lines = [], []
        yield self._rows(records, lines)

    def _numbered(self, reader: Any) -> Iterator[tuple[int, list[str]]]:
        """Rows that are not blank, with the line on which each starts."""
        line = reader.line_num + 1
        try:
            for values in reader:
                if values:
                    yield line, values
                line = reader.line_num + 1
        except csv.Error as error:
            raise DataError(f"{self.name} line {line:,}: not CSV ({error}). Mend the row.") from error

    def _rows(self, records: list[dict[str, Any]], lines: list[int]) -> Records:
        return Records(records, lambda row: f"{self.name} line {lines[row]:,}", self.file.source)


@dataclass(frozen=True)
class RowGroups(FilePiece):
    """A run of row groups of a Parquet file."""

    start: int
    stop: int
    first_row: int
    raw_bytes: int

    @property
    def size(self) -> int:
        return self.raw_bytes

    def read(self) -> Iterator[Rows]:
        first = self.first_row
        with self.file.readable(), self.file.open() as source:
            groups = list(range(self.start, self.stop))
            for batch in pq.ParquetFile(source).iter_batches(ROWS_AT_A_TIME, row_groups=groups):
                yield TableRows(pa.Table.from_batches([batch]), self.name, first, self.file.source)
                first += batch.num_rows


@dataclass(frozen=True)
class HubRows:
    """A run of rows of a Hub dataset, which every node loads into its own cache."""

    name: str
    subset: str | None
    revision: str | None
    split: str
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    def read(self) -> Iterator[Rows]:
        rows = load_hub(self.name, self.subset, self.revision, self.split).with_format("arrow")
        for first in range(self.start, self.stop, ROWS_AT_A_TIME):
            table = rows[first : min(first + ROWS_AT_A_TIME, self.stop)]
            yield TableRows(table, f"{self.name} ({self.split})", first, self.name)


def load_hub(dataset: str, subset: str | None, revision: str | None, split: str) -> Any:
    import datasets

    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(dataset, name=subset, revision=revision, split=split)
    except Exception as error:  # the Hub's client raises its HTTP library's errors, and changes that library
        raise DataError(hub_problem(dataset, error)) from error


@dataclass(frozen=True)
class GeneratedRows:
    """A run of the examples of one reasoning-gym task. Example i depends on the parameters, the seed and i alone."""

    name: str
    parameters: dict[str, Any]
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    def read(self) -> Iterator[Rows]:
        generator = self._generator()
        records = []
        for index in range(self.start, self.stop):
            made = generator[index]
            metadata = json.dumps(made["metadata"], default=str, ensure_ascii=False)
            answer = "" if made["answer"] is None else str(made["answer"])
            records.append(
                {"question": made["question"], "answer": answer, "source": self.name, "index": index, "metadata": metadata}
            )
        yield Records(records, lambda row: f"{self.name} example {self.start + row:,}", self.name)

    def _generator(self) -> Any:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS

        key = f"examples.dataset.reasoning_gym.tasks.{self.name}"
        if self.name not in DATASETS:
            import difflib

            guess = difflib.get_close_matches(self.name, DATASETS, n=1)
            hint = f"Did you mean '{guess[0]}'?" if guess else f"Known tasks: {', '.join(sorted(DATASETS))}."
            raise ConfigError(f"{key}: no such task. {hint}")
        if self.name in UNREPEATABLE_TASKS:
            raise ConfigError(
                f"{key}: this task gives other examples in every process, so that no run could be continued. Choose another; "
                f"these are alike: {', '.join(sorted(UNREPEATABLE_TASKS))}."
            )
        try:
            return reasoning_gym.create_dataset(self.name, **self.parameters)
        except (TypeError, ValueError, AssertionError) as error:
            raise ConfigError(f"{key}: parameters cannot be used ({error}).") from error
