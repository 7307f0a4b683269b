"""The proxy: a small model fine-tuned on the whole pool while T of its states are kept.

A kept checkpoint is a Hugging Face folder, `step-000500/`, whose `checkpoint.json` is written last and lists its files.
Checkpoint i of T follows step round(i * S / T) of S whatever the number of workers.
"""

from __future__ import annotations

import re
import tempfile
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from s2l_ray.config import ProxyConfig, TrainedTokenizer, TrainingWorkerConfig
from s2l_ray.errors import ArtifactError, ConfigError, DataError, S2LError, cause_of
from s2l_ray.examples.reading import read_pool
from s2l_ray.progress import get_log
from s2l_ray.runtime.fit import fit
from s2l_ray.runtime.room import await_room
from s2l_ray.runtime.workers import Workers
from s2l_ray.storage.artifacts import Artifact
from s2l_ray.storage.layout import CHECKPOINT, TOKENIZER, folder_step, step_folder
from s2l_ray.storage.places import Storage
from s2l_ray.storage.records import FileRecord
from s2l_ray.storage.stages import Context
from s2l_ray.training.batches import check_steps, data_order, num_steps
from s2l_ray.training.fine_tuning import fine_tune, training_loss
from s2l_ray.training.models import check_positions, load_model, make_model, save_model
from s2l_ray.training.schedule import recorded_steps
from s2l_ray.training.token_parts import TokenParts
from s2l_ray.training.tokens import load_tokenizer, row_counts
from s2l_ray.training.training_run import TrainingRun

# Rows that a tokenizer is trained on: parts are sorted by a hash of the content, so the first ones are a random sample.
TOKENIZER_ROWS = 200_000


def checkpoint_steps(config: ProxyConfig, steps: int) -> list[int]:
    """The steps after which a checkpoint is kept, ascending. Raises ConfigError where there are fewer steps than that."""
    return recorded_steps(
        steps,
        num_checkpoints=config.num_checkpoints,
        schedule=config.schedule,
        every_steps=config.checkpoint_every_steps,
        include_untrained=config.include_untrained,
    )


@dataclass(frozen=True)
class ProxyJob:
    """What a worker of the fit needs."""

    config: ProxyConfig
    examples: Artifact
    storage: Storage
    scratch: Storage
    machines: TrainingWorkerConfig

    def token_parts(self) -> TokenParts:
        """The pool's tokens, once the tokenizer is in the proxy's directory."""
        return TokenParts.of(self.examples, self.storage.child(TOKENIZER), self.config.max_tokens, self.scratch)


def build(context: Context) -> Artifact:
    """Train the proxy (or take the checkpoints that the config names) and publish its checkpoints."""
    config, machines, draft = context.section, context.machines, context.draft
    workers = Workers.resolve(machines, one_per_cpu=False, at_most=config.global_batch_size)
    job = ProxyJob(config, context.inputs["examples"], draft.storage, draft.shared, machines)
    if config.checkpoints:
        result = _run_once(take_checkpoints, job, workers)
    else:
        overlap = context.overlap(context)
        try:
            result = fit(
                "proxy",
                train_proxy,
                job,
                workers,
                draft.work,
                on_event=lambda: overlap.on_event(draft.storage),
                resume_minutes=machines.resume_minutes,
            )
        finally:
            overlap.stop()
    for step in result["steps"]:
        name = f"{step_folder(step)}/{CHECKPOINT}"
        draft.add(*checkpoint_records(draft.storage, step), FileRecord.of(name, draft.storage.read(name)))
    for name in draft.storage.names(TOKENIZER):
        draft.has(f"{TOKENIZER}/{name}")
    get_log("proxy").info("kept %d checkpoints: steps %s", len(result["steps"]), ", ".join(map(str, result["steps"])))
    return draft.publish(result, asdict(workers))


def finished_steps(storage: Storage) -> list[int]:
    """The steps whose checkpoints lie whole in the proxy's directory, ascending."""
    names = [name for name in storage.names(recursive=True) if name.endswith(f"/{CHECKPOINT}")]
    steps = (folder_step(name.removesuffix(f"/{CHECKPOINT}")) for name in names)
    return sorted(step for step in steps if step is not None)


