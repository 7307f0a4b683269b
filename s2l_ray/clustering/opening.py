"""Trajectories where they will be grouped: in files that Ray's workers see, or in order of ids on this machine."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from s2l_ray.clustering.engines import works_in_ray
from s2l_ray.config import GroupingConfig
from s2l_ray.runtime.session import connect_ray
from s2l_ray.storage.artifacts import Artifact
from s2l_ray.storage.places import Storage
from s2l_ray.trajectories.files import streamed
from s2l_ray.trajectories.ranges import losses_bytes, ranged
from s2l_ray.trajectories.store import TrajectoryStore


@contextlib.contextmanager
def open_rows(
    source: str | Artifact,
    work: Storage,
    machines: GroupingConfig,
    *,
    seed: int,
    stratify_by: str | None = None,
    statistics: bool = False,
) -> Iterator[tuple[TrajectoryStore, Path]]:
    """Trajectories as `machines.clustering` wants them (see `works_in_ray`), with the priorities of a seed, and a folder for
    more of the kind; it is removed at the end."""
    in_ray = works_in_ray(machines, partial(losses_bytes, source))
    if in_ray:
        connect_ray()
    opened = ranged if in_ray else streamed
    with opened(source, work, seed=seed, stratify_by=stratify_by, statistics=statistics) as found:
        yield found
