"""Is S2L's premise true on these data? Do examples of a group, whose losses on the proxy fell alike, have similar gradients?

If they do, equal shares of the groups give nearly the gradient of all data, and training on them ends nearly where training on
all does. Three things are measured on a sample of the pool, the rows of lowest priority whose groups have two sampled rows:

1. gradients: of each example's loss with respect to all weights, under the proxy in the middle and at the end of its training
   (on request under the target before its own): how alike they are within groups and between them, and what of their variance
   the groups explain, beside random groups of the same sizes, and beside sources;
2. agreement: whether the target ranks examples as the proxy does. A target is trained on the sample and scored at some steps;
3. effective dimension: how many directions the trajectories have, which limits what any grouping of them can know.
"""

from __future__ import annotations

import functools
import io
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from s2l_ray.clustering.features import Spectrum
from s2l_ray.compare import similarity
from s2l_ray.compare.premise_wording import verdict
from s2l_ray.compare.premise_worker import ALL_ROWS, FACTS, TARGET, TRAINED, PremiseJob, PremiseWorker
from s2l_ray.config import RunConfig, WorkerConfig
from s2l_ray.errors import ConfigError, DataError
from s2l_ray.examples.ids import priorities
from s2l_ray.progress import get_log
from s2l_ray.runtime.pool import Unit, do_units
from s2l_ray.runtime.workers import Workers
from s2l_ray.storage.artifacts import Artifact
from s2l_ray.storage.layout import ASSIGNMENTS, COMPARE, PREMISE, SCHEMA, folder_step, step_folder
from s2l_ray.storage.ownership import foreign, scratch_of
from s2l_ray.storage.places import Storage
from s2l_ray.storage.records import digest
from s2l_ray.trajectories.loss_columns import losses_matrix

VERSION = 1
"""Raised when the same settings give other figures than before."""
ROWS_PER_PART = 32
# So many rows of lowest priority for each that is wanted are looked at for groups with two.
CANDIDATES = 64
_log = get_log("compare")


@dataclass(frozen=True)
class PremiseSettings:
    """How the premise is measured."""

    num_rows: int = 256
    num_features: int = 4096
    """Numbers that a gradient is reduced to."""

    num_bootstraps: int = 1000
    num_permutations: int = 1000
    on_target: bool = False
    """Also gradients under the target before training."""

    num_target_points: int = 4
    """Points of the target's trajectories after the untrained one; 0: no target is trained."""

    seed: int = 0

    def check(self) -> None:
        """Raise ConfigError for numbers with which nothing can be measured."""
        least = {"num_rows": 16, "num_features": 64, "num_bootstraps": 20, "num_permutations": 20, "num_target_points": 0}
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise ConfigError(
                    f"premise: {name}={getattr(self, name)} is too few to measure anything. Give {smallest} or more."
                )


@dataclass(frozen=True, eq=False)
class Sample:
    """The sampled rows, in ascending order of ids."""

    example_ids: list[str]
    clusters_N: np.ndarray
    sources_N: np.ndarray
    """Numbers of the sources, int64."""

    losses_NT: np.ndarray
    """The proxy's trajectories, in nats."""

    lengths_N: np.ndarray
    """Response tokens of the proxy's tokenizer."""

    def of(self, example_ids: Sequence[str]) -> Sample:
        """Some of the rows, in the order of these ids."""
        places = {example_id: row for row, example_id in enumerate(self.example_ids)}
        rows = np.array([places[example_id] for example_id in example_ids], np.int64)
        arrays = (self.clusters_N, self.sources_N, self.losses_NT, self.lengths_N)
        return Sample(list(example_ids), *(array[rows] for array in arrays))


