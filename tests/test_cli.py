"""The command line: what a user reads, with which exit code, and that nothing half-made looks finished.

Most commands run in this process, through `main` as `s2l` does; what only a process of its own can show (Ray's own
output, the installed command) runs in one.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from s2l_ray import cli
from s2l_ray.config import TrajectoriesConfig, load_config
from s2l_ray.pipeline import ANOTHER_RUN
from s2l_ray.storage.artifacts import Artifact, Key
from s2l_ray.storage.drafts import Draft
from s2l_ray.storage.places import Storage
from s2l_ray.storage.records import digest
from s2l_ray.training.token_parts import TokenParts
from s2l_ray.training.token_rows import RowLimit
from s2l_ray.trajectories.units import losses_folder

from .building import context_of

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
STAGE_NAMES = ["examples", "proxy", "trajectories", "clustering", "selection", "target", "evaluation"]
# The test session's Ray forwards what its workers write; the Ray that `s2l` starts keeps that in log files.
WORKER_LINES = re.compile(r"^(\x1b\[\d+m)?\(\w+ pid=\d+\).*\n", re.MULTILINE)
S2L = str(Path(sys.executable).with_name("s2l"))


# --- helpers -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What a command left: exit code and what it printed."""

    code: int
    out: str
    err: str


Command = Callable[..., Result]


@pytest.fixture
def s2l(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Command]:
    """The command line in this process. What it does to the package's logger, and to interrupts, is undone."""
    root = logging.getLogger("s2l_ray")
    before = root.handlers[:], root.level, root.propagate
    on_interrupt = signal.getsignal(signal.SIGINT)

    def call(*arguments: object) -> Result:
        root.handlers = []
        monkeypatch.setattr(sys, "argv", ["s2l", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        return Result(int(end.value.code or 0), out, WORKER_LINES.sub("", err))

    yield call
    signal.signal(signal.SIGINT, on_interrupt)
    root.handlers, root.propagate = before[0], before[2]
    root.setLevel(before[1])


def check_refused(result: Result, message: str, *places: Path) -> None:
    """Exit code 2, one message that matches, no traceback, and no place that looks finished."""
    assert result.code == 2, result.err
    assert re.search(message, result.err, re.DOTALL), result.err
    assert len(re.findall(r"^s2l: ", result.err, re.MULTILINE)) == 1, result.err
    assert "Traceback" not in result.err + result.out
    for place in places:
        assert not list(place.rglob("manifest.json"))


def scratch(**sizes: int) -> dict[str, Any]:
    return {"scratch": {"layers": 1, "hidden": 16, "heads": 2, "max_positions": 64} | sizes}


def write_config(folder: Path, **sections: dict[str, Any]) -> Path:
    """A config for one worker of one CPU, over `folder/corpus.jsonl`."""
    one = {"num_workers": 1, "cpus_per_worker": 1}
    values: dict[str, Any] = {
        "name": "wrong",
        "examples": {"dataset": str(folder / "corpus.jsonl"), "held_out_fraction": 0.1},
        "proxy": {
            "model": scratch(),
            "tokenizer": {"train": "bpe", "vocab_size": 300},
            "global_batch_size": 8,
            "epochs": 1,
            "num_checkpoints": 2,
        },
        "clustering": {"num_clusters": 3},
        "selection": {"budget": 10},
        "target": {"model": scratch(hidden=32), "global_batch_size": 8, "epochs": 1},
        "machines": dict.fromkeys(("examples", "proxy", "trajectories", "target", "evaluation"), one),
    }
    values |= {name: {**values.get(name, {}), **section} for name, section in sections.items()}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def write_rows(folder: Path, rows: list[Any]) -> Path:
    path = folder / "corpus.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def good_rows(count: int) -> list[dict[str, Any]]:
    words = ["apple", "boat", "cloud", "drum", "eagle", "fern", "glove", "house", "ink", "jar"]
    return [{"prompt": f"{words[i % 10]} {words[i // 10 % 10]}?", "response": f"answer {i}"} for i in range(count)]


def write_trajectories(path: Path, losses: list[Any], ids: list[str] | None = None, **columns: list[Any]) -> Path:
    ids = ids or [f"id-{i}" for i in range(len(losses))]
    kind = pa.list_(pa.float64())
    pq.write_table(pa.table({"example_id": ids, "losses": pa.array(losses, kind), **columns}), path)
    return path


def falling_losses(count: int) -> list[list[float]]:
    return np.random.default_rng(0).random((count, 3)).tolist()


# --- configs and arguments: refused before anything is started -----------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("clustering.num_cluster=5", r"clustering\.num_cluster: no such key\. Did you mean 'num_clusters'\?"),
        ("cluster.num_clusters=5", r"cluster: no such key\. Did you mean 'clustering'\?"),
        ("proxy.epochs=-1", r"proxy\.epochs: .*greater than 0, found -1"),
        ("proxy.learning_rate=fast", r"proxy\.learning_rate: .*'fast'"),
        ("target.zero_stage=7", r"target\.zero_stage: .*found 7"),
        ("selection.budget=0", r"selection\.budget: must be above 0, found 0"),
        ("selection.budget=-3", r"selection\.budget: must be above 0, found -3"),
        ("clustering.num_clusters=0", r"clustering\.num_clusters: .*found 0"),
        ("clustering.num_clusters", r"--set clustering\.num_clusters: expected section\.field=value"),
    ],
)
@pytest.mark.parametrize("command", ["run", "plan"])
def test_a_value_that_cannot_be_used_is_named_with_its_key(s2l, tmp_path, command, override, message):
    write_rows(tmp_path, good_rows(5))
    config = write_config(tmp_path)
    check_refused(s2l(command, config, "--run-dir", tmp_path / "run", "--set", override), message, tmp_path)
    assert not (tmp_path / "run").exists()


