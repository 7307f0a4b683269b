"""Trajectories in Parquet files: a run's own `trajectories/`, or anybody's, with the checks that their content needs.

Files are streamed, never all in memory: into a `TrajectoryStore` on disk, sorted by id. What was chosen is fetched by the
rows' numbers in the files, so that no table of ids has to be held.
"""

from __future__ import annotations

import contextlib
import io
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from s2l_ray.errors import ArtifactError, ConfigError, DataError, S2LError, StorageError, storage_problem
from s2l_ray.examples.ids import id_column, one_array, priorities
from s2l_ray.progress import get_log
from s2l_ray.storage.artifacts import Artifact
from s2l_ray.storage.layout import BUILDING, CHECKPOINT, LOSSES, MANIFEST, RECORDING, RUN, WORK, folder_step
from s2l_ray.storage.ownership import scratch_folder
from s2l_ray.storage.places import Storage
from s2l_ray.storage.records import content_digest, digest
from s2l_ray.trajectories.sorting import sort_by_id
from s2l_ray.trajectories.store import (
    BLOCK_ROWS,
    Names,
    Trajectories,
    TrajectoryStore,
    check_losses,
    decode_losses,
    label_column,
    token_count_column,
)

_log = get_log("trajectories")


def open_trajectories(
    source: str | Artifact, scratch: Path, pool: Executor, *, stratify_by: str | None = None, seed: int | None = None
) -> TrajectoryStore:
    """Trajectories of any number as a store in the folder `scratch`, with the priorities of a seed if one is given.

    `source`: a Parquet file, a directory or a glob of them (path or URI), or a run's `trajectories/`, every part of which
    is checked against its hash. Columns: `example_id` (string or integer, unique), `losses` (lists of floats, one
    length), and where they are there `source`, `num_response_tokens` (integers) and the column `stratify_by`. Other
    columns are left alone.

    Raises DataError naming the file, column or ids that cannot be used, ArtifactError for an unfinished or damaged
    run directory, ConfigError for an unknown column to stratify by.
    """
    parts = _parts(source)
    where = _place(source)
    names: dict[str, Names] = {}

    def finish(table: pa.Table) -> pa.Table:
        return table if seed is None else table.append_column("priority", pa.array(priorities(table["example_id"], seed)))

    try:
        rows = sort_by_id(_checked_batches(parts, stratify_by, names), scratch, pool, finish)
    except DataError as error:
        raise error if str(error).startswith(where) else DataError(f"{where}: {error}") from error
    num_points = rows.schema.field("losses").type.list_size
    _log.info("%s trajectories of %d points from %d files", f"{rows.num_rows:,}", num_points, len(parts))
    return TrajectoryStore(rows, num_points, {name: found.values for name, found in names.items()}, seed)


@contextlib.contextmanager
def streamed(
    source: str | Artifact, work: Storage, *, seed: int, stratify_by: str | None = None
) -> Iterator[tuple[TrajectoryStore, Path]]:
    """Trajectories in order of ids in a scratch directory, and the folder for more of the kind; it is removed at the end."""
    with scratch_folder(work) as scratch, ThreadPoolExecutor(2) as pool:
        yield open_trajectories(source, scratch / "trajectories", pool, stratify_by=stratify_by, seed=seed), scratch


def _place(source: str | Artifact) -> str:
    return source if isinstance(source, str) else source.root.uri


def read_trajectories(source: str | Artifact, *, stratify_by: str | None = None) -> Trajectories:
    """The same in memory. Raises what `open_trajectories` raises."""
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(2) as pool:
        return open_trajectories(source, Path(scratch), pool, stratify_by=stratify_by).in_memory()


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
    if re.search(r"[*?\[]", uri) or uri.endswith(".parquet"):
        return None
    storage = Storage(uri)
    if storage.size("") is not None:
        return None
    manifest = storage.read_json(MANIFEST)
    if isinstance(manifest, dict) and str(manifest.get("schema")).startswith("s2l_ray/"):
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
    is_of_run = storage.uri.endswith("/trajectories") and run.exists(RUN)
    if manifest is None and (storage.exists(BUILDING) or is_of_run):
        raise ArtifactError(
            f"{uri}: unfinished: {_missing_units(run)}. Run the same `s2l run` again to finish it (`s2l status {run.uri}` "
            "shows how far it is)."
        )
    return None


