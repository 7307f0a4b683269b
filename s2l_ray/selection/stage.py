"""Groups and a budget -> the subset: the Python call, and the stage that writes the corpus's own rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from s2l_ray.clustering.columns import Floats, Ints
from s2l_ray.clustering.groups import Clustering
from s2l_ray.clustering.opening import open_rows
from s2l_ray.clustering.stage import cluster_store, read_groups
from s2l_ray.clustering.stratifying import AUTO
from s2l_ray.config import ClusteringConfig, SelectionConfig, checked
from s2l_ray.config.recipes import counts_target_tokens
from s2l_ray.examples.ids import id_column, one_array
from s2l_ray.examples.reading import fetch_rows
from s2l_ray.progress import get_log
from s2l_ray.runtime.process import give_back_freed_memory
from s2l_ray.runtime.session import connect_ray
from s2l_ray.selection.assignments import PartAssignments
from s2l_ray.selection.card import describe, front_matter
from s2l_ray.selection.choosing import Budget, num_tokens
from s2l_ray.selection.subset_rows import FetchRows, SubsetRows
from s2l_ray.selection.subsets import Selection, Subset, check_columns, choose_subsets, grouping_for, random_rows, stability
from s2l_ray.selectors import S2L
from s2l_ray.storage.artifacts import Artifact
from s2l_ray.storage.drafts import Draft
from s2l_ray.storage.layout import CARD, RANDOM, SELECTED, as_written, further_subset
from s2l_ray.storage.stages import Context
from s2l_ray.trajectories.measured import given_measurements
from s2l_ray.trajectories.ranged_store import RangedStore
from s2l_ray.trajectories.store import BLOCK_ROWS, NUM_RESPONSE_TOKENS, Trajectories, TrajectoryStore

_log = get_log("selection")


def select(
    losses: Any,
    *,
    budget: Budget,
    method: str = "s2l",
    num_clusters: int = 100,
    levels: list[int] | None = None,
    seed: int = 0,
    num_iterations: int = 20,
    num_restarts: int = 3,
    features: str = "raw",
    statistics: Mapping[str, Any] | None = None,
    stratify_by: Any = "auto",
    sources: Any = None,
    example_ids: Any = None,
    num_response_tokens: Any = None,
    defer_groups_up_to: int = 0,
    min_per_source: int = 0,
    allocation: float = 0.0,
    allocation_of_strata: float = 0.0,
    draw: str = "random",
    measurements: Mapping[str, Any] | None = None,
) -> Selection:
    """A balanced subset of examples by the losses of a small model: grouped by k-means, then a share of each group.

    `losses` is anything of shape (N, T), in nats; ids are row numbers unless given. `budget` is a number of examples, a
    fraction of N below 1, or `{"tokens": n}`, which needs `num_response_tokens` (one per row). `sources` (one per row) are the
    strata where there are several, and share `num_clusters`; `stratify_by` (one per row) are others, with `num_clusters` groups
    in each; None: no strata. The budget is shared over the strata first. `min_per_source` goes by `sources`, else by strata.
    `levels`, such as [1000, 100, 20], take the place of `num_clusters`. `statistics` are for `features="profile"`, as in
    `cluster`; `measurements` for methods that need `loss_without_prompt` (N,), `embedding` (N, H) or `validation_embedding`
    (V, H). Methods that read no groups get one of all rows. `seed` feeds both steps. The others are as in a config.

    Raises DataError naming the ids of ragged, missing or non-finite losses, ConfigError for an argument out of range.
    """
    config = checked(
        SelectionConfig,
        method=method,
        budget=budget,
        defer_groups_up_to=defer_groups_up_to,
        min_per_source=min_per_source,
        allocation=allocation,
        allocation_of_strata=allocation_of_strata,
        draw=draw,
        seed=seed,
    )
    strata = None if _is_auto(stratify_by) else stratify_by
    grouping = checked(
        ClusteringConfig,
        **({"levels": levels} if levels else {"num_clusters": num_clusters}),
        num_iterations=num_iterations,
        num_restarts=num_restarts,
        features=features,
        stratify_by=stratify_by if strata is None else "stratum",
        seed=seed,
    )
    store = _in_memory(losses, example_ids, sources, num_response_tokens, strata, statistics, measurements, seed)
    check_columns(config, store)
    groups = cluster_store(store, grouping_for(config, grouping))
    return choose_subsets(store, lambda: in_blocks(groups), groups, config, grouping)[0].selection


def _in_memory(
    losses: Any,
    ids: Any,
    sources: Any,
    tokens: Any,
    strata: Any,
    statistics: Mapping[str, Any] | None,
    measurements: Mapping[str, Any] | None,
    seed: int,
) -> TrajectoryStore:
    columns = {} if strata is None else {"stratum": strata}
    found = Trajectories.of(losses, ids, strata if sources is None else sources, tokens, columns, statistics)
    given = given_measurements(measurements or {}, ids, len(found))
    return replace(TrajectoryStore.of(found, seed), measurements=given)


def _is_auto(strata: Any) -> bool:
    return isinstance(strata, str) and strata == AUTO


def in_blocks(groups: Clustering) -> Iterator[tuple[Ints, Floats]]:
    """Groups in memory as a store streams them: the group of every row and its distance, block by block."""
    for start in range(0, len(groups.cluster_ids_N), BLOCK_ROWS):
        yield groups.cluster_ids_N[start : start + BLOCK_ROWS], groups.distances_N[start : start + BLOCK_ROWS]


def build(context: Context) -> Artifact:
    """Choose a run's subset and publish it (see `publish_selection`)."""
    config, inputs, draft = context.config, context.inputs, context.draft
    profiles = config.selection.draw == "spread" and config.clustering.features == "profile"
    machines, seed = config.machines.clustering, config.selection.seed
    with open_rows(inputs["trajectories"], draft.shared, machines, seed=seed, statistics=profiles) as (found, scratch):
        store = found
        if counts_target_tokens(config):
            from s2l_ray.training.token_parts import count_response_tokens

            connect_ray()
            store = store.with_tokens(lambda ids: count_response_tokens(config, inputs, ids))
        return publish_selection(
            config.selection,
            store,
            inputs["clustering"],
            lambda ids, _numbers: fetch_rows(inputs["examples"], ids, in_ray=isinstance(store, RangedStore)),
            scratch,
            draft,
            random_control=config.evaluation.random_control,
            origin={name: inputs[name] for name in ("examples", "proxy")},
        )


