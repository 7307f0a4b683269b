"""How large a causal transformer is: what its memory is computed from, before it is there."""

from __future__ import annotations

import math
from dataclasses import dataclass

from s2l_ray.config import ScratchModel, TargetConfig


@dataclass(frozen=True)
class Shape:
    """A causal transformer's size."""

    parameters: float
    hidden: int
    layers: int
    vocabulary: int
    intermediate: int
    """Width of the feed-forward layer."""

    is_gated: bool
    """Whether the feed-forward layer has a gate and the norms are RMSNorm (Llama, Qwen), not GELU and LayerNorm (GPT-NeoX)."""

    key_value: int = 0
    """Width of a layer's keys, and of its values; 0: as wide as `hidden`."""

    @classmethod
    def estimated(cls, parameters: float, vocabulary: int | None = None) -> Shape:
        """The shape that models of this size have: P = 12 l h^2 + 2 v h with h = 100 l.

        Pythia-70M to Llama-70B have h / l of 80 to 128, and 32 to 152 thousand tokens (100 thousand unless told). The
        feed-forward layer is taken as gated and 3.5 h wide (Llama 3), which keeps a third more than GPT-NeoX's.
        """
        vocabulary = vocabulary or 100_000
        low, high = 1.0, 1e6
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if 0.12 * middle**3 + 2 * vocabulary * middle < parameters else (low, middle)
        hidden = max(1, round(high))
        return cls(parameters, hidden, max(1, round(hidden / 100)), vocabulary, math.ceil(3.5 * hidden), is_gated=True)

    def adapter_parameters(self, rank: int) -> float:
        """LoRA on every linear layer but the output: rank * (inputs + outputs) each (Hu et al. 2021, section 4.1).

        Four square ones in attention; two or three of h x intermediate.
        """
        feed_forward = (3 if self.is_gated else 2) * (self.hidden + self.intermediate)
        return float(rank * self.layers * (4 * 2 * self.hidden + feed_forward))


def shape_of(target: TargetConfig, parameters: float, vocabulary: int | None) -> Shape:
    """The target's shape by its configuration; estimated from its parameters where that cannot be looked at."""
    from transformers import AutoConfig

    from s2l_ray.training.models import scratch_config

    try:
        if isinstance(target.model, ScratchModel):
            found = scratch_config(target.model.scratch, vocabulary or 0)
        else:
            options = {"revision": target.revision, "trust_remote_code": target.trust_remote_code}
            found = AutoConfig.from_pretrained(target.model, **options).get_text_config()
        hidden, layers, vocabulary = found.hidden_size, found.num_hidden_layers, found.vocab_size
    except (AttributeError, OSError, ValueError):
        return Shape.estimated(parameters, vocabulary)
    width = getattr(found, "intermediate_size", None) or getattr(found, "n_inner", None) or 4 * hidden
    heads = found.num_attention_heads
    key_value = (getattr(found, "num_key_value_heads", None) or heads) * (getattr(found, "head_dim", None) or hidden // heads)
    # Families with RMSNorm have a gate in the feed-forward layer, those with LayerNorm have none.
    return Shape(parameters, hidden, layers, vocabulary, width, hasattr(found, "rms_norm_eps"), key_value)


def layer_bytes(shape: Shape, weight_bytes: int) -> float:
    """Bytes that a layer keeps per token.

    Numbers of size h: inputs of 2 norms, 2 outputs of norms, query, key, value, rotated query and key, attention's result:
    10. Of the feed-forward's width: 2 (before and after GELU), with a gate 4 (and the gate's result, and the product).
    In bfloat16 an RMSNorm works in float32, which keeps 2 h numbers more. With 4 h wide GELU that is Korthikanti's 34 s b h
    without the dropout's masks (2 s b h), with rotated queries and keys (4 s b h).
    """
    norms = 2 if shape.is_gated and weight_bytes == 2 else 0
    return float(weight_bytes * ((10 + norms) * shape.hidden + (4 if shape.is_gated else 2) * shape.intermediate))
