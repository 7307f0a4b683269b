"""Groups that know no sources, for `recovery.py`: from losses, their statistics and hidden states, by k-means and mixtures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from s2l_ray import cluster
from s2l_ray.clustering.features import Features, Measured, Spectrum
from s2l_ray.config import RunConfig
from s2l_ray.examples.ids import priorities
from s2l_ray.selection.quotas import Sharing, selection_order
from s2l_ray.storage.artifacts import Artifact
from s2l_ray.storage.places import Storage
from s2l_ray.trajectories.files import streamed
from s2l_ray.trajectories.store import TrajectoryStore

# Components with less of the variance are left out where components are scaled alike.
MIN_SHARE = 1e-4
Floats = NDArray[np.float32]
Integers = NDArray[np.int64]

PROXIES: dict[str, dict[str, Any]] = {
    "": {},
    "long": {"proxy.epochs": 8},
    "slow": {"proxy.learning_rate": 2.0e-4},
}
"""What is different about a proxy beside the readings' own: 3 epochs at 2e-3."""


@dataclass(frozen=True)
class Candidate:
    """Groups that know no sources: what they are made of, and how."""

    see: tuple[str, ...]
    """`raw`, `whitened`, `profile` as the package's features; `embedding` and `target_embedding`: the mean hidden state of the
    proxy after training, and of the pretrained target."""

    how: str = "kmeans"
    """`kmeans`; `spherical`: of unit vectors; `levels`; `mixture`: of Gaussians with full covariances, over principal
    components scaled to variance 1, each row to its likeliest."""

    num: tuple[int, ...] = (100,)
    """K, or the levels."""

    allocation: float = 0.0
    proxy: str = ""
    """One of PROXIES."""

    @property
    def name(self) -> str:
        """Names it in tables and files."""
        shown = "-".join([*self.see, self.how, *map(str, self.num)])
        return shown + (f"-allocation{self.allocation:g}" if self.allocation else "") + (f"-{self.proxy}" if self.proxy else "")


def candidates() -> list[Candidate]:
    """All that are diagnosed."""
    found = [Candidate((see,), num=(k,)) for see in ("raw", "profile", "whitened") for k in (10, 30, 100, 300)]
    found += [Candidate(("raw",), allocation=0.5), Candidate(("profile",), num=(10,), allocation=0.5)]
    levels = (1000, 100, 20)
    found += [Candidate((see,), "levels", levels) for see in ("raw", "profile", "embedding")]
    for how in ("kmeans", "spherical"):
        found += [Candidate(("embedding",), how, (k,)) for k in (10, 30, 100, 300)]
    found += [Candidate(("raw", "embedding"), "kmeans", (k,)) for k in (10, 30, 100, 300)]
    found += [Candidate(("raw", "embedding"), "levels", levels)]
    found += [Candidate(see, "mixture", (k,)) for see in MIXED for k in (5, 10, 20, 40)]
    found += [Candidate(("target_embedding",), how, (k,)) for how in ("kmeans", "spherical", "mixture") for k in (10, 100)]
    for proxy in ("long", "slow"):
        found += [Candidate(("raw",), proxy=proxy), Candidate(("embedding",), num=(10,), proxy=proxy)]
        found += [Candidate(("embedding",), "levels", levels, proxy=proxy)]
        found += [Candidate(see, "mixture", (10,), proxy=proxy) for see in MIXED]
    return found


MIXED = (("raw",), ("profile",), ("embedding",), ("profile", "embedding"))
# --- what is seen, and the groups ----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class SeenPool:
    """The pool of a run in ascending order of ids: N rows."""

    example_ids: pa.Array
    sources_N: Integers
    """For random's rivals and for diagnosis: no candidate gets them."""

    source_names: list[str]
    matrices: dict[str, Floats]
    """What candidates may see, (N, F) each."""

    def order(self, groups: tuple[Integers, tuple[Integers, ...]] | None, seed: int, allocation: float = 0.0) -> Integers:
        """All rows in the order of a selection from groups (with their parents), or of a random one."""
        keys_N = priorities(self.example_ids, seed)
        if groups is None:
            return np.argsort(keys_N, kind="stable")
        labels_N, parents = groups
        return selection_order(labels_N, keys_N, Sharing(np.bincount(labels_N), None, parents, 0, allocation))

    def groups(self, one: Candidate, seed: int) -> tuple[Integers, tuple[Integers, ...]]:
        """A candidate's groups under a seed, and the groups of these."""
        seen_NF = self._joined(one.see)
        if one.how == "mixture":
            return mixture_of(seen_NF, one.num[0], seed), ()
        if one.how == "spherical":
            seen_NF = self.matrices[one.see[0]]
            seen_NF = seen_NF / np.linalg.norm(seen_NF, axis=1, keepdims=True)
        numbers: dict[str, Any] = {"levels": list(one.num)} if one.how == "levels" else {"num_clusters": one.num[0]}
        found = cluster(seen_NF, example_ids=self.example_ids, seed=seed, num_threads=1, **numbers)
        return found.cluster_ids_N.astype(np.int64), found.parents

    def _joined(self, see: tuple[str, ...]) -> Floats:
        """Features side by side; those of a hidden state, and of several kinds, with variance 1 each, and each kind weighs as
        much."""
        if len(see) == 1 and not see[0].endswith("embedding"):
            return self.matrices[see[0]]
        widest = max(self.matrices[name].shape[1] for name in see)
        scaled = [standardised(self.matrices[name]) * np.sqrt(widest / self.matrices[name].shape[1]) for name in see]
        return np.concatenate(scaled, axis=1).astype(np.float32)


