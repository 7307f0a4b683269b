"""An embedding of each example from a causal model: the mean of its last hidden states, later tokens weighing more."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from s2l_ray.errors import ConfigError
from s2l_ray.training.losses import batches, computing, needs_rows_of_one_length
from s2l_ray.training.output_head import hidden_states
from s2l_ray.training.token_rows import TokenRows


def example_embeddings(
    model: Any, tokens: TokenRows, tokens_per_batch: int, precision: str, *, owners: np.ndarray | None = None
) -> NDArray[np.float32]:
    """The mean of the last hidden states over all tokens of each example, prompt and response, token i (from 1) with weight i:
    float32 (examples, H), as RDS+ has it (Ivison et al. 2025, arXiv 2503.01807). Of an example of several rows the sums of all
    rows are divided by the sum of their weights.

    `owners`: as in `example_losses`. Every row has a label, as there. Raises ConfigError for a model without a backbone.
    """
    device, dtype = next(model.parameters()).device, torch.bfloat16 if precision == "bfloat16" else torch.float32
    if not hasattr(model, model.base_model_prefix):
        raise ConfigError(f"{type(model).__name__}: has no backbone whose hidden states are an embedding.")
    model.eval()
    owners_R = np.arange(len(tokens)) if owners is None else owners
    num_examples = int(owners_R.max(initial=-1)) + 1
    sums_NH = np.zeros((num_examples, model.config.get_text_config().hidden_size))
    for made in batches(tokens, tokens_per_batch, of_one_length=needs_rows_of_one_length(model)):
        rows_B = made.rows_P[np.sort(np.unique(made.rows_P, return_index=True)[1])]
        lengths_B1 = torch.from_numpy(tokens.lengths[rows_B])[:, None].to(device)
        places_L = torch.arange(1, made.ids_BL.shape[1] + 1, device=device)
        with computing(device, dtype):
            hidden_BLH = hidden_states(model, made.ids_BL.to(device)).float()
        weights_BL = torch.where(places_L <= lengths_B1, places_L, 0).float()
        np.add.at(sums_NH, owners_R[rows_B], (hidden_BLH * weights_BL[..., None]).sum(1).cpu().numpy())
    totals_N = np.bincount(owners_R, tokens.lengths * (tokens.lengths + 1) / 2, num_examples)
    return (sums_NH / totals_N[:, None]).astype(np.float32)
