"""Strata by source where the corpus names several, groups of groups, and other draws than the paper's."""

from __future__ import annotations

import itertools
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s2l_ray.clustering.stage import cluster, cluster_store, read_groups
from s2l_ray.clustering.stratifying import config_of_stratum, strata_of
from s2l_ray.config import ClusteringConfig, GroupingConfig, SelectionConfig
from s2l_ray.errors import ConfigError
from s2l_ray.examples.ids import priorities
from s2l_ray.selection import choosing
from s2l_ray.selection.alone import select_trajectories
from s2l_ray.selection.choosing import choose
from s2l_ray.selection.quotas import Sharing, water_fill
from s2l_ray.selection.stage import read_selection, select
from s2l_ray.storage.artifacts import Artifact
from s2l_ray.storage.places import Storage
from s2l_ray.trajectories.store import Trajectories, TrajectoryStore

AUTO = ClusteringConfig(num_clusters=20)


# --- strata by source, or none -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "num_rows", "are_files", "column", "because"),
    [
        (["a", "b"], 100, False, "source", "names 2 sources"),
        (["a"], 100, False, None, "one source only"),
        ([], 100, False, None, "no sources"),
        (["part-0", "part-1"], 100, False, "source", "names 2 sources"),
        (["part-0", "part-1"], 100, True, None, "shards of one file"),
        (["gsm8k", "mathqa"], 100, True, "source", "names 2 sources"),
        ([str(i) for i in range(60)], 100, False, None, "no strata: most have one row"),
    ],
)
def test_auto_is_by_source_where_several_are_named(
    names: list[str], num_rows: int, are_files: bool, column: str | None, because: str
) -> None:
    found = strata_of(AUTO, names, num_rows, are_files)
    assert found.column == column
    assert because in found.reason


def test_auto_shares_the_groups_and_a_named_column_gives_as_many_to_each() -> None:
    counts = [9_000, 900, 99, 1]
    shared = [config_of_stratum(AUTO, count, 10_000).num_clusters for count in counts]
    assert shared == [18, 2, 1, 1]
    named = AUTO.model_copy(update={"stratify_by": "source"})
    assert [config_of_stratum(named, count, 10_000).num_clusters for count in counts] == [20] * 4


def test_what_auto_became_is_in_the_log_and_in_the_manifest(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rng = np.random.default_rng(0)
    columns = {"example_id": np.arange(600), "losses": list(rng.random((600, 3))), "source": ["a", "b", "b"] * 200}
    for name, dropped, expected in (("several", [], "source"), ("none", ["source"], None)):
        pq.write_table(pa.table(columns).drop_columns(dropped), tmp_path / f"{name}.parquet")
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="s2l_ray"):
            select_trajectories(str(tmp_path / f"{name}.parquet"), str(tmp_path / name), AUTO, SelectionConfig(budget=60))
        text = "stratify_by auto: " + ("by source (the corpus names 2 sources)" if expected else "no strata")
        assert any(text in record.getMessage() for record in caplog.records)
        summary = Artifact.read(Storage(str(tmp_path / name / "clustering"))).summary
        assert summary["stratify_by"] == expected
        assert summary["num_clusters"] == 20
        chosen = pq.read_table(tmp_path / name / "selection" / "selected.parquet")
        if expected:
            assert chosen["source"].to_pylist().count("a") == 30


