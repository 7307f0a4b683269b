"""A causal model's forward in two: its backbone once for all tokens, then its output layer where a loss is asked for.

The output layer is where a small model's work is (25.7M of Pythia-70M's 44.7M matrix parameters), and its logits are the
largest array of all. Both halves are the model's own `forward`: the backbone as it is, and a copy of the model whose
backbone gives the hidden states that it is handed and whose output layer has some of its rows. So what a model does to its
logits (soft-capping, scaling, a bias) stays as it is; whether it comes apart so is tried on every model.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from s2l_ray.runtime.private import with_children


class Head:
    """Hidden states to logits of a slice of the vocabulary. Made by `Head.of`."""

    def __init__(self, model: Any) -> None:
        output = model.get_output_embeddings()
        name = next(name for name, module in model.named_children() if module is output)
        self._given, self._rows = _Given(), _Rows(_weights_of(model, output))
        # Shares every weight with the model; only the two children are others.
        self._forward = with_children(model, {model.base_model_prefix: self._given, name: self._rows})
        if is_dispatched(model):  # accelerate's forward on it is that of the whole model
            vars(self._forward).pop("forward", None)
        self.vocab_size = int(self._rows.weight.shape[0])

    @classmethod
    def of(cls, model: Any) -> Head | None:
        """The model's head, None for a model whose forward does not come apart.

        Tried on a few tokens: the logits must be those of the model's own forward.
        """
        try:
            head = cls(model)
            ids_BL = torch.arange(8, device=input_device(model))[None] % head.vocab_size
            cut = head.vocab_size // 2 + 1
            with torch.no_grad():
                whole_BLV = model(input_ids=ids_BL, use_cache=False).logits
                hidden_PH = hidden_states(model, ids_BL).flatten(0, 1)
                halves = [head.logits(hidden_PH, 0, cut), head.logits(hidden_PH, cut, head.vocab_size)]
                cut_LV, whole_LV = torch.cat(halves, 1).float().cpu(), whole_BLV[0].float().cpu()
                difference, largest = (cut_LV - whole_LV).abs().max(), whole_LV.abs().max()
        except (AttributeError, IndexError, KeyError, RuntimeError, StopIteration, TypeError, ValueError):
            return None  # another kind of forward, which has to be run whole
        # A number has 8 bits in bfloat16, of which a matrix product of another shape may change the last two.
        share = 1e-4 if whole_BLV.dtype == torch.float32 else 2**-6
        return head if difference <= share * largest.clamp(min=1) and largest.isfinite() else None

    @property
    def device(self) -> torch.device:
        """Where the output layer's weights are."""
        device: torch.device = self._rows.weight.device
        return device

    def cast(self, dtype: torch.dtype) -> None:
        """Keep the output layer in this dtype: autocast would cast a slice anew every time."""
        self._rows.cast(dtype)

    def logits(self, hidden_PH: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Logits of the vocabulary's entries `start` to `stop`, (P, stop - start), in the dtype of the forward pass."""
        self._given.hidden = hidden_PH[None]
        self._rows.span = slice(start, stop)
        logits_PV: torch.Tensor = self._forward(inputs_embeds=hidden_PH[None], use_cache=False).logits[0]
        return logits_PV


def is_dispatched(model: Any) -> bool:
    """Whether accelerate has spread the model over devices, the machine's memory and its disk."""
    return hasattr(model, "hf_device_map")


def is_shared(model: Any) -> bool:
    """Whether ZeRO 3 has left this worker a share of the model."""
    return hasattr(next(model.parameters()), "ds_id")


def input_device(model: Any) -> torch.device:
    """Where a model takes its tokens; of a dispatched one, whose weights may be anywhere, its main device."""
    if not is_dispatched(model):
        device: torch.device = next(model.parameters()).device
        return device
    places = [place for place in model.hf_device_map.values() if place not in ("cpu", "disk")]
    return torch.device(places[0] if places else "cpu")


def hidden_states(model: Any, ids_BL: torch.Tensor, **options: Any) -> torch.Tensor:
    """The backbone's last hidden states, (B, L, H).

    No attention mask: padding stands on the right, which a causal model never attends to.
    """
    backbone = getattr(model, model.base_model_prefix)
    hidden_BLH: torch.Tensor = backbone(input_ids=ids_BL, use_cache=False, **options)[0]
    return hidden_BLH


def _weights_of(model: Any, output: nn.Linear) -> list[Any]:
    """The output layer's weight and bias; those that accelerate keeps in the machine's memory or on disk are fetched, once."""
    weights = [output.weight, output.bias]
    if not is_dispatched(model):
        return weights
    from accelerate.utils import align_module_device

    is_lent = any(weight is not None and weight.is_meta for weight in weights)
    with align_module_device(output):
        weights = [output.weight, output.bias]
        return [None if one is None else one.detach().clone() for one in weights] if is_lent else weights


class _Given(nn.Module):
    """Stands where the backbone stood, and gives the hidden states that it was handed."""

    hidden: torch.Tensor

    def forward(self, *_: Any, **__: Any) -> Any:
        return _outputs_class()(last_hidden_state=self.hidden)


@functools.cache
def _outputs_class() -> Any:
    from transformers.modeling_outputs import BaseModelOutputWithCrossAttentions, MoeModelOutputWithPast

    class Outputs(MoeModelOutputWithPast, BaseModelOutputWithCrossAttentions):  # type: ignore[misc]
        """All that models look for in their backbone's outputs."""

    return Outputs


class _Rows(nn.Module):
    """Some rows of a linear output layer."""

    span: slice

    def __init__(self, weights: list[Any]) -> None:
        super().__init__()
        self._weights = weights  # in a list: they are the model's, not this module's

    def cast(self, dtype: torch.dtype) -> None:
        self._weights = [None if weight is None else weight.detach().to(dtype) for weight in self._weights]

    @property
    def weight(self) -> Any:
        return self._weights[0]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        weight, bias = self._weights
        return functional.linear(hidden, weight[self.span], None if bias is None else bias[self.span])


def accepts_logits_to_keep(model: Any) -> bool:
    """Whether the model's forward can restrict its logits to given positions, told by a mask.

    Most of transformers' models can, from 5.23 on: before, a mask of rows and positions was an error.
    """
    import transformers

    takes_masks = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 23)
    return takes_masks and "logits_to_keep" in inspect.signature(model.forward).parameters
