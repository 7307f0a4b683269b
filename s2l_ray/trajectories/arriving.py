"""What is learned of rows while they arrive, in any order: priorities, what they hold as one number, those of lowest priority.

Each would be a pass over all rows in order otherwise.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from s2l_ray.examples.hashes import mixed
from s2l_ray.examples.ids import GAMMA, HASHED_ROWS, digests, one_array, priorities_of, priority_cut
from s2l_ray.trajectories.loss_columns import LOSSES, STATISTICS

LOWEST_ROWS = 65_536
"""So many rows of lowest priority are kept apart: what is measured on a sample is measured on these."""


class Arriving:
    """Takes tables of the store's columns in threads, as they come; `finish` gives each its priorities."""

    def __init__(self, seed: int | None, names: Callable[[], Mapping[str, Sequence[str]]], num_rows: int) -> None:
        """`num_rows`: how many will come, here and elsewhere."""
        self._seed, self._names = seed, names
        self._lock = threading.Lock()
        self._content = 0
        self._cut = np.uint64(priority_cut(LOWEST_ROWS, num_rows))
        self.low: list[pa.Table] = []
        """The rows that may be among the `LOWEST_ROWS` of lowest priority; none without a seed."""

    def finish(self, table: pa.Table) -> pa.Table:
        """The table with the column `priority`, where there is a seed."""
        digests_N = digests(table["example_id"])
        content = content_of(table, self._names(), digests_N)
        with self._lock:
            self._content = (self._content + content) % 2**64
        if self._seed is None:
            return table
        priorities_N = priorities_of(digests_N, self._seed)
        table = table.append_column("priority", pa.array(priorities_N))
        columns = [name for name in ("example_id", LOSSES, *STATISTICS, "priority") if name in table.column_names]
        found = table.select(columns).take(pa.array(np.flatnonzero(priorities_N <= self._cut)))
        with self._lock:
            self.low.append(found)
        return table

    @property
    def content(self) -> int:
        """See `content_of`: of all rows so far."""
        return self._content


def lowest_of(low: Sequence[pa.Table], num_rows: int) -> pa.Table | None:
    """Of `num_rows` rows the `LOWEST_ROWS` of lowest priority, and all of the same priority as the last, in ascending order
    of ids; `low` has what `Arriving` keeps. None without a seed, and where too few were kept: once in a billion."""
    found = pa.concat_tables(low).combine_chunks() if low else None
    if found is None or len(found) < min(LOWEST_ROWS, num_rows):
        return None
    if len(found) > LOWEST_ROWS:
        order_N = found["priority"].to_numpy()
        found = found.take(pa.array(np.flatnonzero(order_N <= np.partition(order_N, LOWEST_ROWS - 1)[LOWEST_ROWS - 1])))
    return found.sort_by("example_id").combine_chunks()


def content_of(table: pa.Table, names: Mapping[str, Sequence[str]], digests_N: NDArray[np.uint64] | None = None) -> int:
    """What rows hold as a number of 64 bits: the sum over the rows of a hash of id, losses, names and token counts, so that
    it is the same for every order and cut of them. Other columns do not count. `digests_N`: those of the ids, where known."""
    digests_N = digests(table["example_id"]) if digests_N is None else digests_N
    columns = [_words(table, name) for name in (LOSSES, *STATISTICS) if name in table.column_names]
    for name in sorted(names):
        columns.append(digests(pa.array(list(names[name]), pa.string()))[table[name].to_numpy()][:, None])
    if "num_response_tokens" in table.column_names:
        columns.append(table["num_response_tokens"].to_numpy().astype(np.uint64)[:, None])
    total = 0
    for start in range(0, len(table), HASHED_ROWS):
        hashed_M = digests_N[start : start + HASHED_ROWS]
        for words_NW in columns:
            for word_M in np.ascontiguousarray(words_NW[start : start + HASHED_ROWS].T):
                hashed_M = mixed((hashed_M ^ word_M) + GAMMA)
        total += int(mixed(hashed_M + GAMMA).sum(dtype=np.uint64))
    return total % 2**64


def _words(table: pa.Table, name: str) -> NDArray[np.uint64]:
    """A column of fixed-size lists of float32 as words of 64 bits, shape (N, W)."""
    values_NT = np.asarray(one_array(table[name]).flatten().to_numpy()).reshape(len(table), -1)
    if values_NT.shape[1] % 2:
        values_NT = np.concatenate([values_NT, np.zeros((len(values_NT), 1), np.float32)], axis=1)
    return np.ascontiguousarray(values_NT).view(np.uint64)