def checkpoint_records(storage: Storage, step: int) -> list[FileRecord]:
    """The files of a kept checkpoint. Raises ArtifactError where it is not whole."""
    name = f"{step_folder(step)}/{CHECKPOINT}"
    record = storage.read_json(name)
    if record is None:
        raise ArtifactError(f"{storage.uri}/{name}: missing. Remove {storage.uri} and run again.")
    return [FileRecord(**file) for file in record["files"]]


def checkpoint_folder(storage: Storage, step: int) -> Path:
    """A local path of a kept checkpoint, its files checked against their hashes. Raises ArtifactError naming a damaged one."""
    local = storage.local_folder(step_folder(step))
    for record in checkpoint_records(storage, step):
        file = local / record.path.partition("/")[2]
        if not file.is_file() or FileRecord.of_file(record.path, file) != record:
            raise ArtifactError(
                f"{storage.uri}/{record.path}: damaged or missing. Remove {storage.uri} and the stages after it, and run again "
                "to rebuild them."
            )
    return local


def _run_once(function: Any, job: ProxyJob, workers: Workers) -> Any:
    """Run a function of the job in a Ray task; a user's mistake is raised here as it was there."""
    import ray

    await_room("proxy", workers.resources, 1, workers.wait_minutes)
    task = ray.remote(num_cpus=workers.cpus_per_worker, num_gpus=workers.gpus_per_worker)(function)
    try:
        return ray.get(task.remote(job))
    except ray.exceptions.RayTaskError as error:
        raise cause_of(error) or error from None


# --- on a worker ---------------------------------------------------------------------------------------------------


def train_proxy(job: ProxyJob, events: Any) -> dict[str, Any]:
    """The training loop of every worker."""
    import ray.train
    import torch.distributed

    config, context = job.config, ray.train.get_context()
    is_first = context.get_world_rank() == 0
    tokenizer = shared_tokenizer(job, is_first)
    parts = job.token_parts()
    for part in job.examples.parts()[context.get_world_rank() :: context.get_world_size()]:
        parts.read(part)  # every worker makes its share
    torch.distributed.barrier()
    ids, tokens, changed = parts.pool()
    if len(ids) < config.global_batch_size:
        raise DataError(
            f"the pool has {len(ids):,} examples, fewer than one batch of proxy.global_batch_size={config.global_batch_size}. "
            "Use a smaller batch or a larger corpus."
        )
    steps = num_steps(len(ids), config.epochs, config.global_batch_size)
    check_steps(steps, "proxy")
    kept = checkpoint_steps(config, steps)
    model = make_model(config, tokenizer)
    check_positions(model, config.max_tokens, "proxy")
    num_parameters = int(model.num_parameters())
    if is_first:
        sizes = f"{num_parameters:,} parameters, {len(ids):,} examples, {len(tokens.ids):,} tokens, {steps:,} steps"
        events.put(sizes)

    def keep(step: int, model: Any) -> None:
        keep_checkpoint(job.storage, step, model, tokenizer)

    order = data_order(ids, config.epochs, config.global_batch_size, config.seed)
    run = TrainingRun("proxy", config, order, tokens, kept, steps)
    trainer = fine_tune(run, model, tokenizer, job.machines, events, on_keep=keep)
    return {
        "rows": len(ids),
        **row_counts(changed),
        "steps": kept,
        "total_steps": steps,
        "global_batch_size": config.global_batch_size,
        "num_parameters": num_parameters,
        "vocab_size": len(tokenizer),
        "tokens": int(np.sum(tokens.lengths[order])),
        "training_loss": training_loss(trainer),
    }


def keep_checkpoint(storage: Storage, step: int, model: Any, tokenizer: Any) -> None:
    """Write a checkpoint's folder into the proxy's directory, its `checkpoint.json` last."""
    storage.delete(f"{step_folder(step)}/{CHECKPOINT}")  # a resumed training comes by again: half of it must not look whole
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, tokenizer, Path(folder))
        records = storage.upload(folder, step_folder(step))
    storage.write_json(f"{step_folder(step)}/{CHECKPOINT}", {"step": step, "files": [asdict(record) for record in records]})


def shared_tokenizer(job: ProxyJob, is_first: bool) -> Any:
    """The run's tokenizer, from the proxy's directory; the first worker puts it there, the others wait for it."""
    import torch.distributed

    problem: list[Exception | None] = [None]
    if is_first and not job.storage.exists(f"{TOKENIZER}/tokenizer_config.json"):
        try:
            with tempfile.TemporaryDirectory() as folder:
                _find_tokenizer(job).save_pretrained(folder)
                job.storage.upload(folder, TOKENIZER)
        except S2LError as error:  # raised on every worker, or the others would wait for this one
            problem = [error]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(problem, src=0)
    if problem[0] is not None:
        raise problem[0]
    return load_tokenizer(job.storage.local_folder(TOKENIZER))


