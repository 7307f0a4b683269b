"""What the report says: everything the page shows, read from a run's artifacts.

A run may be partial: what is there is told, and what is not is named. Counts come from the manifests; of the corpus only the
few texts that are shown are read, part by part.

Terms: a group's *level* is the mean of its centroid; a group's *members* are the examples nearest to its centroid.
"""

from __future__ import annotations

import io
import json
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from s2l_ray.errors import ArtifactError
from s2l_ray.progress import duration
from s2l_ray.storage.artifacts import Artifact
from s2l_ray.storage.layout import BUILDING, CENTROIDS, METRICS, RUN, SELECTED, STAGE_NAMES
from s2l_ray.storage.places import Storage

Summary = Mapping[str, Any]
State = Literal["finished", "outdated", "unfinished", "not started"]

STAGES = STAGE_NAMES[:-1]
ROLES = dict.fromkeys(STAGES, "choosing") | {"examples": "preparing", "target": "target", "evaluation": "evaluating"}
MODELS = ("untrained", "selected", "random")
# Up to so many groups are all shown with texts; of more, a spread over the levels.
MAX_GROUPS_WITH_TEXTS, NUM_SPREAD_GROUPS = 30, 12
NUM_MEMBERS = 4
NUM_PLOTTED_SOURCES = 30
CLIPPED_CHARACTERS, MAX_CHARACTERS = 280, 4_000
NONE = "\u2013"
FEATURES = {
    "raw": "the losses (raw)",
    "reduction": "the drop of the loss since the first checkpoint (reduction)",
    "shape": "the losses without their level (shape)",
    "whitened": "the principal components, each with variance 1 (whitened)",
}
ENDS = {
    "converged": "no example changed its group",
    "tolerance": "the centroids hardly moved",
    "num_iterations": "the limit was reached",
}


# ---------------------------------------------------------------------------------------------------------------- types


@dataclass(frozen=True)
class Stage:
    """How far a stage is and where it came from; the fields after `state` are empty until it is finished."""

    name: str
    state: State
    fingerprint: str = ""
    created: str = ""
    git: str = ""
    reference: str = ""
    machines: str = ""
    rows: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)
    shortened: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Measure:
    """One row of the evaluation table: a value per model. `best` is the better of selected and random, if one is."""

    name: str
    kind: Literal["loss", "task"]
    values: Mapping[str, float | None]
    rows: int | None = None
    lower_is_better: bool = True
    is_comparable: bool = True

    @property
    def difference(self) -> float | None:
        """Selected minus random, none where one is missing or the values are no scores."""
        selected, random = self.values.get("selected"), self.values.get("random")
        return None if selected is None or random is None or not self.is_comparable else selected - random

    @property
    def best(self) -> str | None:
        if not self.difference:
            return None
        return "selected" if (self.difference < 0) == self.lower_is_better else "random"


@dataclass(frozen=True)
class Cost:
    """Seconds of a finished stage, and what they were spent on."""

    stage: str
    role: str
    seconds: float
    fraction: float

    @property
    def duration(self) -> str:
        return duration(self.seconds)


@dataclass(frozen=True)
class Groups:
    """The K groups: centroids over T steps, sizes, quotas (none before the selection)."""

    names_K: Sequence[str]
    centroids_KT: np.ndarray
    sizes_K: Sequence[int]
    quotas_K: Sequence[int] | None
    steps_T: Sequence[int]
    step_label: str

    def __post_init__(self) -> None:
        num_clusters = len(self.sizes_K)
        assert len(self.names_K) == num_clusters
        assert self.centroids_KT.shape == (num_clusters, len(self.steps_T))
        assert self.quotas_K is None or len(self.quotas_K) == num_clusters

    @property
    def levels_K(self) -> list[float]:
        return [float(level) for level in self.centroids_KT.mean(axis=1)]


