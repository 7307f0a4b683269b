"""The pool's tokens, part by part: made once by whoever needs a part first, read by training and by every scoring pass."""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from s2l_ray.config import ExamplesConfig, RunConfig, WorkerConfig
from s2l_ray.errors import cause_of
from s2l_ray.examples.reading import read_pool
from s2l_ray.runtime.data import quiet_ray_data, run_tasks
from s2l_ray.runtime.room import await_room
from s2l_ray.storage.artifacts import Artifact
from s2l_ray.storage.drafts import table_bytes
from s2l_ray.storage.layout import TOKENS
from s2l_ray.storage.places import Storage
from s2l_ray.storage.records import FileRecord, digest
from s2l_ray.training.token_pools import PoolTokens, check_refused
from s2l_ray.training.token_rows import RowLimit, TokenRows
from s2l_ray.training.tokenizers import load_tokenizer, target_tokenizer
from s2l_ray.training.tokens import PartTokens, RefusedExample, encode_table

# The schema's metadata field with what was counted.
_COUNTED = b"counted"
# Raised when the same text gives other tokens than before.
SCHEMA = 2
_tokenizer = functools.lru_cache(maxsize=2)(load_tokenizer)


@dataclass(frozen=True)
class TokenParts:
    """The parts of an examples artifact under one tokenizer, in a scratch directory. Cheap to send to a worker."""

    examples: Artifact
    tokenizer: Storage
    """The tokenizer's folder."""

    limit: RowLimit
    corpus: ExamplesConfig
    """What an example does that the chat template refuses."""

    storage: Storage
    name: str
    """Stands for all that decides the tokens; the parts lie in a folder of this name."""

    @classmethod
    def of(
        cls, examples: Artifact, tokenizer: Storage, limit: RowLimit, scratch: Storage, corpus: ExamplesConfig
    ) -> TokenParts:
        """Tokens below a run's scratch directory."""
        files = {name: FileRecord.of(name, tokenizer.read(name)).sha256 for name in tokenizer.names(recursive=True)}
        name = digest([SCHEMA, examples.identity, files, asdict(limit)])
        return cls(examples, tokenizer, limit, corpus, scratch.child(TOKENS), name)

    def read(self, part: str) -> PartTokens:
        """A part's tokens; where nobody has made them they are made and kept.

        Raises DataError where the chat template refuses an example and that is not to be dropped.
        """
        try:
            read = _from_table(pq.read_table(io.BytesIO(self.storage.read(f"{self.name}/{part}"))))
        except FileNotFoundError:
            tokenizer = _tokenizer(self.tokenizer.local_folder(""))
            read = encode_table(tokenizer, read_pool(self.examples, part), self.limit)
            self.storage.write(f"{self.name}/{part}", table_bytes(_to_table(read), ["example_id", "source", "tokens"]))
        check_refused(read.refused, self.corpus)
        return read

    def pool(self) -> PoolTokens:
        """The tokens of the whole pool, in order of its parts."""
        return PoolTokens.join(map(self.read, self.examples.parts()))

    def make_all(self, workers: WorkerConfig) -> None:
        """Make the parts that nobody has made, on all CPUs of the connected Ray. Raises what `read` does."""
        missing = sorted(set(self.examples.parts()) - set(self.storage.names(self.name)))
        for _ in run_tasks(_MakePart(self, tuple(missing)), len(missing), workers) if missing else ():
            pass


@dataclass(frozen=True)
class _MakePart:
    """A task of Ray Data: one part."""

    parts: TokenParts
    missing: tuple[str, ...]

    def __call__(self, number: int) -> dict[str, Any]:
        return {"examples": len(self.parts.read(self.missing[number]).example_ids)}


def _to_table(part: PartTokens) -> pa.Table:
    """One line for each row of tokens; the rows of an example stand together."""
    starts, owners = pa.array(part.tokens.starts), pa.array(part.owners)
    columns = {
        "example_id": part.example_ids.take(owners),
        "source": part.sources.take(owners),
        "tokens": pa.LargeListArray.from_arrays(starts, pa.array(part.tokens.ids)),
        "is_label": pa.LargeListArray.from_arrays(starts, pa.array(part.tokens.is_label)),
    }
    counted = {"changed": part.changed, "refused": part.refused, "unlearned_lengths": part.unlearned_lengths}
    return pa.table(columns).replace_schema_metadata({_COUNTED: json.dumps(counted)})


def _from_table(table: pa.Table) -> PartTokens:
    table = table.combine_chunks()
    row_ids, sources, ids, marks = (
        table[name].chunk(0) if table.num_rows else table[name].combine_chunks()
        for name in ("example_id", "source", "tokens", "is_label")
    )
    is_first = np.ones(len(row_ids), bool)
    is_first[1:] = pc.not_equal(row_ids[1:], row_ids[:-1]).to_numpy(zero_copy_only=False)
    firsts = pa.array(np.flatnonzero(is_first))
    starts = ids.offsets.to_numpy()
    tokens = TokenRows(ids.flatten().to_numpy(), marks.flatten().to_numpy(zero_copy_only=False), starts - starts[:1])
    counted = json.loads(table.schema.metadata[_COUNTED])
    counted["refused"] = [RefusedExample(*found) for found in counted["refused"]]
    return PartTokens(row_ids.take(firsts), sources.take(firsts), tokens, np.cumsum(is_first) - 1, **counted)


def count_response_tokens(config: RunConfig, inputs: Mapping[str, Artifact], example_ids: pa.Array) -> np.ndarray:
    """Response tokens of each example under the target's tokenizer, int32 (N,), for a budget in tokens."""
    import ray.data

    def count(batch: dict[str, Any]) -> pa.Table:
        tokenizer = target_tokenizer(config.target, inputs["proxy"])
        table = read_pool(inputs["examples"], str(batch["part"][0]))
        found = encode_table(tokenizer, table, RowLimit.of(config.target))
        check_refused(found.refused, config.examples)
        return pa.table({"example_id": found.example_ids, "count": found.num_labels})

    await_room("target", {"CPU": 1}, 1, config.machines.target.wait_minutes)
    with quiet_ray_data():
        parts = ray.data.from_items([{"part": part} for part in inputs["examples"].parts()])
        try:
            counted = pa.concat_tables(ray.get(parts.map_batches(count, batch_size=1).to_arrow_refs()))
        except ray.exceptions.RayError as error:
            raise cause_of(error) or error from None
    rows = pc.index_in(example_ids, counted["example_id"].combine_chunks())
    # An example of which that tokenizer leaves nothing to learn has none.
    return np.asarray(pc.fill_null(counted["count"].combine_chunks().take(rows), 0).to_numpy())
