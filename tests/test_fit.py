"""What ends a training, what only delays it, and how often it can be gone on from: on a real Ray Train group."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from s2l_ray.config import TargetWorkerConfig
from s2l_ray.errors import ConfigError, StorageError
from s2l_ray.progress import get_log
from s2l_ray.runtime.attempts import MAX_ATTEMPTS, FailedAgainError
from s2l_ray.runtime.fit import Patience, fit
from s2l_ray.runtime.pool import PAUSES, UnitWorker
from s2l_ray.runtime.workers import Workers
from s2l_ray.storage.places import Storage
from s2l_ray.target import TargetJob, train_target
from tests.building import CORPUS

from .test_machines import free, held
from .test_resume import ZERO, Bench, bench  # noqa: F401 - bench is a fixture

ONE = Workers(1, 1, 0.0, 1)
UNREACHABLE = "runs/a: cannot be reached. Check AWS_ENDPOINT_URL and the network; the same command goes on."


def has_a_defect(_job: Any, _events: Any) -> dict[str, Any]:
    raise ValueError("a defect of ours")


def finds_the_store_gone_once(marker: Path, _events: Any) -> dict[str, Any]:
    if not marker.exists():
        marker.touch()
        raise StorageError(UNREACHABLE)
    return {"rows": 7}


def finds_the_store_gone(marker: Path, _events: Any) -> dict[str, Any]:
    with marker.open("a") as file:
        file.write("begun\n")
    raise StorageError(UNREACHABLE)


def may_not_write(marker: Path, _events: Any) -> dict[str, Any]:
    with marker.open("a") as file:
        file.write("begun\n")
    raise StorageError("runs/a: access denied. The credentials must allow to list, read, write and delete there.")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_training_that_fails_again_and_again_at_one_place_ends_with_what_it_failed_with(ray_session, tmp_path):
    said = rf"ended {MAX_ATTEMPTS} times from the beginning, at last with ValueError: a defect of ours"
    with pytest.raises(FailedAgainError, match=said):
        fit("proxy", has_a_defect, None, ONE, Storage(str(tmp_path)))


def test_a_training_begins_again_where_the_storage_was_away_for_a_moment(ray_session, tmp_path):
    done = fit("proxy", finds_the_store_gone_once, tmp_path / "marker", ONE, Storage(str(tmp_path / "work")))
    assert done == {"rows": 7, "num_workers": 1}


def test_a_training_gives_the_storage_time_and_then_says_that_it_is_away(ray_session, tmp_path, monkeypatch):
    monkeypatch.setattr("s2l_ray.runtime.fit.MAX_OUTAGES", 2)
    monkeypatch.setattr("s2l_ray.runtime.fit.OUTAGE_SECONDS", 0.1)
    with pytest.raises(StorageError, match="cannot be reached"):
        fit("proxy", finds_the_store_gone, tmp_path / "marker", ONE, Storage(str(tmp_path / "work")))
    assert (tmp_path / "marker").read_text() == "begun\n" * 3


def waits_for_ever(marker: Path, _events: Any) -> dict[str, Any]:
    import time

    marker.touch()
    time.sleep(600)
    raise AssertionError("nobody ended this")


def test_a_training_that_lost_its_machines_says_what_it_waits_for_and_ends_with_what_is_missing(
    ray_session, tmp_path, monkeypatch
):
    """The room that there was is taken by others before Ray Train asks for it."""
    import ray

    lines: list[str] = []
    monkeypatch.setattr("s2l_ray.runtime.fit.WAIT_LINE_SECONDS", 3.0)
    monkeypatch.setattr(get_log("proxy"), "info", lambda text, *_: lines.append(text))
    monkeypatch.setattr(Workers, "await_room", lambda *_: free(2))
    free(2)
    with held(2), pytest.raises(ConfigError) as ended:
        fit("proxy", waits_for_ever, tmp_path / "marker", replace(ONE, wait_minutes=0.2), Storage(str(tmp_path / "work")))
    assert re.match(
        r"machines.proxy asks for 1 worker of 1 CPU; Ray has 2 CPU on 1 node after 1\d.*wait_minut", str(ended.value)
    )
    assert "waiting for 1 worker of 1 CPU; free: nothing on 1 node" in lines
    assert not (tmp_path / "marker").exists()
    free(2)
    assert ray.available_resources()["CPU"] == 2, "nothing of it is left that would take the room when it is there"


def counts(_job: Any, _events: Any) -> dict[str, Any]:
    return {"rows": 1}


def test_an_elastic_training_takes_the_room_that_others_leave(ray_session, tmp_path):
    """Ray Train counts two CPUs, and would wait for the second as long as somebody else holds it."""
    free(2)
    with held(1):
        done = fit("proxy", counts, None, Workers(2, 1, 0.0, 1, wait_minutes=0.2), Storage(str(tmp_path)))
    assert done["num_workers"] == 1
    free(2)


def is_silent(seconds: float, _events: Any) -> dict[str, Any]:
    import time

    time.sleep(seconds)
    return {"rows": 1}


def test_a_training_that_works_in_silence_is_not_taken_for_one_without_machines(ray_session, tmp_path):
    patient = replace(ONE, wait_minutes=0.3)
    assert fit("proxy", is_silent, 25.0, patient, Storage(str(tmp_path)))["rows"] == 1


def test_time_without_machines_counts_anew_after_each_group():
    patience = Patience(wait_minutes=1.0, now=0.0)
    assert not patience.is_over(20.0)
    patience.on_alive(50.0)
    assert [patience.is_over(now) for now in (70.0, 99.0, 110.0, 111.0)] == [False, False, False, True]
    assert patience.seconds(111.0) == 61.0


def test_what_is_waited_for_is_said_every_half_minute():
    patience = Patience(wait_minutes=15.0, now=0.0)
    assert [now for now in range(100) if patience.is_line_due(now)] == [31, 62, 93]


def test_a_training_ends_at_once_where_the_storage_refuses(ray_session, tmp_path):
    with pytest.raises(StorageError, match="access denied"):
        fit("proxy", may_not_write, tmp_path / "marker", ONE, Storage(str(tmp_path / "work")))
    assert (tmp_path / "marker").read_text() == "begun\n"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_resume_points_are_kept_as_often_as_asked_and_old_ones_go(bench: Bench, ray_session, tmp_path):  # noqa: F811
    """The training takes a few seconds: at the default of half a minute there would be none."""
    machines = TargetWorkerConfig(device_batch_size=1, checkpoint_every_minutes=0.005)
    config = ZERO.model_copy(update={"zero_stage": 0, "epochs": 40.0})
    job = TargetJob(
        config, bench.examples, bench.proxy, Storage(str(tmp_path / "target")), {"selected": bench.ids}, machines, CORPUS
    )
    fit("target", train_target, job, ONE, Storage(str(tmp_path / "work")), resume_minutes=machines.resume_minutes)
    snapshot = json.loads((tmp_path / "work" / "ray" / "fit" / "checkpoint_manager_snapshot.json").read_text())
    steps = [int(step) for step in re.findall(r'\\?"step\\?": (\d+)', json.dumps(snapshot))]
    kept = list((tmp_path / "work" / "ray" / "fit").glob("checkpoint_*"))
    assert 2 <= len(kept) <= 3, "two, and one that Ray Train may not have removed yet when the training ended"
    assert max(steps) >= 20, "far into the training, of about 200 steps"


# --- scoring -------------------------------------------------------------------------------------------------------


class Worker(UnitWorker):
    """Fails as `job` says before it succeeds."""

    def load(self, model: str) -> Any:
        return torch.nn.Linear(1, 1)

    def work_on(self, part: str, models: Any) -> Any:
        if self.job:
            raise self.job.pop(0)
        yield from ((name, part.encode()) for name in models)


@pytest.fixture
def told(tmp_path, monkeypatch):
    """What a worker says of one task, and the pauses that it made."""

    def run(failures: list[Exception]) -> tuple[dict[str, Any], list[float]]:
        slept: list[float] = []
        monkeypatch.setattr("s2l_ray.runtime.pool.time.sleep", slept.append)
        row = Worker(failures, Storage(str(tmp_path)), ONE, 1)({"part": ["part-0"], "models": ["step-1"], "units": [1]})
        return {name: value[0] for name, value in row.items()}, slept

    return run


def test_a_scoring_worker_waits_for_a_store_that_is_away_for_a_moment(told, tmp_path):
    row, slept = told([StorageError(UNREACHABLE)] * 2)
    assert (row["error"], slept) == ("", list(PAUSES[:2]))
    assert (tmp_path / "step-1" / "part-0").read_bytes() == b"part-0"


def test_a_scoring_worker_says_so_where_the_store_stays_away_or_refuses(told, tmp_path):
    row, slept = told([StorageError(UNREACHABLE)] * 9)
    assert (row["error"], row["message"], slept) == ("StorageError", UNREACHABLE, list(PAUSES))
    row, slept = told([StorageError("runs/a: access denied.")])
    assert (row["error"], slept) == ("StorageError", [])
    assert not (tmp_path / "step-1").exists()
