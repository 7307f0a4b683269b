"""From a YAML file, or a command's arguments, to a checked config; and what is wrong with it, in words."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from s2l_ray.config.machines import GroupingConfig
from s2l_ray.config.run import RunConfig
from s2l_ray.config.section import Section
from s2l_ray.errors import ConfigError


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """The checked config in a YAML file, with `section.field=value` overrides applied.

    Raises ConfigError naming the file, the key, what was found and, for a misspelt key, the likely one.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error}). Give the path of a YAML config.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({error}). A config is a YAML file.") from error
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a config is a mapping of sections, found {type(values).__name__}.")
    for override in overrides or []:
        _apply_override(values, override)
    return parse_config(values, where=str(path))


def parse_config(values: dict[str, Any], where: str = "config") -> RunConfig:
    """A checked config from plain values. Raises ConfigError that lists every problem, one a line."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{where}: {line}" for line in problems(error, RunConfig))) from None


AnySection = TypeVar("AnySection", bound=Section)


def checked(section: type[AnySection], **values: Any) -> AnySection:
    """A section from a function's or a command's arguments. Raises ConfigError that lists every problem, one a line."""
    name = "machines.clustering" if section is GroupingConfig else section.__name__.removesuffix("Config").lower()
    try:
        # A numpy number is a number, too.
        return section.model_validate({key: value.item() if hasattr(value, "item") else value for key, value in values.items()})
    except ValidationError as error:
        lines = [f"{name}.{line}".replace(".config:", ":", 1) for line in problems(error, section)]
        raise ConfigError("\n".join(lines)) from None


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
            known = _keys_at(model, keys[:-1])
            guess = difflib.get_close_matches(keys[-1], known, n=1)
            misspelt += [".".join([*keys[:-1], name]) for name in guess]
            hint = f". Did you mean '{guess[0]}'?" if guess else f". Known keys: {', '.join(known)}." if known else "."
            complaint = f"no such key{hint}"
        elif item["type"] == "missing":
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


def _is_union_branch(key: int | str) -> bool:
    """Whether a part of a pydantic location names a union's branch (a type) and not a key of the file."""
    if not isinstance(key, str):
        return False
    return key[:1].isupper() or "[" in key or key in {"str", "int", "float", "bool", "constrained-int", "constrained-float"}


def _keys_at(model: type[BaseModel], keys: list[str]) -> list[str]:
    """The field names of the section that `keys` lead to, empty where they lead to no section."""
    sections: list[type[BaseModel]] = [model]
    for key in keys:
        found: list[type[BaseModel]] = []
        for section in sections:
            if key in section.model_fields:
                annotation = section.model_fields[key].annotation
                candidates = (annotation, *get_args(annotation))
                found += [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        sections = found
    return [name for section in sections for name in section.model_fields]


def _apply_override(values: dict[str, Any], override: str) -> None:
    """Put `section.field=value` (the value in YAML) into the plain values."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override}: expected section.field=value, such as --set clustering.num_clusters=50.")
    *sections, field = key.strip().split(".")
    for section in sections:
        inner = values.setdefault(section, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {override}: '{section}' is not a section.")
        values = inner
    try:
        values[field] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: the value is not YAML: {error}") from error
