"""Which files a directory or a glob means, on a disk and in object storage alike.

In a glob `*`, `?` and `[...]` stand for characters of one name, and a name `**` for any number of directories. Hidden files
and markers (`.part.crc`, `_SUCCESS`) and what lies in hidden directories are left out, but for a name of the glob that itself
begins with a dot or an underscore.
"""

from __future__ import annotations

import re
from fnmatch import fnmatchcase

from pyarrow import fs

from s2l_ray.errors import ConfigError
from s2l_ray.storage.places import Storage

HIDDEN = (".", "_")
_WILDCARD = re.compile(r"[*?\[]")


def is_glob(place: str) -> bool:
    """Whether a path or URI is a glob: it has a wildcard, and nothing lies there under this very name."""
    if _WILDCARD.search(place) is None:
        return False
    if "://" in place and "?" in place:  # a URI's query to Arrow, which leaves it out of the path
        return True
    try:
        return not Storage(place).exists()
    except ConfigError:  # not even a URI
        return True


def split_glob(glob: str) -> tuple[str, str]:
    """The directory before the first wildcard, as it is written, and the glob of the names below it."""
    wildcard = _WILDCARD.search(glob)
    assert wildcard is not None
    directory, slash, _ = glob[: wildcard.start()].rpartition("/")
    return directory or slash or ".", glob[len(directory) + len(slash) :]


def files_below(directory: str, glob: str = "**") -> dict[str, fs.FileInfo]:
    """The files below a directory (path or URI) that match a glob, by their names relative to it, sorted; empty where there
    is no directory. Raises StorageError where the storage cannot be used."""
    storage, pattern = Storage(directory), glob.split("/")
    if storage.info().type != fs.FileType.Directory:
        return {}
    found = storage.infos(recursive=len(pattern) > 1 or pattern == ["**"])
    return {name: info for name, info in found.items() if _matches(name.split("/"), pattern)}


def _matches(names: list[str], pattern: list[str]) -> bool:
    """Whether the names of a path match those of a glob."""
    if not names or not pattern:
        return not names and not pattern
    is_visible = not names[0].startswith(HIDDEN)
    if pattern[0] != "**":
        is_named = is_visible or pattern[0].startswith(HIDDEN)
        return is_named and fnmatchcase(names[0], pattern[0]) and _matches(names[1:], pattern[1:])
    if len(pattern) == 1 and len(names) == 1:
        return is_visible
    return _matches(names, pattern[1:]) or (is_visible and _matches(names[1:], pattern))
