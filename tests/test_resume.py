"""Interrupted at any line and run again: what was finished stays, and the result is that of a run left in peace.

One run is stopped four times, each time by other means and in another place, and then ends; the tests look at what was
there after every stop. Also here: training with DeepSpeed ZeRO on two workers is plain training.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from torch.nn import functional
from transformers import AutoModelForCausalLM, get_scheduler

from s2l_ray.config import TargetConfig, TargetWorkerConfig, TrainedTokenizer
from s2l_ray.runtime.fit import fit
from s2l_ray.runtime.workers import Workers
from s2l_ray.storage.artifacts import Artifact, Key
from s2l_ray.storage.drafts import Draft
from s2l_ray.storage.layout import TOKENIZER
from s2l_ray.storage.places import Storage
from s2l_ray.target import TargetJob, train_target
from s2l_ray.training.adapters import with_adapters
from s2l_ray.training.batches import data_order, subset_steps
from s2l_ray.training.models import make_model
from s2l_ray.training.token_pools import pool_tokens
from s2l_ray.training.token_rows import RowLimit, TokenRows
from s2l_ray.training.tokenizers import load_tokenizer, train_tokenizer
from tests.building import CORPUS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

NUM_ROWS = 640
STEPS_KEPT = 5
# `s2l` in a process of its own, whose workers keep a resume point as often as there is one to keep, not every 30 s.
DRIVER = """
import logging, ray
def keep_resume_points_often():
    from s2l_ray.training import resume_points as recorder
    recorder.RESUME_SECONDS = 0.0
ray.init(num_cpus=2, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False,
         runtime_env={"worker_process_setup_hook": keep_resume_points_often})
from s2l_ray.cli import main
main()
"""


# --- a run in a process of its own ---------------------------------------------------------------------------------


def write_config(folder: Path) -> Path:
    generator = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(generator.choices(letters, k=8)) for _ in range(NUM_ROWS)]
    rows = [{"prompt": f"Say {word} twice: ", "response": f"{word} {word}", "source": word[0]} for word in words]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    one = {"num_workers": 1, "cpus_per_worker": 1}
    model = {"scratch": {"layers": 2, "hidden": 64, "heads": 2, "max_positions": 128}}
    training = {"model": model, "epochs": 2, "global_batch_size": 16, "learning_rate": 1.0e-3, "max_tokens": 64}
    values = {
        "name": "interrupted",
        "examples": {"dataset": str(folder / "corpus.jsonl"), "source_field": "source", "rows_per_part": 32},
        "proxy": {
            **training,
            "tokenizer": {"train": "bpe", "vocab_size": 300},
            "num_checkpoints": STEPS_KEPT,
            "include_untrained": True,
        },
        "clustering": {"num_clusters": 8},
        "selection": {"budget": 0.2},
        "target": training,
        # One example per forward pass makes a unit slow enough to be interrupted.
        "trajectories": {"tokens_per_batch": 1},
        "machines": {"examples": one, "proxy": one, "trajectories": one, "target": one},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


class Started:
    """An `s2l run` in a session of its own, with its output in a file."""

    def __init__(self, log: Path, *arguments: object) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        command = [sys.executable, "-c", DRIVER, *map(str, arguments)]
        self._log = log
        with log.open("w") as file:
            self._process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, env=environment
            )
        self.pid = self._process.pid

    @property
    def output(self) -> str:
        return self._log.read_text()

    def wait_until(self, condition: Callable[[], object], what: str, seconds: float = 240) -> None:
        """Return as soon as the condition holds. Fails where the process ends before."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self._process.poll() is None, f"ended before {what}:\n{self.output}"
            assert time.monotonic() < deadline, f"no {what} in {seconds} s:\n{self.output}"
            time.sleep(0.005)

    def kill(self) -> None:
        """SIGKILL the driver, its Ray and all workers: nobody has time to tidy up."""
        self._end(signal.SIGKILL)
        self._process.wait()

    def _end(self, number: int) -> None:
        while members := [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if self._is_ours(pid)]:
            for pid in members:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            self._process.poll()
            time.sleep(0.05)

    def _is_ours(self, pid: int) -> bool:
        """Whether a living process belongs to the session that this one began."""
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            return state != "Z" and os.getsid(pid) == self.pid
        except (ProcessLookupError, FileNotFoundError):
            return False

    def interrupt(self) -> int:
        """Ctrl-C, which a terminal sends to the whole group; the exit code."""
        os.killpg(self.pid, signal.SIGINT)
        code = self._process.wait(120)
        self._end(signal.SIGKILL)
        return code

    def finish(self, seconds: float = 400) -> int:
        code = self._process.wait(seconds)
        self._end(signal.SIGKILL)
        return code


