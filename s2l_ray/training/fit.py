"""Fits under Ray Train: resolve the workers, start the group, show its progress, bring back its result.

A fit resumes by itself: Ray Train restarts a failed worker group from the last registered checkpoint, and a new driver
with the same run directory finds it too.
"""

from __future__ import annotations

import dataclasses
import signal
import threading
from collections.abc import Callable
from typing import Any

from s2l_ray.artifacts import Storage
from s2l_ray.config import WorkerConfig
from s2l_ray.errors import S2LError, cause_of
from s2l_ray.progress import get_log, track
from s2l_ray.session import await_room
from s2l_ray.training.metrics import count

Loop = Callable[[Any, Any], dict[str, Any]]
# A group that a lost machine ended starts again as often as need be; one that ends again and again at the same resume point
# has something else. Ray Train's own limit counts without asking whether there was progress between.
ATTEMPTS = "attempts.json"
MAX_ATTEMPTS = 5
MAX_WORKER_FAILURES = 1000
# How long a group's claim on machines outlives its driver.
CLAIM_SECONDS = 45
RESTARTED = "the workers have begun again"


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
    divides: int = 0
    """What a number of workers must divide (a global batch), 0 for anything."""

    @classmethod
    def resolve(cls, config: WorkerConfig, *, one_per_cpu: bool, divides: int = 0) -> Workers:
        """Numbers for `auto` from what the connected Ray has: one worker per GPU; without GPUs one per CPU or one for all.

        Bounds that are given stay what they are, whatever there is now: machines come and go.
        """
        import ray

        resources = ray.cluster_resources()
        cpus, gpus = max(1, int(resources.get("CPU", 1))), int(resources.get("GPU", 0))
        gpus_per_worker = (1.0 if gpus else 0.0) if config.gpus_per_worker == "auto" else float(config.gpus_per_worker)
        if config.num_workers == "auto":
            per_worker = 1 if config.cpus_per_worker == "auto" else config.cpus_per_worker
            most = int(gpus / gpus_per_worker) if gpus_per_worker else cpus // per_worker if one_per_cpu else 1
            low = high = next((number for number in range(most, 0, -1) if divides % number == 0), 1)
        else:
            low, high = config.num_workers if isinstance(config.num_workers, list) else [config.num_workers] * 2
        if config.cpus_per_worker != "auto":
            cpus_per_worker = config.cpus_per_worker
        else:
            cpus_per_worker = 1 if one_per_cpu else max(1, cpus // high)
        return cls(high, cpus_per_worker, gpus_per_worker, low, config.wait_minutes, divides)

    @property
    def device(self) -> str:
        """Where the workers compute: on a GPU only if they were given one."""
        return "cuda" if self.gpus_per_worker else "cpu"

    @property
    def resources(self) -> dict[str, float]:
        """What Ray reserves for one of them."""
        return {"CPU": self.cpus_per_worker} | ({"GPU": self.gpus_per_worker} if self.gpus_per_worker else {})

    def __str__(self) -> str:
        number = f"{self.min_workers} to {self.num_workers}" if self.min_workers < self.num_workers else f"{self.num_workers}"
        return f"{number} workers"

    def await_room(self, stage: str) -> None:
        """Wait until the connected Ray has room for the fewest of them. Raises ConfigError."""
        await_room(stage, self.resources, self.min_workers, self.wait_minutes)


# --- on the driver -------------------------------------------------------------------------------------------------


def fit(
    stage: str, loop: Loop, job: Any, workers: Workers, work: Storage, on_event: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Run `loop(job, events)` on a Ray Train worker group until it has finished; what rank 0 returned.

    Calling it again with the same `work` directory resumes from the last registered checkpoint. `on_event` is called
    whenever the workers say something. Raises the S2LError that the loop raised, if it did.
    """
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig
    from ray.util.queue import Empty, Queue
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    workers.await_room(stage)
    # What the driver hears lives on its own machine: other nodes come and go.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    events, outcome = (Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here}) for _ in range(2))
    listener = threading.Thread(target=_show_events, args=(stage, events, on_event), daemon=True)
    storage = work.child("ray")
    is_elastic = workers.min_workers < workers.num_workers
    trainer = _trainer_class(workers.divides if is_elastic else 0)(
        _guarded,
        train_loop_config={
            "loop": loop,
            "job": job,
            "work": work,
            "events": events,
            "outcome": outcome,
            "threads": workers.cpus_per_worker,
        },
        scaling_config=ScalingConfig(
            num_workers=(workers.min_workers, workers.num_workers) if is_elastic else workers.num_workers,
            use_gpu=workers.gpus_per_worker > 0,
            resources_per_worker=workers.resources,
        ),
        run_config=RunConfig(
            name="fit",
            storage_path=storage.path() if storage.is_local else storage.uri,
            failure_config=FailureConfig(max_failures=MAX_WORKER_FAILURES),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
        torch_config=TorchConfig(backend="nccl" if workers.gpus_per_worker else "gloo"),
    )
    work.delete(ATTEMPTS)
    listener.start()
    # Ray Train takes SIGINT for itself, keeps it when it is done, and leaves by SystemExit(0) as if all were well.
    handler = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit()
        told = outcome.get(block=False)
    except SystemExit:
        raise KeyboardInterrupt from None
    except TrainingFailedError as error:
        raise cause_of(error) or error from None
    except Empty:
        raise RuntimeError(f"{stage}: the workers ended without an outcome") from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)
        events.put(None)
        listener.join()
        events.shutdown()
        outcome.shutdown()
    if isinstance(told, S2LError):
        raise told
    return dict(told)


def _trainer_class(divides: int) -> Any:
    """Ray Train's trainer; for a group that grows and shrinks, one that takes only sizes that divide `divides`."""
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, autoscaling_coordinator_client

    if not divides:
        return TorchTrainer

    class Dividing(ElasticScalingPolicy):  # type: ignore[misc]
        def _maybe_send_resource_request(self) -> None:
            # A driver that dies leaves its claim on the machines behind, and the next one waits for that to expire: three
            # minutes, unless it is renewed more often than that needs (every 20 s).
            autoscaling_coordinator_client.AUTOSCALING_REQUESTS_EXPIRE_TIME_S = CLAIM_SECONDS
            super()._maybe_send_resource_request()

        def _count_possible_workers(self, *args: Any, **options: Any) -> int:
            possible = super()._count_possible_workers(*args, **options)
            return next((number for number in range(possible, 0, -1) if divides % number == 0), 0)

    class ElasticTrainer(TorchTrainer):  # type: ignore[misc]
        policy = Dividing

        def _initialize_and_run_controller(self, **parts: Any) -> Any:
            return super()._initialize_and_run_controller(**parts | {"scaling_policy": self.policy(self.scaling_config)})

    return ElasticTrainer


def _show_events(stage: str, events: Any, on_event: Callable[[], None]) -> None:
    """Show what rank 0 sends until None comes: (steps done, steps in all, note), RESTARTED, or a line for the log."""
    with track(stage, 0, "step") as progress:
        while (event := events.get()) is not None:
            on_event()
            if event == RESTARTED:
                count(stage, restarts=1)
            elif isinstance(event, str):
                get_log(stage).info(event)
            else:
                progress.at(*event)
                count(stage, units_left=event[1] - event[0])


# --- on a worker ---------------------------------------------------------------------------------------------------


def _guarded(train_loop_config: dict[str, Any]) -> None:
    """Run the loop; leave its result, or what the user must mend, where the driver finds it.

    A mistake of the user is not a failure that a restart would heal: it ends the fit instead of being retried.
    """
    import ray.train
    import torch

    from s2l_ray.training.limits import keep_freed_memory

    quiet_libraries()
    keep_freed_memory()
    torch.set_num_threads(train_loop_config["threads"])
    context, outcome = ray.train.get_context(), train_loop_config["outcome"]
    if not outcome.empty():  # a worker met the user's mistake and took the group down
        return
    is_first = context.get_world_rank() == 0
    try:
        if is_first:
            _count_attempt(train_loop_config["work"], context.get_world_size(), train_loop_config["events"])
        result = train_loop_config["loop"](train_loop_config["job"], train_loop_config["events"])
    except Exception as error:
        if (mistake := cause_of(error)) is None:
            raise
        outcome.put(mistake)
        if context.get_world_size() > 1:
            raise  # the others may be waiting for this worker
        return
    if is_first:
        outcome.put(result)


def _count_attempt(work: Storage, world_size: int, events: Any) -> None:
    """Tell the driver of a group that is not the first; raise S2LError where it began at this resume point too often."""
    import ray.train

    checkpoint = ray.train.get_checkpoint()
    begins_at = {"from": str(checkpoint.path) if checkpoint else "the beginning", "workers": world_size}
    told = work.read_json(ATTEMPTS) or {}
    if told:
        events.put(RESTARTED)
    number = told.get("number", 0) + 1 if told.items() >= begins_at.items() else 1
    if number > MAX_ATTEMPTS:
        raise S2LError(
            f"the training was ended {MAX_ATTEMPTS} times before it got to a new resume point (from {begins_at['from']}). "
            "Where machines are lost that often, lower checkpoint_every_minutes; RAY_LOG_TO_DRIVER=1 shows what workers say."
        )
    work.write_json(ATTEMPTS, begins_at | {"number": number})


def quiet_libraries() -> None:
    """Keep the chatter of libraries in a worker out of the user's log; their errors still come as exceptions."""
    import logging
    import warnings

    import transformers

    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for name in ("transformers", "accelerate", "DeepSpeed", "torch"):
        logging.getLogger(name).setLevel(logging.ERROR)
