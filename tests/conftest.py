"""What takes long to start: one Ray for the whole test session, one S3-compatible server."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import boto3
import pytest
from hypothesis import settings
from moto.server import ThreadedMotoServer

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


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """Where an S3-compatible server answers."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(scope="module")
def bucket(s3_endpoint: str) -> Iterator[str]:
    """The bucket `runs`, which this process and those that it starts find by the environment."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ENDPOINT_URL", s3_endpoint)
        environment.setenv("AWS_ACCESS_KEY_ID", "test")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "test")
        environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
        # moto's own mock, which other tests use, forgets all buckets.
        boto3.client("s3").create_bucket(Bucket="runs")
        yield "s3://runs"
