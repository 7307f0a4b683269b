"""The pool's tokens in files: made once by whoever comes first, read by all, with every count of what was not learned."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from s2l_ray.config import ExamplesConfig, RunConfig, WorkerConfig
from s2l_ray.errors import DataError
from s2l_ray.storage.artifacts import Artifact, Key
from s2l_ray.storage.drafts import Draft
from s2l_ray.storage.layout import TOKENIZER
from s2l_ray.storage.places import Storage
from s2l_ray.training.batches import data_order
from s2l_ray.training.token_parts import NodePool, TokenParts, count_response_tokens
from s2l_ray.training.token_pools import PoolTokens, pool_tokens
from s2l_ray.training.token_rows import RowLimit
from s2l_ray.training.tokenizers import load_tokenizer
from s2l_ray.training.tokens import PartTokens
from tests.building import CORPUS, context_of
from tests.chat_templates import QWEN_3, chat_tokenizer

DROPPING = CORPUS.model_copy(update={"on_bad_row": "drop", "max_dropped": 0.5})
LIMIT = RowLimit(200)


def chat(number: int, num_turns: int) -> str:
    pairs = [("user", f"what is the name of {number} {turn}") for turn in range(num_turns)]
    messages = [message for pair in pairs for message in (pair, ("assistant", f"answer {number}"))]
    return json.dumps([{"role": role, "content": content} for role, content in messages])


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Three parts of conversations of one to three turns and plain pairs, one row refused, one without room for its answer."""
    run = Storage(str(tmp_path_factory.mktemp("run")))
    draft = Draft.open(run, Key("examples", 1, {}, {}))
    for part in range(3):
        texts = [chat(8 * part + row, 1 + row % 3) if row % 4 else None for row in range(8)]
        if part == 1:
            texts[1] = json.dumps([{"role": "assistant", "content": "a"}, {"role": "refused", "content": "b"}])
            texts[2] = json.dumps([{"role": "user", "content": "ü" * 300}, {"role": "assistant", "content": "a"}])
        ids = [f"id-{part}-{row}" for row in range(8)]
        columns = {"source": ["s"] * 8, "prompt": ["what "] * 8, "response": ["is it"] * 8, "split": ["pool"] * 8}
        columns |= {"messages": texts, "tools": pa.nulls(8, pa.string())}
        draft.write_table(f"part-{part:05d}.parquet", pa.table({"example_id": ids, **columns}))
    return draft.publish({"rows": 24, "conversations": 18})


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    refusing = "{% for m in messages if m.role == 'refused' %}{{ raise_exception('no such role') }}{% endfor %}"
    chat_tokenizer(refusing + QWEN_3).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The node's disk is the test's folder."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def parts_of(examples: Artifact, tokenizer: Path, folder: Path, corpus: ExamplesConfig = DROPPING) -> TokenParts:
    return TokenParts.of(examples, Storage(str(tokenizer)), LIMIT, Storage(str(folder)), corpus)


def test_tokens_that_were_made_are_read_as_they_were(examples, tokenizer, tmp_path):
    parts = parts_of(examples, tokenizer, tmp_path)
    made, read = (PoolTokens.join(map(parts.read, examples.parts())) for _ in range(2))
    assert made.row_ids == read.row_ids
    assert made.changed == read.changed
    assert made.refused == read.refused == [("id-1-1", "s", "no such role")]
    assert made.unlearned_lengths == read.unlearned_lengths
    for name in ("ids", "is_label", "starts"):
        np.testing.assert_array_equal(getattr(made.tokens, name), getattr(read.tokens, name))
    assert {"refused_by_template": 1, "no_response_token": 1}.items() <= made.changed.items()
    assert made.num_examples == 22
    assert len(made.row_ids) > 22