@dataclass(frozen=True)
class Source:
    """A source before and after: examples in the pool, chosen, in the random control (none where there is no such)."""

    name: str
    pool: int
    held_out: int | None
    selected: int | None
    random: int | None
    pool_fraction: float
    selected_fraction: float | None
    random_fraction: float | None

    @property
    def ratio(self) -> float | None:
        """Share among the chosen over share of the pool: above 1 S2L takes more than a random choice would."""
        return None if self.selected_fraction is None or not self.pool_fraction else self.selected_fraction / self.pool_fraction


@dataclass(frozen=True)
class Text:
    """A text in the length that is shown: all of it, or a head with the whole (up to a limit) to unfold."""

    head: str
    whole: str | None

    @classmethod
    def of(cls, value: Any) -> Text:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        if len(text) <= CLIPPED_CHARACTERS:
            return cls(text, None)
        rest = len(text) - MAX_CHARACTERS
        end = f" … ({rest:,} more characters)" if rest > 0 else ""
        return cls(text[:CLIPPED_CHARACTERS] + "…", text[:MAX_CHARACTERS] + end)


@dataclass(frozen=True)
class Member:
    """An example near the centroid of its group. Prompt and response are none where the text was not found."""

    example_id: str
    distance: float
    is_selected: bool | None
    source: str | None = None
    prompt: Text | None = None
    response: Text | None = None


@dataclass(frozen=True)
class GroupTexts:
    """A group and the texts of its members."""

    name: str
    size: int
    quota: int | None
    first_loss: float
    last_loss: float
    members: Sequence[Member]


@dataclass(frozen=True)
class Facts:
    """Everything the page shows."""

    name: str
    uri: str
    verdict: Sequence[str]
    tiles: Sequence[tuple[str, str]]
    stages: Sequence[Stage]
    measures: Sequence[Measure]
    models: Sequence[str]
    costs: Sequence[Cost]
    cost_sentence: str | None
    groups: Groups | None
    quality: Sequence[tuple[str, str]]
    warning: str | None
    principal_components: Sequence[float]
    budgets: Sequence[tuple[str, int, str]]
    capped: str | None
    sources: Sequence[Source]
    proxy_losses: Mapping[str, Sequence[Sequence[float]]]
    target_losses: Mapping[str, Sequence[Sequence[float]]]
    group_texts: Sequence[GroupTexts]
    versions: Mapping[str, str]
    config: str | None

    def missing(self, *names: str) -> list[Stage]:
        """Those of the stages that are not finished."""
        return [stage for stage in self.stages if stage.name in names and stage.state != "finished"]


# ----------------------------------------------------------------------------------------------------------- pure core


def verdict(selection: Summary | None, metrics: Mapping[str, Any] | None) -> list[str]:
    """The result in plain words. A loss of S2L is said as plainly as a win, and that one seed concludes nothing."""
    if selection is None:
        return ["Nothing has been chosen yet: this run is unfinished."]
    chosen, pool = selection["rows"], selection["pool"]
    start = f"S2L chose {chosen:,} of {pool:,} examples ({chosen / pool:.1%})" if pool else f"S2L chose {chosen:,} examples"
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
        return [f"{reaches}.", "Without a random subset of the same size beside it, this does not say whether S2L helped."]
    advantage = loss["random"] - loss["selected"]
    lines = [
        f"{reaches}, against {loss['random']:.4f} for a random subset of the same size: {_outcome(advantage, loss['random'])}."
    ]
    macro = metrics["random"]["loss_macro"] - metrics["selected"]["loss_macro"] if metrics else 0.0
    if macro * advantage < 0:
        lines.append(f"Averaged over sources, so that each counts the same, it is the other way round: {_outcome(macro)}.")
    lines.append("One training run of each: another seed may turn it round, so this is no conclusion about the method.")
    return lines


def _outcome(advantage: float, reference: float | None = None) -> str:
    """Who wins and by how much; below what four decimals show it is a draw."""
    if abs(advantage) < 0.00005:
        return "a draw"
    share = "" if not reference else f" ({abs(advantage) / reference:.1%})"
    return f"S2L {'wins' if advantage > 0 else 'loses'} by {abs(advantage):.4f}{share}"


