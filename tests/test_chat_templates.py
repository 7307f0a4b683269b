"""Conversations become the tokens that inference sees and the labels that TRL learns; where they differ from TRL's, why.

TRL's preparation of a prompt and its completion is asked turn by turn, its assistant-only loss for templates with marks. What
is meant to differ, each shown by a test:

1. Blanks behind the token that ends a turn: TRL learns them; nobody generates them, since generation stops at the end.
2. A token that begins in what the prompt supplies and reaches into the answer (two line ends as one token): TRL learns it;
   a model that was given the prompt cannot generate it.
3. A template that renders earlier turns differently once later ones follow: TRL takes the whole as it is rendered at its end,
   here every learned turn is a row, which is equal to TRL's for that turn.
4. A template that renders the prompt itself differently once an answer follows (Mistral's system message): TRL drops from
   the prompt what differs, and warns; here the answer follows the prompt that inference sees.
5. An answer that nothing ends: TRL learns no end, here the end-of-sequence token follows.
6. TRL adds the end-of-sequence token to plain pairs only as text and tokenises prompt and response as one text; here they
   are tokenised apart, so that a prompt's tokens are those of inference.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from s2l_ray.errors import DataError
from s2l_ray.training.token_pools import PoolTokens, check_refused, row_counts, said_counts
from s2l_ray.training.token_rows import RowLimit
from s2l_ray.training.tokens import PartTokens, encode_table, generation_prompt
from s2l_ray.training.turns import TOOLS_LOST
from tests.building import CORPUS
from tests.chat_templates import GLM_4, LLAMA_3, MARKED, MISTRAL_V0_3, PHI_4, QWEN_2_5, QWEN_3, TEMPLATES, chat_tokenizer

Message = dict[str, Any]
TOOLS = [{"type": "function", "function": {"name": "get_weather", "description": "d", "parameters": {"type": "object"}}}]
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Oslo", "days": 2}}}


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str | None, **rest: Any) -> Message:
    return {"role": "assistant", "content": content} | rest


def encoded(
    tokenizer: Any, *conversations: list[Message], tools: list[Any] | None = None, limit: RowLimit | None = None
) -> PartTokens:
    """Conversations as an examples part has them, as tokens."""
    ids = [f"id{number}" for number in range(len(conversations))]
    texts = [json.dumps(messages) for messages in conversations]
    given = pa.array([json.dumps(tools) if tools else None] * len(ids), pa.string())
    table = pa.table({"example_id": ids, "source": ids, "prompt": ids, "response": ids, "messages": texts, "tools": given})
    return encode_table(tokenizer, table, limit or RowLimit(10_000))


def learned(tokenizer: Any, part: PartTokens, row: int = 0) -> list[str]:
    """The runs of labels of a row, as text."""
    ids, is_label = part.tokens[row]
    borders = np.flatnonzero(np.diff(np.concatenate([[0], is_label.astype(int), [0]])))
    return [tokenizer.decode(ids[start:stop]) for start, stop in borders.reshape(-1, 2)]


def text(tokenizer: Any, part: PartTokens, row: int = 0) -> str:
    return str(tokenizer.decode(part.tokens[row][0]))


def prepared_by_trl(
    tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, Any]], folder: Path, **options: Any
) -> list[tuple[list[int], list[bool]]]:
    """Tokens and label marks of TRL's SFTTrainer."""
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape))
    settings = {"max_length": None, "report_to": "none", "use_cpu": True, "bf16": False, "shuffle_dataset": False}
    arguments = SFTConfig(output_dir=str(folder), **settings | options)
    trainer = SFTTrainer(model=model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    return [(row["input_ids"], [label != -100 for label in row["labels"]]) for row in trainer.train_dataset]


CONVERSATIONS = {
    "two turns": [user("what is the name"), assistant("hello world"), user("and again"), assistant("of the other  ")],
    "of one letter": [user("a"), assistant("a"), user("s"), assistant("s")],
    "reasoning": [
        user("what"),
        assistant("<think>\nthe one\n</think>\n\nforty two"),
        user("and again"),
        assistant("<think>\nthe other\n</think>\n\nhello 🦙"),
    ],
    "line ends": [user("what is\n\n"), assistant("the name\n\nof 🦙\n"), user("\n"), assistant("ü è\n\n\nand")],
    "three turns": [m for n in range(3) for m in (user(f"the one {n}"), assistant(f"answer {n}"))],
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_answer_has_the_tokens_and_labels_that_trl_gives_it(name, tmp_path):
    tokenizer = chat_tokenizer(TEMPLATES[name], adds_bos=True)
    turns = [(messages, turn) for messages in CONVERSATIONS.values() for turn in range(1, len(messages), 2)]
    rows = [{"prompt": messages[:turn], "completion": [messages[turn]]} for messages, turn in turns]
    for (messages, turn), theirs in zip(
        turns, prepared_by_trl(tokenizer, rows, tmp_path, completion_only_loss=True), strict=True
    ):
        context = [message | ({"weight": 0} if message["role"] == "assistant" else {}) for message in messages[:turn]]
        part = encoded(tokenizer, [*context, messages[turn]])
        ids, is_label = part.tokens[0]
        assert ids.tolist() == theirs[0], (messages, turn)
        assert list(is_label) == without_blanks_behind(tokenizer, *theirs), (messages, turn)


def without_blanks_behind(tokenizer: Any, ids: list[int], is_label: list[bool]) -> list[bool]:
    """TRL's labels but for the blanks behind the end of the turn, which are the text's last tokens."""
    last = max(place for place, token in enumerate(ids) if tokenizer.decode([token]).strip())
    return [label and place <= last for place, label in enumerate(is_label)]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_conversation_is_what_the_template_gives_or_a_row_for_each_answer(name):
    tokenizer = chat_tokenizer(TEMPLATES[name], adds_bos=True)
    for messages in CONVERSATIONS.values():
        part = encoded(tokenizer, messages)
        if name != "Qwen3":
            assert part.tokens[0][0].tolist() == tokenizer.apply_chat_template(messages)["input_ids"]
            assert len(part.tokens) == 1
            continue
        assert part.changed["split_conversations"] == 1
        for row, turn in enumerate(range(1, len(messages), 2)):
            assert part.tokens[row][0].tolist() == tokenizer.apply_chat_template(messages[: turn + 1])["input_ids"]


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("name", [*TEMPLATES, None])
def test_a_text_has_one_beginning_at_most(name, adds_bos):
    tokenizer = chat_tokenizer(TEMPLATES.get(name), adds_bos=adds_bos)
    ids = encoded(tokenizer, CONVERSATIONS["two turns"]).tokens[0][0].tolist()
    is_written = name in {"Llama 3", "Gemma 3", "Mistral v0.3"} or (name is None and adds_bos)
    assert ids.count(tokenizer.bos_token_id) == int(is_written)


MARKS = {
    "ChatML": MARKED,
    "with the blank behind": MARKED.replace("<|im_end|>{% endgeneration %}{{ '\n' }}", "<|im_end|>\n{% endgeneration %}"),
    "from the header's line end": MARKED.replace("assistant\n' }}{% generation %}", "assistant' }}{% generation %}\n\n"),
}


@pytest.mark.parametrize("marks", MARKS)
def test_a_template_with_marks_learns_what_it_marks_as_trl_does(marks, tmp_path):
    tokenizer = chat_tokenizer(MARKS[marks])
    rows = [{"messages": messages} for messages in CONVERSATIONS.values()]
    theirs = prepared_by_trl(tokenizer, rows, tmp_path, assistant_only_loss=True)
    part = encoded(tokenizer, *CONVERSATIONS.values())
    assert [(ids.tolist(), list(is_label)) for ids, is_label in map(part.tokens.__getitem__, range(len(rows)))] == theirs


def test_an_end_that_follows_the_last_turn_only_splits_no_marked_conversation():
    both = "{% endgeneration %}{{ '\n' }}"
    closing = "{% if loop.last %}{{ '\n</s>' }}{% endif %}{% endgeneration %}"
    tokenizer = chat_tokenizer(MARKED.replace(both, closing + "{{ '\n' }}"))
    part = encoded(tokenizer, CONVERSATIONS["two turns"])
    assert learned(tokenizer, part) == ["hello world<|im_end|>", "of the other  <|im_end|>\n</s>"]
    assert not part.changed


def test_marks_of_an_answer_of_weight_0_are_not_learned():
    tokenizer = chat_tokenizer(MARKED)
    part = encoded(tokenizer, [user("a"), assistant("one", weight=0), user("b"), assistant("two", weight=1)])
    assert learned(tokenizer, part) == ["two<|im_end|>"]
    twice = MARKED.replace("{{ m.content }}", "{% endgeneration %}{% generation %}{{ m.content }}")
    tokenizer = chat_tokenizer(twice.replace("{% generation %}{% endgen", "{% generation %}so {% endgen"))
    part = encoded(tokenizer, [user("a"), assistant("one", weight=0), user("b"), assistant("two")])
    assert learned(tokenizer, part) == ["so two<|im_end|>"]


def test_marks_that_leave_out_the_end_are_counted():
    tokenizer = chat_tokenizer(MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>"))
    part = encoded(tokenizer, CONVERSATIONS["two turns"])
    assert learned(tokenizer, part) == ["hello world", "of the other  "]
    assert part.changed == {"ends_not_learned": 1}
    assert "whose end of turn is not learned" in said_counts(part.changed, [])[0]


def test_a_marking_template_that_rewrites_earlier_turns_gives_a_row_for_each():
    only_last = "{% if loop.last %}{% generation %}<think>\n</think>{{ m.content }}<|im_end|>{% endgeneration %}{% else %}"
    template = MARKED.replace("{% generation %}", only_last + "{% generation %}").replace(
        "<|im_end|>{% endgeneration %}{{ '\n' }}", "<|im_end|>{% endgeneration %}{% endif %}{{ '\n' }}"
    )
    tokenizer = chat_tokenizer(template)
    part = encoded(tokenizer, CONVERSATIONS["two turns"])
    assert [learned(tokenizer, part, row) for row in range(2)] == [
        ["<think>\n</think>hello world<|im_end|>"],
        ["<think>\n</think>of the other  <|im_end|>"],
    ]


# --- where it differs from TRL -------------------------------------------------------------------------------------


def test_a_token_that_begins_in_the_prompt_is_not_learned():
    tokenizer = chat_tokenizer(TEMPLATES["ChatML"])
    part = encoded(tokenizer, [user("what"), assistant("\nhello")])
    assert tokenizer.decode([part.tokens[0][0][int(np.argmax(part.tokens[0][1])) - 1]]) == "\n\n"
    assert learned(tokenizer, part) == ["hello<|im_end|>"]


def test_the_blank_that_the_prompt_supplies_is_not_learned_with_the_word_that_it_is_one_token_with():
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + '</s>' }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    for adds_bos in (False, True):  # offsets without the blank and with it
        tokenizer = chat_tokenizer(template, adds_bos=adds_bos, by_words=True)
        part = encoded(tokenizer, [user("what"), assistant("the other")])
        assert learned(tokenizer, part) == [" other</s>"]


def test_an_answer_follows_the_prompt_that_inference_sees_where_it_would_change_it():
    tokenizer = chat_tokenizer(MISTRAL_V0_3)
    messages = [{"role": "system", "content": "be good"}, user("the one"), assistant("hello"), user("other"), assistant("four")]
    part = encoded(tokenizer, messages)
    assert [text(tokenizer, part, row) for row in range(2)] == [
        "<s>[INST] be good\n\nthe one[/INST] hello</s>",
        "<s>[INST] the one[/INST] hello</s>[INST] be good\n\nother[/INST] four</s>",
    ]
    assert [learned(tokenizer, part, row) for row in range(2)] == [[" hello</s>"], [" four</s>"]]
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True)["input_ids"]
    assert generation_prompt(*part.tokens[1]) == prompt


def test_the_header_of_the_next_message_is_learned_where_it_alone_ends_a_turn_and_else_the_end_of_sequence():
    tokenizer = chat_tokenizer(GLM_4)
    part = encoded(tokenizer, CONVERSATIONS["three turns"])
    assert learned(tokenizer, part) == ["answer 0<|user|>", "answer 1<|user|>", "answer 2</s>"]
    assert part.tokens[0][0][:-1].tolist() == tokenizer.apply_chat_template(CONVERSATIONS["three turns"])["input_ids"]
    assert not part.changed


def test_an_end_that_is_plain_text_is_learned_and_none_is_added():
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + ' (over)\n' }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    tokenizer = chat_tokenizer(template)
    part = encoded(tokenizer, CONVERSATIONS["two turns"])
    assert learned(tokenizer, part) == [" hello world (over)", " of the other   (over)"]


