"""Is the premise true here? Gradients against plain autograd, figures against their formulas, planted groups, a real run."""

from __future__ import annotations

import io
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from transformers import AutoModelForCausalLM, AutoTokenizer

from s2l_ray.compare import similarity
from s2l_ray.compare.premise import (
    PremiseSettings,
    Sample,
    agreement,
    gradient_steps,
    likeness,
    measure_premise,
    with_company,
)
from s2l_ray.compare.premise_wording import premise_text, verdict
from s2l_ray.compare.premise_worker import ALL_ROWS, FACTS, TARGET, TRAINED, PremiseJob, PremiseWorker
from s2l_ray.config import Lora, RunConfig, parse_config
from s2l_ray.errors import ArtifactError, ConfigError, DataError
from s2l_ray.pipeline import run
from s2l_ray.report.premise import explained_figure, premise_facts, read_premise
from s2l_ray.runtime.workers import Workers
from s2l_ray.storage.artifacts import Artifact
from s2l_ray.storage.places import Storage
from s2l_ray.training.gradients import GradientSketch, example_gradients
from s2l_ray.training.losses import example_losses
from s2l_ray.training.token_rows import TokenRows
from s2l_ray.training.tokens import encode
from tests.building import literal_priority

from .test_losses import make, rows
from .test_pipeline import config_values, groups_of, table_of, write_corpus

FEW = PremiseSettings(num_bootstraps=200, num_permutations=200)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny matrices: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- gradients -----------------------------------------------------------------------------------------------------


