"""Evaluation by ZeRO 3: a group of workers that hold one model together, and share the parts out among them."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from s2l_ray.errors import ConfigError
from s2l_ray.runtime.fit import fit
from s2l_ray.runtime.pool import Unit, UnitWorker
from s2l_ray.runtime.workers import Workers
from s2l_ray.storage.places import Storage


@dataclass(frozen=True)
class ShareJob:
    """What a worker of the group needs."""

    worker: type[UnitWorker]
    job: Any
    units: Sequence[Unit]
    work: Storage
    workers: Workers
    precision: str


def do_units_together(job: ShareJob) -> None:
    """Do the units that have no file yet, each by one of the workers while the others lend it their shares of the model.

    Raises ConfigError where DeepSpeed is not installed, and the S2LError that a worker met.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError("machines.evaluation.sharding=zero3 needs DeepSpeed: pip install deepspeed (for the workers, too)")
    if any(not job.work.exists(unit.path) for unit in job.units):
        fit("evaluation", _work_in_group, job, job.workers, job.work.child("group"))


def _work_in_group(job: ShareJob, events: Any) -> dict[str, Any]:
    """The loop of every worker: model by model, those that are done left out."""
    import ray.train
    import ray.train.torch
    from torch import distributed

    from s2l_ray.training.zero_inference import free, in_step, inference_config, partitioned

    context, device = ray.train.get_context(), ray.train.torch.get_device()
    rank, size = context.get_world_rank(), context.get_world_size()
    worker = job.worker(job.job, job.work, job.workers, 1)
    done = 0
    for name in dict.fromkeys(unit.model for unit in job.units):
        missing = [[unit for unit in job.units if unit.model == name and not job.work.exists(unit.path)]]
        distributed.broadcast_object_list(missing)  # as the first worker sees it
        if not missing[0]:
            continue
        model = partitioned(worker.load(name), inference_config(job.precision), device)
        with in_step(model, device):
            for unit in missing[0][rank::size]:
                for _, data in worker.work_on(unit.part, {name: model}):
                    job.work.write(unit.path, data)
        done += len(missing[0])
        if not rank:
            events.put((done, len(job.units), name))
        free(model)
    return {"units": done}
