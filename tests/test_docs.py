"""The documents: links, commands, metrics and rooms that they name exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

import s2l_ray
from s2l_ray.cli import app

ROOT = Path(__file__).parents[1]
HIDDEN = {".venv", ".git", ".pytest_cache", "node_modules", "runs", "shared", "build"}
DOCUMENTS = sorted(p for p in ROOT.rglob("*.md") if not HIDDEN & set(p.relative_to(ROOT).parts))
README = (ROOT / "README.md").read_text(encoding="utf-8")
READING_ORDER = README.partition("## In which order to read the code\n")[2].partition("\n## ")[0]
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        place = document.parent / path if path else document
        assert place.exists(), link
        if anchor:
            assert anchor in anchors(place.read_text(encoding="utf-8")), link


def test_the_readme_is_short_and_its_reading_order_too():
    assert len(README.splitlines()) <= 200
    assert 0 < len(READING_ORDER.strip().splitlines()) <= 10


def test_commands_of_the_readme_exist_with_their_options():
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL)).replace("\\\n", " ")
    calls = [shlex.split(call, comments=True) for call in re.findall(r"(?:^|\s|bin/)s2l (.+)$", blocks, re.MULTILINE)]
    assert len(calls) >= 8
    for name, *words in calls:
        options = {option for parameter in COMMANDS[name].params for option in parameter.opts}
        given = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert given <= options, name


def test_metrics_that_documents_name_are_exported():
    exported = set(re.findall(r'"(s2l_ray_\w+)"', (ROOT / "s2l_ray/runtime/metrics.py").read_text(encoding="utf-8")))
    documents = [d for d in DOCUMENTS if d.name not in {"CHANGELOG.md", "LOG.md"}]
    named = {m for d in documents for m in re.findall(r"`(s2l_ray_\w+)`", d.read_text(encoding="utf-8"))}
    assert named
    assert named <= exported


def test_the_page_of_the_tests_lists_every_test_file():
    files = {file.name for file in (ROOT / "tests").glob("test_*.py")}
    assert set(re.findall(r"^\| `(test_\w+\.py)`", (ROOT / "tests/README.md").read_text(), re.MULTILINE)) == files


def test_the_picture_of_the_report_is_small():
    assert 0 < (ROOT / ".github/report.png").stat().st_size < 200_000


def test_the_reading_order_names_every_room_in_the_order_of_the_flow():
    rooms = re.findall(r"^    (\w+)/?  ", s2l_ray.__doc__ or "", re.MULTILINE)
    named = [name.rstrip("/").removesuffix(".py") for name in re.findall(r"\[([^\]]+)\]\(", READING_ORDER)]
    # The list of stages and the map come first, and again nowhere.
    assert named[2:] == [room for room in rooms if room != "pipeline"]
    for room in rooms:
        assert (ROOT / "s2l_ray" / room).is_dir() or (ROOT / f"s2l_ray/{room}.py").is_file(), room
