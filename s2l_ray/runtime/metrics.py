"""Metrics of a running stage for Prometheus: through Ray, whose nodes export what their processes count.

Everything is counted by the driver, once, from what the workers report anyway.
"""

from __future__ import annotations

import functools
from typing import Any


@functools.cache
def _metrics() -> dict[str, Any]:
    from ray.util.metrics import Counter, Gauge

    tags = ("stage",)
    return {
        "units_left": Gauge("s2l_ray_units_left", "Units (of a training: steps) that are not done yet", tag_keys=tags),
        "examples": Counter("s2l_ray_examples", "Examples scored, once per checkpoint", tag_keys=tags),
        "tokens": Counter("s2l_ray_tokens", "Tokens scored; its rate is tokens per second", tag_keys=tags),
        "flops_utilization": Gauge(
            "s2l_ray_flops_utilization", "FLOP/s of a worker, as a share of its measured matrix-product rate", tag_keys=tags
        ),
        "restarts": Counter("s2l_ray_restarts", "Times that the training's workers began again", tag_keys=tags),
    }


def count(stage: str, **values: float) -> None:
    """Add to counters and set gauges: `units_left`, `examples`, `tokens`, `flops_utilization`, `restarts`."""
    for name, value in values.items():
        metric = _metrics()[name]
        if hasattr(metric, "set"):
            metric.set(value, tags={"stage": stage})
        elif value > 0:  # Ray refuses to count nothing
            metric.inc(value, tags={"stage": stage})
