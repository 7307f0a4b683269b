"""From text to tokens, one way for training, scoring and evaluation.

``ids = [BOS, if the tokenizer adds one] + prompt + response + [EOS]``, prompt and response tokenised separately and
without special tokens, cut to `max_tokens`; a cut response has no EOS. The response tokens, EOS included, are the labels. A
conversation is the text of the tokenizer's chat template, tokenised whole; the labels are the assistant's answers, each with
the token that ends it (`turns`). It may be several rows, whose labels count together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from s2l_ray.training.chat_rows import ChatRows, encode_chats
from s2l_ray.training.chat_templates import Chat
from s2l_ray.training.token_rows import Row, RowLimit, TokenRows

NO_LABEL, CUT, REFUSED = "no_response_token", "cut", "refused_by_template"


class RefusedExample(NamedTuple):
    """An example that the chat template raised over."""

    example_id: str
    source: str
    words: str
    """The template's; they quote nothing of the example."""


@dataclass(frozen=True)
class PartTokens:
    """The examples of a table that have a label, as rows of tokens."""

    example_ids: pa.Array
    sources: pa.Array
    tokens: TokenRows
    owners: np.ndarray
    """The number of the example that each row is of, int64 (rows,), ascending: an example may have several."""

    changed: dict[str, int]
    """Examples dropped and shortened by reason, and what else was counted of them (`turns`)."""

    refused: list[RefusedExample] = field(default_factory=list)

    unlearned_lengths: list[int] = field(default_factory=list)
    """Tokens, before they were cut, of the examples that had no label left."""

    @cached_property
    def num_labels(self) -> np.ndarray:
        """Labels per example, int32."""
        return np.bincount(self.owners, self.tokens.num_labels, len(self.example_ids)).astype(np.int32)

    @property
    def is_split(self) -> np.ndarray:
        """Whether a row is one of several of its example, bool (rows,)."""
        is_split: np.ndarray = np.bincount(self.owners, minlength=len(self.example_ids))[self.owners] > 1
        return is_split

    @property
    def row_ids(self) -> list[str]:
        """A name for each row: the example's id, with `#turn` where the example has several."""
        first = np.searchsorted(self.owners, self.owners)
        ids = self.example_ids.take(pa.array(self.owners)).to_pylist()
        turns = (np.arange(len(ids)) - first).tolist()
        return [f"{name}#{turn}" if split else name for name, turn, split in zip(ids, turns, self.is_split, strict=True)]


def encode(tokenizer: Any, prompts: Sequence[str], responses: Sequence[str]) -> list[Row]:
    """Prompt and response pairs as tokens, by the contract of the module docstring, not cut yet."""
    bos = _bos(tokenizer)
    options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    prompt_ids = tokenizer(list(prompts), **options)["input_ids"] if len(prompts) else []
    response_ids = tokenizer(list(responses), **options)["input_ids"] if len(prompts) else []
    rows = []
    for prompt, response in zip(prompt_ids, response_ids, strict=True):
        ids = np.asarray([*bos, *prompt, *response, tokenizer.eos_token_id], dtype=np.int32)
        rows.append((ids, np.arange(len(ids)) >= max(1, len(bos) + len(prompt))))
    return rows


def encode_table(tokenizer: Any, table: pa.Table, limit: RowLimit) -> PartTokens:
    """Rows of an examples part (an Arrow table) as tokens: conversations where it has them, else prompt and response."""
    is_chat = np.zeros(table.num_rows, bool)
    if "messages" in table.column_names:
        is_chat = table["messages"].is_valid().to_numpy()
    chats, pairs = np.flatnonzero(is_chat), table.filter(pa.array(~is_chat))
    made = _chats(tokenizer, table.take(pa.array(chats))) if len(chats) else ChatRows()
    rows = [*encode(tokenizer, pairs["prompt"].to_pylist(), pairs["response"].to_pylist()), *made.rows]
    owners = np.concatenate([np.flatnonzero(~is_chat), chats[np.asarray(made.owners, np.int64)]])
    order = np.argsort(owners, kind="stable")
    refused = {int(chats[number]): words for number, words in made.refused.items()}
    changed = Counter({REFUSED: len(refused)}) + made.notes
    named = [
        RefusedExample(table["example_id"][row].as_py(), table["source"][row].as_py(), words) for row, words in refused.items()
    ]
    return _learnable(tokenizer, table, [rows[i] for i in order], owners[order], limit, changed, named)


