"""The whole flow on one page: the stages as one list, and what it means to run them.

    examples -> proxy -> trajectories -> clustering -> selection -> target -> evaluation -> report

Stages meet through artifacts, never through each other's functions. A stage whose fingerprint is found finished is
reused; one that was begun is continued; one that belongs to another recipe is refused before anything is started.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import getpass
import io
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pyarrow.parquet as pq

from s2l_ray.artifacts import (
    BUILDING,
    MANIFEST,
    SCHEMA,
    WORK,
    Artifact,
    Draft,
    Key,
    Storage,
    absolute_uri,
    adopt,
    provenance,
    refusal,
)
from s2l_ray.config import ClusteringConfig, RunConfig, SelectionConfig
from s2l_ray.errors import ArtifactError, ConfigError
from s2l_ray.progress import duration, get_log

Inputs = Mapping[str, Artifact]
Build = Callable[[RunConfig, Inputs, Draft], Artifact]
RUN = "run.json"
SELECTED = "selected.parquet"
ANOTHER_RUN = "Give another --run-dir (with --reuse RUN_DIR it takes from this one every stage that still matches)"
log = get_log("run")


# --- the stages ----------------------------------------------------------------------------------------------------


def _build_examples(config: RunConfig, _inputs: Inputs, draft: Draft) -> Artifact:
    from s2l_ray.examples import build_examples

    return build_examples(config.examples, config.machines.examples, draft)


def _build_proxy(config: RunConfig, inputs: Inputs, draft: Draft) -> Artifact:
    from s2l_ray.training.proxy import build_proxy

    return build_proxy(config, inputs, draft)


def _build_trajectories(config: RunConfig, inputs: Inputs, draft: Draft) -> Artifact:
    from s2l_ray.training.trajectories import build_trajectories

    return build_trajectories(config, inputs, draft)


def _build_clustering(config: RunConfig, inputs: Inputs, draft: Draft) -> Artifact:
    from s2l_ray.clustering import build_clustering
    from s2l_ray.trajectory_store import load_trajectories

    return build_clustering(config.clustering, load_trajectories(inputs["trajectories"]), draft)


def _build_selection(config: RunConfig, inputs: Inputs, draft: Draft) -> Artifact:
    from s2l_ray.clustering import read_clustering
    from s2l_ray.examples import fetch_rows
    from s2l_ray.selection import build_selection
    from s2l_ray.trajectory_store import load_trajectories

    trajectories = load_trajectories(inputs["trajectories"])
    if _counts_target_tokens(config):
        from s2l_ray.training.target import count_response_tokens

        connect_ray()
        counts_N = count_response_tokens(config, inputs, trajectories.example_ids)
        trajectories = replace(trajectories, num_response_tokens_N=counts_N)
    return build_selection(
        config.selection,
        trajectories,
        read_clustering(inputs["clustering"]),
        lambda ids: fetch_rows(inputs["examples"], ids),
        draft,
        random_control=config.evaluation.random_control,
    )


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


def _selection_recipe(config: RunConfig) -> dict[str, Any]:
    recipe = config.selection.model_dump(mode="json") | {"random_control": config.evaluation.random_control}
    counted_by = config.target.model_dump(mode="json", include={"model", "revision", "tokenizer", "max_tokens"})
    return recipe | ({"target": counted_by} if _counts_target_tokens(config) else {})


def _target_recipe(config: RunConfig) -> dict[str, Any]:
    return config.target.model_dump(mode="json") | {"random_control": config.evaluation.random_control}


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
    Stage("proxy", ("examples",), _recipe("proxy"), _build_proxy),
    Stage(
        "trajectories",
        ("examples", "proxy"),
        lambda config: config.trajectories.model_dump(mode="json") | {"max_tokens": config.proxy.max_tokens},
        _build_trajectories,
    ),
    Stage("clustering", ("trajectories",), _recipe("clustering"), _build_clustering, needs_ray=False),
    Stage(
        "selection",
        ("examples", "proxy", "trajectories", "clustering"),
        _selection_recipe,
        _build_selection,
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
    log.info("%s in %s", config.name, place.uri)
    with _exclusive(place):
        config = resolve_revisions(config, place)
        for decision in decide(config, place, other):
            if decision.action == "refuse":
                raise ArtifactError(decision.reason)
        _write_run(config, place)
        artifacts: dict[str, Artifact] = {}
        seconds: dict[str, float] = {}
        for stage in STAGES:
            begun = time.monotonic()
            artifacts[stage.name] = _run_stage(stage, config, place, other, artifacts)
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
    stage: Stage, config: RunConfig, place: Storage, other: Storage | None, artifacts: Mapping[str, Artifact]
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
    artifact = stage.build(config, artifacts, Draft.open(place, decision.key))
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


def connect_ray() -> None:
    """Connect to the Ray of RAY_ADDRESS (a submitted job has it), or start one on this machine; once per process.

    Ray is left running for its caller: a library must not shut down what others use.
    """
    is_ours = "RAY_ADDRESS" not in os.environ
    # Worker processes of a Ray started here inherit these. What stages have to say reaches the driver by itself, so the
    # workers' own output stays in Ray's log files; RAY_LOG_TO_DRIVER=1 shows it.
    defaults = {"RAY_LOG_TO_DRIVER": "0", "RAY_TRAIN_ENABLE_PRINT_PATCH": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    if is_ours:
        # Ray Data restarts actors whose arguments are objects, and Ray's core calls that an error every time.
        defaults |= {"RAY_BACKEND_LOG_LEVEL": "fatal", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
        # One machine is not preempted, and its controller need not poll as rarely as that of a cluster.
        defaults |= {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    import logging

    import ray

    if ray.is_initialized():
        return
    begun = time.monotonic()
    try:
        ray.init(include_dashboard=False if is_ours else None, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError) as error:
        address = os.environ.get("RAY_ADDRESS", "a new one on this machine")
        raise ConfigError(f"Ray ({address}): cannot be reached ({error}). Check RAY_ADDRESS, or unset it.") from error
    found = {name: int(amount) for name, amount in ray.cluster_resources().items() if name in ("CPU", "GPU")}
    log.info(
        "Ray: %s (%s)", ", ".join(f"{amount} {name}" for name, amount in found.items()), duration(time.monotonic() - begun)
    )


@contextlib.contextmanager
def _exclusive(place: Storage) -> Iterator[None]:
    """Hold the run directory: a second run on it is refused with who holds it. The lock of a dead process is free."""
    if not place.is_local:
        yield
        return
    path = place.child(WORK).path("lock")
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - held for the whole run
    except OSError as error:
        raise ArtifactError(f"{place.uri}: cannot be written ({error.strerror}). Give another --run-dir.") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise ArtifactError(f"{place.uri}: another run holds it ({file.read().strip()}). Wait for it or end it.") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} of {getpass.getuser()} on {socket.gethostname()}\n")
        file.flush()
        yield


def _write_run(config: RunConfig, place: Storage) -> None:
    """Write run.json: the resolved config, and who made it with what. Not rewritten while it says the same."""
    values = config.model_dump(mode="json")
    old = place.read_json(RUN)
    if old is not None and {name: old.get(name) for name in values} == values:
        return
    who = {"user": getpass.getuser(), "host": socket.gethostname()}
    place.write_json(RUN, {"schema": SCHEMA, **values, "provenance": provenance() | who})


def resolve_revisions(config: RunConfig, place: Storage) -> RunConfig:
    """The config with Hub models pinned to commits: what an earlier run of this directory pinned, else today's.

    Where the Hub cannot be reached the revision stays as it is; loading the model says what is wrong.
    """
    old = place.read_json(RUN) or {}
    for name in ("proxy", "target"):
        section = getattr(config, name)
        model = section.model
        if not isinstance(model, str) or "://" in model or os.path.exists(model) or _is_commit(section.revision):
            continue
        before = old.get(name, {})
        revision = before.get("revision") if before.get("model") == model else None
        revision = revision if _is_commit(revision) else _hub_commit(model, section.revision)
        config = config.model_copy(update={name: section.model_copy(update={"revision": revision})})
    return config


def _is_commit(revision: str | None) -> bool:
    return revision is not None and len(revision) == 40 and all(c in "0123456789abcdef" for c in revision)


def _hub_commit(model: str, revision: str | None) -> str | None:
    import huggingface_hub

    try:
        return str(huggingface_hub.HfApi().model_info(model, revision=revision, timeout=10).sha)
    except Exception as error:  # noqa: BLE001 - the Hub's client raises its HTTP library's errors, and changes that library
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        log.warning("%s is not pinned to a commit: the Hub does not answer (%s)", model, reason)
        return revision


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


def select_trajectories(source: str, output: str, clustering: ClusteringConfig, selection: SelectionConfig) -> Artifact:
    """Clustering and selection alone, on anybody's trajectories: `output` gets `clustering/` and `selection/`.

    The same numbers give exactly what the pipeline gives. Finished already for the same input and recipe: reused.
    """
    from s2l_ray.clustering import build_clustering, read_clustering
    from s2l_ray.selection import build_selection
    from s2l_ray.trajectory_store import content_identity, fetch_rows, files_identity, find_artifact, read_trajectories

    begun, place = time.monotonic(), Storage(output)
    with _exclusive(place):
        own = find_artifact(source)
        trajectories = read_trajectories(source, stratify_by=clustering.stratify_by)
        get_log("trajectories").info(
            "%s examples x %d points from %s", f"{len(trajectories):,}", trajectories.num_points, source
        )
        identity = own.identity if own is not None else content_identity(trajectories)
        key = Key("clustering", schema_of("clustering"), clustering.model_dump(mode="json"), {"trajectories": identity})
        groups = _select_stage(place, key, lambda draft: build_clustering(clustering, trajectories, draft))
        inputs = {"trajectories": identity, "clustering": groups.identity}
        if own is None:  # columns that are only passed through are in no identity yet
            inputs["rows"] = files_identity(source)
        key = Key("selection", schema_of("selection"), selection.model_dump(mode="json"), inputs)
        subset = _select_stage(
            place,
            key,
            lambda draft: build_selection(
                selection, trajectories, read_clustering(groups), lambda ids: fetch_rows(source, ids), draft
            ),
        )
    log.info(
        "%s examples in %s/%s (%s)",
        f"{subset.summary['rows']:,}",
        subset.root.uri,
        SELECTED,
        duration(time.monotonic() - begun),
    )
    return subset


def _select_stage(place: Storage, key: Key, build: Callable[[Draft], Artifact]) -> Artifact:
    found = Artifact.find(place.child(key.stage))
    if found is None:
        return build(Draft.open(place, key))
    if found.fingerprint != key.fingerprint:
        raise ArtifactError(refusal(place.child(key.stage), key, found.manifest, "Give another --output"))
    found.check_sizes()
    get_log(key.stage).info("reused (fingerprint %s)", key.fingerprint)
    return found


def export_subset(run_dir: str, file_format: str, output: str, subset: str = "selected") -> int:
    """Write the subset's rows to one JSON Lines or Parquet file, whole or not at all; how many they are."""
    selection = Artifact.read(Storage(run_dir).child("selection"))
    if f"{subset}.parquet" not in selection.manifest["files"]:
        raise ArtifactError(f"{run_dir}: has no random control. Set evaluation.random_control=true for one.")
    folder, _, name = absolute_uri(output).rpartition("/")
    data = selection.read_bytes(f"{subset}.parquet")
    if file_format == "jsonl":
        table = pq.read_table(io.BytesIO(data))
        lines = (json.dumps(row, ensure_ascii=False, default=str) for batch in table.to_batches() for row in batch.to_pylist())
        data = "".join(f"{line}\n" for line in lines).encode()
    Storage(folder).write(name, data)
    return int(selection.summary["rows"])


def disk_problem(error: OSError) -> str | None:
    """What the user must mend where writing failed, None for any other operating-system error."""
    kinds = {
        errno.ENOSPC: "the disk is full. Free some space; the same command goes on.",
        errno.EDQUOT: "the disk quota is used up. Free some space; the same command goes on.",
        errno.EACCES: "may not be written or read. Check its permissions.",
        errno.EROFS: "is on a read-only filesystem. Give another directory.",
        errno.ENOTDIR: "has a file where a directory is needed. Give another directory.",
    }
    reason = kinds.get(error.errno or 0)
    return None if reason is None else f"{error.filename or 'writing'}: {reason}"
