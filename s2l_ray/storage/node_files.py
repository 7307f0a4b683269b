"""Files that the processes of one node share while a run goes on: Arrow record batches that all of them memory-map.

Whoever needs a file first writes it, on the node's own disk, and the others wait; its pages are in memory once, however many
processes look at them. Every batch carries the hash of its rows. It is a cache: what is missing or damaged is made again.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import itertools
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from s2l_ray.storage.places import Storage, cache
from s2l_ray.storage.records import content_digest, digest

_HASH = b"hash"
_FOLDERS = "run-"
# What a run left that never went on is removed by the next run that writes a file there.
ABANDONED_SECONDS = 7 * 24 * 3600.0


def sealed(batch: pa.RecordBatch) -> pa.RecordBatch:
    """A batch with a hash of its rows and its schema's metadata in that metadata."""
    return batch.replace_schema_metadata((batch.schema.metadata or {}) | {_HASH: _hash(batch)})


def is_whole(batch: pa.RecordBatch) -> bool:
    """Whether a sealed batch has the rows and the metadata that it had. False for one that is not sealed."""
    try:
        batch.validate(full=True)  # or its own offsets might lead out of its memory
    except pa.ArrowInvalid:
        return False
    return (batch.schema.metadata or {}).get(_HASH) == _hash(batch)


def _hash(batch: pa.RecordBatch) -> bytes:
    beside = {str(key): str(value) for key, value in (batch.schema.metadata or {}).items() if key != _HASH}
    return digest([content_digest(memoryview(batch.serialize())), beside]).encode()


@dataclass(frozen=True)
class NodeFiles:
    """The files of a run that hold one group of things, on whichever node it is asked. Cheap to send to a worker."""

    run: str
    group: str
    """Begins the files' names; a file of another group is left from what the run was before, and goes when one is written."""

    @classmethod
    def of(cls, scratch: Storage, group: str) -> NodeFiles:
        """Those of the run with this scratch directory: no two runs share a file, so that each can remove its own."""
        return cls(digest([scratch.uri]), group)

    @property
    def folder(self) -> Path:
        """Where they lie on this node."""
        return cache() / f"{_FOLDERS}{self.run}"

    def find(self, name: str) -> list[pa.RecordBatch] | None:
        """The batches of a file, memory-mapped, without a look at their hashes; None where there is no whole file."""
        path = self.folder / f"{self.group}-{name}"
        try:
            state = path.stat()
            return _mapped(str(path), state.st_ino, state.st_size, state.st_mtime_ns)
        except (OSError, pa.ArrowException):
            return None

    def get(self, name: str, make: Callable[[], Iterable[pa.RecordBatch]], *, check: bool = False) -> list[pa.RecordBatch]:
        """The batches of a file, memory-mapped; where the node has no whole one it is made of the sealed batches of `make`,
        which have one schema but for its metadata.

        `check`: read it all and compare the hashes, as the first of a node's workers does. Raises StorageError where the disk
        is full, and what `make` raises.
        """
        place = Storage(str(self.folder))
        with place.explained(), _locked(self.folder):
            os.utime(self.folder)
            found = self.find(name)
            if found is None or (check and not all(map(is_whole, found))):
                self._write(name, make())
                found = self.find(name)
        assert found is not None, "it has just been written"
        return found

    def _write(self, name: str, batches: Iterable[pa.RecordBatch]) -> None:
        for path in self.folder.iterdir():  # of another group, or half of one that a killed process was writing
            if not path.name.startswith(f"{self.group}-") or path.suffix == ".tmp":
                path.unlink()
        for folder in cache().glob(f"{_FOLDERS}*"):
            if time.time() - folder.stat().st_mtime > ABANDONED_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)
        target = self.folder / f"{self.group}-{name}"
        partial = target.with_name(f"{target.name}.tmp")
        rest = iter(batches)
        first = list(itertools.islice(rest, 1))
        schema = first[0].schema.remove_metadata() if first else pa.schema([])
        try:
            with pa.OSFile(str(partial), "wb") as file, pa.ipc.new_file(file, schema) as writer:
                for batch in itertools.chain(first, rest):
                    writer.write_batch(batch.replace_schema_metadata(None), custom_metadata=batch.schema.metadata)
            with partial.open("rb") as written:
                os.fsync(written.fileno())
            partial.rename(target)
        finally:
            partial.unlink(missing_ok=True)

    def delete(self) -> None:
        """Remove this node's files of the run, of any group. Whoever has mapped one still sees it."""
        _mapped.cache_clear()  # or the disk would keep them until this process ends
        shutil.rmtree(self.folder, ignore_errors=True)


@functools.lru_cache(maxsize=4)
def _mapped(path: str, _inode: int, _size: int, _changed: int) -> list[pa.RecordBatch]:
    """The batches of a file, each with its own metadata: their buffers are the file's pages. Opened once for a process."""
    reader = pa.ipc.open_file(pa.memory_map(path))
    found = [reader.get_batch_with_custom_metadata(number) for number in range(reader.num_record_batches)]
    return [batch.replace_schema_metadata(dict(metadata or {})) for batch, metadata in found]


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """The folder, made where it is missing, for this process alone. The system gives it back when the process ends."""
    while True:
        folder.mkdir(exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            try:
                is_there = os.fstat(handle).st_ino == folder.stat().st_ino
            except FileNotFoundError:  # the run's end has removed it meanwhile
                is_there = False
            if is_there:
                yield
                return
        finally:
            os.close(handle)
