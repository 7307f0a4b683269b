"""Stage `examples`: what a user gets from a corpus, and what message there is for one that cannot be used.

Most tests read shards without Ray, which does the same work in another process; those that ask for `ray_session` build the
stage whole.
"""

from __future__ import annotations

import bz2
import datetime
import decimal
import gzip
import io
import json
import logging
import lzma
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from s2l_ray.config import ExamplesConfig
from s2l_ray.config.recipes import SCHEMAS
from s2l_ray.errors import ArtifactError, ConfigError, DataError, S2LError
from s2l_ray.examples.columns import Columns, field_of, holds_json, join_columns, plain_values
from s2l_ray.examples.conversations import LearnedText
from s2l_ray.examples.corpus import corpus_identity, examples_recipe, find_files
from s2l_ray.examples.cutting import cut_corpus, cut_file, sample_corpus
from s2l_ray.examples.dropped import Dropped
from s2l_ray.examples.fields import content_digest, known_fields
from s2l_ray.examples.formats import Lines, owned_lines
from s2l_ray.examples.hashes import masked, prompt_hash
from s2l_ray.examples.parts import PartColumns, rows_per_part
from s2l_ray.examples.pieces import GeneratedRows, Shard
from s2l_ray.examples.reading import fetch_rows, read_held_out, read_pool
from s2l_ray.examples.rows import TableRows
from s2l_ray.examples.shards import ShardIndex, read_shard, row_groups
from s2l_ray.examples.stage import build as build_stage
from s2l_ray.runtime.data import quiet_ray_data
from s2l_ray.storage.artifacts import Artifact, Key
from s2l_ray.storage.drafts import Draft
from s2l_ray.storage.hub import hub_id
from s2l_ray.storage.layout import CORPUS_HASHES, MANIFEST
from s2l_ray.storage.places import Storage
from s2l_ray.storage.stages import check_dropped
from tests.building import context_of, split_of

SHARED_DATA = Path(os.environ.get("S2L_SHARED_DATA", Path(__file__).parents[1] / "../shared/data")).resolve()
COMMIT = "0123456789abcdef0123456789abcdef01234567"


# --- helpers -----------------------------------------------------------------------------------------------------


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def questions(count: int) -> list[dict[str, Any]]:
    """Rows whose prompts stay different when their numbers are masked."""
    words = ["apple", "boat", "cloud", "drum", "eagle", "fern", "glove", "house"]
    return [
        {
            "prompt": f"What is a {words[i % 8]} {words[i // 8 % 8]} {words[i // 64 % 8]} {words[i // 512 % 8]}, case {i}?",
            "response": f"answer {i}",
            "source": f"set-{i % 3}",
        }
        for i in range(count)
    ]


def config_of(dataset: Any, **fields: Any) -> ExamplesConfig:
    dataset = str(dataset) if isinstance(dataset, Path) else dataset
    return ExamplesConfig(dataset=dataset, **fields)


def read_all(dataset: Any, **fields: Any) -> pa.Table:
    """The examples of every shard, read here and now, with the columns of the parts."""
    config = config_of(dataset, **fields)
    shards = [read_shard(shard, config) for shard in cut_corpus(config)]
    indexes = [ShardIndex.of(row_groups(shard)) for shard in shards]
    joined = join_columns(index.columns for index in indexes)
    has_json, has_conversations = (any(getattr(index, name) for index in indexes) for name in ("has_json", "num_conversations"))
    columns = PartColumns(joined.type, has_json, has_conversations, known_fields(config)[1])
    return pa.concat_tables([columns.of(shard.replace_schema_metadata()) for shard in shards])


def dropped_of(dataset: Any, **fields: Any) -> dict[str, int]:
    config = config_of(dataset, **fields)
    return dict(Dropped.joined(index_of(shard, config).dropped for shard in cut_corpus(config)).by_reason)


def index_of(shard: Shard, config: ExamplesConfig) -> ShardIndex:
    return ShardIndex.of(row_groups(read_shard(shard, config)))


def draft_of(run_dir: Path, config: ExamplesConfig) -> Draft:
    key = Key("examples", SCHEMAS["examples"], examples_recipe(config, corpus_identity(config)), {})
    return Draft.open(Storage(str(run_dir)), key)


def build(run_dir: Path, dataset: Any, **fields: Any) -> Artifact:
    config = config_of(dataset, **fields)
    return build_stage(context_of(draft_of(run_dir, config), examples=config))


def read_parts(artifact: Artifact) -> pa.Table:
    return pa.concat_tables([artifact.read_table(part) for part in artifact.parts()])


def hashes_of(artifact: Artifact) -> dict[str, str]:
    return {path: record["sha256"] for path, record in artifact.manifest["files"].items()}


# --- cutting a file ----------------------------------------------------------------------------------------------

line_contents = st.lists(st.sampled_from(["", " ", "a", '{"x": 1}', "long " * 5, "\u00e9"]), max_size=12)
line_ends = st.sampled_from(["\n", "\r\n"])


@given(lines=line_contents, end=line_ends, ends_with_newline=st.booleans(), size=st.integers(1, 40))
def test_every_line_is_read_once_however_a_file_is_cut(lines: list[str], end: str, ends_with_newline: bool, size: int) -> None:
    data = (end.join(lines) + (end if ends_with_newline else "")).encode()
    ranges = [owned_lines(io.BytesIO(data), start, min(start + size, len(data))) for start in range(0, len(data), size)]
    assert b"".join(part for _, part in ranges) == data
    for begin, part in ranges:
        assert data[begin : begin + len(part)] == part
        assert not part or begin == 0 or data[begin - 1 : begin] == b"\n"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)
@given(size=st.integers(1, 300), end=line_ends, blank=st.booleans(), ends_with_newline=st.booleans())
def test_every_row_is_read_once_however_a_file_is_cut(
    tmp_path: Path, size: int, end: str, blank: bool, ends_with_newline: bool
) -> None:
    path = tmp_path / "rows.jsonl"
    text = (end * (2 if blank else 1)).join(json.dumps({"n": n, "text": "\u00e9" * n}) for n in range(12))
    path.write_bytes((text + (end if ends_with_newline else "")).encode())
    [file] = find_files(str(path))
    starts = range(0, file.num_bytes, size)
    found = [rows for start in starts for rows in Lines(file, start, min(start + size, file.num_bytes)).read()]
    assert [value for rows in found for value in rows.values("n")] == list(range(12))
    step = 2 if blank else 1
    places = [rows.place(row) for rows in found for row in range(len(rows))]
    assert places == [f"{path} line {1 + step * n}" for n in range(12)]


def test_parquet_is_cut_between_row_groups(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"prompt": [f"p{i}" for i in range(100)], "response": ["r"] * 100}), path, row_group_size=10)
    [file] = find_files(str(path))
    cut = cut_file(file, 1)
    assert len(cut) == 10
    rows = [rows for piece in cut for rows in piece.read()]
    assert [value for found in rows for value in found.values("prompt")] == [f"p{i}" for i in range(100)]
    assert rows[-1].place(9) == f"{path} row 100"


def test_many_small_files_become_few_units(tmp_path: Path) -> None:
    for number in range(50):
        write_lines(tmp_path / f"{number:02d}.jsonl", questions(2))
    assert len(cut_corpus(config_of(tmp_path))) == 1


