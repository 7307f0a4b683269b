"""Which fields of a row are what, and a row's text by them.

    prompt, response       text by field or template; Alpaca's instruction with its input; an answer that is a list: its first
    prompt, completion     lists of messages as TRL has them: the prompt's are context, the completion's answers are learned
    messages               a conversation (see `conversations`)

A system message, earlier turns (`history`) or tools make a pair a conversation, too.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from s2l_ray.config import ExamplesConfig, template_fields
from s2l_ray.examples.conversations import (
    Dialect,
    LearnedText,
    Tags,
    learned_text,
    read_conversation,
    read_messages,
    unlearned,
    with_system,
)
from s2l_ray.examples.row_problems import (
    RowProblem,
    from_json_text,
    kind_in_words,
    names_in_words,
    require_unicode,
    without_nulls,
)
from s2l_ray.examples.rows import MISSING
from s2l_ray.examples.tool_calls import read_tools

# What other corpora call these fields, the most common name first.
USUAL_NAMES = {
    "prompt_field": ("prompt", "instruction", "question", "query", "problem", "input"),
    "response_field": ("response", "output", "answer", "completion", "solution", "target", "text"),
    "messages_field": ("messages", "conversations", "conversation"),
    "source_field": ("source", "dataset"),
    "id_field": ("id", "uid"),
}
# What happens without these keys.
IF_LEFT_OUT = {"id_field": "ids are then made from the content", "source_field": "the source is then the file's name"}
TOOLS_FIELDS, LOSS_MASK = ("tools", "functions"), "loss_mask"
"""Fields of a conversation's row that are read without being named in the config."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Layout:
    """Which fields of a row are what. The fields of `ExamplesConfig` that say so, and what only LLaMA-Factory can say."""

    prompt_field: str = "prompt"
    response_field: str = "response"
    prompt_template: str | None = None
    prompt_template_if_empty: str | None = None
    messages_field: str | None = None
    tools_field: str | None = None
    """None: `tools` or `functions` of a conversation's row; empty: none."""
    system_field: str | None = None
    history_field: str | None = None
    query_field: str | None = None
    """Field that goes on a line of its own after the prompt, where it is not empty."""
    tags: Tags = field(default_factory=Tags)

    @classmethod
    def of(cls, config: ExamplesConfig) -> Layout:
        """The layout that a config describes."""
        return cls(
            config.prompt_field,
            config.response_field,
            config.prompt_template,
            config.prompt_template_if_empty,
            config.messages_field,
            config.tools_field,
            config.system_field,
            config.history_field,
        )

    @property
    def is_conversation(self) -> bool:
        """Whether every row is a conversation; without it only rows are that consist of messages."""
        return bool(self.messages_field or self.system_field or self.history_field or self.tools_field)


def row_reader(layout: Layout, nulls_are_absent: bool = False) -> Callable[[Row], LearnedText]:
    """A function from a row to what is learned from it. It raises RowProblem, whose message lacks only the row's place.

    `nulls_are_absent`: for rows of a table, whose nested objects have every key in every row.
    """
    reader = _RowReader(layout, nulls_are_absent)
    read_row = reader.conversation if layout.messages_field else reader.pair

    def read(row: Row) -> LearnedText:
        try:
            return read_row(row)
        except RecursionError:
            raise RowProblem("too_deep", "a field is nested too deeply. Fix or remove the row.") from None

    return read


