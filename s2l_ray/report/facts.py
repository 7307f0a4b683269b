"""The types of what the report shows: plain values, which `reading` fills, `plots` draws and the page words.

Terms: a group's *level* is the mean of its centroid; its *members* are the examples nearest to its centroid.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from s2l_ray.progress import duration

State = Literal["finished", "outdated", "unfinished", "not started"]
Texts = Literal["all", "selected", "none"]
"""Whose texts are shown; see `config.sections.ReportConfig`."""
NUM_PLOTTED_SOURCES = 30
CLIPPED_CHARACTERS, MAX_CHARACTERS = 280, 4_000


@dataclass(frozen=True)
class StageStatus:
    """How far a stage is and where it came from; the fields after `state` are empty until it is finished."""

    name: str
    state: State
    fingerprint: str = ""
    created: str = ""
    git: str = ""
    reference: str = ""
    machines: str = ""
    rows: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)
    shortened: Mapping[str, int] = field(default_factory=dict)
    dropped_by_source: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    first_dropped: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Measure:
    """One row of the evaluation table: a value per model. `best` is the better of selected and random, if one is."""

    name: str
    kind: Literal["loss", "task"]
    values: Mapping[str, float | None]
    rows: int | None = None
    lower_is_better: bool = True
    is_comparable: bool = True

    @property
    def difference(self) -> float | None:
        """Selected minus random, none where one is missing or the values are no scores."""
        selected, random = self.values.get("selected"), self.values.get("random")
        return None if selected is None or random is None or not self.is_comparable else selected - random

    @property
    def best(self) -> str | None:
        if not self.difference:
            return None
        return "selected" if (self.difference < 0) == self.lower_is_better else "random"


@dataclass(frozen=True)
class StageSeconds:
    """Seconds of a finished stage, and what they were spent on."""

    stage: str
    role: str
    seconds: float
    fraction: float

    @property
    def duration(self) -> str:
        return duration(self.seconds)


@dataclass(frozen=True)
class GroupCurves:
    """The K groups: centroids over T steps, sizes, quotas (none before the selection)."""

    names_K: Sequence[str]
    centroids_KT: np.ndarray
    sizes_K: Sequence[int]
    quotas_K: Sequence[int] | None
    steps_T: Sequence[int]
    step_label: str

    def __post_init__(self) -> None:
        num_clusters = len(self.sizes_K)
        assert len(self.names_K) == num_clusters
        assert self.centroids_KT.shape == (num_clusters, len(self.steps_T))
        assert self.quotas_K is None or len(self.quotas_K) == num_clusters

    @property
    def levels_K(self) -> list[float]:
        return [float(level) for level in self.centroids_KT.mean(axis=1)]


@dataclass(frozen=True)
class Source:
    """A source before and after: examples in the pool, chosen, in the random control (none where there is no such)."""

    name: str
    pool: int
    held_out: int | None
    selected: int | None
    random: int | None
    pool_fraction: float
    selected_fraction: float | None
    random_fraction: float | None

    @property
    def ratio(self) -> float | None:
        """Share among the chosen over share of the pool: above 1 S2L takes more than a random choice would."""
        return None if self.selected_fraction is None or not self.pool_fraction else self.selected_fraction / self.pool_fraction


@dataclass(frozen=True)
class Text:
    """A text in the length that is shown: all of it, or a head with the whole (up to a limit) to unfold."""

    head: str
    whole: str | None

    @classmethod
    def of(cls, value: Any) -> Text:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        if len(text) <= CLIPPED_CHARACTERS:
            return cls(text, None)
        rest = len(text) - MAX_CHARACTERS
        end = f" … ({rest:,} more characters)" if rest > 0 else ""
        return cls(text[:CLIPPED_CHARACTERS] + "…", text[:MAX_CHARACTERS] + end)


@dataclass(frozen=True)
class Member:
    """An example near the centroid of its group. Prompt and response are none where the text was not found or is not shown."""

    example_id: str
    distance: float
    is_selected: bool | None
    source: str | None = None
    prompt: Text | None = None
    response: Text | None = None


@dataclass(frozen=True)
class GroupTexts:
    """A group and the texts of its members."""

    name: str
    size: int
    quota: int | None
    first_loss: float
    last_loss: float
    members: Sequence[Member]


@dataclass(frozen=True)
class Facts:
    """Everything the page shows."""

    name: str
    uri: str
    verdict: Sequence[str]
    tiles: Sequence[tuple[str, str]]
    stages: Sequence[StageStatus]
    measures: Sequence[Measure]
    models: Sequence[str]
    costs: Sequence[StageSeconds]
    cost_sentence: str | None
    groups: GroupCurves | None
    quality: Sequence[tuple[str, str]]
    warning: str | None
    principal_components: Sequence[float]
    budgets: Sequence[tuple[str, int, str]]
    capped: str | None
    sources: Sequence[Source]
    proxy_losses: Mapping[str, Sequence[Sequence[float]]]
    target_losses: Mapping[str, Sequence[Sequence[float]]]
    group_texts: Sequence[GroupTexts]
    texts: Texts
    versions: Mapping[str, str]
    config: str | None
    comparison: Any = None
    """Of `compare/`, where one is finished (ComparisonFacts)."""

    premise: Any = None
    """What S2L's premise came to, where it was measured (PremiseFacts)."""

    def missing(self, *names: str) -> list[StageStatus]:
        """Those of the stages that are not finished."""
        return [stage for stage in self.stages if stage.name in names and stage.state != "finished"]
