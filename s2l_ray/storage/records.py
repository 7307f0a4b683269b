"""What identifies a value or a file: hashes that are the same for the same content."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def digest(value: Any, num_bytes: int = 8) -> str:
    """Hash of a JSON value as `2 * num_bytes` hexadecimal digits, the same for any order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return content_digest(text.encode(), num_bytes)


def content_digest(data: bytes | memoryview, num_bytes: int = 8) -> str:
    """Hash of bytes, as `2 * num_bytes` hexadecimal digits."""
    return hashlib.blake2b(data, digest_size=num_bytes).hexdigest()


@dataclass(frozen=True)
class FileRecord:
    """A file of an artifact: path relative to the stage's directory, size, hash."""

    path: str
    num_bytes: int
    sha256: str

    @classmethod
    def of(cls, path: str, data: bytes) -> FileRecord:
        """The record of a file with these bytes."""
        return cls(path, len(data), hashlib.sha256(data).hexdigest())

    @classmethod
    def of_file(cls, path: str, local: Path) -> FileRecord:
        """The record of a local file, read piece by piece: a model may be larger than memory."""
        with local.open("rb") as file:
            return cls(path, local.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())
