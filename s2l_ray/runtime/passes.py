"""Passes over data in Ray's tasks: one function of many items, wherever there is room, again where a worker was lost.

Ray Data does the same on a cluster (`data.run_tasks`); here what goes in and comes out is small, and a pass must not cost the
seconds that Ray Data takes to start.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from s2l_ray import errors

# A task is done again so often where its worker or its node is lost.
MAX_RETRIES = 20
Item = TypeVar("Item")
Result = TypeVar("Result")


def in_tasks(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    *,
    num_cpus: int = 1,
    most: int | None = None,
    in_order: bool = True,
) -> Iterator[Result]:
    """What `function(item)` returns for each item, in their order or as the tasks finish. At most `most` tasks are submitted at
    a time, else two for each CPU and two more.

    Raises the S2LError that a task met.
    """
    import ray

    task = ray.remote(num_cpus=num_cpus, max_retries=MAX_RETRIES)(_reported)
    shared, left = ray.put(function), iter(items)
    most = most or 2 + 2 * int(ray.cluster_resources().get("CPU", 1))
    waiting: list[Any] = []

    def submit() -> None:
        for item in itertools.islice(left, most - len(waiting)):
            waiting.append(task.remote(shared, item))  # one by one: what an interruption finds here is cancelled

    try:
        submit()
        while waiting:
            done = waiting[0] if in_order else ray.wait(waiting)[0][0]
            found = ray.get(done)
            waiting.remove(done)
            submit()  # the next one runs while the caller works on this one
            yield _result(found)
    finally:
        for reference in waiting:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.cancel(reference)


def report(error: errors.S2LError | None) -> dict[str, str]:
    """A user's mistake as the columns `error` (its class, empty for none) and `message` of a worker's result."""
    return {"error": type(error).__name__ if error else "", "message": str(error or "")}


def raise_reported(row: Mapping[str, Any]) -> None:
    """Raise the S2LError that a worker's result reports, if there is one."""
    if row["error"]:
        raise getattr(errors, row["error"])(row["message"])


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