def test_a_node_s_file_has_what_the_parts_have_in_their_order(examples, tokenizer, tmp_path):
    parts = parts_of(examples, tokenizer, tmp_path)
    joined, pool = PoolTokens.join(map(parts.read, examples.parts())), parts.pool()
    for name in ("num_examples", "changed", "refused", "unlearned_lengths", "sizes"):
        assert getattr(pool, name) == getattr(joined, name)
    assert len(pool.tokens) == len(joined.tokens)
    assert pool.tokens.lengths.tolist() == joined.tokens.lengths.tolist()
    for row in range(len(joined.tokens)):
        for found, expected in zip(pool.tokens[row], joined.tokens[row], strict=True):
            assert (found.dtype, found.tolist()) == (expected.dtype, expected.tolist())
    for epochs in (1, 3):
        steps = epochs * len(joined.tokens) // 4
        assert pool.order(steps, 4, 42).tolist() == data_order(joined.row_ids, steps, 4, 42).tolist()
    for part, stored in [(part, parts_of(examples, tokenizer, tmp_path / "other").read(part)) for part in examples.parts()]:
        read = parts.read(part)
        assert (read.row_ids, read.num_labels.tolist()) == (stored.row_ids, stored.num_labels.tolist())
        np.testing.assert_array_equal(read.tokens.ids, stored.tokens.ids)


def the_same(pool: NodePool, joined: PoolTokens) -> bool:
    """Whether a node's file has these rows."""
    rows = [(ids.tolist(), marks.tolist()) for ids, marks in map(pool.tokens.__getitem__, range(len(pool.tokens)))]
    return rows == [(ids.tolist(), marks.tolist()) for ids, marks in map(joined.tokens.__getitem__, range(len(joined.tokens)))]


def damage(path: Path, what: bytes) -> None:
    """Flip a bit where these bytes stand in a file, in a copy of it that takes its place."""
    whole = bytearray(path.read_bytes())
    whole[whole.index(what)] ^= 1
    path.unlink()
    path.write_bytes(whole)


def test_a_damaged_file_of_a_node_is_neither_scored_nor_trained_on(examples, tokenizer, tmp_path):
    parts = parts_of(examples, tokenizer, tmp_path)
    joined = PoolTokens.join(map(parts.read, examples.parts()))
    assert the_same(parts.pool(), joined)
    damage(parts.on_node.folder / f"{parts.name}-tokens", joined.tokens.ids[3:9].astype(np.uint16).tobytes())
    assert not the_same(parts.pool(check=False), joined), "or nothing was damaged"
    assert the_same_ids([parts.read(part) for part in examples.parts()], joined)
    assert the_same(parts.pool(), joined)
    assert the_same(parts.pool(check=False), joined)


def the_same_ids(parts: list[PartTokens], joined: PoolTokens) -> bool:
    return PoolTokens.join(parts).tokens.ids.tolist() == joined.tokens.ids.tolist()


@pytest.mark.parametrize("how", ["truncated", "another", "of an older version"])
def test_a_damaged_part_is_made_again(examples, tokenizer, tmp_path, how):
    parts = parts_of(examples, tokenizer, tmp_path)
    first, second = (parts.read(part) for part in examples.parts()[:2])
    path = tmp_path / "tokens" / parts.name / examples.parts()[0]
    whole = path.read_bytes()
    if how == "truncated":
        path.write_bytes(whole[:-5])
    else:
        table = pq.read_table(path)
        metadata = table.schema.metadata if how == "another" else {b"counted": table.schema.metadata[b"counted"]}
        rows = table[1:] if how == "another" else table
        pq.write_table(rows.replace_schema_metadata(metadata), path)
    assert parts.read(examples.parts()[0]).row_ids == first.row_ids
    assert path.read_bytes() == whole
    assert parts.read(examples.parts()[1]).row_ids == second.row_ids


def test_a_node_fetches_the_tokens_from_object_storage_once(examples, tokenizer, bucket):
    parts = TokenParts.of(examples, Storage(str(tokenizer)), LIMIT, Storage(f"{bucket}/run/.work"), DROPPING)
    parts.make(0, 2)
    parts.make(1, 2)
    assert parts.storage.names(parts.name) == examples.parts()
    joined = PoolTokens.join(map(parts.read, examples.parts()))
    assert the_same(parts.pool(), joined)
    parts.storage.delete(parts.name)
    assert the_same(parts.pool(), joined)
    assert the_same_ids([parts.read(part) for part in examples.parts()], joined)
    assert parts.storage.names(parts.name) == []
    parts.on_node.delete()
    assert the_same_ids([parts.read(part) for part in examples.parts()], joined)
    assert parts.storage.names(parts.name) == examples.parts()


