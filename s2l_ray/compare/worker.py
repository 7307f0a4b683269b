"""A worker that trains the targets of many cells, one after the other, and evaluates each: it starts up once for all."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from s2l_ray.compare.cells import CellSpec
from s2l_ray.evaluation.held_out import HeldOut, evaluate_rows
from s2l_ray.runtime.pool import UnitWorker
from s2l_ray.storage.artifacts import Artifact
from s2l_ray.storage.drafts import table_bytes
from s2l_ray.storage.places import Storage
from s2l_ray.training.batches import data_order, subset_steps
from s2l_ray.training.fine_tuning import fine_tune_here, training_loss
from s2l_ray.training.models import check_positions, count_parameters, make_model
from s2l_ray.training.token_pools import PoolTokens, pool_tokens
from s2l_ray.training.token_rows import RowLimit
from s2l_ray.training.tokenizers import target_tokenizer
from s2l_ray.training.training_run import TrainingRun

FACTS = b"facts"
"""The field of a unit's schema metadata with the facts of its training."""


@dataclass(frozen=True)
class CellsJob:
    """What a worker needs."""

    examples: Artifact
    proxy: Artifact
    """Of the run: its tokenizer is that of a target from scratch, the same for every cell."""

    specs: Mapping[str, CellSpec]
    """By their names in scratch."""

    subsets: Storage
    """For each of these names a Parquet file of `example_id` and `weight`."""

    held_out_parts: list[str]
    generated_ids: frozenset[str]


class CellWorker(UnitWorker):
    """Loads a cell's model by training it."""

    job: CellsJob

    @cached_property
    def _tokens(self) -> dict[str, tuple[Any, PoolTokens, HeldOut]]:
        return {}

    def _known(self, one: CellSpec) -> tuple[Any, PoolTokens, HeldOut]:
        """Tokenizer, the pool's tokens and the held-out rows: made once for all cells of one target."""
        target = one.config.target
        name = target.model_dump_json(include={"model", "revision", "tokenizer", "max_tokens", "truncation"})
        if name not in self._tokens:
            tokenizer = target_tokenizer(target, self.job.proxy)
            pool = pool_tokens(self.job.examples, tokenizer, RowLimit.of(target))
            pool.check("target", RowLimit.of(target), one.config.examples)
            held_out = HeldOut.read(one.config, self.job.examples, self.job.held_out_parts, tokenizer)
            self._tokens[name] = tokenizer, pool, held_out
        return self._tokens[name]

    def load(self, model: str) -> Any:
        """The target of a cell, trained on its subset."""
        one, begun = self.job.specs[model], time.monotonic()
        tokenizer, pool, _ = self._known(one)
        subset = pq.read_table(io.BytesIO(self.job.subsets.read(f"{model}.parquet")))
        rows = np.flatnonzero(pc.is_in(pool.example_ids, subset["example_id"].combine_chunks()).to_numpy(zero_copy_only=False))
        config = one.config.target
        steps = subset_steps(max(len(subset), len(rows)), config.epochs, config.global_batch_size)
        order = rows[data_order([pool.row_ids[row] for row in rows], steps, config.global_batch_size, config.seed)]
        weights = None
        if config.use_weights:
            of_id = dict(zip(subset["example_id"].to_pylist(), subset["weight"].to_pylist(), strict=True))
            weights = np.zeros(len(pool.row_ids))
            weights[rows] = [of_id[one] for one in pool.example_ids.take(pa.array(rows)).to_pylist()]
        run = TrainingRun(one.name, config, order, pool.tokens, (), steps, 0, weights)
        made = make_model(config, tokenizer)
        check_positions(made, config.max_tokens, "target")
        trainer = fine_tune_here(run, made, tokenizer, self.device.type, one.config.machines.target.device_batch_size)
        self._facts = {
            "steps": steps,
            "tokens": int(pool.tokens.lengths[order].sum()),
            "supervised_tokens": int(pool.tokens.num_labels[order].sum(dtype=np.int64)),
            "num_parameters": count_parameters(made),
            "training_loss": training_loss(trainer),
            "training_seconds": round(time.monotonic() - begun, 2),
        }
        return trainer.model

    def work_on(self, part: str, models: Mapping[str, Any]) -> Iterator[tuple[str, bytes]]:  # noqa: ARG002 - a cell is one part
        for name, model in models.items():
            one, begun = self.job.specs[name], time.monotonic()
            tokenizer, _, held_out = self._known(one)
            evaluated = evaluate_rows(model, tokenizer, held_out, one.config, self.job.generated_ids)
            kept = evaluated.select(["example_id", "source", "loss", "num_response_tokens", "scores"])  # no texts
            facts = self._facts | {"evaluation_seconds": round(time.monotonic() - begun, 2)}
            yield name, table_bytes(kept.replace_schema_metadata({FACTS: json.dumps(facts)}))