# --- ids, splits, parts ------------------------------------------------------------------------------------------


@given(st.text(), st.text())
def test_an_id_is_made_from_prompt_and_response_alone(prompt: str, response: str) -> None:
    digest = content_digest(LearnedText(prompt, response))
    assert len(digest.hex()) == 20
    assert digest == content_digest(LearnedText(prompt, response))
    assert digest != content_digest(LearnedText(prompt + "x", response))
    assert digest != content_digest(LearnedText(prompt, response + "x"))


@given(st.lists(st.sampled_from(["has", "Apples", "3", "1,200.5", "?"]), min_size=1), st.integers(0, 10**6), st.floats(0, 0.99))
def test_near_copies_stay_on_one_side(words: list[str], number: int, fraction: float) -> None:
    other = "  ".join(str(number) if any(c.isdigit() for c in word) else word.upper() for word in words)
    assert masked(" ".join(words)) == masked(other)
    assert split_of(prompt_hash(" ".join(words)), fraction) == split_of(prompt_hash(other), fraction)


@given(st.text(), st.floats(0, 0.99), st.floats(0, 0.99))
def test_a_larger_share_holds_out_what_a_smaller_one_did(prompt: str, one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert split_of(prompt_hash(prompt), low) == "pool" or split_of(prompt_hash(prompt), high) == "held_out"


def test_the_held_out_share_is_the_one_asked_for() -> None:
    prompts = [row["prompt"] for row in questions(4096)]
    share = np.mean([split_of(prompt_hash(prompt), 0.1) == "held_out" for prompt in prompts])
    assert abs(share - 0.1) < 4 * np.sqrt(0.1 * 0.9 / 4096)  # four standard deviations of a fair draw
    assert all(split_of(prompt_hash(prompt), 0.0) == "pool" for prompt in prompts)


@pytest.mark.parametrize(
    ("num_rows", "wanted", "expected"),
    [(1, "auto", 512), (512 * 1024, "auto", 512), (512 * 1024 + 1, "auto", 1024), (10_000_000, "auto", 16_384), (9, 3, 3)],
)
def test_parts_grow_with_the_corpus(num_rows: int, wanted: Any, expected: int) -> None:
    assert rows_per_part(num_rows, wanted) == expected


# --- formats -----------------------------------------------------------------------------------------------------


def write_formats(folder: Path, rows: list[dict[str, Any]]) -> dict[str, Path]:
    """The same rows in every format."""
    folder.mkdir()
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    quoted = "".join(",".join(f'"{value}"' for value in row.values()) + "\r\n" for row in rows)
    contents = {
        "lines.jsonl": lines,
        "lines.ndjson": b"\xef\xbb\xbf" + lines.replace(b"\n", b"\r\n"),
        "lines.json": lines,
        "array.json": b"\n " + json.dumps(rows, indent=1).encode(),
        "lines.jsonl.gz": gzip.compress(lines),
        "array.json.gz": gzip.compress(json.dumps(rows).encode()),
        "array.jsonl": json.dumps(rows).encode(),
        "pretty.json": "\n".join(json.dumps(row, indent=1) for row in rows).encode(),
        "lines.jsonl.bz2": bz2.compress(lines),
        "lines.jsonl.xz": lzma.compress(lines),
        "lines.jsonl.zst": pa.compress(lines, "zstd", asbytes=True),
        "utf-16.jsonl": lines.decode().encode("utf-16"),
        "utf-16-be.json": b"\xfe\xff" + json.dumps(rows).encode("utf-16-be"),
        "marks-inside.jsonl": b"\xef\xbb\xbf" + lines.replace(b"\n", b"\n\xef\xbb\xbf", 3),
        "semicolons.csv": (";".join(rows[0]) + "\n" + "".join(";".join(row.values()) + "\n" for row in rows)).encode("utf-16"),
        "table.csv.zst": pa.compress((",".join(rows[0]) + "\r\n" + quoted).encode(), "zstd", asbytes=True),
        "table.csv": (",".join(rows[0]) + "\r\n" + quoted).encode(),
        "table.tsv": ("\t".join(rows[0]) + "\n" + "".join("\t".join(row.values()) + "\n" for row in rows)).encode(),
    }
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    pq.write_table(pa.Table.from_pylist(rows), folder / "table.parquet")
    return {path.name: path for path in folder.iterdir()}


def test_every_format_gives_the_same_examples(tmp_path: Path) -> None:
    paths = write_formats(tmp_path / "formats", questions(20))
    columns = ["example_id", "source", "prompt", "response", "split", "original"]
    expected = read_all(paths["lines.jsonl"], source_field="source").select(columns)
    assert expected.num_rows == 20
    for path in paths.values():
        found = read_all(path, source_field="source").select(columns)
        assert found.to_pylist() == expected.to_pylist(), path.name


def test_csv_values_stay_text_and_may_span_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('id,prompt,response,level\n007,"two\nlines, yes",42,3\n\n008,"b",c,4\n')
    table = read_all(path, id_field="id", where={"level": [3, 5]})
    assert table["example_id"].to_pylist() == ["007"]
    assert table["prompt"].to_pylist() == ["two\nlines, yes"]
    assert table["original"].to_pylist() == [{"id": "007", "prompt": "two\nlines, yes", "response": "42", "level": "3"}]


def test_directories_globs_and_uris_find_the_same_files(tmp_path: Path) -> None:
    for name in ("a.jsonl", "deep/b.jsonl", "deep/er/c.jsonl"):
        write_lines(tmp_path / "data" / name, questions(1))
    (tmp_path / "data" / "README.md").write_text("not data")
    (tmp_path / "data" / "_SUCCESS.jsonl").write_text("")
    root = f"{tmp_path}/data"

    def names(*places: str) -> list[str]:
        return sorted(file.uri.partition("/data/")[2] for file in find_files(list(places)))

    everything = ["a.jsonl", "deep/b.jsonl", "deep/er/c.jsonl"]
    assert names(root) == names(f"{root}/**/*.jsonl") == names(f"file://{root}") == everything
    assert names(f"{root}/*.jsonl") == ["a.jsonl"]
    assert names(f"{root}/deep/[bc].jsonl") == ["deep/b.jsonl"]
    assert names(f"{root}/*.jsonl", f"{root}/a.jsonl") == ["a.jsonl"]
    assert names(f"file://{root}/*/*.jsonl") == ["deep/b.jsonl"]
    assert names(f"{root}/deep/**") == everything[1:]
    with pytest.raises(DataError, match=r"README\.md: unknown file format"):
        names(f"{root}/**")


def test_the_source_is_the_file_unless_a_field_names_it(tmp_path: Path) -> None:
    write_lines(tmp_path / "algebra.jsonl", questions(2)[:1])
    (tmp_path / "logic.jsonl.gz").write_bytes(gzip.compress(json.dumps(questions(2)[1]).encode()))
    assert sorted(read_all(tmp_path)["source"].to_pylist()) == ["algebra", "logic"]
    assert sorted(read_all(tmp_path, source_field="source")["source"].to_pylist()) == ["set-0", "set-1"]


def test_original_columns_come_back_as_they_were(tmp_path: Path) -> None:
    rows = [
        {"id": 1, "prompt": "a", "response": "b", "tags": ["x"], "meta": {"z": 1, "a": None, "e": {}}},
        {"id": 2, "prompt": "c", "extra": 1.5, "response": "d", "tags": [], "meta": {"a": "t", "z": 2.5}},
    ]
    table = read_all(write_lines(tmp_path / "rows.jsonl", rows), id_field="id")
    assert table["row_json"].to_pylist() == [json.dumps(row) for row in rows]
    first, second = table["original"].to_pylist()
    assert first == {**rows[0], "extra": None, "meta": json.dumps(rows[0]["meta"])}
    assert second == {**rows[1], "meta": json.dumps(rows[1]["meta"])}
    assert [field.name for field in table.schema.field("original").type] == [
        "id",
        "prompt",
        "extra",
        "response",
        "tags",
        "meta",
    ]


def test_an_object_without_fields_can_be_stored(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [{"prompt": "a", "response": "b", "meta": {}, "list": [{}]}])
    table = read_all(path)
    assert table["original"].to_pylist() == [{"prompt": "a", "response": "b", "meta": "{}", "list": "[{}]"}]
    pq.write_table(table, tmp_path / "stored.parquet")


def test_categories_of_a_parquet_file_become_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"prompt": ["a"], "response": ["b"], "kind": pa.array(["x"]).dictionary_encode()}), path)
    assert read_all(path).schema.field("original").type.field("kind").type == pa.string()


