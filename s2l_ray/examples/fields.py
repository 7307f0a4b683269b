"""From a row to an example: which fields are its prompt, response, source and id, and what is wrong with them.

Pure functions over `CorpusRows`. A row that cannot be learned from is dropped with a reason. A row that contradicts the
config is a DataError that names file, row and field, what was found, and what to set.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from s2l_ray.config import ExamplesConfig, ReasoningGymDataset, template_fields
from s2l_ray.errors import DataError
from s2l_ray.examples.hashes import DIGEST_BYTES, canonical_json, digest_of, split_of
from s2l_ray.examples.rows import MISSING, Columns, CorpusRows, kind_of

# Reasons for dropping a row.
DUPLICATE, FILTERED, NO_ASSISTANT = "duplicate", "filtered", "no_assistant_message"
EMPTY_PROMPT, EMPTY_RESPONSE = "empty_prompt", "empty_response"

MESSAGE_TYPE = pa.struct([("role", pa.string()), ("content", pa.string())])
# What other corpora call these fields, the most common name first.
USUAL_NAMES = {
    "prompt_field": ("prompt", "instruction", "question", "query", "problem", "input"),
    "response_field": ("response", "output", "answer", "completion", "solution", "target", "text"),
    "messages_field": ("messages", "conversations", "conversation"),
    "source_field": ("source", "dataset"),
    "id_field": ("id", "uid"),
}
# What happens without these keys.
IF_LEFT_OUT = {"id_field": "ids are then made from the content", "source_field": "the source is then the file's name"}


@dataclass(frozen=True, slots=True)
class Texts:
    """What is learned from a row. A conversation is learned from its messages; prompt and response only show it to people and
    decide its split."""

    prompt: str
    response: str
    messages: list[dict[str, str]] | None = None

    def digest(self) -> bytes:
        """Hash of the content: the id of a row without one, and equal for exact copies."""
        if self.messages is None:
            return digest_of(f"{self.prompt}\0{self.response}")
        return digest_of(canonical_json(self.messages))

    def reason_to_drop(self) -> str | None:
        """Why nothing can be learned from it, None where something can."""
        if self.messages is not None and not any(message["role"] == "assistant" for message in self.messages):
            return NO_ASSISTANT
        if not self.prompt.strip():
            return EMPTY_PROMPT
        return None if self.response.strip() else EMPTY_RESPONSE


@dataclass(frozen=True)
class Examples:
    """The examples in some rows, in their order."""

    table: pa.Table
    """example_id, source, prompt, response, split, messages (only of conversations), two hashes of DIGEST_BYTES, `content`
    (equal for exact copies) and `row` (equal for rows that are equal in every field), and original (a struct of all fields)."""
    dropped: Counter[str]
    """The number of rows that are no examples, by reason."""
    columns: Columns


def normalise(rows: CorpusRows, config: ExamplesConfig) -> Examples:
    """The examples in some rows. Raises DataError for a row that contradicts the config."""
    config = _for_generated(config) if isinstance(config.dataset, ReasoningGymDataset) else config
    text_of = _conversations(rows, config) if config.messages_field else _pairs(rows, config)
    id_of, source_of, is_wanted = _ids(rows, config.id_field), _sources(rows, config.source_field), _filter(rows, config.where)
    dropped: Counter[str] = Counter()
    kept: list[int] = []
    examples: list[Texts] = []
    for row in range(len(rows)):
        if not is_wanted(row):
            dropped[FILTERED] += 1
            continue
        texts = text_of(row)
        reason = texts.reason_to_drop()
        if reason is not None:
            dropped[reason] += 1
            continue
        kept.append(row)
        examples.append(texts)
    ids, sources = [id_of(row) for row in kept], [source_of(row) for row in kept]
    # Before the texts are hashed: where one is not valid Unicode, this names the field.
    original = rows.table(kept)
    digests = [texts.digest() for texts in examples]
    columns = {
        "example_id": pa.array([given or digest.hex() for given, digest in zip(ids, digests, strict=True)], pa.string()),
        "source": pa.array(sources, pa.string()),
        "prompt": pa.array([texts.prompt for texts in examples], pa.string()),
        "response": pa.array([texts.response for texts in examples], pa.string()),
        "split": pa.array([split_of(texts.prompt, config.held_out_fraction) for texts in examples], pa.string()),
    }
    if config.messages_field:
        columns["messages"] = pa.array([texts.messages for texts in examples], pa.list_(MESSAGE_TYPE))
    columns["content"] = pa.array(digests, pa.binary(DIGEST_BYTES))
    columns["row"] = pa.array([digest_of(canonical_json(rows.record(row))) for row in kept], pa.binary(DIGEST_BYTES))
    columns["original"] = original.to_struct_array() if kept else pa.array([], pa.struct([]))
    return Examples(pa.table(columns), dropped, Columns(columns["original"].type, rows.ranks(kept)))


def _for_generated(config: ExamplesConfig) -> ExamplesConfig:
    """The config with the fields of reasoning-gym's rows, which can be mapped in only one way."""
    fields: dict[str, Any] = {"prompt_field": "question", "response_field": "answer", "source_field": "source"}
    unused = dict.fromkeys(("id_field", "messages_field", "prompt_template", "prompt_template_if_empty"))
    return config.model_copy(update=fields | unused)


