"""What groups without labels recover: the measure on known numbers, and mixtures that find groups of other sizes and shapes."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def recovery(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark's module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import recovery

    return recovery


@pytest.fixture
def groups(recovery: ModuleType) -> ModuleType:
    """What makes its groups."""
    import recovery_groups

    return recovery_groups


def test_a_method_half_way_to_balance_recovers_half(recovery: ModuleType) -> None:
    random_K = np.array([3.0, 3.1, 2.9, 3.05])
    noise_K = np.array([0.002, -0.001, -0.002, 0.001])
    found = recovery.recovered(random_K, random_K - 0.05 + noise_K, random_K - 0.1 - noise_K)
    assert found["share"] == pytest.approx(0.5)
    assert found["low"] < 0.5 < found["high"]


def test_no_interval_is_given_where_balance_itself_gains_nothing(recovery: ModuleType) -> None:
    random_K = np.array([3.0, 3.1, 2.9, 3.05])
    found = recovery.recovered(random_K, random_K - 0.05, random_K + np.array([0.1, -0.1, 0.1, -0.1]))
    assert found["low"] is None


def test_a_mixture_keeps_a_small_group_beside_a_long_one(groups: ModuleType) -> None:
    rng = np.random.default_rng(0)
    long = rng.normal(size=(900, 2)) * (8.0, 0.1)
    small = rng.normal(size=(60, 2)) * (0.1, 0.1) + (0.0, 2.0)
    labels_N = groups.mixture_of(np.concatenate([long, small]).astype(np.float32), 2, 0)
    assert len(np.unique(labels_N[:900])) == 1
    assert len(np.unique(labels_N[900:])) == 1
    assert labels_N[0] != labels_N[-1]
