"""JSON texts as values: what Python's `json.loads` gives or raises, in a third of its time.

orjson does the work wherever both agree. It refuses NaN, Infinity, numbers beyond a double's range and half surrogate pairs,
and turns whole numbers beyond 64 bits into decimals; `json` takes them, reads them exactly, and says where a text is wrong.
The columns of rows that were read once are read again by Arrow.
"""

from __future__ import annotations

import json
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json

SIMPLE = frozenset([str, int, bool, type(None)])
"""Types of values on which both agree."""
# A whole number beyond 64 bits has at least so many digits.
_DIGITS, _MANY_DIGITS = bytes.maketrans(b"123456789", b"000000000"), b"0" * 19
# `json` stops near 1,000 levels, as does what writes the values again; orjson does not. Brackets bound the levels.
_MOST_BRACKETS = 400
_READ_BY_ARROW = {pa.string(), pa.int64(), pa.bool_(), pa.null()}


def loads_json(text: str) -> Any:
    """The value of a JSON text. Raises ValueError (JSONDecodeError) or RecursionError as `json.loads` does."""
    try:
        value = orjson.loads(text)
    except ValueError:
        return json.loads(text)
    if type(value) is dict and SIMPLE.issuperset(map(type, value.values())):
        return value
    data = text.encode()
    is_shallow = data.count(b"{") + data.count(b"[") <= _MOST_BRACKETS
    return value if is_shallow and _MANY_DIGITS not in data.translate(_DIGITS) else json.loads(text)


def read_fields(texts: pa.Array, kind: pa.StructType) -> pa.StructArray | None:
    """The fields that `kind` names of JSON objects, texts of one line each, null where an object has none; None where the
    fields are other than texts, whole numbers, true and false, or Arrow does not read them so."""
    if not all(one.type in _READ_BY_ARROW for one in kind) or not len(texts):
        return None
    lines = pc.binary_join(pa.ListArray.from_arrays([0, len(texts)], texts), "\n")[0].as_buffer()
    try:
        table = pa.json.read_json(
            pa.BufferReader(lines),
            read_options=pa.json.ReadOptions(use_threads=False, block_size=lines.size + 1),
            parse_options=pa.json.ParseOptions(explicit_schema=pa.schema(list(kind)), unexpected_field_behavior="ignore"),
        )
    except pa.ArrowException:
        return None
    return table.to_struct_array().combine_chunks() if table.num_rows == len(texts) else None
