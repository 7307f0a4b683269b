"""Attention over rows of any length laid end to end, for GPUs: no padding, no mask, and nothing that makes the GPU wait.

transformers' own path asks the GPU in every forward pass whether a mask is needed. An attention function that is registered
without a mask function is never asked; ours gets the rows' borders instead, and hands them to torch's fused kernel
for variable lengths.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

NAME = "s2l_ray_rows"


def is_fused(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch has a fused kernel for rows of any length on this device (in half precision, from Ampere on)."""
    if (
        device.type != "cuda"
        or dtype not in (torch.bfloat16, torch.float16)
        or torch.cuda.get_device_capability(device) < (8, 0)
    ):
        return False
    try:
        from torch.nn.attention import varlen  # noqa: F401
    except ImportError:  # torch before 2.10
        return False
    return True


def attend_to_rows(model: Any) -> bool:
    """Let a model attend to rows laid end to end; False, and the model as it was, where it does not give what it gave.

    Tried on three rows against each of them alone. Models that do more to their attention than to limit it to a window
    (soft-capping, sinks, chunks) are left alone.
    """
    from transformers import AttentionInterface

    config = model.config
    if any(getattr(config, name, None) for name in ("attn_logit_softcapping", "attention_chunk_size", "is_encoder_decoder")):
        return False
    AttentionInterface.register(NAME, rows_attention)
    before, device = config._attn_implementation, next(model.parameters()).device
    rows = [torch.arange(1, 1 + length, device=device) for length in (3, 1, 5)]
    backbone, told = getattr(model, model.base_model_prefix), row_borders([3, 1, 5])
    try:
        with torch.no_grad():
            alone = torch.cat([backbone(input_ids=row[None], use_cache=False)[0][0] for row in rows])
            model.set_attn_implementation(NAME)
            borders = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in told.items()}
            together = backbone(input_ids=torch.cat(rows)[None], use_cache=False, **borders)[0][0]
        if torch.allclose(alone, together, rtol=1e-3, atol=1e-3):
            return True
    except (AttributeError, RuntimeError, TypeError, ValueError):
        pass
    model.set_attn_implementation(before)
    return False


def row_borders(lengths: list[int]) -> dict[str, Any]:
    """What a backbone is told of rows laid end to end, in transformers' words."""
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    longest = max(lengths)
    return {
        "position_ids": positions,
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def rows_attention(
    module: Any,  # noqa: ARG001 - transformers hands over the layer
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,  # noqa: ARG001 - there is none
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    s_aux: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: (1, heads, tokens, width) each, out (1, tokens, heads, width)."""
    if s_aux is not None:
        raise ValueError("attention sinks")
    if cu_seq_lens_q is None or max_length_q is None:  # a batch of one length: generation, or a probe
        out = functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2), None
    # Under autocast a rotary embedding leaves float32; torch casts that for its own attention, but not for this kernel.
    q, k, v = (tensor[0].transpose(0, 1).to(value.dtype) for tensor in (query, key, value))
    return _attend(q, k, v, cu_seq_lens_q, max_length_q, scaling, sliding_window)[None], None


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    borders: torch.Tensor,
    longest: int,
    scale: float | None,
    window: int | None,
) -> torch.Tensor:
    """Causal attention within each row, (tokens, heads, width): torch's fused kernel, elsewhere row by row."""
    if is_fused(query.device, query.dtype):
        from torch.nn.attention.varlen import varlen_attn

        reach = (window - 1 if window else -1, 0)
        gqa = query.shape[1] != key.shape[1]
        options: dict[str, Any] = {"scale": scale, "window_size": reach, "enable_gqa": gqa}
        fused: Any = varlen_attn(query, key, value, borders, borders, longest, longest, **options)
        return fused  # type: ignore[no-any-return]
    outs = []
    for start, end in zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True):
        q, k, v = (tensor[start:end].transpose(0, 1)[None] for tensor in (query, key, value))
        seen = torch.ones(end - start, end - start, dtype=torch.bool, device=query.device).tril()
        if window:
            seen = seen.triu(1 - window)
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=True)
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)
