"""The example beyond language: what it records and chooses, and that its series is split by time."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from s2l_ray.trajectories.files import read_trajectories


@pytest.fixture(scope="module")
def example() -> ModuleType:
    """The script as a module: benchmarks are no package."""
    path = Path(__file__).parents[1] / "benchmarks" / "beyond_language.py"
    spec = importlib.util.spec_from_file_location("beyond_language", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["beyond_language"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_digits_are_recorded_grouped_and_chosen_from_the_pool_alone(example, tmp_path):
    pytest.importorskip("sklearn")
    task = example.load("digits", 0)
    assert len({*task.example_ids, *task.test_ids}) == 1797
    proxy = example.record_trajectories(task, 0, tmp_path / "trajectories", total_steps=96)

    found = read_trajectories(str(tmp_path / "trajectories"))
    row_of = {example_id: row for row, example_id in enumerate(found.example_ids.to_pylist())}
    rows_N = [row_of[example_id] for example_id in task.example_ids]
    losses_NT = found.losses_NT[rows_N]
    assert losses_NT.shape == (1347, 13)  # the untrained proxy and twelve checkpoints
    assert losses_NT[:, 0].mean() == pytest.approx(math.log(10), abs=0.3)  # knows nothing: ten classes, about equally likely
    assert losses_NT[:, -1].mean() < losses_NT[:, 0].mean() - 0.5
    expected_N = example.evaluated(proxy, task.inputs_ND, task.targets_N).numpy()
    assert np.array_equal(losses_NT[:, -1], expected_N)  # each loss under its own id
    assert np.array(found.sources)[rows_N].tolist() == task.sources

    subsets, _ = example.select(tmp_path / "trajectories", tmp_path / "subset", 0)
    assert {budget: len(set(ids)) for budget, ids in subsets.items()} == {0.1: 134, 0.3: 404}
    assert set(subsets[0.1]) < set(subsets[0.3]) < set(task.example_ids)


def test_no_day_of_the_series_is_known_on_both_sides_of_the_split(example):
    pytest.importorskip("arch")
    task = example.load("finance", 0)
    days, inputs, targets = example.volatility_windows()
    assert (np.diff(days) > np.timedelta64(0)).all()
    assert max(task.example_ids) < min(task.test_ids)  # days in ISO form sort by time
    num_pool, num_test = len(task.example_ids), len(task.test_ids)
    assert task.example_ids == [str(day) for day in days[:num_pool]]
    # Windows of 20 days: the first test input begins on the day after the last one that the pool predicts.
    assert task.test_ids == [str(day) for day in days[num_pool + 20 :]]
    # The last input is yesterday's range, never the range that is to be predicted.
    assert np.array_equal(inputs[1:, -1], targets[:-1])
    # Standardised by the pool alone: its mean is 0, that of the calmer years after it is not.
    assert float(task.targets_N.mean()) == pytest.approx(0, abs=1e-5)  # float32
    assert float(task.test_targets_M.mean()) < -0.5
    scale = float((task.test_targets_M[-1] - task.test_targets_M[0]) / (targets[-1] - targets[-num_test]))
    assert scale == pytest.approx(1 / targets[:num_pool].std(), rel=1e-4)
