"""The corpus as its owner has it: which files it is, what identifies it, and how it is cut for many readers.

A corpus is files (JSON Lines, JSON, CSV, Parquet), a Hub dataset, or tasks that reasoning-gym generates. It is cut into
pieces (see `pieces`), and a *unit* is what one task gets: a piece, or several small ones. How a corpus is cut decides
no result; it depends on the corpus alone, so that a run that goes on finds its units again.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from s2l_ray.config import ExamplesConfig, ReasoningGym, ReasoningGymDataset
from s2l_ray.config.sections import FORMATS
from s2l_ray.errors import DataError
from s2l_ray.examples.fields import normalise
from s2l_ray.examples.pieces import (
    CorpusFile,
    CsvFile,
    FilePiece,
    GeneratedRows,
    GzippedLines,
    HubRows,
    JsonArray,
    Lines,
    Piece,
    RowGroups,
    load_hub,
)
from s2l_ray.progress import get_log
from s2l_ray.storage.hub import dataset_commit, hub_id
from s2l_ray.storage.listing import files_below, is_glob, split_glob
from s2l_ray.storage.places import Storage, absolute_uri
from s2l_ray.storage.records import digest

LARGEST_UNIT_BYTES = 32 * 2**20
SMALLEST_UNIT_BYTES = 2**20
# Between the two: enough units that a small corpus keeps several tasks busy.
UNITS_WANTED = 64
GENERATED_ROWS_PER_UNIT = 256
UNITS_IN_A_SAMPLE = 3
HASH_CACHE = "corpus_hashes.json"

Unit = tuple[Piece, ...]


# --- which files -------------------------------------------------------------------------------------------------


def find_files(dataset: str | list[str]) -> list[CorpusFile]:
    """The files of a corpus: paths, directories (with all below them), globs and URIs, each file once, by name.

    Raises DataError for a path without a file, a file of an unknown format, and a corpus without a byte.
    """
    given = [dataset] if isinstance(dataset, str) else dataset
    files = {file.uri: file for place in given for file in _files_at(place)}
    if not any(file.num_bytes for file in files.values()):
        what = "its files are empty" if files else "no files are given"
        raise DataError(f"{', '.join(given) or 'examples.dataset'}: the corpus is empty ({what}).")
    return sorted(files.values(), key=lambda file: file.uri)


def _files_at(place: str) -> list[CorpusFile]:
    """The files at one path, directory, glob or URI."""
    try:
        if is_glob(place):
            return _files_matching(place)
        storage = Storage(absolute_uri(place))
        info = storage.info()
    except OSError as error:
        raise DataError(f"{place}: cannot be reached ({error}). Check the address and the credentials.") from error
    if info.type == fs.FileType.File:
        return [_known(_corpus_file(place, info))]
    if info.type == fs.FileType.NotFound:
        raise DataError(
            f"{place}: no such file or directory. Check examples.dataset; a dataset on the Hub is written org/name, on its own."
        )
    found = _files_below(place)
    known = [file for file in found if file.format]
    if not known:
        raise DataError(f"{place}: no file of the corpus in this directory. Known suffixes: {_known_suffixes()}.")
    if len(known) < len(found):
        others = [file.name for file in found if not file.format]
        get_log("examples").info(f"{place}: {len(others)} of another format left alone ({', '.join(others[:3])})")
    return known


def _files_matching(glob: str) -> list[CorpusFile]:
    """The files that match a glob, each of a known format."""
    found = _files_below(*split_glob(glob))
    if not found:
        raise DataError(f"{glob}: no file matches. Check examples.dataset.")
    return [_known(file) for file in found]


def _files_below(directory: str, glob: str = "**") -> list[CorpusFile]:
    """The files below a directory that match a glob (see `storage.listing`)."""
    names = files_below(directory, glob)
    return [_corpus_file(f"{directory.rstrip('/')}/{name}", info) for name, info in names.items()]


def _corpus_file(name: str, info: fs.FileInfo) -> CorpusFile:
    return CorpusFile(name, absolute_uri(name), info.size, info.mtime_ns or 0)


def _known(file: CorpusFile) -> CorpusFile:
    if file.format is None:
        raise DataError(f"{file.name}: unknown file format. Known suffixes: {_known_suffixes()}.")
    return file


def _known_suffixes() -> str:
    return f"{', '.join(FORMATS)}; all but .parquet also with .gz"


# --- what the corpus is ------------------------------------------------------------------------------------------


def corpus_identity(config: ExamplesConfig, cache: Storage | None = None) -> str:
    """Which corpus it is, by content and not by place: `files:HASH`, `hub:ID@COMMIT`, `reasoning_gym:HASH`.

    Hashes of files are remembered in `cache` by address, size and time of change. Raises DataError for a corpus
    that is missing or empty.
    """
    if isinstance(config.dataset, ReasoningGymDataset):
        from importlib import metadata

        recipe = config.dataset.reasoning_gym.model_dump(mode="json")
        return f"reasoning_gym:{digest([recipe, metadata.version('reasoning-gym')])}"
    hub = hub_id(config.dataset)
    if hub:
        return f"hub:{hub}@{dataset_commit(hub, config.revision)}"
    files = find_files(config.dataset)
    hashes = _hashes(files, cache)
    # A file's name counts only where it becomes a source.
    return "files:" + digest(
        sorted([hashes[f.uri], str(f.format), "" if config.source_field else f.source] for f in files), num_bytes=16
    )


def _hashes(files: list[CorpusFile], cache: Storage | None) -> dict[str, str]:
    """SHA-256 of every file by its address."""
    known = (cache.read_json(HASH_CACHE) if cache else None) or {}
    stamps = {file.uri: [file.num_bytes, file.modified_ns] for file in files}
    missing = [file for file in files if known.get(file.uri, [None])[:2] != stamps[file.uri]]
    with concurrent.futures.ThreadPoolExecutor() as pool:  # hashlib and pyarrow let go of the interpreter's lock
        for file, sha256 in zip(missing, pool.map(_sha256, missing), strict=True):
            known[file.uri] = [*stamps[file.uri], sha256]
    if cache and missing:
        cache.write_json(HASH_CACHE, known)
    return {file.uri: known[file.uri][2] for file in files}


def _sha256(file: CorpusFile) -> str:
    state = hashlib.sha256()
    with file.readable(), file.stream() as stream:
        while block := stream.read(2**20):
            state.update(block)
    return state.hexdigest()


def examples_recipe(config: ExamplesConfig, corpus: str) -> dict[str, Any]:
    """What decides the examples: the corpus by its identity, and those fields of the config that are used."""
    recipe = config.model_dump(mode="json", exclude={"dataset", "revision"})
    if isinstance(config.dataset, ReasoningGymDataset):
        recipe = {key: recipe[key] for key in ("where", "held_out_fraction", "rows_per_part")}
    elif not corpus.startswith("hub:"):
        recipe = {key: value for key, value in recipe.items() if key not in {"subset", "split"}}
    return {"corpus": corpus} | recipe


# --- cutting -----------------------------------------------------------------------------------------------------


def cut_corpus(config: ExamplesConfig) -> list[Unit]:
    """The corpus as units of work, always the same for the same corpus. Raises DataError if there is nothing in it."""
    units = _cut(config)
    if not units:
        raise DataError(f"{config.dataset}: the corpus is empty: no row in it.")
    return units


def _cut(config: ExamplesConfig) -> list[Unit]:
    if isinstance(config.dataset, ReasoningGymDataset):
        total = sum(parameters["size"] for parameters in config.dataset.reasoning_gym.tasks.values())
        return list(_cut_generated(config.dataset.reasoning_gym, max(GENERATED_ROWS_PER_UNIT, -(-total // 1024))))
    hub = hub_id(config.dataset)
    if hub:
        return _cut_hub(hub, config)
    files = find_files(config.dataset)
    wanted = sum(file.num_bytes for file in files) // UNITS_WANTED
    unit_bytes = min(LARGEST_UNIT_BYTES, max(SMALLEST_UNIT_BYTES, wanted))
    with concurrent.futures.ThreadPoolExecutor() as pool:  # footers in object storage are a request each
        pieces = [piece for cut in pool.map(lambda file: _cut_file(file, unit_bytes), files) for piece in cut]
    return _packed(pieces, unit_bytes)


def sample_corpus(config: ExamplesConfig, num_rows: int) -> tuple[int, list[str]]:
    """About how many examples the corpus has, and prompt and response of about `num_rows` of them: what a plan needs.

    Reads a few units, or a few rows of every generated task. Of a Hub dataset nothing is known before it is downloaded:
    (0, []). Raises DataError as reading it all would.
    """
    if hub_id(config.dataset):
        return 0, []
    if isinstance(config.dataset, ReasoningGymDataset):
        gym = config.dataset.reasoning_gym
        units = list(_cut_generated(gym, -(-num_rows // len(gym.tasks))))
        chosen = list({unit[0].name: unit for unit in reversed(units)}.values())  # the first of every task
    else:
        units = cut_corpus(config)
        chosen = units[:: -(-len(units) // UNITS_IN_A_SAMPLE)]
    batches = [normalise(rows, config).table for unit in chosen for piece in unit for rows in piece.read()]
    texts = [f"{prompt}{response}" for batch in batches for prompt, response in zip(*_texts(batch), strict=True)]
    read, total = (sum(piece.size for unit in some for piece in unit) for some in (chosen, units))
    return round(len(texts) * total / max(read, 1)), texts[:: max(1, len(texts) // num_rows)]


def _texts(batch: pa.Table) -> tuple[list[str], list[str]]:
    return batch["prompt"].to_pylist(), batch["response"].to_pylist()


def _cut_file(file: CorpusFile, unit_bytes: int) -> list[FilePiece]:
    """A file as pieces of about `unit_bytes`, as far as its format lets itself be cut."""
    if file.format in {"csv", "tsv"}:
        return [CsvFile(file)]
    if file.format == "json" and _is_json_array(file):
        return [JsonArray(file)]
    if file.format == "parquet":
        return list(_cut_row_groups(file, unit_bytes))
    if file.is_gzipped:
        return [GzippedLines(file)]
    return [Lines(file, start, min(start + unit_bytes, file.num_bytes)) for start in range(0, file.num_bytes, unit_bytes)]


def _is_json_array(file: CorpusFile) -> bool:
    """Whether a .json file is one array; many hold one object a line."""
    with file.readable(), file.stream("gzip" if file.is_gzipped else None) as stream:
        return bool(stream.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["))


def _cut_row_groups(file: CorpusFile, unit_bytes: int) -> Iterator[FilePiece]:
    with file.readable(), file.open() as source:
        footer = pq.read_metadata(source)
    start = first_row = num_rows = size = 0
    for group in range(footer.num_row_groups):
        size += footer.row_group(group).total_byte_size
        num_rows += footer.row_group(group).num_rows
        if size >= unit_bytes or group == footer.num_row_groups - 1:
            yield RowGroups(file, start, group + 1, first_row, size)
            start, first_row, num_rows, size = group + 1, first_row + num_rows, 0, 0


def _cut_generated(gym: ReasoningGym, step: int) -> Iterator[Unit]:
    """Every task in units of `step` rows."""
    for task, parameters in gym.tasks.items():
        for start in range(0, parameters["size"], step):
            stop = min(start + step, parameters["size"])
            yield (GeneratedRows(task, {"seed": gym.seed} | parameters, start, stop),)


def _cut_hub(dataset: str, config: ExamplesConfig) -> list[Unit]:
    loaded = load_hub(dataset, config.subset, config.revision, config.split)
    num_units = max(1, loaded.data.nbytes // LARGEST_UNIT_BYTES, min(UNITS_WANTED, loaded.data.nbytes // SMALLEST_UNIT_BYTES))
    step = max(1, -(-len(loaded) // num_units))
    return [
        (HubRows(dataset, config.subset, config.revision, config.split, start, min(start + step, len(loaded))),)
        for start in range(0, len(loaded), step)
    ]


def _packed(pieces: list[FilePiece], unit_bytes: int) -> list[Unit]:
    """Neighbouring pieces put together up to `unit_bytes`: a thousand small files are not a thousand tasks."""
    units: list[list[FilePiece]] = []
    room = 0
    for piece in pieces:
        if piece.size > room:
            units.append([])
            room = unit_bytes
        units[-1].append(piece)
        room -= piece.size
    return [tuple(unit) for unit in units]
