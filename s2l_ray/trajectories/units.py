"""Where the losses of a part under a checkpoint lie until they are joined, and which of them are there."""

from __future__ import annotations

from pydantic import ValidationError

from s2l_ray.config import RunConfig
from s2l_ray.storage.artifacts import Artifact
from s2l_ray.storage.layout import CHECKPOINT, LOSSES, TOKENIZER, WORK, folder_step
from s2l_ray.storage.ownership import read_run
from s2l_ray.storage.places import Storage
from s2l_ray.storage.records import digest
from s2l_ray.training.token_parts import TokenParts
from s2l_ray.training.token_rows import RowLimit

# Raised when the same checkpoint gives other losses than before.
SCHEMA = 2


def losses_folder(tokens: str, config: RunConfig, device: str) -> str:
    """The scratch directory of the units of one recipe: these tokens (by name), this precision, this kind of device."""
    return f"{LOSSES}/{digest([SCHEMA, tokens, config.trajectories.model_dump(mode='json'), device])}"


def missing_units(run: Storage) -> str:
    """Which losses of a run are not there yet, in a few words."""
    parts, grid = unit_grid(run)
    missing = {step: [part for part in parts if part not in done] for step, done in grid.items()}
    named = [f"{step} lacks {', '.join(left[:3])}{' ...' if len(left) > 3 else ''}" for step, left in missing.items() if left]
    if not grid:
        return "no checkpoint of the proxy has been scored"
    count = sum(map(len, missing.values()))
    if not count:
        return "its parts are not joined yet"
    return f"{count} of {len(grid) * len(parts)} units are missing ({'; '.join(named[:3])}{' ...' if len(named) > 3 else ''})"


def unit_grid(run: Storage) -> tuple[list[str], dict[str, set[str]]]:
    """The parts of a run's examples, and per kept checkpoint (`step-000010`) those whose losses are there.

    By the recipe of `run.json`, on either kind of device: units of another recipe, or of other checkpoint files, do not count.
    """
    examples, made = Artifact.find(run.child("examples")), Artifact.find(run.child("proxy"))
    if examples is None:
        return [], {}
    proxy = run.child("proxy") if made is None else made.root
    grid: dict[str, set[str]] = {}
    for file in proxy.names(recursive=True):
        folder, _, name = file.partition("/")
        if name == CHECKPOINT and folder_step(folder) is not None:
            grid[f"{folder}-{digest((proxy.read_json(file) or {}).get('files'))}"] = set()
    try:
        values = {key: value for key, value in read_run(run).items() if key not in ("schema", "provenance")}
        config = RunConfig.model_validate(values)
    except ValidationError:  # of another version, or not begun: nothing there counts
        return examples.parts(), {model.rpartition("-")[0]: set() for model in sorted(grid)}
    tokens = TokenParts.of(examples, proxy.child(TOKENIZER), RowLimit.of(config.proxy), run.child(WORK), config.examples).name
    for device in ("cpu", "cuda"):
        folder = losses_folder(tokens, config, device)
        for file in run.child(WORK).child(folder).names(recursive=True):
            model, _, part = file.partition("/")
            if model in grid:
                grid[model].add(part)
    return examples.parts(), {model.rpartition("-")[0]: done for model, done in sorted(grid.items())}
