"""The memory model: against what a small model really takes, against DeepSpeed's estimators, and as `s2l plan` prints it."""

from __future__ import annotations

import itertools
import re
import shlex
import weakref
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s2l_ray.config import load_config
from s2l_ray.errors import ConfigError
from s2l_ray.plan.accelerators import ACCELERATORS
from s2l_ray.plan.memory import (
    BUCKET,
    LORA_RANK,
    SETTINGS,
    Need,
    Setting,
    Shape,
    Training,
    activation_bytes,
    layer_bytes,
    need,
    recommended,
    resume_point_bytes,
    settings,
)
from s2l_ray.plan.plan import make_plan

CONFIG = Path(__file__).parent.parent / "configs" / "mathinstruct-pythia70m-phi2.yaml"
PHI_2 = Shape(2.78e9, 2560, 32, 51_200, 10_240, is_gated=False)
LLAMA_70B = Shape(70.6e9, 8192, 80, 128_256, 28_672, is_gated=True)


def training(shape: Shape, num_workers: int = 8, **options: Any) -> Training:
    values = {"precision": "bfloat16", "workers_per_node": 8, "device_batch": 4, "tokens": 512, "response_fraction": 0.5}
    return Training(shape, num_workers=num_workers, **(values | options))


def fits(shape: Shape, num_workers: int, accelerator: str, setting: Setting, **options: Any) -> bool:
    return need(training(shape, num_workers, **options), setting).gpu <= ACCELERATORS[accelerator][2]


# --- the named cases -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [PHI_2, Shape.estimated(2.8e9)], ids=["phi-2", "estimated"])
def test_a_target_of_3b_trains_on_a_node_of_a100_with_zero_2_alone(shape):
    assert recommended(training(shape), settings(None), 80e9) == Setting(2)
    # 2 P + 14 P / 8 bytes alone are 10.4 GB; nothing that is worth saving is there yet.
    assert 10.4e9 < need(training(shape), Setting(2)).gpu < 35e9
    assert not fits(shape, 1, "A100-40GB", Setting(2)), "16 bytes a parameter are 45 GB"


@pytest.mark.parametrize("shape", [PHI_2, Shape.estimated(2.8e9)], ids=["phi-2", "estimated"])
def test_a_target_of_3b_trains_on_eight_t4_with_checkpointing(shape):
    best = recommended(training(shape), settings(None), 16e9)
    assert best is not None
    assert best.gradient_checkpointing
    assert best.lora_rank is None
    assert not fits(shape, 8, "T4", Setting(2))


def test_a_target_of_70b_trains_on_64_h100_with_zero_3_and_is_read_in_shards():
    sharded = need(training(LLAMA_70B, 64), Setting(3, gradient_checkpointing=True))
    assert recommended(training(LLAMA_70B, 64), settings(None), 80e9) == Setting(3, gradient_checkpointing=True)
    # 16 P / 64 bytes of states, and what was gathered.
    assert 17.6e9 < sharded.gpu < 80e9
    assert sharded.host == pytest.approx(4 * 70.6e9), "the first worker alone reads it"


def test_a_target_of_70b_from_scratch_is_whole_in_every_worker_before_it_is_sharded():
    whole = training(LLAMA_70B, 64, is_from_scratch=True)
    assert need(whole, Setting(3, gradient_checkpointing=True)).gpu == pytest.approx(2 * 70.6e9 + 1.5e9)
    assert need(whole, Setting(3)).host == pytest.approx(4 * 70.6e9 * 8)
    assert recommended(whole, settings(None), 80e9) is None


def test_adapters_are_the_last_resort_and_the_only_choice_where_they_are_asked_for():
    assert [setting.lora_rank for setting in settings(None)] == [None] * len(SETTINGS) + [LORA_RANK] * 2
    assert {setting.lora_rank for setting in settings(64)} == {64}


# --- what is always so ---------------------------------------------------------------------------------------------

