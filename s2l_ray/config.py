"""The config of a run: one YAML file, complete and flat, checked before anything starts.

There is no inheritance and no templating; ``--set section.field=value`` is the only override. Every section is a
frozen value whose fields explain themselves. A section is the *recipe* of the stage of the same name: what decides
its result. `machines` (where and how fast) and `plan` (what the price list assumes) decide no result and
are in no fingerprint.
"""

from __future__ import annotations

import contextlib
import difflib
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from s2l_ray.errors import ConfigError, has_credentials
from s2l_ray.schedule import Schedule

Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[int, Field(ge=1)]
Precision = Literal["float32", "bfloat16"]


class Section(BaseModel):
    """A part of the config: frozen, unknown keys refused, field docstrings kept as descriptions."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class ReasoningGym(Section):
    """An embedded corpus: real procedural tasks with verifiable answers, made offline by reasoning-gym."""

    tasks: dict[str, dict[str, Any]] = Field(min_length=1)
    """Task name -> its parameters, `size` (how many examples) among them. The name becomes the source."""

    seed: int = 0
    """Seed of the task generators."""

    @field_validator("tasks")
    @classmethod
    def _sizes_are_given(cls, tasks: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for name, parameters in tasks.items():
            size = parameters.get("size")
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"task '{name}' needs size, the number of examples, as an integer above 0")
        return tasks


class ReasoningGymDataset(Section):
    """`dataset: {reasoning_gym: {...}}`."""

    reasoning_gym: ReasoningGym


class ExamplesConfig(Section):
    """Where the corpus is and which of its fields are prompt, response and source."""

    dataset: str | list[str] | ReasoningGymDataset
    """Files (JSON Lines, JSON, CSV, Parquet; gzip allowed), directories, globs or URIs of them; a Hub dataset id;
    or an embedded reasoning-gym corpus. A relative path is taken from where the command runs."""

    revision: str | None = None
    """Commit, tag or branch of a Hub dataset. Give a commit: a branch moves."""

    subset: str | None = None
    """Configuration name of a Hub dataset (GSM8K's `main`, say)."""

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
    """Field with a conversation: a list of `{role, content}`. Every assistant message is learned."""

    source_field: str | None = None
    """Field that names the sub-dataset a row comes from; without it every row's source is the file's name."""

    where: dict[str, Any] = Field(default_factory=dict)
    """Keep only the rows whose field equals the value, or one of the values: `{split: train}`."""

    held_out_fraction: Fraction = 0.02
    """Share of the prompts kept for evaluation, chosen by a hash of the prompt with its numbers masked, so that
    near-copies of one prompt stay on one side. Split off before the budget is counted."""

    rows_per_part: Positive | Literal["auto"] = "auto"
    """Rows in one part, the unit of restart; auto: 512 up to half a million rows, then so that there are about 1,000
    parts."""

    @model_validator(mode="after")
    def _templates_name_plain_fields(self) -> ExamplesConfig:
        for name in ("prompt_template", "prompt_template_if_empty"):
            template = getattr(self, name)
            if template is not None:
                template_fields(template)
        if self.prompt_template_if_empty is not None and self.prompt_template is None:
            raise ValueError("prompt_template_if_empty needs prompt_template beside it")
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


class Scratch(Section):
    """A model with random weights, by its shape."""

    architecture: str = "gpt_neox"
    """A causal model type of transformers: `gpt_neox` (Pythia), `llama`, `qwen2`, `gpt2` ..."""

    layers: Positive
    """Transformer layers."""

    hidden: Positive
    """Hidden size."""

    heads: Positive = 4
    """Attention heads; divides `hidden`."""

    intermediate: Positive | None = None
    """Width of the feed-forward layer; 4 x hidden unless given."""

    max_positions: Positive = 2048
    """Longest sequence."""

    tie_embeddings: bool = False
    """Share input and output embeddings."""

    @model_validator(mode="after")
    def _heads_divide_hidden(self) -> Scratch:
        if self.hidden % self.heads:
            raise ValueError(f"heads={self.heads} does not divide hidden={self.hidden}")
        return self


class ScratchModel(Section):
    """`model: {scratch: {...}}`."""

    scratch: Scratch


class TrainedTokenizer(Section):
    """`tokenizer: {train: bpe, vocab_size: ...}`: a byte-level BPE tokenizer trained on the pool."""

    train: Literal["bpe"] = "bpe"
    vocab_size: Annotated[int, Field(ge=260)] = 4096


class TrainingConfig(Section):
    """How a model is fine-tuned: the same words for the proxy and for the target."""

    model: str | ScratchModel
    """Hub id, path or URI of a model; or `{scratch: {...}}`."""

    revision: str | None = None
    """Commit, tag or branch of a Hub model. Give a commit: a branch moves."""

    tokenizer: str | TrainedTokenizer | None = None
    """Hub id, path or URI of a tokenizer, or `{train: bpe, vocab_size: ...}`. Without it: the model's own, and for a
    target from scratch the proxy's."""

    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless you trust its author."""

    epochs: Annotated[float, Field(gt=0)] = 3.0
    """Passes over the data (paper: 3)."""

    global_batch_size: Positive = 128
    """Examples per optimizer step over all workers (paper: 128)."""

    learning_rate: Annotated[float, Field(gt=0)] = 2.0e-5
    """Peak learning rate of AdamW (paper: 2e-5)."""

    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's weight decay (paper: 0)."""

    lr_schedule: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    """Learning-rate schedule after the warm-up (paper: cosine)."""

    warmup_fraction: Fraction = 0.03
    """Share of the steps in which the learning rate rises from zero (paper: 0.03)."""

    max_tokens: Annotated[int, Field(ge=2)] = 512
    """Longest example in tokens; the rest is cut off on the right (paper: 512)."""

    precision: Precision = "float32"
    """Arithmetic of the training. The optimizer works in float32; DeepSpeed keeps and saves bfloat16 weights beside it."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""

    seed: int = 42
    """Seed of the data order, of random weights and of dropout."""


class ProxyConfig(TrainingConfig):
    """The small model whose losses are recorded, and when."""

    num_checkpoints: Positive = 12
    """T, for any number of workers (paper: 12)."""

    schedule: Schedule = "equal"
    """When: after step round(i * S / T) of S (equal), at equal ratios (logarithmic), or dense in the first, second or last
    third of the training and at its end (early, middle, late)."""

    checkpoint_every_steps: Positive | None = None
    """Instead of `num_checkpoints`: every so many steps, and the last (the reference code: 500)."""

    include_untrained: bool = False
    """Also record the model before its first step. It adds a point, and often a dimension, to every trajectory."""

    checkpoints: list[str] = Field(default_factory=list)
    """Score these checkpoints (paths, URIs or Hub `id@revision`), in this order, and train nothing."""


class TrajectoriesConfig(Section):
    """How the losses are computed."""

    precision: Precision = "float32"
    """Arithmetic of the forward pass; the cross-entropy is always float32."""

    tokens_per_batch: Positive = 4096
    """Padded tokens per forward pass. Part of the recipe: the shape of a matrix product decides a loss's last bit."""


class ClusteringConfig(Section):
    """How the trajectories are grouped."""

    num_clusters: Positive = 100
    """K, in each stratum if there are strata (paper: 100). Capped by the rows of a stratum, and said."""

    features: Literal["raw", "reduction", "shape", "whitened"] = "raw"
    """What k-means sees: the losses (raw, the paper), their drop since the first point (reduction), what is left without
    their level (shape), or their principal components scaled to unit variance (whitened)."""

    num_iterations: Positive = 20
    """Lloyd iterations at most (paper: 20); they stop early when no row changes its group."""

    tolerance: Annotated[float, Field(ge=0)] = 0.0
    """They also stop when the centroids' squared moves add up to this share of the features' mean variance
    (scikit-learn's `tol`); 0: only when no row changes its group."""

    training_rows: Positive | None = None
    """Train on so many rows of lowest priority (in each stratum) and only assign the others; without it on all rows."""

    num_restarts: Positive = 3
    """Initialisations tried; the one with the lowest inertia on the sample is kept."""

    stratify_by: str | None = None
    """Column (`source`, say) within whose values the groups are made (the reference code: source)."""

    seed: int = 0
    """Seed of the initialisation."""

    @model_validator(mode="after")
    def _trains_on_enough(self) -> ClusteringConfig:
        if self.training_rows is not None and self.training_rows < self.num_clusters:
            raise ValueError(f"training_rows={self.training_rows} is fewer than num_clusters={self.num_clusters}. Raise it")
        return self


class SelectionConfig(Section):
    """How many examples, and how they are drawn from the groups."""

    method: Literal["s2l"] = "s2l"
    """Equal shares of every group, small groups first (METHOD: water-filling)."""

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


class Lora(Section):
    """Low-rank adapters (peft): the model's own weights stay as they are, small matrices beside them are trained."""

    rank: Positive = 16
    """Rank of the matrices."""

    alpha: Annotated[float, Field(gt=0)] = 32.0
    """Their products count `alpha / rank` times."""

    dropout: Fraction = 0.0
    """Dropout before them."""

    target_modules: list[str] | Literal["all-linear"] = "all-linear"
    """Names of the layers that get them; all-linear: every linear layer but the output layer."""

    save: Literal["merged", "adapter"] = "merged"
    """A whole model with the adapters added in, or the adapters alone: a few MB, loaded with peft and the base model."""


class TargetConfig(TrainingConfig):
    """The large model that is fine-tuned on the subset."""

    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO stage: 1 shards optimizer states over the workers, 2 gradients too, 3 parameters too."""

    lora: Lora | None = None
    """Train adapters instead of all weights (`pip install 's2l_ray[lora]'`)."""

    @model_validator(mode="after")
    def _adapters_have_a_base(self) -> TargetConfig:
        if self.lora is not None and self.lora.save == "adapter" and isinstance(self.model, ScratchModel):
            raise ValueError("lora.save=adapter: a model from scratch is nowhere to be loaded from. Set lora.save=merged")
        return self


class EvaluationConfig(Section):
    """What is measured on the held-out rows, and against which controls."""

    random_control: bool = False
    """Also train a target on a random subset of the same size and steps. Doubles the price of the target."""

    answer_pattern: str | None = None
    """Regular expression with one group that finds the answer in a response, such as `The answer is (.+)`. The last
    match counts; numbers are compared as numbers. reasoning-gym corpora bring their own scorers."""

    summary_sources: list[str] = Field(default_factory=list)
    """Sources whose responses are summaries: scored by ROUGE-L and BLEU."""

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


class WorkerConfig(Section):
    """Where and how fast a stage runs. Decides no result."""

    num_workers: Positive | Annotated[list[Positive], Field(min_length=2, max_length=2)] | Literal["auto"] = "auto"
    """Worker processes, or `[min, max]` as there is room; auto: one per GPU, on a machine without GPUs one for all CPUs in
    training and one per CPU in scoring."""

    cpus_per_worker: Positive | Literal["auto"] = "auto"
    """CPUs that Ray reserves per worker, and threads of its matrix products."""

    gpus_per_worker: Annotated[float, Field(ge=0)] | Literal["auto"] = "auto"
    """GPUs per worker; auto: 1 where the cluster has any."""

    device_batch_size: Positive | Literal["auto"] = "auto"
    """Examples per forward pass in training; auto: the largest that divides the worker's share, at most 32."""

    wait_minutes: Annotated[float, Field(gt=0)] = 15.0
    """How long to wait for a cluster that has no room for the fewest workers yet (of a pool: for one)."""

    @field_validator("num_workers")
    @classmethod
    def _bounds_ascend(cls, bounds: Any) -> Any:
        if isinstance(bounds, list) and bounds[0] > bounds[1]:
            raise ValueError(f"[min, max] with min above max: {bounds}")
        return bounds


class TrainingWorkerConfig(WorkerConfig):
    """Workers that train. With `num_workers: [min, max]` the group shrinks when it loses a worker and grows when there is
    room again, to sizes that divide the global batch."""

    checkpoint_every_minutes: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    """How often a resume point (weights, optimizer) is kept, two at a time; auto: every half minute, and at most fifty."""

    @field_validator("gpus_per_worker")
    @classmethod
    def _one_gpu_at_most(cls, number: Any) -> Any:
        if number not in ("auto", 0, 1):
            raise ValueError(f"a worker trains on one GPU or on none, not on {number}. Ask for more workers")
        return number

    @property
    def resume_minutes(self) -> float:
        """Between two resume points, about."""
        return 0.5 if self.checkpoint_every_minutes == "auto" else self.checkpoint_every_minutes


class TargetWorkerConfig(TrainingWorkerConfig):
    """Workers that train the target."""

    offload: Literal["none", "optimizer", "parameters"] = "none"
    """What ZeRO keeps in the machines' memory instead of the GPUs': the optimizer's states (stage 1 and up), and the
    parameters too (stage 3)."""


class GroupingConfig(Section):
    """Where k-means keeps the trajectories. Decides no result."""

    engine: Literal["auto", "memory", "disk", "ray", "gpu"] = "auto"
    """`memory`, a file (`disk`), Ray actors or all GPUs of this machine; auto: gpu where faiss sees one, else memory or
    disk by `memory_gb`."""

    memory_gb: Annotated[float, Field(gt=0)] = 0.5
    """Losses up to this size are kept in memory."""

    num_workers: Positive = 2
    """Ray actors, of one CPU each, each with its share of the trajectories in memory."""


class MachinesConfig(Section):
    """One section per stage that works in parallel."""

    examples: WorkerConfig = WorkerConfig()
    proxy: TrainingWorkerConfig = TrainingWorkerConfig()
    trajectories: WorkerConfig = WorkerConfig()
    clustering: GroupingConfig = GroupingConfig()
    target: TargetWorkerConfig = TargetWorkerConfig()
    evaluation: WorkerConfig = WorkerConfig()


class PlanConfig(Section):
    """What `s2l plan` assumes where it cannot look: nothing is computed from it."""

    num_examples: Positive | None = None
    tokens_per_example: Positive | None = None
    response_fraction: Annotated[float, Field(gt=0, le=1)] = 0.5
    proxy_parameters: Annotated[float, Field(gt=0)] | None = None
    target_parameters: Annotated[float, Field(gt=0)] | None = None
    accelerator: str | None = None
    price_per_hour: Annotated[float, Field(ge=0)] | None = None


class RunConfig(Section):
    """A whole run. The sections are the eight words of the flow."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Names the run; the default run directory is `runs/<name>`."""

    examples: ExamplesConfig
    proxy: ProxyConfig
    trajectories: TrajectoriesConfig = TrajectoriesConfig()
    clustering: ClusteringConfig = ClusteringConfig()
    selection: SelectionConfig
    target: TargetConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    machines: MachinesConfig = MachinesConfig()
    plan: PlanConfig = PlanConfig()

    @model_validator(mode="before")
    @classmethod
    def _no_credentials_in_uris(cls, values: Any) -> Any:
        """They would end up in run.json, manifests and logs."""
        for place, text in _texts(values):
            if has_credentials(text):
                raise ValueError(f"{place}: credentials in a URI end up in files and logs. Put them into the environment")
        return values

    @model_validator(mode="after")
    def _sections_fit_together(self) -> RunConfig:
        for name in ("proxy", "target"):
            batch, workers = getattr(self, name).global_batch_size, getattr(self.machines, name).num_workers
            low, high = workers if isinstance(workers, list) else [workers, workers] if isinstance(workers, int) else [1, 1]
            if all(batch % number for number in range(low, high + 1)):
                raise ValueError(f"machines.{name}.num_workers={workers} does not divide {name}.global_batch_size={batch}")
        offload, zero_stage = self.machines.target.offload, self.target.zero_stage
        if zero_stage < {"none": 0, "optimizer": 1, "parameters": 3}[offload]:
            needed = "3" if offload == "parameters" else "1, 2 or 3"
            raise ValueError(f"machines.target.offload={offload} needs target.zero_stage {needed}, found {zero_stage}")
        if self.clustering.stratify_by not in (None, "source"):
            raise ValueError(
                f"clustering.stratify_by='{self.clustering.stratify_by}': a run knows strata by 'source'. Set "
                "examples.source_field to that column, or use `s2l select`"
            )
        return self

    @model_validator(mode="after")
    def _proxy_has_a_tokenizer(self) -> RunConfig:
        if isinstance(self.proxy.model, ScratchModel) and self.proxy.tokenizer is None and not self.proxy.checkpoints:
            raise ValueError(
                "proxy.tokenizer is missing: a proxy from scratch brings none. "
                "Set proxy.tokenizer={train: bpe, vocab_size: 4096} or name one"
            )
        return self


def _texts(value: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """Every text in plain values, with its place."""
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _texts(inner, f"{place}.{key}" if place else str(key))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner, place)


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """The checked config in a YAML file, with `section.field=value` overrides applied.

    Raises ConfigError naming the file, the key, what was found and, for a misspelt key, the likely one.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error}). Give the path of a YAML config.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({error}). A config is a YAML file.") from error
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a config is a mapping of sections, found {type(values).__name__}.")
    for override in overrides or []:
        _apply_override(values, override)
    return parse_config(values, where=str(path))


def parse_config(values: dict[str, Any], where: str = "config") -> RunConfig:
    """A checked config from plain values. Raises ConfigError that lists every problem, one a line."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{where}: {line}" for line in problems(error, RunConfig))) from None


