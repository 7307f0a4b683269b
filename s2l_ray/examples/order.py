"""Pass 2: which rows of the shards are the corpus's examples, and in what order, however many there are.

Every shard's file is in order of id. So the ids can be cut into *ranges*, and a task needs only the ids and hashes of one
range's rows to put them in order, drop exact copies and write down the addresses (shard, position) of the rows that it keeps.
The driver gets only counts: the ids and hashes of all rows would take 0.3 KB of its memory each. Where rows bring their own
ids, equal contents may be in different ranges: one more task then goes over the rows kept, and remembers 10 bytes of each.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from s2l_ray.config import ExamplesConfig, WorkerConfig
from s2l_ray.errors import DataError
from s2l_ray.examples.hashes import DIGEST_BYTES, HELD_OUT, POOL
from s2l_ray.examples.ids import NAMED_IDS, name_examples
from s2l_ray.examples.shards import SHARD_ROW_GROUP, ShardIndex, shard_path
from s2l_ray.progress import track
from s2l_ray.runtime.data import run_tasks
from s2l_ray.storage.drafts import table_bytes
from s2l_ray.storage.places import Storage

# Rows of a range. A task holds them in memory (about 30 MB); smaller ranges open every shard more often.
RANGE_ROWS = 131_072
# Shards that are read at once: in object storage each is a few requests that wait.
READERS = 8
# The driver puts up to this many rows in order sooner than a worker would start.
ROWS_DONE_HERE = 8192
INDEX_COLUMNS = ["example_id", "source", "split", "prompt_hash", "content", "row"]


# --- pure core ---------------------------------------------------------------------------------------------------


def cut_ids(shards: Sequence[ShardIndex]) -> list[tuple[str, str | None]]:
    """Ranges of ids that hold all rows, each about RANGE_ROWS of them: from its first id to below that of the next.

    They are cut between ids, so that all rows of one id are in one range, however many they are.
    """
    cuts: list[str] = []
    num_rows = 0
    for first, size in sorted(group for shard in shards for group in zip(shard.firsts, shard.sizes, strict=True)):
        if not cuts or (num_rows >= RANGE_ROWS and first != cuts[-1]):
            cuts.append(first)
            num_rows = 0
        num_rows += size
    return list(zip(cuts, [*cuts[1:], None], strict=True)) if cuts else []


def groups_between(firsts: Sequence[str], low: str, high: str | None) -> range:
    """The row groups of a shard that may hold ids from `low` to below `high`, by the first id of each."""
    # The rows of an id may begin in the group before the first group that starts with it.
    start = max(0, bisect_left(firsts, low) - 1)
    return range(start, len(firsts) if high is None else bisect_left(firsts, high))


def keep_first(index: pa.Table) -> tuple[pa.Table, pa.Array]:
    """The index in order of id, without exact copies; and the ids that rows of different contents share.

    `index` has INDEX_COLUMNS and the address of every row. The first of equal contents by (id, source, row hash, shard,
    position) is kept.
    """
    keys = [(name, "ascending") for name in ("example_id", "source", "row", "shard", "position")]
    index = index.take(pc.sort_indices(index, sort_keys=keys))
    # Codes are numbered in order of first appearance: where a code exceeds all before it, a content appears first.
    codes = index["content"].combine_chunks().dictionary_encode().indices.to_numpy()
    highest_before = np.concatenate([[-1], np.maximum.accumulate(codes)[:-1]]) if len(codes) else codes
    return index.filter(pa.array(codes > highest_before)), _shared_ids(index, codes)


def _shared_ids(index: pa.Table, codes: NDArray[np.integer[Any]]) -> pa.Array:
    """The ids that rows of different contents (codes, shape (N,)) share. The index is in order of id."""
    ids = index["example_id"].combine_chunks()
    is_same_id = pc.equal(ids[1:], ids[:-1]).to_numpy(zero_copy_only=False)
    return ids.take(pa.array(np.flatnonzero(is_same_id & (codes[1:] != codes[:-1])))).unique()


def count_splits(kept: pa.Table) -> list[tuple[str, str, int]]:
    """Source, split and number of rows."""
    counted = kept.group_by(["source", "split"]).aggregate([([], "count_all")]).to_pylist()
    return [(row["source"], row["split"], row["count_all"]) for row in counted]


def by_source(counts: Mapping[tuple[str, str], int]) -> dict[str, dict[str, int]]:
    """Rows by split, by source in order of name, from the rows of each source and split."""
    sources: dict[str, dict[str, int]] = {}
    for (source, split), rows in sorted(counts.items()):
        sources.setdefault(source, {POOL: 0, HELD_OUT: 0})[split] = rows
    return sources


class SeenContents:
    """The hashes of the contents of all ranges so far, sorted, in one array of room for `capacity` of them."""

    def __init__(self, capacity: int) -> None:
        self._hashes = np.empty(capacity, f"S{DIGEST_BYTES}")  # what is not written yet takes no memory
        self._num = 0

    def add(self, contents: pa.ChunkedArray) -> NDArray[np.bool_]:
        """Add a range's content hashes, no two of them equal; whether each is new, shape (N,)."""
        array = contents.combine_chunks()
        hashes = np.frombuffer(array.buffers()[1], self._hashes.dtype)[array.offset : array.offset + len(array)]
        known = self._hashes[: self._num]
        places = np.searchsorted(known, hashes)
        is_new = np.ones(len(hashes), bool)
        inside = places < self._num
        is_new[inside] = known[places[inside]] != hashes[inside]
        num_new = int(is_new.sum())
        self._hashes[self._num : self._num + num_new] = np.sort(hashes[is_new])
        self._num += num_new
        # Two sorted runs, which a stable sort merges.
        self._hashes[: self._num].sort(kind="stable")
        return is_new


