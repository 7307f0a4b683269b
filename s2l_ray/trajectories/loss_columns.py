"""The columns of a part of `trajectories/`: written one way, and read from whatever people's files and arrays have."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from s2l_ray.errors import ConfigError, DataError
from s2l_ray.examples.ids import column_of, decoded, id_column, is_text, name_examples, one_array, wrong_type

# Above this no number is a loss in nats, and its square would leave the float32 range inside k-means.
MAX_LOSS = 1e9
# What a row without a source is called.
NO_SOURCE = "(none)"
MAX_TOKENS = np.iinfo(np.int32).max
LOSSES = "losses"
STATISTICS = ("deviations", "first_thirds", "last_thirds")
"""What may be recorded beside `losses` at each checkpoint, of the losses of an example's labels: see `label_statistics`."""

LOSS_WITHOUT_PROMPT, EMBEDDING = "loss_without_prompt", "embedding"
"""What may be recorded of the last checkpoint alone: float32, and fixed_size_list<float32, H>."""


def check_losses(losses_NT: NDArray[np.float32], example_ids: pa.Array, where: str = "", name: str = LOSSES) -> None:
    """Raise DataError naming the ids whose losses (or statistics of this name) are not finite, or are no losses."""
    prefix = f"{where}: " if where else ""
    if losses_NT.shape[1] == 0 and len(losses_NT):
        raise DataError(f"{prefix}{name}: the lists are empty. A trajectory needs one loss at least.")
    # NaN survives min and max, so that two passes without a temporary array find every kind of bad number.
    if not len(losses_NT) or (losses_NT.min() >= -MAX_LOSS and losses_NT.max() <= MAX_LOSS):
        return
    with np.errstate(invalid="ignore"):
        bad_N = ~(np.abs(losses_NT) <= MAX_LOSS).all(axis=1)
    raise DataError(
        f"{prefix}{name}: NaN, infinite, missing or beyond {MAX_LOSS:.0e} for example_id "
        f"{name_examples(example_ids.filter(pa.array(bad_N)))}. Remove these examples or score them again."
    )


def losses_matrix(table: pa.Table, name: str = LOSSES) -> NDArray[np.float32]:
    """The column `losses` of a table of the store (fixed-size lists of float32), or a statistic's, as a matrix (N, T)."""
    losses = one_array(table[name])
    return np.asarray(losses.flatten().to_numpy()).reshape(len(table), -1)


def trajectories_table(
    example_ids: Any,
    losses_NT: NDArray[np.floating[Any]],
    sources: Any,
    num_response_tokens: Any,
    statistics: Mapping[str, NDArray[np.floating[Any]]] | None = None,
    beside: Mapping[str, pa.Array] | None = None,
) -> pa.Table:
    """One part of `trajectories/`: example_id, source, losses: fixed_size_list<float32, T>, num_response_tokens: int32, and
    beside the losses the statistics (by name, (N, T) each) in the same form; last the columns of the last checkpoint alone."""
    ids = id_column(column_of(example_ids, "example_id"), "example_ids")
    return pa.table(
        {
            "example_id": ids,
            "source": label_column(column_of(sources, "source"), "source", "sources"),
            **{name: points_column(values_NT) for name, values_NT in {LOSSES: losses_NT, **(statistics or {})}.items()},
            "num_response_tokens": token_count_column(column_of(num_response_tokens, "num_response_tokens"), ids, "arguments"),
            **(beside or {}),
        }
    )


def points_column(values_NT: NDArray[np.floating[Any]]) -> pa.Array:
    """A matrix (N, T) as a column: fixed_size_list<float32, T>, without a copy where it is float32 and contiguous."""
    flat = pa.array(np.ascontiguousarray(values_NT, np.float32).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, values_NT.shape[1])


def losses_of(table: pa.Table, name: str = LOSSES) -> NDArray[np.float32]:
    """The losses of a part of `trajectories/`, or a statistic, as a matrix (N, T)."""
    losses = one_array(table[name])
    return decode_losses(losses, one_array(table["example_id"]), name, losses.type.list_size, name)


