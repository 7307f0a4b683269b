"""Per-example losses: what every trajectory is made of."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from s2l_ray.config import Scratch
from s2l_ray.training import losses, varlen_attention
from s2l_ray.training.flops import scoring_flops
from s2l_ray.training.losses import batches, example_losses, tiled_cross_entropy
from s2l_ray.training.models import scratch_config
from s2l_ray.training.output_head import Head, hidden_states
from s2l_ray.training.token_rows import TokenRows

VOCAB = 320
# Among them soft-capped logits (gemma2), scaled ones (cohere, granite) and an output layer with a bias (phi).
ARCHITECTURES = ["gpt_neox", "llama", "gpt2", "qwen2", "gemma2", "cohere", "granite", "phi"]


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


def test_the_loss_of_an_example_of_several_rows_is_the_mean_over_the_labels_of_all_of_them():
    model, tokens = make("llama"), rows(np.random.default_rng(7), 12)
    owners = np.repeat(np.arange(5), [1, 4, 1, 3, 3])
    each = example_losses(model, tokens, tokens_per_batch=512).astype(np.float64)
    expected = np.bincount(owners, each * tokens.num_labels) / np.bincount(owners, tokens.num_labels)
    found = example_losses(model, tokens, tokens_per_batch=512, owners=owners)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert found[[0, 2]].tobytes() == each.astype(np.float32)[[0, 5]].tobytes(), "an example of one row has that row's loss"


def test_the_same_rows_give_the_same_bytes():
    model, tokens = make("gpt_neox"), rows(np.random.default_rng(3), 50)
    first, second = (example_losses(model, tokens, tokens_per_batch=512) for _ in range(2))
    assert first.tobytes() == second.tobytes()


def test_every_row_is_in_one_batch_and_batches_keep_their_limit():
    tokens = rows(np.random.default_rng(4), 200)
    made = list(batches(tokens, 256, 100))
    labels = np.bincount(np.concatenate([batch.rows_P for batch in made]), minlength=200)
    np.testing.assert_array_equal(labels, tokens.num_labels)
    for batch in made:
        is_alone = len(batch.ids_BL) == 1
        assert is_alone or (batch.ids_BL.numel() <= 256 and len(batch.labels_P) <= 100)
        assert len(batch.rows_P) == len(batch.positions_P) == len(batch.labels_P)
    assert sum(len(batch.ids_BL) for batch in made) == 200


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


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tile", [(1, 320), (7, 100), (1024, 1024)])
def test_tiles_of_any_size_give_the_cross_entropy_of_the_whole_logits(monkeypatch, architecture, tile):
    monkeypatch.setattr(losses, "CPU_TILE", tile)
    model, tokens = make(architecture), rows(np.random.default_rng(7), 6)
    head = Head.of(model)
    assert head is not None
    batch = next(batches(tokens, 10_000))
    with torch.no_grad():
        hidden_PH = hidden_states(model, batch.ids_BL).flatten(0, 1)[batch.positions_P]
        logits_PV = model(input_ids=batch.ids_BL).logits.flatten(0, 1)[batch.positions_P]
        expected = torch.nn.functional.cross_entropy(logits_PV, batch.labels_P, reduction="none")
        np.testing.assert_allclose(tiled_cross_entropy(head, hidden_PH, batch.labels_P), expected, atol=1e-5)


def test_a_model_with_dropout_is_scored_without_it_and_its_output_layer_is_left_alone():
    model, tokens = make("gpt2"), rows(np.random.default_rng(8), 5)
    model.train()
    first = example_losses(model, tokens, tokens_per_batch=512)
    np.testing.assert_array_equal(first, example_losses(model, tokens, tokens_per_batch=512))
    assert model.lm_head.weight.shape == (VOCAB, 32)
    assert model(input_ids=torch.ones(1, 3, dtype=torch.int64)).logits.shape == (1, 3, VOCAB)


def test_a_forward_whose_logits_depend_on_more_than_the_hidden_states_is_not_taken_apart():
    model, tokens = make("llama"), rows(np.random.default_rng(9), 8)
    expected = reference_losses(model, tokens)
    first = model.forward

    def forward(*args: object, **options: object) -> object:
        outputs = first(*args, **options)
        outputs.logits = outputs.logits + (1 if options.get("input_ids") is not None else 0) * torch.arange(VOCAB) / VOCAB
        return outputs

    model.forward = forward
    assert Head.of(model) is None
    assert np.abs(example_losses(model, tokens, tokens_per_batch=512) - expected).max() > 0.01


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "mixtral", "qwen3"])
def test_packed_rows_have_the_losses_of_rows_alone(monkeypatch, architecture):
    """The GPU's way, with the kernel's work done row by row."""
    model, tokens = make(architecture), rows(np.random.default_rng(10), 30)
    expected, seen = reference_losses(model, tokens), []
    attend = varlen_attention._attend
    monkeypatch.setattr(varlen_attention, "_attend", lambda *args: seen.append(1) or attend(*args))
    monkeypatch.setattr(losses, "is_fused", lambda device, dtype: True)
    np.testing.assert_allclose(example_losses(model, tokens, tokens_per_batch=300), expected, atol=1e-5)
    assert bool(seen) == (architecture != "gemma2"), "soft-capped attention is left alone"


@pytest.mark.parametrize("architecture", ["mistral", "qwen2_moe"])
def test_attention_to_a_window_is_left_alone(monkeypatch, architecture):
    model, tokens = make(architecture), rows(np.random.default_rng(11), 10)
    model.config.sliding_window, model.config.use_sliding_window = 4, True
    monkeypatch.setattr(losses, "is_fused", lambda device, dtype: True)
    np.testing.assert_allclose(example_losses(model, tokens, tokens_per_batch=300), reference_losses(model, tokens), atol=1e-5)


def test_a_scored_model_generates_and_trains_as_before(monkeypatch):
    model, tokens = make("llama"), rows(np.random.default_rng(12), 5)
    padded = {"input_ids": torch.tensor([[0, 0, 5, 6, 7]]), "attention_mask": torch.tensor([[0, 0, 1, 1, 1]])}
    before = model(**padded).logits, model.generate(**padded, max_new_tokens=5, do_sample=False, pad_token_id=0)
    monkeypatch.setattr(losses, "is_fused", lambda device, dtype: True)
    example_losses(model, tokens, tokens_per_batch=300)
    after = model(**padded).logits, model.generate(**padded, max_new_tokens=5, do_sample=False, pad_token_id=0)
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one, other, atol=0, rtol=0)


@pytest.mark.parametrize("bias", [-1e4, -1e9])
def test_a_vocabulary_entry_that_is_masked_by_its_bias_costs_no_digits(bias):
    model, tokens = make("phi"), rows(np.random.default_rng(13), 10)
    with torch.no_grad():
        model.lm_head.bias[0] = bias
    np.testing.assert_allclose(example_losses(model, tokens, tokens_per_batch=300), reference_losses(model, tokens), atol=1e-5)


def test_a_rotary_embedding_that_looks_at_the_longest_row_sees_rows_of_one_length_only():
    model, tokens = make("llama"), rows(np.random.default_rng(14), 20)
    factors = {"long_factor": [4.0] * 4, "short_factor": [1.0] * 4, "original_max_position_embeddings": 16}
    model.config.rope_parameters = {"rope_type": "longrope", "rope_theta": 1e4, **factors}
    model = type(model)(model.config).eval()
    np.testing.assert_allclose(
        example_losses(model, tokens, tokens_per_batch=100_000), reference_losses(model, tokens), atol=1e-5
    )


def test_flops_count_the_output_layer_for_labels_and_the_backbone_for_tokens():
    model = make("gpt_neox")
    layer = 32 * 96 + 32 * 32 + 2 * 32 * 128
    pairs = 6 + 10  # of a token and one not after it, in rows of 3 and 4
    needed = 7 * 2 * layer + 2 * 2 * 32 * pairs + 3 * VOCAB * 32
    assert scoring_flops(model, np.array([3, 4]), num_labels=3) == 2 * needed
