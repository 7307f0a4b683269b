"""Model FLOPs utilization (MFU): the FLOPs that a scoring pass needs, and the FLOP/s that the machine reaches."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch import nn

# A matrix product that takes this long can be timed.
TIMED_SECONDS = 0.05


def scoring_flops(model: Any, lengths: np.ndarray, num_labels: int) -> float:
    """FLOPs that the losses of rows with these `lengths` (int, (rows,)) and `num_labels` labels in all need.

    The backbone's matrices for every token, attention for every pair of a token and one before it, the output layer for
    every label; no padding. A multiplication with its addition counts as two.
    """
    head = model.get_output_embeddings().weight
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)} | {id(head)}
    body = sum(weight.numel() for weight in model.parameters() if weight.ndim == 2 and id(weight) not in embeddings)
    config, pairs = model.config, float((lengths.astype(np.float64) * (lengths + 1) / 2).sum())
    width, layers = (getattr(config, name, 0) or 0 for name in ("hidden_size", "num_hidden_layers"))
    return 2.0 * float(body * lengths.sum() + 2 * width * layers * pairs + head.numel() * num_labels)


def matmul_flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a square matrix product in this precision: the best of four, of a size that takes long enough to be timed."""
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
