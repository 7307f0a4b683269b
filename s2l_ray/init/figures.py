"""What a corpus amounts to: examples, copies, learned turns, tokens; and examples as pieces of text, learned or not."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from s2l_ray.config import ExamplesConfig
from s2l_ray.errors import DataError
from s2l_ray.examples.dropped import Dropped
from s2l_ray.examples.fields import normalise
from s2l_ray.examples.layouts import Layout
from s2l_ray.init.sampling import CorpusLook
from s2l_ray.plan.costs import CHARACTERS_PER_TOKEN

SAMPLE_ROWS = 2000
"""Examples whose tokens are counted."""
NO_LIMIT = 2**20
TOKENS_PER_BORDER = 6
"""About the tokens that a chat template puts around a learned text."""
SHOWN = 3
NEXT_ROW = "\n--- the next turn, a row of its own ---\n"

Pieces = list[tuple[str, bool]]
"""A row's text in pieces, each with whether it is learned."""


@dataclass(frozen=True)
class ReadExamples:
    """The examples in the rows that were read."""

    table: pa.Table
    """example_id, source, prompt, response, and of conversations messages and tools as JSON text."""
    dropped: Counter[str]
    """Reason -> rows that are none."""
    first: dict[str, str]
    """Reason -> the message of the first row that cannot be read or understood."""
    num_bad: int
    """How many such rows there are."""

    def sample(self, most: int) -> pa.Table:
        """At most so many of them, from all over the table."""
        rows = np.linspace(0, self.table.num_rows - 1, min(most, self.table.num_rows)).round().astype(np.int64)
        return self.table.take(pa.array(rows))

    def num_copies(self) -> int:
        """Examples that are equal to an earlier one in what is learned."""
        columns = [self.table[name].to_pylist() for name in ("prompt", "response", "messages") if name in self.names]
        num_distinct = len({hash(tuple(map(str, row))) for row in zip(*columns, strict=True)})
        return int(self.table.num_rows) - num_distinct

    def sources(self) -> dict[str, int]:
        """Rows of every source, the largest first."""
        return dict(Counter(self.table["source"].to_pylist()).most_common())

    @property
    def names(self) -> list[str]:
        return list(self.table.column_names)


def read_examples(look: CorpusLook, config: ExamplesConfig, layout: Layout) -> ReadExamples:
    """The examples in the rows that were read; rows that are none are counted. Raises DataError as the run would."""
    wanted = ["example_id", "source", "prompt", "response", "messages", "tools"]
    found = [normalise(rows, config, layout) for rows in look.blocks]
    dropped = Dropped.joined(one.dropped for one in found)
    table = pa.concat_tables([one.table.select(wanted) for one in found])
    return ReadExamples(table, dropped.by_reason, dropped.first, dropped.num_bad)


@dataclass(frozen=True)
class Turns:
    """The messages of some conversations."""

    roles: Counter[str]
    num_learned: int
    num_context: int
    """Answers that are marked as not to be learned."""
    num_calls: int
    """Learned answers that call tools."""
    num_with_tools: int
    """Conversations that offer tools."""


def turns_of(table: pa.Table) -> Turns | None:
    """What is learned in the conversations of a table; None where it has none."""
    if "messages" not in table.column_names:
        return None
    roles: Counter[str] = Counter()
    learned = context = calls = 0
    for messages in filter(None, map(_messages, table["messages"].to_pylist())):
        roles.update(str(message["role"]) for message in messages)
        answers = [message for message in messages if message["role"] == "assistant"]
        marked = [message for message in answers if message.get("weight") == 0]
        learned, context = learned + len(answers) - len(marked), context + len(marked)
        calls += sum(bool(message.get("tool_calls")) and message.get("weight") != 0 for message in answers)
    tools = table["tools"].to_pylist() if "tools" in table.column_names else []
    return Turns(roles, learned, context, calls, sum(map(bool, tools))) if roles else None


def _messages(value: Any) -> list[dict[str, Any]]:
    return json.loads(value) if isinstance(value, str) else value or []


