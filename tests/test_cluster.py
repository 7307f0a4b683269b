"""A submitted job on a real Ray of three nodes over a real S3 server, with things killed, and nothing secret left behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


@pytest.fixture
def chaos(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import chaos

    return chaos


def test_a_disturbed_job_submitted_again_loses_and_doubles_nothing_and_no_secret_is_written(chaos, tmp_path, monkeypatch):
    secret = "planted-0123456789abcdef"
    monkeypatch.setenv("HF_TOKEN", secret)
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.setenv(name, "")  # given back at the end
    with chaos.three_nodes(tmp_path, secret=secret) as (nodes, store):
        row = chaos.disturb(nodes, store, tmp_path, "run", kills=2, every=4.0, seed=1)
        token = (tmp_path / "token").read_text()
        place = chaos.Storage(f"s3://{store.bucket}/run")
        written = {f"s3 {name}": place.read(name) for name in place.names(recursive=True)}
        status = chaos.status(place.uri)
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
