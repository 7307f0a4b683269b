"""A richer signal from the scoring pass: statistics of a response's tokens, k-means on profiles of them, some points only."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import normalized_mutual_info_score
from transformers import PreTrainedTokenizerBase

from s2l_ray.clustering import diagnostics
from s2l_ray.clustering.features import Features, Measured, Spectrum, on_grid
from s2l_ray.clustering.stage import cluster
from s2l_ray.config import ClusteringConfig, GroupingConfig, RunConfig, SelectionConfig
from s2l_ray.errors import ConfigError, DataError
from s2l_ray.runtime.workers import Workers
from s2l_ray.selection.alone import select_trajectories
from s2l_ray.selection.stage import select
from s2l_ray.storage.artifacts import Artifact, Key
from s2l_ray.storage.drafts import Draft
from s2l_ray.storage.layout import TOKENIZER
from s2l_ray.storage.places import Storage
from s2l_ray.training.checkpoints import keep_checkpoint
from s2l_ray.training.label_statistics import ExampleLabels
from s2l_ray.training.losses import losses_of_models, statistics_of_models
from s2l_ray.training.token_rows import TokenRows
from s2l_ray.training.tokens import without_prompts
from s2l_ray.trajectories.files import read_trajectories
from s2l_ray.trajectories.loss_columns import STATISTICS, losses_of, trajectories_table
from s2l_ray.trajectories.recording import finish_recording, record_losses
from s2l_ray.trajectories.stage import Scorer, ScoringJob, join_units
from tests.chat_templates import QWEN_3, chat_tokenizer
from tests.test_losses import make, rows

GRID_STEP = 2.0**-20


def by_hand(losses: Sequence[float]) -> list[float]:
    """Mean, standard deviation, and the means of the first and last third of some labels' losses, as the text says it."""
    size = {1: 1, 2: 1, 3: 1, 4: 2}.get(len(losses), len(losses) // 3 + (len(losses) % 3 > 0))
    mean = sum(losses) / len(losses)
    spread = (sum((loss - mean) ** 2 for loss in losses) / len(losses)) ** 0.5
    return [mean, spread, sum(losses[:size]) / size, sum(losses[-size:]) / size]


def token_losses(model: torch.nn.Module, tokens: TokenRows) -> list[list[float]]:
    """The loss of every label of each row by the model's own logits, one row at a time."""
    found = []
    for ids, is_label in (tokens[row] for row in range(len(tokens))):
        input_ids = torch.from_numpy(ids.astype(np.int64))
        with torch.no_grad():
            logits_LV = model(input_ids=input_ids[None]).logits[0].double()
        losses = torch.nn.functional.cross_entropy(logits_LV[:-1], input_ids[1:], reduction="none").numpy()
        found.append(losses[is_label[1:]].tolist())
    return found


# --- statistics ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["gpt_neox", "gemma2"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_statistics_are_those_of_transformers_own_logits_and_the_losses_stay_to_the_byte(architecture, precision):
    model, tokens = make(architecture), rows(np.random.default_rng(1), 24)
    owners = np.repeat(np.arange(13), [1, 4, 1, 3, 3, 1, 1, 1, 2, 1, 3, 1, 2])
    found = next(statistics_of_models([model], tokens, 300, precision, owners=owners))
    plain = next(losses_of_models([model], tokens, 300, precision, owners=owners))
    assert found.losses.tobytes() == plain.tobytes()
    assert all(values.dtype == np.float32 for values in found)
    labels = token_losses(model, tokens)
    expected = [by_hand([loss for row in np.flatnonzero(owners == n) for loss in labels[row]]) for n in range(13)]
    np.testing.assert_allclose(np.stack(found, 1), expected, atol=1e-5 if precision == "float32" else 0.3)


@given(counts=st.lists(st.integers(1, 9), min_size=1, max_size=12), rows_each=st.integers(1, 3), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=150, deadline=None)
def test_thirds_are_of_an_examples_labels_in_order_however_rows_lie_in_batches(counts, rows_each, seed):
    rng = np.random.default_rng(seed)
    owners_R, examples = [], []
    labels: list[list[float]] = []
    for example, count in enumerate(counts):
        losses = rng.gamma(2, 1, count).astype(np.float32).tolist()
        examples.append(losses)
        cuts = np.sort(rng.integers(0, count + 1, rows_each - 1))
        for piece in np.split(np.array(losses), cuts):
            owners_R.append(example)
            labels.append(piece.tolist())
    order = rng.permutation(len(labels))
    rows_P = np.concatenate([np.full(len(labels[row]), row, np.int64) for row in order])
    losses_P = np.array([loss for row in order for loss in labels[row]], np.float32)
    found = ExampleLabels(rows_P, np.array(owners_R), np.array(counts, np.float64)).statistics(losses_P)
    np.testing.assert_allclose(np.stack(found, 1), [by_hand(losses) for losses in examples], atol=1e-5)


@pytest.mark.parametrize(
    ("losses", "first", "last"),
    [([5.0], 5, 5), ([1.0, 3.0], 1, 3), ([1.0, 7.0, 3.0], 1, 3), ([1.0, 2.0, 5.0, 9.0], 1.5, 7)],
)
def test_thirds_of_few_tokens(losses, first, last):
    labels = ExampleLabels(np.zeros(len(losses), np.int64), np.zeros(1, np.int64), np.array([float(len(losses))]))
    found = labels.statistics(np.array(losses, np.float32))
    assert (found.first_thirds[0], found.last_thirds[0]) == (first, last)
    assert (found.deviations[0] == 0) == (len(losses) == 1)


# --- the stage -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Storage, PreTrainedTokenizerBase]:
    """Examples in two parts, pairs and conversations, and two checkpoints of a proxy in a folder."""
    place = Storage(str(tmp_path_factory.mktemp("run")))
    draft = Draft.open(place, Key("examples", 1, {}, {}))
    turns = '[{"role": "user", "content": "what is %d"}, {"role": "assistant", "content": "it is %d or so"}]'
    for part in range(2):
        ids = [f"id-{part}-{row}" for row in range(10)]
        columns: dict[str, Any] = {
            "source": ["s", "t"] * 5,
            "prompt": [f"say {row} " for row in range(10)],
            "response": [f"it is {row} " * (row + 1) for row in range(10)],
            "split": ["pool"] * 7 + (["pool", "pool"], ["validation"] * 2)[part] + ["held_out"],
            "messages": pa.array([turns % (row, row) if row % 3 == 0 else None for row in range(10)], pa.string()),
            "tools": pa.nulls(10, pa.string()),
        }
        draft.write_table(f"part-{part:05d}.parquet", pa.table({"example_id": ids, **columns}))
    tokenizer, proxy = chat_tokenizer(QWEN_3), place.child("proxy")
    tokenizer.save_pretrained(str(Path(proxy.uri) / TOKENIZER))
    for step in (1, 2):
        model = make("llama", step)
        model.resize_token_embeddings(len(tokenizer))
        keep_checkpoint(proxy, step, model, tokenizer)
    return draft.publish({"rows": 20, "pool": 16}), proxy, tokenizer


def job_of(scored: tuple[Artifact, Storage, Any], scratch: Storage, **trajectories: Any) -> ScoringJob:
    config = RunConfig(
        name="alone",
        examples={"dataset": "none"},
        proxy={"model": "none", "max_tokens": 120},
        selection={"budget": 1},
        target={"model": "none"},
        trajectories={"tokens_per_batch": 300, **trajectories},
    )
    return ScoringJob.of(config, scored[0], scored[1], [1, 2], scratch, are_all=True)


def score(job: ScoringJob, work: Storage, groups: list[tuple[str, list[str]]]) -> None:
    """Units as a worker does them: parts under some models, each time by another worker."""
    for part, models in groups:
        done = Scorer(job, work, Workers(1, 1, 0, 1), len(models))
        result = done({"part": [part], "models": [" ".join(models)], "units": [len(models)]})
        assert result["error"] == [""], result


def built(job: ScoringJob, place: Path, groups: list[tuple[str, list[str]]]) -> Artifact:
    draft = Draft.open(Storage(str(place)), Key("trajectories", 1, {}, {}))
    work = job.work(draft.shared)
    score(job, work, groups)
    return draft.publish(join_units(job, work, draft) | {"num_checkpoints": 2, "steps": [1, 2]})


def all_units(job: ScoringJob) -> list[tuple[str, list[str]]]:
    return [(part, [*job.steps, *job.beside]) for part in job.parts.examples.parts()]


def digests(place: Path, pattern: str = "*.parquet") -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(place.glob(pattern))}


