"""CSV and TSV files. Every value is text: `001` stays `001`."""

from __future__ import annotations

import csv
import io
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from s2l_ray.errors import DataError
from s2l_ray.examples.files import BYTE_ORDER_MARK
from s2l_ray.examples.formats import FilePiece
from s2l_ray.examples.rows import ROWS_AT_A_TIME, BadRow, CorpusRows, Records
from s2l_ray.progress import get_log

WRONG_NUMBER = "wrong_number_of_values"


@dataclass(frozen=True)
class CsvFile(FilePiece):
    """A CSV or TSV file with a header. A separator other than the comma is recognised in the header."""

    def read(self) -> Iterator[CorpusRows]:
        csv.field_size_limit(sys.maxsize)  # 128 kB otherwise, which a long document exceeds
        text = self.file.text().removeprefix(BYTE_ORDER_MARK)
        # Not strict, a quotation mark that is never closed would make one value of the rest of the file.
        rows = self._numbered(csv.reader(io.StringIO(text, newline=""), delimiter=self._delimiter(text), strict=True))
        header = self._header(next(rows, (1, []))[1])
        records: list[dict[str, Any]] = []
        lines: list[int] = []
        bad: list[BadRow] = []
        for line, values in rows:
            if len(values) < len(header) or any(values[len(header) :]):
                problem = f"{len(values)} values for {len(header)} columns. Fix the row."
                bad.append(BadRow(WRONG_NUMBER, f"{self.name} line {line:,}: {problem}"))
                continue
            records.append(dict(zip(header, values, strict=False)))  # spreadsheets add empty values at the end
            lines.append(line)
            if len(records) == ROWS_AT_A_TIME:
                yield self._rows(records, lines, bad)
                records, lines, bad = [], [], []
        yield self._rows(records, lines, bad)

    def _delimiter(self, text: str) -> str:
        header = text.partition("\n")[0]
        usual = "\t" if self.file.format == "tsv" else ","
        if usual in header:
            return usual
        found = max(";\t,|", key=header.count)
        if not header.count(found):
            return usual
        name = {"\t": "a tab"}.get(found, f"'{found}'")
        get_log("examples").info(f"{self.name}: its columns are separated by {name}")
        return found

    def _header(self, names: list[str]) -> list[str]:
        """The names of the columns; one without a name is called after its place. Raises DataError for a name given twice."""
        twice = [name for name, count in Counter(names).items() if name and count > 1]
        if twice:
            places = [str(place) for place, name in enumerate(names, 1) if name == twice[0]]
            raise DataError(
                f"{self.name} line 1: '{twice[0]}' is the name of columns {' and '.join(places)}. Rename all but one of them."
            )
        made = [name or f"column_{place}" for place, name in enumerate(names, 1)]
        nameless = [new for name, new in zip(names, made, strict=True) if not name]
        if nameless:
            get_log("examples").info(f"{self.name}: columns without a name are called {', '.join(nameless)}")
        if len(set(made)) < len(made):
            raise DataError(f"{self.name} line 1: a column has no name, and another is called {nameless[0]}. Name them all.")
        return made

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

    def _rows(self, records: list[dict[str, Any]], lines: list[int], bad: list[BadRow]) -> Records:
        return Records(records, lambda row: f"{self.name} line {lines[row]:,}", self.file.source, bad=bad)
