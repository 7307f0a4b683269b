"""SmallToLarge data selection: choose the part of a fine-tuning corpus that is worth training a large model on.

The public names below load on first use, so that importing the package pulls in neither torch nor Ray.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from s2l_ray.artifacts import Artifact as Artifact
    from s2l_ray.clustering import Clustering as Clustering
    from s2l_ray.clustering import cluster as cluster
    from s2l_ray.config import RunConfig as RunConfig
    from s2l_ray.config import load_config as load_config
    from s2l_ray.errors import ArtifactError as ArtifactError
    from s2l_ray.errors import ConfigError as ConfigError
    from s2l_ray.errors import DataError as DataError
    from s2l_ray.errors import S2LError as S2LError
    from s2l_ray.errors import StorageError as StorageError
    from s2l_ray.pipeline import run as run
    from s2l_ray.recording import finish_recording as finish_recording
    from s2l_ray.recording import record_losses as record_losses
    from s2l_ray.schedule import recorded_steps as recorded_steps
    from s2l_ray.selection import Selection as Selection
    from s2l_ray.selection import select as select
    from s2l_ray.selection import water_fill as water_fill
    from s2l_ray.training.callback import RecordTrajectories as RecordTrajectories

__version__ = "0.1.0"

_MODULE_OF = {
    "Artifact": "artifacts",
    "ArtifactError": "errors",
    "Clustering": "clustering",
    "ConfigError": "errors",
    "DataError": "errors",
    "RecordTrajectories": "training.callback",
    "RunConfig": "config",
    "S2LError": "errors",
    "Selection": "selection",
    "StorageError": "errors",
    "cluster": "clustering",
    "finish_recording": "recording",
    "load_config": "config",
    "record_losses": "recording",
    "recorded_steps": "schedule",
    "run": "pipeline",
    "select": "selection",
    "water_fill": "selection",
}
__all__ = sorted(_MODULE_OF)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 's2l_ray' has no attribute '{name}'")
    return getattr(importlib.import_module(f"s2l_ray.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
