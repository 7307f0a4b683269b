"""Variable-length attention over packed sequences, for GPUs: no padding, no mask, no synchronization with the GPU.

transformers' own path asks the GPU in every forward pass whether a mask is needed. An attention function that is registered
without a mask function skips that. Ours gets the sequences' cumulative lengths (`cu_seqlens`) and passes them to torch's
fused variable-length kernel.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional

from s2l_ray.runtime.private import attention_of

NAME = "s2l_ray_rows"


def is_fused(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch has a fused variable-length kernel for this device (in half precision, from Ampere on)."""
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
    """Let models attend to packed sequences within the block; False, with the models unchanged, if one of them cannot.

    Tested in the caller's precision: three packed sequences against each of them alone. Models that limit or change their
    attention (windows, chunks, soft-capping, sinks) are left alone: some do that in their mask, and there is none here.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, rows_attention)
    before = [attention_of(model) for model in models]
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
    """Switch a model to packed attention; whether its hidden states stay the same."""
    device, vocab_size = next(model.parameters()).device, model.get_input_embeddings().weight.shape[0]
    rows = [torch.arange(length, device=device) % vocab_size for length in (3, 1, 5)]
    backbone, options = getattr(model, model.base_model_prefix), packing_of([3, 1, 5])
    packed = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    try:
        with torch.no_grad():
            alone = torch.cat([backbone(input_ids=row[None], use_cache=False)[0][0] for row in rows]).float()
            model.set_attn_implementation(NAME)
            together = backbone(input_ids=torch.cat(rows)[None], use_cache=False, **packed)[0][0].float()
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return False
    # A few roundings of bfloat16; a row that saw another row is off by about the whole.
    return bool((alone - together).abs().max() <= 0.05 * alone.abs().max())


def packing_of(lengths: list[int]) -> dict[str, Any]:
    """A backbone's arguments for packed sequences of these lengths (B of them, T tokens in all).

    `position_ids` int64 (1, T), `cu_seq_lens_q` and `cu_seq_lens_k` int32 (B + 1,), and the longest length.
    """
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
        raise ValueError("only for plain causal attention to packed sequences with cu_seqlens")
    # Under autocast a rotary embedding leaves float32; torch casts that for its own attention, but not for this kernel.
    q, k, v = (tensor[0].transpose(0, 1).to(value.dtype) for tensor in (query, key, value))
    return _attend(q, k, v, cu_seq_lens_q, max_length_q, scaling)[None], None


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seqlens: torch.Tensor, longest: int, scale: float | None
) -> torch.Tensor:
    """Causal attention within each sequence, (tokens, heads, width): torch's fused kernel, elsewhere one by one."""
    if is_fused(query.device, query.dtype):
        from torch.nn.attention.varlen import varlen_attn

        is_grouped = query.shape[1] != key.shape[1]
        options: dict[str, Any] = {"scale": scale, "window_size": (-1, 0), "enable_gqa": is_grouped}
        fused: Any = varlen_attn(query, key, value, cu_seqlens, cu_seqlens, longest, longest, **options)
        return fused  # type: ignore[no-any-return]
    outs = []
    for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        q, k, v = (tensor[start:end].transpose(0, 1)[None] for tensor in (query, key, value))
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)
