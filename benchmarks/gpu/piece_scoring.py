"""Piece 2: scoring with Pythia-70M's shape against the reference's one-by-one loop, and against the card's matrix product.

Goals: 30 times the loop (at least 10), half of the card's bfloat16 rate. Twelve checkpoints in one pass against twelve passes.
Where the share is below half, the profile in the result says where the time goes.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import numpy as np
import torch
from measuring import Cell, Kit, require, seconds_of, use_package

use_package()
from gpu_scoring import measure, rows_and_models  # noqa: E402

from s2l_ray.training.losses import losses_of_models  # noqa: E402

GOALS = {"ratio": 30.0, "least_ratio": 10.0, "share_of_rate": 0.5}


def settings(kit: Kit, precision: str, checkpoints: int = 1) -> argparse.Namespace:
    """As `gpu_scoring.py` takes them."""
    return argparse.Namespace(
        shape=kit.size("70m", "7m"),
        precision=precision,
        rows=kit.size(2048 if checkpoints > 1 else 512, 6),
        checkpoints=checkpoints,
        data=kit.data,
        tokenizer=kit.tokenizer,
        max_tokens=512,
        tokens_per_batch=kit.size(32_768, 1024),
        pairs=kit.size(3, 1),
        seed=0,
    )


def against_loop(kit: Kit, precision: str) -> dict[str, Any]:
    """Ratio to the loop, tokens per second, share of the matrix-product rate; losses are checked in the same run."""
    result = measure(settings(kit, precision))
    difference = result["largest_difference" if precision == "float32" else "mean_difference"]
    limit = {"float32": 1e-4, "bfloat16": 5e-3}[precision]
    require(difference <= limit, f"losses differ by {difference:.1e} nats from the loop's")
    return result | {"goals": GOALS}


def one_pass(kit: Kit, precision: str) -> dict[str, Any]:
    """Twelve checkpoints in one pass against twelve passes, the same losses."""
    arguments = settings(kit, precision, kit.size(12, 3))
    tokens, models, device = rows_and_models(arguments)

    def together() -> np.ndarray:
        return np.stack(list(losses_of_models(models, tokens, arguments.tokens_per_batch, precision)))

    def apart() -> np.ndarray:
        return np.concatenate([list(losses_of_models([one], tokens, arguments.tokens_per_batch, precision)) for one in models])

    require(np.array_equal(together(), apart()), "one pass gives other losses than twelve")
    one, many = (seconds_of(work, device, kit.size(3, 1)) for work in (together, apart))
    return {
        "one_pass_seconds": one,
        "passes_seconds": many,
        "ratio": many / one,
        "tokens_per_second": len(models) * len(tokens.ids) / one,
    }


def profiled(kit: Kit, precision: str) -> dict[str, Any]:
    """Where a pass's time goes: the kernels that take most of it."""
    arguments = settings(kit, precision)
    tokens, models, device = rows_and_models(arguments)

    def score() -> None:
        list(losses_of_models(models, tokens, arguments.tokens_per_batch, precision))

    score()
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else []
    with torch.profiler.profile(activities=activities) as profile:
        score()
    key = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    lines = profile.key_averages().table(sort_by=key, row_limit=15, max_name_column_width=60).splitlines()
    return {"profile": lines}


def cells(kit: Kit) -> dict[str, Cell]:
    """The piece's cells."""
    found: dict[str, Cell] = {}
    for precision in ("bfloat16", "float32"):
        found[f"loop {precision}"] = partial(against_loop, kit, precision)
        found[f"one pass {precision}"] = partial(one_pass, kit, precision)
    found["profile bfloat16"] = partial(profiled, kit, "bfloat16")
    return found
