"""How far a run is, stage by stage and part by part."""

from __future__ import annotations

from collections.abc import Iterator

from s2l_ray.errors import ConfigError
from s2l_ray.pipeline import STAGES
from s2l_ray.progress import duration
from s2l_ray.storage.artifacts import Artifact
from s2l_ray.storage.layout import BUILDING, COMPARE, MANIFEST, RUN, STAGE_NAMES, TABLE, WORK
from s2l_ray.storage.places import Storage
from s2l_ray.trajectories.units import unit_grid


def status_text(run_dir: str) -> str:
    """How far each stage of a run is, part by part. Raises ConfigError where there is no run."""
    place = Storage(run_dir)
    if not any(place.exists(name) for name in (RUN, WORK, *STAGE_NAMES)):
        raise ConfigError(f"{place.uri}: there is no run. Give the directory of --run-dir.")
    lines = [line for stage in STAGES for line in _stage_lines(place, stage.name)]
    return "\n".join([place.uri, "", *lines, *_comparison_lines(place)])


def _comparison_lines(place: Storage) -> Iterator[str]:
    """How many cells of a comparison are there, and what its table says; nothing where none was begun."""
    compared = place.child(COMPARE)
    cells = [name for name in compared.names(recursive=True) if name.endswith(f"/{MANIFEST}") and name.count("/") == 1]
    table = compared.read_json(TABLE)
    if cells or table:
        yield f"{COMPARE:<13} {'finished' if table else 'unfinished':<11} {len(cells)} cells"
    for sentence in (table or {}).get("verdict", []):
        yield f"{'':<13} {sentence}"


def _stage_lines(place: Storage, name: str) -> Iterator[str]:
    storage = place.child(name)
    artifact = Artifact.find(storage)
    if artifact is not None:
        summary, provenance = artifact.summary, artifact.manifest["provenance"]
        reference = f"  from {artifact.root.uri}" if artifact.root != storage else ""
        rows = f"{summary['rows']:,} rows, {len(artifact.manifest['files'])} files"
        yield f"{name:<13} finished    {rows}, {duration(provenance['seconds'])}  {artifact.fingerprint}{reference}"
        return
    if storage.read_json(BUILDING) is None:
        yield f"{name:<13} not begun"
    else:
        written = [file for file in storage.names(recursive=True) if file != BUILDING]
        yield f"{name:<13} unfinished  {len(written)} files written"
    yield from _grid(place, name)


def _grid(place: Storage, name: str) -> Iterator[str]:
    """The grid of a stage made in units: per model or checkpoint, which parts are done (`#`) and which are not (`.`)."""
    parts, done = unit_grid(place) if name == "trajectories" else ([], {})
    if name == "evaluation" and (examples := Artifact.find(place.child("examples"))) is not None:
        parts = examples.parts()
        for file in place.child(WORK).child(name).names(recursive=True):
            model, _, part = file.partition("/")
            done.setdefault(model, set()).add(part)
    for model, finished in sorted(done.items()):
        marks = "".join("#" if part in finished else "." for part in parts)
        count = f"{len(finished & set(parts))}/{len(parts)}"
        yield f"{'':<13} {model:<12} {count} {marks[:64]}{'...' if len(marks) > 64 else ''}"
