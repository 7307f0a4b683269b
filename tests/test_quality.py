"""Features of trajectories and how good groups are: the formulas by the book, and diagnostics that tell the truth."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.metrics import adjusted_rand_score

from s2l_ray.clustering import diagnostics, kmeans, strata
from s2l_ray.clustering.features import Features, Spectrum, on_grid
from s2l_ray.clustering.groups import Clustering
from s2l_ray.clustering.stage import cluster, cluster_store
from s2l_ray.config import ClusteringConfig, SelectionConfig
from s2l_ray.errors import ConfigError
from s2l_ray.selection.alone import select_trajectories
from s2l_ray.selection.stage import select
from s2l_ray.storage.artifacts import Artifact, Key
from s2l_ray.storage.drafts import Draft
from s2l_ray.storage.places import Storage
from s2l_ray.trajectories.loss_columns import trajectories_table
from s2l_ray.trajectories.store import Trajectories, TrajectoryStore

KINDS = ("raw", "reduction", "shape", "whitened")
# Features are rounded to multiples of this.
GRID_STEP = 2.0**-20


def falling(num_rows: int, num_points: int, seed: int = 0) -> np.ndarray:
    """Losses that fall from about 5, at different speeds, with noise."""
    rng = np.random.default_rng(seed)
    speed = rng.gamma(2, 0.3, (num_rows, 1))
    losses = 5 * np.exp(-speed * np.arange(num_points)) + rng.gamma(2, 0.5, (num_rows, 1))
    return (losses + rng.normal(0, 0.2, (num_rows, num_points))).astype(np.float32)


def features_of(kind: str, losses: np.ndarray) -> Features:
    sample = on_grid(losses)
    return Features.of(kind, sample, Spectrum.of(sample))  # type: ignore[arg-type]


def grouped(losses: np.ndarray, sources: np.ndarray, **recipe: Any) -> Clustering:
    """Groups over all rows, of trajectories that have sources."""
    return cluster_store(
        TrajectoryStore.of(Trajectories.of(losses, sources=sources)), ClusteringConfig(**recipe, stratify_by=None)
    )


# --- measures ------------------------------------------------------------------------------------------------------


labelings = st.integers(1, 60).flatmap(
    lambda n: st.tuples(*[st.lists(st.integers(0, 5), min_size=n, max_size=n) for _ in range(2)])
)


@given(labelings)
@example(([0, 0, 0], [0, 0, 0]))
@example(([0, 1, 2], [2, 1, 0]))
@example(([0, 0, 0], [0, 1, 2]))
@example(([3], [0]))
@settings(max_examples=200, deadline=None)
def test_agreement_is_scikit_learns_adjusted_rand_index(labels: tuple[list[int], list[int]]) -> None:
    left, right = (np.array(values, np.int32) for values in labels)
    table = diagnostics.contingency(left, right, (6, 6))
    assert table.sum() == len(left)
    assert diagnostics.adjusted_rand_index(table) == pytest.approx(adjusted_rand_score(left, right), abs=1e-12)


def test_mean_agreement_is_over_all_pairs_of_restarts() -> None:
    labels = np.random.default_rng(0).integers(0, 4, (3, 500))
    labels[1, :400] = labels[0, :400]
    pairs = [adjusted_rand_score(labels[a], labels[b]) for a, b in ((0, 1), (0, 2), (1, 2))]
    assert diagnostics.mean_agreement(labels) == pytest.approx(np.mean(pairs), abs=1e-12)
    assert diagnostics.mean_agreement(labels[:1]) is None
    assert diagnostics.mean_agreement(np.zeros((3, 0), np.int32)) is None


def test_mean_overlap_is_the_share_of_common_rows() -> None:
    subsets = [np.array([0, 1, 2, 3]), np.array([0, 1, 2, 9]), np.array([0, 7, 8, 9])]
    assert diagnostics.mean_overlap(subsets) == pytest.approx((3 / 4 + 1 / 4 + 2 / 4) / 3)


@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_the_variance_between_groups_is_that_of_their_means(seed: int, num_groups: int, width: int) -> None:
    rng = np.random.default_rng(seed)
    rows, labels = rng.normal(0, 2, (80, width)), rng.integers(0, num_groups, 80)
    sums = np.stack([rows[labels == one].sum(axis=0) for one in range(7)])  # the last have no rows
    sizes = np.bincount(labels, minlength=7)
    means = np.stack([rows[labels == one].mean(axis=0) for one in labels])
    between, total = ((means - rows.mean(axis=0)) ** 2).sum(), ((rows - rows.mean(axis=0)) ** 2).sum()
    assert diagnostics.between(sums, sizes) == pytest.approx(between, rel=1e-9, abs=1e-9)
    assert diagnostics.explained(((rows - means) ** 2).sum(), total) == pytest.approx(between / total, rel=1e-9, abs=1e-9)


def test_groups_of_rows_that_do_not_differ_explain_everything() -> None:
    assert diagnostics.explained(0.0, 0.0) == 1.0


# --- principal components ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_points", [1, 2, 7])
def test_components_are_those_of_numpy_and_scikit_learn(num_points: int) -> None:
    losses = falling(3_000, num_points)
    found = Spectrum.of(losses)
    variances, directions = np.linalg.eigh(np.cov(losses.T.astype(np.float64), bias=True).reshape(num_points, num_points))
    theirs = PCA().fit(losses.astype(np.float64))
    assert found.variances_T == pytest.approx(variances[::-1], rel=1e-9)
    assert found.shares_T == pytest.approx(theirs.explained_variance_ratio_, rel=1e-9)
    for place in range(num_points):
        own = found.directions_TT[:, place]
        assert abs(own @ directions[:, num_points - 1 - place]) == pytest.approx(1, abs=1e-9)
        assert abs(own @ theirs.components_[place]) == pytest.approx(1, abs=1e-9)
        assert own[np.abs(own).argmax()] > 0
    assert found.shares_T.sum() == pytest.approx(1)
    assert (np.diff(found.variances_T) <= 0).all()


def test_the_effective_dimension_counts_equal_components_and_ignores_empty_ones() -> None:
    rng = np.random.default_rng(1)
    assert Spectrum.of(rng.normal(0, 1, (50_000, 5)).astype(np.float32)).effective_dimension == pytest.approx(5, abs=0.02)
    line = rng.normal(0, 1, (500, 1)) * np.ones((1, 5))
    assert Spectrum.of(line.astype(np.float32)).effective_dimension == pytest.approx(1)
    assert Spectrum.of(np.full((9, 3), 2, np.float32)).effective_dimension == 0
    assert Spectrum.of(np.full((9, 3), 2, np.float32)).shares_T.tolist() == [0, 0, 0]


# --- features ------------------------------------------------------------------------------------------------------


def test_raw_reduction_and_shape_are_their_formulas() -> None:
    losses = falling(500, 6).astype(np.float64)
    raw, reduction, shape = (features_of(kind, losses.astype(np.float32))(losses.astype(np.float32)) for kind in KINDS[:3])
    # Distances are all that k-means sees: the features may differ from the formula by one vector for all rows.
    for found, expected in (
        (raw, losses),
        (reduction, losses[:, :1] - losses[:, 1:]),
        (shape, losses - losses.mean(axis=1, keepdims=True)),
    ):
        assert found.dtype == np.float32
        assert found.shape == expected.shape
        assert np.allclose(found - found[0], expected - expected[0], atol=4 * GRID_STEP)
        assert np.array_equal(on_grid(found), found)
    assert np.allclose(shape.sum(axis=1), 0, atol=6 * GRID_STEP)


def test_whitened_features_are_uncorrelated_and_of_variance_one() -> None:
    losses = falling(4_000, 5)
    found = features_of("whitened", losses)(losses)
    assert found.shape == (4_000, 5)
    assert np.allclose(np.cov(found.T, bias=True), np.eye(5), atol=1e-4)
    pca = PCA(whiten=True).fit(losses.astype(np.float64))
    theirs = pca.transform(losses.astype(np.float64))
    for place in range(5):
        assert abs(np.corrcoef(found[:, place], theirs[:, place])[0, 1]) == pytest.approx(1, abs=1e-6)


def test_whitening_leaves_out_directions_that_are_rounding_errors() -> None:
    rng = np.random.default_rng(2)
    losses = (rng.normal(0, 1, (3_000, 2)) @ rng.normal(0, 1, (2, 6)) + 3).astype(np.float32)
    features = features_of("whitened", losses)
    assert features.num_features == 2
    assert np.allclose(np.cov(features(losses).T, bias=True), np.eye(2), atol=1e-4)


@given(kind=st.sampled_from(KINDS), num_rows=st.integers(1, 40), num_points=st.integers(2, 13), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_a_rows_features_do_not_depend_on_its_block(kind: str, num_rows: int, num_points: int, seed: int) -> None:
    losses = falling(300, num_points, seed)
    features = features_of(kind, losses)
    whole = features(losses)
    assert whole.shape == (300, features.num_features)
    assert features(losses[7 : 7 + num_rows].copy()).tobytes() == whole[7 : 7 + num_rows].tobytes()
    order = np.random.default_rng(seed).permutation(300)
    assert features(losses[order]).tobytes() == whole[order].tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_equal_rows_have_equal_bytes_also_around_zero(kind: str) -> None:
    losses = falling(50, 3) - 3
    losses[:30] = [[0.0, -0.0, 0.0], [-0.0, 0.0, -0.0], [-1e-9, 0.0, 1e-9]] * 10  # most are zero: so is the center
    found = features_of(kind, losses)(losses)
    assert len({row.tobytes() for row in found[:30]}) == 1
    assert not np.signbit(found[found == 0]).any()


@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_single_point_has_no_other_features_than_the_loss(kind: str) -> None:
    with pytest.raises(ConfigError, match=rf"clustering\.features: '{kind}' needs trajectories of two points.*Use 'raw'"):
        cluster(np.random.default_rng(0).random((20, 1)), num_clusters=2, features=kind)


@pytest.mark.parametrize(("kind", "num_points"), [("raw", 1), ("reduction", 2)])
def test_trajectories_of_one_feature_are_grouped_by_it(kind: str, num_points: int) -> None:
    rng = np.random.default_rng(3)
    kinds = np.repeat([0, 1, 2], [60, 30, 10])
    losses = np.full((100, num_points), 5.0)
    losses[:, -1] = np.array([1.0, 2.0, 4.0])[kinds] + rng.normal(0, 0.05, 100)
    found = cluster(losses, num_clusters=3, features=kind)
    assert adjusted_rand_score(found.cluster_ids_N, kinds) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_constant_trajectories_are_one_group_for_all_features(kind: str) -> None:
    found = cluster(np.full((300, 4), 2.5), num_clusters=10, features=kind)
    assert found.sizes_K.tolist() == [300]
    assert (found.inertia, found.explained_variance) == (0, 1)
    assert np.allclose(found.centroids_KT, 2.5)
    assert not found.distances_N.any()
    assert found.summary()["capped"]["all rows"]["because"] == "all 300 trajectories are equal"


def test_rows_that_differ_in_level_only_are_one_group_of_shape() -> None:
    levels = np.random.default_rng(4).integers(0, 64, (200, 1)) / 8
    for kind in ("shape", "reduction"):
        found = cluster(levels + np.array([2, 1, 0.5, 0.25]), num_clusters=5, features=kind)
        assert found.sizes_K.tolist() == [200]


def test_whitening_of_one_direction_groups_along_it() -> None:
    kinds = np.repeat([0, 1, 2], [50, 30, 20])
    losses = (np.array([1.0, 3.0, 8.0])[kinds] + np.random.default_rng(5).normal(0, 0.1, 100))[:, None] * np.ones((1, 4))
    found = cluster(losses, num_clusters=3, features="whitened")
    assert adjusted_rand_score(found.cluster_ids_N, kinds) == 1


# --- what features are for -----------------------------------------------------------------------------------------


def shapes_under_levels(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Three ways of learning, under levels that differ ten times as much and have nothing to do with them."""
    rng = np.random.default_rng(seed)
    curves = np.array([[0, 0, 0, 0], [0.6, 0.2, -0.2, -0.6], [0.6, -0.6, 0.6, -0.6]])
    kinds = rng.integers(0, 3, 1_500)
    return curves[kinds] + rng.uniform(2, 12, (1_500, 1)) + rng.normal(0, 0.08, (1_500, 4)), kinds


