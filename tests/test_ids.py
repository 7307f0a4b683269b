"""Ids of examples: strings, and integers of 64 bits with or without a sign, exactly, wherever they stand."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

import s2l_ray
from s2l_ray.config import ClusteringConfig, SelectionConfig
from s2l_ray.errors import DataError
from s2l_ray.examples.ids import id_column, not_unique, of_one_type, priorities, repeated
from s2l_ray.selection.alone import select_trajectories
from s2l_ray.selection.stage import read_selection
from s2l_ray.trajectories.files import read_trajectories
from tests.building import literal_priority

LARGE = 2**63
PRIORITIES = [9010437112063680508, 18052440137798152440, 9784920567473264470, 6443502462090008174]
RNG = np.random.default_rng(0)


def write(path: Path, ids: pa.Array) -> Path:
    losses = np.random.default_rng(len(ids)).random((len(ids), 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"example_id": ids, "losses": losses.tolist()}), path)
    return path


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=20, unique=True))
def test_every_integer_of_64_bits_without_a_sign_is_taken_exactly(values):
    ids = id_column(pa.array(values, pa.uint64()), "here")
    assert ids.to_pylist() == values
    assert ids.type == (pa.uint64() if max(values) >= LARGE else pa.int64())
    assert (priorities(ids, 0) == priorities(pa.array(list(map(str, values))), 0)).all()


@given(st.lists(st.text(max_size=40), min_size=1, max_size=30), st.integers(0, 9) | st.text(max_size=9), st.data())
def test_a_priority_is_of_the_id_and_the_seed_alone_wherever_the_row_stands(ids, seed, data):
    column = pa.array(ids, pa.string())
    expected = [literal_priority(one, seed) for one in ids]
    assert priorities(column, seed).tolist() == expected
    first = data.draw(st.integers(0, len(ids)))
    last = data.draw(st.integers(first, len(ids)))
    assert priorities(column[first:last], seed).tolist() == expected[first:last]
    chunks = pa.chunked_array([column[:first], column[first:]])
    assert priorities(chunks, seed).tolist() == expected
    assert priorities(list(reversed(ids)), seed).tolist() == expected[::-1]


def test_priorities_stay_the_same_for_ever():
    assert priorities(["a", "example-17", "é", ""], 7).tolist() == PRIORITIES
    assert priorities([12, -3], 0).tolist() == [literal_priority("12", 0), literal_priority("-3", 0)]
    many = priorities([str(i) for i in range(70_000)], "random-1")
    assert [many[0], many[69_999]] == [literal_priority("0", "random-1"), literal_priority("69999", "random-1")]


IDS = {
    "numbers": np.arange(200_000),
    "names": [f"example-{i:010d}" for i in range(200_000)],
    "of every length": ["x" * (i % 400) + str(i // 400) for i in range(200_000)],
    "that differ at the front": [f"{i:06d}-of-the-same-long-corpus-that-goes-on" for i in range(200_000)],
}


@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
def test_priorities_of_ids_that_differ_little_are_as_of_chance(ids):
    """Uniform in all their bits, none twice, unlike their neighbours', and others under each seed."""
    found = [priorities(ids, seed) for seed in (0, 1, "0-epoch-1")]
    for one in found:
        assert len(np.unique(one)) == len(one)
        for shift in (0, 28, 54):
            counts = np.bincount(((one >> np.uint64(shift)) & np.uint64(1023)).astype(np.int64), minlength=1024)
            chi_square = float(((counts - len(one) / 1024) ** 2).sum() / (len(one) / 1024))
            assert abs(chi_square - 1023) < 4.9 * np.sqrt(2 * 1023)
        ones = np.unpackbits(one.view(np.uint8).reshape(-1, 8), axis=1).mean(axis=0)
        assert np.abs(ones - 0.5).max() < 5.5 * 0.5 / np.sqrt(len(one))
        neighbours = np.corrcoef(one[1:].astype(float), one[:-1].astype(float))[0, 1]
        assert abs(neighbours) < 4.9 / np.sqrt(len(one))
    for left, right in itertools.combinations(found, 2):
        assert abs(np.corrcoef(left.astype(float), right.astype(float))[0, 1]) < 4.9 / np.sqrt(len(left))
        assert abs(np.bitwise_count(left ^ right).mean() - 32) < 4.9 * 4 / np.sqrt(len(left))


