"""Rows of a corpus as they were read, before anything is checked.

Rows know what a message needs to name them (`data/train.jsonl line 4,812`), and whether a field is absent or null.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa

from s2l_ray.errors import DataError

ROWS_AT_A_TIME = 16_384
"""Rows that a reader hands on together: as Python objects they take several times the memory of their text."""

# What pyarrow raises for values that make no column.
_NO_COLUMN = (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeEncodeError)

MISSING: Any = type("Missing", (), {"__repr__": lambda _: "MISSING"})()
"""The value of a field that a row does not have."""


class CorpusRows(Protocol):
    """Consecutive rows of a corpus, numbered from 0."""

    @property
    def source(self) -> str:
        """The source of rows that name none."""
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
        """A row as a mapping of all its fields."""
        ...

    def table(self, rows: list[int]) -> pa.Table:
        """Some of the rows with all their fields, in types that Parquet can store.

        Raises DataError naming a row whose value does not fit into one column with the others.
        """
        ...

    def ranks(self, rows: list[int]) -> dict[str, int]:
        """Each field's earliest position in any of some rows: it orders the columns of a whole corpus."""
        ...


@dataclass(frozen=True)
class Records:
    """Rows that were read one by one."""

    records: list[dict[str, Any]]
    place: Callable[[int], str]
    source: str

    def __len__(self) -> int:
        return len(self.records)

    def values(self, field: str) -> list[Any]:
        return [record.get(field, MISSING) for record in self.records]

    def fields(self, row: int) -> list[str]:
        return list(self.records[row])

    def record(self, row: int) -> dict[str, Any]:
        return self.records[row]

    def ranks(self, rows: list[int]) -> dict[str, int]:
        ranks: dict[str, int] = {}
        for fields in {tuple(self.records[row]) for row in rows}:
            for rank, field in enumerate(fields):
                ranks[field] = min(rank, ranks.get(field, rank))
        return ranks

    def table(self, rows: list[int]) -> pa.Table:
        return pa.table({field: self._column(field, rows) for field in self.ranks(rows)})

    def _column(self, field: str, rows: list[int]) -> pa.Array:
        values = [self.records[row].get(field) for row in rows]
        try:
            column = pa.array(values)
            if not pa.types.is_nested(column.type):
                return column
            values = [_storable(value) for value in values]
            return pa.array(values, plain_type(pa.array(values).type))
        except _NO_COLUMN as error:
            raise DataError(self._problem(field, rows, values, error)) from error

    def _problem(self, field: str, rows: list[int], values: list[Any], error: Exception) -> str:
        """The message that names the first row whose value does not fit into a column with those before it."""
        good, bad = 0, len(values)  # the first `good` values fit into one column, the first `bad` do not
        while bad - good > 1:
            middle = (good + bad) // 2
            try:
                pa.array(values[:middle])
                good = middle
            except _NO_COLUMN:
                bad = middle
        here = f"{self.place(rows[good])}: field '{field}'"
        if isinstance(error, UnicodeEncodeError):
            return f"{here} has half a surrogate pair, which is not a character. Fix or remove the row."
        if isinstance(error, OverflowError):
            return f"{here} has a number too large to store ({values[good]}). Write it as text."
        before = next((i for i in reversed(range(good)) if values[i] is not None), None)
        earlier = "" if before is None else f" after {kind_of(values[before])} in {self.place(rows[before])}"
        return f"{here} is {kind_of(values[good])}{earlier}, and a column has one type ({error}). Use one type in all rows."


