"""Conversations as tokens: the whole text is tokenised once, as inference does, and labels are found by their characters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from s2l_ray.training.chat_templates import Chat, ChatTemplate
from s2l_ray.training.token_rows import Row
from s2l_ray.training.turns import ChatText, Refusal, read_conversations


@dataclass
class ChatRows:
    """Conversations as rows of tokens, not cut yet."""

    rows: list[Row] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)
    """The number of the conversation that each row is of, ascending."""

    refused: dict[int, str] = field(default_factory=dict)
    """Numbers of conversations that the template raised over, and its words."""

    notes: Counter[str] = field(default_factory=Counter)
    """How many conversations were split, and what could not be learned of how many (`turns`)."""


def encode_chats(tokenizer: Any, conversations: Sequence[Chat], bos: Sequence[int]) -> ChatRows:
    """Conversations as tokens by the tokenizer's chat template, which alone decides about the beginning of a text; `bos` goes
    before ChatML, which stands in for a template."""
    template = ChatTemplate(tokenizer)
    made, texts = ChatRows(), list[ChatText]()
    for number, read in enumerate(read_conversations(template, conversations)):
        if isinstance(read, Refusal):
            made.refused[number] = read.words
            continue
        made.notes.update(read.notes)
        texts += read.texts
        made.owners += [number] * len(read.texts)
    made.rows = encode_texts(tokenizer, texts, () if template.is_own else bos)
    return made


def encode_texts(tokenizer: Any, texts: Sequence[ChatText], bos: Sequence[int] = ()) -> list[Row]:
    """Tokens and label marks of each text, `bos` before them."""
    if not texts:
        return []
    encoded = tokenizer([one.text for one in texts], add_special_tokens=False, return_attention_mask=False, verbose=False)
    places = encoded.encodings or [_SlowPlaces(tokenizer, ids) for ids in encoded["input_ids"]]
    rows = []
    for one, ids, place in zip(texts, encoded["input_ids"], places, strict=True):
        end = [tokenizer.eos_token_id] if one.adds_end else []
        marks = np.zeros(len(bos) + len(ids) + len(end), dtype=bool)
        for start, stop in one.spans:
            first, last = _tokens_of(place, one, start, stop, len(ids))
            marks[len(bos) + first : len(bos) + last] = True
        marks[len(marks) - len(end) :] = True
        marks[:1] = False  # nothing predicts it
        rows.append((np.asarray([*bos, *ids, *end], dtype=np.int32), marks))
    return rows


def _tokens_of(encoding: Any, one: ChatText, start: int, stop: int, count: int) -> tuple[int, int]:
    """The tokens that begin within a span of characters, as a range. One that begins before it, in what the prompt supplies,
    is left out, unless the template itself marked the span."""
    if isinstance(encoding, _SlowPlaces):
        return encoding.tokens_before(one.text[:start]), encoding.tokens_before(one.text[:stop])
    first = _token_at(encoding, start, len(one.text), count)
    if not one.is_marked:
        while first < count and _begin(encoding, one.text, first) < start:
            first += 1
    last = _token_at(encoding, stop, len(one.text), count)
    while last < count and encoding.token_to_chars(last)[0] < stop:
        last += 1
    return first, last


def _token_at(encoding: Any, place: int, length: int, count: int) -> int:
    """The first token with the character at `place` or, where no token has it (a blank that was left out), one behind it."""
    found = (encoding.char_to_token(char) for char in range(place, length))
    return next((int(token) for token in found if token is not None), count)


def _begin(encoding: Any, text: str, token: int) -> int:
    """Where a token's characters begin. Offsets may leave out the blank that a word's token begins with."""
    begin: int = encoding.token_to_chars(token)[0]
    has_blank = begin > 0 and text[begin - 1] == " " and encoding.tokens[token][:1] in {"Ġ", "▁"}
    return begin - 1 if has_blank and encoding.char_to_token(begin - 1) is None else begin


class _SlowPlaces:
    """Where tokens lie in a text, for a tokenizer that does not tell: by tokenising what precedes a place."""

    def __init__(self, tokenizer: Any, ids: list[int]) -> None:
        self._tokenizer, self._ids = tokenizer, ids

    def tokens_before(self, text: str) -> int:
        """The tokens that a text's beginning has in common with the whole."""
        before = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        differs = (i for i, (one, other) in enumerate(zip(before, self._ids, strict=False)) if one != other)
        return next(differs, min(len(before), len(self._ids)))
