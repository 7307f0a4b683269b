"""Attention over rows of any length laid end to end, for GPUs: no padding, no mask, and nothing that makes the GPU wait.

transformers' own path asks the GPU in every forward pass whether a mask is needed. An attention function that is registered
without a mask function is never asked; ours gets the rows' borders instead, and hands them to torch's fused kernel
for variable lengths.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
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


@contextlib.contextmanager
def attending_to_rows(models: list[Any]) -> Iterator[bool]:
    """Let models attend to rows laid end to end within the block; False, and the models as they are, if one of them cannot.

    Tried under the caller's precision, on three rows against each of them alone. Models that limit or change their
    attention (windows, chunks, soft-capping, sinks) are left alone: some do that in their mask, and there is none here.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, rows_attention)
    before = [model.config._attn_implementation for model in models]
    try:
        yield all(_is_plain(model.config) and _attends_alike(model) for model in models)
    finally:
        for model, name in zip(models, before, strict=True):
            model.set_attn_implementation(name)


def _is_plain(config: Any) -> bool:
    config = config.get_text_config()
    limits = ("sliding_window", "attn_logit_softcapping", "attention_chunk_size", "is_encoder_decoder")
    kinds = set(getattr(config, "layer_types", None) or ())
    return not any(getattr(config, name, None) for name in limits) and kinds <= {"full_attention"}


def _attends_alike(model: Any) -> bool:
    """Switch a model over, and say whether it gives what it gave."""
    device, vocab_size = next(model.parameters()).device, model.get_input_embeddings().weight.shape[0]
    rows = [torch.arange(length, device=device) % vocab_size for length in (3, 1, 5)]
    backbone, told = getattr(model, model.base_model_prefix), row_borders([3, 1, 5])
    borders = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in told.items()}
    try:
        with torch.no_grad():
            alone = torch.cat([backbone(input_ids=row[None], use_cache=False)[0][0] for row in rows]).float()
            model.set_attn_implementation(NAME)
            together = backbone(input_ids=torch.cat(rows)[None], use_cache=False, **borders)[0][0].float()
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return False
    # A few roundings of bfloat16; a row that saw another row is off by about the whole.
    return bool((alone - together).abs().max() <= 0.05 * alone.abs().max())


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
    if s_aux is not None or sliding_window or cu_seq_lens_q is None or max_length_q is None:
        raise ValueError("only for plain causal attention to rows whose borders are given")
    # Under autocast a rotary embedding leaves float32; torch casts that for its own attention, but not for this kernel.
    q, k, v = (tensor[0].transpose(0, 1).to(value.dtype) for tensor in (query, key, value))
    return _attend(q, k, v, cu_seq_lens_q, max_length_q, scaling)[None], None


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, borders: torch.Tensor, longest: int, scale: float | None
) -> torch.Tensor:
    """Causal attention within each row, (tokens, heads, width): torch's fused kernel, elsewhere row by row."""
    if is_fused(query.device, query.dtype):
        from torch.nn.attention.varlen import varlen_attn

        is_grouped = query.shape[1] != key.shape[1]
        options: dict[str, Any] = {"scale": scale, "window_size": (-1, 0), "enable_gqa": is_grouped}
        fused: Any = varlen_attn(query, key, value, borders, borders, longest, longest, **options)
        return fused  # type: ignore[no-any-return]
    outs = []
    for start, end in zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True):
        q, k, v = (tensor[start:end].transpose(0, 1)[None] for tensor in (query, key, value))
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)
