"""From a row to an example: its texts, source, id and split, or why it is none.

Pure functions over `CorpusRows`. A row that teaches nothing is dropped with a reason. A row that contradicts the config is a
DataError that names file, row and field, what was found, and what to set; or is dropped, too, where the config says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from s2l_ray.config import ExamplesConfig, MimicRadiologyDataset, ReasoningGymDataset
from s2l_ray.errors import DataError
from s2l_ray.examples.columns import Columns
from s2l_ray.examples.conversations import LearnedText
from s2l_ray.examples.dropped import FILTERED, Dropped
from s2l_ray.examples.hashes import POOL, canonical_json, digest_of, splits_of
from s2l_ray.examples.ids import one_array
from s2l_ray.examples.imperfections import may_be_wrong
from s2l_ray.examples.layouts import IF_LEFT_OUT, Layout, missing_field, row_reader
from s2l_ray.examples.masking import prompt_hashes
from s2l_ray.examples.plain_pairs import ReadRows, read_plain_pairs
from s2l_ray.examples.row_problems import NOTHING_TO_LEARN, RowProblem, kind_in_words, require_unicode
from s2l_ray.examples.rows import MISSING, BadRow, CorpusRows
from s2l_ray.examples.texts import binaries, digests_of, hexadecimal

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
    are_plain: bool
    """Whether all are pairs of plain texts (see `plain_pairs`)."""


def normalise(rows: CorpusRows, config: ExamplesConfig, layout: Layout | None = None) -> Examples:
    """The examples in some rows. `layout`: which fields are what, where that is not in the config alone.

    Raises DataError for a row that contradicts the config, unless such rows are dropped.
    """
    config, layout = known_fields(config, layout)
    dropped = Dropped()
    for bad in rows.bad:
        _drop_bad(bad, rows.source, dropped, config)
    wanted_N = _wanted(rows, config.where, dropped)
    plain = read_plain_pairs(rows, wanted_N, config, layout)
    others = _read_one_by_one(rows, np.setdiff1d(wanted_N, plain.numbers_M), config, layout, dropped)
    kept_M = np.concatenate([plain.numbers_M, others.numbers_M])
    learned = pa.concat_tables([_learned(found, rows.source) for found in (plain, others)]).combine_chunks()
    if len(others.numbers_M):
        learned, kept_M = learned.take(pa.array(np.argsort(kept_M))), np.sort(kept_M)
    return Examples(_table(rows, kept_M, learned, config), dropped, rows.columns(kept_M), not len(others.numbers_M))


def _wanted(rows: CorpusRows, where: dict[str, Any], dropped: Dropped) -> NDArray[np.int64]:
    """The numbers of the rows that the config asks for."""
    is_wanted = _filter(where)
    wanted = [row for row in range(len(rows)) if is_wanted(rows.record(row))] if where else range(len(rows))
    for _ in range(len(rows) - len(wanted)):
        dropped.add(rows.source, FILTERED)
    return np.array(wanted, np.int64)


def _read_one_by_one(
    rows: CorpusRows, numbers_M: NDArray[np.int64], config: ExamplesConfig, layout: Layout, dropped: Dropped
) -> ReadRows:
    """What is learned from some rows, each as its layout has it."""
    read = row_reader(layout, rows.nulls_are_absent)
    kept: list[int] = []
    texts: list[LearnedText] = []
    labels: list[tuple[str | None, str]] = []
    for row in numbers_M.tolist():
        source, record = rows.source, rows.record(row)
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
    columns = {
        "source": [source for _, source in labels],
        **{name: [getattr(text, name) for text in texts] for name in ("prompt", "response", "messages", "tools")},
        **({} if config.id_field is None else {"example_id": [example_id for example_id, _ in labels]}),
    }
    arrays = {name: pa.array(values, pa.string()) for name, values in columns.items()}
    return ReadRows(np.array(kept, np.int64), arrays, b"".join(map(content_digest, texts)))


def _drop_bad(bad: BadRow, source: str, dropped: Dropped, config: ExamplesConfig) -> None:
    if bad.reason in NOTHING_TO_LEARN:
        dropped.add(source, bad.reason)
        return
    if config.on_bad_row == "error":
        raise DataError(bad.message) from None
    dropped.add(source, bad.reason, bad.message)


def _learned(read: ReadRows, source: str) -> pa.Table:
    """What was read of some rows: the columns of `Examples.table` from `example_id` to `content`, but the split."""
    count = len(read.numbers_M)
    given = read.columns if count else {}
    columns = {
        "example_id": given.get("example_id", hexadecimal(read.contents)),
        "source": given.get("source", pa.repeat(source, count)),
        **{name: given.get(name, pa.nulls(count, pa.string())) for name in ("prompt", "response", "messages", "tools")},
        "content": binaries(read.contents),
    }
    return pa.table(columns)


def _table(rows: CorpusRows, kept_M: NDArray[np.int64], learned: pa.Table, config: ExamplesConfig) -> pa.Table:
    prompts = one_array(learned["prompt"])
    hashes_M = prompt_hashes(prompts)
    is_kept_M = _stays_in_pool(hashes_M, config)
    splits = splits_of(hashes_M, config.held_out_fraction, config.validation_fraction)
    own_name, own = rows.own(kept_M)
    if own_name == "row_json":  # two rows that differ in how they are written come out differently
        row_digests = digests_of(own)
    else:
        row_digests = b"".join(digest_of(canonical_json(rows.record(row)).encode()) for row in kept_M.tolist())
    return pa.table(
        {
            **{name: learned[name] for name in ("example_id", "source", "prompt", "response")},
            "split": pc.if_else(pa.array(is_kept_M), POOL, splits),
            "prompt_hash": pa.array(hashes_M, mask=is_kept_M),
            **{name: learned[name] for name in ("messages", "tools", "content")},
            "row": binaries(row_digests),
            own_name: own,
        }
    )


def _stays_in_pool(hashes_M: NDArray[np.uint64], config: ExamplesConfig) -> NDArray[np.bool_]:
    """Whether a row of a prompt with this hash stays in the pool whatever is asked for."""
    gym = config.dataset.reasoning_gym if isinstance(config.dataset, ReasoningGymDataset) else None
    if gym is None or not gym.imperfections or not gym.imperfections.wrong_answers:
        return np.zeros(len(hashes_M), bool)
    return np.array([may_be_wrong(hashed) for hashed in hashes_M.tolist()], bool)


def content_digest(text: LearnedText) -> bytes:
    """Hash of what is learned: the id of a row without one, and equal for exact copies."""
    if text.messages is None:
        return digest_of(f"{text.prompt}\0{text.response}".encode())
    return digest_of((text.messages if text.tools is None else f"{text.messages}\0{text.tools}").encode())


def known_fields(config: ExamplesConfig, layout: Layout | None = None) -> tuple[ExamplesConfig, Layout]:
    """The config and which fields are what: those that it names, or those of a corpus that can be mapped in only one way; a
    radiology report's findings go into a template where one is given."""
    if not isinstance(config.dataset, ReasoningGymDataset | MimicRadiologyDataset):
        return config, layout or Layout.of(config)
    unused = ["messages_field", "tools_field", "system_field", "history_field"]
    if isinstance(config.dataset, MimicRadiologyDataset):
        fields = {"prompt_field": "findings", "response_field": "impression", "source_field": "source", "id_field": "row_id"}
    else:
        fields = {"prompt_field": "question", "response_field": "answer", "source_field": "source"}
        unused += ["id_field", "prompt_template", "prompt_template_if_empty"]
    known = config.model_copy(update={**dict.fromkeys(unused), **fields})
    return known, Layout.of(known)


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
