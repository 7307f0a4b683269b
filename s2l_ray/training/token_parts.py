"""The pool's tokens: made once, part by part, by whoever needs a part first; on a node that trains once for all its workers.

The parts lie in the run's scratch directory, near or far. A node that trains has them in one file on its own disk, which its
workers memory-map, and from which scoring there reads. A part has the hash of its rows, in both places; a damaged one is made
again.
"""

from __future__ import annotations

import functools
import io
import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from s2l_ray.config import ExamplesConfig, RunConfig, WorkerConfig
from s2l_ray.errors import cause_of
from s2l_ray.examples.ids import one_array
from s2l_ray.examples.reading import read_pool
from s2l_ray.runtime.data import quiet_ray_data, run_tasks
from s2l_ray.runtime.room import await_room
from s2l_ray.storage.artifacts import Artifact
from s2l_ray.storage.drafts import table_bytes
from s2l_ray.storage.layout import TOKENS
from s2l_ray.storage.node_files import NodeFiles, is_whole, sealed
from s2l_ray.storage.places import Storage
from s2l_ray.storage.records import FileRecord, digest
from s2l_ray.training.batches import data_order
from s2l_ray.training.token_pools import CountedRows, check_refused
from s2l_ray.training.token_rows import MappedRows, RowLimit, TokenRows
from s2l_ray.training.tokenizers import load_tokenizer, target_tokenizer
from s2l_ray.training.tokens import PartTokens, RefusedExample, encode_table

# The schema's metadata field with what was counted.
_COUNTED = b"counted"
_COLUMNS = ("example_id", "source", "tokens", "is_label")
"""One line for each row of tokens; the rows of an example stand together."""
# A vocabulary up to this size takes two bytes a token instead of four.
_SMALL_VOCABULARY = 2**16
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

    @property
    def on_node(self) -> NodeFiles:
        """What this node has of them for all its processes."""
        return NodeFiles.of(Storage(self.storage.uri.rpartition("/")[0]), self.name)

    def read(self, part: str) -> PartTokens:
        """A part's tokens, from this node's file where a training has made one; where nobody has made them they are made and
        kept.

        Raises DataError where the chat template refuses an example and that is not to be dropped.
        """
        mapped = self.on_node.find(TOKENS)
        found = mapped[self.examples.parts().index(part)] if mapped else None
        read = _from_batch(found if found is not None and is_whole(found) else self._stored(part))
        check_refused(read.refused, self.corpus)
        return read

    def _stored(self, part: str) -> pa.RecordBatch:
        """A part from the scratch directory, made where it is missing or damaged."""
        try:
            table = pq.read_table(io.BytesIO(self.storage.read(f"{self.name}/{part}")))
            batch = pa.record_batch([one_array(column) for column in table.columns], table.schema)
            if is_whole(batch):
                return batch
        except (FileNotFoundError, pa.ArrowException):
            pass
        tokenizer = _tokenizer(self.tokenizer.local_folder(""))
        batch = _to_batch(encode_table(tokenizer, read_pool(self.examples, part), self.limit), len(tokenizer))
        table = pa.Table.from_batches([batch])
        self.storage.write(f"{self.name}/{part}", table_bytes(table, ["example_id", "source", "tokens"]))
        return batch

    def missing(self) -> Collection[str]:
        """The parts that nobody has made."""
        return set(self.examples.parts()) - set(self.storage.names(self.name))

    def make(self, share: int, num_shares: int) -> None:
        """Make one of so many shares of the parts, those of it that nobody has made. Raises what `read` does."""
        missing = self.missing()
        for part in self.examples.parts()[share::num_shares]:
            if part in missing:
                check_refused(_from_batch(self._stored(part)).refused, self.corpus)

    def make_all(self, workers: WorkerConfig) -> None:
        """Make the parts that nobody has made, on all CPUs of the connected Ray. Raises what `read` does."""
        missing = sorted(self.missing())
        for _ in run_tasks(_MakePart(self, tuple(missing)), len(missing), workers) if missing else ():
            pass

    def pool(self, *, check: bool = True) -> NodePool:
        """The tokens of the whole pool, in order of its parts, from this node's file, which is made where it is missing.

        `check`: read the file and compare its hashes, once on a node; others open it then without. Raises what `read` does.
        """
        batches = self.on_node.get(TOKENS, lambda: map(self._stored, self.examples.parts()), check=check)
        counted = [json.loads(batch.schema.metadata[_COUNTED]) for batch in batches]
        refused = [RefusedExample(*found) for one in counted for found in one["refused"]]
        check_refused(refused, self.corpus)
        return NodePool(
            MappedRows(batches),
            sum(one["examples"] for one in counted),
            dict(sum((Counter(one["changed"]) for one in counted), Counter[str]())),
            refused,
            [length for one in counted for length in one["unlearned_lengths"]],
            self,
        )


