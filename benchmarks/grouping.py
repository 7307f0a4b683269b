"""Grouping and choosing on made-up trajectories, beside other k-means libraries and the limits of the machine.

    python benchmarks/grouping.py select --rows 10000000 --repeats 3 --data /tmp/grouping
    python benchmarks/grouping.py summary [MEASURE ...]

`MEASURE --help` says what is timed. Every run is a process of its own and appends a line to `results/grouping/MEASURE.jsonl`.
The same command again goes on where it stopped: a run with the same settings, on the same processor, of the same code of
`s2l_ray` is not repeated; more `--repeats` add to it.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import itertools
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from made_up import generate, load, names

from s2l_ray.storage.provenance import provenance

NUM_CLUSTERS, BLOCK_ROWS = 100, 16_384
RESULTS = Path(__file__).parent / "results" / "grouping"
NUM_THREADS = len(os.sched_getaffinity(0))
RIVALS = ("minibatch", "fastkmeans")
Row = dict[str, Any]

# What is timed; rows, points and repeats by default.
MEASURES: dict[str, tuple[str, list[int], list[int], int]] = {
    "select": ("`s2l select` as a whole process beside faiss in memory, training + assigning alone", [10_000_000], [12], 3),
    "memory": ("peak memory and time of `s2l select` by rows", [100_000, 1_000_000, 10_000_000, 40_000_000], [12], 1),
    "sklearn": ("`cluster()` beside KMeans, one k-means++ and at most 20 iterations, in memory", [5_000_000], [12], 3),
    "reach": ("one restart, the fewest iterations as good as MiniBatchKMeans, fastkmeans", [1_000_000, 5_000_000], [24, 12], 3),
    "choose": ("choosing a tenth from finished groups, no reading or writing; hashing ids apart", [10_000_000], [0], 3),
    "ray": ("`s2l select` on Ray beside in memory; the peak is the largest process's, not Ray's", [10_000_000], [12], 3),
    "limits": ("what the machine can do; the share that the runs of select, memory and sklearn reached", [0], [0], 1),
}
# What the summary shows; k-means: seconds of the passes over all rows where they are recorded, else of the whole.
COLUMNS: dict[str, Callable[[Row], float]] = {
    "seconds": lambda row: row["seconds"],
    "k-means": lambda row: row.get("steps", {}).get("lloyd", row["seconds"]),
    "us/row": lambda row: 1e6 * row["seconds"] / max(1, row["rows"]),
    "GiB": lambda row: row["peak_gib"],
    "other_cores": lambda row: row["other_cores"],
    "inertia": lambda row: row.get("inertia", np.nan),
    "hashing": lambda row: row.get("hashing", np.nan),
}


def busy_seconds() -> float:
    """Processor seconds of all processes since the start of the machine (user, nice, system)."""
    return sum(map(int, Path("/proc/stat").read_text(encoding="utf-8").split()[1:4])) / os.sysconf("SC_CLK_TCK")


def measured(command: list[str]) -> tuple[Row, str]:
    """Wall seconds and peak resident gigabytes (the system's own account) of a process, and its standard output.

    Linux counts the peak of the process that starts another as that one's too, so this one must stay small: whatever
    needs memory, making the data included, goes through `child`. `other_cores`: cores that others used meanwhile. With one
    of two cores taken, scikit-learn and torch (OpenMP threads that wait for each other) were 8 times slower: no ratio then.
    """
    begun, busy = time.perf_counter(), busy_seconds()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    output = process.stdout.read() if process.stdout else ""
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{command} failed")
    seconds, others = time.perf_counter() - begun, busy_seconds() - busy - usage.ru_utime - usage.ru_stime
    return {"seconds": seconds, "peak_gib": usage.ru_maxrss / 2**20, "other_cores": others / seconds}, output


def child(function: Callable[..., Row], *arguments: Any) -> Row:
    """What a function of this file returns, called in a process of its own, and that process's peak memory."""
    process, output = measured([sys.executable, __file__, "child", function.__name__, json.dumps(arguments)])
    return process | json.loads(output.splitlines()[-1])


def s2l_select(data: str, extra: str) -> Row:
    """`s2l select` as a whole process, and what its clustering says of itself."""
    output = f"{data}-selected"
    shutil.rmtree(output, ignore_errors=True)
    fixed = {"--budget": "0.1", "--num-clusters": str(NUM_CLUSTERS), "--stratify-by": "none", "--output": output}
    options = [*itertools.chain(*fixed.items()), *shlex.split(extra)]
    row, _ = measured([str(Path(sys.executable).with_name("s2l")), "select", data, *options])
    manifest = json.loads(Path(output, "clustering", "manifest.json").read_text(encoding="utf-8"))
    found, machines = manifest["summary"], manifest["provenance"]["machines"]
    shutil.rmtree(output)
    return row | {"iterations": found["num_iterations"], "inertia": found["inertia"], "steps": machines["seconds"]}


def inertia(losses: np.ndarray, centroids: np.ndarray) -> float:
    """Sum of the squared distances of all rows to their nearest centroids, in float64."""
    centroids, total = centroids.astype(np.float64), 0.0
    for first in range(0, len(losses), BLOCK_ROWS):
        block = losses[first : first + BLOCK_ROWS].astype(np.float64)
        squares = (centroids**2).sum(1) - 2 * block @ centroids.T
        total += float(squares.min(axis=1).sum() + (block**2).sum())
    return total


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that a function took, and what it returned."""
    begun = time.perf_counter()
    found = function()
    return time.perf_counter() - begun, found


def fit(name: str, data: str, rows: int, points: int, seed: int, iterations: int) -> Row:
    """Seconds, iterations and inertia of one library on losses in memory; loading and imports are not counted.

    What is not set here is the library's default. All give labels too.
    """
    losses = load(data, rows, points)
    if name == "s2l":
        from s2l_ray.clustering.stage import cluster

        options = {"num_restarts": 1, "num_iterations": iterations} if iterations else {}
        seconds, found = timed(lambda: cluster(losses, num_clusters=NUM_CLUSTERS, seed=seed, **options))
        centroids, iterations = found.centroids_KT, found.num_iterations
    elif name in {"sklearn", "minibatch"}:
        from sklearn.cluster import KMeans, MiniBatchKMeans

        kind, options = (KMeans, {"max_iter": 20}) if name == "sklearn" else (MiniBatchKMeans, {"batch_size": 4096})
        model = kind(NUM_CLUSTERS, n_init=1, init="k-means++", random_state=seed, **options)
        seconds, _ = timed(lambda: model.fit(losses))
        centroids, iterations = model.cluster_centers_, model.n_iter_
    elif name == "fastkmeans":
        from fastkmeans import FastKMeans

        model = FastKMeans(d=points, k=NUM_CLUSTERS, niter=25, seed=seed, gpu=False)  # trains on all rows by default (0.5)
        seconds, _ = timed(lambda: model.fit_predict(losses))
        centroids, iterations = model.centroids, model.niter
    else:
        import faiss

        options = {"init_method": faiss.ClusteringInitMethod_KMEANS_PLUS_PLUS, "max_points_per_centroid": 10**9, "seed": seed}
        model, start = faiss.Kmeans(points, NUM_CLUSTERS, niter=iterations, **options), None
        if name == "faiss":  # as s2l from the fit of a sample, which is not timed; else from k-means++ on all rows, timed
            sampled = faiss.Kmeans(points, NUM_CLUSTERS, niter=20, **options)
            sampled.train(losses[np.random.default_rng(seed).permutation(rows)[: 1_024 * NUM_CLUSTERS]])
            start = sampled.centroids
        seconds, _ = timed(lambda: (model.train(losses, init_centroids=start), model.assign(losses)))
        centroids, iterations = model.centroids, len(model.iteration_stats)
    return {"seconds": seconds, "iterations": int(iterations), "inertia": inertia(losses, centroids)}


def choose(num_rows: int, num_clusters: int = NUM_CLUSTERS, fraction: float = 0.1, seed: int = 0) -> Row:
    """Choosing from finished groups of skewed sizes, and apart from it the hashing of ids to priorities."""
    from s2l_ray.examples.ids import priorities
    from s2l_ray.selection.choosing import select_rows

    shares = 1 / np.arange(1, num_clusters + 1)
    bounds, draws = np.cumsum(shares / shares.sum())[:-1], np.random.default_rng(seed).random(num_rows)
    cluster_ids_N, budget = np.searchsorted(bounds, draws).astype(np.int32), int(fraction * num_rows)
    ids = names(np.arange(num_rows))
    hashing, priorities_N = timed(lambda: priorities(ids, seed))
    seconds, rows_M = timed(lambda: select_rows(cluster_ids_N, priorities_N, budget))
    assert len(rows_M) == budget
    return {"seconds": seconds, "hashing": hashing}


def machine(folder: str, num_bytes: int = 2**30) -> Row:
    """Best of five: a float32 matrix product, copying memory (bytes read + written), reading a file from the page cache."""

    def rate(amount: float, function: Callable[[], object]) -> float:
        return amount / min(timed(function)[0] for _ in range(5)) / 1e9

    def read() -> None:
        with open(file.name, "rb", buffering=0) as opened:
            while opened.readinto(memoryview(target)[: 2**23]):
                pass

    a = np.random.default_rng(0).standard_normal((4096, 4096), dtype=np.float32)
    source, target = np.ones(num_bytes, np.uint8), np.zeros(num_bytes, np.uint8)
    parts = np.array_split(target, NUM_THREADS), np.array_split(source, NUM_THREADS)
    with ThreadPoolExecutor(NUM_THREADS) as pool, tempfile.NamedTemporaryFile(dir=folder) as file:
        file.write(source)
        file.flush()
        row = {"sgemm_gflops": rate(2 * 4096**3, lambda: a @ a), "file_gbytes": rate(num_bytes, read)}
        return row | {"copy_gbytes": rate(2 * num_bytes, lambda: list(pool.map(np.copyto, *parts)))}


@functools.cache
def setting(*libraries: str) -> Row:
    """What every record says of code and machine, with the versions of other libraries."""
    code = hashlib.sha256()
    for path in sorted((Path(__file__).parents[1] / "s2l_ray").rglob("*.py")):
        code.update(path.read_bytes())
    cpu = next(line.split(": ")[1] for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    found = provenance()
    found["versions"] |= {name: metadata.version(name) for name in libraries}
    return {"code": code.hexdigest()[:12], "cpu": f"{cpu} x {NUM_THREADS}", "provenance": found}


def records(measure: str) -> list[Row]:
    """All that was measured, oldest first."""
    path = RESULTS / f"{measure}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


class Bench:
    """One measure on one shape of data: runs what is not recorded yet."""

    def __init__(self, options: argparse.Namespace, rows: int, points: int) -> None:
        kind = " ".join(name for name in ("smooth", "sorted") if getattr(options, name))
        self.key: Row = {"measure": options.measure, "rows": rows, "points": points, "kind": kind, "extra": options.extra}
        self.folder = options.data
        self.setting = setting("scikit-learn", "fastkmeans")
        self.shape = (f"{options.data}/{rows}x{points}{kind.replace(' ', '-')}", rows, points)

    def once(self, repetition: int, side: str, run: Callable[[], Row]) -> Row:
        """The record of this run, made now where there is none."""
        key = self.key | {"side": side, "repetition": repetition, "code": self.setting["code"], "cpu": self.setting["cpu"]}
        for row in records(self.key["measure"]):
            if key.items() <= {name: row.get(name) for name in key}.items():
                return row
        if self.key["points"]:
            child(generate, *self.shape, "smooth" in self.key["kind"], "sorted" in self.key["kind"])
        row = key | run() | self.setting
        RESULTS.mkdir(parents=True, exist_ok=True)
        with (RESULTS / f"{key['measure']}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{key['measure']} {key['rows']:,} #{repetition} {side}: {row['seconds']:.2f} s", flush=True)
        return row

    def select(self, repetition: int, side: str = "s2l", extra: str = "") -> Row:
        """One run of `s2l select`."""
        return self.once(repetition, side, lambda: s2l_select(self.shape[0], f"{self.key['extra']} {extra}"))

    def fit(self, repetition: int, name: str, iterations: int = 0, side: str | None = None) -> Row:
        """One fit in memory; the repetition is its seed."""
        return self.once(repetition, side or name, lambda: child(fit, name, *self.shape, repetition, iterations))

    def measure(self, repetition: int) -> None:
        """One repetition of the measure."""
        measure = self.key["measure"]
        if measure in {"select", "memory"}:
            iterations = max(1, self.select(repetition)["iterations"])
            for name in ("faiss", "faiss-own") if measure == "select" else ():
                self.fit(repetition, name, iterations)
        elif measure == "sklearn":
            self.fit(repetition, "s2l")
            self.fit(repetition, "sklearn")
        elif measure == "reach":
            target = min(self.fit(repetition, name)["inertia"] for name in RIVALS)
            for i in (1, 2, 4, 8, 16):
                if self.fit(repetition, "s2l", i, f"s2l-{i:02d}")["inertia"] <= target:
                    break
        elif measure == "choose":
            self.once(repetition, "s2l", lambda: child(choose, self.key["rows"]))
        elif measure == "ray":
            self.select(repetition, "ray", "--engine ray")
            self.select(repetition, "memory", "--engine memory")
        else:
            self.once(repetition, "machine", lambda: child(machine, self.folder))


def ratios(ours: list[Row], theirs: list[Row]) -> list[float]:
    """Median of ours over theirs, each of the same repetition, for every column."""
    other = {row["repetition"]: row for row in theirs}
    pairs = [(row, other[row["repetition"]]) for row in ours if row["repetition"] in other]
    return [statistics.median([a(one) / a(two) for one, two in pairs] or [np.nan]) for a in COLUMNS.values()]


def as_good(sides: dict[str, list[Row]], rival: str) -> list[Row]:
    """Of each repetition our first run, by iterations, whose inertia is at most the rival's; none where none is."""
    target, found = {row["repetition"]: row["inertia"] for row in sides[rival]}, {}
    for row in (row for side in sorted(sides) if side.startswith("s2l-") for row in sides[side]):
        if row["inertia"] <= target.get(row["repetition"], 0):
            found.setdefault(row["repetition"], row)
    return list(found.values())


def summary(measure: str) -> None:
    """Print medians, and medians of paired ratios: the first side (for `memory`, each number of rows) over the others."""
    groups: dict[tuple[str, ...], dict[str, list[Row]]] = {}
    for row in records(measure):
        shape, side = (f"{row['rows']:,}", row["side"]) if measure != "memory" else ("", f"{row['rows']:,}")
        key = (measure, shape, f"{row['points']} points", row["kind"], row["extra"], f"code {row['code']}", row["cpu"])
        groups.setdefault(key, {}).setdefault(side, []).append(row)
    for key, sides in groups.items():
        if measure == "limits":
            print_limits(sides["machine"][-1])
            continue
        print("\n" + ", ".join(filter(None, key)), "at", next(iter(sides.values()))[-1]["provenance"]["git"])
        print(f"{'':>12} runs {' '.join(f'{name:>11}' for name in COLUMNS)}")
        for side, runs in sides.items():
            medians = [statistics.median(map(found, runs)) for found in COLUMNS.values()]
            print(f"{side:>12} {len(runs):4} {' '.join(f'{value:11.5g}' for value in medians)}")
        pairs = [(next(iter(sides)), other) for other in list(sides)[1:]]
        if measure == "memory":
            pairs = [(many, few) for i, many in enumerate(sides) for few in list(sides)[:i]]
        if measure == "reach":
            pairs = [(f"s2l as good as {rival}", rival) for rival in RIVALS if rival in sides]
            sides |= {ours: as_good(sides, rival) for ours, rival in pairs}
        for one, other in pairs:
            print(f"  {one} / {other}, {len(sides[one])} of {len(sides[other])} repetitions")
            print(f"{'':17} {' '.join(f'{value:11.3f}' for value in ratios(sides[one], sides[other]))}")


def print_limits(best: Row) -> None:
    """Least seconds for products (2NKT) and for reading the losses (4NT bytes) in iterations + 1 passes, and the share."""
    rates = ", ".join(f"{name} {value:.1f}" for name, value in best.items() if name.endswith(("flops", "gbytes")))
    print(f"\nlimits of {best['cpu']}: {rates}; share = the larger of products and reading, over the k-means seconds")
    for row in (row for name in ("select", "memory", "sklearn") for row in records(name) if row["cpu"] == best["cpu"]):
        values = row["rows"] * row["points"] * (row["iterations"] + 1)
        products, reading = 2 * values * NUM_CLUSTERS / best["sgemm_gflops"] / 1e9, 4 * values / best["copy_gbytes"] / 1e9
        what = f"{row['measure']} {row['rows']:,} x {row['points']} {row['side']}, {row['iterations']} iterations"
        taken = COLUMNS["k-means"](row)
        print(f"  {what}: {products:.2f} s, {reading:.2f} s of {taken:.2f} s: {max(products, reading) / taken:.0%}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="measure", required=True)
    for name, (what, rows, points, repeats) in MEASURES.items():
        command = commands.add_parser(name, description=what, help=what)
        command.add_argument("--rows", type=int, nargs="+", default=rows)
        command.add_argument("--points", type=int, nargs="+", default=points, help="one for all, or one for each of --rows")
        command.add_argument("--repeats", "--seeds", type=int, default=repeats)
        command.add_argument("--data", help="folder of the data, kept and used again (default: a temporary one)")
        command.add_argument("--smooth", action="store_true", help="a continuum of trajectories instead of kinds")
        command.add_argument("--sorted", action="store_true", help="ids in ascending order")
        command.add_argument("--extra", default="", help='more options for `s2l select`: --extra="--num-restarts 1"')
    commands.add_parser("summary").add_argument("measures", nargs="*", default=list(MEASURES))
    command = commands.add_parser("child", description="One function of this file, for its own use.")
    command.add_argument("name", choices=["generate", "fit", "choose", "machine"])
    command.add_argument("arguments", type=json.loads)
    options = parser.parse_args()
    if options.measure == "child":
        print(json.dumps(globals()[options.name](*options.arguments)))
    elif options.measure == "summary":
        for name in options.measures:
            summary(name)
    else:
        with tempfile.TemporaryDirectory() as folder:
            options.data = options.data or folder
            points = options.points * len(options.rows) if len(options.points) == 1 else options.points
            for shape in zip(options.rows, points, strict=True):
                for repetition in range(options.repeats):
                    Bench(options, *shape).measure(repetition)
        summary(options.measure)


if __name__ == "__main__":
    main()
