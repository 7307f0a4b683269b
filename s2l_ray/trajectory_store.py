"""N x T losses, in memory and as parts in storage: what `trajectories` writes and `clustering` and `selection` read.

They come from a run's own `trajectories/` directory or from anybody's Parquet files. Either way they end as one
`Trajectories` value with its rows in ascending order of `example_id`, so that nothing after it depends on the order or
the size of the input parts. Losses go from Arrow to numpy without ever being Python numbers.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from s2l_ray.artifacts import BUILDING, MANIFEST, Artifact, Storage, digest
from s2l_ray.errors import ArtifactError, ConfigError, DataError
from s2l_ray.progress import get_log

# Above this no number is a loss in nats, and its square would leave the float32 range inside k-means.
MAX_LOSS = 1e9
# What a row without a source is called.
NO_SOURCE = "(none)"
_BATCH_ROWS = 65_536
_NAMED_IDS = 5
_log = get_log("trajectories")


@dataclass(frozen=True, eq=False)
class Trajectories:
    """The losses of N examples at T checkpoints, rows in ascending order of unique ids (strings bytewise)."""

    example_ids: pa.Array
    """string or int64, shape (N,)."""

    losses_NT: NDArray[np.float32]
    """Nats per response token, finite."""

    sources: pa.Array | None = None
    """string without nulls, shape (N,); None where sources are unknown."""

    num_response_tokens_N: NDArray[np.int32] | None = None
    """Response tokens of each example; None where they are unknown."""

    columns: Mapping[str, pa.Array] = field(default_factory=dict)
    """Other columns, as strings, by whose values the groups may be stratified."""

    def __post_init__(self) -> None:
        """Raise DataError naming the ids whose losses are not finite, or that occur twice."""
        if not len(self.example_ids):
            raise DataError("No trajectories: there are no rows.")
        assert self.losses_NT.dtype == np.float32
        assert self.losses_NT.ndim == 2
        others = (self.losses_NT, self.sources, self.num_response_tokens_N, *self.columns.values())
        assert all(len(other) == len(self) for other in others if other is not None)
        self._check_ids()
        self._check_losses()

    @classmethod
    def of(
        cls,
        losses: Any,
        example_ids: Any = None,
        sources: Any = None,
        num_response_tokens: Any = None,
        columns: Mapping[str, Any] | None = None,
    ) -> Trajectories:
        """Trajectories from arrays, Arrow columns or lists in any order of rows; ids are row numbers unless given.

        Raises DataError naming the ids of ragged, missing or non-finite losses and of duplicates.
        """
        num_rows = len(losses)
        ids = _ids(_column(np.arange(num_rows) if example_ids is None else example_ids, "example_id"), "example_ids")
        table = {"example_id": ids}
        if sources is not None:
            table["source"] = _labels(_column(sources, "source"), "source", "sources")
        if num_response_tokens is not None:
            table["num_response_tokens"] = _token_counts(_column(num_response_tokens, "num_response_tokens"), ids, "arguments")
        for name, values in (columns or {}).items():
            table[name] = _labels(_column(values, name), name, "columns")
        for name, column in table.items():
            if len(column) != num_rows:
                raise DataError(f"{len(column):,} values of {name} for {num_rows:,} trajectories: give one for each.")
        return cls._sorted(pa.table(table), _loss_matrix(losses, ids))

    @classmethod
    def _sorted(cls, table: pa.Table, losses_NT: NDArray[np.float32]) -> Trajectories:
        """Trajectories from checked columns in any order of rows."""
        table = table.combine_chunks()
        ids = _one_array(table["example_id"])
        if not _is_ascending(ids):
            order = pc.array_sort_indices(ids)
            table, losses_NT = table.take(order).combine_chunks(), losses_NT[order.to_numpy()]
        arrays = {name: _one_array(table[name]) for name in table.column_names}
        tokens = arrays.pop("num_response_tokens", None)
        return cls(
            example_ids=arrays.pop("example_id"),
            losses_NT=losses_NT,
            sources=arrays.pop("source", None),
            num_response_tokens_N=None if tokens is None else tokens.to_numpy(),
            columns=arrays,
        )

    def __len__(self) -> int:
        return len(self.example_ids)

    @property
    def num_points(self) -> int:
        """T, the length of every trajectory."""
        return int(self.losses_NT.shape[1])

    def stratum_column(self, name: str) -> pa.Array:
        """The column to stratify by, shape (N,). Raises ConfigError naming the known ones."""
        known = dict(self.columns) | ({} if self.sources is None else {"source": self.sources})
        if name not in known:
            names = ", ".join(sorted(known)) or "none: these trajectories have no sources"
            raise ConfigError(f"clustering.stratify_by: no column '{name}' to stratify by. Known: {names}.")
        return known[name]

    def _check_ids(self) -> None:
        if _is_ascending(self.example_ids):
            return
        twice = pc.equal(self.example_ids[1:], self.example_ids[:-1])
        duplicates = self.example_ids[1:].filter(twice).unique()
        assert len(duplicates), "ids are not in ascending order"
        raise DataError(f"example_id occurs more than once: {name_examples(duplicates)}. Ids must be unique.")

    def _check_losses(self) -> None:
        if self.num_points == 0:
            raise DataError("losses: the lists are empty. A trajectory needs one loss at least.")
        # NaN survives min and max, so that two passes without a temporary array find every kind of bad number.
        if self.losses_NT.min() >= -MAX_LOSS and self.losses_NT.max() <= MAX_LOSS:
            return
        with np.errstate(invalid="ignore"):
            bad_N = ~(np.abs(self.losses_NT) <= MAX_LOSS).all(axis=1)
        raise DataError(
            f"losses: NaN, infinite, missing or beyond {MAX_LOSS:.0e} for example_id "
            f"{name_examples(self.example_ids.filter(pa.array(bad_N)))}. Remove these examples or score them again."
        )


def name_examples(example_ids: pa.Array) -> str:
    """A few ids, then how many more: `'a', 'b' and 17 more`."""
    named = ", ".join(repr(value) for value in example_ids[:_NAMED_IDS].to_pylist())
    rest = len(example_ids) - _NAMED_IDS
    return f"{named} and {rest:,} more" if rest > 0 else named


def priorities(example_ids: Any, seed: int | str) -> NDArray[np.uint64]:
    """The random number of each example, shape (N,): the first 8 bytes of BLAKE2b over `"{seed}:{example_id}"`.

    The lowest come first. It depends on the id alone and not on the row, so that a choice can be made in a stream
    and is the same for every order of the rows.
    """
    texts = _ids(_column(example_ids, "example_id"), "example_ids").cast(pa.string())
    priorities_N = np.empty(len(texts), np.uint64)
    for start in range(0, len(texts), _BATCH_ROWS):
        keys = pc.binary_join_element_wise(str(seed), texts[start : start + _BATCH_ROWS], ":").cast(pa.binary())
        digests = b"".join([hashlib.blake2b(key).digest() for key in keys.to_numpy(zero_copy_only=False)])
        priorities_N[start : start + _BATCH_ROWS] = np.frombuffer(digests, ">u8")[::8]
    return priorities_N


def trajectories_table(
    example_ids: Any, losses_NT: NDArray[np.floating[Any]], sources: Any, num_response_tokens: Any
) -> pa.Table:
    """One part of `trajectories/`: example_id, source, losses: fixed_size_list<float32, T>, num_response_tokens: int32."""
    ids = _ids(_column(example_ids, "example_id"), "example_ids")
    losses = pa.array(np.ascontiguousarray(losses_NT, np.float32).reshape(-1))
    return pa.table(
        {
            "example_id": ids,
            "source": _labels(_column(sources, "source"), "source", "sources"),
            "losses": pa.FixedSizeListArray.from_arrays(losses, losses_NT.shape[1]),
            "num_response_tokens": _token_counts(_column(num_response_tokens, "num_response_tokens"), ids, "arguments"),
        }
    )


def losses_of(table: pa.Table) -> NDArray[np.float32]:
    """The losses of a part of `trajectories/` as a matrix (N, T)."""
    losses = _one_array(table["losses"])
    return _decode_losses(losses, _one_array(table["example_id"]), "losses", losses.type.list_size)


def content_identity(trajectories: Trajectories) -> str:
    """What `clustering` counts as its input where the trajectories are somebody's files: 16 hexadecimal digits.

    The same for the same ids, losses, sources and token counts, however they are ordered or cut into files. For a
    run's own directory take `Artifact.identity`.
    """
    columns: dict[str, pa.Array] = {"example_id": trajectories.example_ids}
    if trajectories.sources is not None:
        columns["source"] = trajectories.sources
    if trajectories.num_response_tokens_N is not None:
        columns["num_response_tokens"] = pa.array(trajectories.num_response_tokens_N)
    columns |= dict(sorted(trajectories.columns.items()))
    content = hashlib.blake2b(f"losses {trajectories.losses_NT.shape}".encode(), digest_size=8)
    content.update(np.ascontiguousarray(trajectories.losses_NT).data)
    for name, column in columns.items():
        content.update(f"{name} {column.type} ".encode())
        if pa.types.is_string(column.type):
            content.update(np.ascontiguousarray(pc.binary_length(column).to_numpy()).data)
            offsets = np.frombuffer(column.buffers()[1], np.int32)[column.offset : column.offset + len(column) + 1]
            content.update(memoryview(column.buffers()[2] or b"")[offsets[0] : offsets[-1]])
        else:
            content.update(np.ascontiguousarray(column.to_numpy()).data)
    return content.hexdigest()


def files_identity(uri: str) -> str:
    """Names and sizes of the Parquet files behind a place, as 16 hexadecimal digits: cheap, and changes with their rows."""
    storage, names = _files(uri)
    return digest([[name, storage.size(name)] for name in names])


def load_trajectories(artifact: Artifact) -> Trajectories:
    """The trajectories of a run, every part checked against its hash. Raises ArtifactError naming a damaged part."""
    return _assemble(_artifact_parts(artifact), artifact.root.uri)


def read_trajectories(uri: str, *, stratify_by: str | None = None) -> Trajectories:
    """Anybody's trajectories: a Parquet file, a directory or a glob of them, or a run's `trajectories/`; path or URI.

    Columns: `example_id` (string or integer, unique), `losses` (lists of floats, one length), and where they are there
    `source`, `num_response_tokens` (integers) and the column `stratify_by`. Other columns are left alone.

    Raises DataError naming the file, column or ids that cannot be used, ArtifactError for an unfinished or damaged
    run directory, ConfigError for an unknown column to stratify by.
    """
    return _assemble(_parts(uri), uri, stratify_by)


def find_artifact(uri: str) -> Artifact | None:
    """The finished `trajectories/` of a run behind a path or URI, None if other files are there.

    Raises ArtifactError for an unfinished directory or another stage's.
    """
    if re.search(r"[*?\[]", uri) or uri.endswith(".parquet"):
        return None
    storage = Storage(uri)
    if storage.size("") is not None:
        return None
    manifest = storage.read_json(MANIFEST)
    if isinstance(manifest, dict) and str(manifest.get("schema")).startswith("s2l_ray/"):
        artifact = Artifact.read(storage)
        if artifact.stage != "trajectories":
            raise ArtifactError(f"{uri}: holds the stage '{artifact.stage}'. Give the run's trajectories/ directory.")
        return artifact
    if manifest is None and storage.exists(BUILDING):
        raise ArtifactError(f"{uri}: unfinished ({BUILDING} but no {MANIFEST}). Run `s2l run` again to finish it first.")
    return None


def fetch_rows(uri: str, example_ids: pa.Array) -> pa.Table:
    """All columns but `losses` of some examples, in the order of `example_ids` (ascending or not), as they were.

    A streaming join: two passes over the parts, memory for all ids and the rows found. Dictionary-encoded columns come
    back decoded, and the schema's metadata is left behind, since both change with the cut of the parts.
    Raises DataError if an id is not there (any more).
    """
    parts = _parts(uri)
    ids = [_ids(batch["example_id"], part.name) for part in parts for batch in part.batches(["example_id"])]
    place_N = pc.index_in(pa.chunked_array(ids), value_set=_ids(_column(example_ids, "example_id"), "example_ids"))
    found: list[pa.Table] = []
    places: list[pa.Array] = []
    start = 0
    for part in parts:
        for batch in part.batches([name for name in part.columns() if name != "losses"]):
            place = _one_array(place_N[start : start + batch.num_rows])
            start += batch.num_rows
            found.append(pa.Table.from_batches([batch.filter(place.is_valid())]))
            places.append(place.drop_null())
    if sum(len(table) for table in found) != len(example_ids):
        raise DataError(f"{uri}: changed while it was read. Run again when nothing writes there.")
    try:
        rows = pa.concat_tables([_plain(table) for table in found], promote_options="permissive")
    except pa.ArrowTypeError as error:
        raise DataError(f"{uri}: the parts have different columns ({error}).") from error
    return rows.take(pc.array_sort_indices(pa.concat_arrays(places))).combine_chunks()


def _plain(table: pa.Table) -> pa.Table:
    """A table with dictionaries decoded and without metadata."""
    fields = [
        pa.field(f.name, f.type.value_type if pa.types.is_dictionary(f.type) else f.type, f.nullable) for f in table.schema
    ]
    return table.cast(pa.schema(fields))


@dataclass(frozen=True)
class _Part:
    """One Parquet file: its name for messages and how it is opened."""

    name: str
    source: Callable[[], Any]

    def columns(self) -> list[str]:
        return list(self._open().schema_arrow.names)

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """The part in batches of at most 65,536 rows. Raises DataError naming the file where it cannot be read."""
        try:
            yield from self._open().iter_batches(_BATCH_ROWS, columns=list(columns))
        except (OSError, pa.ArrowException) as error:
            raise self._unreadable(error) from error

    def _open(self) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(self.source())
        except (OSError, pa.ArrowException) as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> DataError:
        return DataError(f"{self.name}: cannot be read as Parquet, it may be truncated ({error}). Write this file again.")


def _artifact_parts(artifact: Artifact) -> list[_Part]:
    def source(path: str) -> Callable[[], Any]:
        return lambda: io.BytesIO(artifact.read_bytes(path))

    return [_Part(f"{artifact.root.uri}/{path}", source(path)) for path in artifact.parts()]


def _parts(uri: str) -> list[_Part]:
    """The Parquet files behind a path, a URI or a glob."""
    artifact = find_artifact(uri)
    if artifact is not None:
        return _artifact_parts(artifact)

    def source(storage: Storage, name: str) -> Callable[[], Any]:
        return lambda: storage.filesystem.open_input_file(storage.path(name))

    try:
        storage, names = _files(uri)
    except OSError as error:
        raise DataError(f"{uri}: cannot be listed ({error}).") from error
    return [_Part(f"{storage.uri.rstrip('/')}/{name}" if name else uri, source(storage, name)) for name in names]


def _files(uri: str) -> tuple[Storage, list[str]]:
    """A place and the names of the Parquet files in it; the name is empty where the place is the file itself."""
    wildcard = re.search(r"[*?\[]", uri)
    if wildcard is None:
        storage = Storage(uri)
        if storage.size("") is not None:
            return storage, [""]
        if not storage.exists():
            raise DataError(f"{uri}: no such file or directory. Give a Parquet file, a directory or a glob of them.")
        pattern = re.compile(r".*\.parquet")
    else:
        base, slash, _ = uri[: wildcard.start()].rpartition("/")
        storage = Storage(base or (slash or "."))
        pattern = _glob_pattern(uri[len(base) + len(slash) :])
    # Spark and others leave files such as _SUCCESS and .crc beside the parts.
    names = [name for name in storage.names(recursive=True) if not re.search(r"(^|/)[._]", name)]
    found = [name for name in names if pattern.fullmatch(name)]
    if not found:
        hint = f" It looks like a run: give {uri}/trajectories." if storage.exists("run.json") else ""
        raise DataError(f"{uri}: no Parquet files there.{hint}")
    return storage, found


def _glob_pattern(glob: str) -> re.Pattern[str]:
    """A shell pattern over paths: `*` and `?` stay inside one directory, `**/` crosses any number of them."""
    pieces = {"**/": "(?:.*/)?", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(\*\*/|\*|\?|\[[^\]]+\])", glob)
    return re.compile("".join(pieces.get(p, p if p.startswith("[") else re.escape(p)) for p in parts))


def _assemble(parts: list[_Part], where: str, stratify_by: str | None = None) -> Trajectories:
    """All parts as one value. Raises DataError where they do not fit together."""
    tables: list[pa.Table] = []
    blocks: list[NDArray[np.float32]] = []
    for part in parts:
        wanted = _wanted_columns(part, stratify_by)
        for batch in part.batches(wanted):
            table = _checked_columns(batch, part.name)
            if tables and table.schema != tables[0].schema:
                raise DataError(f"{part.name}: has {_signature(table)}, but {parts[0].name} has {_signature(tables[0])}.")
            num_points = blocks[0].shape[1] if blocks else None
            blocks.append(_decode_losses(batch["losses"], _one_array(table["example_id"]), part.name, num_points))
            tables.append(table)
    if not sum(map(len, tables)):
        raise DataError(f"{where}: no rows.")
    try:
        trajectories = Trajectories._sorted(pa.concat_tables(tables), np.concatenate(blocks))
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    _log.info("%s trajectories of %d points from %d files", f"{len(trajectories):,}", trajectories.num_points, len(parts))
    return trajectories


def _wanted_columns(part: _Part, stratify_by: str | None) -> list[str]:
    """The columns of a part that are read. Raises where one is missing that must be there."""
    names = part.columns()
    listed = ", ".join(names)
    for name in ("example_id", "losses"):
        if name not in names:
            raise DataError(f"{part.name}: column '{name}' is missing (columns: {listed}).")
    if stratify_by is not None and stratify_by not in names:
        raise ConfigError(f"clustering.stratify_by: no column '{stratify_by}' in {part.name}. Known: {listed}.")
    wanted = ["example_id", "losses", "source", "num_response_tokens", stratify_by]
    return [name for name in dict.fromkeys(wanted) if name in names]


def _checked_columns(batch: pa.RecordBatch, where: str) -> pa.Table:
    """A batch without its losses: ids as string or int64, token counts as int32, the others as strings."""
    ids = _ids(batch["example_id"], where)
    columns = {"example_id": ids}
    for name in batch.schema.names:
        if name == "num_response_tokens":
            columns[name] = _token_counts(batch[name], ids, where)
        elif name not in {"example_id", "losses"}:
            columns[name] = _labels(batch[name], name, where)
    return pa.table(columns)


def _signature(table: pa.Table) -> str:
    return ", ".join(f"{f.name}: {f.type}" for f in table.schema)


def _loss_matrix(losses: Any, ids: pa.Array) -> NDArray[np.float32]:
    """Losses in any form that people hold them in, as a float32 matrix (N, T)."""
    if not isinstance(losses, pa.Array | pa.ChunkedArray) and hasattr(losses, "__array__"):
        array = np.asarray(losses)
        if array.ndim == 2 and array.dtype.kind in "fiu":
            with np.errstate(over="ignore"):
                return np.ascontiguousarray(array, np.float32)
        losses = list(array)
    column = _column(losses, "losses")
    if pa.types.is_list(column.type) and pa.types.is_integer(column.type.value_type):
        column = column.cast(pa.list_(pa.float64()))
    return _decode_losses(column, ids, "losses")


def _decode_losses(column: pa.Array, ids: pa.Array, where: str, num_points: int | None = None) -> NDArray[np.float32]:
    """A column of lists as a matrix (N, T); T is `num_points` or the first row's. Raises DataError naming odd rows."""
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    kind = column.type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not is_list or not pa.types.is_floating(kind.value_type):
        raise _wrong_type(where, "losses", kind, "lists of floats")
    if column.null_count:
        raise DataError(f"{where}: losses are missing for example_id {name_examples(ids.filter(column.is_null()))}.")
    lengths_N = pc.list_value_length(column).to_numpy(zero_copy_only=False)
    if num_points is None:
        num_points = int(lengths_N[0]) if len(lengths_N) else 0
    odd_N = lengths_N != num_points
    if odd_N.any():
        raise DataError(
            f"{where}: losses are ragged. Others have {num_points} values; another number "
            f"({lengths_N[odd_N][0]}, say) for example_id {name_examples(ids.filter(pa.array(odd_N)))}."
        )
    values: NDArray[np.floating[Any]] = column.flatten().to_numpy(zero_copy_only=False)
    with np.errstate(over="ignore"):
        return values.astype(np.float32, copy=False).reshape(len(column), num_points)


