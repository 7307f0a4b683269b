"""The rows of a user's dataset: their ids, their sources, and of a causal language model the tokens and labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from s2l_ray.errors import DataError
from s2l_ray.trajectories.recording import unique_ids

# What transformers' losses leave out.
NO_LABEL = -100


@dataclass(frozen=True)
class DatasetRows:
    """A dataset with random access, and the columns that name its rows."""

    dataset: Any
    example_id: str
    source: str

    def checked_ids(self) -> pa.Array:
        """The ids of all rows. Raises DataError where there are none to use."""
        is_stream = isinstance(self.dataset, torch.utils.data.IterableDataset) or not hasattr(self.dataset, "__getitem__")
        if is_stream or not hasattr(self.dataset, "__len__"):
            raise DataError(
                "dataset: a stream without length and row numbers. Every example is scored at every recorded step: give a "
                "dataset with both."
            )
        if not len(self.dataset):
            raise DataError("dataset: has no rows.")
        columns = self.columns()
        if self.example_id not in columns:
            raise DataError(
                f"dataset: no column '{self.example_id}' (columns: {', '.join(columns)}). Give one unique id per row, or name "
                "the column with example_id=. The Trainer's remove_unused_columns drops it from its own copy only: the "
                "dataset given to RecordTrajectories must have it."
            )
        return unique_ids(self.column(self.example_id), "dataset")

    def columns(self) -> list[str]:
        names = getattr(self.dataset, "column_names", None)
        if names is not None:
            return list(names)
        first = self.dataset[0]
        if not isinstance(first, Mapping):
            raise DataError(f"dataset: its rows are {type(first).__name__}. Give rows as mappings of column to value.")
        return [str(name) for name in first]

    def column(self, name: str) -> list[Any]:
        """All values of a column."""
        is_table = hasattr(self.dataset, "column_names")
        values = self.dataset[name] if is_table else (self.dataset[i][name] for i in range(len(self.dataset)))
        return [value.item() if hasattr(value, "item") else value for value in values]

    def sources(self, numbers_M: NDArray[np.int64]) -> list[Any] | None:
        """The sources of some rows, None where the dataset has none."""
        if self.source not in self.columns():
            return None
        values = self.column(self.source)
        return [values[i] for i in numbers_M]

    def without_names(self, number: int) -> dict[str, Any]:
        """A row as a model's collator takes it."""
        return {k: v for k, v in self.dataset[number].items() if k not in {self.example_id, self.source}}


def tokens_of(row: Mapping[str, Any], name: str) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Tokens and label marks of a causal language model's row, padding left out.

    Raises DataError where several examples share the row, or where labels are not the tokens themselves.
    """
    if "input_ids" not in row or "labels" not in row:
        raise DataError(
            f"{name}: columns {', '.join(row)}. A causal language model's rows have input_ids and labels (input_ids, with -100 "
            "where nothing is learned); for any other model give loss_function=."
        )
    ids, labels = np.asarray(row["input_ids"]), np.asarray(row["labels"])
    if ids.ndim != 1 or labels.shape != ids.shape:
        raise DataError(f"{name}: {_not_causal(f'input_ids of shape {ids.shape} and labels of shape {labels.shape}')}")
    span = _attended(row, len(ids), name)
    _check_one_example(row, span, name)
    ids, labels = ids[span], labels[span]
    is_label = labels != NO_LABEL
    if (labels != ids)[is_label].any():
        raise DataError(f"{name}: {_not_causal('labels that are not the tokens of input_ids at their places')}")
    is_label[:1] = False  # nothing comes before it to predict it from
    # What follows the last label changes no loss: padding, where there is no mask.
    stop = int(np.flatnonzero(is_label)[-1]) + 1 if is_label.any() else 0
    return ids[:stop].astype(np.int32), is_label[:stop]


def _attended(row: Mapping[str, Any], length: int, name: str) -> slice:
    """The tokens that are no padding, on whichever side that stands."""
    if row.get("attention_mask") is None:
        return slice(0, length)
    places = np.flatnonzero(np.asarray(row["attention_mask"]))
    if not len(places):
        return slice(0, 0)
    span = slice(int(places[0]), int(places[-1]) + 1)
    if span.stop - span.start != len(places) or span.stop > length:
        raise DataError(f"{name}: attention_mask has gaps. A row is one example: tokens side by side, padding before or after.")
    return span


def _check_one_example(row: Mapping[str, Any], span: slice, name: str) -> None:
    lengths, positions = row.get("seq_lengths"), row.get("position_ids")
    restarts = positions is not None and (np.asarray(positions).reshape(-1)[span][1:] == 0).any()
    if restarts or (lengths is not None and np.size(lengths) > 1):
        column = "position_ids that start again" if restarts else "several seq_lengths"
        raise DataError(f"{name}: {column}: {PACKED}")


PACKED = (
    "several examples in one row hide the loss of each. Give a dataset with a row per example, and train with packing=False."
)


def _not_causal(found: str) -> str:
    return (
        f"{found}. A causal language model's labels are its input_ids, with -100 where nothing is learned; for any other model "
        "give loss_function=."
    )
