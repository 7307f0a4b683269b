"""One model that a fit trains: what the training loop and its callbacks both need to know."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

import numpy as np

from s2l_ray.config import TrainingConfig
from s2l_ray.training.token_rows import AnyTokenRows


@dataclasses.dataclass(frozen=True)
class TrainingRun:
    """One model of a fit: what is trained on what, and when it is kept."""

    name: str
    config: TrainingConfig
    order: np.ndarray
    """Row numbers of `tokens` in training order, int64 (steps * global_batch_size,)."""

    tokens: AnyTokenRows
    keep_at: Collection[int]
    """Steps after which the model itself is kept (0 is before the first)."""

    fit_steps: int
    """Steps of all models of the fit, for the progress bar."""

    steps_before: int = 0
    """Steps of the models before this one."""

    weights: np.ndarray | None = None
    """How much each row of `tokens` counts, float64 above 0; only ratios inside a batch matter. None: all alike."""
