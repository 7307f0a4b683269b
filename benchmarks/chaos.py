"""Runs on three Ray nodes over S3 during which things are killed at random moments; what was lost, and how long it took.

    python benchmarks/chaos.py --kills 50 --work /tmp/chaos

A run (`ray job submit -- s2l run ...`, from the corpus to the subset) is disturbed again and again: a training worker, a
scoring actor, a whole node, every connection to the storage, or the driver; where the job ended it is submitted again. When
it is done, the same proxy is scored, grouped and chosen from once more without disturbance: every loss must be there once,
and every file of trajectories, clustering and selection must be the same bytes. A training must go on from the last resume
point that was registered before the kill, or from a later one. Then the next run, until there were enough kills. Every run
adds a line to `results/chaos.jsonl`; the exit code is 1 if anything was lost, doubled or different. The time lost by a kill is
that until the next finished piece of work is there.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from local_nodes import LocalNodes, S3Server

from s2l_ray.storage.artifacts import Artifact
from s2l_ray.storage.places import Storage
from s2l_ray.storage.provenance import provenance

RESULTS = Path(__file__).parent / "results" / "chaos.jsonl"
KINDS = ("training worker", "scoring actor", "node", "connections", "driver")
# What Ray calls its processes.
PROCESSES = {"training worker": "ray::RayTrainWorker", "scoring actor": "ray::MapWorker", "driver": "/s2l run"}
# Failures of a job beyond the number of kills after which something else is wrong.
MOST_FAILURES = 5
# After these kinds there must be a new group where there was one.
ENDS_TRAINING = ("training worker", "driver")
FIT = ".work/proxy"
# Files that say nothing about how far the work is.
NO_PROGRESS = ("/lock", "attempts.json", "building.json", "run.json")
CONFIG = """\
name: chaos
examples:
  dataset:
    reasoning_gym:
      seed: 0
      tasks:
        basic_arithmetic: {size: 400, min_terms: 2, max_terms: 3, min_digits: 1, max_digits: 2}
        simple_equations: {size: 400, min_value: 1, max_value: 20}
        spell_backward: {size: 400}
        letter_counting: {size: 400, min_words: 3, max_words: 6}
  held_out_fraction: 0
  rows_per_part: 32
proxy:
  model: {scratch: {architecture: gpt_neox, layers: 2, hidden: 64, heads: 4, max_positions: 256, tie_embeddings: true}}
  tokenizer: {train: bpe, vocab_size: 768}
  epochs: 10
  global_batch_size: 32
  learning_rate: 2.0e-3
  max_tokens: 256
  num_checkpoints: 6
  seed: 42
clustering: {num_clusters: 20, seed: 0}
selection: {budget: 0.2, seed: 0}
target: {model: {scratch: {layers: 2, hidden: 64, heads: 4}}}
machines:
  proxy: {num_workers: [1, 2], cpus_per_worker: 1, gpus_per_worker: 0, checkpoint_every_minutes: 0.1}
  trajectories: {num_workers: [1, 2], cpus_per_worker: 1, gpus_per_worker: 0}
