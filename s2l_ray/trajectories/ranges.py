"""Trajectories read, sorted and cut into ranges of ids by Ray's tasks: the driver sees counts, names and sampled ids.

A task reads some row groups, checks them as `files` does, and writes them as sorted runs into scratch space that
all workers see. Where runs follow each other they are the ranges; else a task per range merges what lies in it of all runs.
"""

from __future__ import annotations

import contextlib
import itertools
import pickle
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from s2l_ray.config import WorkerConfig
from s2l_ray.errors import DataError
from s2l_ray.progress import get_log
from s2l_ray.runtime.data import run_tasks
from s2l_ray.runtime.passes import in_tasks
from s2l_ray.storage.artifacts import Artifact
from s2l_ray.storage.layout import SPILLED
from s2l_ray.storage.ownership import scratch_folder
from s2l_ray.storage.places import Storage
from s2l_ray.trajectories.arriving import Arriving, lowest_of
from s2l_ray.trajectories.files import Expected, changed, checked_batches, common_schema, integers_of, rows_of
from s2l_ray.trajectories.id_order import sorted_by_id
from s2l_ray.trajectories.measured import measurements_of
from s2l_ray.trajectories.parts import READ_ROWS, IsWanted, Part, every_group, find_artifact, parts_of, place_name
from s2l_ray.trajectories.ranged_store import RangedStore, RangedTable
from s2l_ray.trajectories.sorting import IdRange, Run, StoredFile, check_unique, is_one_order, merged_runs, of_run_size
from s2l_ray.trajectories.store import Names

_AT_ONCE = 16
# Rows that one task reads: a second or so.
TASK_ROWS = 524_288
# A run is a file that all workers see: of few rows there would be many.
RUN_ROWS = 131_072
_log = get_log("trajectories")


@contextlib.contextmanager
def ranged(
    source: str | Artifact, work: Storage, *, seed: int, stratify_by: str | None = None, statistics: bool = False
) -> Iterator[tuple[RangedStore, Path]]:
    """Trajectories in ranges of ids, and a folder of this machine for what else does not fit; both are removed at the end.

    The ranges lie in the scratch directory `work`; of one in object storage only where Ray has several nodes, else on this
    machine.
    """
    import ray

    is_one_machine = sum(node["Alive"] for node in ray.nodes()) == 1
    with scratch_folder(work) as scratch:
        is_far = not work.is_local and not is_one_machine
        place = work.child(SPILLED).child("ranges") if is_far else Storage(str(scratch / "ranges"))
        place.delete()
        try:
            yield open_ranges(source, place, seed=seed, stratify_by=stratify_by, statistics=statistics), scratch
        finally:
            if is_far:
                place.delete()


def open_ranges(
    source: str | Artifact, place: Storage, *, seed: int, stratify_by: str | None = None, statistics: bool = False
) -> RangedStore:
    """Trajectories of any number in ranges of ids in the directory `place`, with the priorities of a seed.

    `source` and what is raised: as in `open_trajectories`.
    """
    parts, where = parts_of(source), place_name(source)
    found = find_artifact(source) if isinstance(source, str) else source
    opened = parts if found is None else _unchecked(parts, found)
    try:
        expected = _expected(opened, stratify_by, statistics)
        read = _ReadRuns(tuple(parts), _pieces(opened, found is None), stratify_by, statistics, expected, seed, place, RUN_ROWS)
        found_rows = list(_results(read))
        table, names = _ranges([run for one in found_rows for run in one.runs], place)
    except DataError as error:
        raise error if str(error).startswith(where) else DataError(f"{where}: {error}") from error
    num_points = table.schema.field("losses").type.list_size
    _log.info(
        "%s trajectories of %d points from %d files, in %d ranges of ids",
        *(f"{table.num_rows:,}", num_points, len(parts), len(table.files)),
    )
    measured = measurements_of(parts, found, lambda: expected.integers)
    low = lowest_of([table for one in found_rows for table in one.low], table.num_rows)
    content = sum(one.content for one in found_rows) % 2**64
    return RangedStore(table, num_points, names, seed, measurements=measured, content=content, lowest=low, place=place)


