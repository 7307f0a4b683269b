"""What a run would do with every stage, and what that would cost, as one table."""

from __future__ import annotations

from dataclasses import dataclass

from s2l_ray.clustering.stratifying import AUTO, strata_of
from s2l_ray.config import RunConfig
from s2l_ray.errors import ConfigError, DataError
from s2l_ray.pipeline import STAGES, Decision, decide
from s2l_ray.plan.accelerators import ACCELERATORS, ACCELERATORS_PER_NODE, UTILISATION, size
from s2l_ray.plan.costs import Cost, Sizes, costs_of, sizes_of
from s2l_ray.plan.target_memory import memory_lines, num_accelerators_of, resume_point_lines
from s2l_ray.runtime.session import run_places
from s2l_ray.storage.hub import resolve_revisions


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
    sizes: Sizes
    accelerator: str | None

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

    Raises ConfigError for an unknown accelerator, and for more accelerators than examples in the target's batch.
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
        # A plan for a corpus that is not here (a Hub dataset, somebody else's bucket) still estimates the cost.
        if config.plan.num_examples is None:
            raise
        notes.append(f"WARNING: the corpus cannot be looked at, the config's `plan` section stands in for it: {error}")
        decisions = [Decision(stage, "build", "the corpus cannot be looked at") for stage in STAGES]
    sizes = sizes_of(config, decisions, notes)
    costs = costs_of(config, sizes, accelerator)
    notes += [*resume_point_lines(config, sizes), *_strata_lines(config, decisions)]
    memory: list[str] = []
    is_built = any(decision.stage.name == "target" and decision.action in ("build", "resume") for decision in decisions)
    if accelerator is not None and sizes.target_parameters and is_built:
        number = num_accelerators or num_accelerators_of(config)
        memory = [*memory_lines(config, sizes.target_parameters, accelerator, number, accelerators_per_node), ""]
    if accelerator is not None:
        notes.append(
            f"Hours: on one {accelerator} at {UTILISATION:.0%} of its peak rate (an assumption); price per hour: {price}."
        )
    if config.evaluation.random_control:
        notes.append("The target counts twice: evaluation.random_control trains a second one on a random subset.")
    return Plan(config.name, place.uri, decisions, costs, memory, notes, price, sizes, accelerator)


def _strata_lines(config: RunConfig, decisions: list[Decision]) -> list[str]:
    """What `clustering.stratify_by: auto` means for the corpus, as far as that is known; nothing for a given column."""
    if config.clustering.stratify_by != AUTO:
        return []
    found = next((d.artifact.summary for d in decisions if d.stage.name == "examples" and d.artifact is not None), None)
    if found is None:
        return ["Strata (clustering.stratify_by=auto): by source where the corpus turns out to name several."]
    sources = [name for name, counts in found["sources"].items() if counts["pool"]]
    strata = strata_of(config.clustering, sources, found["pool"], config.examples.sources_are_files)
    return [f"Strata (clustering.stratify_by=auto): {'by source' if strata.column else 'none'}, {strata.reason}."]
