"""Trajectories -> groups: k-means on the raw losses, the same bytes everywhere.

How the bytes stay the same for any order of the input and any number of threads: rows are in ascending order of
`example_id`; faiss assigns blocks of fixed size, each on one thread; losses are rounded to 2**-20, so that sums in
float64 are exact and their order does not matter; everything else is elementwise or in row order.

How the groups stay good (METHOD, "k-means facts"): k-means++ and restarts on the 1,024 K rows of lowest priority, the
winner then gets full Lloyd iterations over all rows, and a group that loses its last row is seeded again.
"""

from __future__ import annotations

import io
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from s2l_ray.artifacts import Artifact, Draft
from s2l_ray.config import ClusteringConfig, checked
from s2l_ray.errors import ConfigError, S2LError
from s2l_ray.progress import get_log
from s2l_ray.trajectory_store import Trajectories, priorities

try:
    import faiss
except ModuleNotFoundError as error:
    raise S2LError("faiss is not installed: pip install 's2l_ray[cpu]', or 's2l_ray[gpu]' for CUDA; not both.") from error

BLOCK_ROWS = 65_536
SAMPLE_ROWS_PER_CLUSTER = 1_024
ROWS_PER_PART = 1_048_576
# Rounds of seeding empty groups again. Each mends all of them unless rows differ by less than float32 can tell.
MAX_REPAIRS = 10
ALL_ROWS = "all rows"
_GRID = np.float32(2**20)
_log = get_log("clustering")

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]


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


@dataclass(frozen=True, eq=False)
class Clustering:
    """N rows in K groups, rows in ascending order of ids.

    Cluster ids are canonical: strata in the order of their names, within a stratum ascending by the centroid's mean loss.
    """

    example_ids: pa.Array
    cluster_ids_N: Ints
    distances_N: Floats
    """Euclidean distance of each row to its centroid, in nats."""

    centroids_KT: Floats
    inertia: float
    """Sum of the squared distances."""

    explained_variance: float
    """Share of the total squared distance to the overall mean that the groups explain; 1 where rows do not differ."""

    num_iterations: int
    """Lloyd iterations over all rows (the most that a stratum took)."""

    strata: tuple[Stratum, ...]
    is_stratified: bool

    def __post_init__(self) -> None:
        assert len(self.example_ids) == len(self.cluster_ids_N) == len(self.distances_N)
        assert len(self.sizes_K) == self.num_clusters
        assert self.sizes_K.min() > 0
        assert sum(stratum.num_clusters for stratum in self.strata) == self.num_clusters

    @property
    def num_clusters(self) -> int:
        """K, over all strata."""
        return len(self.centroids_KT)

    @property
    def sizes_K(self) -> NDArray[np.int64]:
        """Rows in each group, none of them empty."""
        return np.bincount(self.cluster_ids_N, minlength=self.num_clusters)

    @property
    def strata_K(self) -> NDArray[np.int64] | None:
        """The stratum of each group, counted in the order of their names; None without strata."""
        if not self.is_stratified:
            return None
        return np.repeat(np.arange(len(self.strata)), [stratum.num_clusters for stratum in self.strata])

    def summary(self) -> dict[str, Any]:
        """What the manifest and the report say."""
        capped = {s.name: {"num_clusters": s.num_clusters, "because": s.capped_by} for s in self.strata if s.capped_by}
        return {
            "rows": len(self.example_ids),
            "num_clusters": self.num_clusters,
            "sizes": self.sizes_K.tolist(),
            "inertia": self.inertia,
            "explained_variance": self.explained_variance,
            "num_iterations": self.num_iterations,
            "capped": capped,
            "strata": {stratum.name: asdict(stratum) for stratum in self.strata} if self.is_stratified else {},
        }


@dataclass(frozen=True, eq=False)
class Fit:
    """The outcome of k-means on some rows: labels, centroids, inertia, and the iterations it took."""

    labels_N: Ints
    centroids_KT: Floats
    inertia: float
    num_iterations: int
    capped_by: str | None = None


