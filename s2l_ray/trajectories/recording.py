"""Trajectories from anybody's training: losses recorded step by step become a trajectory store that `s2l select` takes.

    steps = s2l_ray.recorded_steps(total_steps)
    for step in train(model):  # a loop of yours that gives the number of the step just done
        if step in steps:
            losses = cross_entropy(model(inputs), labels, reduction="none")  # every example, model.eval(), no_grad()
            s2l_ray.record_losses("trajectories", step, example_ids, losses)
    s2l_ray.finish_recording("trajectories")  # then: s2l select trajectories --budget 0.1 --output out

A call writes one file, named after its step and its ids: done again after a restart it replaces what it wrote before, and
any number of processes may record at once. Until it is finished a recording is scratch, and nobody reads it as a result.
"""

from __future__ import annotations

import io
import operator
import os
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from s2l_ray.errors import ArtifactError, ConfigError, DataError
from s2l_ray.examples.ids import column_of, id_column, name_examples, not_unique, of_one_type, one_array, repeated
from s2l_ray.progress import get_log
from s2l_ray.storage.artifacts import Artifact, Key
from s2l_ray.storage.drafts import Draft, table_bytes
from s2l_ray.storage.layout import BUILDING, DROPPED, MANIFEST, RECORDING, is_stage_file, part_name, step_folder
from s2l_ray.storage.ownership import read_building, scratch_of, write_building
from s2l_ray.storage.places import Storage
from s2l_ray.storage.records import digest
from s2l_ray.trajectories.id_order import is_ascending
from s2l_ray.trajectories.loss_columns import LOSSES, STATISTICS, check_losses, losses_of, trajectories_table
from s2l_ray.trajectories.parts import recorded_files
from s2l_ray.trajectories.store import BLOCK_ROWS

STAGE = "trajectories"
# Nothing about a training is known here: what the losses are worth as an input, their files say.
KEY = Key(STAGE, 1, {"recorded": True}, {})
OPTIONAL = ("source", "num_response_tokens")
_log = get_log(STAGE)


# --- recording -----------------------------------------------------------------------------------------------------


def record_losses(
    directory: str | os.PathLike[str],
    step: int,
    example_ids: Any,
    losses: Any,
    *,
    source: Any = None,
    num_response_tokens: Any = None,
    statistics: Mapping[str, Any] | None = None,
) -> None:
    """Record the losses of some examples after a step of a training: once a step, or in several calls (ranks, batches)
    whose examples differ. The same examples again replace what was recorded of them.

    `directory`: path or URI. `example_ids`: strings or integers, (N,). `losses`: nats, (N,), of any array library, stored as
    float32. `source`: names of sub-datasets, (N,), `num_response_tokens`: integers, (N,); given at one step or at all.

    `statistics`, for `clustering.features: profile`, at every step or at none: by name, in nats, (N,) each, of the losses of
    the n response tokens of an example, whose mean is its loss, `deviations` (the root of their mean squared distance to the
    mean), `first_thirds` and `last_thirds` (the means of the first and of the last ceil(n / 3)).

    Raises DataError for ids that occur twice or have no common type, for losses that are not finite or not one per example,
    ConfigError for a step that is no number from 0 on and for other statistics than these three, ArtifactError where the
    directory is finished or in use.
    """
    storage = Storage(os.fspath(directory))
    where = f"{storage.uri}: step {step}"
    number = _step_number(step, where)
    _check_open(storage)
    ids = unique_ids(example_ids, where)
    if statistics is not None and sorted(statistics) != sorted(STATISTICS):
        raise ConfigError(
            f"{where}: statistics are {', '.join(STATISTICS)}, all of them; found {', '.join(statistics) or 'none'}."
        )
    points = {LOSSES: losses} if statistics is None else {LOSSES: losses, **statistics}
    matrices = {name: _one_value_each(values, len(ids), where, name)[:, None] for name, values in points.items()}
    for name, values_N1 in matrices.items():
        check_losses(values_N1, ids, where, name)
    if not len(ids):  # a rank without a share
        return
    given = {name: _plain(values) for name, values in zip(OPTIONAL, (source, num_response_tokens), strict=True)}
    table = _in_order(_table(ids, matrices, {k: v for k, v in given.items() if v is not None}, where))
    name = digest(table["example_id"].to_pylist(), 16)
    scratch_of(storage)
    storage.write(f"{_folder(number)}/{name}.parquet", table_bytes(table))


