"""The config as a JSON Schema: for editors, and for checks outside of Python.

What JSON Schema cannot say (which sections fit together, what a template may name) is checked when a config is loaded.
"""

from __future__ import annotations

import json
from typing import Any

from s2l_ray.config.run import RunConfig

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def config_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a run's config, with every field's docstring as its description."""
    schema = _tidied(RunConfig.model_json_schema())
    tasks = schema["$defs"]["ReasoningGym"]["properties"]["tasks"]["additionalProperties"]
    tasks |= {"properties": {"size": {"type": "integer", "minimum": 1}}, "required": ["size"]}
    for field in ("budget", "more_budgets"):
        budget = schema["$defs"]["SelectionConfig"]["properties"][field]
        for kind in budget.get("items", budget)["anyOf"]:
            if kind["type"] == "number":  # a whole one is the other kind
                kind |= {"exclusiveMinimum": 0, "exclusiveMaximum": 1}
            elif kind["type"] == "integer":
                kind["minimum"] = 1
            else:
                kind["minProperties"] = 1
    return {"$schema": DIALECT, "title": "s2l_ray: the config of a run", **schema}


def schema_text() -> str:
    """The schema as it is printed and shipped."""
    return json.dumps(config_schema(), indent=2, ensure_ascii=False) + "\n"


def _tidied(value: Any, *, names: bool = False) -> Any:
    """Without titles that only repeat names, and descriptions without the line breaks of the source.

    `names`: whether the keys of `value` are names of fields or sections, and not words of JSON Schema.
    """
    if isinstance(value, list):
        return [_tidied(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    kept = value if names else {key: inner for key, inner in value.items() if key != "title"}
    tidied = {key: _tidied(inner, names=not names and key in {"properties", "$defs"}) for key, inner in kept.items()}
    if not names and isinstance(tidied.get("description"), str):
        tidied["description"] = " ".join(tidied["description"].split())
    return tidied
