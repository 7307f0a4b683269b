"""`s2l run --until examples` on real rows against pyarrow reading and writing in one process.

    python benchmarks/way_in.py --data DATA_DIR --work WORK_DIR [--rows 1000000] [--pairs 3] [--before TREE]

The corpus repeats the rows of DATA_DIR (`*.jsonl` with `instruction`, `input`, `output`, `source`) with changed numbers.
pyarrow does two things with it, each with the threads of this machine: `to_parquet` reads the JSON Lines file and writes it as
one Parquet file; `same_files` reads what the stage read and writes what the stage wrote, part by part. The stage's time is the
one in its manifest, without Ray's start; the driver's memory is that of its process alone. `--before` also runs another
checkout of this project in every pair. Processor seconds of a run are those of all its processes, Ray's start among them.
Lines are added to `results/way_in.jsonl`, medians printed at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.json
import pyarrow.parquet as pq
from driver_memory import CONFIG, peaks
from numpy.typing import NDArray
from ranged import children

from s2l_ray.storage.artifacts import Artifact
from s2l_ray.storage.places import Storage
from s2l_ray.storage.provenance import provenance
from s2l_ray.storage.records import digest

RESULTS = Path(__file__).parent / "results" / "way_in.jsonl"
HERE = Path(__file__).parents[1]
NUMBER = re.compile(r"\d{1,9}")
PARQUET = {"compression": "zstd"}
BASES = ("to_parquet", "same_files")
Seconds = NDArray[np.float64]
"""Seconds and processor seconds."""


def write_corpus(path: Path, data: Path, rows: int) -> None:
    """Real rows, again and again with other numbers, so that no two are equal."""
    found = [json.loads(line) for file in sorted(data.glob("*.jsonl")) for line in file.open(encoding="utf-8")]
    with path.with_suffix(".tmp").open("w", encoding="utf-8") as file:
        for number in range(rows):
            round_, row = number // len(found), dict(found[number % len(found)])
            for field in ("instruction", "output") if round_ else ():
                row[field] = NUMBER.sub(lambda old, by=7 * round_: str(int(old[0]) + by), row[field]) + f" ({round_})"
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    path.with_suffix(".tmp").rename(path)


def run_stage(tree: Path, corpus: Path, run_dir: Path) -> dict[str, Any]:
    """The stage from nothing, by the code in `tree`."""
    shutil.rmtree(run_dir, ignore_errors=True)
    code = "from s2l_ray.cli import main; main()"
    command = [sys.executable, "-c", code, "run", str(CONFIG), "--run-dir", str(run_dir), "--until", "examples"]
    used: dict[tuple[int, float], float] = {}
    with run_dir.with_suffix(".log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--set", f"examples.dataset={corpus}"],
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=tree,
            env=os.environ | {"PYTHONPATH": str(tree)},
        )
        threading.Thread(target=add_processor_seconds, args=(process, used)).start()
        memory = peaks(process)
    if process.wait():
        raise SystemExit(f"the run failed: see {log.name}")
    artifact = Artifact.read(Storage(str(run_dir)).child("examples"))
    files = digest({path: record["sha256"] for path, record in artifact.manifest["files"].items()})
    seconds = {"seconds": artifact.manifest["provenance"]["seconds"], "cpu_seconds": sum(used.values())}
    return seconds | {"rows": artifact.summary["rows"], "files": files} | memory


def add_processor_seconds(process: subprocess.Popen[bytes], used: dict[tuple[int, float], float]) -> None:
    """Keep the processor seconds of a process and of all below it, Ray's own among them, until it ends."""
    root = psutil.Process(process.pid)
    while process.poll() is None:
        for one in [root, *children(root)]:
            with contextlib.suppress(psutil.Error):
                times = one.cpu_times()
                used[one.pid, one.create_time()] = times.user + times.system
        time.sleep(0.25)


def to_parquet(corpus: Path, target: Path) -> Seconds:
    """pyarrow from the JSON Lines file to one Parquet file."""
    start = clocks()
    pq.write_table(pa.json.read_json(corpus), target, **PARQUET)
    return clocks() - start


def same_files(corpus: Path, run_dir: Path, target: Path) -> Seconds:
    """pyarrow reading the JSON Lines file, and writing every part that the stage wrote."""
    start = clocks()
    pa.json.read_json(corpus)
    seconds = clocks() - start
    for part in sorted((run_dir / "examples").glob("part-*.parquet")):
        table = pq.read_table(part)
        start = clocks()
        pq.write_table(table, target, **PARQUET)
        seconds += clocks() - start
    return seconds


def clocks() -> Seconds:
    """The time, and the processor seconds of this process."""
    return np.array([time.perf_counter(), time.process_time()])


def one_pair(arguments: argparse.Namespace, corpus: Path) -> dict[str, Any]:
    """Both ways of pyarrow and the stage, one after the other."""
    work, run_dir = arguments.work, arguments.work / "run"
    found: dict[str, Any] = {}
    if arguments.before:
        found["before"] = run_stage(arguments.before, corpus, run_dir)
    found["stage"] = run_stage(HERE, corpus, run_dir)
    for name, measure in (
        ("to_parquet", lambda: to_parquet(corpus, work / "pyarrow.parquet")),
        ("same_files", lambda: same_files(corpus, run_dir, work / "pyarrow.parquet")),
    ):
        found[name], found[f"{name}_cpu"] = measure().tolist()
        found[f"stage_over_{name}"] = found["stage"]["seconds"] / found[name]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", required=True, type=Path, help="a folder of JSON Lines files")
    parser.add_argument("--work", required=True, type=Path, help="a folder for the corpus and runs")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--before", type=Path, help="another checkout of this project")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    corpus = arguments.work / f"{arguments.rows}.jsonl"
    if not corpus.exists():
        write_corpus(corpus, arguments.data, arguments.rows)
    pairs = []
    for _ in range(arguments.pairs):
        pairs.append(one_pair(arguments, corpus))
        line = {"corpus_bytes": corpus.stat().st_size, **pairs[-1], "cores": os.cpu_count(), "load": os.getloadavg()[0]}
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line | {"provenance": provenance()}) + "\n")
        print(json.dumps(line), flush=True)
    for name in (*BASES, *(f"{base}_cpu" for base in BASES), *(f"stage_over_{base}" for base in BASES)):
        print(f"{name:24} {statistics.median(pair[name] for pair in pairs):10.2f}")
    for name in ("before", "stage") if arguments.before else ("stage",):
        for key, unit in (("seconds", "s"), ("cpu_seconds", "s"), ("rss_mib", "MiB")):
            print(f"{name:12} {key:11} {statistics.median(pair[name][key] for pair in pairs):10.1f} {unit}")


if __name__ == "__main__":
    main()
