"""What is wrong with a config, in words."""

from __future__ import annotations

import difflib
from typing import Any

from pydantic import BaseModel, ValidationError

from s2l_ray.config.section import fields_at, is_section, types_at


def problems(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """Every problem that pydantic found as `section.field: what. Remedy`, one line a place, in order of the file.

    Of a union (`model: a name or {scratch: ...}`) pydantic reports every branch: the complaints about the deepest place
    are those about the branch that was meant, and complaints about one place become one line.
    """
    complaints: dict[str, list[str]] = {}
    found: dict[str, Any] = {}
    misspelt: list[str] = []
    for item in error.errors(include_url=False):
        keys = [str(key) for key in item["loc"] if not _is_union_branch(key)]
        place = ".".join(keys) or "config"
        if item["type"] == "extra_forbidden":
            known = fields_at(model, keys[:-1])
            if keys[-1] in known:  # of another branch, which was meant
                continue
            guess = difflib.get_close_matches(keys[-1], known, n=1)
            misspelt += [".".join([*keys[:-1], name]) for name in guess]
            hint = f". Did you mean '{guess[0]}'?" if guess else f". Known keys: {', '.join(known)}." if known else "."
            complaint = f"no such key{hint}"
        elif item["type"] == "missing":
            if _means_another_branch(item, types_at(model, keys[:-1])):
                continue
            complaint = "missing."
        elif item["type"] == "value_error":
            complaint = f"{item['msg'].removeprefix('Value error, ')}."
        else:
            complaint = item["msg"][0].lower() + item["msg"][1:]
            found[place] = item["input"]
        if complaint not in complaints.setdefault(place, []):
            complaints[place].append(complaint)
    for place in misspelt:  # it is not missing, it is there under another name
        if complaints.get(place) == ["missing."]:
            del complaints[place]
    deepest = [place for place in complaints if not any(other.startswith(f"{place}.") for other in complaints)]
    return [
        f"{place}: {'; or '.join(complaints[place])}{f', found {found[place]!r}.' if place in found else ''}"
        for place in deepest
    ]


def _means_another_branch(missing: Any, branches: list[Any]) -> bool:
    """Whether a section in which a key is missing is one of several that could stand there, and has none of the keys given."""
    here = [one for one in branches if is_section(one) and (one.__name__,) == missing["loc"][-2:-1]]
    given = missing["input"]
    return bool(here) and isinstance(given, dict) and bool(given) and not given.keys() & here[0].model_fields.keys()


def _is_union_branch(key: int | str) -> bool:
    """Whether a part of a pydantic location names a union's branch (a type) and not a key of the file."""
    if not isinstance(key, str):
        return False
    return key[:1].isupper() or "[" in key or key in {"str", "int", "float", "bool", "constrained-int", "constrained-float"}
