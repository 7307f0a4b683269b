"""`draw: spread`: of each group as many groups of its own rows as it gives rows, and of each the most central row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from s2l_ray.clustering.columns import Floats, MemoryColumn
from s2l_ray.clustering.features import Features
from s2l_ray.clustering.kmeans import lloyd, plus_plus
from s2l_ray.clustering.local_rows import LocalRows
from s2l_ray.clustering.threads import SearchThreads
from s2l_ray.selection.quotas import Integers

# Larger groups are dealt out by priority into pieces of at most so many rows: time grows with rows times quota.
PIECE_ROWS = 4_096
NUM_ITERATIONS = 20


def spread(
    rows: Callable[[], Iterable[pa.Table]], measured: Iterable[Floats], features: Features, quotas_K: Integers
) -> pa.Table:
    """The chosen rows, in the order in which `rows` gives them; `measured` is what the features are made of, block by block.

    Where rows do not differ enough for as many groups, rows of lowest priority fill the quota. Memory: the features of all
    rows.
    """
    blocks = list(_features_and_keys(rows(), measured, features))
    features_NF, groups_N, priorities_N = (np.concatenate(columns) for columns in zip(*blocks, strict=True))
    by_group_N = np.lexsort((priorities_N, groups_N))
    ends_K = np.cumsum(np.bincount(groups_N, minlength=len(quotas_K)))
    is_chosen_N = np.zeros(len(groups_N), bool)
    with SearchThreads() as pool:
        for members, quota in zip(np.split(by_group_N, ends_K[:-1]), quotas_K.tolist(), strict=True):
            num_pieces = max(1, -(-len(members) // PIECE_ROWS))
            for piece in range(num_pieces if quota else 0):
                part = members[piece::num_pieces]
                share = quota // num_pieces + (piece < quota % num_pieces)
                seed = int(priorities_N[part[0]])
                is_chosen_N[part[_most_central(features_NF[part], share, seed, pool)]] = True
    found, start = [], 0
    for block in rows():
        found.append(block.take(pa.array(np.flatnonzero(is_chosen_N[start : start + len(block)]))))
        start += len(block)
    return pa.concat_tables(found).combine_chunks()


def _features_and_keys(
    rows: Iterable[pa.Table], measured: Iterable[Floats], features: Features
) -> Iterator[tuple[Floats, NDArray[np.int32], NDArray[np.uint64]]]:
    for block, values_MT in zip(rows, measured, strict=True):
        yield features(values_MT), block["cluster_id"].to_numpy(), block["priority"].to_numpy()


def _most_central(features_NF: Floats, count: int, seed: int, pool: SearchThreads) -> Integers:
    """So many of some rows, given in order of priority: of each of as many groups of them the row nearest to its centroid."""
    if count in (0, len(features_NF)):
        return np.arange(count)
    rows = LocalRows(MemoryColumn(features_NF), features_NF.shape[1], pool)
    lloyd(rows, pool.submit(plus_plus, features_NF, count, seed).result(), NUM_ITERATIONS)
    labels_N, distances_N = (np.concatenate(columns) for columns in zip(*rows.results(), strict=True))
    nearest_N = np.lexsort((distances_N, labels_N))  # of equally near ones the first, of lower priority
    found = nearest_N[np.unique(labels_N[nearest_N], return_index=True)[1]]
    others = np.setdiff1d(np.arange(len(features_NF)), found)
    return np.concatenate([found, others[: count - len(found)]])
