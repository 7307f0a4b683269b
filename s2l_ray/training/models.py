"""Models: found by name or path, or made from scratch; with adapters or without; saved as Hugging Face folders with
safetensors only."""

from __future__ import annotations

import contextlib
import importlib.util
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s2l_ray.config import RunConfig, Scratch, ScratchModel, TargetConfig, TrainingConfig
from s2l_ray.config.section import Precision
from s2l_ray.errors import ConfigError
from s2l_ray.storage.places import Storage
from s2l_ray.training.adapters import check_target_modules, merge_shards, merged, need_peft
from s2l_ray.training.locations import ADAPTER, check_there, has_adapter, local_files, local_place
from s2l_ray.training.trackers import check_trackers

# The sizes of a scratch model under the names that transformers' configurations use.
_ALIASES = {
    "layers": ("num_hidden_layers", "n_layer"),
    "hidden": ("hidden_size", "n_embd"),
    "heads": ("num_attention_heads", "n_head"),
    "intermediate": ("intermediate_size", "n_inner"),
    "max_positions": ("max_position_embeddings", "n_positions"),
}
# peft's file beside an adapter's weights: a folder with it is an adapter of the model that it names.
# Folders beneath `Held.folder`.
SCRATCH, MERGED, OFFLOADED = "scratch", "merged", "offloaded"


@dataclass(frozen=True)
class Held:
    """How a model that is only evaluated is kept in memory."""

    precision: Precision = "float32"
    """Of its weights."""

    max_memory: Mapping[int | str, int] | None = None
    """Bytes by GPU (0, 1, ...) and in the machine's memory (`cpu`), over which accelerate's device map spreads it; the rest
    stays on disk. None: there is no device map."""

    deepspeed: dict[str, Any] | None = None
    """DeepSpeed's configuration with ZeRO 3, by which each worker keeps a share of it; None: it is not shared out."""

    folder: Path = Path()
    """Where a spread model's files are made, if it has none: one from scratch, one with an adapter."""

    @property
    def is_spread(self) -> bool:
        return self.max_memory is not None or self.deepspeed is not None

    @property
    def dtype(self) -> Any:
        import torch

        return getattr(torch, self.precision)

    @property
    def options(self) -> dict[str, Any]:
        """Those of transformers' `from_pretrained`."""
        if self.max_memory is None:
            return {"dtype": self.dtype}
        memory = {"max_memory": dict(self.max_memory), "offload_folder": str(self.folder / OFFLOADED)}
        return {"dtype": self.dtype, "device_map": "auto", **memory}


def scratch_config(scratch: Scratch, vocab_size: int, eos_token_id: int | None = None) -> Any:
    """The transformers configuration of a model from scratch. Raises ConfigError for an unknown architecture."""
    from transformers import AutoConfig

    try:
        known = AutoConfig.for_model(scratch.architecture).to_dict()
    except ValueError as error:
        raise ConfigError(
            f"scratch.architecture: '{scratch.architecture}' is not a model type of transformers. Try gpt_neox, llama or qwen2."
        ) from error
    wanted = {
        "layers": scratch.layers,
        "hidden": scratch.hidden,
        "heads": scratch.heads,
        "intermediate": scratch.intermediate or 4 * scratch.hidden,
        "max_positions": scratch.max_positions,
    }
    values = {name: wanted[key] for key, names in _ALIASES.items() for name in names if name in known}
    if "num_key_value_heads" in known:
        values["num_key_value_heads"] = scratch.heads
    if "head_dim" in known:
        values["head_dim"] = scratch.hidden // scratch.heads
    tokens = {"bos_token_id": eos_token_id, "eos_token_id": eos_token_id, "pad_token_id": eos_token_id}
    return AutoConfig.for_model(
        scratch.architecture, vocab_size=vocab_size, tie_word_embeddings=scratch.tie_embeddings, **values, **tokens
    )


