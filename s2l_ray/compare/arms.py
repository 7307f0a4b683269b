"""The arms of a comparison: ways to choose a subset, each as the run's config with a few other settings."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from s2l_ray.config import ClusteringConfig, RunConfig, SelectionConfig, parse_config
from s2l_ray.config.comparing import CompareConfig
from s2l_ray.config.methods import OF_S2L_ALONE
from s2l_ray.errors import ConfigError
from s2l_ray.selectors import GROUPS, SELECTORS

RANDOM, BALANCED, FULL, S2L = "random", "source_balanced", "full", "s2l"
COST_MATCHED = "random_cost_matched"
"""Random, with the selection's own cost spent on more examples."""
SEED_PROXY = "proxy"
"""Names the proxies of other seeds, beside those of arms that need one of their own."""

ANY_SOURCES = ("one", "two")
"""Where the corpus has not been read yet: as if it named several."""

Settings = Mapping[str, Any]
"""Dotted field -> value."""

_PAPER: dict[str, Any] = {
    f"clustering.{name}": ClusteringConfig.model_fields[name].default for name in ("features", "levels")
} | {
    "clustering.stratify_by": None,
    "target.use_weights": False,
    "selection.method": S2L,
    **{f"selection.{name}": SelectionConfig.model_fields[name].default for name in OF_S2L_ALONE},
}
VARIANTS: dict[str, dict[str, Any]] = {
    S2L: {"selection.method": S2L},
    "s2l_allocation_0": _PAPER,
    "s2l_allocation_0.5": _PAPER | {"selection.allocation": 0.5},
    "s2l_allocation_1": _PAPER | {"selection.allocation": 1.0},
    "s2l_weighted": _PAPER | {"target.use_weights": True},
    "s2l_reduction": _PAPER | {"clustering.features": "reduction"},
    "s2l_shape": _PAPER | {"clustering.features": "shape"},
    "s2l_whitened": _PAPER | {"clustering.features": "whitened"},
    "s2l_profile": _PAPER | {"clustering.features": "profile"},
    "s2l_inside_sources": _PAPER | {"clustering.stratify_by": "source", "selection.defer_groups_up_to": 2},
}
"""Variants of S2L that a comparison knows by name: `s2l` as the config has it; the others over all rows, on the losses, in
equal shares (the paper), but for what the name says. `inside_sources` is the reference code's: equal shares of sources, K
groups in each, groups of one or two rows last."""


@dataclass(frozen=True)
class Arm:
    """A way to choose a subset."""

    name: str
    settings: Settings

    @property
    def redoes_proxy(self) -> bool:
        """Whether it needs other trajectories than the run has."""
        return any(field.startswith(("proxy.", "trajectories.")) for field in self.settings)

    def config(self, config: RunConfig) -> RunConfig:
        """The run's config with the arm's settings. Raises ConfigError that names the arm."""
        return with_settings(config, self.settings, f"compare.arms: {self.name}")


def with_settings(config: RunConfig, settings: Settings, where: str) -> RunConfig:
    """A config with other values at dotted fields. Raises ConfigError for a field that there is not, or a wrong value."""
    values = config.model_dump(mode="json", exclude_unset=True)
    for field, value in settings.items():
        *sections, name = field.split(".")
        place = values
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise ConfigError(f"{where}: '{field}' leads into a value that is no section.")
        if not sections or sections[0] in ("examples", "machines", "plan", "report", "compare", "evaluation"):
            raise ConfigError(
                f"{where}: '{field}' cannot differ between arms, which are compared on the same examples and alike. Set a "
                "field of proxy, trajectories, clustering, selection or target."
            )
        place[name] = value
    return parse_config(values, where)