def measure_premise(
    config: RunConfig,
    inputs: Mapping[str, Artifact],
    run: Storage,
    machines: WorkerConfig,
    settings: PremiseSettings | None = None,
) -> dict[str, Any]:
    """Measure the premise on a run's finished stages, on workers of the connected Ray; RUN/compare/premise.json has the result.

    `inputs`: the artifacts `examples`, `proxy`, `trajectories` and `clustering`. The caller holds the run. The same call again
    goes on where it was interrupted, and where all is measured gives what is there; with other settings it is measured anew.
    Raises ConfigError and DataError for what cannot be measured with these settings or groups, ArtifactError where somebody
    else's file has that name.
    """
    settings, begun = settings or PremiseSettings(), time.monotonic()
    settings.check()
    name = fingerprint(config, inputs, settings)
    known = run.child(COMPARE).read_json(PREMISE)
    if known is not None and not (isinstance(known, dict) and known.get("schema") == SCHEMA):
        raise foreign(run.child(COMPARE), PREMISE)
    if known is not None and known.get("fingerprint") == name:
        return dict(known)
    sample = choose_sample(inputs["clustering"], inputs["trajectories"], settings)
    steps = gradient_steps(inputs["proxy"].summary["steps"])
    models = [step_folder(step) for step in steps] + ([TARGET] if settings.on_target else [])
    ids = [sample.example_ids[start : start + ROWS_PER_PART] for start in range(0, len(sample.example_ids), ROWS_PER_PART)]
    parts = {f"rows-{number:05d}": some for number, some in enumerate(ids)}
    job = PremiseJob(config, inputs, parts, settings.num_features, settings.num_target_points, settings.seed)
    work, workers = scratch_of(run).child(f"premise-{name}"), Workers.resolve(machines, one_per_cpu=True)
    _log.info("premise: %d examples of %d groups", len(sample.example_ids), len(np.unique(sample.clusters_N)))
    do_units("compare", job.units(models), PremiseWorker, job, work, workers)
    premise: dict[str, Any] = {
        "schema": SCHEMA,
        "fingerprint": name,
        "settings": asdict(settings),
        "sample": {
            "rows": len(sample.example_ids),
            "groups": len(np.unique(sample.clusters_N)),
            "sources": len(np.unique(sample.sources_N)),
            "pool": inputs["trajectories"].summary["rows"],
            "num_clusters": inputs["clustering"].summary["num_clusters"],
        },
        "gradients": [_of_gradients(model, [Unit(model, part) for part in parts], work, sample, settings) for model in models],
        "agreement": _of_target(work, sample, settings) if settings.num_target_points else None,
        "effective_dimension": dimension(sample.losses_NT),
        "seconds": time.monotonic() - begun,
    }
    premise["sentence"] = verdict(premise["gradients"][-1])
    run.child(COMPARE).write_json(PREMISE, premise)
    work.delete()
    return premise


def fingerprint(config: RunConfig, inputs: Mapping[str, Artifact], settings: PremiseSettings) -> str:
    """Stands for all that decides the figures."""
    identities = {name: inputs[name].identity for name in ("examples", "proxy", "trajectories", "clustering")}
    return digest([VERSION, asdict(settings), config.target.model_dump(mode="json"), identities])


