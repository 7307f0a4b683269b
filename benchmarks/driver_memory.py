"""Peak memory of the driver of `s2l run --until examples` at several numbers of rows, and the largest over the smallest.

    python benchmarks/driver_memory.py --work /tmp/driver-memory

Rows are short and all different, so that what grows is what the driver keeps of each. Counted is the driver process alone:
all that is resident, and that without the object store, which Ray's processes share and a driver only looks into. The same
corpus again is not written again. A line is added to `results/driver_memory.jsonl`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from s2l_ray.storage.artifacts import Artifact
from s2l_ray.storage.places import Storage
from s2l_ray.storage.provenance import provenance
from s2l_ray.storage.records import digest

RESULTS = Path(__file__).parent / "results" / "driver_memory.jsonl"
CONFIG = Path(__file__).parents[1] / "configs" / "jsonl-cpu.yaml"
SIZES = (100_000, 400_000, 1_000_000)
NUM_SOURCES = 7
LETTERS = str.maketrans("0123456789", "ghijklmnop")
SECONDS_BETWEEN_LOOKS = 0.02


def write_corpus(path: Path, rows: int) -> None:
    """Short rows in no order of id; prompts differ in more than their numbers, or all would be on one side."""
    with path.with_suffix(".tmp").open("w", encoding="utf-8") as file:
        for number in range(rows):
            number_hash = hashlib.blake2b(f"{number}".encode(), digest_size=8).hexdigest()
            letters = number_hash.translate(LETTERS)
            row = {"id": f"row-{letters}", "instruction": f"Spell {letters}.", "output": " ".join(letters)}
            file.write(json.dumps(row | {"source": f"s{number % NUM_SOURCES}"}) + "\n")
    path.with_suffix(".tmp").rename(path)


def peaks(process: subprocess.Popen[bytes]) -> dict[str, float]:
    """The largest memory in MiB that a process had at any look, until it ends: all of it, and what is not shared."""
    found, driver = {"rss_mib": 0.0, "private_mib": 0.0}, psutil.Process(process.pid)
    while process.poll() is None:
        try:
            memory = driver.memory_info()
        except psutil.NoSuchProcess:
            break
        now = {"rss_mib": memory.rss / 2**20, "private_mib": (memory.rss - memory.shared) / 2**20}
        found = {name: max(size, now[name]) for name, size in found.items()}
        time.sleep(SECONDS_BETWEEN_LOOKS)
    return found


def one(work: Path, rows: int, id_field: str | None) -> dict[str, Any]:
    """One run of this many rows, from nothing."""
    corpus, run_dir = work / f"{rows}.jsonl", work / f"run-{rows}"
    if not corpus.exists():
        write_corpus(corpus, rows)
    shutil.rmtree(run_dir, ignore_errors=True)
    settings = {
        "examples.dataset": corpus,
        "examples.id_field": json.dumps(id_field),
        "examples.prompt_template": json.dumps("{instruction} "),
        "examples.prompt_template_if_empty": "null",
    }
    command = [str(Path(sys.executable).with_name("s2l")), "run", str(CONFIG), "--run-dir", str(run_dir), "--until", "examples"]
    command += [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    with (work / f"run-{rows}.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        found = peaks(process)
    if process.wait():
        raise SystemExit(f"the run failed: see {log.name}")
    artifact = Artifact.read(Storage(str(run_dir)).child("examples"))
    assert artifact.summary["rows"] == rows
    shutil.rmtree(run_dir)
    # The same number for the same bytes: a change of the code that should change nothing is seen here.
    files = digest({path: record["sha256"] for path, record in artifact.manifest["files"].items()})
    return {"rows": rows, "seconds": artifact.manifest["provenance"]["seconds"], "files": files} | found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", required=True, type=Path, help="a folder for corpora and runs")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="numbers of rows")
    parser.add_argument("--id-field", choices=["id"], help="take the rows' own ids instead of making them from the content")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    runs = []
    for rows in arguments.sizes:
        runs.append(one(arguments.work, rows, arguments.id_field))
        print(json.dumps(runs[-1]), flush=True)
    ratios = {name: max(run[name] for run in runs) / min(run[name] for run in runs) for name in ("rss_mib", "private_mib")}
    result = {"id_field": arguments.id_field, "runs": runs, "largest_over_smallest": ratios, "cores": os.cpu_count()}
    print(json.dumps(ratios))
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(result | {"provenance": provenance()}) + "\n")


if __name__ == "__main__":
    main()
