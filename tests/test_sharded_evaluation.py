"""A target that fits no single device is evaluated all the same: losses and answers are those of the whole model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from s2l_ray.config import TrainedTokenizer
from s2l_ray.evaluation.generation import generate
from s2l_ray.evaluation.stage import build
from s2l_ray.storage.artifacts import Artifact, Key
from s2l_ray.storage.drafts import Draft
from s2l_ray.storage.layout import MODEL_RECORD, TOKENIZER
from s2l_ray.storage.places import Storage
from s2l_ray.training.losses import example_losses
from s2l_ray.training.models import Held, load_model
from s2l_ray.training.output_head import Head
from s2l_ray.training.token_rows import TokenRows
from s2l_ray.training.tokenizers import train_tokenizer
from tests.building import context_of

from .test_large_targets import adapted
from .test_losses import make, rows

NUMBERS: Any = SimpleNamespace(
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
    return generate(model.eval(), NUMBERS, prompts, 8)


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


# --- the stage -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    """Held-out sums, a tokenizer, and a target that was trained on nothing."""
    folder = tmp_path_factory.mktemp("inputs")
    run = Storage(str(folder / "run"))
    count = 48
    columns = {
        "example_id": [f"row-{i:02d}" for i in range(count)],
        "source": ["sums", "counts"] * (count // 2),
        "prompt": [f"count {i}: " for i in range(count)],
        "response": ["ab " * (1 + i % 7) + f"The answer is {i}" for i in range(count)],
        "split": ["pool", "pool", "held_out"] * (count // 3),
    }
    examples = Draft.open(run, Key("examples", 1, {}, {}))
    examples.write_table("part-00000.parquet", pa.table(columns).slice(0, 24))
    examples.write_table("part-00001.parquet", pa.table(columns).slice(24))
    made = examples.publish({"rows": count, "held_out": count // 3})
    tokenizer = train_tokenizer(TrainedTokenizer(vocab_size=300), made)
    proxy = Draft.open(run, Key("proxy", 1, {}, {}))
    tokenizer.save_pretrained(folder / "tokenizer")
    proxy.add(*proxy.storage.upload(folder / "tokenizer", TOKENIZER))
    target = Draft.open(run, Key("target", 1, {}, {}))
    make("llama").save_pretrained(folder / "model", max_shard_size="50KB")
    target.add(*target.storage.upload(folder / "model", "model"))
    target.write(f"model/{MODEL_RECORD}", b"{}")
    return {
        "examples": made,
        "proxy": proxy.publish({}),
        "target": target.publish({"num_parameters": make("llama").num_parameters()}),
    }


SCRATCH = {"architecture": "llama", "layers": 2, "hidden": 32, "heads": 4, "max_positions": 128}


def evaluated(folder: Path, inputs: dict[str, Artifact], **machines: Any) -> Artifact:
    draft = Draft.open(Storage(str(folder)), Key("evaluation", 1, {}, {}))
    sections = {
        "evaluation": {"answer_pattern": "The answer is (.+)", "max_new_tokens": 8},
        "target": {"model": {"scratch": SCRATCH}, "max_tokens": 64, "zero_stage": 0},
        "machines": {"evaluation": {"num_workers": 1, **machines}},
    }
    return build(context_of(draft, inputs, **sections))


def losses_and_answers(artifact: Artifact) -> tuple[np.ndarray, list[str]]:
    predictions = artifact.read_bytes("predictions.jsonl").decode().splitlines()
    return artifact.read_table("losses.parquet")["loss"].to_numpy(), predictions


def test_an_evaluation_within_a_memory_limit_gives_what_one_without_gives_and_its_manifest_says_how(
    tmp_path, ray_session, inputs, caplog
):
    whole = evaluated(tmp_path / "whole", inputs)
    with caplog.at_level("INFO"):
        spread = evaluated(tmp_path / "spread", inputs, max_memory={"cpu": 0.0001})
    assert whole.manifest["provenance"]["machines"]["sharding"]["kind"] == "none"
    assert spread.manifest["provenance"]["machines"]["sharding"]["kind"] == "device_map"
    assert [line for line in caplog.messages if line.startswith("sharding: device_map")]
    (expected, answers), (found, same) = map(losses_and_answers, (whole, spread))
    assert len(found) == 2 * whole.summary["rows"] > 0
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert same == answers
    assert answers
