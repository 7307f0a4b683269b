"""The sections of what comes from the corpus and the losses: examples, trajectories, clustering, selection, evaluation."""

from __future__ import annotations

import contextlib
import string
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from s2l_ray.config.generated import MimicRadiologyDataset, ReasoningGymDataset
from s2l_ray.config.methods import FOLLOW_S2L, OF_S2L_ALONE, Method
from s2l_ray.config.section import Fraction, Positive, Precision, Section

FORMATS = {".jsonl": "lines", ".ndjson": "lines", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet"}
"""How a file of a corpus is read, by its suffix."""
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
"""What may follow such a suffix, but for Parquet, which compresses itself."""


class ExamplesConfig(Section):
    """Where the corpus is and which of its fields are prompt, response and source."""

    dataset: str | list[str] | ReasoningGymDataset | MimicRadiologyDataset
    """Files (JSON Lines, JSON, CSV, Parquet; compressed or not), directories, globs or URIs of them; `FOLDER/#NAME` for a
    dataset of LLaMA-Factory's `dataset_info.json` in that folder; a Hub dataset id; an embedded reasoning-gym corpus; or
    MIMIC-III's radiology reports. A relative path is taken from where the command runs."""

    revision: str | None = None
    """Commit, tag or branch of a Hub dataset. Give a commit: a branch moves."""

    subset: str | None = None
    """Configuration name of a Hub dataset (such as GSM8K's `main`)."""

    split: str = "train"
    """Split of a Hub dataset."""

    id_field: str | None = None
    """Field with a unique id (string or integer). Without it an id is made from the content (prompt and response)."""

    prompt_field: str = "prompt"
    """Field with the prompt; not read where `prompt_template` or `messages_field` is given."""

    prompt_template: str | None = None
    """Template over the row's fields, such as `"{instruction}\\n{input}\\n"`."""

    prompt_template_if_empty: str | None = None
    """Template used instead for rows in which a field of `prompt_template` is empty (Alpaca's form without input)."""

    response_field: str = "response"
    """Field with the response that is learned."""

    messages_field: str | None = None
    """Field with a conversation: a list of messages (`role`/`content` or ShareGPT's `from`/`value`), or its JSON text.
    Every message of the assistant is learned, but for those marked otherwise (`weight: 0`, `train: false`)."""

    tools_field: str | None = None
    """Field with the tools that a conversation may call; without it the row's `tools` or `functions`, if it has one. Empty:
    there are none, whatever these fields hold."""

    system_field: str | None = None
    """Field with a system message that goes before the prompt or the conversation, where the row has one."""

    history_field: str | None = None
    """Field with earlier turns, a list of [prompt, response] (LLaMA-Factory's Alpaca form): they are learned, too."""

    source_field: str | None = None
    """Field that names the sub-dataset a row comes from; without it every row's source is the file's name."""

    where: dict[str, Any] = Field(default_factory=dict)
    """Keep only the rows whose field equals the value, or one of the values: `{split: train}`."""

    held_out_fraction: Fraction = 0.02
    """Share of the prompts kept for evaluation, chosen by a hash of the prompt with its numbers masked, so that
    near-copies of one prompt stay on one side. Split off before the budget is counted."""

    held_out_per_source: int = Field(0, ge=0)
    """At least so many rows of every source are held out: beyond `held_out_fraction`, the prompts with the lowest hashes, but
    no prompt that would take more than half of the source. A prompt that is held out for one source is held out for all."""

    validation_fraction: Fraction = 0.0
    """Share of the prompts kept for tuning (learning rates, say), chosen by the highest hashes: so it changes no held-out row.
    They are in no budget, and no stage trains or evaluates on them."""

    on_bad_row: Literal["error", "drop"] = "error"
    """What a row that cannot be read or understood does: stop the run with a message that names it, or be dropped and
    counted by reason and source. A row that the tokenizer's chat template refuses counts as one, too."""

    max_dropped: Fraction = 0.1
    """With `on_bad_row: drop`: the largest share of the rows that may be dropped so; beyond it the run is refused."""

    rows_per_part: Positive | Literal["auto"] = "auto"
    """Rows in one part, the unit of restart; auto: 512 up to half a million rows, then so that there are about 1,000
    parts."""

    @property
    def sources_are_files(self) -> bool:
        """Whether rows take the name of their file for a source."""
        return self.source_field is None and not isinstance(self.dataset, ReasoningGymDataset)

    @model_validator(mode="after")
    def _templates_name_plain_fields(self) -> ExamplesConfig:
        for name in ("prompt_template", "prompt_template_if_empty"):
            template = getattr(self, name)
            if template is not None:
                template_fields(template)
        if self.prompt_template_if_empty is not None and self.prompt_template is None:
            raise ValueError("prompt_template_if_empty needs prompt_template, too")
        return self

    @model_validator(mode="after")
    def _some_rows_are_left(self) -> ExamplesConfig:
        if self.held_out_fraction + self.validation_fraction >= 1:
            raise ValueError(
                "held_out_fraction and validation_fraction leave nothing to choose from: give less than 1 together"
            )
        return self


def template_fields(template: str) -> list[str]:
    """The field names in a prompt template, in order.

    Raises ValueError for anything but plain names: a template must not reach into Python objects.
    """
    try:
        fields = [field for _, field, _, _ in string.Formatter().parse(template) if field is not None]
    except ValueError as error:
        raise ValueError(f"not a template: {error}. Write a literal brace twice: {{{{ }}}}") from error
    for field in fields:
        if not field.replace("-", "_").isidentifier():
            raise ValueError(f"'{{{field}}}' is not a plain field name")
    return fields


class TrajectoriesConfig(Section):
    """How the losses are computed."""

    precision: Precision = "float32"
    """Arithmetic of the forward pass; the cross-entropy is always float32."""

    tokens_per_batch: Positive = 4096
    """Padded tokens per forward pass. Part of the recipe: the shape of a matrix product decides a loss's last bit."""

    statistics: bool = False
    """Record beside each loss, which is the mean over a response's tokens, also their standard deviation and the means of their
    first and last third: for `clustering.features: profile`. The losses stay the same, and the scoring pass too."""

    without_prompt: bool = False
    """Record under the last checkpoint also the loss of each response without its prompt, for instruction-following difficulty
    (the loss over that without the prompt; arXiv 2308.12032): a pass over the responses. An answer of a conversation is scored
    without the turns before it."""

    embeddings: bool = False
    """Record under the last checkpoint also an embedding of each example, of the validation split's too: the mean of the last
    hidden states, token i with weight i, for RDS+ (arXiv 2503.01807). A pass over the corpus, and 4 bytes a hidden unit and
    example."""


class ClusteringConfig(Section):
    """How the trajectories are grouped."""

    num_clusters: Positive = 100
    """K (paper: 100). In each stratum where `stratify_by` names a column (the reference code); with `stratify_by: auto` in all,
    shared over the sources by their rows and at least one each: a corpus that happens to name its sources gets about the
    groups that were asked for, and its small sources no groups of one row. Capped by the rows, with a log line."""

    levels: list[Positive] | None = None
    """Groups of groups: `[1000, 100, 20]` makes 1,000 groups of the rows, 100 of the centroids of these and 20 of the centroids
    of those (Vo et al. 2024, arXiv 2405.15613), and the budget is shared from the top down. So shares follow the space that
    trajectories fill, and not how many lie where. The first number is `num_clusters`."""

    features: Literal["raw", "reduction", "shape", "whitened", "profile"] = "raw"
    """What k-means sees: the losses (raw, the paper), their drop since the first point (reduction), what is left without
    their level (shape), their principal components scaled to unit variance (whitened), or the losses with the statistics that
    `trajectories.statistics` records, each of the four divided by one number for all its points, so that its variance is one
    on average over them (profile)."""

    points: list[int] | None = None
    """Which points of the trajectories k-means sees, counted from 0, from the end if negative, such as [0, 3, -1]; null: all.
    For ablations: their order is that of the training, however they are written."""

    num_iterations: Positive = 20
    """Lloyd iterations at most (paper: 20); they stop early when no row changes its group."""

    tolerance: Annotated[float, Field(ge=0)] = 0.0
    """They also stop when the centroids' squared moves add up to this share of the features' mean variance
    (scikit-learn's `tol`); 0: only when no row changes its group."""

    training_rows: Positive | None = None
    """Train on so many rows of lowest priority (in each stratum) and only assign the others; without it on all rows."""

    num_restarts: Positive = 3
    """Initialisations tried; the one with the lowest inertia on the sample is kept."""

    stratify_by: str | None = "auto"
    """Column, such as `source`, within whose values the groups are made (the reference code: source); null: none. auto: by
    source where the corpus names several, else none. Files without `examples.source_field` name sources by their own names,
    if these differ in more than numbers: shards of one corpus are no sources."""

    seed: int = 0
    """Seed of the initialisation."""

    @model_validator(mode="before")
    @classmethod
    def _levels_begin_with_the_groups(cls, values: Any) -> Any:
        levels = values.get("levels") if isinstance(values, dict) else None
        if isinstance(levels, list | tuple) and levels:
            if values.get("num_clusters", levels[0]) != levels[0]:
                raise ValueError(
                    f"levels={list(levels)} begins with the groups of the rows, but num_clusters={values['num_clusters']}. "
                    "Leave num_clusters out"
                )
            return values | {"num_clusters": levels[0]}
        return values

    @field_validator("points")
    @classmethod
    def _points_are_some(cls, points: list[int] | None) -> list[int] | None:
        if points is not None and len(set(points)) < max(1, len(points)):
            raise ValueError(f"expected points of the trajectories, one at least and none twice, such as [0, 3, -1]: {points}")
        return points

    @field_validator("levels")
    @classmethod
    def _levels_descend(cls, levels: list[int] | None) -> list[int] | None:
        if levels is not None and (len(levels) < 2 or sorted(set(levels), reverse=True) != levels):
            raise ValueError(f"expected numbers, each smaller than the one before, such as [1000, 100, 20]: {levels}")
        return levels

    @model_validator(mode="after")
    def _trains_on_enough(self) -> ClusteringConfig:
        if self.training_rows is not None and self.training_rows < self.num_clusters:
            raise ValueError(f"training_rows={self.training_rows} is fewer than num_clusters={self.num_clusters}. Raise it")
        return self


class SelectionConfig(Section):
    """How many examples, and how they are sampled from the groups."""

    method: Method = "s2l"
    """How the subset is chosen. s2l: shares of every group, small groups first (METHOD: water-filling). The others, which
    `s2l compare --arms` explains, are its rivals: with them what follows but the budgets and the seed has no effect and is
    refused."""

    allocation: Annotated[float, Field(ge=0, le=1)] = 0.0
    """A group's quota grows with its size to this power, capped by its size. 0: equal shares (the paper); 1: shares as in the
    pool, stratified sampling, whose mean over the subset never varies more than a random subset's; between them temperature
    sampling."""

    allocation_of_strata: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The same for strata. 0: each source alike (the reference code); 1: as in the pool."""

    draw: Literal["random", "central", "spread"] = "random"
    """Which rows of a group: those of lowest priority (random, the paper); those nearest to its centroid (central); or of as
    many groups of its own rows as it gives rows the most central one each (spread). Only `random` is a sample: the others
    are for comparison, and their weights make no estimate unbiased. `spread` knows one budget in examples and holds all
    features in memory."""

    budget: int | float | dict[Literal["tokens"], Positive]
    """An integer is examples, a decimal below 1 a fraction of the pool, `{tokens: n}` response tokens."""

    more_budgets: list[int | float | dict[Literal["tokens"], Positive]] = Field(default_factory=list)
    """Further budgets of the same order, each in a file of its own: of two subsets one contains the other."""

    min_per_source: Annotated[int, Field(ge=0)] = 0
    """So many examples of each source at least (or all it has): its lowest priorities are taken before all others."""

    defer_groups_up_to: Annotated[int, Field(ge=0)] = 0
    """Groups of at most this size are served last (the reference code: 2)."""

    seed: int = 0
    """Seed of the priorities inside a group."""

    @model_validator(mode="after")
    def _others_have_no_groups(self) -> SelectionConfig:
        given = [name for name in OF_S2L_ALONE if getattr(self, name) != type(self).model_fields[name].default]
        if self.method not in FOLLOW_S2L and given:
            raise ValueError(f"method={self.method} has no use for {', '.join(given)}. Leave that out, or choose method=s2l")
        if self.method != "s2l" and self.draw == "spread":
            raise ValueError(f"method={self.method} follows an order, and draw=spread has none. Choose draw=random")
        return self

    @model_validator(mode="after")
    def _spread_has_no_order(self) -> SelectionConfig:
        if self.draw == "spread":
            for name, is_given in (
                ("more_budgets", bool(self.more_budgets)),
                ("a budget in tokens", isinstance(self.budget, dict)),
                ("min_per_source", self.min_per_source > 0),
            ):
                if is_given:
                    raise ValueError(f"draw=spread chooses for one number of examples, not in an order. Leave out {name}")
        return self

    @field_validator("more_budgets", mode="before")
    @classmethod
    def _all_are_numbers(cls, budgets: Any) -> Any:
        return [cls._budget_is_a_number(budget) for budget in budgets] if isinstance(budgets, list | tuple) else budgets

    @field_validator("budget", mode="before")
    @classmethod
    def _budget_is_a_number(cls, budget: Any) -> Any:
        """A budget from YAML, the command line or Python as int, float or token budget."""
        if isinstance(budget, str):
            try:
                budget = float(budget) if any(mark in budget for mark in ".eE") else int(budget)
            except ValueError:
                raise ValueError(f"'{budget}' is not a number. Examples: 3000, 0.1 or {{tokens: 100000}}") from None
        if isinstance(budget, dict) and isinstance(budget.get("tokens"), str):
            with contextlib.suppress(ValueError):
                budget = budget | {"tokens": float(budget["tokens"])}
        if budget == {} or budget != budget:  # noqa: PLR0124 - NaN is not itself
            raise ValueError("a budget is a number of examples, a fraction below 1 or {tokens: n}")
        if isinstance(budget, bool):
            raise ValueError("a budget is a number of examples, a fraction below 1 or {tokens: n}")
        if isinstance(budget, float) and budget == 1:
            raise ValueError("1.0 is neither a fraction below 1 nor, with its point, a count. Write 1 for one example")
        if isinstance(budget, float) and budget >= 1:
            if not budget.is_integer():
                raise ValueError(f"{budget} is neither a whole number of examples nor a fraction below 1")
            budget = int(budget)
        if isinstance(budget, int | float) and budget <= 0:
            raise ValueError(f"must be above 0, found {budget}")
        return budget


class EvaluationConfig(Section):
    """What is measured on the held-out rows, and against which controls."""

    split: Literal["held_out", "validation"] = "held_out"
    """Which rows are evaluated on. validation (see `examples.validation_fraction`): for whatever is tuned, such as a learning
    rate, so that the held-out rows stay unseen."""

    random_control: bool = False
    """Also train a target on a random subset of the same size and steps. Doubles the price of the target."""

    answer_pattern: str | None = None
    """Regular expression with one group that finds the answer in a response, such as `The answer is (.+)`. The last
    match counts; numbers are compared as numbers. reasoning-gym corpora bring their own scorers."""

    summary_sources: list[str] = Field(default_factory=list)
    """Sources whose responses are summaries: scored by ROUGE-L and BLEU."""

    bert_score_model: str | None = None
    """Model (Hub id or path) with which summaries are also scored by BERTScore (`pip install 's2l_ray[bert-score]'`)."""

    max_generations: Annotated[int, Field(ge=0)] = 200
    """Held-out rows per source for which answers are generated, lowest priority first."""

    max_new_tokens: Positive = 256
    """Longest generated answer in tokens."""

    tasks: list[str] = Field(default_factory=list)
    """Tasks of the lm-evaluation-harness (`pip install 's2l_ray[lm-eval]'`), zero-shot, such as `gsm8k`."""

    @field_validator("answer_pattern")
    @classmethod
    def _pattern_has_one_group(cls, pattern: str | None) -> str | None:
        import re

        if pattern is not None:
            try:
                groups = re.compile(pattern).groups
            except re.error as error:
                raise ValueError(f"not a regular expression: {error}") from error
            if groups != 1:
                raise ValueError(f"needs exactly one group, found {groups}: 'The answer is (.+)'")
        return pattern


class ReportConfig(Section):
    """What of the corpus may be seen outside the run's own parts."""

    texts: Literal["all", "selected", "none"] = "all"
    """Whose texts stand in the report and in predictions: all examples', those of selected ones, or none at all (for corpora
    under a data use agreement; then no text of the corpus stands in logs, errors and cards either)."""
