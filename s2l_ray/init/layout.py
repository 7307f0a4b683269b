"""Which field of a corpus is what, from its rows: by what stands in a field first, by its name second."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

ROLE_KEYS, CONTENT_KEYS = {"role", "from"}, {"content", "value", "tool_calls", "function_call"}
CONVERSATIONS = ("messages", "conversations", "conversation", "dialog", "dialogue", "chat", "turns")
PROMPTS = ("prompt", "instruction", "question", "query", "problem", "input")
CONTEXTS = ("input", "context")
"""What an instruction is about, where there are both."""
RESPONSES = ("response", "output", "answer", "completion", "solution", "target", "text")
SYSTEMS, HISTORIES = ("system", "system_prompt"), ("history",)
SOURCES, MAYBE_SOURCES = ("source", "dataset", "data_source"), ("subset", "task", "category", "domain", "topic", "type", "lang")
IDS = ("id", "uid", "uuid", "example_id", "row_id", "_id")
OPEN = "CHOOSE"
"""Marks what a user has to decide; as a field's name it is refused by the run, with the fields that there are."""
MOST_SOURCES = 200


@dataclass(frozen=True)
class ConfigLine:
    """A line of a config: a value and why it is that one."""

    key: str
    value: Any
    reason: str = ""
    is_open: bool = False
    """Whether the user has to look at it."""
    is_set: bool = True
    """Whether it stands in the file as a value, and not only as a remark."""


@dataclass(frozen=True)
class FoundLayout:
    """What the rows are, in a line for people, and the fields as a config has them."""

    text: str
    settings: list[ConfigLine] = field(default_factory=list)

    def config_values(self) -> dict[str, Any]:
        """The keys of `examples` that are known."""
        return {one.key: one.value for one in self.settings if one.is_set and one.value != OPEN}

    @property
    def is_known(self) -> bool:
        """Whether it is known what is learned from a row."""
        return all(one.value != OPEN for one in self.settings)


@dataclass
class SeenField:
    """What stands in one field of the rows that were looked at."""

    name: str
    kinds: Counter[str] = field(default_factory=Counter)
    characters: int = 0
    num_lists_as_text: int = 0
    """Texts that look like a list or an object."""

    @property
    def kind(self) -> str:
        """What stands there mostly, null aside."""
        known = Counter({kind: count for kind, count in self.kinds.items() if kind != "null"})
        return known.most_common(1)[0][0] if known else "null"

    @property
    def is_text(self) -> bool:
        return self.kind in {"text", "texts"}


def found_layout(records: Sequence[dict[str, Any]]) -> FoundLayout:
    """The layout of these rows."""
    seen: dict[str, SeenField] = {}
    for record in records:
        for name, value in record.items():
            one = seen.setdefault(name, SeenField(name))
            one.kinds[kind_of_value(value)] += 1
            one.characters += len(value) if isinstance(value, str) else 0
            one.num_lists_as_text += isinstance(value, str) and value.lstrip()[:1] in {"[", "{"}
    named = {name.lower(): one for name, one in reversed(seen.items())}
    return _preferences(named) or _prompt_and_completion(named) or _conversation(seen, named) or _pair(seen, named)


def kind_of_value(value: Any) -> str:
    """What a value is to a corpus: `messages`, `text`, `texts` (a list of them), `turns`, `null`, or `other`."""
    if value is None or value == []:
        return "null"
    if isinstance(value, str):
        return "messages" if _is_conversation(_parsed(value)) else "text"
    if _is_conversation(value):
        return "messages"
    if isinstance(value, list) and all(isinstance(inner, str) for inner in value):
        return "texts"
    if isinstance(value, list) and all(isinstance(inner, list) and len(inner) == 2 for inner in value):
        return "turns"
    return "other"


def _parsed(text: str) -> Any:
    """The JSON in a text that looks like it, else None."""
    if text.lstrip()[:1] not in {"[", "{"}:
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _is_conversation(value: Any) -> bool:
    """Whether a value is a list of messages, of pairs of input and output, or an object that holds one."""
    if isinstance(value, dict):
        return any(_is_conversation(value.get(key)) for key in CONVERSATIONS[:3])
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
        return False
    return all((item.keys() & ROLE_KEYS and item.keys() & CONTENT_KEYS) or {"input", "output"} <= item.keys() for item in value)


# --- the layouts ---------------------------------------------------------------------------------------------------


