"""The subset for another trainer: the corpus's own rows as one file. `s2l export`."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from pyarrow import fs

from s2l_ray.errors import ArtifactError, ConfigError
from s2l_ray.progress import get_log
from s2l_ray.storage.artifacts import Artifact
from s2l_ray.storage.layout import RUN, STAGE_NAMES, WORK
from s2l_ray.storage.places import Storage, absolute_uri

# Rows become Python objects so many at a time; a file is copied and hashed in pieces of so many bytes.
_BATCH_ROWS, _PIECE_BYTES = 1_024, 8 * 2**20
_log = get_log("export")


def export_subset(run_dir: str, file_format: str, output: str, subset: str = "selected") -> int:
    """Write the subset's rows to one JSON Lines or Parquet file, whole or not at all; how many they are.

    `subset`: `selected`, `random`, or `selected-BUDGET`. Memory is for one row group (about 64 MB of rows at most). JSON is
    strict: NaN and infinite numbers, which it does not know, become null, with a warning. Raises ArtifactError for an
    unknown subset and, with nothing written, for a damaged one; ConfigError for an `output` that cannot be a file or
    is a run's own, and for bytes, which JSON cannot hold.
    """
    selection = Artifact.read(Storage(run_dir).child("selection"))
    path = f"{subset}.parquet"
    if path not in selection.manifest["files"]:
        hint = " Set evaluation.random_control=true for a random control." if subset == "random" else ""
        known = ", ".join(path.removesuffix(".parquet") for path in selection.manifest["files"])
        raise ArtifactError(f"{run_dir}: has no subset '{subset}'. There are: {known}.{hint}")
    folder, name = _place_of(output)
    run = Storage(run_dir)
    for own in (selection.root, run.child(RUN), *(run.child(one) for one in (*STAGE_NAMES, WORK))):
        if f"{_resolved(folder, name)}/".startswith(f"{_resolved(own)}/"):
            raise ConfigError(f"--output {output}: would replace what a run wrote in {own.uri}. Give another place.")
    with folder.atomic_path(name) as local, local.open("wb") as file:
        for piece in _checked_pieces(selection, path):
            if file_format == "parquet":
                file.write(piece)
        if file_format == "jsonl":
            for line in _json_lines(selection, path):
                file.write(line)
    with selection.root.explained(path), selection.root.open(path) as source:
        return int(pq.ParquetFile(source).metadata.num_rows)


def _place_of(output: str) -> tuple[Storage, str]:
    """The directory and the name of the file to write."""
    parent, _, name = absolute_uri(output).rpartition("/")
    folder = Storage(parent or "/")
    if output.endswith("/") or folder.info(name).type == fs.FileType.Directory:
        inside = f"{output.rstrip('/')}/subset.jsonl"
        raise ConfigError(f"--output {output}: is a directory. Give the file to write, such as {inside}.")
    if folder.is_local:
        if not Path(folder.path()).exists():
            raise ConfigError(f"--output {output}: there is no directory {parent}. Make it first, or give another place.")
        if not Path(folder.path()).is_dir():
            raise ConfigError(f"--output {output}: {parent} is a file. Give another directory.")
        if Path(folder.path(name)).exists() and not Path(folder.path(name)).is_file():
            raise ConfigError(f"--output {output}: is a device or a pipe. Give the file to write.")
    return folder, name


def _resolved(place: Storage, name: str = "") -> str:
    """A place with all links followed."""
    return os.path.realpath(place.path(name)) if place.is_local else f"{place.uri}/{name}".rstrip("/")


def _checked_pieces(artifact: Artifact, path: str) -> Iterator[bytes]:
    """A file in pieces. Raises ArtifactError, after the last, where its hash is not the manifest's."""
    content = hashlib.sha256()
    place = f"{artifact.root.uri}/{path}"
    remedy = f"Remove {artifact.storage.uri} and the stages after it, and run again to rebuild them."
    try:
        with artifact.root.explained(path), artifact.root.open(path) as source:
            while piece := source.read(_PIECE_BYTES):
                content.update(piece)
                yield piece
    except FileNotFoundError as error:
        raise ArtifactError(f"{place}: missing. {remedy}") from error
    if content.hexdigest() != artifact.manifest["files"][path]["sha256"]:
        raise ArtifactError(f"{place}: damaged (its hash is not the manifest's). {remedy}")


def _json_lines(artifact: Artifact, path: str) -> Iterator[bytes]:
    num_changed = 0
    with artifact.root.explained(path), artifact.root.open(path) as source:
        for batch in pq.ParquetFile(source).iter_batches(_BATCH_ROWS):
            for row in batch.to_pylist():
                try:
                    line = json.dumps(row, ensure_ascii=False, allow_nan=False, default=_as_text)
                except ValueError:
                    num_changed += 1
                    line = json.dumps(_without_nan(row), ensure_ascii=False, allow_nan=False, default=_as_text)
                yield f"{line}\n".encode()
    if num_changed:
        _log.warning("%s rows have numbers that are NaN or infinite, which JSON lacks: written as null", f"{num_changed:,}")


def _as_text(value: Any) -> str:
    """A date, a time or a decimal number as text. Raises ConfigError for bytes: their text would not be what they hold."""
    if isinstance(value, bytes):
        raise ConfigError("--format jsonl: the rows have binary values, which JSON cannot hold. Use --format parquet.")
    return str(value)


def _without_nan(value: Any) -> Any:
    """A value with null for every number that is NaN or infinite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    return [_without_nan(inner) for inner in value] if isinstance(value, list | tuple) else value
