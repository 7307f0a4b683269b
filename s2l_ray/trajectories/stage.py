"""Trajectories: the loss of every example under every checkpoint, each exactly once, and statistics of its labels' losses.

The unit of restart is one part of examples under one checkpoint. Rows are batched within their part, so a loss depends
neither on the number of workers nor on what was interrupted, nor on which checkpoints are scored together. A unit's file lies
under a name that stands for all that decides its content (corpus, tokenizer, precision, device, the checkpoint's files), so it
can be made before its stage begins: while the proxy is still being trained. When the grid of units is full, its columns
are joined into the artifact's parts.
"""

from __future__ import annotations

import io
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from s2l_ray.config import RunConfig
from s2l_ray.errors import DataError
from s2l_ray.examples.ids import one_array
from s2l_ray.progress import get_log
from s2l_ray.runtime.nodes import on_every_node
from s2l_ray.runtime.pool import Throughput, Unit, UnitWorker, do_units
from s2l_ray.runtime.workers import Workers
from s2l_ray.storage.artifacts import Artifact
from s2l_ray.storage.drafts import Draft, table_bytes
from s2l_ray.storage.layout import CHECKPOINT, LOSSES, TOKENIZER, TOKENS, VALIDATION_ROWS, step_folder
from s2l_ray.storage.places import Storage
from s2l_ray.storage.records import digest
from s2l_ray.storage.stages import Context
from s2l_ray.training.checkpoints import checkpoint_folder, checkpoint_records
from s2l_ray.training.flops import matmul_flops_per_second, scoring_flops
from s2l_ray.training.losses import full_path, losses_of_models, statistics_of_models
from s2l_ray.training.models import load_model
from s2l_ray.training.token_parts import TokenParts
from s2l_ray.training.token_pools import check_refused, row_counts, said_counts
from s2l_ray.training.token_rows import RowLimit
from s2l_ray.training.tokenizers import load_tokenizer
from s2l_ray.training.tokens import NO_LABEL, PartTokens, RefusedExample
from s2l_ray.trajectories.beside import VALIDATION, columns_beside, joined, passes_beside, validation_rows
from s2l_ray.trajectories.loss_columns import LOSS_WITHOUT_PROMPT, STATISTICS, trajectories_table
from s2l_ray.trajectories.units import losses_folder

# Bytes of float32 weights that one worker keeps in memory at once; more checkpoints are scored in several passes.
TOGETHER_BYTES = 4 * 2**30
# Files read at once where they are far away.
READERS = 8
# The column of a unit's losses; its other columns are those of the artifact.
LOSS = "loss"


