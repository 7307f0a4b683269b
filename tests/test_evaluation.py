"""Evaluation: answers, metrics whose names never clash, and a run that holds nothing out."""

from __future__ import annotations

import importlib.util
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

from s2l_ray.config import RunConfig
from s2l_ray.errors import ConfigError
from s2l_ray.evaluation.bert_scores import BertScore
from s2l_ray.evaluation.generation import harness_metrics
from s2l_ray.evaluation.held_out import last_answer
from s2l_ray.evaluation.scores import canonical, pattern_score, summarize
from s2l_ray.evaluation.stage import build
from s2l_ray.storage.artifacts import Artifact, Key
from s2l_ray.storage.drafts import Draft
from s2l_ray.storage.places import Storage
from s2l_ray.training.models import check_ahead
from s2l_ray.training.token_rows import TokenRows
from s2l_ray.training.tokens import generation_prompt, num_answers
from tests.building import context_of

from .test_training import config

ANSWER = "The answer is (.+)"


def is_equal(first: str, second: str) -> bool:
    return pattern_score(ANSWER, f"The answer is {first}", f"The answer is {second}") == 1


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("1,234", "1234"), ("1,234,567.50", "1234567.5"), (".5", "0.5"), ("72.", "72.0"), ("$72", "72"), ("-$5", "$-5"),
        ("50 %", "50%"), ("1.5e3", "1,500"), ("+7", "7"), ("-0", "0"), ("\u22125", "-5"), ("\uff17\uff12", "72"),
        ("nan", "NaN"), ("inf", "inf"), ("1/2", "1/2"), ("1,2", "1,2"), ("Paris", " paris."), ("a  b", "a b"),
        ("9" * 5000, "9" * 5000 + ".0"), ("0.3333333", "0.33333334"),
    ],
)  # fmt: skip
def test_answers_that_mean_the_same_are_equal(first, second):
    assert is_equal(first, second)
    assert is_equal(second, first)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("1,2", "12"), ("1,2", "1.2"), ("12,34", "1234"), ("1234,567", "1234567"), ("0,123", "123"), ("1,234,5", "12345"),
        ("1_000", "1000"), ("0x10", "16"), ("1/2", "0.5"), ("inf", "infinity"), ("nan", "0"), ("--5", "5"), ("-$-5", "5"),
        ("1e9999", "1e9998"), ("9007199254740993", "9007199254740992"), ("x\u00b2", "x2"),
    ],
)  # fmt: skip
def test_answers_that_do_not_mean_the_same_differ(first, second):
    assert not is_equal(first, second)
    assert not is_equal(second, first)


@given(st.integers(-(10**18), 10**18), st.integers(0, 999_999), st.sampled_from(["", "$"]), st.sampled_from(["", "%", " %"]))
def test_a_number_equals_itself_however_it_is_written_and_no_other(whole, millionths, before, after):
    plain = f"{whole}.{millionths:06d}"
    assert canonical(f"{before}{whole:,}.{millionths:06d}{after}") == canonical(plain)
    assert canonical(plain) != canonical(f"{whole}.{(millionths + 1) % 10**6:06d}")


@given(st.text(max_size=30))
def test_every_answer_equals_itself(answer):
    assert canonical(answer) == canonical(f" {answer} ")


def scored(source: str, value: float) -> dict[str, Any]:
    return {"source": source, "loss": 1.0, "num_response_tokens": 1, "scores": json.dumps({"exact_match": value})}


# --- summaries -----------------------------------------------------------------------------------------------------


WORDS = "the lungs are clear no acute process small effusion heart is normal"


def encoder_folder(folder: Path, kind: str, **said: int) -> Path:
    """A small encoder with random weights, and a tokenizer of words; `said`: what the tokenizer's config says, too."""
    vocabulary = ["<s>", "<pad>", "</s>", "[UNK]", *WORDS.split()]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    marks = {"cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>", "unk_token": "[UNK]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **marks, **said).save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    sizes = {"vocab_size": len(vocabulary), "max_position_embeddings": 34, "pad_token_id": 1}
    AutoModel.from_config(AutoConfig.for_model(kind, **shape, **sizes)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_summaries_get_the_f1_that_bert_score_itself_gives(tmp_path, kind):
    import bert_score

    folder = encoder_folder(tmp_path / kind, kind, model_max_length=32)
    references = ["the lungs are clear", "no acute process", "heart is normal", "small effusion"]
    predictions = ["the lungs are clear", "small effusion heart is normal the lungs", " ", "no"]
    found = BertScore(str(folder), "cpu")(predictions, references)
    said = [0, 1, 3]
    _, _, expected = bert_score.score(
        [predictions[i] for i in said], [references[i] for i in said], model_type=str(folder), num_layers=3
    )
    np.testing.assert_allclose([found[i] for i in said], expected, atol=1e-6)
    assert found[0] == pytest.approx(1)
    assert found[2] == 0, "nothing was said"
    assert BertScore(str(folder), "cpu")(predictions[1:2], references[1:2]) == pytest.approx(found[1:2], abs=1e-6)


def test_a_summary_longer_than_the_model_has_positions_is_cut(tmp_path):
    scored = BertScore(str(encoder_folder(tmp_path, "roberta")), "cpu")  # its tokenizer names no longest text
    assert scored(["the lungs " * 40], ["the lungs " * 16]) == pytest.approx([1])


def test_a_model_that_the_library_knows_by_name_is_seen_at_the_layer_that_it_recommends(tmp_path, monkeypatch):
    import bert_score

    monkeypatch.setitem(bert_score.utils.model2layers, "known", 2)
    folder = encoder_folder(tmp_path / "known", "bert", model_max_length=32)
    _, _, expected = bert_score.score(["heart is normal"], ["no effusion"], model_type=str(folder), num_layers=2)
    assert BertScore(str(folder), "cpu")(["heart is normal"], ["no effusion"]) == pytest.approx(expected.tolist(), abs=1e-6)


def summary_config(model: str) -> RunConfig:
    return config(summary_sources=["reports"], bert_score_model=model)


def test_bert_score_without_its_library_or_model_is_refused_before_anything_is_trained(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"evaluation\.bert_score_model '.*nowhere': cannot be loaded"):
        check_ahead(summary_config(str(tmp_path / "nowhere")), Storage(str(tmp_path)), {"target", "evaluation"})
    folder = encoder_folder(tmp_path / "bert", "bert")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="Give an encoder with a tokenizer and safetensors"):
        BertScore(str(folder), "cpu")
    is_there = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None if name == "bert_score" else is_there(name))
    with pytest.raises(ConfigError, match=r"needs bert-score: pip install 's2l_ray\[bert-score\]'"):
        check_ahead(summary_config(str(folder)), Storage(str(tmp_path)), {"evaluation"})


