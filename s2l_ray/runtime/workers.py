"""How many workers a stage has, and of which size: the numbers of a `machines` section, `auto` resolved."""

from __future__ import annotations

import dataclasses

from s2l_ray.config import WorkerConfig
from s2l_ray.runtime.room import await_room


@dataclasses.dataclass(frozen=True)
class Workers:
    """Resolved numbers of a `machines` section."""

    num_workers: int
    """The most there may be."""

    cpus_per_worker: int
    gpus_per_worker: float
    min_workers: int
    """The fewest that are waited for."""

    wait_minutes: float = 15.0

    @classmethod
    def resolve(cls, config: WorkerConfig, *, one_per_cpu: bool, at_most: int | None = None) -> Workers:
        """Numbers for `auto` from what the connected Ray has: one worker per GPU; without GPUs one per CPU or one for all.

        Bounds that are given do not depend on what there is now: machines come and go. `at_most`: what `auto` stays within,
        the examples of a batch.
        """
        import ray

        resources = ray.cluster_resources()
        cpus, gpus = max(1, int(resources.get("CPU", 1))), int(resources.get("GPU", 0))
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and (not gpus or node["Resources"].get("GPU"))]
        gpus_per_worker = (1.0 if gpus else 0.0) if config.gpus_per_worker == "auto" else float(config.gpus_per_worker)
        if config.num_workers == "auto":
            per_worker = 1 if config.cpus_per_worker == "auto" else config.cpus_per_worker
            most = int(gpus / gpus_per_worker) if gpus_per_worker else cpus // per_worker if one_per_cpu else 1
            low = high = max(1, most if at_most is None else min(most, at_most))
        else:
            low, high = config.num_workers if isinstance(config.num_workers, list) else [config.num_workers] * 2
        if config.cpus_per_worker != "auto":
            cpus_per_worker = config.cpus_per_worker
        elif one_per_cpu:
            cpus_per_worker = 1
        else:
            of_a_node = max([1, *(int(node.get("CPU", 0)) for node in nodes)])  # a worker is on one
            gpus_of_a_node = max((node.get("GPU", 0) for node in nodes), default=0)
            on_a_node = min(high, int(gpus_of_a_node / gpus_per_worker)) if gpus_per_worker and gpus else high
            cpus_per_worker = max(1, of_a_node // max(1, on_a_node))
        return cls(high, cpus_per_worker, gpus_per_worker, low, config.wait_minutes)

    @property
    def is_elastic(self) -> bool:
        """Whether their number may change as machines come and go."""
        return self.min_workers < self.num_workers

    @property
    def device(self) -> str:
        """Where the workers compute: on a GPU only if they were given one."""
        return "cuda" if self.gpus_per_worker else "cpu"

    @property
    def resources(self) -> dict[str, float]:
        """What Ray reserves for one of them."""
        return {"CPU": self.cpus_per_worker} | ({"GPU": self.gpus_per_worker} if self.gpus_per_worker else {})

    def __str__(self) -> str:
        number = f"{self.min_workers} to {self.num_workers}" if self.is_elastic else f"{self.num_workers}"
        return f"{number} workers"

    def await_room(self, stage: str) -> None:
        """Wait until the connected Ray has room for the fewest of them. Raises ConfigError."""
        await_room(stage, self.resources, self.min_workers, self.wait_minutes)
