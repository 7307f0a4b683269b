"""Layouts and conversations: what is learned from a row of every usual form, and what is said of one that has none."""

from __future__ import annotations

import json
import pickle
import re
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s2l_ray.config import ExamplesConfig
from s2l_ray.errors import ConfigError
from s2l_ray.examples.conversations import ROLES, LearnedText, Tags
from s2l_ray.examples.layouts import Layout, row_reader
from s2l_ray.examples.llama_factory import is_named, resolved
from s2l_ray.examples.row_problems import RowProblem

WEATHER = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
ASKS, ANSWERS = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CHAT = [ASKS, ANSWERS]
DETAILS = [{"begin": 0, "end": 3, "train": True}]


# --- helpers -----------------------------------------------------------------------------------------------------


def read(row: dict[str, Any], **layout: Any) -> LearnedText:
    return row_reader(Layout(**layout))(row)


def messages_of(value: Any, row: dict[str, Any] | None = None, **layout: Any) -> list[dict[str, Any]]:
    """The canonical messages of a conversation."""
    return list(json.loads(read({"messages": value} | (row or {}), messages_field="messages", **layout).messages or "null"))


def problem_of(value: Any, row: dict[str, Any] | None = None, **layout: Any) -> RowProblem:
    with pytest.raises(RowProblem) as caught:
        messages_of(value, row, **layout)
    return caught.value


def pair_problem(row: dict[str, Any], **layout: Any) -> RowProblem:
    with pytest.raises(RowProblem) as caught:
        read(row, **layout)
    return caught.value


def answer(**message: Any) -> dict[str, Any]:
    """The canonical answer of a conversation whose second message is this one of the assistant."""
    return messages_of([ASKS, {"role": "assistant"} | message])[1]


def answer_problem(**message: Any) -> RowProblem:
    return problem_of([ASKS, {"role": "assistant"} | message])


# --- forms of a conversation ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        CHAT,
        [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
        [{"role": "user", "value": "q"}, {"from": "gpt", "content": "a"}],
        [{"role": "prompter", "text": "q"}, {"role": "assistant", "text": "a"}],
        [{"input": "q", "output": "a"}],
        json.dumps(CHAT),
        f"\ufeff \n{json.dumps(CHAT)}",
        {"messages": CHAT},
        {"conversations": CHAT},
        json.dumps({"messages": CHAT}),
        {"messages": json.dumps(CHAT)},
        [ASKS | {"name": None, "weight": None}, ANSWERS | {"tool_calls": None, "weight": None}],
        [ASKS | {"id": 7}, ANSWERS | {"tool_calls": [], "citations": [1]}],
    ],
    ids=["openai", "sharegpt", "mixed-keys", "oasst", "xtuner", "text", "text-with-mark", "object", "object-sharegpt",
         "object-as-text", "text-in-object", "null-keys", "further-keys"],
)  # fmt: skip
def test_every_form_of_a_conversation_is_the_same_conversation(value):
    assert messages_of(value) == CHAT


@pytest.mark.parametrize(("role", "name"), [(role, name) for role, names in ROLES.items() for name in names])
def test_roles_are_known_in_any_case(role, name):
    if role == "function_call":
        messages = messages_of([ASKS, {"from": name.title(), "value": '{"name": "weather"}'}])
        assert messages[1]["tool_calls"][0]["function"]["name"] == "weather"
        return
    for written in (name, name.upper(), f" {name.replace('_', '-')} "):
        assert messages_of([ASKS, {"role": written, "content": "x"}, ANSWERS])[1] == {"role": role, "content": "x"}


def test_pairs_of_turns_may_begin_with_a_system_message_and_mark_their_output():
    turns = [{"system": "be brief", "input": "q", "output": "a", "output_with_loss": False}, {"input": "q2", "output": "a2"}]
    assert messages_of(turns) == [
        {"role": "system", "content": "be brief"},
        ASKS,
        ANSWERS | {"weight": 0},
        {"role": "user", "content": "q2"},
        {"role": "assistant", "content": "a2"},
    ]


def test_what_people_see_of_a_conversation_is_all_before_the_first_learned_answer_and_the_learned_ones():
    value = [{"role": "system", "content": "s"}, ASKS, ANSWERS | {"weight": 0}, ASKS, ANSWERS, ASKS, ANSWERS]
    text = read({"messages": value}, messages_field="messages")
    assert (text.prompt, text.response) == ("s\nq\na\nq", "a\na")


def test_a_conversation_may_begin_with_a_greeting():
    text = read({"messages": [ANSWERS, ASKS, ANSWERS]}, messages_field="messages")
    assert (text.prompt, text.response) == ("a\nq", "a\na")


