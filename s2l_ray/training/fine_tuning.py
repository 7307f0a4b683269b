"""Fine-tuning on one worker of a fit, with transformers' Trainer: one way for the proxy and for the target.

Rows, order and loss are ours (`batches`), the loop is the Trainer's. It counts a step's labels over all workers and
micro-batches, so that every label weighs the same wherever it is computed, and logs that mean.
"""

from __future__ import annotations

import functools
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from s2l_ray.config import TrainingWorkerConfig
from s2l_ray.runtime.process import give_back_freed_memory
from s2l_ray.storage.places import cache
from s2l_ray.storage.records import digest
from s2l_ray.training.adapters import base_of
from s2l_ray.training.batches import NO_ROW, BatchPlan, StepByStep, batch_weights, length_balanced_order
from s2l_ray.training.losses import pad
from s2l_ray.training.output_head import accepts_logits_to_keep
from s2l_ray.training.token_rows import AnyTokenRows, Row, TokenRows
from s2l_ray.training.trackers import Tracking, reporting
from s2l_ray.training.training_run import TrainingRun
from s2l_ray.training.zero import UNIVERSAL, with_batches

TIDY_STEPS = 16
WeightedRow = tuple[np.ndarray, np.ndarray, float]
Places = np.ndarray | StepByStep


def fine_tune(
    run: TrainingRun,
    model: Any,
    tokenizer: Any,
    machines: TrainingWorkerConfig,
    events: Any,
    *,
    on_keep: Callable[[int, Any], None] | None = None,
    deepspeed: dict[str, Any] | None = None,
    tracking: Tracking | None = None,
) -> Any:
    """Train one model on this worker's share, resuming where the last registered checkpoint of this model stood.

    `on_keep(step, model)` is called on rank 0 at every step of `keep_at`; resume points are kept besides, by the clock.
    They serve any number of workers: those that ZeRO sharded over another number are converted. `deepspeed`: the
    configuration of ZeRO, None for plain data parallelism. `tracking`: the trackers that the Trainer reports to. Returns
    transformers' Trainer, whose `state.log_history` has the losses. Raises ConfigError where there are more workers than rows
    in a batch, and where a tracker cannot be used.
    """
    import ray.train.torch

    from s2l_ray.training.resume_points import Recorder, resume_point

    context = ray.train.get_context()
    is_first = context.get_world_rank() == 0
    plan = BatchPlan.of(run.config.global_batch_size, context.get_world_size(), machines.device_batch_size)
    if is_first:
        events.put(f"{run.name}: {plan}" if run.name != "proxy" else str(plan))

    folder = _node_folder(run)
    shards = context.get_world_size() if deepspeed is not None else None
    with resume_point(run.name, shards, folder, events) as checkpoint, reporting(tracking, run.name, is_first) as reports:
        if deepspeed is not None and checkpoint is not None and (Path(checkpoint) / UNIVERSAL).exists():
            deepspeed = deepspeed | {"checkpoint": {"load_universal": True}}
        if deepspeed is None and checkpoint is not None:
            _load_weights(model, checkpoint)
        arguments = _arguments(run, plan, folder, ray.train.torch.get_device().type, deepspeed, reports)
        recorder = Recorder(run, folder, events, on_keep, machines.checkpoint_every_minutes)
        trainer = _trainer(run, model, tokenizer, plan, arguments, [recorder])
        trainer.train(resume_from_checkpoint=checkpoint)
    shutil.rmtree(folder, ignore_errors=True)  # each node's own; all its workers are past the last step
    return trainer


def fine_tune_here(
    run: TrainingRun, model: Any, tokenizer: Any, device: str, device_batch_size: int | str, callbacks: Sequence[Any] = ()
) -> Any:
    """The same training in this process alone, outside of a fit and without resume points: for a model that takes seconds.

    `device`: `cpu` or `cuda`. `callbacks`: the Trainer's. Returns transformers' Trainer.
    """
    plan = BatchPlan.of(run.config.global_batch_size, 1, device_batch_size)
    with tempfile.TemporaryDirectory() as folder:
        arguments = _arguments(run, plan, Path(folder), device, None, {"report_to": "none"})
        trainer = _trainer(run, model, tokenizer, plan, arguments, [*callbacks])
        trainer.train()
    return trainer


