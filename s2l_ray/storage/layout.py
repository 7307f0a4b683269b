"""What lies where in a run directory; no other file knows these names.

    RUN_DIR/
      run.json  STAGE/manifest.json  STAGE/...  report/index.html  trackers/  .work/

`.work/` is scratch: locks, tokens, losses that are not joined yet, resume points. It is never read as a result.
"""

from __future__ import annotations

import re

from s2l_ray.errors import ConfigError

SCHEMA = "s2l_ray/1"
RUN = "run.json"
STAGE_NAMES = ("examples", "proxy", "trajectories", "clustering", "selection", "target", "evaluation", "report")
"""The flow. The last is derived from the others and may be rebuilt at any time."""

# In every stage's directory.
MANIFEST, BUILDING = "manifest.json", "building.json"

# In the directory of one stage.
VALIDATION_ROWS = "validation.parquet"
"""Of `trajectories`: the embeddings of the examples of the validation split."""
PARTS, ASSIGNMENTS = "part-", "assignments-"  # and five digits
TOKENIZER, CHECKPOINT = "tokenizer", "checkpoint.json"
CENTROIDS, FEATURE_CENTROIDS, RESTARTS = "centroids.npy", "feature_centroids.npy", "restarts.parquet"
SELECTED, RANDOM, CARD = "selected.parquet", "random.parquet", "README.md"
MODEL_FOLDERS, MODEL_RECORD = {"selected": "model", "random": "random_model"}, "model.json"
"""Subset -> the folder of the target trained on it, in training order; the file there that is written last."""
METRICS, PREDICTIONS, ROW_LOSSES = "metrics.json", "predictions.jsonl", "losses.parquet"
PAGE = "index.html"

# Beside the stages: what trackers keep in files. No stage reads it.
TRACKERS = "trackers"

# Beside the stages, too: the cells of a comparison, each in a directory of its own, trajectories of other seeds, the table.
COMPARE, SEED_RUNS = "compare", "seeds"
CELL_LOSSES, CELL_SUBSET = "losses.parquet", "subset.parquet"
TABLE, TABLE_MARKDOWN, PREMISE = "table.json", "table.md", "premise.json"

# Scratch of the run, and below it what several stages use.
WORK, TAG = ".work", "CACHEDIR.TAG"
TOKENS, LOSSES = "tokens", "losses"
LOCK, LOCKS = f"{WORK}/lock", f"{WORK}/locks"
RECORDING = f"{WORK}/recording"
DROPPED = f"{RECORDING}/dropped.json"
"""Counts of the examples that were never recorded, by reason."""
CORPUS_HASHES = f"{WORK}/corpus_hashes.json"
SPILLED = "scratch"
"""What does not fit into memory."""

# In the scratch directory of a stage that trains.
ATTEMPTS, TRAINING_RUN = "attempts.json", "ray"


def names_until(until: str | None) -> tuple[str, ...]:
    """The stages up to one of them, that one included; all for None. Raises ConfigError for a name that is none of theirs."""
    if until is not None and until not in STAGE_NAMES:
        raise ConfigError(f"--until {until}: no such stage. Stages: {', '.join(STAGE_NAMES)}.")
    return STAGE_NAMES if until is None else STAGE_NAMES[: STAGE_NAMES.index(until) + 1]


def part_name(part: int) -> str:
    """The file of a part of a stage's rows."""
    return f"{PARTS}{part:05d}.parquet"


def assignments_name(part: int) -> str:
    """The file of a part of the groups."""
    return f"{ASSIGNMENTS}{part:05d}.parquet"


def further_subset(budget: str) -> str:
    """The file of the subset of a further budget, which is given in letters and digits."""
    return f"selected-{budget}.parquet"


def table_of(comparison: str, *, markdown: bool = False) -> str:
    """The file of one comparison's table, which stays where another one's is the latest."""
    return f"table-{comparison}.{'md' if markdown else 'json'}"


def as_written(subset: str) -> str:
    """The file of the same rows as a subset's Parquet file, each as the text that the corpus has for it."""
    return f"{subset.removesuffix('.parquet')}.jsonl"


def step_folder(step: int) -> str:
    """The directory of a checkpoint of the proxy."""
    return f"step-{step:06d}"


def folder_step(name: str) -> int | None:
    """The step of a checkpoint of the proxy by the name of its directory, None for another name."""
    found = re.fullmatch(r"step-(\d{6,})", name)
    return int(found[1]) if found else None


# Files of a folder that transformers and peft save. A name that is missing here is never removed.
_MODEL_FILE = (
    r"(config|generation_config|adapter_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab"
    r"|model\.safetensors\.index)\.json|(adapter_)?model(-\d{5}-of-\d{5})?\.safetensors|(vocab|merges)\.txt"
    r"|(tokenizer|spiece|sentencepiece\.bpe)\.model|chat_template\.jinja|README\.md"
)
_PART = r"\d{5,}\.parquet"
_STAGE_FILES = {
    "examples": PARTS + _PART,
    "proxy": rf"({TOKENIZER}|step-\d{{6,}})/({_MODEL_FILE}|{re.escape(CHECKPOINT)})",
    "trajectories": f"{PARTS}{_PART}|{re.escape(VALIDATION_ROWS)}",
    "clustering": "|".join([ASSIGNMENTS + _PART, *map(re.escape, (CENTROIDS, FEATURE_CENTROIDS, RESTARTS))]),
    "selection": rf"(selected(-(tokens-)?[0-9.e+-]+)?|random)\.(parquet|jsonl)|{re.escape(CARD)}",
    "target": rf"({'|'.join(MODEL_FOLDERS.values())})/({_MODEL_FILE}|{re.escape(MODEL_RECORD)})",
    "evaluation": "|".join(map(re.escape, (METRICS, PREDICTIONS, ROW_LOSSES))),
    "report": re.escape(PAGE),
    COMPARE: "|".join(map(re.escape, (CELL_LOSSES, CELL_SUBSET))),
}
_MARKS = f"{re.escape(MANIFEST)}|{re.escape(BUILDING)}"
_UNRENAMED = r"\.[0-9a-f]{8}\.tmp"
"""Ends the name of a file that is being written; a killed process leaves it."""


def is_stage_file(stage: str, name: str) -> bool:
    """Whether a stage writes files of this name into its directory."""
    files = _STAGE_FILES.get(stage.partition("/")[0], "(?!)")  # a cell of a comparison is one of many
    return re.fullmatch(rf"({files}|{_MARKS})({_UNRENAMED})?", name) is not None


def is_unrenamed(stage: str, name: str) -> bool:
    """Whether a killed attempt at a stage left this file half written."""
    return re.search(rf"{_UNRENAMED}$", name) is not None and is_stage_file(stage, name)
