"""Who made something, when, and with which code and libraries."""

from __future__ import annotations

import datetime
import functools
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import s2l_ray

# Libraries that influence a result or its bytes.
RECORDED_LIBRARIES = ("ray", "torch", "transformers", "deepspeed", "faiss-cpu", "faiss-gpu", "numpy", "pyarrow")


def provenance() -> dict[str, Any]:
    """When and with which code and libraries something was made."""
    versions = {}
    for name in RECORDED_LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"created": created, "git": _git_commit(), "versions": versions}


@functools.cache
def _git_commit() -> str | None:
    """The commit of this source tree (`-dirty` with changes), None where it is installed without one."""
    here = Path(s2l_ray.__file__).resolve().parent
    if not (here.parent / ".git").exists():
        return None
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or None
