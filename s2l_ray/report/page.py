"""The page: one HTML file that shows what was chosen, what it cost and whether it was worth it.

The file is self-contained: plotly.js, styles and numbers are inlined, and its Content-Security-Policy allows no request
and no script but the two of ours, named by their hashes. So a corpus text that looks like a script stays a text even
where an escape were missing. The page is derived: building it again replaces it.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

from s2l_ray.errors import ArtifactError
from s2l_ray.progress import duration, get_log
from s2l_ray.report.comparison import difference_text, gap_text, over_rows_text
from s2l_ray.report.facts import NUM_PLOTTED_SOURCES, Facts
from s2l_ray.report.premise import explained_figure
from s2l_ray.report.reading import read_facts
from s2l_ray.report.wording import NONE, percent
from s2l_ray.storage.layout import MANIFEST, PAGE, STAGE_NAMES
from s2l_ray.storage.ownership import check_page
from s2l_ray.storage.places import Storage

_HERE = Path(__file__).resolve().parent


def build_report(run_dir: str) -> str:
    """(Re)build RUN_DIR/report/index.html from the stages that are finished; its place.

    Stages that are missing are named on the page. Raises ArtifactError where there is no run, for a damaged file, and where
    the place of the report has somebody else's files.
    """
    run = Storage(run_dir)
    if not any(run.exists(f"{name}/{MANIFEST}") for name in STAGE_NAMES):
        raise ArtifactError(f"{run.uri}: no finished stage there. Give the directory of a run (`s2l run` prints it).")
    report = run.child(STAGE_NAMES[-1])
    check_page(report)
    report.write(PAGE, render(read_facts(run)).encode())
    get_log("report").info("%s/%s", report.uri, PAGE)
    return f"{report.uri}/{PAGE}"


def render(facts: Facts) -> str:
    """The page as HTML."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"count": count, "percent": percent, "quantity": quantity, "signed": signed, "duration": duration}
    environment.filters |= {"csp_hash": csp_hash, "difference": difference_text, "gap": gap_text}
    environment.filters["over_rows"] = over_rows_text
    # Ours, not the corpus's: apart from the figures the only two strings that go in unescaped.
    style, plotly_js = Markup((_HERE / "style.css").read_text(encoding="utf-8")), Markup(get_plotlyjs())  # noqa: S704
    return environment.get_template("page.html").render(
        facts=facts, figures=figures(facts), num_plotted=NUM_PLOTTED_SOURCES, style=style, plotly_js=plotly_js
    )


def figures(facts: Facts) -> dict[str, Any]:
    """The page's figures as JSON that cannot end the script element it stands in, by name; only those with data."""
    from markupsafe import Markup

    from s2l_ray.report import plots

    shares = facts.principal_components
    made = {
        "cost": plots.cost(facts.costs) if facts.costs else None,
        "group_curves": plots.group_curves(facts.groups) if facts.groups else None,
        "group_sizes": plots.group_sizes(facts.groups) if facts.groups else None,
        "principal_components": plots.principal_components(shares) if any(shares) else None,
        "sources": plots.source_shares(facts.sources) if facts.sources else None,
        "proxy_loss": plots.losses(facts.proxy_losses) if any(facts.proxy_losses.values()) else None,
        "target_loss": plots.losses(facts.target_losses) if any(facts.target_losses.values()) else None,
    }
    if facts.premise is not None:
        made["premise"] = explained_figure(facts.premise)
    if facts.comparison is not None:
        made |= facts.comparison.figures()
    # Plotly escapes < by itself today; the page must not depend on it.
    return {name: Markup(figure.to_json().replace("<", "\\u003c")) for name, figure in made.items() if figure}  # noqa: S704


def csp_hash(script: str) -> str:
    """A script's name in a Content-Security-Policy."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


def count(value: float | None) -> str:
    """A number of things, with thousands separators; a dash for none."""
    return NONE if value is None else f"{value:,.0f}"


def quantity(value: float | None) -> str:
    """A measured value: four decimals, whole numbers as counts; a dash for none."""
    if value is None:
        return NONE
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4f}"


def signed(value: float | None) -> str:
    """A difference with its sign (a real minus); a dash for none."""
    if value is None:
        return NONE
    text = f"{value:+,}" if isinstance(value, int) else f"{value:+,.4f}"
    return text.replace("-", "\u2212")