# --- tokens --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenCounts:
    """The tokens of some examples."""

    lengths: np.ndarray
    """Tokens of each, shape (examples,): of its longest row where it has several."""
    learned_fraction: float
    how: str
    """How they were counted, in words."""
    notes: list[str] = field(default_factory=list)
    """What a user should know of them."""

    def quantile(self, share: float) -> int:
        return int(np.quantile(self.lengths, share, method="higher"))

    def share_over(self, max_tokens: int) -> float:
        """The share of the examples that are longer."""
        return float(np.mean(self.lengths > max_tokens))


def count_tokens(table: pa.Table, tokenizer: Any | None, whose: str) -> TokenCounts:
    """The tokens of the examples in a table: exactly with a tokenizer, which is called `whose`, else by characters.

    Raises DataError where the tokenizer's chat template refuses every one of them.
    """
    if tokenizer is None:
        return _count_characters(table, whose)
    from s2l_ray.training.token_rows import RowLimit
    from s2l_ray.training.tokens import encode_table

    made = encode_table(tokenizer, table, RowLimit(NO_LIMIT))
    if not len(made.tokens):
        words = f": {made.refused[0].words}" if made.refused else ""
        raise DataError(f"nothing is left to learn with {whose}{words}. Fix the rows, or name another target.")
    lengths = np.zeros(len(made.example_ids), np.int64)
    np.maximum.at(lengths, made.owners, made.tokens.lengths)
    notes = [f"{count:,} {reason}" for reason, count in made.changed.items() if count]
    notes += [f"example {made.refused[0].example_id}: {made.refused[0].words}"] if made.refused else []
    return TokenCounts(lengths, float(made.tokens.is_label.mean()), f"counted with {whose}", notes)


def _count_characters(table: pa.Table, whose: str) -> TokenCounts:
    texts = pieces_of(table, None)
    lengths = [
        sum(len(text) / CHARACTERS_PER_TOKEN + TOKENS_PER_BORDER * is_learned for text, is_learned in row) for row in texts
    ]
    learned = sum(len(text) for row in texts for text, is_learned in row if is_learned)
    share = learned / max(1, sum(len(text) for row in texts for text, _ in row))
    how = f"at {CHARACTERS_PER_TOKEN} characters a token, an assumption: {whose}"
    return TokenCounts(np.ceil(lengths).astype(np.int64), share, how)


def pieces_of(table: pa.Table, tokenizer: Any | None) -> list[Pieces]:
    """Every example of a table as text, learned or not: what the tokens say, without a tokenizer what the fields say.

    An example that is several rows of tokens has them one below the other; one that a chat template refuses is left out.
    """
    if tokenizer is None:
        return [_fields_as_pieces(row) for row in table.to_pylist()]
    from s2l_ray.training.token_rows import RowLimit
    from s2l_ray.training.tokens import encode_table

    made = encode_table(tokenizer, table, RowLimit(NO_LIMIT))
    shown: list[Pieces] = [[] for _ in range(len(made.example_ids))]
    for row, owner in enumerate(made.owners):
        shown[owner] += [(NEXT_ROW, False)] if shown[owner] else []
        shown[owner] += _decoded(tokenizer, *made.tokens[row])
    return shown


def _decoded(tokenizer: Any, ids: np.ndarray, is_label: np.ndarray) -> Pieces:
    borders = [0, *(np.flatnonzero(np.diff(is_label)) + 1).tolist(), len(ids)]
    runs = [(start, stop) for start, stop in itertools.pairwise(borders) if stop > start]
    return [(tokenizer.decode(ids[start:stop].tolist()), bool(is_label[start])) for start, stop in runs]


def _fields_as_pieces(row: dict[str, Any]) -> Pieces:
    messages = _messages(row.get("messages"))
    if not messages:
        return [(row["prompt"], False), (row["response"], True)]
    pieces: Pieces = []
    for message in messages:
        said = [message.get("reasoning_content"), message.get("content")]
        said += [json.dumps(call, ensure_ascii=False) for call in message.get("tool_calls") or []]
        is_learned = message["role"] == "assistant" and message.get("weight") != 0
        pieces += [(f"{message['role']}: ", False), ("\n".join(filter(None, said)), is_learned), ("\n", False)]
    return pieces
