"""Malformed corpora of every format: one message with the place, what was found and a remedy, or a counted drop of the row.

Every text of these corpora contains MARK, which no message may quote.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from s2l_ray.config import ExamplesConfig
from s2l_ray.errors import DataError, S2LError
from s2l_ray.examples.columns import join_columns
from s2l_ray.examples.cutting import cut_corpus
from s2l_ray.examples.fields import known_fields
from s2l_ray.examples.parts import PartColumns
from s2l_ray.examples.shards import ShardIndex, read_shard, row_groups
from s2l_ray.storage.drafts import table_bytes

MARK = "zebra"
GOOD = [{"prompt": f"{MARK} one", "response": f"{MARK} two"}, {"prompt": f"{MARK} red", "response": f"{MARK} blue"}]
ASKS, ANSWERS = {"role": "user", "content": f"{MARK} q"}, {"role": "assistant", "content": f"{MARK} a"}
GOOD_CHATS = [{"messages": [ASKS | {"content": f"{MARK} {n}"}, ANSWERS]} for n in (1, 2)]
CHATS = {"messages_field": "messages"}
CALL = {"function": {"name": "f", "arguments": {"x": MARK}}}
DETAILS = [{"begin": 0, "end": 3, "train": True}]


# --- what a corpus is, and what becomes of it ----------------------------------------------------------------------


@dataclass(frozen=True)
class Malformed:
    """A corpus and what is expected of it."""

    data: Callable[[], bytes] | None
    """The bytes of its file; None: there is no file."""
    name: str = "corpus.jsonl"
    config: dict[str, Any] = field(default_factory=dict)
    place: str = ""
    """What the message names after the file."""
    words: tuple[str, ...] = ()
    """What it says."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Reason -> rows; empty where no single row is to blame."""
    kept: int = 2
    """Rows that are read where bad ones are dropped."""


def lines(*rows: Any) -> bytes:
    """Rows as JSON Lines; bytes and text stand for themselves."""
    return b"".join(_line(row) + b"\n" for row in rows)


def _line(row: Any) -> bytes:
    if isinstance(row, str):
        return row.encode()
    return row if isinstance(row, bytes) else json.dumps(row).encode()


def second(row: Any, reason: str, *words: str, **config: Any) -> Malformed:
    """A corpus of pairs whose second line is bad."""
    rows = [GOOD[0] | {"id": "1"}, row, GOOD[1] | {"id": "2"}]
    return Malformed(lambda: lines(*rows), config=config, place=" line 2", words=words, dropped={reason: 1})


def pair(reason: str, *words: str, config: dict[str, Any] | None = None, **fields: Any) -> Malformed:
    """A corpus of pairs whose second row has these fields."""
    return second({"prompt": f"{MARK} p", "response": f"{MARK} r", "id": "3"} | fields, reason, *words, **config or {})


def chat(messages: Any, reason: str, *words: str, **fields: Any) -> Malformed:
    """A corpus of conversations whose second row is this one."""
    rows = [GOOD_CHATS[0], {"messages": messages} | fields, GOOD_CHATS[1]]
    return Malformed(lambda: lines(*rows), config=CHATS, place=" line 2", words=words, dropped={reason: 1})


def says(content: Any = MARK, **message: Any) -> list[dict[str, Any]]:
    """A conversation with this answer."""
    return [ASKS, {"role": "assistant", "content": content} | message]


def asks(content: Any) -> list[dict[str, Any]]:
    """A conversation with this question."""
    return [{"role": "user", "content": content}, ANSWERS]


def whole(name: str, data: Callable[[], bytes], *words: str, place: str = "", **config: Any) -> Malformed:
    """A corpus of which no single row is to blame."""
    return Malformed(data, name, config, place, words)


def parquet(columns: dict[str, Any] | None = None, **options: Any) -> bytes:
    sink = io.BytesIO()
    table = pa.table({name: [row[name] for row in GOOD] for name in GOOD[0]} if columns is None else columns)
    pq.write_table(table, sink, **options)
    return sink.getvalue()


