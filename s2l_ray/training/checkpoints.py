"""The proxy's checkpoints: a Hugging Face folder each, `step-000500/`, whose `checkpoint.json` is written last.

`checkpoint.json` lists the folder's files with their hashes: a folder without it is not whole.
"""

from __future__ import annotations

import re
import tempfile
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

from s2l_ray.errors import ArtifactError
from s2l_ray.storage.layout import CHECKPOINT, folder_step, step_folder
from s2l_ray.storage.places import Storage
from s2l_ray.storage.records import FileRecord
from s2l_ray.training.models import save_model


def finished_steps(storage: Storage) -> list[int]:
    """The steps whose checkpoints lie whole in the proxy's directory, ascending."""
    names = [name for name in storage.names(recursive=True) if name.endswith(f"/{CHECKPOINT}")]
    steps = (folder_step(name.removesuffix(f"/{CHECKPOINT}")) for name in names)
    return sorted(step for step in steps if step is not None)


def checkpoint_records(storage: Storage, step: int) -> list[FileRecord]:
    """The files of a kept checkpoint. Raises ArtifactError where it is not whole."""
    name = f"{step_folder(step)}/{CHECKPOINT}"
    record = storage.read_json(name)
    if record is None:
        raise ArtifactError(f"{storage.uri}/{name}: missing. Remove {storage.uri} and run again.")
    return [FileRecord(**file) for file in record["files"]]


def checkpoint_folder(storage: Storage, step: int) -> Path:
    """A local path of a kept checkpoint, its files checked against their hashes. Raises ArtifactError naming a damaged one."""
    local = storage.local_folder(step_folder(step))
    for record in checkpoint_records(storage, step):
        file = local / record.path.partition("/")[2]
        if not file.is_file() or FileRecord.of_file(record.path, file) != record:
            raise ArtifactError(
                f"{storage.uri}/{record.path}: damaged or missing. Remove {storage.uri} and the stages after it, and run again "
                "to rebuild them."
            )
    return local


def keep_checkpoint(storage: Storage, step: int, model: Any, tokenizer: Any) -> None:
    """Write a checkpoint's folder into the proxy's directory, its `checkpoint.json` last."""
    storage.delete(f"{step_folder(step)}/{CHECKPOINT}")  # a resumed training comes by again: half of it must not look whole
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, tokenizer, Path(folder))
        records = storage.upload(folder, step_folder(step))
    storage.write_json(f"{step_folder(step)}/{CHECKPOINT}", {"step": step, "files": [asdict(record) for record in records]})


def steps_of(checkpoints: list[str]) -> list[int]:
    """The steps of given checkpoints: the numbers that their names end with where these ascend, else 1, 2, 3 ..."""
    found = [re.search(r"(\d+)/?$", place) for place in checkpoints]
    steps = [int(match.group(1)) for match in found if match]
    ascending = len(steps) == len(checkpoints) and all(a < b for a, b in pairwise(steps))
    return steps if ascending else list(range(1, len(checkpoints) + 1))