def gradient_steps(steps: Sequence[int]) -> list[int]:
    """Of the recorded steps the middle one and the last; the untrained model does not count unless it is alone."""
    trained = [step for step in steps if step > 0] or list(steps)
    return sorted({trained[(len(trained) - 1) // 2], trained[-1]})


# --- the sample ----------------------------------------------------------------------------------------------------


def choose_sample(clustering: Artifact, trajectories: Artifact, settings: PremiseSettings) -> Sample:
    """At most `num_rows` rows: the rows of lowest priority, without those whose group has only one among them.

    So many rows are looked at that those which stay are as many as wanted. Raises DataError where no two groups have two rows.
    """
    least = CANDIDATES * settings.num_rows
    candidates = pa.table({"example_id": pa.array([], pa.string()), "cluster_id": pa.array([], pa.int64())})
    order_N = np.zeros(0, np.int64)
    for part in clustering.parts(ASSIGNMENTS):
        read = clustering.read_table(part, ["example_id", "cluster_id"]).cast(candidates.schema)
        candidates = pa.concat_tables([candidates, read])
        order_N = np.argsort(priorities(candidates["example_id"], f"premise-{settings.seed}"), kind="stable")[:least]
        candidates = candidates.take(pa.array(order_N))
    clusters_N = candidates["cluster_id"].to_numpy()
    chosen = with_company(clusters_N, settings.num_rows)
    if len(np.unique(clusters_N[chosen])) < 2:
        raise DataError(
            f"the premise needs two groups of two rows each: {len(np.unique(clusters_N)):,} groups of {len(clusters_N):,} rows "
            "have not. Ask for fewer groups (clustering.num_clusters) that are more than one."
        )
    table = candidates.take(pa.array(chosen)).sort_by("example_id")
    rows = [_rows_of(trajectories, part, table["example_id"]) for part in trajectories.parts()]
    found = pa.concat_tables(rows).sort_by("example_id").combine_chunks()
    _, sources_N = np.unique(np.array(found["source"].to_pylist(), object), return_inverse=True)
    return Sample(
        found["example_id"].to_pylist(),
        table["cluster_id"].to_numpy(),
        sources_N,
        losses_matrix(found),
        found["num_response_tokens"].to_numpy(),
    )


def with_company(clusters_N: np.ndarray, num_rows: int) -> np.ndarray:
    """Numbers of the first rows whose group occurs twice among those up to a last one, which is the last that leaves
    `num_rows` of them at most."""
    _, numbers_N = np.unique(clusters_N, return_inverse=True)
    seen_K, kept, last = np.zeros(len(clusters_N), np.int64), 0, 0
    for number in numbers_N.tolist():
        seen_K[number] += 1
        kept += 0 if seen_K[number] == 1 else 2 if seen_K[number] == 2 else 1
        if kept > num_rows:
            break
        last += 1
    counts_K = np.bincount(numbers_N[:last], minlength=len(seen_K))
    return np.flatnonzero(counts_K[numbers_N[:last]] > 1)


def _rows_of(trajectories: Artifact, part: str, ids: pa.ChunkedArray) -> pa.Table:
    table = trajectories.read_table(part, ["example_id", "source", "losses", "num_response_tokens"])
    return table.filter(pc.is_in(table["example_id"], ids.combine_chunks()))


# --- the figures ---------------------------------------------------------------------------------------------------


def _read(work: Storage, units: Sequence[Unit]) -> tuple[list[str], np.ndarray, list[dict[str, Any]]]:
    """Ids and values (N, F) of some units, and the facts of each."""
    tables = [pq.read_table(io.BytesIO(work.read(unit.path))) for unit in units]
    joined = pa.concat_tables([table.replace_schema_metadata(None) for table in tables]).combine_chunks()
    values = joined["values"].combine_chunks()
    values_NF = values.flatten().to_numpy().reshape(len(joined), values.type.list_size)
    return joined["example_id"].to_pylist(), values_NF, [json.loads(table.schema.metadata[FACTS]) for table in tables]


def _of_gradients(
    model: str, units: Sequence[Unit], work: Storage, sample: Sample, settings: PremiseSettings
) -> dict[str, Any]:
    ids, gradients_NM, facts = _read(work, units)
    step = folder_step(model)
    return {
        "model": "target" if step is None else "proxy",
        "step": step or 0,
        "rows": len(ids),
        "parameters": facts[0]["parameters"],
        "features": gradients_NM.shape[1],
        "cosine_error": 0.0 if facts[0]["exact"] else gradients_NM.shape[1] ** -0.5,
        "worker_seconds": sum(one["seconds"] for one in facts),
        **likeness(gradients_NM, sample.of(ids), settings),
    }


def likeness(gradients_NM: np.ndarray, sample: Sample, settings: PremiseSettings) -> dict[str, Any]:
    """How alike gradients are within groups and sources and between them, what of their variance these explain, and whether
    examples whose trajectories are near each other have similar gradients. For what there are no two of: None.

    Beside the groups, others of the same sizes in each source that need no trajectory: bands of the final loss, and of the
    response's length.
    """
    gram_NN = similarity.gram(gradients_NM)
    cosines_NN = similarity.cosines(gram_NN)
    counts_RN = similarity.resamplings(len(gram_NN), settings.num_bootstraps, settings.seed)
    explained = functools.partial(
        similarity.explained_by, gram_NN, num_permutations=settings.num_permutations, seed=settings.seed
    )
    clusters_N, sources_N, has_sources = sample.clusters_N, sample.sources_N, len(np.unique(sample.sources_N)) > 1
    values = {"final_loss_bands": sample.losses_NT[:, -1], "length_bands": sample.lengths_N}
    bands = {name: similarity.bands(values_N, clusters_N, sources_N) for name, values_N in values.items()}
    return {
        "cosine": {
            "groups": similarity.mean_cosines(cosines_NN, clusters_N, counts_RN),
            "sources": similarity.mean_cosines(cosines_NN, sources_N, counts_RN),
        },
        "explained": {
            "groups": explained(clusters_N),
            "groups_within_sources": explained(clusters_N, strata_N=sources_N) if has_sources else None,
            "sources": explained(sources_N),
            **{name: explained(labels_N) for name, labels_N in bands.items()},
        },
        "near_is_alike": similarity.pair_rank_correlation(-similarity.distances(sample.losses_NT), cosines_NN, counts_RN),
    }


def _of_target(work: Storage, sample: Sample, settings: PremiseSettings) -> dict[str, Any]:
    """Whether a target that learns the sample ranks its examples as the proxy does."""
    ids, losses_NT, (facts,) = _read(work, [Unit(TRAINED, ALL_ROWS)])
    sample = sample.of(ids)
    return {
        "rows": len(ids),
        "steps": facts["steps"],
        "batch": facts["batch"],
        "worker_seconds": facts["seconds"],
        "effective_dimension": dimension(losses_NT),
        **agreement(sample.losses_NT, losses_NT, sample.clusters_N, settings),
    }


def agreement(
    of_proxy_NT: np.ndarray, of_target_NT: np.ndarray, clusters_N: np.ndarray, settings: PremiseSettings
) -> dict[str, Any]:
    """Spearman's correlations of proxy and target over examples: final losses, losses' fall from the first point to the last,
    distances of all pairs of trajectories; and what of the target's trajectories the proxy's groups explain.

    The two may have different numbers of points."""
    counts_RN = similarity.resamplings(len(of_proxy_NT), settings.num_bootstraps, settings.seed)

    def falls(losses_NT: np.ndarray) -> np.ndarray:
        return np.asarray(losses_NT[:, 0] - losses_NT[:, -1])

    proxy_NN, target_NN = (similarity.distances(losses_NT) for losses_NT in (of_proxy_NT, of_target_NT))
    gram_NN = similarity.gram(of_target_NT)
    return {
        "final_loss": similarity.rank_correlation(of_proxy_NT[:, -1], of_target_NT[:, -1], counts_RN),
        "reduction": similarity.rank_correlation(falls(of_proxy_NT), falls(of_target_NT), counts_RN)
        if of_proxy_NT.shape[1] > 1
        else None,
        "distance": similarity.pair_rank_correlation(proxy_NN, target_NN, counts_RN),
        "explained": similarity.explained_by(gram_NN, clusters_N, settings.num_permutations, settings.seed),
    }


def dimension(losses_NT: np.ndarray) -> dict[str, float]:
    """Effective dimension of trajectories, of how many points, and the share of the variance in the first direction."""
    spectrum = Spectrum.of(losses_NT)
    return {
        "value": spectrum.effective_dimension,
        "points": losses_NT.shape[1],
        "first_direction": float(spectrum.shares_T[0]),
    }