def test_the_stage_writes_statistics_beside_the_same_losses_in_the_same_bytes_however_it_was_interrupted(scored, tmp_path):
    jobs = {name: job_of(scored, Storage(str(tmp_path / name)), statistics=name != "plain") for name in ("plain", "one", "two")}
    without, whole = (built(jobs[name], tmp_path / name, all_units(jobs[name])) for name in ("plain", "one"))
    first, second = jobs["two"].steps
    parts = scored[0].parts()
    pieces = [(parts[1], [second]), (parts[0], [first]), (parts[1], [first]), (parts[0], [second])]
    assert built(jobs["two"], tmp_path / "two", pieces).manifest["files"] == whole.manifest["files"]
    for part in parts:
        plain, rich = without.read_table(part), whole.read_table(part)
        assert rich.schema.names == ["example_id", "source", "losses", *STATISTICS, "num_response_tokens"]
        assert rich.select(plain.schema.names).equals(plain)
        for name in STATISTICS:
            assert rich.schema.field(name).type == pa.list_(pa.float32(), 2)
            assert np.isfinite(losses_of(rich, name)).all()
        tokens = jobs["one"].parts.read(part)
        labels = token_losses(last_model(scored[2]), tokens.tokens)
        expected = [
            by_hand([loss for row in np.flatnonzero(tokens.owners == n) for loss in labels[row]]) for n in range(len(rich))
        ]
        found = [losses_of(rich, name)[:, 1] for name in ("losses", *STATISTICS)]
        np.testing.assert_allclose(np.stack(found, 1), expected, atol=1e-5)


