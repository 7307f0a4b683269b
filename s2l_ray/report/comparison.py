"""The section of a finished comparison: its sentence, its table and its figures, from `compare/table.json` alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from s2l_ray.report.plots import BLUE, GREEN, GREY, ORANGE, empty_figure, label
from s2l_ray.storage.layout import COMPARE, TABLE
from s2l_ray.storage.places import Storage

if TYPE_CHECKING:
    import plotly.graph_objects as go

LOSSES = {"loss_per_token": "over tokens", "loss_macro": "averaged over sources"}
_COLOURS = {"loss_per_token": BLUE, "loss_macro": ORANGE}
RANDOM, FULL = "random", "full"


@dataclass(frozen=True)
class ComparisonFacts:
    """What the page shows of a comparison."""

    table: Mapping[str, Any]

    @classmethod
    def read(cls, run: Storage) -> ComparisonFacts | None:
        """A run's comparison; None where there is none that is finished."""
        found = run.child(COMPARE).read_json(TABLE)
        return cls(found) if isinstance(found, dict) and found.get("rows") else None

    @property
    def verdict(self) -> list[str]:
        """The sentence, and the second one where there is one."""
        return list(self.table["verdict"])

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Arm by arm, as in the table."""
        return list(self.table["rows"])

    def rows_at(self, budget: int) -> list[dict[str, Any]]:
        """The arms at a budget that have a difference to random."""
        return [row for row in self.rows if row["budget"] == budget and row["differences"]]

    def cost(self, row: Mapping[str, Any]) -> str:
        """What one target of an arm costs, with the selection's own, as far as it is known."""
        spent = {(one["arm"], one["budget"]): one for one in self.table["costs"].get("by_row", [])}
        found = spent.get((row["arm"], row["budget"]), {})
        units = {"operations": "{:.2e} operations", "hours": "{:,.3g} h", "money": "{:,.2f} in money"}
        return ", ".join(words.format(found[name]) for name, words in units.items() if found.get(name) is not None)

    def figures(self) -> dict[str, go.Figure]:
        """The figures by name: differences at each budget, loss against budget, and one for each ablation."""
        made = {f"difference_{budget}": differences(self.rows_at(budget)) for budget in self.table["budgets"]}
        if len(self.table["budgets"]) > 1:
            made["loss_by_budget"] = loss_by_budget(self.rows)
        for number, (_, arms) in enumerate(self.table["ablations"].items()):
            made[f"ablation_{number}"] = ablation(arms, self.rows_at(self.table["budgets"][0]))
        return made


def difference_text(found: Mapping[str, Any] | None) -> str:
    """A difference with its interval, marked where it is one at the 5% level."""
    if found is None:
        return ""
    p = found["p"] if found["p_holm"] is None else found["p_holm"]
    mark = " *" if p < 0.05 else ""
    return f"{found['mean']:+.4f} [{found['low']:+.4f}, {found['high']:+.4f}]{mark}".replace("-", "\u2212")


def over_rows_text(found: Mapping[str, Any] | None) -> str:
    """The interval of a difference by bootstrap over held-out rows, where there is one."""
    if found is None or found["low_rows"] is None:
        return ""
    return f"rows {found['low_rows']:+.4f} to {found['high_rows']:+.4f}".replace("-", "\u2212")


def gap_text(found: Mapping[str, Any] | None) -> str:
    """The share of the gap to all data that is closed, with its interval."""
    if found is None:
        return "\u2013"
    interval = "unbounded" if found["low"] is None else f"{found['low']:.0%} to {found['high']:.0%}"
    return f"{found['share']:.0%} ({interval})".replace("-", "\u2212")


def differences(rows: Sequence[Mapping[str, Any]]) -> go.Figure:
    """Each arm's difference to random in both losses, with the interval over seeds."""
    import plotly.graph_objects as go

    figure = empty_figure(height=110 + 44 * len(rows))
    for place, (kind, words) in enumerate(LOSSES.items()):
        found = [row["differences"][kind] for row in rows]
        figure.add_trace(
            go.Scatter(
                x=[one["mean"] for one in found],
                y=[number + (place - 0.5) * 0.3 for number in range(len(rows))],
                error_x={
                    "array": [one["high"] - one["mean"] for one in found],
                    "arrayminus": [one["mean"] - one["low"] for one in found],
                    "thickness": 1.5,
                },
                mode="markers",
                marker={"color": _COLOURS[kind], "size": 9, "symbol": "circle" if place else "diamond"},
                customdata=[[label(row["arm"], 60), difference_text(one)] for row, one in zip(rows, found, strict=True)],
                hovertemplate="%{customdata[0]}: %{customdata[1]}<extra>" + words + "</extra>",
                name=words,
            )
        )
    figure.add_vline(x=0, line={"color": ORANGE, "dash": "dot", "width": 1.5})
    figure.update_xaxes(title_text="nats more (right) or less (left) than random; left is better")
    positions = {"tickvals": list(range(len(rows))), "ticktext": [label(row["arm"], 32) for row in rows]}
    figure.update_yaxes(**positions, autorange="reversed", showgrid=False, zeroline=False)
    return figure


def loss_by_budget(rows: Sequence[Mapping[str, Any]]) -> go.Figure:
    """The mean loss averaged over sources of each arm against its budget, with random and all data."""
    import plotly.graph_objects as go

    figure = empty_figure(height=380)
    arms = list(dict.fromkeys(row["arm"] for row in rows if row["arm"] != FULL))
    for arm in arms:
        own = sorted((row for row in rows if row["arm"] == arm), key=lambda row: row["budget"])
        figure.add_trace(
            go.Scatter(
                x=[row["budget"] for row in own],
                y=[row["means"]["loss_macro"] for row in own],
                mode="lines+markers",
                line={"width": 3 if arm == RANDOM else 1.5, "color": ORANGE if arm == RANDOM else None},
                name=label(arm, 32),
            )
        )
    for row in rows:
        if row["arm"] == FULL and row["means"]["loss_macro"] is not None:
            figure.add_hline(y=row["means"]["loss_macro"], line={"color": GREY, "dash": "dot"}, annotation_text="all data")
    figure.update_layout(showlegend=True)
    figure.update_xaxes(title_text="examples", tickformat=",")
    figure.update_yaxes(title_text="loss averaged over sources, in nats")
    return figure


def ablation(arms: Sequence[Sequence[Any]], rows: Sequence[Mapping[str, Any]]) -> go.Figure:
    """The difference to random of S2L with one field at several values."""
    import plotly.graph_objects as go

    by_arm = {row["arm"]: row for row in rows}
    shown = [(value, by_arm[arm]) for value, arm in arms if arm in by_arm]
    figure = empty_figure(height=320)
    for kind, words in LOSSES.items():
        found = [row["differences"][kind] for _, row in shown]
        figure.add_trace(
            go.Scatter(
                x=list(range(len(shown))),
                y=[one["mean"] for one in found],
                error_y={
                    "array": [one["high"] - one["mean"] for one in found],
                    "arrayminus": [one["mean"] - one["low"] for one in found],
                },
                mode="lines+markers",
                line={"color": _COLOURS[kind]},
                name=words,
            )
        )
    figure.add_hline(y=0, line={"color": GREEN, "dash": "dot"})
    figure.update_layout(showlegend=True)
    figure.update_xaxes(
        tickvals=list(range(len(shown))), ticktext=[label(str(value), 24) for value, _ in shown], showgrid=False
    )
    figure.update_yaxes(title_text="nats to random; below 0 is better")
    return figure