def test_one_bit_of_an_id_turns_half_of_its_priority():
    base = np.frombuffer(b"example-0000017", np.uint8)
    flipped = [base.copy() for _ in range(len(base) * 6)]
    for place, one in enumerate(flipped):
        one[place // 6] ^= 1 << place % 6
    texts = [bytes(one).decode("latin-1") for one in flipped]
    turned = np.bitwise_count(
        np.concatenate([priorities(texts, seed) ^ priorities(["example-0000017"], seed) for seed in range(40)])
    )
    assert abs(turned.mean() - 32) < 4.9 * 4 / np.sqrt(len(turned))


def test_integers_that_no_type_holds_are_refused_with_what_to_do():
    with pytest.raises(DataError, match=r"here: .*Give them as strings"):
        of_one_type([pa.array([-1]), pa.array([LARGE], pa.uint64())], "here")
    with pytest.raises(DataError, match=r"here: example_id is int64 and string"):
        of_one_type([pa.array([1]), pa.array(["a"])], "here")


def test_large_ids_are_selected_and_come_out_as_they_are(tmp_path):
    values = [LARGE + 7 * i for i in range(30)] + [1, 2]
    ids = pa.array(np.array(values, np.uint64)[RNG.permutation(32)])
    path = write(tmp_path / "t.parquet", ids)
    done = select_trajectories(str(path), str(tmp_path / "out"), ClusteringConfig(num_clusters=3), SelectionConfig(budget=8))
    chosen = done.read_table("selected.parquet")["example_id"]
    assert chosen.type == pa.uint64()
    assert set(chosen.to_pylist()) <= set(values)
    assert read_selection(done).example_ids.to_pylist() == chosen.to_pylist() == sorted(chosen.to_pylist())
    again = s2l_ray.select(pq.read_table(path)["losses"].to_pylist(), budget=8, num_clusters=3, example_ids=ids.to_numpy())
    assert again.example_ids.to_pylist() == chosen.to_pylist()


def test_parts_with_and_without_large_ids_are_one_input(tmp_path):
    write(tmp_path / "all" / "a.parquet", pa.array([3, 1], pa.int32()))
    write(tmp_path / "all" / "b.parquet", pa.array([2, LARGE + 1], pa.uint64()))
    assert read_trajectories(str(tmp_path / "all")).example_ids.to_pylist() == [1, 2, 3, LARGE + 1]
    done = select_trajectories(
        str(tmp_path / "all"), str(tmp_path / "out"), ClusteringConfig(num_clusters=1), SelectionConfig(budget=4)
    )
    assert done.read_table("selected.parquet")["example_id"].to_pylist() == [1, 2, 3, LARGE + 1]


def test_small_ids_of_any_width_are_the_same_input(tmp_path):
    found = [write(tmp_path / f"{kind}.parquet", pa.array([5, 3, 4], kind)) for kind in (pa.int16(), pa.int64(), pa.uint64())]
    assert {str(read_trajectories(str(path)).example_ids.type) for path in found} == {"int64"}


def test_calls_with_and_without_large_ids_are_one_recording(tmp_path):
    place = str(tmp_path / "recorded")
    for step in (1, 2):
        s2l_ray.record_losses(place, step, [7], [0.5])
        s2l_ray.record_losses(place, step, np.array([LARGE + 5], np.uint64), [0.25])
    s2l_ray.finish_recording(place)
    assert read_trajectories(place).example_ids.to_pylist() == [7, LARGE + 5]


@given(st.lists(st.integers(0, 9), max_size=30))
def test_ids_that_occur_more_than_once_are_named_once(values):
    found = repeated(pa.array(values, pa.int64())).to_pylist()
    assert sorted(found) == sorted({value for value in values if values.count(value) > 1})
    if found:
        assert f"example_id occurs more than once: {found[0]!r}" in str(not_unique(pa.array(found)))
