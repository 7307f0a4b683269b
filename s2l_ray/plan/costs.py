"""What a run would do and what it would cost, and how far a run is. Reads and estimates; builds nothing.

Operations, with P parameters, D tokens of one pass, E epochs and T checkpoints: training costs 6 P D E, scoring 2 P D T.
The estimate is for the output positions computed everywhere, so it is an upper bound where prompts are long.
"""

from __future__ import annotations

from dataclasses import dataclass

from s2l_ray.config import RunConfig, ScratchModel, TrainedTokenizer, TrainingConfig
from s2l_ray.errors import ConfigError, DataError
from s2l_ray.pipeline import STAGES, Decision, decide
from s2l_ray.plan.memory import Setting, Shape, Training, need, recommended, resume_point_bytes, settings
from s2l_ray.runtime.session import run_places
from s2l_ray.storage.hub import resolve_revisions

# Makers' data sheets: dense peak rates in operations per second in bfloat16 (float16 on T4, V100) and in float32, and memory
# in bytes. A sheet's GB is taken as 1e9: most devices have more (an 80 GB one 85e9), A10G and T4 a hundredth less.
ACCELERATORS = {
    "B200": (2250e12, 80e12, 180e9),
    "H200": (989e12, 67e12, 141e9),
    "H100": (989e12, 67e12, 80e9),
    "A100": (312e12, 19.5e12, 80e9),
    "A100-40GB": (312e12, 19.5e12, 40e9),
    "L40S": (362e12, 91.6e12, 48e9),
    "A10G": (70e12, 35e12, 24e9),
    "L4": (121e12, 30e12, 24e9),
    "V100": (125e12, 15.7e12, 16e9),
    "T4": (65e12, 8.1e12, 16e9),
}
ACCELERATORS_PER_NODE = 8
# Share of the peak that training and scoring reach: what well-tuned runs report. An assumption, and printed as one.
UTILISATION = 0.35
CHARACTERS_PER_TOKEN = 3.5
SAMPLE_ROWS = 200


@dataclass(frozen=True)
class Cost:
    """What a stage costs; None where it cannot be known from here."""

    operations: float | None = None
    stored_bytes: float | None = None
    seconds: float | None = None
    """On one accelerator of the kind asked for."""


@dataclass(frozen=True)
class Plan:
    """The decisions and costs of a run, stage by stage."""

    name: str
    place: str
    decisions: list[Decision]
    costs: dict[str, Cost]
    memory: list[str]
    """Lines about the target's memory."""

    notes: list[str]
    price_per_hour: float | None

    @property
    def is_refused(self) -> bool:
        return any(decision.action == "refuse" for decision in self.decisions)

    def text(self) -> str:
        """The plan as a table for people."""
        header = f"{'stage':<13} {'action':<7} {'operations':>11} {'stored':>9} {'hours':>8} {'price':>9}  reason"
        lines = [f"{self.name} in {self.place}", "", header]
        is_priced = any(cost.seconds is not None for cost in self.costs.values())
        nothing = Cost(0.0, 0.0, 0.0 if is_priced else None)
        total = {"operations": 0.0, "stored_bytes": 0.0, "seconds": 0.0}
        for decision in self.decisions:
            cost = self.costs[decision.stage.name] if decision.action in ("build", "resume") else nothing
            for name in total:
                total[name] += getattr(cost, name) or 0.0
            first, *rest = decision.reason.splitlines()
            lines.append(f"{decision.stage.name:<13} {decision.action:<7} {self._figures(cost)}  {first}")
            lines += [f"{'':<13} {line}" for line in rest]
        sums = Cost(total["operations"], total["stored_bytes"], total["seconds"] if is_priced else None)
        lines.append(f"{'total':<13} {'':<7} {self._figures(sums)}")
        return "\n".join([*lines, "", *self.memory, *self.notes]).rstrip()

    def _figures(self, cost: Cost) -> str:
        hours = None if cost.seconds is None else cost.seconds / 3600
        price = None if hours is None or self.price_per_hour is None else hours * self.price_per_hour
        operations = "?" if cost.operations is None else f"{cost.operations:.2e}" if cost.operations else "-"
        stored = "?" if cost.stored_bytes is None else size(cost.stored_bytes) if cost.stored_bytes else "-"
        shown = "" if hours is None else f"{hours:.2f}", "" if price is None else f"{price:.2f}"
        return f"{operations:>11} {stored:>9} {shown[0]:>8} {shown[1]:>9}"


