"""What tests need to build a stage alone."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from s2l_ray.config import ExamplesConfig, RunConfig
from s2l_ray.examples.hashes import splits_of
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


def _mixed(number: int) -> int:
    """SplitMix64's finalizer, number by number."""
    number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    number = (number ^ number >> 27) * 0x94D049BB133111EB % 2**64
    return number ^ number >> 31


def literal_priority(example_id: str, seed: int | str) -> int:
    """The definition of a priority, word by word."""
    data = example_id.encode()
    folded = len(data)
    for start in range(0, len(data), 8):
        word = int.from_bytes(data[start : start + 8], "little")
        folded = _mixed(((folded ^ word) + 0x9E3779B97F4A7C15) % 2**64)
    key = hashlib.blake2b(str(seed).encode(), digest_size=16).digest()
    first, second = int.from_bytes(key[:8], "little"), int.from_bytes(key[8:], "little")
    return _mixed(_mixed(folded ^ first) ^ second)


def split_of(hashed: int, held_out: float, validation: float = 0.0) -> str:
    """The split of one row, by the hash of its prompt."""
    [split] = splits_of(np.array([hashed], np.uint64), held_out, validation).to_pylist()
    return str(split)


def literal_split(hashed: int, held_out: float, validation: float = 0.0) -> str:
    """The definition of a split, word by word."""
    number = hashed / 2**64
    if number < held_out:
        return "held_out"
    return "validation" if validation and number >= 1 - validation else "pool"
