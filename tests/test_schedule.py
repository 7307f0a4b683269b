"""The recorded steps: as many as asked for, in order, and the last one always."""

from __future__ import annotations

import itertools
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s2l_ray.config import Schedule
from s2l_ray.errors import ConfigError
from s2l_ray.training.schedule import recorded_steps

SCHEDULES = get_args(Schedule)


def is_ascending(steps: list[int]) -> bool:
    return all(left < right for left, right in itertools.pairwise(steps))


@given(st.sampled_from(SCHEDULES), st.integers(1, 60), st.integers(0, 5_000))
def test_there_are_as_many_steps_as_asked_for_in_order_and_the_last_is_the_trainings(schedule, points, more):
    # Only a third of the training has room for the points of three schedules.
    total = (1 if schedule in {"equal", "logarithmic"} else 3) * points + more
    steps = recorded_steps(total, num_checkpoints=points, schedule=schedule)
    assert len(steps) == points
    assert is_ascending(steps)
    assert steps[0] >= 1
    assert steps[-1] == total


@given(st.integers(1, 500), st.integers(1, 500))
def test_every_so_many_steps_and_after_the_last(total, every):
    steps = recorded_steps(total, every_steps=every)
    assert is_ascending(steps)
    assert steps[-1] == total
    assert set(steps) == {step for step in range(1, total + 1) if step % every == 0} | {total}


@given(st.sampled_from(SCHEDULES), st.integers(1, 20))
def test_the_untrained_model_comes_first_and_moves_nothing_else(schedule, points):
    plain = recorded_steps(500, num_checkpoints=points, schedule=schedule)
    assert recorded_steps(500, num_checkpoints=points, schedule=schedule, include_untrained=True) == [0, *plain]


@given(st.integers(2, 30))
def test_three_schedules_are_dense_in_their_third(points):
    total = 3_000
    bounds = {"early": (0, 1_000), "middle": (1_000, 2_000), "late": (2_000, 3_000)}
    for schedule, (low, high) in bounds.items():
        steps = recorded_steps(total, num_checkpoints=points, schedule=schedule)
        assert sum(low <= step <= high for step in steps) >= points - 1


def test_logarithmic_steps_have_equal_ratios():
    assert recorded_steps(10_000, num_checkpoints=4, schedule="logarithmic") == [10, 100, 1_000, 10_000]


@given(st.sampled_from(SCHEDULES), st.integers(1, 50), st.integers(0, 49))
def test_more_points_than_steps_are_refused(schedule, points, total):
    if total >= points:
        total = points - 1
    with pytest.raises(ConfigError, match=f"the training has {total} steps"):
        recorded_steps(total, num_checkpoints=points, schedule=schedule)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"schedule": "often"}, "'often' is unknown. Schedules: equal, logarithmic"),
        ({"num_checkpoints": 0}, "above 0"),
        ({"every_steps": 0}, "above 0"),
    ],
)
def test_what_means_nothing_is_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        recorded_steps(100, **arguments)