"""
Row = dict[str, Any]


class Disturbed:
    """One run under disturbance: its job, its log, and what was done to it."""

    def __init__(self, nodes: LocalNodes, store: S3Server, folder: Path, run_dir: str, rng: np.random.Generator) -> None:
        self.nodes, self.store, self.folder, self.run_dir, self.rng = nodes, store, folder, run_dir, rng
        self.log = folder / f"{run_dir.rpartition('/')[2]}.log"
        self.kills: list[Row] = []
        self.failures: list[str] = []
        self.submitted, self.lost = 0, 0.0
        self._log_length = 0
        self._steps: dict[str, int] = {}  # of resume points, by name

    def submit(self) -> subprocess.Popen[Any]:
        self.submitted += 1
        self._log_length = self.log.stat().st_size if self.log.exists() else 0
        words = ["s2l", "run", "chaos.yaml", "--run-dir", self.run_dir, "--until", "selection"]
        return self.nodes.submit(words, self.folder / "job", self.log)

    def submit_again(self) -> subprocess.Popen[Any]:
        """After a failure. Raises RuntimeError where kills alone cannot be why the job fails."""
        self.failures.append(self.last_line())
        if self.submitted > len(self.kills) + MOST_FAILURES:
            raise RuntimeError(f"the job failed {self.submitted} times with {len(self.kills)} kills: {self.log}")
        return self.submit()

    def progress(self) -> set[str]:
        """What lies in the run's directory and stands for work done."""
        found = Storage(self.run_dir).names(recursive=True)
        return {name for name in found if not any(word in name for word in NO_PROGRESS)}

    def resume_step(self) -> int:
        """The step of the last resume point that Ray Train has registered, 0 if there is none."""
        snapshot = Storage(self.run_dir).read_json(f"{FIT}/ray/fit/checkpoint_manager_snapshot.json") or {}
        for result in snapshot.get("checkpoint_results", []):
            self._steps[result["checkpoint_dir_name"]] = result["metrics"]["step"]
        return max((result["metrics"]["step"] for result in snapshot.get("checkpoint_results", [])), default=0)

    def attempt(self) -> Row | None:
        """The newest group of the proxy's training: when it began, by the store's clock, and at which step."""
        value = Storage(self.run_dir).read_json(f"{FIT}/attempts.json")
        if value is None or "error" in value:  # written anew when the group ends with an error
            return None
        began = Storage(self.run_dir).infos(FIT).get("attempts.json")
        self.resume_step()
        step = self._steps.get(value["from"].rpartition("/")[2], 0)
        return None if began is None else {"began": began.mtime, "step": step}

    def went_on_from(self, kill: Row) -> int | None:
        """The step at which the first group after a kill began; None while there is none."""
        found = self.attempt()
        return found["step"] if found is not None and found["began"] > kill["killed"] else None

    def kill_something(self, kinds: tuple[str, ...]) -> Row | None:
        """Kill one thing of a random kind among those that are there now."""
        for kind in self.rng.permutation(kinds):
            before, step = self.progress(), self.resume_step()
            if kind == "node" and not self.nodes.workers:
                continue
            if kind == "node":
                self.lost = time.monotonic()
                self.nodes.remove(self.nodes.workers[int(self.rng.integers(len(self.nodes.workers)))])
            elif kind == "connections":
                if not self.store.relay.break_all():
                    continue
            else:
                found = list(self.nodes.processes(PROCESSES[kind]))
                if not found:
                    continue
                found[int(self.rng.integers(len(found)))].kill()
            found = {"kind": str(kind), "resume_step": step, "went_on_from": None, "recovered_after": None}
            return found | {"at": time.monotonic(), "killed": datetime.datetime.now(datetime.UTC), "before": before}
        return None

    def has_recovered(self, kill: Row) -> bool:
        """Whether new work is finished, and the training that was ended has begun again or is over."""
        if kill["went_on_from"] is None:
            kill["went_on_from"] = self.went_on_from(kill)
        ended = kill["kind"] in ENDS_TRAINING and kill["resume_step"] > 0
        if ended and kill["went_on_from"] is None and self.resume_step():
            return False
        if not self.progress() - kill["before"]:
            return False
        kill["recovered_after"] = time.monotonic() - kill["at"]
        return True

    def run(self, kills: int, every: float) -> None:
        """Run to the end, with so many kills at most; after each there is progress before the next."""
        job = self.submit()
        begun, wait = time.monotonic(), self.rng.exponential(every)
        pending: Row | None = None
        while True:
            time.sleep(0.5)
            code = job.poll()
            if code == 0:
                break
            if code is not None:
                job = self.submit_again()
            if len(self.nodes.workers) < 2 and time.monotonic() - self.lost > 5:
                self.nodes.add()
            if pending is not None:
                if self.has_recovered(pending):
                    self.kills.append(pending)
                    pending, begun, wait = None, time.monotonic(), self.rng.exponential(every)
            elif len(self.kills) < kills and time.monotonic() - begun > wait:
                pending = self.kill_something(KINDS)
                if pending is not None:
                    print(f"  killed: {pending['kind']}", flush=True)
        if pending is not None:
            self.kills.append(pending | {"recovered_after": time.monotonic() - pending["at"]})

    def last_line(self) -> str:
        """What the job said last, for a failure."""
        text = self.log.read_bytes()[self._log_length :].decode("utf-8", "replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        said = [line for line in lines if line.startswith(("s2l:", "Error", "error"))]
        return (said or lines or [""])[-1][:300]


def check(nodes: LocalNodes, folder: Path, run_dir: str) -> Row:
    """What is missing, doubled or other than without disturbance, from the same proxy."""
    other, log = f"{run_dir}-undisturbed", folder / "undisturbed.log"
    begun = time.monotonic()
    for words in (["--until", "proxy", "--reuse", run_dir], ["--until", "selection"]):
        job = nodes.submit(["s2l", "run", "chaos.yaml", "--run-dir", other, *words], folder / "job", log)
        assert job.wait() == 0, f"the undisturbed run failed: {log}"
    seconds = time.monotonic() - begun
    made = {
        stage: Artifact.read(Storage(run_dir).child(stage)) for stage in ("examples", "trajectories", "clustering", "selection")
    }
    again = {stage: Artifact.read(Storage(other).child(stage)) for stage in made}
    pool = [i for part in made["examples"].parts() for i in made["examples"].read_table(part)["example_id"].to_pylist()]
    tables = [made["trajectories"].read_table(part) for part in made["trajectories"].parts()]
    scored = [i for table in tables for i in table["example_id"].to_pylist()]
    finite = all(np.isfinite(table["losses"].combine_chunks().flatten().to_numpy()).all() for table in tables)
    files = {stage: made[stage].manifest["files"] for stage in ("trajectories", "clustering", "selection")}
    different = [
        f"{stage}/{path}"
        for stage, records in files.items()
        for path in records.keys() | again[stage].manifest["files"].keys()
        if records.get(path) != again[stage].manifest["files"].get(path)
    ]
    return {
        "missing": len(set(pool) - set(scored)) + (0 if finite else 1),
        "doubled": len(scored) - len(set(scored)),
        "different": different,
        "examples": len(pool),
        "undisturbed_seconds": seconds,
    }


@contextmanager
def three_nodes(folder: Path, secret: str = "test") -> Iterator[tuple[LocalNodes, S3Server]]:  # noqa: S107
    """A head and two workers over an S3 server with that secret key; this process sees the same storage."""
    (folder / "job").mkdir(parents=True, exist_ok=True)
    (folder / "job" / "chaos.yaml").write_text(CONFIG, "utf-8")
    with S3Server(secret) as store, LocalNodes(store.environment, folder) as nodes:
        os.environ.update(store.environment)
        for _ in range(2):
            nodes.add()
        yield nodes, store


def disturb(nodes: LocalNodes, store: S3Server, folder: Path, name: str, kills: int, every: float, seed: int) -> Row:
    """One run with so many kills at most, and its check."""
    begun = time.monotonic()
    run = Disturbed(nodes, store, folder, f"s3://{store.bucket}/{name}", np.random.default_rng(seed))
    run.run(kills, every)
    seconds = time.monotonic() - begun
    log = run.log.read_text("utf-8", "replace")
    resumed = [int(step) for step in re.findall(r"goes on from step (\d+)", log)]
    facts = {"seconds": seconds, "submitted": run.submitted, "failures": run.failures, "resumed_from_steps": resumed}
    went_on = [(kill["went_on_from"], kill["resume_step"]) for kill in run.kills if kill["went_on_from"] is not None]
    facts["went_back"] = sum(step < registered for step, registered in went_on)
    told = [{name: value for name, value in kill.items() if name not in ("before", "at", "killed")} for kill in run.kills]
    return facts | {"kills": told} | check(nodes, folder, run.run_dir)


def status(run_dir: str) -> str:
    """What `s2l status` says of a run, from here."""
    command = [str(Path(sys.executable).with_name("s2l")), "status", run_dir]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def summary(rows: list[Row]) -> Row:
    """Over all runs: kills by kind, median and longest time to new progress, and what was lost."""
    times = defaultdict(list)
    for kill in (kill for row in rows for kill in row["kills"]):
        times[kill["kind"]].append(kill["recovered_after"])
    return {
        "kills": sum(map(len, times.values())),
        "recovered_after": {
            kind: {"kills": len(t), "median": round(statistics.median(t), 1), "longest": round(max(t), 1)}
            for kind, t in times.items()
        },
        "submitted": sum(row["submitted"] for row in rows),
        "went_back": sum(row["went_back"] for row in rows),
        "missing": sum(row["missing"] for row in rows),
        "doubled": sum(row["doubled"] for row in rows),
        "different": [name for row in rows for name in row["different"]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--per-run", type=int, default=20, help="kills in one run at most")
    parser.add_argument("--every", type=float, default=10.0, help="seconds between progress and the next kill, on average")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", required=True, type=Path, help="a folder for logs")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    with three_nodes(arguments.work) as (nodes, store):
        while (left := arguments.kills - sum(len(row["kills"]) for row in rows)) > 0:
            name = f"run-{len(rows)}"
            row = disturb(
                nodes, store, arguments.work, name, min(left, arguments.per_run), arguments.every, arguments.seed + len(rows)
            )
            rows.append(row)
            with RESULTS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row | {"seed": arguments.seed + len(rows) - 1} | provenance()) + "\n")
            print(json.dumps(row), flush=True)
    result = summary(rows)
    print(json.dumps(result, indent=1))
    sys.exit(bool(result["went_back"] or result["missing"] or result["doubled"] or result["different"]))


if __name__ == "__main__":
    main()
