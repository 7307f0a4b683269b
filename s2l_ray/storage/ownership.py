"""What in a directory is this program's own. Only that is ever removed or overwritten; the rest is refused by name.

A stage's directory is ours by its manifest or its building mark, the scratch directory by its `CACHEDIR.TAG`, `run.json` by
its schema, the report by its generator tag. A directory that has files and no such mark is the user's.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from s2l_ray.errors import ArtifactError
from s2l_ray.storage.artifacts import Artifact, Key
from s2l_ray.storage.layout import (
    BUILDING,
    PAGE,
    RUN,
    SCHEMA,
    SPILLED,
    STAGE_NAMES,
    TAG,
    WORK,
    is_stage_file,
    is_unrenamed,
)
from s2l_ray.storage.places import Storage

GENERATOR = '<meta name="generator" content="s2l_ray">'
"""Stands at the head of the report's page."""
_HEAD_BYTES = 2000
_AT_ONCE = 16
# The standard of bford.info/cachedir: backups leave a directory with this file out.
_TAG_TEXT = b"""Signature: 8a477f597d28d172789f06886806bc55
# Scratch of s2l_ray: all in this directory may be removed while no run is at work, and is removed by runs.
"""


def foreign(storage: Storage, name: str) -> ArtifactError:
    """The error of a place where somebody else's file lies."""
    return ArtifactError(
        f"{storage.uri}/{name}: not written by s2l_ray, which would need {storage.uri} for itself. Nothing was changed there. "
        "Give another directory, or move what is yours."
    )


def check_run(run: Storage) -> None:
    """Raise ArtifactError where a run would meet somebody else's files in its directory; to be called before anything else."""
    check_stages(run, STAGE_NAMES)
    if not _is_missing(run):
        read_run(run)


def check_stages(run: Storage, stages: Iterable[str]) -> None:
    """Raise ArtifactError where somebody else's files lie in the scratch directory or in one of these stages' directories."""
    if _is_missing(run):
        return
    _is_tagged(run.child(WORK))
    for stage in stages:
        storage = run.child(stage)
        check_page(storage) if stage == STAGE_NAMES[-1] else check_stage(storage, stage)


def _is_missing(run: Storage) -> bool:
    """Whether there is no such directory on the disk; taking the lock makes it, or reports why not."""
    return run.is_local and not Path(run.path()).is_dir()


def check_stage(storage: Storage, stage: str) -> None:
    """Raise ArtifactError where a directory has files but neither a manifest nor a building mark of ours."""
    if Artifact.find(storage) is None and read_building(storage) is None:
        _check_empty(storage, stage)


def check_page(storage: Storage) -> None:
    """Raise ArtifactError where a directory has files but no report of ours."""
    try:
        with storage.open(PAGE) as file, storage.explained(PAGE):
            is_ours = GENERATOR.encode() in file.read(_HEAD_BYTES)
    except FileNotFoundError:
        _check_empty(storage, STAGE_NAMES[-1])
    else:
        if not is_ours:
            raise foreign(storage, PAGE)


def _check_empty(storage: Storage, stage: str) -> None:
    """Raise ArtifactError where there are other files than those that a killed attempt left half written."""
    others = [name for name in storage.names(recursive=True) if not is_unrenamed(stage, name)]
    if others:
        raise foreign(storage, others[0])


def read_run(run: Storage) -> dict[str, Any]:
    """The content of `run.json`, empty where there is none. Raises ArtifactError where it is somebody else's, or damaged."""
    return _ours(run, RUN) or {}


def read_building(storage: Storage) -> dict[str, Any] | None:
    """What an unfinished stage is built for, None if none is. Raises ArtifactError where the mark is not ours."""
    return _ours(storage, BUILDING)


def write_building(storage: Storage, key: Key) -> None:
    """Mark a directory as one in which a stage is being built."""
    value = {"schema": SCHEMA, "fingerprint": key.fingerprint, "recipe": key.recipe, "inputs": key.inputs}
    storage.write_json(BUILDING, value)


def _ours(storage: Storage, name: str) -> dict[str, Any] | None:
    """A JSON file that names our schema, None if there is none. Raises ArtifactError where it names none."""
    found = storage.read_json(name)
    if found is not None and not (isinstance(found, dict) and found.get("schema") == SCHEMA):
        raise foreign(storage, name)
    return found


def scratch_of(run: Storage) -> Storage:
    """A run's scratch directory, marked as ours. Raises ArtifactError where a directory of that name is somebody else's."""
    work = run.child(WORK)
    if not _is_tagged(work):
        work.write(TAG, _TAG_TEXT)
    return work


def _is_tagged(work: Storage) -> bool:
    """Whether a scratch directory has our mark; False where there is none yet. Raises ArtifactError where it is not ours."""
    try:
        is_ours = work.read(TAG) == _TAG_TEXT
    except FileNotFoundError:
        others = [name for name in work.names(recursive=True) if not name.startswith(f"{TAG}.")]  # one is just being written
        if TAG in others:  # another process has marked it in between
            return True
        if others:
            raise foreign(work, others[0]) from None
        return False
    if not is_ours:
        raise foreign(work, TAG)
    return True


@contextlib.contextmanager
def scratch_folder(work: Storage) -> Iterator[Path]:
    """A local folder for what does not fit into memory: in a run's scratch directory, or for object storage on this machine.

    It is empty at the start, also where a killed run left files there, and removed at the end.
    """
    if not work.is_local:
        with tempfile.TemporaryDirectory(prefix="s2l_ray-") as folder:
            yield Path(folder)
        return
    folder_here = Path(work.path(SPILLED))
    shutil.rmtree(folder_here, ignore_errors=True)
    folder_here.mkdir(parents=True)
    try:
        yield folder_here
    finally:
        shutil.rmtree(folder_here, ignore_errors=True)


def is_linked(storage: Storage, name: str) -> bool:
    """Whether a file lies behind a link to another directory: it is not ours, whatever its name."""
    folders = [str(folder) for folder in Path(name).parents if str(folder) != "."]
    return storage.is_local and any(Path(storage.path(folder)).is_symlink() for folder in folders)


def clear_stage(storage: Storage, stage: str) -> None:
    """Remove what an attempt wrote into a stage's directory, its building mark excepted, file by file.

    Raises ArtifactError, and removes nothing, where a file is there that the stage does not write.
    """
    names = storage.names(recursive=True)
    for name in names:
        if not is_stage_file(stage, name) or is_linked(storage, name):
            raise foreign(storage, name)
    with ThreadPoolExecutor(_AT_ONCE) as pool:  # in object storage each is a request
        list(pool.map(storage.delete, (name for name in names if name != BUILDING)))
