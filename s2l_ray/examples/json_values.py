"""JSON texts as values: what Python's `json.loads` gives or raises, in a third of its time.

orjson does the work wherever both agree. It refuses NaN, Infinity, numbers beyond a double's range and half surrogate pairs,
and turns whole numbers beyond 64 bits into decimals; `json` takes them, reads them exactly, and says where a text is wrong.
"""

from __future__ import annotations

import json
from typing import Any

import orjson

_SIMPLE = frozenset([str, int, bool, type(None)])
# A whole number beyond 64 bits has at least so many digits.
_DIGITS, _MANY_DIGITS = bytes.maketrans(b"123456789", b"000000000"), b"0" * 19
# `json` stops near 1,000 levels, as does what writes the values again; orjson does not. Brackets bound the levels.
_MOST_BRACKETS = 400


def loads_json(text: str) -> Any:
    """The value of a JSON text. Raises ValueError (JSONDecodeError) or RecursionError as `json.loads` does."""
    try:
        value = orjson.loads(text)
    except ValueError:
        return json.loads(text)
    if type(value) is dict and _SIMPLE.issuperset(map(type, value.values())):
        return value
    data = text.encode()
    is_shallow = data.count(b"{") + data.count(b"[") <= _MOST_BRACKETS
    return value if is_shallow and _MANY_DIGITS not in data.translate(_DIGITS) else json.loads(text)