def test_units_without_statistics_are_not_taken_for_units_with_them(scored, tmp_path):
    scratch = Storage(str(tmp_path))
    folders = {job_of(scored, scratch, statistics=value).work(scratch).uri for value in (True, False)}
    assert len(folders) == 2


# --- the last checkpoint alone -------------------------------------------------------------------------------------


def last_model(tokenizer: PreTrainedTokenizerBase) -> torch.nn.Module:
    model = make("llama", 2)
    model.resize_token_embeddings(len(tokenizer))
    return model


def hidden_means(model: torch.nn.Module, tokens: TokenRows, owners: np.ndarray) -> np.ndarray:
    """Position-weighted means of the last hidden states, one row at a time by transformers' own outputs."""
    sums, weights = np.zeros((owners.max() + 1, 32)), np.zeros(owners.max() + 1)
    for row, owner in enumerate(owners):
        ids = torch.from_numpy(tokens[row][0].astype(np.int64))[None]
        with torch.no_grad():
            hidden_LH = model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0].double().numpy()
        places_L = np.arange(1, len(hidden_LH) + 1)
        sums[owner] += (hidden_LH * places_L[:, None]).sum(0)
        weights[owner] += places_L.sum()
    return sums / weights[:, None]


def test_the_last_checkpoint_gives_losses_without_prompts_and_embeddings_beside_the_same_losses(scored, tmp_path):
    names = {"plain": {}, "beside": {"without_prompt": True, "embeddings": True}}
    jobs = {name: job_of(scored, Storage(str(tmp_path / name)), **options) for name, options in names.items()}
    plain, rich = (built(job, tmp_path / name, all_units(job)) for name, job in jobs.items())
    job, tokenizer, (examples, _, _) = jobs["beside"], scored[2], scored
    assert len(job.units) == 2 * 4
    again = built(job_of(scored, Storage(str(tmp_path / "again")), **names["beside"]), tmp_path / "again", all_units(job)[::-1])
    assert again.manifest["files"] == rich.manifest["files"]
    model = last_model(tokenizer)
    for part in examples.parts():
        table, read = rich.read_table(part), job.parts.read(part)
        assert table.schema.names == [*plain.read_table(part).schema.names, "loss_without_prompt", "embedding"]
        assert table.select(plain.read_table(part).schema.names).equals(plain.read_table(part))
        assert table.schema.field("loss_without_prompt").type == pa.float32()
        assert table.schema.field("embedding").type == pa.list_(pa.float32(), 32)
        found_NH = np.stack(table["embedding"].to_numpy(zero_copy_only=False))
        np.testing.assert_allclose(found_NH, hidden_means(model, read.tokens, read.owners), atol=1e-5)
    texts = examples.read_table("part-00000.parquet")
    losses = dict(
        zip(*(rich.read_table("part-00000.parquet")[n].to_pylist() for n in ("example_id", "loss_without_prompt")), strict=True)
    )
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    for row in (1, 2, 4):  # pairs
        response = tokenizer(texts["response"][row].as_py(), add_special_tokens=False)["input_ids"]
        ids = np.array([begin, *response, tokenizer.eos_token_id][:121], np.int32)
        alone = TokenRows.of([(ids, np.arange(len(ids)) > 0)])
        assert losses[f"id-0-{row}"] == pytest.approx(by_hand(token_losses(model, alone)[0])[0], abs=1e-5)
    table = rich.read_table("validation.parquet")
    assert table.schema.names == ["example_id", "source", "embedding"]
    assert table["example_id"].to_pylist() == ["id-1-7", "id-1-8"]
    assert table["source"].to_pylist() == ["t", "s"]
    assert "validation.parquet" not in plain.manifest["files"]
    assert read_trajectories(str(tmp_path / "beside" / "trajectories")).losses_NT.shape == (16, 2)


