"""A target that fits no single device is evaluated all the same: losses and answers are those of the whole model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken

from s2l_ray.config import EvaluationWorkerConfig, RunConfig, TrainedTokenizer
from s2l_ray.evaluation.generation import generate
from s2l_ray.evaluation.sharding import Fleet, Sharding, decide, evaluation_need
from s2l_ray.evaluation.stage import build
from s2l_ray.runtime.workers import Workers
from s2l_ray.storage.artifacts import Artifact, Key
from s2l_ray.storage.drafts import Draft
from s2l_ray.storage.layout import MODEL_RECORD, TOKENIZER
from s2l_ray.storage.places import Storage
from s2l_ray.training.losses import example_losses
from s2l_ray.training.models import Held, load_model
from s2l_ray.training.output_head import Head
from s2l_ray.training.shapes import Shape
from s2l_ray.training.token_rows import TokenRows
from s2l_ray.training.tokenizers import train_tokenizer
from s2l_ray.training.tokens import ends_of_answers
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


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox"])
def test_weights_held_in_bfloat16_take_half_and_give_the_same_losses_wherever_they_are(tmp_path, architecture):
    make(architecture).save_pretrained(tmp_path / "model")
    whole = load_model(tmp_path / "model", held=Held("bfloat16")).eval()
    assert num_bytes(whole) == num_bytes(make(architecture)) // 2
    assert Head.of(whole) is not None
    spread = load_model(tmp_path / "model", held=Held("bfloat16", {"cpu": num_bytes(whole) // 2}, folder=tmp_path)).eval()
    of_whole, of_spread = (example_losses(one, tokens(), tokens_per_batch=256, precision="bfloat16") for one in (whole, spread))
    np.testing.assert_allclose(of_spread, of_whole, rtol=0, atol=1e-5)
    np.testing.assert_allclose(of_whole, losses(make(architecture)), rtol=0, atol=0.2)  # weights of 8 bits, far from the start


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


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_workers_that_hold_half_the_model_each_evaluate_as_one_that_holds_it_whole(tmp_path, ray_session, inputs):
    whole = evaluated(tmp_path / "whole", inputs)
    shared = evaluated(tmp_path / "shared", inputs, sharding="zero3", num_workers=2)
    assert shared.manifest["provenance"]["machines"]["sharding"]["kind"] == "zero3"
    (expected, answers), (found, same) = map(losses_and_answers, (whole, shared))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert same == answers


# --- where the weights go ------------------------------------------------------------------------------------------

LLAMA_70B = Shape(70.6e9, 8192, 80, 128_256, 28_672, is_gated=True, key_value=1024)
NODE = Fleet(1e12, (64,), (8,), 80e9)


def decided(shape: Shape, fleet: Fleet, workers: Workers, **machines: Any) -> tuple[Sharding, Workers]:
    values = {"examples": {"dataset": "x"}, "proxy": {"model": "p"}, "selection": {"budget": 1}}
    config = RunConfig.model_validate({"name": "run", "target": {"model": "m", "precision": "bfloat16"}, **values})
    need = evaluation_need(config, shape, on_gpu=workers.gpus_per_worker > 0)
    return decide(EvaluationWorkerConfig(**machines), need, fleet, workers)


def gpus(number: int) -> Workers:
    return Workers(number, 1, 1.0, number)


def test_a_model_goes_to_one_gpu_to_those_of_a_node_or_over_nodes_whichever_is_first_enough():
    small = Shape.estimated(3e9)
    assert decided(small, NODE, gpus(8))[0].kind == "none"
    sharding, workers = decided(LLAMA_70B, NODE, gpus(8))
    assert (sharding.kind, workers.gpus_per_worker, workers.num_workers) == ("device_map", 3, 2)
    nodes = Fleet(1e12, (64,) * 4, (8,) * 4, 24e9)
    sharding, workers = decided(LLAMA_70B, nodes, gpus(32))
    assert (sharding.kind, workers.gpus_per_worker, workers.num_workers) == ("zero3", 1, 32)
    sharding, workers = decided(LLAMA_70B, Fleet(1e12, (64,), (8,), 24e9), gpus(8))
    assert (sharding.kind, workers.gpus_per_worker, workers.num_workers) == ("device_map", 8, 1)
    assert sharding.max_memory(8) is not None
    assert sharding.cpu_bytes > 0, "the rest is in the machine's memory"


def test_without_gpus_as_many_workers_start_as_the_memory_holds_models():
    node = Fleet(64e9, (16,))
    auto, two = Workers(16, 1, 0.0, 16), Workers(2, 1, 0.0, 2)
    shape = Shape(3e9, 2560, 32, 50_000, 10_240, is_gated=False, key_value=640)
    sharding, workers = decided(shape, node, auto)
    assert sharding.kind == "none"
    assert 1 < workers.num_workers < 8
    assert workers.num_workers * workers.cpus_per_worker <= 16
    sharding, workers = decided(LLAMA_70B, node, auto)
    assert (sharding.kind, workers.num_workers, workers.cpus_per_worker) == ("device_map", 1, 16)
    assert 0 < sharding.cpu_bytes < 64e9
    assert decided(shape, node, two, num_workers=2)[1] == two, "a number that was given stays"


@given(st.floats(1e6, 1e12), st.floats(1e9, 2e11), st.integers(1, 8), st.integers(1, 8))
def test_what_is_chosen_holds_the_model_by_the_same_formula(parameters, gpu_bytes, nodes, per_node):
    shape, fleet = Shape.estimated(parameters), Fleet(1e15, (8,) * nodes, (per_node,) * nodes, gpu_bytes)
    sharding, workers = decided(shape, fleet, gpus(nodes * per_node))
    weights = 2 * parameters
    if sharding.kind == "none":
        assert weights < gpu_bytes
    elif sharding.kind == "zero3":
        assert nodes > 1
        assert weights < gpu_bytes * workers.num_workers
    else:
        assert 1 <= workers.gpus_per_worker <= per_node
        assert sharding.gpu_bytes * workers.gpus_per_worker + sharding.cpu_bytes >= weights
    assert 1 <= workers.num_workers * workers.gpus_per_worker <= nodes * per_node


def test_answers_end_where_the_rows_teach_them_to_end():
    special = {0: AddedToken("</s>", special=True), 7: AddedToken("<end>", special=True)}
    tokenizer = SimpleNamespace(added_tokens_decoder=special)
    whole, cut = ([1, 2, 7], [False, True, True]), ([1, 5], [False, True])
    taught = TokenRows.of([(np.array(ids, np.int32), np.array(marks)) for ids, marks in (whole, cut)])
    assert ends_of_answers(tokenizer, taught) == {7}, "a row that was cut ends with a word"
    model = make("llama")
    (answer,) = generate(model, NUMBERS, [[3, 4]], 8)
    third = int(answer.split()[2])
    assert generate(model, NUMBERS, [[3, 4]], 8, {third}) == [" ".join(answer.split()[: answer.split().index(str(third)) + 1])]
