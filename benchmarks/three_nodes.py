"""A whole run on three Ray nodes over an S3 server, beside the same run on one node with local files.

    python benchmarks/three_nodes.py --work /tmp/three_nodes --pairs 3

Both are submitted jobs of the quickstart's config, from the corpus to the report, on a Ray that is up, with two CPUs for
tasks: on the head alone, or on two workers of one each behind a head without any. Everything is on one machine, so the
network costs little and the S3 server (moto's) takes some of the CPUs' time. Every pair adds a line to
`results/three_nodes.jsonl`; the last line on the screen is the median ratio.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from local_nodes import LocalNodes, S3Server

from s2l_ray.storage.artifacts import Artifact
from s2l_ray.storage.places import Storage
from s2l_ray.storage.provenance import provenance

RESULTS = Path(__file__).parent / "results" / "three_nodes.jsonl"
CONFIG = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
STAGES = ("examples", "proxy", "trajectories", "clustering", "selection", "target", "evaluation")
Run = dict[str, Any]


def timed(nodes: LocalNodes, folder: Path, run_dir: str) -> Run:
    """One submitted run: seconds in all and by stage, and how many examples came to each stage's end."""
    begun = time.monotonic()
    job = nodes.submit(["s2l", "run", CONFIG.name, "--run-dir", run_dir], folder / "job", folder / "runs.log")
    assert job.wait() == 0, f"the run failed: {folder / 'runs.log'}"
    seconds = time.monotonic() - begun
    made = {stage: Artifact.read(Storage(run_dir).child(stage)).manifest for stage in STAGES}
    return {
        "seconds": seconds,
        "stages": {stage: manifest["provenance"]["seconds"] for stage, manifest in made.items()},
        "rows": {stage: manifest["summary"]["rows"] for stage, manifest in made.items()},
    }


def on_one_node(folder: Path, number: int) -> Run:
    """The run on the head, with files on its disk."""
    place = folder / f"local-{number}"
    shutil.rmtree(place, ignore_errors=True)
    with LocalNodes({}, folder, head_cpus=2) as nodes:
        return timed(nodes, folder, str(place))


def on_three_nodes(folder: Path, number: int) -> Run:
    """The run on two workers, with objects in S3."""
    with S3Server() as store, LocalNodes(store.environment, folder) as nodes:
        os.environ.update(store.environment)
        for _ in range(2):
            nodes.add()
        return timed(nodes, folder, f"s3://{store.bucket}/run-{number}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", required=True, type=Path, help="a folder for logs and runs")
    parser.add_argument("--pairs", type=int, default=3)
    arguments = parser.parse_args()
    (arguments.work / "job").mkdir(parents=True, exist_ok=True)
    shutil.copy(CONFIG, arguments.work / "job")
    ratios = []
    for number in range(arguments.pairs):
        ways: list[Callable[[Path, int], Run]] = [on_one_node, on_three_nodes]
        pair = {way.__name__: way(arguments.work, number) for way in ways[:: 1 if number % 2 == 0 else -1]}
        ratios.append(pair["on_three_nodes"]["seconds"] / pair["on_one_node"]["seconds"])
        line = json.dumps({"ratio": ratios[-1]} | pair | provenance())
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        print(line, flush=True)
    print(f"median ratio {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