@dataclass(frozen=True)
class NodePool(CountedRows):
    """The pool's tokens as they lie in a node's file; a process has next to nothing of its own of them."""

    parts: TokenParts

    def order(self, steps: int, global_batch: int, seed: int) -> np.ndarray:
        """The training's `data_order`, from this node's file, which is made where it is missing."""

        def made() -> Iterator[pa.RecordBatch]:
            batches = self.parts.on_node.find(TOKENS) or ()
            names = pa.chunked_array([pa.array(_from_batch(batch).row_ids, pa.string()) for batch in batches], pa.string())
            yield sealed(pa.record_batch({"row": data_order(names, steps, global_batch, seed)}))

        name = f"order-{digest([steps, global_batch, seed])}"
        [batch] = self.parts.on_node.get(name, made, check=True)
        return np.asarray(batch["row"].to_numpy())


@dataclass(frozen=True)
class _MakePart:
    """A task: one part."""

    parts: TokenParts
    missing: tuple[str, ...]

    def __call__(self, number: int) -> dict[str, Any]:
        return {"examples": len(self.parts.read(self.missing[number]).example_ids)}


def _to_batch(part: PartTokens, vocabulary: int) -> pa.RecordBatch:
    kind = pa.uint16() if vocabulary <= _SMALL_VOCABULARY else pa.int32()
    starts, owners = pa.array(part.tokens.starts), pa.array(part.owners)
    columns = [
        part.example_ids.take(owners).cast(pa.string()),
        part.sources.take(owners).cast(pa.string()),
        pa.LargeListArray.from_arrays(starts, pa.array(part.tokens.ids).cast(kind)),
        pa.LargeListArray.from_arrays(starts, pa.array(part.tokens.is_label)),
    ]
    counted = {
        "examples": len(part.example_ids),
        "changed": part.changed,
        "refused": part.refused,
        "unlearned_lengths": part.unlearned_lengths,
    }
    return sealed(pa.record_batch(columns, _COLUMNS, metadata={_COUNTED: json.dumps(counted).encode()}))


def _from_batch(batch: pa.RecordBatch) -> PartTokens:
    row_ids, sources, ids, marks = (batch[name] for name in _COLUMNS)
    is_first = np.ones(len(row_ids), bool)
    is_first[1:] = pc.not_equal(row_ids[1:], row_ids[:-1]).to_numpy(zero_copy_only=False)
    firsts = pa.array(np.flatnonzero(is_first))
    starts = ids.offsets.to_numpy()
    flat = ids.flatten().to_numpy().astype(np.int32, copy=False)
    tokens = TokenRows(flat, marks.flatten().to_numpy(zero_copy_only=False), starts - starts[:1])
    counted = json.loads(batch.schema.metadata[_COUNTED])
    refused = [RefusedExample(*found) for found in counted["refused"]]
    facts = (counted["changed"], refused, counted["unlearned_lengths"])
    return PartTokens(row_ids.take(firsts), sources.take(firsts), tokens, np.cumsum(is_first) - 1, *facts)


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