def times(*folders: Path) -> dict[str, int]:
    """When each file below was last written, by path."""
    return {str(path): path.stat().st_mtime_ns for folder in folders for path in folder.rglob("*") if path.is_file()}


def steps_kept(run: Path) -> list[int]:
    return sorted(int(p.parent.name.removeprefix("step-")) for p in (run / "proxy").glob("step-*/checkpoint.json"))


def resume_step(run: Path) -> int:
    """The step of the last resume point that Ray Train has registered, -1 for none."""
    snapshots = list((run / ".work/proxy/ray").rglob("checkpoint_manager_snapshot.json"))
    with contextlib.suppress(FileNotFoundError):
        return max([-1, *(int(s) for path in snapshots for s in re.findall(r'"step": *(\d+)', path.read_text()))])
    return -1


def units(run: Path) -> list[Path]:
    return sorted((run / ".work/losses").rglob("part-*.parquet"))


@dataclass
class Story:
    """The interrupted run, and what was seen on the way."""

    config: Path
    run: Path
    refused: subprocess.CompletedProcess[str] | None = None
    holder: int = 0
    seen: dict[str, dict[str, int]] = field(default_factory=dict)
    """After each stop: the times of the files that were finished then."""

    exit_code: int = -1
    interrupted: str = ""
    output: str = ""

    @property
    def arguments(self) -> list[object]:
        return ["run", self.config, "--run-dir", self.run, "--until", "selection"]


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    folder = tmp_path_factory.mktemp("interrupted")
    story = Story(write_config(folder), folder / "run")
    run = story.run

    def stop(name: str, started: Started, *folders: Path) -> None:
        started.kill()
        story.seen[name] = times(*folders)

    # 1. SIGKILL in the middle of the proxy's training, with a checkpoint of the recipe and a resume point after it.
    started = Started(folder / "1.log", *story.arguments)
    started.wait_until((run / "proxy" / "building.json").exists, "proxy")
    story.holder = started.pid
    second = [Path(sys.executable).with_name("s2l"), *story.arguments]
    story.refused = subprocess.run([str(word) for word in second], capture_output=True, text=True, check=False)
    started.wait_until(lambda: len(steps_kept(run)) >= 2 and resume_step(run) >= steps_kept(run)[1], "resume point")
    kept = [run / "proxy" / f"step-{step:06d}" for step in steps_kept(run) if step <= resume_step(run)]
    stop("proxy", started, run / "examples", *kept)

    # 2. Ctrl-C later in the same training.
    before = len(steps_kept(run))
    started = Started(folder / "2.log", *story.arguments)
    started.wait_until(lambda: len(steps_kept(run)) > before, "next checkpoint")
    story.exit_code = started.interrupt()
    story.interrupted = started.output

    # 3. SIGKILL as soon as a stage is finished, before the next has anything.
    started = Started(folder / "3.log", *story.arguments)
    started.wait_until((run / "proxy" / "manifest.json").exists, "finished proxy")
    stop("between", started, run / "examples", run / "proxy")

    # 4. SIGKILL in the middle of scoring.
    started = Started(folder / "4.log", *story.arguments)
    building, before = run / "trajectories" / "building.json", len(units(run))  # some were scored beside the training
    started.wait_until(lambda: building.exists() and len(units(run)) >= before + 3, "units")
    stop("trajectories", started, run / "examples", run / "proxy", run / ".work/losses")

    # 5. To the end, with an eye on the units, since finished stages throw their scratch directory away.
    story.seen["last"] = {}
    started = Started(folder / "5.log", *story.arguments)

    def is_finished() -> bool:
        with contextlib.suppress(FileNotFoundError):
            story.seen["last"] |= times(run / ".work/losses")
        return (run / "trajectories" / "manifest.json").exists()

    started.wait_until(is_finished, "trajectories")
    assert started.finish() == 0, started.output
    story.output = started.output
    return story