def test_without_prompts_every_answer_stands_alone_and_keeps_its_labels(scored):
    tokenizer = scored[2]
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    marks = [np.array([0, 0, 1, 1, 0, 1], bool), np.array([0, 1], bool), np.array([0, 1, 0, 0, 1, 1], bool)]
    tokens = TokenRows.of([(np.arange(10, 10 + len(one), dtype=np.int32), one) for one in marks])
    alone, owners = without_prompts(tokenizer, tokens, np.array([0, 1, 1]))
    assert [alone[row][0].tolist() for row in range(len(alone))] == [
        *([begin, 12, 13], [begin, 15]),
        *([begin, 11], [begin, 11], [begin, 14, 15]),
    ]
    assert owners.tolist() == [0, 0, 1, 1, 1]
    np.testing.assert_array_equal(np.bincount(owners, alone.num_labels), [3, 4])


def test_checkpoints_that_are_scored_during_the_training_have_no_last_one_yet(scored, tmp_path):
    job = job_of(scored, Storage(str(tmp_path)), without_prompt=True, embeddings=True)
    early = ScoringJob.of(job.config, scored[0], scored[1], [1], Storage(str(tmp_path)))
    assert not early.beside
    assert [name.rpartition("-")[2] for name in job.beside] == ["beside", "validation"]
    assert early.work(Storage(str(tmp_path))).uri == job.work(Storage(str(tmp_path))).uri


# --- recording -----------------------------------------------------------------------------------------------------


