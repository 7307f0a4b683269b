"""The config as a file for people: one line a setting, its reason behind it, open questions marked."""

from __future__ import annotations

import re
from typing import Any

import yaml

from s2l_ray.init.advice import Advice
from s2l_ray.init.layout import OPEN, ConfigLine

MOST_LINES = 60
_WIDTH = 150


def config_text(name: str, about: str, examples: list[ConfigLine], advice: Advice) -> str:
    """The YAML of a run. `about`: what the corpus is, in a line. Texts of rows are not in it, names of fields are."""
    lines = [
        f"# {plain(about)}",
        f"# Made by `s2l init`. Every field: `s2l schema`. Lines marked {OPEN} are yours to decide.",
        f"name: {_yaml(name)}",
    ]
    for section, settings in {"examples": examples, **advice.sections}.items():
        lines += [f"{section}:", *(_line(one) for one in settings)]
    assert len(lines) <= MOST_LINES
    return "\n".join(lines) + "\n"


def _line(setting: ConfigLine) -> str:
    mark = f"{OPEN}: " if setting.is_open else ""
    remark = plain(f"{mark}{setting.reason}")
    value = f"{setting.key}: {_yaml(setting.value)}"
    if not setting.is_set:
        what = "" if setting.value is None else f"{value} - "
        return f"  # {plain(f'{mark}{what}{setting.reason}')}"
    return f"  {value} # {remark}" if remark else f"  {value}"


def _yaml(value: Any) -> str:
    """A value as YAML in one line."""
    if isinstance(value, float):  # as YAML 1.1 and 1.2 read it alike: 2.0e-05
        return re.sub(r"^(-?\d+)(e.*)$", r"\1.0\2", repr(value))
    quotes = '"' if isinstance(value, str) and not value.isprintable() else None
    text = yaml.safe_dump(
        value, default_flow_style=True, default_style=quotes, width=10**9, allow_unicode=True, sort_keys=False
    )
    return str(text).removesuffix("\n").removesuffix("\n...")


def plain(text: str) -> str:
    """A line that stays one, whatever a field is called: no control characters, not too long."""
    shown = "".join(character if character.isprintable() else " " for character in text)
    return shown if len(shown) <= _WIDTH else f"{shown[: _WIDTH - 4]} ..."
