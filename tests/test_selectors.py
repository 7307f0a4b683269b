"""The other ways to choose: each against its definition in a few lines, in one order for all budgets, and what is refused."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s2l_ray.cli import app
from s2l_ray.clustering.stage import cluster_store
from s2l_ray.config import ClusteringConfig, SelectionConfig, parse_config
from s2l_ray.config.methods import MIN_POINTS, OF_S2L_ALONE, Method
from s2l_ray.errors import ConfigError, DataError
from s2l_ray.examples.ids import priorities
from s2l_ray.report.wording import verdict
from s2l_ray.selection.alone import select_trajectories
from s2l_ray.selection.export import export_subset
from s2l_ray.selection.stage import in_blocks, read_selection, select
from s2l_ray.selection.subsets import pool_of
from s2l_ray.selectors import S2L, SELECTORS, Pool
from s2l_ray.storage.artifacts import Artifact, Key
from s2l_ray.storage.drafts import Draft
from s2l_ray.storage.places import Storage
from s2l_ray.trajectories.loss_columns import trajectories_table
from s2l_ray.trajectories.measured import given_measurements
from s2l_ray.trajectories.store import Trajectories, TrajectoryStore

from .test_selection import built, by_the_book

OTHERS = [name for name in SELECTORS if name != S2L]
SAMPLES = [name for name in OTHERS if SELECTORS[name].strata is not None]
SCORES = [name for name in OTHERS if SELECTORS[name].strata is None]


class Corpus:
    """Rows with all that any selector reads, many of them equal in it."""

    def __init__(self, seed: int = 0, num_rows: int = 120, num_points: int = 3) -> None:
        rng = np.random.default_rng(seed)
        self.ids = rng.permutation(10 * num_rows)[:num_rows].tolist()
        self.losses = rng.integers(1, 12, (num_rows, num_points)).astype(np.float32) / 4
        self.sources = rng.choice(["books", "code", "web"], num_rows, p=[0.1, 0.2, 0.7]).tolist()
        self.tokens = rng.integers(1, 30, num_rows).tolist()
        self.without_prompt = rng.integers(1, 12, num_rows).astype(np.float32) / 4
        self.embedding = rng.normal(size=(num_rows, 4)).astype(np.float32)
        self.wanted = rng.normal(size=(3, 4)).astype(np.float32)
        self.ranks = dict(zip(self.ids, priorities(pa.array(self.ids), "random-0").tolist(), strict=True))

    def measurements(self) -> dict[str, Any]:
        return {
            "loss_without_prompt": self.without_prompt,
            "embedding": self.embedding,
            "validation_embedding": self.wanted,
        }

    def arguments(self) -> dict[str, Any]:
        return {
            "example_ids": self.ids,
            "sources": self.sources,
            "num_response_tokens": self.tokens,
            "measurements": self.measurements(),
            "num_clusters": 5,
        }

    def select(self, method: str, budget: Any, **options: Any) -> Any:
        return select(self.losses, budget=budget, method=method, **(self.arguments() | options))

    def shuffled(self, seed: int) -> Corpus:
        other = Corpus.__new__(Corpus)
        order = np.random.default_rng(seed).permutation(len(self.ids))
        other.ids, other.sources, other.tokens = (
            [column[i] for i in order] for column in (self.ids, self.sources, self.tokens)
        )
        other.losses, other.without_prompt = self.losses[order], self.without_prompt[order]
        other.embedding, other.wanted, other.ranks = self.embedding[order], self.wanted, self.ranks
        return other

    def pool(self, method: str, stratify_by: str | None = None, **options: Any) -> tuple[Pool, list[int]]:
        """What the selector sees, and the ids of its rows."""
        found = Trajectories.of(self.losses, self.ids, self.sources, self.tokens)
        given_ones = given_measurements(self.measurements(), self.ids, len(self.ids))
        plain = TrajectoryStore.of(found, 0)
        store = TrajectoryStore(plain.rows, plain.num_points, plain.names, 0, measurements=given_ones)
        groups = cluster_store(store, ClusteringConfig(num_clusters=5, stratify_by=stratify_by))
        config = SelectionConfig(budget=1, method=method, **options)
        pool, rows = pool_of(store, lambda: in_blocks(groups), groups, config, SELECTORS[method])
        return pool, rows["example_id"].to_pylist()

    def ordered(self, method: str, **options: Any) -> list[int]:
        pool, ids = self.pool(method, **options)
        return [ids[row] for row in SELECTORS[method].order(pool)]

    def by(self, key: Any) -> list[int]:
        """Ids in order of a key of the row's number, and of its priority where keys are equal."""
        return [self.ids[i] for i in sorted(range(len(self.ids)), key=lambda i: (key(i), self.ranks[self.ids[i]]))]


