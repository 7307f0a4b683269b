"""Which rows are held out, and which are for validation: enough of every source, near-copies on one side."""

from __future__ import annotations

import itertools
import json
import logging
import random
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from s2l_ray.config import ExamplesConfig
from s2l_ray.config.recipes import SCHEMAS
from s2l_ray.examples import cutting as cutting_module
from s2l_ray.examples import order as order_module
from s2l_ray.examples import splits as splits_module
from s2l_ray.examples.corpus import corpus_identity, examples_recipe
from s2l_ray.examples.hashes import masked, prompt_hash
from s2l_ray.examples.reading import read_held_out, read_pool, read_validation
from s2l_ray.examples.splits import choose_prompts, lowest_prompts, with_held_out
from s2l_ray.examples.stage import build as build_stage
from s2l_ray.storage.artifacts import Artifact, Key
from s2l_ray.storage.drafts import Draft
from s2l_ray.storage.places import Storage
from tests.building import context_of, split_of

# --- the choice --------------------------------------------------------------------------------------------------

# Rows as (source, hash of the masked prompt): few hashes, so that prompts repeat within sources and across them.
rows_of_sources = st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 30)), max_size=120)


def prompts_of(rows: list[tuple[str, int]]) -> pa.Table:
    columns = {"source": pa.array([source for source, _ in rows], pa.string())}
    columns |= {"prompt_hash": pa.array([hashed for _, hashed in rows], pa.uint64())}
    return pa.table(columns | {"rows": pa.array(np.ones(len(rows), np.int64))})


def chosen_by_definition(rows: list[tuple[str, int]], held_out: Counter[str], wanted: int) -> set[int]:
    """The choice from all rows at once."""
    names = sorted({source for source, _ in rows})
    counts = {name: dict(sorted(Counter(h for source, h in rows if source == name).items())[: 4 * wanted]) for name in names}
    totals, taken = Counter(source for source, _ in rows) + held_out, Counter(held_out)
    found: set[int] = set()
    for name in names:
        for hashed in counts[name]:
            shares = {other: counts[other][hashed] for other in names if hashed in counts[other]}
            fits = all(2 * (taken[other] + count) <= totals[other] for other, count in shares.items())
            if hashed not in found and taken[name] < wanted and fits:
                taken.update(shares)
                found.add(hashed)
    return found


def test_a_prompt_that_sources_share_leaves_half_of_each_in_the_pool() -> None:
    rows = [("a", hashed) for hashed in range(1, 7)] + [("b", 1), ("b", 2)]
    sources = {"a": {"pool": 6, "held_out": 0}, "b": {"pool": 2, "held_out": 0}}
    assert choose_prompts(lowest_prompts(prompts_of(rows), 8), sources, 2).tolist() == [1, 3]


@given(rows=rows_of_sources, wanted=st.integers(1, 12), cuts=st.lists(st.integers(0, 120), max_size=4), held=st.integers(0, 8))
def test_the_choice_is_that_of_the_definition_however_the_rows_are_cut(
    rows: list[tuple[str, int]], wanted: int, cuts: list[int], held: int
) -> None:
    held_out = Counter({"a": held})
    sources = {name: {"pool": sum(source == name for source, _ in rows), "held_out": held_out[name]} for name in "abc"}
    edges = [0, *sorted(min(cut, len(rows)) for cut in cuts), len(rows)]
    keep = 4 * wanted
    pieces = [lowest_prompts(prompts_of(rows[a:b]), keep) for a, b in itertools.pairwise(edges)]
    random.Random(held).shuffle(pieces)
    lowest = pieces[0]
    for piece in pieces[1:]:
        lowest = lowest_prompts(pa.concat_tables([lowest, piece]), keep)
    assert all(lowest["source"].to_pylist().count(name) <= keep for name in "abc")
    chosen = choose_prompts(lowest, sources, wanted)
    assert chosen.dtype == np.uint64
    assert set(chosen.tolist()) == chosen_by_definition(rows, held_out, wanted)


@given(rows=rows_of_sources, wanted=st.integers(1, 12))
def test_a_prompt_is_on_one_side_in_all_sources(rows: list[tuple[str, int]], wanted: int) -> None:
    table = prompts_of(rows).append_column("split", pa.array(["pool"] * len(rows), pa.string()))
    sources = {name: {"pool": count, "held_out": 0} for name, count in Counter(source for source, _ in rows).items()}
    lowest = lowest_prompts(table.drop_columns(["split"]), 4 * wanted)
    sides = defaultdict(set)
    for row in with_held_out(table, choose_prompts(lowest, sources, wanted)).to_pylist():
        sides[row["prompt_hash"]].add(row["split"])
    assert all(len(found) == 1 for found in sides.values())