def cluster(
    losses_NT: Any,
    *,
    num_clusters: int = 100,
    num_iterations: int = 20,
    num_restarts: int = 3,
    strata: Any = None,
    example_ids: Any = None,
    seed: int = 0,
    num_threads: int | None = None,
) -> Clustering:
    """Groups of examples whose losses fell in the same way.

    `losses_NT` is anything of shape (N, T); ids are row numbers unless given, and the result is in ascending order of
    ids: any order of the rows gives the same group for each id. With `strata` (one value per row) there are
    `num_clusters` groups in each. `num_threads` (all processors unless given) decides no result.

    Raises DataError naming the ids of ragged, missing or non-finite losses, ConfigError for more groups than rows.
    """
    config = checked(
        ClusteringConfig,
        num_clusters=num_clusters,
        num_iterations=num_iterations,
        num_restarts=num_restarts,
        seed=seed,
    )
    trajectories = Trajectories.of(losses_NT, example_ids, sources=strata)
    return cluster_trajectories(trajectories, config, trajectories.sources, num_threads)


def cluster_trajectories(
    trajectories: Trajectories, config: ClusteringConfig, strata: pa.Array | None = None, num_threads: int | None = None
) -> Clustering:
    """The groups of trajectories, within each value of `strata` (shape (N,), strings) where it is given."""
    num_rows = len(trajectories)
    if config.num_clusters > num_rows:
        raise ConfigError(
            f"clustering.num_clusters: {config.num_clusters:,} groups of {num_rows:,} examples. "
            f"Set clustering.num_clusters to {num_rows:,} or less, or bring more examples."
        )
    cluster_ids_N = np.empty(num_rows, np.int32)
    centroids: list[Floats] = []
    found: list[Stratum] = []
    num_iterations = 0
    with _single_threads(num_threads) as pool:
        for name, rows_M in _rows_by_stratum(strata, num_rows):
            fit = _fit_stratum(trajectories, rows_M, config, name, pool)
            first = sum(map(len, centroids))
            cluster_ids_N[rows_M] = fit.labels_N + first
            found.append(Stratum(name, len(rows_M), first, len(fit.centroids_KT), fit.capped_by))
            centroids.append(fit.centroids_KT)
            num_iterations = max(num_iterations, fit.num_iterations)
        centroids_KT = np.concatenate(centroids)
        squares_N = _squared_distances(trajectories.losses_NT, cluster_ids_N, centroids_KT, pool)
        mean_1T = trajectories.losses_NT.mean(axis=0, dtype=np.float64, keepdims=True)
        total = float(_squared_distances(trajectories.losses_NT, np.zeros_like(cluster_ids_N), mean_1T, pool).sum())
    inertia = float(squares_N.sum())
    return Clustering(
        example_ids=trajectories.example_ids,
        cluster_ids_N=cluster_ids_N,
        distances_N=np.sqrt(squares_N).astype(np.float32),
        centroids_KT=centroids_KT,
        inertia=inertia,
        explained_variance=1.0 - inertia / total if total else 1.0,
        num_iterations=num_iterations,
        strata=tuple(found),
        is_stratified=strata is not None,
    )


def _rows_by_stratum(strata: pa.Array | None, num_rows: int) -> list[tuple[str, NDArray[np.int64]]]:
    """Each stratum's name and rows, ascending, in the order of the names."""
    if strata is None:
        return [(ALL_ROWS, np.arange(num_rows))]
    encoded = strata.dictionary_encode()
    codes_N = encoded.indices.to_numpy()
    order_N = np.argsort(codes_N, kind="stable")
    groups = np.split(order_N, np.cumsum(np.bincount(codes_N))[:-1])
    return sorted(zip(encoded.dictionary.to_pylist(), groups, strict=True), key=lambda item: item[0].encode())


