"""The training loop on a worker, guarded: what ends a fit, what is tried again, and how often.

A group that a lost machine ended starts again as often as need be; one that ends again and again at the same resume point
has something else. Ray Train's own limit counts without asking whether there was progress between.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

from s2l_ray.errors import S2LError, StorageError, cause_of
from s2l_ray.storage.layout import ATTEMPTS
from s2l_ray.storage.places import Storage

MAX_ATTEMPTS = 5
MAX_ATTEMPTS_OF_ANY_SIZE = 20
# Where the storage is away: how often in a training each worker may find it so, and how long it then waits.
MAX_OUTAGES = 20
OUTAGE_SECONDS = 15.0
_STORAGE = f"{StorageError.__name__}: "
# What the first worker sends besides lines and steps: that the workers have begun again, and that there is a group.
RESTARTED, ALIVE = "the workers have begun again", "alive"
ALIVE_SECONDS = 2.0


class FailedAgainError(RuntimeError):
    """A training ended again and again at the same place, by a defect and not by what the user can fix."""


def guarded(train_loop_config: dict[str, Any]) -> None:
    """Run the loop; leave its result, or what the user must fix, where the driver finds it.

    A mistake of the user is not a failure that a restart would heal: it ends the fit instead of being retried.
    """
    import ray.train

    context, outcome = ray.train.get_context(), train_loop_config["outcome"]
    is_first = context.get_world_rank() == 0
    with _alive(train_loop_config["events"]) if is_first else contextlib.nullcontext():
        _prepare_process(train_loop_config["threads"])
        if not outcome.empty():  # a worker met the user's mistake and took the group down
            return
        try:
            if is_first:
                _count_attempt(train_loop_config["work"], context.get_world_size(), train_loop_config["events"])
            result = train_loop_config["loop"](train_loop_config["job"], train_loop_config["events"])
        except Exception as error:
            mistake = error if isinstance(error, FailedAgainError) else cause_of(error)
            if mistake is None or _sits_out(mistake, train_loop_config, context.get_world_size()):
                _note_error(train_loop_config["work"], error)
                raise
            outcome.put(mistake)
            if context.get_world_size() > 1:
                raise  # the others may be waiting for this worker
            return
        if is_first:
            outcome.put(result | {"num_workers": context.get_world_size()})


@contextlib.contextmanager
def _alive(events: Any) -> Iterator[None]:
    """Let the driver know every few seconds that there is a group, however long its work is silent."""
    ended = threading.Event()

    def report() -> None:
        with contextlib.suppress(Exception):  # the driver is gone
            while True:
                events.put(ALIVE)
                if ended.wait(ALIVE_SECONDS):
                    return

    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _prepare_process(threads: int) -> None:
    import torch

    from s2l_ray.runtime.process import keep_freed_memory, quiet_libraries

    quiet_libraries()
    keep_freed_memory()
    torch.set_num_threads(threads)


def _sits_out(mistake: Exception, config: dict[str, Any], world_size: int) -> bool:
    """Whether the storage is away, as it has not been too often yet; then some time has passed, and a new group may try.

    The outages are counted on the driver's node: the storage cannot count them.
    """
    times, seconds = config["patience"]
    if not isinstance(mistake, StorageError) or not mistake.is_transient or config["outages"].qsize() >= times * world_size:
        return False
    config["outages"].put(None)
    config["events"].put(f"begins again in {seconds:.0f} s: {mistake}")
    time.sleep(seconds)
    return True


def _note_error(work: Storage, error: Exception) -> None:
    """Keep what ended this group, for the case that it ends every one."""
    with contextlib.suppress(S2LError):
        work.write_json(ATTEMPTS, (work.read_json(ATTEMPTS) or {}) | {"error": f"{type(error).__name__}: {error}"[:2000]})


def _count_attempt(work: Storage, world_size: int, events: Any) -> None:
    """Let the driver know of a group that is not the first; raise FailedAgainError or S2LError if one began here too often."""
    import ray.train

    checkpoint = ray.train.get_checkpoint()
    start = str(checkpoint.path) if checkpoint else "the beginning"
    last = work.read_json(ATTEMPTS) or {}
    if last:
        events.put(RESTARTED)
    last = last if last.get("from") == start else {}
    total, number = last.get("total", 0) + 1, last.get("number", 0) + 1 if last.get("workers") == world_size else 1
    if number > MAX_ATTEMPTS or total > MAX_ATTEMPTS_OF_ANY_SIZE:
        if last.get("error", "").startswith(_STORAGE):
            raise StorageError(last["error"].removeprefix(_STORAGE))
        if "error" in last:
            raise FailedAgainError(f"the training ended {total - 1} times from {start}, at last with {last['error']}")
        raise S2LError(
            f"the training was ended {total - 1} times before it got to a new resume point (from {start}). Where machines are "
            "lost that often, lower checkpoint_every_minutes; RAY_LOG_TO_DRIVER=1 shows what workers print."
        )
    work.write_json(ATTEMPTS, {"from": start, "workers": world_size, "number": number, "total": total})
