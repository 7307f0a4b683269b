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
from s2l_ray.examples.json_values import loads_json
from s2l_ray.examples.layouts import Layout, row_reader
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
    template = _Template.of(layout)
    if template is None or not len(wanted_N):
        return none
    labels = {"response": layout.response_field, "source": config.source_field, "example_id": config.id_field}
    named = {name: field for name, field in labels.items() if field is not None}
    try:
        texts = {field: _Texts.of(_text_array(rows.values(field))) for field in {*template.fields, *named.values()}}
        prompts = template.filled(texts)
    except (UnicodeEncodeError, pa.ArrowException):  # half a surrogate pair; more than 2 GiB
        return none
    is_plain_N = is_filled(prompts) & np.logical_or.reduce([texts[field].is_filled_N for field in template.fields])
    is_plain_N &= np.logical_and.reduce([texts[field].is_text_N for field in template.fields])
    is_plain_N &= np.logical_and.reduce([texts[field].is_filled_N for field in named.values()])
    numbers_M = wanted_N[is_plain_N[wanted_N]]
    columns = {"prompt": prompts} | {name: texts[field].texts for name, field in named.items()}
    if len(numbers_M) < len(rows):
        columns = {name: column.take(pa.array(numbers_M)) for name, column in columns.items()}
    learned = pc.binary_join_element_wise(columns["prompt"], columns["response"], "\0")
    return ReadRows(numbers_M, columns, digests_of(learned))


def pairs_again(texts: pa.Array, fields: pa.StructArray | None, layout: Layout) -> tuple[pa.Array, pa.Array]:
    """Prompts and responses of rows that `read_plain_pairs` found to be plain, by their JSON texts.

    `fields`: those of their fields that are texts in all rows, where that is known.
    """
    template = _Template.of(layout)
    names = [] if fields is None else [one.name for one in fields.type if one.type == pa.string()]
    if template is None or fields is None or not {*template.fields, layout.response_field} <= set(names):
        pairs = list(map(row_reader(layout), map(loads_json, texts.to_pylist())))
        return tuple(pa.array([getattr(pair, name) for pair in pairs], pa.string()) for name in ("prompt", "response"))
    found = {name: _Texts.of(fields.field(name)) for name in {*template.fields, layout.response_field}}
    return template.filled(found), found[layout.response_field].texts


def _text_array(values: Sequence[Any]) -> pa.Array:
    """The texts among some values, null in the place of any other."""
    if set(map(type, values)) - {str}:
        values = [value if type(value) is str else None for value in values]
    return one_array(pa.array(values, pa.string()))


@dataclass(frozen=True)
class _Texts:
    """The values of a field in all rows."""

    texts: pa.Array
    """Empty where a value is no text."""
    is_text_N: NDArray[np.bool_]
    is_filled_N: NDArray[np.bool_]

    @classmethod
    def of(cls, column: pa.Array) -> _Texts:
        """The values of an array of texts, null where a value is none."""
        texts = column.fill_null("") if column.null_count else column
        return cls(texts, column.is_valid().to_numpy(zero_copy_only=False), is_filled(texts))


@dataclass(frozen=True)
class _Template:
    """How a prompt is put together: pieces of text, each with the field that follows it, if one does."""

    pieces: _Pieces
    if_empty: _Pieces | None
    """Those for rows in which a field of the others is empty."""

    @classmethod
    def of(cls, layout: Layout) -> _Template | None:
        """The template of pairs; None for conversations, and where fields are put in otherwise than as they are."""
        if layout.is_conversation or layout.query_field is not None:
            return None
        if layout.prompt_template is None:
            return cls([("", layout.prompt_field)], None)
        given = [layout.prompt_template, layout.prompt_template_if_empty]
        parsed = [list(string.Formatter().parse(template)) for template in given if template is not None]
        if any(form or conversion for pieces in parsed for _, _, form, conversion in pieces):
            return None
        template, if_empty = [*([(text, field) for text, field, _, _ in pieces] for pieces in parsed), None][:2]
        return cls(template, if_empty) if template and any(field is not None for _, field in template) else None

    @property
    def fields(self) -> list[str]:
        return list(dict.fromkeys(field for _, field in (*self.pieces, *(self.if_empty or ())) if field is not None))

    def filled(self, texts: Mapping[str, _Texts]) -> pa.Array:
        """The prompt of every row."""
        prompts = _joined(self.pieces, texts)
        has_all_N = np.logical_and.reduce([texts[field].is_filled_N for _, field in self.pieces if field is not None])
        if self.if_empty is None or has_all_N.all():
            return prompts
        return pc.if_else(pa.array(has_all_N), prompts, _joined(self.if_empty, texts))


def _joined(pieces: _Pieces, texts: Mapping[str, _Texts]) -> pa.Array | pa.Scalar:
    """Pieces and fields one after the other, for every row; one text where no field is among them."""
    parts = [part for text, field in pieces for part in (text, None if field is None else texts[field].texts)]
    return pc.binary_join_element_wise(*(part for part in parts if part is not None), "")
