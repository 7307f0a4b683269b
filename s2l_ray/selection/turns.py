"""The examples of a subset as conversations, for trainers: from the run's own examples, or from columns of the subset.

A message is canonical: `role`, `content`, and where they are there `tool_calls` (arguments an object, or text where it is no
object), `reasoning_content`, `name`, `tool_call_id`, and `weight: 0` where an assistant's message is context and not learned.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from s2l_ray.errors import ArtifactError, ConfigError, DataError
from s2l_ray.examples.conversations import Dialect, read_conversation
from s2l_ray.examples.reading import fetch_examples
from s2l_ray.examples.row_problems import RowProblem
from s2l_ray.examples.tool_calls import read_tools
from s2l_ray.storage.artifacts import Artifact
from s2l_ray.storage.places import Storage

Message = dict[str, Any]
Notes = Counter[str]
"""What a format writes otherwise than it was, in words -> how many examples."""

_COLUMNS = ["messages", "tools", "prompt", "response"]
_BATCH_ROWS = 1_024
_PLAIN_KEYS = {"role", "content", "weight"}


@dataclass(frozen=True)
class DataPlace:
    """Where a trainer finds the rows: a file in a folder, or the same file of a dataset on the Hub."""

    folder: str = ""
    name: str = ""
    is_on_hub: bool = False
    contents: str = ""
    """A hash that stands for the rows."""


class InexpressibleError(Exception):
    """A format has no form for an example; the message says why, without its text."""


@dataclass(frozen=True)
class SubsetExample:
    """An example as it was learned: a conversation, or a pair of texts without any template."""

    example_id: str
    prompt: str
    response: str
    messages: list[Message] | None
    tools: list[Any] | None


@dataclass(frozen=True)
class Contents:
    """What there is in a subset: it decides the form of a whole file, since a trainer wants one form in all rows."""

    has_conversations: bool = False
    has_context_turns: bool = False
    """Whether a message of the assistant is not learned."""

    is_plain: bool = True
    """Whether messages have nothing but role and content, and there are no tools."""

    @classmethod
    def of(cls, examples: Iterator[SubsetExample]) -> Contents:
        """The contents of all these examples together."""
        has_conversations, has_context_turns, is_plain = False, False, True
        for example in examples:
            for message in example.messages or ():
                has_conversations = True
                has_context_turns |= message["role"] == "assistant" and not is_learned(message)
                is_plain &= message.keys() <= _PLAIN_KEYS and isinstance(message.get("content"), str)
            is_plain &= not example.tools
        return cls(has_conversations, has_context_turns, is_plain)


def open_examples(run: Storage, selection: Artifact, path: str) -> Callable[[], Iterator[SubsetExample]]:
    """Streams the examples of a subset in its order, as often as it is called; memory is for the ids and one part.

    Raises ArtifactError where the examples are not those of the selection, ConfigError where there is nothing to make
    conversations of: neither a run's examples nor the columns that say the same. The stream raises DataError naming an
    example whose columns are no conversation.
    """
    made_from = selection.manifest["inputs"].get("examples")
    if made_from is not None:
        examples = Artifact.read(run.child("examples"))
        if examples.identity != made_from:
            raise ArtifactError(f"{examples.storage.uri}: not the examples that {selection.storage.uri} was chosen from.")
        with selection.root.explained(path), selection.root.open(path) as source:
            ids = pq.ParquetFile(source).read([selection.summary["columns"]["example_id"]]).column(0).combine_chunks()
        return lambda: _of_run(examples, ids)
    with selection.root.explained(path), selection.root.open(path) as source:
        names = pq.read_schema(source).names
    if "messages" not in names and not {"prompt", "response"} <= set(names):
        raise ConfigError(
            f"{selection.root.uri}/{path}: has no column messages, and not prompt and response, to make conversations of "
            f"(columns: {', '.join(names)}). Use --format jsonl or parquet, or record trajectories with such columns."
        )
    return lambda: _of_columns(selection, path, [name for name in _COLUMNS if name in names])


def _of_run(examples: Artifact, ids: pa.Array) -> Iterator[SubsetExample]:
    for table in fetch_examples(examples, ids, _COLUMNS):
        for row in table.to_pylist():
            messages, tools = (None if row.get(name) is None else json.loads(row[name]) for name in ("messages", "tools"))
            yield SubsetExample(row["example_id"], row["prompt"], row["response"], messages, tools)


def _of_columns(selection: Artifact, path: str, columns: list[str]) -> Iterator[SubsetExample]:
    """The same from the columns of the subset itself, where anybody's trajectories brought them."""
    id_name, dialect = selection.summary["columns"]["example_id"], Dialect()
    with selection.root.explained(path), selection.root.open(path) as source:
        for batch in pq.ParquetFile(source).iter_batches(_BATCH_ROWS, columns=[id_name, *columns]):
            for row in batch.to_pylist():
                try:
                    yield _of_row(str(row[id_name]), row, dialect)
                except RowProblem as problem:
                    place = f"{selection.root.uri}/{path}: example {row[id_name]}"
                    raise DataError(f"{place}: {problem} Or use --format jsonl or parquet.") from problem


