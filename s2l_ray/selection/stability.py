"""How much of the subset stays the same when the grouping starts from another seed."""

from __future__ import annotations

from typing import Any

import numpy as np

from s2l_ray.clustering.diagnostics import mean_overlap
from s2l_ray.clustering.groups import Groups
from s2l_ray.config import SelectionConfig
from s2l_ray.examples.ids import priorities
from s2l_ray.selection.choosing import select_rows
from s2l_ray.storage.artifacts import Artifact
from s2l_ray.storage.layout import RESTARTS


def stability(clustering: Artifact, groups: Groups, config: SelectionConfig, num_chosen: int) -> dict[str, Any] | None:
    """The mean share of examples that the subsets of two restarts have in common, on a sample. None for one restart.

    The priorities inside the groups stay the same, so that much would be common whatever the groups: `without_groups` is the
    share that the rows of lowest priority, without any groups, have in common with these subsets.
    """
    if RESTARTS not in clustering.manifest["files"]:
        return None
    table = clustering.read_table(RESTARTS)
    order_N = priorities(table["example_id"], config.seed)
    count = int(num_chosen / groups.num_rows * len(table))
    if not 0 < count < len(table):
        return None
    num_clusters = int(clustering.manifest["recipe"]["num_clusters"])
    strata_K = np.repeat(np.arange(len(groups.strata)), num_clusters) if groups.is_stratified else None
    subsets = [
        select_rows(table[name].to_numpy(), order_N, count, strata_K=strata_K, defer_up_to=config.defer_groups_up_to)
        for name in table.column_names[1:]
    ]
    lowest = np.argsort(order_N, kind="stable")[:count]
    return {
        "rows": len(table),
        "chosen": count,
        "common": round(mean_overlap(subsets), 4),
        "without_groups": round(float(np.mean([mean_overlap([lowest, subset]) for subset in subsets])), 4),
    }
