"""Per-example loss: what a trajectory is made of, and what the evaluation reports.

Per example, never per batch: a loss must not depend on its neighbours or on padding, or trajectories would change with
the batch size. Rows are padded on the right, where a causal model cannot see, and logits are computed at the positions
that predict a label and nowhere else, by the model's own forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from s2l_ray.progress import get_log
from s2l_ray.training.models import accepts_logits_to_keep
from s2l_ray.training.tokens import TokenRows

# Logits are the largest array: positions x vocabulary in float32. 2**25 of them are 128 MB.
LOGITS_PER_BATCH = 2**25
# Positions per call of the cross-entropy, which makes copies of its input.
POSITIONS_PER_CHUNK = 256


@dataclass(frozen=True)
class Batch:
    """Rows of similar length, padded on the right. B rows, L tokens, P positions that predict a label."""

    rows: np.ndarray
    """Row numbers, in the order of the tensors."""

    ids_BL: torch.Tensor
    """Tokens, int64."""

    is_label_BL: torch.Tensor
    """Whether the token is a label, bool."""

    predicts_BL: torch.Tensor
    """Whether the position predicts a label, bool; P of them are true."""

    labels_P: torch.Tensor
    """The labels, row after row."""


def batches(tokens: TokenRows, tokens_per_batch: int, vocab_size: int) -> Iterator[Batch]:
    """All rows in batches of similar length, within `tokens_per_batch` padded tokens and `LOGITS_PER_BATCH` logits.

    A function of the rows alone, so that the same part always gives the same batches, and with them the same bytes.
    """
    order = np.lexsort((np.arange(len(tokens)), tokens.num_labels, tokens.lengths))
    lengths, num_labels = tokens.lengths[order], tokens.num_labels[order]
    start = 0
    while start < len(order):
        end, labels = start, 0
        while end < len(order):
            labels += int(num_labels[end])
            too_large = lengths[end] * (end - start + 1) > tokens_per_batch or labels * vocab_size > LOGITS_PER_BATCH
            if too_large and end > start:
                break
            end += 1
        yield pad(tokens, order[start:end])
        start = end


def pad(tokens: TokenRows, rows: np.ndarray) -> Batch:
    """The given rows as one batch."""
    longest = int(tokens.lengths[rows].max())
    ids_BL = np.zeros((len(rows), longest), dtype=np.int64)
    is_label_BL = np.zeros((len(rows), longest), dtype=bool)
    for i, row in enumerate(rows):
        ids, marks = tokens[int(row)]
        ids_BL[i, : len(ids)] = ids
        is_label_BL[i, : len(ids)] = marks
    # Position j predicts token j + 1.
    predicts_BL = np.zeros_like(is_label_BL)
    predicts_BL[:, :-1] = is_label_BL[:, 1:]
    tensors = (torch.from_numpy(array) for array in (ids_BL, is_label_BL, predicts_BL, ids_BL[is_label_BL]))
    return Batch(rows, *tensors)


def example_losses(model: Any, tokens: TokenRows, *, tokens_per_batch: int, precision: str = "float32") -> np.ndarray:
    """Mean cross-entropy in nats over each row's labels, float32 (rows,).

    Every row needs a label. The forward pass runs in `precision`, the cross-entropy in float32, the sum of a row in
    float64.
    """
    return next(iter(losses_of_models([model], tokens, tokens_per_batch, precision)))


def losses_of_models(models: list[Any], tokens: TokenRows, tokens_per_batch: int, precision: str) -> Iterator[np.ndarray]:
    """`example_losses` under several models that share a vocabulary; the batches are made once."""
    if not len(tokens):
        yield from (np.zeros(0, dtype=np.float32) for _ in models)
        return
    made = list(batches(tokens, tokens_per_batch, int(models[0].config.vocab_size)))
    rows = np.concatenate([np.repeat(batch.rows, batch.predicts_BL.sum(1).numpy()) for batch in made])
    for model in models:
        device = next(model.parameters()).device
        model.eval()
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            # One transfer at the end: on a GPU nothing waits between batches.
            losses = torch.cat([_label_losses(model, batch, device) for batch in made]).cpu().numpy()
        sums = np.bincount(rows, weights=losses.astype(np.float64), minlength=len(tokens))
        yield (sums / tokens.num_labels).astype(np.float32)


def _label_losses(model: Any, batch: Batch, device: torch.device) -> torch.Tensor:
    """The cross-entropy of each label of a batch, float32 (P,)."""
    ids_BL = batch.ids_BL.to(device, non_blocking=True)
    predicts_BL = batch.predicts_BL.to(device, non_blocking=True)
    labels_P = batch.labels_P.to(device, non_blocking=True)
    logits_PV = predicting_logits(model, ids_BL, predicts_BL)
    chunks = zip(torch.split(logits_PV, POSITIONS_PER_CHUNK), torch.split(labels_P, POSITIONS_PER_CHUNK), strict=True)
    return torch.cat([functional.cross_entropy(logits.float(), labels, reduction="none") for logits, labels in chunks])


def predicting_logits(model: Any, ids_BL: torch.Tensor, predicts_BL: torch.Tensor) -> torch.Tensor:
    """Logits at the marked positions, row after row, (P, V).

    No attention mask: padding stands on the right, which a causal model never attends to.
    """
    if accepts_logits_to_keep(model):
        logits: torch.Tensor = model(input_ids=ids_BL, logits_to_keep=predicts_BL, use_cache=False).logits
        return logits
    _say_full_logits(type(model).__name__)
    full_BLV: torch.Tensor = model(input_ids=ids_BL).logits
    return full_BLV[predicts_BL]


_said: set[str] = set()


def _say_full_logits(name: str) -> None:
    """Say once per process that a model computes logits that nobody reads."""
    if name not in _said:
        _said.add(name)
        get_log("trajectories").warning("%s cannot restrict its logits to the response: the full path is slower", name)
