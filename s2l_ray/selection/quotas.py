"""How many examples each group gives, and in which order (METHOD, step 4, and the family that it belongs to).

A group's quota grows with its size to a power, `allocation`, and is capped by its size: at 0 groups have equal shares (the
paper), at 1 they have shares as in the pool (stratified sampling), between them lies the temperature sampling of multilingual
training. The selection is the first B of *one order*, so a smaller budget is contained in a larger one, and a budget in
tokens is the longest prefix that fits.

The order at 0 is (rank inside the group, larger group first, larger cluster id first), a round-robin that gives the quotas of
water-filling. Above 0 its groups are the leaves of a binary tree: of the first m rows of a node one half gets the integer
nearest to its exact share of m, the other the rest. A share grows by at most one when m does, so neither half's count ever
falls, whatever the budget. Why not the round-robin with (rank + 1/2) / size**allocation for a rank: that rounds each group
alone, and where many are small (a thousand groups of four rows, a tenth of them wanted) all round the same way and large
groups get what they leave: eight rows off in random cases, against one here. Neighbours in the tree have ids, and so mean
losses, near each other: of every stretch of the loss about its share is taken, which each group's own rounding does not give.

With strata, or levels of groups of groups, the order runs over the topmost, each in its own such order, and so on down (the
reference code has strata). Inside a group the order is that of the hash priorities, which no row's position decides. All
numbers are float64, added in one order: the same bytes on processors of one kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from s2l_ray.errors import ConfigError

Integers = NDArray[np.int64]

# A group of this share of a node's weight is a half of its own: the groups' rounding errors add up less.
LARGE_SHARE = 1 / 3


def water_fill(sizes: Sequence[int] | Integers, budget: int, *, defer_up_to: int = 0, allocation: float = 0.0) -> Integers:
    """How many examples each group gets, shape (K,), in the order of `sizes` (METHOD, step 4).

    At allocation 0 groups are visited by (size, position) ascending, and each gets floor(remaining / groups left) or all it
    has; above it shares grow with size**allocation (see the module). Groups of at most `defer_up_to` come last. The sum is
    `budget`, or all there is if that is less.

    Raises ConfigError for a negative budget, or an allocation that is not from 0 to 1.
    """
    if budget < 0:
        raise ConfigError(f"selection.budget: must be above 0, found {budget}.")
    if not 0 <= allocation <= 1:
        raise ConfigError(f"selection.allocation: must be from 0 (equal shares) to 1 (as in the pool), found {allocation}.")
    sizes_K = np.asarray(sizes, np.int64)
    if allocation:
        return Sharing(sizes_K, defer_up_to=defer_up_to, allocation=allocation).quotas(budget)
    quotas_K = np.zeros_like(sizes_K)
    for group in (sizes_K > defer_up_to, sizes_K <= defer_up_to):
        members = np.flatnonzero(group)
        remaining = budget - int(quotas_K.sum())
        for visited, cluster_id in enumerate(members[np.argsort(sizes_K[members], kind="stable")]):
            quotas_K[cluster_id] = min(sizes_K[cluster_id], remaining // (len(members) - visited))
            remaining -= int(quotas_K[cluster_id])
    return quotas_K


@dataclass(frozen=True, eq=False)
class Sharing:
    """How a budget is shared over groups, in one order for all budgets."""

    sizes_K: Integers
    """Rows in each group."""

    strata_K: Integers | None = None
    """The stratum of each group, or of each group of the topmost level where there are levels; None without strata."""

    parents: Sequence[Integers] = ()
    """For each level of groups of groups, from below: in which of its groups each group of the level under it is."""

    defer_up_to: int = 0
    """Groups of at most so many rows come after all others (of their stratum, or of their group of groups)."""

    allocation: float = 0.0
    """Power of the size with which a group's share grows, 0 to 1; for groups of groups, too."""

    allocation_of_strata: float = 0.0

    def quotas(self, count: int) -> Integers:
        """How many of the first `count` rows each group gives, shape (K,)."""
        return np.bincount(self.turns(count), minlength=len(self.sizes_K))

    def turns(self, count: int) -> Integers:
        """The group of each of the first `count` rows of the order, or of all rows if there are fewer."""
        maps = [*self.parents, *([] if self.strata_K is None else [np.asarray(self.strata_K)])]
        sizes = [self.sizes_K]
        for parents in maps:
            sizes.append(np.bincount(parents, sizes[-1]).astype(np.int64))
        # One node above all; its children are the topmost level, and so on down.
        turns_M = np.zeros(min(count, int(self.sizes_K.sum())), np.int64)
        for level in range(len(sizes) - 1, -1, -1):
            is_strata = self.strata_K is not None and level == len(maps)
            power = self.allocation_of_strata if is_strata else self.allocation
            parents = maps[level] if level < len(maps) else np.zeros(len(sizes[level]), np.int64)
            turns_M = _children(turns_M, parents, sizes[level], power, self.defer_up_to if level == 0 else 0)
        return turns_M


def _children(turns_M: Integers, parents: Integers, sizes: Integers, power: float, defer_up_to: int) -> Integers:
    """The turns of nodes as turns of their children."""
    found_M = np.empty_like(turns_M)
    by_node = np.argsort(turns_M, kind="stable")
    ends = np.cumsum(np.bincount(turns_M, minlength=int(parents.max(initial=0)) + 1))
    for node, places in enumerate(np.split(by_node, ends[:-1])):
        if not len(places):
            continue
        members, start = np.flatnonzero(parents == node), 0
        for part in (members[sizes[members] > defer_up_to], members[sizes[members] <= defer_up_to]):
            count = min(len(places) - start, int(sizes[part].sum()))
            if count:
                found_M[places[start : start + count]] = part[_shared(sizes[part], count, power)]
            start += count
    return found_M


