"""Trajectories out of transformers' Trainer: its own losses, and a training that does not notice."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from s2l_ray import RecordTrajectories
from s2l_ray.config import ClusteringConfig, SelectionConfig
from s2l_ray.errors import ArtifactError, ConfigError, DataError
from s2l_ray.selection.alone import select_trajectories
from s2l_ray.storage.artifacts import Artifact
from s2l_ray.storage.places import Storage
from s2l_ray.trajectories.dataset_rows import tokens_of
from s2l_ray.trajectories.files import read_trajectories
from s2l_ray.trajectories.parts import find_artifact
from s2l_ray.trajectories.scored_training import check_logits

VOCAB = 64


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def language_model(seed: int = 0) -> LlamaForCausalLM:
    """With dropout, so that a random number too many shows in the weights."""
    torch.manual_seed(seed)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, max_position_embeddings=64, attention_dropout=0.1, **shape))


def language_rows(count: int = 24) -> list[dict[str, Any]]:
    """Rows of ragged length, the prompt masked; the last has no label."""
    rng = np.random.default_rng(1)
    rows = []
    for number in range(count):
        length = int(rng.integers(4, 20))
        ids = rng.integers(1, VOCAB, length)
        prompt = length if number == count - 1 else int(rng.integers(0, length - 1))
        labels = np.where(np.arange(length) < prompt, -100, ids)
        row = {"input_ids": ids.tolist(), "labels": labels.tolist(), "attention_mask": [1] * length}
        rows.append({"example_id": f"id-{number:02d}", "source": f"s{number % 2}", **row})
    return rows


def padded(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    return {k: torch.tensor([row[k] + [v] * (longest - len(row[k])) for row in rows]) for k, v in fill.items()}


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    options = {"max_steps": 6, "save_strategy": "no", "learning_rate": 0.01} | options
    return TrainingArguments(
        str(folder), use_cpu=True, report_to="none", disable_tqdm=True, per_device_train_batch_size=4, seed=3, **options
    )


def train(
    folder: Path, recorder: TrainerCallback | None, *others: TrainerCallback, resume: bool = False, **options: Any
) -> Any:
    """A language model trained by the Trainer as it comes."""
    callbacks = ([recorder] if recorder else []) + list(others)
    rows = Dataset.from_list(language_rows())
    trainer = Trainer(language_model(), arguments(folder, **options), padded, train_dataset=rows, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume)
    return trainer.model


def own_losses(model: Any, rows: list[dict[str, Any]]) -> list[float]:
    """transformers' own loss, one row at a time."""
    model.eval()
    with torch.no_grad():
        return [float(model(**{k: v for k, v in padded([row]).items() if k != "attention_mask"}).loss) for row in rows]


# --- causal language models ----------------------------------------------------------------------------------------


def test_the_losses_are_transformers_own_row_by_row(tmp_path):
    recorder = RecordTrajectories(tmp_path / "store", language_rows(), num_checkpoints=3, include_untrained=True)
    model = train(tmp_path, recorder)
    store, rows = read_trajectories(str(tmp_path / "store")), language_rows()[:-1]
    assert store.example_ids.to_pylist() == [row["example_id"] for row in rows]
    np.testing.assert_allclose(store.losses_NT[:, 0], own_losses(language_model(), rows), atol=1e-5)
    np.testing.assert_allclose(store.losses_NT[:, -1], own_losses(model, rows), atol=1e-5)
    assert store.sources.to_pylist() == [row["source"] for row in rows]
    assert store.num_response_tokens_N.tolist() == [sum(label != -100 for label in row["labels"][1:]) for row in rows]
    summary = Artifact.read(Storage(str(tmp_path / "store"))).summary
    assert summary["steps"] == [0, 2, 4, 6]
    assert summary["dropped"] == {"no_response_token": 1}
    subset = select_trajectories(
        str(tmp_path / "store"), str(tmp_path / "out"), ClusteringConfig(num_clusters=3), SelectionConfig(budget=6)
    )
    assert subset.summary["rows"] == 6


