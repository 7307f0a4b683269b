"""The target: the large model, fine-tuned on the subset with DeepSpeed ZeRO under Ray Train.

Where a random control is asked for, it trains in the same fit, straight after, with the same recipe and the same number
of steps: the workers, their imports and the base model are paid once.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from s2l_ray.config import ExamplesConfig, TargetConfig, TargetWorkerConfig
from s2l_ray.errors import DataError
from s2l_ray.progress import get_log
from s2l_ray.runtime.fit import fit
from s2l_ray.runtime.workers import Workers
from s2l_ray.storage.artifacts import Artifact
from s2l_ray.storage.layout import MODEL_FOLDERS, MODEL_RECORD, RANDOM, SELECTED
from s2l_ray.storage.places import Storage
from s2l_ray.storage.records import FileRecord
from s2l_ray.storage.stages import Context
from s2l_ray.training.adapters import merged, need_peft, with_adapters
from s2l_ray.training.batches import data_order, subset_steps
from s2l_ray.training.fine_tuning import fine_tune, training_loss
from s2l_ray.training.models import check_positions, count_parameters, make_model, save_model
from s2l_ray.training.token_pools import pool_tokens, row_counts, said_counts
from s2l_ray.training.token_rows import RowLimit
from s2l_ray.training.tokenizers import target_tokenizer
from s2l_ray.training.trackers import Tracking
from s2l_ray.training.training_run import TrainingRun
from s2l_ray.training.zero import make_models_whole, sharded_as_it_is_read, zero_config


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
    corpus: ExamplesConfig
    tracking: Tracking | None = None
    weights: dict[str, dict[str, float]] = field(default_factory=dict)
    """Subset -> how much each id counts, where that is asked for."""

    def weights_of(self, name: str, ids: pa.Array) -> np.ndarray | None:
        """How much each row counts of a subset, by the ids of their examples; None where all count alike."""
        return np.array([self.weights[name][one] for one in ids.to_pylist()]) if name in self.weights else None


def build(context: Context) -> Artifact:
    """Fine-tune the target on the subset (and on the random control) and publish Hugging Face folders."""
    config, inputs, draft = context.config, context.inputs, context.draft
    target, machines = context.section, context.machines
    if target.lora is not None:
        need_peft("target.lora")  # checked here, too: before there are workers
    workers = Workers.resolve(machines, one_per_cpu=False, at_most=target.global_batch_size)
    files = {"selected": SELECTED} | ({"random": RANDOM} if config.evaluation.random_control else {})
    subsets = {name: selected_ids(inputs["selection"], file) for name, file in files.items()}
    weights = {}
    if target.use_weights:
        weights = {name: selected_weights(inputs["selection"], file) for name, file in files.items()}
    smallest = min(len(ids) for ids in subsets.values())
    if smallest < target.global_batch_size:
        raise DataError(
            f"the subset has {smallest:,} examples, fewer than one batch of {target.global_batch_size} "
            "(target.global_batch_size). Raise selection.budget or use a smaller batch."
        )
    corpus, tracking = config.examples, Tracking.of(context)
    job = TargetJob(target, inputs["examples"], inputs["proxy"], draft.storage, subsets, machines, corpus, tracking, weights)
    if target.zero_stage:
        get_log("target").info("DeepSpeed ZeRO %d; its first use on a machine compiles for half a minute", target.zero_stage)
    result = fit("target", train_target, job, workers, draft.work, resume_minutes=machines.resume_minutes)
    for name in subsets:
        record = draft.storage.read_json(f"{MODEL_FOLDERS[name]}/{MODEL_RECORD}")
        draft.add(*(FileRecord(**file) for file in record["files"]))
        draft.has(f"{MODEL_FOLDERS[name]}/{MODEL_RECORD}")
    return draft.publish(result, asdict(workers) | machines.model_dump(include={"device_batch_size", "offload"}))


def selected_ids(selection: Artifact, file: str) -> list[str]:
    """The ids in a subset's file."""
    name = selection.summary["columns"]["example_id"]
    return [str(value) for value in selection.read_table(file, columns=[name])[name].to_pylist()]


def selected_weights(selection: Artifact, file: str) -> dict[str, float]:
    """The weight of each id in a subset's file."""
    name = selection.summary["columns"]["weight"]
    return dict(zip(selected_ids(selection, file), selection.read_table(file, columns=[name])[name].to_pylist(), strict=True))


