"""Packed rows of tokens, what is learned and scored, without a Python object per example; and how long a row may be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa

from s2l_ray.config import TrainingConfig

Row = tuple[np.ndarray, np.ndarray]
"""Tokens (int32) and whether each is a label (bool)."""


class AnyTokenRows(Protocol):
    """Rows of tokens, wherever they lie."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> Row: ...

    @property
    def lengths(self) -> np.ndarray:
        """Tokens per row."""


@dataclass(frozen=True)
class RowLimit:
    """How long a row may be, and where a longer one is cut."""

    max_tokens: int
    truncation: str = "right"
    """`right`, or `left_prompt`: at the start of the prompt first, so that the response stays."""

    @classmethod
    def of(cls, config: TrainingConfig) -> RowLimit:
        """That of a model's training."""
        return cls(config.max_tokens, config.truncation)

    def cut(self, row: Row, bos: int | None) -> Row:
        """A row of at most `max_tokens`. With `left_prompt` its token BOS, if it has one, and the end of the prompt (all before
        the first label) stay, one token of it at least; a response that is still too long is cut on the right."""
        ids, is_label = row
        excess = len(ids) - self.max_tokens
        if excess > 0 and self.truncation == "left_prompt":
            begin = int(ids[0] == bos)
            prompt = int(np.argmax(is_label)) if is_label.any() else len(ids)
            dropped = slice(begin, begin + max(0, min(excess, prompt - begin - 1)))
            ids, is_label = np.delete(ids, dropped), np.delete(is_label, dropped)
        return ids[: self.max_tokens], is_label[: self.max_tokens]


@dataclass(frozen=True)
class TokenRows:
    """The tokens of many examples, packed: no Python list per example, 5 bytes a token."""

    ids: np.ndarray
    """int32, all tokens."""

    is_label: np.ndarray
    """bool, one per token of `ids`: whether the token's loss counts. Never true for the first token of a row."""

    starts: np.ndarray
    """int64 (rows + 1): row i is `ids[starts[i]:starts[i + 1]]`."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> Row:
        """Tokens and label marks of one row."""
        span = slice(self.starts[row], self.starts[row + 1])
        return self.ids[span], self.is_label[span]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens per row."""
        lengths: np.ndarray = np.diff(self.starts)
        return lengths

    @property
    def num_labels(self) -> np.ndarray:
        """Labels per row, int32; a row with none teaches nothing."""
        counts = np.concatenate([[0], np.cumsum(self.is_label)])
        num_labels: np.ndarray = (counts[self.starts[1:]] - counts[self.starts[:-1]]).astype(np.int32)
        return num_labels

    def take(self, rows: np.ndarray) -> TokenRows:
        """The given rows, in the given order."""
        return TokenRows.of([self[int(row)] for row in rows])

    @classmethod
    def of(cls, rows: Sequence[Row]) -> TokenRows:
        """Rows of (tokens, label marks), packed."""
        starts = np.concatenate([[0], np.cumsum([len(ids) for ids, _ in rows])]).astype(np.int64)
        ids = np.concatenate([np.zeros(0, np.int32), *(ids for ids, _ in rows)])
        return cls(ids, np.concatenate([np.zeros(0, bool), *(marks for _, marks in rows)]), starts)

    @classmethod
    def join(cls, parts: Sequence[TokenRows]) -> TokenRows:
        """Several batches of rows as one."""
        offsets = np.concatenate([[0], np.cumsum([len(part.ids) for part in parts])])
        starts = [part.starts[:-1] + offset for part, offset in zip(parts, offsets[:-1], strict=True)]
        ids = np.concatenate([part.ids for part in parts])
        return cls(ids, np.concatenate([part.is_label for part in parts]), np.concatenate([*starts, offsets[-1:]]))


class MappedRows:
    """Rows of tokens in the buffers of record batches, which are not copied: of a file that is memory-mapped they are its
    pages. Of its own it has the lengths, 4 bytes a row."""

    def __init__(self, batches: Sequence[pa.RecordBatch]) -> None:
        """The batches' columns `tokens` (large lists of int32 or uint16) and `is_label` (of bool, one for each token) count."""
        self._ids = [batch["tokens"].values.to_numpy() for batch in batches]
        self._marks = [_bits(batch["is_label"].values) for batch in batches]
        self._starts = [batch["tokens"].offsets.to_numpy() for batch in batches]
        self._firsts = np.cumsum([0, *map(len, batches)])
        """The number of each batch's first row, and of all rows."""
        lengths = [np.diff(starts).astype(np.int32) for starts in self._starts]
        self.lengths = np.concatenate([np.zeros(0, np.int32), *lengths])
        """Tokens per row, int32."""

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def __getitem__(self, row: int) -> Row:
        """Tokens and label marks of one row."""
        batch = int(np.searchsorted(self._firsts, row, "right")) - 1
        begin, end = self._starts[batch][row - self._firsts[batch] :][:2].tolist()
        bits = np.unpackbits(self._marks[batch][begin // 8 : -(-end // 8)], bitorder="little")
        return self._ids[batch][begin:end].astype(np.int32, copy=False), bits[begin % 8 :][: end - begin].view(bool)


def _bits(values: pa.BooleanArray) -> np.ndarray:
    """Eight values a byte, uint8, as Arrow keeps them; of an array that begins where its buffer does."""
    assert values.offset == 0
    return np.frombuffer(values.buffers()[1] or b"", np.uint8)
