"""Where k-means starts: k-means++, and rows far from the groups of a sample, which the sample itself may lack."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from s2l_ray.clustering.bounds import squares_to_nearest
from s2l_ray.clustering.columns import Column, Floats
from s2l_ray.clustering.threads import SearchThreads, faiss
from s2l_ray.trajectories.sorting import in_order
from s2l_ray.trajectories.store import BLOCK_ROWS


def plus_plus(features_NF: Floats, num_clusters: int, seed: int) -> Floats:
    """Initial centroids, shape (K, F), by greedy k-means++ (Arthur and Vassilvitskii, 2007, section 4): each is the best of
    2 + log K rows sampled by their squared distances to those before. A fit from them came out 1 to 2% lower in inertia
    than one from a single sampled row each, and no restart made up for that.

    Call it in a thread of `SearchThreads`, so that the number of processors decides no bit.
    """
    rng = np.random.default_rng(seed)
    chosen = [int(rng.integers(len(features_NF)))]
    squares_N = np.maximum(faiss.pairwise_distances(features_NF, features_NF[chosen])[:, 0], 0)
    for _ in range(num_clusters - 1):
        totals_N = np.cumsum(squares_N, dtype=np.float64)
        points_C = rng.random(2 + int(math.log(num_clusters))) * totals_N[-1]
        rows_C = np.minimum(np.searchsorted(totals_N, points_C, side="right"), len(features_NF) - 1)
        left_NC = np.minimum(np.maximum(faiss.pairwise_distances(features_NF, features_NF[rows_C]), 0), squares_N[:, None])
        best = int(np.argmin(left_NC.sum(axis=0, dtype=np.float64)))
        chosen.append(int(rows_C[best]))
        squares_N = np.ascontiguousarray(left_NC[:, best])
    return features_NF[chosen]


def far_rows(features: Column, centroids_KF: Floats, num_wanted: int, seed: np.uint64, pool: SearchThreads) -> Floats:
    """Rows sampled by their squared distances to the nearest centroid, shape (at most `num_wanted`, F): one pass over all.

    Without replacement and in one stream: the smallest of -log(u) / squared distance (Efraimidis and Spirakis, 2006), u
    being a hash of the row's number in the order of ids.
    """
    width = centroids_KF.shape[1]

    def lowest(keys_N: NDArray[np.float64], rows_NF: Floats) -> tuple[NDArray[np.float64], Floats]:
        kept = np.sort(np.argsort(keys_N, kind="stable")[:num_wanted])
        return keys_N[kept], rows_NF[kept]

    def one_block(start: int) -> tuple[NDArray[np.float64], Floats]:
        rows_NF = features.read(start, start + BLOCK_ROWS).reshape(-1, width)
        random_N = uniform(np.arange(start, start + len(rows_NF)), seed)
        keys_N = -np.log(random_N) / squares_to_nearest(rows_NF, centroids_KF)
        if num_wanted >= len(keys_N):
            return keys_N, rows_NF
        kept = np.sort(np.argpartition(keys_N, num_wanted)[:num_wanted])
        return keys_N[kept], rows_NF[kept]

    keys, rows = np.empty(0), np.empty((0, width), np.float32)
    for more_keys, more_rows in in_order(pool, one_block, range(0, len(features), BLOCK_ROWS)):
        keys, rows = lowest(np.concatenate([keys, more_keys]), np.concatenate([rows, more_rows]))
    return rows


def uniform(numbers_N: NDArray[np.int64], seed: np.uint64) -> NDArray[np.float64]:
    """A random number in (0, 1) for each number, shape (N,): the finalizer of SplitMix64 (Steele et al., 2014)."""
    mixed = (numbers_N.astype(np.uint64) + seed) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((mixed ^ (mixed >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) * 2.0**-53 + 2.0**-54
