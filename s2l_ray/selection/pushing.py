"""The subset as a dataset on the Hugging Face Hub, with its card. `s2l export --push-to-hub`.

Private unless asked for otherwise. The token comes from the environment (HF_TOKEN), the Hub is HF_ENDPOINT where that is set.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from s2l_ray.errors import ConfigError, StorageError
from s2l_ray.selection.card import MARK, describe, front_matter
from s2l_ray.selection.export import Exported, export_subset
from s2l_ray.selection.trainers import TRAINERS
from s2l_ray.storage.artifacts import Artifact
from s2l_ray.storage.layout import CARD
from s2l_ray.storage.ownership import read_run
from s2l_ray.storage.places import Storage

_TIMEOUT_SECONDS = 10
# What every repository of the Hub has from its start.
_OF_THE_HUB = {".gitattributes"}


def push_subset(
    run_dir: str,
    file_format: str,
    name: str,
    subset: str = "selected",
    *,
    with_columns: bool | None = None,
    is_public: bool = False,
) -> str:
    """Write a subset as the dataset `name` of the Hub, with a card; what was written, in a line.

    Raises ConfigError where there is no token, the Hub refuses the name or the token, the run's corpus is not to be shown
    (`report.texts: none`), the dataset there is another's work or is public without `is_public`; StorageError where the Hub
    does not answer. What `export_subset` refuses is refused before the Hub is asked.
    """
    import huggingface_hub

    run = Storage(run_dir)
    config = read_run(run)
    if config.get("report", {}).get("texts") == "none":
        raise ConfigError("--push-to-hub: report.texts=none, so no text of this corpus leaves the run. Export to a file.")
    token = os.environ.get("HF_TOKEN")
    if not token:
        raise ConfigError("--push-to-hub: needs HF_TOKEN in the environment, a token that may write datasets.")
    api = huggingface_hub.HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, token=token)
    with _explained(name):
        name = name if "/" in name else f"{api.whoami()['name']}/{name}"
    with tempfile.TemporaryDirectory(prefix="s2l_ray-") as folder:
        is_folder = file_format in TRAINERS and file_format != "openai"
        kind = "parquet" if file_format == "parquet" else "jsonl"
        output = folder if is_folder else f"{folder}/{subset}.{kind}"
        exported = export_subset(run_dir, file_format, output, subset, with_columns=with_columns, hub=name)
        (Path(folder) / CARD).write_text(_card(run, subset, exported, config, api), encoding="utf-8")
        with _explained(name):
            _check_repository(api, name, is_public)
            api.create_repo(name, repo_type="dataset", private=not is_public, exist_ok=True)
            message = f"{exported.num_examples} examples chosen by s2l_ray"
            api.upload_folder(repo_id=name, folder_path=folder, repo_type="dataset", commit_message=message)
    kept = "public" if is_public else "private"
    return f"{api.endpoint}/datasets/{name}: {exported.num_examples:,} examples, {kept}"


def _card(run: Storage, subset: str, exported: Exported, config: dict[str, Any], api: Any) -> str:
    selection = Artifact.read(run.child("selection"))
    found = {stage: Artifact.find(run.child(stage)) for stage in ("examples", "proxy", "clustering")}
    inputs = {stage: artifact for stage, artifact in found.items() if artifact is not None}
    licence = _licence(inputs.get("examples"), api)
    body = describe(
        selection.manifest["recipe"],
        selection.summary,
        inputs,
        only=(exported.data, exported.num_examples),
        dataset=_dataset(config),
        licence=licence,
    )
    return front_matter({subset: exported.data}, exported.features, licence) + body


def _dataset(config: dict[str, Any]) -> str | None:
    """The corpus as the config names it; of files their names alone: a path tells of somebody's machine."""
    dataset = config.get("examples", {}).get("dataset")
    named = dataset if isinstance(dataset, list) else [dataset] if isinstance(dataset, str) else []
    return ", ".join(str(one).rstrip("/").rpartition("/")[2] for one in named) or None


def _licence(examples: Artifact | None, api: Any) -> str | None:
    """The licence that the corpus's own card on the Hub names, None where there is none or the Hub does not answer."""
    corpus = str(examples.manifest["recipe"].get("corpus", "")) if examples is not None else ""
    if not corpus.startswith("hub:"):
        return None
    name, _, commit = corpus.removeprefix("hub:").partition("@")
    with contextlib.suppress(Exception):
        licence = api.dataset_info(name, revision=commit or None, timeout=_TIMEOUT_SECONDS).card_data.license
        return licence if isinstance(licence, str) else None
    return None


def _check_repository(api: Any, name: str, is_public: bool) -> None:
    """Raises ConfigError where a dataset of this name is not ours to replace, or would show the rows to all."""
    import huggingface_hub

    try:
        info = api.dataset_info(name, timeout=_TIMEOUT_SECONDS)
    except huggingface_hub.errors.RepositoryNotFoundError:
        return
    files = {file.rfilename for file in info.siblings or ()} - _OF_THE_HUB
    if files and not (CARD in files and _is_ours(api, name)):
        raise ConfigError(
            f"--push-to-hub {name}: has files that s2l_ray did not write. Nothing was changed. Give another name."
        )
    if not info.private and not is_public:
        raise ConfigError(f"--push-to-hub {name}: is public. Give --public, or another name for a private dataset.")


def _is_ours(api: Any, name: str) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        path = api.hf_hub_download(name, CARD, repo_type="dataset", local_dir=folder)
        return MARK in Path(path).read_text(encoding="utf-8")


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turns what the Hub's client raises into what the user can do; it never has the token in it."""
    import huggingface_hub

    here = f"--push-to-hub {name}"
    try:
        yield
    except (ConfigError, StorageError):
        raise
    except huggingface_hub.errors.HFValidationError as error:
        raise ConfigError(f"{here}: no name of a dataset. Give ORGANISATION/NAME.") from error
    except huggingface_hub.errors.OfflineModeIsEnabled as error:
        raise ConfigError(f"{here}: HF_HUB_OFFLINE is set. Unset it.") from error
    except huggingface_hub.errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            raise ConfigError(f"{here}: the Hub refuses the token ({status}). HF_TOKEN must allow to write there.") from error
        raise StorageError(f"{here}: the Hub refuses ({status}). Check the name; the same command tries again.") from error
    except Exception as error:  # the client raises its HTTP library's errors, and changes that library
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise StorageError(
            f"{here}: the Hub does not answer ({reason}). Check the network; the same command goes on."
        ) from error