# --- fields ------------------------------------------------------------------------------------------------------


def _pairs(rows: CorpusRows, config: ExamplesConfig) -> Callable[[int], Texts]:
    """Reads a prompt and its response."""
    response = _text(rows, config.response_field, "response_field")
    if config.prompt_template is None:
        prompt = _text(rows, config.prompt_field, "prompt_field")
    else:
        prompt = _from_template(rows, config.prompt_template, config.prompt_template_if_empty)
    return lambda row: Texts(prompt(row), response(row))


def _text(rows: CorpusRows, field: str, key: str) -> Callable[[int], str]:
    """Reads a text field; null is empty text."""
    values = rows.values(field)

    def read(row: int) -> str:
        value = values[row]
        if isinstance(value, str):
            return value
        if value is MISSING:
            raise _missing(rows, row, field, key)
        if value is None:
            return ""
        raise _wrong_type(rows, row, field, key, value)

    return read


def _from_template(rows: CorpusRows, template: str, template_if_empty: str | None) -> Callable[[int], str]:
    """Reads a prompt that is put together from several fields; empty where all of them are."""
    names = template_fields(template)
    readers = {name: _template_field(rows, name) for name in (*names, *template_fields(template_if_empty or ""))}

    def read(row: int) -> str:
        values = {name: reader(row) for name, reader in readers.items()}
        if not any(value.strip() for value in values.values()):
            return ""
        has_all = all(values[name].strip() for name in names)
        return (template if has_all or template_if_empty is None else template_if_empty).format_map(values)

    return read


def _template_field(rows: CorpusRows, field: str) -> Callable[[int], str]:
    """Reads text or a whole number for a template."""
    text, values = _text(rows, field, "prompt_template"), rows.values(field)
    return lambda row: str(values[row]) if _is_integer(values[row]) else text(row)


def _conversations(rows: CorpusRows, config: ExamplesConfig) -> Callable[[int], Texts]:
    """Reads a conversation. Its prompt is all messages before the assistant's first, its response all of the assistant's."""
    field = config.messages_field or ""
    values = rows.values(field)

    def read(row: int) -> Texts:
        if values[row] is MISSING:
            raise _missing(rows, row, field, "messages_field")
        if not isinstance(values[row], list | None):
            raise _wrong_type(rows, row, field, "messages_field", values[row])
        messages = [_message(rows, row, field, number, message) for number, message in enumerate(values[row] or [])]
        roles = [message["role"] for message in messages]
        first = roles.index("assistant") if "assistant" in roles else len(roles)
        answers = [message["content"] for message in messages if message["role"] == "assistant"]
        return Texts("\n".join(message["content"] for message in messages[:first]), "\n".join(answers), messages)

    return read


