"""The subset for another trainer: the corpus's own rows as one file."""

from __future__ import annotations

import io
import json

import pyarrow.parquet as pq

from s2l_ray.errors import ArtifactError
from s2l_ray.storage.artifacts import Artifact
from s2l_ray.storage.places import Storage, absolute_uri


def export_subset(run_dir: str, file_format: str, output: str, subset: str = "selected") -> int:
    """Write the subset's rows to one JSON Lines or Parquet file, whole or not at all; how many they are."""
    selection = Artifact.read(Storage(run_dir).child("selection"))
    if f"{subset}.parquet" not in selection.manifest["files"]:
        hint = " Set evaluation.random_control=true for a random control." if subset == "random" else ""
        known = ", ".join(path.removesuffix(".parquet") for path in selection.manifest["files"])
        raise ArtifactError(f"{run_dir}: has no subset '{subset}'. There are: {known}.{hint}")
    folder, _, name = absolute_uri(output).rpartition("/")
    data = selection.read_bytes(f"{subset}.parquet")
    if file_format == "jsonl":
        table = pq.read_table(io.BytesIO(data))
        lines = (json.dumps(row, ensure_ascii=False, default=str) for batch in table.to_batches() for row in batch.to_pylist())
        data = "".join(f"{line}\n" for line in lines).encode()
    Storage(folder).write(name, data)
    return int(selection.summary["rows"])
