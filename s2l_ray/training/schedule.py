"""When losses are recorded: the steps of a training after which a checkpoint is kept or scored.

A function of the number of steps alone, which no number of workers changes: point i of a trajectory means the same
examples seen everywhere. The last step is always recorded.
"""

from __future__ import annotations

from typing import get_args

from s2l_ray.config import Schedule
from s2l_ray.errors import ConfigError


def recorded_steps(
    total_steps: int,
    *,
    num_checkpoints: int = 12,
    schedule: Schedule = "equal",
    every_steps: int | None = None,
    include_untrained: bool = False,
) -> list[int]:
    """The recorded steps of `total_steps`, ascending; 0 first where the untrained model is recorded besides.

    `equal`: point i of T after step round(i * S / T). `logarithmic`: after S**(i / T), a step later where two fall together.
    `early`, `middle`, `late`: dense in that third of the training, T - 1 points at equal distances and the last step (late: T
    points, of which the last step is one). `every_steps` instead: after every so many steps, and after the last.

    Raises ConfigError where there are fewer steps than points, for an unknown schedule and for numbers below 1.
    """
    if schedule not in get_args(Schedule):
        raise ConfigError(f"schedule: '{schedule}' is unknown. Schedules: {', '.join(get_args(Schedule))}.")
    if num_checkpoints < 1 or (every_steps is not None and every_steps < 1):
        raise ConfigError("num_checkpoints and every_steps are numbers above 0.")
    if every_steps is not None:
        steps = [*range(every_steps, total_steps, every_steps), total_steps]
    elif schedule == "logarithmic":
        steps = _logarithmic(total_steps, num_checkpoints)
    else:
        steps = _dense(total_steps, num_checkpoints, schedule)
    if total_steps < 1 or len(set(steps)) < len(steps) or steps[0] < 1:
        raise ConfigError(
            f"num_checkpoints={num_checkpoints} with the schedule '{schedule}', but the training has {total_steps} steps. "
            "Ask for fewer, train more epochs, or use a smaller batch (proxy.num_checkpoints, proxy.global_batch_size)."
        )
    return [0, *steps] if include_untrained else steps


def _logarithmic(total: int, points: int) -> list[int]:
    """Points at equal ratios, each a step at least after the one before."""
    steps: list[int] = []
    for i in range(1, points + 1):
        wished = round(total ** (i / points)) if total > 0 else 0
        steps.append(max(wished, steps[-1] + 1 if steps else 1))
    # Only where there are about as many points as steps do the later ones have to give way.
    return [min(step, total - (points - i)) for i, step in enumerate(steps, 1)]


def _dense(total: int, points: int, schedule: str) -> list[int]:
    """Points at equal distances over the whole training, or over one third of it and then the last step."""
    if schedule == "equal":
        return [round(i * total / points) for i in range(1, points + 1)]
    third = ("early", "middle", "late").index(schedule)
    inside = points if schedule == "late" else points - 1
    steps = [round(total * (third * inside + i) / (3 * inside)) for i in range(1, inside + 1)]
    return steps if schedule == "late" else [*steps, total]
