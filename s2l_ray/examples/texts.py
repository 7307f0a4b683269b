"""Many texts at once, as Arrow holds them: their bytes, which of them are blank, and a hash of each."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from s2l_ray.examples.hashes import DIGEST_BYTES

# By the first byte of a text: whether what it begins with can be no white space. Of UTF-8's first bytes these four begin
# the white space beyond ASCII.
_BEGINS_A_WORD = np.array([byte > ord(" ") and byte not in {0xC2, 0xE1, 0xE2, 0xE3} for byte in range(256)])
_HEX = np.array([f"{byte:02x}".encode() for byte in range(256)], "S2").view("<u2")


def bytes_of(texts: pa.Array) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The bytes of all texts or binaries, one after the other, and where each begins and the last ends, shape (N + 1,)."""
    _, offsets, data = texts.buffers()
    offsets_N1 = np.frombuffer(offsets or b"\0" * 4, np.int32)[texts.offset : texts.offset + len(texts) + 1].astype(np.int64)
    begin, end = int(offsets_N1[0]), int(offsets_N1[-1])
    return np.frombuffer(data or b"", np.uint8)[begin:end], offsets_N1 - begin


def is_filled(texts: pa.Array) -> NDArray[np.bool_]:
    """Whether each text has more than white space, as `str.strip` sees it, shape (N,)."""
    data, offsets = bytes_of(texts)
    filled_N = np.zeros(len(texts), bool)
    some = np.flatnonzero(np.diff(offsets))
    filled_N[some] = _BEGINS_A_WORD[data[offsets[some]]]
    unsure = some[~filled_N[some]]
    filled_N[unsure] = [bool(text.strip()) for text in texts.take(pa.array(unsure)).to_pylist()]
    return filled_N


def digests_of(texts: pa.Array, num_bytes: int = DIGEST_BYTES) -> bytes:
    """`hashes.digest_of` of each text, one after the other."""
    data, offsets = bytes_of(texts)
    return digests_between(data, offsets[:-1], offsets[1:], num_bytes)


def digests_between(data: Any, begins_N: NDArray[np.int64], ends_N: NDArray[np.int64], num_bytes: int) -> bytes:
    """BLAKE2b of stretches of some bytes, each digest of this length, one after the other."""
    view, blake2b = memoryview(data), hashlib.blake2b
    stretches = zip(begins_N.tolist(), ends_N.tolist(), strict=True)
    return b"".join([blake2b(view[begin:end], digest_size=num_bytes).digest() for begin, end in stretches])


def hexadecimal(digests: bytes, num_bytes: int = DIGEST_BYTES) -> pa.Array:
    """Digests of this length, one after the other, as texts of hexadecimal digits."""
    digits = _HEX[np.frombuffer(digests, np.uint8)]
    count = len(digests) // num_bytes
    offsets = np.arange(0, 2 * len(digests) + 1, 2 * num_bytes, dtype=np.int32)
    return pa.StringArray.from_buffers(count, pa.py_buffer(offsets), pa.py_buffer(digits))


def binaries(digests: bytes, num_bytes: int = DIGEST_BYTES) -> pa.Array:
    """Digests of this length, one after the other, as an array of them."""
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(num_bytes), len(digests) // num_bytes, [None, pa.py_buffer(digests)])
