"""The statistics of a comparison by other means: textbook code, simulations with a known truth, and plain loops."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from s2l_ray.compare.arms import FULL, RANDOM
from s2l_ray.compare.statistics import (
    ACCURACY,
    MACRO,
    POOL,
    TOKENS,
    Cell,
    Difference,
    GapClosed,
    HeldOutLosses,
    Row,
    detectable_difference,
    gap_closed,
    holm,
    paired,
)
from s2l_ray.compare.table import Comparison, compare_cells
from s2l_ray.compare.verdict import verdict
from s2l_ray.errors import DataError

finite = st.floats(-5, 5, allow_nan=False).map(lambda value: round(value, 3))

# --- over seeds ----------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(finite, finite), min_size=2, max_size=12))
def test_a_paired_difference_is_the_paired_t_test(pairs: list[tuple[float, float]]) -> None:
    arm, random = np.array(pairs).T
    if np.ptp(arm - random) < 1e-6:
        return  # scipy has no t-test of values without variance
    found, expected = paired(arm - random), stats.ttest_rel(arm, random)
    low, high = expected.confidence_interval(0.95)
    np.testing.assert_allclose([found.low, found.high], [low, high], rtol=1e-9, atol=1e-12)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-9, abs=1e-12)
    assert found.mean == pytest.approx((arm - random).mean())
    assert found.pairs == len(pairs)


def test_differences_without_variance_are_certain_and_one_seed_has_no_interval() -> None:
    assert paired([0.5, 0.5, 0.5]).p == 0
    assert paired([0.0, 0.0]).p == 1
    assert (paired([0.5, 0.5]).low, paired([0.5, 0.5]).high) == (0.5, 0.5)
    with pytest.raises(DataError, match="one seed has no interval"):
        paired([0.1])


@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_s_correction_is_its_definition(p_values: list[float]) -> None:
    expected = []
    for i, p in enumerate(p_values):
        largest = 0.0
        for j, other in enumerate(p_values):
            if (other, j) <= (p, i):  # rejected before it, or itself: none may be accepted on the way
                num_left = sum((third, k) >= (other, j) for k, third in enumerate(p_values))
                largest = max(largest, num_left * other)
        expected.append(min(1.0, largest))
    assert holm(p_values) == pytest.approx(expected)


def test_holm_keeps_the_chance_of_any_false_alarm_at_five_percent() -> None:
    """Of twelve true null hypotheses, with a common part as arms have that share a control."""
    generator = np.random.default_rng(0)
    z = (generator.normal(size=(4_000, 12)) + generator.normal(size=(4_000, 1))) / math.sqrt(2)
    p_values = 2 * stats.norm.sf(np.abs(z))
    assert np.mean([min(holm(row)) < 0.05 for row in p_values]) < 0.05
    assert np.mean(p_values.min(axis=1) < 0.05) > 0.2, "without it there would be many"


@pytest.mark.parametrize("seeds", [3, 5, 8])
def test_the_detectable_difference_is_seen_in_eight_of_ten_simulated_comparisons(seeds: int) -> None:
    deviation, simulated = 0.025, 100_000
    size = detectable_difference(deviation, seeds)
    draws = np.random.default_rng(seeds).normal(size, deviation, (simulated, seeds))
    p_values = stats.ttest_1samp(draws, 0, axis=1).pvalue
    assert np.mean(p_values < 0.05) == pytest.approx(0.8, abs=5 * math.sqrt(0.16 / simulated))


# --- the share of the gap ------------------------------------------------------------------------------------------


def simulated_gaps(number: int, seeds: int, full_seeds: int) -> tuple[float, list[GapClosed | None]]:
    """The true share, and what comparisons of normal losses find of it."""
    generator = np.random.default_rng(1)
    found = []
    for _ in range(number):
        common = generator.normal(0, 0.01, seeds)  # what a seed does to both arms
        random, arm = (mean + common + generator.normal(0, 0.01, seeds) for mean in (2.0, 1.94))
        found.append(gap_closed(random, arm, generator.normal(1.9, 0.014, full_seeds)))
    return 0.6, found


@pytest.mark.parametrize(("seeds", "full_seeds"), [(5, 3), (8, 3), (5, 1)])
def test_the_interval_of_the_gap_closed_holds_the_true_share_in_95_of_100(seeds: int, full_seeds: int) -> None:
    """One target on all data has random's variance. With few seeds the interval is somewhat too wide rather than narrow."""
    number = 1_500
    share, found = simulated_gaps(number, seeds, full_seeds)
    inside = np.mean([gap is not None and (gap.low is None or gap.low <= share <= gap.high) for gap in found])
    assert inside > 0.95 - 3 * math.sqrt(0.95 * 0.05 / number)
    assert inside < 0.985, inside


