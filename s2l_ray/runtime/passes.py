"""Passes over data in Ray's tasks: one function of many items, wherever there is room, again where a worker was lost.

Ray Data does the same for rows that it reads (`data.run_tasks`); here what goes in and comes out is small, and a pass must
not cost the second that starting a dataset takes.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from s2l_ray import errors
from s2l_ray.runtime.data import raise_reported, report

# A task is done again so often where its worker or its node is lost.
MAX_RETRIES = 20
Item = TypeVar("Item")
Result = TypeVar("Result")


def in_tasks(function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """What `function(item)` returns for each item, in their order: tasks of one CPU, a few ahead of the results.

    Raises the S2LError that a task met.
    """
    import ray

    task = ray.remote(num_cpus=1, max_retries=MAX_RETRIES)(_reported)
    shared = ray.put(function)
    most = 2 + 2 * int(ray.cluster_resources().get("CPU", 1))
    waiting: deque[Any] = deque()
    try:
        for item in items:
            if len(waiting) >= most:
                yield _result(ray.get(waiting.popleft()))
            waiting.append(task.remote(shared, item))
        while waiting:
            yield _result(ray.get(waiting.popleft()))
    finally:
        for reference in waiting:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.cancel(reference)


def _reported(function: Callable[[Any], Any], item: Any) -> tuple[dict[str, str], Any]:
    """A user's mistake as a value: raised in a worker, it would come back inside Ray's traceback."""
    try:
        return report(None), function(item)
    except Exception as met:
        error = errors.cause_of(met)
        if error is None:
            raise
        return report(error), None


def _result(reported: tuple[dict[str, str], Any]) -> Any:
    mistake, value = reported
    raise_reported(mistake)
    return value
