"""What an example id is, and the random number that every id brings along.

Every random choice of a run (the order of training, the draw inside a group, a sample) goes by *priorities*: hashes of a seed
and the id. So it depends on no row's position, no number of workers and no cut into files.

An id is a string or an integer. A column of ids is `string`, `int64`, or, only where one of them is above 2**63 - 1, `uint64`:
integers in the files of one owner may be of any width, and the results are the same for all of them.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from s2l_ray.errors import DataError
from s2l_ray.examples.hashes import mixed

# So many numbers stay in the processor's cache: twice as fast as a whole block.
HASHED_ROWS = 16_384
_WORD = 8
# By a number of bytes, 0 to 8: those of a word that count.
_FIRST_BYTES = np.array([2 ** (8 * count) - 1 for count in range(_WORD + 1)], "<u8")
GAMMA = np.uint64(0x9E3779B97F4A7C15)  # SplitMix64's; without it a word of zeros would leave an empty text's 0 as it is
NAMED_IDS = 5
"""How many ids a message names."""
NO_INTEGERS = (
    "integers of which no type of 64 bits holds all: negative ones and ones above 2**63 - 1, say. Give them as strings."
)


def id_column(column: pa.Array, where: str, integers: pa.DataType | None = None) -> pa.Array:
    """Ids as string, int64 or uint64, shape (N,), in their order; integers as the type `integers`, where one is given.

    Raises DataError for another type, a missing id, text that is not UTF-8, and for integers that do not fit.
    """
    column = decoded(column)
    if not (is_text(column.type) or pa.types.is_integer(column.type)):
        raise wrong_type(where, "example_id", column.type, "string or integer")
    if column.null_count:
        rows = np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))
        raise DataError(f"{where}: example_id is missing in {len(rows):,} rows (row {rows[0]:,} of its block, say).")
    kind = pa.string() if is_text(column.type) else integers or _integers_of(column)
    try:
        ids = column.cast(kind)
        ids.validate(full=True)
    except pa.ArrowInvalid as error:
        raise DataError(
            f"{where}: {NO_INTEGERS if pa.types.is_integer(kind) else f'example_id is not UTF-8 ({error}).'}"
        ) from error
    return ids


def _integers_of(column: pa.Array) -> pa.DataType:
    """The type of a column of integer ids."""
    return pa.uint64() if has_large(column) else pa.int64()


def has_large(column: pa.Array) -> bool:
    """Whether a column has integers above 2**63 - 1."""
    return pa.types.is_uint64(column.type) and (pc.max(column).as_py() or 0) > np.iinfo(np.int64).max


def of_one_type(columns: Sequence[pa.Array], where: str) -> list[pa.Array]:
    """Columns of ids, each of its own type, as columns of one: string, int64 or uint64.

    Raises DataError where some are strings and some integers, or where no type of 64 bits holds all integers.
    """
    kinds = {column.type for column in columns}
    if len(kinds) < 2:
        return list(columns)
    if pa.string() in kinds:
        raise DataError(f"{where}: example_id is {' and '.join(sorted(map(str, kinds)))}. Give ids of one type.")
    return [id_column(column, where, pa.uint64()) for column in columns]


def repeated(example_ids: pa.Array) -> pa.Array:
    """Those ids that occur more than once, each once, in the order in which they come first."""
    counts = example_ids.value_counts()
    return counts.field("values").filter(pc.greater(counts.field("counts"), 1))


def not_unique(example_ids: pa.Array, where: str = "", count: int | None = None) -> DataError:
    """The error for ids that occur more than once: these, or these among `count`."""
    named = name_examples(example_ids, count)
    return DataError(f"{where and f'{where}: '}example_id occurs more than once: {named}. Ids must be unique.")


def name_examples(example_ids: pa.Array, count: int | None = None) -> str:
    """A few ids, then how many more of `count` (all of them, unless given): `'a', 'b' and 17 more`."""
    named = ", ".join(repr(value) for value in example_ids[:NAMED_IDS].to_pylist())
    rest = (len(example_ids) if count is None else count) - NAMED_IDS
    return f"{named} and {rest:,} more" if rest > 0 else named


def priorities(example_ids: Any, seed: int | str) -> NDArray[np.uint64]:
    """The random number of each example, uint64, shape (N,): a hash of the id (integers in decimal) and the seed.

    The lowest come first. It depends on the id alone and not on the row, so that a choice can be made in a stream
    and is the same for every order of the rows. The id's bytes, in words of eight (little-endian, the last filled with zeros),
    are folded into its length by SplitMix64's finalizer, and what comes out is mixed twice more with two words of BLAKE2b over
    the seed: a hash of ten million ids takes no second. It is not meant to withstand ids that somebody makes up against it.
    """
    return priorities_of(digests(example_ids), seed)


def digests(example_ids: Any) -> NDArray[np.uint64]:
    """What a priority is made of beside the seed: a number of 64 bits for each id (integers in decimal), shape (N,)."""
    texts = id_column(column_of(example_ids, "example_id"), "example_ids").cast(pa.string())
    digests_N = np.empty(len(texts), np.uint64)
    for start in range(0, len(texts), HASHED_ROWS):
        digests_N[start : start + HASHED_ROWS] = _folded(texts[start : start + HASHED_ROWS])
    return digests_N


def priorities_of(digests_N: NDArray[np.uint64], seed: int | str) -> NDArray[np.uint64]:
    """The priorities of ids with these digests, shape (N,)."""
    first, second = np.frombuffer(hashlib.blake2b(str(seed).encode(), digest_size=16).digest(), "<u8")
    priorities_N = np.empty(len(digests_N), np.uint64)
    for start in range(0, len(digests_N), HASHED_ROWS):
        priorities_N[start : start + HASHED_ROWS] = mixed(mixed(digests_N[start : start + HASHED_ROWS] ^ first) ^ second)
    return priorities_N


def _folded(texts: pa.Array) -> NDArray[np.uint64]:
    """A number for each text (M,), of 64 bits; different for different texts of up to eight bytes and one length."""
    offsets = np.frombuffer(texts.buffers()[1], np.int32)[texts.offset : texts.offset + len(texts) + 1]
    begin, end = int(offsets[0]), int(offsets[-1])
    data = np.zeros(end - begin + _WORD, np.uint8)
    data[: end - begin] = np.frombuffer(texts.buffers()[2] or b"", np.uint8)[begin:end]
    # The word that begins at each byte.
    words = np.lib.stride_tricks.as_strided(data[:_WORD].view("<u8"), shape=(end - begin + 1,), strides=(1,))
    starts_M, lengths_M = offsets[:-1].astype(np.int64) - begin, np.diff(offsets).astype(np.int64)
    folded_M = lengths_M.astype(np.uint64)
    shortest = lengths_M.min(initial=_WORD)
    for done in range(0, int(lengths_M.max(initial=0)), _WORD):
        rows = slice(None) if done < shortest else np.flatnonzero(lengths_M > done)
        left = np.minimum(lengths_M[rows] - done, _WORD)
        words_M = words[starts_M[rows] + done] & _FIRST_BYTES[left]
        folded_M[rows] = mixed((folded_M[rows] ^ words_M) + GAMMA)
    return folded_M


def priority_cut(wanted: int, count: int, margin: float = 6.0) -> int:
    """A priority (up to 2**64 - 1) below which at least `wanted` of `count` rows lie (but for once in a billion), few more."""
    share = (wanted + margin * wanted**0.5 + 16) / count if count else 1.0
    return 0 if not wanted else 2**64 - 1 if share >= 1 else int(share * 2.0**64)


def one_array(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    """A column as one array, copied only if it is in several chunks."""
    if not isinstance(column, pa.ChunkedArray):
        return column
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks or [pa.array([], column.type)])


def wrong_type(where: str, column: str, found: pa.DataType, expected: str) -> DataError:
    """The error for a column of another type than expected."""
    return DataError(f"{where}: column '{column}' is {found}, expected {expected}.")


def is_text(kind: pa.DataType) -> bool:
    """Whether a type is one of Arrow's strings."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def decoded(column: pa.Array) -> pa.Array:
    """A column's values themselves, where it is encoded by a dictionary."""
    return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column


def column_of(values: Any, name: str) -> pa.Array:
    """Values in any form as one Arrow array. Raises DataError where they have no common type."""
    if isinstance(values, pa.Array | pa.ChunkedArray):
        return one_array(values)
    try:
        return one_array(pa.array(values))
    except OverflowError as error:  # of Python's numbers Arrow makes int64 unless it is asked for more
        if all(value is None or isinstance(value, int) for value in values):
            with contextlib.suppress(OverflowError):
                return pa.array(values, pa.uint64())
        raise DataError(f"{name}: {NO_INTEGERS}") from error
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise DataError(f"{name}: the values have no common type ({error}).") from error