@pytest.mark.parametrize(
    ("value", "reason", "words"),
    [
        ("[{'role': 'user', 'content': 'q'}]", "bad_json_text", "is text, not a list of messages: it is not JSON"),
        ("q and a", "wrong_type", "field 'messages' is text, not a list of messages"),
        ("", "wrong_type", "text that is empty"),
        ("3", "wrong_type", "is text"),
        ('[{"role": "user"', "bad_json_text", "from character"),
        (7, "wrong_type", "a number"),
        (float("nan"), "wrong_type", "NaN or Infinity"),
        ({"turns": CHAT}, "wrong_type", "is an object, not a list of messages"),
        (["q", "a"], "not_a_message", "message 1: a message is an object, found text"),
        ([None], "not_a_message", "found null"),
        ([[ASKS, ANSWERS]], "not_a_message", "found a list"),
        ([{"speaker": "A", "words": "q"}], "not_a_message", "found the keys speaker, words"),
        ([{}], "not_a_message", "found the keys none"),
        ([{"content": "q"}], "not_a_message", "found the keys content"),
        ([ASKS, {"role": "narrator", "content": "x"}], "unknown_role", "message 2: the role is 'narrator'; known are system"),
        ([{"role": 5, "content": "x"}], "unknown_role", "the role is a number"),
        ([{"role": ["user"], "content": "x"}], "unknown_role", "the role is a list"),
        ([ASKS], "no_assistant_message", "found messages of user only"),
        ([], "no_assistant_message", "found no messages"),
        (None, "no_assistant_message", "found no messages"),
        ([ANSWERS], "empty_prompt", "no text before"),
        ([{"role": "user", "content": " "}, ANSWERS], "empty_prompt", "no text before"),
        ([ASKS, {"role": "assistant", "content": " \n"}], "empty_response", "the answers are empty"),
        ([{"role": "user", "content": "\ud83d"}, ANSWERS], "half_surrogate", "half a surrogate pair"),
    ],
)
def test_what_is_no_conversation_is_said_as_what_it_is(value, reason, words):
    problem = problem_of(value)
    assert problem.reason == reason
    assert problem.message.startswith("field 'messages'")
    assert words in problem.message


def test_the_row_without_the_field_is_told_of_the_one_that_was_meant():
    assert (
        "Set examples.messages_field=conversations." in pair_problem({"conversations": CHAT}, messages_field="messages").message
    )
    assert "set examples.messages_field=messages" in pair_problem({"messages": CHAT}).message


# --- content -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ([{"type": "text", "text": "a "}, {"type": "text", "text": "b"}], {"content": "a b"}),
        ([{"type": "output_text", "text": "a"}, "b"], {"content": "ab"}),
        ([{"type": "text", "text": "a", "image_url": None}, {"text": "b"}], {"content": "ab"}),
        ([{"type": "refusal", "refusal": "no"}], {"content": "no"}),
        ([{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "a"}], {"content": "a", "reasoning_content": "hm"}),
        ([{"type": "reasoning", "text": "hm"}, {"type": "text", "text": "a"}], {"content": "a", "reasoning_content": "hm"}),
        (
            [{"type": "thinking", "thinking": [{"type": "text", "text": "h"}, {"type": "text", "text": "m"}]}, "a"],
            {"content": "a", "reasoning_content": "hm"},
        ),
        ("<think>hm</think>a", {"content": "<think>hm</think>a"}),
    ],
)
def test_parts_of_text_are_joined_and_thoughts_are_kept_apart(content, found):
    assert answer(content=content) == {"role": "assistant"} | found


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_has_one_name(key):
    assert answer(content="a", **{key: "hm"}) == ANSWERS | {"reasoning_content": "hm"}
    assert answer(content="a", **{key: None}) == ANSWERS
    assert answer_problem(content="a", **{key: 3}).reason == "wrong_type"


def test_a_refusal_stands_for_the_content_that_is_null():
    assert answer(content=None, refusal="no") == {"role": "assistant", "content": "no"}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([{"type": "text", "text": "look"}, {"type": "image_url", "image_url": {"url": "x"}}], "image_part"),
        ([{"type": "image"}], "image_part"),
        ([{"image_url": {"url": "x"}}], "image_part"),
        ([{"type": "input_audio", "input_audio": {}}], "audio_part"),
        ([{"type": "video", "video": "x"}], "video_part"),
        ([{"type": "file", "file": {}}], "file_part"),
        ([{"type": "hologram"}], "unknown_part"),
        ([{"type": 4}], "unknown_part"),
        ([{}], "unknown_part"),
        ([3], "unknown_part"),
        ([{"type": "text"}], "wrong_type"),
        ([{"type": "text", "text": 3}], "wrong_type"),
        (3, "wrong_type"),
        (True, "wrong_type"),
        (float("nan"), "wrong_type"),
        ({"text": "q"}, "wrong_type"),
        (None, "no_content"),
    ],
)
def test_other_content_is_a_problem_of_its_kind(content, reason):
    problem = problem_of([{"role": "user", "content": content}, ANSWERS])
    assert problem.reason == reason
    assert "message 1" in problem.message