@given(
    st.lists(st.tuples(finite, finite, finite), min_size=3, max_size=8),
    st.lists(finite, min_size=1, max_size=3),
    st.floats(0.5, 20),
)
def test_the_interval_of_the_gap_closed_is_all_shares_that_a_t_test_does_not_refuse(
    losses: list[tuple[float, float, float]], full: list[float], distance: float
) -> None:
    """Fieller's theorem by its meaning: a share s is refused where gain - s * gap is clearly not 0."""
    noise, own, _ = np.array(losses).T
    random, arm, all_data = noise + distance, noise + own, np.array(full) / 10
    found = gap_closed(random, arm, all_data)
    gap = random.mean() - all_data.mean()
    if gap <= 0:
        assert found is None
        return
    assert found is not None
    assert found.share == pytest.approx((random.mean() - arm.mean()) / gap)
    variance_full = (np.var(all_data, ddof=1) if len(full) > 1 else np.var(random, ddof=1)) / len(full)
    limit = stats.t.ppf(0.975, len(random) - 1)

    def is_refused(share: float) -> bool:
        mixed = (random - arm) - share * random
        error = math.sqrt(np.var(mixed, ddof=1) / len(random) + share**2 * variance_full)
        return bool(abs((random - arm).mean() - share * gap) > limit * error)

    gap_is_clear = gap > limit * math.sqrt(np.var(random, ddof=1) / len(random) + variance_full)
    assert (found.low is not None) == gap_is_clear or abs(gap) < 1e-3
    if found.low is not None and found.high is not None and found.high - found.low > 1e-4:
        width = found.high - found.low
        inside = np.linspace(found.low + width / 100, found.high - width / 100, 9)
        outside = [found.low - width / 100, found.high + width / 100, found.low - width, found.high + width]
        assert not any(map(is_refused, inside))
        assert all(map(is_refused, outside))


def test_there_is_no_share_of_a_gap_that_is_not_there() -> None:
    random, arm = np.array([1.0, 1.1, 0.9]), np.array([0.9, 1.0, 0.8])
    assert gap_closed(random, arm, np.array([1.2])) is None, "all data is worse than random"
    unclear = gap_closed(random, arm, np.array([0.98]))
    assert unclear is not None
    assert unclear.low is None
    assert unclear.high is None


# --- over held-out rows --------------------------------------------------------------------------------------------


def held_out(sizes: list[int], seed: int) -> tuple[HeldOutLosses, np.ndarray]:
    """Rows of sources, with tokens of their own number, and one value each."""
    generator = np.random.default_rng(seed)
    sources = np.repeat(np.arange(len(sizes)), sizes)
    tokens = generator.integers(1, 30, len(sources)).astype(float)
    values = generator.gamma(2, 0.1 * (1 + sources)) - 0.1 * sources
    return HeldOutLosses({}, tokens, sources), values


@pytest.mark.parametrize("sizes", [[400, 300], [900, 60, 150], [500]])
def test_the_bootstrap_s_interval_has_the_width_that_the_standard_error_gives(sizes: list[int]) -> None:
    """Linearised ratios: rows are drawn within their source, so a source's size is no part of the error."""
    rows, values = held_out(sizes, len(sizes))
    found = rows.bootstrap(values[None])
    tokens, sources = rows.tokens_R, rows.sources_R
    of_all, of_macro = 0.0, 0.0
    total = (tokens * values).sum() / tokens.sum()
    for source in range(len(sizes)):
        here = sources == source
        own_mean = (tokens * values)[here].sum() / tokens[here].sum()
        of_macro += len(values[here]) * np.var(tokens[here] * (values[here] - own_mean)) / tokens[here].sum() ** 2
        of_all += len(values[here]) * np.var(tokens[here] * (values[here] - total)) / tokens.sum() ** 2
    errors = {TOKENS: math.sqrt(of_all), MACRO: math.sqrt(of_macro) / len(sizes)}
    for kind, error in errors.items():
        low, high = found[kind][0]
        assert (high - low) / 2 / 1.96 == pytest.approx(error, rel=0.08)
        assert (high + low) / 2 == pytest.approx(rows.mean(values, kind), abs=0.3 * error)