def make_plan(
    config: RunConfig,
    run_dir: str | None = None,
    *,
    reuse: str | None = None,
    accelerator: str | None = None,
    price_per_hour: float | None = None,
    num_accelerators: int | None = None,
    accelerators_per_node: int = ACCELERATORS_PER_NODE,
) -> Plan:
    """What `run` would do with every stage, its cost, and the target's memory on so many accelerators.

    Raises ConfigError for an unknown accelerator.
    """
    place, other = run_places(config.name, run_dir, reuse)
    accelerator = accelerator or config.plan.accelerator
    price = config.plan.price_per_hour if price_per_hour is None else price_per_hour
    if accelerator is not None and accelerator not in ACCELERATORS:
        raise ConfigError(f"accelerator '{accelerator}': not known. Known: {', '.join(ACCELERATORS)}.")
    notes: list[str] = []
    try:
        decisions = decide(resolve_revisions(config, place, other), place, other)
    except DataError as error:
        # A plan for a corpus that is not here (a Hub dataset, somebody else's bucket) still says what it would cost.
        if config.plan.num_examples is None:
            raise
        notes.append(f"WARNING: the corpus cannot be looked at, the config's `plan` section stands in for it: {error}")
        decisions = [Decision(stage, "build", "the corpus cannot be looked at") for stage in STAGES]
    sizes = _sizes(config, decisions, notes)
    costs = _costs(config, sizes, accelerator)
    notes += _resume_points(config, sizes)
    memory: list[str] = []
    if accelerator is not None and sizes.target_parameters and _is_built(decisions, "target"):
        number = num_accelerators or _num_accelerators(config)
        if config.target.global_batch_size % number:
            raise ConfigError(
                f"--num-accelerators {number} does not divide target.global_batch_size={config.target.global_batch_size}."
            )
        memory = [*_memory(config, sizes.target_parameters, accelerator, number, accelerators_per_node), ""]
    if accelerator is not None:
        notes.append(
            f"Hours: on one {accelerator} at {UTILISATION:.0%} of its peak rate (an assumption); price per hour: {price}."
        )
    if config.evaluation.random_control:
        notes.append("The target counts twice: evaluation.random_control trains a second one on a random subset.")
    return Plan(config.name, place.uri, decisions, costs, memory, notes, price)


# --- costs ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """What the costs are computed from."""

    examples: float | None
    tokens_per_example: float | None
    proxy_parameters: float | None
    target_parameters: float | None
    held_out: float | None


def _costs(config: RunConfig, sizes: Sizes, accelerator: str | None) -> dict[str, Cost]:
    tokens = _product(sizes.examples, sizes.tokens_per_example)
    num_checkpoints = _num_checkpoints(config, sizes.examples)
    share = _selected_share(config, sizes, tokens)
    models = 2 if config.evaluation.random_control else 1
    training = 0 if config.proxy.checkpoints else _product(6, sizes.proxy_parameters, tokens, config.proxy.epochs)
    weights = _product(4, sizes.proxy_parameters, num_checkpoints)
    operations = {
        "examples": 0.0,
        "proxy": training,
        "trajectories": _product(2, sizes.proxy_parameters, tokens, num_checkpoints),
        "clustering": _product(
            2, sizes.examples, num_checkpoints, config.clustering.num_clusters, config.clustering.num_iterations
        ),
        "selection": 0.0,
        "target": _product(6, sizes.target_parameters, tokens, share, config.target.epochs, models),
        "evaluation": _product(2, sizes.target_parameters, sizes.held_out, sizes.tokens_per_example, models + 1),
    }
    stored = {
        "examples": _product(2 * CHARACTERS_PER_TOKEN, tokens),
        "proxy": weights,
        "trajectories": _product(4, sizes.examples, num_checkpoints),
        "clustering": _product(16, sizes.examples),
        "selection": _product(CHARACTERS_PER_TOKEN, tokens, share, models),
        "target": _product(4, sizes.target_parameters, models),
        "evaluation": _product(CHARACTERS_PER_TOKEN, sizes.held_out, sizes.tokens_per_example),
    }
    precision = {
        "proxy": config.proxy.precision,
        "trajectories": config.trajectories.precision,
        "target": config.target.precision,
        "evaluation": config.target.precision,
    }
    return {
        name: Cost(operations[name], stored[name], _seconds(operations[name], accelerator, precision.get(name, "float32")))
        for name in operations
    }


def _product(*factors: float | None) -> float | None:
    """The product, None where a factor is not known."""
    product = 1.0
    for factor in factors:
        if factor is None:
            return None
        product *= factor
    return product


def _seconds(operations: float | None, accelerator: str | None, precision: str) -> float | None:
    if operations is None or accelerator is None:
        return None
    bfloat16, float32, _ = ACCELERATORS[accelerator]
    return operations / (UTILISATION * (bfloat16 if precision == "bfloat16" else float32))


