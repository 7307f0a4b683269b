"""Losses recorded by anybody's loop: one store, whatever the order and the split of the calls."""

from __future__ import annotations

import hashlib
import itertools
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import s2l_ray
from s2l_ray.config import ClusteringConfig, SelectionConfig
from s2l_ray.errors import ArtifactError, ConfigError, DataError
from s2l_ray.selection.alone import select_trajectories
from s2l_ray.storage.artifacts import Artifact
from s2l_ray.storage.places import Storage
from s2l_ray.trajectories import recording
from s2l_ray.trajectories.files import read_trajectories
from s2l_ray.trajectories.parts import find_artifact
from s2l_ray.trajectories.recording import finish_recording, record_losses

IDS = ["d", "a", "c", "b"]
LOSSES = {10: np.array([4, 1, 3, 2], np.float32), 5: np.array([4.5, 1.5, 3.5, 2.5], np.float32)}


def record_all(place: Path, **given_once: Any) -> Path:
    for step, losses in LOSSES.items():
        record_losses(place, step, IDS, losses, **given_once)
    return place


def parts(place: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in place.glob("*.parquet")}


def result(artifact: Artifact) -> dict[str, Any]:
    """All of a manifest that does not tell the time."""
    return {key: value for key, value in artifact.manifest.items() if key != "provenance"}


def in_folder(place: Path, step: int) -> list[Path]:
    return sorted((place / ".work" / "recording" / f"step-{step:06d}").iterdir())


# --- a finished recording ------------------------------------------------------------------------------------------


def test_a_recording_is_a_trajectory_store_in_the_order_of_ids_and_steps(tmp_path):
    artifact = finish_recording(record_all(tmp_path, source=["x", "x", "y", "y"], num_response_tokens=[4, 1, 3, 2]))
    table = pq.read_table(tmp_path / "part-00000.parquet")
    assert table.to_pydict() == {
        "example_id": ["a", "b", "c", "d"],
        "source": ["x", "y", "y", "x"],
        "losses": [[1.5, 1], [2.5, 2], [3.5, 3], [4.5, 4]],
        "num_response_tokens": [1, 2, 3, 4],
    }
    assert table.schema.field("losses").type == pa.list_(pa.float32(), 2)
    assert artifact.stage == "trajectories"
    assert artifact.summary == {
        "rows": 4,
        "dropped": {},
        "num_checkpoints": 2,
        "steps": [5, 10],
        "mean_losses": [3.0, 2.5],
    }
    assert find_artifact(str(tmp_path)) is not None
    assert {path.name for path in tmp_path.iterdir()} == {".work", "manifest.json", "part-00000.parquet"}
    assert not (tmp_path / ".work" / "recording").exists()


def test_columns_that_nobody_gave_are_not_there(tmp_path):
    finish_recording(record_all(tmp_path))
    assert pq.read_schema(tmp_path / "part-00000.parquet").names == ["example_id", "losses"]


def test_s2l_select_takes_a_finished_recording(tmp_path):
    losses_NT = np.random.default_rng(0).random((90, 3)).astype(np.float32)
    sources = [f"s{row % 3}" for row in range(90)]
    for point, step in enumerate((0, 7, 20)):
        record_losses(tmp_path / "store", step, np.arange(90), losses_NT[:, point], source=sources)
    finish_recording(tmp_path / "store")
    subset = select_trajectories(
        str(tmp_path / "store"),
        str(tmp_path / "out"),
        ClusteringConfig(num_clusters=5, stratify_by="source"),
        SelectionConfig(budget=9),
    )
    assert subset.summary["rows"] == 9
    mine = s2l_ray.select(losses_NT, budget=9, num_clusters=5, sources=sources, stratify_by=sources)
    selected = pq.read_table(tmp_path / "out" / "selection" / "selected.parquet")
    assert sorted(selected["example_id"].to_pylist()) == sorted(mine.example_ids.to_pylist())


