"""faiss, and the threads that call it. Every other file of this package takes both from here."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from s2l_ray.errors import S2LError


class _Faiss:
    """The module, imported where it is first used: k-means on GPUs does not need it."""

    def __getattr__(self, name: str) -> Any:
        try:
            import faiss
        except ModuleNotFoundError as error:
            raise S2LError(
                "faiss is not installed: pip install 's2l_ray[cpu]', or 's2l_ray[gpu]' for CUDA; not both."
            ) from error
        # Below so many numbers faiss takes a kernel that is five times slower for so few dimensions: 10,000 rows of 12, say.
        faiss.cvar.distance_compute_blas_threshold = 1
        return getattr(faiss, name)


faiss: Any = _Faiss()


class SearchThreads(ThreadPoolExecutor):
    """Threads in each of which faiss uses one (OpenMP's setting is a thread's own): as many as this process has processors."""

    def __init__(self, num_threads: int | None = None) -> None:
        if num_threads is None:
            num_threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.num_threads = num_threads
        super().__init__(num_threads, initializer=faiss.omp_set_num_threads, initargs=(1,))