shapes = st.floats(5e7, 2e11).map(Shape.estimated)
large = st.floats(4e9, 2e11).map(Shape.estimated)
precisions = st.sampled_from(["float32", "bfloat16"])
workers = st.sampled_from([2, 4, 8, 16, 64, 512])
every = st.sampled_from([*settings(None), Setting(0), Setting(1, "optimizer"), Setting(2, "optimizer")])


@given(shapes, precisions, every, st.integers(1, 63), st.integers(1, 64))
def test_more_workers_never_need_more_per_accelerator(shape, precision, setting, few, more):
    needs = [need(training(shape, number, precision=precision), setting).gpu for number in (few, few + more)]
    assert needs[1] <= needs[0]


@given(shapes, precisions, workers, st.sampled_from([None, 16]))
def test_a_higher_stage_never_has_more_states(shape, precision, number, rank):
    states = [need(training(shape, number, precision=precision), Setting(stage, lora_rank=rank)).states for stage in range(4)]
    assert states == sorted(states, reverse=True)


@given(large, precisions, workers)
def test_a_higher_stage_never_needs_more_in_all(shape, precision, number):
    """From 4B parameters on: of a smaller model ZeRO 3 holds as good as all that it gathered (up to 1e9 parameters)."""
    needs = [need(training(shape, number, precision=precision), Setting(stage)).gpu for stage in (1, 2, 3)]
    assert needs == sorted(needs, reverse=True)


@given(shapes, precisions, workers, st.integers(1, 3), st.booleans())
def test_offload_moves_memory_from_the_accelerator_to_the_host(shape, precision, number, stage, checkpointing):
    levels = ("none", "optimizer", "parameters")[: 3 if stage == 3 else 2]
    one = training(shape, number, precision=precision)
    needs = [need(one, Setting(stage, level, checkpointing)) for level in levels]
    for less, more in itertools.pairwise(needs):
        assert more.gpu <= less.gpu
        assert more.states < less.states
        assert more.host >= less.host


@given(shapes, precisions, st.integers(1, 64), st.integers(2, 8192), st.floats(0, 1))
def test_checkpointing_never_keeps_more(shape, precision, batch, tokens, fraction):
    one = training(shape, precision=precision, device_batch=batch, tokens=tokens, response_fraction=fraction)
    kept = [activation_bytes(one, gradient_checkpointing=choice) for choice in (True, False)]
    assert kept[0] <= kept[1]


@given(shapes)
def test_an_estimated_shape_has_about_its_parameters(shape):
    parameters = 12 * shape.layers * shape.hidden**2 + 2 * shape.vocabulary * shape.hidden
    assert parameters == pytest.approx(shape.parameters, rel=0.25)  # a whole number of layers, of which the smallest have 3


# --- against DeepSpeed's estimators --------------------------------------------------------------------------------


@given(st.floats(1e8, 1e11).map(Shape.estimated), st.sampled_from([1, 2, 8]), st.sampled_from([1, 2, 8]))
def test_the_step_is_deepspeeds_estimate_and_the_differences_that_are_stated(shape, per_node, nodes):
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs as zero_3
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs as zero_2

    P, W = shape.parameters, per_node * nodes
    layer = shape.vocabulary * shape.hidden
    one = Training(shape, "bfloat16", W, per_node, 1, 1)
    machine = {"num_gpus_per_node": per_node, "num_nodes": nodes}
    _, gpu = zero_2(P, cpu_offload=False, **machine)
    # Adam's square root is there (4), the 16-bit gradients are not there any more (2).
    assert need(one, Setting(2)).step == pytest.approx(gpu + 2 * P / W, rel=1e-6)
    _, gpu, theirs = zero_3(P, layer, cpu_offload=False, cpu_offload_params=False, **machine)
    if P / W <= 1e9:
        # Adam's square root (4) and the 16-bit weights (2), which theirs leave out; the bucket; their largest layer is gone.
        assert need(one, Setting(3)).step == pytest.approx(gpu - theirs + 6 * P / W + 2 * BUCKET, rel=1e-6)
    cpu, gpu = zero_2(P, cpu_offload=True, **machine)
    offloaded = need(one, Setting(2, "optimizer"))
    assert offloaded.states == pytest.approx(gpu, rel=1e-6)
    if nodes == 1:  # of several, theirs counts the workers of all for the memory of each
        # Both copies of gradients and weights and Adam's square root are 24 for their 16; theirs has a margin of 1.5.
        assert cpu / 1.5 <= 1.001 * offloaded.host <= 1.002 * cpu
    _, gpu, theirs = zero_3(P, layer, cpu_offload=True, cpu_offload_params=False, **machine)
    assert need(one, Setting(3, "optimizer")).states == pytest.approx(gpu - theirs, rel=1e-6)
    assert need(one, Setting(3, "parameters")).states == 0