def test_python_and_files_agree_on_auto(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    losses, sources = rng.random((500, 4)).astype(np.float32), np.array(["x", "y", "z", "z", "z"] * 100)
    pq.write_table(pa.table({"example_id": np.arange(500), "losses": list(losses), "source": sources}), tmp_path / "t.parquet")
    files = select_trajectories(str(tmp_path / "t.parquet"), str(tmp_path / "out"), AUTO, SelectionConfig(budget=50))
    mine = select(losses, budget=50, num_clusters=20, sources=sources)
    assert read_selection(files).example_ids.equals(mine.example_ids)
    without = select(losses, budget=50, num_clusters=20, sources=sources, stratify_by=None)
    assert without.example_ids.equals(select(losses, budget=50, num_clusters=20).example_ids)
    assert not without.example_ids.equals(mine.example_ids)


# --- groups of groups ----------------------------------------------------------------------------------------------


def uneven(rng: np.random.Generator) -> np.ndarray:
    """9,000 trajectories in a corner, and 1,000 spread over a space that is many times as wide."""
    return np.concatenate([rng.normal(3, 0.7, (9_000, 3)), rng.uniform(0, 10, (1_000, 3))]).astype(np.float32)


def test_shares_of_groups_of_groups_follow_the_space_and_not_the_density() -> None:
    losses = uneven(np.random.default_rng(0))
    counts = {}
    for name, options in {"flat": {"num_clusters": 200}, "levels": {"levels": [200, 40, 10]}}.items():
        found = select(losses, budget=500, num_restarts=1, **options)  # type: ignore[arg-type]
        counts[name] = int((found.example_ids.to_numpy() >= 9_000).sum())
        assert len(found) == 500
        assert found.weights_M.sum() == pytest.approx(10_000)
    assert counts["levels"] > 1.15 * counts["flat"]


def test_every_level_is_in_the_artifact_and_shares_run_from_the_top_down(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    sources = np.array(["a"] * 1_500 + ["b"] * 500)
    table = pa.table({"example_id": np.arange(2_000), "losses": list(rng.gamma(2, 1, (2_000, 4))), "source": sources})
    pq.write_table(table, tmp_path / "t.parquet")
    budgets = SelectionConfig(budget=200, more_budgets=[500])
    chosen = select_trajectories(
        str(tmp_path / "t.parquet"), str(tmp_path / "out"), ClusteringConfig(levels=[60, 12, 4]), budgets
    )
    groups = read_groups(Artifact.read(Storage(str(tmp_path / "out" / "clustering"))))
    assert [len(groups.sizes_K), *(len(np.unique(parents)) for parents in groups.parents)] == [60, 12, 4]
    assert [len(parents) for parents in groups.parents] == [60, 12]
    assert groups.topmost_strata is not None
    assert groups.topmost_strata.tolist() == [0, 0, 0, 1]
    top = groups.parents[1][groups.parents[0]]
    assert groups.strata_K is not None
    assert np.array_equal(groups.topmost_strata[top], groups.strata_K)
    quotas = np.array(chosen.summary["quotas"])
    sizes_of_top = np.bincount(top, groups.sizes_K).astype(int)
    assert np.bincount(top, quotas)[:3].tolist() == water_fill(sizes_of_top[:3], 100).tolist()
    folder = tmp_path / "out" / "selection"
    small, large = (
        pq.read_table(folder / name)["example_id"].to_pylist() for name in ("selected.parquet", "selected-500.parquet")
    )
    assert set(small) < set(large)
    assert chosen.summary["stability"] is None


@pytest.mark.parametrize("engine", ["memory", "disk"])
def test_levels_are_the_same_bytes_for_any_order_engine_and_threads(tmp_path: Path, engine: Any) -> None:
    losses = uneven(np.random.default_rng(3))
    options: dict[str, Any] = {"levels": [100, 20, 5], "num_restarts": 2}
    one = cluster(losses, num_threads=1, **options)
    order = np.random.default_rng(4).permutation(len(losses))
    other = cluster(losses[order], example_ids=order, num_threads=3, **options)
    pq.write_table(pa.table({"example_id": order, "losses": list(losses[order])}), tmp_path / "t.parquet", row_group_size=999)
    select_trajectories(
        str(tmp_path / "t.parquet"),
        str(tmp_path / "out"),
        ClusteringConfig(**options),
        SelectionConfig(budget=9),
        GroupingConfig(engine=engine),
    )
    third = read_groups(Artifact.read(Storage(str(tmp_path / "out" / "clustering"))))
    for found in (other, third):
        assert found.centroids_KT.tobytes() == one.centroids_KT.tobytes()
        assert [parents.tolist() for parents in found.parents] == [parents.tolist() for parents in one.parents]


def test_levels_that_cannot_be_are_refused_and_those_above_the_groups_are_capped() -> None:
    for levels, message in (([5], "each smaller"), ([5, 5], "each smaller"), ([5, 9], "each smaller"), ([9, 0], "levels")):
        with pytest.raises(ConfigError, match=message):
            cluster(np.random.default_rng(0).random((50, 2)), levels=levels)
    with pytest.raises(ValueError, match="Leave num_clusters out"):
        ClusteringConfig(num_clusters=7, levels=[9, 3])
    found = cluster(np.repeat([[1.0, 1.0], [2.0, 2.0]], 30, axis=0), levels=[20, 10, 5])
    assert found.num_clusters == 2
    assert [parents.tolist() for parents in found.parents] == [[0, 1], [0, 1]]


# --- draws ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 300), min_size=1, max_size=8), st.floats(0.01, 1), st.integers(0, 2**32 - 1), st.integers(0, 9))
@settings(max_examples=80, deadline=None)
def test_by_a_key_the_lowest_of_each_group_are_found_in_any_cut(
    sizes: list[int], fraction: float, seed: int, minimum: int
) -> None:
    rng = np.random.default_rng(seed)
    groups = rng.permutation(np.repeat(np.arange(len(sizes)), sizes)).astype(np.int32)
    keys = rng.integers(0, 40, len(groups)).astype(np.uint64)  # not uniform, and often equal
    ranks, sources = rng.integers(0, 2**64, len(groups), np.uint64), rng.integers(0, 2, len(groups))
    columns = {"cluster_id": groups, "priority": ranks, "key": keys, "source": sources, "row": np.arange(len(groups))}
    table, cuts = pa.table(columns), [0, *np.sort(rng.integers(0, len(groups), 3)), len(groups)]
    budget = max(2 * minimum, 1, int(fraction * len(groups)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choosing, "_PRUNED_ROWS", 0)
        [found] = choose(
            lambda function: [function(table[start:stop]) for start, stop in itertools.pairwise(cuts)],
            Sharing(np.array(sizes), allocation=0.5),
            [budget],
            sizes_S=np.bincount(sources, minlength=2),
            min_per_source=minimum,
        )
    rows = found["row"].to_numpy()
    assert len(rows) == min(budget, len(groups))
    if minimum:
        for source in range(2):
            members = np.flatnonzero(sources == source)
            assert set(members[np.argsort(ranks[members])][:minimum]) <= set(rows)
        return
    for cluster_id, quota in enumerate(water_fill(sizes, budget, allocation=0.5).tolist()):
        members = np.flatnonzero(groups == cluster_id)
        assert set(members[np.argsort(keys[members], kind="stable")][:quota]) == set(rows[groups[rows] == cluster_id])


def test_central_takes_those_nearest_to_the_centroid() -> None:
    losses = np.random.default_rng(5).gamma(2, 1, (3_000, 4)).astype(np.float32)
    options: dict[str, Any] = {"num_clusters": 12, "num_restarts": 1}
    groups = cluster(losses, **options)
    found = select(losses, budget=300, draw="central", **options)
    for cluster_id, quota in enumerate(found.quotas_K.tolist()):
        members = np.flatnonzero(groups.cluster_ids_N == cluster_id)
        order = np.lexsort((priorities(members, 0), groups.distances_N[members]))
        assert set(members[order[:quota]]) == set(found.example_ids.to_numpy()[found.cluster_ids_M == cluster_id])
    assert set(found.example_ids.to_pylist()) < set(
        select(losses, budget=700, draw="central", **options).example_ids.to_pylist()
    )


def test_spread_takes_one_of_each_group_inside_a_group() -> None:
    rng = np.random.default_rng(6)
    kinds = rng.choice(5, 2_000, p=[0.9, 0.04, 0.03, 0.02, 0.01])
    losses = (kinds[:, None] + rng.normal(0, 0.01, (2_000, 3))).astype(np.float32)
    found = select(losses, budget=5, num_clusters=1, draw="spread", seed=2)
    drawn = select(losses, budget=5, num_clusters=1, seed=2)
    assert len(found) == 5
    assert len(set(kinds[found.example_ids.to_numpy()])) >= len(set(kinds[drawn.example_ids.to_numpy()]))
    many = select(losses, budget=40, num_clusters=1, draw="spread")
    assert set(kinds[many.example_ids.to_numpy()]) == set(range(5))


@pytest.mark.parametrize("features", ["raw", "whitened"])
def test_spread_keeps_the_quotas_and_the_bytes_in_any_order(features: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("s2l_ray.selection.spreading.PIECE_ROWS", 100)
    rng = np.random.default_rng(7)
    losses = np.concatenate([rng.gamma(2, 1, (1_500, 4)), np.full((300, 4), 3.0)])  # equal rows: no groups inside
    options: dict[str, Any] = {"budget": 400, "num_clusters": 6, "num_restarts": 1, "features": features}
    found = select(losses, draw="spread", **options)
    assert found.quotas_K.tolist() == select(losses, **options).quotas_K.tolist()
    order = rng.permutation(1_800)
    again = select(losses[order], example_ids=order, draw="spread", **options)
    assert again.example_ids.equals(found.example_ids)


def test_the_files_of_select_hold_other_draws_too(tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    losses, sources = rng.random((400, 3)).astype(np.float32), np.array(["x", "y"] * 200)
    pq.write_table(pa.table({"example_id": np.arange(400), "losses": list(losses), "source": sources}), tmp_path / "t.parquet")
    for draw in ("central", "spread"):
        config = SelectionConfig(budget=40, draw=draw, allocation=0.5)  # type: ignore[arg-type]
        files = select_trajectories(str(tmp_path / "t.parquet"), str(tmp_path / draw), AUTO, config)
        mine = select(losses, budget=40, num_clusters=20, sources=sources, draw=draw, allocation=0.5)
        assert read_selection(files).example_ids.equals(mine.example_ids)
        assert files.summary["stability"] is None


@pytest.mark.parametrize(
    "other", [{"more_budgets": [9]}, {"budget": {"tokens": 9}}, {"min_per_source": 1}], ids=["more", "tokens", "minimum"]
)
def test_spread_refuses_what_needs_an_order(other: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="draw=spread chooses for one number of examples"):
        SelectionConfig(**({"budget": 5, "draw": "spread"} | other))


def test_a_stratum_of_one_row_is_a_group_and_its_own_level() -> None:
    rng = np.random.default_rng(9)
    sources = ["one", *["many"] * 300]
    store = TrajectoryStore.of(Trajectories.of(rng.random((301, 2)), sources=sources), 0)
    with ThreadPoolExecutor(1):
        found = cluster_store(store, ClusteringConfig(levels=[10, 3]))
    assert found.num_clusters == 11
    assert found.topmost_strata is not None
    assert found.topmost_strata.tolist() == [0, 0, 0, 1]