def measures(metrics: Mapping[str, Any], held_out: Mapping[str, int]) -> list[Measure]:
    """The evaluation table: the loss overall, averaged over sources and by source, then the tasks' metrics."""

    def values(*path: str) -> dict[str, float | None]:
        return {model: _at(metrics[model], path) for model in MODELS if model in metrics}

    def keys(*path: str) -> list[str]:
        return sorted({key for model in metrics.values() for key in (_at(model, path) or {})})

    rows = [
        Measure("all held-out rows", "loss", values("loss_per_token"), sum(held_out.values()) or None),
        Measure("mean over sources", "loss", values("loss_macro")),
    ]
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


def _at(value: Any, path: Iterable[str]) -> Any:
    """The value at a path of keys, none where the path ends early."""
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def costs(seconds: Mapping[str, float]) -> list[Cost]:
    """Seconds per stage with their shares."""
    total = sum(seconds.values())
    return [Cost(name, ROLES[name], value, value / total if total else 0.0) for name, value in seconds.items()]


def price(rows: Sequence[Cost], trains_random: bool) -> str | None:
    """What choosing cost beside training the target; none before both are known."""
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
    """How good the groups are, in plain words: (what, value). What the manifests do not know is left out."""
    known = {**clustering, **(clustering.get("diagnostics") or {}), "stability": selection.get("stability")}
    pool, ends = known.get("rows"), [ENDS.get(end, end) for end in known.get("ended_by", [])]
    until = f", until {' or '.join(ends)}" if ends else ""
    sample = f" on {known['sampled_rows']:,} examples" if known.get("sampled_rows", pool) != pool else ""
    tiny = f"groups of at most {known.get('tiny_rows')} examples"
    if known.get("training_rows") == pool:
        known["training_rows"] = None
    tells: list[tuple[str, str, Callable[[Any], str]]] = [
        ("features", "what k-means saw", lambda kind: FEATURES.get(kind, kind)),
        ("training_rows", "trained on", lambda rows: f"{rows:,} of {pool:,} examples; the others were only assigned"),
        ("num_iterations", "iterations", lambda count: f"{count:,}{until}"),
        ("explained_variance", "variance explained by the groups", percent),
        ("variance_explained_by_source", "variance explained by source alone", percent),
        ("agreement_of_restarts", "agreement of restarts (ARI)", lambda index: f"{index:.2f}{sample}"),
        ("agreement_with_source", "agreement with source (ARI)", lambda index: f"{index:.2f}"),
        ("stability", "subset that stays the same from another seed", _stability),
        ("effective_dimension", "effective dimension", lambda d: f"{d:.2f} of {len(known['principal_components'])}"),
        ("tiny_groups", tiny, lambda n: f"{n:,} of {known['num_clusters']:,}"),
    ]
    return [(what, tell(known[key])) for key, what, tell in tells if known.get(key) is not None]


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


def shown_groups(groups: Groups) -> list[int]:
    """The groups whose texts are shown, from the lowest level to the highest: all of them, or of many a spread."""
    by_level = sorted((k for k in range(len(groups.sizes_K)) if groups.sizes_K[k]), key=lambda k: (groups.levels_K[k], k))
    if len(by_level) <= MAX_GROUPS_WITH_TEXTS:
        return by_level
    return [by_level[i] for i in np.linspace(0, len(by_level) - 1, NUM_SPREAD_GROUPS).round().astype(int)]


def without_credentials(text: str) -> str:
    """A text in which `scheme://user:password@host` has lost user and password: a report is passed on."""
    return re.sub(r"(\w://)[^/\s@'\"]+@", r"\1***@", text)


# ------------------------------------------------------------------------------------------------------------- reading


