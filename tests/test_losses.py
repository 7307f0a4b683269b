"""Per-example losses: what every trajectory is made of."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from s2l_ray.config import Scratch
from s2l_ray.training.losses import batches, example_losses, predicting_logits
from s2l_ray.training.models import scratch_config
from s2l_ray.training.tokens import TokenRows

VOCAB = 320
ARCHITECTURES = ["gpt_neox", "llama", "gpt2", "qwen2"]


def make(architecture: str, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    shape = Scratch(architecture=architecture, layers=2, hidden=32, heads=4, max_positions=128)
    model = AutoModelForCausalLM.from_config(scratch_config(shape, VOCAB, 0))
    for parameter in model.parameters():  # far from the start, so that a wrong position shows
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval()


def rows(rng: np.random.Generator, count: int, longest: int = 60) -> TokenRows:
    made = []
    for _ in range(count):
        length = int(rng.integers(2, longest))
        marks = np.arange(length) >= int(rng.integers(1, length))
        made.append((rng.integers(1, VOCAB, length).astype(np.int32), marks))
    return TokenRows.of(made)


def reference_losses(model: torch.nn.Module, tokens: TokenRows) -> np.ndarray:
    """transformers' own loss, one example at a time, the prompt masked."""
    losses = []
    for ids, is_label in (tokens[i] for i in range(len(tokens))):
        input_ids = torch.from_numpy(ids.astype(np.int64))[None]
        labels = input_ids.masked_fill(~torch.from_numpy(is_label)[None], -100)
        with torch.no_grad():
            losses.append(float(model(input_ids=input_ids, labels=labels).loss))
    return np.array(losses)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tokens_per_batch", [1, 300, 100_000])
def test_a_loss_equals_transformers_own_at_batch_one_whatever_the_batch(architecture, tokens_per_batch):
    model, tokens = make(architecture), rows(np.random.default_rng(1), 40)
    np.testing.assert_allclose(
        example_losses(model, tokens, tokens_per_batch=tokens_per_batch), reference_losses(model, tokens), atol=1e-5
    )


def test_a_loss_does_not_depend_on_the_neighbours():
    model, tokens = make("llama"), rows(np.random.default_rng(2), 30)
    together = example_losses(model, tokens, tokens_per_batch=2048)
    some = np.array([3, 17, 5])
    np.testing.assert_allclose(example_losses(model, tokens.take(some), tokens_per_batch=2048), together[some], atol=1e-5)


def test_the_same_rows_give_the_same_bytes():
    model, tokens = make("gpt_neox"), rows(np.random.default_rng(3), 50)
    first, second = (example_losses(model, tokens, tokens_per_batch=512) for _ in range(2))
    assert first.tobytes() == second.tobytes()


def test_every_row_is_in_one_batch_and_batches_keep_their_limit():
    tokens = rows(np.random.default_rng(4), 200)
    made = list(batches(tokens, 256, VOCAB))
    assert sorted(np.concatenate([batch.rows for batch in made]).tolist()) == list(range(200))
    assert all(batch.ids_BL.numel() <= 256 or len(batch.rows) == 1 for batch in made)
    for batch in made:
        assert int(batch.predicts_BL.sum()) == int(tokens.num_labels[batch.rows].sum()) == len(batch.labels_P)


def test_a_model_that_cannot_restrict_its_logits_gives_the_same_losses():
    model, tokens = make("llama"), rows(np.random.default_rng(5), 12)

    class Full(torch.nn.Module):
        """The same model behind a forward without `logits_to_keep`."""

        def __init__(self) -> None:
            super().__init__()
            self.inner, self.config = model, model.config

        def forward(self, input_ids: torch.Tensor) -> object:
            return self.inner(input_ids=input_ids)

    restricted = example_losses(model, tokens, tokens_per_batch=512)
    np.testing.assert_allclose(example_losses(Full(), tokens, tokens_per_batch=512), restricted, atol=1e-5)


def test_bfloat16_losses_are_close_and_finite():
    model, tokens = make("gpt_neox"), rows(np.random.default_rng(6), 30)
    exact = example_losses(model, tokens, tokens_per_batch=512)
    rounded = example_losses(model, tokens, tokens_per_batch=512, precision="bfloat16")
    assert np.isfinite(rounded).all()
    assert 0 < np.abs(rounded - exact).mean() < 0.05


def test_logits_are_those_of_the_position_before_the_label():
    model = make("gpt2")
    ids = torch.tensor([[5, 6, 7, 8]])
    predicts = torch.tensor([[False, True, False, False]])
    with torch.no_grad():
        expected = model(input_ids=ids).logits[0, 1]
        np.testing.assert_allclose(predicting_logits(model, ids, predicts)[0], expected, atol=1e-5)
