"""`s2l init`: what it finds in a corpus, what it recommends, and that the config which it writes is one that runs."""

from __future__ import annotations

import gzip
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import jsonschema
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from s2l_ray.config import TrainedTokenizer, load_config
from s2l_ray.config.schema import config_schema
from s2l_ray.errors import ConfigError, DataError, S2LError
from s2l_ray.examples import formats
from s2l_ray.init import sampling
from s2l_ray.init.advice import batch_for
from s2l_ray.init.figures import NEXT_ROW
from s2l_ray.init.layout import OPEN, found_layout
from s2l_ray.init.proxies import choose_proxy
from s2l_ray.init.screen import shown_example
from s2l_ray.init.start import Start, name_of, start
from s2l_ray.init.target import TargetModel, parameters_by_name
from s2l_ray.plan.plan import make_plan
from s2l_ray.training.models import scratch_config
from s2l_ray.training.tokenizers import tokenizer_of_texts

from .test_terminal import Terminal

USER, ANSWER = {"role": "user", "content": "how are you"}, {"role": "assistant", "content": "very well"}


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a Hub: what is asked of it is not answered."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def write(rows: list[Any], name: str = "corpus.jsonl") -> str:
    Path(name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return name


def begin(rows: list[Any] | str, target: str | None = None) -> Start:
    """`s2l init` on rows; its config is checked as a run checks it, and against the schema."""
    found, path = start([rows if isinstance(rows, str) else write(rows)], target, None)
    assert path.read_text(encoding="utf-8") == found.text
    assert len(found.text.splitlines()) <= 60
    values = yaml.safe_load(found.text)
    jsonschema.validate(values, config_schema())
    load_config(path)
    return found


def examples_of(found: Start) -> dict[str, Any]:
    """The config's section `examples`."""
    return dict(yaml.safe_load(found.text)["examples"])


def line(found: Start, label: str) -> str:
    return dict(found.summary)[label]


def pairs(count: int, **more: Any) -> list[dict[str, Any]]:
    return [{"prompt": f"question {number}?", "response": f"answer {number}", **more} for number in range(count)]


# --- which field is what -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "fields"),
    [
        ({"prompt": "a", "response": "b"}, {"prompt_field": "prompt", "response_field": "response"}),
        ({"Question": "a", "Answer": "b", "n": 3}, {"prompt_field": "Question", "response_field": "Answer"}),
        ({"input": "a", "output": ["b", "c"]}, {"prompt_field": "input", "response_field": "output"}),
        (
            {"instruction": "a", "input": "", "output": "b", "text": "a b"},
            {
                "prompt_template": "{instruction}\n\n{input}\n\n",
                "prompt_template_if_empty": "{instruction}\n\n",
                "response_field": "output",
            },
        ),
        (
            {"system_prompt": "s", "question": "a", "response": "b"},
            {"system_field": "system_prompt", "prompt_field": "question"},
        ),
        ({"prompt": "a", "response": "b", "history": [["c", "d"]]}, {"history_field": "history"}),
        ({"messages": [USER, ANSWER], "prompt": "a"}, {"messages_field": "messages"}),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            {"messages_field": "conversations"},
        ),
        ({"talk": json.dumps([USER, ANSWER])}, {"messages_field": "talk"}),
        ({"data": {"messages": [USER, ANSWER]}}, {"messages_field": "data"}),
        ({"prompt": [USER], "completion": [ANSWER]}, {"prompt_field": "prompt", "response_field": "completion"}),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt_field": "prompt", "response_field": "chosen"}),
        ({"chosen": [USER, ANSWER], "rejected": [USER, ANSWER]}, {"messages_field": "chosen"}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_the_usual_layouts_are_found_by_what_stands_in_the_fields(row, fields):
    found = found_layout([row])
    assert found.is_known
    assert found.config_values().items() >= fields.items()


@pytest.mark.parametrize(
    ("row", "key"),
    [
        ({"text_a": "a", "text_b": "b"}, "prompt_field"),
        ({"prompt": "a", "question": "b", "response": "c"}, "prompt_field"),
        ({"question": "a", "answer": "b", "solution": "b, because of this and that"}, "response_field"),
        ({"one": [USER, ANSWER], "two": [USER, ANSWER]}, "messages_field"),
    ],
    ids=["no usual name", "two prompts", "two responses", "two conversations"],
)
def test_what_is_not_sure_is_left_open_and_no_run_starts_from_it(row, key):
    found = begin([row] * 3)
    assert examples_of(found)[key] == OPEN
    assert f"examples.{key}" in found.questions
    assert re.search(rf"^  {key}: CHOOSE # CHOOSE: ", found.text, re.MULTILINE)
    with pytest.raises(DataError, match=rf"corpus.jsonl line 1.*field 'CHOOSE' is missing \(fields: {next(iter(row))}"):
        make_plan(load_config("corpus.yaml"))


def test_what_could_be_meant_otherwise_is_pointed_out():
    found = begin([{"prompt": "a", "response": "a long answer", "answer": "short"}] * 4)
    assert examples_of(found)["response_field"] == "response"
    assert "answer, which could be meant, too" in found.questions["examples.response_field"].reason


def test_source_id_and_split_are_found_in_whole_columns():
    rows = [
        {**row, "id": f"r{number}", "source": "ab"[number % 2], "split": "train" if number else "test"}
        for number, row in enumerate(pairs(20))
    ]
    found = begin(rows)
    assert examples_of(found).items() >= {"source_field": "source", "id_field": "id", "where": {"split": "train"}}.items()
    assert "1 rows of other splits stay out" in found.questions["examples.where"].reason
    assert "1 filtered" in line(found, "dropped")


def test_an_id_that_occurs_twice_and_a_source_without_a_name_are_not_taken():
    found = begin([{**row, "id": 7, "source": None} for row in pairs(5)])
    assert not examples_of(found).keys() & {"id_field", "source_field"}
    assert "`id` is not unique" in found.text


def test_a_column_that_may_be_the_source_is_only_a_remark():
    found = begin([{**row, "category": "xy"[number % 2]} for number, row in enumerate(pairs(20))])
    assert "source_field" not in examples_of(found)
    assert "  # CHOOSE: source_field: category - " in found.text


# --- what is counted -----------------------------------------------------------------------------------------------


def test_rows_copies_and_rows_that_are_none_are_counted():
    found = begin([*pairs(30), *pairs(3), {"prompt": "a", "response": ""}, {"prompt": "a", "response": 5.5}])
    assert line(found, "corpus") == "35 rows, all of them read"
    assert line(found, "duplicates").startswith("3 exact copies")
    assert "1 empty_response" in line(found, "dropped")
    assert "corpus.jsonl line 35: field 'response' is a number" in line(found, "dropped")
    assert "1 of 35 rows cannot be used" in found.questions["examples.on_bad_row"].reason
    with pytest.raises(DataError, match="line 35"):
        make_plan(load_config("corpus.yaml"))


def test_learned_turns_context_calls_and_tools_are_counted():
    call = {"function": {"name": "look", "arguments": "{}"}}
    chat = [USER, ANSWER | {"weight": 0}, USER, {"role": "assistant", "content": None, "tool_calls": [call]}]
    tools = [{"type": "function", "function": {"name": "look"}}]
    found = begin(
        [{"messages": [*chat, {"role": "tool", "content": "3"}, ANSWER], "tools": tools}, {"messages": [USER, ANSWER]}]
    )
    assert line(found, "learned") == (
        "answers in 2 conversations: 3; marked as context, not learned: 1; calls of tools: 1; conversations with tools: 1; "
        "messages: 4 assistant, 3 user, 1 tool"
    )


def test_of_a_large_corpus_pieces_are_read_and_its_lines_are_counted(monkeypatch):
    monkeypatch.setattr(sampling, "MOST_BYTES", 2**20)
    name = write([{"prompt": f"{number:07d}", "response": "r" * 90} for number in range(60_000)])
    found = begin(name)
    read = re.fullmatch(r"60,000 rows, ([\d,]+) of them read", line(found, "corpus"))
    assert read is not None
    assert int(read[1].replace(",", "")) < 20_000
    assert "examples that were read" in line(found, "duplicates")


def test_a_corpus_that_cannot_be_counted_cheaply_is_estimated_and_said_so(monkeypatch):
    monkeypatch.setattr(sampling, "MOST_BYTES", 2**20)
    monkeypatch.setattr(sampling, "MOST_COUNTED_BYTES", 2**20)
    found = begin(write([{"prompt": f"{number:07d}", "response": "r" * 90} for number in range(60_000)]))
    number = re.match(r"about ([\d,]+) rows \(estimated by size\), ", line(found, "corpus"))
    assert number is not None
    assert int(number[1].replace(",", "")) == pytest.approx(60_000, rel=0.01)


def test_of_a_compressed_file_that_is_not_read_to_its_end_no_number_is_made_up(monkeypatch):
    monkeypatch.setattr(sampling, "MOST_ROWS", 1_000)
    monkeypatch.setattr(formats, "BLOCK_BYTES", 2**16)
    with gzip.open("corpus.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in pairs(20_000))
    assert re.match(r"more than [1-9],\d{3} rows", line(begin("corpus.jsonl.gz"), "corpus"))


def test_a_large_parquet_corpus_is_counted_by_its_footers(monkeypatch):
    monkeypatch.setattr(sampling, "MOST_BYTES", 2**20)
    table = pa.table({"prompt": [f"{number:07d}" for number in range(40_000)], "response": ["r" * 90] * 40_000})
    pq.write_table(table, "corpus.parquet", row_group_size=5_000, use_dictionary=False)
    assert line(begin("corpus.parquet"), "corpus").startswith("40,000 rows, 1")


def test_tokens_are_those_of_a_tokenizer_as_the_run_trains_it_and_rows_that_are_too_long_are_counted():
    rows = [{"prompt": "p", "response": " ".join(["word"] * (9000 if number == 0 else 3))} for number in range(100)]
    found = begin(rows)
    assert "trained on them" in line(found, "tokens")
    assert found.advice.max_tokens == 64
    assert line(found, "too long").startswith("1 examples have more than 64 tokens")


# --- targets and proxies -------------------------------------------------------------------------------------------


@pytest.fixture
def local_target(tmp_path: Path) -> Path:
    """A folder with a tiny model's shape and tokenizer, whose chat template marks turns in its own way."""
    folder = tmp_path / "TinyChat-3M"
    tokenizer = tokenizer_of_texts(TrainedTokenizer(vocab_size=300), iter([["how are you", "very well"]]))
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    shape = {"architecture": "gpt_neox", "layers": 24, "hidden": 2048, "heads": 16, "max_positions": 32}
    from s2l_ray.config import Scratch

    scratch_config(Scratch(**shape), len(tokenizer)).save_pretrained(folder)
    return folder


def test_with_a_target_here_the_tokens_are_the_target_s_and_its_template_decides_what_is_learned(local_target):
    found = begin([{"messages": [USER, ANSWER]}] * 4, str(local_target))
    assert "counted with the tokenizer of" in line(found, "tokens")
    assert ("very well</>", True) in found.shown[0]
    config = load_config("corpus.yaml")
    assert config.proxy.max_tokens == config.target.max_tokens == 32  # its positions
    assert config.target.model == config.proxy.tokenizer == str(local_target)


def test_a_template_that_rewrites_earlier_turns_is_shown_turn_by_turn(local_target):
    template = "{% for m in messages %}<{{ m.role }}>{% if loop.last %}!{% endif %}{{ m.content }}</>{% endfor %}"
    settings = json.loads((local_target / "tokenizer_config.json").read_text())
    (local_target / "chat_template.jinja").unlink(missing_ok=True)
    (local_target / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
    found = begin([{"messages": [USER, ANSWER, USER, ANSWER]}] * 3, str(local_target))
    assert "3 split_conversations" in line(found, "template")
    assert [text.lstrip("!") for text, is_learned in found.shown[0] if is_learned] == ["very well</>"] * 2
    assert (NEXT_ROW, False) in found.shown[0]


def test_no_pretrained_proxy_is_named_that_cannot_be_had_from_here(local_target):
    config = yaml.safe_load(begin(pairs(20), str(local_target)).text)
    assert config["proxy"]["model"].keys() == {"scratch"}
    renamed = local_target.rename(local_target.with_name("SmolLM2-1.7B"))
    found, _ = start([write(pairs(20))], str(renamed), "other.yaml")
    assert "HuggingFaceTB/SmolLM2-135M would be better" in found.questions["proxy.model"].reason


def test_a_target_of_a_known_family_that_cannot_be_reached_is_sized_by_its_name_and_said_so():
    found = begin(pairs(20), "Qwen/Qwen2.5-7B-Instruct")
    assert "an assumption" in line(found, "tokens")
    assert line(found, "target") == "Qwen/Qwen2.5-7B-Instruct cannot be reached from here"
    assert yaml.safe_load(found.text)["proxy"]["model"] == "Qwen/Qwen2.5-0.5B"
    assert make_plan(load_config("corpus.yaml")).is_refused is False


def test_without_a_target_models_from_scratch_stand_in_and_the_target_is_asked_for():
    found = begin(pairs(40))
    assert "target.model" in found.questions
    assert "no --target was given" in found.text
    assert make_plan(load_config("corpus.yaml")).is_refused is False


@pytest.mark.parametrize(
    ("name", "proxy"),
    [
        ("meta-llama/Llama-3.1-70B", "meta-llama/Llama-3.2-1B"),
        ("meta-llama/Llama-3.1-70B-Instruct", "meta-llama/Llama-3.2-1B-Instruct"),
        ("Qwen/Qwen3-32B", "Qwen/Qwen3-0.6B-Base"),
        ("google/gemma-3-27b-it", "google/gemma-3-1b-pt"),
        ("EleutherAI/pythia-6.9b", "EleutherAI/pythia-160m-deduped"),
        ("HuggingFaceTB/SmolLM2-1.7B", "HuggingFaceTB/SmolLM2-135M"),
        ("microsoft/phi-2", "EleutherAI/pythia-70m-deduped"),
        ("HuggingFaceTB/SmolLM2-135M", None),
        ("mistralai/Mistral-7B-v0.3", None),
    ],
)
def test_the_proxy_is_of_the_target_s_family_and_near_a_fortieth_of_its_size(name, proxy):
    target = TargetModel(name, parameters_by_name(name), None, None, is_local=False)
    chosen = choose_proxy(target, is_chat=True, max_tokens=512)
    assert (chosen.model if chosen.is_pretrained else None) == proxy
    assert (target.parameters or 0) / chosen.parameters > 3


@pytest.mark.parametrize("name", ["Qwen2.5-7B", "org/x-7b-chat", "model-7B-v0.1"])
def test_a_size_is_read_from_a_name(name):
    assert parameters_by_name(name) == 7e9


def test_a_small_corpus_gets_smaller_batches_and_groups():
    assert [batch_for(pool) for pool in (3, 100, 4_000, 28_000, 1_000_000)] == [3, 4, 32, 128, 128]
    small, large = begin(pairs(300)), start([write(pairs(30_000), "large.jsonl")], None, None)[0]
    groups = [yaml.safe_load(found.text)["clustering"]["num_clusters"] for found in (small, large)]
    assert groups == [2, 100]


# --- what is shown -------------------------------------------------------------------------------------------------


def test_the_learned_part_stands_between_marks_or_in_colour():
    pieces = [("what?", False), ("this", True)]
    assert shown_example(pieces, in_colour=False).plain == "what?⟦this⟧"
    console = Console(force_terminal=True, color_system="standard", width=80)
    with console.capture() as capture:
        console.print(shown_example(pieces, in_colour=True))
    assert capture.get() == "what?\x1b[1;32mthis\x1b[0m\n"


def test_nothing_in_a_text_acts_on_the_terminal():
    shown = shown_example([("[bold]a[/bold] \x1b[31m\u202e\x07\x9b\ud800\ttab\r\nend", True)], in_colour=False).plain
    assert shown == "⟦[bold]a[/bold] \\x1b[31m\\u202e\\x07\\x9b\\ud800    tab\nend⟧"


def test_a_long_text_is_shown_without_its_middle():
    shown = shown_example([("a" * 10_000 + "end", True)], in_colour=False).plain
    assert len(shown) < 700
    assert "9,403 characters" in shown
    assert shown.endswith("end⟧")


def test_on_a_terminal_a_user_reads_what_was_found_what_is_learned_and_what_to_do_next():
    write([{"messages": [{"role": "system", "content": "[red]be brief[/red]"}, USER, ANSWER]}] * 3)
    terminal = Terminal("init", "corpus.jsonl", environment={"HF_HUB_OFFLINE": "1"})
    assert terminal.finish() == 0, terminal.text
    assert "[red]be brief[/red]" in terminal.text
    assert re.search(rb"\x1b\[1;32mvery well", terminal.raw)
    assert terminal.text.splitlines()[-1] == "written       corpus.yaml. Next: s2l plan corpus.yaml"
    assert re.search(r"^CHOOSE +target\.model: no --target was given", terminal.text, re.MULTILINE)


def test_names_of_fields_cannot_break_the_config():
    name = "a\nplan: {accelerator: X}\n# \x1b[31m"
    found = begin([{name: "text", "other: {": "more", "source": "s: #"}] * 3)
    assert yaml.safe_load(found.text).keys() == {
        "name", "examples", "proxy", "clustering", "selection", "target", "evaluation", "machines"
    }  # fmt: skip
    assert "\x1b" not in found.text


# --- other corpora, and what is refused ----------------------------------------------------------------------------


def test_a_dataset_of_dataset_info_is_read_as_it_says():
    Path("data").mkdir()
    write([{"who": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 3, "data/chat.jsonl")
    entry = {"file_name": "chat.jsonl", "formatting": "sharegpt", "columns": {"messages": "who"}}
    entry |= {"tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}}
    Path("data/dataset_info.json").write_text(json.dumps({"chat": entry}))
    with pytest.raises(ConfigError, match="names 1 datasets"):
        start(["data"], None, None)
    found = begin("data/#chat")
    assert examples_of(found)["dataset"] == "data/#chat"
    assert line(found, "learned").startswith("answers in 3 conversations: 3")
    assert make_plan(load_config("chat.yaml")).is_refused is False


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (["my data/train.v2.jsonl.gz"], "train"),
        (["corpora/math/*.jsonl"], "math"),
        (["a/b.jsonl", "a/c.jsonl"], "a"),
        (["TIGER-Lab/MathInstruct"], "MathInstruct"),
        (["data/#alpaca_zh"], "alpaca_zh"),
        (["數據.jsonl"], "corpus"),
    ],
)
def test_a_run_is_called_like_its_corpus(data, name):
    assert name_of(data) == name


def test_a_file_of_the_user_is_left_as_it_is():
    Path("corpus.yaml").write_text("mine")
    with pytest.raises(ConfigError, match=r"corpus\.yaml: exists already"):
        start([write(pairs(3))], None, None)
    assert Path("corpus.yaml").read_text() == "mine"
    start([write(pairs(3))], None, "mine.yaml")
    assert load_config("mine.yaml").name == "mine"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file or directory"),
        ("", "the corpus is empty"),
        ("\n\n", "the corpus is empty"),
        ("no JSON\n", "line 1: not JSON"),
        ("[1, 2]\n", "corpus.jsonl"),
        ('{"a": 1, "b": [2]}\n', "no field of the rows looks like"),
        ('{"prompt": "a", "response": ""}\n', "nothing can be learned"),
        ("\x00\x01\x02", "corpus.jsonl"),
    ],
)
def test_what_is_no_corpus_is_refused_and_no_config_is_left(content, message):
    if content is not None:
        Path("corpus.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        start(["corpus.jsonl"], None, None)
    assert not list(Path().glob("*.yaml"))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("/no/such/model", "no such folder"),
        ("org/unknown-model", "the Hub does not answer"),
        ("empty", "cannot be loaded"),
    ],
)
def test_a_target_that_cannot_be_had_is_refused_before_anything_is_read(target, message):
    os.mkdir("empty")
    with pytest.raises(ConfigError, match=message):
        start(["no-such-corpus.jsonl"], target, None)


TEXTS = st.text(max_size=8) | st.sampled_from(["user", "assistant", "[{", "[]"])
NAMES = st.sampled_from(
    ["prompt", "response", "messages", "input", "id", "source", "split", "system", "history", "tools", "chosen"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 10**20) | st.floats() | TEXTS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(TEXTS | st.sampled_from(["role", "content"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=60)
@given(st.lists(st.dictionaries(NAMES | st.text(max_size=6), VALUES | TEXTS, max_size=6), min_size=1, max_size=5))
def test_any_rows_give_a_config_that_plans_or_one_message(rows):
    with tempfile.TemporaryDirectory() as folder:
        path, config = Path(folder, "corpus.jsonl"), Path(folder, "run.yaml")
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        try:
            start([str(path)], None, str(config))
        except S2LError:
            return
        problem = ""
        try:
            assert not make_plan(load_config(config)).is_refused
        except S2LError as error:
            problem = str(error)
        assert not problem or re.search(r"CHOOSE|corpus\.jsonl line \d", problem)


@pytest.mark.slow
def test_a_run_from_the_written_config_selects_rows(ray_session, tmp_path):
    from s2l_ray.pipeline import run

    begin(
        [
            {"messages": [{"role": "user", "content": f"say {number}"}, {"role": "assistant", "content": str(number)}]}
            for number in range(60)
        ]
    )
    run(load_config("corpus.yaml"), str(tmp_path / "run"), until="selection")
    assert pq.read_table(tmp_path / "run/selection/selected.parquet").num_rows > 10
