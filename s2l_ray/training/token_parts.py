"""The pool's tokens, part by part: made once by whoever needs a part first, read by training and by every scoring pass."""

from __future__ import annotations

import functools
import io
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from s2l_ray.config import RunConfig
from s2l_ray.errors import cause_of
from s2l_ray.examples.reading import read_pool
from s2l_ray.runtime.data import quiet_ray_data
from s2l_ray.runtime.room import await_room
from s2l_ray.storage.artifacts import Artifact
from s2l_ray.storage.drafts import table_bytes
from s2l_ray.storage.layout import TOKENS
from s2l_ray.storage.places import Storage
from s2l_ray.storage.records import FileRecord, digest
from s2l_ray.training.token_rows import TokenRows
from s2l_ray.training.tokenizers import load_tokenizer, target_tokenizer
from s2l_ray.training.tokens import encode_table, learnable

# The schema's metadata field with the counts of dropped and shortened rows.
_CHANGED = b"changed"
# Raised when the same text gives other tokens than before.
SCHEMA = 1
_tokenizer = functools.lru_cache(maxsize=2)(load_tokenizer)


@dataclass(frozen=True)
class PartTokens:
    """One part of the pool: the rows that have a label."""

    example_ids: pa.ChunkedArray
    sources: pa.ChunkedArray
    tokens: TokenRows
    changed: dict[str, int]
    """Rows dropped and shortened, by reason."""


@dataclass(frozen=True)
class TokenParts:
    """The parts of an examples artifact under one tokenizer, in a scratch directory. Cheap to send to a worker."""

    examples: Artifact
    tokenizer: Storage
    """The tokenizer's folder."""

    max_tokens: int
    storage: Storage
    name: str
    """Stands for all that decides the tokens; the parts lie in a folder of this name."""

    @classmethod
    def of(cls, examples: Artifact, tokenizer: Storage, max_tokens: int, scratch: Storage) -> TokenParts:
        """Tokens below a run's scratch directory."""
        files = {name: FileRecord.of(name, tokenizer.read(name)).sha256 for name in tokenizer.names(recursive=True)}
        return cls(
            examples, tokenizer, max_tokens, scratch.child(TOKENS), digest([SCHEMA, examples.identity, files, max_tokens])
        )

    def read(self, part: str) -> PartTokens:
        """A part's tokens; where nobody has made them they are made and kept."""
        try:
            table = pq.read_table(io.BytesIO(self.storage.read(f"{self.name}/{part}")))
        except FileNotFoundError:
            table = self._make(part)
            self.storage.write(f"{self.name}/{part}", table_bytes(table, ["source", "tokens"]))
        ids, marks = table["tokens"].combine_chunks(), table["is_label"].combine_chunks()
        starts = ids.offsets.to_numpy()
        tokens = TokenRows(ids.flatten().to_numpy(), marks.flatten().to_numpy(zero_copy_only=False), starts - starts[:1])
        changed = json.loads(table.schema.metadata[_CHANGED])
        return PartTokens(table["example_id"], table["source"], tokens, changed)

    def pool(self) -> tuple[list[str], TokenRows, dict[str, int]]:
        """Ids and tokens of the whole pool, in order of its parts, and the counts of dropped and shortened rows."""
        ids: list[str] = []
        rows: list[TokenRows] = []
        changed: Counter[str] = Counter()
        for part in map(self.read, self.examples.parts()):
            ids += part.example_ids.to_pylist()
            rows.append(part.tokens)
            changed.update(part.changed)
        return ids, TokenRows.join(rows), dict(changed)

    def _make(self, part: str) -> pa.Table:
        tokenizer = _tokenizer(self.tokenizer.local_folder(""))
        table = read_pool(self.examples, part)
        encoded = encode_table(tokenizer, table, self.max_tokens)
        tokens, kept, changed = learnable(encoded, self.max_tokens, tokenizer.eos_token_id)
        starts = pa.array(tokens.starts)
        columns = {
            "example_id": table["example_id"].take(pa.array(kept)),
            "source": table["source"].take(pa.array(kept)),
            "tokens": pa.LargeListArray.from_arrays(starts, pa.array(tokens.ids)),
            "is_label": pa.LargeListArray.from_arrays(starts, pa.array(tokens.is_label)),
        }
        return pa.table(columns).replace_schema_metadata({_CHANGED: json.dumps(changed)})


def count_response_tokens(config: RunConfig, inputs: Mapping[str, Artifact], example_ids: pa.Array) -> np.ndarray:
    """Response tokens of each example under the target's tokenizer, int32 (N,), for a budget in tokens."""
    import ray.data

    def count(batch: dict[str, Any]) -> pa.Table:
        tokenizer = target_tokenizer(config.target, inputs["proxy"])
        table = read_pool(inputs["examples"], str(batch["part"][0]))
        tokens = encode_table(tokenizer, table, config.target.max_tokens)
        return pa.table({"example_id": table["example_id"], "count": tokens.num_labels})

    await_room("target", {"CPU": 1}, 1, config.machines.target.wait_minutes)
    with quiet_ray_data():
        parts = ray.data.from_items([{"part": part} for part in inputs["examples"].parts()])
        try:
            counted = pa.concat_tables(ray.get(parts.map_batches(count, batch_size=1).to_arrow_refs()))
        except ray.exceptions.RayError as error:
            raise cause_of(error) or error from None
    rows = pc.index_in(example_ids, counted["example_id"].combine_chunks())
    return np.asarray(counted["count"].combine_chunks().take(rows).to_numpy())
