"""The comparison is an instrument: on data whose truth was planted it finds that truth, and between equals no difference.

Cells are trained as `s2l compare` trains them, by its own worker, but in this process: a tiny one takes a fraction of a second.
"""

from __future__ import annotations

import dataclasses
import io
import json
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from s2l_ray.compare.arms import FULL, RANDOM, Arm, arms_of
from s2l_ray.compare.cells import CellSpec, publish, read_cell, seeded, spec
from s2l_ray.compare.statistics import MACRO, TOKENS, Cell, HeldOutLosses, paired
from s2l_ray.compare.subsets import StoreGroups, opened, subsets, whole_pool
from s2l_ray.compare.table import Comparison, compare_cells
from s2l_ray.compare.worker import FACTS, CellsJob, CellWorker
from s2l_ray.config import RunConfig, parse_config
from s2l_ray.examples.hashes import prompt_hash
from s2l_ray.examples.ids import priorities
from s2l_ray.examples.reading import read_held_out
from s2l_ray.pipeline import run
from s2l_ray.runtime.workers import Workers
from s2l_ray.selection.choosing import select_rows
from s2l_ray.selection.quotas import water_fill
from s2l_ray.storage.artifacts import Artifact
from s2l_ray.storage.drafts import table_bytes
from s2l_ray.storage.layout import CELL_LOSSES, CELL_SUBSET, COMPARE, MANIFEST, TABLE
from s2l_ray.storage.places import Storage
from tests.building import split_of
from tests.test_resume import Started

LOSSES, ORACLE = (TOKENS, MACRO), "oracle"
HELD_OUT, POOL = 0.15, 1_200
NOISE, COPIES = POOL // 5, POOL // 10
BUDGET, SEEDS = 320, 4
ONE = {"num_workers": 1, "cpus_per_worker": 1}

# --- what is planted -----------------------------------------------------------------------------------------------