# --- ranges ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RangeFacts:
    """What the driver keeps of a range that was put in order, as values that JSON has."""

    path: str
    """The file in the scratch directory with the addresses of the rows kept."""
    num_read: int
    num_kept: int
    counts: list[tuple[str, str, int]]
    """Source, split, rows kept."""
    num_shared: int
    """The number of ids that rows of different contents share."""
    shared: list[str]
    """The first few of them."""


@dataclass(frozen=True)
class OrderRange:
    """Task: put the rows of a range in order, without exact copies, and write down where they are."""

    firsts: tuple[tuple[str, ...], ...]
    """The first id of every row group, by shard."""
    ranges: tuple[tuple[str, str | None], ...]
    work: Storage

    def __call__(self, number: int) -> dict[str, Any]:
        index = self._read(*self.ranges[number])
        kept, shared = keep_first(index)
        path = f"order-{number:05d}.parquet"
        self.work.write(path, table_bytes(kept.drop_columns(["example_id", "row"])))
        named = shared[:NAMED_IDS].to_pylist()
        facts = RangeFacts(path, index.num_rows, kept.num_rows, count_splits(kept), len(shared), named)
        return {"range": number, "facts": json.dumps(dataclasses.asdict(facts))}

    def _read(self, low: str, high: str | None) -> pa.Table:
        """The index of all rows with ids from `low` to below `high`, with their addresses."""
        groups = {shard: groups_between(firsts, low, high) for shard, firsts in enumerate(self.firsts)}
        wanted = [shard for shard, some in groups.items() if some]
        with ThreadPoolExecutor(READERS) as pool:
            return pa.concat_tables(pool.map(lambda shard: self._read_shard(shard, groups[shard], low, high), wanted))

    def _read_shard(self, shard: int, groups: range, low: str, high: str | None) -> pa.Table:
        """The index of a range's rows in some row groups of one shard."""
        path = shard_path(shard)
        with self.work.open(path) as source, self.work.explained(path):
            file = pq.ParquetFile(source, pre_buffer=True)  # few requests for adjacent columns
            table = file.read_row_groups(list(groups), columns=INDEX_COLUMNS, use_threads=False).replace_schema_metadata()
        is_inside = pc.greater_equal(table["example_id"], low)
        if high is not None:
            is_inside = pc.and_(is_inside, pc.less(table["example_id"], high))
        positions = np.flatnonzero(is_inside.to_numpy()).astype(np.int32) + np.int32(groups.start * SHARD_ROW_GROUP)
        addresses = {"shard": pa.array(np.full(len(positions), shard, np.int32)), "position": pa.array(positions)}
        table = table.filter(is_inside)
        return pa.table({name: table[name] for name in INDEX_COLUMNS} | addresses)


def refuse_shared_ids(ranges: Sequence[RangeFacts]) -> None:
    """Raise DataError naming ids that rows of different contents share."""
    count = sum(facts.num_shared for facts in ranges)
    if count:
        named = name_examples(pa.array([name for facts in ranges for name in facts.shared]), count)
        raise DataError(
            f"examples.id_field: {count:,} ids are shared by rows with different prompt or response: {named}. Give every row "
            "its own id, or leave examples.id_field out: ids are then made from the content."
        )