def _missing_units(run: Storage) -> str:
    """Which losses of a run are not there yet, in a few words."""
    parts, grid = unit_grid(run)
    missing = {step: [part for part in parts if part not in done] for step, done in grid.items()}
    named = [f"{step} lacks {', '.join(left[:3])}{' ...' if len(left) > 3 else ''}" for step, left in missing.items() if left]
    if not grid:
        return "no checkpoint of the proxy has been scored"
    count = sum(map(len, missing.values()))
    if not count:
        return "its parts are not joined yet"
    return f"{count} of {len(grid) * len(parts)} units are missing ({'; '.join(named[:3])}{' ...' if len(named) > 3 else ''})"


def unit_grid(run: Storage) -> tuple[list[str], dict[str, set[str]]]:
    """The parts of a run's examples, and per kept checkpoint (`step-000010`) those whose losses are there.

    A unit lies under the hash of its checkpoint's files: one of other files is none.
    """
    examples, proxy = Artifact.find(run.child("examples")), run.child("proxy")
    if examples is None:
        return [], {}
    grid: dict[str, set[str]] = {}
    for file in proxy.names(recursive=True):
        folder, _, name = file.partition("/")
        if name == CHECKPOINT and folder_step(folder) is not None:
            grid[f"{folder}-{digest((proxy.read_json(file) or {}).get('files'))}"] = set()
    for file in run.child(WORK).child(LOSSES).names(recursive=True):
        model, part = file.split("/")[-2:]
        if model in grid:
            grid[model].add(part)
    return examples.parts(), {model.rpartition("-")[0]: done for model, done in sorted(grid.items())}


def recorded_files(storage: Storage) -> dict[int, list[str]]:
    """The files of an unfinished recording, by step in ascending order; empty where there is none."""
    files: dict[int, list[str]] = {}
    for name in storage.names(RECORDING, recursive=True):
        folder, _, file = name.rpartition("/")
        if (step := folder_step(folder)) is not None and file.endswith(".parquet"):
            files.setdefault(step, []).append(f"{RECORDING}/{name}")
    return dict(sorted(files.items()))


def fetch_rows(source: str | Artifact, example_ids: pa.Array, positions_M: NDArray[np.int64]) -> Iterator[pa.Table]:
    """Some rows by their numbers in the files: tables of `example_id` and `row`, a struct of all columns but `losses`.

    A streaming join with memory for one batch: row groups without a wanted row are not read. Rows come in the order of the
    files. Dictionary-encoded columns come back decoded, and the schema's metadata is left behind, since both change with
    the cut of the parts. Raises DataError where another id stands at a place (any more).
    """
    parts = _parts(source)
    schema = _common_schema(parts, source)
    order_M = np.argsort(positions_M, kind="stable")
    places_M = positions_M[order_M]
    start = 0
    for part in parts:
        stop = start + part.num_rows()
        first, last = np.searchsorted(places_M, [start, stop])
        if first < last:
            yield from _rows_of(
                part, schema, places_M[first:last] - start, example_ids.take(pa.array(order_M[first:last])), source
            )
        start = stop
    if len(places_M) and places_M[-1] >= start:
        raise _changed(source)


def _rows_of(
    part: _Part, schema: pa.Schema, places_M: NDArray[np.int64], ids: pa.Array, source: str | Artifact
) -> Iterator[pa.Table]:
    """Some rows of a part, by their (ascending) numbers."""

    def is_wanted(start: int, count: int) -> bool:
        first, last = np.searchsorted(places_M, [start, start + count])
        return bool(first < last)

    for done, batch in part.batches(schema.names, is_wanted):
        first, last = np.searchsorted(places_M, [done, done + len(batch)])
        if first < last:
            found = _plain(batch).take(pa.array(places_M[first:last] - done))
            if not id_column(found["example_id"], part.name).equals(ids[first:last]):
                raise _changed(source)
            yield pa.table({"example_id": ids[first:last], "row": _as_struct(found, schema)})


