"""Adapters (LoRA, by peft): checked against a model's layers, added to a model, merged into its weights.

No adapter goes to a layer that shares its weight with another one, as an output layer does with a tied embedding: merged, it
would change the other layer too, or the two would come apart.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

from s2l_ray.config import Lora, TargetConfig
from s2l_ray.errors import ConfigError

# Before the name of a layer in the files that peft writes.
_PREFIX = "base_model.model."


def need_peft(why: str) -> Any:
    """The module peft. Raises ConfigError, with `why` it is needed, where it is not installed."""
    try:
        import peft
    except ImportError as error:
        raise ConfigError(f"{why} needs peft: pip install 's2l_ray[lora]' (for the workers, too)") from error
    return peft


def tied_layers(model: Any) -> dict[str, str]:
    """Layers that share a weight with another layer, each with the other's name; the model may be on the meta device."""
    owners: dict[int, list[str]] = defaultdict(list)
    for name, layer in model.named_modules():
        for parameter in layer.parameters(recurse=False):
            owners[id(parameter)].append(name)
    return {name: names[i - 1] for names in owners.values() if len(names) > 1 for i, name in enumerate(names)}


def check_target_modules(lora: Lora, model: Any) -> None:
    """Check the layers that `target_modules` names against a model, which may be on the meta device.

    Raises ConfigError where a name is that of no layer, and where a layer shares its weight with another one.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    if isinstance(lora.target_modules, str):  # all-linear leaves out the output layer, tied or not
        return

    def named(wanted: str, names: Any) -> list[str]:
        return [name for name in names if f".{name}".endswith(f".{wanted}")]

    layers, tied = dict(model.named_modules()), tied_layers(model)
    absent = [wanted for wanted in lora.target_modules if not named(wanted, layers)]
    if absent:
        kinds = {name.rpartition(".")[2] for name, layer in layers.items() if isinstance(layer, nn.Linear | Conv1D)}
        raise ConfigError(
            f"target.lora.target_modules: {', '.join(absent)}: no such layer in {type(model).__name__}. It has "
            f"{', '.join(sorted(kinds))}; all-linear takes all of them but the output layer."
        )
    for layer in (name for wanted in lora.target_modules for name in named(wanted, tied)):
        raise ConfigError(
            f"target.lora.target_modules: {layer} of {type(model).__name__} shares its weight with {tied[layer]} (tied "
            "embeddings): an adapter on one would change both, or untie them. Leave it out, or take a model without tied "
            "embeddings (for one from scratch: tie_embeddings=false)."
        )


def with_adapters(model: Any, config: TargetConfig) -> Any:
    """The model with `config.lora`'s adapters, which are then all that is trained: a peft model.

    The model itself is changed. The adapters' random weights follow `seed`; before training they change no output.
    Raises ConfigError where peft is not installed or `target_modules` names no layer, or one that cannot have adapters.
    """
    import torch

    lora, peft = config.lora, need_peft("target.lora")
    assert lora is not None
    check_target_modules(lora, model)
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
    )
    torch.manual_seed(config.seed)
    try:
        adapted = peft.get_peft_model(model, settings)
    except ValueError as error:
        raise ConfigError(f"target.lora.target_modules={lora.target_modules}: {error}") from error
    if isinstance(config.model, str):  # peft takes the local path that a URI was copied to
        settings.base_model_name_or_path, settings.revision = config.model, config.revision
    return adapted


def base_of(model: Any) -> Any:
    """The transformers model inside a peft model; any other model as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def merged(base: Any, folder: Path) -> Any:
    """The model with a folder's adapter added to its weights, which are then trainable; `base` itself is changed.

    Raises ConfigError where the adapter is not whole, of a model of another shape, or on a layer that shares its weight.
    """
    from safetensors import SafetensorError

    peft = need_peft(f"the adapter in '{folder}'")
    tied = tied_layers(base)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*missing adapter keys")  # peft would make them up
            model = peft.PeftModel.from_pretrained(base, str(folder))
            adapted = {name.removeprefix(_PREFIX).partition(".lora_")[0] for name in model.state_dict() if ".lora_" in name}
            shared = sorted(adapted & tied.keys())
            if shared:
                raise ValueError(
                    f"its layer {shared[0]} shares its weight with {tied[shared[0]]}: the merged model would be another"
                )
            return model.merge_and_unload().requires_grad_(True)  # peft froze the base
    except (OSError, RuntimeError, SafetensorError, UserWarning, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ConfigError(f"adapter '{folder}': cannot be added to a {type(base).__name__} ({reason}).") from error
