"""N x T losses: what `trajectories` writes and `clustering` and `selection` read, in memory or on disk.

`Trajectories` is the value that a user holds; `TrajectoryStore` is what the stages stream, block by block, from memory
or from disk. In both rows are in ascending order of `example_id`, so that nothing after them depends on the order or the
size of the input's parts. Losses go from Arrow to numpy without ever being Python numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from s2l_ray.errors import ConfigError, DataError
from s2l_ray.examples.ids import column_of, id_column, not_unique, one_array, priorities, repeated
from s2l_ray.storage.records import digest
from s2l_ray.trajectories.arriving import content_of
from s2l_ray.trajectories.id_order import is_ascending
from s2l_ray.trajectories.loss_columns import (
    LOSSES,
    STATISTICS,
    check_losses,
    label_column,
    loss_matrix,
    losses_matrix,
    points_column,
    token_count_column,
)
from s2l_ray.trajectories.sorting import SortedTable, in_order, read_ahead

BLOCK_ROWS = 65_536
NUM_RESPONSE_TOKENS = "num_response_tokens"
# More values than this are no strata: an id, say, given for a source.
MAX_NAMES = 100_000
Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class Trajectories:
    """The losses of N examples at T checkpoints, rows in ascending order of unique ids (strings bytewise)."""

    example_ids: pa.Array
    """string or int64, shape (N,)."""

    losses_NT: NDArray[np.float32]
    """Nats per response token, finite."""

    sources: pa.Array | None = None
    """string without nulls, shape (N,); None where sources are unknown."""

    num_response_tokens_N: NDArray[np.int32] | None = None
    """Response tokens of each example; None where they are unknown."""

    columns: Mapping[str, pa.Array] = field(default_factory=dict)
    """Other columns, as strings, by whose values the groups may be stratified."""

    statistics: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    """None, or of each of `STATISTICS` its values in nats, shape (N, T)."""

    def __post_init__(self) -> None:
        """Raise DataError naming the ids whose losses are not finite, or that occur twice."""
        if not len(self.example_ids):
            raise DataError("No trajectories: there are no rows.")
        assert self.losses_NT.dtype == np.float32
        assert self.losses_NT.ndim == 2
        others = (self.losses_NT, self.sources, self.num_response_tokens_N, *self.columns.values())
        assert all(len(other) == len(self) for other in others if other is not None)
        self._check_ids()
        check_losses(self.losses_NT, self.example_ids)
        for name, values_NT in self.statistics.items():
            check_losses(values_NT, self.example_ids, name=name)

    @classmethod
    def of(
        cls,
        losses: Any,
        example_ids: Any = None,
        sources: Any = None,
        num_response_tokens: Any = None,
        columns: Mapping[str, Any] | None = None,
        statistics: Mapping[str, Any] | None = None,
    ) -> Trajectories:
        """Trajectories from arrays, Arrow columns or lists in any order of rows; ids are row numbers unless given.

        Raises DataError naming the ids of ragged, missing or non-finite losses and of duplicates, ConfigError where not all
        `statistics` are given, or other ones.
        """
        num_rows = len(losses)
        ids = id_column(column_of(np.arange(num_rows) if example_ids is None else example_ids, "example_id"), "example_ids")
        table = {"example_id": ids}
        if sources is not None:
            table["source"] = label_column(column_of(sources, "source"), "source", "sources")
        if num_response_tokens is not None:
            table["num_response_tokens"] = token_count_column(
                column_of(num_response_tokens, "num_response_tokens"), ids, "arguments"
            )
        for name, values in (columns or {}).items():
            table[name] = label_column(column_of(values, name), name, "columns")
        for name, column in table.items():
            if len(column) != num_rows:
                raise DataError(f"{len(column):,} values of {name} for {num_rows:,} trajectories: give one for each.")
        losses_NT = loss_matrix(losses, ids)
        if statistics and sorted(statistics) != sorted(STATISTICS):
            raise ConfigError(f"statistics: give {', '.join(STATISTICS)}, found {', '.join(statistics)}.")
        given = {name: loss_matrix(statistics[name], ids, name) for name in STATISTICS} if statistics else {}
        for name, values_NT in given.items():
            if values_NT.shape != losses_NT.shape:
                raise DataError(f"{name}: of shape {values_NT.shape} beside losses of shape {losses_NT.shape}.")
        return cls._sorted(pa.table(table), {LOSSES: losses_NT, **given})

    @classmethod
    def _sorted(cls, table: pa.Table, matrices: dict[str, NDArray[np.float32]]) -> Trajectories:
        """Trajectories from checked columns and matrices (N, T) in any order of rows."""
        table = table.combine_chunks()
        ids = one_array(table["example_id"])
        if not is_ascending(ids):
            order = pc.array_sort_indices(ids)
            table = table.take(order).combine_chunks()
            matrices = {name: values_NT[order.to_numpy()] for name, values_NT in matrices.items()}
        arrays = {name: one_array(table[name]) for name in table.column_names}
        tokens = arrays.pop("num_response_tokens", None)
        return cls(
            example_ids=arrays.pop("example_id"),
            losses_NT=matrices.pop(LOSSES),
            sources=arrays.pop("source", None),
            num_response_tokens_N=None if tokens is None else tokens.to_numpy(),
            columns=arrays,
            statistics=matrices,
        )

    def __len__(self) -> int:
        return len(self.example_ids)

    @property
    def num_points(self) -> int:
        """T, the length of every trajectory."""
        return int(self.losses_NT.shape[1])

    def _check_ids(self) -> None:
        if is_ascending(self.example_ids):
            return
        duplicates = repeated(self.example_ids)
        assert len(duplicates), "ids are not in ascending order"
        raise not_unique(duplicates)


class Names:
    """Values of a column (sources, strata) as numbers, in the order in which they were first seen."""

    def __init__(self) -> None:
        self.values: list[str] = []
        self._codes: dict[str, int] = {}

    def encode(self, column: pa.Array, name: str) -> pa.Array:
        """The column (strings) as int32 codes. Raises DataError for more values than strata can have."""
        encoded = column.dictionary_encode()
        found = encoded.dictionary.to_pylist()
        for value in found:
            if value not in self._codes:
                self._codes[value] = len(self.values)
                self.values.append(value)
        if len(self.values) > MAX_NAMES:
            raise DataError(f"{name}: more than {MAX_NAMES:,} different values. Sources and strata are names of groups.")
        codes = np.array([self._codes[value] for value in found], np.int32)
        return pa.array(codes[encoded.indices.to_numpy()])


@dataclass(frozen=True, eq=False)
class TrajectoryStore:
    """N trajectories in ascending order of ids, streamed in blocks of at most 65,536 rows, from memory or from disk."""

    rows: SortedTable
    """Columns `example_id`, `losses` and, where they are known, all of `STATISTICS`, `source` and others as codes,
    `num_response_tokens`, `position` (the row's number in the files) and `priority`."""

    num_points: int
    """T, the length of every trajectory."""

    names: Mapping[str, Sequence[str]]
    """For `source` and a column of strata the values that codes stand for."""

    priority_seed: int | None = None
    """Seed of the column `priority`; None where there is none."""

    tokens_N: NDArray[np.int32] | None = None
    """Token counts instead of those in `rows`: another tokenizer's."""

    measurements: Mapping[str, Callable[[], NDArray[np.float32]]] = field(default_factory=dict)
    """What else is measured of the rows and read on demand: see `measured`."""

    content: int | None = None
    """`content_of` the rows; None where it is not known yet."""

    lowest: pa.Table | None = None
    """`Arriving.lowest`: `example_id`, what is measured at the points, and `priority`; None where that takes a pass."""

    @classmethod
    def of(cls, trajectories: Trajectories, seed: int | None = None) -> TrajectoryStore:
        """Trajectories in memory as a store, without a copy of the losses, with the priorities of a seed if one is given."""
        columns = {"example_id": trajectories.example_ids, LOSSES: points_column(trajectories.losses_NT)}
        columns |= {name: points_column(values_NT) for name, values_NT in trajectories.statistics.items()}
        found = dict(trajectories.columns) | ({} if trajectories.sources is None else {"source": trajectories.sources})
        names = {name: Names() for name in found}
        columns |= {name: names[name].encode(column, name) for name, column in found.items()}
        if trajectories.num_response_tokens_N is not None:
            columns["num_response_tokens"] = pa.array(trajectories.num_response_tokens_N)
        if seed is not None:
            columns["priority"] = pa.array(priorities(trajectories.example_ids, seed))
        table = SortedTable.of(pa.table(columns))
        return cls(table, trajectories.num_points, {name: found.values for name, found in names.items()}, seed)

    def __len__(self) -> int:
        return self.rows.num_rows

    def has(self, column: str) -> bool:
        """Whether there is such a column."""
        return column in self.rows.schema.names or (column == NUM_RESPONSE_TOKENS and self.tokens_N is not None)

    def blocks(self, *columns: str) -> Iterator[pa.Table]:
        """The rows in order, block by block; of the columns those that there are."""
        known = [name for name in dict.fromkeys((*columns, "example_id")) if name in self.rows.schema.names]
        if self.tokens_N is None or NUM_RESPONSE_TOKENS not in columns:
            yield from self.rows.blocks(BLOCK_ROWS, known)
            return
        start = 0
        for block in self.rows.blocks(BLOCK_ROWS, [name for name in known if name != NUM_RESPONSE_TOKENS]):
            yield block.append_column(NUM_RESPONSE_TOKENS, pa.array(self.tokens_N[start : start + len(block)]))
            start += len(block)

    def each_block(self, _pool: Executor | None, function: Callable[[pa.Table], Result], *columns: str) -> Iterator[Result]:
        """What `function(block)` returns for every block, in their order: a pass over the rows, in threads of the pool if there
        is one. The function may run in another process: it must not change anything."""
        blocks = read_ahead(self.blocks(*columns))
        return map(function, blocks) if _pool is None else in_order(_pool, function, blocks)

    def names_of(self, column: str) -> list[str]:
        """The values of a column of names, in bytewise order. Raises ConfigError naming the known columns."""
        if column not in self.names:
            known = ", ".join(sorted(self.names)) or "none: these trajectories have no sources"
            raise ConfigError(f"clustering.stratify_by: no column '{column}' to stratify by. Known: {known}.")
        return sorted(self.names[column], key=str.encode)

    def codes(self, block: pa.Table, column: str) -> NDArray[np.int32]:
        """The places of a block's names among `names_of(column)`, shape (M,)."""
        return np.asarray(self._ranks[column][block[column].to_numpy()])

    def counts_of(self, column: str) -> NDArray[np.int64]:
        """Rows of each of `names_of(column)`."""
        num_names = len(self.names_of(column))

        def one_block(block: pa.Table) -> NDArray[np.int64]:
            return np.bincount(self.codes(block, column), minlength=num_names)

        return np.asarray(sum(self.each_block(None, one_block, column)))

    def priorities(self, block: pa.Table, seed: int | str) -> NDArray[np.uint64]:
        """The random numbers of a block's rows: those of the store where it has them for this seed."""
        if seed == self.priority_seed:
            return np.asarray(block["priority"].to_numpy())
        return priorities(block["example_id"], seed)

    def identity(self, pool: Executor) -> str:
        """What `clustering` counts as its input where the trajectories are somebody's files: 16 hexadecimal digits.

        The same for the same ids, losses, names and token counts, however they were ordered or cut into files.
        """
        columns = ["example_id", LOSSES, *STATISTICS, *sorted(self.names), "num_response_tokens"]
        content = self.content
        if content is None:
            content = sum(self.each_block(pool, partial(content_of, names=self.names), *columns)) % 2**64
        kinds = [str(self.rows.schema.field(name).type) for name in columns if self.has(name)]
        return digest([len(self), kinds, {name: self.names_of(name) for name in sorted(self.names)}, content])

    def with_tokens(self, count: Callable[[pa.Array], NDArray[np.int32]]) -> TrajectoryStore:
        """The same with other token counts, `count(ids)` in the order of the ids: four bytes a row in memory."""
        ids = pa.concat_arrays([one_array(block["example_id"]) for block in self.blocks("example_id")])
        return replace(self, tokens_N=count(ids), content=None)

    def in_memory(self) -> Trajectories:
        """All of it as a value."""
        table = pa.concat_tables(
            self.blocks("example_id", LOSSES, *STATISTICS, *self.names, "num_response_tokens")
        ).combine_chunks()
        found = {
            name: pa.DictionaryArray.from_arrays(one_array(table[name]), pa.array(values, pa.string())).dictionary_decode()
            for name, values in self.names.items()
        }
        tokens = table["num_response_tokens"].to_numpy() if self.has("num_response_tokens") else None
        statistics = {name: losses_matrix(table, name) for name in STATISTICS if self.has(name)}
        ids, losses_NT = one_array(table["example_id"]), losses_matrix(table)
        return Trajectories(ids, losses_NT, found.pop("source", None), tokens, found, statistics)

    @cached_property
    def _ranks(self) -> dict[str, NDArray[np.int32]]:
        """For each column of names the place of each code in their order."""
        ranks = {}
        for column, values in self.names.items():
            places = {value: place for place, value in enumerate(self.names_of(column))}
            ranks[column] = np.array([places[value] for value in values], np.int32)
        return ranks
