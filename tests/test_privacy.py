"""Privacy: marked text is planted in every field of a corpus, a real run goes over it, and what it writes and says is searched.

What may have texts are the run's own parts: `examples/`, `selection/` and the scratch directory. Sources and ids are names,
and shown.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from s2l_ray.config import RunConfig, parse_config
from s2l_ray.errors import S2LError
from s2l_ray.pipeline import run
from s2l_ray.report.page import build_report

NUM_ROWS = 120
MARK = re.compile(rb"mark[0-9a-f]{12}")
OWN_PARTS = {"examples", "selection", ".work"}


def mark(row: int, field: str) -> str:
    """A word that stands in one field of one row and nowhere else."""
    return "mark" + hashlib.sha256(f"{row} {field}".encode()).hexdigest()[:12]


def marked_row(row: int) -> dict[str, Any]:
    return {
        "prompt": f"{('short', 'long')[row % 2]} {mark(row, 'prompt')}: ",
        "response": f"{mark(row, 'response')}. The answer is {('yes', mark(row, 'answer'))[row % 2]}",
        "source": ("ward", "clinic")[row % 2],
        "note": mark(row, "note"),
        "patient": {"name": mark(row, "name"), "visits": [mark(row, "visit")]},
    }


def write_corpus(path: Path, *more: str) -> Path:
    lines = [json.dumps(marked_row(row)) for row in range(NUM_ROWS)]
    path.write_text("".join(f"{line}\n" for line in [*lines, *more]))
    return path


def config_of(corpus: Path, texts: str, **examples: Any) -> RunConfig:
    """A whole run in little time, with a tracker that writes files."""
    shape = {"architecture": "gpt_neox", "layers": 1, "hidden": 16, "heads": 2, "max_positions": 128}
    training = {"model": {"scratch": shape}, "epochs": 1, "global_batch_size": 8, "learning_rate": 1.0e-2, "max_tokens": 128}
    one = {"num_workers": 1, "cpus_per_worker": 1}
    return parse_config(
        {
            "name": "marked",
            "examples": {"dataset": str(corpus), "source_field": "source", "held_out_fraction": 0.2, **examples},
            "proxy": {"tokenizer": {"train": "bpe", "vocab_size": 300}, "num_checkpoints": 3, **training},
            "clustering": {"num_clusters": 4},
            "selection": {"budget": 0.25},
            "target": {"zero_stage": 0, **training},
            "evaluation": {"answer_pattern": "The answer is (.+)", "max_generations": 2, "max_new_tokens": 4},
            "report": {"texts": texts},
            "trackers": ["tensorboard"],
            "machines": dict.fromkeys(("examples", "proxy", "trajectories", "target", "evaluation"), one),
        }
    )


@contextmanager
def logged() -> Iterator[list[str]]:
    """What is logged meanwhile, tracebacks included."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.setFormatter(logging.Formatter())
    handler.emit = lambda record: lines.append(handler.format(record))  # type: ignore[method-assign]
    root = logging.getLogger("s2l_ray")
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    try:
        yield lines
    finally:
        root.removeHandler(handler)
        root.setLevel(level)


def marks_in(path: Path) -> set[str]:
    """The marks in a file, as it is and, of Parquet, as its values are."""
    data = path.read_bytes()
    if path.suffix == ".parquet":
        data += repr(pq.read_table(path).to_pylist()).encode()
    return {found.decode() for found in MARK.findall(data)}


def marks_below(place: Path) -> dict[str, set[str]]:
    """The marks in every file outside the run's own parts, by file."""
    files = [path for path in place.rglob("*") if path.is_file() and path.relative_to(place).parts[0] not in OWN_PARTS]
    assert files
    return {str(path.relative_to(place)): found for path in files if (found := marks_in(path))}


@dataclass(frozen=True)
class Marked:
    """A finished run that shows no text."""

    place: Path
    corpus: Path
    log: list[str]


