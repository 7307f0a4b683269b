"""Grouping and choosing in Ray: no row passes the driver, the bytes are those of one process, whoever dies on the way."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from s2l_ray.clustering import actors as clustering_actors
from s2l_ray.clustering.actors import Actors
from s2l_ray.config import ClusteringConfig, GroupingConfig, SelectionConfig
from s2l_ray.errors import ArtifactError, ConfigError, DataError
from s2l_ray.runtime import data, passes
from s2l_ray.selection.alone import select_trajectories
from s2l_ray.storage.places import Storage
from s2l_ray.trajectories import ranged_store, ranges
from s2l_ray.trajectories.files import open_trajectories
from s2l_ray.trajectories.id_order import sorted_by_id
from s2l_ray.trajectories.recording import finish_recording, record_losses
from s2l_ray.trajectories.sorting import Run

# More groups than kinds: all six iterations move some rows.
ITERATED: dict[str, Any] = {"stratify_by": None, "num_iterations": 6, "num_clusters": 40}
NUM_ROWS = 150_000  # more than one block, and than the diagnostics' sample


def trajectories(num_rows: int = NUM_ROWS, num_points: int = 4) -> pa.Table:
    """Falls of a few kinds, in no order of ids, of three sources."""
    rng = np.random.default_rng(7)
    kinds = rng.integers(0, 12, num_rows)
    losses = rng.uniform(1, 5, (12, num_points)).astype(np.float32)[kinds]
    losses += rng.normal(0, 0.1, losses.shape).astype(np.float32)
    return pa.table(
        {
            "example_id": [f"row-{row:07d}" for row in rng.permutation(num_rows)],
            "losses": pa.FixedSizeListArray.from_arrays(pa.array(losses.ravel()), num_points),
            "source": pa.array(np.array(["c", "a", "b"])[kinds % 3]),
            "num_response_tokens": pa.array(rng.integers(1, 99, num_rows, dtype=np.int32)),
            "note": [f"n{row}" for row in range(num_rows)],
        }
    )


def write(folder: Path, table: pa.Table, cuts: list[int], row_group: int = 20_000) -> str:
    """A table as files, cut at these rows."""
    folder.mkdir()
    for part, (start, stop) in enumerate(zip([0, *cuts], [*cuts, len(table)], strict=True)):
        pq.write_table(table.slice(start, stop - start), folder / f"{part:03d}.parquet", row_group_size=row_group)
    return str(folder)


def select(
    source: str, output: Path, engine: str, num_workers: int = 2, chosen: dict[str, Any] | None = None, **clustering: Any
) -> dict[str, str]:
    """A hash of every file that `s2l select` writes, manifests apart."""
    grouping = ClusteringConfig(**{"num_clusters": 10, "num_restarts": 2} | clustering)
    machines = GroupingConfig(engine=engine, num_workers=num_workers)  # type: ignore[arg-type]
    select_trajectories(source, str(output), grouping, SelectionConfig(**{"budget": 500} | (chosen or {})), machines)
    return digests(output)


def digests(output: Path) -> dict[str, str]:
    files = [path for path in output.rglob("*") if path.is_file() and "manifest" not in path.name and ".work" not in path.parts]
    return {str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("num_workers", [1, 2])
def test_ray_gives_the_bytes_of_one_process_for_any_cut_of_the_files(tmp_path: Path, num_workers: int) -> None:
    table = trajectories()
    expected = select(write(tmp_path / "whole", table, []), tmp_path / "disk", "disk", stratify_by=None)
    cut = write(tmp_path / "cut", table, [1, 40_000, 111_111], row_group=7_000)
    assert select(cut, tmp_path / "ray", "ray", num_workers, stratify_by=None) == expected
    assert "selection/selected.parquet" in expected
    assert not (tmp_path / "ray" / ".work" / "scratch").exists()


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize(
    ("clustering", "chosen"),
    [
        ({"stratify_by": "source"}, {"budget": {"tokens": 9_000}, "min_per_source": 7}),
        ({"features": "whitened", "stratify_by": None, "training_rows": 90_000, "num_clusters": 5}, {"draw": "central"}),
        ({"levels": [12, 4], "num_clusters": 12, "stratify_by": None}, {"draw": "spread", "budget": 100}),
        ({"num_clusters": 12, "num_restarts": 1}, {"method": "high_learnability"}),
    ],
)
def test_strata_samples_levels_budgets_and_draws_are_the_same_in_ray(
    tmp_path: Path, clustering: dict[str, Any], chosen: dict[str, Any]
) -> None:
    source = write(tmp_path / "files", trajectories(), [90_000])
    places = [select(source, tmp_path / engine, engine, 2, chosen, **clustering) for engine in ("memory", "ray")]
    assert places[0] == places[1]


@pytest.mark.usefixtures("ray_session")
def test_few_distinct_trajectories_are_groups_of_their_own_in_ray_too(tmp_path: Path) -> None:
    losses = np.repeat(np.eye(4, dtype=np.float32), 35_000, axis=0)
    ids = np.random.default_rng(0).permutation(len(losses))
    source = write(tmp_path / "files", pa.table({"example_id": ids, "losses": losses.tolist()}), [70_001])
    places = [select(source, tmp_path / engine, engine) for engine in ("memory", "ray")]
    assert places[0] == places[1]


@pytest.mark.usefixtures("ray_session")
def test_what_cannot_be_used_is_said_in_the_same_words(tmp_path: Path) -> None:
    table = trajectories(3_000)
    twice = pa.concat_tables([table, table.slice(5, 1)])
    bad = table["losses"].combine_chunks().flatten().to_numpy().copy()
    bad[4 * 17] = np.nan
    no_number = table.set_column(1, "losses", pa.FixedSizeListArray.from_arrays(pa.array(bad), 4))
    shorter = pa.table({"example_id": ["one-more"], "losses": [[1.0, 2.0]], "source": ["a"]})
    for name, bad_table in {"twice": twice, "nan": no_number, "none": table.slice(0, 0)}.items():
        source = write(tmp_path / name, bad_table, [len(bad_table) // 2])
        messages = [message(source, tmp_path / f"{name}-{engine}", engine) for engine in ("memory", "ray")]
        assert messages[0] == messages[1]
    folder = write(tmp_path / "shapes", table.select(["example_id", "losses", "source"]), [1_000])
    pq.write_table(shorter, f"{folder}/003.parquet")
    assert "losses are ragged. Others have 4 values" in message(folder, tmp_path / "ragged", "ray")
    with pytest.raises(ConfigError, match=r"machines.clustering.num_workers: 99 Ray actors .* has \d+ CPUs"):
        select(write(tmp_path / "fine", table, []), tmp_path / "many", "ray", 99)


@pytest.mark.usefixtures("ray_session")
def test_a_run_s_own_trajectories_are_checked_by_the_tasks_that_read_them(tmp_path: Path) -> None:
    table, folder = trajectories(2_000), tmp_path / "recorded"
    values = table["losses"].combine_chunks().flatten().to_numpy().reshape(-1, 4)
    for step in range(4):
        record_losses(str(folder), step, table["example_id"], values[:, step], source=table["source"])
    finish_recording(str(folder))
    places = [select(str(folder), tmp_path / engine, engine) for engine in ("memory", "ray")]
    assert places[0] == places[1]
    part = next(folder.glob("part-*.parquet"))
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"part-00000.parquet: damaged \(its hash is not the manifest's\)"):
        select(str(folder), tmp_path / "again", "ray")


def test_ranges_lie_in_object_storage_as_on_a_disk(tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tasks run in this process: a Ray that was started before knows nothing of the server."""
    for module, name in ((ranges, "in_tasks"), (ranged_store, "in_tasks")):
        monkeypatch.setattr(module, name, map)
    monkeypatch.setattr(ranges, "run_tasks", lambda task, count, _workers: map(task, range(count)))
    monkeypatch.setattr(ranges, "TASK_ROWS", 20_000)
    monkeypatch.setattr(ranges, "RUN_ROWS", 20_000)
    source = write(tmp_path / "files", trajectories(70_000), [10_000], row_group=10_000)
    found = [ranges.open_ranges(source, Storage(place), seed=0) for place in (f"{bucket}/ranges", str(tmp_path / "here"))]
    assert len(found[0].rows.files) > 1
    with ThreadPoolExecutor(1) as pool:
        here = open_trajectories(source, tmp_path / "sorted", pool, seed=0)
        assert len({store.identity(pool) for store in (*found, here)}) == 1
    assert [block.num_rows for block in found[0].blocks("losses")] == [65_536, 4_464]


