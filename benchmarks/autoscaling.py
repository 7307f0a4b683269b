"""A run on a cluster that scales from zero and back, with Ray's own autoscaler and its fake nodes: the timeline.

    python benchmarks/autoscaling.py --work /tmp/autoscaling

The head has no CPU for tasks; nodes with one CPU (two at most) and with a CPU and a GPU (one at most) are started when
something asks for them and go when idle. No stage of this run asks for a GPU, so no such node may ever start. A line is added
to `results/autoscaling.jsonl`; the exit code is 1 if nodes were left at the end, or a GPU node was started.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

sys.path.insert(0, str(Path(__file__).parent))

from chaos import CONFIG
from local_nodes import LocalNodes, S3Server

from s2l_ray.storage.provenance import provenance

RESULTS = Path(__file__).parent / "results" / "autoscaling.jsonl"
STAGES = ("examples", "proxy", "trajectories", "clustering", "selection")
# The run need not be as long as one that is to be disturbed.
SMALLER = ("--set", "proxy.epochs=4", "--set", "examples.rows_per_part=100")
TYPES = {
    "cpu": {"resources": {"CPU": 1, "object_store_memory": 2 * 10**8}, "node_config": {}, "min_workers": 0, "max_workers": 2},
    "gpu": {
        "resources": {"CPU": 1, "GPU": 1, "object_store_memory": 2 * 10**8},
        "node_config": {},
        "min_workers": 0,
        "max_workers": 1,
    },
}


def autoscaling(types: dict[str, Any], idle_seconds: float) -> dict[str, Any]:
    """What a head node needs to start nodes of these types when something asks for them.

    `ray.cluster_utils.AutoscalingCluster` has it too, but starts by stopping every Ray of the machine.
    """
    head = {"ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}}
    lists = [f"{which}setup_commands" for which in ("", "head_", "worker_")] + ["initialization_commands"]
    lists += ["head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files", "rsync_exclude", "rsync_filter"]
    return {
        "cluster_name": "fake",
        "auth": {"ssh_user": "nobody"},
        "file_mounts": {},
        "max_workers": 3,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": idle_seconds / 60,
        "available_node_types": head | types,
        "head_node_type": "ray.head.default",
    } | {name: [] for name in lists}


def alive(nodes: LocalNodes) -> dict[str, int]:
    """Nodes that are there now, by what they have: `cpu`, `gpu`."""
    token = Path(nodes.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
    with urlopen(Request(f"{nodes.dashboard}/nodes?view=summary", headers={"Authorization": f"Bearer {token}"})) as answer:  # noqa: S310
        summary = json.load(answer)["data"]["summary"]
    found = {"cpu": 0, "gpu": 0}
    for node in summary:
        if node["raylet"]["state"] == "ALIVE" and not node["raylet"].get("isHeadNode"):
            found["gpu" if node["raylet"]["resourcesTotal"].get("GPU") else "cpu"] += 1
    return found


def stage_of(log: Path) -> str:
    """The stage that a run's log spoke of last."""
    lines = [line.split()[0] for line in log.read_text("utf-8", "replace").splitlines() if line[:1].isalpha()]
    return next((word for word in reversed(lines) if word in STAGES), "")


def scaled_run(folder: Path, idle_seconds: float, wait_seconds: float = 300.0) -> dict[str, Any]:
    """One run on nodes that come and go: its exit code, the most nodes there were, those left, and the timeline."""
    folder.mkdir(parents=True, exist_ok=True)
    config = folder.absolute() / "chaos.yaml"
    config.write_text(CONFIG, "utf-8")
    scaling = autoscaling(TYPES, idle_seconds)
    environment = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    timeline: list[dict[str, Any]] = []
    log = folder / "run.log"
    with S3Server() as store, LocalNodes(store.environment | environment, folder, autoscaling=scaling) as nodes:
        begun = time.monotonic()
        words = ["s2l", "run", str(config), "--run-dir", f"s3://{store.bucket}/scaled", "--until", "selection", *SMALLER]
        job = nodes.submit(words, None, log)
        ended: float | None = None
        while ended is None or time.monotonic() - ended < wait_seconds:
            now, stage = alive(nodes), "done" if ended else stage_of(log)
            if not timeline or (timeline[-1]["nodes"], timeline[-1]["stage"]) != (now, stage):
                timeline.append({"seconds": round(time.monotonic() - begun, 1), "stage": stage, "nodes": now})
                print(timeline[-1], flush=True)
            if ended is None and job.poll() is not None:
                ended = time.monotonic()
            if ended is not None and not any(now.values()):
                break
            time.sleep(1)
    return {
        "code": job.returncode,
        "most_nodes": max(sum(row["nodes"].values()) for row in timeline),
        "gpu_nodes": max(row["nodes"]["gpu"] for row in timeline),
        "left": timeline[-1]["nodes"],
        "timeline": timeline,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", required=True, type=Path, help="a folder for logs")
    parser.add_argument("--idle", type=float, default=15.0, help="seconds after which an idle node goes")
    arguments = parser.parse_args()
    result = scaled_run(arguments.work, arguments.idle)
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(result | provenance()) + "\n")
    sys.exit(bool(result["code"] or result["gpu_nodes"] or any(result["left"].values())))


if __name__ == "__main__":
    main()