def test_a_missing_config_is_named(s2l, tmp_path):
    check_refused(s2l("run", tmp_path / "none.yaml"), r"none\.yaml: cannot be read \(No such file.*Give the path of a YAML")


def test_a_missing_corpus_is_named(s2l, tmp_path):
    result = s2l("run", write_config(tmp_path), "--run-dir", tmp_path / "run")
    check_refused(result, r"corpus\.jsonl: no such file or directory\. Check examples\.dataset", tmp_path)


@pytest.mark.parametrize("text", ["", "\n\n"])
def test_an_empty_corpus_is_refused(s2l, tmp_path, ray_session, text):
    (tmp_path / "corpus.jsonl").write_text(text)
    result = s2l("run", write_config(tmp_path), "--run-dir", tmp_path / "run", "--until", "examples")
    check_refused(result, r"corpus is empty", tmp_path)


def test_an_unknown_stage_is_refused_with_the_known_ones(s2l, tmp_path):
    write_rows(tmp_path, good_rows(5))
    result = s2l("run", write_config(tmp_path), "--run-dir", tmp_path / "run", "--until", "everything")
    check_refused(result, r"--until everything: no such stage\. Stages: examples, proxy, .*report", tmp_path)


def test_a_run_to_reuse_that_is_not_there_is_refused(s2l, tmp_path):
    write_rows(tmp_path, good_rows(5))
    result = s2l("run", write_config(tmp_path), "--run-dir", tmp_path / "run", "--reuse", tmp_path / "none")
    check_refused(result, r"--reuse .*none: there is no such run", tmp_path)


def test_a_run_directory_that_cannot_be_written_is_refused(s2l, tmp_path):
    write_rows(tmp_path, good_rows(5))
    (tmp_path / "file").write_text("a file, not a directory")
    result = s2l("run", write_config(tmp_path), "--run-dir", tmp_path / "file" / "run")
    check_refused(result, r"file/run: cannot be written \(Not a directory\)\. Give another directory", tmp_path)
    result = s2l("run", write_config(tmp_path), "--run-dir", tmp_path / "file")
    check_refused(result, r"file: cannot be written", tmp_path)
    assert (tmp_path / "file").read_text() == "a file, not a directory"


def test_a_run_directory_of_another_recipe_is_refused_with_the_changed_field(s2l, tmp_path):
    write_rows(tmp_path, good_rows(5))
    path = write_config(tmp_path)
    recipe = load_config(path).proxy.model_dump(mode="json") | {"epochs": 7.0}
    run_dir = tmp_path / "run"
    Draft.open(Storage(str(run_dir)), Key("proxy", 1, recipe, {"examples": "x"})).publish({})
    result = s2l("run", path, "--run-dir", run_dir)
    check_refused(result, r"run/proxy belongs to another recipe:\s+proxy\.epochs: 7\.0 -> 1\.0\s.*--reuse")
    assert ANOTHER_RUN in result.err
    assert [p.parent.name for p in run_dir.rglob("manifest.json")] == ["proxy"]
    assert not (run_dir / "run.json").exists()
    # `plan` shows the same in its table, and changes nothing.
    planned = s2l("plan", path, "--run-dir", run_dir)
    assert planned.code == 2
    assert re.search(r"^proxy +refuse .*\n +proxy\.epochs: 7\.0 -> 1\.0", planned.out, re.MULTILINE)
    assert re.search(r"^trajectories +refuse .*after proxy", planned.out, re.MULTILINE)


