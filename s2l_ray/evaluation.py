"""Evaluation: was the subset worth it? The target before and after, on rows that nothing was trained on.

Every model gets the held-out loss per response token, overall, by source and averaged over sources; exact-match accuracy
by greedy generation where an answer can be verified; ROUGE-L and BLEU where responses are summaries; and the tasks of
the lm-evaluation-harness that the config names.
"""

from __future__ import annotations

import functools
import io
import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from s2l_ray.config import EvaluationConfig, ReasoningGymDataset, RunConfig
from s2l_ray.errors import ConfigError, DataError
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
from s2l_ray.training.models import load_model, make_model, positions
from s2l_ray.training.token_parts import target_tokenizer
from s2l_ray.training.token_rows import TokenRows
from s2l_ray.training.tokens import encode_table, generation_prompt, learnable, row_counts

UNTRAINED = "untrained"
# The part name of a unit that runs the tasks of the lm-evaluation-harness.
TASKS = "tasks"
GENERATION_BATCH = 32
TOKENS_PER_BATCH = 4096
# What a unit says of its held-out rows: dropped and shortened ones, in its schema's metadata.
CHANGED = b"changed"


@dataclass(frozen=True)
class EvaluationJob:
    """What an evaluation worker needs."""

    config: RunConfig
    inputs: Mapping[str, Artifact]
    generated_ids: frozenset[str]
    """Held-out ids for which an answer is generated."""


def build(context: Context) -> Artifact:
    """Evaluate the untrained target, the one trained on the subset and the control; publish metrics and predictions."""
    config, inputs, draft = context.config, context.inputs, context.draft
    examples = inputs["examples"]
    workers = Workers.resolve(context.machines, one_per_cpu=True)
    models = [
        UNTRAINED,
        *(name for name, folder in MODEL_FOLDERS.items() if f"{folder}/{MODEL_RECORD}" in inputs["target"].manifest["files"]),
    ]
    parts = [part for part in examples.parts() if read_held_out(examples, part, ["example_id"]).num_rows]
    get_log("evaluation").info("%s on %d held-out examples", ", ".join(models), examples.summary["held_out"])
    job = EvaluationJob(config, inputs, choose_generated(config, examples, parts))
    units = [Unit(model, part) for model in models for part in [*parts, *([TASKS] if config.evaluation.tasks else [])]]
    do_units("evaluation", units, Evaluator, job, draft.work, workers)
    tables = {model: [_read_unit(draft, Unit(model, part)) for part in parts] for model in models}
    rows = {model: [row for table in tables[model] for row in _rows(table)] for model in models}
    metrics = {model: summarize(rows[model], config.evaluation) for model in models}
    for model in models if config.evaluation.tasks else []:
        metrics[model]["tasks"] |= json.loads(draft.work.read(Unit(model, TASKS).path))
    draft.write(METRICS, (json.dumps(metrics, indent=2) + "\n").encode())
    lines = [json.dumps(prediction(model, row), ensure_ascii=False) for model in models for row in rows[model] if row["scores"]]
    draft.write(PREDICTIONS, "".join(f"{line}\n" for line in lines).encode())
    changed = sum((Counter(json.loads(table.schema.metadata[CHANGED])) for table in tables[UNTRAINED]), Counter[str]())
    counts = Counter(row["source"] for row in rows[UNTRAINED])
    summary = {"rows": len(rows[UNTRAINED]), "sources": dict(sorted(counts.items())), "predictions": len(lines)}
    return draft.publish(summary | row_counts(changed), asdict(workers))


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


