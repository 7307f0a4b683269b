"""The rows of a corpus that are no examples: counted by source and reason, with the first of each kind of bad row."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from s2l_ray.examples.row_problems import NOTHING_TO_LEARN

DUPLICATE, FILTERED = "duplicate", "filtered"
_NOT_BAD = {DUPLICATE, FILTERED, *NOTHING_TO_LEARN}


@dataclass
class Dropped:
    """Counts of rows that were dropped."""

    by_source: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    """Source -> reason -> rows."""
    first: dict[str, str] = field(default_factory=dict)
    """Reason -> the message of the first bad row."""

    def add(self, source: str, reason: str, message: str | None = None) -> None:
        """Count a row; a bad one has a message."""
        self.by_source[source][reason] += 1
        if message is not None:
            self.first.setdefault(reason, message)

    @property
    def by_reason(self) -> Counter[str]:
        return sum(self.by_source.values(), Counter[str]())

    @property
    def num_bad(self) -> int:
        """The rows that could not be read or understood."""
        return sum(count for reason, count in self.by_reason.items() if reason not in _NOT_BAD)

    @classmethod
    def joined(cls, found: Iterable[Dropped]) -> Dropped:
        """The counts of several stretches of a corpus, in its order."""
        all_of_them = cls()
        for one in found:
            for source, counts in one.by_source.items():
                all_of_them.by_source[source].update(counts)
            all_of_them.first = one.first | all_of_them.first
        return all_of_them

    def as_json(self) -> dict[str, Any]:
        return {"by_source": self.by_source, "first": self.first}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Dropped:
        """What `as_json` gave."""
        return cls.joined([cls({source: Counter(counts) for source, counts in value["by_source"].items()}, value["first"])])
