"""`s2l init`: a corpus, and perhaps a target, in; what was found, and a config to start from, out."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from s2l_ray.config import ExamplesConfig, TrainedTokenizer
from s2l_ray.config.parsing import checked
from s2l_ray.errors import ConfigError, DataError
from s2l_ray.examples.layouts import Layout
from s2l_ray.examples.llama_factory import DATASET_INFO, is_named, resolved
from s2l_ray.examples.row_problems import names_in_words
from s2l_ray.init.advice import Advice, CorpusFacts, advise, held_out_fraction, laptop_tokenizer
from s2l_ray.init.config_text import config_text
from s2l_ray.init.figures import SAMPLE_ROWS, SHOWN, Pieces, ReadExamples, count_tokens, pieces_of, read_examples
from s2l_ray.init.layout import (
    ConfigLine,
    FoundLayout,
    all_fields,
    found_layout,
    id_setting,
    kind_of_value,
    source_setting,
    split_setting,
)
from s2l_ray.init.sampling import CorpusLook, look_at
from s2l_ray.init.summary import summary_lines
from s2l_ray.init.target import TargetModel, find_target

LAYOUT_ROWS = 1000
"""Rows whose fields are looked at."""


@dataclass(frozen=True)
class Start:
    """What was found in a corpus, and a config for it."""

    summary: list[tuple[str, str]]
    """(label, text) of every line about the corpus."""
    shown: list[Pieces]
    """A few examples."""
    advice: Advice
    questions: dict[str, ConfigLine]
    """By its place in the config, what the user has to decide, or to look at."""
    text: str
    """The config's YAML."""


def start(data: list[str], target: str | None, output: str | None) -> tuple[Start, Path]:
    """Look at a corpus and write a config for it; what was found, and where the config is.

    Raises ConfigError where the file exists, and for a target that cannot be had; DataError for what is no corpus.
    """
    if not data:
        raise ConfigError(
            "init: no corpus. Give its files, folder or Hub id: s2l init DATA; the shipped configs: s2l init --list."
        )
    path = Path(output) if output else Path(f"{name_of(data)}.yaml")
    if path.exists():
        raise ConfigError(f"{path}: exists already, and is left as it is. Name another file: --output CONFIG.")
    if not path.parent.is_dir():
        raise ConfigError(f"{path}: there is no folder {path.parent}. Make it, or name another file: --output CONFIG.")
    found = look_and_advise(data, target, path.stem if output else name_of(data))
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(found.text)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}). Name another file: --output CONFIG.") from error
    return found, path


def look_and_advise(data: list[str], target: str | None, name: str) -> Start:
    """What a corpus is and what fits it. Raises as `start` does, and writes nothing."""
    model = find_target(target) if target else None
    dataset = data[0] if len(data) == 1 else data
    config, layout = resolved(checked(ExamplesConfig, dataset=dataset))
    _refuse_folder_of_named(dataset)
    look = look_at(config)
    found, fields = (FoundLayout(f"as {DATASET_INFO} says"), []) if is_named(dataset) else _fields_of(look)
    values = found.config_values() | {one.key: one.value for one in fields if one.is_set}
    config = config.model_copy(update=values | {"on_bad_row": "drop"})
    examples = _read(look, config, found, layout if is_named(dataset) else Layout.of(config))
    settings = [ConfigLine("dataset", dataset), *found.settings, *fields, *_bad_row_settings(examples, look)]
    return _advised(_Looked(look, examples, found, settings, model), dataset, name)


@dataclass(frozen=True)
class _Looked:
    """What is known before anything is advised."""

    look: CorpusLook
    examples: ReadExamples
    layout: FoundLayout
    settings: list[ConfigLine]
    target: TargetModel | None


def _advised(looked: _Looked, dataset: str | list[str], name: str) -> Start:
    look, examples, target = looked.look, looked.examples, looked.target
    share = examples.table.num_rows / max(1, look.num_read)
    num_examples = max(1, round(look.num_rows * share))
    sample = examples.sample(SAMPLE_ROWS)
    tokenizer, whose = _tokenizer_for(target, sample, num_examples)
    tokens = count_tokens(sample, tokenizer, whose)
    is_chat = "messages" in examples.names and examples.table["messages"].null_count < examples.table.num_rows
    advice = advise(CorpusFacts(num_examples, tokens, is_chat, examples.sources()), target)
    about = f"{names_in_words([dataset] if isinstance(dataset, str) else dataset, 80)}: {look.counted()}; {looked.layout.text}"
    settings = [*looked.settings, ConfigLine("held_out_fraction", held_out_fraction(num_examples), "kept for evaluation")]
    shown = pieces_of(examples.sample(SHOWN), tokenizer)[:SHOWN] if looked.layout.is_known else []
    summary = summary_lines(look, examples, looked.layout, tokens, advice)
    if target is not None and target.problem:
        summary.append(("target", target.problem))
    questions = {
        place: one for place, one in ({f"examples.{one.key}": one for one in settings} | advice.settings).items() if one.is_open
    }
    return Start(summary, shown, advice, questions, config_text(name, about, settings, advice))


