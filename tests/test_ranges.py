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
