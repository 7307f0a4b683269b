"""How a step's rows are spread: over any number of workers, every row once, in micro-batches of similar length."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s2l_ray.config import TrainingConfig, TrainingWorkerConfig
from s2l_ray.errors import ConfigError
from s2l_ray.runtime.fit import fit
from s2l_ray.runtime.workers import Workers
from s2l_ray.storage.places import Storage
from s2l_ray.training.batches import NO_ROW, BatchPlan, batch_weights, length_balanced_order
from s2l_ray.training.fine_tuning import Collator, TrainingRows, fine_tune, token_mean_loss, training_loss
from s2l_ray.training.token_rows import TokenRows
from s2l_ray.training.training_run import TrainingRun
from s2l_ray.training.zero import zero_config

from .test_losses import make, rows


def places_of(plan: BatchPlan, order: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Rows by step, micro-batch, worker and place."""
    places = length_balanced_order(order, lengths, plan)
    return places.reshape(-1, plan.accumulate, plan.num_workers, plan.device_batch)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 12), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_every_row_of_a_step_is_computed_once_and_shares_differ_by_at_most_one_row(batch, workers, wish, steps, seed):
    plan = BatchPlan.of(batch, min(workers, batch), wish)
    rng = np.random.default_rng(seed)
    order, lengths = rng.permutation(steps * batch), rng.integers(1, 99, steps * batch)
    places = places_of(plan, order, lengths)
    for step, of_step in enumerate(places):
        assert sorted(of_step[of_step != NO_ROW]) == sorted(order[step * batch : (step + 1) * batch])
    shares = (places != NO_ROW).sum(axis=(1, 3))
    assert np.ptp(shares, axis=1).max() <= 1
    micro_batches = (places != NO_ROW).sum(axis=3)
    assert np.ptp(micro_batches, axis=1).max() <= 1, "as even as can be"
    assert micro_batches.max() <= wish


