"""Shares that grow with a group's size, in one order: quotas, nesting, levels of groups, and what they do to a mean."""

from __future__ import annotations

import itertools
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from s2l_ray.clustering.stage import cluster
from s2l_ray.errors import ConfigError
from s2l_ray.examples.ids import priorities
from s2l_ray.selection.choosing import select_rows
from s2l_ray.selection.quotas import Sharing, selection_order, water_fill
from s2l_ray.selection.stage import select

powers = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0])
sizes_of_groups = st.lists(
    st.one_of(st.integers(1, 5), st.integers(1, 60), st.sampled_from([200, 1_000, 5_000])), min_size=1, max_size=30
)


def exact_shares(sizes: list[int], budget: int, power: float) -> list[float]:
    """The capped power allocation of real numbers: groups that are full give back what the others share."""
    weights = [Fraction(float(size) ** power) for size in sizes]
    open_groups, left = set(range(len(sizes))), Fraction(min(budget, sum(sizes)))
    shares = [Fraction(0)] * len(sizes)
    while open_groups:
        total = sum(weights[k] for k in open_groups)
        full = {k for k in open_groups if left * weights[k] >= sizes[k] * total}
        if not full:
            for k in open_groups:
                shares[k] = left * weights[k] / total
            break
        for k in full:
            shares[k] = Fraction(sizes[k])
        left -= sum(sizes[k] for k in full)
        open_groups -= full
    return [float(share) for share in shares]


@given(sizes_of_groups, powers, st.floats(0, 1.1))
@settings(max_examples=300, deadline=None)
@example([4] * 1_000 + [6_000], 1.0, 0.1)
@example([1, 1], 1.0, 0.5)
def test_quotas_are_the_capped_powers_of_the_sizes_within_rounding(sizes: list[int], power: float, fraction: float) -> None:
    budget = int(fraction * sum(sizes))
    quotas = water_fill(sizes, budget, allocation=power)
    assert quotas.sum() == min(budget, sum(sizes))
    assert (quotas <= sizes).all()
    off = np.abs(quotas - np.array(exact_shares(sizes, budget, power)))
    assert off.max() < (1 if power == 0 else 1.5)
    assert np.mean(off) < 0.75 if len(sizes) > 1 else off.max() < 1e-9


def test_quotas_rarely_leave_the_two_integers_next_to_their_share() -> None:
    rng, off = np.random.default_rng(0), []
    for _ in range(400):
        sizes = np.maximum(1, np.exp(rng.normal(3, rng.uniform(0, 2.5), rng.integers(2, 150)))).astype(int).tolist()
        power, budget = float(rng.choice([0.2, 0.5, 0.8, 1])), int(rng.integers(1, sum(sizes) + 1))
        quotas = water_fill(sizes, budget, allocation=power)
        off.append(np.abs(quotas - np.array(exact_shares(sizes, budget, power))).max())
    assert np.mean(np.array(off) >= 1) < 0.02
    assert max(off) < 1.25


def test_many_small_groups_together_get_their_share_though_none_can_have_its_own() -> None:
    """A tenth of four rows is less than half a row: rounded alone, all would get nothing and the large group the rest."""
    quotas = water_fill([4] * 500 + [6_000] + [3] * 500, 950, allocation=1.0)
    assert abs(quotas[:500].sum() - 200) <= 1
    assert abs(quotas[500] - 600) <= 1
    assert abs(quotas[501:].sum() - 150) <= 1
    assert abs(quotas[:250].sum() - 100) <= 1  # those of low loss, too
    assert quotas.max() == quotas[500]