@dataclass(frozen=True)
class DropSeen:
    """Task: drop from every range the contents of the ranges before it."""

    ranges: tuple[RangeFacts, ...]
    work: Storage

    def __call__(self, _: int) -> dict[str, Any]:
        seen = SeenContents(sum(facts.num_kept for facts in self.ranges))
        found = [self._without_seen(number, facts, seen) for number, facts in enumerate(self.ranges)]
        return {"ranges": json.dumps([dataclasses.asdict(facts) for facts in found])}

    def _without_seen(self, number: int, facts: RangeFacts, seen: SeenContents) -> RangeFacts:
        """A range without what was seen before. Its rows get another file, so that the task can be done again."""
        kept = read_range(self.work, facts.path)
        is_new = seen.add(kept["content"])
        if is_new.all():
            return facts
        kept, path = kept.filter(pa.array(is_new)), f"distinct-{number:05d}.parquet"
        self.work.write(path, table_bytes(kept))
        return dataclasses.replace(facts, path=path, num_kept=kept.num_rows, counts=count_splits(kept))


def read_range(work: Storage, path: str) -> pa.Table:
    """Source, split, hashes and addresses of the rows of a range that are kept."""
    return pq.read_table(io.BytesIO(work.read(path)))


# --- the order ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Addresses:
    """Where each row of the order is, range by range in files of the scratch directory. Cheap to send to a worker."""

    work: Storage
    paths: tuple[str, ...]
    ends: tuple[int, ...]
    """The number of rows up to the end of every range."""
    held_out: NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, np.uint64), compare=False)
    """The hashes of the prompts that are held out beyond those whose split says so, ascending (see `splits`)."""

    @property
    def num_rows(self) -> int:
        return self.ends[-1] if self.ends else 0

    def of(self, rows: NDArray[np.integer[Any]]) -> pa.Table:
        """`shard` and `position` (int32) of some rows of the whole order: their numbers, ascending, shape (M,)."""
        range_of_row = np.searchsorted(self.ends, rows, side="right")
        tables = []
        for number in np.unique(range_of_row):
            table = read_range(self.work, self.paths[number]).select(["shard", "position"])
            begin = self.ends[number] - table.num_rows
            tables.append(table.take(pa.array(rows[range_of_row == number] - begin)))
        return pa.concat_tables(tables)


@dataclass(frozen=True)
class Order:
    """The examples of a corpus in order of id."""

    addresses: Addresses
    sources: dict[str, dict[str, int]]
    """Rows by split, by source in order of name."""
    num_duplicates: int

    @classmethod
    def of(cls, ranges: Sequence[RangeFacts], work: Storage) -> Order:
        """The whole order from its ranges. No two of them have a content in common."""
        counts: Counter[tuple[str, str]] = Counter()
        for facts in ranges:
            counts.update({(source, split): rows for source, split, rows in facts.counts})
        ends = itertools.accumulate(facts.num_kept for facts in ranges)
        addresses = Addresses(work, tuple(facts.path for facts in ranges), tuple(ends))
        return cls(addresses, by_source(counts), sum(facts.num_read for facts in ranges) - addresses.num_rows)


# --- on the driver -----------------------------------------------------------------------------------------------


def order_rows(indexes: Sequence[ShardIndex], config: ExamplesConfig, workers: WorkerConfig, work: Storage) -> Order:
    """Have the rows of the shards put in order of id, range by range. Raises DataError for an id of different contents."""
    task = OrderRange(tuple(index.firsts for index in indexes), tuple(cut_ids(indexes)), work)
    ranges = _order_ranges(task, workers, sum(sum(index.sizes) for index in indexes))
    refuse_shared_ids(ranges)
    # Ids that are made from the contents are equal for equal contents, which are then in one range.
    if config.id_field is not None and len(ranges) > 1:
        [result] = run_tasks(DropSeen(tuple(ranges), work), 1, workers)
        ranges = [RangeFacts(**facts) for facts in json.loads(result["ranges"])]
    return Order.of(ranges, work)


def _order_ranges(task: OrderRange, workers: WorkerConfig, num_rows: int) -> list[RangeFacts]:
    num_ranges = len(task.ranges)
    if num_ranges <= 1 and num_rows <= ROWS_DONE_HERE:
        return [RangeFacts(**json.loads(task(number)["facts"])) for number in range(num_ranges)]
    found: dict[int, RangeFacts] = {}
    with track("examples", num_ranges, "ranges of ids put in order") as progress:
        for result in run_tasks(task, num_ranges, workers):
            found[result["range"]] = RangeFacts(**json.loads(result["facts"]))
            progress.advance()
    return [found[number] for number in range(num_ranges)]
