"""What a stage is: its place in the flow, and what it is built from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from s2l_ray.config import ExamplesConfig, RunConfig
from s2l_ray.errors import ArtifactError
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


def check_dropped(config: ExamplesConfig, artifact: Artifact) -> None:
    """Raise ArtifactError where finished examples lack bad rows that this config does not drop; other stages pass."""
    summary = artifact.summary
    if artifact.stage != "examples" or not summary.get("first_dropped"):
        return
    num_bad = sum(summary["dropped"][reason] for reason in summary["first_dropped"])
    allowed = 0.0 if config.on_bad_row == "error" else config.max_dropped
    if num_bad / (num_bad + summary["rows"]) > allowed:
        setting = f"max_dropped={allowed:g}" if allowed else "on_bad_row=error"
        raise ArtifactError(
            f"{artifact.storage.uri}: {num_bad:,} bad rows were dropped there, which examples.{setting} does not allow. Set "
            "examples.on_bad_row=drop (and max_dropped) as it was, or give another --run-dir."
        )