class _RowReader:
    def __init__(self, layout: Layout, nulls_are_absent: bool) -> None:
        self.layout = layout
        self.dialect = Dialect(layout.tags)
        self.nulls_are_absent = nulls_are_absent
        self.template = template_fields(layout.prompt_template or "")
        of_both = (*self.template, *template_fields(layout.prompt_template_if_empty or ""))
        self.template_names = tuple(dict.fromkeys(of_both))

    def conversation(self, row: Row) -> LearnedText:
        """Reads a row whose `messages_field` is a conversation."""
        name = self.layout.messages_field or ""
        value = self.nested(row, name)
        if value is MISSING:
            raise missing_field(row, name, "messages_field")
        loss_mask = self.nested(row, LOSS_MASK)
        is_mask = isinstance(loss_mask, list) or (isinstance(loss_mask, str) and loss_mask.lstrip().startswith("["))
        try:
            found = read_conversation(value, self.dialect, loss_mask if is_mask else None)
            messages = with_system(found.messages, self.system(row))
            return learned_text(messages, self.tools(row) or found.tools)
        except RowProblem as problem:
            raise in_field(problem, name) from None

    def pair(self, row: Row) -> LearnedText:
        """Reads a row of a prompt and a response, each text or messages."""
        prompt, response = self.prompt(row), self.response(row)
        if isinstance(prompt, str) and isinstance(response, str) and not self.layout.is_conversation:
            return _pair_of_texts(prompt, response, self.layout)
        context = self.messages(prompt, "user", self.layout.prompt_field)
        answers = self.messages(response, "assistant", self.layout.response_field)
        if answers and answers[0]["role"] in ("system", "user"):
            name = names_in_words([self.layout.response_field])
            found = f"is a conversation that begins with a message of {answers[0]['role']}, not an answer"
            raise RowProblem("wrong_type", f"field '{name}' {found}. Set examples.messages_field={name}.")
        messages = with_system(self.history(row) + unlearned(context), self.system(row))
        try:
            return learned_text(messages + answers, self.tools(row))
        except RowProblem as problem:
            raise in_field(problem, self.layout.response_field) from None

    def nested(self, row: Row, name: str) -> Any:
        """The value of a field, MISSING where the row has none."""
        value = row.get(name, MISSING)
        return without_nulls(value) if self.nulls_are_absent and isinstance(value, list | dict) else value

    def messages(self, value: str | list[Any], role: str, name: str) -> list[dict[str, Any]]:
        """One side of a pair as messages."""
        if isinstance(value, str):
            return [{"role": role, "content": value}]
        try:
            return read_messages(value, self.dialect)
        except RowProblem as problem:
            raise in_field(problem, name) from None

    # --- prompt and response -----------------------------------------------------------------------------------------

    def prompt(self, row: Row) -> str | list[Any]:
        """The prompt as text or as a list of messages."""
        if self.layout.prompt_template is not None:
            return self.filled_template(row, self.layout.prompt_template)
        value = self.nested(row, self.layout.prompt_field)
        if isinstance(value, list) and value:
            return value
        prompt = text_of(row, self.layout.prompt_field, "prompt_field", value)
        if self.layout.query_field is None:
            return prompt
        query = row.get(self.layout.query_field)
        query = "" if query is None else text_of(row, self.layout.query_field, "prompt_template", query)
        return "\n".join(part for part in (prompt, query) if part)

    def filled_template(self, row: Row, template: str) -> str:
        """The prompt that is put together from several fields; empty where all of them are."""
        values = {name: _template_value(row, name) for name in self.template_names}
        is_filled = {name: bool(value.strip()) for name, value in values.items()}
        if True not in is_filled.values():
            return ""
        has_all = all(is_filled[name] for name in self.template)
        if_empty = self.layout.prompt_template_if_empty
        return (template if has_all or if_empty is None else if_empty).format_map(values)

    def response(self, row: Row) -> str | list[Any]:
        """The response as text or as a list of messages; of several texts the first, which is the preferred one of a pair."""
        name = self.layout.response_field
        value = self.nested(row, name)
        if isinstance(value, list):
            if value and all(isinstance(item, dict) for item in value):
                return value
            if not value or not all(isinstance(item, str) for item in value):
                found = "an empty list" if not value else f"a list that starts with {kind_in_words(value[0])}"
                reason = "wrong_type" if value else "empty_response"
                raise RowProblem(reason, f"field '{name}' is {found}, not text or messages. {_text_remedy('response_field')}")
            return str(value[0])
        if isinstance(value, dict) and any(key in value for key in self.dialect.role_keys):
            return [value]
        return text_of(row, name, "response_field", value)

    # --- what makes a pair a conversation ----------------------------------------------------------------------------

    def system(self, row: Row) -> str | None:
        """The system message of a row, None where it has none."""
        name = self.layout.system_field
        value = None if name is None else _optional(row, name, "system_field")
        if value is not None and not isinstance(value, str):
            raise wrong_type(name or "", "system_field", value)
        return value

    def tools(self, row: Row) -> list[dict[str, Any]]:
        """The tools of a row."""
        given = self.layout.tools_field
        names = TOOLS_FIELDS if given is None else (given,)
        name = next((name for name in names if row.get(name) is not None), None)
        if name is None:
            return [] if not given else read_tools(_optional(row, given, "tools_field"))
        try:
            return read_tools(self.nested(row, name))
        except RowProblem as problem:
            hint = "" if given else " Set examples.tools_field to another field, or to '' where the rows have no tools."
            raise RowProblem(problem.reason, in_field(problem, name).message + hint) from None

    def history(self, row: Row) -> list[dict[str, Any]]:
        """The earlier turns of a row: [[prompt, response], ...], or messages."""
        name = self.layout.history_field
        value = None if name is None else _optional(row, name, "history_field")
        if name is None or value is None or value in ("", []):
            return []
        try:
            turns = from_json_text(value) if isinstance(value, str) else value
            return self.turns(turns)
        except RowProblem as problem:
            raise in_field(problem, name) from None

    def turns(self, turns: Any) -> list[dict[str, Any]]:
        if isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns):
            return read_messages(turns, self.dialect)
        messages = []
        for number, turn in enumerate(turns if isinstance(turns, list) else [turns]):
            texts = [turn] if not isinstance(turn, list | tuple) else ["" if text is None else text for text in turn]
            if len(texts) != 2 or not all(isinstance(text, str) for text in texts):
                found = f"a list of {len(turn)}" if isinstance(turn, list | tuple) else kind_in_words(turn)
                needed = "earlier turns are a list of [prompt, response], both text"
                raise RowProblem("bad_history", f"turn {number + 1:,}: {needed}, found {found}. Fix or remove the row.")
            messages += [{"role": role, "content": text} for role, text in zip(("user", "assistant"), texts, strict=True)]
        return messages


