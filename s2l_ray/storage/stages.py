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
    """What is done with the proxy's finished checkpoints while its training goes on."""

    def hear(self, proxy: Storage) -> None:
        """To be called whenever the training says something: it holds its workers."""

    def stop(self) -> None:
        """Begin nothing more; return when what is in work is done, or has not been for long."""


@dataclass(frozen=True)
class Context:
    """What a stage is built from: `build(context) -> Artifact` is the interface of all of them."""

    config: RunConfig
    """The whole run's: some stages need a value of another section (a tokenizer, a limit of tokens)."""

    inputs: Mapping[str, Artifact]
    """The finished stages that this one reads, by name."""

    draft: Draft
    """The directory that the stage is built in."""

    overlap: Callable[[Context], Overlap]
    """Makes what `proxy` lets run beside its training."""

    @property
    def section(self) -> Any:
        """The stage's own section of the config."""
        return getattr(self.config, self.draft.key.stage)

    @property
    def machines(self) -> Any:
        """Where and how fast the stage runs: its section of `machines`; None for a stage that has none."""
        return getattr(self.config.machines, self.draft.key.stage, None)