def profiles(num_rows: int, num_points: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Losses and statistics: groups that differ in their statistics, under a level that says nothing of them."""
    rng = np.random.default_rng(seed)
    level = rng.gamma(4, 0.5, (num_rows, 1)) * np.linspace(1, 0.6, num_points)
    kinds = rng.integers(0, 3, num_rows)[:, None]
    noise = [rng.normal(0, 0.03, (num_rows, num_points)) for _ in range(4)]
    values = {
        "losses": level + noise[0],
        "deviations": np.array([0.2, 1.0, 1.8])[kinds] + noise[1],
        "first_thirds": level + np.array([1.0, 0.0, -1.0])[kinds] + noise[2],
        "last_thirds": level - np.array([1.0, 0.0, -1.0])[kinds] + noise[3],
    }
    return {name: np.asarray(value, np.float32) for name, value in values.items()}


def ids_of(num_rows: int) -> list[str]:
    return [f"row-{row:06d}" for row in range(num_rows)]


def write(place: Path, values: dict[str, np.ndarray], names: Sequence[str] = ("losses", *STATISTICS)) -> str:
    """Somebody's Parquet file with these columns."""
    num_rows = len(values["losses"])
    table = trajectories_table(
        ids_of(num_rows),
        values["losses"],
        ["web", "code"] * (num_rows // 2),
        np.ones(num_rows, np.int32),
        {name: values[name] for name in names if name != "losses"},
    )
    place.mkdir(parents=True)
    pq.write_table(table, place / "part.parquet")
    return str(place / "part.parquet")


def test_recorded_statistics_are_columns_of_the_store_in_the_order_of_ids_and_steps(tmp_path):
    values = profiles(6, 3)
    order = np.random.default_rng(0).permutation(6)
    for point, step in enumerate((0, 5, 10)):
        for some in (order[:4], order[4:]):
            record_losses(
                tmp_path / "own",
                step,
                [ids_of(6)[row] for row in some],
                values["losses"][some, point],
                statistics={name: torch.from_numpy(values[name][some, point]) for name in STATISTICS},
            )
    table = finish_recording(tmp_path / "own").read_table("part-00000.parquet")
    for name, expected in values.items():
        np.testing.assert_array_equal(losses_of(table, name), expected)
    found = read_trajectories(str(tmp_path / "own"), statistics=True)
    assert {name: value.tobytes() for name, value in found.statistics.items()} == {n: values[n].tobytes() for n in STATISTICS}


def test_statistics_that_are_not_whole_are_refused_while_recording_or_finishing(tmp_path):
    values = {name: [1.0, 2.0] for name in STATISTICS}
    with pytest.raises(ConfigError, match="all of them; found deviations"):
        record_losses(tmp_path, 1, ["a", "b"], [1, 2], statistics={"deviations": [1, 2]})
    with pytest.raises(DataError, match=r"last_thirds of shape \(3,\) for 2 example_ids"):
        record_losses(tmp_path, 1, ["a", "b"], [1, 2], statistics=values | {"last_thirds": [1, 2, 3]})
    with pytest.raises(DataError, match=r"deviations: NaN, infinite.*\bb\b"):
        record_losses(tmp_path, 1, ["a", "b"], [1, 2], statistics=values | {"deviations": [1, np.nan]})
    record_losses(tmp_path, 1, ["a", "b"], [1, 2], statistics=values)
    record_losses(tmp_path, 2, ["a", "b"], [1, 2])
    with pytest.raises(DataError, match="step 2 lacks deviations, first_thirds, last_thirds, which step 1 has"):
        finish_recording(tmp_path)
    shutil.rmtree(tmp_path / ".work/recording/step-000002")
    record_losses(tmp_path, 2, ["a"], [1], statistics={name: [1.0] for name in STATISTICS})
    record_losses(tmp_path, 2, ["b"], [1])
    with pytest.raises(DataError, match=r"deviations are missing for example_id .*\bb\b"):
        finish_recording(tmp_path)


# --- profiles ------------------------------------------------------------------------------------------------------


def test_a_profile_is_four_blocks_of_mean_variance_one_each_in_the_shape_that_it_was_recorded_in():
    values = profiles(3_000, 5)
    sample = on_grid(np.concatenate(list(values.values()), axis=1))
    features = Features.of("profile", sample, Spectrum.of(sample[:, :5]))
    found = features(sample)
    assert found.shape == (3_000, features.num_features) == (3_000, 20)
    for block, value in enumerate(values.values()):
        part = found[:, 5 * block : 5 * block + 5]
        assert part.var(axis=0, dtype=np.float64).mean() == pytest.approx(1, abs=1e-5)
        scale = np.sqrt(value.var(axis=0, dtype=np.float64).mean())
        np.testing.assert_allclose(part - part[0], (value - value[0]) / scale, atol=1e-4)
    assert np.array_equal(on_grid(found), found)
    order = np.random.default_rng(0).permutation(3_000)
    assert features(sample[order]).tobytes() == found[order].tobytes()


def test_a_statistic_that_does_not_vary_changes_nothing():
    values = profiles(400, 3)
    values["deviations"][:] = 0
    found = cluster(values.pop("losses"), statistics=values, features="profile", num_clusters=4)
    assert np.isfinite(found.distances_N).all()
    assert found.diagnostics["features"] == "profile"


@pytest.mark.parametrize("seed", range(3))
def test_profiles_find_groups_that_mean_losses_do_not_show(seed):
    values = profiles(1_500, 4, seed)
    kinds_N = np.digitize(values["deviations"][:, 0], [0.6, 1.4])
    losses = values.pop("losses")
    by_profile = cluster(losses, statistics=values, features="profile", num_clusters=9)
    by_losses = cluster(losses, num_clusters=9)
    tells = [normalized_mutual_info_score(kinds_N, found.cluster_ids_N) for found in (by_profile, by_losses)]
    assert tells[0] > 0.5
    assert tells[1] < 0.05
    assert by_profile.diagnostics["effective_dimension_of_features"] > by_losses.diagnostics["effective_dimension_of_features"]
    assert by_losses.diagnostics["effective_dimension_of_features"] == by_losses.diagnostics["effective_dimension"]
    assert by_profile.centroids_KT.shape == (9, 4)
    for group in range(9):
        np.testing.assert_allclose(by_profile.centroids_KT[group], losses[by_profile.cluster_ids_N == group].mean(0), atol=1e-5)


def chosen(source: str, place: Path, machines: GroupingConfig | None = None, **recipe: Any) -> Path:
    grouping = ClusteringConfig(**{"num_clusters": 7, "num_iterations": 5} | recipe)
    select_trajectories(source, str(place), grouping, SelectionConfig(budget=100), machines or GroupingConfig())
    return place


def test_columns_that_features_do_not_use_change_no_byte_of_the_groups(tmp_path):
    values = profiles(2_000, 4)
    rich, plain = write(tmp_path / "rich", values), write(tmp_path / "plain", values, ["losses"])
    for features in ("raw", "whitened"):
        found = [chosen(source, tmp_path / f"{features}-{i}", features=features) for i, source in enumerate((rich, plain))]
        assert digests(found[0] / "clustering") == digests(found[1] / "clustering")
        summaries = [Artifact.read(Storage(str(place / "clustering"))).summary for place in found]
        assert summaries[0] == summaries[1]


def test_a_store_without_statistics_says_which_are_missing_and_how_to_record_them(tmp_path):
    source = write(tmp_path / "some", profiles(200, 3), ["losses", "deviations"])
    with pytest.raises(ConfigError, match=r"no first_thirds, last_thirds\. Record them: trajectories\.statistics=true"):
        chosen(source, tmp_path / "out", features="profile")
    with pytest.raises(ConfigError, match=r"no deviations, first_thirds, last_thirds"):
        cluster(np.ones((5, 2)), num_clusters=2, features="profile")
    rest = {"examples": {"dataset": "x"}, "proxy": {"model": "x"}, "target": {"model": "x"}, "selection": {"budget": 1}}
    with pytest.raises(ValueError, match=r"clustering\.features=profile needs what trajectories\.statistics=true records"):
        RunConfig(name="x", clustering={"features": "profile"}, **rest)


def test_a_file_and_arrays_of_the_same_numbers_give_the_same_subset(tmp_path):
    values = profiles(900, 3)
    place = chosen(write(tmp_path / "file", values), tmp_path / "out", features="profile", stratify_by=None)
    table = pq.read_table(place / "selection" / "selected.parquet")
    losses, sources = values.pop("losses"), ["web", "code"] * 450
    options = {"num_clusters": 7, "num_iterations": 5, "features": "profile", "stratify_by": None, "budget": 100}
    found = select(losses, statistics=values, example_ids=ids_of(900), sources=sources, **options)  # type: ignore[arg-type]
    assert sorted(table["example_id"].to_pylist()) == found.example_ids.to_pylist()
    with pytest.raises(ConfigError, match="statistics: give deviations, first_thirds, last_thirds, found deviations"):
        select(losses, statistics={"deviations": losses}, **options)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"deviations: of shape \(900, 2\) beside losses of shape \(900, 3\)"):
        select(losses, statistics=values | {"deviations": losses[:, :2]}, **options)  # type: ignore[arg-type]


def test_spread_draws_by_profiles(tmp_path):
    source, grouping = write(tmp_path / "file", profiles(600, 3)), ClusteringConfig(num_clusters=3, features="profile")
    found = select_trajectories(source, str(tmp_path / "out"), grouping, SelectionConfig(budget=30, draw="spread"))
    assert found.summary["rows"] == 30


def test_memory_disk_and_any_number_of_threads_give_the_same_bytes_of_profiles(tmp_path, monkeypatch):
    source = write(tmp_path / "file", profiles(66_000, 3))
    places = [
        chosen(source, tmp_path / engine, GroupingConfig(engine=engine), features="profile", num_restarts=1)  # type: ignore[arg-type]
        for engine in ("memory", "disk")
    ]
    assert digests(places[0] / "clustering") == digests(places[1] / "clustering")
    values = {name: value[:40_000] for name, value in profiles(66_000, 3).items()}
    losses = values.pop("losses")
    one, two = (
        cluster(losses, statistics=values, features="profile", num_clusters=5, num_threads=threads) for threads in (1, 2)
    )
    assert one.distances_N.tobytes() == two.distances_N.tobytes()
    assert one.cluster_ids_N.tobytes() == two.cluster_ids_N.tobytes()


@pytest.mark.slow
def test_ray_actors_give_the_same_bytes_of_profiles(ray_session, tmp_path):
    source = write(tmp_path / "file", profiles(66_000, 3))
    places = [
        chosen(source, tmp_path / engine, GroupingConfig(engine=engine), features="profile", num_restarts=1)  # type: ignore[arg-type]
        for engine in ("memory", "ray")
    ]
    assert digests(places[0] / "clustering") == digests(places[1] / "clustering")


# --- points --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", ["raw", "reduction", "shape", "whitened", "profile"])
def test_k_means_sees_the_points_that_are_named_as_if_there_were_no_others(features):
    values = profiles(1_200, 5)
    losses, points = values.pop("losses"), [0, 2, 4]
    some = cluster(losses, statistics=values, features=features, points=[-1, 0, 2], num_clusters=6)
    only = {name: value[:, points] for name, value in values.items()}
    alone = cluster(losses[:, points], statistics=only, features=features, num_clusters=6)
    assert some.centroids_KT.shape == (6, 5)
    assert normalized_mutual_info_score(some.cluster_ids_N, alone.cluster_ids_N) == pytest.approx(1)
    assert some.inertia == alone.inertia
    assert some.diagnostics["points"] == points
    assert some.diagnostics["principal_components"] == alone.diagnostics["principal_components"]


def test_all_points_are_the_same_as_none_named():
    losses = profiles(500, 3)["losses"]
    named, plain = (cluster(losses, points=points, num_clusters=5) for points in ([2, 0, 1], None))
    assert named.centroids_KT.tobytes() == plain.centroids_KT.tobytes()
    assert named.summary() == plain.summary()


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([0, 3], r"clustering\.points: no point 3 in trajectories of 3 points\. Give 0 to 2"),
        ([-4], r"clustering\.points: no point -4 in trajectories of 3 points"),
        ([1, -2], r"clustering\.points: 1 and -2 are the same point of 3"),
        ([], r"one at least and none twice"),
        ([1, 1], r"one at least and none twice"),
    ],
)
def test_points_that_are_not_there_or_named_twice_are_refused(points, message):
    with pytest.raises(ConfigError, match=message):
        cluster(np.random.default_rng(0).random((20, 3)), num_clusters=2, points=points)