def test_content_may_be_absent_only_beside_calls():
    assert answer_problem().reason == "no_content"
    for without in ({}, {"content": None}, {"content": ""}):
        message = answer(tool_calls=[WEATHER], **without)
        assert message["tool_calls"] == [WEATHER]
        assert message["content"] == without.get("content")


def test_a_tool_s_result_may_be_any_object_or_list():
    for result in ({"temp": [1, None]}, [{"temp": 1}], [1, 2]):
        told = messages_of([ASKS, {"role": "tool", "tool_call_id": 7, "name": "weather", "content": result}, ANSWERS])[1]
        assert json.loads(told["content"]) == result
        assert (told["tool_call_id"], told["name"]) == ("7", "weather")
    parts = [{"type": "text", "text": "18"}]
    assert messages_of([ASKS, {"role": "tool", "content": parts}, ANSWERS])[1] == {"role": "tool", "content": "18"}


def test_calls_and_results_inside_the_content_become_calls_and_messages():
    calls = [
        {"type": "text", "text": "let me see"},
        {"type": "tool_use", "id": "c1", "name": "weather", "input": {"city": "Oslo"}},
    ]
    result = [{"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "18"}]}]
    found = messages_of([ASKS, {"role": "assistant", "content": calls}, {"role": "user", "content": result}, ANSWERS])
    assert found[1:3] == [
        {"role": "assistant", "content": "let me see", "tool_calls": [WEATHER | {"id": "c1"}]},
        {"role": "tool", "content": "18", "tool_call_id": "c1"},
    ]


# --- tools and calls -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "calls",
    [
        [WEATHER],
        WEATHER,
        json.dumps([WEATHER]),
        [json.dumps(WEATHER)],
        [{"function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}],
        [{"name": "weather", "arguments": {"city": "Oslo"}}],
        [{"name": "weather", "parameters": {"city": "Oslo"}}],
    ],
)
def test_calls_of_every_form_are_the_same_call(calls):
    assert answer(content=None, tool_calls=calls)["tool_calls"] == [WEATHER]


def test_openai_s_old_call_is_a_call():
    message = answer(content=None, function_call={"name": "weather", "arguments": '{"city": "Oslo"}'})
    assert message == {"role": "assistant", "content": None, "tool_calls": [WEATHER]}


@pytest.mark.parametrize(("given", "found"), [("not json", "not json"), ("[1]", "[1]"), ("", {}), (None, {})])
def test_arguments_that_are_no_object_stay_text(given, found):
    calls = answer(tool_calls=[{"id": 3, "function": {"name": "f", "arguments": given}}])["tool_calls"]
    assert calls == [{"type": "function", "id": "3", "function": {"name": "f", "arguments": found}}]


@pytest.mark.parametrize(
    ("calls", "words"),
    [
        ([3], "a tool call is an object, found a number"),
        ("weather()", "is not JSON"),
        (3, "tool calls are a list of objects"),
        ([{"type": "custom", "custom": {}}], "names its function, found the keys type, custom"),
        ([{"function": {"name": " "}}], "names its function"),
        ([{"function": {"name": "f", "arguments": [1]}}], "arguments of a call are an object"),
        ([{"id": [], "function": {"name": "f"}}], "the id of a tool call is text"),
        ([{"function": {"name": "f", "arguments": {"x": float("nan")}}}], "NaN or Infinity"),
    ],
)
def test_what_is_no_call_is_said_as_what_it_is(calls, words):
    assert words in answer_problem(content=None, tool_calls=calls).message


def test_sharegpt_s_role_for_calls_is_an_answer_that_calls():
    calls = '[{"name": "weather", "arguments": {"city": "Oslo"}}]'
    for content in (calls, calls[1:-1], json.loads(calls)):
        found = messages_of(
            [ASKS, {"from": "function_call", "value": content}, {"from": "observation", "value": "18"}, ANSWERS]
        )
        assert found[1:3] == [
            {"role": "assistant", "content": None, "tool_calls": [WEATHER]},
            {"role": "tool", "content": "18"},
        ]
    thought = messages_of([ASKS, {"from": "function_call", "value": f"<think>hm</think>\n{calls}"}])[1]
    assert thought == {"role": "assistant", "content": "<think>hm</think>", "tool_calls": [WEATHER]}
    for content, reason in (("weather(Oslo)", "bad_json_text"), (None, "bad_tool_call"), ("", "bad_tool_call")):
        problem = problem_of([ASKS, {"from": "function_call", "value": content}])
        assert problem.reason == reason
        assert "message 2" in problem.message


def test_calls_one_after_the_other_are_one_answer():
    calls = [{"role": "tool_call", "content": json.dumps({"name": name})} for name in "fgh"]
    found = messages_of([ASKS, *calls, {"role": "tool_response", "content": "t"}, calls[0], ANSWERS])
    assert [[call["function"]["name"] for call in message.get("tool_calls", ())] for message in found] == [
        [],
        [*"fgh"],
        [],
        ["f"],
        [],
    ]
    marked = messages_of([ASKS, calls[0], calls[1] | {"loss": False}, ANSWERS])
    assert [message.get("weight") for message in marked] == [None, 0, None]


def test_a_call_shows_its_function_s_name_to_people():
    text = read({"messages": [ASKS, {"role": "assistant", "tool_calls": [WEATHER]}]}, messages_field="messages")
    assert text.response == '{"name":"weather","arguments":{"city":"Oslo"}}'


@pytest.mark.parametrize(
    "row",
    [
        {"tools": [TOOL]},
        {"tools": json.dumps([TOOL])},
        {"tools": TOOL},
        {"tools": [json.dumps(TOOL)]},
        {"tools": [TOOL["function"]]},
        {"tools": [{"type": "function"} | TOOL["function"]]},
        {"tools": [{"name": "weather", "input_schema": {"type": "object"}}]},
        {"tools": [{"name": "weather", "parameters": '{"type": "object"}'}]},
        {"functions": [TOOL["function"]]},
        {"tools": [], "functions": [TOOL["function"]]},
    ],
)
def test_tools_of_every_form_are_the_same_tools(row):
    if row.get("tools") != []:
        assert json.loads(read({"messages": CHAT} | row, messages_field="messages").tools or "null") == [TOOL]
    assert json.loads(read({"messages": {"messages": CHAT} | row}, messages_field="messages").tools or "null") == [TOOL]


def test_tools_beside_the_system_message_are_the_conversation_s():
    first = {"role": "system", "content": "s", "tools": json.dumps([TOOL])}
    text = read({"messages": [first, *CHAT]}, messages_field="messages")
    assert json.loads(text.tools or "null") == [TOOL]
    assert json.loads(text.messages or "null")[0] == {"role": "system", "content": "s"}


@pytest.mark.parametrize("tools", [None, [], "", " ", "[]", "null", {}])
def test_no_tools_are_no_tools(tools):
    assert read({"messages": CHAT, "tools": tools}, messages_field="messages").tools is None


def test_what_are_no_tools_names_the_field_and_how_to_leave_it_out():
    for tools in ("hammer, saw", ["hammer"], [3], [{"type": "function"}], 3):
        problem = problem_of(CHAT, {"tools": tools})
        assert problem.message.startswith("field 'tools'")
        assert "examples.tools_field" in problem.message
    assert messages_of(CHAT, {"tools": "hammer, saw"}, tools_field="") == CHAT
    assert read({"messages": CHAT, "api": [TOOL]}, messages_field="messages", tools_field="api").tools is not None


def test_what_a_table_filled_up_with_nulls_is_not_there():
    filled = [{"function": {"name": "weather", "arguments": {"city": "Oslo", "days": None}}}]
    rows = {"messages": [ASKS, {"role": "assistant", "content": None, "tool_calls": filled}], "tools": [TOOL | {"x": None}]}
    read_row = row_reader(Layout(messages_field="messages"), nulls_are_absent=True)
    assert json.loads(read_row(rows).messages or "")[1]["tool_calls"] == [WEATHER]
    as_map = [{"function": {"name": "weather", "arguments": [("city", "Oslo")]}}]
    rows["messages"][1]["tool_calls"] = as_map
    assert json.loads(read_row(rows).messages or "")[1]["tool_calls"] == [WEATHER]


# --- which turns are learned ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mark", "is_learned"),
    [
        ({"weight": 0}, False), ({"weight": 1}, True), ({"weight": 0.0}, False),
        ({"train": False}, False), ({"train": True}, True), ({"training": False}, False),
        ({"loss_mask": 0}, False), ({"loss_mask": True}, True),
        ({"loss": False}, False), ({"loss": True}, True), ({"loss_scale": 0.0}, False),
        ({"masked": True}, False), ({"masked": False}, True),
        ({"weight": 1, "train": False}, False), ({"weight": None}, True), ({"train_detail": None}, True),
    ],
)  # fmt: skip
def test_a_marked_answer_is_context(mark, is_learned):
    found = messages_of([ASKS | mark, ANSWERS | mark, ASKS, ANSWERS])
    assert found == [ASKS, ANSWERS if is_learned else ANSWERS | {"weight": 0}, ASKS, ANSWERS]


@pytest.mark.parametrize(
    "mark",
    [{"weight": 0.5}, {"weight": 2}, {"train": "no"}, {"loss_mask": []}, {"masked": {}}, {"train_detail": DETAILS},
     {"training_detail": DETAILS}],
)  # fmt: skip
def test_a_mark_that_says_neither_yes_nor_no_is_a_problem(mark):
    problem = answer_problem(content="a", **mark)
    assert problem.reason == "bad_mark"
    assert next(iter(mark)) in problem.message
    assert messages_of([ASKS | mark, ANSWERS]) == CHAT  # what is not the assistant's is never learned


def test_a_row_s_loss_mask_has_a_value_for_each_message():
    twice = [*CHAT, *CHAT]
    for mask in ([0, 0, 0, 1], [False, False, False, True], [1, 0, 1, 1], "[0, 0, 0, 1]"):
        assert messages_of(twice, {"loss_mask": mask}) == [ASKS, ANSWERS | {"weight": 0}, ASKS, ANSWERS]
    assert messages_of(twice, {"loss_mask": None}) == twice
    for other in (1, "a column of the same name"):
        assert messages_of(twice, {"loss_mask": other}) == twice
    for mask in ([1, 0], [0, 0, 0, 2], [None] * 4):
        assert problem_of(twice, {"loss_mask": mask}).reason == "bad_mark"


def test_a_conversation_of_which_nothing_is_learned_says_so():
    assert answer_problem(content="a", weight=0).reason == "nothing_learned"
    assert problem_of(CHAT, {"loss_mask": [1, 0]}).reason == "nothing_learned"


# --- pairs -------------------------------------------------------------------------------------------------------


def test_a_pair_of_texts_is_no_conversation():
    assert read({"prompt": "q", "response": "a"}) == LearnedText("q", "a")


def test_trl_s_pair_of_messages_learns_the_completion_alone():
    few_shots = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "one"}, ASKS]
    row = {"prompt": few_shots, "completion": [ANSWERS], "tools": [TOOL]}
    text = read(row, response_field="completion")
    assert json.loads(text.messages or "") == [few_shots[0], few_shots[1] | {"weight": 0}, ASKS, ANSWERS]
    assert (text.prompt, text.response) == ("1\none\nq", "a")
    assert json.loads(text.tools or "") == [TOOL]


