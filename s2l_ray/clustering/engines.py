"""Where the rows of k-means are: in memory, in a file, in Ray actors, on GPUs. Chosen by size and hardware, and said."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from s2l_ray.clustering.kmeans import (
    BLOCK_ROWS,
    Column,
    FileColumn,
    Floats,
    Ints,
    LocalRows,
    MemoryColumn,
    Rows,
    Search,
    Step,
    in_memory,
    single_threads,
    squared_distances,
)
from s2l_ray.config import GroupingConfig
from s2l_ray.errors import ConfigError

# Columns of small strata stay in memory up to so much: a file each would be slower.
_SMALL_BYTES = 128 * 2**20


class Engine:
    """Makes the columns and the `Rows` of a clustering."""

    def __init__(self, kind: str, pool: ThreadPoolExecutor, scratch: Path | None = None, num_workers: int = 0) -> None:
        self.kind, self.pool = kind, pool
        self._scratch, self._num_workers = scratch, num_workers
        self._columns: list[Path] = []
        self._held = 0
        self._actors: list[Any] = []

    @classmethod
    def choose(cls, config: GroupingConfig, pool: ThreadPoolExecutor, scratch: Path, num_rows: int, num_points: int) -> Engine:
        """The engine for so many trajectories: a GPU where there is one, else memory, else a file.

        Raises ConfigError where a GPU is asked for and there is none.
        """
        kind = config.engine
        num_gpus = faiss.get_num_gpus() if hasattr(faiss, "get_num_gpus") else 0
        fits = 4 * num_rows * num_points <= config.memory_gb * 1e9
        if kind == "auto":
            kind = "gpu" if num_gpus else "memory" if fits else "disk"
        if kind == "gpu" and not num_gpus:
            raise ConfigError(
                "machines.clustering.engine=gpu: faiss sees no GPU here. Install 's2l_ray[gpu]' on a machine with one, or "
                "take auto, memory, disk or ray."
            )
        # What is on its way to actors or GPUs waits in a file: they hold the rows, this process does not.
        return cls(kind, pool, None if kind == "memory" else scratch, config.num_workers)

    def describe(self) -> str:
        """In a few words, for logs and manifests."""
        threads = self.pool._max_workers
        return {
            "memory": f"in memory, {threads} threads",
            "disk": f"from disk, {threads} threads",
            "ray": f"in {self._num_workers} Ray actors",
            "gpu": f"on {faiss.get_num_gpus()} GPUs" if self.kind == "gpu" else "",
        }[self.kind]

    def new_column(self, num_rows: int, width: int, dtype: Any) -> Column:
        """A column of zeros where this engine keeps them."""
        num_bytes = num_rows * width * np.dtype(dtype).itemsize
        is_small = num_rows <= BLOCK_ROWS and self._held + num_bytes <= _SMALL_BYTES
        if self._scratch is None or is_small:
            self._held += num_bytes
            return in_memory(num_rows, width, dtype)
        path = self._scratch / f"column-{len(self._columns):05d}"
        self._columns.append(path)
        return FileColumn(path, num_rows, width, dtype)

    def rows(self, features: Column, width: int) -> Rows:
        """The rows of a column of features, ready for `lloyd`."""
        if len(features) > BLOCK_ROWS and self.kind == "ray":
            return RayRows(features, width, self._workers())
        if self.kind == "gpu":
            return GpuRows(features, width, list(range(faiss.get_num_gpus())))
        return LocalRows(features, width, self.pool, self.new_column)

    def _workers(self) -> list[Any]:
        """The actors, started once; each holds a part of every stratum's rows."""
        import ray

        if not self._actors:
            num_cpus = int(ray.cluster_resources().get("CPU", 0))
            if num_cpus < self._num_workers:
                raise ConfigError(
                    f"machines.clustering.num_workers: {self._num_workers} Ray actors of one CPU each, but this Ray has "
                    f"{num_cpus} CPUs. Set it to {num_cpus} or less, or start more nodes first."
                )
            actor = ray.remote(num_cpus=1)(_Worker)
            self._actors = [actor.remote() for _ in range(self._num_workers)]
        return self._actors

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let actors and files go."""
        if self._actors:
            import ray

            for actor in self._actors:
                with contextlib.suppress(ray.exceptions.RayError):
                    ray.kill(actor)
        for path in self._columns:
            path.unlink(missing_ok=True)


# --- Ray actors ----------------------------------------------------------------------------------------------------


class _Worker:
    """Holds contiguous blocks of rows of one or several k-means, in its own memory."""

    def __init__(self) -> None:
        self._pool = single_threads(1)
        self._waiting: dict[str, list[Floats]] = {}
        self._rows: dict[str, LocalRows] = {}

    def add(self, name: str, features: Floats) -> None:
        self._waiting.setdefault(name, []).append(features)

    def ready(self, name: str) -> None:
        features = np.concatenate(self._waiting.pop(name))
        self._rows[name] = LocalRows(MemoryColumn(features), features.shape[1], self._pool)

    def call(self, name: str, method: str, *arguments: Any) -> Any:
        return getattr(self._rows[name], method)(*arguments)

    def block(self, name: str, number: int) -> tuple[Ints, Floats] | None:
        return self._rows[name].block(number)


class RayRows:
    """Rows in Ray actors: each holds contiguous blocks, and only centroids and sums travel."""

    _names = itertools.count()

    def __init__(self, features: Column, width: int, actors: list[Any]) -> None:
        import ray

        self.shape = (len(features), width)
        self._name = f"rows-{next(self._names)}"
        starts = range(0, len(features), BLOCK_ROWS)
        each = math.ceil(len(starts) / len(actors))
        self._actors = actors[: math.ceil(len(starts) / each)]
        waiting: list[Any] = []
        for number, start in enumerate(starts):
            block = features.read(start, start + BLOCK_ROWS).reshape(-1, width)
            waiting.append(self._actors[number // each].add.remote(self._name, block))
            if len(waiting) > 2 * len(actors):
                ray.get(waiting.pop(0))
        ray.get(waiting)
        ray.get([actor.ready.remote(self._name) for actor in self._actors])

    def unsettled(self, moved_K: NDArray[np.float64]) -> int:
        return sum(self._call("unsettled", moved_K))

    def assign(self, centroids_KF: Floats, search: Search) -> Step:
        return Step.sum(self._call("assign", centroids_KF, search))

    def farthest(self, centroids_KF: Floats, seed_F: Floats | None) -> tuple[float, Floats]:
        found: list[tuple[float, Floats]] = self._call("farthest", centroids_KF, seed_F)
        return max(found, key=lambda one: one[0])

    def finish(self, centroids_KF: Floats) -> float:
        return math.fsum(itertools.chain(*self._call("finish_blocks", centroids_KF)))

    def results(self) -> Iterator[tuple[Ints, Floats]]:
        import ray

        for actor in self._actors:
            for number in itertools.count():
                block = ray.get(actor.block.remote(self._name, number))
                if block is None:
                    break
                yield block

    def _call(self, method: str, *arguments: Any) -> list[Any]:
        import ray

        return list(ray.get([actor.call.remote(self._name, method, *arguments) for actor in self._actors]))


# --- GPUs ----------------------------------------------------------------------------------------------------------


@functools.cache
def _gpu_resources(device: int) -> Any:  # noqa: ARG001 - one for each device
    """faiss's scratch memory on a GPU, 1.5 GB: once, not for every stratum."""
    return faiss.StandardGpuResources()