def test_statistics_are_recorded_on_request_beside_the_same_losses(tmp_path):
    rows = language_rows()
    with pytest.raises(ConfigError, match="a loss_function gives one loss per example, none per token"):
        RecordTrajectories(tmp_path / "none", rows, statistics=True, loss_function=lambda model, batch: None)
    found = []
    for name in ("plain", "rich"):
        train(tmp_path, RecordTrajectories(tmp_path / name, rows, num_checkpoints=2, statistics=name == "rich"))
        found.append(read_trajectories(str(tmp_path / name), statistics=name == "rich"))
    assert found[0].losses_NT.tobytes() == found[1].losses_NT.tobytes()
    lengths_N, statistics = found[1].num_response_tokens_N, found[1].statistics
    assert sorted(statistics) == ["deviations", "first_thirds", "last_thirds"]
    for name, values_NT in statistics.items():
        assert values_NT.shape == found[1].losses_NT.shape
        is_one = lengths_N == 1  # of one label all means are its loss
        expected = 0 * values_NT if name == "deviations" else found[1].losses_NT
        np.testing.assert_array_equal(values_NT[is_one], expected[is_one])
    assert (statistics["deviations"][lengths_N > 1] > 0).all()
    thirds = np.asarray([statistics["first_thirds"], statistics["last_thirds"]])
    two = lengths_N == 2
    np.testing.assert_allclose(thirds[:, two].mean(0), found[1].losses_NT[two], rtol=1e-6)


class Drawing(Dataset):  # type: ignore[misc]
    """Rows that draw random numbers when they are read, as augmentation does."""

    def __getitem__(self, key: Any) -> Any:
        torch.rand(1)
        np.random.random()
        random.random()
        return super().__getitem__(key)


