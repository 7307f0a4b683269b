"""The arithmetic of training: order, batches, checkpoints, answers. What runs under Ray is in test_pipeline."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from s2l_ray.config import ProxyConfig, RunConfig
from s2l_ray.errors import ConfigError, DataError, cause_of
from s2l_ray.evaluation.scores import pattern_score, rouge_l, scorers, summarize
from s2l_ray.proxy import checkpoint_steps
from s2l_ray.training.batches import data_order, num_steps
from s2l_ray.training.checkpoints import steps_of
from s2l_ray.training.fine_tuning import Collator, token_mean_loss
from s2l_ray.training.losses import example_losses
from s2l_ray.training.models import load_model, make_model, save_model
from s2l_ray.training.tokenizers import check_own_tokenizer, split_revision
from s2l_ray.trajectories.stage import check_finite, models_together

from .test_losses import make, rows

IDS = [f"id-{i}" for i in range(50)]


def proxy(**values: object) -> ProxyConfig:
    return ProxyConfig.model_validate({"model": "small", **values})


# --- order ---------------------------------------------------------------------------------------------------------


def test_every_epoch_sees_every_example_once_in_another_order():
    order = data_order(IDS, num_steps(len(IDS), 3, 10), 10, seed=1)
    epochs = order.reshape(3, 50)
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs.tolist())
    assert epochs[0].tolist() != epochs[1].tolist()


def test_the_order_depends_on_seed_and_ids_and_not_on_positions():
    order = [IDS[i] for i in data_order(IDS, num_steps(len(IDS), 1, 10), 10, seed=1)]
    shuffled = IDS[::-1]
    assert [shuffled[i] for i in data_order(shuffled, num_steps(len(shuffled), 1, 10), 10, seed=1)] == order
    assert [IDS[i] for i in data_order(IDS, num_steps(len(IDS), 1, 10), 10, seed=2)] != order


def test_the_papers_run_has_6141_steps():
    assert num_steps(262_040, 3, 128) == 6141


@pytest.mark.parametrize("architecture", ["gpt_neox", "llama"])
def test_the_gradient_equals_that_of_transformers_own_loss(architecture):
    """Logits at predicting positions only, without an attention mask: the same gradient as the plain path."""
    model = make(architecture)
    tokens = rows(np.random.default_rng(7), 9)
    batch = Collator(restrict_logits=True)([tokens[i] for i in range(len(tokens))])
    labels = batch.pop("labels")
    token_mean_loss(model(**batch), labels).backward()
    ours = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    lengths = torch.from_numpy(tokens.lengths)
    mask = (torch.arange(labels.shape[1]) < lengths[:, None]).long()
    plain = model(input_ids=batch["input_ids"], attention_mask=mask, labels=labels).loss
    plain.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(ours[name], parameter.grad, atol=1e-5, rtol=1e-4)


# --- checkpoints ---------------------------------------------------------------------------------------------------


def test_checkpoints_stand_at_equal_fractions():
    assert checkpoint_steps(proxy(num_checkpoints=12), 6141)[:2] == [512, 1024]
    assert checkpoint_steps(proxy(num_checkpoints=4), 10) == [2, 5, 8, 10]
    assert checkpoint_steps(proxy(num_checkpoints=2, include_untrained=True), 10) == [0, 5, 10]


@given(st.integers(1, 40), st.integers(1, 5000))
def test_checkpoints_are_distinct_ascending_and_end_with_the_last_step(count, steps):
    if steps < count:
        with pytest.raises(ConfigError, match="num_checkpoints"):
            checkpoint_steps(proxy(num_checkpoints=count), steps)
        return
    kept = checkpoint_steps(proxy(num_checkpoints=count), steps)
    assert kept == sorted(set(kept))
    assert (len(kept), kept[-1]) == (count, steps)


def test_checkpoints_every_so_many_steps_include_the_last():
    assert checkpoint_steps(proxy(checkpoint_every_steps=500), 1600) == [500, 1000, 1500, 1600]
    assert checkpoint_steps(proxy(checkpoint_every_steps=500), 1000) == [500, 1000]
    assert checkpoint_steps(proxy(checkpoint_every_steps=500), 100) == [100]


def test_the_steps_of_given_checkpoints_come_from_their_names_if_these_ascend():
    assert steps_of(["run/step-000500", "run/step-001000/"]) == [500, 1000]
    assert steps_of(["EleutherAI/pythia-70m@step512", "EleutherAI/pythia-70m@step1000"]) == [512, 1000]
    assert steps_of(["b-2", "a-1"]) == [1, 2]
    assert steps_of(["first", "second"]) == [1, 2]
    assert split_revision("EleutherAI/pythia-70m@step512") == ("EleutherAI/pythia-70m", "step512")
    assert split_revision("some/path") == ("some/path", None)


def test_a_workers_memory_decides_how_many_checkpoints_are_scored_in_one_pass():
    assert models_together(70_000_000) >= 12
    assert models_together(300_000_000) == 3
    assert models_together(10**11) == 1


def test_a_loss_that_is_not_finite_is_named_with_example_and_step():
    losses = np.array([1.0, np.nan, np.inf, 2.0], np.float32)
    with pytest.raises(DataError, match=r"2 losses at step 20 .*\(b, c\).*learning_rate"):
        check_finite(losses, pa.chunked_array([["a", "b", "c", "d"]]), 20, "float32")
    with pytest.raises(DataError, match=r"or score in float32"):
        check_finite(losses, pa.chunked_array([["a", "b", "c", "d"]]), 20, "bfloat16")


# --- models --------------------------------------------------------------------------------------------------------


def test_a_saved_model_is_safetensors_and_gives_the_same_losses(tmp_path):
    model, tokens = make("gpt_neox"), rows(np.random.default_rng(3), 8)
    save_model(model, SimpleNamespace(save_pretrained=lambda folder: None), tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
    loaded = load_model(tmp_path)
    np.testing.assert_array_equal(
        example_losses(loaded, tokens, tokens_per_batch=512), example_losses(model, tokens, tokens_per_batch=512)
    )


class _Tokenizer:
    eos_token_id = 0

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size


def test_a_model_from_scratch_follows_its_seed_and_its_vocabulary_is_rounded_up():
    config = proxy(model={"scratch": {"layers": 1, "hidden": 16}}, seed=3)
    first, second = (make_model(config, _Tokenizer(300)) for _ in range(2))
    assert first.get_input_embeddings().weight.shape == (320, 16)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_model_that_cannot_be_used_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match=r"model '.*nowhere': cannot be loaded"):
        load_model(tmp_path / "nowhere")
    make("llama").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="vocabulary has 320 entries, the tokenizer 400"):
        load_model(tmp_path, _Tokenizer(400))
    with pytest.raises(ConfigError, match="not a model type"):
        make_model(proxy(model={"scratch": {"architecture": "gtp", "layers": 1, "hidden": 8}}), _Tokenizer(300))


# --- evaluation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ("so The answer is 72", 1),
        ("The answer is 5. No: The answer is 72.0.", 1),
        ("The answer is $72", 1),
        ("The answer is 7", 0),
        ("72", 0),
    ],
)
def test_the_last_answer_counts_and_numbers_are_compared_as_numbers(response, score):
    assert pattern_score("The answer is (.+?)(?:\\. |$)", response, "working. The answer is 72") == score


def test_a_reference_without_an_answer_is_not_scored():
    assert pattern_score("The answer is (.+)", "The answer is 3", "no idea") is None


def test_losses_are_averaged_over_tokens_and_over_sources():
    made = [("a", 1.0, 10, '{"exact_match": 1.0}'), ("a", 3.0, 30, '{"exact_match": 0.0}'), ("b", 2.0, 20, None)]
    names = ("source", "loss", "num_response_tokens", "scores")
    found = summarize([dict(zip(names, row, strict=True)) for row in made], config().evaluation)
    assert found["loss_per_token"] == pytest.approx((10 + 90 + 40) / 60)
    assert found["loss_by_source"] == {"a": pytest.approx(2.5), "b": pytest.approx(2.0)}
    assert found["loss_macro"] == pytest.approx(2.25)
    assert found["tasks"] == {"a": {"exact_match": 0.5, "rows": 2}}


def test_summaries_are_scored_by_rouge_and_bleu():
    text = "the patient has a fever and takes aspirin"
    assert rouge_l(text, text) == 1
    assert 0 < rouge_l("the patient has a cold", text) < 1
    row = {"source": "notes", "loss": 1.0, "num_response_tokens": 1, "reference": text, "prediction": text}
    score = scorers(config(summary_sources=["notes"]))
    assert score is not None
    assert score({"source": "notes", "response": text}, text) == {"rougeL": 1.0}
    found = summarize([row | {"scores": '{"rougeL": 1.0}'}], config(summary_sources=["notes"]).evaluation)
    assert found["tasks"]["notes"] == {"rougeL": 1.0, "bleu": pytest.approx(100.0), "rows": 1}


def test_reasoning_gym_answers_are_scored_by_its_own_scorers():
    import json

    import reasoning_gym

    entry = reasoning_gym.create_dataset("gcd", size=1, seed=0)[0]
    dataset = {"reasoning_gym": {"tasks": {"gcd": {"size": 1}}}}
    score = scorers(config(examples={"dataset": dataset}))
    assert score is not None
    original = {"question": entry["question"], "answer": entry["answer"], "metadata": json.dumps(entry["metadata"])}
    row = {"source": "gcd", "original": original}
    assert score(row, f" {entry['answer']}\n") == {"exact_match": 1.0}
    assert score(row, "999") == {"exact_match": 0.0}


def config(examples: dict[str, object] | None = None, **evaluation: object) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "run",
            "examples": examples or {"dataset": "corpus.jsonl"},
            "proxy": {"model": "small"},
            "selection": {"budget": 10},
            "target": {"model": "large"},
            "evaluation": evaluation,
        }
    )


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda weights: {name: value for name, value in weights.items() if "dense_4h" not in name}, "lack 4 weights"),
        (lambda weights: {f"base.{name}": value for name, value in weights.items()}, "lack"),
        (lambda weights: {name: value[:-1] for name, value in weights.items()}, "cannot be loaded|lack"),
    ],
)
def test_a_checkpoint_that_lacks_weights_is_refused_not_made_up(tmp_path, damage, named):
    from safetensors.torch import load_file, save_file

    model = make("gpt_neox")
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({name: value.contiguous() for name, value in damage(load_file(file)).items()}, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=named):
        load_model(tmp_path)


@pytest.mark.parametrize("content", [b"", b"garbage", None])
def test_a_checkpoint_whose_file_is_damaged_is_refused(tmp_path, content):
    make("gpt_neox").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000] if content is None else content)
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_model(tmp_path)


def test_checkpoints_of_another_tokenizer_are_refused(tmp_path):
    from .test_tokens import tokenizer

    tokenizer().save_pretrained(tmp_path / "same")
    other = tokenizer()
    other.add_tokens(["more"])
    other.save_pretrained(tmp_path / "other")
    (tmp_path / "none").mkdir()
    check_own_tokenizer(str(tmp_path / "same"), None, tokenizer())
    check_own_tokenizer(str(tmp_path / "none"), None, tokenizer())
    count = len(tokenizer())
    with pytest.raises(ConfigError, match=f"{count + 1} entries, not the run's of {count}"):
        check_own_tokenizer(str(tmp_path / "other"), None, tokenizer())


def test_an_error_of_a_ray_task_keeps_its_own_words():
    from ray.exceptions import RayTaskError

    inner = ConfigError("lower it")
    wrapped = RayTaskError("task", "Traceback ...", inner).as_instanceof_cause()
    assert isinstance(wrapped, ConfigError)
    assert cause_of(wrapped) is inner
