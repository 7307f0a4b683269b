"""What surrounds the stages of a run: run.json, pinned revisions, and Ray."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import platform
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from s2l_ray.config import RunConfig
from s2l_ray.errors import ArtifactError, ConfigError
from s2l_ray.progress import duration, get_log
from s2l_ray.runtime import room
from s2l_ray.storage.layout import RUN, SCHEMA
from s2l_ray.storage.lock import submitted_job, user
from s2l_ray.storage.ownership import read_run
from s2l_ray.storage.places import Storage
from s2l_ray.storage.provenance import provenance

AUTHENTICATION = (
    "Where the cluster asks for a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH (a file with it) on this side too."
)
# Environment of this process and of the workers of a Ray started here, where the user has set nothing else.
DEFAULTS = {
    # What stages report reaches the driver by itself, so the workers' own output stays in Ray's log files;
    # RAY_LOG_TO_DRIVER=1 shows it.
    "RAY_LOG_TO_DRIVER": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Relative paths of models and tokenizers mean the same in a training worker as on the command line.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # Ray Data restarts actors whose arguments are objects, and Ray's core calls that an error every time.
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    # A pool that has done enough ends with tasks in its actors, and Ray reports each as failed.
    "RAY_DEDUP_LOGS_SKIP_REGEX": r"it was killed by `ray\.kill`",
}
DEFAULTS_HERE = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # One machine is not preempted, and its controller need not poll as rarely as that of a cluster.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
}
# The path of a socket has 107 bytes at most (macOS: 103), and Ray appends up to 70:
# /ray/session_2026-01-31_23-59-59_123456_1234567/sockets/plasma_store.1
MAX_TMPDIR_BYTES = 33


def connect_ray() -> None:
    """Connect to the Ray of RAY_ADDRESS (a submitted job has it), or start one on this machine; once per process.

    Ray is left running for its caller: a library must not shut down what others use. Raises ConfigError where there is no
    Ray that can be used.
    """
    is_ours = not os.environ.get("RAY_ADDRESS")
    for name, value in (DEFAULTS | (DEFAULTS_HERE if is_ours else {})).items():
        os.environ.setdefault(name, value)
    if is_ours:
        _shorten_tmpdir()
    import ray

    # torch before Ray is connected: loaded after it in a submitted job, its MKL often ends the process (torch 2.13, Ray 2.60).
    if submitted_job() is not None:
        import torch  # noqa: F401
    if ray.is_initialized():
        return
    begun = time.monotonic()
    room.is_one_machine = is_ours
    address = os.environ.get("RAY_ADDRESS") or "a new one on this machine"
    _check_address(address)
    try:
        with _without_core_notice():
            # Not just any Ray that runs on this machine: that may be another user's.
            ray.init("local" if is_ours else None, include_dashboard=False if is_ours else None, logging_level=logging.ERROR)
    except ray.exceptions.AuthenticationError as error:
        raise ConfigError(f"Ray ({address}): {str(error).partition('. ')[0]}. {AUTHENTICATION}") from error
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise _unusable(address, error) from error
    found = room.amounts(ray.cluster_resources())
    get_log("run").info("Ray: %s on %s (%s)", found, room.nodes(), duration(time.monotonic() - begun))


def _unusable(address: str, error: Exception) -> ConfigError:
    message = " ".join(str(error).split()).rstrip(".")
    remedy = f"Check RAY_ADDRESS, or unset it. {AUTHENTICATION}"
    if "Version mismatch" in message:
        remedy = "Install the cluster's versions of Python and Ray here, or submit a job: it runs with the cluster's own."
    return ConfigError(f"Ray ({address}): cannot be used ({message}). {remedy}")


def _shorten_tmpdir() -> None:
    """Give Ray a short path to a temporary directory whose own is too long for the sockets below it.

    The path is a link: what Ray writes, and spills, still lies where the user wants it.
    """
    place = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"  # noqa: S108 - Ray's own default
    if len(os.fsencode(place)) <= MAX_TMPDIR_BYTES:
        return
    os.makedirs(place, exist_ok=True)
    folder = tempfile.mkdtemp(prefix="s2l-", dir="/tmp")
    link = os.path.join(folder, "tmp")
    os.symlink(os.path.abspath(place), link)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)  # runs after what Ray registers when it is imported
    os.environ["RAY_TMPDIR"] = link


@contextlib.contextmanager
def _without_core_notice() -> Iterator[None]:
    """Keep from standard error the one line in which Ray's core reports that RAY_BACKEND_LOG_LEVEL is set.

    The core writes it by itself, before it knows the level, so it is taken out of what the descriptor gets meanwhile.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as written:
        os.dup2(written.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            written.seek(0)
            os.write(2, b"".join(line for line in written if b"RAY_BACKEND_LOG_LEVEL" not in line))


def _check_address(address: str) -> None:
    """Raise ConfigError where nobody listens at the address of a Ray: Ray itself tries for minutes."""
    if "://" in address:
        raise ConfigError(
            f"RAY_ADDRESS={address}: a driver outside of its cluster is not supported. Submit a job: "
            "ray job submit --address http://HEAD:8265 --working-dir . -- s2l run ..."
        )
    host, _, port = address.rpartition(":")
    if host and port.isdigit():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        except OSError as error:
            raise ConfigError(
                f"Ray ({address}): nobody answers there ({error.strerror or error}). Check RAY_ADDRESS and that the head node "
                "is up, or unset RAY_ADDRESS to work on this machine alone."
            ) from error


def run_places(name: str, run_dir: str | None, reuse: str | None) -> tuple[Storage, Storage | None]:
    """A run's directory, and that of the run whose stages it may take.

    Raises ArtifactError where there is no such run, ConfigError for a directory that goes with Ray's copy of a job.
    """
    place, other = Storage(run_dir or f"runs/{name}"), Storage(reuse) if reuse else None
    if other is not None and not other.exists():
        raise ArtifactError(f"--reuse {other.uri}: there is no such run.")
    if submitted_job() is not None and "runtime_resources" in Path(place.uri).parts:
        raise ConfigError(
            f"{run_dir or place.uri}: is in Ray's temporary copy of your working directory. Give --run-dir s3://... or an "
            "absolute path that all nodes see."
        )
    return place, other


def write_run(config: RunConfig, place: Storage) -> None:
    """Write run.json: the resolved config, and who made it with what. Not rewritten where nothing has changed."""
    values = config.model_dump(mode="json")
    old = read_run(place)
    if {name: old.get(name) for name in values} == values:
        return
    who = {"user": user(), "host": socket.gethostname(), "python": platform.python_version(), "ray_job": submitted_job()}
    place.write_json(RUN, {"schema": SCHEMA, **values, "provenance": provenance() | who})
