"""What a comparison leaves beside its cells: `table.json`, from which the page is drawn, and `table.md`, both also under a name
of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np

from s2l_ray.compare.arms import FULL, ablated
from s2l_ray.compare.cells import CellSpec, read_cell
from s2l_ray.compare.costs import RunSizes, costs_of, spent_on
from s2l_ray.compare.subsets import seed_run
from s2l_ray.compare.table import Comparison, compare_cells
from s2l_ray.config import RunConfig
from s2l_ray.config.comparing import CompareConfig
from s2l_ray.progress import get_log
from s2l_ray.storage.artifacts import Artifact
from s2l_ray.storage.layout import COMPARE, SCHEMA, TABLE, TABLE_MARKDOWN, table_of
from s2l_ray.storage.places import Storage
from s2l_ray.storage.provenance import provenance
from s2l_ray.storage.records import digest
from s2l_ray.training.models import num_parameters

_log = get_log("compare")


def write_results(
    config: RunConfig, specs: Sequence[CellSpec], budgets: Sequence[int], place: Storage, finished: dict[str, Artifact]
) -> Comparison:
    """The table of the finished cells, written."""
    compare = config.compare or CompareConfig()
    artifacts = [(one, Artifact.read(place.child(one.key.stage))) for one in specs]
    measured = sizes_of(config, finished, artifacts)
    by_row = {
        (one.arm, one.budget): spent_on(
            one.config,
            sizes_of(one.config, _made_from(one, place, finished), artifacts),
            None if one.arm == FULL else one.config.selection.method,
            one.examples,
        )
        for one in specs
        if one.seed == 0
    }
    comparison = compare_cells(
        [read_cell(one, artifact) for one, artifact in artifacts],
        primary=compare.primary,
        budgets=budgets,
        pool={name: counts["pool"] for name, counts in finished["examples"].summary["sources"].items()},
        redo_from=compare.redo_from,
        costs=costs_of(config, measured, budgets[0])
        | {"by_row": [{"arm": arm, "budget": budget, **asdict(spent)} for (arm, budget), spent in by_row.items()]},
        ablations={
            field: [(value, ablated(field, value).name) for value in values] for field, values in compare.ablations.items()
        },
    )
    storage = place.child(COMPARE)
    fingerprints = {one.name: artifact.fingerprint for one, artifact in artifacts}
    values = {"schema": SCHEMA, **comparison.to_json(), "fingerprints": fingerprints, "provenance": provenance()}
    # Two comparisons over one run, of other arms or budgets, say: each keeps its table, and the page shows the latest.
    own = digest([compare.model_dump(mode="json"), list(budgets), fingerprints], 4)
    for name in (table_of(own), TABLE):
        storage.write_json(name, values)
    for name in (table_of(own, markdown=True), TABLE_MARKDOWN):
        storage.write(name, comparison.markdown().encode())
    _log.info(
        "table in %s/%s, of the latest comparison, and in %s, which no other one overwrites",
        storage.uri,
        TABLE_MARKDOWN,
        table_of(own, markdown=True),
    )
    return comparison


def _made_from(one: CellSpec, place: Storage, finished: dict[str, Artifact]) -> dict[str, Artifact]:
    """The finished stages whose costs a cell bears: those of the run, but for an arm with a proxy of its own."""
    own = seed_run(place, one.arm, one.seed)
    found = {stage: Artifact.find(own.child(stage)) for stage in ("proxy", "trajectories")}
    theirs = {stage: artifact for stage, artifact in found.items() if artifact is not None}
    is_made = len(theirs) == len(found) and theirs["trajectories"].identity == one.key.inputs.get("trajectories")
    return finished | theirs if is_made else finished


def sizes_of(config: RunConfig, finished: dict[str, Artifact], cells: Sequence[tuple[CellSpec, Artifact]] = ()) -> RunSizes:
    """Sizes and times as this comparison found them. Raises ConfigError where the target's size cannot be known."""
    proxy, trajectories = finished["proxy"], finished["trajectories"]
    of_cells = [artifact.summary for one, artifact in cells if one.arm != FULL]
    pool = finished["examples"].summary["pool"]
    batch = config.target.global_batch_size
    seconds = [found["training_seconds"] / (found["steps"] * batch) for found in of_cells]
    target = of_cells[0]["num_parameters"] if of_cells else num_parameters(config.target, proxy.summary.get("vocab_size"))
    return RunSizes(
        pool=pool,
        pool_tokens=float(trajectories.summary["tokens"]),
        num_points=len(trajectories.summary["steps"]),
        proxy_parameters=float(proxy.summary["num_parameters"]),
        target_parameters=float(target or proxy.summary["num_parameters"]),
        proxy_seconds=sum(one.manifest["provenance"]["seconds"] for one in (proxy, trajectories)),
        validation_tokens=float(trajectories.summary["tokens"]) / pool * finished["examples"].summary.get("validation", 0),
        trajectories_seconds=trajectories.manifest["provenance"]["seconds"],
        target_seconds_per_example=float(np.median(seconds)) if seconds else None,
    )
