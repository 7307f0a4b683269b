"""One file of a corpus: what its name tells, how it is opened, and what is wrong where it cannot be read."""

from __future__ import annotations

import codecs
import contextlib
import json
import lzma
import os
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from s2l_ray.config.sections import COMPRESSIONS, FORMATS
from s2l_ray.errors import DataError
from s2l_ray.storage.places import Storage

# Longer ones first: the mark of UTF-32 begins with that of UTF-16.
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    codecs.BOM_UTF8: "utf-8-sig",
}
BYTE_ORDER_MARK = "\ufeff"
HEAD_BYTES = 4096
# So much of a file that is not UTF-8 is looked at to guess what it is.
_GUESSED_BYTES = 65_536
# Those that corpora are found in; each contains the older ones of its kind (GBK, Latin-1, Shift JIS).
_ENCODINGS = ["gb18030", "big5", "cp932", "euc_jp", "cp949", "cp1251", "cp1252"]


@dataclass(frozen=True)
class CorpusFile:
    """One file of a corpus."""

    name: str
    """As its owner would call it: the path or URI in the config, with what was found below it."""
    uri: str
    """The same, absolute: where a worker finds it."""
    num_bytes: int
    modified_ns: int

    @property
    def compression(self) -> str | None:
        return COMPRESSIONS.get(os.path.splitext(self.name)[1].lower())

    @property
    def format(self) -> str | None:
        """How it is read, None for a suffix that is not known."""
        found = FORMATS.get(os.path.splitext(self._unpacked_name)[1].lower())
        return None if found == "parquet" and self.compression else found

    @property
    def source(self) -> str:
        """The source of rows that name none: the file's name without its suffixes."""
        return os.path.splitext(os.path.basename(self._unpacked_name))[0]

    @property
    def _unpacked_name(self) -> str:
        return os.path.splitext(self.name)[0] if self.compression else self.name

    def open(self) -> Any:
        """The file for random access, as it is stored."""
        return Storage(self.uri).open()

    def stream(self, *, unpacked: bool = False) -> Any:
        """The file from its start, as it is stored; if `unpacked`, a compressed one as it was before."""
        storage = Storage(self.uri)
        compression = self.compression if unpacked else None
        if compression == "xz":  # Arrow does not know it
            return lzma.open(storage.filesystem.open_input_stream(storage.path(), compression=None))
        return storage.filesystem.open_input_stream(storage.path(), compression=compression)

    @contextlib.contextmanager
    def readable(self) -> Iterator[None]:
        """Turns what goes wrong while the file is read into a DataError or StorageError that names the remedy."""
        try:
            with Storage(self.uri).explained():
                yield
        except FileNotFoundError as error:
            raise DataError(
                f"{self.name}: not found on {socket.gethostname()}. Put the corpus where every node can read it, "
                "on a shared filesystem or in object storage."
            ) from error
        except (OSError, EOFError, lzma.LZMAError, pa.ArrowException) as error:
            kind = "a parquet file" if self.format == "parquet" else f"readable as {self.compression or self.format}"
            raise DataError(f"{self.name}: not {kind} ({error}). Replace the file, or leave it out.") from error

    def head(self) -> bytes:
        """The first bytes of the file, unpacked."""
        with self.readable(), self.stream(unpacked=True) as stream:
            return bytes(stream.read(HEAD_BYTES))

    def text(self) -> str:
        """The whole file as text, unpacked. Raises DataError where it is neither UTF-8 nor begins with the mark of another
        Unicode encoding."""
        with self.readable(), self.stream(unpacked=True) as stream:
            data = bytes(stream.read())
        encoding = marked_encoding(data) or "utf-8"
        try:
            return data.decode(encoding)
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            raise DataError(f"{self.name} line {line:,}: {not_unicode(data, error.start, encoding)}") from error


def marked_encoding(head: bytes) -> str | None:
    """The encoding that a byte-order mark at the start of a file names, or the zeros of its first plain characters; None
    without either."""
    marked = next((encoding for mark, encoding in _MARKS.items() if head.startswith(mark)), None)
    if marked is None and b"\0" in head[:4] and any(head[:4]):
        return json.detect_encoding(head)
    return marked


def not_unicode(data: bytes, position: int, expected: str = "utf-8") -> str:
    """What is wrong with bytes of which that at `position` is not as `expected`: the encodings that they are probably in, and
    the remedy."""
    start = max(0, position - _GUESSED_BYTES // 2)
    likely = [] if expected != "utf-8" else _likely_encodings(data[start : start + _GUESSED_BYTES])
    if not likely:
        return f"not {expected.removesuffix('-sig').upper()} text. Convert the file to UTF-8, or leave it out."
    if len(likely) > 1:
        return f"not UTF-8 text, perhaps {' or '.join(likely)}. Convert the file from the right one: iconv -f NAME -t utf-8."
    return f"not UTF-8 text, it looks like {likely[0]}. Look at some rows, then convert: iconv -f {likely[0]} -t utf-8."


def _likely_encodings(sample: bytes) -> list[str]:
    """The encodings in which a text that is not UTF-8 makes most sense, at most three."""
    from charset_normalizer import from_bytes

    runs = re.findall(rb"[\x80-\xff]+", sample)
    if all(len(run) == 1 for run in runs):  # accents between plain letters: no script of its own
        return ["cp1252"]
    matches = from_bytes(sample, cp_isolation=_ENCODINGS)
    found = sorted((match.chaos, -match.coherence, _ENCODINGS.index(match.encoding)) for match in matches)
    return [_ENCODINGS[place] for *merit, place in found if merit == list(found[0][:2])][:3]
