"""JSON as text: what a row's own text needs to be one strict line, and rows of Arrow as such lines."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from s2l_ray.errors import ConfigError

# Outside of strings: what Python and pandas write for numbers that JSON lacks, and the line ends of a row over several lines.
_STRING = r'"[^"\\]*(?:\\.[^"\\]*)*"'
_LENIENT = re.compile(rf"{_STRING}|-?\b(?:NaN|Infinity)\b")
_LINE_ENDS = re.compile(rf"{_STRING}|\s*[\r\n]\s*")


def strict_line(text: str) -> tuple[str, bool]:
    """A row's JSON text as one line of strict JSON, and whether it was strict before.

    Nothing changes but the white space around it and at its line ends, and NaN and infinite numbers, which become null.
    """
    line = text.strip()
    if "\n" in line or "\r" in line:
        line = _LINE_ENDS.sub(lambda found: found[0] if found[0][0] == '"' else " ", line)
    if "NaN" not in line and "Infinity" not in line:
        return line, True
    strict = _LENIENT.sub(lambda found: found[0] if found[0][0] == '"' else "null", line)
    return strict, strict == line


def with_fields(line: str, fields: dict[str, Any]) -> str:
    """The text of a JSON object with further fields at its end."""
    if not fields:
        return line
    begun = line.removesuffix("}").rstrip()
    added = json.dumps(fields, ensure_ascii=False, allow_nan=False)[1:]
    return f"{begun}{added}" if begun == "{" else f"{begun}, {added}"


def json_line(row: dict[str, Any]) -> tuple[str, bool]:
    """A row of Arrow values as one line of strict JSON, and whether it could be: NaN and infinite numbers become null.

    Dates, times and decimal numbers become text. Raises ConfigError for bytes: their text would not be what they hold.
    """
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=False, default=_as_text), True
    except ValueError:
        return json.dumps(_without_nan(row), ensure_ascii=False, allow_nan=False, default=_as_text), False


def _as_text(value: Any) -> str:
    if isinstance(value, bytes):
        raise ConfigError("--format jsonl: the rows have binary values, which JSON cannot hold. Use --format parquet.")
    return str(value)


def _without_nan(value: Any) -> Any:
    """A value with null for every number that is NaN or infinite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    return [_without_nan(inner) for inner in value] if isinstance(value, list | tuple) else value