def test_an_unfinished_directory_of_another_recipe_is_refused_too(s2l, tmp_path):
    write_rows(tmp_path, good_rows(5))
    path = write_config(tmp_path)
    recipe = load_config(path).clustering.model_dump(mode="json") | {"num_clusters": 9}
    Draft.open(Storage(str(tmp_path / "run")), Key("clustering", 1, recipe, {"trajectories": "x"}))
    result = s2l("run", path, "--run-dir", tmp_path / "run")
    check_refused(result, r"clustering\.num_clusters: 9 -> 3", tmp_path)


@pytest.mark.parametrize(
    "arguments",
    [
        ["run"],
        ["fly"],
        ["run", "config.yaml", "--unknown"],
        ["select", "x.parquet"],
        ["export", ".", "--format", "csv", "--output", "x"],
    ],
)
def test_wrong_usage_ends_with_2_and_says_how(s2l, arguments):
    result = s2l(*arguments)
    assert result.code == 2
    assert "Usage: s2l" in result.err
    assert "Traceback" not in result.err


# --- corpora: refused while they are read --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "fields", "message"),
    [
        (
            [*good_rows(3), '{"prompt": "cut short'],
            {},
            r"corpus\.jsonl line 4.*not JSON",
        ),
        (
            [*good_rows(3), {"prompt": "p", "answer": "a"}],
            {},
            r"corpus\.jsonl line 4: field 'response' is missing \(fields: prompt, answer\).*examples\.response_field",
        ),
        (
            [*good_rows(3), {"prompt": "p", "response": {"text": "a"}}],
            {},
            r"corpus\.jsonl line 4: field 'response' is .*text",
        ),
        (
            [{"id": "same", **row} for row in good_rows(4)],
            {"id_field": "id"},
            r"examples\.id_field: 1 ids are shared by rows with different prompt or response: .same.\. Give",
        ),
        (
            [{"id": [1], **row} for row in good_rows(4)],
            {"id_field": "id"},
            r"corpus\.jsonl line 1: field 'id' is .*an id is text or a whole number",
        ),
    ],
    ids=["not-json", "missing-field", "wrong-type", "duplicate-ids", "wrong-id"],
)
def test_a_row_that_cannot_be_used_is_named_with_file_line_and_remedy(s2l, tmp_path, ray_session, rows, fields, message):
    write_rows(tmp_path, rows)
    result = s2l("run", write_config(tmp_path, examples=fields), "--run-dir", tmp_path / "run")
    check_refused(result, message, tmp_path)


def test_a_corpus_smaller_than_one_batch_is_refused(s2l, tmp_path, ray_session):
    write_rows(tmp_path, good_rows(20))
    config = write_config(tmp_path, proxy={"global_batch_size": 64})
    result = s2l("run", config, "--run-dir", tmp_path / "run")
    check_refused(result, r"pool has \d+ examples, fewer than one batch of proxy\.global_batch_size=64\. Use a smaller batch")
    assert [p.parent.name for p in (tmp_path / "run").rglob("manifest.json")] == ["examples"]


def test_a_model_that_cannot_be_found_is_named(s2l, tmp_path, ray_session, monkeypatch):
    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("no network in this test")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", offline)
    write_rows(tmp_path, good_rows(20))
    config = write_config(tmp_path, proxy={"model": str(tmp_path / "no-model"), "tokenizer": None})
    result = s2l("run", config, "--run-dir", tmp_path / "run")
    check_refused(result, r"no-model'?: cannot be loaded .*Give (a|the) path")
    assert [p.parent.name for p in (tmp_path / "run").rglob("manifest.json")] == ["examples"]


def test_the_installed_command_with_a_ray_of_its_own_prints_one_message_and_no_traceback(tmp_path):
    write_rows(tmp_path, [*good_rows(3), "not json"])
    command = [S2L, "run", str(write_config(tmp_path)), "--run-dir", str(tmp_path / "run")]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    check_refused(Result(done.returncode, done.stdout, done.stderr), r"corpus\.jsonl line 4.*not JSON", tmp_path)
    assert done.stderr.splitlines()[-1].startswith("s2l: ")


