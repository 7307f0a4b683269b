"""Fits under Ray Train: resolve the workers, start the group, show its progress, bring back its result.

A fit resumes by itself: Ray Train restarts a failed worker group from the last registered checkpoint, and a new driver
with the same run directory finds it too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable
from typing import Any

from s2l_ray.config import WorkerConfig
from s2l_ray.errors import S2LError, StorageError, cause_of
from s2l_ray.progress import get_log, track
from s2l_ray.runtime.metrics import count
from s2l_ray.runtime.process import own_interrupts
from s2l_ray.runtime.session import WAIT_LINE_SECONDS, await_room, free_room, no_room, waiting
from s2l_ray.storage.layout import ATTEMPTS, TRAINING_RUN
from s2l_ray.storage.places import Storage

Loop = Callable[[Any, Any], dict[str, Any]]
# A group that a lost machine ended starts again as often as need be; one that ends again and again at the same resume point
# has something else. Ray Train's own limit counts without asking whether there was progress between.
MAX_ATTEMPTS = 5
MAX_ATTEMPTS_OF_ANY_SIZE = 20
MAX_WORKER_FAILURES = 1000
# How long a group's claim on machines outlives its driver.
CLAIM_SECONDS = 45
COLLECTIVE_SECONDS = 4 * 3600
# Where the storage is away: how often in a training each worker may find it so, and how long it then waits.
MAX_OUTAGES = 20
OUTAGE_SECONDS = 15.0
_STORAGE = f"{StorageError.__name__}: "
RESTARTED = "the workers have begun again"


class FailedAgainError(RuntimeError):
    """A training ended again and again at the same place, by a defect and not by what the user can mend."""


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

        Bounds that are given do not depend on what there is now: machines come and go. They are drawn in to sizes that divide.
        """
        import ray

        resources = ray.cluster_resources()
        cpus, gpus = max(1, int(resources.get("CPU", 1))), int(resources.get("GPU", 0))
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and (not gpus or node["Resources"].get("GPU"))]
        of_a_node = max([1, *(int(node.get("CPU", 0)) for node in nodes)])  # a worker is on one
        gpus_per_worker = (1.0 if gpus else 0.0) if config.gpus_per_worker == "auto" else float(config.gpus_per_worker)
        if config.num_workers == "auto":
            per_worker = 1 if config.cpus_per_worker == "auto" else config.cpus_per_worker
            most = int(gpus / gpus_per_worker) if gpus_per_worker else cpus // per_worker if one_per_cpu else 1
            low = high = next((number for number in range(most, 0, -1) if divides % number == 0), 1)
        else:
            low, high = config.num_workers if isinstance(config.num_workers, list) else [config.num_workers] * 2
            if divides:  # there is one: the config was checked
                sizes = [number for number in range(low, high + 1) if divides % number == 0] or [low]
                low, high = sizes[0], sizes[-1]
        if config.cpus_per_worker != "auto":
            cpus_per_worker = config.cpus_per_worker
        else:
            on_a_node = (
                min(high, int(max(node.get("GPU", 0) for node in nodes) / gpus_per_worker))
                if gpus_per_worker and gpus
                else high
            )
            cpus_per_worker = 1 if one_per_cpu else max(1, of_a_node // max(1, on_a_node))
        return cls(high, cpus_per_worker, gpus_per_worker, low, config.wait_minutes, divides)

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


# --- on the driver -------------------------------------------------------------------------------------------------


def fit(
    stage: str,
    loop: Loop,
    job: Any,
    workers: Workers,
    work: Storage,
    on_event: Callable[[], None] = lambda: None,
    resume_minutes: float = 0.5,
) -> dict[str, Any]:
    """Run `loop(job, events)` on a Ray Train worker group until it has finished; what rank 0 returned, and `num_workers`.

    `resume_minutes`: how often the loop keeps a resume point; a group grows half as often at most.

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
    queues = [Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here}) for _ in range(3)]
    events, outcome, outages = queues
    listener = threading.Thread(target=_show_events, args=(stage, events, on_event), daemon=True)
    storage = work.child(TRAINING_RUN)
    trainer = _trainer_class(stage, workers, events)(
        _guarded,
        train_loop_config={
            "loop": loop,
            "job": job,
            "work": work,
            "events": events,
            "outcome": outcome,
            "outages": outages,
            "patience": (MAX_OUTAGES, OUTAGE_SECONDS),
            "threads": workers.cpus_per_worker,
        },
        scaling_config=ScalingConfig(
            num_workers=(workers.min_workers, workers.num_workers) if workers.is_elastic else workers.num_workers,
            # To grow ends the group without a resume point.
            elastic_resize_monitor_interval_s=max(60.0, 2 * 60 * resume_minutes),
            use_gpu=workers.gpus_per_worker > 0,
            resources_per_worker=workers.resources,
        ),
        run_config=RunConfig(
            name="fit",
            storage_path=storage.path() if storage.is_local else storage.uri,
            # How long a group may be without machines the scaling policy says, and counts anew after each time.
            failure_config=FailureConfig(max_failures=MAX_WORKER_FAILURES, controller_failure_limit=-1),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
        # The others wait while the first merges, converts and uploads a large model.
        torch_config=TorchConfig(backend="nccl" if workers.gpus_per_worker else "gloo", timeout_s=COLLECTIVE_SECONDS),
    )
    listener.start()
    try:
        work.delete(ATTEMPTS)
        with own_interrupts():
            trainer.fit()
        told = outcome.get(block=False)
    except TrainingFailedError as error:
        raise cause_of(error) or error from None
    except Empty:
        raise RuntimeError(f"{stage}: the workers ended without an outcome") from None
    finally:
        with contextlib.suppress(ray.exceptions.RayError):  # it must not stand in the way of what is being raised
            events.put(None)
            listener.join()
            for queue in queues:
                queue.shutdown()
    if isinstance(told, Exception):
        raise told
    return dict(told)


def _trainer_class(stage: str, workers: Workers, events: Any) -> Any:
    """Ray Train's trainer, whose group waits for machines no longer than asked and says for what; if it may grow and shrink,
    to sizes that divide."""
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.execution.scaling_policy import (
        ElasticScalingPolicy,
        FixedScalingPolicy,
        autoscaling_coordinator_client,
    )

    class Patient:
        """Part of a policy: what Ray Train asks it, about every second or minute, tells whether there is a group."""

        _alone_since: float | None = None
        _told = 0.0

        def make_decision_for_non_running_worker_group(self) -> Any:
            now = time.monotonic()
            if self._alone_since is None:
                self._alone_since = self._told = now
            waited = now - self._alone_since
            if waited > 60 * workers.wait_minutes:
                raise no_room(stage, workers.resources, workers.min_workers, waited)
            if now - self._told > WAIT_LINE_SECONDS:
                self._told = now
                events.actor.put_nowait.remote(waiting(workers.resources, workers.min_workers))  # must not block the controller
            return super().make_decision_for_non_running_worker_group()  # type: ignore[misc]

        def make_decision_for_running_worker_group(self, *args: Any, **options: Any) -> Any:
            self._alone_since = None
            return super().make_decision_for_running_worker_group(*args, **options)  # type: ignore[misc]

    class Fixed(Patient, FixedScalingPolicy):  # type: ignore[misc]
        pass

    class Dividing(Patient, ElasticScalingPolicy):  # type: ignore[misc]
        _most: int | None = None

        def after_controller_start(self, *args: Any, **options: Any) -> None:
            # A driver that dies leaves its claim on the machines behind, and the next one waits for that to expire: three
            # minutes, unless it is renewed more often than that needs (every 20 s).
            autoscaling_coordinator_client.AUTOSCALING_REQUESTS_EXPIRE_TIME_S = CLAIM_SECONDS
            super().after_controller_start(*args, **options)

        def make_decision_for_running_worker_group(self, worker_group_state: Any, *args: Any, **options: Any) -> Any:
            # Ray counts what nodes have, whoever uses it; a healthy group is not ended for room that others hold.
            self._most = worker_group_state.num_workers + free_room(self.scaling_config._resources_per_worker_not_none)
            try:
                return super().make_decision_for_running_worker_group(worker_group_state, *args, **options)
            finally:
                self._most = None

        def _count_possible_workers(self, *args: Any, **options: Any) -> int:
            possible = super()._count_possible_workers(*args, **options)
            possible = possible if self._most is None else min(possible, self._most)
            sizes = range(possible, 0, -1)
            return next((number for number in sizes if not workers.divides or workers.divides % number == 0), 0)

    class Trainer(TorchTrainer):  # type: ignore[misc]
        policy = Dividing if workers.is_elastic else Fixed

        def _initialize_and_run_controller(self, **parts: Any) -> Any:
            return super()._initialize_and_run_controller(**parts | {"scaling_policy": self.policy(self.scaling_config)})

    return Trainer


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

    from s2l_ray.runtime.process import keep_freed_memory, quiet_libraries

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
        mistake = error if isinstance(error, FailedAgainError) else cause_of(error)
        if mistake is None or _sits_out(mistake, train_loop_config, context.get_world_size()):
            _tell_attempt(train_loop_config["work"], error)
            raise
        outcome.put(mistake)
        if context.get_world_size() > 1:
            raise  # the others may be waiting for this worker
        return
    if is_first:
        outcome.put(result | {"num_workers": context.get_world_size()})


def _sits_out(mistake: Exception, config: dict[str, Any], world_size: int) -> bool:
    """Whether the storage is away, as it has not been too often yet; then some time has passed, and a new group may try.

    The outages are counted on the driver's node: the storage cannot count them.
    """
    times, seconds = config["patience"]
    if not isinstance(mistake, StorageError) or not mistake.is_transient or config["outages"].qsize() >= times * world_size:
        return False
    config["outages"].put(None)
    config["events"].put(f"begins again in {seconds:.0f} s: {mistake}")
    time.sleep(seconds)
    return True


def _tell_attempt(work: Storage, error: Exception) -> None:
    """Keep what ended this group, for the case that it ends every one."""
    with contextlib.suppress(S2LError):
        work.write_json(ATTEMPTS, (work.read_json(ATTEMPTS) or {}) | {"error": f"{type(error).__name__}: {error}"[:2000]})


def _count_attempt(work: Storage, world_size: int, events: Any) -> None:
    """Tell the driver of a group that is not the first; raise FailedAgainError or S2LError where one began here too often."""
    import ray.train

    checkpoint = ray.train.get_checkpoint()
    start = str(checkpoint.path) if checkpoint else "the beginning"
    told = work.read_json(ATTEMPTS) or {}
    if told:
        events.put(RESTARTED)
    told = told if told.get("from") == start else {}
    total, number = told.get("total", 0) + 1, told.get("number", 0) + 1 if told.get("workers") == world_size else 1
    if number > MAX_ATTEMPTS or total > MAX_ATTEMPTS_OF_ANY_SIZE:
        if told.get("error", "").startswith(_STORAGE):
            raise StorageError(told["error"].removeprefix(_STORAGE))
        if "error" in told:
            raise FailedAgainError(f"the training ended {total - 1} times from {start}, at last with {told['error']}")
        raise S2LError(
            f"the training was ended {total - 1} times before it got to a new resume point (from {start}). Where machines are "
            "lost that often, lower checkpoint_every_minutes; RAY_LOG_TO_DRIVER=1 shows what workers say."
        )
    work.write_json(ATTEMPTS, {"from": start, "workers": world_size, "number": number, "total": total})
