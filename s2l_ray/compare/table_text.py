"""What the comparison's table says, row by row: for a terminal, and for a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from s2l_ray.compare.statistics import ACCURACY, LEVEL, LOSSES, MACRO, POOL, TOKENS, Difference, GapClosed, Row

ARM_WIDTH = 28
"""Columns of an arm's name on the terminal."""


TERMINAL_HEADER = ["", "by token", "to random", "by source", "to random", "gap", "tokens"]
LOSSES_HEADER = [
    "per token",
    "to random [95%]",
    "averaged over sources",
    "to random [95%]",
    "gap closed (by token / by source)",
]


def details_header(*, has_pool: bool) -> list[str]:
    """Over the cells of `detail_cells`."""
    pool = ["as in the pool", "to random [95%]"] * has_pool
    names = ["per token: over rows [95%]", "p", "averaged over sources: over rows [95%]", "p", *pool, "accuracy"]
    return [*names, "response tokens", "steps", "cost with selection", "seeds", "diverged"]


def aligned(value: str, width: int, column: int) -> str:
    """A cell of the terminal's table."""
    return value.ljust(width) if column in (0, 2, 4) else value.rjust(width)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _difference(found: Difference | None) -> str:
    if found is None:
        return ""
    p = found.p if found.p_holm is None else found.p_holm
    return f"{found.mean:+.4f} [{found.low:+.4f}, {found.high:+.4f}]{'*' if p < LEVEL else ''}"


def short_difference(found: Difference | None) -> str:
    """A difference with half its interval, marked where it is one at the 5% level."""
    if found is None:
        return ""
    p = found.p if found.p_holm is None else found.p_holm
    return f"{found.mean:+.4f} \N{PLUS-MINUS SIGN}{found.high - found.mean:.4f}{'*' if p < LEVEL else ''}"


def _counted(number: float) -> str:
    """A number of five characters at most."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}" if number < 999.5 * size else f"{number / size:.0f}{unit}"
    return f"{number:.0f}"


def _gap(found: GapClosed | None) -> str:
    if found is None:
        return "-"
    if found.low is None:
        return f"{found.share:.0%} [?]"
    return f"{found.share:.0%} [{found.low:.0%}, {found.high:.0%}]"


def _name(row: Row) -> str:
    lost = f" ({row.diverged} diverged)" if row.diverged else ""
    return f"{row.arm}{lost}"


def terminal_cells(row: Row) -> list[str]:
    """A row under `TERMINAL_HEADER`."""
    # The end of a long name: arms of an ablation differ there.
    name = _name(row)
    return [
        f"  {name}" if len(name) <= ARM_WIDTH - 2 else f"  \N{HORIZONTAL ELLIPSIS}{name[3 - ARM_WIDTH :]}",
        _number(row.means[TOKENS]),
        short_difference(row.differences.get(TOKENS)),
        _number(row.means[MACRO]),
        short_difference(row.differences.get(MACRO)),
        _short_gap(row.gap_closed[MACRO]) if MACRO in row.gap_closed else "",
        _counted(row.supervised_tokens),
    ]


def _short_gap(found: GapClosed | None) -> str:
    return "-" if found is None else f"{found.share:.0%}{' [?]' if found.low is None else ''}"


def markdown_table(header: Sequence[str], rows: Sequence[tuple[Row, list[str]]]) -> str:
    """Rows with their cells as Markdown."""
    lines = [["arm", "budget", *header], ["---"] * (len(header) + 2)]
    lines += [[_name(row), f"{row.budget:,}", *values] for row, values in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def loss_cells(row: Row) -> list[str]:
    """A row under `LOSSES_HEADER`."""
    gaps = " / ".join(_gap(row.gap_closed[kind]) for kind in LOSSES) if row.gap_closed else ""
    return [*(text for kind in LOSSES for text in (_number(row.means[kind]), _difference(row.differences.get(kind)))), gaps]


def detail_cells(row: Row, spent: Mapping[str, Any] | None) -> list[str]:
    """A row under `details_header`; `spent`: what a target of it costs."""
    cells = []
    for kind in LOSSES:
        found = row.differences.get(kind)
        over = "" if found is None or found.low_rows is None else f"[{found.low_rows:+.4f}, {found.high_rows:+.4f}]"
        p = "" if found is None else f"{found.p:.2g}" if found.p_holm is None else f"{found.p_holm:.2g} (Holm)"
        cells += [over, p]
    accuracy = "-" if row.means[ACCURACY] is None else f"{row.means[ACCURACY]:.3f}"
    if ACCURACY in row.differences:
        accuracy += f" ({_difference(row.differences[ACCURACY])})"
    pool = [_number(row.means[POOL]), _difference(row.differences.get(POOL))] if POOL in row.means else []
    cost = "" if spent is None else cost_words(spent)
    counts = [f"{row.supervised_tokens:,.0f}", f"{row.steps:,}", cost, str(row.seeds), str(row.diverged)]
    return [*cells, *pool, accuracy, *counts]


def cost_words(spent: Mapping[str, Any]) -> str:
    """Operations, hours and money as far as they are known."""
    units = {"operations": "{:.2e} operations", "hours": "{:,.3g} hours", "money": "{:,.2f} in money"}
    return ", ".join(words.format(spent[name]) for name, words in units.items() if spent[name] is not None)