def read_facts(run: Storage) -> Facts:
    """Everything the page shows of a run. Raises ArtifactError where there is no run, and for a damaged file."""
    config = run.read_json(RUN)
    states, artifacts = read_stages(run)
    if config is None and not artifacts:
        raise ArtifactError(f"{run.uri}: no run here (neither run.json nor a finished stage). Give the directory of a run.")
    config = {key: value for key, value in (config or {}).items() if key not in {"schema", "provenance"}}
    summaries = {name: artifact.summary for name, artifact in artifacts.items()}
    evaluation, target = artifacts.get("evaluation"), summaries.get("target", {})
    metrics = json.loads(evaluation.read_bytes(METRICS)) if evaluation else None
    selection = summaries.get("selection")
    held_out = summaries.get("evaluation", {}).get("sources", {})
    spent = costs({name: float(artifact.manifest["provenance"]["seconds"]) for name, artifact in artifacts.items()})
    groups, clustering = read_groups(artifacts), summaries.get("clustering", {})
    return Facts(
        name=str(config.get("name") or run.uri.rstrip("/").rpartition("/")[2]),
        uri=without_credentials(run.uri),
        verdict=verdict(selection, metrics),
        tiles=tiles(summaries),
        stages=states,
        measures=measures(metrics, held_out) if metrics else [],
        models=[model for model in MODELS if metrics and model in metrics],
        costs=spent,
        cost_sentence=price(spent, bool((target.get("training_loss") or {}).get("random"))),
        groups=groups,
        quality=quality(clustering, selection or {}),
        warning=_at(clustering, ("diagnostics", "warning")),
        principal_components=_at(clustering, ("diagnostics", "principal_components")) or [],
        budgets=budgets(selection or {}),
        capped=_capped(clustering.get("capped") or {}),
        sources=sources(summaries.get("examples"), selection),
        proxy_losses=_proxy_losses(summaries.get("proxy", {}), summaries.get("trajectories", {})),
        target_losses=target.get("training_loss") or {},
        group_texts=read_group_texts(artifacts, groups) if groups else [],
        versions=_versions(artifacts.values()),
        config=without_credentials(yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=100)) if config else None,
    )


def read_stages(run: Storage) -> tuple[list[Stage], dict[str, Artifact]]:
    """How far every stage is, and the finished ones.

    A stage that was built from another input than the one that lies here (an earlier stage was built anew since) is
    outdated: its numbers are about something else, so it does not count as finished.
    """
    states: list[Stage] = []
    artifacts: dict[str, Artifact] = {}
    outdated: set[str] = set()
    for name in STAGES:
        storage = run.child(name)
        artifact = Artifact.find(storage)
        if artifact is None:
            states.append(Stage(name, "unfinished" if storage.exists(BUILDING) else "not started"))
            continue
        inputs: Mapping[str, str] = artifact.manifest["inputs"]
        matches = all(
            value in {artifacts[key].identity, artifacts[key].fingerprint} for key, value in inputs.items() if key in artifacts
        )
        if not matches or outdated & inputs.keys():
            outdated.add(name)
            states.append(Stage(name, "outdated"))
            continue
        artifacts[name] = artifact
        states.append(_finished(artifact))
    return states, artifacts


def _finished(artifact: Artifact) -> Stage:
    """A finished stage's row of the provenance and of the dropped rows."""
    origin, summary = artifact.manifest["provenance"], artifact.summary
    return Stage(
        artifact.stage,
        "finished",
        artifact.fingerprint,
        str(origin.get("created") or ""),
        str(origin.get("git") or ""),
        without_credentials(str(artifact.manifest.get("reference") or "")),
        _machines(origin.get("machines") or {}),
        summary["rows"],
        summary["dropped"],
        summary.get("shortened", {}),
    )


def _machines(machines: Mapping[str, Any]) -> str:
    """What a stage ran on, and the seconds of its parts where it has them."""

    def words(value: Any) -> str:
        return ", ".join(f"{key} {part}" for key, part in value.items()) if isinstance(value, Mapping) else str(value)

    return "; ".join(f"{key} {words(value)}" for key, value in machines.items())


