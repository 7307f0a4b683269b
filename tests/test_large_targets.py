"""Large targets: ZeRO, what is kept in the machine's memory, recomputed activations and adapters.

Every setting is trained on one number of workers, stopped after a resume point, gone on with on the same or on another number,
and exported: the losses, before and after, are those of a loop in plain torch, and so is the exported model. To fit many
settings into three fits the tests hand resume points over themselves; one goes the whole way, through Ray Train.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from s2l_ray.config import RunConfig, ScratchModel, TargetConfig, TargetWorkerConfig
from s2l_ray.errors import ConfigError
from s2l_ray.evaluation.stage import EvaluationJob, Evaluator
from s2l_ray.runtime.fit import fit
from s2l_ray.runtime.workers import Workers
from s2l_ray.storage.artifacts import Key
from s2l_ray.storage.drafts import Draft
from s2l_ray.storage.layout import MODEL_RECORD
from s2l_ray.storage.places import Storage
from s2l_ray.storage.records import FileRecord
from s2l_ray.target import TargetJob, build, train_target
from s2l_ray.training.adapters import merged, with_adapters
from s2l_ray.training.losses import example_losses
from s2l_ray.training.models import check_ahead, load_model, make_model, save_model, scratch_config
from s2l_ray.training.token_pools import pool_tokens
from s2l_ray.training.token_rows import RowLimit
from tests.building import CORPUS, context_of

from .test_losses import make, rows
from .test_resume import ZERO, Bench, bench, plain_training, sum_of_losses  # noqa: F401 - bench is a fixture

STOP = 4
STEPS = 10
TOLERANCE = 1e-5


# --- adapters, without workers -------------------------------------------------------------------------------------


def adapted(folder: Path, *, base_is_there: bool = False, **lora: Any) -> tuple[Any, TargetConfig]:
    """A model with adapters that change its output; its base lies in `folder`."""
    if not base_is_there:
        make("llama").save_pretrained(folder)
    config = TargetConfig.model_validate({"model": str(folder), "lora": {"rank": 4, "alpha": 12, **lora}})
    return changed_adapters(with_adapters(load_model(folder), config)), config


def changed_adapters(model: Any) -> Any:
    """The model with adapters that change its output, as training would."""
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_embedding" in name:
            parameter.data = 0.1 * torch.randn_like(parameter)
    return model.eval()


def test_adapters_merge_into_the_weights_that_peft_merges_and_give_the_same_losses(tmp_path):
    model, _ = adapted(tmp_path / "base", target_modules=["q_proj", "down_proj"])
    model.save_pretrained(tmp_path / "adapter")
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    base = load_model(tmp_path / "base")
    names = [name for name, _ in base.named_parameters()]
    before = {name: value.clone() for name, value in base.state_dict().items()}
    ours = merged(base, tmp_path / "adapter")
    save_model(ours, SimpleNamespace(save_pretrained=lambda folder: None), tmp_path / "merged")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert [name for name, _ in whole.named_parameters()] == names
    assert {path.name for path in (tmp_path / "merged").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }
    changed = set()
    for name, value in whole.state_dict().items():
        a, b = (weights.get(f"base_model.model.{name.removesuffix('.weight')}.lora_{side}.weight") for side in "AB")
        if a is not None:
            changed.add(name.split(".")[-2])
            torch.testing.assert_close(value, before[name] + 12 / 4 * b @ a)
        else:
            assert torch.equal(value, before[name])
    assert changed == {"q_proj", "down_proj"}
    tokens = rows(np.random.default_rng(3), 8)
    expected = example_losses(model, tokens, tokens_per_batch=512)
    np.testing.assert_allclose(example_losses(whole, tokens, tokens_per_batch=512), expected, rtol=0, atol=TOLERANCE)
    assert np.abs(example_losses(load_model(tmp_path / "base"), tokens, tokens_per_batch=512) - expected).max() > 0.01
    for name, value in model.merge_and_unload().state_dict().items():
        torch.testing.assert_close(whole.state_dict()[name], value, rtol=0, atol=1e-6)


def test_an_adapter_names_its_base_and_is_loaded_with_it(tmp_path):
    model, config = adapted(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == config.model
    tokens = rows(np.random.default_rng(3), 8)
    expected = example_losses(model, tokens, tokens_per_batch=512)
    for loaded in (AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval(), load_model(tmp_path / "adapter").eval()):
        np.testing.assert_allclose(example_losses(loaded, tokens, tokens_per_batch=512), expected, rtol=0, atol=TOLERANCE)


def test_an_adapter_that_is_not_whole_or_of_another_model_is_refused(tmp_path):
    model, _ = adapted(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    save_file({name: value for name, value in weights.items() if "layers.1" not in name}, file)
    with pytest.raises(ConfigError, match=r"adapter '.*': cannot be added to a LlamaForCausalLM \(.*missing"):
        load_model(tmp_path / "adapter")
    save_file({name: torch.cat([value, value], -1) for name, value in weights.items()}, file)
    with pytest.raises(ConfigError, match=r"cannot be added to a LlamaForCausalLM"):
        load_model(tmp_path / "adapter")


def test_adapters_follow_the_seed_and_are_all_that_is_trained(tmp_path):
    first, second = (adapted(tmp_path / "base")[0] for _ in range(2))
    trained = {name for name, parameter in first.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    assert all(torch.equal(first.state_dict()[name], second.state_dict()[name]) for name in trained)


def test_layers_for_adapters_that_do_not_exist_are_named_with_some_that_do(tmp_path):
    with pytest.raises(ConfigError, match=r"target_modules: query: no such layer in LlamaForCausalLM. It has .*q_proj"):
        adapted(tmp_path, target_modules=["q_proj", "query"])
    with pytest.raises(ConfigError, match=r"target.lora.target_modules=.*not supported"):
        adapted(tmp_path, target_modules=["input_layernorm"])


OUTPUT_LAYERS = {"llama": ("embed_tokens", "lm_head"), "gpt_neox": ("embed_in", "lm_head"), "gpt2": ("wte", "lm_head")}


def scratch_target(architecture: str, *, tied: bool, names: list[str] | str = "all-linear", **lora: Any) -> TargetConfig:
    scratch = {
        "architecture": architecture,
        "layers": 2,
        "hidden": 32,
        "heads": 4,
        "max_positions": 128,
        "tie_embeddings": tied,
    }
    values = {"model": {"scratch": scratch}, "lora": {"rank": 4, "alpha": 12, "target_modules": names, **lora}}
    return TargetConfig.model_validate(values)


def scratch_model(config: TargetConfig) -> Any:
    assert isinstance(config.model, ScratchModel)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(scratch_config(config.model.scratch, 320, 0))


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("architecture", OUTPUT_LAYERS)
def test_adapters_on_tied_embeddings_are_refused_by_the_layers_name_before_anything_is_started(architecture, layer):
    name = OUTPUT_LAYERS[architecture][layer]
    config = scratch_target(architecture, tied=True, names=[name])
    with pytest.raises(
        ConfigError, match=rf"target_modules: (\w+\.)?{name} of .* shares its weight with .*tie_embeddings=false"
    ):
        check_ahead(run_config(**config.model_dump(exclude_none=True)), Storage("."), {"target"})
    with pytest.raises(ConfigError, match=rf"{name} of .* shares its weight"):
        with_adapters(scratch_model(config), config)


@pytest.mark.parametrize(
    ("architecture", "tied", "names"),
    [
        *((architecture, tied, "all-linear") for architecture in OUTPUT_LAYERS for tied in (True, False)),
        *((architecture, False, [name]) for architecture, names in OUTPUT_LAYERS.items() for name in names),
        ("llama", False, ["embed_tokens", "lm_head", "q_proj"]),
    ],
)
def test_a_merged_export_gives_what_the_adapters_gave_and_keeps_what_is_tied(tmp_path, architecture, tied, names):
    config = scratch_target(architecture, tied=tied, names=names)
    check_ahead(run_config(**config.model_dump(exclude_none=True)), Storage("."), {"target"})
    model = changed_adapters(with_adapters(scratch_model(config), config))
    ids_BL = torch.arange(2, 42).reshape(2, 20)
    with torch.no_grad():
        expected = model(input_ids=ids_BL).logits
        assert (scratch_model(config).eval()(input_ids=ids_BL).logits - expected).abs().max() > 0.01
    model.save_pretrained(tmp_path / "adapter")
    whole = merged(scratch_model(config), tmp_path / "adapter")
    save_model(whole, SimpleNamespace(save_pretrained=lambda folder: None), tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids_BL).logits, expected, rtol=0, atol=TOLERANCE)
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == tied


def test_an_adapter_from_elsewhere_on_a_tied_output_layer_is_not_merged(tmp_path):
    import peft

    config = scratch_target("llama", tied=True)
    settings = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["lm_head"])
    peft.get_peft_model(scratch_model(config), settings).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"cannot be added .*lm_head shares its weight with model.embed_tokens"):
        merged(scratch_model(config), tmp_path)


def run_config(**target: Any) -> RunConfig:
    values = {"examples": {"dataset": "x"}, "proxy": {"model": "p"}, "selection": {"budget": 1}, "target": target}
    return RunConfig.model_validate({"name": "run", **values})


def test_adapters_without_peft_are_refused_before_anything_is_started(monkeypatch, tmp_path):
    draft = Draft.open(Storage(str(tmp_path)), Key("target", 1, {}, {}))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"target.lora needs peft: pip install 's2l_ray\[lora\]'"):
        build(context_of(draft, target={"model": "large", "lora": {}}))


def test_workers_ask_the_clock_a_few_times_between_two_resume_points():
    from s2l_ray.training.resume_points import steps_to_wait

    for pace in (0.001, 0.5, 7.0, 1000.0):
        step, asked = 1, 1
        while wait := steps_to_wait(600 - step * pace, pace):
            step, asked = step + wait, asked + 1
        assert 600 <= step * pace <= 600 + 2 * pace
        assert asked < 25


# --- trained, stopped, gone on with, exported ----------------------------------------------------------------------

LORA = {"rank": 4, "alpha": 8}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"zero_stage": 0, "weight_decay": 0.1},
    "plain-lora": {"zero_stage": 0, "lora": LORA, "gradient_checkpointing": True},
    "zero1": {"zero_stage": 1, "weight_decay": 0.1},
    "zero2-offload": {"zero_stage": 2, "gradient_checkpointing": True, "offload": "optimizer"},
    "zero2-adapter": {"zero_stage": 2, "lora": LORA | {"save": "adapter", "target_modules": ["query_key_value"]}},
    "zero3": {"zero_stage": 3, "weight_decay": 0.1, "gradient_checkpointing": True, "is_read": True},
    "zero3-scratch": {"zero_stage": 3},
    "zero3-lora": {"zero_stage": 3, "lora": LORA, "offload": "parameters", "gradient_checkpointing": True, "is_read": True},
    "zero3-bfloat16": {"zero_stage": 3, "precision": "bfloat16", "offload": "optimizer", "is_read": True},
    "zero3-of-adapter": {"zero_stage": 3, "is_adapter": True},
}


class Stopped(Exception):
    """A training ended on purpose."""


class Heard:
    """What the workers say, kept."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def put(self, event: Any) -> None:
        if isinstance(event, str):
            self.lines.append(event)


