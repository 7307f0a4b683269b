"""The comparison as a user meets it: its arms, its cells, how it goes on, and what it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from s2l_ray import pipeline
from s2l_ray.compare import stage
from s2l_ray.compare.arms import FULL, RANDOM, VARIANTS, Arm, ablated, arms_of
from s2l_ray.compare.cells import CellSpec, budgets_of, resolved, seeded
from s2l_ray.compare.planning import comparison_lines
from s2l_ray.compare.stage import compare
from s2l_ray.config import RunConfig, parse_config
from s2l_ray.errors import ArtifactError, ConfigError, DataError
from s2l_ray.pipeline import run
from s2l_ray.plan.plan import make_plan
from s2l_ray.storage.layout import CELL_LOSSES, CELL_SUBSET, COMPARE, MANIFEST, ROW_LOSSES, SEED_RUNS, TABLE
from s2l_ray.storage.places import Storage

ONE = {"num_workers": 1, "cpus_per_worker": 1}
SOURCES = ["copy", "digits"]


def rows() -> list[dict[str, Any]]:
    """Two sources, one three times as large, that two tiny models learn a little of."""
    generator = np.random.default_rng(0)
    found = []
    for i in range(320):
        word = "".join(generator.choice(list("abcdefgh"), 5))
        source = "digits" if i % 4 == 0 else "copy"
        answer = word if source == "copy" else "".join(generator.choice(list("0123"), 4))
        found.append({"prompt": f"{source} {word}: ", "response": f"answer {answer}", "source": source})
    return found


def values(folder: Path, **sections: Any) -> dict[str, Any]:
    shape = {"layers": 1, "heads": 2, "max_positions": 64}
    made: dict[str, Any] = {
        "name": "compared",
        "examples": {"dataset": str(folder / "corpus.jsonl"), "source_field": "source", "held_out_fraction": 0.2},
        "proxy": {
            "model": {"scratch": shape | {"hidden": 8}},
            "tokenizer": {"train": "bpe", "vocab_size": 300},
            "global_batch_size": 16,
            "epochs": 1,
            "learning_rate": 1e-2,
            "num_checkpoints": 3,
            "max_tokens": 64,
        },
        "clustering": {"num_clusters": 6, "stratify_by": None},
        "selection": {"budget": 24},
        "target": {
            "model": {"scratch": shape | {"hidden": 16}},
            "global_batch_size": 8,
            "epochs": 2,
            "learning_rate": 5e-3,
            "zero_stage": 0,
            "max_tokens": 64,
        },
        "evaluation": {"answer_pattern": "answer (.+)", "max_generations": 3, "max_new_tokens": 6},
        "compare": {"arms": ["source_matched", "s2l"], "seeds": 2, "redo_from": "clustering"},
        "machines": dict.fromkeys(("examples", "proxy", "trajectories", "target", "evaluation", "compare"), ONE),
    }
    for name, section in sections.items():
        made[name] = {**made.get(name, {}), **section}
    return made


def config(folder: Path, **sections: Any) -> RunConfig:
    return parse_config(values(folder, **sections))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("compared")
    (path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    return path


@pytest.fixture(scope="module")
def place(folder: Path, ray_session: None) -> Path:
    """A finished comparison."""
    compare(config(folder), str(folder / "run"))
    return folder / "run"


def manifests(place: Path) -> dict[str, float]:
    """When each cell was finished, by its name."""
    return {path.parent.name: path.stat().st_mtime_ns for path in (place / COMPARE).glob(f"*/{MANIFEST}")}


# --- arms ----------------------------------------------------------------------------------------------------------


def test_random_is_always_an_arm_and_balanced_sources_where_there_are_some(tmp_path):
    alone = config(tmp_path, compare={"arms": ["s2l"]})
    assert [arm.name for arm in arms_of(alone, SOURCES)] == [RANDOM, "source_balanced", "s2l"]
    assert [arm.name for arm in arms_of(alone, ["one"])] == [RANDOM, "s2l"]


def test_every_known_variant_of_s2l_is_a_config(tmp_path):
    made = config(tmp_path, trajectories={"statistics": True}, compare={"arms": list(VARIANTS)})
    found = {arm.name: arm.config(made) for arm in arms_of(made, SOURCES)}
    assert found["s2l_allocation_0.5"].selection.allocation == 0.5
    assert found["s2l_inside_sources"].clustering.stratify_by == "source"
    assert found["s2l_inside_sources"].selection.defer_groups_up_to == 2
    assert found["s2l_whitened"].clustering.features == "whitened"
    assert found["s2l_weighted"].target.use_weights
    assert found["s2l_profile"].clustering.features == "profile"
    assert found["s2l"] == made


def test_s2l_is_s2l_whatever_the_run_itself_selects_by(tmp_path):
    """Somebody who has taken the advice of an earlier comparison asks again."""
    section = {"arms": ["s2l", "s2l_allocation_0.5"], "ablations": {"clustering.num_clusters": [3]}}
    made = config(tmp_path, selection={"method": "source_balanced"}, target={"use_weights": True}, compare=section)
    arms = {arm.name: arm.config(made) for arm in arms_of(made, SOURCES)}
    assert {arm.selection.method for name, arm in arms.items() if name not in (RANDOM, "source_balanced")} == {"s2l"}
    assert not arms["s2l_allocation_0.5"].target.use_weights  # but for what its name says it is the paper's


def test_an_arm_that_cannot_be_is_refused_before_anything_is_built(folder):
    with pytest.raises(ConfigError, match="'s2ll' is neither"):
        compare(config(folder, compare={"arms": ["s2ll"]}), str(folder / "never"))
    assert not (folder / "never").exists()


def test_an_arm_of_one_s_own_is_the_run_with_other_settings(tmp_path):
    own = {"few": {"clustering.num_clusters": 3, "target.use_weights": True}}
    arms = {arm.name: arm for arm in arms_of(config(tmp_path, compare={"arms": ["s2l", own]}), SOURCES)}
    changed = arms["few"].config(config(tmp_path))
    assert changed.clustering.num_clusters == 3
    assert changed.target.use_weights
    assert changed.proxy == config(tmp_path).proxy


def test_an_ablation_is_an_arm_for_each_value_of_a_field(tmp_path):
    made = config(tmp_path, compare={"arms": ["s2l"], "ablations": {"clustering.num_clusters": [2, 4]}})
    assert [arm.name for arm in arms_of(made, ["one"])][-2:] == ["clustering.num_clusters=2", "clustering.num_clusters=4"]
    assert ablated("clustering.points", [0, 2]).name == "clustering.points=0-2"


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"arms": ["s2ll"]}, "'s2ll' is neither a selector nor a known variant"),
        ({"arms": ["s2l", {"b": {"clustering.clusters": 3}}]}, r"compare.arms: b: clustering.clusters: no such key"),
        ({"arms": ["s2l", {"b": {"machines.target.num_workers": 3}}]}, "cannot differ between arms"),
        ({"arms": ["s2l", {"b": {"examples.split": "test"}}]}, "cannot differ between arms"),
        ({"arms": ["s2l", {"../b": {"clustering.num_clusters": 3}}]}, "is no name for an arm"),
        ({"arms": ["s2l", {"full": {"clustering.num_clusters": 3}}]}, "the name 'full' is taken"),
        ({"arms": [{"s2l": {"clustering.num_clusters": 3}}]}, "the name 's2l' is taken"),
        ({"arms": ["s2l", {"proxy": {"proxy.epochs": 2}}]}, "the name 'proxy' is taken"),
        ({"arms": ["s2l", {"source_balanced": {"selection.method": "longest"}}]}, "the name 'source_balanced' is taken"),
        ({"ablations": {"selection.budget": [8, 16]}}, "selection.budget is the comparison's"),
        ({"ablations": {"target.max_tokens": [32]}}, "target.max_tokens decides which tokens of a held-out row count"),
        ({"ablations": {"target.model": ["a/b", "a b"]}}, "two arms would have the name 'target.model=a_b'"),
        ({"arms": ["source_matched"]}, "compare.primary: no arm 's2l'"),
        ({"arms": ["s2l", "s2l_profile"]}, r"compare.arms: s2l_profile: (.|\n)*trajectories.statistics=true"),
        ({"primary": "random"}, "compare.primary: random is what the others are compared to"),
        ({"arms": ["s2l", {"b": {}}]}, "'b' changes nothing"),
        ({"arms": ["s2l", {"b": {"selection.budget": 9}}]}, "selection.budget is the comparison's"),
        ({"ablations": {"clustering.points": [[0, 9]]}}, "no point 9 in trajectories of"),
    ],
)
def test_an_arm_that_cannot_be_is_refused_by_name(tmp_path, section, message):
    with pytest.raises(ConfigError, match=message):
        arms_of(config(tmp_path, compare=section), SOURCES)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"seeds": 1}, "one seed has no interval"),
        ({"arms": ["s2l", "s2l"]}, "the arm 's2l' occurs twice"),
        ({"arms": [{"a": {}, "b": {}}]}, "found a mapping of 2"),
        ({"budgets": []}, "compare.budgets: list should have at least 1 item"),
        ({"budgets": [1.5]}, "a budget is a number of examples, or a fraction"),
        ({"budgets": [0]}, "a budget is a number of examples, or a fraction"),
        ({"budgets": ["many"]}, "compare.budgets"),
        ({"curation": {"seconds_per_example": 0, "hourly_rate": 1}}, "greater than 0"),
    ],
)
def test_a_section_that_cannot_be_is_refused(tmp_path, section, message):
    with pytest.raises(ConfigError, match=message):
        config(tmp_path, compare=section)


def test_without_arms_of_its_own_a_comparison_has_s2l_and_an_empty_list_has_ablations_alone(tmp_path):
    def names(**compare):
        return [arm.name for arm in arms_of(config(tmp_path, compare=compare), SOURCES)]

    assert names(arms=None) == ["random", "source_balanced", "source_matched", "s2l"]
    primary = "clustering.num_clusters=3"
    assert names(arms=[], ablations={"clustering.num_clusters": [3]}, primary=primary) == ["random", "source_balanced", primary]


def test_a_draw_without_an_order_has_no_matched_arm_by_itself_and_is_refused_where_one_is_asked_for(tmp_path):
    made = config(tmp_path, selection={"draw": "spread"}, compare={"arms": None})
    assert [arm.name for arm in arms_of(made, SOURCES)] == [RANDOM, "source_balanced", "s2l"]
    with pytest.raises(ConfigError, match=r"compare.arms: source_matched: (.|\n)*draw=spread has none. Choose draw=random"):
        arms_of(config(tmp_path, selection={"draw": "spread"}), SOURCES)


def test_an_arm_that_is_left_out_is_named_once(tmp_path, caplog):
    sources = {name: {"pool": 100} for name in SOURCES}
    examples = SimpleNamespace(summary={"pool": 200, "held_out": 40, "sources": sources})
    made = config(tmp_path, selection={"draw": "spread"}, compare={"arms": None})
    with caplog.at_level("INFO"):
        stage.arms_and_budgets(made, examples)
        stage.arms_and_budgets(made, examples, SimpleNamespace(summary={"steps": [0, 1, 2]}))
    assert caplog.text.count("source_matched is left out") == 1


def test_a_budget_is_of_the_pool_and_at_least_a_batch(tmp_path):
    assert budgets_of(config(tmp_path, compare={"budgets": [0.1, 40]}), 200) == [20, 40]
    assert budgets_of(config(tmp_path), 200) == [24]
    with pytest.raises(ConfigError, match=r"compare\.budgets: 300 examples, but the pool has 200"):
        budgets_of(config(tmp_path, compare={"budgets": [300]}), 200)
    with pytest.raises(DataError, match="fewer than one batch of 8"):
        budgets_of(config(tmp_path, compare={"budgets": [0.02]}), 200)
    with pytest.raises(ConfigError, match="a budget in tokens gives every arm another number"):
        budgets_of(config(tmp_path, selection={"budget": {"tokens": 500}}), 200)


# --- seeds ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("redo_from", "changed"),
    [
        ("proxy", {"proxy", "clustering", "selection", "target"}),
        ("clustering", {"clustering", "selection", "target"}),
        ("selection", {"selection", "target"}),
        ("target", {"target"}),
    ],
)
def test_a_seed_redoes_what_the_config_says_and_keeps_the_starting_weights(tmp_path, redo_from, changed):
    made = config(tmp_path, compare={"redo_from": redo_from})
    other = seeded(made, Arm("s2l", {}), 3)
    seeds = {
        name for name in ("proxy", "clustering", "selection", "target") if getattr(other, name).seed != getattr(made, name).seed
    }
    assert seeds == changed
    assert other.target.model.scratch.seed == made.target.seed
    assert seeded(made, Arm("s2l", {}), 0) == made, "the run's own seeds are seed 0"


def test_the_plan_counts_the_proxies_of_ablations_and_their_size(folder, tmp_path):
    """An ablation of the proxy trains one a seed and value; one that is the run's own value has the run's under its seed."""

    def planned(**section: Any) -> tuple[float, str]:
        compare = {"arms": ["s2l"], "seeds": 3, "full_seeds": 0, **section}
        made = config(folder, compare=compare, plan={"num_examples": 200, "tokens_per_example": 20})
        lines = comparison_lines(made, make_plan(made, str(tmp_path / "run"), accelerator="H100", price_per_hour=2.0))
        [line] = [line for line in lines if line.startswith("It costs")]
        assert "in money" in line
        return float(line.split()[2]), line

    def targets(number: int) -> float:
        return of_targets * number / 3

    of_targets, line = planned(redo_from="target")  # random, source_balanced and s2l
    assert "proxies" not in line
    field = {"proxy.model.scratch.hidden": [8, 16]}
    both, line = planned(redo_from="target", ablations=field)
    assert "those of 5 proxies" in line, "the run's own is there under its seed"
    of_proxies = both - targets(5)
    one, line = planned(redo_from="proxy")
    assert "those of 2 proxies" in line
    assert of_proxies > 5 * (one - of_targets) / 2, "of which three are larger"


# --- a comparison --------------------------------------------------------------------------------------------------


def test_of_given_checkpoints_no_seed_redoes_the_proxy(tmp_path):
    given = resolved(config(tmp_path, proxy={"checkpoints": ["one/step-1", "one/step-2"]}, compare={"redo_from": "proxy"}))
    assert given.compare.redo_from == "clustering"
    assert resolved(config(tmp_path, compare={"redo_from": "proxy"})).compare.redo_from == "proxy"
    assert seeded(given, Arm("s2l", {}), 1).proxy == given.proxy


def test_every_cell_has_its_subset_its_losses_and_as_many_steps_as_its_budget_has(place, folder):
    found = {path.parent.name: json.loads(path.read_text()) for path in (place / COMPARE).glob(f"*/{MANIFEST}")}
    arms = [RANDOM, "source_balanced", "source_matched", "s2l"]
    pool = json.loads((place / "examples" / MANIFEST).read_text())["summary"]["pool"]
    assert sorted(found) == sorted([f"{arm}-24-seed{seed}" for arm in arms for seed in (0, 1)] + [f"{FULL}-{pool}-seed0"])
    for name, manifest in found.items():
        budget = int(name.split("-")[1])
        assert manifest["summary"]["steps"] == math.ceil(2 * budget / 8)
        assert pq.read_metadata(place / COMPARE / name / CELL_SUBSET).num_rows == budget
        losses = pq.read_table(place / COMPARE / name / CELL_LOSSES)
        assert set(losses.column_names) == {"example_id", "source", "loss", "num_response_tokens", "exact_match"}
        assert np.isfinite(losses["loss"].to_numpy()).all()


def test_arms_that_only_differ_in_their_subsets_start_from_the_same_weights(place):
    """Two cells with equal subsets would be equal; of different ones the first step's loss differs by its rows alone."""
    first = {
        name: json.loads((place / COMPARE / name / MANIFEST).read_text())["summary"]["training_loss"][0][1]
        for name in ("random-24-seed0", "s2l-24-seed0", "random-24-seed1")
    }
    vocabulary = 320
    assert all(abs(loss - math.log(vocabulary)) < 0.5 for loss in first.values()), first


