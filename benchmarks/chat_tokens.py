"""Making conversations into tokens and labels, against `tokenizer.apply_chat_template(chats, tokenize=True)` alone.

    python benchmarks/chat_tokens.py DATA_DIR TOKENIZER [--chats 100000] [--pairs 5]

DATA_DIR holds JSON Lines files of `instruction, input, output`; three rows make a chat of six turns. TOKENIZER is a folder or
Hub id with a chat template. Both ways get the same parts of 512 chats, one after the other and in turns first, in one process
whose tokenizer has all cores: what disturbs the machine disturbs both. Ours parses the messages' JSON, finds the labels and
cuts; that its tokens are the template's is checked. Each pair of passes adds a line to `results/chat_tokens.jsonl`; the same
command again adds those that are missing.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from s2l_ray.storage.provenance import provenance
from s2l_ray.training.token_rows import RowLimit
from s2l_ray.training.tokenizers import load_tokenizer
from s2l_ray.training.tokens import encode_table

RESULTS = Path(__file__).parent / "results" / "chat_tokens.jsonl"
FILES = ("gsm8k", "dolly", "medquad", "mathqa")
PART, TURNS = 512, 6
NO_LIMIT = RowLimit(1_000_000)

Chat = list[dict[str, str]]


def parts(data: Path, num_chats: int) -> Iterator[list[Chat]]:
    """Chats of six turns, a question and an answer of the corpus each, in parts."""
    rows = [json.loads(line) for name in FILES for line in (data / f"{name}.jsonl").open(encoding="utf-8")]
    generator = random.Random(0)  # noqa: S311
    for start in range(0, num_chats, PART):
        chats = []
        for _ in range(min(PART, num_chats - start)):
            turns = [generator.choice(rows) for _ in range(TURNS // 2)]
            asked = ["\n".join(filter(None, [row["instruction"], row.get("input")])) for row in turns]
            pairs = zip(asked, (row["output"] for row in turns), strict=True)
            chats.append([m for q, a in pairs for m in ({"role": "user", "content": q}, {"role": "assistant", "content": a})])
        yield chats


def as_table(chats: list[Chat]) -> pa.Table:
    """As a part of `examples/` has them."""
    ids = [str(number) for number in range(len(chats))]
    columns = dict.fromkeys(("example_id", "source", "prompt", "response"), ids)
    messages = [json.dumps(chat, ensure_ascii=False) for chat in chats]
    return pa.table(columns | {"messages": messages, "tools": pa.nulls(len(ids), pa.string())})


def timed(function: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[Any, float, float]:
    """The result, seconds by the clock, and of all threads."""
    wall, busy = time.perf_counter(), time.process_time()
    result = function(*arguments, **options)
    return result, time.perf_counter() - wall, time.process_time() - busy


def one_pair(data: Path, tokenizer: Any, num_chats: int) -> dict[str, Any]:
    """One pass of each way over all chats."""
    seconds = {"alone": 0.0, "ours": 0.0}
    busy = {"alone": 0.0, "ours": 0.0}
    tokens = 0
    for number, chats in enumerate(parts(data, num_chats)):
        table, found = as_table(chats), {}
        ways: list[tuple[str, Callable[[], Any]]] = [
            ("alone", lambda chats=chats: tokenizer.apply_chat_template(chats, tokenize=True)["input_ids"]),
            ("ours", lambda table=table: encode_table(tokenizer, table, NO_LIMIT)),
        ]
        for name, way in ways[:: 1 if number % 2 else -1]:
            found[name], wall, cpu = timed(way)
            seconds[name] += wall
            busy[name] += cpu
        assert found["ours"].tokens.ids.tolist() == [token for ids in found["alone"] for token in ids]
        assert int(found["ours"].num_labels.min()) > 0
        tokens += len(found["ours"].tokens.ids)
    return {
        "chats": num_chats,
        "tokens": tokens,
        "seconds": seconds,
        "busy_seconds": busy,
        "ratio": seconds["ours"] / seconds["alone"],
        "busy_ratio": busy["ours"] / busy["alone"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("tokenizer")
    parser.add_argument("--chats", type=int, default=100_000)
    parser.add_argument("--pairs", type=int, default=5)
    arguments = parser.parse_args()
    tokenizer = load_tokenizer(arguments.tokenizer)
    lines = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
    done = [line for line in map(json.loads, lines) if line["chats"] == arguments.chats]
    while len(done) < arguments.pairs:
        done.append(
            one_pair(arguments.data, tokenizer, arguments.chats) | {"cores": os.cpu_count(), "provenance": provenance()}
        )
        print(json.dumps({key: done[-1][key] for key in ("seconds", "busy_seconds", "ratio", "busy_ratio")}), flush=True)
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(done[-1]) + "\n")
    for name in ("ratio", "busy_ratio"):
        print(name, round(statistics.median(line[name] for line in done), 3), "median of", len(done))


if __name__ == "__main__":
    main()