def publish_selection(
    config: SelectionConfig,
    store: TrajectoryStore,
    clustering: Artifact,
    fetch_rows: FetchRows,
    scratch: Path,
    draft: Draft,
    *,
    random_control: bool = False,
    origin: Mapping[str, Artifact] | None = None,
) -> Artifact:
    """Choose the subset and publish `selected.parquet` (and `random.parquet`): the rows as they were + our columns.

    For a corpus of JSON `selected.jsonl` has the same rows in the same order as they were written. Each of
    `config.more_budgets` gets files of its own, named in the summary. `README.md` is the subset's card, by which `datasets`
    reads the directory; `origin` has the run's examples and proxy for it, where there is a run. Texts are streamed: memory
    is for ids. Raises ConfigError for a budget that cannot be met, DataError for a clustering of other examples.
    """
    give_back_freed_memory()
    groups = read_groups(clustering)
    assigned = PartAssignments(clustering, store)
    grouping = checked(ClusteringConfig, **clustering.manifest["recipe"])
    subsets = choose_subsets(store, assigned, groups, config, grouping)
    give_back_freed_memory()  # that of the candidates
    largest = max(subsets, key=lambda one: len(one.selection))
    files = [SELECTED, *(further_subset(_file_name(one.selection.budget)) for one in subsets[1:])]
    control = None
    with ThreadPoolExecutor(2) as pool:
        rows = SubsetRows.fetch(largest.rows, fetch_rows, scratch / "selected", pool)
        for path, one in zip(files, subsets, strict=True):
            _write(draft, path, rows, one.rows, one.selection.weights_M)
        if random_control:
            control = random_rows(store, assigned, len(subsets[0].selection), config.seed)
            control_rows = SubsetRows.fetch(control, fetch_rows, scratch / "random", pool)
            _write(draft, RANDOM, control_rows, control, np.full(len(control), len(store) / len(control)))
    summary = _summary(store, subsets[0], control) | {"columns": rows.names, "added_columns": rows.added}
    summary |= config.model_dump(include={"method", "allocation", "allocation_of_strata", "draw"})
    summary["stability"] = stability(clustering, groups, config, len(subsets[0].selection))
    summary["budgets"] = [
        {"budget": one.selection.budget, "rows": len(one.selection), "file": path}
        for path, one in zip(files, subsets, strict=True)
    ]
    named = {path.removesuffix(".parquet"): path for path in [*files, *([RANDOM] if random_control else [])]}
    contents = {path: draft.files[path].sha256 for path in named.values()}
    card = front_matter(named, contents=contents) + describe(
        draft.key.recipe, summary, {"clustering": clustering, **(origin or {})}
    )
    draft.write(CARD, card.encode())
    for one in subsets:
        _log.info(
            f"%s of %s examples {'' if config.method == S2L else f'by {config.method}, '}from %d groups (quotas %s to %s)",
            *(f"{len(one.selection):,}", f"{len(store):,}", groups.num_clusters),
            *(f"{one.selection.quotas_K.min():,}", f"{one.selection.quotas_K.max():,}"),
        )
    return draft.publish(summary)


