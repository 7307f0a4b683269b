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
_HOLDS_JSON = {b"holds": b"json"}
# What is known of a column beside its type, as marks of its field: that it comes from an Arrow table; that it has whole numbers
# beyond 2**53, which decimals do not tell apart; that whole numbers and decimals stand in one place of it.
_ARROW, _LARGE, _MIXED = b"arrow", b"large", b"mixed"
_EXACT_INTEGER = 2**53
# Deeper nested types are a burden to every reader of Parquet.
_DEEPEST = 8


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
        names = sorted(self.fields, key=lambda name: (self.ranks[name], name))
        return pa.struct([_settled(self.fields[name]) for name in names])

    @property
    def json_names(self) -> list[str]:
        """The columns whose values are JSON texts."""
        return sorted(one.name for one in self.type if holds_json(one))


def holds_json(one: pa.Field) -> bool:
    """Whether a column holds every value as its JSON text (null where the row has null or nothing)."""
    return (one.metadata or {}).get(b"holds") == b"json"


def json_field(name: str) -> pa.Field:
    """A column of JSON texts."""
    return pa.field(name, pa.string(), metadata=_HOLDS_JSON)


def _settled(one: pa.Field) -> pa.Field:
    """A column as it is stored."""
    marks = one.metadata or {}
    if holds_json(one) or {_LARGE, _MIXED} <= marks.keys():
        return json_field(one.name)
    return pa.field(one.name, one.type)


def field_of(name: str, values: Sequence[Any]) -> pa.Field:
    """The type of a column from its JSON values, None where a row has null or nothing; the join of the types of single rows."""
    marks: set[bytes] = set()
    kind = _kind_of_all(values, marks, 0)
    return json_field(name) if kind is None else pa.field(name, kind, metadata=dict.fromkeys(marks, b""))


def _kind_of_all(values: Sequence[Any], marks: set[bytes], depth: int) -> pa.DataType | None:
    """The type in which all values come back as they are, None where there is none."""
    kinds = {type(value) for value in values} - {type(None)}
    if not kinds:
        return pa.null()
    if kinds <= {int, float}:
        return _kind_of_numbers(values, kinds, marks)
    if len(kinds) > 1 or depth > _DEEPEST:
        return None
    [kind] = kinds
    if kind is str:
        return pa.string() if are_unicode(values) else None
    if kind is list:
        inner = _kind_of_all([item for value in values if value for item in value], marks, depth + 1)
        return None if inner is None else pa.list_(inner)
    return _kind_of_objects(values, marks, depth) if kind is dict else pa.bool_()


def _kind_of_numbers(values: Sequence[Any], kinds: set[type], marks: set[bytes]) -> pa.DataType | None:
    largest = max((abs(value) for value in values if type(value) is int), default=0)
    if largest >= 2**63:
        return None
    marks |= {_LARGE} if largest > _EXACT_INTEGER else set()
    marks |= {_MIXED} if len(kinds) > 1 else set()
    return pa.float64() if float in kinds else pa.int64()


def _kind_of_objects(values: Sequence[Any], marks: set[bytes], depth: int) -> pa.DataType | None:
    """A struct for objects that all have the same keys: null would stand for one that an object does not have."""
    objects = [value for value in values if value is not None]
    names = objects[0].keys()
    if not names or any(value.keys() != names for value in objects) or not all(map(is_unicode, names)):
        return None
    kinds = {name: _kind_of_all([value[name] for value in objects], marks, depth + 1) for name in sorted(names)}
    return None if None in kinds.values() else pa.struct(list(kinds.items()))


def field_of_arrow(name: str, kind: pa.DataType) -> pa.Field:
    """A column of an Arrow table."""
    return pa.field(name, plain_type(kind), metadata={_ARROW: b""})


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
    marks = {**(one.metadata or {}), **(other.metadata or {})}
    kind = _joined_type(one.type, other.type, marks)
    return json_field(one.name) if kind is None else pa.field(one.name, kind, metadata=marks)


def _joined_type(one: pa.DataType, other: pa.DataType, marks: dict[bytes, bytes]) -> pa.DataType | None:
    """The type in which the values of both come back as they are, None where there is none."""
    if one.equals(other) or pa.types.is_null(other):
        return one
    if pa.types.is_null(one):
        return other
    if pa.types.is_list(one) and pa.types.is_list(other):
        inner = _joined_type(one.value_type, other.value_type, marks)
        return None if inner is None else pa.list_(inner)
    if pa.types.is_struct(one) and pa.types.is_struct(other):
        return _joined_struct(one, other, marks)
    return _joined_numbers(one, other, marks)


