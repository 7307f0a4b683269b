"""What needs a model to write: greedy answers to prompts, and the tasks of the lm-evaluation-harness."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from s2l_ray.errors import ConfigError, DataError
from s2l_ray.evaluation.sharding import GENERATION_TOKENS
from s2l_ray.training.models import positions
from s2l_ray.training.output_head import input_device

GENERATION_BATCH = 32


def generate(
    model: Any, tokenizer: Any, prompts: list[list[int]], max_new_tokens: int, ends: Collection[int] = ()
) -> list[str]:
    """A greedy continuation of each tokenised prompt, in the order of the prompts and without special tokens.

    Ends at the end-of-sequence token, at one of `ends`, after `max_new_tokens` or at the model's last position. Batches hold
    prompts of similar length, padded on the left; keys and values of earlier tokens are kept.
    """
    import torch

    device, stops = input_device(model), sorted({tokenizer.eos_token_id, *ends})
    responses = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for rows, longest in _batches(order, [len(prompt) for prompt in prompts], max_new_tokens):
        padding = [longest - len(prompts[i]) for i in rows]
        ids_BL = torch.tensor([[tokenizer.pad_token_id] * pad + prompts[i] for i, pad in zip(rows, padding, strict=True)])
        mask_BL = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in padding])
        room = max(1, (positions(model) or sys.maxsize) - longest)
        with torch.inference_mode():
            generated_BL = model.generate(
                input_ids=ids_BL.to(device),
                attention_mask=mask_BL.to(device),
                max_new_tokens=min(max_new_tokens, room),
                do_sample=False,
                use_cache=True,
                synced_gpus=False,  # `in_step` keeps workers that share a model together
                eos_token_id=stops,
                pad_token_id=tokenizer.pad_token_id,
            )
        texts = tokenizer.batch_decode(generated_BL[:, longest:], skip_special_tokens=True)
        for i, text in zip(rows, texts, strict=True):
            responses[i] = text
    return responses


def _batches(order: list[int], lengths: list[int], max_new_tokens: int) -> Iterator[tuple[list[int], int]]:
    """The rows of each batch and its longest prompt; `order` ascends by length."""
    start = 0
    while start < len(order):
        rows = order[start : start + GENERATION_BATCH]
        while len(rows) > 1 and len(rows) * (lengths[rows[-1]] + max_new_tokens) > GENERATION_TOKENS:
            rows.pop()
        yield rows, lengths[rows[-1]]
        start += len(rows)


def run_tasks(model: Any, tokenizer: Any, tasks: list[str]) -> dict[str, dict[str, float]]:
    """Zero-shot results of the lm-evaluation-harness, {task: {metric: value}}.

    Raises ConfigError where the harness is not installed or knows no such task, DataError where a task's data is not there.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ConfigError("evaluation.tasks needs the lm-evaluation-harness: pip install 's2l_ray[lm-eval]'") from error
    try:
        results = lm_eval.simple_evaluate(HFLM(pretrained=model, tokenizer=tokenizer), tasks=tasks, num_fewshot=0)["results"]
    except (KeyError, ValueError) as error:
        raise ConfigError(f"evaluation.tasks={tasks}: {error}") from error
    except OSError as error:
        raise DataError(f"evaluation.tasks={tasks}: the task's data cannot be read ({error})") from error
    return {task: harness_metrics(found) for task, found in results.items()}


def harness_metrics(found: Mapping[str, Any]) -> dict[str, float]:
    """A task's numbers by metric. The harness names them `metric,filter`; the filter stays, as `metric (filter)`, where a
    metric was measured under several (gsm8k's exact_match is, strictly and flexibly)."""
    values = {name.partition(",")[::2]: float(value) for name, value in found.items() if isinstance(value, float)}
    filters = Counter(metric for metric, _ in values)
    return {metric if filters[metric] == 1 else f"{metric} ({kind})": value for (metric, kind), value in values.items()}