# --- what the rows are ---------------------------------------------------------------------------------------------


def _fields_of(look: CorpusLook) -> tuple[FoundLayout, list[ConfigLine]]:
    """The layout, and the fields of source, id and split."""
    records = look.records(LAYOUT_ROWS)
    found = found_layout(records)
    texts = {name for one in records for name, value in one.items() if kind_of_value(value) in {"text", "texts", "messages"}}
    if not found.is_known and len(texts) < 2:
        raise DataError(
            f"{look.blocks[0].source}: no field of the rows looks like a prompt and a response, or like a conversation "
            f"(fields: {names_in_words(all_fields(records))}). Give a corpus of rows with texts to learn."
        )
    used = set(map(str, found.config_values().values()))
    columns = {name: list(look.values(name)) for name in all_fields(records) if name not in used}
    return found, [*source_setting(columns), *id_setting(columns, look.is_all), *split_setting(columns)]


def _read(look: CorpusLook, config: ExamplesConfig, found: FoundLayout, layout: Layout) -> ReadExamples:
    """The examples in the rows; without a known layout all that is in a row as its text. Raises DataError without any."""
    if not found.is_known:
        records = look.records(SAMPLE_ROWS)
        texts = ["\n".join(map(str, record.values())) for record in records]
        nothing, source = [""] * len(texts), [look.blocks[0].source] * len(texts)
        columns = {"example_id": nothing, "source": source, "prompt": texts, "response": nothing}
        return ReadExamples(pa.table(columns), Counter(), {}, 0)
    examples = read_examples(look, config, layout)
    if not examples.table.num_rows:
        reasons = "; ".join(examples.first.values()) or ", ".join(
            f"{count:,} {word}" for word, count in examples.dropped.items()
        )
        raise DataError(f"nothing can be learned from these rows: {reasons}")
    return examples


def _bad_row_settings(examples: ReadExamples, look: CorpusLook) -> list[ConfigLine]:
    if not examples.num_bad:
        return []
    reason = f"{examples.num_bad:,} of {look.num_read:,} rows cannot be used; without this they stop the run"
    if examples.num_bad > ExamplesConfig.model_fields["max_dropped"].default * look.num_read:
        reason = f"{examples.num_bad:,} of {look.num_read:,} rows cannot be used, more than max_dropped allows; two kinds?"
    return [ConfigLine("on_bad_row", "drop", reason, is_open=True, is_set=False)]


def _refuse_folder_of_named(dataset: str | list[str]) -> None:
    """A folder with a dataset_info.json holds several datasets, and that file is none of them."""
    if isinstance(dataset, str) and (Path(dataset) / DATASET_INFO).is_file():
        import json

        try:
            names = list(json.loads((Path(dataset) / DATASET_INFO).read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return
        raise ConfigError(
            f"{dataset}: its {DATASET_INFO} names {len(names)} datasets ({names_in_words(names)}). Give one of them: "
            f"s2l init '{dataset.rstrip('/')}/#{names_in_words(names[:1])}'."
        )


def _tokenizer_for(target: TargetModel | None, sample: pa.Table, num_rows: int) -> tuple[Any, str]:
    """The tokenizer that counts, and whose it is: the target's, or for models from scratch one as the run will train it."""
    if target is not None:
        return target.tokenizer, f"the tokenizer of {target.name}" if target.tokenizer else "the target's cannot be loaded here"
    from s2l_ray.training.tokenizers import tokenizer_of_texts

    recipe = TrainedTokenizer.model_validate(laptop_tokenizer(num_rows))
    texts = (sample[name].to_pylist() for name in ("prompt", "response"))
    return tokenizer_of_texts(recipe, texts), f"a tokenizer of {recipe.vocab_size:,} entries trained on them"


def name_of(data: list[str]) -> str:
    """A run's name for a corpus: that of its file, folder or dataset."""
    first = data[0].rstrip("/")
    place, sign, entry = first.partition("#")
    last = entry if sign else place.rpartition("/")[2]
    if len(data) > 1 or any(mark in last for mark in "*?["):
        last = Path(first).parent.name or last
    stem = last.partition(".")[0] if not sign else last
    words = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._")
    return words or "corpus"
