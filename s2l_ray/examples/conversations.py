"""A conversation in any of its usual forms, as canonical messages.

    messages     [{"role", "content"}], ShareGPT's [{"from", "value"}], both mixed, pairs of turns [{"input", "output"}]
    around them  {"messages": [...], "tools": [...]}, or the JSON text of any of these

A canonical message has `role` (system, user, assistant, tool) and `content` (text, or null beside calls), and where it has them
`reasoning_content`, `tool_calls` (see `tool_calls`), `name`, `tool_call_id`, and `weight: 0` on an answer that is not learned.
Every answer is learned that is not marked otherwise. Null counts as absent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from s2l_ray.examples.message_content import LONGEST_WORD, read_content
from s2l_ray.examples.row_problems import RowProblem, compact_json, from_json_text, kind_in_words, names_in_words, word_in_words
from s2l_ray.examples.tool_calls import read_calls, read_tools

ANSWER, CALL = "assistant", "function_call"
ROLES = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter"),
    ANSWER: (ANSWER, "gpt", "chatgpt", "model", "bot", "ai", "bing", "bard", "claude"),
    "tool": ("tool", "observation", "function", "function_response", "function_result", "ipython", "tool_response",
             "tool_result"),
    CALL: (CALL, "tool_call"),
}  # fmt: skip
"""Canonical role -> its names in corpora, in any case. A CALL is an answer whose content is the JSON text of calls."""

_ROLE_KEYS, _CONTENT_KEYS = ("role", "from"), ("content", "value", "text")
_LISTS = ("messages", "conversations", "conversation")
_MARKS = ("weight", "train", "training", "loss_mask", "loss", "loss_scale", "output_with_loss", "masked")
_DETAILS = ("train_detail", "training_detail")
_REASONING = ("reasoning_content", "reasoning", "thinking")
_REMEDY = "Fix the row, or set examples.on_bad_row=drop."


@dataclass(frozen=True)
class Tags:
    """Names that a corpus uses besides the usual ones, as in LLaMA-Factory's `tags`; None where it uses those."""

    role: str | None = None
    content: str | None = None
    user: str | None = None
    assistant: str | None = None
    observation: str | None = None
    function: str | None = None
    system: str | None = None


@dataclass(frozen=True, slots=True)
class LearnedText:
    """What is learned from a row. A conversation is learned from its messages; prompt and response only show it to people and
    decide its split."""

    prompt: str
    response: str
    messages: str | None = None
    """JSON text of canonical messages."""
    tools: str | None = None
    """JSON text of the tools of a conversation that has some."""


class Dialect:
    """The names by which messages are read. Made once for many rows."""

    def __init__(self, tags: Tags | None = None) -> None:
        tags = tags or Tags()
        self.role_keys = (*([tags.role] if tags.role else []), *_ROLE_KEYS)
        self.content_keys = (*([tags.content] if tags.content else []), *_CONTENT_KEYS)
        self.pairs = tuple(zip(self.role_keys, self.content_keys, strict=False))
        own = {"user": tags.user, ANSWER: tags.assistant, "tool": tags.observation, CALL: tags.function, "system": tags.system}
        self._roles = {name: role for role, names in ROLES.items() for name in names}
        self._roles |= {name.casefold(): role for role, name in own.items() if name}

    def role(self, name: Any) -> str:
        """The canonical role of a name. Raises RowProblem for one that is not known."""
        known = self._roles.get(name) if isinstance(name, str) else None
        if known is None and isinstance(name, str):
            known = self._roles.get(name.strip().casefold()) or self._roles.get(name.strip().casefold().replace("-", "_"))
        if known is None:
            found = word_in_words(name, LONGEST_WORD) if isinstance(name, str) else kind_in_words(name)
            raise RowProblem("unknown_role", f"the role is {found}; known are {', '.join(self._roles)}. {_REMEDY}")
        return known

    def is_call(self, item: dict[str, Any]) -> bool:
        """Whether a message that was read has the role whose content is calls."""
        name = next((item[key] for key in self.role_keys if item.get(key) is not None), None)
        return name is not None and self.role(name) == CALL

    def plain(self, item: Any) -> dict[str, Any] | None:
        """A message of a role and a text and nothing else, which most are; None for anything else."""
        if type(item) is dict and len(item) == 2:
            for role_key, content_key in self.pairs:
                name, content = item.get(role_key), item.get(content_key)
                if type(content) is str and type(name) is str:
                    role = self._roles.get(name)
                    return None if role is None or role == CALL else {"role": role, "content": content}
        return None


