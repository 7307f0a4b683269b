"""Where an export writes: files that appear together or not at all, and that never replace what is not ours to replace."""

from __future__ import annotations

import contextlib
import fnmatch
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pyarrow import fs

from s2l_ray.errors import ConfigError
from s2l_ray.selection.card import MARK
from s2l_ray.storage.layout import RUN, STAGE_NAMES, TRACKERS, WORK
from s2l_ray.storage.ownership import read_run
from s2l_ray.storage.places import Storage, absolute_uri

DATA = "data.jsonl"


@dataclass(frozen=True)
class Destination:
    """A folder and the name of the data in it; small files of a trainer go beside the data."""

    output: str
    """As the user gave it."""

    folder: Storage
    name: str
    is_named: bool
    """Whether the user named the file: it is then replaced where there is one."""

    @classmethod
    def file(cls, output: str) -> Destination:
        """The file that a user named. Raises ConfigError for what cannot be a file."""
        parent, _, name = absolute_uri(output).rpartition("/")
        folder = Storage(parent or "/")
        if output.endswith("/") or folder.info(name).type == fs.FileType.Directory:
            inside = f"{output.rstrip('/')}/subset.jsonl"
            raise ConfigError(f"--output {output}: is a directory. Give the file to write, such as {inside}.")
        _check_folder(output, folder, parent)
        if folder.is_local and Path(folder.path(name)).exists() and not Path(folder.path(name)).is_file():
            raise ConfigError(f"--output {output}: is a device or a pipe. Give the file to write.")
        return cls(output, folder, name, is_named=True)

    @classmethod
    def of_trainer(cls, output: str) -> Destination:
        """The folder that a user named, made if there is none, or a file ending in .jsonl. Raises ConfigError for others."""
        if output.endswith(".jsonl"):
            return cls.file(output)
        folder = Storage(output.rstrip("/") or "/")
        parent, _, name = folder.uri.rpartition("/")
        if Storage(parent or "/").info(name).type == fs.FileType.File:
            raise ConfigError(f"--output {output}: is a file. Give a directory, or a file whose name ends in .jsonl.")
        if folder.is_local and not folder.exists():
            _check_folder(output, Storage(parent or "/"), parent)
        return cls(output, folder, DATA, is_named=False)

    @property
    def place(self) -> str:
        """The folder as its user wrote it."""
        if not self.is_named:
            return self.output.rstrip("/") or "/"
        return self.output.rpartition("/")[0] or ("/" if self.output.startswith("/") else ".")

    def check(self, run: Storage, selection: Storage, companions: Mapping[str, str]) -> None:
        """Raises ConfigError where a file would replace what a run wrote, or somebody else's."""
        for name in (self.name, *companions):
            for own in (selection, run.child(RUN), *(run.child(one) for one in (*STAGE_NAMES, WORK, TRACKERS))):
                if f"{_resolved(self.folder, name)}/".startswith(f"{_resolved(own)}/"):
                    raise ConfigError(
                        f"--output {self.output}: would replace what a run wrote in {own.uri}. Give another place."
                    )
        foreign = [name for name in companions if self.folder.exists(name) and not self._is_ours(name)]
        is_new = not any(self.folder.exists(name) for name in companions)
        if not self.is_named and is_new and self.folder.exists(self.name):
            foreign.append(self.name)
        if foreign:
            raise ConfigError(
                f"--output {self.output}: {foreign[0]} is there and was not written by s2l_ray. Nothing was changed. Give "
                "another directory, or move what is yours."
            )
        if self.folder.exists(self.name) and self._is_of_the_corpus(run):
            raise ConfigError(f"--output {self.output}: is a file of the corpus that the run chose from. Give another name.")

    def _is_of_the_corpus(self, run: Storage) -> bool:
        """Whether the run's config names this file, a folder that it is in, or a glob that it matches."""
        dataset = read_run(run).get("examples", {}).get("dataset")
        target = _resolved(self.folder, self.name)
        for given in dataset if isinstance(dataset, list) else [dataset]:
            if isinstance(given, str):
                place = Storage(absolute_uri(given.partition("#")[0].rstrip("/") or "/"))
                own = _resolved(place)
                if f"{target}/".startswith(f"{own}/") or fnmatch.fnmatch(target, own):
                    return True
        return False

    def _is_ours(self, name: str) -> bool:
        try:
            text = self.folder.read(name).decode()
            if name.endswith(".json"):  # a user may have added entries of their own
                entries = json.loads(text)
                return isinstance(entries, dict) and bool(entries) and all(MARK in str(entry) for entry in entries.values())
        except (OSError, ValueError):
            return False
        return MARK in text

    def write(self, data: Callable[[Path], None], companions: Mapping[str, str]) -> None:
        """Have `data` write the data to a local path, and write the small files beside it: all of them, or none."""
        is_new = {name: not self.folder.exists(name) for name in (self.name, *companions)}
        try:
            with contextlib.ExitStack() as stack:
                for name, text in companions.items():
                    stack.enter_context(self.folder.atomic_path(name)).write_text(text, encoding="utf-8")
                data(stack.enter_context(self.folder.atomic_path(self.name)))
        except BaseException:
            for name in (name for name, new in is_new.items() if new and companions):
                with contextlib.suppress(Exception):  # it must not hide what was wrong
                    self.folder.delete(name)
            raise


def _check_folder(output: str, folder: Storage, parent: str) -> None:
    if not folder.is_local:
        return
    if not Path(folder.path()).exists():
        raise ConfigError(f"--output {output}: there is no directory {parent}. Make it first, or give another place.")
    if not Path(folder.path()).is_dir():
        raise ConfigError(f"--output {output}: {parent} is a file. Give another directory.")


def _resolved(place: Storage, name: str = "") -> str:
    """A place with all links followed."""
    return os.path.realpath(place.path(name)) if place.is_local else f"{place.uri}/{name}".rstrip("/")
