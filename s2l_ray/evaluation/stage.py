"""Evaluation: was the subset worth it? The target before and after, on rows that nothing was trained on.

Every model gets the held-out loss per response token, overall, by source and averaged over sources; exact-match accuracy
by greedy generation where an answer can be verified; ROUGE-L, BLEU and, with a model for it, BERTScore where responses are
summaries; and the tasks of the lm-evaluation-harness that the config names.
"""

from __future__ import annotations

import io
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from s2l_ray.config import RunConfig
from s2l_ray.config.recipes import predicts_texts
from s2l_ray.evaluation.bert_scores import BertScore
from s2l_ray.evaluation.generation import generate, run_tasks
from s2l_ray.evaluation.scores import scorers, summarize
from s2l_ray.examples.ids import priorities
from s2l_ray.examples.reading import read_held_out
from s2l_ray.progress import get_log
from s2l_ray.runtime.pool import Unit, UnitWorker, do_units
from s2l_ray.runtime.workers import Workers
from s2l_ray.storage.artifacts import Artifact
from s2l_ray.storage.drafts import Draft, table_bytes
from s2l_ray.storage.layout import METRICS, MODEL_FOLDERS, MODEL_RECORD, PREDICTIONS
from s2l_ray.storage.stages import Context
from s2l_ray.training.losses import example_losses
from s2l_ray.training.models import load_model, make_model
from s2l_ray.training.token_pools import check_refused, row_counts
from s2l_ray.training.token_rows import RowLimit
from s2l_ray.training.tokenizers import target_tokenizer
from s2l_ray.training.tokens import PartTokens, RefusedExample, encode_table, generation_prompt, num_answers

UNTRAINED = "untrained"
# The part name of a unit that runs the tasks of the lm-evaluation-harness.
TASKS = "tasks"
TOKENS_PER_BATCH = 4096
# The field of a unit's schema metadata with what was counted of its held-out rows.
COUNTED = b"counted"
_log = get_log("evaluation")


@dataclass(frozen=True)
class EvaluationJob:
    """What an evaluation worker needs."""

    config: RunConfig
    inputs: Mapping[str, Artifact]
    generated_ids: frozenset[str]
    """Held-out ids for which an answer is generated."""


def build(context: Context) -> Artifact:
    """Evaluate the untrained target, the one trained on the subset and the control; publish metrics and predictions.

    Without held-out rows the losses are None, no answer is generated, and only the harness's tasks are measured.
    """
    config, inputs, draft = context.config, context.inputs, context.draft
    examples, published = inputs["examples"], inputs["target"].manifest["files"]
    workers = Workers.resolve(context.machines, one_per_cpu=True)
    models = [UNTRAINED, *(name for name, folder in MODEL_FOLDERS.items() if f"{folder}/{MODEL_RECORD}" in published)]
    parts = [part for part in examples.parts() if read_held_out(examples, part, ["example_id"]).num_rows]
    _log.info("%s on %d held-out examples", ", ".join(models), examples.summary["held_out"])
    job = EvaluationJob(config, inputs, choose_generated(config, examples, parts))
    units = [Unit(model, part) for model in models for part in [*parts, *([TASKS] if config.evaluation.tasks else [])]]
    if units:
        do_units("evaluation", units, Evaluator, job, draft.work, workers)
    return draft.publish(_write_results(context, models, parts), asdict(workers))


def _write_results(context: Context, models: list[str], parts: list[str]) -> dict[str, Any]:
    """Write metrics and predictions from the files of the units; the manifest's summary."""
    evaluation, draft = context.section, context.draft
    tables = {model: [_read_unit(draft, Unit(model, part)) for part in parts] for model in models}
    rows = {model: [row for table in tables[model] for row in _rows(table)] for model in models}
    if not rows[UNTRAINED]:
        _log.warning(
            "there is no held-out row with a response token, so no loss and no answer is measured: "
            "raise examples.held_out_fraction, or target.max_tokens where prompts alone are that long"
        )
    metrics = {}
    for model in models:
        harness = json.loads(draft.work.read(Unit(model, TASKS).path)) if evaluation.tasks else None
        metrics[model] = summarize(rows[model], evaluation, harness)
    draft.write(METRICS, (json.dumps(metrics, indent=2) + "\n").encode())
    with_texts = predicts_texts(context.config)
    found = [prediction(model, row, with_texts) for model in models for row in rows[model] if row["scores"]]
    lines = [json.dumps(line, ensure_ascii=False) for line in found]
    draft.write(PREDICTIONS, "".join(f"{line}\n" for line in lines).encode())
    counted = [json.loads(table.schema.metadata[COUNTED]) for table in tables[UNTRAINED]]
    changed = sum((Counter(found["changed"]) for found in counted), Counter[str]())
    refused = [RefusedExample(*one) for found in counted for one in found["refused"]]
    counts = Counter(row["source"] for row in rows[UNTRAINED])
    summary = {"rows": len(rows[UNTRAINED]), "sources": dict(sorted(counts.items())), "predictions": len(lines)}
    return summary | row_counts(changed, refused)


def _read_unit(draft: Draft, unit: Unit) -> pa.Table:
    return pq.read_table(io.BytesIO(draft.work.read(unit.path)))


def _rows(table: pa.Table) -> Iterator[dict[str, Any]]:
    """A unit's rows; texts only of those that were scored, of which there are few."""
    has_scores = table["scores"].is_valid()
    yield from table.filter(has_scores).to_pylist()
    for row in table.filter(pc.invert(has_scores)).select(["source", "loss", "num_response_tokens"]).to_pylist():
        yield row | {"scores": None}


