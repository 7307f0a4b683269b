"""A stage's directory while it is being built, and how it becomes an artifact: file by file, the manifest last."""

from __future__ import annotations

import datetime
import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from s2l_ray.errors import ArtifactError
from s2l_ray.storage.artifacts import Artifact, Key, refusal
from s2l_ray.storage.layout import BUILDING, MANIFEST, SCHEMA, is_unrenamed
from s2l_ray.storage.ownership import check_stage, clear_stage, is_linked, read_building, scratch_of, write_building
from s2l_ray.storage.places import Storage
from s2l_ray.storage.provenance import provenance
from s2l_ray.storage.records import FileRecord

_PARQUET, _ROW_GROUP = {"compression": "zstd"}, 65_536


@dataclass
class Draft:
    """A stage's directory while it is being built. Opening it continues what an interrupted run of the same key left."""

    storage: Storage
    key: Key
    work: Storage
    """Scratch directory of this stage (unmerged units, optimizer states): never read as a result."""

    still_held: Callable[[], None] = lambda: None
    """Raises ArtifactError where another run has taken the directory over."""

    files: dict[str, FileRecord] = field(default_factory=dict)
    created: datetime.datetime = field(default_factory=lambda: datetime.datetime.now(datetime.UTC))

    @classmethod
    def open(cls, run: Storage, key: Key, still_held: Callable[[], None] = lambda: None) -> Draft:
        """Start or continue a stage.

        What an interrupted run had begun from other inputs (an earlier stage was rebuilt since) is removed: nothing of it can
        be used. Raises ArtifactError, and changes nothing, where the directory belongs to another recipe, is finished, or has
        files that this program did not write.
        """
        storage = run.child(key.stage)
        check_stage(storage, key.stage)
        if Artifact.find(storage) is not None:
            raise ArtifactError(f"{storage.uri}: finished; a finished stage is never written again. Give another directory.")
        building = read_building(storage)
        if building is not None and building.get("recipe") != key.recipe:
            raise ArtifactError(refusal(storage, key, building, "Give another directory"))
        work = scratch_of(run).child(key.stage)
        if building is None or building.get("fingerprint") != key.fingerprint:
            clear_stage(storage, key.stage)
            work.delete()
            write_building(storage, key)
        for name in storage.names(recursive=True):
            if is_unrenamed(key.stage, name) and not is_linked(storage, name):  # a killed attempt was writing it
                storage.delete(name)
        return cls(storage, key, work, still_held)

    @property
    def shared(self) -> Storage:
        """Scratch directory of the whole run, for what several stages use."""
        return Storage(self.work.uri.rpartition("/")[0])

    def has(self, path: str) -> bool:
        """Whether an earlier attempt has finished this file; it then belongs to the artifact."""
        if path not in self.files and self.storage.exists(path):
            self.files[path] = FileRecord.of(path, self.storage.read(path))
        return path in self.files

    def add(self, *records: FileRecord) -> None:
        """Take files that workers wrote into the manifest."""
        self.files |= {record.path: record for record in records}

    def write(self, path: str, data: bytes) -> None:
        """Write a file, whole or not at all, and take it into the manifest."""
        self.storage.write(path, data)
        self.add(FileRecord.of(path, data))

    def write_table(self, path: str, table: pa.Table) -> None:
        """Write a table as Parquet, whole or not at all, and take it into the manifest."""
        self.write(path, table_bytes(table))

    def write_tables(self, path: str, tables: Iterable[pa.Table]) -> None:
        """Write tables of one schema, of which there is one at least, as one Parquet file, whole or not at all."""
        with self.storage.atomic_path(path) as local:
            writer: pq.ParquetWriter | None = None
            try:
                for table in tables:
                    writer = writer or pq.ParquetWriter(str(local), table.schema, **_PARQUET)
                    writer.write_table(table, row_group_size=_ROW_GROUP)
            finally:
                if writer is not None:
                    writer.close()
            self.add(FileRecord.of_file(path, local))

    def write_pieces(self, path: str, pieces: Iterable[bytes]) -> None:
        """Write bytes as they come, as one file, whole or not at all."""
        with self.storage.atomic_path(path) as local:
            with local.open("wb") as file:
                file.writelines(pieces)
            self.add(FileRecord.of_file(path, local))

    def publish(self, summary: dict[str, Any], machines: dict[str, Any] | None = None) -> Artifact:
        """Write the manifest: from here on the stage is finished. Its scratch directory goes away.

        Raises ArtifactError, and writes nothing, where the run no longer holds the directory.
        """
        self.still_held()
        seconds = (datetime.datetime.now(datetime.UTC) - self.created).total_seconds()
        manifest = {
            "schema": SCHEMA,
            "stage": self.key.stage,
            "fingerprint": self.key.fingerprint,
            "recipe": self.key.recipe,
            "inputs": self.key.inputs,
            "files": {
                r.path: {"bytes": r.num_bytes, "sha256": r.sha256} for r in sorted(self.files.values(), key=lambda r: r.path)
            },
            "summary": {"rows": 0, "dropped": {}} | summary,
            "provenance": provenance() | {"seconds": round(seconds, 2), "machines": machines or {}},
        }
        self.storage.write_json(MANIFEST, manifest)
        self.storage.delete(BUILDING)
        self.work.delete()
        return Artifact(self.storage, manifest)


def table_bytes(table: pa.Table, repeating: list[str] | None = None) -> bytes:
    """A table as a Parquet file, the same bytes for the same table and library version.

    `repeating`: the columns whose values come again and again, where that is known of all. To look for repetitions in
    ids and distances takes more than half of the time of writing them.
    """
    sink = io.BytesIO()
    dictionary = True if repeating is None else repeating
    pq.write_table(table, sink, row_group_size=_ROW_GROUP, use_dictionary=dictionary, **_PARQUET)
    return sink.getvalue()
