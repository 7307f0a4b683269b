"""Fine-tuning on one worker of a fit, with transformers' Trainer: one way for the proxy and for the target.

The data order is ours and does not depend on the workers: epoch after epoch a hash permutation, laid end to end and cut
into steps of exactly `global_batch_size` examples. Every worker takes its slice of each step. So checkpoint i means the
same examples seen on one worker or on sixty-four.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np

from s2l_ray.config import TrainingConfig, TrainingWorkerConfig
from s2l_ray.errors import ConfigError, DataError
from s2l_ray.examples.ids import priorities
from s2l_ray.storage.places import cache
from s2l_ray.storage.records import digest
from s2l_ray.training.adapters import base_of
from s2l_ray.training.losses import pad
from s2l_ray.training.output_head import accepts_logits_to_keep
from s2l_ray.training.token_rows import TokenRows


@dataclasses.dataclass(frozen=True)
class BatchPlan:
    """How a global batch is spread: workers x device batch x accumulated micro-batches."""

    num_workers: int
    device_batch: int
    accumulate: int

    @classmethod
    def of(cls, global_batch: int, num_workers: int, device_batch: int | str) -> BatchPlan:
        """The largest device batch within the wish (32 for auto) that divides a worker's share.

        Raises ConfigError where the workers do not divide the global batch.
        """
        if global_batch % num_workers:
            raise ConfigError(
                f"global_batch_size={global_batch} cannot be spread over {num_workers} workers. "
                "Choose a number of workers that divides it."
            )
        share = global_batch // num_workers
        wish = min(share, device_batch if isinstance(device_batch, int) else 32)
        size = next(size for size in range(wish, 0, -1) if share % size == 0)
        return cls(num_workers, size, share // size)

    def __str__(self) -> str:
        total = self.num_workers * self.device_batch * self.accumulate
        return (
            f"accumulate {self.accumulate} micro-batches: {total} global / ({self.num_workers} workers x {self.device_batch})"
        )


def num_steps(num_rows: int, epochs: float, global_batch: int) -> int:
    """Optimizer steps: the examples of all epochs in whole batches."""
    return math.floor(num_rows * epochs / global_batch)


def check_steps(steps: int, section: str) -> None:
    """Raise DataError where the examples of all epochs do not fill one batch."""
    if steps < 1:
        raise DataError(
            f"{section}: {section}.epochs passes over the examples do not fill one batch of {section}.global_batch_size. "
            "Train more epochs, use a smaller batch or more examples."
        )


def data_order(example_ids: list[str], epochs: float, global_batch: int, seed: int) -> np.ndarray:
    """Row numbers in training order, `num_steps * global_batch` of them: a hash permutation per epoch, laid end to end."""
    length = num_steps(len(example_ids), epochs, global_batch) * global_batch
    passes = [
        np.argsort(priorities(example_ids, f"{seed}-epoch-{epoch}"), kind="stable")
        for epoch in range(math.ceil(length / max(1, len(example_ids))))
    ]
    return np.concatenate([np.zeros(0, np.int64), *passes])[:length]


def deal(order: np.ndarray, lengths: np.ndarray, plan: BatchPlan) -> np.ndarray:
    """The rows of every step dealt out to micro-batches of similar length, as even among the workers as can be.

    A step keeps its rows, so its gradient is the same for any deal; but little of a batch is padding, and no worker
    waits for one with longer rows. Micro-batch a of worker r stands at place a * workers + r, where the Trainer takes it.
    """
    order = order.reshape(-1, plan.accumulate * plan.device_batch * plan.num_workers)
    by_length = np.take_along_axis(order, np.argsort(-lengths[order], axis=1, kind="stable"), axis=1)
    return by_length.reshape(-1, plan.device_batch, plan.num_workers).transpose(0, 2, 1).ravel()


@dataclasses.dataclass(frozen=True)
class Phase:
    """One model of a fit: what is trained on what, when it is kept, and where that is done."""

    name: str
    config: TrainingConfig
    order: np.ndarray
    """Row numbers of `tokens` in training order, steps * global_batch_size of them."""

    tokens: TokenRows
    keep_at: Collection[int]
    """Steps after which the model itself is kept (0 is before the first)."""

    fit_steps: int
    """Steps of all phases of the fit, for the progress bar."""

    steps_before: int = 0
    """Steps of the earlier phases."""


def fine_tune(
    phase: Phase,
    model: Any,
    tokenizer: Any,
    machines: TrainingWorkerConfig,
    events: Any,
    *,
    on_keep: Callable[[int, Any], None] | None = None,
    deepspeed: dict[str, Any] | None = None,
) -> Any:
    """Train one model on this worker's share, resuming where the last registered checkpoint of this phase stood.

    `on_keep(step, model)` is called on rank 0 at every step of `keep_at`; resume points are kept besides, by the clock.
    They serve any number of workers: those that ZeRO sharded over another number are converted.
    Returns transformers' Trainer, whose `state.log_history` has the losses.
    """
    import ray.train
    from transformers import PrinterCallback

    from s2l_ray.training.resume_points import UNIVERSAL, Recorder, resume_point

    context = ray.train.get_context()
    plan = BatchPlan.of(phase.config.global_batch_size, context.get_world_size(), machines.device_batch_size)
    if context.get_world_rank() == 0:
        events.put(f"{phase.name}: {plan}" if phase.name != "proxy" else str(plan))

    rows = TrainingRows(phase.tokens, deal(phase.order, phase.tokens.lengths, plan))
    folder = _node_folder(phase)
    shards = context.get_world_size() if deepspeed is not None else None
    with resume_point(phase.name, shards, folder, events) as checkpoint:
        if deepspeed is not None and checkpoint is not None and (Path(checkpoint) / UNIVERSAL).exists():
            deepspeed = deepspeed | {"checkpoint": {"load_universal": True}}
        trainer = _trainer_class()(
            model=model,
            args=_arguments(phase, plan, folder, deepspeed),
            train_dataset=rows,
            processing_class=tokenizer,
            data_collator=Collator(accepts_logits_to_keep(base_of(model))),
            compute_loss_func=token_mean_loss,
            callbacks=[Recorder(phase, folder, events, on_keep, machines.checkpoint_every_minutes)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=checkpoint)
    shutil.rmtree(folder, ignore_errors=True)  # each node's own; all its workers are past the last step
    return trainer


def _trainer_class() -> Any:
    from transformers import Trainer

    class InOrder(Trainer):  # type: ignore[misc]
        """The Trainer, reading the rows in the order given and resuming with everything as it was."""

        def _get_train_sampler(self, _dataset: Any = None) -> Any:
            from torch.utils.data import SequentialSampler

            return SequentialSampler(self.train_dataset)

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> Any:
            if base_of(self.model) is not self.model:  # adapters alone were saved
                return super()._load_from_checkpoint(resume_from_checkpoint, model)
            # The Trainer's own leaves out, silently, weights that are saved under another name: GPT-NeoX's output layer.
            saved = type(self.model).from_pretrained(resume_from_checkpoint, dtype=self.model.dtype)
            return (model or self.model).load_state_dict(saved.state_dict())

        def create_optimizer(self, model: Any = None) -> Any:
            optimizer = super().create_optimizer(model)
            self._decays = [group["weight_decay"] for group in self.optimizer.param_groups if group["params"]]
            return optimizer

        def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
            super()._load_optimizer_and_scheduler(checkpoint)
            if self.is_deepspeed_enabled:
                # From a universal checkpoint of ZeRO 3 DeepSpeed (0.19) gives all groups the first one's settings, so that
                # norms and biases would be decayed, and one tensor as their count of steps, which each would raise.
                for group, decay in zip(self.optimizer.param_groups, self._decays, strict=True):
                    group["weight_decay"] = decay
                for moments in self.optimizer.optimizer.optimizer.state.values():
                    moments["step"] = moments["step"].clone()

    return InOrder


def _node_folder(phase: Phase) -> Path:
    """A folder that the workers of one node share for the Trainer's own checkpoints, fresh for every attempt.

    What an attempt before it left on this node, killed as it was, goes away: it may be as large as the model's states.
    """
    import ray
    import ray.train
    import torch.distributed

    context = ray.train.get_context()
    of_fit = digest([context.get_storage().experiment_fs_path, ray.get_runtime_context().get_node_id()])
    folder = cache() / f"{phase.name}-{of_fit}"
    if context.get_local_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    torch.distributed.barrier()
    return folder


def _arguments(phase: Phase, plan: BatchPlan, folder: Path, deepspeed: dict[str, Any] | None) -> Any:
    import ray.train.torch
    from transformers import TrainingArguments

    config = phase.config
    on_gpu = ray.train.torch.get_device().type == "cuda"
    steps = len(phase.order) // config.global_batch_size
    is_offloaded = deepspeed is not None and "offload_optimizer" in deepspeed["zero_optimization"]
    if deepspeed is not None:
        deepspeed = deepspeed | {
            "train_batch_size": config.global_batch_size,
            "train_micro_batch_size_per_gpu": plan.device_batch,
            "gradient_accumulation_steps": plan.accumulate,
            "gradient_clipping": 1.0,
            "bf16": {"enabled": config.precision == "bfloat16"},
            # torch's AdamW under DeepSpeed too, offloaded or not: its own need a compiler on the machine.
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=plan.device_batch,
        gradient_accumulation_steps=plan.accumulate,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        lr_scheduler_type=config.lr_schedule,
        warmup_steps=round(config.warmup_fraction * steps),
        # One pass over the CPU's memory instead of one for every operation.
        optim="adamw_torch_fused" if is_offloaded else "adamw_torch",
        bf16=config.precision == "bfloat16",
        gradient_checkpointing=config.gradient_checkpointing,
        use_cpu=not on_gpu,
        deepspeed=deepspeed,
        seed=config.seed,
        logging_steps=max(1, steps // 200),
        logging_nan_inf_filter=False,
        save_strategy="no",  # the callback asks for it, at the steps of the recipe
        save_total_limit=1,
        ddp_find_unused_parameters=False,
        remove_unused_columns=False,
        dataloader_drop_last=True,
        dataloader_pin_memory=on_gpu,
        disable_tqdm=True,
        report_to="none",
    )


class TrainingRows:
    """The training rows in order, as the Trainer's dataset."""

    def __init__(self, tokens: TokenRows, order: np.ndarray) -> None:
        self._tokens, self._order = tokens, order

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        return self._tokens[int(self._order[i])]


