"""What a scoring pass needs to compute, and what the machine could: the two sides of a share of its limit."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn

# A product of this many operations is long enough to be timed.
TIMED_SECONDS = 0.05


def operations(model: Any, num_tokens: int, num_labels: int) -> float:
    """Multiplications and additions that the losses of so many tokens need: the matrices of the backbone for every token, the
    output layer for every label. Attention's own products and what padding costs are left out."""
    head = model.get_output_embeddings().weight
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)} | {id(head)}
    body = sum(weight.numel() for weight in model.parameters() if weight.ndim == 2 and id(weight) not in embeddings)
    return 2.0 * (body * num_tokens + head.numel() * num_labels)


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a square matrix product in this precision, the best of three, large enough to be timed."""
    size = 256
    while True:
        matrix = torch.randn(size, size, device=device).to(dtype)
        seconds = min(_timed(matrix) for _ in range(4))
        if seconds > TIMED_SECONDS or size >= 8192:
            return float(2 * size**3 / seconds)
        size *= 2


def _timed(matrix: torch.Tensor) -> float:
    if matrix.is_cuda:
        torch.cuda.synchronize(matrix.device)
    begun = time.perf_counter()
    matrix @ matrix
    if matrix.is_cuda:
        torch.cuda.synchronize(matrix.device)
    return time.perf_counter() - begun