@given(st.text(st.sampled_from("0129.,, \n\tAb\u00e9\u0663#\x1c\x85")))
def test_numbers_case_and_space_of_a_prompt_are_masked_whatever_its_script(prompt: str) -> None:
    assert masked(prompt) == " ".join(re.sub(r"\d+(?:[.,]\d+)*", "#", prompt).casefold().split())


@given(st.text(), st.floats(0, 0.5), st.floats(0, 0.49))
def test_validation_rows_change_no_held_out_row(prompt: str, held_out: float, validation: float) -> None:
    hashed = prompt_hash(prompt)
    alone, beside = split_of(hashed, held_out), split_of(hashed, held_out, validation)
    assert (alone == "held_out") == (beside == "held_out")
    assert split_of(hashed, held_out, 0.0) in {"pool", "held_out"}
    assert beside != "validation" or alone == "pool"


def test_no_fraction_gives_no_validation_rows_even_at_the_highest_hash() -> None:
    assert split_of(2**64 - 1, 0.0, 0.0) == "pool"
    assert split_of(2**64 - 1, 0.0, 1e-9) == "validation"


# --- the stage ---------------------------------------------------------------------------------------------------

WORDS = ["apple", "boat", "cloud", "drum", "eagle", "fern", "glove", "house"]


def mixture(seed: int = 0) -> list[dict[str, Any]]:
    """Uneven sources with near-copies inside and across them, and exact copies."""
    rng = random.Random(seed)
    sizes = {"large": 600, "middle": 150, "small": 45, "tiny": 3, "templates": 80}
    rows = []
    for source, size in sizes.items():
        for number in range(size):
            words = rng.choices(WORDS, k=1 if source == "templates" else 3)
            rows.append({"prompt": f"{' '.join(words)} {number}", "response": f"{number}", "source": source})
    return rows + rows[:20]