def test_the_bootstrap_s_interval_holds_the_true_mean_in_95_of_100() -> None:
    generator, inside = np.random.default_rng(3), {TOKENS: 0, MACRO: 0}
    number, sources, tokens = 150, np.repeat([0, 1], [80, 40]), np.full(120, 5.0)
    for _ in range(number):
        values = generator.normal(0.1 * sources, 0.3)
        found = HeldOutLosses({}, tokens, sources).bootstrap(values[None])
        for kind, truth in ((TOKENS, 0.1 / 3), (MACRO, 0.05)):
            inside[kind] += int(found[kind][0, 0] <= truth <= found[kind][0, 1])
    assert min(inside.values()) / number > 0.95 - 3 * math.sqrt(0.95 * 0.05 / number)


# --- the table -----------------------------------------------------------------------------------------------------

ARMS, BUDGETS, SEEDS = [RANDOM, "source_balanced", "s2l"], [20, 40], 4


def table_of(losses: np.ndarray, tokens: list[int], sources: list[str], order: np.ndarray) -> pa.Table:
    ids = [f"row-{i}" for i in range(len(tokens))]
    table = pa.table(
        {"example_id": ids, "source": sources, "loss": losses.astype(np.float32), "num_response_tokens": pa.array(tokens)}
    )
    return table.take(pa.array(order))


def random_cells(diverged: tuple[str, int, int] | None = None) -> list[Cell]:
    """All cells of a comparison, their losses made up; the rows of each in an order of its own."""
    generator = np.random.default_rng(5)
    tokens, sources = generator.integers(1, 20, 50).tolist(), [("big", "small")[i % 5 == 0] for i in range(50)]
    hard, better = generator.normal(1.5, 0.3, 50), {RANDOM: 0.0, "source_balanced": 0.05, "s2l": 0.2, FULL: 0.4}
    names = [(FULL, 200, seed) for seed in range(2)]
    names += [(arm, budget, seed) for seed in range(SEEDS) for arm in ARMS for budget in BUDGETS]
    cells = []
    for arm, budget, seed in names:
        losses = hard - better[arm] - budget / 400 + generator.normal(0, 0.03) + generator.normal(0, 0.1, 50)
        is_lost = (arm, budget, seed) == diverged
        if is_lost:
            losses[7] = np.nan
        table = table_of(losses, tokens, sources, generator.permutation(50))
        accuracy = float(generator.integers(0, 11)) / 10
        cells.append(Cell(arm, budget, seed, table, accuracy, 1_000 * budget + seed, 2 * budget, is_lost))
    return cells


def plain_losses(cell: Cell) -> dict[str, float]:
    """Both losses of a cell, row by row."""
    sums: dict[str, list[float]] = {}
    for row in cell.losses.to_pylist():
        of_source = sums.setdefault(row["source"], [0.0, 0.0])
        of_source[0] += row["loss"] * row["num_response_tokens"]
        of_source[1] += row["num_response_tokens"]
    over_tokens = sum(total for total, _ in sums.values()) / sum(count for _, count in sums.values())
    return {TOKENS: over_tokens, MACRO: sum(total / count for total, count in sums.values()) / len(sums)}


def compared(cells: list[Cell]) -> Comparison:
    return compare_cells(cells, primary="s2l", budgets=BUDGETS, redo_from="selection")


