"""One Ray for the whole test session: starting it takes longer than most tests."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

# The same examples in every run: what fails here fails for everybody.
settings.register_profile("same", derandomize=True, deadline=None)
settings.load_profile("same")


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A local Ray with two CPUs."""
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=True, logging_level=logging.WARNING)
    yield
    ray.shutdown()
