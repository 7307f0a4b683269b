"""A picture beside every table of `results/compare`: each arm's differences to random, as the report page draws them.

pip install kaleido          # and a Chromium or Chrome
python benchmarks/plots.py
"""

from __future__ import annotations

import json
from pathlib import Path

from s2l_ray.report.comparison import differences

RESULTS = Path(__file__).parent / "results" / "compare"
INK, PAPER, LINES = "#333333", "#ffffff", "#dddddd"


def main() -> None:
    """Draw all of them."""
    for path in sorted(RESULTS.glob("*-table.json")):
        table, name = json.loads(path.read_text(encoding="utf-8")), path.name.removesuffix("-table.json")
        for number, budget in enumerate(table["budgets"]):
            rows = [row for row in table["rows"] if row["budget"] == budget and row["differences"]]
            seeds = " or ".join(map(str, sorted({row["seeds"] for row in rows})))
            figure = differences(rows)
            title = {"text": f"{name}: {budget:,} examples, {seeds} seeds", "y": 0.98}
            figure.update_layout(title=title, width=860, margin={"t": 90, "r": 20})
            figure.update_layout(font={"color": INK}, paper_bgcolor=PAPER, plot_bgcolor=PAPER)
            figure.update_xaxes(gridcolor=LINES)
            figure.write_image(path.with_name(f"{name}{f'-{budget}' if number else ''}.svg"))


if __name__ == "__main__":
    main()
