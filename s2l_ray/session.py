"""What surrounds the stages of a run: the lock on its directory, run.json, pinned revisions, and Ray."""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import logging
import os
import socket
import time
from collections.abc import Iterator
from typing import Any

from s2l_ray.artifacts import SCHEMA, WORK, Storage, provenance
from s2l_ray.config import RunConfig
from s2l_ray.corpus import hub_id
from s2l_ray.errors import ArtifactError, ConfigError
from s2l_ray.progress import duration, get_log

RUN = "run.json"


def connect_ray() -> None:
    """Connect to the Ray of RAY_ADDRESS (a submitted job has it), or start one on this machine; once per process.

    Ray is left running for its caller: a library must not shut down what others use.
    """
    is_ours = "RAY_ADDRESS" not in os.environ
    # Worker processes of a Ray started here inherit these. What stages have to say reaches the driver by itself, so the
    # workers' own output stays in Ray's log files; RAY_LOG_TO_DRIVER=1 shows it.
    defaults = {"RAY_LOG_TO_DRIVER": "0", "RAY_TRAIN_ENABLE_PRINT_PATCH": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    # Relative paths of models and tokenizers mean the same in a training worker as on the command line.
    defaults["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    if is_ours:
        # Ray Data restarts actors whose arguments are objects, and Ray's core calls that an error every time.
        defaults |= {"RAY_BACKEND_LOG_LEVEL": "fatal", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
        # One machine is not preempted, and its controller need not poll as rarely as that of a cluster.
        defaults |= {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        return
    begun = time.monotonic()
    try:
        ray.init(include_dashboard=False if is_ours else None, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError) as error:
        address = os.environ.get("RAY_ADDRESS", "a new one on this machine")
        raise ConfigError(f"Ray ({address}): cannot be reached ({error}). Check RAY_ADDRESS, or unset it.") from error
    found = {name: int(amount) for name, amount in ray.cluster_resources().items() if name in ("CPU", "GPU")}
    get_log("run").info(
        "Ray: %s (%s)", ", ".join(f"{amount} {name}" for name, amount in found.items()), duration(time.monotonic() - begun)
    )


def user() -> str:
    """Who runs this; the number of a user without a name, as containers have them."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


@contextlib.contextmanager
def exclusive(place: Storage) -> Iterator[None]:
    """Hold the run directory: a second run on it is refused with who holds it. The lock of a dead process is free."""
    if not place.is_local:
        yield
        return
    path = place.child(WORK).path("lock")
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - held for the whole run
    except OSError as error:
        raise ArtifactError(f"{place.uri}: cannot be written ({error.strerror}). Give another --run-dir.") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise ArtifactError(f"{place.uri}: another run holds it ({file.read().strip()}). Wait for it or end it.") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} of {user()} on {socket.gethostname()}\n")
        file.flush()
        yield


def write_run(config: RunConfig, place: Storage) -> None:
    """Write run.json: the resolved config, and who made it with what. Not rewritten while it says the same."""
    values = config.model_dump(mode="json")
    old = place.read_json(RUN)
    if old is not None and {name: old.get(name) for name in values} == values:
        return
    who = {"user": user(), "host": socket.gethostname()}
    place.write_json(RUN, {"schema": SCHEMA, **values, "provenance": provenance() | who})


def resolve_revisions(config: RunConfig, place: Storage, reuse: Storage | None = None) -> RunConfig:
    """The config with Hub names pinned to commits: what this run or the reused one pinned before, else today's.

    Where the Hub cannot be reached a revision stays as it is; loading what it names says what is wrong.
    """
    before = place.read_json(RUN) or (reuse.read_json(RUN) if reuse is not None else None) or {}
    named = {
        "examples": hub_id(config.examples.dataset),
        "proxy": hub_model(config.proxy.model),
        "target": hub_model(config.target.model),
    }
    for section, name in named.items():
        values = getattr(config, section)
        if name is None or _is_commit(values.revision):
            continue
        kind, field = ("dataset", "dataset") if section == "examples" else ("model", "model")
        old = before.get(section, {})
        pinned = old.get("revision") if old.get(field) == name else None
        revision = pinned if _is_commit(pinned) else _hub_commit(kind, name, values.revision)
        config = config.model_copy(update={section: values.model_copy(update={"revision": revision})})
    return config


def hub_model(model: Any) -> str | None:
    """A model's Hub id, None for a path, a URI or a model from scratch."""
    return model if isinstance(model, str) and "://" not in model and not os.path.exists(model) else None


def _is_commit(revision: str | None) -> bool:
    return revision is not None and len(revision) == 40 and all(c in "0123456789abcdef" for c in revision)


def _hub_commit(kind: str, name: str, revision: str | None) -> str | None:
    import huggingface_hub

    api = huggingface_hub.HfApi()
    try:
        info = (api.dataset_info if kind == "dataset" else api.model_info)(name, revision=revision, timeout=10)
    except Exception as error:  # noqa: BLE001 - the Hub's client raises its HTTP library's errors, and changes that library
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        get_log("run").warning("%s is not pinned to a commit: the Hub does not answer (%s)", name, reason)
        return revision
    return str(info.sha)
