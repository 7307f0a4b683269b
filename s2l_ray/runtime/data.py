"""Ray Data as the stages use it: without its own bars and lines, and with a user's mistakes reported as they are."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from s2l_ray import errors
from s2l_ray.config import WorkerConfig
from s2l_ray.runtime import room
from s2l_ray.runtime.passes import in_tasks, raise_reported, report

_lock = threading.Lock()
_restore = contextlib.ExitStack()
_num_users = 0


@contextlib.contextmanager
def quiet_ray_data() -> Iterator[None]:
    """Within it Ray Data shows no bars, and no messages but errors; its log files keep them all.

    A dataset keeps the settings that it was made under, so it is made within, too. Several threads may be within at a time.
    """
    global _num_users  # noqa: PLW0603 - Ray Data's settings are one per process, too
    with _lock:
        if not _num_users:
            _make_quiet(_restore)
        _num_users += 1
    try:
        yield
    finally:
        with _lock:
            _num_users -= 1
            if not _num_users:
                _restore.close()


def _make_quiet(restore: contextlib.ExitStack) -> None:
    import ray.data

    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # With its reservation Ray Data submits a task only when a processor is free, and of two one was idle in between. Tasks that
    # wait would ask a cluster's autoscaler for nodes, though, and for one with a GPU where there is no other.
    context.op_resource_reservation_enabled = not room.is_one_machine
    restore.enter_context(ray.data.DataContext.current(context))
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
            restore.callback(handler.setLevel, handler.level)
            handler.setLevel(logging.ERROR)


def run_tasks(task: Callable[[int], dict[str, Any]], count: int, workers: WorkerConfig) -> Iterator[dict[str, Any]]:
    """What `task(number)` returns for each number below `count`, in the order in which the tasks finish.

    Each is a task of Ray Data, which asks an autoscaler for the nodes that they need; on this machine alone one of Ray, since
    Ray Data starts three processes of its own first (2.6 s on two cores). At most `workers.num_workers` run at once. Raises the
    S2LError that a task met.
    """
    wanted = workers.num_workers[-1] if isinstance(workers.num_workers, list) else workers.num_workers
    most = wanted if isinstance(wanted, int) else None
    if room.is_one_machine:
        yield from in_tasks(task, range(count), num_cpus=cpus_per_task(workers), most=most, in_order=False)
        return
    import ray.data

    with quiet_ray_data():
        results = ray.data.range(count, override_num_blocks=count).map_batches(
            _ReportingTask(task),
            batch_size=None,
            batch_format="pyarrow",
            compute=ray.data.TaskPoolStrategy(None if most is None else min(most, count)),
            num_cpus=cpus_per_task(workers),
        )
        for batch in results.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            for row in batch.to_pylist():
                raise_reported(row)
                yield row


def cpus_per_task(workers: WorkerConfig) -> int:
    """CPUs that a task reserves: one where nothing is asked for."""
    return workers.cpus_per_worker if isinstance(workers.cpus_per_worker, int) else 1


@dataclass(frozen=True)
class _ReportingTask:
    """A task that returns a user's mistake as a row: raised in a worker, it would come back inside Ray's tracebacks."""

    task: Callable[[int], dict[str, Any]]

    def __call__(self, batch: pa.Table) -> pa.Table:
        [number] = batch["id"].to_pylist()
        try:
            row = report(None) | self.task(number)
        except Exception as met:
            error = errors.cause_of(met)
            if error is None:
                raise
            row = report(error)
        return pa.Table.from_pylist([row])
