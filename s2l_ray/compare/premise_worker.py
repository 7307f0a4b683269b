"""What the workers compute for the premise: the gradients of sampled examples, and the target's losses on them as it learns."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from s2l_ray.config import RunConfig, TrainingConfig
from s2l_ray.errors import DataError
from s2l_ray.examples.reading import fetch_examples
from s2l_ray.runtime.pool import Unit, UnitWorker
from s2l_ray.storage.artifacts import Artifact
from s2l_ray.storage.drafts import table_bytes
from s2l_ray.storage.layout import TOKENIZER, folder_step
from s2l_ray.training.adapters import base_of, with_adapters
from s2l_ray.training.batches import data_order, subset_steps
from s2l_ray.training.checkpoints import checkpoint_folder
from s2l_ray.training.fine_tuning import fine_tune_here
from s2l_ray.training.gradients import GradientSketch, example_gradients
from s2l_ray.training.losses import example_losses
from s2l_ray.training.models import check_positions, load_model, make_model
from s2l_ray.training.schedule import recorded_steps
from s2l_ray.training.token_rows import RowLimit
from s2l_ray.training.tokenizers import load_tokenizer, target_tokenizer
from s2l_ray.training.tokens import PartTokens, encode_table
from s2l_ray.training.training_run import TrainingRun

TARGET, TRAINED = "target", "trained-target"
"""Names of models beside the proxy's checkpoints: the target before training, and while it learns the sample."""
ALL_ROWS = "all"
"""The part of the trained target, which learns all of the sample."""
FACTS = b"facts"
"""The field of a unit's schema metadata with what else was found."""
TOKENS_PER_BATCH = 4096
MIN_STEPS = 8
"""A smaller batch than the target's is used where an epoch over the sample would have fewer steps."""


@dataclass(frozen=True)
class PremiseJob:
    """What a worker needs."""

    config: RunConfig
    inputs: Mapping[str, Artifact]
    parts: Mapping[str, list[str]]
    """Part's name -> ids of examples."""

    num_features: int
    num_target_points: int
    """Points of the target's trajectories, the untrained model not counted; 0: no target is trained."""

    seed: int

    def units(self, models: list[str]) -> list[Unit]:
        """The gradients under each model, part by part, and first, for it takes longest, the target that is trained."""
        trained = [Unit(TRAINED, ALL_ROWS)] if self.num_target_points else []
        return trained + [Unit(model, part) for model in models for part in self.parts]