def csv(*rows: str) -> bytes:
    return "".join(f"{row}\n" for row in rows).encode()


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def damaged_page() -> bytes:
    """A Parquet file whose footer is whole and whose pages are not."""
    data = bytearray(parquet({"prompt": [f"{MARK} {i}" for i in range(5000)], "response": [MARK] * 5000}, compression="zstd"))
    data[50:2000] = bytes(1950)
    return bytes(data)


def spoilt(data: bytes) -> bytes:
    """Bytes with zeros in their middle."""
    middle = len(data) // 2
    return data[:middle] + bytes(40) + data[middle + 40 :]


def twice() -> bytes:
    """A Parquet file with two columns of one name."""
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_arrays([pa.array([MARK])] * 3, names=["prompt", "prompt", "response"]), sink)
    return sink.getvalue()


LONG = lines(*(row | {"n": n} for n in range(2000) for row in GOOD))
CHINESE = json.dumps(
    {"prompt": "请把下面的句子翻译成英文并且说明理由", "response": "今天的天气非常好我们一起去公园散步"}, ensure_ascii=False
)
FRENCH = json.dumps({"prompt": "Où est la bibliothèque ?", "response": "À côté du café"}, ensure_ascii=False)

# --- lines that are no rows ----------------------------------------------------------------------------------------

NO_ROWS = {
    "half a line": second(f'{{"prompt": "{MARK}", "resp', "not_json", "not JSON"),
    "single quotes": second(f"{{'prompt': '{MARK}'}}", "not_json", "not JSON"),
    "a trailing comma": second(f'{{"prompt": "{MARK}",}}', "not_json", "not JSON"),
    "bare text": second(MARK, "not_json", "not JSON"),
    "a comment": second(f"// {MARK}", "not_json", "not JSON"),
    "two objects": second(json.dumps(GOOD[0]) * 2, "not_json", "not JSON"),
    "undefined": second('{"prompt": undefined, "response": "x"}', "not_json", "not JSON"),
    "an unescaped control character": second('{"prompt": "a\tb", "response": "x"}', "not_json", "control character"),
    "zero bytes before the rows": Malformed(
        lambda: bytes(40) + lines(*GOOD, GOOD[0]), place=" line 1", words=("not JSON",), dropped={"not_json": 1},
    ),
    "zero bytes": second(b"\0" * 40, "not_json", "not JSON"),
    "nested too deeply": second(f'{{"prompt": {"[" * 100_000}', "not_json", "not JSON"),
    "nested too deeply where nothing reads it": second(
        f'{{"prompt": "x", "response": "y", "z": {"[" * 100_000}{"]" * 100_000}}}', "not_json", "not JSON"
    ),
    "a number of 5000 digits": second(f'{{"prompt": "x", "response": "y", "z": {"9" * 5000}}}', "not_json", "not JSON"),
    "a number": second("7", "not_an_object", "found a number"),
    "a text": second(f'"{MARK}"', "not_an_object", "found text"),
    "a list": second("[1, 2]", "not_an_object", "found a list"),
    "null": second("null", "not_an_object", "found null"),
    "a line of GBK": second(CHINESE.encode("gbk"), "not_utf8", "not UTF-8", "gb18030"),
    "a line of Latin-1": second(FRENCH.encode("latin-1"), "not_utf8", "not UTF-8", "cp1252"),
    "a byte that is no text": second(b'{"prompt": "\xff", "response": "x"}', "not_utf8", "not UTF-8"),
    "a line broken inside a text": Malformed(
        lambda: lines(GOOD[0], f'{{"prompt": "{MARK}\n{MARK}", "response": "x"}}', GOOD[1]),
        place=" line 2", words=("not JSON",), dropped={"not_json": 2},
    ),
    "a page of HTML": Malformed(
        lambda: b"<!DOCTYPE html>\n<html><body>404</body></html>\n", place=" line 1", words=("not JSON",),
        dropped={"not_json": 2}, kept=0,
    ),
    "a pointer of Git LFS": Malformed(
        lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", place=" line 1", words=("not JSON",),
        dropped={"not_json": 3}, kept=0,
    ),
}  # fmt: skip

# --- fields of pairs ---------------------------------------------------------------------------------------------