@pytest.fixture(scope="module")
def undisturbed(story: Story, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from the same proxy that nobody interrupts."""
    folder = tmp_path_factory.mktemp("undisturbed")
    for name in ("examples", "proxy"):
        shutil.copytree(story.run / name, folder / "run" / name)
    started = Started(folder / "log", "run", story.config, "--run-dir", folder / "run", "--until", "selection")
    assert started.finish() == 0, started.output
    return folder / "run"


# --- what a user gets ----------------------------------------------------------------------------------------------


def test_a_second_run_on_a_directory_is_refused_with_who_holds_it(story):
    assert story.refused is not None
    assert story.refused.returncode == 2
    holder = f"process {story.holder} of {getpass.getuser()} on "
    assert f"s2l: {story.run}: another run holds it ({holder}" in story.refused.stderr
    assert "Traceback" not in story.refused.stderr


def test_killed_training_goes_on_from_its_resume_point_and_keeps_its_checkpoints(story):
    kept = {path for path in story.seen["proxy"] if "/step-" in path}
    assert kept, "at least the untrained model and one checkpoint"
    for path in kept:  # a training begun anew would have written them again
        assert Path(path).stat().st_mtime_ns == story.seen["proxy"][path], path


def test_finished_stages_are_not_touched_after_a_kill(story):
    for stop in ("proxy", "between", "trajectories"):
        for path, changed in story.seen[stop].items():
            if "/.work/" not in path:
                assert Path(path).stat().st_mtime_ns == changed, path
    assert "examples      reused" in story.output
    assert "proxy         reused" in story.output


def test_an_interrupted_command_fails_and_says_that_the_same_one_goes_on(story):
    assert story.exit_code == 1, story.interrupted
    assert story.interrupted.rstrip().endswith("s2l: interrupted. The same command goes on where this one stopped.")
    assert "Traceback" not in story.interrupted


def test_killed_scoring_resumes_without_scoring_a_part_twice(story):
    finished = {path: changed for path, changed in story.seen["trajectories"].items() if "/.work/losses/" in path}
    num_units = len(list((story.run / "examples").glob("part-*.parquet")))
    assert 3 <= len(finished) < num_units * len(steps_kept(story.run)), "killed in the middle"
    assert {path: story.seen["last"].get(path) for path in finished} == finished
    assert "trajectories  resume" in story.output


def test_an_interrupted_run_gives_the_bytes_of_one_left_in_peace(story, undisturbed):
    names = ["trajectories", "clustering", "selection"]
    ours = {str(p.relative_to(story.run)) for name in names for p in (story.run / name).rglob("*") if p.is_file()}
    theirs = {str(p.relative_to(undisturbed)) for name in names for p in (undisturbed / name).rglob("*") if p.is_file()}
    assert ours == theirs
    assert "selection/selected.parquet" in ours
    for name in ours - {f"{name}/manifest.json" for name in names}:
        assert (story.run / name).read_bytes() == (undisturbed / name).read_bytes(), name
    for name in names:
        one, other = (json.loads((run / name / "manifest.json").read_text()) for run in (story.run, undisturbed))
        assert {key: one[key] for key in ("fingerprint", "recipe", "inputs", "files")} == {
            key: other[key] for key in ("fingerprint", "recipe", "inputs", "files")
        }


def test_an_interrupted_training_gives_the_weights_of_one_left_in_peace(story, tmp_path):
    started = Started(tmp_path / "log", "run", story.config, "--run-dir", tmp_path / "run", "--until", "proxy")
    assert started.finish() == 0, started.output
    assert steps_kept(tmp_path / "run") == steps_kept(story.run)
    for step in steps_kept(story.run):
        name = f"proxy/step-{step:06d}/model.safetensors"
        assert (tmp_path / "run" / name).read_bytes() == (story.run / name).read_bytes(), name


# --- ZeRO ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    """A corpus and a tokenizer as the target's training gets them."""

    examples: Artifact
    proxy: Artifact
    ids: list[str]

    @property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.proxy.folder(TOKENIZER))


