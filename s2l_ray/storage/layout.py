"""What lies where in a run directory; no other file knows these names.

    RUN_DIR/
      run.json  STAGE/manifest.json  STAGE/...  report/index.html  .work/

`.work/` is scratch: locks, tokens, losses that are not joined yet, resume points. It is never read as a result.
"""

from __future__ import annotations

SCHEMA = "s2l_ray/1"
RUN = "run.json"
STAGE_NAMES = ("examples", "proxy", "trajectories", "clustering", "selection", "target", "evaluation", "report")
"""The flow. The last is derived from the others and may be rebuilt at any time."""

# In every stage's directory.
MANIFEST, BUILDING = "manifest.json", "building.json"

# In the directory of one stage.
TOKENIZER, CHECKPOINT = "tokenizer", "checkpoint.json"
CENTROIDS, FEATURE_CENTROIDS, RESTARTS = "centroids.npy", "feature_centroids.npy", "restarts.parquet"
SELECTED, RANDOM = "selected.parquet", "random.parquet"
METRICS, PREDICTIONS = "metrics.json", "predictions.jsonl"
PAGE = "index.html"

# Scratch of the run, and below it what several stages use.
WORK = ".work"
TOKENS, LOSSES = "tokens", "losses"
LOCKS = f"{WORK}/locks"
RECORDING = f"{WORK}/recording"


def part_name(part: int) -> str:
    """The file of a part of a stage's rows."""
    return f"part-{part:05d}.parquet"


def step_folder(step: int) -> str:
    """The directory of a checkpoint of the proxy."""
    return f"step-{step:06d}"