def _chats(tokenizer: Any, table: pa.Table) -> ChatRows:
    tools = table["tools"].to_pylist() if "tools" in table.column_names else [None] * table.num_rows
    pairs = zip(table["messages"].to_pylist(), tools, strict=True)
    return encode_chats(tokenizer, [Chat.of(*pair) for pair in pairs], _bos(tokenizer))


def _learnable(
    tokenizer: Any,
    table: pa.Table,
    rows: list[Row],
    owners: np.ndarray,
    limit: RowLimit,
    changed: Counter[str],
    refused: list[RefusedExample],
) -> PartTokens:
    """The rows cut, without those that have no label left; an example without any row is dropped and counted."""
    lengths = np.array([len(ids) for ids, _ in rows], np.int64)
    cut = TokenRows.of([limit.cut(row, tokenizer.bos_token_id) for row in rows])
    has_label = cut.num_labels > 0
    kept = np.unique(owners[has_label])
    is_short = np.isin(owners, kept) & (lengths > limit.max_tokens)
    unlearned = ~np.isin(owners, kept)
    changed += Counter({NO_LABEL: len(np.unique(owners[unlearned])), CUT: len(np.unique(owners[is_short]))})
    return PartTokens(
        table["example_id"].combine_chunks().take(pa.array(kept)),
        table["source"].combine_chunks().take(pa.array(kept)),
        cut if has_label.all() else cut.take(np.flatnonzero(has_label)),
        np.searchsorted(kept, owners[has_label]),
        dict(changed),
        refused,
        lengths[unlearned].tolist(),
    )


def without_prompts(tokenizer: Any, tokens: TokenRows, owners: np.ndarray) -> tuple[TokenRows, np.ndarray]:
    """The labels of examples without all that leads to them: each answer (run of labels) a row of its own, after the token that
    begins a text (BOS, or EOS for a tokenizer without one), and the number of each row's example.

    Of a prompt with its response that is BOS + response + EOS. An answer of a conversation has no context but that token: no
    earlier turn, and none of the template's own text before it. All labels stay labels.
    """
    begin = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    rows, found = list[Row](), list[int]()
    for row, owner in enumerate(owners.tolist()):
        ids, is_label = tokens[row]
        places = np.flatnonzero(is_label)
        for answer in np.split(ids[places], np.flatnonzero(np.diff(places) > 1) + 1):
            rows.append((np.concatenate([[begin], answer]).astype(np.int32), np.arange(len(answer) + 1) > 0))
            found.append(owner)
    return TokenRows.of(rows), np.asarray(found, np.int64)


def generation_prompt(ids: np.ndarray, is_label: np.ndarray) -> list[int]:
    """The tokens of a row after which a model gives its last answer: all before the last run of labels."""
    begins = np.flatnonzero(is_label & ~np.concatenate([[False], is_label[:-1]]))
    return [int(token) for token in ids[: begins[-1]]]


def ends_of_answers(tokenizer: Any, tokens: TokenRows) -> set[int]:
    """The tokens with which rows teach a model to end an answer: last labels that are special (an end of turn, EOS).

    A row that was cut, or whose template marks no end of turn, ends with an ordinary token, which ends nothing.
    """
    lasts = tokens.ids[tokens.is_label][np.cumsum(tokens.num_labels) - 1]
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return special & {int(last) for last in np.unique(lasts)}


def num_answers(tokens: TokenRows, owners: np.ndarray, example: int) -> int:
    """How many answers, runs of labels, an example's rows have."""
    marks = [tokens[row][1] for row in np.flatnonzero(owners == example).tolist()]
    return sum(int(np.count_nonzero(row & ~np.concatenate([[False], row[:-1]]))) for row in marks)


def _bos(tokenizer: Any) -> list[int]:
    """The beginning-of-sequence token, if the tokenizer puts one before a text by itself."""
    bos = tokenizer.bos_token_id
    if bos is None:
        return []
    return [bos] if tokenizer("a")["input_ids"][:1] == [bos] else []