def test_source_matched_has_the_source_counts_of_s2l(place):
    ids = {}
    for arm in ("s2l", "source_matched"):
        table = pq.read_table(place / COMPARE / f"{arm}-24-seed1" / CELL_SUBSET)
        pool = pa.concat_tables(
            [pq.read_table(path, columns=["example_id", "source"]) for path in (place / "examples").glob("part-*")]
        )
        of_id = dict(zip(pool["example_id"].to_pylist(), pool["source"].to_pylist(), strict=True))
        ids[arm] = sorted(of_id[one] for one in table["example_id"].to_pylist())
    assert ids["s2l"] == ids["source_matched"]


def test_the_same_command_again_trains_nothing_needs_no_ray_and_gives_the_same_table(place, folder, monkeypatch):
    monkeypatch.setattr(stage, "connect_ray", lambda: pytest.fail("connected to Ray"))
    before, table = manifests(place), json.loads((place / COMPARE / TABLE).read_text())
    compare(config(folder), str(place))
    assert manifests(place) == before
    again = json.loads((place / COMPARE / TABLE).read_text())
    assert all(again[name] == value for name, value in table.items() if name != "provenance")


def test_a_comparison_that_was_interrupted_goes_on_to_the_same_table(place, folder, monkeypatch):
    table = json.loads((place / COMPARE / TABLE).read_text())
    other = folder / "interrupted"
    calls = []

    def interrupted(one: CellSpec, *arguments: Any) -> Any:
        calls.append(one.name)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return publish(one, *arguments)

    publish = stage.publish
    monkeypatch.setattr(stage, "publish", interrupted)
    run(config(folder), str(other), until="trajectories", reuse=str(place))
    with pytest.raises(KeyboardInterrupt):
        compare(config(folder), str(other))
    monkeypatch.setattr(stage, "publish", publish)
    before = manifests(other)
    assert len(before) == 3
    compare(config(folder), str(other))
    assert manifests(other).items() >= before.items(), "what was finished is not trained again"
    again = json.loads((other / COMPARE / TABLE).read_text())
    assert again["cells"] == table["cells"]
    assert again["rows"] == table["rows"]


