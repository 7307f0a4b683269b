"""Grouping and choosing in Ray: no row passes the driver, the bytes are those of one process, whoever dies on the way."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from s2l_ray.config import ClusteringConfig, GroupingConfig, SelectionConfig
from s2l_ray.errors import ConfigError, DataError
from s2l_ray.selection.alone import select_trajectories

NUM_ROWS = 150_000  # more than one block, and than the diagnostics' sample


def trajectories(num_rows: int = NUM_ROWS, num_points: int = 4) -> pa.Table:
    """Falls of a few kinds, in no order of ids, of three sources."""
    rng = np.random.default_rng(7)
    kinds = rng.integers(0, 12, num_rows)
    losses = rng.uniform(1, 5, (12, num_points)).astype(np.float32)[kinds]
    losses += rng.normal(0, 0.1, losses.shape).astype(np.float32)
    return pa.table(
        {
            "example_id": [f"row-{row:07d}" for row in rng.permutation(num_rows)],
            "losses": pa.FixedSizeListArray.from_arrays(pa.array(losses.ravel()), num_points),
            "source": pa.array(np.array(["c", "a", "b"])[kinds % 3]),
            "num_response_tokens": pa.array(rng.integers(1, 99, num_rows, dtype=np.int32)),
            "note": [f"n{row}" for row in range(num_rows)],
        }
    )


def write(folder: Path, table: pa.Table, cuts: list[int], row_group: int = 20_000) -> str:
    """A table as files, cut at these rows."""
    folder.mkdir()
    for part, (start, stop) in enumerate(zip([0, *cuts], [*cuts, len(table)], strict=True)):
        pq.write_table(table.slice(start, stop - start), folder / f"{part:03d}.parquet", row_group_size=row_group)
    return str(folder)


def select(
    source: str, output: Path, engine: str, num_workers: int = 2, chosen: dict[str, Any] | None = None, **clustering: Any
) -> dict[str, str]:
    """A hash of every file that `s2l select` writes, manifests apart."""
    grouping = ClusteringConfig(**{"num_clusters": 10, "num_restarts": 2} | clustering)
    machines = GroupingConfig(engine=engine, num_workers=num_workers)  # type: ignore[arg-type]
    select_trajectories(source, str(output), grouping, SelectionConfig(**{"budget": 500} | (chosen or {})), machines)
    return digests(output)


def digests(output: Path) -> dict[str, str]:
    files = [path for path in output.rglob("*") if path.is_file() and "manifest" not in path.name and ".work" not in path.parts]
    return {str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("num_workers", [1, 2])
def test_ray_gives_the_bytes_of_one_process_for_any_cut_of_the_files(tmp_path: Path, num_workers: int) -> None:
    table = trajectories()
    expected = select(write(tmp_path / "whole", table, []), tmp_path / "disk", "disk", stratify_by=None)
    cut = write(tmp_path / "cut", table, [1, 40_000, 111_111], row_group=7_000)
    assert select(cut, tmp_path / "ray", "ray", num_workers, stratify_by=None) == expected
    assert "selection/selected.parquet" in expected
    assert not (tmp_path / "ray" / ".work" / "scratch").exists()


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize(
    ("clustering", "chosen"),
    [
        ({"stratify_by": "source"}, {"budget": {"tokens": 9_000}, "min_per_source": 7}),
        ({"features": "whitened", "stratify_by": None, "training_rows": 90_000, "num_clusters": 5}, {"draw": "central"}),
        ({"levels": [12, 4], "num_clusters": 12, "stratify_by": None}, {"draw": "spread", "budget": 100}),
        ({"num_clusters": 12, "num_restarts": 1}, {"method": "high_learnability"}),
    ],
)
def test_strata_samples_levels_budgets_and_draws_are_the_same_in_ray(
    tmp_path: Path, clustering: dict[str, Any], chosen: dict[str, Any]
) -> None:
    source = write(tmp_path / "files", trajectories(), [90_000])
    places = [select(source, tmp_path / engine, engine, 2, chosen, **clustering) for engine in ("memory", "ray")]
    assert places[0] == places[1]


@pytest.mark.usefixtures("ray_session")
def test_few_distinct_trajectories_are_groups_of_their_own_in_ray_too(tmp_path: Path) -> None:
    losses = np.repeat(np.eye(4, dtype=np.float32), 35_000, axis=0)
    ids = np.random.default_rng(0).permutation(len(losses))
    source = write(tmp_path / "files", pa.table({"example_id": ids, "losses": losses.tolist()}), [70_001])
    places = [select(source, tmp_path / engine, engine) for engine in ("memory", "ray")]
    assert places[0] == places[1]


@pytest.mark.usefixtures("ray_session")
def test_what_cannot_be_used_is_said_in_the_same_words(tmp_path: Path) -> None:
    table = trajectories(3_000)
    twice = pa.concat_tables([table, table.slice(5, 1)])
    bad = table["losses"].combine_chunks().flatten().to_numpy().copy()
    bad[4 * 17] = np.nan
    no_number = table.set_column(1, "losses", pa.FixedSizeListArray.from_arrays(pa.array(bad), 4))
    shorter = pa.table({"example_id": ["one-more"], "losses": [[1.0, 2.0]], "source": ["a"]})
    for name, bad_table in {"twice": twice, "nan": no_number, "none": table.slice(0, 0)}.items():
        source = write(tmp_path / name, bad_table, [len(bad_table) // 2])
        messages = [message(source, tmp_path / f"{name}-{engine}", engine) for engine in ("memory", "ray")]
        assert messages[0] == messages[1]
    folder = write(tmp_path / "shapes", table.select(["example_id", "losses", "source"]), [1_000])
    pq.write_table(shorter, f"{folder}/003.parquet")
    assert "losses are ragged. Others have 4 values" in message(folder, tmp_path / "ragged", "ray")
    with pytest.raises(ConfigError, match=r"machines.clustering.num_workers: 99 Ray actors .* has \d+ CPUs"):
        select(write(tmp_path / "fine", table, []), tmp_path / "many", "ray", 99)


def message(source: str, output: Path, engine: str) -> str:
    with pytest.raises(DataError) as met:
        select(source, output, engine)
    return str(met.value)
