"""Trackers: TensorBoard, Weights & Biases and MLflow, which transformers' Trainer reports to on the first worker.

A training is found by the run's name: `NAME/proxy`, `NAME/target-selected`, `NAME/target-random`. One that was interrupted and
goes on reports to the same place; another directory is another run. What is kept in files lies in `RUN_DIR/trackers/`. Only
numbers and settings are reported, no text of the corpus and nothing that a process prints.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from s2l_ray.config import RunConfig
from s2l_ray.errors import ConfigError, has_credentials
from s2l_ray.storage.layout import TRACKERS
from s2l_ray.storage.places import Storage
from s2l_ray.storage.records import digest
from s2l_ray.storage.stages import Context

# Any one of these modules is enough. Ray Train brings tensorboardX.
MODULES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "mlflow": ("mlflow",)}
STORE = "MLFLOW_TRACKING_URI"
# Settings of the trackers in the driver's environment that workers get, too; keys stay where they are.
_SETTINGS, _SECRETS = ("WANDB_", "MLFLOW_"), ("KEY", "TOKEN", "PASSWORD", "SECRET", "USERNAME", "AUTH", "HEADERS")
_RUN_ID = f"{TRACKERS}/run_id.txt"


def check_trackers(config: RunConfig, run: Storage) -> None:
    """Raise ConfigError for a tracker whose package is missing, or that has no place to report to."""
    for kind in config.trackers:
        if not any(importlib.util.find_spec(module) for module in MODULES[kind]):
            raise ConfigError(
                f"trackers: {kind} is not installed: pip install 's2l_ray[trackers]' (for the workers, too), or leave it out."
            )
    if "mlflow" in config.trackers and not run.is_local and STORE not in os.environ:
        raise ConfigError(
            f"trackers: mlflow keeps no files in object storage ({run.uri}). Set {STORE} to the address of an MLflow server."
        )


@dataclass(frozen=True)
class Tracking:
    """Where the trainings of one stage report to, and under which names."""

    kinds: tuple[str, ...]
    name: str
    """The run's."""

    stage: str
    run: Storage
    run_id: str
    """Of this run directory; the same when it is gone on with."""

    settings: Mapping[str, str] = field(default_factory=dict)
    """The trackers' settings in the driver's environment, without keys and passwords."""

    @classmethod
    def of(cls, context: Context) -> Tracking:
        """The trackers of the stage that is being built."""
        config, draft = context.config, context.draft
        run = Storage(draft.storage.uri.rpartition("/")[0])
        run_id = ""
        if config.trackers:
            if not run.exists(_RUN_ID):
                run.write(_RUN_ID, f"{uuid.uuid4().hex}\n".encode())
            run_id = digest([run.read(_RUN_ID).decode().strip(), draft.key.fingerprint])
        found = {name: value for name, value in os.environ.items() if name.startswith(_SETTINGS)}
        settings = {
            name: value
            for name, value in found.items()
            if not any(mark in name for mark in _SECRETS) and not has_credentials(value)
        }
        return cls(tuple(config.trackers), config.name, draft.key.stage, run, run_id, settings)

    def title(self, model: str) -> str:
        """The name of one model's training: `NAME/proxy`, `NAME/target-selected`."""
        return f"{self.name}/{self.stage}" + (f"-{model}" if model != self.stage else "")

    @property
    def group(self) -> str:
        """What the trainings of one run have in common: its name, and its directory's where that is another."""
        folder = self.run.uri.rstrip("/").rpartition("/")[2]
        return self.name if folder == self.name else f"{self.name} ({folder})"