# --- against what a model really takes -----------------------------------------------------------------------------


class Live:
    """Bytes of tensors that are alive, and their most, counted operation by operation."""

    def __init__(self) -> None:
        from torch.utils._python_dispatch import TorchDispatchMode
        from torch.utils._pytree import tree_leaves

        self.bytes = self.most = 0
        known: set[int] = set()

        def forget(key: int, num_bytes: int) -> None:
            self.bytes -= num_bytes
            known.discard(key)

        class Count(TorchDispatchMode):
            def __torch_dispatch__(inner, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                import torch

                made = function(*args, **(kwargs or {}))
                for tensor in tree_leaves(made):
                    if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in known:
                        storage = tensor.untyped_storage()
                        known.add(storage._cdata)
                        self.bytes += storage.nbytes()
                        self.most = max(self.most, self.bytes)
                        weakref.finalize(storage, forget, storage._cdata, storage.nbytes())
                return made

        self.counting = Count()


def small_model(family: str, precision: str, vocabulary: int, layers: int = 4, hidden: int = 128) -> tuple[Any, Shape]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    width = {"gpt_neox": 4 * hidden, "llama": 3 * hidden}[family]
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": 4, "intermediate_size": width}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, vocab_size=vocabulary, **sizes))
    model = model.to(getattr(torch, precision)).train()
    return model, Shape(model.num_parameters(), hidden, layers, vocabulary, width, is_gated=family == "llama")


@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_states_are_the_bytes_that_a_trained_model_has(family):
    import torch

    model, shape = small_model(family, "float32", 512)
    optimizer = torch.optim.AdamW(model.parameters())
    model(input_ids=torch.arange(16)[None]).logits.sum().backward()
    optimizer.step()
    tensors = [*model.parameters(), *(p.grad for p in model.parameters())]
    tensors += [moment for state in optimizer.state.values() for moment in state.values() if moment.ndim]
    states = need(training(shape, 1, precision="float32"), Setting(0)).states
    assert sum(tensor.nbytes for tensor in tensors) == states == 16 * shape.parameters


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointing"])
@pytest.mark.parametrize(("vocabulary", "precision"), [(512, "float32"), (512, "bfloat16"), (16_384, "bfloat16")])
@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_activations_are_near_the_most_that_is_alive(family, vocabulary, precision, checkpointing):
    import torch

    model, shape = small_model(family, precision, vocabulary)
    if checkpointing:
        model.gradient_checkpointing_enable()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    ids = torch.randint(0, 512, (2, 128), generator=torch.Generator().manual_seed(0))
    live = Live()
    with live.counting:
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=64).logits
        torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, -64:].flatten()).backward()
    one = training(shape, 1, precision=precision, device_batch=2, tokens=128)
    gradient = one.weight_bytes * shape.vocabulary * shape.hidden  # of the output layer, before it is added
    modelled = gradient + activation_bytes(one, gradient_checkpointing=checkpointing)
    assert modelled == pytest.approx(live.most, rel=0.25)


