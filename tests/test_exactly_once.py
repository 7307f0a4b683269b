"""Every loss exactly once, whoever dies: scoring actors, a node, the driver while the proxy is still trained.

Real processes and real SIGKILLs; what comes out is compared byte for byte with a run that nobody disturbs.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest

from s2l_ray.config import load_config
from s2l_ray.runtime.workers import Workers
from s2l_ray.storage.artifacts import Artifact
from s2l_ray.storage.places import Storage

from .test_resume import Started, times, units, write_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
TWO_ACTORS = ["--set", "machines.trajectories.num_workers=2"]


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, int]]:
    """Config and run of which the driver was killed while it scored during the training, then trained to the end."""
    folder = tmp_path_factory.mktemp("during")
    config, run = write_config(folder), folder / "run"
    started = Started(folder / "1.log", "run", config, "--run-dir", run, "--until", "proxy")
    started.wait_until(lambda: len(units(run)) >= 2, "units during the training")
    assert not (run / "proxy" / "manifest.json").exists(), "the training is not over"
    started.kill()
    seen = times(run / ".work/losses")
    started = Started(folder / "2.log", "run", config, "--run-dir", run, "--until", "proxy")
    assert started.finish() == 0, started.output
    assert "units were scored during the training" in started.output
    return config, run, seen


@pytest.fixture(scope="module")
def undisturbed(begun: tuple[Path, Path, dict[str, int]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The parts of trajectories of a run from the same proxy that nobody interrupts, with nothing scored before."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return parts_of(finish(begun, folder, "--until", "trajectories"))


def copied(begun: tuple[Path, Path, dict[str, int]], folder: Path) -> Path:
    for name in ("examples", "proxy"):
        shutil.copytree(begun[1] / name, folder / "run" / name)
    return folder / "run"


def finish(begun: tuple[Path, Path, dict[str, int]], folder: Path, *arguments: str) -> Path:
    run = copied(begun, folder)
    started = Started(folder / "log", "run", begun[0], "--run-dir", run, *arguments)
    assert started.finish() == 0, started.output
    return run


def parts_of(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((run / "trajectories").glob("part-*.parquet"))}


def test_units_scored_during_the_training_outlive_the_driver_and_are_not_made_again(begun, undisturbed):
    config, run, seen = begun
    assert len(seen) >= 2
    assert {path: Path(path).stat().st_mtime_ns for path in seen} == seen
    started = Started(run.parent / "3.log", "run", config, "--run-dir", run, "--until", "trajectories")
    assert started.finish() == 0, started.output
    assert parts_of(run) == undisturbed


def test_killed_actors_lose_no_finished_unit_and_change_no_byte(begun, undisturbed, tmp_path):
    run, generator = copied(begun, tmp_path), random.Random(0)
    started = Started(tmp_path / "log", "run", begun[0], "--run-dir", run, "--until", "trajectories", *TWO_ACTORS)
    seen: dict[str, int] = {}
    for kills in range(1, 7):
        wanted = len(seen) + generator.randint(1, 3)
        started.wait_until(lambda wanted=wanted: len(units(run)) >= wanted, f"units before kill {kills}")
        actors = scoring_actors(started.pid)
        seen |= times(run / ".work/losses")
        for pid in generator.sample(actors, min(len(actors), 1 + kills % 2)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for path, changed in seen.items():
            with contextlib.suppress(FileNotFoundError):  # the stage may be finished by now
                assert Path(path).stat().st_mtime_ns == changed
    assert started.finish() == 0, started.output
    assert parts_of(run) == undisturbed


def scoring_actors(session: int) -> list[int]:
    """The living actors of a session's scoring pool."""
    found = []
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        with contextlib.suppress(OSError):
            if os.getsid(pid) == session and b"Scorer" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


def test_a_lost_node_loses_no_finished_unit_and_changes_no_byte(begun, undisturbed, tmp_path, monkeypatch):
    import ray
    from ray.cluster_utils import Cluster

    from s2l_ray.pipeline import run as run_pipeline

    run = copied(begun, tmp_path)
    ray.shutdown()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    node = cluster.add_node(num_cpus=1)
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        lost = threading.Event()

        def lose_the_node() -> None:
            while len(units(run)) < 4:
                time.sleep(0.01)
            cluster.remove_node(node, allow_graceful=False)
            lost.set()

        thread = threading.Thread(target=lose_the_node, daemon=True)
        thread.start()
        config = load_config(begun[0], ["machines.trajectories.num_workers=2"])
        run_pipeline(config, str(run), until="trajectories")
        assert lost.is_set(), "the node was lost before the end"
        assert parts_of(run) == undisturbed
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_a_checkpoint_written_anew_is_scored_anew(begun, tmp_path):
    """Units of another checkpoint of the same step lie there and are not taken."""
    from s2l_ray.trajectories.stage import ScoringJob

    run = Storage(str(copied(begun, tmp_path)))
    examples, proxy = (Artifact.read(run.child(name)) for name in ("examples", "proxy"))
    config = load_config(begun[0], [])
    step = proxy.summary["steps"][-1]
    before = ScoringJob.of(config, examples, proxy.root, [step], run.child(".work"))
    records = proxy.root.read_json(f"step-{step:06d}/checkpoint.json")
    records["files"][0]["sha256"] = "0" * 64
    proxy.root.write_json(f"step-{step:06d}/checkpoint.json", records)
    after = ScoringJob.of(config, examples, proxy.root, [step], run.child(".work"))
    assert {unit.path for unit in before.units}.isdisjoint(unit.path for unit in after.units)
    assert Workers(1, 1, 0, 1).device == before.device == "cpu"
