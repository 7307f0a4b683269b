"""Pieces of a corpus: stretches that one task reads alone, on any machine. A shard is one piece, or several small ones.

A piece is a stretch of a file (see `formats`), a run of rows of a Hub dataset, or a run of generated examples.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from s2l_ray.config import Imperfections
from s2l_ray.errors import ConfigError, DataError
from s2l_ray.examples.imperfections import ImperfectRows
from s2l_ray.examples.rows import ROWS_AT_A_TIME, CorpusRows, Records, TableRows
from s2l_ray.storage.hub import hub_problem

# These tasks iterate over sets of strings, so their examples differ from process to process despite the seed. Found by
# generating 30 examples of every task of reasoning-gym 0.1.25 under three values of PYTHONHASHSEED.
UNREPEATABLE_TASKS = frozenset(
    ["codeio", "isomorphic_strings", "knight_swap", "list_functions", "polynomial_multiplication", "ransom_note", "word_ladder"]
)


class Piece(Protocol):
    """A stretch of the corpus that can be read anywhere."""

    @property
    def name(self) -> str:
        """The file, the dataset or the generated task that it belongs to."""
        ...

    @property
    def size(self) -> int:
        """Its share of the corpus: bytes for a file, else rows."""
        ...

    def read(self) -> Iterator[CorpusRows]:
        """Its rows, a few thousand at a time. Raises DataError naming file and row where something else stands there."""
        ...


Shard = tuple[Piece, ...]
"""What one task reads: neighbouring pieces of about the same total size."""


@dataclass(frozen=True)
class HubRows:
    """The rows from `start` to below `stop` of a Hub dataset, which every node loads into its own cache."""

    name: str
    subset: str | None
    revision: str | None
    split: str
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    def read(self) -> Iterator[CorpusRows]:
        rows = load_hub(self.name, self.subset, self.revision, self.split).with_format("arrow")
        for first in range(self.start, self.stop, ROWS_AT_A_TIME):
            table = rows[first : min(first + ROWS_AT_A_TIME, self.stop)]
            yield TableRows(table, f"{self.name} ({self.split})", first, self.name)


def load_hub(dataset: str, subset: str | None, revision: str | None, split: str) -> Any:
    """A split of a Hub dataset as `datasets.Dataset`. Raises DataError where it cannot be loaded."""
    import datasets

    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(dataset, name=subset, revision=revision, split=split)
    except Exception as error:  # the errors are those of the client's HTTP library, which changes
        raise DataError(hub_problem(dataset, error)) from error


@dataclass(frozen=True)
class GeneratedRows:
    """The examples from `start` to below `stop` of a reasoning-gym task. Example i depends on the parameters (with the seed)
    and i alone."""

    name: str
    parameters: dict[str, Any]
    start: int
    stop: int
    imperfections: Imperfections | None = None

    @property
    def size(self) -> int:
        return self.stop - self.start

    def read(self) -> Iterator[CorpusRows]:
        generator = self._generator()

        def record(index: int) -> dict[str, Any]:
            example = generator[index]
            metadata = json.dumps(example["metadata"], default=str, ensure_ascii=False)
            answer = "" if example["answer"] is None else str(example["answer"])
            return {
                "question": example["question"],
                "answer": answer,
                "source": self.name,
                "index": index,
                "metadata": metadata,
            }

        if self.imperfections is not None:
            record = ImperfectRows(record, self.imperfections, f"{self.parameters.get('seed')}:{self.name}").record
        records = [record(index) for index in range(self.start, self.stop)]
        yield Records(records, lambda row: f"{self.name} example {self.start + row:,}", self.name)

    def _generator(self) -> Any:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS

        key = f"examples.dataset.reasoning_gym.tasks.{self.name}"
        if self.name not in DATASETS:
            guess = difflib.get_close_matches(self.name, DATASETS, n=1)
            hint = f"Did you mean '{guess[0]}'?" if guess else f"Known tasks: {', '.join(sorted(DATASETS))}."
            raise ConfigError(f"{key}: no such task. {hint}")
        if self.name in UNREPEATABLE_TASKS:
            raise ConfigError(
                f"{key}: this task generates different examples in every process, so a run could not be resumed. Choose "
                f"another; the same is true of {', '.join(sorted(UNREPEATABLE_TASKS))}."
            )
        try:
            return reasoning_gym.create_dataset(self.name, **self.parameters)
        except (TypeError, ValueError, AssertionError) as error:
            raise ConfigError(f"{key}: these parameters cannot be used ({error}).") from error
