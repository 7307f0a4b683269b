"""Trajectories -> groups: k-means on the losses, in memory or out of it, the same bytes everywhere (see `grouping`)."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from s2l_ray.clustering.columns import Floats
from s2l_ray.clustering.engines import Engine
from s2l_ray.clustering.grouping import Assigned, group, measured_of
from s2l_ray.clustering.groups import Clustering, Groups
from s2l_ray.clustering.opening import open_rows
from s2l_ray.clustering.stratifying import AUTO
from s2l_ray.clustering.threads import SearchThreads
from s2l_ray.config import ClusteringConfig, GroupingConfig, checked
from s2l_ray.progress import duration, get_log
from s2l_ray.runtime.process import give_back_freed_memory
from s2l_ray.storage.artifacts import Artifact
from s2l_ray.storage.drafts import Draft, table_bytes
from s2l_ray.storage.layout import ASSIGNMENTS, CENTROIDS, FEATURE_CENTROIDS, RESTARTS, assignments_name
from s2l_ray.storage.places import Storage
from s2l_ray.storage.records import FileRecord
from s2l_ray.storage.stages import Context
from s2l_ray.trajectories.ranged_store import RangedStore
from s2l_ray.trajectories.sorting import in_order
from s2l_ray.trajectories.store import Trajectories, TrajectoryStore

ROWS_PER_PART = 1_048_576
_log = get_log("clustering")


def cluster(
    losses_NT: Any,
    *,
    num_clusters: int = 100,
    levels: list[int] | None = None,
    num_iterations: int = 20,
    num_restarts: int = 3,
    features: str = "raw",
    points: list[int] | None = None,
    statistics: Mapping[str, Any] | None = None,
    tolerance: float = 0.0,
    training_rows: int | None = None,
    strata: Any = None,
    example_ids: Any = None,
    seed: int = 0,
    num_threads: int | None = None,
) -> Clustering:
    """Groups of examples whose losses fell in the same way.

    `losses_NT` is anything of shape (N, T), in nats; ids are row numbers unless given, and the result is in ascending order
    of ids: any order of the rows gives the same group for each id. With `strata` (one value per row) there are
    `num_clusters` groups in each. `levels`, such as [1000, 100, 20], take the place of `num_clusters`. `num_threads`
    (all processors unless given) decides no result. `features="profile"` needs `statistics`: by name `deviations`,
    `first_thirds` and `last_thirds`, (N, T) each, as `record_losses` defines them. The others are as in the section
    `clustering` of a config.

    Raises DataError naming the ids of ragged, missing or non-finite losses, ConfigError for more groups than rows.
    """
    config = checked(
        ClusteringConfig,
        num_clusters=levels[0] if levels else num_clusters,
        levels=levels,
        num_iterations=num_iterations,
        num_restarts=num_restarts,
        features=features,
        points=points,
        tolerance=tolerance,
        training_rows=training_rows,
        stratify_by=None if strata is None else "source",
        seed=seed,
    )
    found = Trajectories.of(losses_NT, example_ids, sources=strata, statistics=statistics)
    return cluster_store(TrajectoryStore.of(found, seed), config, num_threads)


def cluster_store(
    store: TrajectoryStore, config: ClusteringConfig, num_threads: int | None = None, *, sources_are_files: bool = False
) -> Clustering:
    """The groups of the rows of a store, in memory, and the group of every row as arrays."""
    with SearchThreads(num_threads) as pool:
        grouping = group(store, config, Engine("memory", pool), sources_are_files=sources_are_files)
    blocks, labels, distances = zip(*grouping.assignments(), strict=True)
    return Clustering(
        **vars(grouping.groups()),
        example_ids=pa.concat_arrays([block["example_id"].combine_chunks() for block in blocks]),
        cluster_ids_N=np.concatenate(labels),
        distances_N=np.concatenate(distances),
    )


# --- the artifact --------------------------------------------------------------------------------------------------


def build(context: Context) -> Artifact:
    """Group a run's trajectories and publish the groups (see `publish_clustering`)."""
    config, draft = context.section, context.draft
    source = context.inputs["trajectories"]
    examples = context.config.examples
    by = None if config.stratify_by == AUTO else config.stratify_by
    profiles = config.features == "profile"
    opened = open_rows(source, draft.shared, context.machines, seed=config.seed, stratify_by=by, statistics=profiles)
    with opened as (store, scratch):
        return publish_clustering(
            config,
            context.machines,
            store,
            scratch,
            draft,
            has_untrained(source),
            sources_are_files=examples.sources_are_files,
        )


def has_untrained(trajectories: Artifact) -> bool:
    """Whether a run's trajectories, or a recording, begin with the losses of the untrained model."""
    return bool(trajectories.summary["steps"][0] == 0)


