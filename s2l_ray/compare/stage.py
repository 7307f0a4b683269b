"""Arms x budgets x seeds -> one table: what is missing is trained, seed by seed; the same call again goes on."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

from s2l_ray.clustering.grouping import check_num_clusters
from s2l_ray.clustering.stratifying import AUTO, strata_of
from s2l_ray.compare.arms import ANY_SOURCES, COST_MATCHED, FULL, Arm, arms_of
from s2l_ray.compare.cells import (
    CellSpec,
    budgets_of,
    check_recipes,
    missing,
    publish,
    read_bytes_table,
    resolved,
    seeded,
    spec,
)
from s2l_ray.compare.costs import cost_matched
from s2l_ray.compare.fits import fit_alone, losses_of_run
from s2l_ray.compare.premise import PremiseSettings, measure_premise
from s2l_ray.compare.premise_wording import premise_text
from s2l_ray.compare.results import sizes_of, write_results
from s2l_ray.compare.subsets import StoreGroups, is_of_all, opened, subsets, trajectories_of, whole_pool
from s2l_ray.compare.table import Comparison
from s2l_ray.compare.worker import FACTS, CellsJob, CellWorker
from s2l_ray.config import RunConfig
from s2l_ray.config.comparing import CompareConfig
from s2l_ray.errors import ConfigError
from s2l_ray.evaluation.stage import choose_generated, evaluated_parts
from s2l_ray.pipeline import run
from s2l_ray.progress import duration, get_log, quiet
from s2l_ray.report.page import build_report
from s2l_ray.runtime.pool import Unit, do_units
from s2l_ray.runtime.session import connect_ray, run_places
from s2l_ray.runtime.workers import Workers
from s2l_ray.selectors import EMBEDDING, NO_PROMPT, SELECTORS, SOURCES, TOKENS, VALIDATION
from s2l_ray.storage.artifacts import Artifact
from s2l_ray.storage.drafts import table_bytes
from s2l_ray.storage.layout import CELL_LOSSES, COMPARE
from s2l_ray.storage.lock import exclusive
from s2l_ray.storage.ownership import scratch_of
from s2l_ray.storage.places import Storage
from s2l_ray.training.models import num_parameters

# `compare.fit: auto` trains a target of more parameters than this by a fit of its own.
TOGETHER_PARAMETERS = 200e6
_log = get_log("compare")


@dataclasses.dataclass(frozen=True)
class Cells:
    """All cells of a comparison."""

    arms: list[Arm]
    budgets: list[int]
    specs: list[CellSpec]
    """Seed by seed, so that what is interrupted has whole pairs; those of all data last."""


def compare(config: RunConfig, run_dir: str | None = None, *, reuse: str | None = None) -> Comparison:
    """The comparison that a config's section `compare` asks for, over the run's trajectories; builds what is missing.

    `reuse` names another run whose finished stages, proxies of other seeds and cells are taken where their fingerprints match.
    Returns the `Comparison`, which is also in `compare/table.json` and `table.md`. Raises ConfigError for arms and budgets that
    cannot be, ArtifactError where a finished cell has another recipe (naming the fields), and what a run raises.
    """
    config = resolved(config)
    arms_of(config, ANY_SOURCES)  # what no corpus would mend, before anything is trained
    with quiet(("run",)):
        arms_and_budgets(config, run(config, run_dir, until="examples", reuse=reuse)["examples"])
    finished = run(config, run_dir, until="trajectories", reuse=reuse)
    place, other = run_places(config.name, run_dir, reuse)
    with exclusive(place) as still_held:
        return _compare(config, place, other, finished, still_held)


def check_premise(config: RunConfig, run_dir: str | None = None, *, reuse: str | None = None) -> str:
    """Whether examples that learn alike have like gradients here, in a dozen lines; `compare/premise.json` has all figures.

    Builds what is missing of the run. Raises what `measure_premise` and a run raise.
    """
    finished = run(config, run_dir, until="clustering", reuse=reuse)
    place, _ = run_places(config.name, run_dir, reuse)
    connect_ray()
    settings = PremiseSettings(on_target=(config.compare or CompareConfig()).premise_on_target)
    with exclusive(place):
        return premise_text(measure_premise(config, finished, place, config.machines.compare, settings))


def _compare(
    config: RunConfig,
    place: Storage,
    other: Storage | None,
    finished: dict[str, Artifact],
    still_held: Callable[[], None],
) -> Comparison:
    begun = time.monotonic()
    cells = plan_cells(config, place, finished, other)
    todo = missing(cells.specs, place, other)
    _log.info("%d cells of %d arms, %d of them to be trained", len(cells.specs), len(cells.arms), len(todo))
    work = scratch_of(place).child(COMPARE)
    with quiet(("trajectories", "clustering")):
        choose(config, cells, todo, place, finished, work)
    todo = [one for one in todo if not _taken_from_run(one, config, place, other, work)]
    if todo and trains_together(config):
        _train_together(config, todo, place, finished, work, still_held)
    else:
        arms = {arm.name: arm for arm in cells.arms}
        for one in todo:
            still_held()
            own = None if is_of_all(one) else trajectories_of(config, arms[one.arm], one.seed, place, finished)
            fit_alone(one, own, place, work)
    work.delete()
    comparison = write_results(config, cells.specs, cells.budgets, place, finished)
    build_report(place.uri)
    _log.info("finished in %s", duration(time.monotonic() - begun))
    return comparison


def arms_and_budgets(
    config: RunConfig, examples: Artifact, trajectories: Artifact | None = None
) -> tuple[list[Arm], list[int]]:
    """What is compared over these examples. Raises ConfigError and DataError for what cannot be, before anything is trained
    for it."""
    summary = examples.summary
    if not summary.get(config.evaluation.split):
        raise ConfigError(
            f"compare: no {config.evaluation.split} row to evaluate on. Set examples.held_out_per_source (100, say), "
            "held_out_fraction or validation_fraction."
        )
    sources = [name for name, counts in summary["sources"].items() if counts["pool"]]
    as_auto = config.clustering.model_copy(update={"stratify_by": AUTO})  # shards of one corpus are no sources
    named = strata_of(as_auto, sources, summary["pool"], config.examples.sources_are_files).column is not None
    arms = arms_of(config, sources if named else [])
    is_left_out = named and config.selection.draw == "spread" and (config.compare or CompareConfig()).arms is None
    if is_left_out and trajectories is None:  # said once: the check with trajectories comes after that without
        _log.info("source_matched is left out: it follows an order, which selection.draw=spread has not")
    # What the config asks to be recorded it has checked itself.
    recorded = [TOKENS, NO_PROMPT, EMBEDDING, *[SOURCES] * (len(sources) > 1), *[VALIDATION] * bool(summary.get("validation"))]
    for arm in arms:
        chosen = arm.config(config)
        method = SELECTORS[chosen.selection.method]
        of_run = None if arm.redoes_proxy else trajectories
        num_points = method.min_points if of_run is None else len(of_run.summary["steps"])
        try:
            method.check(recorded, num_points)
            if method.reads_groups:
                check_num_clusters(chosen.clustering, summary["pool"])
        except ConfigError as error:
            raise ConfigError(f"compare.arms: {arm.name}: {error}") from error
    return arms, budgets_of(config, summary["pool"])


def plan_cells(config: RunConfig, place: Storage, finished: dict[str, Artifact], other: Storage | None = None) -> Cells:
    """All cells, seed by seed. Trains the proxies of other seeds that are neither here nor in the `other` run. Raises what
    `compare` raises."""
    compare, examples = config.compare or CompareConfig(), finished["examples"]
    arms, budgets = arms_and_budgets(config, examples, finished["trajectories"])
    sizes = sizes_of(config, finished)

    def planned(arm: Arm, seed: int, inputs: dict[str, Artifact]) -> list[CellSpec]:
        chosen = seeded(config, arm, seed)
        counts = [cost_matched(config, sizes, budget) if arm.name == COST_MATCHED else budget for budget in budgets]
        return [spec(chosen, arm.name, budget, seed, inputs, count) for budget, count in zip(budgets, counts, strict=True)]

    order = [(arm, seed) for seed in range(compare.seeds) for arm in arms]
    full, everything, pool = Arm(FULL, {}), {"examples": examples, "proxy": finished["proxy"]}, examples.summary["pool"]
    of_all = [spec(seeded(config, full, seed), FULL, pool, seed, everything) for seed in range(compare.full_seeds)]
    check_recipes([*(one for arm, seed in order for one in planned(arm, seed, {})), *of_all], place)
    specs: list[CellSpec] = []
    for arm, seed in order:
        trajectories = trajectories_of(config, arm, seed, place, finished, other)
        specs += planned(arm, seed, {"examples": examples, "trajectories": trajectories})
    return Cells(arms, budgets, specs + of_all)


def choose(
    config: RunConfig,
    cells: Cells,
    todo: Sequence[CellSpec],
    place: Storage,
    finished: dict[str, Artifact],
    work: Storage,
) -> None:
    """Write the subset of each cell that is to be trained into scratch."""
    there = set(work.names())
    wanted = [one for one in todo if f"{one.unit}.parquet" not in there]
    arms = {arm.name: arm for arm in cells.arms}
    for one in filter(is_of_all, wanted):
        work.write(f"{one.unit}.parquet", table_bytes(whole_pool(finished["examples"])))
    for seed in sorted({one.seed for one in wanted}):
        of_seed = [one for one in wanted if one.seed == seed and not is_of_all(one)]
        by_store: dict[str, list[CellSpec]] = {}
        for one in of_seed:
            by_store.setdefault(one.key.inputs["trajectories"], []).append(one)
        for group in by_store.values():
            trajectories = trajectories_of(config, arms[group[0].arm], seed, place, finished)
            profiles = any(one.config.clustering.features == "profile" for one in group)
            with opened(trajectories, scratch_of(place), group[0].config.selection.seed, profiles=profiles) as store:
                _choose_from(store, group, StoreGroups(store, config.examples.sources_are_files), work)


def _choose_from(store: Any, wanted: Sequence[CellSpec], groups: StoreGroups, work: Storage) -> None:
    for arm in dict.fromkeys(one.arm for one in wanted):
        of_arm = [one for one in wanted if one.arm == arm]
        tables = subsets(of_arm[0].config, [one.examples for one in of_arm], store, groups)
        for one, table in zip(of_arm, tables, strict=True):
            work.write(f"{one.unit}.parquet", table_bytes(table))


def trains_together(config: RunConfig) -> bool:
    """Whether many targets are trained in each worker process."""
    compare = config.compare or CompareConfig()
    if compare.fit != "auto" or config.target.lora is not None:
        return compare.fit == "together"
    if not isinstance(config.target.model, str):
        return True
    size = num_parameters(config.target, None)
    return size is not None and size <= TOGETHER_PARAMETERS


def _train_together(
    config: RunConfig,
    todo: Sequence[CellSpec],
    place: Storage,
    finished: dict[str, Artifact],
    work: Storage,
    still_held: Callable[[], None],
) -> None:
    connect_ray()
    examples, by_unit = finished["examples"], {one.unit: one for one in todo}
    parts = evaluated_parts(config, examples)
    job = CellsJob(examples, finished["proxy"], by_unit, work, parts, choose_generated(config, examples, parts))
    workers = Workers.resolve(config.machines.compare, one_per_cpu=True)

    def publish_finished() -> bool:
        still_held()
        there = set(work.names(recursive=True))  # one listing, not a request for each cell that is missing
        for unit in [unit for unit in by_unit if f"{unit}/{CELL_LOSSES}" in there]:
            one = by_unit.pop(unit)
            evaluated = read_bytes_table(work.read(f"{unit}/{CELL_LOSSES}"))
            facts = json.loads(evaluated.schema.metadata[FACTS])
            publish(one, place, read_bytes_table(work.read(f"{unit}.parquet")), evaluated, facts)
        return False

    do_units("compare", [Unit(one.unit, CELL_LOSSES) for one in todo], CellWorker, job, work, workers, stop=publish_finished)
    publish_finished()


def _taken_from_run(one: CellSpec, config: RunConfig, place: Storage, other: Storage | None, work: Storage) -> bool:
    """Whether the run itself has trained this cell's target: then its losses become the cell."""
    found = losses_of_run(one, config, place, other)
    if found is None:
        return False
    evaluated, facts = found
    publish(one, place, read_bytes_table(work.read(f"{one.unit}.parquet")), evaluated, facts)
    return True