# --- a conversation ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Conversation:
    """Canonical messages and tools, not yet asked whether anything is learned from them."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]


def read_conversation(value: Any, dialect: Dialect, loss_mask: Any = None) -> Conversation:
    """The conversation in a value. `loss_mask` has one 0 or 1 for each message. Raises RowProblem."""
    if isinstance(value, str):
        value = _listed(value)
    tools, system = None, None
    if isinstance(value, dict):
        tools = value.get("tools") or value.get("functions")
        system, loss_mask = value.get("system"), value.get("loss_mask") if loss_mask is None else loss_mask
        value = next((value[key] for key in _LISTS if value.get(key) is not None), value)
        value = _listed(value) if isinstance(value, str) else value
    if value is not None and not isinstance(value, list):
        raise RowProblem("wrong_type", f"is {kind_in_words(value)}, not a list of messages. {_FIELD_REMEDY}")
    messages = read_messages(value or [], dialect, loss_mask)
    return Conversation(with_system(messages, system), read_tools(tools or _tools_of_system(value)))


_FIELD_REMEDY = "Set examples.messages_field to the field with the conversation."


def _listed(text: str) -> Any:
    """The value of a conversation that is JSON text."""
    if not text.removeprefix("\ufeff").lstrip().startswith(("[", "{")):
        raise RowProblem("wrong_type", f"is {kind_in_words(text)}, not a list of messages. {_FIELD_REMEDY}")
    try:
        value = from_json_text(text)
    except RowProblem as problem:
        raise RowProblem(problem.reason, f"is text, not a list of messages: it {problem.message}") from None
    if not isinstance(value, list | dict):
        raise RowProblem("wrong_type", f"is JSON text of {kind_in_words(value)}, not of messages. {_FIELD_REMEDY}")
    return value


def _tools_of_system(items: list[Any] | None) -> Any:
    """The tools that the first message brings along, as GLM's and Phi's corpora have them beside its content."""
    return items[0].get("tools") if items and isinstance(items[0], dict) else None


def with_system(messages: list[dict[str, Any]], system: Any) -> list[dict[str, Any]]:
    """The messages after a system message of this text, where there is one and they have none of their own."""
    if system is None or system == "" or (messages and messages[0]["role"] == "system"):
        return messages
    if not isinstance(system, str):
        raise RowProblem("wrong_type", f"the system message is {kind_in_words(system)}, not text. Write it as text.")
    return [{"role": "system", "content": system}, *messages]


def learned_text(messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> LearnedText:
    """What is learned from a conversation: all before the first learned answer that has something before it, and the learned
    answers.

    Raises RowProblem where that is nothing.
    """
    learned = [at for at, message in enumerate(messages) if message["role"] == ANSWER and "weight" not in message]
    if not learned:
        raise _nothing_learned(messages)
    prompt = next(filter(str.strip, (_prompt(messages, at) for at in learned)), "")  # some begin with a greeting
    response = "\n".join([_shown(messages[at]) for at in learned])
    if not prompt:
        raise RowProblem("empty_prompt", f"no text before the first answer. {_REMEDY}")
    if not response.strip():
        raise RowProblem("empty_response", f"the answers are empty. {_REMEDY}")
    return LearnedText(prompt, response, compact_json(messages), compact_json(tools) if tools else None)


def _prompt(messages: list[dict[str, Any]], at: int) -> str:
    """What stands before a message."""
    return "\n".join([_shown(message) for message in messages[:at]])


def _nothing_learned(messages: list[dict[str, Any]]) -> RowProblem:
    roles = list(dict.fromkeys(message["role"] for message in messages))
    if ANSWER in roles:
        return RowProblem("nothing_learned", f"no answer is learned: all are marked so, or context. {_REMEDY}")
    found = f"messages of {', '.join(roles)} only" if roles else "no messages"
    return RowProblem("no_assistant_message", f"found {found}; learned is what the assistant says. {_REMEDY}")


def _shown(message: dict[str, Any]) -> str:
    """A message as people see it: its reasoning, text and calls."""
    content: str | None = message["content"]
    if len(message) == 2 and content is not None:
        return content
    parts = [message.get("reasoning_content"), content, *(compact_json(c["function"]) for c in message.get("tool_calls", ()))]
    return "\n".join(part for part in parts if part)


# --- messages ----------------------------------------------------------------------------------------------------


def read_messages(items: Sequence[Any], dialect: Dialect, loss_mask: Any = None) -> list[dict[str, Any]]:
    """Items of a list as canonical messages. Raises RowProblem naming the message by its number."""
    is_learned = None if loss_mask is None else _read_mask(loss_mask, len(items))
    messages: list[dict[str, Any]] = []
    for number, item in enumerate(items):
        message = dialect.plain(item)
        if message is not None:
            found = [message]
        else:
            try:
                found = _read_item(item, dialect)
            except RowProblem as problem:
                raise problem.at(f"message {number + 1:,}: ") from None
        found = found if is_learned is None or is_learned[number] else unlearned(found)
        if message is None and number and dialect.is_call(item) and dialect.is_call(items[number - 1]):
            messages[-1] = _called_together(messages[-1], found[0])
        else:
            messages += found
    return messages


def _called_together(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """One answer of two calls that follow each other, which ShareGPT's roles have as two messages."""
    return one | other | {"content": one["content"], "tool_calls": one["tool_calls"] + other["tool_calls"]}


