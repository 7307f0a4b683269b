"""DeepSpeed ZeRO: its configuration, models sharded as they are read, resume points for another number of workers."""

from __future__ import annotations

import argparse
import contextlib
import io
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from s2l_ray.config import TargetConfig
from s2l_ray.training.batches import BatchPlan
from s2l_ray.training.locations import has_adapter

# DeepSpeed's file in a folder with a universal checkpoint.
UNIVERSAL = "latest_universal"
# What its converter raises at states that it does not know.
UNKNOWN = (AssertionError, AttributeError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)


def zero_config(stage: int, offload: str) -> dict[str, Any] | None:
    """DeepSpeed's configuration for a ZeRO stage, with what is kept in the machine's memory; None for stage 0."""
    import ray.train.torch

    if not stage:
        return None
    sharding: dict[str, Any] = {"stage": stage, "overlap_comm": False, "contiguous_gradients": True}
    if stage == 3:
        sharding["stage3_gather_16bit_weights_on_model_save"] = True
    in_memory = {"device": "cpu", "pin_memory": ray.train.torch.get_device().type == "cuda"}
    if offload != "none":
        sharding["offload_optimizer"] = in_memory
    if offload == "parameters":
        sharding["offload_param"] = in_memory
    return {"zero_optimization": sharding}


def with_batches(deepspeed: dict[str, Any], precision: str, plan: BatchPlan) -> dict[str, Any]:
    """The configuration with what the recipe decides."""
    return deepspeed | {
        "train_batch_size": plan.num_places,
        "train_micro_batch_size_per_gpu": plan.device_batch,
        "gradient_accumulation_steps": plan.accumulate,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": precision == "bfloat16"},
        # torch's AdamW under DeepSpeed too, offloaded or not: its own need a compiler on the machine.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


@contextlib.contextmanager
def sharded_as_it_is_read(config: TargetConfig, deepspeed: dict[str, Any] | None) -> Iterator[None]:
    """Under ZeRO 3 a model that is loaded in here is whole in the first worker's machine memory only, in its files' precision,
    and on no accelerator: each worker keeps its share.

    A model from scratch is made whole and sharded when its training begins: made in shards it would have other weights. So is
    one that adapters are first added to.
    """
    if config.zero_stage != 3 or not isinstance(config.model, str) or has_adapter(config.model):
        yield
        return
    assert deepspeed is not None
    # The batch is of no account here, but DeepSpeed wants one.
    with reading_shares(deepspeed | {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": config.precision == "bfloat16"}}):
        yield


@contextlib.contextmanager
def reading_shares(deepspeed: dict[str, Any]) -> Iterator[None]:
    """Within it transformers makes every model in shards, by this configuration of ZeRO 3."""
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    known = HfDeepSpeedConfig(deepspeed)  # transformers knows of it as long as this object lives
    try:
        yield
    finally:
        del known
        make_models_whole()


def make_models_whole() -> None:
    """End what a training with ZeRO 3 leaves behind: transformers would make every later model in shards, too."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


def restore_settings(optimizer: Any, weight_decay: float) -> None:
    """Give the optimizer's groups back the settings that they lose when a universal checkpoint is loaded.

    From one of ZeRO 3 DeepSpeed (0.19) gives all groups the first one's, so that norms and biases, the Trainer's second
    group, would be decayed, and all parameters one tensor as their count of steps, which each would raise.
    """
    for group, decay in zip(optimizer.param_groups, (weight_decay, 0.0), strict=False):
        group["weight_decay"] = decay
    for moments in optimizer.optimizer.optimizer.state.values():  # accelerate's wrapper, DeepSpeed's, torch's
        moments["step"] = moments["step"].clone()


def convert(saved: Path, universal: Path) -> str | None:
    """Make a universal checkpoint, with every parameter's states in one piece, of a resume point with ZeRO's shards.

    Returns what is wrong where DeepSpeed cannot. The files are pickles, and our own: this training wrote them.
    """
    from deepspeed.checkpoint.ds_to_universal import main

    tag = (saved / "latest").read_text().strip()
    universal.mkdir()
    for path in saved.iterdir():
        if path.name != tag:
            (universal / path.name).symlink_to(path.absolute())
    options = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
    folders = {"input_folder": str(saved / tag), "output_folder": str(universal / tag)}
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            # Without tensor parallelism the resume point does not describe its layout, and need not.
            main(argparse.Namespace(**folders, **options, inject_missing_state=True))
    except UNKNOWN as error:
        return f"DeepSpeed cannot convert it ({type(error).__name__}: {str(error)[:200]})"
    (universal / UNIVERSAL).write_text(tag)
    return None