def unique_ids(example_ids: Any, where: str) -> pa.Array:
    """Ids in any form as strings, int64 or uint64, in their order. Raises DataError for repeated ones and for mixed types."""
    column = column_of(_plain(example_ids), f"{where}: example_ids")
    ids = id_column(column if len(column) else column.cast(pa.string()), where)
    twice = repeated(ids)
    if len(twice):
        raise not_unique(twice, where)
    return ids


def note_dropped(directory: str | os.PathLike[str], dropped: Mapping[str, int]) -> None:
    """Keep the counts of examples that are not recorded, by reason, for the manifest.

    Raises ArtifactError where the directory is finished or in use.
    """
    storage = Storage(os.fspath(directory))
    _check_open(storage)
    scratch_of(storage)
    storage.write_json(DROPPED, dict(dropped))


def forget_steps(directory: str | os.PathLike[str], steps: Iterable[int]) -> None:
    """Remove what is recorded of some steps: a training that goes back behind them records them again.

    Raises ArtifactError where the scratch directory is somebody else's.
    """
    storage = Storage(os.fspath(directory))
    scratch_of(storage)
    for step in steps:
        storage.delete(_folder(step))


def has_statistics(storage: Storage, step: int) -> bool:
    """Whether a recorded step of an unfinished recording has statistics beside its losses."""
    return STATISTICS[0] in pq.read_schema(io.BytesIO(storage.read(recorded_files(storage)[step][0]))).names


def _folder(step: int) -> str:
    return f"{RECORDING}/{step_folder(step)}"


def _step_number(step: Any, where: str) -> int:
    try:
        number = -1 if isinstance(step, bool) else operator.index(step)
    except TypeError:
        number = -1
    if number < 0:
        raise ConfigError(f"{where}: a step is a whole number from 0 (the untrained model) on.")
    return number


def _check_open(storage: Storage) -> None:
    """Raise ArtifactError where a recording may not be written: it is finished, or the place is another's."""
    if Artifact.find(storage) is not None:
        raise ArtifactError(f"{storage.uri}: finished, nothing more is recorded there. Give another directory, or remove it.")
    begun = read_building(storage)
    if begun is not None and begun.get("recipe") != KEY.recipe:
        raise ArtifactError(f"{storage.uri}: an unfinished stage of a run. Give another directory.")
    if begun is None and any(name.endswith(".parquet") for name in storage.names()):
        raise ArtifactError(f"{storage.uri}: holds other Parquet files. Give another directory.")


def _plain(values: Any) -> Any:
    """Values that Arrow and numpy read: a tensor of any device and precision as an array, known without importing torch."""
    if not hasattr(values, "detach"):
        return values
    values = values.detach().cpu()
    return (values.float() if values.is_floating_point() else values).numpy()


def _one_value_each(values: Any, num_examples: int, where: str, name: str) -> NDArray[np.float32]:
    """Losses (or a statistic) in any form, float32 (N,). Raises DataError for another shape."""
    try:
        with np.errstate(over="ignore"):
            values_N = np.asarray(_plain(values), np.float32)
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: {name} are not numbers, one for each example ({error}).") from error
    if values_N.shape == (num_examples,):
        return values_N
    if values_N.size == 1 and name == LOSSES:
        raise DataError(
            f"{where}: one loss for {num_examples:,} examples, their mean it seems. Compute the loss with "
            "reduction='none' and give one for each example."
        )
    raise DataError(
        f"{where}: {name} of shape {values_N.shape} for {num_examples:,} example_ids. Give one for each: reduction='none', "
        "then the mean over each example's own tokens."
    )