def test_a_turn_without_any_end_is_counted_and_the_last_one_gets_its_end():
    template = "{% for m in messages %}{{ m.role + '>' + m.content + '\n' }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'assistant>' }}{% endif %}"
    tokenizer = chat_tokenizer(template)
    part = encoded(tokenizer, [user("a"), assistant("hello"), user("b"), assistant("again")])
    assert learned(tokenizer, part) == ["hello\n", "again\n</s>"]
    assert part.changed == {"ends_not_learned": 1}


@pytest.mark.parametrize("name", ["ChatML", "Phi-4"])  # with a line end between the two, and without
def test_of_two_ends_the_first_is_learned(name):
    both = "{% endfor %}{% if not add_generation_prompt %}</s>{% endif %}"
    tokenizer = chat_tokenizer(TEMPLATES[name].replace("{% endfor %}", both))
    part = encoded(tokenizer, [user("a"), assistant("hello"), user("b"), assistant("again")])
    assert learned(tokenizer, part) == ["hello<|im_end|>", "again<|im_end|>"]
    assert text(tokenizer, part).endswith("</s>")


def test_two_control_tokens_that_end_a_turn_together_are_both_learned():
    tokenizer = chat_tokenizer(
        TEMPLATES["ChatML"].replace("+ '<|im_end|>\n'", "+ ('[/INST]' if m.role != 'user' else '') + '</s>'")
    )
    part = encoded(tokenizer, [user("a"), assistant("hello")])
    assert learned(tokenizer, part) == ["hello[/INST]</s>"]