OLD = {"system_field": "system", "history_field": "history"}
TEMPLATE = {"prompt_template": "{prompt}!"}
IDS, SOURCES = {"id_field": "id"}, {"source_field": "source"}
PAIRS = {
    "no response": second({"prompt": MARK}, "missing_field", "'response' is missing (fields: prompt)"),
    "a response by another name": second({"prompt": MARK, "output": MARK}, "missing_field", "examples.response_field=output"),
    "no prompt": second({"response": MARK}, "missing_field", "'prompt' is missing"),
    "a row without a field": second({}, "missing_field", "fields: none"),
    "a conversation among pairs": second({"messages": says()}, "missing_field", "examples.messages_field=messages"),
    "a response that is an object": pair("wrong_type", "'response' is an object", response={"x": MARK}),
    "a response that is a number": pair("wrong_type", "'response' is a number", response=1950),
    "a response that is NaN": pair("wrong_type", "'response' is NaN", response=float("nan")),
    "a response that is true": pair("wrong_type", "'response' is true or false", response=True),
    "a response that is a list of numbers": pair("wrong_type", "a list that starts with a number", response=[1, 2]),
    "a response that is a list of null and text": pair("wrong_type", "starts with null", response=[None, MARK]),
    "a prompt that is a list of texts": pair("not_a_message", "'prompt', message 1", prompt=[MARK]),
    "a prompt that is an object": pair("wrong_type", "'prompt' is an object", prompt={"text": MARK}),
    "half a surrogate pair in the response": pair("half_surrogate", "half a surrogate pair", response=f"{MARK}\ud83d"),
    "half a surrogate pair in the prompt": pair("half_surrogate", "half a surrogate pair", prompt=f"{MARK}\udc00"),
    "an id that is null": pair("no_id", "'id' is empty", config=IDS, id=None),
    "an id that is empty": pair("no_id", "'id' is empty", config=IDS, id=""),
    "an id that is a fraction": pair("no_id", "'id' is a number", config=IDS, id=1.5),
    "an id that is a list": pair("no_id", "'id' is a list", config=IDS, id=[MARK]),
    "no id": second(GOOD[0], "missing_field", "'id' is missing", **IDS),
    "a source that is null": Malformed(
        lambda: lines(GOOD[0] | {"source": "s"}, GOOD[0] | {"source": None}, GOOD[1] | {"source": "s"}),
        config=SOURCES, place=" line 2", words=("'source' is empty",), dropped={"no_source": 1},
    ),
    "a template's field that is a list": pair("wrong_type", "is a list", config=TEMPLATE, prompt=[MARK]),
    "a template's field that is missing": second({"response": MARK}, "missing_field", "examples.prompt_template", **TEMPLATE),
    "a system message that is a number": pair("wrong_type", "'system' is a number", config=OLD, system=1950),
    "a history that is no pairs": pair("bad_history", "'history': turn 1", config=OLD, history=[[MARK]]),
    "a history that is text": pair("bad_json_text", "'history' is not JSON", config=OLD, history=MARK),
}  # fmt: skip

# --- conversations -----------------------------------------------------------------------------------------------