def test_features_of_one_point_need_more():
    with pytest.raises(ConfigError, match="'reduction' needs trajectories of two points"):
        cluster(np.random.default_rng(0).random((20, 3)), num_clusters=2, points=[1], features="reduction")
    assert Measured.of("profile", 12, [0, -1]).width == 8


# --- diagnostics ---------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), min_size=1, max_size=60))
@settings(max_examples=150, deadline=None)
def test_information_and_purity_are_as_scikit_learn_and_a_count_have_them(pairs):
    left, right = (np.array(values, np.int32) for values in zip(*pairs, strict=True))
    table = diagnostics.contingency(left, right, (6, 4))
    found = diagnostics.normalized_mutual_information(table)
    assert found == pytest.approx(normalized_mutual_info_score(left, right), abs=2e-6)
    commonest = sum(np.bincount(right[left == group]).max() for group in set(left.tolist()))
    assert diagnostics.purity(table) == pytest.approx(commonest / len(pairs))


def test_agreement_with_sources_is_told_where_groups_never_saw_them(tmp_path):
    source = write(tmp_path / "file", profiles(400, 3))
    found = {}
    for by in (None, "source"):
        place = chosen(source, tmp_path / str(by), stratify_by=by)
        found[by] = Artifact.read(Storage(str(place / "clustering"))).summary["diagnostics"]
    assert 0 <= found[None]["information_on_source"] <= 0.2
    assert 0.5 <= found[None]["purity_by_source"] <= 0.7
    assert found["source"]["information_on_source"] is found["source"]["purity_by_source"] is None
    assert cluster(profiles(50, 2)["losses"], num_clusters=2).diagnostics["information_on_source"] is None
