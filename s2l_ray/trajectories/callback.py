"""Trajectories from anybody's Trainer: a callback that scores every example of a dataset at the recorded steps.

    recorder = s2l_ray.RecordTrajectories("trajectories", dataset, num_checkpoints=12)
    Trainer(model, args, train_dataset=dataset, callbacks=[recorder]).train()  # then: s2l select trajectories ...

The training is the same with and without it: a model comes back in the mode it was in, and no random number is drawn. What
cannot be recorded is refused before the first step.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.distributed
from accelerate.utils import extract_model_from_parallel, send_to_device
from numpy.typing import NDArray
from transformers import TrainerCallback, default_data_collator

from s2l_ray.config import Schedule
from s2l_ray.errors import ArtifactError, ConfigError, DataError
from s2l_ray.progress import duration, get_log
from s2l_ray.storage.artifacts import Artifact
from s2l_ray.storage.places import Storage
from s2l_ray.training.losses import example_losses, statistics_of_models
from s2l_ray.training.schedule import recorded_steps
from s2l_ray.training.token_rows import TokenRows
from s2l_ray.trajectories.dataset_rows import DatasetRows, tokens_of
from s2l_ray.trajectories.loss_columns import STATISTICS
from s2l_ray.trajectories.parts import recorded_files
from s2l_ray.trajectories.recording import finish_recording, forget_steps, has_statistics, note_dropped, record_losses
from s2l_ray.trajectories.scored_training import check_logits, check_training, scoring

_log = get_log("trajectories")


class RecordTrajectories(TrainerCallback):  # type: ignore[misc]
    """Records the loss of every row of `dataset` at the recorded steps of a training, and finishes the store at its end.

    `directory`: path or URI of the trajectory store. `dataset`: rows as mappings, with a length, the ids in the column
    `example_id` (and names of sub-datasets in `source`, where there is such a column); it may be another than is trained on.
    `num_checkpoints`, `schedule`, `every_steps`, `include_untrained`: as in `recorded_steps`.

    Causal language models need no more: rows have `input_ids` and `labels` (-100 where nothing is learned), and the loss is
    the mean cross-entropy in nats over a row's labels. For any other model `loss_function(model, batch)` gives a loss per
    example, a tensor (B,); batches of `batch_size` rows are made by `collator` and are on the model's device.

    `statistics`: record also the statistics of `record_losses`, of causal language models only.

    `tokens_per_batch`: padded tokens scored at once. `precision`: `float32` or `bfloat16` for the forward pass, whatever the
    training's own mixed precision is; a model whose weights are in half precision is scored in bfloat16.

    Raises ConfigError, DataError or ArtifactError before the first step where this training cannot be recorded.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        dataset: Any,
        *,
        example_id: str = "example_id",
        num_checkpoints: int = 12,
        schedule: Schedule = "equal",
        every_steps: int | None = None,
        include_untrained: bool = False,
        source: str = "source",
        loss_function: Callable[[Any, Any], torch.Tensor] | None = None,
        collator: Callable[[list[Any]], Any] | None = None,
        batch_size: int = 32,
        tokens_per_batch: int = 4096,
        precision: str = "float32",
        statistics: bool = False,
    ) -> None:
        if precision not in {"float32", "bfloat16"}:
            raise ConfigError(f"precision: '{precision}' is unknown. Give float32 or bfloat16.")
        if batch_size < 1 or tokens_per_batch < 1:
            raise ConfigError("batch_size and tokens_per_batch are numbers above 0.")
        if statistics and loss_function is not None:
            raise ConfigError("statistics: a loss_function gives one loss per example, none per token. Leave one of them out.")
        self._storage, self._has_statistics = Storage(os.fspath(directory)), statistics
        self._rows = DatasetRows(dataset, example_id, source)
        self._schedule: dict[str, Any] = {
            "num_checkpoints": num_checkpoints,
            "schedule": schedule,
            "every_steps": every_steps,
            "include_untrained": include_untrained,
        }
        self._loss_function, self._collator = loss_function, collator or default_data_collator
        self._batch_size, self._tokens_per_batch, self._precision = batch_size, tokens_per_batch, precision
        self._steps: list[int] = []
        self._share: _Share | None = None

    # --- what the Trainer calls ---

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:  # noqa: ARG002
        self._steps = recorded_steps(state.max_steps, **self._schedule)
        self._share = None
        if self._is_recorded_to_the_end(state.global_step):
            return
        check_training(args, model)
        model = extract_model_from_parallel(model)
        with scoring(model):
            ids = self._rows.checked_ids()
            self._share = self._share_of(range(args.process_index, len(ids), args.world_size), ids, model)
        dropped = _sum_of_ranks(self._share.num_dropped, args)
        if dropped == len(ids):
            raise DataError("dataset: no row has a label to learn. Labels are input_ids, with -100 where nothing is learned.")
        if args.process_index == 0:
            self._take_up(state.global_step)
            note_dropped(self._storage.uri, {"no_response_token": dropped} if dropped else {})
        _wait_for_all(args)
        if state.global_step == 0 and 0 in self._steps:
            self._record(0, args, model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:  # noqa: ARG002
        if state.global_step in self._steps:
            self._record(state.global_step, args, extract_model_from_parallel(model))

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        if self._share is None:
            return
        if args.process_index == 0:
            missing = [step for step in self._steps if step not in recorded_files(self._storage)]
            if missing:
                _log.warning(
                    "%s is unfinished: the training ended before step %d. Resume it, or "
                    "s2l_ray.finish_recording(%r) finishes with the steps that are there",
                    *(self._storage.uri, missing[0], self._storage.uri),
                )
            else:
                finish_recording(self._storage.uri)
        _wait_for_all(args)

    # --- how it is done ---

    def _is_recorded_to_the_end(self, global_step: int) -> bool:
        """Whether the store is finished and the training is, too. Raises ArtifactError where only the store is."""
        found = Artifact.find(self._storage)
        if found is None:
            return False
        if global_step < self._steps[-1] or found.summary.get("steps") != self._steps:
            raise ArtifactError(
                f"{self._storage.uri}: finished, and this training has steps to record. Give another directory, or remove it."
            )
        return True

    def _take_up(self, global_step: int) -> None:
        """Keep what was recorded up to the step from which the training goes on, remove what it will record again.

        Raises ArtifactError where the directory has steps of another schedule, lacks steps that are past, or has these with
        statistics and this training records none, or the other way round.
        """
        found = list(recorded_files(self._storage))
        foreign = [step for step in found if step not in self._steps]
        if foreign:
            raise ArtifactError(
                f"{self._storage.uri}: holds losses of steps {_named(foreign)}, but this training records steps "
                f"{_named(self._steps)}. Give another directory, or remove it."
            )
        again = [step for step in found if step > global_step or global_step == 0]
        lacking = [step for step in self._steps if step <= global_step and step not in found and global_step > 0]
        if lacking:
            raise ArtifactError(
                f"{self._storage.uri}: the training goes on after step {global_step}, but steps {_named(lacking)} are not "
                "recorded there. Give the directory of its first part, or train from the beginning."
            )
        kept = [step for step in found if step not in again]
        if kept and has_statistics(self._storage, kept[0]) != self._has_statistics:
            raise ArtifactError(
                f"{self._storage.uri}: step {kept[0]} is recorded with{'out' if self._has_statistics else ''} statistics. Go "
                f"on with statistics={not self._has_statistics}, or give another directory and train from the beginning."
            )
        if again:
            _log.info("%s: steps %s of an earlier attempt are recorded again", self._storage.uri, _named(again))
        forget_steps(self._storage.uri, again)

    def _record(self, step: int, args: Any, model: Any) -> None:
        assert self._share is not None, "on_train_begin makes the share"
        begun = time.monotonic()
        with scoring(model):
            losses, *statistics = self._share.losses(model)
        record_losses(
            self._storage.uri,
            step,
            self._share.example_ids,
            losses,
            source=self._share.sources,
            num_response_tokens=self._share.num_response_tokens,
            statistics=dict(zip(STATISTICS, statistics, strict=True)) if statistics else None,
        )
        _wait_for_all(args)
        if args.process_index == 0:
            seconds = duration(time.monotonic() - begun)
            _log.info("step %d of %d: %s losses recorded in %s", step, self._steps[-1], f"{len(losses):,}", seconds)

    def _share_of(self, numbers: range, ids: pa.Array, model: Any) -> _Share:
        """What this process scores: the rows with these numbers."""
        numbers_M = np.asarray(numbers, np.int64)
        if self._loss_function is not None:
            return _Share(ids.take(pa.array(numbers_M)), self._rows.sources(numbers_M), None, self._function_losses(numbers))
        tokens = TokenRows.of([tokens_of(self._rows.dataset[i], f"row {ids[i].as_py()!r}") for i in numbers])
        kept_M = np.flatnonzero(tokens.num_labels > 0)
        tokens, kept_M = tokens.take(kept_M), numbers_M[kept_M]
        if len(tokens):
            check_logits(model, tokens[int(np.argmax(tokens.lengths))][0])

        # Weights of half the precision cannot give more than that.
        is_half = any(p.dtype in {torch.bfloat16, torch.float16} for p in model.parameters())
        precision = "bfloat16" if is_half else self._precision

        def losses(model: Any) -> Sequence[NDArray[np.float32]]:
            if self._has_statistics:
                return next(statistics_of_models([model], tokens, self._tokens_per_batch, precision))
            return [example_losses(model, tokens, tokens_per_batch=self._tokens_per_batch, precision=precision)]

        num_dropped = len(numbers_M) - len(kept_M)
        return _Share(
            ids.take(pa.array(kept_M)), self._rows.sources(kept_M), tokens.num_labels, losses, num_dropped=num_dropped
        )

    def _function_losses(self, numbers: range) -> Callable[[Any], Sequence[NDArray[np.float32]]]:
        """Scores the rows with these numbers by the user's function, batch by batch."""
        function = self._loss_function
        assert function is not None

        def losses(model: Any) -> Sequence[NDArray[np.float32]]:
            device = next(model.parameters()).device
            found = [torch.zeros(0)]
            for start in range(0, len(numbers), self._batch_size):
                some = numbers[start : start + self._batch_size]
                batch = send_to_device(self._collator([self._rows.without_names(i) for i in some]), device)
                with torch.autocast(device.type, torch.bfloat16, enabled=self._precision == "bfloat16"):
                    losses_B = function(model, batch)
                if not isinstance(losses_B, torch.Tensor) or losses_B.shape != (len(some),):
                    shape = tuple(losses_B.shape) if isinstance(losses_B, torch.Tensor) else type(losses_B).__name__
                    raise DataError(
                        f"loss_function: gave {shape} for a batch of {len(some)} rows, expected a tensor of shape "
                        f"({len(some)},): one loss per example, not their mean. Compute it with reduction='none'."
                    )
                found.append(losses_B.float().cpu())
            return [torch.cat(found).numpy()]

        return losses


@dataclass(frozen=True)
class _Share:
    """The rows that one process scores, M of them."""

    example_ids: pa.Array
    sources: list[Any] | None
    num_response_tokens: NDArray[np.int32] | None
    losses: Callable[[Any], Sequence[NDArray[np.float32]]]
    """The loss of each row under a model, (M,), and where they are recorded the statistics."""

    num_dropped: int = 0
    """Rows besides these that have no label."""


def _wait_for_all(args: Any) -> None:
    if args.world_size > 1:
        torch.distributed.barrier()


def _sum_of_ranks(count: int, args: Any) -> int:
    if args.world_size == 1:
        return count
    counts: list[int] = [0] * args.world_size
    torch.distributed.all_gather_object(counts, count)
    return sum(counts)


def _named(steps: list[int]) -> str:
    return ", ".join(map(str, steps))