def missing_statistics(columns: Collection[str], where: str = "these trajectories") -> ConfigError | None:
    """The error for trajectories that `clustering.features: profile` cannot see, by the names of their columns."""
    missing = [name for name in STATISTICS if name not in columns]
    if not missing:
        return None
    return ConfigError(
        f"clustering.features: 'profile' needs the columns {', '.join(STATISTICS)} beside losses, and {where}: no "
        f"{', '.join(missing)}. Record them: trajectories.statistics=true in a run, statistics= of record_losses or "
        "RecordTrajectories elsewhere."
    )


def loss_matrix(losses: Any, ids: pa.Array, name: str = LOSSES) -> NDArray[np.float32]:
    """Losses (or a statistic of this name) in any form that people hold them in, as a float32 matrix (N, T)."""
    if not isinstance(losses, pa.Array | pa.ChunkedArray) and hasattr(losses, "__array__"):
        array = np.asarray(losses)
        if array.ndim == 2 and array.dtype.kind in "fiu":
            with np.errstate(over="ignore"):
                return np.ascontiguousarray(array, np.float32)
        losses = list(array)
    column = column_of(losses, name)
    if pa.types.is_list(column.type) and pa.types.is_integer(column.type.value_type):
        column = column.cast(pa.list_(pa.float64()))
    return decode_losses(column, ids, name, name=name)


def decode_losses(
    column: pa.Array, ids: pa.Array, where: str, num_points: int | None = None, name: str = LOSSES
) -> NDArray[np.float32]:
    """A column of lists as a matrix (N, T); T is `num_points` or the first row's. Raises DataError naming odd rows."""
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    kind = column.type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not is_list or not pa.types.is_floating(kind.value_type):
        raise wrong_type(where, name, kind, "lists of floats")
    if column.null_count:
        raise DataError(f"{where}: {name} are missing for example_id {name_examples(ids.filter(column.is_null()))}.")
    lengths_N = pc.list_value_length(column).to_numpy(zero_copy_only=False)
    if num_points is None:
        num_points = int(lengths_N[0]) if len(lengths_N) else 0
    odd_N = lengths_N != num_points
    if odd_N.any():
        raise DataError(
            f"{where}: {name} are ragged. Others have {num_points} values; another number "
            f"({lengths_N[odd_N][0]}, say) for example_id {name_examples(ids.filter(pa.array(odd_N)))}."
        )
    values: NDArray[np.floating[Any]] = column.flatten().to_numpy(zero_copy_only=False)
    with np.errstate(over="ignore"):
        return values.astype(np.float32, copy=False).reshape(len(column), num_points)


def label_column(column: pa.Array, name: str, where: str) -> pa.Array:
    """Names of sources or strata as strings; a missing one is called `(none)`."""
    column = decoded(column)
    kind = column.type
    if not (is_text(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_null(kind)):
        raise wrong_type(where, name, kind, "string, integer or boolean")
    column = column.cast(pa.string())
    return column.fill_null(NO_SOURCE) if column.null_count else column


def token_count_column(column: pa.Array, ids: pa.Array, where: str) -> pa.Array:
    """Numbers of response tokens as int32. Raises DataError naming the ids of missing or negative ones."""
    if not pa.types.is_integer(column.type) and len(column):
        raise wrong_type(where, "num_response_tokens", column.type, "integers")
    lowest, highest = pc.min_max(column).as_py().values()
    is_odd = column.null_count or (lowest is not None and (lowest < 0 or highest > MAX_TOKENS))
    if is_odd and len(column) == len(ids):
        signed = column.cast(pa.int64(), safe=False)  # what is too large for that becomes negative
        is_bad = pc.fill_null(pc.or_(pc.less(signed, 0), pc.greater(signed, MAX_TOKENS)), True)
        bad = name_examples(ids.filter(is_bad))
        raise DataError(f"{where}: num_response_tokens is missing, negative or too large for example_id {bad}.")
    return column.cast(pa.int32())
