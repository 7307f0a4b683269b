"""The card of a subset, as the Hub and `datasets` read it: which files there are, how the rows were chosen, from what.

No text of the corpus stands in it: counts, names of sources, settings and measures only.
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

import yaml

from s2l_ray.selectors import S2L, SELECTORS
from s2l_ray.storage.artifacts import Artifact

MARK = "written by s2l_ray"
"""Stands in every file that an export writes beside its data: only such a file is ever replaced."""

_MOST_SOURCES = 50
_METHOD = "[SmallToLarge](https://arxiv.org/abs/2403.07384)"


def front_matter(
    files: Mapping[str, str],
    features: list[dict[str, Any]] | None = None,
    licence: str | None = None,
    contents: Mapping[str, str] | None = None,
) -> str:
    """The head of a card: each configuration's name and file, the first the default one, and the types of its columns where
    they are not to be inferred.

    `contents`: file -> a hash that stands for its rows. `datasets` knows a folder by its last name and by this head alone, and
    would give the rows of another run's folder from its cache.
    """
    default = next(iter(files))
    configs = [
        {"config_name": name, "data_files": path}
        | ({"default": True} if name == default else {})
        | ({"description": f"rows {contents[path][:16]}"} if contents else {})
        for name, path in files.items()
    ]
    head: dict[str, Any] = {"configs": configs}
    if features is not None:
        head["dataset_info"] = {"config_name": default, "features": features}
    if licence is not None:
        head["license"] = licence
    head["tags"] = ["s2l_ray", "data-selection"]
    return f"---\n# {MARK}\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---\n"


def describe(
    recipe: Mapping[str, Any],
    summary: Mapping[str, Any],
    inputs: Mapping[str, Artifact],
    *,
    only: tuple[str, int] | None = None,
    dataset: str | None = None,
    licence: str | None = None,
) -> str:
    """The body of a card, the same for the same arguments.

    `recipe` and `summary` are the selection's; `inputs` the artifacts that it was made from, of which `clustering` is there
    always; `only` is the one file that the card goes with, and its examples, where it is not the whole directory's card;
    `dataset` names the corpus as its user would.
    """
    clustering = inputs["clustering"]
    proxy = inputs.get("proxy")
    num_chosen = only[1] if only else summary["rows"]
    return "\n".join(
        [
            f"# {num_chosen:,} examples of {summary['pool']:,}, chosen by s2l_ray",
            "",
            *_method(summary),
            "",
            f"- Corpus: {_corpus(inputs.get('examples'), dataset)}",
            f"- Small model: {_model(proxy)}",
            f"- Licence: {licence or 'that of the corpus'}",
            "",
            *([f"The rows are in `{only[0]}`.", ""] if only else _subsets(summary)),
            *_sources(summary),
            "## Quality",
            "",
            *_quality(clustering.summary, summary),
            "",
            "## Settings",
            "",
            "```yaml",
            yaml.safe_dump(_settings(recipe, clustering, proxy), sort_keys=False).rstrip(),
            "```",
            "",
        ]
    )


def _corpus(examples: Artifact | None, dataset: str | None) -> str:
    if examples is None:
        return "that of the trajectories which were given to `s2l select`"
    kind, _, identity = str(examples.manifest["recipe"].get("corpus", "")).partition(":")
    if kind == "hub":
        name, _, commit = identity.partition("@")
        return f"[{name}](https://huggingface.co/datasets/{name}) at commit `{commit}`"
    named = f"{_escaped(dataset)}, " if dataset else ""
    return f"{named}{'tasks of reasoning-gym' if kind == 'reasoning_gym' else 'files'} with the hash `{identity}`"


def _model(proxy: Artifact | None) -> str:
    if proxy is None:
        return "not known here"
    model = proxy.manifest["recipe"].get("model")
    if isinstance(model, str) and (model.startswith(("/", ".", "~")) or "://" in model):
        model = model.rstrip("/").rpartition("/")[2]
    parameters = f"{proxy.summary['num_parameters']:,} parameters" if "num_parameters" in proxy.summary else ""
    return ", ".join(filter(None, [_escaped(model) if isinstance(model, str) else "from scratch", parameters]))


def _method(summary: Mapping[str, Any]) -> list[str]:
    chosen = SELECTORS[summary.get("method", S2L)]
    if chosen.name == S2L:
        return [
            f"Chosen by {_METHOD}: a small model was trained on all examples, their losses along that training",
            f"were put into {summary['num_clusters']:,} groups by k-means, and every group gives {_share(summary)}",
            "`cluster_id` is an example's group, `weight` the size of that group over the number taken from it.",
        ]
    paper = f" ([arXiv {chosen.paper}](https://arxiv.org/abs/{chosen.paper}))" if chosen.paper else ""
    aware = ["The validation rows, which are of the kind that the target is evaluated on, had a part in the choice."]
    weight = "the number of examples that it stands for" if chosen.strata else "1: this choice estimates nothing"
    group = "an example's group by k-means on the losses of a small model"
    group = group if _has_groups(summary) else "0 (this method reads no groups, and none were made)"
    return [
        f"Method `{chosen.name}`{paper}, another than SmallToLarge. {chosen.about}",
        *(aware if chosen.is_target_aware else []),
        f"`cluster_id` is {group}, `weight` {weight}.",
    ]


def _has_groups(summary: Mapping[str, Any]) -> bool:
    """Whether there are groups to speak of: `s2l select` makes none for a method that reads none."""
    return bool(SELECTORS[summary.get("method", S2L)].reads_groups or summary["num_clusters"] > 1)


def _share(summary: Mapping[str, Any]) -> str:
    power = summary["allocation"]
    return f"a share that grows with its size to the power {power:g}." if power else "an equal share, small groups first."


def _subsets(summary: Mapping[str, Any]) -> list[str]:
    rows = [f"| `{one['file']}` | {_budget(one['budget'])} | {one['rows']:,} |" for one in summary["budgets"]]
    return ["| file | budget | examples |", "| --- | --- | --- |", *rows, ""]


def _budget(budget: Any) -> str:
    if isinstance(budget, Mapping):
        return f"{budget['tokens']:,} response tokens"
    return f"{100 * budget:g}% of the examples" if budget < 1 else f"{budget:,} examples"


def _sources(summary: Mapping[str, Any]) -> list[str]:
    if not summary["sources"]:
        return []
    shown = list(summary["sources"].items())[:_MOST_SOURCES]
    left_out = len(summary["sources"]) - len(shown)
    rows = [f"| {_escaped(name)} | {counts['pool']:,} | {counts['selected']:,} |" for name, counts in shown]
    more = [f"and {left_out:,} more sources", ""] if left_out else []
    return ["| source | examples | chosen |", "| --- | --- | --- |", *rows, "", *more]


def _quality(clustering: Mapping[str, Any], selection: Mapping[str, Any]) -> list[str]:
    known = {**clustering, **clustering.get("diagnostics", {}), **(selection.get("stability") or {})}
    lines = [
        *([("explained_variance", "variance of the losses that the groups explain: {:.1%}")] * _has_groups(selection)),
        ("variance_explained_by_source", "variance that the sources alone explain: {:.1%}"),
        ("agreement_of_restarts", "agreement of groupings from other starts (adjusted Rand index): {:.2f}"),
        ("common", "part of the subset that stays the same from another start: {:.1%}"),
        ("effective_dimension", "effective dimension of the losses: {:.2f}"),
        *([("tiny_groups", "tiny groups: {:,}")] * _has_groups(selection)),
    ]
    return [f"- {text.format(known[key])}" for key, text in lines if known.get(key) is not None]


def _settings(recipe: Mapping[str, Any], clustering: Artifact, proxy: Artifact | None) -> dict[str, Any]:
    """What the subset depends on, but for names of places."""
    settings = {"selection": dict(recipe), "clustering": dict(clustering.manifest["recipe"])}
    if proxy is not None:
        left_out = {"model", "revision", "tokenizer", "checkpoints"}
        settings["proxy"] = {key: value for key, value in proxy.manifest["recipe"].items() if key not in left_out}
    return settings


def _escaped(text: str) -> str:
    """Text that is neither HTML nor a link nor the end of a table's cell."""
    plain = html.escape(" ".join(text.split()))
    return "".join(f"\\{mark}" if mark in "\\`*_[]|" else mark for mark in plain)
