"""Choosing in a stream: the rows that METHOD's algorithm gives, with memory for little more than those."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from s2l_ray import cli
from s2l_ray.errors import ConfigError
from s2l_ray.examples.ids import priorities
from s2l_ray.selection import choosing
from s2l_ray.selection.choosing import choose, select_rows
from s2l_ray.selection.quotas import Sharing
from s2l_ray.selection.stage import read_selection, select
from s2l_ray.storage.artifacts import Artifact
from s2l_ray.storage.places import Storage

# --- METHOD, step 4, by the book and one row at a time ----------------------------------------------------------------


def water_filling(sizes: dict[Any, int], budget: int) -> dict[Any, int]:
    """Visit the groups by (size, id) ascending; each gets floor(remaining / groups left) or all it has."""
    taken: dict[Any, int] = {}
    for visited, (size, name) in enumerate(sorted((size, name) for name, size in sizes.items())):
        taken[name] = min(size, (budget - sum(taken.values())) // (len(sizes) - visited))
    return taken


def book_rows(groups: list[int], ranks: list[int], strata: list[int] | None, budget: int, defer: int) -> set[int]:
    """The rows of a subset: the budget over strata, in each over its groups (deferred ones last), then lowest priorities."""
    members: dict[int, list[int]] = {}
    for row, cluster_id in enumerate(groups):
        members.setdefault(cluster_id, []).append(row)
    stratum_of = {cluster_id: strata[cluster_id] if strata else 0 for cluster_id in members}
    totals: dict[int, int] = {}
    for cluster_id, rows in members.items():
        totals[stratum_of[cluster_id]] = totals.get(stratum_of[cluster_id], 0) + len(rows)
    chosen: set[int] = set()
    for stratum, share in water_filling(totals, budget).items():
        sizes = {cluster_id: len(rows) for cluster_id, rows in members.items() if stratum_of[cluster_id] == stratum}
        served = water_filling({name: size for name, size in sizes.items() if size > defer}, share)
        late = {name: size for name, size in sizes.items() if size <= defer}
        served |= water_filling(late, share - sum(served.values()))
        for cluster_id, quota in served.items():
            chosen |= set(sorted(members[cluster_id], key=lambda row: (ranks[row], row))[:quota])
    return chosen


def book_order(groups: list[int], ranks: list[int], strata: list[int] | None, defer: int) -> list[int]:
    """The one order: (rank inside the group, larger group first, larger id first), deferred groups last; over strata again."""
    sizes = np.bincount(groups).tolist()
    seen = dict.fromkeys(range(len(sizes)), 0)
    place = {}
    for row in sorted(range(len(groups)), key=lambda row: (ranks[row], row)):
        cluster_id = groups[row]
        place[row] = (sizes[cluster_id] <= defer, seen[cluster_id], -sizes[cluster_id], -cluster_id)
        seen[cluster_id] += 1
    order = sorted(place, key=place.__getitem__)
    if strata is None:
        return order
    stratum_of = {row: strata[groups[row]] for row in order}
    totals = np.bincount(list(stratum_of.values())).tolist()
    turn = dict.fromkeys(range(len(totals)), 0)
    for row in order:
        stratum = stratum_of[row]
        place[row] = (turn[stratum], -totals[stratum], -stratum)  # type: ignore[assignment]
        turn[stratum] += 1
    return sorted(order, key=place.__getitem__)


def with_minimum(order: list[int], ranks: list[int], sources: list[int], minimum: int) -> tuple[list[int], int]:
    """The order with each source's lowest priorities before all others, and how many those are."""
    counts: dict[int, int] = {}
    first = set()
    for row in sorted(order, key=lambda row: (ranks[row], row)):
        counts[sources[row]] = counts.get(sources[row], 0) + 1
        if counts[sources[row]] <= minimum:
            first.add(row)
    return [row for row in order if row in first] + [row for row in order if row not in first], len(first)


# --- pools ---------------------------------------------------------------------------------------------------------