def _preferences(named: dict[str, SeenField]) -> FoundLayout | None:
    """Pairs of a chosen and a rejected answer: the chosen one can be learned."""
    if not {"chosen", "rejected"} <= named.keys():
        return None
    reason = f"preference pairs: the better answer is learned, `{named['rejected'].name}` is not read. Is that what you want?"
    chosen = named["chosen"].name
    if named["chosen"].kind == "messages" and ("prompt" not in named or named["prompt"].kind != "messages"):
        return FoundLayout(
            "preference pairs, each a conversation", [ConfigLine("messages_field", chosen, reason, is_open=True)]
        )
    prompt = next((named[name].name for name in PROMPTS if name in named), OPEN)
    settings = [ConfigLine("prompt_field", prompt), ConfigLine("response_field", chosen, reason, is_open=True)]
    return FoundLayout("preference pairs", settings)


def _prompt_and_completion(named: dict[str, SeenField]) -> FoundLayout | None:
    """TRL's `prompt` and `completion` (or `response`) as lists of messages."""
    prompt = named.get("prompt") or named.get("input")
    answer = next((named[name] for name in ("completion", "response", "output") if name in named), None)
    if prompt is None or answer is None or "messages" not in {answer.kind, prompt.kind}:
        return None
    settings = [
        ConfigLine("prompt_field", prompt.name, "its messages are context"),
        ConfigLine("response_field", answer.name, "its messages of the assistant are learned"),
    ]
    return FoundLayout(f"messages in two fields, `{prompt.name}` and `{answer.name}`", settings)


def _conversation(seen: dict[str, SeenField], named: dict[str, SeenField]) -> FoundLayout | None:
    """A field with messages."""
    # A text that only looks like messages is meant as such by its name; whether it can be read is asked later.
    looks_so = {
        name for name in CONVERSATIONS if name in named and 2 * named[name].num_lists_as_text > named[name].kinds["text"]
    }
    candidates = [one.name for one in seen.values() if one.kind == "messages" or one.name.lower() in looks_so]
    if not candidates:
        return None
    usual = [named[name].name for name in CONVERSATIONS if name in named and named[name].name in candidates]
    if len(candidates) > 1 and not usual:
        reason = f"several fields hold conversations: {', '.join(candidates)}"
        return FoundLayout("conversations", [ConfigLine("messages_field", OPEN, reason, is_open=True)])
    chosen = (usual or candidates)[0]
    others = [name for name in candidates if name != chosen]
    reason = "the assistant's messages are learned, but for those marked otherwise"
    settings = [ConfigLine("messages_field", chosen, reason)]
    if others:
        settings.append(ConfigLine("messages_field", chosen, f"conversations also stand in {', '.join(others)}", True, False))
    return FoundLayout(f"conversations in `{chosen}`", settings + _companions(named))


def _pair(seen: dict[str, SeenField], named: dict[str, SeenField]) -> FoundLayout:
    """A prompt and a response, by their usual names."""
    prompts = [named[name] for name in PROMPTS if name in named and named[name].is_text]
    responses = [named[name] for name in RESPONSES if name in named and named[name].is_text]
    context = _context(prompts, named)
    prompts = [one for one in prompts if one is not context]
    texts = [one.name for one in seen.values() if one.is_text]
    settings = [*_prompt_settings(prompts, context, texts), _response_setting(responses, texts)]
    if any(one.value == OPEN for one in settings):
        return FoundLayout("not clear which field is the prompt and which the response", settings + _companions(named))
    parts = [one.name for one in (prompts[0], context) if one is not None]
    text = f"pairs: the prompt is {' and '.join(f'`{part}`' for part in parts)}, the response `{settings[-1].value}`"
    return FoundLayout(text, settings + _companions(named))


def _context(prompts: list[SeenField], named: dict[str, SeenField]) -> SeenField | None:
    """The field that an instruction or a question is about, if there are both."""
    if not any(one.name.lower() in {"instruction", "question", "query", "problem"} for one in prompts):
        return None
    found = (named[name] for name in CONTEXTS if name in named)
    return next((one for one in found if one.kind in {"text", "null"}), None)


def _prompt_settings(prompts: list[SeenField], context: SeenField | None, texts: list[str]) -> list[ConfigLine]:
    if len(prompts) != 1:
        which = "several fields could be the prompt" if prompts else "no field has a prompt's usual name"
        return [ConfigLine("prompt_field", OPEN, f"{which}. Fields of text: {', '.join(texts)}", is_open=True)]
    prompt = prompts[0].name
    if context is None:
        return [ConfigLine("prompt_field", prompt)]
    if not all(name.replace("-", "_").isidentifier() for name in (prompt, context.name)):
        reason = f"`{prompt}` or `{context.name}` cannot stand in a prompt_template. Rename the columns"
        return [ConfigLine("prompt_field", OPEN, reason, is_open=True)]
    return [
        ConfigLine("prompt_template", f"{{{prompt}}}\n\n{{{context.name}}}\n\n", "the wording between them is yours"),
        ConfigLine("prompt_template_if_empty", f"{{{prompt}}}\n\n", f"for rows whose `{context.name}` is empty"),
    ]