def tiles(summaries: Mapping[str, Summary]) -> list[tuple[str, str]]:
    """The run's size in a few numbers: (number, what it counts)."""
    selection, clustering = summaries.get("selection", {}), summaries.get("clustering", {})
    parameters = {name: summaries.get(name, {}).get("num_parameters") for name in ("proxy", "target")}
    pool = selection.get("pool") or summaries.get("examples", {}).get("pool")
    found: list[tuple[int | None, str]] = [
        (pool, "examples in the pool"),
        (selection.get("rows"), "chosen"),
        (_at(selection, ("num_response_tokens", "selected")), "response tokens in them"),
        (clustering.get("num_clusters"), "groups"),
        (summaries.get("trajectories", {}).get("num_checkpoints"), "checkpoints"),
        (parameters["proxy"], "parameters in the proxy"),
        (parameters["target"], "parameters in the target"),
    ]
    shown = [(f"{number:,}", what) for number, what in found if number is not None]
    if parameters["proxy"] and parameters["target"]:
        shown.append((f"{parameters['target'] / parameters['proxy']:.1f}\u00d7", "target to proxy"))
    return shown


def read_groups(artifacts: Mapping[str, Artifact]) -> Groups | None:
    """The groups, with the quotas once there is a selection; none before the clustering."""
    clustering = artifacts.get("clustering")
    if clustering is None:
        return None
    centroids_KT = np.load(io.BytesIO(clustering.read_bytes(CENTROIDS)), allow_pickle=False)
    names = [f"group {k}" for k in range(len(centroids_KT))]
    strata = clustering.summary.get("strata") or {}
    if len(strata) > 1:
        for stratum, place in strata.items():
            for k in range(place["first_cluster"], place["first_cluster"] + place["num_clusters"]):
                names[k] += f" of {stratum}"
    selection, trajectories = artifacts.get("selection"), artifacts.get("trajectories")
    steps = trajectories.summary["steps"] if trajectories else []
    has_steps = len(steps) == centroids_KT.shape[1]
    return Groups(
        names_K=names,
        centroids_KT=centroids_KT,
        sizes_K=clustering.summary["sizes"],
        quotas_K=selection.summary["quotas"] if selection else None,
        steps_T=steps if has_steps else list(range(1, centroids_KT.shape[1] + 1)),
        step_label="step" if has_steps else "checkpoint",
    )


def read_group_texts(artifacts: Mapping[str, Artifact], groups: Groups) -> list[GroupTexts]:
    """The members of the groups that are shown, with their texts."""
    shown = shown_groups(groups)
    members = nearest(artifacts["clustering"], shown)
    ids = sorted({example_id for found in members.values() for _, example_id in found})
    chosen = read_chosen(artifacts["selection"], ids) if "selection" in artifacts else None
    texts = read_texts(artifacts["examples"], ids) if "examples" in artifacts else {}

    def member(distance: float, example_id: Any) -> Member:
        is_selected = None if chosen is None else example_id in chosen
        row = texts.get(example_id)
        if row is None:
            return Member(str(example_id), distance, is_selected)
        prompt, response = Text.of(row["prompt"]), Text.of(row["response"])
        return Member(str(example_id), distance, is_selected, str(row["source"]), prompt, response)

    return [
        GroupTexts(
            groups.names_K[k],
            groups.sizes_K[k],
            None if groups.quotas_K is None else groups.quotas_K[k],
            float(groups.centroids_KT[k, 0]),
            float(groups.centroids_KT[k, -1]),
            [member(*found) for found in members[k]],
        )
        for k in shown
    ]


def nearest(clustering: Artifact, shown: Sequence[int]) -> dict[int, list[tuple[float, Any]]]:
    """The members of each group as (distance, example id), the nearest first; the smaller id of two equally near."""
    members: dict[int, list[tuple[float, Any]]] = {k: [] for k in shown}
    for part in clustering.parts("assignments-"):
        table = clustering.read_table(part, ["example_id", "cluster_id", "distance"])
        ids, clusters, distances = table["example_id"], table["cluster_id"].to_numpy(), table["distance"].to_numpy()
        for k in shown:
            rows = np.flatnonzero(clusters == k)
            rows = rows[np.argsort(distances[rows], kind="stable")[:NUM_MEMBERS]]
            found = [(float(distances[row]), ids[int(row)].as_py()) for row in rows]
            members[k] = sorted(members[k] + found)[:NUM_MEMBERS]
    return members


