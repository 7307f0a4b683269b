"""Exports as the trainers themselves read them: what they learn of every row, by their own code.

TRL is a development dependency. LLaMA-Factory and Axolotl want other versions of torch and transformers; where their packages
are importable their data code reads the exports, too (tests/README.md says how), elsewhere these tests are skipped.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from datasets import load_dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from s2l_ray.selection.export import export_subset
from tests.exporting import CALL, TOOLS, answer, lines, made_run, result, user

# Arguments without any key in common: a reader that gives all objects the same keys renders other text.
OTHER_CALL = {"type": "function", "function": {"name": "add", "arguments": {"x": 1, "y": [2, {"z": None}]}}}
OTHER_TOOLS = [{"type": "function", "function": {"name": "add", "description": "sums", "parameters": {"type": "object"}}}]
CALLING = [{"role": "system", "content": "brief"}, user("w?"), answer("", tool_calls=[CALL]), result("5"), answer("five")]
ADDING = [user("sum"), answer("", tool_calls=[OTHER_CALL]), result("3"), answer("three", reasoning_content="1 + 2")]
CONTEXT = [user("a"), answer("b", weight=0), user("c"), answer("d"), user("e"), answer("f")]
PLAIN = {"p": [user("hello"), answer("there")], "q": [user("one"), answer("two"), user("three"), answer("four")]}

TEMPLATE = """
{%- if tools %}{{- '<|im_start|>tools\\n' + (tools | tojson) + '<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}
{%- if message.role == 'assistant' %}{{- '<|im_start|>assistant\\n' }}{% generation %}
{%- if message.reasoning_content %}{{- '<think>' + message.reasoning_content + '</think>' }}{% endif %}
{%- if message.content %}{{- message.content }}{% endif %}
{%- for call in message.tool_calls or [] %}{{- '<call>' + call.function.name + (call.function.arguments | tojson) }}{% endfor %}
{{- '<|im_end|>' }}{% endgeneration %}{{- '\\n' }}
{%- else %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, and a ChatML that shows everything which a conversation has."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={mark: number for number, mark in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|pad|>")
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    made.chat_template = TEMPLATE
    return made


def learned(tokenizer: Any, row: dict[str, Any]) -> list[str]:
    """The learned stretches of a row, as text."""
    stretches: list[list[int]] = []
    before = -100
    for label in row["labels"]:
        if label != -100:
            if before == -100:
                stretches.append([])
            stretches[-1].append(label)
        before = label
    return [tokenizer.decode(one) for one in stretches]


def seen(tokenizer: Any, row: dict[str, Any]) -> str:
    return tokenizer.decode(row["input_ids"])


def turn(message: dict[str, Any]) -> str:
    """What the template makes of an answer."""
    thought = f"<think>{message['reasoning_content']}</think>" if "reasoning_content" in message else ""
    calls = [one["function"] for one in message.get("tool_calls", [])]
    named = "".join(f"<call>{one['name']}{json.dumps(one['arguments'], ensure_ascii=False)}" for one in calls)
    return f"{thought}{message['content']}{named}<|im_end|>"


def answers(talk: list[dict[str, Any]]) -> list[str]:
    return [turn(message) for message in talk if message["role"] == "assistant" and message.get("weight", 1)]


def exported(tmp_path: Path, talks: dict[str, Any], kind: str) -> Path:
    tools = {"calling": TOOLS, "adding": OTHER_TOOLS}
    run = made_run(tmp_path / "run", talks, tools={name: value for name, value in tools.items() if name in talks})
    export_subset(str(run), kind, str(tmp_path / "out"))
    return tmp_path / "out"


# --- TRL -----------------------------------------------------------------------------------------------------------


def trl_prepared(folder: Path, tokenizer: Any) -> list[dict[str, Any]]:
    """The rows of SFTTrainer, set up from the export's own config as `trl sft` does."""
    from transformers import GPT2Config, GPT2LMHeadModel
    from trl import ScriptArguments, SFTConfig, SFTTrainer, TrlParser

    arguments = ["--config", str(folder / "trl.yaml"), "--output_dir", str(folder.parent / "sft"), "--report_to", "none"]
    script, config = TrlParser((ScriptArguments, SFTConfig)).parse_args_and_config(
        [*arguments, "--max_length", "2048", "--bf16", "false", "--use_cpu", "true"]
    )
    data = load_dataset(script.dataset_name, cache_dir=str(folder.parent / "cache"))
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_positions=2048, n_embd=8, n_layer=1, n_head=1))
    trainer = SFTTrainer(model, config, train_dataset=data[script.dataset_train_split], processing_class=tokenizer)
    return trainer.train_dataset.to_list()


