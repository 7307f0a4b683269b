"""Trackers: real short trainings under Ray, and what TensorBoard, Weights & Biases and MLflow have of them, offline."""

from __future__ import annotations

import importlib.util
import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from s2l_ray.config import TrainingConfig, TrainingWorkerConfig
from s2l_ray.errors import ConfigError
from s2l_ray.runtime.fit import fit
from s2l_ray.runtime.workers import Workers
from s2l_ray.storage.artifacts import Key
from s2l_ray.storage.drafts import Draft
from s2l_ray.storage.places import Storage
from s2l_ray.training.fine_tuning import fine_tune, training_loss
from s2l_ray.training.models import check_ahead
from s2l_ray.training.trackers import Tracking, check_trackers, reporting
from s2l_ray.training.training_run import TrainingRun
from tests.building import context_of

from .test_losses import make, rows

BATCH, STEPS, SECRET = 8, 3, "not-for-any-file-0123456789"
ONE = Workers(1, 1, 0.0, 1)


def tracking_of(folder: Path, stage: str, *trackers: str) -> Tracking:
    """The trackers of a stage of the run `exam`, in a directory of its own name."""
    place = folder / "first-try"
    draft = Draft(Storage(str(place / stage)), Key(stage, 1, {"seed": 1}, {}), Storage(str(place / ".work" / stage)))
    return Tracking.of(context_of(draft, name="exam", trackers=list(trackers)))


