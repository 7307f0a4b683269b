"""For OpenAI's fine-tuning, and whoever reads its JSON Lines: `messages` with `weight` 0 or 1, `tools`, arguments as text."""

from __future__ import annotations

import json
from typing import Any

from s2l_ray.selection.turns import (
    Contents,
    InexpressibleError,
    Message,
    Notes,
    SubsetExample,
    as_conversation,
    is_learned,
    until_last_answer,
)

_ROLES = ("system", "developer", "user", "assistant", "tool")


def openai_rows(example: SubsetExample, _shape: Contents, notes: Notes) -> list[dict[str, Any]]:
    """An example as OpenAI's row. Raises InexpressibleError for reasoning, other roles, and results without a call."""
    messages = until_last_answer(as_conversation(example, notes), notes)
    waiting: list[str] = []
    num_made = 0
    written = []
    for message in messages:
        if message["role"] not in _ROLES:
            raise InexpressibleError(f"a role other than {', '.join(_ROLES)}")
        if message.get("reasoning_content"):
            raise InexpressibleError("reasoning beside an answer")
        if message.get("tool_calls"):
            ids = [call.get("id") or f"call_{num_made + number}" for number, call in enumerate(message["tool_calls"])]
            num_made += sum(not call.get("id") for call in message["tool_calls"])
            waiting = list(ids)
            written.append(_with_calls(message, ids))
        elif message["role"] == "tool":
            if not waiting:
                raise InexpressibleError("a tool's result without a call")
            answered = message.get("tool_call_id")
            position = waiting.index(answered) if answered in waiting else 0
            written.append({"role": "tool", "tool_call_id": answered or waiting[position], "content": message["content"]})
            waiting.pop(position)
        else:
            written.append(_plain(message))
    if num_made:
        notes["tool calls without an id got one, which OpenAI's form needs"] += 1
    return [{"messages": written} | ({"tools": example.tools} if example.tools else {})]


def _with_calls(message: Message, ids: list[str]) -> Message:
    calls = []
    for one_id, call in zip(ids, message["tool_calls"], strict=True):
        arguments = call["function"].get("arguments", {})
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        calls.append({"id": one_id, "type": "function", "function": {"name": call["function"]["name"], "arguments": text}})
    return _plain(message) | {"tool_calls": calls}


def _plain(message: Message) -> Message:
    kept = {key: message[key] for key in ("role", "content", "name") if key in message}
    return kept | ({"weight": int(is_learned(message))} if message["role"] == "assistant" else {})