@contextlib.contextmanager
def reporting(tracking: Tracking | None, model: str, is_first: bool) -> Iterator[dict[str, Any]]:
    """The Trainer's arguments `report_to` and `run_name` for one model's training, which is to be made and run within.

    Raises ConfigError where a tracker cannot be reached or does not let us in.
    """
    if tracking is None or not tracking.kinds or not is_first:
        yield {"report_to": "none"}
        return
    title, own_id = tracking.title(model), digest([tracking.run_id, model])
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(_folder(tracking.run))
        events = folder / "tensorboard" / title.partition("/")[2]
        stack.enter_context(_environment({**tracking.settings, "TENSORBOARD_LOGGING_DIR": str(events)}))
        if "wandb" in tracking.kinds:
            stack.enter_context(_wandb_run(tracking, title, own_id, folder))
        if "mlflow" in tracking.kinds:
            stack.enter_context(_mlflow_run(tracking, title, own_id, folder))
        yield {"report_to": list(tracking.kinds), "run_name": title}


@contextlib.contextmanager
def _folder(run: Storage) -> Iterator[Path]:
    """The local folder for what trackers keep in files; of a run in object storage it is copied there at the end.

    Every training has files of its own there (their names have time and process), so that nothing is overwritten.
    """
    if run.is_local:
        folder = Path(run.path(TRACKERS))
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="s2l_ray-") as name:
        try:
            yield Path(name)
        finally:
            run.upload(name, TRACKERS)


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Values in the environment of this process while they are needed; what is there already stays.

    What the trackers themselves add goes away with them: of one model's training nothing is left for the next one's.
    """
    before = set(os.environ)
    os.environ.update({name: value for name, value in values.items() if name not in before})
    try:
        yield
    finally:
        for name in set(os.environ) - before:
            if name in values or name.startswith(_SETTINGS):
                del os.environ[name]


@contextlib.contextmanager
def _wandb_run(tracking: Tracking, title: str, own_id: str, folder: Path) -> Iterator[None]:
    """A run of Weights & Biases, which transformers' callback takes over because it is there."""
    import wandb

    try:
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "s2l_ray"),
            name=title,
            group=tracking.group,
            job_type=tracking.stage,
            tags=["s2l_ray", tracking.stage],
            id=own_id,
            resume="allow",
            dir=os.environ.get("WANDB_DIR", str(folder)),
            settings=wandb.Settings(console="off", silent=True, disable_git=True, save_code=False),
        )
    except wandb.Error as error:
        raise _unreachable(
            "wandb", error, "Run `wandb login` on the workers, or set WANDB_API_KEY or WANDB_MODE=offline"
        ) from None
    exit_code = 1
    try:
        yield
        exit_code = 0
    finally:
        run.finish(exit_code=exit_code)


@contextlib.contextmanager
def _mlflow_run(tracking: Tracking, title: str, own_id: str, folder: Path) -> Iterator[None]:
    """A run of MLflow, which transformers' callback takes over because it is there."""
    # Files, which every MLflow can write: its database needs more than `mlflow-skinny`.
    local = {} if STORE in os.environ else {STORE: f"file://{folder}/mlruns", "MLFLOW_ALLOW_FILE_STORE": "true"}
    with _environment(local):
        import mlflow

        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", tracking.name)
        tags = {"s2l_ray.id": own_id, "s2l_ray.stage": tracking.stage, "s2l_ray.group": tracking.group}
        try:
            mlflow.set_tracking_uri(os.environ[STORE])
            mlflow.set_experiment(experiment)
            query = f"tags.`s2l_ray.id` = '{own_id}'"
            begun = mlflow.search_runs(experiment_names=[experiment], filter_string=query, output_format="list")
            mlflow.start_run(run_id=begun[0].info.run_id if begun else None, run_name=title, tags=tags)
        except mlflow.MlflowException as error:
            raise _unreachable("mlflow", error, f"Check {STORE} and its credentials on the workers") from None
        # Parameters of a run cannot change, and the folder on this node may.
        with _environment({"MLFLOW_MAX_LOG_PARAMS": "0"} if begun else {}):
            status = "FAILED"
            try:
                yield
                status = "FINISHED"
            finally:
                mlflow.end_run(status)


def _unreachable(kind: str, error: Exception, remedy: str) -> ConfigError:
    reason = " ".join(str(error).split())[:200].rstrip(".")
    return ConfigError(f"trackers: {kind} cannot be used ({reason}). {remedy}, or leave it out.")