TEXT_TYPES = [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
A_DAY = datetime.datetime(2024, 2, 29, 12, 30)
MESSAGE = pa.struct([("role", pa.dictionary(pa.int8(), pa.string())), ("content", pa.large_string())])
PASSED_ON = {
    "half": pa.array([1.5], pa.float16()),
    "decimal": pa.array([decimal.Decimal("1.50")]),
    "time": pa.array([A_DAY], pa.timestamp("ns", "UTC")),
    "late": pa.array([253402300800], pa.timestamp("s")),  # the year 10000, which Python does not have
    "clock": pa.array([5], pa.time64("ns")),
    "span": pa.array([5], pa.duration("ns")),
    "day": pa.array([A_DAY.date()]),
    "bytes": pa.array([b"\xff"], pa.large_binary()),
    "view": pa.array([b"\xff"], pa.binary_view()),
    "map": pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())),
    "list": pa.array([[1]], pa.list_(pa.int8(), 1)),
    "nested": pa.array([{"a": [{"b": A_DAY.date()}]}]),
    "chat": pa.array([[{"role": "user", "content": "x"}]], pa.large_list(MESSAGE)),
    "nothing": pa.nulls(1),
    "large": pa.array([2**64 - 1], pa.uint64()),
    "json": pa.array(["{}"], pa.json_()),
}


@pytest.mark.parametrize("text", TEXT_TYPES, ids=str)
def test_parquet_of_every_type_is_read_and_passed_on(tmp_path: Path, text: pa.DataType) -> None:
    path = tmp_path / "rows.parquet"
    words = {name: pa.array([name]).cast(text) for name in ("prompt", "response")}
    pq.write_table(pa.table(words | PASSED_ON), path)
    table = read_all(path)
    assert table.select(["prompt", "response"]).to_pylist() == [{"prompt": "prompt", "response": "response"}]
    pq.write_table(table, tmp_path / "stored.parquet")
    own = pq.read_table(tmp_path / "stored.parquet")["original"].combine_chunks()
    assert own.field("nested").to_pylist() == [{"a": [{"b": A_DAY.date()}]}]
    assert own.field("late").cast(pa.string()).to_pylist() == ["10000-01-01 00:00:00.000"]


NOTHING = pa.struct([("u", pa.null())])
NOTHING_INSIDE = {
    "list": pa.array([[None], None, [], [None, None]] * 3, pa.list_(pa.null())),
    "map": pa.array([[("a", None)], None, [], [("b", None)]] * 3, pa.map_(pa.string(), pa.null())),
    "struct": pa.array([{"s": "x", "v": [None]}, None] * 6, pa.struct([("s", pa.large_string()), ("v", pa.list_(pa.null()))])),
    "objects": pa.array(
        [[{"s": "x", "v": {"u": None}}], None, [None], [{"s": "y", "v": None}]] * 3,
        pa.list_(pa.struct([("s", pa.large_string()), ("v", NOTHING)])),
    ),
    "categories": pa.array([{"c": None}] * 12, pa.struct([("c", pa.dictionary(pa.int32(), pa.string()))])),
}


@pytest.mark.parametrize("name", NOTHING_INSIDE)
def test_columns_with_nothing_inside_are_passed_on_as_they_are(tmp_path: Path, name: str) -> None:
    """Of some such slices Arrow makes arrays that end the process which reads them."""
    column = NOTHING_INSIDE[name]
    rows = {"prompt": [f"p{number}" for number in range(12)], "response": ["r"] * 12}
    for start in range(0, 12, 4):
        pq.write_table(pa.table(rows | {name: column})[start : start + 4], tmp_path / f"{start}.parquet")
    found = sorted(read_all(str(tmp_path / "*.parquet"))["original"].to_pylist(), key=lambda row: int(row["prompt"][1:]))
    assert [row[name] for row in found] == column.to_pylist()
    sliced = pa.chunked_array([column[:5], column[5:]])
    assert plain_values(sliced) == column.to_pylist()
    table = pa.table({name: sliced})
    own = TableRows(table, "rows", 0, "rows").own(np.arange(12))[1]
    own.validate(full=True)
    assert own.field(name).to_pylist() == column.to_pylist()


def test_parquet_files_that_differ_in_the_types_of_a_column_keep_its_values(tmp_path: Path) -> None:
    kinds = [pa.int32(), pa.int64(), pa.uint8(), pa.float64()]
    times = [pa.timestamp("ns"), pa.timestamp("us"), pa.timestamp("ms"), pa.timestamp("s")]
    for number, (kind, time) in enumerate(zip(kinds, times, strict=True)):
        row = {"prompt": [f"p{number}"], "response": ["r"], "n": pa.array([number], kind), "when": pa.array([A_DAY], time)}
        row |= {"mixed": pa.array([1]) if number else pa.array(["one"])}
        pq.write_table(pa.table(row), tmp_path / f"{number}.parquet")
    rows = sorted(read_all(tmp_path).to_pylist(), key=lambda row: row["prompt"])
    assert [row["original"]["n"] for row in rows] == ["0", "1", "2", "3.0"]
    assert all("2024-02-29 12:30:00" in row["original"]["when"] for row in rows)
    assert [row["original"]["mixed"] for row in rows] == ['"one"', "1", "1", "1"]


NUMBERS = [
    1,
    2**53 + 1,
    2**63,
    0.5,
    1e300,
    True,
    None,
    "x",
    [1],
    [0.5],
    [2**53 + 1],
    [True],
    {"k": 1},
    {"k": 0.5},
    {"k": 2**60},
]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=80, deadline=None)
@given(st.lists(st.sampled_from(NUMBERS), min_size=1, max_size=5))
def test_a_column_holds_every_value_as_it_was_and_the_same_in_one_file_and_in_many(tmp_path: Path, values: list[Any]) -> None:
    rows = [{"prompt": f"p{i}", "response": "r", "x": value} for i, value in enumerate(values)]
    one = read_all(write_lines(tmp_path / "one.jsonl", rows)).sort_by("prompt")
    many = join_columns(Columns({"x": field_of("x", [value])}, {"x": 0}) for value in values).type.field("x")
    kept = one["original"].combine_chunks().field("x")
    assert (kept.type, holds_json(one.schema.field("original").type.field("x"))) == (many.type, holds_json(many))
    found = [json.loads(value) if holds_json(many) and value is not None else value for value in kept.to_pylist()]
    assert found == values
    assert all(type(a) is type(b) or {type(a), type(b)} == {int, float} for a, b in zip(found, values, strict=True))


