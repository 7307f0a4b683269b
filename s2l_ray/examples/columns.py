"""The corpus's own columns, as Parquet holds them: typed where all rows agree, else each value as its JSON text.

Nothing needs these columns but people and other tools, so nothing in them stops a run: a column whose rows hold text here, a
number there and an object elsewhere is a column of JSON texts. A column is typed only where its values come back from it as
they were; what is lost even then (absent or null, the order of keys) is in the row's own text, for a corpus that has one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

_PLAIN = {
    pa.large_string(): pa.string(),
    pa.string_view(): pa.string(),
    pa.large_binary(): pa.binary(),
    pa.binary_view(): pa.binary(),
}
# What pyarrow raises for values that make no column.
_NO_COLUMN = (pa.ArrowException, OverflowError, UnicodeEncodeError, TypeError, ValueError, RecursionError)
_HOLDS_JSON = {b"holds": b"json"}
# Deeper nested types are a burden to every reader of Parquet.
_DEEPEST = 8
# Whole numbers beyond it are not told apart as decimals.
_EXACT_INTEGER = 2**53


@dataclass(frozen=True)
class Columns:
    """The corpus's own columns, as some rows have them."""

    fields: dict[str, pa.Field] = field(default_factory=dict)
    """Name -> its type; see `holds_json`."""
    ranks: dict[str, int] = field(default_factory=dict)
    """The earliest position of each in any row."""

    @property
    def type(self) -> pa.StructType:
        """A struct with one field for each column, in order of their earliest position in any row, then of name."""
        return pa.struct([self.fields[name] for name in sorted(self.fields, key=lambda name: (self.ranks[name], name))])

    @property
    def json_names(self) -> list[str]:
        """The columns whose values are JSON texts."""
        return sorted(name for name, one in self.fields.items() if holds_json(one))


def holds_json(one: pa.Field) -> bool:
    """Whether a column holds every value as its JSON text (null where the row has null or nothing)."""
    return (one.metadata or {}).get(b"holds") == b"json"


def json_field(name: str) -> pa.Field:
    """A column of JSON texts."""
    return pa.field(name, pa.string(), metadata=_HOLDS_JSON)


def field_of(name: str, values: Sequence[Any]) -> pa.Field:
    """The type of a column from its JSON values, None where a row has null or nothing."""
    try:
        column = pa.array(values)
    except _NO_COLUMN:
        return json_field(name)
    if not pa.types.is_nested(column.type):
        return pa.field(name, column.type)
    kind = plain_type(column.type)
    is_exact = _can_be_stored(kind) and column.to_pylist() == list(values)
    return pa.field(name, kind) if is_exact else json_field(name)


def join_columns(found: Iterable[Columns]) -> Columns:
    """The columns of all rows from those of some rows each, the same for any order of them."""
    fields: dict[str, pa.Field] = {}
    ranks: dict[str, int] = {}
    for columns in found:
        for name, one in columns.fields.items():
            fields[name] = _joined(fields[name], one) if name in fields else one
            ranks[name] = min(columns.ranks[name], ranks.get(name, columns.ranks[name]))
    return Columns(fields, ranks)


def _joined(one: pa.Field, other: pa.Field) -> pa.Field:
    if holds_json(one) or holds_json(other):
        return json_field(one.name)
    kind = _joined_type(one.type, other.type)
    return json_field(one.name) if kind is None else pa.field(one.name, kind)


