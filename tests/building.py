"""What tests need to build a stage alone."""

from __future__ import annotations

from typing import Any

from s2l_ray.config import ExamplesConfig, RunConfig
from s2l_ray.storage.artifacts import Artifact
from s2l_ray.storage.drafts import Draft
from s2l_ray.storage.stages import Context

CORPUS = ExamplesConfig(dataset="none.jsonl")
"""A corpus that is never read: what its rows may do is as the defaults have it."""


def context_of(draft: Draft, inputs: dict[str, Artifact] | None = None, **sections: Any) -> Context:
    """The context of a stage under a config of which only some sections matter."""
    rest = {
        "name": "alone",
        "examples": CORPUS,
        "proxy": {"model": "none"},
        "selection": {"budget": 1},
        "target": {"model": "none"},
    }
    return Context(RunConfig(**rest | sections), inputs or {}, draft, _no_overlap)


def _no_overlap(_: Context) -> Any:
    raise AssertionError("nothing runs beside this stage")
