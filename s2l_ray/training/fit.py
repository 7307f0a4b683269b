"""Fits under Ray Train: resolve the workers, start the group, show its progress, bring back its result.

A fit resumes by itself: Ray Train restarts a failed worker group from the last registered checkpoint, and a new driver
with the same run directory finds it too.
"""

from __future__ import annotations

import dataclasses
import signal
import threading
from collections.abc import Callable
from typing import Any

from s2l_ray.artifacts import Storage
from s2l_ray.config import WorkerConfig
from s2l_ray.errors import S2LError
from s2l_ray.progress import get_log, track

Loop = Callable[[Any, Any], dict[str, Any]]
OUTCOME = "outcome.json"
MAX_WORKER_FAILURES = 3


@dataclasses.dataclass(frozen=True)
class Workers:
    """Resolved numbers of a `machines` section."""

    num_workers: int
    cpus_per_worker: int
    gpus_per_worker: float

    @classmethod
    def resolve(cls, config: WorkerConfig, *, one_per_cpu: bool, divides: int = 0) -> Workers:
        """Numbers for `auto` from what the connected Ray has: one worker per GPU; without GPUs one per CPU or one for all.

        A number that is not given exactly becomes the largest within reach that divides `divides` (a global batch).
        """
        import ray

        resources = ray.cluster_resources()
        cpus, gpus = max(1, int(resources.get("CPU", 1))), int(resources.get("GPU", 0))
        gpus_per_worker = (1.0 if gpus else 0.0) if config.gpus_per_worker == "auto" else float(config.gpus_per_worker)
        if isinstance(config.num_workers, int):
            num_workers = config.num_workers
        else:
            if gpus_per_worker > 0:
                most = max(1, int(gpus / gpus_per_worker))
            else:
                most = max(1, cpus // (1 if config.cpus_per_worker == "auto" else config.cpus_per_worker)) if one_per_cpu else 1
            low, high = config.num_workers if isinstance(config.num_workers, list) else (1, most)
            reach = range(min(max(most, low), high), low - 1, -1)
            num_workers = next((number for number in reach if divides % number == 0), low)
        if config.cpus_per_worker != "auto":
            cpus_per_worker = config.cpus_per_worker
        else:
            cpus_per_worker = 1 if one_per_cpu else max(1, cpus // num_workers)
        return cls(num_workers, cpus_per_worker, gpus_per_worker)

    @property
    def device(self) -> str:
        """Where the workers compute: on a GPU only if they were given one."""
        return "cuda" if self.gpus_per_worker else "cpu"


# --- on the driver -------------------------------------------------------------------------------------------------


def fit(
    stage: str, loop: Loop, job: Any, workers: Workers, work: Storage, on_event: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Run `loop(job, events)` on a Ray Train worker group until it has finished; what rank 0 returned.

    Calling it again with the same `work` directory resumes from the last registered checkpoint. `on_event` is called
    whenever the workers say something. Raises the S2LError that the loop raised, if it did.
    """
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.util.queue import Queue

    resources: dict[str, float] = {"CPU": workers.cpus_per_worker}
    if workers.gpus_per_worker:
        resources["GPU"] = workers.gpus_per_worker
    events = Queue(actor_options={"num_cpus": 0})
    listener = threading.Thread(target=_show_events, args=(stage, events, on_event), daemon=True)
    storage = work.child("ray")
    trainer = TorchTrainer(
        _guarded,
        train_loop_config={"loop": loop, "job": job, "work": work, "events": events, "threads": workers.cpus_per_worker},
        scaling_config=ScalingConfig(
            num_workers=workers.num_workers, use_gpu=workers.gpus_per_worker > 0, resources_per_worker=resources
        ),
        run_config=RunConfig(
            name="fit",
            storage_path=storage.path() if storage.is_local else storage.uri,
            failure_config=FailureConfig(max_failures=MAX_WORKER_FAILURES),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
        torch_config=TorchConfig(backend="nccl" if workers.gpus_per_worker else "gloo"),
    )
    work.delete(OUTCOME)
    listener.start()
    # Ray Train takes SIGINT for itself, keeps it when it is done, and leaves by SystemExit(0) as if all were well.
    handler = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit()
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)
        events.put(None)
        listener.join()
        events.shutdown()
    outcome = work.read_json(OUTCOME)
    assert outcome is not None, "the first worker left no outcome"
    if "error" in outcome:
        kinds = {kind.__name__: kind for kind in S2LError.__subclasses__()}
        raise kinds.get(outcome["error"], S2LError)(outcome["message"])
    return dict(outcome["result"])


def _show_events(stage: str, events: Any, on_event: Callable[[], None]) -> None:
    """Show what rank 0 sends until None comes: (steps done, steps in all, note), or a line for the log."""
    with track(stage, 0, "step") as progress:
        while (event := events.get()) is not None:
            on_event()
            if isinstance(event, str):
                get_log(stage).info(event)
            else:
                progress.at(*event)


# --- on a worker ---------------------------------------------------------------------------------------------------


def _guarded(train_loop_config: dict[str, Any]) -> None:
    """Run the loop; leave its result, or what the user must mend, where the driver finds it.

    A mistake of the user is not a failure that a restart would heal: it ends the fit instead of being retried.
    """
    import ray.train
    import torch

    from s2l_ray.training.limits import keep_freed_memory

    quiet_libraries()
    keep_freed_memory()
    torch.set_num_threads(train_loop_config["threads"])
    work, context = train_loop_config["work"], ray.train.get_context()
    if work.exists(OUTCOME):  # a worker met the user's mistake and took the group down
        return
    try:
        result = train_loop_config["loop"](train_loop_config["job"], train_loop_config["events"])
    except S2LError as error:
        work.write_json(OUTCOME, {"error": type(error).__name__, "message": str(error)})
        if context.get_world_size() > 1:
            raise  # the others may be waiting for this worker
        return
    if context.get_world_rank() == 0:
        work.write_json(OUTCOME, {"result": result})


def quiet_libraries() -> None:
    """Keep the chatter of libraries in a worker out of the user's log; their errors still come as exceptions."""
    import logging
    import warnings

    import transformers

    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for name in ("transformers", "accelerate", "DeepSpeed", "torch"):
        logging.getLogger(name).setLevel(logging.ERROR)