@dataclass(frozen=True)
class TableRows:
    """Rows that come as an Arrow table."""

    columns: pa.Table
    name: str
    first_row: int
    source: str

    def __len__(self) -> int:
        return int(self.columns.num_rows)

    def values(self, field: str) -> list[Any]:
        if field not in self.columns.column_names:
            return [MISSING] * len(self)
        return list(self.columns[field].to_pylist())

    def fields(self, row: int) -> list[str]:  # noqa: ARG002  a table's rows have all its columns
        return list(self.columns.column_names)

    def place(self, row: int) -> str:
        return f"{self.name} row {self.first_row + row + 1:,}"

    def record(self, row: int) -> dict[str, Any]:
        return self._records[row]

    @functools.cached_property
    def _records(self) -> list[dict[str, Any]]:
        return list(self.columns.to_pylist())

    def ranks(self, rows: list[int]) -> dict[str, int]:
        return {field: rank for rank, field in enumerate(self.columns.column_names)} if rows else {}

    def table(self, rows: list[int]) -> pa.Table:
        fields = [pa.field(field.name, plain_type(field.type)) for field in self.columns.schema]
        return self.columns.take(pa.array(rows, pa.int64())).cast(pa.schema(fields))


@dataclass(frozen=True)
class Columns:
    """The corpus's own columns, as some rows have them."""

    type: pa.DataType
    """A struct with one field for each column."""
    ranks: dict[str, int]
    """The earliest position of each in any row."""


def join_columns(found: Iterable[tuple[str, Columns]]) -> Columns:
    """The columns of all rows from those of some rows each; `found` pairs them with the name of the place they are from.

    Each column gets the narrowest type that holds all its values. The columns are in order of their earliest position in any
    row, then of name, for any order of the rows. Raises DataError naming a column whose types cannot be joined, and
    where they are.
    """
    types: dict[str, tuple[pa.DataType, str]] = {}
    ranks: dict[str, int] = {}
    for name, columns in found:
        for field in columns.type:
            known, where = types.get(field.name, (field.type, name))
            try:
                types[field.name] = (_joined(known, field.type), where)
            except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
                raise DataError(
                    f"field '{field.name}' is {known} in {where} and {field.type} in {name}, and a column has one type. "
                    "Use one type in all rows."
                ) from error
            ranks[field.name] = min(columns.ranks[field.name], ranks.get(field.name, columns.ranks[field.name]))
    order = sorted(types, key=lambda name: (ranks[name], name))
    return Columns(pa.struct([(name, types[name][0]) for name in order]), ranks)


def _joined(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    """The type that holds the values of both."""
    if one.equals(other):
        return one
    schemas = [pa.schema([("column", kind)]) for kind in (one, other)]
    return plain_type(pa.unify_schemas(schemas, promote_options="permissive").field("column").type)


def kind_of(value: Any) -> str:
    """The type of a JSON value in words, for a message: `text`, `a number (12)`, `null`."""
    if value is MISSING or value is None:
        return "null"
    kinds = {bool: "true or false", int: "a number", float: "a number", str: "text", dict: "an object", list: "a list"}
    kind = kinds.get(type(value), type(value).__name__)
    return f"{kind} ({value})" if kind == "a number" else kind


def plain_type(kind: pa.DataType) -> pa.DataType:
    """A type as it is stored: without dictionary encoding, and with the fields of a struct in order of name.

    JSON rows name the fields of an object in any order, and the bytes of a part must not depend on which row came first.
    """
    if pa.types.is_dictionary(kind):
        return plain_type(kind.value_type)
    if pa.types.is_struct(kind):
        fields = sorted((kind.field(i) for i in range(kind.num_fields)), key=lambda field: str(field.name))
        return pa.struct([(field.name, plain_type(field.type)) for field in fields])
    if pa.types.is_list(kind):
        return pa.list_(plain_type(kind.value_type))
    if pa.types.is_large_list(kind):
        return pa.large_list(plain_type(kind.value_type))
    return kind


def _storable(value: Any) -> Any:
    """A JSON value with null for empty objects: Parquet has no struct without a field."""
    if isinstance(value, dict):
        return {key: _storable(inner) for key, inner in value.items()} or None
    return [_storable(inner) for inner in value] if isinstance(value, list) else value