CONVERSATIONS = {
    "a conversation that is prose": chat(MARK, "wrong_type", "'messages' is text, not a list"),
    "a conversation as Python prints it": chat(str(says()), "bad_json_text", "single quotes"),
    "a conversation that is half its JSON text": chat(json.dumps(says())[:-9], "bad_json_text", "is not JSON"),
    "a conversation that is a number": chat(1950, "wrong_type", "a number"),
    "a conversation that is an object": chat({"turns": says()}, "wrong_type", "an object"),
    "a list of texts": chat([MARK, MARK], "not_a_message", "message 1: a message is an object, found text"),
    "a list of lists": chat([says()], "not_a_message", "found a list"),
    "a message that is null": chat([ASKS, None, ANSWERS], "not_a_message", "message 2: a message is an object, found null"),
    "a message without a role": chat([{"content": MARK}, ANSWERS], "not_a_message", "message 1"),
    "a pair among conversations": Malformed(
        lambda: lines(GOOD_CHATS[0], GOOD[0], GOOD_CHATS[1]),
        config=CHATS,
        place=" line 2",
        words=("'messages' is missing (fields: prompt, response)",),
        dropped={"missing_field": 1},
    ),
    "a role that nobody knows": chat([ASKS, {"role": "narrator", "content": MARK}], "unknown_role", "narrator", "known are"),
    "a role that is a number": chat([{"role": 1, "content": MARK}, ANSWERS], "unknown_role", "a number"),
    "content that is a number": chat(asks(1950), "wrong_type", "message 1", "a number"),
    "content that is an object": chat(asks({"text": MARK}), "wrong_type", "an object"),
    "content that is NaN": chat(asks(float("nan")), "wrong_type", "NaN"),
    "content that is null": chat(asks(None), "no_content", "message 1", "no content"),
    "an answer of neither content nor call": chat([ASKS, {"role": "assistant"}], "no_content", "message 2", "tool_calls"),
    "an image": chat(asks([{"type": "image_url", "image_url": {"url": MARK}}]), "image_part", "message 1", "image_url"),
    "a sound": chat(asks([{"type": "input_audio", "input_audio": {}}]), "audio_part", "input_audio"),
    "a film": chat(asks([{"type": "video"}]), "video_part", "video"),
    "a file": chat(asks([{"type": "file"}]), "file_part", "file"),
    "a part that nobody knows": chat(asks([{"type": "smell"}]), "unknown_part", "smell"),
    "a part that is a number": chat(asks([1950]), "unknown_part", "a number"),
    "a part of text without text": chat(asks([{"type": "text"}]), "wrong_type", "'text' is null"),
    "half a surrogate pair in a message": chat(asks(f"{MARK}\ud83d"), "half_surrogate", "half a surrogate pair"),
    "reasoning that is an object": chat(says(reasoning_content={"x": MARK}), "wrong_type", "reasoning"),
    "a message in a message, without end": chat(json.dumps(asks("X")).replace('"X"', "[" * 99_999), "too_deep", "too deeply"),
    "calls that are prose": chat(says(tool_calls=MARK), "bad_json_text", "message 2"),
    "a call without a name": chat(says(tool_calls=[{"arguments": {}}]), "bad_tool_call", "names its function"),
    "a call of which the arguments are a list": chat(
        says(tool_calls=[{"name": "f", "arguments": [MARK]}]), "bad_tool_call", "arguments"
    ),
    "a call with NaN": chat(says(tool_calls=[{"name": "f", "arguments": {"x": float("nan")}}]), "not_json", "NaN"),
    "a role for calls with prose": chat([ASKS, {"from": "function_call", "value": MARK}], "bad_json_text", "message 2"),
    "tools that are prose": chat(says(), "bad_json_text", "'tools'", tools=MARK),
    "a tool without a name": chat(says(), "bad_tools", "'tools'", "name", tools=[{"type": "function"}]),
    "a weight between 0 and 1": chat(says(weight=0.5), "bad_mark", "message 2", "'weight'"),
    "a mark that is text": chat(says(train=MARK), "bad_mark", "'train'"),
    "marks inside a message": chat(says(train_detail=DETAILS), "bad_mark", "train_detail"),
    "a mask of another length": chat(says(), "bad_mark", "loss_mask", "2 messages", loss_mask=[1]),
}

# --- rows that are well-formed and teach nothing: dropped and counted whatever the config says ---------------------------

NOTHING = {
    "a response that is null": pair("empty_response", response=None),
    "a response of white space": pair("empty_response", response=" \n\t"),
    "a response that is an empty list": pair("empty_response", response=[]),
    "a prompt that is null": pair("empty_prompt", prompt=None),
    "a prompt that is empty": pair("empty_prompt", prompt=""),
    "a conversation that is null": chat(None, "no_assistant_message"),
    "a conversation without a message": chat([], "no_assistant_message"),
    "a conversation without an answer": chat([ASKS, ASKS], "no_assistant_message"),
    "a conversation that begins with an answer": chat([ANSWERS, ASKS], "empty_prompt"),
    "a conversation of empty answers": chat(says(""), "empty_response"),
    "a conversation of context alone": chat(says(weight=0), "nothing_learned"),
}