def test_the_training_is_the_same_with_and_without_the_recording(tmp_path):
    rows = Dataset.from_list(language_rows())
    rows.__class__ = Drawing
    recorder = RecordTrajectories(tmp_path / "store", rows, every_steps=1, include_untrained=True)
    recorded, plain = train(tmp_path / "a", recorder), train(tmp_path / "b", None)
    for left, right in zip(recorded.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(left, right)


class Modes(TrainerCallback):  # type: ignore[misc]
    """Puts a part of the model into evaluation mode before a step, and notes in which mode its parts are after a step."""

    def __init__(self) -> None:
        self.seen: list[tuple[bool, bool]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        model.model.layers[0].eval()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.seen.append((model.training, model.model.layers[0].training))


def test_every_part_of_the_model_comes_back_in_its_own_mode(tmp_path):
    modes = Modes()
    train(tmp_path, RecordTrajectories(tmp_path / "store", language_rows(), every_steps=1), modes, max_steps=2)
    assert modes.seen == [(True, False)] * 2


def test_scoring_is_in_its_own_precision_whatever_the_trainings_is(tmp_path):
    recorder = RecordTrajectories(tmp_path / "store", language_rows(), num_checkpoints=1)
    trained, model = train(tmp_path, recorder, bf16=True, max_steps=2), language_model()
    model.load_state_dict(trained.state_dict())  # without the autocast that is left on the trained one
    losses_NT = read_trajectories(str(tmp_path / "store")).losses_NT
    np.testing.assert_allclose(losses_NT[:, -1], own_losses(model, language_rows()[:-1]), atol=1e-5)
    assert np.abs(np.subtract(own_losses(trained, language_rows()[:-1]), losses_NT[:, -1])).max() > 1e-5


def test_weights_of_half_the_precision_are_scored_in_it(tmp_path):
    recorder = RecordTrajectories(tmp_path / "store", language_rows(), num_checkpoints=1)
    model = language_model().bfloat16()
    Trainer(
        model,
        arguments(tmp_path, max_steps=2),
        padded,
        train_dataset=Dataset.from_list(language_rows()),
        callbacks=[recorder],
    ).train()
    losses_NT = read_trajectories(str(tmp_path / "store")).losses_NT
    np.testing.assert_allclose(losses_NT[:, -1], own_losses(model.float(), language_rows()[:-1]), atol=0.1)


# --- interruptions -------------------------------------------------------------------------------------------------


class StopAfter(TrainerCallback):  # type: ignore[misc]
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def test_a_resumed_training_records_what_is_missing_and_doubles_nothing(tmp_path):
    saved = {"save_strategy": "steps", "save_steps": 3}

    def recorder(place: str) -> RecordTrajectories:
        return RecordTrajectories(tmp_path / place, language_rows(), num_checkpoints=3)

    train(tmp_path / "a", recorder("whole"), **saved)
    train(tmp_path / "b", recorder("broken"), StopAfter(4), **(saved | {"save_steps": 3}))
    with pytest.raises(ArtifactError, match=r"unfinished recording of 2 steps \(2, 4\)"):
        find_artifact(str(tmp_path / "broken"))
    for checkpoint in (tmp_path / "b").glob("checkpoint-[!3]*"):  # the stop saves, too; a kill would not
        checkpoint.rename(tmp_path / checkpoint.name)
    train(tmp_path / "b", recorder("broken"), resume=True, **saved)
    assert (tmp_path / "broken" / "part-00000.parquet").read_bytes() == (tmp_path / "whole" / "part-00000.parquet").read_bytes()
    train(tmp_path / "b", recorder("broken"), resume=True, **saved)  # to the end already: nothing to do


def test_a_training_from_the_beginning_replaces_what_an_earlier_attempt_recorded(tmp_path):
    rows = language_rows()
    train(tmp_path, RecordTrajectories(tmp_path / "store", rows, every_steps=1), StopAfter(2), max_steps=3)
    # Another number of processes would have split the rows in another way.
    first = next((tmp_path / "store" / ".work" / "recording" / "step-000001").iterdir())
    first.rename(first.with_name("0" * 32 + ".parquet"))
    train(tmp_path, RecordTrajectories(tmp_path / "store", rows, every_steps=1), max_steps=3)
    assert read_trajectories(str(tmp_path / "store")).losses_NT.shape == (23, 3)


def test_steps_of_another_schedule_are_refused(tmp_path):
    train(tmp_path, RecordTrajectories(tmp_path / "store", language_rows(), every_steps=1), StopAfter(1))
    with pytest.raises(ArtifactError, match=r"holds losses of steps 1, but this training records steps 3, 6. Give another"):
        train(tmp_path, RecordTrajectories(tmp_path / "store", language_rows(), num_checkpoints=2))


def test_a_resumed_training_whose_first_steps_are_not_there_is_refused(tmp_path):
    saved = {"save_strategy": "steps", "save_steps": 3}
    train(tmp_path, None, StopAfter(3), **saved)
    with pytest.raises(ArtifactError, match="goes on after step 3, but steps 2 are not recorded there"):
        train(tmp_path, RecordTrajectories(tmp_path / "store", language_rows(), num_checkpoints=3), resume=True, **saved)


@pytest.mark.parametrize("statistics", [True, False])
def test_a_resumed_training_records_the_statistics_that_its_first_steps_have(tmp_path, statistics):
    saved = {"save_strategy": "steps", "save_steps": 3}

    def recorder(*, statistics: bool) -> RecordTrajectories:
        return RecordTrajectories(tmp_path / "store", language_rows(), num_checkpoints=3, statistics=statistics)

    train(tmp_path, recorder(statistics=statistics), StopAfter(3), **saved)
    with pytest.raises(ArtifactError, match=f"step 2 is recorded with(out)? statistics. Go on with statistics={statistics}"):
        train(tmp_path, recorder(statistics=not statistics), resume=True, **saved)


def test_another_training_into_a_finished_store_is_refused(tmp_path):
    train(tmp_path, RecordTrajectories(tmp_path / "store", language_rows(), num_checkpoints=1), max_steps=1)
    with pytest.raises(ArtifactError, match=r"finished, and this training has steps to record. Give another directory"):
        train(tmp_path, RecordTrajectories(tmp_path / "store", language_rows(), num_checkpoints=1), max_steps=1)


# --- any other model -----------------------------------------------------------------------------------------------


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.Linear(8, 3))

    def forward(self, features: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.body(features)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def loss_of_each(model: Any, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(model(**batch)["logits"], batch["labels"], reduction="none")


def classified(count: int = 19) -> list[dict[str, Any]]:
    rng = np.random.default_rng(2)
    rows = [{"key": number, "kind": f"k{number % 3}", "features": rng.random(5).tolist()} for number in range(count)]
    return [row | {"labels": int(rng.integers(3))} for row in rows]


def train_classifier(folder: Path, **options: Any) -> Classifier:
    torch.manual_seed(0)
    model = Classifier()
    options = {"example_id": "key", "source": "kind", "num_checkpoints": 2, "batch_size": 8} | options
    recorder = RecordTrajectories(folder / "store", options.pop("dataset", classified()), **options)
    Trainer(model, arguments(folder), train_dataset=Dataset.from_list(classified()), callbacks=[recorder]).train()
    return model


def test_a_classifiers_losses_come_from_a_function_of_its_own(tmp_path):
    model, rows = train_classifier(tmp_path, loss_function=loss_of_each).eval(), classified()
    store = read_trajectories(str(tmp_path / "store"))
    assert store.example_ids.to_pylist() == list(range(19))
    assert store.sources.to_pylist() == [row["kind"] for row in rows]
    assert store.num_response_tokens_N is None
    with torch.no_grad():
        expected = [float(model(torch.tensor([r["features"]]), torch.tensor([r["labels"]]))["loss"]) for r in rows]
    np.testing.assert_allclose(store.losses_NT[:, -1], expected, atol=1e-6)


@pytest.mark.parametrize(
    "function", [lambda model, batch: model(**batch)["loss"], lambda model, batch: model(**batch)["logits"]]
)
def test_a_loss_function_that_gives_no_loss_per_example_is_refused(tmp_path, function):
    with pytest.raises(DataError, match=r"for a batch of 8 rows, expected a tensor of shape \(8,\).*reduction='none'"):
        train_classifier(tmp_path, loss_function=function)


# --- what is refused before anything is trained --------------------------------------------------------------------


def refused(tmp_path: Path, dataset: Any, **options: Any) -> None:
    """A training that must not begin."""
    recorder = RecordTrajectories(tmp_path / "store", dataset, num_checkpoints=1)
    args = SimpleNamespace(process_index=0, world_size=1, **options)
    recorder.on_train_begin(args, SimpleNamespace(max_steps=6, global_step=0), None, model=language_model())


def changed(**columns: Any) -> list[dict[str, Any]]:
    return [row | {name: value(row) for name, value in columns.items()} for row in language_rows()]


def without(*columns: str) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in columns} for row in language_rows()]


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (without("example_id"), "no column 'example_id'.*remove_unused_columns"),
        (Dataset.from_list(without("example_id")), "no column 'example_id' .columns: source, input_ids.*remove_unused_columns"),
        (changed(example_id=lambda row: "same"), "example_id occurs more than once: 'same'"),
        (changed(example_id=lambda row: len(row["input_ids"]) / 2), "expected string or integer"),
        (iter(language_rows()), "a stream without length"),
        (Dataset.from_list(language_rows()).to_iterable_dataset(), "a stream without length"),
        ([], "has no rows"),
        ([([1], [1])], "rows are tuple. Give rows as mappings"),
        (without("labels"), "row 'id-00': columns example_id, source, input_ids.*loss_function="),
        (changed(labels=lambda row: 1), r"input_ids of shape \(\d+,\) and labels of shape \(\).*loss_function="),
        (changed(labels=lambda row: [63 - i for i in row["input_ids"]]), "labels that are not the tokens of input_ids"),
        (changed(labels=lambda row: [-100] * len(row["labels"])), "no row has a label"),
        (changed(seq_lengths=lambda row: [2, 2]), "several seq_lengths: several examples in one row"),
        (changed(position_ids=lambda row: [0, 1, 0, *range(1, len(row["labels"]) - 2)]), "position_ids that start again"),
        (changed(attention_mask=lambda row: [1, 0] * 2 + [1] * (len(row["labels"]) - 4)), "attention_mask has gaps"),
    ],
)
def test_a_dataset_whose_losses_cannot_be_told_apart_is_refused(tmp_path, dataset, message):
    with pytest.raises(DataError, match=message):
        refused(tmp_path, dataset)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"packing": True}, "packing=True: several examples in one row hide the loss of each"),
        ({"use_liger_kernel": True}, "use_liger_kernel=False"),
        ({"fsdp": "full_shard"}, "sharded .*proxy.checkpoints"),
    ],
)
def test_a_training_whose_losses_cannot_be_told_apart_is_refused(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        refused(tmp_path, language_rows(), **options)


def test_sharded_parameters_are_refused(tmp_path):
    recorder = RecordTrajectories(tmp_path / "store", language_rows(), num_checkpoints=1)
    model = language_model()
    next(model.parameters()).ds_id = 0  # as DeepSpeed ZeRO 3 marks them
    args = SimpleNamespace(process_index=0, world_size=1)
    with pytest.raises(ConfigError, match="parameters are sharded"):
        recorder.on_train_begin(args, SimpleNamespace(max_steps=6, global_step=0), None, model=model)


def test_a_model_without_logits_is_refused():
    with pytest.raises(ConfigError, match="LlamaModel: its forward gives no logits in evaluation mode"):
        check_logits(language_model().model, np.array([1, 2, 3], np.int32))


def test_more_checkpoints_than_steps_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"num_checkpoints=12 .* but the training has 6 steps"):
        train(tmp_path, RecordTrajectories(tmp_path / "store", language_rows()))


