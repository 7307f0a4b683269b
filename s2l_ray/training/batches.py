"""Which rows a training sees in which step, and how a step's rows are spread over workers and micro-batches.

The order does not depend on the workers: epoch after epoch a hash permutation, cut into steps of exactly
`global_batch_size` rows. Any number of workers takes them: a step's loss is the mean over its own labels, wherever its
rows are computed, so that checkpoint i means the same on one worker or on sixty-four. `fit` and `plan` share this rule.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa

from s2l_ray.errors import ConfigError, DataError
from s2l_ray.examples.ids import priorities

# The most rows of a forward pass with `auto`.
DEVICE_BATCH = 32
# Stands in the length-balanced order where a worker is a row short.
NO_ROW = -1


@dataclasses.dataclass(frozen=True)
class BatchPlan:
    """How a global batch is spread: workers x accumulated micro-batches of at most `device_batch` rows."""

    global_batch: int
    num_workers: int
    device_batch: int
    accumulate: int

    @classmethod
    def of(cls, global_batch: int, num_workers: int, device_batch: int | str) -> BatchPlan:
        """As few micro-batches as there can be with at most `device_batch` rows ("auto": 32), and those as even as can be.

        Raises ConfigError where there are more workers than rows.
        """
        if num_workers > global_batch:
            raise ConfigError(
                f"{num_workers} workers, but a batch has global_batch_size={global_batch} examples. "
                "Ask for fewer workers or a larger batch."
            )
        share = -(-global_batch // num_workers)
        accumulate = -(-share // (device_batch if isinstance(device_batch, int) else DEVICE_BATCH))
        return cls(global_batch, num_workers, -(-share // accumulate), accumulate)

    @property
    def num_places(self) -> int:
        """Places for rows in a step: at least its rows, and more where these do not go evenly into the micro-batches."""
        return self.num_workers * self.device_batch * self.accumulate

    def __str__(self) -> str:
        return (
            f"accumulate {self.accumulate} micro-batches: {self.global_batch} global / "
            f"({self.num_workers} workers x {self.device_batch})"
        )


def num_steps(num_rows: int, epochs: float, global_batch: int) -> int:
    """Optimizer steps: the examples of all epochs in whole batches."""
    return math.floor(num_rows * epochs / global_batch)


def check_steps(steps: int, section: str) -> None:
    """Raise DataError where the examples of all epochs do not fill one batch."""
    if steps < 1:
        raise DataError(
            f"{section}: {section}.epochs passes over the examples do not fill one batch of {section}.global_batch_size. "
            "Train more epochs, use a smaller batch or more examples."
        )


def subset_steps(num_examples: int, epochs: float, global_batch: int) -> int:
    """Optimizer steps on a subset: the batches of all its epochs, the last one filled up. Examples that the target loses to
    their length do not shorten it: subsets of one size are trained equally long."""
    return math.ceil(round(num_examples * epochs / global_batch, 9))


def data_order(example_ids: list[str] | pa.ChunkedArray, steps: int, global_batch: int, seed: int) -> np.ndarray:
    """Row numbers in training order, int64 (steps * global_batch,): a hash permutation for each epoch, one after the other."""
    length = steps * global_batch if len(example_ids) else 0
    blocks = example_ids.chunks if isinstance(example_ids, pa.ChunkedArray) else [example_ids]

    def permutation(epoch: int) -> np.ndarray:
        return np.argsort(np.concatenate([priorities(block, f"{seed}-epoch-{epoch}") for block in blocks]), kind="stable")

    passes = map(permutation, range(math.ceil(length / max(1, len(example_ids)))))
    return np.concatenate([np.zeros(0, np.int64), *passes])[:length]


class StepByStep:
    """An array that is computed as it is read, the places of one step at a time: a training of any length keeps one step."""

    def __init__(self, steps: int, num_places: int, compute: Callable[[int], np.ndarray]) -> None:
        """`compute(step)`: the values at the `num_places` places of a step, counted from 0."""
        self._steps, self._num_places, self._compute = steps, num_places, functools.lru_cache(maxsize=2)(compute)

    def __len__(self) -> int:
        return self._steps * self._num_places

    def __getitem__(self, place: int) -> Any:
        step, within = divmod(place, self._num_places)
        return self.at_step(step)[within]

    def at_step(self, step: int) -> np.ndarray:
        """The values at all places of a step."""
        return self._compute(step)


def batch_weights(places: np.ndarray, weights: np.ndarray, plan: BatchPlan) -> np.ndarray:
    """How much the row at each place of `length_balanced_order` counts, float32 of its shape: the row's weight over the mean
    weight of its step's rows, and exactly 1 where these are all alike. 0 where there is no row.

    The same for any number of workers: a step's weights are added in ascending order.
    """
    is_row = places != NO_ROW
    found = np.where(is_row, weights[places], 0.0).reshape(-1, plan.num_places)
    rows = np.sort(found, axis=1)[:, plan.num_places - plan.global_batch :]
    means = np.where(rows[:, :1] == rows[:, -1:], rows[:, :1], rows.mean(axis=1, keepdims=True))
    return np.asarray((found / means).ravel(), np.float32)


def length_balanced_order(order: np.ndarray, lengths: np.ndarray, plan: BatchPlan) -> np.ndarray:
    """The rows of every step at their places in micro-batches of similar length, int64 (steps * plan.num_places,).

    `order`: row numbers, (steps * plan.global_batch,); `lengths`: tokens per row. A step keeps its rows, so its gradient is
    the same however they lie; but little of a batch is padding, and no worker waits for one with longer rows. Micro-batch a
    of worker r stands at places a * workers + r, where the Trainer takes it. The workers' shares differ by one row at most,
    and the micro-batches of one worker too; places that are left have NO_ROW.
    """
    steps = order.reshape(-1, plan.global_batch)
    by_length = np.take_along_axis(steps, np.argsort(-lengths[steps], axis=1, kind="stable"), axis=1)
    places = np.full((len(steps), plan.accumulate, plan.num_workers, plan.device_batch), NO_ROW, np.int64)
    for worker in range(plan.num_workers):
        share = by_length[:, worker :: plan.num_workers]
        for number, rows in enumerate(np.array_split(share, plan.accumulate, axis=1)):
            places[:, number, worker, : rows.shape[1]] = rows
    return places.ravel()
