"""The rows of k-means on GPUs, by torch alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from s2l_ray.clustering.bounds import Search
from s2l_ray.clustering.columns import Column, Floats, Ints
from s2l_ray.clustering.kmeans import Step, squared_distances
from s2l_ray.trajectories.store import BLOCK_ROWS


class GpuRows:
    """`KMeansRows` on one or several GPUs, each with contiguous blocks. All rows are searched in every pass: there it costs
    little, and no bounds are kept.

    Labels may differ from a CPU's where two centroids are equally near to within the rounding of a float32; sums are as
    exact, so that inertia agrees.
    """

    def __init__(self, features: Column, width: int, devices: list[str]) -> None:
        import torch

        self._torch = torch
        self.shape = (len(features), width)
        self._devices = [torch.device(device) for device in devices]
        starts = list(range(0, len(features), BLOCK_ROWS))
        each = math.ceil(len(starts) / len(devices))
        self._blocks = [
            torch.from_numpy(np.ascontiguousarray(features.read(start, start + BLOCK_ROWS).reshape(-1, width))).to(
                self._devices[number // each], non_blocking=True
            )
            for number, start in enumerate(starts)
        ]
        self._labels = [torch.full((len(block),), -1, dtype=torch.int64, device=block.device) for block in self._blocks]
        self._distances: list[Floats] = []
        self._to_nearest: list[NDArray[np.float64]] = []

    def centroids_moved(self, drift_K: NDArray[np.float64]) -> int:  # noqa: ARG002
        return self.shape[0]

    def assign(self, centroids_KF: Floats, search: Search) -> Step:  # noqa: ARG002
        torch, (num_clusters, width) = self._torch, centroids_KF.shape
        steps = []
        for number, block in enumerate(self._blocks):
            new = self._nearest(block, centroids_KF)
            old, self._labels[number] = self._labels[number], new
            sums = torch.zeros((num_clusters + 1, width), dtype=torch.float64, device=block.device)
            sizes = torch.zeros(num_clusters + 1, dtype=torch.int64, device=block.device)
            changed = torch.nonzero(new != old).flatten()
            rows, ones = block[changed].double(), torch.ones(len(changed), dtype=torch.int64, device=block.device)
            # Row -1 (no group yet) is the last. Atomic additions come in any order, and are exact on the grid.
            sums.index_add_(0, new[changed], rows).index_add_(0, old[changed] % (num_clusters + 1), -rows)
            sizes.index_add_(0, new[changed], ones).index_add_(0, old[changed] % (num_clusters + 1), -ones)
            steps.append((sums[:num_clusters], sizes[:num_clusters], changed))
        # Only now is there anything to wait for: the devices work side by side.
        radii_K = np.zeros(num_clusters)  # there are no bounds that they would decide
        return Step.sum([Step(sums.cpu().numpy(), sizes.cpu().numpy(), len(rows), radii_K) for sums, sizes, rows in steps])

    def _nearest(self, block: Any, centroids_KF: Floats) -> Any:
        """Labels of a block: the lowest |c|^2 - 2xc, a matrix of rows x centroids that stays in the GPU's cache."""
        torch = self._torch
        centroids = torch.from_numpy(centroids_KF).to(block.device)
        return torch.addmm((centroids**2).sum(1), block, centroids.T, alpha=-2).argmin(1)

    def farthest(self, centroids_KF: Floats, seed_F: Floats | None) -> tuple[float, Floats]:
        # Rare, so that it may go through the host: all of it is there for that while.
        blocks = list(self._on_host())
        if seed_F is None:
            self._to_nearest = [squared_distances(*values, centroids_KF) for values in blocks]
        else:
            seed = seed_F.astype(np.float64)
            self._to_nearest = [
                np.minimum(squares_M, ((features_MF - seed) ** 2).sum(axis=1))
                for squares_M, (features_MF, _) in zip(self._to_nearest, blocks, strict=True)
            ]
        number = int(np.argmax([squares_M.max() for squares_M in self._to_nearest]))
        row = int(np.argmax(self._to_nearest[number]))
        return float(self._to_nearest[number][row]), blocks[number][0][row]

    def _on_host(self) -> Iterator[tuple[Floats, Ints]]:
        """Features and labels, block by block."""
        for block, labels in zip(self._blocks, self._labels, strict=True):
            yield block.cpu().numpy(), labels.cpu().numpy().astype(np.int32)

    def finish(self, centroids_KF: Floats) -> float:
        found = [squared_distances(*values, centroids_KF) for values in self._on_host()]
        self._distances = [np.sqrt(squares_M).astype(np.float32) for squares_M in found]
        return math.fsum(float(squares_M.sum()) for squares_M in found)

    def results(self) -> Iterator[tuple[Ints, Floats]]:
        for labels, distances_M in zip(self._labels, self._distances, strict=True):
            yield labels.cpu().numpy().astype(np.int32), distances_M
