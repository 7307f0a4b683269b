"""How many examples each group gives, and in which order: equal shares of every group, small groups first (METHOD, step 4).

The selection is the first B of *one order*: (rank inside the group, larger group first, larger cluster id first), a
round-robin over the groups. It gives the quotas of water-filling, so a smaller budget is contained in a larger one, and
a budget in tokens is the longest prefix that fits. With strata the round-robin runs over the strata, each in its own
such order (the reference code). Inside a group the order is that of the hash priorities, which no row's position
decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from s2l_ray.errors import ConfigError

Integers = NDArray[np.int64]


def water_fill(sizes: Sequence[int] | Integers, budget: int, *, defer_up_to: int = 0) -> Integers:
    """How many examples each group gets, shape (K,), in the order of `sizes` (METHOD, step 4).

    Groups are visited by (size, position) ascending, and each gets floor(remaining / groups left) or all it has; groups
    of at most `defer_up_to` come last. The sum is `budget`, or all there is if that is less.

    Raises ConfigError for a negative budget.
    """
    if budget < 0:
        raise ConfigError(f"selection.budget: must be above 0, found {budget}.")
    sizes_K = np.asarray(sizes, np.int64)
    quotas_K = np.zeros_like(sizes_K)
    for group in (sizes_K > defer_up_to, sizes_K <= defer_up_to):
        members = np.flatnonzero(group)
        remaining = budget - int(quotas_K.sum())
        for visited, cluster_id in enumerate(members[np.argsort(sizes_K[members], kind="stable")]):
            quotas_K[cluster_id] = min(sizes_K[cluster_id], remaining // (len(members) - visited))
            remaining -= int(quotas_K[cluster_id])
    return quotas_K


def quotas(sizes_K: Integers, budget: int, *, strata_K: Integers | None = None, defer_up_to: int = 0) -> Integers:
    """How many examples each group gets, shape (K,), where the budget is shared over the strata first.

    `strata_K` is the stratum of each group. Raises ConfigError for a negative budget.
    """
    if strata_K is None:
        return water_fill(sizes_K, budget, defer_up_to=defer_up_to)
    quotas_K = np.zeros_like(sizes_K)
    # Strata without rows are none: their names were seen elsewhere.
    of_strata = water_fill(np.bincount(strata_K, sizes_K).astype(np.int64), budget)
    for stratum, share in enumerate(of_strata):
        members = np.flatnonzero(strata_K == stratum)
        quotas_K[members] = water_fill(sizes_K[members], int(share), defer_up_to=defer_up_to)
    return quotas_K


def selection_order(
    cluster_ids_N: NDArray[np.integer[Any]],
    priorities_N: NDArray[np.uint64],
    *,
    sizes_K: Integers | None = None,
    strata_K: Integers | None = None,
    defer_up_to: int = 0,
) -> Integers:
    """All rows in the order in which they are taken, shape (N,); among equal priorities the first row comes first.

    Groups of at most `defer_up_to` rows come after all others (of their stratum). `strata_K` is the stratum of each group.
    Where only some rows of each group are given, those of lowest priority, `sizes_K` are the sizes of the whole groups.
    """
    if sizes_K is None:
        sizes_K = np.bincount(cluster_ids_N)
    ranks_N = ranks(cluster_ids_N, priorities_N)
    turns_N = _turns(sizes_K)[cluster_ids_N]
    is_deferred_N = (sizes_K <= defer_up_to)[cluster_ids_N]
    order_N = np.lexsort((turns_N, ranks_N, is_deferred_N))
    if strata_K is None:
        return order_N
    strata_K = np.asarray(strata_K)
    strata_N = strata_K[cluster_ids_N]
    places_N = np.empty_like(order_N)
    places_N[order_N] = np.arange(len(order_N))
    return np.lexsort((_turns(np.bincount(strata_K, sizes_K))[strata_N], ranks(strata_N, places_N)))


def ranks(groups_N: NDArray[np.integer[Any]], keys_N: NDArray[Any]) -> Integers:
    """Each row's rank by key inside its group, from 0, shape (N,); of equal keys the first row comes first."""
    order_N = np.lexsort((keys_N, groups_N))
    sizes_K = np.bincount(groups_N)
    ranks_N = np.empty(len(order_N), np.int64)
    ranks_N[order_N] = np.arange(len(order_N)) - np.repeat(np.cumsum(sizes_K) - sizes_K, sizes_K)
    return ranks_N


def _turns(sizes_K: NDArray[Any]) -> Integers:
    """When each group's turn comes in a round: larger groups first, of equal ones the larger id."""
    turns_K = np.empty(len(sizes_K), np.int64)
    turns_K[np.argsort(sizes_K, kind="stable")[::-1]] = np.arange(len(sizes_K))
    return turns_K
