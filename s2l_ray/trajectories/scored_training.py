"""A training in which examples are scored: what must hold of it, and how it is left as it was."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from s2l_ray.errors import ConfigError
from s2l_ray.runtime.private import without_mixed_precision
from s2l_ray.trajectories.dataset_rows import PACKED


def check_training(args: Any, model: Any) -> None:
    """Raise ConfigError for a training whose losses cannot be recorded example by example."""
    if getattr(args, "packing", False):
        raise ConfigError(f"packing=True: {PACKED}")
    if getattr(args, "use_liger_kernel", False):
        raise ConfigError(
            "use_liger_kernel=True: its fused loss is one number for a whole batch. Record with use_liger_kernel=False."
        )
    if getattr(args, "fsdp", None) or is_sharded(model):
        raise ConfigError(
            "the model's parameters are sharded (DeepSpeed ZeRO 3, FSDP or tensor parallel): no process could score with them. "
            "Train with DDP or ZeRO up to 2, or keep checkpoints and score them afterwards: `s2l run` with proxy.checkpoints."
        )


def is_sharded(model: Any) -> bool:
    """Whether a process holds only its share of the parameters."""
    from torch.distributed.tensor import DTensor

    is_wrapped = any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules())
    return is_wrapped or any(hasattr(p, "ds_id") or isinstance(p, DTensor) for p in model.parameters())


def check_logits(model: Any, ids_L: NDArray[np.int32]) -> None:
    """Raise ConfigError where the model's forward gives no logits for a row; the longest shows that all fit."""
    device = next(model.parameters()).device
    output = model(input_ids=torch.from_numpy(ids_L.astype(np.int64))[None].to(device))
    if not isinstance(getattr(output, "logits", None), torch.Tensor):
        raise ConfigError(
            f"{type(model).__name__}: its forward gives no logits in evaluation mode. Give a causal language model "
            "(AutoModelForCausalLM), or loss_function=."
        )


@contextmanager
def scoring(model: Any) -> Iterator[None]:
    """The model in evaluation mode, without gradients and in its own precision; then all as before, random numbers too."""
    modes = [(module, module.training) for module in model.modules()]
    numpy_state, python_state = np.random.get_state(), random.getstate()
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
        try:
            model.eval()
            with without_mixed_precision(model):
                yield
        finally:
            for module, mode in modes:
                module.training = mode
            np.random.set_state(numpy_state)
            random.setstate(python_state)
