"""The names of the ways to choose a subset, and which options of S2L they have a use for."""

from __future__ import annotations

from typing import Literal

Method = Literal[
    "s2l",
    "random",
    "source_proportional",
    "source_balanced",
    "source_matched",
    "source_and_length_matched",
    "final_loss_strata",
    "middle_perplexity",
    "least_confidence",
    "high_learnability",
    "ambiguous",
    "longest",
    "ifd",
    "rds_plus",
]
OF_S2L_ALONE = ("allocation", "allocation_of_strata", "draw", "min_per_source", "defer_groups_up_to")
"""Fields of the section `selection` that other methods have no use for. (Those that follow S2L's own subset have.)"""
FOLLOW_S2L = ("s2l", "source_matched", "source_and_length_matched")
MIN_POINTS = {"high_learnability": 2, "ambiguous": 2}
"""Points of the trajectories that a method needs, where that is more than one."""