def unlearned(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages as context alone."""
    return [message | {"weight": 0} if message["role"] == ANSWER else message for message in messages]


def _read_mask(loss_mask: Any, num_messages: int) -> list[bool]:
    """Whether each message is learned, by a row's `loss_mask`."""
    loss_mask = from_json_text(loss_mask) if isinstance(loss_mask, str) else loss_mask
    if not isinstance(loss_mask, list) or len(loss_mask) != num_messages:
        found = f"{len(loss_mask):,} values" if isinstance(loss_mask, list) else kind_in_words(loss_mask)
        needed = f"loss_mask has one 0 or 1 for each of the {num_messages:,} messages, found {found}"
        raise RowProblem("bad_mark", f"{needed}. Fix or rename it.")
    return [_is_one(value, "a value of loss_mask") for value in loss_mask]


def _read_item(item: Any, dialect: Dialect) -> list[dict[str, Any]]:
    """The messages of one item of the list: one, but for pairs of turns and for results inside a message."""
    if not isinstance(item, dict):
        raise RowProblem("not_a_message", f"a message is an object, found {kind_in_words(item)}. {_REMEDY}")
    present = {key: value for key, value in item.items() if value is not None}
    plain = dialect.plain(present)
    if plain is not None:
        return [plain]
    name = next((present[key] for key in dialect.role_keys if key in present), None)
    if name is None:
        return _read_pair(present)
    role = dialect.role(name)
    content = next((present[key] for key in dialect.content_keys if key in present), None)
    if role == CALL:
        return [_marked(_call_message(content), present)]
    return _message(role, content, present)


def _message(role: str, value: Any, present: dict[str, Any]) -> list[dict[str, Any]]:
    """A message of a role, after the tool results that its content holds."""
    content = read_content(value, role)
    message: dict[str, Any] = {"role": role, "content": content.text}
    if role == ANSWER:
        if content.text is None and isinstance(present.get("refusal"), str):
            message["content"] = present["refusal"]
        _add_reasoning(message, content.thoughts, present)
        calls = content.calls + read_calls(present.get("tool_calls")) + read_calls(present.get("function_call"))
        if calls:
            message["tool_calls"] = calls
        _marked(message, present)
    if message["content"] is None and content.results:
        return content.results
    if message["content"] is None and role == "tool":
        message["content"] = ""  # a tool that gives nothing back
    if message["content"] is None and "tool_calls" not in message:
        found = f"the keys are {names_in_words(present)}"
        raise RowProblem("no_content", f"has no content, which is right only beside tool_calls ({found}). {_REMEDY}")
    for key in ("name", "tool_call_id"):
        if key in present:
            message[key] = _label(present[key], key)
    return [*content.results, message]


def _add_reasoning(message: dict[str, Any], thoughts: str | None, present: dict[str, Any]) -> None:
    """Puts what the assistant thinks into its message; true and false under these keys are switches and no thoughts."""
    given = next((present[key] for key in _REASONING if key in present and not isinstance(present[key], bool)), thoughts)
    if given is None or given == "":
        return
    if not isinstance(given, str):
        raise RowProblem("wrong_type", f"its reasoning is {kind_in_words(given)}, not text. Write it as text.")
    message["reasoning_content"] = given


def _label(value: Any, key: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise RowProblem("wrong_type", f"its '{key}' is {kind_in_words(value)}, not text. Write it as text.")
    return str(value)


def _call_message(content: Any) -> dict[str, Any]:
    """The answer that a message of ShareGPT's role for calls stands for; thoughts before the call stay its content."""
    thoughts = None
    if isinstance(content, str) and content.lstrip().startswith("<think>") and "</think>" in content:
        before, end, content = content.partition("</think>")
        thoughts = f"{before}{end}"
    try:
        calls = read_calls(content)
    except RowProblem as problem:
        raise problem.at("its content, of calls, ") if problem.reason == "bad_json_text" else problem from None
    if not calls:
        raise RowProblem("bad_tool_call", f"calls nothing: its content is {kind_in_words(content)}. {_REMEDY}")
    return {"role": ANSWER, "content": thoughts, "tool_calls": calls}


# --- what is learned ---------------------------------------------------------------------------------------------


def _marked(message: dict[str, Any], present: dict[str, Any]) -> dict[str, Any]:
    """The answer with `weight: 0` where one of its marks says that it is not learned."""
    for key in _DETAILS:
        if present.get(key):
            raise RowProblem("bad_mark", f"'{key}' learns parts of a message, which is not supported. Use `train` alone.")
    marks = [_is_one(present[key], f"'{key}'") != (key == "masked") for key in _MARKS if key in present]
    if not all(marks):
        message["weight"] = 0
    return message


def _is_one(value: Any, what: str) -> bool:
    """The truth of 0, 1, true and false."""
    if not isinstance(value, bool | int | float) or value not in (0, 1):
        found = "another number" if isinstance(value, int | float) else kind_in_words(value)
        raise RowProblem("bad_mark", f"{what} is {found}; it says with 0 or 1 whether a message is learned. Fix or rename it.")
    return bool(value)


def _read_pair(present: dict[str, Any]) -> list[dict[str, Any]]:
    """A pair of turns, `input` and `output` with perhaps a `system`, as messages (xtuner's form)."""
    if "output" not in present:
        found, known = names_in_words(present), f"{', '.join(_ROLE_KEYS)}; {', '.join(_CONTENT_KEYS)}"
        problem = f"a message has a role and a content, found the keys {found}; known are {known}"
        raise RowProblem("not_a_message", f"{problem}. {_REMEDY}")
    messages = []
    for key, role in (("system", "system"), ("input", "user"), ("output", ANSWER)):
        value = present.get(key)
        if value is None or (value == "" and role != ANSWER):
            continue
        messages += _message(role, value, present if role == ANSWER else {})
    return messages
