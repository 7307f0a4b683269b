"""For TRL's SFTTrainer: `messages` and `tools`, or `prompt` and `completion`.

TRL learns every message of the assistant or, of prompt and completion, the completion. So where some message is context, every
run of learned messages becomes a row of its own, with all that is before it as the prompt: the same labels, by TRL's own means.
The card beside the data declares messages as JSON, or `datasets` would give every object the keys of all others.
"""

from __future__ import annotations

from typing import Any

import yaml

from s2l_ray.selection.card import MARK, front_matter
from s2l_ray.selection.turns import (
    Contents,
    DataPlace,
    InexpressibleError,
    Notes,
    SubsetExample,
    as_conversation,
    unrolled,
    without_weight,
)
from s2l_ray.storage.layout import CARD


def trl_rows(example: SubsetExample, contents: Contents, notes: Notes) -> list[dict[str, Any]]:
    """An example as TRL's rows. Raises InexpressibleError where it begins with a learned message and needs a prompt."""
    if not contents.has_conversations:
        return [{"prompt": example.prompt, "completion": example.response}]
    tools: dict[str, Any] = {} if contents.is_plain else {"tools": example.tools}
    messages = as_conversation(example, notes)
    if _is_messages(contents):
        return [{"messages": without_weight(messages)} | tools]
    rows = []
    for before, learned in unrolled(messages):
        if not before:
            raise InexpressibleError("a completion without a prompt")
        rows.append({"prompt": without_weight(before), "completion": without_weight(learned)} | tools)
    if len(rows) > 1:
        notes["conversations became a row for each learned turn, since TRL cannot leave out single turns"] += 1
    return rows


def trl_features(contents: Contents) -> list[dict[str, Any]] | None:
    """The columns' types as a card has them; None where any reader infers the right ones."""
    columns = ["messages"] if _is_messages(contents) else ["prompt", "completion"]
    return None if contents.is_plain else [{"name": column, "list": "json"} for column in [*columns, "tools"]]


def trl_companions(contents: Contents, place: DataPlace) -> dict[str, str]:
    """The card, which tells `datasets` how to read the rows, and the config for `trl sft`."""
    learned = "assistant_only_loss" if _is_messages(contents) else "completion_only_loss"
    marks = "# The chat template needs {% generation %} marks for it; TRL brings such templates for the usual models.\n"
    config = f"""# {MARK}: trl sft --config trl.yaml --model_name_or_path MODEL --output_dir OUTPUT
{marks if _is_messages(contents) else ""}\
{yaml.safe_dump({"dataset_name": place.folder, learned: True}, sort_keys=False)}"""
    head = front_matter({"default": place.name}, trl_features(contents), contents={place.name: place.contents})
    card = f"{head}\n# A subset chosen by s2l_ray, for TRL\n"
    return {CARD: card, "trl.yaml": config}


def _is_messages(contents: Contents) -> bool:
    return contents.has_conversations and not contents.has_context_turns
