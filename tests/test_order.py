"""The order of a corpus, range by range: what is kept, what is refused, and that no part tells where the ranges were cut.

The small tests make shards by hand; those that ask for `ray_session` build the stage whole.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from s2l_ray.config import ExamplesConfig
from s2l_ray.config.recipes import SCHEMAS
from s2l_ray.errors import DataError
from s2l_ray.examples import order as order_module
from s2l_ray.examples import shards as shards_module
from s2l_ray.examples.columns import Columns
from s2l_ray.examples.corpus import corpus_identity, examples_recipe
from s2l_ray.examples.dropped import Dropped
from s2l_ray.examples.order import (
    INDEX_COLUMNS,
    DropSeen,
    Order,
    OrderRange,
    RangeFacts,
    SeenContents,
    cut_ids,
    groups_between,
    keep_first,
    refuse_shared_ids,
)
from s2l_ray.examples.shards import ShardIndex, row_groups, shard_path, with_notes
from s2l_ray.examples.stage import build as build_stage
from s2l_ray.storage.artifacts import Artifact, Key
from s2l_ray.storage.drafts import Draft
from s2l_ray.storage.places import Storage
from tests.building import context_of

Row = tuple[str, str, bytes, bytes]


# --- one range ---------------------------------------------------------------------------------------------------


def index_of(rows: list[Row]) -> pa.Table:
    ids, sources, contents, hashes = zip(*rows, strict=True)
    columns = {
        "example_id": ids,
        "source": sources,
        "content": pa.array(contents, pa.binary(1)),
        "row": pa.array(hashes, pa.binary(1)),
        "shard": pa.array(range(len(rows)), pa.int32()),
        "position": range(len(rows)),
    }
    return pa.table(columns)


def test_of_exact_copies_the_smallest_id_stays_in_whatever_order_they_come() -> None:
    rows = [
        ("c", "s", b"1", b"x"),
        ("a", "s", b"1", b"x"),
        ("b", "s", b"2", b"x"),
        ("d", "s", b"2", b"x"),
        ("e", "s", b"3", b"x"),
    ]
    for seed in range(5):
        kept, shared = keep_first(index_of(random.Random(seed).sample(rows, len(rows))))
        assert (kept["example_id"].to_pylist(), shared.to_pylist()) == (["a", "b", "e"], [])


def test_of_copies_with_one_id_the_first_source_stays() -> None:
    rows = [("a", "t", b"1", b"w"), ("a", "s", b"1", b"z"), ("a", "s", b"1", b"y")]
    for seed in range(5):
        kept, _ = keep_first(index_of(random.Random(seed).sample(rows, len(rows))))
        assert (kept["source"].to_pylist(), kept["row"].to_pylist()) == (["s"], [b"y"])


def test_one_id_for_different_contents_is_named_once() -> None:
    rows = [("a", "s", b"1", b"x"), ("b", "s", b"3", b"x"), ("a", "s", b"2", b"x"), ("a", "s", b"4", b"x")]
    assert keep_first(index_of(rows))[1].to_pylist() == ["a"]


# --- ranges ------------------------------------------------------------------------------------------------------


def shard_of(ids: list[str]) -> ShardIndex:
    """What is known of a shard with these ids."""
    table = pa.table({"example_id": pa.array(sorted(ids), pa.string()), "messages": pa.nulls(len(ids), pa.string())})
    return ShardIndex.of(row_groups(with_notes(table, Dropped(), Columns())))


@given(
    ids=st.lists(st.lists(st.sampled_from("abcdefghijkl"), max_size=30), max_size=5),
    group=st.integers(1, 4),
    size=st.integers(1, 20),
)
def test_ranges_hold_every_row_once_and_an_id_lies_in_one(ids: list[list[str]], group: int, size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for module in (order_module, shards_module):
            patch.setattr(module, "SHARD_ROW_GROUP", group)
        patch.setattr(order_module, "RANGE_ROWS", size)
        shards = [shard_of(some) for some in ids]
        ranges = cut_ids(shards)
        found: list[str] = []
        for low, high in ranges:
            for shard, some in zip(shards, ids, strict=True):
                groups = groups_between(shard.firsts, low, high)
                rows = sorted(some)[groups.start * group : groups.stop * group]
                found += [name for name in rows if low <= name and (high is None or name < high)]
    assert sorted(found) == sorted(name for some in ids for name in some)
    lows = [low for low, _ in ranges]
    assert lows == sorted(set(lows))


def test_ranges_are_about_as_large_as_wanted_and_few_for_a_small_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(0)
    ids = [[f"{rng.random():.12f}" for _ in range(5000)] for _ in range(10)]
    assert len(cut_ids([shard_of(some) for some in ids])) == 1
    monkeypatch.setattr(order_module, "RANGE_ROWS", 10_000)
    ranges = cut_ids([shard_of(some) for some in ids])
    sizes = [sum(low <= name < (high or "2") for some in ids for name in some) for low, high in ranges]
    assert len(ranges) == 5
    # Each of ten shards adds what lies between two samples, a thousand rows apart, at both ends.
    assert all(size <= 10_000 + 2 * 10 * 1024 for size in sizes)
    assert cut_ids([shard_of(["a"] * 30_000), shard_of(["b"])]) == [("a", "b"), ("b", None)], "one id is never cut"


@given(st.lists(st.lists(st.binary(min_size=10, max_size=10) | st.sampled_from([b"\0" * 10, b"a" + b"\0" * 9]), unique=True)))
def test_contents_are_new_once(batches: list[list[bytes]]) -> None:
    seen, known = SeenContents(sum(map(len, batches))), set[bytes]()
    for batch in batches:
        contents = pa.chunked_array([pa.array([b"x" * 10, *batch], pa.binary(10))[1:]])
        assert seen.add(contents).tolist() == [content not in known for content in batch]
        known |= set(batch)


# --- the whole order ---------------------------------------------------------------------------------------------


def order_of(work: Storage, shards: list[list[Row]]) -> Order:
    """The order of shards with these rows, each range a task that is called here."""
    for number, rows in enumerate(shards):
        table = index_of(sorted(rows)).drop_columns(["shard", "position"])
        content = pa.array([c * 10 for c in table["content"].to_pylist()], pa.binary(10))
        table = table.set_column(2, "content", content).append_column("split", pa.array(["pool"] * len(rows)))
        table = table.append_column("prompt_hash", pa.array(range(len(rows)), pa.uint64()))
        pq.write_table(table.select(INDEX_COLUMNS), work.path(shard_path(number)), row_group_size=shards_module.SHARD_ROW_GROUP)
    indexes = [shard_of([row[0] for row in rows]) for rows in shards]
    task = OrderRange(tuple(shard.firsts for shard in indexes), tuple(cut_ids(indexes)), work)
    facts = [RangeFacts(**json.loads(task(number)["facts"])) for number in range(len(task.ranges))]
    refuse_shared_ids(facts)
    again = json.loads(DropSeen(tuple(facts), work)(0)["ranges"])
    assert again == json.loads(DropSeen(tuple(facts), work)(0)["ranges"]), "a task may be done twice"
    return Order.of([RangeFacts(**one) for one in again], work)


def kept_rows(order: Order, shards: list[list[Row]]) -> list[Row]:
    addresses = order.addresses.of(np.arange(order.addresses.num_rows)).to_pylist()
    return [sorted(shards[address["shard"]])[address["position"]] for address in addresses]


@pytest.fixture
def small_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (order_module, shards_module):
        monkeypatch.setattr(module, "SHARD_ROW_GROUP", 4)
    monkeypatch.setattr(order_module, "RANGE_ROWS", 10)


@pytest.mark.usefixtures("small_ranges")
def test_copies_in_other_ranges_go_and_the_counts_say_so(tmp_path: Path) -> None:
    rng = random.Random(0)
    # 90 ids, all with one of 26 contents; every third of a second source.
    rows = [(f"id-{n:02d}", "st"[n % 3 == 0], bytes([97 + rng.randrange(26)]), b"x") for n in range(90)]
    shards = [rows[number::4] for number in range(4)]
    order = order_of(Storage(str(tmp_path)), shards)
    assert len(order.addresses.ends) > 5
    firsts = {content: row for row in reversed(rows) for content in [row[2]]}
    assert kept_rows(order, shards) == sorted(firsts.values())
    assert order.num_duplicates == 90 - len(firsts)
    counted = Counter(row[1] for row in firsts.values())
    assert order.sources == {source: {"pool": counted[source], "held_out": 0} for source in sorted(counted)}
    some = order.addresses.of(np.array([3, 20, 21])).to_pylist()
    assert some == [order.addresses.of(np.arange(order.addresses.num_rows)).to_pylist()[row] for row in (3, 20, 21)]


@pytest.mark.usefixtures("small_ranges")
def test_ids_that_stand_for_different_contents_are_counted_over_all_ranges(tmp_path: Path) -> None:
    rows = [(f"id-{n:02d}", "s", bytes([n]), b"x") for n in range(1, 60)]
    clashes = [(f"id-{n:02d}", "s", bytes([100 + n]), b"x") for n in range(8, 60, 7)]
    with pytest.raises(
        DataError,
        match=r"examples\.id_field: 8 ids are shared .*: 'id-08', 'id-15', 'id-22', 'id-29', 'id-36' and 3 more\. Give every",
    ):
        order_of(Storage(str(tmp_path)), [rows, clashes])


@pytest.mark.usefixtures("small_ranges")
def test_an_id_that_is_repeated_past_a_range_stays_in_one(tmp_path: Path) -> None:
    rows = [("b", "s", b"b", bytes([n])) for n in range(40)] + [(name, "s", name.encode(), b"x") for name in "acde"]
    shards = [rows[::2], rows[1::2]]
    order = order_of(Storage(str(tmp_path)), shards)
    assert [row[0] for row in kept_rows(order, shards)] == ["a", "b", "c", "d", "e"]
    assert kept_rows(order, shards)[1] == ("b", "s", b"b", bytes([0]))
    assert order.num_duplicates == 39
    clash = [*rows, ("b", "s", b"z", b"x")]
    with pytest.raises(DataError, match=r"1 ids .*: 'b'\. Give"):
        order_of(Storage(str(tmp_path)), [clash[::2], clash[1::2]])


# --- the whole stage ---------------------------------------------------------------------------------------------


def build(run_dir: Path, dataset: Path, **fields: Any) -> Artifact:
    config = ExamplesConfig(dataset=str(dataset), source_field="source", rows_per_part=64, **fields)
    key = Key("examples", SCHEMAS["examples"], examples_recipe(config, corpus_identity(config)), {})
    return build_stage(context_of(Draft.open(Storage(str(run_dir)), key), examples=config))


def result_of(artifact: Artifact) -> tuple[dict[str, Any], dict[str, Any]]:
    return artifact.summary, artifact.manifest["files"]


@pytest.mark.parametrize("id_field", [None, "id"])
def test_several_ranges_give_the_same_bytes_as_one(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, id_field: str | None
) -> None:
    rng = random.Random(3)
    words = ["apple", "boat", "cloud", "drum", "eagle", "fern", "glove", "house"]
    rows = []
    for number in range(4000):
        prompt = " ".join(rng.choices(words, k=4)) + f" {number}"
        response = f"answer {number}"
        rows.append({"id": f"{rng.random()}", "prompt": prompt, "response": response, "source": f"set-{number % 3}"})
    rows += [{**row, "id": f"{rng.random()}"} for row in rng.sample(rows, 500)] + rng.sample(rows, 100)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr("s2l_ray.examples.cutting.SMALLEST_SHARD_BYTES", 150_000)
    one = build(tmp_path / "one", path, id_field=id_field)
    cuts = []
    monkeypatch.setattr(order_module, "RANGE_ROWS", 1500)
    monkeypatch.setattr("s2l_ray.examples.order.cut_ids", lambda shards: cuts.append(cut_ids(shards)) or cuts[-1])
    several = build(tmp_path / "several", path, id_field=id_field)
    assert len(cuts[0]) > 1
    assert result_of(several) == result_of(one)
    assert one.summary["dropped"]["duplicate"] >= 600
