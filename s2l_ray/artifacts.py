"""Stages meet through artifacts: a directory with a manifest that says what it holds and from what it was made.

A directory is *finished* when it has `manifest.json`, written last and atomically; until then it is a *draft* whose
`building.json` names the recipe it is being built for, so that only parts of the same recipe are ever continued. A
finished directory is never written again. Everything works on local paths and on object storage: a file appears whole
or not at all.

Terms: a *fingerprint* identifies the result that a stage would have (its recipe and its inputs); an *identity* is what
later stages count as their input: the fingerprint, or for trained things the hash of the files, since training on
another number of workers gives other weights.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import functools
import hashlib
import io
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from s2l_ray.errors import ArtifactError, ConfigError, StorageError, has_credentials, storage_problem

SCHEMA = "s2l_ray/1"
MANIFEST = "manifest.json"
BUILDING = "building.json"
WORK = ".work"
# Below it what several stages use: tokens, and losses that are not joined yet.
TOKENS, LOSSES = "tokens", "losses"
_PARQUET, _ROW_GROUP = {"compression": "zstd"}, 65_536
_COPY_BYTES = 16 * 2**20
# Stages whose bytes depend on more than their recipe: later stages count the files and not the fingerprint.
TRAINED_STAGES = frozenset({"proxy", "trajectories", "target"})
# Libraries that decide a result or its bytes.
RECORDED_LIBRARIES = ("ray", "torch", "transformers", "deepspeed", "faiss-cpu", "faiss-gpu", "numpy", "pyarrow")


def digest(value: Any, num_bytes: int = 8) -> str:
    """Hash of a JSON value, the same for the same value whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.blake2b(text.encode(), digest_size=num_bytes).hexdigest()


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
    # Who may use a bucket need not be allowed to ask for it; what it then answers says nothing.
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
        # A worker has another working directory than the command: a relative path is made absolute where it is given.
        object.__setattr__(self, "uri", absolute_uri(self.uri))

    @property
    def is_local(self) -> bool:
        """Whether the directory is on a filesystem with paths (a local or shared one)."""
        return "://" not in self.uri or self.uri.startswith("file://")

    @property
    def filesystem(self) -> fs.FileSystem:
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
        """Turns what the user can mend of a disk or of object storage into a StorageError; other errors stay.

        FileNotFoundError stays too, unless there is not even the bucket. What is transient the stores' libraries have tried
        again before.
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
        """The store's reason for an error: S3 answers a question for one file (HEAD) with a number alone."""
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
        """A file, to be read at any place. Raises FileNotFoundError; what reading it raises needs `explained` again."""
        with self.explained(name):
            return self.filesystem.open_input_file(self.path(name))

    def read(self, name: str) -> bytes:
        """All bytes of a file. Raises FileNotFoundError."""
        with self.explained(name), self.filesystem.open_input_stream(self.path(name), compression=None) as stream:
            return bytes(stream.read())

    def write(self, name: str, data: bytes) -> None:
        """Write a file that appears whole or not at all.

        Locally: written beside, flushed to disk, renamed. On object storage the bytes are complete before the upload
        starts, since pyarrow publishes a truncated object when a writer raises half-way (apache/arrow#40502).
        """
        if not self.is_local:
            with self.explained(name), self.filesystem.open_output_stream(self.path(name)) as stream:
                stream.write(data)
            return
        with self.beside(name) as path:
            path.write_bytes(data)

    @contextlib.contextmanager
    def beside(self, name: str) -> Iterator[Path]:
        """A local path to write to; at the end of the block what is there becomes the file, whole or not at all."""
        with self.explained(name), self._beside(name) as path:
            yield path

    @contextlib.contextmanager
    def _beside(self, name: str) -> Iterator[Path]:
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
                with path.open("rb") as file:
                    os.fsync(file.fileno())
                path.replace(target)
            else:
                self._upload_file(path, name)
        finally:
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
                f"{self.uri}/{name}: damaged (not JSON: {error}). Remove {self.uri} to build it again."
            ) from error

    def write_json(self, name: str, value: Any) -> None:
        """Write a value as readable JSON, whole or not at all."""
        self.write(name, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())

    def upload(self, folder: str | Path, name: str) -> list[FileRecord]:
        """Copy the files of a local folder into the directory `name`; their records, relative to this directory."""
        records = []
        for path in sorted(p for p in Path(folder).rglob("*") if p.is_file()):
            target = f"{name}/{path.relative_to(folder).as_posix()}"
            with self.beside(target) as copy:
                shutil.copyfile(path, copy)
            records.append(FileRecord.of_file(target, path))
        return records

    def local_folder(self, name: str) -> Path:
        """A local path of a directory; what lies in object storage is fetched once per machine, and again if it changed."""
        if self.is_local:
            return Path(self.path(name))
        state = [[info.path, info.size, str(info.mtime)] for info in self.infos(name, recursive=True).values()]
        with self.explained(name):
            target = cache() / digest([self.uri, name, state])
            with target.with_suffix(".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # the other processes of this machine wait for the one that fetches
                if not target.exists():
                    beside = target.with_suffix(".tmp")
                    shutil.rmtree(beside, ignore_errors=True)  # one that was killed left it
                    beside.mkdir()
                    fs.copy_files(self.path(name), str(beside), source_filesystem=self.filesystem)
                    beside.rename(target)
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
    if folder.stat().st_uid != os.getuid():  # anyone may write there, and models are read from it
        raise StorageError(f"{folder}: belongs to another user. Set TMPDIR to a directory of your own.")
    return folder


@dataclass(frozen=True)
class FileRecord:
    """A file of an artifact: path relative to the stage's directory, size, hash."""

    path: str
    num_bytes: int
    sha256: str

    @classmethod
    def of(cls, path: str, data: bytes) -> FileRecord:
        """The record of a file with these bytes."""
        return cls(path, len(data), hashlib.sha256(data).hexdigest())

    @classmethod
    def of_file(cls, path: str, local: Path) -> FileRecord:
        """The record of a local file, read piece by piece: a model may be larger than memory."""
        with local.open("rb") as file:
            return cls(path, local.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


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
                f"{storage.uri}/{MANIFEST}: not a manifest of schema {SCHEMA}. Remove {storage.uri} to build it again."
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
        return str(self.manifest["stage"])

    @property
    def fingerprint(self) -> str:
        return str(self.manifest["fingerprint"])

    @property
    def summary(self) -> dict[str, Any]:
        return dict(self.manifest["summary"])

    @property
    def identity(self) -> str:
        """What stages built from this one count as their input."""
        if self.stage not in TRAINED_STAGES:
            return self.fingerprint
        return digest({path: record["sha256"] for path, record in self.manifest["files"].items()})

    def parts(self, prefix: str = "part-") -> list[str]:
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
        if len(data) != record["bytes"] or hashlib.sha256(data).hexdigest() != record["sha256"]:
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

        Raises ArtifactError where the directory belongs to another recipe. What an interrupted run had begun from
        other inputs (an earlier stage was rebuilt since) is thrown away: nothing there can be used.
        """
        storage, work = run.child(key.stage), run.child(WORK).child(key.stage)
        building = storage.read_json(BUILDING)
        if building is not None and building["fingerprint"] != key.fingerprint:
            if building.get("recipe") != key.recipe:
                raise ArtifactError(refusal(storage, key, building, "Give another directory"))
            building = None
        if building is None:
            # What lies here without a name belongs to nobody: it must not be taken for parts of this recipe.
            storage.delete()
            work.delete()
            value = {"fingerprint": key.fingerprint, "recipe": key.recipe, "inputs": key.inputs}
            storage.write_json(BUILDING, value)
        for name in storage.names(recursive=True):
            if name.endswith(".tmp"):  # a killed attempt was writing it
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
        with self.storage.beside(path) as local:
            writer: pq.ParquetWriter | None = None
            try:
                for table in tables:
                    writer = writer or pq.ParquetWriter(str(local), table.schema, **_PARQUET)
                    writer.write_table(table, row_group_size=_ROW_GROUP)
            finally:
                if writer is not None:
                    writer.close()
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


def adopt(run: Storage, other: Artifact) -> Artifact:
    """Take a finished stage of another run by reference: only the manifest is copied, with where the files are."""
    manifest = other.manifest | {"reference": other.root.uri}
    artifact = replace(other, storage=run.child(other.stage), manifest=manifest)
    artifact.storage.write_json(MANIFEST, manifest)
    return artifact


def refusal(storage: Storage, key: Key, found: dict[str, Any], remedy: str) -> str:
    """Why a directory cannot be used for this key: the changed fields, and what to do instead."""
    changes = "\n  ".join(key.differences(found)) or "made by another version of this program"
    place = storage.uri
    return f"{place} belongs to another recipe:\n  {changes}\n{remedy}, or remove {place} and what was built from it."


def table_bytes(table: pa.Table, repeating: list[str] | None = None) -> bytes:
    """A table as a Parquet file, the same bytes for the same table and library version.

    `repeating`: the columns whose values come again and again, where that is known of all. To look for repetitions in
    ids and distances takes more than half of the time of writing them.
    """
    sink = io.BytesIO()
    dictionary = True if repeating is None else repeating
    pq.write_table(table, sink, row_group_size=_ROW_GROUP, use_dictionary=dictionary, **_PARQUET)
    return sink.getvalue()


@contextlib.contextmanager
def scratch_folder(place: Storage) -> Iterator[Path]:
    """A local folder for what does not fit into memory: beside the results, or for object storage on this machine.

    It is empty at the start, whatever a killed run left there, and gone at the end.
    """
    if not place.is_local:
        with tempfile.TemporaryDirectory(prefix="s2l_ray-") as folder:
            yield Path(folder)
        return
    folder_here = Path(place.child(WORK).path("scratch"))
    shutil.rmtree(folder_here, ignore_errors=True)
    folder_here.mkdir(parents=True)
    try:
        yield folder_here
    finally:
        shutil.rmtree(folder_here, ignore_errors=True)


def absolute_uri(uri: str) -> str:
    """A path made absolute; a URI as it is."""
    return uri if "://" in uri else os.path.abspath(uri)


def provenance() -> dict[str, Any]:
    """When and with which code and libraries something was made."""
    from importlib import metadata

    versions = {}
    for name in RECORDED_LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"created": created, "git": _git_commit(), "versions": versions}


@functools.cache
def _git_commit() -> str | None:
    """The commit of this source tree (`-dirty` with changes), None where it is installed without one."""
    import subprocess

    here = Path(__file__).resolve().parent
    if not (here.parent / ".git").exists():
        return None
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or None