def fetch_in_tasks(source: str | Artifact, example_ids: pa.Array, positions_M: NDArray[np.int64]) -> Iterator[pa.Table]:
    """The same tables as `fetch_rows` gives, each read by a task: only the wanted rows come here."""
    parts = parts_of(source)
    found = find_artifact(source) if isinstance(source, str) else source
    opened = parts if found is None else _unchecked(parts, found)
    fetch = _FetchRows(tuple(parts), common_schema(opened, source, example_ids.type), source)
    order_M = np.argsort(positions_M, kind="stable")
    places_M, items = positions_M[order_M], []
    pieces = [piece for task in _pieces(opened, found is None) for piece in task]
    for piece in pieces:
        first, last = np.searchsorted(places_M, [piece.position, piece.position + piece.stop - piece.start])
        if first < last:
            rows_M = places_M[first:last] - piece.position + piece.start
            items.append(_Wanted(piece, rows_M, example_ids.take(pa.array(order_M[first:last]))))
    if sum(len(wanted.ids) for wanted in items) < len(places_M):
        raise changed(source)
    for tables in in_tasks(fetch, items):
        yield from tables


@dataclass(frozen=True)
class _Wanted:
    """Rows of a piece of a part, by their (ascending) numbers in the part, and their ids."""

    piece: _Unread
    rows_M: NDArray[np.int64]
    ids: pa.Array


@dataclass(frozen=True)
class _FetchRows:
    """Task: some rows of a part."""

    parts: tuple[Part, ...]
    schema: pa.Schema
    source: str | Artifact

    def __call__(self, wanted: _Wanted) -> list[pa.Table]:
        part, piece = self.parts[wanted.piece.part], wanted.piece
        some = _SomeRows(**vars(part), start=piece.start, stop=piece.stop)
        return list(rows_of(some, self.schema, wanted.rows_M, wanted.ids, self.source))


def losses_bytes(source: str | Artifact) -> int:
    """How much memory the losses of some files take, by the files' footers; without the column they are refused later."""
    found = find_artifact(source) if isinstance(source, str) else source
    parts = parts_of(source)
    opened = parts if found is None else _unchecked(parts, found)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return 4 * sum(pool.map(Part.num_losses, opened))


def _unchecked(parts: Sequence[Part], artifact: Artifact) -> list[Part]:
    """A run's parts without the check of their hashes, for a look at their footers; tasks that read them check."""
    return [replace(part, source=partial(artifact.root.open, path)) for part, path in zip(parts, artifact.parts(), strict=True)]


def _expected(parts: Sequence[Part], stratify_by: str | None, statistics: bool) -> Expected:
    """What all rows must agree on, by the first row of all."""
    integers = integers_of(parts)
    small = [_FirstRow(**vars(part)) for part in parts]
    names: dict[str, Names] = {}
    for row in checked_batches(small, stratify_by, names, statistics, Expected(integers)):
        fields = [pa.field(field.name, pa.string() if field.name in names else field.type) for field in row.schema]
        beside = [field for field in fields if not pa.types.is_fixed_size_list(field.type) and field.name != "position"]
        return Expected(integers, (small[0].name, pa.schema(beside)), row.schema.field("losses").type.list_size)
    raise DataError("no rows.")


@dataclass(frozen=True)
class _FirstRow(Part):
    """A part of which the first row is read."""

    def batches(
        self, columns: Sequence[str], wanted: IsWanted = every_group, most: int = 1
    ) -> Iterator[tuple[int, pa.RecordBatch]]:
        yield from itertools.islice(super().batches(columns, wanted, most), 1)


@dataclass(frozen=True)
class _Unread:
    """Rows of a part that one task reads."""

    part: int
    start: int
    """The number of the first row in the part."""

    stop: int
    position: int
    """The same in all files."""


