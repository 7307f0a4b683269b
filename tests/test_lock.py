"""The lock on a run directory in object storage: real processes on an S3-compatible server over HTTP, some of them killed.

What these cannot see: a store that is far away, and one that ignores a conditional PUT. The lock on a disk is tested in
test_resume.py.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from s2l_ray.errors import ArtifactError, ConfigError, StorageError
from s2l_ray.storage import lock
from s2l_ray.storage.artifacts import Key
from s2l_ray.storage.drafts import Draft
from s2l_ray.storage.places import Storage

# S3 tells times in whole seconds: a beat much shorter than that would look still.
BEAT = 0.6
DEAD = lock.MISSED * BEAT

RUNNER = """
import signal, sys
from s2l_ray.storage import lock
from s2l_ray.storage.places import Storage
from s2l_ray.errors import S2LError
from s2l_ray.progress import log_to_console
lock.BEAT = float(sys.argv[2])
log_to_console()
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # as Ray does it in the driver of a job
try:
    with lock.exclusive(Storage(sys.argv[1])):
        print("held", flush=True)
        sys.stdin.readline()
    print("released", flush=True)
except S2LError as error:
    print(type(error).__name__, error, flush=True)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    monkeypatch.setattr(lock, "BEAT", BEAT)


@pytest.fixture
def place(bucket, request) -> Storage:
    return Storage(f"{bucket}/{request.node.name}")