def make_model(config: TrainingConfig, tokenizer: Any, held: Held | None = None) -> Any:
    """The model that a training section names, in float32 unless `held` says how; from scratch its weights follow `seed`.

    Raises ConfigError where the model cannot be found or has fewer embedding rows than the tokenizer has tokens.
    """
    import torch
    from transformers import AutoModelForCausalLM

    if isinstance(config.model, ScratchModel):
        # A round number of rows makes the output layer's matrix product faster.
        vocab_size = -(-len(tokenizer) // 64) * 64
        of_weights = config.model.scratch.seed
        torch.manual_seed(config.seed if of_weights is None else of_weights)
        shape = scratch_config(config.model.scratch, vocab_size, tokenizer.eos_token_id)
        made = AutoModelForCausalLM.from_config(shape)
        if held is None or not held.is_spread:
            return made if held is None else made.to(held.dtype)
        _write_whole(made, held.folder / SCRATCH)
        return load_model(held.folder / SCRATCH, tokenizer, held=held)
    return load_model(config.model, tokenizer, revision=config.revision, trust_remote_code=config.trust_remote_code, held=held)


def _write_whole(model: Any, folder: Path) -> None:
    """Write a model into a worker's own folder: transformers' own `save_pretrained` does that on the first of a group only."""
    from safetensors.torch import save_file

    model.config.save_pretrained(folder)
    tied = model.all_tied_weights_keys
    weights = {name: value.contiguous() for name, value in model.state_dict().items() if name not in tied}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def load_model(
    location: str | Path,
    tokenizer: Any | None = None,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    held: Held | None = None,
) -> Any:
    """A causal language model from a path, URI or Hub id, from safetensors, in float32 unless `held` says how.

    A folder with an adapter gives the model that the adapter names, with the adapter added in (in float32).
    Raises ConfigError where it cannot be found, keeps its weights as pickles only, or has a smaller vocabulary than
    the tokenizer.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    from s2l_ray.training.zero import reading_shares

    place, held = local_place(str(location)), held or Held()
    if has_adapter(place):
        named = json.loads((Path(place) / ADAPTER).read_text())
        base, of = named["base_model_name_or_path"], named.get("revision")
        if not held.is_spread:
            whole = load_model(base, tokenizer, revision=of, trust_remote_code=trust_remote_code)
            return merged(whole, Path(place)).to(held.dtype)
        _merge_files(base, of, Path(place), held, trust_remote_code=trust_remote_code)
        place, revision = str(held.folder / MERGED), None
    options = {"revision": revision, "trust_remote_code": trust_remote_code, "use_safetensors": True, **held.options}
    try:
        with reading_shares(held.deepspeed) if held.deepspeed is not None else contextlib.nullcontext():
            model, loading = AutoModelForCausalLM.from_pretrained(place, output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ConfigError(
            f"model '{location}': cannot be loaded ({reason}). Give the path of a folder with config.json and *.safetensors, "
            "a URI, or a Hub id (a gated one needs HF_TOKEN in the environment)."
        ) from error
    absent = sorted({*loading["missing_keys"], *(str(key) for key in loading["mismatched_keys"])})
    if absent:  # transformers would make them up
        raise ConfigError(
            f"model '{location}': its files lack {len(absent)} weights of a {type(model).__name__} ({', '.join(absent[:3])}"
            f"{' ...' if len(absent) > 3 else ''}). Give a whole checkpoint of that architecture."
        )
    rows = model.get_input_embeddings().num_embeddings
    if tokenizer is not None and len(tokenizer) > rows:
        raise ConfigError(
            f"model '{location}': its vocabulary has {rows:,} entries, the tokenizer {len(tokenizer):,}. Use the tokenizer it "
            "was made with."
        )
    return model


def _merge_files(base: str, revision: str | None, adapter: Path, held: Held, *, trust_remote_code: bool) -> None:
    """Write the files of a model with an adapter added, without ever holding all of it. Raises ConfigError."""
    files = local_files(base, revision)
    skeleton = _skeleton(TrainingConfig(model=str(files), trust_remote_code=trust_remote_code), None)
    if skeleton is None:
        raise ConfigError(f"adapter '{adapter}': it is to be added to '{base}', which cannot be loaded shard by shard.")
    merge_shards(skeleton, files, adapter, held.folder / MERGED, held.dtype)


def check_ahead(config: RunConfig, run: Storage, building: Collection[str]) -> None:
    """Raise ConfigError now for what would be found hours from now in the stages that are to be built: a library that is
    missing, nothing at the target's URI, adapters for layers that it does not have, no model for BERTScore."""
    if "proxy" in building or "target" in building:
        check_trackers(config, run)
    if "evaluation" in building:
        if config.evaluation.tasks and importlib.util.find_spec("lm_eval") is None:
            raise ConfigError("evaluation.tasks needs lm-eval: pip install 's2l_ray[lm-eval]' (for the workers, too)")
        if config.evaluation.summary_sources and config.evaluation.bert_score_model is not None:
            check_bert_score(config.evaluation.bert_score_model)
    if "target" in building:
        _check_target(config.target)


def check_bert_score(model: str) -> None:
    """Raise ConfigError where bert-score is not installed, or there is no such model."""
    from transformers import AutoConfig

    if importlib.util.find_spec("bert_score") is None:
        raise ConfigError(
            "evaluation.bert_score_model needs bert-score: pip install 's2l_ray[bert-score]' (for the workers, too)"
        )
    try:
        AutoConfig.from_pretrained(local_place(model))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"evaluation.bert_score_model '{model}': cannot be loaded ({reason}). Give an encoder such as roberta-large: a Hub "
            "id, or a path or URI of a folder."
        ) from error


