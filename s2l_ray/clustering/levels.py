"""Groups of groups: k-means over the centroids of the level below (Vo et al. 2024, arXiv 2405.15613).

k-means puts its centroids where the rows are, so that equal shares of its groups are nearly the pool's. A centroid counts
once however many rows it has: groups of centroids follow the space that trajectories fill.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from s2l_ray.clustering.columns import Floats, Ints, MemoryColumn
from s2l_ray.clustering.features import on_grid
from s2l_ray.clustering.kmeans import Fit, lloyd, plus_plus
from s2l_ray.clustering.local_rows import LocalRows
from s2l_ray.clustering.threads import SearchThreads
from s2l_ray.config import ClusteringConfig
from s2l_ray.examples.ids import priorities


def levels_above(
    centroids: Sequence[Floats], names: Sequence[str], configs: Sequence[ClusteringConfig], pool: SearchThreads
) -> tuple[NDArray[np.int64], ...]:
    """For each level above the groups of the rows, from below: in which of its groups each group of the level under it is.

    Given the groups' centroids in the space of the features, stratum by stratum and in canonical order. A group of groups lies
    in one stratum; they are numbered by their first group. No level where the config has none.
    """
    found = []
    for level in range(1, len(configs[0].levels or [])):
        parents: list[NDArray[np.int64]] = []
        above: list[Floats] = []
        for points_PF, name, config in zip(centroids, names, configs, strict=True):
            assert config.levels is not None
            labels_P, means_KF = _grouped(points_PF, config.levels[level], f"{name}/level-{level}", config, pool)
            parents.append(labels_P + sum(map(len, above)))
            above.append(means_KF)
        found.append(np.concatenate(parents))
        centroids = above
    return tuple(found)


def _grouped(
    points_PF: Floats, num_wanted: int, name: str, config: ClusteringConfig, pool: SearchThreads
) -> tuple[NDArray[np.int64], Floats]:
    """At most so many groups of some points, numbered by their first point, and their centroids."""
    points_PF = on_grid(points_PF)
    if num_wanted >= len(points_PF):
        return np.arange(len(points_PF)), points_PF
    best: tuple[Fit, Ints] | None = None
    for seed in priorities([f"{name}/restart-{restart}" for restart in range(config.num_restarts)], config.seed).tolist():
        start_KF = pool.submit(plus_plus, points_PF, num_wanted, seed).result()
        rows = LocalRows(MemoryColumn(points_PF), points_PF.shape[1], pool)
        fit = lloyd(rows, start_KF, config.num_iterations)
        if best is None or fit.inertia < best[0].inertia:
            best = fit, np.concatenate([labels_M for labels_M, _ in rows.results()])
    assert best is not None
    # Groups that stayed empty have no number.
    filled, firsts, labels_P = np.unique(best[1], return_index=True, return_inverse=True)
    order = np.argsort(firsts)
    numbers = np.empty(len(order), np.int64)
    numbers[order] = np.arange(len(order))
    return numbers[labels_P], best[0].centroids_KF[filled[order]]