@contextlib.contextmanager
def runs(place: Storage, count: int = 1, log: int = subprocess.DEVNULL) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that take the lock of a directory, say so, and give it back on a line of input."""
    command = [sys.executable, "-c", RUNNER, place.uri, str(BEAT)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log, "text": True}
    started = [subprocess.Popen(command, **pipes) for _ in range(count)]
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def let_go(process: subprocess.Popen[str]) -> str:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return said(process)


def left_over(place: Storage) -> list[str]:
    return place.child(lock.LOCKS).names()


def test_a_second_run_is_refused_with_who_holds_it_and_may_start_when_that_has_ended(place):
    with runs(place) as [holder]:
        assert said(holder) == "held"
        begun = time.monotonic()
        who = rf"another run holds it \(process {holder.pid} of .* on .*, since 2.*\)\. Wait for it or end it"
        with pytest.raises(ArtifactError, match=who), lock.exclusive(place):
            pass
        assert time.monotonic() - begun < DEAD  # it lives: that is seen before it would count as dead
        assert let_go(holder) == "released"
    assert left_over(place) == []
    with lock.exclusive(place):
        pass
    assert left_over(place) == []


def test_a_killed_holder_is_found_dead_and_its_lock_taken_over(place, caplog):
    with runs(place) as [holder]:
        assert said(holder) == "held"
        holder.kill()
        begun = time.monotonic()
        with caplog.at_level("INFO", "s2l_ray"), lock.exclusive(place):
            assert time.monotonic() - begun < DEAD + 2  # one for the store's whole seconds
            assert f"held by process {holder.pid} of" in caplog.text
            assert f"took the lock over from process {holder.pid} of" in caplog.text
            assert max(name for name in left_over(place) if name.startswith("lock-")) == "lock-000002"
    assert left_over(place) == []


def test_a_lock_that_is_long_dead_is_taken_over_without_waiting(place, monkeypatch, caplog):
    lock._Lease(place)._acquire(lock._conditional(place))  # without a thread that gives signs of life
    time.sleep(2)
    monkeypatch.setattr(lock, "BEAT", 0.99 / lock.MISSED)  # after 0.99 s it is dead
    with caplog.at_level("INFO", "s2l_ray"), lock.exclusive(place):
        assert "took the lock over" in caplog.text
        assert "waiting up to" not in caplog.text


def test_of_several_that_want_a_dead_runs_lock_one_gets_it(place):
    with runs(place) as [holder]:
        assert said(holder) == "held"
        holder.kill()
        with runs(place, 3) as rivals:
            lines = [said(rival) for rival in rivals]
            winners = [rival for rival, line in zip(rivals, lines, strict=True) if line == "held"]
            assert len(winners) == 1, lines
            others = [line for line in lines if line != "held"]
            assert all(f"another run holds it (process {winners[0].pid} of" in line for line in others), lines
            assert let_go(winners[0]) == "released"
    assert left_over(place) == []


def test_of_those_that_create_a_lock_at_the_same_moment_one_does(place):
    creating = lock._conditional(place)
    for _ in range(8):  # every round takes over from the one before
        start, won = threading.Barrier(4), []

        def attempt(start: threading.Barrier = start, won: list[lock._Lease] = won) -> None:
            lease = lock._Lease(place)
            lease._beat()
            seen = lease._look()
            start.wait()
            if lease._create(creating, seen.number + 1):
                won.append(lease)

        threads = [threading.Thread(target=attempt) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        assert won[0]._look().owner == won[0].owner


def test_a_holder_that_was_only_asleep_stops_and_says_who_has_the_lock(place):
    with runs(place) as [holder]:
        assert said(holder) == "held"
        holder.send_signal(signal.SIGSTOP)
        with lock.exclusive(place):
            holder.send_signal(signal.SIGCONT)
            line = said(holder)  # it waits for a line of input that never comes: it was interrupted
        assert re.match(rf"ArtifactError {place.uri}: .* lost its lock to process {os.getpid()} of", line), line
    assert left_over(place) == []  # and it has taken nothing with it


def test_a_loss_that_shows_only_at_the_end_is_an_error(place, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 1000.0)  # no beat in this test
    with pytest.raises(ArtifactError, match="lost its lock to nobody"), lock.exclusive(place):
        place.delete(lock.LOCKS)


def test_a_lock_is_given_back_after_an_error_and_an_interruption(place):
    for error in (RuntimeError("ours"), KeyboardInterrupt()):
        with pytest.raises(type(error)), lock.exclusive(place):
            raise error
        assert left_over(place) == []


def test_a_beat_that_cannot_be_given_is_tried_again(place, monkeypatch, caplog):
    beat, failures = lock._Lease._beat, iter([False, True, False])

    def flaky(lease: lock._Lease) -> None:
        if next(failures, False):
            raise StorageError("cannot be reached")
        beat(lease)

    monkeypatch.setattr(lock._Lease, "_beat", flaky)
    monkeypatch.setattr(lock, "BEAT", 0.2)
    with lock.exclusive(place):
        time.sleep(1)
    assert caplog.text.count("no sign of life could be given") == 1


def test_a_put_whose_answer_was_lost_is_a_lock_that_is_held(place):
    class Forgetful:
        """Creates, hears nothing, asks again and is told that the object exists."""

        def pipe_file(self, path: str, data: bytes, mode: str) -> None:
            creating.pipe_file(path, data, mode=mode)
            creating.pipe_file(path, data, mode=mode)

    creating, lease = lock._conditional(place), lock._Lease(place)
    lease._beat()
    assert lease._create(Forgetful(), 1)


def test_a_library_that_is_missing_is_named_with_what_installs_it(place, monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    with pytest.raises(ConfigError, match=r"Install s3fs.*pip install 's2l_ray\[s3\]'"), lock.exclusive(place):
        pass


def test_a_run_that_lost_its_lock_publishes_nothing(place):
    with pytest.raises(ArtifactError, match="lost its lock to process"), lock.exclusive(place) as still_held:  # noqa: PT012
        draft = Draft.open(place, Key("examples", 1, {}, {}), still_held)
        draft.write("part-00000.parquet", b"made before")
        other = lock._Lease(place)
        assert other._create(lock._conditional(place), 2)
        draft.publish({"rows": 1})
    assert not place.exists("examples/manifest.json")


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("s2l_ray.storage.lock.fcntl.flock", refuse)
    with (
        pytest.raises(
            ArtifactError, match=r"files cannot be locked there \(No locks available\)\. Mount it with locks, or give"
        ),
        lock.exclusive(Storage(str(tmp_path))),
    ):
        pass