@dataclass(frozen=True)
class Part:
    """One training within a fit."""

    job: TargetJob
    starts: Path | None = None
    """A copy of a resume point."""

    stops: Path | None = None
    """Where a copy of the resume point of step STOP goes, with which the training ends."""

    through_ray: bool = False
    """Resume points go to Ray Train and come from it."""


def several(parts: dict[str, Part], _events: Any) -> dict[str, Any]:
    """The loop of a fit that does one training after the other; what each returned and said."""
    import time

    from s2l_ray.training.zero import make_models_whole

    done = {}
    for name, part in parts.items():
        heard = Heard()
        with substitutes(part), suppress(Stopped):
            done[name] = {"result": train_target(part.job, heard)}
        if part.stops is not None:
            make_models_whole()
            if part.through_ray:
                time.sleep(4)  # Ray Train's controller looks for what was reported every two seconds
        done[name] = done.get(name, {}) | {"heard": heard.lines}
    return done


@contextmanager
def substitutes(part: Part) -> Iterator[None]:
    """Resume points at step STOP, or at none, and in folders of the test's instead of in Ray Train's."""
    import ray.train

    from s2l_ray.training.resume_points import Recorder

    report, get_checkpoint, is_due = ray.train.report, ray.train.get_checkpoint, Recorder._is_due

    def copy(metrics: Any, checkpoint: Any = None, **options: Any) -> None:
        if part.through_ray:
            report(metrics, checkpoint=checkpoint, **options)
        elif checkpoint is not None:
            shutil.copytree(checkpoint.path, part.stops)
        torch.distributed.barrier()
        if checkpoint is not None:
            shutil.rmtree(Path(checkpoint.path).parent, ignore_errors=True)
        raise Stopped

    ray.train.report = copy
    if not part.through_ray:
        found = None if part.starts is None else ray.train.Checkpoint.from_directory(part.starts)
        ray.train.get_checkpoint = lambda: found
    Recorder._is_due = lambda self, step, steps: step == STOP and part.stops is not None
    try:
        yield
    finally:
        ray.train.report, ray.train.get_checkpoint, Recorder._is_due = report, get_checkpoint, is_due