def _ids(column: pa.Array, where: str) -> pa.Array:
    """Ids as string or int64. Raises DataError for another type or a missing id."""
    column = _decoded(column)
    if not (_is_text(column.type) or pa.types.is_integer(column.type)):
        raise _wrong_type(where, "example_id", column.type, "string or integer")
    if column.null_count:
        rows = np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))
        raise DataError(f"{where}: example_id is missing in {len(rows):,} rows (row {rows[0]:,} of its block, say).")
    try:
        return column.cast(pa.string() if _is_text(column.type) else pa.int64())
    except pa.ArrowInvalid as error:
        raise DataError(f"{where}: example_id does not fit into 64 bits with a sign ({error}).") from error


def _labels(column: pa.Array, name: str, where: str) -> pa.Array:
    """Names of sources or strata as strings; a missing one is called `(none)`."""
    column = _decoded(column)
    kind = column.type
    if not (_is_text(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_null(kind)):
        raise _wrong_type(where, name, kind, "string, integer or boolean")
    return column.cast(pa.string()).fill_null(NO_SOURCE)


def _token_counts(column: pa.Array, ids: pa.Array, where: str) -> pa.Array:
    """Numbers of response tokens as int32. Raises DataError naming the ids of missing or negative ones."""
    if not pa.types.is_integer(column.type) and len(column):
        raise _wrong_type(where, "num_response_tokens", column.type, "integers")
    column = column.cast(pa.int64())
    is_bad = pc.fill_null(pc.or_(pc.less(column, 0), pc.greater(column, np.iinfo(np.int32).max)), True)
    if len(column) == len(ids) and pc.any(is_bad).as_py():
        bad = name_examples(ids.filter(is_bad))
        raise DataError(f"{where}: num_response_tokens is missing, negative or too large for example_id {bad}.")
    return column.cast(pa.int32())


def _wrong_type(where: str, column: str, found: pa.DataType, expected: str) -> DataError:
    return DataError(f"{where}: column '{column}' is {found}, expected {expected}.")


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _decoded(column: pa.Array) -> pa.Array:
    return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column


def _column(values: Any, name: str) -> pa.Array:
    """Values in any form as one Arrow array."""
    if isinstance(values, pa.ChunkedArray):
        return _one_array(values)
    if isinstance(values, pa.Array):
        return values
    try:
        return _one_array(pa.array(values))
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise DataError(f"{name}: the values have no common type ({error}).") from error


def _one_array(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    """A column as one array, copied only if it is in several chunks."""
    if not isinstance(column, pa.ChunkedArray):
        return column
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks or [pa.array([], column.type)])


def _is_ascending(ids: pa.Array) -> bool:
    """Whether ids ascend and none occurs twice; strings compare bytewise."""
    return bool(pc.all(pc.greater(ids[1:], ids[:-1])).as_py() is not False)
