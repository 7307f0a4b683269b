"""Trajectories in Parquet files: a run's own `trajectories/`, or anybody's, with the checks that their content needs.

Files are streamed, never all in memory: into a `TrajectoryStore` on disk, sorted by id. What was chosen is fetched by the
rows' numbers in the files, so that no table of ids has to be held.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from s2l_ray.errors import ConfigError, DataError
from s2l_ray.examples.ids import has_large, id_column, one_array
from s2l_ray.progress import get_log
from s2l_ray.runtime.process import give_back_freed_memory
from s2l_ray.storage.artifacts import Artifact
from s2l_ray.storage.ownership import scratch_folder
from s2l_ray.storage.places import Storage
from s2l_ray.trajectories.arriving import Arriving, lowest_of
from s2l_ray.trajectories.loss_columns import (
    EMBEDDING,
    LOSS_WITHOUT_PROMPT,
    LOSSES,
    STATISTICS,
    check_losses,
    decode_losses,
    label_column,
    missing_statistics,
    points_column,
    token_count_column,
)
from s2l_ray.trajectories.measured import measurements_of
from s2l_ray.trajectories.parts import Part, find_artifact, parts_of, place_name
from s2l_ray.trajectories.sorting import sort_by_id
from s2l_ray.trajectories.store import Names, Trajectories, TrajectoryStore

_log = get_log("trajectories")


def open_trajectories(
    source: str | Artifact,
    scratch: Path,
    pool: Executor,
    *,
    stratify_by: str | None = None,
    seed: int | None = None,
    statistics: bool = False,
) -> TrajectoryStore:
    """Trajectories of any number as a store in the folder `scratch`, with the priorities of a seed if one is given.

    `source`: a Parquet file, a directory or a glob of them (path or URI), or a run's `trajectories/`, every part of which
    is checked against its hash. Columns: `example_id` (string or integer, unique), `losses` (lists of floats, one
    length), and where they are there `source`, `num_response_tokens` (integers) and the column `stratify_by`; with
    `statistics` also `deviations`, `first_thirds` and `last_thirds`, lists as long as the losses. Other columns are left alone.

    Raises DataError naming the file, column or ids that cannot be used, ArtifactError for an unfinished or damaged
    run directory, ConfigError for an unknown column to stratify by and for statistics that are not there.
    """
    parts = parts_of(source)
    where = place_name(source)
    names: dict[str, Names] = {}
    found = find_artifact(source) if isinstance(source, str) else source
    try:
        # Of a run's own parts each look reads the whole, to check its hash.
        num_rows = sum(pool.map(Part.num_rows, parts)) if found is None else found.summary["rows"]
        arriving = Arriving(seed, lambda: {name: values.values for name, values in names.items()}, num_rows)
        rows = sort_by_id(checked_batches(parts, stratify_by, names, statistics), scratch, pool, arriving.finish)
    except DataError as error:
        raise error if str(error).startswith(where) else DataError(f"{where}: {error}") from error
    num_points = rows.schema.field("losses").type.list_size
    _log.info("%s trajectories of %d points from %d files", f"{rows.num_rows:,}", num_points, len(parts))
    measured = measurements_of(parts, found, lambda: integers_of(parts))
    low = lowest_of(arriving.low, rows.num_rows)
    found_names = {name: values.values for name, values in names.items()}
    return TrajectoryStore(rows, num_points, found_names, seed, measurements=measured, content=arriving.content, lowest=low)


@contextlib.contextmanager
def streamed(
    source: str | Artifact, work: Storage, *, seed: int, stratify_by: str | None = None, statistics: bool = False
) -> Iterator[tuple[TrajectoryStore, Path]]:
    """Trajectories in order of ids in a scratch directory, and the folder for more of the kind; it is removed at the end."""
    with scratch_folder(work) as scratch, ThreadPoolExecutor(2) as pool:
        place = scratch / "trajectories"
        store = open_trajectories(source, place, pool, stratify_by=stratify_by, seed=seed, statistics=statistics)
        give_back_freed_memory()  # as much as 60 MB of holes, which what comes now would not fill
        yield store, scratch


def read_trajectories(source: str | Artifact, *, stratify_by: str | None = None, statistics: bool = False) -> Trajectories:
    """The same in memory. Raises what `open_trajectories` raises."""
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(2) as pool:
        return open_trajectories(source, Path(scratch), pool, stratify_by=stratify_by, statistics=statistics).in_memory()


def fetch_rows(source: str | Artifact, example_ids: pa.Array, positions_M: NDArray[np.int64]) -> Iterator[pa.Table]:
    """Some rows by their numbers in the files: tables of `example_id` and `row`, a struct of all columns but `losses`, and of
    a run's trajectories or a recording what is recorded beside them.

    A streaming join with memory for one batch: row groups without a wanted row are not read. Rows come in the order of the
    files. Dictionary-encoded columns come back decoded, and the schema's metadata is left behind, since both change with
    the cut of the parts. Raises DataError where another id stands at a place (any more).
    """
    parts = parts_of(source)
    schema = common_schema(parts, source, example_ids.type)
    order_M = np.argsort(positions_M, kind="stable")
    places_M = positions_M[order_M]
    start = 0
    for part in parts:
        stop = start + part.num_rows()
        first, last = np.searchsorted(places_M, [start, stop])
        if first < last:
            yield from rows_of(
                part, schema, places_M[first:last] - start, example_ids.take(pa.array(order_M[first:last])), source
            )
        start = stop
    if len(places_M) and places_M[-1] >= start:
        raise changed(source)


def rows_of(
    part: Part, schema: pa.Schema, places_M: NDArray[np.int64], ids: pa.Array, source: str | Artifact
) -> Iterator[pa.Table]:
    """Some rows of a part, by their (ascending) numbers."""

    def is_wanted(start: int, count: int) -> bool:
        first, last = np.searchsorted(places_M, [start, start + count])
        return bool(first < last)

    for done, batch in part.batches(schema.names, is_wanted):
        first, last = np.searchsorted(places_M, [done, done + len(batch)])
        if first < last:
            found = _plain(batch).take(pa.array(places_M[first:last] - done))
            integers = ids.type if pa.types.is_integer(ids.type) else None
            if not id_column(found["example_id"], part.name, integers).equals(ids[first:last]):
                raise changed(source)
            yield pa.table({"example_id": ids[first:last], "row": _as_struct(found, schema, part.name)})


def _plain(batch: pa.RecordBatch) -> pa.RecordBatch:
    """A batch without views, which Arrow cannot pick rows from."""
    kinds = {pa.string_view(): pa.string(), pa.binary_view(): pa.binary()}
    fields = [f.with_type(kinds.get(f.type, f.type)) for f in batch.schema]
    return batch.cast(pa.schema(fields)) if any(f.type in kinds for f in batch.schema) else batch


def changed(source: str | Artifact) -> DataError:
    return DataError(f"{place_name(source)}: changed while it was read. Run again when nothing writes there.")


def common_schema(parts: list[Part], source: str | Artifact, ids: pa.DataType) -> pa.Schema:
    """The columns of all parts but those that are measured, dictionaries decoded, integers and floats as wide as the widest."""
    schemas = []
    left_out = {LOSSES}
    if isinstance(source, Artifact):  # in others' files these names may mean anything
        left_out |= {*STATISTICS, LOSS_WITHOUT_PROMPT, EMBEDDING}
    for part in parts:
        fields = [f.with_metadata(None) for f in part.schema() if f.name not in left_out]
        values = [f.with_type(f.type.value_type) if pa.types.is_dictionary(f.type) else f for f in fields]
        values = [f.with_type(pa.string()) if f.type == pa.string_view() else f for f in values]
        schemas.append(pa.schema(values))
    if ids == pa.uint64():  # which Arrow would unify with narrower integers as int64
        schemas = [one.set(one.get_field_index("example_id"), pa.field("example_id", ids)) for one in schemas]
    try:
        return pa.unify_schemas(schemas, promote_options="permissive")
    except (pa.ArrowTypeError, pa.ArrowInvalid) as error:
        raise DataError(f"{place_name(source)}: the parts have different columns ({error}).") from error


def _as_struct(batch: pa.RecordBatch, schema: pa.Schema, where: str) -> pa.Array:
    columns = []
    for field in schema:
        try:
            known = field.name in batch.schema.names
            columns.append(batch[field.name].cast(field.type) if known else pa.nulls(len(batch), field.type))
        except pa.ArrowException as error:
            raise DataError(
                f"{where}: column '{field.name}' is {batch.schema.field(field.name).type}, other parts need {field.type} "
                f"({error}). Write it as one type everywhere, or leave it out."
            ) from error
    return pa.StructArray.from_arrays(columns, fields=list(schema))


@dataclass(frozen=True)
class Expected:
    """What rows of some files must agree on with the rows before them."""

    integers: pa.DataType
    """The type of integer ids."""

    first: tuple[str, pa.Schema] | None = None
    """The name of the first file and the columns beside what is measured, as they are checked."""

    num_points: int | None = None


def checked_batches(
    parts: Sequence[Part],
    stratify_by: str | None,
    names: dict[str, Names],
    statistics: bool,
    expected: Expected | None = None,
    position: int = 0,
) -> Iterator[pa.Table]:
    """All rows as the store has them, in the order of the files; the first row's number is `position`. Raises where a file
    cannot be used, or does not fit to the others or to what is `expected`."""
    expected = expected or Expected(integers_of(parts))
    first, num_points, integers = expected.first, expected.num_points, expected.integers
    measured = [LOSSES, *(STATISTICS if statistics else ())]
    for part in parts:
        for _, batch in part.batches(_wanted_columns(part, stratify_by, statistics)):
            table = _checked_columns(batch.drop_columns(measured), part.name, integers)
            if first is None:
                first = part.name, table.schema
            elif table.schema != first[1]:
                raise DataError(f"{part.name}: has {_signature(table.schema)}, but {first[0]} has {_signature(first[1])}.")
            if not len(table):
                continue
            ids = one_array(table["example_id"])
            points = {}
            for name in measured:
                values_MT = decode_losses(batch[name], ids, part.name, num_points, name)
                check_losses(values_MT, ids, part.name, name)
                points[name], num_points = points_column(values_MT), values_MT.shape[1]
            for name in table.column_names:
                if pa.types.is_string(table[name].type) and name != "example_id":
                    codes = names.setdefault(name, Names()).encode(one_array(table[name]), name)
                    table = table.set_column(table.schema.get_field_index(name), name, codes)
            for name, column in points.items():
                table = table.append_column(name, column)
            yield table.append_column("position", pa.array(np.arange(position, position + len(table))))
            position += len(table)


def _wanted_columns(part: Part, stratify_by: str | None, statistics: bool) -> list[str]:
    """The columns of a part that are read. Raises where one is missing that must be there."""
    names = part.schema().names
    listed = ", ".join(names)
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"{part.name}: column '{twice[0]}' occurs more than once (columns: {listed}). Give each its own name.")
    for name in ("example_id", "losses"):
        if name not in names:
            raise DataError(f"{part.name}: column '{name}' is missing (columns: {listed}).")
    if stratify_by is not None and stratify_by not in names:
        raise ConfigError(f"clustering.stratify_by: no column '{stratify_by}' in {part.name}. Known: {listed}.")
    if statistics and (error := missing_statistics(names, part.name)) is not None:
        raise error
    measured = (LOSSES, *STATISTICS) if statistics else (LOSSES,)
    wanted = ["example_id", *measured, "source", "num_response_tokens", stratify_by or "source"]
    return [name for name in dict.fromkeys(wanted) if name in names]


def integers_of(parts: Sequence[Part]) -> pa.DataType:
    """The type of integer ids in all parts: int64 unless one of them is above 2**63 - 1."""
    for part in parts:
        schema = part.schema()
        may_have = schema.names.count("example_id") == 1 and schema.field("example_id").type == pa.uint64()
        if may_have and any(has_large(batch["example_id"]) for _, batch in part.batches(["example_id"])):
            return pa.uint64()
    return pa.int64()


def _checked_columns(batch: pa.RecordBatch, where: str, integers: pa.DataType) -> pa.Table:
    """Columns beside what is measured: ids as string or of the type `integers`, token counts as int32, others as strings."""
    ids = id_column(batch["example_id"], where, integers)
    columns = {"example_id": ids}
    for name in batch.schema.names:
        if name == "num_response_tokens":
            columns[name] = token_count_column(batch[name], ids, where)
        elif name != "example_id":
            columns[name] = label_column(batch[name], name, where)
    return pa.table(columns)


def _signature(schema: pa.Schema) -> str:
    return ", ".join(f"{f.name}: {f.type}" for f in schema)
