"""Trajectories: the loss of every example under every checkpoint, each exactly once.

The unit of restart is one part of examples under one checkpoint. Rows are batched within their part, so a loss depends
neither on the number of workers nor on what was interrupted, nor on which checkpoints are scored together. A unit's file lies
under a name that stands for all that decides its content (corpus, tokenizer, precision, device, the checkpoint's files), so it
can be made before its stage begins: while the proxy is still being trained. When the grid of units is full, its columns
are joined into the artifact's parts.
"""

from __future__ import annotations

import io
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from s2l_ray.artifacts import LOSSES, TOKENS, Artifact, Draft, Storage, digest, table_bytes
from s2l_ray.config import RunConfig
from s2l_ray.errors import DataError
from s2l_ray.progress import get_log
from s2l_ray.session import free_room
from s2l_ray.training.fit import Workers
from s2l_ray.training.limits import operations, product_rate
from s2l_ray.training.losses import full_path, losses_of_models
from s2l_ray.training.models import load_model
from s2l_ray.training.proxy import CHECKPOINT, TOKENIZER, checkpoint_folder, checkpoint_records, finished_steps, step_folder
from s2l_ray.training.token_parts import PartTokens, TokenParts
from s2l_ray.training.tokens import load_tokenizer, row_counts
from s2l_ray.training.units import Effort, Unit, UnitWorker, do_units, tasks
from s2l_ray.trajectory_store import trajectories_table

# Bytes of float32 weights that one worker keeps in memory at once; more checkpoints are scored in several passes.
TOGETHER_BYTES = 4 * 2**30
# How often finished checkpoints and idle machines are looked for while the proxy is trained.
POLL_SECONDS = 2.0
# A training that says nothing for so long may be down, and waiting for the machines that scoring holds.
SILENT_SECONDS = 30.0
# Units per call while the training goes on: between calls its needs are looked at again.
UNITS_BESIDE = 16
# Raised when the same checkpoint gives other losses than before.
SCHEMA = 1
# Files read at once where they are far away.
READERS = 8


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

    device: str
    """Where it is computed: another kind of processor gives other last bits."""

    @classmethod
    def of(
        cls, config: RunConfig, examples: Artifact, proxy: Storage, steps: list[int], scratch: Storage, device: str = "cpu"
    ) -> ScoringJob:
        """The scoring of checkpoints in the proxy's directory; a name holds the hash of the checkpoint's files."""
        parts = TokenParts.of(examples, proxy.child(TOKENIZER), config.proxy.max_tokens, scratch)
        files = {step: [asdict(record) for record in checkpoint_records(proxy, step)] for step in steps}
        return cls(config, parts, proxy, {f"{step_folder(step)}-{digest(files[step])}": step for step in steps}, device)

    @property
    def units(self) -> list[Unit]:
        return [Unit(name, part) for name in self.steps for part in self.parts.examples.parts()]

    def work(self, scratch: Storage) -> Storage:
        """Where the units' files lie."""
        recipe = self.config.trajectories.model_dump(mode="json")
        return scratch.child(f"{LOSSES}/{digest([SCHEMA, self.parts.name, recipe, self.device])}")


def build_trajectories(config: RunConfig, inputs: Mapping[str, Artifact], draft: Draft) -> Artifact:
    """Score every pool example under every checkpoint of the proxy on a Ray Data actor pool, and publish the losses."""
    examples, proxy = inputs["examples"], inputs["proxy"]
    workers = Workers.resolve(config.machines.trajectories, one_per_cpu=True)
    steps: list[int] = proxy.summary["steps"]
    get_log("trajectories").info(
        "%d checkpoints x %s examples, %s, %s",
        *(len(steps), f"{examples.summary['pool']:,}", workers, config.trajectories.precision),
    )
    for step in steps:  # the workers check the files that it lists
        proxy.read_bytes(f"{step_folder(step)}/{CHECKPOINT}")
    proxy.folder(TOKENIZER)
    job = ScoringJob.of(config, examples, proxy.root, steps, draft.shared, workers.device)
    work, together = job.work(draft.shared), models_together(proxy.summary["num_parameters"])
    begun = time.monotonic()
    effort = do_units("trajectories", job.units, Scorer, job, work, workers, together=together)
    log_effort(effort, time.monotonic() - begun)
    summary = join_units(job, work, draft)
    summary |= {"num_checkpoints": len(steps), "steps": steps}
    artifact = draft.publish(summary, asdict(workers))
    for name in (LOSSES, TOKENS):
        draft.shared.delete(name)
    return artifact


def log_effort(effort: Effort, seconds: float) -> None:
    """Say how fast it went, and how much of what the machine can do that is."""
    if effort.seconds:
        get_log("trajectories").info(
            "%.1fk tokens/s; a worker computes %.1f GFLOP/s, %.0f%% of its measured matrix-product rate",
            *(effort.tokens / seconds / 1e3, effort.operations / effort.seconds / 1e9, 100 * effort.share),
        )


