"""Memory of a proxy's training on many rows by two workers, and what a worker's start takes: tokens mapped and held.

    python benchmarks/node_tokens.py examples DATA_DIR WORK_DIR --rows 1000000
    python benchmarks/node_tokens.py train WORK_DIR --rows 1000000 --seconds 120
    python benchmarks/node_tokens.py start WORK_DIR --rows 1000000

DATA_DIR holds JSON Lines files of `source, instruction, input, output`; they are repeated with other numbers until there are
enough rows. `train` runs `s2l run --until proxy`, one epoch of a proxy of the quickstart's shape by two workers, and interrupts
it `--seconds` after its first step: memory is what counts, and an epoch takes long. `start` starts the same worker twice as
training does, with the tokens of the node's file and with tokens of its own, and looks at both while both are there.
Memory is proportional set size: a page that several processes share counts once. Lines go to `results/node_tokens.jsonl`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from s2l_ray.config import RunConfig, load_config
from s2l_ray.storage.artifacts import Artifact
from s2l_ray.storage.layout import TOKENIZER, WORK
from s2l_ray.storage.places import Storage
from s2l_ray.storage.provenance import provenance

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "node_tokens.jsonl"
CONFIG = HERE.parent / "configs" / "jsonl-cpu.yaml"
SHAPE = "{scratch: {architecture: gpt_neox, layers: 2, hidden: 16, heads: 2, max_positions: 512, tie_embeddings: true}}"
SETTINGS = (
    f"proxy.model={SHAPE}",
    "proxy.tokenizer={train: bpe, vocab_size: 768}",
    "proxy.learning_rate=5.0e-3",
    "proxy.epochs=1",
    "machines.proxy={num_workers: 2, cpus_per_worker: 1, gpus_per_worker: 0, device_batch_size: 16}",
)
SECONDS_BETWEEN_LOOKS = 0.5
# What Ray calls the process of a training's worker.
TRAINING_WORKER = "RayTrainWorker"


def settings(work: Path, rows: int) -> list[str]:
    """The values of `--set`."""
    return [f"examples.dataset={work}/{rows}.jsonl", *SETTINGS]


def run_command(work: Path, rows: int, until: str) -> list[str]:
    """The command of the run of this many rows."""
    words = [word for value in settings(work, rows) for word in ("--set", value)]
    begin = [sys.executable, "-c", "from s2l_ray.cli import main; main()", "run", str(CONFIG)]
    return [*begin, "--run-dir", str(work / f"run-{rows}"), "--until", until, *words]


def repeated(data: Path, rows: int) -> Iterator[str]:
    """Lines of JSON: the files' rows again and again, each time with other digits in prompt and response alike."""
    found = [json.loads(line) for path in sorted(data.glob("*.jsonl")) for line in path.open(encoding="utf-8")]
    for number in range(rows):
        row, shift = found[number % len(found)], number // len(found)
        digits = str.maketrans("123456789", "".join(str((digit + shift) % 9 + 1) for digit in range(9)))
        # The prompt's end makes it no copy where it has no digits.
        texts = {name: row[name].translate(digits) for name in ("instruction", "input", "output")}
        texts["instruction"] += f" ({number})"
        yield json.dumps({"source": row["source"], **texts}) + "\n"


def proportional(pid: int) -> dict[str, float]:
    """Memory of a process in MiB: all, and of it what is in no file; empty where the process is gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()[1:]
    except OSError:
        return {}
    found = {line.split()[0]: int(line.split()[1]) / 1024 for line in lines}
    return {"pss": found["Pss:"], "anonymous": found["Pss_Anon:"]} if "Pss:" in found else {}


def look(process: psutil.Process) -> dict[str, Any]:
    """Memory in MiB: of the training's workers each, and of all that the command has started, itself included."""
    everyone, workers = 0.0, []
    for one in [process, *process.children(recursive=True)]:
        memory = proportional(one.pid)
        everyone += memory.get("pss", 0.0)
        try:
            if memory and TRAINING_WORKER in " ".join(one.cmdline()):
                workers.append(memory)
        except psutil.Error:
            continue
    total = sum(memory["pss"] for memory in workers)
    return {"everyone": everyone, "workers_together": total, "workers": workers}


def train(work: Path, rows: int, seconds: float) -> dict[str, Any]:
    """Train until so many seconds after the first step: peaks before and from then on, and the last look."""
    log = work / f"train-{rows}.log"
    with log.open("wb") as file:
        started = subprocess.Popen(run_command(work, rows, "proxy"), stdout=file, stderr=subprocess.STDOUT)
    process, begun, first, last = psutil.Process(started.pid), time.monotonic(), 0.0, dict[str, Any]()
    peaks = {name: {"everyone": 0.0, "workers_together": 0.0} for name in ("before_the_first_step", "training")}
    while started.poll() is None and (not first or time.monotonic() - first < seconds):
        time.sleep(SECONDS_BETWEEN_LOOKS)
        if not first and re.search(r"step [1-9]", log.read_text(encoding="utf-8", errors="replace")):
            first = time.monotonic()
        found = look(process)
        peak = peaks["training" if first else "before_the_first_step"]
        peak |= {name: max(size, found[name]) for name, size in peak.items()}
        last = found if found["workers"] else last
    started.send_signal(signal.SIGINT)
    started.wait()
    if not first:
        raise SystemExit(f"no step was taken: see {log}")
    steps = [int(step.replace(",", "")) for step in re.findall(r"step ([\d,]+)/", log.read_text(encoding="utf-8"))]
    return {"seconds_to_the_first_step": first - begun, "steps": max(steps), "peaks_mib": peaks, "at_the_end_mib": last}


