"""`s2l select` in Ray, where no row passes the driver, beside one process; Ray Data's own sort; actors killed at random.

    python benchmarks/ranged.py run --rows 1000000 5000000 --repeats 3 --data /tmp/ranged
    python benchmarks/ranged.py sort --rows 1000000 5000000
    python benchmarks/ranged.py merge --rows 5000000
    python benchmarks/ranged.py kills --kills 20

`run`: engines `ray` (two actors) and `disk` (two threads) in turn, K = 100, 10,000 rows chosen, each in a process of its own
that has started Ray and grouped 100,000 rows before the clock starts, so that Ray's workers and all imports are there. Driver:
the memory and the processor seconds of that process alone; total: those of all processes below it, of its start too; objects:
the most that Ray's object store took of /dev/shm. `sort`: what Ray Data takes to read and sort the same files by id, against
our ranges. `merge`: runs of 4,096 rows merged all at once and 64 at once; `seconds` are those of merging, a read is a stretch
of a run that lies in a range, of which each is one opening of a file. `kills`: a process of an actor or a task is killed now
and then (`--every`); seconds until the actor's rows answer again, and whether all bytes are as undisturbed. Every run adds a
line to `results/grouping/ranged-*.jsonl`; the same command again goes on where it stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from grouping import RESULTS, Row, child, generate, records, setting

POINTS, NUM_CLUSTERS, BUDGET, FIRST_ROWS = 12, 100, 10_000, 100_000
SMALL_RUN_ROWS = 4_096
WORDS = {"actors": "ray::SlotsActor", "tasks": "ray::_reported"}


def once(command: str, key: Row, run: Callable[[], Row]) -> Row:
    """The record of this run on this code and processor, made now where there is none."""
    key |= {name: setting()[name] for name in ("code", "cpu")}
    for row in records(f"ranged-{command}"):
        if key.items() <= row.items():
            return row
    row = key | run() | setting()
    RESULTS.mkdir(parents=True, exist_ok=True)
    with (RESULTS / f"ranged-{command}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print({name: value for name, value in row.items() if name != "provenance"}, flush=True)
    return row


def watched(*arguments: Any) -> Row:
    """What a function of this file returns in a process of its own, with the processor seconds of all processes below it."""
    process = subprocess.Popen([sys.executable, __file__, "child", json.dumps(arguments)], stdout=subprocess.PIPE, text=True)
    seconds: dict[tuple[int, float], float] = {}
    shared, most, load = shm_bytes(), 0, 0.0
    root = psutil.Process(process.pid)
    while process.poll() is None:
        for one in [root, *children(root)]:
            try:
                times = one.cpu_times()
                seconds[one.pid, one.create_time()] = times.user + times.system
            except psutil.Error:
                continue
        most, load = max(most, shm_bytes() - shared), max(load, os.getloadavg()[0])
        time.sleep(0.25)
    if process.returncode:
        raise SystemExit("a run failed")
    lines = process.stdout.read().splitlines() if process.stdout else []
    (found,) = [line for line in lines if line.startswith("{")]  # Ray's lines of lost workers are among them
    return {"total_cpu": sum(seconds.values()), "object_mib": most / 2**20, "load": load, **json.loads(found)}


def command_line(process: psutil.Process) -> str:
    """How a process was called; nothing of one that has just ended."""
    try:
        return " ".join(process.cmdline() or [])
    except psutil.Error:
        return ""


def children(root: psutil.Process) -> list[psutil.Process]:
    """All processes below one."""
    try:
        return root.children(recursive=True)
    except psutil.Error:
        return []


def shm_bytes() -> int:
    """What is in use of the shared memory of this machine."""
    found = os.statvfs("/dev/shm")  # noqa: S108
    return (found.f_blocks - found.f_bfree) * found.f_frsize


def cpu_seconds() -> float:
    """Processor seconds of this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def select(data: str, engine: str, workers: int, kills: int = 0, seed: int = 0, every: float = 4.0) -> Row:
    """`s2l select` in this process."""
    from s2l_ray.config import ClusteringConfig, GroupingConfig, SelectionConfig
    from s2l_ray.runtime.session import connect_ray
    from s2l_ray.selection.alone import select_trajectories

    output, first = f"{data}-{engine}", Path(data).with_name(f"{FIRST_ROWS}x{POINTS}")
    if engine == "ray":
        connect_ray()
    grouping = ClusteringConfig(num_clusters=NUM_CLUSTERS, stratify_by=None)
    machines = GroupingConfig(engine=engine, num_workers=workers)  # type: ignore[arg-type]
    shutil.rmtree(output, ignore_errors=True)
    select_trajectories(str(first), output, grouping, SelectionConfig(budget=BUDGET), machines)
    shutil.rmtree(output)
    killed = Killer(kills, seed, every) if kills else None
    begun, cpu = time.perf_counter(), cpu_seconds()
    select_trajectories(data, output, grouping, SelectionConfig(budget=BUDGET), machines)
    row = {"seconds": time.perf_counter() - begun, "driver_cpu": cpu_seconds() - cpu}
    row |= {"driver_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    manifest = json.loads(Path(output, "clustering", "manifest.json").read_text(encoding="utf-8"))
    row |= {"steps": manifest["provenance"]["machines"]["seconds"], "iterations": manifest["summary"]["num_iterations"]}
    content = hashlib.sha256()
    for path in sorted(Path(output).rglob("*")):
        if path.suffix in {".parquet", ".npy"}:
            content.update(path.read_bytes())
    shutil.rmtree(output)
    if killed is not None:
        killed.stop()
        row |= {"kills": killed.kinds, "recovery": manifest["provenance"]["machines"].get("recovery_seconds", [])}
    return row | {"bytes": content.hexdigest()[:16]}


class Killer:
    """Kills a process of an actor or a task now and then: `every` so many seconds on average."""

    def __init__(self, most: int, seed: int, every: float) -> None:
        self.kinds: list[str] = []
        self._most, self._rng, self._ended, self._every = most, np.random.default_rng(seed), threading.Event(), every
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Kill nothing more."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        wait = 2.0
        while len(self.kinds) < self._most and not self._ended.wait(wait):
            wait = 0.2
            for kind in self._rng.permutation(list(WORDS)).tolist():
                found = [one for one in children(psutil.Process()) if WORDS[kind] in command_line(one)]
                if found:
                    found[int(self._rng.integers(len(found)))].kill()
                    self.kinds.append(kind)
                    wait = float(self._rng.exponential(self._every))
                    break


def sort(data: str, how: str) -> Row:
    """Reading all files and sorting the rows by id, into files: by Ray Data or into our ranges."""
    from s2l_ray.runtime.session import connect_ray
    from s2l_ray.storage.places import Storage
    from s2l_ray.trajectories.ranges import open_ranges

    connect_ray()
    import ray.data

    with tempfile.TemporaryDirectory(dir=Path(data).parent) as folder:
        begun, cpu = time.perf_counter(), cpu_seconds()
        if how == "ours":
            open_ranges(data, Storage(f"{folder}/ranges"), seed=0)
        else:
            ray.data.DataContext.get_current().enable_progress_bars = False
            ray.data.read_parquet(data).sort("example_id").write_parquet(f"{folder}/sorted")
        return {
            "seconds": time.perf_counter() - begun,
            "driver_cpu": cpu_seconds() - cpu,
            "driver_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }


def merge(data: str, at_once: int) -> Row:
    """Reading all files into many small runs, and merging so many at once."""
    from s2l_ray.runtime.session import connect_ray
    from s2l_ray.storage.places import Storage
    from s2l_ray.trajectories import ranges, sorting

    connect_ray()
    ranges.RUN_ROWS, sorting.MAX_RUNS_AT_ONCE, ranges_of = SMALL_RUN_ROWS, at_once, sorting.ranges_of
    merged: list[sorting.IdRange] = []

    def counted(runs: Sequence[sorting.Run]) -> Iterator[sorting.IdRange]:
        found = list(ranges_of(runs))
        merged.extend(found)
        return iter(found)

    sorting.ranges_of = counted
    merged_runs, seconds = ranges.merged_runs, [0.0]

    def clocked(*arguments: Any) -> list[sorting.Run]:
        begun = time.perf_counter()
        found = merged_runs(*arguments)
        seconds[0] = time.perf_counter() - begun
        return found

    ranges.merged_runs = clocked
    with tempfile.TemporaryDirectory(dir=Path(data).parent) as folder:
        cpu = cpu_seconds()
        store = ranges.open_ranges(data, Storage(f"{folder}/ranges"), seed=0)
        with ThreadPoolExecutor(1) as pool:
            row = {"identity": store.identity(pool), "files": len(store.rows.files)}
        row |= {"seconds": seconds[0], "driver_cpu": cpu_seconds() - cpu, "ranges": len(merged)}
        row |= {"driver_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
        return row | {"reads": sum(len(one.stretches) for one in merged)}


def measure(options: argparse.Namespace) -> None:
    """All runs of a command."""
    child(generate, f"{options.data}/{FIRST_ROWS}x{POINTS}", FIRST_ROWS, POINTS, False, False)
    for rows in options.rows:
        data = f"{options.data}/{rows}x{POINTS}"
        child(generate, data, rows, POINTS, False, False)
        for repetition in range(options.repeats):
            key = {"rows": rows, "points": POINTS, "repetition": repetition}
            if options.command == "run":
                for engine in ("ray", "disk") if repetition % 2 else ("disk", "ray"):
                    once("run", key | {"side": engine}, partial(watched, "select", data, engine, 2))
            elif options.command == "sort":
                for how in ("ours", "ray.data"):
                    once("sort", key | {"side": how}, partial(watched, "sort", data, how))
            elif options.command == "merge":
                for at_once in (10**9, 64):
                    side = "all at once" if at_once == 10**9 else f"{at_once} at once"
                    once("merge", key | {"side": side}, partial(watched, "merge", data, at_once))
            else:
                calm = once("kills", key | {"side": "calm"}, partial(watched, "select", data, "ray", 2))
                killed = partial(watched, "select", data, "ray", 2, options.kills, repetition, options.every)
                row = once("kills", key | {"side": "killed"}, killed)
                print("same bytes" if calm["bytes"] == row["bytes"] else "OTHER BYTES", row["kills"], row["recovery"])


def summary(command: str) -> None:
    """Medians by rows and side."""
    groups: dict[tuple[int, str, str], list[Row]] = {}
    for row in records(f"ranged-{command}"):
        groups.setdefault((row["rows"], row["side"], row["code"]), []).append(row)
    names = ("seconds", "total_cpu", "driver_cpu", "driver_mib", "object_mib", *(["reads"] if command == "merge" else []))
    print(f"{'':>36} runs {' '.join(f'{name:>11}' for name in names)}")
    for (rows, side, code), found in sorted(groups.items()):
        medians = [statistics.median(row[name] for row in found) for name in names]
        print(f"{rows:>11,} {side:>11} {code} {len(found):4} {' '.join(f'{value:11.4g}' for value in medians)}")


def main() -> None:
    """The command line."""
    if sys.argv[1:2] == ["child"]:
        name, *arguments = json.loads(sys.argv[2])
        print(json.dumps({"select": select, "sort": sort, "merge": merge}[name](*arguments)))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "sort", "merge", "kills", "summary"])
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--every", type=float, default=4.0, help="seconds between kills, on average")
    parser.add_argument("--data", default=str(Path(tempfile.gettempdir()) / "ranged"))
    options = parser.parse_args()
    if options.command == "summary":
        for command in ("run", "sort", "merge", "kills"):
            print(f"\n{command}")
            summary(command)
    else:
        Path(options.data).mkdir(parents=True, exist_ok=True)
        measure(options)


if __name__ == "__main__":
    main()