# --- metrics -------------------------------------------------------------------------------------------------------


def test_no_two_scores_share_a_name():
    rows = [scored("all", 1.0), scored("gsm8k", 0.0), {**scored("arc_easy", 0.0), "scores": None}]
    harness = {name: {"acc": 0.25} for name in ("gsm8k", "arc_easy", "all sources", "lm-eval: gsm8k", "hellaswag")}
    found = summarize(rows, config().evaluation, harness)["tasks"]
    assert found == {
        "all": {"exact_match": 1.0, "rows": 1},
        "gsm8k": {"exact_match": 0.0, "rows": 1},
        "all sources": {"exact_match": 0.5, "rows": 2},
        "lm-eval: gsm8k": {"acc": 0.25},
        "lm-eval: arc_easy": {"acc": 0.25},
        "lm-eval: all sources": {"acc": 0.25},
        "lm-eval: lm-eval: gsm8k": {"acc": 0.25},
        "hellaswag": {"acc": 0.25},
    }
    plain = summarize([scored("a", 1.0), scored("b", 0.0)], config().evaluation, {"gsm8k": {"acc": 0.25}})["tasks"]
    assert list(plain) == ["a", "b", "all", "gsm8k"]


def test_a_metric_that_the_harness_measures_twice_is_there_twice():
    found = {"alias": "gsm8k", "exact_match,strict-match": 0.1, "exact_match,flexible-extract": 0.4, "acc,none": 0.5}
    assert harness_metrics(found) == {"exact_match (strict-match)": 0.1, "exact_match (flexible-extract)": 0.4, "acc": 0.5}


def stage(run: Storage, name: str, table: pa.Table | None = None) -> Artifact:
    draft = Draft.open(run, Key(name, 1, {}, {}))
    if table is not None:
        draft.write_table("part-00000.parquet", table)
    else:
        draft.write("model/model.json", b"{}")
    return draft.publish({"held_out": 0})


def test_an_evaluation_without_held_out_rows_is_empty_and_says_so(tmp_path, ray_session, caplog):
    run = Storage(str(tmp_path))
    rows = pa.table({"example_id": ["a"], "source": ["s"], "prompt": ["p"], "response": ["r"], "split": ["pool"]})
    inputs = {"examples": stage(run, "examples", rows), "target": stage(run, "target")}
    draft = Draft.open(run, Key("evaluation", 1, {}, {}))
    with caplog.at_level(logging.WARNING):
        artifact = build(context_of(draft, inputs))
    metrics = json.loads(artifact.read_bytes("metrics.json"))
    nothing = {"loss_per_token": None, "loss_by_source": {}, "loss_macro": None, "tasks": {}}
    assert metrics == {"untrained": nothing, "selected": nothing}
    assert artifact.read_bytes("predictions.jsonl") == b""
    assert (artifact.summary["rows"], artifact.summary["sources"]) == (0, {})
    assert [record.getMessage() for record in caplog.records if "held-out row" in record.getMessage()]


def test_of_a_conversation_the_last_answer_is_asked_for_and_compared():
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "The answer is 2"}]
    talk += [{"role": "user", "content": "again"}, {"role": "assistant", "content": "The answer is 4"}]
    row = {"response": "The answer is 2\nThe answer is 4", "messages": json.dumps(talk)}
    assert last_answer(row, 2) == "The answer is 4"
    assert last_answer(row, 1) == "The answer is 2", "the second was cut off"
    assert last_answer({"response": "yes"}, 1) == "yes"
    marks = np.array([0, 1, 1, 0, 0, 1, 0], bool)
    assert generation_prompt(np.arange(7), marks) == [0, 1, 2, 3, 4]
    assert num_answers(TokenRows.of([(np.arange(7, dtype=np.int32), marks)]), np.array([0]), 0) == 2
