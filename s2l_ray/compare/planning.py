"""What `s2l compare` would train, what it would cost, and the smallest difference that it could see: before it runs."""

from __future__ import annotations

from s2l_ray.compare.arms import ANY_SOURCES, arms_of
from s2l_ray.compare.cells import budgets_of, resolved
from s2l_ray.compare.statistics import detectable_difference
from s2l_ray.config import RunConfig
from s2l_ray.config.comparing import CompareConfig
from s2l_ray.pipeline import Decision
from s2l_ray.plan.accelerators import UTILISATION
from s2l_ray.plan.costs import seconds_of
from s2l_ray.plan.plan import Plan
from s2l_ray.storage.layout import COMPARE, TABLE
from s2l_ray.storage.places import Storage
from s2l_ray.training.batches import subset_steps


def comparison_lines(config: RunConfig, made: Plan) -> list[str]:
    """Lines about the config's comparison; none where it has no section `compare`, or the corpus's size is not known.

    Raises ConfigError for arms or budgets that cannot be.
    """
    sizes, compare = made.sizes, resolved(config).compare
    if config.compare is None or compare is None or sizes.examples is None:
        return []
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
        redone = [made.costs[name].operations for name in ("proxy", "trajectories")] if compare.redo_from == "proxy" else []
        operations += (compare.seeds - 1) * sum(known for known in redone if known is not None)
        line = f"It costs {operations:.2e} operations"
        seconds = seconds_of(operations, made.accelerator, config.target.precision)
        if seconds is not None:
            line += f", {seconds / 3600:.2f} hours on one {made.accelerator} at {UTILISATION:.0%} of its peak"
            line += "" if made.price_per_hour is None else f", {seconds / 3600 * made.price_per_hour:.2f} in money"
        lines.append(f"{line}.")
    lines.append(_detectable(compare, Storage(made.place)))
    return lines


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
