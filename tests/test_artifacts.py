"""Artifacts: finished or not, whole or not at all, never another recipe's."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import pyarrow as pa
import pytest

from s2l_ray.errors import ArtifactError, ConfigError, StorageError
from s2l_ray.storage.artifacts import Artifact, Key, adopt
from s2l_ray.storage.drafts import Draft
from s2l_ray.storage.layout import BUILDING, MANIFEST
from s2l_ray.storage.places import Storage, cache
from s2l_ray.storage.provenance import provenance
from s2l_ray.storage.records import digest


def key(stage: str = "examples", inputs: dict[str, str] | None = None, **recipe: object) -> Key:
    return Key(stage, 1, recipe, inputs or {})


def build(run: Storage, made: Key, rows: int = 3) -> Artifact:
    draft = Draft.open(run, made)
    draft.write_table("part-00000.parquet", pa.table({"example_id": [f"{i}" for i in range(rows)]}))
    return draft.publish({"rows": rows})


def test_a_directory_is_finished_only_with_its_manifest(tmp_path):
    run = Storage(str(tmp_path))
    draft = Draft.open(run, key(size=1))
    draft.write("a.txt", b"a")
    assert Artifact.find(run.child("examples")) is None
    with pytest.raises(ArtifactError, match="unfinished"):
        Artifact.read(run.child("examples"))
    draft.publish({})
    assert Artifact.read(run.child("examples")).read_bytes("a.txt") == b"a"
    assert not (tmp_path / "examples" / BUILDING).exists()


def test_the_manifest_has_what_the_contract_says(tmp_path):
    artifact = build(Storage(str(tmp_path)), key(size=1))
    manifest = json.loads((tmp_path / "examples" / MANIFEST).read_text())
    assert list(manifest) == ["schema", "stage", "fingerprint", "recipe", "inputs", "files", "summary", "provenance"]
    assert manifest["schema"] == "s2l_ray/1"
    assert manifest["fingerprint"] == artifact.fingerprint
    assert set(manifest["files"]["part-00000.parquet"]) == {"bytes", "sha256"}
    assert manifest["summary"] == {"rows": 3, "dropped": {}}
    assert set(manifest["provenance"]) == {"created", "seconds", "git", "versions", "machines"}
    assert "torch" in provenance()["versions"]


def test_an_unfinished_directory_is_continued_for_the_same_recipe(tmp_path):
    run = Storage(str(tmp_path))
    Draft.open(run, key(size=1)).write("part-00000.parquet", b"kept")
    again = Draft.open(run, key(size=1))
    assert again.has("part-00000.parquet")
    assert not again.has("part-00001.parquet")
    assert again.publish({}).read_bytes("part-00000.parquet") == b"kept"


def test_an_unfinished_directory_of_another_recipe_is_refused_with_the_changed_fields(tmp_path):
    run = Storage(str(tmp_path))
    Draft.open(run, key("clustering", num_clusters=100, seed=0))
    with pytest.raises(ArtifactError, match=r"clustering\.num_clusters: 100 -> 50"):
        Draft.open(run, key("clustering", num_clusters=50, seed=0))


def test_what_was_begun_from_other_inputs_is_thrown_away(tmp_path):
    run = Storage(str(tmp_path))
    draft = Draft.open(run, key("trajectories", {"proxy": "old"}, precision="float32"))
    draft.write("part-00000.parquet", b"old")
    draft.work.write("unit", b"old")
    again = Draft.open(run, key("trajectories", {"proxy": "new"}, precision="float32"))
    assert not again.has("part-00000.parquet")
    assert not again.work.exists("unit")


def test_a_fingerprint_follows_the_recipe_and_the_inputs_and_not_the_order_of_keys():
    assert key(a=1, b=2).fingerprint == key(b=2, a=1).fingerprint
    assert key(a=1).fingerprint != key(a=2).fingerprint
    assert key(inputs={"proxy": "x"}).fingerprint != key(inputs={"proxy": "y"}).fingerprint
    assert Key("a", 1, {}, {}).fingerprint != Key("a", 2, {}, {}).fingerprint
    assert len(digest({})) == 16


def test_a_trained_stage_is_identified_by_its_files(tmp_path):
    first = build(Storage(str(tmp_path / "a")), key("proxy", seed=1), rows=3)
    second = build(Storage(str(tmp_path / "b")), key("proxy", seed=1), rows=4)
    assert first.fingerprint == second.fingerprint
    assert first.identity != second.identity


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_a_damaged_part_is_named_with_what_to_rebuild(tmp_path, damage):
    artifact = build(Storage(str(tmp_path)), key(size=1))
    path = tmp_path / "examples" / "part-00000.parquet"
    data = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    else:
        data[40] ^= 255
        path.write_bytes(data[:-10] if damage == "truncate" else data)
    with pytest.raises(ArtifactError, match=r"part-00000\.parquet: (damaged|missing).*Remove .*examples"):
        artifact.read_bytes("part-00000.parquet")
    if damage != "flip":  # reuse looks at sizes, reading at hashes
        with pytest.raises(ArtifactError, match=r"part-00000\.parquet: damaged"):
            artifact.check_sizes()


def test_a_stage_of_another_run_is_taken_by_reference(tmp_path):
    other = build(Storage(str(tmp_path / "a")), key(size=1))
    adopted = adopt(Storage(str(tmp_path / "b")), other)
    found = Artifact.read(Storage(str(tmp_path / "b")).child("examples"))
    assert os.listdir(tmp_path / "b" / "examples") == [MANIFEST]
    assert found.read_table("part-00000.parquet").num_rows == 3
    assert found.identity == adopted.identity == other.identity
    again = adopt(Storage(str(tmp_path / "c")), found)
    assert again.root.uri == str(tmp_path / "a" / "examples")


def test_a_write_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    storage = Storage(str(tmp_path))
    storage.write("file", b"old")

    def no_space(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(StorageError, match=f"{storage.uri}/file on .*: the disk is full"):
        storage.write("file", b"new")
    assert os.listdir(tmp_path) == ["file"]
    assert storage.read("file") == b"old"


def test_a_manifest_that_is_not_ours_is_refused(tmp_path):
    (tmp_path / MANIFEST).write_text("{}")
    with pytest.raises(ArtifactError, match="not a manifest of schema"):
        Artifact.find(Storage(str(tmp_path)))
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(ArtifactError, match="not JSON"):
        Artifact.find(Storage(str(tmp_path)))


@pytest.mark.skipif(os.getuid() != 0, reason="only root may give a file to another user")
def test_a_cache_that_another_user_has_put_there_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert cache().is_dir()
    cache().rename(tmp_path / "mine")
    link = tmp_path / f"s2l_ray-{os.getuid()}"
    link.symlink_to(tmp_path / "mine")
    assert cache() == link  # to a larger disk, say
    os.lchown(link, 12345, 12345)
    with pytest.raises(StorageError, match=r"belongs to another user\. Set TMPDIR"):
        cache()


def test_an_unknown_kind_of_uri_is_refused():
    with pytest.raises(ConfigError, match="ftp://"):
        Storage("ftp://host/dir").exists()


@pytest.mark.parametrize("uri", ["s3://", "gs:///"])
def test_object_storage_without_a_bucket_is_refused(uri):
    with pytest.raises(ConfigError, match="names no bucket"):
        Storage(uri)


def test_a_folder_is_checked_file_by_file(tmp_path):
    run = Storage(str(tmp_path))
    draft = Draft.open(run, key("proxy", seed=1))
    source = tmp_path / "model"
    source.mkdir()
    (source / "config.json").write_text("{}")
    draft.add(*draft.storage.upload(source, "step-000001"))
    artifact = draft.publish({})
    assert (artifact.folder("step-000001") / "config.json").read_text() == "{}"
    Path(artifact.storage.path("step-000001/config.json")).write_text("[]")
    with pytest.raises(ArtifactError, match=r"step-000001/config\.json: damaged"):
        artifact.folder("step-000001")


def test_what_a_killed_attempt_was_writing_is_removed_when_the_stage_goes_on(tmp_path):
    draft = Draft.open(Storage(str(tmp_path)), key(size=1))
    draft.write("part-00000.parquet", b"kept")
    (tmp_path / "examples" / "part-00001.parquet.1a2b3c4d.tmp").write_bytes(b"half")
    (tmp_path / "examples" / "notes.tmp").write_bytes(b"the user's")
    assert Draft.open(Storage(str(tmp_path)), key(size=1)).has("part-00000.parquet")
    assert [path.name for path in (tmp_path / "examples").glob("*.tmp")] == ["notes.tmp"]
