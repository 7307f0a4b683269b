"""What is learned of rows on their way in is what passes over all rows in order would find."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from s2l_ray.clustering.grouping import features_of
from s2l_ray.clustering.threads import SearchThreads
from s2l_ray.config import ClusteringConfig
from s2l_ray.examples.ids import priorities
from s2l_ray.trajectories import sorting
from s2l_ray.trajectories.arriving import LOWEST_ROWS, Arriving, content_of, lowest_of
from s2l_ray.trajectories.files import open_trajectories
from s2l_ray.trajectories.loss_columns import points_column
from s2l_ray.trajectories.store import TrajectoryStore


def table_of(num_rows: int, seed: int = 0, points: int = 3) -> pa.Table:
    rng = np.random.default_rng(seed)
    columns = {
        "example_id": pa.array([f"row-{i}" for i in rng.permutation(num_rows)]),
        "losses": points_column(rng.random((num_rows, points), dtype=np.float32)),
        "source": pa.array(rng.choice(["a", "b", "ü"], num_rows)),
        "num_response_tokens": pa.array(rng.integers(0, 99, num_rows, dtype=np.int32)),
    }
    return pa.table(columns)


def opened(table: pa.Table, folder: Path, seed: int | None = 0, cuts: tuple[int, ...] = ()) -> TrajectoryStore:
    """A store of the rows in files that are cut at `cuts`."""
    folder.mkdir()
    for part, (start, stop) in enumerate(zip((0, *cuts), (*cuts, len(table)), strict=True)):
        pq.write_table(table[start:stop], folder / f"{part}.parquet")
    with ThreadPoolExecutor(2) as pool:
        return open_trajectories(str(folder), folder / "scratch", pool, seed=seed)


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("points", [1, 4])
def test_what_rows_hold_is_the_same_number_however_they_are_ordered_and_cut(tmp_path, monkeypatch, seed, points):
    table = table_of(3_000, points=points)
    with ThreadPoolExecutor(2) as pool:
        as_it_comes = opened(table, tmp_path / "one", seed)
        in_a_pass = replace(as_it_comes, content=None).identity(pool)
        monkeypatch.setattr(sorting, "RUN_ROWS", 700)
        monkeypatch.setattr(sorting, "PIECE_ROWS", 70)
        turned = opened(table.take(pa.array(np.arange(len(table))[::-1])), tmp_path / "two", seed, (10, 1_000, 1_001))
        assert as_it_comes.identity(pool) == in_a_pass == turned.identity(pool)
        assert as_it_comes.content is not None
        assert as_it_comes.content == turned.content


@given(st.integers(0, 39), st.sampled_from(["example_id", "losses", "source", "num_response_tokens"]))
def test_any_other_value_of_any_row_is_another_content(row, column):
    table = table_of(40)
    names = {"source": ["a", "b", "ü"]}
    coded = table.set_column(2, "source", pa.array([names["source"].index(one) for one in table["source"].to_pylist()]))
    values = coded[column].to_pylist()
    values[row] = {
        "example_id": "another",
        "losses": [*(values[row] if column == "losses" else [])[::-1]],
        "source": (values[row] + 1) % 3 if column == "source" else 0,
        "num_response_tokens": 99,
    }[column]
    changed = coded.set_column(coded.schema.get_field_index(column), column, pa.array(values, coded.schema.field(column).type))
    assert content_of(changed, names) != content_of(coded, names)


def test_rows_that_swap_their_losses_are_another_content():
    table = table_of(40)
    swapped = np.arange(40)
    swapped[[3, 4]] = [4, 3]
    names: dict[str, list[str]] = {}
    changed = table.set_column(1, "losses", table["losses"].combine_chunks().take(pa.array(swapped)))
    kept = ["example_id", "losses", "num_response_tokens"]
    assert content_of(changed.select(kept), names) != content_of(table.select(kept), names)


def test_the_rows_of_lowest_priority_are_known_without_a_pass(tmp_path):
    table = table_of(2 * LOWEST_ROWS + 12_345)
    store = opened(table, tmp_path / "many", 5)
    assert store.lowest is not None
    order_N = priorities(table["example_id"], 5)
    expected = np.sort(np.argsort(order_N)[:LOWEST_ROWS])
    ids = table["example_id"].combine_chunks().take(pa.array(expected)).sort()
    assert store.lowest["example_id"].combine_chunks().equals(ids)
    config = ClusteringConfig(features="whitened", seed=5)
    with SearchThreads(2) as pool:
        (one, spectrum), (other, in_a_pass) = (
            features_of(found, config, pool) for found in (store, replace(store, lowest=None))
        )
    assert (spectrum.variances_T == in_a_pass.variances_T).all()
    assert (one.center_T == other.center_T).all()


def test_with_few_rows_all_are_of_the_lowest_priorities(tmp_path):
    store = opened(table_of(50), tmp_path / "few")
    assert store.lowest is not None
    assert store.lowest["example_id"].to_pylist() == sorted(f"row-{i}" for i in range(50))


def test_where_too_few_rows_of_low_priority_were_kept_a_pass_finds_them():
    table = table_of(LOWEST_ROWS + 100).append_column("priority", pa.array(np.arange(LOWEST_ROWS + 100, dtype=np.uint64)))
    arriving = Arriving(0, dict, len(table))
    arriving.finish(table.select(["example_id", "losses"]))
    assert lowest_of(arriving.low, len(table)) is not None
    too_many = Arriving(0, dict, 50 * len(table))  # more rows than come
    too_many.finish(table.select(["example_id", "losses"]))
    assert lowest_of(too_many.low, len(table)) is None
    assert lowest_of([], 5) is None


def test_select_takes_memory_from_one_heap_and_leaves_later_processes_theirs():
    code = (
        "import os; from s2l_ray.runtime.process import share_one_heap; share_one_heap(); import pyarrow as pa; "
        "print(pa.default_memory_pool().backend_name, os.environ.get('ARROW_DEFAULT_MEMORY_POOL'))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "ARROW_DEFAULT_MEMORY_POOL"}
    for given_pool, expected in ((None, "system None"), ("mimalloc", "mimalloc mimalloc")):
        chosen = environment if given_pool is None else environment | {"ARROW_DEFAULT_MEMORY_POOL": given_pool}
        found = subprocess.run([sys.executable, "-c", code], env=chosen, capture_output=True, text=True, check=True)
        assert found.stdout.strip() == expected


def test_a_sorted_run_keeps_none_of_its_ids_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(sorting, "RUN_ROWS", 20_000)
    table = table_of(100_000).select(["example_id"])
    num_ids_bytes, before = table.nbytes, pa.total_allocated_bytes()
    path = tmp_path / "run.arrow"
    run = sorting.Run.write(path, table.take(pa.array(np.argsort(table["example_id"].to_numpy(zero_copy_only=False)))))
    assert run.num_rows == 100_000
    assert pa.total_allocated_bytes() - before < num_ids_bytes / 20
