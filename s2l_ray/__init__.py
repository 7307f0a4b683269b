"""SmallToLarge data selection: choose the part of a fine-tuning corpus that is worth training a large model on.

The rooms, each of which knows only those above it:

    errors         what a user can fix, as exceptions
    progress       what a user sees while a run goes on
    config/        the YAML file of a run, checked; what of it decides each stage's result
    storage/       places, artifacts and manifests, the lock; what lies where in a run directory
    runtime/       Ray: the connection, waiting for machines, training groups, the pool of actors, metrics
    examples/      any corpus -> canonical parts with stable ids
    training/      models, tokens, losses, fine-tuning: what the stages with torch stand on
    proxy          examples -> checkpoints of a small model
    trajectories/  checkpoints -> the loss of every example at each of them
    clustering/    trajectories -> groups
    selectors      the other ways to choose a subset, one small function each
    selection/     groups and a budget -> the subset
    target         the subset -> the large model
    evaluation/    the large model, before and after -> metrics on rows that nothing was trained on
    report/        a run -> one page
    pipeline       the stages as one list, and what running them means
    plan/          what a run would do and cost; how far it is
    compare/       arms x budgets x seeds -> one table: is it better than a random sample?
    init/          a corpus -> what it is, and a config to start from
    cli            the command line

The public names below load on first use, so that importing the package pulls in neither torch nor Ray.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from s2l_ray.clustering.groups import Clustering as Clustering
    from s2l_ray.clustering.stage import cluster as cluster
    from s2l_ray.config.parsing import load_config as load_config
    from s2l_ray.config.run import RunConfig as RunConfig
    from s2l_ray.errors import ArtifactError as ArtifactError
    from s2l_ray.errors import ConfigError as ConfigError
    from s2l_ray.errors import DataError as DataError
    from s2l_ray.errors import S2LError as S2LError
    from s2l_ray.errors import StorageError as StorageError
    from s2l_ray.pipeline import run as run
    from s2l_ray.selection.quotas import water_fill as water_fill
    from s2l_ray.selection.stage import select as select
    from s2l_ray.selection.subsets import Selection as Selection
    from s2l_ray.storage.artifacts import Artifact as Artifact
    from s2l_ray.training.schedule import recorded_steps as recorded_steps
    from s2l_ray.trajectories.callback import RecordTrajectories as RecordTrajectories
    from s2l_ray.trajectories.recording import finish_recording as finish_recording
    from s2l_ray.trajectories.recording import record_losses as record_losses

__version__ = "0.1.0"

_MODULE_OF = {
    "Artifact": "storage.artifacts",
    "ArtifactError": "errors",
    "Clustering": "clustering.groups",
    "ConfigError": "errors",
    "DataError": "errors",
    "RecordTrajectories": "trajectories.callback",
    "RunConfig": "config.run",
    "S2LError": "errors",
    "Selection": "selection.subsets",
    "StorageError": "errors",
    "cluster": "clustering.stage",
    "finish_recording": "trajectories.recording",
    "load_config": "config.parsing",
    "record_losses": "trajectories.recording",
    "recorded_steps": "training.schedule",
    "run": "pipeline",
    "select": "selection.stage",
    "water_fill": "selection.quotas",
}
__all__ = sorted(_MODULE_OF)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 's2l_ray' has no attribute '{name}'")
    return getattr(importlib.import_module(f"s2l_ray.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
