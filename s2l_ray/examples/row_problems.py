"""What is wrong with a row, as a value that can be counted or raised, and what its words are made of.

No message quotes a corpus: it names fields, messages by number, keys, roles, and values by their kind alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from s2l_ray.examples.json_values import loads_json

# Of clinical notes.
ANOTHER_CATEGORY, MARKED_AS_ERROR = "another_category", "marked_as_error"
NO_FINDINGS, NO_IMPRESSION = "no_findings", "no_impression"

NOTHING_TO_LEARN = frozenset(["no_assistant_message", "nothing_learned", "empty_prompt", "empty_response"]) | {
    ANOTHER_CATEGORY,
    MARKED_AS_ERROR,
    NO_FINDINGS,
    NO_IMPRESSION,
}
"""Reasons of rows that are well-formed and teach nothing; every other reason is a row that cannot be understood."""

LONGEST_NAME, MOST_NAMES = 40, 20
"""Of field names and keys in a message: characters of one, and how many. They are the corpus's, too."""

_COMPACT = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode
_KINDS: dict[type, str] = {
    bool: "true or false",
    int: "a number",
    float: "a number",
    str: "text",
    dict: "an object",
    list: "a list",
    bytes: "bytes",
    type(None): "null",
}


class RowProblem(Exception):  # noqa: N818 - counted as often as raised
    """A row that nothing is learned from.

    `reason` is one word to count by. `message` says what was found and what to do; whoever knows the row puts its place
    before it.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(reason, message)

    @property
    def reason(self) -> str:
        return str(self.args[0])

    @property
    def message(self) -> str:
        return str(self.args[1])

    def __str__(self) -> str:
        return self.message

    def at(self, place: str) -> RowProblem:
        """The same problem with a place inside the row before it."""
        return RowProblem(self.reason, f"{place}{self.message}")


def kind_in_words(value: Any) -> str:
    """The kind of a value and nothing of its content: `text`, `a number`, `NaN`, `an empty list`."""
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):  # noqa: PLR0124 - NaN
        return "NaN or Infinity"
    kind = _KINDS.get(type(value), type(value).__name__)
    return f"{kind} that is empty" if value in ("", [], {}) else kind


def word_in_words(value: Any, longest: int) -> str:
    """A role or a type for a message: itself where it looks like one, else only how long it is."""
    text = str(value)
    is_word = len(text) <= longest and text.isascii() and text.replace("-", "_").replace(".", "_").isidentifier()
    return f"'{text}'" if is_word else f"a text of {len(text):,} characters"


def names_in_words(names: Iterable[Any], longest: int = LONGEST_NAME) -> str:
    """Names for a message, each cut to a length, not more than MOST_NAMES of them; `none` without any.

    What a terminal would obey or could not show is escaped.
    """
    known = [str(name) for name in names]
    shown = [name if len(name) <= longest else f"{name[:longest]}..." for name in known[:MOST_NAMES]]
    shown = [name if name.isprintable() else name.encode("unicode_escape").decode() for name in shown]
    return ", ".join(shown + ["..."] * (len(known) > MOST_NAMES)) or "none"


def compact_json(value: Any) -> str:
    """Strict JSON of a value in one line. Raises RowProblem for what JSON does not have, and for half a surrogate pair."""
    try:
        text = _COMPACT(value)
        require_unicode(text)
    except RecursionError:
        raise RowProblem("too_deep", "is nested too deeply. Fix or remove the row.") from None
    except (ValueError, TypeError) as error:
        found = "NaN or Infinity" if isinstance(error, ValueError) else "a value that is no JSON"
        raise RowProblem("not_json", f"holds {found}. Write null or text in its place.") from None
    return text


def require_unicode(text: str) -> None:
    """Raises RowProblem for a text with half a surrogate pair, which no file and no tokenizer takes."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError:
        message = "has half a surrogate pair, which is not a character. Fix or remove the row."
        raise RowProblem("half_surrogate", message) from None


def from_json_text(text: str) -> Any:
    """The value of a JSON text. Raises RowProblem for any other text."""
    try:
        return loads_json(text.removeprefix("\ufeff"))
    except RecursionError:
        raise RowProblem("too_deep", "is JSON text that is nested too deeply. Fix or remove the row.") from None
    except ValueError as error:
        position = f" from character {error.pos + 1:,} on" if isinstance(error, json.JSONDecodeError) else ""
        single = ", but looks as Python prints it, with single quotes" if text.lstrip("[{ \n").startswith("'") else ""
        message = f"is not JSON{position}{single}. Write the value as JSON (Python: json.dumps)."
        raise RowProblem("bad_json_text", message) from None


def without_nulls(value: Any) -> Any:
    """A value without the keys that are null, at any depth: a table's struct has every key in every row.

    The pairs of an Arrow map become an object.
    """
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    if not isinstance(value, list):
        return value
    if value and all(isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str) for item in value):
        return {key: without_nulls(inner) for key, inner in value}
    return [without_nulls(item) for item in value]