def test_a_directory_with_other_files_is_refused(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "mine.parquet").touch()
    with pytest.raises(ArtifactError, match="holds other Parquet files"):
        refused(tmp_path, language_rows())


def test_an_unknown_precision_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="precision: 'float16' is unknown"):
        RecordTrajectories(tmp_path, [], precision="float16")


# --- rows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("before", "after"), [(0, 3), (3, 0), (2, 2)])
def test_padding_is_left_out_on_whichever_side_it_stands(before, after):
    row = {
        "input_ids": [0] * before + [5, 6, 7, 8] + [0] * after,
        "labels": [-100] * before + [-100, 6, 7, 8] + [-100] * after,
        "attention_mask": [0] * before + [1] * 4 + [0] * after,
    }
    ids, is_label = tokens_of(row, "row")
    assert ids.tolist() == [5, 6, 7, 8]
    assert is_label.tolist() == [False, True, True, True]


def test_padding_without_a_mask_is_left_out_behind_the_last_label():
    ids, is_label = tokens_of({"input_ids": [5, 6, 7, 0, 0], "labels": [5, 6, 7, -100, -100]}, "row")
    assert ids.tolist() == [5, 6, 7]
    assert is_label.tolist() == [False, True, True]


# --- several processes ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_record_what_one_does(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = (
        "import sys; from pathlib import Path; from tests.test_callback import *\n"
        "place = Path(sys.argv[1])\n"
        "recorder = RecordTrajectories(place / 'two', language_rows(), num_checkpoints=1, include_untrained=True)\n"
        "train(place, recorder, max_steps=2)\n"
        "assert torch.distributed.get_world_size() == 2\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(command, env={**os.environ, **variables, "RANK": rank, "LOCAL_RANK": rank}, stderr=subprocess.PIPE)
        for rank in "01"
    ]
    for process in started:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors.decode()
    train(
        tmp_path, RecordTrajectories(tmp_path / "one", language_rows(), num_checkpoints=1, include_untrained=True), max_steps=2
    )
    one, two = (pq.read_table(tmp_path / name / "part-00000.parquet") for name in ("one", "two"))
    assert two.drop_columns("losses").equals(one.drop_columns("losses"))
    untrained = [np.array([row[0] for row in table["losses"].to_pylist()]) for table in (one, two)]
    np.testing.assert_allclose(*untrained, atol=1e-6)
    manifests = [json.loads((tmp_path / name / "manifest.json").read_text())["summary"] for name in ("one", "two")]
    assert [m["dropped"] for m in manifests] == [{"no_response_token": 1}] * 2