def test_trl_learns_every_answer_of_whole_conversations_and_sees_calls_and_tools_as_they_were(tmp_path, tokenizer):
    talks = {"adding": ADDING, "calling": CALLING, **PLAIN}
    rows = trl_prepared(exported(tmp_path, talks, "trl"), tokenizer)
    assert [learned(tokenizer, row) for row in rows] == [answers(talk) for _, talk in sorted(talks.items())]
    for row, (name, talk) in zip(rows, sorted(talks.items()), strict=True):
        tools = {"adding": OTHER_TOOLS, "calling": TOOLS}.get(name)
        assert seen(tokenizer, row) == tokenizer.apply_chat_template(talk, tools=tools, tokenize=False)


def test_trl_learns_no_turn_that_is_context(tmp_path, tokenizer):
    rows = trl_prepared(exported(tmp_path, {"context": CONTEXT, "p": PLAIN["p"]}, "trl"), tokenizer)
    assert [learned(tokenizer, row) for row in rows] == [["d<|im_end|>\n"], ["f<|im_end|>\n"], ["there<|im_end|>\n"]]
    assert seen(tokenizer, rows[1]) == tokenizer.apply_chat_template(CONTEXT, tokenize=False)


def test_trl_learns_of_pairs_the_response_and_its_end_without_a_template(tmp_path, tokenizer):
    rows = trl_prepared(exported(tmp_path, {"a": ("2 + 2 =", " 4"), "b": ("x", "y")}, "trl"), tokenizer)
    assert [seen(tokenizer, row) for row in rows] == ["2 + 2 = 4<|im_end|>", "xy<|im_end|>"]
    assert [learned(tokenizer, row) for row in rows] == [[" 4<|im_end|>"], ["y<|im_end|>"]]


def test_rows_with_other_keys_far_behind_the_first_are_read_as_they_were(tmp_path, tokenizer):
    """`datasets` infers types from the first ten megabytes; the card says what they are."""
    long = {f"a{number:04d}": [user("x" * 12_000), answer("y")] for number in range(1_000)}
    folder = exported(tmp_path, long | {"calling": CALLING}, "trl")
    data = load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))["train"]
    assert data[0]["messages"] == long["a0000"]
    assert data[-1] == {"messages": CALLING, "tools": TOOLS}


# --- Axolotl -------------------------------------------------------------------------------------------------------


def axolotl_prepared(folder: Path, tokenizer: Any) -> list[dict[str, Any]]:
    """The rows as Axolotl's prompt strategy for the export's own `datasets:` block makes them."""
    pytest.importorskip("axolotl.prompt_strategies.chat_template")
    from axolotl.datasets import wrap_dataset_for_tokenized_prompt
    from axolotl.prompt_strategies import load
    from axolotl.utils.dict import DictDefault
    from axolotl.utils.schemas.datasets import SFTDataset

    config = yaml.safe_load((folder / "axolotl.yaml").read_text())
    dataset = config["datasets"][0]
    SFTDataset(**dataset)
    assert Path(dataset["path"]).is_file()
    settings = DictDefault(config | {"sequence_len": 2048, "train_on_inputs": False})
    kind = dataset["type"]
    if isinstance(kind, dict):
        strategy = load("user_defined", tokenizer, settings, DictDefault(kind))
    else:
        strategy = load(kind, tokenizer, settings, DictDefault(dataset))
    data = load_dataset("json", data_files=dataset["path"], split="train", cache_dir=str(folder.parent / "cache"))
    return wrap_dataset_for_tokenized_prompt(strategy, data).to_list()


def test_axolotl_learns_the_answers_and_no_turn_that_is_context(tmp_path, tokenizer):
    talks = {"adding": ADDING, "calling": CALLING, "context": CONTEXT, **PLAIN}
    rows = axolotl_prepared(exported(tmp_path, talks, "axolotl"), tokenizer)
    assert [learned(tokenizer, row) for row in rows] == [answers(talk) for _, talk in sorted(talks.items())]
    assert seen(tokenizer, rows[1]) == tokenizer.apply_chat_template(CALLING, tools=TOOLS, tokenize=False)


def test_axolotl_learns_plain_conversations_and_pairs(tmp_path, tokenizer):
    rows = axolotl_prepared(exported(tmp_path, PLAIN, "axolotl"), tokenizer)
    assert [learned(tokenizer, row) for row in rows] == [answers(talk) for talk in PLAIN.values()]
    rows = axolotl_prepared(exported(tmp_path / "pairs", {"a": ("2 + {x} =", " 4"), "b": ("x", "y")}, "axolotl"), tokenizer)
    assert [seen(tokenizer, row) for row in rows] == ["2 + {x} = 4<|im_end|>", "xy<|im_end|>"]
    assert [learned(tokenizer, row) for row in rows] == [[" 4<|im_end|>"], ["y<|im_end|>"]]


