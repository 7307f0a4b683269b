"""Room for workers on the machines of the connected Ray: asking for it, waiting for it, and words for what is missing."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from s2l_ray.errors import ConfigError
from s2l_ray.progress import duration, get_log

WAIT_LINE_SECONDS = 30.0
# How long a claim on room that is there may take until it is granted.
GRANT_SECONDS = 2.0
# Whether Ray runs on this machine alone, which never grows; the connection sets it.
is_one_machine = False


def await_room(stage: str, worker: Mapping[str, float], count: int, minutes: float) -> None:
    """Wait until the connected Ray has room for `count` workers with such resources; what it lacks an autoscaler is asked for.

    Raises ConfigError that names what is missing: after `minutes`, and at once on this machine alone, which never grows.
    """
    import ray

    begun = reported = time.monotonic()
    with _claim(worker, count) as room:
        while not room.wait(GRANT_SECONDS):
            there = ray.cluster_resources()
            grows = not is_one_machine or all(there.get(name, 0) >= amount * count for name, amount in worker.items())
            waited = time.monotonic() - begun
            if waited > 60 * minutes or not grows:
                raise no_room(stage, worker, count, waited if grows else None)
            if reported == begun or time.monotonic() - reported > WAIT_LINE_SECONDS:
                reported = time.monotonic()
                get_log(stage).info(waiting(worker, count))


@contextlib.contextmanager
def _claim(worker: Mapping[str, float], count: int) -> Iterator[Any]:
    """A placement group of so many workers, given back at the end."""
    from ray.util import placement_group, remove_placement_group

    room = placement_group([dict(worker)] * count, strategy="PACK")
    try:
        yield room
    finally:
        remove_placement_group(room)


def free_room(worker: Mapping[str, float], most: int) -> int:
    """How many workers with such resources, `most` at most, the nodes of the connected Ray have room for now.

    What is free on each node only a claim can tell: so many are asked for as are free on all nodes together, then fewer.
    """
    import ray

    free = ray.available_resources()
    number = min([most, *(int(free.get(name, 0) // amount) for name, amount in worker.items() if amount)])
    while number > 0:
        with _claim(worker, number) as room:
            if room.wait(GRANT_SECONDS):
                return number
        number -= 1
    return 0


def claims(worker: Mapping[str, float]) -> dict[str, bool]:
    """This job's placement groups of workers with such resources by their ids, and whether they have their room."""
    import ray
    from ray.util import placement_group_table

    job = ray.get_runtime_context().get_job_id()  # the end of the ids of what belongs to it
    groups = {name: group for name, group in placement_group_table().items() if name.endswith(job)}
    return {
        name: group["state"] == "CREATED"
        for name, group in groups.items()
        if group["state"] != "REMOVED" and all(dict(bundle) == dict(worker) for bundle in group["bundles"].values())
    }


def give_up(names: Iterable[str]) -> None:
    """Remove placement groups by their ids: those of a killed actor live as long as the job does."""
    import ray
    from ray.util import remove_placement_group
    from ray.util.placement_group import PlacementGroup

    for name in names:
        remove_placement_group(PlacementGroup(ray.PlacementGroupID.from_hex(name)))


def waiting(worker: Mapping[str, float], count: int) -> str:
    """What is waited for, and what the connected Ray has free, in words."""
    import ray

    return f"waiting for {_asked(worker, count)}; free: {amounts(ray.available_resources())} on {nodes()}"


def no_room(stage: str, worker: Mapping[str, float], count: int, waited: float | None) -> ConfigError:
    """The error of a stage for which there was no room in so many seconds, or can be none."""
    import ray

    there = amounts(ray.cluster_resources())
    return ConfigError(
        f"machines.{stage} asks for {_asked(worker, count)}; Ray has {there} on {nodes()}"
        + ("" if waited is None else f" after {duration(waited)}")
        + f". Ask for less, add machines, or raise machines.{stage}.wait_minutes; the same command goes on."
    )


def _asked(worker: Mapping[str, float], count: int) -> str:
    return f"{count} worker{'s' * (count > 1)} of {amounts(worker)}"


def nodes() -> str:
    """How many nodes the connected Ray has, in words."""
    import ray

    number = sum(node["Alive"] for node in ray.nodes())
    return f"{number} node{'s' * (number != 1)}"


def amounts(resources: Mapping[str, float]) -> str:
    """CPUs and GPUs in words."""
    named = {name: resources.get(name, 0) for name in ("CPU", "GPU")}
    return " and ".join(f"{amount:g} {name}" for name, amount in named.items() if amount) or "nothing"