@pytest.mark.parametrize("seed", range(3))
def test_shape_finds_ways_of_learning_that_raw_losses_hide_behind_the_level(seed: int) -> None:
    losses, kinds = shapes_under_levels(seed)
    agreement = {
        kind: adjusted_rand_score(cluster(losses, num_clusters=3, features=kind).cluster_ids_N, kinds) for kind in KINDS
    }
    assert agreement["shape"] == 1
    assert agreement["raw"] < 0.05


def test_centroids_are_mean_losses_whatever_the_features() -> None:
    losses, _ = shapes_under_levels(0)
    for kind in KINDS:
        # Until they converge, the centroids of raw losses are the means of one iteration before.
        found = cluster(losses, num_clusters=6, features=kind, num_iterations=1_000)
        for cluster_id, centroid in enumerate(found.centroids_KT):
            members = losses[found.cluster_ids_N == cluster_id]
            assert np.allclose(centroid, members.mean(axis=0), atol=1e-5)
        assert (np.diff(found.centroids_KT.mean(axis=1)) >= -1e-6).all()


def test_a_subset_by_shape_has_equal_shares_of_the_ways_of_learning() -> None:
    losses, kinds = shapes_under_levels(1)
    rare = np.concatenate([np.flatnonzero(kinds == 0), np.flatnonzero(kinds == 1)[:40], np.flatnonzero(kinds == 2)[:80]])
    found = select(losses[rare], budget=120, num_clusters=3, features="shape")
    assert np.bincount(kinds[rare][found.example_ids.to_numpy()]).tolist() == [40, 40, 40]


