"""How a generated answer or summary is scored, and what a model's metrics are made of.

Numbers are compared as numbers of one convention, to six decimals: `1234`, `1,234`, `1,234.50`, `.5`, `1.5e3`. The point is
the decimal mark, a comma separates thousands and stands only where thousands end, so that `1,2` is a text, and so are `0,5`,
`1/2`, `1_000`, `0x10`, `nan` and `inf`. A `$` before a number and a `%` behind it do not count; the minus sign U+2212 and
full-width characters are taken for the ASCII ones. Everything else is compared as text without regard to case, to the amount
of space, and to full stops at its end.
"""

from __future__ import annotations

import functools
import json
import re
from collections import defaultdict
from collections.abc import Callable, Collection
from decimal import Context, Decimal
from typing import Any

import numpy as np

from s2l_ray.config import EvaluationConfig, ReasoningGymDataset, RunConfig

# The full-width forms of ASCII's characters (U+FF01 to U+FF5E), and the minus sign.
_ASCII = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x2212: "-"}
_NUMBER = re.compile(
    r"(?P<sign>[+-]?)(?:\$ ?)?(?P<inner>[+-]?)"
    r"(?P<digits>(?:[0-9]+|[1-9][0-9]{0,2}(?:,[0-9]{3})+)(?:\.[0-9]*)?|\.[0-9]+)(?P<exponent>e[+-]?[0-9]{1,3})? ?%?"
)
_DECIMALS = Decimal("0.000001")


def pattern_score(pattern: str, response: str, reference: str) -> float | None:
    """1 if the last answer that `pattern` finds in the response is the reference's last one, else 0.

    None where it finds none in the reference. What counts as equal: see the module docstring.
    """
    wanted = re.findall(pattern, reference)
    if not wanted:
        return None
    found = re.findall(pattern, response)
    return float(bool(found) and canonical(found[-1]) == canonical(wanted[-1]))


def canonical(answer: str) -> str | Decimal:
    """What two equal answers have in common: a number as a number to six decimals, a text folded."""
    text = re.sub(r"\s+", " ", answer.translate(_ASCII)).strip().rstrip(".").strip().lower()
    match = _NUMBER.fullmatch(text)
    if match is None or (match["sign"] and match["inner"]):
        return text
    number = Decimal(match["sign"] + match["inner"] + match["digits"].replace(",", "") + (match["exponent"] or ""))
    # As many digits as it takes: a thousand for the exponent. No number is rounded before its seventh decimal.
    return Context(prec=len(text) + 1010).quantize(number, _DECIMALS)


def rouge_l(prediction: str, reference: str) -> float:
    """ROUGE-L F1 with stemming, 0 to 1."""
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
    pattern, summary_sources = evaluation.answer_pattern, evaluation.summary_sources
    if pattern is None and not summary_sources:
        return None

    def by_text(row: dict[str, Any], response: str) -> dict[str, float]:
        if row["source"] in summary_sources:
            return {"rougeL": rouge_l(response, row["response"])}
        score = None if pattern is None else pattern_score(pattern, response, row["response"])
        return {} if score is None else {"exact_match": score}

    return by_text


# --- a model's metrics ---------------------------------------------------------------------------------------------


def summarize(
    rows: list[dict[str, Any]], config: EvaluationConfig, harness: dict[str, dict[str, float]] | None = None
) -> dict[str, Any]:
    """A model's metrics from its rows: losses in nats per response token (None without rows), scores by source and over all,
    and the results of the lm-evaluation-harness.

    No two scores share a name. Sources keep theirs; the scores over all rows are `all`, or `all sources` where a source is
    called `all`; a task of the harness that is called like one of these gets `lm-eval: ` before its name.
    """
    by_source: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        by_source[row["source"]].append(row)
    losses = {source: _loss_per_token(group) for source, group in sorted(by_source.items())}
    tasks = {source: scores for source, group in sorted(by_source.items()) if (scores := _mean_scores(group))}
    if len(tasks) > 1 and not config.summary_sources:
        tasks[_free_name("all", "{} sources", losses)] = _mean_scores(rows)
    for task, metrics in (harness or {}).items():
        tasks[_free_name(task, "lm-eval: {}", {*losses, *tasks})] = metrics
    return {
        "loss_per_token": _loss_per_token(rows),
        "loss_by_source": losses,
        "loss_macro": float(np.mean(list(losses.values()))) if losses else None,
        "tasks": tasks,
    }


def _free_name(name: str, other: str, taken: Collection[str]) -> str:
    """The name, or as often as it is taken the `other` one that is made of it."""
    while name in taken:
        name = other.format(name)
    return name


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