def _joined_type(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    """The type that holds the values of both as they are, None where there is none."""
    if one.equals(other) or pa.types.is_null(other):
        return one
    if pa.types.is_null(one):
        return other
    if pa.types.is_list(one) and pa.types.is_list(other):
        inner = _joined_type(one.value_type, other.value_type)
        return None if inner is None else pa.list_(inner)
    if pa.types.is_struct(one) and pa.types.is_struct(other):
        return _joined_struct(one, other)
    return _joined_numbers(one, other) if pa.types.is_primitive(one) or pa.types.is_decimal(one) else None


def _joined_struct(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    if {field.name for field in one} != {field.name for field in other} or one.num_fields != other.num_fields:
        return None  # null would stand for a key that a row does not have
    kinds = {field.name: _joined_type(field.type, other.field(field.name).type) for field in one}
    return None if None in kinds.values() else pa.struct(list(kinds.items()))


def _joined_numbers(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    """The wider of two types of numbers or times of one kind."""
    kinds = (
        lambda kind: pa.types.is_integer(kind) or pa.types.is_floating(kind),
        pa.types.is_decimal,
        lambda kind: pa.types.is_timestamp(kind) and kind.unit != "ns",  # others may be out of the range of nanoseconds
    )
    if not any(is_kind(one) and is_kind(other) for is_kind in kinds):
        return None
    if {pa.types.is_unsigned_integer(one), pa.types.is_unsigned_integer(other)} == {True, False} and pa.uint64() in (
        one,
        other,
    ):
        return pa.float64() if pa.types.is_floating(one) or pa.types.is_floating(other) else None
    schemas = [pa.schema([("column", kind)]) for kind in (one, other)]
    try:
        return pa.unify_schemas(schemas, promote_options="permissive").field("column").type
    except pa.ArrowException:
        return None


def plain_type(kind: pa.DataType) -> pa.DataType:
    """A type as it is stored: without dictionaries and views, small offsets, the fields of a struct in order of name.

    JSON rows name the fields of an object in any order, and the bytes of a part must not depend on which row came first.
    """
    inner = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
    if pa.types.is_dictionary(inner):
        inner = inner.value_type
    if inner is not kind:
        return plain_type(inner)
    if pa.types.is_struct(kind):
        fields = sorted((kind.field(i) for i in range(kind.num_fields)), key=lambda field: str(field.name))
        return pa.struct([(field.name, plain_type(field.type)) for field in fields])
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return pa.list_(plain_type(kind.value_type))
    if pa.types.is_map(kind):
        return pa.map_(plain_type(kind.key_type), plain_type(kind.item_type))
    return _PLAIN.get(kind, kind)


def _can_be_stored(kind: pa.DataType, depth: int = 0) -> bool:
    """Whether Parquet has the type: no struct without a field, and nothing nested endlessly."""
    if depth > _DEEPEST:
        return False
    if pa.types.is_struct(kind):
        return bool(kind.num_fields) and all(_can_be_stored(field.type, depth + 1) for field in kind)
    return _can_be_stored(kind.value_type, depth + 1) if pa.types.is_list(kind) else True


# --- values ------------------------------------------------------------------------------------------------------


def json_text(value: Any) -> str:
    """A value as JSON in UTF-8; what JSON has no name for (a date, bytes) as text."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if is_unicode(text) else json.dumps(value, default=str)


def is_unicode(text: str) -> bool:
    """Whether UTF-8 has every character of a text."""
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair
        return False
    return True


def column_from_values(values: Sequence[Any], one: pa.Field) -> pa.Array:
    """JSON values as a column of this type, which was joined from theirs."""
    if holds_json(one):
        return pa.array([None if value is None else json_text(value) for value in values], pa.string())
    if pa.types.is_floating(one.type):
        values = [float(value) if isinstance(value, int) else value for value in values]
    return pa.array(values, one.type)


def column_from_arrow(column: pa.Array, one: pa.Field) -> pa.Array:
    """An Arrow column as one of this type, which was joined from theirs."""
    if holds_json(one):
        return column_from_values(plain_values(column), one)
    # Not safe: whole numbers beyond 2**53 are then rounded in a column of decimals, as everywhere.
    return column.cast(one.type, safe=not pa.types.is_floating(one.type))


def plain_values(column: pa.Array | pa.ChunkedArray) -> list[Any]:
    """The values of an Arrow column as JSON has them; dates, times and decimals as text, bytes as they are."""
    try:
        return list(column.cast(_json_type(column.type)).to_pylist())
    except (pa.ArrowException, ValueError, OverflowError, TypeError):
        # A type without such a cast, or a time out of Python's range inside a nested one.
        return [_scalar_text(value) for value in column]


def _scalar_text(value: pa.Scalar) -> Any:
    try:
        return value.as_py()
    except (ValueError, OverflowError):
        return pc.cast(value, pa.string()).as_py()


def _json_type(kind: pa.DataType) -> pa.DataType:
    """The type with text for what JSON has no value for."""
    kind = plain_type(kind)
    if pa.types.is_temporal(kind) or pa.types.is_decimal(kind):
        return pa.string()
    if pa.types.is_list(kind):
        return pa.list_(_json_type(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, _json_type(field.type)) for field in kind])
    return kind


def struct_from_values(records: Sequence[dict[str, Any]], kind: pa.StructType) -> pa.StructArray:
    """Rows as mappings as a struct of this type."""
    columns = [column_from_values([record.get(one.name) for record in records], one) for one in kind]
    return pa.StructArray.from_arrays(columns, fields=list(kind))


def struct_from_arrow(rows: pa.StructArray, kind: pa.StructType) -> pa.StructArray:
    """Rows of an Arrow corpus as a struct of this type, with null where they do not have a column."""
    columns = []
    for one in kind:
        at = rows.type.get_field_index(one.name)
        if at < 0:
            columns.append(pa.nulls(len(rows), one.type))
        else:
            is_done = holds_json(rows.type.field(at))
            columns.append(rows.field(at) if is_done else column_from_arrow(rows.field(at), one))
    return pa.StructArray.from_arrays(columns, fields=list(kind))