class GpuRows:
    """Rows on one or several GPUs, each with contiguous blocks. All rows are searched in every pass: there it costs little.

    Labels may differ from a CPU's where two centroids are equally near to within the rounding of a float32; sums are as
    exact, so that inertia agrees.
    """

    def __init__(self, features: Column, width: int, devices: list[int]) -> None:
        import torch

        self._torch = torch
        self.shape = (len(features), width)
        self._devices = [torch.device("cuda", device) for device in devices]
        self._resources = {device: _gpu_resources(device) for device in devices}
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
        self._far: list[NDArray[np.float64]] = []

    def unsettled(self, moved_K: NDArray[np.float64]) -> int:  # noqa: ARG002 - no bounds are kept
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
        return Step.sum([Step(sums.cpu().numpy(), sizes.cpu().numpy(), len(changed)) for sums, sizes, changed in steps])

    def _nearest(self, block: Any, centroids_KF: Floats) -> Any:
        """Labels of a block: by faiss on its GPU."""
        import faiss.contrib.torch_utils

        centroids = self._torch.from_numpy(centroids_KF).to(block.device)
        _, labels = faiss.knn_gpu(self._resources[block.device.index], block, centroids, 1, device=block.device.index)
        return labels.flatten()

    def farthest(self, centroids_KF: Floats, seed_F: Floats | None) -> tuple[float, Floats]:
        # Rare, so that it may go through the host: all of it is there for that while.
        blocks = list(self._on_host())
        if seed_F is None:
            self._far = [squared_distances(*values, centroids_KF) for values in blocks]
        else:
            seed = seed_F.astype(np.float64)
            self._far = [
                np.minimum(far, ((features - seed) ** 2).sum(axis=1))
                for far, (features, _) in zip(self._far, blocks, strict=True)
            ]
        number = int(np.argmax([far.max() for far in self._far]))
        row = int(np.argmax(self._far[number]))
        return float(self._far[number][row]), blocks[number][0][row]

    def _on_host(self) -> Iterator[tuple[Floats, Ints]]:
        """Features and labels, block by block."""
        for block, labels in zip(self._blocks, self._labels, strict=True):
            yield block.cpu().numpy(), labels.cpu().numpy().astype(np.int32)

    def finish(self, centroids_KF: Floats) -> float:
        found = [squared_distances(*values, centroids_KF) for values in self._on_host()]
        self._distances = [np.sqrt(squares).astype(np.float32) for squares in found]
        return math.fsum(float(squares.sum()) for squares in found)

    def results(self) -> Iterator[tuple[Ints, Floats]]:
        for labels, distances in zip(self._labels, self._distances, strict=True):
            yield labels.cpu().numpy().astype(np.int32), distances
