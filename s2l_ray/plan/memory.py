"""How much memory a fine-tuning needs per accelerator and per node, under DeepSpeed ZeRO: formulas only, nothing is measured.

With P parameters, Q of them trained, W workers and w bytes a weight (2 in bfloat16, 4 in float32), per accelerator:

- states: w P weights, w Q gradients, (4 + 8) Q for the float32 master weights and Adam's two moments. Stage 1 divides the
  last by W, stage 2 the gradients too, stage 3 the weights too (Rajbhandari et al. 2020, "ZeRO", section 3 and figure 1).
- the step: 4 Q / W for the gradients in float32 and 4 Q / W for the square root in torch's AdamW. They come after the
  backward pass, so they count against the activations, not on top of them.
- buffers of DeepSpeed at its defaults: one bucket of 5e8 gradients; in stage 3 its copy, and the gathered weights.
- activations: Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models", equation 2: a layer
  keeps s b h (34 + 5 a s / h) bytes for the backward pass. Fused attention keeps no a s / h term, there is no dropout (2 of
  the 34 are its masks), rotated queries and keys are kept (4 more): 18 h numbers a token. See `layer_bytes`.
- the logits: of response positions only (see `logit_bytes`), and a layer's working space (see `activation_bytes`).

Against DeepSpeed's estimators (`estimate_zero2_model_states_mem_needs` and its like for stage 3), which count states only:
they have 18 Q / W for what is sharded, with both copies of the gradients and without Adam's square root; here the step has
20 Q / W in stage 2 and 24 Q / W in stage 3, whose 2 Q / W of weights theirs leave out. Their host memory is multiplied by 1.5
for safety, ours is not; their stage 3 gathers one layer at a time, DeepSpeed itself keeps up to 1e9 parameters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from s2l_ray.training.shapes import Shape, layer_bytes

Offload = Literal["none", "optimizer", "parameters"]

# DeepSpeed's defaults (runtime/zero/config.py), in numbers, not bytes: reduce_bucket_size, stage3_max_live_parameters and
# sub_group_size.
BUCKET = 5e8
MOST_GATHERED = 1e9
SUB_GROUP = 1e9
# An assumption: a CUDA context (about 0.5 GB), NCCL's and cuBLAS's workspaces.
CONTEXT_BYTES = 1.5e9
# An assumption: what is allocated and freed in every step (activations, buffers) takes this share more than it holds.
FRAGMENTATION = 0.10


@dataclass(frozen=True)
class Training:
    """What is trained and on how many accelerators: what no setting changes."""

    shape: Shape
    precision: Literal["float32", "bfloat16"]
    num_workers: int
    workers_per_node: int
    device_batch: int
    tokens: int
    """Tokens of the longest example: a batch may consist of such."""

    response_fraction: float = 1.0
    """Share of the positions whose logits are computed."""

    is_from_scratch: bool = False
    """Whether the model is made with random weights, not read from files."""

    @property
    def weight_bytes(self) -> int:
        return 2 if self.precision == "bfloat16" else 4


@dataclass(frozen=True)
class Setting:
    """What a user can turn to save memory."""

    zero_stage: int
    offload: Offload = "none"
    gradient_checkpointing: bool = False
    lora_rank: int | None = None

    def __str__(self) -> str:
        marks = [f"LoRA of rank {self.lora_rank}" if self.lora_rank else "", f"ZeRO {self.zero_stage}"]
        marks += ["" if self.offload == "none" else f"{self.offload} offloaded"]
        marks += ["checkpointing" if self.gradient_checkpointing else ""]
        return ", ".join(filter(None, marks))

    def overrides(self, lora_rank: int | None = None) -> list[str]:
        """The values of `--set` that ask for it, in a config whose adapters have this rank."""
        lora = [f"'target.lora={{rank: {self.lora_rank}}}'"] if self.lora_rank != lora_rank else []
        return [
            f"target.zero_stage={self.zero_stage}",
            f"machines.target.offload={self.offload}",
            f"target.gradient_checkpointing={str(self.gradient_checkpointing).lower()}",
            *lora,
        ]


@dataclass(frozen=True)
class Need:
    """Bytes."""

    states: float
    """Per accelerator: weights, gradients and optimizer states, all through the training."""

    activations: float
    """Per accelerator: what the forward pass keeps, and the logits."""

    step: float
    """Per accelerator: in the optimizer's step."""

    gpu: float
    """Per accelerator: the most at any moment, reserve included."""

    host: float
    """Per node, while loading, training or merging adapters, whichever is most."""


# In order of speed. The first needs more than the second and is no faster: it is shown, never recommended.
SETTINGS = (
    Setting(1),
    Setting(2),
    Setting(2, gradient_checkpointing=True),
    Setting(3),
    Setting(3, gradient_checkpointing=True),
    Setting(3, "optimizer", gradient_checkpointing=True),
    Setting(3, "parameters", gradient_checkpointing=True),
)
LORA_RANK = 16


def settings(lora_rank: int | None) -> list[Setting]:
    """The settings to choose from, fastest first; adapters come last, where they are not asked for: they are another recipe."""
    made = [replace(setting, lora_rank=lora_rank) for setting in SETTINGS]
    return made if lora_rank else [*made, *(replace(SETTINGS[i], lora_rank=LORA_RANK) for i in (2, 6))]


def recommended(training: Training, choice: list[Setting], memory_bytes: float) -> Setting | None:
    """The fastest that fits, None where none does."""
    return next((setting for setting in choice[1:] if need(training, setting).gpu <= memory_bytes), None)


