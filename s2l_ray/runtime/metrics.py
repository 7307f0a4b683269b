"""What Prometheus learns of a running stage: through Ray, whose nodes export what their processes count.

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
        "utilization": Gauge("s2l_ray_flops_utilization", "Model FLOPs utilization, of a matrix product's rate", tag_keys=tags),
        "restarts": Counter("s2l_ray_restarts", "Times that the training's workers began again", tag_keys=tags),
    }


def count(stage: str, **values: float) -> None:
    """Add to counters and set gauges: `units_left`, `examples`, `tokens`, `utilization`, `restarts`."""
    for name, value in values.items():
        metric = _metrics()[name]
        if hasattr(metric, "set"):
            metric.set(value, tags={"stage": stage})
        elif value > 0:  # Ray refuses to count nothing
            metric.inc(value, tags={"stage": stage})
