"""The same artifacts on an S3-compatible server over HTTP as on a local disk."""

from __future__ import annotations

import contextlib
import errno
import http.server
import os
import re
import socket
import stat
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from s2l_ray import cli
from s2l_ray.config import ClusteringConfig, SelectionConfig
from s2l_ray.errors import ArtifactError, StorageError, cause_of, storage_problem
from s2l_ray.plan.status import status_text
from s2l_ray.selection.alone import select_trajectories
from s2l_ray.selection.export import export_subset
from s2l_ray.storage.artifacts import Artifact, Key, adopt
from s2l_ray.storage.drafts import Draft
from s2l_ray.storage.lock import exclusive
from s2l_ray.storage.places import Storage
from tests.exporting import answer, made_run, user


def build(run: Storage, **recipe: object) -> Artifact:
    draft = Draft.open(run, Key("examples", 1, recipe, {}))
    draft.write_table("part-00000.parquet", pa.table({"example_id": ["a", "b"]}))
    return draft.publish({"rows": 2})


def test_an_artifact_is_published_read_and_taken_by_reference(bucket):
    made = build(Storage(f"{bucket}/first"), size=1)
    found = Artifact.read(Storage(f"{bucket}/first").child("examples"))
    found.check_sizes()
    assert found.read_table("part-00000.parquet")["example_id"].to_pylist() == ["a", "b"]
    adopted = adopt(Storage(f"{bucket}/second"), found)
    assert adopted.root.uri == f"{bucket}/first/examples"
    assert adopted.identity == made.identity


def test_an_unfinished_stage_is_continued_and_another_recipe_refused(bucket):
    run = Storage(f"{bucket}/third")
    draft = Draft.open(run, Key("examples", 1, {"size": 1}, {}))
    draft.write("part-00000.parquet", b"kept")
    assert Draft.open(run, Key("examples", 1, {"size": 1}, {})).has("part-00000.parquet")
    with pytest.raises(ArtifactError, match=r"examples\.size: 1 -> 2"):
        Draft.open(run, Key("examples", 1, {"size": 2}, {}))


def test_a_damaged_object_is_named(bucket):
    artifact = build(Storage(f"{bucket}/fourth"), size=1)
    artifact.storage.write("part-00000.parquet", b"short")
    with pytest.raises(ArtifactError, match=r"s3://runs/fourth/examples/part-00000\.parquet: damaged"):
        artifact.check_sizes()


