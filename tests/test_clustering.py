"""Groups: planted ones are found, and the bytes are the same everywhere."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from s2l_ray.clustering import kmeans, local_rows, strata
from s2l_ray.clustering import stage as module
from s2l_ray.clustering.columns import MemoryColumn
from s2l_ray.clustering.features import on_grid
from s2l_ray.clustering.groups import Clustering
from s2l_ray.clustering.kmeans import lloyd
from s2l_ray.clustering.local_rows import LocalRows
from s2l_ray.clustering.stage import cluster, publish_clustering, read_clustering
from s2l_ray.clustering.threads import SearchThreads
from s2l_ray.config import ClusteringConfig, GroupingConfig
from s2l_ray.errors import ArtifactError, ConfigError, DataError
from s2l_ray.storage.artifacts import Artifact, Key
from s2l_ray.storage.drafts import Draft
from s2l_ray.storage.places import Storage
from s2l_ray.trajectories.files import read_trajectories
from s2l_ray.trajectories.store import Trajectories, TrajectoryStore

CURVES = np.array([[5.0, 4.8, 4.7, 4.6], [5.0, 2.0, 1.0, 0.5], [1.0, 0.9, 0.9, 0.8], [3.0, 3.0, 1.0, 0.1]], np.float32)
SHARES = [60, 25, 10, 5]


def planted(rng: np.random.Generator, num_rows: int = 400, noise: float = 0.05) -> tuple[np.ndarray, np.ndarray]:
    """Four kinds of curve of very unequal frequency: losses (N, T) and the kind of each row."""
    kinds = np.repeat(np.arange(4), np.array(SHARES) * num_rows // 100)
    rng.shuffle(kinds)
    return (CURVES[kinds] + rng.normal(0, noise, (len(kinds), 4))).astype(np.float32), kinds


def content(clustering: Clustering) -> tuple[Any, ...]:
    """Everything in a clustering, to compare bit by bit."""
    arrays = (clustering.cluster_ids_N, clustering.distances_N, clustering.centroids_KT)
    numbers = (clustering.inertia, clustering.explained_variance, clustering.num_iterations)
    return (*(a.tobytes() for a in arrays), *numbers, clustering.example_ids.to_pylist(), clustering.strata)


def built(folder: Path, trajectories: Trajectories, machines: GroupingConfig | None = None, **recipe: Any) -> Artifact:
    config = ClusteringConfig(**recipe)
    draft = Draft.open(Storage(str(folder)), Key("clustering", 1, config.model_dump(), {}))
    scratch = folder / ".work" / "scratch"
    scratch.mkdir(parents=True, exist_ok=True)
    return publish_clustering(config, machines or GroupingConfig(), TrajectoryStore.of(trajectories), scratch, draft)


def file_bytes(artifact: Artifact) -> dict[str, bytes]:
    return {path: artifact.read_bytes(path) for path in artifact.manifest["files"]}


@pytest.mark.parametrize("seed", range(20))
def test_examples_that_learn_alike_share_a_cluster(seed: int) -> None:
    losses, kinds = planted(np.random.default_rng(seed))
    found = cluster(losses, num_clusters=4, seed=seed)
    pairs = set(zip(kinds.tolist(), found.cluster_ids_N.tolist(), strict=True))
    assert len(pairs) == 4
    assert sorted(found.sizes_K.tolist()) == [20, 40, 100, 240]
    assert found.explained_variance > 0.99


def test_clusters_are_numbered_by_their_mean_loss() -> None:
    losses, kinds = planted(np.random.default_rng(0))
    found = cluster(losses, num_clusters=4)
    by_mean = np.argsort(CURVES.mean(axis=1))
    assert np.array_equal(by_mean[found.cluster_ids_N], kinds)
    assert np.allclose(found.centroids_KT, CURVES[by_mean], atol=0.05)


def test_equal_mean_losses_are_numbered_by_their_points() -> None:
    losses = [[1.0, 3.0], [3.0, 1.0], [2.0, 2.0]]
    assert cluster(losses, num_clusters=3).centroids_KT.tolist() == [[1.0, 3.0], [2.0, 2.0], [3.0, 1.0]]


def test_every_row_is_with_its_nearest_centroid_and_the_distances_add_up() -> None:
    losses = on_grid(np.random.default_rng(1).gamma(2, 1, (5_000, 6)))
    found = cluster(losses, num_clusters=17, num_iterations=3)
    squares_NK = ((losses[:, None].astype(np.float64) - found.centroids_KT) ** 2).sum(-1)
    rows = np.arange(len(losses))
    assert np.array_equal(squares_NK.argmin(1), found.cluster_ids_N)
    # Published centroids are the center plus what k-means saw, rounded once more.
    assert np.allclose(found.distances_N, np.sqrt(squares_NK[rows, found.cluster_ids_N]), rtol=1e-6, atol=1e-6)
    assert found.inertia == pytest.approx(squares_NK.min(1).sum(), rel=1e-8)
    total = ((losses - losses.mean(0, dtype=np.float64)) ** 2).sum()
    assert found.explained_variance == pytest.approx(1 - found.inertia / total, rel=1e-9)
    assert found.num_iterations == 3


def test_iterations_stop_when_no_row_changes_its_group_and_centroids_are_then_means() -> None:
    losses, _ = planted(np.random.default_rng(2))
    found = cluster(losses, num_clusters=4, num_iterations=1000)
    assert found.num_iterations < 20
    for cluster_id, centroid in enumerate(found.centroids_KT):
        assert np.allclose(centroid, losses[found.cluster_ids_N == cluster_id].mean(0), atol=1e-6)


def test_inertia_is_as_good_as_scikit_learns() -> None:
    from sklearn.cluster import KMeans

    losses = np.random.default_rng(3).gamma(2, 1, (2_000, 8)).astype(np.float32)
    ours = np.mean([cluster(losses, num_clusters=20, num_iterations=100, seed=seed).inertia for seed in range(3)])
    theirs = np.mean([KMeans(20, n_init=3, max_iter=100, random_state=seed).fit(losses).inertia_ for seed in range(3)])
    assert ours < 1.01 * theirs


def test_large_losses_do_not_blur_small_differences() -> None:
    # A full block: for few rows faiss takes an exact kernel, for many one that cancels (error 0.05 here if not centered).
    losses = (np.random.default_rng(4).normal(0, 0.3, (66_000, 6)) + 100).astype(np.float32)
    found = cluster(losses, num_clusters=20, num_iterations=1, num_restarts=1)
    squares_NK = ((losses[:, None].astype(np.float64) - found.centroids_KT) ** 2).sum(-1)
    assert np.abs(found.distances_N**2 - squares_NK.min(1)).max() < 2e-5


@pytest.mark.parametrize("stratified", [False, True])
def test_any_order_of_rows_and_any_number_of_threads_give_the_same_bits(stratified: bool, monkeypatch: Any) -> None:
    for module_of_blocks in (kmeans, local_rows, strata):
        monkeypatch.setattr(module_of_blocks, "BLOCK_ROWS", 1_000)
    monkeypatch.setattr(strata, "SAMPLE_ROWS_PER_CLUSTER", 50)
    rng = np.random.default_rng(5)
    losses = rng.gamma(2, 1, (30_011, 5)).astype(np.float32)
    ids = np.array([f"row-{row}" for row in range(len(losses))])
    names = np.array(["web", "books", "code"])[rng.integers(0, 3, len(losses))]
    order = rng.permutation(len(losses))
    found = []
    for rows, num_threads in ((np.arange(len(losses)), 1), (order, 2), (order[::-1], 3)):
        groups = names[rows] if stratified else None
        options: dict[str, Any] = {"num_clusters": 30, "num_iterations": 6, "num_threads": num_threads}
        found.append(content(cluster(losses[rows], example_ids=ids[rows], strata=groups, **options)))
    assert found[0] == found[1] == found[2]


def test_full_blocks_of_faiss_give_the_same_bits_on_one_and_two_threads() -> None:
    losses = np.random.default_rng(6).gamma(2, 1, (200_000, 12)).astype(np.float32)
    options: dict[str, Any] = {"num_clusters": 100, "num_iterations": 2, "num_restarts": 1}
    before = faiss.omp_get_max_threads()
    one, two = (content(cluster(losses, num_threads=n, **options)) for n in (1, 2))
    faiss.omp_set_num_threads(before + 1)
    three = content(cluster(losses, num_threads=2, **options))
    faiss.omp_set_num_threads(before)
    assert one == two == three


def test_another_seed_may_give_other_groups_and_the_same_seed_never_does() -> None:
    losses = np.random.default_rng(7).random((2_000, 4), dtype=np.float32)
    found = [content(cluster(losses, num_clusters=20, num_restarts=1, seed=seed)) for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]


def test_restarts_keep_the_best() -> None:
    losses = np.random.default_rng(8).random((2_000, 4), dtype=np.float32)
    few, many = (cluster(losses, num_clusters=20, num_restarts=n, num_iterations=5).inertia for n in (1, 8))
    assert many <= few


def test_the_sample_is_by_priority_and_the_winner_sees_every_row(monkeypatch: Any) -> None:
    monkeypatch.setattr(strata, "SAMPLE_ROWS_PER_CLUSTER", 25)
    losses, kinds = planted(np.random.default_rng(9), num_rows=10_000)
    found = cluster(losses, num_clusters=4, num_iterations=50)
    assert len(set(zip(kinds.tolist(), found.cluster_ids_N.tolist(), strict=True))) == 4
    for cluster_id, centroid in enumerate(found.centroids_KT):
        assert np.allclose(centroid, losses[found.cluster_ids_N == cluster_id].mean(0), atol=1e-6)


def test_groups_stay_within_their_stratum_in_the_order_of_names() -> None:
    losses, kinds = planted(np.random.default_rng(10))
    strata = np.where(kinds < 2, "web", "books")
    found = cluster(losses, num_clusters=2, strata=strata)
    assert [(s.name, s.num_rows, s.first_cluster, s.num_clusters) for s in found.strata] == [
        ("books", 60, 0, 2),
        ("web", 340, 2, 2),
    ]
    assert found.strata_K.tolist() == [0, 0, 1, 1]
    assert np.array_equal(found.cluster_ids_N >= 2, strata == "web")
    means = found.centroids_KT.mean(axis=1)
    assert means[0] < means[1]
    assert means[2] < means[3]


def test_a_small_stratum_has_as_many_groups_as_rows_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    losses = np.random.default_rng(11).random((105, 3), dtype=np.float32)
    strata = ["big"] * 100 + ["small"] * 5
    with caplog.at_level(logging.WARNING, logger="s2l_ray"):
        found = cluster(losses, num_clusters=8, strata=strata)
    assert [s.num_clusters for s in found.strata] == [8, 5]
    assert found.summary()["capped"] == {"small": {"num_clusters": 5, "because": "there are only 5 rows"}}
    assert "small: 5 groups instead of 8: there are only 5 rows" in caplog.text


def test_more_groups_than_rows_is_an_error_with_both_numbers() -> None:
    with pytest.raises(ConfigError, match=r"clustering.num_clusters: 100 groups of 50 examples.*to 50 or less"):
        cluster(np.zeros((50, 2)))


@pytest.mark.parametrize(
    ("argument", "value"), [("num_clusters", 0), ("num_iterations", 0), ("num_restarts", -1), ("seed", "x")]
)
def test_an_argument_out_of_range_is_named(argument: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"clustering.{argument}"):
        cluster(np.zeros((50, 2)), **({"num_clusters": 3} | {argument: value}))


def test_numpy_numbers_are_arguments_too() -> None:
    assert cluster(np.random.default_rng(0).random((9, 2)), num_clusters=np.int64(3)).num_clusters == 3  # type: ignore[arg-type]


def test_equal_trajectories_are_one_group_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="s2l_ray"):
        found = cluster(np.full((300, 4), 2.5), num_clusters=10)
    assert found.sizes_K.tolist() == [300]
    assert found.inertia == 0
    assert found.explained_variance == 1
    assert "1 groups instead of 10: all 300 trajectories are equal" in caplog.text


def test_fewer_distinct_trajectories_than_groups_are_a_group_each() -> None:
    losses = np.repeat(np.array([[1.0, 2.0], [0.0, -0.0], [3.0, 0.5]]), 100, axis=0)
    losses[100:150] = 0.0
    found = cluster(losses, num_clusters=10)
    assert found.sizes_K.tolist() == [100, 100, 100]
    assert found.inertia == 0
    assert found.summary()["capped"]["all rows"]["because"] == "only 3 distinct trajectories among 300 rows"


def test_empty_groups_are_seeded_again_from_the_farthest_rows() -> None:
    losses, kinds = planted(np.random.default_rng(12))
    start = np.tile(np.float32(100), (4, 4)) + np.arange(4, dtype=np.float32)[:, None]
    start[0] = CURVES[0]
    with SearchThreads(2) as pool:
        rows = LocalRows(MemoryColumn(losses), 4, pool)
        lloyd(rows, start, 20)
        [(labels, _)] = rows.results()
    assert len(set(zip(kinds.tolist(), labels.tolist(), strict=True))) == 4


def test_many_empty_groups_are_filled_at_once() -> None:
    losses = np.random.default_rng(17).random((2_000, 3), dtype=np.float32)
    with SearchThreads(1) as pool:
        fit = lloyd(LocalRows(MemoryColumn(losses), 3, pool), np.full((60, 3), 9, np.float32), 1)
    assert fit.sizes_K.min() > 0


def test_duplicates_and_outliers_leave_no_group_empty() -> None:
    rng = np.random.default_rng(13)
    losses = np.concatenate([np.ones((20_000, 3)), rng.random((60, 3)) * 1e-5, np.full((1, 3), 1e4)]).astype(np.float32)
    found = cluster(losses, num_clusters=50)
    assert found.sizes_K.min() >= 1
    assert found.num_clusters == 50 or found.summary()["capped"]


@pytest.mark.parametrize("losses", [[[1.0, 2.0], [np.nan, 1.0]], [[1.0, 2.0], [1.0]], [[1.0, 2.0], [np.inf, 1.0]]])
def test_bad_losses_name_their_example(losses: Any) -> None:
    with pytest.raises(DataError, match="example_id 'b'"):
        cluster(losses, num_clusters=1, example_ids=["a", "b"])


def test_files_are_those_of_the_contract_and_read_back(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "ROWS_PER_PART", 150)
    losses, kinds = planted(np.random.default_rng(14))
    ids = [f"{row:03d}" for row in range(400)][::-1]
    trajectories = Trajectories.of(losses, ids, sources=np.where(kinds < 2, "web", "books"))
    artifact = built(tmp_path, trajectories, num_clusters=3, stratify_by="source")
    assert artifact.parts("assignments-") == [f"assignments-0000{part}.parquet" for part in range(3)]
    parts = [artifact.read_table(path) for path in artifact.parts("assignments-")]
    assert [len(part) for part in parts] == [150, 150, 100]
    assert [(f.name, str(f.type)) for f in parts[0].schema] == [
        ("example_id", "string"),
        ("cluster_id", "int32"),
        ("distance", "float"),
    ]
    assert pa.concat_tables(parts)["example_id"].to_pylist() == ids[::-1]
    assert np.load(tmp_path / "clustering" / "centroids.npy").shape == (6, 4)
    summary = artifact.summary
    assert summary["rows"] == sum(summary["sizes"]) == 400
    assert summary["strata"]["web"]["first_cluster"] == 3
    found = cluster(losses, num_clusters=3, strata=trajectories.sources.to_pylist()[::-1], example_ids=ids)
    assert content(read_clustering(artifact)) == content(found)


def test_a_plain_clustering_reads_back(tmp_path: Path) -> None:
    losses, _ = planted(np.random.default_rng(15))
    artifact = built(tmp_path, Trajectories.of(losses), num_clusters=4)
    assert artifact.summary["strata"] == {}
    assert content(read_clustering(artifact)) == content(cluster(losses, num_clusters=4))
    assert read_clustering(artifact).strata_K is None


def test_shuffled_and_recut_parts_give_the_same_files(tmp_path: Path) -> None:
    rng = np.random.default_rng(16)
    losses = rng.gamma(2, 1, (3_000, 4))
    table = pa.table({"example_id": [f"row-{row}" for row in range(3_000)], "losses": losses.tolist()})
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    pq.write_table(table, tmp_path / "a" / "whole.parquet")
    shuffled = table.take(pa.array(rng.permutation(3_000)))
    for part, (start, stop) in enumerate(((0, 7), (7, 2_000), (2_000, 3_000))):
        pq.write_table(shuffled.slice(start, stop - start), tmp_path / "b" / f"{part}.parquet", row_group_size=100)
    files = [
        file_bytes(built(tmp_path / f"run-{name}", read_trajectories(str(tmp_path / name)), num_clusters=12)) for name in "ab"
    ]
    assert files[0] == files[1]


def test_an_unknown_stratum_column_leaves_nothing_that_looks_finished(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no column 'topic'"):
        built(tmp_path, Trajectories.of(np.ones((9, 2))), num_clusters=2, stratify_by="topic")
    with pytest.raises(ArtifactError, match="unfinished"):
        Artifact.read(Storage(str(tmp_path / "clustering")))


def test_ten_rows_among_hundreds_of_thousands_are_a_group_of_their_own() -> None:
    rng = np.random.default_rng(18)
    kinds = np.concatenate([np.zeros(300_000, int), np.repeat(np.arange(1, 51), 10)])
    centers = np.concatenate([np.zeros((1, 5)), rng.normal(0, 10, (50, 5))])
    losses = (centers[kinds] + rng.normal(0, 0.001, (len(kinds), 5))).astype(np.float32)
    found = cluster(losses, num_clusters=51, num_iterations=5)
    assert sorted(found.sizes_K.tolist()) == [10] * 50 + [300_000]
    assert len(set(zip(kinds.tolist(), found.cluster_ids_N.tolist(), strict=True))) == 51


def test_strata_far_apart_are_grouped_as_exactly_as_each_alone() -> None:
    rng = np.random.default_rng(19)
    losses = rng.gamma(2, 1, (60_000, 12)).astype(np.float32)
    strata = rng.integers(0, 3, 60_000)
    losses += np.array([0, 10, 300], np.float32)[strata][:, None]
    found = cluster(losses, num_clusters=20, strata=strata, num_iterations=2, num_restarts=1)
    own = found.centroids_KT.astype(np.float64)
    for stratum in range(3):
        groups = np.flatnonzero(found.strata_K == stratum)
        rows = np.flatnonzero(strata == stratum)
        squares = ((losses[rows, None].astype(np.float64) - own[groups]) ** 2).sum(-1)
        mine = squares[np.arange(len(rows)), found.cluster_ids_N[rows] - groups[0]]
        assert (mine - squares.min(axis=1)).max() < 2e-3 * (stratum == 2) + 1e-4