def test_the_file_of_a_part_has_a_line_for_each_row_under_its_example_s_id(examples, tokenizer, tmp_path):
    parts = parts_of(examples, tokenizer, tmp_path)
    pool = PoolTokens.join(map(parts.read, examples.parts()))
    files = sorted((tmp_path / "tokens" / parts.name).glob("part-*.parquet"))
    lines = [line for file in files for line in pq.read_table(file).to_pylist()]
    assert set(lines[0]) == {"example_id", "source", "tokens", "is_label"}
    assert [line["example_id"] for line in lines] == [name.partition("#")[0] for name in pool.row_ids]
    assert [line["tokens"] for line in lines] == [pool.tokens[row][0].tolist() for row in range(len(lines))]


def test_the_target_sees_the_rows_that_the_proxy_saw(examples, tokenizer, tmp_path):
    of_proxy = PoolTokens.join(map(parts_of(examples, tokenizer, tmp_path).read, examples.parts()))
    keep = {"id-0-0", "id-0-2", "id-2-5"}
    of_target = pool_tokens(examples, load_tokenizer(tokenizer), LIMIT, keep)
    rows = [row for row, name in enumerate(of_proxy.row_ids) if name.partition("#")[0] in keep]
    assert of_target.row_ids == [of_proxy.row_ids[row] for row in rows]
    np.testing.assert_array_equal(of_target.tokens.ids, of_proxy.tokens.take(np.array(rows)).ids)
    assert of_target.num_examples == 3


def test_the_rows_of_one_conversation_are_trained_on_in_different_steps(examples, tokenizer, tmp_path):
    parts = parts_of(examples, tokenizer, tmp_path)
    names = [name for part in examples.parts() for name in parts.read(part).row_ids]
    order = parts.pool().order(len(names), 1, 42)
    split = [row for row, name in enumerate(names) if name.startswith("id-2-5#")]
    places = sorted(int(np.flatnonzero(order == row)[0]) for row in split)
    assert len(split) == 3
    assert places[2] - places[0] > 2


def test_a_refused_row_is_an_error_even_where_its_part_was_made_for_a_run_that_drops_it(examples, tokenizer, tmp_path):
    parts_of(examples, tokenizer, tmp_path).pool()
    with pytest.raises(DataError, match="example 'id-1-1': the chat template refuses it"):
        parts_of(examples, tokenizer, tmp_path, CORPUS).pool()


def test_parts_are_made_on_all_cpus_once_and_are_those_of_one_process(examples, tokenizer, tmp_path, ray_session):
    alone = parts_of(examples, tokenizer, tmp_path / "alone")
    alone.pool()
    parts = parts_of(examples, tokenizer, tmp_path / "all")
    parts.read("part-00001.parquet")
    first = parts.storage.info(f"{parts.name}/part-00001.parquet").mtime
    parts.make_all(WorkerConfig())
    assert parts.storage.info(f"{parts.name}/part-00001.parquet").mtime == first
    for part in examples.parts():
        assert parts.storage.read(f"{parts.name}/{part}") == alone.storage.read(f"{alone.name}/{part}")
    with pytest.raises(DataError, match="example 'id-1-1'"):
        parts_of(examples, tokenizer, tmp_path / "refusing", CORPUS).make_all(WorkerConfig())


def test_response_tokens_of_a_split_example_are_counted_together_and_none_where_nothing_is_left(
    examples, tokenizer, tmp_path, ray_session
):
    proxy = Draft.open(Storage(str(tmp_path)), Key("proxy", 1, {}, {}))
    proxy.add(*proxy.storage.upload(tokenizer, TOKENIZER))
    target: dict[str, Any] = {"model": {"scratch": {"layers": 1, "hidden": 8, "heads": 1}}, "max_tokens": LIMIT.max_tokens}
    config: RunConfig = context_of(proxy, target=target, examples=DROPPING).config
    inputs = {"examples": examples, "proxy": proxy.publish({})}
    ids = pa.array(["id-2-5", "id-1-2", "id-0-0"])
    found = count_response_tokens(config, inputs, ids).tolist()
    part = parts_of(examples, tokenizer, tmp_path / "parts").read("part-00002.parquet")
    assert found[0] == part.num_labels[part.example_ids.to_pylist().index("id-2-5")]
    assert found[1] == 0
    assert found[2] > 0
