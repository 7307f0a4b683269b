"""k-means: every row with its nearest centroid, searches saved without a difference, the same bits wherever rows are."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s2l_ray.clustering import bounds, columns, engines, kmeans, local_rows, ray_rows
from s2l_ray.clustering import gpu_rows as gpu_module
from s2l_ray.clustering.bounds import drift_of
from s2l_ray.clustering.columns import FileColumn, MemoryColumn
from s2l_ray.clustering.engines import Engine
from s2l_ray.clustering.features import on_grid
from s2l_ray.clustering.gpu_rows import GpuRows
from s2l_ray.clustering.kmeans import Fit, KMeansRows, lloyd, plus_plus
from s2l_ray.clustering.local_rows import LocalRows
from s2l_ray.clustering.threads import SearchThreads
from s2l_ray.config import GroupingConfig
from s2l_ray.errors import ConfigError

SMALL_BLOCK = 100
FOUR = np.array([[0, 0, 0], [8, 0, 0], [0, 8, 1], [-7, -7, 3]], np.float32)


@pytest.fixture(scope="module")
def pool() -> Iterator[SearchThreads]:
    with SearchThreads(2) as threads:
        yield threads


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (engines, gpu_module, local_rows, ray_rows):
        monkeypatch.setattr(module, "BLOCK_ROWS", SMALL_BLOCK)


def in_memory(features: np.ndarray, pool: SearchThreads) -> LocalRows:
    return LocalRows(MemoryColumn(features), features.shape[1], pool)


def in_file(features: np.ndarray, pool: SearchThreads, folder: Path) -> LocalRows:
    """Rows, labels and gaps in files."""
    names = iter(range(9))

    def new_column(num_rows: int, width: int, dtype: Any) -> FileColumn:
        return FileColumn(folder / f"column-{next(names)}", num_rows, width, dtype)

    column = new_column(len(features), features.shape[1], np.float32)
    column.write(0, features)
    return LocalRows(column, features.shape[1], pool, new_column)


def outcome(rows: KMeansRows) -> tuple[np.ndarray, np.ndarray]:
    """Labels and distances of all rows."""
    labels, distances = zip(*rows.results(), strict=True)
    return np.concatenate(labels), np.concatenate(distances)


def bits(rows: KMeansRows, fit: Fit) -> list[Any]:
    """All of a result, to compare bit by bit."""
    arrays = (*outcome(rows), fit.centroids_KF, fit.sizes_K)
    return [*(array.tobytes() for array in arrays), fit.inertia.hex(), fit.num_iterations, fit.ended_by]


def squares(features: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Squared distances in float64, shape (N, K)."""
    return ((features[:, None].astype(np.float64) - centroids[None].astype(np.float64)) ** 2).sum(axis=2)


