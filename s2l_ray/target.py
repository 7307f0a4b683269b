"""The target: the large model, fine-tuned on the subset with DeepSpeed ZeRO under Ray Train.

Where a random control is asked for, it trains in the same fit, straight after, with the same recipe and the same number
of steps: the workers, their imports and the base model are paid once.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from s2l_ray.config import TargetConfig, TargetWorkerConfig
from s2l_ray.errors import DataError
from s2l_ray.progress import get_log
from s2l_ray.runtime.fit import Workers, fit
from s2l_ray.storage.artifacts import Artifact
from s2l_ray.storage.layout import RANDOM, SELECTED
from s2l_ray.storage.places import Storage
from s2l_ray.storage.records import FileRecord
from s2l_ray.storage.stages import Context
from s2l_ray.training.adapters import merged, need_peft, with_adapters
from s2l_ray.training.fine_tuning import Phase, check_steps, data_order, fine_tune, num_steps, training_loss
from s2l_ray.training.models import check_positions, count_parameters, has_adapter, make_model, save_model
from s2l_ray.training.tokenizers import target_tokenizer
from s2l_ray.training.tokens import pool_tokens, row_counts

# Subset -> the folder of the model trained on it, in training order.
FOLDERS = {"selected": "model", "random": "random_model"}
RECORD = "model.json"


@dataclass(frozen=True)
class TargetJob:
    """What a worker of the fit needs."""

    config: TargetConfig
    examples: Artifact
    proxy: Artifact
    storage: Storage
    subsets: dict[str, list[str]]
    """Subset -> the ids in it."""

    machines: TargetWorkerConfig


def build(context: Context) -> Artifact:
    """Fine-tune the target on the subset (and on the random control) and publish Hugging Face folders."""
    config, inputs, draft = context.config, context.inputs, context.draft
    target, machines = context.section, context.machines
    if target.lora is not None:
        need_peft("target.lora")  # said here, too: before there are workers
    workers = Workers.resolve(machines, one_per_cpu=False, divides=target.global_batch_size)
    files = {"selected": SELECTED} | ({"random": RANDOM} if config.evaluation.random_control else {})
    subsets = {name: selected_ids(inputs["selection"], file) for name, file in files.items()}
    smallest = min(len(ids) for ids in subsets.values())
    if smallest < target.global_batch_size:
        raise DataError(
            f"the subset has {smallest:,} examples, fewer than one batch of {target.global_batch_size} "
            "(target.global_batch_size). Raise selection.budget or use a smaller batch."
        )
    job = TargetJob(target, inputs["examples"], inputs["proxy"], draft.storage, subsets, machines)
    if target.zero_stage:
        get_log("target").info("DeepSpeed ZeRO %d; its first use on a machine compiles for half a minute", target.zero_stage)
    result = fit("target", train_target, job, workers, draft.work, resume_minutes=machines.resume_minutes)
    for name in subsets:
        record = draft.storage.read_json(f"{FOLDERS[name]}/{RECORD}")
        draft.add(*(FileRecord(**file) for file in record["files"]))
        draft.has(f"{FOLDERS[name]}/{RECORD}")
    return draft.publish(result, asdict(workers) | machines.model_dump(include={"device_batch_size", "offload"}))


def selected_ids(selection: Artifact, file: str) -> list[str]:
    """The ids in a subset's file."""
    name = selection.summary["columns"]["example_id"]
    return [str(value) for value in selection.read_table(file, columns=[name])[name].to_pylist()]


# --- on a worker ---------------------------------------------------------------------------------------------------


