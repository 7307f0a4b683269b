"""From text to tokens: which tokens a model sees, and which of them are learned."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from s2l_ray.errors import ConfigError, DataError
from s2l_ray.training.token_pools import PoolTokens, row_counts
from s2l_ray.training.token_rows import RowLimit, TokenRows
from s2l_ray.training.tokenizers import load_tokenizer
from s2l_ray.training.tokens import PartTokens, encode, encode_table, generation_prompt
from tests.building import CORPUS

WORDS = ["<end>", "<start>", "<unk>", "what", "is", "it", "a", "b", "c"]


def tokenizer(adds_start: bool = False, **options: object) -> PreTrainedTokenizerFast:
    """One token a word, so that ids can be read in the tests."""
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if adds_start:
        made.post_processor = processors.TemplateProcessing(single="<start> $A", special_tokens=[("<start>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<end>", pad_token="<end>", bos_token="<start>", unk_token="<unk>", **options
    )


def words(rows: TokenRows, row: int = 0) -> tuple[str, str]:
    """A row's text, and the part of it that is learned."""
    ids, is_label = rows[row]
    text = [WORDS[i] for i in ids]
    return " ".join(text), " ".join(word for word, marked in zip(text, is_label, strict=True) if marked)


def pairs(prompts: list[str], responses: list[str], limit: int = 99, way: str = "right", **options: bool) -> PartTokens:
    """Pairs of an examples part as tokens."""
    ids = [f"id{number}" for number in range(len(prompts))]
    table = pa.table({"example_id": ids, "source": ids, "prompt": prompts, "response": responses})
    return encode_table(tokenizer(**options), table, RowLimit(limit, way))


def pair(*texts: str, **options: Any) -> tuple[str, str]:
    return words(pairs([texts[0]], [texts[1]], **options).tokens)


def test_the_response_and_the_end_are_learned_and_the_prompt_is_not():
    assert pair("what is it", "a b") == ("what is it a b <end>", "a b <end>")


def test_the_start_token_is_there_only_if_the_tokenizer_adds_one():
    assert pair("what", "a", adds_start=True) == ("<start> what a <end>", "a <end>")
    assert pair("what", "a", adds_start=False) == ("what a <end>", "a <end>")


def test_a_cut_response_has_no_end():
    assert pair("what is", "a b c", limit=4) == ("what is a b", "a b")


def test_a_long_prompt_may_be_cut_at_its_start_and_the_start_token_stays():
    assert pair("what is it", "a b", limit=5, way="left_prompt", adds_start=True) == ("<start> it a b <end>", "a b <end>")
    assert pair("what is it", "a b", limit=4, way="left_prompt") == ("it a b <end>", "a b <end>")
    assert pair("what is it", "a b", limit=3, way="left_prompt", adds_start=True) == ("<start> it a", "a")


def test_a_response_that_is_cut_off_whole_is_dropped_and_counted():
    found = pairs(["what is it", "what", "is"], ["a", "a b c", "b"], limit=3)
    assert found.example_ids.to_pylist() == ["id1", "id2"]
    assert words(found.tokens, 0) == ("what a b", "a b")
    assert found.changed == {"no_response_token": 1, "cut": 1}
    assert row_counts(found.changed, []) == {"dropped": {"no_response_token": 1}, "shortened": {"cut": 1}}


def test_where_no_response_token_is_left_at_all_the_limit_and_the_median_length_are_named():
    pool = PoolTokens.join([pairs(["what is it", "what is it a"], ["a", "a b c"], limit=3)])
    with pytest.raises(
        DataError, match=r"proxy\.max_tokens=3: no response token .* any of 2 examples, .* median length is 6 tok"
    ):
        pool.check("proxy", RowLimit(3), CORPUS)


def test_a_row_that_ends_with_the_end_s_token_where_it_was_cut_counts_as_cut():
    assert pairs(["what"], ["a <end> b"], limit=3).changed == {"cut": 1}
    assert pairs(["what"], ["a b"], limit=4).changed == {}


def test_the_first_token_of_a_row_is_never_learned():
    """Nothing predicts it."""
    assert pair("", "a b") == ("a b <end>", "b <end>")


def test_a_model_answers_after_everything_before_the_first_label():
    rows = encode(tokenizer(adds_start=True), ["what is"], ["a"])
    assert [WORDS[i] for i in generation_prompt(*rows[0])] == ["<start>", "what", "is"]


def test_rows_laid_end_to_end_come_back_as_they_were():
    parts = [pairs(["what", "is it"], ["a", "b c"]).tokens, pairs([], []).tokens]
    joined = TokenRows.join([*parts, parts[0]])
    assert len(joined) == 4
    assert [words(joined, row) for row in (0, 1)] == [words(joined, row) for row in (2, 3)]
    assert joined.lengths.tolist() == [3, 5, 3, 5]
    assert joined.num_labels.tolist() == [2, 3, 2, 3]
    assert words(joined.take(np.array([1]))) == words(joined, 1)


def test_a_tokenizer_is_loaded_from_a_folder_with_something_to_pad_by(tmp_path):
    plain = tokenizer()
    plain.pad_token = None
    plain.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).pad_token == "<end>"


def test_a_tokenizer_that_cannot_be_found_or_has_no_end_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match=r"tokenizer '.*nowhere': cannot be loaded"):
        load_tokenizer(tmp_path / "nowhere")
    endless = tokenizer()
    endless.eos_token = None
    endless.pad_token = None
    endless.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="no end-of-sequence token"):
        load_tokenizer(tmp_path)


def test_a_model_folder_without_a_tokenizer_is_said_to_have_none(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt_neox"}')
    with pytest.raises(ConfigError, match="no tokenizer in that folder"):
        load_tokenizer(tmp_path)
