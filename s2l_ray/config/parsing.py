"""From a YAML file, or a command's arguments, to a checked config.

YAML takes many texts for something else: a commit `0123456` for an octal number, a folder `19` for a number, a template
`{instruction}` for a mapping. A field that takes text gets it exactly as it is written.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import ValidationError

from s2l_ray.config.machines import GroupingConfig
from s2l_ray.config.messages import problems
from s2l_ray.config.run import RunConfig
from s2l_ray.config.section import Section, is_section, types_at, types_of
from s2l_ray.config.shipped import config_path
from s2l_ray.errors import ConfigError


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """The checked config in a YAML file, or of the shipped config of that name, with `section.field=value` overrides applied.

    Raises ConfigError naming the file, the key, what was found and, for a misspelt key, the likely one.
    """
    try:
        text = config_path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror or error}). Give the path of a YAML config, or the name of one that "
            "`s2l init --list` shows."
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({error}). A config is a YAML file.") from error
    try:
        values = _read_yaml(text, [RunConfig])
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a config is a mapping of sections, found {type(values).__name__}.")
    for override in overrides or []:
        apply_override(values, override)
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


def apply_override(values: dict[str, Any], override: str) -> None:
    """Put `section.field=value` into the plain values: the value as it stands for a field of text, else read as YAML."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override}: expected section.field=value, such as --set clustering.num_clusters=50.")
    keys = key.strip().split(".")
    for section in keys[:-1]:
        inner = values.setdefault(section, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {override}: '{section}' is not a section.")
        values = inner
    types = types_at(RunConfig, keys)
    try:
        values[keys[-1]] = _text_or_yaml(text, types) if str in types else _read_yaml(text, types)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or error
        raise ConfigError(
            f"--set {override}: the value is not YAML ({problem}). A text is quoted twice, for the shell and for YAML: "
            f"--set '{key}=\"...\"'."
        ) from error


def _text_or_yaml(text: str, types: list[Any]) -> Any:
    """The value of a field that takes text: the text as it stands, a mapping or a list where the field takes those, too."""
    if NoneType in types and text.strip().lower() in {"", "~", "null", "none"}:
        return None
    if all(kind in (str, NoneType) for kind in types):
        return text
    try:
        value = _read_yaml(text, types)
    except yaml.YAMLError:  # a glob such as *.jsonl
        return text
    return value if isinstance(value, dict | list) else text


# --- YAML ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Scalar:
    """What YAML takes for a number, a truth value or a date, and how it is written."""

    value: Any
    text: str


class _Loader(yaml.SafeLoader):
    """Keeps how scalars are written, and refuses a key that occurs twice: YAML's own readers drop the first in silence."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """A mapping with its keys as they are written. Raises yaml.YAMLError for one that occurs twice."""
        node = super().compose_mapping_node(anchor)
        keys = [key.value for key, _ in node.value]
        for place, (key, _) in enumerate(node.value):
            if key.value in keys[:place]:
                raise yaml.YAMLError(f"line {key.start_mark.line + 1}: the key '{key.value}' occurs twice")
        return node

    def construct_written(self, node: yaml.ScalarNode) -> Any:
        """A scalar with its text, the text alone where it only looks like a date."""
        try:
            return _Scalar(yaml.SafeLoader.yaml_constructors[node.tag](self, node), node.value)
        except (AttributeError, IndexError, KeyError, ValueError):
            return node.value


for _kind in ("int", "float", "bool", "timestamp"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _Loader.construct_written)


def _read_yaml(text: str, types: list[Any]) -> Any:
    """A value of these types from YAML. Raises yaml.YAMLError."""
    try:
        return _typed(yaml.load(text, _Loader), types)  # noqa: S506 - it is a SafeLoader
    except RecursionError:
        raise yaml.YAMLError("nested too deeply, or in itself") from None


def _typed(value: Any, types: list[Any]) -> Any:
    """What YAML read, with the written text wherever the types take text."""
    if isinstance(value, _Scalar):
        return value.text if str in types else value.value
    if isinstance(value, list):
        inner = [kind for outer in types if get_origin(outer) is list for kind in types_of(get_args(outer)[0])]
        return [_typed(one, inner) for one in value]
    if isinstance(value, dict):
        keys = [str] if any(is_section(kind) or get_args(kind)[:1] == (str,) for kind in types) else []
        return {
            (name := _typed(key, keys)): _typed(inner, [kind for outer in types for kind in types_at(outer, [name])])
            for key, inner in value.items()
        }
    return value