def train_target(job: TargetJob, events: Any) -> dict[str, Any]:
    """The training loop of every worker: one model per subset; those that are finished are not trained again."""
    import ray.train

    config, is_first = job.config, ray.train.get_context().get_world_rank() == 0
    tokenizer = target_tokenizer(config, job.proxy)
    rows = {name: pool_tokens(job.examples, tokenizer, config.max_tokens, keep=set(ids)) for name, ids in job.subsets.items()}
    # The control has as many steps, whatever few rows either lost to its length.
    steps = min(num_steps(len(ids), config.epochs, config.global_batch_size) for ids, _, _ in rows.values())
    check_steps(steps, "target")
    before = 0
    for name, (ids, tokens, _) in rows.items():
        record = f"{FOLDERS[name]}/{RECORD}"
        if not job.storage.exists(record):
            order = data_order(ids, config.epochs, config.global_batch_size, config.seed)[: steps * config.global_batch_size]
            phase = Phase(name, config, order, tokens, (), steps * len(rows), before)
            deepspeed = zero(config.zero_stage, job.machines.offload) if config.zero_stage else None
            with sharded_as_it_is_read(config, deepspeed):
                model = make_model(config, tokenizer)
                check_positions(model, config.max_tokens, "target")
                facts = {"num_parameters": count_parameters(model)}
                if config.lora is not None:
                    model = with_adapters(model, config)
            facts["num_trained_parameters"] = count_parameters(model, only_trained=True)
            if is_first and not before:
                trained = f" ({facts['num_trained_parameters']:,} trained)" if config.lora is not None else ""
                parameters = f"{facts['num_parameters']:,} parameters{trained}"
                events.put(f"{parameters}, {len(ids):,} examples, {steps:,} steps per model")
            trainer = fine_tune(phase, model, tokenizer, job.machines, events, deepspeed=deepspeed)
            save_target(trainer, tokenizer, job, name, facts)
            reset_accelerate(trainer)
            del trainer, model
        before += steps
    done = {name: job.storage.read_json(f"{FOLDERS[name]}/{RECORD}") for name in rows} if is_first else {}
    return {
        "rows": len(rows["selected"][0]),
        **row_counts(rows["selected"][2]),
        "total_steps": steps,
        "num_parameters": next((record["num_parameters"] for record in done.values()), 0),
        "num_trained_parameters": next(
            (record.get("num_trained_parameters", record["num_parameters"]) for record in done.values()), 0
        ),
        "training_loss": {name: record["training_loss"] for name, record in done.items()},
        "tokens": {name: int(tokens.lengths.sum()) for name, (_, tokens, _) in rows.items()},
    }


def zero(stage: int, offload: str) -> dict[str, Any]:
    """DeepSpeed's configuration for a ZeRO stage, with what is kept in the machine's memory; what the recipe decides is
    added by the fit."""
    import ray.train.torch

    sharding: dict[str, Any] = {"stage": stage, "overlap_comm": False, "contiguous_gradients": True}
    if stage == 3:
        sharding["stage3_gather_16bit_weights_on_model_save"] = True
    in_memory = {"device": "cpu", "pin_memory": ray.train.torch.get_device().type == "cuda"}
    if offload != "none":
        sharding["offload_optimizer"] = in_memory
    if offload == "parameters":
        sharding["offload_param"] = in_memory
    return {"zero_optimization": sharding}


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
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    assert deepspeed is not None
    # The batch is of no account here, but DeepSpeed wants one. transformers knows of it as long as this object lives.
    known = HfDeepSpeedConfig(
        deepspeed | {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": config.precision == "bfloat16"}}
    )
    try:
        yield
    finally:
        del known
        unset_hf_deepspeed_config()


def save_target(trainer: Any, tokenizer: Any, job: TargetJob, name: str, facts: dict[str, Any]) -> None:
    """Write the trained model as a Hugging Face folder, or its adapters alone where the recipe asks for that.

    All workers take part (ZeRO 3 has spread the weights over them), the first one writes.
    """
    import ray.train
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    lora, storage = job.config.lora, job.storage
    with tempfile.TemporaryDirectory() as trained, tempfile.TemporaryDirectory() as whole:
        trainer.model.config.use_cache = True  # the Trainer turns it off for training; the saved model generates
        trainer.save_model(trained)  # of a peft model the adapters, which are all that has changed
        # As long as transformers knows of ZeRO 3 it makes every model in shards, those below and of the next phase too.
        unset_hf_deepspeed_config()
        if ray.train.get_context().get_world_rank() != 0:
            return
        # The Trainer pickles its arguments beside the model; nobody needs them, and pickles are not shipped.
        (Path(trained) / "training_args.bin").unlink(missing_ok=True)
        folder = trained
        if lora is not None and lora.save == "merged":
            folder = whole
            # Added in float32, to the base as it was read: bfloat16 weights would round much of an adapter away.
            model = merged(make_model(job.config, tokenizer), Path(trained))
            save_model(model.to(trainer.model.dtype), tokenizer, Path(whole))
        records = storage.upload(folder, FOLDERS[name])
    value = facts | {"training_loss": training_loss(trainer), "files": [asdict(record) for record in records]}
    storage.write_json(f"{FOLDERS[name]}/{RECORD}", value)


def reset_accelerate(trainer: Any) -> None:
    """Forget the finished training's process-wide state, so that the next model of the fit starts clean."""
    from accelerate.state import AcceleratorState, GradientState

    trainer.accelerator.free_memory()
    AcceleratorState._reset_state()
    GradientState._reset_state()
