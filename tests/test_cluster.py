"""Submitted jobs on real Ray nodes over a real S3 server: disturbed, on nodes that come and go, on none at the start."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


@pytest.fixture
def chaos(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.setenv(name, "")  # given back at the end
    import chaos

    return chaos


def test_a_disturbed_job_submitted_again_loses_and_doubles_nothing_and_no_secret_is_written(chaos, tmp_path, monkeypatch):
    secret = "planted-0123456789abcdef"
    monkeypatch.setenv("HF_TOKEN", secret)
    with chaos.three_nodes(tmp_path, secret=secret) as (nodes, store):
        row = chaos.disturb(nodes, store, tmp_path, "run", kills=2, every=4.0, seed=1)
        token = (tmp_path / "token").read_text()
        place = chaos.Storage(f"s3://{store.bucket}/run")
        written = {f"s3 {name}": place.read(name) for name in place.names(recursive=True)}
        status = chaos.status(place.uri)
        written |= {str(path): path.read_bytes() for path in Path(nodes.logs).rglob("*") if path.is_file()}
    assert len(row["kills"]) == 2
    assert (row["missing"], row["doubled"], row["different"]) == (0, 0, [])
    for kill in row["kills"]:  # where the training was ended, it went on from the last registered resume point at least
        assert kill["went_on_from"] is None or kill["went_on_from"] >= kill["resume_step"]
    assert "trajectories  finished" in status
    run = json.loads(written["s3 run.json"])["provenance"]
    assert run["ray_job"].startswith("raysubmit_")
    assert {"user", "host", "python", "versions", "created"} <= run.keys()
    written |= {str(path): path.read_bytes() for path in tmp_path.rglob("*.log") if path.is_file()}
    assert len(written) > 50
    leaks = [name for name, data in written.items() if secret.encode() in data or token.encode() in data]
    assert leaks == []


def test_a_training_shrinks_with_a_lost_node_grows_with_a_new_one_and_goes_on_from_its_resume_points(chaos, tmp_path):
    log = tmp_path / "run.log"

    def wait_for_group(workers: int, after: int) -> int:
        """The end of the line in which a group of so many workers says that it trains; from `after` on."""
        end = time.monotonic() + 300
        while (found := re.compile(rf"\({workers} workers x .*\n(?s:.*?)step [\d,]+/").search(log.read_text(), after)) is None:
            assert time.monotonic() < end, log.read_text()[-3000:]
            time.sleep(0.5)
        return found.end()

    with chaos.three_nodes(tmp_path) as (nodes, store):
        place = f"s3://{store.bucket}/run"
        words = ["s2l", "run", "chaos.yaml", "--run-dir", place, "--until", "proxy", "--set", "proxy.epochs=2000"]
        nodes.submit(words, tmp_path / "job", log)
        run = chaos.Disturbed(nodes, store, tmp_path, place, None)
        at = wait_for_group(2, 0)
        for workers in (1, 2):
            while not (step := run.resume_step()):
                time.sleep(0.5)
            if workers == 1:
                nodes.remove(nodes.workers[0])
            else:
                nodes.add()
            at = wait_for_group(workers, begun := at)
            went_on = re.findall(r"goes on from step (\d+)", log.read_text()[begun:at])
            assert went_on, "it did not begin anew"
            assert int(went_on[-1]) >= step


def test_a_run_on_a_cluster_without_nodes_starts_some_and_leaves_none_and_asks_for_no_gpu(chaos, tmp_path):
    from autoscaling import scaled_run

    done = scaled_run(tmp_path, idle_seconds=10)
    assert done["code"] == 0, (tmp_path / "run.log").read_text()[-3000:]
    assert not any(done["timeline"][0]["nodes"].values())
    assert 1 <= done["most_nodes"] <= 2
    assert done["gpu_nodes"] == 0
    assert not any(done["left"].values()), done["timeline"]
