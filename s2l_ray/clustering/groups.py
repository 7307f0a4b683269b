"""What clustering gives: the groups, the strata within which they were made, and which row is in which."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from s2l_ray.clustering.columns import Floats, Ints

ALL_ROWS = "all rows"


@dataclass(frozen=True)
class Stratum:
    """The rows within which groups were made, and which groups these are."""

    name: str
    """Value of the column stratified by; "all rows" where there are no strata."""

    num_rows: int
    first_cluster: int
    num_clusters: int
    capped_by: str | None = None
    """Why there are fewer groups than asked for; None where there are as many."""

    num_iterations: int = 0
    """Lloyd iterations over all its rows (over the training rows, where there are fewer)."""

    ended_by: str = "converged"
    """What ended them: `converged`, `tolerance` or `num_iterations`."""


@dataclass(frozen=True, eq=False)
class Groups:
    """K groups of N rows, without the rows.

    Cluster ids are canonical: strata in the order of their names, within a stratum ascending by the centroid's mean loss.
    """

    centroids_KT: Floats
    """Centroids in nats. Where k-means saw other features than the losses: the mean losses of each group."""

    sizes_K: NDArray[np.int64]
    """Rows in each group, none of them empty."""

    inertia: float
    """Sum of the squared distances to the centroids, in squared units of the features."""

    explained_variance: float
    """Share of the features' total squared distance to their mean that the groups explain; 1 where rows do not differ."""

    num_iterations: int
    """Lloyd iterations over all rows (the most that a stratum took)."""

    strata: tuple[Stratum, ...]
    stratified_by: str | None
    """The column within whose values the groups were made; None without strata."""

    diagnostics: dict[str, Any] = field(default_factory=dict)
    """How good the groups are (see `grouping`)."""

    parents: tuple[NDArray[np.int64], ...] = ()
    """For each level of groups of groups, from below: in which of its groups each group of the level under it is."""

    def __post_init__(self) -> None:
        assert self.sizes_K.min() > 0
        assert len(self.sizes_K) == self.num_clusters == sum(stratum.num_clusters for stratum in self.strata)

    @property
    def num_clusters(self) -> int:
        """K, over all strata."""
        return len(self.centroids_KT)

    @property
    def num_rows(self) -> int:
        """N."""
        return int(self.sizes_K.sum())

    @property
    def is_stratified(self) -> bool:
        return self.stratified_by is not None

    @property
    def strata_K(self) -> NDArray[np.int64] | None:
        """The stratum of each group, counted in the order of their names; None without strata."""
        if not self.is_stratified:
            return None
        return np.repeat(np.arange(len(self.strata)), [stratum.num_clusters for stratum in self.strata])

    @property
    def topmost_strata(self) -> NDArray[np.int64] | None:
        """The stratum of each group of the topmost level; None without strata."""
        strata = self.strata_K
        for parents in self.parents:
            strata = None if strata is None else strata[np.unique(parents, return_index=True)[1]]
        return strata

    def summary(self) -> dict[str, Any]:
        """For the manifest and the report."""
        capped = {s.name: {"num_clusters": s.num_clusters, "because": s.capped_by} for s in self.strata if s.capped_by}
        return {
            "rows": self.num_rows,
            "num_clusters": self.num_clusters,
            "sizes": self.sizes_K.tolist(),
            "inertia": self.inertia,
            "explained_variance": self.explained_variance,
            "num_iterations": self.num_iterations,
            "ended_by": sorted({stratum.ended_by for stratum in self.strata}),
            "capped": capped,
            "stratify_by": self.stratified_by,
            "strata": {stratum.name: asdict(stratum) for stratum in self.strata} if self.is_stratified else {},
            "parents": [parents.tolist() for parents in self.parents],
            "diagnostics": self.diagnostics,
        }

    @classmethod
    def of_summary(cls, summary: dict[str, Any], centroids_KT: Floats) -> Groups:
        """The groups that `summary` describes, with their centroids."""
        strata = tuple(Stratum(**stratum) for stratum in summary["strata"].values())
        capped_by = summary["capped"].get(ALL_ROWS, {}).get("because")
        only = Stratum(
            ALL_ROWS, summary["rows"], 0, len(centroids_KT), capped_by, summary["num_iterations"], summary["ended_by"][0]
        )
        same = ("inertia", "explained_variance", "num_iterations", "diagnostics")
        return cls(
            centroids_KT=centroids_KT,
            sizes_K=np.array(summary["sizes"], np.int64),
            strata=strata or (only,),
            stratified_by=summary["stratify_by"],
            parents=tuple(np.array(parents, np.int64) for parents in summary["parents"]),
            **{name: summary[name] for name in same},
        )


@dataclass(frozen=True, eq=False)
class Clustering(Groups):
    """K groups and which row is in which; rows in ascending order of ids."""

    example_ids: pa.Array = field(kw_only=True)
    """string or int64, shape (N,)."""

    cluster_ids_N: Ints = field(kw_only=True)
    distances_N: Floats = field(kw_only=True)
    """Euclidean distance of each row to its centroid, in the units of the features: nats where they are the losses."""
