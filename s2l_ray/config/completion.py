"""What the shell offers after `--set`: the keys of a config, and the values of a key that has few."""

from __future__ import annotations

import textwrap
from typing import Any, Literal, get_args, get_origin

from s2l_ray.config.run import RunConfig
from s2l_ray.config.section import is_section, types_at

_KINDS = {str: "TEXT", int: "INTEGER", float: "NUMBER"}


def settings(typed: str) -> list[tuple[str, str]]:
    """What `typed` can become, each with a line of help: keys up to the next dot or `=`, and behind `=` a key's values.

    Where one key is left its values come along, or else the kind of its value: a shell would put a space behind a word that
    is the only one.
    """
    key, equals, _ = typed.partition("=")
    if equals:
        return [(value, "") for value in _with_values(key) if value.startswith(typed)]
    offered = [one for one in _keys(key.rpartition(".")[0]) if one[0].startswith(typed)]
    if len(offered) != 1:
        return offered
    name, help_text = offered[0]
    if name.endswith("."):
        return settings(name)
    key = name.removesuffix("=")
    kinds = [_KINDS[kind] for kind in types_at(RunConfig, key.split(".")) if kind in _KINDS]
    return [(name, help_text), *((value, "") for value in _with_values(key) or [f"{key}={'|'.join(kinds) or 'YAML'}"])]


def _keys(section: str) -> list[tuple[str, str]]:
    """The keys of a section, with a line of help: sections of it with a dot behind them, fields with `=`."""
    offered: dict[str, str] = {}
    for kind in types_at(RunConfig, section.split(".") if section else []):
        for name, field in kind.model_fields.items() if is_section(kind) else ():
            key = f"{section}.{name}" if section else name
            types = types_at(kind, [name])
            ends = ["="] * (not all(map(is_section, types))) + ["."] * any(map(is_section, types))
            offered |= dict.fromkeys((key + end for end in ends), _line(field.description or ""))
    return list(offered.items())


def _line(text: str) -> str:
    """The start of a description, short enough to be one line, and without what rich would take for markup."""
    return textwrap.shorten(text.replace("[", "(").replace("]", ")"), 60, placeholder=" ...")


def _with_values(key: str) -> list[str]:
    return [f"{key}={value}" for value in _words(types_at(RunConfig, key.split(".")))]


def _words(types: list[Any]) -> list[str]:
    """The values that can be listed, as a user writes them: of a choice, of a switch, `auto`, `null`."""
    words: list[str] = []
    for kind in types:
        if get_origin(kind) is Literal:
            words += map(str, get_args(kind))
        elif kind is bool:
            words += ["true", "false"]
        elif kind is type(None):
            words.append("null")
        elif get_origin(kind) is list:
            words += [f"[{value}]" for value in _words(list(get_args(kind)))]
    return words


def bash_values(words: str, last: int) -> list[str] | None:
    """What bash's last word can become behind `--set key =`, None elsewhere: bash takes `=` for a border between words, and
    completes what stands behind it alone. `words`: the command so far, in lines; `last`: the number of the last word."""
    typed = (words.split("\n") if "\n" in words else words.split(" "))[: last + 1]
    rest = "" if typed[-1] == "=" else typed.pop()
    if len(typed) < 3 or typed[-1] != "=" or typed[-3] != "--set":
        return None
    before = f"{typed[-2]}="
    return [value.removeprefix(before) for value, _ in settings(before + rest)]