ZERO = TargetConfig(
    model={"scratch": {"layers": 2, "hidden": 32, "heads": 2, "max_positions": 128}},  # type: ignore[arg-type]
    epochs=2,
    global_batch_size=8,
    learning_rate=1.0e-3,
    warmup_fraction=0.1,
    max_tokens=64,
)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    run = Storage(str(tmp_path_factory.mktemp("bench")))
    generator = random.Random(1)
    # Responses of very different length: a mean over batches and not over tokens would show.
    responses = ["ab " * generator.randint(1, 12) for _ in range(48)]
    examples = Draft.open(run, Key("examples", 1, {}, {}))
    ids = [f"row-{i:02d}" for i in range(48)]
    columns = {"prompt": [f"count {i}: " for i in range(48)], "response": responses, "split": ["pool"] * 48}
    examples.write_table("part-00000.parquet", pa.table({"example_id": ids, "source": ["s"] * 48, **columns}))
    made = examples.publish({"rows": 48})
    proxy = Draft.open(run, Key("proxy", 1, {}, {}))
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TrainedTokenizer(vocab_size=300), made).save_pretrained(folder)
    proxy.add(*proxy.storage.upload(folder, TOKENIZER))
    return Bench(made, proxy.publish({}), ids[:40])


def sum_of_losses(model: Any, tokens: TokenRows, row: int) -> tuple[torch.Tensor, int]:
    """The cross-entropy of a row's labels, alone in its batch, and how many labels there are."""
    ids, is_label = (torch.from_numpy(array) for array in tokens[row])
    logits = model(input_ids=ids.long()[None]).logits[0, :-1]
    labels = ids.long()[1:].masked_fill(~is_label[1:], -100)
    return functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum"), int(is_label.sum())


