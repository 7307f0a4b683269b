"""What every stage costs, estimated from what is finished, a look at the corpus, or the config's `plan` section.

Operations, with P parameters, D tokens of one pass, E epochs and T checkpoints: training costs 6 P D E, scoring 2 P D T.
The estimate is for the output positions computed everywhere, so it is an upper bound where prompts are long.
"""

from __future__ import annotations

from dataclasses import dataclass

from s2l_ray.config import ExamplesConfig, ReasoningGymDataset, RunConfig, ScratchModel, TrainedTokenizer, TrainingConfig
from s2l_ray.pipeline import Decision
from s2l_ray.plan.accelerators import ACCELERATORS, UTILISATION

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
class Sizes:
    """What the costs are computed from."""

    examples: float | None
    tokens_per_example: float | None
    proxy_parameters: float | None
    target_parameters: float | None
    held_out: float | None


def costs_of(config: RunConfig, sizes: Sizes, accelerator: str | None) -> dict[str, Cost]:
    tokens = _product(sizes.examples, sizes.tokens_per_example)
    num_checkpoints = _num_checkpoints(config, sizes.examples)
    beside = config.trajectories.without_prompt * config.plan.response_fraction + config.trajectories.embeddings
    num_passes = None if num_checkpoints is None else num_checkpoints + beside
    share = _selected_share(config, sizes, tokens)
    models = 2 if config.evaluation.random_control else 1
    training = 0 if config.proxy.checkpoints else _product(6, sizes.proxy_parameters, tokens, config.proxy.epochs)
    weights = _product(4, sizes.proxy_parameters, num_checkpoints)
    operations = {
        "examples": 0.0,
        "proxy": training,
        "trajectories": _product(2, sizes.proxy_parameters, tokens, num_passes),
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
        "trajectories": _product(16 if config.trajectories.statistics else 4, sizes.examples, num_checkpoints),
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
        name: Cost(operations[name], stored[name], seconds_of(operations[name], accelerator, precision.get(name, "float32")))
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


def seconds_of(operations: float | None, accelerator: str | None, precision: str) -> float | None:
    """Seconds on one accelerator of that kind; None where either is not known."""
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


def sizes_of(config: RunConfig, decisions: list[Decision], notes: list[str]) -> Sizes:
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
        held_out = max(rows * config.examples.held_out_fraction, min(rows / 2, _held_out_by_source(config.examples)))
        rows = round(rows * (1 - config.examples.validation_fraction) - held_out)
    proxy = finished.get("proxy", {}).get("num_parameters") or _parameters(
        config.proxy, config.proxy, config.plan.proxy_parameters
    )
    target = finished.get("target", {}).get("num_parameters") or _parameters(
        config.target, config.proxy, config.plan.target_parameters
    )
    limit = config.proxy.max_tokens
    notes.append(
        f"{_count(rows)} pool examples of {_count(tokens)} tokens; proxy {_count(proxy)} parameters, target {_count(target)}"
        + (f" ({target / proxy:.0f}x)." if proxy and target else ".")
    )
    return Sizes(rows, None if tokens is None else min(tokens, limit), proxy, target, held_out)


def _held_out_by_source(config: ExamplesConfig) -> int:
    """Rows held out because every source has so many, as far as the config names the sources."""
    dataset = config.dataset
    return config.held_out_per_source * (len(dataset.reasoning_gym.tasks) if isinstance(dataset, ReasoningGymDataset) else 1)


def _count(number: float | None) -> str:
    return "?" if number is None else f"{number:,.0f}"


def _parameters(model: TrainingConfig, proxy: TrainingConfig, assumed: float | None) -> float | None:
    """Parameters of a model by its shape, read without its weights; what the config assumes where it cannot be reached."""
    if assumed is not None:
        return assumed
    from s2l_ray.training.models import num_parameters

    return num_parameters(model, vocabulary_of(model, proxy))


def vocabulary_of(model: TrainingConfig, proxy: TrainingConfig) -> int | None:
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