@pytest.mark.parametrize("said", ["<table> of it", "hello", "<think>\nwhat\n</think>\n\nhello"])
def test_a_generation_prompt_that_begins_to_think_hides_nothing_of_an_answer_that_does_not(said):
    tokenizer = chat_tokenizer(TEMPLATES["ChatML"].replace("assistant\n' }}", "assistant\n<think>\n' }}"))
    part = encoded(tokenizer, [user("a"), assistant(said)])
    assert learned(tokenizer, part) == [said.removeprefix("<think>\n") + "<|im_end|>"]


# --- reasoning, tools ----------------------------------------------------------------------------------------------


def test_reasoning_is_learned_where_the_template_shows_it():
    messages = [user("what"), assistant("four", reasoning_content="two and two")]
    for template in (QWEN_3, None):
        tokenizer = chat_tokenizer(template)
        part = encoded(tokenizer, messages)
        assert learned(tokenizer, part) == ["<think>\ntwo and two\n</think>\n\nfour<|im_end|>"]
    tokenizer = chat_tokenizer(PHI_4)
    assert learned(tokenizer, encoded(tokenizer, messages)) == ["four<|im_end|>"]


@pytest.mark.parametrize("template", [QWEN_2_5, None])
@pytest.mark.parametrize("content", [None, "", "so"])
def test_tool_calls_are_learned_and_their_results_are_not(template, content):
    tokenizer = chat_tokenizer(template)
    called = assistant(content, tool_calls=[CALL, CALL])
    part = encoded(tokenizer, [user("what"), called, {"role": "tool", "content": "3"}, assistant("cold")], tools=TOOLS)
    call = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo", "days": 2}}\n</tool_call>'
    assert learned(tokenizer, part) == ["\n".join([*filter(None, [content]), call, call]) + "<|im_end|>", "cold<|im_end|>"]
    assert (json.dumps(TOOLS[0]) in text(tokenizer, part)) == (template is not None)
    assert part.changed == ({} if template else {TOOLS_LOST: 1}), "ChatML has no place for tools, which is said"


