"""The whole flow on one page: the stages as one list, and what it means to run them.

    examples -> proxy -> trajectories -> clustering -> selection -> target -> evaluation -> report

Stages meet through artifacts, never through each other's functions. A stage whose fingerprint is found finished is
reused; one that was begun is continued; one that belongs to another recipe is refused before anything is started.
"""

from __future__ import annotations

import contextlib
import io
import json
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

from s2l_ray.artifacts import (
    BUILDING,
    MANIFEST,
    WORK,
    Artifact,
    Draft,
    Key,
    Storage,
    absolute_uri,
    adopt,
    refusal,
    scratch_folder,
)
from s2l_ray.config import ClusteringConfig, GroupingConfig, RunConfig, SelectionConfig
from s2l_ray.errors import ArtifactError, ConfigError
from s2l_ray.lock import exclusive, submitted_job
from s2l_ray.progress import duration, get_log
from s2l_ray.session import connect_ray, resolve_revisions, write_run

if TYPE_CHECKING:
    from s2l_ray.trajectory_store import TrajectoryStore

Inputs = Mapping[str, Artifact]
Build = Callable[[RunConfig, Inputs, Draft], Artifact]
SELECTED = "selected.parquet"
ANOTHER_RUN = "Give another --run-dir (with --reuse RUN_DIR it takes from this one every stage that still matches)"
log = get_log("run")


# --- the stages ----------------------------------------------------------------------------------------------------


def _build_examples(config: RunConfig, _inputs: Inputs, draft: Draft) -> Artifact:
    from s2l_ray.examples import build_examples

    return build_examples(config.examples, config.machines.examples, draft)


def _build_proxy(config: RunConfig, inputs: Inputs, draft: Draft) -> Artifact:
    from s2l_ray.training.proxy import build_proxy
    from s2l_ray.training.trajectories import ScoringBeside

    return build_proxy(config, inputs, draft, ScoringBeside(config, inputs["examples"], draft.shared))


def _build_trajectories(config: RunConfig, inputs: Inputs, draft: Draft) -> Artifact:
    from s2l_ray.training.trajectories import build_trajectories

    return build_trajectories(config, inputs, draft)


def _build_clustering(config: RunConfig, inputs: Inputs, draft: Draft) -> Artifact:
    from s2l_ray.clustering import build_clustering

    options = config.clustering
    if config.machines.clustering.engine == "ray":
        connect_ray()
    with _streamed(inputs["trajectories"], draft.storage, options.seed, options.stratify_by) as (store, scratch):
        return build_clustering(options, config.machines.clustering, store, scratch, draft)


def _build_selection(config: RunConfig, inputs: Inputs, draft: Draft) -> Artifact:
    from s2l_ray.examples import fetch_rows
    from s2l_ray.selection import build_selection

    with _streamed(inputs["trajectories"], draft.storage, config.selection.seed) as (found, scratch):
        store = found
        if _counts_target_tokens(config):
            from s2l_ray.training.target import count_response_tokens

            connect_ray()
            store = store.with_tokens(lambda ids: count_response_tokens(config, inputs, ids))
        return build_selection(
            config.selection,
            store,
            inputs["clustering"],
            lambda ids, _numbers: fetch_rows(inputs["examples"], ids),
            scratch,
            draft,
            random_control=config.evaluation.random_control,
        )


@contextlib.contextmanager
def _streamed(
    source: str | Artifact, place: Storage, seed: int, stratify_by: str | None = None
) -> Iterator[tuple[TrajectoryStore, Path]]:
    """Trajectories in order of ids on this machine's disk, and the folder for more of the kind."""
    from s2l_ray.trajectory_files import open_trajectories

    with scratch_folder(place) as scratch, ThreadPoolExecutor(2) as pool:
        yield open_trajectories(source, scratch / "trajectories", pool, stratify_by=stratify_by, seed=seed), scratch


def _counts_target_tokens(config: RunConfig) -> bool:
    """Whether the budget is in tokens of a tokenizer that is not the proxy's, which the trajectories have counted."""
    is_own = config.target.tokenizer is not None or isinstance(config.target.model, str)
    return isinstance(config.selection.budget, dict) and is_own


def _build_target(config: RunConfig, inputs: Inputs, draft: Draft) -> Artifact:
    from s2l_ray.training.target import build_target

    return build_target(config, inputs, draft)


def _build_evaluation(config: RunConfig, inputs: Inputs, draft: Draft) -> Artifact:
    from s2l_ray.training.evaluation import build_evaluation

    return build_evaluation(config, inputs, draft)


def _recipe(section: str) -> Callable[[RunConfig], dict[str, Any]]:
    """A recipe that is a section of the config as it stands."""
    return lambda config: getattr(config, section).model_dump(mode="json")