@pytest.mark.parametrize("diverged", [None, ("s2l", 20, 1), (RANDOM, 20, 0), (FULL, 200, 1)])
def test_the_table_is_what_plain_loops_over_the_cells_rows_give(diverged: tuple[str, int, int] | None) -> None:
    cells = random_cells(diverged)
    made = compared(cells)
    by_name = {(cell.arm, cell.budget, cell.seed): cell for cell in cells}
    plain = {name: plain_losses(cell) for name, cell in by_name.items() if not cell.diverged}
    assert made.seeds == SEEDS
    assert made.num_held_out == 50
    p_values: list[tuple[str, int, str, float]] = []
    for budget in BUDGETS:
        for arm in ARMS:
            row = made.row(arm, budget)
            assert row is not None
            own = [seed for seed in range(SEEDS) if (arm, budget, seed) in plain]
            both = [seed for seed in own if (RANDOM, budget, seed) in plain]
            assert row.diverged == SEEDS - len(own)
            assert row.seeds == len(both)
            assert row.supervised_tokens == pytest.approx(1_000 * budget + 1.5)
            accuracies = [by_name[arm, budget, seed].accuracy for seed in own]
            assert row.means[ACCURACY] == pytest.approx(np.mean(accuracies))
            for kind in (TOKENS, MACRO):
                assert row.means[kind] == pytest.approx(np.mean([plain[arm, budget, seed][kind] for seed in own]))
                if arm == RANDOM:
                    assert not row.differences
                    continue
                arms_losses, randoms = ([plain[name, budget, seed][kind] for seed in both] for name in (arm, RANDOM))
                expected = stats.ttest_rel(arms_losses, randoms)
                found = row.differences[kind]
                low, high = expected.confidence_interval(0.95)
                np.testing.assert_allclose([found.low, found.high], [low, high], atol=1e-9)
                assert found.p == pytest.approx(expected.pvalue)
                assert found.low_rows < found.mean < found.high_rows
                full = np.mean([plain[FULL, 200, seed][kind] for seed in range(2) if (FULL, 200, seed) in plain])
                share = (np.mean(randoms) - np.mean(arms_losses)) / (np.mean(randoms) - full)
                assert row.gap_closed[kind].share == pytest.approx(share)
                if (arm, budget) != ("s2l", BUDGETS[0]):
                    p_values.append((arm, budget, kind, float(expected.pvalue)))
                else:
                    assert found.p_holm is None, "the question itself is not corrected"
    # Holm over all that is not the question, of both losses together.
    for (arm, budget, kind, _), corrected in zip(p_values, holm([p for *_, p in p_values]), strict=True):
        assert made.row(arm, budget).differences[kind].p_holm == pytest.approx(corrected)
    primary = made.row("s2l", BUDGETS[0])
    assert made.detectable == pytest.approx(detectable_difference(primary.differences[TOKENS].deviation, primary.seeds))


def test_a_table_of_too_few_finite_pairs_says_that_nothing_can_be_said_and_one_of_other_rows_is_refused() -> None:
    cells = random_cells()
    few = [cell for cell in cells if cell.seed < 2 or cell.arm == FULL]
    lost = [Cell(one.arm, one.budget, one.seed, one.losses, None, 1, 1, one.arm == "s2l" and one.seed == 1) for one in few]
    [sentence] = compared(lost).verdict
    assert sentence.startswith("Nothing can be said of S2L and random: fewer than two pairs at 20 examples have finite losses.")
    assert "1 of 2 of s2l at 20" in compared(lost).text()
    short = Cell("s2l", 40, 3, cells[-1].losses.slice(1), None, 1, 1, False)
    with pytest.raises(DataError, match="full-200-seed0 and s2l-40-seed3 were evaluated on different rows"):
        compared([*cells[:-1], short])


# --- the sentence --------------------------------------------------------------------------------------------------

BETTER, WORSE, UNCLEAR = (-0.2, -0.1), (0.1, 0.2), (-0.1, 0.2)


def row_of(arm: str, over_tokens: Any, macro: Any, share: float | None = None, budget: int = 20) -> Row:
    def difference(bounds: tuple[float, float]) -> Difference:
        low, high = bounds
        p = 0.01 if low * high > 0 else 0.4
        return Difference((low + high) / 2, low, high, 0.05, p, 5, p_holm=None if arm == "s2l" else p)

    gaps = {} if share is None else {kind: GapClosed(share, 0.1, 0.9) for kind in (TOKENS, MACRO)}
    differences = {TOKENS: difference(over_tokens), MACRO: difference(macro)}
    return Row(arm, budget, 5, 0, 10, 100.0, {}, differences, gaps)


@pytest.mark.parametrize(
    ("over_tokens", "macro", "sentence"),
    [
        (BETTER, BETTER, "S2L is better than random here: by 0.150 nats (95% interval 0.100 to 0.200) per token and 0.150"),
        (WORSE, WORSE, "Take random: S2L is worse here, by 0.150 nats"),
        (
            UNCLEAR,
            UNCLEAR,
            "No difference between S2L and random that this comparison could see at 20 examples (it would have seen 0.030",
        ),
        (BETTER, UNCLEAR, "S2L against random: better over tokens (0.150 nats (95% interval 0.100 to 0.200)), no difference"),
        (UNCLEAR, BETTER, "S2L against random: no difference to be seen over tokens (0.050 nats (95% interval -0.100 to 0.200"),
        (BETTER, WORSE, "S2L against random: better over tokens (0.150 nats (95% interval 0.100 to 0.200)), worse averaged"),
        (UNCLEAR, WORSE, "S2L against random: no difference to be seen over tokens"),
        (WORSE, UNCLEAR, "S2L against random: worse over tokens"),
    ],
)
def test_one_sentence_says_which_to_take(over_tokens: Any, macro: Any, sentence: str) -> None:
    primary = row_of("s2l", over_tokens, macro)
    found = verdict([primary], primary, 0.03)
    assert len(found) == 1
    assert found[0].startswith(sentence), found


