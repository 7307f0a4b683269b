"""Trajectories: the loss of every example under every checkpoint, each exactly once.

The unit of restart is one part of examples under one group of checkpoints that fit in memory together. Rows are batched
within their part, so a loss depends neither on the number of workers nor on what was interrupted. When the grid of units
is full, its columns are joined into the artifact's parts.
"""

from __future__ import annotations

import io
import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from s2l_ray.artifacts import Artifact, Draft, table_bytes
from s2l_ray.config import RunConfig
from s2l_ray.errors import DataError
from s2l_ray.examples import read_pool
from s2l_ray.progress import get_log
from s2l_ray.training.fit import Workers
from s2l_ray.training.losses import losses_of_models
from s2l_ray.training.models import load_model
from s2l_ray.training.proxy import TOKENIZER, step_folder
from s2l_ray.training.tokens import encode_table, learnable, load_tokenizer, row_counts
from s2l_ray.training.units import Unit, UnitWorker, do_units
from s2l_ray.trajectory_store import losses_of, trajectories_table

# A unit's counts of tokens and of dropped and shortened rows, kept in its schema's metadata.
COUNTS = b"counts"
# Bytes of float32 weights that one worker keeps in memory at once; more checkpoints are scored in several groups.
GROUP_BYTES = 4 * 2**30


def checkpoint_groups(steps: list[int], num_parameters: int) -> dict[str, list[int]]:
    """The checkpoints in groups of even size, each small enough to stay in one worker's memory together."""
    size = max(1, GROUP_BYTES // (4 * num_parameters))
    groups = np.array_split(np.asarray(steps), math.ceil(len(steps) / size))
    return {f"group-{i:03d}": [int(step) for step in group] for i, group in enumerate(groups)}


@dataclass(frozen=True)
class ScoringJob:
    """What a scoring worker needs; cheap to send."""

    config: RunConfig
    examples: Artifact
    proxy: Artifact
    groups: dict[str, list[int]]


def build_trajectories(config: RunConfig, inputs: Mapping[str, Artifact], draft: Draft) -> Artifact:
    """Score every pool example under every checkpoint of the proxy on a Ray Data actor pool, and publish the losses."""
    examples, proxy, machines = inputs["examples"], inputs["proxy"], config.machines.trajectories
    workers = Workers.resolve(machines, one_per_cpu=True)
    steps: list[int] = proxy.summary["steps"]
    groups = checkpoint_groups(steps, proxy.summary["num_parameters"])
    get_log("trajectories").info(
        "%d checkpoints x %s examples, %d workers, %s",
        *(len(steps), f"{examples.summary['pool']:,}", workers.num_workers, config.trajectories.precision),
    )
    units = [Unit(group, part) for group in groups for part in examples.parts()]
    job = ScoringJob(config, examples, proxy, groups)
    do_units("trajectories", units, Scorer, job, draft.work, workers)
    summary = join_units(examples.parts(), list(groups), draft)
    summary |= {"num_checkpoints": len(steps), "steps": steps}
    return draft.publish(summary, asdict(workers))


def join_units(parts: list[str], groups: list[str], draft: Draft) -> dict[str, Any]:
    """Join the units' columns into the artifact's parts; the summary's counts and mean losses."""
    rows, counts, totals_T = 0, Counter[str](), np.zeros(1)
    for part in parts:
        units = [pq.read_table(io.BytesIO(draft.work.read(Unit(group, part).path))) for group in groups]
        losses_NT = np.concatenate([losses_of(unit) for unit in units], axis=1)
        first = units[0]
        if not draft.has(part):
            columns = (first["example_id"], losses_NT, first["source"], first["num_response_tokens"])
            draft.write_table(part, trajectories_table(*columns))
        counts.update(json.loads(first.schema.metadata[COUNTS]))
        rows += len(first)
        totals_T = totals_T + losses_NT.sum(0, dtype=np.float64)
    if not rows:
        raise DataError("no example has a response token left within proxy.max_tokens. Raise it.")
    tokens = counts.pop("tokens")
    return {"rows": rows, **row_counts(counts), "tokens": tokens, "mean_losses": (totals_T / rows).round(6).tolist()}


# --- on a worker ---------------------------------------------------------------------------------------------------


class Scorer(UnitWorker):
    """Scores parts of examples under the checkpoints of a group."""

    @cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(self.job.proxy.folder(TOKENIZER))

    def load(self, group: str) -> list[Any]:
        trust = self.job.config.proxy.trust_remote_code
        folders = [self.job.proxy.folder(step_folder(step)) for step in self.job.groups[group]]
        self._steps = self.job.groups[group]
        return [load_model(folder, self._tokenizer, trust_remote_code=trust) for folder in folders]

    def work_on(self, part: str, models: list[Any]) -> bytes:
        config: RunConfig = self.job.config
        table, limit = read_pool(self.job.examples, part), config.proxy.max_tokens
        tokens, kept, changed = learnable(encode_table(self._tokenizer, table, limit), limit, self._tokenizer.eos_token_id)
        per_batch, precision = config.trajectories.tokens_per_batch, config.trajectories.precision
        losses_NT = np.stack(list(losses_of_models(models, tokens, per_batch, precision)), axis=1)
        table = table.take(pa.array(kept))
        check_finite(losses_NT, table["example_id"], self._steps)
        scored = trajectories_table(table["example_id"], losses_NT, table["source"], tokens.num_labels)
        counts = changed | {"tokens": len(tokens.ids)}
        return table_bytes(scored.replace_schema_metadata({COUNTS: json.dumps(counts)}))


def check_finite(losses_NT: np.ndarray, ids: pa.ChunkedArray, steps: list[int]) -> None:
    """Raise DataError that names the examples and steps whose loss is not finite."""
    rows, columns = np.nonzero(~np.isfinite(losses_NT))
    if len(rows):
        pairs = list(zip(rows.tolist(), columns.tolist(), strict=True))[:5]
        named = ", ".join(f"{ids[row].as_py()} at step {steps[column]}" for row, column in pairs)
        raise DataError(
            f"{len(rows):,} losses are not finite ({named}{' ...' if len(rows) > 5 else ''}): the proxy's training diverged. "
            "Lower proxy.learning_rate and train it again."
        )
