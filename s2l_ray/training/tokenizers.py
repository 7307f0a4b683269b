"""Tokenizers: the one of the proxy (trained on the pool, named, or the model's own) and the one of the target."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from s2l_ray.config import ProxyConfig, TargetConfig, TrainedTokenizer
from s2l_ray.errors import ConfigError
from s2l_ray.examples.reading import read_pool
from s2l_ray.storage.artifacts import Artifact
from s2l_ray.storage.layout import TOKENIZER

# One of these is in every folder that holds a tokenizer.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
# Rows that a tokenizer is trained on: parts are sorted by a hash of the content, so the first ones are a random sample.
TOKENIZER_ROWS = 200_000
# The time to train takes the square of the longest word; this is far beyond any.
_WITHOUT_END = re.compile(r"(\S{2000})(?=\S)")


def load_tokenizer(location: str | Path, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The tokenizer at a path or Hub id, with a pad token.

    Raises ConfigError where there is none, or one without an end-of-sequence token.
    """
    from transformers import AutoTokenizer

    try:
        path = Path(location)
        if path.is_file():  # a bare tokenizer.json
            from transformers import PreTrainedTokenizerFast

            tokenizer: Any = PreTrainedTokenizerFast(tokenizer_file=str(path))
            tokenizer.eos_token = next((t for t in ("<|endoftext|>", "</s>") if t in tokenizer.get_vocab()), None)
        elif path.is_dir() and not any((path / name).exists() for name in TOKENIZER_FILES):
            raise OSError("there is no tokenizer in that folder")  # transformers would make up one of two entries
        else:
            tokenizer = AutoTokenizer.from_pretrained(str(location), revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # the library raises that alone for a file that is no tokenizer
        raise ConfigError(
            f"tokenizer '{location}': cannot be loaded ({_first_line(error)}). Give a path or a Hub id."
        ) from error
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"tokenizer '{location}': has no end-of-sequence token. Set eos_token in its tokenizer_config.json.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def target_tokenizer(config: TargetConfig, proxy: Artifact) -> Any:
    """The tokenizer of the target: named, the model's own, or for a model from scratch the proxy's."""
    if isinstance(config.tokenizer, str):
        return load_tokenizer(config.tokenizer, trust_remote_code=config.trust_remote_code)
    if isinstance(config.model, str):
        return load_tokenizer(config.model, config.revision, config.trust_remote_code)
    return load_tokenizer(proxy.folder(TOKENIZER))


def proxy_tokenizer(config: ProxyConfig, examples: Artifact) -> Any:
    """The tokenizer of the proxy: trained on the pool, named, or the model's own (of given checkpoints the first one's)."""
    if isinstance(config.tokenizer, TrainedTokenizer):
        return train_tokenizer(config.tokenizer, examples)
    if isinstance(config.tokenizer, str):
        return load_tokenizer(config.tokenizer, trust_remote_code=config.trust_remote_code)
    location, revision = split_revision(config.checkpoints[0]) if config.checkpoints else (config.model, config.revision)
    return load_tokenizer(str(location), revision, config.trust_remote_code)


def train_tokenizer(config: TrainedTokenizer, examples: Artifact) -> Any:
    """A byte-level BPE tokenizer of the pool's prompts and responses."""

    def texts() -> Iterator[list[str]]:
        rows = 0
        for part in examples.parts():
            table = read_pool(examples, part, ["prompt", "response"])
            yield table["prompt"].to_pylist()
            yield table["response"].to_pylist()
            rows += table.num_rows
            if rows >= TOKENIZER_ROWS:
                return

    return tokenizer_of_texts(config, texts())


def tokenizer_of_texts(config: TrainedTokenizer, texts: Iterator[list[str]]) -> Any:
    """A byte-level BPE tokenizer of some texts; one special token ends sequences and pads them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    end = "<|endoftext|>"
    tokenizer = Tokenizer(models.BPE())
    # Digits one by one: numbers of any length then share their tokens.
    split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[end],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(([_WITHOUT_END.sub(r"\1\n", text) for text in some] for some in texts), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, pad_token=end)


def split_revision(location: str) -> tuple[str, str | None]:
    """A checkpoint's place as (path or Hub id, revision): `EleutherAI/pythia-70m@step1000`."""
    place, at, revision = location.rpartition("@")
    return (place, revision) if at and not Path(location).exists() else (location, None)


def check_own_tokenizer(place: str, revision: str | None, tokenizer: Any) -> None:
    """Raise ConfigError where a checkpoint comes with a tokenizer of another vocabulary than the run's."""
    try:
        own = load_tokenizer(place, revision)
    except ConfigError:  # it comes with none, or none that can be used
        return
    if own.get_vocab() != tokenizer.get_vocab():
        raise ConfigError(
            f"proxy.checkpoints: '{place}' has a tokenizer of {len(own):,} entries, not the run's of {len(tokenizer):,}. "
            "Set proxy.tokenizer to the one that the checkpoints were trained with."
        )