def _fit_stratum(
    trajectories: Trajectories, rows_M: NDArray[np.int64], config: ClusteringConfig, name: str, pool: ThreadPoolExecutor
) -> Fit:
    """The groups of a stratum with canonical labels, as many as asked for or as its rows allow."""
    features_MT, center_T = _features(trajectories.losses_NT[rows_M])
    num_sampled = min(len(rows_M), SAMPLE_ROWS_PER_CLUSTER * config.num_clusters)
    if num_sampled < len(rows_M):
        # Stable: among equal priorities the smaller id comes first.
        lowest = np.argsort(priorities(trajectories.example_ids.take(pa.array(rows_M)), config.seed), kind="stable")
        sample_ST = features_MT[np.sort(lowest[:num_sampled])]
    else:
        sample_ST = features_MT
    _log.info(
        "%s: %s rows of %d points, K=%d, %d restarts on %s",
        *(name, f"{len(rows_M):,}", trajectories.num_points, config.num_clusters, config.num_restarts),
        "all rows" if sample_ST is features_MT else f"the {num_sampled:,} rows of lowest priority",
    )
    fit = _fit_few(features_MT, sample_ST, config.num_clusters)
    if fit is None:
        fit = _best_restart(sample_ST, config, name, pool)
        if sample_ST is not features_MT:
            fit = lloyd(features_MT, fit.centroids_KT, config.num_iterations, pool)
        fit = _without_empties(fit)
    if fit.capped_by is not None:
        _log.warning("%s: %d groups instead of %d: %s", name, len(fit.centroids_KT), config.num_clusters, fit.capped_by)
    centroids_KT = (fit.centroids_KT.astype(np.float64) + center_T).astype(np.float32)
    return _canonical(fit, centroids_KT)


def _features(losses_NT: Floats) -> tuple[Floats, Floats]:
    """Losses on a grid of 2**-20 nats around their center, and the center.

    On the grid sums in float64 are exact. faiss gets squared distances as |x|^2 - 2xc + |c|^2: 10 nats away from zero it
    gave 47 of 100,000 rows another centroid than the nearest, around the center none.
    """
    features_NT = np.rint(losses_NT * _GRID)
    features_NT /= _GRID
    center_T = (np.rint(features_NT.mean(axis=0, dtype=np.float64) * _GRID) / _GRID).astype(np.float32)
    features_NT -= center_T
    features_NT += 0.0  # minus zero becomes zero: equal rows have equal bytes
    return features_NT, center_T


def _fit_few(features_NT: Floats, sample_ST: Floats, num_clusters: int) -> Fit | None:
    """Each distinct trajectory as its own group, where there are no more of them than groups; else None."""
    if len(_distinct(sample_ST).dictionary) > num_clusters:
        return None
    encoded = _distinct(features_NT)
    num_distinct = len(encoded.dictionary)
    if num_distinct > num_clusters:
        return None
    labels_N = encoded.indices.to_numpy()
    centroids_KT = features_NT[np.unique(labels_N, return_index=True)[1]]
    if num_distinct == num_clusters:
        return Fit(labels_N, centroids_KT, 0.0, 0)
    if num_distinct == len(features_NT):
        capped_by = f"there are only {num_distinct:,} rows"
    elif num_distinct == 1:
        capped_by = f"all {len(features_NT):,} trajectories are equal"
    else:
        capped_by = f"only {num_distinct:,} distinct trajectories among {len(features_NT):,} rows"
    return Fit(labels_N, centroids_KT, 0.0, 0, capped_by)


def _distinct(features_NT: Floats) -> Any:
    """Rows as a dictionary-encoded column of their bytes: hashing takes a tenth of the time of np.unique."""
    num_rows, num_points = features_NT.shape
    buffers = [None, pa.py_buffer(np.ascontiguousarray(features_NT))]
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(4 * num_points), num_rows, buffers).dictionary_encode()


def _best_restart(sample_ST: Floats, config: ClusteringConfig, name: str, pool: ThreadPoolExecutor) -> Fit:
    """The fit of lowest inertia on the sample; of equal ones the first."""
    best: Fit | None = None
    seeds = priorities([f"{name}/restart-{restart}" for restart in range(config.num_restarts)], config.seed)
    for seed in seeds & 0x7FFFFFFF:
        start_KT = pool.submit(_plus_plus, sample_ST, config.num_clusters, int(seed)).result()
        fit = lloyd(sample_ST, start_KT, config.num_iterations, pool)
        best = fit if best is None or fit.inertia < best.inertia else best
    assert best is not None
    return best