def test_one_side_may_be_text_and_the_other_messages():
    for row in (
        {"prompt": "q", "response": [ANSWERS]},
        {"prompt": [ASKS], "response": "a"},
        {"prompt": [{"from": "human", "value": "q"}], "response": {"from": "gpt", "value": "a"}},
    ):
        assert json.loads(read(row).messages or "") == CHAT


def test_of_several_texts_the_preferred_one_is_learned():
    assert read({"input": "q", "output": ["a", "b"]}, prompt_field="input", response_field="output") == LearnedText("q", "a")


@pytest.mark.parametrize(
    ("row", "reason", "words"),
    [
        ({"prompt": "q"}, "missing_field", "field 'response' is missing (fields: prompt)"),
        ({"prompt": "q", "output": "a"}, "missing_field", "Set examples.response_field=output."),
        ({"prompt": "q", "response": {"city": "X"}}, "wrong_type", "field 'response' is an object, not text"),
        ({"prompt": "q", "response": 6}, "wrong_type", "field 'response' is a number, not text"),
        ({"prompt": "q", "response": float("nan")}, "wrong_type", "NaN or Infinity"),
        ({"prompt": "q", "response": []}, "empty_response", "an empty list"),
        ({"prompt": "q", "response": [None, "a"]}, "wrong_type", "a list that starts with null"),
        ({"prompt": {"x": 1}, "response": "a"}, "wrong_type", "field 'prompt' is an object"),
        ({"prompt": ["q"], "response": "a"}, "not_a_message", "field 'prompt', message 1"),
        ({"prompt": "q", "response": None}, "empty_response", "the response is empty"),
        ({"prompt": None, "response": "a"}, "empty_prompt", "the prompt is empty"),
        ({"prompt": "q", "response": "a\udc00"}, "half_surrogate", "field 'response' has half a surrogate pair"),
        ({"prompt": [ASKS], "response": CHAT}, "wrong_type", "begins with a message of user, not an answer. Set ex"),
        ({"prompt": [ASKS], "response": [{"role": "tool", "content": "t"}]}, "no_assistant_message", "user, tool only"),
    ],
)
def test_what_is_no_pair_is_said_as_what_it_is(row, reason, words):
    problem = pair_problem(row)
    assert problem.reason == reason
    assert words in problem.message