def _response_setting(responses: list[SeenField], texts: list[str]) -> ConfigLine:
    if len(responses) > 1:  # Alpaca's `text` is prompt and response together
        responses = [one for one in responses if one.name.lower() != "text"]
    longest = max(responses, key=lambda one: one.characters, default=None)
    if longest is None or (len(responses) > 1 and longest is not responses[0]):
        which = "several fields could be the response" if responses else "no field has a response's usual name"
        return ConfigLine("response_field", OPEN, f"{which}. Fields of text: {', '.join(texts)}", is_open=True)
    if len(responses) > 1:
        others = ", ".join(one.name for one in responses[1:])
        return ConfigLine(
            "response_field", longest.name, f"it is longer than {others}, which could be meant, too", is_open=True
        )
    kind = "; of a list the first one is learned" if longest.kind == "texts" else ""
    return ConfigLine("response_field", longest.name, f"learned{kind}")


def _companions(named: dict[str, SeenField]) -> list[ConfigLine]:
    """Fields that go before a prompt or a conversation."""
    settings = []
    for key, names, kinds in (("system_field", SYSTEMS, {"text"}), ("history_field", HISTORIES, {"turns"})):
        found = next((named[name] for name in names if name in named and named[name].kind in kinds), None)
        if found is not None:
            settings.append(ConfigLine(key, found.name, "goes before what is learned"))
    return settings


# --- source, id, split ---------------------------------------------------------------------------------------------


def source_setting(columns: dict[str, list[Any]]) -> list[ConfigLine]:
    """The field that names the sub-dataset, from whole columns by name; a remark where that is not sure."""
    names = {name.lower(): name for name in reversed(columns)}
    for usual in filter(names.__contains__, SOURCES):
        values = columns[names[usual]]
        if values and all(isinstance(value, str) and value for value in values):
            distinct = len(set(values))
            if distinct <= min(MOST_SOURCES, max(2, len(values) // 5)):
                return [ConfigLine("source_field", names[usual], f"{distinct:,} source{'s' if distinct > 1 else ''}")]
    maybe = [names[name] for name in (*SOURCES, *MAYBE_SOURCES) if name in names]
    remarks = [(name, len(set(map(repr, columns[name])))) for name in maybe]
    remarks = [(name, count) for name, count in remarks if 1 < count <= min(MOST_SOURCES, len(columns[name]) // 5)]
    return [
        ConfigLine("source_field", name, f"if `{name}` ({count} values) names the sub-datasets", True, False)
        for name, count in remarks[:1]
    ]


def id_setting(columns: dict[str, list[Any]], is_all: bool) -> list[ConfigLine]:
    """The field with a unique id, from whole columns by name."""
    for usual in IDS:
        for name in (name for name in columns if name.lower() == usual):
            values = columns[name]
            if not all(isinstance(value, str | int) and not isinstance(value, bool) and value != "" for value in values):
                continue
            if len(set(map(str, values))) == len(values):
                return [ConfigLine("id_field", name, "unique in every row" if is_all else "unique in the rows that were read")]
            return [ConfigLine("id_field", name, f"`{name}` is not unique: ids are made from the content", is_set=False)]
    return []


def split_setting(columns: dict[str, list[Any]]) -> list[ConfigLine]:
    """Rows of a test set in the corpus stay out."""
    name = next((name for name in columns if name.lower() == "split"), None)
    if name is None:
        return []
    counts = Counter(value for value in columns[name] if isinstance(value, str))
    if not 2 <= len(counts) <= 10:
        return []
    train = next((value for value in counts if value.lower() in {"train", "training"}), None)
    if train is None:
        return [ConfigLine("where", {name: OPEN}, f"`{name}` is one of {', '.join(sorted(counts))}: keep which?", True, False)]
    others = sum(counts.values()) - counts[train]
    return [
        ConfigLine("where", {name: train}, f"{others:,} rows of other splits stay out. Is that what you want?", is_open=True)
    ]


def all_fields(records: Iterable[dict[str, Any]]) -> list[str]:
    """The names of the fields in some rows, in their order."""
    return list(dict.fromkeys(name for record in records for name in record))