def _message(rows: CorpusRows, row: int, field: str, number: int, message: Any) -> dict[str, str]:
    """A message with only its role and content."""
    if isinstance(message, dict):
        role, content = message.get("role"), message.get("content")
        if isinstance(role, str) and isinstance(content, str):
            return {"role": role, "content": content}
        found = ", ".join(f"{key}: {kind_of(value)}" for key, value in message.items())
    else:
        found = kind_of(message)
    raise DataError(
        f"{rows.place(row)}: field '{field}', message {number + 1}: a message is {{role, content}}, both text, "
        f"found {found or 'nothing'}. Convert the conversations, or set examples.messages_field to another field."
    )


def _ids(rows: CorpusRows, field: str | None) -> Callable[[int], str | None]:
    """Reads a row's own id, None where ids are made from the content."""
    if field is None:
        return lambda _: None
    return _label(rows, field, "id_field", "an id is text or a whole number. Fix the row")


def _sources(rows: CorpusRows, field: str | None) -> Callable[[int], str]:
    """Reads the source of a row: its field, or the file that the row is in."""
    if field is None:
        return lambda _: rows.source
    return _label(rows, field, "source_field", "a source is a name. Name every row's source")


def _label(rows: CorpusRows, field: str, key: str, needed: str) -> Callable[[int], str]:
    """Reads text or a whole number that is not empty."""
    values = rows.values(field)

    def read(row: int) -> str:
        value = values[row]
        if value is MISSING:
            raise _missing(rows, row, field, key)
        if _is_integer(value) or (isinstance(value, str) and value):
            return str(value)
        found = "empty" if value in (None, "") else kind_of(value)
        remedy = f"{needed}, or leave examples.{key} out: {IF_LEFT_OUT[key]}."
        raise DataError(f"{rows.place(row)}: field '{field}' is {found}; {remedy}")

    return read


def _filter(rows: CorpusRows, where: dict[str, Any]) -> Callable[[int], bool]:
    """Whether a row has the wanted values. A missing field counts as null; a number also matches its text, as in CSV files."""
    conditions = []
    for field, wanted in where.items():
        values = wanted if isinstance(wanted, list) else [wanted]
        conditions.append((rows.values(field), values, {str(value) for value in values if value is not None}))

    def is_wanted(row: int) -> bool:
        for values, wanted, texts in conditions:
            value = None if values[row] is MISSING else values[row]
            if not (value in texts if isinstance(value, str) else value in wanted):
                return False
        return True

    return is_wanted


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


# --- what is wrong -----------------------------------------------------------------------------------------------


def _missing(rows: CorpusRows, row: int, field: str, key: str) -> DataError:
    """The error for a field that a row does not have; it names the field that was probably meant."""
    fields = rows.fields(row)
    usual = [name for name in USUAL_NAMES.get(key, ()) if name in fields]
    guess = next(iter(difflib.get_close_matches(field, fields, n=1, cutoff=0.75) or usual), None)
    if key == "prompt_template":
        remedy = f"Write {{{guess}}} in examples.prompt_template." if guess else "Use these in examples.prompt_template."
    elif guess:
        remedy = f"Set examples.{key}={guess}."
    else:
        remedy = f"Set examples.{key} to one of them" + (
            f", or leave it out: {IF_LEFT_OUT[key]}." if key in IF_LEFT_OUT else "."
        )
    return DataError(f"{rows.place(row)}: field '{field}' is missing (fields: {', '.join(fields) or 'none'}). {remedy}")


def _wrong_type(rows: CorpusRows, row: int, field: str, key: str, value: Any) -> DataError:
    """The error for a field whose value is of another type than needed."""
    is_conversation = isinstance(value, list) and value and all(isinstance(item, dict) for item in value)
    if key == "messages_field":
        wanted, remedy = "a list of messages", f"Set examples.{key} to the field with the conversation."
    elif is_conversation:
        wanted, remedy = "text", f"It looks like a conversation: set examples.messages_field={field}."
    else:
        wanted, remedy = "text", f"Write it as text in the corpus, or set examples.{key} to a field of text."
    return DataError(f"{rows.place(row)}: field '{field}' is {kind_of(value)}, not {wanted}. {remedy}")