def _trainer(run: TrainingRun, model: Any, tokenizer: Any, plan: BatchPlan, arguments: Any, callbacks: list[Any]) -> Any:
    from transformers import PrinterCallback, Trainer, TrainerCallback

    trainer = (Trainer if run.weights is None else _weighted(Trainer))(
        model=model,
        args=arguments,
        train_dataset=TrainingRows.of(run, plan),
        processing_class=tokenizer,
        data_collator=Collator(accepts_logits_to_keep(base_of(model))),
        compute_loss_func=token_mean_loss,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    if arguments.use_cpu:
        trainer.add_callback(_tidying(TrainerCallback))
        if arguments.bf16:  # torch's fused attention is slower there than its parts, by 1.3 to 1.7 for short rows
            model.set_attn_implementation("eager")
    return trainer


def _tidying(callback: Any) -> Any:
    """A callback of the Trainer that keeps the memory of a training on CPUs from growing."""

    class Tidying(callback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
            if state.global_step % TIDY_STEPS == 0:
                give_back_freed_memory()

    return Tidying


def _load_weights(model: Any, checkpoint: str) -> None:
    """Take over the weights of a resume point.

    The Trainer does it too, but leaves out, silently, weights that are saved under another name: GPT-NeoX's output layer.
    Where adapters alone were saved it has all of them.
    """
    if base_of(model) is model:
        model.load_state_dict(type(model).from_pretrained(checkpoint, dtype=model.dtype).state_dict())


def _node_folder(run: TrainingRun) -> Path:
    """A folder that the workers of one node share for the Trainer's own checkpoints, fresh for every attempt.

    What an attempt before it left on this node, killed as it was, goes away: it may be as large as the model's states.
    """
    import ray
    import ray.train
    import torch.distributed

    context = ray.train.get_context()
    of_fit = digest([context.get_storage().experiment_fs_path, ray.get_runtime_context().get_node_id()])
    folder = cache() / f"{run.name}-{of_fit}"
    if context.get_local_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    torch.distributed.barrier()
    return folder


def _arguments(
    run: TrainingRun,
    plan: BatchPlan,
    folder: Path,
    device: str,
    deepspeed: dict[str, Any] | None,
    reports: dict[str, Any],
) -> Any:
    from transformers import TrainingArguments

    config, on_gpu = run.config, device == "cuda"
    steps = len(run.order) // config.global_batch_size
    is_offloaded = deepspeed is not None and "offload_optimizer" in deepspeed["zero_optimization"]
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=plan.device_batch,
        gradient_accumulation_steps=plan.accumulate,
        average_tokens_across_devices=True,  # a step's loss is over the labels of all workers, whose shares may differ
        train_sampling_strategy="sequential",
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        lr_scheduler_type=config.lr_schedule,
        warmup_steps=round(config.warmup_fraction * steps),
        # One pass over the CPU's memory instead of one for every operation.
        optim="adamw_torch_fused" if is_offloaded else "adamw_torch",
        bf16=config.precision == "bfloat16",
        gradient_checkpointing=config.gradient_checkpointing,
        use_cpu=not on_gpu,
        deepspeed=None if deepspeed is None else with_batches(deepspeed, config.precision, plan),
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
        **reports,
    )


class TrainingRows:
    """The training rows at their places, as the Trainer's dataset; None where a worker is a row short.

    With `weights`, one for each place, each row comes with its own.
    """

    def __init__(self, tokens: AnyTokenRows, places: Places, weights: Places | None = None) -> None:
        self._tokens, self._places, self._weights = tokens, places, weights

    @classmethod
    def of(cls, run: TrainingRun, plan: BatchPlan) -> TrainingRows:
        """The rows of a run as `length_balanced_order` and `batch_weights` have them, computed step by step."""
        order, lengths, weights = run.order.reshape(-1, plan.global_batch), run.tokens.lengths, run.weights
        sizes = len(order), plan.num_places
        places = StepByStep(*sizes, lambda step: length_balanced_order(order[step], lengths, plan))
        if weights is None:
            return cls(run.tokens, places)
        return cls(run.tokens, places, StepByStep(*sizes, lambda step: batch_weights(places.at_step(step), weights, plan)))

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, i: int) -> Row | WeightedRow | None:
        row = int(self._places[i])
        if row == NO_ROW or self._weights is None:
            return None if row == NO_ROW else self._tokens[row]
        return *self._tokens[row], float(self._weights[i])


