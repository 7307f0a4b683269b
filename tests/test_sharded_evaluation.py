"""A target that fits no single device is evaluated all the same: losses and answers are those of the whole model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from s2l_ray.evaluation.generation import generate
from s2l_ray.training.losses import example_losses
from s2l_ray.training.models import Held, load_model
from s2l_ray.training.output_head import Head
from s2l_ray.training.token_rows import TokenRows

from .test_large_targets import adapted
from .test_losses import make, rows

TOKENIZER: Any = SimpleNamespace(
    pad_token_id=0,
    eos_token_id=0,
    batch_decode=lambda ids_BL, **_: [" ".join(map(str, row)) for row in ids_BL.tolist()],
)


def num_bytes(model: Any) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in {*model.parameters()})


def places(model: Any) -> set[str]:
    return {str(place) for place in model.hf_device_map.values()}


def tokens() -> TokenRows:
    return rows(np.random.default_rng(3), 24)


def losses(model: Any) -> np.ndarray:
    return example_losses(model.eval(), tokens(), tokens_per_batch=256)


def answers(model: Any) -> list[str]:
    prompts = [tokens()[row][0][:5].tolist() for row in range(6)]
    return generate(model.eval(), TOKENIZER, prompts, 8)


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "gpt2"])
@pytest.mark.parametrize("share", [0.7, 0.0])
def test_a_model_that_memory_does_not_hold_gives_the_losses_and_answers_of_the_whole_one(tmp_path, architecture, share):
    whole = make(architecture)
    whole.save_pretrained(tmp_path / "model", max_shard_size="50KB")
    held = Held(max_memory={"cpu": int(share * num_bytes(whole))}, folder=tmp_path)
    spread = load_model(tmp_path / "model", held=held)
    assert "disk" in places(spread)
    assert ("cpu" in places(spread)) == (share > 0)
    assert Head.of(spread.eval()) is not None, "the output layer is taken apart, as that of a whole model"
    np.testing.assert_allclose(losses(spread), losses(whole), rtol=0, atol=1e-5)
    assert answers(spread) == answers(whole)
    assert all(parameter.is_meta for name, parameter in spread.named_parameters() if share == 0), "nothing stays in memory"


@pytest.mark.parametrize("names", [["q_proj", "down_proj"], ["embed_tokens", "lm_head", "v_proj"]])
def test_an_adapter_is_merged_a_file_at_a_time_into_what_peft_merges(tmp_path, names):
    model, _ = adapted(tmp_path / "base", target_modules=names)
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "base" / "model.safetensors").unlink()
    make("llama").save_pretrained(tmp_path / "base", max_shard_size="50KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 2
    whole = load_model(tmp_path / "adapter")
    spread = load_model(tmp_path / "adapter", held=Held(max_memory={"cpu": num_bytes(whole) // 2}, folder=tmp_path))
    assert places(spread) == {"cpu", "disk"}
    np.testing.assert_allclose(losses(spread), losses(model), rtol=0, atol=1e-5)
    np.testing.assert_allclose(losses(spread), losses(whole), rtol=0, atol=1e-5)
    assert np.abs(losses(load_model(tmp_path / "base")) - losses(model)).max() > 0.01
