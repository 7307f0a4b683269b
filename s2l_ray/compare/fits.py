"""Cells by the run's own stages: targets that are trained by a fit of their own, and those that the run has trained anyway."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from s2l_ray.compare.arms import RANDOM, S2L
from s2l_ray.compare.cells import CellSpec, publish
from s2l_ray.config import RunConfig
from s2l_ray.pipeline import decide, run
from s2l_ray.progress import get_log, quiet
from s2l_ray.storage.artifacts import Artifact
from s2l_ray.storage.layout import MODEL_FOLDERS, PREDICTIONS, ROW_LOSSES, SELECTED
from s2l_ray.storage.places import Storage

_SELECTED, _RANDOM = MODEL_FOLDERS
_log = get_log("compare")


def losses_of_run(
    one: CellSpec, config: RunConfig, place: Storage, other: Storage | None = None
) -> tuple[pa.Table, dict[str, Any]] | None:
    """The evaluated rows and facts of a cell that is one of the run's own targets, finished there or in the other run; None for
    any other."""
    model = {S2L: _SELECTED, RANDOM: _RANDOM}.get(one.arm)
    if model is None or one.seed or (model == _RANDOM and not config.evaluation.random_control):
        return None
    decisions = decide(config, place, other)
    if any(decision.artifact is None for decision in decisions):
        return None
    found = {decision.stage.name: decision.artifact for decision in decisions if decision.artifact is not None}
    if found["selection"].summary["rows"] != one.budget or one.config.target != config.target:
        return None
    if model == _SELECTED and _chooses(one.config) != _chooses(config):
        return None
    return _evaluated(found["target"], found["evaluation"], model)


def _chooses(config: RunConfig) -> tuple[Any, ...]:
    """What decides the subset of a budget, from the same trajectories."""
    return config.clustering, config.selection.model_dump(exclude={"budget", "more_budgets"})


def _evaluated(target: Artifact, evaluation: Artifact, model: str) -> tuple[pa.Table, dict[str, Any]]:
    table = evaluation.read_table(ROW_LOSSES)
    table = table.filter(pc.equal(table["model"], model)).drop_columns(["model"])
    lines = [json.loads(line) for line in evaluation.read_bytes(PREDICTIONS).decode().splitlines()]
    scores = {line["example_id"]: json.dumps(line["scores"]) for line in lines if line["model"] == model}
    table = table.append_column("scores", pa.array(list(map(scores.get, table["example_id"].to_pylist())), pa.string()))
    summary = target.summary
    facts = {
        "steps": summary["total_steps"],
        "tokens": summary["tokens_seen"][model],
        "supervised_tokens": summary["supervised_tokens"][model],
        "num_parameters": summary["num_parameters"],
        "training_loss": summary["training_loss"][model],
        "training_seconds": target.manifest["provenance"]["seconds"],
    }
    return table, facts


def fit_alone(one: CellSpec, trajectories: Artifact | None, place: Storage, work: Storage) -> None:
    """Train a cell's target by the stages of a run of its own, in scratch, which takes what it can from the run with these
    trajectories (None: from the run that is compared).

    What it leaves is its losses: the model goes away with the scratch directory.
    """
    unused = {"random_control": False, "tasks": [], "bert_score_model": None}  # a cell keeps losses and exact matches
    evaluation = one.config.evaluation.model_copy(update=unused)
    chosen = one.config.model_copy(update={"evaluation": evaluation})
    own = work.child("runs").child(one.unit)
    _log.info("%s: a fit of its own", one.name)
    reuse = place.uri if trajectories is None else trajectories.storage.uri.rpartition("/")[0]
    with quiet(("run", "examples")):
        found = run(chosen, own.uri, until="evaluation", reuse=reuse)
    evaluated, facts = _evaluated(found["target"], found["evaluation"], _SELECTED)
    names = found["selection"].summary["columns"]
    rows = found["selection"].read_table(SELECTED, columns=[names["example_id"], names["weight"]])
    publish(one, place, rows.rename_columns(["example_id", "weight"]), evaluated, facts)
    own.delete()
