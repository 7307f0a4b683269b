"""Rows of a corpus as they were read, before anything is checked.

Rows know what a message needs to name them (`data/train.jsonl line 4,812`), whether a field is absent or null, and, where
they were read one by one, their own text. What should have been a row and was none is with them as a `BadRow`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from s2l_ray.errors import DataError
from s2l_ray.examples.columns import (
    Columns,
    cast_column,
    field_of,
    field_of_arrow,
    is_unicode,
    json_text,
    plain_type,
    plain_values,
)

ROWS_AT_A_TIME = 16_384
"""Rows that a reader hands on together: as Python objects they take several times the memory of their text."""

MISSING: Any = type("Missing", (), {"__repr__": lambda _: "MISSING"})()
"""The value of a field that a row does not have."""


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be read or understood."""

    reason: str
    """A word to count it by."""
    message: str
    """Where it is, what was found and what to do. Never quotes the corpus."""


class CorpusRows(Protocol):
    """Consecutive rows of a corpus, numbered from 0."""

    @property
    def source(self) -> str:
        """The source of rows that name none."""
        ...

    @property
    def bad(self) -> Sequence[BadRow]:
        """What stood among these rows and could not be read as one."""
        ...

    @property
    def nulls_are_absent(self) -> bool:
        """Whether null in an object means that it has no such key: an object of a table has the keys of all rows."""
        ...

    def __len__(self) -> int: ...

    def values(self, field: str) -> list[Any]:
        """The field's value in every row, MISSING where a row has no such field."""
        ...

    def fields(self, row: int) -> list[str]:
        """The names of the fields that a row has, in its order."""
        ...

    def place(self, row: int) -> str:
        """Where a row stands in the corpus, for a message."""
        ...

    def record(self, row: int) -> dict[str, Any]:
        """A row as a mapping of all its fields, with values that JSON has where it has them."""
        ...

    def own(self, rows: NDArray[np.int64]) -> tuple[str, pa.Array]:
        """Some of the rows as they were: `row_json` and the text of each, or `original` and a struct of their columns."""
        ...

    def columns(self, rows: NDArray[np.int64]) -> Columns:
        """The columns of some of the rows."""
        ...


@dataclass(frozen=True)
class Records:
    """Rows that were read one by one."""

    records: list[dict[str, Any]]
    place: Callable[[int], str]
    source: str
    texts: pa.Array | None = None
    """Each row as JSON, as it was written; made from the record where the corpus has none."""
    bad: Sequence[BadRow] = ()
    nulls_are_absent: bool = False

    def __len__(self) -> int:
        return len(self.records)

    def values(self, field: str) -> list[Any]:
        return [record.get(field, MISSING) for record in self.records]

    def fields(self, row: int) -> list[str]:
        return list(self.records[row])

    def record(self, row: int) -> dict[str, Any]:
        return self.records[row]

    def own(self, rows: NDArray[np.int64]) -> tuple[str, pa.Array]:
        if self.texts is None:
            return "row_json", pa.array([json_text(self.records[row]) for row in rows.tolist()], pa.string())
        return "row_json", self.texts if len(rows) == len(self) else self.texts.take(pa.array(rows))

    def columns(self, rows: NDArray[np.int64]) -> Columns:
        records = self.records if len(rows) == len(self) else [self.records[row] for row in rows.tolist()]
        ranks: dict[str, int] = {}
        for fields in set(map(tuple, records)):
            for rank, field in enumerate(fields):
                if is_unicode(field):  # a column cannot be called otherwise; such a field is in the row's own text alone
                    ranks[field] = min(rank, ranks.get(field, rank))
        return Columns({name: field_of(name, [record.get(name) for record in records]) for name in ranks}, ranks)


@dataclass(frozen=True)
class TableRows:
    """Rows that come as an Arrow table."""

    table: pa.Table
    name: str
    first_row: int
    source: str
    bad: Sequence[BadRow] = ()
    nulls_are_absent: bool = True

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def values(self, field: str) -> list[Any]:
        return self._values[field] if field in self._values else [MISSING] * len(self)

    def fields(self, row: int) -> list[str]:  # noqa: ARG002  a table's rows have all its columns
        return list(self.table.column_names)

    def place(self, row: int) -> str:
        return f"{self.name} row {self.first_row + row + 1:,}"

    def record(self, row: int) -> dict[str, Any]:
        return {name: values[row] for name, values in self._values.items()}

    @functools.cached_property
    def _values(self) -> dict[str, list[Any]]:
        return {name: plain_values(self.table[name]) for name in self.table.column_names}

    def own(self, rows: NDArray[np.int64]) -> tuple[str, pa.Array]:
        # Cast before anything is taken: of some types (views of text) nothing can be.
        columns = [cast_column(column, plain_type(column.type)) for column in self.table.columns]
        plain = pa.table(columns, self.table.column_names).to_struct_array().combine_chunks()
        return "original", plain.take(pa.array(rows))

    def as_records(self) -> Records:
        """The rows as those of a JSON file. Raises DataError for bytes, which JSON does not have."""
        for field in self.table.schema:
            if "binary" in str(field.type):
                raise DataError(
                    f"{self.name}: column '{field.name}' holds bytes, which a corpus of JSON files cannot pass on. Leave the "
                    "column out, or give Parquet files only."
                )
        records = [self.record(row) for row in range(len(self))]
        return Records(records, self.place, self.source, nulls_are_absent=True)

    def columns(self, rows: NDArray[np.int64]) -> Columns:
        names = self.table.column_names if len(rows) else []
        fields = {name: field_of_arrow(name, self.table.schema.field(name).type) for name in names}
        return Columns(fields, {name: rank for rank, name in enumerate(names)})