def build(run_dir: Path, rows: list[dict[str, Any]], num_files: int = 1, **fields: Any) -> Artifact:
    data = run_dir / "data"
    data.mkdir(parents=True)
    for number in range(num_files):
        (data / f"{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[number::num_files]))
    config = ExamplesConfig(dataset=str(data), source_field="source", rows_per_part=128, **fields)
    key = Key("examples", SCHEMAS["examples"], examples_recipe(config, corpus_identity(config)), {})
    return build_stage(context_of(Draft.open(Storage(str(run_dir / "run")), key), examples=config))


def rows_in(artifact: Artifact) -> list[dict[str, Any]]:
    return pa.concat_tables([artifact.read_table(part) for part in artifact.parts()]).to_pylist()


def hashes_of(artifact: Artifact) -> dict[str, str]:
    return {path: record["sha256"] for path, record in artifact.manifest["files"].items()}


def test_every_source_has_held_out_rows_and_no_near_copy_is_on_two_sides(
    ray_session: None, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("s2l_ray"), "propagate", True)
    artifact = build(tmp_path, mixture(), held_out_fraction=0.02, held_out_per_source=25, validation_fraction=0.1)
    rows, summary = rows_in(artifact), artifact.summary
    sides = defaultdict(set)
    for row in rows:
        sides[masked(row["prompt"])].add(row["split"])
    assert all(len(found) == 1 for found in sides.values())
    counts = Counter((row["source"], row["split"]) for row in rows)
    for source in ("large", "middle", "small"):
        assert counts[source, "held_out"] >= (25 if source != "small" else 15)
        assert counts[source, "pool"] > 0
    splits = Counter(row["split"] for row in rows)
    assert splits == {name: summary[name] for name in ("pool", "held_out", "validation")}
    assert min(splits.values()) > 0
    assert summary["rows"] == sum(splits.values()) == len(rows)
    for source, found in summary["sources"].items():
        assert found == {split: rows for (name, split), rows in counts.items() if name == source} | {
            split: 0 for split in ("pool", "held_out") if not counts[source, split]
        }
    assert "fewer than examples.held_out_per_source=25 rows" in caplog.text
    readers = {"pool": read_pool, "held_out": read_held_out, "validation": read_validation}
    for split, read in readers.items():
        found = [i for part in artifact.parts() for i in read(artifact, part, ["example_id"])["example_id"].to_pylist()]
        assert sorted(found) == sorted(row["example_id"] for row in rows if row["split"] == split)


def test_the_split_is_the_same_for_any_ranges_files_and_order(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = mixture()
    options = {"held_out_fraction": 0.01, "held_out_per_source": 20, "validation_fraction": 0.05}
    first = build(tmp_path / "one", rows, **options)
    for module in (order_module, splits_module):
        monkeypatch.setattr(module, "ROWS_DONE_HERE", 0)
    again = build(tmp_path / "other", random.Random(1).sample(rows, len(rows)), num_files=3, **options)
    assert hashes_of(first) == hashes_of(again)
    assert first.summary["sources"] == again.summary["sources"]


def test_held_out_rows_stay_held_out_when_more_are_asked_for(ray_session: None, tmp_path: Path) -> None:
    held_out = []
    for number, options in enumerate([{}, {"held_out_per_source": 10}, {"held_out_per_source": 20}]):
        artifact = build(tmp_path / str(number), mixture(), held_out_fraction=0.05, **options)
        held_out.append({row["example_id"] for row in rows_in(artifact) if row["split"] == "held_out"})
        assert "validation" not in artifact.summary
    assert held_out[0] < held_out[1] < held_out[2]


# --- imperfect corpora -------------------------------------------------------------------------------------------

TASKS = {"letter_counting": {"size": 400, "min_words": 3, "max_words": 6}, "basic_arithmetic": {"size": 200}}
IMPERFECTIONS = {"exact_copies": 0.05, "near_copies": 0.1, "wrong_answers": 0.06}


def read_generated(rows_of_a_shard: int = 256, **gym: Any) -> list[dict[str, Any]]:
    config = ExamplesConfig.model_validate({"dataset": {"reasoning_gym": {"tasks": TASKS, **gym}}})
    cut = cutting_module._cut_generated(config.dataset.reasoning_gym, rows_of_a_shard)
    return [rows.record(number) for [piece] in cut for rows in piece.read() for number in range(len(rows))]


def test_an_imperfect_corpus_has_the_copies_and_wrong_answers_asked_for_however_it_is_cut() -> None:
    rows, clean = read_generated(imperfections=IMPERFECTIONS), read_generated()
    assert rows == read_generated(37, imperfections=IMPERFECTIONS)
    assert rows != read_generated(imperfections=IMPERFECTIONS, seed=1)
    assert [row | {"imperfection": None} for row in clean] == read_generated(imperfections={})
    kinds = Counter(row["imperfection"] for row in rows)
    exact = len(rows) - len({(row["question"], row["answer"]) for row in rows})
    assert 15 <= exact <= 60
    assert 30 <= kinds["near_copy"] <= 95
    assert 15 <= kinds["wrong_answer"] <= 65
    prompts = {masked(row["question"]) for row in rows if row["imperfection"] != "near_copy"}
    assert all(masked(row["question"]) in prompts for row in rows if row["imperfection"] == "near_copy")
    right = {(row["source"], " ".join(row["question"].casefold().split())): row["answer"] for row in clean}
    for row in rows:
        answer = right[row["source"], " ".join(row["question"].casefold().split())]
        assert (row["answer"] == answer) == (row["imperfection"] != "wrong_answer")


def test_held_out_and_validation_rows_have_right_answers(ray_session: None, tmp_path: Path) -> None:
    config = ExamplesConfig.model_validate(
        {"dataset": {"reasoning_gym": {"tasks": TASKS, "imperfections": IMPERFECTIONS}}}
        | {"held_out_fraction": 0.1, "held_out_per_source": 60, "validation_fraction": 0.1}
    )
    key = Key("examples", SCHEMAS["examples"], examples_recipe(config, corpus_identity(config)), {})
    artifact = build_stage(context_of(Draft.open(Storage(str(tmp_path)), key), examples=config))
    rows = rows_in(artifact)
    wrong = Counter(row["split"] for row in rows if row["original"]["imperfection"] == "wrong_answer")
    assert wrong.keys() == {"pool"}
    assert all(counts["held_out"] >= 60 for counts in artifact.summary["sources"].values())
    assert artifact.summary["validation"] > 0
    assert artifact.summary["dropped"]["duplicate"] > 0
    sides = defaultdict(set)
    for row in rows:
        sides[masked(row["prompt"])].add(row["split"])
    assert all(len(found) == 1 for found in sides.values())
