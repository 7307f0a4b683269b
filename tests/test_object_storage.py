"""The same artifacts on an S3-compatible server over HTTP as on a local disk."""

from __future__ import annotations

from collections.abc import Iterator

import boto3
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from moto.server import ThreadedMotoServer

from s2l_ray.artifacts import Artifact, Draft, Key, Storage, adopt
from s2l_ray.config import ClusteringConfig, SelectionConfig
from s2l_ray.errors import ArtifactError, ConfigError
from s2l_ray.pipeline import export_subset, select_trajectories
from s2l_ray.plan import status_text


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        environment.setenv("AWS_ACCESS_KEY_ID", "test")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "test")
        environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
        boto3.client("s3").create_bucket(Bucket="runs")
        yield "s3://runs"
    server.stop()


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


def test_selecting_reads_and_writes_object_storage(bucket, tmp_path, rng_losses):
    ids = [f"{i:04d}" for i in range(len(rng_losses))]
    table = pa.table({"example_id": ids, "losses": rng_losses.tolist(), "text": ids})
    Storage(f"{bucket}/data").write("trajectories.parquet", _parquet(table))
    (tmp_path / "trajectories.parquet").write_bytes(_parquet(table))
    config = ClusteringConfig(num_clusters=5), SelectionConfig(budget=40)
    there = select_trajectories(f"{bucket}/data/trajectories.parquet", f"{bucket}/out", *config)
    here = select_trajectories(str(tmp_path / "trajectories.parquet"), str(tmp_path / "out"), *config)
    assert there.read_bytes("selected.parquet") == here.read_bytes("selected.parquet")
    assert export_subset(f"{bucket}/out", "jsonl", f"{bucket}/export/subset.jsonl") == 40
    assert len(Storage(f"{bucket}/export").read("subset.jsonl").splitlines()) == 40
    assert "selection     finished    40 rows" in status_text(f"{bucket}/out")


@pytest.fixture
def rng_losses() -> np.ndarray:
    return np.random.default_rng(0).random((200, 4)).astype(np.float32)


def _parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


def test_a_bucket_that_is_not_there_is_one_clear_error(bucket):
    with pytest.raises((ConfigError, ArtifactError), match="no such run directory"):
        status_text("s3://not-there/run")


def test_an_upload_that_fails_half_way_publishes_nothing(bucket, monkeypatch):
    def broken(source, target, _size):
        target.write(source.read(6 * 2**20))
        raise OSError("the disk went away")

    monkeypatch.setattr("s2l_ray.artifacts.shutil.copyfileobj", broken)
    storage = Storage(f"{bucket}/half")
    with pytest.raises(OSError, match="went away"), storage.beside("part.parquet") as path:
        path.write_bytes(bytes(12 * 2**20))
    assert not storage.exists("part.parquet")


def test_a_subset_is_streamed_to_object_storage_whole(bucket):
    draft = Draft.open(Storage(f"{bucket}/stream"), Key("selection", 1, {}, {}))
    draft.write_tables("selected.parquet", (pa.table({"row": [part]}) for part in range(3)))
    table = draft.publish({"rows": 3}).read_table("selected.parquet")
    assert table["row"].to_pylist() == [0, 1, 2]
