"""Where the rows of k-means are: in memory, in a file, in Ray actors, on GPUs. Chosen by size and hardware, and logged."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from s2l_ray.clustering.actors import Actors
from s2l_ray.clustering.columns import Column, FileColumn, in_memory
from s2l_ray.clustering.gpu_rows import GpuRows
from s2l_ray.clustering.kmeans import KMeansRows
from s2l_ray.clustering.local_rows import LocalRows
from s2l_ray.clustering.threads import SearchThreads, faiss
from s2l_ray.config import GroupingConfig
from s2l_ray.errors import ConfigError
from s2l_ray.storage.places import Storage
from s2l_ray.trajectories.store import BLOCK_ROWS

# Columns of small strata stay in memory up to so much: a file each would be slower.
_SMALL_BYTES = 128 * 2**20


class Engine:
    """Makes the columns and the `KMeansRows` of a clustering, and cleans up after it.

    `kind`: `memory`, `disk`, `ray` or `gpu`; all but `memory` need the folder `scratch`.
    """

    def __init__(self, kind: str, pool: SearchThreads, scratch: Path | None = None, num_workers: int = 0) -> None:
        self.kind, self.pool = kind, pool
        self._scratch, self._num_workers = scratch, num_workers
        self._columns: list[Path] = []
        self._held = 0
        self._actors: Actors | None = None
        self.shared: Storage | None = None
        """Of `ray`: where files lie that all workers see."""

    @classmethod
    def choose(
        cls,
        config: GroupingConfig,
        pool: SearchThreads,
        scratch: Path,
        num_rows: int,
        width: int,
        shared: Storage | None = None,
    ) -> Engine:
        """The engine for so many rows of so many numbers: Ray's actors for rows in the place `shared` that all workers see; for
        rows in this process a GPU where there is one, else memory, else a file.

        Raises ConfigError where a GPU is asked for and there is none.
        """
        if shared is not None:
            engine = cls("ray", pool, scratch, config.num_workers)
            engine.shared = shared
            return engine
        kind = "auto" if config.engine == "ray" else config.engine  # rows in this process stay here
        num_gpus = faiss.get_num_gpus() if hasattr(faiss, "get_num_gpus") else 0
        fits = 4 * num_rows * width <= config.memory_gb * 1e9
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
        threads = self.pool.num_threads
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

    def rows(self, features: Column, width: int) -> KMeansRows:
        """The rows of a column of features, N values of `width` each, ready for `lloyd`."""
        if self.kind == "gpu":
            return GpuRows(features, width, [f"cuda:{number}" for number in range(faiss.get_num_gpus())])
        return LocalRows(features, width, self.pool, self.new_column)

    @property
    def actors(self) -> Actors:
        """The actors, which hold a part of every stratum's rows."""
        if self._actors is None:
            self._actors = Actors(self._num_workers)
        return self._actors

    @property
    def recovery_seconds(self) -> list[float]:
        """From each loss of an actor until another had its rows and answered."""
        return [] if self._actors is None else self._actors.recovery_seconds

    def end_actors(self) -> None:
        """End the actors, if there are any: the room is free for tasks."""
        if self._actors is not None:
            self._actors.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the actors and remove the files."""
        self.end_actors()
        for path in self._columns:
            path.unlink(missing_ok=True)


def works_in_ray(config: GroupingConfig, num_bytes: Callable[[], int]) -> bool:
    """Whether losses of so many bytes are grouped in Ray: where that is asked for, and under `auto` where this process is
    connected to a Ray of several nodes, or to one whose nodes would each get more than `memory_gb`.

    Not where `auto` finds a GPU here: its memory is that of many actors.
    """
    if config.engine != "auto" or "ray" not in sys.modules:
        return config.engine == "ray"
    import ray

    if not ray.is_initialized() or (hasattr(faiss, "get_num_gpus") and faiss.get_num_gpus()):
        return False
    num_nodes = sum(node["Alive"] for node in ray.nodes())
    return bool(num_nodes > 1 or num_bytes() > config.memory_gb * 1e9 * num_nodes)