class PremiseWorker(UnitWorker):
    """Computes gradients under one model at a time."""

    job: PremiseJob

    @cached_property
    def _of_proxy(self) -> Any:
        return load_tokenizer(self.job.inputs["proxy"].folder(TOKENIZER))

    @cached_property
    def _of_target(self) -> Any:
        return target_tokenizer(self.job.config.target, self.job.inputs["proxy"])

    def load(self, model: str) -> Any:
        config, step = self.job.config, folder_step(model)
        if step is not None:
            folder = checkpoint_folder(self.job.inputs["proxy"].root, step)
            made = load_model(folder, self._of_proxy, trust_remote_code=config.proxy.trust_remote_code)
        else:
            made = make_model(config.target, self._of_target)
            check_positions(made, config.target.max_tokens, "target")
        if model == TRAINED:  # here and not with its part, which may be tried again
            made, self._learned = self._train(made)
        else:
            self._sketch = GradientSketch(made.to(self.device), self.job.num_features, self.job.seed)
        return made

    def work_on(self, part: str, models: Mapping[str, Any]) -> Iterator[tuple[str, bytes]]:
        for name, model in models.items():
            yield name, self._learned if name == TRAINED else self._gradients(part, name, model)

    def _tokens(self, ids: list[str], tokenizer: Any, config: TrainingConfig) -> PartTokens:
        """The examples in order of id, without those that have no label."""
        columns = ["source", "prompt", "response", "messages", "tools"]
        tables = list(fetch_examples(self.job.inputs["examples"], ids, columns))
        table = pa.concat_tables(tables, promote_options="default").combine_chunks()
        return encode_table(tokenizer, table, RowLimit.of(config))

    def _gradients(self, part: str, name: str, model: Any) -> bytes:
        begun, config = time.monotonic(), self.job.config
        settings = (self._of_target, config.target) if name == TARGET else (self._of_proxy, config.proxy)
        found = self._tokens(self.job.parts[part], *settings)
        gradients_NM = example_gradients(model, found.tokens, found.owners, self._sketch)
        _check_finite(gradients_NM, found.example_ids, f"gradients under {name}", "proxy" if name != TARGET else "target")
        self.throughput.examples, self.throughput.tokens = len(gradients_NM), len(found.tokens.ids)
        facts = {"parameters": self._sketch.num_parameters, "exact": self._sketch.is_exact}
        return _table(found.example_ids, gradients_NM, facts | {"seconds": time.monotonic() - begun})

    def _train(self, model: Any) -> tuple[Any, bytes]:
        """The target trained on the sample, and a unit's file of its losses on it at some steps."""
        begun, config = time.monotonic(), self.job.config.target
        found = self._tokens([one for ids in self.job.parts.values() for one in ids], self._of_target, config)
        if not len(found.example_ids):
            raise DataError(
                f"target.max_tokens={config.max_tokens}: no response token is left of any sampled example. Raise it."
            )
        batch = max(1, min(config.global_batch_size, len(found.example_ids) // MIN_STEPS))
        config = config.model_copy(update={"global_batch_size": batch})
        steps = subset_steps(max(len(found.example_ids), len(found.tokens)), config.epochs, batch)
        points = recorded_steps(steps, num_checkpoints=min(self.job.num_target_points, steps), include_untrained=True)
        run = TrainingRun(TRAINED, config, data_order(found.row_ids, steps, batch, config.seed), found.tokens, (), steps)
        recorded = _recorder(points, found, config.precision)
        if config.lora is not None:
            model = with_adapters(model, config)
        device_batch_size = self.job.config.machines.target.device_batch_size
        fine_tune_here(run, model, self._of_target, self.device.type, device_batch_size, [recorded])
        losses_NT = np.stack(recorded.losses, axis=1)
        _check_finite(losses_NT, found.example_ids, "losses of the target that learns the sample", "target")
        self.throughput.examples, self.throughput.tokens = len(losses_NT), len(found.tokens.ids)
        facts = {"steps": points, "batch": batch, "seconds": time.monotonic() - begun}
        return model, _table(found.example_ids, losses_NT, facts)


def _recorder(points: list[int], found: PartTokens, precision: str) -> Any:
    """A callback of the Trainer that keeps the losses (N,) of all examples after each of the given steps, in `losses`."""
    from transformers import TrainerCallback

    score = functools.partial(
        example_losses, tokens=found.tokens, tokens_per_batch=TOKENS_PER_BATCH, precision=precision, owners=found.owners
    )

    class SampleLosses(TrainerCallback):  # type: ignore[misc]
        losses: list[np.ndarray] = []  # noqa: RUF012 - the class is made anew for every training

        def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:  # noqa: ARG002
            self._record(state.global_step, given["model"])

        def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:  # noqa: ARG002
            self._record(state.global_step, given["model"])

        def _record(self, step: int, model: Any) -> None:
            if step in points:
                self.losses.append(score(base_of(model)))
                model.train()

    return SampleLosses()


def _check_finite(values_NF: np.ndarray, ids: pa.Array, what: str, section: str) -> None:
    """Raise DataError that names the first example with a value that is not finite."""
    rows = np.flatnonzero(~np.isfinite(values_NF).all(axis=1))
    if len(rows):
        raise DataError(
            f"{what}: not finite for {len(rows):,} examples ('{ids[int(rows[0])].as_py()}', say): the training diverged. Lower "
            f"{section}.learning_rate."
        )


def _table(ids: pa.Array, values_NF: np.ndarray, facts: dict[str, Any]) -> bytes:
    values = pa.FixedSizeListArray.from_arrays(pa.array(values_NF.astype(np.float32).reshape(-1)), values_NF.shape[1])
    table = pa.table({"example_id": ids, "values": values})
    return table_bytes(table.replace_schema_metadata({FACTS: json.dumps(facts)}), [])