def join_units(job: ScoringJob, work: Storage, draft: Draft) -> dict[str, Any]:
    """Join the units' columns into the artifact's parts; the summary's counts and mean losses."""
    rows, num_tokens, counts, totals_T = 0, 0, Counter[str](), np.zeros(len(job.steps))
    with ThreadPoolExecutor(READERS) as pool:
        for part in job.parts.examples.parts():
            reading = pool.submit(job.parts.read, part)
            units = [Unit(name, part) for name in job.steps]
            losses_NT = np.stack(list(pool.map(partial(_unit_losses, work), units)), axis=1)
            read = reading.result()
            if not draft.has(part):
                columns = (read.example_ids, losses_NT, read.sources, read.tokens.num_labels)
                draft.write_table(part, trajectories_table(*columns))
            counts.update(read.changed)
            rows += len(losses_NT)
            num_tokens += len(read.tokens.ids)
            totals_T += losses_NT.sum(0, dtype=np.float64)
    if not rows:
        raise DataError("no example has a response token left within proxy.max_tokens. Raise it.")
    return {"rows": rows, **row_counts(dict(counts)), "tokens": num_tokens, "mean_losses": (totals_T / rows).round(6).tolist()}


def _unit_losses(work: Storage, unit: Unit) -> np.ndarray:
    table = pq.read_table(io.BytesIO(work.read(unit.path)))
    return np.asarray(table["loss"].combine_chunks().to_numpy())


# --- beside the training -------------------------------------------------------------------------------------------


class ScoringBeside:
    """Scores finished checkpoints while the proxy's training goes on, as long as the cluster has workers to spare.

    Ray Train's ValidationConfig would validate a reported checkpoint as a whole; this does units, which are kept whatever
    is interrupted, takes only what the training leaves, and gives it back when the training falls silent, since its
    workers may be starting again. What it has not done when the training ends is done by the next stage on all workers.
    """

    def __init__(self, config: RunConfig, examples: Artifact, scratch: Storage) -> None:
        self._config, self._examples, self._scratch = config, examples, scratch
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._heard = time.monotonic()
        self.num_units = 0

    def hear(self, proxy: Storage) -> None:
        """To be called whenever the training says something: it holds its workers."""
        self._heard = time.monotonic()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, args=(proxy,), daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Begin no more units, and return when those in work are done, or have not been for long."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(SILENT_SECONDS)
        if self.num_units:
            get_log("trajectories").info("%d units were scored beside the training", self.num_units)

    def _must_stop(self) -> bool:
        return self._stopped.is_set() or time.monotonic() - self._heard > SILENT_SECONDS

    def _run(self, proxy: Storage) -> None:
        complained = False
        while not self._stopped.wait(POLL_SECONDS):
            try:
                while not self._must_stop() and self._score_some(proxy):
                    pass
            except Exception as error:  # noqa: BLE001 - whatever it is, it must not end the training; the stage itself meets it
                if not complained:
                    get_log("trajectories").warning("not scored beside the training: %s", str(error).strip() or repr(error))
                complained = True

    def _score_some(self, proxy: Storage) -> bool:
        """Score a few units, of the first checkpoints before later ones; False where there is nothing to do, or no room."""
        workers = spare_workers(Workers.resolve(self._config.machines.trajectories, one_per_cpu=True))
        steps = finished_steps(proxy)
        if workers is None or not steps:
            return False
        job = ScoringJob.of(self._config, self._examples, proxy, steps, self._scratch, workers.device)
        work = job.work(self._scratch)
        some = [Unit(task.models[0], task.part) for task in tasks(job.units, work, 1)[: UNITS_BESIDE * workers.num_workers]]
        if not some:
            return False
        do_units("trajectories", some, Scorer, job, work, workers, stop=self._must_stop, show=False)
        self.num_units += len(some) - len(tasks(some, work, 1))
        return True


def spare_workers(workers: Workers) -> Workers | None:
    """As many of the scoring workers as the nodes of the connected Ray have room for now, None if for none."""
    number = min(workers.num_workers, free_room(workers.resources))
    return replace(workers, num_workers=number, min_workers=number) if number else None


# --- on a worker ---------------------------------------------------------------------------------------------------


class Scorer(UnitWorker):
    """Scores parts of examples under checkpoints."""

    _rate = 0.0

    def load(self, model: str) -> Any:
        proxy, step = self.job.proxy, self.job.steps[model]
        tokenizer = load_tokenizer(proxy.local_folder(TOKENIZER))
        return load_model(checkpoint_folder(proxy, step), tokenizer, trust_remote_code=self.job.config.proxy.trust_remote_code)

    def work_on(self, part: str, models: Mapping[str, Any]) -> Iterator[tuple[str, bytes]]:
        import torch

        options = self.job.config.trajectories
        if not self._rate:
            precision = torch.bfloat16 if options.precision == "bfloat16" else torch.float32
            self._rate = product_rate(self.device, precision)
        begun = time.perf_counter()
        read: PartTokens = self.job.parts.read(part)
        losses = losses_of_models(list(models.values()), read.tokens, options.tokens_per_batch, options.precision)
        for name, losses_N in zip(models, losses, strict=True):
            check_finite(losses_N, read.example_ids, self.job.steps[name], options.precision)
            yield name, table_bytes(pa.table({"loss": losses_N}), [])
            needed = operations(models[name], read.tokens.lengths, int(read.tokens.num_labels.sum()))
            self.effort.add(len(losses_N), len(read.tokens.ids), needed, time.perf_counter() - begun, self._rate)
            if full_path:
                self.effort.note = min(full_path)
            begun = time.perf_counter()


def check_finite(losses_N: np.ndarray, ids: pa.ChunkedArray, step: int, precision: str) -> None:
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
