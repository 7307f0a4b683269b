"""What decides each stage's result: its recipe, as it stands in the manifest and enters the fingerprint.

A section of the config is the recipe of the stage of the same name; here is what else belongs to it. The corpus of `examples`
enters by its content, which is read where the corpus is known (`examples.corpus`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from s2l_ray.config.run import RunConfig

_TOKENIZING = {"model", "revision", "tokenizer", "max_tokens", "truncation"}


def counts_target_tokens(config: RunConfig) -> bool:
    """Whether the budget is in tokens of a tokenizer that is not the proxy's, which the trajectories have counted."""
    is_own = config.target.tokenizer is not None or isinstance(config.target.model, str)
    return isinstance(config.selection.budget, dict) and is_own


def predicts_texts(config: RunConfig) -> bool:
    """Whether predictions have prompts, references and answers: held-out rows are never among the selected ones."""
    return config.report.texts == "all"


def _trajectories(config: RunConfig) -> dict[str, Any]:
    return config.trajectories.model_dump(mode="json") | config.proxy.model_dump(include={"max_tokens", "truncation"})


def _selection(config: RunConfig) -> dict[str, Any]:
    recipe = config.selection.model_dump(mode="json") | {"random_control": config.evaluation.random_control}
    if not counts_target_tokens(config):
        return recipe
    return recipe | {"target": config.target.model_dump(mode="json", include=_TOKENIZING)}


def _target(config: RunConfig) -> dict[str, Any]:
    return config.target.model_dump(mode="json") | {"random_control": config.evaluation.random_control}


def _evaluation(config: RunConfig) -> dict[str, Any]:
    # The untrained target is evaluated too, and comes with no artifact.
    untrained = config.target.model_dump(mode="json", include=_TOKENIZING | {"precision", "seed"})
    return config.evaluation.model_dump(mode="json") | {"target": untrained, "texts": predicts_texts(config)}


RECIPES: dict[str, Callable[[RunConfig], dict[str, Any]]] = {
    "proxy": lambda config: config.proxy.model_dump(mode="json"),
    "trajectories": _trajectories,
    "clustering": lambda config: config.clustering.model_dump(mode="json"),
    "selection": _selection,
    "target": _target,
    "evaluation": _evaluation,
}

SCHEMAS = {
    "examples": 4,
    "proxy": 4,
    "trajectories": 4,
    "clustering": 5,
    "selection": 6,
    "target": 5,
    "evaluation": 5,
}
"""Raised when the same recipe gives another result than before."""
