"""The corpus as its owner has it: which files it consists of, and what identifies it wherever it lies.

A corpus is files (JSON Lines, JSON, CSV, Parquet), a Hub dataset, or tasks that reasoning-gym generates.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
from typing import Any

from pyarrow import fs

from s2l_ray.config import ExamplesConfig, MimicRadiologyDataset, ReasoningGymDataset
from s2l_ray.config.sections import COMPRESSIONS, FORMATS
from s2l_ray.errors import DataError
from s2l_ray.examples.files import CorpusFile
from s2l_ray.examples.llama_factory import resolved
from s2l_ray.examples.mimic import RULES
from s2l_ray.progress import get_log
from s2l_ray.storage.hub import hub_commit, hub_id
from s2l_ray.storage.layout import CORPUS_HASHES
from s2l_ray.storage.listing import files_below, is_glob, split_glob
from s2l_ray.storage.ownership import scratch_of
from s2l_ray.storage.places import Storage, absolute_uri
from s2l_ray.storage.records import digest

# --- which files -------------------------------------------------------------------------------------------------


def find_files(dataset: str | list[str]) -> list[CorpusFile]:
    """The files of a corpus: paths, directories (with all below them), globs and URIs, each file once, by name.

    Raises DataError for a path without a file, a file of an unknown format, and a corpus without a byte.
    """
    given = [dataset] if isinstance(dataset, str) else dataset
    files = {file.uri: file for place in given for file in _files_at(place)}
    if not any(file.num_bytes for file in files.values()):
        what = "its files are empty" if files else "no files are given"
        raise DataError(f"{', '.join(given) or 'examples.dataset'}: the corpus is empty ({what}). Give files with rows.")
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
    return f"{', '.join(FORMATS)}; all but .parquet also with {', '.join(COMPRESSIONS)}"


# --- what the corpus is ------------------------------------------------------------------------------------------


def corpus_identity(given: ExamplesConfig, run: Storage | None = None) -> str:
    """Which corpus it is, by content and not by place: `files:HASH`, `hub:ID@COMMIT`, `reasoning_gym:HASH`,
    `mimic_radiology:HASH`.

    Hashes of files are remembered in the run's scratch directory by address, size and time of change. Raises DataError for
    a corpus that is missing or empty, ArtifactError where the scratch directory is somebody else's.
    """
    config, layout = resolved(given)
    if isinstance(config.dataset, ReasoningGymDataset):
        from importlib import metadata

        gym = config.dataset.reasoning_gym
        recipe = gym.model_dump(mode="json", exclude=None if gym.imperfections else {"imperfections"})
        return f"reasoning_gym:{digest([recipe, metadata.version('reasoning-gym')])}"
    if isinstance(config.dataset, MimicRadiologyDataset):
        files = find_files(config.dataset.mimic_radiology)
        return f"mimic_radiology:{digest([RULES, *sorted(_hashes(files, run).values())], num_bytes=16)}"
    # What an entry of dataset_info.json says is in no other part of the recipe.
    named = [dataclasses.asdict(layout), config.subset, config.split] if config is not given else []
    hub = hub_id(config.dataset)
    if hub:
        layout_digest = f"#{digest(named)}" if named else ""
        return f"hub:{hub}@{hub_commit('dataset', hub, config.revision)}{layout_digest}"
    files = find_files(config.dataset)
    hashes = _hashes(files, run)
    # A file's name counts only where it becomes a source.
    parts = sorted([hashes[file.uri], str(file.format), "" if config.source_field else file.source] for file in files)
    return f"files:{digest([*parts, *named], num_bytes=16)}"


def _hashes(files: list[CorpusFile], run: Storage | None) -> dict[str, str]:
    """SHA-256 of every file by its address."""
    known = (run.read_json(CORPUS_HASHES) if run else None) or {}
    stamps = {file.uri: [file.num_bytes, file.modified_ns] for file in files}
    missing = [file for file in files if known.get(file.uri, [None])[:2] != stamps[file.uri]]
    with concurrent.futures.ThreadPoolExecutor() as pool:  # hashlib and pyarrow let go of the interpreter's lock
        for file, sha256 in zip(missing, pool.map(_sha256, missing), strict=True):
            known[file.uri] = [*stamps[file.uri], sha256]
    if run and missing:
        scratch_of(run)
        run.write_json(CORPUS_HASHES, known)
    return {file.uri: known[file.uri][2] for file in files}


def _sha256(file: CorpusFile) -> str:
    state = hashlib.sha256()
    with file.readable(), file.stream() as stream:
        while block := stream.read(2**20):
            state.update(block)
    return state.hexdigest()


# What else decides the examples of a corpus whose fields are known.
_OF_KNOWN_FIELDS = ("where", "held_out_fraction", "held_out_per_source", "validation_fraction", "rows_per_part")


def examples_recipe(config: ExamplesConfig, corpus: str) -> dict[str, Any]:
    """The recipe of the stage: the corpus by its identity, and those fields of the config that decide its examples."""
    # What a bad row does decides whether there is a result, not which.
    recipe = config.model_dump(mode="json", exclude={"dataset", "revision", "on_bad_row", "max_dropped"})
    if isinstance(config.dataset, ReasoningGymDataset):
        recipe = {key: recipe[key] for key in _OF_KNOWN_FIELDS}
    elif isinstance(config.dataset, MimicRadiologyDataset):
        recipe = {key: recipe[key] for key in (*_OF_KNOWN_FIELDS, "prompt_template", "prompt_template_if_empty")}
    elif not corpus.startswith("hub:"):
        recipe = {key: value for key, value in recipe.items() if key not in {"subset", "split"}}
    return {"corpus": corpus} | recipe