def _plus_plus(features_NT: Floats, num_clusters: int, seed: int) -> Floats:
    """Initial centroids by k-means++, shape (K, T)."""
    num_rows, num_points = features_NT.shape
    centroids_KT = np.empty((num_clusters, num_points), np.float32)
    initialization = faiss.ClusteringInitialization(num_points, num_clusters)  # type: ignore[attr-defined]
    initialization.method = faiss.ClusteringInitMethod_KMEANS_PLUS_PLUS
    initialization.seed = seed
    initialization.init_centroids(num_rows, faiss.swig_ptr(features_NT), faiss.swig_ptr(centroids_KT))
    return centroids_KT


def lloyd(features_NT: Floats, centroids_KT: Floats, num_iterations: int, pool: ThreadPoolExecutor) -> Fit:
    """k-means from given centroids: at most `num_iterations` updates, ended when no row changes its group.

    Every row of the result is with its nearest centroid. Only rows that changed their group touch the sums: they are
    exact, so adding and taking away leaves no error.
    """
    num_clusters, num_points = centroids_KT.shape
    labels_N = np.full(len(features_NT), -1, np.int32)
    sums_KT = np.zeros((num_clusters, num_points))
    iteration = 0
    while True:
        new_N, squares_N, centroids_KT = _assign_repaired(features_NT, centroids_KT, pool)
        changed_M = np.flatnonzero(new_N != labels_N)
        if not len(changed_M) or iteration == num_iterations:
            return Fit(new_N, centroids_KT, float(squares_N.sum(dtype=np.float64)), iteration)
        rows_MT = features_NT[changed_M]
        sums_KT += _sums(new_N[changed_M], rows_MT, num_clusters)
        if iteration:
            sums_KT -= _sums(labels_N[changed_M], rows_MT, num_clusters)
        labels_N = new_N
        sizes_K1 = np.bincount(labels_N, minlength=num_clusters)[:, None]
        centroids_KT = np.where(sizes_K1 > 0, sums_KT / np.maximum(sizes_K1, 1), centroids_KT).astype(np.float32)
        iteration += 1


def _assign_repaired(features_NT: Floats, centroids_KT: Floats, pool: ThreadPoolExecutor) -> tuple[Ints, Floats, Floats]:
    """Nearest centroids, squared distances, and the centroids; those without a row moved to the rows farthest from theirs."""
    for _ in range(MAX_REPAIRS):
        labels_N, squares_N = _assign(features_NT, centroids_KT, pool)
        empty = np.flatnonzero(np.bincount(labels_N, minlength=len(centroids_KT)) == 0)
        if not len(empty):
            break
        # One after the other, each counting for the next: else they would all land in the same far corner.
        centroids_KT, left_N = centroids_KT.copy(), squares_N
        for cluster_id in empty:
            farthest = features_NT[int(np.argmax(left_N))]
            centroids_KT[cluster_id] = farthest
            left_N = np.minimum(left_N, _assign(features_NT, farthest[None], pool)[1])
    return labels_N, squares_N, centroids_KT


def _assign(features_NT: Floats, centroids_KT: Floats, pool: ThreadPoolExecutor) -> tuple[Ints, Floats]:
    """The nearest centroid of each row and the squared distance to it. 1M x 12, K = 100: 0.05 s on two cores."""
    blocks = list(pool.map(lambda block: faiss.knn(features_NT[block], centroids_KT, 1), _blocks(len(features_NT))))
    labels_N = np.concatenate([labels[:, 0].astype(np.int32) for _, labels in blocks])
    return labels_N, np.concatenate([squares[:, 0] for squares, _ in blocks])


def _sums(labels_N: Ints, rows_NT: Floats, num_clusters: int) -> NDArray[np.float64]:
    """The sum of the rows of each group, shape (K, T)."""
    columns = rows_NT.T.astype(np.float64, order="C")
    return np.stack([np.bincount(labels_N, column, num_clusters) for column in columns], axis=1)


def _squared_distances(
    losses_NT: Floats, labels_N: Ints, centroids_KT: NDArray[np.floating[Any]], pool: ThreadPoolExecutor
) -> NDArray[np.float64]:
    """Squared distance of each row to its centroid in float64, column by column so that no row's sum has another order."""

    def one_block(block: slice) -> NDArray[np.float64]:
        squares = np.zeros(len(labels_N[block]))
        for point in range(losses_NT.shape[1]):
            difference = losses_NT[block, point] - centroids_KT[labels_N[block], point].astype(np.float64)
            squares += difference * difference
        return squares

    return np.concatenate(list(pool.map(one_block, _blocks(len(losses_NT)))))


