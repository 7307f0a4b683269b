"""Tables sorted on disk: the same rows whatever their order and cut, and nothing lost or doubled without a word."""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from s2l_ray.errors import DataError
from s2l_ray.trajectories import id_order, sorting
from s2l_ray.trajectories.id_order import is_ascending
from s2l_ray.trajectories.sorting import SortedTable, in_order, sort_by_id

RUN_ROWS, PIECE_ROWS = 50, 8

# Of one length in bytes, with prefixes in common: the keys that are sorted as numbers, of one word and of several.
numbered = st.tuples(st.sampled_from(["", "p", "prefix-of-many-bytes-"]), st.integers(1, 17)).flatmap(
    lambda shape: st.lists(st.integers(0, 10 ** shape[1] - 1), unique=True, max_size=200).map(
        lambda values: [f"{shape[0]}{value:0{shape[1]}d}" for value in values]
    )
)
# The last of them differ in their order as UTF-16 from that as UTF-8.
texts = st.lists(st.text("a\x00zé中\uffee\U0001f600", max_size=6), unique=True, max_size=200)
integers = st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(-300, 300), unique=True, max_size=200)
ids_of_any_kind = numbered | texts | integers


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as threads:
        yield threads


@pytest.fixture(autouse=True)
def small_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sorting, "RUN_ROWS", RUN_ROWS)
    monkeypatch.setattr(sorting, "PIECE_ROWS", PIECE_ROWS)


def table_of(ids: list[Any]) -> pa.Table:
    """Ids, and two columns that say which row each was."""
    kind = pa.int64() if ids and isinstance(ids[0], int) else pa.string()
    values = pa.FixedSizeListArray.from_arrays(pa.array(np.arange(2 * len(ids), dtype=np.float32)), 2)
    return pa.table({"example_id": pa.array(ids, kind), "row": np.arange(len(ids)), "losses": values})


def cut(table: pa.Table, places: list[int]) -> list[pa.Table]:
    stops = [*sorted(place % (len(table) + 1) for place in places), len(table)]
    return [table[start:stop] for start, stop in zip([0, *stops], stops, strict=False)]


def bytewise(value: Any) -> Any:
    return value.encode() if isinstance(value, str) else value


def rows_of(found: SortedTable, block_rows: int = 13, columns: list[str] | None = None) -> pa.Table:
    return pa.concat_tables(found.blocks(block_rows, columns)).combine_chunks()


def sort_ids(ids: list[Any], folder: Path, pool: ThreadPoolExecutor, places: list[int] | None = None) -> SortedTable:
    return sort_by_id(cut(table_of(ids), places or []), folder, pool)


# --- the order -----------------------------------------------------------------------------------------------------


@given(ids=ids_of_any_kind.filter(len), places=st.lists(st.integers(0, 200), max_size=6), block_rows=st.integers(1, 130))
@settings(max_examples=120, deadline=None)
@example(ids=[f"{n:03d}" for n in reversed(range(150))], places=[], block_rows=50)
@example(ids=["", "\x00", "\x00\x00"], places=[1, 2], block_rows=1)
def test_any_order_and_cut_gives_the_rows_in_bytewise_order(
    pool: ThreadPoolExecutor, ids: list[Any], places: list[int], block_rows: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = sort_ids(ids, Path(folder), pool, places)
        blocks = list(found.blocks(block_rows))
        in_files = [len(pa.ipc.open_file(path.read_bytes()).read_all()) for path in found.files]
    table = pa.concat_tables(blocks)
    expected = sorted(range(len(ids)), key=lambda row: bytewise(ids[row]))
    assert table["example_id"].to_pylist() == [ids[row] for row in expected]
    assert table["row"].to_pylist() == expected
    assert table["losses"].to_pylist() == [[2.0 * row, 2.0 * row + 1] for row in expected]
    assert [len(block) for block in blocks[:-1]] == [block_rows] * (len(blocks) - 1)
    assert all(column.num_chunks == 1 for block in blocks for column in block.columns)
    assert found.num_rows == len(ids) == sum(in_files)
    assert found.schema == table_of(ids).schema


@given(ids_of_any_kind.filter(len), st.integers(0, 30), st.integers(0, 30))
@settings(max_examples=150, deadline=None)
@example(["a"], 0, 0)
@example([f"{n:070d}" for n in (3, 1, 2)], 0, 0)  # longer than what is sorted as numbers
@example([f"{n:09d}" + "x" * 40 + f"{n:09d}" for n in (3, 1, 2)], 1, 0)  # several words, most bytes in common
def test_sorting_as_numbers_is_arrows_order_also_of_a_slice(ids: list[Any], start: int, end: int) -> None:
    whole = table_of([*ids[:1], *ids, *ids[-1:]])["example_id"].chunk(0)  # with equal ids: those keep their order
    part = whole[start : max(start + 1, len(whole) - end)]
    if not len(part):
        return
    assert id_order._ascending_order(part).tolist() == pc.array_sort_indices(part).to_pylist()


@pytest.mark.parametrize("ids", [["same", "same"], ["s", "s", "s"], [7, 7]])
def test_equal_ids_keep_their_order(ids: list[Any]) -> None:
    assert id_order._ascending_order(table_of(ids)["example_id"].chunk(0)).tolist() == list(range(len(ids)))


@given(ids_of_any_kind)
@settings(max_examples=60, deadline=None)
def test_ascending_means_bytewise_and_without_repetition(ids: list[Any]) -> None:
    ordered = sorted(ids, key=bytewise)
    assert is_ascending(table_of(ordered)["example_id"].combine_chunks())
    if len(ids) > 1:
        assert not is_ascending(table_of(ordered[::-1])["example_id"].combine_chunks())
        assert not is_ascending(table_of([*ordered, ordered[-1]])["example_id"].combine_chunks())


# --- files ---------------------------------------------------------------------------------------------------------


def test_ascending_input_is_written_once_and_not_merged(pool: ThreadPoolExecutor, tmp_path: Path) -> None:
    found = sort_ids([f"{n:05d}" for n in range(512)], tmp_path, pool, [7, 100, 101])
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f"run-{number:05d}.arrow" for number in range(11)]
    assert [path.name for path in found.files] == names


