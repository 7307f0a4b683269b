"""Names on the Hugging Face Hub, and the commits that they stand for."""

from __future__ import annotations

import os
import re
from typing import Any, Literal

from s2l_ray.config import RunConfig
from s2l_ray.config.sections import FORMATS
from s2l_ray.errors import ConfigError, DataError
from s2l_ray.progress import get_log
from s2l_ray.storage.ownership import read_run
from s2l_ray.storage.places import Storage

_TIMEOUT_SECONDS = 10


def resolve_revisions(config: RunConfig, place: Storage, reuse: Storage | None = None) -> RunConfig:
    """The config with Hub names pinned to commits: what this run or the reused one pinned before, else today's.

    Where the Hub does not answer a revision stays as it is, with a warning; loading what it names reports what is wrong.
    Raises ConfigError where the Hub shows no such name or revision.
    """
    before = read_run(place) or (read_run(reuse) if reuse is not None else {})
    named = {
        "examples": hub_id(config.examples.dataset),
        "proxy": hub_model(config.proxy.model),
        "target": hub_model(config.target.model),
    }
    for section, name in named.items():
        values = getattr(config, section)
        if name is None or _is_commit(values.revision):
            continue
        kind: Literal["model", "dataset"] = "dataset" if section == "examples" else "model"
        old = before.get(section, {})
        pinned = old.get("revision") if old.get(kind) == name else None
        try:
            revision = pinned if _is_commit(pinned) else hub_commit(kind, name, values.revision)
        except DataError as error:
            get_log("run").warning("not pinned to a commit: %s", error)
            continue
        config = config.model_copy(update={section: values.model_copy(update={"revision": revision})})
    return config


def hub_commit(kind: Literal["model", "dataset"], name: str, revision: str | None) -> str:
    """The commit that a revision of a model or dataset stands for, the newest without one. A commit needs no network.

    Raises ConfigError where the Hub shows no such name or revision, DataError where it does not answer.
    """
    if revision is not None and _is_commit(revision):
        return revision
    import huggingface_hub

    api = huggingface_hub.HfApi()
    try:
        info = (api.dataset_info if kind == "dataset" else api.model_info)(name, revision=revision, timeout=_TIMEOUT_SECONDS)
    except (huggingface_hub.errors.HFValidationError, huggingface_hub.errors.RepositoryNotFoundError) as error:
        raise ConfigError(
            f"'{name}': no such path here, and no {kind} of the Hub that it shows to you. Check the name, and for a private or "
            "gated one HF_TOKEN in the environment."
        ) from error
    except huggingface_hub.errors.RevisionNotFoundError as error:
        raise ConfigError(f"'{name}': the Hub has no revision '{revision}' of it. Check the name of the revision.") from error
    except Exception as error:  # the Hub's client raises its HTTP library's errors, and changes that library
        raise DataError(
            f"{name}: no such path here, and the Hub does not answer ({_first_line(error)}). Check the name and the network."
        ) from error
    return str(info.sha)


def hub_model(model: Any) -> str | None:
    """A model's Hub id, None for a path, a URI or a model from scratch."""
    return model if isinstance(model, str) and "://" not in model and not os.path.exists(model) else None


def hub_id(dataset: Any) -> str | None:
    """The dataset's id on the Hub if it looks like one (`org/name`) and is no path here."""
    if not isinstance(dataset, str) or not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", dataset):
        return None
    is_file_name = os.path.splitext(dataset.removesuffix(".gz"))[1].lower() in FORMATS
    return None if is_file_name or os.path.exists(dataset) else dataset


def hub_problem(dataset: str, error: Exception) -> str:
    """Why the rows of a Hub dataset cannot be read, and what to check."""
    return (
        f"{dataset}: no such file or directory here, and the Hub dataset cannot be read ({_first_line(error)}). Check the "
        "name, examples.revision, examples.subset and examples.split, the network, and `hf auth login` for a private one."
    )


def _is_commit(revision: str | None) -> bool:
    return revision is not None and re.fullmatch(r"[0-9a-f]{40}", revision) is not None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
