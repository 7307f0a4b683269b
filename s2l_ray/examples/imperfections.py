"""Generated rows as a real corpus has them: exact copies, near copies and wrong answers, by the seed and the row alone."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from s2l_ray.config import Imperfections
from s2l_ray.examples.hashes import prompt_hash

# Of ten prompts, so many may have wrong answers. A prompt of a template stands for many rows, so single rows cannot be kept in
# the pool; and if any prompt could have one, a task of few templates would have no held-out row.
_TENTHS_WITH_WRONG_ANSWERS = 3
_OTHERS_TRIED = 20
_WAYS: tuple[Callable[[str], str], ...] = (
    lambda text: f"{text}\n",
    lambda text: f"\n{text}",
    lambda text: text.replace(" ", "  ", 1),
    lambda text: text.replace("\n", "\n\n", 1) if "\n" in text else f"{text} ",
    lambda text: f"{text[:1].swapcase()}{text[1:]}",
)
"""What changes a prompt, but neither its answer nor its masked form."""


def may_be_wrong(hashed: int) -> bool:
    """Whether the rows of a prompt, given its hash, may have wrong answers: all of them then stay in the pool."""
    return hashed % 10 < _TENTHS_WITH_WRONG_ANSWERS


@dataclass(frozen=True)
class ImperfectRows:
    """The rows of a task, some of them copies of earlier ones, some with wrong answers."""

    original: Callable[[int], dict[str, Any]]
    """Row i as it was generated."""
    imperfections: Imperfections
    name: str
    """Of the task with its seed."""

    def record(self, index: int) -> dict[str, Any]:
        """Row i, with one more field: `imperfection`, which is `near_copy`, `wrong_answer` or null.

        A row that is a copy repeats one that is none, with its answer, right or wrong.
        """
        base = index
        while self._is_copy(base):
            base = int(self._draw(base, "which") * base)
        record = self._answered(base)
        if base == index or self._draw(index, "copy") < self.imperfections.exact_copies:
            return record
        vary = _WAYS[int(self._draw(index, "way") * len(_WAYS))]
        kind = record["imperfection"] or "near_copy"
        return record | {"question": vary(record["question"]), "index": index, "imperfection": kind}

    def _is_copy(self, index: int) -> bool:
        share = self.imperfections.exact_copies + self.imperfections.near_copies
        return index > 0 and self._draw(index, "copy") < share

    def _answered(self, index: int) -> dict[str, Any]:
        """A row that is no copy, perhaps with the answer of one of the next ones."""
        record = self.original(index)
        share = 10 * self.imperfections.wrong_answers / _TENTHS_WITH_WRONG_ANSWERS
        if may_be_wrong(prompt_hash(record["question"])) and self._draw(index, "wrong") < share:
            others = (self.original(index + step)["answer"] for step in range(1, _OTHERS_TRIED))
            wrong = next((answer for answer in others if answer != record["answer"]), None)
            if wrong is not None:
                return record | {"answer": wrong, "imperfection": "wrong_answer"}
        return record | {"imperfection": None}

    def _draw(self, index: int, what: str) -> float:
        """A number in [0, 1) for a row."""
        return int.from_bytes(hashlib.blake2b(f"{self.name}:{what}:{index}".encode(), digest_size=6).digest()) / 2**48
