"""What near-copies differ in - numbers, case, white space - left out of many prompts at once, and the hash of what is left.

`hashes.masked` says what a masked prompt is. Here the bytes of many prompts are masked together, in vectors; a prompt that is
not ASCII goes by the definition, on its own.
"""

from __future__ import annotations

import string

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from s2l_ray.examples.hashes import prompt_hash
from s2l_ray.examples.texts import bytes_of, digests_between

# So many bytes, with what is computed of them, stay in the processor's cache.
BLOCK_BYTES = 2**17
_WHITE = bytes([*range(9, 14), *range(28, 32)])  # ASCII's white space, but for the space itself
_SPACE, _DIGIT, _COMMA, _POINT = b" 0,."
# Capitals as small letters, all white space as spaces, all digits as zeros.
_LIKE = bytes.maketrans(
    string.ascii_uppercase.encode() + _WHITE + string.digits.encode(),
    string.ascii_lowercase.encode() + b" " * len(_WHITE) + b"0" * 10,
)
_NUMBERS = bytes.maketrans(b"0", b"#")


def prompt_hashes(prompts: pa.Array) -> NDArray[np.uint64]:
    """`hashes.prompt_hash` of each prompt, shape (N,)."""
    data, offsets = bytes_of(prompts)
    hashes_N = np.empty(len(prompts), np.uint64)
    start = 0
    while start < len(prompts):
        stop = max(start + 1, int(np.searchsorted(offsets, offsets[start] + BLOCK_BYTES, side="right")) - 1)
        text, begins, ends = _masked(data[offsets[start] : offsets[stop]].tobytes(), offsets[start : stop + 1] - offsets[start])
        hashes_N[start:stop] = np.frombuffer(digests_between(text, begins, ends, 8), ">u8")
        start = stop
    others = np.unique(np.searchsorted(offsets, np.flatnonzero(data >= 128), side="right") - 1)
    hashes_N[others] = [prompt_hash(prompt) for prompt in prompts.take(pa.array(others)).to_pylist()]
    return hashes_N


def _masked(block: bytes, offsets: NDArray[np.int64]) -> tuple[bytes, NDArray[np.int64], NDArray[np.int64]]:
    """The masked prompts in a block of them: text, and where each of them begins and ends in it.

    `offsets`, shape (M + 1,): where each begins in the block, and the last ends.
    """
    text = np.frombuffer(block.translate(_LIKE), np.uint8)
    is_space = text == _SPACE
    in_number = _in_numbers(text, offsets)
    # Of a number and of a run of spaces only the first byte is kept; of one that begins a prompt, none of the spaces.
    is_dropped = np.zeros(len(text), bool)
    is_dropped[1:] = (in_number[1:] & in_number[:-1]) | (is_space[1:] & is_space[:-1])
    starts = offsets[:-1][np.diff(offsets) > 0]
    is_dropped[starts] = is_space[starts]
    kept = text[~is_dropped]
    kept_offsets = offsets - np.searchsorted(np.flatnonzero(is_dropped), offsets)
    begins, ends = kept_offsets[:-1], kept_offsets[1:].copy()
    some = np.flatnonzero(ends > begins)
    ends[some] -= kept[ends[some] - 1] == _SPACE
    return kept.tobytes().translate(_NUMBERS), begins, ends


def _in_numbers(text: NDArray[np.uint8], offsets: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether each byte belongs to a number: digits, and each comma or point between two digits of one prompt."""
    is_digit: NDArray[np.bool_] = text == _DIGIT
    marks = np.flatnonzero((text == _COMMA) | (text == _POINT))
    marks = marks[(marks > 0) & (marks < len(text) - 1)]
    is_start = np.zeros(len(text) + 1, bool)
    is_start[offsets] = True
    marks = marks[is_digit[marks - 1] & is_digit[marks + 1] & ~is_start[marks] & ~is_start[marks + 1]]
    is_digit[marks] = True
    return is_digit