def _check_target(target: TargetConfig) -> None:
    if isinstance(target.model, str) and "://" in target.model:
        check_there(target.model)
    if target.lora is not None:
        need_peft("target.lora")
        skeleton = _skeleton(target, None)
        if skeleton is not None:
            check_target_modules(target.lora, skeleton)


def num_parameters(config: TrainingConfig, vocab_size: int | None) -> int | None:
    """Parameters of the model that a section names, without loading weights; None where that cannot be known here."""
    skeleton = _skeleton(config, vocab_size)
    return None if skeleton is None else int(skeleton.num_parameters())


def _skeleton(config: TrainingConfig, vocab_size: int | None) -> Any:
    """The model that a section names, without weights; None where its shape cannot be known here."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        if isinstance(config.model, ScratchModel):
            shape = scratch_config(config.model.scratch, -(-(vocab_size or 4096) // 64) * 64)
        else:
            shape = AutoConfig.from_pretrained(
                config.model, revision=config.revision, trust_remote_code=config.trust_remote_code
            )
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(shape, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError):
        return None


def count_parameters(model: Any, *, only_trained: bool = False) -> int:
    """Parameters of a model, of the whole one where ZeRO 3 has left this worker a share."""
    counted = (parameter for parameter in model.parameters() if parameter.requires_grad or not only_trained)
    return sum(int(getattr(parameter, "ds_numel", parameter.numel())) for parameter in counted)


def positions(model: Any) -> int | None:
    """The longest sequence that a model was made for, None where it does not say."""
    found = getattr(model.config, "max_position_embeddings", None)
    return None if found is None else int(found)


def check_positions(model: Any, max_tokens: int, section: str) -> None:
    """Raise ConfigError where `max_tokens` is more than the model has positions."""
    most = positions(model)
    if most is not None and max_tokens > most:
        raise ConfigError(f"{section}.max_tokens={max_tokens}: the model has {most} positions. Set it to {most} or less.")


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a Hugging Face folder that `from_pretrained` loads: configuration, safetensors, tokenizer."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