def _blocks(num_rows: int) -> list[slice]:
    return [slice(start, start + BLOCK_ROWS) for start in range(0, num_rows, BLOCK_ROWS)]


def _single_threads(num_threads: int | None) -> ThreadPoolExecutor:
    """Threads in each of which faiss uses one thread: OpenMP's setting is one of the calling thread."""
    if num_threads is None:
        num_threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return ThreadPoolExecutor(num_threads, initializer=faiss.omp_set_num_threads, initargs=(1,))


def _without_empties(fit: Fit) -> Fit:
    """The fit without groups that no repair could fill."""
    sizes_K = np.bincount(fit.labels_N, minlength=len(fit.centroids_KT))
    if sizes_K.all():
        return fit
    labels_N = (np.cumsum(sizes_K > 0) - 1)[fit.labels_N].astype(np.int32)
    because = f"{int((sizes_K == 0).sum())} groups stayed empty, the trajectories differ too little"
    return Fit(labels_N, fit.centroids_KT[sizes_K > 0], fit.inertia, fit.num_iterations, because)


def _canonical(fit: Fit, centroids_KT: Floats) -> Fit:
    """Labels in the order of the centroids' mean loss, equal means in the order of their points."""
    means_K = centroids_KT.mean(axis=1, dtype=np.float64)
    order_K = np.lexsort((*reversed(list(centroids_KT.T)), means_K))
    rank_K = np.empty(len(order_K), np.int32)
    rank_K[order_K] = np.arange(len(order_K))
    return Fit(rank_K[fit.labels_N], centroids_KT[order_K], fit.inertia, fit.num_iterations, fit.capped_by)


def build_clustering(config: ClusteringConfig, trajectories: Trajectories, draft: Draft) -> Artifact:
    """Group trajectories and publish `assignments-*.parquet` (example_id, cluster_id, distance) and `centroids.npy` (K, T)."""
    strata = None if config.stratify_by is None else trajectories.stratum_column(config.stratify_by)
    clustering = cluster_trajectories(trajectories, config, strata)
    table = pa.table(
        {
            "example_id": clustering.example_ids,
            "cluster_id": clustering.cluster_ids_N,
            "distance": clustering.distances_N,
        }
    )
    for part, start in enumerate(range(0, len(table), ROWS_PER_PART)):
        draft.write_table(f"assignments-{part:05d}.parquet", table.slice(start, ROWS_PER_PART))
    centroids = io.BytesIO()
    np.save(centroids, clustering.centroids_KT)
    draft.write("centroids.npy", centroids.getvalue())
    _log.info(
        "%d groups of %s to %s rows, %.1f%% of the variance explained, %d iterations",
        *(clustering.num_clusters, f"{clustering.sizes_K.min():,}", f"{clustering.sizes_K.max():,}"),
        *(100 * clustering.explained_variance, clustering.num_iterations),
    )
    return draft.publish(clustering.summary())


def read_clustering(artifact: Artifact) -> Clustering:
    """The groups in a `clustering/` directory. Raises ArtifactError naming a damaged file."""
    table = pa.concat_tables([artifact.read_table(path) for path in artifact.parts("assignments-")]).combine_chunks()
    summary = artifact.summary
    centroids_KT: Floats = np.load(io.BytesIO(artifact.read_bytes("centroids.npy")))
    strata = tuple(Stratum(**stratum) for stratum in summary["strata"].values())
    capped_by = summary["capped"].get(ALL_ROWS, {}).get("because")
    return Clustering(
        example_ids=table["example_id"].chunk(0),
        cluster_ids_N=table["cluster_id"].to_numpy(),
        distances_N=table["distance"].to_numpy(),
        centroids_KT=centroids_KT,
        inertia=summary["inertia"],
        explained_variance=summary["explained_variance"],
        num_iterations=summary["num_iterations"],
        strata=strata or (Stratum(ALL_ROWS, len(table), 0, len(centroids_KT), capped_by),),
        is_stratified=bool(strata),
    )
