"""What is to be done once on every node, where no work is."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

# A node that does not answer for so long is left alone: it is going away, and what lies on it with it.
PATIENCE_SECONDS = 30.0


def on_every_node(function: Callable[[], Any]) -> None:
    """Call a function on each node of the connected Ray, this one included. Nodes that are lost are left out."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    function()
    here = ray.get_runtime_context().get_node_id()
    others = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeID"] != here]
    task = ray.remote(num_cpus=0, max_retries=0)(lambda: function() and None)
    calls = [task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote() for node in others]
    for call in ray.wait(calls, num_returns=len(calls), timeout=PATIENCE_SECONDS)[0] if calls else ():
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(call)
