"""Datasets by LLaMA-Factory's `dataset_info.json`: `FOLDER/#NAME`, or `FOLDER/dataset_info.json#NAME`.

The entry says where the rows are and which of their fields are what. A field that the config itself names wins.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable
from typing import Any

from s2l_ray.config import ExamplesConfig
from s2l_ray.errors import ArtifactError, ConfigError
from s2l_ray.examples.conversations import Tags
from s2l_ray.examples.layouts import Layout
from s2l_ray.storage.places import Storage

DATASET_INFO = "dataset_info.json"

# The names of an entry's columns and tags, and the fields that they are by default.
_PAIR = {"prompt": "instruction", "query": "input", "response": "output", "history": None, "system": None, "tools": None}
_CHAT = {"messages": "conversations", "system": None, "tools": None}
_PREFERENCES, _MEDIA = ("chosen", "rejected", "kto_tag"), ("images", "videos", "audios")
_NEEDED = ("prompt", "response", "messages")
_TAGS = tuple(f"{field.name}_tag" for field in dataclasses.fields(Tags))
_FIELDS = {name: f"{name}_field" for name in ("prompt", "response", "messages", "history", "system", "tools")}


def is_named(dataset: Any) -> bool:
    """Whether a dataset is given as `FOLDER/#NAME` or `FOLDER/FILE.json#NAME`."""
    place, sign, name = dataset.partition("#") if isinstance(dataset, str) else ("", "", "")
    return bool(sign and name) and place.endswith(("/", ".json"))


def resolved(config: ExamplesConfig) -> tuple[ExamplesConfig, Layout]:
    """A config with the files or the Hub id of its dataset instead of a name, and its layout; another one as it is.

    Raises ConfigError for a name that is not there and for an entry that is not rows to learn.
    """
    dataset = config.dataset
    if isinstance(dataset, list) and any(is_named(place) for place in dataset):
        raise ConfigError("examples.dataset: a dataset by its name in dataset_info.json is given alone, not in a list.")
    if not isinstance(dataset, str) or not is_named(dataset):
        return config, Layout.of(config)
    place, _, name = dataset.partition("#")
    folder, file = place[: place.rfind("/") + 1], place[place.rfind("/") + 1 :]
    here = f"{dataset}: entry '{name}'"
    entry = _entry(Storage(folder or "."), file or DATASET_INFO, name)
    update = _where(entry, folder, here) | _which_fields(entry, here)
    query = update.pop("query_field", None)
    # Not `model_fields_set`: a config that was written out and read again has all of them.
    defaults = {key: field.default for key, field in ExamplesConfig.model_fields.items()}
    own = {key for key in update if key != "dataset" and getattr(config, key) != defaults[key]}
    named = config.model_copy(update={key: value for key, value in update.items() if key not in own})
    given = _checked(entry.get("tags"), _TAGS, "tags", here)
    tags = Tags(**{key.removesuffix("_tag"): value for key, value in given.items()})
    return named, dataclasses.replace(Layout.of(named), query_field=query, tags=tags)


def _entry(folder: Storage, file: str, name: str) -> dict[str, Any]:
    """The entry of a name."""
    place = f"{folder.uri.rstrip('/')}/{file}"
    try:
        entries = folder.read_json(file)
    except ArtifactError as error:
        raise ConfigError(f"{place}: not JSON ({error.__cause__}). Fix the file.") from error
    if entries is None:
        raise ConfigError(f"{place}: no such file. A dataset by name is FOLDER/#NAME, with {DATASET_INFO} in the folder.")
    if not isinstance(entries, dict):
        raise ConfigError(f"{place}: not an object of datasets by name. Fix the file.")
    if name not in entries:
        raise ConfigError(f"{place}: no dataset '{name}'. {_meant(name, entries)}")
    if not isinstance(entries[name], dict):
        raise ConfigError(f"{place}: dataset '{name}' is not an object. Fix the entry.")
    return dict(entries[name])


def _meant(name: str, known: Iterable[str]) -> str:
    guess = difflib.get_close_matches(name, known, n=1)
    hint = f"Did you mean '{guess[0]}'? " if guess else ""
    return f"{hint}Known: {', '.join(sorted(known)) or 'none'}."


def _where(entry: dict[str, Any], folder: str, here: str) -> dict[str, Any]:
    """Where the rows are: the fields of the config for it."""
    for key, remedy in {
        "script_url": "Convert the dataset to files and give file_name.",
        "num_samples": "Remove it: selection.budget says how many rows are wanted.",
        "folder": "Give the files of the Hub dataset as file_name.",
    }.items():
        if entry.get(key):
            raise ConfigError(f"{here}: '{key}' is not supported. {remedy}")
    found: dict[str, Any] = {}
    for key in ("hf_hub_url", "cloud_file_name", "file_name"):
        value = entry.get(key)
        if value is None:
            continue
        if not isinstance(value, str) or not value:
            raise ConfigError(f"{here}: {key} is not a name. Fix the entry.")
        is_whole = key != "file_name" or "://" in value or value.startswith("/")
        found["dataset"] = value if is_whole else f"{folder}{value}"
        break
    if not found:
        elsewhere = [key for key in ("ms_hub_url", "om_hub_url") if entry.get(key)]
        what = f"only {elsewhere[0]}, which is not supported" if elsewhere else "neither file_name nor hf_hub_url"
        raise ConfigError(f"{here}: has {what}. Give file_name or hf_hub_url.")
    return found | {key: entry[key] for key in ("subset", "split", "revision") if entry.get(key) is not None}


def _which_fields(entry: dict[str, Any], here: str) -> dict[str, Any]:
    """Which fields are what: the fields of the config for it, and `query_field`."""
    formatting = entry.get("formatting", "alpaca")
    if formatting not in ("alpaca", "sharegpt", "openai"):
        raise ConfigError(f"{here}: formatting is alpaca, sharegpt or openai. Fix the entry.")
    usual: dict[str, str | None] = dict(_PAIR if formatting == "alpaca" else _CHAT)
    if formatting == "openai":
        usual["messages"] = "messages"
    columns = _checked(entry.get("columns"), [*usual, *_PREFERENCES, *_MEDIA], "columns", here)
    preference = next((key for key in _PREFERENCES if key in columns), "ranking" if entry.get("ranking") else None)
    if preference is not None:
        raise ConfigError(
            f"{here}: '{preference}' is for preference data, of which nothing here learns. To learn the chosen answers, remove "
            "it and name their field as the response."
        )
    media = next((key for key in _MEDIA if key in columns), None)
    if media is not None:
        raise ConfigError(f"{here}: column '{media}': only text is learned. Remove it, or take another dataset.")
    # As LLaMA-Factory has it: where an entry names columns, the others are not there. Without these three it has no rows.
    names = {key: value for key, value in usual.items() if not columns or key in _NEEDED} | columns
    found: dict[str, Any] = {_FIELDS[key]: value for key, value in names.items() if key in _FIELDS and value is not None}
    return found | ({"query_field": names["query"]} if names.get("query") else {})


def _checked(value: Any, known: Iterable[str], what: str, here: str) -> dict[str, str]:
    """A mapping of known keys to names, without those that are null."""
    if not isinstance(value, dict | None):
        raise ConfigError(f"{here}: {what} is not an object. Fix the entry.")
    for key, name in (value or {}).items():
        if key not in known:
            raise ConfigError(f"{here}: {what} has no key '{key}'. {_meant(key, known)}")
        if not isinstance(name, str | None):
            raise ConfigError(f"{here}: {what}.{key} is not a name. Fix the entry.")
    return {key: name for key, name in (value or {}).items() if name}