def _num_checkpoints(config: RunConfig, examples: float | None) -> float | None:
    untrained = 1 if config.proxy.include_untrained else 0
    if config.proxy.checkpoints:
        return len(config.proxy.checkpoints)
    if config.proxy.checkpoint_every_steps is None:
        return config.proxy.num_checkpoints + untrained
    if examples is None:
        return None
    steps = examples * config.proxy.epochs // config.proxy.global_batch_size
    return -(-steps // config.proxy.checkpoint_every_steps) + untrained


def _selected_share(config: RunConfig, sizes: Sizes, tokens: float | None) -> float | None:
    """The subset's share of the pool."""
    budget = config.selection.budget
    if isinstance(budget, float):
        return budget
    if isinstance(budget, dict):
        return None if tokens is None else min(1.0, budget["tokens"] / (tokens * config.plan.response_fraction))
    return None if sizes.examples is None else min(1.0, budget / sizes.examples)


def _sizes(config: RunConfig, decisions: list[Decision], notes: list[str]) -> Sizes:
    """Sizes from what is finished, else from a look at the corpus, else from the config's `plan` section."""
    finished = {d.stage.name: d.artifact.summary for d in decisions if d.artifact is not None}
    rows, tokens = config.plan.num_examples, config.plan.tokens_per_example
    held_out: float | None = None
    if "examples" in finished:
        rows, held_out = finished["examples"]["pool"], finished["examples"]["held_out"]
    looked = _look(config) if rows is None or tokens is None else None
    if looked is not None:
        rows, tokens = (looked[0] if rows is None else rows), (looked[1] if tokens is None else tokens)
        notes.append(
            f"Tokens per example: about {tokens} from {SAMPLE_ROWS} rows at {CHARACTERS_PER_TOKEN} characters a token."
        )
    if held_out is None and rows is not None:
        held_out = rows * config.examples.held_out_fraction
        rows = round(rows - held_out)
    proxy = finished.get("proxy", {}).get("num_parameters") or _parameters(
        config.proxy, config.proxy, config.plan.proxy_parameters
    )
    target = finished.get("target", {}).get("num_parameters") or _parameters(
        config.target, config.proxy, config.plan.target_parameters
    )
    limit = config.proxy.max_tokens
    notes.append(
        f"{_say(rows)} pool examples of {_say(tokens)} tokens; proxy {_say(proxy)} parameters, target {_say(target)}"
        + (f" ({target / proxy:.0f}x)." if proxy and target else ".")
    )
    return Sizes(rows, None if tokens is None else min(tokens, limit), proxy, target, held_out)


def _say(number: float | None) -> str:
    return "?" if number is None else f"{number:,.0f}"


def _parameters(model: TrainingConfig, proxy: TrainingConfig, assumed: float | None) -> float | None:
    """Parameters of a model by its shape, read without its weights; what the config assumes where it cannot be reached."""
    if assumed is not None:
        return assumed
    from s2l_ray.training.models import num_parameters

    return num_parameters(model, _vocabulary(model, proxy))


def _vocabulary(model: TrainingConfig, proxy: TrainingConfig) -> int | None:
    """The tokens of a model's tokenizer where the config decides that."""
    tokenizer = model.tokenizer or proxy.tokenizer
    if isinstance(tokenizer, TrainedTokenizer):
        return tokenizer.vocab_size
    # A tokenizer by name: near enough for a price.
    return 50_304 if isinstance(model.model, ScratchModel) else None


def _look(config: RunConfig) -> tuple[int, int] | None:
    """(rows, tokens per row) of the corpus, estimated from its first rows; None where there are none to look at."""
    from s2l_ray.examples.cutting import sample_corpus

    rows, texts = sample_corpus(config.examples, SAMPLE_ROWS)
    if not texts:
        return None
    return rows, max(2, round(sum(map(len, texts)) / len(texts) / CHARACTERS_PER_TOKEN))


# --- memory --------------------------------------------------------------------------------------------------------


def _is_built(decisions: list[Decision], name: str) -> bool:
    return any(decision.stage.name == name and decision.action in ("build", "resume") for decision in decisions)


def _num_accelerators(config: RunConfig) -> int:
    """One per worker of the target, the fewest there may be: each then holds most. A full node where nothing says."""
    workers = config.machines.target.num_workers
    return min(workers) if isinstance(workers, list) else ACCELERATORS_PER_NODE if workers == "auto" else workers


def _memory(config: RunConfig, parameters: float, accelerator: str, number: int, per_node: int) -> list[str]:
    """What every setting needs, the fastest that fits marked, and whether the configured one fits."""
    target, memory_bytes = config.target, ACCELERATORS[accelerator][2]
    per_node, batch = min(number, per_node), _device_batch(config, number)
    training = Training(
        _shape(config, parameters),
        target.precision,
        number,
        per_node,
        batch,
        target.max_tokens,
        config.plan.response_fraction,
        isinstance(target.model, ScratchModel),
    )
    rank = None if target.lora is None else target.lora.rank
    configured = Setting(target.zero_stage, config.machines.target.offload, target.gradient_checkpointing, rank)
    choice = settings(rank)
    best = recommended(training, choice, memory_bytes)
    lines = [
        f"Target on {number} x {accelerator} ({memory_bytes / 1e9:.0f} GB each, {per_node} per node), {target.precision}, "
        f"{batch} x {target.max_tokens} tokens at a time:",
        f"  {'GB each':>7} {'GB of host':>10}  fits  setting",
    ]
    for setting in [*choice, *([] if configured in choice else [configured])]:
        needed = need(training, setting)
        fits = "yes" if needed.gpu <= memory_bytes else "no"
        marks = ("  <- recommended" if setting == best else "") + ("  (configured)" if setting == configured else "")
        lines.append(f"  {needed.gpu / 1e9:>7.1f} {needed.host / 1e9:>10.1f}  {fits:<4}  {setting}{marks}")
    if best is None:
        lines.append("None fits: more or larger accelerators, a smaller device_batch_size or max_tokens.")
    elif best != configured:
        values = best.overrides(rank)
        if number != _num_accelerators(config):
            values.append(f"machines.target.num_workers={number}")
        lines.append("Recommended: " + " ".join(f"--set {value}" for value in values))
    if 4 * parameters > memory_bytes:
        whole = f"{4 * parameters / 1e9:.0f} GB"
        lines.append(
            f"The evaluation holds the target in float32 on one of them, {whole}, which does not fit: use --until target."
        )
    if best is not None:
        lines.append("Whether the machines have that much memory of their own is not known here.")
    return lines


def _device_batch(config: RunConfig, num_workers: int) -> int:
    """Examples at a time, as `training.fine_tuning.BatchPlan` takes them (which needs torch)."""
    share, wish = max(1, config.target.global_batch_size // num_workers), config.machines.target.device_batch_size
    most = min(share, 32 if wish == "auto" else wish)
    return next(size for size in range(most, 0, -1) if share % size == 0)


def _shape(config: RunConfig, parameters: float) -> Shape:
    """The target's shape; estimated from its parameters where it cannot be looked at."""
    target, vocabulary = config.target, _vocabulary(config.target, config.proxy)
    if config.plan.target_parameters is not None:  # named, so that the model need not be looked at
        return Shape.estimated(parameters, vocabulary)
    from transformers import AutoConfig

    from s2l_ray.training.models import scratch_config

    try:
        if isinstance(target.model, ScratchModel):
            found = scratch_config(target.model.scratch, vocabulary or 0)
        else:
            options = {"revision": target.revision, "trust_remote_code": target.trust_remote_code}
            found = AutoConfig.from_pretrained(target.model, **options).get_text_config()
        hidden, layers, vocabulary = found.hidden_size, found.num_hidden_layers, found.vocab_size
    except (AttributeError, OSError, ValueError):
        return Shape.estimated(parameters, vocabulary)
    width = getattr(found, "intermediate_size", None) or getattr(found, "n_inner", None) or 4 * hidden
    # Families with RMSNorm have a gate in the feed-forward layer, those with LayerNorm have none.
    return Shape(parameters, hidden, layers, vocabulary, width, is_gated=hasattr(found, "rms_norm_eps"))


def _resume_points(config: RunConfig, sizes: Sizes) -> list[str]:
    """One line: the bytes of resume points, and how many are written in an hour where the config says how often."""
    target, adapters = config.target, None
    if target.lora is not None and sizes.target_parameters:
        adapters = _shape(config, sizes.target_parameters).adapter_parameters(target.lora.rank)
    stored = {
        "proxy": sizes.proxy_parameters and resume_point_bytes(sizes.proxy_parameters, config.proxy.precision, 0),
        "target": sizes.target_parameters
        and resume_point_bytes(sizes.target_parameters, target.precision, target.zero_stage, adapters),
    }
    if config.proxy.checkpoints:
        del stored["proxy"]
    said = []
    for name, num_bytes in stored.items():
        minutes = getattr(config.machines, name).checkpoint_every_minutes
        if num_bytes:
            hourly = "" if minutes == "auto" else f" every {minutes:g} minutes ({size(num_bytes * 60 / minutes)} an hour)"
            said.append(f"{name} {size(num_bytes)}{hourly}")
    return [f"Resume points, two kept at a time: {', '.join(said)}."] if said else []


def size(num_bytes: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.3g} TB"
