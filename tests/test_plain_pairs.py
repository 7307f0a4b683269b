"""Plain rows come out of the quick way as they do one by one: prompts, masks and hashes in vectors, columns by Arrow."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from s2l_ray.config import ExamplesConfig
from s2l_ray.errors import DataError
from s2l_ray.examples import fields
from s2l_ray.examples.columns import join_columns, struct_from_values
from s2l_ray.examples.cutting import cut_corpus
from s2l_ray.examples.fields import known_fields, normalise
from s2l_ray.examples.hashes import digest_of, prompt_hash, splits_of
from s2l_ray.examples.json_values import loads_json, read_fields
from s2l_ray.examples.masking import prompt_hashes
from s2l_ray.examples.parts import PartColumns
from s2l_ray.examples.plain_pairs import ReadRows
from s2l_ray.examples.rows import Records
from s2l_ray.examples.shards import ShardIndex, read_shard, row_groups
from s2l_ray.examples.texts import binaries, digests_of, hexadecimal, is_filled
from tests.building import literal_split

# What is masked, in many scripts, beside what only looks so.
MARKS = st.text(st.sampled_from("0129.,, \n\tAbZ\u00e9\u0130\u00df\u0663#\x1c\x1f\x85\xa0\u2003\u3000\u4e00"), max_size=12)
PLAIN = st.text(st.sampled_from("09., \n\tAz#\x1c"), max_size=8)


@given(st.lists(PLAIN | MARKS | st.text(), max_size=20), st.integers(0, 5), st.integers(1, 64))
@example(["1", "2"], 0, 64)
@example(["1.", "2", ".3", "1..2", "1.2.3,4"], 0, 64)
@example([" ", "  a  ", "", "b ", " c"], 1, 2)
def test_prompts_that_are_masked_together_have_the_hashes_that_they_have_alone(
    prompts: list[str], skipped: int, block_bytes: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("s2l_ray.examples.masking.BLOCK_BYTES", block_bytes)
        found = prompt_hashes(pa.array(prompts, pa.string())[skipped:])
    assert found.tolist() == [prompt_hash(prompt) for prompt in prompts[skipped:]]


@given(st.lists(MARKS | st.text(), max_size=20), st.integers(0, 5))
def test_texts_that_are_hashed_together_have_the_digests_that_they_have_alone(texts: list[str], skipped: int) -> None:
    array, texts = pa.array(texts, pa.string())[skipped:], texts[skipped:]
    digests = [digest_of(text.encode()) for text in texts]
    assert binaries(digests_of(array)).to_pylist() == digests
    assert hexadecimal(digests_of(array)).to_pylist() == [digest.hex() for digest in digests]
    assert is_filled(array).tolist() == [bool(text.strip()) for text in texts]


@given(st.lists(st.integers(0, 2**64 - 1)), st.floats(0, 0.5), st.just(0.0) | st.floats(0, 0.49))
@example([2**64 - 1], 0.0, 0.0)
@example([2**64 - 1, 2**64 - 2**11, 0], 0.0, 1e-9)
def test_splits_that_are_decided_together_are_those_decided_alone(
    hashes: list[int], held_out: float, validation: float
) -> None:
    found = splits_of(np.array(hashes, np.uint64), held_out, validation)
    assert found.to_pylist() == [literal_split(hashed, held_out, validation) for hashed in hashes]


# --- rows --------------------------------------------------------------------------------------------------------

VALUES = st.sampled_from(["", " ", "\u3000", "a", "A 1", " b\n", "\u4e00", "{x}", "\u00e9\U0001f600", '"\\', "\0"])
OTHERS = st.sampled_from([None, 3, True, 2.5, [], ["a", "b"], {}, [{"role": "user", "content": "q"}], "\ud800"])
TEMPLATES = st.sampled_from(
    [
        {},
        {"prompt_template": "{a}\n{b} "},
        {"prompt_template": "{a}{{}}{b}.", "prompt_template_if_empty": "{a}!"},
        {"prompt_template": "Q: {a}{a}", "prompt_template_if_empty": "{b}"},
        {"prompt_template": "{a}", "prompt_template_if_empty": "none"},
        {"prompt_template": "none"},
    ]
)
FORMATTED = st.just({"prompt_template": "{a!r:>4}"})


def records(values: Any) -> Any:
    return st.lists(st.dictionaries(st.sampled_from(["a", "b", "c", "s", "i"]), values), max_size=8)


LABELS = st.sampled_from([{}, {"source_field": "s"}, {"id_field": "i"}, {"source_field": "s", "id_field": "i"}])
WHERE = st.sampled_from([{}, {"a": ["a", "A 1"]}])


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(records(VALUES) | records(VALUES | OTHERS), TEMPLATES | FORMATTED, LABELS, WHERE, st.sampled_from(["drop", "error"]))
def test_rows_come_out_as_they_do_one_by_one(found: Any, template: Any, labels: Any, where: Any, on_bad_row: Any) -> None:
    config = ExamplesConfig(
        dataset="none", prompt_field="a", response_field="c", on_bad_row=on_bad_row, where=where, **template, **labels
    )
    rows = Records(found, lambda row: f"row {row}", "file")
    outcomes = []
    for read in (fields.read_plain_pairs, lambda _rows, wanted, *_: ReadRows(wanted[:0], {}, b"")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fields, "read_plain_pairs", read)
            try:
                examples = normalise(rows, config)
                outcomes.append((examples.table, examples.dropped, examples.columns))
            except DataError as error:
                outcomes.append(str(error))
    assert outcomes[0] == outcomes[1]


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(records(VALUES), TEMPLATES, st.booleans())
def test_prompts_that_a_shard_leaves_out_are_read_again_from_its_rows(
    tmp_path: Path, found: Any, template: Any, is_spaced: bool
) -> None:
    config = ExamplesConfig(
        dataset=str(tmp_path / "corpus.jsonl"),
        prompt_field="a",
        response_field="c",
        on_bad_row="drop",
        max_dropped=0.99,
        **template,
    )
    lines = [json.dumps(row, separators=(" , ", " : ") if is_spaced else None) for row in found]
    (tmp_path / "corpus.jsonl").write_text("\n".join([*lines, '{"a": "always", "b": "one", "c": "row"}']))
    tables = [read_shard(shard, config) for shard in cut_corpus(config)]
    columns = join_columns(ShardIndex.of(row_groups(table)).columns for table in tables)
    made = PartColumns(columns.type, True, False, known_fields(config)[1])
    for table in filter(len, tables):
        read = made.of(table.replace_schema_metadata())
        assert "prompt" not in table.column_names
        for one in read.to_pylist():
            record = {name: value for name, value in one["original"].items() if value is not None}
            assert record == json.loads(one["row_json"])
            [again] = normalise(Records([record], str, ""), config).table.to_pylist()
            assert (again["example_id"], again["prompt"], again["response"]) == tuple(
                one[name] for name in ("example_id", "prompt", "response")
            )


def test_rows_that_are_not_plain_are_not_all_parsed_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To parse the lines of conversations takes half the time of reading them."""
    parsed: list[bytes] = []

    def loads(line: bytes) -> Any:
        parsed.append(line)
        return json.loads(line)

    monkeypatch.setattr("s2l_ray.examples.formats.orjson", SimpleNamespace(loads=loads))
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    (tmp_path / "corpus.jsonl").write_text("\n".join([json.dumps(row)] * 100))
    [[piece]] = cut_corpus(ExamplesConfig(dataset=str(tmp_path / "corpus.jsonl"), messages_field="messages"))
    assert sum(map(len, piece.read())) == 100
    assert len(parsed) == 1


SCALARS = {
    pa.string(): st.text(st.characters(exclude_categories=["Cs"])),
    pa.int64(): st.integers(-(2**63), 2**63 - 1),
    pa.bool_(): st.booleans(),
    pa.null(): st.none(),
}


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(["a", "b", '\u00e9 "x']), st.sampled_from(list(SCALARS)), min_size=1), st.data())
def test_columns_that_arrow_reads_are_those_that_python_reads(kinds: dict[str, pa.DataType], data: st.DataObject) -> None:
    one = st.fixed_dictionaries({}, optional={name: SCALARS[kind] | st.none() for name, kind in kinds.items()})
    beside = st.dictionaries(st.just("z"), st.sampled_from([1.5, {"a": "b"}, [1, {"a": "c"}]]))
    rows = [row | other for row, other in data.draw(st.lists(st.tuples(one, beside), min_size=1))]
    texts = [json.dumps(row, ensure_ascii=data.draw(st.booleans())) for row in rows]
    kind = pa.struct(list(kinds.items()))
    found = read_fields(pa.array(texts), kind)
    assert found == struct_from_values([loads_json(text) for text in texts], kind)