# --- the diagnostics ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_explained_variance_and_that_of_sources_are_as_computed_directly(kind: str) -> None:
    losses = falling(4_000, 5, seed=6)
    rng = np.random.default_rng(7)
    sources = np.array(["books", "code", "web"])[np.clip((losses[:, 0] - 4 + rng.normal(0, 1, 4_000)) // 1.5, 0, 2).astype(int)]
    found = grouped(losses, sources, num_clusters=12, features=kind)
    values = features_of(kind, losses)(losses).astype(np.float64)

    def within(labels: np.ndarray) -> float:
        return sum(((values[labels == one] - values[labels == one].mean(axis=0)) ** 2).sum() for one in np.unique(labels))

    total = within(np.zeros(4_000))
    assert found.explained_variance == pytest.approx(1 - found.inertia / total, rel=1e-6)
    # Groups that have not converged are not around their means.
    assert found.explained_variance == pytest.approx(1 - within(found.cluster_ids_N) / total, abs=0.01)
    by_source = found.diagnostics["variance_explained_by_source"]
    assert by_source == pytest.approx(1 - within(sources) / total, rel=1e-6)
    assert 0 < by_source < 1
    agreement = adjusted_rand_score(found.cluster_ids_N, sources)
    assert found.diagnostics["agreement_with_source"] == pytest.approx(agreement, abs=1e-9)
    assert found.diagnostics["features"] == kind


def test_groups_that_are_the_sources_agree_with_them_entirely() -> None:
    rng = np.random.default_rng(8)
    sources = np.array(["books", "code", "web"])[rng.integers(0, 3, 600)]
    levels = {"books": 1.0, "code": 4.0, "web": 9.0}
    losses = np.array([levels[source] for source in sources])[:, None] + rng.normal(0, 0.1, (600, 3))
    found = grouped(losses, sources, num_clusters=3)
    assert found.diagnostics["agreement_with_source"] == 1
    assert found.diagnostics["variance_explained_by_source"] == pytest.approx(found.explained_variance, abs=1e-6)
    unrelated = grouped(losses, rng.permutation(sources), num_clusters=3)
    assert abs(unrelated.diagnostics["agreement_with_source"]) < 0.02
    assert unrelated.diagnostics["variance_explained_by_source"] < 0.02
    strata = cluster(rng.random((600, 3)), num_clusters=1, strata=sources)
    assert strata.diagnostics["agreement_with_source"] == 1
    assert strata.diagnostics["variance_explained_by_source"] == pytest.approx(strata.explained_variance, abs=1e-6)


def test_without_sources_nothing_is_said_of_them() -> None:
    found = cluster(falling(300, 4), num_clusters=4).diagnostics
    assert found["variance_explained_by_source"] is None
    assert found["agreement_with_source"] is None


def test_restarts_agree_on_planted_groups_and_one_restart_says_nothing() -> None:
    losses, _ = shapes_under_levels(2)
    several, one = (cluster(losses, num_clusters=3, num_restarts=n, features="shape").diagnostics for n in (3, 1))
    assert several["agreement_of_restarts"] == 1
    assert one["agreement_of_restarts"] is None
    blurred = cluster(np.random.default_rng(9).random((2_000, 6)), num_clusters=20).diagnostics["agreement_of_restarts"]
    assert 0.1 < blurred < 0.9


def test_tiny_groups_and_sampled_rows_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(10)
    kinds = np.repeat(np.arange(4), [500, 300, 11, 10])
    losses = np.array([1.0, 3.0, 30.0, 90.0])[kinds][:, None] + rng.normal(0, 0.05, (821, 3))
    found = cluster(losses, num_clusters=4).diagnostics
    assert (found["tiny_groups"], found["tiny_rows"]) == (1, 10)
    assert (found["sampled_rows"], found["training_rows"]) == (821, 821)
    monkeypatch.setattr(strata, "SAMPLE_ROWS_PER_CLUSTER", 50)
    found = cluster(losses, num_clusters=4, training_rows=400).diagnostics
    assert (found["sampled_rows"], found["training_rows"]) == (200, 400)


def one_direction(noise: float) -> np.ndarray:
    """Losses whose level varies more than all else, by far if there is little noise."""
    rng = np.random.default_rng(11)
    return rng.gamma(4, 1, (2_000, 1)) + rng.normal(0, noise, (2_000, 5))


@pytest.mark.parametrize(("noise", "warned"), [(0.05, True), (1.0, False)])
def test_a_warning_where_one_component_holds_nearly_everything(noise: float, warned: bool) -> None:
    losses = one_direction(noise)
    share = PCA().fit(losses).explained_variance_ratio_[0]
    assert (share > 0.9) == warned
    for kind in KINDS:
        warning = cluster(losses, num_clusters=5, features=kind).diagnostics["warning"]
        assert (warning is not None) == warned
        if warning is not None:
            assert warning.startswith(f"one direction holds {share:.1%} of the trajectories' variance")
            assert ("reduction, shape or whitened" in warning) == (kind == "raw")


@pytest.mark.parametrize(
    ("steps", "advice"),
    [
        ([0, 5, 10], None),
        ([5, 10, 15], r"record the untrained model too \(step 0; proxy\.include_untrained in a run\)$"),
        (None, r"record the untrained model too \(step 0\) if these trajectories lack it$"),
    ],
    ids=["recorded", "not-recorded", "unknown"],
)
def test_a_warning_advises_only_what_is_not_done_yet(tmp_path: Path, steps: list[int] | None, advice: str | None) -> None:
    """Of a run's trajectories or a recording it is known whether they begin with the untrained model, of others not."""
    losses = one_direction(0.05).astype(np.float32)
    ids = [f"row-{row:04d}" for row in range(len(losses))]
    if steps is None:
        pq.write_table(pa.table({"example_id": ids, "losses": losses.tolist()}), tmp_path / "t.parquet")
        source = str(tmp_path / "t.parquet")
    else:
        source = str(tmp_path / "trajectories")
        draft = Draft.open(Storage(str(tmp_path)), Key("trajectories", 1, {}, {}))
        draft.write_table("part-00000.parquet", trajectories_table(ids, losses, ["web"] * len(ids), [9] * len(ids)))
        draft.publish({"rows": len(ids), "steps": steps})
    for kind in ("raw", "shape"):
        grouping = ClusteringConfig(num_clusters=5, features=kind)  # type: ignore[arg-type]
        select_trajectories(source, str(tmp_path / kind), grouping, SelectionConfig(budget=50))
        warning = Artifact.read(Storage(str(tmp_path / kind / "clustering"))).summary["diagnostics"]["warning"]
        assert ("Compare clustering.features" in warning) == (kind == "raw")
        if kind == "shape" or advice is None:
            assert "untrained" not in warning
        else:
            assert re.search(advice, warning)


def test_one_point_and_equal_rows_have_no_warning() -> None:
    assert diagnostics.warning(Spectrum.of(falling(200, 1)), "raw") is None
    assert diagnostics.warning(Spectrum.of(np.ones((200, 3), np.float32)), "raw") is None


def test_components_in_the_diagnostics_are_the_corpus_own() -> None:
    losses = falling(3_000, 4, seed=12)
    found = cluster(losses, num_clusters=5, features="shape").diagnostics
    theirs = PCA().fit(losses.astype(np.float64))
    assert found["principal_components"] == pytest.approx(theirs.explained_variance_ratio_, abs=2e-6)
    variances = theirs.explained_variance_
    assert found["effective_dimension"] == pytest.approx(variances.sum() ** 2 / (variances**2).sum(), abs=2e-3)


# --- how good groups are -------------------------------------------------------------------------------------------


def test_ten_seeds_are_as_good_as_scikit_learns() -> None:
    losses = np.random.default_rng(13).gamma(2, 1, (5_000, 8)).astype(np.float32)
    theirs = np.mean([KMeans(20, n_init=3, max_iter=100, random_state=seed).fit(losses).inertia_ for seed in range(2)])
    ours = [cluster(losses, num_clusters=20, num_iterations=100, seed=seed).inertia for seed in range(10)]
    assert np.mean(ours) < 1.01 * theirs
    assert max(ours) < 1.02 * theirs


def far_and_small(seed: int, noise: float) -> tuple[np.ndarray, np.ndarray]:
    """One group of 90,000 rows, and fifty of ten rows at distances of 10 to 20 from it."""
    rng = np.random.default_rng(seed)
    directions = rng.normal(0, 1, (50, 6))
    centers = np.zeros((51, 6))
    centers[1:] = 10 * (1 + rng.random((50, 1))) * directions / np.linalg.norm(directions, axis=1, keepdims=True)
    kinds = np.repeat(np.arange(51), [90_000] + [10] * 50)
    return (centers[kinds] + rng.normal(0, noise, (len(kinds), 6))).astype(np.float32), kinds


def num_found(labels: np.ndarray, kinds: np.ndarray) -> int:
    """Planted small groups that are a group of their own."""
    sizes = np.bincount(labels)
    members = [np.unique(labels[kinds == kind]) for kind in range(1, 51)]
    return sum(len(own) == 1 and sizes[own[0]] == 10 for own in members)


@pytest.mark.parametrize(("num_clusters", "noise"), [(51, 0.003), (60, 0.03)])
def test_fifty_tiny_groups_far_from_a_huge_one_are_all_found(num_clusters: int, noise: float) -> None:
    # With 51 groups and noise 0.03 the k-means++ sample misses 2 to 8 of them: the huge group's own spread then weighs as
    # much in the draw as the last few tiny groups.
    for seed in range(2):
        losses, kinds = far_and_small(seed, noise)
        found = cluster(losses, num_clusters=num_clusters, seed=seed)
        assert num_found(found.cluster_ids_N, kinds) == 50


def test_groups_that_stay_empty_in_one_stratum_leave_the_others_groups_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def partly_far_away(features: np.ndarray, num_clusters: int, _seed: int) -> np.ndarray:
        start = np.full((num_clusters, features.shape[1]), 1e3, np.float32)
        start[:7] = features[:7]
        return start

    monkeypatch.setattr(strata, "plus_plus", partly_far_away)
    monkeypatch.setattr(kmeans, "MAX_REPAIRS", 0)
    rng = np.random.default_rng(14)
    labels = np.repeat(["a", "b", "c"], [200, 300, 100])
    losses = np.array([100, 0, 9])[np.repeat([0, 1, 2], [200, 300, 100])][:, None] + rng.random((600, 2))
    for kind in ("raw", "reduction"):
        found = cluster(losses, num_clusters=10, strata=labels, features=kind)
        assert {stratum.num_clusters for stratum in found.strata} == {7}
        assert all("stayed empty" in str(stratum.capped_by) for stratum in found.strata)
        assert np.bincount(found.cluster_ids_N).tolist() == found.sizes_K.tolist()
        assert found.strata_K is not None
        names = np.array([stratum.name for stratum in found.strata])
        assert np.array_equal(names[found.strata_K[found.cluster_ids_N]], labels)
        assert np.abs(found.centroids_KT[found.cluster_ids_N] - losses).max() < 1


def test_fewer_training_rows_than_groups_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"training_rows=50.*num_clusters=100"):
        cluster(falling(500, 3), num_clusters=100, training_rows=50)
