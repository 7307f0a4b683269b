"""Adapters (LoRA, by peft): checked against a model's layers, added to a model, merged into its weights."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from s2l_ray.config import Lora, TargetConfig
from s2l_ray.errors import ConfigError


def need_peft(why: str) -> Any:
    """The module peft. Raises ConfigError, with `why` it is needed, where it is not installed."""
    try:
        import peft
    except ImportError as error:
        raise ConfigError(f"{why} needs peft: pip install 's2l_ray[lora]' (for the workers, too)") from error
    return peft


def check_target_modules(lora: Lora, model: Any) -> None:
    """Raise ConfigError naming the layers that `target_modules` could name, where a name of it is that of no layer."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    if isinstance(lora.target_modules, str):
        return
    names = [f".{name}" for name, _ in model.named_modules()]
    absent = [wanted for wanted in lora.target_modules if not any(name.endswith(f".{wanted}") for name in names)]
    if absent:
        layers = {name.rpartition(".")[2] for name, layer in model.named_modules() if isinstance(layer, nn.Linear | Conv1D)}
        raise ConfigError(
            f"target.lora.target_modules: {', '.join(absent)}: no such layer in {type(model).__name__}. It has "
            f"{', '.join(sorted(layers))}; all-linear takes all of them but the output layer."
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
    """The model with a folder's adapter added to its weights.

    Raises ConfigError where the adapter is not whole or of a model of another shape.
    """
    from safetensors import SafetensorError

    peft = need_peft(f"the adapter in '{folder}'")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*missing adapter keys")  # peft would make them up
            model = peft.PeftModel.from_pretrained(base, str(folder)).merge_and_unload()
            return model.requires_grad_(True)  # peft froze the base
    except (OSError, RuntimeError, SafetensorError, UserWarning, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ConfigError(f"adapter '{folder}': cannot be added to a {type(base).__name__} ({reason}).") from error