def _proxy_recipe(config: RunConfig) -> dict[str, Any]:
    recipe = config.proxy.model_dump(mode="json")
    if recipe["schedule"] == "equal":  # as it was before there were others: what was trained then is still good
        del recipe["schedule"]
    return recipe


def _selection_recipe(config: RunConfig) -> dict[str, Any]:
    recipe = config.selection.model_dump(mode="json") | {"random_control": config.evaluation.random_control}
    counted_by = config.target.model_dump(mode="json", include={"model", "revision", "tokenizer", "max_tokens"})
    return recipe | ({"target": counted_by} if _counts_target_tokens(config) else {})


def _target_recipe(config: RunConfig) -> dict[str, Any]:
    recipe = config.target.model_dump(mode="json") | {"random_control": config.evaluation.random_control}
    if not recipe["zero_stage"]:  # once DeepSpeed's stage 0, which kept bfloat16 weights
        recipe["parallel"] = "torch"
    if recipe["lora"] is None:  # as it was before there were adapters
        del recipe["lora"]
    return recipe


def _evaluation_recipe(config: RunConfig) -> dict[str, Any]:
    # The untrained target is evaluated too, and comes with no artifact.
    untrained = config.target.model_dump(
        mode="json", include={"model", "revision", "tokenizer", "max_tokens", "precision", "seed"}
    )
    return config.evaluation.model_dump(mode="json") | {"target": untrained}


def _examples_recipe(config: RunConfig, cache: Storage | None = None) -> dict[str, Any]:
    from s2l_ray.corpus import corpus_identity
    from s2l_ray.examples import examples_recipe

    return examples_recipe(config.examples, corpus_identity(config.examples, cache))


@dataclass(frozen=True)
class Stage:
    """One of the eight words: what it reads, what decides its result, and what builds it."""

    name: str
    inputs: tuple[str, ...]
    recipe: Callable[[RunConfig], dict[str, Any]]
    build: Build
    schema: int = 1
    """Raised when the same recipe gives another result than before."""

    needs_ray: bool = True


STAGES = (
    Stage("examples", (), _examples_recipe, _build_examples),
    Stage("proxy", ("examples",), _proxy_recipe, _build_proxy),
    Stage(
        "trajectories",
        ("examples", "proxy"),
        lambda config: config.trajectories.model_dump(mode="json") | {"max_tokens": config.proxy.max_tokens},
        _build_trajectories,
        schema=2,
    ),
    Stage("clustering", ("trajectories",), _recipe("clustering"), _build_clustering, schema=2, needs_ray=False),
    Stage(
        "selection",
        ("examples", "proxy", "trajectories", "clustering"),
        _selection_recipe,
        _build_selection,
        schema=2,
        needs_ray=False,
    ),
    Stage("target", ("examples", "proxy", "selection"), _target_recipe, _build_target),
    Stage("evaluation", ("examples", "proxy", "target"), _evaluation_recipe, _build_evaluation),
)


def schema_of(name: str) -> int:
    """The schema number of a stage."""
    return next(stage.schema for stage in STAGES if stage.name == name)


# The eighth word, `report`, is derived from the others and may be rebuilt at any time.
STAGE_NAMES = (*(stage.name for stage in STAGES), "report")


# --- what would be done --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Decision:
    """What `run` would do with a stage."""

    stage: Stage
    action: str
    """`reuse`, `build`, `resume` (an unfinished one of the same recipe) or `refuse`."""

    reason: str
    key: Key | None = None
    """None while an earlier stage is still to be built."""

    artifact: Artifact | None = None


def decide(config: RunConfig, run_dir: Storage, reuse: Storage | None = None) -> list[Decision]:
    """What `run` would do, stage by stage, reading only manifests and the corpus's hash.

    Raises ConfigError or DataError where the corpus cannot be read, ArtifactError where a finished stage is damaged.
    """
    finished: dict[str, Artifact] = {}
    decisions: list[Decision] = []
    for stage in STAGES:
        decision = _decide_stage(stage, config, run_dir, reuse, finished)
        refused = [d.stage.name for d in decisions if d.action == "refuse" and d.stage.name in stage.inputs]
        if refused:
            decision = Decision(stage, "refuse", f"after {refused[0]}")
        if decision.artifact is not None:
            finished[stage.name] = decision.artifact
        decisions.append(decision)
    return decisions