@given(st.integers(1, 4), st.integers(1, 8), st.integers(1, 6), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_where_the_workers_divide_the_batch_the_order_is_that_of_one_cut_after_the_other(workers, size, cuts, steps, seed):
    """The order that such trainings always had: with it their results keep their bytes."""
    batch = workers * size * cuts
    plan = BatchPlan.of(batch, workers, size)
    rng = np.random.default_rng(seed)
    order, lengths = rng.permutation(steps * batch), rng.integers(1, 9, steps * batch)
    by_step = order.reshape(steps, batch)
    by_length = np.take_along_axis(by_step, np.argsort(-lengths[by_step], axis=1, kind="stable"), axis=1)
    expected = by_length.reshape(-1, size, workers).transpose(0, 2, 1).ravel()
    assert length_balanced_order(order, lengths, plan).tolist() == expected.tolist()


def test_micro_batches_of_all_workers_have_rows_of_similar_length():
    lengths = np.arange(64)
    batches = lengths[length_balanced_order(np.arange(64)[::-1].copy(), lengths, BatchPlan.of(64, 2, 8))].reshape(4, 2, 8)
    assert np.abs(batches[:, 0].sum(-1) - batches[:, 1].sum(-1)).max() <= 8
    assert (np.ptp(batches, axis=-1) <= 15).all()


@pytest.mark.parametrize(
    ("workers", "wish", "expected"),
    [
        (1, "auto", (32, 4)),
        (4, 16, (16, 2)),
        (2, 48, (32, 2)),
        (128, 8, (1, 1)),
        (8, 5, (4, 4)),
        (3, "auto", (22, 2)),
        (100, 8, (2, 1)),
    ],
)
def test_a_share_is_cut_into_as_few_micro_batches_as_memory_allows(workers, wish, expected):
    plan = BatchPlan.of(128, workers, wish)
    assert (plan.device_batch, plan.accumulate) == expected


def test_more_workers_than_rows_in_a_batch_are_refused():
    with pytest.raises(ConfigError, match="5 workers, but a batch has global_batch_size=4 examples"):
        BatchPlan.of(4, 5, "auto")


@pytest.mark.parametrize("architecture", ["gpt_neox", "llama"])
@pytest.mark.parametrize("restrict", [True, False])
def test_a_worker_without_a_row_adds_nothing_to_loss_and_gradient(architecture, restrict):
    model = make(architecture)
    batch = Collator(restrict)([None, None])
    labels = batch.pop("labels")
    for total in (None, torch.tensor(17)):
        loss = token_mean_loss(model(**batch), labels, total)
        loss.backward()
        assert loss.item() == 0
        gradients = [parameter.grad for parameter in model.parameters()]
        assert all(gradient is not None and not gradient.any() for gradient in gradients), "all workers exchange gradients"


def test_a_worker_that_is_a_row_short_computes_the_rows_it_has():
    tokens = rows(np.random.default_rng(7), 3)
    short = TrainingRows(tokens, np.array([2, NO_ROW]))
    batch = Collator(restrict_logits=False)([short[0], short[1]])
    assert batch["input_ids"].tolist() == [tokens[2][0].tolist()]


# --- weights -------------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(1, 7), st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_a_batchs_weights_have_mean_one_whoever_computes_its_rows(seed, workers, device_batch, batch):
    workers = min(workers, batch)
    rng = np.random.default_rng(seed)
    weights, order = rng.gamma(1, 10, 30) + 0.01, rng.integers(0, 30, 4 * batch)
    plan = BatchPlan.of(batch, workers, device_batch)
    places = length_balanced_order(order, rng.integers(1, 9, 30), plan)
    found = batch_weights(places, weights, plan).reshape(4, -1)
    for step, (of_places, rows_of_step) in enumerate(zip(found, order.reshape(4, -1), strict=True)):
        expected = weights[rows_of_step] / weights[rows_of_step].mean()
        rows_there = places.reshape(4, -1)[step]
        by_row = dict(zip(rows_of_step.tolist(), expected.tolist(), strict=True))
        assert of_places.tolist() == pytest.approx([by_row.get(row, 0.0) for row in rows_there.tolist()], rel=1e-6)
        assert of_places.sum() == pytest.approx(batch, rel=1e-5)
    alone = BatchPlan.of(batch, 1, batch)
    one = batch_weights(order, weights, alone).reshape(4, -1)
    assert [sorted(row[row > 0].tolist()) for row in found] == [sorted(row.tolist()) for row in one]


def test_weights_that_are_alike_are_exactly_one_and_reach_no_batch():
    tokens = rows(np.random.default_rng(7), 12)
    plan = BatchPlan.of(12, 2, 4)
    places = length_balanced_order(np.arange(12), tokens.lengths, plan)
    found = batch_weights(places, np.full(12, 0.1), plan)
    assert set(found.tolist()) == {1.0}
    weighted = TrainingRows(tokens, places, found)
    plain = TrainingRows(tokens, places)
    batches = [Collator(True)([some[i] for i in range(len(some))]) for some in (weighted, plain)]
    assert list(batches[0]) == list(batches[1]) == ["input_ids", "labels", "logits_to_keep"]
    assert all(torch.equal(batches[0][name], batches[1][name]) for name in batches[0])


@given(
    batch=st.integers(1, 24),
    workers=st.integers(1, 5),
    device_batch=st.integers(1, 9),
    steps=st.integers(1, 4),
    seed=st.integers(),
)
def test_rows_that_are_placed_step_by_step_are_those_of_the_whole_order(batch, workers, device_batch, steps, seed):
    plan = BatchPlan.of(batch, min(workers, batch), device_batch)
    rng = np.random.default_rng(abs(seed))
    tokens, weights = rows(rng, 30), rng.integers(1, 5, 30) / 4
    order = rng.integers(0, 30, steps * batch)
    config = TrainingConfig(model="none", global_batch_size=batch, learning_rate=1.0)
    places = length_balanced_order(order, tokens.lengths, plan)
    for given_weights in (None, weights):
        lazy = TrainingRows.of(TrainingRun("proxy", config, order, tokens, (), steps, weights=given_weights), plan)
        whole = TrainingRows(tokens, places, None if given_weights is None else batch_weights(places, weights, plan))
        assert len(lazy) == len(whole) == steps * plan.num_places
        for i in rng.permutation(len(whole)).tolist():
            found, expected = lazy[i], whole[i]
            assert (found is None) == (expected is None)
            for one, other in zip(found or (), expected or (), strict=True):
                np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("restrict", [True, False])
def test_a_row_of_weight_three_counts_as_three_of_it(restrict):
    tokens = rows(np.random.default_rng(7), 3)
    weights = np.array([1.0, 3.0, 2.0])
    gradients = []
    for rows_there in ([0, 1, 2], [0, 1, 1, 1, 2, 2]):
        model = make("gpt_neox")
        is_weighted = len(rows_there) == 3
        data = TrainingRows(tokens, np.array(rows_there), weights if is_weighted else None)
        batch = Collator(restrict)([data[i] for i in range(len(data))])
        labels, of_rows = batch.pop("labels"), batch.pop("weights", None)
        assert (of_rows is not None) == is_weighted
        token_mean_loss(model(**batch), labels, torch.tensor(17), of_rows).backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)