def test_a_folder_is_fetched_once_per_machine(bucket, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    draft = Draft.open(Storage(f"{bucket}/fifth"), Key("proxy", 1, {}, {}))
    draft.add(*draft.storage.upload(tmp_path, "step-000001"))
    artifact = draft.publish({})
    folder = artifact.folder("step-000001")
    assert (folder / "config.json").read_text() == "{}"
    assert artifact.folder("step-000001") == folder


def test_of_several_processes_of_a_machine_one_fetches_a_folder_and_the_others_wait_for_it(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    storage = Storage(f"{bucket}/sixth")
    storage.write("model/config.json", b"{}")
    fetched, copy = [], fs.copy_files

    def slow_copy(*arguments: Any, **options: Any) -> None:
        fetched.append(arguments)
        time.sleep(0.3)
        copy(*arguments, **options)

    monkeypatch.setattr("s2l_ray.storage.places.fs.copy_files", slow_copy)
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(storage.local_folder, ["model"] * 4))
    assert len(fetched) == len(folders) == 1
    assert (folders.pop() / "config.json").read_bytes() == b"{}"
    assert stat.S_IMODE(next(tmp_path.iterdir()).stat().st_mode) == 0o700, "nobody else writes there"


def test_selecting_reads_and_writes_object_storage(bucket, tmp_path, rng_losses):
    ids = [f"{i:04d}" for i in range(len(rng_losses))]
    table = pa.table({"example_id": ids, "losses": rng_losses.tolist(), "text": ids})
    Storage(f"{bucket}/data").write("trajectories.parquet", _parquet(table))
    (tmp_path / "trajectories.parquet").write_bytes(_parquet(table))
    config = ClusteringConfig(num_clusters=5), SelectionConfig(budget=40)
    there = select_trajectories(f"{bucket}/data/trajectories.parquet", f"{bucket}/out", *config)
    here = select_trajectories(str(tmp_path / "trajectories.parquet"), str(tmp_path / "out"), *config)
    assert there.read_bytes("selected.parquet") == here.read_bytes("selected.parquet")
    assert export_subset(f"{bucket}/out", "jsonl", f"{bucket}/export/subset.jsonl").num_rows == 40
    assert len(Storage(f"{bucket}/export").read("subset.jsonl").splitlines()) == 40
    assert export_subset(f"{bucket}/out", "parquet", f"{bucket}/export/subset.parquet").num_rows == 40
    assert Storage(f"{bucket}/export").read("subset.parquet") == here.read_bytes("selected.parquet")
    assert "selection     finished    40 rows" in status_text(f"{bucket}/out")


def test_rows_as_they_were_and_a_trainers_files_are_exported_from_object_storage_and_to_it(bucket, tmp_path):
    talks = {f"id{number}": [user("a"), answer("b", weight=number % 2), user("c"), answer("d")] for number in range(9)}
    made_run(tmp_path / "run", talks, texts={name: f'{{"key": "{name}"}}' for name in talks})
    there = Storage(f"{bucket}/chats")
    for stage in ("examples", "selection"):
        there.upload(tmp_path / "run" / stage, stage)
    for kind, name in (("jsonl", "rows.jsonl"), ("trl", "trl"), ("axolotl", "named/rows.jsonl")):
        (tmp_path / "named").mkdir(exist_ok=True)
        export_subset(str(tmp_path / "run"), kind, str(tmp_path / name))
        export_subset(there.uri, kind, f"{there.uri}/{name}")
        data = f"{name}/data.jsonl" if kind == "trl" else name
        assert there.read(data) == (tmp_path / data).read_bytes()
    assert there.names("trl") == ["README.md", "data.jsonl", "trl.yaml"]
    assert there.names("named") == ["axolotl.yaml", "rows.jsonl"]


@pytest.fixture
def rng_losses() -> np.ndarray:
    return np.random.default_rng(0).random((200, 4)).astype(np.float32)


def _parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


def test_an_upload_that_fails_half_way_publishes_nothing(bucket, monkeypatch):
    def broken(source, target, _size):
        target.write(source.read(6 * 2**20))
        raise OSError("the disk went away")

    monkeypatch.setattr("s2l_ray.storage.places.shutil.copyfileobj", broken)
    storage = Storage(f"{bucket}/half")
    with pytest.raises(OSError, match="went away"), storage.atomic_path("part.parquet") as path:
        path.write_bytes(bytes(12 * 2**20))
    assert not storage.exists("part.parquet")


def test_a_subset_is_streamed_to_object_storage_whole(bucket):
    draft = Draft.open(Storage(f"{bucket}/stream"), Key("selection", 1, {}, {}))
    draft.write_tables("selected.parquet", (pa.table({"row": [part]}) for part in range(3)))
    table = draft.publish({"rows": 3}).read_table("selected.parquet")
    assert table["row"].to_pylist() == [0, 1, 2]


# --- what the user can mend ----------------------------------------------------------------------------------------

# Every way in which a stage touches storage.
OPERATIONS: dict[str, Callable[[Storage], object]] = {
    "exists": lambda storage: storage.exists("file"),
    "size": lambda storage: storage.size("file"),
    "names": lambda storage: storage.names(recursive=True),
    "read": lambda storage: storage.read("file"),
    "read_json": lambda storage: storage.read_json("file"),
    "open": lambda storage: storage.open("file"),
    "write": lambda storage: storage.write("file", b"data"),
    "upload": lambda storage: storage.upload(Path(cli.__file__).parent / "report", "folder"),
    "local_folder": lambda storage: storage.local_folder("folder"),
    "delete": lambda storage: storage.delete("file"),
    "lock": lambda storage: exclusive(storage).__enter__(),
}
# What stores answer, and what the user is told.
ANSWERS = {
    "AccessDenied": (403, r"access denied\. The credentials must allow to list, read, write and delete"),
    "ExpiredToken": (400, r"the credentials have expired\. Renew them; the same command goes on"),
    "InvalidAccessKeyId": (403, r"the credentials are not valid there\. Check them"),
    "SignatureDoesNotMatch": (403, r"the credentials are not valid there\. Check them"),
    "PermanentRedirect": (301, r"the bucket is in another region\. Set AWS_DEFAULT_REGION"),
    "AuthorizationHeaderMalformed": (400, r"the bucket is in another region\. Set AWS_DEFAULT_REGION"),
    "NotOurs": (418, r"refused\. Check the bucket"),
}


@contextlib.contextmanager
def store_that_answers(status: int, code: str) -> Iterator[str]:
    """A server that gives the same answer to every request, with S3's XML where the answer to it may have a body."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>It says so.</Message></Error>".encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = answer

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("code", ANSWERS)
def test_what_a_store_refuses_is_one_clear_error_whatever_was_asked(bucket, monkeypatch, code):
    status, message = ANSWERS[code]
    with store_that_answers(status, code) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        for name, operation in OPERATIONS.items():
            with pytest.raises(StorageError, match=message) as raised:
                operation(Storage(f"s3://refuses-{code.lower()}/run"))
            assert str(raised.value).startswith(f"s3://refuses-{code.lower()}/run"), name
            assert socket.gethostname() in str(raised.value)


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_bucket_that_is_not_there_is_one_clear_error(bucket, name):
    with pytest.raises(StorageError, match=r"^s3://not-there.*: there is no such bucket\. Create it"):
        OPERATIONS[name](Storage("s3://not-there/run"))


def test_a_missing_file_in_a_bucket_is_only_a_missing_file(bucket):
    storage = Storage(f"{bucket}/empty")
    with pytest.raises(FileNotFoundError):
        storage.read("file")
    assert storage.read_json("file") is None
    assert storage.names() == []
    assert not storage.exists()


@pytest.mark.parametrize("trouble", ["refused", "overloaded"])
def test_a_store_that_cannot_be_reached_or_does_not_work_is_one_clear_error(bucket, monkeypatch, trouble):
    with contextlib.ExitStack() as stack:
        if trouble == "refused":
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                endpoint = f"http://127.0.0.1:{free.getsockname()[1]}"
        else:
            endpoint = stack.enter_context(store_that_answers(503, "SlowDown"))
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        message = {"refused": "cannot be reached. Check AWS_ENDPOINT_URL", "overloaded": "the store is overloaded or down"}
        with pytest.raises(StorageError, match=message[trouble]):
            Storage(f"s3://{trouble}/run").write("file", b"data")


def test_the_command_line_says_it_in_one_line_and_exits_with_2(bucket, monkeypatch, capsys, tmp_path):
    (tmp_path / "t.parquet").write_bytes(_parquet(pa.table({"example_id": ["a", "b"], "losses": [[1.0, 2.0]] * 2})))
    arguments = ["select", str(tmp_path / "t.parquet"), "--budget", "1", "--output", "s3://not-there/out"]
    monkeypatch.setattr(cli, "log_to_console", lambda: None)
    monkeypatch.setattr(sys, "argv", ["s2l", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    told = capsys.readouterr().err
    assert re.fullmatch(r"s2l: s3://not-there: there is no such bucket\..*\n", told), told


def test_credentials_that_end_on_the_way_leave_what_was_finished(bucket):
    def let_in(requests: str) -> None:  # so many more, before credentials are asked for that moto does not know
        url = f"{os.environ['AWS_ENDPOINT_URL']}/moto-api/reset-auth"
        urllib.request.urlopen(urllib.request.Request(url, requests.encode(), {"Content-Type": "text/plain"})).close()

    run, key = Storage(f"{bucket}/ends"), Key("examples", 1, {}, {})
    draft = Draft.open(run, key)
    draft.write("part-00000.parquet", b"first")
    try:
        let_in("0")
        with pytest.raises(StorageError, match="the credentials are not valid there"):
            draft.write("part-00001.parquet", b"second")
        with pytest.raises(StorageError, match="the credentials are not valid there"):
            draft.publish({})
    finally:
        let_in("inf")
    assert Artifact.find(run.child("examples")) is None
    again = Draft.open(run, key)
    assert again.has("part-00000.parquet")
    assert not again.has("part-00001.parquet")


def test_a_full_disk_on_the_way_to_object_storage_is_that_disks(bucket, monkeypatch):
    def no_space(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("s2l_ray.storage.places.shutil.copyfile", no_space)
    with pytest.raises(StorageError, match=rf"^{tempfile.gettempdir()} on {socket.gethostname()}: the disk is full"):
        Storage(f"{bucket}/full").upload(Path(__file__).parent, "folder")


def _wrapped_by_ray(error: Exception) -> dict[str, Exception]:
    """As a task's error arrives; what a training worker met comes by its queue (`runtime.attempts`)."""
    from ray.exceptions import RayTaskError
    from ray.train import WorkerGroupError

    task = RayTaskError("task", "Traceback (most recent call last) ...", error)
    return {
        "task": task,
        "task of its class": task.as_instanceof_cause(),
        "training": WorkerGroupError("Traceback ...", {1: task}),
    }


@pytest.mark.parametrize("wrapping", ["task", "task of its class", "training"])
def test_an_error_of_storage_comes_out_of_rays_wrapping(wrapping, monkeypatch, capsys):
    full = OSError(errno.ENOSPC, "No space left on device", "/scratch/part")
    assert str(cause_of(_wrapped_by_ray(StorageError("told"))[wrapping])) == "told"
    where = r"\d+\.\d+\.\d+\.\d+" if wrapping != "task of its class" else "a worker"  # this host is not where it happened
    assert re.match(f"/scratch/part on {where}: the disk is full", str(cause_of(_wrapped_by_ray(full)[wrapping])))
    rust = RuntimeError('IoError(Os { code: 28, kind: StorageFull, message: "No space left on device" })')
    assert re.match("writing on .*: the disk is full", str(cause_of(_wrapped_by_ray(rust)[wrapping])))
    assert cause_of(_wrapped_by_ray(ValueError("ours"))[wrapping]) is None

    def broken(*_: object) -> None:
        raise _wrapped_by_ray(full)[wrapping]

    monkeypatch.setattr("s2l_ray.plan.status.status_text", broken)
    monkeypatch.setattr(cli, "log_to_console", lambda: None)
    monkeypatch.setattr(sys, "argv", ["s2l", "status", "run"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert re.fullmatch(r"s2l: /scratch/part on .*: the disk is full\..*\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("status", "reason", "message"),
    [
        (403, "x@y does not have storage.objects.list access.", "access denied"),
        (401, "Invalid Credentials", "the credentials are not valid there"),
        (404, "The specified bucket does not exist.", "there is no such bucket"),
    ],
)
def test_google_cloud_storage_is_understood_too(status, reason, message):
    with store_that_answers(status, reason) as endpoint:
        there = fs.GcsFileSystem(anonymous=True, scheme="http", endpoint_override=endpoint.removeprefix("http://"))
        with pytest.raises(OSError, match="google::cloud::Status") as raised, there.open_output_stream("runs/file") as stream:
            stream.write(b"data")
    assert f"gs://runs/file: {message}" in str(storage_problem(raised.value, "gs://runs/file"))


def test_a_missing_file_on_google_cloud_storage_is_no_problem_of_storage():
    text = "google::cloud::Status(NOT_FOUND: Permanent error, with a last message of No such object: runs/file)"
    assert storage_problem(FileNotFoundError(errno.ENOENT, text)) is None
