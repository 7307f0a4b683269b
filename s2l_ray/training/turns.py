"""Which part of a conversation's text is learned: every answer of the assistant with the token that ends it, and nothing else.

A template that marks what an assistant generates is asked for its marks. Without marks an answer begins where the rendering
of what precedes it, with the header of an answer to come, ends, and stops behind the first token that ends the turn. Where a
template renders earlier turns differently once later ones follow (Qwen3 drops their reasoning), each answer becomes a text
of its own, with the history as it is rendered at that turn: what inference will see.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from s2l_ray.training.chat_templates import REFUSALS, Chat, ChatTemplate, Message, Rendered

SPLIT = "split_conversations"
"""The count of conversations that became several texts."""

ENDLESS = "ends_not_learned"
"""The count of conversations with an answer whose end no token marks, or whose end the template's own marks leave out."""

CALLS_LOST = "tool_calls_not_learned"
"""The count of conversations with a tool call that the template does not write."""


REASONING_LOST = "reasoning_not_learned"
"""The count of conversations with reasoning in a learned answer that the template does not write."""

TOOLS_LOST = "tools_not_shown"
"""The count of conversations with a tool that the template does not write into the prompt."""


@dataclass(frozen=True)
class ChatText:
    """One text that is tokenised whole, and what of it is learned."""

    text: str
    spans: tuple[tuple[int, int], ...]
    """Characters that are learned, in order."""

    adds_end: bool = False
    """Whether the end-of-sequence token follows, and is learned: nothing else would end the last answer."""

    is_marked: bool = False
    """Whether the spans are the template's own marks: a token that begins before one and reaches into it is learned, too."""


@dataclass(frozen=True)
class ReadChat:
    """A conversation as texts: one, or one for each learned answer where the template rewrites earlier turns."""

    texts: tuple[ChatText, ...]
    notes: frozenset[str] = frozenset()
    """What is to be counted: SPLIT, ENDLESS, CALLS_LOST, REASONING_LOST, TOOLS_LOST."""


@dataclass(frozen=True)
class Refusal:
    """A conversation that the template raised over, or whose answers cannot be told from their prompts."""

    words: str
    """Of the template; they quote nothing of the conversation."""


@dataclass(frozen=True)
class _Answer:
    """A learned message: the text up to it, where in that it stands, and whether that has its end."""

    turn: int
    text: str
    spans: tuple[tuple[int, int], ...]
    has_end: bool
    settled: int
    """Up to where the text must be that of the whole: what follows the first end may be written behind the last turn only."""

    marks: slice | None = None
    """Which of the template's marks are this message's."""

    @property
    def stop(self) -> int:
        return self.spans[-1][1]


class _UnreadableError(ValueError):
    """The template renders the prompt of an answer differently once the answer is there."""


def read_conversations(template: ChatTemplate, conversations: Sequence[Chat]) -> list[ReadChat | Refusal]:
    """The texts of each conversation. Many are rendered at once; one that is refused is found by halving."""
    if not conversations:
        return []
    try:
        return list(_read(template, conversations))
    except REFUSALS as error:
        if len(conversations) > 1:
            middle = len(conversations) // 2
            return [
                *read_conversations(template, conversations[:middle]),
                *read_conversations(template, conversations[middle:]),
            ]
        return [_read_in_another_form(template, conversations[0], error)]


def _read_in_another_form(template: ChatTemplate, one: Chat, error: Exception) -> ReadChat | Refusal:
    for form in list(one.forms())[1:]:
        with contextlib.suppress(*REFUSALS):
            return _read(template, [form])[0]
    return Refusal(str(error) if isinstance(error, _UnreadableError) else template.words(error, one.tools))


def _read(template: ChatTemplate, conversations: Sequence[Chat]) -> list[ReadChat]:
    is_marked = {tools: template.has_marks(tools) for tools in {one.tools for one in conversations}}
    if any(is_marked.values()):  # templates with and without tools may be two
        return [(_read_marked if is_marked[one.tools] else _read_plain)(template, [one])[0] for one in conversations]
    return _read_plain(template, conversations)