def summarize(rows: list[dict[str, Any]], config: EvaluationConfig) -> dict[str, Any]:
    """A model's metrics from its rows: losses in nats per response token, scores by source and over all."""
    by_source: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        by_source[row["source"]].append(row)
    losses = {source: _loss_per_token(group) for source, group in sorted(by_source.items())}
    tasks = {source: scores for source, group in sorted(by_source.items()) if (scores := _mean_scores(group))}
    if len(tasks) > 1 and not config.summary_sources:
        tasks["all"] = _mean_scores(rows)
    return {
        "loss_per_token": _loss_per_token(rows),
        "loss_by_source": losses,
        "loss_macro": float(np.mean(list(losses.values()))) if losses else None,
        "tasks": tasks,
    }


def _loss_per_token(rows: list[dict[str, Any]]) -> float | None:
    tokens = sum(row["num_response_tokens"] for row in rows)
    return sum(row["loss"] * row["num_response_tokens"] for row in rows) / tokens if tokens else None


def _mean_scores(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Means of the rows' scores, and BLEU over the summaries among them; empty where nothing was generated."""
    scored = [(row, json.loads(row["scores"])) for row in rows if row["scores"]]
    names = sorted({name for _, scores in scored for name in scores})
    means = {name: float(np.mean([scores[name] for _, scores in scored if name in scores])) for name in names}
    summaries = [row for row, scores in scored if "rougeL" in scores]
    if summaries:
        import sacrebleu

        references = [[row["reference"] for row in summaries]]
        means["bleu"] = float(sacrebleu.corpus_bleu([row["prediction"] for row in summaries], references).score)
    return means | ({"rows": len(scored)} if scored else {})


def prediction(model: str, row: dict[str, Any]) -> dict[str, Any]:
    """A line of predictions.jsonl."""
    kept = {name: row[name] for name in ("example_id", "source", "prompt", "reference", "prediction")}
    return {"model": model, **kept, "scores": json.loads(row["scores"])}


# --- scores --------------------------------------------------------------------------------------------------------


def pattern_score(pattern: str, response: str, reference: str) -> float | None:
    """1 if the last answer that `pattern` finds in the response is the reference's, else 0; None without a reference."""
    wanted = re.findall(pattern, reference)
    if not wanted:
        return None
    found = re.findall(pattern, response)
    return float(bool(found) and _canonical(found[-1]) == _canonical(wanted[-1]))


def _canonical(answer: str) -> str | float:
    """An answer without case, spaces, a final full stop and currency; a number as a number."""
    text = answer.strip().rstrip(".").strip().lower()
    try:
        return round(float(text.replace(",", "").removeprefix("$").removesuffix("%")), 6)
    except ValueError:
        return re.sub(r"\s+", " ", text)


def rouge_l(prediction: str, reference: str) -> float:
    """ROUGE-L F1 with stemming."""
    from rouge_score.rouge_scorer import RougeScorer

    return float(RougeScorer(["rougeL"], use_stemmer=True).score(reference, prediction)["rougeL"].fmeasure)


def scorers(config: RunConfig) -> Callable[[dict[str, Any], str], dict[str, float]] | None:
    """How a generated response to a row is scored, {metric: value}; None where nothing can be verified."""
    evaluation, dataset = config.evaluation, config.examples.dataset
    if isinstance(dataset, ReasoningGymDataset):
        from reasoning_gym.factory import get_score_answer_fn

        score_of = functools.cache(get_score_answer_fn)

        def by_task(row: dict[str, Any], response: str) -> dict[str, float]:
            entry = row["original"] | {"metadata": json.loads(row["original"]["metadata"])}
            return {"exact_match": float(score_of(row["source"])(response.strip(), entry) >= 1)}

        return by_task
    if evaluation.answer_pattern is None and not evaluation.summary_sources:
        return None

    def by_text(row: dict[str, Any], response: str) -> dict[str, float]:
        if row["source"] in evaluation.summary_sources:
            return {"rougeL": rouge_l(response, row["response"])}
        score = (
            None if evaluation.answer_pattern is None else pattern_score(evaluation.answer_pattern, response, row["response"])
        )
        return {} if score is None else {"exact_match": score}

    return by_text


# --- on a worker ---------------------------------------------------------------------------------------------------


class Evaluator(UnitWorker):
    """Evaluates one model at a time on parts of the held-out rows."""

    @cached_property
    def _tokenizer(self) -> Any:
        return target_tokenizer(self.job.config.target, self.job.inputs["proxy"])

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
        table, limit = read_held_out(self.job.inputs["examples"], part), config.target.max_tokens
        tokens, kept, changed = learnable(encode_table(self._tokenizer, table, limit), limit, self._tokenizer.eos_token_id)
        table = table.take(pa.array(kept))
        losses = example_losses(model, tokens, tokens_per_batch=TOKENS_PER_BATCH, precision=config.target.precision)
        rows = table.to_pylist()
        predictions, scores = self._answer(model, rows, tokens)
        columns = {
            "example_id": table["example_id"],
            "source": table["source"],
            "loss": pa.array(losses),
            "num_response_tokens": pa.array(tokens.num_labels),
            "prompt": table["prompt"],
            "reference": table["response"],
            "prediction": pa.array(predictions, pa.string()),
            "scores": pa.array(scores, pa.string()),
        }
        scored = pa.table(columns).replace_schema_metadata({CHANGED: json.dumps(changed)})
        return table_bytes(scored)

    def _answer(self, model: Any, rows: list[dict[str, Any]], tokens: TokenRows) -> tuple[list[str | None], list[str | None]]:
        """Generated responses and their scores as JSON, None where a row has none."""
        predictions: list[str | None] = [None] * len(rows)
        scores: list[str | None] = [None] * len(rows)
        score = scorers(self.job.config)
        wanted = [i for i, row in enumerate(rows) if row["example_id"] in self.job.generated_ids] if score else []
        prompts = [generation_prompt(*tokens[i]) for i in wanted]
        responses = generate(model, self._tokenizer, prompts, self.job.config.evaluation.max_new_tokens)
        for i, response in zip(wanted, responses, strict=True):
            found = score(rows[i], response) if score else {}
            if found:
                predictions[i], scores[i] = response, json.dumps(found)
        return predictions, scores


def generate(model: Any, tokenizer: Any, prompts: list[list[int]], max_new_tokens: int) -> list[str]:
    """Greedy continuations of tokenised prompts, in batches of similar length, padded on the left."""
    import torch

    responses = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), GENERATION_BATCH):
        rows = order[start : start + GENERATION_BATCH]
        longest = max(len(prompts[i]) for i in rows)
        padding = [longest - len(prompts[i]) for i in rows]
        ids = torch.tensor([[tokenizer.pad_token_id] * pad + prompts[i] for i, pad in zip(rows, padding, strict=True)])
        mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in padding])
        room = max(1, (positions(model) or sys.maxsize) - longest)
        with torch.inference_mode():
            made = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=min(max_new_tokens, room),
                do_sample=False,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        for i, text in zip(rows, tokenizer.batch_decode(made[:, longest:], skip_special_tokens=True), strict=True):
            responses[i] = text
    return responses


def run_tasks(model: Any, tokenizer: Any, tasks: list[str]) -> dict[str, dict[str, float]]:
    """Zero-shot results of the lm-evaluation-harness, {task: {metric: value}}.

    Raises ConfigError where the harness is not installed or knows no such task.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ConfigError("evaluation.tasks needs the lm-evaluation-harness: pip install 's2l_ray[lm-eval]'") from error
    try:
        results = lm_eval.simple_evaluate(HFLM(pretrained=model, tokenizer=tokenizer), tasks=tasks, num_fewshot=0)["results"]
    except (KeyError, ValueError) as error:
        raise ConfigError(f"evaluation.tasks={tasks}: {error}") from error
    except OSError as error:
        raise DataError(f"evaluation.tasks={tasks}: the task's data cannot be read ({error})") from error
    return {
        task: {name.partition(",")[0]: float(value) for name, value in found.items() if isinstance(value, float)}
        for task, found in results.items()
    }
