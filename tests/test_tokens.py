"""From text to tokens: which tokens a model sees, and which of them are learned."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from s2l_ray.errors import ConfigError, DataError
from s2l_ray.training.token_rows import TokenRows
from s2l_ray.training.tokenizers import load_tokenizer
from s2l_ray.training.tokens import (
    conversation_pieces,
    encode,
    encode_conversations,
    generation_prompt,
    learnable,
    row_counts,
)

WORDS = ["<end>", "<start>", "<unk>", "what", "is", "it", "a", "b", "c", "<|im_start|>", "<|im_end|>", "user", "assistant"]


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


def test_the_response_and_the_end_are_learned_and_the_prompt_is_not():
    assert words(encode(tokenizer(), ["what is it"], ["a b"], 99)) == ("what is it a b <end>", "a b <end>")


def test_the_start_token_is_there_only_if_the_tokenizer_adds_one():
    assert words(encode(tokenizer(adds_start=True), ["what"], ["a"], 99)) == ("<start> what a <end>", "a <end>")
    assert words(encode(tokenizer(adds_start=False), ["what"], ["a"], 99)) == ("what a <end>", "a <end>")


def test_a_cut_response_has_no_end():
    assert words(encode(tokenizer(), ["what is"], ["a b c"], 4)) == ("what is a b", "a b")


def test_a_response_that_is_cut_off_whole_is_dropped_and_counted():
    rows = encode(tokenizer(), ["what is it", "what", "is"], ["a", "a b c", "b"], 3)
    left, kept, changed = learnable(rows, 3, 0)
    assert kept.tolist() == [1, 2]
    assert words(left, 0) == ("what a b", "a b")
    assert changed == {"no_response_token": 1, "cut": 1}
    assert row_counts(changed) == {"dropped": {"no_response_token": 1}, "shortened": {"cut": 1}}


def test_the_first_token_of_a_row_is_never_learned():
    """Nothing predicts it."""
    assert words(encode(tokenizer(), [""], ["a b"], 99)) == ("a b <end>", "b <end>")


def test_every_assistant_message_is_learned_with_its_end_of_turn():
    turns = [("user", "what is"), ("assistant", "a"), ("user", "it"), ("assistant", "b c")]
    messages = [{"role": role, "content": f" {text} "} for role, text in turns]
    pieces = conversation_pieces(tokenizer(), messages)
    assert "".join(text for text, _ in pieces) == "".join(f"<|im_start|>{role}\n {text} <|im_end|>\n" for role, text in turns)
    assert [text for text, is_learned in pieces if is_learned] == [" a <|im_end|>", " b c <|im_end|>"]
    _, learned = words(encode_conversations(tokenizer(), [messages], 99))
    assert learned == "a <|im_end|> b c <|im_end|>"


def test_a_template_that_rewrites_earlier_turns_is_an_error_that_says_so():
    rewriting = "{{ messages | length }}{% for m in messages %}{{ m.role }} {{ m.content }}{% endfor %}"
    messages = [{"role": "user", "content": "what"}, {"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]
    with pytest.raises(DataError, match="writes earlier turns differently"):
        conversation_pieces(tokenizer(chat_template=rewriting), messages)


def test_a_model_answers_after_everything_before_the_first_label():
    rows = encode(tokenizer(adds_start=True), ["what is"], ["a"], 99)
    assert [WORDS[i] for i in generation_prompt(*rows[0])] == ["<start>", "what", "is"]


def test_rows_laid_end_to_end_come_back_as_they_were():
    parts = [encode(tokenizer(), ["what", "is it"], ["a", "b c"], 99), encode(tokenizer(), [], [], 99)]
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