def test_arguments_are_given_as_text_to_a_template_that_wants_text():
    concatenating = QWEN_2_5.replace("(call.function.arguments | tojson)", "call.function.arguments")
    tokenizer = chat_tokenizer(concatenating)
    part = encoded(tokenizer, [user("what"), assistant(None, tool_calls=[CALL])], tools=TOOLS)
    assert '{"name": "get_weather", "arguments": {"city": "Oslo", "days": 2}}' in learned(tokenizer, part)[0]


def test_calls_that_a_template_does_not_write_are_counted_and_their_empty_answer_is_not_learned():
    tokenizer = chat_tokenizer(LLAMA_3)
    part = encoded(tokenizer, [user("what"), assistant(None, tool_calls=[CALL]), user("and"), assistant("cold")])
    assert learned(tokenizer, part) == ["cold<|eot_id|>"]
    assert part.changed == {"tool_calls_not_learned": 1}
    assert "tool calls that the chat template does not write" in said_counts(part.changed, [])[0]
    assert row_counts(part.changed, part.refused) == {"dropped": {}, "shortened": {}, "tool_calls_not_learned": 1}


def test_reasoning_that_a_template_does_not_write_is_counted():
    tokenizer = chat_tokenizer(LLAMA_3)
    for reasoning in ({"reasoning_content": "two and two"}, {}):
        said = "four" if reasoning else "<think>two and two</think>four"
        part = encoded(tokenizer, [user("what"), assistant(said, **reasoning)])
        assert part.changed == ({"reasoning_not_learned": 1} if reasoning else {}), "Llama's shape writes the content as it is"


