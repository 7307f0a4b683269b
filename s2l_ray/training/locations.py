"""Where a model's files are: a folder, a URI, a Hub id."""

from __future__ import annotations

from pathlib import Path

from s2l_ray.errors import ConfigError
from s2l_ray.storage.places import Storage

ADAPTER = "adapter_config.json"


def local_place(location: str) -> str:
    """A path or Hub id as it is; what a URI names, fetched once per machine. Raises ConfigError where there is nothing."""
    if "://" not in location:
        return location
    check_there(location)
    folder, _, name = location.rpartition("/")
    return str(Storage(folder).local_folder(name))


def check_there(location: str) -> None:
    """Raise ConfigError where a URI names nothing."""
    folder, _, name = location.rpartition("/")
    if not Storage(folder).exists(name):
        raise ConfigError(f"model '{location}': there is nothing. Give the URI of a folder with config.json and *.safetensors.")


def local_files(location: str, revision: str | None) -> Path:
    """The folder of a model by path, URI or Hub id, with all of its safetensors. Raises ConfigError where it cannot be had."""
    place = Path(local_place(location))
    if place.is_dir():
        return place
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(location, revision=revision, allow_patterns=["*.safetensors", "*.json"]))
    except (OSError, ValueError) as error:
        raise ConfigError(f"model '{location}': cannot be loaded ({str(error)[:200]}).") from error


def has_adapter(location: str) -> bool:
    """Whether a path or URI names an adapter, to be added to another model."""
    return (Path(local_place(location)) / ADAPTER).is_file()