def test_what_is_known_of_a_run_does_not_take_its_ids_along(tmp_path: Path) -> None:
    table = trajectories(50_000)
    run = Run.write(tmp_path / "run.arrow", sorted_by_id(table))
    assert len(pickle.dumps(run)) < 2_000 < table["example_id"].nbytes


def message(source: str, output: Path, engine: str) -> str:
    with pytest.raises(DataError) as met:
        select(source, output, engine)
    return str(met.value)


# --- who dies ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DiesOnce:
    """A task whose process is killed when it has done its work for the first time, before anybody knows."""

    function: Callable[[Any], Any]
    mark: Path

    def __call__(self, item: Any) -> Any:
        value = self.function(item)
        with contextlib.suppress(FileExistsError):
            self.mark.touch(exist_ok=False)
            os.kill(os.getpid(), signal.SIGKILL)
        return value


def actors() -> list[psutil.Process]:
    """The living actors of k-means that this process has started, by way of Ray."""
    return [one for one in psutil.process_iter(["cmdline"]) if "ray::SlotsActor" in " ".join(one.info["cmdline"] or [])]


class InLloyd:
    """Does something before some of the passes of k-means over its rows."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, passes: dict[int, Callable[[], object]]) -> None:
        self.done, self._passes, call = 0, passes, Actors.call

        def disturbed(these: Actors, slots: Any, operations: Any, stratum: int | None = None) -> Any:
            if [(method, *arguments[1:2]) for method, arguments in operations[:1] if method == "call"] == [("call", "assign")]:
                self.done += 1
                self._passes.get(self.done, lambda: None)()
            return call(these, slots, operations, stratum)

        monkeypatch.setattr(Actors, "call", disturbed)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, str]]:
    """Files, and what one process makes of them."""
    folder = tmp_path_factory.mktemp("undisturbed")
    source = write(folder / "files", trajectories(), [50_000, 90_000], row_group=10_000)
    return source, select(source, folder / "out", "disk", **ITERATED)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("phase", ["reading", "merging", "a pass", "choosing", "fetching"])
def test_a_task_s_process_that_dies_changes_no_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: tuple[str, dict[str, str]], phase: str
) -> None:
    mark, number = tmp_path / "died", {"count": 0}

    def dying(function: Any, items: Any, *others: Any) -> Any:
        number["count"] += 1
        wanted = {"merging": "_WriteRange", "fetching": "_FetchRows", "reading": "_ReadRuns"}.get(phase)
        inner = getattr(function, "function", None)
        is_chosen = phase == "choosing" and type(inner).__name__ == "_EachOfPool"
        is_pass = phase == "a pass" and type(function).__name__ == "_ReadBlocks"
        hit = type(function).__name__ == wanted or is_chosen or is_pass
        return original[len(others)](DiesOnce(function, mark) if hit else function, items, *others)

    original = [passes.in_tasks, data.run_tasks]
    monkeypatch.setattr(ranges, "run_tasks", dying)
    for module in (ranges, ranged_store):
        monkeypatch.setattr(module, "in_tasks", dying)
    monkeypatch.setattr(ranges, "TASK_ROWS", 60_000)
    source, expected = undisturbed
    assert select(source, tmp_path / "out", "ray", **ITERATED) == expected
    assert mark.exists(), "a process was killed"


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_actors_that_die_in_the_iterations_change_no_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: tuple[str, dict[str, str]]
) -> None:
    def kill(number: int) -> Callable[[], None]:
        return lambda: [one.kill() for one in actors()[:number]] and None

    disturbed = InLloyd(monkeypatch, {1: kill(1), 3: kill(1), 5: kill(2)})
    source, expected = undisturbed
    assert select(source, tmp_path / "out", "ray", **ITERATED) == expected
    assert disturbed.done > 5


@pytest.fixture
def no_ray() -> Iterator[None]:
    """Room for a Ray of one's own; that of the session begins again afterwards."""
    import ray

    was_there = ray.is_initialized()
    ray.shutdown()
    yield
    ray.shutdown()
    if was_there:
        ray.init(num_cpus=2, include_dashboard=False, logging_level=logging.WARNING)