def _shared(sizes_K: Integers, count: int, power: float) -> Integers:
    """The group of each of the first `count` rows (no more than there are)."""
    if power:
        filled = np.flatnonzero(sizes_K)
        return filled[_halved(sizes_K[filled].astype(np.float64), sizes_K[filled].astype(np.float64) ** power, count)]
    quotas_K = water_fill(sizes_K, count)
    turns_M = np.repeat(np.arange(len(sizes_K)), quotas_K)
    ranks_M = np.arange(count) - np.repeat(np.cumsum(quotas_K) - quotas_K, quotas_K)
    return turns_M[np.lexsort((_places(sizes_K)[turns_M], ranks_M))]


def _halved(sizes_K: NDArray[np.float64], weights_K: NDArray[np.float64], count: int) -> Integers:
    """The same by the tree: halves of about the same weight, or a large group and all others."""
    if len(sizes_K) == 1 or not count:
        return np.zeros(count, np.int64)
    largest = int(np.argmax(weights_K))
    is_first_K = np.arange(len(sizes_K)) == largest
    if weights_K[largest] < LARGE_SHARE * weights_K.sum():
        before_K = np.cumsum(weights_K)
        is_first_K = np.arange(len(sizes_K)) <= int(np.argmin(np.abs(before_K[:-1] - before_K[-1] / 2)))
    # Rows taken of each half when every group has given min(size, level * weight), where that bends.
    levels = np.concatenate([[0.0], np.unique(sizes_K / weights_K)])
    firsts, seconds = (_taken(sizes_K[half], weights_K[half], levels) for half in (is_first_K, ~is_first_K))
    numbers = np.arange(count + 1)
    counts = np.floor(np.interp(numbers, firsts + seconds, firsts) + 0.5).astype(np.int64)
    # By one at most, and never down: true of exact shares, and so of these up to a float's last digit.
    counts = np.maximum.accumulate(numbers + np.minimum.accumulate(counts - numbers))
    is_first_M = np.diff(counts) > 0
    num_first = int(counts[-1])
    turns_M = np.empty(count, np.int64)
    turns_M[is_first_M] = np.flatnonzero(is_first_K)[_halved(sizes_K[is_first_K], weights_K[is_first_K], num_first)]
    turns_M[~is_first_M] = np.flatnonzero(~is_first_K)[_halved(sizes_K[~is_first_K], weights_K[~is_first_K], count - num_first)]
    return turns_M


def _taken(sizes_K: NDArray[np.float64], weights_K: NDArray[np.float64], levels: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sum over groups of min(size, level * weight) at each level."""
    order_K = np.argsort(sizes_K / weights_K, kind="stable")
    num_full = np.searchsorted((sizes_K / weights_K)[order_K], levels, side="right")
    full = np.concatenate([[0.0], np.cumsum(sizes_K[order_K])])[num_full]
    rising = np.concatenate([np.cumsum(weights_K[order_K][::-1])[::-1], [0.0]])[num_full]
    return np.asarray(full + levels * rising)


def selection_order(
    cluster_ids_N: NDArray[np.integer[Any]],
    keys_N: NDArray[np.uint64],
    sharing: Sharing | None = None,
    count: int | None = None,
) -> Integers:
    """All rows in the order in which they are taken, shape (N,); among equal keys of a group the first row comes first.

    Where only some rows of each group are given, those of lowest key, `sharing` has the sizes of the whole groups, and
    `count` is how many of the order are wanted: the rows behind them are in any order.
    """
    if sharing is None:
        sharing = Sharing(np.bincount(cluster_ids_N))
    turns_M = sharing.turns(len(cluster_ids_N) if count is None else count)
    by_group_N = np.lexsort((keys_N, cluster_ids_N))
    firsts_K = np.cumsum(np.bincount(cluster_ids_N, minlength=len(sharing.sizes_K)))
    firsts_K = np.concatenate([[0], firsts_K[:-1]])
    rows_M = by_group_N[firsts_K[turns_M] + ranks(turns_M, np.arange(len(turns_M)))]
    is_behind_N = np.ones(len(cluster_ids_N), bool)
    is_behind_N[rows_M] = False
    return np.concatenate([rows_M, np.flatnonzero(is_behind_N)])


def ranks(groups_N: NDArray[np.integer[Any]], keys_N: NDArray[Any]) -> Integers:
    """Each row's rank by key inside its group, from 0, shape (N,); of equal keys the first row comes first."""
    order_N = np.lexsort((keys_N, groups_N))
    sizes_K = np.bincount(groups_N)
    ranks_N = np.empty(len(order_N), np.int64)
    ranks_N[order_N] = np.arange(len(order_N)) - np.repeat(np.cumsum(sizes_K) - sizes_K, sizes_K)
    return ranks_N


def _places(sizes_K: NDArray[Any]) -> Integers:
    """When each group's turn comes in a round: larger groups first, of equal ones the larger id."""
    places_K = np.empty(len(sizes_K), np.int64)
    places_K[np.argsort(sizes_K, kind="stable")[::-1]] = np.arange(len(sizes_K))
    return places_K
