"""The lock on a run directory: two runs must not build in one place, and a dead run must not keep it.

On a disk, NFS included, the lock is the kernel's, on an open file: it ends with its process.

Object storage has no such thing. There the lock is an object that only a conditional PUT creates, `.work/locks/lock-000001`,
and that is never written again; next to it the holder rewrites `beat-<owner>` every `BEAT` seconds. A run that finds a lock
watches it: if the beat advances, the holder is alive and the run is refused; if it does not for `MISSED` beats, the holder is
dead, and the run takes the lock over by creating the next number. The highest number holds. Times are compared by the store's
clock alone, or on the clock of one process. A holder that was only asleep finds at its next beat that it has lost the lock, and
stops: until then (a beat, or as long as the store does not answer) both may be at work. Every file appears whole, and a stage
checks that its run still holds the lock before it writes the manifest: the run that lost the lock publishes nothing.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import getpass
import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from s2l_ray.errors import ArtifactError, ConfigError, S2LError, StorageError
from s2l_ray.progress import get_log
from s2l_ray.storage.layout import LOCK, LOCKS
from s2l_ray.storage.ownership import scratch_of
from s2l_ray.storage.places import Storage

BEAT = 15.0
"""Seconds between two signs of life."""
MISSED = 4
"""Beats without a sign of life after which a holder counts as dead."""
_EXTRAS = {"s3": "s3", "gs": "gcs", "gcs": "gcs"}
log = get_log("run")


def user() -> str:
    """Who runs this; the number of a user without a name, as containers have them."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def submitted_job() -> str | None:
    """The id under which Ray knows the submitted job that this is, None if it is none."""
    config = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    return config.get("metadata", {}).get("job_submission_id")  # type: ignore[no-any-return]


def _self() -> str:
    """This process in words."""
    job = submitted_job()
    return f"process {os.getpid()} of {user()} on {socket.gethostname()}" + (f", Ray job {job}" if job else "")


@contextlib.contextmanager
def exclusive(place: Storage) -> Iterator[Callable[[], None]]:
    """Hold the run directory: a second run on it is refused with who holds it. The lock of a dead run is free.

    Gives a function that raises ArtifactError where the lock is held no more; to be asked before results are published.
    Raises ArtifactError: at once or after a beat where another run holds it, and on object storage also at the end where
    another took it over from this one, which is interrupted then.
    """
    with _file_held(place) if place.is_local else _Lease(place).held() as still_held:
        yield still_held


@contextlib.contextmanager
def _file_held(place: Storage) -> Iterator[Callable[[], None]]:
    path = place.path(LOCK)
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        scratch_of(place)
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - held for the whole run
    except OSError as error:
        raise ArtifactError(f"{place.uri}: cannot be written ({error.strerror}). Give another directory.") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise _refusal(place, file.read().strip()) from None
        except OSError as error:  # some mounts of network file systems
            raise ArtifactError(
                f"{path}: files cannot be locked there ({error.strerror}). Mount it with locks, or give another directory."
            ) from error
        file.truncate(0)
        file.write(f"{_self()}\n")
        file.flush()
        yield lambda: None


def _refusal(place: Storage, who: str) -> ArtifactError:
    return ArtifactError(f"{place.uri}: another run holds it ({who}). Wait for it or end it.")


@dataclass(frozen=True)
class _Seen:
    """The lock with the highest number, as the store shows it."""

    number: int = 0
    """0: there is none."""

    owner: str = ""
    who: str = "nobody"
    beaten: datetime.datetime | None = None
    """Last sign of life, by the store's clock."""

    silent: float = field(default=0.0, compare=False)
    """Seconds from that to this run's own sign of life."""


