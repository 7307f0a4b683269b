"""Proxies: a small model of the target's family where one is known and can be had, else one from scratch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from s2l_ray.errors import S2LError
from s2l_ray.init.target import TargetModel, cached_folder
from s2l_ray.storage.hub import hub_commit

WANTED_RATIO = 40
"""How many times smaller than the target a proxy should be (METHOD: up to 40 times)."""
LEAST_RATIO = 3
"""A proxy that is nearly as large as the target saves nothing."""
_SCRATCH_HIDDEN = (16, 32, 64, 128, 192, 256, 384, 512, 768)


@dataclass(frozen=True)
class Family:
    """Small public models that share a tokenizer (or, for Phi, that the paper used), by size."""

    pattern: str
    """What a target's name has in it."""
    sizes: dict[str, float]
    """Hub id -> parameters."""
    chat_suffix: str = ""
    """Behind the id of a variant with a chat template, if there is one."""
    reason: str = "of the target's family, with its tokenizer"


_PYTHIA = {
    "EleutherAI/pythia-70m-deduped": 70e6,
    "EleutherAI/pythia-160m-deduped": 162e6,
    "EleutherAI/pythia-410m-deduped": 405e6,
}
FAMILIES = [
    Family(r"pythia", _PYTHIA),
    Family(r"smollm2", {"HuggingFaceTB/SmolLM2-135M": 135e6, "HuggingFaceTB/SmolLM2-360M": 362e6}, "-Instruct"),
    Family(r"qwen-?2\.5", {"Qwen/Qwen2.5-0.5B": 494e6, "Qwen/Qwen2.5-1.5B": 1.54e9}, "-Instruct"),
    Family(r"qwen-?3", {"Qwen/Qwen3-0.6B-Base": 596e6, "Qwen/Qwen3-1.7B-Base": 1.72e9}),
    Family(r"llama-?3", {"meta-llama/Llama-3.2-1B": 1.24e9, "meta-llama/Llama-3.2-3B": 3.2e9}, "-Instruct"),
    Family(r"gemma-?3", {"google/gemma-3-270m": 268e6, "google/gemma-3-1b-pt": 1.0e9}),
    Family(r"olmo-?2", {"allenai/OLMo-2-0425-1B": 1.48e9}, "-Instruct"),
    Family(r"bloom", {"bigscience/bloom-560m": 559e6}),
    Family(r"phi-?(2|3)", _PYTHIA, reason="the paper's proxy of Phi-2 and Phi-3-mini; its tokenizer is another"),
]


@dataclass(frozen=True)
class ProxyChoice:
    """A proxy for the config."""

    model: Any
    """A Hub id, or `{scratch: {...}}`."""
    tokenizer: Any
    """As in the config, None for the model's own."""
    parameters: float
    reason: str
    question: str = ""
    """What the user has to decide about it, if anything."""

    @property
    def is_pretrained(self) -> bool:
        return isinstance(self.model, str)


def choose_proxy(target: TargetModel, *, is_chat: bool, max_tokens: int) -> ProxyChoice:
    """The proxy for a target: of its family, near a fortieth of its size; from scratch where there is none to be had."""
    family = next((one for one in FAMILIES if re.search(one.pattern, target.name.rstrip("/").rpartition("/")[2].lower())), None)
    name = None if family is None else _member(family, target.parameters)
    if family is None or name is None:
        known = "no small public model of its family is known here" if family is None else "those of its family are too large"
        return _scratch_proxy(target, max_tokens, known)
    ratio = (target.parameters or 0) / family.sizes[name]
    # A chat model's tokenizer has the template that its target has.
    shown = name + family.chat_suffix if is_chat and re.search(r"instruct|chat|-it\b", target.name.lower()) else name
    if target.is_local and not can_be_had(shown):
        return _scratch_proxy(target, max_tokens, f"{shown} would be better, and cannot be reached from here")
    size = f"{ratio:.0f} times smaller, " if ratio else ""
    return ProxyChoice(shown, None, family.sizes[name], f"{size}{family.reason}")


def _member(family: Family, parameters: float | None) -> str | None:
    """The model of a family that is nearest to a fortieth of the target; None where none is small enough."""
    if parameters is None:
        return min(family.sizes, key=lambda name: family.sizes[name])
    small = [name for name, size in family.sizes.items() if size * LEAST_RATIO <= parameters]
    wanted = parameters / WANTED_RATIO
    return min(small, key=lambda name: max(family.sizes[name] / wanted, wanted / family.sizes[name]), default=None)


def can_be_had(name: str) -> bool:
    """Whether a model of the Hub is on this machine, or the Hub answers for it."""
    if cached_folder(name) is not None:
        return True
    try:
        hub_commit("model", name, None)
    except S2LError:
        return False
    return True


def _scratch_proxy(target: TargetModel, max_tokens: int, why: str) -> ProxyChoice:
    """A model from scratch with the target's tokenizer, near a fortieth of the target's size."""
    vocabulary = 50_000 if target.tokenizer is None else len(target.tokenizer)
    wanted = (target.parameters or 1e9) / WANTED_RATIO
    shapes = [(hidden, max(2, hidden // 64)) for hidden in _SCRATCH_HIDDEN]
    sizes = {shape: vocabulary * shape[0] + 12 * shape[1] * shape[0] ** 2 for shape in shapes}
    hidden, layers = min(shapes, key=lambda shape: max(sizes[shape] / wanted, wanted / sizes[shape]))
    return ProxyChoice(
        scratch(layers, hidden, max_tokens),
        target.name,
        sizes[hidden, layers],
        f"from scratch with the target's tokenizer, about {_times(target.parameters, sizes[hidden, layers])} smaller",
        f"a pretrained proxy sees more than one from scratch: {why}",
    )


def _times(larger: float | None, smaller: float) -> str:
    return "many times" if larger is None else f"{larger / smaller:.0f} times"


def scratch(layers: int, hidden: int, max_tokens: int) -> dict[str, Any]:
    """A model with random weights, as a config has it."""
    heads = max(2, hidden // 64)
    shape = {"architecture": "gpt_neox", "layers": layers, "hidden": hidden, "heads": heads, "max_positions": max_tokens}
    return {"scratch": shape | {"tie_embeddings": True}}
