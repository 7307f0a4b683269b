"""The premise in words: a few lines for the terminal, and one sentence that says whether it holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from s2l_ray.progress import duration

# Shares of the variance above chance, of what chance leaves: from here on the premise holds in part, and clearly.
IN_PART, CLEARLY = 0.05, 0.2
SIGNIFICANT = 0.05
# Bands of the final loss explain as much as the groups from this share of theirs on.
AS_MUCH = 0.95


def verdict(measured: Mapping[str, Any]) -> str:
    """One plain sentence about one model's gradients."""
    groups, within, sources = (measured["explained"][name] for name in ("groups", "groups_within_sources", "sources"))
    of = "the target's gradients'" if measured["model"] == "target" else "the gradients'"
    if groups is None:
        return "The sampled gradients do not differ, so nothing can be said of the premise here."
    said = f"Groups explain {groups['share']:.0%} of {of} variance, random groups of the same sizes {groups['random']:.0%}: "
    if groups["p_value"] > SIGNIFICANT:
        return said + "the premise cannot be seen to hold here."
    excess = groups["excess"]
    said += f"the premise holds {'weakly ' if excess < IN_PART else 'in part ' if excess < CLEARLY else ''}here"
    if within is not None and within["p_value"] > SIGNIFICANT:
        return said + ", but only as far as groups follow the sources."
    if sources is not None and sources["excess"] > excess:
        return said + f", and sources tell more ({sources['share']:.0%}, random ones {sources['random']:.0%})."
    bands = measured["explained"]["final_loss_bands"]
    if bands["excess"] >= AS_MUCH * excess:
        return said + f", but bands of the final loss alone explain as much ({bands['share']:.0%})."
    return said + "."


def premise_text(premise: Mapping[str, Any]) -> str:
    """The premise in at most twelve lines."""
    sample, lines = premise["sample"], []
    lines.append(
        f"premise: {sample['rows']:,} of {sample['pool']:,} examples, in {sample['groups']:,} of {sample['num_clusters']:,} "
        f"groups and {sample['sources']:,} sources, {duration(premise['seconds'])}"
    )
    for measured in premise["gradients"]:
        name = "target, untrained" if measured["model"] == "target" else f"proxy, step {measured['step']:,}"
        lines += [f"gradients ({name}): {line}" for line in _gradient_lines(measured)]
    if premise["agreement"] is not None:
        found = premise["agreement"]
        named = {"final losses": "final_loss", "losses' fall": "reduction", "distances of pairs": "distance"}
        values = [f"{what} {_interval(found[key])}" for what, key in named.items() if found[key] is not None]
        lines.append(f"proxy and target (rank correlation, {found['steps'][-1]} steps on the sample): {', '.join(values)}")
    dimensions = {"proxy": premise["effective_dimension"], "target": (premise["agreement"] or {}).get("effective_dimension")}
    texts = [f"{name} {one['value']:.1f} of {one['points']}" for name, one in dimensions.items() if one is not None]
    lines.append(f"effective dimension of the trajectories: {', '.join(texts)}")
    return "\n".join([*lines, premise["sentence"]])


def _gradient_lines(measured: Mapping[str, Any]) -> list[str]:
    cosine, explained = measured["cosine"], measured["explained"]
    alike = [
        f"same {word} {_interval(found['same'])}, other {word}s {_interval(found['other'])}"
        for word, found in (("group", cosine["groups"]), ("source", cosine["sources"]))
        if found is not None
    ]
    if measured["near_is_alike"] is not None:
        alike.append(f"rank correlation with the nearness of trajectories {_interval(measured['near_is_alike'])}")
    lines = [f"mean cosine {'; '.join(alike)}"] if alike else []
    groups, within, sources = (explained[name] for name in ("groups", "groups_within_sources", "sources"))
    if groups is not None:
        others = [("random ones", groups["random"])]
        others += [("random ones within sources", within["random"])] if within is not None else []
        bands = {"bands of the final loss": "final_loss_bands", "bands of the response's length": "length_bands"}
        others += [(name, explained[key]["share"]) for name, key in bands.items()]
        text = ", ".join(f"{name} {share:.1%}" for name, share in others)
        text = f"of their variance groups explain {groups['share']:.1%} ({text})"
        text += f", sources {sources['share']:.1%} (random ones {sources['random']:.1%})" if sources is not None else ""
        lines.append(text)
    return lines


def _interval(found: Mapping[str, float]) -> str:
    value, low, high = (f"{round(found[name], 2) + 0.0:.2f}" for name in ("value", "low", "high"))  # no minus zero
    return f"{value} [{low}, {high}]"
