"""ZeRO 3 without an optimizer: every worker keeps a share of a model's weights and computes on rows of its own.

A layer's weights are gathered from all workers when one needs them, so all have to run a forward pass at the same time, though
not on as many or as long batches. `in_step` sees to that: before each pass of its backbone a worker asks the others, and one
that has nothing left to do takes part with a token of no account until all have finished. The output layer is whole in every
worker: it is read tile by tile, at other moments in each.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


def inference_config(precision: str) -> dict[str, Any]:
    """DeepSpeed's configuration for it."""
    return {
        "train_micro_batch_size_per_gpu": 1,  # of no account
        "bf16": {"enabled": precision == "bfloat16"},
        # Nothing is fetched ahead: workers whose batches differ must gather the same weights in the same order.
        "zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 0},
    }


def partitioned(model: Any, config: dict[str, Any], device: Any) -> Any:
    """A model that was read in shares by this configuration, ready to compute on a device."""
    import deepspeed
    from torch import nn

    engine, *_ = deepspeed.initialize(model=model.eval(), config=config, dist_init_required=False)
    # With each pass of the whole model DeepSpeed compares its layers' order over all workers, of which some are not in it.
    engine.optimizer.fwd_pre_hook.remove()
    output = model.get_output_embeddings()
    with deepspeed.zero.GatheredParameters([*output.parameters()]):
        whole = nn.Linear(output.in_features, output.out_features, output.bias is not None, device, output.weight.dtype)
        whole.load_state_dict({name: value.detach().to(device) for name, value in output.named_parameters()})
    model.set_output_embeddings(whole.requires_grad_(False))
    return model


def free(model: Any) -> None:
    """Give a share's memory back: DeepSpeed keeps hold of every model that it was given."""
    for parameter in model.parameters():
        parameter.ds_tensor = None
        parameter.data = parameter.data.new_empty(0)


@contextlib.contextmanager
def in_step(model: Any, device: Any) -> Iterator[None]:
    """Within it each worker runs as many forward passes of a partitioned model as it likes; it ends when all have ended."""
    import torch
    from torch import distributed

    def working(is_working: bool) -> bool:
        """Tell the others; whether anyone is."""
        number_1 = torch.tensor([int(is_working)], device=device)
        distributed.all_reduce(number_1)
        return bool(number_1.item())

    def ask(*_: Any) -> None:
        working(True)

    backbone = getattr(model, model.base_model_prefix)
    hook = backbone.register_forward_pre_hook(ask, prepend=True)
    try:
        yield
    finally:
        hook.remove()
        nothing_11 = torch.zeros((1, 1), dtype=torch.int64, device=device)
        while working(False):
            with torch.no_grad():
                backbone(input_ids=nothing_11, use_cache=False)