# --- trained -------------------------------------------------------------------------------------------------------

BATCH, STEPS = 64, 5


def train(job: tuple[int, str], events: Any) -> dict[str, Any]:
    """A few steps of a tiny model; `job`: ZeRO's stage, and the most rows of a forward pass."""
    stage, device_batch = job
    generator = random.Random(3)
    # Few labels in most rows and many in some: a mean of the workers' means would show.
    made = [(generator.randint(4, 24), generator.choice([1, 1, 2, 12])) for _ in range(2 * BATCH)]
    many = [
        (np.array(generator.choices(range(300), k=length), np.int32), np.arange(length) >= max(1, length - labels))
        for length, labels in made
    ]
    order = np.concatenate([np.random.default_rng(step).permutation(2 * BATCH)[:BATCH] for step in range(STEPS)])
    config = TrainingConfig(model="none", global_batch_size=BATCH, learning_rate=3e-3, warmup_fraction=0.0)
    run = TrainingRun("proxy", config, order, TokenRows.of(many), (), STEPS)
    machines = TrainingWorkerConfig(device_batch_size=int(device_batch))
    trainer = fine_tune(run, make("gpt_neox"), None, machines, events, deepspeed=zero_config(stage, "none"))
    return {"losses": training_loss(trainer)}


def train_with_weights(names: tuple[str, ...], events: Any) -> dict[str, Any]:
    """The same few steps without weights, with equal and with uneven ones: losses and a hash of the trained model."""
    many, found = rows(np.random.default_rng(11), 32), {}
    order = np.concatenate([np.random.default_rng(step).permutation(32)[:16] for step in range(4)])
    config = TrainingConfig(model="none", global_batch_size=16, learning_rate=3e-3, warmup_fraction=0.0)
    weights = {"plain": None, "equal": np.full(32, 0.1), "uneven": np.arange(1.0, 33.0)}
    for name in names:
        run = TrainingRun(name, config, order, many, (), 12, 4 * len(found), weights[name])
        torch.manual_seed(0)
        trainer = fine_tune(run, make("gpt_neox"), None, TrainingWorkerConfig(device_batch_size=5), events)
        state = b"".join(value.numpy().tobytes() for value in trainer.model.state_dict().values())
        found[name] = [training_loss(trainer), hashlib.sha256(state).hexdigest()]
    return found


@pytest.mark.timeout(300)
def test_a_training_with_equal_weights_is_that_without_any_to_the_byte(ray_session, tmp_path):
    done = fit("target", train_with_weights, ("plain", "equal", "uneven"), Halves(1, 1, 0.0, 1), Storage(str(tmp_path)))
    assert done["equal"] == done["plain"]
    assert done["uneven"][1] != done["plain"][1]
    assert done["uneven"][0] != done["plain"][0]


class Halves(Workers):
    """Half a CPU each: three have room on the tests' two."""

    @property
    def resources(self) -> dict[str, float]:
        return {"CPU": 0.5}


def losses(folder: Path, workers: int, stage: int, device_batch: int) -> np.ndarray:
    place = Storage(str(folder / f"{workers}-{stage}-{device_batch}"))
    done = fit("proxy", train, (stage, device_batch), Halves(workers, 1, 0.0, workers), place)
    assert done["num_workers"] == workers
    assert [step for step, _ in done["losses"]] == list(range(1, STEPS + 1))
    return np.array([loss for _, loss in done["losses"]])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_one_two_and_three_workers_take_the_same_steps_with_and_without_zero(ray_session, tmp_path):
    one = losses(tmp_path, 1, 0, 32)
    assert one[-1] < one[0] - 0.1, "it learns"
    # 22, 21 and 21 rows; with 7 at a time the last of a worker's four micro-batches is a row short.
    for workers, stage, device_batch in [(2, 0, 32), (3, 0, 32), (3, 0, 7), (3, 2, 7)]:
        np.testing.assert_allclose(losses(tmp_path, workers, stage, device_batch), one, rtol=0, atol=1e-5)
