"""Names on the Hugging Face Hub, and the commits that they stand for."""

from __future__ import annotations

import os
import re
from typing import Any

from s2l_ray.config import ReasoningGymDataset, RunConfig
from s2l_ray.config.sections import FORMATS
from s2l_ray.errors import ConfigError, DataError
from s2l_ray.progress import get_log
from s2l_ray.storage.layout import RUN
from s2l_ray.storage.places import Storage


def resolve_revisions(config: RunConfig, place: Storage, reuse: Storage | None = None) -> RunConfig:
    """The config with Hub names pinned to commits: what this run or the reused one pinned before, else today's.

    Where the Hub cannot be reached a revision stays as it is; loading what it names says what is wrong.
    """
    before = place.read_json(RUN) or (reuse.read_json(RUN) if reuse is not None else None) or {}
    named = {
        "examples": hub_id(config.examples.dataset),
        "proxy": hub_model(config.proxy.model),
        "target": hub_model(config.target.model),
    }
    for section, name in named.items():
        values = getattr(config, section)
        if name is None or _is_commit(values.revision):
            continue
        kind, field = ("dataset", "dataset") if section == "examples" else ("model", "model")
        old = before.get(section, {})
        pinned = old.get("revision") if old.get(field) == name else None
        revision = pinned if _is_commit(pinned) else _hub_commit(kind, name, values.revision)
        config = config.model_copy(update={section: values.model_copy(update={"revision": revision})})
    return config


def hub_model(model: Any) -> str | None:
    """A model's Hub id, None for a path, a URI or a model from scratch."""
    return model if isinstance(model, str) and "://" not in model and not os.path.exists(model) else None


def _is_commit(revision: str | None) -> bool:
    return revision is not None and len(revision) == 40 and all(c in "0123456789abcdef" for c in revision)


def _hub_commit(kind: str, name: str, revision: str | None) -> str | None:
    import huggingface_hub

    api = huggingface_hub.HfApi()
    try:
        info = (api.dataset_info if kind == "dataset" else api.model_info)(name, revision=revision, timeout=10)
    except (huggingface_hub.errors.HFValidationError, huggingface_hub.errors.RepositoryNotFoundError) as error:
        raise ConfigError(
            f"'{name}': no such path here, and no {kind} of the Hub that it shows to you. Check the name, and for a private or "
            "gated one HF_TOKEN in the environment."
        ) from error
    except huggingface_hub.errors.RevisionNotFoundError as error:
        raise ConfigError(f"'{name}': the Hub has no revision '{revision}' of it. Check the name of the revision.") from error
    except Exception as error:  # noqa: BLE001 - the Hub's client raises its HTTP library's errors, and changes that library
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        get_log("run").warning("%s is not pinned to a commit: the Hub does not answer (%s)", name, reason)
        return revision
    return str(info.sha)


def hub_id(dataset: str | list[str] | ReasoningGymDataset) -> str | None:
    """The dataset's id on the Hub if it looks like one (`org/name`) and is no path here."""
    if not isinstance(dataset, str) or not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", dataset):
        return None
    is_file_name = os.path.splitext(dataset.removesuffix(".gz"))[1].lower() in FORMATS
    return None if is_file_name or os.path.exists(dataset) else dataset


def dataset_commit(dataset: str, revision: str | None) -> str:
    """The commit that a revision of a Hub dataset stands for."""
    if revision and re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    import huggingface_hub

    try:
        return str(huggingface_hub.HfApi().dataset_info(dataset, revision=revision).sha)
    except Exception as error:  # the Hub's client raises its HTTP library's errors, and changes that library
        raise DataError(hub_problem(dataset, error)) from error


def hub_problem(dataset: str, error: Exception) -> str:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return (
        f"{dataset}: no such file or directory here, and the Hub dataset cannot be read ({reason}). Check the name, "
        "examples.revision, examples.subset and examples.split, the network, and `hf auth login` for a private one."
    )