# --- s2l select ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ([[1.0, 2.0], [1.0, 2.0], [1.0]], r"losses are ragged.*'id-2'"),
        ([[1.0, 2.0], [1.0, float("nan")], [1.0, 2.0]], r"NaN.*'id-1'"),
        ([[1.0, 2.0], [1.0, 2.0], [float("inf"), 2.0]], r"infinite.*'id-2'"),
        ([[1.0, 2.0], None, [1.0, 2.0]], r"missing for example_id 'id-1'"),
    ],
    ids=["ragged", "nan", "infinite", "missing"],
)
def test_losses_that_cannot_be_used_are_named_by_their_ids(s2l, tmp_path, losses, message):
    path = write_trajectories(tmp_path / "t.parquet", losses)
    result = s2l("select", path, "--budget", 1, "--num-clusters", 1, "--output", tmp_path / "out")
    check_refused(result, message, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", 2, "--num-clusters", 11], r"num_clusters.*11.*10"),
        (["--budget", 0, "--num-clusters", 2], r"selection\.budget: must be above 0, found 0"),
        (["--budget", "many", "--num-clusters", 2], r"selection\.budget: 'many' is not a number"),
        (["--budget", "tokens:50", "--num-clusters", 2], r"budget in tokens needs the column num_response_tokens"),
        (["--budget", 2, "--num-clusters", 2, "--stratify-by", "topic"], r"no column 'topic'.*Known: example_id, losses"),
    ],
    ids=["more-groups-than-rows", "no-budget", "budget-in-words", "tokens-unknown", "no-such-column"],
)
def test_a_choice_that_cannot_be_made_is_refused(s2l, tmp_path, arguments, message):
    path = write_trajectories(tmp_path / "t.parquet", falling_losses(10))
    check_refused(s2l("select", path, *arguments, "--output", tmp_path / "out"), message)
    assert not (tmp_path / "out" / "selection" / "manifest.json").exists()


def test_trajectories_that_cannot_be_read_are_named(s2l, tmp_path):
    options = ["--budget", 1, "--num-clusters", 1, "--output", tmp_path / "out"]
    check_refused(s2l("select", tmp_path / "none.parquet", *options), r"none\.parquet: no such file", tmp_path)
    path = write_trajectories(tmp_path / "t.parquet", falling_losses(10))
    path.write_bytes(path.read_bytes()[:-20])
    check_refused(s2l("select", path, *options), r"t\.parquet: cannot be read as Parquet, it may be truncated", tmp_path)
    twice = write_trajectories(tmp_path / "twice.parquet", falling_losses(3), ["a", "b", "a"])
    check_refused(s2l("select", twice, *options), r"example_id occurs more than once: 'a'", tmp_path)


def test_an_output_that_is_in_the_way_is_refused(s2l, tmp_path):
    path = write_trajectories(tmp_path / "t.parquet", falling_losses(10))
    (tmp_path / "file").write_text("")
    result = s2l("select", path, "--budget", 2, "--num-clusters", 2, "--output", tmp_path / "file" / "out")
    check_refused(result, r"file/out: cannot be written \(Not a directory\)")
    first = ["--budget", 2, "--num-clusters", 2, "--output", tmp_path / "out"]
    assert s2l("select", path, *first).code == 0
    other = ["--budget", 2, "--num-clusters", 3, "--output", tmp_path / "out"]
    check_refused(s2l("select", path, *other), r"clustering\.num_clusters: 2 -> 3\s.*Give another --output")
    again = s2l("select", path, *first)
    assert again.code == 0
    assert "clustering    reused" in again.err


def test_a_budget_above_the_pool_takes_everything_with_a_warning(s2l, tmp_path):
    path = write_trajectories(tmp_path / "t.parquet", falling_losses(10))
    result = s2l("select", path, "--budget", 500, "--num-clusters", 3, "--output", tmp_path / "out")
    assert result.code == 0
    assert re.search(r"WARNING: the budget of 500 examples is above the 10 there are: all are taken", result.err)
    assert pq.read_table(tmp_path / "out" / "selection" / "selected.parquet").num_rows == 10


