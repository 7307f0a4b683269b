"""Clustering and selection alone, on anybody's trajectories: `s2l select`."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from s2l_ray.clustering.opening import open_rows
from s2l_ray.clustering.stage import has_untrained, publish_clustering
from s2l_ray.clustering.stratifying import AUTO
from s2l_ray.config import ClusteringConfig, GroupingConfig, SelectionConfig
from s2l_ray.config.recipes import SCHEMAS
from s2l_ray.errors import ArtifactError
from s2l_ray.progress import duration, get_log
from s2l_ray.selection.stage import publish_selection
from s2l_ray.selection.subsets import check_columns, grouping_for
from s2l_ray.storage.artifacts import Artifact, Key, refusal
from s2l_ray.storage.drafts import Draft
from s2l_ray.storage.layout import SELECTED
from s2l_ray.storage.lock import exclusive
from s2l_ray.storage.ownership import check_stages, scratch_of
from s2l_ray.storage.places import Storage
from s2l_ray.trajectories.files import fetch_rows
from s2l_ray.trajectories.parts import files_identity, find_artifact
from s2l_ray.trajectories.ranged_store import RangedStore
from s2l_ray.trajectories.ranges import fetch_in_tasks

log = get_log("run")


def select_trajectories(
    source: str,
    output: str,
    clustering: ClusteringConfig,
    selection: SelectionConfig,
    machines: GroupingConfig = GroupingConfig(),  # noqa: B008 - frozen
) -> Artifact:
    """Clustering and selection alone, on anybody's trajectories: `output` gets `clustering/` and `selection/`.

    The same numbers give exactly what the pipeline gives, but that methods that read no groups get one of all rows. Finished
    already for the same input and recipe: reused. Raises ArtifactError where `output` holds another recipe's, DataError and
    ConfigError as the stages do.
    """
    begun, place, clustering = time.monotonic(), Storage(output), grouping_for(selection, clustering)
    check_stages(place, ("clustering", "selection"))
    with exclusive(place) as still_held:
        own, work = find_artifact(source), scratch_of(place)
        by = None if clustering.stratify_by == AUTO else clustering.stratify_by
        profiles = clustering.features == "profile"
        opened = open_rows(own or source, work, machines, seed=clustering.seed, stratify_by=by, statistics=profiles)
        with opened as (store, scratch):
            check_columns(selection, store)
            with ThreadPoolExecutor(2) as pool:
                identity = own.identity if own is not None else store.identity(pool)
            key = Key("clustering", SCHEMAS["clustering"], clustering.model_dump(mode="json"), {"trajectories": identity})
            has_zero = None if own is None else has_untrained(own)
            groups = _build_or_reuse(
                place, key, still_held, lambda draft: publish_clustering(clustering, machines, store, scratch, draft, has_zero)
            )
            inputs = {"trajectories": identity, "clustering": groups.identity}
            if own is None:  # columns that are only passed through are in no identity yet
                inputs["rows"] = files_identity(source)
            key = Key("selection", SCHEMAS["selection"], selection.model_dump(mode="json"), inputs)
            fetch = partial(fetch_in_tasks if isinstance(store, RangedStore) else fetch_rows, own or source)
            subset = _build_or_reuse(
                place, key, still_held, lambda draft: publish_selection(selection, store, groups, fetch, scratch, draft)
            )
    log.info(
        "%s examples in %s/%s (%s)",
        f"{subset.summary['rows']:,}",
        subset.root.uri,
        SELECTED,
        duration(time.monotonic() - begun),
    )
    return subset


def _build_or_reuse(place: Storage, key: Key, still_held: Callable[[], None], build: Callable[[Draft], Artifact]) -> Artifact:
    found = Artifact.find(place.child(key.stage))
    if found is None:
        return build(Draft.open(place, key, still_held))
    if found.fingerprint != key.fingerprint:
        raise ArtifactError(refusal(place.child(key.stage), key, found.manifest, "Give another --output"))
    found.check_sizes()
    get_log(key.stage).info("reused (fingerprint %s)", key.fingerprint)
    return found
