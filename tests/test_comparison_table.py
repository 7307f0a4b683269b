"""The comparison's table as it is read: on a terminal, in a file, on the page; what arms cost; and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from s2l_ray.compare.arms import FULL, RANDOM
from s2l_ray.compare.costs import RunSizes, costs_of, spent_on
from s2l_ray.compare.statistics import ACCURACY, MACRO, TOKENS, Cell, Row, holm
from s2l_ray.compare.table import WIDTH, Comparison, compare_cells
from s2l_ray.compare.verdict import verdict
from s2l_ray.config import parse_config
from s2l_ray.errors import DataError
from s2l_ray.report.comparison import ComparisonFacts
from s2l_ray.report.page import build_report
from s2l_ray.storage.layout import COMPARE, TABLE
from s2l_ray.storage.places import Storage
from tests.test_report import Corpus, corpus, run, write_run

__all__ = ["corpus", "run"]  # fixtures

LONG = "clustering.a_very_long_field_of_the_config=100"
GAINS = {RANDOM: 0.0, "source_and_length_matched": 0.1, "s2l": 0.2, LONG: -0.1, FULL: 0.5}
BUDGETS, SEEDS = [10_000, 50_000], 5


def cells(lost: tuple[tuple[str, int], ...] = (), full_gain: float = 0.5) -> list[Cell]:
    """Made-up losses of all arms; those of (arm, seed) in `lost` at the first budget are not finite, and not marked so."""
    generator = np.random.default_rng(0)
    sources, tokens = [("big", "small")[i % 4 == 0] for i in range(60)], pa.array(generator.integers(1, 20, 60))
    names = [(arm, budget, seed) for arm in GAINS if arm != FULL for budget in BUDGETS for seed in range(SEEDS)]
    made = []
    for arm, budget, seed in [*names, (FULL, 200_000, 0)]:
        gain = full_gain if arm == FULL else GAINS[arm]
        losses = 12.0 - gain + generator.normal(0, 0.02) + generator.normal(0, 0.1, 60)
        if (arm, seed) in lost and budget == BUDGETS[0]:
            losses[3] = np.inf
        table = pa.table(
            {
                "example_id": [str(i) for i in range(60)],
                "source": sources,
                "loss": losses.astype(np.float32),
                "num_response_tokens": tokens,
            }
        )
        made.append(Cell(arm, budget, seed, table, float(generator.random()), 37_000 * budget, budget // 8, False))
    return made


def test_the_page_of_a_table_has_the_losses_first_and_their_details_below():
    answer, losses, details, *_ = compared(cells()).markdown().split("\n\n")
    assert answer.startswith("**S2L is better than random here")
    assert losses.count("|", 0, losses.index("\n")) == 8
    assert [line.split(" | ")[:2] for line in losses.splitlines()] == [line.split(" | ")[:2] for line in details.splitlines()]
    assert "response tokens" in details


def test_what_the_question_s_arm_adds_to_balanced_sources_is_said_by_pairs_of_seeds():
    renamed = [replace(cell, arm=cell.arm.replace("source_and_length_matched", "source_balanced")) for cell in cells()]
    found = compared(renamed)
    losses = {(cell["arm"], cell["seed"]): cell[TOKENS] for cell in found.cells if cell["budget"] == BUDGETS[0]}
    gains = [losses["s2l", seed] - losses["source_balanced", seed] for seed in range(SEEDS)]
    assert found.to_balanced[TOKENS].mean == pytest.approx(np.mean(gains))
    assert f"s2l to source_balanced, which needs no proxy, at 10,000 examples: {np.mean(gains):+.4f}" in found.text()
    assert not compared(cells()).to_balanced


def compared(of: list[Cell], **more: Any) -> Comparison:
    return compare_cells(of, primary="s2l", budgets=BUDGETS, redo_from="proxy", **more)


def test_the_terminal_s_table_fits_a_hundred_columns_whatever_an_arm_is_called() -> None:
    text = compared(cells((("s2l", 1), (LONG, 2)))).text()
    assert max(map(len, text.splitlines())) <= WIDTH
    assert "config=100" in text, "the end of a long name is what differs"
    assert text.count("10,000 examples\n") == text.count("50,000 examples\n") == 1


def test_a_loss_that_is_not_finite_marks_its_cell_and_is_counted_among_all_that_were_trained() -> None:
    made = compared(cells((("s2l", 1), (RANDOM, 2))))
    row = made.row("s2l", BUDGETS[0])
    assert row is not None
    assert (row.seeds, row.diverged) == (3, 1)
    assert np.isfinite([row.means[TOKENS], row.differences[MACRO].mean]).all()
    notes = " ".join(made.notes())
    assert "1 of 5 of s2l at 10,000" in notes
    assert "not the differences of the means beside them: source_and_length_matched at 10,000 (5 targets, 4 pairs)" in notes
    assert "at 50,000 (" not in notes
    assert [one["diverged"] for one in made.cells if one["loss_per_token"] is None] == [True, True]


def test_the_table_can_be_computed_again_from_its_own_file() -> None:
    table = json.loads(json.dumps(compared(cells()).to_json(), allow_nan=False))
    by_cell = {(one["arm"], one["budget"], one["seed"]): one for one in table["cells"]}
    for row in table["rows"]:
        for kind in (TOKENS, MACRO, ACCURACY) if row["differences"] else ():
            name = (row["arm"], row["budget"])
            pairs = [(by_cell[*name, seed][kind], by_cell[RANDOM, row["budget"], seed][kind]) for seed in range(SEEDS)]
            assert row["differences"][kind]["mean"] == pytest.approx(np.mean([a - b for a, b in pairs]))


def test_accuracies_are_corrected_for_being_many_the_primary_arm_s_too() -> None:
    found = [row.differences[ACCURACY] for row in compared(cells()).rows if row.differences]
    assert len(found) == 6
    assert [one.p_holm for one in found] == pytest.approx(holm([one.p for one in found]))


@pytest.mark.parametrize(("full_gain", "note"), [(0.5, None), (-0.1, "no better than random"), (0.01, "not clearly better")])
def test_a_gap_without_an_interval_or_without_a_gap_is_explained(full_gain: float, note: str | None) -> None:
    notes = " ".join(compared(cells(full_gain=full_gain)).notes())
    assert ("gap" in notes) == (note is not None)
    assert note is None or note in notes


def test_what_cannot_be_compared_is_refused_by_name() -> None:
    of = cells()
    with pytest.raises(DataError, match=r"source_and_length_matched-10000-seed0 has no rival random-10000-seed0"):
        compared([one for one in of if one.arm != RANDOM])
    with pytest.raises(DataError, match="no cell of the primary arm s2l at 10,000"):
        compared([one for one in of if one.arm != "s2l"])
    with pytest.raises(DataError, match="one seed has no interval"):
        compared([one for one in of if one.seed == 0])
    with pytest.raises(DataError, match="occurs twice"):
        compared([*of, of[0]])
    renamed = replace(of[-1], losses=of[-1].losses.set_column(1, "source", pa.array(["other"] * 60)))
    with pytest.raises(DataError, match="were evaluated on different rows"):
        compared([*of[:-1], renamed])


def test_random_is_not_advised_where_another_arm_is_better_than_it() -> None:
    made = compared([replace(one, arm={"s2l": LONG, LONG: "s2l"}.get(one.arm, one.arm)) for one in cells()])
    first, second = made.verdict
    assert first.startswith("S2L is worse than random here")
    assert second.startswith(f"{LONG} is better than both")
    alone: list[Row] = [row for row in made.rows if row.arm == "s2l" and row.budget == BUDGETS[0]]
    assert verdict(alone, alone[0], 0.1)[0].startswith("Take random: S2L is worse here")


# --- costs ---------------------------------------------------------------------------------------------------------

MEASURED = RunSizes(1_000, 2_000.0, 12, 10.0, 400.0, proxy_seconds=360.0, target_seconds_per_example=3.6)


def priced(folder: Path, **more: Any) -> Any:
    values = {
        "name": "costs",
        "examples": {"dataset": str(folder)},
        "proxy": {"model": "p", "epochs": 3},
        "target": {"model": "t", "epochs": 3},
        "selection": {"budget": 100},
        "plan": {"price_per_hour": 2.0, **more},
    }
    return parse_config(values)


def test_an_arm_costs_its_target_and_what_its_selection_needs(tmp_path: Path) -> None:
    config = priced(tmp_path)
    target, selection = 6 * 400 * 200 * 3, (6 * 3 + 2 * 12) * 10 * 2_000
    random, s2l, full = (spent_on(config, MEASURED, *one) for one in (("random", 100), ("s2l", 100), (None, 1_000)))
    assert [one.operations for one in (random, s2l, full)] == [target, target + selection, 10 * target]
    assert [one.hours for one in (random, s2l, full)] == pytest.approx([0.3, 0.4, 3.0])
    assert s2l.money == pytest.approx(0.8)
    assert spent_on(config, replace(MEASURED, proxy_seconds=None), "s2l", 100).hours is None, "unknown is not nothing"


def test_an_arm_that_needs_a_pass_of_its_own_pays_for_it_and_the_others_do_not(tmp_path: Path) -> None:
    config = parse_config(
        priced(tmp_path).model_dump(mode="json", exclude_unset=True)
        | {"trajectories": {"without_prompt": True, "embeddings": True}, "plan": {"response_fraction": 0.25}}
    )
    measured = replace(MEASURED, validation_tokens=500.0, trajectories_seconds=160.0)
    found = {name: spent_on(config, measured, name, 100) for name in ("random", "longest", "s2l", "ifd", "rds_plus")}
    one = 2 * 10 * 2_000
    assert found["longest"] == found["random"]
    assert found["ifd"].operations - found["s2l"].operations == pytest.approx(one / 4)
    assert found["rds_plus"].operations - found["s2l"].operations == pytest.approx(one * 1.25)
    passes = 12 + 0.25 + 1.25  # in 160 seconds
    seconds = {name: 3600 * (found[name].hours - found["random"].hours) for name in found}
    assert seconds["s2l"] == pytest.approx(200 + 160 * 12 / passes)
    assert seconds["ifd"] == pytest.approx(200 + 160 * 12.25 / passes)
    assert seconds["rds_plus"] == pytest.approx(200 + 160 * 13.25 / passes)
    alone = spent_on(priced(tmp_path, response_fraction=0.25), measured, "ifd", 100)
    assert 3600 * (alone.hours - found["random"].hours) == pytest.approx(200 + 160 * 12.25 / 12), "not recorded by the run"


def test_the_selection_s_hours_are_the_proxy_s_and_the_scoring_s(tmp_path: Path) -> None:
    found = costs_of(priced(tmp_path, accelerator="H100"), MEASURED, 100)
    by_name = {one["name"]: one for one in found["items"]}
    for unit in ("operations", "hours", "money"):
        assert by_name["selection (both)"][unit] == pytest.approx(by_name["proxy"][unit] + by_name["scoring"][unit])
    assert found["break_even"] == pytest.approx(by_name["selection (both)"]["operations"] / (6 * 400 * 1_800 * 3))


# --- the page ------------------------------------------------------------------------------------------------------


def test_the_page_shows_both_intervals_both_shares_and_the_cost(run: Storage, corpus: Corpus) -> None:
    write_run(run, corpus)
    of = [replace(one, arm="<b>x</b>") if one.arm == LONG else one for one in cells()]
    by_row = [{"arm": "s2l", "budget": BUDGETS[0], "operations": 1.5e9, "hours": 0.25, "money": None}]
    ablations = {"clustering.num_clusters": [(20, "s2l"), (40, "source_and_length_matched")]}
    made = compared(of, costs={"lines": ["Costs:"], "by_row": by_row}, ablations=ablations)
    run.child(COMPARE).write_json(TABLE, made.to_json())
    page = Path(build_report(run.uri)).read_text(encoding="utf-8")
    section = page.split('id="comparison"', 1)[1].split("</section>", 1)[0]
    assert "<br>rows \N{MINUS SIGN}0." in section
    assert "1.50e+09 operations, 0.25 h" in section
    assert "&lt;b&gt;x&lt;/b&gt;" in section
    assert "<b>x</b>" not in section
    found = ComparisonFacts.read(run)
    assert found is not None
    assert list(found.figures()) == ["difference_10000", "difference_50000", "loss_by_budget", "ablation_0"]
    assert all(sentence in section for sentence in made.verdict)


def test_the_page_is_drawn_where_every_target_on_all_data_diverged(run: Storage, corpus: Corpus) -> None:
    write_run(run, corpus)
    run.child(COMPARE).write_json(TABLE, compared(cells(full_gain=float("nan"))).to_json())
    assert "full (1 diverged)" in Path(build_report(run.uri)).read_text(encoding="utf-8")