def test_another_comparison_over_the_same_run_takes_the_cells_that_it_shares(place, folder):
    before, tables = manifests(place), {path: path.read_bytes() for path in (place / COMPARE).glob("table-*")}
    compare(config(folder, compare={"arms": ["s2l", "s2l_allocation_1"]}), str(place))
    after = manifests(place)
    assert len(tables) == 2, "the same comparison again has the same table"
    assert all(path.read_bytes() == data for path, data in tables.items()), "another one keeps it"
    assert len(list((place / COMPARE).glob("table-*"))) == 4
    assert after.items() >= before.items()
    assert sorted(after.keys() - before.keys()) == ["s2l_allocation_1-24-seed0", "s2l_allocation_1-24-seed1"]


def test_another_run_s_cells_and_seeds_proxies_are_taken_where_they_match(place, folder, monkeypatch):
    """Nothing that is there is trained again: neither a target nor the proxy of another seed."""
    of_seeds = {"arms": ["s2l"], "redo_from": "proxy", "full_seeds": 1}
    compare(config(folder, compare=of_seeds), str(folder / "first"), reuse=str(place))
    monkeypatch.setattr(stage, "connect_ray", lambda: pytest.fail("connected to Ray"))
    monkeypatch.setattr(pipeline, "connect_ray", lambda: pytest.fail("connected to Ray"))
    compare(config(folder, compare=of_seeds), str(folder / "second"), reuse=str(folder / "first"))
    first, second = (json.loads((folder / name / COMPARE / TABLE).read_text()) for name in ("first", "second"))
    assert all(first[name] == second[name] for name in ("cells", "fingerprints"))
    assert (folder / "second" / COMPARE / SEED_RUNS / "proxy-seed1" / "trajectories" / MANIFEST).exists()