def chosen(selection: Any) -> list[int]:
    return selection.example_ids.to_pylist()


# --- all of them ---------------------------------------------------------------------------------------------------


def test_the_config_knows_every_selector_and_no_other() -> None:
    assert set(get_args(Method)) == set(SELECTORS)


@pytest.mark.parametrize("method", SELECTORS)
def test_a_selector_says_what_it_does_and_where_it_comes_from(method: str) -> None:
    known = SELECTORS[method]
    assert 20 < len(known.about) < 200
    assert not known.paper or re.fullmatch(r"\d{4}\.\d{5}", known.paper)
    assert known.paper or known.strata, "what goes by scores has a paper"
    assert known.is_target_aware == (method == "rds_plus")


@pytest.mark.parametrize("method", SELECTORS)
@given(seed=st.integers(0, 2**32), num_rows=st.integers(12, 60))
@settings(max_examples=15, deadline=None)
def test_an_order_has_every_row_once(method: str, seed: int, num_rows: int) -> None:
    order = Corpus(seed, num_rows).pool(method)[0]
    assert sorted(SELECTORS[method].order(order).tolist()) == list(range(num_rows))


@pytest.mark.parametrize("method", SELECTORS)
def test_a_smaller_budget_is_the_beginning_of_a_larger_one(method: str) -> None:
    corpus = Corpus()
    order = corpus.ordered(method)
    for budget in (1, 7, 40, 119, 120):
        assert chosen(corpus.select(method, budget, stratify_by=None)) == sorted(order[:budget])


@pytest.mark.parametrize("method", SELECTORS)
def test_the_order_of_the_rows_decides_nothing(method: str) -> None:
    corpus = Corpus()
    one, other = corpus.select(method, 30), corpus.shuffled(1).select(method, 30)
    assert chosen(one) == chosen(other)
    assert one.weights_M.tolist() == other.weights_M.tolist()
    assert one.cluster_ids_M.tolist() == other.cluster_ids_M.tolist()


@pytest.mark.parametrize("method", OTHERS)
def test_a_budget_in_tokens_is_the_longest_beginning_that_fits(method: str) -> None:
    corpus = Corpus()
    of_id, total, expected = dict(zip(corpus.ids, corpus.tokens, strict=True)), 0, []
    for one in corpus.ordered(method):
        total += of_id[one]
        if total > 300:
            break
        expected.append(one)
    assert chosen(corpus.select(method, {"tokens": 300}, stratify_by=None)) == sorted(expected)


@pytest.mark.parametrize("method", SCORES)
def test_what_goes_by_scores_estimates_nothing_and_has_weight_one(method: str) -> None:
    assert set(Corpus().select(method, 30).weights_M) == {1.0}


@pytest.mark.parametrize("method", SAMPLES)
def test_a_sample_weighs_by_its_strata_so_that_all_of_it_is_the_pool(method: str) -> None:
    corpus = Corpus()
    assert corpus.select(method, 110).weights_M.sum() == pytest.approx(120)
    assert set(corpus.select(method, 120).weights_M) == {1.0}