def need(training: Training, setting: Setting) -> Need:
    """The memory that a training needs under a setting."""
    # Stage 0 is the Trainer without DeepSpeed: float32 weights, cast to bfloat16 as it computes, and DDP.
    shape, stage = training.shape, setting.zero_stage
    w = training.weight_bytes if stage else 4
    trained = shape.adapter_parameters(setting.lora_rank) if setting.lora_rank else shape.parameters
    optimizer_share, gradient_share, weight_share = (training.num_workers if stage >= least else 1 for least in (1, 2, 3))
    # In float32 the weights are their own masters, but DeepSpeed copies them in stage 1 and 2, and to offload them.
    has_master = w == 2 or stage in (1, 2) or setting.offload != "none"
    weights, gradients = w * shape.parameters / weight_share, w * trained / gradient_share
    optimizer = (12 if has_master else 8) * trained / optimizer_share
    # Gradients in float32 (and a buffer of its size for Adam), in stage 3 group after group.
    step = (8 if stage else 4) * min(trained / optimizer_share, SUB_GROUP if stage == 3 else math.inf)

    # Offloaded gradients of stage 2 and 3 are in the host's memory, too.
    offloads_gradients = setting.offload != "none" and stage >= 2
    offloaded = (optimizer + step if setting.offload != "none" else 0) + (gradients if offloads_gradients else 0)
    offloaded += weights if setting.offload == "parameters" else 0
    if setting.offload != "none":
        optimizer = step = 0
        offloaded += w * trained / optimizer_share if stage < 3 else 0  # the updated weights on their way back
    gradients = 0 if offloads_gradients else gradients
    weights = 0 if setting.offload == "parameters" else weights

    # The bucket (DDP's buckets hold all gradients), and the output layer's gradient before it is added to the others.
    # Autocast keeps a copy of the weights in bfloat16 through a step.
    buffers = 2.0 * shape.parameters if stage == 0 and training.precision == "bfloat16" else 0.0
    buffers += w * ((BUCKET if stage else trained) + min(trained, shape.vocabulary * shape.hidden))
    if stage == 3:
        buffers += w * (min(trained, BUCKET) + min(shape.parameters, MOST_GATHERED))
    activations = activation_bytes(training, gradient_checkpointing=setting.gradient_checkpointing)
    states = weights + gradients + optimizer
    # Stages 1 and 2 have let go of the 16-bit gradients when Adam begins; stage 3 holds on to them and to its bucket.
    stepping = weights + optimizer + step + (gradients if stage in (0, 3) else 0) + (w * BUCKET if stage == 3 else 0)
    most = max(states + (1 + FRAGMENTATION) * (buffers + activations), stepping)
    # Stage 3 shards a model as the first worker reads it; any other is whole in every worker first, in float32.
    is_sharded_at_once = stage == 3 and not training.is_from_scratch
    loading = 4 * shape.parameters * (1 if is_sharded_at_once else training.workers_per_node)
    if stage == 3 and not is_sharded_at_once:
        most = max(most, w * shape.parameters)
    # Adapters are merged, at the end, into the whole model in float32 on the first worker, next to what is still offloaded.
    merging = 4 * shape.parameters if setting.lora_rank else 0
    host = max(loading, training.workers_per_node * offloaded + merging)
    return Need(states, activations, stepping, most + CONTEXT_BYTES, host)


def activation_bytes(training: Training, *, gradient_checkpointing: bool) -> float:
    """What a forward pass keeps for its backward pass, the logits with their gradients, and a layer's working space.

    With checkpointing a layer's input is kept (2 s b h l in the paper), and one layer at a time is computed again, when
    the logits are gone. The working space is no part of the paper's formula: temporaries, and the gradients of activations.
    Measured on GPT-NeoX and Llama it is about as much as a layer keeps, and twice that where the layer is computed again.
    """
    shape, tokens = training.shape, training.device_batch * training.tokens
    outside = 3 * training.weight_bytes * shape.hidden * tokens  # embedding, last norm, the output layer's input
    layer = layer_bytes(shape, training.weight_bytes) * tokens
    logits = logit_bytes(training.weight_bytes) * shape.vocabulary * tokens * training.response_fraction
    whole = (shape.layers + 1) * layer + logits
    kept = shape.layers * training.weight_bytes * shape.hidden * tokens + max(3 * layer, layer + logits)
    return outside + (min(whole, kept) if gradient_checkpointing else whole)


def logit_bytes(weight_bytes: int) -> int:
    """Bytes per logit at the start of the backward pass.

    The cross-entropy is in float32: its log-softmax, the gradient of that, and the gradient that it becomes (12); and the
    model's own output, in its precision.
    """
    return 12 + weight_bytes


def resume_point_bytes(parameters: float, precision: str, zero_stage: int, trained: float | None = None) -> float:
    """Bytes of one resume point, by what transformers' Trainer writes.

    Without DeepSpeed (`zero_stage` 0): float32 weights and Adam's two moments, in any precision. With it: the weights
    as safetensors and, up to stage 2, once more in DeepSpeed's own file; the float32 masters and the moments. Of a
    model with adapters (`trained` parameters) the Trainer writes the adapters' only (`exclude_frozen_parameters`).
    """
    trained = parameters if trained is None else trained
    if zero_stage == 0:
        return 12 * trained
    weights = 2 if precision == "bfloat16" else 4
    return trained * (weights * (1 if zero_stage == 3 else 2) + 12)