def _joined_struct(one: pa.DataType, other: pa.DataType, marks: dict[bytes, bytes]) -> pa.DataType | None:
    if {field.name for field in one} != {field.name for field in other} or one.num_fields != other.num_fields:
        return None  # null would stand for a key that a row does not have
    kinds = {field.name: _joined_type(field.type, other.field(field.name).type, marks) for field in one}
    return None if None in kinds.values() else pa.struct(list(kinds.items()))


def _joined_numbers(one: pa.DataType, other: pa.DataType, marks: dict[bytes, bytes]) -> pa.DataType | None:
    """The wider of two types of whole numbers or of decimals; of JSON's numbers decimals."""
    is_whole, is_decimal = ([check(kind) for kind in (one, other)] for check in (pa.types.is_integer, pa.types.is_floating))
    if _ARROW not in marks and all(whole or decimal for whole, decimal in zip(is_whole, is_decimal, strict=True)):
        marks[_MIXED] = b""
        return pa.float64()
    has_sign = any(pa.types.is_signed_integer(kind) for kind in (one, other))
    if not (all(is_whole) or all(is_decimal)) or (has_sign and pa.uint64() in (one, other)):
        return None
    schemas = [pa.schema([("column", kind)]) for kind in (one, other)]
    return pa.unify_schemas(schemas, promote_options="permissive").field("column").type


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


def are_unicode(texts: Sequence[str | None]) -> bool:
    """Whether UTF-8 has every character of all texts."""
    try:
        pa.array(texts, pa.string())
    except UnicodeEncodeError:
        return False
    return True


def column_from_values(values: Sequence[Any], one: pa.Field) -> pa.Array:
    """JSON values as a column of this type, which was joined from theirs."""
    if holds_json(one):
        return pa.array([None if value is None else json_text(value) for value in values], pa.string())
    if _has_decimals(one.type):
        values = [_with_decimals(value, one.type) for value in values]
    return pa.array(values, one.type)


def _has_decimals(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(_has_decimals(field.type) for field in kind)
    return _has_decimals(kind.value_type) if pa.types.is_list(kind) else bool(pa.types.is_floating(kind))


def _with_decimals(value: Any, kind: pa.DataType) -> Any:
    """A value with decimals for the whole numbers in places of decimals."""
    if value is None or not (pa.types.is_nested(kind) or pa.types.is_floating(kind)):
        return value
    if pa.types.is_list(kind):
        return [_with_decimals(inner, kind.value_type) for inner in value]
    if pa.types.is_struct(kind):
        return {field.name: _with_decimals(value[field.name], field.type) for field in kind}
    return float(value)


def column_from_arrow(column: pa.Array, one: pa.Field) -> pa.Array:
    """An Arrow column as one of this type, which was joined from theirs."""
    if holds_json(one):
        return column_from_values(plain_values(column), one)
    return cast_column(column, one.type)


def cast_column(column: pa.Array | pa.ChunkedArray, kind: pa.DataType) -> pa.Array | pa.ChunkedArray:
    """A column of another type. What Arrow would cast wrongly goes by its values."""
    if column.type == kind:
        return column
    if not _has_nulls_inside(column.type):  # an array that is invalid comes of them, and may end the process that reads it
        try:
            return column.cast(kind)
        except pa.ArrowIndexError:  # of dictionaries without an entry, inside a struct
            pass
    return pa.array(column.to_pylist(), kind)


def _has_nulls_inside(kind: pa.DataType) -> bool:
    """Whether a nested type has a part that is always null."""
    inner = [kind.field(place).type for place in range(kind.num_fields)] if pa.types.is_nested(kind) else []
    return any(pa.types.is_null(one) or _has_nulls_inside(one) for one in inner)


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
    if pa.types.is_struct(kind):  # in the order of its own fields
        return pa.struct([(field.name, _json_type(field.type)) for field in kind])
    plain = plain_type(kind)
    if pa.types.is_temporal(plain) or pa.types.is_decimal(plain):
        return pa.string()
    if pa.types.is_list(plain):
        return pa.list_(_json_type(kind.value_type))
    if pa.types.is_map(plain):
        return pa.map_(_json_type(kind.key_type), _json_type(kind.item_type))
    return pa.int8() if pa.types.is_null(plain) else plain  # nested nulls are cast to nulls of some type alone


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