def test_an_integer_beyond_doubles_is_not_rounded_because_another_file_has_decimals(tmp_path: Path) -> None:
    for name, column in (("a", pa.array([2**53 + 1])), ("b", pa.array([None], pa.float64()))):
        pq.write_table(pa.table({"prompt": [name], "response": ["r"], "user": column}), tmp_path / f"{name}.parquet")
    rows = sorted(read_all(tmp_path).to_pylist(), key=lambda row: row["prompt"])
    assert [row["original"]["user"] for row in rows] == ["9007199254740993", None]


@pytest.mark.parametrize("large", [2**53 + 1, [2**53 + 1]], ids=["number", "list"])
@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_integers_and_decimals_in_shards_of_their_own_are_kept_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, large: Any
) -> None:
    monkeypatch.setattr("s2l_ray.examples.cutting.SMALLEST_SHARD_BYTES", 1)
    small = [0.5] if isinstance(large, list) else 0.5
    rows = {"a": large, "b": small}
    for name, value in rows.items():
        if kind == "jsonl":
            write_lines(tmp_path / f"{name}.jsonl", [{"prompt": name, "response": "r", "x": value}])
        else:
            pq.write_table(pa.table({"prompt": [name], "response": ["r"], "x": [value]}), tmp_path / f"{name}.parquet")
    assert len(cut_corpus(config_of(tmp_path))) > 1
    found = {row["prompt"]: row["original"]["x"] for row in read_all(tmp_path).to_pylist()}
    assert {name: json.loads(value) for name, value in found.items()} == rows


def test_texts_of_an_array_over_several_lines_keep_every_character(tmp_path: Path) -> None:
    rows = [{"prompt": "a \u2028 \u0085 b", "response": "c"}]
    (tmp_path / "rows.json").write_text(json.dumps(rows, indent=2, ensure_ascii=False))
    assert [json.loads(text) for text in read_all(tmp_path / "rows.json")["row_json"].to_pylist()] == rows


def test_the_texts_of_a_large_array_are_no_longer_than_one_column_can_be(tmp_path: Path, monkeypatch: Any) -> None:
    """Of more than 2 GiB of text Arrow makes several chunks, whose bytes do not follow each other."""
    monkeypatch.setattr("s2l_ray.examples.formats.ROWS_AT_A_TIME", 2)
    rows: list[Any] = [{"prompt": f"p{number}", "response": "r"} for number in range(5)]
    (tmp_path / "rows.json").write_text(json.dumps([*rows[:2], 7, *rows[2:]]))
    [[piece]] = cut_corpus(config_of(tmp_path / "rows.json"))
    read = list(piece.read())
    assert [(len(some), len(some.bad)) for some in read] == [(2, 1), (2, 0), (1, 0)]
    assert [some.place(row).rpartition("/")[2] for some in read for row in range(len(some))] == [
        f"rows.json row {number}" for number in (1, 2, 4, 5, 6)
    ]
    found = read_all(tmp_path / "rows.json", on_bad_row="drop", max_dropped=0.5)
    assert sorted(map(json.loads, found["row_json"].to_pylist()), key=str) == rows


def test_a_field_for_tools_that_no_row_has_is_an_error(ray_session: None, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", questions(3))
    with pytest.raises(DataError, match=r"examples\.system_field=sistem: no row has this field"):
        build(tmp_path / "run", path, system_field="sistem")


def test_a_corpus_whose_bad_rows_were_dropped_is_not_taken_for_one_without(ray_session: None, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", questions(40))
    path.write_text(path.read_text() + "{broken\n")
    artifact = build(tmp_path / "run", path, on_bad_row="drop")
    check_dropped(config_of(path, on_bad_row="drop"), artifact)
    with pytest.raises(ArtifactError, match=r"1 bad rows were dropped.*examples\.on_bad_row=error"):
        check_dropped(config_of(path), artifact)
    with pytest.raises(ArtifactError, match=r"1 bad rows were dropped.*examples\.max_dropped=0\.01"):
        check_dropped(config_of(path, on_bad_row="drop", max_dropped=0.01), artifact)


def test_rows_of_json_and_of_parquet_make_one_corpus(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [{"prompt": "a", "response": "b", "meta": {"x": 1}}])
    pq.write_table(pa.table({"prompt": ["c"], "response": ["d"], "when": [A_DAY]}), tmp_path / "b.parquet")
    first, second = sorted(read_all(tmp_path).to_pylist(), key=lambda row: row["prompt"])
    assert json.loads(first["row_json"]) == {"prompt": "a", "response": "b", "meta": {"x": 1}}
    assert json.loads(second["row_json"]) == {"prompt": "c", "response": "d", "when": "2024-02-29 12:30:00.000000"}
    assert second["original"] == {"prompt": "c", "response": "d", "meta": None, "when": "2024-02-29 12:30:00.000000"}


def test_a_file_of_which_no_row_is_kept_does_not_matter_by_the_types_of_its_columns(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["a"], "response": ["b"], "meta": ["text"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"prompt": ["c"], "response": ["d"], "meta": [[1, 2]]}), tmp_path / "b.parquet")
    [row] = read_all(tmp_path, where={"prompt": "a"}).to_pylist()
    assert row["original"] == {"prompt": "a", "response": "b", "meta": "text"}


def test_whole_numbers_and_decimals_make_one_column(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [{"prompt": "a", "response": "b", "score": 1}])
    write_lines(tmp_path / "b.jsonl", [{"prompt": "c", "response": "d", "score": 0.5}])
    assert [row["score"] for row in read_all(tmp_path)["original"].to_pylist()] == [1.0, 0.5]


# --- templates, filters, conversations ---------------------------------------------------------------------------


def test_a_template_builds_the_prompt_and_another_serves_rows_with_an_empty_field(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Add", "input": "1 {2}", "output": "3", "level": 4},
        {"instruction": "Sing", "input": " ", "output": "la", "level": 4},
        {"instruction": "Dance", "input": None, "output": "hop", "level": 4},
        {"instruction": "", "input": None, "output": "nothing asked", "level": 4},
    ]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    fields = {"prompt_template": "{instruction}: {input}", "prompt_template_if_empty": "{instruction}!"}
    table = read_all(path, response_field="output", **fields)
    assert sorted(table["prompt"].to_pylist()) == ["Add: 1 {2}", "Dance!", "Sing!"]
    assert dropped_of(path, response_field="output", **fields) == {"empty_prompt": 1}
    with_number = read_all(path, response_field="output", prompt_template="{instruction} ({level})")
    assert "Add (4)" in with_number["prompt"].to_pylist()


def test_rows_without_prompt_or_response_are_dropped_and_counted(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "response": "b"},
        {"prompt": " \n", "response": "b"},
        {"prompt": "a", "response": ""},
        {"prompt": "c", "response": None},
    ]
    assert dropped_of(write_lines(tmp_path / "rows.jsonl", rows)) == {"empty_prompt": 1, "empty_response": 2}


