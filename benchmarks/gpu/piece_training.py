"""Piece 3: a training step of the proxy and of a 135M target against transformers' Trainer as it comes, and peak memory.

Goal: 1.3 times the Trainer's tokens per second. Peak memory on the GPU against what `plan` predicts, within 15%, for plain
training, recomputed activations, and LoRA.
"""

from __future__ import annotations

import gc
import tempfile
import time
from functools import partial
from typing import Any

import numpy as np
import torch
import transformers
from measuring import Cell, Kit, require, use_package

use_package()
from gpu_scoring import random_rows  # noqa: E402
from piece_losses import random_model  # noqa: E402

from s2l_ray.plan.memory import CONTEXT_BYTES, Setting, Shape, Training, need  # noqa: E402
from s2l_ray.training.batches import BatchPlan, length_balanced_order  # noqa: E402
from s2l_ray.training.fine_tuning import Collator, TrainingRows, token_mean_loss  # noqa: E402
from s2l_ray.training.output_head import accepts_logits_to_keep  # noqa: E402
from s2l_ray.training.token_rows import TokenRows  # noqa: E402

GOALS = {"ratio": 1.3, "memory_within": 0.15}
LORA_RANK = 16


def made(name: str, kit: Kit) -> Any:
    """`proxy`: Pythia-70M's shape; `target`: SmolLM2-135M's. Random weights, the same in every call."""
    torch.manual_seed(0)
    if name == "proxy":
        return random_model("gpt_neox", kit).train().to(kit.device)
    layers, hidden, heads = kit.size((30, 576, 9), (2, 48, 3))
    shape = {"num_key_value_heads": heads // 3, "intermediate_size": hidden * 8 // 3, "tie_word_embeddings": True}
    config = transformers.LlamaConfig(
        vocab_size=50_304, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, **shape
    )
    return transformers.LlamaForCausalLM(config).to(kit.device)


def plan_of(kit: Kit) -> tuple[TokenRows, BatchPlan, int]:
    """Rows, batches, steps."""
    batch, steps = kit.size((64, 20), (4, 2))
    return random_rows(batch * steps, np.random.default_rng(0), kit.size(512, 64)), BatchPlan.of(batch, 1, batch), steps


def trainer_of(model: Any, tokens: TokenRows, plan: BatchPlan, kit: Kit, folder: str, is_ours: bool, **options: Any) -> Any:
    """The package's training, or the Trainer with its own collator, loss and order."""
    arguments = transformers.TrainingArguments(
        folder,
        max_steps=len(tokens) // plan.global_batch,
        per_device_train_batch_size=plan.device_batch,
        gradient_accumulation_steps=plan.accumulate,
        learning_rate=2e-5,
        bf16=not kit.rehearse,
        use_cpu=kit.rehearse,
        save_strategy="no",
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        train_sampling_strategy="sequential",
        **options,
    )
    if is_ours:
        places = length_balanced_order(np.random.default_rng(1).permutation(len(tokens)), tokens.lengths, plan)
        collator = Collator(restrict_logits=accepts_logits_to_keep(model))
        data = TrainingRows(tokens, places)
        return quiet(transformers.Trainer(model, arguments, collator, data, compute_loss_func=token_mean_loss))
    rows = [
        {"input_ids": ids.tolist(), "labels": np.where(marks, ids, -100).tolist(), "attention_mask": [1] * len(ids)}
        for ids, marks in (tokens[i] for i in range(len(tokens)))
    ]

    def padded(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in batch)
        fill = {"input_ids": 0, "labels": -100, "attention_mask": 0}
        return {
            key: torch.tensor([row[key] + [value] * (longest - len(row[key])) for row in batch]) for key, value in fill.items()
        }

    return quiet(transformers.Trainer(model, arguments, padded, rows))


def quiet(trainer: Any) -> Any:
    """The trainer without its printed lines."""
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def same_loss(model: Any, tokens: TokenRows, kit: Kit) -> float:
    """The difference of the package's loss to the model's own on one batch, in nats."""
    some = [tokens[row] for row in range(4)]
    own, ours = Collator(restrict_logits=False)(some), Collator(restrict_logits=accepts_logits_to_keep(model))(some)
    labels = own["labels"].to(kit.device)
    with torch.no_grad():
        theirs = model(input_ids=own["input_ids"].to(kit.device), labels=labels).loss
        given = {key: value.to(kit.device) for key, value in ours.items() if key != "labels"}
        return float((token_mean_loss(model(**given), labels) - theirs).abs())


def steps_per_second(kit: Kit, name: str) -> dict[str, Any]:
    """Tokens per second of both ways, pair by pair."""
    tokens, plan, steps = plan_of(kit)
    model = made(name, kit)
    difference = same_loss(model, tokens, kit)
    require(difference <= 1e-4, f"the loss of a batch differs by {difference:.1e} nats from the model's own")
    rates: dict[bool, list[float]] = {False: [], True: []}
    for pair in range(kit.size(4, 2)):
        for is_ours in (False, True):
            with tempfile.TemporaryDirectory() as folder:
                trainer = trainer_of(model, tokens, plan, kit, folder, is_ours)
                begun = time.perf_counter()
                trainer.train()
                if pair:  # the first warms up
                    rates[is_ours].append(len(tokens.ids) / (time.perf_counter() - begun))
    theirs, ours = np.median(rates[False]), np.median(rates[True])
    return {
        "tokens_per_second": float(ours),
        "trainer": float(theirs),
        "ratio": float(ours / theirs),
        "goals": GOALS,
        "steps": steps,
    }


def peak_memory(kit: Kit, name: str, setting: Setting) -> dict[str, Any]:
    """The most that the GPU held in some steps of full rows against `plan`'s prediction, context and reserve included."""
    model = made(name, kit)
    batch, length = kit.size((16, 512), (2, 32))
    rng = np.random.default_rng(0)
    rows = [(rng.integers(0, 50_304, length).astype(np.int32), np.arange(length) > 0) for _ in range(3 * batch)]
    config = model.config
    size = Shape(
        float(sum(weight.numel() for weight in model.parameters())),
        config.hidden_size,
        config.num_hidden_layers,
        config.vocab_size,
        config.intermediate_size,
        is_gated=name == "target",
    )
    precision: Any = "float32" if kit.rehearse else "bfloat16"
    predicted = need(Training(size, precision, 1, 1, batch, length), setting).gpu
    if setting.lora_rank:
        import peft

        model = peft.get_peft_model(
            model, peft.LoraConfig(task_type="CAUSAL_LM", r=setting.lora_rank, target_modules="all-linear")
        )
        model.enable_input_require_grads()
    gc.collect()
    if not kit.rehearse:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        options = {"gradient_checkpointing": setting.gradient_checkpointing}
        trainer = trainer_of(model, TokenRows.of(rows), BatchPlan.of(batch, 1, batch), kit, folder, True, **options)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    require(bool(losses) and bool(np.isfinite(losses).all()), "a loss is not finite")
    if kit.rehearse:
        return {"predicted_bytes": predicted, "measured": "a CPU has no such measure"}
    measured = torch.cuda.max_memory_reserved() + CONTEXT_BYTES
    return {
        "predicted_bytes": predicted,
        "measured_bytes": measured,
        "predicted_over_measured": predicted / measured,
        "goals": GOALS,
    }


def cells(kit: Kit) -> dict[str, Cell]:
    """The piece's cells."""
    found: dict[str, Cell] = {
        f"{name} against the Trainer": partial(steps_per_second, kit, name) for name in ("proxy", "target")
    }
    for words, setting in {
        "plain": Setting(0),
        "checkpointing": Setting(0, gradient_checkpointing=True),
        "LoRA": Setting(0, lora_rank=LORA_RANK),
    }.items():
        found[f"target memory, {words}"] = partial(peak_memory, kit, "target", setting)
    return found
