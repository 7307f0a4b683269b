"""`s2l select` on a million trajectories of 12 points: wall time and peak memory of the whole process.

    python benchmarks/select_million.py [ROWS] [REPEATS]

Beside it, in the same run, scikit-learn's KMeans on the same losses already in memory (k-means++, one initialisation, 20
iterations): training alone, without reading, ids, choosing or writing. Writes `benchmarks/results/select_million.json`.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from s2l_ray.artifacts import provenance

NUM_POINTS, NUM_CLUSTERS = 12, 100
SKLEARN = """
import sys, time
import numpy as np
from sklearn.cluster import KMeans
losses = np.load(sys.argv[1])
begun = time.perf_counter()
KMeans({k}, init="k-means++", n_init=1, max_iter=20, tol=0, random_state=0).fit(losses)
print(time.perf_counter() - begun)
"""


def trajectories(num_rows: int) -> pa.Table:
    """Falling losses of a few hundred kinds, with string ids, sources and a text to pass through."""
    rng = np.random.default_rng(0)
    kinds = rng.integers(0, 300, num_rows)
    start, fall = rng.uniform(2, 8, 300)[kinds], rng.uniform(0.1, 0.9, 300)[kinds]
    curve = np.linspace(0, 1, NUM_POINTS)
    losses = start[:, None] * (1 - fall[:, None] * curve) + rng.normal(0, 0.1, (num_rows, NUM_POINTS))
    ids = [f"example-{i:08d}" for i in rng.permutation(num_rows)]
    flat = pa.array(np.maximum(losses, 0).astype(np.float32).ravel())
    return pa.table(
        {
            "example_id": ids,
            "losses": pa.FixedSizeListArray.from_arrays(flat, NUM_POINTS),
            "source": pa.array(np.array(["a", "b", "c"])[kinds % 3]),
            "text": [f"text of {name}" for name in ids],
        }
    )


def measure(command: list[str]) -> tuple[float, float, str]:
    """Wall seconds, peak resident gigabytes (the system's own account) and standard output of a process."""
    begun = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    output = process.stdout.read() if process.stdout else ""
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{command} failed")
    return time.perf_counter() - begun, usage.ru_maxrss / 2**20, output


def main(num_rows: int = 1_000_000, repeats: int = 5) -> None:
    """Measure in pairs and write the medians."""
    with tempfile.TemporaryDirectory() as folder:
        table = trajectories(num_rows)
        pq.write_table(table, f"{folder}/trajectories.parquet", row_group_size=100_000)
        np.save(f"{folder}/losses.npy", table["losses"].combine_chunks().flatten().to_numpy().reshape(-1, NUM_POINTS))
        del table
        seconds, memory, sklearn = [], [], []
        for repeat in range(repeats):
            options = ["--budget", "0.1", "--num-clusters", str(NUM_CLUSTERS), "--output", f"{folder}/out-{repeat}"]
            command = [str(Path(sys.executable).with_name("s2l")), "select", f"{folder}/trajectories.parquet", *options]
            wall, peak, _ = measure(command)
            seconds.append(wall)
            memory.append(peak)
            script = SKLEARN.format(k=NUM_CLUSTERS)
            sklearn.append(float(measure([sys.executable, "-c", script, f"{folder}/losses.npy"])[2]))
    result = {
        "rows": num_rows,
        "points": NUM_POINTS,
        "clusters": NUM_CLUSTERS,
        "seconds": {"median": statistics.median(seconds), "all": seconds},
        "peak_gib": max(memory),
        "sklearn_kmeans_training_seconds": {"median": statistics.median(sklearn), "all": sklearn},
        "ratio_to_sklearn": statistics.median(seconds) / statistics.median(sklearn),
        "provenance": provenance(),
    }
    path = Path(__file__).parent / "results" / "select_million.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