# --- on a worker ---------------------------------------------------------------------------------------------------


def train_target(job: TargetJob, events: Any) -> dict[str, Any]:
    """The training loop of every worker: one model per subset; those that are finished are not trained again."""
    import ray.train

    config, is_first = job.config, ray.train.get_context().get_world_rank() == 0
    tokenizer = target_tokenizer(config, job.proxy)
    limit = RowLimit.of(config)
    pools = {name: pool_tokens(job.examples, tokenizer, limit, keep=set(ids)) for name, ids in job.subsets.items()}
    for pool in pools.values():
        pool.check("target", limit, job.corpus)
    # The control has as many steps, however few examples either lost to its length; of an example every row counts.
    sizes = [max(len(job.subsets[name]), len(pool.row_ids)) for name, pool in pools.items()]
    steps = subset_steps(min(sizes), config.epochs, config.global_batch_size)
    batch, before = config.global_batch_size, 0
    orders = {name: data_order(pool.row_ids, steps, batch, config.seed) for name, pool in pools.items()}
    for name, pool in pools.items():
        record = f"{MODEL_FOLDERS[name]}/{MODEL_RECORD}"
        if not job.storage.exists(record):
            run = TrainingRun(
                name, config, orders[name], pool.tokens, (), steps * len(pools), before, job.weights_of(name, pool.example_ids)
            )
            deepspeed = zero_config(config.zero_stage, job.machines.offload)
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
                for line in said_counts(pool.changed, pool.refused):
                    events.put(line)
                events.put(f"{parameters}, {pool.sizes}, {steps:,} steps per model")
            trainer = fine_tune(run, model, tokenizer, job.machines, events, deepspeed=deepspeed, tracking=job.tracking)
            save_target(trainer, tokenizer, job, name, facts)
            trainer.accelerator.free_memory()
            del trainer, model
        before += steps
    done = {name: job.storage.read_json(f"{MODEL_FOLDERS[name]}/{MODEL_RECORD}") for name in pools} if is_first else {}
    return {
        "rows": pools["selected"].num_examples,
        **row_counts(pools["selected"].changed, pools["selected"].refused),
        "total_steps": steps,
        "num_parameters": next((record["num_parameters"] for record in done.values()), 0),
        "num_trained_parameters": next(
            (record.get("num_trained_parameters", record["num_parameters"]) for record in done.values()), 0
        ),
        "training_loss": {name: record["training_loss"] for name, record in done.items()},
        "tokens": {name: int(pool.tokens.lengths.sum()) for name, pool in pools.items()},
        "tokens_seen": {name: int(pools[name].tokens.lengths[rows].sum()) for name, rows in orders.items()},
        "supervised_tokens": {name: int(pools[name].tokens.num_labels[rows].sum()) for name, rows in orders.items()},
    }


def save_target(trainer: Any, tokenizer: Any, job: TargetJob, name: str, facts: dict[str, Any]) -> None:
    """Write the trained model as a Hugging Face folder, or its adapters alone where the recipe asks for that.

    All workers take part (ZeRO 3 has spread the weights over them), the first one writes.
    """
    import ray.train

    lora, storage = job.config.lora, job.storage
    with tempfile.TemporaryDirectory() as trained, tempfile.TemporaryDirectory() as whole:
        trainer.model.config.use_cache = True  # the Trainer turns it off for training; the saved model generates
        trainer.save_model(trained)  # of a peft model the adapters, which are all that has changed
        make_models_whole()
        if ray.train.get_context().get_world_rank() != 0:
            return
        # The Trainer pickles its arguments next to the model; nobody needs them, and pickles are not shipped.
        (Path(trained) / "training_args.bin").unlink(missing_ok=True)
        folder = trained
        if lora is not None and lora.save == "merged":
            folder = whole
            # Added in float32, to the base as it was read: bfloat16 weights would round much of an adapter away.
            model = merged(make_model(job.config, tokenizer), Path(trained))
            save_model(model.to(trainer.model.dtype), tokenizer, Path(whole))
        records = storage.upload(folder, MODEL_FOLDERS[name])
    value = facts | {"training_loss": training_loss(trainer), "files": [asdict(record) for record in records]}
    storage.write_json(f"{MODEL_FOLDERS[name]}/{MODEL_RECORD}", value)
