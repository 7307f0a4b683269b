"""Piece 1: losses on the GPU against transformers' own on the CPU, one example at a time in float32.

float32 to 1e-4, bfloat16 to 5e-3 on average, in batches of one row to all of them; and in bfloat16 rows that lie end to end
(variable-length attention) against the same rows padded.
"""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers
from measuring import Cell, Kit, require, seconds_of, use_package

use_package()
from gpu_scoring import one_by_one, random_rows  # noqa: E402

from s2l_ray.training import losses  # noqa: E402
from s2l_ray.training.token_rows import TokenRows  # noqa: E402

LARGEST, MEAN = 1e-4, 5e-3
SHAPES = ("gpt_neox", "llama", "qwen2")
_cpu_losses: dict[str, np.ndarray] = {}


def random_model(shape: str, kit: Kit) -> Any:
    """A model of random weights, the same in every call; keys and values are shared by heads in the second and third."""
    layers, hidden, heads = kit.size((6, 512, 8), (2, 64, 4))
    config = transformers.AutoConfig.for_model(
        shape,
        vocab_size=50_304,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        max_position_embeddings=2048,
        **({} if shape == "gpt_neox" else {"num_key_value_heads": heads // 2}),
    )
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def rows(kit: Kit) -> TokenRows:
    """Random tokens of real lengths, the same in every call."""
    return random_rows(kit.size(512, 12), np.random.default_rng(0), 512)


def expected(shape: str, kit: Kit) -> np.ndarray:
    """(rows,) losses by transformers' own loss on the CPU."""
    if shape not in _cpu_losses:
        _cpu_losses[shape] = one_by_one([random_model(shape, kit)], rows(kit), torch.device("cpu"))[0]
    return _cpu_losses[shape]


def compared(kit: Kit, shape: str, precision: str) -> dict[str, Any]:
    """Differences to the CPU, in batches of one row and more."""
    tokens, model, found = rows(kit), random_model(shape, kit).to(kit.device), {}
    theirs = expected(shape, kit)
    for count in sorted({1, 8, 64, 512} & set(range(len(tokens) + 1)) | {len(tokens)}):
        some = tokens.take(np.arange(count))
        # As many padded tokens as make one batch of rows of one length.
        ours = losses.example_losses(model, some, tokens_per_batch=512 * count, precision=precision)
        difference = np.abs(ours - theirs[:count])
        found[f"largest_{count}"] = float(difference.max())
        found[f"mean_{count}"] = float(difference.mean())
        if precision == "float32":
            require(difference.max() <= LARGEST, f"{count} rows: a loss differs by {difference.max():.1e} nats")
        else:
            require(difference.mean() <= MEAN, f"{count} rows: losses differ by {difference.mean():.1e} nats on average")
    return found


def packed(kit: Kit, shape: str) -> dict[str, Any]:
    """Rows end to end against the same padded, in bfloat16: difference and time."""
    tokens, model, taken = rows(kit), random_model(shape, kit).to(kit.device), {}

    def scored(is_packed: bool) -> np.ndarray:
        with mock.patch.object(losses, "is_fused", return_value=is_packed):
            return losses.example_losses(model, tokens, tokens_per_batch=32_768, precision="bfloat16")

    difference = np.abs(scored(True) - scored(False)).mean()
    require(difference <= MEAN, f"packed rows differ by {difference:.1e} nats on average")
    for is_packed, name in ((True, "packed_seconds"), (False, "padded_seconds")):
        taken[name] = seconds_of(partial(scored, is_packed), kit.device)
    return {
        "mean_difference": float(difference),
        **taken,
        "padded_over_packed": taken["padded_seconds"] / taken["packed_seconds"],
    }


def cells(kit: Kit) -> dict[str, Cell]:
    """The piece's cells."""
    found: dict[str, Cell] = {}
    for shape in SHAPES:
        for precision in ("float32", "bfloat16"):
            found[f"{shape} {precision}"] = partial(compared, kit, shape, precision)
        found[f"{shape} packed"] = partial(packed, kit, shape)
    return found
