"""Per-example loss: what a trajectory is made of, and what the evaluation reports.

Per example, never per batch: a loss must not depend on its neighbours or on padding, or trajectories would change with
the batch size. Rows of similar length are padded on the right, where a causal model cannot see. Logits are computed at the
positions that predict a label and nowhere else, a tile of positions and vocabulary at a time: each tile is reduced to one
log-sum-exp while it is in the cache, so that no array of tokens x vocabulary exists. A model whose forward does not come apart
like that is scored whole, in batches small enough for its logits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from s2l_ray.progress import get_log
from s2l_ray.training.label_statistics import ExampleLabels, LossStatistics
from s2l_ray.training.output_head import Head, accepts_logits_to_keep, hidden_states, input_device, is_dispatched, is_shared
from s2l_ray.training.token_rows import TokenRows
from s2l_ray.training.varlen_attention import attending_to_rows, is_fused, packing_of

# Positions and vocabulary entries of a tile of logits: 4 MB in a CPU's cache; on a GPU enough to fill it.
CPU_TILE, GPU_TILE = (1024, 1024), (8192, 16384)
# A batch of more padded tokens than this ends where padding would be a larger share of it.
SMALL_BATCH, RAGGED = 1024, 1.04
# Warnings that this process has logged of models that compute all logits, though only those of the labels are read.
full_path: set[str] = set()
# For a model whose head cannot be taken apart: logits of one batch (2**25 are 128 MB), positions per cross-entropy.
LOGITS_PER_BATCH = 2**25
POSITIONS_PER_CHUNK = 256


@dataclass(frozen=True)
class Batch:
    """Rows of similar length, padded on the right or packed. B rows, L tokens, P positions that predict a label."""

    rows_P: np.ndarray
    """The row number of every label."""

    ids_BL: torch.Tensor
    """Tokens, int64."""

    positions_P: torch.Tensor
    """Where labels are predicted, in the flattened batch, int64, row after row. An index: a mask would make a GPU wait."""

    labels_P: torch.Tensor
    """The labels, row after row."""

    packing: dict[str, Any] = field(default_factory=dict)
    """Where the rows are packed (B is 1 then): the backbone's arguments for it, `cu_seq_lens_q` and others."""

    def to(self, device: torch.device) -> Batch:
        """The batch on a device, copied to a GPU while it computes."""
        if device.type == "cpu":
            return self

        def sent(value: Any) -> Any:
            return value.pin_memory().to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value

        packing = {name: sent(value) for name, value in self.packing.items()}
        return Batch(self.rows_P, sent(self.ids_BL), sent(self.positions_P), sent(self.labels_P), packing)


def batches(
    tokens: TokenRows,
    tokens_per_batch: int,
    max_labels: int | None = None,
    *,
    packed: bool = False,
    of_one_length: bool = False,
) -> Iterator[Batch]:
    """All rows in batches of similar length, within `tokens_per_batch` padded tokens and `max_labels` labels.

    `packed`: packed instead of padded. `of_one_length`: only rows of equal length share a batch. A function of the
    rows alone, so that the same part always gives the same batches, and with them the same bytes.
    """
    order = np.lexsort((np.arange(len(tokens)), tokens.num_labels, tokens.lengths))
    lengths, num_labels = tokens.lengths[order], tokens.num_labels[order]
    ends = np.cumsum(lengths)
    start = 0
    while start < len(order):
        end, labels = start, 0
        while end < len(order):
            labels += int(num_labels[end])
            padded = int(lengths[end]) * (end - start + 1)
            too_large = padded > tokens_per_batch or labels > (max_labels or labels)
            is_ragged = padded > SMALL_BATCH and padded > RAGGED * (ends[end] - ends[start] + lengths[start])
            is_ragged |= of_one_length and lengths[end] != lengths[start]
            if (too_large or is_ragged) and end > start:
                break
            end += 1
        rows = order[start:end]
        yield _packed(tokens.take(rows), rows) if packed else _padded(tokens, rows)
        start = end


def _padded(tokens: TokenRows, rows: np.ndarray) -> Batch:
    ids_BL, is_label_BL = pad(tokens, rows)
    return _batch(np.repeat(rows, is_label_BL.sum(1)), ids_BL, is_label_BL)


def _packed(taken: TokenRows, rows: np.ndarray) -> Batch:
    ids_BL, is_label_BL = taken.ids[None].astype(np.int64), taken.is_label[None]
    return _batch(np.repeat(rows, taken.num_labels), ids_BL, is_label_BL, packing_of(taken.lengths.tolist()))


