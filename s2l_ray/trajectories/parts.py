"""Parquet files from anywhere: which there are behind a place, and their rows in batches.

`find_artifact` tells a run's own `trajectories/` from other people's files.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq

from s2l_ray.errors import ArtifactError, DataError, S2LError, StorageError, storage_problem
from s2l_ray.storage.artifacts import Artifact
from s2l_ray.storage.layout import BUILDING, MANIFEST, RECORDING, RUN, folder_step
from s2l_ray.storage.listing import files_below, is_glob, split_glob
from s2l_ray.storage.places import Storage
from s2l_ray.storage.records import content_digest, digest
from s2l_ray.trajectories.sorting import read_ahead

# Of a file on this machine what is read at once: a column of a row group of a million rows takes 50 MB otherwise. Elsewhere
# each read is a request.
BUFFER_BYTES = 2**20
# Rows as they come; 65,536 took 30 MB more, and no less time.
READ_ROWS = 16_384

IsWanted = Callable[[int, int], bool]
"""Whether a row group is read, by the number of its first row and its number of rows."""


def every_group(_start: int, _count: int) -> bool:
    """All row groups."""
    return True


@dataclass(frozen=True)
class Part:
    """One Parquet file: its name for messages, how it is opened, and the columns that its folders' names give."""

    name: str
    source: Callable[[], Any]
    constants: Mapping[str, str] = field(default_factory=dict)
    buffer_bytes: int = 0
    """How much is read at once; 0 for the columns of a row group as a whole."""

    def schema(self) -> pa.Schema:
        return self._with_constants(self._open().schema_arrow)

    def num_rows(self) -> int:
        return int(self._open().metadata.num_rows)

    def num_losses(self) -> int:
        """Values in the column `losses`, 0 where there is none."""
        metadata = self._open().metadata
        names = [metadata.schema.column(place).path for place in range(metadata.num_columns)]
        places = [place for place, name in enumerate(names) if name.split(".")[0] == "losses"]
        return sum(
            metadata.row_group(group).column(place).num_values for group in range(metadata.num_row_groups) for place in places
        )

    def group_sizes(self) -> list[int]:
        """Rows of each row group."""
        metadata = self._open().metadata
        return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]

    def batches(
        self,
        columns: Sequence[str],
        wanted: IsWanted = every_group,
        most: int = READ_ROWS,
    ) -> Iterator[tuple[int, pa.RecordBatch]]:
        """The part in batches of at most `most` rows, each with the number of rows before it. Row groups (by their first row
        and their number of rows) that are not wanted are not read.

        Raises DataError naming the file where it cannot be read.
        """
        try:
            file = self._open()
            known = [name for name in columns if name in file.schema_arrow.names]
            start = 0
            for group in range(file.metadata.num_row_groups):
                count = file.metadata.row_group(group).num_rows
                if wanted(start, count):
                    done = start
                    for batch in read_ahead(file.iter_batches(most, columns=known, row_groups=[group])):
                        yield done, self._filled(batch, columns)
                        done += len(batch)
                start += count
        except (OSError, pa.ArrowException) as error:
            raise self._unreadable(error) from error

    def _with_constants(self, schema: pa.Schema) -> pa.Schema:
        for name in self.constants:
            if name not in schema.names:
                schema = schema.append(pa.field(name, pa.string()))
        return schema

    def _filled(self, batch: pa.RecordBatch, columns: Sequence[str]) -> pa.RecordBatch:
        """A batch with the columns that the folders' names give."""
        for name, value in self.constants.items():
            if name in columns and name not in batch.schema.names:
                batch = batch.append_column(name, pa.repeat(pa.scalar(value), len(batch)))
        return batch

    def _open(self) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(self.source(), buffer_size=self.buffer_bytes)
        except (OSError, pa.ArrowException) as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> S2LError:
        problem = storage_problem(error, self.name)
        if problem is not None:
            return StorageError(problem)
        return DataError(f"{self.name}: cannot be read as Parquet, it may be truncated ({error}). Write this file again.")


def _artifact_parts(artifact: Artifact) -> list[Part]:
    def source(path: str) -> Callable[[], Any]:
        return lambda: io.BytesIO(artifact.read_bytes(path))

    return [Part(f"{artifact.root.uri}/{path}", source(path)) for path in artifact.parts()]