@pytest.mark.parametrize("method", ["random", "source_proportional", "source_balanced", "source_matched", "final_loss_strata"])
def test_with_its_weights_a_sample_estimates_the_pools_mean_loss(method: str) -> None:
    corpus = Corpus(num_rows=300)
    values = dict(zip(corpus.ids, corpus.losses.mean(axis=1).tolist(), strict=True))
    found = []
    for seed in range(40):
        sample = corpus.select(method, 60, seed=seed, num_restarts=1)
        found.append(sum(w * values[i] for w, i in zip(sample.weights_M, chosen(sample), strict=True)) / 300)
    error = np.std(found, ddof=1) / np.sqrt(len(found))
    assert abs(np.mean(found) - np.mean(list(values.values()))) < 3.5 * error


# --- each by its definition ----------------------------------------------------------------------------------------


def test_random_goes_by_priority_alone() -> None:
    corpus = Corpus()
    assert corpus.ordered("random") == corpus.by(lambda _: 0)


@pytest.mark.parametrize("method", ["source_balanced", "source_proportional"])
def test_sources_have_equal_shares_or_those_of_the_pool(method: str) -> None:
    corpus = Corpus()
    order, sizes = corpus.ordered(method), Counter(corpus.sources)
    of_id = dict(zip(corpus.ids, corpus.sources, strict=True))
    for budget in range(1, 121):
        counts = Counter(of_id[one] for one in order[:budget])
        if method == "source_balanced":
            assert [counts[name] for name in sorted(sizes)] == by_the_book([sizes[name] for name in sorted(sizes)], budget)
        else:
            assert all(abs(counts[name] - budget * sizes[name] / 120) < 1.25 for name in sizes)
        for name in sizes:  # inside a source those of lowest priority
            lowest = [one for one in corpus.by(lambda _: 0) if of_id[one] == name][: counts[name]]
            assert sorted(lowest) == sorted(one for one in order[:budget] if of_id[one] == name)


@pytest.mark.parametrize("method", ["source_matched", "source_and_length_matched"])
@given(
    seed=st.integers(0, 2**32),
    stratify_by=st.sampled_from([None, "source"]),
    options=st.sampled_from(
        [
            {},
            {"allocation": 0.5},
            {"draw": "central"},
            {"min_per_source": 3},
            {"defer_groups_up_to": 8, "allocation_of_strata": 1.0},
        ]
    ),
)
@settings(max_examples=12, deadline=None)
def test_a_matched_sample_has_the_counts_of_s2l_for_every_budget(
    method: str, seed: int, stratify_by: str | None, options: dict[str, Any]
) -> None:
    corpus = Corpus(seed, 60)
    order, of_s2l = (corpus.ordered(name, stratify_by=stratify_by, **options) for name in (method, S2L))
    decile = np.searchsorted(np.quantile(corpus.tokens, np.arange(1, 10) / 10), corpus.tokens, side="right").tolist()
    cells = {
        one: (source, decile[i] if "length" in method else 0)
        for i, (one, source) in enumerate(zip(corpus.ids, corpus.sources, strict=True))
    }
    for budget in range(1, 61):
        counts, wanted = (Counter(cells[one] for one in found[:budget]) for found in (order, of_s2l))
        assert counts == wanted
        for cell, count in counts.items():
            lowest = [one for one in corpus.by(lambda _: 0) if cells[one] == cell][:count]
            assert sorted(lowest) == sorted(one for one in order[:budget] if cells[one] == cell)
    strata = corpus.sources if stratify_by else None
    assert chosen(corpus.select(S2L, 20, stratify_by=strata, **options)) == sorted(of_s2l[:20]), "which is that of S2L itself"