def planted_rows() -> list[dict[str, Any]]:
    """Words of two sources, each with its answer: a fifth of the pool has the answer of another word, a tenth are copies of
    four rows but for a number. Rows that are held out are clean."""
    generator = np.random.default_rng(0)

    def word(length: int) -> str:
        return "".join(generator.choice(list("abcdefghijklmnopqrstuvwxyz"), length))

    answers = {source: [(word(5), word(6)) for _ in range(size)] for source, size in (("big", 10), ("small", 5))}
    tail_letters, tail_shares = list("qwertyui"), 1 / np.arange(2, 10) ** 0.7
    tail_shares /= tail_shares.sum()
    rows, counts = [], {"clean": 0, "noise": 0, "copy": 0, "held out": 0}
    wanted = {"clean": POOL - NOISE - COPIES, "noise": NOISE, "copy": COPIES}

    def add(kind: str, number: int, letters: str, source: str, key: int, answer: int) -> None:
        prompt = f"{letters} {number} {answers[source][key][0]}"
        counts[kind] += 1
        response = " ".join([answers[source][answer][1], *generator.choice(tail_letters, 3, p=tail_shares)])
        rows.append({"id": f"{kind}-{counts[kind]}", "prompt": prompt, "response": response, "source": source})

    while any(counts[kind] < number for kind, number in wanted.items()):
        source = "big" if generator.random() < 0.75 else "small"
        number, letters, key = int(generator.integers(10)), word(3), int(generator.integers(len(answers[source])))
        other = (key + 1 + int(generator.integers(len(answers[source]) - 1))) % len(answers[source])
        if split_of(prompt_hash(f"{letters} {number} {answers[source][key][0]}"), HELD_OUT) != "pool":
            add("held out", number, letters, source, key, key)
        elif counts["clean"] < wanted["clean"]:
            add("clean", number, letters, source, key, key)
        elif counts["noise"] < wanted["noise"]:
            add("noise", number, letters, source, key, other)
        else:
            for copy in range(COPIES // 4):
                add("copy", 10 + copy, letters, source, key, key)
    return rows


def values(folder: Path) -> dict[str, Any]:
    shape = {"layers": 1, "heads": 2, "max_positions": 32, "tie_embeddings": False}
    return {
        "name": "planted",
        "examples": {
            "dataset": str(folder / "corpus.jsonl"),
            "source_field": "source",
            "id_field": "id",
            "held_out_fraction": HELD_OUT,
        },
        "proxy": {
            "model": {"scratch": shape | {"hidden": 16}},
            "tokenizer": {"train": "bpe", "vocab_size": 400},
            "global_batch_size": 32,
            "epochs": 10,
            "learning_rate": 1e-2,
            "num_checkpoints": 5,
            "max_tokens": 32,
        },
        "clustering": {"num_clusters": 10, "stratify_by": None},
        "selection": {"budget": BUDGET},
        "target": {
            "model": {"scratch": shape | {"hidden": 32}},
            "global_batch_size": 16,
            "epochs": 4,
            "learning_rate": 1e-2,
            "zero_stage": 0,
            "max_tokens": 32,
        },
        "evaluation": {"max_generations": 0},
        "compare": {"arms": ["s2l", "middle_perplexity", "least_confidence"], "seeds": SEEDS, "redo_from": "selection"},
        "machines": dict.fromkeys(("examples", "proxy", "trajectories", "target", "evaluation", "compare"), ONE),
    }


# --- cells without Ray ---------------------------------------------------------------------------------------------

Choice = Callable[[CellSpec], pa.Table]


@dataclass
class Bench:
    """A run with its losses, and the cells that were trained on it so far."""

    config: RunConfig
    finished: dict[str, Artifact]
    place: Storage
    worker: CellWorker | None = None

    def cells(self, arm: str, budget: int, seeds: Iterable[int], choose: Choice | None = None) -> list[Cell]:
        """Targets of one arm: of a name that `compare` knows, or with a subset of one's own."""
        found = []
        for seed in seeds:
            one = self.spec(arm, budget, seed)
            artifact = one.find(self.place)
            found.append(read_cell(one, artifact or self._trained(one, self.subset(one) if choose is None else choose(one))))
        return found

    def spec(self, arm: str, budget: int, seed: int) -> CellSpec:
        known = {one.name: one for one in arms_of(self.config, ["big", "small"])} | {FULL: Arm(FULL, {})}
        # An arm that `compare` does not know has random's recipe, and a subset of its own.
        chosen = seeded(self.config, known.get(arm, known[RANDOM]), seed)
        return spec(chosen, arm, budget, seed, {name: self.finished[name] for name in ("examples", "trajectories")})

    def subset(self, one: CellSpec) -> pa.Table:
        if one.arm == FULL:
            return whole_pool(self.finished["examples"])
        with opened(self.finished["trajectories"], self.place.child("scratch"), one.config.selection.seed) as store:
            return subsets(one.config, [one.budget], store, StoreGroups(store, False))[0]

    def _trained(self, one: CellSpec, subset: pa.Table) -> Artifact:
        work = self.place.child("work")
        examples = self.finished["examples"]
        if self.worker is None:
            parts = [part for part in examples.parts() if read_held_out(examples, part, ["example_id"]).num_rows]
            self.worker = CellWorker(
                CellsJob(examples, self.finished["proxy"], {}, work, parts, frozenset()), work, Workers(1, 1, 0, 1), 1
            )
        self.worker.job.specs[one.unit] = one
        work.write(f"{one.unit}.parquet", table_bytes(subset))
        model = self.worker.load(one.unit).eval()
        [(_, data)] = self.worker.work_on("", {one.unit: model})
        evaluated = pq.read_table(io.BytesIO(data))
        return publish(one, self.place, subset, evaluated, json.loads(evaluated.schema.metadata[FACTS]))


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> Bench:
    folder = tmp_path_factory.mktemp("planted")
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in planted_rows()))
    config = parse_config(values(folder))
    return Bench(config, run(config, str(folder / "run"), until="trajectories"), Storage(str(folder / "bench")))


def clean_rows(one: CellSpec, bench: Bench) -> pa.Table:
    """Random clean rows: neither noise nor copies."""
    pool = whole_pool(bench.finished["examples"])
    clean = pool.filter(pc.starts_with(pool["example_id"], "clean"))
    taken = np.random.default_rng(one.seed).choice(len(clean), one.budget, replace=False)
    return clean.take(pa.array(np.sort(taken)))


# --- a truth that was planted --------------------------------------------------------------------------------------


