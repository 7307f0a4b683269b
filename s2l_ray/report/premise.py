"""The premise on the page: what `s2l compare --premise` measured, from RUN/compare/premise.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from s2l_ray.report import plots
from s2l_ray.report.wording import NONE
from s2l_ray.storage.layout import COMPARE, PREMISE
from s2l_ray.storage.places import Storage

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True)
class PremiseModel:
    """A model whose gradients were measured."""

    name: str
    cosines: Mapping[str, str]
    """`same_group`, `other_group`, `same_source`, `other_source`, `near` (the rank correlation with the nearness of two
    trajectories), each with its interval."""

    shares: Mapping[str, float | None]
    """What explains how much of the gradients' variance: the groups, others of the same sizes, and sources."""


@dataclass(frozen=True)
class PremiseFacts:
    """What the section shows."""

    sentence: str
    sample: str
    models: Sequence[PremiseModel]
    agreement: Sequence[tuple[str, str]]
    """What is compared of proxy and target, and their rank correlation with its interval."""

    dimensions: Sequence[tuple[str, str]]
    """Whose trajectories, and their effective dimension."""


def read_premise(run: Storage) -> PremiseFacts | None:
    """What a run's premise.json says, None where nobody has measured it. Raises ArtifactError where it is damaged."""
    found = run.child(COMPARE).read_json(PREMISE)
    return None if found is None else premise_facts(found)


def premise_facts(found: Mapping[str, Any]) -> PremiseFacts:
    """The content of premise.json as the page has it."""
    sample, target = found["sample"], found["agreement"] or {}
    names = {"final_loss": "final loss", "reduction": "fall of the loss", "distance": "distances of pairs of trajectories"}
    agreement = [(name, _interval(target[key])) for key, name in names.items() if key in target]
    measured = {"proxy": found["effective_dimension"], "target, trained on the sample": target.get("effective_dimension")}
    dimensions = [(name, f"{one['value']:.2f} of {one['points']}") for name, one in measured.items() if one]
    text = (
        f"{sample['rows']:,} of {sample['pool']:,} examples, in {sample['groups']:,} of {sample['num_clusters']:,} groups and "
        f"{sample['sources']:,} sources"
    )
    return PremiseFacts(found["sentence"], text, [_model(one) for one in found["gradients"]], agreement, dimensions)


def _model(measured: Mapping[str, Any]) -> PremiseModel:
    name = "target, untrained" if measured["model"] == "target" else f"proxy, step {measured['step']:,}"
    cosine, explained = measured["cosine"], measured["explained"]
    kinds = {"group": cosine["groups"], "source": cosine["sources"]}
    cosines = {
        f"{which}_{kind}": _interval((one or {}).get(which)) for kind, one in kinds.items() for which in ("same", "other")
    }
    cosines["near"] = _interval(measured["near_is_alike"])
    shares = {
        "groups": _share(explained, "groups"),
        "random groups": _share(explained, "groups", "random"),
        "random groups within sources": _share(explained, "groups_within_sources", "random"),
        "bands of the final loss": _share(explained, "final_loss_bands"),
        "bands of the response's length": _share(explained, "length_bands"),
        "sources": _share(explained, "sources"),
    }
    return PremiseModel(name, cosines, shares)


def _share(explained: Mapping[str, Any], name: str, which: str = "share") -> float | None:
    return None if explained[name] is None else explained[name][which]


def _interval(found: Mapping[str, float] | None) -> str:
    if found is None:
        return NONE
    value, low, high = (f"{round(found[name], 2) + 0.0:.2f}" for name in ("value", "low", "high"))  # no minus zero
    return f"{value} [{low}, {high}]"


def explained_figure(facts: PremiseFacts) -> go.Figure:
    """What of each model's gradients the groups explain, beside random groups and sources."""
    return plots.explained_variance([model.name for model in facts.models], [model.shares for model in facts.models])
