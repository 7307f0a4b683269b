"""What the target takes of each accelerator's memory, setting by setting, in words."""

from __future__ import annotations

from s2l_ray.config import RunConfig, ScratchModel
from s2l_ray.evaluation.sharding import UNKNOWN, Fleet, decide, evaluation_need
from s2l_ray.plan.accelerators import ACCELERATORS, ACCELERATORS_PER_NODE, size
from s2l_ray.plan.costs import Sizes, vocabulary_of
from s2l_ray.plan.memory import Setting, Training, need, recommended, resume_point_bytes, settings
from s2l_ray.runtime.workers import Workers
from s2l_ray.training.batches import BatchPlan
from s2l_ray.training.shapes import Shape, shape_of


def num_accelerators_of(config: RunConfig) -> int:
    """One per worker of the target, the fewest allowed, when each holds most; a full node if the config gives no number."""
    workers = config.machines.target.num_workers
    return min(workers) if isinstance(workers, list) else ACCELERATORS_PER_NODE if workers == "auto" else workers


def memory_lines(config: RunConfig, parameters: float, accelerator: str, number: int, per_node: int) -> list[str]:
    """What every setting needs, the fastest that fits marked, and whether the configured one fits."""
    target, memory_bytes = config.target, ACCELERATORS[accelerator][2]
    per_node = min(number, per_node)
    batch = BatchPlan.of(target.global_batch_size, number, config.machines.target.device_batch_size).device_batch
    training = Training(
        _shape(config, parameters),
        target.precision,
        number,
        per_node,
        batch,
        target.max_tokens,
        config.plan.response_fraction,
        isinstance(target.model, ScratchModel),
    )
    rank = None if target.lora is None else target.lora.rank
    configured = Setting(target.zero_stage, config.machines.target.offload, target.gradient_checkpointing, rank)
    choice = settings(rank)
    best = recommended(training, choice, memory_bytes)
    lines = [
        f"Target on {number} x {accelerator} ({memory_bytes / 1e9:.0f} GB each, {per_node} per node), {target.precision}, "
        f"{batch} x {target.max_tokens} tokens at a time:",
        f"  {'GB each':>7} {'GB of host':>10}  fits  setting",
    ]
    for setting in [*choice, *([] if configured in choice else [configured])]:
        needed = need(training, setting)
        fits = "yes" if needed.gpu <= memory_bytes else "no"
        marks = ("  <- recommended" if setting == best else "") + ("  (configured)" if setting == configured else "")
        lines.append(f"  {needed.gpu / 1e9:>7.1f} {needed.host / 1e9:>10.1f}  {fits:<4}  {setting}{marks}")
    if best is None:
        lines.append("None fits: more or larger accelerators, a smaller device_batch_size or max_tokens.")
    elif best != configured:
        values = best.overrides(rank)
        if number != num_accelerators_of(config):
            values.append(f"machines.target.num_workers={number}")
        lines.append("Recommended: " + " ".join(f"--set {value}" for value in values))
    lines += _evaluation_lines(config, training.shape, memory_bytes, number, per_node)
    if best is not None:
        lines.append("Whether the machines have that much memory of their own is not known here.")
    return lines


def _evaluation_lines(config: RunConfig, shape: Shape, memory_bytes: float, number: int, per_node: int) -> list[str]:
    """How the evaluation holds the target on the same accelerators; nothing where one holds it, or it asks for none."""
    machines = config.machines.evaluation
    if machines.gpus_per_worker == 0:
        return []
    each = 1.0 if machines.gpus_per_worker == "auto" else float(machines.gpus_per_worker)
    fleet = Fleet(UNKNOWN, (1,), (per_node,) * max(1, number // per_node), memory_bytes)
    need = evaluation_need(config, shape, on_gpu=True)
    sharding, workers = decide(machines, need, fleet, Workers(number, 1, each, number))
    if sharding.kind == "none":
        return []
    spread = f"by a device map over {workers.gpus_per_worker:g}"
    if sharding.kind == "device_map" and need.weights > sharding.gpu_bytes * workers.gpus_per_worker:
        spread += ", the rest in the machine's memory and on its disk, which is slow"
    spread = f"by ZeRO 3 over all {number}" if sharding.kind == "zero3" else spread
    return [f"The evaluation holds the target {spread}: {sharding.reason}."]


def _shape(config: RunConfig, parameters: float) -> Shape:
    """The target's shape; estimated from its parameters where it cannot be looked at."""
    vocabulary = vocabulary_of(config.target, config.proxy)
    if config.plan.target_parameters is not None:  # named, so that the model need not be looked at
        return Shape.estimated(parameters, vocabulary)
    return shape_of(config.target, parameters, vocabulary)


def resume_point_lines(config: RunConfig, sizes: Sizes) -> list[str]:
    """One line: the bytes of resume points, and how many are written in an hour where the config sets how often."""
    target, adapters = config.target, None
    if target.lora is not None and sizes.target_parameters:
        adapters = _shape(config, sizes.target_parameters).adapter_parameters(target.lora.rank)
    stored = {
        "proxy": sizes.proxy_parameters and resume_point_bytes(sizes.proxy_parameters, config.proxy.precision, 0),
        "target": sizes.target_parameters
        and resume_point_bytes(sizes.target_parameters, target.precision, target.zero_stage, adapters),
    }
    if config.proxy.checkpoints:
        del stored["proxy"]
    parts = []
    for name, num_bytes in stored.items():
        minutes = getattr(config.machines, name).checkpoint_every_minutes
        if num_bytes:
            hourly = "" if minutes == "auto" else f" every {minutes:g} minutes ({size(num_bytes * 60 / minutes)} an hour)"
            parts.append(f"{name} {size(num_bytes)}{hourly}")
    return [f"Resume points, two kept at a time: {', '.join(parts)}."] if parts else []
