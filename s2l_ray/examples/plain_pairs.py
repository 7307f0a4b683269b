"""Rows whose prompt and response are plain texts, as most are: read column by column instead of one by one.

What is read of such a row is what `layouts.row_reader` reads. A row that is not plain (a field is missing, empty or no text;
it is a conversation) is left to it, with what it says about the row.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from s2l_ray.config import ExamplesConfig
from s2l_ray.examples.ids import one_array
from s2l_ray.examples.layouts import Layout
from s2l_ray.examples.rows import CorpusRows
from s2l_ray.examples.texts import digests_of, is_filled

# Text, and the field that follows it, if one does.
_Pieces = list[tuple[str, str | None]]


@dataclass(frozen=True)
class ReadRows:
    """What is learned from some rows of a corpus, and their labels."""

    numbers_M: NDArray[np.int64]
    """The numbers of the rows, ascending."""
    columns: dict[str, pa.Array]
    """`prompt` and `response`; of `source`, `example_id`, `messages` and `tools` those that the rows have."""
    contents: bytes
    """The hashes of what is learned, one after the other."""


def read_plain_pairs(rows: CorpusRows, wanted_N: NDArray[np.int64], config: ExamplesConfig, layout: Layout) -> ReadRows:
    """Those of the wanted rows that are plain."""
    none = ReadRows(wanted_N[:0], {}, b"")
    pieces, if_empty = _pieces_of(layout)
    if pieces is None or layout.is_conversation or not len(wanted_N):
        return none
    labels = {"response": layout.response_field, "source": config.source_field, "example_id": config.id_field}
    named = {name: field for name, field in labels.items() if field is not None}
    in_prompt = list(dict.fromkeys(field for _, field in (*pieces, *(if_empty or ())) if field is not None))
    try:
        texts = {field: _Texts.of(rows.values(field)) for field in {*in_prompt, *named.values()}}
        prompts = _filled(pieces, if_empty, texts)
    except (UnicodeEncodeError, pa.ArrowException):  # half a surrogate pair; more than 2 GiB
        return none
    is_plain_N = is_filled(prompts) & np.logical_or.reduce([texts[field].is_filled_N for field in in_prompt])
    is_plain_N &= np.logical_and.reduce([texts[field].is_text_N for field in in_prompt])
    is_plain_N &= np.logical_and.reduce([texts[field].is_filled_N for field in named.values()])
    numbers_M = wanted_N[is_plain_N[wanted_N]]
    columns = {"prompt": prompts} | {name: texts[field].texts for name, field in named.items()}
    if len(numbers_M) < len(rows):
        columns = {name: column.take(pa.array(numbers_M)) for name, column in columns.items()}
    learned = pc.binary_join_element_wise(columns["prompt"], columns["response"], "\0")
    return ReadRows(numbers_M, columns, digests_of(learned))


@dataclass(frozen=True)
class _Texts:
    """The values of a field in all rows."""

    texts: pa.Array
    """Empty where a value is no text."""
    is_text_N: NDArray[np.bool_]
    is_filled_N: NDArray[np.bool_]

    @classmethod
    def of(cls, values: Sequence[Any]) -> _Texts:
        is_text_N = np.ones(len(values), bool)
        if set(map(type, values)) - {str}:
            is_text_N = np.array([type(value) is str for value in values], bool)
            values = [value if type(value) is str else "" for value in values]
        texts = one_array(pa.array(values, pa.string()))
        return cls(texts, is_text_N, is_filled(texts))


def _pieces_of(layout: Layout) -> tuple[_Pieces | None, _Pieces | None]:
    """The prompt's template and the one for rows in which a field of it is empty; None for the first where fields are put in
    otherwise than as they are."""
    if layout.query_field is not None:
        return None, None
    if layout.prompt_template is None:
        return [("", layout.prompt_field)], None
    given = [layout.prompt_template, layout.prompt_template_if_empty]
    parsed = [None if template is None else list(string.Formatter().parse(template)) for template in given]
    if any(form or conversion for pieces in parsed for _, _, form, conversion in pieces or ()):
        return None, None
    template, if_empty = ([(text, field) for text, field, _, _ in pieces] if pieces is not None else None for pieces in parsed)
    return (template if any(field is not None for _, field in template or ()) else None), if_empty


def _filled(pieces: _Pieces, if_empty: _Pieces | None, texts: Mapping[str, _Texts]) -> pa.Array:
    """The prompt of every row."""
    prompts = _joined(pieces, texts)
    has_all_N = np.logical_and.reduce([texts[field].is_filled_N for _, field in pieces if field is not None])
    if if_empty is None or has_all_N.all():
        return prompts
    return pc.if_else(pa.array(has_all_N), prompts, _joined(if_empty, texts))


def _joined(pieces: _Pieces, texts: Mapping[str, _Texts]) -> pa.Array | pa.Scalar:
    """Pieces and fields one after the other, for every row; one text where no field is among them."""
    parts = [part for text, field in pieces for part in (text, None if field is None else texts[field].texts)]
    return pc.binary_join_element_wise(*(part for part in parts if part is not None), "")