def read_chosen(selection: Artifact, ids: Sequence[Any]) -> set[Any]:
    """Those of the ids that were selected. Only the id column is read: the texts may be gigabytes."""
    column = selection.summary["columns"]["example_id"]  # underscored where the corpus has a column of that name
    found: set[Any] = set()
    with _open(selection, SELECTED) as file:
        for batch in file.iter_batches(columns=[column]):
            found.update(set(ids).intersection(batch.column(0).to_pylist()))
    return found


def read_texts(examples: Artifact, ids: Sequence[Any]) -> dict[Any, dict[str, Any]]:
    """Source, prompt and response of a few examples. Parts are sorted by id, so only those that hold one are read."""
    parts = examples.parts()
    with ThreadPoolExecutor(max_workers=16) as pool:  # in object storage a thousand first rows one by one take a minute
        firsts = list(pool.map(lambda part: _first_id(examples, part), parts))
    filled = [(first, part) for first, part in zip(firsts, parts, strict=True) if first is not None]
    by_part: dict[str, list[Any]] = {}
    for example_id in ids:
        place = bisect_right([first for first, _ in filled], example_id) - 1
        if place >= 0:
            by_part.setdefault(filled[place][1], []).append(example_id)
    texts: dict[Any, dict[str, Any]] = {}
    for part, wanted in by_part.items():
        table = examples.read_table(part, ["example_id", "source", "prompt", "response"])
        rows = table.filter(pc.is_in(table["example_id"], pa.array(wanted, table["example_id"].type))).to_pylist()
        texts |= {row["example_id"]: row for row in rows}
    return texts


def _first_id(examples: Artifact, part: str) -> Any:
    """The id of a part's first row, none of an empty part."""
    with _open(examples, part) as file:
        for batch in file.iter_batches(batch_size=1, columns=["example_id"]):
            return batch.column(0)[0].as_py()
    return None


def _open(artifact: Artifact, path: str) -> pq.ParquetFile:
    """A Parquet file of which only a part is read. Raises ArtifactError naming a damaged one."""
    try:
        return pq.ParquetFile(artifact.root.open(path))
    except (OSError, pa.ArrowInvalid) as error:
        raise ArtifactError(
            f"{artifact.root.uri}/{path}: missing or damaged ({error}). "
            f"Remove {artifact.root.uri} and run again to rebuild {artifact.stage} and what follows from it."
        ) from error


def _proxy_losses(proxy: Summary, trajectories: Summary) -> dict[str, list[list[float]]]:
    """The proxy's training loss, and beside it the mean loss over all examples at every checkpoint."""
    at_checkpoints = zip(trajectories.get("steps", []), trajectories.get("mean_losses", []), strict=True)
    return {
        "training loss": proxy.get("training_loss") or [],
        "every example, at the checkpoints": [[step, loss] for step, loss in at_checkpoints],
    }


def _capped(capped: Mapping[str, Any]) -> str | None:
    """Which strata have fewer groups than asked for and why, none if none has."""
    return "; ".join(f"{name}: {found['num_clusters']:,}, because {found['because']}" for name, found in capped.items()) or None


def _versions(artifacts: Iterable[Artifact]) -> dict[str, str]:
    """The libraries' versions; several where stages were built with different ones."""
    found: dict[str, list[str]] = {}
    for artifact in artifacts:
        for name, version in (artifact.manifest["provenance"].get("versions") or {}).items():
            if version not in found.setdefault(name, []):
                found[name].append(version)
    return {name: ", then ".join(versions) for name, versions in sorted(found.items())}
