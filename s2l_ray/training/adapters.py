"""Adapters (LoRA, by peft): checked against a model's layers, added to a model, merged into its weights or its files.

No adapter goes to a layer that shares its weight with another one, as an output layer does with a tied embedding: merged, it
would change the other layer too, or the two would come apart.
"""

from __future__ import annotations

import functools
import shutil
import warnings
from collections import defaultdict
from collections.abc import Callable
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


def merge_shards(skeleton: Any, base: Path, adapter: Path, folder: Path, dtype: Any) -> None:
    """Write the model in `base` with an adapter added to its weights into `folder`, a file of its safetensors at a time.

    One file's weights are in memory at most. Sums are in float32, what is written is in `dtype`. `skeleton`: the base, which is
    changed, on the meta device. Raises ConfigError where the adapter is not whole, of another model, on a layer that shares its
    weight, or more than LoRA's two matrices a layer.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    try:
        deltas = _deltas(skeleton, adapter)
        prefix = f"{skeleton.base_model_prefix}."
        whole = base / "model.safetensors"  # which transformers reads where a folder has shards, too
        for file in [whole] if whole.exists() else sorted(base.glob("model-*.safetensors")):
            weights = {}
            with safe_open(file, "pt") as shard:
                for key in shard.keys():  # noqa: SIM118 - no mapping
                    weight = shard.get_tensor(key)
                    name = next((name for name in (key, prefix + key) if name in deltas), None)
                    if name is not None:
                        weight = deltas.pop(name)(weight)
                    weights[key] = weight.to(dtype) if weight.is_floating_point() else weight
            save_file(weights, folder / file.name, metadata={"format": "pt"})
        if deltas:
            raise ValueError(f"its layer {min(deltas)} is not in the files of the base")
    except (KeyError, OSError, RuntimeError, SafetensorError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ConfigError(
            f"adapter '{adapter}': cannot be added to a {type(skeleton).__name__} shard by shard ({reason}). Save it merged "
            "(target.lora.save=merged), or evaluate it where it fits whole."
        ) from error
    for file in base.glob("*.json"):
        shutil.copy(file, folder / file.name)


def _deltas(skeleton: Any, adapter: Path) -> dict[str, Callable[[Any], Any]]:
    """For each weight that a LoRA adapter changes, by name, what makes the merged one of it, in float32."""
    from safetensors.torch import load_file

    peft, tied = need_peft(f"the adapter in '{adapter}'"), tied_layers(skeleton)
    settings = peft.PeftConfig.from_pretrained(str(adapter))
    if settings.peft_type != "LORA" or settings.use_dora or settings.bias != "none" or settings.modules_to_save:
        raise ValueError("it is more than the two matrices of LoRA")
    model = peft.get_peft_model(skeleton, settings, low_cpu_mem_usage=True).get_base_model()
    saved = {name.removeprefix(_PREFIX): value for name, value in load_file(adapter / "adapter_model.safetensors").items()}
    deltas: dict[str, Callable[[Any], Any]] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, peft.tuners.lora.LoraLayer):
            continue
        if name in tied:
            raise ValueError(f"its layer {name} shares its weight with {tied[name]}: the merged model would be another")
        is_embedding = f"{name}.lora_embedding_A" in saved
        ends = ("lora_embedding_A", "lora_embedding_B") if is_embedding else ("lora_A.weight", "lora_B.weight")
        a, b = (saved.pop(f"{name}.{end}") for end in ends)
        is_transposed, scale = is_embedding or layer.fan_in_fan_out, next(iter(layer.scaling.values()))
        shape = (b.shape[0], a.shape[1])
        if (shape[::-1] if is_transposed else shape) != tuple(layer.weight.shape):
            raise ValueError(f"its layer {name} has another shape")
        own = saved.pop(f"{name}.base_layer.weight", None)  # peft saves an embedding with its adapter
        deltas[f"{name}.weight"] = functools.partial(_merged, a, b, scale, own, is_transposed=is_transposed)
    if saved:
        raise ValueError(f"it has {min(saved)}, which that model has not")
    return deltas


def _merged(a: Any, b: Any, scale: float, own: Any, weight: Any, *, is_transposed: bool) -> Any:
    product = scale * (b.float() @ a.float())
    return (weight if own is None else own).float() + (product.T if is_transposed else product)