def test_the_share_of_the_gap_is_said_where_it_is_known() -> None:
    primary = row_of("s2l", BETTER, BETTER, share=0.62)
    gap = primary.gap_closed[TOKENS]
    share = f"62% (95% interval {gap.low:.0%} to {gap.high:.0%}) of the gap to all data"
    assert f"{share} over tokens and {share} averaged" in verdict([primary], primary, 0.03)[0]


FAR_BETTER = (-0.5, -0.4)


@pytest.mark.parametrize(
    ("other", "is_named"),
    [
        (row_of("source_balanced", FAR_BETTER, FAR_BETTER), True),
        (row_of("source_balanced", UNCLEAR, FAR_BETTER), True),
        (row_of("source_balanced", WORSE, FAR_BETTER), False),  # worse in one loss
        (row_of("source_balanced", BETTER, BETTER), False),  # not clearly better than S2L
        (row_of("source_balanced", UNCLEAR, UNCLEAR), False),
        (row_of("source_balanced", FAR_BETTER, FAR_BETTER, budget=40), False),  # of another budget
    ],
)
def test_an_arm_that_is_better_than_both_is_named_and_no_other(other: Row, is_named: bool) -> None:
    primary = row_of("s2l", BETTER, BETTER)
    found = verdict([primary, other], primary, 0.03)
    assert len(found) == 1 + is_named
    if is_named:
        assert found[1].startswith("source_balanced is better than both: than random by")
        assert found[1].endswith("Take that.")


def test_an_arm_that_loses_what_the_primary_one_wins_is_not_better_than_both() -> None:
    primary, other = row_of("s2l", FAR_BETTER, UNCLEAR), row_of("x", UNCLEAR, FAR_BETTER)
    assert len(verdict([primary, other], primary, 0.03)) == 1


def test_a_share_of_a_gap_that_may_be_none_is_not_said() -> None:
    primary = row_of("s2l", BETTER, BETTER, share=14.05)
    unclear = dict.fromkeys((TOKENS, MACRO), GapClosed(14.05, None, None))
    assert "of the gap" not in verdict([], dataclasses.replace(primary, gap_closed=unclear), 0.03)[0]


def test_of_several_better_arms_the_best_by_source_is_named() -> None:
    primary = row_of("s2l", UNCLEAR, UNCLEAR)
    others = [row_of("longest", FAR_BETTER, FAR_BETTER), row_of("ifd", FAR_BETTER, (-0.9, -0.8))]
    assert verdict([primary, *others], primary, 0.03)[1].startswith("ifd is better than both")


def test_a_win_that_the_pool_s_shares_would_turn_round_says_so() -> None:
    primary = row_of("s2l", BETTER, BETTER)
    worse = Difference(0.15, 0.1, 0.2, 0.05, 0.01, 5)
    turned = dataclasses.replace(primary, differences=primary.differences | {POOL: worse})
    assert "weighed as in the pool" not in verdict([primary], primary, 0.1)[0]
    assert verdict([turned], turned, 0.1)[0].endswith(
        "With sources weighed as in the pool it is worse, by 0.150 nats (95% interval 0.100 to 0.200)."
    )


def test_balance_is_not_advised_where_the_target_will_meet_the_pool_s_shares() -> None:
    head, balanced = row_of("s2l", (-0.05, 0.2), (-0.05, 0.2)), row_of("source_balanced", BETTER, BETTER)
    assert verdict([head, balanced], head, 0.1)[1].endswith("Take that.")
    worse = Difference(0.15, 0.1, 0.2, 0.05, 0.01, 5)
    differing = dataclasses.replace(balanced, differences=balanced.differences | {POOL: worse})
    assert "Take that where every source is to count alike" in verdict([head, differing], head, 0.1)[1]