def test_selecting_says_what_it_does_and_other_columns_pass_through(s2l, tmp_path):
    path = write_trajectories(tmp_path / "t.parquet", falling_losses(30), note=[f"note {i}" for i in range(30)])
    result = s2l("select", path, "--budget", "0.5", "--num-clusters", 3, "--output", tmp_path / "out")
    assert result.code == 0
    assert re.search(r"^selection +15 of 30 examples from 3 groups", result.err, re.MULTILINE)
    table = pq.read_table(tmp_path / "out" / "selection" / "selected.parquet")
    assert set(table.column_names) == {"example_id", "note", "cluster_id", "weight"}
    assert all(row["note"] == row["example_id"].replace("id-", "note ") for row in table.to_pylist())


# --- s2l plan ------------------------------------------------------------------------------------------------------


@pytest.fixture
def _no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub does not answer, at once."""

    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("no network in this test")

    for name in ("dataset_info", "model_info"):
        monkeypatch.setattr(f"huggingface_hub.HfApi.{name}", offline)


@pytest.mark.usefixtures("_no_hub")
@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_config_is_planned_stage_by_stage_without_network(s2l, tmp_path, config):
    result = s2l("plan", config, "--run-dir", tmp_path / "run")
    assert result.code == 0, result.err
    for name in STAGE_NAMES:
        assert re.search(rf"^{name} +build ", result.out, re.MULTILINE)
    for name in ("proxy", "trajectories", "clustering", "target", "evaluation", "total"):
        operations = re.search(rf"^{name} .*?(\d\.\d\de\+\d\d) ", result.out, re.MULTILINE)
        assert operations is not None, f"{name}: {result.out}"
        assert float(operations[1]) > 0
    assert re.search(r"proxy [\d,]+ parameters, target [\d,]+ \(\d+x\)", result.out)
    assert not list(tmp_path.rglob("manifest.json"))
    assert not (tmp_path / "run" / "run.json").exists(), "planning writes no run"


@pytest.mark.usefixtures("_no_hub")
def test_a_plan_for_an_accelerator_at_a_price_shows_hours_and_money(s2l, tmp_path):
    config = next(path for path in CONFIGS if path.stem == "mathinstruct-pythia70m-phi2")
    priced = s2l("plan", config, "--run-dir", tmp_path, "--accelerator", "H100", "--price-per-hour", 3)
    assert priced.code == 0, priced.err
    operations, hours, price = re.search(
        r"^total +(\S+) +[\d.]+ [KMGT]?B +(\d+\.\d\d) +(\d+\.\d\d)$", priced.out, re.MULTILINE
    ).groups()  # type: ignore[union-attr]
    # 989e12 operations per second at 35%: training and scoring in float32 are slower.
    assert float(hours) >= 0.99 * float(operations) / (0.35 * 989e12) / 3600
    assert float(price) == pytest.approx(3 * float(hours), abs=0.02)
    assert "one H100 at 35% of its peak rate" in priced.out
    unpriced = s2l("plan", config, "--run-dir", tmp_path, "--accelerator", "T4")
    slower = re.search(r"^total .* (\d+\.\d\d) *$", unpriced.out, re.MULTILINE)
    assert slower is not None
    assert float(slower[1]) > 5 * float(hours)


@pytest.mark.usefixtures("_no_hub")
def test_an_unknown_accelerator_is_refused_with_the_known_ones(s2l, tmp_path):
    result = s2l("plan", CONFIGS[0], "--run-dir", tmp_path, "--accelerator", "abacus")
    check_refused(result, r"accelerator 'abacus': not known\. Known: .*H100")


# --- status, report ----------------------------------------------------------------------------------------


@pytest.fixture
def selected(s2l: Command, tmp_path: Path) -> Path:
    """The output of `s2l select`."""
    path = write_trajectories(tmp_path / "t.parquet", falling_losses(30), note=[f"n{i}" for i in range(30)])
    assert s2l("select", path, "--budget", 6, "--num-clusters", 3, "--output", tmp_path / "out").code == 0
    return tmp_path / "out"


def test_status_says_what_is_finished_unfinished_and_not_begun(s2l, selected):
    Draft.open(Storage(str(selected)), Key("target", 1, {}, {})).write("model/config.json", b"{}")
    result = s2l("status", selected)
    assert result.code == 0
    assert re.search(r"^selection +finished +6 rows, 2 files, .* [0-9a-f]{16}$", result.out, re.MULTILINE)
    assert re.search(r"^target +unfinished +1 files written$", result.out, re.MULTILINE)
    assert re.search(r"^proxy +not begun$", result.out, re.MULTILINE)


def test_status_of_a_stage_in_units_says_part_by_part_what_is_done(s2l, tmp_path):
    run = Storage(str(tmp_path))
    examples = Draft.open(run, Key("examples", 1, {}, {}))
    for part in range(3):
        examples.write_table(f"part-{part:05d}.parquet", pa.table({"example_id": ["a"]}))
    examples.publish({"rows": 3})
    proxy = Draft.open(run, Key("proxy", 1, {}, {}))
    for step in (10, 20):
        proxy.write(f"step-{step:06d}/checkpoint.json", json.dumps({"files": [step]}).encode())
    config = context_of(proxy, proxy={"model": "none", "max_tokens": 64}).config
    tokens = TokenParts.of(
        Artifact.read(run.child("examples")), run.child("proxy/tokenizer"), RowLimit(64), proxy.shared, config.examples
    ).name
    other = config.model_copy(update={"trajectories": TrajectoriesConfig(precision="bfloat16")})
    for part, files, recipe in (
        (0, [10], config),
        (1, ["of an older checkpoint"], config),
        (1, [10], other),
        (2, [10], config),
    ):
        folder = losses_folder(tokens, recipe, "cpu")
        proxy.shared.write(f"{folder}/step-000010-{digest(files)}/part-{part:05d}.parquet", b"")
    assert re.search(r"step-000010 +0/3 ", s2l("status", tmp_path).out), "no recipe is at hand yet"
    run.write_json("run.json", {"schema": "s2l_ray/1"} | config.model_dump(mode="json"))
    out = s2l("status", tmp_path).out
    assert re.search(r"^trajectories +not begun\n +step-000010 +2/3 #\.#\n +step-000020 +0/3 \.\.\.$", out, re.MULTILINE)

    # Handed to the grouping as if it were finished: which units are missing, and how to finish.
    refused = s2l("select", tmp_path / "trajectories", "--budget", 2, "--output", tmp_path / "out")
    assert refused.code == 2
    assert "4 of 6 units are missing (step-000010 lacks part-00001.parquet; step-000020 lacks part-00000" in refused.err
    assert "Run the same `s2l run` again" in refused.err


@pytest.mark.parametrize("arguments", [["status"], ["report"], ["export", "--format", "jsonl", "--output", "x.jsonl"]])
def test_a_run_that_is_not_there_is_named(s2l, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    command, *options = arguments
    check_refused(s2l(command, tmp_path / "none", *options), r"/none")
    assert list(tmp_path.iterdir()) == [], "nothing is made for it"


def test_the_report_can_be_built_again_from_what_is_finished(s2l, selected):
    first = s2l("report", selected)
    assert first.code == 0, first.err
    page = Path(first.out.strip().splitlines()[-1])
    assert page == selected / "report" / "index.html"
    assert page.read_text().lstrip().lower().startswith("<!doctype html>")
    assert s2l("report", selected).code == 0


# --- other ends ----------------------------------------------------------------------------------------------------


def test_a_full_disk_is_the_users_to_mend(s2l, tmp_path, monkeypatch):
    path = write_trajectories(tmp_path / "t.parquet", falling_losses(10))

    def no_space(_descriptor: int) -> None:
        raise OSError(28, "No space left on device", "somewhere")

    monkeypatch.setattr(os, "fsync", no_space)
    result = s2l("select", path, "--budget", 2, "--num-clusters", 2, "--output", tmp_path / "out")
    check_refused(result, r"somewhere on .*: the disk is full\. Free some space; the same command goes on", tmp_path / "out")


def test_an_interrupted_command_says_that_the_same_one_goes_on(s2l, tmp_path, monkeypatch):
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    write_rows(tmp_path, good_rows(5))
    monkeypatch.setattr("s2l_ray.pipeline.run", interrupt)
    result = s2l("run", write_config(tmp_path), "--run-dir", tmp_path / "run")
    assert result.code == 1
    assert "The same command goes on where this one stopped." in result.err


def test_our_own_mistakes_stay_tracebacks(tmp_path, monkeypatch):
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("ours")

    write_rows(tmp_path, good_rows(5))
    monkeypatch.setattr("s2l_ray.pipeline.run", broken)
    monkeypatch.setattr(cli, "log_to_console", lambda: None)
    monkeypatch.setattr(sys, "argv", ["s2l", "run", str(write_config(tmp_path))])
    with pytest.raises(RuntimeError, match="ours"):
        cli.main()
