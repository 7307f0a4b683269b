"""The Ray actors of k-means: a slot of rows each, made again from files and its log where a process or a node is lost."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from s2l_ray.clustering.feature_files import FeatureFiles, Interval
from s2l_ray.clustering.slot import Operation, SlotsActor
from s2l_ray.errors import ConfigError, S2LError
from s2l_ray.progress import duration, get_log
from s2l_ray.runtime.passes import raise_reported
from s2l_ray.runtime.room import nodes

# For so long a new actor is waited for before a living one takes over the rows of the lost one.
START_SECONDS = 30.0
# Losses in a row, without an answer between them, after which it is not the machines.
MAX_LOSSES = 8
_log = get_log("clustering")


class Actors:
    """So many actors of one CPU. What a slot has done is kept here until its stratum is done with."""

    def __init__(self, num_workers: int) -> None:
        import ray

        num_cpus = int(ray.cluster_resources().get("CPU", 0))
        if num_cpus < num_workers:
            raise ConfigError(
                f"machines.clustering.num_workers: {num_workers} Ray actors of one CPU each, but this Ray has "
                f"{num_cpus} CPUs. Set it to {num_cpus} or less, or start more nodes first."
            )
        self._actors: list[Any] = [None] * num_workers
        """None where one was lost and could not be replaced."""

        self._hosts = list(range(num_workers))
        """The actor that each slot is in."""

        self._source: Any = None
        self._intervals: list[dict[int, Interval]] = [{} for _ in range(num_workers)]
        self._logs: list[list[tuple[int, Operation]]] = [[] for _ in range(num_workers)]
        """What decides the state of each slot, with the stratum that it is about."""

        self._unmade = set(range(num_workers))
        """Slots that must be made, or made again, before they are used."""

        self.recovery_seconds: list[float] = []
        """From each loss until there was an answer again."""

    def __len__(self) -> int:
        return len(self._hosts)

    def load(self, source: FeatureFiles, intervals: Sequence[Mapping[int, Interval]]) -> None:
        """Start the actors, and give every slot its rows: for each stratum an interval."""
        import ray

        self._actors = [_start() for _ in self._actors]
        for host in range(len(self)):
            self._await(host)
        self._source = ray.put(source)
        self._intervals = [dict(of_slot) for of_slot in intervals]
        slots = range(len(self))
        self.call(slots, [("num_rows", ())] * len(slots))

    def call(self, slots: Sequence[int], operations: Sequence[Operation], stratum: int | None = None) -> list[Any]:
        """What the slots return, each for its operation. One that changes their state names the stratum that it is about."""
        pending = [self._submit(slot, operation) for slot, operation in zip(slots, operations, strict=True)]
        found = []
        for slot, operation, asked in zip(slots, operations, pending, strict=True):
            done = self._wait(asked, lambda slot=slot, operation=operation: self._submit(slot, operation))  # type: ignore[misc]
            raise_reported(done.mistake)
            found.append(done.value)
            if stratum is not None:
                self._logs[slot].append((stratum, operation))
        return found

    def run(self, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """What a function returns for each of some arguments, and the threads of the actor that it runs in."""
        import ray

        shared = ray.put(arguments)

        def submit(number: int) -> tuple[int, Any, Any]:
            host = self._hosts[number % len(self)]
            return host, self._actors[host], self._actors[host].run.remote(function, shared, number)

        pending = [submit(number) for number in range(len(arguments))]
        return [self._wait(asked, lambda number=number: submit(number)) for number, asked in enumerate(pending)]  # type: ignore[misc]

    def forget(self, stratum: int, names: Sequence[str]) -> None:
        """A stratum is done with: its rows are given up."""
        slots = [slot for slot in range(len(self)) if slot not in self._unmade]
        self.call(slots, [("close", (stratum, list(names)))] * len(slots))
        for slot in range(len(self)):
            self._intervals[slot].pop(stratum, None)
            self._logs[slot] = [entry for entry in self._logs[slot] if entry[0] != stratum]

    def close(self) -> None:
        """End the actors."""
        import ray

        for actor in filter(None, self._actors):
            with contextlib.suppress(ray.exceptions.RayError):
                ray.kill(actor)

    def _submit(self, slot: int, operation: Operation) -> tuple[int, Any, Any]:
        """The actor that is asked, by its number and its handle, and its answer to be."""
        host = self._hosts[slot]
        actor = self._actors[host]
        if slot not in self._unmade:
            return host, actor, actor.do.remote(slot, [operation])
        self._unmade.discard(slot)
        operations: list[Operation] = [("load", (self._intervals[slot],)), *(done for _, done in self._logs[slot]), operation]
        return host, actor, actor.do.remote(slot, operations, self._source)

    def _wait(self, asked: tuple[int, Any, Any], again: Callable[[], tuple[int, Any, Any]]) -> Any:
        """An answer; where the actor was lost, that of another."""
        import ray

        begun: float | None = None
        for _ in range(MAX_LOSSES):
            host, actor, answer = asked
            try:
                found = ray.get(answer)
            except (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError):
                begun = begun or time.monotonic()
                if actor is self._actors[host]:
                    self._replace(host)
                asked = again()
                continue
            if begun is not None:
                self.recovery_seconds.append(time.monotonic() - begun)
                _log.info("%s after an actor was lost, the work goes on", duration(self.recovery_seconds[-1]))
            return found
        raise S2LError(
            f"an actor of k-means was lost {MAX_LOSSES} times in a row. Where its memory ran out, raise "
            "machines.clustering.num_workers or add nodes; RAY_LOG_TO_DRIVER=1 shows what actors print."
        )

    def _replace(self, host: int) -> None:
        """Another actor in the place of one that was lost or, where there is no room for it, others for its slots."""
        import ray

        with contextlib.suppress(ray.exceptions.RayError):
            ray.kill(self._actors[host])
        self._unmade |= {slot for slot, at in enumerate(self._hosts) if at == host}
        _log.warning("lost an actor with a share of the rows: starting another (%s)", nodes())
        self._actors[host] = _start()
        self._await(host)

    def _await(self, host: int) -> None:
        """Wait until an actor is up; where there is no room for it and there are others, its slots are theirs."""
        import ray

        others = [number for number, actor in enumerate(self._actors) if actor is not None and number != host]
        try:
            ray.get(self._actors[host].ready.remote(), timeout=START_SECONDS if others else None)
        except ray.exceptions.GetTimeoutError:
            ray.kill(self._actors[host])
            self._actors[host] = None
            for slot in [slot for slot, at in enumerate(self._hosts) if at == host]:
                self._hosts[slot] = min(others, key=self._hosts.count)
            _log.warning("there is no room for another actor: %d left", len(others))
        except ray.exceptions.RayActorError:
            pass  # whoever asks it next finds out


def _start() -> Any:
    import ray

    return ray.remote(num_cpus=1)(SlotsActor).remote()