def _write(draft: Draft, path: str, rows: SubsetRows, chosen: pa.Table, weights_M: NDArray[np.float64]) -> None:
    """A subset as Parquet with our columns, and where the corpus is of JSON also as it was written."""
    draft.write_tables(path, rows.with_ours(chosen, weights_M))
    if not rows.has_json:
        return
    made_strict: Counter[str] = Counter()
    draft.write_pieces(as_written(path), rows.as_written(chosen, made_strict))
    if made_strict["rows"]:
        _log.info(
            "%s: %s of %s rows have NaN or infinite numbers, which JSON lacks: null there",
            *(as_written(path), f"{made_strict['rows']:,}", f"{len(chosen):,}"),
        )


def _file_name(budget: Budget) -> str:
    return f"tokens-{budget['tokens']}" if isinstance(budget, dict) else str(budget)


def _summary(store: TrajectoryStore, subset: Subset, control: pa.Table | None) -> dict[str, Any]:
    """For the manifest and the report; `random` is null where there is no random control."""
    selection = subset.selection
    store = replace(store, measurements={}, lowest=None)  # tasks need none of these
    names = store.names_of("source") if "source" in store.names else []
    has_tokens = store.has(NUM_RESPONSE_TOKENS)

    def counts(rows: pa.Table | None) -> list[int] | None:
        return None if rows is None else np.bincount(rows["source"].to_numpy(), minlength=len(names)).tolist()

    def tokens(table: pa.Table | None) -> int | None:
        return None if table is None or not has_tokens else num_tokens(table)

    def of_block(block: pa.Table) -> NDArray[np.int64]:
        """Response tokens and the rows of each source."""
        in_sources = np.bincount(store.codes(block, "source"), minlength=len(names)) if names else np.zeros(0, np.int64)
        return np.array([num_tokens(block) if has_tokens else 0, *in_sources], np.int64)

    is_known = has_tokens or names
    found = sum(store.each_block(None, of_block, "source", NUM_RESPONSE_TOKENS)) if is_known else np.zeros(1, np.int64)
    in_pool, *pool = np.asarray(found).tolist()
    selected, random = (counts(subset.rows), counts(control)) if names else ([], None)
    return {
        "rows": len(selection),
        "pool": len(store),
        "budget": selection.budget,
        "num_clusters": len(selection.sizes_K),
        "sizes": selection.sizes_K.tolist(),
        "quotas": selection.quotas_K.tolist(),
        "sources": {
            name: {"pool": pool[code], "selected": selected[code], "random": None if random is None else random[code]}
            for code, name in enumerate(names)
            if selected is not None
        },
        "num_response_tokens": {
            "pool": in_pool if has_tokens else None,
            "selected": tokens(subset.rows),
            "random": tokens(control),
        },
    }


def read_selection(artifact: Artifact) -> Selection:
    """The subset in a `selection/` directory. Raises ArtifactError naming a damaged file."""
    summary = artifact.summary
    names = summary["columns"]
    table = artifact.read_table(SELECTED, columns=list(names.values())).combine_chunks()
    ids = id_column(one_array(table[names["example_id"]]), f"{artifact.root.uri}/{SELECTED}")
    return Selection(
        example_ids=ids,
        cluster_ids_M=table[names["cluster_id"]].to_numpy(),
        weights_M=table[names["weight"]].to_numpy(),
        quotas_K=np.asarray(summary["quotas"]),
        sizes_K=np.asarray(summary["sizes"]),
        budget=summary["budget"],
    )