@pytest.mark.parametrize(("family", "numbers"), [("gpt_neox", 18), ("llama", 22)])
def test_a_layer_keeps_for_the_backward_pass_what_the_formula_says(family, numbers):
    """Korthikanti's 34 s b h bytes in 16 bits, without masks of dropout and with rotated queries and keys: 18 numbers."""
    import torch

    kept = {}
    for layers in (1, 3):
        model, shape = small_model(family, "float32", 512, layers)
        weights = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
        storages: dict[int, Any] = {}

        def keep(tensor: Any, storages: dict[int, Any] = storages) -> Any:
            storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            _ = model(input_ids=torch.arange(256).view(2, 128), use_cache=False).logits
        kept[layers] = sum(storage.nbytes() for key, storage in storages.items() if key not in weights)
    measured = (kept[3] - kept[1]) / 2 / 256
    assert layer_bytes(shape, 4) == 4 * numbers * shape.hidden
    assert measured == pytest.approx(layer_bytes(shape, 4), rel=0.02)  # the rest: one number a token or head


@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_adapters_have_as_many_parameters_as_peft_makes(family):
    peft = pytest.importorskip("peft")
    model, shape = small_model(family, "float32", 512)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules="all-linear"))
    made = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    # GPT-NeoX has query, key and value in one matrix: an input of it each is counted too many.
    fused = 2 * 8 * shape.layers * shape.hidden if family == "gpt_neox" else 0
    assert made == shape.adapter_parameters(8) - fused


def test_resume_points_have_the_bytes_that_the_trainer_writes():
    """Read from transformers' and DeepSpeed's code, and measured on a small Llama: 16.0, 14.0, 20.0, 16.0 bytes a parameter."""
    assert [resume_point_bytes(1e6, "bfloat16", stage) for stage in range(4)] == [12e6, 16e6, 16e6, 14e6]
    assert [resume_point_bytes(1e6, "float32", stage) for stage in range(4)] == [12e6, 20e6, 20e6, 16e6]
    assert resume_point_bytes(1e6, "bfloat16", 3, trained=1e3) == 14e3


# --- s2l plan ------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub does not answer, at once."""

    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("no network in this test")

    for name in ("dataset_info", "model_info"):
        monkeypatch.setattr(f"huggingface_hub.HfApi.{name}", offline)


def planned(tmp_path: Path, *overrides: str, **options: Any) -> str:
    return make_plan(load_config(CONFIG, list(overrides)), str(tmp_path / "run"), **options).text()


def test_the_plan_shows_what_each_setting_needs_and_which_fits(tmp_path):
    text = planned(tmp_path, accelerator="A100")
    assert "Target on 8 x A100 (80 GB each, 8 per node), bfloat16, 4 x 512 tokens at a time:" in text
    table = text.partition("Target on")[2].partition("\n\n")[0].splitlines()
    assert len(table) <= 13
    assert re.search(r"^ +\d+\.\d +\d+\.\d  yes   ZeRO 2  <- recommended$", "\n".join(table), re.MULTILINE)
    assert re.search(r" yes   ZeRO 3, checkpointing  \(configured\)$", "\n".join(table), re.MULTILINE)
    assert text.count("<- recommended") == text.count("(configured)") == 1


