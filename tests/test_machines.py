"""Machines that come and go: what is asked of Ray, what is waited for, what is said where it cannot be had."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from s2l_ray.config import RunConfig, TrainingWorkerConfig, WorkerConfig, parse_config
from s2l_ray.errors import ConfigError, DataError
from s2l_ray.runtime import room, session
from s2l_ray.runtime.data import quiet_ray_data, run_tasks
from s2l_ray.runtime.metrics import count
from s2l_ray.runtime.passes import in_tasks
from s2l_ray.runtime.workers import Workers
from s2l_ray.storage.places import Storage
from s2l_ray.trajectories.overlapped import spare_workers


@contextmanager
def held(cpus: int) -> Iterator[None]:
    """So many CPUs of Ray are taken."""
    import ray

    @ray.remote
    class Holder:
        def there(self) -> bool:
            return True

    holder = Holder.options(num_cpus=cpus).remote()  # type: ignore[attr-defined]
    assert ray.get(holder.there.remote())
    yield
    ray.kill(holder)


def free(cpus: int) -> None:
    import ray

    end = time.monotonic() + 20
    while ray.available_resources().get("CPU", 0) < cpus and time.monotonic() < end:
        time.sleep(0.1)


# --- waiting -------------------------------------------------------------------------------------------------------


def test_a_stage_begins_at_once_where_there_is_room(ray_session):
    free(2)
    begun = time.monotonic()
    room.await_room("proxy", {"CPU": 1}, 2, 1)
    assert time.monotonic() - begun < 2


def test_a_stage_waits_for_machines_and_says_for_what(ray_session):
    free(2)
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = room.get_log("trajectories")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    with ThreadPoolExecutor(1) as pool:
        with held(2):
            waiting = pool.submit(room.await_room, "trajectories", {"CPU": 1}, 1, 1)
            time.sleep(3)
            assert not waiting.done()
        waiting.result(timeout=20)
    logger.removeHandler(handler)
    assert "waiting for 1 worker of 1 CPU; free: nothing on 1 node" in said


def test_waiting_ends_with_what_is_missing(ray_session):
    free(2)
    asked = r"machines\.trajectories asks for 1 worker of 1 CPU; Ray has 2 CPU on 1 node after"
    with held(2), pytest.raises(ConfigError, match=asked):
        room.await_room("trajectories", {"CPU": 1}, 1, 3 / 60)
    free(2)


def test_what_this_machine_can_never_give_is_refused_at_once(ray_session, monkeypatch):
    monkeypatch.setattr(room, "is_one_machine", True)
    with pytest.raises(ConfigError, match=r"machines\.target asks for 1 worker of 1 CPU and 8 GPU; Ray has 2 CPU on 1 node\. "):
        room.await_room("target", {"CPU": 1, "GPU": 8}, 1, 60)


def test_a_claim_is_given_back_whether_or_not_there_was_room(ray_session):
    import ray

    free(2)
    with pytest.raises(ConfigError):
        room.await_room("target", {"CPU": 2}, 2, 0.01)
    free(2)
    assert ray.available_resources()["CPU"] == 2


def test_workers_that_have_their_room_and_only_start_slowly_are_not_waited_for(ray_session):
    from ray.util import placement_group, remove_placement_group

    free(2)
    room_of_one, room_of_too_many = placement_group([{"CPU": 1}]), placement_group([{"CPU": 2}])
    assert room_of_one.wait(20)
    assert [list(room.claims({"CPU": cpus}).values()) for cpus in (1, 2, 3)] == [[True], [False], []]
    remove_placement_group(room_of_one)
    room.give_up(room.claims({"CPU": 2}))
    free(2)
    assert not room.claims({"CPU": 1}) | room.claims({"CPU": 2})
    assert room_of_too_many is not None


# --- numbers -------------------------------------------------------------------------------------------------------


def test_bounds_stay_what_they_are_whatever_there_is_now(ray_session):
    workers = Workers.resolve(WorkerConfig(num_workers=[1, 64], gpus_per_worker=1, cpus_per_worker=4), one_per_cpu=True)
    assert (workers.min_workers, workers.num_workers, workers.resources) == (1, 64, {"CPU": 4, "GPU": 1.0})
    assert str(workers) == "1 to 64 workers"


def test_auto_takes_what_is_there(ray_session):
    scoring = Workers.resolve(WorkerConfig(), one_per_cpu=True)
    training = Workers.resolve(TrainingWorkerConfig(), one_per_cpu=False, at_most=64)
    assert (scoring.min_workers, scoring.num_workers, scoring.cpus_per_worker) == (2, 2, 1)
    assert (training.min_workers, training.num_workers, training.cpus_per_worker) == (1, 1, 2)
    assert Workers.resolve(WorkerConfig(), one_per_cpu=True, at_most=1).num_workers == 1, "no more than rows in a batch"


def test_room_is_counted_by_what_the_nodes_have_free_now(ray_session):
    free(2)
    with held(1):
        assert [room.free_room({"CPU": cpus}, most) for cpus, most in ((1, 4), (2, 4))] == [1, 0]
    free(2)
    for cpus, most, expected in ((1, 4, 2), (1, 1, 1), (2, 4, 1), (3, 4, 0)):
        assert room.free_room({"CPU": cpus}, most) == expected
        free(2)  # Ray shows what a claim has given back after a moment


def elastic(low: int, high: int, batch: int) -> RunConfig:
    model = {"scratch": {"layers": 1, "hidden": 8}}
    return RunConfig.model_validate(
        {
            "name": "x",
            "examples": {"dataset": "rows.jsonl"},
            "proxy": {"model": model, "tokenizer": {"train": "bpe"}, "global_batch_size": batch},
            "selection": {"budget": 1},
            "target": {"model": model},
            "machines": {"proxy": {"num_workers": [low, high]}},
        }
    )


def test_any_number_of_workers_is_taken_up_to_one_per_row_of_a_batch():
    assert elastic(5, 7, 64).machines.proxy.num_workers == [5, 7]
    with pytest.raises(
        ValueError, match=r"machines\.proxy\.num_workers=\[1, 65\]: more workers than the 64 examples of a batch"
    ):
        elastic(1, 65, 64)
    with pytest.raises(ValueError, match="min above max"):
        elastic(3, 1, 64)


@pytest.mark.parametrize("place", ["proxy.model", "target.tokenizer", "examples.dataset"])
@pytest.mark.parametrize(
    "uri", ["s3://AKIAKEY:planted@bucket/x", "s3://AKIAKEY:a/planted@bucket/x", "s3://b/x?secret_key=planted"]
)
def test_credentials_in_a_uri_are_refused_and_not_repeated(place, uri):
    with pytest.raises(ConfigError, match="credentials in a URI") as refused:
        Storage(uri)
    assert "planted" not in str(refused.value)
    values = elastic(1, 2, 64).model_dump(mode="json")
    section, field = place.split(".")
    values[section][field] = uri
    with pytest.raises(ConfigError, match=f"{place}: credentials in a URI") as refused:
        parse_config(values)
    assert "planted" not in str(refused.value)


def test_scoring_beside_the_training_takes_only_what_is_free(ray_session):
    workers = Workers(2, 1, 0.0, 2)
    free(2)
    assert spare_workers(workers) == workers
    with held(1):
        spare = spare_workers(workers)
        assert spare is not None
        assert (spare.num_workers, spare.min_workers) == (1, 1)
    free(2)
    with held(2):
        assert spare_workers(workers) is None
    free(2)
    assert spare_workers(Workers(2, 1, 1.0, 2)) is None, "there is no GPU here"


# --- reaching a cluster --------------------------------------------------------------------------------------------


def test_an_address_where_nobody_answers_is_one_clear_error():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
    with pytest.raises(ConfigError, match=rf"Ray \({address}\): nobody answers there"):
        session._check_address(address)


def test_a_driver_far_from_its_cluster_is_told_to_submit_a_job():
    with pytest.raises(ConfigError, match="ray job submit"):
        session._check_address("ray://head:10001")


def test_a_cluster_with_another_version_of_ray_is_one_clear_error(ray_session):
    import ray

    code = "import ray; ray.__version__ = '0.0.1'; from s2l_ray.runtime.session import connect_ray; connect_ray()"
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    said = done.stderr.splitlines()[-1]
    assert said.startswith("s2l_ray.errors.ConfigError: Ray (")
    assert "Ray: 0.0.1" in said
    assert said.endswith(
        "Install the cluster's versions of Python and Ray here, or submit a job: it runs with the cluster's own."
    )


# --- metrics -------------------------------------------------------------------------------------------------------


def test_prometheus_finds_what_a_stage_counts(ray_session):
    import ray

    count("trajectories", units_left=7, examples=64, tokens=4096, utilization=0.5, restarts=1)
    port = ray.nodes()[0]["MetricsExportPort"]
    page, end = "", time.monotonic() + 45
    while "s2l_ray_units_left" not in page and time.monotonic() < end:
        time.sleep(1)
        page = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
    names = ("s2l_ray_units_left", "s2l_ray_examples", "s2l_ray_tokens", "s2l_ray_flops_utilization", "s2l_ray_restarts")
    lines = [line for line in page.splitlines() if "s2l_ray_" in line and not line.startswith("#")]
    assert all(any(name in line and 'stage="trajectories"' in line for line in lines) for name in names), lines


@pytest.mark.parametrize("is_one_machine", [True, False])
def test_a_datasets_tasks_wait_for_a_processor_in_ray_on_one_machine_and_in_ray_data_on_a_cluster(
    ray_session, monkeypatch, is_one_machine
):
    """On one machine tasks follow each other at once: one of two processors was idle. On a cluster the autoscaler would start
    nodes for those that wait, with a GPU where there is no other kind."""
    import ray.data

    monkeypatch.setattr(room, "is_one_machine", is_one_machine)
    with quiet_ray_data():
        assert ray.data.DataContext.get_current().op_resource_reservation_enabled is not is_one_machine


def test_ray_data_says_nothing_about_how_many_tasks_run(ray_session, recwarn, monkeypatch):
    monkeypatch.setattr(room, "is_one_machine", False)
    found = list(run_tasks(lambda number: {"number": number}, 8, WorkerConfig()))
    assert sorted(row["number"] for row in found) == list(range(8))
    assert not [one for one in recwarn if "concurrent tasks" in str(one.message)]


@pytest.mark.parametrize("is_one_machine", [True, False])
@pytest.mark.parametrize("most", [1, 2])
def test_no_more_tasks_run_at_once_than_a_config_asks_for(ray_session, monkeypatch, tmp_path, is_one_machine, most):
    def task(number):
        own = tmp_path / str(number)
        own.touch()
        time.sleep(0.3)
        together = len(list(tmp_path.iterdir()))
        own.unlink()
        return {"number": number, "together": together}

    monkeypatch.setattr(room, "is_one_machine", is_one_machine)
    found = list(run_tasks(task, 6, WorkerConfig(num_workers=most)))
    assert sorted(row["number"] for row in found) == list(range(6))
    assert max(row["together"] for row in found) <= most


@pytest.mark.parametrize("in_order", [True, False])
def test_the_next_task_runs_while_the_caller_works_on_a_result(ray_session, tmp_path, in_order):
    def task(number):
        (tmp_path / str(number)).touch()
        return number

    results = in_tasks(task, range(3), most=1, in_order=in_order)
    for number in range(3):
        assert next(results) == number
        end = time.monotonic() + 30
        while number < 2 and not (tmp_path / str(number + 1)).exists() and time.monotonic() < end:
            time.sleep(0.02)
        assert sorted(int(one.name) for one in tmp_path.iterdir()) == list(range(min(number + 2, 3)))


def test_tasks_that_nobody_waits_for_any_more_are_cancelled(ray_session, tmp_path):
    def task(number):
        if number:
            time.sleep(60)
            (tmp_path / str(number)).touch()
        return number

    results = in_tasks(task, range(6), most=6)
    assert next(results) == 0
    results.close()
    assert list(in_tasks(lambda number: number, range(4))) == [0, 1, 2, 3]  # the processors are free
    assert not list(tmp_path.iterdir())


def test_on_this_machine_alone_ray_data_need_not_start_for_tasks(ray_session, monkeypatch):
    import ray.data

    def unused(*_arguments, **_options):
        raise AssertionError("a dataset was made")

    monkeypatch.setattr(room, "is_one_machine", True)
    monkeypatch.setattr(ray.data, "range", unused)
    assert sorted(row["number"] for row in run_tasks(lambda number: {"number": number}, 3, WorkerConfig())) == [0, 1, 2]


@pytest.mark.parametrize("is_one_machine", [True, False])
def test_a_mistake_that_a_task_finds_is_raised_as_it_is(ray_session, monkeypatch, is_one_machine):
    def task(number):
        raise DataError(f"row {number + 7} is none")

    monkeypatch.setattr(room, "is_one_machine", is_one_machine)
    with pytest.raises(DataError, match=r"^row 7 is none$"):
        list(run_tasks(task, 1, WorkerConfig()))
