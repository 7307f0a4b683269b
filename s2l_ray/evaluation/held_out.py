"""A model on held-out rows: the loss of each; where an answer can be verified, what the model writes and how good that is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from s2l_ray.config import RunConfig
from s2l_ray.evaluation.bert_scores import BertScore
from s2l_ray.evaluation.generation import generate
from s2l_ray.evaluation.scores import scorers
from s2l_ray.evaluation.sharding import OFFLOADED_TOKENS_PER_BATCH
from s2l_ray.examples.reading import read_evaluated
from s2l_ray.storage.artifacts import Artifact
from s2l_ray.training.losses import example_losses
from s2l_ray.training.output_head import is_dispatched
from s2l_ray.training.token_pools import check_refused
from s2l_ray.training.token_rows import RowLimit
from s2l_ray.training.tokens import PartTokens, encode_table, ends_of_answers, generation_prompt, num_answers

TOKENS_PER_BATCH = 4096
# The field of a table's schema metadata with what was counted of its held-out rows.
COUNTED = b"counted"


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Held-out rows as tokens of the target: those that have a label."""

    table: pa.Table
    found: PartTokens

    @classmethod
    def read(cls, config: RunConfig, examples: Artifact, parts: Sequence[str], tokenizer: Any) -> HeldOut:
        """Those of some parts. Raises DataError where the chat template refuses one that must not be dropped."""
        table = pa.concat_tables([read_evaluated(examples, part, config.evaluation.split) for part in parts]).combine_chunks()
        found = encode_table(tokenizer, table, RowLimit.of(config.target))
        check_refused(found.refused, config.examples)
        return cls(table.filter(pc.is_in(table["example_id"], found.example_ids)), found)

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """Each as a mapping; `response` is what should follow its last prompt."""
        rows: list[dict[str, Any]] = self.table.to_pylist()
        for number, row in enumerate(rows if "messages" in self.table.column_names else ()):
            row["response"] = last_answer(row, num_answers(self.found.tokens, self.found.owners, number))
        return rows


def last_answer(row: dict[str, Any], num_answers: int) -> str:
    """What the response to a row's last prompt should be: of a conversation the last of so many learned answers."""
    if row.get("messages") is None:
        return str(row["response"])
    messages = json.loads(row["messages"])
    answers = [one.get("content") or "" for one in messages if one["role"] == "assistant" and one.get("weight", 1) != 0]
    return str(answers[min(num_answers, len(answers)) - 1])


def evaluate_rows(
    model: Any,
    tokenizer: Any,
    held_out: HeldOut,
    config: RunConfig,
    generated_ids: frozenset[str],
    bert_score: BertScore | None = None,
) -> pa.Table:
    """The rows with `loss` (nats per response token), `num_response_tokens`, and for those of `generated_ids` whose answer can
    be verified `prediction` and `scores` (JSON); null where a row has none."""
    found, rows, precision = held_out.found, held_out.rows, config.target.precision
    tokens_per_batch = OFFLOADED_TOKENS_PER_BATCH if is_dispatched(model) else TOKENS_PER_BATCH
    losses = example_losses(model, found.tokens, tokens_per_batch=tokens_per_batch, precision=precision, owners=found.owners)
    predictions, scores = _answer(model, tokenizer, held_out, config, generated_ids, bert_score)
    columns = {
        "example_id": held_out.table["example_id"],
        "source": held_out.table["source"],
        "loss": pa.array(losses),
        "num_response_tokens": pa.array(found.num_labels),
        "prompt": held_out.table["prompt"],
        "reference": pa.array([row["response"] for row in rows], pa.string()),
        "prediction": pa.array(predictions, pa.string()),
        "scores": pa.array(scores, pa.string()),
    }
    counted = {COUNTED: json.dumps({"changed": found.changed, "refused": found.refused})}
    return pa.table(columns).replace_schema_metadata(counted)


def _answer(
    model: Any,
    tokenizer: Any,
    held_out: HeldOut,
    config: RunConfig,
    generated_ids: frozenset[str],
    bert_score: BertScore | None,
) -> tuple[list[str | None], list[str | None]]:
    """Generated responses and their scores as JSON, None where a row has none."""
    rows, found = held_out.rows, held_out.found
    predictions: list[str | None] = [None] * len(rows)
    scores: list[str | None] = [None] * len(rows)
    score = scorers(config)
    wanted = [i for i, row in enumerate(rows) if row["example_id"] in generated_ids] if score else []
    lasts = (np.searchsorted(found.owners, wanted, "right") - 1).tolist()  # of an example's several rows the last
    prompts = [generation_prompt(*found.tokens[row]) for row in lasts]
    ends = ends_of_answers(tokenizer, found.tokens)
    responses = generate(model, tokenizer, prompts, config.evaluation.max_new_tokens, ends)
    scored = {i: score(rows[i], text) if score else {} for i, text in zip(wanted, responses, strict=True)}
    answers = dict(zip(wanted, responses, strict=True))
    summaries = [i for i, of_row in scored.items() if "rougeL" in of_row]
    if summaries and bert_score is not None:
        alike = bert_score([answers[i] for i in summaries], [rows[i]["response"] for i in summaries])
        for i, value in zip(summaries, alike, strict=True):
            scored[i]["bert_score"] = value
    for i, of_row in scored.items():
        if of_row:
            predictions[i], scores[i] = answers[i], json.dumps(of_row)
    return predictions, scores