@pytest.mark.parametrize(
    ("sizes", "budget", "power", "quotas"),
    [
        ([100, 300, 600], 100, 1.0, [10, 30, 60]),
        ([100, 400, 900], 60, 0.5, [10, 20, 30]),
        ([100, 400, 900], 60, 0.0, [20, 20, 20]),
        ([4, 100, 900], 120, 0.5, [4, 29, 87]),  # 4 : 10 : 30 of 116 once the first is full
        ([5, 5], 10, 0.3, [5, 5]),
        ([7], 3, 1.0, [3]),
        ([0, 8, 0], 4, 1.0, [0, 4, 0]),
        ([], 4, 1.0, []),
    ],
)
def test_shares_as_computed_by_hand(sizes: list[int], budget: int, power: float, quotas: list[int]) -> None:
    assert water_fill(sizes, budget, allocation=power).tolist() == quotas


@pytest.mark.parametrize("allocation", [-0.1, 1.5, float("nan")])
def test_an_allocation_out_of_range_is_refused(allocation: float) -> None:
    with pytest.raises(ConfigError, match=r"selection\.allocation: must be from 0"):
        water_fill([1, 2], 2, allocation=allocation)
    with pytest.raises(ConfigError, match="allocation"):
        select(np.random.default_rng(0).random((9, 2)), budget=3, num_clusters=2, allocation=allocation)


# --- one order -----------------------------------------------------------------------------------------------------