def standardised(values_NF: Floats) -> Floats:
    """Each feature with mean 0 and variance 1."""
    return np.asarray((values_NF - values_NF.mean(axis=0)) / np.maximum(values_NF.std(axis=0), 1e-6), np.float32)


def mixture_of(values_NF: Floats, num_groups: int, seed: int) -> Integers:
    """Likeliest of K Gaussians, (N,), renumbered without empty ones: their covariances let groups differ in size and shape."""
    from sklearn.mixture import GaussianMixture

    components_NF, variances_F, _ = np.linalg.svd(values_NF - values_NF.mean(axis=0), full_matrices=False)
    kept = variances_F**2 > MIN_SHARE * (variances_F**2).sum()
    scaled_NF = components_NF[:, kept].astype(np.float64) * np.sqrt(len(values_NF))
    made = GaussianMixture(num_groups, covariance_type="full", reg_covar=1e-3, max_iter=60, random_state=seed)
    return np.unique(made.fit_predict(scaled_NF), return_inverse=True)[1]


@contextmanager
def opened(trajectories: Artifact, place: Storage) -> Iterator[TrajectoryStore]:
    """A run's trajectories with their statistics."""
    with streamed(trajectories, place.child("recovery-work"), seed=0, statistics=True) as (store, _):
        yield store


def seen(finished: Mapping[str, Artifact], place: Storage) -> SeenPool:
    """The pool as candidates see it, but for the target's embedding."""
    matrices: dict[str, Floats] = {}
    with opened(finished["trajectories"], place) as store:
        for kind in ("raw", "whitened", "profile"):
            measured = Measured.of(kind, store.num_points)  # type: ignore[arg-type]
            values_NI = np.concatenate([measured(block) for block in store.blocks(*measured.columns)])
            of_losses = Spectrum.of(values_NI[:, : store.num_points])
            matrices[kind] = Features.of(kind, values_NI, of_losses)(values_NI)  # type: ignore[arg-type]
        matrices["embedding"] = store.measurements["embedding"]()
        blocks = list(store.blocks("source"))
        ids = pa.concat_arrays([block["example_id"].combine_chunks() for block in blocks])
        sources_N = np.concatenate([block["source"].to_numpy() for block in blocks]).astype(np.int64)
        return SeenPool(ids, sources_N, list(store.names["source"]), matrices)


def embedding_of_target(config: RunConfig, finished: Mapping[str, Artifact], pool: SeenPool, saved: Path) -> Floats:
    """The same mean hidden state from the pretrained target: what a larger model would have seen. Kept in a file."""
    if not saved.exists():
        import torch

        from s2l_ray.training.embeddings import example_embeddings
        from s2l_ray.training.models import make_model
        from s2l_ray.training.token_pools import pool_tokens
        from s2l_ray.training.token_rows import RowLimit
        from s2l_ray.training.tokenizers import target_tokenizer

        torch.set_num_threads(1)
        tokenizer = target_tokenizer(config.target, finished["proxy"])
        read = pool_tokens(finished["examples"], tokenizer, RowLimit.of(config.target))
        assert read.row_ids == read.example_ids.to_pylist(), "one row an example"
        found_NH = example_embeddings(make_model(config.target, tokenizer), read.tokens, 4096, "float32")
        np.save(saved, found_NH[np.argsort(np.array(read.row_ids))])
    found_NH = np.load(saved)
    assert len(found_NH) == len(pool.example_ids)
    return np.asarray(found_NH, np.float32)
