"""What is measured of an example beside its losses along the training, and read only where a selector wants it, in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from s2l_ray.errors import ConfigError, DataError
from s2l_ray.examples.ids import column_of, id_column, name_examples, one_array
from s2l_ray.storage.artifacts import Artifact
from s2l_ray.storage.layout import VALIDATION_ROWS
from s2l_ray.trajectories.loss_columns import EMBEDDING, LOSS_WITHOUT_PROMPT, check_losses, decode_losses
from s2l_ray.trajectories.parts import Part

MEASUREMENTS = (LOSS_WITHOUT_PROMPT, EMBEDDING)
VALIDATION_EMBEDDING = "validation_embedding"

Measurements = Mapping[str, Callable[[], NDArray[np.float32]]]
"""Name -> reads the values, shape (N,) or (N, H), in ascending order of ids; those of the validation rows (V, H)."""


def measurements_of(parts: Sequence[Part], source: Any, integers: Callable[[], pa.DataType]) -> Measurements:
    """What is measured in some files, by their columns; `integers` gives the type of integer ids. Nothing is read yet."""
    columns = parts[0].schema().names
    found: dict[str, Callable[[], NDArray[np.float32]]] = {
        name: partial(_read, parts, name, integers) for name in MEASUREMENTS if name in columns
    }
    if isinstance(source, Artifact) and VALIDATION_ROWS in source.manifest["files"]:
        table = partial(source.read_table, VALIDATION_ROWS, columns=["example_id", EMBEDDING])
        found[VALIDATION_EMBEDDING] = lambda: _in_order([table().combine_chunks()], EMBEDDING, VALIDATION_ROWS)
    return found


def given_measurements(values: Mapping[str, Any], example_ids: Any, num_rows: int) -> Measurements:
    """The same from arrays or lists, one value or row for each example in the order of `example_ids`.

    Raises ConfigError for an unknown name, DataError for values that are not of these examples.
    """
    known = (*MEASUREMENTS, VALIDATION_EMBEDDING)
    if unknown := [name for name in values if name not in known]:
        raise ConfigError(f"measurements: no measurement '{unknown[0]}'. Known: {', '.join(known)}.")
    ids = id_column(column_of(np.arange(num_rows) if example_ids is None else example_ids, "example_id"), "example_ids")
    found = {}
    for name, column in values.items():
        array = np.asarray(column, np.float32)
        of = pa.array(np.arange(len(array))) if name == VALIDATION_EMBEDDING else ids
        if len(array) != len(of):
            raise DataError(f"{name}: {len(array):,} values for {len(of):,} trajectories. Give one for each.")
        check_losses(array.reshape(len(array), -1), of, name=name)
        found[name] = partial(_taken, array, of)
    return found


def _taken(values: NDArray[np.float32], ids: pa.Array) -> NDArray[np.float32]:
    return np.asarray(values[pc.array_sort_indices(ids).to_numpy()])


def _read(parts: Sequence[Part], name: str, integers: Callable[[], pa.DataType]) -> NDArray[np.float32]:
    kind = integers()
    tables = []
    for part in parts:
        for _, batch in part.batches(["example_id", name]):
            if name not in batch.schema.names:
                raise DataError(f"{part.name}: column '{name}' is missing, which other files have. Record it for all rows.")
            tables.append(pa.table({"example_id": id_column(batch["example_id"], part.name, kind), name: batch[name]}))
    return _in_order(tables, name, parts[0].name)


def _in_order(tables: Sequence[pa.Table], name: str, where: str) -> NDArray[np.float32]:
    """A column of some tables as an array in ascending order of their ids. Raises DataError naming ids of bad values."""
    values = [_decoded(one_array(table[name]), one_array(table["example_id"]), name, where) for table in tables]
    if len({one.shape[1:] for one in values}) > 1:
        raise DataError(f"{where}: {name} are of several lengths. Record them again.")
    ids = pa.concat_arrays([one_array(table["example_id"]) for table in tables])
    array = np.concatenate(values)
    check_losses(array.reshape(len(array), -1), ids, where, name)
    return _taken(array, ids)


def _decoded(column: pa.Array, ids: pa.Array, name: str, where: str) -> NDArray[np.float32]:
    if not pa.types.is_floating(column.type):
        return decode_losses(column, ids, where, name=name)
    if column.null_count:
        raise DataError(f"{where}: {name} is missing for example_id {name_examples(ids.filter(column.is_null()))}.")
    return np.asarray(column.to_numpy().astype(np.float32))