def test_rows_that_are_only_out_of_order_inside_a_run_are_not_merged(pool: ThreadPoolExecutor, tmp_path: Path) -> None:
    ids = [start + row for start in range(0, 200, RUN_ROWS) for row in reversed(range(RUN_ROWS))]
    found = sort_ids(ids, tmp_path, pool)
    assert rows_of(found)["example_id"].to_pylist() == list(range(200))
    assert not list(tmp_path.glob("merged-*"))


def test_merged_runs_leave_only_the_merged_files(pool: ThreadPoolExecutor, tmp_path: Path) -> None:
    found = sort_ids(np.random.default_rng(0).permutation(1_000).tolist(), tmp_path, pool)
    assert sorted(tmp_path.iterdir()) == list(found.files)
    assert all(path.name.startswith("merged-") for path in found.files)
    # No range of ids grows beyond a few runs: that is what bounds memory.
    sizes = [len(pa.ipc.open_file(path.read_bytes()).read_all()) for path in found.files]
    assert max(sizes) <= RUN_ROWS + 2 * 20 * PIECE_ROWS


def test_what_is_merged_gives_its_disk_space_back_at_once(
    pool: ThreadPoolExecutor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken, read = [], sorting.IdRange.rows

    def watched(some: sorting.IdRange) -> pa.Table:
        taken.append(sum(path.stat().st_size for path in tmp_path.iterdir()))
        return read(some)

    monkeypatch.setattr(sorting.IdRange, "rows", watched)
    found = sort_ids(np.random.default_rng(5).permutation(4_000).tolist(), tmp_path, pool)
    assert rows_of(found)["example_id"].to_pylist() == list(range(4_000))
    assert len(taken) > 20
    assert max(taken) < 1.3 * taken[0]  # 2 where all runs stay until the end


@pytest.mark.parametrize("kind", [int, str])
def test_many_runs_are_merged_in_passes_to_the_same_rows(
    pool: ThreadPoolExecutor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type
) -> None:
    ids = [kind(value) for value in np.random.default_rng(3).permutation(3_000)]
    at_once = sort_ids(ids, tmp_path / "at-once", pool)
    monkeypatch.setattr(sorting, "MAX_RUNS_AT_ONCE", 3)
    in_passes = sort_ids(ids, tmp_path / "in-passes", pool)
    assert rows_of(in_passes).equals(rows_of(at_once))
    assert sorted((tmp_path / "in-passes").iterdir()) == list(in_passes.files)
    assert all(path.name.startswith("merged-4-") for path in in_passes.files)  # 60 runs: 3 at once take four passes


def test_reads_of_runs_grow_little_faster_than_the_rows(
    pool: ThreadPoolExecutor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned, reads = sorting.ranges_of, [0]

    def counted(runs: Any) -> Iterator[sorting.IdRange]:
        for some in planned(runs):
            reads[0] += len(some.stretches)
            yield some

    monkeypatch.setattr(sorting, "ranges_of", counted)
    monkeypatch.setattr(sorting, "MAX_RUNS_AT_ONCE", 16)
    found = []
    for size in (800, 6_400):  # 16 and 128 runs, in one pass and in two
        reads[0] = 0
        sort_ids(np.random.default_rng(4).permutation(size).tolist(), tmp_path / str(size), pool)
        found.append(reads[0])
    assert found[1] < 2 * 1.5 * 8 * found[0]
    monkeypatch.setattr(sorting, "MAX_RUNS_AT_ONCE", 10**9)
    reads[0] = 0
    sort_ids(np.random.default_rng(4).permutation(6_400).tolist(), tmp_path / "at-once", pool)
    assert reads[0] > 1.5 * found[1]


def test_a_read_has_the_rows_of_its_pieces_and_no_others(pool: ThreadPoolExecutor, tmp_path: Path) -> None:
    table = table_of(list(range(RUN_ROWS)))
    run = sorting.Run.write(tmp_path / "run.arrow", table)
    assert len(run.offsets) == len(run.firsts) + 1 == -(-RUN_ROWS // PIECE_ROWS) + 1
    for first, stop in ((None, None), (0, 1), (5, 20), (8, 16), (9, 17), (-3, 4), (48, None), (49, 60)):
        stretch = run.stretch(first, stop)
        assert stretch is not None
        found = sorting.IdRange(first, stop, table.schema, (stretch,)).rows()
        assert found.equals(table[max(first or 0, 0) : RUN_ROWS if stop is None else stop])
    assert run.stretch(50, 60) is None
    late = run.stretch(16, None)
    assert late is not None
    run.cut_off(32)
    assert sorting.IdRange(None, 32, table.schema, (run.stretch(None, 32),)).rows().equals(table[:32])
    with pytest.raises(OSError, match="cut off"):
        late.read(table.schema)
    assert run.stretch(-5, 0) is None


def test_blocks_can_be_read_again_and_side_by_side(pool: ThreadPoolExecutor, tmp_path: Path) -> None:
    found = sort_ids(list(range(300))[::-1], tmp_path, pool)
    first, second = found.blocks(70), found.blocks(110)
    assert [len(a) + len(b) for a, b in zip(first, second, strict=False)] == [180, 180, 150]
    assert rows_of(found).equals(rows_of(found))


@pytest.mark.parametrize("order", [1, -1])
def test_only_the_wanted_columns_are_read(pool: ThreadPoolExecutor, tmp_path: Path, order: int) -> None:
    found = sort_ids(list(range(120))[::order], tmp_path, pool)
    for block in found.blocks(50, ["example_id", "losses"]):
        assert block.column_names == ["example_id", "losses"]
    assert rows_of(found, columns=["row"])["row"].to_pylist() == list(range(120))[::order]
    in_memory = SortedTable.of(rows_of(found))
    assert rows_of(in_memory, columns=["losses"]).equals(rows_of(found, columns=["losses"]))
    assert rows_of(in_memory).equals(rows_of(found))


def test_finish_adds_columns_to_sorted_rows(pool: ThreadPoolExecutor, tmp_path: Path) -> None:
    def finish(table: pa.Table) -> pa.Table:
        assert is_ascending(table["example_id"].combine_chunks())
        return table.append_column("double", pc.multiply(table["example_id"], 2))

    ids = np.random.default_rng(1).permutation(400)
    found = rows_of(sort_by_id([table_of(ids.tolist())], tmp_path, pool, finish))
    assert found["double"].to_pylist() == list(range(0, 800, 2))


# --- what cannot be sorted -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("batches", [[], [table_of([])], [table_of([]), table_of([])]])
def test_no_rows_are_refused(pool: ThreadPoolExecutor, tmp_path: Path, batches: list[pa.Table]) -> None:
    with pytest.raises(DataError, match="no rows"):
        sort_by_id(batches, tmp_path, pool)


def test_empty_tables_between_others_do_not_matter(pool: ThreadPoolExecutor, tmp_path: Path) -> None:
    table = table_of([3, 1, 2])
    found = sort_by_id([table[:0], table[:2], table[:0], table[2:], table[:0]], tmp_path, pool)
    assert rows_of(found)["example_id"].to_pylist() == [1, 2, 3]


@given(
    ids=(numbered | texts | integers).filter(lambda ids: len(ids) > 2),
    twice=st.lists(st.integers(0, 199), min_size=1, max_size=3),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=80, deadline=None)
def test_an_id_that_occurs_twice_is_named_wherever_it_stands(
    pool: ThreadPoolExecutor, ids: list[Any], twice: list[int], seed: int
) -> None:
    repeated = {ids[row % len(ids)] for row in twice}
    both = [*ids, *repeated]
    order = np.random.default_rng(seed).permutation(len(both))
    with tempfile.TemporaryDirectory() as folder, pytest.raises(DataError, match="occurs more than once") as raised:
        sort_ids([both[row] for row in order], Path(folder), pool)
    named = str(raised.value).removeprefix("example_id occurs more than once: ").removesuffix(". Ids must be unique.")
    # In a run that has some they are named before the merge would find others.
    assert set(named.split(", ")) <= {repr(value) for value in repeated}


@pytest.mark.parametrize("ids", [["one", "one"], ["a"] * 200, [5] * 200, ["a", "bc", "bc"]])
def test_nothing_but_one_id_is_refused_by_its_name(pool: ThreadPoolExecutor, tmp_path: Path, ids: list[Any]) -> None:
    with pytest.raises(DataError, match=rf"occurs more than once: {ids[-1]!r}"):
        sort_ids(ids, tmp_path, pool)


@pytest.mark.parametrize("apart", [1, 40, 51, 300])
def test_duplicates_within_a_run_and_across_runs_are_refused(pool: ThreadPoolExecutor, tmp_path: Path, apart: int) -> None:
    ids = np.random.default_rng(2).permutation(400).tolist()
    ids.insert(10 + apart, ids[10])
    with pytest.raises(DataError, match=rf"occurs more than once: {ids[10]}\. Ids must be unique"):
        sort_ids(ids, tmp_path, pool)


def test_duplicates_at_the_border_of_two_ascending_runs_are_found(pool: ThreadPoolExecutor, tmp_path: Path) -> None:
    ids = [*range(RUN_ROWS), *range(RUN_ROWS - 1, 2 * RUN_ROWS)]
    with pytest.raises(DataError, match=f"once: {RUN_ROWS - 1}"):
        sort_ids(ids, tmp_path, pool)


def test_of_many_duplicates_a_few_are_named_and_all_counted(pool: ThreadPoolExecutor, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"once: 0, 1, 2, 3, 4 and 195 more\. Ids"):
        sort_ids([*range(200), *range(200)], tmp_path, pool)


def test_a_full_disk_is_an_oserror_and_not_a_short_table(
    pool: ThreadPoolExecutor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = pa.OSFile

    def full(path: str, mode: str = "r") -> Any:
        # Every write to this device fails as on a full disk.
        return opened("/dev/full" if mode == "wb" and path.endswith("00003.arrow") else path, mode)

    monkeypatch.setattr(sorting.pa, "OSFile", full)
    with pytest.raises(OSError, match="No space left") as raised:
        sort_ids(list(range(1_000))[::-1], tmp_path, pool)
    assert raised.value.errno == errno.ENOSPC


def test_what_a_thread_raises_reaches_the_caller(pool: ThreadPoolExecutor, tmp_path: Path) -> None:
    def finish(table: pa.Table) -> pa.Table:
        raise OSError(errno.ENOSPC, "no space")

    with pytest.raises(OSError, match="no space"):
        sort_by_id([table_of(list(range(500)))], tmp_path, pool, finish)


def test_results_come_in_order_and_few_items_are_read_ahead(pool: ThreadPoolExecutor) -> None:
    read: list[int] = []

    def items() -> Iterator[int]:
        for number in range(50):
            read.append(number)
            yield number

    for done, result in enumerate(in_order(pool, lambda number: number * number, items())):
        assert result == done * done
        assert len(read) <= done + 3


@given(
    st.lists(st.text(alphabet="ab\0é", min_size=0, max_size=12), max_size=40)
    | st.lists(st.text(alphabet="ab", min_size=17, max_size=17), max_size=40)
)
def test_ids_sorted_as_numbers_come_in_the_order_of_their_bytes_and_equal_ones_in_their_own(texts):
    ids = texts or ["x"]
    order = sorted(range(len(ids)), key=lambda row: ids[row].encode())
    assert id_order._ascending_order(pa.array(ids)).tolist() == order
    for kind in (pa.int64(), pa.uint64()):
        numbers = [len(one) // 3 + (2**63 - 99 if kind == pa.uint64() else -2) for one in ids]
        order = sorted(range(len(ids)), key=numbers.__getitem__)
        assert id_order._ascending_order(pa.array(numbers, kind)).tolist() == order