@st.composite
def calls(draw: Any) -> tuple[dict[str, np.ndarray], list[tuple[int, list[int]]]]:
    """A recording of some steps, and calls that make it in some order and some split, some of them twice."""
    num_rows = draw(st.integers(1, 9))
    steps = draw(st.lists(st.integers(0, 40), min_size=1, max_size=3, unique=True))
    losses = {
        step: np.asarray(draw(st.lists(st.floats(0, 9, width=32), min_size=num_rows, max_size=num_rows))) for step in steps
    }
    made = []
    for step in steps:
        order = draw(st.permutations(range(num_rows)))
        cuts = sorted(draw(st.sets(st.integers(0, num_rows), max_size=3)) | {0, num_rows})
        made += [(step, list(order[start:stop])) for start, stop in itertools.pairwise(cuts)]
    made = draw(st.permutations(made))
    return losses, made + made[: draw(st.integers(0, 2))]


@settings(max_examples=15)
@given(calls(), st.booleans())
def test_any_order_and_split_of_the_calls_gives_the_same_bytes(recorded, as_numbers):
    losses, made = recorded
    num_rows = len(next(iter(losses.values())))
    ids = list(range(num_rows)) if as_numbers else [f"id-{row}" for row in range(num_rows)]
    source = [f"s{row % 2}" for row in range(num_rows)]
    with tempfile.TemporaryDirectory() as whole, tempfile.TemporaryDirectory() as split:
        for step, losses_N in losses.items():
            record_losses(whole, step, ids, losses_N, source=source)
        for step, rows in made:
            given_once = {"source": [source[row] for row in rows]} if step == min(losses) else {}
            record_losses(split, step, [ids[row] for row in rows], losses[step][rows], **given_once)
        first, second = finish_recording(whole), finish_recording(split)
        assert result(first) == result(second)
        assert parts(Path(whole)) == parts(Path(split))


def test_a_long_recording_comes_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(recording, "BLOCK_ROWS", 3)
    artifact = finish_recording(record_all(tmp_path))
    assert [pq.read_metadata(tmp_path / part).num_rows for part in artifact.parts()] == [3, 1]
    assert artifact.summary["mean_losses"] == [3.0, 2.5]
    assert read_trajectories(str(tmp_path)).example_ids.to_pylist() == ["a", "b", "c", "d"]


def test_the_same_examples_again_replace_what_was_recorded(tmp_path):
    record_all(tmp_path)
    record_losses(tmp_path, 5, IDS[::-1], [9, 8, 7, 6])
    assert len(in_folder(tmp_path, 5)) == 1
    finish_recording(tmp_path)
    assert pq.read_table(tmp_path / "part-00000.parquet")["losses"].to_pylist() == [[7, 1], [9, 2], [8, 3], [6, 4]]


def test_finishing_again_gives_what_is_there(tmp_path):
    first = finish_recording(record_all(tmp_path))
    assert finish_recording(tmp_path).manifest == first.manifest


def test_finishing_goes_on_after_it_was_killed(tmp_path, monkeypatch):
    record_all(tmp_path / "killed")
    with monkeypatch.context() as patch:
        patch.setattr(Storage, "write_json", lambda storage, name, value: exit_at(name, storage, value))
        with pytest.raises(KeyboardInterrupt):
            finish_recording(tmp_path / "killed")
    assert parts(tmp_path / "killed")
    with pytest.raises(ArtifactError, match="unfinished recording"):
        find_artifact(str(tmp_path / "killed"))
    assert result(finish_recording(tmp_path / "killed")) == result(finish_recording(record_all(tmp_path / "whole")))


WRITE_JSON = Storage.write_json


def exit_at(name: str, storage: Storage, value: Any) -> None:
    """A process that dies before its manifest is written."""
    if name == "manifest.json":
        raise KeyboardInterrupt
    WRITE_JSON(storage, name, value)