def test_tools_are_shown_or_not_whatever_their_names_are():
    tools = [{"type": "function", "function": {"name": "a", "parameters": {"type": "object"}}}]
    conversation = [user("what a fox"), assistant("so")]
    assert encoded(chat_tokenizer(LLAMA_3), conversation, tools=tools).changed == {TOOLS_LOST: 1}
    assert not encoded(chat_tokenizer(QWEN_2_5), conversation, tools=tools).changed


# --- refused, split, cut -------------------------------------------------------------------------------------------


def test_a_conversation_that_the_template_refuses_is_named_with_its_words_or_dropped_and_counted():
    tokenizer = chat_tokenizer(TEMPLATES["Gemma 3"])
    good = [[user("a"), assistant("b")]] * 11
    part = encoded(tokenizer, *good, [user("secret"), user("a"), assistant("b")])
    assert part.refused == [("id11", "id11", "Conversation roles must alternate user/assistant/user/assistant/...")]
    assert part.example_ids.to_pylist() == [f"id{number}" for number in range(11)]
    pool = PoolTokens.join([part])
    with pytest.raises(
        DataError, match=r"^example 'id11': the chat template refuses it \(Conversation roles must .*on_bad_row=drop"
    ):
        pool.check("proxy", RowLimit(99), CORPUS)
    dropping = CORPUS.model_copy(update={"on_bad_row": "drop"})
    pool.check("proxy", RowLimit(99), dropping)
    counts = row_counts(pool.changed, pool.refused)
    assert counts["dropped"] == {"refused_by_template": 1}
    assert counts["dropped_by_source"] == {"id11": {"refused_by_template": 1}}
    assert counts["first_dropped"]["refused_by_template"].startswith("example 'id11': the chat template refuses it (Conv")
    assert said_counts(pool.changed, pool.refused)[0].startswith(
        "dropped: 1 refused_by_template, the first: example 'id11': the chat template refuses it"
    )
    with pytest.raises(
        DataError, match=r"proxy: the chat template refuses 1 of 12 examples, more than examples\.max_dropped=0\.05"
    ):
        pool.check("proxy", RowLimit(99), dropping.model_copy(update={"max_dropped": 0.05}))


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("{{ raise_exception('Not this role: ' + m.content) }}", "Not this role:"),
        ("{{ raise_exception(m.content) }}", "TemplateError"),
        ("{{ m.content + 1 }}", 'can only concatenate str (not "int") to str'),
        ("{{ m.nowhere.at_all }}", "'dict object' has no attribute 'nowhere'"),
        ("{{ m.content | int / 0 }}", "ZeroDivisionError"),
        ("{{ {'a': 1}[m.content].b }}", "UndefinedError"),
    ],
)
def test_no_template_s_fault_is_a_traceback_or_quotes_the_corpus(fault, words):
    tokenizer = chat_tokenizer("{% for m in messages %}" + fault + "{% endfor %}")
    part = encoded(tokenizer, [user("the secret"), assistant("the secret")])
    [(_, _, said)] = part.refused
    assert "secret" not in said
    assert said == words
    with pytest.raises(DataError, match="the chat template refuses it"):
        check_refused(part.refused, CORPUS)


