"""JSON texts of a corpus as values: the same as Python's `json` gives, and the same errors, for every text."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s2l_ray.config import ExamplesConfig
from s2l_ray.examples.cutting import cut_corpus
from s2l_ray.examples.json_values import loads_json
from s2l_ray.examples.shards import read_shard

EDGES = [
    "NaN", "-Infinity", "Infinity", "1e400", "-1e400", "1.7976931348623159e308", "1e-400", "-0", "-0.0", "01", "1.", ".5", "+1",
    "18446744073709551615", "18446744073709551616", "9223372036854775808", "-9223372036854775808", "-9223372036854775809",
    "100000000000000000000e-5", "0.1000000000000000055511151231257827", "9" * 5000, "1E+2", '"\\ud800"', '"\\udc00\\ud800"',
    '"\\ud83d\\ude00"', "\ud800", '"\ud800"', '"a\x7f"', '"a\tb"', '"\\x"', '"\\u0000"', "\ufeff1", "\xa01", "\x0b1", " 1\t",
    "", "tru", "'a'", "[1,]", '{"a": 1,}', "{a: 1}", "[] []", "// x", '{"a": 1, "b": 2, "a": 3}', '{"a": {"c": 1, "c": 2}}',
]  # fmt: skip
NUMBERS = (
    st.integers() | st.integers(-(2**70), 2**70) | st.floats() | st.decimals(allow_nan=False, allow_infinity=False, places=30)
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)


def outcome(read: Any, text: str) -> tuple[Any, ...]:
    """What reading a text gives, with the type of every number and the order of keys, or its error with its words."""
    try:
        return ("value", repr(read(text)))
    except (ValueError, RecursionError) as error:
        return (type(error), str(error))


@pytest.mark.parametrize("text", EDGES)
@pytest.mark.parametrize("around", ["{}", '{{"a": {}}}', '{{"a": "x", "b": [1.5, {}]}}', "[{}]"])
def test_texts_on_which_json_libraries_differ_are_read_as_python_reads_them(text: str, around: str) -> None:
    text = around.format(text)
    assert outcome(loads_json, text) == outcome(json.loads, text)


@pytest.mark.parametrize("depth", [10, 150, 390, 410, 900])
@pytest.mark.parametrize(("left", "right"), [("[", "]"), ('{"a":', "}"), ('{"a":[', "]}")])
def test_deep_texts_are_read_or_refused_as_python_does(depth: int, left: str, right: str) -> None:
    text = f'{{"x": {left * depth}1{right * depth}}}'
    assert outcome(loads_json, text)[0] == outcome(json.loads, text)[0]


@pytest.mark.parametrize("depth", [1_100, 100_000])
def test_what_is_nested_without_end_is_a_recursion_error(depth: int) -> None:
    with pytest.raises(RecursionError):
        loads_json("[" * depth + "]" * depth)


@settings(max_examples=300, deadline=None)
@given(VALUES, st.booleans())
def test_every_value_is_read_as_it_was_written(value: Any, ascii_only: bool) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only)
    assert outcome(loads_json, text) == outcome(json.loads, text)


@settings(max_examples=300, deadline=None)
@given(NUMBERS)
def test_every_number_has_its_value_and_type(number: Any) -> None:
    text = f'{{"a": {number}, "b": "x"}}'
    assert outcome(loads_json, text) == outcome(json.loads, text)


@settings(max_examples=300, deadline=None)
@given(VALUES, st.data())
def test_a_text_with_an_error_is_refused_with_the_same_words(value: Any, data: st.DataObject) -> None:
    text = json.dumps(value)
    place = data.draw(st.integers(0, len(text)))
    text = text[:place] + data.draw(st.sampled_from(["", ",", '"', "\\", "}", "]", "\x00", "e", "9", "-"])) + text[place + 1 :]
    assert outcome(loads_json, text) == outcome(json.loads, text)


def test_rows_with_numbers_that_few_libraries_keep_come_out_as_they_were(tmp_path: Path) -> None:
    large = 2**64 + 1
    lines = [
        f'{{"prompt": "one", "response": "x",  "big": {large}, "n": NaN}}',
        '{"response": "y", "prompt": "\\u0074wo", "big": 1, "n": 1e400, "n": 0.10}',
    ]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    config = ExamplesConfig(dataset=str(tmp_path / "corpus.jsonl"))
    [shard] = cut_corpus(config)
    table = read_shard(shard, config)
    assert sorted(table["row_json"].to_pylist()) == sorted(lines)
    values = {row["prompt"]: row for row in map(loads_json, table["row_json"].to_pylist())}
    assert sorted(values) == ["one", "two"]
    assert values["one"]["big"] == large
    assert math.isnan(values["one"]["n"])


def test_of_equal_examples_the_same_is_kept_however_the_corpus_is_cut(tmp_path: Path) -> None:
    """Two rows that differ only in how they are written: which one comes out does not hang on where they stand."""
    rows = ['{"prompt": "one", "response": "x"}', '{"response": "x", "prompt": "one"}']
    digests = []
    for number, order in enumerate((rows, rows[::-1])):
        (tmp_path / f"{number}.jsonl").write_text("\n".join(order))
        config = ExamplesConfig(dataset=str(tmp_path / f"{number}.jsonl"))
        [shard] = cut_corpus(config)
        table = read_shard(shard, config)
        digests.append(dict(zip(table["row_json"].to_pylist(), table["row"].to_pylist(), strict=True)))
    assert digests[0] == digests[1]
    assert len(set(digests[0].values())) == len(rows)