def test_where_keeps_the_rows_with_one_of_the_values(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "response": "1", "split": "train"},
        {"prompt": "b", "response": "2", "split": "test"},
        {"prompt": "c", "response": "3"},
        {"prompt": 5, "response": "broken, but not wanted", "split": "test"},
    ]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    assert read_all(path, where={"split": "train"})["prompt"].to_pylist() == ["a"]
    assert sorted(read_all(path, where={"split": ["train", None]})["prompt"].to_pylist()) == ["a", "c"]
    assert dropped_of(path, where={"split": "train"}) == {"filtered": 3}


def test_a_conversation_is_kept_with_its_prompt_and_answers(tmp_path: Path) -> None:
    talk = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello", "weight": 1},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "See you"},
    ]
    rows = [{"chat": talk}, {"chat": talk[:2]}, {"chat": None}]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    [row] = read_all(path, messages_field="chat").to_pylist()
    assert (row["prompt"], row["response"]) == ("Be kind.\nHi", "Hello\nSee you")
    assert json.loads(row["messages"]) == [{"role": m["role"], "content": m["content"]} for m in talk]
    assert row["tools"] is None
    assert dropped_of(path, messages_field="chat") == {"no_assistant_message": 2}


def test_a_sample_tells_about_how_much_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_lines(tmp_path / "rows.jsonl", questions(2000))
    assert sample_corpus(config_of(path, where={"source": "set-0"}), 100)[0] == 667, "a small corpus is read whole"
    monkeypatch.setattr("s2l_ray.examples.cutting.SMALLEST_SHARD_BYTES", 10_000)
    count, texts = sample_corpus(config_of(path), 100)
    assert abs(count - 2000) < 100  # rows are between 78 and 92 bytes long
    assert 100 <= len(texts) <= 200
    assert all("case" in text and "answer" in text for text in texts)
    assert sample_corpus(config_of(gym_of(chain_sum={"size": 500}, gcd={"size": 90})), 20)[0] == 590
    assert sample_corpus(config_of("org/name"), 20) == (0, [])


# --- bad input ---------------------------------------------------------------------------------------------------

ROW = {"id": "a", "prompt": "p", "response": "r"}
BAD_ROWS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "a line that is not JSON": ("{not json}", {}, ["rows.jsonl line 3: not JSON", "Fix or remove the line"]),
    "a line that is no object": ("[1, 2]", {}, ["rows.jsonl line 3: a row is a JSON object, found a list"]),
    "a missing response": (
        '{"id": "b", "prompt": "p", "answer": "r"}',
        {},
        ["line 3: field 'response' is missing (fields: id, prompt, answer). Set examples.response_field=answer."],
    ),
    "a misspelt prompt": (
        '{"promt": "p", "response": "r"}',
        {},
        ["field 'prompt' is missing", "Set examples.prompt_field=promt."],
    ),
    "no field that fits": ('{"x": "p", "response": "r"}', {}, ["line 3: field 'prompt' is missing (fields: x, response)"]),
    "a number for text": (
        '{"prompt": "p", "response": 12}',
        {},
        ["line 3: field 'response' is a number, not text", "examples.response_field"],
    ),
    "a conversation for text": (
        '{"prompt": "x", "response": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}',
        {},
        ["line 3: field 'response' is a conversation", "Set examples.messages_field=response"],
    ),
    "a missing template field": (
        '{"prompt": "p", "response": "r", "question": "q"}',
        {"prompt_template": "{prompt} {questions}"},
        ["line 1: field 'questions' is missing", "examples.prompt_template"],
    ),
    "a missing id": (
        '{"prompt": "p", "response": "s"}',
        {"id_field": "id"},
        ["line 3: field 'id' is missing", "or leave it out"],
    ),
    "an id of another type": (
        '{"id": 1.5, "prompt": "p", "response": "s"}',
        {"id_field": "id"},
        ["line 3: field 'id' is a number; an id is text or a whole number", "leave examples.id_field out"],
    ),
    "an empty id": ('{"id": null, "prompt": "p", "response": "s"}', {"id_field": "id"}, ["line 3: field 'id' is empty"]),
    "an empty source": (
        '{"id": "", "prompt": "p", "response": "s"}',
        {"source_field": "id"},
        ["line 3: field 'id' is empty; a source is a name", "leave examples.source_field out"],
    ),
    "half a character": (
        '{"prompt": "p", "response": "\\ud800"}',
        {},
        ["line 3: field 'response' has half a surrogate pair"],
    ),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_named_with_its_line_and_remedy(tmp_path: Path, case: str) -> None:
    line, fields, fragments = BAD_ROWS[case]
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(ROW)}\n\n{line}\n")
    with pytest.raises(DataError) as caught:
        read_all(tmp_path / "rows.jsonl", **fields)
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_a_run_that_stopped_at_a_bad_row_goes_on_where_it_was_with_such_rows_dropped(ray_session: None, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", questions(40))
    path.write_text(path.read_text() + "{broken\n")
    with pytest.raises(DataError, match="line 41: not JSON"):
        build(tmp_path / "run", path)
    assert build(tmp_path / "run", path, on_bad_row="drop").summary["dropped"] == {"not_json": 1}


BROKEN = ["{not json}", '{"prompt": "p"}', '{"prompt": 1, "response": "r"}']


def test_bad_rows_are_dropped_and_counted_by_reason_and_source_where_the_config_says_so(
    ray_session: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_lines(tmp_path / "data/good.jsonl", questions(40))
    bad = write_lines(tmp_path / "data/bad.jsonl", questions(50)[40:])
    bad.write_text(bad.read_text() + "\n".join(BROKEN) + "\n")
    summary = build(tmp_path / "run", tmp_path / "data", on_bad_row="drop", held_out_fraction=0).summary
    assert summary["rows"] == 50
    assert summary["dropped"] == {"missing_field": 1, "not_json": 1, "wrong_type": 1}
    assert summary["dropped_by_source"] == {"bad": summary["dropped"]}
    assert f"{bad} line 11: not JSON" in summary["first_dropped"]["not_json"]
    assert f"rows dropped as not_json: 1, the first: {bad} line 11" in caplog.text
    with pytest.raises(DataError, match=r"3 rows \(5\.7%: .*more than examples\.max_dropped=0\.05 allows"):
        build(tmp_path / "other", tmp_path / "data", on_bad_row="drop", max_dropped=0.05)


def test_the_line_is_right_in_a_later_range_of_a_large_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    filler = json.dumps({"prompt": "p" * 300, "response": "r"}) + "\n"
    path.write_text(filler * 4811 + '{"prompt": "p", "answer": "r"}\n' + filler * 200)
    assert len(cut_corpus(config_of(path))) > 1
    with pytest.raises(DataError, match=r"rows\.jsonl line 4,812: field 'response' is missing \(fields: prompt, answer\)"):
        read_all(path)


@pytest.mark.parametrize(
    ("messages", "found"),
    [
        ([{"speaker": "human", "said": "x"}], "message 1: a message has a role and a content, found the keys speaker, said"),
        ([{"role": "user", "content": "x"}, {"role": "assistant"}], "message 2"),
        (["hello"], "found text"),
    ],
)
def test_a_message_without_role_and_content_is_named(tmp_path: Path, messages: list[Any], found: str) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [{"chat": messages}])
    with pytest.raises(DataError) as caught:
        read_all(path, messages_field="chat")
    assert f"{path} line 1: field 'chat'" in str(caught.value)
    assert found in str(caught.value)


BAD_FILES: dict[str, tuple[str, bytes, list[str]]] = {
    "latin-1": ("rows.jsonl", json.dumps(ROW).encode() + b"\n\xe9\n", ["rows.jsonl line 2: not UTF-8", "iconv"]),
    "a broken array": ("rows.json", b'[{"prompt": "p"},\n {"prompt": ]', ["rows.json line 2: not JSON"]),
    "an array of texts": ("rows.json", b'["p"]', ["rows.json row 1: a row is a JSON object, found text"]),
    "an object over several lines": ("rows.json", b'{\n"prompt": "p"\n}', ["rows.json row 1: field 'response' is missing"]),
    "a torn csv": ("rows.csv", b"prompt,response\na,b\nc\n", ["rows.csv line 3: 1 values for 2 columns"]),
    "a csv with a column twice": (
        "rows.csv",
        b"prompt,prompt\na,b\n",
        ["line 1: 'prompt' is the name of columns 1 and 2"],
    ),
    "a torn gzip": ("rows.jsonl.gz", gzip.compress(b'{"prompt": "p"}\n' * 99)[:-20], ["rows.jsonl.gz: not readable"]),
    "no parquet": ("rows.parquet", b"PAR1 not really", ["rows.parquet: not a parquet file", "Replace the file"]),
    "another format": ("rows.xlsx", b"PK", ["rows.xlsx: unknown file format", ".jsonl", ".parquet"]),
    "no bytes": ("rows.jsonl", b"", ["rows.jsonl: the corpus is empty"]),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_named_with_its_remedy(tmp_path: Path, case: str) -> None:
    name, data, fragments = BAD_FILES[case]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError) as caught:
        read_all(tmp_path / name)
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for place in (f"{tmp_path}/none.jsonl", f"file://{tmp_path}/none.jsonl", "data/none.jsonl", "none"):
        with pytest.raises(DataError, match=r"none.*no such file or directory.*on the Hub is written org/name"):
            corpus_identity(config_of(place))
    with pytest.raises(DataError, match=r"none\*\.jsonl: no file matches"):
        corpus_identity(config_of(f"{tmp_path}/none*.jsonl"))
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"no file of the corpus in this directory. Known suffixes: \.jsonl"):
        corpus_identity(config_of(tmp_path))
    with pytest.raises(DataError, match="no files are given"):
        corpus_identity(config_of([]))


