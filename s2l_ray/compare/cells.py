"""Cells of a comparison: one arm, budget and seed each, a target trained on that subset and its losses on the held-out rows.

A cell is a directory `compare/ARM-BUDGET-seedK/` with a manifest of its own, so it is built once, whoever asks: a comparison
that was interrupted goes on, and another comparison over the same run takes what it shares. Its recipe is all that decides
its losses; a cell of the same name and another recipe is refused with the fields that differ.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from s2l_ray.compare.arms import FULL, RANDOM, Arm, with_settings
from s2l_ray.compare.statistics import Cell
from s2l_ray.config import RunConfig
from s2l_ray.config.comparing import CompareConfig
from s2l_ray.errors import ArtifactError, ConfigError, DataError
from s2l_ray.selection.choosing import num_examples
from s2l_ray.storage.artifacts import Artifact, Key, adopt, refusal
from s2l_ray.storage.drafts import Draft
from s2l_ray.storage.layout import CELL_LOSSES, CELL_SUBSET, COMPARE
from s2l_ray.storage.ownership import check_stage, read_building
from s2l_ray.storage.places import Storage

SCHEMA = 1
"""Raised when the same recipe gives other losses than before."""
_SEEDED = ("proxy", "clustering", "selection", "target")
# What of the config decides how a cell is evaluated.
_EVALUATION = {"answer_pattern", "summary_sources", "max_generations", "max_new_tokens", "split"}
ANOTHER = "A comparison keeps its settings: give another --run-dir (with --reuse RUN_DIR it takes from this one what matches)"


@dataclass(frozen=True)
class CellSpec:
    """What a cell is made from."""

    arm: str
    budget: int
    """Under which it is compared."""

    examples: int
    """How many it trains on: as many, but for an arm that spends more on data."""

    seed: int
    """0 for the run's own seeds, k for each of them + k."""

    config: RunConfig
    """The arm's, with this budget and these seeds."""

    key: Key

    @property
    def name(self) -> str:
        """Its directory in the comparison's."""
        return self.key.stage.rpartition("/")[2]

    @property
    def unit(self) -> str:
        """Names it in scratch: another recipe, another name."""
        return f"{self.name}-{self.key.fingerprint}"

    def take(self, run: Storage, other: Storage) -> bool:
        """Take the finished cell of another run by reference, if it has the same fingerprint; whether it has."""
        found = Artifact.find(other.child(self.key.stage))
        if found is None or found.fingerprint != self.key.fingerprint:
            return False
        check_stage(run.child(self.key.stage), self.key.stage)
        found.check_sizes()
        adopt(run, found)
        return True

    def find(self, run: Storage) -> Artifact | None:
        """The finished cell, if it is there. Raises ArtifactError where one of another recipe is."""
        found = Artifact.find(run.child(self.key.stage))
        if found is not None and found.fingerprint != self.key.fingerprint:
            raise ArtifactError(refusal(found.storage, self.key, found.manifest, ANOTHER))
        return found


def resolved(config: RunConfig) -> RunConfig:
    """A config with its section `compare`. Of a proxy whose checkpoints are given no seed can redo anything."""
    compare = config.compare or CompareConfig()
    if config.proxy.checkpoints and compare.redo_from == "proxy":
        compare = compare.model_copy(update={"redo_from": "clustering"})
    return config.model_copy(update={"compare": compare})


def seeded(config: RunConfig, arm: Arm, seed: int) -> RunConfig:
    """An arm's config under a seed: what the comparison redoes gets its seeds + `seed`, and the target's random weights
    stay."""
    compare = config.compare or CompareConfig()
    changed = arm.config(config)
    if not seed:
        return changed
    first = "target" if arm.name == FULL else "proxy" if arm.redoes_proxy else compare.redo_from
    sections = _SEEDED[_SEEDED.index(first) :]
    values: dict[str, Any] = {f"{name}.seed": getattr(changed, name).seed + seed for name in sections}
    scratch = getattr(changed.target.model, "scratch", None)
    if scratch is not None and scratch.seed is None:
        values["target.model.scratch.seed"] = changed.target.seed
    return with_settings(changed, values, f"compare.seeds, seed {seed}")