class Pool:
    """Rows with groups, strata, sources, tokens and priorities, given out in blocks."""

    def __init__(self, sizes: list[int], seed: int, uniform: bool = True, num_strata: int = 0, num_sources: int = 3) -> None:
        rng = np.random.default_rng(seed)
        self.sizes_K = np.array(sizes)
        self.groups = rng.permutation(np.repeat(np.arange(len(sizes)), sizes)).astype(np.int32)
        count = len(self.groups)
        # As priorities are, or few enough to tie often.
        self.ranks = rng.integers(0, 2**64, count, np.uint64) if uniform else rng.integers(0, 20, count).astype(np.uint64)
        self.strata_K = rng.integers(0, num_strata, len(sizes)) if num_strata else None
        self.sources = rng.choice(num_sources, count, p=np.arange(1, num_sources + 1) / sum(range(1, num_sources + 1)))
        self.sizes_S = np.bincount(self.sources, minlength=num_sources)
        self.tokens = rng.integers(0, 30, count).astype(np.int32)
        self.num_calls = 0

    def blocks(self, cuts: list[int] | None = None) -> Iterator[pa.Table]:
        self.num_calls += 1
        columns = {"cluster_id": self.groups, "priority": self.ranks, "source": self.sources.astype(np.int32)}
        table = pa.table(columns | {"num_response_tokens": self.tokens, "row": np.arange(len(self.groups))})
        stops = [*sorted(cut % (len(table) + 1) for cut in cuts or []), len(table)]
        for start, stop in zip([0, *stops], stops, strict=False):
            yield table[start:stop].combine_chunks()

    def choose(self, budgets: list[Any], cuts: list[int] | None = None, defer: int = 0, minimum: int = 0) -> list[list[int]]:
        options: dict[str, Any] = {"sizes_S": self.sizes_S, "min_per_source": minimum} if minimum else {}
        sharing = Sharing(self.sizes_K, self.strata_K, defer_up_to=defer)
        tables = choose(lambda function: map(function, self.blocks(cuts)), sharing, budgets, **options)
        return [table["row"].to_pylist() for table in tables]

    def book(self, defer: int = 0) -> tuple[list[int], list[int], list[int] | None, int]:
        strata = None if self.strata_K is None else self.strata_K.tolist()
        return self.groups.tolist(), self.ranks.tolist(), strata, defer


small = st.builds(
    Pool,
    sizes=st.lists(st.integers(1, 15), min_size=1, max_size=8),
    seed=st.integers(0, 2**32 - 1),
    uniform=st.booleans(),
    num_strata=st.integers(0, 3),
)
# More rows than the cuts let through: what is left out must not be missed.
large = st.builds(
    Pool,
    sizes=st.lists(st.sampled_from([1, 2, 30, 400, 3_000]), min_size=1, max_size=6),
    seed=st.integers(0, 2**32 - 1),
    num_strata=st.integers(0, 3),
)
cuts_of_blocks = st.lists(st.integers(0, 20_000), max_size=5)


# --- by the book ---------------------------------------------------------------------------------------------------


@given(small, st.integers(1, 130), st.integers(0, 5))
@settings(max_examples=120, deadline=None)
def test_the_rows_are_those_of_water_filling_group_by_group(pool: Pool, budget: int, defer: int) -> None:
    groups, ranks, strata, _ = pool.book()
    expected = book_rows(groups, ranks, strata, budget, defer)
    [found] = pool.choose([budget], defer=defer)
    assert found == sorted(expected)
    assert len(found) == min(budget, len(groups))
    assert set(book_order(groups, ranks, strata, defer)[:budget]) == expected
    rows = select_rows(pool.groups, pool.ranks, budget, strata_K=pool.strata_K, defer_up_to=defer)
    assert rows.tolist() == found
    # Beside another budget it takes the same rows, by the order of all instead of the quotas alone.
    assert pool.choose([budget, 1], defer=defer)[0] == found


@given(large, st.floats(0.001, 0.9), st.integers(0, 40))
@settings(max_examples=40, deadline=None)
def test_what_the_cuts_leave_out_is_not_missed(pool: Pool, share: float, defer: int) -> None:
    groups, ranks, strata, _ = pool.book()
    budget = max(1, int(share * len(groups)))
    assert pool.choose([budget], defer=defer)[0] == sorted(book_rows(groups, ranks, strata, budget, defer))
    assert pool.num_calls == 1


@given(small, st.integers(1, 2_000), st.integers(0, 5), cuts_of_blocks)
@settings(max_examples=120, deadline=None)
def test_a_budget_in_tokens_takes_the_longest_prefix_of_the_order_that_fits(
    pool: Pool, limit: int, defer: int, cuts: list[int]
) -> None:
    order = book_order(*pool.book(defer))
    fitting = [count for count in range(1, len(order) + 1) if pool.tokens[order[:count]].sum() <= limit]
    if not fitting:
        with pytest.raises(ConfigError, match="fewer than the first example"):
            pool.choose([{"tokens": limit}], cuts, defer)
        return
    assert pool.choose([{"tokens": limit}], cuts, defer)[0] == sorted(order[: max(fitting)])


