"""What choosing costs, in the user's terms, beside what it saves: operations, hours and money, and when it has paid for
itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from s2l_ray.config import RunConfig
from s2l_ray.config.comparing import Curation
from s2l_ray.plan.accelerators import UTILISATION
from s2l_ray.plan.costs import seconds_of
from s2l_ray.selectors import EMBEDDING, NO_PROMPT, SELECTORS

WITHOUT_TRAJECTORIES = frozenset({"random", "source_proportional", "source_balanced", "longest"})
"""Selectors that nothing is trained or scored for."""


@dataclass(frozen=True)
class RunSizes:
    """What the costs are computed from."""

    pool: int
    """Examples."""

    pool_tokens: float
    """Of one pass over them."""

    num_points: int
    """T."""

    proxy_parameters: float
    target_parameters: float
    proxy_seconds: float | None = None
    """What training and scoring the proxy took here."""

    target_seconds_per_example: float | None = None
    """What training the target took here, an example and epoch."""

    validation_tokens: float = 0.0
    """Of one pass over the validation rows, about."""

    trajectories_seconds: float | None = None
    """Of `proxy_seconds` what recording took, the passes beside the checkpoints' included."""


@dataclass(frozen=True)
class Item:
    """One way to spend."""

    name: str
    operations: float | None
    hours: float | None
    money: float | None


def selection_operations(config: RunConfig, measured: RunSizes) -> tuple[float, float]:
    """Operations of training the proxy (6 P D E) and of scoring (2 P D T)."""
    size, tokens = measured.proxy_parameters, measured.pool_tokens
    epochs = 0.0 if config.proxy.checkpoints else config.proxy.epochs
    return 6 * size * tokens * epochs, 2 * size * tokens * measured.num_points


def beside_operations(config: RunConfig, measured: RunSizes, recorded: str) -> float:
    """Operations of one pass beside the losses: over the responses without their prompts, or over the pool and the validation
    rows for their embeddings (2 P D)."""
    pool = measured.pool_tokens
    tokens = pool * config.plan.response_fraction if recorded == NO_PROMPT else pool + measured.validation_tokens
    return 2 * measured.proxy_parameters * tokens


def target_operations(config: RunConfig, measured: RunSizes, num_examples: int) -> float:
    """Operations of fine-tuning the target on so many examples (6 P D E)."""
    tokens = measured.pool_tokens * num_examples / measured.pool
    return 6 * measured.target_parameters * tokens * config.target.epochs


def cost_matched(config: RunConfig, measured: RunSizes, budget: int) -> int:
    """The examples of a random subset whose training costs what the selection and the training on `budget` examples cost; all
    of the pool at most."""
    one = target_operations(config, measured, 1)
    return min(measured.pool, budget + math.floor(sum(selection_operations(config, measured)) / one))


def spent_on(config: RunConfig, measured: RunSizes, method: str | None, examples: int) -> Item:
    """What one target on so many examples costs, with the selection's own; `method` None for all data. `config` and `measured`
    are the arm's: a proxy of its own, as an ablation has, has its own size and epochs."""
    operations = target_operations(config, measured, examples)
    seconds = _target_seconds(config, measured, examples)
    target = _item(config, "target", operations, seconds, config.target.precision)
    parts = [target]
    if method is not None and method not in WITHOUT_TRAJECTORIES:
        # What a pass under the last checkpoint beside the losses records, where the method needs one.
        beside = next((name for name in SELECTORS[method].needs if name in (NO_PROMPT, EMBEDDING)), None)
        parts.append(_selection(config, measured, beside))
    return Item(
        "target and selection",
        known_total([part.operations for part in parts]),
        known_total([part.hours for part in parts]),
        known_total([part.money for part in parts]),
    )


