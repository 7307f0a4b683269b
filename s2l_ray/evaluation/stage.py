"""Evaluation: was the subset worth it? The target before and after, on rows that nothing was trained on.

Every model gets the held-out loss per response token, overall, by source and averaged over sources; exact-match accuracy
by greedy generation where an answer can be verified; ROUGE-L, BLEU and, with a model for it, BERTScore where responses are
summaries; and the tasks of the lm-evaluation-harness that the config names.
"""

from __future__ import annotations

import io
import json
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from s2l_ray.config import RunConfig
from s2l_ray.config.recipes import predicts_texts
from s2l_ray.evaluation.bert_scores import BertScore
from s2l_ray.evaluation.generation import run_tasks
from s2l_ray.evaluation.held_out import COUNTED, HeldOut, evaluate_rows
from s2l_ray.evaluation.scores import summarize
from s2l_ray.evaluation.sharding import Sharding, held_precision, resolve_sharding
from s2l_ray.evaluation.shares import ShareJob, do_units_together
from s2l_ray.examples.ids import priorities
from s2l_ray.examples.reading import read_evaluated
from s2l_ray.progress import get_log
from s2l_ray.runtime.pool import Unit, UnitWorker, do_units
from s2l_ray.storage.artifacts import Artifact
from s2l_ray.storage.drafts import Draft, table_bytes
from s2l_ray.storage.layout import METRICS, MODEL_FOLDERS, MODEL_RECORD, PREDICTIONS, ROW_LOSSES
from s2l_ray.storage.stages import Context
from s2l_ray.training.models import Held, load_model, make_model
from s2l_ray.training.token_pools import row_counts
from s2l_ray.training.tokenizers import target_tokenizer
from s2l_ray.training.tokens import RefusedExample
from s2l_ray.training.zero_inference import inference_config

UNTRAINED = "untrained"
# The part name of a unit that runs the tasks of the lm-evaluation-harness.
TASKS = "tasks"
_log = get_log("evaluation")


@dataclass(frozen=True)
class EvaluationJob:
    """What an evaluation worker needs."""

    config: RunConfig
    inputs: Mapping[str, Artifact]
    generated_ids: frozenset[str]
    """Held-out ids for which an answer is generated."""

    sharding: Sharding = field(default_factory=Sharding)


def build(context: Context) -> Artifact:
    """Evaluate the untrained target, the one trained on the subset and the control; publish metrics and predictions.

    Without held-out rows the losses are None, no answer is generated, and only the harness's tasks are measured.
    """
    config, inputs, draft = context.config, context.inputs, context.draft
    examples, published = inputs["examples"], inputs["target"].manifest["files"]
    sharding, workers = resolve_sharding(config, context.machines, inputs["target"].summary.get("num_parameters", 0))
    models = [UNTRAINED, *(name for name, folder in MODEL_FOLDERS.items() if f"{folder}/{MODEL_RECORD}" in published)]
    parts = evaluated_parts(config, examples)
    _log.info("%s on %d held-out examples", ", ".join(models), examples.summary["held_out"])
    job = EvaluationJob(config, inputs, choose_generated(config, examples, parts), sharding)
    units = [Unit(model, part) for model in models for part in [*parts, *([TASKS] if config.evaluation.tasks else [])]]
    if units and sharding.kind == "zero3":
        do_units_together(ShareJob(Evaluator, job, units, draft.work, workers, held_precision(config.target)))
    elif units:
        do_units("evaluation", units, Evaluator, job, draft.work, workers)
    return draft.publish(_write_results(context, models, parts), asdict(workers) | {"sharding": asdict(sharding)})


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
    if rows[UNTRAINED]:
        draft.write_table(
            ROW_LOSSES, pa.concat_tables(_row_losses(model, table) for model in models for table in tables[model])
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


def _row_losses(model: str, table: pa.Table) -> pa.Table:
    """A model's losses, row by row: what two models are compared by."""
    columns = table.select(["example_id", "source", "loss", "num_response_tokens"]).replace_schema_metadata(None)
    return columns.add_column(0, "model", pa.array([model] * len(table), pa.string()))


def _rows(table: pa.Table) -> Iterator[dict[str, Any]]:
    """A unit's rows; texts only of those that were scored, of which there are few."""
    has_scores = table["scores"].is_valid()
    yield from table.filter(has_scores).to_pylist()
    for row in table.filter(pc.invert(has_scores)).select(["source", "loss", "num_response_tokens"]).to_pylist():
        yield row | {"scores": None}


def evaluated_parts(config: RunConfig, examples: Artifact) -> list[str]:
    """The parts of the examples with rows to evaluate on."""
    split = config.evaluation.split
    return [part for part in examples.parts() if read_evaluated(examples, part, split, ["example_id"]).num_rows]


def choose_generated(config: RunConfig, examples: Artifact, parts: list[str]) -> frozenset[str]:
    """The held-out ids to generate answers for: of every source the `max_generations` of lowest priority."""
    chosen: set[str] = set()
    split = config.evaluation.split
    tables = [read_evaluated(examples, part, split, ["example_id", "source"]) for part in parts]
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


# --- on a worker ---------------------------------------------------------------------------------------------------


class Evaluator(UnitWorker):
    """Evaluates one model at a time on parts of the held-out rows."""

    @cached_property
    def _tokenizer(self) -> Any:
        return target_tokenizer(self.job.config.target, self.job.inputs["proxy"])

    @cached_property
    def _files(self) -> tempfile.TemporaryDirectory[str]:
        return tempfile.TemporaryDirectory()

    @cached_property
    def _bert_score(self) -> BertScore | None:
        name = self.job.config.evaluation.bert_score_model
        return None if name is None else BertScore(name, self.device)

    def load(self, model: str) -> Any:
        import torch

        target, number = self.job.config.target, torch.cuda.device_count() if self.device.type == "cuda" else 0
        files = Path(self._files.name) / model  # of one that is spread
        sharding, precision = self.job.sharding, held_precision(target)
        shares = inference_config(precision) if sharding.kind == "zero3" else None
        held = Held(precision, sharding.max_memory(number), shares, files)
        if model == UNTRAINED:
            return make_model(target, self._tokenizer, held)
        folder = self.job.inputs["target"].folder(MODEL_FOLDERS[model])
        return load_model(folder, self._tokenizer, trust_remote_code=target.trust_remote_code, held=held)

    def work_on(self, part: str, models: Mapping[str, Any]) -> Iterator[tuple[str, bytes]]:
        for name, model in models.items():
            yield name, self._evaluate(part, model)

    def _evaluate(self, part: str, model: Any) -> bytes:
        if part == TASKS:
            return json.dumps(run_tasks(model, self._tokenizer, self.job.config.evaluation.tasks)).encode()
        held_out = HeldOut.read(self.job.config, self.job.inputs["examples"], [part], self._tokenizer)
        scored = evaluate_rows(model, self._tokenizer, held_out, self.job.config, self.job.generated_ids, self._bert_score)
        return table_bytes(scored)
