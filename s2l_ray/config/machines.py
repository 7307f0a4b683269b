"""Where and how fast the stages run. Decides no result, and is in no fingerprint."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from s2l_ray.config.section import Positive, Section


class WorkerConfig(Section):
    """Where and how fast a stage runs. Decides no result."""

    num_workers: Positive | Annotated[list[Positive], Field(min_length=2, max_length=2)] | Literal["auto"] = "auto"
    """Worker processes, or `[min, max]` as there is room; auto: one per GPU, on a machine without GPUs one for all CPUs in
    training and one per CPU in scoring."""

    cpus_per_worker: Positive | Literal["auto"] = "auto"
    """CPUs that Ray reserves per worker, and threads of its matrix products."""

    gpus_per_worker: Annotated[float, Field(ge=0)] | Literal["auto"] = "auto"
    """GPUs per worker; auto: 1 where the cluster has any."""

    device_batch_size: Positive | Literal["auto"] = "auto"
    """The most examples per forward pass in training (auto: 32); a worker's share of a batch is cut as evenly as it goes."""

    wait_minutes: Annotated[float, Field(gt=0)] = 15.0
    """How long to wait until the cluster has room for the minimum number of workers (in a pool of actors: for one)."""

    @field_validator("num_workers")
    @classmethod
    def _bounds_ascend(cls, bounds: Any) -> Any:
        if isinstance(bounds, list) and bounds[0] > bounds[1]:
            raise ValueError(f"[min, max] with min above max: {bounds}")
        return bounds


class TrainingWorkerConfig(WorkerConfig):
    """Workers that train. With `num_workers: [min, max]` the group shrinks when it loses a worker and grows when there is
    room again. Any number trains alike, up to one worker per example of a batch."""

    checkpoint_every_minutes: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    """How often a resume point (weights, optimizer) is kept, two at a time; auto: every half minute, and at most fifty."""

    @field_validator("gpus_per_worker")
    @classmethod
    def _one_gpu_at_most(cls, number: Any) -> Any:
        if number not in ("auto", 0, 1):
            raise ValueError(f"a worker trains on one GPU or on none, not on {number}. Ask for more workers")
        return number

    @property
    def resume_minutes(self) -> float:
        """Between two resume points, about."""
        return 0.5 if self.checkpoint_every_minutes == "auto" else self.checkpoint_every_minutes


class TargetWorkerConfig(TrainingWorkerConfig):
    """Workers that train the target."""

    offload: Literal["none", "optimizer", "parameters"] = "none"
    """What ZeRO keeps in the machines' memory instead of the GPUs': the optimizer's states (stage 1 and up), and the
    parameters too (stage 3)."""


class EvaluationWorkerConfig(WorkerConfig):
    """Workers that evaluate the target. `gpus_per_worker` above 1: one model is spread over so many GPUs."""

    sharding: Literal["auto", "none", "device_map", "zero3"] = "auto"
    """Where a model's weights are. none: whole on a worker's device. device_map (accelerate): spread over the worker's GPUs,
    then in the machine's memory, then on its disk. zero3 (DeepSpeed ZeRO 3, inference): a share in every worker, over nodes.
    auto: the first of none, device_map over GPUs of a node, zero3 over all GPUs that is enough by the predicted memory, else
    device_map with memory and disk."""

    max_memory: dict[Literal["gpu", "cpu"], Annotated[float, Field(ge=0)]] = Field(default_factory=dict)
    """GB that a worker may take of each GPU (`gpu`) and of the machine's memory (`cpu`), weights and working space together;
    what is not given is what there is."""


class GroupingConfig(Section):
    """Where k-means keeps the trajectories. Decides no result."""

    engine: Literal["auto", "memory", "disk", "ray", "gpu"] = "auto"
    """`memory`, a file (`disk`), `ray` (tasks read and sort, actors hold the rows, none passes the driver) or all GPUs of this
    machine; auto: gpu where faiss sees one; ray where Ray is connected and has several nodes, or one that would get more than
    `memory_gb`; else memory or disk by `memory_gb`."""

    memory_gb: Annotated[float, Field(gt=0)] = 0.5
    """Losses up to this size are kept in memory; with Ray connected, on each of its nodes."""

    num_workers: Positive = 2
    """Ray actors, of one CPU each, each with its share of the features in memory; a lost one is made again from files."""


class MachinesConfig(Section):
    """One section per stage that works in parallel."""

    examples: WorkerConfig = WorkerConfig()
    proxy: TrainingWorkerConfig = TrainingWorkerConfig()
    trajectories: WorkerConfig = WorkerConfig()
    clustering: GroupingConfig = GroupingConfig()
    target: TargetWorkerConfig = TargetWorkerConfig()
    evaluation: EvaluationWorkerConfig = EvaluationWorkerConfig()
    compare: WorkerConfig = WorkerConfig()
