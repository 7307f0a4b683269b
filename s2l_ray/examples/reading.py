"""What other stages read of the finished examples: the rows of each split, and the corpus's own columns of chosen rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from s2l_ray.errors import ArtifactError
from s2l_ray.examples.hashes import HELD_OUT, POOL, VALIDATION
from s2l_ray.examples.ids import name_examples
from s2l_ray.runtime.passes import in_tasks
from s2l_ray.storage.artifacts import Artifact


def read_pool(artifact: Artifact, part: str, columns: list[str] | None = None) -> pa.Table:
    """The rows of a part that may be selected and trained on; all columns unless some are named.

    Raises ArtifactError where the part is missing or damaged.
    """
    return _read_split(artifact, part, POOL, columns)


def read_held_out(artifact: Artifact, part: str, columns: list[str] | None = None) -> pa.Table:
    """The held-out rows of a part, perhaps none; all columns unless some are named.

    Raises ArtifactError where the part is missing or damaged.
    """
    return _read_split(artifact, part, HELD_OUT, columns)


def read_validation(artifact: Artifact, part: str, columns: list[str] | None = None) -> pa.Table:
    """The rows of a part kept for tuning, perhaps none; all columns unless some are named.

    Raises ArtifactError where the part is missing or damaged.
    """
    return _read_split(artifact, part, VALIDATION, columns)


def read_evaluated(artifact: Artifact, part: str, split: str, columns: list[str] | None = None) -> pa.Table:
    """The rows of a part that models are evaluated on: `split` is `held_out` or `validation`.

    Raises ArtifactError where the part is missing or damaged.
    """
    return _read_split(artifact, part, split, columns)


def _read_split(artifact: Artifact, part: str, split: str, columns: list[str] | None) -> pa.Table:
    table = artifact.read_table(part, None if columns is None else list({*columns, "split"}))
    table = table.filter(pc.equal(table["split"], split))
    return table if columns is None else table.select(columns)


def fetch_rows(artifact: Artifact, ids: pa.Array | Sequence[str], *, in_ray: bool = False) -> Iterator[pa.Table]:
    """The examples with these ids, part by part, in order of id. Parts without any are not read; `in_ray`: tasks read them.

    The tables have the columns `example_id`, `row`, a struct of the corpus's own columns, and where rows have a text of their
    own `row_json`. Raises ArtifactError naming ids that are not in the corpus.
    """
    for table in fetch_examples(artifact, ids, ["original", "row_json"], in_ray=in_ray):
        yield table.rename_columns(["row" if name == "original" else name for name in table.column_names])


def fetch_examples(
    artifact: Artifact, ids: pa.Array | Sequence[str], columns: list[str], *, in_ray: bool = False
) -> Iterator[pa.Table]:
    """The examples with these ids, part by part, in order of id: `example_id`, and of `columns` those that the parts have.

    Parts without any are not read. Raises ArtifactError naming ids that are not in the corpus.
    """
    wanted = ids.cast(pa.string()) if isinstance(ids, pa.Array) else pa.array(ids, pa.string())
    is_found = np.zeros(len(wanted), bool)
    read, parts = partial(_examples_of, artifact, wanted, columns), artifact.parts()
    for table in in_tasks(read, parts) if in_ray else map(read, parts):
        if table is not None:
            is_found |= pc.is_in(wanted, table["example_id"].combine_chunks()).to_numpy(zero_copy_only=False)
            yield table
    if not is_found.all():
        missing = wanted.filter(pa.array(~is_found))
        raise ArtifactError(f"{artifact.root.uri}: no example has the id {name_examples(missing)}.")


def _examples_of(artifact: Artifact, wanted: pa.Array, columns: list[str], part: str) -> pa.Table | None:
    """Those of a part, None where there are none."""
    footer = _footer(artifact, part)
    if footer is not None and not _may_hold(footer, wanted):
        return None
    known = set(columns) if footer is None else set(footer.schema.to_arrow_schema().names)
    table = artifact.read_table(part, ["example_id", *(name for name in columns if name in known)])
    table = table.filter(pc.is_in(table["example_id"], wanted))
    return table if len(table) else None


def _footer(artifact: Artifact, part: str) -> pq.FileMetaData | None:
    """The footer of a part; None where it is missing or damaged: reading the part raises the error with the remedy."""
    try:
        with artifact.root.filesystem.open_input_file(artifact.root.path(part)) as source:
            return pq.read_metadata(source)
    except (OSError, pa.ArrowInvalid):
        return None


def _may_hold(footer: pq.FileMetaData, ids: pa.Array) -> bool:
    """Whether one of the ids lies between a part's first and last, by the statistics in its footer."""
    ranges = [footer.row_group(group).column(0).statistics for group in range(footer.num_row_groups)]
    if not all(found is not None and found.has_min_max for found in ranges):
        return True
    first, last = min(found.min for found in ranges), max(found.max for found in ranges)
    return bool(pc.any(pc.and_(pc.greater_equal(ids, first), pc.less_equal(ids, last))).as_py())
