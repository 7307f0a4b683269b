"""Export: rows of JSON as they were written, each trainer's form of a conversation, and nothing half or silently changed."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import typing
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from s2l_ray import cli
from s2l_ray.errors import ArtifactError, ConfigError
from s2l_ray.examples.columns import json_field, struct_from_values
from s2l_ray.selection.export import FORMATS, export_subset
from s2l_ray.selection.json_text import strict_line, with_fields
from s2l_ray.storage.artifacts import Key
from s2l_ray.storage.drafts import Draft
from s2l_ray.storage.places import Storage
from tests import test_cli
from tests.exporting import CALL, TOOLS, answer, lines, made_run, result, user
from tests.test_cli import check_refused, falling_losses, write_trajectories

s2l = test_cli.s2l  # the fixture

ROWS = {
    "a": '{"prompt": "城市", "response": "北京", "n": 3}',
    "b": '{"response": "é 🙂", "prompt":"order", "n": 3.0, "meta": {}, "tags": []}',
    "c": '{"prompt": "absent",   "response": "\\u0041", "n": null, "": "no name", "a.b": 1, "big": 9007199254740993}',
}
PAIRS = dict.fromkeys(ROWS, ("prompt", "response"))
CHATS = {
    "calls": [user("w?"), answer(None, tool_calls=[CALL]), result("5"), answer("five", reasoning_content="so")],
    "context": [user("a"), answer("b", weight=0), user("c"), answer("d"), user("e"), answer("f")],
    "system": [{"role": "system", "content": "be brief"}, user("a"), answer("b"), user("thanks")],
}
PLAIN = {"p": [user("a"), answer("b")], "q": [user("a"), answer("b"), user("c"), answer("d")]}


def export(run: Path, kind: str, output: Path, **options: object) -> list[object]:
    """The rows of an export."""
    exported = export_subset(str(run), kind, str(output), **options)  # type: ignore[arg-type]
    return lines(output / exported.data if output.is_dir() else output)


# --- rows as they were ---------------------------------------------------------------------------------------------


def test_rows_of_json_come_back_key_for_key_as_they_were_written(tmp_path):
    run = made_run(tmp_path / "run", PAIRS, texts=ROWS)
    export_subset(str(run), "jsonl", str(tmp_path / "rows.jsonl"), with_columns=False)
    assert (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines() == list(ROWS.values())
    found = export(run, "jsonl", tmp_path / "more.jsonl")
    for row, text in zip(found, ROWS.values(), strict=True):
        own = json.loads(text)
        assert list(row) == [*own, "example_id", "cluster_id", "weight"]
        assert json.dumps({key: row[key] for key in own}) == json.dumps(own)
    assert [row["example_id"] for row in found] == list(ROWS)
    assert [row["cluster_id"] for row in found] == pq.read_table(run / "selection/selected.parquet")["cluster_id"].to_pylist()


def test_columns_of_ours_are_underscored_where_the_corpus_has_them_and_not_doubled_where_it_has_the_same(tmp_path):
    texts = {name: f'{{"example_id": "{name}", "weight": 0.5}}' for name in ROWS}
    run = made_run(tmp_path / "run", PAIRS, texts=texts, original={"example_id": list(ROWS), "weight": [0.5] * 3})
    found = export(run, "jsonl", tmp_path / "rows.jsonl")
    assert [list(row) for row in found] == [["example_id", "weight", "cluster_id", "_weight"]] * 3
    assert [row["weight"] for row in found] == [0.5] * 3
    export_subset(str(run), "parquet", str(tmp_path / "rows.parquet"), with_columns=False)
    assert pq.read_table(tmp_path / "rows.parquet").column_names == ["example_id", "weight"]


def test_a_row_without_any_key_gets_ours_alone(tmp_path):
    run = made_run(tmp_path / "run", {"a": ("p", "r")}, texts={"a": "{ }"}, num_parts=1)
    assert list(export(run, "jsonl", tmp_path / "rows.jsonl")[0]) == ["example_id", "cluster_id", "weight"]


def test_a_damaged_file_of_rows_is_refused_and_nothing_written(tmp_path):
    run = made_run(tmp_path / "run", PAIRS, texts=ROWS)
    file = run / "selection/selected.jsonl"
    file.write_bytes(file.read_bytes().replace(b"3.0", b"4.0"))
    with pytest.raises(ArtifactError, match=r"selection/selected\.jsonl: damaged"):
        export_subset(str(run), "jsonl", str(tmp_path / "rows.jsonl"))
    assert not (tmp_path / "rows.jsonl").exists()


def test_the_directory_of_a_selection_is_a_dataset_as_it_stands(tmp_path):
    run = made_run(tmp_path / "run", PAIRS, texts=ROWS, more_budgets=[2])
    found = datasets.load_dataset(str(run / "selection"), cache_dir=str(tmp_path / "cache"))
    assert found["train"].to_list() == pq.read_table(run / "selection/selected.parquet").to_pylist()
    further = datasets.load_dataset(str(run / "selection"), "selected-2", cache_dir=str(tmp_path / "cache"))
    assert len(further["train"]) == 2
    card = (run / "selection/README.md").read_text()
    assert "3 examples of 3" in card
    assert "files with the hash `0123`" in card
    assert not {"北京", "absent"} & set(card.split()), "no text of the corpus"


def test_two_runs_are_two_datasets_also_in_one_cache(tmp_path):
    pairs = {"a": ("what is it", "that"), "b": ("and this", "this")}
    runs = [made_run(tmp_path / f"run-{name}", {name: pair}, num_parts=1) for name, pair in pairs.items()]
    for run, (name, pair) in zip(runs, pairs.items(), strict=True):
        found = datasets.load_dataset(str(run / "selection"), cache_dir=str(tmp_path / "cache"))["train"]
        assert found["example_id"][:] == [name]
        export_subset(str(run), "trl", str(run / "for-trl"))
        rows = datasets.load_dataset(str(run / "for-trl"), cache_dir=str(tmp_path / "cache"))["train"]
        assert [(row["prompt"], row["completion"]) for row in rows] == [pair]


@pytest.mark.parametrize("dataset", ["mine.jsonl", ".", "*.jsonl", ["mine.jsonl"]])
def test_a_file_of_the_corpus_is_not_replaced_and_another_is(tmp_path, monkeypatch, dataset):
    monkeypatch.chdir(tmp_path)
    run = made_run(tmp_path / "run", PAIRS, texts=ROWS)
    (run / "run.json").write_text(json.dumps({"schema": "s2l_ray/1", "examples": {"dataset": dataset}}))
    (tmp_path / "mine.jsonl").write_text('{"prompt": "p", "response": "r"}\n')
    for kind in ("jsonl", "parquet", "openai", "trl"):
        with pytest.raises(ConfigError, match=r"mine\.jsonl: is a file of the corpus that the run chose from"):
            export_subset(str(run), kind, "mine.jsonl")
    assert (tmp_path / "mine.jsonl").read_text() == '{"prompt": "p", "response": "r"}\n'
    if dataset == "mine.jsonl":
        for _ in range(2):
            export_subset(str(run), "jsonl", "other.jsonl", with_columns=False)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(['NaN "Infinity"', "\\", "-Infinity\n"]),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(st.dictionaries(st.text(), json_values), st.sampled_from([None, 2]), st.booleans())
def test_any_row_becomes_one_strict_line_of_the_same_values(row, indent, is_ascii):
    def without_nan(value):
        if isinstance(value, float) and not math.isfinite(value):
            return None
        if isinstance(value, dict):
            return {key: without_nan(inner) for key, inner in value.items()}
        return [without_nan(inner) for inner in value] if isinstance(value, list) else value

    line, was_strict = strict_line(json.dumps(row, indent=indent, ensure_ascii=is_ascii))
    assert "\n" not in line
    assert "\r" not in line
    found = json.loads(line, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))
    assert json.dumps(found) == json.dumps(without_nan(row))
    assert was_strict == (json.dumps(without_nan(row)) == json.dumps(row))
    more = json.loads(with_fields(line, {"weight": 1.5}))
    assert list(more)[-1] == "weight" or "weight" in row


# --- the forms of trainers -----------------------------------------------------------------------------------------


def test_pairs_of_texts_stay_texts_without_a_template(tmp_path):
    run = made_run(tmp_path / "run", {"a": ("p\n", " r"), "b": ("", "s")})
    assert export(run, "trl", tmp_path / "trl") == [{"prompt": "p\n", "completion": " r"}, {"prompt": "", "completion": "s"}]
    pairs = [{"prompt": "p\n", "response": " r"}, {"prompt": "", "response": "s"}]
    assert export(run, "axolotl", tmp_path / "axolotl") == export(run, "llama-factory", tmp_path / "lf") == pairs
    chat = export(run, "openai", tmp_path / "o.jsonl")[0]
    assert chat == {"messages": [user("p\n"), answer(" r", weight=1)]}


def test_conversations_with_nothing_left_out_stay_whole_for_trl(tmp_path):
    run = made_run(tmp_path / "run", {"a": CHATS["calls"], "b": PLAIN["q"]}, tools={"a": TOOLS})
    found = export(run, "trl", tmp_path / "out")
    assert found == [{"messages": CHATS["calls"], "tools": TOOLS}, {"messages": PLAIN["q"], "tools": None}]
    config = yaml.safe_load((tmp_path / "out/trl.yaml").read_text())
    assert config == {"dataset_name": str(tmp_path / "out"), "assistant_only_loss": True}


def test_turns_that_are_context_are_never_learned_in_any_form(tmp_path, caplog):
    chat = CHATS["context"]
    run = made_run(tmp_path / "run", {"a": chat, "b": PLAIN["p"]})
    bare = [{key: value for key, value in message.items() if key != "weight"} for message in chat]
    rows = export(run, "trl", tmp_path / "trl")
    assert rows[:2] == [{"prompt": bare[:3], "completion": bare[3:4]}, {"prompt": bare[:5], "completion": bare[5:]}]
    assert yaml.safe_load((tmp_path / "trl/trl.yaml").read_text())["completion_only_loss"] is True
    assert "1 examples: conversations became a row for each learned turn" in caplog.text

    row = export(run, "axolotl", tmp_path / "axolotl")[0]
    assert [message["train"] for message in row["messages"]] == [False, False, False, True, False, True]
    row = export(run, "openai", tmp_path / "o.jsonl")[0]
    assert [message.get("weight") for message in row["messages"]] == [None, 0, None, 1, None, 1]
    rows = export(run, "llama-factory", tmp_path / "lf")
    assert [[turn["value"] for turn in row["conversations"]] for row in rows] == [list("abcd"), list("abcdef"), list("ab")]
    assert yaml.safe_load((tmp_path / "lf/llama-factory.yaml").read_text())["mask_history"] is True


def test_tool_calls_and_reasoning_take_each_trainers_form(tmp_path):
    talk = [*CHATS["calls"][:2], result("5"), result("6"), answer("five")]
    run = made_run(tmp_path / "run", {"a": talk}, tools={"a": TOOLS}, num_parts=1)
    found = export(run, "llama-factory", tmp_path / "lf")[0]
    assert [turn["from"] for turn in found["conversations"]] == ["human", "function_call", "observation", "gpt"]
    assert json.loads(found["conversations"][1]["value"]) == [{"name": "weather", "arguments": {"city": "Köln"}}]
    assert found["conversations"][2]["value"] == "5\n</tool_response>\n<tool_response>\n6"
    assert json.loads(found["tools"]) == TOOLS
    found = export(run, "axolotl", tmp_path / "axolotl")[0]
    assert json.loads(found["messages"])[1]["tool_calls"] == [CALL]
    assert json.loads(found["tools"]) == TOOLS


def test_openais_form_has_arguments_as_text_and_an_id_for_every_call(tmp_path, caplog):
    talk = [*CHATS["calls"][:3], answer("five")]
    run = made_run(tmp_path / "run", {"a": talk}, tools={"a": TOOLS}, num_parts=1)
    row = export(run, "openai", tmp_path / "o.jsonl")[0]
    call = row["messages"][1]["tool_calls"][0]
    assert call == {"id": "call_0", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Köln"}'}}
    assert row["messages"][2] == {"role": "tool", "tool_call_id": "call_0", "content": "5"}
    assert row["messages"][1]["content"] is None
    assert row["tools"] == TOOLS
    assert "tool calls without an id got one" in caplog.text


def test_what_a_format_cannot_say_is_left_out_named_and_counted(tmp_path, caplog):
    odd = {
        "fine": PLAIN["p"],
        "reasoned": [user("a"), answer("b", reasoning_content="c")],
        "twice": [user("a"), user("b"), answer("c")],
        "text": [user("a"), answer(None, tool_calls=[{"function": {"name": "f", "arguments": "not an object"}}]), result("r")],
    }
    run = made_run(tmp_path / "run", odd)
    assert len(export(run, "openai", tmp_path / "o.jsonl")) == 3
    assert "1 examples have no form in --format openai and were left out: 1 for reasoning beside an answer ('reasoned')" in (
        caplog.text
    )
    assert len(export(run, "llama-factory", tmp_path / "lf")) == 3
    assert "1 for turns that do not alternate between user or tool and assistant ('twice')" in caplog.text
    assert len(export(run, "axolotl", tmp_path / "axolotl")) == 3
    assert "1 for a tool call whose arguments are no JSON object ('text')" in caplog.text
    assert len(export(run, "trl", tmp_path / "trl")) == 4

    run = made_run(tmp_path / "other", {"reasoned": odd["reasoned"]}, num_parts=1)
    with pytest.raises(ConfigError, match=r"--format openai: has no form for any of the examples \(1 for reasoning"):
        export(run, "openai", tmp_path / "none.jsonl")
    assert not (tmp_path / "none.jsonl").exists()


def test_a_pair_among_conversations_becomes_one_and_is_counted(tmp_path, caplog):
    run = made_run(tmp_path / "run", {"a": ("p", "r"), "b": PLAIN["p"]})
    assert export(run, "trl", tmp_path / "trl")[0] == {"messages": [user("p"), answer("r")]}
    assert "1 examples: pairs of texts became a user's and an assistant's message" in caplog.text


# --- files and folders ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "beside"),
    [
        ("trl", {"README.md", "trl.yaml"}),
        ("axolotl", {"axolotl.yaml"}),
        ("llama-factory", {"dataset_info.json", "llama-factory.yaml"}),
    ],
)
def test_a_trainers_small_files_lie_beside_the_data_and_replace_only_our_own(tmp_path, kind, beside):
    run = made_run(tmp_path / "run", PLAIN)
    for output, data in ((tmp_path / "out", "data.jsonl"), (tmp_path / "named/rows.jsonl", "rows.jsonl")):
        (tmp_path / "named").mkdir(exist_ok=True)
        for _ in range(2):  # again over our own
            export_subset(str(run), kind, str(output))
        folder = output if output.is_dir() else output.parent
        assert {file.name for file in folder.iterdir()} == beside | {data}
        for name in beside:
            before = (folder / name).read_bytes()
            mine = json.dumps({"mine": {}, **json.loads(before)}) if name.endswith(".json") else "mine"
            (folder / name).write_text(mine)
            data_before = (folder / data).read_bytes()
            with pytest.raises(ConfigError, match=rf"{name} is there and was not written by s2l_ray"):
                export_subset(str(run), kind, str(output))
            assert (folder / name).read_text() == mine
            assert (folder / data).read_bytes() == data_before
            (folder / name).write_bytes(before)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/data.jsonl").write_text("mine")
    with pytest.raises(ConfigError, match=r"data\.jsonl is there and was not written"):
        export_subset(str(run), kind, str(tmp_path / "theirs"))
    assert [file.name for file in (tmp_path / "theirs").iterdir()] == ["data.jsonl"]


def test_a_trainers_files_appear_together_or_not_at_all(tmp_path):
    run = made_run(tmp_path / "run", PLAIN)
    part = run / "examples/part-00001.parquet"
    part.write_bytes(part.read_bytes()[:-9] + b"damaged!!")
    with pytest.raises(ArtifactError, match=r"part-00001\.parquet: damaged"):
        export_subset(str(run), "trl", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("kind", ["trl", "llama-factory", "axolotl"])
def test_a_trainers_files_go_neither_into_a_run_nor_over_a_file_nor_into_nothing(tmp_path, kind):
    run = made_run(tmp_path / "run", PLAIN)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="would replace what a run wrote"):
        export_subset(str(run), kind, str(run / "selection"))
    with pytest.raises(ConfigError, match=r"is a file\. Give a directory"):
        export_subset(str(run), kind, str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="there is no directory"):
        export_subset(str(run), kind, str(tmp_path / "none/out"))
    with pytest.raises(ConfigError, match=r"--with-columns: --format .* has no place for them"):
        export_subset(str(run), kind, str(tmp_path / "out"), with_columns=True)
    assert not (tmp_path / "out").exists()


def test_examples_of_another_run_are_refused(tmp_path):
    run = made_run(tmp_path / "run", PLAIN)
    other = made_run(tmp_path / "other", PLAIN, corpus="files:4567")
    (run / "examples").rename(tmp_path / "old")
    (other / "examples").rename(run / "examples")
    with pytest.raises(ArtifactError, match="not the examples that"):
        export_subset(str(run), "trl", str(tmp_path / "out"))


def test_the_command_offers_every_format_and_the_python_call_names_them(tmp_path):
    offered, _none = typing.get_args(typing.get_type_hints(cli.export)["format_"])
    assert typing.get_args(offered) == FORMATS
    with pytest.raises(ConfigError, match="--format csv: no such format"):
        export_subset(str(tmp_path), "csv", str(tmp_path / "a.csv"))


def test_the_command_prints_what_it_wrote(tmp_path, s2l):
    run = made_run(tmp_path / "run", {"a": CHATS["context"], "b": PLAIN["p"]})
    done = s2l("export", run, "--format", "trl", "--output", tmp_path / "out")
    assert (done.code, done.out) == (0, f"{tmp_path / 'out'}: 2 examples in 3 rows, with README.md, trl.yaml\n")
    done = s2l("export", run, "--format", "jsonl", "--without-columns", "--output", tmp_path / "a.jsonl")
    assert (done.code, done.out) == (0, f"{tmp_path / 'a.jsonl'}: 2 examples\n")
    assert lines(tmp_path / "a.jsonl") == [{"key": "a"}, {"key": "b"}]
    check_refused(s2l("export", run, "--output", tmp_path / "b.jsonl"), "give --format and --output, or --push-to-hub")


# --- what `s2l select` chose ---------------------------------------------------------------------------------------


@pytest.fixture
def selected(s2l, tmp_path):
    """The output of `s2l select`."""
    path = write_trajectories(tmp_path / "t.parquet", falling_losses(30), note=[f"n{i}" for i in range(30)])
    assert s2l("select", path, "--budget", 6, "--num-clusters", 3, "--output", tmp_path / "out").code == 0
    return tmp_path / "out"


def test_conversations_in_columns_of_anybodys_trajectories_are_exported_too(s2l, selected, tmp_path):
    refused = s2l("export", selected, "--format", "trl", "--output", tmp_path / "trl")
    check_refused(
        refused, r"selected\.parquet: has no column messages, and not prompt and response, .*columns: example_id, note"
    )
    talks = [json.dumps(CHATS["context"]) if number % 2 else json.dumps(PLAIN["p"]) for number in range(30)]
    structs = [[{"role": one["role"], "content": one["content"]} for one in PLAIN["q"]]] * 30
    for messages, expected in ((talks, None), (structs, {"messages": PLAIN["q"]})):
        path = write_trajectories(tmp_path / "m.parquet", falling_losses(30), messages=messages)
        out = tmp_path / ("text" if expected is None else "structs")
        assert s2l("select", path, "--budget", 30, "--num-clusters", 3, "--output", out).code == 0
        rows = export(out, "trl", tmp_path / f"{out.name}-trl")
        assert rows == [expected] * 30 if expected else len(rows) == 45
    path = write_trajectories(tmp_path / "m.parquet", falling_losses(30), messages=["not JSON"] * 30)
    assert s2l("select", path, "--budget", 30, "--num-clusters", 3, "--output", tmp_path / "bad").code == 0
    refused = s2l("export", tmp_path / "bad", "--format", "openai", "--output", tmp_path / "bad.jsonl")
    check_refused(refused, r"example id-0: messages: is text, not a list of messages\..* Or use --format jsonl")


def test_the_subset_is_exported_with_its_columns(s2l, selected, tmp_path):
    expected = pq.read_table(selected / "selection" / "selected.parquet").to_pylist()
    result = s2l("export", selected, "--format", "jsonl", "--output", tmp_path / "subset.jsonl")
    assert (result.code, result.out) == (0, f"{tmp_path / 'subset.jsonl'}: 6 examples\n")
    assert lines(tmp_path / "subset.jsonl") == expected
    assert s2l("export", selected, "--format", "parquet", "--output", tmp_path / "subset.parquet").code == 0
    assert pq.read_table(tmp_path / "subset.parquet").to_pylist() == expected


def test_bytes_are_exported_as_parquet_and_never_as_the_text_that_stands_for_them(s2l, tmp_path):
    table = pa.table({"example_id": ["a", "b"], "losses": [[2.0, 1.0], [3.0, 1.5]], "image": [b"\x89PNG", b"\xff"]})
    pq.write_table(table, tmp_path / "t.parquet")
    assert s2l("select", tmp_path / "t.parquet", "--budget", 2, "--num-clusters", 1, "--output", tmp_path / "out").code == 0
    result = s2l("export", tmp_path / "out", "--format", "jsonl", "--output", tmp_path / "subset.jsonl")
    assert (result.code, (tmp_path / "subset.jsonl").exists()) == (2, False)
    assert "Use --format parquet" in result.err
    assert s2l("export", tmp_path / "out", "--format", "parquet", "--output", tmp_path / "subset.parquet").code == 0
    assert set(pq.read_table(tmp_path / "subset.parquet")["image"].to_pylist()) == {b"\x89PNG", b"\xff"}


def test_each_of_several_budgets_is_exported_with_its_own_number_of_rows(s2l, tmp_path):
    path = write_trajectories(tmp_path / "t.parquet", falling_losses(30))
    options = ["--budget", 6, "--budget", 20, "--num-clusters", 3, "--output", tmp_path / "out"]
    assert s2l("select", path, *options).code == 0
    for subset, count in (("selected", 6), ("selected-20", 20)):
        for kind in ("jsonl", "parquet"):
            file = tmp_path / f"{subset}.{kind}"
            result = s2l("export", tmp_path / "out", "--format", kind, "--output", file, "--subset", subset)
            assert (result.code, result.out) == (0, f"{file}: {count} examples\n")
            written = len(file.read_text().splitlines()) if kind == "jsonl" else pq.read_table(file).num_rows
            assert written == count


def test_an_export_to_json_lines_is_strict_json(s2l, tmp_path):
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    scores = [[float("nan"), 1.5], [float("inf")], [0.5], *[[1.0]] * 27]
    path = write_trajectories(tmp_path / "t.parquet", falling_losses(30), scores=scores)
    assert s2l("select", path, "--budget", 30, "--num-clusters", 3, "--output", tmp_path / "out").code == 0
    result = s2l("export", tmp_path / "out", "--format", "jsonl", "--output", tmp_path / "a.jsonl")
    assert "2 rows have numbers that are NaN or infinite" in result.err
    rows = [json.loads(line, parse_constant=refuse) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    found = {row["example_id"]: row["scores"] for row in rows}
    assert [found[f"id-{number}"] for number in range(3)] == [[None, 1.5], [None], [0.5]]


def test_an_export_needs_as_much_memory_for_a_large_subset_as_for_a_small_one(tmp_path):
    peaks = {}
    for num_blocks in (3, 60):
        draft = Draft.open(Storage(str(tmp_path / str(num_blocks))), Key("selection", 1, {}, {}))
        rng = np.random.default_rng(0)
        blocks = (pa.table({"text": [rng.bytes(4_000).hex() for _ in range(500)]}) for _ in range(num_blocks))
        draft.write_tables("selected.parquet", blocks)  # 4 MB of text in each row group
        draft.publish({"rows": 500 * num_blocks})
        code = (
            "import resource, sys; from s2l_ray.selection.export import export_subset\n"
            "for kind in ('jsonl', 'parquet'): export_subset(sys.argv[1], kind, f'{sys.argv[1]}/out.{kind}')\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        )
        command = [sys.executable, "-c", code, str(tmp_path / str(num_blocks))]
        peaks[num_blocks] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) / 1024
    assert (tmp_path / "60" / "out.jsonl").stat().st_size > 200 * 2**20
    assert peaks[60] < peaks[3] + 40, f"MiB: {peaks}"


def test_an_export_that_cannot_be_made_is_refused(s2l, selected, tmp_path):
    options = ["--format", "jsonl", "--output"]
    check_refused(s2l("export", selected, *options, tmp_path / "a.jsonl", "--subset", "random"), r"evaluation\.random_control")
    check_refused(s2l("export", selected, *options, tmp_path / "t.parquet" / "a.jsonl"), r"t\.parquet.*Give another directory")
    check_refused(s2l("export", selected, *options, tmp_path), r"--output .*: is a directory\. Give the file to write")
    check_refused(s2l("export", selected, *options, f"{tmp_path}/new/"), r"new/: is a directory\. Give the file to write")
    check_refused(s2l("export", selected, *options, tmp_path / "none" / "a.jsonl"), r"there is no directory .*none\. Make it")
    assert not (tmp_path / "none").exists()
    inside = selected / "selection" / "selected.parquet"
    check_refused(
        s2l("export", selected, *options, inside), r"would replace what a run wrote in .*selection\. Give another place"
    )
    data = selected / "selection" / "selected.parquet"
    data.write_bytes(data.read_bytes()[:-1] + b"?")
    check_refused(s2l("export", selected, *options, tmp_path / "a.jsonl"), r"selection/selected\.parquet: damaged")
    assert not (tmp_path / "a.jsonl").exists()


def test_values_that_parquet_holds_as_json_text_are_values_again(tmp_path):
    column = struct_from_values([{"note": value} for value in (3, "three", {"x": [None]})], pa.struct([json_field("note")]))
    run = made_run(tmp_path / "run", PAIRS, original=column)
    assert [row["note"] for row in export(run, "jsonl", tmp_path / "a.jsonl")] == [3, "three", {"x": [None]}]
