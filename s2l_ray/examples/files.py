"""One file of a corpus: what its name tells, how it is opened, and what is wrong where it cannot be read."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from s2l_ray.config.sections import FORMATS
from s2l_ray.errors import DataError
from s2l_ray.storage.places import Storage


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
    def is_gzipped(self) -> bool:
        return self.name.endswith(".gz")

    @property
    def format(self) -> str | None:
        """How it is read, None for a suffix that is not known."""
        found = FORMATS.get(os.path.splitext(self.name.removesuffix(".gz"))[1].lower())
        return None if found == "parquet" and self.is_gzipped else found

    @property
    def source(self) -> str:
        """The source of rows that name none: the file's name without its suffixes."""
        return os.path.splitext(os.path.basename(self.name).removesuffix(".gz"))[0]

    def open(self) -> Any:
        """The file for random access, as it is stored."""
        return Storage(self.uri).open()

    def stream(self, *, unzipped: bool = False) -> Any:
        """The file from its start, as it is stored; if `unzipped`, a gzipped one as it was before."""
        storage = Storage(self.uri)
        compression = "gzip" if unzipped and self.is_gzipped else None
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
        except (OSError, pa.ArrowInvalid) as error:
            kind = f"a {self.format} file" if self.format == "parquet" else "readable"
            raise DataError(f"{self.name}: not {kind} ({error}). Replace the file, or leave it out.") from error

    def text(self) -> str:
        """The whole file as text, unzipped. Raises DataError where it is not UTF-8."""
        with self.readable(), self.stream(unzipped=True) as stream:
            return decode(stream.read(), True, lambda line: f"{self.name} line {line + 1:,}")


def decode(data: bytes, is_first: bool, place_of: Callable[[int], str]) -> str:
    """UTF-8 bytes as text, without the byte-order mark that some editors put at the start of a file (`is_first`).

    Raises DataError with `place_of(line)`, lines counted from the start of `data`, for bytes that are not UTF-8.
    """
    data = data.removeprefix(b"\xef\xbb\xbf") if is_first else data
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        where = place_of(data.count(b"\n", 0, error.start))
        raise DataError(f"{where}: not UTF-8 text ({error.reason}). Convert the file: iconv -f latin1 -t utf-8.") from error
