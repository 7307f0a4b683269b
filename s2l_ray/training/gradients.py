"""The gradient of each example's loss with respect to all of a model's weights, as a few thousand numbers.

A sketch keeps inner products: each entry is multiplied by a random sign and added to one of M sums (the count sketch: Charikar,
Chen and Farach-Colton, 2002; for inner products Weinberger et al., 2009). Entries are laid out in rows of M, of which each is
turned by a random number of places: two entries of one row never meet, two of different rows in one of M cases. So an inner
product is right on average, and its standard error is at most sqrt((|x|² |y|² + <x, y>²) / M): a cosine of 0 is known to 0.016
with M = 4,096. A model of at most M weights keeps its gradients as they are.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from s2l_ray.training.fine_tuning import Collator, token_mean_loss
from s2l_ray.training.output_head import accepts_logits_to_keep
from s2l_ray.training.token_rows import TokenRows

# Entries of a gradient that are turned at once: 32 MB of indices.
_CHUNK = 2**22


class GradientSketch:
    """The random signs and turns for a model's weights; the same for the same shapes and seed, on every device."""

    def __init__(self, model: Any, num_features: int, seed: int) -> None:
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.num_parameters = sum(parameter.numel() for parameter in self._parameters)
        self.is_exact = self.num_parameters <= num_features
        self.num_features = self.num_parameters if self.is_exact else num_features
        """M, the length of a sketch."""
        device, generator = next(model.parameters()).device, torch.Generator().manual_seed(seed)
        self._signs: list[torch.Tensor] = []
        self._turns: list[torch.Tensor] = []
        for parameter in () if self.is_exact else self._parameters:
            size = parameter.numel()
            signs = torch.randint(0, 2, (size,), generator=generator, dtype=torch.int8)
            turns = torch.randint(0, num_features, (-(-size // num_features), 1), generator=generator)
            self._signs.append((2 * signs - 1).to(device))
            self._turns.append(turns.to(device))

    def of_gradient(self) -> np.ndarray:
        """The sketch of what is in the weights' `grad` now, float32 (M,); a weight without one has the gradient 0."""
        if self.is_exact:
            kept = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]
            return torch.cat([gradient.flatten() for gradient in kept]).float().cpu().numpy()
        total_M = torch.zeros(self.num_features, dtype=torch.float64, device=self._signs[0].device)
        for parameter, signs, turns in zip(self._parameters, self._signs, self._turns, strict=True):
            if parameter.grad is not None:
                total_M += self._folded(parameter.grad.flatten(), signs, turns)
        return total_M.float().cpu().numpy()

    def _folded(self, values: torch.Tensor, signs: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
        """The sums of one weight's entries, float64 (M,)."""
        width, total_M = self.num_features, torch.zeros(self.num_features, dtype=torch.float64, device=values.device)
        places_M, rows = torch.arange(width, device=values.device), max(1, _CHUNK // width)
        for start in range(0, len(turns), rows):
            span = slice(start * width, (start + rows) * width)
            piece = values[span].float() * signs[span]
            piece_RM = torch.nn.functional.pad(piece, (0, -len(piece) % width)).view(-1, width)
            total_M += piece_RM.gather(1, (places_M + turns[start : start + rows]) % width).sum(0, dtype=torch.float64)
        return total_M


def example_gradients(model: Any, tokens: TokenRows, owners: np.ndarray, sketch: GradientSketch) -> np.ndarray:
    """The sketched gradient of each example's loss (mean cross-entropy in nats over its labels), float32 (examples, M).

    `owners`: the number of each row's example, (rows,), ascending from 0 without a gap. The model is in evaluation mode: no
    dropout; all is computed in float32.
    """
    model.eval()
    device, collate = next(model.parameters()).device, Collator(accepts_logits_to_keep(model))
    num_labels = np.bincount(owners, tokens.num_labels)
    sketches = []
    for example, count in enumerate(num_labels.tolist()):
        model.zero_grad(set_to_none=True)
        for row in np.flatnonzero(owners == example).tolist():  # row by row: an example's rows may be long
            batch = {name: tensor.to(device) for name, tensor in collate([tokens[row]]).items()}
            labels_BL = batch.pop("labels")
            token_mean_loss(model(**batch, use_cache=False), labels_BL, count).backward()
        sketches.append(sketch.of_gradient())
    model.zero_grad(set_to_none=True)
    return np.stack(sketches) if sketches else np.zeros((0, sketch.num_features), np.float32)