def worker(work: Path, rows: int, how: str) -> None:
    """A worker's start, as far as its tokens go: seconds, and memory before and after all rows were read; then it waits."""
    import numpy as np

    from s2l_ray.training.batches import BatchPlan, data_order, length_balanced_order, num_steps
    from s2l_ray.training.fine_tuning import TrainingRows
    from s2l_ray.training.token_pools import PoolTokens
    from s2l_ray.training.training_run import TrainingRun

    config, parts = run_parts(work, rows)
    plan = BatchPlan.of(config.proxy.global_batch_size, 2, 16)
    np.concatenate([parts.read(parts.examples.parts()[0]).tokens.lengths])  # imports what reading takes
    print("ready", flush=True)
    sys.stdin.readline()
    begun = time.perf_counter()
    pool = parts.pool(check=how == "first") if how != "held" else PoolTokens.join(map(parts.read, parts.examples.parts()))
    steps = num_steps(len(pool.tokens), config.proxy.epochs, plan.global_batch)
    if isinstance(pool, PoolTokens):
        order = data_order(pool.row_ids, steps, plan.global_batch, config.proxy.seed)
        data = TrainingRows(pool.tokens, length_balanced_order(order, pool.tokens.lengths, plan))
    else:
        order = pool.order(steps, plan.global_batch, config.proxy.seed)
        data = TrainingRows.of(TrainingRun("proxy", config.proxy, order, pool.tokens, (), steps), plan)
    first = data[0]
    seconds = time.perf_counter() - begun
    total = sum(int(row[0].sum()) for row in map(data.__getitem__, range(len(data))) if row is not None)
    found = {"seconds": seconds, "tokens": int(pool.tokens.lengths.sum()), "sum": total, "first_length": len(first[0])}
    print(json.dumps(found), flush=True)
    sys.stdin.readline()


def run_parts(work: Path, rows: int) -> tuple[RunConfig, Any]:
    """The config of a run, and its pool's tokens."""
    from s2l_ray.training.token_parts import TokenParts
    from s2l_ray.training.token_rows import RowLimit

    config, run = load_config(CONFIG, settings(work, rows)), Storage(str(work / f"run-{rows}"))
    examples, tokenizer = Artifact.read(run.child("examples")), run.child("proxy").child(TOKENIZER)
    return config, TokenParts.of(examples, tokenizer, RowLimit.of(config.proxy), run.child(WORK), config.examples)


def start(work: Path, rows: int) -> list[dict[str, Any]]:
    """Two workers, one after the other, in each of the ways; what each adds to the memory of both together."""
    _, parts = run_parts(work, rows)
    file_mib = (parts.on_node.folder / f"{parts.on_node.group}-tokens").stat().st_size / 2**20
    results = []
    for ways in (("first", "mapped"), ("held", "held")):
        with tempfile.TemporaryDirectory(dir=work) as empty:
            environment = dict(os.environ) | ({"TMPDIR": empty} if ways[0] == "held" else {})
            results.append({"ways": ways, **start_two(work, rows, ways, environment)})
    held, mapped = results[1]["workers"][0], results[0]["workers"][0]
    assert (held["tokens"], held["sum"]) == (mapped["tokens"], mapped["sum"]), "the same rows"
    for result in results:
        result["of_the_file"] = [size / file_mib for size in result["adds_mib"]]
    return [{"file_mib": file_mib, "bytes_a_token": file_mib * 2**20 / held["tokens"], "pairs": results}]


def start_two(work: Path, rows: int, ways: tuple[str, str], environment: dict[str, str]) -> dict[str, Any]:
    """Start two workers, then let each read in turn."""
    command = [sys.executable, __file__, "worker", str(work), "--rows", str(rows), "--how"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    workers = [subprocess.Popen([*command, how], env=environment, text=True, **pipes) for how in ways]  # type: ignore[call-overload]
    try:
        for one in workers:
            assert one.stdout.readline() == "ready\n"
        totals, found = [together(workers)], []
        for one in workers:
            one.stdin.write("\n")
            one.stdin.flush()
            found.append(json.loads(one.stdout.readline()))
            totals.append(together(workers))
    finally:
        for one in workers:
            one.kill()
            one.wait()
    return {"workers": found, "adds_mib": [after - before for before, after in itertools.pairwise(totals)]}


def together(workers: list[Any]) -> float:
    """Memory of processes in MiB."""
    return sum(proportional(one.pid)["pss"] for one in workers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=["examples", "train", "start", "worker"])
    parser.add_argument("folders", type=Path, nargs="+", help="DATA_DIR (for `examples`) and WORK_DIR")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--how", choices=["first", "mapped", "held"])
    arguments = parser.parse_args()
    work, rows = arguments.folders[-1].absolute(), arguments.rows
    if arguments.what == "worker":
        worker(work, rows, arguments.how)
        return
    if arguments.what == "examples":
        work.mkdir(parents=True, exist_ok=True)
        with (work / f"{rows}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(repeated(arguments.folders[0], rows))
        subprocess.run(run_command(work, rows, "examples"), check=True)
        return
    result = train(work, rows, arguments.seconds) if arguments.what == "train" else start(work, rows)[0]
    line = {"what": arguments.what, "rows": rows, **result, "cores": os.cpu_count(), "provenance": provenance()}
    print(json.dumps(line, indent=1))
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