class _Lease:
    """The lock on a directory in object storage, from this run's side."""

    def __init__(self, place: Storage) -> None:
        self.place, self.locks = place, place.child(LOCKS)
        self.owner = uuid.uuid4().hex
        self.name = ""
        self.taken_by: str | None = None
        self._beats = 0

    @contextlib.contextmanager
    def held(self) -> Iterator[Callable[[], None]]:
        """Hold the lock; a loss of it in between interrupts the block, and is an ArtifactError."""
        creating = _conditional(self.place)
        stop = threading.Event()
        try:
            self._acquire(creating)
            thread = threading.Thread(target=self._stay_alive, args=(stop,), name="lock", daemon=True)
            with _interruptible():
                thread.start()
                try:
                    yield self._still_held
                finally:
                    stop.set()
                    thread.join()
        except BaseException as error:
            if self.taken_by is not None:
                raise self._loss() from error
            raise
        finally:
            self._release()
        if self.taken_by is not None:
            raise self._loss()

    # --- taking it ---

    def _acquire(self, creating: Any) -> None:
        scratch_of(self.place)
        reported = ""
        while True:
            self._beat()  # the store's clock, to judge others by, and a fresh sign of life if the lock is free
            seen = self._look()
            if seen.owner == self.owner:
                return
            if seen.number:
                left = MISSED * BEAT - seen.silent
                if left > 0 and reported != seen.owner:
                    reported = seen.owner
                    log.info("%s is held by %s; waiting up to %.0f s to see whether it lives", self.place.uri, seen.who, left)
                if not self._stays(seen, left):
                    continue
                if self._look() != seen:  # it was given back in the meantime
                    continue
            if self._create(creating, seen.number + 1):
                if seen.number:
                    log.warning("took the lock over from %s: no sign of life since %s", seen.who, seen.beaten)
                    self.locks.delete(f"beat-{seen.owner}")
                return

    def _stays(self, seen: _Seen, seconds: float) -> bool:
        """Whether the holder gives no sign of life for so long; False if it is another by then. Refused if it lives."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(left, BEAT / 4))
            now = self._look()
            if now.owner != seen.owner:
                return False
            if now != seen:
                raise _refusal(self.place, seen.who)
        return True

    def _create(self, creating: Any, number: int) -> bool:
        """Create the lock of this number unless it is there; whether this run holds it then."""
        self.name = f"lock-{number:06d}"
        since = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        value = {"owner": self.owner, "who": f"{_self()}, since {since}"}
        try:
            creating.pipe_file(self.locks.path(self.name), json.dumps(value).encode(), mode="create")
        except Exception as error:
            # Stores report in many ways that it exists. Where an answer was lost, the library tried again and met its own lock.
            if not isinstance(error, FileExistsError) and not self.locks.exists(self.name):
                raise StorageError(
                    f"{self.locks.uri}/{self.name}: cannot be created ({error}). The credentials must allow to write there, "
                    "and the store to create an object only if there is none (If-None-Match)."
                ) from error
        return self._look().owner == self.owner

    # --- keeping it ---

    def _beat(self) -> None:
        self.locks.write_json(f"beat-{self.owner}", {"beat": self._beats})
        self._beats += 1

    def _look(self) -> _Seen:
        while True:
            times = {name: info.mtime for name, info in self.locks.infos().items()}
            names = [name for name in times if name.startswith("lock-")]
            if not names:
                return _Seen()
            held = self.locks.read_json(max(names))
            if held is None:  # released since
                continue
            # A lock just taken over is a sign of life, too.
            beaten = max(times[max(names)], times.get(f"beat-{held['owner']}", times[max(names)]))
            own = times.get(f"beat-{self.owner}", beaten)
            return _Seen(int(max(names)[-6:]), held["owner"], held["who"], beaten, (own - beaten).total_seconds())

    def _check(self) -> None:
        """Learn whether this run still holds the lock."""
        seen = self._look()
        if seen.owner != self.owner:
            self.taken_by = seen.who

    def _still_held(self) -> None:
        """Raise ArtifactError where another run has taken the lock over."""
        self._check()
        if self.taken_by is not None:
            raise self._loss()

    def _stay_alive(self, stop: threading.Event) -> None:
        """Give a sign of life every beat; interrupt the main thread once the lock is another's."""
        while not stop.wait(BEAT):
            try:
                self._check()
                if self.taken_by is not None:
                    if signal.getsignal(signal.SIGUSR2) is _as_ctrl_c:
                        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR2)
                    return
                self._beat()
            except (S2LError, OSError) as error:  # no answer is no loss
                log.warning("no sign of life could be given, trying again in %.0f s: %s", BEAT, error)

    def _loss(self) -> ArtifactError:
        return ArtifactError(
            f"{self.place.uri}: this run gave no sign of life for {MISSED * BEAT:.0f} s, and lost its lock to {self.taken_by}. "
            "What it had finished stays. Wait for the other, or end it and run again."
        )

    # --- giving it back ---

    def _release(self) -> None:
        """Remove what this run has put there, and older locks that it took over; its own lock goes last."""
        if not self._beats:  # the store let nothing be written
            return
        try:
            self._check()
            if self.taken_by is None:
                names = [name for name in self.locks.names() if name.startswith("lock-") and name <= self.name]
                for name in names:
                    self.locks.delete(name)
            self.locks.delete(f"beat-{self.owner}")
        except (S2LError, OSError) as error:  # it must not hide why the run ended
            log.warning("the lock could not be released, and is free in %.0f s: %s", MISSED * BEAT, error)


def _conditional(place: Storage) -> Any:
    """The library that can create an object only if it does not exist, which pyarrow cannot. Raises ConfigError."""
    import fsspec  # type: ignore[import-untyped]

    try:
        return fsspec.core.url_to_fs(place.uri, use_listings_cache=False, skip_instance_cache=True)[0]
    except (ImportError, ValueError) as error:
        extra = _EXTRAS.get(place.uri.partition("://")[0])
        remedy = f"pip install 's2l_ray[{extra}]'" if extra else "give a local path, s3:// or gs://"
        raise ConfigError(f"{place.uri}: the lock of a run there needs a library ({error}): {remedy}.") from error


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """SIGUSR2 does in the main thread what Ctrl-C does there, Ray Train's orderly end of a training included.

    Not SIGINT itself: Ray blocks that in all it starts, a submitted job's driver too, and a shell ignores it in the
    background. Where this is not the main thread, a loss shows only at the end.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGUSR2, _as_ctrl_c)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR2, before or signal.SIG_DFL)


def _as_ctrl_c(_number: int, frame: Any) -> None:
    answer = signal.getsignal(signal.SIGINT)
    (answer if callable(answer) else signal.default_int_handler)(signal.SIGINT, frame)