def test_a_column_of_numbers_in_one_file_and_text_in_the_next_is_kept_as_json_text(tmp_path: Path) -> None:
    for name, value in (("a", 1), ("b", "one")):
        write_lines(tmp_path / f"{name}.jsonl", [{**ROW, "level": value}])
    config = config_of(tmp_path)
    joined = join_columns(index_of(shard, config).columns for shard in cut_corpus(config))
    assert joined.json_names == ["level"]


# --- identity ----------------------------------------------------------------------------------------------------


def test_a_corpus_is_the_same_wherever_it_lies_and_another_when_its_content_changes(tmp_path: Path) -> None:
    one, other = write_lines(tmp_path / "x/rows.jsonl", questions(5)), write_lines(tmp_path / "y/rows.jsonl", questions(5))
    assert corpus_identity(config_of(one)) == corpus_identity(config_of(other.parent))
    write_lines(other, questions(6))
    assert corpus_identity(config_of(one)) != corpus_identity(config_of(other))


def test_a_files_name_counts_only_where_it_is_the_source(tmp_path: Path) -> None:
    one, other = write_lines(tmp_path / "one.jsonl", questions(5)), write_lines(tmp_path / "other.jsonl", questions(5))
    assert corpus_identity(config_of(one)) != corpus_identity(config_of(other))
    assert corpus_identity(config_of(one, source_field="source")) == corpus_identity(config_of(other, source_field="source"))


def test_hashes_are_remembered_until_the_file_changes(tmp_path: Path) -> None:
    path, cache = write_lines(tmp_path / "rows.jsonl", questions(5)), Storage(str(tmp_path / "cache"))
    first = corpus_identity(config_of(path), cache)
    known = cache.read_json(CORPUS_HASHES)
    cache.write_json(CORPUS_HASHES, {uri: [*stamp[:2], "0" * 64] for uri, stamp in known.items()})
    assert corpus_identity(config_of(path), cache) != first, "the second time the file is not read"
    write_lines(path, questions(6))
    assert corpus_identity(config_of(path), cache) == corpus_identity(config_of(path))


def test_the_recipe_says_what_decides_and_not_where_it_lies(tmp_path: Path) -> None:
    recipe = examples_recipe(config_of(tmp_path, revision="x", where={"a": 1}), "files:1")
    assert recipe["corpus"] == "files:1"
    assert not {"dataset", "revision", "subset", "split"} & recipe.keys()
    assert examples_recipe(config_of("org/name", subset="main"), "hub:1")["subset"] == "main"
    gym = {"reasoning_gym": {"tasks": {"chain_sum": {"size": 3}}}}
    assert examples_recipe(config_of(gym, prompt_field="x"), "g") == examples_recipe(config_of(gym), "g")


# --- Hub and generated corpora -----------------------------------------------------------------------------------


