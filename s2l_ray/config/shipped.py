"""The configs that come with the package: where they lie, what each is for, and how one is found by its name."""

from __future__ import annotations

from pathlib import Path

from s2l_ray.errors import ConfigError

_PACKAGE = Path(__file__).parents[1]
SCHEMA_FILE = "schema.json"
"""The JSON Schema beside them."""
EDITOR_COMMENT = f"# yaml-language-server: $schema={SCHEMA_FILE}"
"""Their first line, by which editors find it."""


def configs_folder() -> Path:
    """Where they lie: inside an installed package, beside the package in a checkout.

    Raises ConfigError where an installation lacks them.
    """
    inside, beside = _PACKAGE / "configs", _PACKAGE.parent / "configs"
    folder = inside if inside.is_dir() or not (_PACKAGE.parent / "pyproject.toml").is_file() else beside
    if not (folder / SCHEMA_FILE).is_file():
        raise ConfigError(f"{folder}: this installation lacks the shipped configs. Install s2l_ray again, from its wheel.")
    return folder


def shipped_configs() -> dict[str, Path]:
    """Every shipped config by its name, in order of the names."""
    return {path.stem: path for path in sorted(configs_folder().glob("*.yaml"))}


def config_path(given: str | Path) -> Path:
    """The file that a user means: a file of that name, else the shipped config of that name, else what was given."""
    path = Path(given)
    is_name = path.parent == Path() and not path.suffix
    return shipped_configs().get(path.name, path) if is_name and not path.is_file() else path


def listing() -> list[tuple[str, str]]:
    """(name, what it is for) of every shipped config. The second is the first comment line of the file."""
    return [(name, _about(path)) for name, path in shipped_configs().items()]


def _about(path: Path) -> str:
    comments = (line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith(EDITOR_COMMENT))
    return next(comments).removeprefix("#").strip()