def test_system_message_and_history_make_a_pair_a_conversation():
    layout = {"system_field": "system", "history_field": "history"}
    pair = {"prompt": "q", "response": "a"}
    system, turns = {"role": "system", "content": "s"}, [["q1", "a1"], ["q2", None]]
    found = json.loads(read(pair | {"system": "s", "history": turns}, **layout).messages or "")
    assert [message["content"] for message in found] == ["s", "q1", "a1", "q2", "", "q", "a"]
    assert not any("weight" in message for message in found)  # earlier answers are learned, too
    assert json.loads(read(pair | {"system": "s", "history": json.dumps([])}, **layout).messages or "") == [system, *CHAT]
    for without in ({}, {"system": None, "history": None}, {"system": "", "history": []}):
        assert json.loads(read(pair | without, **layout).messages or "") == CHAT
    assert json.loads(read(pair | {"history": CHAT}, **layout).messages or "") == CHAT * 2
    assert json.loads(read(pair | {"system": "s"}, system_field="system").messages or "") == [system, *CHAT]


def test_a_conversation_s_own_system_message_stays():
    own = {"role": "system", "content": "own"}
    assert messages_of([own, *CHAT], {"system": "s"}, system_field="system") == [own, *CHAT]
    assert messages_of({"system": "s", "conversations": CHAT})[0] == {"role": "system", "content": "s"}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"system": 3}, "field 'system' is a number, not text"),
        ({"sytem": "s"}, "Set examples.system_field=sytem."),
        ({"history": [["q"]]}, "field 'history': turn 1: earlier turns are a list of [prompt, response]"),
        ({"history": [["q", 3]]}, "turn 1"),
        ({"history": 3}, "found a number"),
        ({"history": "soon"}, "field 'history' is not JSON"),
    ],
)
def test_what_is_no_system_message_or_history_names_its_field(row, words):
    problem = pair_problem({"prompt": "q", "response": "a"} | row, system_field="system", history_field="history")
    assert words in problem.message


