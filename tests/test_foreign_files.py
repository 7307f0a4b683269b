"""What a user keeps where a run would write: it is never removed or overwritten, and the refusal names it."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from s2l_ray import cli
from s2l_ray.config import ClusteringConfig, SelectionConfig
from s2l_ray.errors import ArtifactError, S2LError
from s2l_ray.report.page import build_report
from s2l_ray.selection.alone import select_trajectories
from s2l_ray.storage.artifacts import Artifact, Key
from s2l_ray.storage.drafts import Draft
from s2l_ray.storage.layout import STAGE_NAMES
from s2l_ray.storage.ownership import GENERATOR, check_run, scratch_of
from s2l_ray.storage.places import Storage
from s2l_ray.trajectories.files import read_trajectories
from s2l_ray.trajectories.recording import finish_recording, forget_steps, record_losses

CLUSTERING, SELECTION = ClusteringConfig(num_clusters=2, num_restarts=1), SelectionConfig(budget=4)
# Names that a run uses, too, and names that it does not.
FOLDERS = st.sampled_from(["", *STAGE_NAMES, ".work", ".work/scratch", ".work/clustering", ".work/locks", "proxy/step-000010"])
NAMES = st.sampled_from(
    [
        *("notes.py", "run.json", "manifest.json", "building.json", "part-00000.parquet", "part-notes.txt", "index.html"),
        *("selected.parquet", "lock", "lock-000001", "assignments-00000.parquet", "x.tmp", "CACHEDIR.TAG", "deep/notes.py"),
        "selected.parquet.1a2b3c4d.tmp.bak",
    ]
)
CONTENTS = st.sampled_from([b"", b"{}", b"[]", b'{"schema": 1}', b"\xff\x00", b"text"])
USER_FILES = st.dictionaries(st.tuples(FOLDERS, NAMES).map("/".join).map(lambda name: name.lstrip("/")), CONTENTS, max_size=4)


def key(stage: str = "examples", inputs: dict[str, str] | None = None) -> Key:
    return Key(stage, 1, {"size": 1}, inputs or {})


def put(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every file with its content, and every directory."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def refusal_of(action: Callable[[], object]) -> str:
    """What a user is told, nothing if the action was done."""
    try:
        action()
    except S2LError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def trajectories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "t.parquet"
    losses = np.random.default_rng(0).random((12, 3)).astype(np.float32)
    pq.write_table(pa.table({"example_id": [f"{i}" for i in range(12)], "losses": losses.tolist()}), path)
    return path


@pytest.fixture
def s2l(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The command line in this process: its exit code."""
    monkeypatch.setattr(cli, "log_to_console", lambda: None)

    def call(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["s2l", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return int(end.value.code or 0)

    return call


# --- whatever there is ---------------------------------------------------------------------------------------------


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(files=USER_FILES)
def test_whatever_a_user_keeps_in_an_output_directory_is_still_there_and_a_refusal_changes_nothing(files, trajectories):
    with tempfile.TemporaryDirectory() as folder:
        put(Path(folder), files)
        before = tree(Path(folder))
        refusal = refusal_of(lambda: select_trajectories(str(trajectories), folder, CLUSTERING, SELECTION))
        if refusal:
            assert tree(Path(folder)) == before
            assert any(f"{folder}/{name}" in refusal for name in files), refusal
        after = tree(Path(folder))
        assert {name: after.get(name) for name in files} == files


@settings(max_examples=60)
@given(files=USER_FILES, later=st.sets(st.sampled_from(["notes.py", "deep/notes.py", "part-00000.parquet", "x.tmp"])))
def test_a_stage_is_begun_and_begun_again_without_touching_what_a_user_keeps(files, later):
    with tempfile.TemporaryDirectory() as folder:
        put(Path(folder), files)
        run, mine = Storage(folder), dict(files)
        begun = refusal_of(lambda: Draft.open(run, key("selection", {"clustering": "old"})))
        if not begun:
            run.write("selection/selected-7.parquet", b"ours")
            added = {f"selection/{name}": b"mine" for name in later}
            put(Path(folder), added)
            mine |= added
            again = refusal_of(lambda: Draft.open(run, key("selection", {"clustering": "new"})))
            assert bool(again) == run.exists("selection/selected-7.parquet") == bool(added)
        assert not begun or any(f"{folder}/{name}" in begun for name in mine), begun
        after = tree(Path(folder))
        assert {name: after.get(name) for name in mine} == mine


# --- commands ------------------------------------------------------------------------------------------------------


def test_selecting_into_a_directory_with_a_selection_of_the_users_own_is_refused_by_name(
    tmp_path, trajectories, s2l, monkeypatch, capsys
):
    put(tmp_path, {"selection/notes.py": b"mine", "clustering/notes.py": b"mine"})
    monkeypatch.chdir(tmp_path)
    before = tree(tmp_path)
    assert s2l("select", trajectories, "--budget", 4, "--output", ".") == 2
    assert f"{tmp_path}/clustering/notes.py: not written by s2l_ray" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "clustering")
    assert s2l("select", trajectories, "--budget", 4, "--output", ".") == 2  # though its clustering could be built
    assert f"{tmp_path}/selection/notes.py: not written by s2l_ray" in capsys.readouterr().err
    assert tree(tmp_path) == {name: content for name, content in before.items() if not name.startswith("clustering")}


@pytest.mark.parametrize(
    "name",
    [
        *(
            "examples/notes.py",
            "evaluation/deep/notes.py",
            "run.json",
            ".work/notes.txt",
            "report/index.html",
            "report/notes.tex",
        ),
        *("target/manifest.json", "proxy/building.json", "selection"),
    ],
)
@pytest.mark.parametrize("command", ["run", "plan"])
def test_a_run_refuses_a_directory_with_files_of_the_users_own_before_anything_is_done(
    tmp_path, s2l, monkeypatch, capsys, name, command
):
    monkeypatch.chdir(tmp_path)
    values = {"name": "r", "examples": {"dataset": "corpus.jsonl"}, "selection": {"budget": 2}}
    values |= {"proxy": {"model": "./none"}, "target": {"model": "./none"}}
    put(tmp_path, {name: b'{"mine": 1}', "corpus.jsonl": b'{"prompt": "p", "response": "r"}\n'})
    (tmp_path / "none").mkdir()
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
    before = tree(tmp_path)
    assert s2l(command, "c.yaml", "--run-dir", ".") == 2
    assert f"{tmp_path}/{name}" in capsys.readouterr().err
    assert tree(tmp_path) == before


def test_a_page_of_the_users_own_is_not_replaced_by_the_report(tmp_path):
    draft = Draft.open(Storage(str(tmp_path)), key("clustering"))
    draft.publish({"rows": 0})
    put(tmp_path, {"report/index.html": b"<html>mine</html>"})
    with pytest.raises(ArtifactError, match=r"report/index\.html: not written by s2l_ray"):
        build_report(str(tmp_path))
    assert (tmp_path / "report" / "index.html").read_bytes() == b"<html>mine</html>"
    assert GENERATOR in (Path(cli.__file__).parent / "report" / "page.html").read_text()


@pytest.mark.parametrize("content", [b"[1]", b'{"tool": "another"}'])
def test_another_tools_run_json_is_not_reported_as_the_config_and_hides_no_trajectories(tmp_path, trajectories, content):
    put(tmp_path, {"theirs/run.json": content, "theirs/trajectories/t.parquet": trajectories.read_bytes()})
    assert read_trajectories(str(tmp_path / "theirs" / "trajectories")).losses_NT.shape == (12, 3)
    Draft.open(Storage(str(tmp_path / "theirs")), key("clustering")).publish({"rows": 0})
    with pytest.raises(ArtifactError, match=r"run\.json: not written by s2l_ray"):
        build_report(str(tmp_path / "theirs"))


def test_an_export_replaces_the_file_that_it_names_and_refuses_a_directory_by_name(tmp_path, trajectories, s2l, capsys):
    out = tmp_path / "out"
    select_trajectories(str(trajectories), str(out), CLUSTERING, SELECTION)
    put(tmp_path, {"subset.jsonl": b"of yesterday", "folder/notes.py": b"mine"})
    assert s2l("export", out, "--format", "jsonl", "--output", tmp_path / "folder") == 2
    assert f"{tmp_path}/folder: is a directory" in capsys.readouterr().err
    assert (tmp_path / "folder" / "notes.py").read_bytes() == b"mine"
    assert s2l("export", out, "--format", "jsonl", "--output", tmp_path / "subset.jsonl") == 0
    assert len((tmp_path / "subset.jsonl").read_bytes().splitlines()) == 4


@pytest.mark.parametrize("name", ["run.json", "selection/manifest.json", "linked/manifest.json", "clustering/centroids.npy"])
def test_an_export_never_replaces_what_a_run_wrote(tmp_path, trajectories, s2l, capsys, name):
    out = tmp_path / "out"
    select_trajectories(str(trajectories), str(out), CLUSTERING, SELECTION)
    (out / "linked").symlink_to(out / "selection")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert s2l("export", out, "--format", "jsonl", "--output", out / name) == 2
    assert "would replace what a run wrote" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_an_export_into_a_pipe_is_refused_instead_of_replacing_it(tmp_path, trajectories, s2l, capsys):
    select_trajectories(str(trajectories), str(tmp_path / "out"), CLUSTERING, SELECTION)
    os.mkfifo(tmp_path / "pipe")
    assert s2l("export", tmp_path / "out", "--format", "jsonl", "--output", tmp_path / "pipe") == 2
    assert f"{tmp_path}/pipe: is a device or a pipe" in capsys.readouterr().err
    assert (tmp_path / "pipe").is_fifo()


def test_files_behind_a_linked_directory_are_never_removed(tmp_path):
    """Their names are a stage's own, the directory is not."""
    put(tmp_path, {"mine/model.safetensors": b"of mine"})
    run = Storage(str(tmp_path / "run"))
    Draft.open(run, key("proxy", {"examples": "old"}))
    (tmp_path / "run" / "proxy" / "step-000100").symlink_to(tmp_path / "mine")
    with pytest.raises(ArtifactError, match="step-000100"):
        Draft.open(run, key("proxy", {"examples": "new"}))
    assert (tmp_path / "mine" / "model.safetensors").read_bytes() == b"of mine"


# --- what an earlier run left --------------------------------------------------------------------------------------


def test_a_users_file_among_what_was_begun_from_other_inputs_is_named_and_nothing_is_removed(tmp_path):
    run = Storage(str(tmp_path))
    Draft.open(run, key("trajectories", {"proxy": "old"})).write("part-00000.parquet", b"ours")
    put(tmp_path, {"trajectories/part-notes.txt": b"mine"})
    before = tree(tmp_path)
    with pytest.raises(ArtifactError, match=r"part-notes\.txt: not written by s2l_ray"):
        Draft.open(run, key("trajectories", {"proxy": "new"}))
    assert tree(tmp_path) == before


def test_a_finished_stage_is_not_opened_again(tmp_path):
    Draft.open(Storage(str(tmp_path)), key()).publish({"rows": 0})
    with pytest.raises(ArtifactError, match="finished"):
        Draft.open(Storage(str(tmp_path)), key())
    assert Artifact.read(Storage(str(tmp_path)).child("examples"))


def test_what_a_kill_left_of_the_first_files_is_no_ones_else(tmp_path):
    put(tmp_path, {"examples/building.json.0a1b2c3d.tmp": b"{", ".work/CACHEDIR.TAG.0a1b2c3d.tmp": b"Sig"})
    put(tmp_path, {"report/index.html.0a1b2c3d.tmp": b"<"})
    check_run(Storage(str(tmp_path)))
    Draft.open(Storage(str(tmp_path)), key()).publish({"rows": 0})
    assert [path.name for path in (tmp_path / "examples").iterdir()] == ["manifest.json"]


def test_a_scratch_directory_of_the_users_own_is_neither_used_nor_emptied(tmp_path, trajectories):
    put(tmp_path, {".work/scratch/mine": b"mine", ".work/recording/step-000005/mine.parquet": b"mine"})
    before = tree(tmp_path)
    for use in (
        lambda: select_trajectories(str(trajectories), str(tmp_path), CLUSTERING, SELECTION),
        lambda: record_losses(tmp_path, 5, ["a"], [1.0]),
        lambda: forget_steps(tmp_path, [5]),
        lambda: finish_recording(tmp_path),
    ):
        with pytest.raises(ArtifactError, match=r"\.work/\S+: not written by s2l_ray"):
            use()
    assert tree(tmp_path) == before


def test_finishing_a_recording_leaves_files_that_are_only_named_like_its_parts(tmp_path):
    put(tmp_path, {"part-notes.txt": b"mine", "selected.parquet.txt": b"mine"})
    record_losses(tmp_path, 0, ["a", "b"], [1.0, 2.0])
    finish_recording(tmp_path)
    assert (tmp_path / "part-notes.txt").read_bytes() == b"mine"
    put(tmp_path / "other", {"manifest.json": b"{}"})
    with pytest.raises(ArtifactError, match="not a manifest of schema"):
        record_losses(tmp_path / "other", 0, ["a"], [1.0])


def test_object_storage_is_no_other(bucket):
    run = Storage(f"{bucket}/mine")
    run.write("selection/notes.py", b"mine")
    with pytest.raises(ArtifactError, match=r"s3://runs/mine/selection/notes\.py: not written by s2l_ray"):
        Draft.open(run, key("selection"))
    with pytest.raises(ArtifactError, match=r"s3://runs/mine/selection/notes\.py: not written by s2l_ray"):
        check_run(run)
    assert run.names(recursive=True) == ["selection/notes.py"]
    run.delete("selection/notes.py")
    check_run(run)
    assert scratch_of(run) == scratch_of(run)
    assert run.names(recursive=True) == [".work/CACHEDIR.TAG"]