def _of_row(example_id: str, row: dict[str, Any], dialect: Dialect) -> SubsetExample:
    """An example from columns of any usual form. Raises RowProblem."""
    prompt, response = row.get("prompt"), row.get("response")
    if row.get("messages") is None:
        if not (isinstance(prompt, str) and isinstance(response, str)):
            raise RowProblem("wrong_type", "has neither messages nor the texts prompt and response.")
        return SubsetExample(example_id, prompt, response, None, None)
    try:
        talk = read_conversation(_present(row["messages"]), dialect)
    except RowProblem as problem:
        raise problem.at("messages: ") from None
    try:
        tools = read_tools(_present(row["tools"])) if row.get("tools") else talk.tools
    except RowProblem as problem:
        raise problem.at("tools: ") from None
    return SubsetExample(example_id, "", "", talk.messages, tools or None)


def _present(value: Any) -> Any:
    """A value of Arrow without the keys that it has only because another row has them."""
    if isinstance(value, dict):
        return {key: _present(inner) for key, inner in value.items() if inner is not None}
    return [_present(inner) for inner in value] if isinstance(value, list) else value


def is_learned(message: Message) -> bool:
    """Whether a message's tokens are labels."""
    return bool(message["role"] == "assistant" and message.get("weight", 1) != 0)


def as_conversation(example: SubsetExample, notes: Notes) -> list[Message]:
    """The example's messages; of a pair those that say the same. Raises InexpressibleError where none is learned."""
    if example.messages is None:
        notes["pairs of texts became a user's and an assistant's message"] += 1
        return [{"role": "user", "content": example.prompt}, {"role": "assistant", "content": example.response}]
    if not any(map(is_learned, example.messages)):
        raise InexpressibleError("no message is learned")
    return example.messages


def until_last_answer(messages: list[Message], notes: Notes) -> list[Message]:
    """The messages up to the last one that is learned: what follows changes nothing of what is learned."""
    last = max(number for number, message in enumerate(messages) if is_learned(message))
    if last + 1 < len(messages):
        notes["what follows the last learned message was left out"] += 1
    return messages[: last + 1]


def unrolled(messages: list[Message]) -> Iterator[tuple[list[Message], list[Message]]]:
    """For each run of learned messages: all that is before it, and the run."""
    start = 0
    while start < len(messages):
        stop = start
        while stop < len(messages) and is_learned(messages[stop]):
            stop += 1
        if stop > start:
            yield messages[:start], messages[start:stop]
        start = stop + 1


def without_weight(messages: list[Message]) -> list[Message]:
    """Messages as those formats have them that mark learned turns in another way."""
    return [{key: value for key, value in message.items() if key != "weight"} for message in messages]