def _batch(rows_P: np.ndarray, ids_BL: np.ndarray, is_label_BL: np.ndarray, packing: dict[str, Any] | None = None) -> Batch:
    # Position j predicts token j + 1; a row's first token is never a label.
    positions_P = np.flatnonzero(is_label_BL) - 1
    ids, positions, labels = (torch.from_numpy(array) for array in (ids_BL, positions_P, ids_BL[is_label_BL]))
    return Batch(rows_P, ids, positions, labels, packing or {})


def pad(tokens: TokenRows, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The given rows padded on the right: tokens (B, L) int64 and whether each is a label (B, L)."""
    lengths = tokens.starts[rows + 1] - tokens.starts[rows]
    is_token_BL = np.arange(lengths.max()) < lengths[:, None]
    taken = (tokens.starts[rows][:, None] + np.arange(lengths.max()))[is_token_BL]
    ids_BL, is_label_BL = np.zeros(is_token_BL.shape, np.int64), np.zeros(is_token_BL.shape, bool)
    ids_BL[is_token_BL], is_label_BL[is_token_BL] = tokens.ids[taken], tokens.is_label[taken]
    return ids_BL, is_label_BL


def example_losses(
    model: Any, tokens: TokenRows, *, tokens_per_batch: int, precision: str = "float32", owners: np.ndarray | None = None
) -> np.ndarray:
    """Mean cross-entropy in nats over each example's labels, float32 (examples,).

    `owners`: the number of each row's example, (rows,), from 0 without a gap; without it every row is one. Every row needs a
    label. The forward pass runs in `precision`, the cross-entropy in float32, the sum of an example in float64.
    """
    return next(iter(losses_of_models([model], tokens, tokens_per_batch, precision, owners=owners)))


def losses_of_models(
    models: list[Any], tokens: TokenRows, tokens_per_batch: int, precision: str, *, owners: np.ndarray | None = None
) -> Iterator[np.ndarray]:
    """`example_losses` under several models of one shape; the batches are made, and sent to a GPU, once."""
    for labels, losses_P in _label_losses(models, tokens, tokens_per_batch, precision, owners):
        yield labels.means(losses_P)


def statistics_of_models(
    models: list[Any], tokens: TokenRows, tokens_per_batch: int, precision: str, *, owners: np.ndarray | None = None
) -> Iterator[LossStatistics]:
    """The losses of `losses_of_models`, to the byte, with what else is recorded of an example's labels."""
    for labels, losses_P in _label_losses(models, tokens, tokens_per_batch, precision, owners):
        yield labels.statistics(losses_P)


def _label_losses(
    models: list[Any], tokens: TokenRows, tokens_per_batch: int, precision: str, owners: np.ndarray | None
) -> Iterator[tuple[ExampleLabels, np.ndarray]]:
    """Under each model the loss of every label, float32 (P,), and which example it is of."""
    if not len(tokens):
        empty = np.zeros(0, np.int64)
        yield from ((ExampleLabels(empty, empty, np.zeros(0)), np.zeros(0, np.float32)) for _ in models)
        return
    device, dtype = input_device(models[0]), torch.bfloat16 if precision == "bfloat16" else torch.float32
    for model in models:
        model.eval()
    heads = [Head.of(model) for model in models]
    is_alike = needs_rows_of_one_length(models[0])
    packed = all(heads) and is_fused(device, dtype) and not (is_alike or is_dispatched(models[0]) or is_shared(models[0]))
    packed = packed and _all_attend_to_rows(models, device, dtype)
    limit, max_labels = (tokens_per_batch, None) if all(heads) else _limits(models, tokens_per_batch)
    made = batches(tokens, limit, max_labels, packed=packed, of_one_length=is_alike)
    sent = [batch.to(device) for batch in made]
    owners_R = np.arange(len(tokens)) if owners is None else owners
    num_labels_N = np.asarray(np.bincount(owners_R, tokens.num_labels), np.float64)
    labels = ExampleLabels(np.concatenate([batch.rows_P for batch in sent]), owners_R, num_labels_N)
    for model, head in zip(models, heads, strict=True):
        if head is not None and dtype == torch.bfloat16:
            head.cast(dtype)
        with computing(device, dtype), attending_to_rows([model]) if packed else contextlib.nullcontext():
            # One transfer at the end: on a GPU nothing waits between batches.
            pieces = _whole(model, sent) if head is None else _tiled(model, head, sent)
            losses_P = torch.cat(list(pieces)).cpu().numpy()
        yield labels, losses_P


@contextlib.contextmanager
def computing(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """A forward pass without gradients, in this precision."""
    # No inference mode: a model in training may keep what it computes here, its rotary embedding for one.
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        yield


def _all_attend_to_rows(models: list[Any], device: torch.device, dtype: torch.dtype) -> bool:
    with computing(device, dtype), attending_to_rows(models) as can:
        return can


def _limits(models: list[Any], tokens_per_batch: int) -> tuple[int, int]:
    """Tokens and labels of a batch where a model builds the logits of all labels at once, or even of all tokens."""
    labels = max(1, LOGITS_PER_BATCH // int(models[0].config.get_text_config().vocab_size))
    return (tokens_per_batch if all(map(accepts_logits_to_keep, models)) else min(tokens_per_batch, labels)), labels


def needs_rows_of_one_length(model: Any) -> bool:
    """Whether a row's rotary embedding depends on the longest row of its batch, so that only equals may share one.

    (The `dynamic` one does beyond the model's positions, which no row exceeds.)
    """
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    kinds = [rope.get("rope_type"), *(kind.get("rope_type") for kind in rope.values() if isinstance(kind, dict))]
    return "longrope" in kinds


def _tiled(model: Any, head: Head, made: list[Batch]) -> Iterator[torch.Tensor]:
    """The cross-entropy of every label, float32, batch after batch, by tiles of logits."""
    waiting: list[tuple[torch.Tensor, torch.Tensor]] = []
    for i, batch in enumerate(made, 1):
        hidden_BLH = hidden_states(model, batch.ids_BL, **batch.packing)
        hidden_PH = hidden_BLH.flatten(0, 1).index_select(0, batch.positions_P.to(hidden_BLH.device))
        waiting.append((hidden_PH.to(head.device), batch.labels_P.to(head.device)))
        # The output layer's weights are read once for so many positions, however few a batch has.
        positions, _ = _tile(hidden_BLH)
        count = sum(len(labels) for _, labels in waiting)
        if count >= positions or i == len(made):
            hidden_PH, labels_P = (torch.cat(tensors) for tensors in zip(*waiting, strict=True))
            chunks = max(1, round(count / positions))
            for hidden, labels in zip(hidden_PH.tensor_split(chunks), labels_P.tensor_split(chunks), strict=True):
                yield tiled_cross_entropy(head, hidden, labels)
            waiting = []


def tiled_cross_entropy(head: Head, hidden_PH: torch.Tensor, labels_P: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in nats of each label, float32 (P,); of the logits one tile exists at a time."""
    _, width = _tile(hidden_PH)
    label_logits_P = torch.zeros(len(labels_P), device=hidden_PH.device)
    sums_P = []
    for start in range(0, head.vocab_size, width):
        tile_PV = head.logits(hidden_PH, start, min(start + width, head.vocab_size)).float()
        # log-softmax reads a tile in one kernel, and at the largest logit it gives the log-sum-exp back to the last digit.
        sums_P.append(tile_PV.amax(1) - tile_PV.log_softmax(1).amax(1))
        places_P = labels_P - start
        is_here_P = (places_P >= 0) & (places_P < tile_PV.shape[1])
        found_P = tile_PV.gather(1, places_P.clamp(0, tile_PV.shape[1] - 1)[:, None])[:, 0]
        label_logits_P = torch.where(is_here_P, found_P, label_logits_P)
    return torch.stack(sums_P, 1).logsumexp(1) - label_logits_P


def _tile(hidden_PH: torch.Tensor) -> tuple[int, int]:
    return CPU_TILE if hidden_PH.device.type == "cpu" else GPU_TILE


def _whole(model: Any, made: list[Batch]) -> Iterator[torch.Tensor]:
    """The same for a model that does not come apart: its forward alone, restricted to the labels if it can do that."""
    restricts = accepts_logits_to_keep(model)
    if not restricts:
        message = f"{type(model).__name__} cannot restrict its logits to the response: the full path is slower"
        if message not in full_path:
            get_log("trajectories").warning(message)
        full_path.add(message)
    for batch in made:
        if restricts:
            is_kept = torch.zeros(batch.ids_BL.numel(), dtype=torch.bool, device=batch.ids_BL.device)
            is_kept[batch.positions_P] = True
            kept_BL = is_kept.reshape(batch.ids_BL.shape)
            logits_PV = model(input_ids=batch.ids_BL, logits_to_keep=kept_BL, use_cache=False).logits
        else:
            logits_PV = model(input_ids=batch.ids_BL).logits.flatten(0, 1)[batch.positions_P]
        chunks = zip(*(torch.split(tensor, POSITIONS_PER_CHUNK) for tensor in (logits_PV, batch.labels_P)), strict=True)
        for logits, labels in chunks:
            yield functional.cross_entropy(logits.float(), labels, reduction="none")
