"""Places that are read and written alike: a directory on a disk or in object storage, named by its path or URI.

A file appears whole or not at all, on both.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs

from s2l_ray.errors import ArtifactError, ConfigError, StorageError, has_credentials, storage_problem
from s2l_ray.storage.records import FileRecord, digest

_COPY_BYTES = 16 * 2**20


@functools.lru_cache(maxsize=64)
def _filesystem(uri: str) -> tuple[fs.FileSystem, str]:
    """The filesystem behind a path or URI, and the path on it."""
    if "://" not in uri:
        return fs.LocalFileSystem(), os.path.abspath(uri)
    try:
        return fs.FileSystem.from_uri(uri)  # type: ignore[no-any-return]
    except (pa.ArrowInvalid, OSError, ValueError) as error:
        problem = storage_problem(error, uri)
        if problem is not None:
            raise StorageError(problem) from error
        raise ConfigError(f"{uri}: not a place that can be opened ({error}). Give a local path, s3:// or gs://.") from error


@functools.lru_cache(maxsize=64)
def _check_bucket(uri: str) -> None:
    """Raises StorageError where a bucket does not exist: what lies in it looks only missing. Asked once a process."""
    filesystem, bucket = _filesystem(uri)
    # One may be allowed to use a bucket and not to ask about it; such an answer proves nothing.
    with contextlib.suppress(OSError):
        if filesystem.get_file_info(bucket).type == fs.FileType.NotFound:
            raise StorageError(str(storage_problem(OSError(f"Bucket '{bucket}' not found"), uri)))


@dataclass(frozen=True)
class Storage:
    """A directory, local or in object storage, named by its path or URI. Cheap to copy and to send to a worker."""

    uri: str

    def __post_init__(self) -> None:
        if has_credentials(self.uri):
            kind = self.uri.partition("://")[0]
            raise ConfigError(f"{kind}://...: credentials in a URI would end up in logs. Put them into the environment.")
        scheme, separator, rest = self.uri.partition("://")
        if separator and not rest.strip("/"):
            raise ConfigError(f"{self.uri}: names no bucket. Give {scheme}://bucket/folder.")
        # A worker has another working directory than the command: a relative path is made absolute where it is given.
        object.__setattr__(self, "uri", absolute_uri(self.uri))

    @property
    def is_local(self) -> bool:
        """Whether the directory is on a filesystem with paths (a local or shared one)."""
        return "://" not in self.uri or self.uri.startswith("file://")

    @property
    def filesystem(self) -> fs.FileSystem:
        """The filesystem that the directory is on. Raises ConfigError for an unknown kind of URI."""
        return _filesystem(self.uri)[0]

    def path(self, name: str = "") -> str:
        """The path of a file in this directory, as `filesystem` wants it."""
        base = _filesystem(self.uri)[1].rstrip("/")
        return f"{base}/{name}" if name else base

    def child(self, name: str) -> Storage:
        """A directory inside this one."""
        return Storage(f"{self.uri.rstrip('/')}/{name}")

    @contextlib.contextmanager
    def explained(self, name: str = "") -> Iterator[None]:
        """Turns errors of a disk or of object storage that the user can fix into a StorageError; other errors stay.

        FileNotFoundError stays, too, unless the bucket is missing. The stores' libraries have already retried transient errors.
        """
        try:
            yield
        except OSError as error:
            if isinstance(error, FileNotFoundError):
                self._require_bucket()
            is_elsewhere = not self.is_local and error.errno == errno.ENOSPC  # on the way there
            place = tempfile.gettempdir() if is_elsewhere else f"{self.uri}/{name}".rstrip("/")
            problem = storage_problem(self._with_reason(error), place)
            if problem is None:
                raise
            raise StorageError(problem) from error

    def _with_reason(self, error: OSError) -> OSError:
        """The error with the store's reason: S3 answers a request for one file's state (HEAD) with a status code alone."""
        if "No response body" in str(error) and "status 5" not in str(error):
            try:
                self.filesystem.get_file_info(fs.FileSelector(self.path(), allow_not_found=True))
            except OSError as with_reason:
                return with_reason
        return error

    def _require_bucket(self) -> None:
        """Raises StorageError where the directory is in a bucket that does not exist."""
        if not self.is_local:
            scheme, _, path = self.uri.partition("://")
            _check_bucket(f"{scheme}://{path.partition('/')[0]}")

    def info(self, name: str = "") -> fs.FileInfo:
        """Type, size and time of a file or directory; of type NotFound if it is not there."""
        with self.explained(name):
            info = self.filesystem.get_file_info(self.path(name))
        if info.type == fs.FileType.NotFound:
            self._require_bucket()
        return info

    def infos(self, directory: str = "", recursive: bool = False) -> dict[str, fs.FileInfo]:
        """The files below a directory by their names relative to it, sorted; empty if there is no directory."""
        selector = fs.FileSelector(self.path(directory), recursive=recursive, allow_not_found=True)
        prefix = len(self.path(directory)) + 1
        with self.explained(directory):
            found = self.filesystem.get_file_info(selector)
        if not found:
            self._require_bucket()
        return {i.path[prefix:]: i for i in sorted(found, key=lambda i: i.path) if i.type == fs.FileType.File}

    def size(self, name: str) -> int | None:
        """Bytes of a file, None if there is no such file."""
        info = self.info(name)
        return info.size if info.type == fs.FileType.File else None

    def exists(self, name: str = "") -> bool:
        """Whether there is such a file or directory."""
        return bool(self.info(name).type != fs.FileType.NotFound)

    def names(self, directory: str = "", recursive: bool = False) -> list[str]:
        """Names of the files below a directory, relative to it, sorted; empty if there is no directory."""
        return sorted(self.infos(directory, recursive))

    def open(self, name: str = "") -> pa.NativeFile:
        """A file, to be read at any place. Raises FileNotFoundError; reading from it needs `explained` again."""
        with self.explained(name):
            return self.filesystem.open_input_file(self.path(name))

    def read(self, name: str) -> bytes:
        """All bytes of a file. Raises FileNotFoundError."""
        with self.explained(name), self.filesystem.open_input_stream(self.path(name), compression=None) as stream:
            return bytes(stream.read())

    def write(self, name: str, data: bytes) -> None:
        """Write a file that appears whole or not at all.

        Locally: written to another name, flushed to disk, renamed. On object storage the bytes are complete before the upload
        starts, since pyarrow publishes a truncated object when a writer raises half-way (apache/arrow#40502).
        """
        if not self.is_local:
            with self.explained(name), self.filesystem.open_output_stream(self.path(name)) as stream:
                stream.write(data)
            return
        with self.atomic_path(name) as path:
            path.write_bytes(data)

    @contextlib.contextmanager
    def atomic_path(self, name: str, *, is_scratch: bool = False) -> Iterator[Path]:
        """A local path to write to; at the end of the block what is there becomes the file, whole or not at all.

        What is scratch need not outlive the machine: it is not flushed to the disk.
        """
        with self.explained(name), self._unexplained_path(name, is_scratch) as path:
            yield path

    @contextlib.contextmanager
    def _unexplained_path(self, name: str, is_scratch: bool) -> Iterator[Path]:
        if self.is_local:
            target = Path(self.path(name))
            target.parent.mkdir(parents=True, exist_ok=True)
            path = target.with_name(f"{target.name}.{uuid.uuid4().hex[:8]}.tmp")
        else:
            handle, made = tempfile.mkstemp(prefix="s2l_ray-")  # readable by this user alone
            os.close(handle)
            path = Path(made)
        try:
            yield path
            if self.is_local:
                if not is_scratch:
                    with path.open("rb") as file:
                        os.fsync(file.fileno())
                path.replace(target)
            else:
                self._upload_file(path, name)
        finally:
            with contextlib.suppress(OSError):  # it must not hide what was wrong with the place
                path.unlink(missing_ok=True)

    def _upload_file(self, path: Path, name: str) -> None:
        """Copy a local file to object storage; what an error cut short is removed: closing the stream publishes it."""
        try:
            with path.open("rb") as file, self.filesystem.open_output_stream(self.path(name)) as stream:
                shutil.copyfileobj(file, stream, _COPY_BYTES)
        except BaseException:
            with contextlib.suppress(OSError):
                self.filesystem.delete_file(self.path(name))
            raise

    def read_json(self, name: str) -> Any:
        """A JSON file's value, None if there is no such file. Raises ArtifactError if it is damaged."""
        try:
            return json.loads(self.read(name))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise ArtifactError(
                f"{self.uri}/{name}: damaged (not JSON: {error}). If a run wrote {self.uri}, remove it to build it again; else "
                "give another directory."
            ) from error

    def write_json(self, name: str, value: Any) -> None:
        """Write a value as readable JSON, whole or not at all."""
        self.write(name, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())

    def upload(self, folder: str | Path, name: str) -> list[FileRecord]:
        """Copy the files of a local folder into the directory `name`; their records, relative to this directory."""
        records = []
        for path in sorted(p for p in Path(folder).rglob("*") if p.is_file()):
            target = f"{name}/{path.relative_to(folder).as_posix()}"
            with self.atomic_path(target) as copy:
                shutil.copyfile(path, copy)
            records.append(FileRecord.of_file(target, path))
        return records

    def local_folder(self, name: str) -> Path:
        """A local path of a directory; one in object storage is downloaded once per machine, and again after a change."""
        if self.is_local:
            return Path(self.path(name))
        state = [[info.path, info.size, str(info.mtime)] for info in self.infos(name, recursive=True).values()]
        with self.explained(name):
            target = cache() / digest([self.uri, name, state])
            with target.with_suffix(".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # other processes of this machine wait for the download
                if not target.exists():
                    partial = target.with_suffix(".tmp")
                    shutil.rmtree(partial, ignore_errors=True)  # one that was killed left it
                    partial.mkdir()
                    fs.copy_files(self.path(name), str(partial), source_filesystem=self.filesystem)
                    partial.rename(target)
        return target

    def delete(self, name: str = "") -> None:
        """Remove a file, or a directory with all that is in it, if it is there."""
        kind = self.info(name).type
        with self.explained(name):
            if kind == fs.FileType.File:
                self.filesystem.delete_file(self.path(name))
            elif kind == fs.FileType.Directory:
                self.filesystem.delete_dir(self.path(name))


def cache() -> Path:
    """This user's folder on this machine, for models fetched or being trained. Raises StorageError if it is another's."""
    folder = Path(tempfile.gettempdir()) / f"s2l_ray-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    # Anyone may write there, a link to a folder of ours too, and models are read from it.
    if {folder.stat().st_uid, folder.lstat().st_uid} != {os.getuid()}:
        raise StorageError(f"{folder}: belongs to another user. Set TMPDIR to a directory of your own.")
    return folder


def absolute_uri(uri: str) -> str:
    """A path made absolute; a URI as it is."""
    return uri if "://" in uri else os.path.abspath(uri)