def _find_tokenizer(job: ProxyJob) -> Any:
    """The tokenizer that the config asks for: trained on the pool, named, or the model's own."""
    config = job.config
    if isinstance(config.tokenizer, TrainedTokenizer):
        return train_tokenizer(config.tokenizer, job.examples)
    if isinstance(config.tokenizer, str):
        return load_tokenizer(config.tokenizer, trust_remote_code=config.trust_remote_code)
    location, revision = (split_revision(config.checkpoints[0])) if config.checkpoints else (config.model, config.revision)
    return load_tokenizer(str(location), revision, config.trust_remote_code)


def train_tokenizer(config: TrainedTokenizer, examples: Artifact) -> Any:
    """A byte-level BPE tokenizer of the pool's prompts and responses; one special token ends sequences and pads them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    end = "<|endoftext|>"
    tokenizer = Tokenizer(models.BPE())
    # Digits one by one: numbers then share their pieces, whatever their length.
    split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[end],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )

    def texts() -> Any:
        rows = 0
        for part in examples.parts():
            table = read_pool(examples, part, ["prompt", "response"])
            yield table["prompt"].to_pylist()
            yield table["response"].to_pylist()
            rows += table.num_rows
            if rows >= TOKENIZER_ROWS:
                return

    tokenizer.train_from_iterator(texts(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, pad_token=end)


def split_revision(location: str) -> tuple[str, str | None]:
    """A checkpoint's place as (path or Hub id, revision): `EleutherAI/pythia-70m@step1000`."""
    place, at, revision = location.rpartition("@")
    return (place, revision) if at and not Path(location).exists() else (location, None)


def steps_of(checkpoints: list[str]) -> list[int]:
    """The steps of given checkpoints: the numbers that their names end with where these ascend, else 1, 2, 3 ..."""
    found = [re.search(r"(\d+)/?$", place) for place in checkpoints]
    steps = [int(match.group(1)) for match in found if match]
    ascending = len(steps) == len(checkpoints) and all(a < b for a, b in pairwise(steps))
    return steps if ascending else list(range(1, len(checkpoints) + 1))


def take_checkpoints(job: ProxyJob) -> dict[str, Any]:
    """Copy checkpoints that exist into the proxy's directory, as safetensors, and train nothing."""
    config = job.config
    tokenizer = shared_tokenizer(job, is_first=True)
    steps = steps_of(config.checkpoints)
    num_parameters, shapes = 0, {}
    for step, location in zip(steps, config.checkpoints, strict=True):
        place, revision = split_revision(location)
        model = load_model(place, tokenizer, revision=revision, trust_remote_code=config.trust_remote_code)
        check_positions(model, config.max_tokens, "proxy")
        check_own_tokenizer(place, revision, tokenizer)
        shapes[location] = (type(model).__name__, int(model.num_parameters()), model.get_input_embeddings().weight.shape[0])
        if len(set(shapes.values())) > 1:
            raise ConfigError(
                f"proxy.checkpoints: '{location}' and '{config.checkpoints[0]}' differ in class, parameters or vocabulary "
                f"({shapes[location]}, {shapes[config.checkpoints[0]]}). Give checkpoints of one training."
            )
        num_parameters = int(model.num_parameters())
        keep_checkpoint(job.storage, step, model, tokenizer)
    return {"steps": steps, "checkpoints": config.checkpoints, "num_parameters": num_parameters, "vocab_size": len(tokenizer)}


def check_own_tokenizer(place: str, revision: str | None, tokenizer: Any) -> None:
    """Raise ConfigError where a checkpoint comes with a tokenizer of another vocabulary than the run's."""
    try:
        own = load_tokenizer(place, revision)
    except ConfigError:  # it comes with none, or none that can be used
        return
    if own.get_vocab() != tokenizer.get_vocab():
        raise ConfigError(
            f"proxy.checkpoints: '{place}' has a tokenizer of {len(own):,} entries, not the run's of {len(tokenizer):,}. "
            "Set proxy.tokenizer to the one that the checkpoints were trained with."
        )