def arms_of(config: RunConfig, sources: Sequence[str]) -> list[Arm]:
    """All arms of a comparison, random first, without the one of all data. `sources`: those of the pool.

    Raises ConfigError for a name that nobody knows, and where the primary arm is not among them.
    """
    compare = config.compare or CompareConfig()
    has_sources = len(sources) > 1
    # source_matched follows the order of S2L's draws, and draw=spread has none.
    matched = ["source_matched"] * (has_sources and config.selection.draw != "spread")
    wanted: list[str | dict[str, dict[str, Any]]] = [*matched, S2L] if compare.arms is None else list(compare.arms)
    always = [RANDOM, *([BALANCED] if has_sources else [])]
    arms = {name: _known(name) for name in always}
    for one in wanted:
        for name, settings in ({one: None} if isinstance(one, str) else one).items():
            arms[name] = _known(name) if settings is None else Arm(_checked(name), _of_one_s_own(name, settings))
    for field, values in compare.ablations.items():
        for value in values:
            arm = ablated(field, value)
            _of_one_s_own(arm.name, {field: value})
            if arm.name in arms and arms[arm.name] != arm:
                raise ConfigError(
                    f"compare.ablations: two arms would have the name '{arm.name}'. Give one as an arm of your own."
                )
            arms[arm.name] = arm
    for arm in arms.values():
        arm.config(config)
    if compare.primary == RANDOM:
        raise ConfigError("compare.primary: random is what the others are compared to. Name another arm.")
    if compare.primary not in arms:
        raise ConfigError(
            f"compare.primary: no arm '{compare.primary}' to compare to random. Add it to compare.arms, or name one of: "
            f"{', '.join(name for name in arms if name != RANDOM)}."
        )
    return list(arms.values())


def ablated(field: str, value: Any) -> Arm:
    """The run's S2L with one field at another value."""
    shown = "-".join(map(str, value)) if isinstance(value, list) else str(value)
    return Arm(re.sub(r"[^\w.=+-]+", "_", f"{field}={shown}"), {"selection.method": S2L, field: value})


def listing() -> str:
    """The arms that there are, a line each."""
    lines = [
        f"{one.name:<26} {one.about}{f' arXiv {one.paper}' if one.paper else ''}{' Target-aware.' * one.is_target_aware}"
        for one in SELECTORS.values()
    ]
    for name, settings in VARIANTS.items():
        if name not in SELECTORS:
            changed = ", ".join(f"{key}={value}" for key, value in settings.items() if _PAPER.get(key, NotImplemented) != value)
            lines.append(
                f"{name:<26} S2L over all rows, in equal shares{f', but for {changed}' if changed else ' (the paper)'}"
            )
    lines.append(f"{COST_MATCHED:<26} Random, with what the selection costs spent on training on more rows.")
    return "\n".join([*lines, "", "Others: {NAME: {section.field: value}} in compare.arms, or compare.ablations."])


def _known(name: str) -> Arm:
    if name in VARIANTS:
        return Arm(name, VARIANTS[name])
    method = RANDOM if name == COST_MATCHED else name
    if method not in SELECTORS:
        known = ", ".join([*SELECTORS, *(variant for variant in VARIANTS if variant not in SELECTORS), COST_MATCHED])
        raise ConfigError(
            f"compare.arms: '{name}' is neither a selector nor a known variant of S2L. Known: {known}. Others: "
            "{NAME: {section.field: value}}."
        )
    settings: dict[str, Any] = {"selection.method": method, "target.use_weights": False}
    if GROUPS not in SELECTORS[method].needs:  # else it follows S2L's own subset, however that shares
        settings |= {f"selection.{field}": SelectionConfig.model_fields[field].default for field in OF_S2L_ALONE}
    return Arm(name, settings)


def _of_one_s_own(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    if not settings:
        raise ConfigError(f"compare.arms: '{name}' changes nothing. Give it settings, such as {{clustering.num_clusters: 20}}.")
    budgets = [field for field in settings if field in ("selection.budget", "selection.more_budgets")]
    if budgets:
        raise ConfigError(f"compare.arms: {name}: {budgets[0]} is the comparison's, for all arms alike. Set compare.budgets.")
    if cuts := settings.keys() & {"target.tokenizer", "target.max_tokens", "target.truncation"}:
        raise ConfigError(
            f"compare.arms: {name}: {min(cuts)} decides which tokens of a held-out row count, and losses over other tokens "
            "are not compared. Set it for the run."
        )
    return settings


def _checked(name: str) -> str:
    if name in {FULL, COST_MATCHED, SEED_PROXY} | SELECTORS.keys() | VARIANTS.keys():
        raise ConfigError(f"compare.arms: the name '{name}' is taken. Give your own arm another.")
    if not re.fullmatch(r"[A-Za-z0-9][\w.=+-]*", name):
        raise ConfigError(f"compare.arms: '{name}' is no name for an arm of your own: letters, digits and _ . = + - alone.")
    return name
