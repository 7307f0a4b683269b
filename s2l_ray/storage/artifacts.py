"""Stages meet through artifacts: a directory with a manifest of what it holds and what it was made from.

A directory is *finished* when it has `manifest.json`, written last and atomically; until then it is a *draft* whose
`building.json` names the recipe it is being built for, so that only parts of the same recipe are ever continued. A
finished directory is never written again. Everything works on local paths and on object storage: a file appears whole
or not at all.

Terms: a *fingerprint* identifies the result that a stage would have (its recipe and its inputs); an *identity* is what
enters the fingerprints of later stages: the fingerprint, or for a trained stage the hash of its files, since training on
another number of workers gives other weights.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from s2l_ray.errors import ArtifactError
from s2l_ray.storage.layout import BUILDING, MANIFEST, PARTS, SCHEMA
from s2l_ray.storage.places import Storage
from s2l_ray.storage.records import FileRecord, digest

# Stages whose bytes depend on more than their recipe: they enter later fingerprints by their files.
TRAINED_STAGES = frozenset({"proxy", "trajectories", "target"})


@dataclass(frozen=True)
class Key:
    """What a stage's result depends on: its recipe, its schema number, its inputs' identities."""

    stage: str
    schema: int
    recipe: dict[str, Any]
    inputs: dict[str, str]

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits, the same for the same result."""
        return digest([self.stage, self.schema, self.recipe, self.inputs])

    def differences(self, other: dict[str, Any]) -> list[str]:
        """Fields in which a manifest (or building.json) was made for another key: `stage.field: old -> new`."""
        old, new = _flat(other.get("recipe", {}), self.stage), _flat(self.recipe, self.stage)
        lines = [f"{k}: {old.get(k)!r} -> {new.get(k)!r}" for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)]
        inputs = other.get("inputs", {})
        return lines + [
            f"{self.stage} was built from other {name}" for name in self.inputs if inputs.get(name) != self.inputs[name]
        ]


def _flat(value: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Nested mappings as one mapping of dotted keys."""
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        if isinstance(inner, dict) and inner:
            flat |= _flat(inner, f"{prefix}.{key}")
        else:
            flat[f"{prefix}.{key}"] = inner
    return flat


@dataclass(frozen=True)
class Artifact:
    """A finished stage directory; `root` is where its files are, another run's where it is taken by reference."""

    storage: Storage
    manifest: dict[str, Any]

    @classmethod
    def find(cls, storage: Storage) -> Artifact | None:
        """The finished artifact in a directory, None if there is no manifest."""
        manifest = storage.read_json(MANIFEST)
        if manifest is None:
            return None
        if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA or "files" not in manifest:
            raise ArtifactError(
                f"{storage.uri}/{MANIFEST}: not a manifest of schema {SCHEMA}. If a run wrote {storage.uri}, remove it to "
                "build it again; else give another directory."
            )
        return cls(storage, manifest)

    @classmethod
    def read(cls, storage: Storage) -> Artifact:
        """The finished artifact in a directory. Raises ArtifactError where there is none."""
        artifact = cls.find(storage)
        if artifact is None:
            state = "unfinished" if storage.exists(BUILDING) else "missing"
            raise ArtifactError(f"{storage.uri}: {state}. Run `s2l run` to build it.")
        return artifact

    @property
    def root(self) -> Storage:
        """The directory that holds the files."""
        return Storage(self.manifest.get("reference") or self.storage.uri)

    @property
    def stage(self) -> str:
        """Its word of the flow."""
        return str(self.manifest["stage"])

    @property
    def fingerprint(self) -> str:
        """Identifies what it was built for: recipe and inputs."""
        return str(self.manifest["fingerprint"])

    @property
    def summary(self) -> dict[str, Any]:
        """Its counts and the stage's own numbers."""
        return dict(self.manifest["summary"])

    @property
    def identity(self) -> str:
        """What stands for it in the fingerprints of the stages built from it."""
        if self.stage not in TRAINED_STAGES:
            return self.fingerprint
        return digest({path: record["sha256"] for path, record in self.manifest["files"].items()})

    @property
    def counts(self) -> str:
        """Its counts in a few words: rows kept, rows dropped and why."""
        summary = self.summary
        dropped = ", ".join(f"{count:,} {reason}" for reason, count in sorted(summary["dropped"].items())) or "none"
        return f"{summary['rows']:,} rows, dropped: {dropped}"

    def parts(self, prefix: str = PARTS) -> list[str]:
        """The Parquet files whose name starts with `prefix`, in order."""
        return sorted(path for path in self.manifest["files"] if path.startswith(prefix) and path.endswith(".parquet"))

    def check_sizes(self) -> None:
        """Raise ArtifactError if a file is missing or has another size."""
        with self.root.explained():
            infos = self.root.filesystem.get_file_info([self.root.path(path) for path in self.manifest["files"]])
        for (path, record), info in zip(self.manifest["files"].items(), infos, strict=True):
            found = info.size if info.type == fs.FileType.File else None
            if found != record["bytes"]:
                state = "missing" if found is None else f"{found} bytes instead of {record['bytes']}"
                raise ArtifactError(f"{self.root.uri}/{path}: damaged ({state}). {self._remedy}")

    def read_bytes(self, path: str) -> bytes:
        """A file's bytes, checked against its hash. Raises ArtifactError naming a damaged file."""
        record = self.manifest["files"].get(path)
        if record is None:
            raise ArtifactError(f"{self.root.uri}/{path}: not in the manifest. {self._remedy}")
        try:
            data = self.root.read(path)
        except FileNotFoundError as error:
            raise ArtifactError(f"{self.root.uri}/{path}: missing. {self._remedy}") from error
        if FileRecord.of(path, data) != FileRecord(path, record["bytes"], record["sha256"]):
            raise ArtifactError(f"{self.root.uri}/{path}: damaged (its hash is not the manifest's). {self._remedy}")
        return data

    def read_table(self, path: str, columns: list[str] | None = None) -> pa.Table:
        """A Parquet file as a table, checked against its hash."""
        return pq.read_table(io.BytesIO(self.read_bytes(path)), columns=columns)

    def folder(self, name: str) -> Path:
        """A local path of a directory of this artifact (a model, a tokenizer), its files checked against their hashes."""
        local = self.root.local_folder(name)
        for path, record in self.manifest["files"].items():
            if path.startswith(f"{name}/"):
                file = local / path.removeprefix(f"{name}/")
                if not file.is_file() or FileRecord.of_file(path, file).sha256 != record["sha256"]:
                    raise ArtifactError(f"{self.root.uri}/{path}: damaged or missing. {self._remedy}")
        return local

    @property
    def _remedy(self) -> str:
        return f"Remove {self.storage.uri} and the stages after it, and run again to rebuild them."


def adopt(run: Storage, other: Artifact) -> Artifact:
    """Take a finished stage of another run by reference: only the manifest is copied, with the place of the files in it."""
    manifest = other.manifest | {"reference": other.root.uri}
    artifact = replace(other, storage=run.child(other.stage), manifest=manifest)
    artifact.storage.write_json(MANIFEST, manifest)
    return artifact


def refusal(storage: Storage, key: Key, found: dict[str, Any], remedy: str) -> str:
    """Why a directory cannot be used for this key: the changed fields, and what to do instead."""
    changes = "\n  ".join(key.differences(found)) or "made by another version of this program"
    place = storage.uri
    return f"{place} belongs to another recipe:\n  {changes}\n{remedy}, or remove {place} and what was built from it."
