"""Where the target's weights are while it is evaluated: whole on a worker's device, or spread because no device holds them.

By formulas, before a model is read: with P parameters of w bytes, weights are w P. On top comes, on every device that computes,
the working space of a layer on the largest batch, and the keys and values of all tokens of a batch of answers or, if that is
more, a tile of logits. What there is: a GPU's memory as torch sees it, a node's as Ray counts it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from s2l_ray.config import EvaluationWorkerConfig, RunConfig, TargetConfig
from s2l_ray.config.section import Precision
from s2l_ray.progress import get_log
from s2l_ray.runtime.workers import Workers
from s2l_ray.training.shapes import Shape, shape_of

Kind = Literal["none", "device_map", "zero3"]
# Keys and values are kept of so many tokens at most, prompts and answers together, unless one alone is longer.
GENERATION_TOKENS = 16384
# Where each batch reads weights from the machine's memory or disk.
OFFLOADED_TOKENS_PER_BATCH = 16384
# An assumption: what libraries take of a GPU (a CUDA context, NCCL's and cuBLAS's workspaces), and what is lost in fragments.
CONTEXT_BYTES, FRAGMENTATION = 1.5e9, 0.10
# Logits of a tile on a GPU, in float32, with two temporaries.
TILE_BYTES = 3 * 4 * 8192 * 16384
# What every GPU has: below it none is asked how much it has.
SMALL = 8e9
# Where a node does not say how much memory it has: no limit.
UNKNOWN = 1e15


@dataclass(frozen=True)
class EvaluationNeed:
    """Bytes that evaluating one model takes."""

    weights: float
    working: float
    """On each device that computes."""

    piece: float = 0.0
    """Of the weights: the largest piece that stays on one device."""

    @property
    def whole(self) -> float:
        """On one device."""
        return self.weights + self.working


@dataclass(frozen=True)
class Fleet:
    """What the machines have."""

    node_bytes: float
    """Of memory for models, on the smallest node."""

    cpus: tuple[int, ...]
    """Of each node that workers may be on."""

    gpus: tuple[int, ...] = ()
    gpu_bytes: float = 0.0
    """Of one GPU."""


@dataclass(frozen=True)
class Sharding:
    """How one model is spread, and why."""

    kind: Kind = "none"
    reason: str = ""
    gpu_bytes: float = 0.0
    """For weights, of each of a worker's GPUs."""

    cpu_bytes: float = 0.0
    """For weights, of the machine's memory."""

    def max_memory(self, num_gpus: int) -> dict[int | str, int] | None:
        """What accelerate's device map may use, by GPU and `cpu`; None where there is no device map."""
        if self.kind != "device_map":
            return None
        return {number: int(self.gpu_bytes) for number in range(num_gpus)} | {"cpu": int(self.cpu_bytes)}


def held_precision(target: TargetConfig) -> Precision:
    """That of the weights, as the training keeps them: DeepSpeed has bfloat16 ones, the Trainer alone float32 ones."""
    return "bfloat16" if target.precision == "bfloat16" and target.zero_stage else "float32"


def evaluation_need(config: RunConfig, shape: Shape, *, on_gpu: bool) -> EvaluationNeed:
    """What evaluating the target takes."""
    target = config.target
    w = 2 if held_precision(target) == "bfloat16" else 4
    tokens = max(GENERATION_TOKENS, OFFLOADED_TOKENS_PER_BATCH)
    cache = 2 * w * shape.layers * (shape.key_value or shape.hidden) * tokens
    # Nothing is kept for a backward pass: the residual stream, attention's inputs, and the feed-forward layer with its gate.
    layer = w * (4 * shape.hidden + 3 * shape.intermediate) * tokens
    tile = TILE_BYTES if on_gpu else 0.0
    working = (1 + FRAGMENTATION) * (layer + max(cache, tile)) + (CONTEXT_BYTES if on_gpu else 0)
    # Autocast keeps a copy of float32 weights in bfloat16.
    copies = 2 * shape.parameters if w == 4 and target.precision == "bfloat16" else 0
    piece = w * max(shape.parameters / shape.layers, shape.vocabulary * shape.hidden)
    return EvaluationNeed(w * shape.parameters + copies, working, piece)


def decide(config: EvaluationWorkerConfig, need: EvaluationNeed, fleet: Fleet, workers: Workers) -> tuple[Sharding, Workers]:
    """How the model is spread, and over which workers; those that the config numbers stay as they are."""
    on_gpu = _on_gpus if workers.gpus_per_worker else _on_cpus
    sharding, found = on_gpu(config, need, fleet, workers)
    size = f"{need.weights / 1e9:.3g} GB of weights and {need.working / 1e9:.3g} GB to work"
    return replace(sharding, reason=f"{size}, {sharding.reason}"), found