# --- other formats: rows -----------------------------------------------------------------------------------------

NUMBERS = {"prompt": [MARK, MARK], "response": [1, 2]}
OTHER_ROWS = {
    "a CSV row with a value too many": Malformed(
        lambda: csv("prompt,response", "a,b", f"c,d,{MARK}", "e,f"), "corpus.csv", place=" line 3", words=("3 values for 2",),
        dropped={"wrong_number_of_values": 1},
    ),
    "a CSV row with a value missing": Malformed(
        lambda: csv("prompt,response", "a,b", MARK, "e,f"), "corpus.csv", place=" line 3", words=("1 values for 2",),
        dropped={"wrong_number_of_values": 1},
    ),
    "a CSV file of other columns": Malformed(
        lambda: csv("question,answer", "a,b", "c,d"), "corpus.csv", place=" line 2", words=("examples.prompt_field=question",),
        dropped={"missing_field": 2}, kept=0,
    ),
    "a CSV file with a conversation as Python prints it": Malformed(
        lambda: csv("messages", f'"{says()}"'), "corpus.csv", CHATS, " line 2", ("not a list", "single quotes"),
        {"bad_json_text": 1}, 0,
    ),
    "an array with a number in it": Malformed(
        lambda: json.dumps([GOOD[0], 1950, GOOD[1]]).encode(), "corpus.json", place=" row 2", words=("found a number",),
        dropped={"not_an_object": 1},
    ),
    "an object around the array": Malformed(
        lambda: json.dumps({"data": GOOD}).encode(), "corpus.json", place=" line 1", words=("is missing (fields: data)",),
        dropped={"missing_field": 1}, kept=0,
    ),
    "a Parquet column of numbers": Malformed(
        lambda: parquet(NUMBERS), "corpus.parquet", place=" row 1", words=("'response' is a number",),
        dropped={"wrong_type": 2}, kept=0,
    ),
    "a Parquet column of bytes": Malformed(
        lambda: parquet({"prompt": [MARK], "response": [b"\xff\x00"]}), "corpus.parquet", place=" row 1",
        words=("'response' is bytes",), dropped={"wrong_type": 1}, kept=0,
    ),
    "a Parquet file of other columns": Malformed(
        lambda: parquet({"x": [1]}), "corpus.parquet", place=" row 1", words=("(fields: x)",),
        dropped={"missing_field": 1}, kept=0,
    ),
}  # fmt: skip

# --- whole files -------------------------------------------------------------------------------------------------