def parts_of(place: str | Artifact) -> list[Part]:
    """The Parquet files behind a path, a URI or a glob, or of a run's stage."""
    artifact = find_artifact(place) if isinstance(place, str) else place
    if artifact is not None:
        return _artifact_parts(artifact)
    uri = str(place)

    def source(storage: Storage, name: str) -> Callable[[], Any]:
        return lambda: storage.open(name)

    try:
        storage, names = _files(uri)
    except OSError as error:
        raise DataError(f"{uri}: cannot be listed ({error}).") from error
    buffer_bytes = BUFFER_BYTES if storage.is_local else 0
    return [
        Part(f"{storage.uri.rstrip('/')}/{name}" if name else uri, source(storage, name), _folder_columns(name), buffer_bytes)
        for name in names
    ]


def _folder_columns(name: str) -> dict[str, str]:
    """What folders called `column=value` say, as Spark and Hive write them; an empty name is a missing value there."""
    pairs = re.findall(r"([^/=]+)=([^/]*)/", name)
    return {key: unquote(value) for key, value in pairs if value != "__HIVE_DEFAULT_PARTITION__"}


def _files(uri: str) -> tuple[Storage, list[str]]:
    """A place and the names of the Parquet files in it; the name is empty where the place is the file itself."""
    directory, glob = split_glob(uri) if is_glob(uri) else (uri, "**")
    storage = Storage(directory)
    if glob == "**":
        if storage.size("") is not None:
            return storage, [""]
        if not storage.exists():
            raise DataError(f"{uri}: no such file or directory. Give a Parquet file, a directory or a glob of them.")
    names = list(files_below(directory, glob))
    # Nor are the results of this program its input: an output inside the input's folder is left alone.
    results = {name.rpartition("/")[0] for name in files_below(directory) if name.rpartition("/")[2] in (MANIFEST, BUILDING)}
    found = [name for name in names if name.rpartition("/")[0] not in results - {""}]
    found = found if glob != "**" else [name for name in found if name.endswith(".parquet")]
    if not found:
        hint = f" It looks like a run: give {uri}/trajectories." if storage.exists(RUN) else ""
        raise DataError(f"{uri}: no Parquet files there.{hint}")
    return storage, found


def files_identity(uri: str) -> str:
    """Names, sizes and last 64 KB (with the statistics of all columns) of the Parquet files behind a place, as 16
    hexadecimal digits: cheap, and changes with their rows."""
    storage, names = _files(uri)

    def identity(name: str) -> list[Any]:
        with storage.explained(name), storage.open(name) as file:
            size = file.size()
            file.seek(max(0, size - 65_536))
            return [name, size, content_digest(file.read())]

    return digest([identity(name) for name in names])


def find_artifact(uri: str) -> Artifact | None:
    """The finished `trajectories/` of a run behind a path or URI, None if other files are there.

    Raises ArtifactError for an unfinished directory or recording, or another stage's.
    """
    if uri.endswith(".parquet") or is_glob(uri):
        return None
    storage = Storage(uri)
    if storage.size("") is not None:
        return None
    manifest = storage.read_json(MANIFEST)
    if _is_ours(manifest):
        artifact = Artifact.read(storage)
        if artifact.stage != "trajectories":
            raise ArtifactError(f"{uri}: holds the stage '{artifact.stage}'. Give the run's trajectories/ directory.")
        return artifact
    steps = list(recorded_files(storage)) if manifest is None else []
    if steps:
        raise ArtifactError(
            f"{uri}: an unfinished recording of {len(steps)} steps ({', '.join(map(str, steps))}). When all are recorded, "
            f"`s2l_ray.finish_recording({uri!r})` finishes it."
        )
    run = Storage(storage.uri.rpartition("/")[0])
    is_of_run = storage.uri.endswith("/trajectories") and _is_ours(run.read_json(RUN))
    if manifest is None and (storage.exists(BUILDING) or is_of_run):
        from s2l_ray.trajectories.units import missing_units

        raise ArtifactError(
            f"{uri}: unfinished: {missing_units(run)}. Run the same `s2l run` again to finish it (`s2l status {run.uri}` "
            "shows how far it is)."
        )
    return None


def _is_ours(content: Any) -> bool:
    """Whether this package wrote a JSON file; another tool's may have the same name."""
    return isinstance(content, dict) and str(content.get("schema")).startswith("s2l_ray/")


def recorded_files(storage: Storage) -> dict[int, list[str]]:
    """The files of an unfinished recording, by step in ascending order; empty where there is none."""
    files: dict[int, list[str]] = {}
    for name in storage.names(RECORDING, recursive=True):
        folder, _, file = name.rpartition("/")
        if (step := folder_step(folder)) is not None and file.endswith(".parquet"):
            files.setdefault(step, []).append(f"{RECORDING}/{name}")
    return dict(sorted(files.items()))


def place_name(source: str | Artifact) -> str:
    return source if isinstance(source, str) else source.root.uri
