"""What the report says about numbers: its sentences and tables, from summaries and metrics. Pure functions."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from s2l_ray.progress import duration
from s2l_ray.report.facts import GroupCurves, Measure, Source, StageSeconds
from s2l_ray.storage.layout import STAGE_NAMES

Summary = Mapping[str, Any]

STAGES = STAGE_NAMES[:-1]
ROLES = dict.fromkeys(STAGES, "choosing") | {"examples": "preparing", "target": "target", "evaluation": "evaluating"}
MODELS = ("untrained", "selected", "random")
# Up to so many groups are all shown with texts; of more, a spread over the levels.
MAX_GROUPS_WITH_TEXTS, NUM_SPREAD_GROUPS = 30, 12
NONE = "\u2013"
FEATURES = {
    "raw": "the losses (raw)",
    "reduction": "the drop of the loss since the first checkpoint (reduction)",
    "shape": "the losses without their level (shape)",
    "whitened": "the principal components, each with variance 1 (whitened)",
    "profile": "the losses with the statistics of each response's tokens (profile)",
}
DRAWS = {
    "random": "at random, by a hash of their ids",
    "central": "those nearest to its centroid",
    "spread": "one of each of as many groups inside it",
}
ENDS = {
    "converged": "no example changed its group",
    "tolerance": "the centroids hardly moved",
    "num_iterations": "the limit was reached",
}


def verdict(selection: Summary | None, metrics: Mapping[str, Any] | None) -> list[str]:
    """The result in plain words. A loss of S2L is reported as plainly as a win, and one seed is no conclusion."""
    if selection is None:
        return ["Nothing has been chosen yet: this run is unfinished."]
    chosen, pool = selection["rows"], selection["pool"]
    who = _chooser(selection)
    start = f"{who} chose {chosen:,}{f' of {pool:,}' if pool else ''} examples{f' ({chosen / pool:.1%})' if pool else ''}"
    loss = {name: values["loss_per_token"] for name, values in (metrics or {}).items() if values["loss_per_token"] is not None}
    if "selected" not in loss:
        reason = (
            "no target trained on them has been evaluated yet" if metrics is None else "no rows were held out to evaluate on"
        )
        return [f"{start}; {reason}."]
    reaches = f"{start}; the target trained on them reaches {loss['selected']:.4f} nats per token on held-out rows"
    if "untrained" in loss:
        reaches += f" ({loss['untrained']:.4f} before training)"
    if "random" not in loss:
        return [f"{reaches}.", f"Without a random subset of the same size beside it, this does not say whether {who} helped."]
    advantage = loss["random"] - loss["selected"]
    lines = [
        f"{reaches}, against {loss['random']:.4f} for a random subset of the same size: "
        f"{_outcome(who, advantage, loss['random'])}."
    ]
    lines += _by_source(who, metrics or {}, advantage, selection.get("sources") or {})
    lines.append("One training run of each: another seed may turn it round, so this is no conclusion about the method.")
    return lines


def _chooser(selection: Summary) -> str:
    """What chose the subset, in a sentence."""
    method = selection.get("method", "s2l")
    return "S2L" if method == "s2l" else f"'{method}'"


def _by_source(who: str, metrics: Mapping[str, Any], advantage: float, sources: Mapping[str, Any]) -> list[str]:
    """The result averaged over sources, alike and by their rows in the pool, where there are several.

    Held-out rows need not have the shares of the pool (`examples.held_out_per_source`), so each may differ from the first.
    """
    macro, by_source = ({name: metrics[name].get(key) for name in metrics} for key in ("loss_macro", "loss_by_source"))
    if len(by_source.get("selected") or ()) < 2 or None in (macro["selected"], macro["random"]):
        return []
    wins = sum(by_source["selected"][name] < loss for name, loss in by_source["random"].items())
    gain = macro["random"] - macro["selected"]
    turned = ", the other way round" if gain * advantage < 0 else ""
    lines = [
        f"Averaged over sources, so that each counts the same, {macro['selected']:.4f} against {macro['random']:.4f}{turned}: "
        f"{_outcome(who, gain, macro['random'])}. {who} is better on {wins} of {len(by_source['random'])} sources."
    ]
    pool = [sources.get(name, {}).get("pool", 0) for name in by_source["random"]]
    if sum(pool):
        selected, random = (
            float(np.average([by_source[model][name] for name in by_source["random"]], weights=pool))
            for model in ("selected", "random")
        )
        lines.append(
            f"Averaged over sources by their rows in the pool, {selected:.4f} against {random:.4f}: "
            f"{_outcome(who, random - selected, random)}."
        )
    return lines


def _outcome(who: str, advantage: float, reference: float | None = None) -> str:
    """Who wins and by how much; below what four decimals show it is a draw."""
    if abs(advantage) < 0.00005:
        return "a draw"
    share = "" if not reference else f" ({abs(advantage) / reference:.1%})"
    return f"{who} {'wins' if advantage > 0 else 'loses'} by {abs(advantage):.4f}{share}"


def measures(metrics: Mapping[str, Any], held_out: Mapping[str, int]) -> list[Measure]:
    """The evaluation table: the loss overall, averaged over sources and by source, then the tasks' metrics.

    Without held-out rows there is no loss, and no row for it.
    """

    def values(*path: str) -> dict[str, float | None]:
        return {model: value_at(metrics[model], path) for model in MODELS if model in metrics}

    def keys(*path: str) -> list[str]:
        return sorted({key for model in metrics.values() for key in (value_at(model, path) or {})})

    rows = [
        Measure("all held-out rows", "loss", values("loss_per_token"), sum(held_out.values()) or None),
        Measure("mean over sources", "loss", values("loss_macro")),
    ]
    rows = [row for row in rows if any(value is not None for value in row.values.values())]
    rows += [Measure(name, "loss", values("loss_by_source", name), held_out.get(name)) for name in keys("loss_by_source")]
    for task in keys("tasks"):
        # `rows`: how many were generated and scored, the same for every model.
        num_rows = next((int(count) for count in values("tasks", task, "rows").values() if count), None)
        for metric in keys("tasks", task):
            if metric == "rows":
                continue
            found = values("tasks", task, metric)
            lower = any(word in metric.lower() for word in ("loss", "perplexity", "bits_per_byte"))
            # A count and an error bar are not better when larger.
            comparable = "stderr" not in metric.lower() and not all(isinstance(v, int | None) for v in found.values())
            rows.append(Measure(f"{task}: {metric}", "task", found, num_rows, lower, comparable))
    return rows


def value_at(value: Any, path: Iterable[str]) -> Any:
    """The value at a path of keys, none where the path ends early."""
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def costs(seconds: Mapping[str, float]) -> list[StageSeconds]:
    """Seconds per stage with their shares."""
    total = sum(seconds.values())
    return [StageSeconds(name, ROLES[name], value, value / total if total else 0.0) for name, value in seconds.items()]


def price(rows: Sequence[StageSeconds], trains_random: bool) -> str | None:
    """What choosing cost, compared with training the target; None before both are known."""
    stages = {row.stage for row in rows}
    if not {"proxy", "trajectories", "target"} <= stages:
        return None
    choosing = sum(row.seconds for row in rows if row.role == "choosing")
    scoring = sum(row.seconds for row in rows if row.stage in {"proxy", "trajectories"})
    target = sum(row.seconds for row in rows if row.role == "target")
    text = f"Choosing took {duration(choosing)}, of which training the proxy and scoring with it {duration(scoring)}"
    control = " (the random control's training included)" if trains_random else ""
    text += f"; the target's training took {duration(target)}{control}"
    return f"{text}: choosing cost {choosing / target:.2f} times the target." if target else f"{text}."


def sources(examples: Summary | None, selection: Summary | None) -> list[Source]:
    """Sources before and after, the largest first."""
    before = (examples or {}).get("sources", {})
    after = (selection or {}).get("sources") or {name: {"pool": row["pool"]} for name, row in before.items()}
    totals = {key: sum(row.get(key) or 0 for row in after.values()) for key in ("pool", "selected", "random")}

    def fraction(row: Mapping[str, Any], key: str) -> float | None:
        return row[key] / totals[key] if row.get(key) is not None and totals[key] else None

    found = [
        Source(
            name,
            row["pool"],
            before.get(name, {}).get("held_out"),
            row.get("selected"),
            row.get("random"),
            fraction(row, "pool") or 0.0,
            fraction(row, "selected"),
            fraction(row, "random"),
        )
        for name, row in after.items()
    ]
    return sorted(found, key=lambda source: (-source.pool, source.name))


def quality(clustering: Summary, selection: Summary) -> list[tuple[str, str]]:
    """How good the groups are, in plain words: (what, value). What was not measured is left out."""
    known = {**clustering, **clustering.get("diagnostics", {})}
    if selection.get("method", "s2l") == "s2l":
        known |= {name: selection.get(name) for name in ("stability", "allocation", "draw")}
    pool, ends = known.get("rows"), [ENDS.get(end, end) for end in known.get("ended_by", [])]
    until = f", until {' or '.join(ends)}" if ends else ""
    sample = f" on {known['sampled_rows']:,} examples" if known.get("sampled_rows", pool) != pool else ""
    known["strata"] = _strata(clustering)
    tiny = f"groups of at most {known.get('tiny_rows')} examples"
    if known.get("features") == "raw":
        known["effective_dimension_of_features"] = None  # the same
    known["points"] = known.get("points") and ", ".join(map(str, known["points"]))
    if known.get("training_rows") == pool:
        known["training_rows"] = None
    lines: list[tuple[str, str, Callable[[Any], str]]] = [
        ("strata", "groups were made", str),
        ("allocation", "share of a group", lambda power: f"its size to the power {power:g}" if power else "all alike"),
        ("draw", "which rows of a group", lambda draw: DRAWS.get(draw, draw)),
        ("features", "what k-means saw", lambda kind: FEATURES.get(kind, kind)),
        ("points", "of the points, from 0", str),
        ("training_rows", "trained on", lambda rows: f"{rows:,} of {pool:,} examples; the others were only assigned"),
        ("num_iterations", "iterations", lambda count: f"{count:,}{until}"),
        ("explained_variance", "variance explained by the groups", percent),
        ("variance_explained_by_source", "variance explained by source alone", percent),
        ("agreement_of_restarts", "agreement of restarts (ARI)", lambda index: f"{index:.2f}{sample}"),
        ("agreement_with_source", "agreement with source (ARI)", lambda index: f"{index:.2f}"),
        ("information_on_source", "information on source (NMI)", lambda index: f"{index:.2f}"),
        ("purity_by_source", "examples of their group's commonest source", percent),
        ("stability", "subset that stays the same from another seed", _stability),
        ("effective_dimension", "effective dimension", lambda d: f"{d:.2f} of {len(known['principal_components'])}"),
        ("effective_dimension_of_features", "effective dimension of what k-means saw", lambda d: f"{d:.2f}"),
        ("tiny_groups", tiny, lambda n: f"{n:,} of {known['num_clusters']:,}"),
    ]
    return [(what, in_words(known[key])) for key, what, in_words in lines if known.get(key) is not None]


def _strata(clustering: Summary) -> str | None:
    """Within what groups were made, and in how many levels; None where a summary does not say."""
    if "stratify_by" not in clustering:
        return None
    column, parents = clustering["stratify_by"], clustering.get("parents", [])
    within = f"within each {column} ({len(clustering['strata']):,})" if column else "over all examples"
    levels = [clustering["num_clusters"], *(max(above) + 1 for above in parents)]
    return f"{within}, in levels of {' -> '.join(f'{count:,}' for count in levels)}" if parents else within


def _stability(stability: Summary) -> str:
    return f"{percent(stability['common'])} (with the same draws and no groups {percent(stability['without_groups'])})"


def budgets(selection: Summary) -> list[tuple[str, int, str]]:
    """The run's budget and the further ones: (budget, examples, file); none where there is no further one."""

    def words(budget: Any) -> str:
        if isinstance(budget, Mapping):
            return f"{budget['tokens']:,} response tokens"
        return f"{100 * budget:g}% of the pool" if budget < 1 else f"{budget:,} examples"

    found = [(words(one["budget"]), one["rows"], one["file"]) for one in selection.get("budgets") or []]
    return found if len(found) > 1 else []


def percent(fraction: float | None) -> str:
    """A share in percent; a dash for none. A share that is small but not zero does not read as zero."""
    if fraction is None:
        return NONE
    return f"{fraction:.1%}" if fraction == 0 or fraction >= 0.0005 else "< 0.1%"


def shown_groups(groups: GroupCurves) -> list[int]:
    """The groups whose texts are shown, from the lowest level to the highest: all of them, or of many a spread."""
    by_level = sorted((k for k in range(len(groups.sizes_K)) if groups.sizes_K[k]), key=lambda k: (groups.levels_K[k], k))
    if len(by_level) <= MAX_GROUPS_WITH_TEXTS:
        return by_level
    return [by_level[i] for i in np.linspace(0, len(by_level) - 1, NUM_SPREAD_GROUPS).round().astype(int)]


def without_credentials(text: str) -> str:
    """A text in which `scheme://user:password@host` has lost user and password: a report is passed on."""
    return re.sub(r"(\w://)[^/\s@'\"]+@", r"\1***@", text)
