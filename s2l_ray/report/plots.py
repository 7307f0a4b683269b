"""The figures of the report: plain values in, a Plotly figure out.

Colours are Okabe and Ito's (told apart by colour-blind eyes, and legible on white and on black); text and grid lines
take theirs from `style.css`, so that one figure serves light, dark and paper. Names from a corpus go through `label`:
Plotly reads `<b>`, `<a>` and entities in labels as markup.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from s2l_ray.report.facts import NUM_PLOTTED_SOURCES, GroupCurves, Source, StageSeconds

if TYPE_CHECKING:
    import plotly.graph_objects as go

GREY, BLUE, ORANGE, GREEN = "#949494", "#1c86c7", "#e69f00", "#009e73"
PALE, VERMILLION = "#c4c4c4", "#d55e00"
ROLE_COLOURS = {"preparing": GREY, "choosing": BLUE, "target": ORANGE, "evaluating": GREEN}
# From low to high loss: blue over purple to vermillion, about equally bright.
LEVEL_COLOURS = ["#1c86c7", "#4a80c4", "#7579bb", "#9a71ab", "#b56a93", "#c86675", "#d36451", "#d55e00"]
LABEL_CHARACTERS = 24


def label(text: str, num_characters: int = LABEL_CHARACTERS) -> str:
    """A corpus's name as a label that Plotly shows letter by letter: escaped, on one line, cut in the middle."""
    text = " ".join(text.split())
    if len(text) > num_characters:
        tail = num_characters // 3
        text = f"{text[: num_characters - tail - 1]}…{text[-tail:]}"
    return html.escape(text, quote=False)


def cost(costs: Sequence[StageSeconds]) -> go.Figure:
    """Seconds per stage, coloured by what they were spent on."""
    import plotly.graph_objects as go

    figure = empty_figure(height=60 + 34 * len(costs))
    for role, colour in ROLE_COLOURS.items():
        chosen = [c for c in costs if c.role == role]
        figure.add_trace(
            go.Bar(
                orientation="h",
                y=[c.stage for c in chosen],
                x=[c.seconds for c in chosen],
                text=[f"{c.duration} ({c.fraction:.1%})" for c in chosen],
                textposition="outside",
                cliponaxis=False,
                marker_color=colour,
                name=role,
                hovertemplate="%{y}: %{text}<extra></extra>",
            )
        )
    figure.update_layout(barmode="overlay", showlegend=False, margin_t=8)
    # Room for the text behind the longest bar, on a phone too.
    figure.update_xaxes(title_text="seconds", range=[0, 1.6 * max(c.seconds for c in costs) or 1])
    figure.update_yaxes(categoryorder="array", categoryarray=[c.stage for c in costs][::-1], showgrid=False)
    return figure