WHOLE_FILES = {
    "a gzipped file that was cut off": whole("corpus.jsonl.gz", lambda: gzip.compress(LONG)[:-900], "gzip"),
    "a gzipped file with other bytes in it": whole("corpus.jsonl.gz", lambda: spoilt(gzip.compress(LONG)), "gzip"),
    "a text that is called gzipped": whole("corpus.jsonl.gz", lambda: LONG, "gzip"),
    "a bzip2 file that was cut off": whole("corpus.jsonl.bz2", lambda: bz2.compress(LONG)[:-90], "bz2"),
    "an xz file that was cut off": whole("corpus.jsonl.xz", lambda: lzma.compress(LONG)[:-90], "xz"),
    "a Zstandard file that was cut off": whole("corpus.jsonl.zst", lambda: zstd(LONG)[:-90], "zstd"),
    "a text that is called Zstandard": whole("corpus.jsonl.zst", lambda: LONG, "zstd"),
    "an array that was cut off": whole("corpus.json", lambda: json.dumps(GOOD).encode()[:-9], "not JSON", place=" line 1"),
    "an array without its end": whole(
        "corpus.json", lambda: json.dumps(GOOD).encode()[:-1], "the end of the array is missing", place=" line 1"
    ),
    "an array without a comma": whole(
        "corpus.json", lambda: json.dumps(GOOD, indent=1).replace("},", "}").encode(), "comma", place=" line 6"
    ),
    "an array with something behind it": whole(
        "corpus.json", lambda: json.dumps(GOOD).encode() + b" [", "follows", place=" line 1"
    ),
    "two arrays": whole("corpus.json", lambda: json.dumps(GOOD).encode() * 2, "follows", place=" line 1"),
    "an empty file": whole("corpus.jsonl", lambda: b"", "empty"),
    "a CSV file with a name given twice": whole(
        "corpus.csv", lambda: csv("prompt,response,prompt", "a,b,c"), "'prompt' is the name of columns 1 and 3", place=" line 1"
    ),
    "a CSV file with a quotation mark that is never closed": whole(
        "corpus.csv", lambda: csv("prompt,response", "a,b", f'"{MARK},b', "c,d"), "not CSV", place=" line 3"
    ),
    "a CSV file in GBK": whole(
        "corpus.csv", lambda: csv("prompt,response", CHINESE[12:60]).decode().encode("gbk"), "not UTF-8", place=" line 2"
    ),
    "a Parquet file that was cut off": whole("corpus.parquet", lambda: parquet()[:-20], "not a parquet file"),
    "a Parquet file of its first bytes alone": whole("corpus.parquet", lambda: b"PAR1", "not a parquet file"),
    "a text that is called Parquet": whole("corpus.parquet", lambda: LONG, "not a parquet file"),
    "a Parquet file with spoilt pages": whole("corpus.parquet", damaged_page, "not a parquet file"),
    "a Parquet file with a name given twice": whole("corpus.parquet", twice, "several columns are called prompt"),
    "a file of a format that is not read": whole("corpus.docx", lambda: LONG, "unknown file format"),
    "no file": Malformed(None, words=("no such file",)),
}  # fmt: skip


# --- odd, and read nonetheless -------------------------------------------------------------------------------------


def beside(**fields: Any) -> Malformed:
    """Pairs with fields that are only passed on."""
    return Malformed(lambda: lines(GOOD[0] | fields, GOOD[1]))