def _plain(batch: pa.RecordBatch) -> pa.RecordBatch:
    """A batch without views, which Arrow cannot pick rows from."""
    kinds = {pa.string_view(): pa.string(), pa.binary_view(): pa.binary()}
    fields = [f.with_type(kinds.get(f.type, f.type)) for f in batch.schema]
    return batch.cast(pa.schema(fields)) if any(f.type in kinds for f in batch.schema) else batch


def _changed(source: str | Artifact) -> DataError:
    return DataError(f"{_place(source)}: changed while it was read. Run again when nothing writes there.")


def _common_schema(parts: list[_Part], source: str | Artifact) -> pa.Schema:
    """The columns of all parts but `losses`, dictionaries decoded, integers and floats as wide as the widest."""
    schemas = []
    for part in parts:
        fields = [f.with_metadata(None) for f in part.schema() if f.name != "losses"]
        values = [f.with_type(f.type.value_type) if pa.types.is_dictionary(f.type) else f for f in fields]
        values = [f.with_type(pa.string()) if f.type == pa.string_view() else f for f in values]
        schemas.append(pa.schema(values))
    try:
        return pa.unify_schemas(schemas, promote_options="permissive")
    except (pa.ArrowTypeError, pa.ArrowInvalid) as error:
        raise DataError(f"{_place(source)}: the parts have different columns ({error}).") from error


def _as_struct(batch: pa.RecordBatch, schema: pa.Schema) -> pa.Array:
    columns = [
        batch[field.name].cast(field.type) if field.name in batch.schema.names else pa.nulls(len(batch), field.type)
        for field in schema
    ]
    return pa.StructArray.from_arrays(columns, fields=list(schema))


