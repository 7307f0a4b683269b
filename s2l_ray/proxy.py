"""The proxy: a small model fine-tuned on the whole pool while T of its states are kept.

A kept checkpoint is a Hugging Face folder, `step-000500/`, whose `checkpoint.json` is written last and lists its files.
Checkpoint i of T follows step round(i * S / T) of S for any number of workers.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from s2l_ray.config import ExamplesConfig, ProxyConfig, TrainingWorkerConfig
from s2l_ray.errors import ConfigError, DataError, S2LError, cause_of
from s2l_ray.progress import get_log
from s2l_ray.runtime.fit import fit
from s2l_ray.runtime.room import await_room
from s2l_ray.runtime.workers import Workers
from s2l_ray.storage.artifacts import Artifact
from s2l_ray.storage.layout import CHECKPOINT, TOKENIZER, step_folder
from s2l_ray.storage.places import Storage
from s2l_ray.storage.records import FileRecord
from s2l_ray.storage.stages import Context
from s2l_ray.training.batches import check_steps, num_steps
from s2l_ray.training.checkpoints import checkpoint_records, keep_checkpoint, steps_of
from s2l_ray.training.fine_tuning import fine_tune, training_loss
from s2l_ray.training.models import check_positions, load_model, make_model
from s2l_ray.training.schedule import recorded_steps
from s2l_ray.training.token_parts import TokenParts
from s2l_ray.training.token_pools import row_counts, said_counts
from s2l_ray.training.token_rows import RowLimit
from s2l_ray.training.tokenizers import check_own_tokenizer, load_tokenizer, proxy_tokenizer, split_revision
from s2l_ray.training.trackers import Tracking
from s2l_ray.training.training_run import TrainingRun

# So many are made into tokens on all CPUs before the training begins; fewer by its workers, sooner than others are started.
MANY_CONVERSATIONS = 10_000


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
    corpus: ExamplesConfig
    tracking: Tracking | None = None

    def token_parts(self) -> TokenParts:
        """The pool's tokens, once the tokenizer is in the proxy's directory."""
        return TokenParts.of(self.examples, self.storage.child(TOKENIZER), RowLimit.of(self.config), self.scratch, self.corpus)


def build(context: Context) -> Artifact:
    """Train the proxy (or take the checkpoints that the config names) and publish its checkpoints."""
    config, machines, draft = context.section, context.machines, context.draft
    workers = Workers.resolve(machines, one_per_cpu=False, at_most=config.global_batch_size)
    corpus, tracking = context.config.examples, Tracking.of(context)
    job = ProxyJob(config, context.inputs["examples"], draft.storage, draft.shared, machines, corpus, tracking)
    if config.checkpoints:
        result = _run_once(take_checkpoints, job, workers)
    else:
        if job.examples.summary.get("conversations", 0) > MANY_CONVERSATIONS:
            _run_once(make_tokenizer, job, workers)
            job.token_parts().make_all(context.config.machines.examples)
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
    parts.make(context.get_world_rank(), context.get_world_size())
    torch.distributed.barrier()
    found = parts.pool() if context.get_local_rank() == 0 else None
    torch.distributed.barrier()
    pool = found or parts.pool(check=False)
    tokens = pool.tokens
    pool.check("proxy", parts.limit, job.corpus)
    if len(tokens) < config.global_batch_size:
        raise DataError(
            f"the pool has {len(tokens):,} examples, fewer than one batch of proxy.global_batch_size="
            f"{config.global_batch_size}. Use a smaller batch or a larger corpus."
        )
    steps = num_steps(len(tokens), config.epochs, config.global_batch_size)
    check_steps(steps, "proxy")
    kept = checkpoint_steps(config, steps)
    model = make_model(config, tokenizer)
    check_positions(model, config.max_tokens, "proxy")
    num_parameters = int(model.num_parameters())
    if is_first:
        sizes = f"{num_parameters:,} parameters, {pool.sizes}, {tokens.lengths.sum():,} tokens, {steps:,} steps"
        for line in (*said_counts(pool.changed, pool.refused), sizes):
            events.put(line)

    def keep(step: int, model: Any) -> None:
        keep_checkpoint(job.storage, step, model, tokenizer)

    order = pool.order(steps, config.global_batch_size, config.seed)
    run = TrainingRun("proxy", config, order, tokens, kept, steps)
    trainer = fine_tune(run, model, tokenizer, job.machines, events, on_keep=keep, tracking=job.tracking)
    return {
        "rows": pool.num_examples,
        **row_counts(pool.changed, pool.refused),
        "steps": kept,
        "total_steps": steps,
        "global_batch_size": config.global_batch_size,
        "num_parameters": num_parameters,
        "vocab_size": len(tokenizer),
        "tokens": int(np.sum(tokens.lengths[order])),
        "training_loss": training_loss(trainer),
    }


def make_tokenizer(job: ProxyJob) -> None:
    """Put the run's tokenizer into the proxy's directory."""
    shared_tokenizer(job, is_first=True)


def shared_tokenizer(job: ProxyJob, is_first: bool) -> Any:
    """The run's tokenizer, from the proxy's directory; the first worker puts it there, the others wait for it."""
    import torch.distributed

    problem: list[Exception | None] = [None]
    if is_first and not job.storage.exists(f"{TOKENIZER}/tokenizer_config.json"):
        try:
            with tempfile.TemporaryDirectory() as folder:
                proxy_tokenizer(job.config, job.examples).save_pretrained(folder)
                job.storage.upload(folder, TOKENIZER)
        except S2LError as error:  # raised on every worker, or the others would wait for this one
            problem = [error]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(problem, src=0)
    if problem[0] is not None:
        raise problem[0]
    return load_tokenizer(job.storage.local_folder(TOKENIZER))


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