def plain_training(bench: Bench, config: TargetConfig = ZERO) -> tuple[list[float], Any]:
    """The same recipe as a loop in plain torch on one process: the losses of the steps, and the model."""
    pool = pool_tokens(bench.examples, bench.tokenizer, RowLimit.of(config), keep=set(bench.ids))
    ids, tokens = pool.row_ids, pool.tokens
    steps = subset_steps(max(len(bench.ids), len(ids)), config.epochs, config.global_batch_size)
    order = data_order(ids, steps, config.global_batch_size, config.seed)
    model = make_model(config, bench.tokenizer).train()
    model = model if config.lora is None else with_adapters(model, config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # Biases and norms are not decayed.
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=config.learning_rate)
    schedule = get_scheduler(config.lr_schedule, optimizer, round(config.warmup_fraction * steps), steps)
    losses = []
    for step in range(steps):
        pairs = [sum_of_losses(model, tokens, int(row)) for row in order.reshape(steps, -1)[step]]
        loss = sum(total for total, _ in pairs) / sum(count for _, count in pairs)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses, model.eval()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_training_on_two_workers_equals_plain_torch_training(bench, ray_session, tmp_path, stage):
    config = ZERO.model_copy(update={"zero_stage": stage})
    storage = Storage(str(tmp_path / "target"))
    machines = TargetWorkerConfig(device_batch_size=2)
    job = TargetJob(config, bench.examples, bench.proxy, storage, {"selected": bench.ids}, machines, CORPUS)
    result = fit("target", train_target, job, Workers(2, 1, 0.0, 2), Storage(str(tmp_path / "work")))
    expected, plain = plain_training(bench)
    steps, losses = zip(*result["training_loss"]["selected"], strict=True)
    assert list(steps) == list(range(1, len(expected) + 1))
    np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-5)
    assert losses[-1] < losses[0] - 0.1, "it learns"

    folder = tmp_path / "target" / "model"
    assert not [p for p in folder.rglob("*") if p.suffix in {".bin", ".pt", ".pkl"}]
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    pool = pool_tokens(bench.examples, bench.tokenizer, RowLimit.of(config))
    tokens = pool.tokens
    assert pool.num_examples == 48, "rows outside the subset, too"
    with torch.no_grad():
        ours, theirs = ([float(sum_of_losses(m, tokens, row)[0]) for row in range(48)] for m in (model, plain))
    counts = tokens.num_labels
    np.testing.assert_allclose(np.array(ours) / counts, np.array(theirs) / counts, rtol=0, atol=1e-5)


# --- `s2l select`, killed at any moment ----------------------------------------------------------------------------


def select_command(source: Path, output: Path, *options: str) -> list[str]:
    command = [str(Path(sys.executable).with_name("s2l")), "select", str(source), "--output", str(output)]
    return [*command, "--budget", "0.1", "--budget", "tokens:9000", "--num-clusters", "40", "--stratify-by", "source", *options]


def results_of(output: Path) -> dict[str, bytes]:
    paths = [path for stage in ("clustering", "selection") for path in sorted((output / stage).iterdir())]
    return {f"{path.parent.name}/{path.name}": path.read_bytes() for path in paths if path.name != "manifest.json"}


def test_select_killed_at_any_moment_ends_with_the_files_of_an_undisturbed_one(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "parts").mkdir()
    order = rng.permutation(600_000)
    for part, rows in enumerate(np.array_split(order, 7)):
        levels = rng.gamma(3, 1, (len(rows), 1)) * np.linspace(1, 0.3, 6)
        columns = {
            "example_id": [f"id-{row:07d}" for row in rows.tolist()],
            "losses": list(levels + rng.normal(0, 0.1, levels.shape)),
            "source": [("web", "code", "books")[row % 3] for row in rows.tolist()],
            "num_response_tokens": rng.integers(1, 60, len(rows)),
        }
        pq.write_table(pa.table(columns), tmp_path / "parts" / f"{part}.parquet")
    begun = time.monotonic()
    subprocess.run(select_command(tmp_path / "parts", tmp_path / "whole"), check=True, capture_output=True)
    whole = time.monotonic() - begun
    for share in (0.3, 0.5, 0.7, 0.9):
        process = subprocess.Popen(select_command(tmp_path / "parts", tmp_path / "killed"), stderr=subprocess.PIPE)
        time.sleep(share * whole)
        process.kill()
        process.communicate()
        for stage in ("clustering", "selection"):  # what looks finished is
            if (tmp_path / "killed" / stage / "manifest.json").exists():
                Artifact.read(Storage(str(tmp_path / "killed" / stage))).check_sizes()
    # What is left to do may be done elsewhere, too.
    finish = select_command(tmp_path / "parts", tmp_path / "killed", "--engine", "disk")
    subprocess.run(finish, check=True, capture_output=True)
    assert results_of(tmp_path / "killed") == results_of(tmp_path / "whole")
    assert "selection/selected-tokens-9000.parquet" in results_of(tmp_path / "whole")
    assert not (tmp_path / "killed" / ".work" / "scratch").exists()