def test_a_hub_dataset_at_a_commit_needs_no_network_to_be_identified(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert corpus_identity(config_of("org/name", revision=COMMIT)) == f"hub:org/name@{COMMIT}"
    assert hub_id("org/name") == "org/name"
    assert hub_id("data/train.jsonl") is None
    (tmp_path / "org/name").mkdir(parents=True)
    assert hub_id("org/name") is None, "a directory here comes first"


# The Hub is not asked in tests: this stands in for `datasets.load_dataset`, and cannot notice if its arguments change.
def test_a_hub_dataset_is_read_in_runs_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load_dataset(path: str, **options: Any) -> Any:
        asked.append((path, options))
        return datasets.Dataset.from_list(questions(50))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("s2l_ray.examples.cutting.SMALLEST_SHARD_BYTES", 1000)
    config = config_of("org/name", subset="main", revision=COMMIT, split="test")
    assert len(cut_corpus(config)) > 1
    table = pa.concat_tables([read_shard(shard, config) for shard in cut_corpus(config)])
    assert sorted(table["prompt"].to_pylist()) == sorted(row["prompt"] for row in questions(50))
    assert set(table["source"].to_pylist()) == {"org/name"}
    assert asked[0] == ("org/name", {"name": "main", "revision": COMMIT, "split": "test"})


def test_a_hub_dataset_that_cannot_be_read_says_what_to_check(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load_dataset(path: str, **options: Any) -> Any:
        raise ConnectionError(f"Couldn't reach '{path}' on the Hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"org/none: no such file .* \(Couldn't reach 'org/none' on the Hub\)\. Check the name"):
        cut_corpus(config_of("org/none", revision=COMMIT))


def gym_of(**tasks: dict[str, Any]) -> dict[str, Any]:
    return {"reasoning_gym": {"tasks": tasks, "seed": 3}}


def test_a_generated_corpus_is_the_same_however_it_is_cut() -> None:
    parameters = {"size": 20, "seed": 3}
    whole = [rows.record(i) for rows in GeneratedRows("chain_sum", parameters, 0, 20).read() for i in range(20)]
    cut = [r for start in (0, 7, 14) for r in GeneratedRows("chain_sum", parameters, start, min(start + 7, 20)).read()]
    assert [rows.record(i) for rows in cut for i in range(len(rows))] == whole
    assert whole[4]["index"] == 4
    assert json.loads(whole[4]["metadata"])["source_dataset"] == "chain_sum"


def test_a_generated_corpus_needs_no_field_names() -> None:
    table = read_all(gym_of(chain_sum={"size": 5}, gcd={"size": 5}), prompt_field="unused", id_field="unused")
    assert Counter(table["source"].to_pylist()) == {"chain_sum": 5, "gcd": 5}
    for row in table.to_pylist():
        assert (row["prompt"], row["response"]) == (row["original"]["question"], row["original"]["answer"])


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ({"chain_sums": {"size": 5}}, r"tasks\.chain_sums: no such task. Did you mean 'chain_sum'\?"),
        ({"chain_sum": {"size": 5, "min_term": 1}}, r"tasks\.chain_sum: these parameters cannot be used .*min_term"),
        ({"chain_sum": {"size": 5, "min_terms": -1}}, "min_terms must be positive"),
        ({"word_ladder": {"size": 5}}, r"tasks\.word_ladder: this task generates different examples in every process"),
    ],
)
def test_a_wrong_task_is_named(tasks: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_all(gym_of(**tasks))


# --- the whole stage ---------------------------------------------------------------------------------------------


def test_importing_the_stage_is_light() -> None:
    heavy = ("ray", "torch", "datasets", "reasoning_gym")
    code = f"import sys, s2l_ray.examples.stage as _; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_the_parts_hold_every_example_in_order_of_id(ray_session: None, tmp_path: Path) -> None:
    rows = [*questions(300), *questions(20), {"prompt": "", "response": "x", "source": "set-0"}]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    artifact = build(tmp_path / "run", path, source_field="source", held_out_fraction=0.1, rows_per_part=64)
    table = read_parts(artifact)
    assert table.column_names == ["example_id", "source", "prompt", "response", "split", "original", "row_json"]
    ids = table["example_id"].to_pylist()
    assert ids == sorted(set(ids))
    assert [row["original"] for row in sorted(table.to_pylist(), key=lambda r: int(r["response"][7:]))] == questions(300)
    assert [artifact.read_table(part).num_rows for part in artifact.parts()] == [64, 64, 64, 64, 44]

    summary = artifact.summary
    held_out = table["split"].to_pylist().count("held_out")
    assert (summary["rows"], summary["held_out"], summary["pool"]) == (300, held_out, 300 - held_out)
    assert 0 < held_out < 100
    assert summary["dropped"] == {"duplicate": 20, "empty_prompt": 1}
    assert sum(counts["held_out"] for counts in summary["sources"].values()) == held_out
    assert [sum(counts.values()) for counts in summary["sources"].values()] == [100, 100, 100]
    assert summary["rows_per_part"] == 64
    assert Artifact.read(Storage(f"{tmp_path}/run/examples")).fingerprint == artifact.fingerprint

    pool = [read_pool(artifact, part, ["example_id"]) for part in artifact.parts()]
    kept_out = [read_held_out(artifact, part, ["example_id", "source"]) for part in artifact.parts()]
    assert pool[0].column_names == ["example_id"]
    assert kept_out[0].column_names == ["example_id", "source"]
    found = [i for t in (*pool, *kept_out) for i in t["example_id"].to_pylist()]
    assert sorted(found) == ids

    wanted = [ids[70], ids[3], ids[299]]
    expected = [row["original"] for row in table.to_pylist() if row["example_id"] in wanted]
    for ids_of_either_kind in (wanted, pa.array(wanted)):
        rows = pa.concat_tables(fetch_rows(artifact, ids_of_either_kind)).to_pydict()
        assert (rows["example_id"], rows["row"]) == (sorted(wanted), expected)
        assert [json.loads(text) for text in rows["row_json"]] == expected
    assert list(fetch_rows(artifact, [])) == []
    with pytest.raises(ArtifactError, match="no example has the id 'nobody'"):
        list(fetch_rows(artifact, [ids[3], "nobody"]))


def test_only_parts_with_wanted_rows_are_read(ray_session: None, tmp_path: Path) -> None:
    artifact = build(tmp_path / "run", write_lines(tmp_path / "rows.jsonl", questions(40)), rows_per_part=10)
    first, *others = artifact.parts()
    [elsewhere] = artifact.read_table(others[0], ["example_id"])["example_id"].to_pylist()[:1]
    for part in others:  # damaged behind the footer's back
        path = tmp_path / "run/examples" / part
        path.write_bytes(b"PAR2" + path.read_bytes()[4:])
    ids = artifact.read_table(first, ["example_id"])["example_id"].to_pylist()
    assert sum(map(len, fetch_rows(artifact, ids[3:4]))) == 1
    with pytest.raises(ArtifactError, match=rf"{others[0]}: damaged"):
        list(fetch_rows(artifact, [ids[3], elsewhere]))


def test_a_shuffled_and_recut_corpus_gives_the_same_bytes(ray_session: None, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{**row, "score": i if i % 2 else i / 3} for i, row in enumerate(questions(200))]
    rows += [{**row, "note": {"b": 1, "a": "x"}} for row in questions(260)[200:]]
    rows += [{**rows[7], "score": 99}, {**rows[8], "note": None}]  # copies in prompt and response, not in all fields
    one = build(tmp_path / "one", write_lines(tmp_path / "whole/rows.jsonl", rows), source_field="source", rows_per_part=50)
    shuffled = [dict(row) for row in random.Random(1).sample(rows, len(rows))]
    write_lines(tmp_path / "cut/a.jsonl", shuffled[:90])
    (tmp_path / "cut/b.jsonl.gz").write_bytes(gzip.compress("\n".join(json.dumps(r) for r in shuffled[90:91]).encode()))
    (tmp_path / "cut/c.json").write_text(json.dumps(shuffled[91:]))
    other = build(tmp_path / "other", tmp_path / "cut", source_field="source", rows_per_part=50)
    assert one.summary == other.summary
    assert hashes_of(one) == hashes_of(other)
    assert len(one.parts()) == 6


def test_an_interrupted_build_goes_on_to_the_same_bytes(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [write_lines(tmp_path / f"data/{n}.jsonl", questions(200 * (n + 1))[200 * n :]) for n in range(3)]
    monkeypatch.setattr("s2l_ray.examples.cutting.SMALLEST_SHARD_BYTES", 8000)
    config = config_of([str(path) for path in paths], rows_per_part=50)
    whole = build_stage(context_of(draft_of(tmp_path / "whole", config), examples=config))

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Draft, "publish", interrupt)
        torn = draft_of(tmp_path / "torn", config)
        with pytest.raises(KeyboardInterrupt):
            build_stage(context_of(torn, examples=config))
    stage = tmp_path / "torn/examples"
    [work] = (tmp_path / "torn/.work/examples").iterdir()
    assert not (stage / MANIFEST).exists()
    for number in (2, 5):  # as if these had never been made
        (stage / f"part-{number:05d}.parquet").unlink()
    (work / "shard-00001.parquet").unlink()
    before = {path.name: path.stat().st_mtime_ns for path in [*stage.glob("part-*"), *work.glob("shard-*")]}
    assert len(before) == 10 + len(list(work.glob("shard-*")))

    with monkeypatch.context() as patch:
        publish, seen = Draft.publish, {}

        def look_and_publish(draft: Draft, *args: Any) -> Artifact:
            found = [*stage.glob("part-*"), *work.glob("shard-*")]
            seen.update({path.name: path.stat().st_mtime_ns for path in found})
            return publish(draft, *args)

        patch.setattr(Draft, "publish", look_and_publish)
        resumed = build_stage(context_of(draft_of(tmp_path / "torn", config), examples=config))
    assert before.items() <= seen.items(), "a finished shard or part was made again"
    assert seen.keys() - before.keys() == {"part-00002.parquet", "part-00005.parquet", "shard-00001.parquet"}
    assert hashes_of(resumed) == hashes_of(whole)
    assert not work.exists()


def test_a_file_renamed_between_interruption_and_resume_loses_no_row(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another name is another cut of the same corpus: shards of the old one must not stand in for those of the new."""
    monkeypatch.setattr("s2l_ray.examples.cutting.SMALLEST_SHARD_BYTES", 8000)
    paths = [write_lines(tmp_path / f"data/{n}.jsonl", questions(200 * (n + 1))[200 * n :]) for n in range(2)]
    config = config_of(tmp_path / "data", source_field="source")

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("s2l_ray.examples.stage.write_parts", interrupt)
        with pytest.raises(KeyboardInterrupt):
            build_stage(context_of(draft_of(tmp_path / "run", config), examples=config))
    paths[0].rename(tmp_path / "data/9.jsonl")
    made = build_stage(context_of(draft_of(tmp_path / "run", config), examples=config))
    assert made.summary["rows"] == 400
    assert made.summary["dropped"] == {}


def test_a_problem_in_a_worker_reaches_the_user_as_it_is(
    ray_session: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [*questions(3), {"prompt": "p", "answer": "r"}])
    with pytest.raises(S2LError) as caught:
        build(tmp_path / "run", path)
    assert type(caught.value) is DataError
    assert str(caught.value) == (
        f"{path} line 4: field 'response' is missing (fields: prompt, answer). Set examples.response_field=answer."
    )
    assert "Traceback" not in "".join(capfd.readouterr())
    assert not (tmp_path / "run/examples" / MANIFEST).exists()


def test_ids_that_two_rows_share_are_named(ray_session: None, tmp_path: Path) -> None:
    rows = [{**row, "id": i // 2} for i, row in enumerate(questions(4))]
    with pytest.raises(
        DataError, match=r"2 ids are shared by rows with different prompt or response: '0', '1'\. Give every row its"
    ):
        build(tmp_path / "run", write_lines(tmp_path / "rows.jsonl", rows), id_field="id")


def test_nothing_to_learn_from_is_an_error_that_says_why(ray_session: None, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", questions(3))
    with pytest.raises(DataError, match=r"empty: no row is left \(3 filtered\)\. Check examples\.where"):
        build(tmp_path / "run", path, where={"source": "none"})
    (tmp_path / "blank.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match="the corpus is empty: no row in it"):
        build(tmp_path / "blank", tmp_path / "blank.jsonl")


def test_a_corpus_of_near_copies_warns_that_nothing_is_held_out(
    ray_session: None, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("s2l_ray"), "propagate", True)  # off once a command has set up its console
    path = write_lines(tmp_path / "rows.jsonl", [{"prompt": f"{i} + {i}", "response": str(2 * i)} for i in range(30)])
    assert build(tmp_path / "run", path).summary["held_out"] == 0
    assert "no row is held out" in caplog.text


@pytest.mark.parametrize("fraction", [0, 1e-9])
def test_a_stage_without_held_out_rows_is_whole_and_warns_only_where_some_were_asked_for(
    ray_session: None, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, fraction: float
) -> None:
    monkeypatch.setattr(logging.getLogger("s2l_ray"), "propagate", True)
    caplog.set_level(logging.INFO, "s2l_ray")
    path = write_lines(tmp_path / "rows.jsonl", questions(60))
    artifact = build(tmp_path / "run", path, source_field="source", held_out_fraction=fraction, rows_per_part=20)
    summary = artifact.summary
    assert (summary["rows"], summary["pool"], summary["held_out"]) == (60, 60, 0)
    assert summary["sources"] == {f"set-{n}": {"pool": 20, "held_out": 0} for n in range(3)}
    for part in artifact.parts():
        assert read_held_out(artifact, part, ["example_id", "source"]).to_pydict() == {"example_id": [], "source": []}
        assert read_held_out(artifact, part).schema == read_pool(artifact, part).schema
    assert sum(read_pool(artifact, part).num_rows for part in artifact.parts()) == 60
    assert ("60 rows, all in the pool; dropped: none" in caplog.text) == (fraction == 0)
    assert ("no row is held out" in caplog.text) == (fraction > 0)


def test_conversations_are_stored_with_their_messages(ray_session: None, tmp_path: Path) -> None:
    rows = [
        {"chat": [{"role": "user", "content": f"Q {q['prompt']}"}, {"role": "assistant", "content": q["response"]}]}
        for q in questions(10)
    ]
    artifact = build(tmp_path / "run", write_lines(tmp_path / "rows.jsonl", rows), messages_field="chat", held_out_fraction=0)
    found = read_parts(artifact)
    answers = [json.loads(text)[1]["content"] for text in found["messages"].to_pylist()]
    assert sorted(answers) == sorted(q["response"] for q in questions(10))


@pytest.mark.skipif(not (SHARED_DATA / "gsm8k.jsonl").exists(), reason="needs ../shared/data or S2L_SHARED_DATA")
def test_gsm8k_gives_its_training_rows(ray_session: None, tmp_path: Path) -> None:
    fields = {"prompt_template": "{instruction}\n{input}", "prompt_template_if_empty": "{instruction}", "id_field": "id"}
    where = {"split": "train"}
    artifact = build(tmp_path / "run", SHARED_DATA / "gsm8k.jsonl", response_field="output", where=where, **fields)
    assert artifact.summary["rows"] == 7473
    assert artifact.summary["dropped"] == {"filtered": 1319}
    assert artifact.summary["sources"].keys() == {"gsm8k"}
    assert len(artifact.parts()) == 15
    assert artifact.read_table("part-00000.parquet")["example_id"].to_pylist()[0] == "gsm8k-000000"


def test_ray_data_is_as_loud_as_before(ray_session: None) -> None:
    import ray.data

    before = logging.getLogger("ray.data").level, ray.data.DataContext.get_current().enable_progress_bars
    with quiet_ray_data():
        assert not ray.data.DataContext.get_current().enable_progress_bars
    assert (logging.getLogger("ray.data").level, ray.data.DataContext.get_current().enable_progress_bars) == before
