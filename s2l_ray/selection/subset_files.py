"""A subset's own rows as one file: JSON Lines, the text of the corpus where it is of JSON, or Parquet."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from s2l_ray.errors import ArtifactError
from s2l_ray.examples.columns import holds_json, plain_values
from s2l_ray.progress import get_log
from s2l_ray.selection.json_text import json_line, with_fields
from s2l_ray.storage.artifacts import Artifact
from s2l_ray.storage.layout import as_written

# Rows become Python objects so many at a time; a file is hashed in pieces of so many bytes.
_BATCH_ROWS, _PIECE_BYTES = 1_024, 8 * 2**20
_log = get_log("export")


def subset_lines(selection: Artifact, path: str, with_columns: bool) -> Iterator[bytes]:
    """The rows of a subset's Parquet file as JSON Lines, with the columns that we added or without them.

    Rows of a corpus of JSON are as they were written. JSON is strict: NaN and infinite numbers become null, with a warning
    where they were not null in the run already. What Parquet holds as JSON text is a value again. Raises ConfigError for
    bytes, which JSON cannot hold.
    """
    if as_written(path) in selection.manifest["files"]:
        yield from _lines_as_written(selection, path, _added(selection) if with_columns else [])
        return
    num_changed = 0
    left_out = [] if with_columns else _added(selection)
    for batch in _batches(selection, path):
        rows = batch.drop_columns(left_out)
        texts = [field.name for field in rows.schema if holds_json(field)]
        for row in _plain_rows(rows):
            row |= {name: json.loads(row[name]) for name in texts if row[name] is not None}
            line, was_strict = json_line(row)
            num_changed += not was_strict
            yield f"{line}\n".encode()
    if num_changed:
        _log.warning("%s rows have numbers that are NaN or infinite, which JSON lacks: written as null", f"{num_changed:,}")


def _lines_as_written(selection: Artifact, path: str, added: list[str]) -> Iterator[bytes]:
    name = as_written(path)
    with selection.root.explained(name), selection.root.open(name) as source, io.BufferedReader(cast(Any, source)) as lines:
        if not added:
            yield from lines
            return
        for line, fields in zip(lines, _rows(selection, path, added), strict=True):
            text = with_fields(line.decode().rstrip("\n"), fields)
            yield f"{text}\n".encode()


def _plain_rows(batch: pa.RecordBatch) -> Iterator[dict[str, Any]]:
    """The rows of a batch; a date that Python does not have as text."""
    try:
        yield from batch.to_pylist()
    except (OverflowError, ValueError):
        columns = [plain_values(column) for column in batch.columns]
        yield from (dict(zip(batch.schema.names, values, strict=True)) for values in zip(*columns, strict=True))


def _rows(selection: Artifact, path: str, columns: list[str] | None = None) -> Iterator[dict[str, Any]]:
    for batch in _batches(selection, path, columns):
        yield from batch.to_pylist()


def _batches(selection: Artifact, path: str, columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
    with selection.root.explained(path), selection.root.open(path) as source:
        yield from pq.ParquetFile(source).iter_batches(_BATCH_ROWS, columns=columns)


def write_parquet(selection: Artifact, path: str, with_columns: bool, local: Path) -> None:
    """The rows of a subset's Parquet file: the same bytes, or without the columns that we added."""
    if with_columns:
        with local.open("wb") as file:
            file.writelines(checked_pieces(selection, path))
        return
    batches = (batch.drop_columns(_added(selection)) for batch in _batches(selection, path))
    first = next(batches)
    with pq.ParquetWriter(str(local), first.schema, compression="zstd") as writer:
        for batch in itertools.chain([first], batches):
            writer.write_batch(batch)


def _added(selection: Artifact) -> list[str]:
    return list(selection.summary.get("added_columns", []))


def check_file(selection: Artifact, path: str) -> None:
    """Raises ArtifactError where a file's hash is not the manifest's."""
    for _ in checked_pieces(selection, path):
        pass


def checked_pieces(artifact: Artifact, path: str) -> Iterator[bytes]:
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
