"""The formats of trainers, and a subset written in one of them: rows, and what could not be written or not as it was."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from s2l_ray.errors import ConfigError
from s2l_ray.examples.ids import name_examples
from s2l_ray.progress import get_log
from s2l_ray.selection.json_text import json_line
from s2l_ray.selection.to_axolotl import axolotl_companions, axolotl_rows
from s2l_ray.selection.to_llama_factory import llama_factory_companions, llama_factory_rows
from s2l_ray.selection.to_openai import openai_rows
from s2l_ray.selection.to_trl import trl_companions, trl_features, trl_rows
from s2l_ray.selection.turns import Contents, DataPlace, InexpressibleError, Notes, SubsetExample

_log = get_log("export")


@dataclass(frozen=True)
class TrainerFormat:
    """How a trainer wants its data."""

    rows: Callable[[SubsetExample, Contents, Notes], list[dict[str, Any]]]
    """An example as rows; raises InexpressibleError where the format has no form for it."""

    companions: Callable[[Contents, DataPlace], dict[str, str]] = lambda *_: {}
    """The small files that belong to the data, of the same names for every contents: their names and texts."""

    features: Callable[[Contents], list[dict[str, Any]] | None] = lambda _: None
    """The types of the columns for a card, where they must not be inferred."""


TRAINERS = {
    "trl": TrainerFormat(trl_rows, trl_companions, trl_features),
    "llama-factory": TrainerFormat(llama_factory_rows, llama_factory_companions),
    "axolotl": TrainerFormat(axolotl_rows, axolotl_companions),
    "openai": TrainerFormat(openai_rows),
}


@dataclass
class TrainerRows:
    """A subset in a trainer's format, streamed; the counts are complete after the last line."""

    name: str
    examples: Callable[[], Iterator[SubsetExample]]
    contents: Contents
    num_examples: int = 0
    num_rows: int = 0
    left_out: dict[str, list[str]] = field(default_factory=dict)
    """Why examples could not be written -> their ids."""

    notes: Notes = field(default_factory=Counter)

    def lines(self) -> Iterator[bytes]:
        """The lines of JSON Lines. Raises ConfigError where not one example can be written."""
        for example in self.examples():
            notes: Notes = Counter()
            try:
                rows = TRAINERS[self.name].rows(example, self.contents, notes)
            except InexpressibleError as reason:
                self.left_out.setdefault(str(reason), []).append(example.example_id)
                continue
            self.notes.update(notes.keys())  # once for an example of several rows
            self.num_examples += 1
            self.num_rows += len(rows)
            for row in rows:
                line, was_strict = json_line(row)
                self.notes["numbers that are NaN or infinite, which JSON lacks, became null"] += not was_strict
                yield f"{line}\n".encode()
        if not self.num_examples:
            raise ConfigError(f"--format {self.name}: has no form for any of the examples ({self._reasons()}). Take another.")

    def report(self) -> None:
        """Log what was left out, and what is written otherwise than it was."""
        if self.left_out:
            count = sum(map(len, self.left_out.values()))
            _log.warning(
                "%s examples have no form in --format %s and were left out: %s", f"{count:,}", self.name, self._reasons()
            )
        for note, count in sorted((+self.notes).items()):
            _log.warning("%s examples: %s", f"{count:,}", note)

    def _reasons(self) -> str:
        return "; ".join(
            f"{len(ids):,} for {reason} ({name_examples(pa.array(ids))})" for reason, ids in sorted(self.left_out.items())
        )