class Collator:
    """Rows as a batch: padded on the right; where the model allows it, logits at predicting positions only.

    A worker that has no row for a micro-batch computes two tokens without a label, which add nothing to loss and gradient:
    all workers take part in every step.
    """

    NOTHING: Row = (np.zeros(2, np.int32), np.zeros(2, bool))

    def __init__(self, restrict_logits: bool) -> None:
        self._restrict_logits = restrict_logits

    def __call__(self, places: list[Row | WeightedRow | None]) -> dict[str, Any]:
        """Tensors `input_ids`, `labels` (B, L) int64, where logits are restricted `logits_to_keep` (B, L) bool, and where rows
        have weights other than 1 `weights` (B,) float32."""
        import torch

        found = [row for row in places if row is not None] or [self.NOTHING]
        rows, weights = [row[:2] for row in found], [row[2] if len(row) == 3 else 1.0 for row in found]
        ids_BL, is_label_BL = pad(TokenRows.of(rows), np.arange(len(rows)))
        made = {"input_ids": ids_BL, "labels": np.where(is_label_BL, ids_BL, -100)}
        if self._restrict_logits:
            # Position j predicts token j + 1.
            made["logits_to_keep"] = np.pad(is_label_BL[:, 1:], ((0, 0), (0, 1)))
        if any(weight != 1 for weight in weights):  # else the sum is that of a training without weights, to the last bit
            made["weights"] = np.array(weights, np.float32)
        return {name: torch.from_numpy(array) for name, array in made.items()}


def _weighted(trainer: Any) -> Any:
    """A Trainer class whose loss knows the rows' weights, which its models do not take."""

    class WeightedTrainer(trainer):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: dict[str, Any], **options: Any) -> Any:
            inputs = dict(inputs)
            self.compute_loss_func = functools.partial(token_mean_loss, weights_B=inputs.pop("weights", None))
            return super().compute_loss(model, inputs, **options)

    return WeightedTrainer


def token_mean_loss(outputs: Any, labels_BL: Any, num_items_in_batch: Any = None, weights_B: Any = None) -> Any:
    """Cross-entropy in nats per label of the step, a scalar: this micro-batch's part of it.

    `num_items_in_batch`: the labels of the step over all workers; without it those of this batch. `outputs.logits` are
    (B, L, V), or (P, V) at the positions that predict a label. 0, with a gradient of 0, where there is no label.
    `weights_B`: how often each row's labels count, while the labels of the step are counted once each.
    """
    from torch.nn import functional

    logits = outputs.logits
    if logits.ndim == 3:
        logits, labels = logits[:, :-1].flatten(0, 1), labels_BL[:, 1:].flatten()
    else:
        shifted = labels_BL[:, 1:]
        labels = shifted[shifted != -100]
    if weights_B is None:
        total = functional.cross_entropy(logits.float(), labels, ignore_index=-100, reduction="sum")
    else:
        losses = functional.cross_entropy(logits.float(), labels, ignore_index=-100, reduction="none")
        weights = weights_B[:, None].expand_as(labels_BL[:, 1:])
        total = (losses * (weights.flatten() if outputs.logits.ndim == 3 else weights[labels_BL[:, 1:] != -100])).sum()
    return total / (num_items_in_batch if num_items_in_batch is not None else (labels != -100).sum().clamp(min=1))


def training_loss(trainer: Any) -> list[list[float]]:
    """(step, mean loss in nats per label) as the Trainer logged it."""
    return [[entry["step"], entry["loss"]] for entry in trainer.state.log_history if "loss" in entry]