def test_a_template_takes_text_and_whole_numbers():
    layout = {"prompt_template": "{a}: {b}", "prompt_template_if_empty": "{a}!"}
    assert read({"a": "x", "b": 3, "response": "r"}, **layout).prompt == "x: 3"
    assert read({"a": "x", "b": " ", "response": "r"}, **layout).prompt == "x!"
    assert pair_problem({"a": None, "b": None, "response": "r"}, **layout).reason == "empty_prompt"
    assert "Write {city} in" in pair_problem({"city": "y", "response": "r"}, prompt_template="{citty}").message
    assert pair_problem({"a": [], "b": "", "response": "r"}, **layout).reason == "wrong_type"


# --- LLaMA-Factory's names -----------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    entries = {
        "alpaca": {"file_name": "alpaca.json"},
        "columns": {"file_name": "a.json", "columns": {"prompt": "ask", "response": "say", "system": "sys", "history": "past"}},
        "chat": {
            "file_name": "chat",
            "formatting": "sharegpt",
            "columns": {"messages": "turns", "tools": "api"},
            "tags": {"role_tag": "who", "content_tag": "what", "user_tag": "A", "assistant_tag": "B", "function_tag": "C"},
        },
        "openai": {"file_name": "s3://bucket/chat.jsonl", "formatting": "openai"},
        "hub": {"hf_hub_url": "org/name", "subset": "main", "split": "test", "revision": "abc", "file_name": "unused"},
        "ranked": {"file_name": "a.json", "ranking": True},
        "chosen": {"file_name": "a.json", "columns": {"chosen": "x"}},
        "images": {"file_name": "a.json", "columns": {"images": "x"}},
        "columns-misspelt": {"file_name": "a.json", "columns": {"promt": "x"}},
        "columns-numbers": {"file_name": "a.json", "columns": {"prompt": 3}},
        "columns-list": {"file_name": "a.json", "columns": ["prompt"]},
        "tags-misspelt": {"file_name": "a.json", "tags": {"rol_tag": "x"}},
        "formatting": {"file_name": "a.json", "formatting": "csv"},
        "script": {"script_url": "x"},
        "elsewhere": {"ms_hub_url": "x"},
        "nowhere": {},
        "samples": {"file_name": "a.json", "num_samples": 3},
        "place": {"file_name": 3},
        "value": 3,
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps(entries))
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "broken.json").write_text("{")
    return tmp_path


def test_a_dataset_by_its_name_has_the_files_and_the_fields_of_its_entry(folder):
    config, layout = resolved(ExamplesConfig(dataset=f"{folder}/#alpaca"))
    assert config.dataset == f"{folder}/alpaca.json"
    reader = row_reader(layout)
    assert reader({"instruction": "i", "input": "x", "output": "o"}) == LearnedText("i\nx", "o")
    assert reader({"instruction": "i", "input": "", "output": ["o", "p"]}) == LearnedText("i", "o")
    assert reader({"instruction": "i", "output": "o"}) == LearnedText("i", "o")
    assert reader({"instruction": "", "input": "x", "output": "o"}) == LearnedText("x", "o")

    config, layout = resolved(ExamplesConfig(dataset=f"{folder}/dataset_info.json#columns"))
    row = {"ask": "q", "say": "a", "sys": "s", "past": [["q", "a"]], "input": "not named, not read"}
    found = json.loads(row_reader(layout)(row).messages or "")
    assert found == [{"role": "system", "content": "s"}, *CHAT, *CHAT]
    assert (config.prompt_field, config.history_field) == ("ask", "past")  # what the recipe sees