@pytest.mark.parametrize(
    ("sections", "error", "message"),
    [
        ({"compare": {"budgets": [24, 5000]}}, ConfigError, r"compare.budgets: 5,000 examples, but the pool has"),
        (
            {"compare": {"arms": ["s2l", {"many": {"clustering.num_clusters": 900}}]}},
            ConfigError,
            "arms: many: .* 900 groups of",
        ),
        ({"examples": {"source_field": None}, "compare": {"arms": ["s2l", "source_balanced"]}}, ConfigError, "needs source"),
        ({"trajectories": {"embeddings": True}, "compare": {"arms": ["s2l", "rds_plus"]}}, ConfigError, "validation_fraction"),
    ],
)
def test_what_the_corpus_cannot_give_is_refused_before_a_proxy_is_trained(folder, tmp_path, sections, error, message):
    with pytest.raises(error, match=message):
        compare(config(folder, **sections), str(tmp_path / "run"))
    assert not (tmp_path / "run" / "proxy").exists()


def test_an_arm_bears_the_costs_of_its_own_proxy(place, folder):
    """Of a proxy with twice the epochs the training costs twice as much; other arms pay for the run's own."""
    arms = {"arms": ["s2l", {"longer": {"proxy.epochs": 2}}, {"fewer": {"clustering.num_clusters": 3}}], "full_seeds": 0}
    compare(config(folder, compare=arms), str(folder / "longer"), reuse=str(place))
    costs = json.loads((folder / "longer" / COMPARE / TABLE).read_text())["costs"]
    spent = {one["arm"]: one for one in costs["by_row"]}
    training = costs["items"][0]
    assert training["name"] == "proxy"
    assert spent["longer"]["operations"] - spent["s2l"]["operations"] == pytest.approx(training["operations"])
    assert spent["fewer"] == spent["s2l"] | {"arm": "fewer"}
    assert spent["longer"]["hours"] != spent["s2l"]["hours"], "as it was measured"


