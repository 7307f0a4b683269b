"""The whole flow, once and real: a corpus of three planted kinds of task, from rows to a report, and what a user may rely on.

Every number that a run leaves is computed again here by other means: losses with transformers at batch one, quotas and
draws by the words of METHOD.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import random
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import s2l_ray
from s2l_ray.config import RunConfig, parse_config
from s2l_ray.errors import ArtifactError, ConfigError
from s2l_ray.pipeline import STAGES, decide, run
from s2l_ray.selection.alone import select_trajectories
from s2l_ray.selection.export import export_subset
from s2l_ray.storage.artifacts import Artifact
from s2l_ray.storage.layout import is_stage_file
from s2l_ray.storage.node_files import NodeFiles
from s2l_ray.storage.places import Storage
from tests.building import literal_priority

STAGE_NAMES = ["examples", "proxy", "trajectories", "clustering", "selection", "target", "evaluation"]
SCRIPT = "<script>alert('corpus')</script>"
NUM_ROWS, NUM_CLUSTERS, BUDGET, SEED, MAX_TOKENS = 264, 6, 0.25, 5, 96


# --- the planted corpus and its run --------------------------------------------------------------------------------


def corpus_rows() -> list[dict[str, Any]]:
    """Three sources in turn: `constant` has one answer, `copy` repeats a word of the prompt, `digits` cannot be learned."""
    generator = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    rows = []
    for i in range(NUM_ROWS):
        word = "".join(generator.choices(letters, k=6))
        source = ("constant", "copy", "digits")[i % 3]
        answer = {"constant": "yes", "copy": word, "digits": "".join(generator.choices("0123456789", k=8))}[source]
        rows.append(
            {
                "id": f"row-{i:03d}",
                "prompt": f"{source} {SCRIPT} {word}: ",
                "response": f"The answer is {answer}",
                "source": source,
                "level": i,
                "weight": i / 8,  # a name that the selection wants, too
            }
        )
    return rows


def write_corpus(path: Path) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in corpus_rows()))
    return path


def config_values(corpus: Path) -> dict[str, Any]:
    """A config for two CPUs and seconds: one worker of one CPU for every stage."""

    def scratch(layers: int, hidden: int) -> dict[str, Any]:
        shape = {"architecture": "gpt_neox", "layers": layers, "hidden": hidden, "heads": 2, "max_positions": 128}
        return {"scratch": shape}

    training = {"global_batch_size": 16, "learning_rate": 1.0e-2, "max_tokens": MAX_TOKENS}
    one = {"num_workers": 1, "cpus_per_worker": 1}
    return {
        "name": "planted",
        "examples": {
            "dataset": str(corpus),
            "id_field": "id",
            "source_field": "source",
            "held_out_fraction": 0.15,
            "rows_per_part": 64,
        },
        "proxy": {
            "model": scratch(1, 16),
            "tokenizer": {"train": "bpe", "vocab_size": 300},
            "epochs": 2,
            "num_checkpoints": 3,
            "include_untrained": True,
            **training,
        },
        "clustering": {"num_clusters": NUM_CLUSTERS, "stratify_by": None, "seed": SEED},
        "selection": {"budget": BUDGET, "seed": SEED},
        "target": {"model": scratch(2, 32), "epochs": 2, **training},
        "evaluation": {
            "random_control": True,
            "answer_pattern": "The answer is (.+)",
            "max_generations": 2,
            "max_new_tokens": 8,
        },
        "machines": dict.fromkeys(("examples", "proxy", "trajectories", "target", "evaluation"), one),
    }


@dataclass(frozen=True)
class Finished:
    """A finished run and what it was made from."""

    place: Path
    corpus: Path
    values: dict[str, Any]
    artifacts: dict[str, Artifact]

    def config(self, **sections: dict[str, Any]) -> RunConfig:
        """The run's config with some values of some sections changed."""
        return parse_config(self.values | {name: {**self.values[name], **new} for name, new in sections.items()})

    def json(self, name: str) -> Any:
        return json.loads((self.place / name).read_text())


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny matrices: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def finished(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("planted")
    corpus = write_corpus(folder / "corpus.jsonl")
    values = config_values(corpus)
    place = folder / "run"
    return Finished(place, corpus, values, run(parse_config(values), str(place)))


def table_of(folder: Path, prefix: str = "part-") -> pa.Table:
    """All parts of a stage, read with pyarrow alone."""
    return pa.concat_tables([pq.read_table(path) for path in sorted(folder.glob(f"{prefix}*.parquet"))])


def published(place: Path) -> dict[str, tuple[int, bytes]]:
    """Every file that is a result: time of its last change and its hash. The report is derived and may be rebuilt."""
    files = [p for p in place.rglob("*") if p.is_file() and p.relative_to(place).parts[0] not in (".work", "report")]
    return {str(p.relative_to(place)): (p.stat().st_mtime_ns, hashlib.sha256(p.read_bytes()).digest()) for p in files}


# --- what METHOD says, literally -----------------------------------------------------------------------------------


def literal_quotas(sizes: list[int], budget: int) -> list[int]:
    """Water-filling: groups by (size, id) ascending, each takes what is left over the groups left, or all it has."""
    quotas = [0] * len(sizes)
    for visited, group in enumerate(sorted(range(len(sizes)), key=lambda k: (sizes[k], k))):
        share = (budget - sum(quotas)) // (len(sizes) - visited)
        quotas[group] = sizes[group] if sizes[group] <= share else share
    return quotas


def literal_order(groups: dict[str, int], seed: int) -> list[str]:
    """All ids in the one order: rank inside the group, larger group first, larger group id first."""
    sizes = Counter(groups.values())
    ranks: dict[str, int] = {}
    for group in sizes:
        members = [example_id for example_id, its in groups.items() if its == group]
        ranks |= {i: rank for rank, i in enumerate(sorted(members, key=lambda i: literal_priority(i, seed)))}
    return sorted(groups, key=lambda i: (ranks[i], -sizes[groups[i]], -groups[i]))


def literal_losses(folder: Path, rows: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """transformers' own loss of every row at batch one, prompt masked and EOS included; and the labels of each."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    losses, counts = [], []
    for row in rows:
        prompt = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
        response = [*tokenizer(row["response"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        ids, labels = torch.tensor([prompt + response]), torch.tensor([[-100] * len(prompt) + response])
        assert ids.shape[1] <= MAX_TOKENS
        with torch.no_grad():
            losses.append(float(model(input_ids=ids, labels=labels).loss))
        counts.append(len(response))
    return np.array(losses), np.array(counts)


def groups_of(place: Path) -> dict[str, int]:
    """Example id -> its group."""
    table = table_of(place / "clustering", "assignments-")
    return dict(zip(table["example_id"].to_pylist(), table["cluster_id"].to_pylist(), strict=True))


# --- a finished run ------------------------------------------------------------------------------------------------


def test_all_eight_stages_are_finished_and_say_so_in_manifests_of_the_contract(finished):
    assert [stage.name for stage in STAGES] == list(finished.artifacts) == STAGE_NAMES
    keys = ["schema", "stage", "fingerprint", "recipe", "inputs", "files", "summary", "provenance"]
    for name in STAGE_NAMES:
        manifest = finished.json(f"{name}/manifest.json")
        assert list(manifest) == keys
        assert (manifest["schema"], manifest["stage"]) == ("s2l_ray/1", name)
        assert {"rows", "dropped"} <= manifest["summary"].keys()
        assert {"created", "seconds", "git", "versions", "machines"} <= manifest["provenance"].keys()
    assert (finished.place / "report" / "index.html").is_file()


@pytest.mark.parametrize("name", STAGE_NAMES)
def test_a_manifest_is_written_last_and_lists_every_file_with_its_size_and_hash(finished, name):
    folder = finished.place / name
    files = finished.json(f"{name}/manifest.json")["files"]
    found = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file() and p.name != "manifest.json"}
    assert found.keys() == files.keys()
    for path, record in files.items():
        assert is_stage_file(name, path), "what is begun from other inputs is removed by its name"
        data = found[path].read_bytes()
        assert record == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        assert found[path].stat().st_mtime_ns <= (folder / "manifest.json").stat().st_mtime_ns


def test_run_json_has_the_resolved_config_at_its_top_level(finished):
    values = finished.json("run.json")
    sections = {name: values[name] for name in RunConfig.model_fields}
    assert parse_config(sections) == finished.config()
    assert values["clustering"]["num_iterations"] == 20, "defaults are written out"


def test_every_row_of_the_corpus_is_in_the_pool_or_held_out_and_keeps_its_columns(finished):
    parts = table_of(finished.place / "examples")
    assert {row["example_id"]: row["original"] for row in parts.to_pylist()} == {row["id"]: row for row in corpus_rows()}
    assert parts["example_id"].to_pylist() == sorted(parts["example_id"].to_pylist())
    splits = Counter(parts["split"].to_pylist())
    summary = finished.artifacts["examples"].summary
    assert splits == {"pool": summary["pool"], "held_out": summary["held_out"]}
    assert min(splits.values()) > 10
    assert len(list((finished.place / "examples").glob("part-*"))) == math.ceil(NUM_ROWS / 64)


def test_checkpoints_follow_the_steps_of_the_recipe(finished):
    num_pool = finished.artifacts["examples"].summary["pool"]
    total = num_pool * 2 // 16
    steps = [0, *(round(i * total / 3) for i in (1, 2, 3))]
    assert finished.artifacts["proxy"].summary["steps"] == steps
    assert sorted(p.name for p in (finished.place / "proxy").glob("step-*")) == [f"step-{step:06d}" for step in steps]
    for step in steps:
        record = finished.json(f"proxy/step-{step:06d}/checkpoint.json")
        assert record["step"] == step
        assert record["files"]


def test_losses_equal_an_independent_recomputation_from_the_checkpoints(finished):
    table = table_of(finished.place / "trajectories")
    corpus = {row["id"]: row for row in corpus_rows()}
    rows = [corpus[i] for i in table["example_id"].to_pylist()]
    found_NT = np.array(table["losses"].to_pylist())
    folders = sorted((finished.place / "proxy").glob("step-*"))
    expected = [literal_losses(folder, rows) for folder in folders]
    np.testing.assert_allclose(found_NT, np.stack([losses for losses, _ in expected], axis=1), atol=1e-4)
    np.testing.assert_array_equal(table["num_response_tokens"].to_pylist(), expected[0][1])
    assert table["losses"].type == pa.list_(pa.float32(), 4)
    assert finished.artifacts["trajectories"].summary["steps"] == finished.artifacts["proxy"].summary["steps"]


def test_trajectories_hold_every_pool_example_once_and_no_held_out_one(finished):
    parts = table_of(finished.place / "examples").to_pylist()
    pool = [row["example_id"] for row in parts if row["split"] == "pool"]
    assert table_of(finished.place / "trajectories")["example_id"].to_pylist() == pool


def test_what_was_planted_shows_in_the_losses(finished):
    table = table_of(finished.place / "trajectories")
    sources = np.array(table["source"].to_pylist())
    last = np.array(table["losses"].to_pylist())[:, -1]
    assert last[sources == "constant"].mean() < last[sources == "copy"].mean()
    assert last[sources == "constant"].mean() < last[sources == "digits"].mean()


def test_the_budget_is_exact_and_the_control_has_the_same_size(finished):
    num_pool = finished.artifacts["trajectories"].summary["rows"]
    for file in ("selected.parquet", "random.parquet"):
        ids = pq.read_table(finished.place / "selection" / file)["example_id"].to_pylist()
        assert len(set(ids)) == len(ids) == math.floor(BUDGET * num_pool)


@pytest.mark.parametrize("file", ["selected.parquet", "random.parquet"])
def test_selected_rows_are_rows_of_the_corpus_unchanged_with_our_columns_behind_them(finished, file):
    corpus = {row["id"]: row for row in corpus_rows()}
    table = pq.read_table(finished.place / "selection" / file)
    # The corpus has a column `weight`: it stays, and ours is underscored.
    assert table.column_names == [*corpus_rows()[0], "example_id", "cluster_id", "_weight"]
    groups = groups_of(finished.place)
    for row in table.to_pylist():
        assert {name: row[name] for name in corpus_rows()[0]} == corpus[row["example_id"]]
        assert row["cluster_id"] == groups[row["example_id"]]


def test_quotas_are_the_water_filling_of_the_group_sizes_and_weights_their_ratio(finished):
    groups = groups_of(finished.place)
    sizes = [Counter(groups.values())[k] for k in range(NUM_CLUSTERS)]
    table = pq.read_table(finished.place / "selection" / "selected.parquet")
    quotas = literal_quotas(sizes, len(table))
    assert [Counter(table["cluster_id"].to_pylist())[k] for k in range(NUM_CLUSTERS)] == quotas
    assert sum(quotas) == len(table)
    for row in table.to_pylist():
        assert row["_weight"] == sizes[row["cluster_id"]] / quotas[row["cluster_id"]]


def test_the_selection_is_the_first_of_the_one_order_and_the_control_the_lowest_priorities(finished):
    groups = groups_of(finished.place)
    selected = pq.read_table(finished.place / "selection" / "selected.parquet")["example_id"].to_pylist()
    assert set(selected) == set(literal_order(groups, SEED)[: len(selected)])
    control = pq.read_table(finished.place / "selection" / "random.parquet")["example_id"].to_pylist()
    assert set(control) == set(sorted(groups, key=lambda i: literal_priority(i, f"random-{SEED}"))[: len(control)])


def test_every_example_is_in_the_group_of_the_nearest_centroid(finished):
    centroids_KT = np.load(finished.place / "clustering" / "centroids.npy").astype(np.float64)
    assert centroids_KT.shape == (NUM_CLUSTERS, 4)
    losses_NT = np.array(table_of(finished.place / "trajectories")["losses"].to_pylist())
    distances_NK = np.linalg.norm(losses_NT[:, None] - centroids_KT[None], axis=2)
    found = np.array(table_of(finished.place / "clustering", "assignments-")["cluster_id"].to_pylist())
    # float32 in faiss, float64 here: the group found is as near as the nearest, to rounding.
    np.testing.assert_allclose(distances_NK[np.arange(len(found)), found], distances_NK.min(axis=1), atol=1e-3)


@pytest.mark.parametrize(("folder", "model"), [("model", "selected"), ("random_model", "random")])
def test_the_target_loads_and_its_held_out_loss_is_what_the_metrics_say(finished, folder, model):
    held_out = {row["example_id"] for row in table_of(finished.place / "examples").to_pylist() if row["split"] == "held_out"}
    rows = [row for row in corpus_rows() if row["id"] in held_out]
    losses, counts = literal_losses(finished.place / "target" / folder, rows)
    metrics = finished.json("evaluation/metrics.json")[model]
    assert metrics["loss_per_token"] == pytest.approx(float((losses * counts).sum() / counts.sum()), abs=1e-4)
    for source, loss in metrics["loss_by_source"].items():
        mine = np.array([row["source"] == source for row in rows])
        assert loss == pytest.approx(float((losses * counts)[mine].sum() / counts[mine].sum()), abs=1e-4)


def test_fine_tuning_lowers_the_held_out_loss(finished):
    metrics = finished.json("evaluation/metrics.json")
    for model in ("selected", "random"):
        assert metrics[model]["loss_per_token"] < metrics["untrained"]["loss_per_token"] - 0.5


def test_published_stages_hold_safetensors_and_no_pickles(finished):
    files = [p for name in STAGE_NAMES for p in (finished.place / name).rglob("*") if p.is_file()]
    assert not [p for p in files if p.suffix in {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}]
    for folder in [*(finished.place / "proxy").glob("step-*"), *(finished.place / "target").glob("*model")]:
        assert (folder / "model.safetensors").is_file()


def test_metrics_have_the_shape_of_the_contract(finished):
    metrics = finished.json("evaluation/metrics.json")
    assert list(metrics) == ["untrained", "selected", "random"]
    for values in metrics.values():
        assert list(values) == ["loss_per_token", "loss_by_source", "loss_macro", "tasks"]
        assert set(values["loss_by_source"]) == {"constant", "copy", "digits"}
        assert values["loss_macro"] == pytest.approx(np.mean(list(values["loss_by_source"].values())))
        for scores in values["tasks"].values():
            assert 0 <= scores["exact_match"] <= 1
    # Random weights are close to a uniform guess over the vocabulary, rounded up to a multiple of 64.
    assert metrics["untrained"]["loss_per_token"] == pytest.approx(math.log(320), abs=0.5)


def test_predictions_are_lines_of_json_that_give_the_scores(finished):
    lines = (finished.place / "evaluation" / "predictions.jsonl").read_text().splitlines()
    predictions = [json.loads(line) for line in lines]
    corpus = {row["id"]: row for row in corpus_rows()}
    wanted = {(model, source): 2 for model in ("untrained", "selected", "random") for source in ("constant", "copy", "digits")}
    assert Counter((row["model"], row["source"]) for row in predictions) == wanted
    for row in predictions:
        original = corpus[row["example_id"]]
        assert (row["prompt"], row["reference"]) == (original["prompt"], original["response"])
        is_right = row["prediction"].strip().lower() == row["reference"].lower()
        assert row["scores"]["exact_match"] == float(is_right)
    metrics = finished.json("evaluation/metrics.json")
    for model, values in metrics.items():
        mine = [row["scores"]["exact_match"] for row in predictions if row["model"] == model]
        assert values["tasks"]["all"] == {"exact_match": np.mean(mine), "rows": 6}


def test_the_report_shows_texts_of_the_corpus_and_runs_none_of_them(finished):
    html = (finished.place / "report" / "index.html").read_text()
    assert SCRIPT not in html
    assert "&lt;script&gt;alert(" in html


def test_nothing_is_left_in_the_scratch_directory_but_its_mark_the_lock_and_the_hashes(finished):
    left = [p for p in (finished.place / ".work").rglob("*") if p.is_file()]
    assert {p.name for p in left} == {"CACHEDIR.TAG", "lock", "corpus_hashes.json"}
    assert not NodeFiles.of(Storage(str(finished.place / ".work")), "").folder.exists(), "nor on the node"


# --- again ---------------------------------------------------------------------------------------------------------


def test_the_same_command_again_reuses_every_stage_quickly_and_rewrites_nothing(finished, caplog):
    before = published(finished.place)
    caplog.set_level(logging.INFO, logger="s2l_ray")
    again = run(finished.config(), str(finished.place))
    assert published(finished.place) == before
    assert again == finished.artifacts
    reused = [r.name.rpartition(".")[2] for r in caplog.records if r.getMessage().startswith("reused (fingerprint ")]
    assert reused == STAGE_NAMES
    # The breakdown's lines: name, duration, share.
    seconds = {r.args[0]: r.args[1] for r in caplog.records if r.args and r.args[0] in STAGE_NAMES}
    assert seconds.keys() == set(STAGE_NAMES)
    assert all(float(spent.removesuffix("s")) < 2 for spent in seconds.values()), seconds


def test_machines_and_prices_are_no_recipe(finished):
    changed = finished.config(machines={"proxy": {"num_workers": 2, "device_batch_size": 4}})
    changed = changed.model_copy(update={"plan": changed.plan.model_copy(update={"num_examples": 9})})
    assert [d.action for d in decide(changed, Storage(str(finished.place)))] == ["reuse"] * 7


def test_another_recipe_in_the_same_directory_is_refused_with_the_changed_field_named(finished):
    before = published(finished.place)
    with pytest.raises(ArtifactError, match=r"clustering\.num_clusters: 6 -> 5") as caught:
        run(finished.config(clustering={"num_clusters": 5}), str(finished.place))
    assert "--reuse" in str(caught.value), "the remedy"
    assert published(finished.place) == before


def test_a_target_that_cannot_be_trained_is_refused_before_the_proxy_is(tmp_path, monkeypatch):
    values = config_values(write_corpus(tmp_path / "corpus.jsonl"))
    (tmp_path / "models").mkdir()
    elsewhere = parse_config(values | {"target": values["target"] | {"model": f"file://{tmp_path}/models/mistyped"}})
    with pytest.raises(ConfigError, match=r"model 'file://.*/mistyped': there is nothing\. Give the URI"):
        run(elsewhere, str(tmp_path / "run"))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"target.lora needs peft"):
        run(parse_config(values | {"target": values["target"] | {"lora": {}}}), str(tmp_path / "run"))
    assert not (tmp_path / "run" / "examples").exists()


def test_a_changed_corpus_is_another_recipe(finished, tmp_path):
    other = tmp_path / "corpus.jsonl"
    other.write_text(finished.corpus.read_text().replace("row-000", "row-999"))
    with pytest.raises(ArtifactError, match=r"examples\.corpus: "):
        run(finished.config(examples={"dataset": str(other)}), str(finished.place))
    # The same content elsewhere is the same corpus.
    other.write_text(finished.corpus.read_text())
    moved = decide(finished.config(examples={"dataset": str(other)}), Storage(str(finished.place)))
    assert {d.action for d in moved} == {"reuse"}


def test_selection_alone_gives_exactly_what_the_pipeline_gave(finished, tmp_path):
    config = finished.config()
    select_trajectories(str(finished.place / "trajectories"), str(tmp_path), config.clustering, config.selection)
    names = sorted(p.name for p in (tmp_path / "clustering").iterdir() if p.name != "manifest.json")
    assert any(name.startswith("assignments-") for name in names)
    for name in names:
        assert (tmp_path / "clustering" / name).read_bytes() == (finished.place / "clustering" / name).read_bytes()
    alone = pq.read_table(tmp_path / "selection" / "selected.parquet")
    ours = pq.read_table(finished.place / "selection" / "selected.parquet")
    for name, same in {"example_id": "example_id", "cluster_id": "cluster_id", "_weight": "weight"}.items():
        assert ours[name].to_pylist() == alone[same].to_pylist()


def test_select_in_python_gives_exactly_what_the_pipeline_gave(finished):
    table = table_of(finished.place / "trajectories")
    order = np.random.default_rng(0).permutation(len(table))
    losses_NT = np.array(table["losses"].to_pylist(), np.float32)[order]
    ids = [table["example_id"][int(row)].as_py() for row in order]
    options = {"num_clusters": NUM_CLUSTERS, "num_restarts": 3}
    selection = s2l_ray.select(losses_NT, example_ids=ids, budget=BUDGET, seed=SEED, **options)
    ours = pq.read_table(finished.place / "selection" / "selected.parquet")
    assert selection.example_ids.to_pylist() == ours["example_id"].to_pylist()
    assert selection.cluster_ids_M.tolist() == ours["cluster_id"].to_pylist()
    assert selection.weights_M.tolist() == ours["_weight"].to_pylist()


def test_the_target_trains_with_the_selections_weights_and_the_control_whose_are_alike_to_the_byte(finished, tmp_path):
    config = finished.config(target={"use_weights": True})
    target = run(config, str(tmp_path), reuse=str(finished.place), until="target")["target"]
    weighted, plain = target.manifest["files"], finished.artifacts["target"].manifest["files"]
    assert weighted["random_model/model.safetensors"] == plain["random_model/model.safetensors"]
    assert weighted["model/model.safetensors"] != plain["model/model.safetensors"]


# --- another run that takes what matches ---------------------------------------------------------------------------


def test_another_k_and_budget_costs_neither_proxy_nor_scoring(finished, tmp_path, monkeypatch):
    def must_not_run(*_: object) -> None:
        raise AssertionError("trained or scored again")

    config = finished.config(clustering={"num_clusters": 4}, selection={"budget": 20})
    actions = {d.stage.name: d.action for d in decide(config, Storage(str(tmp_path)), Storage(str(finished.place)))}
    assert actions == dict.fromkeys(STAGE_NAMES[:3], "reuse") | dict.fromkeys(STAGE_NAMES[3:], "build")
    for name in ("examples.stage.build", "proxy.build", "trajectories.stage.build"):
        monkeypatch.setattr(f"s2l_ray.{name}", must_not_run)
    before = published(finished.place)
    run(config, str(tmp_path), reuse=str(finished.place), until="selection")
    for name in STAGE_NAMES[:3]:
        assert [p.name for p in (tmp_path / name).iterdir()] == ["manifest.json"], "by reference: nothing is copied"
        manifest = json.loads((tmp_path / name / "manifest.json").read_text())
        assert manifest["reference"] == str(finished.place / name)
    groups = groups_of(tmp_path)
    assert set(groups.values()) == set(range(4))
    selected = pq.read_table(tmp_path / "selection" / "selected.parquet")["example_id"].to_pylist()
    assert set(selected) == set(literal_order(groups, SEED)[:20])
    assert published(finished.place) == before
    # And it is an ordinary run from then on, without --reuse.
    assert {d.action for d in decide(config, Storage(str(tmp_path)))} == {"reuse", "build"}


def test_a_smaller_budget_is_contained_in_the_larger_one(finished, tmp_path):
    run(finished.config(selection={"budget": 17}), str(tmp_path), reuse=str(finished.place), until="selection")
    smaller = pq.read_table(tmp_path / "selection" / "selected.parquet")["example_id"].to_pylist()
    larger = pq.read_table(finished.place / "selection" / "selected.parquet")["example_id"].to_pylist()
    assert len(smaller) == 17
    assert set(smaller) < set(larger)


def longest_prefix(order: list[str], tokens: dict[str, int], budget: int) -> set[str]:
    taken: set[str] = set()
    for example_id in order:
        budget -= tokens[example_id]
        if budget < 0:
            break
        taken.add(example_id)
    return taken


def test_a_budget_in_tokens_is_the_longest_prefix_that_fits(finished, tmp_path):
    run(finished.config(selection={"budget": {"tokens": 500}}), str(tmp_path), reuse=str(finished.place), until="selection")
    table = table_of(finished.place / "trajectories")
    tokens = dict(zip(table["example_id"].to_pylist(), table["num_response_tokens"].to_pylist(), strict=True))
    found = set(pq.read_table(tmp_path / "selection" / "selected.parquet")["example_id"].to_pylist())
    assert found == longest_prefix(literal_order(groups_of(finished.place), SEED), tokens, 500)
    assert 0 < len(found) < len(table)


def test_a_budget_in_tokens_counts_with_the_targets_own_tokenizer_and_limit(finished, tmp_path):
    model = finished.place / "target" / "model"
    tokenizer = AutoTokenizer.from_pretrained(model)
    lengths = {
        row["id"]: [len(tokenizer(row[name], add_special_tokens=False)["input_ids"]) for name in ("prompt", "response")]
        for row in corpus_rows()
    }
    limit = max(prompt + response + 1 for prompt, response in lengths.values()) - 4
    tokens = {i: min(limit, prompt + response + 1) - prompt for i, (prompt, response) in lengths.items()}
    assert any(tokens[i] < response + 1 for i, (_, response) in lengths.items()), "the limit cuts some"
    config = finished.config(selection={"budget": {"tokens": 300}}, target={"model": str(model), "max_tokens": limit})
    run(config, str(tmp_path), reuse=str(finished.place), until="selection")
    found = set(pq.read_table(tmp_path / "selection" / "selected.parquet")["example_id"].to_pylist())
    assert found == longest_prefix(literal_order(groups_of(finished.place), SEED), tokens, 300)


def copy_stages(source: Path, target: Path, *names: str) -> Path:
    for name in names:
        shutil.copytree(source / name, target / name)
    return target


def test_two_scoring_workers_give_the_bytes_of_one(finished, tmp_path):
    begun = copy_stages(finished.place, tmp_path / "begun", "examples", "proxy")
    two = {"trajectories": {"num_workers": 2, "cpus_per_worker": 1}}
    artifacts = run(finished.config(machines=two), str(tmp_path / "run"), reuse=str(begun), until="trajectories")
    parts = artifacts["trajectories"].parts()
    assert len(parts) == math.ceil(NUM_ROWS / 64)
    assert artifacts["trajectories"].manifest["provenance"]["machines"]["num_workers"] == 2
    for part in parts:
        ours, theirs = tmp_path / "run" / "trajectories" / part, finished.place / "trajectories" / part
        assert ours.read_bytes() == theirs.read_bytes()
    # So everything after it is taken from the other run as well.
    after = decide(finished.config(machines=two), Storage(str(tmp_path / "run")), Storage(str(finished.place)))
    assert {d.action for d in after} == {"reuse"}


# --- damage --------------------------------------------------------------------------------------------------------


@pytest.fixture
def copied(finished: Finished, tmp_path: Path) -> Iterator[Path]:
    """A copy of the run that a test may damage."""
    shutil.copytree(finished.place, tmp_path / "copied", ignore=shutil.ignore_patterns("report"))
    return tmp_path / "copied"


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)


def test_a_truncated_part_is_named_when_its_stage_is_to_be_reused(finished, copied):
    part = copied / "trajectories" / "part-00001.parquet"
    part.write_bytes(part.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match=r"trajectories/part-00001\.parquet: damaged.*Remove .*trajectories"):
        run(finished.config(), str(copied))


def test_a_missing_part_is_named_when_its_stage_is_to_be_reused(finished, copied):
    (copied / "examples" / "part-00000.parquet").unlink()
    with pytest.raises(ArtifactError, match=r"examples/part-00000\.parquet: damaged \(missing\)"):
        run(finished.config(), str(copied))


def test_a_part_with_a_flipped_byte_is_named_when_it_is_read(finished, copied, tmp_path):
    flip_a_byte(copied / "trajectories" / "part-00001.parquet")
    other = finished.config(clustering={"num_clusters": 5})
    with pytest.raises(ArtifactError, match=r"trajectories/part-00001\.parquet: damaged.*Remove .*trajectories"):
        run(other, str(tmp_path / "run"), reuse=str(copied), until="clustering")
    assert not (tmp_path / "run" / "clustering" / "manifest.json").exists()


def test_a_damaged_checkpoint_is_named_by_the_worker_that_reads_it(finished, copied, tmp_path):
    weights = sorted((copied / "proxy").glob("step-*"))[1] / "model.safetensors"
    flip_a_byte(weights)
    begun = copy_stages(copied, tmp_path / "begun", "examples", "proxy")
    with pytest.raises(ArtifactError, match=rf"{weights.parent.name}/model\.safetensors: damaged"):
        run(finished.config(), str(tmp_path / "run"), reuse=str(begun), until="trajectories")
    assert not (tmp_path / "run" / "trajectories" / "manifest.json").exists()


def test_a_manifest_cut_short_is_named(finished, copied):
    manifest = copied / "clustering" / "manifest.json"
    manifest.write_text(manifest.read_text()[:200])
    with pytest.raises(ArtifactError, match=r"clustering/manifest\.json: damaged"):
        run(finished.config(), str(copied))


def test_a_finished_stage_whose_input_is_gone_is_refused_and_kept(finished, copied):
    shutil.rmtree(copied / "clustering")
    with pytest.raises(ArtifactError, match=r"selection is finished, but its input clustering is not"):
        run(finished.config(), str(copied))
    assert not (copied / "clustering" / "manifest.json").exists()


# --- export --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subset", ["selected", "random"])
def test_a_subset_is_exported_as_json_lines_and_as_parquet(finished, tmp_path, subset):
    expected = pq.read_table(finished.place / "selection" / f"{subset}.parquet").to_pylist()
    assert export_subset(str(finished.place), "jsonl", str(tmp_path / "a.jsonl"), subset).num_rows == len(expected)
    assert [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()] == expected
    assert export_subset(str(finished.place), "parquet", str(tmp_path / "a.parquet"), subset).num_rows == len(expected)
    assert pq.read_table(tmp_path / "a.parquet").to_pylist() == expected