def test_its_tags_are_known_beside_the_usual_names(folder):
    config, layout = resolved(ExamplesConfig(dataset=f"{folder}/#chat"))
    assert (config.dataset, config.messages_field, config.tools_field) == (f"{folder}/chat", "turns", "api")
    assert layout.tags == Tags("who", "what", "A", "B", None, "C", None)
    turns = [
        {"who": "A", "what": "q"},
        {"who": "C", "what": '{"name": "f"}'},
        {"from": "tool", "value": "t"},
        {"who": "B", "what": "a"},
    ]
    found = json.loads(row_reader(layout)({"turns": turns, "api": [TOOL]}).messages or "")
    assert [message["role"] for message in found] == ["user", "assistant", "tool", "assistant"]
    assert pickle.loads(pickle.dumps(layout)) == layout


def test_a_name_may_be_given_from_inside_its_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)
    for dataset, file in (("./#alpaca", "./alpaca.json"), ("dataset_info.json#alpaca", "alpaca.json")):
        assert resolved(ExamplesConfig(dataset=dataset))[0].dataset == file


def test_an_entry_may_name_a_dataset_of_the_hub_or_a_uri(folder):
    config, _ = resolved(ExamplesConfig(dataset=f"{folder}/#hub"))
    assert (config.dataset, config.subset, config.split, config.revision) == ("org/name", "main", "test", "abc")
    config, layout = resolved(ExamplesConfig(dataset=f"{folder}/#openai"))
    assert (config.dataset, layout.messages_field) == ("s3://bucket/chat.jsonl", "messages")


def test_a_field_that_the_config_names_wins(folder):
    config, layout = resolved(ExamplesConfig(dataset=f"{folder}/#alpaca", response_field="gold"))
    assert (layout.prompt_field, layout.response_field) == ("instruction", "gold")
    assert resolved(config)[0] == config


def test_other_datasets_are_left_as_they_are():
    for dataset in ("data/a#1.jsonl", "org/name", ["a.jsonl", "b.jsonl"], "data/#"):
        config = ExamplesConfig(dataset=dataset, messages_field="m")
        assert not is_named(dataset)
        assert resolved(config) == (config, Layout(messages_field="m"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("#alpac", "no dataset 'alpac'. Did you mean 'alpaca'? Known: alpaca,"),
        ("#ranked", "preference data"),
        ("#chosen", "'chosen' is for preference data"),
        ("#images", "only text is learned"),
        ("#columns-misspelt", "columns has no key 'promt'. Did you mean 'prompt'?"),
        ("#columns-numbers", "columns.prompt is not a name"),
        ("#columns-list", "columns is not an object"),
        ("#tags-misspelt", "tags has no key 'rol_tag'. Did you mean 'role_tag'?"),
        ("#formatting", "formatting is alpaca, sharegpt or openai"),
        ("#script", "'script_url' is not supported"),
        ("#elsewhere", "only ms_hub_url, which is not supported"),
        ("#nowhere", "neither file_name nor hf_hub_url"),
        ("#samples", "'num_samples' is not supported"),
        ("#place", "file_name is not a name"),
        ("#value", "dataset 'value' is not an object"),
        ("list.json#alpaca", "not an object of datasets"),
        ("broken.json#alpaca", "not JSON"),
        ("absent.json#alpaca", "no such file"),
        ("absent/#alpaca", "no such file"),
    ],
)
def test_an_entry_that_cannot_be_used_says_why(folder, name, words):
    with pytest.raises(ConfigError, match=re.escape(words)) as caught:
        resolved(ExamplesConfig(dataset=f"{folder}/{name}"))
    assert str(folder) in str(caught.value)


def test_a_name_stands_alone(folder):
    with pytest.raises(ConfigError, match="alone"):
        resolved(ExamplesConfig(dataset=[f"{folder}/#alpaca", "b.jsonl"]))


# --- whatever a row holds ------------------------------------------------------------------------------------------

TEXTS = st.text(st.characters(codec=None), max_size=8)
WORDS = st.sampled_from(
    ["user", "assistant", "tool", "function_call", "text", "image", "[]", '{"name": "f"}', "[{}]", "<think></think>"]
)
ATOMS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXTS, WORDS)
KEYS = st.one_of(
    TEXTS,
    st.sampled_from(
        ["role", "from", "content", "value", "text", "type", "tool_calls", "function_call", "function", "name", "arguments"]
    ),
    st.sampled_from(
        ["messages", "tools", "input", "output", "weight", "train", "loss_mask", "reasoning", "thinking", "id", "system"]
    ),
)
VALUES = st.recursive(
    ATOMS, lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(KEYS, inner, max_size=5)), max_leaves=12
)
FIELDS = ["prompt", "response", "messages", "tools", "functions", "loss_mask", "system", "history", "input"]
LAYOUTS = [
    Layout(),
    Layout(query_field="input"),
    Layout(messages_field="messages"),
    Layout(messages_field="messages", system_field="system", tools_field="tools"),
    Layout(system_field="system", history_field="history"),
    Layout(prompt_template="{prompt}{input}", prompt_template_if_empty="{prompt}", tags=Tags(role="type", user="text")),
]
READERS = [row_reader(layout, nulls) for layout in LAYOUTS for nulls in (False, True)]