@given(large, st.floats(0.001, 1.2), cuts_of_blocks)
@settings(max_examples=25, deadline=None)
def test_a_budget_in_tokens_of_a_large_pool_is_met_too(pool: Pool, share: float, cuts: list[int]) -> None:
    limit = 30 + int(share * pool.tokens.sum())
    order = book_order(*pool.book())
    count = int(np.searchsorted(np.cumsum(pool.tokens[order]), limit, side="right"))
    assert pool.choose([{"tokens": limit}], cuts)[0] == sorted(order[:count])


def test_a_first_guess_of_tokens_that_was_too_low_is_corrected() -> None:
    pool = Pool([30_000, 10_000], seed=1)
    # Those that come first are short: many times as many fit as the mean says.
    pool.tokens = np.where(pool.ranks < 2**62, 3, 100).astype(np.int32)
    order = book_order(*pool.book())
    limit = int(pool.tokens[order[:5_000]].sum())
    assert pool.choose([{"tokens": limit}])[0] == sorted(order[:5_000])
    assert pool.num_calls > 2  # once to count the tokens, then once for each guess


@given(small, st.integers(1, 130), st.integers(1, 8), st.integers(0, 5), cuts_of_blocks)
@settings(max_examples=120, deadline=None)
def test_every_source_gets_its_minimum_and_the_rest_is_by_the_book(
    pool: Pool, budget: int, minimum: int, defer: int, cuts: list[int]
) -> None:
    ranks = pool.ranks.tolist()
    order, num_first = with_minimum(book_order(*pool.book(defer)), ranks, pool.sources.tolist(), minimum)
    if num_first > min(budget, len(order)):
        with pytest.raises(ConfigError, match=rf"min_per_source: .* {num_first:,} examples together, the budget {budget}"):
            pool.choose([budget], cuts, defer, minimum)
        return
    [found] = pool.choose([budget], cuts, defer, minimum)
    assert found == sorted(order[:budget])
    assert len(found) == min(budget, len(order))
    counts = np.bincount(pool.sources[found], minlength=3)
    assert (counts >= np.minimum(minimum, pool.sizes_S)).all()


@given(large.filter(lambda pool: len(pool.groups) > 400), st.integers(1, 100), st.floats(0, 0.5))
@settings(max_examples=25, deadline=None)
def test_minimums_in_a_large_pool_are_by_the_book_too(pool: Pool, minimum: int, share: float) -> None:
    order, num_first = with_minimum(book_order(*pool.book()), pool.ranks.tolist(), pool.sources.tolist(), minimum)
    budget = num_first + int(share * len(order))
    assert pool.choose([budget], [500, 900], 0, minimum)[0] == sorted(order[:budget])


def test_a_minimum_can_fill_a_token_budget_but_not_exceed_it() -> None:
    pool = Pool([200, 100], seed=2)
    pool.tokens[:] = 10
    order, num_first = with_minimum(book_order(*pool.book()), pool.ranks.tolist(), pool.sources.tolist(), 7)
    assert num_first == 21
    assert pool.choose([{"tokens": 219}], minimum=7)[0] == sorted(order[:21])
    with pytest.raises(ConfigError, match=r"21 examples together, the budget .* takes 20"):
        pool.choose([{"tokens": 209}], minimum=7)


@pytest.mark.parametrize("minimum", [0, 40])
def test_priorities_that_are_not_uniform_give_the_rows_of_the_book_all_the_same(minimum: int) -> None:
    pool = Pool([4_000, 1_000, 30], seed=3, num_sources=2)
    pool.ranks = pool.ranks // np.uint64(8) + np.uint64(7 * 2**61)  # all in the last eighth
    order = book_order(*pool.book())
    if minimum:
        order, _ = with_minimum(order, pool.ranks.tolist(), pool.sources.tolist(), minimum)
    assert pool.choose([90], minimum=minimum)[0] == sorted(order[:90])


