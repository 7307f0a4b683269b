"""Runs to export: a selection of given examples, made by the stage's own code, and nothing else of a run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from s2l_ray.clustering.stage import publish_clustering
from s2l_ray.config import ClusteringConfig, GroupingConfig, SelectionConfig
from s2l_ray.examples.reading import fetch_rows
from s2l_ray.selection.stage import publish_selection
from s2l_ray.storage.artifacts import Artifact, Key
from s2l_ray.storage.drafts import Draft
from s2l_ray.storage.places import Storage
from s2l_ray.trajectories.files import open_trajectories

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def answer(text: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text} | more


def result(text: str) -> dict[str, Any]:
    return {"role": "tool", "content": text}


def made_run(
    folder: Path,
    talks: dict[str, Any],
    *,
    texts: dict[str, str] | None = None,
    original: dict[str, Any] | pa.StructArray | None = None,
    tools: dict[str, Any] | None = None,
    corpus: str = "files:0123",
    num_parts: int = 2,
    **recipe: Any,
) -> Path:
    """A run directory whose selection has all `talks`: by id a conversation (a list of messages) or a pair of texts.

    `texts`: each row as it was written, for a corpus of JSON; `original`: the corpus's own columns for one that is not.
    """
    ids = sorted(talks)
    run = Storage(str(folder))
    rows = pa.table({"example_id": ids} | _columns(ids, talks, tools or {}))
    own = original if isinstance(original, pa.StructArray) else pa.table(original or {"key": ids}).to_struct_array()
    rows = rows.append_column(pa.field("original", own.type), own)
    if texts is not None:
        rows = rows.append_column("row_json", pa.array([texts[one] for one in ids]))
    draft = Draft.open(run, Key("examples", 1, {"corpus": corpus}, {}))
    size = -(-len(ids) // num_parts)
    for part in range(num_parts):
        draft.write_table(f"part-{part:05d}.parquet", rows[part * size : (part + 1) * size])
    examples = draft.publish({"rows": len(ids)})
    _select(run, examples, ids, recipe)
    return folder


def _columns(ids: list[str], talks: dict[str, Any], tools: dict[str, Any]) -> dict[str, Any]:
    pairs = [talks[one] if isinstance(talks[one], tuple) else ("shown", "only") for one in ids]
    columns: dict[str, Any] = {"prompt": [pair[0] for pair in pairs], "response": [pair[1] for pair in pairs]}
    if any(isinstance(talk, list) for talk in talks.values()):
        texts = [json.dumps(talks[one]) if isinstance(talks[one], list) else None for one in ids]
        columns["messages"] = pa.array(texts, pa.string())
        columns["tools"] = pa.array([json.dumps(tools[one]) if one in tools else None for one in ids], pa.string())
    return columns


def _select(run: Storage, examples: Artifact, ids: list[str], recipe: dict[str, Any]) -> None:
    losses = np.random.default_rng(0).gamma(2, 1, (len(ids), 3)).tolist()
    scratch = Path(run.path()) / "scratch"
    scratch.mkdir()
    pq.write_table(pa.table({"example_id": ids, "losses": losses}), scratch / "t.parquet")
    with ThreadPoolExecutor(2) as pool:
        store = open_trajectories(str(scratch / "t.parquet"), scratch / "store", pool, seed=0)
    grouping = ClusteringConfig(num_clusters=min(2, len(ids)))
    draft = Draft.open(run, Key("clustering", 1, grouping.model_dump(mode="json"), {}))
    groups = publish_clustering(grouping, GroupingConfig(), store, scratch, draft)
    config = SelectionConfig(**({"budget": len(ids)} | recipe))
    draft = Draft.open(run, Key("selection", 1, config.model_dump(mode="json"), {"examples": examples.identity}))

    def fetch(wanted: pa.Array, _numbers: Any) -> Iterator[pa.Table]:
        return fetch_rows(examples, wanted)

    publish_selection(config, store, groups, fetch, scratch, draft, origin={"examples": examples})


def lines(path: Path) -> list[Any]:
    """The rows of a JSON Lines file, by a strict reader."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text(encoding="utf-8").splitlines()]