def test_a_cell_of_another_recipe_is_refused_before_the_proxies_of_other_seeds_are_trained(place, folder):
    section = {"arms": ["s2l"], "redo_from": "proxy"}
    with pytest.raises(ArtifactError, match=r"target.learning_rate: 0.005 -> 0.001"):
        compare(config(folder, target={"learning_rate": 1e-3}, compare=section), str(place))
    assert not (place / COMPARE / SEED_RUNS).exists()


def test_settings_that_changed_half_way_are_refused_by_field(place, folder):
    before = manifests(place)
    with pytest.raises(ArtifactError, match=r"target.learning_rate: 0.005 -> 0.001(.|\n)*another --run-dir"):
        compare(config(folder, target={"learning_rate": 1e-3}), str(place))
    assert manifests(place) == before


def test_a_target_that_diverges_is_kept_and_marked(folder, place):
    """A learning rate that no model survives: the table says how many of each arm's cells are lost."""
    made = config(folder, target={"learning_rate": 1e6}, compare={"arms": ["s2l"], "full_seeds": 0})
    found = compare(made, str(folder / "diverged"), reuse=str(place))
    assert "diverged" in found.text()
    manifest = json.loads((folder / "diverged" / COMPARE / "s2l-24-seed0" / MANIFEST).read_text())
    assert manifest["summary"]["diverged"]


