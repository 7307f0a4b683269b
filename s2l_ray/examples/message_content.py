"""The content of one message: text, nothing, or typed parts as OpenAI, Anthropic and Mistral write them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from s2l_ray.examples.row_problems import RowProblem, compact_json, kind_in_words, word_in_words
from s2l_ray.examples.tool_calls import read_calls

LONGEST_WORD = 20
"""Characters of a role or of a part's type in a message."""

_TEXT_PARTS = frozenset(["text", "input_text", "output_text"])
_THOUGHT_PARTS = frozenset(["thinking", "reasoning"])
_CALL_PARTS = frozenset(["tool_use", "tool_call"])
_MEDIA = {
    "image": "image",
    "image_url": "image",
    "input_image": "image",
    "image_file": "image",
    "audio": "audio",
    "audio_url": "audio",
    "input_audio": "audio",
    "video": "video",
    "video_url": "video",
    "input_video": "video",
    "file": "file",
    "input_file": "file",
    "document": "file",
}


@dataclass(slots=True)
class Content:
    """What the content of a message holds."""

    text: str | None = None
    """None where there is none at all, which only a call makes right."""
    thoughts: str | None = None
    calls: list[dict[str, Any]] = field(default_factory=list)
    results: list[dict[str, Any]] = field(default_factory=list)
    """Tool results inside a user's message, as messages of their own."""


def read_content(value: Any, role: str) -> Content:
    """The content of a message of a canonical role. Raises RowProblem."""
    if value is None or isinstance(value, str):
        return Content(value)
    if role == "tool" and (isinstance(value, dict) or (isinstance(value, list) and not _are_parts(value))):
        return Content(compact_json(value))  # a tool's result as it is
    if not isinstance(value, list):
        raise RowProblem("wrong_type", f"the content is {kind_in_words(value)}, not text. Write it as text.")
    return _read_parts(value)


def _are_parts(values: list[Any]) -> bool:
    """Whether a list is typed parts and not a result that happens to be a list."""
    known = _TEXT_PARTS | _THOUGHT_PARTS | _CALL_PARTS | _MEDIA.keys() | {"refusal", "tool_result"}
    return all(isinstance(value, dict) and isinstance(value.get("type"), str) and value["type"] in known for value in values)


def _read_parts(parts: list[Any]) -> Content:
    """Text parts are joined with nothing between them, as chat templates do."""
    content = Content()
    texts: list[str] = []
    thoughts: list[str] = []
    for part in parts:
        kind = _kind_of_part(part)
        if kind in _TEXT_PARTS:
            texts.append(_text_of(part, "text"))
        elif kind == "refusal":
            texts.append(_text_of(part, "refusal"))
        elif kind in _THOUGHT_PARTS:
            thoughts.append(_text_of(part, "thinking", "reasoning", "text"))
        elif kind in _CALL_PARTS:
            content.calls += read_calls(part)
        elif kind == "tool_result":
            content.results.append(_result(part))
        elif kind in _MEDIA:
            raise RowProblem(f"{_MEDIA[kind]}_part", f"holds a part of type {kind}; only text is learned. {_REMEDY}")
        else:
            found = word_in_words(kind or "none", LONGEST_WORD)
            raise RowProblem("unknown_part", f"holds a part of type {found}; known is text. {_REMEDY}")
    only_others = not texts and (content.calls or content.results)
    content.text = None if only_others else "".join(texts)
    content.thoughts = "".join(thoughts) or None
    return content


_REMEDY = "Remove the row, or set examples.on_bad_row=drop."


def _kind_of_part(part: Any) -> str:
    """The type of a part; text without a type is text, too."""
    if isinstance(part, str):
        return "text"
    if not isinstance(part, dict):
        raise RowProblem("unknown_part", f"holds a part that is {kind_in_words(part)}; a part is an object. {_REMEDY}")
    kind = part.get("type")
    if kind is None:
        return "text" if isinstance(part.get("text"), str) else next((key for key in _MEDIA if part.get(key) is not None), "")
    return kind if isinstance(kind, str) else kind_in_words(kind)


def _text_of(part: Any, *keys: str) -> str:
    """The text of a part under the first of some keys that it has; parts of text inside it count as text."""
    if isinstance(part, str):
        return part
    value = next((part[key] for key in keys if part.get(key) is not None), None)
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        value = "".join(_text_of(item, "text") for item in value)
    if not isinstance(value, str):
        found = kind_in_words(value)
        raise RowProblem("wrong_type", f"holds a part whose '{keys[0]}' is {found}, not text. Write it as text.")
    return value


def _result(part: dict[str, Any]) -> dict[str, Any]:
    """A tool's result inside a user's message, as a message."""
    message: dict[str, Any] = {"role": "tool", "content": read_content(part.get("content"), "tool").text or ""}
    call = part.get("tool_use_id")
    return message | {"tool_call_id": call} if isinstance(call, str) else message