def _decide_stage(
    stage: Stage, config: RunConfig, run_dir: Storage, reuse: Storage | None, finished: Mapping[str, Artifact]
) -> Decision:
    storage = run_dir.child(stage.name)
    recipe = _examples_recipe(config, run_dir.child(WORK)) if stage.name == "examples" else stage.recipe(config)
    is_known = all(name in finished for name in stage.inputs)
    inputs = {name: finished[name].identity for name in stage.inputs if name in finished}
    key = Key(stage.name, stage.schema, recipe, inputs)
    found, begun = Artifact.find(storage), storage.read_json(BUILDING)
    if found is not None:
        return _decide_finished(stage, key, found, [name for name in stage.inputs if name not in finished])
    if begun is not None and begun.get("recipe") != recipe:
        return Decision(stage, "refuse", refusal(storage, key, begun, ANOTHER_RUN))
    if not is_known:
        return Decision(stage, "build", "after the stages before it")
    other = Artifact.find(reuse.child(stage.name)) if reuse is not None else None
    if other is not None and other.fingerprint == key.fingerprint:
        other.check_sizes()
        return Decision(stage, "reuse", f"from {other.storage.uri} (fingerprint {key.fingerprint})", key, other)
    if begun is not None and begun["fingerprint"] == key.fingerprint:
        return Decision(stage, "resume", "begun by an earlier run", key)
    changes = "; ".join(key.differences(other.manifest)) if other is not None else ""
    return Decision(stage, "build", f"not reused: {changes}" if changes else "nothing there yet", key)


def _decide_finished(stage: Stage, key: Key, found: Artifact, missing: list[str]) -> Decision:
    """What to do with a finished stage whose inputs `missing` are not there."""
    if not missing and found.fingerprint == key.fingerprint:
        found.check_sizes()
        return Decision(stage, "reuse", f"fingerprint {key.fingerprint}", key, found)
    if missing and not key.differences(found.manifest):
        reason = (
            f"{found.storage.uri} is finished, but {missing[0]}, which it was built from, is not. Remove it to build it again."
        )
        return Decision(stage, "refuse", reason)
    return Decision(stage, "refuse", refusal(found.storage, key, found.manifest, ANOTHER_RUN))


# --- running -------------------------------------------------------------------------------------------------------


def run(
    config: RunConfig, run_dir: str | None = None, *, until: str | None = None, reuse: str | None = None
) -> dict[str, Artifact]:
    """Build what is missing of a run, stage by stage; the same call again goes on where the last one stopped.

    Returns the finished artifacts by stage. `until` stops after that stage; `reuse` names another run whose finished
    stages are taken by reference where their fingerprint matches. Raises S2LError for what the user can mend.
    """
    started = time.monotonic()
    place = Storage(run_dir or f"runs/{config.name}")
    other = Storage(reuse) if reuse else None
    if other is not None and not other.exists():
        raise ArtifactError(f"--reuse {other.uri}: there is no such run.")
    if until is not None and until not in STAGE_NAMES:
        raise ConfigError(f"--until {until}: no such stage. Stages: {', '.join(STAGE_NAMES)}.")
    if submitted_job() is not None and "runtime_resources" in Path(place.uri).parts:
        raise ConfigError(
            f"{run_dir or place.uri}: is in Ray's temporary copy of your working directory. Give --run-dir s3://... or an "
            "absolute path that all nodes see."
        )
    log.info("%s in %s", config.name, place.uri)
    with exclusive(place) as still_held:
        config = resolve_revisions(config, place, other)
        decisions = decide(config, place, other)
        for decision in decisions:
            if decision.action == "refuse":
                raise ArtifactError(decision.reason)
        trains = any(decision.stage.name == "target" and decision.action != "reuse" for decision in decisions)
        if trains and until in (None, "target", "evaluation", "report"):
            from s2l_ray.training.models import check_ahead

            check_ahead(config)
        write_run(config, place)
        artifacts: dict[str, Artifact] = {}
        seconds: dict[str, float] = {}
        for stage in STAGES:
            begun = time.monotonic()
            artifacts[stage.name] = _run_stage(stage, config, place, other, artifacts, still_held)
            seconds[stage.name] = time.monotonic() - begun
            if stage.name == until:
                break
        if until in (None, "report"):
            begun = time.monotonic()
            report(place.uri)
            seconds["report"] = time.monotonic() - begun
    _log_breakdown(seconds, time.monotonic() - started)
    return artifacts


def _run_stage(
    stage: Stage,
    config: RunConfig,
    place: Storage,
    other: Storage | None,
    artifacts: Mapping[str, Artifact],
    still_held: Callable[[], None],
) -> Artifact:
    decision = _decide_stage(stage, config, place, other, artifacts)
    if decision.action == "refuse":
        raise ArtifactError(decision.reason)
    stage_log = get_log(stage.name)
    if decision.artifact is not None:
        stage_log.info("reused (%s)", decision.reason)
        is_own = decision.artifact.storage == place.child(stage.name)
        return decision.artifact if is_own else adopt(place, decision.artifact)
    assert decision.key is not None
    stage_log.info("%s (%s)", decision.action, decision.reason)
    if stage.needs_ray:
        connect_ray()
    begun = time.monotonic()
    artifact = stage.build(config, artifacts, Draft.open(place, decision.key, still_held))
    stage_log.info("finished in %s: %s", duration(time.monotonic() - begun), counts(artifact))
    return artifact


