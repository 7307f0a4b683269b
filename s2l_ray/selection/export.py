"""The subset for another trainer: the corpus's own rows as one file, or in the form of a trainer. `s2l export`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from s2l_ray.errors import ArtifactError, ConfigError
from s2l_ray.selection.destination import Destination
from s2l_ray.selection.subset_files import check_file, subset_lines, write_parquet
from s2l_ray.selection.trainers import TRAINERS, TrainerRows
from s2l_ray.selection.turns import Contents, DataPlace, open_examples
from s2l_ray.storage.artifacts import Artifact
from s2l_ray.storage.layout import as_written
from s2l_ray.storage.places import Storage

FORMATS = ("jsonl", "parquet", *TRAINERS)


@dataclass(frozen=True)
class Exported:
    """What an export has written."""

    output: str
    num_examples: int
    num_rows: int
    """More than examples where a trainer needs a row for each learned turn."""

    data: str
    """The name of the file with the rows."""

    companions: tuple[str, ...] = ()
    """Names of the small files beside it."""

    features: list[dict[str, Any]] | None = None
    """The types of the columns for a card, where they must not be inferred."""

    def __str__(self) -> str:
        rows = f" in {self.num_rows:,} rows" if self.num_rows != self.num_examples else ""
        beside = f", with {', '.join(self.companions)}" if self.companions else ""
        return f"{self.output}: {self.num_examples:,} examples{rows}{beside}"


def export_subset(
    run_dir: str,
    file_format: str,
    output: str,
    subset: str = "selected",
    *,
    with_columns: bool | None = None,
    hub: str | None = None,
) -> Exported:
    """Write a subset, whole or not at all: its own rows as JSON Lines or Parquet, or a trainer's form of its conversations.

    `subset`: `selected`, `random`, or `selected-BUDGET`. `output` is the file to write; for a trainer that needs small files
    beside the data a folder, or a file ending in .jsonl. `with_columns`: whether rows have `example_id`, `cluster_id` and
    `weight` at their end (by default those of JSON Lines and Parquet; a trainer's never). Rows of a JSON corpus are otherwise
    as they were written. `hub`: the dataset there that a trainer's small files shall name, instead of the folder.
    Memory is for one row group (about 64 MB of rows at most), for a trainer also the ids and one part.

    Raises ArtifactError for an unknown subset and, with nothing written, for a damaged one; ConfigError for an `output` that
    cannot be written or is not ours to replace, for bytes, which JSON cannot hold, and where there is nothing to make
    conversations of.
    """
    if file_format not in FORMATS:
        raise ConfigError(f"--format {file_format}: no such format. Formats: {', '.join(FORMATS)}.")
    run = Storage(run_dir)
    selection = Artifact.read(run.child("selection"))
    path = _path_of(selection, subset, run_dir)
    if file_format in TRAINERS:
        if with_columns:
            raise ConfigError(f"--with-columns: --format {file_format} has no place for them. Use jsonl or parquet.")
        return _export_for_trainer(run, selection, path, file_format, output, hub)
    place = Destination.file(output)
    place.check(run, selection.root, {})
    check_file(selection, path)
    if file_format == "jsonl" and as_written(path) in selection.manifest["files"]:
        check_file(selection, as_written(path))
    shows_ours = with_columns is not False

    def write(local: Path) -> None:
        if file_format == "parquet":
            write_parquet(selection, path, shows_ours, local)
        else:
            _write_lines(subset_lines(selection, path, shows_ours), local)

    place.write(write, {})
    with selection.root.explained(path), selection.root.open(path) as source:
        num_rows = int(pq.ParquetFile(source).metadata.num_rows)
    return Exported(output, num_rows, num_rows, place.name)


def _path_of(selection: Artifact, subset: str, run_dir: str) -> str:
    """The Parquet file of a subset. Raises ArtifactError where there is none."""
    path = f"{subset}.parquet"
    if path not in selection.manifest["files"]:
        hint = " Set evaluation.random_control=true for a random control." if subset == "random" else ""
        known = ", ".join(path.removesuffix(".parquet") for path in selection.manifest["files"] if path.endswith(".parquet"))
        raise ArtifactError(f"{run_dir}: has no subset '{subset}'. There are: {known}.{hint}")
    return path


def _export_for_trainer(run: Storage, selection: Artifact, path: str, name: str, output: str, hub: str | None) -> Exported:
    names = TRAINERS[name].companions(Contents(), DataPlace())
    place = Destination.of_trainer(output) if names else Destination.file(output)
    place.check(run, selection.root, names)
    check_file(selection, path)
    examples = open_examples(run, selection, path)
    rows = TrainerRows(name, examples, Contents.of(examples()))
    data = DataPlace(hub or place.place, place.name, hub is not None, selection.manifest["files"][path]["sha256"])
    companions = TRAINERS[name].companions(rows.contents, data)
    place.write(lambda local: _write_lines(rows.lines(), local), companions)
    rows.report()
    features = TRAINERS[name].features(rows.contents)
    return Exported(output, rows.num_examples, rows.num_rows, place.name, tuple(companions), features)


def _write_lines(lines: Iterator[bytes], local: Path) -> None:
    try:
        with local.open("wb") as file:
            file.writelines(lines)
    except UnicodeEncodeError as error:
        raise ConfigError("an example has half a surrogate pair, which is not a character. Use --format parquet.") from error
