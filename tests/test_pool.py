"""Units of work on a pool of actors: which are left to do, in which order, and what is known of their throughput."""

from __future__ import annotations

import pytest

from s2l_ray.runtime.pool import Task, Throughput, Unit, UnitWorker, do_units, tasks
from s2l_ray.runtime.workers import Workers
from s2l_ray.storage.places import Storage

UNITS = [Unit(model, part) for model in ("step-1", "step-2", "step-3") for part in ("part-0", "part-1")]


def test_no_units_are_no_tasks_and_no_work(tmp_path):
    assert tasks([], Storage(str(tmp_path)), 2) == []
    done = do_units("trajectories", [], UnitWorker, None, Storage(str(tmp_path)), Workers(1, 1, 0, 1), show=False)
    assert done == Throughput()
    assert done.utilization == 0


def test_a_part_is_read_once_for_the_models_that_a_worker_keeps_together(tmp_path):
    work = Storage(str(tmp_path))
    assert tasks(UNITS, work, 2) == [
        *(Task(part, ("step-1", "step-2")) for part in ("part-0", "part-1")),
        *(Task(part, ("step-3",)) for part in ("part-0", "part-1")),
    ]
    work.write("step-1/part-0", b"")
    work.write("step-3/part-1", b"")
    assert tasks(UNITS, work, 2) == [
        Task("part-0", ("step-2",)),
        Task("part-1", ("step-1", "step-2")),
        Task("part-0", ("step-3",)),
    ]


def test_utilization_is_what_was_computed_in_the_seconds_of_work_by_what_a_matrix_product_reaches():
    done = Throughput()
    done.add(10, 100, flops=3e9, seconds=2, matmul_flops_per_second=4e9)
    done.add(10, 100, flops=1e9, seconds=2, matmul_flops_per_second=4e9)
    assert (done.examples, done.tokens) == (20, 200)
    assert done.utilization == pytest.approx(0.25)
