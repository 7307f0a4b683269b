"""Conversations as text: a tokenizer's own chat template, or ChatML where it has none, as inference will render them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jinja2.exceptions import TemplateError, UndefinedError

from s2l_ray.errors import ConfigError

# ChatML, for tokenizers that bring no chat template: reasoning, calls and their results as Qwen and Hermes write them. It has
# no place for the tools themselves; a list of them would fill the context of the small models that come without a template.
CHATML = """
{%- for message in messages -%}
  {%- set content = message.content or '' -%}
  {{- '<|im_start|>' + message.role + '\n' -}}
  {%- if message.reasoning_content -%}{{- '<think>\n' + message.reasoning_content + '\n</think>\n\n' -}}{%- endif -%}
  {%- if message.role == 'tool' -%}
    {{- '<tool_response>\n' + content + '\n</tool_response>' -}}
  {%- else -%}
    {{- content -}}
  {%- endif -%}
  {%- for call in message.tool_calls or [] -%}
    {%- if content or not loop.first -%}{{- '\n' -}}{%- endif -%}
    {{- '<tool_call>\n{"name": ' + (call.function.name | tojson) + ', "arguments": ' -}}
    {{- call.function.arguments if call.function.arguments is string else call.function.arguments | tojson -}}
    {{- '}\n</tool_call>' -}}
  {%- endfor -%}
  {{- '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""
CHATML_END = "<|im_end|>"
# What a template, or the code that it runs in, raises over a conversation that it is not made for.
REFUSALS = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
_MARKS = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")

Message = dict[str, Any]


@dataclass(frozen=True)
class Chat:
    """Messages in their canonical form, and the tools that they may call."""

    messages: list[Message]
    tools: str | None = None
    """JSON text of a list in OpenAI's form."""

    is_learned: tuple[bool, ...] = ()
    """By message: whether it is the assistant's and not mere context."""

    @classmethod
    def of(cls, messages: str, tools: str | None) -> Chat:
        """From the columns of an examples part; templates do not see the weights."""
        found: list[Message] = json.loads(messages)
        is_learned = tuple(one["role"] == "assistant" and one.get("weight", 1) != 0 for one in found)
        return cls([{key: one[key] for key in one if key != "weight"} for one in found], tools or None, is_learned)

    @property
    def learned(self) -> list[int]:
        """Numbers of the messages that are learned."""
        return [turn for turn, is_learned in enumerate(self.is_learned) if is_learned]

    def forms(self) -> Iterator[Chat]:
        """The conversation, and the same as templates want it that take no object as a call's arguments, or no message
        without content."""
        yield self
        some: list[Callable[[Message], Message]] = []
        if any(message.get("tool_calls") for message in self.messages):
            some = [_with_arguments_as_text]
        if any(message.get("content") is None for message in self.messages):
            some = [_with_content, *some, lambda message: _with_arguments_as_text(_with_content(message))][: 2 * len(some) + 1]
        for change in some:
            yield replace(self, messages=[change(message) for message in self.messages])


def _with_content(message: Message) -> Message:
    return message | {"content": message.get("content") or ""}


def _with_arguments_as_text(message: Message) -> Message:
    def as_text(call: dict[str, Any]) -> dict[str, Any]:
        arguments = call["function"].get("arguments")
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        return call | {"function": call["function"] | {"arguments": text}}

    return message | {"tool_calls": [as_text(call) for call in message["tool_calls"]]} if message.get("tool_calls") else message


@dataclass(frozen=True)
class Rendered:
    """A conversation's text and, where the template marks what an assistant generates, those spans of characters."""

    text: str
    spans: tuple[tuple[int, int], ...] = ()


class ChatTemplate:
    """How a tokenizer renders conversations."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.is_own = tokenizer.chat_template is not None
        """False: the tokenizer brings none, ChatML stands in."""

        try:
            self.source(None)
        except ValueError as error:
            named = ", ".join(tokenizer.chat_template) if isinstance(tokenizer.chat_template, dict) else "none that can be used"
            raise ConfigError(
                f"tokenizer: it has several chat templates ({named}) and no default one. Save it with the one to use."
            ) from error
        added = tokenizer.added_tokens_decoder.values()
        self._ends = {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)
        if not self.is_own:
            self._ends.add(CHATML_END)
        self._end_lengths = sorted({len(end) for end in self._ends}, reverse=True)

    def source(self, tools: str | None) -> str:
        """The template's text."""
        return str(self._tokenizer.get_chat_template(None if self.is_own else CHATML, _parsed(tools)))

    def has_marks(self, tools: str | None) -> bool:
        """Whether the template marks what an assistant generates, with `{% generation %}`."""
        return _MARKS.search(self.source(tools)) is not None

    def render(self, conversations: Sequence[Chat], *, prompts: bool = False, marks: bool = False) -> list[Rendered]:
        """The text of each conversation as `apply_chat_template` gives it; `prompts`: with the header of an answer to come.

        Raises one of REFUSALS where the template does for any of them.
        """
        if not marks:
            return [Rendered(text) for text in self._texts(conversations, prompts)]
        from transformers.utils.chat_template_utils import render_jinja_template

        made = []
        for one in conversations:
            tools = _parsed(one.tools)
            messages = [{key: value for key, value in message.items() if value is not None} for message in one.messages]
            [text], [spans] = render_jinja_template(
                [messages],
                tools=tools,
                chat_template=self.source(one.tools),
                return_assistant_tokens_mask=True,
                add_generation_prompt=prompts,
                **self._tokenizer.special_tokens_map,
            )
            made.append(Rendered(text, tuple((start, stop) for start, stop in spans if start < stop)))
        return made

    def _texts(self, conversations: Sequence[Chat], prompts: bool) -> list[str]:
        texts = [""] * len(conversations)
        by_tools: dict[str | None, list[int]] = {}
        for number, one in enumerate(conversations):
            by_tools.setdefault(one.tools, []).append(number)
        for tools, numbers in by_tools.items():
            made = self._tokenizer.apply_chat_template(
                [conversations[number].messages for number in numbers],
                tools=_parsed(tools),
                chat_template=None if self.is_own else CHATML,
                tokenize=False,
                add_generation_prompt=prompts,
            )
            for number, text in zip(numbers, made, strict=True):
                texts[number] = text
        return texts

    def end_before(self, text: str, stop: int) -> int:
        """Where the special token begins that ends at `stop`; `stop` itself where none does."""
        return next((stop - n for n in self._end_lengths if stop >= n and text[stop - n : stop] in self._ends), stop)

    def end_after(self, text: str, start: int) -> int:
        """Where the special token stops that begins at `start`; `start` itself where none does."""
        return next((start + n for n in self._end_lengths if text[start : start + n] in self._ends), start)

    def parting(self, text: str, other: str) -> int:
        """Where in `other` its first token begins that `text` does not have in the same place."""
        encoded = self._tokenizer([text, other], add_special_tokens=False, verbose=False)
        ids, others = encoded["input_ids"]
        number = next((i for i, (a, b) in enumerate(zip(ids, others, strict=False)) if a != b), min(len(ids), len(others)))
        if number == len(others):
            return len(other)
        if encoded.encodings:
            return int(encoded.token_to_chars(1, number).start)
        return len(self._tokenizer.decode(others[:number]))

    def words(self, error: Exception, tools: str | None) -> str:
        """What a template raised, in words that quote nothing of the corpus: 200 characters of the first line at most."""
        lines = str(error).strip().splitlines()
        said = lines[0][:200] if lines else ""
        source = self.source(tools).replace("\\'", "'").replace('\\"', '"')
        if type(error) is TemplateError:  # by the template itself, whose words may go on with the row's
            said = next((said[:n] for n in range(len(said), 7, -1) if said[:n] in source), "").strip()
        elif isinstance(error, UndefinedError):  # names an attribute, which may be the row's
            names = re.findall(r"'([^']*)'", said)
            said = said if all(name.endswith(" object") or name in source for name in names) else ""
        elif not isinstance(error, TypeError):  # which names types
            said = ""
        return said or type(error).__name__


def _parsed(tools: str | None) -> list[Any] | None:
    return None if tools is None else list(json.loads(tools))
