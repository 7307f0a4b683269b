"""What surrounds the stages of a run: run.json, pinned revisions, and Ray."""

from __future__ import annotations

import logging
import os
import platform
import socket
import time
from pathlib import Path

from s2l_ray.config import RunConfig
from s2l_ray.errors import ArtifactError, ConfigError
from s2l_ray.progress import duration, get_log
from s2l_ray.runtime import room
from s2l_ray.storage.layout import RUN, SCHEMA
from s2l_ray.storage.lock import submitted_job, user
from s2l_ray.storage.places import Storage
from s2l_ray.storage.provenance import provenance

AUTHENTICATION = (
    "Where the cluster asks for a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH (a file with it) on this side too."
)


def connect_ray() -> None:
    """Connect to the Ray of RAY_ADDRESS (a submitted job has it), or start one on this machine; once per process.

    Ray is left running for its caller: a library must not shut down what others use.
    """
    is_ours = not os.environ.get("RAY_ADDRESS")
    # Worker processes of a Ray started here inherit these. What stages have to say reaches the driver by itself, so the
    # workers' own output stays in Ray's log files; RAY_LOG_TO_DRIVER=1 shows it.
    defaults = {"RAY_LOG_TO_DRIVER": "0", "RAY_TRAIN_ENABLE_PRINT_PATCH": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    # Relative paths of models and tokenizers mean the same in a training worker as on the command line.
    defaults["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    # Ray Data restarts actors whose arguments are objects, and Ray's core calls that an error every time.
    defaults["RAY_BACKEND_LOG_LEVEL"] = "fatal"
    if is_ours:
        defaults["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
        # One machine is not preempted, and its controller need not poll as rarely as that of a cluster.
        defaults |= {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    # torch before Ray is connected: loaded after it in a submitted job, its MKL often ends the process (torch 2.13, Ray 2.60).
    import ray

    if submitted_job() is not None:
        import torch  # noqa: F401
    if ray.is_initialized():
        return
    begun = time.monotonic()
    room.is_one_machine = is_ours
    address = os.environ.get("RAY_ADDRESS") or "a new one on this machine"
    _check_address(address)
    try:
        # Not just any Ray that runs on this machine: that may be another user's.
        ray.init("local" if is_ours else None, include_dashboard=False if is_ours else None, logging_level=logging.ERROR)
    except ray.exceptions.AuthenticationError as error:
        raise ConfigError(f"Ray ({address}): {str(error).partition('. ')[0]}. {AUTHENTICATION}") from error
    except (ConnectionError, RuntimeError, ValueError) as error:
        said = " ".join(str(error).split()).rstrip(".")
        remedy = f"Check RAY_ADDRESS, or unset it. {AUTHENTICATION}"
        if "Version mismatch" in said:
            remedy = "Install the cluster's versions of Python and Ray here, or submit a job: it runs with the cluster's own."
        raise ConfigError(f"Ray ({address}): cannot be used ({said}). {remedy}") from error
    found = room.amounts(ray.cluster_resources())
    get_log("run").info("Ray: %s on %s (%s)", found, room.nodes(), duration(time.monotonic() - begun))


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
    """Write run.json: the resolved config, and who made it with what. Not rewritten while it says the same."""
    values = config.model_dump(mode="json")
    old = place.read_json(RUN)
    if old is not None and {name: old.get(name) for name in values} == values:
        return
    who = {"user": user(), "host": socket.gethostname(), "python": platform.python_version(), "ray_job": submitted_job()}
    place.write_json(RUN, {"schema": SCHEMA, **values, "provenance": provenance() | who})