def kinds(bench: Bench, arm: str) -> dict[str, int]:
    """How many rows of each kind an arm's subsets have, all seeds together."""
    cells = [bench.place.child(bench.spec(arm, BUDGET, seed).key.stage) for seed in range(SEEDS)]
    ids = [name for cell in cells for name in Artifact.read(cell).read_table(CELL_SUBSET)["example_id"].to_pylist()]
    return {kind: sum(name.startswith(kind) for name in ids) for kind in ("clean", "noise", "copy")}


@pytest.fixture(scope="module")
def planted(bench: Bench) -> Callable[[str], Comparison]:
    """Comparisons of all arms on the planted corpus; the question is asked of the arm that is given."""
    cells = bench.cells(ORACLE, BUDGET, range(SEEDS), lambda one: clean_rows(one, bench))
    for arm in (RANDOM, "middle_perplexity", "least_confidence"):
        cells += bench.cells(arm, BUDGET, range(SEEDS))
    return lambda primary: compare_cells(cells, primary=primary, budgets=[BUDGET], redo_from="selection")


def test_a_selector_that_avoids_noise_and_copies_wins_and_its_sentence_says_so(planted, bench):
    """The oracle knows them; middle perplexity finds the noise by its losses, which is most of what there is to gain."""
    found = planted(ORACLE)
    assert found.verdict[0].startswith("oracle is better than random here")
    assert len(found.verdict) == 1, "no other arm is better than the oracle"
    for arm in (ORACLE, "middle_perplexity"):
        for kind in LOSSES:
            assert found.row(arm, BUDGET).differences[kind].high < 0, (arm, kind)
            assert found.row(arm, BUDGET).differences[kind].high_rows < 0, (arm, kind)
    assert kinds(bench, RANDOM)["noise"] > SEEDS * BUDGET * 0.15
    assert kinds(bench, "middle_perplexity")["noise"] < SEEDS * BUDGET * 0.05


def test_an_oracle_wins_most(planted):
    found = planted(ORACLE)
    best = {kind: min(row.means[kind] for row in found.rows if row.arm != ORACLE) for kind in LOSSES}
    assert all(found.row(ORACLE, BUDGET).means[kind] < best[kind] for kind in LOSSES)


def test_a_selector_that_collects_the_noise_is_worse_than_random_and_its_sentence_says_so(planted, bench):
    found = planted("least_confidence")
    assert found.verdict[0].startswith("least_confidence is worse than random here")
    assert found.verdict[1].startswith("oracle is better than both")
    assert kinds(bench, "least_confidence")["noise"] > SEEDS * NOISE * 0.8


