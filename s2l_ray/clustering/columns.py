"""Columns: a value, or a few, for each row of k-means, in memory or in a file."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]


class Column(Protocol):
    """Values of N rows: shape (N,), or (N, width) for several values a row."""

    def __len__(self) -> int: ...
    def read(self, start: int, stop: int) -> NDArray[Any]:
        """The values of the rows from `start` up to `stop`, or to the last row."""

    def write(self, start: int, values: NDArray[Any]) -> None:
        """Set the values of the rows from `start` on."""


class MemoryColumn:
    """A column in memory; what is read is a view."""

    def __init__(self, values: NDArray[Any]) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def read(self, start: int, stop: int) -> NDArray[Any]:
        return self.values[start:stop]

    def write(self, start: int, values: NDArray[Any]) -> None:
        self.values[start : start + len(values)] = values.reshape(-1, *self.values.shape[1:])


class FileColumn:
    """A column in a file that is read and written in pieces, not mapped: mapped pages count as this process's memory.

    The file is open only while it is used: there may be three for each of hundreds of strata.
    """

    def __init__(self, path: Path, num_rows: int, width: int, dtype: Any) -> None:
        self._path, self._dtype = path, np.dtype(dtype)
        self._shape = (num_rows, width) if width > 1 else (num_rows,)
        self._row_bytes = width * self._dtype.itemsize
        path.touch()
        os.truncate(path, num_rows * self._row_bytes)

    def __len__(self) -> int:
        return self._shape[0]

    def read(self, start: int, stop: int) -> NDArray[Any]:
        values = np.empty((min(stop, len(self)) - start, *self._shape[1:]), self._dtype)
        view, done = values.reshape(-1).view(np.uint8).data, 0
        with self._path.open("rb", buffering=0) as file:
            while done < len(view):
                count = os.preadv(file.fileno(), [view[done:]], start * self._row_bytes + done)
                if not count:
                    raise OSError(errno.EIO, "ends early", str(self._path))
                done += count
        return values

    def write(self, start: int, values: NDArray[Any]) -> None:
        view, done = np.ascontiguousarray(values, self._dtype).reshape(-1).view(np.uint8).data, 0
        with self._path.open("r+b", buffering=0) as file:
            while done < len(view):
                done += os.pwrite(file.fileno(), view[done:], start * self._row_bytes + done)


NewColumn = Callable[[int, int, Any], Column]
"""Makes a column of zeros for (rows, values per row, dtype)."""


def in_memory(num_rows: int, width: int, dtype: Any) -> Column:
    """A column of zeros in memory, shape (num_rows,), or (num_rows, width) for a width above 1."""
    return MemoryColumn(np.zeros((num_rows, width) if width > 1 else num_rows, dtype))


def rows_by_code(codes_M: Ints) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Each code of a block and its rows, ascending."""
    order_M = np.argsort(codes_M, kind="stable")
    starts = np.flatnonzero(np.diff(codes_M[order_M], prepend=-1))
    for rows in np.split(order_M, starts[1:]):
        yield int(codes_M[rows[0]]), rows