def _pair_of_texts(prompt: str, response: str, layout: Layout) -> LearnedText:
    if not prompt.strip():
        raise RowProblem("empty_prompt", "the prompt is empty. Fix or remove the row.")
    if not response.strip():
        raise RowProblem("empty_response", "the response is empty. Fix or remove the row.")
    for text, name in ((prompt, layout.prompt_field), (response, layout.response_field)):
        try:
            require_unicode(text)
        except RowProblem as problem:
            raise in_field(problem, name if text is response or not layout.prompt_template else "prompt_template") from None
    return LearnedText(prompt, response)


def text_of(row: Row, name: str, key: str, value: Any) -> str:
    """A field's value as text; null is empty text. Raises RowProblem for anything else."""
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if value is MISSING:
        raise missing_field(row, name, key)
    raise wrong_type(name, key, value)


def _optional(row: Row, name: str, key: str) -> Any:
    """The value of a field that only some rows have, None in the others. Raises RowProblem where its name looks misspelt."""
    value = row.get(name, MISSING)
    if value is not MISSING:
        return value
    if _is_misspelt(name, tuple(row)):
        raise missing_field(row, name, key)
    return None


@functools.lru_cache(maxsize=64)
def _is_misspelt(name: str, fields: tuple[str, ...]) -> bool:
    # `system_id` is another field than `system` (0.8), `systems` the same (0.92).
    return bool(difflib.get_close_matches(name, fields, n=1, cutoff=0.85))


def _template_value(row: Row, name: str) -> str:
    """Text or a whole number for a template."""
    value = row.get(name, MISSING)
    if type(value) is str:
        return value
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    return str(value) if is_whole else text_of(row, name, "prompt_template", value)


# --- what is wrong -----------------------------------------------------------------------------------------------


def in_field(problem: RowProblem, name: str) -> RowProblem:
    """A problem with the field that it was found in."""
    follows = " " if problem.message.startswith(("is ", "has ", "holds ")) else ": "
    if problem.message.startswith("field "):
        return problem
    return problem.at(f"field '{names_in_words([name])}'{', ' if problem.message.startswith('message ') else follows}")


def missing_field(fields: Row | Sequence[str], name: str, key: str) -> RowProblem:
    """A field that a row does not have; the message names the one that was probably meant."""
    known = [field for field in fields if isinstance(field, str)]
    usual = [field for field in USUAL_NAMES.get(key, ()) if field in known]
    chats = [field for field in USUAL_NAMES["messages_field"] if field in known]
    guess = next(iter(difflib.get_close_matches(name, known, n=1, cutoff=0.75) or usual), None)
    if key == "prompt_template":
        remedy = f"Write {{{guess}}} in examples.prompt_template." if guess else "Use these in examples.prompt_template."
    elif guess:
        remedy = f"Set examples.{key}={guess}."
    elif key in {"prompt_field", "response_field"} and chats:
        remedy = f"For conversations set examples.messages_field={chats[0]}."
    else:
        without = f", or leave it out: {IF_LEFT_OUT[key]}" if key in IF_LEFT_OUT else ""
        remedy = f"Set examples.{key} to one of them{without}."
    return RowProblem("missing_field", f"field '{name}' is missing (fields: {names_in_words(known)}). {remedy}")


def wrong_type(name: str, key: str, value: Any) -> RowProblem:
    """A field whose value is of another kind than text."""
    return RowProblem("wrong_type", f"field '{name}' is {kind_in_words(value)}, not text. {_text_remedy(key)}")


def _text_remedy(key: str) -> str:
    return f"Write it as text in the corpus, or set examples.{key} to a field of text."