READ = {
    "an array that is called JSON Lines": Malformed(lambda: json.dumps(GOOD).encode()),
    "lines that are called an array": Malformed(lambda: lines(*GOOD), "corpus.json"),
    "objects over several lines": Malformed(lambda: lines(*(json.dumps(row, indent=2) for row in GOOD)), "corpus.json"),
    "a byte-order mark": Malformed(lambda: b"\xef\xbb\xbf" + lines(*GOOD)),
    "a byte-order mark in the middle": Malformed(lambda: lines(GOOD[0]) + b"\xef\xbb\xbf" + lines(GOOD[1])),
    "a byte-order mark before an array": Malformed(lambda: b"\xef\xbb\xbf" + json.dumps(GOOD).encode(), "corpus.json"),
    "UTF-16 with its mark": Malformed(lambda: lines(*GOOD).decode().encode("utf-16")),
    "a CSV file in UTF-16 with its mark": Malformed(
        lambda: csv("prompt,response", "a,b", "c,d").decode().encode("utf-16"), "corpus.csv"
    ),
    "UTF-16 without its mark": Malformed(lambda: lines(*GOOD).decode().encode("utf-16-le")),
    "a CSV file in UTF-16 without its mark": Malformed(
        lambda: csv("prompt,response", "a,b", "c,d").decode().encode("utf-16-be"), "corpus.csv"
    ),
    "UTF-32 with its mark": Malformed(lambda: lines(*GOOD).decode().encode("utf-32")),
    "carriage returns": Malformed(lambda: lines(*GOOD).replace(b"\n", b"\r\n")),
    "blank lines": Malformed(lambda: b"\n \n" + lines(GOOD[0]) + b"\t\n\r\n" + lines(GOOD[1]) + b"\n"),
    "blank lines alone": Malformed(lambda: b"\n \n\n", kept=0),
    "an empty array": Malformed(lambda: b"[]", "corpus.json", kept=0),
    "no line break at the end": Malformed(lambda: lines(*GOOD)[:-1]),
    "a line separator in a text": Malformed(
        lambda: lines(json.dumps(GOOD[0] | {"x": "a\u2028b"}, ensure_ascii=False), GOOD[1])
    ),
    "a key given twice": Malformed(lambda: lines(f'{{"prompt": "x", "prompt": "{MARK}", "response": "y"}}', GOOD[1])),
    "a number beyond 64 bits": beside(x=10**40),
    "a number beyond doubles": Malformed(lambda: lines('{"prompt": "a", "response": "b", "x": 1e999}', GOOD[1])),
    "NaN where nothing reads it": beside(x=float("nan")),
    "half a surrogate pair where nothing reads it": beside(x="\ud83d"),
    "half a surrogate pair in a name": beside(**{"\ud83d": 1}),
    "a name that is empty": beside(**{"": 1}),
    "an object without a key": beside(x={}),
    "kinds that differ": Malformed(lambda: lines(GOOD[0] | {"x": 1}, GOOD[1] | {"x": {"y": [MARK, 1]}})),
    "nested hundredfold where nothing reads it": Malformed(
        lambda: lines(f'{{"prompt": "a", "response": "b", "x": {"[" * 100}{"]" * 100}}}', GOOD[1])
    ),
    "a CSV file with a nameless column": Malformed(lambda: csv(",prompt,response", "0,a,b", "1,c,d"), "corpus.csv"),
    "a CSV file with semicolons": Malformed(lambda: csv("prompt;response", "a;b", "c;d"), "corpus.csv"),
    "a CSV file with empty columns at the end": Malformed(lambda: csv("prompt,response", "a,b,,", "c,d"), "corpus.csv"),
    "a CSV file of its header alone": Malformed(lambda: csv("prompt,response"), "corpus.csv", kept=0),
    "a Parquet file without a row": Malformed(lambda: parquet({"prompt": pa.array([], pa.string())}), "corpus.parquet", kept=0),
    "a Parquet column of dates as the response": Malformed(
        lambda: parquet({"prompt": ["a"], "response": pa.array([0], pa.date32())}), "corpus.parquet", kept=1
    ),
    "a Parquet file without a column": Malformed(lambda: parquet({}), "corpus.parquet", kept=0),
    "a Parquet file with a time that Python does not have": Malformed(
        lambda: parquet({"prompt": ["a", "b"], "response": ["c", "d"], "x": pa.array([2**60] * 2, pa.timestamp("us"))}),
        "corpus.parquet",
    ),
}  # fmt: skip

ROWS = NO_ROWS | PAIRS | CONVERSATIONS | OTHER_ROWS
EVERYTHING = ROWS | NOTHING | WHOLE_FILES | READ


# --- the tests ---------------------------------------------------------------------------------------------------


def read(corpus: Malformed, folder: Path, **config: Any) -> tuple[int, Counter[str]]:
    """How many examples are read from a corpus, and the rows that are dropped, by reason."""
    path = folder / corpus.name
    if corpus.data is not None:
        path.write_bytes(corpus.data())
    config = {"held_out_fraction": 0.0} | corpus.config | config
    section = ExamplesConfig(dataset=str(path), **config)
    tables = [read_shard(shard, section) for shard in cut_corpus(section)]
    indexes = [ShardIndex.of(row_groups(table)) for table in tables]
    columns = join_columns(index.columns for index in indexes).type
    has_json, has_conversations = (any(getattr(index, name) for index in indexes) for name in ("has_json", "num_conversations"))
    made = PartColumns(columns, has_json, has_conversations, known_fields(section)[1])
    kept = [len(stored(made.of(stored(table)))) for table in tables if len(table)]
    return sum(kept), sum((index.dropped.by_reason for index in indexes), Counter[str]())


def stored(table: pa.Table) -> pa.Table:
    """A table after its way through a file."""
    return pq.read_table(io.BytesIO(table_bytes(table)))


def check(message: str, corpus: Malformed) -> None:
    """A message names the place and what was found, ends in a remedy, and quotes no text."""
    assert f"{corpus.name}{corpus.place}" in message
    for word in corpus.words:
        assert word in message
    assert re.search(r"[.)] [A-Z][^.]+", message.partition(corpus.name)[2]), "no remedy"
    assert message.endswith(".")
    assert len(message) < 1000
    assert MARK not in message