class Collator:
    """Rows as a batch: padded on the right; where the model allows it, logits at predicting positions only."""

    def __init__(self, restrict_logits: bool) -> None:
        self._restrict_logits = restrict_logits

    def __call__(self, rows: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
        import torch

        ids_BL, is_label_BL = pad(TokenRows.of(rows), np.arange(len(rows)))
        made = {"input_ids": ids_BL, "labels": np.where(is_label_BL, ids_BL, -100)}
        if self._restrict_logits:
            # Position j predicts token j + 1.
            made["logits_to_keep"] = np.pad(is_label_BL[:, 1:], ((0, 0), (0, 1)))
        return {name: torch.from_numpy(array) for name, array in made.items()}


def token_mean_loss(outputs: Any, labels_BL: Any, num_items_in_batch: Any = None) -> Any:
    """Mean cross-entropy per label over the global batch, from full or restricted logits."""
    from torch.nn import functional

    logits = outputs.logits
    if logits.ndim == 3:
        logits, labels = logits[:, :-1].flatten(0, 1), labels_BL[:, 1:].flatten()
    else:
        shifted = labels_BL[:, 1:]
        labels = shifted[shifted != -100]
    total = functional.cross_entropy(logits.float(), labels, ignore_index=-100, reduction="sum")
    return total / (num_items_in_batch if num_items_in_batch is not None else (labels != -100).sum())


def training_loss(trainer: Any) -> list[list[float]]:
    """(step, mean loss in nats per label) as the Trainer logged it."""
    return [[entry["step"], entry["loss"]] for entry in trainer.state.log_history if "loss" in entry]
