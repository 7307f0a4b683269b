"""Within which strata groups are made, and how many groups each stratum gets: what `auto` becomes. Pure functions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from s2l_ray.config import ClusteringConfig

AUTO = "auto"


@dataclass(frozen=True)
class Strata:
    """The column to stratify by, and why."""

    column: str | None
    reason: str


def strata_of(config: ClusteringConfig, names: Sequence[str], num_rows: int, names_are_files: bool = False) -> Strata:
    """What `clustering.stratify_by` means for a corpus with these sources (none where they are unknown).

    `names_are_files`: whether rows that name no source were given their file's name: names that differ in numbers only are
    then shards of one corpus.
    """
    if config.stratify_by != AUTO:
        return Strata(config.stratify_by, "as the config says")
    if len(names) < 2:
        return Strata(None, "the corpus names one source only" if names else "the corpus names no sources")
    if names_are_files and len({re.sub(r"\d+", "#", name) for name in names}) < 2:
        return Strata(
            None, f"the {len(names):,} sources are shards of one file. Set examples.source_field where rows name them"
        )
    if 2 * len(names) > num_rows:
        return Strata(None, f"{len(names):,} sources of {num_rows:,} rows are no strata: most have one row")
    return Strata("source", f"the corpus names {len(names):,} sources")


def config_of_stratum(config: ClusteringConfig, num_rows: int, of_rows: int) -> ClusteringConfig:
    """The config of a stratum of `num_rows` of all rows: under `auto` its share of the groups, rounded, and at least one."""
    if config.stratify_by != AUTO or num_rows == of_rows:
        return config

    def share(number: int) -> int:
        return max(1, (2 * number * num_rows + of_rows) // (2 * of_rows))

    levels = None if config.levels is None else [share(number) for number in config.levels]
    return config.model_copy(update={"num_clusters": share(config.num_clusters), "levels": levels})
