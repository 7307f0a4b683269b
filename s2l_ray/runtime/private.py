"""The names that other libraries do not promise, and that we need all the same: all of them, with the reason for each.

`NAMES` says since which version each is there; a test fails when one is gone from the installed version. Everything else
in this package uses public interfaces, which another test reads from the source.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

NAMES = {
    # A module's children by name. torch (all versions) has no public way to share all weights and all children but a few:
    # `setattr` on a copy would change the original's children, and a deep copy would copy the weights.
    "torch.nn.Module._modules": "torch 0.1",
    # The attention that a model has now. transformers sets it publicly (`set_attn_implementation`) and reads it only here:
    # without it a model could not get back the attention that its user chose.
    "transformers.PretrainedConfig._attn_implementation": "transformers 4.36",
    # The forward that a model had before accelerate put autocast around it. `extract_model_from_parallel` gives it back for
    # good, and through the model's own decorators; scoring needs it for a moment, in the middle of a training.
    "accelerate.Accelerator.prepare_model._original_forward": "accelerate 0.14",
}


def with_children(model: Any, children: dict[str, Any]) -> Any:
    """A shallow copy of a torch module, sharing every weight, in which the named children are others."""
    copied = copy.copy(model)
    copied._modules = model._modules | children
    return copied


def attention_of(model: Any) -> str:
    """The name of a transformers model's attention, as `set_attn_implementation` takes it."""
    return str(model.config._attn_implementation)


@contextlib.contextmanager
def without_mixed_precision(model: Any) -> Iterator[None]:
    """Within it a model that accelerate has prepared computes in its own precision, as it did before."""
    try:
        original, mixed = model._original_forward, vars(model)["forward"]
    except (AttributeError, KeyError):
        yield
        return
    del model.forward
    if model.forward != original:  # not its class's, but somebody's before accelerate
        model.forward = original
    try:
        yield
    finally:
        model.forward = mixed