@dataclass(frozen=True)
class _Part:
    """One Parquet file: its name for messages, how it is opened, and the columns that its folders' names give."""

    name: str
    source: Callable[[], Any]
    constants: Mapping[str, str] = field(default_factory=dict)

    def schema(self) -> pa.Schema:
        return self._with_constants(self._open().schema_arrow)

    def num_rows(self) -> int:
        return int(self._open().metadata.num_rows)

    def batches(
        self, columns: Sequence[str], wanted: Callable[[int, int], bool] = lambda _start, _count: True
    ) -> Iterator[tuple[int, pa.RecordBatch]]:
        """The part in batches of at most 65,536 rows, each with the number of rows before it. Row groups (by their first row
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
                    for batch in file.iter_batches(BLOCK_ROWS, columns=known, row_groups=[group]):
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
            return pq.ParquetFile(self.source())
        except (OSError, pa.ArrowException) as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> S2LError:
        problem = storage_problem(error, self.name)
        if problem is not None:
            return StorageError(problem)
        return DataError(f"{self.name}: cannot be read as Parquet, it may be truncated ({error}). Write this file again.")


def _artifact_parts(artifact: Artifact) -> list[_Part]:
    def source(path: str) -> Callable[[], Any]:
        return lambda: io.BytesIO(artifact.read_bytes(path))

    return [_Part(f"{artifact.root.uri}/{path}", source(path)) for path in artifact.parts()]


def _parts(place: str | Artifact) -> list[_Part]:
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
    return [
        _Part(f"{storage.uri.rstrip('/')}/{name}" if name else uri, source(storage, name), _folder_columns(name))
        for name in names
    ]


def _folder_columns(name: str) -> dict[str, str]:
    """What folders called `column=value` say, as Spark and Hive write them; an empty name is a missing value there."""
    pairs = re.findall(r"([^/=]+)=([^/]*)/", name)
    return {key: unquote(value) for key, value in pairs if value != "__HIVE_DEFAULT_PARTITION__"}


def _files(uri: str) -> tuple[Storage, list[str]]:
    """A place and the names of the Parquet files in it; the name is empty where the place is the file itself."""
    wildcard = re.search(r"[*?\[]", uri)
    if wildcard is None:
        storage = Storage(uri)
        if storage.size("") is not None:
            return storage, [""]
        if not storage.exists():
            raise DataError(f"{uri}: no such file or directory. Give a Parquet file, a directory or a glob of them.")
        pattern = re.compile(r".*\.parquet")
    else:
        base, slash, _ = uri[: wildcard.start()].rpartition("/")
        storage = Storage(base or (slash or "."))
        pattern = _glob_pattern(uri[len(base) + len(slash) :])
    # Spark and others leave files such as _SUCCESS and .crc beside the parts.
    names = [name for name in storage.names(recursive=True) if not re.search(r"(^|/)[._]", name)]
    # Nor are the results of this program its input: an output inside the input's folder is left alone.
    results = {name.rpartition("/")[0] for name in names if name.rpartition("/")[2] in (MANIFEST, BUILDING)} - {""}
    found = [name for name in names if pattern.fullmatch(name) and name.rpartition("/")[0] not in results]
    if not found:
        hint = f" It looks like a run: give {uri}/trajectories." if storage.exists(RUN) else ""
        raise DataError(f"{uri}: no Parquet files there.{hint}")
    return storage, found


def _glob_pattern(glob: str) -> re.Pattern[str]:
    """A shell pattern over paths: `*` and `?` stay inside one directory, `**/` crosses any number of them."""
    pieces = {"**/": "(?:.*/)?", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(\*\*/|\*|\?|\[[^\]]+\])", glob)
    return re.compile("".join(pieces.get(p, p if p.startswith("[") else re.escape(p)) for p in parts))


def _checked_batches(parts: list[_Part], stratify_by: str | None, names: dict[str, Names]) -> Iterator[pa.Table]:
    """All rows as the store has them, in the order of the files. Raises where a file cannot be used, or does not fit."""
    first: tuple[str, pa.Schema] | None = None
    num_points: int | None = None
    position = 0
    for part in parts:
        for _, batch in part.batches(_wanted_columns(part, stratify_by)):
            table = _checked_columns(batch, part.name)
            if first is None:
                first = part.name, table.schema
            elif table.schema != first[1]:
                raise DataError(f"{part.name}: has {_signature(table.schema)}, but {first[0]} has {_signature(first[1])}.")
            if not len(table):
                continue
            ids = one_array(table["example_id"])
            losses_MT = decode_losses(batch["losses"], ids, part.name, num_points)
            check_losses(losses_MT, ids, part.name)
            num_points = losses_MT.shape[1]
            for name in table.column_names:
                if pa.types.is_string(table[name].type) and name != "example_id":
                    codes = names.setdefault(name, Names()).encode(one_array(table[name]), name)
                    table = table.set_column(table.schema.get_field_index(name), name, codes)
            flat = pa.array(losses_MT.reshape(-1))
            table = table.append_column("losses", pa.FixedSizeListArray.from_arrays(flat, num_points))
            yield table.append_column("position", pa.array(np.arange(position, position + len(table))))
            position += len(table)


def _wanted_columns(part: _Part, stratify_by: str | None) -> list[str]:
    """The columns of a part that are read. Raises where one is missing that must be there."""
    names = part.schema().names
    listed = ", ".join(names)
    for name in ("example_id", "losses"):
        if name not in names:
            raise DataError(f"{part.name}: column '{name}' is missing (columns: {listed}).")
    if stratify_by is not None and stratify_by not in names:
        raise ConfigError(f"clustering.stratify_by: no column '{stratify_by}' in {part.name}. Known: {listed}.")
    wanted = ["example_id", "losses", "source", "num_response_tokens", stratify_by or "source"]
    return [name for name in dict.fromkeys(wanted) if name in names]


def _checked_columns(batch: pa.RecordBatch, where: str) -> pa.Table:
    """A batch without its losses: ids as string or int64, token counts as int32, the others as strings."""
    ids = id_column(batch["example_id"], where)
    columns = {"example_id": ids}
    for name in batch.schema.names:
        if name == "num_response_tokens":
            columns[name] = token_count_column(batch[name], ids, where)
        elif name not in {"example_id", "losses"}:
            columns[name] = label_column(batch[name], name, where)
    return pa.table(columns)


def _signature(schema: pa.Schema) -> str:
    return ", ".join(f"{f.name}: {f.type}" for f in schema)
