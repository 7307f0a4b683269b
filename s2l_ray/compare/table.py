"""The comparison as one table: a row per arm and budget, with everything that an outsider needs to compute it again."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from s2l_ray.compare.arms import BALANCED, FULL, RANDOM
from s2l_ray.compare.statistics import (
    ACCURACY,
    LOSSES,
    MACRO,
    POOL,
    TOKENS,
    Cell,
    Difference,
    Floats,
    GapClosed,
    HeldOutLosses,
    Row,
    detectable_difference,
    gap_closed,
    holm,
    paired,
)
from s2l_ray.compare.table_text import (
    LOSSES_HEADER,
    TERMINAL_HEADER,
    aligned,
    detail_cells,
    details_header,
    loss_cells,
    markdown_table,
    short_difference,
    terminal_cells,
)
from s2l_ray.compare.verdict import WORDS, verdict
from s2l_ray.errors import DataError

WIDTH = 100
"""Columns of the terminal's table."""


@dataclass(frozen=True)
class Comparison:
    """A finished comparison."""

    primary: str
    budgets: list[int]
    seeds: int
    redo_from: str
    num_held_out: int
    rows: list[Row]
    cells: list[dict[str, Any]]
    """Arm, budget, seed, both losses, accuracy, steps, tokens of each cell."""

    verdict: list[str]
    """One sentence, and where another arm is clearly better than random and the primary one a second that names it."""

    detectable: float | None
    """The smallest difference per token to random that these seeds would have seen, by the primary arm's own variance."""

    costs: dict[str, Any] = field(default_factory=dict)
    ablations: dict[str, list[tuple[Any, str]]] = field(default_factory=dict)
    to_balanced: dict[str, Difference] = field(default_factory=dict)
    """Of the primary arm to source-balanced random, by loss, at the first budget: what it adds to counting sources alike."""

    @property
    def has_pool(self) -> bool:
        """Whether there is the loss with sources weighed as in the pool."""
        return POOL in self.rows[0].means

    def row(self, arm: str, budget: int) -> Row | None:
        """An arm's row at a budget."""
        return next((row for row in self.rows if (row.arm, row.budget) == (arm, budget)), None)

    def to_json(self) -> dict[str, Any]:
        """Plain values, complete: the report's section is drawn from them alone."""
        primary = self.row(self.primary, self.budgets[0])
        deviation = primary.differences[TOKENS].deviation if primary and primary.differences else None
        return asdict(self) | {"pilot_deviation": deviation}

    def text(self) -> str:
        """The table for a terminal, of `WIDTH` columns at most."""
        lines = [TERMINAL_HEADER, *(terminal_cells(row) for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        shown = [
            "  ".join(aligned(value, width, i) for i, (value, width) in enumerate(zip(line, widths, strict=True))).rstrip()
            for line in lines
        ]
        titles = [f"{row.budget:,} examples" if row.arm != FULL else f"all {row.budget:,} examples" for row in self.rows]
        table = [shown[0]]
        for place, (title, line) in enumerate(zip(titles, shown[1:], strict=True)):
            table += [line] if place and titles[place - 1] == title else [title, line]
        words = [*self.notes(), "", *self.verdict]
        wrapped = [textwrap.fill(line, WIDTH, subsequent_indent="  ", drop_whitespace=True) for line in words]
        return "\n".join(["", *table, "", *wrapped])

    def markdown(self) -> str:
        """The same for a page."""
        spent = {(one["arm"], one["budget"]): one for one in self.costs.get("by_row", [])}
        tables = [
            markdown_table(LOSSES_HEADER, [(row, loss_cells(row)) for row in self.rows]),
            markdown_table(
                details_header(has_pool=self.has_pool),
                [(row, detail_cells(row, spent.get((row.arm, row.budget)))) for row in self.rows],
            ),
        ]
        answer = [f"**{sentence}**" for sentence in self.verdict]
        return "\n\n".join([*answer, *tables, "\n".join(self.notes()), ""])

    def notes(self) -> list[str]:
        """What the table does not say by itself."""
        again = {
            "proxy": "proxy, losses, groups, subset and target",
            "clustering": "groups, subset and target, from one proxy's losses",
            "selection": "subset and target, from one grouping",
            "target": "the target alone, on one subset",
        }[self.redo_from]
        notes = [
            f"{self.num_held_out:,} held-out rows, {self.seeds} seeds; each seed redoes {again}. In nats; less is better.",
            "Intervals: Student's over seeds, 95%. *: differs from random at the 5% level (with Holm's correction; "
            f"{self.primary} at the first budget is the question, and its losses are not corrected): with many "
            "contrasts an interval clear of 0 may have none.",
            *self._about_gaps(),
            *self._about_pool(),
            *self._about_balance(),
            *self._about_equals(),
        ]
        notes += self._about_diverged()
        accuracies = {row.means[ACCURACY] for row in self.rows}
        if accuracies == {None}:
            notes.append(
                "No accuracy: no answer that can be verified was generated (evaluation.answer_pattern, max_generations)."
            )
        elif accuracies <= {None, 0.0}:
            notes.append("Accuracy: none of these targets answers anything right, so it says nothing yet.")
        costs = self.costs.get("lines", [])
        return [*notes, *costs]

    def _about_diverged(self) -> list[str]:
        """What is in no mean, and which means are over other seeds than the difference beside them."""
        trained = Counter((cell["arm"], cell["budget"]) for cell in self.cells)
        lost = [
            f"{row.diverged} of {trained[row.arm, row.budget]} of {row.arm} at {row.budget:,}"
            for row in self.rows
            if row.diverged
        ]
        if not lost:
            return []
        finite = {(row.arm, row.budget): trained[row.arm, row.budget] - row.diverged for row in self.rows}
        unpaired = [
            f"{row.arm} at {row.budget:,} ({finite[row.arm, row.budget]} targets, {row.seeds} pairs)"
            for row in self.rows
            if row.differences and not row.seeds == finite[row.arm, row.budget] == finite[RANDOM, row.budget]
        ]
        apart = f" So these are not the differences of the means beside them: {'; '.join(unpaired)}." if unpaired else ""
        return [f"diverged, and in no mean: {'; '.join(lost)}. Differences are over the pairs of which neither has.{apart}"]

    def _about_equals(self) -> list[str]:
        """Arms whose cells have the losses of another's: they chose the same rows."""
        found: dict[tuple[Any, ...], list[str]] = {}
        for arm in dict.fromkeys(cell["arm"] for cell in self.cells if cell["arm"] != FULL and not cell["diverged"]):
            losses = tuple((one["budget"], one["seed"], one[TOKENS], one[MACRO]) for one in self.cells if one["arm"] == arm)
            found.setdefault(losses, []).append(arm)
        return [f"The same subsets here, and so the same losses: {', '.join(arms)}." for arms in found.values() if arms[1:]]

    def _about_pool(self) -> list[str]:
        """The third loss, for the primary arm and what is better."""
        if not self.has_pool:
            return []
        rows = [row for row in self.rows if row.budget == self.budgets[0] and POOL in row.differences]
        shown = "; ".join(f"{row.arm} {short_difference(row.differences[POOL])}" for row in rows)
        return [f"To random with each source weighed by its rows in the pool, at {self.budgets[0]:,} examples: {shown}."]

    def _about_balance(self) -> list[str]:
        """What the primary arm adds to balancing sources, for which no proxy is needed."""
        if not self.to_balanced:
            return []
        shown = [f"{short_difference(self.to_balanced[kind]).rstrip('*')} {words}" for kind, words in WORDS.items()]
        return [f"{self.primary} to {BALANCED}, which needs no proxy, at {self.budgets[0]:,} examples: {', '.join(shown)}."]

    def _about_gaps(self) -> list[str]:
        """Why a share of the gap has no interval, or is not there."""
        full = [row for row in self.rows if row.arm == FULL and row.seeds]
        gaps = [gap for row in self.rows for gap in row.gap_closed.values()]
        if not full:
            return []
        unclear = "[?]: all data is not clearly better than random, so that any share of the gap may be true."
        absent = "A gap of -: all data is no better than random, so that there is none to close."
        return [*[unclear] * any(gap and gap.low is None for gap in gaps), *[absent] * any(gap is None for gap in gaps)]


def compare_cells(
    cells: Sequence[Cell],
    *,
    primary: str,
    budgets: Sequence[int],
    redo_from: str,
    costs: dict[str, Any] | None = None,
    ablations: dict[str, list[tuple[Any, str]]] | None = None,
    pool: Mapping[str, int] | None = None,
) -> Comparison:
    """The table of finished cells; those with a loss that is not finite are marked as diverged. Raises DataError where random
    or the primary arm is missing or has one seed, or cells were evaluated on different rows. `pool`: rows by source."""
    _check(cells, primary, budgets)
    losses = HeldOutLosses.of(cells, pool)
    cells = [replace(one, diverged=one.diverged or not np.isfinite(losses.losses[one.name]).all()) for one in cells]
    found = {cell.name: {kind: losses.mean(losses.losses[cell.name], kind) for kind in losses.kinds} for cell in cells}
    arms = list(dict.fromkeys(cell.arm for cell in cells if cell.arm != FULL))
    full = [cell for cell in cells if cell.arm == FULL]
    of_full = {kind: np.array([found[cell.name][kind] for cell in full if not cell.diverged]) for kind in losses.kinds}
    rows = []
    for budget in budgets:
        pairs = {arm: _pairs(cells, arm, budget) for arm in arms}
        by_rows = _over_rows(losses, pairs)
        rows += [_row(arm, budget, cells, pairs[arm], found, of_full, by_rows.get(arm)) for arm in arms]
    if full:
        rows.append(_row(FULL, full[0].budget, cells, [], found, of_full, None))
    rows = _corrected(rows, primary, budgets[0])
    head = next(row for row in rows if (row.arm, row.budget) == (primary, budgets[0]))
    detectable = detectable_difference(head.differences[TOKENS].deviation, head.seeds) if head.differences else None
    return Comparison(
        primary=primary,
        budgets=list(budgets),
        seeds=max(cell.seed for cell in cells if cell.arm == RANDOM) + 1,
        redo_from=redo_from,
        num_held_out=len(losses.tokens_R),
        rows=rows,
        cells=[_plain(cell, found[cell.name]) for cell in cells],
        verdict=verdict(rows, head, detectable),
        detectable=detectable,
        costs=costs or {},
        ablations=ablations or {},
        to_balanced=_to_balanced(cells, found, primary, budgets[0], losses.kinds),
    )


def _check(cells: Sequence[Cell], primary: str, budgets: Sequence[int]) -> None:
    names = {cell.name for cell in cells}
    if len(names) < len(cells):
        raise DataError("compare: an arm occurs twice with one budget and seed. Remove one of the cells.")
    for cell in cells:
        rival = f"{RANDOM}-{cell.budget}-seed{cell.seed}"
        if cell.arm != FULL and rival not in names:
            raise DataError(f"compare: the cell {cell.name} has no rival {rival}. Train that, or leave the cell out.")
    own = [cell.seed for cell in cells if (cell.arm, cell.budget) == (primary, budgets[0])]
    if not own:
        raise DataError(f"compare: no cell of the primary arm {primary} at {budgets[0]:,} examples. Train it, or name another.")
    if len(own) < 2:
        paired(own)


def _pairs(cells: Sequence[Cell], arm: str, budget: int, rival: str = RANDOM) -> list[tuple[Cell, Cell]]:
    """An arm's cells at a budget, each with a rival's of the same seed; without those of which one has diverged."""
    of_rival = {cell.seed: cell for cell in cells if (cell.arm, cell.budget) == (rival, budget)}
    own = sorted((cell for cell in cells if (cell.arm, cell.budget) == (arm, budget)), key=lambda cell: cell.seed)
    together = [(cell, of_rival[cell.seed]) for cell in own if cell.seed in of_rival]
    return [pair for pair in together if not any(cell.diverged for cell in pair)]


def _to_balanced(
    cells: Sequence[Cell], found: Mapping[str, Mapping[str, float]], primary: str, budget: int, kinds: Sequence[str]
) -> dict[str, Difference]:
    """Of the primary arm to source-balanced random; nothing where that is no arm, or fewer than two pairs are finite."""
    pairs = [] if primary == BALANCED else _pairs(cells, primary, budget, BALANCED)
    if len(pairs) < 2:
        return {}
    return {kind: paired(np.array([found[a.name][kind] - found[b.name][kind] for a, b in pairs])) for kind in kinds}


def _over_rows(losses: HeldOutLosses, pairs: Mapping[str, list[tuple[Cell, Cell]]]) -> dict[str, dict[str, Floats]]:
    """For each arm but random the intervals over held-out rows, by loss."""
    arms = [arm for arm, found in pairs.items() if found and arm != RANDOM]
    if not arms:
        return {}
    of_arm = [np.mean([losses.losses[a.name] - losses.losses[b.name] for a, b in pairs[arm]], axis=0) for arm in arms]
    intervals = losses.bootstrap(np.array(of_arm))
    return {arm: {kind: intervals[kind][place] for kind in losses.kinds} for place, arm in enumerate(arms)}


def _row(
    arm: str,
    budget: int,
    cells: Sequence[Cell],
    pairs: list[tuple[Cell, Cell]],
    found: Mapping[str, Mapping[str, float]],
    of_full: Mapping[str, Floats],
    by_rows: Mapping[str, Floats] | None,
) -> Row:
    own = [cell for cell in cells if (cell.arm, cell.budget) == (arm, budget)]
    finite = [cell for cell in own if not cell.diverged]
    answers = [cell.accuracy for cell in finite if cell.accuracy is not None]
    means: dict[str, float | None] = {
        kind: float(np.mean([found[cell.name][kind] for cell in finite])) if finite else None for kind in of_full
    }
    means[ACCURACY] = float(np.mean(answers)) if answers else None
    differences: dict[str, Difference] = {}
    gaps: dict[str, GapClosed | None] = {}
    if arm not in (RANDOM, FULL) and len(pairs) > 1:
        for kind in of_full:
            own_K, random_K = (np.array([found[pair[side].name][kind] for pair in pairs]) for side in (0, 1))
            low, high = (float(value) for value in by_rows[kind]) if by_rows is not None else (None, None)
            differences[kind] = replace(paired(own_K - random_K), low_rows=low, high_rows=high)
            gaps[kind] = gap_closed(random_K, own_K, of_full[kind]) if len(of_full[kind]) else None
        scored = [(a.accuracy, b.accuracy) for a, b in pairs if a.accuracy is not None and b.accuracy is not None]
        if len(scored) > 1:
            differences[ACCURACY] = paired([a - b for a, b in scored])
    return Row(
        arm=arm,
        budget=budget,
        seeds=len(finite) if arm in (RANDOM, FULL) else len(pairs),
        diverged=len(own) - len(finite),
        steps=own[0].steps,
        supervised_tokens=float(np.mean([cell.supervised_tokens for cell in own])),
        means=means,
        differences=differences,
        gap_closed=gaps,
    )


def _corrected(rows: list[Row], primary: str, budget: int) -> list[Row]:
    """The rows with Holm's correction over all their differences in the two losses, but for those of the primary contrast; and
    each over all rows, over those with sources weighed as in the pool and over those in accuracy."""
    others = [
        (row, kind) for row in rows for kind in LOSSES if kind in row.differences and (row.arm, row.budget) != (primary, budget)
    ]
    families = [others, *([(row, kind) for row in rows if kind in row.differences] for kind in (POOL, ACCURACY))]
    found = {(row.arm, row.budget): dict(row.differences) for row in rows}
    for family in families:
        corrected = holm([row.differences[kind].p for row, kind in family])
        for (row, kind), p in zip(family, corrected, strict=True):
            found[row.arm, row.budget][kind] = replace(row.differences[kind], p_holm=p)
    return [replace(row, differences=found[row.arm, row.budget]) for row in rows]


def _plain(cell: Cell, losses: Mapping[str, float]) -> dict[str, Any]:
    names = ("arm", "budget", "seed", "accuracy", "supervised_tokens", "steps", "diverged")
    finite = {kind: value if np.isfinite(value) else None for kind, value in losses.items()}
    return {name: getattr(cell, name) for name in names} | finite
