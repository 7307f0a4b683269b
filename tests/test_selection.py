"""Selection: exact budgets, equal shares, one order, and the rows as they were."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from s2l_ray.clustering.stage import cluster, publish_clustering
from s2l_ray.config import ClusteringConfig, GroupingConfig, SelectionConfig
from s2l_ray.errors import ConfigError, DataError
from s2l_ray.examples.ids import priorities
from s2l_ray.selection.choosing import select_rows
from s2l_ray.selection.quotas import selection_order, water_fill
from s2l_ray.selection.stage import publish_selection, read_selection, select
from s2l_ray.storage.artifacts import Artifact, Key
from s2l_ray.storage.drafts import Draft
from s2l_ray.storage.places import Storage
from s2l_ray.trajectories.files import fetch_rows, open_trajectories

sizes_of_groups = st.lists(st.integers(1, 40), min_size=1, max_size=12)


def by_the_book(sizes: list[int], budget: int) -> list[int]:
    """METHOD's algorithm, word by word: visit ascending by (size, id); share = floor(remaining / groups left)."""
    quotas = [0] * len(sizes)
    waiting = sorted((size, cluster_id) for cluster_id, size in enumerate(sizes))
    while waiting:
        size, cluster_id = waiting[0]
        share = (budget - sum(quotas)) // len(waiting)
        quotas[cluster_id] = size if size <= share else share
        waiting = waiting[1:]
    return quotas


