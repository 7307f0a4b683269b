"""The target that a config is for: where it is, how large, and its tokenizer if that can be loaded from here."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s2l_ray.config import TargetConfig
from s2l_ray.errors import ConfigError, DataError
from s2l_ray.storage.hub import hub_commit, hub_model


@dataclass(frozen=True)
class TargetModel:
    """A model to be fine-tuned."""

    name: str
    parameters: float | None
    tokenizer: Any | None
    positions: int | None
    """The longest sequence that it takes, where it says that."""
    is_local: bool
    """Whether it is a path or a URI, and so is likely to be used where the Hub is not."""
    problem: str = ""
    """Why it cannot be looked at from here; empty where it can."""


def find_target(name: str) -> TargetModel:
    """The target at a path, URI or Hub id.

    Raises ConfigError where there is no such model, and where one of the Hub's cannot be reached and its name does not say
    how large it is.
    """
    name = os.path.expanduser(name)
    if hub_model(name) is None:
        from s2l_ray.training.locations import local_place

        return _loaded(name, local_place(name), is_local=True)
    if name.startswith(("/", ".")):
        raise ConfigError(f"target '{name}': no such folder. Give the path of a model, its URI, or its id on the Hub.")
    folder = cached_folder(name)
    if folder is not None:
        return _loaded(name, folder, is_local=False)
    try:
        hub_commit("model", name, None)
    except DataError as error:
        parameters = parameters_by_name(name)
        if parameters is None:
            raise ConfigError(
                f"target {error} Its name does not say how large it is, either: give the path of a model, or run this where "
                "the Hub can be reached."
            ) from error
        return TargetModel(name, parameters, None, None, is_local=False, problem=f"{name} cannot be reached from here")
    try:
        return _loaded(name, name, is_local=False)
    except ConfigError as error:  # a gated one shows its name and keeps its files
        return TargetModel(name, parameters_by_name(name), None, None, is_local=False, problem=str(error))


def _loaded(name: str, place: str, *, is_local: bool) -> TargetModel:
    from s2l_ray.training.models import num_parameters
    from s2l_ray.training.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(place)
    config = Path(place) / "config.json"
    shape = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    parameters = num_parameters(TargetConfig(model=place), None) or parameters_by_name(name)
    if is_local and not config.is_file():
        raise ConfigError(f"target '{name}': no config.json there. Give the folder of a model, with its weights and tokenizer.")
    positions = shape.get("max_position_embeddings")
    return TargetModel(name, parameters, tokenizer, positions if isinstance(positions, int) else None, is_local)


def cached_folder(name: str) -> str | None:
    """Where the Hub's client keeps a model with its tokenizer on this machine; None where it does not."""
    import huggingface_hub

    for file in ("tokenizer.json", "tokenizer_config.json"):
        found = huggingface_hub.try_to_load_from_cache(name, file)
        if isinstance(found, str) and (Path(found).parent / "config.json").is_file():
            return str(Path(found).parent)
    return None


def parameters_by_name(name: str) -> float | None:
    """The size that a name tells: `Qwen2.5-7B` has about 7e9 parameters."""
    found = re.findall(r"(?<![A-Za-z0-9.])(\d+(?:\.\d+)?)([bm])(?![a-z0-9])", name.rpartition("/")[2].lower())
    if found:
        number, unit = found[-1]
        return float(number) * (1e9 if unit == "b" else 1e6)
    return next((size for known, size in _SIZES.items() if known in name.lower()), None)


_SIZES = {"phi-2": 2.78e9, "phi-3-mini": 3.8e9, "phi-3.5-mini": 3.8e9, "phi-4-mini": 3.8e9, "phi-4": 14.7e9, "distilgpt2": 82e6}
"""Models whose names do not tell how large they are, the more special names first."""
