"""The config outside of Python: its JSON Schema, and the shipped configs in the repository and in the wheel."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from s2l_ray.config import load_config, parse_config
from s2l_ray.config.schema import config_schema, schema_text
from s2l_ray.config.shipped import EDITOR_COMMENT, SCHEMA_FILE, config_path, configs_folder, listing, shipped_configs
from s2l_ray.errors import ConfigError

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
VALIDATOR = jsonschema.Draft202012Validator(config_schema())
MINIMAL = {
    "name": "small",
    "examples": {"dataset": "corpus.jsonl"},
    "proxy": {"model": "org/small"},
    "selection": {"budget": 0.1},
    "target": {"model": "org/large"},
}


# --- the schema ----------------------------------------------------------------------------------------------------


def test_the_schema_is_one_and_explains_every_field():
    jsonschema.Draft202012Validator.check_schema(config_schema())
    unexplained = [
        (name, field)
        for name, section in config_schema()["$defs"].items()
        for field, about in section["properties"].items()
        if "description" not in about and "$ref" not in about
    ]
    # What says itself: numbers that `s2l plan` assumes, and the kind of a tokenizer.
    assert {name for name, _ in unexplained} <= {
        "PlanConfig",
        "TrainedTokenizer",
        "MachinesConfig",
        "ReasoningGymDataset",
        "ScratchModel",
    }


def test_the_shipped_schema_is_the_one_that_is_printed():
    printed = subprocess.run(
        [sys.executable, "-c", "from s2l_ray.cli import main; main()", "schema"], capture_output=True, text=True, check=True
    )
    assert printed.stdout == schema_text()
    assert (ROOT / "configs" / SCHEMA_FILE).read_text(encoding="utf-8") == schema_text(), "s2l schema > configs/schema.json"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_config_names_its_schema_to_editors_and_follows_it(path):
    first, *_ = path.read_text(encoding="utf-8").splitlines()
    assert first == EDITOR_COMMENT
    assert (path.parent / EDITOR_COMMENT.partition("schema=")[2]).is_file()
    VALIDATOR.validate(yaml.safe_load(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_with_every_value_written_out_follows_the_schema(path):
    VALIDATOR.validate(load_config(path).model_dump(mode="json"))


@pytest.mark.parametrize(
    "change",
    [
        {"selection": {"budget": 3000}},
        {"selection": {"budget": {"tokens": 1000}, "more_budgets": [0.2, 5]}},
        {"machines": {"proxy": {"num_workers": "auto"}}},
        {"machines": {"proxy": {"num_workers": [1, 4]}}},
        {"examples": {"dataset": {"reasoning_gym": {"tasks": {"leg_counting": {"size": 3, "max_animals": 2}}}}}},
        {"trackers": ["wandb"]},
    ],
)
def test_the_schema_takes_what_a_run_takes(change):
    values = MINIMAL | change
    parse_config(values)
    VALIDATOR.validate(values)


@pytest.mark.parametrize(
    "change",
    [
        {"selection": {"budget": 0}},
        {"selection": {"budget": 1.5}},
        {"selection": {"budget": {"words": 3}}},
        {"selection": {"budget": {}}},
        {"selektion": {}},
        {"clustering": {"num_cluster": 3}},
        {"machines": {"proxy": {"num_workers": "many"}}},
        {"machines": {"proxy": {"num_workers": [1, 2, 3]}}},
        {"examples": {"dataset": {"reasoning_gym": {"tasks": {"leg_counting": {}}}}}},
        {"target": {}},
        {"trackers": ["excel"]},
    ],
)
def test_the_schema_refuses_what_a_run_refuses(change):
    values: dict[str, Any] = MINIMAL | change
    with pytest.raises(ConfigError):
        parse_config(values)
    assert not VALIDATOR.is_valid(values)


# --- shipped configs by name ---------------------------------------------------------------------------------------


def test_a_shipped_config_is_found_by_its_name_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config("quickstart").name == "quickstart"
    assert load_config("quickstart", ["clustering.num_clusters=7"]).clustering.num_clusters == 7


def test_a_file_of_that_name_wins_and_a_folder_does_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").mkdir()
    assert config_path("quickstart") == shipped_configs()["quickstart"]
    (tmp_path / "jsonl-cpu").write_text(yaml.safe_dump(MINIMAL))
    assert load_config("jsonl-cpu").name == "small"


@pytest.mark.parametrize("given", ["quickstar", "elsewhere/quickstart", "quickstart.yaml"])
def test_another_name_is_refused_with_where_the_names_are(tmp_path, monkeypatch, given):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=rf"{given}: cannot be read .*`s2l init --list`"):
        load_config(given)


def test_every_shipped_config_is_listed_with_a_line_about_it():
    listed = dict(listing())
    assert set(listed) == {path.stem for path in CONFIGS}
    assert all(about and not about.startswith("yaml-") for about in listed.values())
    assert configs_folder() == ROOT / "configs"


# --- the wheel -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built without the network from a copy: a build leaves files beside what it builds."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("s2l_ray", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", "dist", "."]
    done = subprocess.run(build, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (built,) = (folder / "dist").glob("*.whl")
    return built


def test_the_wheel_brings_the_shipped_configs_and_their_schema(wheel):
    files = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("s2l_ray/configs/")}
    assert files == {f"s2l_ray/configs/{path.name}" for path in (*CONFIGS, ROOT / "configs" / SCHEMA_FILE)}


def test_what_was_installed_from_the_wheel_plans_the_quickstart_from_any_folder(wheel, tmp_path):
    installed = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(installed)  # what pip does with a wheel of pure Python
    code = f"import sys; sys.path.insert(0, {str(installed)!r}); from s2l_ray.cli import main; main()"
    for arguments, expected in ((["init", "--list"], f"copy it from {installed}"), (["plan", "quickstart"], "runs/quickstart")):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert expected in done.stdout


def test_an_installation_without_the_configs_says_so(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    shutil.rmtree(tmp_path / "s2l_ray" / "configs")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from s2l_ray.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "init", "--list"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "lacks the shipped configs" in done.stderr


def test_the_schema_file_is_json_that_editors_read():
    assert json.loads((ROOT / "configs" / SCHEMA_FILE).read_text(encoding="utf-8"))["$schema"].startswith(
        "https://json-schema.org"
    )
