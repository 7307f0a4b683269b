"""Tier (b): what needs Ray, DeepSpeed or faiss. Pieces 5 (`run`, `tests`) and 6 (`faiss`).

`run`: the quickstart, unchanged but for `machines`. `tests`: the tests that need a GPU. `faiss`: seconds per k-means iteration
of faiss-gpu and of torch on the same rows, from 10M x 12 as far as the memory goes.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from measuring import ROOT, Cell, Kit, require, seconds_of, use_package

use_package()
ITERATIONS = 3
STAGES = ("proxy", "trajectories", "target", "evaluation")


def need(*modules: str) -> None:
    """SystemExit where a module is missing: nothing was run."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(f"not run: {', '.join(missing)} is not installed. Send the wheels: kit.py pack --tier b, then join.")


def quickstart(kit: Kit) -> dict[str, Any]:
    """A whole run; the same command again resumes it, so an interrupted cell costs little."""
    need("ray", "faiss", "deepspeed")
    run_dir = kit.results / "quickstart-run"
    command = [sys.executable, "-c", "from s2l_ray.cli import main; main()", "run", str(ROOT / "configs" / "quickstart.yaml")]
    command += ["--run-dir", str(run_dir)]
    on_gpu = (
        []
        if kit.rehearse
        else [f"machines.{stage}.{name}=1" for stage in STAGES for name in ("gpus_per_worker", "num_workers")]
    )
    command += [word for override in on_gpu for word in ("--set", override)]
    command += ["--until", "examples"] if kit.rehearse else []
    begun = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    require(done.returncode == 0, f"s2l run ended with {done.returncode}: {done.stderr[-400:]}")
    metrics = run_dir / "evaluation" / "metrics.json"
    found = json.loads(metrics.read_text(encoding="utf-8")) if metrics.exists() else {}
    return {"seconds": time.perf_counter() - begun, "metrics": found}


def gpu_tests() -> dict[str, Any]:
    """The tests marked `gpu`; on a CPU all of them are skipped."""
    need("pytest", "ray", "deepspeed")
    report = tempfile.NamedTemporaryFile(suffix=".xml")  # noqa: SIM115 - closed with the process
    command = [sys.executable, "-m", "pytest", "-m", "gpu", f"--junit-xml={report.name}", "tests/test_gpu.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    require(done.returncode == 0, done.stdout[-800:])
    return {"said": done.stdout.strip().splitlines()[-1]}


def by_faiss(kit: Kit, rows: int) -> dict[str, Any]:
    """Seconds of an iteration by faiss-gpu and by torch, and that both find the same groups."""
    need("faiss")
    import faiss
    import torch
    from piece_kmeans import GROUPS, POINTS, falls

    from s2l_ray.clustering.columns import MemoryColumn
    from s2l_ray.clustering.gpu_rows import GpuRows

    if not kit.rehearse and 4.0 * POINTS * rows * 1.6 > torch.cuda.get_device_properties(kit.device).total_memory:
        return {"rows": rows, "said": "more than this GPU's memory"}
    features = falls(rows)
    start = features[:GROUPS].copy()
    held = GpuRows(MemoryColumn(features), POINTS, [str(kit.device)])
    by_torch = seconds_of(lambda: held.assign(start, "nearest"), kit.device, ITERATIONS)
    index: Any = faiss.IndexFlatL2(POINTS)
    if hasattr(faiss, "index_cpu_to_gpu") and not kit.rehearse:
        index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)
    index.add(start)
    by_index = seconds_of(lambda: index.search(features, 1), kit.device, ITERATIONS)
    labels = np.concatenate([labels_M for labels_M, _ in _labelled(held, start)])
    same = float((index.search(features, 1)[1][:, 0] == labels).mean())
    require(same > 0.999, f"only {same:.4f} of the rows have the same nearest centroid")
    return {"rows": rows, "torch_seconds": by_torch, "faiss_seconds": by_index, "same_labels": same}


def _labelled(held: Any, start: np.ndarray) -> Any:
    held.assign(start, "nearest")
    held.finish(start)
    return held.results()


CELLS: dict[str, Callable[[Kit], dict[str, Cell]]] = {
    "run": lambda kit: {"quickstart": partial(quickstart, kit)},
    "tests": lambda _: {"tests": gpu_tests},
    "faiss": lambda kit: {f"{rows:,} rows": partial(by_faiss, kit, rows) for rows in kit.size((10**7, 10**8, 10**9), (5_000,))},
}
