"""Fits under Ray Train: start a group of workers, show its progress, wait for machines, bring back its result.

A fit resumes by itself: Ray Train restarts a failed worker group from the last registered checkpoint, and a new driver
with the same run directory finds it too. Ray Train waits for machines without an end; the driver, to which the first
worker reports every few seconds, logs what is missing and ends the fit after `wait_minutes`. Ray Train also counts what
machines have, whoever uses it; where others hold what an elastic group wants, the driver starts it with what they leave.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from s2l_ray.errors import ConfigError, cause_of
from s2l_ray.progress import get_log, track
from s2l_ray.runtime.attempts import ALIVE, MAX_OUTAGES, OUTAGE_SECONDS, RESTARTED, guarded
from s2l_ray.runtime.metrics import count
from s2l_ray.runtime.room import WAIT_LINE_SECONDS, claims, free_room, give_up, no_room, waiting
from s2l_ray.runtime.workers import Workers
from s2l_ray.storage.layout import ATTEMPTS, TRAINING_RUN
from s2l_ray.storage.places import Storage

Loop = Callable[[Any, Any], dict[str, Any]]
# What ends too often is counted by `attempts`.
MAX_WORKER_FAILURES = 1000
COLLECTIVE_SECONDS = 4 * 3600
# How long the driver waits for an event before it looks at the clock.
LOOK_SECONDS = 1.0
# What Ray Train looks for in the environment.
RAY_TRAIN_SETTINGS = ("RAY_TRAIN_", "RAY_CHDIR_TO_TRIAL_DIR")
# How long an interrupted training has to give its machines back.
STOP_SECONDS = 10.0
# How long what a killed process has started lives on.
ORPHAN_SECONDS = 2.0
# After such a silence an elastic group takes what others leave. Ray Train (2.60) honours the claim of a driver that was
# killed for up to 180 s, which is not worth giving up elasticity for.
CROWDED_SECONDS = 240.0


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

    Calling it again with the same `work` directory resumes from the last registered checkpoint. `on_event` is called
    whenever the workers report something. `resume_minutes`: how often the loop keeps a resume point; a group grows half as
    often at most. Raises the S2LError that the loop raised, if it did, and ConfigError where there was no room for the fewest
    workers in `wait_minutes`, at the beginning or later.
    """
    import ray

    workers.await_room(stage)
    work.delete(ATTEMPTS)
    with _queues(3) as (events, outcome, outages), _Watch(stage, workers, events, on_event) as watch:
        config = {"loop": loop, "job": job, "work": work, "events": events, "outcome": outcome, "outages": outages}
        config |= {"patience": (MAX_OUTAGES, OUTAGE_SECONDS), "threads": workers.cpus_per_worker}
        task = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=_here())(_train)
        settings = {name: value for name, value in os.environ.items() if name.startswith(RAY_TRAIN_SETTINGS)}
        while True:
            watch.begin(training := task.remote(workers, work.child(TRAINING_RUN), config, resume_minutes, settings))
            if (room := _await(training, watch)) is None:
                break
            workers = dataclasses.replace(workers, num_workers=room, min_workers=room)
        if outcome.empty():
            raise RuntimeError(f"{stage}: the workers ended without an outcome")
        result = outcome.get()
    if isinstance(result, Exception):
        raise result
    return dict(result)


def _train(workers: Workers, storage: Storage, config: dict[str, Any], resume_minutes: float, settings: dict[str, str]) -> None:
    """Run Ray Train, in a process of its own: while it waits for machines nothing but that process's end ends it."""
    os.environ.update(settings)
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    trainer = TorchTrainer(
        guarded,
        train_loop_config=config,
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
            # How long a group may be without machines the driver decides, and counts anew after each time.
            failure_config=FailureConfig(max_failures=MAX_WORKER_FAILURES, controller_failure_limit=-1),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
        # The others wait while the first merges, converts and uploads a large model.
        torch_config=TorchConfig(backend="nccl" if workers.gpus_per_worker else "gloo", timeout_s=COLLECTIVE_SECONDS),
    )
    config["events"].put(ALIVE)  # what it took to come here was no wait for machines
    handler = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit()
    except SystemExit:  # how Ray Train ends on an interrupt; the driver knows of it
        pass
    finally:
        signal.signal(signal.SIGINT, handler)  # Ray Train keeps its own, and Ray this process


def _await(training: Any, watch: _Watch) -> int | None:
    """Wait for a training's end: None, or for how many workers there is room where the watch ended it for that."""
    import ray

    try:
        ray.get(training)
    except ray.exceptions.RayError as error:
        with watch.lock:
            if watch.ended is not training:
                raise cause_of(error) or getattr(error, "cause", error) from None
    except BaseException:
        # Ray Train gives back its machines on an interrupt, unless it is waiting for some.
        ray.cancel(training, recursive=False)
        if not ray.wait([training], timeout=STOP_SECONDS)[0]:
            _kill(training, watch.workers.resources)
        raise
    else:
        return None
    if watch.problem is not None:
        raise watch.problem from None
    return watch.room


