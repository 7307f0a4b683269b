"""What needs a GPU: losses, training by NCCL, ZeRO with both offloads, resume, evaluation. Skipped without one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from s2l_ray.config import load_config
from s2l_ray.pipeline import run
from s2l_ray.training.losses import example_losses

from .test_losses import make, rows

CONFIG = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
STAGES = ("proxy", "trajectories", "target", "evaluation")
TINY = [
    "proxy.epochs=1",
    "proxy.num_checkpoints=2",
    "target.epochs=1",
    "clustering.num_clusters=4",
    "evaluation.random_control=false",
]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here"),
]


def ran(folder: Path, *overrides: str, until: str | None = None) -> dict[str, Any]:
    """The quickstart on one GPU, tiny; its artifacts."""
    on_gpu = [f"machines.{stage}.{name}=1" for stage in STAGES for name in ("num_workers", "gpus_per_worker")]
    return run(load_config(CONFIG, [*TINY, *on_gpu, *overrides]), str(folder), until=until)


@pytest.mark.parametrize("shape", ["gpt_neox", "llama"])
@pytest.mark.parametrize(("precision", "largest"), [("float32", 1e-4), ("bfloat16", 5e-2)])
def test_losses_on_a_gpu_are_those_of_the_cpu(shape: str, precision: str, largest: float) -> None:
    tokens, model = rows(np.random.default_rng(0), 40), make(shape)
    expected = example_losses(model, tokens, tokens_per_batch=512)
    found = example_losses(model.to("cuda"), tokens, tokens_per_batch=4096, precision=precision)
    np.testing.assert_allclose(found, expected, rtol=0, atol=largest)


@pytest.mark.usefixtures("ray_session")
def test_a_whole_run_on_a_gpu_is_evaluated_and_is_not_done_twice(tmp_path: Path) -> None:
    first = ran(tmp_path, "proxy.precision=bfloat16", "target.precision=bfloat16")
    again = ran(tmp_path, "proxy.precision=bfloat16", "target.precision=bfloat16")
    assert (tmp_path / "evaluation" / "metrics.json").exists()
    created = [[artifact.manifest["provenance"]["created"] for artifact in found.values()] for found in (first, again)]
    assert created[0] == created[1]


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize(("stage", "offload"), [(1, "none"), (2, "optimizer"), (3, "optimizer"), (3, "parameters")])
def test_zero_trains_a_target_on_a_gpu(tmp_path: Path, stage: int, offload: str) -> None:
    ran(tmp_path, f"target.zero_stage={stage}", f"machines.target.offload={offload}", until="target")
    assert (tmp_path / "target" / "model" / "model.safetensors").exists()
