"""The documents: their links lead somewhere, and the commands and names that they show exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from s2l_ray.cli import app
from s2l_ray.runtime import metrics

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted(
    path for path in ROOT.rglob("*.md") if not any(part in {".venv", "runs", "build"} for part in path.relative_to(ROOT).parts)
)
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_to_a_file_leads_to_one(document):
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document.read_text())
    missing = [link for link in links if "://" not in link and not (document.parent / link).exists()]
    assert missing == []


def test_the_readme_is_short_and_so_is_the_way_through_the_code():
    assert len(README.splitlines()) <= 200
    way = README.partition("## In which order to read the code\n")[2].strip().splitlines()
    assert 0 < len(way) <= 10


def test_the_picture_is_there_and_small():
    [picture] = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README)
    assert (ROOT / picture).stat().st_size < 200_000


def shown_commands() -> list[list[str]]:
    """The `s2l` commands in the code blocks of all documents, as words."""
    blocks = [block for path in DOCUMENTS for block in re.findall(r"```(?:bash)?\n(.*?)```", path.read_text(), re.DOTALL)]
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    found = [re.search(r"(?:^|-- |bin/)s2l (?:\w+) .*", line) for line in lines]
    return [shlex.split(match[0].partition("s2l ")[2], comments=True) for match in found if match]


@pytest.mark.parametrize("words", shown_commands(), ids=" ".join)
def test_every_command_that_is_shown_exists_with_its_options(words):
    command = typer.main.get_command(app).commands[words[0]]  # type: ignore[attr-defined]
    options = {name for parameter in command.params for name in parameter.opts}
    assert {word.partition("=")[0] for word in words[1:] if word.startswith("--")} <= options


def test_every_metric_that_is_named_exists():
    named = {
        name for path in DOCUMENTS if path.name != "CHANGELOG.md" for name in re.findall(r"`(s2l_ray_\w+)`", path.read_text())
    }
    known = set(re.findall(r'"(s2l_ray_\w+)"', Path(metrics.__file__).read_text()))
    assert named
    assert named <= known