def test_strata_of_the_final_loss_are_equal_bands_in_equal_shares() -> None:
    corpus = Corpus()
    ranked = corpus.by(lambda i: corpus.losses[i, -1])
    bands = {one: place * 5 // 120 for place, one in enumerate(ranked)}
    for budget in (5, 40, 100):
        taken = chosen(corpus.select("final_loss_strata", budget, stratify_by=None))
        assert Counter(bands[one] for one in taken) == dict.fromkeys(range(5), budget // 5)
        for band in range(5):
            lowest = [one for one in corpus.by(lambda _: 0) if bands[one] == band][: budget // 5]
            assert set(lowest) <= set(taken)


def test_scores_are_those_of_their_papers() -> None:
    corpus = Corpus()
    losses, tokens = corpus.losses.astype(float), corpus.tokens
    median = sorted(losses[:, -1])[59:61]

    def variability(i: int) -> float:
        probabilities = [2.718281828459045 ** -float(loss) for loss in losses[i]]
        mean = sum(probabilities) / len(probabilities)
        return round((sum((p - mean) ** 2 for p in probabilities) / len(probabilities)) ** 0.5, 9)

    assert corpus.ordered("least_confidence") == corpus.by(lambda i: -losses[i, -1])
    assert corpus.ordered("high_learnability") == corpus.by(lambda i: losses[i, -1] - losses[i, 0])
    assert corpus.ordered("middle_perplexity") == corpus.by(lambda i: abs(losses[i, -1] - sum(median) / 2))
    assert corpus.ordered("longest") == corpus.by(lambda i: -tokens[i])
    found = corpus.ordered("ambiguous")
    of_id = {one: variability(i) for i, one in enumerate(corpus.ids)}
    assert [of_id[one] for one in found] == sorted(of_id.values(), reverse=True)


def test_ifd_takes_the_highest_ratio_below_one_first_and_what_a_prompt_does_not_help_last() -> None:
    corpus = Corpus()
    ratio = {one: corpus.losses[i, -1] / corpus.without_prompt[i] for i, one in enumerate(corpus.ids)}
    found = [ratio[one] for one in corpus.ordered("ifd")]
    helped = [one for one in found if one < 1]
    assert found[: len(helped)] == sorted(helped, reverse=True)
    assert all(one >= 1 for one in found[len(helped) :])


def test_rds_takes_for_each_validation_row_in_turn_the_most_alike() -> None:
    corpus = Corpus()
    cosine = corpus.embedding @ corpus.wanted.T
    cosine /= np.linalg.norm(corpus.embedding, axis=1)[:, None] * np.linalg.norm(corpus.wanted, axis=1)
    lists, found = [corpus.by(lambda i, v=v: -cosine[i, v]) for v in range(3)], []
    while len(found) < 120:
        for wanted in lists:
            one = wanted.pop(0)
            if one not in found:
                found.append(one)
    assert corpus.ordered("rds_plus") == found


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "left_out", "remedy"),
    [
        ("source_balanced", "sources", "examples.source_field"),
        ("source_matched", "sources", "examples.source_field"),
        ("longest", "num_response_tokens", "the column num_response_tokens"),
        ("source_and_length_matched", "num_response_tokens", "the column num_response_tokens"),
        ("ifd", "measurements", "trajectories.without_prompt=true"),
        ("rds_plus", "measurements", "trajectories.embeddings=true"),
    ],
)
def test_a_selector_that_lacks_something_says_what_and_how_to_record_it(method: str, left_out: str, remedy: str) -> None:
    with pytest.raises(ConfigError, match=rf"selection\.method={method} needs \w+: .*{re.escape(remedy)}"):
        Corpus().select(method, 10, **{left_out: None})


def test_one_source_is_none_to_balance() -> None:
    with pytest.raises(ConfigError, match="must name several sources"):
        Corpus().select("source_balanced", 10, sources=["web"] * 120)


@pytest.mark.parametrize("method", ["high_learnability", "ambiguous"])
def test_a_fall_needs_two_points(method: str) -> None:
    with pytest.raises(ConfigError, match=f"{method} needs trajectories of 2 points or more, these have 1"):
        Corpus(num_points=1).select(method, 10)


@pytest.mark.parametrize("method", OTHERS)
@pytest.mark.parametrize(
    "option",
    [{"allocation": 0.5}, {"allocation_of_strata": 1.0}, {"draw": "central"}, {"defer_groups_up_to": 2}, {"min_per_source": 2}],
)
def test_an_option_that_would_do_nothing_is_refused(method: str, option: dict[str, Any]) -> None:
    assert option.keys() <= set(OF_S2L_ALONE)
    if method.endswith("matched"):  # it follows S2L, whatever that does
        assert len(Corpus().select(method, 10, **option)) == 10
    else:
        with pytest.raises(ConfigError, match=f"method={method} has no use for {next(iter(option))}"):
            Corpus().select(method, 10, **option)


def test_a_draw_without_an_order_cannot_be_matched() -> None:
    with pytest.raises(ConfigError, match="draw=spread"):
        Corpus().select("source_matched", 10, draw="spread")


def test_an_unknown_method_is_refused_with_the_names_that_there_are() -> None:
    with pytest.raises(ConfigError, match=r"selection\.method.*'s2l'.*'rds_plus'"):
        Corpus().select("best", 10)


@pytest.mark.parametrize(("method", "field"), [("ifd", "without_prompt"), ("rds_plus", "embeddings")])
def test_a_run_that_would_not_record_what_its_method_needs_is_refused_at_once(method: str, field: str) -> None:
    values = run_of({"method": method})
    with pytest.raises(ConfigError, match=rf"selection\.method={method} needs what trajectories\.{field}=true records"):
        parse_config(values)
    assert parse_config(values | {"trajectories": {field: True}}).selection.method == method


def run_of(selection: dict[str, Any], **proxy: Any) -> dict[str, Any]:
    return {
        "name": "run",
        "examples": {"dataset": "corpus.jsonl"},
        "proxy": {"model": "small", **proxy},
        "selection": {"budget": 10, **selection},
        "target": {"model": "large"},
    }


def test_a_run_of_too_few_points_is_refused_before_its_proxy_is_trained() -> None:
    with pytest.raises(ConfigError, match=r"selection\.method=ambiguous needs trajectories of 2 points or more, these have 1"):
        parse_config(run_of({"method": "ambiguous"}, num_checkpoints=1))
    for clustering, proxy in (({}, {"num_checkpoints": 1}), ({"points": [-1]}, {})):
        with pytest.raises(ConfigError, match=r"clustering\.features=shape needs two points at least"):
            parse_config(run_of({}, **proxy) | {"clustering": {"features": "shape", **clustering}})
    assert parse_config(run_of({"method": "ambiguous"}, num_checkpoints=1, include_untrained=True))
    assert parse_config(run_of({"method": "ambiguous"}, checkpoint_every_steps=5)), "how many there are goes by the steps"


@pytest.mark.parametrize(
    ("measurements", "message"),
    [
        ({"loss_without_prompt": np.ones(119)}, "loss_without_prompt: 119 values for 120"),
        ({"loss_without_prompt": np.full(120, np.nan)}, "loss_without_prompt: NaN"),
        ({"losses_without_prompts": np.ones(120)}, "no measurement 'losses_without_prompts'. Known: loss_without_prompt"),
    ],
)
def test_measurements_that_are_not_of_these_rows_are_refused(measurements: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        Corpus().select("ifd", 10, measurements=measurements)


# --- files ---------------------------------------------------------------------------------------------------------


def table_of(corpus: Corpus) -> pa.Table:
    columns = {
        "example_id": corpus.ids,
        "losses": corpus.losses.tolist(),
        "source": corpus.sources,
        "num_response_tokens": corpus.tokens,
        "loss_without_prompt": corpus.without_prompt.tolist(),
        "text": [f"text {one}" for one in corpus.ids],
    }
    return pa.table(columns)


def of_files(folder: Path, method: str, source: str, **options: Any) -> Artifact:
    grouping = ClusteringConfig(num_clusters=5)
    return select_trajectories(source, str(folder), grouping, SelectionConfig(budget=30, method=method, **options))


@pytest.mark.parametrize("method", [name for name in SELECTORS if name != "rds_plus"])
def test_files_give_what_arrays_give(tmp_path: Path, method: str) -> None:
    corpus = Corpus()
    (tmp_path / "in").mkdir()
    table = table_of(corpus)
    for part, (start, stop) in enumerate(((0, 11), (11, 90), (90, 120))):
        pq.write_table(table.slice(start, stop - start), tmp_path / "in" / f"{part}.parquet")
    artifact = of_files(tmp_path / "out", method, str(tmp_path / "in"))
    found, expected = read_selection(artifact), corpus.select(method, 30)
    assert chosen(found) == chosen(expected)
    assert found.weights_M.tolist() == expected.weights_M.tolist()
    assert found.cluster_ids_M.tolist() == expected.cluster_ids_M.tolist()
    assert artifact.summary["method"] == method
    assert artifact.read_table("selected.parquet")["text"].to_pylist() == [f"text {one}" for one in chosen(found)]


def test_the_method_random_is_the_runs_random_control_to_the_byte(tmp_path: Path) -> None:
    pq.write_table(table_of(Corpus()), tmp_path / "t.parquet")
    artifact = built(tmp_path, str(tmp_path / "t.parquet"), method="random", budget=30, seed=3)
    assert artifact.read_bytes("selected.parquet") == artifact.read_bytes("random.parquet")


def test_the_report_names_the_method_that_chose(tmp_path: Path) -> None:
    pq.write_table(table_of(Corpus()), tmp_path / "t.parquet")
    for method, who in (("longest", "'longest'"), (S2L, "S2L")):
        chosen_by = of_files(tmp_path / method, method, str(tmp_path / "t.parquet")).summary
        losses = {name: {"loss_per_token": loss, "loss_macro": loss} for name, loss in (("selected", 1.0), ("random", 2.0))}
        assert verdict(chosen_by, losses)[0].startswith(f"{who} chose 30 of 120 examples (25.0%)")
        assert f"{who} wins by 1.0000" in verdict(chosen_by, losses)[0]


def trajectories_of(corpus: Corpus, folder: Path) -> str:
    """A run's trajectories with embeddings, and those of the validation rows."""
    table = trajectories_table(corpus.ids, corpus.losses, corpus.sources, corpus.tokens)
    embedding = pa.FixedSizeListArray.from_arrays(pa.array(corpus.embedding.ravel()), 4)
    table = table.append_column("embedding", embedding)
    draft = Draft.open(Storage(str(folder)), Key("trajectories", 1, {}, {}))
    draft.write_tables("part-00000.parquet", [table.slice(0, 50)])
    draft.write_tables("part-00001.parquet", [table.slice(50)])
    wanted = pa.FixedSizeListArray.from_arrays(pa.array(corpus.wanted[[2, 0, 1]].ravel()), 4)
    draft.write_tables("validation.parquet", [pa.table({"example_id": ["v2", "v0", "v1"], "embedding": wanted})])
    return draft.publish({"rows": len(table), "steps": [0, 1, 2]}).root.uri


def test_validation_rows_lie_beside_a_runs_trajectories_and_the_card_says_that_they_were_seen(tmp_path: Path) -> None:
    corpus = Corpus()
    artifact = of_files(tmp_path / "out", "rds_plus", trajectories_of(corpus, tmp_path / "run"))
    assert chosen(read_selection(artifact)) == chosen(corpus.select("rds_plus", 30))
    assert "embedding" not in artifact.read_table("selected.parquet").column_names, "what is measured is not passed on"
    card = artifact.read_bytes("README.md").decode()
    assert "Method `rds_plus` ([arXiv 2503.01807]" in card
    assert "validation rows" in card


@pytest.mark.parametrize("method", sorted(SELECTORS.keys() - {"rds_plus"}))
def test_a_method_that_reads_no_groups_is_not_kept_waiting_for_k_means(tmp_path: Path, method: str) -> None:
    pq.write_table(table_of(Corpus()), tmp_path / "t.parquet")
    artifact = of_files(tmp_path / "out", method, str(tmp_path / "t.parquet"))
    reads = {S2L, "source_matched", "source_and_length_matched", "final_loss_strata"}
    assert (artifact.summary["num_clusters"] > 1) == (method in reads)


def test_groups_that_no_method_reads_are_said_not_to_have_been_made(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pq.write_table(table_of(Corpus()), tmp_path / "t.parquet")
    with caplog.at_level("INFO"):
        card = of_files(tmp_path / "out", "least_confidence", str(tmp_path / "t.parquet")).read_bytes("README.md").decode()
    assert "all rows as one group, whatever clustering asks for: least_confidence reads no groups" in caplog.text
    assert "`cluster_id` is 0 (this method reads no groups" in card
    assert "k-means" not in card
    assert "groups explain" not in card
    assert "-0.0%" not in caplog.text


def test_a_selector_that_lacks_something_is_refused_before_anything_is_grouped(tmp_path: Path) -> None:
    pq.write_table(table_of(Corpus()).drop_columns("loss_without_prompt"), tmp_path / "t.parquet")
    with pytest.raises(ConfigError, match=r"trajectories\.without_prompt=true"):
        of_files(tmp_path / "out", "ifd", str(tmp_path / "t.parquet"))
    assert not list((tmp_path / "out").glob("*/manifest.json"))


def test_a_measurement_that_is_missing_in_a_row_or_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    table, place = table_of(Corpus()), tmp_path / "in"
    values = table["loss_without_prompt"].to_pylist()
    holed = table.set_column(4, "loss_without_prompt", pa.array([None, *values[1:]]))
    pq.write_table(holed, place / "a.parquet")
    with pytest.raises(DataError, match=f"loss_without_prompt is missing for example_id {table['example_id'][0].as_py()}"):
        of_files(tmp_path / "out", "ifd", str(place))
    pq.write_table(table.slice(0, 60), place / "a.parquet")
    pq.write_table(table.slice(60).drop_columns("loss_without_prompt"), place / "b.parquet")
    with pytest.raises(DataError, match=r"b\.parquet: column 'loss_without_prompt' is missing"):
        of_files(tmp_path / "other", "ifd", str(place))


def test_the_command_line_selects_by_any_method_and_its_subsets_can_be_exported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = Corpus()
    pq.write_table(table_of(corpus), tmp_path / "t.parquet")
    arguments = ["select", str(tmp_path / "t.parquet"), "--method", "longest", "--num-clusters", "5", "--output"]
    app([*arguments, str(tmp_path / "out"), "--budget", "20", "--budget", "10"], standalone_mode=False)
    capsys.readouterr()
    found = Artifact.read(Storage(str(tmp_path / "out")).child("selection"))
    of_id = dict(zip(corpus.ids, corpus.tokens, strict=True))
    assert sorted(of_id[one] for one in chosen(read_selection(found))) == sorted(corpus.tokens)[-20:]
    assert found.summary["stability"] is None, "it would be that of another method"
    assert found.manifest["recipe"]["method"] == "longest"
    small = found.read_table("selected-10.parquet")["example_id"].to_pylist()
    assert set(small) < set(chosen(read_selection(found)))
    card = found.read_bytes("README.md").decode()
    assert "Method `longest`" in card
    assert "`weight` 1: this choice estimates nothing" in card
    assert "small groups first" not in card
    export_subset(str(tmp_path / "out"), "jsonl", str(tmp_path / "subset.jsonl"))
    lines = [json.loads(line) for line in (tmp_path / "subset.jsonl").read_text().splitlines()]
    assert [line["example_id"] for line in lines] == chosen(read_selection(found))
    assert {line["weight"] for line in lines} == {1.0}


def test_the_config_knows_how_many_points_each_method_needs():
    """So that a run is refused before its proxy is trained."""
    assert {name: one.min_points for name, one in SELECTORS.items() if one.min_points > 1} == MIN_POINTS
