"""Everything the page shows, read from a run's artifacts.

A run may be partial: finished stages are shown, the others are named. Counts come from the manifests; of the corpus only the
few texts that are shown are read, part by part.
"""

from __future__ import annotations

import io
import json
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from s2l_ray.errors import ArtifactError
from s2l_ray.report.comparison import ComparisonFacts
from s2l_ray.report.facts import Facts, GroupCurves, GroupTexts, Member, StageStatus, Text, Texts
from s2l_ray.report.premise import read_premise
from s2l_ray.report.wording import (
    MODELS,
    STAGES,
    Summary,
    budgets,
    costs,
    measures,
    price,
    quality,
    shown_groups,
    sources,
    value_at,
    verdict,
    without_credentials,
)
from s2l_ray.storage.artifacts import Artifact
from s2l_ray.storage.layout import ASSIGNMENTS, BUILDING, CENTROIDS, METRICS, SELECTED
from s2l_ray.storage.ownership import read_run
from s2l_ray.storage.places import Storage

NUM_MEMBERS = 4


def read_facts(run: Storage) -> Facts:
    """Everything the page shows of a run. Raises ArtifactError naming a damaged file."""
    config = read_run(run)
    states, artifacts = read_stages(run)
    config = {key: value for key, value in config.items() if key not in {"schema", "provenance"}}
    summaries = {name: artifact.summary for name, artifact in artifacts.items()}
    evaluation, target = artifacts.get("evaluation"), summaries.get("target", {})
    metrics = json.loads(evaluation.read_bytes(METRICS)) if evaluation else None
    selection = summaries.get("selection")
    held_out = summaries.get("evaluation", {}).get("sources", {})
    spent = costs({name: float(artifact.manifest["provenance"]["seconds"]) for name, artifact in artifacts.items()})
    groups, clustering = read_groups(artifacts), summaries.get("clustering", {})
    shown: Texts = value_at(config, ("report", "texts")) or "all"
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
        warning=value_at(clustering, ("diagnostics", "warning")),
        principal_components=value_at(clustering, ("diagnostics", "principal_components")) or [],
        budgets=budgets(selection or {}),
        capped=_capped(clustering.get("capped") or {}),
        sources=sources(summaries.get("examples"), selection),
        proxy_losses=_proxy_losses(summaries.get("proxy", {}), summaries.get("trajectories", {})),
        target_losses=target.get("training_loss") or {},
        group_texts=read_group_texts(artifacts, groups, shown) if groups else [],
        texts=shown,
        versions=_versions(artifacts.values()),
        config=without_credentials(yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=100)) if config else None,
        comparison=ComparisonFacts.read(run),
        premise=read_premise(run),
    )


def read_stages(run: Storage) -> tuple[list[StageStatus], dict[str, Artifact]]:
    """How far every stage is, and the finished ones.

    A stage that was built from another input than the one that lies here (an earlier stage was built anew since) is
    outdated: its numbers are about something else, so it does not count as finished.
    """
    states: list[StageStatus] = []
    artifacts: dict[str, Artifact] = {}
    outdated: set[str] = set()
    for name in STAGES:
        storage = run.child(name)
        artifact = Artifact.find(storage)
        if artifact is None:
            states.append(StageStatus(name, "unfinished" if storage.exists(BUILDING) else "not started"))
            continue
        inputs: Mapping[str, str] = artifact.manifest["inputs"]
        matches = all(
            value in {artifacts[key].identity, artifacts[key].fingerprint} for key, value in inputs.items() if key in artifacts
        )
        if not matches or outdated & inputs.keys():
            outdated.add(name)
            states.append(StageStatus(name, "outdated"))
            continue
        artifacts[name] = artifact
        states.append(_finished(artifact))
    return states, artifacts


def _finished(artifact: Artifact) -> StageStatus:
    """A finished stage's row of the provenance and of the dropped rows."""
    origin, summary = artifact.manifest["provenance"], artifact.summary
    return StageStatus(
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
        summary.get("dropped_by_source", {}),
        summary.get("first_dropped", {}),
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
        (value_at(selection, ("num_response_tokens", "selected")), "response tokens in them"),
        (clustering.get("num_clusters"), "groups"),
        (summaries.get("trajectories", {}).get("num_checkpoints"), "checkpoints"),
        (parameters["proxy"], "parameters in the proxy"),
        (parameters["target"], "parameters in the target"),
    ]
    shown = [(f"{number:,}", what) for number, what in found if number is not None]
    if parameters["proxy"] and parameters["target"]:
        shown.append((f"{parameters['target'] / parameters['proxy']:.1f}\u00d7", "target to proxy"))
    return shown


def read_groups(artifacts: Mapping[str, Artifact]) -> GroupCurves | None:
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
    return GroupCurves(
        names_K=names,
        centroids_KT=centroids_KT,
        sizes_K=clustering.summary["sizes"],
        quotas_K=selection.summary["quotas"] if selection else None,
        steps_T=steps if has_steps else list(range(1, centroids_KT.shape[1] + 1)),
        step_label="step" if has_steps else "checkpoint",
    )


def read_group_texts(artifacts: Mapping[str, Artifact], groups: GroupCurves, texts_of: Texts = "all") -> list[GroupTexts]:
    """The members of the groups that are shown, with their texts where those may be shown; others are not even kept."""
    shown = shown_groups(groups)
    members = nearest(artifacts["clustering"], shown)
    ids = sorted({example_id for found in members.values() for _, example_id in found})
    chosen = read_chosen(artifacts["selection"], ids) if "selection" in artifacts else None
    rows = read_texts(artifacts["examples"], ids) if "examples" in artifacts else {}
    may_show = {"all": set(ids), "selected": chosen or set(), "none": set[Any]()}[texts_of]

    def member(distance: float, example_id: Any) -> Member:
        is_selected = None if chosen is None else example_id in chosen
        row = rows.get(example_id)
        if row is None:
            return Member(str(example_id), distance, is_selected)
        if example_id not in may_show:
            return Member(str(example_id), distance, is_selected, str(row["source"]))
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
    for part in clustering.parts(ASSIGNMENTS):
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
    """The proxy's training loss, and the mean loss over all examples at every checkpoint."""
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