def _table(ids: pa.Array, matrices: Mapping[str, NDArray[np.float32]], given: Mapping[str, Any], where: str) -> pa.Table:
    """Trajectories (losses, and statistics if there are any, (N, T) each) with the optional columns that are given, in the form
    of a run's own."""
    for name, values in given.items():
        if len(values) != len(ids):
            raise DataError(f"{where}: {len(values):,} values of {name} for {len(ids):,} example_ids: give one for each.")
    sources, tokens = given.get("source", pa.nulls(len(ids))), given.get("num_response_tokens", np.zeros(len(ids), np.int32))
    statistics = {name: values_NT for name, values_NT in matrices.items() if name != LOSSES}
    try:
        table = trajectories_table(ids, matrices[LOSSES], sources, tokens, statistics)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    return table.drop_columns([name for name in OPTIONAL if name not in given])


def _in_order(table: pa.Table) -> pa.Table:
    """The rows in ascending order of their ids."""
    return table.take(pc.array_sort_indices(one_array(table["example_id"]))).combine_chunks()


# --- finishing -----------------------------------------------------------------------------------------------------


def finish_recording(directory: str | os.PathLike[str]) -> Artifact:
    """Join the recorded steps into a finished trajectory store; the same bytes for any order and split of the calls.

    One process calls it, after the last `record_losses` of all. On a finished directory it gives what is there. Ids and
    losses are in memory: 4 * T bytes a row (four times as many with statistics) and the ids.

    Raises DataError where a step lacks examples or has one twice, where some steps have statistics and some have not, where a
    source or token count changes or is missing for some, ArtifactError where nothing is recorded or the directory is another
    stage's.
    """
    storage = Storage(os.fspath(directory))
    found = Artifact.find(storage)
    if found is not None:
        if found.stage != STAGE:
            raise ArtifactError(f"{storage.uri}: holds the stage '{found.stage}'. Give the directory of a recording.")
        return found
    _check_open(storage)
    files = recorded_files(storage)
    if not files:
        raise ArtifactError(f"{storage.uri}: no step is recorded there. Call s2l_ray.record_losses first.")
    scratch_of(storage)
    ids, matrices, columns = _joined(storage, files)
    draft = Draft(storage, KEY, storage.child(RECORDING))
    write_building(storage, KEY)
    for name in storage.names():
        # Of an attempt that was killed: `_check_open` lets nobody else's Parquet files be here.
        if name not in (BUILDING, MANIFEST) and is_stage_file(STAGE, name):
            storage.delete(name)
    totals_T = np.zeros(len(files))
    for number, start in enumerate(range(0, len(ids), BLOCK_ROWS)):
        rows = slice(start, start + BLOCK_ROWS)
        some = {name: values_NT[rows] for name, values_NT in matrices.items()}
        for name, values_MT in some.items():
            check_losses(values_MT, ids[rows], storage.uri, name)
        part = _table(ids[rows], some, {name: column[rows] for name, column in columns.items()}, storage.uri)
        draft.write_table(part_name(number), part)
        totals_T += some[LOSSES].sum(0, dtype=np.float64)
    summary = {
        "rows": len(ids),
        "dropped": storage.read_json(DROPPED) or {},
        "num_checkpoints": len(files),
        "steps": list(files),
        "mean_losses": (totals_T / len(ids)).round(6).tolist(),
    }
    _log.info("%s examples recorded at %d steps in %s", f"{len(ids):,}", len(files), storage.uri)
    return draft.publish(summary)


