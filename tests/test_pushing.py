"""Subsets on the Hub: a real client against a server that speaks its protocol. Uploads over Xet are not tried here."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from datasets import load_dataset

from tests.exporting import CALL, TOOLS, answer, made_run, result, user
from tests.hub_server import COMMIT, TOKEN, HubServer, running_hub

TALKS = {"a": [user("secret words"), answer("", tool_calls=[CALL]), result("5"), answer("five")], "b": [user("c"), answer("d")]}


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with running_hub() as server:
        yield server


def push(hub: HubServer, run: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`s2l export` in a process of its own: the Hub's client reads its environment once."""
    known = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    given = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(run.parent / "hf")}
    command = [sys.executable, "-c", "from s2l_ray.cli import main; main()", "export", str(run), *options]
    environment = {key: value for key, value in (known | given | environment).items() if value}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)


def test_a_subset_with_its_card_becomes_a_private_dataset_that_datasets_reads(tmp_path, hub):
    hub.cards["org/data"] = {"license": "cc-by-4.0"}
    run = made_run(tmp_path / "run", TALKS, corpus=f"hub:org/data@{COMMIT}")
    done = push(hub, run, "--push-to-hub", "somebody/subset")
    assert (done.returncode, done.stdout) == (0, f"{hub.url}/datasets/somebody/subset: 2 examples, private\n"), done.stderr
    assert hub.private["somebody/subset"] is True
    files = hub.files["somebody/subset"]
    assert files.keys() == {".gitattributes", "README.md", "selected.parquet"}
    card = files["README.md"].decode()
    assert "license: cc-by-4.0" in card
    assert f"[org/data](https://huggingface.co/datasets/org/data) at commit `{COMMIT}`" in card
    assert "# 2 examples of 2, chosen by s2l_ray" in card
    assert "secret" not in card
    assert TOKEN not in done.stdout + done.stderr + card

    there = tmp_path / "there"
    for name, content in files.items():
        (there / name).parent.mkdir(exist_ok=True)
        (there / name).write_bytes(content)
    found = load_dataset(str(there), cache_dir=str(tmp_path / "cache"))["train"].to_list()
    assert found == pq.read_table(run / "selection/selected.parquet").to_pylist()

    again = push(hub, run, "--push-to-hub", "subset", "--format", "trl")  # by its short name, over our own
    assert again.returncode == 0, again.stderr
    assert "dataset_name: somebody/subset\n" in files["trl.yaml"].decode()
    assert "list: json" in files["README.md"].decode()
    for name, content in files.items():
        (there / name).write_bytes(content)
    rows = load_dataset(str(there), cache_dir=str(tmp_path / "cache2"))["train"].to_list()
    # a run's tools are in its examples; this one has none
    assert rows == [{"messages": TALKS["a"], "tools": None}, {"messages": TALKS["b"], "tools": None}]


def test_what_must_not_be_published_or_replaced_is_refused_and_nothing_changes(tmp_path, hub):
    run = made_run(tmp_path / "run", TALKS, tools={"a": TOOLS})
    hub.add("org/theirs", private=True, **{"data.csv": b"mine"})
    hub.add("org/open", private=False)
    before = {name: dict(files) for name, files in hub.files.items()}
    for options, environment, message in (
        (["org/new"], {"HF_TOKEN": ""}, "needs HF_TOKEN in the environment"),
        (["org/new"], {"HF_TOKEN": "hf_wrong"}, r"the Hub refuses the token (401). HF_TOKEN must allow to write there"),
        (["org/theirs"], {}, "has files that s2l_ray did not write. Nothing was changed"),
        (["org/open"], {}, "is public. Give --public, or another name"),
        (["no such/name"], {}, "no name of a dataset. Give ORGANISATION/NAME"),
        (["org/new"], {"HF_ENDPOINT": "http://127.0.0.1:9"}, "the Hub does not answer"),
        (["org/new", "--subset", "none"], {}, "has no subset 'none'"),
        (["org/new", "--with-columns", "--format", "axolotl"], {}, "has no place for them"),
    ):
        done = push(hub, run, "--push-to-hub", *options, **environment)
        assert (done.returncode, message in done.stderr) == (2, True), done.stderr
        assert "Traceback" not in done.stderr
    assert hub.files == before
    done = push(hub, run, "--push-to-hub", "org/open", "--public")
    assert done.returncode == 0, done.stderr
    assert hub.private["org/open"] is False


def test_the_texts_of_a_corpus_that_is_not_to_be_shown_never_leave_the_run(tmp_path, hub):
    run = made_run(tmp_path / "run", TALKS)
    (run / "run.json").write_text('{"schema": "s2l_ray/1", "report": {"texts": "none"}}')
    done = push(hub, run, "--push-to-hub", "org/new")
    assert done.returncode == 2
    assert "report.texts=none, so no text of this corpus leaves the run" in done.stderr
    assert not hub.asked