def choose_generated(config: RunConfig, examples: Artifact, parts: list[str]) -> frozenset[str]:
    """The held-out ids to generate answers for: of every source the `max_generations` of lowest priority."""
    chosen: set[str] = set()
    tables = [read_held_out(examples, part, ["example_id", "source"]) for part in parts]
    by_source: dict[str, list[str]] = defaultdict(list)
    for table in tables:
        for example_id, source in zip(table["example_id"].to_pylist(), table["source"].to_pylist(), strict=True):
            by_source[source].append(example_id)
    for ids in by_source.values():
        first = np.argsort(priorities(ids, "generation"), kind="stable")[: config.evaluation.max_generations]
        chosen |= {ids[int(row)] for row in first}
    return frozenset(chosen)


def prediction(model: str, row: dict[str, Any], with_texts: bool) -> dict[str, Any]:
    """A line of predictions.jsonl; without texts it says which example got which score, and no more."""
    names = ("example_id", "source", *(("prompt", "reference", "prediction") if with_texts else ()))
    kept = {name: row[name] for name in names}
    return {"model": model, **kept, "scores": json.loads(row["scores"])}


def last_answer(row: dict[str, Any], num_answers: int) -> str:
    """What the response to a row's last prompt should be: of a conversation the last of so many learned answers."""
    if row.get("messages") is None:
        return str(row["response"])
    messages = json.loads(row["messages"])
    answers = [one.get("content") or "" for one in messages if one["role"] == "assistant" and one.get("weight", 1) != 0]
    return str(answers[min(num_answers, len(answers)) - 1])


# --- on a worker ---------------------------------------------------------------------------------------------------


class Evaluator(UnitWorker):
    """Evaluates one model at a time on parts of the held-out rows."""

    @cached_property
    def _tokenizer(self) -> Any:
        return target_tokenizer(self.job.config.target, self.job.inputs["proxy"])

    @cached_property
    def _bert_score(self) -> BertScore | None:
        name = self.job.config.evaluation.bert_score_model
        return None if name is None else BertScore(name, self.device)

    def load(self, model: str) -> Any:
        target = self.job.config.target
        if model == UNTRAINED:
            return make_model(target, self._tokenizer)
        folder = self.job.inputs["target"].folder(MODEL_FOLDERS[model])
        return load_model(folder, self._tokenizer, trust_remote_code=target.trust_remote_code)

    def work_on(self, part: str, models: Mapping[str, Any]) -> Iterator[tuple[str, bytes]]:
        for name, model in models.items():
            yield name, self._evaluate(part, model)

    def _evaluate(self, part: str, model: Any) -> bytes:
        if part == TASKS:
            return json.dumps(run_tasks(model, self._tokenizer, self.job.config.evaluation.tasks)).encode()
        config: RunConfig = self.job.config
        table = read_held_out(self.job.inputs["examples"], part)
        found = encode_table(self._tokenizer, table, RowLimit.of(config.target))
        check_refused(found.refused, config.examples)
        table = table.filter(pc.is_in(table["example_id"], found.example_ids))
        losses = example_losses(
            model, found.tokens, tokens_per_batch=TOKENS_PER_BATCH, precision=config.target.precision, owners=found.owners
        )
        rows = table.to_pylist()
        for number, row in enumerate(rows if "messages" in table.column_names else ()):
            row["response"] = last_answer(row, num_answers(found.tokens, found.owners, number))
        predictions, scores = self._answer(model, rows, found)
        columns = {
            "example_id": table["example_id"],
            "source": table["source"],
            "loss": pa.array(losses),
            "num_response_tokens": pa.array(found.num_labels),
            "prompt": table["prompt"],
            "reference": pa.array([row["response"] for row in rows], pa.string()),
            "prediction": pa.array(predictions, pa.string()),
            "scores": pa.array(scores, pa.string()),
        }
        scored = pa.table(columns).replace_schema_metadata(
            {COUNTED: json.dumps({"changed": found.changed, "refused": found.refused})}
        )
        return table_bytes(scored)

    def _answer(self, model: Any, rows: list[dict[str, Any]], found: PartTokens) -> tuple[list[str | None], list[str | None]]:
        """Generated responses and their scores as JSON, None where a row has none."""
        predictions: list[str | None] = [None] * len(rows)
        scores: list[str | None] = [None] * len(rows)
        score = scorers(self.job.config)
        wanted = [i for i, row in enumerate(rows) if row["example_id"] in self.job.generated_ids] if score else []
        lasts = (np.searchsorted(found.owners, wanted, "right") - 1).tolist()  # of an example's several rows the last
        prompts = [generation_prompt(*found.tokens[row]) for row in lasts]
        responses = generate(model, self._tokenizer, prompts, self.job.config.evaluation.max_new_tokens)
        scored = {i: score(rows[i], text) if score else {} for i, text in zip(wanted, responses, strict=True)}
        answers = dict(zip(wanted, responses, strict=True))
        summaries = [i for i, of_row in scored.items() if "rougeL" in of_row]
        if summaries and self._bert_score is not None:
            alike = self._bert_score([answers[i] for i in summaries], [rows[i]["response"] for i in summaries])
            for i, value in zip(summaries, alike, strict=True):
                scored[i]["bert_score"] = value
        for i, of_row in scored.items():
            if of_row:
                predictions[i], scores[i] = answers[i], json.dumps(of_row)
        return predictions, scores
