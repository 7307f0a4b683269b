"""From text to tokens, one way for training, scoring and evaluation.

``ids = [BOS, if the tokenizer adds one] + prompt + response + [EOS]``, prompt and response tokenised separately and
without special tokens, cut on the right to ``max_tokens``; a cut response has no EOS. The response tokens, EOS included,
are the labels. In a conversation they are every assistant message's tokens with its end-of-turn token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from s2l_ray.errors import DataError
from s2l_ray.examples.reading import read_pool
from s2l_ray.training.token_rows import TokenRows

# ChatML, for tokenizers that bring no chat template.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def encode(tokenizer: Any, prompts: Sequence[str], responses: Sequence[str], max_tokens: int) -> TokenRows:
    """Prompt and response pairs as tokens, by the contract of the module docstring."""
    bos = _bos(tokenizer)
    options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    prompt_ids = tokenizer(list(prompts), **options)["input_ids"] if len(prompts) else []
    response_ids = tokenizer(list(responses), **options)["input_ids"] if len(prompts) else []
    rows = []
    for prompt, response in zip(prompt_ids, response_ids, strict=True):
        ids = np.asarray([*bos, *prompt, *response, tokenizer.eos_token_id][:max_tokens], dtype=np.int32)
        marks = np.arange(len(ids)) >= max(1, len(bos) + len(prompt))
        rows.append((ids, marks))
    return TokenRows.of(rows)


def encode_conversations(tokenizer: Any, conversations: Sequence[list[dict[str, str]]], max_tokens: int) -> TokenRows:
    """Conversations as tokens by the tokenizer's chat template (ChatML if it has none).

    Raises DataError where the template writes earlier turns differently once later ones follow: the text that a label
    was taken from would not be the text that the model sees.
    """
    rows = []
    for messages in conversations:
        ids: list[int] = list(_bos(tokenizer))
        marks: list[bool] = [False] * len(ids)
        for text, is_label in conversation_pieces(tokenizer, messages):
            tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
            ids += tokens
            marks += [is_label] * len(tokens)
        if marks and marks[0]:
            marks[0] = False
        rows.append((np.asarray(ids[:max_tokens], dtype=np.int32), np.asarray(marks[:max_tokens], dtype=bool)))
    return TokenRows.of(rows)


def conversation_pieces(tokenizer: Any, messages: list[dict[str, str]]) -> list[tuple[str, bool]]:
    """A conversation's text in pieces, each with whether it is learned (assistant text with its end-of-turn token)."""

    def render(upto: int, generation_prompt: bool) -> str:
        template = tokenizer.chat_template or CHATML
        text = tokenizer.apply_chat_template(
            messages[:upto], chat_template=template, tokenize=False, add_generation_prompt=generation_prompt
        )
        # A template that writes BOS itself must not get a second one.
        return str(text).removeprefix(tokenizer.bos_token or "") if _bos(tokenizer) else str(text)

    pieces: list[tuple[str, bool]] = []
    whole, done = render(len(messages), False), 0
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = render(turn, True), render(turn + 1, False)
        if not (after.startswith(before) and whole.startswith(after)):
            raise DataError(
                "the tokenizer's chat template writes earlier turns differently when later ones follow, so labels would not "
                "match what the model sees. Use a tokenizer whose template only appends, or split conversations into turns."
            )
        learned = after[len(before) :].rstrip()
        pieces += [(whole[done : len(before)], False), (learned, True)]
        done = len(before) + len(learned)
    pieces.append((whole[done:], False))
    return [piece for piece in pieces if piece[0]]


def generation_prompt(ids: np.ndarray, is_label: np.ndarray) -> list[int]:
    """The tokens of a row after which a model answers: all before the first label."""
    return [int(token) for token in ids[: int(np.argmax(is_label))]]


def encode_table(tokenizer: Any, table: Any, max_tokens: int) -> TokenRows:
    """Rows of an examples part (an Arrow table) as tokens: conversations where it has them, else prompt and response."""
    if "messages" in table.column_names:
        return encode_conversations(tokenizer, table["messages"].to_pylist(), max_tokens)
    return encode(tokenizer, table["prompt"].to_pylist(), table["response"].to_pylist(), max_tokens)


def pool_tokens(
    examples: Any, tokenizer: Any, max_tokens: int, keep: set[str] | None = None
) -> tuple[list[str], TokenRows, dict[str, int]]:
    """Ids and tokens of the pool (of the ids in `keep` where given), and `learnable`'s counts of what was dropped or cut."""
    ids: list[str] = []
    parts: list[TokenRows] = []
    counts: Counter[str] = Counter()
    wanted = None if keep is None else pa.array(sorted(keep))
    for part in examples.parts():
        table = read_pool(examples, part)
        if wanted is not None:
            table = table.filter(pc.is_in(table["example_id"], wanted))
        tokens, kept, changed = learnable(encode_table(tokenizer, table, max_tokens), max_tokens, tokenizer.eos_token_id)
        ids += table["example_id"].take(pa.array(kept)).to_pylist()
        parts.append(tokens)
        counts.update(changed)
    return ids, TokenRows.join(parts), dict(counts)


def learnable(tokens: TokenRows, max_tokens: int, eos: int) -> tuple[TokenRows, np.ndarray, dict[str, int]]:
    """The rows that have a label, their row numbers, and how many were dropped for lack of one (`no_response_token`) or
    shortened (`cut`)."""
    kept = np.flatnonzero(tokens.num_labels > 0)
    left = tokens.take(kept)
    at_limit = left.lengths == max_tokens
    is_cut = at_limit & (left.ids[left.starts[1:] - 1] != eos)
    changed = {"no_response_token": len(tokens) - len(kept), "cut": int(is_cut.sum())}
    return left, kept, {reason: count for reason, count in changed.items() if count}


def row_counts(changed: dict[str, int]) -> dict[str, dict[str, int]]:
    """`learnable`'s counts as a manifest has them: rows dropped, and rows shortened, each by reason."""
    shortened = {"cut": changed["cut"]} if "cut" in changed else {}
    return {"dropped": {reason: count for reason, count in changed.items() if reason != "cut"}, "shortened": shortened}


def _bos(tokenizer: Any) -> list[int]:
    """The beginning-of-sequence token, if the tokenizer puts one before a text by itself."""
    bos = tokenizer.bos_token_id
    if bos is None:
        return []
    return [bos] if tokenizer("a")["input_ids"][:1] == [bos] else []