def _read_plain(template: ChatTemplate, conversations: Sequence[Chat]) -> list[ReadChat]:
    """By prefixes: what precedes each answer with the header of an answer to come, and the same with the answer."""
    turns = [(number, turn) for number, one in enumerate(conversations) for turn in one.learned]
    wholes = template.render(conversations)
    befores = iter(template.render([_upto(conversations[i], turn) for i, turn in turns if turn], prompts=True))
    inner = [(i, turn) for i, turn in turns if turn + 1 < len(conversations[i].messages)]
    afters = iter(template.render([_upto(conversations[i], turn + 1) for i, turn in inner]))
    answers: list[list[_Answer]] = [[] for _ in conversations]
    for i, turn in turns:
        one = conversations[i]
        before = next(befores).text if turn else None
        after = next(afters).text if turn + 1 < len(one.messages) else wholes[i].text
        answers[i].append(_answer(template, one, turn, before, after))
    return [_joined(template, *each) for each in zip(conversations, wholes, answers, strict=True)]


def _read_marked(template: ChatTemplate, conversations: Sequence[Chat]) -> list[ReadChat]:
    """By the template's own marks; of an answer those that its message adds."""
    read = []
    for one in conversations:
        [whole] = template.render([one], marks=True)
        answers = []
        for turn in one.learned:
            is_last = turn + 1 == len(one.messages)
            after = whole if is_last else template.render([_upto(one, turn + 1)], marks=True)[0]
            marks = _marks_of_turn(template, one, turn, after)
            spans = after.spans[marks]
            if spans:
                settled, has_end = _end(template, after.text[: spans[-1][1]], spans[0][0], one, turn)
                answers.append(_Answer(turn, after.text, spans, has_end, settled, marks))
        read.append(_joined(template, one, whole, answers))
    return read


def _marks_of_turn(template: ChatTemplate, one: Chat, turn: int, after: Rendered) -> slice:
    if len(after.spans) == sum(message["role"] == "assistant" for message in one.messages[: turn + 1]):
        return slice(len(after.spans) - 1, len(after.spans))
    earlier = len(template.render([_upto(one, turn)], marks=True)[0].spans) if turn else 0
    return slice(earlier, len(after.spans))


def _upto(one: Chat, turn: int) -> Chat:
    return Chat(one.messages[:turn], one.tools)


def _answer(template: ChatTemplate, one: Chat, turn: int, before: str | None, after: str) -> _Answer:
    if before is None:
        text, start = after, _start_of_first(template, one, after)
    elif after.startswith(before):
        text, start = after, len(before)
    else:
        text, start = _diverging(template, one, turn, before, after)
    stop, has_end = _end(template, text, start, one, turn)
    return _Answer(turn, text, ((start, stop),), has_end, stop)


def _start_of_first(template: ChatTemplate, one: Chat, after: str) -> int:
    """Where an answer begins that nothing precedes: templates cannot render nothing. Behind its header, or at its content."""
    [with_header] = template.render([_upto(one, 1)], prompts=True)
    header = with_header.text.removeprefix(after)
    if header and header in after:
        return after.index(header) + len(header)
    return _last_place_of(one.messages[0], after)


def _last_place_of(message: Message, text: str) -> int:
    """Where the last message of a text begins, its reasoning or its content, whichever comes first."""
    said = [str(message.get(key) or "").strip() for key in ("reasoning_content", "content")]
    places = [place for words in said if words and (place := text.rfind(words)) >= 0]
    if not places:
        raise _UnreadableError("it renders what precedes an answer differently once the answer is there")
    return min(places)


def _diverging(template: ChatTemplate, one: Chat, turn: int, before: str, after: str) -> tuple[str, int]:
    """Text and beginning of an answer that does not go on where the prompt ends.

    Where the generation prompt alone supplies something else (such as `<think>`) the answer begins where the two part. Where
    the prompt itself is another (Mistral's has the system message only while no answer follows) the answer is put behind it.
    """
    base = template.render([_upto(one, turn)])[0].text
    if after.startswith(base):
        return after, template.parting(before, after)
    header = before.removeprefix(base) if before.startswith(base) else ""
    if header and header in after:
        return before + after[after.rindex(header) + len(header) :], len(before)
    answer = after[_last_place_of(one.messages[turn], after) :]
    blanks = len(after) - len(answer) - len(after[: len(after) - len(answer)].rstrip(" "))
    return before + (" " * blanks if not before.endswith(" ") else "") + answer, len(before)