def train(job: tuple[Tracking, tuple[str, ...]], events: Any) -> dict[str, Any]:
    """Some models' trainings, one after the other in one process, as the target's are."""
    tracking, models = job
    tokens = rows(np.random.default_rng(3), 2 * BATCH)
    order = np.concatenate([np.random.default_rng(step).permutation(2 * BATCH)[:BATCH] for step in range(STEPS)])
    config = TrainingConfig(model="none", global_batch_size=BATCH, learning_rate=3e-3)
    losses = {}
    for model in models:
        run = TrainingRun(model, config, order, tokens, (), STEPS)
        trainer = fine_tune(run, make("gpt_neox"), None, TrainingWorkerConfig(), events, tracking=tracking)
        losses[model] = training_loss(trainer)
    names = [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_", "TENSORBOARD_"))]
    return {"losses": losses, "left": [name for name in names if name not in {"WANDB_SERVICE"}]}


@pytest.fixture
def finished(tmp_path, ray_session, monkeypatch) -> tuple[Path, dict[str, Any]]:
    """The trackers' folder after the trainings of a target and of its control, with all trackers, and the true losses."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    tracking = tracking_of(tmp_path, "target", "tensorboard", "wandb", "mlflow")
    done = fit("target", train, (tracking, ("selected", "random")), ONE, Storage(str(tmp_path / "work")))
    return tmp_path / "first-try" / "trackers", done


def test_all_trackers_get_the_losses_of_a_training_under_names_that_a_person_finds(finished):
    folder, done = finished
    assert done["left"] == [], "the worker's environment is as it was"
    for model in ("selected", "random"):
        expected = [loss for _, loss in done["losses"][model]]
        assert len(expected) == STEPS
        np.testing.assert_allclose(tensorboard_losses(folder / "tensorboard" / f"target-{model}"), expected, rtol=1e-6)
        np.testing.assert_allclose(mlflow_losses(folder, f"exam/target-{model}"), expected, rtol=1e-6)
        np.testing.assert_allclose(wandb_losses(folder, f"exam/target-{model}"), expected, rtol=1e-6)
    written = [path for path in folder.rglob("*") if path.is_file()]
    assert written
    assert not [path for path in written if SECRET.encode() in path.read_bytes()]


def tensorboard_losses(folder: Path) -> list[float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [event.value for event in events.Scalars("train/loss")]


def mlflow_losses(folder: Path, name: str) -> list[float]:
    from mlflow.tracking import MlflowClient

    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        client = MlflowClient(f"file://{folder}/mlruns")
        experiment = client.get_experiment_by_name("exam")
        (run,) = client.search_runs([experiment.experiment_id], f"attributes.run_name = '{name}'")
        assert run.info.status == "FINISHED"
        assert (run.data.tags["s2l_ray.stage"], run.data.tags["s2l_ray.group"]) == ("target", "exam (first-try)")
        return [metric.value for metric in client.get_metric_history(run.info.run_id, "loss")]


def wandb_records(file: Path) -> list[Any]:
    """What Weights & Biases would send to its server: a log of LevelDB's, of blocks with whole records or parts of them."""
    from wandb.proto import wandb_internal_pb2

    data, place, block, parts, records = file.read_bytes(), 7, 2**15, b"", []
    assert data[:4] == b":W&B"
    while place + 7 <= len(data):
        if block - place % block < 7:  # no room for a record's head
            place += block - place % block
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        parts, place = parts + data[place + 7 : place + 7 + length], place + 7 + length
        if kind in (1, 4):  # whole, or the last part
            records.append(wandb_internal_pb2.Record.FromString(parts))
            parts = b""
    return records


def wandb_losses(folder: Path, name: str) -> list[float]:
    for file in folder.glob("wandb/offline-run-*/*.wandb"):
        records = wandb_records(file)
        run = next(record.run for record in records if record.HasField("run"))
        if run.display_name == name:
            assert (run.project, run.run_group, run.job_type) == ("s2l_ray", "exam (first-try)", "target")
            assert set(run.tags) == {"s2l_ray", "target"}
            items = [{i.key or "/".join(i.nested_key): i.value_json for i in r.history.item} for r in records]
            return [json.loads(item["train/loss"]) for item in items if "train/loss" in item]
    raise AssertionError(f"no run {name}")


def test_a_run_that_is_gone_on_with_reports_to_the_same_place(tmp_path, monkeypatch):
    """Twice the same stage of the same directory, as after a kill; then another directory."""
    import mlflow
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    seen = []
    for folder in ("a", "a", "b"):
        tracking = tracking_of(tmp_path / folder, "proxy", "wandb", "mlflow")
        with reporting(tracking, "proxy", is_first=True) as arguments:
            assert arguments == {"report_to": ["wandb", "mlflow"], "run_name": "exam/proxy"}
            seen.append((wandb.run.id, mlflow.active_run().info.run_id))
    assert seen[0] == seen[1]
    assert not set(seen[0]) & set(seen[2])


def test_an_interrupted_training_is_marked_as_failed_and_the_environment_is_as_before(tmp_path, monkeypatch):
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/own")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    before = dict(os.environ)
    with pytest.raises(RuntimeError, match="lost"), reporting(tracking_of(tmp_path, "proxy", "mlflow"), "proxy", is_first=True):
        raise RuntimeError("lost")
    assert dict(os.environ) == before
    client = MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert run.info.status == "FAILED"


def test_only_the_first_worker_reports(tmp_path):
    with reporting(tracking_of(tmp_path, "proxy", "tensorboard"), "proxy", is_first=False) as arguments:
        assert arguments == {"report_to": "none"}
    with reporting(None, "proxy", is_first=True) as arguments:
        assert arguments == {"report_to": "none"}


def test_files_of_a_run_in_object_storage_are_copied_there(bucket, tmp_path):
    draft = Draft(Storage(f"{bucket}/tracked/proxy"), Key("proxy", 1, {}, {}), Storage(f"{bucket}/tracked/.work/proxy"))
    tracking = Tracking.of(context_of(draft, trackers=["tensorboard"]))
    with reporting(tracking, "proxy", is_first=True):
        folder = Path(os.environ["TENSORBOARD_LOGGING_DIR"])
        folder.mkdir(parents=True)
        (folder / "events").write_text("losses")
    assert tracking.run.read("trackers/tensorboard/proxy/events") == b"losses"
    assert not folder.exists()


def test_keys_stay_where_they_are(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", SECRET)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"https://me:{SECRET}@example.com")
    monkeypatch.setenv("WANDB_ENTITY", "team")
    tracking = tracking_of(tmp_path, "proxy", "wandb", "mlflow")
    assert tracking.settings["WANDB_ENTITY"] == "team"
    assert SECRET not in repr(tracking)


@pytest.mark.parametrize("tracker", ["wandb", "mlflow", "tensorboard"])
def test_a_tracker_that_is_not_installed_is_named_before_anything_starts(tmp_path, monkeypatch, tracker):
    is_there = importlib.util.find_spec
    absent = {tracker, "tensorboardX"}
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None if name in absent else is_there(name))
    config = context_of(Draft(Storage(str(tmp_path)), Key("proxy", 1, {}, {}), Storage(str(tmp_path)))).config
    config = config.model_copy(update={"trackers": [tracker]})
    with pytest.raises(ConfigError, match=rf"trackers: {tracker} is not installed: pip install 's2l_ray\[trackers\]'"):
        check_ahead(config, Storage(str(tmp_path)), {"proxy"})
    check_ahead(config, Storage(str(tmp_path)), {"selection"})


def test_mlflow_without_a_server_is_refused_for_a_run_in_object_storage(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = context_of(Draft(Storage(str(tmp_path)), Key("proxy", 1, {}, {}), Storage(str(tmp_path)))).config
    config = config.model_copy(update={"trackers": ["mlflow"]})
    with pytest.raises(ConfigError, match="Set MLFLOW_TRACKING_URI"):
        check_trackers(config, Storage("s3://bucket/run"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://example.com")
    check_trackers(config, Storage("s3://bucket/run"))


def test_a_tracker_that_cannot_be_reached_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with (
        pytest.raises(ConfigError, match=r"trackers: mlflow cannot be used .*Check MLFLOW_TRACKING_URI"),
        reporting(tracking_of(tmp_path, "proxy", "mlflow"), "proxy", is_first=True),
    ):
        raise AssertionError("it is not begun")