AnySection = TypeVar("AnySection", bound=Section)


def checked(section: type[AnySection], **values: Any) -> AnySection:
    """A section from a function's or a command's arguments. Raises ConfigError that lists every problem, one a line."""
    name = "machines.clustering" if section is GroupingConfig else section.__name__.removesuffix("Config").lower()
    try:
        # A numpy number is a number, too.
        return section.model_validate({key: value.item() if hasattr(value, "item") else value for key, value in values.items()})
    except ValidationError as error:
        lines = [f"{name}.{line}".replace(".config:", ":", 1) for line in problems(error, section)]
        raise ConfigError("\n".join(lines)) from None


def problems(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """Every problem that pydantic found as `section.field: what. Remedy`, one line a place, in order of the file.

    Of a union (`model: a name or {scratch: ...}`) pydantic reports every branch: the complaints about the deepest place
    are those about the branch that was meant, and complaints about one place become one line.
    """
    complaints: dict[str, list[str]] = {}
    found: dict[str, Any] = {}
    misspelt: list[str] = []
    for item in error.errors(include_url=False):
        keys = [str(key) for key in item["loc"] if not _is_union_branch(key)]
        place = ".".join(keys) or "config"
        if item["type"] == "extra_forbidden":
            known = _keys_at(model, keys[:-1])
            guess = difflib.get_close_matches(keys[-1], known, n=1)
            misspelt += [".".join([*keys[:-1], name]) for name in guess]
            hint = f". Did you mean '{guess[0]}'?" if guess else f". Known keys: {', '.join(known)}." if known else "."
            complaint = f"no such key{hint}"
        elif item["type"] == "missing":
            complaint = "missing."
        elif item["type"] == "value_error":
            complaint = f"{item['msg'].removeprefix('Value error, ')}."
        else:
            complaint = item["msg"][0].lower() + item["msg"][1:]
            found[place] = item["input"]
        if complaint not in complaints.setdefault(place, []):
            complaints[place].append(complaint)
    for place in misspelt:  # it is not missing, it is there under another name
        if complaints.get(place) == ["missing."]:
            del complaints[place]
    deepest = [place for place in complaints if not any(other.startswith(f"{place}.") for other in complaints)]
    return [
        f"{place}: {'; or '.join(complaints[place])}{f', found {found[place]!r}.' if place in found else ''}"
        for place in deepest
    ]


def _is_union_branch(key: int | str) -> bool:
    """Whether a part of a pydantic location names a union's branch (a type) and not a key of the file."""
    if not isinstance(key, str):
        return False
    return key[:1].isupper() or "[" in key or key in {"str", "int", "float", "bool", "constrained-int", "constrained-float"}


def _keys_at(model: type[BaseModel], keys: list[str]) -> list[str]:
    """The field names of the section that `keys` lead to, empty where they lead to no section."""
    sections: list[type[BaseModel]] = [model]
    for key in keys:
        found: list[type[BaseModel]] = []
        for section in sections:
            if key in section.model_fields:
                annotation = section.model_fields[key].annotation
                candidates = (annotation, *get_args(annotation))
                found += [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        sections = found
    return [name for section in sections for name in section.model_fields]


def _apply_override(values: dict[str, Any], override: str) -> None:
    """Put `section.field=value` (the value in YAML) into the plain values."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override}: expected section.field=value, such as --set clustering.num_clusters=50.")
    *sections, field = key.strip().split(".")
    for section in sections:
        inner = values.setdefault(section, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {override}: '{section}' is not a section.")
        values = inner
    try:
        values[field] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: the value is not YAML: {error}") from error
