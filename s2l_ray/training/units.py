"""Units of work on a Ray Data actor pool: each leaves one file, whole or absent, and is skipped where that file exists.

So any number of workers may die at any moment: the same command does what is missing, and doing a unit twice changes
nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from s2l_ray import errors
from s2l_ray.artifacts import Storage
from s2l_ray.examples import quiet_ray_data
from s2l_ray.progress import track
from s2l_ray.training.fit import Workers, quiet_libraries


@dataclass(frozen=True)
class Unit:
    """One part of examples under one model or group of models."""

    group: str
    part: str

    @property
    def path(self) -> str:
        """Its file in the stage's scratch directory."""
        return f"{self.group}/{self.part}"


class UnitWorker(ABC):
    """A worker of the pool. It keeps the models of one group in memory, so units come group by group."""

    def __init__(self, job: Any, work: Storage, workers: Workers) -> None:
        import torch

        quiet_libraries()
        torch.set_num_threads(workers.cpus_per_worker)
        self.job, self._work = job, work
        self.device = workers.device
        self._group: str | None = None
        self._models: list[Any] = []

    @abstractmethod
    def load(self, group: str) -> list[Any]:
        """The models of a group."""

    @abstractmethod
    def work_on(self, part: str, models: list[Any]) -> bytes:
        """A unit's file."""

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Do one unit, given as a batch of one row. What the user must mend comes back as a row, not as a crash."""
        unit = Unit(str(batch["group"][0]), str(batch["part"][0]))
        try:
            if unit.group != self._group:
                self._models = []  # free the memory before more is taken
                self._models, self._group = [model.to(self.device).eval() for model in self.load(unit.group)], unit.group
            data = self.work_on(unit.part, self._models)
        except errors.S2LError as error:
            return {"error": [type(error).__name__], "message": [str(error)]}
        self._work.write(unit.path, data)
        return {"error": [""], "message": [""]}


def do_units(stage: str, units: Sequence[Unit], worker: type[UnitWorker], job: Any, work: Storage, workers: Workers) -> None:
    """Do the units that have no file yet.

    Raises the S2LError that a worker met.
    """
    import ray.data
    from ray.data import ActorPoolStrategy

    missing = [unit for unit in units if not work.exists(unit.path)]
    with track(stage, len(units), "unit") as progress:
        progress.at(len(units) - len(missing))
        if not missing:
            return
        rows = ray.data.from_items([asdict(unit) for unit in missing], override_num_blocks=len(missing))
        done = rows.map_batches(
            worker,
            fn_constructor_args=(job, work, workers),
            batch_size=1,
            compute=ActorPoolStrategy(size=min(workers.num_workers, len(missing))),
            num_cpus=workers.cpus_per_worker,
            num_gpus=workers.gpus_per_worker or None,
        )
        with quiet_ray_data():
            for row in done.iter_rows():
                if row["error"]:
                    raise getattr(errors, row["error"])(row["message"])
                progress.advance()