def counts(artifact: Artifact) -> str:
    """A stage's counts in a few words: rows kept, rows dropped and why."""
    summary = artifact.summary
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in sorted(summary["dropped"].items())) or "none"
    return f"{summary['rows']:,} rows, dropped: {dropped}"


def _log_breakdown(seconds: Mapping[str, float], total: float) -> None:
    """Where the time went, one line a stage."""
    for name, spent in seconds.items():
        log.info("%-13s %9s  %5.1f%%", name, duration(spent), 100 * spent / total)
    log.info("%-13s %9s", "total", duration(total))


# --- alone ---------------------------------------------------------------------------------------------------------


def report(run_dir: str) -> str:
    """(Re)build the HTML report of a run from what is finished; the page's place."""
    from s2l_ray.report import build_report

    place = Storage(run_dir)
    if not any(place.exists(f"{name}/{MANIFEST}") for name in STAGE_NAMES):
        raise ArtifactError(f"{place.uri}: no finished stage there. Give the directory of a run (`s2l run` says where it is).")
    page = build_report(place)
    get_log("report").info("%s", page)
    return page


def select_trajectories(
    source: str,
    output: str,
    clustering: ClusteringConfig,
    selection: SelectionConfig,
    machines: GroupingConfig = GroupingConfig(),  # noqa: B008 - frozen
) -> Artifact:
    """Clustering and selection alone, on anybody's trajectories: `output` gets `clustering/` and `selection/`.

    The same numbers give exactly what the pipeline gives. Finished already for the same input and recipe: reused.
    """
    from s2l_ray.clustering import build_clustering
    from s2l_ray.selection import build_selection, check_columns
    from s2l_ray.trajectory_files import fetch_rows, files_identity, find_artifact

    begun, place = time.monotonic(), Storage(output)
    if machines.engine == "ray":
        connect_ray()
    with exclusive(place) as still_held:
        own = find_artifact(source)
        with _streamed(own or source, place, clustering.seed, clustering.stratify_by) as (store, scratch):
            check_columns(selection, store)
            with ThreadPoolExecutor(2) as pool:
                identity = own.identity if own is not None else store.identity(pool)
            key = Key("clustering", schema_of("clustering"), clustering.model_dump(mode="json"), {"trajectories": identity})

            def group(draft: Draft) -> Artifact:
                return build_clustering(clustering, machines, store, scratch, draft)

            groups = _select_stage(place, key, group, still_held)
            inputs = {"trajectories": identity, "clustering": groups.identity}
            if own is None:  # columns that are only passed through are in no identity yet
                inputs["rows"] = files_identity(source)
            key = Key("selection", schema_of("selection"), selection.model_dump(mode="json"), inputs)

            def build(draft: Draft) -> Artifact:
                fetch = partial(fetch_rows, own or source)
                return build_selection(selection, store, groups, fetch, scratch, draft)

            subset = _select_stage(place, key, build, still_held)
    log.info(
        "%s examples in %s/%s (%s)",
        f"{subset.summary['rows']:,}",
        subset.root.uri,
        SELECTED,
        duration(time.monotonic() - begun),
    )
    return subset


def _select_stage(place: Storage, key: Key, build: Callable[[Draft], Artifact], still_held: Callable[[], None]) -> Artifact:
    found = Artifact.find(place.child(key.stage))
    if found is None:
        return build(Draft.open(place, key, still_held))
    if found.fingerprint != key.fingerprint:
        raise ArtifactError(refusal(place.child(key.stage), key, found.manifest, "Give another --output"))
    found.check_sizes()
    get_log(key.stage).info("reused (fingerprint %s)", key.fingerprint)
    return found


def export_subset(run_dir: str, file_format: str, output: str, subset: str = "selected") -> int:
    """Write the subset's rows to one JSON Lines or Parquet file, whole or not at all; how many they are."""
    selection = Artifact.read(Storage(run_dir).child("selection"))
    if f"{subset}.parquet" not in selection.manifest["files"]:
        hint = " Set evaluation.random_control=true for a random control." if subset == "random" else ""
        known = ", ".join(path.removesuffix(".parquet") for path in selection.manifest["files"])
        raise ArtifactError(f"{run_dir}: has no subset '{subset}'. There are: {known}.{hint}")
    folder, _, name = absolute_uri(output).rpartition("/")
    data = selection.read_bytes(f"{subset}.parquet")
    if file_format == "jsonl":
        table = pq.read_table(io.BytesIO(data))
        lines = (json.dumps(row, ensure_ascii=False, default=str) for batch in table.to_batches() for row in batch.to_pylist())
        data = "".join(f"{line}\n" for line in lines).encode()
    Storage(folder).write(name, data)
    return int(selection.summary["rows"])
