"""The section of `s2l compare`: which ways to choose a subset are compared, and how."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from s2l_ray.config.section import Positive, Section

Stage = Literal["proxy", "clustering", "selection", "target"]


class Curation(Section):
    """What a person needs to look an example through: the price that a selection is also compared to."""

    seconds_per_example: Annotated[float, Field(gt=0)]
    """Time for one example."""

    hourly_rate: Annotated[float, Field(ge=0)]
    """Price of one hour, in the currency of `plan.price_per_hour`."""


class CompareConfig(Section):
    """Arms x budgets x seeds: each a target trained alike, from the same starting weights, on another subset."""

    arms: list[str | dict[str, dict[str, Any]]] | None = None
    """Names of selectors and of known variants of S2L (`s2l compare --arms` lists both), or `{NAME: {section.field: value}}`:
    the run's own config with other settings. Random is always there, and source_balanced where the corpus names several
    sources. Without it: these, source_matched where there are sources (not with `selection.draw: spread`, which has no order to
    follow), and s2l."""

    ablations: dict[str, list[Any]] = Field(default_factory=dict)
    """More arms: the run's S2L with one field at each of these values, such as `{clustering.num_clusters: [10, 40, 100]}`."""

    primary: str = "s2l"
    """The arm whose difference to random is the question, asked at the first budget. All others are corrected for being
    many."""

    budgets: Annotated[list[int | float], Field(min_length=1)] | None = None
    """Examples, or fractions of the pool below 1; without them `selection.budget`."""

    seeds: Positive = 5
    """How often each arm is trained at each budget: 2 or more, since one has no interval."""

    full_seeds: Annotated[int, Field(ge=0)] = 1
    """How often a target is trained on all data: the ceiling by which the share of the gap is measured. 0: never."""

    redo_from: Stage = "proxy"
    """What each seed does anew: this stage and those after it. `proxy`: everything, so that the intervals are of the whole
    method; `target`: one subset, trained on in another order."""

    fit: Literal["auto", "together", "alone"] = "auto"
    """How targets are trained. together: many in each worker process, which starts up once; alone: one after the other by the
    fit of the stage `target`, over many workers. auto: together for targets from scratch, and for others of up to 200 million
    parameters without LoRA."""

    pilot_deviation: Annotated[float, Field(gt=0)] = 0.025
    """Standard deviation over seeds of the paired difference to random, in nats per token, from which `s2l plan` computes what
    the comparison could see until it has a table of its own. (0.025: of an earlier look with targets of 2.2M parameters; the
    first readings in `benchmarks/` had 0.008.)"""

    premise_on_target: bool = False
    """With `--premise`: also the gradients of the untrained target, which cost as much more as it is larger."""

    curation: Curation | None = None
    """What a person would need to look the pool through instead, for the table of costs."""

    @field_validator("seeds")
    @classmethod
    def _seeds_give_an_interval(cls, seeds: int) -> int:
        if seeds < 2:
            raise ValueError("one seed has no interval: nobody could say whether a difference is one. Set 2 or more (better 5)")
        return seeds

    @field_validator("budgets")
    @classmethod
    def _budgets_are_sizes(cls, budgets: list[Any] | None) -> list[Any] | None:
        for budget in budgets or []:
            if budget <= 0 or (budget >= 1 and not float(budget).is_integer()) or (isinstance(budget, float) and budget == 1):
                raise ValueError(f"{budget}: a budget is a number of examples, or a fraction of the pool below 1")
        return None if budgets is None else [int(budget) if budget > 1 else budget for budget in budgets]

    @model_validator(mode="after")
    def _arms_are_named_once(self) -> CompareConfig:
        names = [name for arm in self.arms or [] for name in ([arm] if isinstance(arm, str) else arm)]
        for arm in self.arms or []:
            if isinstance(arm, dict) and len(arm) != 1:
                raise ValueError(f"expected NAME or {{NAME: {{section.field: value}}}}, found a mapping of {len(arm)}: {arm}")
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"the arm '{twice[0]}' occurs twice")
        return self