def test_all_data_is_the_ceiling_and_more_budget_is_not_worse_for_random(bench):
    cells = [cell for budget in (BUDGET // 4, BUDGET) for cell in bench.cells(RANDOM, budget, range(SEEDS))]
    losses = HeldOutLosses.of([*cells, *bench.cells(FULL, POOL, range(1))])
    for kind in LOSSES:
        means = {name: losses.mean(values_R, kind) for name, values_R in losses.losses.items()}
        by_size = [np.mean([value for name, value in means.items() if f"-{size}-" in name]) for size in (80, BUDGET, POOL)]
        assert by_size[0] > by_size[1] > by_size[2]


# --- nothing where there is nothing ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_random_against_random_is_a_difference_in_about_one_of_twenty_comparisons(bench):
    """Forty comparisons of cells that none shares with another, so that their outcomes are independent; then the same cells
    shared out to comparisons in many other ways, which tells the rate to a percent: all are alike but for the draw."""
    comparisons, seeds, budget = 40, 3, 16
    cells = bench.cells(RANDOM, budget, range(100, 100 + 2 * comparisons * seeds))
    found = []
    for start in range(0, len(cells), 2 * seeds):
        both = [dataclasses.replace(cell, seed=i % seeds) for i, cell in enumerate(cells[start : start + 2 * seeds])]
        again = [dataclasses.replace(cell, arm="again") for cell in both[seeds:]]
        found.append(compare_cells([*both[:seeds], *again], primary="again", budgets=[budget], redo_from="selection"))
    low, high = stats.binom.ppf([0.005, 0.995], comparisons, 0.05)
    losses, generator = HeldOutLosses.of(cells), np.random.default_rng(0)
    for kind in LOSSES:
        differences = [one.row("again", budget).differences[kind] for one in found]
        assert low <= sum(not one.low <= 0 <= one.high for one in differences) <= high
        means = np.array([losses.mean(values_R, kind) for values_R in losses.losses.values()])
        shared_out = [generator.permutation(means).reshape(comparisons, 2, seeds) for _ in range(200)]
        intervals = [paired(one[0] - one[1]) for one in np.concatenate(shared_out)]
        assert np.mean([one.low <= 0 <= one.high for one in intervals]) == pytest.approx(0.95, abs=0.01)
    sentences = [one.verdict[0] for one in found]
    assert sum(not sentence.startswith("No difference between again and random") for sentence in sentences) <= 2 * high


# --- killed at any moment --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_comparison_that_is_killed_at_random_moments_ends_with_the_same_table(bench, tmp_path):
    """SIGKILL of the command, its Ray and its workers; the last time it is left in peace."""
    made = values(Path(bench.config.examples.dataset).parent)
    made["compare"] = {"arms": ["s2l"], "seeds": 2, "budgets": [32, 64], "redo_from": "selection"}
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(made))
    run_dir = bench.finished["examples"].storage.uri.rpartition("/")[0]
    generator = random.Random(0)

    def started(name: str) -> Started:
        return Started(tmp_path / f"{name}.txt", "compare", config, "--run-dir", tmp_path / name, "--reuse", run_dir)

    def num_cells() -> int:
        return len(list((tmp_path / "killed" / COMPARE).glob(f"*/{MANIFEST}")))

    before = 0
    for more in (1, 1, generator.randint(2, 4)):
        process = started("killed")
        process.wait_until(lambda before=before, more=more: num_cells() >= before + more, f"{more} more cells")
        time.sleep(generator.uniform(0, 0.5))
        process.kill()
        assert num_cells() < 13, "nothing was left to interrupt"
        assert not (tmp_path / "killed" / COMPARE / TABLE).exists()
        before = num_cells()
    for name in ("killed", "peace"):
        assert started(name).finish() == 0
    killed, peace = (json.loads((tmp_path / name / COMPARE / TABLE).read_text()) for name in ("killed", "peace"))
    assert num_cells() == 13
    for part in ("cells", "rows", "verdict", "detectable", "fingerprints"):
        assert killed[part] == peace[part]
    check_by_hand(tmp_path / "peace" / COMPARE, peace)


def check_by_hand(folder: Path, table: dict[str, Any]) -> None:
    """The table of a real comparison from its cells' files alone."""
    means: dict[tuple[str, int], list[dict[str, float]]] = {}
    for cell in sorted(table["cells"], key=lambda one: one["seed"]):
        losses = pq.read_table(folder / f"{cell['arm']}-{cell['budget']}-seed{cell['seed']}" / CELL_LOSSES).to_pandas()
        sums = (
            losses.assign(loss=losses["loss"].astype(float) * losses["num_response_tokens"])
            .groupby("source")[["loss", "num_response_tokens"]]
            .sum()
        )
        by_hand = {
            TOKENS: sums["loss"].sum() / sums["num_response_tokens"].sum(),
            MACRO: (sums["loss"] / sums["num_response_tokens"]).mean(),
        }
        assert {kind: cell[kind] for kind in LOSSES} == pytest.approx(by_hand)
        means.setdefault((cell["arm"], cell["budget"]), []).append(by_hand)
    for row in table["rows"]:
        of_arm = means[row["arm"], row["budget"]]
        for kind in LOSSES:
            assert row["means"][kind] == pytest.approx(np.mean([one[kind] for one in of_arm]))
            if row["differences"]:
                of_random = means[RANDOM, row["budget"]]
                expected = stats.ttest_rel([one[kind] for one in of_arm], [one[kind] for one in of_random])
                found = row["differences"][kind]
                assert [found["low"], found["high"]] == pytest.approx([*expected.confidence_interval(0.95)])


# --- a theorem -----------------------------------------------------------------------------------------------------


def variance(values_N: np.ndarray, groups_N: np.ndarray, quotas_K: np.ndarray) -> float:
    """Of the mean of a sample that takes a fixed number of each group at random, without replacement (Cochran, 1977, 5.3)."""
    parts = [values_N[groups_N == k] for k in range(len(quotas_K))]
    spread = [
        quota * part.var(ddof=1) * (1 - quota / len(part)) for part, quota in zip(parts, quotas_K, strict=True) if len(part) > 1
    ]
    return float(sum(spread) / quotas_K.sum() ** 2)


def of_random(values_N: np.ndarray, budget: int) -> float:
    return variance(values_N, np.zeros(len(values_N), int), np.array([budget]))


@given(
    st.lists(st.integers(2, 60), min_size=2, max_size=12),
    st.floats(0.05, 0.9),
    st.sampled_from([0.0, 0.01, 0.3, 5.0]),
    st.integers(0, 2**20),
)
def test_at_allocation_one_a_mean_varies_at_most_as_of_random_whatever_the_groups(
    sizes: list[int], fraction: float, distance: float, seed: int
) -> None:
    """Groups of exactly their shares leave out what lies between groups; within them nothing can be worse but for quotas being
    whole and for groups being small (a variance with N - 1 below): this bound holds for every partition, the worst included."""
    generator, number = np.random.default_rng(seed), sum(sizes)
    groups_N = generator.permutation(np.repeat(np.arange(len(sizes)), sizes))
    values_N = generator.gamma(2, 1, number) + distance * groups_N
    budget = max(1, int(fraction * number))
    quotas_K, sizes_K, share = water_fill(sizes, budget, allocation=1.0), np.array(sizes), budget / number
    rounding_K = np.abs(quotas_K - share * sizes_K) * abs(1 - 2 * share) / (sizes_K * share * (1 - share))
    bound = float(np.max(sizes_K / (sizes_K - 1) * (1 + rounding_K))) * (number - 1) / number
    assert variance(values_N, groups_N, quotas_K) <= bound * of_random(values_N, budget) * (1 + 1e-9)


def test_groups_that_mean_nothing_cost_nothing_on_average_and_true_ones_take_away_what_lies_between_them() -> None:
    generator = np.random.default_rng(0)
    groups_N, quotas_K = np.repeat(np.arange(8), 25), np.full(8, 5)
    assert water_fill([25] * 8, 40, allocation=1.0).tolist() == quotas_K.tolist()
    values_N = generator.gamma(2, 1, 200)
    ratios = [variance(generator.permutation(values_N), groups_N, quotas_K) / of_random(values_N, 40) for _ in range(2_000)]
    assert np.mean(ratios) == pytest.approx(1, abs=4 * np.std(ratios) / np.sqrt(2_000))
    planted_N = values_N + 3 * groups_N
    within = sum(((planted_N[groups_N == k] - planted_N[groups_N == k].mean()) ** 2).sum() for k in range(8))
    expected = within / ((planted_N - planted_N.mean()) ** 2).sum() * (25 / 24) / (200 / 199)
    assert variance(planted_N, groups_N, quotas_K) / of_random(planted_N, 40) == pytest.approx(expected)
    assert expected < 0.2


@pytest.mark.parametrize("kind", ["planted", "random"])
def test_what_is_drawn_under_many_seeds_has_the_variance_of_the_formula(kind: str) -> None:
    """For every column of trajectories: the draws of `select_rows` are samples without replacement inside their groups."""
    generator, number, seeds = np.random.default_rng(1), 300, 600
    groups_N = generator.integers(0, 6, number)
    losses_NT = generator.gamma(2, 0.3, (number, 3)) + (kind == "planted") * groups_N[:, None] * np.array([0.1, 0.5, 1.0])
    keys = [priorities(np.arange(number), seed) for seed in range(seeds)]
    means_T = {
        name: np.array([losses_NT[select_rows(ids_N, key, 60, allocation=1.0)].mean(axis=0) for key in keys])
        for name, ids_N in (("groups", groups_N), ("none", np.zeros(number, int)))
    }
    quotas_K = water_fill(np.bincount(groups_N), 60, allocation=1.0)
    low, high = stats.chi2.ppf([0.0005, 0.9995], seeds - 1) / (seeds - 1)
    for column in range(3):
        exact = variance(losses_NT[:, column], groups_N, quotas_K)
        assert low < means_T["groups"][:, column].var(ddof=1) / exact < high
        assert low < means_T["none"][:, column].var(ddof=1) / of_random(losses_NT[:, column], 60) < high
        assert exact < of_random(losses_NT[:, column], 60) * (1.02 if kind == "random" else 1)