def _on_cpus(config: EvaluationWorkerConfig, need: EvaluationNeed, fleet: Fleet, workers: Workers) -> tuple[Sharding, Workers]:
    is_auto, most = config.num_workers == "auto" and config.cpus_per_worker == "auto", max(fleet.cpus, default=1)
    beside = max(1, min(workers.num_workers, most // workers.cpus_per_worker))
    limit = config.max_memory.get("cpu")
    of_one = fleet.node_bytes / beside if limit is None else 1e9 * limit
    if is_auto and limit is None and need.whole > of_one:  # fewer copies
        beside = max(1, min(beside, int(fleet.node_bytes // need.whole)))
        of_one, number = fleet.node_bytes / beside, beside * max(1, len(fleet.cpus))
        workers = replace(workers, num_workers=number, min_workers=number, cpus_per_worker=max(1, most // beside))
    has = f"{of_one / 1e9:.3g} GB of memory for each of {workers.num_workers} workers"
    if config.sharding == "zero3":
        return Sharding("zero3", f"asked for, {has}"), workers
    if config.sharding == "none" or (config.sharding == "auto" and need.whole <= of_one):
        return Sharding("none", has), workers
    return Sharding("device_map", has, cpu_bytes=max(0.0, of_one - need.working)), workers


def _on_gpus(config: EvaluationWorkerConfig, need: EvaluationNeed, fleet: Fleet, workers: Workers) -> tuple[Sharding, Workers]:
    limit, of_node, total = config.max_memory.get("gpu"), max(fleet.gpus, default=1), sum(fleet.gpus)
    of_one = (fleet.gpu_bytes if limit is None else 1e9 * limit) * min(1.0, workers.gpus_per_worker)
    room = of_one - need.working
    has = f"{of_one / 1e9:.3g} GB on a GPU"
    if config.sharding == "none" or (config.sharding == "auto" and room >= need.weights and workers.gpus_per_worker <= 1):
        return Sharding("none", has), workers
    free = room - need.piece  # a device map splits no layer
    enough = max(2, math.ceil(need.weights / free)) if free > 0 else total + 1
    number = enough if config.gpus_per_worker == "auto" else int(workers.gpus_per_worker)
    if config.sharding == "zero3" or (config.sharding == "auto" and enough > of_node and enough <= total):
        workers = replace(workers, gpus_per_worker=1.0)
        if config.num_workers == "auto":
            workers = replace(workers, num_workers=max(1, total), min_workers=max(1, total))
        return Sharding("zero3", f"{has}, {workers.num_workers} GPUs"), workers
    number = max(1, min(number, of_node))
    groups = max(1, sum(gpus // number for gpus in fleet.gpus))
    if config.num_workers == "auto":
        workers = replace(workers, num_workers=groups, min_workers=groups)
    workers = replace(workers, gpus_per_worker=float(number))
    given = config.max_memory.get("cpu")
    in_memory = fleet.node_bytes / max(1, of_node // number) if given is None else 1e9 * given
    return Sharding("device_map", f"{has}, {number} for a model", max(0.0, room), in_memory), workers


def resolve_sharding(config: RunConfig, machines: EvaluationWorkerConfig, parameters: float) -> tuple[Sharding, Workers]:
    """How the target of so many parameters is spread over the machines that Ray has; logged where it is."""
    workers = Workers.resolve(machines, one_per_cpu=True)
    on_gpu = workers.gpus_per_worker > 0
    # A rough shape is enough for a small one, which is not worth a look at its configuration.
    shape = Shape.estimated(max(1.0, parameters))
    if evaluation_need(config, shape, on_gpu=on_gpu).whole > SMALL:
        shape = shape_of(config.target, parameters, None)
    need = evaluation_need(config, shape, on_gpu=on_gpu)
    sharding, found = decide(machines, need, _fleet(machines, need, workers), workers)
    if sharding.kind != "none" or found != workers:
        get_log("evaluation").info("sharding: %s (%s)", sharding.kind, sharding.reason)
    return sharding, found


def _fleet(machines: EvaluationWorkerConfig, need: EvaluationNeed, workers: Workers) -> Fleet:
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    nodes = [node for node in nodes if node.get("GPU" if workers.gpus_per_worker else "CPU")] or [{}]
    cpus, gpus = (tuple(int(node.get(kind, 0)) for node in nodes) for kind in ("CPU", "GPU"))
    node_bytes = min(float(node.get("memory", UNKNOWN)) for node in nodes)
    is_asked = bool(workers.gpus_per_worker) and "gpu" not in machines.max_memory and need.whole > SMALL
    gpu_bytes = ray.get(ray.remote(num_gpus=1)(_gpu_bytes).remote()) if is_asked else SMALL
    return Fleet(node_bytes, cpus, gpus, gpu_bytes)


def _gpu_bytes() -> Any:
    """On a GPU: how much memory it has."""
    import torch

    return torch.cuda.mem_get_info()[1]