@dataclass(frozen=True)
class Story:
    """What was trained, by setting and workers before and after the stop: `zero3 2-1`."""

    jobs: dict[str, TargetJob]
    done: dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def story(bench: Bench, ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Story:  # noqa: F811
    folder = tmp_path_factory.mktemp("large")
    base = folder / "base"
    save_model(make_model(ZERO, bench.tokenizer), bench.tokenizer, base)
    adapted_model, _ = adapted(base, target_modules=["query_key_value"], base_is_there=True)
    save_model(adapted_model, bench.tokenizer, folder / "adapter")
    jobs: dict[str, TargetJob] = {}

    def part(setting: str, workers: str, *, through_ray: bool = False, stops: bool = False) -> Part:
        values = dict(SETTINGS[setting])
        machines = TargetWorkerConfig(device_batch_size=2, offload=values.pop("offload", "none"))
        if values.pop("is_read", False) or "save" in values.get("lora", {}):
            values["model"] = str(base)
        if values.pop("is_adapter", False):
            values["model"] = str(folder / "adapter")
        config = TargetConfig.model_validate(ZERO.model_dump() | values)
        storage = Draft.open(Storage(str(folder / f"{setting} {workers}")), Key("target", 1, {}, {})).storage
        job = TargetJob(config, bench.examples, bench.proxy, storage, {"selected": bench.ids}, machines, CORPUS)
        jobs[f"{setting} {workers}"] = job
        copy = folder / f"{setting} on {workers[0]}"
        return Part(job, None if stops else copy, copy if stops else None, through_ray)

    def trained(number: int, parts: list[Part]) -> dict[str, Any]:
        named = {next(name for name, job in jobs.items() if job is part.job): part for part in parts}
        return fit("target", several, named, Workers(number, 1, 0.0, number), Storage(str(folder / "work")))  # type: ignore[arg-type]

    real = part("zero2-offload", "2-1", through_ray=True, stops=True)
    trained(2, [*(part(name, "2-1", stops=True) for name in SETTINGS if name != "zero2-offload"), real])
    done = trained(
        1,
        [
            # Once transformers has used DeepSpeed in a process it trains nothing there without: the plain ones come first.
            *(part(name, "2-1") for name in SETTINGS if name != "zero2-offload"),
            replace(real, stops=None),
            part("zero3-lora", "1-2", stops=True),
        ],
    )
    done |= trained(2, [part("zero3-lora", "1-2"), *(part(name, "2-2") for name in ("zero2-adapter", "zero3-lora"))])
    return Story(jobs, done)


REFERENCES: dict[str, tuple[list[float], Any]] = {}


def reference(bench: Bench, config: TargetConfig) -> tuple[list[float], Any]:  # noqa: F811
    """The plain training of a recipe, once for all that share it."""
    key = config.model_dump_json(exclude={"zero_stage", "gradient_checkpointing", "precision"})
    if key not in REFERENCES:
        REFERENCES[key] = plain_training(bench, config)
    return REFERENCES[key]


def tolerance(config: TargetConfig) -> float:
    """bfloat16 has 8 bits: a loss of 5 is exact to 0.02."""
    return 0.02 if config.precision == "bfloat16" else TOLERANCE


def losses_of(model: Any, bench: Bench) -> np.ndarray:  # noqa: F811
    """Mean losses of all rows, those outside the subset too."""
    tokens = pool_tokens(bench.examples, bench.tokenizer, RowLimit.of(ZERO)).tokens
    with torch.no_grad():
        return np.array([float(sum_of_losses(model.eval(), tokens, row)[0]) for row in range(48)]) / tokens.num_labels


WAYS = [*(f"{name} 2-1" for name in SETTINGS), "zero3-lora 1-2", "zero2-adapter 2-2", "zero3-lora 2-2"]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("way", WAYS)
def test_a_stopped_training_goes_on_with_any_number_of_workers_as_if_it_had_not_stopped(story, bench, way):  # noqa: F811
    done = story.done[way]
    assert f"goes on from step {STOP}" in done["heard"]
    assert not [line for line in done["heard"] if "starts again" in line]
    steps, losses = zip(*done["result"]["training_loss"]["selected"], strict=True)
    assert list(steps) == list(range(1, STEPS + 1))
    expected, _ = reference(bench, story.jobs[way].config)
    np.testing.assert_allclose(losses, expected, rtol=0, atol=tolerance(story.jobs[way].config))
    assert losses[-1] < losses[0] - 0.02, "it learns"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("way", WAYS)
def test_every_setting_exports_a_model_that_from_pretrained_loads(story, bench, way):  # noqa: F811
    job = story.jobs[way]
    folder = Path(job.storage.path("model"))
    assert not [path for path in folder.rglob("*") if path.suffix in {".bin", ".pt", ".pkl", ".pth"}]
    is_adapter = job.config.lora is not None and job.config.lora.save == "adapter"
    assert (folder / "adapter_config.json").exists() == is_adapter
    assert (folder / "config.json").exists() != is_adapter
    _, plain = reference(bench, job.config)
    expected = losses_of(plain, bench)
    np.testing.assert_allclose(
        losses_of(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), bench),
        expected,
        rtol=0,
        atol=tolerance(job.config),
    )
    result = story.done[way]["result"]
    whole = make_model(job.config, bench.tokenizer).num_parameters()
    assert result["num_parameters"] == whole
    trained = sum(parameter.numel() for parameter in plain.parameters() if parameter.requires_grad)
    assert result["num_trained_parameters"] == trained
    assert (trained < whole) == (job.config.lora is not None)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_exported_adapter_is_evaluated(story, bench):  # noqa: F811
    job = story.jobs["zero2-adapter 2-1"]
    draft = Draft.open(Storage(job.storage.uri.rpartition("/")[0]), Key("target", 1, {}, {}))
    draft.add(*(FileRecord(**file) for file in job.storage.read_json(f"model/{MODEL_RECORD}")["files"]))
    draft.has(f"model/{MODEL_RECORD}")
    named = json.loads((Path(job.storage.path("model")) / "adapter_config.json").read_text())
    assert named["base_model_name_or_path"] == job.config.model
    config = run_config(**job.config.model_dump(exclude_none=True))
    inputs = {"examples": bench.examples, "proxy": bench.proxy, "target": draft.publish({})}
    worker = Evaluator(EvaluationJob(config, inputs, frozenset()), job.storage, Workers(1, 1, 0.0, 1), 1)
    _, plain = reference(bench, job.config)
    np.testing.assert_allclose(losses_of(worker.load("selected"), bench), losses_of(plain, bench), rtol=0, atol=TOLERANCE)
