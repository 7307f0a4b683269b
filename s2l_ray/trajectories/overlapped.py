"""Overlapped scoring: finished checkpoints are scored while the proxy's training goes on, where machines are idle."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

from s2l_ray.config import RunConfig
from s2l_ray.progress import get_log
from s2l_ray.runtime.pool import Unit, do_units, tasks
from s2l_ray.runtime.room import free_room
from s2l_ray.runtime.workers import Workers
from s2l_ray.storage.artifacts import Artifact
from s2l_ray.storage.places import Storage
from s2l_ray.training.checkpoints import finished_steps
from s2l_ray.trajectories.stage import Scorer, ScoringJob

# How often finished checkpoints and idle machines are looked for while the proxy is trained.
POLL_SECONDS = 2.0
# A training without an event for so long may be down, and waiting for the machines that scoring holds.
SILENT_SECONDS = 30.0
# Units per call while the training goes on: between calls its needs are looked at again.
UNITS_PER_CALL = 16


class OverlappedScoring:
    """Scores finished checkpoints while the proxy's training goes on, as long as the cluster has workers to spare.

    Ray Train's ValidationConfig would validate a reported checkpoint as a whole; this does units, which are kept whatever
    is interrupted, takes only what the training leaves, and gives it back when the training falls silent, since its
    workers may be starting again. What it has not done when the training ends is done by the next stage on all workers.
    """

    def __init__(self, config: RunConfig, examples: Artifact, scratch: Storage) -> None:
        self._config, self._examples, self._scratch = config, examples, scratch
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._last_event = time.monotonic()
        self.num_units = 0

    def on_event(self, proxy: Storage) -> None:
        """To be called at every event of the training: it holds its workers."""
        self._last_event = time.monotonic()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, args=(proxy,), daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Begin no more units, and return when those in work are done, or have not been for long."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(SILENT_SECONDS)
        if self.num_units:
            get_log("trajectories").info("%d units were scored during the training", self.num_units)

    def _must_stop(self) -> bool:
        return self._stopped.is_set() or time.monotonic() - self._last_event > SILENT_SECONDS

    def _run(self, proxy: Storage) -> None:
        complained = False
        while not self._stopped.wait(POLL_SECONDS):
            try:
                while not self._must_stop() and self._score_some(proxy):
                    pass
            except Exception as error:  # noqa: BLE001 - whatever it is, it must not end the training; the stage itself meets it
                if not complained:
                    get_log("trajectories").warning("not scored during the training: %s", str(error).strip() or repr(error))
                complained = True

    def _score_some(self, proxy: Storage) -> bool:
        """Score a few units, of the first checkpoints before later ones; False where there is nothing to do, or no room."""
        workers = spare_workers(Workers.resolve(self._config.machines.trajectories, one_per_cpu=True))
        steps = finished_steps(proxy)
        if workers is None or not steps:
            return False
        job = ScoringJob.of(self._config, self._examples, proxy, steps, self._scratch, workers.device)
        work = job.work(self._scratch)
        some = [Unit(task.models[0], task.part) for task in tasks(job.units, work, 1)[: UNITS_PER_CALL * workers.num_workers]]
        if not some:
            return False
        do_units("trajectories", some, Scorer, job, work, workers, stop=self._must_stop, show=False)
        self.num_units += len(some) - len(tasks(some, work, 1))
        return True


def spare_workers(workers: Workers) -> Workers | None:
    """As many of the scoring workers as the nodes of the connected Ray have room for now, None if for none."""
    number = free_room(workers.resources, workers.num_workers)
    return replace(workers, num_workers=number, min_workers=number) if number else None
