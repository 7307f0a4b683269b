"""What is decided by a hash of the content: an example's id, its exact copies, and on which side of the split it is."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

DIGEST_BYTES = 10  # 20 hexadecimal digits: two of ten million contents share a digest in one of 10**10 corpora
POOL, HELD_OUT, VALIDATION = "pool", "held_out", "validation"

_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), default=str)
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_ASCII_NUMBER = re.compile(r"[0-9]+(?:[.,][0-9]+)*")  # the same where there are no other digits, in two thirds of the time


def digest_of(text: bytes) -> bytes:
    """Hash of a text in UTF-8, DIGEST_BYTES long."""
    return hashlib.blake2b(text, digest_size=DIGEST_BYTES).digest()


def canonical_json(value: Any) -> str:
    """JSON that is the same for equal values."""
    return _CANONICAL.encode(value)


def masked(prompt: str) -> str:
    """A prompt without what near-copies differ in: numbers, case, white space."""
    number = _ASCII_NUMBER if prompt.isascii() else _NUMBER
    return " ".join(number.sub("#", prompt).casefold().split())


def prompt_hash(prompt: str) -> int:
    """64 bits; the same for prompts that differ only in numbers, case or white space. All that a split goes by."""
    return int.from_bytes(hashlib.blake2b(masked(prompt).encode(), digest_size=8).digest())


def mixed(numbers_N: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Other numbers for numbers, one to one, every bit of which depends on all: the finalizer of SplitMix64 (Steele et al.,
    2014)."""
    numbers_N = (numbers_N ^ (numbers_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers_N = (numbers_N ^ (numbers_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(numbers_N ^ (numbers_N >> np.uint64(31)))


def splits_of(hashes_N: NDArray[np.uint64], held_out_fraction: float, validation_fraction: float = 0.0) -> pa.Array:
    """`pool`, `held_out` or `validation` for the `prompt_hash` of each row, shape (N,).

    A hash is a number in [0, 1]. Below the first fraction it is held out, so a larger fraction holds out the same prompts and
    more; the second is taken from the other end, so that it changes no held-out row. 0 takes none.
    """
    numbers_N = hashes_N / 2.0**64
    is_validation_N = (numbers_N >= 1 - validation_fraction) if validation_fraction else np.zeros(len(hashes_N), bool)
    codes_N = np.where(numbers_N < held_out_fraction, 1, np.where(is_validation_N, 2, 0))
    return pa.array([POOL, HELD_OUT, VALIDATION]).take(pa.array(codes_N))
