"""The whole flow on one page: the stages as one list, and what it means to run them.

    examples -> proxy -> trajectories -> clustering -> selection -> target -> evaluation -> report

Stages meet through artifacts, never through each other's functions. A stage whose fingerprint is found finished is
reused; one that was begun is continued; one that belongs to another recipe is refused before anything is started.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from s2l_ray.config import RunConfig
from s2l_ray.config.recipes import RECIPES, SCHEMAS
from s2l_ray.errors import ArtifactError
from s2l_ray.progress import duration, get_log
from s2l_ray.runtime.session import connect_ray, run_places, write_run
from s2l_ray.storage.artifacts import Artifact, Key, adopt, refusal
from s2l_ray.storage.drafts import Draft
from s2l_ray.storage.hub import resolve_revisions
from s2l_ray.storage.layout import names_until
from s2l_ray.storage.lock import exclusive
from s2l_ray.storage.ownership import check_run, read_building
from s2l_ray.storage.places import Storage
from s2l_ray.storage.stages import Context, check_dropped

ANOTHER_RUN = "Give another --run-dir (with --reuse RUN_DIR it takes from this one every stage that still matches)"
Inputs = Mapping[str, Artifact]
log = get_log("run")


@dataclass(frozen=True)
class Stage:
    """One of the words of the flow."""

    name: str
    inputs: tuple[str, ...]
    module: str
    """Where its `build(context) -> Artifact` is; imported when it is built."""

    needs_ray: bool = True

    def recipe(self, config: RunConfig, run_dir: Storage) -> dict[str, Any]:
        """What decides its result. Reads the corpus for `examples`, whose hash is remembered in the run directory."""
        if self.name != "examples":
            return RECIPES[self.name](config)
        from s2l_ray.examples.corpus import corpus_identity, examples_recipe

        return examples_recipe(config.examples, corpus_identity(config.examples, run_dir))


STAGES = (
    Stage("examples", (), "s2l_ray.examples.stage"),
    Stage("proxy", ("examples",), "s2l_ray.proxy"),
    Stage("trajectories", ("examples", "proxy"), "s2l_ray.trajectories.stage"),
    Stage("clustering", ("trajectories",), "s2l_ray.clustering.stage", needs_ray=False),
    Stage("selection", ("examples", "proxy", "trajectories", "clustering"), "s2l_ray.selection.stage", needs_ray=False),
    Stage("target", ("examples", "proxy", "selection"), "s2l_ray.target"),
    Stage("evaluation", ("examples", "proxy", "target"), "s2l_ray.evaluation.stage"),
)


@dataclass(frozen=True)
class Decision:
    """What `run` would do with a stage."""

    stage: Stage
    action: str
    """`reuse`, `build`, `resume` (an unfinished one of the same recipe) or `refuse`."""

    reason: str
    key: Key | None = None  # while an earlier stage is still to be built
    artifact: Artifact | None = None


def decide(config: RunConfig, run_dir: Storage, reuse: Storage | None = None) -> list[Decision]:
    """What `run` would do, stage by stage, reading only manifests and the corpus's hash.

    Raises ArtifactError for somebody else's files or a damaged stage, ConfigError or DataError for an unreadable corpus.
    """
    check_run(run_dir)
    finished: dict[str, Artifact] = {}
    decisions: list[Decision] = []
    for stage in STAGES:
        decision = _decide_stage(stage, config, run_dir, reuse, finished)
        if refused := [d.stage.name for d in decisions if d.action == "refuse" and d.stage.name in stage.inputs]:
            decision = Decision(stage, "refuse", f"after {refused[0]}")
        if decision.artifact is not None:
            finished[stage.name] = decision.artifact
            check_dropped(config.examples, decision.artifact)
        decisions.append(decision)
    return decisions


def _decide_stage(stage: Stage, config: RunConfig, run_dir: Storage, reuse: Storage | None, finished: Inputs) -> Decision:
    storage, recipe = run_dir.child(stage.name), stage.recipe(config, run_dir)
    missing = [name for name in stage.inputs if name not in finished]
    inputs = {name: finished[name].identity for name in stage.inputs if name in finished}
    key = Key(stage.name, SCHEMAS[stage.name], recipe, inputs)
    found, begun = Artifact.find(storage), read_building(storage)
    if found is not None:
        return _decide_finished(stage, key, found, missing)
    if begun is not None and begun.get("recipe") != recipe:
        return Decision(stage, "refuse", refusal(storage, key, begun, ANOTHER_RUN))
    if missing:
        return Decision(stage, "build", "after the stages before it")
    other = Artifact.find(reuse.child(stage.name)) if reuse is not None else None
    if other is not None and other.fingerprint == key.fingerprint:
        other.check_sizes()
        return Decision(stage, "reuse", f"from {other.storage.uri} (fingerprint {key.fingerprint})", key, other)
    if begun is not None and begun.get("fingerprint") == key.fingerprint:
        return Decision(stage, "resume", "begun by an earlier run", key)
    changes = "; ".join(key.differences(other.manifest)) if other is not None else ""
    return Decision(stage, "build", f"not reused: {changes}" if changes else "nothing there yet", key)


def _decide_finished(stage: Stage, key: Key, found: Artifact, missing: list[str]) -> Decision:
    """What to do with a finished stage whose inputs `missing` are not there."""
    if not missing and found.fingerprint == key.fingerprint:
        found.check_sizes()
        return Decision(stage, "reuse", f"fingerprint {key.fingerprint}", key, found)
    reason = refusal(found.storage, key, found.manifest, ANOTHER_RUN)
    if missing and not key.differences(found.manifest):
        reason = f"{found.storage.uri} is finished, but its input {missing[0]} is not. Remove it to build it again."
    return Decision(stage, "refuse", reason)


def run(
    config: RunConfig, run_dir: str | None = None, *, until: str | None = None, reuse: str | None = None
) -> dict[str, Artifact]:
    """Build what is missing of a run, stage by stage; the same call again goes on where the last one stopped.

    Returns the finished artifacts by stage. `until` stops after that stage; `reuse` names another run whose finished
    stages are taken by reference where their fingerprint matches. Raises S2LError for what the user can fix.
    """
    started = time.monotonic()
    names = names_until(until)
    place, other = run_places(config.name, run_dir, reuse)
    log.info("%s in %s", config.name, place.uri)
    check_run(place)  # before the lock, which is a file there
    artifacts: dict[str, Artifact] = {}
    seconds: dict[str, float] = {}
    with exclusive(place) as still_held:
        config = resolve_revisions(config, place, other)
        decisions = decide(config, place, other)
        for decision in decisions:
            if decision.action == "refuse":
                raise ArtifactError(decision.reason)
        if building := {d.stage.name for d in decisions if d.action != "reuse"}.intersection(names):
            from s2l_ray.training.models import check_ahead

            check_ahead(config, place, building)  # what would be found hours from now
        write_run(config, place)
        for stage in STAGES[: len(names)]:
            begun = time.monotonic()
            artifacts[stage.name] = _run_stage(stage, config, place, other, artifacts, still_held)
            seconds[stage.name] = time.monotonic() - begun
        if "report" in names:
            from s2l_ray.report.page import build_report

            begun = time.monotonic()
            build_report(place.uri)
            seconds["report"] = time.monotonic() - begun
    total = time.monotonic() - started
    for name, spent in (seconds | {"total": total}).items():
        log.info("%-13s %9s  %5.1f%%", name, duration(spent), 100 * spent / total)
    return artifacts


def _run_stage(
    stage: Stage, config: RunConfig, place: Storage, other: Storage | None, artifacts: Inputs, still_held: Callable[[], None]
) -> Artifact:
    decision, stage_log = _decide_stage(stage, config, place, other, artifacts), get_log(stage.name)
    if decision.action == "refuse":
        raise ArtifactError(decision.reason)
    if decision.artifact is not None:
        stage_log.info("reused (%s)", decision.reason)
        is_own = decision.artifact.storage == place.child(stage.name)
        return decision.artifact if is_own else adopt(place, decision.artifact)
    assert decision.key is not None
    stage_log.info("%s (%s)", decision.action, decision.reason)
    if stage.needs_ray:
        connect_ray()
    begun = time.monotonic()
    context = Context(config, artifacts, Draft.open(place, decision.key, still_held), _overlap)
    artifact: Artifact = importlib.import_module(stage.module).build(context)
    stage_log.info("finished in %s: %s", duration(time.monotonic() - begun), artifact.counts)
    return artifact


def _overlap(context: Context) -> Any:
    """Overlapped scoring, which the proxy's training starts: joined here, since no stage knows a later one."""
    from s2l_ray.trajectories.overlapped import OverlappedScoring

    return OverlappedScoring(context.config, context.inputs["examples"], context.draft.shared)
