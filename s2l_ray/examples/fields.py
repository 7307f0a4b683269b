"""From a row to an example: its texts, source, id and split, or why it is none.

Pure functions over `CorpusRows`. A row that teaches nothing is dropped with a reason. A row that contradicts the config is a
DataError that names file, row and field, what was found, and what to set; or is dropped, too, where the config says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from s2l_ray.config import ExamplesConfig, MimicRadiologyDataset, ReasoningGymDataset
from s2l_ray.errors import DataError
from s2l_ray.examples.columns import Columns
from s2l_ray.examples.conversations import LearnedText
from s2l_ray.examples.dropped import FILTERED, Dropped
from s2l_ray.examples.hashes import DIGEST_BYTES, POOL, canonical_json, digest_of, prompt_hash, split_of
from s2l_ray.examples.imperfections import may_be_wrong
from s2l_ray.examples.layouts import IF_LEFT_OUT, Layout, missing_field, row_reader
from s2l_ray.examples.row_problems import NOTHING_TO_LEARN, RowProblem, kind_in_words, require_unicode
from s2l_ray.examples.rows import MISSING, BadRow, CorpusRows

# What an id and a source are, and what to do about another value.
_LABELS = {
    "id_field": "an id is text or a whole number. Fix the row",
    "source_field": "a source is a name. Name every row's source",
}


@dataclass(frozen=True)
class Examples:
    """The examples in some rows, in their order."""

    table: pa.Table
    """example_id, source, prompt, response, split, messages and tools (null but for conversations), `prompt_hash` (null where
    the row stays in the pool), two
    hashes of DIGEST_BYTES, `content` (equal for exact copies) and `row` (equal for rows that come out alike), and
    the row as it was: `row_json` or `original` (see `CorpusRows.own`)."""
    dropped: Dropped
    columns: Columns


def normalise(rows: CorpusRows, config: ExamplesConfig, layout: Layout | None = None) -> Examples:
    """The examples in some rows. `layout`: which fields are what, where that is not in the config alone.

    Raises DataError for a row that contradicts the config, unless such rows are dropped.
    """
    if isinstance(config.dataset, ReasoningGymDataset | MimicRadiologyDataset):
        config = _with_known_fields(config)
        layout = Layout.of(config)
    dropped = Dropped()
    for bad in rows.bad:
        _drop_bad(bad, rows.source, dropped, config)
    read, is_wanted = row_reader(layout or Layout.of(config), rows.nulls_are_absent), _filter(config.where)
    kept: list[int] = []
    texts: list[LearnedText] = []
    labels: list[tuple[str | None, str]] = []
    for row in range(len(rows)):
        source, record = rows.source, rows.record(row)
        if not is_wanted(record):
            dropped.add(source, FILTERED)
            continue
        try:
            source = _label(record, config.source_field, "source_field") or source
            example_id = _label(record, config.id_field, "id_field")
            text = read(record)
        except RowProblem as problem:
            if problem.reason in NOTHING_TO_LEARN:
                dropped.add(source, problem.reason)
            else:
                _drop_bad(BadRow(problem.reason, f"{rows.place(row)}: {problem.message}"), source, dropped, config)
            continue
        kept.append(row)
        texts.append(text)
        labels.append((example_id, source))
    return Examples(_table(rows, kept, texts, labels, config), dropped, rows.columns(kept))


def _drop_bad(bad: BadRow, source: str, dropped: Dropped, config: ExamplesConfig) -> None:
    if bad.reason in NOTHING_TO_LEARN:
        dropped.add(source, bad.reason)
        return
    if config.on_bad_row == "error":
        raise DataError(bad.message) from None
    dropped.add(source, bad.reason, bad.message)


def _table(
    rows: CorpusRows, kept: list[int], texts: list[LearnedText], labels: list[tuple[str | None, str]], config: ExamplesConfig
) -> pa.Table:
    digests = [content_digest(text) for text in texts]
    hashes = [_hash_for_split(text.prompt, config) for text in texts]
    fractions = config.held_out_fraction, config.validation_fraction
    splits = [POOL if hashed is None else split_of(hashed, *fractions) for hashed in hashes]
    ids = [given or digest.hex() for (given, _), digest in zip(labels, digests, strict=True)]
    own_name, own = rows.own(kept)
    if own_name == "row_json":  # two rows that differ in how they are written come out differently
        row_digests = [digest_of(written) for written in own.cast(pa.binary()).to_pylist()]
    else:
        row_digests = [digest_of(canonical_json(rows.record(row)).encode()) for row in kept]
    return pa.table(
        {
            "example_id": pa.array(ids, pa.string()),
            "source": pa.array([source for _, source in labels], pa.string()),
            "prompt": pa.array([text.prompt for text in texts], pa.string()),
            "response": pa.array([text.response for text in texts], pa.string()),
            "split": pa.array(splits, pa.string()),
            "prompt_hash": pa.array(hashes, pa.uint64()),
            "messages": pa.array([text.messages for text in texts], pa.string()),
            "tools": pa.array([text.tools for text in texts], pa.string()),
            "content": pa.array(digests, pa.binary(DIGEST_BYTES)),
            "row": pa.array(row_digests, pa.binary(DIGEST_BYTES)),
            own_name: own,
        }
    )


def _hash_for_split(prompt: str, config: ExamplesConfig) -> int | None:
    """The hash that decides a row's split; None where the row stays in the pool whatever is asked for."""
    hashed = prompt_hash(prompt)
    gym = config.dataset.reasoning_gym if isinstance(config.dataset, ReasoningGymDataset) else None
    is_kept = gym is not None and gym.imperfections and gym.imperfections.wrong_answers and may_be_wrong(hashed)
    return None if is_kept else hashed