def _pieces(parts: Sequence[Part], may_split: bool) -> tuple[tuple[_Unread, ...], ...]:
    """For each task the row groups that it reads: those of a sorted run together, or one larger group. Parts whose hash is
    checked are read as a whole."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        counts = list(pool.map(Part.group_sizes, parts))
    tasks: list[tuple[_Unread, ...]] = []
    waiting: list[_Unread] = []
    position = num_waiting = 0
    for number, sizes in enumerate(counts):
        start = 0
        for size in sizes if may_split else [sum(sizes)]:
            if waiting and num_waiting + size > TASK_ROWS:
                tasks.append(tuple(waiting))
                waiting, num_waiting = [], 0
            waiting.append(_Unread(number, start, start + size, position))
            start, position, num_waiting = start + size, position + size, num_waiting + size
    return (*tasks, tuple(waiting))


@dataclass(frozen=True)
class _NamedRun:
    """A sorted run and the names that its codes stand for."""

    run: Run
    names: Mapping[str, list[str]]


@dataclass(frozen=True)
class _Read:
    """What a task has read."""

    runs: list[_NamedRun]
    content: int
    low: list[pa.Table]
    """See `Arriving`."""


@dataclass(frozen=True)
class _ReadRuns:
    """Task: check some rows and write them as sorted runs."""

    parts: tuple[Part, ...]
    pieces: tuple[tuple[_Unread, ...], ...]
    stratify_by: str | None
    statistics: bool
    expected: Expected
    seed: int
    place: Storage
    run_rows: int

    def __call__(self, number: int) -> dict[str, Any]:
        names: dict[str, Names] = {}
        runs = []
        num_rows = sum(piece.stop - piece.start for task in self.pieces for piece in task)
        arriving = Arriving(self.seed, lambda: {name: values.values for name, values in names.items()}, num_rows)
        for count, table in enumerate(of_run_size(self._rows(self.pieces[number], names), self.run_rows, self.run_rows)):
            ordered = sorted_by_id(table)
            runs.append(_written(self.place, f"run-{number:06d}-{count:03d}.arrow", arriving.finish(ordered)))
        found = {name: values.values for name, values in names.items()}
        read = _Read([_NamedRun(run, found) for run in runs], arriving.content, arriving.low)
        return {"number": number, "runs": pickle.dumps(read)}

    def _rows(self, pieces: Sequence[_Unread], names: dict[str, Names]) -> Iterator[pa.Table]:
        for (part, _), group in itertools.groupby(pieces, lambda piece: (piece.part, piece.position - piece.start)):
            several = list(group)
            first, last = several[0], several[-1]
            some = _SomeRows(**vars(self.parts[part]), start=first.start, stop=last.stop)
            yield from checked_batches([some], self.stratify_by, names, self.statistics, self.expected, first.position)


@dataclass(frozen=True)
class _SomeRows(Part):
    """Some row groups of a part that follow each other."""

    start: int = 0
    stop: int = 0

    def batches(
        self, columns: Sequence[str], wanted: IsWanted = every_group, most: int = READ_ROWS
    ) -> Iterator[tuple[int, pa.RecordBatch]]:
        def is_here(start: int, count: int) -> bool:
            return self.start <= start < self.stop and wanted(start, count)

        yield from super().batches(columns, is_here, most)


def _written(place: Storage, name: str, table: pa.Table) -> Run:
    with place.atomic_path(name, is_scratch=True) as local:
        run = Run.write(local, table)
    return replace(run, path=StoredFile(place, name))


def _results(read: _ReadRuns) -> Iterator[_Read]:
    """What the tasks have read, in the order of the files."""
    # Unpickled is what our own tasks pickled.
    found = {row["number"]: row["runs"] for row in run_tasks(read, len(read.pieces), WorkerConfig())}
    for number in sorted(found):
        yield pickle.loads(found[number])  # noqa: S301


def _ranges(found: list[_NamedRun], place: Storage) -> tuple[RangedTable, dict[str, list[str]]]:
    """The runs as one table in ascending order of ids, and the names of its columns."""
    if not found:
        raise DataError("no rows.")
    check_unique([one.run for one in found])
    found.sort(key=lambda one: one.run.first)
    names: dict[str, Names] = {}
    codes = [
        {name: _codes(names.setdefault(name, Names()), values, name) for name, values in one.names.items()} for one in found
    ]
    runs = [replace(one.run, codes=of_run) for one, of_run in zip(found, codes, strict=True)]
    if not is_one_order(runs):
        runs = merged_runs(runs, lambda ranges: in_tasks(_WriteRange(place), ranges), partial(_remove, place))
    return RangedTable.of_runs(runs), {name: values.values for name, values in names.items()}


def _remove(place: Storage, runs: Iterable[Run]) -> None:
    for run in runs:
        assert isinstance(run.path, StoredFile)
        place.delete(run.path.name)


def _codes(names: Names, values: list[str], column: str) -> NDArray[np.int32]:
    """What the codes of a run are among all names."""
    return np.asarray(names.encode(pa.array(values, pa.string()), column).to_numpy())


@dataclass(frozen=True)
class _WriteRange:
    """Task: the rows of some runs in one range of ids, sorted."""

    place: Storage

    def __call__(self, named: tuple[str, IdRange]) -> Run:
        name, some = named
        return _written(self.place, name, some.rows())