def publish_clustering(
    config: ClusteringConfig,
    machines: GroupingConfig,
    store: TrajectoryStore,
    scratch: Path,
    draft: Draft,
    has_untrained: bool | None = None,
    *,
    sources_are_files: bool = False,
) -> Artifact:
    """Group trajectories and publish `assignments-*.parquet` (example_id, cluster_id, distance), `centroids.npy` (K, T),
    for other features than the losses `feature_centroids.npy` (K, F), and `restarts.parquet`.

    `has_untrained`: whether the trajectories begin with the untrained model; None where that is unknown. It decides nothing
    but what a warning advises. `sources_are_files`: see `stratifying`. Raises ConfigError for what the config asks of this
    machine or these trajectories in vain.
    """
    begun = time.monotonic()
    width, shared = measured_of(store, config).width, store.place if isinstance(store, RangedStore) else None
    with SearchThreads() as pool, Engine.choose(machines, pool, scratch, len(store), width, shared) as engine:
        _log.info("%s trajectories of %d points, %s", f"{len(store):,}", store.num_points, engine.describe())
        grouping = group(store, config, engine, sources_are_files=sources_are_files)
        grouped = time.monotonic()
        if shared is not None:
            draft.add(*grouping.write_parts(partial(_write_part, draft.storage), ROWS_PER_PART))
        else:
            for part, data in enumerate(in_order(pool, _part_bytes, _parts(grouping.assignments()))):
                draft.write(assignments_name(part), data)
        give_back_freed_memory()
        groups = grouping.groups(has_untrained)
        described, lost = engine.describe(), engine.recovery_seconds
    _write_array(draft, CENTROIDS, groups.centroids_KT)
    if grouping.feature_centroids_KF is not None:
        _write_array(draft, FEATURE_CENTROIDS, grouping.feature_centroids_KF)
    restarts = grouping.restarts()
    if restarts is not None:
        draft.write_table(RESTARTS, restarts)
    _log_groups(groups, time.monotonic() - begun)
    seconds = {"grouping": grouped - begun, "lloyd": grouping.lloyd_seconds, "writing": time.monotonic() - grouped}
    rounded = {name: round(spent, 3) for name, spent in seconds.items()}
    recovered = {"recovery_seconds": [round(spent, 3) for spent in lost]} if lost else {}
    return draft.publish(groups.summary(), {"engine": described, "seconds": rounded} | recovered)


def _parts(assignments: Assigned) -> Iterator[pa.Table]:
    """The parts of the artifact, a chunk for each block: to join these would hold a part twice."""
    held: list[pa.Table] = []
    room = ROWS_PER_PART
    for block, labels_M, distances_M in assignments:
        rows = pa.table({"example_id": block["example_id"], "cluster_id": labels_M, "distance": distances_M})
        while len(rows) >= room:
            yield pa.concat_tables([*held, rows.slice(0, room)])
            rows, held, room = rows.slice(room), [], ROWS_PER_PART
        held, room = [*held, rows], room - len(rows)
    if room < ROWS_PER_PART:
        yield pa.concat_tables(held)


def _part_bytes(table: pa.Table) -> bytes:
    return table_bytes(table, ["cluster_id"])


def _write_part(place: Storage, part: int, assigned: Assigned) -> FileRecord:
    """Write a part wherever its rows were read."""
    [table] = _parts(assigned)
    name, data = assignments_name(part), _part_bytes(table)
    place.write(name, data)
    return FileRecord.of(name, data)


def _log_groups(groups: Groups, seconds: float) -> None:
    share = groups.diagnostics["variance_explained_by_source"]
    _log.info(
        "%d groups of %s to %s rows, %s of the variance explained%s, %s",
        *(groups.num_clusters, f"{groups.sizes_K.min():,}", f"{groups.sizes_K.max():,}", f"{groups.explained_variance:z.1%}"),
        *("" if share is None else f" ({100 * share:.1f}% by source alone)", duration(seconds)),
    )
    if groups.diagnostics["warning"] is not None:
        _log.warning("%s", groups.diagnostics["warning"])


def _write_array(draft: Draft, path: str, values: Floats) -> None:
    data = io.BytesIO()
    np.save(data, values)
    draft.write(path, data.getvalue())


def read_groups(artifact: Artifact) -> Groups:
    """The groups in a `clustering/` directory, without the rows. Raises ArtifactError naming a damaged file."""
    return Groups.of_summary(artifact.summary, np.load(io.BytesIO(artifact.read_bytes(CENTROIDS))))


def read_clustering(artifact: Artifact) -> Clustering:
    """The groups in a `clustering/` directory and which row is in which, in memory.

    Raises ArtifactError naming a damaged file.
    """
    table = pa.concat_tables([artifact.read_table(path) for path in artifact.parts(ASSIGNMENTS)]).combine_chunks()
    return Clustering(
        **vars(read_groups(artifact)),
        example_ids=table["example_id"].chunk(0),
        cluster_ids_N=table["cluster_id"].to_numpy(),
        distances_N=table["distance"].to_numpy(),
    )