def models_together(num_parameters: int) -> int:
    """How many checkpoints of a proxy one worker keeps in memory and scores in one pass over the corpus."""
    return max(1, TOGETHER_BYTES // (4 * num_parameters))


@dataclass(frozen=True)
class ScoringJob:
    """What a scoring worker needs; cheap to send."""

    config: RunConfig
    parts: TokenParts
    proxy: Storage
    steps: dict[str, int]
    """Checkpoint's name -> its step."""

    beside: dict[str, int]
    """The same for the units of the last checkpoint beside its losses (see `beside`)."""

    device: str
    """Where it is computed: another kind of processor gives other last bits."""

    @classmethod
    def of(
        cls,
        config: RunConfig,
        examples: Artifact,
        proxy: Storage,
        steps: list[int],
        scratch: Storage,
        device: str = "cpu",
        *,
        are_all: bool = False,
    ) -> ScoringJob:
        """The scoring of checkpoints in the proxy's directory; a name holds the hash of the checkpoint's files. `are_all`: the
        last of these steps is the training's."""
        parts = TokenParts.of(examples, proxy.child(TOKENIZER), RowLimit.of(config.proxy), scratch, config.examples)
        files = {step: [asdict(record) for record in checkpoint_records(proxy, step)] for step in steps}
        names = {f"{step_folder(step)}-{digest(files[step])}": step for step in steps}
        last = list(names.items())[-1:] if are_all else []
        beside = {f"{name}-{kind}": step for name, step in last for kind in passes_beside(config)}
        return cls(config, parts, proxy, names, beside, device)

    @property
    def units(self) -> list[Unit]:
        return [Unit(name, part) for name in (*self.steps, *self.beside) for part in self.parts.examples.parts()]

    def work(self, scratch: Storage) -> Storage:
        """Where the units' files lie."""
        return scratch.child(losses_folder(self.parts.name, self.config, self.device))


def build(context: Context) -> Artifact:
    """Score every pool example under every checkpoint of the proxy on a Ray Data actor pool, and publish the losses."""
    config, draft = context.config, context.draft
    examples, proxy = context.inputs["examples"], context.inputs["proxy"]
    workers = Workers.resolve(context.machines, one_per_cpu=True)
    steps: list[int] = proxy.summary["steps"]
    get_log("trajectories").info(
        "%d checkpoints x %s examples, %s, %s",
        *(len(steps), f"{examples.summary['pool']:,}", workers, config.trajectories.precision),
    )
    for step in steps:  # the workers check the files that it lists
        proxy.read_bytes(f"{step_folder(step)}/{CHECKPOINT}")
    proxy.folder(TOKENIZER)
    job = ScoringJob.of(config, examples, proxy.root, steps, draft.shared, workers.device, are_all=True)
    work, together = job.work(draft.shared), models_together(proxy.summary["num_parameters"])
    begun = time.monotonic()
    throughput = do_units("trajectories", job.units, Scorer, job, work, workers, together=together)
    log_throughput(throughput, time.monotonic() - begun)
    summary = join_units(job, work, draft)
    summary |= {"num_checkpoints": len(steps), "steps": steps}
    artifact = draft.publish(summary, asdict(workers))
    for name in (LOSSES, TOKENS):
        draft.shared.delete(name)
    on_every_node(job.parts.on_node.delete)
    return artifact


def log_throughput(done: Throughput, seconds: float) -> None:
    """Log how fast it went, and the model FLOPs utilization."""
    if done.seconds:
        get_log("trajectories").info(
            "%.1fk tokens/s; a worker computes %.1f GFLOP/s, %.0f%% of its measured matrix-product rate",
            *(done.tokens / seconds / 1e3, done.flops / done.seconds / 1e9, 100 * done.utilization),
        )


def join_units(job: ScoringJob, work: Storage, draft: Draft) -> dict[str, Any]:
    """Join the units' columns into the artifact's parts; the summary's counts and mean losses."""
    rows, num_tokens, counts, totals_T = 0, 0, Counter[str](), np.zeros(len(job.steps))
    refused, validation = list[RefusedExample](), list[pa.Table]()
    with ThreadPoolExecutor(READERS) as pool:
        for part in job.parts.examples.parts():
            reading = pool.submit(job.parts.read, part)
            units = [Unit(name, part) for name in job.steps]
            found = list(pool.map(partial(_unit_table, work), units))
            columns = {name: np.stack([unit[name].to_numpy() for unit in found], axis=1) for name in found[0].column_names}
            losses_NT = columns.pop(LOSS)
            beside = {kind: _unit_table(work, Unit(name, part)) for name in job.beside for kind in [name.rpartition("-")[2]]}
            validation += [beside.pop(VALIDATION)] if VALIDATION in beside else []
            read = reading.result()
            if not draft.has(part):
                alone = {name: one_array(table[name]) for table in beside.values() for name in table.column_names}
                rows_of_part = (read.example_ids, losses_NT, read.sources, read.num_labels)
                draft.write_table(part, trajectories_table(*rows_of_part, columns, alone))
            counts.update(read.changed)
            refused += read.refused
            rows += len(losses_NT)
            num_tokens += len(read.tokens.ids)
            totals_T += losses_NT.sum(0, dtype=np.float64)
    check_refused(refused, job.config.examples, "proxy", rows + counts[NO_LABEL] + len(refused))
    for line in said_counts(counts, refused) if job.config.proxy.checkpoints else ():  # else the training has said it
        get_log("trajectories").info(line)
    if validation and (table := joined(validation)) is not None and not draft.has(VALIDATION_ROWS):
        draft.write_table(VALIDATION_ROWS, table)
    if not rows:
        raise DataError("no example has a response token left within proxy.max_tokens. Raise it.")
    return {
        "rows": rows,
        **row_counts(counts, refused),
        "tokens": num_tokens,
        "mean_losses": (totals_T / rows).round(6).tolist(),
    }


def _unit_table(work: Storage, unit: Unit) -> pa.Table:
    """What a unit has of each example: `loss` and the statistics that are recorded, or what is recorded beside."""
    return pq.read_table(io.BytesIO(work.read(unit.path))).combine_chunks()


# --- on a worker ---------------------------------------------------------------------------------------------------


class Scorer(UnitWorker):
    """Scores parts of examples under checkpoints."""

    _rate = 0.0

    def load(self, model: str) -> Any:
        step = (self.job.steps | self.job.beside)[model]
        folder = checkpoint_folder(self.job.proxy, step)
        return load_model(folder, self._tokenizer, trust_remote_code=self.job.config.proxy.trust_remote_code)

    @cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(self.job.proxy.local_folder(TOKENIZER))

    def work_on(self, part: str, models: Mapping[str, Any]) -> Iterator[tuple[str, bytes]]:
        import torch

        options = self.job.config.trajectories
        if not self._rate:
            precision = torch.bfloat16 if options.precision == "bfloat16" else torch.float32
            self._rate = matmul_flops_per_second(self.device, precision)
        begun = time.perf_counter()
        read = self.job.parts.read(part)
        for name in self.job.beside.keys() & models.keys():
            yield name, self._beside(name, models[name], part, read)
        models = {name: model for name, model in models.items() if name in self.job.steps}
        if not models:
            return
        for name, found in zip(models, self._columns(list(models.values()), read), strict=True):
            losses_N = found[LOSS]
            check_finite(losses_N, read.example_ids, self.job.steps[name], options.precision)
            yield name, table_bytes(pa.table(found), [])
            needed = scoring_flops(models[name], read.tokens.lengths, int(read.num_labels.sum()))
            self.throughput.add(len(losses_N), len(read.tokens.ids), needed, time.perf_counter() - begun, self._rate)
            if full_path:
                self.throughput.note = min(full_path)
            begun = time.perf_counter()

    def _beside(self, name: str, model: Any, part: str, read: PartTokens) -> bytes:
        """The file of a unit beside the losses."""
        job = self.job
        if name.endswith(VALIDATION):
            return table_bytes(validation_rows(model, self._tokenizer, job.parts.examples, part, job.config), [])
        columns = columns_beside(model, self._tokenizer, read, job.config)
        if LOSS_WITHOUT_PROMPT in columns:
            losses_N = columns[LOSS_WITHOUT_PROMPT].to_numpy()
            check_finite(losses_N, read.example_ids, job.beside[name], job.config.trajectories.precision)
        return table_bytes(pa.table(columns), [])

    def _columns(self, models: list[Any], read: PartTokens) -> Iterator[dict[str, np.ndarray]]:
        """Model by model what a unit's file has."""
        options = self.job.config.trajectories
        rows = (models, read.tokens, options.tokens_per_batch, options.precision)
        if not options.statistics:
            yield from ({LOSS: losses_N} for losses_N in losses_of_models(*rows, owners=read.owners))
            return
        for losses_N, *statistics in statistics_of_models(*rows, owners=read.owners):
            yield {LOSS: losses_N, **dict(zip(STATISTICS, statistics, strict=True))}


def check_finite(losses_N: np.ndarray, ids: pa.Array, step: int, precision: str) -> None:
    """Raise DataError that names the examples whose loss under the checkpoint of a step is not finite."""
    rows = np.flatnonzero(~np.isfinite(losses_N))
    if len(rows):
        named = ", ".join(ids[row].as_py() for row in rows[:5].tolist())
        remedy = "Lower proxy.learning_rate and train it again"
        remedy += ", or score in float32 (trajectories.precision)" if precision != "float32" else ""
        raise DataError(
            f"{len(rows):,} losses at step {step} are not finite ({named}{' ...' if len(rows) > 5 else ''}): the proxy's "
            f"training diverged. {remedy}."
        )