def plain_gradient(model: torch.nn.Module, examples: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Autograd on transformers' own losses of an example's rows, each counted by its labels."""
    model.zero_grad()
    total = sum(int(is_label.sum()) for _, is_label in examples)
    for ids, is_label in examples:
        input_ids = torch.from_numpy(ids.astype(np.int64))[None]
        labels = input_ids.masked_fill(~torch.from_numpy(is_label)[None], -100)
        (model(input_ids=input_ids, labels=labels).loss * int(is_label.sum()) / total).backward()
    flat = [torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in model.parameters()]
    return torch.cat(flat).numpy().copy()


@pytest.mark.parametrize("architecture", ["gpt_neox", "llama", "gpt2"])
def test_an_example_s_gradient_is_that_of_plain_autograd_over_all_its_rows(architecture):
    model, tokens = make(architecture), rows(np.random.default_rng(3), 9)
    owners = np.array([0, 1, 1, 2, 3, 3, 3, 4, 5])
    model.train()
    found = example_gradients(model, tokens, owners, GradientSketch(model, 10**6, 0))
    assert not model.training, "no dropout"
    assert len(found) == 6
    for example, gradient in enumerate(found):
        expected = plain_gradient(model, [tokens[row] for row in np.flatnonzero(owners == example).tolist()])
        np.testing.assert_allclose(gradient, expected, atol=1e-6 + 1e-5 * np.abs(expected).max())


def test_a_sketch_keeps_the_cosines_of_real_gradients_as_exactly_as_it_says():
    model, tokens, features = make("gpt_neox"), rows(np.random.default_rng(4), 24), 1024
    sketches = [GradientSketch(model, features, seed) for seed in range(8)]
    assert {(sketch.is_exact, sketch.num_features) for sketch in sketches} == {(False, features)}
    plain, sketched = [], []
    for row in range(24):
        plain.append(plain_gradient(model, [tokens[row]]))
        sketched.append([sketch.of_gradient() for sketch in sketches])
    exact = similarity.gram(plain)
    grams = [similarity.gram(found) for found in zip(*sketched, strict=True)]
    above, scale = np.triu_indices(24, 1), np.sqrt(np.outer(np.diag(exact), np.diag(exact)))
    errors = np.array([((found - exact) / scale)[above] for found in grams])
    bound = np.sqrt((1 + similarity.cosines(exact)[above] ** 2) / features)
    assert np.sqrt(np.mean((errors / bound) ** 2)) < 1.1
    assert np.abs(errors.mean(axis=0)).max() < 4 * math.sqrt(2 / features / 8), "right on average"
    lengths = np.array([np.diag(found) / np.diag(exact) for found in grams])
    assert np.abs(lengths - 1).max() < 5 * math.sqrt(2 / features)


def test_the_same_seed_gives_the_same_sketch_and_another_one_another():
    model, tokens = make("llama"), rows(np.random.default_rng(5), 3)
    first, again, other = (
        example_gradients(model, tokens, np.arange(3), GradientSketch(model, 256, seed)) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)


# --- figures against their formulas --------------------------------------------------------------------------------

LABELS = st.lists(st.integers(0, 4), min_size=4, max_size=25)


@given(LABELS, st.integers(0, 10**6))
def test_the_explained_share_is_eta_squared_and_mean_cosines_are_means_over_pairs(labels, seed):
    labels_N = np.array(labels)
    values_NF = np.random.default_rng(seed).normal(size=(len(labels), 3)) + labels_N[:, None]
    gram_NN = similarity.gram(values_NF)
    found = similarity.explained_by(gram_NN, labels_N, 20, seed)
    if len(set(labels)) in (1, len(labels)):
        assert found is None
    else:
        total = ((values_NF - values_NF.mean(0)) ** 2).sum()
        within = sum(((values_NF[labels_N == k] - values_NF[labels_N == k].mean(0)) ** 2).sum() for k in set(labels))
        assert found["share"] == pytest.approx(1 - within / total)
        assert 0 < found["p_value"] <= 1
    cosines = similarity.mean_cosines(similarity.cosines(gram_NN), labels_N, similarity.resamplings(len(labels), 50, seed))
    pairs = list(itertools.combinations(range(len(labels)), 2))
    same = [p for p in pairs if labels[p[0]] == labels[p[1]]]
    if not same or len(same) == len(pairs):
        assert cosines is None
        return

    def mean(chosen: list[tuple[int, int]]) -> float:
        x = values_NF / np.linalg.norm(values_NF, axis=1, keepdims=True)
        return float(np.mean([x[i] @ x[j] for i, j in chosen]))

    assert cosines["same"]["value"] == pytest.approx(mean(same))
    assert cosines["other"]["value"] == pytest.approx(mean([p for p in pairs if p not in same]))
    assert cosines["difference"]["value"] == pytest.approx(cosines["same"]["value"] - cosines["other"]["value"])


def test_random_groups_explain_what_their_number_lets_expect():
    generator = np.random.default_rng(0)
    gram_NN = similarity.gram(generator.normal(size=(60, 5)))
    found = similarity.explained_by(gram_NN, np.arange(60) % 20, 2000, 0)
    assert found["random"] == pytest.approx(19 / 59, abs=0.005)


def test_random_groups_within_strata_keep_what_the_strata_explain():
    generator = np.random.default_rng(0)
    strata_N = np.arange(80) // 40
    gram_NN = similarity.gram(generator.normal(size=(80, 3)) + 5 * strata_N[:, None])
    groups_N = 2 * strata_N + generator.integers(0, 2, 80)
    anywhere, within = (similarity.explained_by(gram_NN, groups_N, 500, 0, strata) for strata in (None, strata_N))
    assert anywhere["p_value"] < 0.01 < 0.05 < within["p_value"]
    assert within["share"] == pytest.approx(within["random"], abs=0.03)


@given(LABELS, st.integers(0, 10**6))
def test_bands_are_groups_of_the_same_sizes_in_each_source_whose_values_do_not_overlap(labels, seed):
    generator, labels_N = np.random.default_rng(seed), np.array(labels)
    values_N, sources_N = generator.permutation(len(labels)), generator.integers(0, 2, len(labels))
    found_N = similarity.bands(values_N, labels_N, sources_N)
    for source in np.unique(sources_N):
        of_source = sources_N == source
        assert sorted(found_N[of_source]) == sorted(labels_N[of_source])
        changes = np.diff(found_N[of_source][np.argsort(values_N[of_source])]) != 0
        assert changes.sum() == len(np.unique(labels_N[of_source])) - 1
    np.testing.assert_array_equal(similarity.bands(labels_N, labels_N, sources_N), labels_N)


@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=2, max_size=30))
def test_rank_correlation_is_spearman_s_with_ties(pairs):
    stats = pytest.importorskip("scipy.stats")
    left, right = (np.array(values, float) for values in zip(*pairs, strict=True))
    found = similarity.rank_correlation(left, right, similarity.resamplings(len(left), 20, 0))
    if len(set(left)) == 1 or len(set(right)) == 1:
        assert found is None
    else:
        assert found["value"] == pytest.approx(stats.spearmanr(left, right).statistic)


def test_the_correlation_of_pairs_is_spearman_s_over_pairs_and_one_for_a_rising_function():
    stats = pytest.importorskip("scipy.stats")
    generator = np.random.default_rng(1)
    left_NT = generator.normal(size=(15, 4))
    right_NT = left_NT + generator.normal(size=(15, 4))
    counts_RN = similarity.resamplings(15, 200, 0)
    left_NN, right_NN = similarity.distances(left_NT), similarity.distances(right_NT)
    np.testing.assert_allclose(left_NN, np.linalg.norm(left_NT[:, None] - left_NT, axis=2), atol=1e-7)
    found = similarity.pair_rank_correlation(left_NN, right_NN, counts_RN)
    above = np.triu_indices(15, 1)
    assert found["value"] == pytest.approx(stats.spearmanr(left_NN[above], right_NN[above]).statistic)
    assert found["low"] < found["value"] < found["high"]
    risen = similarity.pair_rank_correlation(left_NN, np.exp(left_NN), counts_RN)
    assert [risen[name] for name in ("value", "low", "high")] == pytest.approx([1, 1, 1])


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    """Of 60 intervals of 95%, 50 or fewer hold the truth once in a thousand times."""
    generator = np.random.default_rng(2)
    truth, covered = 6 / math.pi * math.asin(0.5 / 2), 0  # Spearman's of a normal pair with correlation 0.5
    for trial in range(60):
        left = generator.normal(size=60)
        right = 0.5 * left + math.sqrt(0.75) * generator.normal(size=60)
        found = similarity.rank_correlation(left, right, similarity.resamplings(60, 100, trial))
        covered += found["low"] <= truth <= found["high"]
    assert covered > 50


# --- planted groups ------------------------------------------------------------------------------------------------


def sample_of(groups_N: np.ndarray, sources_N: np.ndarray, losses_NT: np.ndarray) -> Sample:
    ids = [f"row-{row:03d}" for row in range(len(groups_N))]
    return Sample(ids, groups_N, sources_N, losses_NT, np.arange(len(ids)) % 7 + 1)


def planted(generator: np.random.Generator, noise: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Gradients with a direction for each of 8 groups, two of which make a source; trajectories of the groups."""
    groups_N = generator.integers(0, 8, 120)
    directions = generator.normal(size=(8, 50))
    gradients_NM = directions[groups_N] + noise * generator.normal(size=(120, 50))
    losses_NT = groups_N[:, None] + 0.1 * generator.normal(size=(120, 4))
    losses_NT[:, -1] = generator.random(120)  # all end alike: only the way there tells the groups
    return gradients_NM, groups_N, groups_N // 2, losses_NT


def test_groups_that_share_gradients_are_told_from_shuffled_ones():
    generator = np.random.default_rng(0)
    gradients_NM, groups_N, sources_N, losses_NT = planted(generator)
    found = likeness(gradients_NM, sample_of(groups_N, sources_N, losses_NT), FEW)
    assert found["cosine"]["groups"]["same"]["low"] > found["cosine"]["groups"]["other"]["high"] + 0.3
    assert found["cosine"]["groups"]["difference"]["low"] > 0
    groups, sources = found["explained"]["groups"], found["explained"]["sources"]
    assert groups["share"] == pytest.approx(7 / 8 * 0.55, abs=0.08), "half of the variance is the directions'"
    assert groups["p_value"] < 0.01
    assert found["explained"]["groups_within_sources"]["p_value"] < 0.01
    assert groups["excess"] > sources["excess"] > 0
    for name in ("final_loss_bands", "length_bands"):
        assert found["explained"][name]["share"] < groups["share"] - 0.1
    assert found["near_is_alike"]["low"] > 0
    assert verdict({"model": "proxy", **found}).endswith("the premise holds here.")

    shuffled = likeness(gradients_NM, sample_of(generator.permutation(groups_N), sources_N, losses_NT), FEW)
    difference = shuffled["cosine"]["groups"]["difference"]
    assert difference["low"] < 0 < difference["high"]
    assert shuffled["explained"]["groups"]["p_value"] > 0.05
    assert "cannot be seen to hold here" in verdict({"model": "proxy", **shuffled})


def test_shuffled_groups_are_called_significant_about_one_time_in_twenty():
    generator = np.random.default_rng(1)
    gradients_NM, groups_N, _, _ = planted(generator)
    gram_NN = similarity.gram(gradients_NM)
    found = [similarity.explained_by(gram_NN, generator.permutation(groups_N), 100, seed)["p_value"] for seed in range(200)]
    assert 2 <= sum(value <= 0.05 for value in found) <= 20


def test_groups_that_only_follow_the_sources_are_said_to():
    generator = np.random.default_rng(2)
    gradients_NM, sources_N, _, losses_NT = planted(generator)
    groups_N = 2 * sources_N + generator.integers(0, 2, len(sources_N))
    found = likeness(gradients_NM, sample_of(groups_N, sources_N, losses_NT), FEW)
    assert verdict({"model": "target", **found}).endswith("but only as far as groups follow the sources.")
    assert "the target's gradients' variance" in verdict({"model": "target", **found})


def test_sources_that_tell_more_than_the_groups_are_named():
    generator = np.random.default_rng(3)
    gradients_NM, sources_N, _, losses_NT = planted(generator)
    gradients_NM[:, 0] += 4 * (np.arange(120) % 2)
    found = likeness(gradients_NM, sample_of(np.arange(120) % 2, sources_N, losses_NT), FEW)
    assert "and sources tell more" in verdict({"model": "proxy", **found})


def test_groups_that_are_bands_of_the_final_loss_are_said_to_be():
    generator = np.random.default_rng(5)
    gradients_NM, groups_N, sources_N, losses_NT = planted(generator)
    losses_NT[:, -1] = groups_N
    found = likeness(gradients_NM, sample_of(groups_N, sources_N, losses_NT), FEW)
    share = f"{found['explained']['groups']['share']:.0%}"
    assert verdict({"model": "proxy", **found}).endswith(f"but bands of the final loss alone explain as much ({share}).")


def test_one_source_and_rows_that_do_not_differ_have_no_figures_instead_of_wrong_ones():
    ones = np.ones((20, 3))
    found = likeness(ones, sample_of(np.arange(20) % 4, np.zeros(20, int), ones), FEW)
    assert set(found["explained"].values()) == {None}
    assert (found["cosine"]["sources"], found["near_is_alike"]) == (None, None)
    assert "do not differ" in verdict({"model": "proxy", **found})
    same = agreement(ones, ones, np.arange(20) % 4, FEW)
    assert same == {"final_loss": None, "reduction": None, "distance": None, "explained": None}


def test_a_target_that_learns_as_the_proxy_does_agrees_and_another_does_not():
    generator = np.random.default_rng(4)
    _, groups_N, _, losses_NT = planted(generator)
    losses_NT = losses_NT + generator.random((120, 1)) * np.arange(4)[::-1]
    alike = agreement(losses_NT, losses_NT[:, ::3] * 2 + 1, groups_N, FEW)
    assert alike["final_loss"]["value"] > 0.9
    assert alike["distance"]["low"] > 0.5
    assert alike["explained"]["p_value"] < 0.01
    other = agreement(losses_NT, generator.random((120, 3)), groups_N, FEW)
    for name in ("final_loss", "reduction", "distance"):
        assert other[name]["low"] < 0 < other[name]["high"]


# --- the sample ----------------------------------------------------------------------------------------------------


@given(LABELS, st.integers(2, 30))
def test_sampled_rows_are_the_first_whose_group_has_two(labels, num_rows):
    def alone(count: int) -> list[int]:
        return [row for row in range(count) if labels[:count].count(labels[row]) > 1]

    expected = max((alone(count) for count in range(len(labels) + 1) if len(alone(count)) <= num_rows), key=len)
    assert with_company(np.array(labels), num_rows).tolist() == expected


def test_gradients_are_taken_in_the_middle_and_at_the_end_of_the_proxy_s_training():
    assert gradient_steps([0, 5, 10, 15]) == [10, 15]
    assert gradient_steps([100, 200, 300, 400]) == [200, 400]
    assert gradient_steps([7]) == [7]
    assert gradient_steps([0]) == [0]


def test_too_few_rows_are_refused():
    with pytest.raises(ConfigError, match="premise: num_rows=4 is too few"):
        PremiseSettings(num_rows=4).check()


# --- a real run ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clustered(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunConfig, dict[str, Artifact]]:
    folder = tmp_path_factory.mktemp("premise")
    config = parse_config(config_values(write_corpus(folder / "corpus.jsonl")))
    return folder / "run", config, run(config, str(folder / "run"), until="clustering")


SETTINGS = PremiseSettings(num_rows=60, num_features=50_000, num_bootstraps=200, num_permutations=200, on_target=True)


@pytest.fixture(scope="module")
def measured(clustered: tuple[Path, RunConfig, dict[str, Artifact]]) -> dict[str, Any]:
    place, config, artifacts = clustered
    return measure_premise(config, artifacts, Storage(str(place)), config.machines.evaluation, SETTINGS)


def test_what_is_written_holds_all_figures_and_is_measured_once(clustered, measured):
    place, config, artifacts = clustered
    assert json.loads((place / "compare" / "premise.json").read_text()) == measured
    steps = artifacts["proxy"].summary["steps"]
    assert [(one["model"], one["step"]) for one in measured["gradients"]] == [
        ("proxy", steps[2]),
        ("proxy", steps[3]),
        ("target", 0),
    ]
    assert all(one["rows"] == 60 and one["worker_seconds"] > 0 for one in measured["gradients"])
    assert measured["sample"] | {"groups": 0} == {"rows": 60, "groups": 0, "sources": 3, "pool": 226, "num_clusters": 6}
    assert not list((place / ".work").glob("premise-*")), "scratch is removed"
    begun = (place / "compare" / "premise.json").stat().st_mtime_ns
    again = measure_premise(config, artifacts, Storage(str(place)), config.machines.evaluation, SETTINGS)
    assert again == measured
    assert (place / "compare" / "premise.json").stat().st_mtime_ns == begun


def test_the_share_that_groups_explain_is_that_of_plain_gradients_of_the_final_checkpoint(clustered, measured):
    place, _, _ = clustered
    final = max((place / "proxy").glob("step-*"))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(final).eval(), AutoTokenizer.from_pretrained(final)
    texts = {row["example_id"]: row for row in table_of(place / "examples").to_pylist()}
    groups = groups_of(place)
    order = sorted(groups, key=lambda name: literal_priority(name, "premise-0"))
    chosen = [order[row] for row in with_company(np.array([groups[name] for name in order]), 60).tolist()]
    gradients = []
    for name in chosen:
        prompt = tokenizer(texts[name]["prompt"], add_special_tokens=False)["input_ids"]
        response = [*tokenizer(texts[name]["response"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        ids = np.array(prompt + response)
        gradients.append(plain_gradient(model, [(ids, np.arange(len(ids)) >= len(prompt))]))
    found = similarity.explained_by(similarity.gram(gradients), np.array([groups[name] for name in chosen]), 20, 0)
    assert measured["gradients"][1]["parameters"] == len(gradients[0])
    assert measured["gradients"][1]["explained"]["groups"]["share"] == pytest.approx(found["share"], rel=1e-4)


def test_kinds_of_task_that_were_planted_share_gradients(measured):
    final = measured["gradients"][1]
    assert final["explained"]["sources"]["p_value"] < 0.01
    assert final["cosine"]["sources"]["difference"]["low"] > 0
    assert measured["agreement"]["final_loss"]["low"] > 0, "what is hard for the proxy is hard for the target"


def test_the_target_learns_the_sample_and_is_scored_before_and_on_the_way(measured):
    found = measured["agreement"]
    assert found["rows"] == 60
    assert found["steps"] == [0, 4, 9, 14, 18]
    assert found["batch"] == 7
    assert found["effective_dimension"]["points"] == 5


@pytest.mark.parametrize("lora", [None, {"rank": 4}])
def test_the_target_s_first_losses_are_those_before_training_and_it_learns_whatever_is_trained(clustered, tmp_path, lora):
    place, config, artifacts = clustered
    ids = sorted(groups_of(place))[:40]
    target = config.target.model_copy(update={"lora": None if lora is None else Lora(**lora)})
    job = PremiseJob(config.model_copy(update={"target": target}), artifacts, {"rows-00000": ids}, 64, 3, 0)
    worker = PremiseWorker(job, Storage(str(tmp_path)), Workers(1, 1, 0, 1), 1)
    worker.load(TRAINED)
    ((name, data),) = worker.work_on(ALL_ROWS, {TRAINED: None})
    table = pq.read_table(io.BytesIO(data))
    losses_NT = np.array(table["values"].to_pylist())
    assert (name, table["example_id"].to_pylist()) == (TRAINED, ids)
    untrained = worker.load(TARGET)
    texts = {row["example_id"]: row for row in table_of(place / "examples").to_pylist()}
    rows = [encode(worker._of_target, [texts[i]["prompt"]], [texts[i]["response"]])[0] for i in ids]
    expected = example_losses(untrained.eval(), TokenRows.of(rows), tokens_per_batch=500)
    np.testing.assert_allclose(losses_NT[:, 0], expected, atol=1e-5)
    assert losses_NT[:, -1].mean() < losses_NT[:, 0].mean()
    assert json.loads(table.schema.metadata[FACTS])["steps"] == [0, 5, 11, 16]


def test_the_terminal_gets_twelve_lines_at_most_with_a_sentence_at_the_end(measured):
    lines = premise_text(measured).splitlines()
    assert len(lines) <= 12
    assert lines[0].startswith("premise: 60 of 226 examples, in ")
    assert lines[-1] == measured["sentence"]
    assert lines[-1].startswith("Groups explain ")
    assert "target's gradients" in lines[-1]


def test_the_page_gets_a_section_with_every_figure_and_nothing_unescaped(clustered, measured):
    place, _, _ = clustered
    facts = read_premise(Storage(str(place)))
    assert facts == premise_facts(measured)
    environment = Environment(loader=PackageLoader("s2l_ray", "report"), autoescape=True, undefined=StrictUndefined)
    source = '{% from "premise.html" import premise_section %}{{ premise_section(facts, figure) }}'
    figure = explained_figure(facts)
    page = environment.from_string(source).render(facts=facts, figure=Markup(figure.to_json()))
    for one in measured["gradients"]:
        same = one["cosine"]["groups"]["same"]
        assert f"{same['value']:.2f} [{same['low']:.2f}, {same['high']:.2f}]" in page
    assert str(escape(measured["sentence"])) in page
    assert [bars.name for bars in figure.data] == list(facts.models[0].shares)
    assert figure.data[0].x == tuple(one["explained"]["groups"]["share"] for one in measured["gradients"])
    assert read_premise(Storage(str(place / "nowhere"))) is None
    without = premise_facts({**measured, "agreement": None})
    assert "Proxy and target" not in environment.from_string(source).render(facts=without, figure="")


def test_somebody_else_s_file_is_not_replaced(clustered, tmp_path):
    _, config, artifacts = clustered
    theirs = tmp_path / "compare" / "premise.json"
    theirs.parent.mkdir()
    theirs.write_text('{"a premise": "of mine"}')
    with pytest.raises(ArtifactError, match="not written by s2l_ray"):
        measure_premise(config, artifacts, Storage(str(tmp_path)), config.machines.evaluation, SETTINGS)
    assert theirs.read_text() == '{"a premise": "of mine"}'


def test_units_that_are_done_are_not_done_again_and_a_sketch_gives_nearly_the_same(clustered, measured, monkeypatch):
    """Interrupted when the first model's figures are computed: what was on the workers stays done."""
    from s2l_ray.compare import premise

    place, config, artifacts = clustered
    kept = json.dumps(measured)
    fewer = PremiseSettings(num_rows=60, num_features=4096, num_bootstraps=50, num_permutations=200, num_target_points=0)
    arguments = (config, artifacts, Storage(str(place)), config.machines.evaluation, fewer)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(premise, "_of_gradients", interrupted)
        with pytest.raises(KeyboardInterrupt):
            measure_premise(*arguments)
    files = sorted((place / ".work").glob("premise-*/step-*/rows-*"))
    assert len(files) == 2 * 2
    files[0].unlink()
    times = {path: path.stat().st_mtime_ns for path in files[1:]}
    monkeypatch.setattr(Storage, "delete", lambda *_: None)  # so that they can be looked at
    found = measure_premise(*arguments)
    assert files[0].exists()
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert found["agreement"] is None
    for ours, exact in zip(found["gradients"], measured["gradients"], strict=False):
        assert ours["explained"]["groups"]["share"] == pytest.approx(exact["explained"]["groups"]["share"], abs=0.05)
        assert ours["cosine_error"] == 1 / 64
    assert json.dumps(measured) == kept


def test_groups_without_company_are_refused_with_a_remedy(clustered, monkeypatch):
    place, config, artifacts = clustered
    monkeypatch.setattr("s2l_ray.compare.premise.with_company", lambda *_: np.zeros(0, np.int64))
    with pytest.raises(DataError, match="Ask for fewer groups"):
        measure_premise(config, artifacts, Storage(str(place)), config.machines.evaluation, PremiseSettings(seed=9))


def test_no_tokens_are_no_gradients():
    model = make("llama")
    nothing = TokenRows.of([])
    assert example_gradients(model, nothing, np.zeros(0, np.int64), GradientSketch(model, 64, 0)).shape == (0, 64)
