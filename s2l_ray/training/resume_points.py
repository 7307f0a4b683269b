"""The Trainer's callback: keeps the recipe's checkpoints and resume points, and reports to the driver how far the training is.

A kept checkpoint is a result and stands at the steps of the recipe. A resume point (weights, optimizer, random state) is
kept by the clock, registered with Ray Train, and never read as a result. It serves any number of workers: what ZeRO sharded
over another number becomes a universal checkpoint of DeepSpeed's first, with every parameter's states in one piece.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
import torch.distributed
from transformers import TrainerCallback

from s2l_ray.training.training_run import TrainingRun
from s2l_ray.training.zero import convert, restore_settings

# Names the model that a resume point belongs to, and how many workers it has the shards of.
OWNER = "owner.txt"
# A resume point may be kept where so large a share of the steps is done, if the last one is older than this.
RESUME_FRACTION = 1 / 50
RESUME_SECONDS = 30.0


class Recorder(TrainerCallback):  # type: ignore[misc]
    """Callback of one model's training; `folder` is where the Trainer writes its own checkpoints on this node."""

    def __init__(
        self,
        run: TrainingRun,
        folder: Path,
        events: Any,
        on_keep: Callable[[int, Any], None] | None,
        every_minutes: float | str = "auto",
    ) -> None:
        self._run, self._folder, self._events = run, folder, events
        context = ray.train.get_context()
        self._is_first, self._is_first_of_node = context.get_world_rank() == 0, context.get_local_rank() == 0
        self._on_keep = on_keep if self._is_first else None
        self._reported = self._resumable = self._begun = time.monotonic()
        self._begun_at = self._look_at = 0
        self._is_auto, self._resume_seconds = every_minutes == "auto", RESUME_SECONDS
        if not isinstance(every_minutes, str):
            self._resume_seconds = 60 * every_minutes
        self._tokens_seen = np.concatenate([[0], np.cumsum(run.tokens.lengths[run.order])])

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any) -> None:  # noqa: ARG002
        if args.deepspeed and state.global_step:
            restore_settings(optimizer, args.weight_decay)
        self._begun, self._begun_at = time.monotonic(), state.global_step
        torch.distributed.barrier()  # all have loaded: the copy of the states need not stay on the disk for the whole training
        for states in (self._folder / "universal").glob("global_step*") if self._is_first_of_node else ():
            shutil.rmtree(states)
        if self._is_first and state.global_step:
            self._events.put(f"goes on from step {self._run.steps_before + state.global_step}")
        if self._on_keep and state.global_step == 0 and 0 in self._run.keep_at:
            self._on_keep(0, model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:  # noqa: ARG002
        step = state.global_step
        if self._on_keep and step in self._run.keep_at:
            self._on_keep(step, model)
        control.should_save = self._is_due(step, state.max_steps)
        if self._is_first and (time.monotonic() - self._reported > 1 or step == state.max_steps):
            self._reported = time.monotonic()
            self._events.put((self._run.steps_before + step, self._run.fit_steps, self._note(state)))

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        # The workers of a node share a folder: one of them reports it, once all have written.
        torch.distributed.barrier()
        checkpoint = None
        if self._is_first_of_node:
            saved = self._folder / f"checkpoint-{state.global_step}"
            (saved / OWNER).write_text(f"{self._run.name} {ray.train.get_context().get_world_size()}")
            checkpoint = ray.train.Checkpoint.from_directory(saved)
        # The Trainer removes old ones on the first worker's node only.
        ray.train.report({"step": state.global_step}, checkpoint=checkpoint, delete_local_checkpoint_after_upload=True)
        self._resumable = time.monotonic()  # an upload may take longer than the interval

    def _is_due(self, step: int, steps: int) -> bool:
        """Whether the last resume point is old enough, by the first worker's clock: all must agree."""
        if step < self._look_at or (self._is_auto and step % max(1, round(steps * RESUME_FRACTION))):
            return False
        now = time.monotonic()
        left, pace = self._resume_seconds - (now - self._resumable), (now - self._begun) / (step - self._begun_at)
        wait = [steps_to_wait(left, pace)]
        torch.distributed.broadcast_object_list(wait, src=0)
        self._look_at = step + max(1, wait[0])
        return wait[0] == 0

    def _note(self, state: Any) -> str:
        """The last loss, and this attempt's tokens per second."""
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        first, last = (step * self._run.config.global_batch_size for step in (self._begun_at, state.global_step))
        rate = (self._tokens_seen[last] - self._tokens_seen[first]) / (time.monotonic() - self._begun)
        return (f"loss {losses[-1]:.4f}  " if losses else "") + f"{rate / 1000:.1f}k tok/s"


def steps_to_wait(seconds_left: float, seconds_per_step: float) -> int:
    """Steps until all workers ask the first one's clock again, 0 if a resume point is due.

    Half of the steps that fit into the time: a handful of messages between two resume points, not one a step, and late by
    one step only where the steps keep their pace.
    """
    return 0 if seconds_left <= 0 else max(1, int(seconds_left / seconds_per_step / 2))


@contextmanager
def resume_point(name: str, shards: int | None, folder: Path, events: Any) -> Iterator[str | None]:
    """The folder of the last registered checkpoint of this model, None to start from the beginning.

    Where ZeRO shards the optimizer over `shards` workers and the checkpoint has another number, a folder below `folder` (which
    the workers of a node share) with a universal checkpoint of it. All workers come here.
    """
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        yield None
        return
    with checkpoint.as_directory() as saved:
        owner, _, workers = (Path(saved) / OWNER).read_text().partition(" ")
        if owner != name:
            yield None
        elif shards is None or int(workers) == shards:
            yield saved
        else:
            context = ray.train.get_context()
            problem = convert(Path(saved), folder / "universal") if context.get_local_rank() == 0 else None
            problems: list[str | None] = [None] * context.get_world_size()
            torch.distributed.all_gather_object(problems, problem)  # all nodes have theirs, or all do without
            problem = next(filter(None, problems), None)
            if context.get_world_rank() == 0:
                why = f"its resume point is of {workers} workers, now {shards}"
                events.put(f"{name}: {why}" if problem is None else f"{name} starts again: {why}, and {problem}")
            yield None if problem else str(folder / "universal")
