"""The report: one file, honest sentences, exact numbers, and nothing of a corpus that a browser would run.

What the plain tests cannot see is whether a browser draws the plots; the last one opens the page in a Chromium if there
is one on this machine.
"""

from __future__ import annotations

import datetime
import io
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from s2l_ray.errors import ArtifactError
from s2l_ray.report.facts import GroupCurves, Text
from s2l_ray.report.page import build_report, count, quantity, signed
from s2l_ray.report.plots import label
from s2l_ray.report.reading import nearest, read_facts
from s2l_ray.report.wording import budgets, measures, percent, quality, shown_groups, sources, verdict, without_credentials
from s2l_ray.storage.artifacts import Artifact, Key
from s2l_ray.storage.drafts import Draft
from s2l_ray.storage.places import Storage

HOSTILE = "</script><script>alert(1)</script>"
BOLD = "<b>x</b>"
SOURCES = ["gsm8k", HOSTILE, BOLD]
HOSTILE_TEXT = (
    'A <script>document.title="owned"</script><img src="http://evil.example/x.png" onerror="document.title=1"> & more'
)
STAGES = ["examples", "proxy", "trajectories", "clustering", "selection", "target", "evaluation"]
STEPS = [10, 20, 30, 40, 50]


class Page(HTMLParser):
    """What a browser would see: tags with their attributes, the text outside scripts, and the scripts."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "script":
            self.scripts[-1] += data
        elif self.cdata_elem is None:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def figures(self) -> dict[str, Any]:
        """The figures' JSON by the id of their element."""
        names = [attrs["id"] for _, attrs in self.tags if attrs.get("class") == "plot"]
        return dict(zip(names, (json.loads(s) for s in self.scripts if s.startswith('{"data"')), strict=True))


