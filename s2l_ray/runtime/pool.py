"""Units of work on a Ray Data actor pool: each leaves one file, whole or absent, and is skipped where that file exists.

A unit is one part of examples under one model. A task is a part under all models that a worker keeps in memory together, so
that the part is read once for them. Any number of workers may die at any moment: the same command does what is missing,
and doing a unit twice changes nothing.
"""

from __future__ import annotations

import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from s2l_ray import errors
from s2l_ray.progress import get_log, track
from s2l_ray.runtime.data import quiet_ray_data
from s2l_ray.runtime.metrics import count
from s2l_ray.runtime.process import keep_freed_memory, quiet_libraries
from s2l_ray.runtime.room import await_room
from s2l_ray.runtime.workers import Workers
from s2l_ray.storage.places import Storage

PAUSES = (2.0, 10.0, 30.0)
"""Seconds after which a task is tried again where the storage did not answer."""


@dataclass(frozen=True)
class Unit:
    """One part of examples under one model."""

    model: str
    part: str

    @property
    def path(self) -> str:
        """Its file in the scratch directory."""
        return f"{self.model}/{self.part}"


@dataclass(frozen=True)
class Task:
    """A part under several models."""

    part: str
    models: tuple[str, ...]


def tasks(units: Sequence[Unit], work: Storage, together: int) -> list[Task]:
    """The units that have no file yet, by blocks of `together` models and within a block part by part.

    The blocks do not depend on what is missing, so a worker that takes one task after another keeps its models.
    """
    models, parts = (list(dict.fromkeys(values)) for values in ([u.model for u in units], [u.part for u in units]))
    done = {model: set(work.names(model)) for model in models}
    wanted = set(units)
    found = []
    for block in (models[start : start + together] for start in range(0, len(models), together)):
        for part in parts:
            missing = tuple(model for model in block if Unit(model, part) in wanted and part not in done[model])
            found += [Task(part, missing)] if missing else []
    return found


@dataclass
class Throughput:
    """What the workers have processed, and how fast."""

    examples: int = 0
    """Once for each model."""

    tokens: int = 0
    flops: float = 0.0
    """Floating-point operations."""

    seconds: float = 0.0
    """Of all workers together."""

    matmul_flops_per_second: float = 0.0
    """What a worker reaches in a large matrix product."""

    note: str = ""
    """Something that the user should know; the driver logs it once."""

    @property
    def utilization(self) -> float:
        """Model FLOPs utilization (MFU) while the workers were at work, of what a matrix product reaches; 0 if not measured."""
        measured = self.seconds and self.matmul_flops_per_second
        return self.flops / self.seconds / self.matmul_flops_per_second if measured else 0.0

    def add(self, examples: int, tokens: int, flops: float, seconds: float, matmul_flops_per_second: float) -> None:
        """Count what one worker has done in so many seconds."""
        self.examples += examples
        self.tokens += tokens
        self.flops += flops
        self.seconds += seconds
        self.matmul_flops_per_second = matmul_flops_per_second


class UnitWorker(ABC):
    """A worker of the pool; it keeps the models of its last tasks in memory, `together` at most."""

    def __init__(self, job: Any, work: Storage, workers: Workers, together: int) -> None:
        import torch

        quiet_libraries()
        keep_freed_memory()
        torch.set_num_threads(workers.cpus_per_worker)
        self.job, self._work, self._together = job, work, together
        self.device = torch.device(workers.device)
        self.throughput = Throughput()
        self._models: dict[str, Any] = {}

    @abstractmethod
    def load(self, model: str) -> Any:
        """A model by its name."""

    @abstractmethod
    def work_on(self, part: str, models: Mapping[str, Any]) -> Iterator[tuple[str, bytes]]:
        """For every model its name and the unit's file, each as soon as it is there."""

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Do one task, given as a batch of one row. What the user must fix comes back as a row, not as a crash."""
        for pause in (*PAUSES, None):
            error = self._do(str(batch["part"][0]), str(batch["models"][0]).split())
            if pause is None or not (isinstance(error, errors.StorageError) and error.is_transient):
                break
            time.sleep(pause)
        result = {"error": type(error).__name__ if error else "", "message": str(error or ""), "units": int(batch["units"][0])}
        return {name: [value] for name, value in (result | vars(self.throughput)).items()}

    def _do(self, part: str, names: list[str]) -> errors.S2LError | None:
        """Write the file of each unit; returns what the user must fix, if anything."""
        self.throughput = Throughput()
        try:
            for model, data in self.work_on(part, self._loaded(names)):
                self._work.write(Unit(model, part).path, data)
        except Exception as error:
            mistake = errors.cause_of(error)
            if mistake is None:
                raise
            return mistake
        return None

    def _loaded(self, names: list[str]) -> dict[str, Any]:
        missing = [name for name in names if name not in self._models]
        if len(self._models) + len(missing) > self._together:  # free the memory before more is taken
            self._models = {name: model for name, model in self._models.items() if name in names}
        for name in missing:
            model = self.load(name)
            is_dispatched = hasattr(model, "hf_device_map")  # by accelerate, over several devices
            self._models[name] = (model if is_dispatched else model.to(self.device)).eval()
        return {name: self._models[name] for name in names}


def do_units(
    stage: str,
    units: Sequence[Unit],
    worker: type[UnitWorker],
    job: Any,
    work: Storage,
    workers: Workers,
    *,
    together: int = 1,
    stop: Callable[[], bool] = lambda: False,
    show: bool = True,
) -> Throughput:
    """Do the units that have no file yet, with `together` models at a time in a worker's memory.

    Once `stop()` is true no more are begun. `show`: whether to wait for machines and to show how far it is. Raises the
    S2LError that a worker met.
    """
    missing, throughput = tasks(units, work, together), Throughput()
    num_left = sum(len(task.models) for task in missing)
    bar = track(stage, len(units), "unit", done=len(units) - num_left) if show else contextlib.nullcontext()
    with quiet_ray_data(), bar as progress:
        if missing and show:
            await_room(stage, workers.resources, 1, workers.wait_minutes)  # more join as there is room
        for row in _results(missing, worker, (job, work, workers, together), workers):
            if row["error"]:
                raise getattr(errors, row["error"])(row["message"])
            if row["note"] and row["note"] != throughput.note:
                get_log(stage).warning(row["note"])
            throughput.note = row["note"] or throughput.note
            throughput.add(*(row[name] for name in ("examples", "tokens", "flops", "seconds", "matmul_flops_per_second")))
            num_left -= row["units"]
            counts = {"units_left": num_left, "examples": row["examples"], "tokens": row["tokens"]}
            count(stage, utilization=throughput.utilization, **counts)
            if progress is not None:
                progress.advance(row["units"])
            if stop():
                break
    return throughput


def _results(
    tasks: Sequence[Task], worker: type[UnitWorker], arguments: tuple[Any, ...], workers: Workers
) -> Iterable[dict[str, Any]]:
    """What the workers return, task by task as they are done; ends the pool when it is no longer used."""
    import ray.data

    if not tasks:
        return ()
    items = [{"part": task.part, "models": " ".join(task.models), "units": len(task.models)} for task in tasks]
    low, high = (min(number, len(tasks)) for number in (workers.min_workers, workers.num_workers))
    results: Iterable[dict[str, Any]] = (
        ray.data.from_items(items, override_num_blocks=len(items))
        .map_batches(
            worker,
            fn_constructor_args=arguments,
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(min_size=low, max_size=high),
            num_cpus=workers.cpus_per_worker,
            num_gpus=workers.gpus_per_worker or None,
        )
        .iter_rows()
    )
    return results