def rows_of(sizes: list[int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Shuffled rows of groups of these sizes, with priorities that often tie."""
    rng = np.random.default_rng(seed)
    cluster_ids = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    return cluster_ids, rng.integers(0, 50, len(cluster_ids)).astype(np.uint64)


def counts(cluster_ids: np.ndarray, rows: np.ndarray, num_clusters: int) -> list[int]:
    return np.bincount(cluster_ids[rows], minlength=num_clusters).tolist()


@pytest.mark.parametrize(
    ("sizes", "budget", "defer_up_to", "quotas"),
    [
        ([3, 10, 1, 6], 10, 0, [3, 3, 1, 3]),
        ([3, 10, 1, 6], 11, 0, [3, 4, 1, 3]),  # the remainder ends in the largest group
        ([3, 10, 1, 6], 15, 0, [3, 6, 1, 5]),
        ([3, 10, 1, 6], 20, 0, [3, 10, 1, 6]),
        ([3, 10, 1, 6], 99, 0, [3, 10, 1, 6]),
        ([3, 10, 1, 6], 2, 0, [0, 1, 0, 1]),  # fewer than groups: the larger ones
        ([5, 5, 5], 7, 0, [2, 2, 3]),  # of equal groups the larger id
        ([2, 7, 1, 4], 8, 2, [0, 4, 0, 4]),  # groups of at most 2 wait
        ([2, 7, 1, 4], 12, 2, [1, 7, 0, 4]),
        ([2, 7, 1, 4], 13, 2, [1, 7, 1, 4]),
        ([0, 4], 3, 0, [0, 3]),
        ([], 3, 0, []),
    ],
)
def test_quotas_as_computed_by_hand(sizes: list[int], budget: int, defer_up_to: int, quotas: list[int]) -> None:
    assert water_fill(sizes, budget, defer_up_to=defer_up_to).tolist() == quotas


def test_a_negative_budget_is_refused() -> None:
    with pytest.raises(ConfigError, match="must be above 0, found -1"):
        water_fill([1, 2], -1)


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=60), st.integers(0, 20_000))
@settings(max_examples=300, deadline=None)
def test_water_filling_is_the_methods_and_meets_the_budget_exactly(sizes: list[int], budget: int) -> None:
    quotas = water_fill(sizes, budget)
    assert quotas.tolist() == by_the_book(sizes, budget)
    assert quotas.sum() == min(budget, sum(sizes))


@given(st.lists(st.integers(0, 6), min_size=1, max_size=30), st.integers(0, 100), st.integers(0, 6))
@settings(max_examples=300, deadline=None)
def test_deferred_groups_get_what_the_others_leave(sizes: list[int], budget: int, defer_up_to: int) -> None:
    quotas = water_fill(sizes, budget, defer_up_to=defer_up_to).tolist()
    served = [i for i, size in enumerate(sizes) if size > defer_up_to]
    waiting = [i for i, size in enumerate(sizes) if size <= defer_up_to]
    first = by_the_book([sizes[i] for i in served], budget)
    rest = by_the_book([sizes[i] for i in waiting], budget - sum(first))
    assert [quotas[i] for i in served] == first
    assert [quotas[i] for i in waiting] == rest


@given(sizes_of_groups, st.integers(1, 500), st.integers(0, 5), st.integers(0, 2**32))
@settings(max_examples=200, deadline=None)
def test_the_first_of_one_order_have_the_quotas_of_water_filling(sizes: list[int], budget: int, defer: int, seed: int) -> None:
    cluster_ids, ranks = rows_of(sizes, seed)
    rows = select_rows(cluster_ids, ranks, budget, defer_up_to=defer)
    assert counts(cluster_ids, rows, len(sizes)) == water_fill(sizes, budget, defer_up_to=defer).tolist()
    assert (np.diff(rows) > 0).all()
    for cluster_id in range(len(sizes)):
        members = np.flatnonzero(cluster_ids == cluster_id)
        best = sorted(members, key=lambda row: (ranks[row], row))[: (cluster_ids[rows] == cluster_id).sum()]
        assert sorted(best) == rows[cluster_ids[rows] == cluster_id].tolist()


@given(st.lists(sizes_of_groups, min_size=1, max_size=5), st.integers(1, 800), st.integers(0, 5), st.integers(0, 2**32))
@settings(max_examples=200, deadline=None)
def test_with_strata_water_filling_runs_over_strata_and_then_groups(
    strata: list[list[int]], budget: int, defer: int, seed: int
) -> None:
    cluster_ids, ranks = rows_of([size for sizes in strata for size in sizes], seed)
    strata_K = np.repeat(np.arange(len(strata)), [len(sizes) for sizes in strata])
    rows = select_rows(cluster_ids, ranks, budget, strata_K=strata_K, defer_up_to=defer)
    shares = by_the_book([sum(sizes) for sizes in strata], budget)
    quotas = [water_fill(sizes, share, defer_up_to=defer).tolist() for sizes, share in zip(strata, shares, strict=True)]
    assert counts(cluster_ids, rows, len(strata_K)) == [quota for group in quotas for quota in group]


def test_the_reference_codes_variant_as_computed_by_hand() -> None:
    """Strata of 12 and 34 rows share 20 as 10 and 10; groups of at most 2 wait inside their stratum."""
    cluster_ids, ranks = rows_of([1, 2, 9, 30, 4], seed=0)
    rows = select_rows(cluster_ids, ranks, 20, strata_K=np.array([0, 0, 0, 1, 1]), defer_up_to=2)
    assert counts(cluster_ids, rows, 5) == [0, 1, 9, 6, 4]


@given(sizes_of_groups, st.integers(1, 300), st.integers(0, 300), st.booleans(), st.integers(0, 2**32))
@settings(max_examples=100, deadline=None)
def test_a_smaller_budget_is_contained_in_a_larger_one(
    sizes: list[int], budget: int, more: int, stratified: bool, seed: int
) -> None:
    cluster_ids, ranks = rows_of(sizes, seed)
    strata_K = np.arange(len(sizes)) * 3 // len(sizes) if stratified else None
    small, large = (select_rows(cluster_ids, ranks, b, strata_K=strata_K, defer_up_to=2) for b in (budget, budget + more))
    assert set(small.tolist()) <= set(large.tolist())
    assert len(small) == min(budget, sum(sizes))


@given(sizes_of_groups, st.integers(1, 3000), st.integers(0, 2**32))
@settings(max_examples=100, deadline=None)
def test_a_budget_in_tokens_is_the_longest_prefix_that_fits(sizes: list[int], limit: int, seed: int) -> None:
    cluster_ids, ranks = rows_of(sizes, seed)
    tokens = np.random.default_rng(seed).integers(0, 30, len(cluster_ids)).astype(np.int32)
    order = selection_order(cluster_ids, ranks)
    fitting = [n for n in range(1, len(order) + 1) if tokens[order[:n]].sum() <= limit]
    if not fitting:
        with pytest.raises(ConfigError, match="fewer than the first example"):
            select_rows(cluster_ids, ranks, {"tokens": limit}, num_response_tokens_N=tokens)
        return
    rows = select_rows(cluster_ids, ranks, {"tokens": limit}, num_response_tokens_N=tokens)
    assert rows.tolist() == sorted(order[: max(fitting)].tolist())


def test_a_budget_in_tokens_needs_token_counts() -> None:
    with pytest.raises(ConfigError, match="needs the column num_response_tokens"):
        select(np.random.default_rng(0).random((9, 2)), budget={"tokens": 5}, num_clusters=2)


@given(st.integers(1, 99), st.integers(1, 5000))
@example(29, 100)  # 0.29 * 100 is 28.999999999999996 in binary
@settings(max_examples=200, deadline=None)
def test_a_fraction_is_rounded_down_exactly(percent: int, num_rows: int) -> None:
    rows = select_rows(np.zeros(num_rows, np.int32), np.arange(num_rows, dtype=np.uint64), percent / 100)
    assert len(rows) == max(1, int(Fraction(percent, 100) * num_rows))


def test_a_budget_above_the_pool_takes_everything_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="s2l_ray"):
        found = select(np.random.default_rng(0).random((50, 3)), budget=51, num_clusters=5)
    assert found.example_ids.to_pylist() == list(range(50))
    assert (found.weights_M == 1).all()
    assert "the budget of 51 examples is above the 50 there are" in caplog.text


@pytest.mark.parametrize("budget", [0, -3, -0.5, 0.0, 1.5, True, None, "many", {"tokens": 0}, {"words": 9}])
def test_a_budget_that_cannot_be_is_refused(budget: Any) -> None:
    with pytest.raises(ConfigError, match=r"selection.budget"):
        select(np.random.default_rng(0).random((50, 3)), budget=budget, num_clusters=5)


@pytest.mark.parametrize("losses", [[[1.0, 2.0], [np.nan, 1.0]], [[1.0, 2.0], [1.0]]])
def test_bad_losses_name_their_example(losses: Any) -> None:
    with pytest.raises(DataError, match="example_id 'b'"):
        select(losses, budget=1, num_clusters=1, example_ids=["a", "b"])


def test_rare_kinds_of_learning_get_their_share() -> None:
    rng = np.random.default_rng(1)
    curves = np.array([[5.0, 4.9, 4.8], [5.0, 1.0, 0.2], [1.0, 0.9, 0.9]])
    kinds = np.repeat([0, 1, 2], [900, 80, 20])
    losses = curves[kinds] + rng.normal(0, 0.05, (1000, 3))
    found = select(losses, budget=100, num_clusters=3)
    rows = found.example_ids.to_numpy()
    assert np.bincount(kinds[rows]).tolist() == [40, 40, 20]
    assert sorted(zip(found.sizes_K.tolist(), found.quotas_K.tolist(), strict=True)) == [(20, 20), (80, 40), (900, 40)]
    assert np.allclose(found.weights_M, np.array([900 / 40, 2, 1])[kinds[rows]])
    assert found.weights_M.sum() == pytest.approx(1000)


def test_the_selection_is_that_of_clustering_and_then_select_rows() -> None:
    losses = np.random.default_rng(2).random((2_000, 4))
    ids = [f"e{row}" for row in range(2_000)]
    sources = ["web" if row % 3 else "code" for row in range(2_000)]
    found = select(losses, budget=0.1, num_clusters=8, seed=4, stratify_by=sources, example_ids=ids, defer_groups_up_to=2)
    groups = cluster(losses, num_clusters=8, seed=4, strata=sources, example_ids=ids)
    own = priorities(groups.example_ids, 4)
    rows = select_rows(groups.cluster_ids_N, own, 200, strata_K=groups.strata_K, defer_up_to=2)
    assert found.example_ids.equals(groups.example_ids.take(pa.array(rows)))
    assert np.bincount((found.cluster_ids_M >= 8).astype(int)).tolist() == [100, 100]


def corpus(num_rows: int = 600, **columns: Any) -> pa.Table:
    rng = np.random.default_rng(5)
    base = {
        "example_id": [f"row-{row:04d}" for row in range(num_rows)],
        "text": [f"text {row}" for row in range(num_rows)],
        "losses": rng.gamma(2, 1, (num_rows, 4)).tolist(),
        "source": ["web" if row % 5 else "code" for row in range(num_rows)],
        "num_response_tokens": rng.integers(1, 50, num_rows),
    }
    return pa.table(base | columns)


def random_rows(ids: Any, count: int, seed: int) -> list[int]:
    """The random control by the book: the lowest priorities under its own seed."""
    return sorted(np.argsort(priorities(ids, f"random-{seed}"), kind="stable")[:count].tolist())


def whole(rows: Callable[[pa.Array], pa.Table]) -> Any:
    """A corpus's `fetch_rows` from a function that gives all wanted rows in the order of the ids."""

    def fetch(ids: pa.Array, _numbers: Any) -> Iterator[pa.Table]:
        yield pa.table({"example_id": ids, "row": rows(ids).to_struct_array()})

    return fetch


def built(
    folder: Path,
    uri: str,
    fetch: Any = None,
    random_control: bool = True,
    stratify_by: str | None = None,
    num_clusters: int = 7,
    **recipe: Any,
) -> Artifact:
    config = SelectionConfig(**({"budget": 60} | recipe))
    grouping = ClusteringConfig(num_clusters=num_clusters, stratify_by=stratify_by)
    scratch = folder / "scratch"
    with ThreadPoolExecutor(2) as pool:
        store = open_trajectories(uri, scratch / "store", pool, stratify_by=stratify_by, seed=0)
    draft = Draft.open(Storage(str(folder)), Key("clustering", 1, grouping.model_dump(), {}))
    groups = publish_clustering(grouping, GroupingConfig(), store, scratch, draft)
    draft = Draft.open(Storage(str(folder)), Key("selection", 1, config.model_dump(), {}))
    fetch = fetch or partial(fetch_rows, uri)
    return publish_selection(config, store, groups, fetch, scratch, draft, random_control=random_control)


def test_selected_rows_are_the_corpus_columns_as_they_were_and_ours(tmp_path: Path) -> None:
    pq.write_table(corpus(), tmp_path / "t.parquet")
    artifact = built(tmp_path, str(tmp_path / "t.parquet"))
    table = artifact.read_table("selected.parquet")
    assert table.column_names == ["example_id", "text", "source", "num_response_tokens", "cluster_id", "weight"]
    ids = table["example_id"].to_pylist()
    assert ids == sorted(ids)
    assert table["text"].to_pylist() == [f"text {int(i[4:])}" for i in ids]
    selection = read_selection(artifact)
    assert selection.example_ids.to_pylist() == ids
    summary = artifact.summary
    assert summary["rows"] == len(table) == sum(summary["quotas"]) == 60
    assert summary["pool"] == sum(summary["sizes"]) == 600
    control = artifact.read_table("random.parquet")
    assert set(control["weight"].to_pylist()) == {10.0}
    assert control["example_id"].to_pylist() == [f"row-{row:04d}" for row in random_rows(corpus()["example_id"], 60, 0)]
    assert summary["budgets"] == [{"budget": 60, "rows": 60, "file": "selected.parquet"}]
    for name, pool in (("web", 480), ("code", 120)):
        picked = [rows["source"].to_pylist().count(name) for rows in (table, control)]
        assert summary["sources"][name] == {"pool": pool, "selected": picked[0], "random": picked[1]}
    assert summary["num_response_tokens"]["selected"] == sum(table["num_response_tokens"].to_pylist())


def test_no_random_control_unless_asked_for(tmp_path: Path) -> None:
    pq.write_table(corpus().drop_columns(["source", "num_response_tokens"]), tmp_path / "t.parquet")
    artifact = built(tmp_path, str(tmp_path / "t.parquet"), random_control=False)
    assert list(artifact.manifest["files"]) == ["README.md", "selected.parquet"]
    assert artifact.summary["sources"] == {}
    assert artifact.summary["num_response_tokens"] == {"pool": None, "selected": None, "random": None}


def test_our_columns_are_underscored_where_the_corpus_has_their_names(tmp_path: Path) -> None:
    table = corpus(weight=[0.5] * 600, cluster_id=["mine"] * 600)
    pq.write_table(table, tmp_path / "t.parquet")
    artifact = built(tmp_path, str(tmp_path / "t.parquet"))
    found = artifact.read_table("selected.parquet")
    assert found.column_names[-4:] == ["weight", "cluster_id", "_cluster_id", "_weight"]
    assert found.column_names[0] == "example_id"
    assert set(found["weight"].to_pylist()) == {0.5}
    assert len(read_selection(artifact)) == 60


def test_a_corpus_with_other_example_ids_keeps_them_beside_ours(tmp_path: Path) -> None:
    pq.write_table(corpus(), tmp_path / "t.parquet")

    def rows(ids: pa.Array) -> pa.Table:
        return pa.table({"example_id": [f"theirs-{i}" for i in ids.to_pylist()], "_example_id": [1] * len(ids)})

    artifact = built(tmp_path, str(tmp_path / "t.parquet"), whole(rows))
    found = artifact.read_table("selected.parquet")
    assert found.column_names == ["example_id", "_example_id", "__example_id", "cluster_id", "weight"]
    assert found["example_id"].to_pylist() == [f"theirs-{i}" for i in found["__example_id"].to_pylist()]
    assert read_selection(artifact).example_ids.to_pylist() == found["__example_id"].to_pylist()


def test_a_corpus_without_example_ids_gets_ours(tmp_path: Path) -> None:
    pq.write_table(corpus(), tmp_path / "t.parquet")
    artifact = built(tmp_path, str(tmp_path / "t.parquet"), whole(lambda ids: pa.table({"prompt": ids})))
    found = artifact.read_table("selected.parquet")
    assert found.column_names == ["prompt", "example_id", "cluster_id", "weight"]
    assert found["prompt"].equals(found["example_id"])


def test_narrow_integer_ids_written_by_pandas_stay_as_they_were(tmp_path: Path) -> None:
    frame = corpus(example_id=pa.array(range(600), pa.int16())).to_pandas()
    frame.sample(frac=1, random_state=0).to_parquet(tmp_path / "t.parquet")
    artifact = built(tmp_path, str(tmp_path / "t.parquet"))
    found = artifact.read_table("selected.parquet")
    assert found.schema.field("example_id").type == pa.int16()
    assert "_example_id" not in found.column_names
    assert read_selection(artifact).example_ids.type == pa.int64()


def test_shuffled_and_recut_parts_give_the_same_bytes(tmp_path: Path) -> None:
    table = corpus(tag=pa.array(["x", None, "y"] * 200).dictionary_encode())
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    pq.write_table(table, tmp_path / "a" / "whole.parquet")
    shuffled = table.take(pa.array(np.random.default_rng(6).permutation(600)))
    for part, (start, stop) in enumerate(((0, 7), (7, 400), (400, 600))):
        piece = shuffled.slice(start, stop - start).replace_schema_metadata({"pandas": f"index of part {part}"})
        pq.write_table(piece, tmp_path / "b" / f"{part}.parquet", row_group_size=100)
    found = [built(tmp_path / f"run-{name}", str(tmp_path / name)) for name in "ab"]
    for path in ("selected.parquet", "random.parquet"):
        assert found[0].read_bytes(path) == found[1].read_bytes(path)
    assert found[0].fingerprint == found[1].fingerprint


def test_strata_of_the_clustering_are_those_of_the_selection(tmp_path: Path) -> None:
    table = corpus()
    pq.write_table(table, tmp_path / "t.parquet")
    artifact = built(
        tmp_path, str(tmp_path / "t.parquet"), stratify_by="source", num_clusters=5, budget=300, random_control=False
    )
    assert artifact.summary["sources"] == {
        "code": {"pool": 120, "selected": 120, "random": None},
        "web": {"pool": 480, "selected": 180, "random": None},
    }


def test_a_clustering_of_other_examples_is_refused(tmp_path: Path) -> None:
    pq.write_table(corpus(60), tmp_path / "t.parquet")
    pq.write_table(corpus(60, example_id=[f"another-{row:04d}" for row in range(60)]), tmp_path / "other.parquet")
    built(tmp_path / "run", str(tmp_path / "t.parquet"), budget=3)
    groups = Artifact.read(Storage(str(tmp_path / "run" / "clustering")))
    draft = Draft.open(Storage(str(tmp_path / "else")), Key("selection", 1, {}, {}))
    with ThreadPoolExecutor(2) as pool:
        store = open_trajectories(str(tmp_path / "other.parquet"), tmp_path / "scratch", pool)
    with pytest.raises(DataError, match="other examples"):
        publish_selection(SelectionConfig(budget=3), store, groups, whole(lambda ids: ids), tmp_path / "more", draft)


def test_long_texts_are_sorted_in_pieces_and_come_out_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(7)
    table = corpus(example_id=[f"row-{row:04d}" for row in rng.permutation(600)])
    table = table.set_column(1, "text", pa.array([f"{i} {'long ' * int(n)}" for i, n in enumerate(rng.integers(1, 900, 600))]))
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=50)
    whole = built(tmp_path / "whole", str(tmp_path / "t.parquet"), budget=400).read_table("selected.parquet")
    for module in ("trajectories.sorting.RUN_BYTES", "selection.subset_rows._BLOCK_BYTES"):
        monkeypatch.setattr(f"s2l_ray.{module}", 50_000)
    cut = built(tmp_path / "cut", str(tmp_path / "t.parquet"), budget=400).read_table("selected.parquet")
    assert cut.equals(whole)
    texts = dict(zip(table["example_id"].to_pylist(), table["text"].to_pylist(), strict=True))
    assert [texts[i] for i in cut["example_id"].to_pylist()] == cut["text"].to_pylist()


def test_with_a_minimum_per_source_weights_count_what_each_example_stands_for() -> None:
    rng = np.random.default_rng(8)
    sources = np.where(np.arange(20_000) < 100, "rare", "common")
    found = select(rng.random((20_000, 3)), budget=1_000, num_clusters=10, sources=sources, min_per_source=100)
    rare = np.isin(found.example_ids.to_numpy(), np.arange(100))
    assert rare.sum() == 100
    assert found.weights_M.sum() == pytest.approx(20_000)
    assert found.weights_M[rare].sum() == pytest.approx(100)
    without = select(rng.random((20_000, 3)), budget=1_000, num_clusters=10, sources=sources)
    assert without.weights_M.sum() == pytest.approx(20_000)


# --- rows of JSON, as they were written ----------------------------------------------------------------------------


def written(texts: Callable[[str], str], **columns: Callable[[str], Any]) -> Any:
    """A corpus's `fetch_rows` with the JSON text of every row by its id."""

    def fetch(ids: pa.Array, _numbers: Any) -> Iterator[pa.Table]:
        names = ids.to_pylist()
        rows = pa.table({"key": ids} | {name: [value(one) for one in names] for name, value in columns.items()})
        table = pa.table({"example_id": ids, "row": rows.to_struct_array(), "row_json": [texts(one) for one in names]})
        for start in (100, 0):  # the order of the corpus is another than that of the ids
            yield table[start : start + 100] if start == 0 else table[start:]

    return fetch


def test_rows_of_json_come_out_as_they_were_written_in_the_order_of_the_parquet_file(tmp_path: Path) -> None:
    def text(key: str) -> str:
        extra = {0: ', "n": 3', 1: ', "n": 3.0, "meta": {}', 2: ', "n": null'}[int(key[4:]) % 3]
        return f' {{"text": "é 城\\u0041", "key":"{key}"{extra}}}\n'

    pq.write_table(corpus(), tmp_path / "t.parquet")
    artifact = built(tmp_path, str(tmp_path / "t.parquet"), written(text), more_budgets=[20])
    for subset in ("selected", "selected-20", "random"):
        ids = artifact.read_table(f"{subset}.parquet")["key"].to_pylist()
        lines = artifact.read_bytes(f"{subset}.jsonl").decode().split("\n")
        assert lines == [*(text(key).strip() for key in ids), ""], subset
    assert len(artifact.read_bytes("selected-20.jsonl").splitlines()) == 20


def test_rows_that_json_readers_refuse_are_made_strict_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    texts = {
        0: '{"a": NaN, "b": [-Infinity, {"NaN": Infinity}], "c": "NaN and \\"Infinity\\" \\\\", "d": 1e400}',
        1: '{"a": "NaN"}',
        2: '{\n  "a": "two\\nlines",\r\n  "b": [\n  1]\n}',
    }
    wanted = {
        0: '{"a": null, "b": [null, {"NaN": null}], "c": "NaN and \\"Infinity\\" \\\\", "d": 1e400}',
        1: '{"a": "NaN"}',
        2: '{ "a": "two\\nlines", "b": [ 1] }',
    }
    pq.write_table(corpus(), tmp_path / "t.parquet")
    fetch = written(lambda key: texts[int(key[4:]) % 3])
    artifact = built(tmp_path, str(tmp_path / "t.parquet"), fetch, random_control=False)
    numbers = [int(key[4:]) % 3 for key in artifact.read_table("selected.parquet")["key"].to_pylist()]
    assert artifact.read_bytes("selected.jsonl").decode().splitlines() == [wanted[number] for number in numbers]
    assert f"selected.jsonl: {numbers.count(0)} of 60 rows have NaN or infinite numbers" in caplog.text


def test_a_corpus_that_is_only_in_part_of_json_has_no_file_as_it_was_written(tmp_path: Path) -> None:
    pq.write_table(corpus(), tmp_path / "t.parquet")
    fetch = written(lambda key: '{"a": 1}' if int(key[4:]) % 50 else None)
    artifact = built(tmp_path, str(tmp_path / "t.parquet"), fetch, random_control=False, budget=600)
    assert "selected.jsonl" not in artifact.manifest["files"]