def spec(
    config: RunConfig, arm: str, budget: int, seed: int, inputs: dict[str, Artifact], examples: int | None = None
) -> CellSpec:
    """A cell by its arm's config under the seed. `inputs`: the artifacts that it is made from; `examples`: see CellSpec."""
    number = budget if examples is None else examples
    chosen = with_settings(config, {"selection.budget": number, "selection.more_budgets": []}, "compare.budgets")
    recipe: dict[str, Any] = {
        "target": chosen.target.model_dump(mode="json"),
        "evaluation": chosen.evaluation.model_dump(mode="json", include=_EVALUATION),
        "selection": chosen.selection.model_dump(mode="json", exclude={"more_budgets"}),
    }
    if arm == FULL:
        del recipe["selection"]
    elif chosen.selection.method != RANDOM:
        recipe["clustering"] = chosen.clustering.model_dump(mode="json")
    identities = {name: artifact.identity for name, artifact in inputs.items()}
    return CellSpec(arm, budget, number, seed, chosen, Key(f"{COMPARE}/{arm}-{budget}-seed{seed}", SCHEMA, recipe, identities))


def budgets_of(config: RunConfig, num_rows: int) -> list[int]:
    """The budgets in examples, in the order of the config. Raises ConfigError for one that the pool does not have."""
    compare = config.compare or CompareConfig()
    wanted: list[Any] = [config.selection.budget] if compare.budgets is None else [*compare.budgets]
    counts = []
    for budget in wanted:
        if isinstance(budget, dict):
            raise ConfigError(
                "compare.budgets: a budget in tokens gives every arm another number of examples, and so of steps. Give "
                "examples or a fraction of the pool; the table has each arm's tokens."
            )
        if budget >= num_rows:
            raise ConfigError(f"compare.budgets: {budget:,} examples, but the pool has {num_rows:,}. Give less than that.")
        counts.append(num_examples(budget, num_rows))
    if (smallest := min(counts)) < config.target.global_batch_size:
        raise DataError(
            f"compare.budgets: {smallest:,} examples are fewer than one batch of {config.target.global_batch_size} "
            "(target.global_batch_size). Raise the budget or use a smaller batch."
        )
    return list(dict.fromkeys(counts))


# --- a finished cell -----------------------------------------------------------------------------------------------


def publish(one: CellSpec, run: Storage, subset: pa.Table, evaluated: pa.Table, facts: dict[str, Any]) -> Artifact:
    """Write a cell. `subset`: example_id and weight; `evaluated`: rows as in `evaluation.held_out`; `facts`: `steps`,
    `supervised_tokens`, `tokens`, `num_parameters`, `seconds` and the training's losses."""
    scores = [json.loads(text).get("exact_match") if text else None for text in evaluated["scores"].to_pylist()]
    losses = evaluated.select(["example_id", "source", "loss", "num_response_tokens"]).replace_schema_metadata(None)
    losses = losses.append_column("exact_match", pa.array(scores, pa.float32()))
    draft = Draft.open(run, one.key)
    draft.write_table(CELL_SUBSET, subset)
    draft.write_table(CELL_LOSSES, losses)
    diverged = not np.isfinite(losses["loss"].to_numpy()).all()
    return draft.publish(facts | {"rows": len(losses), "examples": len(subset), "diverged": diverged})


def read_cell(one: CellSpec, artifact: Artifact) -> Cell:
    """A finished cell as the statistics take it."""
    table = artifact.read_table(CELL_LOSSES)
    scores = table["exact_match"].drop_null().to_numpy()
    summary = artifact.summary
    return Cell(
        arm=one.arm,
        budget=one.budget,
        seed=one.seed,
        losses=table.drop_columns(["exact_match"]),
        accuracy=float(scores.mean()) if len(scores) else None,
        supervised_tokens=summary["supervised_tokens"],
        steps=summary["steps"],
        diverged=summary["diverged"],
    )


def read_bytes_table(data: bytes) -> pa.Table:
    """A Parquet file's bytes as a table."""
    return pq.read_table(io.BytesIO(data))


def check_recipes(specs: Sequence[CellSpec], run: Storage) -> None:
    """Raise ArtifactError where a finished or begun cell has another recipe, whatever it was made from: before any of the
    trajectories that it would be made from is there."""
    for one in specs:
        place = run.child(one.key.stage)
        found = Artifact.find(place)
        record = read_building(place) if found is None else found.manifest
        if record is not None and Key(one.key.stage, SCHEMA, one.key.recipe, {}).differences(record):
            raise ArtifactError(refusal(place, one.key, record, ANOTHER))


def missing(specs: Sequence[CellSpec], run: Storage, other: Storage | None = None) -> list[CellSpec]:
    """The cells that are not finished, in the order given. Those that another run has finished are taken from there."""
    todo = [one for one in specs if one.find(run) is None]
    return [one for one in todo if other is None or not one.take(run, other)]