# --- LLaMA-Factory -------------------------------------------------------------------------------------------------


def llama_factory_prepared(folder: Path, tokenizer: Any) -> list[dict[str, Any]]:
    """The rows as LLaMA-Factory's supervised processor makes them under its `qwen` template, from the export's own files."""
    os.environ["DISABLE_VERSION_CHECK"] = "1"
    pytest.importorskip("llamafactory.data")
    from llamafactory.data import loader
    from llamafactory.data.parser import get_dataset_list
    from llamafactory.data.template import TEMPLATES
    from llamafactory.hparams import DataArguments, ModelArguments

    settings = yaml.safe_load((folder / "llama-factory.yaml").read_text())
    names = ("dataset_dir", "dataset", "mask_history")
    data_args = DataArguments(**{name: settings[name] for name in names}, template="qwen", cutoff_len=2048)
    model_args = ModelArguments(model_name_or_path="none", cache_dir=str(folder.parent / "cache"))
    (attributes,) = get_dataset_list(data_args.dataset, data_args.dataset_dir)
    here = SimpleNamespace(local_process_index=0)
    data = loader._load_single_dataset(attributes, model_args, data_args, here)
    processor = loader._get_dataset_processor(data_args, "sft", TEMPLATES["qwen"], tokenizer, None)
    columns = processor.preprocess_dataset(data.to_dict())
    keys = ("input_ids", "labels")
    return [dict(zip(keys, values, strict=True)) for values in zip(*(columns[key] for key in keys), strict=True)]


def test_llama_factory_learns_the_answers_and_sees_calls_and_tools(tmp_path, tokenizer):
    rows = llama_factory_prepared(
        exported(tmp_path, {"adding": ADDING, "calling": CALLING, **PLAIN}, "llama-factory"), tokenizer
    )
    found = [learned(tokenizer, row) for row in rows]
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
    assert found[1] == [f"{call}<|im_end|>\n", "five<|im_end|>\n"]
    assert found[0][1] == "<think>\n1 + 2\n</think>\n\nthree<|im_end|>\n"
    assert '"arguments": {"x": 1, "y": [2, {"z": null}]}' in found[0][0]
    assert found[2:] == [["there<|im_end|>\n"], ["two<|im_end|>\n", "four<|im_end|>\n"]]
    assert "brief" in seen(tokenizer, rows[1])
    assert json.dumps(TOOLS[0]) in seen(tokenizer, rows[1])


def test_llama_factory_learns_no_turn_that_is_context(tmp_path, tokenizer):
    rows = llama_factory_prepared(exported(tmp_path, {"context": CONTEXT, "p": PLAIN["p"]}, "llama-factory"), tokenizer)
    assert [learned(tokenizer, row) for row in rows] == [["d<|im_end|>\n"], ["f<|im_end|>\n"], ["there<|im_end|>\n"]]
    assert "assistant\nd<|im_end|>" in seen(tokenizer, rows[1])


def test_llama_factory_reads_pairs(tmp_path, tokenizer):
    rows = llama_factory_prepared(exported(tmp_path, {"a": ("2 + 2 =", " 4"), "b": ("x", "y")}, "llama-factory"), tokenizer)
    assert [learned(tokenizer, row) for row in rows] == [[" 4<|im_end|>\n"], ["y<|im_end|>\n"]]


# --- OpenAI's form, which no package reads -------------------------------------------------------------------------


def test_openais_rows_meet_the_rules_that_its_documentation_gives(tmp_path):
    run = made_run(tmp_path / "run", {"calling": CALLING, "context": CONTEXT, **PLAIN}, tools={"calling": TOOLS})
    export_subset(str(run), "openai", str(tmp_path / "out.jsonl"))
    for row in lines(tmp_path / "out.jsonl"):
        assert row.keys() <= {"messages", "tools"}
        assert row["messages"][-1]["role"] == "assistant"
        waiting: set[str] = set()
        for message in row["messages"]:
            assert message.keys() <= {"role", "content", "name", "weight", "tool_calls", "tool_call_id"}
            assert isinstance(message["content"], str) or message.get("tool_calls")
            assert ("weight" in message) == (message["role"] == "assistant")
            assert message.get("weight", 0) in (0, 1)
            for call in message.get("tool_calls", []):
                waiting.add(call["id"])
                assert isinstance(json.loads(call["function"]["arguments"]), dict)
            if message["role"] == "tool":
                waiting.remove(message["tool_call_id"])
        assert not waiting