def content_digest(text: LearnedText) -> bytes:
    """Hash of what is learned: the id of a row without one, and equal for exact copies."""
    if text.messages is None:
        return digest_of(f"{text.prompt}\0{text.response}".encode())
    return digest_of((text.messages if text.tools is None else f"{text.messages}\0{text.tools}").encode())


def _with_known_fields(config: ExamplesConfig) -> ExamplesConfig:
    """The config with the fields of a corpus that can be mapped in only one way; a radiology report's findings go into a
    template where one is given."""
    unused = ["messages_field", "tools_field", "system_field", "history_field"]
    if isinstance(config.dataset, MimicRadiologyDataset):
        fields = {"prompt_field": "findings", "response_field": "impression", "source_field": "source", "id_field": "row_id"}
    else:
        fields = {"prompt_field": "question", "response_field": "answer", "source_field": "source"}
        unused += ["id_field", "prompt_template", "prompt_template_if_empty"]
    return config.model_copy(update={**dict.fromkeys(unused), **fields})


def _label(record: dict[str, Any], field: str | None, key: str) -> str | None:
    """A row's own id or source, text or a whole number that is not empty; None where the config names no field for it."""
    if field is None:
        return None
    value = record.get(field, MISSING)
    if value is MISSING:
        raise missing_field(record, field, key)
    is_text = isinstance(value, str) and value
    if not is_text and (isinstance(value, bool) or not isinstance(value, int)):
        found = "empty" if value in (None, "") else kind_in_words(value)
        needed = f"{_LABELS[key]}, or leave examples.{key} out: {IF_LEFT_OUT[key]}."
        raise RowProblem(f"no_{key.removesuffix('_field')}", f"field '{field}' is {found}; {needed}")
    require_unicode(str(value))
    return str(value)


def _filter(where: dict[str, Any]) -> Callable[[dict[str, Any]], bool]:
    """Whether a row has the wanted values. A missing field counts as null; a number also matches its text, as in CSV files."""
    conditions = []
    for field, wanted in where.items():
        values = wanted if isinstance(wanted, list) else [wanted]
        conditions.append((field, values, {str(value) for value in values if value is not None}))

    def is_wanted(record: dict[str, Any]) -> bool:
        for field, wanted, texts in conditions:
            value = record.get(field)
            if not (value in texts if isinstance(value, str) else value in wanted):
                return False
        return True

    return is_wanted
