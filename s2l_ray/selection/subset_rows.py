"""The corpus's own rows of a subset, on disk in order of ids: with our columns added, and as they were written.

Texts are only streamed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from s2l_ray.selection.json_text import strict_line
from s2l_ray.trajectories.sorting import SortedTable, sort_by_id
from s2l_ray.trajectories.store import BLOCK_ROWS

_BLOCK_BYTES = 64 * 2**20

FetchRows = Callable[[pa.Array, NDArray[np.int64]], Iterator[pa.Table]]
"""Gives the corpus's own columns of some examples, by their (ascending) ids and their numbers in the files: tables of
`example_id` and `row` (a struct), in any order, and `row_json` where the corpus is of JSON: each row's own text."""


@dataclass(frozen=True)
class SubsetRows:
    """Rows of the corpus in ascending order of ids, on disk, and the names of our columns among theirs."""

    ids: pa.Array
    table: SortedTable
    names: dict[str, str]
    """Names of `example_id`, `cluster_id` and `weight`: underscored where the corpus has a column of that name."""

    @classmethod
    def fetch(cls, chosen: pa.Table, fetch_rows: FetchRows, scratch: Path, pool: Executor) -> SubsetRows:
        """The rows of a table of `example_id` (ascending) and, where it is known, `position`."""
        ids = chosen["example_id"].combine_chunks()
        numbers = chosen["position"].to_numpy() if "position" in chosen.column_names else np.arange(len(ids))
        table = sort_by_id(fetch_rows(ids, numbers), scratch, pool)
        assert table.num_rows == len(ids), "fetch_rows left out rows"
        theirs = [field.name for field in table.schema.field("row").type]
        names = {}
        for name in ("example_id", "cluster_id", "weight"):
            names[name] = name
            if name == "example_id" and cls._has_our_ids(table):
                continue
            while names[name] in theirs:
                names[name] = f"_{names[name]}"
        return cls(ids, table, names)

    @staticmethod
    def _has_our_ids(table: SortedTable) -> bool:
        """Whether the corpus's own `example_id` is ours, in whichever width of integer or kind of string."""
        row = table.schema.field("row").type
        if row.get_field_index("example_id") < 0:
            return False
        return all(
            _are_the_ids(_flat(block["row"]), block["example_id"].combine_chunks())
            for block in _blocks(table, ["example_id", "row"])
        )

    def with_ours(self, chosen: pa.Table, weights_M: NDArray[np.float64]) -> Iterator[pa.Table]:
        """The rows of a table of `example_id` (ascending) and `cluster_id`, in blocks, with our columns behind the corpus's."""
        ids = chosen["example_id"]
        ours = {"example_id": ids, "cluster_id": chosen["cluster_id"], "weight": pa.array(weights_M)}
        is_whole = len(ids) == len(self.ids)
        is_chosen_N = None if is_whole else pc.is_in(self.ids, value_set=ids.combine_chunks()).to_numpy(zero_copy_only=False)
        start = done = 0
        for block in _blocks(self.table, ["row"]):
            rows = _flat(block["row"])
            if is_chosen_N is not None:
                rows = rows.filter(pa.array(is_chosen_N[start : start + len(block)]))
            start += len(block)
            for name, values in ours.items():
                if self.names[name] not in rows.column_names:
                    rows = rows.append_column(self.names[name], values[done : done + len(rows)])
            done += len(rows)
            yield rows

    @property
    def added(self) -> list[str]:
        """Those of our columns that the corpus does not have itself."""
        theirs = [field.name for field in self.table.schema.field("row").type]
        return [name for name in self.names.values() if name not in theirs]

    @property
    def has_json(self) -> bool:
        """Whether every row comes with its own JSON text."""
        if "row_json" not in self.table.schema.names:
            return False
        return all(not block["row_json"].null_count for block in _blocks(self.table, ["row_json"]))

    def as_written(self, chosen: pa.Table, made_strict: Counter[str]) -> Iterator[bytes]:
        """The lines of JSON Lines of the rows of a table of `example_id` (ascending): each row as the corpus has it.

        `made_strict` counts the `rows` in which NaN or an infinite number, which JSON does not know, had to become null.
        """
        is_chosen_N = pc.is_in(self.ids, value_set=chosen["example_id"].combine_chunks())
        start = 0
        for block in _blocks(self.table, ["row_json"]):
            texts = block["row_json"].filter(is_chosen_N[start : start + len(block)])
            start += len(block)
            for text in texts.to_pylist():
                line, was_strict = strict_line(text)
                made_strict["rows"] += not was_strict
                yield f"{line}\n".encode()


def _blocks(table: SortedTable, columns: list[str] | None = None) -> Iterator[pa.Table]:
    return table.blocks(table.rows_of(_BLOCK_BYTES, BLOCK_ROWS), columns)


def _flat(rows: pa.ChunkedArray) -> pa.Table:
    return pa.Table.from_struct_array(rows.combine_chunks())


def _are_the_ids(rows: pa.Table, ids: pa.Array) -> bool:
    own = rows["example_id"]
    if pa.types.is_integer(own.type) != pa.types.is_integer(ids.type) or pa.types.is_nested(own.type):
        return False
    try:
        return bool(own.cast(ids.type).combine_chunks().equals(ids))
    except pa.ArrowException:
        return False