def planted(num_rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows close to one of four far points, and which."""
    rng = np.random.default_rng(seed)
    kinds = rng.choice(4, num_rows, p=[0.7, 0.2, 0.08, 0.02])
    return on_grid(FOUR[kinds] + rng.normal(0, 0.3, (num_rows, 3))), kinds


def check_fit(features: np.ndarray, labels: np.ndarray, fit: Fit) -> None:
    """Every row is with its nearest centroid, and sizes and inertia are those of the labels."""
    found = squares(features, fit.centroids_KF)
    own = found[np.arange(len(features)), labels]
    # What float32 cannot tell apart: faiss computes |x|^2 - 2xc + |c|^2, each rounded to 2**-24 of it.
    largest = (features.astype(np.float64) ** 2).sum(axis=1).max() + (fit.centroids_KF.astype(np.float64) ** 2).sum(
        axis=1
    ).max()
    assert (own <= found.min(axis=1) + 1e-6 * largest).all()
    assert fit.sizes_K.tolist() == np.bincount(labels, minlength=len(fit.sizes_K)).tolist()
    assert fit.inertia == pytest.approx(own.sum(), rel=1e-12, abs=1e-300)


# --- the result ----------------------------------------------------------------------------------------------------


def data_of(kind: str, num_rows: int, width: int, rng: np.random.Generator) -> np.ndarray:
    if kind == "duplicates":
        return rng.integers(0, 3, (num_rows, width)) / 2
    if kind == "near ties":
        return rng.integers(0, 5, (num_rows, width)) / 4 + rng.integers(-2, 3, (num_rows, width)) * 2.0**-20
    if kind == "outlier":
        return np.concatenate([rng.normal(0, 0.1, (num_rows - 1, width)), np.full((1, width), 50.0)])
    return rng.normal(0, 1, (num_rows, width))


@pytest.mark.usefixtures("small_blocks")
@given(
    kind=st.sampled_from(["normal", "duplicates", "near ties", "outlier"]),
    num_rows=st.integers(2, 450),
    width=st.integers(1, 5),
    num_clusters=st.integers(1, 20),
    start=st.sampled_from(["++", "rows", "anywhere"]),
    num_iterations=st.sampled_from([0, 1, 3, 200]),
    searched=st.sampled_from([-1, 0.3, 1.0]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=150, deadline=None)
def test_every_row_ends_with_its_nearest_centroid(
    pool: SearchThreads,
    kind: str,
    num_rows: int,
    width: int,
    num_clusters: int,
    start: str,
    num_iterations: int,
    searched: float,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    features = on_grid(data_of(kind, num_rows, width, rng))
    num_clusters = min(num_clusters, num_rows)
    if start == "++":
        centroids = plus_plus(features, num_clusters, seed % 2**31)
    elif start == "rows":
        centroids = features[rng.choice(num_rows, num_clusters, replace=False)]
    else:
        centroids = rng.normal(0, 4, (num_clusters, width)).astype(np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kmeans, "MAX_SEARCHED", searched)
        rows = in_memory(features, pool)
        fit = lloyd(rows, centroids, num_iterations)
    labels, distances = outcome(rows)
    check_fit(features, labels, fit)
    assert fit.num_iterations <= num_iterations
    exact = np.sqrt(squares(features, fit.centroids_KF)[np.arange(num_rows), labels])
    assert np.allclose(distances, exact, rtol=1e-6, atol=1e-12)
    num_distinct = len(np.unique(features, axis=0))
    # From centroids far from all rows one round of seeding may empty another: that is repaired in the next iteration.
    if kind in {"duplicates", "normal"} and num_distinct >= num_clusters and (num_iterations or start != "anywhere"):
        assert fit.sizes_K.min() > 0
    if fit.ended_by == "converged" and num_iterations:
        for cluster_id in np.flatnonzero(fit.sizes_K):
            mean = features[labels == cluster_id].astype(np.float64).mean(axis=0)
            assert np.allclose(fit.centroids_KF[cluster_id], mean, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_planted_groups_are_found_and_centroids_are_their_means(pool: SearchThreads, seed: int) -> None:
    features, kinds = planted(3_000, seed)
    rows = in_memory(features, pool)
    fit = lloyd(rows, FOUR + 1, 50)
    labels, _ = outcome(rows)
    assert fit.ended_by == "converged"
    assert np.array_equal(labels, kinds)
    for kind in range(4):
        assert np.allclose(fit.centroids_KF[kind], features[kinds == kind].mean(axis=0, dtype=np.float64), rtol=1e-6)


# --- saved searches ------------------------------------------------------------------------------------------------


def fit_with(
    share: float, features: np.ndarray, centroids: np.ndarray, num_iterations: int, pool: SearchThreads
) -> tuple[np.ndarray, Fit, int]:
    """Labels, fit, and how many rows were searched for it."""
    searched: list[int] = []
    search = faiss.knn

    def counted(rows: np.ndarray, *arguments: Any) -> Any:
        searched.append(len(rows))
        return search(rows, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kmeans, "MAX_SEARCHED", share)
        patch.setattr(bounds.faiss, "knn", counted)
        rows = in_memory(features, pool)
        fit = lloyd(rows, centroids, num_iterations)
    return outcome(rows)[0], fit, sum(searched)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("seed", range(5))
def test_bounds_change_nothing_on_planted_groups(pool: SearchThreads, seed: int) -> None:
    features, _ = planted(5_000, seed)
    start = FOUR + np.random.default_rng(seed).normal(0, 2, FOUR.shape).astype(np.float32)
    plain, without, all_searched = fit_with(-1, features, start, 100, pool)
    bounded, with_bounds, searched = fit_with(1.0, features, start, 100, pool)
    sometimes, chosen, _ = fit_with(0.3, features, start, 100, pool)
    assert np.array_equal(plain, bounded)
    assert np.array_equal(plain, sometimes)
    assert without.inertia == with_bounds.inertia == chosen.inertia
    assert without.num_iterations == with_bounds.num_iterations == chosen.num_iterations
    assert searched <= all_searched == 5_000 * (without.num_iterations + 1)


@pytest.mark.parametrize("width", [1, 2, 12])
def test_bounds_save_searches_where_groups_run_into_each_other(pool: SearchThreads, width: int) -> None:
    features = on_grid(np.random.default_rng(width).gamma(2, 1, (20_000, width)))
    start = plus_plus(features[:2_000].copy(), 30, 7)
    # A near tie that float32 cannot decide parts the ways after some iterations, and both go on to as good an end.
    for num_iterations, tolerance in ((1, 1e-6), (5, 1e-4), (15, 1e-3), (60, 1e-2)):
        found = [fit_with(share, features, start, num_iterations, pool) for share in (-1, 0.3, 1.0)]
        inertias = [fit.inertia for _, fit, _ in found]
        assert inertias[1:] == pytest.approx([inertias[0]] * 2, rel=tolerance)
    assert found[2][2] < found[0][2] / 2


@pytest.mark.usefixtures("small_blocks")
@given(
    searches=st.lists(st.sampled_from(["two", "nearest", "bounded"]), max_size=7),
    scales=st.lists(st.sampled_from([0.0, 0.01, 0.1, 1.0, 5.0]), min_size=8, max_size=8),
    spread=st.sampled_from([1.0, 30.0]),  # near each other, or so far apart that most moves concern few
    num_clusters=st.integers(1, 8),
    width=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=100, deadline=None)
def test_however_centroids_move_a_bounded_search_finds_the_nearest(
    pool: SearchThreads, searches: list[Any], scales: list[float], spread: float, num_clusters: int, width: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    centroids = rng.normal(0, spread, (num_clusters, width)).astype(np.float32)
    features = on_grid(centroids[rng.integers(0, num_clusters, 250)] + rng.normal(0, 1, (250, width)))
    rows = in_memory(features, pool)
    step = rows.assign(centroids, "two")
    sums, sizes, radii = step.sums_KF, step.sizes_K, step.radii_K
    for search, scale in zip([*searches, "bounded"], scales, strict=False):
        # One jumps, as when it is seeded again, the others drift.
        moves = rng.normal(0, scale, centroids.shape) * np.where(np.arange(num_clusters) == 0, 10, 1)[:, None]
        before, centroids = centroids, (centroids + moves).astype(np.float32)
        moved = np.sqrt(((centroids.astype(np.float64) - before) ** 2).sum(axis=1))
        rows.centroids_moved(drift_of(moved, centroids, radii + moved))
        step = rows.assign(centroids, search)
        sums, sizes = sums + step.sums_KF, sizes + step.sizes_K
        radii = np.maximum(radii + moved, step.radii_K) if search == "bounded" else step.radii_K
        labels = rows._labels.read(0, 250)
        found = squares(features, centroids)
        assert (found[np.arange(250), labels] <= found.min(axis=1) + 1e-6 * (features.max() ** 2 + found.max())).all()
        assert sizes.tolist() == np.bincount(labels, minlength=num_clusters).tolist()
        # Exact: the features lie on a grid.
        assert np.array_equal(sums, [features[labels == k].sum(axis=0, dtype=np.float64) for k in range(num_clusters)])


def test_a_centroid_that_wanders_costs_searches_along_its_way_alone(pool: SearchThreads) -> None:
    rng = np.random.default_rng(4)
    before = np.array([[0, 0], [4, 0], [100, 0], [104, 0]], np.float32)
    features = on_grid((before[:, None] + rng.uniform(-1, 1, (4, 100, 2))).reshape(400, 2))
    rows = in_memory(features, pool)
    radii = rows.assign(before, "two").radii_K
    assert (radii > 1).all()
    assert (radii < 1.5).all()
    after = before + np.array([[0, 0], [0, 6], [0, 0], [0, 0]], np.float32)
    moved = np.linalg.norm(after - before, axis=1)
    assert rows.centroids_moved(drift_of(moved, after, radii + moved)) == 200


@pytest.mark.parametrize("path", [(6.5, 4.2, 1.9), (6.5, 2.5, 1.9)])
def test_a_centroid_that_comes_nearer_in_steps_is_noticed(pool: SearchThreads, path: tuple[float, ...]) -> None:
    """At 4.2 it is farther than s + r, and at 2.5 than 2r, of the one at 0 (s = 3, r = 1); to the row at 1 both matter."""
    features = on_grid(np.array([[-1], [0], [1], [-3]]))
    centroids = np.array([[0], [-3], [path[0]]], np.float32)
    rows = in_memory(features, pool)
    radii = rows.assign(centroids, "two").radii_K
    for place in path[1:]:
        after = np.array([[0], [-3], [place]], np.float32)
        moved = np.abs(after - centroids)[:, 0].astype(np.float64)
        radii, centroids = radii + moved, after
        rows.centroids_moved(drift_of(moved, centroids, radii))
    rows.assign(centroids, "bounded")
    assert rows._labels.read(0, 4).tolist() == [0, 0, 2, 1]


def test_bounds_hold_after_a_centroid_jumped_to_a_far_row(pool: SearchThreads) -> None:
    """A reseeded centroid moves farther than any mean would: rows settled before are looked at again."""
    rng = np.random.default_rng(3)
    features = on_grid(np.concatenate([rng.normal(0, 1, (3_000, 2)), rng.normal(12, 0.2, (40, 2))]))
    start = np.concatenate([features[:6], np.full((3, 2), 1e3, np.float32)])
    labels, fit, _ = fit_with(1.0, features, start, 100, pool)
    check_fit(features, labels, fit)
    assert fit.sizes_K.min() > 0


# --- where rows are ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("width", [1, 3])
def test_memory_and_file_and_any_number_of_threads_give_the_same_bits(tmp_path: Path, width: int) -> None:
    features = on_grid(np.random.default_rng(1).gamma(2, 1, (2_345, width)))
    start = np.concatenate([features[:8], np.full((2, width), 99, np.float32)])  # two are seeded again
    found = []
    for num_threads in (1, 2, 3):
        (tmp_path / str(num_threads)).mkdir()
        with SearchThreads(num_threads) as threads:
            for rows in (in_memory(features, threads), in_file(features, threads, tmp_path / str(num_threads))):
                fit = lloyd(rows, start, 12)
                found.append(bits(rows, fit))
    assert all(one == found[0] for one in found)


def gpu_rows(features: np.ndarray, num_devices: int) -> GpuRows:
    """`GpuRows` whose devices are this processor. What it cannot see: devices side by side."""
    return GpuRows(MemoryColumn(features), features.shape[1], ["cpu"] * num_devices)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("num_devices", [1, 2, 3])
def test_the_gpu_engines_sums_and_seeds_are_those_of_a_cpu(pool: SearchThreads, num_devices: int) -> None:
    features, _ = planted(1_250)
    start = np.concatenate([FOUR[:3] + 1, np.full((1, 3), 500, np.float32)])  # the last is seeded again
    here, there = in_memory(features, pool), gpu_rows(features, num_devices)
    expected, found = lloyd(here, start, 20), lloyd(there, start, 20)
    assert np.array_equal(outcome(here)[0], outcome(there)[0])
    assert np.allclose(outcome(here)[1], outcome(there)[1], rtol=1e-6)
    assert found.sizes_K.tolist() == expected.sizes_K.tolist()
    assert found.inertia == pytest.approx(expected.inertia, rel=1e-4)
    assert (found.num_iterations, found.ended_by) == (expected.num_iterations, expected.ended_by)
    assert outcome(there)[0].dtype == np.int32


@pytest.mark.usefixtures("small_blocks")
def test_the_gpu_engine_is_as_good_where_groups_run_into_each_other(pool: SearchThreads) -> None:
    features = on_grid(np.random.default_rng(4).gamma(2, 1, (3_000, 5)))
    here, there = in_memory(features, pool), gpu_rows(features, 2)
    expected, found = (lloyd(rows, features[:20], 15) for rows in (here, there))
    assert found.inertia == pytest.approx(expected.inertia, rel=1e-4)
    check_fit(features, outcome(there)[0], found)


# --- empty groups --------------------------------------------------------------------------------------------------


def farthest_rows(features: np.ndarray, centroids: np.ndarray, count: int) -> np.ndarray:
    """By the book: the row farthest from all centroids that have rows and from those chosen before it."""
    chosen: list[np.ndarray] = []
    for _ in range(count):
        nearest = squares(features, np.concatenate([centroids, *chosen])).min(axis=1)
        chosen.append(features[[nearest.argmax()]])
    return np.concatenate(chosen)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("num_empty", [1, 2, 5])
def test_empty_centroids_go_exactly_to_the_farthest_rows(pool: SearchThreads, num_empty: int) -> None:
    features = on_grid(np.random.default_rng(5).normal(0, 1, (1_000, 3)))
    filled = on_grid(np.array([[0.5, 0, 0], [-0.5, 0, 0]]))
    start = np.concatenate([filled, np.full((num_empty, 3), 1e4, np.float32)])
    rows = in_memory(features, pool)
    fit = lloyd(rows, start, 0)
    assert np.array_equal(fit.centroids_KF, np.concatenate([filled, farthest_rows(features, filled, num_empty)]))
    assert fit.sizes_K.min() > 0
    check_fit(features, outcome(rows)[0], fit)


@pytest.mark.usefixtures("small_blocks")
def test_of_equally_far_rows_the_first_is_the_seed(tmp_path: Path) -> None:
    features = np.zeros((950, 2), np.float32)
    far = [[3, 4], [4, 3], [-5, 0], [0, 5]]
    features[[120, 130, 560, 900]] = far
    start = np.array([[0, 0], [100, 100], [90, 90]], np.float32)
    with SearchThreads(3) as threads:
        for rows in (in_memory(features, threads), in_file(features, threads, tmp_path)):
            # After the first, the second is no longer far from it.
            assert lloyd(rows, start, 0).centroids_KF.tolist() == [[0, 0], far[0], far[2]]


def test_fewer_distinct_rows_than_centroids_end_with_empty_groups_and_not_in_a_loop(pool: SearchThreads) -> None:
    features = np.repeat(np.array([[0, 0], [1, 1], [2, 0]], np.float32), 40, axis=0)
    fit = lloyd(in_memory(features, pool), np.full((7, 2), 9, np.float32), 50)
    assert sorted(fit.sizes_K.tolist()) == [0, 0, 0, 0, 40, 40, 40]
    assert fit.inertia == 0
    assert fit.ended_by == "converged"


# --- the end -------------------------------------------------------------------------------------------------------


def test_iterations_end_at_their_number_or_when_nothing_changes_and_say_which(pool: SearchThreads) -> None:
    features = on_grid(np.random.default_rng(6).gamma(2, 1, (5_000, 3)))
    fits = {n: lloyd(in_memory(features, pool), features[:12], n) for n in (0, 3, 1_000)}
    assert [(fit.num_iterations, fit.ended_by) for fit in list(fits.values())[:2]] == [
        (0, "num_iterations"),
        (3, "num_iterations"),
    ]
    assert fits[1_000].ended_by == "converged"
    assert 3 < fits[1_000].num_iterations < 1_000
    assert np.array_equal(fits[0].centroids_KF, features[:12])
    last = fits[1_000].num_iterations
    again = lloyd(in_memory(features, pool), fits[1_000].centroids_KF, 1_000)
    assert (again.num_iterations, again.ended_by) == (1, "converged")
    assert again.inertia == fits[1_000].inertia
    exactly = lloyd(in_memory(features, pool), features[:12], last)
    assert (exactly.num_iterations, exactly.ended_by) == (last, "converged")


def test_a_tolerance_ends_earlier_at_the_first_small_move_and_says_so(pool: SearchThreads) -> None:
    features = on_grid(np.random.default_rng(7).gamma(2, 1, (5_000, 3)))
    start, tolerance = features[:12], 0.01
    steps = [lloyd(in_memory(features, pool), start, n).centroids_KF.astype(np.float64) for n in range(60)]
    moves = [((after - before) ** 2).sum() for before, after in itertools.pairwise(steps)]
    first = next(number for number, moved in enumerate(moves) if moved <= tolerance)
    assert first > 1
    rows = in_memory(features, pool)
    fit = lloyd(rows, start, 1_000, tolerance)
    assert (fit.num_iterations, fit.ended_by) == (first + 1, "tolerance")
    assert np.array_equal(fit.centroids_KF, steps[first + 1].astype(np.float32))
    check_fit(features, outcome(rows)[0], fit)  # rows are with these centroids, not with those before
    assert lloyd(in_memory(features, pool), start, first, tolerance).ended_by == "num_iterations"
    assert lloyd(in_memory(features, pool), start, 1_000, 1e9).num_iterations == 1


def test_inertia_never_rises(pool: SearchThreads) -> None:
    features = on_grid(np.random.default_rng(8).gamma(2, 1, (4_000, 6)))
    found = [lloyd(in_memory(features, pool), features[:15], n).inertia for n in range(12)]
    assert all(after <= before for before, after in itertools.pairwise(found))


# --- columns and engines -------------------------------------------------------------------------------------------


@given(
    num_rows=st.integers(1, 60),
    width=st.integers(1, 3),
    dtype=st.sampled_from([np.int32, np.float32]),
    writes=st.lists(st.tuples(st.integers(0, 59), st.integers(1, 60)), max_size=5),
    one=st.tuples(st.integers(0, 59), st.integers(1, 90)),
)
@settings(max_examples=60, deadline=None)
def test_a_column_in_a_file_reads_like_one_in_memory(
    tmp_path_factory: pytest.TempPathFactory,
    num_rows: int,
    width: int,
    dtype: Any,
    writes: list[tuple[int, int]],
    one: tuple[int, int],
) -> None:
    both = [
        columns.in_memory(num_rows, width, dtype),
        FileColumn(tmp_path_factory.mktemp("column") / "file", num_rows, width, dtype),
    ]
    for number, (start, longest) in enumerate(writes):
        place = start % num_rows
        count = min(longest, num_rows - place)
        values = np.arange(count * width, dtype=dtype).reshape(both[0].read(0, count).shape) + number
        for column in both:
            column.write(place, values)
    start = one[0] % num_rows
    memory, file = (column.read(start, start + one[1]) for column in both)
    assert memory.tobytes() == file.tobytes()
    assert (memory.shape, memory.dtype, len(both[0])) == (file.shape, file.dtype, len(both[1]))


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_a_column_of_one_value_takes_a_matrix_of_one_column(pool: SearchThreads, tmp_path: Path, kind: str) -> None:
    column = Engine(kind, pool, None if kind == "memory" else tmp_path).new_column(70_000, 1, np.float32)
    column.write(5, np.ones((10, 1), np.float32))
    assert column.read(4, 16).reshape(-1).tolist() == [0, *[1] * 10, 0]


@pytest.mark.timeout(30)
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_truncated_file_is_an_error_that_names_it_and_not_a_hang(tmp_path: Path, num_threads: int) -> None:
    features, _ = planted(2_000)
    with SearchThreads(num_threads) as threads:
        rows = in_file(features, threads, tmp_path)
        os.truncate(tmp_path / "column-0", 1_999 * 12)
        with pytest.raises(OSError, match=r"ends early: .*column-0"):
            lloyd(rows, FOUR, 5)


@pytest.mark.timeout(30)
def test_a_disk_that_fills_up_is_an_error(pool: SearchThreads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    features, _ = planted(200)
    rows = in_file(features, pool, tmp_path)

    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(columns.os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"):
        lloyd(rows, FOUR, 5)


def test_short_writes_and_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, read = os.pwrite, os.preadv
    monkeypatch.setattr(columns.os, "pwrite", lambda file, data, place: write(file, data[:13], place))
    monkeypatch.setattr(columns.os, "preadv", lambda file, buffers, place: read(file, [buffers[0][:7]], place))
    column = FileColumn(tmp_path / "column", 50, 3, np.float32)
    values = np.arange(120, dtype=np.float32).reshape(40, 3)
    column.write(10, values)
    assert np.array_equal(column.read(10, 99), values)


def test_losses_stay_in_memory_up_to_the_size_that_was_allowed(pool: SearchThreads, tmp_path: Path) -> None:
    for memory_gb, kind in ((0.5, "memory"), (0.4, "disk")):
        engine = Engine.choose(GroupingConfig(memory_gb=memory_gb), pool, tmp_path, 10_000_000, 12)
        assert engine.kind == kind
        assert engine.describe() == {"memory": "in memory, 2 threads", "disk": "from disk, 2 threads"}[kind]
    assert isinstance(engine.new_column(70_000, 2, np.float32), FileColumn)
    assert isinstance(engine.new_column(60_000, 2, np.float32), MemoryColumn)
    engine.close()
    assert not list(tmp_path.iterdir())


def test_a_gpu_that_is_not_there_is_refused_with_what_to_do(pool: SearchThreads, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 0, raising=False)
    with pytest.raises(ConfigError, match=r"machines\.clustering\.engine=gpu.*s2l_ray\[gpu\].*auto, memory, disk or ray"):
        Engine.choose(GroupingConfig(engine="gpu"), pool, tmp_path, 100, 4)
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 2, raising=False)
    assert Engine.choose(GroupingConfig(), pool, tmp_path, 100, 4).describe() == "on 2 GPUs"


def test_each_thread_of_the_pool_has_faiss_use_one(pool: SearchThreads) -> None:
    assert set(pool.map(lambda _: faiss.omp_get_max_threads(), range(20))) == {1}