@st.composite
def sharings(draw: Any) -> Sharing:
    """Groups, perhaps in groups of groups, perhaps in strata."""
    sizes = np.array(draw(sizes_of_groups))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    parents, count = [], len(sizes)
    for _ in range(draw(st.integers(0, 2))):
        numbers = np.unique(rng.integers(0, max(1, count // 2), count), return_inverse=True)[1]
        parents.append(numbers)
        count = int(numbers.max()) + 1
    strata = rng.integers(0, 3, count) if draw(st.booleans()) else None
    return Sharing(sizes, strata, parents, draw(st.sampled_from([0, 0, 2])), draw(powers), draw(powers))


@given(sharings(), st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=200, deadline=None)
def test_a_smaller_budget_is_the_beginning_of_a_larger_one(sharing: Sharing, fraction: float, of: float) -> None:
    num_rows = int(sharing.sizes_K.sum())
    turns = sharing.turns(num_rows)
    assert np.array_equal(np.bincount(turns, minlength=len(sharing.sizes_K)), sharing.sizes_K)
    large = int(of * num_rows)
    for count in (large, int(fraction * large)):
        assert np.array_equal(sharing.turns(count), turns[:count])
        assert np.array_equal(sharing.quotas(count), np.bincount(turns[:count], minlength=len(sharing.sizes_K)))


@given(sharings(), st.floats(0, 1))
@settings(max_examples=200, deadline=None)
def test_the_budget_is_shared_from_the_top_down(sharing: Sharing, fraction: float) -> None:
    budget = int(fraction * sharing.sizes_K.sum())
    levels = [*sharing.parents, *([] if sharing.strata_K is None else [sharing.strata_K])]
    members = [np.zeros(len(sharing.sizes_K), int)]  # of each group the node of each level, from the top
    nodes = np.arange(len(sharing.sizes_K))
    above = []
    for parents in levels:
        nodes = parents[nodes]
        above.append(nodes)
    members += [*above[::-1], np.arange(len(sharing.sizes_K))]
    quotas = sharing.quotas(budget)
    for depth, (outer, inner) in enumerate(itertools.pairwise(members)):
        power = sharing.allocation_of_strata if sharing.strata_K is not None and depth == 0 else sharing.allocation
        defer = sharing.defer_up_to if depth == len(members) - 2 else 0
        for node in np.unique(outer):
            children = np.unique(inner[outer == node])
            sizes = [int(sharing.sizes_K[(outer == node) & (inner == child)].sum()) for child in children]
            found = [int(quotas[(outer == node) & (inner == child)].sum()) for child in children]
            assert found == water_fill(sizes, sum(found), allocation=power, defer_up_to=defer).tolist()


@given(sharings(), st.floats(0.01, 1), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_the_rows_are_those_of_lowest_priority_in_each_group(sharing: Sharing, fraction: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    cluster_ids = rng.permutation(np.repeat(np.arange(len(sharing.sizes_K)), sharing.sizes_K))
    ranks = rng.integers(0, 2**64, len(cluster_ids), np.uint64)
    budget = max(1, int(fraction * len(ranks)))
    chosen = selection_order(cluster_ids, ranks, sharing)[:budget]
    for cluster_id, quota in enumerate(sharing.quotas(budget).tolist()):
        members = np.flatnonzero(cluster_ids == cluster_id)
        assert set(members[np.argsort(ranks[members])][:quota]) == set(chosen[cluster_ids[chosen] == cluster_id])
    if not sharing.parents:
        names = {"defer_up_to": sharing.defer_up_to, "allocation": sharing.allocation}
        found = select_rows(
            cluster_ids,
            ranks,
            budget,
            strata_K=sharing.strata_K,
            allocation_of_strata=sharing.allocation_of_strata,
            **names,  # type: ignore[arg-type]
        )
        assert found.tolist() == sorted(chosen.tolist())


# --- what a user calls ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("allocation", [0.0, 0.5, 1.0])
def test_select_gives_each_group_its_share_in_any_order_of_the_rows(allocation: float) -> None:
    rng = np.random.default_rng(3)
    losses, ids = rng.gamma(2, 1, (4_000, 5)), rng.permutation(4_000)
    options: dict[str, Any] = {"budget": 400, "num_clusters": 30, "num_restarts": 1, "allocation": allocation}
    found = select(losses, example_ids=ids, **options)
    assert found.quotas_K.tolist() == water_fill(found.sizes_K, 400, allocation=allocation).tolist()
    assert found.weights_M.sum() == pytest.approx(4_000)
    order = rng.permutation(4_000)
    again = select(losses[order], example_ids=ids[order], **options)
    assert again.example_ids.equals(found.example_ids)
    assert again.weights_M.tobytes() == found.weights_M.tobytes()
    larger = select(losses, example_ids=ids, **options | {"budget": 900})
    assert set(found.example_ids.to_pylist()) <= set(larger.example_ids.to_pylist())


def test_strata_have_a_share_of_their_own() -> None:
    rng = np.random.default_rng(5)
    sources = np.repeat(["small", "middle", "large"], [200, 800, 3_000])
    for power, expected in ((0.0, [200, 200, 200]), (1.0, [30, 120, 450])):
        found = select(
            rng.random((4_000, 3)), budget=600, num_clusters=20, num_restarts=1, sources=sources, allocation_of_strata=power
        )
        chosen = sources[found.example_ids.to_numpy()]
        assert [int((chosen == name).sum()) for name in ("small", "middle", "large")] == pytest.approx(expected, abs=1)


def test_at_allocation_one_the_mean_loss_varies_no_more_than_a_random_subsets() -> None:
    """Stratified sampling with proportional allocation (Cochran, 1977, section 5.6): what lies between groups is no error
    any more. With groups that are no groups, a random partition, nothing is gained, and nothing to speak of lost."""
    rng = np.random.default_rng(1)
    losses = rng.gamma(2, 1, (2_000, 1)) * np.array([1.0, 0.8, 0.7]) + rng.normal(0, 0.1, (2_000, 3))
    final, budget = losses[:, -1], 200
    labels = {"k-means": cluster(losses, num_clusters=40, num_restarts=1).cluster_ids_N, "any": rng.integers(0, 40, 2_000)}
    draws = [priorities(np.arange(2_000), seed) for seed in range(400)]
    random = [final[np.argsort(draw)[:budget]].mean() for draw in draws]
    errors = {
        name: [final[select_rows(ids, draw, budget, allocation=1.0)].mean() - final.mean() for draw in draws]
        for name, ids in labels.items()
    }
    squares = {name: float(np.mean(np.square(found))) for name, found in errors.items()}
    assert squares["k-means"] < 0.2 * np.var(random)
    # The standard error of a variance over 400 draws is 7%.
    assert squares["any"] < 1.2 * np.var(random)