def group_curves(groups: GroupCurves) -> go.Figure:
    """Every group's mean loss at every checkpoint, coloured by its level.

    One trace a colour and not a group: 1,400 groups are plotted as fast as ten.
    """
    import plotly.graph_objects as go

    figure = empty_figure(height=440)
    by_level = sorted(range(len(groups.sizes_K)), key=lambda k: groups.levels_K[k])
    num_colours = len(LEVEL_COLOURS)
    for colour in range(num_colours):
        chosen = by_level[len(by_level) * colour // num_colours : len(by_level) * (colour + 1) // num_colours]
        x: list[float | None] = []
        y: list[float | None] = []
        text: list[str] = []
        for k in chosen:  # None ends one group's line
            x += [*groups.steps_T, None]
            y += [*groups.centroids_KT[k].tolist(), None]
            text += [_group_text(groups, k)] * (len(groups.steps_T) + 1)
        figure.add_trace(
            go.Scatter(
                x=x,
                y=y,
                text=text,
                mode="lines+markers",
                line={"color": LEVEL_COLOURS[colour], "width": 1.5},
                marker={"size": 4},
                opacity=0.85 if len(by_level) <= 40 else 0.7,
                hovertemplate="%{text}<br>" + groups.step_label + " %{x:,}: %{y:.4f} nats<extra></extra>",
            )
        )
    figure.update_layout(showlegend=False, hovermode="closest", margin_t=8)
    figure.update_xaxes(title_text=groups.step_label, tickformat=",")
    figure.update_yaxes(title_text="mean loss in nats", rangemode="tozero")
    return figure


def group_sizes(groups: GroupCurves) -> go.Figure:
    """Size and quota of every group, the largest first; logarithmic where sizes differ much."""
    import plotly.graph_objects as go

    figure = empty_figure(height=340)
    order = sorted(range(len(groups.sizes_K)), key=lambda k: (-groups.sizes_K[k], k))
    ranks = list(range(1, len(order) + 1))
    series: list[tuple[str, Sequence[int], str]] = [("examples in the group", groups.sizes_K, GREY)]
    if groups.quotas_K is not None:
        series.append(("chosen from it", groups.quotas_K, BLUE))
    for name, values_K, colour in series:
        figure.add_trace(
            go.Bar(
                x=ranks,
                y=[values_K[k] for k in order],
                customdata=[_group_text(groups, k) for k in order],
                width=0.9 if len(order) <= 60 else 1.0,  # gaps of less than a pixel make a moiré
                marker={"color": colour, "line_width": 0},
                name=name,
                hovertemplate="%{customdata}<extra></extra>",
            )
        )
    figure.update_layout(barmode="overlay", bargap=0, hovermode="closest")
    figure.update_xaxes(title_text="groups, the largest first", range=[0.4, len(order) + 0.6], showgrid=False, tickformat=",d")
    figure.update_yaxes(title_text="examples", rangemode="tozero", tickformat=",")
    largest, smallest = max(groups.sizes_K), max(1, min(groups.sizes_K))
    if largest / smallest > 50:
        # Bars of one example stay visible: the axis starts at half an example.
        figure.update_yaxes(type="log", range=[math.log10(0.5), math.log10(largest * 1.3)], dtick=1)
        figure.update_yaxes(title_text="examples (logarithmic)")
    return figure


def principal_components(shares_T: Sequence[float]) -> go.Figure:
    """Share of the trajectories' variance in each principal component, the largest first."""
    import plotly.graph_objects as go

    figure = empty_figure(height=300)
    components = list(range(1, len(shares_T) + 1))
    text = [f"{share:.1%}" for share in shares_T] if len(shares_T) <= 8 else None
    hover = "component %{x}: %{y:.2%}<extra></extra>"
    bars = go.Bar(x=components, y=list(shares_T), text=text, textposition="outside", marker_color=BLUE, hovertemplate=hover)
    figure.add_trace(bars)
    figure.update_layout(margin_t=8, showlegend=False)
    figure.update_xaxes(title_text="principal component", tickformat=",d", showgrid=False)
    figure.update_xaxes(dtick=1 if len(shares_T) <= 16 else None)
    figure.update_yaxes(title_text="share of the variance", tickformat=".0%", range=[0, 1.1 * max(shares_T)])
    return figure


def source_shares(sources: Sequence[Source]) -> go.Figure:
    """Every source's share of the pool, of the chosen examples and of the random control."""
    import plotly.graph_objects as go

    shown = sources[:NUM_PLOTTED_SOURCES]
    series: list[tuple[str, str, list[float | None]]] = [
        ("pool", GREY, [s.pool_fraction for s in shown]),
        ("chosen", BLUE, [s.selected_fraction for s in shown]),
        ("random", ORANGE, [s.random_fraction for s in shown]),
    ]
    series = [row for row in series if any(value is not None for value in row[2])]
    figure = empty_figure(height=110 + (18 * len(series) + 14) * len(shown))
    for name, colour, fractions in series:
        figure.add_trace(
            go.Bar(
                orientation="h",
                y=list(range(len(shown))),
                x=fractions,
                customdata=[label(s.name, 80) for s in shown],
                marker_color=colour,
                name=name,
                hovertemplate="%{customdata}<br>" + name + ": %{x:.2%}<extra></extra>",
            )
        )
    figure.update_layout(barmode="group", bargap=0.25)
    figure.update_xaxes(title_text="share of the examples", tickformat=".0%", rangemode="tozero")
    # Positions are numbers: two names that look alike once cut must not become one row, nor a date an axis of dates.
    positions = {"tickvals": list(range(len(shown))), "ticktext": [label(s.name) for s in shown]}
    figure.update_yaxes(**positions, autorange="reversed", showgrid=False, zeroline=False)
    return figure


def losses(curves: Mapping[str, Sequence[Sequence[float]]]) -> go.Figure:
    """Loss over optimizer steps; `selected` and `random` keep their colours, points apart from a curve are markers."""
    import plotly.graph_objects as go

    figure = empty_figure(height=340)
    colours = {"selected": BLUE, "random": ORANGE, "training loss": GREY, "every example, at the checkpoints": BLUE}
    for name, points in curves.items():
        if points:
            steps, values = zip(*points, strict=True)
            figure.add_trace(
                go.Scatter(
                    x=steps,
                    y=values,
                    mode="lines+markers" if len(points) <= 30 else "lines",
                    line={"color": colours.get(name, GREEN), "width": 2},
                    marker={"size": 6},
                    name=name,
                    hovertemplate="step %{x:,}: %{y:.4f}<extra>" + name + "</extra>",
                )
            )
    figure.update_layout(showlegend=True)
    figure.update_xaxes(title_text="optimizer step", tickformat=",")
    figure.update_yaxes(title_text="loss in nats")
    return figure


def explained_variance(models: Sequence[str], shares: Sequence[Mapping[str, float | None]]) -> go.Figure:
    """Share of the gradients' variance that groups and sources explain, and random groups; a block of bars for each model."""
    import plotly.graph_objects as go

    figure = empty_figure(height=110 + 84 * len(models))
    colours = (BLUE, GREY, PALE, ORANGE, VERMILLION, GREEN)
    for name, colour in zip(shares[0], colours, strict=True):
        if any(of_model[name] is not None for of_model in shares):
            hover = "%{y}<br>" + name + ": %{x:.1%}<extra></extra>"
            values = [of_model[name] for of_model in shares]
            bars = go.Bar(orientation="h", y=list(models), x=values, marker_color=colour, name=name, hovertemplate=hover)
            figure.add_trace(bars)
    figure.update_layout(barmode="group", bargap=0.25)
    figure.update_xaxes(title_text="share of the gradients' variance", tickformat=".0%", rangemode="tozero")
    figure.update_yaxes(autorange="reversed", showgrid=False)
    return figure


def _group_text(groups: GroupCurves, k: int) -> str:
    """What a group is called in a hover label, with its size and quota."""
    quota = "" if groups.quotas_K is None else f", {groups.quotas_K[k]:,} chosen"
    return f"{label(groups.names_K[k], 60)}: {groups.sizes_K[k]:,} examples{quota}"


def empty_figure(height: int) -> go.Figure:
    """An empty figure in the page's look: transparent, legend above, no template (whose colours are for one background)."""
    import plotly.graph_objects as go

    axis: dict[str, Any] = {"automargin": True, "gridcolor": GREY, "linecolor": GREY, "zerolinecolor": GREY, "zerolinewidth": 1}
    axis["title"] = {"font": {"size": 13}, "standoff": 8}
    return go.Figure(
        layout={
            "template": go.layout.Template(),
            "height": height,
            "margin": {"l": 8, "r": 16, "t": 36, "b": 8},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "font": {"family": "system-ui, sans-serif", "size": 13, "color": GREY},
            "legend": {
                "orientation": "h",
                "x": 0,
                "xanchor": "left",
                "y": 1.0,
                "yanchor": "bottom",
                "bgcolor": "rgba(0,0,0,0)",
            },
            "hoverlabel": {"align": "left", "namelength": -1},
            "xaxis": axis,
            "yaxis": axis,
        }
    )