class Corpus:
    """A synthetic run with planted groups: group k learns from 4 - k / K down, its members lie at known distances."""

    def __init__(self, num_clusters: int, rows_per_cluster: int, part_rows: int = 64) -> None:
        self.num_clusters, self.part_rows = num_clusters, part_rows
        self.num_rows = num_clusters * rows_per_cluster
        self.ids = [f"id-{i:05d}" for i in range(self.num_rows)]
        self.clusters = np.arange(self.num_rows) % num_clusters
        # Row i is the (i // K)-th of its group; the last ones are nearest, so that order of ids alone finds nothing.
        self.distances = ((rows_per_cluster - 1 - np.arange(self.num_rows) // num_clusters) / 8).astype(np.float32)
        self.sources = [SOURCES[i % 7 % 3] for i in range(self.num_rows)]
        level_K = np.linspace(0.5, 4.0, num_clusters)
        self.centroids = (level_K[:, None] * np.linspace(1.0, 0.4, len(STEPS))).astype(np.float32)
        self.selected = [i for i in range(self.num_rows) if i // num_clusters in {0, rows_per_cluster - 1}]

    def prompt(self, row: int) -> str:
        return f"What is {row} plus {row}? {HOSTILE_TEXT}" if row % 2 else f"Long {row} " + "word " * 400

    def text_columns(self, rows: list[int]) -> dict[str, Any]:
        return {
            "example_id": [self.ids[i] for i in rows],
            "source": [self.sources[i] for i in rows],
            "prompt": [self.prompt(i) for i in rows],
            "response": [f"The answer is {2 * i}." for i in rows],
        }


@pytest.fixture
def corpus() -> Corpus:
    return Corpus(num_clusters=5, rows_per_cluster=50)


def write_run(run: Storage, corpus: Corpus, until: str = "evaluation", loss: tuple[float, float] = (1.23, 1.27)) -> None:
    """A run directory whose first stages up to `until` are finished; `loss` is that of selected and of random."""
    run.write_json("run.json", {"schema": "s2l_ray/1", "provenance": {}, "name": "planted", "clustering": {"num_clusters": 5}})
    writers = [_examples, _proxy, _trajectories, _clustering, _selection, _target, _evaluation]
    artifacts: dict[str, Artifact] = {}
    for index, (stage, writer) in enumerate(zip(STAGES, writers, strict=True)):
        inputs = {} if not artifacts else {STAGES[index - 1]: artifacts[STAGES[index - 1]].identity}
        draft = Draft.open(run, Key(stage, 1, {"seed": index}, inputs))
        draft.created -= datetime.timedelta(seconds=[12, 100, 50, 4, 1, 60, 21][index])
        summary = writer(draft, corpus, loss) if stage == "evaluation" else writer(draft, corpus)
        grouping = {"engine": "in memory, 2 threads", "seconds": {"grouping": 3.1, "writing": 0.2}}
        artifacts[stage] = draft.publish(summary, grouping if stage == "clustering" else {"workers": 2})
        if stage == until:
            return


def _examples(draft: Draft, corpus: Corpus) -> dict[str, Any]:
    draft.write_table("part-00000.parquet", pa.table(corpus.text_columns([])).cast(_TEXT_SCHEMA))  # a part may be empty
    for number, start in enumerate(range(0, corpus.num_rows, corpus.part_rows), start=1):
        rows = list(range(start, min(start + corpus.part_rows, corpus.num_rows)))
        draft.write_table(f"part-{number:05d}.parquet", pa.table(corpus.text_columns(rows)).cast(_TEXT_SCHEMA))
    pools = {name: corpus.sources.count(name) for name in SOURCES}
    held_out = {name: {"pool": pools[name], "held_out": 7 + i} for i, name in enumerate(SOURCES)}
    dropped = {"duplicate": 1_234, "empty response": 5}
    first = {"empty response": f"data/{HOSTILE}.jsonl line 4,812: field 'response' is empty."}
    summary = {"rows": corpus.num_rows + 24, "pool": corpus.num_rows, "held_out": 24, "dropped": dropped, "sources": held_out}
    return summary | {"dropped_by_source": {HOSTILE: {"empty response": 5}}, "first_dropped": first}


_TEXT_SCHEMA = pa.schema([(name, pa.string()) for name in ("example_id", "source", "prompt", "response")])


def _proxy(draft: Draft, corpus: Corpus) -> dict[str, Any]:
    loss = [[step, 5 - step / 20] for step in range(1, 51)]
    common = {"steps": STEPS, "total_steps": 50, "tokens": 99_000, "training_loss": loss, "global_batch_size": 32}
    return common | {"rows": corpus.num_rows, "num_parameters": 1_400_000, "dropped": {"no_label": 3}, "shortened": {"cut": 17}}


def _trajectories(draft: Draft, corpus: Corpus) -> dict[str, Any]:
    draft.write_table("part-00000.parquet", pa.table({"example_id": corpus.ids}))
    means = corpus.centroids.mean(axis=0).tolist()
    return {"rows": corpus.num_rows, "num_checkpoints": 5, "steps": STEPS, "mean_losses": means, "tokens": 70_000}


def _clustering(draft: Draft, corpus: Corpus) -> dict[str, Any]:
    half = corpus.num_rows // 2
    for number, rows in enumerate([slice(0, half), slice(half, None)]):
        columns = {"example_id": corpus.ids[rows], "cluster_id": corpus.clusters[rows], "distance": corpus.distances[rows]}
        draft.write_table(f"assignments-{number:05d}.parquet", pa.table(columns))
    buffer = io.BytesIO()
    np.save(buffer, corpus.centroids)
    draft.write("centroids.npy", buffer.getvalue())
    sizes = np.bincount(corpus.clusters, minlength=corpus.num_clusters).tolist()
    capped = {"gsm8k": {"num_clusters": 2, "because": "it has 2 rows"}}
    common = {"inertia": 1.5, "explained_variance": 0.973, "num_iterations": 9, "capped": capped, "strata": {}}
    common |= {
        "ended_by": ["converged", "num_iterations"],
        "diagnostics": DIAGNOSTICS | {"training_rows": corpus.num_rows - 50},
    }
    return common | {"rows": corpus.num_rows, "num_clusters": corpus.num_clusters, "sizes": sizes}


DIAGNOSTICS = {
    "features": "raw",
    "tiny_groups": 2,
    "tiny_rows": 10,
    "variance_explained_by_source": 0.125,
    "principal_components": [0.945, 0.04, 0.01, 0.004, 0.001],
    "effective_dimension": 1.118,
    "agreement_of_restarts": 0.6789,
    "agreement_with_source": 0.0345,
    "sampled_rows": 128,
    "warning": f"one direction holds 94.5% of the variance {HOSTILE}",
}


def _selection(draft: Draft, corpus: Corpus) -> dict[str, Any]:
    columns = corpus.text_columns(corpus.selected)
    columns["_example_id"] = columns.pop("example_id")
    columns["example_id"] = ["the corpus's own"] * len(corpus.selected)  # so that ours is underscored
    draft.write_table("selected.parquet", pa.table(columns))
    sizes = np.bincount(corpus.clusters, minlength=corpus.num_clusters).tolist()
    quotas = np.bincount(corpus.clusters[corpus.selected], minlength=corpus.num_clusters).tolist()
    by_source = {
        name: {
            "pool": corpus.sources.count(name),
            "selected": sum(corpus.sources[i] == name for i in corpus.selected),
            "random": corpus.sources.count(name) // 25,
        }
        for name in SOURCES
    }
    tokens = {"pool": 1_000_000, "selected": 45_678, "random": 44_000}
    names = {"example_id": "_example_id", "cluster_id": "cluster_id", "weight": "weight"}
    common = {
        "budget": len(corpus.selected),
        "num_response_tokens": tokens,
        "columns": names,
        "num_clusters": corpus.num_clusters,
    }
    budgets = [{"budget": len(corpus.selected), "rows": len(corpus.selected), "file": "selected.parquet"}]
    budgets.append({"budget": 0.29, "rows": 72, "file": f"selected-{BOLD}.parquet"})
    budgets.append({"budget": {"tokens": 20_000}, "rows": 4, "file": "selected-tokens-20000.parquet"})
    return common | {
        "stability": {"rows": 128, "chosen": 5, "common": 0.3456, "without_groups": 0.04},
        "budgets": budgets,
        "rows": len(corpus.selected),
        "pool": corpus.num_rows,
        "sizes": sizes,
        "quotas": quotas,
        "sources": by_source,
    }


def _target(draft: Draft, corpus: Corpus) -> dict[str, Any]:
    curve = [[step, 4 - step / 10] for step in range(1, 21)]
    other = [[step, 4.1 - step / 10] for step in range(1, 21)]
    common = {"num_parameters": 56_000_000, "total_steps": 20, "training_loss": {"selected": curve, "random": other}}
    return common | {"rows": len(corpus.selected)}


def _evaluation(draft: Draft, corpus: Corpus, loss: tuple[float, float]) -> dict[str, Any]:
    def metrics(value: float, accuracy: float) -> dict[str, Any]:
        by_source = {name: value + i / 10 for i, name in enumerate(SOURCES)}
        tasks = {"reasoning_gym": {"exact_match": accuracy, "rows": 24}}
        return {"loss_per_token": value, "loss_by_source": by_source, "loss_macro": value + 0.1, "tasks": tasks}

    found = {"untrained": metrics(4.5678, 0.0), "selected": metrics(loss[0], 0.4321), "random": metrics(loss[1], 0.3)}
    draft.write("metrics.json", json.dumps(found).encode())
    return {"rows": 24, "sources": {name: 7 + i for i, name in enumerate(SOURCES)}}


def page_of(run: Storage) -> Page:
    return Page(Path(build_report(run.uri)).read_text(encoding="utf-8"))


@pytest.fixture
def run(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "run"))


def test_dropped_rows_are_shown_by_source_with_the_first_of_each_kind(run: Storage, corpus: Corpus) -> None:
    write_run(run, corpus)
    words = page_of(run).text
    assert f"source reason dropped {HOSTILE} empty response 5" in words
    assert f"empty response : data/{HOSTILE}.jsonl line 4,812: field 'response' is empty." in words


@pytest.mark.parametrize(
    ("texts", "shown"), [("all", {True, False}), ("selected", {True}), ("none", set())], ids=["all", "selected", "none"]
)
def test_texts_are_shown_of_those_examples_whose_texts_may_be_seen(run, corpus, texts, shown) -> None:
    write_run(run, corpus)
    run.write_json("run.json", {"schema": "s2l_ray/1", "name": "planted", "report": {"texts": texts}})
    members = [member for group in read_facts(run).group_texts for member in group.members]
    assert {bool(member.is_selected) for member in members} == {True, False}
    assert {bool(member.is_selected) for member in members if member.prompt is not None} == shown
    assert all(member.source is not None for member in members)
    said = page_of(run).text
    assert ("The text is not shown." in said) == (texts != "all")
    assert ("The answer is" in said) == (texts != "none")


def test_the_report_is_one_file_that_asks_the_network_for_nothing(run: Storage, corpus: Corpus) -> None:
    write_run(run, corpus)
    uri = build_report(run.uri)
    assert uri == f"{run.uri}/report/index.html"
    assert run.names("report", recursive=True) == ["index.html"]
    page = Page(Path(uri).read_text(encoding="utf-8"))
    for tag, attributes in page.tags:
        assert tag not in {"img", "iframe", "object", "embed", "base", "form"}
        assert not [name for name in attributes if name.startswith("on")], tag
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            assert (attributes.get(name) or "#").startswith(("#", "data:,")), (tag, attributes)
    style = (Path(uri).read_text(encoding="utf-8").split("<style>")[1]).split("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style
    policy = next(a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-inline" not in policy.split(";")[1]


def test_the_policy_names_exactly_our_two_scripts(run: Storage, corpus: Corpus) -> None:
    from s2l_ray.report.page import csp_hash

    write_run(run, corpus)
    page = page_of(run)
    ours = [s for s in page.scripts if not s.startswith('{"data"')]
    policy = next(a["content"] or "" for t, a in page.tags if t == "meta" and a.get("http-equiv"))
    assert len(ours) == 2
    assert re.findall(r"'(sha256-[^']+)'", policy) == [csp_hash(script) for script in ours]


def test_texts_and_names_of_the_corpus_stay_texts(run: Storage, corpus: Corpus) -> None:
    write_run(run, corpus)
    page = page_of(run)
    # plotly.js, our own script and one JSON block a figure: no script element came from the corpus.
    assert len(page.scripts) == 2 + len(page.figures())
    assert HOSTILE in page.text
    assert BOLD in page.text
    assert " ".join(HOSTILE_TEXT.split()) in page.text
    labels = page.figures()["sources"]["layout"]["yaxis"]["ticktext"]
    assert label(BOLD) in labels
    assert not [text for text in labels if "<" in text]


def test_names_of_strata_are_labels_too() -> None:
    from s2l_ray.report import plots

    groups = GroupCurves([f"group 0 of {BOLD}"], np.array([[2.0, 1.0]]), [7], [3], [1, 2], "step")
    curves, sizes = plots.group_curves(groups).to_plotly_json(), plots.group_sizes(groups).to_plotly_json()
    assert "group 0 of &lt;b&gt;x&lt;/b&gt;: 7 examples, 3 chosen" in str(curves)
    assert BOLD not in str(curves) + str(sizes)


def test_a_label_shows_markup_letter_by_letter_and_is_cut_in_the_middle() -> None:
    assert label("<b>x</b>") == "&lt;b&gt;x&lt;/b&gt;"
    assert label("a &lt; b") == "a &amp;lt; b"
    assert label("two\nlines") == "two lines"
    assert label("a" * 20 + "b" * 20) == "a" * 15 + "…" + "b" * 8


def test_counts_and_metrics_stand_on_the_page_exactly(run: Storage, corpus: Corpus) -> None:
    write_run(run, corpus)
    text = page_of(run).text
    expected = (
        "S2L chose 10 of 250 examples (4.0%)",
        "45,678",
        "56,000,000",
        "40.0\u00d7",
        "1.2300",
        "1.2700",
        "4.5678",
        "0.4321",
    )
    for value in (
        *expected,
        "duplicate 1,234 274",
        "no_label 3 250",
        "cut 17 250",
        "gsm8k: 2, because it has 2 rows",
        "97.3%",
        "\u22120.0400",
    ):
        assert value in text, value


def test_the_quality_of_the_groups_is_told_and_the_warning_stays_a_text(run: Storage, corpus: Corpus) -> None:
    write_run(run, corpus)
    page = page_of(run)
    for value in (
        "what k-means saw the losses (raw)",
        "trained on 200 of 250 examples; the others were only assigned",
        "iterations 9, until no example changed its group or the limit was reached",
        "variance explained by the groups 97.3% variance explained by source alone 12.5%",
        "agreement of restarts (ARI) 0.68 on 128 examples agreement with source (ARI) 0.03",
        "subset that stays the same from another seed 34.6% (with the same draws and no groups 4.0%)",
        "effective dimension 1.12 of 5",
        "groups of at most 10 examples 2 of 5",
        f"Read these groups with care: one direction holds 94.5% of the variance {HOSTILE}.",
        "10 examples 10 selection/selected.parquet",
        f"29% of the pool 72 selection/selected-{BOLD}.parquet",
        "20,000 response tokens 4 selection/selected-tokens-20000.parquet",
        "engine in memory, 2 threads; seconds grouping 3.1, writing 0.2",
    ):
        assert value in page.text, value
    assert page.figures()["principal_components"]["data"][0]["y"] == DIAGNOSTICS["principal_components"]


def test_what_was_not_measured_is_left_out() -> None:
    old = {"rows": 250, "num_clusters": 5, "num_iterations": 9, "explained_variance": 0.973}
    assert quality(old, {}) == [("iterations", "9"), ("variance explained by the groups", "97.3%")]
    keys = {"variance_explained_by_source": None, "agreement_of_restarts": None, "agreement_with_source": None}
    one_restart = old | {"diagnostics": DIAGNOSTICS | keys | {"sampled_rows": 250, "training_rows": 250}}
    told = [what for what, _ in quality(one_restart, {"stability": None})]
    always = ["what k-means saw", "iterations", "variance explained by the groups", "effective dimension"]
    assert told == [*always, "groups of at most 10 examples"]
    assert budgets({"budgets": [{"budget": 10, "rows": 10, "file": "selected.parquet"}]}) == budgets({}) == []


def test_a_win_a_loss_and_a_draw_are_said_as_they_are(run: Storage, corpus: Corpus) -> None:
    selection = {"rows": 900, "pool": 4480}

    def says(selected: float, random: float, macro: tuple[float, float] | None = None) -> str:
        macros = macro or (selected, random)
        found = {
            "selected": {"loss_per_token": selected, "loss_macro": macros[0]},
            "random": {"loss_per_token": random, "loss_macro": macros[1]},
        }
        for values, macro_loss in zip(found.values(), macros, strict=True):
            values["loss_by_source"] = (
                {"a": macro_loss - 0.01, "b": macro_loss + 0.01} if macro else {"a": values["loss_per_token"]}
            )
        return " ".join(verdict(selection, found))

    assert "1.2300 nats per token on held-out rows, against 1.2700" in says(1.23, 1.27)
    assert "S2L wins by 0.0400 (3.1%)" in says(1.23, 1.27)
    assert "S2L loses by 0.0400 (3.3%)" in says(1.27, 1.23)
    assert "wins" not in says(1.27, 1.23)
    assert "a draw" in says(1.27, 1.27)
    turned = says(1.23, 1.27, macro=(2.1, 2.0))
    assert "2.1000 against 2.0000, the other way round: S2L loses by 0.1000 (5.0%). S2L is better on 0 of 2 sources" in turned
    alike = says(1.23, 1.27, macro=(2.0, 2.1))
    assert "2.0000 against 2.1000: S2L wins by 0.1000 (4.8%). S2L is better on 2 of 2 sources" in alike
    assert "sources" not in says(1.23, 1.27), "one source is no other view"
    losses = {"selected": {"a": 1.0, "b": 3.0}, "random": {"a": 2.0, "b": 2.0}}
    found = {model: {"loss_per_token": 2.0, "loss_macro": 2.0, "loss_by_source": losses[model]} for model in losses}
    uneven = " ".join(verdict(selection | {"sources": {"a": {"pool": 100}, "b": {"pool": 300}}}, found))
    assert "by their rows in the pool, 2.5000 against 2.0000: S2L loses by 0.5000 (25.0%)." in uneven
    assert "no conclusion" in says(1.23, 1.27)
    assert "no target" in verdict(selection, None)[0]
    nothing = {"loss_per_token": None, "loss_macro": None}
    assert "no rows were held out" in verdict(selection, {"selected": nothing, "random": nothing})[0]
    assert "does not say whether" in " ".join(verdict(selection, {"selected": {"loss_per_token": 1.0, "loss_macro": 1.0}}))
    write_run(run, corpus, loss=(1.3, 1.2))
    assert "S2L loses by 0.1000 (8.3%)" in page_of(run).text


@pytest.mark.parametrize("tasks", [{}, {"arc_easy": {"acc": 0.25}}])
def test_a_run_that_holds_nothing_out_has_no_table_of_losses_but_says_so(run: Storage, corpus: Corpus, tasks: Any) -> None:
    write_run(run, corpus, until="target")
    target = Artifact.find(run.child("target"))
    assert target is not None
    draft = Draft.open(run, Key("evaluation", 1, {"seed": 6}, {"target": target.identity}))
    nothing = {"loss_per_token": None, "loss_macro": None, "loss_by_source": {}, "tasks": tasks}
    draft.write("metrics.json", json.dumps(dict.fromkeys(("untrained", "selected", "random"), nothing)).encode())
    draft.publish({"rows": 0, "sources": {}})
    text = page_of(run).text
    assert "no rows were held out to evaluate on" in text
    assert "No held-out row was evaluated, so there is no loss to compare." in text
    assert "Loss in nats per response token; lower is better" not in text
    assert ("arc_easy: acc" in text) == bool(tasks)


def test_the_better_of_selected_and_random_is_marked_by_the_metrics_direction() -> None:
    def model(loss: float, accuracy: float) -> dict[str, Any]:
        tasks = {"gsm8k": {"exact_match": accuracy, "perplexity": loss, "rows": 7, "exact_match_stderr": accuracy}}
        return {"loss_per_token": loss, "loss_macro": loss, "loss_by_source": {"a": 1.0}, "tasks": tasks}

    found = measures({"selected": model(1.2, 0.5), "random": model(1.1, 0.4)}, {"a": 12})
    assert {m.name: m.best for m in found} == {
        "all held-out rows": "random",
        "mean over sources": "random",
        "a": None,
        "gsm8k: exact_match": "selected",
        "gsm8k: exact_match_stderr": None,
        "gsm8k: perplexity": "random",
    }
    assert found[0].rows == 12


@pytest.mark.parametrize("until", STAGES[:-1])
def test_a_partial_run_shows_what_is_there_and_names_what_is_not(run: Storage, corpus: Corpus, until: str) -> None:
    write_run(run, corpus, until=until)
    Draft.open(run, Key(STAGES[STAGES.index(until) + 1], 1, {}, {}))
    page = page_of(run)
    missing = STAGES[STAGES.index(until) + 1 :]
    states = [f"{missing[0]} (unfinished)", *(f"{name} (not started)" for name in missing[1:])]
    assert f"Not finished: {', '.join(states)}." in page.text
    assert "cost" in page.figures()
    assert ("group_curves" in page.figures()) == (STAGES.index(until) >= STAGES.index("clustering"))


def test_a_stage_built_from_another_input_is_not_shown_as_a_result(run: Storage, corpus: Corpus) -> None:
    write_run(run, corpus)
    run.child("selection").delete()
    draft = Draft.open(run, Key("selection", 1, {"seed": 99}, {}))
    draft.publish(_selection(draft, corpus))
    text = page_of(run).text
    assert "target (outdated), evaluation (outdated)" in text
    assert "no target trained on them has been evaluated yet" in text
    assert "1.2300" not in text


def test_building_again_replaces_the_page(run: Storage, corpus: Corpus) -> None:
    write_run(run, corpus)
    first = Path(build_report(run.uri)).read_bytes()
    assert Path(build_report(run.uri)).read_bytes() == first
    run.write("report/index.html", first.replace(b"</title>", b" of yesterday</title>"))
    assert Path(build_report(run.uri)).read_bytes() == first
    assert run.names("report") == ["index.html"]


def test_where_there_is_no_run_the_error_says_so(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no finished stage there. Give the directory of a run"):
        build_report(str(tmp_path / "nowhere"))
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("path", ["examples/part-00002.parquet", "selection/selected.parquet", "evaluation/metrics.json"])
def test_a_damaged_file_is_named(run: Storage, corpus: Corpus, path: str) -> None:
    write_run(run, corpus)
    run.write(path, run.read(path)[:-20])
    with pytest.raises(ArtifactError, match=path):
        build_report(run.uri)


def test_clustering_and_selection_alone_make_a_report(run: Storage, corpus: Corpus) -> None:
    write_run(run, corpus, until="selection")
    for name in ("run.json", "examples", "proxy", "trajectories"):
        (Path(run.uri) / name).unlink() if name == "run.json" else run.child(name).delete()
    page = page_of(run)
    assert "S2L chose 10 of 250 examples" in page.text
    assert "The text is not in this run." in page.text


def test_members_are_the_nearest_of_their_group_over_all_parts(run: Storage, corpus: Corpus) -> None:
    write_run(run, corpus, until="clustering")
    members = nearest(Artifact.read(run.child("clustering")), [0, 3])
    assert [example_id for _, example_id in members[3]] == ["id-00248", "id-00243", "id-00238", "id-00233"]
    assert [distance for distance, _ in members[0]] == [0.0, 0.125, 0.25, 0.375]


def test_members_are_shown_with_their_own_text_and_the_chosen_ones_are_marked(run: Storage, corpus: Corpus) -> None:
    write_run(run, corpus)
    page = page_of(run)
    # Of every group the first and the last row were selected; the last is the nearest to the centroid.
    assert sum(attributes.get("class") == "member selected" for _, attributes in page.tags) == corpus.num_clusters
    assert sum(attributes.get("class") == "member" for _, attributes in page.tags) == 3 * corpus.num_clusters
    assert "id-00249 · distance 0.000 prompt What is 249 plus 249?" in page.text
    assert "The answer is 498." in page.text


def test_of_many_groups_a_spread_is_shown_and_said(run: Storage) -> None:
    write_run(run, Corpus(num_clusters=40, rows_per_cluster=4))
    page = page_of(run)
    assert "12 of 40 groups are shown" in page.text
    headings = re.findall(r"group (\d+) ·", page.text)
    assert len(headings) == 12
    assert (headings[0], headings[-1]) == ("0", "39")
    assert sum(trace["y"].count(None) for trace in page.figures()["group_curves"]["data"]) == 40


def test_shown_groups_go_from_low_to_high_and_leave_out_empty_ones() -> None:
    centroids = np.array([[3.0, 2.0], [1.0, 0.5], [2.0, 2.0]])
    groups = GroupCurves(["a", "b", "c"], centroids, [4, 5, 0], None, [1, 2], "step")
    assert shown_groups(groups) == [1, 0]


def test_sources_come_with_shares_and_without_what_is_unknown() -> None:
    before = {"sources": {"a": {"pool": 30, "held_out": 2}, "b": {"pool": 10, "held_out": 1}}}
    after = {"sources": {"b": {"pool": 10, "selected": 5, "random": None}, "a": {"pool": 30, "selected": 5, "random": None}}}
    a, b = sources(before, after)
    assert (a.name, a.held_out, a.pool_fraction, a.selected_fraction, a.random_fraction) == ("a", 2, 0.75, 0.5, None)
    assert b.ratio == 2.0
    assert [(s.name, s.pool, s.selected) for s in sources(before, None)] == [("a", 30, None), ("b", 10, None)]


def test_long_texts_are_clipped_and_the_rest_is_counted() -> None:
    assert Text.of("short") == Text("short", None)
    text = Text.of("x" * 5_000)
    assert text.head == "x" * 280 + "…"
    assert text.whole is not None
    assert text.whole.endswith("x … (1,000 more characters)")


def test_numbers_read_well() -> None:
    assert (count(1234567), count(None)) == ("1,234,567", "\u2013")
    assert (percent(0.0), percent(0.0001), percent(0.123)) == ("0.0%", "< 0.1%", "12.3%")
    assert (quantity(1.23456), quantity(1200), signed(-0.5), signed(0.25)) == ("1.2346", "1,200", "\u22120.5000", "+0.2500")


def test_credentials_in_a_uri_do_not_reach_the_page(run: Storage, corpus: Corpus) -> None:
    assert without_credentials("at s3://key:secret@bucket/x, to a@b.c") == "at s3://***@bucket/x, to a@b.c"
    write_run(run, corpus, until="examples")
    run.write_json(
        "run.json", {"schema": "s2l_ray/1", "name": "planted", "examples": {"dataset": "s3://key:secret@bucket/rows"}}
    )
    text = page_of(run).text
    assert "secret" not in text
    assert "s3://***@bucket/rows" in text


def test_the_report_needs_neither_torch_nor_ray_and_imports_plotly_late() -> None:
    code = "import sys, s2l_ray.report; print([m for m in ('torch', 'ray', 'plotly', 'jinja2') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs a Chromium on PATH (apt-get install chromium)")
def test_a_browser_draws_every_plot_and_runs_nothing_of_the_corpus(run: Storage, corpus: Corpus, tmp_path: Path) -> None:
    write_run(run, corpus)
    uri = build_report(run.uri)
    flags = [
        "--headless",
        "--no-sandbox",
        "--enable-logging=stderr",
        "--disable-gpu",
        "--disable-background-networking",
        "--no-first-run",
    ]
    command = ["chromium", *flags, f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000", "--dump-dom"]
    found = subprocess.run([*command, f"file://{uri}"], capture_output=True, text=True, check=True, timeout=120)
    assert "<title>planted · S2L report</title>" in found.stdout
    for name in page_of(run).figures():
        drawn = found.stdout.split(f'id="{name}"', 1)[1].split("<figcaption>", 1)[0]
        assert "main-svg" in drawn, name
        assert re.search(r'class="(point|trace|lines|scatter)', drawn) or "<path" in drawn, name
    # Plotly shows a hostile name letter by letter: its text is escaped in the drawn tick too.
    ticks = found.stdout.split('id="sources"', 1)[1].split("<figcaption>", 1)[0]
    assert ">&lt;b&gt;x&lt;/b&gt;<" in ticks
    assert "CONSOLE" not in found.stderr, found.stderr  # neither an error of ours nor a refused script or request