def test_a_source_whose_priorities_are_all_high_gets_its_minimum_too() -> None:
    pool = Pool([4_000, 1_000], seed=3, num_sources=2)
    is_high = pool.sources == 0
    pool.ranks = np.where(is_high, pool.ranks // np.uint64(8) + np.uint64(7 * 2**61), pool.ranks)
    order, _ = with_minimum(book_order(*pool.book()), pool.ranks.tolist(), pool.sources.tolist(), 40)
    assert pool.choose([90], minimum=40)[0] == sorted(order[:90])


# --- streams and several budgets -----------------------------------------------------------------------------------


@given(small | large, st.lists(cuts_of_blocks, min_size=2, max_size=3), st.integers(0, 3))
@settings(max_examples=50, deadline=None)
def test_any_number_of_blocks_gives_the_same_rows(pool: Pool, cuts: list[list[int]], minimum: int) -> None:
    budgets: list[Any] = [max(len(pool.groups) // 3, 9 if minimum else 1), {"tokens": 400}]
    budgets = budgets[: 1 if minimum else 2]
    if min(len(pool.groups), budgets[0]) < np.minimum(minimum, pool.sizes_S).sum():
        return
    whole = pool.choose(budgets, None, 2, minimum)
    for one in cuts:
        assert pool.choose(budgets, one, 2, minimum) == whole


@given(small | large, st.lists(st.integers(1, 200), min_size=2, max_size=4), st.lists(st.integers(40, 3_000), max_size=2))
@settings(max_examples=60, deadline=None)
def test_of_several_budgets_one_contains_the_other_and_each_is_what_it_is_alone(
    pool: Pool, counts: list[int], tokens: list[int]
) -> None:
    budgets: list[Any] = [*counts, 0.25, *({"tokens": limit} for limit in tokens)]
    together = pool.choose(budgets, [100], 2)
    for budget, found in zip(budgets, together, strict=True):
        assert pool.choose([budget], None, 2) == [found]
    ordered = sorted(map(set, together), key=len)
    assert all(left <= right for left, right in itertools.pairwise(ordered))


def test_several_budgets_with_a_minimum_are_nested_too() -> None:
    pool = Pool([3_000, 500, 20], seed=4)
    budgets: list[Any] = [100, 400, 0.5]
    together = pool.choose(budgets, [77, 1_000], 0, 25)
    assert [pool.choose([budget], None, 0, 25)[0] for budget in budgets] == together
    assert set(together[0]) < set(together[1]) < set(together[2])
    assert list(map(len, together)) == [100, 400, 1_760]


def test_the_columns_that_come_along_are_those_of_the_chosen_rows() -> None:
    pool = Pool([300, 40], seed=5)
    [table] = choose(lambda function: map(function, pool.blocks([50, 51])), Sharing(pool.sizes_K), [60])
    rows = table["row"].to_numpy()
    assert (np.diff(rows) > 0).all()
    assert np.array_equal(table["priority"].to_numpy(), pool.ranks[rows])
    assert np.array_equal(table["num_response_tokens"].to_numpy(), pool.tokens[rows])


def test_rows_chosen_from_thousands_of_blocks_come_in_few_pieces() -> None:
    """With a piece for each block, the holes between the pieces took three times the memory of the rows."""
    rng = np.random.default_rng(8)
    count, block_rows = 400_000, 128
    table = pa.table({"cluster_id": rng.integers(0, 4, count, np.int32), "priority": rng.integers(0, 2**64, count, np.uint64)})
    blocks = [table[start : start + block_rows] for start in range(0, count, block_rows)]
    sizes_K = np.bincount(table["cluster_id"].to_numpy())
    [found] = choose(lambda function: map(function, blocks), Sharing(sizes_K), [0.5])
    assert len(found) == 200_000
    assert max(column.num_chunks for column in found.columns) <= 8


def test_one_hundredth_of_two_million_rows_is_chosen_with_less_than_three_hundredths_in_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(6)
    count, kept = 2_000_000, []
    groups = (rng.random(count) ** 3 * 100).astype(np.int32)  # some groups are ten times as large as others
    ranks = rng.integers(0, 2**64, count, np.uint64)
    below = choosing._below

    def counted(*arguments: Any) -> pa.Table:
        table = below(*arguments)
        kept.append(len(table))
        return table

    def blocks() -> Iterator[pa.Table]:
        for start in range(0, count, 65_536):
            stop = start + 65_536
            yield pa.table({"cluster_id": groups[start:stop], "priority": ranks[start:stop]})

    monkeypatch.setattr(choosing, "_below", counted)
    sizes_K = np.bincount(groups, minlength=100)
    begun = time.monotonic()
    [found] = choose(lambda function: map(function, blocks()), Sharing(sizes_K), [0.01])
    assert time.monotonic() - begun < 30
    assert len(found) == 20_000 <= sum(kept) < 0.03 * count
    quotas_K = np.bincount(found["cluster_id"].to_numpy(), minlength=100)
    assert quotas_K.tolist() == [water_filling(dict(enumerate(sizes_K.tolist())), 20_000)[k] for k in range(100)]
    for cluster_id in (0, 1, 50, 99):
        lowest = np.sort(ranks[groups == cluster_id])[: quotas_K[cluster_id]]
        assert set(found.filter(pa.array(found["cluster_id"].to_numpy() == cluster_id))["priority"].to_pylist()) == set(
            lowest.tolist()
        )


# --- what a user calls ---------------------------------------------------------------------------------------------


def test_select_by_python_gives_each_source_its_minimum_and_the_book_the_rest() -> None:
    rng = np.random.default_rng(7)
    losses = rng.gamma(2, 1, (3_000, 4))
    sources = np.where(rng.random(3_000) < 0.01, "rare", "web")
    found = select(
        losses, budget=200, num_clusters=9, seed=5, sources=sources, stratify_by=None, min_per_source=20, num_restarts=1
    )
    plain = select(losses, budget=200, num_clusters=9, seed=5, num_restarts=1)
    ranks = priorities(np.arange(3_000), 5)
    rare = np.flatnonzero(sources == "rare")
    first = set(rare[np.argsort(ranks[rare])][:20].tolist())
    assert first <= set(found.example_ids.to_pylist())
    assert len(found) == 200
    # What the minimum brought in went out at the end of the order.
    assert len(set(plain.example_ids.to_pylist()) - set(found.example_ids.to_pylist())) <= 20
    with pytest.raises(ConfigError, match=r"min_per_source: .* 40 examples together, the budget 39 takes 39"):
        select(losses, budget=39, num_clusters=9, sources=sources, min_per_source=20)
    with pytest.raises(ConfigError, match=r"min_per_source: these trajectories have no column source"):
        select(losses, budget=39, num_clusters=9, min_per_source=20)


def corpus(path: Path) -> Path:
    rng = np.random.default_rng(8)
    columns = {
        "example_id": [f"row-{row:04d}" for row in range(600)],
        "losses": rng.gamma(2, 1, (600, 4)).tolist(),
        "source": ["web" if row % 20 else "rare" for row in range(600)],
        "num_response_tokens": rng.integers(1, 50, 600),
    }
    pq.write_table(pa.table(columns), path)
    return path


def selected(output: Path, *arguments: Any) -> Artifact:
    """What `s2l select` wrote."""
    options = ["--num-clusters", 6, "--num-restarts", 1, "--output", output]
    result = CliRunner().invoke(cli.app, ["select", *map(str, [*arguments, *options])], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return Artifact.read(Storage(str(output / "selection")))


def test_two_budgets_write_two_nested_files_each_as_if_alone(tmp_path: Path) -> None:
    path = corpus(tmp_path / "t.parquet")
    both = selected(tmp_path / "both", path, "--budget", 60, "--budget", 0.2, "--budget", "tokens:500")
    files = {entry["file"]: entry for entry in both.summary["budgets"]}
    assert list(files) == ["selected.parquet", "selected-0.2.parquet", "selected-tokens-500.parquet"]
    tables = {file: both.read_table(file) for file in files}
    assert [len(table) for table in tables.values()] == [entry["rows"] for entry in files.values()]
    assert [entry["budget"] for entry in files.values()] == [60, 0.2, {"tokens": 500}]
    assert len(tables["selected.parquet"]) == 60
    assert len(tables["selected-0.2.parquet"]) == 120
    assert sum(tables["selected-tokens-500.parquet"]["num_response_tokens"].to_pylist()) <= 500
    ids = [set(table["example_id"].to_pylist()) for table in tables.values()]
    assert ids[2] < ids[0] < ids[1]
    for number, (budget, table) in enumerate(zip([60, 0.2, "tokens:500"], tables.values(), strict=True)):
        alone = selected(tmp_path / f"alone-{number}", path, "--budget", budget)
        assert alone.read_table("selected.parquet").equals(table)
        # Every group has rows in the subset, so that the weights stand for all of the pool.
        assert sum(table["weight"].to_pylist()) == pytest.approx(600)
    assert len(read_selection(both)) == 60


def test_the_same_budget_twice_is_one_file_more_and_no_error(tmp_path: Path) -> None:
    path = corpus(tmp_path / "t.parquet")
    artifact = selected(tmp_path / "out", path, "--budget", 60, "--budget", 60, "--budget", 60)
    assert {entry["rows"] for entry in artifact.summary["budgets"]} == {60}


def test_the_minimum_per_source_reaches_the_command_line(tmp_path: Path) -> None:
    path = corpus(tmp_path / "t.parquet")
    artifact = selected(tmp_path / "out", path, "--budget", 40, "--min-per-source", 15)
    counts = artifact.summary["sources"]
    assert counts["rare"]["selected"] >= 15
    assert counts["rare"]["selected"] + counts["web"]["selected"] == 40
