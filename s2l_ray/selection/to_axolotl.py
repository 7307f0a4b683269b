"""For Axolotl: `messages` that each say whether they are trained on, or pairs in a format of the user's own.

Messages with more than role and content are JSON text, which Axolotl reads as well: `datasets` would infer a type from the
first rows, and give every object the keys of all others.
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
    Notes,
    SubsetExample,
    as_conversation,
    is_learned,
    without_weight,
)


def axolotl_rows(example: SubsetExample, contents: Contents, notes: Notes) -> list[dict[str, Any]]:
    """An example as Axolotl's row. Raises InexpressibleError for arguments of a tool call that are no object."""
    if not contents.has_conversations:
        return [{"prompt": example.prompt, "response": example.response}]
    messages = as_conversation(example, notes)
    calls = [call for message in messages for call in message.get("tool_calls") or ()]
    if not all(isinstance(call["function"].get("arguments", {}), dict) for call in calls):
        raise InexpressibleError("a tool call whose arguments are no JSON object")
    marked = [plain | {"train": is_learned(message)} for plain, message in zip(without_weight(messages), messages, strict=True)]
    if contents.is_plain:
        return [{"messages": marked}]
    tools = None if example.tools is None else json.dumps(example.tools, ensure_ascii=False)
    return [{"messages": json.dumps(marked, ensure_ascii=False), "tools": tools}]


def axolotl_companions(contents: Contents, place: DataPlace) -> dict[str, str]:
    """The `datasets:` block of Axolotl's config."""
    here = {"path": f"{place.folder}/{place.name}", "ds_type": "json"}
    dataset: dict[str, Any] = {"path": place.folder, "split": "train"} if place.is_on_hub else here
    config: dict[str, Any] = {"datasets": [dataset]}
    if contents.has_conversations:
        dataset |= {
            "type": "chat_template",
            "field_messages": "messages",
            "message_property_mappings": {key: key for key in ("role", "content", "reasoning_content")},
            "message_field_training": "train",
            "roles_to_train": ["assistant"],
            "train_on_eos": "turn",
        }
        config["chat_template"] = "tokenizer_default"
    else:  # the texts as they are, without a template
        form = {"format": "{instruction}", "no_input_format": "{instruction}"}
        dataset["type"] = {"field_instruction": "prompt", "field_output": "response"} | form
    note = f"# {MARK}: for Axolotl's config. The path is from where Axolotl runs.\n"
    return {"axolotl.yaml": note + yaml.safe_dump(config, sort_keys=False, allow_unicode=True)}
