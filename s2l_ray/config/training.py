"""The sections of what is trained: how a model is fine-tuned, the proxy, the target."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from s2l_ray.config.section import Fraction, Positive, Precision, Schedule, Section


class Scratch(Section):
    """A model with random weights, by its shape."""

    architecture: str = "gpt_neox"
    """A causal model type of transformers: `gpt_neox` (Pythia), `llama`, `qwen2`, `gpt2` ..."""

    layers: Positive
    """Transformer layers."""

    hidden: Positive
    """Hidden size."""

    heads: Positive = 4
    """Attention heads; divides `hidden`."""

    intermediate: Positive | None = None
    """Width of the feed-forward layer; 4 x hidden unless given."""

    max_positions: Positive = 2048
    """Longest sequence."""

    tie_embeddings: bool = False
    """Share input and output embeddings."""

    seed: int | None = None
    """Seed of the random weights; without it the training's own `seed`."""

    @model_validator(mode="after")
    def _heads_divide_hidden(self) -> Scratch:
        if self.hidden % self.heads:
            raise ValueError(f"heads={self.heads} does not divide hidden={self.hidden}")
        return self


class ScratchModel(Section):
    """`model: {scratch: {...}}`."""

    scratch: Scratch


class TrainedTokenizer(Section):
    """`tokenizer: {train: bpe, vocab_size: ...}`: a byte-level BPE tokenizer trained on the pool."""

    train: Literal["bpe"] = "bpe"
    vocab_size: Annotated[int, Field(ge=260)] = 4096


class TrainingConfig(Section):
    """How a model is fine-tuned: the same fields for the proxy and for the target."""

    model: str | ScratchModel
    """Hub id, path or URI of a model; or `{scratch: {...}}`."""

    revision: str | None = None
    """Commit, tag or branch of a Hub model. Give a commit: a branch moves."""

    tokenizer: str | TrainedTokenizer | None = None
    """Hub id, path or URI of a tokenizer, or `{train: bpe, vocab_size: ...}`. Without it: the model's own, and for a
    target from scratch the proxy's."""

    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless you trust its author."""

    epochs: Annotated[float, Field(gt=0)] = 3.0
    """Passes over the data (paper: 3)."""

    global_batch_size: Positive = 128
    """Examples per optimizer step over all workers (paper: 128)."""

    learning_rate: Annotated[float, Field(gt=0)] = 2.0e-5
    """Peak learning rate of AdamW (paper: 2e-5)."""

    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's weight decay (paper: 0)."""

    lr_schedule: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    """Learning-rate schedule after the warm-up (paper: cosine)."""

    warmup_fraction: Fraction = 0.03
    """Share of the steps in which the learning rate rises from zero (paper: 0.03)."""

    max_tokens: Annotated[int, Field(ge=2)] = 512
    """Longest row in tokens (paper: 512); longer ones are cut."""

    truncation: Literal["right", "left_prompt"] = "right"
    """Where a longer row is cut: on the right, or first at the start of its prompt, so that the response stays."""

    precision: Precision = "float32"
    """Arithmetic of the training. The optimizer works in float32; DeepSpeed also keeps, and saves, bfloat16 weights."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""

    seed: int = 42
    """Seed of the data order, of random weights and of dropout."""


class ProxyConfig(TrainingConfig):
    """The small model whose losses are recorded, and when."""

    num_checkpoints: Positive = 12
    """T, for any number of workers (paper: 12)."""

    schedule: Schedule = "equal"
    """When: after step round(i * S / T) of S (equal), at equal ratios (logarithmic), or dense in the first, second or last
    third of the training and at its end (early, middle, late)."""

    checkpoint_every_steps: Positive | None = None
    """Instead of `num_checkpoints`: every so many steps, and the last (the reference code: 500)."""

    include_untrained: bool = False
    """Also record the model before its first step. It adds a point, and often a dimension, to every trajectory."""

    checkpoints: list[str] = Field(default_factory=list)
    """Score these checkpoints (paths, URIs or Hub `id@revision`), in this order, and train nothing."""


class Lora(Section):
    """Low-rank adapters (peft): the model's own weights stay as they are, small matrices added to them are trained."""

    rank: Positive = 16
    """Rank of the matrices."""

    alpha: Annotated[float, Field(gt=0)] = 32.0
    """Their products count `alpha / rank` times."""

    dropout: Fraction = 0.0
    """Dropout before them."""

    target_modules: list[str] | Literal["all-linear"] = "all-linear"
    """Names of the layers that get them; all-linear: every linear layer but the output layer."""

    save: Literal["merged", "adapter"] = "merged"
    """A whole model with the adapters added in, or the adapters alone: a few MB, loaded with peft and the base model."""


class TargetConfig(TrainingConfig):
    """The large model that is fine-tuned on the subset."""

    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO stage: 1 shards optimizer states over the workers, 2 gradients too, 3 parameters too."""

    lora: Lora | None = None
    """Train adapters instead of all weights (`pip install 's2l_ray[lora]'`)."""

    use_weights: bool = False
    """Count each example's loss as often as its weight in `selected.parquet` says, divided by the mean weight of its batch: an
    estimate of the pool's gradient, which equal shares of groups are not. Its direction is unbiased; its length varies with the
    batch, by how many labels the examples of large weight have. Random subsets have equal weights."""

    @model_validator(mode="after")
    def _adapters_have_a_base(self) -> TargetConfig:
        if self.lora is not None and self.lora.save == "adapter" and isinstance(self.model, ScratchModel):
            raise ValueError("lora.save=adapter: a model from scratch is nowhere to be loaded from. Set lora.save=merged")
        return self
