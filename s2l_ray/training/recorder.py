"""The Trainer's callback: keeps the recipe's checkpoints and resume points, and tells the driver how far the training is.

A kept checkpoint is a result and stands at the steps of the recipe. A resume point (weights, optimizer, random state) is
kept by the clock, registered with Ray Train, and never read as a result.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray.train
import torch.distributed
from transformers import TrainerCallback

from s2l_ray.progress import get_log

if TYPE_CHECKING:
    from s2l_ray.training.fine_tuning import Phase

# Names the phase that a resume point belongs to, and how many workers it has the shards of.
PHASE = "phase.txt"
# A resume point may be kept where so large a share of the steps is done, if the last one is older than this.
RESUME_FRACTION = 1 / 50
RESUME_SECONDS = 30.0


class Recorder(TrainerCallback):  # type: ignore[misc]
    """Callback of one phase; `folder` is where the Trainer writes its own checkpoints on this node."""

    def __init__(self, phase: Phase, folder: Path, events: Any, on_keep: Callable[[int, Any], None] | None) -> None:
        self._phase, self._folder, self._events = phase, folder, events
        context = ray.train.get_context()
        self._is_first, self._is_first_of_node = context.get_world_rank() == 0, context.get_local_rank() == 0
        self._on_keep = on_keep if self._is_first else None
        self._told = self._resumable = self._begun = time.monotonic()
        self._begun_at = 0
        self._tokens_seen = np.concatenate([[0], np.cumsum(phase.tokens.lengths[phase.order])])

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:  # noqa: ARG002
        self._begun, self._begun_at = time.monotonic(), state.global_step
        if self._on_keep and state.global_step == 0 and 0 in self._phase.keep_at:
            self._on_keep(0, model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:  # noqa: ARG002
        step = state.global_step
        if self._on_keep and step in self._phase.keep_at:
            self._on_keep(step, model)
        control.should_save = step % max(1, round(state.max_steps * RESUME_FRACTION)) == 0 and self._is_due()
        if self._is_first and (time.monotonic() - self._told > 1 or step == state.max_steps):
            self._told = time.monotonic()
            self._events.put((self._phase.steps_before + step, self._phase.fit_steps, self._note(state)))

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        self._resumable = time.monotonic()
        # The workers of a node share a folder: one of them reports it, once all have written.
        torch.distributed.barrier()
        checkpoint = None
        if self._is_first_of_node:
            saved = self._folder / f"checkpoint-{state.global_step}"
            (saved / PHASE).write_text(f"{self._phase.name} {ray.train.get_context().get_world_size()}")
            checkpoint = ray.train.Checkpoint.from_directory(saved)
        ray.train.report({"step": state.global_step}, checkpoint=checkpoint)

    def _is_due(self) -> bool:
        """Whether the last resume point is old enough, by the first worker's clock: all must agree."""
        due = [time.monotonic() - self._resumable > RESUME_SECONDS]
        torch.distributed.broadcast_object_list(due, src=0)
        return due[0]

    def _note(self, state: Any) -> str:
        """The last loss, and this attempt's tokens per second."""
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        first, last = (step * self._phase.config.global_batch_size for step in (self._begun_at, state.global_step))
        rate = (self._tokens_seen[last] - self._tokens_seen[first]) / (time.monotonic() - self._begun)
        return (f"loss {losses[-1]:.4f}  " if losses else "") + f"{rate / 1000:.1f}k tok/s"


@contextmanager
def resume_point(phase: str, shards: int | None) -> Iterator[str | None]:
    """The folder of the last registered checkpoint of this phase, None to start from the beginning.

    Optimizer states that ZeRO sharded over another number of workers (`shards`) cannot be loaded: the phase starts again.
    """
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        yield None
        return
    with checkpoint.as_directory() as folder:
        name, _, workers = (Path(folder) / PHASE).read_text().partition(" ")
        fits = shards is None or int(workers) == shards
        if name == phase and not fits:
            get_log("target").warning("%s starts again: its resume point is of %s workers, now %d", phase, workers, shards)
        yield folder if name == phase and fits else None