def _joined(
    storage: Storage, files: Mapping[int, list[str]]
) -> tuple[pa.Array, dict[str, NDArray[np.float32]], dict[str, pa.Array]]:
    """Ids in ascending order, losses and statistics (N, T) in order of steps, and the optional columns that were given."""
    first_ids, matrices = pa.nulls(0), dict[str, NDArray[np.float32]]()
    columns: dict[str, pa.Array] = {}
    for point, (step, names) in enumerate(files.items()):
        table = _read_step(storage, step, names)
        ids = one_array(table["example_id"])
        if point == 0:
            first_ids, known = ids, [name for name in (LOSSES, *STATISTICS) if name in table.column_names]
            matrices = {name: np.empty((len(ids), len(files)), np.float32) for name in known}
        _check_same_ids(storage, (next(iter(files)), first_ids), (step, ids))
        _check_same_statistics(storage, (next(iter(files)), matrices), (step, table.column_names))
        for name, values_NT in matrices.items():
            values_NT[:, point] = losses_of(table, name)[:, 0]
        for name in OPTIONAL:
            if name in table.column_names:
                columns[name] = _agreed(columns.get(name), one_array(table[name]), ids, f"{storage.uri}: step {step}: {name}")
    for name, column in columns.items():
        if column.null_count:
            unknown = name_examples(first_ids.filter(column.is_null()))
            raise DataError(f"{storage.uri}: {name} is given for some examples and not for {unknown}. Give it for all.")
    return first_ids, matrices, columns


def _read_step(storage: Storage, step: int, names: list[str]) -> pa.Table:
    """All that is recorded of a step, in ascending order of ids; optional columns are null where a call had none.

    Raises DataError naming a damaged file, or examples that were recorded twice.
    """
    tables: list[pa.Table] = []
    for name in names:
        try:
            tables.append(pq.read_table(io.BytesIO(storage.read(name))))
        except pa.ArrowException as error:
            remedy = "Remove it and record its examples again."
            raise DataError(f"{storage.uri}/{name}: cannot be read as Parquet ({error}). {remedy}") from error
    columns = of_one_type([one_array(table["example_id"]) for table in tables], f"{storage.uri}: step {step}")
    tables = [table.set_column(0, "example_id", ids) for table, ids in zip(tables, columns, strict=True)]
    table = _in_order(pa.concat_tables(tables, promote_options="default"))
    ids = one_array(table["example_id"])
    if not is_ascending(ids):
        raise DataError(
            f"{storage.uri}: step {step}: recorded more than once, in calls with different examples: "
            f"{name_examples(repeated(ids))}. If the training was started again with another number of processes or another "
            f"batch size, remove {storage.uri}/{_folder(step)} and record the step again."
        )
    return table


def _check_same_ids(storage: Storage, first: tuple[int, pa.Array], other: tuple[int, pa.Array]) -> None:
    """Raise DataError where two steps have different examples, naming the step that lacks some."""
    (first_step, first_ids), (step, ids) = first, other
    if ids.equals(first_ids):
        return
    first_ids, ids = of_one_type([first_ids, ids], f"{storage.uri}: steps {first_step} and {step}")
    for lacking, found, there in ((step, ids, first_ids), (first_step, first_ids, ids)):
        missing = there.filter(pc.invert(pc.is_in(there, found)))
        if len(missing):
            raise DataError(
                f"{storage.uri}: step {lacking} lacks {len(missing):,} of the examples: {name_examples(missing)}. Record "
                f"them with record_losses(..., {lacking}, ...), or remove {storage.uri}/{_folder(lacking)} to leave the step "
                "out; then call finish_recording again."
            )


def _check_same_statistics(storage: Storage, first: tuple[int, Collection[str]], other: tuple[int, Collection[str]]) -> None:
    """Raise DataError where one of two steps has statistics and the other has none, naming it."""
    (lacking, _), (having, _) = sorted((first, other), key=lambda one: STATISTICS[0] in one[1])
    if len({STATISTICS[0] in columns for _, columns in (first, other)}) > 1:
        raise DataError(
            f"{storage.uri}: step {lacking} lacks {', '.join(STATISTICS)}, which step {having} has. Record them at every step "
            f"or at none, or remove {storage.uri}/{_folder(lacking)} to leave the step out."
        )


def _agreed(known: pa.Array | None, found: pa.Array, ids: pa.Array, where: str) -> pa.Array:
    """A column as all steps so far have it, nulls where none does. Raises DataError where two differ."""
    if known is None:
        return found
    differs = ids.filter(pc.fill_null(pc.not_equal(known, found), False))
    if len(differs):
        raise DataError(f"{where} is not what an earlier step has for {name_examples(differs)}. Give the same, or once.")
    return pc.coalesce(known, found)