@pytest.fixture(scope="module")
def marked(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Marked:
    folder = tmp_path_factory.mktemp("marked")
    corpus = write_corpus(folder / "corpus.jsonl")
    with logged() as lines:
        run(config_of(corpus, "none"), str(folder / "run"))
    return Marked(folder / "run", corpus, lines)


def test_with_none_no_text_stands_outside_the_run_s_own_parts(marked):
    assert marks_below(marked.place) == {}
    assert marked.log
    assert not MARK.search("\n".join(marked.log).encode())
    # The search finds what is there.
    assert any(marks_in(path) for path in (marked.place / "examples").glob("*.parquet"))
    assert any(marks_in(path) for path in (marked.place / "selection").glob("*.parquet"))


def test_with_none_predictions_say_which_example_got_which_score_and_no_more(marked):
    lines = [json.loads(line) for line in (marked.place / "evaluation" / "predictions.jsonl").read_text().splitlines()]
    assert lines
    assert {tuple(line) for line in lines} == {("model", "example_id", "source", "scores")}


def test_with_none_the_report_says_that_no_text_is_shown(marked):
    page = (marked.place / "report" / "index.html").read_text()
    assert "This run shows no text of its corpus" in page
    assert "The text is not shown." in page
    assert "ward" in page


def test_with_selected_only_texts_of_selected_examples_are_shown(marked):
    config = config_of(marked.corpus, "selected")
    with logged() as lines:
        run(config, str(marked.place))  # only the page is another
    try:
        selected = marks_in(marked.place / "selection" / "selected.parquet")
        found = marks_below(marked.place)
        assert set(found) == {"report/index.html"}
        assert found["report/index.html"] <= selected
        assert not MARK.search("\n".join(lines).encode())
    finally:
        run(config_of(marked.corpus, "none"), str(marked.place))


def test_with_all_texts_are_shown(marked, tmp_path):
    """What the other tests look for is there to be found."""
    run(config_of(marked.corpus, "all"), str(tmp_path / "run"), reuse=str(marked.place))
    found = marks_below(tmp_path / "run")
    assert set(found) == {"report/index.html", "evaluation/predictions.jsonl"}
    selected = marks_in(marked.place / "selection" / "selected.parquet")
    assert found["report/index.html"] - selected


# --- what is wrong with a corpus -----------------------------------------------------------------------------------

WORD = mark(0, "bad")
BAD_ROWS = {
    "cut off": f'{{"prompt": "{WORD}", "response": "{WORD}',
    "no JSON": f"{WORD} {WORD}",
    "no object": f'["{WORD}"]',
    "a number for text": f'{{"prompt": 1234567, "response": "{WORD}", "source": "ward"}}',
    "a list for text": f'{{"prompt": ["{WORD}"], "response": "{WORD}", "source": "ward"}}',
    "an object for text": f'{{"prompt": {{"text": "{WORD}"}}, "response": "{WORD}", "source": "ward"}}',
    "a missing field": f'{{"prompt": "{WORD}", "source": "ward"}}',
    "a list for a source": f'{{"prompt": "{WORD}", "response": "{WORD}", "source": ["{WORD}"]}}',
    "half a character": f'{{"prompt": "\\ud800{WORD}", "response": "{WORD}", "source": "ward"}}',
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_a_bad_row_is_named_without_its_text(tmp_path, ray_session, kind):
    corpus = write_corpus(tmp_path / "corpus.jsonl", BAD_ROWS[kind])
    with logged() as lines, pytest.raises(S2LError) as failed:
        run(config_of(corpus, "none"), str(tmp_path / "run"), until="examples")
    assert f"corpus.jsonl line {NUM_ROWS + 1}" in str(failed.value)
    said = "\n".join([*lines, str(failed.value)])
    assert not MARK.search(said.encode())
    assert "1234567" not in said
    assert marks_below(tmp_path / "run") == {}


def test_rows_that_are_dropped_are_shown_with_the_first_of_each_kind_and_without_their_text(tmp_path, ray_session):
    corpus = write_corpus(tmp_path / "corpus.jsonl", *BAD_ROWS.values())
    place = tmp_path / "run"
    with logged() as lines:
        made = run(config_of(corpus, "none", on_bad_row="drop"), str(place), until="examples")["examples"]
        build_report(str(place))
    assert sum(made.summary["dropped"].values()) == len(BAD_ROWS)
    page = (place / "report" / "index.html").read_text()
    for reason in made.summary["dropped"]:
        assert f"<code>{reason}</code>: {corpus} line 1" in page
    assert not MARK.search("\n".join(lines).encode())
    assert marks_below(place) == {}
    assert not MARK.search((place / "examples" / "manifest.json").read_bytes())


def test_values_of_many_kinds_in_a_column_that_is_only_passed_on_are_not_quoted(tmp_path, ray_session):
    """Whether such a corpus is taken or refused: Arrow's own words name the value."""
    values = ["12", "[1]", f'"{WORD}"', "1e400", "123456789012345678901234567890", f'{{"{WORD}": 1}}', "null", "NaN"]
    rows = [f'{{"prompt": "p{i}", "response": "r", "source": "ward", "extra": {value}}}' for i, value in enumerate(values)]
    corpus = write_corpus(tmp_path / "corpus.jsonl", *rows)
    with logged() as lines:
        try:
            run(config_of(corpus, "none"), str(tmp_path / "run"), until="examples")
        except S2LError as error:
            lines.append(str(error))
    assert not MARK.search("\n".join(lines).encode())
    assert "12345678901234567890" not in "\n".join(lines)


def test_what_ray_keeps_of_its_workers_has_no_text(marked):
    """Their output and their errors: also those of the other tests of this file that have run."""
    folder = Path(tempfile.gettempdir()) / "ray" / "session_latest" / "logs"
    if not folder.is_dir():
        pytest.skip("Ray's logs are elsewhere")
    found = {path.name: marks_in(path) for path in folder.rglob("*") if path.is_file()}
    assert found
    assert {name: marks for name, marks in found.items() if marks} == {}