@pytest.mark.parametrize(("accelerator", "number"), [("A100", 8), ("T4", 8), ("T4", 2), ("L4", 1)], ids=str)
def test_what_the_plan_recommends_can_be_pasted_and_is_then_what_is_configured(tmp_path, accelerator, number):
    text = planned(tmp_path, accelerator=accelerator, num_accelerators=number)
    line = re.search(r"^Recommended: (.*)$", text, re.MULTILINE)
    if line is None:
        assert "<- recommended  (configured)" in text
        return
    words = shlex.split(line[1])
    assert words[::2] == ["--set"] * (len(words) // 2)
    again = planned(tmp_path, *words[1::2], accelerator=accelerator, num_accelerators=number)
    assert "<- recommended  (configured)" in again or "LoRA" in line[1]
    assert "Recommended: " not in again or "LoRA" in again


def test_every_setting_can_be_asked_for(tmp_path):
    for setting in settings(None):
        config = load_config(CONFIG, [value.strip("'") for value in setting.overrides()])
        assert config.target.zero_stage == setting.zero_stage
        assert config.machines.target.offload == setting.offload
        assert config.target.gradient_checkpointing == setting.gradient_checkpointing
        assert (config.target.lora.rank if config.target.lora else None) == setting.lora_rank


def test_the_number_of_accelerators_is_the_configs_or_a_full_node(tmp_path):
    assert "Target on 8 x T4" in planned(tmp_path, accelerator="T4")
    assert "Target on 4 x T4 (16 GB each, 4 per node)" in planned(tmp_path, "machines.target.num_workers=4", accelerator="T4")
    assert "Target on 2 x T4 (16 GB each, 2 per node)" in planned(
        tmp_path, "machines.target.num_workers=[2, 16]", accelerator="T4"
    )
    text = planned(tmp_path, accelerator="H100", num_accelerators=64, accelerators_per_node=4)
    assert "Target on 64 x H100 (80 GB each, 4 per node), bfloat16, 2 x 512" in text, "128 examples, two each"


def test_the_plan_takes_any_number_of_accelerators_up_to_one_per_example_of_a_batch(tmp_path):
    options = {"accelerator": "H100", "accelerators_per_node": 1}
    text = planned(tmp_path, "machines.target.device_batch_size=auto", num_accelerators=3, **options)
    assert "22 x 512 tokens at a time" in text, "a share of 43 examples in two micro-batches, as the training cuts it"
    with pytest.raises(ConfigError, match="129 workers, but a batch has global_batch_size=128 examples"):
        planned(tmp_path, num_accelerators=129, **options)


def test_the_plan_says_so_where_nothing_fits(tmp_path):
    text = planned(tmp_path, "target.max_tokens=131072", accelerator="T4", num_accelerators=1)
    assert "None fits" in text
    assert "<- recommended" not in text


def test_without_an_accelerator_the_plan_says_only_what_resume_points_take(tmp_path):
    text = planned(tmp_path, "plan.accelerator=null")
    assert "Target on" not in text
    # 70.4M x 12 bytes; 2.78G x (2 + 12).
    assert "Resume points, two kept at a time: proxy 845 MB, target 38.9 GB." in text
    often = planned(tmp_path, "machines.target.checkpoint_every_minutes=10", "target.zero_stage=2")
    assert "target 44.5 GB every 10 minutes (267 GB an hour)." in often
    assert "proxy 845 MB, target 83" not in planned(tmp_path, "target.lora={rank: 8}")


def test_the_plan_looks_at_the_shape_of_a_target_from_scratch(tmp_path):
    scratch = "target.model={scratch: {architecture: llama, layers: 2, hidden: 64, intermediate: 128}}"
    text = planned(tmp_path, scratch, "plan.target_parameters=null", "target.tokenizer={train: bpe, vocab_size: 4096}")
    assert re.search(r"Target on 8 x A100 .*\n.*\n +\d\.\d +0\.0  yes ", text)


def test_an_unknown_accelerator_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="A100-40GB"):
        planned(tmp_path, accelerator="A100-41GB")


def test_a_need_is_in_bytes_of_one_accelerator_and_one_node():
    one = need(training(PHI_2, 16), Setting(3, "parameters", gradient_checkpointing=True))
    assert isinstance(one, Need)
    # 2 + 2 + 12 + 8 bytes a parameter, eight sixteenths of them; to read the model, one worker of the node has 4 for a while.
    assert one.host == pytest.approx(12 * 2.78e9)
    assert one.states == 0
