"""What an example id is, and the random number that every id brings along.

Every random choice of a run (the order of training, the draw inside a group, a sample) goes by *priorities*: hashes of a seed
and the id. So it depends on no row's position, no number of workers and no cut into files.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from s2l_ray.errors import DataError

# So many digests stay in the processor's cache: a sixth faster than a whole block.
_HASHED_ROWS = 4_096
NAMED_IDS = 5
"""How many ids a message names."""


def id_column(column: pa.Array, where: str) -> pa.Array:
    """Ids as string or int64. Raises DataError for another type or a missing id."""
    column = decoded(column)
    if not (is_text(column.type) or pa.types.is_integer(column.type)):
        raise wrong_type(where, "example_id", column.type, "string or integer")
    if column.null_count:
        rows = np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))
        raise DataError(f"{where}: example_id is missing in {len(rows):,} rows (row {rows[0]:,} of its block, say).")
    try:
        ids = column.cast(pa.string() if is_text(column.type) else pa.int64())
        ids.validate(full=True)
    except pa.ArrowInvalid as error:
        raise DataError(f"{where}: example_id is not UTF-8, or does not fit into 64 bits with a sign ({error}).") from error
    return ids


def name_examples(example_ids: pa.Array, count: int | None = None) -> str:
    """A few ids, then how many more of `count` (all of them, unless given): `'a', 'b' and 17 more`."""
    named = ", ".join(repr(value) for value in example_ids[:NAMED_IDS].to_pylist())
    rest = (len(example_ids) if count is None else count) - NAMED_IDS
    return f"{named} and {rest:,} more" if rest > 0 else named


def priorities(example_ids: Any, seed: int | str) -> NDArray[np.uint64]:
    """The random number of each example, shape (N,): the first 8 bytes of BLAKE2b over `"{seed}:{example_id}"`.

    The lowest come first. It depends on the id alone and not on the row, so that a choice can be made in a stream
    and is the same for every order of the rows.
    """
    texts = id_column(column_of(example_ids, "example_id"), "example_ids").cast(pa.string())
    priorities_N = np.empty(len(texts), np.uint64)
    for start in range(0, len(texts), _HASHED_ROWS):
        keys = pc.binary_join_element_wise(str(seed), texts[start : start + _HASHED_ROWS], ":").cast(pa.binary())
        digests = b"".join([hashlib.blake2b(key).digest() for key in keys.to_numpy(zero_copy_only=False)])
        priorities_N[start : start + _HASHED_ROWS] = np.frombuffer(digests, ">u8")[::8]
    return priorities_N


def priority_cut(wanted: int, count: int, margin: float = 6.0) -> int:
    """A priority below which at least `wanted` of `count` rows lie, but for once in a billion, and few more."""
    share = (wanted + margin * wanted**0.5 + 16) / count if count else 1.0
    return 0 if not wanted else 2**64 - 1 if share >= 1 else int(share * 2.0**64)


def one_array(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    """A column as one array, copied only if it is in several chunks."""
    if not isinstance(column, pa.ChunkedArray):
        return column
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks or [pa.array([], column.type)])


def wrong_type(where: str, column: str, found: pa.DataType, expected: str) -> DataError:
    return DataError(f"{where}: column '{column}' is {found}, expected {expected}.")


def is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def decoded(column: pa.Array) -> pa.Array:
    return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column


def column_of(values: Any, name: str) -> pa.Array:
    """Values in any form as one Arrow array."""
    if isinstance(values, pa.ChunkedArray):
        return one_array(values)
    if isinstance(values, pa.Array):
        return values
    try:
        return one_array(pa.array(values))
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise DataError(f"{name}: the values have no common type ({error}).") from error