def _kill(training: Any, worker: Mapping[str, float]) -> None:
    """End a training that waits for machines, and its claim on them."""
    import ray

    ray.cancel(training, force=True, recursive=False)
    ray.wait([training], timeout=STOP_SECONDS)
    time.sleep(ORPHAN_SECONDS)
    give_up(claims(worker))


def _here() -> Any:
    """The driver's own machine: other nodes come and go."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


@contextlib.contextmanager
def _queues(number: int) -> Iterator[list[Any]]:
    import ray
    from ray.util.queue import Queue

    queues = [Queue(actor_options={"num_cpus": 0, "scheduling_strategy": _here()}) for _ in range(number)]
    try:
        yield queues
    finally:
        with contextlib.suppress(ray.exceptions.RayError):  # it must not stand in the way of what is being raised
            for queue in queues:
                queue.shutdown()


class Patience:
    """How long there has been no group: what is due then, by a clock in seconds."""

    def __init__(self, wait_minutes: float, now: float) -> None:
        self._limit, self._alive, self._reported = 60 * wait_minutes, now, now

    def on_alive(self, now: float) -> None:
        """There is a group."""
        self._alive = self._reported = now

    def seconds(self, now: float) -> float:
        """How long there has been no group."""
        return now - self._alive

    def is_over(self, now: float) -> bool:
        """Whether that is longer than was asked for."""
        return self.seconds(now) > self._limit

    def is_line_due(self, now: float) -> bool:
        """Whether it is time to look again what is free, and to report it."""
        if now - self._reported <= WAIT_LINE_SECONDS:
            return False
        self._reported = now
        return True


class _Watch:
    """A thread that shows what rank 0 sends, (steps done, steps in all, note) or a line for the log, and when it is silent."""

    def __init__(self, stage: str, workers: Workers, events: Any, on_event: Callable[[], None]) -> None:
        self.problem: ConfigError | None = None
        """Why the fit was ended."""
        self.room: int | None = None
        """With how many workers, none more or less, it is to begin again instead."""
        self.ended: Any = None
        """The training that was."""
        self._stage, self.workers, self._events, self._on_event = stage, workers, events, on_event
        self.lock = threading.Lock()
        """Held while a training is being ended."""
        self._training: Any = None
        self._patience = Patience(workers.wait_minutes, time.monotonic())
        self._thread = threading.Thread(target=self._show, daemon=True)

    def __enter__(self) -> _Watch:
        self._thread.start()
        return self

    def begin(self, training: Any) -> None:
        """A training begins, which may be ended."""
        self._patience, self._training = Patience(self.workers.wait_minutes, time.monotonic()), training

    def __exit__(self, *_: object) -> None:
        import ray

        with contextlib.suppress(ray.exceptions.RayError):
            self._events.put(None)
            self._thread.join()

    def _show(self) -> None:
        from ray.util.queue import Empty

        with track(self._stage, 0, "step") as progress:
            while True:
                try:
                    event = self._events.get(timeout=LOOK_SECONDS)
                except Empty:
                    self._look()
                    continue
                if event is None:
                    return
                self._patience.on_alive(time.monotonic())
                if event != ALIVE:
                    self._on_event()
                if event == RESTARTED:
                    count(self._stage, restarts=1)
                elif not isinstance(event, str):
                    progress.at(*event)
                    count(self._stage, units_left=event[1] - event[0])
                elif event != ALIVE:
                    get_log(self._stage).info(event)

    def _look(self) -> None:
        """What is due after a silence: nothing, a line, an end, or an end and a beginning with what there is room for."""
        now, workers, patience = time.monotonic(), self.workers, self._patience
        is_over, is_due = patience.is_over(now), patience.is_line_due(now)
        if (is_over or is_due) and any(claims(workers.resources).values()):  # it only starts slowly
            patience.on_alive(now)
            return
        if workers.is_elastic and (is_over or (is_due and patience.seconds(now) > CROWDED_SECONDS)):
            there = free_room(workers.resources, workers.num_workers)
            if there >= workers.min_workers and there != self.room:
                get_log(self._stage).info("others hold what %s would take; begins with %d", workers, there)
                self._end(room=there)
                return
        if is_over:
            self._end(no_room(self._stage, workers.resources, workers.min_workers, patience.seconds(now)))
        elif is_due:
            get_log(self._stage).info(waiting(workers.resources, workers.min_workers))

    def _end(self, problem: ConfigError | None = None, room: int | None = None) -> None:
        with self.lock:
            if self._training is not None:
                self.ended, self._training = self._training, None
                self.problem, self.room = problem, room or self.room
                _kill(self.ended, self.workers.resources)
