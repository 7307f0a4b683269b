"""What `s2l compare` would train, what it would cost, and the smallest difference that it could see: before it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from s2l_ray.compare.arms import ANY_SOURCES, SEED_PROXY, Arm, arms_of
from s2l_ray.compare.cells import budgets_of, resolved, seeded
from s2l_ray.compare.costs import known_total
from s2l_ray.compare.statistics import detectable_difference
from s2l_ray.config import RunConfig
from s2l_ray.config.comparing import CompareConfig
from s2l_ray.pipeline import Decision
from s2l_ray.plan.accelerators import UTILISATION
from s2l_ray.plan.costs import Sizes, costs_of, seconds_of, vocabulary_of
from s2l_ray.plan.plan import Plan
from s2l_ray.storage.layout import COMPARE, TABLE
from s2l_ray.storage.places import Storage
from s2l_ray.training.batches import subset_steps
from s2l_ray.training.models import num_parameters


def comparison_lines(config: RunConfig, made: Plan) -> list[str]:
    """Lines about the config's comparison; none where it has no section `compare`, or the corpus's size is not known.

    Raises ConfigError for arms or budgets that cannot be.
    """
    sizes = made.sizes
    if config.compare is None or sizes.examples is None:
        return []
    config = resolved(config)
    compare = config.compare or CompareConfig()
    sources = _sources(made.decisions)
    arms = arms_of(config, ANY_SOURCES if sources is None else sources)
    budgets = budgets_of(config, round(sizes.examples))
    num_cells = len(arms) * len(budgets) * compare.seeds
    lines = [
        f"Comparison: {len(arms)} arms x {len(budgets)} budgets x {compare.seeds} seeds + {compare.full_seeds} of all data: "
        f"{num_cells + compare.full_seeds} targets of {', '.join(_steps(config, budget) for budget in budgets)} steps "
        f"({_steps(config, round(sizes.examples))} for all data); each seed redoes {compare.redo_from} and what follows.",
    ]
    if sources is None:
        lines.append("(The corpus has not been read: arms as if it named several sources.)")
    if sizes.target_parameters is not None and sizes.tokens_per_example is not None:
        rows = len(arms) * compare.seeds * sum(budgets) + compare.full_seeds * sizes.examples
        operations = 6 * sizes.target_parameters * sizes.tokens_per_example * config.target.epochs * rows
        proxies = [_selection(config, one, sizes, made.accelerator) for one in _proxies(config, arms)]
        known = [(spent, took) for spent, took in proxies if spent is not None]
        operations_of_all = operations + sum(spent for spent, _ in known)
        line = f"It costs {operations_of_all:.2e} operations"
        if proxies:
            line += f", those of {len(proxies)} proxies and their scoring included"
            line += f" ({len(proxies) - len(known)} of them of unknown size left out)" if len(known) < len(proxies) else ""
        seconds = seconds_of(operations, made.accelerator, config.target.precision)
        if seconds is not None:
            seconds += sum(took or 0.0 for _, took in known)
            line += f", {seconds / 3600:.2f} hours on one {made.accelerator} at {UTILISATION:.0%} of its peak"
            line += "" if made.price_per_hour is None else f", {seconds / 3600 * made.price_per_hour:.2f} in money"
        lines.append(f"{line}.")
    lines.append(_detectable(compare, Storage(made.place)))
    return lines


def _proxies(config: RunConfig, arms: Sequence[Arm]) -> list[RunConfig]:
    """The runs of the proxies that a comparison trains beside the run's own, each once: of other seeds, and of arms that need
    other trajectories."""
    compare = config.compare or CompareConfig()
    found: dict[tuple[str, int], RunConfig] = {}
    for seed in range(compare.seeds):
        for arm in arms:
            chosen = seeded(config, arm, seed)
            if (chosen.proxy, chosen.trajectories) != (config.proxy, config.trajectories):
                found[arm.name if arm.redoes_proxy else SEED_PROXY, seed] = chosen
    return list(found.values())


def _selection(
    config: RunConfig, changed: RunConfig, sizes: Sizes, accelerator: str | None
) -> tuple[float | None, float | None]:
    """Operations and seconds of training and scoring the proxy of a changed config; None where they are not known."""
    parameters = sizes.proxy_parameters
    if (changed.proxy.model, changed.proxy.tokenizer) != (config.proxy.model, config.proxy.tokenizer):
        parameters = num_parameters(changed.proxy, vocabulary_of(changed.proxy, changed.proxy))
    costs = costs_of(changed, replace(sizes, proxy_parameters=parameters), accelerator)
    both = [costs["proxy"], costs["trajectories"]]
    return known_total([one.operations for one in both]), known_total([one.seconds for one in both])


def _steps(config: RunConfig, num_examples: int) -> str:
    return f"{subset_steps(num_examples, config.target.epochs, config.target.global_batch_size):,}"


def _detectable(compare: CompareConfig, place: Storage) -> str:
    found = place.child(COMPARE).read_json(TABLE)
    deviation, origin = compare.pilot_deviation, "compare.pilot_deviation"
    if found is not None and found.get("pilot_deviation"):
        deviation, origin = found["pilot_deviation"], f"{place.uri}/{COMPARE}/{TABLE}"
    smallest = detectable_difference(deviation, compare.seeds)
    return (
        f"It would see a difference to random of {smallest:.3f} nats per token or more (in 8 of 10 such comparisons, at the 5% "
        f"level), if differences vary by {deviation:.3f} from seed to seed ({origin})."
    )


def _sources(decisions: list[Decision]) -> list[str] | None:
    found = next((d.artifact.summary for d in decisions if d.stage.name == "examples" and d.artifact is not None), None)
    return None if found is None else [name for name, counts in found["sources"].items() if counts["pool"]]