@pytest.mark.slow
@pytest.mark.usefixtures("no_ray")
def test_three_and_four_actors_give_the_same_bytes(tmp_path: Path) -> None:
    import ray

    ray.init(num_cpus=4, include_dashboard=False, logging_level=logging.WARNING)
    source = write(tmp_path / "files", trajectories(300_000, 3), [170_000])
    options = {"num_clusters": 30, "num_iterations": 4, "num_restarts": 1, "stratify_by": None}
    expected = select(source, tmp_path / "memory", "memory", **options)
    for num_workers in (3, 4):
        assert select(source, tmp_path / str(num_workers), "ray", num_workers, **options) == expected


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize("phase", ["reading", "iterating", "choosing"])
def test_a_lost_node_changes_no_byte_and_auto_takes_several_nodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: tuple[str, dict[str, str]], phase: str
) -> None:
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    node = cluster.add_node(num_cpus=1)
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        lost = threading.Event()

        def lose() -> None:
            if not lost.is_set():
                lost.set()
                cluster.remove_node(node, allow_graceful=False)

        if phase == "iterating":
            InLloyd(monkeypatch, {3: lose})
        else:
            place = tmp_path / "out" / ("selection" if phase == "choosing" else ".work/scratch/ranges")

            def watch() -> None:
                while not place.exists() or not list(place.iterdir()):
                    time.sleep(0.01)
                lose()

            threading.Thread(target=watch, daemon=True).start()
        monkeypatch.setattr(clustering_actors, "START_SECONDS", 5.0)
        source, expected = undisturbed
        found = select(source, tmp_path / "out", "auto", **ITERATED)
        assert lost.is_set(), "the node was lost before the end"
        assert found == expected
        manifest = json.loads((tmp_path / "out/clustering/manifest.json").read_text())
        assert manifest["provenance"]["machines"]["engine"] == "in 2 Ray actors"
    finally:
        ray.shutdown()
        cluster.shutdown()