def known_total(values: Sequence[float | None]) -> float | None:
    """The sum of some values; None where one of them is not known."""
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def _selection(config: RunConfig, measured: RunSizes, beside: str | None = None) -> Item:
    """Training and scoring the proxy, each at its precision; with the pass `beside` the losses that an arm needs, and without
    those that only other arms need."""
    training, scoring = selection_operations(config, measured)
    passes = {
        one: beside_operations(config, measured, one)
        for one, is_recorded in (
            (NO_PROMPT, config.trajectories.without_prompt),
            (EMBEDDING, config.trajectories.embeddings),
        )
        if is_recorded
    }
    own = 0.0 if beside is None else beside_operations(config, measured, beside)
    seconds = measured.proxy_seconds
    if seconds is not None and measured.trajectories_seconds is not None:
        # What was recorded took its time in one go: an arm's share of it goes by operations, as does a pass that only other
        # trajectories than the run's own have.
        share = (scoring + own) / (scoring + sum(passes.values()))
        seconds += measured.trajectories_seconds * (share - 1)
    scoring += own
    if config.plan.accelerator:
        each = ((training, config.proxy.precision), (scoring, config.trajectories.precision))
        seconds = known_total([seconds_of(operations, config.plan.accelerator, precision) for operations, precision in each])
    return _priced(config, "selection (both)", training + scoring, seconds)


def costs_of(config: RunConfig, measured: RunSizes, budget: int) -> dict[str, Any]:
    """`items` (plain values), `lines` for people, `break_even`: targets to be trained on the subset instead of on all data
    until the selection is paid, and `cost_matched` examples. Hours are those of `plan.accelerator` if it is given, else
    measured here where that is possible; money is by `plan.price_per_hour`."""
    training, scoring = selection_operations(config, measured)
    subset, full = (target_operations(config, measured, number) for number in (budget, measured.pool))
    own = measured.target_parameters / measured.proxy_parameters
    itself = own * (training + scoring)
    spent = {
        "proxy": (training, None),
        "scoring": (scoring, None),
        f"target on {budget:,} examples": (subset, _target_seconds(config, measured, budget)),
        f"target on all {measured.pool:,}": (full, _target_seconds(config, measured, measured.pool)),
        "trajectories on the target itself": (itself, None),
    }
    precisions = {"proxy": config.proxy.precision, "scoring": config.trajectories.precision}
    items = [
        _item(config, name, operations, seconds, precisions.get(name, config.target.precision))
        for name, (operations, seconds) in spent.items()
    ]
    items.insert(2, _selection(config, measured))
    curation = config.compare.curation if config.compare else None
    items += [] if curation is None else [_reviewed(curation, measured.pool)]
    saved = full - subset
    break_even = (training + scoring) / saved if saved > 0 else None
    matched = cost_matched(config, measured, budget)
    accelerator = config.plan.accelerator
    basis = f"on one {accelerator} at {UTILISATION:.0%} of its peak" if accelerator else "as measured here"
    lines = [f"Costs (hours {basis}):", *(f"  {_words(item)}" for item in items)]
    if break_even is not None:
        times = "the first target" if break_even <= 1 else f"{math.ceil(break_even)} targets"
        lines.append(
            f"The selection costs {(training + scoring) / full:.1%} of a fine-tune on all data: paid by {times} trained on the "
            f"subset instead. For the same price a random subset could have {matched:,} examples."
        )
    return {
        "items": [asdict(item) for item in items],
        "lines": lines,
        "break_even": break_even,
        "cost_matched": matched,
        "measured": asdict(measured),
    }


def _target_seconds(config: RunConfig, measured: RunSizes, number: int) -> float | None:
    each = measured.target_seconds_per_example
    return None if each is None else each * number * config.target.epochs


def _item(config: RunConfig, name: str, operations: float, seconds: float | None, precision: str) -> Item:
    if config.plan.accelerator:
        seconds = seconds_of(operations, config.plan.accelerator, precision)
    return _priced(config, name, operations, seconds)


def _priced(config: RunConfig, name: str, operations: float, seconds: float | None) -> Item:
    hours = None if seconds is None else seconds / 3600
    price = config.plan.price_per_hour
    return Item(name, operations, hours, None if hours is None or price is None else hours * price)


def _reviewed(curation: Curation, pool: int) -> Item:
    hours = pool * curation.seconds_per_example / 3600
    return Item(f"a person looking through all {pool:,}", None, hours, hours * curation.hourly_rate)


def _words(item: Item) -> str:
    operations = "" if item.operations is None else f"{item.operations:.2e} operations"
    hours = "" if item.hours is None else f"{item.hours:,.3g} hours"
    money = "" if item.money is None else f"{item.money:,.2f} in money"
    return f"{item.name:<36} {', '.join(part for part in (operations, hours, money) if part)}"