@settings(max_examples=300, deadline=None)
@given(row=st.dictionaries(st.sampled_from(FIELDS), VALUES))
def test_no_value_of_any_field_is_more_than_a_problem_of_the_row(row):
    for read_row in READERS:
        text, problem = outcome(read_row, row)
        if problem is not None:
            assert problem.reason.isidentifier()
            assert problem.message.endswith(".")
            assert problem.message.encode().isascii() or problem.message.isprintable()
        if text is not None:
            assert text.prompt.strip()
            assert text.response.strip()
            json.loads(text.messages or "null")
            assert f"{text.prompt}{text.response}{text.messages}{text.tools}".encode()


@settings(max_examples=300, deadline=None)
@given(message=st.dictionaries(KEYS, VALUES, max_size=6), role=st.sampled_from(["user", "assistant", "tool", "function_call"]))
def test_no_message_is_more_than_a_problem_of_its_row(message, role):
    row = {"messages": [ASKS, message | {"role": role}, ANSWERS]}
    _, problem = outcome(row_reader(Layout(messages_field="messages")), row)
    assert problem is None or problem.message.startswith("field 'messages'")


def outcome(read_row: Any, row: dict[str, Any]) -> tuple[LearnedText | None, RowProblem | None]:
    """What a row is read as, or its problem."""
    try:
        return read_row(row), None
    except RowProblem as problem:
        return None, problem


SAID = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20).filter(str.strip)
WELL_FORMED = st.lists(
    st.one_of(
        st.fixed_dictionaries({"role": st.sampled_from(["user", "tool"]), "content": SAID}),
        st.fixed_dictionaries(
            {"role": st.just("assistant"), "content": SAID},
            optional={
                "reasoning_content": SAID,
                "weight": st.just(0),
                "tool_calls": st.lists(st.just(WEATHER | {"id": "c"}), min_size=1, max_size=2),
            },
        ),
    ),
    max_size=6,
)


@settings(max_examples=200, deadline=None)
@given(middle=WELL_FORMED)
def test_a_canonical_conversation_is_read_as_itself(middle):
    messages = [ASKS, *middle, ANSWERS]
    assert messages_of(messages) == messages
    assert messages_of(json.dumps(messages)) == messages


@pytest.mark.parametrize("depth", [200, 100_000])
def test_nesting_too_deep_for_python_is_a_problem_of_the_row(depth):
    text = f'[{{"role": "user", "content": {"[" * depth}{"]" * depth}}}]'
    problem = problem_of(text)
    assert problem.reason in {"too_deep", "unknown_part"}
    nested: Any = "x"
    for _ in range(900):
        nested = [{"type": "thinking", "text": nested}]
    assert problem_of([{"role": "user", "content": nested}, ANSWERS]).reason == "too_deep"


def test_no_problem_quotes_a_value_of_the_corpus():
    secret = "Mrs Smith, born 1950"
    rows: list[dict[str, Any]] = [
        {"messages": secret},
        {"messages": f"[{secret}"},
        {"messages": [secret]},
        {"messages": [{"role": "user", "content": {"note": secret}}]},
        {"messages": [ASKS, ANSWERS | {"tool_calls": secret}]},
        {"messages": [ASKS, ANSWERS | {"weight": secret}]},
        {"messages": [{"from": "function_call", "value": secret}]},
        {"messages": CHAT, "tools": secret},
        {"messages": [ASKS, ANSWERS | {"weight": 1950}]},
    ]
    for row in rows:
        message = pair_problem(row, messages_field="messages").message
        assert "Smith" not in message
        assert "1950" not in message


def test_what_a_terminal_would_obey_is_escaped():
    assert "\x1b" not in problem_of([{"role": "\x1b[31m\n", "content": "q"}]).message
    assert "\ud83d" not in problem_of([{"\ud83d": "q"}]).message


def test_a_problem_travels_between_processes():
    problem = problem_of(3)
    copy = pickle.loads(pickle.dumps(problem))
    assert (copy.reason, copy.message, str(copy)) == (problem.reason, problem.message, str(problem))


def test_reading_plain_chats_costs_little():
    """Measured: 0.9 s for 100,000 chats of six messages on one core; the bound leaves room for a busy machine."""
    rows = [{"messages": [ASKS | {"content": f"question {i} {j}"}, ANSWERS] * 3} for i in range(10_000) for j in [i]]
    read_row = row_reader(Layout(messages_field="messages"))
    start = time.process_time()
    for row in rows:
        read_row(row)
    assert time.process_time() - start < 1.0
