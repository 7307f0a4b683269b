"""Made-up trajectories in Parquet files: falls of a few hundred kinds, or of a continuum of kinds."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

PART_ROWS, NUM_KINDS = 1_000_000, 300


def scattered(numbers: np.ndarray, num_rows: int) -> np.ndarray:
    """A pseudo-random bijection of 0..num_rows-1 without a table: mixed in the next power of two until inside."""
    bits = max(2, (num_rows - 1).bit_length())
    found, outside = numbers.astype(np.uint64), np.ones(len(numbers), bool)
    while outside.any():
        for odd in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB):
            mixed = found[outside] * np.uint64(odd) & np.uint64(2**bits - 1)
            found[outside] = mixed ^ mixed >> np.uint64(bits // 2)
        outside = found >= num_rows
    return found


def names(numbers: np.ndarray) -> pa.Array:
    """`example-%010d` of each number."""
    return pc.binary_join_element_wise("example-", pc.utf8_lpad(pa.array(numbers).cast(pa.string()), 10, "0"), "")


def generate(data: str, rows: int, points: int, smooth: bool, in_order: bool) -> dict[str, Any]:
    """Write the missing parts of 1M rows each: falls of a few hundred kinds, or of a continuum of kinds if `smooth`."""
    Path(data).mkdir(parents=True, exist_ok=True)
    planted, curve = np.random.default_rng(0), np.linspace(0, 1, points, dtype=np.float32)
    levels_K, falls_K = planted.uniform(2, 8, NUM_KINDS), planted.uniform(0.1, 0.9, NUM_KINDS)
    for part, first in enumerate(range(0, rows, PART_ROWS)):
        path = Path(data, f"part-{part:05d}.parquet")
        if path.exists():
            continue
        numbers = np.arange(first, min(first + PART_ROWS, rows))
        rng, size = np.random.default_rng([1, part]), len(numbers)
        kinds = rng.integers(0, NUM_KINDS, size)
        levels, falls = (rng.gamma(4, 1, size), rng.beta(2, 3, size)) if smooth else (levels_K[kinds], falls_K[kinds])
        losses = np.float32(0.15 if smooth else 0.1) * rng.standard_normal((size, points), dtype=np.float32)
        losses += levels.astype(np.float32)[:, None] * (1 - falls.astype(np.float32)[:, None] * curve)
        columns = {
            "example_id": names(numbers if in_order else scattered(numbers, rows)),
            "losses": pa.FixedSizeListArray.from_arrays(pa.array(np.maximum(losses, 0).ravel()), points),
            "source": pa.array(np.array(["a", "b", "c"])[kinds % 3]),
            "num_response_tokens": pa.array(rng.integers(10, 500, size, dtype=np.int32)),
        }
        pq.write_table(pa.table(columns), path.with_name(f".{path.name}"), row_group_size=100_000)
        path.with_name(f".{path.name}").rename(path)
    os.sync()  # else the first run shares the disk with the writing
    return {}


def load(data: str, rows: int, points: int) -> np.ndarray:
    """All losses in one array, shape (N, T), in the order of the files."""
    losses = np.empty((rows, points), np.float32)
    for part, path in enumerate(sorted(Path(data).glob("part-*.parquet"))):
        column = pq.read_table(path, columns=["losses"])["losses"].combine_chunks()
        losses[part * PART_ROWS :][:PART_ROWS] = column.flatten().to_numpy().reshape(-1, points)
    return losses