def test_there_are_sixty_and_more():
    assert len(EVERYTHING) == sum(map(len, (NO_ROWS, PAIRS, CONVERSATIONS, OTHER_ROWS, NOTHING, WHOLE_FILES, READ)))
    assert len(ROWS) + len(WHOLE_FILES) >= 60


@pytest.mark.parametrize("name", ROWS)
def test_a_bad_row_stops_the_run_with_its_place_what_was_found_and_what_to_do(name, tmp_path):
    with pytest.raises(DataError) as caught:
        read(ROWS[name], tmp_path)
    check(str(caught.value), ROWS[name])


@pytest.mark.parametrize("name", ROWS)
def test_a_bad_row_is_dropped_and_counted_where_the_config_says_so(name, tmp_path):
    assert read(ROWS[name], tmp_path, on_bad_row="drop") == (ROWS[name].kept, Counter(ROWS[name].dropped))


@pytest.mark.parametrize("name", NOTHING)
def test_a_row_that_teaches_nothing_is_dropped_and_counted_whatever_the_config_says(name, tmp_path):
    for on_bad_row in ("error", "drop"):
        assert read(NOTHING[name], tmp_path, on_bad_row=on_bad_row) == (2, Counter(NOTHING[name].dropped))


@pytest.mark.parametrize("name", WHOLE_FILES)
def test_a_file_that_cannot_be_read_stops_the_run_even_where_bad_rows_are_dropped(name, tmp_path):
    for on_bad_row in ("error", "drop"):
        with pytest.raises(S2LError) as caught:
            read(WHOLE_FILES[name], tmp_path, on_bad_row=on_bad_row)
        check(str(caught.value), WHOLE_FILES[name])


@pytest.mark.parametrize("name", READ)
def test_what_is_only_odd_is_read(name, tmp_path):
    assert read(READ[name], tmp_path) == (READ[name].kept, Counter())


# --- any value in any field ----------------------------------------------------------------------------------------

ATOMS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(min_value=-(10**30), max_value=10**30),
    st.floats(),
    st.text(st.characters(codec=None), max_size=6),
    st.sampled_from(["user", "assistant", "text", "[]", '[{"role": "user", "content": "q"}]']),
)
KEYS = st.sampled_from(
    ["role", "content", "from", "value", "type", "text", "tool_calls", "name", "arguments", "weight", "x", ""]
)
VALUES = st.recursive(
    ATOMS, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=4)), max_leaves=8
)
FIELDS = st.sampled_from(["prompt", "response", "messages", "tools", "loss_mask", "system", "history", "id", "source", "meta"])
ROW = st.dictionaries(st.one_of(FIELDS, st.text(st.characters(codec="utf-8"), max_size=3)), VALUES, max_size=5)
# Rows that are mostly good, with something odd beside it: only those get as far as a file.
MOSTLY_GOOD = st.builds(lambda row, texts: row | texts, ROW, st.sampled_from([*GOOD, {}, GOOD_CHATS[0]]))
MANY_ROWS = st.lists(MOSTLY_GOOD, min_size=1, max_size=4)
CONFIGS: list[dict[str, Any]] = [
    {},
    CHATS,
    OLD,
    IDS | SOURCES,
    CHATS | {"where": {"meta": [1, None]}},
    {"prompt_template": "{prompt}"},
]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=MANY_ROWS, config=st.sampled_from(CONFIGS))
def test_no_value_of_any_field_is_more_than_one_message(rows, config, tmp_path):
    corpus = Malformed(lambda: lines(*rows), config=config)
    message = ""
    try:
        read(corpus, tmp_path)
    except S2LError as error:
        message = str(error)
    assert not message or re.match(r".*corpus\.jsonl line \d: ", message)
    assert "\n" not in message


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=MANY_ROWS, config=st.sampled_from(CONFIGS))
def test_every_row_is_kept_or_counted_where_bad_rows_are_dropped(rows, config, tmp_path):
    kept, dropped = read(Malformed(lambda: lines(*rows), config=config), tmp_path, on_bad_row="drop", max_dropped=0.99)
    assert kept + sum(dropped.values()) == len(rows)
