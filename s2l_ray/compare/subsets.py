"""What each cell trains on: the subset that its arm chooses under its seed, from the run's trajectories or from a seed's
own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pyarrow as pa

from s2l_ray.clustering.groups import Clustering
from s2l_ray.clustering.stage import cluster_store
from s2l_ray.compare.arms import FULL, SEED_PROXY, Arm
from s2l_ray.compare.cells import CellSpec, seeded
from s2l_ray.config import RunConfig
from s2l_ray.examples.reading import read_pool
from s2l_ray.pipeline import run
from s2l_ray.progress import get_log, quiet
from s2l_ray.selection.stage import in_blocks
from s2l_ray.selection.subsets import choose_subsets, grouping_for
from s2l_ray.storage.artifacts import Artifact
from s2l_ray.storage.layout import COMPARE, SEED_RUNS
from s2l_ray.storage.places import Storage
from s2l_ray.trajectories.files import streamed
from s2l_ray.trajectories.store import TrajectoryStore

_log = get_log("compare")


def trajectories_of(
    config: RunConfig, arm: Arm, seed: int, place: Storage, finished: dict[str, Artifact], other: Storage | None = None
) -> Artifact:
    """The trajectories under an arm and seed: the run's, or those of a proxy of its own, which is trained if it is not there.

    Such a proxy is a run of its own, in `compare/seeds/`, which takes the examples from this one, or all that matches from the
    same one of the `other` run.
    """
    chosen = seeded(config, arm, seed)
    if chosen.proxy == config.proxy and chosen.trajectories == config.trajectories:
        return finished["trajectories"]
    name = arm.name if arm.redoes_proxy else SEED_PROXY
    own = seed_run(place, name, seed)
    found, reuse = Artifact.find(own.child("trajectories")), place
    if found is None and other is not None:
        theirs = seed_run(other, name, seed)
        examples = Artifact.find(theirs.child("examples"))
        if examples is not None and examples.fingerprint == finished["examples"].fingerprint:
            reuse = theirs
    if found is None:
        _log.info("%s, seed %d: a proxy of its own", name, seed)
    with quiet(("run", "examples") if found is None else ("run", "examples", "proxy", "trajectories")):
        return run(chosen, own.uri, until="trajectories", reuse=reuse.uri)["trajectories"]


def seed_run(place: Storage, name: str, seed: int) -> Storage:
    """The run of a proxy of its own: that of an arm, or SEED_PROXY."""
    return place.child(COMPARE).child(SEED_RUNS).child(f"{name}-seed{seed}")


@contextmanager
def opened(trajectories: Artifact, work: Storage, seed: int, *, profiles: bool = False) -> Iterator[TrajectoryStore]:
    """Trajectories as a store, with the priorities of a seed; `profiles`: with the statistics of `features: profile`, too."""
    with streamed(trajectories, work, seed=seed, statistics=profiles) as (store, _):
        yield store


class StoreGroups:
    """The groups of one store, made once for all arms that group alike."""

    def __init__(self, store: TrajectoryStore, sources_are_files: bool) -> None:
        self._store, self._sources_are_files = store, sources_are_files
        self._made: dict[str, Clustering] = {}

    def of(self, config: RunConfig) -> Clustering:
        """The groups under a config's section `clustering`."""
        name = config.clustering.model_dump_json()
        if name not in self._made:
            self._made[name] = cluster_store(self._store, config.clustering, sources_are_files=self._sources_are_files)
        return self._made[name]


def subsets(config: RunConfig, budgets: Sequence[int], store: TrajectoryStore, groups: StoreGroups) -> list[pa.Table]:
    """The subset of an arm for each budget: `example_id` and `weight`, in order of ids."""
    config = config.model_copy(update={"clustering": grouping_for(config.selection, config.clustering)})
    found = groups.of(config)
    if config.selection.draw == "spread" and len(budgets) > 1:  # which has no order that budgets share
        return [table for budget in budgets for table in subsets(config, [budget], store, groups)]
    selection = config.selection.model_copy(update={"budget": budgets[0], "more_budgets": list(budgets[1:])})
    chosen = choose_subsets(store, lambda: in_blocks(found), found, selection, config.clustering)
    return [pa.table({"example_id": one.selection.example_ids, "weight": one.selection.weights_M}) for one in chosen]


def whole_pool(examples: Artifact) -> pa.Table:
    """All of the pool as a subset."""
    ids = [read_pool(examples, part, ["example_id"])["example_id"] for part in examples.parts()]
    column = pa.concat_arrays([chunk for one in ids for chunk in one.chunks])
    return pa.table({"example_id": column, "weight": np.ones(len(column))})


def is_of_all(one: CellSpec) -> bool:
    """Whether a cell trains on the whole pool."""
    return one.arm == FULL
