"""What is decided by a hash of the content: an example's id, its exact copies, and on which side of the split it is."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

DIGEST_BYTES = 10  # 20 hexadecimal digits: two of ten million contents share a digest in one of 10**10 corpora
POOL, HELD_OUT = "pool", "held_out"

_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), default=str)
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")


def digest_of(text: str) -> bytes:
    """Hash of a text, DIGEST_BYTES long."""
    return hashlib.blake2b(text.encode(), digest_size=DIGEST_BYTES).digest()


def canonical_json(value: Any) -> str:
    """JSON that is the same for equal values."""
    return _CANONICAL.encode(value)


def masked(prompt: str) -> str:
    """A prompt without what near-copies differ in: numbers, case, white space."""
    return " ".join(_NUMBER.sub("#", prompt).casefold().split())


def split_of(prompt: str, held_out_fraction: float) -> str:
    """`pool` or `held_out`; the same for prompts that differ only in numbers, case or white space.

    A hash of the masked prompt is a number in [0, 1). Below the fraction it is held out, so a larger fraction holds out the
    same prompts and more; 0 holds out none.
    """
    number = int.from_bytes(hashlib.blake2b(masked(prompt).encode(), digest_size=8).digest()) / 2**64
    return HELD_OUT if number < held_out_fraction else POOL