def test_the_command_line_prints_the_table_and_its_sentence(place, folder, capsys, monkeypatch):
    from s2l_ray import cli

    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values(folder)))
    monkeypatch.setattr("sys.argv", ["s2l", "compare", str(path), "--run-dir", str(place)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    printed = capsys.readouterr().out
    assert not end.value.code
    assert all(arm in printed for arm in ("random", "source_balanced", "source_matched", "s2l", "full"))
    assert "each seed" in printed


@pytest.mark.slow
def test_targets_that_the_run_has_trained_anyway_are_cells(folder, ray_session):
    """The run's subset and its random control, of the first budget and the run's own seeds, are not trained twice."""
    made = config(folder, evaluation={"random_control": True}, compare={"arms": ["s2l"], "full_seeds": 0})
    found = run(made, str(folder / "with-targets"))
    compare(made, str(folder / "with-targets"))
    own = found["evaluation"].read_table(ROW_LOSSES).to_pandas()
    for arm, model in (("s2l", "selected"), ("random", "random")):
        cell = folder / "with-targets" / COMPARE / f"{arm}-24-seed0"
        taken = pq.read_table(cell / CELL_LOSSES).to_pandas()
        assert (own[own.model == model].loss.to_numpy() == taken.loss.to_numpy()).all()
        facts = json.loads((cell / MANIFEST).read_text())["summary"]
        assert facts["steps"] == found["target"].summary["total_steps"]
        assert facts["supervised_tokens"] == found["target"].summary["supervised_tokens"][model]


@pytest.mark.slow
def test_cells_by_fits_of_their_own_are_those_of_the_run_s_stages(place, folder, ray_session):
    """The same recipe in a worker that trains many and in a fit of one worker: the same losses."""
    made = config(folder, compare={"arms": ["s2l"], "seeds": 2, "fit": "alone", "full_seeds": 0})
    run(made, str(folder / "alone"), until="trajectories", reuse=str(place))
    compare(made, str(folder / "alone"))
    for name in ("s2l-24-seed1", "random-24-seed0"):
        together, alone = (pq.read_table(one / COMPARE / name / CELL_LOSSES) for one in (place, folder / "alone"))
        columns = ["example_id", "loss"]
        one, other = (table.select(columns).sort_by("example_id") for table in (together, alone))
        assert one["example_id"].equals(other["example_id"])
        np.testing.assert_allclose(one["loss"].to_numpy(), other["loss"].to_numpy(), atol=2e-5)


def test_storage_of_cells_is_that_of_the_run(place):
    assert Storage(str(place)).child(COMPARE).exists(TABLE)
    assert not (place / ".work" / COMPARE).exists(), "scratch goes away when all cells are there"
