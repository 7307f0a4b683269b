"""Piece 4: k-means on the GPU with torch alone, K = 100, on 10M and 100M trajectories of 12 points.

Every row is with its nearest centroid (inertia to 1e-6), and after the same iterations from the same start the inertia is
within 1e-4 of the CPU's, in float64. The time of an iteration is set beside what reading the rows and labels once takes at the
GPU's copying rate.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import numpy as np
import torch
from measuring import Cell, Kit, require, seconds_of, use_package

use_package()
from s2l_ray.clustering.columns import MemoryColumn  # noqa: E402
from s2l_ray.clustering.features import on_grid  # noqa: E402
from s2l_ray.clustering.gpu_rows import GpuRows  # noqa: E402
from s2l_ray.clustering.kmeans import lloyd  # noqa: E402

POINTS, GROUPS, ITERATIONS = 12, 100, 5
WITHIN, SAME = 1e-4, 1e-6


def falls(rows: int) -> np.ndarray:
    """Losses that fall in a few hundred ways, (rows, POINTS) float32 on the grid of features."""
    rng = np.random.default_rng(0)
    kinds = np.linspace(8, 2, POINTS) * rng.uniform(0.3, 1.2, (300, 1)) + rng.normal(0, 0.5, (300, POINTS))
    made = np.empty((rows, POINTS), np.float32)
    for start in range(0, rows, 1_000_000):
        some = made[start : start + 1_000_000]
        noise = rng.standard_normal(some.shape, np.float32)
        some[:] = on_grid(kinds[rng.integers(0, len(kinds), len(some))].astype(np.float32) + np.float32(0.3) * noise)
    return made


def by_the_book(rows: np.ndarray, centroids: np.ndarray, iterations: int) -> float:
    """The inertia after so many iterations of Lloyd on the CPU, in float64."""
    centers, inertia = torch.from_numpy(centroids).double(), 0.0
    for _ in range(iterations + 1):
        sums, sizes, inertia = torch.zeros_like(centers), torch.zeros(len(centers)).double(), 0.0
        for start in range(0, len(rows), 500_000):
            some = torch.from_numpy(rows[start : start + 500_000]).double()
            squares = (some**2).sum(1)[:, None] - 2 * some @ centers.T + (centers**2).sum(1)
            nearest = squares.min(1)
            inertia += float(nearest.values.sum())
            sums.index_add_(0, nearest.indices, some)
            sizes += torch.bincount(nearest.indices, minlength=len(centers))
        centers = torch.where(sizes[:, None] > 0, sums / sizes.clamp(min=1)[:, None], centers).float().double()
    return inertia


def grouped(kit: Kit, rows: int, is_checked: bool) -> dict[str, Any]:
    """Inertia, seconds per iteration, share of the copying rate."""
    features = falls(rows)
    start = features[np.random.default_rng(1).choice(rows, GROUPS, replace=False)].copy()
    found: dict[str, Any] = {}
    begun = time.perf_counter()
    held = GpuRows(MemoryColumn(features), POINTS, [str(kit.device)])
    found["to_device_seconds"] = time.perf_counter() - begun
    if is_checked:
        fit = lloyd(held, start, ITERATIONS)
        nearest = by_the_book(features, fit.centroids_KF, 0)
        require(abs(fit.inertia / nearest - 1) <= SAME, f"inertia {fit.inertia:.8g}, to the nearest centroids {nearest:.8g}")
        theirs = by_the_book(features, start, ITERATIONS)
        # Of few rows one that lies between two centroids moves them, and the two runs apart.
        within = kit.size(WITHIN, 0.01)
        require(abs(fit.inertia / theirs - 1) <= within, f"inertia {fit.inertia:.8g}, on the CPU {theirs:.8g}")
        found |= {"inertia": fit.inertia, "over_cpu": fit.inertia / theirs, "over_nearest": fit.inertia / nearest}
    seconds = seconds_of(lambda: held.assign(start, "nearest"), kit.device, kit.size(5, 2))
    return found | {"seconds_per_iteration": seconds} | against_copying(rows, seconds, kit)


def against_copying(rows: int, seconds: float, kit: Kit) -> dict[str, float]:
    """What reading features and labels once, and writing the labels, takes at the device's copying rate, over `seconds`."""
    source = torch.zeros(kit.size(2**30, 2**22), dtype=torch.uint8, device=kit.device)
    target = torch.empty_like(source)
    rate = 2 * len(source) / seconds_of(lambda: target.copy_(source), kit.device)
    least = rows * (4 * POINTS + 2 * 8) / rate
    return {"bytes_per_second": rate, "share_of_copying_rate": least / seconds}


def cells(kit: Kit) -> dict[str, Cell]:
    """The piece's cells."""
    return {
        "10M": partial(grouped, kit, kit.size(10_000_000, 20_000), True),
        "100M": partial(grouped, kit, kit.size(100_000_000, 20_000), False),
    }
