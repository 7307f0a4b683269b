"""What a stage is: its place in the flow, and what it is built from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from s2l_ray.config import RunConfig
from s2l_ray.storage.artifacts import Artifact
from s2l_ray.storage.drafts import Draft
from s2l_ray.storage.places import Storage


class Overlap(Protocol):
    """Work on the proxy's finished checkpoints while its training goes on."""

    def on_event(self, proxy: Storage) -> None:
        """To be called at every event of the training: it holds its workers then."""

    def stop(self) -> None:
        """Start nothing more; return when the work in progress is done, or has taken too long."""


@dataclass(frozen=True)
class Context:
    """What a stage is built from: `build(context) -> Artifact` is the interface of all of them."""

    config: RunConfig
    """The whole run's: some stages need a value of another section (a tokenizer, the longest example)."""

    inputs: Mapping[str, Artifact]
    """The finished stages that this one reads, by name."""

    draft: Draft
    """The directory that the stage is built in."""

    overlap: Callable[[Context], Overlap]
    """Makes what `proxy` runs while it trains: the overlapped scoring."""

    @property
    def section(self) -> Any:
        """The stage's own section of the config."""
        return getattr(self.config, self.draft.key.stage)

    @property
    def machines(self) -> Any:
        """Where and how fast the stage runs: its section of `machines`; None for a stage that has none."""
        return getattr(self.config.machines, self.draft.key.stage, None)
