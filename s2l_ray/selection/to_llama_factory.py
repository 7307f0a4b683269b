"""For LLaMA-Factory: its ShareGPT form for conversations, its Alpaca form for pairs.

Turns must alternate: a user or tools' results, then an answer or calls of tools. LLaMA-Factory learns all answers, or with
`mask_history` the last one only; so where some message is context, every learned turn becomes a conversation that ends with it.
"""

from __future__ import annotations

import json
from typing import Any

import yaml

from s2l_ray.selection.card import MARK
from s2l_ray.selection.turns import (
    Contents,
    DataPlace,
    InexpressibleError,
    Message,
    Notes,
    SubsetExample,
    as_conversation,
    unrolled,
    until_last_answer,
)

NAME = "s2l_subset"
"""Of the dataset in `dataset_info.json`."""

# As LLaMA-Factory itself joins several results and puts reasoning before an answer.
_BETWEEN_RESULTS = "\n</tool_response>\n<tool_response>\n"
_THOUGHT = "<think>\n{}\n</think>\n\n"
_TAGS = {"user": "human", "assistant": "gpt", "tool": "observation"}
_ASKING, _ANSWERING = ("human", "observation"), ("gpt", "function_call")


def llama_factory_rows(example: SubsetExample, contents: Contents, notes: Notes) -> list[dict[str, Any]]:
    """An example as LLaMA-Factory's rows. Raises InexpressibleError where its turns do not have the form above."""
    if not contents.has_conversations:
        return [{"prompt": example.prompt, "response": example.response}]
    messages = until_last_answer(as_conversation(example, notes), notes)
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    tools = "" if not example.tools else json.dumps(example.tools, ensure_ascii=False)
    talks = [messages[1:] if messages[0]["role"] == "system" else messages]
    if contents.has_context_turns:
        talks = [before + learned for before, learned in unrolled(talks[0])]
        if len(talks) > 1:
            notes["conversations became a row for each learned turn, since LLaMA-Factory cannot leave out single turns"] += 1
    return [{"conversations": _turns(talk, notes), "system": system, "tools": tools} for talk in talks]


def _turns(messages: list[Message], notes: Notes) -> list[dict[str, str]]:
    turns: list[dict[str, str]] = []
    for message in messages:
        turn = _turn(message)
        if turns and turn["from"] == turns[-1]["from"] == "observation":
            turns[-1]["value"] += _BETWEEN_RESULTS + turn["value"]
        else:
            turns.append(turn)
    for number, turn in enumerate(turns):
        if turn["from"] not in (_ANSWERING if number % 2 else _ASKING):
            raise InexpressibleError("turns that do not alternate between user or tool and assistant")
    if any(message.get("reasoning_content") for message in messages):
        notes["reasoning stands in <think> before the answer"] += 1
    if any(message.keys() & {"name", "tool_call_id"} for message in messages):
        notes["names and ids of messages have no place in LLaMA-Factory's form"] += 1
    return turns


def _turn(message: Message) -> dict[str, str]:
    role, content = message["role"], message.get("content") or ""
    if role not in _TAGS:
        raise InexpressibleError("a role other than user, assistant and tool, or a system message that is not the first")
    thought = _THOUGHT.format(message["reasoning_content"]) if message.get("reasoning_content") else ""
    if not message.get("tool_calls"):
        return {"from": _TAGS[role], "value": thought + content}
    if content:
        raise InexpressibleError("text beside tool calls")
    calls = [{key: call["function"].get(key, {}) for key in ("name", "arguments")} for call in message["tool_calls"]]
    return {"from": "function_call", "value": thought + json.dumps(calls, ensure_ascii=False)}


def llama_factory_companions(contents: Contents, place: DataPlace) -> dict[str, str]:
    """The entry of `dataset_info.json`, and what its training must set."""
    if contents.has_conversations:
        entry: dict[str, Any] = {
            "formatting": "sharegpt",
            "columns": {"messages": "conversations", "system": "system", "tools": "tools"},
        }
    else:
        entry = {"formatting": "alpaca", "columns": {"prompt": "prompt", "response": "response"}}
    source = {"hf_hub_url": place.folder} if place.is_on_hub else {"file_name": place.name}
    info = {NAME: {"comment": MARK} | source | entry}
    where = "." if place.is_on_hub else place.folder
    settings = {"stage": "sft", "dataset_dir": where, "dataset": NAME, "mask_history": contents.has_context_turns}
    note = f"# {MARK}: for LLaMA-Factory's config, to which the template of your model belongs. With mask_history only\n"
    note += "# the last answer of a row is learned; the rows are made for it.\n"
    return {
        "dataset_info.json": json.dumps(info, indent=2) + "\n",
        "llama-factory.yaml": note + yaml.safe_dump(settings, sort_keys=False),
    }