def _end(template: ChatTemplate, text: str, start: int, one: Chat, turn: int) -> tuple[int, bool]:
    """Where an answer stops, and whether with something that ends it: a special token, or words of the template.

    Of several special tokens in a row the first that ends a turn; blanks behind the end are not of the answer.
    """
    message, stop = one.messages[turn], len(text.rstrip())
    last, ends = stop, []
    while stop > start and (begin := template.end_before(text, stop)) < stop and begin >= start:
        ends.append((begin, stop))
        stop = len(text[:begin].rstrip())
    if ends:
        for (begin, first), (following, _) in pairwise(reversed(ends)):
            is_apart = first != following and not message.get("tool_calls")
            if is_apart or _closes_a_message(text[:start], text[begin:first], one, turn):
                return first, True
        return last, True
    content = str(message.get("content") or "").strip()
    place = text.rfind(content, start, last) if content and not message.get("tool_calls") else -1
    if place >= 0 and place + len(content) < last:
        return last, True
    return len(text), False


def _closes_a_message(prompt: str, token: str, one: Chat, turn: int) -> bool:
    """Whether a token follows the message before an answer, too: then it ends turns."""
    content = str(one.messages[turn - 1].get("content") or "").strip() if turn else ""
    return bool(content) and re.search(re.escape(content) + r"\s*" + re.escape(token), prompt) is not None


def _joined(template: ChatTemplate, one: Chat, whole: Rendered, answers: list[_Answer]) -> ReadChat:
    """The texts of a conversation: the whole where every answer stands in it as it was rendered, else one for each."""
    notes = {TOOLS_LOST} if one.tools and _is_the_same_without_tools(template, one, whole) else set()
    notes |= {REASONING_LOST} if any(_lacks_reasoning(one, answer) for answer in answers) else set()
    if any(_lacks_calls(one, answer) for answer in answers):
        notes.add(CALLS_LOST)
        # An answer that is nothing but a call would teach to say nothing.
        answers = [a for a in answers if one.messages[a.turn].get("content") or not _lacks_calls(one, a)]
    is_marked = any(answer.marks is not None for answer in answers)
    if any(whole.text[: answer.settled] != answer.text[: answer.settled] for answer in answers):
        notes |= {SPLIT} if len(answers) > 1 else set()
        is_open = [not answer.has_end and not answer.text[answer.stop :].strip() for answer in answers]
        notes |= {ENDLESS} if any(not a.has_end and not adds for a, adds in zip(answers, is_open, strict=True)) else set()
        texts = [ChatText(a.text, a.spans, adds, is_marked) for a, adds in zip(answers, is_open, strict=True)]
        return ReadChat(tuple(texts), frozenset(notes))
    spans: list[tuple[int, int]] = []
    adds_end = False
    for answer in answers:
        spans += answer.spans if answer.marks is None else whole.spans[answer.marks]
        if answer.has_end:
            continue
        if answer.turn + 1 == len(one.messages) and not whole.text[answer.stop :].strip():
            adds_end = True
            continue
        # The token that ends the turn may be the header of the next message.
        stop = answer.stop if is_marked else template.end_after(whole.text, answer.stop)
        spans[-1] = (spans[-1][0], stop)
        notes |= {ENDLESS} if stop == answer.stop else set()
    return ReadChat((ChatText(whole.text, tuple(spans), adds_end, is_marked),), frozenset(notes))


def _is_the_same_without_tools(template: ChatTemplate, one: Chat, whole: Rendered) -> bool:
    with contextlib.suppress(*REFUSALS):
        return template.render([replace(one, tools=None)])[0].text == whole.text
    return False


def _lacks_reasoning(one: Chat, answer: _Answer) -> bool:
    message = one.messages[answer.turn]
    inside = re.search(r"<think>(.*?)</think>", str(message.get("content") or ""), re.DOTALL)
    thoughts = str(message.get("reasoning_content") or (inside[1] if inside else "")).strip()
    return thoughts not in answer.text[answer.spans[0][0] : answer.stop]


def _lacks_calls(one: Chat, answer: _Answer) -> bool:
    calls = one.messages[answer.turn].get("tool_calls") or []
    learned = answer.text[answer.spans[0][0] : answer.stop]
    names = [call["function"]["name"] for call in calls]
    return any(name not in learned and json.dumps(name)[1:-1] not in learned for name in names)