def test_losses_and_ids_come_from_any_array_library(tmp_path):
    values = [0.5, 1.25]
    forms = {
        1: ([3, 4], values),
        2: (np.array([3, 4], np.int32), np.array(values)),
        3: (pa.array([3, 4]), pa.array(values)),
        4: (torch.tensor([3, 4]), torch.tensor(values, requires_grad=True)),
        5: ((3, 4), torch.tensor(values, dtype=torch.bfloat16)),
        6: (pa.chunked_array([[3], [4]]), tuple(values)),
    }
    for step, (ids, losses) in forms.items():
        record_losses(tmp_path, step, ids, losses)
    finish_recording(tmp_path)
    assert pq.read_table(tmp_path / "part-00000.parquet").to_pydict() == {
        "example_id": [3, 4],
        "losses": [[0.5] * 6, [1.25] * 6],
    }


def test_a_rank_without_a_share_records_nothing(tmp_path):
    record_all(tmp_path)
    record_losses(tmp_path, 5, [], [])
    assert len(in_folder(tmp_path, 5)) == 1
    assert finish_recording(tmp_path).summary["rows"] == 4


def test_recording_needs_neither_torch_nor_ray():
    code = (
        "import sys, tempfile, s2l_ray\n"
        "place = tempfile.mkdtemp()\n"
        "s2l_ray.record_losses(place, 1, ['a', 'b'], [1.0, 2.0])\n"
        "s2l_ray.finish_recording(place)\n"
        "assert not {'torch', 'ray', 'transformers', 'faiss', 'pydantic'} & sys.modules.keys(), sorted(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --- what is refused, and what to do -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "losses", "message"),
    [
        (IDS, 2.5, r"step 5: one loss for 4 examples.*reduction='none'"),
        (IDS, torch.tensor(2.5), r"reduction='none'"),
        (IDS, [2.5], r"reduction='none'"),
        (IDS, [1.0, 2.0], r"losses of shape \(2,\) for 4 example_ids.*reduction='none'"),
        (IDS, np.ones((4, 7)), r"losses of shape \(4, 7\).*each example's own tokens"),
        (IDS, ["a", "b", "c", "d"], r"losses are not numbers"),
        (IDS, [1, float("nan"), 2, float("inf")], r"step 5: losses: NaN, infinite.*'a', 'b'"),
        (IDS, [1, None, 2, 3], r"NaN, infinite, missing.*'a'"),
        (["a", "b", "a", "b"], [1, 2, 3, 4], r"step 5: example_id occurs more than once: 'a', 'b'"),
        (["a", 1, "b", 2], [1, 2, 3, 4], r"step 5: example_ids: the values have no common type"),
        ([1.0, 2.0, 3.0, 4.0], [1, 2, 3, 4], r"example_id' is double, expected string or integer"),
        (["a", None, "b", "c"], [1, 2, 3, 4], r"example_id is missing in 1 rows"),
    ],
)
def test_what_is_no_loss_for_each_example_is_refused_where_it_is_recorded(tmp_path, ids, losses, message):
    with pytest.raises(DataError, match=message) as raised:
        record_losses(tmp_path, 5, ids, losses)
    assert str(tmp_path) in str(raised.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("step", [-1, 1.5, "5", True, None])
def test_a_step_is_a_number_from_0_on(tmp_path, step):
    with pytest.raises(ConfigError, match="a step is a whole number from 0"):
        record_losses(tmp_path, step, ["a"], [1.0])


@pytest.mark.parametrize("name", ["source", "num_response_tokens"])
def test_an_optional_column_has_a_value_for_each_example(tmp_path, name):
    with pytest.raises(DataError, match=f"step 5: 2 values of {name} for 4 example_ids"):
        record_losses(tmp_path, 5, IDS, LOSSES[5], **{name: [1, 2]})


def test_a_step_that_lacks_examples_is_named_with_how_to_finish(tmp_path):
    record_losses(tmp_path, 5, IDS, LOSSES[5])
    record_losses(tmp_path, 10, IDS[:2], LOSSES[10][:2])
    with pytest.raises(DataError, match=r"step 10 lacks 2 of the examples: 'b', 'c'.*record_losses\(..., 10, ...\)") as raised:
        finish_recording(tmp_path)
    assert str(tmp_path / ".work" / "recording" / "step-000010") in str(raised.value)
    record_losses(tmp_path, 10, IDS[2:], LOSSES[10][2:])
    assert finish_recording(tmp_path).summary["steps"] == [5, 10]


def test_the_first_step_may_be_the_one_that_lacks_examples(tmp_path):
    record_losses(tmp_path, 5, IDS[1:], LOSSES[5][1:])
    record_losses(tmp_path, 10, IDS, LOSSES[10])
    with pytest.raises(DataError, match="step 5 lacks 1 of the examples: 'd'"):
        finish_recording(tmp_path)


def test_calls_of_a_step_that_overlap_are_refused(tmp_path):
    record_losses(tmp_path, 5, IDS, LOSSES[5])
    record_losses(tmp_path, 5, ["a", "z"], [1, 2])
    with pytest.raises(DataError, match=r"step 5: recorded more than once.*'a'\. .*remove .*step-000005 and record the step"):
        finish_recording(tmp_path)


@pytest.mark.parametrize("other", [5, 6])
def test_ids_of_mixed_type_are_refused(tmp_path, other):
    record_losses(tmp_path, 5, ["1", "2"], [1, 2])
    record_losses(tmp_path, other, [1, 2], [1, 2])
    with pytest.raises(DataError, match=r"(step 5|steps 5 and 6): example_id is int64 and string\. Give ids of one type"):
        finish_recording(tmp_path)


def test_a_source_that_changes_is_refused(tmp_path):
    record_losses(tmp_path, 5, IDS, LOSSES[5], source=["x"] * 4)
    record_losses(tmp_path, 10, IDS, LOSSES[10], source=["x", "y", "x", "x"])
    with pytest.raises(DataError, match="step 10: source is not what an earlier step has for 'a'"):
        finish_recording(tmp_path)


def test_a_source_for_some_examples_only_is_refused(tmp_path):
    record_losses(tmp_path, 5, IDS[:2], LOSSES[5][:2], source=["x", "x"])
    record_losses(tmp_path, 5, IDS[2:], LOSSES[5][2:])
    with pytest.raises(DataError, match="source is given for some examples and not for 'b', 'c'"):
        finish_recording(tmp_path)


def test_a_damaged_file_is_named(tmp_path):
    record_all(tmp_path)
    (damaged,) = in_folder(tmp_path, 5)
    damaged.write_bytes(b"half")
    with pytest.raises(DataError, match=f"{damaged.name}: cannot be read.*Remove it and record its examples again"):
        finish_recording(tmp_path)


def test_nothing_is_recorded_into_a_finished_directory(tmp_path):
    finish_recording(record_all(tmp_path))
    with pytest.raises(ArtifactError, match=r"finished, nothing more is recorded there. Give another directory, or remove it"):
        record_losses(tmp_path, 15, IDS, LOSSES[5])


def test_a_directory_without_a_recorded_step_cannot_be_finished(tmp_path):
    with pytest.raises(ArtifactError, match=r"no step is recorded there. Call s2l_ray.record_losses"):
        finish_recording(tmp_path / "nothing")


def test_nobody_elses_files_are_overwritten(tmp_path):
    pq.write_table(pa.table({"example_id": [1]}), tmp_path / "part-00000.parquet")
    with pytest.raises(ArtifactError, match=r"holds other Parquet files. Give another directory"):
        record_losses(tmp_path, 5, IDS, LOSSES[5])


def test_another_stages_directory_is_refused(tmp_path):
    finish_recording(record_all(tmp_path / "store"))
    select_trajectories(
        str(tmp_path / "store"), str(tmp_path / "out"), ClusteringConfig(num_clusters=2), SelectionConfig(budget=2)
    )
    with pytest.raises(ArtifactError, match="holds the stage 'selection'"):
        finish_recording(tmp_path / "out" / "selection")


def test_selecting_from_an_unfinished_recording_says_how_to_finish_it(tmp_path):
    record_all(tmp_path)
    with pytest.raises(
        ArtifactError, match=r"an unfinished recording of 2 steps \(5, 10\).*`s2l_ray.finish_recording\("
    ) as raised:
        find_artifact(str(tmp_path))
    assert f"finish_recording({str(tmp_path)!r})" in str(raised.value)