def test_an_example_of_several_rows_counts_as_one_and_its_rows_have_names_of_their_own():
    tokenizer = chat_tokenizer(QWEN_3)
    part = encoded(tokenizer, CONVERSATIONS["three turns"], [user("a"), assistant("b")], CONVERSATIONS["two turns"])
    assert part.owners.tolist() == [0, 0, 0, 1, 2, 2]
    assert part.row_ids == ["id0#0", "id0#1", "id0#2", "id1", "id2#0", "id2#1"]
    assert part.num_labels.tolist() == [part.tokens.num_labels[part.owners == number].sum() for number in range(3)]
    pool = PoolTokens.join([part])
    assert (pool.num_examples, pool.sizes) == (3, "3 examples in 6 rows")
    assert row_counts(pool.changed, pool.refused) == {"dropped": {}, "shortened": {}, "split_conversations": 2}


def test_of_a_split_conversation_the_rows_that_fit_are_kept():
    tokenizer = chat_tokenizer(QWEN_3)
    whole = encoded(tokenizer, CONVERSATIONS["three turns"])
    shortest = int(whole.tokens.lengths[0])
    part = encoded(tokenizer, CONVERSATIONS["three turns"], limit=RowLimit(shortest))
    assert (len(part.tokens), part.row_ids) == (1, ["id0"])
    assert part.changed == {"split_conversations": 1, "cut": 1}


def test_a_conversation_is_cut_on_the_right_or_first_at_the_start_of_its_prompt():
    tokenizer = chat_tokenizer(LLAMA_3)
    messages = [user("the name of " * 9), assistant("forty two")]
    ids = encoded(tokenizer, messages).tokens[0][0].tolist()
    for limit in (len(ids) - 1, len(ids) - 9):
        right, left = (encoded(tokenizer, messages, limit=RowLimit(limit, way)) for way in ("right", "left_prompt"))
        assert right.tokens[0][0].tolist() == ids[:limit] if len(right.tokens) else limit < len(ids) - 5
        assert left.tokens[0][0].tolist() == [ids[0], *ids[1 + len(ids) - limit :]]
        assert learned(tokenizer, left) == ["forty two<|eot_id|>"]
        assert left.changed == {"cut": 1}


def test_a_conversation_and_a_plain_pair_stand_side_by_side_in_the_order_of_the_table():
    tokenizer = chat_tokenizer(PHI_4)
    texts = [json.dumps(CONVERSATIONS["two turns"]), None, json.dumps(CONVERSATIONS["of one letter"])]
    columns = {"example_id": ["a", "b", "c"], "source": ["s"] * 3, "prompt": ["what "] * 3, "response": ["is"] * 3}
    part = encode_table(tokenizer, pa.table(columns | {"messages": texts, "tools": pa.nulls(3, pa.string())}), RowLimit(99))
    assert part.owners.tolist() == [0, 1, 2]
    assert text(tokenizer, part, 1) == "what is</s>"
    assert learned(tokenizer, part, 2) == ["a<|im_end|>", "s<|im_end|>"]


def test_a_tokenizer_whose_end_also_pads_learns_its_end():
    tokenizer = chat_tokenizer(MISTRAL_V0_3, pad_token="</s>")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert learned(tokenizer, encoded(tokenizer, CONVERSATIONS["of one letter"])) == [" a</s>", " s</s>"]
